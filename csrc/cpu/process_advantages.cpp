// rl4llm_fast::process_advantages on the CPU: A_{i,t} = Σ_{index(j) ≥ t} r̃_j, r̃ the group's normalised step rewards
// (docs/math.md section 4).
//
// The statistics take two passes over B·K step rewards, in fp64 as in group_advantages; then every answer's tokens are
// written once, step by step from the last, threads sharing the answers.
#include <algorithm>

#include "cpu/groups.h"

namespace rl4llm {
namespace {

template <class A>
void run(const Tensor& step_rewards, const int64_t* ends_ptr, const Scratch<int32_t>& group_of, int64_t length,
         double eps, A* out_ptr) {
  const int64_t B = step_rewards.size(0), K = step_rewards.size(1);
  const void* rewards_ptr = step_rewards.data_ptr();
  const ScalarType type = step_rewards.scalar_type();
  const auto reward = [&](int64_t i) { return read_element(rewards_ptr, type, i); };

  std::vector<Group> groups;
  for (int64_t i = 0; i < B; ++i) {
    const size_t g = size_t(group_of[size_t(i)]);
    if (g >= groups.size()) groups.resize(g + 1, Group(0));
    for (int64_t j = i * K; j < (i + 1) * K; ++j) {
      if (ends_ptr[j] < 0) continue;
      const double r = reward(j);
      if (groups[g].size == 0) groups[g] = Group(r);
      groups[g].constant &= groups[g].size == 0 || r == groups[g].first;
      groups[g].sum.add(r - groups[g].origin);
      ++groups[g].size;
    }
  }
  for (Group& group : groups) group.mean = group.size ? group.sum.value() / double(group.size) : 0;
  for (int64_t i = 0; i < B; ++i) {
    Group& group = groups[size_t(group_of[size_t(i)])];
    for (int64_t j = i * K; j < (i + 1) * K; ++j) {
      if (ends_ptr[j] < 0) continue;
      const double centred = group.centred(reward(j));
      group.squares.add(centred * centred);
    }
  }
  for (Group& group : groups) group.divisor = group.deviation(true) + eps;

  parallel_jobs(B, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, length)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Group& group = groups[size_t(group_of[size_t(i)])];
      A* row_ptr = out_ptr + i * length;
      int64_t done = length;  // tokens from here on have their value
      double suffix = 0;
      for (int64_t j = K - 1; j >= 0; --j) {
        const int64_t last = ends_ptr[i * K + j];
        if (last < 0) continue;
        std::fill(row_ptr + last + 1, row_ptr + done, A(suffix));
        done = last + 1;
        if (!group.constant) suffix += group.centred(reward(i * K + j)) / group.divisor;
      }
      std::fill(row_ptr, row_ptr + done, A(suffix));
    }
  });
}

Tensor process_advantages(Tensor step_rewards, Tensor step_ends, std::optional<Tensor> group_ids, int64_t group_size,
                          int64_t length, Tensor eps) {
  if (step_rewards.dim() != 2 || !step_rewards.is_contiguous()) {
    fail("step_rewards: wanted (B, K), contiguous; got ", shape_of(step_rewards));
  }
  const int64_t B = step_rewards.size(0), K = step_rewards.size(1);
  if (length < 0) fail("length: wanted at least 0, got ", length);
  const int64_t* ends_ptr = data_of<int64_t>(step_ends, "step_ends", B * K);
  for (int64_t i = 0; i < B; ++i) {
    int64_t before = -1;
    for (int64_t j = i * K; j < (i + 1) * K; ++j) {
      const int64_t last = ends_ptr[j];
      if (last == -1) {
        before = length;  // nothing may follow
      } else if (last <= before || last >= length) {
        fail("step_ends: wanted ends in [0, ", length, "), increasing, and -1 only after the last; got ", last,
             " at position (", i, ", ", j - i * K, ")");
      }
      if (last >= 0) before = last;
    }
  }
  const double epsilon = read_scalar(eps, "eps");
  const Scratch<int32_t> group_of = groups_of(step_rewards, group_ids, group_size, B);
  const ScalarType acc = accumulation_type(step_rewards.scalar_type());
  const Tensor out = empty_like_of(step_rewards, {B, length}, acc);
  if (acc == ScalarType::Double) {
    run(step_rewards, ends_ptr, group_of, length, epsilon, static_cast<double*>(out.data_ptr()));
  } else {
    run(step_rewards, ends_ptr, group_of, length, epsilon, static_cast<float*>(out.data_ptr()));
  }
  return out;
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) { m.impl("process_advantages", TORCH_BOX(&rl4llm::process_advantages)); }
