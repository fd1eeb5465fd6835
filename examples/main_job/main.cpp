// SPDX-License-Identifier: BSD-3-Clause
// The main job: saves on N ranks, loads on M, trains on, and lets PyTorch judge every checkpoint. Prints what it does
// and a table; exits with 1 if any row fails. Each step runs the programs that a user would run.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "reshard/core/error.h"
#include "reshard/launch/gpu.h"
#include "reshard/launch/launcher.h"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

// Of float32 losses. Losses of one curve computed with different numbers of ranks differ in the order of float32 additions only: about
// 1e-7 a step, growing slowly over a few tens of steps. 1e-4 leaves room for that and is far below what a wrong moment
// does (shown in the row of the negative control).
constexpr double kLossTolerance = 1e-4;
// In float64 only an error of method is left to be seen.
constexpr double kLossTolerance64 = 1e-9;
// Of the unsharded bytes over those of the largest unit.
constexpr double kPeakLimit = 1.1;
constexpr int kSteps = 20;
constexpr int kSaveAt = 10;
constexpr int kHandBackAt = 15;  // PyTorch trains from kSaveAt to here

struct Row {
  std::string step;
  int ranks = 0;
  std::string device{};
  uint64_t bytes = 0;
  double seconds = 0;
  std::string result{};
  bool ok = false;
};

class MainJob {
 public:
  MainJob(fs::path bin, fs::path work, fs::path python, bool quiet)
      : bin_(std::move(bin)),
        work_(std::move(work)),
        python_(std::move(python)),
        quiet_(quiet),
        gpus_(reshard::nvidia_gpu_count()) {}

  /// `parts`: seed, train and float64, or some of them.
  int run(const std::set<std::string>& parts) {
    std::printf("GPUs found: %d. Cases that have enough run on CUDA/NCCL, the others on CPU/gloo.\n", gpus_);
    if (!fs::exists(python_))
      throw reshard::Error(reshard::ErrorCode::kNotFound, "no Python with PyTorch to judge the checkpoints",
                           {.file = python_.string()});
    if (parts.contains("seed")) seed_cases();
    if (parts.contains("train")) training();
    if (parts.contains("float64")) float64();
    print_table();
    return std::all_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.ok; }) ? 0 : 1;
  }

 private:
  std::string device_for(int ranks) const { return gpus_ >= ranks ? "cuda" : "cpu"; }

  /// Runs a program of `ranks` ranks; throws with its last output if it fails.
  void launch(int ranks, std::vector<std::string> argv, bool use_program_ranks = false) {
    std::string tail;
    reshard::LaunchOptions options;
    options.argv = std::move(argv);
    options.ranks = use_program_ranks ? 1 : ranks;
    options.deadline = std::chrono::minutes(10);
    options.on_line = [&](const reshard::OutputLine& line) {
      if (!quiet_) std::printf("    [rank %d] %.*s\n", line.rank, static_cast<int>(line.text.size()), line.text.data());
      std::fflush(stdout);
      tail = std::string(line.text);
    };
    if (use_program_ranks) {
      // A program that starts its own ranks must not believe to be one.
      for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                               "RESHARD_MASTER_LISTEN_FD"}) {
        options.environment[name] = std::nullopt;
      }
    }
    const auto result = reshard::launch(options);
    if (!result.success()) {
      std::string why = result.deadline_passed ? "the deadline passed"
                                               : result.ranks[static_cast<size_t>(*result.first_failed)].describe();
      throw reshard::Error(reshard::ErrorCode::kInternal, options.argv[0] + ": " + why + "; last line: " + tail);
    }
  }

  void judge(std::vector<std::string> arguments, int ranks) {
    std::vector<std::string> argv{python_.string(), std::string(RESHARD_SOURCE_DIR) + "/tests/interop/judge.py"};
    argv.insert(argv.end(), arguments.begin(), arguments.end());
    launch(ranks, argv, true);
  }

  /// Runs one row of the table; what it throws fails the row, and the job goes on.
  void row(const std::string& step, int ranks, const std::string& device, const fs::path& checkpoint,
           const std::function<std::string()>& body) {
    std::printf("==> %s (%d ranks, %s)\n", step.c_str(), ranks, device.c_str());
    std::fflush(stdout);
    Row row{step, ranks, device};
    const auto start = Clock::now();
    try {
      row.result = body();
      row.ok = true;
    } catch (const std::exception& error) {
      row.result = "FAILED";
      std::fprintf(stderr, "    %s\n", error.what());
    }
    row.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (fs::is_directory(checkpoint)) {
      for (const auto& entry : fs::directory_iterator(checkpoint)) row.bytes += entry.file_size();
    }
    rows_.push_back(std::move(row));
  }

  /// Digests of a checkpoint as the command line tool computes them.
  fs::path digest(const fs::path& checkpoint) {
    const fs::path file = checkpoint.string() + ".digest.json";
    const std::string command =
        "'" + (bin_ / "reshard").string() + "' digest '" + checkpoint.string() + "' --json > '" + file.string() + "'";
    if (std::system(command.c_str()) != 0)
      throw reshard::Error(reshard::ErrorCode::kInternal, "reshard digest failed", {.file = checkpoint.string()});
    return file;
  }

  void judge_rows(const std::string& name, const fs::path& checkpoint, const std::string& model, int fsdp_ranks) {
    row("PyTorch opens it: " + name, 1, "cpu", checkpoint, [&] {
      judge({"whole", checkpoint.string(), "--digest", digest(checkpoint).string()}, 1);
      return "values equal";
    });
    row("PyTorch FSDP loads it: " + name, fsdp_ranks, "cpu", checkpoint, [&] {
      judge({"fsdp", checkpoint.string(), "--digest", digest(checkpoint).string(), "--ranks",
             std::to_string(fsdp_ranks), "--model", model},
            fsdp_ranks);
      return "values equal";
    });
  }

  void seed_cases() {
    const std::string program = (bin_ / "seed_case").string();
    const auto run_seed = [&](const std::string& name, int ranks, const fs::path& directory,
                              std::vector<std::string> extra) {
      const std::string device = device_for(ranks);
      row(name, ranks, device, directory, [&] {
        std::vector<std::string> argv{program, directory.string(), "--device", device};
        argv.insert(argv.end(), extra.begin(), extra.end());
        launch(ranks, argv);
        return "equal bit for bit";
      });
    };
    run_seed("no resharding: saved by 2, loaded by 2", 2, work_ / "no-resharding", {});
    run_seed("resharding: saved by 4, loaded by 2 + 2", 4, work_ / "resharding-4-to-2", {"--load", "halves"});
    run_seed("resharding: saved by 2 + 2, loaded by 4", 4, work_ / "resharding-2-to-4", {"--save", "halves"});
    judge_rows("no resharding", work_ / "no-resharding", "linear", 3);
    judge_rows("resharding 4 to 2", work_ / "resharding-4-to-2", "linear", 2);
    judge_rows("resharding 2 to 4", work_ / "resharding-2-to-4", "linear", 4);
  }

  static std::map<int, double> losses(const fs::path& log) {
    std::map<int, double> curve;
    std::ifstream in(log);
    for (std::string line; std::getline(in, line);) {
      const json entry = json::parse(line);
      curve[entry.at("step")] = entry.at("loss");
    }
    return curve;
  }

  /// Largest difference over the steps of `other`, which must be those from `first` to the last.
  static double largest_difference(const std::map<int, double>& reference, const std::map<int, double>& other,
                                   int first = kSaveAt + 1) {
    double largest = 0;
    for (int step = first; step <= kSteps; ++step) {
      if (!reference.contains(step) || !other.contains(step))
        throw reshard::Error(reshard::ErrorCode::kInternal, "a run lacks step " + std::to_string(step));
      const double difference = std::abs(reference.at(step) - other.at(step));
      if (!(difference <= largest)) largest = difference;  // also where one is not a number
    }
    return largest;
  }

  /// Fails the row where curves that must agree do not.
  static std::string agreement(double difference, double tolerance) {
    char text[100];
    std::snprintf(text, sizeof text, "max loss difference %.1e (tolerance %.0e)", difference, tolerance);
    if (!(difference <= tolerance)) throw reshard::Error(reshard::ErrorCode::kInternal, text);
    return text;
  }

  json stats() const { return json::parse(std::ifstream(work_ / "stats.json")); }

  static std::string ratio(const json& stats, const char* above, const char* below) {
    char text[30];
    std::snprintf(text, sizeof text, "%.3f", stats.at(above).get<double>() / stats.at(below).get<double>());
    return text;
  }

  void training() {
    std::printf(
        "Float32 losses must agree within %.0e: ranks only change the order of additions, about 1e-7 a step; what is "
        "lost with Adam's moments must show as at least ten times that. Float64 losses: within %.0e.\n",
        kLossTolerance, kLossTolerance64);
    const std::string program = (bin_ / "train_lm").string();
    const fs::path checkpoint = work_ / "train" / ("step-" + std::to_string(kSaveAt));
    const auto train = [&](int ranks, const std::string& log, std::vector<std::string> extra,
                           const char* directory = "train") {
      std::vector<std::string> argv{program,
                                    "--checkpoint",
                                    (work_ / directory).string(),
                                    "--steps",
                                    std::to_string(kSteps),
                                    "--log",
                                    (work_ / log).string(),
                                    "--device",
                                    device_for(ranks),
                                    "--text",
                                    RESHARD_SOURCE_DIR};
      argv.insert(argv.end(), extra.begin(), extra.end());
      launch(ranks, argv);
    };
    std::map<int, double> whole;
    row("train 4: save in the middle, go on", 4, device_for(4), checkpoint, [&] {
      train(4, "whole.jsonl", {"--save-every", std::to_string(kSaveAt), "--stats", (work_ / "stats.json").string()});
      whole = losses(work_ / "whole.jsonl");
      const json counters = stats();
      if (whole.size() != kSteps || !(whole.at(kSteps) < whole.at(1)))
        throw reshard::Error(reshard::ErrorCode::kInternal, "the loss does not fall");
      if (counters.at("state_dict_bytes_sent") != 0)
        throw reshard::Error(reshard::ErrorCode::kInternal, "the sharded state dict was sent somewhere");
      if (!(counters.at("peak_unsharded_bytes") <= kPeakLimit * counters.at("largest_unit_bytes").get<double>()))
        throw reshard::Error(reshard::ErrorCode::kInternal, "more than one unit was unsharded at a time");
      char text[100];
      std::snprintf(text, sizeof text, "loss %.3f -> %.3f, peak/unit %s, 0 bytes sent for the state dict", whole.at(1),
                    whole.at(kSteps), ratio(counters, "peak_unsharded_bytes", "largest_unit_bytes").c_str());
      return std::string(text);
    });
    const auto resumed = [&](const std::string& name, int ranks, const std::string& log,
                             const std::function<void()>& go) {
      row(name, ranks, name.rfind("PyTorch", 0) == 0 ? "cpu" : device_for(ranks), checkpoint, [&] {
        go();
        const auto curve = losses(work_ / log);
        const double difference = largest_difference(whole, curve);
        for (const auto& [step, loss] : curve)
          std::printf("    step %3d  uninterrupted %.6f  resumed %.6f\n", step, whole.at(step), loss);
        return agreement(difference, kLossTolerance);
      });
    };
    const std::vector<std::string> resume{"--resume", "--resume-step", std::to_string(kSaveAt)};
    for (const int ranks : {2, 3}) {
      const std::string log = "resumed-" + std::to_string(ranks) + ".jsonl";
      resumed("resume on " + std::to_string(ranks), ranks, log, [&] {
        auto extra = resume;
        extra.insert(extra.end(), {"--stats", (work_ / "stats.json").string()});
        train(ranks, log, extra);
        std::printf("    bytes read / needed: %s\n", ratio(stats(), "bytes_read", "bytes_needed").c_str());
      });
    }
    row("negative control: resume without moments", 2, device_for(2), checkpoint, [&] {
      auto extra = resume;
      extra.emplace_back("--drop-moments");
      train(2, "dropped.jsonl", extra);
      const double difference = largest_difference(whole, losses(work_ / "dropped.jsonl"));
      if (!(difference >= 10 * kLossTolerance)) {
        throw reshard::Error(reshard::ErrorCode::kInternal, "dropping the moments is not seen",
                             {.found = std::to_string(difference)});
      }
      char text[60];
      std::snprintf(text, sizeof text, "differs by %.1e, as it must", difference);
      return std::string(text);
    });
    judge_rows("training", checkpoint, "lm", 2);
    resumed("PyTorch FSDP goes on training", 3, "python.jsonl", [&] {
      judge({"continue", checkpoint.string(), "--ranks", "3", "--steps", std::to_string(kSteps), "--text",
             RESHARD_SOURCE_DIR, "--log", (work_ / "python.jsonl").string()},
            3);
    });
    resumed("C++ on 4, PyTorch FSDP on 2, C++ on 3", 3, "relay.jsonl", [&] {
      judge_takes_over(checkpoint, "relay", {});
      train(3, "relay.jsonl", {"--resume", "--resume-step", std::to_string(kHandBackAt)}, "relay");
    });
  }

  /// PyTorch FSDP on 2 ranks trains from `checkpoint` to kHandBackAt and saves into `directory`; its losses go to a log of that name.
  void judge_takes_over(const fs::path& checkpoint, const std::string& directory, std::vector<std::string> extra) {
    std::vector<std::string> argv{"continue", checkpoint.string(),
                                  "--ranks",  "2",
                                  "--steps",  std::to_string(kHandBackAt),
                                  "--text",   RESHARD_SOURCE_DIR,
                                  "--log",    (work_ / (directory + ".jsonl")).string(),
                                  "--save",   (work_ / directory / ("step-" + std::to_string(kHandBackAt))).string()};
    argv.insert(argv.end(), extra.begin(), extra.end());
    judge(argv, 2);
  }

  /// The same model and data in float64, where only errors of method are left: unsharded, sharded, and in PyTorch's own FSDP
  /// from our checkpoint.
  void float64() {
    const fs::path checkpoint = work_ / "train64" / ("step-" + std::to_string(kSaveAt));
    const auto train = [&](int ranks, const std::string& log, std::vector<std::string> extra,
                           const char* directory = "train64") {
      std::vector<std::string> argv{(bin_ / "train_lm").string(),
                                    "--checkpoint",
                                    (work_ / directory).string(),
                                    "--steps",
                                    std::to_string(kSteps),
                                    "--log",
                                    (work_ / log).string(),
                                    "--device",
                                    "cpu",
                                    "--text",
                                    RESHARD_SOURCE_DIR,
                                    "--float64"};
      argv.insert(argv.end(), extra.begin(), extra.end());
      launch(ranks, argv);
    };
    std::map<int, double> plain;
    row("float64: not sharded", 1, "cpu", {}, [&] {
      train(1, "plain64.jsonl", {"--unsharded"});
      plain = losses(work_ / "plain64.jsonl");
      return "the reference";
    });
    for (const int ranks : {2, 3}) {
      const std::string log = "whole64-" + std::to_string(ranks) + ".jsonl";
      row("float64: sharded over " + std::to_string(ranks), ranks, "cpu", ranks == 2 ? checkpoint : fs::path(), [&] {
        train(ranks, log,
              ranks == 2 ? std::vector<std::string>{"--save-every", std::to_string(kSaveAt)}
                         : std::vector<std::string>{});
        return agreement(largest_difference(plain, losses(work_ / log), 1), kLossTolerance64);
      });
    }
    row("float64: PyTorch FSDP goes on training", 3, "cpu", checkpoint, [&] {
      judge({"continue", checkpoint.string(), "--ranks", "3", "--steps", std::to_string(kSteps), "--text",
             RESHARD_SOURCE_DIR, "--log", (work_ / "python64.jsonl").string(), "--float64"},
            3);
      return agreement(largest_difference(plain, losses(work_ / "python64.jsonl")), kLossTolerance64);
    });
    row("float64: C++ on 2, PyTorch FSDP on 2, C++ on 3", 3, "cpu", checkpoint, [&] {
      judge_takes_over(checkpoint, "relay64", {"--float64"});
      train(3, "relay64.jsonl", {"--resume", "--resume-step", std::to_string(kHandBackAt)}, "relay64");
      return agreement(largest_difference(plain, losses(work_ / "relay64.jsonl")), kLossTolerance64);
    });
  }

  void print_table() const {
    std::printf("\n%-52s %5s  %-6s %10s %8s  %s\n", "step", "ranks", "device", "bytes", "seconds", "result");
    for (const Row& row : rows_) {
      std::printf("%-52s %5d  %-6s %10llu %8.2f  %s\n", row.step.c_str(), row.ranks, row.device.c_str(),
                  static_cast<unsigned long long>(row.bytes), row.seconds, row.result.c_str());
    }
    const auto failed = std::count_if(rows_.begin(), rows_.end(), [](const Row& row) { return !row.ok; });
    std::printf("%zu rows, %td failed\n", rows_.size(), failed);
  }

  fs::path bin_, work_, python_;
  bool quiet_;
  int gpus_;
  std::vector<Row> rows_;
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs the main job of reshard and prints a table.");
  std::string work, python = std::string(RESHARD_SOURCE_DIR) + "/.venv/bin/python";
  bool keep = false, quiet = false;
  std::set<std::string> parts{"seed", "train", "float64"};
  app.add_option("--only", parts, "parts of the job: seed, train, float64 (default: all)")
      ->delimiter(',')
      ->check(CLI::IsMember({"seed", "train", "float64"}));
  app.add_option("--work", work, "where checkpoints go and stay (default: a temporary directory)");
  app.add_option("--python", python, "a Python that has PyTorch");
  app.add_flag("--keep", keep, "keep the temporary directory");
  app.add_flag("--quiet", quiet, "do not show the output of the ranks");
  CLI11_PARSE(app, argc, argv);
  try {
    const bool own = work.empty();
    if (own) {
      std::string pattern = (fs::temp_directory_path() / "reshard-main-job-XXXXXX").string();
      if (mkdtemp(pattern.data()) == nullptr)
        throw reshard::Error(reshard::ErrorCode::kIo, "cannot make a temporary directory", {.file = pattern});
      work = pattern;
    }
    fs::create_directories(work);
    const int result = MainJob(fs::read_symlink("/proc/self/exe").parent_path(), work, python, quiet).run(parts);
    if (own && !keep) {
      fs::remove_all(work);
    } else {
      std::printf("checkpoints are kept in %s\n", work.c_str());
    }
    return result;
  } catch (const std::exception& error) {
    std::cerr << "main job: " << error.what() << "\n";
    return 1;
  }
}
