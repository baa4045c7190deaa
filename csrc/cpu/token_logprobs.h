// What token_logprobs.cpp (checks, rows, threads) calls in token_logprobs.isa.cpp (the arithmetic on one part of a
// row).
#pragma once

#include <stdint.h>

#include "cpu/isa.h"
#include "hd.h"

namespace rl4llm {

template <class A>
struct LogitsPart {
  const void* logits_ptr;  // (length,)
  int64_t length;
  A softcap;  // c, or 0 for none
};

template <class A>
struct TokenLogprobsFunctions {
  void (*fwd)(LogitsPart<A> part, double temperature, bool entropy, RowSum<double>* sum);
  // dlogits_ptr (length,) may be the logits themselves. careful: the row holds NaN or its coefficients are not finite.
  void (*bwd)(LogitsPart<A> part, const RowGrad<A>& row, bool careful, void* dlogits_ptr);
  // (z' − origin)/τ of one logit; and the gradient of a chosen one, chosen = Σ g/τ over its choices.
  double (*scaled_logit)(const void* logit_ptr, A softcap, A origin, double temperature);
  A (*chosen_dlogit)(const void* logit_ptr, const RowGrad<A>& row, A chosen);
  void (*store)(void* dlogit_ptr, A value);
};

struct TokenLogprobsKernels {
  TokenLogprobsFunctions<float> fp32, bf16, fp16;
  TokenLogprobsFunctions<double> fp64;
};

}  // namespace rl4llm

RL4LLM_PER_ISA(TokenLogprobsKernels, token_logprobs_kernels)
