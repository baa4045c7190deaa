// What the kernels over rows of logits (B, T, V) share: how a row is cut, the soft cap, columns in registers.
#pragma once

#include "cuda/device.cuh"

namespace rl4llm {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxPart =
    32768;  // columns; not yet measured: 64 KiB in bf16, so that its closing reduction is hidden
constexpr int64_t kPartStep = 1024;  // parts are multiples of this, so that each starts on 16 bytes where the row does

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A row longer than kMaxPart is summed in parts by several blocks of threads. V alone decides how it is cut.
inline int64_t row_parts(int64_t V) { return V > kMaxPart ? ceil_div(V, kMaxPart) : 1; }
inline int64_t part_columns(int64_t V) { return ceil_div(V, row_parts(V) * kPartStep) * kPartStep; }

// tanh(z/c), of which z' = c·ratio.
__device__ __forceinline__ float cap_ratio(float z, float softcap) { return tanhf(z / softcap); }

// ±inf stands for itself: −inf is a masked-out token, +inf poisons its row.
__device__ __forceinline__ float capped(float z, float ratio, float softcap) {
  return fabsf(z) == infinity(0.0f) ? z : softcap * ratio;
}

template <bool SOFTCAP>
__device__ __forceinline__ float shifted_logit(float z, float softcap) {
  return SOFTCAP ? capped(z, cap_ratio(z, softcap), softcap) : z;
}

// Neighbouring columns of a row, in one or more vectors.
template <class T, int COLUMNS>
struct Columns {
  static_assert(COLUMNS % kVec<T> == 0);
  Vec<T> vecs[COLUMNS / kVec<T>];
  __device__ __forceinline__ T& operator[](int i) { return vecs[i / kVec<T>].values[i % kVec<T>]; }
};

// Columns from `column` on; −inf outside [0, last), where nothing is read.
template <class T, int COLUMNS>
__device__ __forceinline__ void load_columns(Columns<T, COLUMNS>& columns, const T* row_ptr, int64_t column,
                                             int64_t last) {
  const int beyond = on_16_bytes(row_ptr + column) ? 0 : kBeyond<T>;
  if (column >= 0 && column + COLUMNS + beyond <= last) {
#pragma unroll
    for (int i = 0; i < COLUMNS / kVec<T>; ++i) {
      const T* ptr = row_ptr + column + i * kVec<T>;
      columns.vecs[i] = on_16_bytes(ptr) ? load_vec(ptr) : load_vec_shifted(ptr);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      const bool inside = column + i >= 0 && column + i < last;
      columns[i] = inside ? row_ptr[column + i] : from_float<T>(-infinity(0.0f));
    }
  }
}

// Writes the columns that lie in [0, last); whole vectors must lie on 16 bytes.
template <class T, int COLUMNS>
__device__ __forceinline__ void store_columns(T* row_ptr, int64_t column, int64_t last, Columns<T, COLUMNS>& columns) {
  if (column >= 0 && column + COLUMNS <= last) {
#pragma unroll
    for (int i = 0; i < COLUMNS / kVec<T>; ++i) store_vec(row_ptr + column + i * kVec<T>, columns.vecs[i]);
  } else {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      if (column + i >= 0 && column + i < last) row_ptr[column + i] = columns[i];
    }
  }
}

}  // namespace rl4llm
