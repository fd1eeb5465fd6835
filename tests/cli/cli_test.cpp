// SPDX-License-Identifier: BSD-3-Clause
// The built `reshard` program, run as a user runs it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/inotify.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "cli/run_cli.h"
#include "reshard/format/sha256.h"
#include "storage/checkpoint_runs.h"
#include "storage/hostile_checkpoints.h"
#include "support/oracle.h"
#include "support/temporary_directory.h"

namespace reshard {
namespace {

using testing::HasSubstr;
using testing::Not;

TEST_F(CliTest, InspectPrintsKeysShapesAndFiles) {
  const CommandResult run = reshard_command({"inspect", path()});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("2 tensors (116 B), 1 values, in 4 items and 2 files"));
  EXPECT_THAT(run.out, HasSubstr("saved by reshard"));
  EXPECT_THAT(run.out, HasSubstr(saved_.save_id));
  const auto line = [&](const char* pattern) { return std::regex_search(run.out, std::regex(pattern)); };
  EXPECT_TRUE(line("model\\.weight +float32 +\\[6, 4\\] +2 +96\n")) << run.out;
  EXPECT_TRUE(line("model\\.bias +float32 +\\[5\\] +1 +20\n")) << run.out;
  EXPECT_TRUE(line("step +value")) << run.out;
  EXPECT_TRUE(line("__1_0\\.distcp +2 +[0-9]+\n")) << run.out;
  EXPECT_EQ(run.err, "");
  EXPECT_THAT(reshard_command({"inspect", "--chunks", path()}).out, HasSubstr("[3, 0]+[3, 4]"));
}

// Keys, shapes, dtypes, chunks and their places, against what PyTorch itself read from its catalogues.
TEST_F(CliTest, InspectJsonAgreesWithPyTorchOnEveryGoldenCheckpoint) {
  for (const std::string& name : OracleCase::names()) {
    const OracleCase oracle(name);
    const CommandResult run = reshard_command({"inspect", oracle.directory().string(), "--json"});
    ASSERT_EQ(run.exit_code, 0) << name << run.err;
    const auto found = nlohmann::json::parse(run.out);
    EXPECT_EQ(found.at("saved_by"), "PyTorch");
    const auto& catalogue = oracle.expected().at("catalogue");
    EXPECT_EQ(found.at("values"), catalogue.at("bytes")) << name;
    auto tensors = found.at("tensors");
    for (auto& tensor : tensors) {
      tensor["size"] = tensor["shape"];
      tensor.erase("shape");
      tensor.erase("bytes");
    }
    EXPECT_EQ(tensors, catalogue.at("tensors")) << name;
  }
}

TEST_F(CliTest, InspectSaysWhichFilesAreMissing) {
  std::filesystem::remove(directory_ / "__1_0.distcp");
  const CommandResult run = reshard_command({"inspect", path()});
  EXPECT_EQ(run.exit_code, 0);
  EXPECT_TRUE(std::regex_search(run.out, std::regex("__1_0\\.distcp +2 +missing\n"))) << run.out;
  const auto json = nlohmann::json::parse(reshard_command({"inspect", path(), "--json"}).out);
  EXPECT_TRUE(json.at("files").at("__1_0.distcp").at("size").is_null());
}

// --- through zstd ---

class CompressedCliTest : public CliTest {
 protected:
  void SetUp() override {
    CliTest::SetUp();
    std::vector<MemorySaveState> ranks;
    for (const auto& mine : split({600, 40}, 0, 2)) {
      ranks.push_back(MemorySaveState({tensor_entry("w", {600, 40}, mine)}));
      for (std::byte& byte : ranks.back().memory().buffer(0)) byte &= std::byte{3};
      ranks.back().add_value("step", value_archive("seven"));
    }
    save_checkpoint(out("plain"), ranks);
    save_checkpoint(out("compressed"), ranks, {.extensions = {std::make_shared<ZStandard>()}});
  }
};

TEST_F(CompressedCliTest, InspectShowsCompressionAndRatio) {
  const CommandResult run = reshard_command({"inspect", out("compressed")});
  std::smatch match;
  ASSERT_TRUE(std::regex_search(run.out, match,
                                std::regex("3 items through stream\\.zstd/1: tensors of 93\\.8 KiB in ([0-9.]+) KiB, "
                                           "ratio ([0-9.]+)\n")))
      << run.out;
  EXPECT_NEAR(std::stod(match[2]), 93.75 / std::stod(match[1]), 0.1);
  EXPECT_GT(std::stod(match[2]), 2);
  const auto json = nlohmann::json::parse(reshard_command({"inspect", out("compressed"), "--json"}).out);
  const auto& zstd = json.at("transforms").at("stream.zstd/1");
  EXPECT_EQ(zstd.at("items"), 3);
  EXPECT_EQ(zstd.at("tensor_bytes"), 96'000);
  EXPECT_EQ(json.at("tensors").at("w").at("chunks").at(0).at("transforms"), nlohmann::json({"stream.zstd/1"}));
  EXPECT_THAT(reshard_command({"inspect", out("plain")}).out, Not(HasSubstr("through")));
}

TEST_F(CompressedCliTest, EveryCommandReadsIt) {
  const std::string compressed = out("compressed");
  const auto expect_same_as_plain = [&](const std::string& path) {
    const CommandResult run = reshard_command({"diff", out("plain"), path});
    EXPECT_EQ(run.exit_code, 0) << path << "\n" << run.out << run.err;
    EXPECT_EQ(reshard_command({"digest", path}).out, reshard_command({"digest", out("plain")}).out);
    EXPECT_EQ(reshard_command({"verify", path}).exit_code, 0);
  };
  expect_same_as_plain(compressed);
  for (const auto& [format, name] : {std::pair{"dcp", "as_dcp"}, std::pair{"torch", "as.pt"}}) {
    const CommandResult run = reshard_command({"convert", compressed, out(name), "--to", format});
    EXPECT_EQ(run.exit_code, 0) << run.err;
    expect_same_as_plain(out(name));
  }
  EXPECT_EQ(reshard_command({"reshard", compressed, out("three"), "-n", "3"}).exit_code, 0);
  expect_same_as_plain(out("three"));
  for (const char* from : {"plain", "compressed"}) {
    const std::string file = out(std::string(from) + ".npy");
    EXPECT_EQ(reshard_command({"extract", out(from), "w", "-o", file}).exit_code, 0);
    EXPECT_EQ(text_of(file), text_of(out("plain.npy")));
  }
}

TEST_F(CompressedCliTest, WhatIsDamagedIsNamed) {
  const std::string file = out("compressed") + "/__1_0.distcp";
  std::fstream(file, std::ios::binary | std::ios::in | std::ios::out).seekp(1000).put('x');
  for (const char* command : {"verify", "digest"}) {
    const CommandResult run = reshard_command({command, out("compressed")});
    EXPECT_EQ(run.exit_code, 1) << command;
    EXPECT_THAT(run.err, HasSubstr("key w, file __1_0.distcp, offset 0")) << command;
  }
}

/// The names below a directory that are opened while it lives, by any process.
class OpenWatch {
 public:
  explicit OpenWatch(const std::string& directory) : fd_(::inotify_init1(IN_NONBLOCK | IN_CLOEXEC)) {
    if (fd_ < 0 || ::inotify_add_watch(fd_, directory.c_str(), IN_OPEN) < 0)
      throw std::runtime_error("cannot watch " + directory);
  }
  OpenWatch(const OpenWatch&) = delete;
  OpenWatch& operator=(const OpenWatch&) = delete;
  ~OpenWatch() { ::close(fd_); }
  std::set<std::string> opened() const {
    std::set<std::string> names;
    alignas(inotify_event) char buffer[1 << 16];
    for (ssize_t n = 0; (n = ::read(fd_, buffer, sizeof(buffer))) > 0;) {
      for (ssize_t at = 0; at < n;) {
        const auto* event = reinterpret_cast<const inotify_event*>(buffer + at);
        if (event->len > 0) names.insert(event->name);
        at += static_cast<ssize_t>(sizeof(inotify_event) + event->len);
      }
    }
    return names;
  }

 private:
  int fd_;
};

TEST_F(CliTest, InspectOpensNoDataFile) {
  for (const char* flag : {"--chunks", "--json"}) {
    const OpenWatch watch(path());
    EXPECT_EQ(reshard_command({"inspect", flag, path()}).exit_code, 0);
    EXPECT_THAT(watch.opened(), testing::ElementsAre(".metadata"));
  }
  const OpenWatch watch(path());
  reshard_command({"digest", path()});
  EXPECT_THAT(watch.opened(), testing::IsSupersetOf({"__0_0.distcp", "__1_0.distcp"})) << "the watch sees nothing";
  // One that cannot be opened does not matter to it.
  for (const char* name : {"__0_0.distcp", "__1_0.distcp"}) {
    std::filesystem::remove(directory_ / name);
    std::filesystem::create_symlink("nowhere", directory_ / name);
  }
  const CommandResult run = reshard_command({"inspect", path()});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("missing"));
}

TEST_F(CliTest, NeedsNoLibTorch) {
  const TemporaryDirectory output;
  const std::string command = "ldd " RESHARD_CLI " > " + output / "libraries";
  ASSERT_EQ(std::system(command.c_str()), 0);
  const std::string libraries = text_of(output / "libraries");
  EXPECT_THAT(libraries, HasSubstr("libc.so"));
  for (const char* name : {"libtorch", "libc10", "libcuda", "libpython"}) EXPECT_THAT(libraries, Not(HasSubstr(name)));
}

TEST_F(CliTest, ControlCharactersInKeysDoNotReachTheTerminal) {
  save_checkpoint(path(), states<MemorySaveState>({{replica_entry("evil\x1b[2J\nkey", {2})}}));
  for (const char* command : {"inspect", "digest"}) {
    const CommandResult run = reshard_command({command, path()});
    EXPECT_THAT(run.out, HasSubstr("evil\\x1b[2J\\x0akey"));
    EXPECT_THAT(run.out, Not(HasSubstr("\x1b")));
  }
}

TEST_F(CliTest, VerifyAcceptsWhatIsWhole) {
  const CommandResult run = reshard_command({"verify", path()});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("whole: 2 tensors and 1 values in 4 items, 2 files"));
  EXPECT_EQ(run.err, "");
  EXPECT_EQ(reshard_command({"verify", "-q", path()}).out, "");
  for (const std::string& name : OracleCase::names()) {
    const CommandResult golden = reshard_command({"verify", OracleCase(name).directory().string()});
    EXPECT_EQ(golden.exit_code, 0) << name << golden.err;
  }
}

TEST_F(CliTest, VerifyNamesEachProblemOnALine) {
  Bytes bytes = read_test_file(directory_ / "__1_0.distcp");
  bytes.at(704) ^= std::byte{1};  // the first byte of the elements
  std::ofstream(directory_ / "__1_0.distcp", std::ios::binary) << as_text(bytes);
  std::filesystem::remove(directory_ / (".reshard-" + saved_.save_id + "-0"));
  const CommandResult run = reshard_command({"verify", path()});
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_THAT(run.err, HasSubstr("key model.weight, file __1_0.distcp, offset "));
  EXPECT_THAT(run.err,
              HasSubstr("the sidecar with the checksums of rank 0 is missing; file .reshard-" + saved_.save_id + "-0"));
  EXPECT_THAT(run.out, HasSubstr("broken"));
}

TEST_F(CliTest, VerifyChecksFilesOfTorchSave) {
  ASSERT_EQ(reshard_command({"convert", path(), out("m.pt"), "--to", "torch"}).exit_code, 0);
  const CommandResult run = reshard_command({"verify", out("m.pt")});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("whole: 2 tensors and 1 values in 8 items, 1 files"));
  const Bytes whole = read_test_file(out("m.pt"));
  const auto json = nlohmann::json::parse(reshard_command({"inspect", "--json", out("m.pt")}).out);
  const auto place = json.at("tensors").at("model.bias").at("chunks").at(0).at("offset").get<size_t>();
  Bytes broken = whole;
  broken.at(place) ^= std::byte{1};
  std::ofstream(out("m.pt"), std::ios::binary) << as_text(broken);
  const CommandResult found = reshard_command({"verify", out("m.pt")});
  EXPECT_EQ(found.exit_code, 1);
  EXPECT_THAT(found.err,
              HasSubstr("record archive/data/1 has another CRC-32 than the directory says; file " + out("m.pt")));
  EXPECT_THAT(found.out, HasSubstr("broken"));
}

TEST_F(CliTest, DigestJsonEqualsThatOfEveryGoldenTensor) {
  for (const std::string& name : OracleCase::names()) {
    const OracleCase oracle(name);
    nlohmann::json expected = nlohmann::json::object();
    for (const auto& item : oracle.expected().at("tensors").items()) {
      expected[item.key()] = to_hex(Sha256::of(oracle.tensor(item.key())));
    }
    const CommandResult run = reshard_command({"digest", oracle.directory().string(), "--json"});
    ASSERT_EQ(run.exit_code, 0) << name << run.err;
    EXPECT_EQ(nlohmann::json::parse(run.out), expected) << name;
  }
}

TEST_F(CliTest, DigestPrintsALineForEachTensor) {
  const std::string digest = to_hex(Sha256::of(pattern_of("model.bias", {5}, whole_box({5}), 4)));
  const CommandResult run = reshard_command({"digest", path()});
  EXPECT_EQ(run.exit_code, 0);
  EXPECT_THAT(run.out, HasSubstr(digest + "  model.bias\n"));
  EXPECT_THAT(run.out, Not(HasSubstr("step")));
}

TEST_F(CliTest, LaunchStartsRanksWithTheirEnvironment) {
  const CommandResult run =
      reshard_command({"launch", "-n", "2", "--", "sh", "-c", "echo $RANK of $WORLD_SIZE $1", "sh", "--x"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, HasSubstr("[rank 0] 0 of 2 --x\n"));
  EXPECT_THAT(run.out, HasSubstr("[rank 1] 1 of 2 --x\n"));
}

TEST_F(CliTest, LaunchNamesTheRankThatFailed) {
  const CommandResult run = reshard_command({"launch", "-n", "2", "--", "sh", "-c", "exit $(($RANK * 7))"});
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_THAT(run.err, HasSubstr("reshard: rank 1 exited with code 7\n"));
  EXPECT_THAT(run.err, Not(HasSubstr("rank 0")));
}

TEST_F(CliTest, LaunchEndsARunPastItsDeadline) {
  const CommandResult run = reshard_command({"launch", "-n", "1", "--deadline", "0.2", "--", "sleep", "60"});
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_THAT(run.err, HasSubstr("the deadline has passed"));
}

TEST_F(CliTest, AnErrorIsOneLineAndExitCodeOne) {
  for (const char* command : {"inspect", "verify", "digest"}) {
    const CommandResult run = reshard_command({command, path() + "/nowhere"});
    EXPECT_EQ(run.exit_code, 1);
    EXPECT_EQ(run.out, "");
    EXPECT_EQ(run.err, "reshard: not found: there is no such checkpoint; file " + path() + "/nowhere\n");
  }
}

/// Every command ends by itself, with exit code 1 where it reads what is wrong, and says so on lines that are fit to print.
class HostileCliTest : public testing::TestWithParam<HostileCheckpoint> {};

TEST_P(HostileCliTest, IsNamedAndExitCodeOne) {
  const HostileCheckpoint& hostile = GetParam();
  const GoodCheckpoint checkpoint;
  ASSERT_NO_FATAL_FAILURE(hostile.damage(checkpoint));
  const std::string code = "reshard: " + std::string(to_string(hostile.code)) + ": ";
  for (const std::string command : {"inspect", "verify", "digest"}) {
    const CommandResult run = reshard_command({command, checkpoint.path()});
    const bool reads_values = command == "verify";
    const bool sees = hostile.seen_by == SeenBy::kCatalogue || reads_values ||
                      (hostile.seen_by == SeenBy::kLoad && command == "digest");
    if (sees) {
      EXPECT_EQ(run.exit_code, 1) << command;
      EXPECT_THAT(run.err, HasSubstr(code)) << command;
      EXPECT_THAT(run.err, HasSubstr(hostile.text)) << command;
    } else {
      EXPECT_TRUE(run.exit_code == 0 || run.exit_code == 1) << command << ": " << run.exit_code;
    }
    for (const char c : run.err) EXPECT_TRUE(c == '\n' || c >= ' ' || (c & 0x80) != 0) << command;
  }
  // Commands that read every element and every value, and write.
  const TemporaryDirectory out;
  for (const auto& arguments :
       std::vector<std::vector<std::string>>{{"diff", checkpoint.path(), checkpoint.path()},
                                             {"convert", checkpoint.path(), out / "x", "--to", "torch"},
                                             {"reshard", checkpoint.path(), out / "x", "-n", "2"}}) {
    const CommandResult run = reshard_command(arguments);
    const int trouble = arguments[0] == "diff" ? 2 : 1;
    if (hostile.seen_by == SeenBy::kCatalogue || hostile.seen_by == SeenBy::kLoad) {
      EXPECT_EQ(run.exit_code, trouble) << arguments[0];
    }
    EXPECT_TRUE(run.exit_code == 0 || run.exit_code == trouble) << arguments[0] << ": " << run.exit_code << run.err;
    if (run.exit_code == 0) {
      std::filesystem::remove_all(out / "x");
    } else {
      EXPECT_EQ(std::ranges::count(run.err, '\n'), 1) << run.err;
      EXPECT_TRUE(std::filesystem::is_empty(out.path())) << arguments[0];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, HostileCliTest, testing::ValuesIn(hostile_checkpoints()),
                         [](const auto& test) { return std::string(test.param.name); });

TEST_F(CliTest, WrongUsageIsExitCodeTwo) {
  const std::vector<std::vector<std::string>> wrong{{},
                                                    {"inspect"},
                                                    {"frobnicate"},
                                                    {"inspect", path(), "--what"},
                                                    {"launch", "-n", "2"},
                                                    {"launch", "-n", "0", "--", "true"},
                                                    {"launch", "--", "true"}};
  for (const auto& arguments : wrong) {
    const CommandResult run = reshard_command(arguments);
    EXPECT_EQ(run.exit_code, 2) << testing::PrintToString(arguments);
    EXPECT_NE(run.err, "") << testing::PrintToString(arguments);
  }
  EXPECT_EQ(reshard_command({"--help"}).exit_code, 0);
}

TEST_F(CliTest, OutputThatCannotBeWrittenIsAnError) {
  const std::string command = std::string(RESHARD_CLI) + " inspect " + path() + " > /dev/full 2> /dev/null";
  const int status = std::system(command.c_str());
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 1);
}

}  // namespace
}  // namespace reshard
