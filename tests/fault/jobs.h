// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// Saves and loads of generations (storage/generations.h) whose failure is a value, and what must hold after each.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "reshard/protocol/async_executor.h"
#include "reshard/storage/verify.h"
#include "storage/generations.h"
#include "support/temporary_directory.h"

namespace reshard {

/// What a save or load was for one rank.
struct RankOutcome {
  bool ok = false;
  std::shared_ptr<const CheckpointError> error;
  std::string other_error;  // anything but a CheckpointError, which must not happen
  std::string text() const { return ok ? "no error" : error ? error->what() : other_error; }
};

/// Runs body(rank, transport) on ranks that are threads, in one process also as the only rank.
template <class Body>
std::vector<RankOutcome> run_job(size_t world_size, const Body& body,
                                 std::chrono::milliseconds silence = kTestSilence) {
  std::vector<RankOutcome> outcomes(world_size);
  ThreadHub hub(static_cast<int>(world_size), silence);
  run_ranks(static_cast<int>(world_size), [&](int rank) {
    RankOutcome& outcome = outcomes[static_cast<size_t>(rank)];
    try {
      const auto transport = world_size == 1 ? solo_transport() : hub.transport(rank);
      body(static_cast<size_t>(rank), *transport);
      outcome.ok = true;
    } catch (const CheckpointError& error) {
      outcome.error = std::make_shared<const CheckpointError>(error);
    } catch (const std::exception& error) {
      outcome.other_error = error.what();
    } catch (...) {
      outcome.other_error = "not a std::exception";
    }
  });
  return outcomes;
}

inline std::vector<RankOutcome> try_save(const std::string& directory, int number, size_t world_size,
                                         FileSystem& files = local_file_system(),
                                         const FileSystemWriterOptions& options = {}) {
  const std::vector<MemorySaveState> states = generation(number, world_size);
  return run_job(world_size, [&](size_t rank, Transport& transport) {
    DefaultSavePlanner planner;
    FileSystemWriter writer(directory, options, files);
    run_save(transport, states[rank], planner, writer);
  });
}

/// Saves one rank's `live` in the background, and overwrites it as soon as it is staged.
inline void run_async_save(Transport& transport, MemorySaveState live, const std::string& directory) {
  const int rank = current_rank();
  std::optional<MemorySaveState> staged;
  AsyncSaveExecutor executor;
  AsyncSaveExecutor::Job job;
  job.stage = [&] {
    staged = live;
    test_point("stage.copied");
  };
  job.save = [&](const std::exception_ptr& failure) {
    current_rank() = rank;
    FileSystemWriter writer(directory);
    if (failure) run_failed_save(transport, writer, failure);
    DefaultSavePlanner planner;
    return run_save(transport, *staged, planner, writer);
  };
  const AsyncSaveResponse response = executor.submit(std::move(job));
  response.staging_completion.wait();
  for (size_t entry = 0; entry < live.entries().size(); ++entry) {
    for (std::byte& byte : live.memory().buffer(entry)) byte = ~byte;
  }
  response.upload_completion.get();
}
inline std::vector<RankOutcome> try_async_save(const std::string& directory, int number, size_t world_size) {
  const std::vector<MemorySaveState> states = generation(number, world_size);
  return run_job(world_size,
                 [&](size_t rank, Transport& transport) { run_async_save(transport, states[rank], directory); });
}

/// Each rank loads all of it.
inline std::vector<RankOutcome> try_load(const std::string& directory, std::vector<MemoryLoadState>& states,
                                         FileSystem& files = local_file_system()) {
  return run_job(states.size(), [&](size_t rank, Transport& transport) {
    DefaultLoadPlanner planner;
    FileSystemReader reader(directory, {}, files);
    run_load(transport, states[rank], planner, reader);
  });
}

/// The generation that the directory holds, bit for bit; 0 where it says that it holds no checkpoint; else -1 and why.
inline int examine(const std::string& directory, FileSystem& files, std::string& problem) {
  try {
    const int number = loaded_generation(directory, files);
    if (number < 0) problem = "values of several saves, or of none";
    for (const Error& defect : verify_checkpoint(directory, files).problems) problem += defect.what();
    return problem.empty() ? number : -1;
  } catch (const Error& error) {
    try {
      FileSystemReader(directory, {}, files).read_metadata();
    } catch (const Error& metadata_error) {
      if (metadata_error.code() == ErrorCode::kNotFound) return 0;
    }
    problem = std::string("a checkpoint is lost: ") + error.what();
    return -1;
  }
}
/// The same, with a test failure.
inline int generation_in(const std::string& directory, FileSystem& files = local_file_system()) {
  std::string problem;
  const int number = examine(directory, files, problem);
  EXPECT_EQ(problem, "");
  return number;
}

/// One outcome for all: all succeeded, or all have the same CheckpointError.
inline void expect_one_outcome(const std::vector<RankOutcome>& outcomes) {
  for (const RankOutcome& outcome : outcomes) {
    EXPECT_EQ(outcome.other_error, "");
    EXPECT_EQ(outcome.text(), outcomes[0].text());
  }
}

/// What must be in the directory after a save of `next` over `before`, as far as one rank knows.
inline void expect_generation(int found, int before, int next, const RankOutcome& outcome) {
  if (outcome.ok) {
    EXPECT_EQ(found, next);
  } else if (outcome.error && outcome.error->committed() == Committed::kNo) {
    EXPECT_EQ(found, before);
  } else if (outcome.error && outcome.error->committed() == Committed::kYes) {
    EXPECT_EQ(found, next);
  } else {
    EXPECT_THAT(found, testing::AnyOf(before, next));
  }
}

/// Nothing that was left stands in the way of the next save, nor is any of it taken for data.
inline void expect_next_save_works(const std::string& directory, size_t world_size,
                                   FileSystem& files = local_file_system()) {
  const auto outcomes = try_save(directory, 99, world_size, files, {.sync_files = false});
  EXPECT_TRUE(outcomes[0].ok) << outcomes[0].text();
  EXPECT_EQ(generation_in(directory, files), 99);
}

inline std::vector<std::string> names_in(const std::string& directory) {
  return std::filesystem::exists(directory) ? local_file_system().list(directory) : std::vector<std::string>();
}

/// Makes fresh copies of one prepared directory. Generation 0: an empty place.
class Prepared {
 public:
  Prepared(int number, size_t world_size) : number_(number) {
    if (number != 0) save_checkpoint(original_ / "checkpoint", generation(number, world_size));
  }
  int number() const { return number_; }
  /// Replaces what is at `path`.
  void copy_to(const std::string& path) const {
    std::filesystem::remove_all(path);
    if (number_ != 0) std::filesystem::copy(original_ / "checkpoint", path);
  }

 private:
  TemporaryDirectory original_;
  int number_;
};

/// No warnings meanwhile: a sweep makes thousands.
class QuietLog {
 public:
  QuietLog() {
    set_log_sink([](LogLevel, std::string_view) {});
  }
  ~QuietLog() { set_log_sink(nullptr); }
};

}  // namespace reshard
