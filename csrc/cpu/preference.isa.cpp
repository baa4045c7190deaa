// Sums over the tokens of an answer, and what spreads a number over them. isa.h says how such a file is written.
#include "cpu/preference.h"

#include <stddef.h>

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

constexpr int kLanes = 16;  // on every instruction set, so that they all add up in the same order

template <class S>
struct Lanes {
  typedef S Values __attribute__((vector_size(kLanes * sizeof(S))));
  typedef double Sums __attribute__((vector_size(kLanes * sizeof(double))));
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  typedef int32_t Int32 __attribute__((vector_size(kLanes * sizeof(int32_t))));
  typedef int64_t Int64 __attribute__((vector_size(kLanes * sizeof(int64_t))));
};

template <class S>
struct Integers {
  typedef typename Lanes<S>::Int32 type;
};
template <>
struct Integers<double> {
  typedef Lanes<double>::Int64 type;
};

// By reference: a vector wider than the registers has no agreed way to be returned.
#define RL4LLM_INLINE static inline __attribute__((always_inline))

template <class T>
RL4LLM_INLINE void load(T& result, const void* ptr, int64_t bytes) {
  result = T{};
  if (bytes == int64_t(sizeof result)) {
    __builtin_memcpy(&result, ptr, sizeof result);
  } else {
    __builtin_memcpy(&result, ptr, size_t(bytes));
  }
}

// All ones where a token is live: the first `lanes` of a block, less what the mask leaves out.
template <class S>
RL4LLM_INLINE void live(typename Integers<S>::type& alive, const uint8_t* mask_ptr, int lanes) {
  typename Lanes<S>::Bytes bytes = {};
  if (mask_ptr) {
    load(bytes, mask_ptr, lanes);
  } else {
    __builtin_memset(&bytes, 1, size_t(lanes));
  }
  alive = __builtin_convertvector(bytes, typename Integers<S>::type) != typename Integers<S>::type{};
}

template <class S>
void sum(int64_t length, const S* logp_ptr, const S* ref_ptr, const uint8_t* mask_ptr, double* sum, int64_t* count) {
  typedef typename Lanes<S>::Values F;
  typename Lanes<S>::Sums sums = {};
  typename Integers<S>::type counts = {};
  const auto block = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const int64_t bytes = lanes * int64_t(sizeof(S));
    F x, ref;
    load(x, logp_ptr + i, bytes);
    if (ref_ptr) {
      load(ref, ref_ptr + i, bytes);
      x -= ref;
    }
    typename Integers<S>::type alive;
    live<S>(alive, mask_ptr ? mask_ptr + i : nullptr, lanes);
    // Selected, not multiplied: a dead token may hold NaN.
    sums += __builtin_convertvector(alive ? x : F{}, typename Lanes<S>::Sums);
    counts -= alive;
  };
  const int64_t whole = length / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) block(i, kLanes);
  if (whole < length) block(whole, int(length - whole));
  double total = 0;
  int64_t number = 0;
  for (int j = 0; j < kLanes; ++j) total += sums[j], number += counts[j];
  *sum = total, *count = number;
}

template <class S>
void spread(int64_t length, S value, const uint8_t* mask_ptr, S* out_ptr) {
  typedef typename Lanes<S>::Values F;
  const F filled = value - F{};
  const int64_t whole = length / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    typename Integers<S>::type alive;
    live<S>(alive, mask_ptr ? mask_ptr + i : nullptr, kLanes);
    const F out = alive ? filled : F{};
    __builtin_memcpy(out_ptr + i, &out, sizeof out);
  }
  for (int64_t i = whole; i < length; ++i) out_ptr[i] = !mask_ptr || mask_ptr[i] ? value : S(0);
}

}  // namespace

extern const PreferenceKernels preference_kernels = {{sum<float>, spread<float>}, {sum<double>, spread<double>}};

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
