// SPDX-License-Identifier: BSD-3-Clause
// How a save reaches the disk, and why a reader finds the old checkpoint or the new one, never a mixture:
//
//   1. begin_save      looks at the directory and chooses file numbers that nothing there uses
//   2. write_data      each rank makes its data files (never opening an existing one), syncs them, writes and syncs its
//                      sidecar, and syncs the directory: all of it invisible to readers of the old catalogue
//   3. (the protocol collects every rank's receipts)
//   4. finish          writes the catalogue beside the old one, syncs it, renames it over, syncs the directory
//   5.                 removes what only the old catalogue named
//
// With stream transforms (compression) the lengths of items, and so their offsets, are known when they are written: step 1
// guesses, and the receipts of step 3 say where they are.
//
// A crash before the rename of step 4 leaves the old checkpoint and unreferenced files; after it, the new checkpoint
// and perhaps files of the old one that nobody reads.
#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "reshard/core/checked.h"
#include "reshard/core/hooks.h"
#include "reshard/format/crc32.h"
#include "reshard/format/dcp_metadata.h"
#include "reshard/format/sidecar.h"
#include "reshard/format/strided_copy.h"
#include "reshard/format/torch_archive.h"
#include "reshard/storage/filesystem.h"
#include "storage/archive_frames.h"
#include "storage/file_names.h"
#include "storage/parallel.h"

namespace reshard {
namespace {

constexpr uint64_t kWriteBytes = 4 << 20;   // small items are gathered into writes of at least this many bytes
constexpr uint64_t kCopyBytes = 16 << 10;   // shorter parts are copied together
constexpr uint64_t kCrcBytes = 256 << 10;   // of a large part: summed and written while in the core's own cache
constexpr uint64_t kEarlyBytes = 16 << 20;  // written before the device is asked to begin with them
constexpr uint64_t kSyncBytes = 64 << 20;   // sent to the device between two signs of progress
constexpr size_t kMostExtensions = 16;      // that a catalogue may name

uint64_t tensor_bytes(const WriteItem& item) {
  return static_cast<uint64_t>(volume(item.chunk.sizes)) * static_cast<uint64_t>(element_size(item.properties.dtype));
}

// --- planning
// ----------------------------------------------------------------------------------------------------------

using Bucket = std::vector<size_t>;  // indices of items, in file order

/// Values first, then tensors, as PyTorch does; one bucket a file. Tied items are in none.
std::vector<Bucket> fill_buckets(const std::vector<WriteItem>& items, const FileSystemWriterOptions& options) {
  Bucket order;
  order.reserve(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].type == WriteItemType::kByteIo && !items[i].tied_to) order.push_back(i);
  }
  const size_t values = order.size();
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].type != WriteItemType::kByteIo && !items[i].tied_to) order.push_back(i);
  }
  std::vector<Bucket> buckets;
  if (!options.single_file_per_rank) {
    for (const size_t i : order) buckets.push_back({i});
  } else if (options.thread_count == 1) {
    buckets.push_back(std::move(order));
  } else {
    buckets.resize(static_cast<size_t>(options.thread_count));
    std::vector<uint64_t> load(buckets.size(), 0);
    for (size_t i = 0; i < values; ++i) {
      buckets[i % buckets.size()].push_back(order[i]);
      load[i % buckets.size()] += items[order[i]].length;
    }
    // The largest tensor first, each into the lightest bucket.
    std::stable_sort(order.begin() + static_cast<ptrdiff_t>(values), order.end(),
                     [&](size_t a, size_t b) { return tensor_bytes(items[a]) > tensor_bytes(items[b]); });
    for (size_t i = values; i < order.size(); ++i) {
      const auto lightest = static_cast<size_t>(std::min_element(load.begin(), load.end()) - load.begin());
      buckets[lightest].push_back(order[i]);
      load[lightest] += tensor_bytes(items[order[i]]);
    }
  }
  return buckets;
}

/// What the catalogue says of the extensions: the one that the data passes first comes first.
std::vector<std::string> descriptors_of(const StreamTransformExtensions& extensions) {
  std::vector<std::string> descriptors;
  for (size_t i = extensions.size(); i-- > 0;) descriptors.push_back(extensions[i]->get_descriptor());
  return descriptors;
}

std::string join(const std::vector<std::string>& descriptors) {
  std::string joined;
  for (const std::string& descriptor : descriptors) joined += (joined.empty() ? "" : ", ") + descriptor;
  return joined.empty() ? "none" : joined;
}

/// With extensions: places as if there were none, for the order and the shares of the work.
void place_items(SavePlan& plan, size_t rank, int64_t first_file_number, const FileSystemWriterOptions& options,
                 ArchiveFrames& frames) {
  const std::vector<std::string> descriptors = descriptors_of(options.extensions);
  plan.storage.assign(plan.items.size(), {});
  int64_t number = first_file_number;
  for (const Bucket& bucket : fill_buckets(plan.items, options)) {
    const std::string name = to_string(DataFileName{static_cast<int64_t>(rank), number++});
    uint64_t end = 0;
    for (const size_t i : bucket) {
      const WriteItem& item = plan.items[i];
      const uint64_t gap = (options.storage_alignment - end % options.storage_alignment) % options.storage_alignment;
      StorageInfo& place = plan.storage[i];
      place.relative_path = name;
      place.offset = checked_add(end, gap, "size of a data file");
      place.length = item.type == WriteItemType::kByteIo
                         ? item.length
                         : frames.get(item.properties.dtype, item.chunk.sizes).archive().length();
      place.transform_descriptors = descriptors;
      end = checked_add(place.offset, place.length, "size of a data file");
    }
  }
  for (size_t i = 0; i < plan.items.size(); ++i) {
    if (plan.items[i].tied_to) plan.storage[i] = plan.storage[*plan.items[i].tied_to];
  }
}

// --- writing
// -----------------------------------------------------------------------------------------------------------

/// Collects consecutive parts of one file, sums them, and writes them in calls of several MiB. Small parts are copied,
/// so that a thousand of them are one piece of memory; large ones are borrowed, and must live until the next flush,
/// which `keep` sees to.
class GatheringWriter {
 public:
  /// `early`: the device gets to work before all is written, because a sync will wait for it.
  GatheringWriter(WritableFile& file, bool early, std::function<void(uint64_t)> on_written)
      : file_(file), early_(early), on_written_(std::move(on_written)) {}

  uint64_t position() const { return begin_ + pending_; }

  /// Adds bytes that may change or go right after.
  void add_copy(ByteSpan bytes) {
    sums_.add(bytes);
    for (; !bytes.empty(); bytes = bytes.subspan(std::min<size_t>(bytes.size(), kCopyBytes))) {
      put(copy(bytes.first(std::min<size_t>(bytes.size(), kCopyBytes))));
    }
  }
  /// Adds bytes that live until the next flush.
  void add(ByteSpan bytes) {
    for (; !bytes.empty(); bytes = bytes.subspan(std::min<size_t>(bytes.size(), kCrcBytes))) {
      const ByteSpan piece = bytes.first(std::min<size_t>(bytes.size(), kCrcBytes));
      sums_.add(piece);
      put(piece.size() < kCopyBytes ? copy(piece) : piece);
    }
  }
  /// Adds bytes that the writer owns from here on.
  void add(Bytes bytes) {
    if (bytes.size() < kCopyBytes) return add(ByteSpan(bytes));
    sums_.add(bytes);
    owned_.push_back(std::move(bytes));
    put(owned_.back());
  }
  /// Ends a part of the sums here; returns the CRC-32 of it.
  uint32_t cut() { return sums_.cut(); }
  SidecarFile finish_sums(std::string name) { return sums_.finish(std::move(name)); }
  void pad_to(uint64_t offset) {
    if (offset > position()) add(Bytes(offset - position()));
  }
  /// Keeps memory alive until what was added so far, and is added before the next keep, is written.
  void keep(std::shared_ptr<const void> owner) {
    if (owner) kept_.push_back(std::move(owner));
  }
  void flush() {
    if (pending_ == 0) return;
    file_.write_gather(begin_, parts_);
    const uint64_t written = std::exchange(pending_, 0);
    begin_ += written;
    if (early_ && begin_ - started_ >= kEarlyBytes) {
      file_.start_write_back(started_, begin_ - started_);
      started_ = begin_;
    }
    parts_.clear();
    owned_.clear();
    copies_.clear();
    // The last one may be of an item whose other parts are still to come.
    if (kept_.size() > 1) kept_.erase(kept_.begin(), kept_.end() - 1);
    on_written_(written);
  }

 private:
  ByteSpan copy(ByteSpan bytes) {
    copies_.reserve(kWriteBytes + kCopyBytes);  // never more: a flush comes before
    const auto at = static_cast<ptrdiff_t>(copies_.size());
    copies_.insert(copies_.end(), bytes.begin(), bytes.end());
    return {copies_.begin() + at, bytes.size()};
  }
  void put(ByteSpan part) {
    if (!parts_.empty() && parts_.back().data() + parts_.back().size() == part.data()) {
      parts_.back() = {parts_.back().data(), parts_.back().size() + part.size()};
    } else {
      parts_.push_back(part);
    }
    pending_ += part.size();
    if (pending_ >= kWriteBytes || part.size() >= kCrcBytes) flush();
  }

  WritableFile& file_;
  const bool early_;
  std::function<void(uint64_t)> on_written_;
  BlockSummer sums_;
  uint64_t started_ = 0;  // where the device was not asked yet
  uint64_t begin_ = 0;    // where the pending parts go
  uint64_t pending_ = 0;  // their bytes
  std::vector<ByteSpan> parts_;
  Bytes copies_;
  std::vector<Bytes> owned_;
  std::vector<std::shared_ptr<const void>> kept_;
};

/// Adds the elements and returns their CRC-32.
uint32_t add_payload(GatheringWriter& out, const TensorView& view, uint64_t size) {
  // A payload of a block or more is a part of its own, and the sum of the part is the one that the archive wants.
  const bool is_part = size >= kBlockBytes;
  uint32_t crc = 0;
  const auto add = [&](auto bytes) {
    if (!is_part) crc = crc32(bytes, crc);
    out.add(std::move(bytes));
  };
  if (is_part) out.cut();
  if (is_contiguous(view.sizes, view.strides)) {
    add(ByteSpan(view.data, static_cast<size_t>(size)));
  } else {
    for_each_dense_block(view, kWriteBytes, add);
  }
  return is_part ? out.cut() : crc;
}

[[noreturn]] void disagree(const char* what, const std::string& wanted, const std::string& found) {
  throw Error(ErrorCode::kInternal, std::string(what) + " is not as planned", {.wanted = wanted, .found = found});
}

/// A value, as long as planned.
ByteSpan value_of(const WriteItem& item, const StorageInfo& place, const SavePlanner& planner) {
  const ByteSpan value = planner.resolve_bytes(item);
  if (value.size() != place.length) {
    disagree("length of a value", std::to_string(place.length), std::to_string(value.size()));
  }
  return value;
}

/// A tensor, dtype and shape as planned.
TensorView view_of(const WriteItem& item, const SavePlanner& planner) {
  const TensorView view = planner.resolve_tensor(item);
  if (view.dtype != item.properties.dtype) {
    disagree("dtype of a tensor", std::string(to_string(item.properties.dtype)), std::string(to_string(view.dtype)));
  }
  if (view.sizes != item.chunk.sizes) {
    disagree("shape of a tensor", to_string(item.chunk.sizes), to_string(view.sizes));
  }
  return view;
}

void write_item(GatheringWriter& out, const WriteItem& item, const StorageInfo& place, const SavePlanner& planner,
                ArchiveFrames& frames) {
  out.pad_to(place.offset);
  if (out.position() != place.offset) {
    disagree("place of an item", std::to_string(place.offset), std::to_string(out.position()));
  }
  if (item.type == WriteItemType::kByteIo) {
    out.add(value_of(item, place, planner));
    return;
  }
  const TensorView view = view_of(item, planner);
  TensorArchiveFrame& frame = frames.get(item.properties.dtype, item.chunk.sizes);
  if (frame.archive().length() != place.length) {
    disagree("length of an item", std::to_string(place.length), std::to_string(frame.archive().length()));
  }
  out.keep(view.owner);
  out.add_copy(frame.head());
  out.add_copy(frame.tail(add_payload(out, view, frame.archive().payload_size())));
}

/// The elements of a view, row-major, in pieces of a few MiB.
template <class Fn>
void for_each_piece(const TensorView& view, uint64_t size, const Fn& fn) {
  if (!is_contiguous(view.sizes, view.strides)) return for_each_dense_block(view, kWriteBytes, fn);
  for (ByteSpan left(view.data, static_cast<size_t>(size)); !left.empty();) {
    const ByteSpan piece = left.first(std::min<size_t>(left.size(), kWriteBytes));
    fn(piece);
    left = left.subspan(piece.size());
  }
}

/// The end of a chain of transforms.
class FileStream final : public ByteOutputStream {
 public:
  explicit FileStream(GatheringWriter& out) : out_(out) {}
  void write(ByteSpan bytes) override { out_.add_copy(bytes); }
  void finish() override {}

 private:
  GatheringWriter& out_;
};

/// Writes an item through the extensions, right after the one before; returns where it lies. `on_bytes` gets the bytes
/// that went in.
StorageInfo write_transformed(GatheringWriter& out, const WriteItem& item, StorageInfo place,
                              const SavePlanner& planner, ArchiveFrames& frames,
                              const StreamTransformExtensions& extensions,
                              const std::function<void(uint64_t)>& on_bytes) {
  place.offset = out.position();
  FileStream file(out);
  std::vector<std::unique_ptr<ByteOutputStream>> streams;
  for (const auto& extension : extensions) {
    streams.push_back(extension->transform_to(streams.empty() ? file : *streams.back()));
  }
  ByteOutputStream& to = *streams.back();
  if (item.type == WriteItemType::kByteIo) {
    to.write(value_of(item, place, planner));
  } else {
    const TensorView view = view_of(item, planner);
    TensorArchiveFrame& frame = frames.get(item.properties.dtype, item.chunk.sizes);
    const uint64_t size = frame.archive().payload_size();
    uint32_t crc = 0;
    to.write(frame.head());
    for_each_piece(view, size, [&](const auto& piece) {
      crc = crc32(piece, crc);
      to.write(piece);
      on_bytes(piece.size());
    });
    to.write(frame.tail(crc));
    place.length -= size;  // what is left to count
  }
  on_bytes(place.length);
  for (size_t i = streams.size(); i-- > 0;) streams[i]->finish();
  place.length = out.position() - place.offset;
  return place;
}

/// The items of one data file, by offset.
struct FileJob {
  std::string name;
  Bucket items;
};

std::vector<FileJob> jobs_of(const SavePlan& plan) {
  std::vector<FileJob> jobs;
  std::unordered_map<std::string_view, size_t> index;
  for (size_t i = 0; i < plan.items.size(); ++i) {
    if (plan.items[i].tied_to) continue;
    const auto [it, inserted] = index.try_emplace(plan.storage[i].relative_path, jobs.size());
    if (inserted) jobs.push_back({plan.storage[i].relative_path, {}});
    jobs[it->second].items.push_back(i);
  }
  for (FileJob& job : jobs) {
    std::stable_sort(job.items.begin(), job.items.end(),
                     [&](size_t a, size_t b) { return plan.storage[a].offset < plan.storage[b].offset; });
  }
  return jobs;
}

/// Logs the exception being handled. There may be no memory left for that.
void warn_of_failure(const char* what) noexcept {
  try {
    log(LogLevel::kWarning, what + current_failure().message);
  } catch (...) {
  }
}

}  // namespace

FileSystemWriter::FileSystemWriter(std::string directory, FileSystemWriterOptions options, FileSystem& file_system)
    : directory_(std::move(directory)), options_(std::move(options)), file_system_(file_system) {
  require_thread_count(options_.thread_count, "FileSystemWriter");
  if (options_.storage_alignment == 0 || (options_.storage_alignment & (options_.storage_alignment - 1)) != 0) {
    throw Error(ErrorCode::kInvalidArgument, "storage_alignment of a FileSystemWriter",
                {.wanted = "a power of two", .found = std::to_string(options_.storage_alignment)});
  }
  if (options_.extensions.size() > kMostExtensions || std::ranges::count(options_.extensions, nullptr) != 0) {
    throw Error(ErrorCode::kInvalidArgument, "extensions of a FileSystemWriter",
                {.wanted = "at most " + std::to_string(kMostExtensions) + ", none of them null",
                 .found = std::to_string(options_.extensions.size()) + ", " +
                          std::to_string(std::ranges::count(options_.extensions, nullptr)) + " of them null"});
  }
}

FileSystemWriter::~FileSystemWriter() = default;

void FileSystemWriter::begin_save(const std::string&) {
  written_.clear();
  replaced_.clear();
  first_file_number_ = 0;
  file_system_.create_directories(directory_);
  bool has_metadata = false;
  for (const std::string& name : file_system_.list(directory_)) {
    if (name == kMetadataFileName) has_metadata = true;
    if (const auto data = parse_data_file_name(name))
      first_file_number_ = std::max(first_file_number_, data->number + 1);
  }
  if (!has_metadata) return;
  const std::string path = join_path(directory_, kMetadataFileName);
  if (!options_.overwrite) {
    throw Error(ErrorCode::kAlreadyExists, "the directory holds a checkpoint and overwriting is off", {.file = path});
  }
  try {
    const Metadata old = decode_metadata(file_system_.read_file(path, kMaxMetadataBytes));
    for (const auto& [index, place] : old.storage_data) {
      if (parse_data_file_name(place.relative_path)) replaced_.insert(place.relative_path);
    }
  } catch (const Error& error) {
    replaced_.clear();
    log(LogLevel::kWarning,
        std::string("the checkpoint that this save replaces cannot be read; its files are kept: ") + error.what());
  }
}

std::vector<SavePlan> FileSystemWriter::prepare_global_plan(std::vector<SavePlan> plans) {
  ArchiveFrames frames(options_.storage_alignment);
  for (size_t rank = 0; rank < plans.size(); ++rank) {
    with_error_context({.rank = static_cast<int>(rank)},
                       [&] { place_items(plans[rank], rank, first_file_number_, options_, frames); });
  }
  return plans;
}

std::vector<WriteResult> FileSystemWriter::write_data(const SavePlan& plan, const SavePlanner& planner,
                                                      const StorageContext& context) {
  if (plan.storage.size() != plan.items.size()) {
    disagree("number of places", std::to_string(plan.items.size()), std::to_string(plan.storage.size()));
  }
  written_.clear();
  sidecar_digest_.reset();
  uint64_t total = 0;
  const std::vector<std::string> descriptors = descriptors_of(options_.extensions);
  std::vector<WriteResult> results(plan.items.size());
  for (size_t i = 0; i < plan.items.size(); ++i) {
    if (const auto tied_to = plan.items[i].tied_to) {
      // Written with the item that it is tied to, or the save fails.
      if (plan.storage[i] != plan.storage[*tied_to]) {
        disagree("place of a tied item", to_string(plan.items[*tied_to].index), to_string(plan.items[i].index));
      }
    } else {
      total += plan.storage[i].length;
      if (plan.storage[i].transform_descriptors != descriptors) {
        throw Error(
            ErrorCode::kFailedPrecondition, "the extensions of this rank's writer are not those of rank 0's",
            {.rank = context.rank, .wanted = join(plan.storage[i].transform_descriptors), .found = join(descriptors)});
      }
    }
  }
  const std::vector<FileJob> jobs = jobs_of(plan);
  Sidecar sidecar{.library_version = {},
                  .save_id = context.save_id,
                  .rank = context.rank,
                  .world_size = context.world_size,
                  .files = std::vector<SidecarFile>(jobs.size())};
  std::atomic<uint64_t> done = 0;
  std::atomic<bool> failed = false;
  std::mutex mutex;  // of written_
  const auto on_written = [&](uint64_t bytes) {
    done += bytes;
    if (context.progress) context.progress({"write", std::min(done.load(), total), total});
    // The first error is the one that counts; this one only ends the thread.
    if (failed) throw Error(ErrorCode::kFailedPrecondition, "another thread of this save failed");
  };
  const auto create = [&](const std::string& name) {
    auto file = file_system_.create(join_path(directory_, name), CreateMode::kExclusive);
    const std::lock_guard lock(mutex);
    written_.push_back(name);
    return file;
  };
  const auto write_file = [&](size_t number) {
    const FileJob& job = jobs[number];
    const auto file = create(job.name);
    // Progress counts what goes into transforms: what comes out is not known before.
    const bool transformed = !options_.extensions.empty();
    GatheringWriter out(*file, options_.sync_files, [&](uint64_t bytes) { on_written(transformed ? 0 : bytes); });
    ArchiveFrames frames(options_.storage_alignment);
    for (const size_t i : job.items) {
      const WriteItem& item = plan.items[i];
      const StorageInfo& place = plan.storage[i];
      results[i] = {item.index, place};
      with_error_context([&] { return ErrorContext{.key = item.index.fqn, .file = job.name}; },
                         [&] {
                           if (transformed) {
                             results[i].storage =
                                 write_transformed(out, item, place, planner, frames, options_.extensions, on_written);
                           } else {
                             write_item(out, item, place, planner, frames);
                           }
                         });
    }
    out.flush();
    sidecar.files[number] = out.finish_sums(job.name);
    test_point("save.before_data_sync");
    if (options_.sync_files) {
      // One call could be silent for longer than the other ranks wait.
      for (uint64_t at = 0; at + kSyncBytes < out.position(); at += kSyncBytes) {
        file->write_back(at, kSyncBytes);
        on_written(0);
      }
      file->sync();
    }
    file->close();
  };

  with_error_context({.rank = context.rank}, [&] {
    run_parallel(jobs.size(), static_cast<size_t>(options_.thread_count), failed, write_file);
    test_point("save.before_sidecar");
    const auto file = create(sidecar_name(context.save_id, context.rank));
    const Bytes bytes = encode_sidecar(sidecar);
    file->write(0, bytes);
    if (options_.sync_files) file->sync();
    file->close();
    test_point("save.before_directory_sync");
    if (options_.sync_files) file_system_.sync_directory(directory_);
    sidecar_digest_ = reshard::sidecar_digest(bytes);
  });
  for (size_t i = 0; i < plan.items.size(); ++i) {
    if (const auto tied_to = plan.items[i].tied_to) results[i] = {plan.items[i].index, results[*tied_to].storage};
  }
  return results;
}

void FileSystemWriter::finish(const Metadata& metadata, const StorageContext& context, Committed& committed) {
  committed = Committed::kNo;
  const Bytes bytes = encode_metadata(metadata);
  try {
    replace_file_atomically(file_system_, directory_, kMetadataFileName, bytes, options_.sync_files, &committed);
  } catch (...) {
    // A rename that failed usually did nothing, and then the old checkpoint is whole: look.
    // (A publication that failed says itself whether it may take effect later.)
    const bool can_look = !file_system_.publishes_on_close();
    if (committed == Committed::kUnknown && can_look && !holds_metadata(bytes)) committed = Committed::kNo;
    if (committed != Committed::kNo) written_.clear();
    throw;
  }
  written_.clear();
  remove_replaced(metadata, context.save_id);
}

bool FileSystemWriter::holds_metadata(ByteSpan bytes) const noexcept {
  try {
    const std::string path = join_path(directory_, kMetadataFileName);
    const auto status = file_system_.status(path);
    return status && status->size == bytes.size() &&
           std::ranges::equal(file_system_.read_file(path, bytes.size()), bytes);
  } catch (...) {
    return true;  // cannot tell
  }
}

void FileSystemWriter::remove_replaced(const Metadata& metadata, const std::string& save_id) noexcept {
  try {
    test_point("save.before_cleanup");
    std::unordered_set<std::string_view> used;
    for (const auto& [index, place] : metadata.storage_data) used.insert(place.relative_path);
    const std::string own_sidecars = sidecar_name(save_id, 0).substr(0, sidecar_name(save_id, 0).size() - 1);
    for (const std::string& name : file_system_.list(directory_)) {
      const bool orphan = is_temporary_metadata(name) || (is_sidecar_name(name) && !name.starts_with(own_sidecars));
      if (orphan || (replaced_.contains(name) && !used.contains(name))) remove_quietly(name);
      test_point("save.during_cleanup");
    }
  } catch (...) {
    warn_of_failure("saved, but files of the replaced checkpoint are left: ");
  }
  replaced_.clear();
}

void FileSystemWriter::remove_quietly(const std::string& name) noexcept {
  try {
    file_system_.remove(join_path(directory_, name));
  } catch (...) {
    warn_of_failure("a file that no checkpoint uses is left: ");
  }
}

void FileSystemWriter::abandon() noexcept {
  for (const std::string& name : std::exchange(written_, {})) remove_quietly(name);
}

}  // namespace reshard
