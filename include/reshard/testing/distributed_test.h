// SPDX-License-Identifier: BSD-3-Clause
#pragma once
// GoogleTest cases that run on several processes.
//
//   RESHARD_DISTRIBUTED_TEST(AllReduce, SumsOverRanks, .ranks = 2) {
//     EXPECT_EQ(world_size(), 2);          // this body runs once in each of two processes
//   }
//
// is an ordinary case, AllReduce.SumsOverRanks: ctest, --gtest_filter, --gtest_repeat and a debugger treat it as one.
// What happens:
//
//   1. The test program is started as always. In it, the case does not run the body: it starts its own binary
//      (/proc/self/exe) once a rank, with --gtest_filter set to this case and with the environment that torchrun sets
//      (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, ...; launch/environment.h). The port is bound before
//      anyone is told of it, so none is taken twice.
//   2. In a rank (RANK is set) the case runs set_up_rank(), the body and tear_down_rank().
//   3. The parent waits. The case passes when every rank ran its body to the end and no assertion failed on any.
//
// Failures. Every failed assertion of every rank is a failure of the case, at its own file and line, with rank and
// time; the first cause comes first, a death before what its peers make of it. Further failures, named by rank: an
// exception; a death by signal; an exit() before the end of the body, whatever its code; a non-zero exit code after it.
// One rank's failure ends the others one second later. At the deadline, ranks still running print their stacks and are
// ended. Nothing that a rank started survives the case, nor does it survive the test program, even when that is killed.
// GTEST_SKIP in the ranks skips the case.
//
// Under torchrun (or any launcher that sets RANK) there is no parent: the body simply runs, and a case made for another
// number of ranks skips:
//   torchrun --no-python --nproc-per-node 2 ./all_reduce_test --gtest_filter='AllReduce.*'
//
// Environment of the test program:
//   RESHARD_TEST_DEADLINE_SCALE   multiplies every deadline; 0 switches deadlines off (to attach a debugger to a rank)
//   RESHARD_TEST_GPU_COUNT        pretends this number of GPUs, to see what is skipped
//   CTEST_RESOURCE_GROUP_*        GPUs that ctest handed out; become CUDA_VISIBLE_DEVICES of the ranks
//
// The parent loads and initialises what the program does before main, nothing else: it makes no CUDA context and no
// process group. Needs no LibTorch; testing/torch_distributed_test.h adds process groups and devices. CMake:
// reshard::testing and reshard_discover_distributed_tests (cmake/ReshardDistributedTest.cmake) for labels and GPU
// scheduling.

#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace reshard {

/// How a rank ends, for cases that are about ranks that do not live to the end.
struct RankEnd {
  int exit_code = 0;
  int signal = 0;  // not 0: killed by it
  bool operator==(const RankEnd&) const = default;
};
inline RankEnd exits(int code) { return {.exit_code = code}; }
inline RankEnd killed_by(int signal) { return {.signal = signal}; }

/// What a case needs and expects.
struct DistributedTestOptions {
  /// Processes, all on this host.
  int ranks = 2;
  /// GPUs without which the case is skipped ("needs 2 GPUs, found 1"), decided before any rank starts. 0: a CPU case.
  /// Fewer than `ranks`: the ranks share them.
  int gpus = 0;
  /// Of the whole case, from the start of the first rank.
  std::chrono::milliseconds deadline = std::chrono::seconds(60);
  /// Ranks that must not run their body to the end: `.expected = {{1, killed_by(SIGKILL)}}`. Such an end does not end
  /// the others, and any other end of that rank is a failure. Their failed assertions still count.
  std::map<int, RankEnd> expected = {};
};

/// One body for several devices and numbers of ranks; see RESHARD_DEVICE_TEST.
struct DeviceTestOptions {
  std::vector<int> ranks = {2};
  /// Further variants that need a single GPU: 1 rank on it with NCCL, or several that share it, with gloo.
  std::vector<int> one_gpu_ranks = {};
  std::chrono::milliseconds deadline = std::chrono::seconds(60);
};

namespace testing_detail {
struct Case {
  std::string suite;
  std::string name;
  const char* file;
  int line;
  DistributedTestOptions options;
};
struct Access;
}  // namespace testing_detail

/// The fixture of every distributed case. Derive from it for set-up that belongs in the ranks; the constructor and
/// SetUpTestSuite run in the parent too.
class DistributedTest : public ::testing::Test {
 public:
  // In a rank:
  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  int local_rank() const { return local_rank_; }
  const DistributedTestOptions& options() const { return case_->options; }
  bool uses_gpu() const { return options().gpus > 0; }
  /// The process group's backend for this case: "cpu:gloo", "cpu:gloo,cuda:nccl", or "cpu:gloo,cuda:gloo" where ranks
  /// share a GPU.
  std::string backend() const;
  /// A folder that all ranks of this run of the case share, empty at first. The parent removes it afterwards; under
  /// torchrun, or when the parent is killed, it stays (in TMPDIR).
  const std::filesystem::path& temp_dir() const { return temp_dir_; }

 protected:
  /// Run in each rank before and after the body; after it also when the body failed.
  virtual void set_up_rank() {}
  virtual void tear_down_rank() {}
  /// The body.
  virtual void run_rank() = 0;

 private:
  friend struct testing_detail::Access;
  void SetUp() final;
  void TestBody() final;
  void TearDown() final;
  void run_parent();

  std::shared_ptr<const testing_detail::Case> case_;
  bool in_rank_ = false;
  int rank_ = 0;
  int world_size_ = 1;
  int local_rank_ = 0;
  std::filesystem::path temp_dir_;
};

namespace testing_detail {
/// "2 ranks on cpu within 60 s": GoogleTest's value parameter of the case, from which the CMake module derives labels.
std::string describe(const DistributedTestOptions& options);
std::vector<std::pair<std::string, DistributedTestOptions>> variants(const DeviceTestOptions& options);
/// Whether this process is a rank of one case that a parent started, rather than one of torchrun's.
bool has_parent();
/// Makes a rank ready to report to its parent. Called by every registration; does its work once, and nothing in a
/// parent.
void prepare_rank_process();
/// Takes the base's stack printer off the fatal signals, for one that does it better.
void remove_stack_printer();

struct Access {
  template <class Test>
  static Test* make(std::shared_ptr<const Case> described) {
    auto test = std::make_unique<Test>();
    static_cast<DistributedTest&>(*test).case_ = std::move(described);
    return test.release();
  }
};

template <class Fixture, class Test>
bool add(Case described, DistributedTestOptions options) {
  static_assert(std::is_base_of_v<DistributedTest, Fixture>, "the fixture must derive from reshard::DistributedTest");
  prepare_rank_process();
  described.options = std::move(options);
  const auto shared = std::make_shared<const Case>(std::move(described));
  ::testing::RegisterTest(shared->suite.c_str(), shared->name.c_str(), nullptr, describe(shared->options).c_str(),
                          shared->file, shared->line, [shared]() -> Fixture* { return Access::make<Test>(shared); });
  return true;
}

template <class Fixture, class Test>
bool add_variants(const Case& base, const DeviceTestOptions& options) {
  for (auto& [variant, variant_options] : variants(options)) {
    add<Fixture, Test>({base.suite, base.name + "/" + variant, base.file, base.line, {}}, variant_options);
  }
  return true;
}
}  // namespace testing_detail

}  // namespace reshard

/// RESHARD_DISTRIBUTED_TEST(Suite, Name, .ranks = 2, ...) { body }: one case, options as in DistributedTestOptions.
#define RESHARD_DISTRIBUTED_TEST(suite, name, ...) \
  RESHARD_DISTRIBUTED_TEST_F(RESHARD_DISTRIBUTED_FIXTURE, suite, name, __VA_ARGS__)
/// The same with a fixture of your own. All cases of a suite must have the same one.
#define RESHARD_DISTRIBUTED_TEST_F(fixture, suite, name, ...) \
  RESHARD_DISTRIBUTED_TEST_IMPL_(fixture, suite, name, add, ::reshard::DistributedTestOptions, __VA_ARGS__)

/// RESHARD_DEVICE_TEST(Suite, Name, .ranks = {2, 4}, .one_gpu_ranks = {1, 2}) { body }: one body registered for each
/// device and number of ranks, as Suite.Name/CpuRanks2, /CpuRanks4, /CudaRanks2, /CudaRanks4 (as many GPUs as ranks,
/// NCCL), /OneGpuRanks1, /OneGpuRanks2. The body asks uses_gpu(), backend(), world_size().
#define RESHARD_DEVICE_TEST(suite, name, ...) \
  RESHARD_DEVICE_TEST_F(RESHARD_DISTRIBUTED_FIXTURE, suite, name, __VA_ARGS__)
#define RESHARD_DEVICE_TEST_F(fixture, suite, name, ...) \
  RESHARD_DISTRIBUTED_TEST_IMPL_(fixture, suite, name, add_variants, ::reshard::DeviceTestOptions, __VA_ARGS__)

/// The fixture of the macros that name none; testing/torch_distributed_test.h puts its own here.
#define RESHARD_DISTRIBUTED_FIXTURE ::reshard::DistributedTest

#define RESHARD_DISTRIBUTED_TEST_IMPL_(fixture, suite, name, registrar, options_type, ...) \
  class suite##_##name##_DistributedTest : public fixture {                                \
    void run_rank() override;                                                              \
  };                                                                                       \
  [[maybe_unused]] static const bool suite##_##name##_registered =                         \
      ::reshard::testing_detail::registrar<fixture, suite##_##name##_DistributedTest>(     \
          {#suite, #name, __FILE__, __LINE__, {}}, options_type{__VA_ARGS__});             \
  void suite##_##name##_DistributedTest::run_rank()
