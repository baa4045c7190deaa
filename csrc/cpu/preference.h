// What preference.cpp (checks, answers, pairs, threads) calls in preference.isa.cpp (the passes over an answer's
// tokens).
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace rl4llm {

template <class S>
struct PreferenceFunctions {
  // Σ (logp − ref) over the live tokens and their number; ref_ptr, mask_ptr null: absent. Added up in fp64.
  void (*sum)(int64_t length, const S* logp_ptr, const S* ref_ptr, const uint8_t* mask_ptr, double* sum,
              int64_t* count);
  // out = value at live tokens, else 0
  void (*spread)(int64_t length, S value, const uint8_t* mask_ptr, S* out_ptr);
};

struct PreferenceKernels {
  PreferenceFunctions<float> fp32;
  PreferenceFunctions<double> fp64;
};

}  // namespace rl4llm

RL4LLM_PER_ISA(PreferenceKernels, preference_kernels)
