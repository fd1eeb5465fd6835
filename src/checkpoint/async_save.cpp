// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/checkpoint/async_save.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "checkpoint/group_transport.h"
#include "checkpoint/save_state.h"
#include "checkpoint/staging.h"
#include "protocol/save_process.h"
#include "reshard/core/error.h"

namespace reshard {

struct DefaultStager::State {
  explicit State(const StagingOptions& given) : options(given), executor(given.max_in_flight) {
    for (size_t i = 0; i < std::max<size_t>(given.max_in_flight, 1); ++i)
      buffers.push_back(std::make_unique<StagingBuffer>(totals, /*shared=*/!given.save_process.empty()));
    if (!given.save_process.empty()) process.emplace(given.save_process);
  }

  const StagingOptions options;
  StagingTotals totals;
  std::vector<std::unique_ptr<StagingBuffer>> buffers;
  uint64_t saves = 0;
  std::optional<SaveProcess> process;  // saves are made one after the other
  AsyncSaveExecutor executor;          // its saves use what is above
};

DefaultStager::DefaultStager(const StagingOptions& options) : state_(std::make_unique<State>(options)) {}
DefaultStager::~DefaultStager() = default;

void DefaultStager::wait() { state_->executor.wait(); }

StagingCounters DefaultStager::counters() const {
  return {.saves = state_->saves,
          .bytes_staged = state_->totals.bytes_staged,
          .bytes_allocated = state_->totals.bytes_allocated,
          .allocations = state_->totals.allocations};
}

namespace {

DefaultStager& process_stager() {
  static DefaultStager stager;  // waits at exit
  return stager;
}

/// What a save needs until it ends.
struct Save {
  std::unique_ptr<Transport> transport;
  std::shared_ptr<StorageWriter> writer;
  std::shared_ptr<SavePlanner> planner;  // null: the default one
  bool verify_replicas = false;
  std::chrono::milliseconds silence{};
  ProgressFn progress;
  std::optional<StagingSource> source;
  std::exception_ptr source_failure;
};

/// Of a staged copy, in another process.
SaveResult save_by_process(SaveProcess& process, const Save& save, const StagingBuffer& buffer,
                           const SaveState& source) {
  const auto* writer = dynamic_cast<const FileSystemWriter*>(save.writer.get());
  if (writer == nullptr || save.planner) {
    throw Error(ErrorCode::kUnsupported,
                "a process of its own makes saves by FileSystemWriter and the default planner only",
                {.file = save.writer->checkpoint_id(), .found = save.planner ? "another planner" : "another writer"});
  }
  const at::Tensor& memory = buffer.bytes();
  return process.save(*save.transport,
                      {.state = source,
                       .memory_fd = buffer.file(),
                       .memory = {static_cast<const std::byte*>(memory.const_data_ptr()), memory.nbytes()},
                       .writer = *writer,
                       .verify_replicas = save.verify_replicas,
                       .silence = save.silence,
                       .progress = save.progress});
}

}  // namespace

AsyncSaveResponse async_save(const StateDict& state, std::shared_ptr<StorageWriter> writer,
                             const AsyncSaveOptions& options) {
  DefaultStager::State& stager = *(options.stager ? *options.stager : process_stager()).state_;
  stager.executor.wait_for_room();
  const auto save = std::make_shared<Save>();
  save->transport = make_transport(options.process_group, options.silence_timeout);
  save->writer = std::move(writer);
  save->planner = options.planner;
  save->verify_replicas = options.verify_replicas;
  save->silence = silence_of(options.process_group, options.silence_timeout);
  save->progress = options.progress;
  try {
    save->source.emplace(state);
  } catch (...) {
    save->source_failure = std::current_exception();
  }
  // Free: the save that had it last has ended, since they end in order.
  StagingBuffer& buffer = *stager.buffers[stager.saves++ % stager.buffers.size()];
  AsyncSaveExecutor::Job job;
  job.stage = [save, &buffer] {
    if (save->source_failure) std::rethrow_exception(save->source_failure);
    save->source->copy_to(buffer, [&] { save->transport->heartbeat(); });
  };
  job.save = [save, &buffer, &process = stager.process](std::exception_ptr failure) {
    StateDict staged;
    const StateDictSaveState source(staged);
    try {
      if (!failure) staged = save->source->take(buffer);
      if (!failure && process) return save_by_process(*process, *save, buffer, source);
    } catch (const CheckpointError&) {
      throw;
    } catch (...) {
      failure = std::current_exception();
    }
    if (failure) run_failed_save(*save->transport, *save->writer, failure);
    DefaultSavePlanner default_planner({.verify_replicas = save->verify_replicas});
    return run_save(*save->transport, source, save->planner ? *save->planner : default_planner, *save->writer,
                    save->progress);
  };
  return stager.executor.submit(std::move(job), stager.options.use_async_staging);
}

AsyncSaveResponse async_save(const StateDict& state, FileSystemWriter writer, const AsyncSaveOptions& options) {
  return async_save(state, std::make_shared<FileSystemWriter>(std::move(writer)), options);
}

}  // namespace reshard
