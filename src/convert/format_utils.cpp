// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/convert/format_utils.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "reshard/format/torch_archive.h"
#include "reshard/format/torch_file.h"
#include "reshard/planner/default_planner.h"
#include "reshard/protocol/thread_transport.h"
#include "reshard/storage/filesystem.h"
#include "reshard/storage/hugging_face.h"
#include "reshard/storage/torch_save_reader.h"
#include "reshard/storage/verify.h"

namespace reshard {
namespace {

constexpr uint64_t kWriteBytes = 4 << 20;  // small parts of a file are gathered into writes of so many
constexpr int kMaxRanks = 4096;
// Ranks wait for each other while one of them writes; they cannot get lost.
constexpr std::chrono::hours kSilence{24 * 365};

/// Writes a file front to back.
class FileSink {
 public:
  explicit FileSink(WritableFile& file) : file_(file) {}
  void add(ByteSpan bytes) {
    if (pending_.size() + bytes.size() < kWriteBytes) {
      pending_.insert(pending_.end(), bytes.begin(), bytes.end());
      return;
    }
    const std::array<ByteSpan, 2> parts{ByteSpan(pending_), bytes};
    file_.write_gather(position_, parts);
    const uint64_t written = pending_.size() + bytes.size();
    file_.start_write_back(position_, written);
    position_ += written;
    pending_.clear();
  }
  void flush() {
    if (!pending_.empty()) file_.write(position_, pending_);
    position_ += pending_.size();
    pending_.clear();
  }

 private:
  WritableFile& file_;
  uint64_t position_ = 0;
  Bytes pending_;
};

uint64_t tensor_bytes(const TensorStorageMetadata& tensor) {
  return static_cast<uint64_t>(volume(tensor.size)) * static_cast<uint64_t>(element_size(tensor.properties.dtype));
}

int64_t block_elements(const TensorStorageMetadata& tensor, const ConvertOptions& options) {
  return std::max<int64_t>(1, static_cast<int64_t>(options.block_bytes) / element_size(tensor.properties.dtype));
}

/// The state dict of a checkpoint as one pickle, and the storages that it refers to.
class TorchSaveContents {
 public:
  explicit TorchSaveContents(const CheckpointReader& checkpoint) : checkpoint_(checkpoint) {
    const Metadata& metadata = checkpoint.metadata();
    std::vector<NestedLeaf> leaves;
    leaves.reserve(metadata.state_dict_metadata.size());
    for (const auto& [fqn, entry] : metadata.state_dict_metadata) {
      const ObjectPath* path = metadata.planner_data ? metadata.planner_data->find(fqn) : nullptr;
      const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
      const pickle::Value value = with_error_context(
          {.key = fqn}, [&, &fqn = fqn] { return tensor != nullptr ? add_tensor(fqn, *tensor) : add_value(fqn); });
      leaves.push_back({path != nullptr ? *path : ObjectPath{fqn}, value});
    }
    root_ = nest(tree_, leaves);
  }

  uint64_t total_bytes() const { return total_bytes_; }

  void write(const TorchArchiveWriter::Sink& sink, const ConvertOptions& options,
             const std::function<void(uint64_t)>& on_written) const {
    TorchArchiveWriter writer(root_, sink);
    Bytes block;
    for (size_t i = 0; i < storages_.size(); ++i) {
      const Storage& storage = storages_[i];
      const std::string key = std::to_string(i);
      if (storage.value) {
        writer.begin_storage(key, storage.size);
        writer.write(ByteSpan(*storage.value).subspan(storage.offset, storage.size));
        on_written(storage.size);
        continue;
      }
      const TensorStorageMetadata& tensor = checkpoint_.tensor(storage.fqn);
      writer.begin_storage(key, tensor_bytes(tensor));
      for (const Box& box : cut_into_blocks(whole_box(tensor.size), block_elements(tensor, options))) {
        block.resize(static_cast<size_t>(volume(box.sizes) * element_size(tensor.properties.dtype)));
        checkpoint_.read_box(storage.fqn, box, block);
        writer.write(block);
        on_written(block.size());
      }
    }
    writer.finish();
  }

 private:
  /// Of a tensor, or a part of a value.
  struct Storage {
    std::string fqn;
    std::shared_ptr<const Bytes> value;
    size_t offset = 0;
    size_t size = 0;
  };

  pickle::Value add_tensor(const std::string& fqn, const TensorStorageMetadata& tensor) {
    const auto [it, is_new] = storage_of_.try_emplace(checkpoint_.tied_to(fqn), storages_.size());
    if (is_new) {
      storages_.push_back({fqn, nullptr, 0, 0});
      total_bytes_ += tensor_bytes(tensor);
    }
    return make_tensor_value(tree_, tensor.properties.dtype, tensor.size, it->second);
  }

  pickle::Value add_value(const std::string& fqn) {
    const auto bytes = std::make_shared<const Bytes>(checkpoint_.read_value(fqn));
    const ValueArchive archive = decode_value_archive(MemorySource(*bytes));
    // Every archive counts its storages from 0.
    std::unordered_map<std::string, std::string> keys;
    for (const std::string& key : referenced_storages(archive.root())) {
      const auto stored = archive.storage(key);
      if (!stored) throw Error(ErrorCode::kCorruptData, "tensor: no record data/" + key);
      keys[key] = std::to_string(storages_.size());
      storages_.push_back({fqn, bytes, static_cast<size_t>(stored->offset), static_cast<size_t>(stored->size)});
      total_bytes_ += stored->size;
    }
    return tree_.copy(archive.root(), [&](const pickle::Value& id) {
      // referenced_storages() has checked what it is.
      std::vector<pickle::Value> parts;
      for (const pickle::Value& part : id.items()) parts.push_back(tree_.copy(part));
      parts[2] = tree_.str(keys.at(std::string(id.items()[2].as_str())));
      return tree_.tuple(parts);
    });
  }

  const CheckpointReader& checkpoint_;
  pickle::Tree tree_;
  pickle::Value root_;
  std::vector<Storage> storages_;
  std::unordered_map<std::string, size_t> storage_of_;  // of tensors
  uint64_t total_bytes_ = 0;
};

/// What the ranks of a conversion share: one writes at a time, so that memory does not grow with their number.
struct Turns {
  std::mutex turn;
  uint64_t done = 0;  // bytes, by the ranks that had their turn
  uint64_t total = 0;
  ProgressFn progress;
};

class TakingTurns final : public StorageWriter {
 public:
  TakingTurns(FileSystemWriter& writer, Turns& turns) : writer_(writer), turns_(turns) {}
  std::string checkpoint_id() const override { return writer_.checkpoint_id(); }
  void begin_save(const std::string& save_id) override { writer_.begin_save(save_id); }
  bool places_are_final() const override { return writer_.places_are_final(); }
  std::vector<SavePlan> prepare_global_plan(std::vector<SavePlan> plans) override {
    return writer_.prepare_global_plan(std::move(plans));
  }
  std::vector<WriteResult> write_data(const SavePlan& plan, const SavePlanner& planner,
                                      const StorageContext& context) override {
    const std::lock_guard lock(turns_.turn);
    uint64_t mine = 0;
    StorageContext counted = context;
    counted.progress = [&](const Progress& progress) {
      if (context.progress) context.progress(progress);
      mine = progress.done;
      if (turns_.progress) turns_.progress({"write", std::min(turns_.total, turns_.done + mine), turns_.total});
    };
    auto results = writer_.write_data(plan, planner, counted);
    turns_.done += mine;
    return results;
  }
  std::optional<SidecarDigest> sidecar_digest() const override { return writer_.sidecar_digest(); }
  void finish(const Metadata& metadata, const StorageContext& context, Committed& committed) override {
    writer_.finish(metadata, context, committed);
  }
  void abandon() noexcept override { writer_.abandon(); }

 private:
  FileSystemWriter& writer_;
  Turns& turns_;
};

/// Runs body(rank, transport) on as many threads; the first error of the lowest rank leaves.
void on_ranks(int ranks, const std::function<void(int, Transport&)>& body) {
  if (ranks == 1) return body(0, *solo_transport());
  ThreadHub hub(ranks, kSilence);
  std::vector<std::exception_ptr> errors(static_cast<size_t>(ranks));
  {
    std::vector<std::jthread> threads;
    threads.reserve(errors.size());
    for (int rank = 0; rank < ranks; ++rank) {
      auto& error = errors[static_cast<size_t>(rank)];
      try {
        threads.emplace_back([&hub, &body, &error, rank] {
          try {
            body(rank, *hub.transport(rank));
          } catch (...) {
            error = std::current_exception();
            hub.lose(rank);  // nobody waits for it
          }
        });
      } catch (const std::exception&) {  // no thread for it: the others must not wait
        error = std::current_exception();
        hub.lose(rank);
      }
    }
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace

void write_torch_save(const CheckpointReader& checkpoint, const std::string& file, const ConvertOptions& options,
                      FileSystem& file_system) {
  const auto status = file_system.status(file);
  if (status && !options.overwrite) {
    throw Error(ErrorCode::kAlreadyExists, "the file is there and overwriting is off", {.file = file});
  }
  if (status && status->kind != FileKind::kRegular) {
    throw Error(ErrorCode::kAlreadyExists, "only a file is replaced by a file", {.file = file});
  }
  const size_t slash = file.find_last_of('/');
  const std::string directory = slash == std::string::npos ? "." : slash == 0 ? "/" : file.substr(0, slash);
  const std::string name = slash == std::string::npos ? file : file.substr(slash + 1);
  const TorchSaveContents contents(checkpoint);
  uint64_t done = 0;
  const auto write = [&](WritableFile& out) {
    FileSink sink(out);
    contents.write([&](ByteSpan bytes) { sink.add(bytes); }, options,
                   [&](uint64_t bytes) {
                     done += bytes;
                     if (options.progress) options.progress({"write", done, contents.total_bytes()});
                   });
    sink.flush();
  };
  replace_file_atomically(file_system, directory, name, write, options.sync_files);
}

SaveResult write_dcp(const CheckpointReader& checkpoint, const std::string& directory, int ranks,
                     const ConvertOptions& options, FileSystem& file_system) {
  if (ranks < 1 || ranks > kMaxRanks) {
    throw Error(ErrorCode::kInvalidArgument, "number of ranks of a checkpoint",
                {.wanted = "1 to " + std::to_string(kMaxRanks), .found = std::to_string(ranks)});
  }
  Turns turns;
  turns.progress = options.progress;
  for (const auto& [fqn, entry] : checkpoint.metadata().state_dict_metadata) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    if (tensor != nullptr && checkpoint.tied_to(fqn) == fqn) turns.total += tensor_bytes(*tensor);
  }
  // Whatever cannot be read is found before anything is written.
  std::vector<std::unique_ptr<CheckpointSaveState>> states;
  for (int rank = 0; rank < ranks; ++rank) {
    states.push_back(std::make_unique<CheckpointSaveState>(
        checkpoint, CheckpointSaveStateOptions{.block_bytes = options.block_bytes, .rank = rank, .world_size = ranks}));
  }
  const bool is_new = !file_system.status(directory);
  std::vector<SaveResult> results(states.size());
  try {
    on_ranks(ranks, [&](int rank, Transport& transport) {
      FileSystemWriter writer(directory, {.sync_files = options.sync_files, .overwrite = options.overwrite},
                              file_system);
      TakingTurns in_turn(writer, turns);
      DefaultSavePlanner planner;
      const auto i = static_cast<size_t>(rank);
      results[i] = run_save(transport, *states[i], planner, in_turn);
    });
  } catch (...) {
    if (is_new) {
      try {
        file_system.remove_directory(directory);
      } catch (const Error&) {  // not empty: what is in it is not ours
      }
    }
    throw;
  }
  return results[0];
}

namespace {

void write_safetensors(StorageReader& reader, const std::string& directory, const ConvertOptions& options,
                       FileSystem& file_system) {
  export_safetensors(reader, directory, {}, file_system, [&](const Progress& progress) {
    if (options.progress) options.progress({"write", progress.done, progress.total});
  });
}

/// See ConvertOptions::verify_source.
void verify_source(const std::string& directory, const ConvertOptions& options, FileSystem& file_system) {
  const auto progress = [&](const Progress& done) {
    if (options.progress) options.progress({"verify", done.done, done.total});
  };
  const VerifyReport report = verify_checkpoint(directory, file_system, progress);
  if (!report.problems.empty()) throw report.problems[0];
}

void convert(StorageReader& reader, const std::string& source, CheckpointKind from, const std::string& destination,
             CheckpointKind to, int ranks, const ConvertOptions& options, FileSystem& file_system) {
  const CheckpointReader checkpoint(reader);
  if (from == CheckpointKind::kDcp && !checkpoint.metadata().sidecars && options.verify_source) {
    verify_source(source, options, file_system);
  }
  switch (to) {
    case CheckpointKind::kDcp:
      write_dcp(checkpoint, destination, ranks, options, file_system);
      break;
    case CheckpointKind::kTorch:
      write_torch_save(checkpoint, destination, options, file_system);
      break;
    case CheckpointKind::kSafetensors:
      write_safetensors(reader, destination, options, file_system);
      break;
  }
}

}  // namespace

void convert_checkpoint(const std::string& source, const std::string& destination, CheckpointKind to, int ranks,
                        const ConvertOptions& options, FileSystem& file_system) {
  const CheckpointKind from = detect_checkpoint_kind(source, file_system);
  convert(*open_checkpoint(source, {}, file_system), source, from, destination, to, ranks, options, file_system);
}

void dcp_to_torch_save(const std::string& dcp_checkpoint_dir, const std::string& torch_save_path,
                       const ConvertOptions& options, FileSystem& file_system) {
  FileSystemReader reader(dcp_checkpoint_dir, {}, file_system);
  convert(reader, dcp_checkpoint_dir, CheckpointKind::kDcp, torch_save_path, CheckpointKind::kTorch, 1, options,
          file_system);
}

void torch_save_to_dcp(const std::string& torch_save_path, const std::string& dcp_checkpoint_dir,
                       const ConvertOptions& options, FileSystem& file_system) {
  TorchSaveReader reader(torch_save_path, {}, file_system);
  convert(reader, torch_save_path, CheckpointKind::kTorch, dcp_checkpoint_dir, CheckpointKind::kDcp, 1, options,
          file_system);
}

}  // namespace reshard
