// What token_loss_bind.cpp (torch's stable ABI), token_loss.cu and token_loss_sequences.cu (kernels, no torch headers)
// know of each other.
#pragma once

#include "cuda/launch.h"
#include "token_formulas_gen.h"

namespace rl4llm {

constexpr int kParams = formulas::num_params + formulas::max_knobs;

// The hyperparameters of a call: on the device, read when the kernels run, or by value where ptr is null.
struct TokenLossParams {
  const double* ptr;
  double values[kParams];
};

// Contiguous numbers in fp32, bf16 or fp16, each tensor of a call in its own; ptr null: absent.
struct Floats {
  const void* ptr;
  Dtype dtype;
};

// The same to be written.
struct FloatsOut {
  void* ptr;
  Dtype dtype;
};

struct PolicyLossTensors {
  int64_t B, T;  // packed tokens are one row
  Floats logp;   // (B, T)
  Floats old;    // (B, T) or absent: logp
  Floats adv;    // (B, T) or one a sequence
  Floats ref;    // (B, T) or absent, and so below
  Floats entropy;
  const bool* mask_ptr;
  Floats policy_weights;  // ω; with a correction: the sampler's log-probabilities
  Floats token_weights;
  Floats log_s;  // (B, T) or (B, 1)
  bool one_adv, one_log_s;
  int correction;   // its place in RL4LLM_CORRECTION_FORMULAS, or −1
  float* loss_ptr;  // () or (B, T)
  bool loss_per_token;
  float* dlogp_ptr;     // (B, T)
  float* dentropy_ptr;  // (B, T) or null
  float* scale_ptr;     // (B,)
  float* metrics_ptr;   // (formulas::num_metrics,)
  float* partial_ptr;   // token_loss_partials of the programs
};

// Offsets of packed sequences in any integer dtype; ptr null: every row is a sequence.
struct Offsets {
  const void* ptr;
  int bytes;
  bool is_signed;
};

// What policy_loss_sequences_fwd makes of whole sequences.
struct PolicySequences {
  Offsets cu_seqlens;  // (count + 1,)
  int64_t count;
  bool ratio;       // log s: the mean of logp − old
  bool correction;  // ω from the sum of old − policy_weights
  bool one_slope;   // all tokens move the one ratio alike
  int weight;       // of the sequence in its tokens' weights, by its place in RL4LLM_WEIGHT_FORMULAS; −1: none
};

struct TokenLossGrads {
  int64_t B, T;
  const float* grad_ptr;  // () or (B, T)
  bool one_grad;
  const float* scale_ptr;  // (B,) or null: 1
  const float* dlogp_ptr;  // (B, T)
  const float* dentropy_ptr;
  FloatsOut grad_logp;
  FloatsOut grad_entropy;
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

// Programs (blocks of threads) of a launch over (B, T), and the sums that as many programs leave.
int64_t token_loss_programs(int64_t B, int64_t T);
int64_t token_loss_partials(int64_t programs);

// formula, kl: positions in RL4LLM_POLICY_FORMULAS and RL4LLM_KL_FORMULAS; weight: in RL4LLM_WEIGHT_FORMULAS.
cudaError_t policy_loss_fwd(const PolicyLossTensors& tensors, const TokenLossParams& params, int formula, int kl,
                            int weight, cudaStream_t stream);
cudaError_t policy_loss_sequences_fwd(const PolicyLossTensors& tensors, const PolicySequences& sequences,
                                      const TokenLossParams& params, int formula, int kl, int weight,
                                      cudaStream_t stream);
// The second launch of both: joins the sums of B rows of so many segments.
cudaError_t policy_loss_finish(const PolicyLossTensors& tensors, const TokenLossParams& params, int weight,
                               int64_t segments, cudaStream_t stream);
cudaError_t kl_estimate_fwd(const KlEstimateTensors& tensors, int kl, cudaStream_t stream);
cudaError_t token_loss_bwd(const TokenLossGrads& grads, cudaStream_t stream);

}  // namespace rl4llm
