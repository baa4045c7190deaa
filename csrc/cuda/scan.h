// What scan_bind.cpp (torch's stable ABI), scan.cu and n_step.cu (kernels, no torch headers) know of each other.
#pragma once

#include "cuda/launch.h"

namespace rl4llm {

// Per-token data: (B, T), or packed (N,); ptr null: absent. Strides in elements.
struct ScanTokens {
  const void* ptr;
  int64_t stride_b, stride_t;
};

// A hyperparameter in fp64, so that γλ rounds once; read on the device where device.ptr is given.
struct ScanNumber {
  Number device;
  double value;
};

constexpr int kScanInputs = 4;

struct ScanTensors {
  Dtype dtype;                     // of the inputs
  ScanTokens inputs[kScanInputs];  // gae: rewards, values, kl; its backward: dA, dR; vtrace: rewards, values, logp, μ
  ScanTokens mask;                 // of bool
  const int64_t* offsets_ptr;      // (B+1,) of packed tokens, or null
  const float* scores_ptr;         // (B,) or null
  const float* bootstrap_ptr;      // (B,) or null
  ScanNumber gamma, lam, beta, rho_max, c_max;
  bool skip;
  float* out_ptr[2];   // contiguous; null: not wanted
  float* x_out_ptr;    // (B,): γ times what leaves each sequence, or null
  float* partial_ptr;  // scan_partials(B, T, packed) floats, for n_step_returns n_step_workspace(…)
  int64_t B, T;        // T: of a row, or all packed tokens
};

// Parts of sequences, of one launch: the caller checks them against what one launch holds.
int64_t scan_slots(int64_t B, int64_t T, bool packed);
int64_t scan_partials(int64_t B, int64_t T, bool packed);

cudaError_t gae_fwd_scan(const ScanTensors& tensors, cudaStream_t stream);
cudaError_t gae_bwd_scan(const ScanTensors& tensors, cudaStream_t stream);
cudaError_t vtrace_scan(const ScanTensors& tensors, cudaStream_t stream);

// inputs: rewards, values. masked: whether tensors.mask is given; n at least 1.
int64_t n_step_workspace(int64_t B, int64_t T, bool packed, bool masked, int64_t n);
cudaError_t n_step_returns(const ScanTensors& tensors, int64_t n, cudaStream_t stream);

}  // namespace rl4llm
