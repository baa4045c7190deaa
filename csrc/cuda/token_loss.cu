// policy_loss and kl_estimate from per-token log-probabilities: three launches forward and backward.
//
// A row is cut into segments of kSegment tokens, a block each; a block writes its sums, and a second launch of one
// block joins them. No atomics: the order of adding depends on T alone.
#include "cuda/token_loss.cuh"

namespace rl4llm {
namespace {

constexpr int kSegment = kThreads * kTokens;
// More segments to a row than this, and a warp joins the row; fewer, and one thread does.
constexpr int64_t kWarpRow = 32;

// The policy loss, its derivative and the sums behind the metrics, one segment of a row.
//
// Computes: w_t·(ω_t·ℓ_t + β·kl_t − c₂·H_t) without the weight of the sequence, and its derivatives in logp and H
// Grid: (B·segments,), block -> (row, segment); T alone decides the cut
// Traffic: 2 or 4 bytes a token for each input given, 4 for each derivative written, 1 for the mask
// Numerics: fp32; dead tokens are not loaded, their results exactly 0; sums in one fixed order
// Gradient: dloss/dlogp comes with the value from the generated formula; dloss/dH = −c₂·w_t
template <class Formula>
__global__ void __launch_bounds__(kThreads)
    policy_loss_fwd_kernel(PolicyLossTensors a, TokenLossParams params, int kl, int64_t segments) {
  const int64_t row = blockIdx.x / segments, t0 = blockIdx.x % segments * kSegment;
  const int64_t end = t0 + kSegment < a.T ? t0 + kSegment : a.T;
  const TokenNumbers numbers = read_numbers(params);
  float sums[num_partials];
  start_sums(sums);
  for (int64_t t = t0 + threadIdx.x; t < end; t += blockDim.x) {
    const int64_t n = row * a.T + t;
    const bool live = is_live(a, n);
    const float log_s = live && a.log_s.ptr ? load_float(a.log_s, a.one_log_s ? row : n) : 0.0f;
    policy_token<Formula>(a, numbers, kl, row, n, live, a.policy_weights.ptr != nullptr,
                          {log_s, 1.0f, 1.0f, false, 0.0f}, sums);
  }
  block_join(sums, a.partial_ptr + blockIdx.x, gridDim.x);
}

// The sum of quantity k over the segments of one row, by a whole warp or by one thread.
template <bool warp_row>
__device__ float row_sum(const float* partial_ptr, int k, int64_t row, int64_t segments, int64_t programs) {
  const float* part_ptr = partial_ptr + k * programs + row * segments;
  float total = 0;
  if constexpr (warp_row) {
    for (int64_t s = threadIdx.x % kWarp; s < segments; s += kWarp) total += part_ptr[s];
    return warp_sum(total);
  } else {
    for (int64_t s = 0; s < segments; ++s) total += part_ptr[s];
    return total;
  }
}

// The second launch: the weight of each sequence, the loss and the metrics, from the segments' sums.
//
// Computes: loss = Σ_i scale_i·Σ_t loss_it, scale_i = dp_size·(the aggregation's weight); means over live tokens
// Grid: (1,), one block: it is a few hundred numbers, and no other order of adding them exists
// Traffic: 4·(num_partials + 2) bytes a segment read, 4 a row written
// Numerics: fp32, in one fixed order; no live token: ratios 1, all else 0
// Gradient: token_loss_bwd_kernel multiplies by scale
template <bool warp_row>
__global__ void __launch_bounds__(kFinishThreads, 1)
    policy_loss_finish_kernel(PolicyLossTensors a, TokenLossParams params, int weight, int64_t segments) {
  __shared__ float total[num_partials];
  const int64_t programs = a.B * segments;
  float sums[num_partials];
  start_sums(sums);
  for (int64_t i = threadIdx.x; i < programs; i += blockDim.x) {
#pragma unroll
    for (int k = 0; k < num_partials; ++k) {
      const float part = a.partial_ptr[k * programs + i];
      sums[k] = k == least_ratio ? fminf(sums[k], part) : k == largest_ratio ? fmaxf(sums[k], part) : sums[k] + part;
    }
  }
  block_join(sums, total, 1);

  const float count = total[sum_count], given = read_param(params, formulas::param_num_tokens);
  const float num_sequences = read_param(params, formulas::param_num_sequences);
  const float max_length = read_param(params, formulas::param_max_length);
  const float dp_size = read_param(params, formulas::param_dp_size);
  const int64_t step = warp_row ? blockDim.x / kWarp : blockDim.x;
  float weighted[num_partials] = {};
  for (int64_t row = warp_row ? threadIdx.x / kWarp : threadIdx.x; row < a.B; row += step) {
    const float length = row_sum<warp_row>(a.partial_ptr, sum_count, row, segments, programs);
    const float loss = row_sum<warp_row>(a.partial_ptr, sum_loss, row, segments, programs);
    const float scale =
        dp_size * sequence_weight(weight, length, given >= 0 ? given : count, num_sequences, max_length);
    if (!warp_row || threadIdx.x % kWarp == 0) {
      a.scale_ptr[row] = scale;
      weighted[sum_loss] += scale * loss;
    }
  }
  __shared__ float joined[num_partials];
  block_join(weighted, joined, 1);
  if (threadIdx.x > 0) return;
  if (!a.loss_per_token) a.loss_ptr[0] = joined[sum_loss];

  const bool some = count > 0;
  const float per_token = 1.0f / fmaxf(count, 1.0f);
  // fminf and fmaxf drop NaN, the sum does not; a ratio is at most e^20, so 0·sum is 0 or NaN.
  const float poison = 0.0f * total[sum_ratio];
  const float low = total[sum_clipped_low] * per_token, high = total[sum_clipped_high] * per_token;
  a.metrics_ptr[formulas::metric_clip_fraction] = low + high;
  a.metrics_ptr[formulas::metric_clip_fraction_low] = low;
  a.metrics_ptr[formulas::metric_clip_fraction_high] = high;
  a.metrics_ptr[formulas::metric_ratio_mean] = some ? total[sum_ratio] * per_token : 1.0f;
  a.metrics_ptr[formulas::metric_ratio_min] = some ? total[least_ratio] + poison : 1.0f;
  a.metrics_ptr[formulas::metric_ratio_max] = some ? total[largest_ratio] + poison : 1.0f;
  a.metrics_ptr[formulas::metric_kl_old_k1] = total[sum_k1] * per_token;
  a.metrics_ptr[formulas::metric_kl_old_k3] = total[sum_k3] * per_token;
  a.metrics_ptr[formulas::metric_kl_ref] = total[sum_kl] * per_token;
  a.metrics_ptr[formulas::metric_entropy] = total[sum_entropy] * per_token;
}

// The upstream gradient times the derivatives that the forward pass left.
//
// Computes: g·scale_i·dloss/dlogp, and the same for the entropy
// Grid: (B·segments,), block -> (row, segment)
// Traffic: 6 or 8 bytes a token, twice that with the entropy, 4 more with a gradient per token
// Numerics: fp32; a derivative of 0 stays exactly 0, whatever g is
// Gradient: none: a second derivative raises
__global__ void __launch_bounds__(kThreads) token_loss_bwd_kernel(TokenLossGrads a, int64_t segments) {
  const int64_t row = blockIdx.x / segments, t0 = blockIdx.x % segments * kSegment;
  const int64_t end = t0 + kSegment < a.T ? t0 + kSegment : a.T;
  const float scale = a.scale_ptr ? a.scale_ptr[row] : 1.0f;
  for (int64_t t = t0 + threadIdx.x; t < end; t += blockDim.x) {
    const int64_t n = row * a.T + t;
    const float grad = a.grad_ptr[a.one_grad ? 0 : n] * scale;
    const float dlogp = a.dlogp_ptr[n];
    store_float(a.grad_logp, n, dlogp == 0 ? 0.0f : grad * dlogp);
    if (a.dentropy_ptr) store_float(a.grad_entropy, n, a.dentropy_ptr[n] == 0 ? 0.0f : grad * a.dentropy_ptr[n]);
  }
}

// A sampled estimate of the KL divergence per token, with its derivative.
//
// Computes: k1, k2, k3 or |d| of d = ref − logp, and d/dlogp in the chosen way
// Grid: (ceil(N/kSegment),), block -> tokens
// Traffic: 16 bytes a token, 4 more with old, 1 with the mask
// Numerics: fp32; dead tokens are not loaded, their results exactly 0
// Gradient: comes with the value from the generated formula
__global__ void __launch_bounds__(kThreads) kl_estimate_fwd_kernel(KlEstimateTensors a, int kl) {
  const int64_t n0 = int64_t(blockIdx.x) * kSegment, end = n0 + kSegment < a.N ? n0 + kSegment : a.N;
  for (int64_t n = n0 + threadIdx.x; n < end; n += blockDim.x) {
    formulas::KlToken<float> token = {0.0f, 0.0f};
    if (a.mask_ptr == nullptr || a.mask_ptr[n]) {
      token = kl_token(kl, a.logp_ptr[n], a.ref_ptr[n], a.old_ptr ? a.old_ptr[n] : a.logp_ptr[n]);
    }
    a.kl_ptr[n] = token.kl;
    a.dkl_ptr[n] = token.dkl;
  }
}

int64_t segments_of(int64_t T) { return (T + kSegment - 1) / kSegment; }

}  // namespace

int64_t token_loss_programs(int64_t B, int64_t T) { return B * segments_of(T); }
int64_t token_loss_partials(int64_t programs) { return num_partials * programs; }

cudaError_t policy_loss_fwd(const PolicyLossTensors& tensors, const TokenLossParams& params, int formula, int kl,
                            int weight, cudaStream_t stream) {
  const int64_t segments = segments_of(tensors.T);
  const unsigned programs = unsigned(tensors.B * segments);
  if (programs > 0) {
    int i = 0;
#define RL4LLM_LAUNCH(name)                                                              \
  if (formula == i++) {                                                                  \
    policy_loss_fwd_kernel<formulas::name>                                               \
        <<<programs, threads_of(tensors.T), 0, stream>>>(tensors, params, kl, segments); \
  }
    RL4LLM_POLICY_FORMULAS(RL4LLM_LAUNCH)
  }
  return policy_loss_finish(tensors, params, weight, segments, stream);
}

cudaError_t policy_loss_finish(const PolicyLossTensors& tensors, const TokenLossParams& params, int weight,
                               int64_t segments, cudaStream_t stream) {
  if (segments > kWarpRow) {
    policy_loss_finish_kernel<true><<<1, kFinishThreads, 0, stream>>>(tensors, params, weight, segments);
  } else {
    policy_loss_finish_kernel<false><<<1, kFinishThreads, 0, stream>>>(tensors, params, weight, segments);
  }
  return cudaGetLastError();
}

cudaError_t kl_estimate_fwd(const KlEstimateTensors& tensors, int kl, cudaStream_t stream) {
  if (tensors.N > 0) {
    kl_estimate_fwd_kernel<<<unsigned(segments_of(tensors.N)), kThreads, 0, stream>>>(tensors, kl);
  }
  return cudaGetLastError();
}

cudaError_t token_loss_bwd(const TokenLossGrads& grads, cudaStream_t stream) {
  const int64_t segments = segments_of(grads.T);
  if (grads.B * segments > 0) {
    token_loss_bwd_kernel<<<unsigned(grads.B * segments), threads_of(grads.T), 0, stream>>>(grads, segments);
  }
  return cudaGetLastError();
}

}  // namespace rl4llm
