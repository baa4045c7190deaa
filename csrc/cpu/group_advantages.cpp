// rl4llm_fast::group_advantages on the CPU: A_i = (R_i − mean of its group) / (std + ε) and its kin, docs/math.md
// section 4.
//
// Two or three passes over B rewards and a table of their group ids; B is small beside anything V- or T-shaped, so
// one thread does it. Numerics: fp64 sums in the order of the rewards, relative to the group's first reward, which
// keeps the deviations of rewards that share a large offset. A group's result depends on its own members only (with
// scale "batch" on all of them).
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/groups.h"

namespace rl4llm {
namespace {

template <class A>
void run(const Tensor& rewards, const std::optional<Tensor>& group_ids, int64_t group_size, const std::string& scale,
         bool leave_one_out, bool unbiased, double eps, A* out_ptr) {
  const int64_t B = rewards.numel();
  const Scratch<double> reward(rewards, B);
  const void* rewards_ptr = rewards.data_ptr();
  const ScalarType type = rewards.scalar_type();
  if (type == ScalarType::Float) {
    for (int64_t i = 0; i < B; ++i) reward[size_t(i)] = static_cast<const float*>(rewards_ptr)[i];
  } else {
    for (int64_t i = 0; i < B; ++i) reward[size_t(i)] = read_element(rewards_ptr, type, i);
  }

  const Scratch<int32_t> group_of = groups_of(rewards, group_ids, group_size, B);
  std::vector<Group> groups;
  groups.reserve(size_t(B) / 8 + 1);
  for (size_t i = 0; i < size_t(B); ++i) {
    const double r = reward[i];
    if (size_t(group_of[i]) == groups.size()) groups.emplace_back(r);
    Group& group = groups[size_t(group_of[i])];
    group.constant &= group.size == 0 || r == group.first;
    group.sum.add(r - group.origin);
    ++group.size;
  }
  for (Group& group : groups) group.mean = group.sum.value() / double(group.size);
  for (size_t i = 0; i < size_t(B); ++i) {
    Group& group = groups[size_t(group_of[i])];
    const double centred = group.centred(reward[i]);
    group.squares.add(centred * centred);
  }

  double batch_divisor = 1;
  if (scale == "batch" && !leave_one_out) {
    Group batch(reward[0]);
    batch.size = B;
    for (size_t i = 0; i < size_t(B); ++i) batch.sum.add(reward[i] - batch.origin);
    batch.mean = batch.sum.value() / double(B);
    for (size_t i = 0; i < size_t(B); ++i) batch.squares.add(batch.centred(reward[i]) * batch.centred(reward[i]));
    batch_divisor = batch.deviation(unbiased) + eps;
  }
  for (Group& group : groups) {
    if (leave_one_out) {
      group.divisor = double(group.size - 1) / double(group.size);  // R − mean of the others = (R − mean)·G/(G − 1)
    } else if (scale == "group") {
      group.divisor = group.deviation(unbiased) + eps;
    } else {
      group.divisor = batch_divisor;
    }
  }
  for (size_t i = 0; i < size_t(B); ++i) {
    const Group& group = groups[size_t(group_of[i])];
    out_ptr[i] = group.constant ? A(0) : A(group.centred(reward[i]) / group.divisor);
  }
}

Tensor group_advantages(Tensor rewards, std::optional<Tensor> group_ids, int64_t group_size, std::string scale,
                        std::string baseline, bool unbiased, Tensor eps) {
  const int64_t B = rewards.numel();
  if (rewards.dim() != 1 || !rewards.is_contiguous()) fail("rewards: wanted (B,), contiguous; got ", shape_of(rewards));
  if (scale != "group" && scale != "batch" && scale != "none") {
    fail("scale: wanted group, batch or none, got ", scale);
  }
  if (baseline != "mean" && baseline != "leave_one_out") {
    fail("baseline: wanted mean or leave_one_out, got ", baseline);
  }
  const double epsilon = read_scalar(eps, "eps");
  const ScalarType acc = accumulation_type(rewards.scalar_type());
  const Tensor out = empty_like_of(rewards, {B}, acc);
  if (B == 0) return out;
  const bool leave_one_out = baseline == "leave_one_out";
  if (acc == ScalarType::Double) {
    run(rewards, group_ids, group_size, scale, leave_one_out, unbiased, epsilon, static_cast<double*>(out.data_ptr()));
  } else {
    run(rewards, group_ids, group_size, scale, leave_one_out, unbiased, epsilon, static_cast<float*>(out.data_ptr()));
  }
  return out;
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) { m.impl("group_advantages", TORCH_BOX(&rl4llm::group_advantages)); }
