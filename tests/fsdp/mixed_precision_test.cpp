// SPDX-License-Identifier: BSD-3-Clause
// Computing in another dtype than parameters are kept, updated and saved in.

#include <gmock/gmock.h>
#include <torch/csrc/api/include/torch/nn/modules/container/sequential.h>

#include <cmath>

#include "fsdp/test_model.h"
#include "fsdp/training.h"
#include "fsdp/whole_state.h"
#include "reshard/testing/torch_distributed_test.h"

namespace reshard::fsdp_test {
namespace {

struct NetImpl : torch::nn::Module {
  NetImpl() {
    up = register_module("up", torch::nn::Linear(5, 9));
    down = register_module("down", torch::nn::Linear(9, 3));
    scale = register_buffer("scale", at::full({3}, 1.0 / 3));
  }
  at::Tensor forward(const at::Tensor& x) {
    seen = x.scalar_type();
    weight_seen = up->weight.scalar_type();
    return down->forward(at::tanh(up->forward(x))) * scale.to(x.scalar_type());
  }
  torch::nn::Linear up{nullptr}, down{nullptr};
  at::Tensor scale;
  at::ScalarType seen = at::kByte, weight_seen = at::kByte;
};
TORCH_MODULE(Net);

Net new_net() {
  at::manual_seed(17);
  return Net();
}

at::Tensor batch_of_step(int64_t step) {
  at::manual_seed(300 + static_cast<uint64_t>(step));
  return at::randn({4, 5});
}

/// The average of two ranks' gradients as a reduction in `dtype` makes it.
at::Tensor average(at::Tensor a, at::Tensor b, at::ScalarType dtype) {
  a = a.to(dtype);
  b = b.to(dtype);
  return (dtype == at::kHalf ? a / 2 + b / 2 : (a + b) / 2).to(at::kFloat);
}

/// 10 steps with the parameters in float32 and the passes in `mixed`, against one process that keeps float32 parameters and computes the two ranks'
/// gradients with copies in the other dtype.
void train_and_compare_mixed(const std::shared_ptr<ProcessGroup>& group, MixedPrecision mixed, ShardLayout layout,
                             c10::Device device) {
  const at::ScalarType computed = mixed.param_dtype.value_or(at::kFloat);
  const at::ScalarType reduced = mixed.reduce_dtype.value_or(computed);
  // A GPU may add up in another order.
  const double tolerance = device.is_cpu() ? 0 : 1e-2;
  Net reference = new_net();
  reference->to(device);
  mixed.output_dtype = at::kFloat;
  auto model = FullyShardedDataParallel(new_net(), {.process_group = group,
                                                    .wrap_policy = wrap_by_type<torch::nn::LinearImpl>(),
                                                    .device = device,
                                                    .layout = layout,
                                                    .mixed_precision = mixed,
                                                    .poison_freed = true});
  const auto optimizer = make_optimizer(Optimizer::kAdamWLargeEps, model.parameters());
  const auto reference_optimizer = make_optimizer(Optimizer::kAdamWLargeEps, reference->parameters());
  for (int64_t step = 0; step < 10; ++step) {
    const at::Tensor batch = batch_of_step(step).to(device);
    optimizer->zero_grad();
    const at::Tensor out = model(rows_of_rank(batch, *group));
    EXPECT_EQ(out.scalar_type(), at::kFloat);
    EXPECT_EQ(model.module()->seen, computed);
    EXPECT_EQ(model.module()->weight_seen, computed);
    const at::Tensor loss = out.square().mean();
    loss.backward();
    optimizer->step();

    std::vector<at::Tensor> losses;
    std::vector<std::vector<at::Tensor>> gradients;
    for (int64_t rank = 0; rank < 2; ++rank) {
      Net copy = new_net();
      copy->to(device);
      {
        const at::NoGradGuard no_grad;
        for (size_t i = 0; i < 4; ++i) copy->parameters()[i].copy_(reference->parameters()[i]);
      }
      copy->to(computed);
      copy->scale = reference->scale;
      losses.push_back(copy(batch.slice(0, 2 * rank, 2 * rank + 2).to(computed)).to(at::kFloat).square().mean());
      losses.back().backward();
      gradients.emplace_back();
      for (const at::Tensor& parameter : copy->parameters()) gradients.back().push_back(parameter.grad());
    }
    for (size_t i = 0; i < 4; ++i)
      reference->parameters()[i].mutable_grad() = average(gradients[0][i], gradients[1][i], reduced);
    reference_optimizer->step();
    EXPECT_NEAR(loss.item<float>(), losses[static_cast<size_t>(group->rank())].item<float>(), tolerance)
        << "step " << step;
  }
  EXPECT_LE(difference_to(model, *model.module(), *reference), tolerance)
      << computed << ", reduced in " << reduced << ", layout " << static_cast<int>(layout);
}

RESHARD_DEVICE_TEST(MixedPrecisionTest, TrainsLikeCopiesOfMasterWeights, .ranks = {2}, .one_gpu_ranks = {2}) {
  for (const ShardLayout layout : {ShardLayout::kFlat, ShardLayout::kDim0Chunks}) {
    train_and_compare_mixed(process_group(), {.param_dtype = at::kBFloat16, .reduce_dtype = at::kFloat}, layout,
                            device());
    train_and_compare_mixed(process_group(), {.param_dtype = at::kBFloat16}, layout, device());
    train_and_compare_mixed(process_group(), {.param_dtype = at::kHalf}, layout, device());
    train_and_compare_mixed(process_group(), {.reduce_dtype = at::kBFloat16}, layout, device());
  }
}

RESHARD_DISTRIBUTED_TEST(MixedPrecisionTest, HalfPrecisionSumsOverManyRanksDoNotOverflow, .ranks = 4) {
  auto model = FullyShardedDataParallel(
      torch::nn::Linear(torch::nn::LinearOptions(3, 2).bias(false)),
      {.process_group = process_group(), .mixed_precision = {.param_dtype = at::kHalf, .output_dtype = at::kFloat}});
  // Each rank's gradient is 30,000 everywhere; the largest half is 65,504, which their sum is beyond.
  model(at::ones({1, 3})).mul(30000).sum().backward();
  for (const at::Tensor& slice : model.parameters()) {
    EXPECT_EQ(slice.grad().scalar_type(), at::kFloat);
    EXPECT_TRUE(at::equal(slice.grad(), at::full_like(slice.grad(), 30000))) << slice.grad();
  }
}

RESHARD_DISTRIBUTED_TEST(MixedPrecisionTest, AddsUpAndClipsInTheReducedAndInItsOwnDtype, .ranks = 2) {
  auto model = FullyShardedDataParallel(
      new_net(), {.process_group = process_group(),
                  .mixed_precision = {.param_dtype = at::kBFloat16, .reduce_dtype = at::kFloat}});
  const auto gradient = [&](const at::Tensor& x) {
    model.zero_grad();
    model(x).sum().backward();
    std::vector<at::Tensor> result;
    for (const at::Tensor& slice : model.parameters()) result.push_back(slice.grad().clone());
    return result;
  };
  const at::Tensor x = batch_of_step(0), y = batch_of_step(1);
  const auto of_x = gradient(x), of_y = gradient(y);
  model.zero_grad();
  {
    const NoSync no_sync = model.no_sync();
    model(x).sum().backward();
  }
  EXPECT_EQ(model.memory_stats().peak_gradient_bytes, (9 * 5 + 9 + 3 * 9 + 3) * sizeof(float));
  model(y).sum().backward();
  double squares = 0;
  for (size_t i = 0; i < of_x.size(); ++i) {
    const at::Tensor& grad = model.parameters()[i].grad();
    EXPECT_TRUE(at::equal(grad, of_x[i] + of_y[i])) << i;
    squares += grad.square().sum().item<double>();
  }
  at::Tensor total = at::scalar_tensor(squares, at::kDouble);
  process_group()->all_reduce_sum(total);
  EXPECT_NEAR(model.clip_grad_norm(1e9), std::sqrt(total.item<double>()), 1e-4);
}

RESHARD_DISTRIBUTED_TEST(MixedPrecisionTest, SendsHalfAndKeepsAll, .ranks = 2) {
  const auto traffic = [&](const MixedPrecision& mixed) {
    auto model = FullyShardedDataParallel(new_net(), {.process_group = process_group(), .mixed_precision = mixed});
    const at::NoGradGuard no_grad;
    const uint64_t before = process_group()->traffic().bytes;
    model(batch_of_step(0));
    EXPECT_EQ(model.memory_stats().unsharded_bytes, 0U);
    return std::pair(process_group()->traffic().bytes - before, model.memory_stats().peak_unsharded_bytes);
  };
  const auto [bytes, peak] = traffic({});
  const auto [mixed_bytes, mixed_peak] = traffic({.param_dtype = at::kBFloat16});
  EXPECT_EQ(2 * mixed_bytes, bytes);
  EXPECT_EQ(mixed_peak, peak) << "building takes the parameters as they come";

  const Net reference = new_net();
  auto model = FullyShardedDataParallel(
      new_net(), {.process_group = process_group(), .mixed_precision = {.param_dtype = at::kBFloat16}});
  EXPECT_EQ(model.module()->up->weight.scalar_type(), at::kBFloat16);
  for (const at::Tensor& slice : model.parameters()) EXPECT_EQ(slice.scalar_type(), at::kFloat);
  const StateDict full = model.state_dict(StateDictType::kFull);
  const StateDict whole = whole_state(model.state_dict(StateDictType::kSharded), *process_group());
  for (const auto& item : reference->named_parameters()) {
    EXPECT_TRUE(at::equal(full.at(item.key()).as<at::Tensor>(), item.value())) << item.key();
    EXPECT_TRUE(at::equal(whole.at(item.key()).as<at::Tensor>(), item.value())) << item.key();
  }
  // Summoned they are what is kept, and what is written back leaves the others as they were, to the last bit.
  {
    const at::NoGradGuard no_grad;
    const SummonFullParams summoned(model, {.writeback = true});
    EXPECT_EQ(model.module()->up->weight.scalar_type(), at::kFloat);
    EXPECT_TRUE(at::equal(model.module()->up->weight, reference->up->weight));
    model.module()->up->weight[0][0] = 0.1F;
    reference->up->weight[0][0] = 0.1F;
  }
  EXPECT_EQ(model.module()->up->weight.scalar_type(), at::kBFloat16);
  EXPECT_EQ(model.memory_stats().unsharded_bytes, 0U);
  EXPECT_EQ(difference_to(model, *model.module(), *reference), 0.0);
  model(batch_of_step(0)).sum().backward();
  for (const at::Tensor& slice : model.parameters()) EXPECT_TRUE(slice.grad().defined());

  // Integers and complex numbers are not computed in bfloat16.
  struct OtherImpl : torch::nn::Module {
    OtherImpl() {
      register_parameter("count", at::arange(6), /*requires_grad=*/false);
      register_parameter("phase", at::zeros({4}, at::kComplexFloat));
    }
  };
  const auto other = std::make_shared<OtherImpl>();
  const ShardedModule wrapped(other, nullptr,
                              {.process_group = process_group(), .mixed_precision = {.param_dtype = at::kBFloat16}});
  EXPECT_EQ(other->named_parameters()["count"].scalar_type(), at::kLong);
  EXPECT_EQ(other->named_parameters()["phase"].scalar_type(), at::kComplexFloat);
}

RESHARD_DISTRIBUTED_TEST(MixedPrecisionTest, RefusesWhatCannotBe, .ranks = 2) {
  for (const at::ScalarType dtype : {at::kLong, at::kBool, at::kComplexFloat}) {
    expect_error(ErrorCode::kInvalidArgument, {"floating-point", c10::toString(dtype)}, [&] {
      FullyShardedDataParallel(new_net(),
                               {.process_group = process_group(), .mixed_precision = {.param_dtype = dtype}});
    });
  }
  expect_error(ErrorCode::kInvalidArgument, {"mixed precision differ"}, [&] {
    FullyShardedDataParallel(new_net(), {.process_group = process_group(),
                                         .mixed_precision = {.param_dtype = rank() == 0 ? at::kBFloat16 : at::kHalf}});
  });
  // Without the cast the input meets weights of another dtype, which LibTorch names.
  auto model = FullyShardedDataParallel(
      new_net(), {.process_group = process_group(),
                  .mixed_precision = {.param_dtype = at::kBFloat16, .cast_forward_inputs = false}});
  EXPECT_ANY_THROW(model(batch_of_step(0)));
  EXPECT_EQ(model(batch_of_step(0).to(at::kBFloat16)).scalar_type(), at::kBFloat16);
}

}  // namespace
}  // namespace reshard::fsdp_test
