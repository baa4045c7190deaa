// kl_divergence and its backward for CUDA tensors, on torch's stable ABI. Kernels are in kl_fwd.cu and kl_bwd.cu.
#include <tuple>

#include "cuda/bind.h"
#include "cuda/kl.h"

namespace rl4llm {
namespace {

Divergence divergence_of(const std::string& direction) {
  if (direction == "reverse") return Divergence::reverse;
  if (direction == "forward") return Divergence::forward;
  if (direction == "jsd") return Divergence::jsd;
  fail("direction: wanted reverse, forward or jsd, got ", direction);
}

KlSide side_of(const Rows& rows, const Tensor& logits, const char* name) {
  const Dtype dtype = dtype_of(logits, name);
  if (dtype == Dtype::fp64) fail(name, ": wanted float32, bfloat16 or float16 on CUDA, got float64");
  return {rows.base_ptr, dtype, rows.stride_b, rows.stride_t};
}

KlRows rows_of(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask,
               const Tensor& temperature, const std::optional<Tensor>& softcap, const std::string& direction,
               const Tensor& beta) {
  const Rows rows(logits, "logits"), ref(ref_logits, "ref_logits");
  if (ref.B != rows.B || ref.T != rows.T || ref.V != rows.V) {
    fail("ref_logits: wanted ", shape_of(logits), " like logits, got ", shape_of(ref_logits));
  }
  if (ref_logits.get_device_index() != logits.get_device_index()) fail("ref_logits: wanted the device of logits");
  const Number none = {nullptr, Dtype::fp32, false, 0.0f};
  const Divergence divergence = divergence_of(direction);
  return {side_of(rows, logits, "logits"),
          side_of(ref, ref_logits, "ref_logits"),
          rows.N,
          rows.T,
          rows.V,
          data_of<bool>(mask, "mask", rows.N),
          number_of(temperature, "temperature", rows.N),
          softcap ? number_of(*softcap, "softcap", -1) : none,
          softcap.has_value(),
          divergence,
          divergence == Divergence::jsd ? number_of(beta, "beta", -1) : none};
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fwd(Tensor logits, Tensor ref_logits,
                                                               std::optional<Tensor> mask, Tensor temperature,
                                                               std::optional<Tensor> softcap, std::string direction,
                                                               Tensor beta) {
  constexpr const char* kOp = "kl_divergence_fwd";
  const KlRows rows = rows_of(logits, ref_logits, mask, temperature, softcap, direction, beta);
  check_programs(kOp, kl_divergence_fwd_programs(rows));
  const DeviceGuard guard(logits.get_device_index());
  const auto fresh = [&](int64_t size) { return empty_like_of(logits, {size}, ScalarType::Float); };
  const Tensor kl = fresh(rows.N), row_max = fresh(rows.N), log_sum = fresh(rows.N);
  const Tensor inner = empty_like_of(logits, {rows.N, 2}, ScalarType::Double);
  const Tensor ref_row_max = fresh(rows.N), ref_log_sum = fresh(rows.N);
  const Tensor partial = fresh(kl_divergence_partials(rows.N, rows.V, rows.direction));
  const KlResults results = {floats(partial),
                             floats(kl),
                             static_cast<KlInner*>(inner.data_ptr()),
                             {floats(row_max), floats(log_sum)},
                             {floats(ref_row_max), floats(ref_log_sum)}};
  check_launch(kOp, kl_divergence_fwd(rows, results, current_stream(logits)));
  return {kl, inner, row_max, log_sum, ref_row_max, ref_log_sum};
}

// dlogits may be the logits themselves.
void bwd_into(const Tensor& dlogits, const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask,
              const Tensor& temperature, const std::optional<Tensor>& softcap, const std::string& direction,
              const Tensor& beta, const Tensor& inner, const Tensor& row_max, const Tensor& log_sum,
              const Tensor& ref_row_max, const Tensor& ref_log_sum, const Tensor& grad) {
  constexpr const char* kOp = "kl_divergence_bwd";
  const KlRows rows = rows_of(logits, ref_logits, mask, temperature, softcap, direction, beta);
  check_programs(kOp, kl_divergence_bwd_programs(rows));
  const KlGrads grads = {
      reinterpret_cast<const KlInner*>(data_of<double>(inner, "inner", 2 * rows.N)),
      {data_of<float>(row_max, "row_max", rows.N), data_of<float>(log_sum, "log_sum", rows.N)},
      {data_of<float>(ref_row_max, "ref_row_max", rows.N), data_of<float>(ref_log_sum, "ref_log_sum", rows.N)},
      data_of<float>(grad, "grad", rows.N),
      dlogits.data_ptr(),
      dlogits.stride(0),
      dlogits.stride(1)};
  const DeviceGuard guard(logits.get_device_index());
  check_launch(kOp, kl_divergence_bwd(rows, grads, current_stream(logits)));
}

Tensor bwd(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask, Tensor temperature,
           std::optional<Tensor> softcap, std::string direction, Tensor beta, Tensor inner, Tensor row_max,
           Tensor log_sum, Tensor ref_row_max, Tensor ref_log_sum, Tensor grad) {
  const DeviceGuard guard(logits.get_device_index());
  const Tensor dlogits = empty_like_of(logits, {logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type());
  bwd_into(dlogits, logits, ref_logits, mask, temperature, softcap, direction, beta, inner, row_max, log_sum,
           ref_row_max, ref_log_sum, grad);
  return dlogits;
}

void bwd_in_place(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask, Tensor temperature,
                  std::optional<Tensor> softcap, std::string direction, Tensor beta, Tensor inner, Tensor row_max,
                  Tensor log_sum, Tensor ref_row_max, Tensor ref_log_sum, Tensor grad) {
  bwd_into(logits, logits, ref_logits, mask, temperature, softcap, direction, beta, inner, row_max, log_sum,
           ref_row_max, ref_log_sum, grad);
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CUDA, m) {
  m.impl("kl_divergence_fwd", TORCH_BOX(&rl4llm::fwd));
  m.impl("kl_divergence_bwd", TORCH_BOX(&rl4llm::bwd));
  m.impl("kl_divergence_bwd_", TORCH_BOX(&rl4llm::bwd_in_place));
}
