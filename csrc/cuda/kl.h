// What kl_bind.cpp (torch's stable ABI) and kl.cu (kernels, no torch headers) know of each other.
#pragma once

#include "cuda/launch.h"
#include "hd.h"

namespace rl4llm {

enum class Divergence : int { reverse, forward, jsd };

// One set of logits (B, T, V), last stride 1.
struct KlSide {
  const void* ptr;
  Dtype dtype;
  int64_t stride_b, stride_t;
};

// What forward and backward both read (schemas.py).
struct KlRows {
  KlSide logits, ref;
  int64_t N, T, V;
  const bool* mask_ptr;  // (N,) or null
  Number temperature;
  Number softcap;
  bool has_softcap;
  Divergence direction;
  Number beta;
};

// A row of each side, normalised.
struct KlNorms {
  float* row_max_ptr;  // (N,)
  float* log_sum_ptr;  // (N,)
};

struct KlResults {
  float* partial_ptr;  // kl_divergence_partials(N, V, direction) floats
  float* kl_ptr;       // (N,)
  KlInner* inner_ptr;  // (N,)
  KlNorms logits, ref;
};

struct KlGrads {
  const KlInner* inner_ptr;  // (N,), the forward's results
  KlNorms logits, ref;
  const float* grad_ptr;       // (N,)
  void* dlogits_ptr;           // (B, T, V), last stride 1; may be the logits
  int64_t stride_b, stride_t;  // of dlogits
};

// Programs (blocks of threads) of each launch: the caller checks them against what one launch holds.
int64_t kl_divergence_fwd_programs(const KlRows& rows);
int64_t kl_divergence_bwd_programs(const KlRows& rows);
int64_t kl_divergence_partials(int64_t N, int64_t V, Divergence direction);

cudaError_t kl_divergence_fwd(const KlRows& rows, const KlResults& results, cudaStream_t stream);
cudaError_t kl_divergence_bwd(const KlRows& rows, const KlGrads& grads, cudaStream_t stream);

}  // namespace rl4llm
