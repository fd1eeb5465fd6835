// SPDX-License-Identifier: BSD-3-Clause
// PyTorch's own FSDP trains the same model from the same checkpoint on the same data, and ends where this one does.

#include <torch/csrc/api/include/torch/optim/adamw.h>

#include <filesystem>

#include "fsdp/test_model.h"
#include "reshard/checkpoint/checkpoint.h"
#include "reshard/testing/torch_distributed_test.h"
#include "support/run_python.h"

namespace reshard::fsdp_test {
namespace {

void train_and_let_pytorch_do_the_same(const std::shared_ptr<ProcessGroup>& group,
                                       const std::filesystem::path& directory, const MixedPrecision& mixed,
                                       const std::string& limit_and_dtype) {
  if (!has_python()) GTEST_SKIP() << "no Python with PyTorch at " << RESHARD_PYTHON;
  constexpr int64_t kSteps = 20;
  const DoublePrecision in_double;
  at::manual_seed(71);
  auto model = FullyShardedDataParallel(
      on_meta([] { return LanguageModel(); }),
      {.process_group = group, .wrap_policy = wrap_by_type<BlockImpl>(), .mixed_precision = mixed});
  torch::optim::AdamW optimizer(model.parameters(), torch::optim::AdamWOptions(3e-3));
  std::vector<at::Tensor> batches;
  for (int64_t step = 0; step < kSteps; ++step) batches.push_back(tokens_of_step(step));
  save(StateDict{{"model", model.state_dict(StateDictType::kSharded)}, {"tokens", at::stack(batches)}},
       FileSystemWriter((directory / "start").string()));
  std::vector<at::Tensor> losses;
  for (const at::Tensor& tokens : batches) {
    optimizer.zero_grad();
    at::Tensor loss = model(rows_of_rank(tokens, *group));
    loss.backward();
    optimizer.step();
    at::Tensor mean = loss.detach().to(at::kDouble) / group->size();
    group->all_reduce_sum(mean);
    losses.push_back(mean);
  }
  save(StateDict{{"model", model.state_dict(StateDictType::kSharded)}, {"losses", at::stack(losses)}},
       FileSystemWriter((directory / "end").string()));
  if (group->rank() == 0) {
    const PythonResult result = run_python("pytorch_fsdp.py '" + directory.string() + "' " +
                                           std::to_string(group->size()) + " " + limit_and_dtype);
    EXPECT_EQ(result.exit_code, 0) << result.output;
    std::fputs(result.output.c_str(), stdout);
  }
  group->barrier();
}

RESHARD_DISTRIBUTED_TEST(PyTorchFsdpTest, EndsWhereItsTwoRanksEnd, .ranks = 2, .deadline = std::chrono::seconds(240)) {
  train_and_let_pytorch_do_the_same(process_group(), temp_dir(), {}, "1e-9");
}
RESHARD_DISTRIBUTED_TEST(PyTorchFsdpTest, EndsWhereItsThreeRanksEnd, .ranks = 3,
                         .deadline = std::chrono::seconds(240)) {
  train_and_let_pytorch_do_the_same(process_group(), temp_dir(), {}, "1e-9");
}
RESHARD_DISTRIBUTED_TEST(PyTorchFsdpTest, EndsWhereItsRanksEndWithPassesInFloat32, .ranks = 2,
                         .deadline = std::chrono::seconds(240)) {
  train_and_let_pytorch_do_the_same(process_group(), temp_dir(),
                                    {.param_dtype = at::kFloat, .reduce_dtype = at::kDouble}, "1e-12 float32");
}

}  // namespace
}  // namespace reshard::fsdp_test
