// SPDX-License-Identifier: BSD-3-Clause
#include "s3/config.h"

#include <cstdlib>
#include <initializer_list>
#include <map>
#include <sstream>

namespace reshard::s3 {
namespace {

constexpr uint64_t kMaxFileBytes = 1 << 20;

using Section = std::map<std::string, std::string>;

std::string from_environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

std::string first_of(std::initializer_list<std::string> values) {
  for (const std::string& value : values) {
    if (!value.empty()) return value;
  }
  return {};
}

std::string trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r");
  if (begin == std::string_view::npos) return {};
  return std::string(text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1));
}

/// The settings of one [section]; none where there is no such file or section. Settings inside settings are left out.
Section read_section(const std::string& file, const std::string& section) {
  Bytes bytes;
  try {
    FileSystem& files = local_file_system();
    bytes = files.read_file(files.real_path(file), kMaxFileBytes);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) return {};
    throw;
  }
  Section settings;
  bool inside = false;
  std::istringstream lines{std::string(as_text(bytes))};
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#' || line[0] == ';') continue;
    if (line[0] == '[') {
      inside = trimmed(std::string_view(line).substr(1, line.find(']') - 1)) == section;
    } else if (const size_t equals = line.find('=');
               inside && line[0] != ' ' && line[0] != '\t' && equals != std::string::npos) {
      settings[trimmed(line.substr(0, equals))] = trimmed(line.substr(equals + 1));
    }
  }
  return settings;
}

std::optional<S3Credentials> credentials_in(Section& section) {
  if (section["aws_access_key_id"].empty() || section["aws_secret_access_key"].empty()) return std::nullopt;
  return S3Credentials{section["aws_access_key_id"], section["aws_secret_access_key"], section["aws_session_token"]};
}

}  // namespace

S3Options resolve(S3Options options) {
  const std::string home = from_environment("HOME") + "/.aws/";
  const std::string credentials_file =
      first_of({from_environment("AWS_SHARED_CREDENTIALS_FILE"), home + "credentials"});
  const std::string config_file = first_of({from_environment("AWS_CONFIG_FILE"), home + "config"});
  const std::string profile = first_of({options.profile, from_environment("AWS_PROFILE"), "default"});
  Section config = read_section(config_file, profile == "default" ? profile : "profile " + profile);

  options.region = first_of({options.region, from_environment("AWS_REGION"), from_environment("AWS_DEFAULT_REGION"),
                             config["region"], "us-east-1"});
  options.endpoint = first_of({options.endpoint, from_environment("AWS_ENDPOINT_URL_S3"),
                               from_environment("AWS_ENDPOINT_URL"), config["endpoint_url"]});
  if (!options.credentials && options.profile.empty()) {
    Section variables{{"aws_access_key_id", from_environment("AWS_ACCESS_KEY_ID")},
                      {"aws_secret_access_key", from_environment("AWS_SECRET_ACCESS_KEY")},
                      {"aws_session_token", from_environment("AWS_SESSION_TOKEN")}};
    options.credentials = credentials_in(variables);
  }
  if (!options.credentials) {
    Section section = read_section(credentials_file, profile);
    options.credentials = credentials_in(section);
  }
  if (!options.credentials) options.credentials = credentials_in(config);
  if (!options.credentials) {
    throw Error(ErrorCode::kFailedPrecondition, "there are no credentials for S3",
                {.wanted = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or profile \"" + profile + "\" in " +
                           credentials_file + " or " + config_file});
  }
  return options;
}

}  // namespace reshard::s3
