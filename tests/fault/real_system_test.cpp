// SPDX-License-Identifier: BSD-3-Clause
// Faults that the system itself makes: strace fails or kills a real program at each of its system calls, and a real file
// system that is full. And readers beside a saver that never rests.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "fault/jobs.h"

namespace reshard {
namespace {

using testing::AnyOf;
using testing::HasSubstr;

std::string text_of_file(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// --- strace -------------------------------------------------------------------------------------------------------------

class StraceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (std::system("strace -V >/dev/null 2>&1") != 0) GTEST_SKIP() << "strace is not installed";
    if (std::system("strace -o /dev/null true >/dev/null 2>&1") != 0) GTEST_SKIP() << "strace may not trace here";
  }

  struct Run {
    bool reached = false;  // the call was made, and something injected
    int status = 0;        // of the saver, as the shell tells it: 128 + signal
    std::string error;
  };
  /// Saves generation 2 over 1 by the real program, with this done to its calls.
  Run save_with(const std::string& call, const std::string& injection, int nth) {
    prepared_.copy_to(directory_);
    const std::string log = place_ / "strace";
    const std::string error = place_ / "error";
    const std::string command = "strace -qq -E ASAN_OPTIONS=detect_leaks=0 -o " + log + " -e trace=" + call +
                                " -e inject=" + call + ":" + injection + ":when=" + std::to_string(nth) +
                                " " RESHARD_FAULT_SAVER " " + directory_ + " 2 2>" + error;
    const int status = std::system(("sh -c '" + command + "'").c_str());
    Run run;
    run.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    run.error = text_of_file(error);
    const std::string calls = text_of_file(log);
    run.reached = calls.find("(INJECTED)") != std::string::npos || calls.find("killed by SIGKILL") != std::string::npos;
    return run;
  }

  QuietLog quiet_;
  TemporaryDirectory place_;
  const std::string directory_ = place_ / "checkpoint";
  const Prepared prepared_{1, 1};
};

TEST_F(StraceTest, OldOrNewWhicheverCallOfARealProgramFails) {
  int states = 0;
  for (const auto& [call, error] : {std::pair("pwritev", "ENOSPC"),
                                    {"pwritev", "EIO"},
                                    {"fsync", "EIO"},
                                    {"rename", "EIO"},
                                    {"openat", "EMFILE"},
                                    {"close", "EIO"},
                                    {"unlink", "EACCES"},
                                    {"mkdir", "EACCES"},
                                    {"preadv", "EIO"}}) {
    bool saved_once = false;
    for (int nth = 1;; ++nth) {
      const Run run = save_with(call, std::string("error=") + error, nth);
      SCOPED_TRACE(std::string(call) + " " + error + " " + std::to_string(nth) + "\n" + run.error);
      const int found = generation_in(directory_);
      saved_once = saved_once || run.status == 0;
      if (!run.reached) {
        EXPECT_EQ(run.status, 0);
        EXPECT_EQ(found, 2);
        break;
      }
      ++states;
      if (run.status == 0) {
        EXPECT_EQ(found, 2);
      } else if (run.status == 3) {
        EXPECT_THAT(run.error, AnyOf(HasSubstr(directory_), HasSubstr(place_.path())));
        const bool unknown = run.error.find("(committed: unknown)") != std::string::npos;
        EXPECT_TRUE(unknown || run.error.find("(committed: no)") != std::string::npos);
        EXPECT_TRUE(found == 1 || (unknown && found == 2)) << found;
      } else {
        EXPECT_EQ(found, 1) << "the program did not even start";
      }
      expect_next_save_works(directory_, 1);
      if (HasFailure()) return;
    }
    EXPECT_TRUE(saved_once);
  }
  std::printf("strace: %d calls of a real program failed, checkpoints lost 0\n", states);
}

TEST_F(StraceTest, OldOrNewWhereverARealProgramIsKilled) {
  int states = 0;
  for (const char* call : {"mkdir", "openat", "pwritev", "fsync", "close", "rename", "unlink"}) {
    for (int nth = 1;; ++nth) {
      const Run run = save_with(call, "signal=KILL", nth);
      SCOPED_TRACE(std::string(call) + " " + std::to_string(nth));
      const int found = generation_in(directory_);
      if (!run.reached) {
        EXPECT_EQ(run.status, 0) << run.error;
        EXPECT_EQ(found, 2);
        break;
      }
      ++states;
      EXPECT_EQ(run.status, 128 + SIGKILL);
      EXPECT_THAT(found, AnyOf(1, 2));
      expect_next_save_works(directory_, 1);
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(states, 20);
  std::printf("strace: a real program killed at %d calls, checkpoints lost 0\n", states);
}

// --- a full file system ----------------------------------------------------------------------------------------------------

constexpr int kCannotMount = 77;

/// Saves into a tmpfs of so many pages, until one has room for all. In a mount namespace of its own: the mounts end with
/// the process, whatever happens to it.
int fill_file_systems(const std::string& place) {
  if (::unshare(CLONE_NEWNS) != 0 || ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) {
    return kCannotMount;
  }
  const QuietLog quiet;
  const std::string directory = place + "/checkpoint";
  int full = 0;
  bool fits = false;
  for (int pages = 1; pages <= 64 && !fits; ++pages) {
    SCOPED_TRACE(std::to_string(pages) + " pages");
    const std::string size = "size=" + std::to_string(pages * 4) + "k";
    if (::mount("tmpfs", place.c_str(), "tmpfs", 0, size.c_str()) != 0) return kCannotMount;
    int before = 0;
    for (const int number : {1, 2}) {
      const auto outcomes = try_save(directory, number, 4);
      expect_one_outcome(outcomes);
      expect_generation(generation_in(directory), before, number, outcomes[0]);
      if (outcomes[0].ok) {
        before = number;
        fits = number == 2;
        continue;
      }
      ++full;
      EXPECT_THAT(outcomes[0].text(), HasSubstr("No space left on device"));
      EXPECT_THAT(outcomes[0].text(), HasSubstr("(committed: no)"));
      EXPECT_THAT(outcomes[0].text(), HasSubstr(place));
      break;
    }
    // There is room again.
    if (::mount("tmpfs", place.c_str(), "tmpfs", MS_REMOUNT, "size=4m") != 0) ADD_FAILURE() << std::strerror(errno);
    expect_next_save_works(directory, 4);
    if (::umount2(place.c_str(), MNT_DETACH) != 0) return 1;
    if (testing::Test::HasFailure()) return 1;
  }
  std::printf("a full file system: %d sizes at which a save did not fit, checkpoints lost 0\n", full);
  std::fflush(stdout);
  return fits && full > 5 ? 0 : 1;
}

TEST(FullFileSystemTest, ASaveThatDoesNotFitLeavesTheOldCheckpoint) {
  TemporaryDirectory place;
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) ::_exit(fill_file_systems(place.path()));
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == kCannotMount) GTEST_SKIP() << "mounting a tmpfs needs root";
  EXPECT_EQ(WEXITSTATUS(status), 0) << "see the output above";
}

// --- readers beside a saver ---------------------------------------------------------------------------------------------

// A process saves without rest into one directory, this one loads without rest, on 1 and on 2 ranks: a load is of one
// save, or says which file is gone.
TEST(ConcurrentReaderTest, EveryLoadIsOfOneSaveOrANamedError) {
  constexpr int kSaves = 400;
  constexpr int64_t kRows = 2048;
  for (const size_t readers : {1, 2}) {
    TemporaryDirectory place;
    const std::string directory = place / "checkpoint";
    const QuietLog quiet;
    save_checkpoint(directory, generation(1, 2, kRows));
    const pid_t saver = ::fork();
    ASSERT_GE(saver, 0);
    if (saver == 0) {
      try {
        for (int number = 2; number <= kSaves; ++number) save_checkpoint(directory, generation(number, 2, kRows));
      } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        ::_exit(1);
      }
      ::_exit(0);
    }
    int whole = 0;
    int gone = 0;
    int last = 0;
    std::set<int> numbers;
    int status = 0;
    while (::waitpid(saver, &status, WNOHANG) == 0) {
      std::vector<MemoryLoadState> states;
      for (size_t rank = 0; rank < readers; ++rank) states.push_back(generation_destination(kRows));
      const auto outcomes = try_load(directory, states);
      expect_one_outcome(outcomes);
      if (outcomes[0].ok) {
        ++whole;
        const int number = number_of(states[0], kRows);
        for (MemoryLoadState& state : states) EXPECT_EQ(number_of(state, kRows), number) << "ranks of one load";
        EXPECT_GE(number, std::max(last, 1)) << "a mixture of saves, or an older one";
        last = number;
        numbers.insert(number);
      } else {
        ++gone;
        EXPECT_EQ(outcomes[0].error->code(), ErrorCode::kNotFound) << outcomes[0].text();
        EXPECT_THAT(outcomes[0].text(), AnyOf(HasSubstr(".distcp"), HasSubstr(".reshard-")));
      }
      if (testing::Test::HasFailure()) break;
    }
    if (testing::Test::HasFailure()) {
      ::kill(saver, SIGKILL);
      ::waitpid(saver, nullptr, 0);
      return;
    }
    EXPECT_EQ(status, 0);
    EXPECT_GT(whole, 0);
    EXPECT_EQ(loaded_generation(directory, local_file_system(), kRows), kSaves);
    std::printf("%d saves beside a reader of %zu ranks: %d loads whole, of %zu saves, %d named errors, mixtures 0\n",
                kSaves, readers, whole, numbers.size(), gone);
  }
}

}  // namespace
}  // namespace reshard
