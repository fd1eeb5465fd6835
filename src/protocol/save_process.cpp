// SPDX-License-Identifier: BSD-3-Clause
#include "protocol/save_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "protocol/failure_wire.h"
#include "reshard/core/checked.h"
#include "reshard/planner/default_planner.h"

namespace reshard {
namespace {

constexpr uint8_t kWireVersion = 1;
constexpr size_t kHeaderBytes = 9;  // kind, length
constexpr std::chrono::milliseconds kHeartbeatEvery{100};

enum class Kind : uint8_t {
  kJob,   // to the worker: a save; with the memory's file descriptor
  kDone,  // to the worker: what it asked for; from it: the result
  kFailed,
  kSend,
  kReceive,
  kGather,  // answered by a kDone or kFailed for each rank, and one more for the whole
  kHeartbeat,
  kProgress,
};

struct Frame {
  Kind kind{};
  Bytes payload;
  int fd = -1;  // owned by who took the frame
};

std::string system_text(int error) { return std::generic_category().message(error); }

/// Throws kUnavailable where the other end is closed.
void write_frame(int socket, Kind kind, ByteSpan payload, int fd = -1) {
  ByteWriter header;
  header.u8(static_cast<uint8_t>(kind));
  header.u64(payload.size());
  iovec parts[] = {{header.buffer().data(), header.size()}, {const_cast<std::byte*>(payload.data()), payload.size()}};
  size_t at = 0;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  while (at < 2) {
    if (parts[at].iov_len == 0) {
      ++at;
      continue;
    }
    msghdr message{};
    message.msg_iov = parts + at;
    message.msg_iovlen = 2 - at;
    if (fd >= 0) {
      message.msg_control = control;
      message.msg_controllen = sizeof control;
      cmsghdr* rights = CMSG_FIRSTHDR(&message);
      rights->cmsg_level = SOL_SOCKET;
      rights->cmsg_type = SCM_RIGHTS;
      rights->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(rights), &fd, sizeof(int));
    }
    const ssize_t n = sendmsg(socket, &message, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      throw Error(ErrorCode::kUnavailable, "the other process of a save cannot be written to: " + system_text(errno));
    fd = -1;
    for (auto left = static_cast<size_t>(n); at < 2 && left > 0;) {
      const size_t taken = std::min(left, parts[at].iov_len);
      parts[at].iov_base = static_cast<char*>(parts[at].iov_base) + taken;
      parts[at].iov_len -= taken;
      left -= taken;
      if (parts[at].iov_len == 0) ++at;
    }
  }
}

/// Fills `into`; false at the end of the stream before its first byte. `fd`: takes one that came along. No limit: waits for as long as it takes.
bool read_bytes(int socket, MutableByteSpan into, int& fd, std::optional<std::chrono::milliseconds> limit) {
  const size_t wanted = into.size();
  while (!into.empty()) {
    if (limit) {
      pollfd ready{socket, POLLIN, 0};
      const int n = poll(&ready, 1, static_cast<int>(limit->count()));
      if (n < 0 && errno == EINTR) continue;
      if (n == 0) {
        throw Error(ErrorCode::kTimeout, "the process that makes the save is silent",
                    {.wanted = "a sign of life within " + std::to_string(limit->count()) + " ms"});
      }
    }
    iovec part{into.data(), into.size()};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == EINTR) continue;
    if (n == 0 && into.size() == wanted) return false;
    if (n <= 0) {
      throw Error(ErrorCode::kUnavailable, "the other process of a save is gone",
                  {.found = n == 0 ? "half a message" : system_text(errno)});
    }
    for (cmsghdr* part_of = CMSG_FIRSTHDR(&message); part_of != nullptr; part_of = CMSG_NXTHDR(&message, part_of)) {
      if (part_of->cmsg_level == SOL_SOCKET && part_of->cmsg_type == SCM_RIGHTS)
        std::memcpy(&fd, CMSG_DATA(part_of), sizeof(int));
    }
    into = into.subspan(static_cast<size_t>(n));
  }
  return true;
}

/// The next message; nothing where the other end was closed.
std::optional<Frame> read_frame(int socket, std::optional<std::chrono::milliseconds> limit = {}) {
  Frame frame;
  Bytes header(kHeaderBytes);
  if (!read_bytes(socket, header, frame.fd, limit)) return std::nullopt;
  ByteReader in(header);
  frame.kind = static_cast<Kind>(in.u8());
  frame.payload.resize(in.u64());
  if (!frame.payload.empty() && !read_bytes(socket, frame.payload, frame.fd, limit))
    throw Error(ErrorCode::kUnavailable, "the other process of a save is gone", {.found = "half a message"});
  return frame;
}

// --- errors

void put_error(ByteWriter& out, const Error& error) {
  const auto* failed = dynamic_cast<const CheckpointError*>(&error);
  out.u8(failed != nullptr);
  if (failed != nullptr) {
    out.string(failed->step());
    out.u8(static_cast<uint8_t>(failed->committed()));
    return put_failures(out, failed->failures());
  }
  out.u8(static_cast<uint8_t>(error.code()));
  out.string(error.message());
  const ErrorContext& context = error.context();
  out.varint(context.rank ? static_cast<uint64_t>(*context.rank) + 1 : 0);
  for (const std::string* text : {&context.key, &context.file, &context.wanted, &context.found}) out.string(*text);
  out.varint(context.offset ? *context.offset + 1 : 0);
}

/// The exception being handled.
Bytes caught_error() {
  ByteWriter out;
  try {
    throw;
  } catch (const Error& error) {
    put_error(out, error);
  } catch (const std::bad_alloc&) {
    put_error(out, Error(ErrorCode::kUnavailable, "out of memory"));
  } catch (const std::exception& error) {
    put_error(out, Error(ErrorCode::kInternal, error.what()));
  }
  return out.take();
}

[[noreturn]] void throw_error(ByteSpan payload) {
  ByteReader in(payload, "an error of the process that makes the save");
  if (in.u8() != 0) {
    std::string step = in.string();
    const auto committed = static_cast<Committed>(in.u8());
    std::map<int, RankFailure> failures;
    get_failures(in, failures);
    throw CheckpointError(std::move(step), std::move(failures), committed);
  }
  const ErrorCode code = get_error_code(in);
  const std::string message = in.string();
  ErrorContext context;
  if (const uint64_t rank = in.varint(); rank > 0) context.rank = static_cast<int>(rank - 1);
  for (std::string* text : {&context.key, &context.file, &context.wanted, &context.found}) *text = in.string();
  if (const uint64_t offset = in.varint(); offset > 0) context.offset = offset - 1;
  throw Error(code, message, std::move(context));
}

// --- the state

void put_dims(ByteWriter& out, const Dims& dims) {
  out.varint(dims.size());
  for (const int64_t value : dims) out.i64(value);
}

Dims get_dims(ByteReader& in) {
  Dims dims(in.count(sizeof(int64_t)), 0);
  for (size_t i = 0; i < dims.size(); ++i) dims[i] = in.i64();
  return dims;
}

/// Bytes from the first element of a view to the end of the last.
uint64_t span_of(const Dims& sizes, const Dims& strides, DType dtype) {
  if (volume(sizes) == 0) return 0;
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d)
    last = checked_add(last, checked_mul(sizes[d] - 1, strides[d], "a tensor in shared memory"),
                       "a tensor in shared memory");
  return checked_mul(static_cast<uint64_t>(last) + 1, static_cast<uint64_t>(element_size(dtype)),
                     "a tensor in shared memory");
}

void put_tensor(ByteWriter& out, const TensorView& view, ByteSpan memory) {
  out.u8(static_cast<uint8_t>(view.dtype));
  put_dims(out, view.sizes);
  const uint64_t span = span_of(view.sizes, view.strides, view.dtype);
  const std::less_equal<const std::byte*> before;
  const bool shared =
      span > 0 && before(memory.data(), view.data) && before(view.data + span, memory.data() + memory.size());
  out.u8(shared);
  if (shared) {
    put_dims(out, view.strides);
    out.u64(static_cast<uint64_t>(view.data - memory.data()));
    return;
  }
  Bytes elements;
  if (span > 0)
    for_each_dense_block(view, uint64_t{1} << 20,
                         [&](Bytes block) { elements.insert(elements.end(), block.begin(), block.end()); });
  out.blob(elements);
}

TensorView get_tensor(ByteReader& in, ByteSpan memory) {
  TensorView view;
  view.dtype = static_cast<DType>(in.u8());
  view.sizes = get_dims(in);
  if (in.u8() == 0) {
    const ByteSpan elements = in.blob();
    const auto copy = std::make_shared<Bytes>(elements.begin(), elements.end());
    view.strides = contiguous_strides(view.sizes);
    if (copy->size() != span_of(view.sizes, view.strides, view.dtype))
      throw Error(ErrorCode::kCorruptData, "a tensor of a job has another number of bytes");
    view.data = copy->data();
    view.owner = copy;
    return view;
  }
  view.strides = get_dims(in);
  const uint64_t position = in.u64();
  if (view.strides.size() != view.sizes.size() || checked_add(position, span_of(view.sizes, view.strides, view.dtype),
                                                              "a tensor in shared memory") > memory.size()) {
    throw Error(ErrorCode::kCorruptData, "a tensor of a job lies outside the shared memory");
  }
  view.data = memory.data() + position;
  return view;
}

void put_state(ByteWriter& out, const SaveState& state, ByteSpan memory) {
  const std::vector<StateEntry>& entries = state.entries();
  out.varint(entries.size());
  for (size_t e = 0; e < entries.size(); ++e) {
    out.string(entries[e].fqn);
    out.varint(entries[e].path.size());
    for (const PathElement& element : entries[e].path) {
      const auto* name = std::get_if<std::string>(&element);
      out.u8(name != nullptr);
      name != nullptr ? out.string(*name) : out.i64(std::get<int64_t>(element));
    }
    const auto* tensor = std::get_if<TensorEntry>(&entries[e].value);
    out.u8(tensor != nullptr);
    if (tensor == nullptr) {
      out.blob(state.bytes(e));
      continue;
    }
    const TensorProperties& properties = tensor->properties;
    out.u8(static_cast<uint8_t>(properties.dtype));
    out.u8(properties.requires_grad);
    out.u8(properties.pin_memory);
    out.i64(properties.memory_format);
    out.string(properties.layout);
    put_dims(out, tensor->size);
    out.u8(tensor->sharded);
    out.varint(tensor->tied_to ? *tensor->tied_to + 1 : 0);
    out.varint(tensor->chunks.size());
    for (size_t c = 0; c < tensor->chunks.size(); ++c) {
      put_dims(out, tensor->chunks[c].offsets);
      put_dims(out, tensor->chunks[c].sizes);
      if (!tensor->tied_to) put_tensor(out, state.tensor(e, c), memory);
    }
  }
}

/// What put_state() wrote.
class ReceivedState final : public SaveState {
 public:
  ReceivedState(ByteReader& in, ByteSpan memory) {
    for (size_t n = in.count(); n > 0; --n) {
      StateEntry entry;
      entry.fqn = in.string();
      for (size_t i = in.count(); i > 0; --i) {
        if (in.u8() != 0) {
          entry.path.emplace_back(in.string());
        } else {
          entry.path.emplace_back(in.i64());
        }
      }
      Held held;
      if (in.u8() == 0) {
        held.bytes = in.blob();
        entry.value = BytesEntry{held.bytes.size()};
      } else {
        TensorEntry tensor;
        tensor.properties.dtype = static_cast<DType>(in.u8());
        tensor.properties.requires_grad = in.u8() != 0;
        tensor.properties.pin_memory = in.u8() != 0;
        tensor.properties.memory_format = in.i64();
        tensor.properties.layout = in.string();
        tensor.size = get_dims(in);
        tensor.sharded = in.u8() != 0;
        if (const uint64_t tied_to = in.varint(); tied_to > 0) tensor.tied_to = tied_to - 1;
        for (size_t c = in.count(); c > 0; --c) {
          Dims offsets = get_dims(in);
          tensor.chunks.push_back({std::move(offsets), get_dims(in)});
          if (!tensor.tied_to) held.chunks.push_back(get_tensor(in, memory));
        }
        held.tied_to = tensor.tied_to;
        entry.value = std::move(tensor);
      }
      entries_.push_back(std::move(entry));
      held_.push_back(std::move(held));
    }
  }
  const std::vector<StateEntry>& entries() const override { return entries_; }
  TensorView tensor(size_t entry, size_t chunk) const override {
    return held_.at(held_[entry].tied_to.value_or(entry)).chunks.at(chunk);
  }
  ByteSpan bytes(size_t entry) const override { return held_[entry].bytes; }

 private:
  struct Held {
    std::vector<TensorView> chunks;
    ByteSpan bytes;
    std::optional<size_t> tied_to;
  };
  std::vector<StateEntry> entries_;
  std::vector<Held> held_;
};

// --- the worker's side

/// The transport of the rank, in the other process.
class RelayedTransport final : public Transport {
 public:
  RelayedTransport(int socket, int rank, int world_size) : socket_(socket), rank_(rank), world_size_(world_size) {}
  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }

  void send(int to, ByteSpan message) override {
    ByteWriter out;
    out.varint(static_cast<uint64_t>(to));
    out.bytes(message);
    write(Kind::kSend, out.buffer());
    answer();
  }
  Bytes receive(int from) override {
    ByteWriter out;
    out.varint(static_cast<uint64_t>(from));
    write(Kind::kReceive, out.buffer());
    return answer();
  }
  void gather(std::span<const int> from, const std::function<void(Arrival)>& arrived) override {
    ByteWriter out;
    out.varint(from.size());
    for (const int rank : from) out.varint(static_cast<uint64_t>(rank));
    write(Kind::kGather, out.buffer());
    for (size_t n = from.size(); n > 0; --n) {
      const Bytes head = answer();
      ByteReader in(head);
      Arrival arrival{.from = static_cast<int>(in.varint()), .message = {}, .error = nullptr};
      try {
        arrival.message = answer();
      } catch (const Error&) {
        arrival.error = std::current_exception();
      }
      arrived(std::move(arrival));
    }
  }
  void heartbeat() noexcept override {
    const int64_t now =
        std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count();
    if (now - last_heartbeat_.exchange(now) < kHeartbeatEvery.count()) return;
    try {
      write(Kind::kHeartbeat, {});
    } catch (const std::exception&) {  // the next message tells
    }
  }
  void progress(const Progress& progress) {
    ByteWriter out;
    out.string(progress.step);
    out.u64(progress.done);
    out.u64(progress.total);
    write(Kind::kProgress, out.buffer());
  }
  void write(Kind kind, ByteSpan payload) {
    const std::lock_guard lock(mutex_);
    write_frame(socket_, kind, payload);
  }

 private:
  Bytes answer() {
    std::optional<Frame> frame = read_frame(socket_);
    if (!frame) throw Error(ErrorCode::kUnavailable, "the process whose state is saved is gone", {.rank = rank_});
    if (frame->kind == Kind::kFailed) throw_error(frame->payload);
    return std::move(frame->payload);
  }

  int socket_;
  int rank_;
  int world_size_;
  std::mutex mutex_;  // of writes: heartbeats and progress come from any thread
  std::atomic<int64_t> last_heartbeat_ = 0;
};

/// The shared memory, mapped.
class Mapping {
 public:
  Mapping(int fd, uint64_t size) : size_(size) {
    if (size == 0) return;
    data_ = fd < 0 ? MAP_FAILED : mmap(nullptr, size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (data_ == MAP_FAILED) {
      size_ = 0;
      throw Error(ErrorCode::kIo, "the shared memory of a save cannot be mapped: " + system_text(errno),
                  {.wanted = std::to_string(size) + " bytes"});
    }
  }
  ~Mapping() {
    if (size_ > 0) munmap(data_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ByteSpan bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  uint64_t size_;
};

/// Closes a descriptor that came with a frame.
struct OwnedFd {
  explicit OwnedFd(int given) : fd(given) {}
  ~OwnedFd() {
    if (fd >= 0) close(fd);
  }
  OwnedFd(const OwnedFd&) = delete;
  OwnedFd& operator=(const OwnedFd&) = delete;
  int fd;
};

SaveResult run_job(int socket, const Frame& job) {
  ByteReader in(job.payload, "a job");
  if (const uint8_t version = in.u8(); version != kWireVersion) {
    throw Error(ErrorCode::kUnsupported, "the save-worker is of another version of reshard",
                {.wanted = std::to_string(kWireVersion), .found = std::to_string(version)});
  }
  const auto rank = static_cast<int>(in.varint());
  RelayedTransport transport(socket, rank, static_cast<int>(in.varint()));
  const bool wants_progress = in.u8() != 0;
  DefaultSavePlanner planner({.verify_replicas = in.u8() != 0});
  std::string directory = in.string();
  FileSystemWriterOptions options;
  options.single_file_per_rank = in.u8() != 0;
  options.thread_count = static_cast<int>(in.u32());
  options.sync_files = in.u8() != 0;
  options.overwrite = in.u8() != 0;
  options.storage_alignment = in.u32();
  for (size_t n = in.count(); n > 0; --n)
    options.extensions.push_back(std::make_shared<ZStandard>(static_cast<int>(in.i64())));
  FileSystemWriter writer(std::move(directory), options);
  const Mapping memory(job.fd, in.u64());
  const ReceivedState state(in, memory.bytes());
  ProgressFn progress;
  if (wants_progress) progress = [&](const Progress& made) { transport.progress(made); };
  return run_save(transport, state, planner, writer, progress);
}

// --- this process's side

Bytes answer_of(const std::function<Bytes()>& body, Kind& kind) {
  try {
    kind = Kind::kDone;
    return body();
  } catch (...) {
    kind = Kind::kFailed;
    return caught_error();
  }
}

}  // namespace

void serve_saves(int socket) {
  while (const std::optional<Frame> job = read_frame(socket)) {
    const OwnedFd fd(job->fd);
    Kind kind{};
    const Bytes answer = answer_of(
        [&] {
          const SaveResult result = run_job(socket, *job);
          ByteWriter out;
          out.string(result.save_id);
          out.u64(result.bytes_written);
          out.u64(result.items);
          return out.take();
        },
        kind);
    write_frame(socket, kind, answer);
  }
}

void SaveProcess::start() {
  if (pid_ > 0) {
    // Ended since the last save?
    if (waitpid(pid_, nullptr, WNOHANG) == 0) return;
    pid_ = -1;
    end();
  }
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
    throw Error(ErrorCode::kIo, "no socket for the process that makes the saves: " + system_text(errno));
  const OwnedFd theirs(ends[1]);
  socket_ = ends[0];
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, theirs.fd, STDIN_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  posix_spawn_file_actions_addclosefrom_np(&actions, STDERR_FILENO + 1);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  // Signals that a terminal or a launcher sends to this process's group are this process's to answer.
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  sigset_t signals;
  sigemptyset(&signals);
  posix_spawnattr_setsigmask(&attributes, &signals);
  sigfillset(&signals);
  posix_spawnattr_setsigdefault(&attributes, &signals);
  std::string command = "save-worker";
  char* arguments[] = {program_.data(), command.data(), nullptr};
  const int error = posix_spawnp(&pid_, program_.c_str(), &actions, &attributes, arguments, environ);
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  if (error != 0) {
    pid_ = -1;
    end();
    throw Error(error == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo,
                "cannot start the process that makes the saves: " + system_text(error),
                {.file = program_, .wanted = "the reshard command"});
  }
}

/// How it ended, in words.
std::string SaveProcess::end() noexcept {
  std::string how = "not known";
  if (socket_ >= 0) close(std::exchange(socket_, -1));
  if (pid_ > 0) {
    int status = 0;
    // It may be in the middle of its end, which is to be told from ours.
    if (waitpid(pid_, &status, WNOHANG) == 0) {
      kill(pid_, SIGKILL);
      while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
      }
    }
    pid_ = -1;
    if (WIFSIGNALED(status)) how = "killed by signal " + std::to_string(WTERMSIG(status));
    if (WIFEXITED(status)) how = "exit code " + std::to_string(WEXITSTATUS(status));
  }
  return how;
}

SaveResult SaveProcess::save(Transport& transport, const ProcessSave& save) {
  if (&save.writer.file_system() != &local_file_system()) {
    throw Error(ErrorCode::kUnsupported,
                "a process of its own cannot make this save: its writer has a file system of this process",
                {.file = save.writer.checkpoint_id(), .wanted = "the local file system"});
  }
  start();
  ByteWriter job;
  job.u8(kWireVersion);
  job.varint(static_cast<uint64_t>(transport.rank()));
  job.varint(static_cast<uint64_t>(transport.world_size()));
  job.u8(save.progress != nullptr);
  job.u8(save.verify_replicas);
  job.string(save.writer.checkpoint_id());
  const FileSystemWriterOptions& options = save.writer.options();
  job.u8(options.single_file_per_rank);
  job.u32(static_cast<uint32_t>(options.thread_count));
  job.u8(options.sync_files);
  job.u8(options.overwrite);
  job.u32(options.storage_alignment);
  job.varint(options.extensions.size());
  for (const auto& extension : options.extensions) {
    const auto* zstd = dynamic_cast<const ZStandard*>(extension.get());
    if (zstd == nullptr) {
      throw Error(ErrorCode::kUnsupported,
                  "a process of its own cannot make this save: it does not know a stream transform",
                  {.file = save.writer.checkpoint_id(), .wanted = "ZStandard", .found = extension->get_descriptor()});
    }
    job.i64(zstd->level());
  }
  job.u64(save.memory.size());
  put_state(job, save.state, save.memory);
  try {
    write_frame(socket_, Kind::kJob, job.buffer(), save.memory_fd);
    const auto answer = [&](const std::function<Bytes()>& body) {
      Kind kind{};
      const Bytes payload = answer_of(body, kind);
      write_frame(socket_, kind, payload);
    };
    while (const std::optional<Frame> frame = read_frame(socket_, save.silence)) {
      ByteReader in(frame->payload, "a message of the process that makes the save");
      switch (frame->kind) {
        case Kind::kSend:
          answer([&] {
            const auto to = static_cast<int>(in.varint());
            transport.send(to, in.rest());
            return Bytes();
          });
          break;
        case Kind::kReceive:
          answer([&] { return transport.receive(static_cast<int>(in.varint())); });
          break;
        case Kind::kGather: {
          std::vector<int> from;
          for (size_t n = in.count(); n > 0; --n) from.push_back(static_cast<int>(in.varint()));
          try {
            transport.gather(from, [&](Transport::Arrival arrival) {
              answer([&] {
                ByteWriter head;
                head.varint(static_cast<uint64_t>(arrival.from));
                return head.take();
              });
              answer([&] {
                if (arrival.error) std::rethrow_exception(arrival.error);
                return std::move(arrival.message);
              });
            });
          } catch (const Error&) {  // the medium is lost
            write_frame(socket_, Kind::kFailed, caught_error());
          }
          break;
        }
        case Kind::kHeartbeat:
          transport.heartbeat();
          break;
        case Kind::kProgress: {
          const std::string step = in.string();
          const uint64_t done = in.u64();
          if (save.progress) save.progress({.step = step, .done = done, .total = in.u64()});
          break;
        }
        case Kind::kDone: {
          SaveResult result;
          result.save_id = in.string();
          result.bytes_written = in.u64();
          result.items = in.u64();
          return result;
        }
        case Kind::kFailed:
          throw_error(frame->payload);
        case Kind::kJob:
          throw Error(ErrorCode::kInternal, "the process that makes the saves asks for one");
      }
    }
    throw Error(ErrorCode::kUnavailable, "the process that makes the save ended");
  } catch (const CheckpointError&) {
    throw;  // what became of the save; the process goes on
  } catch (...) {
    RankFailure failure = current_failure();
    failure.message += "; its end: " + end();
    throw CheckpointError("save", {{transport.rank(), std::move(failure)}}, Committed::kUnknown);
  }
}

}  // namespace reshard
