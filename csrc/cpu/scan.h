// What scan.cpp (checks, sequences, threads) calls in scan.isa.cpp (the arithmetic on a block of a sequence).
//
// Everything here is one scan, x_t = a_t + b_t·x_{t+1} (docs/math.md section 4), or its adjoint, which runs the other
// way. A sequence is cut into blocks of kBlock tokens, counted from its first; inside a block the scan starts from 0
// and keeps the product of the b beside it, so that x = local + product·x_in, with x_in what comes in from the next
// block. All depends on the sequence's length alone: neither the batch around it nor the number of threads changes a
// bit.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace rl4llm {

constexpr int64_t kBlock = 16384;

enum class ScanElement { same, bf16, fp16 };  // of the inputs; same: the accumulation dtype

enum ScanInput { in_rewards, in_values, in_kl, in_logp = in_kl, in_rollout_logp, num_inputs };
enum ScanGrad { in_grad_advantages, in_grad_returns };

struct ScanNumbers {
  double gamma, lam, beta, rho_max, c_max;
};

template <class S>
struct ScanRow {
  ScanElement element;
  const void* input_ptr[num_inputs];  // at the sequence's first token, or null: absent
  int64_t stride[num_inputs];         // in elements
  const uint8_t* mask_ptr;            // at the first token, or null: every token is live
  int64_t mask_stride;
  bool skip;  // a token that is not live passes x on; else it takes a step with r = V = 0
  S score;    // added to the reward of token score_at
  int64_t score_at;
  S* out_ptr[2];  // at the first token; null: not wanted
  ScanNumbers numbers;
};

// What a block hands on to the next one.
template <class S>
struct ScanState {
  S local, product;  // x = local + product·(the x_in of the block)
  S next_value;      // V of the active token that was met last (V-trace); comes in with the block before
};

// What a walk over a block is for.
enum class ScanUse {
  whole,    // the only block of its sequence: the scan starts from state.local, which is what comes in
  summary,  // one of several: its local and product, nothing written
  part      // the same, with x_in known, and results written
};

template <class S>
struct ScanFunctions {
  // Walks over tokens [begin, end) of one block, from the last to the first (gae_bwd: from the first to the last).
  void (*gae)(const ScanRow<S>& row, int64_t begin, int64_t end, ScanUse use, S x_in, ScanState<S>& state);
  void (*gae_bwd)(const ScanRow<S>& row, int64_t begin, int64_t end, ScanUse use, S x_in, ScanState<S>& state);
  void (*vtrace)(const ScanRow<S>& row, int64_t begin, int64_t end, ScanUse use, S x_in, ScanState<S>& state);
};

struct ScanKernels {
  ScanFunctions<float> fp32;
  ScanFunctions<double> fp64;
};

}  // namespace rl4llm

RL4LLM_PER_ISA(ScanKernels, scan_kernels)
