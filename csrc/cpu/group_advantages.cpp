// rl4llm_fast::group_advantages on the CPU: A_i = (R_i − mean of its group) / (std + ε) and its kin, docs/math.md
// section 4.
//
// Two or three passes over B rewards and a hash table of their group ids; B is small beside anything V- or T-shaped, so
// one thread does it. Numerics: fp64 sums in the order of the rewards, relative to the group's first reward, which
// keeps the deviations of rewards that share a large offset. A group's result depends on its own members only (with
// scale "batch" on all of them).
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cpu/tensor_args.h"

namespace rl4llm {
namespace {

// A sum that keeps what each addition rounds away (Kahan and Babuška): the order of a group's members hardly matters.
struct Sum {
  double total = 0, lost = 0;
  void add(double x) {
    const double next = total + x;
    lost += std::fabs(total) >= std::fabs(x) ? (total - next) + x : (x - next) + total;
    total = next;
  }
  double value() const { return std::isfinite(total) ? total + lost : total; }
};

struct Group {
  double first;        // the group's first reward
  double origin;       // the same, or 0 if it is not finite
  Sum sum = {};        // Σ (R − origin)
  Sum squares = {};    // Σ (R − mean)²
  double mean = 0;     // the mean of R − origin
  double divisor = 1;  // what its deviations are divided by
  int64_t size = 0;
  bool constant = true;  // all rewards equal: their advantages are exactly 0; NaN equals nothing

  explicit Group(double r) : first(r), origin(std::isfinite(r) ? r : 0) {}
  double centred(double r) const { return (r - origin) - mean; }
  double deviation(bool unbiased) const {
    const int64_t freedom = size - (unbiased ? 1 : 0);
    return std::sqrt(squares.value() / double(freedom > 1 ? freedom : 1));
  }
};

// Group ids to 0, 1, 2, … in the order of their first appearance: open addressing, a power of two of slots.
class GroupIndex {
 public:
  explicit GroupIndex(int64_t count) {
    size_t slots = 16;
    while (slots < size_t(count) * 2) slots *= 2;
    slots_.assign(slots, Slot{0, -1});
  }
  int32_t operator()(int64_t id) {
    if (count_ > 0 && id == last_id_) return last_;  // sorted ids: no look-up
    size_t i = mix(uint64_t(id)) & (slots_.size() - 1);
    while (slots_[i].index >= 0 && slots_[i].id != id) i = (i + 1) & (slots_.size() - 1);
    if (slots_[i].index < 0) slots_[i] = {id, count_++};
    last_id_ = id;
    return last_ = slots_[i].index;
  }

 private:
  struct Slot {
    int64_t id;
    int32_t index;
  };
  static uint64_t mix(uint64_t x) {  // so that ids in arithmetic progression spread over the slots
    x = (x ^ (x >> 32)) * 0x9e3779b97f4a7c15u;
    return x ^ (x >> 29);
  }
  std::vector<Slot> slots_;
  int64_t last_id_ = 0;
  int32_t last_ = 0, count_ = 0;
};

template <class A>
void run(const Tensor& rewards, const std::optional<Tensor>& group_ids, int64_t group_size, const std::string& scale,
         bool leave_one_out, bool unbiased, double eps, A* out_ptr) {
  const int64_t B = rewards.numel();
  std::vector<double> reward(static_cast<size_t>(B));
  const void* rewards_ptr = rewards.data_ptr();
  const ScalarType type = rewards.scalar_type();
  for (int64_t i = 0; i < B; ++i) reward[size_t(i)] = read_element(rewards_ptr, type, i);

  std::vector<int32_t> group_of(static_cast<size_t>(B));
  if (group_ids) {
    const int64_t* ids_ptr = data_of<int64_t>(*group_ids, "group_ids", B);
    GroupIndex index(B);
    for (int64_t i = 0; i < B; ++i) group_of[size_t(i)] = index(ids_ptr[i]);
  } else {
    for (int64_t i = 0; i < B; ++i) group_of[size_t(i)] = int32_t(i / group_size);
  }

  std::vector<Group> groups;
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
    for (const double r : reward) batch.sum.add(r - batch.origin);
    batch.mean = batch.sum.value() / double(B);
    for (const double r : reward) batch.squares.add(batch.centred(r) * batch.centred(r));
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
  if (!group_ids && (group_size < 1 || B % group_size != 0)) {
    fail("group_size: wanted a divisor of the ", B, " rewards, got ", group_size);
  }
  if (B > std::numeric_limits<int32_t>::max()) fail("rewards: wanted at most 2^31 - 1, got ", B);
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
