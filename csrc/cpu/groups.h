// Which rewards form a group, and the statistics of a group, for the CPU ops on advantages. For the ops' own files.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/tensor_args.h"

namespace rl4llm {

// A sum that keeps what each addition rounds away (Knuth's exact difference, no branch to guess): the order of a
// group's members hardly matters.
struct Sum {
  double total = 0, lost = 0;
  void add(double x) {
    const double next = total + x;
    const double added = next - total;
    lost += (total - (next - added)) + (x - added);
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

// Memory for the time of a call, without the page faults of fresh memory (memory.cpp).
template <class T>
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t count)
      : memory_(empty_like_of(like, {count * int64_t(sizeof(T)) / 4}, ScalarType::Float)),
        ptr_(static_cast<T*>(memory_.data_ptr())) {
    static_assert(sizeof(T) % 4 == 0);
  }
  T& operator[](size_t i) const { return ptr_[i]; }

 private:
  Tensor memory_;
  T* ptr_;
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

// The group of each of B answers, numbered in the order of their first appearance: by ids (B,), or consecutive.
inline Scratch<int32_t> groups_of(const Tensor& like, const std::optional<Tensor>& group_ids, int64_t group_size,
                                  int64_t B) {
  if (!group_ids && (group_size < 1 || B % group_size != 0)) {
    fail("group_size: wanted a divisor of the ", B, " answers, got ", group_size);
  }
  if (B > INT32_MAX) fail("rewards: wanted at most 2^31 - 1 answers, got ", B);
  Scratch<int32_t> group_of(like, B);
  if (!group_ids) {
    for (int64_t i = 0; i < B; ++i) group_of[size_t(i)] = int32_t(i / group_size);
    return group_of;
  }
  const int64_t* ids_ptr = data_of<int64_t>(*group_ids, "group_ids", B);
  int64_t least = B ? ids_ptr[0] : 0, most = least;
  for (int64_t i = 1; i < B; ++i) {
    least = ids_ptr[i] < least ? ids_ptr[i] : least;
    most = ids_ptr[i] > most ? ids_ptr[i] : most;
  }
  const uint64_t span = uint64_t(most) - uint64_t(least);
  if (span < uint64_t(B)) {  // counted or sampled prompts: a table of the ids themselves
    std::vector<int32_t> index_of(size_t(span) + 1, -1);
    int32_t count = 0;
    for (int64_t i = 0; i < B; ++i) {
      int32_t& index = index_of[size_t(ids_ptr[i] - least)];
      if (index < 0) index = count++;
      group_of[size_t(i)] = index;
    }
  } else {
    GroupIndex index(B);
    for (int64_t i = 0; i < B; ++i) group_of[size_t(i)] = index(ids_ptr[i]);
  }
  return group_of;
}

}  // namespace rl4llm
