// SPDX-License-Identifier: BSD-3-Clause
// The training example and the main job as a user starts them.
#include <ATen/ops/cat.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "reshard/launch/launcher.h"
#include "support/temporary_directory.h"
#include "train_lm/text.h"

namespace reshard {
namespace {

using testing::HasSubstr;

/// Runs a program that is no rank of anything and returns its exit code and output.
std::pair<int, std::string> run(std::vector<std::string> argv) {
  LaunchOptions options;
  options.argv = std::move(argv);
  options.deadline = std::chrono::minutes(4);
  for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                           "RESHARD_MASTER_LISTEN_FD"}) {
    options.environment[name] = std::nullopt;
  }
  const RankResult result = launch(options).ranks.at(0);
  return {result.exit_code.value_or(-1), result.output};
}

std::string program(const char* name) { return std::string(RESHARD_BIN) + "/" + name; }

/// {step: loss}; every line must be exactly {"step": n, "loss": x}.
std::map<int, double> losses(const std::string& log) {
  std::map<int, double> result;
  std::ifstream in(log);
  for (std::string line; std::getline(in, line);) {
    const auto entry = nlohmann::json::parse(line);
    EXPECT_EQ(entry.size(), 2u) << line;
    result[entry.at("step").get<int>()] = entry.at("loss").get<double>();
  }
  return result;
}

std::vector<int> steps_of(const std::map<int, double>& curve) {
  std::vector<int> steps;
  for (const auto& [step, loss] : curve) steps.push_back(step);
  return steps;
}

class TrainLmTest : public testing::Test {
 protected:
  std::vector<std::string> train_lm(std::vector<std::string> start, std::vector<std::string> arguments) const {
    start.insert(start.end(), {program("train_lm"), "--checkpoint", directory_ / "ckpt", "--device", "cpu", "--text",
                               RESHARD_README, "--seed", "3"});
    start.insert(start.end(), arguments.begin(), arguments.end());
    return start;
  }
  TemporaryDirectory directory_;
};

TEST_F(TrainLmTest, GoesOnUnderEveryLauncherAsItWouldAlone) {
  const auto [code, output] = run(train_lm({}, {"--steps", "5", "--save-every", "3", "--log", directory_ / "alone"}));
  ASSERT_EQ(code, 0) << output;
  const auto alone = losses(directory_ / "alone");
  EXPECT_EQ(steps_of(alone), (std::vector<int>{1, 2, 3, 4, 5}));
  EXPECT_TRUE(std::filesystem::exists(directory_ / "ckpt/step-3/.metadata"));
  EXPECT_FALSE(std::filesystem::exists(directory_ / "ckpt/step-5"));

  std::vector<std::pair<std::string, std::vector<std::string>>> launchers{
      {"reshard launch", {program("reshard"), "launch", "-n", "2", "--"}}};
  if (std::filesystem::exists(RESHARD_TORCHRUN)) {
    // Without the --, torchrun takes --log for a short form of options of its own.
    launchers.push_back({"torchrun", {RESHARD_TORCHRUN, "--standalone", "--no-python", "--nproc-per-node", "3", "--"}});
  }
  for (const auto& [name, start] : launchers) {
    SCOPED_TRACE(name);
    const std::string log = directory_ / name;
    const auto [resumed_code, resumed_output] = run(train_lm(start, {"--steps", "5", "--resume", "--log", log}));
    ASSERT_EQ(resumed_code, 0) << resumed_output;
    EXPECT_THAT(resumed_output, HasSubstr("resumed from step 3"));
    const auto curve = losses(log);
    EXPECT_EQ(steps_of(curve), (std::vector<int>{4, 5}));
    for (const auto& [step, loss] : curve) EXPECT_NEAR(loss, alone.at(step), 1e-4) << step;
  }
}

TEST_F(TrainLmTest, KeepsTheLastSteps) {
  std::filesystem::create_directories(directory_ / "ckpt/step-9");  // a save that never wrote anything
  const auto [code, output] = run(train_lm({program("reshard"), "launch", "-n", "2", "--"},
                                           {"--steps", "3", "--save-every", "1", "--keep-last", "2"}));
  ASSERT_EQ(code, 0) << output;
  EXPECT_FALSE(std::filesystem::exists(directory_ / "ckpt/step-1"));
  EXPECT_TRUE(std::filesystem::exists(directory_ / "ckpt/step-2/.metadata"));
  EXPECT_TRUE(std::filesystem::exists(directory_ / "ckpt/step-3/.metadata"));
  EXPECT_FALSE(std::filesystem::exists(directory_ / "ckpt/step-9"));
}

TEST_F(TrainLmTest, SaysWhatIsWrong) {
  auto [code, output] = run(train_lm({}, {"--steps", "1", "--resume"}));
  EXPECT_EQ(code, 1);
  EXPECT_THAT(output, HasSubstr("no committed checkpoint to resume from"));
  std::tie(code, output) =
      run(train_lm({program("reshard"), "launch", "-n", "2", "--"}, {"--steps", "1", "--batch", "3"}));
  EXPECT_NE(code, 0);
  EXPECT_THAT(output, HasSubstr("the global batch must divide by the number of ranks"));
  std::tie(code, output) = run(train_lm({}, {"--steps", "1", "--text", directory_ / "nothing"}));
  EXPECT_EQ(code, 1);
  EXPECT_THAT(output, HasSubstr("cannot read a text"));
}

TEST(TrainLmDataTest, OrderIsAFunctionOfSeedStepAndGlobalBatchOnly) {
  const std::string text = read_text({RESHARD_README});
  const auto batch = [&](uint64_t seed, int64_t step, int ranks) {
    std::vector<at::Tensor> shares;
    const int64_t share = 12 / ranks;
    for (int r = 0; r < ranks; ++r) shares.push_back(batch_of(text, seed, step, r * share, (r + 1) * share, 16));
    return at::cat(shares);
  };
  const at::Tensor whole = batch(1, 5, 1);
  for (const int ranks : {2, 3, 4}) EXPECT_TRUE(whole.equal(batch(1, 5, ranks)));
  EXPECT_FALSE(whole.equal(batch(2, 5, 1)));
  EXPECT_FALSE(whole.equal(batch(1, 6, 1)));
}

TEST(MainJobTest, ARowThatFailsFailsTheJob) {
  const TemporaryDirectory work;
  // A judge that finds everything wrong: its rows fail, the others do not, and all are run.
  const auto [code, output] =
      run({program("reshard_main_job"), "--quiet", "--only", "seed", "--work", work.path(), "--python", "/bin/false"});
  EXPECT_EQ(code, 1) << output;
  EXPECT_THAT(output, HasSubstr("9 rows, 6 failed"));
  EXPECT_THAT(output, HasSubstr("equal bit for bit"));
  EXPECT_THAT(output, HasSubstr("FAILED"));
}

}  // namespace
}  // namespace reshard
