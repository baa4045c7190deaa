// token_logprobs: log-probabilities of chosen tokens and the entropy, from logits (docs/math.md section 1; formulas in
// hd.h). A row longer than kMaxPart is summed in parts by several blocks of threads, so that a few long rows still fill
// the GPU. V alone decides how a row is cut and in which order its columns are added: the same row gives the same bits
// wherever it stands, on 16 bytes or not.
#include "cuda/rows.cuh"

namespace rl4llm {
namespace {

constexpr int kFwdLoads = 4;  // 16-byte loads a thread keeps in flight; not yet measured
constexpr int kBwdLoads = 2;

template <class T>
constexpr int64_t kFwdGroup = int64_t(kThreads) * kFwdLoads * kVec<T>;  // columns that a block reads at once
template <class T>
constexpr int64_t kBwdGroup = int64_t(kThreads) * kBwdLoads * kVec<T>;

__device__ __forceinline__ bool row_is_live(const TokenLogprobsRows& rows, int64_t row) {
  if (rows.mask_ptr && !rows.mask_ptr[row]) return false;
  return !rows.id_per_row || rows.token_ids_ptr[row] != rows.ignore_index;
}

// Adds the columns in `vecs` to a thread's sums: one rescaling for all of them.
template <class T, bool SOFTCAP, bool ENTROPY>
__device__ __forceinline__ RowSum<float> add_columns(RowSum<float> sums, const Vec<T> (&vecs)[kFwdLoads], float k,
                                                     float softcap) {
  float z[kFwdLoads * kVec<T>];
  float new_max = sums.max;
#pragma unroll
  for (int i = 0; i < kFwdLoads; ++i) {
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      z[i * kVec<T> + j] = shifted_logit<SOFTCAP>(to_float(vecs[i].values[j]), softcap);
      new_max = fmaxf(new_max, z[i * kVec<T> + j]);
    }
  }
  sums = rebase_fast(sums, new_max, k);
  const float reference = new_max == -infinity(0.0f) ? 0.0f : new_max;
#pragma unroll
  for (int i = 0; i < kFwdLoads * kVec<T>; ++i) {
    // NaN: fmaxf dropped it, but 2^NaN puts it into the sum. +inf: inf − inf does the same.
    const float x = (z[i] - reference) * k;
    const float weight = exp2_fast(x);
    sums.sum += weight;
    if (ENTROPY) sums.xsum += weight * fmaxf(x, kLog2Zero);
  }
  return sums;
}

// One thread's share of columns [first, last) of a row.
template <class T, bool SOFTCAP, bool ENTROPY, bool ALIGNED>
__device__ __forceinline__ RowSum<float> sum_columns(const T* row_ptr, int64_t first, int64_t last, float k,
                                                     float softcap) {
  RowSum<float> sums = {-infinity(0.0f), 0.0f, 0.0f};
  Vec<T> vecs[kFwdLoads];
  int64_t start = first + int64_t(threadIdx.x) * kVec<T>;
  constexpr int64_t kStep = int64_t(kThreads) * kVec<T>;
  constexpr int kMore = ALIGNED ? 0 : kBeyond<T>;
  const int64_t columns = last - first > kMore ? last - first - kMore : 0;
  const int64_t whole = first + columns / kFwdGroup<T> * kFwdGroup<T>;
  for (; start < whole; start += kFwdGroup<T>) {
#pragma unroll
    for (int i = 0; i < kFwdLoads; ++i) {
      const T* ptr = row_ptr + start + i * kStep;
      vecs[i] = ALIGNED ? load_vec(ptr) : load_vec_shifted(ptr);
    }
    sums = add_columns<T, SOFTCAP, ENTROPY>(sums, vecs, k, softcap);
  }
  for (int64_t rest = whole; rest < last; rest += kFwdGroup<T>, start += kFwdGroup<T>) {
#pragma unroll
    for (int i = 0; i < kFwdLoads; ++i) {
      const int64_t column = start + i * kStep;
      if (column + kVec<T> + kMore <= last) {
        vecs[i] = ALIGNED ? load_vec(row_ptr + column) : load_vec_shifted(row_ptr + column);
      } else {
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) {
          vecs[i].values[j] = column + j < last ? row_ptr[column + j] : from_float<T>(-infinity(0.0f));
        }
      }
    }
    sums = add_columns<T, SOFTCAP, ENTROPY>(sums, vecs, k, softcap);
  }
  return sums;
}

// Writes a row's results from its sums; called by one whole warp. All 0 where the row is not live.
template <class T, bool SOFTCAP>
__device__ void finish_row(const TokenLogprobsRows& rows, const TokenLogprobsResults& results, int64_t row,
                           const T* row_ptr, bool live, RowSum<float> sums, float tau, float softcap) {
  const int lane = threadIdx.x % kWarp;
  const int64_t* ids_ptr = rows.token_ids_ptr + row * rows.K;
  float row_log_sum = log_sum(sums);
  bool bad = false;
  for (int64_t k = lane; k < rows.K; k += kWarp) {
    const int64_t y = ids_ptr[k];
    bad |= y != rows.ignore_index && (y < 0 || y >= rows.V);
  }
  // One NaN here is a NaN in all that follows from the row, the gradient included, without an id out of bounds ever
  // becoming an address.
  if (__any_sync(kAllLanes, bad)) row_log_sum = not_a_number(0.0f);
  for (int64_t k = lane; k < rows.K; k += kWarp) {
    const int64_t y = ids_ptr[k];
    float logp = 0.0f;
    if (live && y != rows.ignore_index) {
      const bool inside = y >= 0 && y < rows.V;
      const float z = inside ? shifted_logit<SOFTCAP>(to_float(row_ptr[y]), softcap) : 0.0f;
      logp = chosen_logp(z - sums.max, tau, row_log_sum);
    }
    results.logp_ptr[row * rows.K + k] = logp;
  }
  if (lane == 0) {
    if (results.entropy_ptr) results.entropy_ptr[row] = live ? entropy(sums, row_log_sum) : 0.0f;
    results.row_max_ptr[row] = live ? sums.max : 0.0f;
    results.log_sum_ptr[row] = live ? row_log_sum : 0.0f;
  }
}

// Computes: logp = (z'_y − max z')/τ − log s, s = Σ exp((z'_v − max z')/τ), H = log s − Σ p_v (u_v − m)
// Grid: (N·parts,), block -> (row, part); V alone decides the cut, token_logprobs_merge_kernel joins the parts
// Traffic: V·sizeof(T) read, 4·K + 12 bytes written (12·parts more each way when the row is cut)
// Numerics: fp32; per-thread online maximum, threads joined in one tree; −inf is weight 0; NaN, +inf, only −inf: NaN
// Gradient: token_logprobs_bwd_kernel, from row_max and log_sum
template <class T, bool SOFTCAP, bool ENTROPY>
__global__ void __launch_bounds__(kThreads)
    token_logprobs_fwd_kernel(TokenLogprobsRows rows, TokenLogprobsResults results, int parts, int64_t part_columns) {
  const int64_t row = blockIdx.x / unsigned(parts);
  const int part = int(blockIdx.x % unsigned(parts));
  const T* logits_ptr = static_cast<const T*>(rows.logits_ptr);
  const T* row_ptr = row_of(logits_ptr, row, rows.T, rows.stride_b, rows.stride_t);
  const bool live = row_is_live(rows, row);
  const float tau = read_number(rows.temperature, row);
  const float softcap = SOFTCAP ? read_number(rows.softcap, 0) : 0.0f;
  const float k = float(kLog2E) / tau;

  RowSum<float> sums = {-infinity(0.0f), 0.0f, 0.0f};
  if (live) {  // the same for the whole block; a row that is not live is not read at all
    const int64_t first = part * part_columns;
    const int64_t last = first + part_columns < rows.V ? first + part_columns : rows.V;
    sums = on_16_bytes(row_ptr) ? sum_columns<T, SOFTCAP, ENTROPY, true>(row_ptr, first, last, k, softcap)
                                : sum_columns<T, SOFTCAP, ENTROPY, false>(row_ptr, first, last, k, softcap);
  }

  __shared__ RowSum<float> warp_sums[kWarps];
  sums = warp_merge(sums, k);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const RowSum<float> nothing = {-infinity(0.0f), 0.0f, 0.0f};
  sums = warp_merge(threadIdx.x < kWarps ? warp_sums[threadIdx.x] : nothing, k);
  if (parts == 1) {
    finish_row<T, SOFTCAP>(rows, results, row, row_ptr, live, sums, tau, softcap);
  } else if (threadIdx.x == 0) {
    float* partial_ptr = results.partial_ptr + (row * parts + part) * 3;
    partial_ptr[0] = sums.max;
    partial_ptr[1] = sums.sum;
    partial_ptr[2] = sums.xsum;
  }
}

// Computes: max = max_j m_j, s = Σ_j s_j·2^((m_j − max)·k), the same for Σ 2^x·x; then as token_logprobs_fwd_kernel
// Grid: (ceil(N/8),), warp -> row
// Traffic: 12·parts + K·(8 + sizeof(T)) bytes read, 4·K + 12 written
// Numerics: fp32; the parts of a row are joined in one tree that V alone decides; a part of −inf only weighs 0
// Gradient: token_logprobs_bwd_kernel
template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 4)
    token_logprobs_merge_kernel(TokenLogprobsRows rows, TokenLogprobsResults results, int parts) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= rows.N) return;  // the same for the whole warp
  const T* logits_ptr = static_cast<const T*>(rows.logits_ptr);
  const T* row_ptr = row_of(logits_ptr, row, rows.T, rows.stride_b, rows.stride_t);
  const float tau = read_number(rows.temperature, row);
  const float softcap = SOFTCAP ? read_number(rows.softcap, 0) : 0.0f;
  const float k = float(kLog2E) / tau;
  RowSum<float> sums = {-infinity(0.0f), 0.0f, 0.0f};
  for (int part = threadIdx.x % kWarp; part < parts; part += kWarp) {
    const float* partial_ptr = results.partial_ptr + (row * parts + part) * 3;
    const RowSum<float> next = {partial_ptr[0], partial_ptr[1], partial_ptr[2]};
    sums = merge(sums, next, k);
  }
  finish_row<T, SOFTCAP>(rows, results, row, row_ptr, row_is_live(rows, row), warp_merge(sums, k), tau, softcap);
}

// What every thread of a block needs of its row to make the gradient; one thread reads and divides.
struct GradOfRow {
  RowGrad<float> grad;
  float inverse_tau;
};

__device__ GradOfRow grad_of_row(const TokenLogprobsRows& rows, const TokenLogprobsGrads& grads, int64_t row) {
  float grad_logp_sum = 0.0f;
  if (grads.grad_logp_ptr) {
    for (int64_t k = row * rows.K; k < (row + 1) * rows.K; ++k) {
      if (rows.token_ids_ptr[k] != rows.ignore_index) grad_logp_sum += grads.grad_logp_ptr[k];
    }
  }
  const bool has_h = grads.grad_entropy_ptr != nullptr;
  const float tau = read_number(rows.temperature, row);
  return {
      row_grad(grads.row_max_ptr[row], grads.log_sum_ptr[row], has_h ? grads.entropy_ptr[row] : 0.0f, grad_logp_sum,
               has_h ? grads.grad_entropy_ptr[row] : 0.0f, tau, rows.has_softcap ? read_number(rows.softcap, 0) : 0.0f),
      1.0f / tau};
}

// Computes: dL/dz_v = (Σ_k g_k·1[v=y_k] − p_v·(G + h·(log p_v + H)))/τ·(1 − (z'_v/c)²), G = Σ_k g_k
// Grid: (N·ceil((V + kVec − 1)/kBwdGroup),), block -> (row, columns); blocks know nothing of each other
// Traffic: 2·V·sizeof(T), and 20 + 12·K bytes of the row's data per block, from the cache
// Numerics: built in fp32, rounded once; −inf logits and dead rows exactly 0, whatever else is NaN
// Gradient: p_v = exp(u_v − m − log s), so dlogp_y/du_v = 1[v=y] − p_v and dH/du_v = −p_v·(log p_v + H)
template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads, 4)
    token_logprobs_bwd_kernel(TokenLogprobsRows rows, TokenLogprobsGrads grads, unsigned blocks) {
  const int64_t row = blockIdx.x / blocks;
  const T* logits_ptr = static_cast<const T*>(rows.logits_ptr);
  const T* row_ptr = row_of(logits_ptr, row, rows.T, rows.stride_b, rows.stride_t);
  T* dlogits_row_ptr = row_of(static_cast<T*>(grads.dlogits_ptr), row, rows.T, grads.stride_b, grads.stride_t);
  const bool live = row_is_live(rows, row);

  // Vectors are laid on the 16-byte grid of the output, so only the two ends of a row are written element by element.
  const int64_t shift = int64_t((reinterpret_cast<uintptr_t>(dlogits_row_ptr) & 15) / sizeof(T));
  const int64_t block_start = int64_t(blockIdx.x % blocks) * kBwdGroup<T> - shift;
  const int64_t start = block_start + int64_t(threadIdx.x) * kVec<T>;
  constexpr int64_t kStep = int64_t(kThreads) * kVec<T>;

  Vec<T> vecs[kBwdLoads];
#pragma unroll
  for (int i = 0; i < kBwdLoads; ++i) {
    const int64_t column = start + i * kStep;
    const T* ptr = row_ptr + column;
    const int beyond = on_16_bytes(ptr) ? 0 : kBeyond<T>;
    if (live && column >= 0 && column + kVec<T> + beyond <= rows.V) {
      // In place both pointers are one, so no load here can touch what a neighbour has overwritten.
      vecs[i] = on_16_bytes(ptr) ? load_vec(ptr) : load_vec_shifted(ptr);
    } else {
      // Neither −inf columns nor those of a dead row get a gradient.
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) {
        const bool inside = live && column + j >= 0 && column + j < rows.V;
        vecs[i].values[j] = inside ? ptr[j] : from_float<T>(-infinity(0.0f));
      }
    }
  }

  __shared__ GradOfRow shared;
  if (threadIdx.x == 0 && live) shared = grad_of_row(rows, grads, row);
  __syncthreads();
  const RowGrad<float> grad = shared.grad;

  float dz[kBwdLoads * kVec<T>] = {};
  if (live && grads.grad_logp_ptr) {
    for (int64_t k = row * rows.K; k < (row + 1) * rows.K; ++k) {
      const int64_t y = rows.token_ids_ptr[k];
      // Few of many ids fall into this block; the branch is the same for all its threads.
      if (y == rows.ignore_index || y < block_start || y >= block_start + kBwdGroup<T>) continue;
      const float g = grads.grad_logp_ptr[k] * shared.inverse_tau;
#pragma unroll
      for (int i = 0; i < kBwdLoads * kVec<T>; ++i) {
        if (start + i / kVec<T> * kStep + i % kVec<T> == y) dz[i] += g;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kBwdLoads * kVec<T>; ++i) {
    T& value = vecs[i / kVec<T>].values[i % kVec<T>];
    float z = to_float(value), chain = 1.0f;
    const bool masked_out = z == -infinity(0.0f);
    if (SOFTCAP) {
      const float ratio = cap_ratio(z, grad.softcap);
      z = capped(z, ratio, grad.softcap);
      chain = 1.0f - ratio * ratio;
    }
    const float log2_p = (z - grad.max) * grad.k - grad.log2_sum;
    dz[i] += exp2_fast(log2_p) * (fmaxf(log2_p, kLog2Zero) * grad.slope + grad.intercept);
    value = from_float<T>(masked_out ? 0.0f : dz[i] * chain);
  }

#pragma unroll
  for (int i = 0; i < kBwdLoads; ++i) {
    const int64_t column = start + i * kStep;
    T* ptr = dlogits_row_ptr + column;
    if (column >= 0 && column + kVec<T> <= rows.V) {
      store_vec(ptr, vecs[i]);
    } else {
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) {
        if (column + j >= 0 && column + j < rows.V) ptr[j] = vecs[i].values[j];
      }
    }
  }
}

template <class T>
unsigned bwd_blocks(int64_t V) {
  return unsigned(ceil_div(V + kVec<T> - 1, kBwdGroup<T>));
}

template <class T, bool SOFTCAP>
void launch_fwd(const TokenLogprobsRows& rows, const TokenLogprobsResults& results, cudaStream_t stream) {
  const int parts = int(token_logprobs_parts(rows.V));
  const unsigned grid = unsigned(rows.N * parts);
  if (results.entropy_ptr) {
    token_logprobs_fwd_kernel<T, SOFTCAP, true>
        <<<grid, kThreads, 0, stream>>>(rows, results, parts, part_columns(rows.V));
  } else {
    token_logprobs_fwd_kernel<T, SOFTCAP, false>
        <<<grid, kThreads, 0, stream>>>(rows, results, parts, part_columns(rows.V));
  }
  if (parts > 1) {
    const unsigned merge_grid = unsigned(ceil_div(rows.N, kWarps));
    token_logprobs_merge_kernel<T, SOFTCAP><<<merge_grid, kThreads, 0, stream>>>(rows, results, parts);
  }
}

template <class T, bool SOFTCAP>
void launch_bwd(const TokenLogprobsRows& rows, const TokenLogprobsGrads& grads, cudaStream_t stream) {
  const unsigned blocks = bwd_blocks<T>(rows.V);
  const unsigned grid = unsigned(rows.N) * blocks;
  token_logprobs_bwd_kernel<T, SOFTCAP><<<grid, kThreads, 0, stream>>>(rows, grads, blocks);
}

// Calls launch<T, SOFTCAP>() for the rows' dtype.
#define RL4LLM_BY_DTYPE(launch, ...)                                                                    \
  do {                                                                                                  \
    const bool softcap = rows.has_softcap;                                                              \
    switch (rows.dtype) {                                                                               \
      case Dtype::fp32:                                                                                 \
        softcap ? launch<float, true>(__VA_ARGS__) : launch<float, false>(__VA_ARGS__);                 \
        break;                                                                                          \
      case Dtype::bf16:                                                                                 \
        softcap ? launch<__nv_bfloat16, true>(__VA_ARGS__) : launch<__nv_bfloat16, false>(__VA_ARGS__); \
        break;                                                                                          \
      case Dtype::fp16:                                                                                 \
        softcap ? launch<__half, true>(__VA_ARGS__) : launch<__half, false>(__VA_ARGS__);               \
        break;                                                                                          \
      case Dtype::fp64:                                                                                 \
        return cudaErrorInvalidValue;                                                                   \
    }                                                                                                   \
  } while (false)

}  // namespace

int64_t token_logprobs_parts(int64_t V) { return row_parts(V); }

int64_t token_logprobs_bwd_programs(const TokenLogprobsRows& rows) {
  return rows.N * (rows.dtype == Dtype::fp32 ? bwd_blocks<float>(rows.V) : bwd_blocks<__half>(rows.V));
}

cudaError_t token_logprobs_fwd(const TokenLogprobsRows& rows, const TokenLogprobsResults& results,
                               cudaStream_t stream) {
  if (rows.N == 0) return cudaSuccess;
  RL4LLM_BY_DTYPE(launch_fwd, rows, results, stream);
  return cudaGetLastError();
}

cudaError_t token_logprobs_bwd(const TokenLogprobsRows& rows, const TokenLogprobsGrads& grads, cudaStream_t stream) {
  if (rows.N == 0) return cudaSuccess;
  RL4LLM_BY_DTYPE(launch_bwd, rows, grads, stream);
  return cudaGetLastError();
}

}  // namespace rl4llm
