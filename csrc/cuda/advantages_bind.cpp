// group_advantages, process_advantages and whiten for CUDA tensors, on torch's stable ABI. Kernels are in groups.cu and
// whiten.cu.
#include <array>
#include <tuple>

#include "cuda/advantages.h"
#include "cuda/bind.h"

namespace rl4llm {
namespace {

Dtype float_dtype(const Tensor& tensor, const char* name) {
  const Dtype dtype = dtype_of(tensor, name);
  if (dtype == Dtype::fp64) fail(name, ": wanted float32, bfloat16 or float16 on CUDA, got float64");
  return dtype;
}

// (ids in order, where each was): stably, so that equal ones keep theirs.
std::tuple<Tensor, Tensor> sorted(const Tensor& ids) {
  std::array<StableIValue, 4> stack = {torch::stable::detail::from(ids),
                                       torch::stable::detail::from(std::optional<bool>(true)),
                                       torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Groups, and the tensors that they point into.
struct SortedGroups {
  Groups groups;
  std::optional<Tensor> ids, order;

  SortedGroups(const Tensor& rewards, const char* name, const std::optional<Tensor>& group_ids, int64_t group_size,
               const Tensor& eps) {
    if (!rewards.is_contiguous()) fail(name, ": wanted contiguous rewards, got ", shape_of(rewards));
    groups = {rewards.data_ptr(), float_dtype(rewards, name), nullptr, nullptr, rewards.size(0),
              group_size,         number_of(eps, "eps", -1)};
    if (!group_ids) {
      if (group_size < 1 || groups.B % group_size != 0) {
        fail("group_size: wanted a divisor of the ", groups.B, " answers, got ", group_size);
      }
      return;
    }
    data_of<int64_t>(*group_ids, "group_ids", groups.B);
    if (groups.B == 0) return;
    std::tie(ids, order) = sorted(*group_ids);
    groups.ids_ptr = data_of<int64_t>(*ids, "group_ids", groups.B);
    groups.order_ptr = data_of<int64_t>(*order, "group_ids", groups.B);
  }
};

WhitenTensors whiten_tensors(const char* op, const Tensor& x, const std::optional<Tensor>& minus,
                             const std::optional<Tensor>& mask) {
  if (!x.is_contiguous()) fail("x: wanted contiguous elements, got ", shape_of(x));
  check_minus(x, minus);
  const WhitenTensors tensors = {x.data_ptr(), minus ? minus->data_ptr() : nullptr, float_dtype(x, "x"),
                                 data_of<bool>(mask, "mask", x.numel()), x.numel()};
  check_programs(op, whiten_parts(tensors.N));
  return tensors;
}

Tensor stats_of(const char* op, const Tensor& x, const std::optional<Tensor>& mask,
                const std::optional<Tensor>& minus = std::nullopt) {
  const WhitenTensors tensors = whiten_tensors(op, x, minus, mask);
  const Tensor partial = empty_like_of(x, {3 * whiten_parts(tensors.N)}, ScalarType::Double);
  const Tensor stats = empty_like_of(x, {3}, ScalarType::Double);
  check_launch(op, whiten_stats(tensors, static_cast<double*>(partial.data_ptr()),
                                static_cast<double*>(stats.data_ptr()), current_stream(x)));
  return stats;
}

Tensor whiten_stats_op(Tensor x, std::optional<Tensor> mask, std::optional<Tensor> minus) {
  const DeviceGuard guard(x.get_device_index());
  return stats_of("whiten_stats", x, mask, minus);
}

Tensor whiten_apply_op(Tensor x, std::optional<Tensor> mask, Tensor stats, Tensor eps, bool shift_mean) {
  const DeviceGuard guard(x.get_device_index());
  const WhitenTensors tensors = whiten_tensors("whiten_apply", x, std::nullopt, mask);
  const Tensor out = empty_like_of(x, x.sizes(), ScalarType::Float);
  check_launch("whiten_apply", whiten_apply(tensors, data_of<double>(stats, "stats", 3), number_of(eps, "eps", -1),
                                            shift_mean, static_cast<float*>(out.data_ptr()), current_stream(x)));
  return out;
}

Tensor group_advantages_op(Tensor rewards, std::optional<Tensor> group_ids, int64_t group_size, std::string scale,
                           std::string baseline, bool unbiased, Tensor eps) {
  constexpr const char* kOp = "group_advantages";
  if (rewards.dim() != 1) fail("rewards: wanted (B,), got ", shape_of(rewards));
  if (scale != "group" && scale != "batch" && scale != "none") {
    fail("scale: wanted group, batch or none, got ", scale);
  }
  if (baseline != "mean" && baseline != "leave_one_out") {
    fail("baseline: wanted mean or leave_one_out, got ", baseline);
  }
  const DeviceGuard guard(rewards.get_device_index());
  const SortedGroups sorted_groups(rewards, "rewards", group_ids, group_size, eps);
  check_programs(kOp, group_blocks(rewards.size(0)));
  const Tensor advantages = empty_like_of(rewards, {rewards.size(0)}, ScalarType::Float);
  const bool leave_one_out = baseline == "leave_one_out";
  std::optional<Tensor> batch;
  if (scale == "batch" && !leave_one_out) batch = stats_of(kOp, rewards, std::nullopt);
  const OutcomeGroups groups = {sorted_groups.groups,
                                data_of<double>(batch, "batch", 3),
                                leave_one_out,
                                scale == "group",
                                unbiased,
                                static_cast<float*>(advantages.data_ptr())};
  check_launch(kOp, group_advantages(groups, current_stream(rewards)));
  return advantages;
}

Tensor process_advantages_op(Tensor step_rewards, Tensor step_ends, std::optional<Tensor> group_ids, int64_t group_size,
                             int64_t length, Tensor eps) {
  constexpr const char* kOp = "process_advantages";
  if (step_rewards.dim() != 2) fail("step_rewards: wanted (B, K), got ", shape_of(step_rewards));
  const int64_t B = step_rewards.size(0), K = step_rewards.size(1);
  const DeviceGuard guard(step_rewards.get_device_index());
  const SortedGroups sorted_groups(step_rewards, "step_rewards", group_ids, group_size, eps);
  check_programs(kOp, process_blocks(B, length));
  const Tensor suffix = empty_like_of(step_rewards, {B, K}, ScalarType::Double);
  const Tensor advantages = empty_like_of(step_rewards, {B, length}, ScalarType::Float);
  const ProcessGroups groups = {sorted_groups.groups,
                                data_of<int64_t>(step_ends, "step_ends", B * K),
                                K,
                                length,
                                static_cast<double*>(suffix.data_ptr()),
                                static_cast<float*>(advantages.data_ptr())};
  check_launch(kOp, process_advantages(groups, current_stream(step_rewards)));
  return advantages;
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CUDA, m) {
  m.impl("group_advantages", TORCH_BOX(&rl4llm::group_advantages_op));
  m.impl("process_advantages", TORCH_BOX(&rl4llm::process_advantages_op));
  m.impl("whiten_stats", TORCH_BOX(&rl4llm::whiten_stats_op));
  m.impl("whiten_apply", TORCH_BOX(&rl4llm::whiten_apply_op));
}
