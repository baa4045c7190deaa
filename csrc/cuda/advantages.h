// What advantages_bind.cpp (torch's stable ABI), groups.cu and whiten.cu (kernels, no torch headers) know of each
// other.
#pragma once

#include "cuda/launch.h"

namespace rl4llm {

struct WhitenTensors {
  const void* x_ptr;      // (N,)
  const void* minus_ptr;  // (N,) or null
  Dtype dtype;
  const bool* mask_ptr;  // (N,) or null
  int64_t N;
};

// Answers by their group: place i of the sorted ones is answer order[i], or i itself.
struct Groups {
  const void* rewards_ptr;  // (B,), or (B, K) of steps
  Dtype dtype;
  const int64_t* ids_ptr;    // (B,) sorted, or null: groups of group_size
  const int64_t* order_ptr;  // (B,) or null
  int64_t B, group_size;
  Number eps;
};

struct OutcomeGroups {
  Groups groups;
  const double* batch_stats_ptr;  // (3,): whiten_stats of all rewards, or null: no batch scale
  bool leave_one_out, by_group, unbiased;
  float* advantages_ptr;  // (B,)
};

struct ProcessGroups {
  Groups groups;
  const int64_t* ends_ptr;  // (B, K), −1 where there is no step
  int64_t K, length;
  double* suffix_ptr;     // (B, K)
  float* advantages_ptr;  // (B, length)
};

// Blocks of threads of a launch: the caller checks them against what one launch holds.
int64_t whiten_parts(int64_t N);
int64_t group_blocks(int64_t B);
int64_t process_blocks(int64_t B, int64_t length);

// partial (whiten_parts(N), 3) -> stats (3,): the number of live elements, their mean, Σ (x − mean)²
cudaError_t whiten_stats(const WhitenTensors& tensors, double* partial_ptr, double* stats_ptr, cudaStream_t stream);
cudaError_t whiten_apply(const WhitenTensors& tensors, const double* stats_ptr, Number eps, bool shift_mean,
                         float* out_ptr, cudaStream_t stream);
cudaError_t group_advantages(const OutcomeGroups& groups, cudaStream_t stream);
cudaError_t process_advantages(const ProcessGroups& groups, cudaStream_t stream);

}  // namespace rl4llm
