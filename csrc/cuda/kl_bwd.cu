// The gradient of kl_divergence (docs/math.md section 3, "Exact") with respect to the policy's logits; the values come
// from kl_fwd.cu.
#include "cuda/kl.cuh"

namespace rl4llm {
namespace {

constexpr int kBwdChunks = 2;  // chunks of both sides that a thread keeps in flight; not yet measured

template <class T, class R>
constexpr int64_t kBwdGroup = int64_t(kThreads) * kBwdChunks * kChunk<T, R>;  // columns that a block reads at once

// What every thread of a block needs of its row to make the gradient; one thread reads and divides.
struct GradOfRow {
  float max, log2_sum, ref_max, ref_log2_sum, mean, rest, k, inverse_tau, softcap;
  Mixture mixture;
  float grad;  // upstream, over τ; of the JSD times 1 − β and in bits
};

__device__ GradOfRow grad_of_row(const KlRows& rows, const KlGrads& grads, int64_t row) {
  const float inverse_tau = 1.0f / read_number(rows.temperature, row);
  const bool mixed = rows.direction == Divergence::jsd;
  const float beta = mixed ? read_beta(rows.beta) : 0.0f, mean = float(grads.inner_ptr[row].mean);
  return {grads.logits.row_max_ptr[row],
          grads.logits.log_sum_ptr[row] * float(kLog2E),
          grads.ref.row_max_ptr[row],
          grads.ref.log_sum_ptr[row] * float(kLog2E),
          mean,
          float(grads.inner_ptr[row].mean - mean),
          float(kLog2E) * inverse_tau,
          inverse_tau,
          rows.has_softcap ? read_number(rows.softcap, 0) : 0.0f,
          read_mixture(beta, grads.inner_ptr[row]),
          grads.grad_ptr[row] * inverse_tau * (mixed ? (1 - beta) * float(kLn2) : 1.0f)};
}

// dKL/du_v from softcapped logits of both sides, but for the constant factor of the JSD. The logarithms are made as in
// the forward kernels: what rounding does to a whole row then cancels, where 1/τ would blow it up.
template <Divergence DIRECTION>
__device__ __forceinline__ float shifted_grad(const GradOfRow& row, float z, float w) {
  const float x = z - row.max, y = w - row.ref_max;
  const float log2_p = x * row.k - row.log2_sum, log2_q = y * row.k - row.ref_log2_sum;
  const float p = exp2_fast(log2_p);
  if (DIRECTION == Divergence::forward) return p - exp2_fast(log2_q);
  if (DIRECTION == Divergence::jsd)
    return p * ((log2_ratios(log2_p, log2_q, row.mixture).p_over_m - row.mean) - row.rest);
  // p = 0 has no term, and both logits may be −inf there.
  return p * ((p == 0 ? 0.0f : bounded_difference(x, y)) - row.mean) * row.inverse_tau;
}

// Computes: du = p·((x − y) − Σ p·(x − y))/τ, p − q or (1−β)·p·(log(p/κm) − KL(p‖κm)); dz = g·du/τ·(1 − (z'/c)²)
// Grid: (N·ceil((V + kVec − 1)/kBwdGroup),), block -> (row, columns); blocks know nothing of each other
// Traffic: V·(2·sizeof(T) + sizeof(R)), and 40 bytes of the row's data per block, from the cache
// Numerics: built in fp32, rounded once; −inf logits and dead rows exactly 0, whatever else is NaN
// Gradient: dKL/du_v of docs/math.md section 3; the reference has none
template <class T, class R, bool SOFTCAP, Divergence DIRECTION>
__global__ void __launch_bounds__(kThreads, 4) kl_divergence_bwd_kernel(KlRows rows, KlGrads grads, unsigned blocks) {
  constexpr int kColumns = kChunk<T, R>;
  constexpr int64_t kStep = int64_t(kThreads) * kColumns;
  const int64_t row = blockIdx.x / blocks;
  const T* row_ptr =
      row_of(static_cast<const T*>(rows.logits.ptr), row, rows.T, rows.logits.stride_b, rows.logits.stride_t);
  const R* ref_row_ptr = row_of(static_cast<const R*>(rows.ref.ptr), row, rows.T, rows.ref.stride_b, rows.ref.stride_t);
  T* dlogits_row_ptr = row_of(static_cast<T*>(grads.dlogits_ptr), row, rows.T, grads.stride_b, grads.stride_t);
  const bool live = is_live(rows, row);
  const int64_t last = live ? rows.V : 0;  // neither −inf columns nor those of a dead row get a gradient

  // Vectors are laid on the 16-byte grid of the output, so only the two ends of a row are written element by element.
  // In place no load can touch what a neighbour has overwritten: both pointers are one.
  const int64_t shift = int64_t((reinterpret_cast<uintptr_t>(dlogits_row_ptr) & 15) / sizeof(T));
  const int64_t start = int64_t(blockIdx.x % blocks) * kBwdGroup<T, R> - shift + int64_t(threadIdx.x) * kColumns;
  Columns<T, kColumns> z[kBwdChunks];
  Columns<R, kColumns> w[kBwdChunks];
#pragma unroll
  for (int i = 0; i < kBwdChunks; ++i) {
    load_columns(z[i], row_ptr, start + i * kStep, last);
    load_columns(w[i], ref_row_ptr, start + i * kStep, last);
  }

  __shared__ GradOfRow shared;
  if (threadIdx.x == 0 && live) shared = grad_of_row(rows, grads, row);
  __syncthreads();
  const GradOfRow grad = shared;
#pragma unroll
  for (int i = 0; i < kBwdChunks * kColumns; ++i) {
    T& value = z[i / kColumns][i % kColumns];
    float own = to_float(value), chain = 1.0f;
    const float other = shifted_logit<SOFTCAP>(to_float(w[i / kColumns][i % kColumns]), grad.softcap);
    const bool masked_out = own == -infinity(0.0f);
    if (SOFTCAP) {
      const float ratio = cap_ratio(own, grad.softcap);
      own = capped(own, ratio, grad.softcap);
      chain = 1.0f - ratio * ratio;
    }
    value = from_float<T>(masked_out ? 0.0f : shifted_grad<DIRECTION>(grad, own, other) * grad.grad * chain);
  }
#pragma unroll
  for (int i = 0; i < kBwdChunks; ++i) store_columns(dlogits_row_ptr, start + i * kStep, rows.V, z[i]);
}

template <class T, class R>
unsigned bwd_blocks(int64_t V) {
  return unsigned(ceil_div(V + kVec<T> - 1, kBwdGroup<T, R>));
}

template <class T, class R, Divergence DIRECTION>
void launch_bwd(const KlRows& rows, const KlGrads& grads, cudaStream_t stream) {
  const unsigned blocks = bwd_blocks<T, R>(rows.V);
  const unsigned grid = unsigned(rows.N) * blocks;
  if (rows.has_softcap) {
    kl_divergence_bwd_kernel<T, R, true, DIRECTION><<<grid, kThreads, 0, stream>>>(rows, grads, blocks);
  } else {
    kl_divergence_bwd_kernel<T, R, false, DIRECTION><<<grid, kThreads, 0, stream>>>(rows, grads, blocks);
  }
}

}  // namespace

int64_t kl_divergence_bwd_programs(const KlRows& rows) {
  int64_t programs = 0;
  with_types(rows.logits, rows.ref, [&](auto own, auto other) {
    programs = rows.N * int64_t(bwd_blocks<decltype(own), decltype(other)>(rows.V));
  });
  return programs;
}

cudaError_t kl_divergence_bwd(const KlRows& rows, const KlGrads& grads, cudaStream_t stream) {
  if (rows.N == 0) return cudaSuccess;
  return with_types(rows.logits, rows.ref, [&](auto own, auto other) {
    using T = decltype(own);
    using R = decltype(other);
    switch (rows.direction) {
      case Divergence::reverse:
        return launch_bwd<T, R, Divergence::reverse>(rows, grads, stream);
      case Divergence::forward:
        return launch_bwd<T, R, Divergence::forward>(rows, grads, stream);
      case Divergence::jsd:
        return launch_bwd<T, R, Divergence::jsd>(rows, grads, stream);
    }
  });
}

}  // namespace rl4llm
