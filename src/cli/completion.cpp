// SPDX-License-Identifier: BSD-3-Clause
#include <string>
#include <vector>

#include "cli/app.h"

namespace reshard::cli {
namespace {

/// "-f", "--force", ... of a command; what has no dash is completed with file names.
std::vector<std::string> flags_of(const CLI::App& command) {
  std::vector<std::string> flags;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_snames()) flags.push_back("-" + name);
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
  }
  return flags;
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) result += c == '\'' ? std::string("\\'") : std::string(1, c);
  return result + "'";
}

std::string bash(const CLI::App& app, const std::vector<const CLI::App*>& commands) {
  std::vector<std::string> names;
  for (const CLI::App* command : commands) names.push_back(command->get_name());
  std::string text =
      "_reshard() {\n"
      "  local current=${COMP_WORDS[COMP_CWORD]} words i\n"
      "  for ((i = 1; i < COMP_CWORD; i++)); do [[ ${COMP_WORDS[i]} == -- ]] && return; done\n"
      "  COMPREPLY=()\n"
      "  if ((COMP_CWORD == 1)); then words='" +
      joined(names) + " " + joined(flags_of(app)) + "'\n  else\n    case ${COMP_WORDS[1]} in\n";
  for (const CLI::App* command : commands) {
    std::vector<std::string> words = flags_of(*command);
    if (command->get_name() == "completion") words.insert(words.end(), {"bash", "zsh", "fish"});
    text += "      " + command->get_name() + ") words='" + joined(words) + "' ;;\n";
  }
  return text +
         "    esac\n"
         "    [[ ${COMP_WORDS[COMP_CWORD - 1]} == --to ]] && words='" +
         joined({kWritableKinds.begin(), kWritableKinds.end()}) +
         "'\n"
         "  fi\n"
         "  if ((COMP_CWORD == 1)) || [[ $current == -* || ${COMP_WORDS[COMP_CWORD - 1]} == --to || "
         "${COMP_WORDS[1]} == completion ]]; then\n"
         "    mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$current\")\n"
         "  fi\n"
         "}\n"
         "complete -o bashdefault -o default -F _reshard reshard\n";
}

std::string fish(const CLI::App& app, const std::vector<const CLI::App*>& commands) {
  std::string text = "complete -c reshard -n __fish_use_subcommand -f\n";
  const auto options = [&](const CLI::App& command, const std::string& condition) {
    for (const CLI::Option* option : command.get_options()) {
      if (option->get_snames().empty() && option->get_lnames().empty()) continue;
      text += "complete -c reshard -n " + condition;
      for (const std::string& name : option->get_snames()) text += " -s " + name;
      for (const std::string& name : option->get_lnames()) text += " -l " + name;
      if (option->get_items_expected_max() > 0) text += " -r";
      text += " -d " + quoted(option->get_description()) + "\n";
    }
  };
  options(app, "__fish_use_subcommand");
  for (const CLI::App* command : commands) {
    const std::string& name = command->get_name();
    text +=
        "complete -c reshard -n __fish_use_subcommand -a " + name + " -d " + quoted(command->get_description()) + "\n";
    options(*command, "'__fish_seen_subcommand_from " + name + "'");
  }
  return text + "complete -c reshard -n '__fish_seen_subcommand_from completion' -f -a 'bash zsh fish'\n";
}

}  // namespace

std::string completion_script(const CLI::App& app, const std::string& shell) {
  const std::vector<const CLI::App*> commands = app.get_subcommands([](const CLI::App*) { return true; });
  if (shell == "fish") return fish(app, commands);
  const std::string script = bash(app, commands);
  return shell == "zsh" ? "autoload -U +X bashcompinit && bashcompinit\n" + script : script;
}

}  // namespace reshard::cli
