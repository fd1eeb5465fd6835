// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/launch/launcher.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "launch/supervisor.h"
#include "reshard/core/error.h"
#include "reshard/launch/environment.h"

namespace reshard {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kMaxLocalRanks = 4096;
constexpr milliseconds kSupervisorGrace{10'000};  // for killed processes to go away
constexpr std::size_t kMaxLine = 1 << 16;
constexpr int kMaxReads = 64;  // of 16 KiB at a time: more than a pipe holds
constexpr std::size_t kMaxReport = 64 << 20;

[[noreturn]] void fail_os(const char* what) {
  throw Error(ErrorCode::kIo, std::string("launch: ") + what + ": " + std::strerror(errno));
}

/// A file descriptor above 2 (a rank's own 0, 1, 2 are made from it), closed on exec.
class Fd {
 public:
  Fd() = default;
  Fd(int fd, const char* what) : fd_(fd) {
    if (fd_ < 0) fail_os(what);
    if (fd_ > 2) return;
    const int high = fcntl(fd_, F_DUPFD_CLOEXEC, 3);
    close(std::exchange(fd_, high));
    if (fd_ < 0) fail_os(what);
  }
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() { reset(); }
  int get() const { return fd_; }
  void reset() {
    if (fd_ >= 0) close(std::exchange(fd_, -1));
  }

 private:
  int fd_ = -1;
};

std::pair<Fd, Fd> make_pair(int (*create)(int (&)[2]), const char* what) {
  int fds[2];
  if (create(fds) != 0) fail_os(what);
  Fd first(fds[0], what);
  return {std::move(first), Fd(fds[1], what)};
}

/// Listens on a port of the loopback address that the kernel chooses.
std::pair<Fd, uint16_t> listen_on_loopback() {
  Fd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(fd.get(), SOMAXCONN) != 0 ||
      getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    fail_os("binding the store's port on 127.0.0.1");
  }
  return {std::move(fd), ntohs(address.sin_port)};
}

using Environment = std::map<std::string, std::string>;

Environment own_environment() {
  Environment result;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const auto equals = text.find('=');
    if (equals != std::string_view::npos) result.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  return result;
}

/// A null-terminated array of C strings that owns what it points to.
struct CStrings {
  std::vector<std::string> texts;
  std::vector<char*> pointers;
  explicit CStrings(std::vector<std::string> t) : texts(std::move(t)) {
    for (std::string& text : texts) pointers.push_back(text.data());
    pointers.push_back(nullptr);
  }
};

void print_line(const OutputLine& line) {
  std::FILE* out = line.stream == OutputStream::kStdout ? stdout : stderr;
  const std::string text = "[rank " + std::to_string(line.rank) + "] " + std::string(line.text) + "\n";
  std::fwrite(text.data(), 1, text.size(), out);
  std::fflush(out);
}

std::string read_report(int fd) {
  std::string report;
  std::array<char, 1 << 14> buffer;
  while (report.size() < kMaxReport) {
    const ssize_t n = pread(fd, buffer.data(), buffer.size(), static_cast<off_t>(report.size()));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    report.append(buffer.data(), static_cast<std::size_t>(n));
  }
  return report;
}

/// What the launcher keeps of one rank.
struct Rank {
  struct Stream {
    Fd fd;
    std::string pending;  // of a line without its end
  };
  std::array<Stream, 2> streams;  // by OutputStream
  Fd report;
  bool ended = false;
  bool stopped = false;
  bool ending = false;
};

/// One launch. Its destruction, however it comes, ends every process.
class Launch {
 public:
  explicit Launch(const LaunchOptions& options) : options_(options), ranks_(static_cast<std::size_t>(options.ranks)) {
    result_.ranks.resize(ranks_.size());
    for (std::size_t i = 0; i < ranks_.size(); ++i) result_.ranks[i].rank = static_cast<int>(i);
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  ~Launch() {
    if (supervisor_ <= 0) return;
    if (socket_open_) {  // something was thrown
      finish();
      wait_for_end_of_file();
    }
    reap_supervisor();
  }

  LaunchResult run() {
    start();
    while (socket_open_) step();
    reap_supervisor();
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      drain(i);
      if (!ranks_[i].ended) {
        throw Error(ErrorCode::kUnavailable, "launch: the supervisor process was killed, and the ranks with it",
                    {.rank = static_cast<int>(i)});
      }
    }
    result_.duration = Clock::now() - started_;
    return std::move(result_);
  }

 private:
  void start() {
    auto [listener, port] = listen_on_loopback();
    const Fd null(open("/dev/null", O_RDWR | O_CLOEXEC), "/dev/null");
    auto [ours, theirs] = make_pair(
        [](int(&fds)[2]) { return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds); }, "socketpair");
    std::vector<Fd> rank_ends;
    std::vector<CStrings> environments;
    std::vector<SupervisedRank> supervised;
    const Environment inherited = own_environment();
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      Rank& rank = ranks_[i];
      for (auto& stream : rank.streams) {
        auto [read_end, write_end] = make_pair([](int(&fds)[2]) { return pipe2(fds, O_CLOEXEC); }, "pipe");
        fcntl(read_end.get(), F_SETFL, O_NONBLOCK);  // of our end only: each end of a pipe has its own flags
        stream.fd = std::move(read_end);
        rank_ends.push_back(std::move(write_end));
      }
      rank.report = Fd(memfd_create("reshard-report", MFD_CLOEXEC), "memfd_create");
      fcntl(rank.report.get(), F_SETFL, O_APPEND);  // a rank and its children may all write
      const int report_fd = rank.report.get();
      const int listen_fd = i == 0 ? listener.get() : -1;
      environments.emplace_back(environment(inherited, static_cast<int>(i), port, report_fd, listen_fd));
      supervised.push_back({.envp = nullptr,
                            .stdout_fd = rank_ends[2 * i].get(),
                            .stderr_fd = rank_ends[2 * i + 1].get(),
                            .report_fd = report_fd,
                            .listen_fd = listen_fd,
                            .pid = 0});
    }
    for (std::size_t i = 0; i < ranks_.size(); ++i) supervised[i].envp = environments[i].pointers.data();
    const CStrings argv(options_.argv);
    const std::string program = options_.program.empty() ? options_.argv.front() : options_.program;
    const SupervisorPlan plan = {.program = program.c_str(),
                                 .argv = argv.pointers.data(),
                                 .ranks = supervised.data(),
                                 .rank_count = options_.ranks,
                                 .null_fd = null.get(),
                                 .socket_fd = theirs.get()};
    started_ = Clock::now();
    sigset_t all, before;  // no handler of this process may run in the child
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    supervisor_ = fork();
    if (supervisor_ == 0) supervise(plan);
    const int error = errno;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    errno = error;
    if (supervisor_ < 0) fail_os("fork");
    socket_ = std::move(ours);
    socket_open_ = true;
    alive_ = options_.ranks;
    if (options_.deadline.count() > 0) deadline_ = started_ + options_.deadline;
  }  // the ranks' ends of everything close here, the listening socket too

  std::vector<std::string> environment(Environment env, int rank, uint16_t port, int report_fd, int listen_fd) const {
    const std::string world = std::to_string(options_.ranks);
    env["RANK"] = env["LOCAL_RANK"] = std::to_string(rank);
    env["WORLD_SIZE"] = env["LOCAL_WORLD_SIZE"] = world;
    env["MASTER_ADDR"] = "127.0.0.1";
    env["MASTER_PORT"] = std::to_string(port);
    env[kReportFdVariable] = std::to_string(report_fd);
    env.erase("TORCHELASTIC_USE_AGENT_STORE");
    env.erase(kMasterListenFdVariable);
    if (listen_fd >= 0) env[kMasterListenFdVariable] = std::to_string(listen_fd);
    env.emplace("OMP_NUM_THREADS", "1");
    for (const auto& [name, value] : options_.environment) {
      if (value) {
        env[name] = *value;
      } else {
        env.erase(name);
      }
    }
    std::vector<std::string> entries;
    for (const auto& [name, value] : env) entries.push_back(name + "=" + value);
    return entries;
  }

  // Waits for the next event and handles it.
  void step() {
    std::optional<Clock::time_point> next = deadline_;
    for (const auto& at : {end_others_at_, kill_at_, give_up_at_}) {
      if (at && (!next || *at < *next)) next = at;
    }
    int timeout = -1;
    if (next) {
      const auto left = std::chrono::ceil<milliseconds>(*next - Clock::now()).count();
      timeout = static_cast<int>(std::clamp<int64_t>(left, 0, 1 << 30));
    }
    std::vector<pollfd> fds = {{socket_.get(), POLLIN, 0}};
    std::vector<std::pair<std::size_t, std::size_t>> streams;
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      for (std::size_t s = 0; s < 2; ++s) {
        if (ranks_[i].streams[s].fd.get() < 0) continue;
        fds.push_back({ranks_[i].streams[s].fd.get(), POLLIN, 0});
        streams.emplace_back(i, s);
      }
    }
    if (poll(fds.data(), fds.size(), timeout) < 0 && errno != EINTR) fail_os("poll");
    for (std::size_t k = 0; k < streams.size(); ++k) {
      if (fds[k + 1].revents != 0) read_stream(streams[k].first, streams[k].second);
    }
    if (fds[0].revents != 0) read_events();
    check_timers();
  }

  void read_events() {
    RankEvent event;
    ssize_t n;
    while ((n = recv(socket_.get(), &event, sizeof(event), MSG_DONTWAIT)) == sizeof(event)) {
      const auto i = static_cast<std::size_t>(event.rank);
      if (event.start_error == 0 && (WIFSTOPPED(event.status) || WIFCONTINUED(event.status))) {
        ranks_[i].stopped = WIFSTOPPED(event.status);
      } else {
        rank_ended(i, event);
      }
    }
    if (n == 0 || (n < 0 && errno == ECONNRESET)) socket_open_ = false;
  }

  void rank_ended(std::size_t i, const RankEvent& event) {
    drain(i);
    RankResult& result = result_.ranks[i];
    ranks_[i].ended = true;
    result.start_error = event.start_error;
    if (event.start_error == 0 && WIFEXITED(event.status)) result.exit_code = WEXITSTATUS(event.status);
    if (event.start_error == 0 && WIFSIGNALED(event.status)) result.signal = WTERMSIG(event.status);
    result.ended_at = Clock::time_point(std::chrono::nanoseconds(event.at_ns));
    result.duration = result.ended_at - started_;
    result.report = read_report(ranks_[i].report.get());
    ranks_[i].report.reset();
    if (result.reason == EndReason::kItself) {
      const bool success = options_.is_success ? options_.is_success(result) : result.exit_code == 0;
      if (!success && !result_.first_failed) {
        result_.first_failed = event.rank;
        end_others_at_ = Clock::now() + options_.failure_grace;
      }
    }
    if (--alive_ == 0) finish();
  }

  void check_timers() {
    const auto now = Clock::now();
    if (alive_ > 0 && deadline_ && now >= *deadline_) {
      result_.deadline_passed = true;
      end_ranks(EndReason::kDeadline, SIGABRT);
    } else if (alive_ > 0 && end_others_at_ && now >= *end_others_at_) {
      end_ranks(EndReason::kAfterFailure, options_.end_signal);
    }
    if (kill_at_ && now >= *kill_at_) finish();
    if (give_up_at_ && now >= *give_up_at_) fail_stuck();
  }

  void end_ranks(EndReason reason, int signal) {
    deadline_.reset();
    end_others_at_.reset();
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      if (ranks_[i].ended) continue;
      read_stream(i, 0);
      read_stream(i, 1);
      ranks_[i].ending = true;
      result_.ranks[i].reason = reason;
      result_.ranks[i].stopped = ranks_[i].stopped;
    }
    (void)send(socket_.get(), &signal, sizeof(signal), MSG_NOSIGNAL);
    kill_at_ = Clock::now() + options_.end_grace;
  }

  // Lets the supervisor kill what is left and go.
  void finish() {
    deadline_.reset();
    end_others_at_.reset();
    kill_at_.reset();
    if (!give_up_at_) give_up_at_ = Clock::now() + kSupervisorGrace;
    shutdown(socket_.get(), SHUT_WR);
  }

  [[noreturn]] void fail_stuck() {
    throw Error(ErrorCode::kTimeout, "launch: killed processes do not go away",
                {.wanted = "their end within " + std::to_string(kSupervisorGrace.count()) + " ms",
                 .found = std::to_string(alive_) + " ranks alive under process " + std::to_string(supervisor_)});
  }

  void wait_for_end_of_file() {
    pollfd fd = {socket_.get(), POLLIN, 0};
    RankEvent event;
    while (socket_open_ && Clock::now() < *give_up_at_) {
      poll(&fd, 1, 100);
      const ssize_t n = recv(socket_.get(), &event, sizeof(event), MSG_DONTWAIT);
      if (n == 0 || (n < 0 && errno == ECONNRESET)) socket_open_ = false;
    }
  }

  // It is gone once its end of the socket is; one that waits for a process stuck in the kernel is not worth waiting
  // for.
  void reap_supervisor() {
    if (socket_open_) kill(supervisor_, SIGKILL);
    while (waitpid(supervisor_, nullptr, 0) < 0 && errno == EINTR) {
    }
    supervisor_ = 0;
  }

  void read_stream(std::size_t i, std::size_t s) {
    auto& stream = ranks_[i].streams[s];
    std::array<char, 1 << 14> buffer;
    int reads = 0;
    while (stream.fd.get() >= 0) {
      const ssize_t n = read(stream.fd.get(), buffer.data(), buffer.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN) return;
      if (n <= 0) {
        stream.fd.reset();
        if (!stream.pending.empty()) emit(i, s, std::exchange(stream.pending, {}));
        return;
      }
      stream.pending.append(buffer.data(), static_cast<std::size_t>(n));
      std::size_t from = 0;
      for (std::size_t end; (end = stream.pending.find('\n', from)) != std::string::npos; from = end + 1) {
        emit(i, s, std::string_view(stream.pending).substr(from, end - from));
      }
      stream.pending.erase(0, from);
      if (stream.pending.size() >= kMaxLine) emit(i, s, std::exchange(stream.pending, {}));
      if (++reads == kMaxReads) return;  // a rank that never pauses must not keep us from the others
    }
  }

  void drain(std::size_t i) {
    for (std::size_t s = 0; s < 2; ++s) {
      read_stream(i, s);
      auto& stream = ranks_[i].streams[s];
      if (!socket_open_ && !stream.pending.empty()) emit(i, s, std::exchange(stream.pending, {}));
    }
  }

  void emit(std::size_t i, std::size_t s, std::string_view text) {
    std::string& output = result_.ranks[i].output;
    output.append(text).push_back('\n');
    if (output.size() > 2 * options_.capture_limit) output.erase(0, output.size() - options_.capture_limit);
    const OutputLine line = {static_cast<int>(i), static_cast<OutputStream>(s), text, ranks_[i].ending};
    options_.on_line ? options_.on_line(line) : print_line(line);
  }

  const LaunchOptions& options_;
  std::vector<Rank> ranks_;
  LaunchResult result_;
  pid_t supervisor_ = 0;
  Fd socket_;
  bool socket_open_ = false;
  int alive_ = 0;
  Clock::time_point started_;
  std::optional<Clock::time_point> deadline_;       // of the run
  std::optional<Clock::time_point> end_others_at_;  // a rank failed: then the others get the end signal
  std::optional<Clock::time_point> kill_at_;        // they had the signal: then SIGKILL
  std::optional<Clock::time_point> give_up_at_;     // the supervisor is killing: then it is an error
};

}  // namespace

std::string signal_name(int signal) {
  const char* name = sigabbrev_np(signal);
  return name == nullptr ? "signal " + std::to_string(signal) : std::string("SIG") + name;
}

std::string RankResult::describe() const {
  if (start_error != 0) return std::string("could not be started: ") + std::strerror(start_error);
  if (signal != 0) return "killed by " + signal_name(signal);
  return "exited with code " + std::to_string(exit_code.value_or(-1));
}

LaunchResult launch(const LaunchOptions& options) {
  if (options.argv.empty()) throw Error(ErrorCode::kInvalidArgument, "launch: argv is empty");
  if (options.ranks < 1 || options.ranks > kMaxLocalRanks) {
    throw Error(ErrorCode::kInvalidArgument, "launch: number of ranks",
                {.wanted = "1.." + std::to_string(kMaxLocalRanks), .found = std::to_string(options.ranks)});
  }
  return Launch(options).run();
}

}  // namespace reshard
