// SPDX-License-Identifier: BSD-3-Clause
// Runs the cases of harness_cases.cpp and looks at what becomes of them.
#include "reshard/testing/distributed_test.h"

#include <gmock/gmock.h>
#include <signal.h>

#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "launch/child_process.h"
#include "reshard/launch/launcher.h"

namespace reshard {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

class DistributedTestTest : public ::testing::Test {
 protected:
  /// Runs cases with all their processes in `alive_`; at its end none may be left.
  ChildResult run(const std::string& filter, std::map<std::string, std::string> environment = {}) {
    environment["HARNESS_ALIVE_FIFO"] = alive_.path();
    ChildProcess child({RESHARD_HARNESS_CASES, "--gtest_filter=" + filter}, environment);
    ChildResult result = child.wait();
    if (result.output.find("needs ") == std::string::npos) alive_.wait_until_nobody_is_left();
    return result;
  }

  /// Runs a case that must fail: its output, with `texts` in this order.
  std::string run_failing(const std::string& name, const std::vector<std::string>& texts) {
    const ChildResult result = run("Failing." + name);
    EXPECT_EQ(result.exit_code, 1);
    size_t from = 0;
    for (const std::string& text : texts) {
      const size_t at = result.output.find(text, from);
      EXPECT_NE(at, std::string::npos) << "not there, or not in this order: " << text << "\n" << result.output;
      if (at != std::string::npos) from = at + text.size();
    }
    return result.output;
  }

  /// "file:line: Failure\nFailed\n" of the line that holds `code`.
  static std::string at_line_of(const std::string& code) {
    std::ifstream source(RESHARD_HARNESS_SOURCE);
    std::string line;
    for (int number = 1; std::getline(source, line); ++number) {
      if (line.find(code) != std::string::npos) {
        return "harness_cases.cpp:" + std::to_string(number) + ": Failure\nFailed\n";
      }
    }
    return "no such line: " + code;
  }

  AliveFifo alive_;
};

TEST_F(DistributedTestTest, PassesWhenEveryRankDoes) {
  const ChildResult result = run("Passing.*");
  EXPECT_EQ(result.exit_code, 0) << result.output;
  EXPECT_THAT(result.output, HasSubstr("[rank 2] text of rank 2\n"));
  EXPECT_THAT(result.output, HasSubstr("[       OK ] Passing.KnowsItsPlace"));
  EXPECT_THAT(result.output, Not(HasSubstr("] Running main()")));
}

TEST_F(DistributedTestTest, RepeatsAndShuffles) {
  ChildProcess child({RESHARD_HARNESS_CASES, "--gtest_filter=Passing.*", "--gtest_repeat=3", "--gtest_shuffle"});
  const std::string output = child.wait().output;
  int passed = 0;
  for (size_t at = 0; (at = output.find("OK ] Passing", at)) != std::string::npos; ++at) ++passed;
  EXPECT_EQ(passed, 3);
}

TEST_F(DistributedTestTest, RanksIgnoreResultFilesAndShardsOfTheParent) {
  TestFolder folder;
  const std::string file = folder.path() / "result.xml";
  ChildProcess child({RESHARD_HARNESS_CASES, "--gtest_filter=Passing.*:OrdinaryTest.*", "--gtest_output=xml:" + file},
                     {{"GTEST_TOTAL_SHARDS", "2"}, {"GTEST_SHARD_INDEX", "0"}, {"GTEST_COLOR", "yes"}});
  EXPECT_EQ(child.wait().exit_code, 0);
  std::ifstream stream(file);
  const std::string xml((std::istreambuf_iterator<char>(stream)), {});
  EXPECT_THAT(xml, HasSubstr("<testsuites tests=\"1\" failures=\"0\""));
  EXPECT_THAT(xml, HasSubstr("value_param=\"3 ranks on cpu within 60 s\""));
}

TEST_F(DistributedTestTest, ShowsFailedAssertionsWithRankFileAndLine) {
  run_failing("Expectation", {at_line_of("EXPECT_EQ(1 + 1, 3)"), "[rank 1] first cause, at ", "Which is: 2",
                              "so says rank 1", at_line_of("EXPECT_TRUE(false);"), "[rank 1] at ", "Value of: false"});
}

TEST_F(DistributedTestTest, AFailureEndsTheOthersAndComesFirst) {
  run_failing("AssertionOfOneRankWhileOthersHang",
              {at_line_of("ASSERT_EQ(\"found\""), "[rank 1] first cause", "\"wanted\"", "[rank ",
               "still running after another rank's failure; killed by SIGABRT; it printed:\n", "pause", "[rank ",
               "still running after another rank's failure"});
}

TEST_F(DistributedTestTest, AnExceptionIsAFailure) {
  run_failing("Throw", {at_line_of("Failing, Throw,"), "[rank 1] at ", "thrown by rank 1"});
  run_failing("ThrowOfWhatIsNoException", {"[rank 0] at ", "Unknown C++ exception"});
}

TEST_F(DistributedTestTest, AnExitInTheBodyIsAFailureWhateverItsCode) {
  run_failing("ExitZero", {at_line_of("Failing, ExitZero,"), "[rank 1] first cause, at ", "exited with code 0 after ",
                           "before its body was complete", "[rank 0] at ", "still running"});
  run_failing("QuickExitZero", {"[rank 1] at ", "exited with code 0 after ", "before its body was complete"});
  run_failing("ExitNonZero",
              {"[rank 1] first cause, at ", "exited with code 7 after ", "before its body was complete"});
}

TEST_F(DistributedTestTest, ANonZeroExitAfterTheBodyIsAFailure) {
  run_failing("ExitNonZeroAfterTheBody", {"[rank 1] at ", "exited with code 9 after ", "although its body had passed"});
}

TEST_F(DistributedTestTest, ADeathBySignalNamesSignalAndRank) {
  const std::string output = run_failing("Signal", {"[rank 1] last words\n", at_line_of("Failing, Signal,"),
                                                    "[rank 1] first cause, at ", "killed by SIGKILL", "[rank 0] at "});
  EXPECT_THAT(output, Not(HasSubstr("rank 0] first cause")));
  run_failing("Abort", {"[rank 1] ", "abort", "[rank 1] at ", "killed by SIGABRT"});
}

TEST_F(DistributedTestTest, ADeathComesBeforeWhatItsPeersMakeOfIt) {
  run_failing("DeathSeenByAPeer", {"[rank 1] first cause", "killed by SIGKILL", "[rank 0] ", "connection closed"});
}

TEST_F(DistributedTestTest, AHangEndsAtTheDeadlineWithStacks) {
  const std::string output =
      run_failing("Hang", {"first cause, at ", "still running at the deadline of 2 s; killed by SIGABRT; it printed:\n",
                           "pause", "still running at the deadline of 2 s"});
  EXPECT_THAT(output, HasSubstr("[rank 0] "));
  EXPECT_THAT(output, HasSubstr("[rank 2] "));
  EXPECT_THAT(output, Not(HasSubstr("[rank 1] ")));
}

TEST_F(DistributedTestTest, TheCauseComesBeforeTheHangThatFollows) {
  run_failing("HangAfterAFailure",
              {at_line_of("the cause"), "[rank 1] first cause", "the cause", "still running at the deadline"});
}

TEST_F(DistributedTestTest, ARankThatIgnoresSignalsIsKilled) {
  run_failing("HangThatIgnoresSignals", {"[rank 0] at ", "still running at the deadline of 0.2 s; killed by SIGKILL"});
}

TEST_F(DistributedTestTest, AStoppedRankIsNamedAndPrintsItsStack) {
  run_failing("Stopped",
              {"[rank 1] at ", "stopped at the deadline of 2 s; killed by SIGABRT; it printed:\n", "TestBody"});
}

TEST_F(DistributedTestTest, DeadlinesCanBeScaled) {
  const ChildResult result = run("Failing.Hang", {{"RESHARD_TEST_DEADLINE_SCALE", "0.25"}});
  EXPECT_THAT(result.output, HasSubstr("still running at the deadline of 0.5 s"));
  EXPECT_THAT(run("Failing.Hang", {{"RESHARD_TEST_DEADLINE_SCALE", "long"}}).output, HasSubstr("found \"long\""));
}

TEST_F(DistributedTestTest, WhatRanksLeaveBehindIsEnded) {
  const ChildResult result = run("Leftovers.*");
  EXPECT_EQ(result.exit_code, 0) << result.output;
}

TEST_F(DistributedTestTest, NothingSurvivesAKilledParent) {
  for (int signal : {SIGKILL, SIGTERM, SIGINT}) {
    const TestFolder temp;  // for the shared folder, which only a living parent removes
    AliveFifo alive;
    ChildProcess child({RESHARD_HARNESS_CASES, "--gtest_filter=Resisting.*"},
                       {{"HARNESS_ALIVE_FIFO", alive.path()}, {"TMPDIR", temp.path().string()}});
    alive.wait_for_lines(5);  // three ranks, a child with a session of its own, a stopped child
    child.kill(signal);
    EXPECT_EQ(child.wait().signal, signal);
    alive.wait_until_nobody_is_left();
  }
}

TEST_F(DistributedTestTest, ExpectedDeathsAreNoFailures) {
  const ChildResult result = run("Expected.DeathsAreNoFailures");
  EXPECT_EQ(result.exit_code, 0) << result.output;
  const ChildResult other = run("Expected.DeathThatDoesNotHappen");
  EXPECT_EQ(other.exit_code, 1);
  EXPECT_THAT(other.output, ContainsRegex("rank 1\\] at .*exited with code 0 .*expected: killed by SIGKILL"));
}

TEST_F(DistributedTestTest, ASkipInARankSkipsTheCase) {
  const ChildResult result = run("Skipping.*");
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_THAT(result.output, HasSubstr("[rank 1] not on rank 1"));
  EXPECT_THAT(result.output, HasSubstr("[  SKIPPED ] Skipping.InARank"));
}

TEST_F(DistributedTestTest, TooFewGpusSkipBeforeAnyRankStarts) {
  const ChildResult none = run("OnDevices.*Cuda*:FourOfADevice.*", {{"RESHARD_TEST_GPU_COUNT", "0"}});
  EXPECT_EQ(none.exit_code, 0);
  EXPECT_THAT(none.output, HasSubstr("needs 2 GPUs, found 0\n[  SKIPPED ] OnDevices.OneBody/CudaRanks2"));
  EXPECT_THAT(none.output, HasSubstr("needs 4 GPUs, found 0\n[  SKIPPED ] OnDevices.OneBody/CudaRanks4"));
  EXPECT_THAT(none.output, HasSubstr("needs 1 GPU, found 0\n[  SKIPPED ] FourOfADevice.Share"));
  EXPECT_THAT(none.output, Not(HasSubstr("[rank")));
  const ChildResult one = run("OnDevices.*", {{"RESHARD_TEST_GPU_COUNT", "1"}});
  EXPECT_THAT(one.output, HasSubstr("needs 2 GPUs, found 1\n[  SKIPPED ] OnDevices.OneBody/CudaRanks2"));
  EXPECT_THAT(one.output, HasSubstr("[       OK ] OnDevices.OneBody/OneGpuRanks2"));
  EXPECT_THAT(one.output, HasSubstr("[       OK ] OnDevices.OneBody/CpuRanks4"));
}

TEST_F(DistributedTestTest, EachVariantHasItsBackend) {
  const ChildResult result = run("OnDevices.*", {{"RESHARD_TEST_GPU_COUNT", "4"}});
  size_t from = 0;
  for (const char* text : {"cpu:gloo on", "CpuRanks2 (", "cpu:gloo on", "CpuRanks4 (", "cpu:gloo,cuda:nccl",
                           "CudaRanks2 (", "cpu:gloo,cuda:nccl", "CudaRanks4 (", "cpu:gloo,cuda:nccl", "OneGpuRanks1 (",
                           "cpu:gloo,cuda:gloo", "OneGpuRanks2 ("}) {
    from = result.output.find(text, from);
    ASSERT_NE(from, std::string::npos) << text << "\n" << result.output;
  }
}

TEST_F(DistributedTestTest, RunsUnderAnotherLauncher) {
  // As with torchrun: RANK is set from outside, GoogleTest speaks for itself in every rank.
  const TestFolder temp;  // for their shared folders, which stay
  const auto run_launched = [&](const std::string& filter, int ranks) {
    LaunchOptions options = {.argv = {RESHARD_HARNESS_CASES, "--gtest_filter=" + filter}, .ranks = ranks};
    options.environment["TMPDIR"] = temp.path().string();
    options.deadline = kChildDeadline;
    options.on_line = [](const OutputLine&) {};
    return launch(options);
  };
  const LaunchResult passing = run_launched("Passing.*", 3);
  EXPECT_TRUE(passing.success());
  EXPECT_THAT(passing.ranks[2].output, HasSubstr("[       OK ] Passing.KnowsItsPlace"));
  const LaunchResult failing = run_launched("Failing.Expectation", 3);
  EXPECT_EQ(failing.ranks[0].exit_code, 0);
  EXPECT_EQ(failing.ranks[1].exit_code, 1);
  EXPECT_THAT(failing.ranks[1].output, HasSubstr("so says rank 1"));
  const LaunchResult other_size = run_launched("Passing.*", 2);
  EXPECT_TRUE(other_size.success());
  EXPECT_THAT(other_size.ranks[1].output, HasSubstr("needs 3 ranks, started with 2\n"));
}

// --- ctest: what the CMake module makes of the cases ----------------------------------------------------------------

class CtestTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::ofstream(folder_.path() / "CTestTestfile.cmake")
        << "include(\"" RESHARD_DISTRIBUTED_TEST_MODULE "\")\n"
        << "_reshard_add_cases(cases \"" RESHARD_HARNESS_CASES "\" \"\" \"label\" \"" << resources() << "\" \""
        << folder_.path().string() << "\")\n";
  }
  std::string resources() const { return folder_.path() / "resources.json"; }

  /// Writes the resource file for a made-up number of GPUs; returns what the script printed.
  std::string write_resources(const std::string& gpus) {
    ChildProcess child({RESHARD_WRITE_RESOURCE_FILE, resources()}, {{"RESHARD_TEST_GPU_COUNT", gpus}});
    return child.wait().output;
  }

  ChildResult ctest(std::vector<std::string> arguments, const std::map<std::string, std::string>& environment = {}) {
    arguments.insert(arguments.begin(), {RESHARD_CTEST, "--test-dir", folder_.path()});
    ChildProcess child(arguments, environment);
    return child.wait();
  }
  /// Runs the cases on devices with a resource file for `gpus` GPUs on a machine that has them.
  ChildResult run_on(const std::string& gpus) {
    EXPECT_EQ(write_resources(gpus), gpus + "\n");
    return ctest({"-V", "-j2", "-R", "OnDevices", "--resource-spec-file", resources()},
                 {{"RESHARD_TEST_GPU_COUNT", gpus}});
  }

  TestFolder folder_;
};

TEST_F(CtestTest, LabelsFollowFromNeeds) {
  const std::map<std::string, std::vector<std::string>> cases_of = {
      {"cpu", {"OnDevices.OneBody/CpuRanks2", "Passing.KnowsItsPlace"}},
      {"gpu1", {"OnDevices.OneBody/OneGpuRanks2", "FourOfADevice.Share"}},
      {"gpu2", {"OnDevices.OneBody/CudaRanks2"}},
      {"gpu4", {"OnDevices.OneBody/CudaRanks4"}},
      {"ranks2", {"OnDevices.OneBody/CudaRanks2", "OnDevices.OneBody/CpuRanks2", "OnDevices.OneBody/OneGpuRanks2"}},
      {"ranks4", {"FourOfADevice.Share", "OnDevices.OneBody/CpuRanks4"}},
      {"label", {"OrdinaryTest.RunsInTheParent", "FourOfADevice.Share"}},
  };
  for (const auto& [label, cases] : cases_of) {
    const std::string listed = ctest({"-N", "-L", "^" + label + "$"}).output;
    for (const std::string& name : cases) EXPECT_THAT(listed, HasSubstr(": " + name + "\n")) << label;
    EXPECT_EQ(label == "label", listed.find("OrdinaryTest") != std::string::npos) << label;
  }
  EXPECT_THAT(ctest({"-N", "-L", "^gpu1$"}).output, Not(HasSubstr("CudaRanks")));
}

TEST_F(CtestTest, WithoutGpusCasesSkip) {
  const ChildResult result = run_on("0");
  EXPECT_EQ(result.exit_code, 0) << result.output;
  EXPECT_THAT(result.output, Not(HasSubstr("Not Run")));
  EXPECT_THAT(result.output, HasSubstr("needs 1 GPU, found 0"));
  EXPECT_THAT(result.output, HasSubstr("needs 4 GPUs, found 0"));
  EXPECT_THAT(result.output, ContainsRegex("CudaRanks2 .*\\*\\*\\*Skipped"));
  EXPECT_THAT(result.output, ContainsRegex("CpuRanks4 .* Passed"));
}

TEST_F(CtestTest, WithOneGpuCasesForOneRunOnIt) {
  const ChildResult result = run_on("1");
  EXPECT_EQ(result.exit_code, 0) << result.output;
  EXPECT_THAT(result.output, Not(HasSubstr("Not Run")));
  EXPECT_THAT(result.output, HasSubstr("cpu:gloo,cuda:gloo on GPUs 0\n"));
  EXPECT_THAT(result.output, HasSubstr("needs 2 GPUs, found 1"));
  EXPECT_THAT(result.output, ContainsRegex("OneGpuRanks2 .* Passed"));
  EXPECT_THAT(result.output, ContainsRegex("CudaRanks4 .*\\*\\*\\*Skipped"));
}

TEST_F(CtestTest, WithEnoughGpusEachCaseGetsItsOwn) {
  const ChildResult result = run_on("4");
  EXPECT_EQ(result.exit_code, 0) << result.output;
  EXPECT_THAT(result.output, Not(HasSubstr("Skipped")));
  EXPECT_THAT(result.output, ContainsRegex("cpu:gloo,cuda:nccl on GPUs [0-3],[0-3]\n"));
  EXPECT_THAT(result.output, ContainsRegex("cpu:gloo,cuda:nccl on GPUs [0-3],[0-3],[0-3],[0-3]\n"));
  EXPECT_THAT(result.output, HasSubstr("cpu:gloo on GPUs unset\n"));
}

TEST_F(CtestTest, AMadeUpFileOnAMachineWithoutGpusSkips) {
  write_resources("4");
  const ChildResult result =
      ctest({"-V", "-R", "CudaRanks2", "--resource-spec-file", resources()}, {{"RESHARD_TEST_GPU_COUNT", "0"}});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_THAT(result.output, HasSubstr("needs 2 GPUs, found 0"));
}

TEST_F(CtestTest, IdsCountTheVisibleGpus) {
  write_resources("2");
  const ChildResult result = ctest({"-V", "-R", "CudaRanks2", "--resource-spec-file", resources()},
                                   {{"RESHARD_TEST_GPU_COUNT", "2"}, {"CUDA_VISIBLE_DEVICES", "5,7"}});
  EXPECT_THAT(result.output, ContainsRegex("on GPUs (5,7|7,5)\n"));
}

TEST_F(CtestTest, TheScriptCountsWhatNvidiaSmiLists) {
  std::filesystem::create_directory(folder_.path() / "bin");
  const std::string program = folder_.path() / "bin/nvidia-smi";
  std::ofstream(program) << "#!/bin/sh\nfor i in 0 1 2; do echo \"GPU $i: Some GPU (UUID: GPU-$i)\"; done\n";
  std::filesystem::permissions(program, std::filesystem::perms::owner_all);
  const std::string path = (folder_.path() / "bin").string() + ":" + std::getenv("PATH");
  ChildProcess all({RESHARD_WRITE_RESOURCE_FILE, resources()}, {{"PATH", path}});
  EXPECT_EQ(all.wait().output, "3\n");
  std::ifstream stream(resources());
  const std::string json((std::istreambuf_iterator<char>(stream)), {});
  EXPECT_EQ(json,
            "{\"version\": {\"major\": 1, \"minor\": 0}, \"local\": [{\"gpus\": [{\"id\": \"0\", \"slots\": 1}, "
            "{\"id\": \"1\", \"slots\": 1}, {\"id\": \"2\", \"slots\": 1}]}]}\n");
  ChildProcess two({RESHARD_WRITE_RESOURCE_FILE, resources()}, {{"PATH", path}, {"CUDA_VISIBLE_DEVICES", "0,2"}});
  EXPECT_EQ(two.wait().output, "2\n");
  EXPECT_EQ(write_resources("x"), "write-resource-file: RESHARD_TEST_GPU_COUNT=\"x\" is not a number\n");
}

}  // namespace
}  // namespace reshard
