// SPDX-License-Identifier: BSD-3-Clause
// How a save reaches the disk:
//
//   1. prepare_global_plan   the coordinator lays out every file, byte for byte, and makes the files of a consolidated
//                            save, empty and under temporary names
//   2. write_data            each rank writes its parts where they belong (the coordinator also the headers), and syncs
//   3. finish                consolidated: renames the files, syncs the directory, then puts the index in place
//                            sharded: lists the files, renames them, syncs the directory
#include <algorithm>
#include <limits>
#include <set>
#include <unordered_map>
#include <utility>

#include "reshard/core/checked.h"
#include "reshard/core/hooks.h"
#include "reshard/format/safetensors.h"
#include "reshard/planner/default_planner.h"
#include "reshard/storage/checkpoint_reader.h"
#include "reshard/storage/hugging_face.h"
#include "storage/hugging_face_files.h"

namespace reshard {
namespace {

constexpr uint64_t kWriteBytes = 4 << 20;    // of one call, so that there is progress; copied at once where need be
constexpr uint64_t kSyncBytes = 64 << 20;    // sent to the device between two signs of progress
constexpr uint64_t kExportBytes = 16 << 20;  // of a tensor, read and written at once

constexpr int64_t kFirstFile = 1;

std::string temporary_name(const std::string& name, const std::string& save_id) {
  return name + std::string(kTemporaryInfix) + save_id;
}
bool is_temporary(std::string_view name) {
  const std::string infix(kTemporaryInfix);
  return name.find(std::string(kSafetensorsSuffix) + infix) != std::string_view::npos ||
         name.starts_with(kSafetensorsIndexFileName + infix) || name.starts_with(kSafetensorsShardsFileName + infix);
}

/// The highest number of a file.
int64_t file_count(const FqnToIndexMapping& mapping) {
  int64_t count = kFirstFile;
  for (const auto& [fqn, index] : mapping) {
    if (index < kFirstFile) {
      throw Error(ErrorCode::kInvalidArgument, "number of a tensor's file in fqn_to_index_mapping",
                  {.key = fqn, .wanted = "1 or more", .found = std::to_string(index)});
    }
    count = std::max(count, index);
  }
  return count;
}

int64_t file_of(const std::string& fqn, const FqnToIndexMapping& mapping) {
  if (mapping.empty()) return kFirstFile;
  const auto it = mapping.find(fqn);
  if (it != mapping.end()) return it->second;
  throw Error(ErrorCode::kInvalidArgument, "fqn_to_index_mapping has no file for a tensor", {.key = fqn});
}

/// A file as it will be: its header, and where its tensors begin.
struct OutputFile {
  std::string name;
  Bytes head;
  std::vector<SafetensorsTensor> tensors;

  uint64_t begin_of(const SafetensorsTensor& tensor) const { return head.size() + tensor.begin; }
};

OutputFile lay_out_file(std::string name, std::vector<SafetensorsTensor> tensors,
                        OrderedMap<std::string, std::string> metadata) {
  SafetensorsHeader header{std::move(tensors), std::move(metadata)};
  header.metadata.insert("format", "pt");
  return with_error_context({.file = name}, [&] {
    lay_out_safetensors(header.tensors);
    OutputFile file{name, encode_safetensors_header(header), {}};
    file.tensors = std::move(header.tensors);
    return file;
  });
}

/// Files of whole tensors.
std::vector<OutputFile> lay_out_consolidated(std::vector<SafetensorsTensor> tensors, const FqnToIndexMapping& mapping) {
  const int64_t count = file_count(mapping);
  std::map<int64_t, std::vector<SafetensorsTensor>> by_file;
  if (tensors.empty()) by_file[kFirstFile];
  for (SafetensorsTensor& tensor : tensors) by_file[file_of(tensor.name, mapping)].push_back(std::move(tensor));
  std::vector<OutputFile> files;
  files.reserve(by_file.size());
  for (auto& [index, of_file] : by_file) {
    files.push_back(lay_out_file(model_file_name(index, count), std::move(of_file), {}));
  }
  return files;
}

Bytes index_of(const std::vector<OutputFile>& files) {
  SafetensorsIndex index;
  for (const OutputFile& file : files) {
    if (!file.tensors.empty()) index.total_size += file.tensors.back().end;
    for (const SafetensorsTensor& tensor : file.tensors) index.weight_map.emplace(tensor.name, file.name);
  }
  return encode_safetensors_index(index);
}

/// One rank's files of a sharded save, each with its items of the plan. A file has a name once: further chunks of one
/// tensor go into further files, as if there were more ranks.
struct ShardFile {
  OutputFile file;
  std::vector<size_t> items;  // in the order of file.tensors
};
std::vector<ShardFile> lay_out_shards(const std::vector<WriteItem>& items, size_t rank, size_t world_size,
                                      const FqnToIndexMapping& mapping) {
  const int64_t count = file_count(mapping);
  std::unordered_map<std::string_view, int64_t> chunks;  // of a tensor so far
  std::map<std::pair<int64_t, int64_t>, std::vector<size_t>> by_file;
  for (size_t i = 0; i < items.size(); ++i) {
    const std::string& fqn = items[i].index.fqn;
    by_file[{chunks[fqn]++, file_of(fqn, mapping)}].push_back(i);
  }
  std::vector<ShardFile> files;
  for (auto& [key, of_file] : by_file) {
    const auto shard = key.first * static_cast<int64_t>(world_size) + static_cast<int64_t>(rank) + 1;
    std::vector<SafetensorsTensor> tensors;
    SafetensorsSharding sharding;
    std::unordered_map<std::string_view, size_t> item_of;
    for (const size_t i : of_file) {
      const WriteItem& item = items[i];
      tensors.push_back({item.index.fqn, item.properties.dtype, item.chunk.sizes, 0, 0});
      sharding[item.index.fqn] = {item.chunk.offsets, item.size};
      item_of[item.index.fqn.str()] = i;
    }
    OrderedMap<std::string, std::string> metadata;
    metadata.insert(std::string(kShardingInfoKey), encode_sharding_info(sharding));
    metadata.insert("DCP_VERSION", "1.0");
    ShardFile& file = files.emplace_back();
    file.file = lay_out_file(shard_file_name(shard, key.second, count), std::move(tensors), std::move(metadata));
    for (const SafetensorsTensor& tensor : file.file.tensors) file.items.push_back(item_of.at(tensor.name));
  }
  return files;
}

/// Writes `chunk` of a row-major tensor of `size` that begins at `begin` in the file.
void write_chunk(WritableFile& file, uint64_t begin, const Dims& size, const Box& chunk, const TensorView& view,
                 const std::function<void(uint64_t)>& on_written) {
  const int64_t width = element_size(view.dtype);
  // `dense` are elements of the chunk from number `first` on.
  const auto write_dense = [&](ByteSpan dense, int64_t first) {
    const int64_t last = first + static_cast<int64_t>(dense.size()) / width;
    for (const Box& part : flat_range_to_boxes(chunk.sizes, first, last)) {
      Box box = part;
      for (size_t d = 0; d < box.offsets.size(); ++d) box.offsets[d] += chunk.offsets[d];
      for_each_run(whole_box(size), box, [&](int64_t to, int64_t from, int64_t length) {
        ByteSpan run = dense.subspan(static_cast<size_t>(from * width), static_cast<size_t>(length * width));
        for (uint64_t at = begin + static_cast<uint64_t>(to * width); !run.empty();) {
          const ByteSpan piece = run.first(std::min<size_t>(run.size(), kWriteBytes));
          file.write(at, piece);
          on_written(piece.size());
          at += piece.size();
          run = run.subspan(piece.size());
        }
      });
      dense = dense.subspan(static_cast<size_t>(volume(part.sizes) * width));
    }
  };
  if (is_contiguous(view.sizes, view.strides)) {
    write_dense({view.data, static_cast<size_t>(volume(view.sizes) * width)}, 0);
    return;
  }
  int64_t first = 0;
  for_each_dense_block(view, kWriteBytes, [&](const Bytes& dense) {
    write_dense(dense, first);
    first += static_cast<int64_t>(dense.size()) / width;
  });
}

/// Sync in steps: one call could be silent for longer than the other ranks wait.
void sync_in_steps(WritableFile& file, uint64_t begin, uint64_t end, const std::function<void(uint64_t)>& on_progress) {
  for (; end > begin && end - begin > kSyncBytes; begin += kSyncBytes) {
    file.write_back(begin, kSyncBytes);
    on_progress(0);
  }
  file.sync();
}

uint64_t bytes_of(const WriteItem& item) {
  return static_cast<uint64_t>(
      checked_mul(volume(item.chunk.sizes), element_size(item.properties.dtype), "size of a chunk"));
}

void remove_quietly(FileSystem& file_system, const std::string& directory, const std::string& name) noexcept {
  try {
    file_system.remove(join_path(directory, name));
  } catch (...) {
    try {
      log(LogLevel::kWarning, "a file of an unfinished save is left: " + current_failure().message);
    } catch (...) {
    }
  }
}

/// A file of one rank's own, or one that the coordinator has made for all.
std::unique_ptr<WritableFile> open_output(FileSystem& file_system, const std::string& path, bool is_shared) {
  if (!is_shared) return file_system.create(path, CreateMode::kExclusive);
  try {
    return file_system.create(path, CreateMode::kExisting);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotFound) throw;
    throw Error(ErrorCode::kFailedPrecondition,
                "a file that rank 0 has made is not here: do all ranks share the file system of this directory?",
                {.file = path});
  }
}

/// There is no checkpoint in the directory, which is made if missing.
void require_vacant(FileSystem& file_system, const std::string& directory) {
  file_system.create_directories(directory);
  for (const std::string& name : file_system.list(directory)) {
    if (name != kSafetensorsIndexFileName && name != kSafetensorsShardsFileName &&
        !name.ends_with(kSafetensorsSuffix)) {
      continue;
    }
    throw Error(ErrorCode::kAlreadyExists,
                "the directory holds safetensors files, and they could not be told from new ones",
                {.file = join_path(directory, name)});
  }
}

/// Gives files their names, then puts the index in place; without one, lists the names first. `made` has the names to
/// remove after an error.
void commit(FileSystem& file_system, const std::string& directory, const std::string& save_id,
            const std::set<std::string>& names, const std::optional<Bytes>& index, bool sync_files,
            std::vector<std::string>& made, Committed& committed) {
  committed = Committed::kNo;
  if (!index) {
    made.emplace_back(kSafetensorsShardsFileName);
    replace_file_atomically(file_system, directory, kSafetensorsShardsFileName,
                            encode_safetensors_shards({names.begin(), names.end()}), sync_files);
  }
  for (const std::string& name : names) {
    test_point("safetensors.before_rename");
    made.push_back(name);
    try {
      file_system.rename(join_path(directory, temporary_name(name, save_id)), join_path(directory, name));
    } catch (...) {
      // A copy without an answer may have been made, or may yet be.
      const ErrorCode code = current_failure().code;
      if (!index && name == *names.rbegin() && (code == ErrorCode::kUnavailable || code == ErrorCode::kTimeout)) {
        committed = Committed::kUnknown;
      }
      throw;
    }
  }
  if (!index) committed = Committed::kUnknown;
  if (sync_files) file_system.sync_directory(directory);
  if (index) {
    try {
      replace_file_atomically(file_system, directory, kSafetensorsIndexFileName, *index, sync_files, &committed);
    } catch (...) {
      // There was none before: if there is none now, the rename did nothing.
      if (committed == Committed::kUnknown && !file_system.status(join_path(directory, kSafetensorsIndexFileName))) {
        committed = Committed::kNo;
      }
      throw;
    }
  }
  committed = Committed::kYes;
}

}  // namespace

// --- save
// ----------------------------------------------------------------------------------------------------------

struct HuggingFaceStorageWriter::Layout {
  std::vector<OutputFile> files;
};

HuggingFaceStorageWriter::HuggingFaceStorageWriter(std::string directory, HuggingFaceWriterOptions options,
                                                   FileSystem& file_system)
    : directory_(std::move(directory)), options_(std::move(options)), file_system_(file_system) {
  file_count(options_.fqn_to_index_mapping);
}

HuggingFaceStorageWriter::~HuggingFaceStorageWriter() = default;

void HuggingFaceStorageWriter::begin_save(const std::string& save_id) {
  abandon();  // of a save that was placed and then planned anew
  save_id_ = save_id;
  require_vacant(file_system_, directory_);
}

std::vector<SavePlan> HuggingFaceStorageWriter::prepare_global_plan(std::vector<SavePlan> plans) {
  for (size_t rank = 0; rank < plans.size(); ++rank) {
    for (const WriteItem& item : plans[rank].items) {
      if (item.type != WriteItemType::kByteIo) continue;
      throw Error(ErrorCode::kInvalidArgument, "safetensors files hold tensors and no other values",
                  {.rank = static_cast<int>(rank), .key = item.index.fqn});
    }
  }
  for (SavePlan& plan : plans) plan.storage.assign(plan.items.size(), {});

  if (!options_.consolidate) {
    for (size_t rank = 0; rank < plans.size(); ++rank) {
      SavePlan& plan = plans[rank];
      for (const ShardFile& shard : lay_out_shards(plan.items, rank, plans.size(), options_.fqn_to_index_mapping)) {
        const SharedString name(shard.file.name);
        for (size_t i = 0; i < shard.items.size(); ++i) {
          const SafetensorsTensor& tensor = shard.file.tensors[i];
          plan.storage[shard.items[i]] = {name, shard.file.begin_of(tensor), tensor.end - tensor.begin, {}};
        }
      }
    }
    return plans;
  }

  std::vector<SafetensorsTensor> tensors;
  std::unordered_map<std::string_view, std::pair<SharedString, uint64_t>> places;
  for (const SavePlan& plan : plans) {
    for (const WriteItem& item : plan.items) {
      if (places.try_emplace(item.index.fqn).second) {
        tensors.push_back({item.index.fqn, item.properties.dtype, item.size, 0, 0});
      }
    }
  }
  const bool alone = file_system_.publishes_on_close();
  if (alone && plans.size() > 1) {
    throw Error(ErrorCode::kUnsupported,
                "several ranks cannot write one object: save with consolidate = false, then "
                "consolidate_safetensors_files() into another directory",
                {.file = directory_, .wanted = "1 rank", .found = std::to_string(plans.size())});
  }
  layout_ = std::make_unique<Layout>();
  layout_->files = lay_out_consolidated(std::move(tensors), options_.fqn_to_index_mapping);
  for (const OutputFile& file : layout_->files) {
    const SharedString name(file.name);
    for (const SafetensorsTensor& tensor : file.tensors) places[tensor.name] = {name, file.begin_of(tensor)};
  }
  for (SavePlan& plan : plans) {
    for (size_t i = 0; i < plan.items.size(); ++i) {
      const auto& [name, begin] = places[plan.items[i].index.fqn];
      plan.storage[i] = {name, begin, bytes_of(plan.items[i]), {}};
    }
  }
  for (const OutputFile& file : layout_->files) {
    const std::string name = temporary_name(file.name, save_id_);
    made_.push_back(name);
    if (!alone) file_system_.create(join_path(directory_, name), CreateMode::kExclusive)->close();
  }
  return plans;
}

std::vector<WriteResult> HuggingFaceStorageWriter::write_data(const SavePlan& plan, const SavePlanner& planner,
                                                              const StorageContext& context) {
  if (plan.storage.size() != plan.items.size()) {
    throw Error(ErrorCode::kInternal, "number of places is not as planned",
                {.wanted = std::to_string(plan.items.size()), .found = std::to_string(plan.storage.size())});
  }
  // What goes into each file.
  struct Job {
    ByteSpan head;
    std::vector<size_t> items;
  };
  std::map<std::string, Job> jobs;
  std::vector<ShardFile> shards;
  if (!options_.consolidate) {
    shards = lay_out_shards(plan.items, static_cast<size_t>(context.rank), static_cast<size_t>(context.world_size),
                            options_.fqn_to_index_mapping);
    for (const ShardFile& shard : shards) jobs[shard.file.name] = {shard.file.head, {}};
  } else if (layout_ != nullptr) {
    for (const OutputFile& file : layout_->files) jobs[file.name] = {file.head, {}};
  }
  if (layout_ == nullptr) made_.clear();
  uint64_t total = 0;
  std::vector<WriteResult> results;
  results.reserve(plan.items.size());
  for (size_t i = 0; i < plan.items.size(); ++i) {
    jobs[plan.storage[i].relative_path].items.push_back(i);
    total += plan.storage[i].length;
    results.push_back({plan.items[i].index, plan.storage[i]});
  }

  for (auto& [name, job] : jobs) std::ranges::sort(job.items, {}, [&](size_t i) { return plan.storage[i].offset; });

  uint64_t done = 0;
  const auto on_written = [&](uint64_t bytes) {
    done += bytes;
    if (context.progress) context.progress({"write", std::min(done, total), total});
  };
  with_error_context({.rank = context.rank}, [&] {
    for (const auto& entry : jobs) {
      const std::string& name = entry.first;
      const Job& job = entry.second;
      with_error_context({.file = join_path(directory_, name)}, [&] {
        const std::string temporary = temporary_name(name, context.save_id);
        if (layout_ == nullptr) made_.push_back(temporary);
        const auto file = open_output(file_system_, join_path(directory_, temporary),
                                      options_.consolidate && !file_system_.publishes_on_close());
        if (!job.head.empty()) file->write(0, job.head);
        // What is written lies in [begin, end) of the file, perhaps among parts of other ranks.
        uint64_t begin = job.head.empty() ? std::numeric_limits<uint64_t>::max() : 0;
        uint64_t end = job.head.size();
        for (const size_t i : job.items) {
          const WriteItem& item = plan.items[i];
          const StorageInfo& place = plan.storage[i];
          with_error_context(
              [&] { return ErrorContext{.key = item.index.fqn}; },
              [&] {
                const TensorView view = planner.resolve_tensor(item);
                if (view.dtype != item.properties.dtype || view.sizes != item.chunk.sizes ||
                    place.length != bytes_of(item)) {
                  throw Error(
                      ErrorCode::kInternal, "a tensor is not as planned",
                      {.wanted = std::string(to_string(item.properties.dtype)) + " " + to_string(item.chunk.sizes),
                       .found = std::string(to_string(view.dtype)) + " " + to_string(view.sizes)});
                }
                // A shard is a tensor of its own in its file.
                const Box whole = whole_box(item.chunk.sizes);
                write_chunk(*file, place.offset, options_.consolidate ? item.size : item.chunk.sizes,
                            options_.consolidate ? item.chunk : whole, view, on_written);
                const auto bytes = static_cast<uint64_t>(volume(item.size) * element_size(item.properties.dtype));
                end = std::max(end, place.offset + (options_.consolidate ? bytes : place.length));
                begin = std::min(begin, place.offset);
              });
        }
        test_point("safetensors.before_data_sync");
        if (options_.sync_files) sync_in_steps(*file, begin, end, on_written);
        file->close();
      });
    }
  });
  return results;
}

void HuggingFaceStorageWriter::finish(const Metadata& metadata, const StorageContext& context, Committed& committed) {
  std::set<std::string> names;
  std::optional<Bytes> index;
  if (layout_ != nullptr) {
    for (const OutputFile& file : layout_->files) names.insert(file.name);
    index = index_of(layout_->files);
  } else {
    for (const auto& [item, place] : metadata.storage_data) names.insert(place.relative_path);
  }
  try {
    commit(file_system_, directory_, context.save_id, names, index, options_.sync_files, made_, committed);
  } catch (...) {
    if (committed != Committed::kNo) made_.clear();
    throw;
  }
  made_.clear();
  layout_.reset();
  try {
    for (const std::string& name : file_system_.list(directory_)) {
      if (is_temporary(name)) remove_quietly(file_system_, directory_, name);
    }
  } catch (const Error& error) {
    log(LogLevel::kWarning, std::string("saved, but files of an unfinished save may be left: ") + error.what());
  }
}

void HuggingFaceStorageWriter::abandon() noexcept {
  for (const std::string& name : std::exchange(made_, {})) remove_quietly(file_system_, directory_, name);
  layout_.reset();
}

// --- export ----------------------------------------------------------------------------------------------------------

void export_safetensors(StorageReader& reader, const std::string& output_directory,
                        const FqnToIndexMapping& fqn_to_index_mapping, FileSystem& file_system,
                        const ProgressFn& progress) {
  const CheckpointReader checkpoint(reader);
  std::vector<SafetensorsTensor> tensors;
  for (const auto& [fqn, entry] : checkpoint.metadata().state_dict_metadata) {
    const auto* tensor = std::get_if<TensorStorageMetadata>(&entry);
    if (tensor == nullptr) {
      throw Error(ErrorCode::kInvalidArgument, "safetensors files hold tensors and no other values", {.key = fqn});
    }
    tensors.push_back({fqn, tensor->properties.dtype, tensor->size, 0, 0});
  }
  const std::vector<OutputFile> files = lay_out_consolidated(std::move(tensors), fqn_to_index_mapping);
  uint64_t total = 0;
  for (const OutputFile& file : files) total += file.tensors.empty() ? 0 : file.tensors.back().end;
  require_vacant(file_system, output_directory);

  const std::string save_id = "export";
  std::vector<std::string> made;
  Committed committed = Committed::kNo;
  try {
    std::set<std::string> names;
    uint64_t done = 0;
    Bytes buffer;
    for (const OutputFile& output : files) {
      names.insert(output.name);
      const std::string temporary = temporary_name(output.name, save_id);
      made.push_back(temporary);
      const auto file = file_system.create(join_path(output_directory, temporary), CreateMode::kTruncate);
      file->write(0, output.head);
      for (const SafetensorsTensor& tensor : output.tensors) {
        const int64_t width = element_size(tensor.dtype);
        const int64_t elements = volume(tensor.shape);
        const int64_t block = static_cast<int64_t>(kExportBytes) / width;
        uint64_t at = output.begin_of(tensor);
        for (int64_t begin = 0; begin < elements; begin += block) {
          for (const Box& box : flat_range_to_boxes(tensor.shape, begin, std::min(begin + block, elements))) {
            buffer.resize(static_cast<size_t>(volume(box.sizes) * width));
            checkpoint.read_box(tensor.name, box, buffer);
            file->write(at, buffer);
            at += buffer.size();
            done += buffer.size();
            if (progress) progress({"write", done, total});
          }
        }
      }
      file->sync();
      file->close();
    }
    commit(file_system, output_directory, save_id, names, index_of(files), true, made, committed);
  } catch (...) {
    if (committed == Committed::kNo) {
      for (const std::string& name : made) remove_quietly(file_system, output_directory, name);
    }
    throw;
  }
}

void consolidate_safetensors_files(const std::string& input_directory, const std::string& output_directory,
                                   const FqnToIndexMapping& fqn_to_index_mapping, FileSystem& file_system) {
  HuggingFaceStorageReader reader(input_directory, {}, file_system);
  export_safetensors(reader, output_directory, fqn_to_index_mapping, file_system);
}

}  // namespace reshard
