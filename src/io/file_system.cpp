// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/io/file_system.h"

#include <cerrno>
#include <random>
#include <system_error>

#include "reshard/core/hooks.h"
#include "reshard/metadata/metadata.h"

namespace reshard {
namespace {

std::string random_suffix() {
  std::random_device device;
  std::string text;
  for (int i = 0; i < 16; ++i) text += "0123456789abcdef"[device() % 16];
  return text;
}

}  // namespace

Error os_error(int error_number, std::string_view operation, const std::string& path) {
  const ErrorCode code = error_number == ENOENT   ? ErrorCode::kNotFound
                         : error_number == EEXIST ? ErrorCode::kAlreadyExists
                                                  : ErrorCode::kIo;
  return Error(code, "cannot " + std::string(operation) + ": " + std::generic_category().message(error_number),
               {.file = path});
}

std::string join_path(const std::string& directory, const std::string& relative_path) {
  validate_relative_path(relative_path, "");
  if (directory.empty() || directory.back() == '/') return directory + relative_path;
  return directory + "/" + relative_path;
}

Bytes FileSystem::read_file(const std::string& path, uint64_t max_bytes) {
  const auto file = open(path);
  if (file->size() > max_bytes) {
    throw Error(ErrorCode::kCorruptData, "the file is too long",
                {.file = path,
                 .wanted = "at most " + std::to_string(max_bytes) + " bytes",
                 .found = std::to_string(file->size()) + " bytes"});
  }
  Bytes bytes(static_cast<size_t>(file->size()));
  file->read_exactly(0, bytes, "whole file");
  return bytes;
}

void replace_file_atomically(FileSystem& file_system, const std::string& directory, const std::string& name,
                             ByteSpan bytes, bool durable, Committed* replaced) {
  replace_file_atomically(
      file_system, directory, name, [&](WritableFile& file) { file.write(0, bytes); }, durable, replaced);
}

void replace_file_atomically(FileSystem& file_system, const std::string& directory, const std::string& name,
                             const std::function<void(WritableFile&)>& fill, bool durable, Committed* replaced) {
  Committed unheard;
  Committed& state = replaced != nullptr ? *replaced : unheard;
  state = Committed::kNo;
  if (name.find('/') != std::string::npos) {
    throw Error(ErrorCode::kInvalidArgument, "a name in a directory cannot hold a slash", {.file = name});
  }
  const std::string path = join_path(directory, name);
  const bool renames = !file_system.publishes_on_close();
  const std::string temporary = renames ? path + std::string(kTemporaryInfix) + random_suffix() : path;
  auto file = file_system.create(temporary, renames ? CreateMode::kExclusive : CreateMode::kTruncate);
  try {
    test_point("commit.before_write");
    fill(*file);
    test_point("commit.before_sync");
    if (durable || !renames) file->sync();
    if (renames) file->close();
    test_point("commit.before_rename");
    state = Committed::kUnknown;
    if (renames) {
      file_system.rename(temporary, path);
    } else {
      file->close();
    }
  } catch (...) {
    file.reset();
    if (!renames) {
      if (current_failure().code != ErrorCode::kUnavailable) state = Committed::kNo;
      throw;
    }
    try {
      file_system.remove(temporary);
    } catch (const Error& error) {
      log(LogLevel::kWarning, std::string("a temporary file stays behind: ") + error.what());
    }
    throw;
  }
  test_point("commit.after_rename");
  if (durable) file_system.sync_directory(directory);
  state = Committed::kYes;
  test_point("commit.after_sync");
}

}  // namespace reshard
