// Where a part of a sequence lies, and its tokens in registers, for scan.cu and n_step.cu.
#pragma once

#include "cuda/device.cuh"
#include "cuda/scan.h"

namespace rl4llm {

constexpr int kTokens = 4;  // of a thread, side by side: 16 bytes of fp32, and neighbouring threads are neighbours
constexpr int kTile = kWarp * kTokens;  // what a warp scans at once; tiles are joined one after the other
constexpr int kPart = 4096;             // tokens; a longer sequence is cut into parts, counted from its first token
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kShortRow = 512;  // not yet measured: up to here a warp takes a row, from here on a block

__device__ __forceinline__ double read_double(const ScanNumber& number) {
  return number.device.ptr ? double(read_any_number(number.device, 0)) : number.value;
}

// What is shifted in from `offset` lanes further on in the order of the scan.
template <bool reverse>
__device__ __forceinline__ float from_lane(float x, int offset) {
  return reverse ? __shfl_down_sync(kAllLanes, x, offset) : __shfl_up_sync(kAllLanes, x, offset);
}

struct Span {
  int64_t b, part, first_slot;
  int64_t row, start;  // of the sequence: its row, its first token there
  int length;          // of the sequence: fewer than 2^31 tokens, see scan_bind.cpp
  int begin, end;      // of the part, in the sequence
  int last;            // no token beyond it takes a step
};

// Slot s of a pack takes part s − first of sequence b, first = offsets[b]/kPart + b: there are never more parts than
// slots from one such first to the next, so no length need be known to launch.
__device__ __forceinline__ Span locate(const ScanTensors& a, int64_t slot, int64_t parts) {
  Span s;
  if (!a.offsets_ptr) {
    s.b = s.row = slot / parts;
    s.part = slot % parts, s.first_slot = slot - s.part;
    s.start = 0, s.length = int(a.T);
  } else {
    int64_t low = 0, high = a.B - 1;
    while (low < high) {  // the last sequence whose first slot is not beyond this one
      const int64_t middle = (low + high + 1) / 2;
      if (a.offsets_ptr[middle] / kPart + middle <= slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    s.b = low, s.row = 0;
    s.start = a.offsets_ptr[low];
    const int64_t length = a.offsets_ptr[low + 1] - s.start;
    s.length = length > 0 ? int(length) : 0;
    s.first_slot = s.start / kPart + low;
    s.part = slot - s.first_slot;
  }
  s.begin = s.part * kPart < s.length ? int(s.part) * kPart : s.length;
  s.end = s.length - s.begin > kPart ? s.begin + kPart : s.length;
  return s;
}

template <class T>
__device__ __forceinline__ const T* tokens_of(const ScanTokens& tokens, const Span& s) {
  return static_cast<const T*>(tokens.ptr) + s.row * tokens.stride_b + s.start * tokens.stride_t;
}

constexpr int kSearch = 16;  // tokens that a lane looks at while a warp searches a mask

// The live token nearest to an end of [begin, end): the last one, or the first; −1 where there is none. Every warp that
// works on a part searches for itself: usually the first step finds it.
template <bool backwards>
__device__ int find_live(const bool* mask_ptr, int64_t stride, int begin, int end) {
  const int lane = threadIdx.x % kWarp;
  for (int done = 0; done < end - begin; done += kWarp * kSearch) {
    const int t0 = backwards ? end - done - (kWarp - lane) * kSearch : begin + done + lane * kSearch;
    int own = -1;
#pragma unroll
    for (int j = 0; j < kSearch; ++j) {
      const int i = backwards ? j : kSearch - 1 - j;
      const int t = t0 + i;
      if (t >= begin && t < end && mask_ptr[t * stride]) own = i;
    }
    const unsigned found = __ballot_sync(kAllLanes, own >= 0);
    if (found) {
      const int source = backwards ? kWarp - 1 - __clz(found) : __ffs(found) - 1;
      const int at = int(__shfl_sync(kAllLanes, float(own), source));
      return (backwards ? end - done - (kWarp - source) * kSearch : begin + done + source * kSearch) + at;
    }
  }
  return -1;
}

// Which of the kTokens tokens from t on are live, a bit each.
__device__ __forceinline__ unsigned live_tokens(const bool* mask_ptr, int64_t stride, int t, int end) {
  unsigned live = 0;
  const bool* ptr = mask_ptr ? mask_ptr + t * stride : nullptr;
  if (ptr && stride == 1 && t + kTokens <= end && (reinterpret_cast<uintptr_t>(ptr) & 3) == 0) {
    const uint32_t bytes = *reinterpret_cast<const uint32_t*>(ptr);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) live |= ((bytes >> (8 * i)) & 0xff ? 1u : 0u) << i;
    return live;
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    if (t + i < end && (!ptr || ptr[i * stride])) live |= 1u << i;
  }
  return live;
}

template <class T>
union FourTokens {
  uint4 bits16;
  uint2 bits8;
  T values[kTokens];
};

// kTokens tokens from t on in fp32, 0 where one is not live.
template <class T>
__device__ __forceinline__ void load_tokens(const T* ptr, int64_t stride, int t, int end, unsigned live,
                                            float (&x)[kTokens]) {
#pragma unroll
  for (int i = 0; i < kTokens; ++i) x[i] = 0;
  if (!ptr || !live) return;
  ptr += t * stride;
  constexpr int kBytes = kTokens * sizeof(T);
  if (stride == 1 && t + kTokens <= end && (reinterpret_cast<uintptr_t>(ptr) & (kBytes - 1)) == 0) {
    FourTokens<T> four;
    if constexpr (kBytes == 16) {
      four.bits16 = __ldcs(reinterpret_cast<const uint4*>(ptr));
    } else {
      four.bits8 = __ldcs(reinterpret_cast<const uint2*>(ptr));
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) x[i] = live >> i & 1 ? to_float(four.values[i]) : 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (live >> i & 1) x[i] = to_float(ptr[i * stride]);
    }
  }
}

// Results of the tokens from t on; 0 where one is not live.
__device__ __forceinline__ void store_tokens(float* ptr, int t, int end, unsigned live, const float (&x)[kTokens]) {
  ptr += t;
  if (t + kTokens <= end && on_16_bytes(ptr)) {
    Vec<float> vec;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) vec.values[i] = live >> i & 1 ? x[i] : 0.0f;
    store_vec(ptr, vec);
  } else {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (t + i < end) ptr[i] = live >> i & 1 ? x[i] : 0.0f;
    }
  }
}

}  // namespace rl4llm
