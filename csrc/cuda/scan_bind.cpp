// gae, its backward, vtrace and n_step_returns for CUDA tensors, on torch's stable ABI. Kernels are in scan.cu and
// n_step.cu.
#include <algorithm>
#include <tuple>

#include "cuda/bind.h"
#include "cuda/scan.h"

namespace rl4llm {
namespace {

// A launch in the making: the layout, and every tensor checked against it.
class Scan {
 public:
  ScanTensors a = {};

  Scan(const char* op, const Tensor& tokens, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens,
       const std::string& mask_mode)
      : op_(op), tokens_(tokens), packed_(cu_seqlens.has_value()) {
    if (mask_mode != "skip" && mask_mode != "zero") fail("mask_mode: wanted skip or zero, got ", mask_mode);
    if (tokens.dim() != (packed_ ? 1 : 2)) {
      fail("tokens: wanted (B, T), or packed (N,) with cu_seqlens; got ", shape_of(tokens));
    }
    a.dtype = dtype_of(tokens, "tokens");
    if (a.dtype == Dtype::fp64) fail("tokens: wanted float32, bfloat16 or float16 on CUDA, got float64");
    a.skip = mask_mode == "skip";
    a.T = tokens.size(tokens.dim() - 1);
    constexpr int64_t kMost = (int64_t(1) << 31) - 4096;  // places are counted in int32, up to the end of the last part
    if (a.T > kMost) fail("tokens: wanted at most ", kMost, " in a row or a pack, got ", shape_of(tokens));
    if (packed_) {
      a.offsets_ptr = data_of<int64_t>(*cu_seqlens, "cu_seqlens", cu_seqlens->numel());
      a.B = cu_seqlens->numel() - 1;
    } else {
      a.B = tokens.size(0);
    }
    if (mask) {
      if (mask->scalar_type() != ScalarType::Bool) fail("mask: wanted bool");
      a.mask = at(*mask, "mask");
    }
    check_programs(op, scan_slots(a.B, a.T, packed_));
  }
  void input(int i, const std::optional<Tensor>& tensor, const char* name) {
    if (!tensor) return;
    if (tensor->scalar_type() != tokens_.scalar_type()) fail(name, ": wanted the dtype of the other tokens");
    a.inputs[i] = at(*tensor, name);
  }
  Tensor result(int i) {
    const Tensor out = packed_ ? empty_like_of(tokens_, {a.T}, ScalarType::Float)
                               : empty_like_of(tokens_, {a.B, a.T}, ScalarType::Float);
    a.out_ptr[i] = static_cast<float*>(out.data_ptr());
    return out;
  }
  void run(cudaError_t (*launch)(const ScanTensors&, cudaStream_t)) {
    run(scan_partials(a.B, a.T, packed_), [&](cudaStream_t stream) { return launch(a, stream); });
  }
  void run_n_step(int64_t n) {
    run(n_step_workspace(a.B, a.T, packed_, a.mask.ptr != nullptr, n),
        [&](cudaStream_t stream) { return n_step_returns(a, n, stream); });
  }

 private:
  template <class Launch>
  void run(int64_t workspace, const Launch& launch) {
    const Tensor partial = empty_like_of(tokens_, {workspace}, ScalarType::Float);
    a.partial_ptr = workspace > 0 ? static_cast<float*>(partial.data_ptr()) : nullptr;
    check_launch(op_, launch(current_stream(tokens_)));
  }
  ScanTokens at(const Tensor& tensor, const char* name) const {
    bool same = tensor.dim() == tokens_.dim();
    for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == tokens_.size(d);
    if (!same) fail(name, ": wanted ", shape_of(tokens_), ", got ", shape_of(tensor));
    return {tensor.data_ptr(), packed_ ? 0 : tensor.stride(0), tensor.stride(tensor.dim() - 1)};
  }

  const char* op_;
  Tensor tokens_;
  bool packed_;
};

ScanNumber scan_number(const Tensor& tensor, const char* name) {
  const Number device = number_of(tensor, name, -1);
  return {device, tensor.is_cuda() ? 0.0 : read_scalar(tensor, name)};
}

constexpr ScanNumber kOne = {{nullptr, Dtype::fp32, false, 0.0f}, 1.0};

std::tuple<Tensor, Tensor> gae_fwd(Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> mask,
                                   std::optional<Tensor> cu_seqlens, std::optional<Tensor> bootstrap,
                                   std::optional<Tensor> kl, Tensor gamma, Tensor lam, Tensor beta,
                                   std::string mask_mode, bool advantages) {
  const Tensor& tokens = kl ? *kl : rewards;
  const DeviceGuard guard(tokens.get_device_index());
  Scan scan("gae_fwd", tokens, mask, cu_seqlens, mask_mode);
  if (kl && (rewards.dim() != tokens.dim() || rewards.numel() != tokens.numel())) {
    scan.a.scores_ptr = data_of<float>(rewards, "rewards", scan.a.B);
  } else {
    scan.input(0, rewards, "rewards");
  }
  scan.input(1, values, "values");
  scan.input(2, kl, "kl");
  scan.a.bootstrap_ptr = data_of<float>(bootstrap, "bootstrap", scan.a.B);
  scan.a.gamma = scan_number(gamma, "gamma");
  scan.a.lam = values ? scan_number(lam, "lam") : kOne;  // without values G = A + V is the Monte-Carlo return
  scan.a.beta = scan_number(beta, "beta");
  const Tensor first = advantages ? scan.result(0) : empty_like_of(tokens, {0}, ScalarType::Float);
  const Tensor returns = scan.result(1);
  scan.run(gae_fwd_scan);
  return {first, returns};
}

std::tuple<Tensor, Tensor, Tensor> gae_bwd(std::optional<Tensor> grad_advantages, std::optional<Tensor> grad_returns,
                                           std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, Tensor gamma,
                                           Tensor lam, std::string mask_mode) {
  if (!grad_advantages && !grad_returns) fail("grad_advantages, grad_returns: wanted at least one");
  const Tensor& tokens = grad_advantages ? *grad_advantages : *grad_returns;
  const DeviceGuard guard(tokens.get_device_index());
  Scan scan("gae_bwd", tokens, mask, cu_seqlens, mask_mode);
  if (scan.a.dtype != Dtype::fp32) fail("grad_advantages, grad_returns: wanted float32");
  scan.input(0, grad_advantages, "grad_advantages");
  scan.input(1, grad_returns, "grad_returns");
  scan.a.gamma = scan_number(gamma, "gamma");
  scan.a.lam = scan_number(lam, "lam");
  const Tensor drewards = scan.result(0), dvalues = scan.result(1);
  const Tensor dbootstrap = empty_like_of(tokens, {scan.a.B}, ScalarType::Float);
  scan.a.x_out_ptr = static_cast<float*>(dbootstrap.data_ptr());
  scan.run(gae_bwd_scan);
  return {drewards, dvalues, dbootstrap};
}

std::tuple<Tensor, Tensor> vtrace(Tensor logp, Tensor rollout_logp, Tensor rewards, Tensor values,
                                  std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                  std::optional<Tensor> bootstrap, Tensor gamma, Tensor lam, Tensor rho_max,
                                  Tensor c_max, std::string mask_mode) {
  const DeviceGuard guard(logp.get_device_index());
  Scan scan("vtrace", logp, mask, cu_seqlens, mask_mode);
  scan.input(0, rewards, "rewards");
  scan.input(1, values, "values");
  scan.input(2, logp, "logp");
  scan.input(3, rollout_logp, "rollout_logp");
  scan.a.bootstrap_ptr = data_of<float>(bootstrap, "bootstrap", scan.a.B);
  scan.a.gamma = scan_number(gamma, "gamma");
  scan.a.lam = scan_number(lam, "lam");
  scan.a.rho_max = scan_number(rho_max, "rho_max");
  scan.a.c_max = scan_number(c_max, "c_max");
  const Tensor advantages = scan.result(0), targets = scan.result(1);
  scan.run(vtrace_scan);
  return {advantages, targets};
}

Tensor n_step_returns_op(Tensor rewards, Tensor values, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                         std::optional<Tensor> bootstrap, int64_t n, Tensor gamma, std::string mask_mode) {
  if (n < 1) fail("n: wanted at least 1, got ", n);
  const DeviceGuard guard(rewards.get_device_index());
  Scan scan("n_step_returns", rewards, mask, cu_seqlens, mask_mode);
  scan.input(0, rewards, "rewards");
  scan.input(1, values, "values");
  scan.a.bootstrap_ptr = data_of<float>(bootstrap, "bootstrap", scan.a.B);
  scan.a.gamma = scan_number(gamma, "gamma");
  const Tensor returns = scan.result(0);
  scan.run_n_step(std::min(n, scan.a.T + 1));  // more steps than tokens: all of them, and the bootstrap value
  return returns;
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CUDA, m) {
  m.impl("gae_fwd", TORCH_BOX(&rl4llm::gae_fwd));
  m.impl("gae_bwd", TORCH_BOX(&rl4llm::gae_bwd));
  m.impl("vtrace", TORCH_BOX(&rl4llm::vtrace));
  m.impl("n_step_returns", TORCH_BOX(&rl4llm::n_step_returns_op));
}
