// policy_loss, kl_estimate and their backward for CUDA tensors, on torch's stable ABI. Kernels are in token_loss.cu
// and token_loss_sequences.cu.
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

Floats floats_of(const Tensor& tensor, const char* name, int64_t numel) {
  const Dtype dtype = dtype_of(tensor, name);
  if (dtype == Dtype::fp64) fail(name, ": wanted float32, bfloat16 or float16 on CUDA, got float64");
  if (!tensor.is_contiguous() || tensor.numel() != numel) {
    fail(name, ": wanted ", numel, " contiguous elements, got ", shape_of(tensor),
         tensor.is_contiguous() ? "" : ", not contiguous");
  }
  return {tensor.data_ptr(), dtype};
}

Floats floats_of(const std::optional<Tensor>& tensor, const char* name, int64_t numel) {
  return tensor ? floats_of(*tensor, name, numel) : Floats{nullptr, Dtype::fp32};
}

Offsets offsets_of(const Tensor& tensor) {
  if (tensor.dim() != 1 || tensor.numel() < 1 || !tensor.is_contiguous()) {
    fail("cu_seqlens: wanted (B+1,), contiguous; got ", shape_of(tensor));
  }
  switch (tensor.scalar_type()) {
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
      return {tensor.data_ptr(), int(tensor.element_size()), true};
    case ScalarType::Byte:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
      return {tensor.data_ptr(), int(tensor.element_size()), false};
    default:
      fail("cu_seqlens: wanted integers, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

// What the two policy ops have in common: inputs checked, results allocated, formulas found by name.
struct PolicyLoss {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  PolicyLossTensors tensors;
  int formula, kl, weight;
  Tensor loss, dlogp, dentropy, scale, metrics, partial;

  // `advantages_of` of them, one a token or one a sequence; `programs` leave sums.
  PolicyLoss(const Tensor& logp, const std::optional<Tensor>& old, const Tensor& advantages, int64_t advantages_of,
             const std::optional<Tensor>& ref, const std::optional<Tensor>& entropy, const std::optional<Tensor>& mask,
             const std::optional<Tensor>& policy_weights, const std::optional<Tensor>& token_weights,
             const std::string& formula_name, const std::string& kl_name, const std::string& aggregation,
             const std::string& correction, bool entropy_grad, int64_t programs)
      : tensors{},
        formula(find(kPolicyNames, formula_name, "formula")),
        kl(ref && !kl_name.empty() ? find(kKlNames, "kl_" + kl_name, "kl") : -1),
        weight(find(kWeightNames, aggregation == "none" ? "token_sum" : aggregation, "aggregation")) {
    const int64_t B = logp.size(0), T = logp.size(1), N = B * T;
    const ScalarType fp32 = ScalarType::Float;
    const bool per_token = aggregation == "none";
    loss = per_token ? empty_like_of(logp, {B, T}, fp32) : empty_like_of(logp, {}, fp32);
    dlogp = empty_like_of(logp, {B, T}, fp32);
    dentropy = entropy_grad ? empty_like_of(logp, {B, T}, fp32) : empty_like_of(logp, {0}, fp32);
    scale = empty_like_of(logp, {B}, fp32);
    metrics = empty_like_of(logp, {int64_t(formulas::num_metrics)}, fp32);
    partial = empty_like_of(logp, {token_loss_partials(programs)}, fp32);
    tensors.B = B, tensors.T = T;
    tensors.logp = floats_of(logp, "logp", N);
    tensors.old = floats_of(old, "old", N);
    tensors.adv = floats_of(advantages, "advantages", advantages_of);
    tensors.ref = floats_of(kl >= 0 ? ref : std::nullopt, "ref", N);
    tensors.entropy = floats_of(entropy, "entropy", N);
    tensors.mask_ptr = data_of<bool>(mask, "mask", N);
    tensors.policy_weights = floats_of(policy_weights, "policy_weights", N);
    tensors.token_weights = floats_of(token_weights, "token_weights", N);
    tensors.one_adv = advantages_of != N;
    tensors.correction = correction.empty() ? -1 : find(kCorrectionNames, "rollout_" + correction, "correction");
    tensors.loss_ptr = floats(loss), tensors.loss_per_token = per_token;
    tensors.dlogp_ptr = floats(dlogp), tensors.dentropy_ptr = entropy_grad ? floats(dentropy) : nullptr;
    tensors.scale_ptr = floats(scale), tensors.metrics_ptr = floats(metrics), tensors.partial_ptr = floats(partial);
  }
  Results results() const { return {loss, dlogp, dentropy, scale, metrics}; }
};

PolicyLoss::Results policy_loss(Tensor logp, std::optional<Tensor> old, Tensor advantages, std::optional<Tensor> ref,
                                std::optional<Tensor> entropy, std::optional<Tensor> mask,
                                std::optional<Tensor> policy_weights, std::optional<Tensor> token_weights,
                                std::optional<Tensor> log_s, Tensor params, std::string formula, std::string kl,
                                std::string aggregation, std::string correction, bool entropy_grad) {
  constexpr const char* kOp = "policy_loss_fwd";
  if (logp.dim() != 2) fail("logp: wanted (B, T), got ", shape_of(logp));
  const int64_t B = logp.size(0), T = logp.size(1), programs = token_loss_programs(B, T);
  check_programs(kOp, programs);
  const DeviceGuard guard(logp.get_device_index());
  PolicyLoss call(logp, old, advantages, one_per_row(advantages, T) ? B : B * T, ref, entropy, mask, policy_weights,
                  token_weights, formula, kl, aggregation, correction, entropy_grad, programs);
  call.tensors.one_log_s = log_s && one_per_row(*log_s, T);
  call.tensors.log_s = floats_of(log_s, "log_s", call.tensors.one_log_s ? B : B * T);
  check_launch(
      kOp, policy_loss_fwd(call.tensors, params_of(params), call.formula, call.kl, call.weight, current_stream(logp)));
  return call.results();
}

PolicyLoss::Results policy_loss_sequences(Tensor logp, std::optional<Tensor> old, Tensor advantages,
                                          std::optional<Tensor> ref, std::optional<Tensor> entropy,
                                          std::optional<Tensor> mask, std::optional<Tensor> policy_weights,
                                          std::optional<Tensor> token_weights, std::optional<Tensor> cu_seqlens,
                                          Tensor params, std::string formula, std::string kl, std::string aggregation,
                                          std::string correction, bool sequence_ratio, bool sequence_correction,
                                          bool entropy_grad) {
  constexpr const char* kOp = "policy_loss_sequences_fwd";
  if (logp.dim() != 2) fail("logp: wanted (B, T), got ", shape_of(logp));
  const int64_t N = logp.size(0) * logp.size(1);
  if (cu_seqlens && logp.size(0) != 1) fail("logp: wanted (1, N) with cu_seqlens, got ", shape_of(logp));
  PolicySequences sequences = {};
  if (cu_seqlens) sequences.cu_seqlens = offsets_of(*cu_seqlens);
  sequences.count = cu_seqlens ? cu_seqlens->numel() - 1 : logp.size(0);
  check_programs(kOp, sequences.count);
  const bool like_logp =
      advantages.dim() == 2 && advantages.size(0) == logp.size(0) && advantages.size(1) == logp.size(1);
  const DeviceGuard guard(logp.get_device_index());
  PolicyLoss call(logp, old, advantages, like_logp ? N : sequences.count, ref, entropy, mask, policy_weights,
                  token_weights, formula, kl, aggregation, correction, entropy_grad, sequences.count);
  call.tensors.one_adv = !like_logp;
  sequences.ratio = sequence_ratio;
  sequences.correction = sequence_correction && call.tensors.correction >= 0;
  if (sequences.correction && !policy_weights) fail("policy_weights: wanted with a correction, got none");
  sequences.one_slope = !like_logp && formula == "gspo";
  // A row's weight is the finisher's; what packed sequences weigh, it cannot know: there it is in the tokens' weights.
  const bool own_weight = cu_seqlens && aggregation.rfind("seq_", 0) == 0;
  sequences.weight = own_weight ? call.weight : -1;
  const int finisher = own_weight ? find(kWeightNames, "token_sum", "aggregation") : call.weight;
  check_launch(kOp, policy_loss_sequences_fwd(call.tensors, sequences, params_of(params), call.formula, call.kl,
                                              finisher, current_stream(logp)));
  return call.results();
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

// Like dlogp, in the dtype of what it is the gradient of.
Tensor gradient_for(const Tensor& derivative, const Tensor& of) {
  if (dtype_of(of, "logp, entropy") == Dtype::fp64) fail("logp, entropy: wanted no float64 on CUDA");
  const int64_t rows = derivative.size(0);
  return derivative.dim() == 1 ? empty_like_of(derivative, {rows}, of.scalar_type())
                               : empty_like_of(derivative, {rows, derivative.size(1)}, of.scalar_type());
}

std::tuple<Tensor, Tensor> bwd(Tensor grad, Tensor logp, std::optional<Tensor> entropy, std::optional<Tensor> scale,
                               Tensor dlogp, Tensor dentropy) {
  constexpr const char* kOp = "token_loss_bwd";
  const int64_t N = dlogp.numel(), B = scale ? dlogp.size(0) : 1, T = B == 0 ? 0 : N / B;
  check_programs(kOp, token_loss_programs(B, T));
  const DeviceGuard guard(dlogp.get_device_index());
  const Tensor grad_logp = gradient_for(dlogp, logp);
  const Tensor grad_entropy = gradient_for(dentropy, entropy ? *entropy : dentropy);
  const bool with_entropy = dentropy.numel() > 0, one_grad = grad.dim() == 0;
  const TokenLossGrads grads = {B,
                                T,
                                data_of<float>(grad, "grad", one_grad ? 1 : N),
                                one_grad,
                                data_of<float>(scale, "scale", B),
                                data_of<float>(dlogp, "dlogp", N),
                                with_entropy ? data_of<float>(dentropy, "dentropy", N) : nullptr,
                                {grad_logp.data_ptr(), dtype_of(grad_logp, "logp")},
                                {grad_entropy.data_ptr(), dtype_of(grad_entropy, "entropy")}};
  check_launch(kOp, token_loss_bwd(grads, current_stream(dlogp)));
  return {grad_logp, grad_entropy};
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CUDA, m) {
  m.impl("policy_loss_fwd", TORCH_BOX(&rl4llm::policy_loss));
  m.impl("policy_loss_sequences_fwd", TORCH_BOX(&rl4llm::policy_loss_sequences));
  m.impl("kl_estimate_fwd", TORCH_BOX(&rl4llm::kl_estimate));
  m.impl("token_loss_bwd", TORCH_BOX(&rl4llm::bwd));
}
