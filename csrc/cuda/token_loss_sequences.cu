// policy_loss where a token's loss takes something of its whole sequence: still three launches, forward and backward.
//
// Those are gspo's ratio, a sequence's sampler correction, and for packed tokens the length of the sequence and an
// advantage per sequence. One block takes one sequence: it goes over it once for what belongs to the whole, and again,
// while the tokens are in the cache, for the losses. Its sums, joined by token_loss.cu's policy_loss_finish_kernel, are
// those of a segment there.
#include "cuda/token_loss.cuh"

namespace rl4llm {
namespace {

// Sums over the live tokens of a sequence.
enum Whole { whole_tokens, whole_log_rho, whole_log_omega, whole_shares, num_wholes };

#define RL4LLM_PLACE(formula) weight_##formula,
enum Weight { RL4LLM_WEIGHT_FORMULAS(RL4LLM_PLACE) };

__device__ __forceinline__ int64_t load_offset(const Offsets& offsets, int64_t i) {
  switch (offsets.bytes) {
    case 1:
      return offsets.is_signed ? static_cast<const int8_t*>(offsets.ptr)[i]
                               : static_cast<const uint8_t*>(offsets.ptr)[i];
    case 2:
      return offsets.is_signed ? static_cast<const int16_t*>(offsets.ptr)[i]
                               : static_cast<const uint16_t*>(offsets.ptr)[i];
    case 4:
      return offsets.is_signed ? static_cast<const int32_t*>(offsets.ptr)[i]
                               : static_cast<const uint32_t*>(offsets.ptr)[i];
    default:
      return static_cast<const int64_t*>(offsets.ptr)[i];
  }
}

__device__ __forceinline__ int64_t within(int64_t x, int64_t N) { return x < 0 ? 0 : x < N ? x : N; }

// A number of each thread joined over the block, the same bits in every thread; `join` over a warp and of two.
template <int count, class Warp, class Pair>
__device__ __forceinline__ void block_all(float (&values)[count], const Warp& of_warp, const Pair& of_two) {
  __shared__ float shared[kThreads / kWarp][count];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const float joined = of_warp(values[k]);
    if (lane == 0) shared[warp][k] = joined;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < count; ++k) {
    values[k] = shared[0][k];
    for (int w = 1; w < warps; ++w) values[k] = of_two(values[k], shared[w][k]);
  }
  __syncthreads();
}

// The length of the longest sequence, for every thread.
__device__ float longest(const Offsets& offsets, int64_t count) {
  float found[1] = {0.0f};
  for (int64_t b = threadIdx.x; b < count; b += blockDim.x) {
    found[0] = fmaxf(found[0], float(load_offset(offsets, b + 1) - load_offset(offsets, b)));
  }
  block_all(found, [](float x) { return warp_max(x); }, [](float x, float y) { return fmaxf(x, y); });
  return found[0];
}

// The policy loss, its derivative and the sums behind the metrics, one sequence.
//
// Computes: as policy_loss_fwd_kernel, with log s = mean(log π − log π_old) for a sequence's ratio, ω from
//     Σ(log π_old − log π_rollout) for a sequence's correction, and the sequence's weight in w_t where there is one
// Grid: (count,), block -> sequence; the threads of a block do not depend on the batch
// Traffic: as policy_loss_fwd_kernel; logp, old, the sampler's log-probabilities, weights and mask are read twice, the
//     second time from the cache
// Numerics: fp32; sums in one fixed order; offsets are cut to [0, N], whatever they hold
// Gradient: as policy_loss_fwd_kernel; of gspo with one advantage every token's share of the policy term moves the one
//     ratio, so that the mean of w_t·ω_t counts
template <class Formula>
__global__ void __launch_bounds__(kThreads, 4)  // left alone, ptxas aims at 40 or 48 registers, and spills 8 bytes
    policy_loss_sequences_kernel(PolicyLossTensors a, PolicySequences s, TokenLossParams params, int kl) {
  const int64_t b = blockIdx.x;
  int64_t start = b * a.T, length = a.T;
  if (s.cu_seqlens.ptr) {
    start = within(load_offset(s.cu_seqlens, b), a.T);
    length = within(load_offset(s.cu_seqlens, b + 1), a.T) - start;
  }
  const TokenNumbers numbers = read_numbers(params);
  const bool own_omega = a.policy_weights.ptr && !s.correction;
  float whole[num_wholes] = {};
  if (s.ratio || s.correction || s.weight >= 0) {
    for (int64_t t = threadIdx.x; t < length; t += blockDim.x) {
      const int64_t n = start + t;
      if (!is_live(a, n)) continue;
      whole[whole_tokens] += 1;
      float old = 0;
      if (s.ratio || s.correction) {
        const float logp = load_float(a.logp, n);
        old = a.old.ptr ? load_float(a.old, n) : logp;
        whole[whole_log_rho] += logp - old;
        if (s.correction) whole[whole_log_omega] += old - load_float(a.policy_weights, n);
      }
      if (s.one_slope) {
        const float share = a.token_weights.ptr ? load_float(a.token_weights, n) : 1.0f;
        whole[whole_shares] += own_omega ? share * token_omega(a, numbers, n, old) : share;
      }
    }
    block_all(whole, [](float x) { return warp_sum(x); }, [](float x, float y) { return x + y; });
  }

  const float tokens = whole[whole_tokens], least_one = fmaxf(tokens, 1.0f);
  OfSequence of = {0.0f, 1.0f, 1.0f, s.one_slope, 0.0f};
  if (s.ratio) of.log_s = whole[whole_log_rho] / least_one;
  if (s.correction) {
    of.omega = corrected(a.correction, whole[whole_log_omega], numbers.rollout_cap, numbers.rollout_floor);
  }
  if (s.weight >= 0) {
    float max_length = read_param(params, formulas::param_max_length);
    if (s.weight == weight_seq_mean_token_sum_norm && max_length < 0) max_length = longest(s.cu_seqlens, s.count);
    const float num_sequences = read_param(params, formulas::param_num_sequences);
    of.weight = sequence_weight(s.weight, tokens, 1.0f, num_sequences, max_length);
  }
  of.slope = of.weight * of.omega * whole[whole_shares] / least_one;

  float sums[num_partials];
  start_sums(sums);
  for (int64_t t = threadIdx.x; t < length; t += blockDim.x) {
    const int64_t n = start + t;
    policy_token<Formula>(a, numbers, kl, b, n, is_live(a, n), own_omega, of, sums);
  }
  block_join(sums, a.partial_ptr + b, gridDim.x);
}

}  // namespace

cudaError_t policy_loss_sequences_fwd(const PolicyLossTensors& tensors, const PolicySequences& sequences,
                                      const TokenLossParams& params, int formula, int kl, int weight,
                                      cudaStream_t stream) {
  const bool packed = sequences.cu_seqlens.ptr != nullptr;
  const unsigned programs = unsigned(sequences.count);
  // Of packed sequences the pack's length must not say how many threads add up one of them.
  const unsigned threads = packed ? unsigned(kThreads) : threads_of(tensors.T);
  if (programs > 0) {
    int i = 0;
#define RL4LLM_LAUNCH(name)                                                                                         \
  if (formula == i++) {                                                                                             \
    policy_loss_sequences_kernel<formulas::name><<<programs, threads, 0, stream>>>(tensors, sequences, params, kl); \
  }
    RL4LLM_POLICY_FORMULAS(RL4LLM_LAUNCH)
  }
  return policy_loss_finish(tensors, params, weight, packed ? sequences.count : 1, stream);
}

}  // namespace rl4llm
