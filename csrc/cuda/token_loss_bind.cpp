// policy_loss, kl_estimate and their backward for CUDA tensors, on torch's stable ABI. Kernels are in token_loss.cu.
#include <tuple>

#include "cuda/bind.h"
#include "cuda/token_loss.h"

namespace rl4llm {
namespace {

#define RL4LLM_NAME(formula) #formula,
const char* const kPolicyNames[] = {RL4LLM_POLICY_FORMULAS(RL4LLM_NAME)};
const char* const kKlNames[] = {RL4LLM_KL_FORMULAS(RL4LLM_NAME)};
const char* const kCorrectionNames[] = {RL4LLM_CORRECTION_FORMULAS(RL4LLM_NAME)};
const char* const kWeightNames[] = {RL4LLM_WEIGHT_FORMULAS(RL4LLM_NAME)};

template <int count>
int find(const char* const (&names)[count], const std::string& name, const char* argument) {
  for (int i = 0; i < count; ++i) {
    if (name == names[i]) return i;
  }
  fail(argument, ": there is no formula ", name);
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

bool one_per_row(const Tensor& tensor, int64_t T) { return T != 1 && tensor.dim() == 2 && tensor.size(1) == 1; }

TokenLossParams params_of(const Tensor& params) {
  TokenLossParams result = {};
  const double* ptr = data_of<double>(params, "params", kParams);
  if (params.is_cuda()) {
    result.ptr = ptr;
  } else {
    for (int i = 0; i < kParams; ++i) result.values[i] = ptr[i];
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    Tensor logp, std::optional<Tensor> old, Tensor advantages, std::optional<Tensor> ref, std::optional<Tensor> entropy,
    std::optional<Tensor> mask, std::optional<Tensor> policy_weights, std::optional<Tensor> token_weights,
    std::optional<Tensor> log_s, Tensor params, std::string formula, std::string kl, std::string aggregation,
    std::string correction, bool entropy_grad) {
  constexpr const char* kOp = "policy_loss_fwd";
  if (logp.dim() != 2) fail("logp: wanted (B, T), got ", shape_of(logp));
  const int64_t B = logp.size(0), T = logp.size(1), N = B * T;
  const bool per_token = aggregation == "none";
  const bool one_adv = one_per_row(advantages, T), one_log_s = log_s && one_per_row(*log_s, T);
  check_programs(kOp, token_loss_programs(B, T));
  const DeviceGuard guard(logp.get_device_index());
  const ScalarType fp32 = ScalarType::Float;
  const Tensor loss = per_token ? empty_like_of(logp, {B, T}, fp32) : empty_like_of(logp, {}, fp32);
  const Tensor dlogp = empty_like_of(logp, {B, T}, fp32);
  const Tensor dentropy = entropy_grad ? empty_like_of(logp, {B, T}, fp32) : empty_like_of(logp, {0}, fp32);
  const Tensor scale = empty_like_of(logp, {B}, fp32);
  const Tensor metrics = empty_like_of(logp, {int64_t(formulas::num_metrics)}, fp32);
  const Tensor partial = empty_like_of(logp, {token_loss_partials(B, T)}, fp32);
  const bool with_kl = ref && !kl.empty();
  const PolicyLossTensors tensors = {
      B,
      T,
      data_of<float>(logp, "logp", N),
      data_of<float>(old, "old", N),
      data_of<float>(advantages, "advantages", one_adv ? B : N),
      with_kl ? data_of<float>(ref, "ref", N) : nullptr,
      data_of<float>(entropy, "entropy", N),
      data_of<bool>(mask, "mask", N),
      data_of<float>(policy_weights, "policy_weights", N),
      data_of<float>(token_weights, "token_weights", N),
      data_of<float>(log_s, "log_s", one_log_s ? B : N),
      one_adv,
      one_log_s,
      correction.empty() ? -1 : find(kCorrectionNames, "rollout_" + correction, "correction"),
      floats(loss),
      per_token,
      floats(dlogp),
      entropy_grad ? floats(dentropy) : nullptr,
      floats(scale),
      floats(metrics),
      floats(partial)};
  check_launch(kOp, policy_loss_fwd(tensors, params_of(params), find(kPolicyNames, formula, "formula"),
                                    with_kl ? find(kKlNames, "kl_" + kl, "kl") : -1,
                                    find(kWeightNames, per_token ? "token_sum" : aggregation, "aggregation"),
                                    current_stream(logp)));
  return {loss, dlogp, dentropy, scale, metrics};
}

std::tuple<Tensor, Tensor> kl_estimate(Tensor logp, Tensor ref, std::optional<Tensor> old, std::optional<Tensor> mask,
                                       std::string variant) {
  constexpr const char* kOp = "kl_estimate_fwd";
  const int64_t N = logp.numel();
  check_programs(kOp, token_loss_programs(1, N));
  const DeviceGuard guard(logp.get_device_index());
  const Tensor kl = torch::stable::empty_like(logp), dkl = torch::stable::empty_like(logp);
  const KlEstimateTensors tensors = {N,
                                     data_of<float>(logp, "logp", N),
                                     data_of<float>(ref, "ref", N),
                                     data_of<float>(old, "old", N),
                                     data_of<bool>(mask, "mask", N),
                                     floats(kl),
                                     floats(dkl)};
  check_launch(kOp, kl_estimate_fwd(tensors, find(kKlNames, "kl_" + variant, "variant"), current_stream(logp)));
  return {kl, dkl};
}

std::tuple<Tensor, Tensor> bwd(Tensor grad, Tensor logp, std::optional<Tensor> entropy, std::optional<Tensor> scale,
                               Tensor dlogp, Tensor dentropy) {
  constexpr const char* kOp = "token_loss_bwd";
  const int64_t N = dlogp.numel(), B = scale ? dlogp.size(0) : 1, T = B == 0 ? 0 : N / B;
  check_programs(kOp, token_loss_programs(B, T));
  const DeviceGuard guard(dlogp.get_device_index());
  const Tensor grad_logp = torch::stable::empty_like(dlogp), grad_entropy = torch::stable::empty_like(dentropy);
  const bool with_entropy = dentropy.numel() > 0, one_grad = grad.dim() == 0;
  const TokenLossGrads grads = {B,
                                T,
                                data_of<float>(grad, "grad", one_grad ? 1 : N),
                                one_grad,
                                data_of<float>(scale, "scale", B),
                                data_of<float>(dlogp, "dlogp", N),
                                with_entropy ? data_of<float>(dentropy, "dentropy", N) : nullptr,
                                floats(grad_logp),
                                with_entropy ? floats(grad_entropy) : nullptr};
  check_launch(kOp, token_loss_bwd(grads, current_stream(dlogp)));
  return {grad_logp, grad_entropy};
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CUDA, m) {
  m.impl("policy_loss_fwd", TORCH_BOX(&rl4llm::policy_loss));
  m.impl("kl_estimate_fwd", TORCH_BOX(&rl4llm::kl_estimate));
  m.impl("token_loss_bwd", TORCH_BOX(&rl4llm::bwd));
}
