// Vec in AVX-512 (F, BW, DQ, VL, CD): 16 × fp32. See vec.h.
#pragma once

#include <immintrin.h>

namespace rl4llm {
namespace RL4LLM_ISA {

struct Vec {
  static constexpr int width = 16;
  typedef float scalar;
  __m512 v;
  static inline Vec of(float x) { return {_mm512_set1_ps(x)}; }
};

RL4LLM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
RL4LLM_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
RL4LLM_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
RL4LLM_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
RL4LLM_INLINE Vec with_sign_of(Vec size, Vec sign) {  // size >= 0
  const __m512i bit = _mm512_set1_epi32(int(0x80000000u));
  // (sign & bit) | (size & ~bit) in one instruction
  return {_mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign.v), _mm512_castps_si512(size.v), 0xca))};
}
RL4LLM_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// x = floor(x) + f; vscalef takes the floor itself. Of −inf f is 0, and the power 0.
constexpr bool kExp2TakesAll = true;
RL4LLM_INLINE void split_integer(Vec x, Vec& n, Vec& f) {
  n = x;
  f.v = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
RL4LLM_INLINE Vec scale_by_power_of_2(Vec p, Vec n, Vec) { return {_mm512_scalef_ps(p.v, n.v)}; }
// x = m·2^e for a normal x > 0, with m in [2/3, 4/3).
RL4LLM_INLINE void split_exponent(Vec x, Vec& m, Vec& e) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i n = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f2aaaab)), 23);
  m.v = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(n, 23)));
  e.v = _mm512_cvtepi32_ps(n);
}

RL4LLM_INLINE float first_of(Vec a) { return _mm512_cvtss_f32(a.v); }
RL4LLM_INLINE float sum_of(Vec a) { return _mm512_reduce_add_ps(a.v); }
RL4LLM_INLINE float max_of(Vec a) { return _mm512_reduce_max_ps(a.v); }
RL4LLM_INLINE bool any_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }

RL4LLM_INLINE void load2(const float* ptr, Vec& a, Vec& b) {
  a.v = _mm512_loadu_ps(ptr);
  b.v = _mm512_loadu_ps(ptr + 16);
}
RL4LLM_INLINE void store2(float* ptr, Vec a, Vec b) {
  _mm512_storeu_ps(ptr, a.v);
  _mm512_storeu_ps(ptr + 16, b.v);
}

// a: the even elements, b: the odd ones. A bf16 is the upper half of an fp32.
RL4LLM_INLINE void load2(const bf16* ptr, Vec& a, Vec& b) {
  const __m512i pairs = _mm512_loadu_si512(ptr);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}
RL4LLM_INLINE __m512i round_to_bf16(Vec a) {  // to nearest even, in the upper halves; the lower ones hold rubbish
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
RL4LLM_INLINE void store2(bf16* ptr, Vec a, Vec b) {
  const __m512i even = _mm512_srli_epi32(round_to_bf16(a), 16);
  _mm512_storeu_si512(ptr, _mm512_mask_blend_epi16(0xaaaaaaaau, even, round_to_bf16(b)));
}

// The same in their own order, to meet data of another type.
RL4LLM_INLINE void load2_in_order(const bf16* ptr, Vec& a, Vec& b) {
  const __m512i both = _mm512_loadu_si512(ptr);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
  b.v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
}
RL4LLM_INLINE void store2_in_order(bf16* ptr, Vec a, Vec b) {
  _mm256_storeu_si256((__m256i*)ptr, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(a), 16)));
  _mm256_storeu_si256((__m256i*)(ptr + 16), _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(b), 16)));
}

RL4LLM_INLINE void load2(const fp16* ptr, Vec& a, Vec& b) {
  const __m512i both = _mm512_loadu_si512(ptr);
  a.v = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
  b.v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}
RL4LLM_INLINE void store2(fp16* ptr, Vec a, Vec b) {
  _mm256_storeu_si256((__m256i*)ptr, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256((__m256i*)(ptr + 16), _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
