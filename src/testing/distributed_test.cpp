// SPDX-License-Identifier: BSD-3-Clause
#include "reshard/testing/distributed_test.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <sstream>
#include <string_view>

#include "reshard/core/error.h"
#include "reshard/launch/environment.h"
#include "reshard/launch/gpu.h"
#include "reshard/launch/launcher.h"
#include "testing/rank_report.h"
#include "testing/stack_printer.h"

namespace reshard {
namespace testing_detail {
namespace {

constexpr const char* kTempDirVariable = "RESHARD_TEST_TEMP_DIR";
constexpr const char* kDeadlineScaleVariable = "RESHARD_TEST_DEADLINE_SCALE";
constexpr std::size_t kMaxStackText = 1 << 15;  // of one stuck rank
// A process that dies closes its connections first and counts as dead later, when its last thread is gone; a peer may report the
// closed connection in between. So a death counts as this much earlier when looking for the first cause.
constexpr std::chrono::milliseconds kDyingTakes{300};

std::string plural(int n, const std::string& word) { return std::to_string(n) + " " + word + (n == 1 ? "" : "s"); }

std::string seconds(std::chrono::nanoseconds time) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.3g s", std::chrono::duration<double>(time).count());
  return text.data();
}

// --- in a rank -------------------------------------------------------------------------------------------------------

/// Sends what happens in this rank to the parent, in place of GoogleTest's own text.
class RankReporter : public ::testing::EmptyTestEventListener {
 public:
  explicit RankReporter(int fd) : fd_(fd), process_(getpid()) {}

 private:
  void OnTestPartResult(const ::testing::TestPartResult& part) override {
    if (part.passed()) return;
    record({.kind = part.skipped() ? RankRecord::Kind::kSkip : RankRecord::Kind::kFailure,
            .at = std::chrono::steady_clock::now(),
            .file = part.file_name() == nullptr ? "" : part.file_name(),
            .line = part.line_number(),
            .message = part.message()});
  }
  void OnTestEnd(const ::testing::TestInfo&) override {
    if (getpid() != process_) return;  // a child that the body forked
    record({.kind = RankRecord::Kind::kComplete, .at = std::chrono::steady_clock::now()});
  }
  void record(const RankRecord& r) { write_record(fd_, r); }

  int fd_;
  pid_t process_;
};

// --- in the parent ---------------------------------------------------------------------------------------------------

/// One thing that went wrong on one rank.
struct Finding {
  std::chrono::steady_clock::time_point at;
  std::chrono::steady_clock::time_point order;  // the same, earlier for a death
  int rank;
  std::string file;  // empty: the case itself
  int line;
  std::string text;
};

struct Verdict {
  std::vector<Finding> findings;  // first cause first
  std::vector<std::string> skips;
};

std::string describe(const RankEnd& end) {
  return RankResult{.exit_code = end.exit_code, .signal = end.signal}.describe();
}

/// What is wrong with how a rank ended by itself, beyond the failures it reported; empty: nothing.
std::string wrong_end(const RankResult& result, const std::vector<RankRecord>& records,
                      const DistributedTestOptions& options) {
  using Kind = RankRecord::Kind;
  const auto has = [&](Kind kind) {
    return std::any_of(records.begin(), records.end(), [&](const RankRecord& r) { return r.kind == kind; });
  };
  const std::string after = " after " + seconds(result.duration);
  if (const auto expected = options.expected.find(result.rank); expected != options.expected.end()) {
    const RankEnd found = {.exit_code = result.exit_code.value_or(0), .signal = result.signal};
    if (result.start_error == 0 && found == expected->second) return "";
    return result.describe() + after + ", expected: " + describe(expected->second);
  }
  if (result.start_error != 0 || result.signal != 0) return result.describe() + after;
  if (!has(Kind::kComplete)) return result.describe() + after + ", before its body was complete";
  if (result.exit_code != 0 && !has(Kind::kFailure))
    return result.describe() + after + ", although its body had passed";
  return "";
}

bool succeeded(const RankResult& result, const DistributedTestOptions& options) {
  const auto records = read_records(result.report);
  return wrong_end(result, records, options).empty() && std::none_of(records.begin(), records.end(), [](const auto& r) {
           return r.kind == RankRecord::Kind::kFailure;
         });
}

Verdict judge(const LaunchResult& launched, const std::vector<std::string>& stacks,
              const DistributedTestOptions& options, std::chrono::milliseconds deadline) {
  Verdict verdict;
  for (const RankResult& result : launched.ranks) {
    const auto records = read_records(result.report);
    for (const RankRecord& r : records) {
      if (r.kind == RankRecord::Kind::kFailure) {
        verdict.findings.push_back({r.at, r.at, result.rank, r.file, r.line, r.message});
      } else if (r.kind == RankRecord::Kind::kSkip) {
        verdict.skips.push_back("[rank " + std::to_string(result.rank) + "] " + r.message);
      }
    }
    std::string text;
    auto order = result.ended_at;
    if (result.reason == EndReason::kItself) {
      text = wrong_end(result, records, options);
      const bool explained = std::any_of(records.begin(), records.end(),
                                         [](const RankRecord& r) { return r.kind == RankRecord::Kind::kFailure; });
      if (!explained) order -= kDyingTakes;
    } else {
      text = result.stopped ? "stopped" : "still running";
      text += result.reason == EndReason::kDeadline ? " at the deadline of " + seconds(deadline)
                                                    : " after another rank's failure";
      text += "; " + result.describe();
      const std::string& stack = stacks[static_cast<std::size_t>(result.rank)];
      if (!stack.empty()) text += "; it printed:\n" + stack;
    }
    if (!text.empty()) verdict.findings.push_back({result.ended_at, order, result.rank, "", 0, text});
  }
  std::stable_sort(verdict.findings.begin(), verdict.findings.end(),
                   [](const Finding& a, const Finding& b) { return a.order < b.order; });
  return verdict;
}

/// A new folder, removed with all it holds when this goes.
class TempDir {
 public:
  TempDir() {
    std::string path = std::filesystem::temp_directory_path() / "reshard-test-XXXXXX";
    if (mkdtemp(path.data()) == nullptr) {
      throw Error(ErrorCode::kIo, std::string("cannot make a folder for the ranks: ") + std::strerror(errno),
                  {.file = path});
    }
    path_ = path;
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// This process's own arguments with GoogleTest's replaced by those that run one case.
std::vector<std::string> rank_arguments(const Case& described) {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  const std::string all((std::istreambuf_iterator<char>(file)), {});
  std::vector<std::string> result;
  for (std::size_t from = 0; from < all.size(); from = all.find('\0', from) + 1) {
    const std::string argument = all.c_str() + from;
    const bool of_gtest = argument.starts_with("--gtest_");
    const bool kept =
        argument.starts_with("--gtest_catch_exceptions") || argument.starts_with("--gtest_also_run_disabled_tests");
    if (!of_gtest || kept) result.push_back(argument);
  }
  result.push_back("--gtest_filter=" + described.suite + "." + described.name);
  return result;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

std::string variable(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? "" : value;
}

/// The GPUs that ctest handed out, as CUDA_VISIBLE_DEVICES; empty where it handed out none. ctest's ids count the
/// visible ones.
std::string allocated_gpus() {
  const std::vector<std::string> visible = split(variable("CUDA_VISIBLE_DEVICES"), ',');
  std::string result;
  const int groups = std::atoi(variable("CTEST_RESOURCE_GROUP_COUNT").c_str());
  for (int i = 0; i < groups; ++i) {
    for (const std::string& part : split(variable("CTEST_RESOURCE_GROUP_" + std::to_string(i) + "_GPUS"), ';')) {
      if (!part.starts_with("id:")) continue;
      std::string id = part.substr(3, part.find(',') - 3);
      if (const auto index = static_cast<std::size_t>(std::atoi(id.c_str())); index < visible.size())
        id = visible[index];
      result += (result.empty() ? "" : ",") + id;
    }
  }
  return result;
}

std::chrono::milliseconds scaled(std::chrono::milliseconds deadline) {
  const std::string scale = variable(kDeadlineScaleVariable);
  if (scale.empty()) return deadline;
  char* end = nullptr;
  const double factor = std::strtod(scale.c_str(), &end);
  if (*end != '\0' || !(factor >= 0 && factor <= 1e6)) {
    throw Error(ErrorCode::kInvalidArgument, std::string("environment variable ") + kDeadlineScaleVariable,
                {.wanted = "a factor", .found = '"' + scale + '"'});
  }
  return std::chrono::milliseconds(static_cast<int64_t>(static_cast<double>(deadline.count()) * factor));
}

LaunchOptions launch_options(const Case& described, const std::filesystem::path& temp_dir) {
  LaunchOptions options = {.argv = rank_arguments(described),
                           .program = "/proc/self/exe",
                           .ranks = described.options.ranks,
                           .deadline = scaled(described.options.deadline),
                           .end_signal = SIGABRT};
  options.environment[kTempDirVariable] = temp_dir.string();
  // What steers GoogleTest here (filters, shards, result files) is not for the ranks.
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const std::string name(text.substr(0, text.find('=')));
    if (name.starts_with("GTEST_") || name.starts_with("TEST_") || name == "XML_OUTPUT_FILE") {
      options.environment[name] = std::nullopt;
    }
  }
  if (const std::string gpus = allocated_gpus(); !gpus.empty()) options.environment["CUDA_VISIBLE_DEVICES"] = gpus;
  return options;
}

}  // namespace

bool has_parent() { return std::getenv("RANK") != nullptr && std::getenv(kTempDirVariable) != nullptr; }

std::string describe(const DistributedTestOptions& options) {
  return plural(options.ranks, "rank") + " on " + (options.gpus == 0 ? "cpu" : plural(options.gpus, "GPU")) +
         " within " + std::to_string(std::chrono::ceil<std::chrono::seconds>(options.deadline).count()) + " s";
}

std::vector<std::pair<std::string, DistributedTestOptions>> variants(const DeviceTestOptions& options) {
  std::vector<std::pair<std::string, DistributedTestOptions>> result;
  const auto add = [&](const char* device, int ranks, int gpus) {
    result.emplace_back(device + std::string("Ranks") + std::to_string(ranks),
                        DistributedTestOptions{.ranks = ranks, .gpus = gpus, .deadline = options.deadline});
  };
  for (int ranks : options.ranks) add("Cpu", ranks, 0);
  for (int ranks : options.ranks) add("Cuda", ranks, ranks);
  for (int ranks : options.one_gpu_ranks) add("OneGpu", ranks, 1);
  return result;
}

void prepare_rank_process() {
  static const bool once = [] {
    const char* report = std::getenv(kReportFdVariable);
    if (report == nullptr || !has_parent()) return true;  // alone, or under a launcher that reads no records
    const int fd = std::atoi(report);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    unsetenv(kReportFdVariable);               // not for programs that the body starts
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // what was printed before a crash must not be lost in a buffer
    install_stack_printer();
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new RankReporter(fd));
    return true;
  }();
  (void)once;
}

}  // namespace testing_detail

std::string DistributedTest::backend() const {
  if (!uses_gpu()) return "cpu:gloo";
  return options().gpus >= options().ranks ? "cpu:gloo,cuda:nccl" : "cpu:gloo,cuda:gloo";
}

void DistributedTest::SetUp() {
  const std::optional<RankEnvironment> env = read_rank_environment();
  if (!env) return;
  // Only a launcher from outside can start another number of ranks.
  if (env->world_size != options().ranks) {
    GTEST_SKIP() << "needs " << testing_detail::plural(options().ranks, "rank") << ", started with " << env->world_size;
  }
  const bool has_parent = testing_detail::has_parent();
  if (!has_parent && nvidia_gpu_count() < options().gpus) {
    GTEST_SKIP() << "needs " << testing_detail::plural(options().gpus, "GPU") << ", found " << nvidia_gpu_count();
  }
  in_rank_ = true;
  rank_ = env->rank;
  world_size_ = env->world_size;
  local_rank_ = env->local_rank;
  if (has_parent) {
    temp_dir_ = testing_detail::variable(testing_detail::kTempDirVariable);
  } else {
    std::string name = "reshard-" + testing_detail::variable("TORCHELASTIC_RUN_ID") + "-" +
                       testing_detail::variable("TORCHELASTIC_RESTART_COUNT") + "-" + std::to_string(env->master_port) +
                       "-" + case_->suite + "." + case_->name;
    std::replace(name.begin(), name.end(), '/', '-');
    temp_dir_ = std::filesystem::temp_directory_path() / name;
    std::filesystem::create_directories(temp_dir_);
  }
  set_up_rank();
}

void DistributedTest::TestBody() { in_rank_ ? run_rank() : run_parent(); }

void DistributedTest::TearDown() {
  if (in_rank_) tear_down_rank();
}

void DistributedTest::run_parent() {
  using namespace testing_detail;
  if (const int found = options().gpus == 0 ? 0 : nvidia_gpu_count(); found < options().gpus) {
    GTEST_SKIP() << "needs " << plural(options().gpus, "GPU") << ", found " << found;
  }
  const TempDir temp_dir;
  LaunchOptions launching = launch_options(*case_, temp_dir.path());
  std::vector<std::string> stacks(static_cast<std::size_t>(options().ranks));
  launching.is_success = [&](const RankResult& result) { return succeeded(result, options()); };
  launching.on_line = [&](const OutputLine& line) {
    if (line.text.starts_with("Running main() from ")) return;  // gtest_main's, once a rank
    if (line.ending) {                                          // shown after the cause
      std::string& stack = stacks[static_cast<std::size_t>(line.rank)];
      if (stack.size() < kMaxStackText) stack.append("    ").append(line.text).append("\n");
      return;
    }
    std::FILE* out = line.stream == OutputStream::kStdout ? stdout : stderr;
    std::fprintf(out, "[rank %d] %.*s\n", line.rank, static_cast<int>(line.text.size()), line.text.data());
    std::fflush(out);
  };
  const LaunchResult launched = launch(launching);
  const auto started = launched.ranks.front().ended_at - launched.ranks.front().duration;
  const Verdict verdict = judge(launched, stacks, options(), launching.deadline);
  bool first = true;
  for (const Finding& finding : verdict.findings) {
    const bool placed = !finding.file.empty();
    ADD_FAILURE_AT(placed ? finding.file.c_str() : case_->file, placed ? finding.line : case_->line)
        << "[rank " << finding.rank << "] " << (first && verdict.findings.size() > 1 ? "first cause, " : "") << "at "
        << seconds(finding.at - started) << ": " << finding.text;
    first = false;
  }
  if (verdict.findings.empty() && !verdict.skips.empty()) {
    std::string reasons;
    for (const std::string& skip : verdict.skips) reasons += (reasons.empty() ? "" : "\n") + skip;
    GTEST_SKIP() << reasons;
  }
}

}  // namespace reshard
