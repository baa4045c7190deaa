// whiten: count, mean and squares over live elements, then the normalised elements (docs/math.md section 4).
#include "cuda/advantages.h"
#include "cuda/device.cuh"

namespace rl4llm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kOfThread = 16;  // elements
constexpr int kPart = kThreads * kOfThread;

struct Moments {
  double count, mean, squares;
};

// Two parts as one (Chan et al. 1983). A part without elements leaves the other as it is, even if that holds inf.
__device__ __forceinline__ Moments join(Moments a, Moments b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double count = a.count + b.count, part = b.count / count, step = b.mean - a.mean;
  return {count, a.mean + step * part, a.squares + b.squares + step * step * a.count * part};
}

// kVec<T> elements of x, or of x − minus, from i on, 0 where one is not live; which are, a bit each.
template <class T>
__device__ __forceinline__ unsigned load_live(const WhitenTensors& a, int64_t i, float (&x)[kVec<T>]) {
  constexpr int width = kVec<T>;
  const T* x_ptr = static_cast<const T*>(a.x_ptr) + i;
  const T* minus_ptr = a.minus_ptr ? static_cast<const T*>(a.minus_ptr) + i : nullptr;
  const bool* mask_ptr = a.mask_ptr ? a.mask_ptr + i : nullptr;
  unsigned live = 0;
#pragma unroll
  for (int j = 0; j < width; ++j) x[j] = 0;
  const bool aligned = on_16_bytes(x_ptr) && on_16_bytes(minus_ptr);
  if (i + width <= a.N && aligned && (reinterpret_cast<uintptr_t>(mask_ptr) & (width - 1)) == 0) {
    const Vec<T> vec = load_vec(x_ptr);
    Vec<T> minus;
    if (minus_ptr) minus = load_vec(minus_ptr);
#pragma unroll
    for (int j = 0; j < width; j += 4) {
      const uint32_t bytes = mask_ptr ? *reinterpret_cast<const uint32_t*>(mask_ptr + j) : 0x01010101u;
#pragma unroll
      for (int k = 0; k < 4; ++k) live |= ((bytes >> (8 * k)) & 0xff ? 1u : 0u) << (j + k);
    }
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const float value = to_float(vec.values[j]) - (minus_ptr ? to_float(minus.values[j]) : 0.0f);
      x[j] = live >> j & 1 ? value : 0.0f;
    }
  } else {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (i + j >= a.N || (mask_ptr && !mask_ptr[j])) continue;
      live |= 1u << j, x[j] = to_float(x_ptr[j]) - (minus_ptr ? to_float(minus_ptr[j]) : 0.0f);
    }
  }
  return live;
}

// The sum over a block of threads, in every one of them.
__device__ __forceinline__ double block_sum(double x, double (&shared)[kWarps]) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) x += shared[w];
  return x;
}

// Count, mean and squares of one part.
//
// Computes: n = Σ m_i, x̄ = Σ m_i·x_i/n, Σ m_i·(x_i − x̄)², of x − minus where that is given
// Grid: (parts,), block -> kPart elements
// Traffic: an element and its mask read once, 24 bytes a part written
// Numerics: fp64, two passes over registers; elements of a thread in order, then a tree
// Gradient: none flows
template <class T>
__global__ void __launch_bounds__(kThreads) whiten_parts_kernel(const WhitenTensors a, double* partial_ptr) {
  constexpr int width = kVec<T>, vectors = kOfThread / width;
  __shared__ double shared[3][kWarps];
  float x[vectors][width];
  unsigned live[vectors];
  double count = 0, sum = 0, squares = 0;
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    live[v] = load_live<T>(a, int64_t(blockIdx.x) * kPart + (v * kThreads + int64_t(threadIdx.x)) * width, x[v]);
    count += __popc(live[v]);
#pragma unroll
    for (int j = 0; j < width; ++j) sum += x[v][j];
  }
  count = block_sum(count, shared[0]);
  const double mean = block_sum(sum, shared[1]) / (count > 0 ? count : 1);
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const double centred = live[v] >> j & 1 ? x[v][j] - mean : 0;
      squares += centred * centred;
    }
  }
  squares = block_sum(squares, shared[2]);
  if (threadIdx.x == 0) {
    double* part_ptr = partial_ptr + int64_t(blockIdx.x) * 3;
    part_ptr[0] = count, part_ptr[1] = mean, part_ptr[2] = squares;
  }
}

// All parts as one.
//
// Computes: count, mean and squares of the whole
// Grid: (1,): 24 bytes for every kPart elements of whiten_parts_kernel is next to nothing
// Traffic: 24 bytes a part
// Numerics: fp64; every 256th part in a thread in order, then a tree
// Gradient: none flows
__global__ void __launch_bounds__(kThreads)
    whiten_join_kernel(const double* partial_ptr, int64_t parts, double* stats_ptr) {
  __shared__ Moments shared[kThreads];
  Moments own = {0, 0, 0};
  for (int64_t p = threadIdx.x; p < parts; p += kThreads) {
    own = join(own, {partial_ptr[3 * p], partial_ptr[3 * p + 1], partial_ptr[3 * p + 2]});
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    shared[threadIdx.x] = own;
    __syncthreads();
    if (threadIdx.x < half) own = join(own, shared[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) stats_ptr[0] = own.count, stats_ptr[1] = own.mean, stats_ptr[2] = own.squares;
}

// Normalised elements.
//
// Computes: (x − mean)/sqrt(squares/(count − 1) + ε), plus the mean unless shift_mean
// Grid: (parts,), block -> kPart elements
// Traffic: an element and its mask read, 4 bytes written
// Numerics: fp64, rounded once. One live element: 0. Dead ones: 0
// Gradient: none flows
template <class T>
__global__ void __launch_bounds__(kThreads) whiten_apply_kernel(const WhitenTensors a, const double* stats_ptr,
                                                                const Number eps, bool shift_mean, float* out_ptr) {
  constexpr int width = kVec<T>, vectors = kOfThread / width;
  const double count = stats_ptr[0], mean = stats_ptr[1];
  const double variance = stats_ptr[2] / (count > 2 ? count - 1 : 1) + double(read_any_number(eps, 0));
  const double scale = 1 / sqrt(variance), kept = shift_mean ? 0 : mean;
  for (int v = 0; v < vectors; ++v) {
    const int64_t i = int64_t(blockIdx.x) * kPart + (v * kThreads + int64_t(threadIdx.x)) * width;
    float x[width];
    const unsigned live = load_live<T>(a, i, x);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const double normalised = count == 1 ? 0 : (x[j] - mean) * scale;
      x[j] = live >> j & 1 ? float(normalised + kept) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < width; j += 4) {
      if (i + j + 4 <= a.N && on_16_bytes(out_ptr + i + j)) {
        Vec<float> vec;
#pragma unroll
        for (int k = 0; k < 4; ++k) vec.values[k] = x[j + k];
        store_vec(out_ptr + i + j, vec);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (i + j + k < a.N) out_ptr[i + j + k] = x[j + k];
        }
      }
    }
  }
}

}  // namespace

int64_t whiten_parts(int64_t N) { return (N + kPart - 1) / kPart; }

cudaError_t whiten_stats(const WhitenTensors& a, double* partial_ptr, double* stats_ptr, cudaStream_t stream) {
  const int64_t parts = whiten_parts(a.N);
  if (parts > 0) {
    const unsigned grid = unsigned(parts);
    if (a.dtype == Dtype::fp32) {
      whiten_parts_kernel<float><<<grid, kThreads, 0, stream>>>(a, partial_ptr);
    } else if (a.dtype == Dtype::bf16) {
      whiten_parts_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(a, partial_ptr);
    } else if (a.dtype == Dtype::fp16) {
      whiten_parts_kernel<__half><<<grid, kThreads, 0, stream>>>(a, partial_ptr);
    } else {
      return cudaErrorInvalidValue;
    }
  }
  whiten_join_kernel<<<1, kThreads, 0, stream>>>(partial_ptr, parts, stats_ptr);
  return cudaGetLastError();
}

cudaError_t whiten_apply(const WhitenTensors& a, const double* stats_ptr, Number eps, bool shift_mean, float* out_ptr,
                         cudaStream_t stream) {
  const unsigned grid = unsigned(whiten_parts(a.N));
  if (grid == 0) return cudaSuccess;
  if (a.dtype == Dtype::fp32) {
    whiten_apply_kernel<float><<<grid, kThreads, 0, stream>>>(a, stats_ptr, eps, shift_mean, out_ptr);
  } else if (a.dtype == Dtype::bf16) {
    whiten_apply_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(a, stats_ptr, eps, shift_mean, out_ptr);
  } else if (a.dtype == Dtype::fp16) {
    whiten_apply_kernel<__half><<<grid, kThreads, 0, stream>>>(a, stats_ptr, eps, shift_mean, out_ptr);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace rl4llm
