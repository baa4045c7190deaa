// Vectors of fp32 in the registers of one instruction set: for *.isa.cpp files only (isa.h says how to write one).
//
// Gives, in namespace rl4llm::RL4LLM_ISA:
//   Vec            fp32 × Vec::width      + - * /, fma, max, min (the second where either is NaN), abs, select_less
//   Vec64          one double, the same interface: fp64 runs the same kernels, in plain scalar code
//   load2, store2  two vectors from or to memory of float, bf16, fp16 (double for Vec64): 2·width neighbours, in an
//                  order that only the two functions know (bf16 keeps even and odd elements apart: no shuffles);
//                  load2_in_order, store2_in_order: in memory's order, for any of fp32's types
//   exp2           2^x for x >= kLeast, relative error 1e-7; exactly 1 at 0, exactly 0 below −150, NaN for NaN
//   exp2_or_0      the same for any x, −inf included
//   log2           of normal numbers > 0, or of such a sum (Vec only)
//   softcap        c·tanh(z/c) − origin and tanh(z/c)
#pragma once

#include <stdint.h>

#include "hd.h"

namespace rl4llm {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

namespace RL4LLM_ISA {

#define RL4LLM_INLINE static inline __attribute__((always_inline))

// Below it 2^x is 0 in every precision and x stays finite, so that 0·x is 0.
template <class F>
constexpr double kLeast = -200.0;

#define RL4LLM_VECTOR_OPERATORS(F)                            \
  RL4LLM_INLINE F operator+(F a, F b) { return {a.v + b.v}; } \
  RL4LLM_INLINE F operator-(F a, F b) { return {a.v - b.v}; } \
  RL4LLM_INLINE F operator*(F a, F b) { return {a.v * b.v}; } \
  RL4LLM_INLINE F operator/(F a, F b) { return {a.v / b.v}; }

}  // namespace RL4LLM_ISA
}  // namespace rl4llm

#if defined(RL4LLM_ISA_AVX512)
#include "cpu/vec_avx512.h"
#elif defined(RL4LLM_ISA_AVX2)
#include "cpu/vec_avx2.h"
#else
#include "cpu/vec_baseline.h"
#endif

namespace rl4llm {
namespace RL4LLM_ISA {

RL4LLM_VECTOR_OPERATORS(Vec)

// 2^x by splitting x = n + f, 0 <= f < 1: a minimax polynomial of degree 6 for 2^f (its own relative error is 2e-9, so
// that only fp32 rounding remains), exactly 1 at 0.
RL4LLM_INLINE Vec exp2_of_parts(Vec f, Vec n, Vec x) {
  Vec p = Vec::of(2.16129164e-4f);
  p = fma(p, f, Vec::of(1.24678461e-3f));
  p = fma(p, f, Vec::of(9.6754516e-3f));
  p = fma(p, f, Vec::of(5.54852806e-2f));
  p = fma(p, f, Vec::of(2.40229306e-1f));
  p = fma(p, f, Vec::of(6.93147044e-1f));
  p = fma(p, f, Vec::of(1.0f));
  return scale_by_power_of_2(p, n, x);
}
RL4LLM_INLINE Vec exp2(Vec x) {
  Vec n, f;
  split_integer(x, n, f);
  return exp2_of_parts(f, n, x);
}
// 2^(x + rest), where rest is below an ulp of x.
RL4LLM_INLINE Vec exp2(Vec x, Vec rest) {
  Vec n, f;
  split_integer(x, n, f);
  return exp2_of_parts(f + rest, n, x);
}
// The same for any x, −inf included.
RL4LLM_INLINE Vec exp2_or_0(Vec x) { return exp2(kExp2TakesAll ? x : max(Vec::of(kLeast<Vec>), x)); }

// log2 of a normal x > 0 by x = m·2^e, f = m − 1; exactly 0 at 1; NaN for NaN.
RL4LLM_INLINE Vec log2_of_parts(Vec f, Vec e, Vec x) {
  Vec p = Vec::of(kLog2Curve8);
  p = fma(p, f, Vec::of(kLog2Curve7));
  p = fma(p, f, Vec::of(kLog2Curve6));
  p = fma(p, f, Vec::of(kLog2Curve5));
  p = fma(p, f, Vec::of(kLog2Curve4));
  p = fma(p, f, Vec::of(kLog2Curve3));
  p = fma(p, f, Vec::of(kLog2Curve2));
  p = fma(p, f, Vec::of(kLog2Curve1));
  p = fma(p, f, Vec::of(kLog2Curve0));
  return fma(p, f, e) + (x - x);  // the bits of a NaN give some number
}
RL4LLM_INLINE Vec log2(Vec x) {
  Vec m, e;
  split_exponent(x, m, e);
  return log2_of_parts(m - Vec::of(1.0f), e, x);
}
// log2 of x + rest, where rest is below an ulp of x: only around 1 does it count.
RL4LLM_INLINE Vec log2(Vec x, Vec rest) {
  Vec m, e;
  split_exponent(x, m, e);
  const Vec zero = Vec::of(0.0f), counts = select_less(zero, abs(e), zero, rest);
  return log2_of_parts((m - Vec::of(1.0f)) + counts, e, x);
}

// What tanh a = a + a·curve(a²) is near 0: a minimax polynomial for |a| < 0.9, relative error of tanh 2e-9.
RL4LLM_INLINE Vec tanh_curve(Vec square) {
  Vec p = Vec::of(-4.51494939e-4f);
  p = fma(p, square, Vec::of(2.57686329e-3f));
  p = fma(p, square, Vec::of(-8.26512383e-3f));
  p = fma(p, square, Vec::of(2.16684038e-2f));
  p = fma(p, square, Vec::of(-5.39321690e-2f));
  p = fma(p, square, Vec::of(1.33330390e-1f));
  p = fma(p, square, Vec::of(-3.33333262e-1f));
  return p * square;
}

// x·k to more digits than fp32 has: the product as it is rounded, and what the rounding dropped (without a fused
// multiply-add only what k's own rounding did).
struct Factor {
  float rounded, rest;
};
RL4LLM_INLINE Factor factor(double k) { return {float(k), float(k - double(float(k)))}; }
RL4LLM_INLINE Vec product(Vec x, Factor k, Vec& rest) {
  const Vec rounded = x * Vec::of(k.rounded);
  rest = fma(x, Vec::of(k.rest), fma(x, Vec::of(k.rounded), Vec::of(0.0f) - rounded));
  return rounded;
}

// z' − origin and tanh(z/c), with z' = c·tanh(z/c) = z + z·curve near 0, where the exponential would cancel, and
// c − c·rest from there on. Either way what is rounded is added to a number that is exact, so that z' is off by little
// more than its own rounding: a logit of 20 weighs each ulp with 2e-6 in the exponent. z' is rounded once, before the
// origin is subtracted: so the row's maximum is 0 exactly, and a distribution of one token has p = 1 exactly at any
// temperature. Infinities and NaN stay what they are in z'.
RL4LLM_INLINE void softcap(Vec z, float c, float origin, Vec& shifted, Vec& tanh) {
  const Vec one = Vec::of(1.0f), cap = Vec::of(c), near = Vec::of(0.9f);
  const Vec size = min(abs(z), Vec::of(40.0f * c));  // from about 10·c on tanh is 1
  const Factor inverse = factor(1.0 / double(c)), power = factor(-2.8853900817779268 / double(c));  // −2·log2(e)/c
  const Vec a = fma(size, Vec::of(inverse.rest), size * Vec::of(inverse.rounded)), curve = tanh_curve(a * a);
  Vec dropped;
  const Vec x = product(size, power, dropped), t = exp2(x, dropped);  // e^(−2a)
  const Vec rest = (t + t) / (one + t);                               // 1 − tanh a
  tanh = with_sign_of(select_less(a, near, fma(a, curve, a), one - rest), z);
  const Vec capped = select_less(a, near, fma(size, curve, size), fma(Vec::of(-c), rest, cap));
  shifted = select_less(abs(z), Vec::of(__builtin_inff()), with_sign_of(capped, z), z) - Vec::of(origin);
}

struct Vec64 {
  static constexpr int width = 1;
  typedef double scalar;
  double v;
  static inline Vec64 of(double x) { return {x}; }
};
RL4LLM_VECTOR_OPERATORS(Vec64)
template <>
constexpr double kLeast<Vec64> = -1100.0;
RL4LLM_INLINE Vec64 fma(Vec64 a, Vec64 b, Vec64 c) { return {__builtin_fma(a.v, b.v, c.v)}; }
RL4LLM_INLINE Vec64 max(Vec64 a, Vec64 b) { return {a.v > b.v ? a.v : b.v}; }
RL4LLM_INLINE Vec64 abs(Vec64 a) { return {__builtin_fabs(a.v)}; }
RL4LLM_INLINE Vec64 select_less(Vec64 a, Vec64 b, Vec64 yes, Vec64 no) { return a.v < b.v ? yes : no; }
RL4LLM_INLINE double sum_of(Vec64 a) { return a.v; }
RL4LLM_INLINE double max_of(Vec64 a) { return a.v; }
RL4LLM_INLINE double first_of(Vec64 a) { return a.v; }
RL4LLM_INLINE bool any_nan(Vec64 a) { return a.v != a.v; }
RL4LLM_INLINE Vec64 exp2(Vec64 x) { return {__builtin_exp2(x.v)}; }
RL4LLM_INLINE Vec64 exp2_or_0(Vec64 x) { return exp2(x); }
RL4LLM_INLINE void softcap(Vec64 z, double c, double origin, Vec64& shifted, Vec64& tanh) {
  tanh.v = __builtin_tanh(z.v / c);
  shifted.v = (__builtin_isinf(z.v) ? z.v : c * tanh.v) - origin;
}
RL4LLM_INLINE void load2(const double* ptr, Vec64& a, Vec64& b) { a.v = ptr[0], b.v = ptr[1]; }
RL4LLM_INLINE void store2(double* ptr, Vec64 a, Vec64 b) { ptr[0] = a.v, ptr[1] = b.v; }

template <class T>
RL4LLM_INLINE void load2_in_order(const T* ptr, Vec& a, Vec& b) {
  load2(ptr, a, b);
}
template <class T>
RL4LLM_INLINE void store2_in_order(T* ptr, Vec a, Vec b) {
  store2(ptr, a, b);
}

// The vector in which an element type is computed, and −inf as the element type has it.
template <class T>
struct Element {
  typedef Vec vec;
};
template <>
struct Element<double> {
  typedef Vec64 vec;
};
RL4LLM_INLINE void set_minus_infinity(float& x) { x = -__builtin_inff(); }
RL4LLM_INLINE void set_minus_infinity(double& x) { x = -__builtin_inf(); }
RL4LLM_INLINE void set_minus_infinity(bf16& x) { x.bits = 0xff80; }
RL4LLM_INLINE void set_minus_infinity(fp16& x) { x.bits = 0xfc00; }

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
