// rl4llm_fast::group_advantages on the CPU: A_i = (R_i − mean of its group) / (std + ε) and its kin, docs/math.md
// section 4.
//
// The members of a group are brought side by side (ids that are sorted have them so), then each group is a loop of its
// own, threads sharing the groups: sums stay in registers, where a table of groups would make every addition wait for
// the one before it to come back from memory. Numerics: fp64 sums in the order of the rewards, relative to the group's
// first reward, which keeps the deviations of rewards that share a large offset. A group's result depends on its own
// members only (with scale "batch" on all of them).
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
  int32_t count = 0;
  bool side_by_side = true;
  for (size_t i = 0; i < size_t(B); ++i) {
    side_by_side &= group_of[i] >= count - 1;  // groups are numbered by their first member
    count = group_of[i] >= count ? group_of[i] + 1 : count;
  }
  const Scratch<int32_t> start(rewards, count + 1);
  for (int32_t g = 0; g <= count; ++g) start[size_t(g)] = 0;
  for (size_t i = 0; i < size_t(B); ++i) ++start[size_t(group_of[i]) + 1];
  for (size_t g = 0; g < size_t(count); ++g) start[g + 1] += start[g];
  const Scratch<double> members(rewards, side_by_side ? 0 : B);
  const Scratch<int32_t> place(rewards, side_by_side ? 0 : B), next(rewards, side_by_side ? 0 : count);
  if (!side_by_side) {
    for (size_t g = 0; g < size_t(count); ++g) next[g] = start[g];
    for (size_t i = 0; i < size_t(B); ++i) {
      const size_t to = size_t(next[size_t(group_of[i])]++);
      members[to] = reward[i], place[to] = int32_t(i);
    }
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
  const bool by_group = scale == "group";
  parallel_jobs(count, 1024, [&](int64_t first, int64_t last) {
    for (size_t g = size_t(first); g < size_t(last); ++g) {
      const size_t begin = size_t(start[g]), end = size_t(start[g + 1]);
      const Scratch<double>& r = side_by_side ? reward : members;
      Group group(r[begin]);
      group.size = int64_t(end - begin);
      for (size_t i = begin; i < end; ++i) {
        group.constant &= i == begin || r[i] == group.first;
        group.sum.add(r[i] - group.origin);
      }
      group.mean = group.sum.value() / double(group.size);
      if (leave_one_out) {
        group.divisor = double(group.size - 1) / double(group.size);  // R − mean of the others = (R − mean)·G/(G − 1)
      } else if (by_group) {
        for (size_t i = begin; i < end; ++i) group.squares.add(group.centred(r[i]) * group.centred(r[i]));
        group.divisor = group.deviation(unbiased) + eps;
      } else {
        group.divisor = batch_divisor;
      }
      for (size_t i = begin; i < end; ++i) {
        out_ptr[side_by_side ? i : size_t(place[i])] = group.constant ? A(0) : A(group.centred(r[i]) / group.divisor);
      }
    }
  });
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
