// Tokens in the lanes of a register, for scan.isa.cpp: sliding and scanning them, loads, masks, and bringing inputs of
// any dtype and stride side by side.
#pragma once

#include "cpu/scan.h"

#include "cpu/vec.h"

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

// Inputs are brought into the accumulation dtype this many tokens at a time, in the L1 cache; divides kBlock.
constexpr int64_t kStage = 512;

#if defined(RL4LLM_ISA_AVX512)
constexpr int kBytes = 64;
#elif defined(RL4LLM_ISA_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class Scalar>
struct Lanes {
  typedef Scalar S;
  static constexpr int width = kBytes / int(sizeof(S));
  typedef S F __attribute__((vector_size(kBytes)));
  typedef decltype(F{} < F{}) I;
  typedef uint8_t Bytes __attribute__((vector_size(kBytes / sizeof(S))));
};

template <class L>
RL4LLM_INLINE typename L::F constant(typename L::S x) {
  return x - typename L::F{};
}

// a·b + c, rounded once where the instruction set can.
#if defined(RL4LLM_ISA_AVX512)
RL4LLM_INLINE Lanes<float>::F fused(Lanes<float>::F a, Lanes<float>::F b, Lanes<float>::F c) {
  return (Lanes<float>::F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
RL4LLM_INLINE Lanes<double>::F fused(Lanes<double>::F a, Lanes<double>::F b, Lanes<double>::F c) {
  return (Lanes<double>::F)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(RL4LLM_ISA_AVX2)
RL4LLM_INLINE Lanes<float>::F fused(Lanes<float>::F a, Lanes<float>::F b, Lanes<float>::F c) {
  return (Lanes<float>::F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
RL4LLM_INLINE Lanes<double>::F fused(Lanes<double>::F a, Lanes<double>::F b, Lanes<double>::F c) {
  return (Lanes<double>::F)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
template <class F>
RL4LLM_INLINE F fused(F a, F b, F c) {
  return a * b + c;
}
#endif
// W neighbours of the 2·W numbers (low, high), from the s-th on.
template <int lane, class F>
RL4LLM_INLINE F broadcast(F x) {
  typedef decltype(x < x) I;
  return __builtin_shuffle(x, I{} + lane);
}

template <int s, class F>
RL4LLM_INLINE F slide(F low, F high) {
  constexpr int width = int(sizeof(F) / sizeof(low[0]));
  if constexpr (width == 16) {
    return __builtin_shufflevector(low, high, s, s + 1, s + 2, s + 3, s + 4, s + 5, s + 6, s + 7, s + 8, s + 9, s + 10,
                                   s + 11, s + 12, s + 13, s + 14, s + 15);
  } else if constexpr (width == 8) {
    return __builtin_shufflevector(low, high, s, s + 1, s + 2, s + 3, s + 4, s + 5, s + 6, s + 7);
  } else if constexpr (width == 4) {
    return __builtin_shufflevector(low, high, s, s + 1, s + 2, s + 3);
  } else {
    return __builtin_shufflevector(low, high, s, s + 1);
  }
}

// What stands s lanes further on in the direction of the scan, which is `filler` beyond the vector.
template <int s, bool reverse, class F>
RL4LLM_INLINE F from(F x, F filler) {
  constexpr int width = int(sizeof(F) / sizeof(x[0]));
  if constexpr (reverse) return slide<s>(x, filler);
  return slide<width - s>(filler, x);
}

template <bool reverse, int s = 1, class F>
RL4LLM_INLINE void scan_lanes(F& x, F& product) {
  if constexpr (s < int(sizeof(F) / sizeof(x[0]))) {
    x = fused(product, from<s, reverse>(x, F{}), x);
    product *= from<s, reverse>(product, F{} + 1);
    scan_lanes<reverse, 2 * s>(x, product);
  }
}

// The same where every b is one number: powers[k] = b^k.
template <bool reverse, int s = 1, class F, class S>
RL4LLM_INLINE void scan_lanes_uniform(F& x, const S* powers) {
  if constexpr (s < int(sizeof(F) / sizeof(x[0]))) {
    x = fused(powers[s] - F{}, from<s, reverse>(x, F{}), x);
    scan_lanes_uniform<reverse, 2 * s>(x, powers);
  }
}

#if defined(RL4LLM_ISA_AVX512)
RL4LLM_INLINE void load_first(const float* ptr, int lanes, Lanes<float>::F& x) {
  x = (Lanes<float>::F)_mm512_maskz_loadu_ps(__mmask16((1u << lanes) - 1), ptr);
}
RL4LLM_INLINE void load_first(const double* ptr, int lanes, Lanes<double>::F& x) {
  x = (Lanes<double>::F)_mm512_maskz_loadu_pd(__mmask8((1u << lanes) - 1), ptr);
}
RL4LLM_INLINE void store_first(float* ptr, int lanes, Lanes<float>::F x) {
  _mm512_mask_storeu_ps(ptr, __mmask16((1u << lanes) - 1), (__m512)x);
}
RL4LLM_INLINE void store_first(double* ptr, int lanes, Lanes<double>::F x) {
  _mm512_mask_storeu_pd(ptr, __mmask8((1u << lanes) - 1), (__m512d)x);
}
#else
template <class S, class F>
RL4LLM_INLINE void load_first(const S* ptr, int lanes, F& x) {
  for (int j = 0; j < lanes; ++j) x[j] = ptr[j];
}
template <class S, class F>
RL4LLM_INLINE void store_first(S* ptr, int lanes, F x) {
  for (int j = 0; j < lanes; ++j) ptr[j] = x[j];
}
#endif

template <class L>
RL4LLM_INLINE typename L::F load(const typename L::S* ptr, int lanes) {
  typename L::F result = {};
  if (lanes == L::width) {
    __builtin_memcpy(&result, ptr, sizeof result);
  } else {
    load_first(ptr, lanes, result);
  }
  return result;
}

template <class L>
RL4LLM_INLINE void store(typename L::S* ptr, int lanes, typename L::F value) {
  if (lanes == L::width) {
    __builtin_memcpy(ptr, &value, sizeof value);
  } else {
    store_first(ptr, lanes, value);
  }
}

RL4LLM_INLINE Lanes<float>::F exp(Lanes<float>::F x) {
  x *= 1.44269504088896341f;
  x = x < -150.0f ? constant<Lanes<float>>(-150.0f) : x > 127.0f ? constant<Lanes<float>>(127.0f) : x;
  Vec result, argument;
  __builtin_memcpy(&argument.v, &x, sizeof x);
  result = exp2(argument);
  __builtin_memcpy(&x, &result.v, sizeof x);
  return x;
}
RL4LLM_INLINE Lanes<double>::F exp(Lanes<double>::F x) {
  for (int j = 0; j < Lanes<double>::width; ++j) x[j] = __builtin_exp(x[j]);
  return x;
}

#if defined(RL4LLM_ISA_AVX512)
constexpr bool kCompresses = true;
RL4LLM_INLINE Lanes<float>::F compress(Lanes<float>::F x, uint32_t bits) {
  return (Lanes<float>::F)_mm512_maskz_compress_ps(__mmask16(bits), (__m512)x);
}
RL4LLM_INLINE Lanes<double>::F compress(Lanes<double>::F x, uint32_t bits) {
  return (Lanes<double>::F)_mm512_maskz_compress_pd(__mmask8(bits), (__m512d)x);
}
RL4LLM_INLINE Lanes<float>::F expand(Lanes<float>::F x, uint32_t bits) {
  return (Lanes<float>::F)_mm512_maskz_expand_ps(__mmask16(bits), (__m512)x);
}
RL4LLM_INLINE Lanes<double>::F expand(Lanes<double>::F x, uint32_t bits) {
  return (Lanes<double>::F)_mm512_maskz_expand_pd(__mmask8(bits), (__m512d)x);
}
#else
constexpr bool kCompresses = false;
template <class F>
F compress(F x, uint32_t) {
  return x;
}
template <class F>
F expand(F x, uint32_t) {
  return x;
}
#endif

// Per-token data of one stage as numbers of the accumulation dtype, side by side.
template <class S>
RL4LLM_INLINE void widen(ScanElement element, const void* ptr, int64_t stride, int64_t count, S* out_ptr) {
  if (element == ScanElement::same) {
    const S* in_ptr = static_cast<const S*>(ptr);
    for (int64_t i = 0; i < count; ++i) out_ptr[i] = in_ptr[i * stride];
  } else if (element == ScanElement::bf16) {
    const uint16_t* in_ptr = static_cast<const uint16_t*>(ptr);
    uint32_t bits[kStage];
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) bits[i] = uint32_t(in_ptr[i]) << 16;
    } else {
      for (int64_t i = 0; i < count; ++i) bits[i] = uint32_t(in_ptr[i * stride]) << 16;
    }
    float values[kStage];
    __builtin_memcpy(values, bits, uint64_t(count) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) out_ptr[i] = S(values[i]);
  } else {
    const uint16_t* in_ptr = static_cast<const uint16_t*>(ptr);
    int64_t i = 0;
#if defined(RL4LLM_ISA_AVX512) || defined(RL4LLM_ISA_AVX2)
    if constexpr (sizeof(S) == sizeof(float)) {
      if (stride == 1) {
        for (; i + 8 <= count; i += 8) {
          _mm256_storeu_ps(out_ptr + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in_ptr + i))));
        }
      }
    }
#endif
    for (; i < count; ++i) {
      // An fp16 times 2^-112 has the bits of an fp32, 13 places further up; its subnormals come right by themselves.
      const uint32_t half = in_ptr[i * stride], size = (half & 0x7fff) << 13;
      float value;
      __builtin_memcpy(&value, &size, sizeof value);
      value *= 0x1p112f;
      if (size >= 0x7c00u << 13) {
        const uint32_t bits = size | 0x7f800000u;
        __builtin_memcpy(&value, &bits, sizeof value);
      }
      out_ptr[i] = S(half & 0x8000 ? -value : value);
    }
  }
}

// Which tokens of a vector are live: lanes that are all ones or 0 and, for AVX-512, a bit each.
template <class L>
struct LiveLanes {
  typename L::I lanes;
  uint32_t bits;
};

// 0 where a token is not live.
template <class L>
RL4LLM_INLINE typename L::F only(const LiveLanes<L>& live, typename L::F x) {
#if defined(RL4LLM_ISA_AVX512)
  if constexpr (sizeof(typename L::S) == sizeof(float)) {
    return (typename L::F)_mm512_maskz_mov_ps(__mmask16(live.bits), (__m512)x);
  } else {
    return (typename L::F)_mm512_maskz_mov_pd(__mmask8(live.bits), (__m512d)x);
  }
#else
  return live.lanes ? x : typename L::F{};
#endif
}

enum class Live { all, none, some };

// The next `lanes` tokens of a mask; without one all of them are live.
template <class L>
RL4LLM_INLINE Live live_lanes(const uint8_t* mask_ptr, int lanes, LiveLanes<L>& live) {
  typedef typename L::I I;
  if (mask_ptr == nullptr && lanes == L::width) {
    live.lanes = I{} == I{};
    live.bits = (1u << L::width) - 1;
    return Live::all;
  }
  uint64_t words[2] = {};
  if (mask_ptr && lanes == L::width) {
    __builtin_memcpy(words, mask_ptr, L::width);
  } else {
    for (int j = 0; j < lanes; ++j) words[j / 8] |= uint64_t(mask_ptr ? mask_ptr[j] : 1) << (j % 8 * 8);
  }
#if defined(RL4LLM_ISA_AVX512)
  const __m128i bytes = _mm_set_epi64x(int64_t(words[1]), int64_t(words[0]));
  live.bits = _mm_test_epi8_mask(bytes, bytes);
  if constexpr (L::width == 16) live.lanes = (I)_mm512_maskz_set1_epi32(__mmask16(live.bits), -1);
  if constexpr (L::width == 8) live.lanes = (I)_mm512_maskz_set1_epi64(__mmask8(live.bits), -1);
  return live.bits == (1u << L::width) - 1 ? Live::all : live.bits == 0 ? Live::none : Live::some;
#else
  static_assert(L::width <= 8);
#if defined(RL4LLM_ISA_AVX2)
  const __m128i bytes = _mm_cvtsi64_si128(int64_t(words[0]));
  if constexpr (L::width == 8) live.lanes = (I)_mm256_cvtepu8_epi32(bytes);
  if constexpr (L::width == 4) live.lanes = (I)_mm256_cvtepu8_epi64(bytes);
#else
  typename L::Bytes bytes;
  __builtin_memcpy(&bytes, words, sizeof bytes);
  live.lanes = __builtin_convertvector(bytes, I);
#endif
  live.lanes = live.lanes > I{};
  const uint64_t ones = 0x0101010101010101u >> (64 - 8 * L::width);
  return lanes == L::width && words[0] == ones ? Live::all : words[0] == 0 ? Live::none : Live::some;
#endif
}

}  // namespace
}  // namespace RL4LLM_ISA
}  // namespace rl4llm
