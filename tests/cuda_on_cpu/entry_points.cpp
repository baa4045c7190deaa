// C entry points for plugin.py. They pass what the bindings in csrc/cuda/*.cpp pass.
#include "cuda/advantages.h"
#include "cuda/kl.h"
#include "cuda/launch.h"
#include "cuda/scan.h"
#include "cuda/token_loss.h"

extern "C" {

int64_t launches() { return emulator::launches; }

int64_t token_logprobs_parts(int64_t V) { return rl4llm::token_logprobs_parts(V); }

int token_logprobs_fwd(const rl4llm::TokenLogprobsRows* rows, const rl4llm::TokenLogprobsResults* results) {
  return rl4llm::token_logprobs_fwd(*rows, *results, nullptr);
}

int token_logprobs_bwd(const rl4llm::TokenLogprobsRows* rows, const rl4llm::TokenLogprobsGrads* grads) {
  return rl4llm::token_logprobs_bwd(*rows, *grads, nullptr);
}

int64_t kl_divergence_partials(const rl4llm::KlRows* rows) {
  return rl4llm::kl_divergence_partials(rows->N, rows->V, rows->direction);
}

int kl_divergence_fwd(const rl4llm::KlRows* rows, const rl4llm::KlResults* results) {
  return rl4llm::kl_divergence_fwd(*rows, *results, nullptr);
}

int kl_divergence_bwd(const rl4llm::KlRows* rows, const rl4llm::KlGrads* grads) {
  return rl4llm::kl_divergence_bwd(*rows, *grads, nullptr);
}

int64_t scan_partials(int64_t B, int64_t T, bool packed) { return rl4llm::scan_partials(B, T, packed); }

int gae_fwd_scan(const rl4llm::ScanTensors* tensors) { return rl4llm::gae_fwd_scan(*tensors, nullptr); }

int gae_bwd_scan(const rl4llm::ScanTensors* tensors) { return rl4llm::gae_bwd_scan(*tensors, nullptr); }

int vtrace_scan(const rl4llm::ScanTensors* tensors) { return rl4llm::vtrace_scan(*tensors, nullptr); }

int64_t n_step_workspace(int64_t B, int64_t T, bool packed, bool masked, int64_t n) {
  return rl4llm::n_step_workspace(B, T, packed, masked, n);
}

int n_step_returns(const rl4llm::ScanTensors* tensors, int64_t n) {
  return rl4llm::n_step_returns(*tensors, n, nullptr);
}

int64_t whiten_parts(int64_t N) { return rl4llm::whiten_parts(N); }

int whiten_stats(const rl4llm::WhitenTensors* tensors, double* partial_ptr, double* stats_ptr) {
  return rl4llm::whiten_stats(*tensors, partial_ptr, stats_ptr, nullptr);
}

int whiten_apply(const rl4llm::WhitenTensors* tensors, const double* stats_ptr, const rl4llm::Number* eps,
                 bool shift_mean, float* out_ptr) {
  return rl4llm::whiten_apply(*tensors, stats_ptr, *eps, shift_mean, out_ptr, nullptr);
}

int group_advantages(const rl4llm::OutcomeGroups* groups) { return rl4llm::group_advantages(*groups, nullptr); }

int process_advantages(const rl4llm::ProcessGroups* groups) { return rl4llm::process_advantages(*groups, nullptr); }

int64_t token_loss_programs(int64_t B, int64_t T) { return rl4llm::token_loss_programs(B, T); }

int64_t token_loss_partials(int64_t programs) { return rl4llm::token_loss_partials(programs); }

int policy_loss_fwd(const rl4llm::PolicyLossTensors* tensors, const rl4llm::TokenLossParams* params, int formula,
                    int kl, int weight) {
  return rl4llm::policy_loss_fwd(*tensors, *params, formula, kl, weight, nullptr);
}

int policy_loss_sequences_fwd(const rl4llm::PolicyLossTensors* tensors, const rl4llm::PolicySequences* sequences,
                              const rl4llm::TokenLossParams* params, int formula, int kl, int weight) {
  return rl4llm::policy_loss_sequences_fwd(*tensors, *sequences, *params, formula, kl, weight, nullptr);
}

int kl_estimate_fwd(const rl4llm::KlEstimateTensors* tensors, int kl) {
  return rl4llm::kl_estimate_fwd(*tensors, kl, nullptr);
}

int token_loss_bwd(const rl4llm::TokenLossGrads* grads) { return rl4llm::token_loss_bwd(*grads, nullptr); }

}  // extern "C"
