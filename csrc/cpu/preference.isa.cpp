// Sums over the tokens of an answer, and what spreads a number over them. isa.h says how such a file is written.
#include "cpu/preference.h"

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

constexpr int kLanes = 16;  // on every instruction set, so that they all add up in the same order

template <class S>
struct Lanes {
  typedef S Values __attribute__((vector_size(kLanes * sizeof(S))));
  typedef double Sums __attribute__((vector_size(kLanes * sizeof(double))));
  typedef int32_t Int32 __attribute__((vector_size(kLanes * sizeof(int32_t))));
  typedef int64_t Int64 __attribute__((vector_size(kLanes * sizeof(int64_t))));
};

template <class S>
struct Integers {
  typedef int32_t lane;
  typedef typename Lanes<S>::Int32 type;
};
template <>
struct Integers<double> {
  typedef int64_t lane;
  typedef Lanes<double>::Int64 type;
};

#define RL4LLM_INLINE static inline __attribute__((always_inline))

// Of kLanes tokens, those that are live: all ones. By reference: a vector wider than the registers has no agreed way to
// be returned.
template <class Lane, class I>
RL4LLM_INLINE void live(I& alive, const uint8_t* mask_ptr) {
  // A loop: gcc takes the conversion of a whole vector of bytes apart, byte by byte.
  Lane lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = -int(mask_ptr[j] != 0);
  __builtin_memcpy(&alive, lanes, sizeof alive);
}

template <class S, bool masked, bool minus_ref>
RL4LLM_INLINE void sum_of(int64_t length, const S* logp_ptr, const S* ref_ptr, const uint8_t* mask_ptr, double* sum,
                          int64_t* count) {
  typedef typename Lanes<S>::Values F;
  typename Lanes<S>::Sums sums = {};
  typename Integers<S>::type counts = {};
  const int64_t whole = length / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    F x, ref;
    __builtin_memcpy(&x, logp_ptr + i, sizeof x);
    if constexpr (minus_ref) {
      __builtin_memcpy(&ref, ref_ptr + i, sizeof ref);
      x -= ref;
    }
    if constexpr (masked) {
      typename Integers<S>::type alive;
      live<typename Integers<S>::lane>(alive, mask_ptr + i);
      // Selected, not multiplied: a dead token may hold NaN.
      x = alive ? x : F{};
      counts -= alive;
    }
    sums += __builtin_convertvector(x, typename Lanes<S>::Sums);
  }
  double total = 0;
  int64_t number = masked ? 0 : length;
  for (int j = 0; j < kLanes; ++j) total += sums[j], number += counts[j];
  for (int64_t i = whole; i < length; ++i) {
    if (masked && !mask_ptr[i]) continue;
    total += double(minus_ref ? logp_ptr[i] - ref_ptr[i] : logp_ptr[i]);
    number += masked;
  }
  *sum = total, *count = number;
}

template <class S>
void sum(int64_t length, const S* logp_ptr, const S* ref_ptr, const uint8_t* mask_ptr, double* sum, int64_t* count) {
  if (mask_ptr) {
    if (ref_ptr) return sum_of<S, true, true>(length, logp_ptr, ref_ptr, mask_ptr, sum, count);
    return sum_of<S, true, false>(length, logp_ptr, ref_ptr, mask_ptr, sum, count);
  }
  if (ref_ptr) return sum_of<S, false, true>(length, logp_ptr, ref_ptr, mask_ptr, sum, count);
  return sum_of<S, false, false>(length, logp_ptr, ref_ptr, mask_ptr, sum, count);
}

template <class S>
void spread(int64_t length, S value, const uint8_t* mask_ptr, S* out_ptr) {
  typedef typename Lanes<S>::Values F;
  const F filled = value - F{};
  const int64_t whole = length / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    F out = filled;
    if (mask_ptr) {
      typename Integers<S>::type alive;
      live<typename Integers<S>::lane>(alive, mask_ptr + i);
      out = alive ? filled : F{};
    }
    __builtin_memcpy(out_ptr + i, &out, sizeof out);
  }
  for (int64_t i = whole; i < length; ++i) out_ptr[i] = !mask_ptr || mask_ptr[i] ? value : S(0);
}

}  // namespace

extern const PreferenceKernels preference_kernels = {{sum<float>, spread<float>}, {sum<double>, spread<double>}};

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
