// The CUDA ops of schemas.py on torch's stable ABI: checks, device, stream, outputs. Kernels are in *.cu.
#include "cuda/bind.h"

#include <dlfcn.h>

#include <tuple>

namespace rl4llm {

cudaStream_t current_stream(const Tensor& tensor) {
  using GetStream = int32_t (*)(int32_t device_index, void** ret_stream);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  if (!get_stream || get_stream(tensor.get_device_index(), &stream) != 0) {
    throw std::runtime_error("rl4llm_fast: this PyTorch does not give its current CUDA stream");
  }
  return static_cast<cudaStream_t>(stream);
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::fp32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    case ScalarType::Double:
      return Dtype::fp64;
    default:
      fail(name, ": wanted float32, bfloat16 or float16, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

Number number_of(const Tensor& tensor, const char* name, int64_t rows) {
  if (tensor.dim() != 0 && (tensor.dim() != 1 || tensor.numel() != rows || !tensor.is_contiguous())) {
    fail(name, ": wanted a number or (", rows, ",), contiguous; got ", shape_of(tensor));
  }
  if (tensor.is_cuda()) return {tensor.data_ptr(), dtype_of(tensor, name), tensor.dim() == 1, 0.0f};
  return {nullptr, Dtype::fp32, false, float(read_scalar(tensor, name))};
}

void check_programs(const char* op, int64_t programs) {
  if (programs >= int64_t(1) << 31) {
    fail(op, ": ", programs, " programs are more than one launch holds (2^31 - 1); split the batch");
  }
}

void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

namespace {

TokenLogprobsRows rows_of(const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& mask,
                          const Tensor& temperature, const std::optional<Tensor>& softcap, int64_t ignore_index) {
  const Rows rows(logits, "logits");
  const Dtype dtype = dtype_of(logits, "logits");
  if (dtype == Dtype::fp64) fail("logits: wanted float32, bfloat16 or float16 on CUDA, got float64");
  if ((token_ids.dim() != 1 && token_ids.dim() != 2) || token_ids.size(0) != rows.N) {
    fail("token_ids: wanted (", rows.N, ",) or (", rows.N, ", K), got ", shape_of(token_ids));
  }
  const int64_t K = token_ids.dim() == 1 ? 1 : token_ids.size(1);
  return {rows.base_ptr,
          dtype,
          rows.N,
          rows.T,
          rows.V,
          K,
          rows.stride_b,
          rows.stride_t,
          data_of<int64_t>(token_ids, "token_ids", rows.N * K),
          data_of<bool>(mask, "mask", rows.N),
          ignore_index,
          token_ids.dim() == 1,
          number_of(temperature, "temperature", rows.N),
          softcap ? number_of(*softcap, "softcap", -1) : Number{nullptr, Dtype::fp32, false, 0.0f},
          softcap.has_value()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(Tensor logits, Tensor token_ids, std::optional<Tensor> mask,
                                               Tensor temperature, std::optional<Tensor> softcap, int64_t ignore_index,
                                               bool return_entropy) {
  constexpr const char* kOp = "token_logprobs_fwd";
  const TokenLogprobsRows rows = rows_of(logits, token_ids, mask, temperature, softcap, ignore_index);
  const int64_t parts = token_logprobs_parts(rows.V);
  check_programs(kOp, rows.N * parts);
  const DeviceGuard guard(logits.get_device_index());
  Tensor logp = rows.K == 1 && rows.id_per_row ? empty_like_of(logits, {rows.N}, ScalarType::Float)
                                               : empty_like_of(logits, {rows.N, rows.K}, ScalarType::Float);
  Tensor entropy = empty_like_of(logits, {return_entropy ? rows.N : 0}, ScalarType::Float);
  Tensor row_max = empty_like_of(logits, {rows.N}, ScalarType::Float);
  Tensor log_sum = empty_like_of(logits, {rows.N}, ScalarType::Float);
  Tensor partial = empty_like_of(logits, {parts > 1 ? rows.N * parts * 3 : 0}, ScalarType::Float);
  const TokenLogprobsResults results = {static_cast<float*>(partial.data_ptr()), static_cast<float*>(logp.data_ptr()),
                                        return_entropy ? static_cast<float*>(entropy.data_ptr()) : nullptr,
                                        static_cast<float*>(row_max.data_ptr()),
                                        static_cast<float*>(log_sum.data_ptr())};
  check_launch(kOp, token_logprobs_fwd(rows, results, current_stream(logits)));
  return {logp, entropy, row_max, log_sum};
}

// dlogits may be the logits themselves.
void bwd_into(const Tensor& dlogits, const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& mask,
              const Tensor& temperature, const std::optional<Tensor>& softcap, int64_t ignore_index,
              const Tensor& row_max, const Tensor& log_sum, const std::optional<Tensor>& entropy,
              const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy) {
  constexpr const char* kOp = "token_logprobs_bwd";
  const TokenLogprobsRows rows = rows_of(logits, token_ids, mask, temperature, softcap, ignore_index);
  if (grad_entropy && !entropy) fail(kOp, ": grad_entropy needs the entropy of the forward pass, got none");
  check_programs(kOp, token_logprobs_bwd_programs(rows));
  const TokenLogprobsGrads grads = {data_of<float>(row_max, "row_max", rows.N),
                                    data_of<float>(log_sum, "log_sum", rows.N),
                                    grad_entropy ? data_of<float>(entropy, "entropy", rows.N) : nullptr,
                                    data_of<float>(grad_logp, "grad_logp", rows.N * rows.K),
                                    data_of<float>(grad_entropy, "grad_entropy", rows.N),
                                    dlogits.data_ptr(),
                                    dlogits.stride(0),
                                    dlogits.stride(1)};
  const DeviceGuard guard(logits.get_device_index());
  check_launch(kOp, token_logprobs_bwd(rows, grads, current_stream(logits)));
}

Tensor bwd(Tensor logits, Tensor token_ids, std::optional<Tensor> mask, Tensor temperature,
           std::optional<Tensor> softcap, int64_t ignore_index, Tensor row_max, Tensor log_sum,
           std::optional<Tensor> entropy, std::optional<Tensor> grad_logp, std::optional<Tensor> grad_entropy) {
  const DeviceGuard guard(logits.get_device_index());
  Tensor dlogits = empty_like_of(logits, {logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type());
  bwd_into(dlogits, logits, token_ids, mask, temperature, softcap, ignore_index, row_max, log_sum, entropy, grad_logp,
           grad_entropy);
  return dlogits;
}

void bwd_in_place(Tensor logits, Tensor token_ids, std::optional<Tensor> mask, Tensor temperature,
                  std::optional<Tensor> softcap, int64_t ignore_index, Tensor row_max, Tensor log_sum,
                  std::optional<Tensor> entropy, std::optional<Tensor> grad_logp, std::optional<Tensor> grad_entropy) {
  bwd_into(logits, logits, token_ids, mask, temperature, softcap, ignore_index, row_max, log_sum, entropy, grad_logp,
           grad_entropy);
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CUDA, m) {
  m.impl("token_logprobs_fwd", TORCH_BOX(&rl4llm::fwd));
  m.impl("token_logprobs_bwd", TORCH_BOX(&rl4llm::bwd));
  m.impl("token_logprobs_bwd_", TORCH_BOX(&rl4llm::bwd_in_place));
}
