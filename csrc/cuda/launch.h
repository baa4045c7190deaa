// What the CUDA ops' bindings (*.cpp, torch's stable ABI) and their kernels (*.cu, no torch headers) know of each
// other: plain structs of raw pointers, and functions that launch on a stream and return without waiting.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rl4llm {

enum class Dtype : int { fp32, bf16, fp16, fp64 };

// A hyperparameter: a number known at launch, or one read on the device when the kernel runs, for all rows or for each.
struct Number {
  const void* ptr;  // () or (N,), or null
  Dtype dtype;      // of ptr
  bool per_row;
  float value;  // where ptr is null
};

// What forward and backward of token_logprobs both read (schemas.py).
struct TokenLogprobsRows {
  const void* logits_ptr;  // (B, T, V), last stride 1
  Dtype dtype;
  int64_t N, T, V, K;
  int64_t stride_b, stride_t;
  const int64_t* token_ids_ptr;  // (N,) or (N, K)
  const bool* mask_ptr;          // (N,) or null
  int64_t ignore_index;
  bool id_per_row;  // ids are (N,): ignore_index takes the whole row out
  Number temperature;
  Number softcap;
  bool has_softcap;
};

struct TokenLogprobsResults {
  float* partial_ptr;  // (N, parts, 3), or null where a row is one part
  float* logp_ptr;     // (N,) or (N, K)
  float* entropy_ptr;  // (N,) or null
  float* row_max_ptr;  // (N,)
  float* log_sum_ptr;  // (N,)
};

struct TokenLogprobsGrads {
  const float* row_max_ptr;       // (N,)
  const float* log_sum_ptr;       // (N,)
  const float* entropy_ptr;       // (N,), or null without grad_entropy
  const float* grad_logp_ptr;     // (N,) or (N, K), or null
  const float* grad_entropy_ptr;  // (N,) or null
  void* dlogits_ptr;              // (B, T, V), last stride 1; may be logits_ptr
  int64_t stride_b, stride_t;     // of dlogits
};

// Programs (blocks of threads) of each launch: the caller checks them against what one launch holds.
int64_t token_logprobs_parts(int64_t V);
int64_t token_logprobs_bwd_programs(const TokenLogprobsRows& rows);

cudaError_t token_logprobs_fwd(const TokenLogprobsRows& rows, const TokenLogprobsResults& results, cudaStream_t stream);
cudaError_t token_logprobs_bwd(const TokenLogprobsRows& rows, const TokenLogprobsGrads& grads, cudaStream_t stream);

}  // namespace rl4llm
