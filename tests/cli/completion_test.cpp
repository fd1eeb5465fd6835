// SPDX-License-Identifier: BSD-3-Clause
// `reshard completion`, `--help` and the man page: all three speak of every command and option.
#include <gmock/gmock.h>

#include <algorithm>
#include <cstdlib>
#include <regex>
#include <set>
#include <sstream>

#include "cli/run_cli.h"

namespace reshard {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::HasSubstr;

class CompletionTest : public CliTest {
 protected:
  /// What bash offers for the last of these words.
  std::set<std::string> completions(const std::vector<std::string>& words) {
    std::string line = "source '" + out("completion") + "'; COMP_WORDS=(";
    for (const std::string& word : words) line += "'" + word + "' ";
    line += "); COMP_CWORD=" + std::to_string(words.size() - 1) + "; _reshard; printf '%s\\n' \"${COMPREPLY[@]}\"";
    std::ofstream(out("completion")) << reshard_command({"completion", "bash"}).out;
    std::ofstream(out("script")) << line;
    const std::string command = "bash '" + out("script") + "' > '" + out("offered") + "'";
    EXPECT_EQ(std::system(command.c_str()), 0);
    std::istringstream offered(text_of(out("offered")));
    std::set<std::string> result;
    for (std::string word; offered >> word;) result.insert(word);
    return result;
  }
  /// The commands, as --help lists them.
  static std::vector<std::string> commands() {
    const std::string help = reshard_command({"--help"}).out;
    std::istringstream lines(help.substr(help.find("Subcommands:")));
    std::vector<std::string> result;
    std::string line;
    std::getline(lines, line);
    const std::regex command("^  ([a-z]+) .*");
    for (std::smatch m; std::getline(lines, line);) {
      if (std::regex_match(line, m, command)) result.push_back(m[1]);
    }
    return result;
  }
  /// "-f", "--force", ... of a command, as its --help lists them.
  static std::vector<std::string> options(const std::string& command) {
    const std::string help = reshard_command({command, "--help"}).out;
    std::vector<std::string> result;
    std::istringstream lines(help.substr(help.find("Options:")));
    const std::regex option("(^|,)(--?[a-z][a-z-]*)");
    for (std::string line; std::getline(lines, line);) {
      if (!line.starts_with("  -")) continue;
      const std::string names = line.substr(2, line.find(' ', 2) - 2);
      for (std::sregex_iterator it(names.begin(), names.end(), option), end; it != end; ++it)
        result.push_back((*it)[2]);
    }
    return result;
  }
};

TEST_F(CompletionTest, HelpListsWhatThereIs) {
  EXPECT_THAT(commands(), testing::ElementsAre("inspect", "verify", "digest", "diff", "convert", "reshard", "extract",
                                               "launch", "completion"));
  EXPECT_THAT(options("extract"), AllOf(Contains("-o"), Contains("--output"), Contains("--raw"), Contains("-f"),
                                        Contains("--force"), Contains("--block-bytes"), Contains("--help")));
}

TEST_F(CompletionTest, BashOffersCommandsAndOptions) {
  EXPECT_THAT(completions({"reshard", ""}), testing::IsSupersetOf(commands()));
  EXPECT_THAT(completions({"reshard", "di"}), testing::ElementsAre("diff", "digest"));
  EXPECT_THAT(completions({"reshard", "convert", "a", "b", "--to", ""}),
              testing::ElementsAre("dcp", "safetensors", "torch"));
  EXPECT_THAT(completions({"reshard", "completion", "z"}), testing::ElementsAre("zsh"));
  EXPECT_THAT(completions({"reshard", "diff", "a"}), testing::IsEmpty());  // files, which bash completes itself
  EXPECT_THAT(completions({"reshard", "launch", "-n", "2", "--", "prog", "--d"}), testing::IsEmpty());
  for (const std::string& command : commands()) {
    EXPECT_THAT(completions({"reshard", command, "-"}), testing::IsSupersetOf(options(command))) << command;
  }
}

TEST_F(CompletionTest, FishAndZshKnowThemToo) {
  const std::string fish = reshard_command({"completion", "fish"}).out;
  for (const std::string& command : commands()) {
    EXPECT_THAT(fish, HasSubstr(" -a " + command + " "));
    for (const std::string& option : options(command)) {
      const std::string name = option.starts_with("--") ? " -l " + option.substr(2) : " -s " + option.substr(1);
      EXPECT_TRUE(std::regex_search(fish, std::regex("from " + command + "'.*" + name + " "))) << command << option;
    }
  }
  EXPECT_THAT(reshard_command({"completion", "zsh"}).out,
              AllOf(HasSubstr("bashcompinit"), HasSubstr(reshard_command({"completion", "bash"}).out)));
  EXPECT_EQ(reshard_command({"completion", "cmd"}).exit_code, 2);
}

TEST_F(CompletionTest, TheManPageSpeaksOfEveryCommandAndOption) {
  std::string page = text_of(RESHARD_MAN_PAGE);
  page = std::regex_replace(page, std::regex("\\\\-"), "-");
  for (const std::string& command : commands()) {
    std::smatch entry;
    ASSERT_TRUE(std::regex_search(page, entry, std::regex("\n\\.BR " + command + " ([^\n]*)"))) << command;
    for (const std::string& option : options(command)) {
      if (option == "-h" || option == "--help") continue;
      EXPECT_TRUE(std::regex_search(entry.str(), std::regex("[\\[| ]" + option + "[ |\"]"))) << command << option;
    }
    // Nothing that is gone.
    const std::string line = entry.str();
    const std::regex option("--?[a-z][a-z-]*");
    const auto known = options(command);
    for (std::sregex_iterator it(line.begin(), line.end(), option), end; it != end; ++it) {
      EXPECT_THAT(known, Contains(it->str())) << command;
    }
  }
}

}  // namespace
}  // namespace reshard
