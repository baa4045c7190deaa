// A pair of rows of any two types, block by block in the accumulation dtype, and a gradient back: for kl.isa.cpp.
#pragma once

#include "cpu/kl.h"
#include "cpu/logits_vec.h"

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

template <class A>
struct VecOf {
  typedef Vec type;
};
template <>
struct VecOf<double> {
  typedef Vec64 type;
};

// fp64's sums are judged by its own eps: shorter ones, that round less.
constexpr int length_of_block(float) { return kBlock; }
constexpr int length_of_block(double) { return 256; }

// Both sides of a block, in A. Two neighbours in memory need not be neighbours here, but both sides have one order.
template <class A>
struct Block {
  alignas(64) A z[length_of_block(A())];
  alignas(64) A w[length_of_block(A())];
};

template <class T>
RL4LLM_INLINE void widen_to_fp32(const T* ptr, int length, bool in_order, float* out_ptr) {
  constexpr int step = 2 * Vec::width;
  const int whole = length - length % step;
  Vec a, b;
  for (int v = 0; v < whole; v += step) {
    if (in_order) {
      load2_in_order(ptr + v, a, b);
    } else {
      load2(ptr + v, a, b);
    }
    store2(out_ptr + v, a, b);
  }
  if (whole == length) return;
  T tail[step];
  load_tail(ptr + whole, length - whole, step, tail);
  in_order ? load2_in_order(tail, a, b) : load2(tail, a, b);
  store2(out_ptr + whole, a, b);
}

template <class T>
RL4LLM_INLINE void narrow_from_fp32(const float* from_ptr, int length, bool in_order, T* out_ptr) {
  constexpr int step = 2 * Vec::width;
  const int whole = length - length % step;
  Vec a, b;
  for (int v = 0; v < whole; v += step) {
    load2(from_ptr + v, a, b);
    in_order ? store2_in_order(out_ptr + v, a, b) : store2(out_ptr + v, a, b);
  }
  if (whole == length) return;
  T tail[step];
  load2(from_ptr + whole, a, b);
  in_order ? store2_in_order(tail, a, b) : store2(tail, a, b);
  for (int v = whole; v < length; ++v) out_ptr[v] = tail[v - whole];
}

RL4LLM_INLINE int64_t size_of(LogitsType type) {
  return type == LogitsType::fp64 ? 8 : type == LogitsType::fp32 ? 4 : 2;
}

// `length` logits from column v, and −inf up to a whole step.
void widen(const void* row_ptr, LogitsType type, int64_t v, int length, bool in_order, float* out_ptr) {
  const void* ptr = (const char*)row_ptr + v * size_of(type);
  if (type == LogitsType::fp32) return widen_to_fp32((const float*)ptr, length, in_order, out_ptr);
  if (type == LogitsType::bf16) {
    if (in_order) return widen_to_fp32((const bf16*)ptr, length, true, out_ptr);
    return widen_to_fp32((const bf16*)ptr, length, false, out_ptr);
  }
  return widen_to_fp32((const fp16*)ptr, length, in_order, out_ptr);
}
void widen(const void* row_ptr, LogitsType type, int64_t v, int length, bool, double* out_ptr) {
  if (type == LogitsType::fp64) {
    for (int i = 0; i < length; ++i) out_ptr[i] = ((const double*)row_ptr)[v + i];
    return;
  }
  alignas(64) float narrow[length_of_block(double())];
  widen(row_ptr, type, v, length, true, narrow);
  for (int i = 0; i < length; ++i) out_ptr[i] = narrow[i];
}

void narrow(const float* from_ptr, LogitsType type, int64_t v, int length, bool in_order, void* row_ptr) {
  void* ptr = (char*)row_ptr + v * size_of(type);
  if (type == LogitsType::fp32) return narrow_from_fp32(from_ptr, length, in_order, (float*)ptr);
  if (type == LogitsType::bf16) {
    if (in_order) return narrow_from_fp32(from_ptr, length, true, (bf16*)ptr);
    return narrow_from_fp32(from_ptr, length, false, (bf16*)ptr);
  }
  narrow_from_fp32(from_ptr, length, in_order, (fp16*)ptr);
}
void narrow(const double* from_ptr, LogitsType type, int64_t v, int length, bool, void* row_ptr) {
  if (type == LogitsType::fp64) {
    for (int i = 0; i < length; ++i) ((double*)row_ptr)[v + i] = from_ptr[i];
    return;
  }
  constexpr int most = length_of_block(double());
  alignas(64) float single[most];
  for (int i = 0; i < most; ++i) single[i] = i < length ? float(from_ptr[i]) : 0.0f;
  narrow(single, type, v, length, true, row_ptr);
}

// Calls work(block, its first column, its logits, the same rounded up to a step).
template <class A, class Work>
RL4LLM_INLINE void for_each_block(const KlPart<A>& part, const Work& work) {
  constexpr int step = kVecs * VecOf<A>::type::width;
  Block<A> block;
  const bool in_order = part.type != part.other_type;
  constexpr int most = length_of_block(A());
  for (int64_t v = 0; v < part.length; v += most) {
    const int length = int(part.length - v < most ? part.length - v : most);
    const int padded = (length + step - 1) / step * step;
    // What a step has beyond widen()'s own padding.
    for (int i = padded - step; i < padded; ++i) block.z[i] = block.w[i] = -infinity(A());
    widen(part.logits_ptr, part.type, v, length, in_order, block.z);
    widen(part.other_ptr, part.other_type, v, length, in_order, block.w);
    work(block, v, length, padded);
  }
}

}  // namespace
}  // namespace RL4LLM_ISA
}  // namespace rl4llm
