// What token_loss.cpp (checks, rows, threads) calls in token_loss.isa.cpp (the arithmetic on a segment of a row).
#pragma once

#include <stdint.h>

#include "cpu/isa.h"
#include "token_formulas_gen.h"

namespace rl4llm {

// A row of tokens is cut into segments of this many, always: the KL's values for one stay in the L1 cache, and a row's
// sums are the same whatever the batch around it.
constexpr int64_t kSegment = 1024;

template <class S>
struct PolicySegment {
  int64_t length;
  const uint8_t* mask_ptr;      // (length,), or null: every token is live. Null below: absent
  const S* logp_ptr;            // (length,)
  const S* old_ptr;             // (length,); null: logp
  const S* ref_ptr;             // (length,); null: unused by the formula
  const S* adv_ptr;             // (length,), or one value
  const S* log_s_ptr;           // (length,), or one value; null: unused by the formula
  const S* policy_weights_ptr;  // ω; with a correction: the sampler's log-probabilities
  const S* token_weights_ptr;
  const S* kl_ptr;  // (length,), 0 at tokens that are not live
  const S* dkl_ptr;
  const S* entropy_ptr;
  bool one_adv, one_log_s;
  int correction;  // its place in RL4LLM_CORRECTION_FORMULAS, or −1
  S rollout_cap, rollout_floor, kl_coef, entropy_coef;
  const S* knobs;
  S scale;          // the weight of the row, for the derivatives
  S* loss_ptr;      // (length,), or null
  S* dlogp_ptr;     // (length,)
  S* dentropy_ptr;  // (length,), or null
};

template <class S>
struct KlSegment {
  int64_t length;
  const uint8_t* mask_ptr;
  const S* logp_ptr;
  const S* ref_ptr;
  const S* old_ptr;  // null: logp
  S* kl_ptr;
  S* dkl_ptr;
};

#define RL4LLM_COUNT(formula) +1
constexpr int kPolicyFormulas = 0 RL4LLM_POLICY_FORMULAS(RL4LLM_COUNT);
constexpr int kKlFormulas = 0 RL4LLM_KL_FORMULAS(RL4LLM_COUNT);

template <class S>
using PolicyFunction = void (*)(const PolicySegment<S>& segment, double* sums);

template <class S>
struct TokenLossFunctions {
  PolicyFunction<S> policy[kPolicyFormulas];
  void (*kl[kKlFormulas])(const KlSegment<S>& segment);
  // out = g·d, with g one number times, where given, one per token; exactly 0 where d is 0.
  void (*scale)(int64_t length, S g, const S* grad_ptr, const S* d_ptr, S* out_ptr);
};

struct TokenLossKernels {
  TokenLossFunctions<float> fp32;
  TokenLossFunctions<double> fp64;
};

// A user's own formula, compiled for one instruction set: from then on policy_loss_fwd finds it by this name. Code that
// was handed over stays loaded.
void register_policy_formula(const char* name, const char* isa, PolicyFunction<float> fp32,
                             PolicyFunction<double> fp64);

}  // namespace rl4llm

RL4LLM_PER_ISA(TokenLossKernels, token_loss_kernels)
