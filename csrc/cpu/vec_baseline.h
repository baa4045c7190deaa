// Vec in the compiler's own vectors, 4 × fp32: SSE2 on any x86-64, NEON on 64-bit Arm. See vec.h.
#pragma once

namespace rl4llm {
namespace RL4LLM_ISA {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

struct Vec {
  static constexpr int width = 4;
  typedef float scalar;
  Floats v;
  static inline Vec of(float x) { return {Floats{x, x, x, x}}; }
};

RL4LLM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
RL4LLM_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
RL4LLM_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
RL4LLM_INLINE Vec abs(Vec a) { return {(Floats)((Ints)a.v & 0x7fffffff)}; }
RL4LLM_INLINE Vec with_sign_of(Vec size, Vec sign) {  // size >= 0
  return {(Floats)(((Ints)sign.v & int32_t(0x80000000u)) | (Ints)size.v)};
}
RL4LLM_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return {a.v < b.v ? yes.v : no.v}; }
// x = n + f, n = floor(x)
constexpr bool kExp2TakesAll = false;
RL4LLM_INLINE void split_integer(Vec x, Vec& n, Vec& f) {
  const float magic = 12582912.0f;  // 1.5·2^23: adding it leaves no room for a fraction
  const Floats nearest = (x.v + magic) - magic;
  n.v = nearest > x.v ? nearest - 1.0f : nearest;
  f.v = x.v - n.v;
}
// Adds n to the exponent; below 2^-125 that would leave the normal numbers: 0 there. NaN stays NaN.
RL4LLM_INLINE Vec scale_by_power_of_2(Vec p, Vec n, Vec x) {
  const Ints exponent = __builtin_convertvector(n.v, Ints) << 23;
  const Ints scaled = (Ints)p.v + exponent;
  return {(Floats)(scaled & ~(x.v < -125.0f))};
}
// x = m·2^e for a normal x > 0, with m in [2/3, 4/3).
RL4LLM_INLINE void split_exponent(Vec x, Vec& m, Vec& e) {
  const Ints bits = (Ints)x.v, n = (bits - 0x3f2aaaab) >> 23;
  m.v = (Floats)(bits - (n << 23));
  e.v = __builtin_convertvector(n, Floats);
}

RL4LLM_INLINE float first_of(Vec a) { return a.v[0]; }
RL4LLM_INLINE float sum_of(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
RL4LLM_INLINE float max_of(Vec a) {
  const float even = a.v[0] > a.v[2] ? a.v[0] : a.v[2], odd = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return even > odd ? even : odd;
}
RL4LLM_INLINE bool any_nan(Vec a) {
  const Ints nan = a.v != a.v;
  return (nan[0] | nan[1] | nan[2] | nan[3]) != 0;
}

RL4LLM_INLINE void load2(const float* ptr, Vec& a, Vec& b) {
  __builtin_memcpy(&a.v, ptr, 16);
  __builtin_memcpy(&b.v, ptr + 4, 16);
}
RL4LLM_INLINE void store2(float* ptr, Vec a, Vec b) {
  __builtin_memcpy(ptr, &a.v, 16);
  __builtin_memcpy(ptr + 4, &b.v, 16);
}

// a: the even elements, b: the odd ones (on a little-endian machine). A bf16 is the upper half of an fp32.
RL4LLM_INLINE void load2(const bf16* ptr, Vec& a, Vec& b) {
  Ints pairs;
  __builtin_memcpy(&pairs, ptr, 16);
  a.v = (Floats)(pairs << 16);
  b.v = (Floats)(pairs & int32_t(0xffff0000u));
}
RL4LLM_INLINE Ints round_to_bf16(Vec a) {  // to nearest even, in the upper halves; the lower ones hold rubbish
  const Ints bits = (Ints)a.v;
  return bits + 0x7fff + ((bits >> 16) & 1);
}
RL4LLM_INLINE void store2(bf16* ptr, Vec a, Vec b) {
  const Ints pairs = ((round_to_bf16(a) >> 16) & 0xffff) | (round_to_bf16(b) & int32_t(0xffff0000u));
  __builtin_memcpy(ptr, &pairs, 16);
}

// The same in their own order, to meet data of another type.
RL4LLM_INLINE void load2_in_order(const bf16* ptr, Vec& a, Vec& b) {
  a.v = (Floats)(Ints{ptr[0].bits, ptr[1].bits, ptr[2].bits, ptr[3].bits} << 16);
  b.v = (Floats)(Ints{ptr[4].bits, ptr[5].bits, ptr[6].bits, ptr[7].bits} << 16);
}
RL4LLM_INLINE void store2_in_order(bf16* ptr, Vec a, Vec b) {
  const Ints first = round_to_bf16(a), second = round_to_bf16(b);
  for (int i = 0; i < 4; ++i) ptr[i].bits = uint16_t(uint32_t(first[i]) >> 16);
  for (int i = 0; i < 4; ++i) ptr[4 + i].bits = uint16_t(uint32_t(second[i]) >> 16);
}

// fp16 without hardware. Its numbers times 2^-112 are fp32 numbers with the same bits, 13 places further up; that
// covers its subnormals too, since 2^112 times them is a normal multiplication.
RL4LLM_INLINE void load2(const fp16* ptr, Vec& a, Vec& b) {
  for (int half = 0; half < 2; ++half) {
    const fp16* p = ptr + 4 * half;
    const Ints bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    const Ints size = (bits & 0x7fff) << 13;
    const Ints finite = (Ints)((Floats)size * 0x1p112f);
    const Ints value = size >= (0x7c00 << 13) ? (size | 0x7f800000) : finite;
    (half ? b : a).v = (Floats)(value | ((bits & 0x8000) << 16));
  }
}
RL4LLM_INLINE uint16_t to_fp16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (size < 0x38800000) {                                 // subnormal: let an addition do the rounding
    float value;
    __builtin_memcpy(&value, &size, 4);
    value += 0.5f;
    uint32_t rounded;
    __builtin_memcpy(&rounded, &value, 4);
    return uint16_t(sign | (rounded - 0x3f000000));
  }
  return uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}
RL4LLM_INLINE void store2(fp16* ptr, Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) ptr[i].bits = to_fp16(a.v[i]);
  for (int i = 0; i < 4; ++i) ptr[4 + i].bits = to_fp16(b.v[i]);
}

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
