// What kl_fwd.cu and kl_bwd.cu share: columns of two dtypes side by side, and the mixture of the JSD.
#pragma once

#include "cuda/kl.h"
#include "cuda/rows.cuh"

namespace rl4llm {

// Columns that a thread loads at a time: 16 bytes of the narrower type, 16 or 32 of the other.
template <class A, class B>
constexpr int kChunk = kVec<A> > kVec<B> ? kVec<A> : kVec<B>;

__device__ __forceinline__ bool is_live(const KlRows& rows, int64_t row) {
  return !rows.mask_ptr || rows.mask_ptr[row];
}

// x − y, as a term of a sum that makes the gradient: hundreds of them still have a finite sum.
__device__ __forceinline__ float bounded_difference(float x, float y) {
  constexpr float kBound = 1e36f;
  return fminf(fmaxf(x - y, -kBound), kBound);
}

// log2(x + rest) of a normal x > 0, rest below an ulp of x: around 1, where it counts, x − 1 is exact.
__device__ __forceinline__ float log2_of_sum(float x, float rest) {
  const int bits = __float_as_int(x), e = (bits - 0x3f2aaaab) >> 23;  // x = m·2^e, 2/3 <= m < 4/3
  const float f = (__int_as_float(bits - (e << 23)) - 1) + (e == 0 ? rest : 0.0f);
  float p = kLog2Curve8;
  p = fmaf(p, f, kLog2Curve7);
  p = fmaf(p, f, kLog2Curve6);
  p = fmaf(p, f, kLog2Curve5);
  p = fmaf(p, f, kLog2Curve4);
  p = fmaf(p, f, kLog2Curve3);
  p = fmaf(p, f, kLog2Curve2);
  p = fmaf(p, f, kLog2Curve1);
  p = fmaf(p, f, kLog2Curve0);
  return fmaf(p, f, float(e)) + (x - x);  // the bits of a NaN give some number
}

// The weights of p and q in κ·m, as the kernels use them.
struct Mixture {
  float p, q;
};

__device__ __forceinline__ Mixture read_mixture(float beta, const KlInner& inner) {
  const KlMixture mixture = mixture_of(beta, inner.scale);
  return {float(mixture.p), float(mixture.q)};
}

// log2(p/κm) and log2(q/κm) of κm = mixture.q·q + mixture.p·p; finite also where p or q is 0.
struct Ratios {
  float p_over_m, q_over_m;
};

__device__ __forceinline__ Ratios log2_ratios(float log2_p, float log2_q, Mixture mixture) {
  const float delta = fmaxf(log2_q, kLog2Zero) - fmaxf(log2_p, kLog2Zero);
  const float smaller = exp2_fast(-fabsf(delta));  // the ratio of the smaller to the larger: nothing overflows
  const float lead = delta <= 0 ? mixture.p : mixture.q, other = delta <= 0 ? mixture.q : mixture.p;
  const float total = fmaf(other, smaller, lead);
  const float mixed = log2_of_sum(total, fmaf(other, smaller, lead - total));
  // Not one from the other: where they are far apart, the smaller one's rounding would be in both.
  return {fminf(-delta, 0.0f) - mixed, fminf(delta, 0.0f) - mixed};
}

// β of the JSD; NaN outside (0, 1).
__device__ __forceinline__ float read_beta(const Number& number) {
  const float beta = read_number(number, 0);
  return beta < 1 ? beta : not_a_number(0.0f);
}

// use(A()) for the type of a dtype; false where the kernels have none.
template <class Use>
bool with_type(Dtype dtype, const Use& use) {
  switch (dtype) {
    case Dtype::fp32:
      use(float());
      return true;
    case Dtype::bf16:
      use(__nv_bfloat16());
      return true;
    case Dtype::fp16:
      use(__half());
      return true;
    case Dtype::fp64:
      return false;
  }
  return false;
}

// use(A(), B()) for the types of two sides.
template <class Use>
cudaError_t with_types(const KlSide& a, const KlSide& b, const Use& use) {
  bool known = false;
  with_type(a.dtype, [&](auto one) { known = with_type(b.dtype, [&](auto other) { use(one, other); }); });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace rl4llm
