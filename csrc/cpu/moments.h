// Sums over live elements, and what is made of them, on a part of a tensor: called by whiten.cpp, token_loss.cpp and
// preference.cpp, computed in moments.isa.cpp.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace rl4llm {

// Sums are taken in fp64, in an order that depends on `count` alone. mask_ptr: null, or 0 where an element is not live:
// nothing that stands there, NaN included, reaches a result.
template <class S>
struct MomentFunctions {
  double (*sum)(int64_t count, const S* x_ptr, const uint8_t* mask_ptr);
  double (*difference)(int64_t count, const S* x_ptr, const S* y_ptr, const uint8_t* mask_ptr);  // Σ (x − y)
  double (*squares)(int64_t count, const S* x_ptr, const uint8_t* mask_ptr, double mean);        // Σ (x − mean)²
  // (x − mean)·scale + shift, and 0 for what is not live.
  void (*normalise)(int64_t count, const S* x_ptr, const uint8_t* mask_ptr, double mean, double scale, double shift,
                    S* out_ptr);
  // x, and 0 for what is not live.
  void (*fill)(int64_t count, S x, const uint8_t* mask_ptr, S* out_ptr);
};

struct MomentKernels {
  MomentFunctions<float> fp32;
  MomentFunctions<double> fp64;
  int64_t (*live_count)(int64_t count, const uint8_t* mask_ptr);
};

}  // namespace rl4llm

RL4LLM_PER_ISA(MomentKernels, moment_kernels)
