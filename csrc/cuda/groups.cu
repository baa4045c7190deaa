// group_advantages and process_advantages: statistics of groups of answers (docs/math.md section 4, "group" rows).
//
// Answers come sorted by group, stably, so that a group's members keep their order. A warp looks at 32 places of the
// sorted answers and takes the groups that begin there, one after the other: no group need be counted by the host, and
// no table says where they start. Sums are fp64: a group is small beside its tokens, a few rounds of a warp, so that
// unrolling its loops would buy registers and spills only.
#include "cuda/advantages.h"
#include "cuda/scan.cuh"

namespace rl4llm {
namespace {

// The end of the group that begins at a place of the sorted ids: first by doubling steps, since groups are small.
__device__ __forceinline__ int64_t end_of_group(const int64_t* ids_ptr, int64_t start, int64_t B) {
  const int64_t id = ids_ptr[start];
  int64_t low = start, step = 1;  // ids[low] is the group's
  while (low + step < B && ids_ptr[low + step] == id) low += step, step *= 2;
  int64_t high = low + step < B ? low + step : B;  // ids[high] is not
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (ids_ptr[middle] == id) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return high;
}

// use(start, end) for every group that begins at one of the warp's 32 places; all lanes together.
template <class Use>
__device__ __forceinline__ void each_group(const Groups& g, const Use& use) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp * kWarp;
  const int64_t i = first + threadIdx.x % kWarp;
  bool begins = false;
  if (i < g.B) begins = g.ids_ptr ? i == 0 || g.ids_ptr[i] != g.ids_ptr[i - 1] : i % g.group_size == 0;
  for (unsigned found = __ballot_sync(kAllLanes, begins); found; found &= found - 1) {
    const int64_t start = first + __ffs(found) - 1;
    use(start, g.ids_ptr ? end_of_group(g.ids_ptr, start, g.B) : start + g.group_size);
  }
}

__device__ __forceinline__ int64_t answer_at(const Groups& g, int64_t i) { return g.order_ptr ? g.order_ptr[i] : i; }

__device__ __forceinline__ double warp_min(double x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmin(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Outcome advantages.
//
// Computes: (R_i − mean R)/(std R + ε), or that with the batch's std, R_i − mean R, or (R_i − mean R)·G/(G−1)
// Grid: (ceil(B/256),), warp -> the groups that begin at its 32 places
// Traffic: 4 bytes of a reward read three times (cache) and 16 of its place, 4 written
// Numerics: fp64 relative to the group's first reward, every 32nd member in a lane in order, then a tree; 0 where all
//           are equal
// Gradient: none flows
template <class T>
__global__ void __launch_bounds__(kThreads) group_advantages_kernel(const OutcomeGroups a) {
  const int lane = threadIdx.x % kWarp;
  const double eps = read_any_number(a.groups.eps, 0);
  const T* rewards_ptr = static_cast<const T*>(a.groups.rewards_ptr);
  const auto reward = [&](int64_t i) { return double(to_float(rewards_ptr[answer_at(a.groups, i)])); };
  each_group(a.groups, [&](int64_t start, int64_t end) {
    const double first = reward(start), origin = first - first == 0 ? first : 0;
    double total = 0;
    bool differs = false;
#pragma unroll 1
    for (int64_t i = start + lane; i < end; i += kWarp) {
      const double r = reward(i);
      total += r - origin, differs |= r != first;  // NaN equals nothing
    }
    const double size = double(end - start), mean = warp_sum(total) / size;
    differs = __any_sync(kAllLanes, differs) && end - start > 1;
    double divisor = 1;
    if (a.leave_one_out) {
      divisor = (size - 1) / size;
    } else if (a.by_group) {
      double squares = 0;
#pragma unroll 1
      for (int64_t i = start + lane; i < end; i += kWarp) {
        const double centred = (reward(i) - origin) - mean;
        squares += centred * centred;
      }
      const double freedom = size - (a.unbiased ? 1 : 0);
      divisor = sqrt(warp_sum(squares) / (freedom > 1 ? freedom : 1)) + eps;
    } else if (a.batch_stats_ptr) {
      const double freedom = a.batch_stats_ptr[0] - (a.unbiased ? 1 : 0);
      divisor = sqrt(a.batch_stats_ptr[2] / (freedom > 1 ? freedom : 1)) + eps;
    }
    const double scale = 1 / divisor;
#pragma unroll 1
    for (int64_t i = start + lane; i < end; i += kWarp) {
      const double centred = (reward(i) - origin) - mean;
      a.advantages_ptr[answer_at(a.groups, i)] = differs ? float(centred * scale) : 0.0f;
    }
  });
}

// Normalised step rewards, summed from an answer's last step.
//
// Computes: Σ_{k >= j} r̃_k for every step j, r̃ = (r − mean r)/(std r + ε) over all steps of the group
// Grid: (ceil(B/256),), warp -> the groups that begin at its 32 places
// Traffic: 4 + 8 bytes a step read three times (cache), 8 written
// Numerics: fp64; every 32nd step of an answer in a lane in order, then a tree; 0 where all are equal or there is one
// Gradient: none flows
template <class T>
__global__ void __launch_bounds__(kThreads) process_steps_kernel(const ProcessGroups a) {
  const int lane = threadIdx.x % kWarp;
  const T* rewards_ptr = static_cast<const T*>(a.groups.rewards_ptr);
  const double eps = read_any_number(a.groups.eps, 0);
  each_group(a.groups, [&](int64_t start, int64_t end) {
    const auto each_step = [&](const auto& use) {
      for (int64_t i = start; i < end; ++i) {
        const int64_t row = answer_at(a.groups, i) * a.K;
#pragma unroll 1
        for (int64_t j = lane; j < a.K; j += kWarp) {
          if (a.ends_ptr[row + j] >= 0) use(double(to_float(rewards_ptr[row + j])));
        }
      }
    };
    double count = 0, total = 0, squares = 0, low = infinity(0.0), high = -infinity(0.0);
    each_step([&](double r) { count += 1, total += r, low = fmin(low, r), high = fmax(high, r); });
    count = warp_sum(count);
    const double mean = warp_sum(total) / (count > 1 ? count : 1);
    each_step([&](double r) { squares += (r - mean) * (r - mean); });
    squares = warp_sum(squares);
    low = warp_min(low), high = -warp_min(-high);
    const bool constant = count <= 1 || (low == high && mean == mean);  // min and max drop NaN
    const double scale = 1 / (sqrt(squares / (count > 2 ? count - 1 : 1)) + eps);
#pragma unroll 1
    for (int64_t i = start + lane; i < end; i += kWarp) {
      const int64_t row = answer_at(a.groups, i) * a.K;
      double sum = 0;
#pragma unroll 1
      for (int64_t j = a.K - 1; j >= 0; --j) {
        if (!constant && a.ends_ptr[row + j] >= 0) sum += (double(to_float(rewards_ptr[row + j])) - mean) * scale;
        a.suffix_ptr[row + j] = sum;
      }
    }
  });
}

// Advantages of tokens.
//
// Computes: A_t = Σ_{j: index(j) >= t} r̃_j
// Grid: (ceil(B·ceil(length/4)/256),), thread -> four tokens of an answer
// Traffic: a binary search in an answer's ends (cache), 4 bytes a token written
// Numerics: fp64, rounded once
// Gradient: none flows
__global__ void __launch_bounds__(kThreads) process_tokens_kernel(const ProcessGroups a, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t quarters = (a.length + kTokens - 1) / kTokens, answer = i / quarters, t = i % quarters * kTokens;
  const int64_t* ends_ptr = a.ends_ptr + answer * a.K;
  const auto ends_before = [&](int64_t j, int64_t token) { return ends_ptr[j] >= 0 && ends_ptr[j] < token; };
  int64_t step = 0, high = a.K;  // the step that token t belongs to: the first that ends there or later
  while (step < high) {
    const int64_t middle = (step + high) / 2;
    if (ends_before(middle, t)) {
      step = middle + 1;
    } else {
      high = middle;
    }
  }
  float x[kTokens];
#pragma unroll
  for (int k = 0; k < kTokens; ++k) {
    while (step < a.K && ends_before(step, t + k)) ++step;
    x[k] = step < a.K ? float(a.suffix_ptr[answer * a.K + step]) : 0.0f;
  }
  float* row_ptr = a.advantages_ptr + answer * a.length;
  if (t + kTokens <= a.length && on_16_bytes(row_ptr + t)) {
    Vec<float> vec;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) vec.values[k] = x[k];
    store_vec(row_ptr + t, vec);
  } else {
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (t + k < a.length) row_ptr[t + k] = x[k];
    }
  }
}

}  // namespace

int64_t group_blocks(int64_t B) { return (B + kThreads - 1) / kThreads; }

int64_t process_blocks(int64_t B, int64_t length) {
  return (B * ((length + kTokens - 1) / kTokens) + kThreads - 1) / kThreads;
}

cudaError_t group_advantages(const OutcomeGroups& a, cudaStream_t stream) {
  const unsigned grid = unsigned(group_blocks(a.groups.B));
  if (grid == 0) return cudaSuccess;
  if (a.groups.dtype == Dtype::fp32) {
    group_advantages_kernel<float><<<grid, kThreads, 0, stream>>>(a);
  } else if (a.groups.dtype == Dtype::bf16) {
    group_advantages_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(a);
  } else if (a.groups.dtype == Dtype::fp16) {
    group_advantages_kernel<__half><<<grid, kThreads, 0, stream>>>(a);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

cudaError_t process_advantages(const ProcessGroups& a, cudaStream_t stream) {
  if (a.groups.B == 0 || a.length == 0) return cudaSuccess;
  const unsigned grid = unsigned(group_blocks(a.groups.B));
  if (a.groups.dtype == Dtype::fp32) {
    process_steps_kernel<float><<<grid, kThreads, 0, stream>>>(a);
  } else if (a.groups.dtype == Dtype::bf16) {
    process_steps_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(a);
  } else if (a.groups.dtype == Dtype::fp16) {
    process_steps_kernel<__half><<<grid, kThreads, 0, stream>>>(a);
  } else {
    return cudaErrorInvalidValue;
  }
  const int64_t count = a.groups.B * ((a.length + kTokens - 1) / kTokens);
  const unsigned blocks = unsigned(process_blocks(a.groups.B, a.length));
  process_tokens_kernel<<<blocks, kThreads, 0, stream>>>(a, count);
  return cudaGetLastError();
}

}  // namespace rl4llm
