// What the kernels over rows of logits share, in vectors: for *.isa.cpp files only (isa.h says how to write one).
#pragma once

#include "cpu/vec.h"
#include "hd.h"

namespace rl4llm {
namespace RL4LLM_ISA {

constexpr int kBlock = 2048;  // 4 or 8 KiB: read from memory by the maximum, from L1 by the sum
constexpr int kVecs = 4;      // per iteration: independent sums, so that no addition waits for the one before

RL4LLM_INLINE float largest(float) { return __FLT_MAX__; }
RL4LLM_INLINE double largest(double) { return __DBL_MAX__; }

// z' − origin
template <bool kSoftcap, class F, class A>
RL4LLM_INLINE F shifted_logit(F z, A c, A origin) {
  if constexpr (!kSoftcap) return z - F::of(origin);
  F shifted, tanh;
  softcap(z, c, origin, shifted, tanh);
  return shifted;
}

// x = (z' − origin)·log2(e)/τ + offset; fp64 as hd.h's exponent says.
template <class A>
struct Scale {
  A k, temperature, softcap;
};
template <bool kSoftcap>
RL4LLM_INLINE Vec exponent(Vec z, Scale<float> by, float origin, float offset) {
  return fma(shifted_logit<kSoftcap>(z, by.softcap, origin), Vec::of(by.k), Vec::of(offset));
}
template <bool kSoftcap>
RL4LLM_INLINE Vec64 exponent(Vec64 z, Scale<double> by, double origin, double offset) {
  const double capped = shifted_logit<kSoftcap>(z, by.softcap, 0.0).v;
  return {rl4llm::exponent(capped, origin, DivideFirst{by.temperature}) + offset};
}

// The last logits of a part, fewer than a step, padded with −inf.
template <class T>
RL4LLM_INLINE void load_tail(const T* z_ptr, int count, int step, T* tail_ptr) {
  for (int i = 0; i < count; ++i) tail_ptr[i] = z_ptr[i];
  for (int i = count; i < step; ++i) set_minus_infinity(tail_ptr[i]);
}

template <class F>
RL4LLM_INLINE F max4(const F* v) {
  return max(max(v[0], v[1]), max(v[2], v[3]));
}
template <class F>
RL4LLM_INLINE auto sum4(const F* v) {
  return sum_of((v[0] + v[1]) + (v[2] + v[3]));
}

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
