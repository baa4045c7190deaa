// Device helpers that the kernels share: 16-byte loads and stores, conversions, hyperparameters, fixed-order
// reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "hd.h"

namespace rl4llm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 2^x is exactly 0 in fp32 from here down. Exponents are cut off at it where they are multiplied by a 2^x, because
// 0·(−inf) would be NaN; where NaN must come through, they are not (fmaxf drops NaN).
constexpr float kLog2Zero = -1024.0f;

// One instruction; exp2f adds two for denormal results, which are no part of any probability worth summing.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The elements of one 16-byte load.
template <class T>
constexpr int kVec = 16 / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class T>
__device__ __forceinline__ bool on_16_bytes(const T* ptr) {
  return (reinterpret_cast<uintptr_t>(ptr) & 15) == 0;
}

template <class T>
union Vec {
  uint4 bits;
  uint32_t words[4];
  T values[kVec<T>];
};

// Read once: first to leave the cache.
template <class T>
__device__ __forceinline__ Vec<T> load_vec(const T* ptr) {
  Vec<T> vec;
  vec.bits = __ldcs(reinterpret_cast<const uint4*>(ptr));
  return vec;
}

template <class T>
__device__ __forceinline__ void store_vec(T* ptr, const Vec<T>& vec) {
  __stcs(reinterpret_cast<uint4*>(ptr), vec.bits);
}

// The same 16 bytes from an address that is not a multiple of 16 (rows of an odd V): the two aligned vectors that hold
// them, shifted together. The second reads up to kBeyond elements more, which must lie in the row too: a tensor may end
// with it.
template <class T>
constexpr int kBeyond = kVec<T> - 1;
template <class T>
__device__ __forceinline__ Vec<T> load_vec_shifted(const T* ptr) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(ptr);
  const uint4* aligned_ptr = reinterpret_cast<const uint4*>(address & ~uintptr_t(15));
  const unsigned bytes = unsigned(address) & 15;
  const uint4 low = aligned_ptr[0], high = aligned_ptr[1];
  const uint32_t all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint32_t by_two[6], by_one[5];
#pragma unroll
  for (int i = 0; i < 6; ++i) by_two[i] = bytes & 8 ? all[i + 2] : all[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) by_one[i] = bytes & 4 ? by_two[i + 1] : by_two[i];
  Vec<T> vec;
#pragma unroll
  for (int i = 0; i < 4; ++i) vec.words[i] = __funnelshift_r(by_one[i], by_one[i + 1], (bytes & 3) * 8);
  return vec;
}

__device__ __forceinline__ float read_any_number(const Number& number, int64_t row) {
  float value = number.value;
  if (number.ptr) {
    const int64_t i = number.per_row ? row : 0;
    switch (number.dtype) {
      case Dtype::fp32:
        value = static_cast<const float*>(number.ptr)[i];
        break;
      case Dtype::bf16:
        value = to_float(static_cast<const __nv_bfloat16*>(number.ptr)[i]);
        break;
      case Dtype::fp16:
        value = to_float(static_cast<const __half*>(number.ptr)[i]);
        break;
      case Dtype::fp64:
        value = float(static_cast<const double*>(number.ptr)[i]);
        break;
    }
  }
  return value;
}

// NaN where it is not > 0, so that a bad device tensor shows in its rows without a synchronisation.
__device__ __forceinline__ float read_number(const Number& number, int64_t row) {
  const float value = read_any_number(number, row);
  return value > 0 ? value : not_a_number(0.0f);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// max, Σ 2^x and Σ 2^x·x of a row of logits relative to a new maximum >= the old. hd.h's `rebase`, with the device's
// exponential and without branches: here it stands in the inner loop.
__device__ __forceinline__ RowSum<float> rebase_fast(RowSum<float> part, float new_max, float k) {
  // Where every logit so far is −inf, subtract 0, so that −inf stays −inf.
  const float reference = new_max == -infinity(0.0f) ? 0.0f : new_max;
  const float shift = fmaxf((part.max - reference) * k, kLog2Zero);
  const float scale = exp2_fast(shift);
  return {new_max, part.sum * scale, (part.xsum + part.sum * shift) * scale};
}

// The sums of 32 lanes as one, the same bits in every lane.
__device__ __forceinline__ RowSum<float> warp_merge(RowSum<float> part, float k) {
  part = rebase_fast(part, warp_max(part.max), k);
  return {part.max, warp_sum(part.sum), warp_sum(part.xsum)};
}

// Row n = b·T + t of (B, T, V). N·V passes 2^31: every offset is int64.
template <class T>
__device__ __forceinline__ T* row_of(T* ptr, int64_t row, int64_t positions, int64_t stride_b, int64_t stride_t) {
  // 64-bit division is slow, and N never needs it.
  const uint32_t n = uint32_t(row), t = uint32_t(positions);
  return ptr + int64_t(n / t) * stride_b + int64_t(n % t) * stride_t;
}

}  // namespace rl4llm
