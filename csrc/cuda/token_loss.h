// What token_loss_bind.cpp (torch's stable ABI) and token_loss.cu (kernels, no torch headers) know of each other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "token_formulas_gen.h"

namespace rl4llm {

constexpr int kParams = formulas::num_params + formulas::max_knobs;

// The hyperparameters of a call: on the device, read when the kernels run, or by value where ptr is null.
struct TokenLossParams {
  const double* ptr;
  double values[kParams];
};

struct PolicyLossTensors {
  int64_t B, T;
  const float* logp_ptr;  // (B, T)
  const float* old_ptr;   // (B, T) or null: logp
  const float* adv_ptr;   // (B, T) or (B, 1)
  const float* ref_ptr;   // (B, T) or null, here and below: absent
  const float* entropy_ptr;
  const bool* mask_ptr;
  const float* policy_weights_ptr;  // ω; with a correction: the sampler's log-probabilities
  const float* token_weights_ptr;
  const float* log_s_ptr;  // (B, T) or (B, 1)
  bool one_adv, one_log_s;
  int correction;   // its place in RL4LLM_CORRECTION_FORMULAS, or −1
  float* loss_ptr;  // () or (B, T)
  bool loss_per_token;
  float* dlogp_ptr;     // (B, T)
  float* dentropy_ptr;  // (B, T) or null
  float* scale_ptr;     // (B,)
  float* metrics_ptr;   // (formulas::num_metrics,)
  float* partial_ptr;   // token_loss_partials(B, T) floats
};

struct TokenLossGrads {
  int64_t B, T;
  const float* grad_ptr;  // () or (B, T)
  bool one_grad;
  const float* scale_ptr;  // (B,) or null: 1
  const float* dlogp_ptr;  // (B, T)
  const float* dentropy_ptr;
  float* grad_logp_ptr;
  float* grad_entropy_ptr;
};

struct KlEstimateTensors {
  int64_t N;
  const float* logp_ptr;  // (N,)
  const float* ref_ptr;
  const float* old_ptr;  // or null: logp
  const bool* mask_ptr;
  float* kl_ptr;
  float* dkl_ptr;
};

int64_t token_loss_programs(int64_t B, int64_t T);
int64_t token_loss_partials(int64_t B, int64_t T);

// formula, kl: positions in RL4LLM_POLICY_FORMULAS and RL4LLM_KL_FORMULAS; weight: in RL4LLM_WEIGHT_FORMULAS.
cudaError_t policy_loss_fwd(const PolicyLossTensors& tensors, const TokenLossParams& params, int formula, int kl,
                            int weight, cudaStream_t stream);
cudaError_t kl_estimate_fwd(const KlEstimateTensors& tensors, int kl, cudaStream_t stream);
cudaError_t token_loss_bwd(const TokenLossGrads& grads, cudaStream_t stream);

}  // namespace rl4llm
