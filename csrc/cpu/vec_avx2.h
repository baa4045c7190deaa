// Vec in AVX2 with FMA and F16C: 8 × fp32. See vec.h.
#pragma once

#include <immintrin.h>

namespace rl4llm {
namespace RL4LLM_ISA {

struct Vec {
  static constexpr int width = 8;
  typedef float scalar;
  __m256 v;
  static inline Vec of(float x) { return {_mm256_set1_ps(x)}; }
};

RL4LLM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
RL4LLM_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
RL4LLM_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
RL4LLM_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
RL4LLM_INLINE Vec with_sign_of(Vec size, Vec sign) {  // size >= 0
  return {_mm256_or_ps(_mm256_and_ps(_mm256_set1_ps(-0.0f), sign.v), size.v)};
}
RL4LLM_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
// x = n + f, n = floor(x)
constexpr bool kExp2TakesAll = false;
RL4LLM_INLINE void split_integer(Vec x, Vec& n, Vec& f) {
  n.v = _mm256_round_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  f.v = x.v - n.v;
}
// Adds n to the exponent; below 2^-125 that would leave the normal numbers: 0 there. NaN stays NaN.
RL4LLM_INLINE Vec scale_by_power_of_2(Vec p, Vec n, Vec x) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  const Vec scaled = {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), exponent))};
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, _mm256_set1_ps(-125.0f), _CMP_LT_OQ), scaled.v)};
}
// x = m·2^e for a normal x > 0, with m in [2/3, 4/3).
RL4LLM_INLINE void split_exponent(Vec x, Vec& m, Vec& e) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f2aaaab)), 23);
  m.v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(n, 23)));
  e.v = _mm256_cvtepi32_ps(n);
}

RL4LLM_INLINE float first_of(Vec a) { return _mm256_cvtss_f32(a.v); }
RL4LLM_INLINE float sum_of(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
RL4LLM_INLINE float max_of(Vec a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}
RL4LLM_INLINE bool any_nan(Vec a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) != 0; }

RL4LLM_INLINE void load2(const float* ptr, Vec& a, Vec& b) {
  a.v = _mm256_loadu_ps(ptr);
  b.v = _mm256_loadu_ps(ptr + 8);
}
RL4LLM_INLINE void store2(float* ptr, Vec a, Vec b) {
  _mm256_storeu_ps(ptr, a.v);
  _mm256_storeu_ps(ptr + 8, b.v);
}

// a: the even elements, b: the odd ones. A bf16 is the upper half of an fp32.
RL4LLM_INLINE void load2(const bf16* ptr, Vec& a, Vec& b) {
  const __m256i pairs = _mm256_loadu_si256((const __m256i*)ptr);
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))));
}
RL4LLM_INLINE __m256i round_to_bf16(Vec a) {  // to nearest even, in the upper halves; the lower ones hold rubbish
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
RL4LLM_INLINE void store2(bf16* ptr, Vec a, Vec b) {
  const __m256i even = _mm256_srli_epi32(round_to_bf16(a), 16);
  _mm256_storeu_si256((__m256i*)ptr, _mm256_blend_epi16(even, round_to_bf16(b), 0xaa));
}

// The same in their own order, to meet data of another type.
RL4LLM_INLINE void load2_in_order(const bf16* ptr, Vec& a, Vec& b) {
  const __m256i both = _mm256_loadu_si256((const __m256i*)ptr);
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(both)), 16));
  b.v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(both, 1)), 16));
}
RL4LLM_INLINE void store2_in_order(bf16* ptr, Vec a, Vec b) {
  // packus works in each 128-bit lane: the permutation puts the quarters right.
  const __m256i packed =
      _mm256_packus_epi32(_mm256_srli_epi32(round_to_bf16(a), 16), _mm256_srli_epi32(round_to_bf16(b), 16));
  _mm256_storeu_si256((__m256i*)ptr, _mm256_permute4x64_epi64(packed, 0xd8));
}

RL4LLM_INLINE void load2(const fp16* ptr, Vec& a, Vec& b) {
  a.v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)ptr));
  b.v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(ptr + 8)));
}
RL4LLM_INLINE void store2(fp16* ptr, Vec a, Vec b) {
  _mm_storeu_si128((__m128i*)ptr, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(ptr + 8), _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
