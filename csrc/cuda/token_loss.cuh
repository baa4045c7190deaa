// What token_loss.cu (segments of rows) and token_loss_sequences.cu share: the policy loss of one token, and sums.
#pragma once

#include "cuda/device.cuh"
#include "cuda/token_loss.h"

namespace rl4llm {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 4;  // of each thread; loads of neighbouring threads are neighbours, whatever T is
constexpr int kFinishThreads = 1024;

// The maths of the formulas: one fp32 number a thread. NaN goes through every function.
struct DeviceMaths {
  typedef float S;
  typedef float F;
  static __device__ __forceinline__ F c(float x) { return x; }
  static __device__ __forceinline__ F exp(F x) { return expf(x); }
  static __device__ __forceinline__ F where(bool condition, F a, F b) { return condition ? a : b; }
  static __device__ __forceinline__ F minimum(F a, F b) { return a < b || a != a ? a : b; }
  static __device__ __forceinline__ F maximum(F a, F b) { return a > b || a != a ? a : b; }
  static __device__ __forceinline__ F clamp(F x, F low, F high) {
    const F raised = x < low ? low : x;
    return raised > high ? high : raised;
  }
  static __device__ __forceinline__ F abs(F x) { return fabsf(x); }
  static __device__ __forceinline__ F sign(F x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }
  static __device__ __forceinline__ F sigmoid(F x) { return 1.0f / (1.0f + expf(-x)); }
};

__device__ __forceinline__ float read_param(const TokenLossParams& params, int i) {
  return float(params.ptr ? params.ptr[i] : params.values[i]);
}

__device__ __forceinline__ float as_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both = {bits};
  return both.value;
}

// Element i. Both widths are loaded as bits and made a number afterwards: no branch waits for a load before the next.
__device__ __forceinline__ float load_float(const Floats& tensor, int64_t i) {
  const uint32_t bits = tensor.dtype == Dtype::fp32 ? static_cast<const uint32_t*>(tensor.ptr)[i]
                                                    : static_cast<const uint16_t*>(tensor.ptr)[i];
  const __half_raw half = {static_cast<unsigned short>(bits)};
  const uint32_t wide = tensor.dtype == Dtype::fp32 ? bits : bits << 16;  // bf16 is the upper half of fp32
  return tensor.dtype == Dtype::fp16 ? to_float(__half(half)) : as_float(wide);
}

__device__ __forceinline__ void store_float(const FloatsOut& tensor, int64_t i, float x) {
  if (tensor.dtype == Dtype::fp32) {
    static_cast<float*>(tensor.ptr)[i] = x;
  } else {
    const __half_raw half = from_float<__half>(x);
    const __nv_bfloat16_raw bf16 = from_float<__nv_bfloat16>(x);
    static_cast<uint16_t*>(tensor.ptr)[i] = tensor.dtype == Dtype::fp16 ? half.x : bf16.x;
  }
}

// What a token needs of the hyperparameters.
struct TokenNumbers {
  float knobs[formulas::max_knobs];
  float kl_coef, entropy_coef, dp_size, rollout_cap, rollout_floor;
};

__device__ __forceinline__ TokenNumbers read_numbers(const TokenLossParams& params) {
  TokenNumbers numbers;
#pragma unroll
  for (int k = 0; k < formulas::max_knobs; ++k) numbers.knobs[k] = read_param(params, formulas::num_params + k);
  numbers.kl_coef = read_param(params, formulas::param_kl_coef);
  numbers.entropy_coef = read_param(params, formulas::param_entropy_coef);
  numbers.dp_size = read_param(params, formulas::param_dp_size);
  numbers.rollout_cap = read_param(params, formulas::param_rollout_cap);
  numbers.rollout_floor = read_param(params, formulas::param_rollout_floor);
  return numbers;
}

__device__ __forceinline__ bool is_live(const PolicyLossTensors& a, int64_t n) {
  return a.mask_ptr == nullptr || a.mask_ptr[n];
}

// One of many KL formulas; every thread of the grid takes the same way.
__device__ __forceinline__ formulas::KlToken<float> kl_token(int kl, float logp, float ref, float old) {
  int i = 0;
#define RL4LLM_KL(formula) \
  if (kl == i++) return formulas::formula::eval<DeviceMaths>(logp, ref, old);
  RL4LLM_KL_FORMULAS(RL4LLM_KL)
  return {not_a_number(0.0f), not_a_number(0.0f)};
}

// ω from log ω.
__device__ __forceinline__ float corrected(int correction, float log_omega, float cap, float floor) {
  int i = 0;
#define RL4LLM_CORRECT(formula) \
  if (correction == i++) return formulas::formula::eval<DeviceMaths>(log_omega, cap, floor);
  RL4LLM_CORRECTION_FORMULAS(RL4LLM_CORRECT)
  return not_a_number(0.0f);
}

// ω of token n, as it is given or made of the sampler's log-probabilities.
__device__ __forceinline__ float token_omega(const PolicyLossTensors& a, const TokenNumbers& numbers, int64_t n,
                                             float old) {
  const float given = load_float(a.policy_weights, n);
  return a.correction < 0 ? given : corrected(a.correction, old - given, numbers.rollout_cap, numbers.rollout_floor);
}

__device__ __forceinline__ float sequence_weight(int weight, float length, float num_tokens, float num_sequences,
                                                 float max_length) {
  int i = 0;
#define RL4LLM_WEIGHT(formula) \
  if (weight == i++) return formulas::formula::eval<DeviceMaths>(length, num_tokens, num_sequences, max_length);
  RL4LLM_WEIGHT_FORMULAS(RL4LLM_WEIGHT)
  return not_a_number(0.0f);
}

__device__ __forceinline__ float warp_min(float x) { return -warp_max(-x); }

// Nothing added up yet.
__device__ __forceinline__ void start_sums(float (&sums)[num_partials]) {
#pragma unroll
  for (int k = 0; k < num_sums; ++k) sums[k] = 0;
  sums[least_ratio] = infinity(0.0f), sums[largest_ratio] = -infinity(0.0f);
}

// Sums (and at the end one minimum, one maximum) of a block's threads, in thread 0's warp, lane k holding number k.
__device__ __forceinline__ void block_join(float (&values)[num_partials], float* out_ptr, int64_t stride) {
  __shared__ float shared[kFinishThreads / kWarp][num_partials];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < num_partials; ++k) {
    const float joined = k == least_ratio     ? warp_min(values[k])
                         : k == largest_ratio ? warp_max(values[k])
                                              : warp_sum(values[k]);
    if (lane == 0) shared[warp][k] = joined;
  }
  __syncthreads();
  if (threadIdx.x < num_partials) {
    const int k = threadIdx.x;
    float total = shared[0][k];
    for (int w = 1; w < warps; ++w) {
      const float part = shared[w][k];
      total = k == least_ratio ? fminf(total, part) : k == largest_ratio ? fmaxf(total, part) : total + part;
    }
    out_ptr[k * stride] = total;
  }
  __syncthreads();
}

// What a token takes of its whole sequence.
struct OfSequence {
  float log_s;
  float omega;     // where the token has none of its own
  float weight;    // times the token's own
  bool one_slope;  // whether all tokens move one ratio
  float slope;     // that stands for w_t·ω_t in it
};

// Stores loss and derivatives of token n, and adds it to the sums. `own_omega`: whether ω is the token's own.
template <class Formula>
__device__ __forceinline__ void policy_token(const PolicyLossTensors& a, const TokenNumbers& numbers, int kl,
                                             int64_t sequence, int64_t n, bool live, bool own_omega,
                                             const OfSequence& of, float (&sums)[num_partials]) {
  float loss = 0, dlogp = 0, dentropy = 0;
  if (live) {
    const float logp = load_float(a.logp, n), old = a.old.ptr ? load_float(a.old, n) : logp;
    const float adv = load_float(a.adv, a.one_adv ? sequence : n);
    const float ref = a.ref.ptr ? load_float(a.ref, n) : 0.0f;
    const float weight = a.token_weights.ptr ? of.weight * load_float(a.token_weights, n) : of.weight;
    const formulas::PolicyToken<float> token =
        Formula::template eval<DeviceMaths>(logp, old, ref, adv, of.log_s, numbers.knobs);
    const float omega = own_omega ? token_omega(a, numbers, n, old) : of.omega;
    loss = token.loss * omega;
    dlogp = of.one_slope ? 0.0f : token.dlogp * omega;
    if (a.ref.ptr) {
      const formulas::KlToken<float> divergence = kl_token(kl, logp, ref, old);
      sums[sum_kl] += divergence.kl;
      // With a coefficient of 0 an estimate that overflowed is a metric and nothing else.
      if (numbers.kl_coef != 0) loss += numbers.kl_coef * divergence.kl, dlogp += numbers.kl_coef * divergence.dkl;
    }
    if (a.entropy.ptr) {
      const float entropy = load_float(a.entropy, n);
      sums[sum_entropy] += entropy;
      if (numbers.entropy_coef != 0) loss -= numbers.entropy_coef * entropy;
      dentropy = -numbers.entropy_coef * weight;
    }
    loss *= weight, dlogp *= weight;
    if (of.one_slope) dlogp += token.dlogp * of.slope;
    sums[sum_count] += 1, sums[sum_loss] += loss;
    sums[sum_clipped_low] += token.clipped_low, sums[sum_clipped_high] += token.clipped_high;
    sums[sum_ratio] += token.ratio, sums[sum_k1] += token.k1, sums[sum_k3] += token.k3;
    sums[least_ratio] = fminf(sums[least_ratio], token.ratio);
    sums[largest_ratio] = fmaxf(sums[largest_ratio], token.ratio);
  }
  if (a.loss_per_token) a.loss_ptr[n] = loss * numbers.dp_size;
  a.dlogp_ptr[n] = dlogp;
  if (a.dentropy_ptr) a.dentropy_ptr[n] = dentropy;
}

// A short row needs no more threads than it has tokens for.
unsigned threads_of(int64_t T) {
  const int64_t wanted = (T + kTokens * kWarp - 1) / (kTokens * kWarp) * kWarp;
  return unsigned(wanted < kThreads ? (wanted < kWarp ? kWarp : wanted) : kThreads);
}

}  // namespace
}  // namespace rl4llm
