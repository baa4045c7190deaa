// What kl.cpp (checks, rows, threads) calls in kl.isa.cpp (the arithmetic on one part of a pair of rows).
#pragma once

#include <stdint.h>

#include "cpu/isa.h"
#include "hd.h"

namespace rl4llm {

enum class LogitsType { fp32, bf16, fp16, fp64 };

// Part of a row of the one side and of the other, of any two types.
template <class A>
struct KlPart {
  const void *logits_ptr, *other_ptr;  // (length,)
  LogitsType type, other_type;
  int64_t length;
  A softcap;  // c, or 0 for none
};

// fp32 works with powers of 2, fp64 with powers of e: its own eps leaves no room for the factor between them.
static constexpr double ln_base(float) { return kLn2; }
static constexpr double ln_base(double) { return 1; }

// One side of a row: log p_v = ln_base·((z'_v − max)·k − log_sum), k = 1/(τ·ln_base).
template <class A>
struct LogitsNorm {
  A max, log_sum;
};

// The softcapped maxima of both sides; −inf where there is nothing but −inf (or NaN).
template <class A>
struct KlMaxima {
  A max, other_max;
};

// Sums for KL(a‖b) = Σ a·(log a − log b), z of a and w of b, relative to the maxima of whole rows: x_v = z'_v − max,
// y_v = w'_v − other_max, in the logits' units in fp32, over τ in fp64 (see hd.h's DivideFirst).
struct KlSum {
  double sum, other_sum;  // Σ exp(x_v/τ), Σ exp(y_v/τ)
  double dsum;            // Σ exp(x_v/τ)·(x_v − y_v), where −inf on both sides is a difference of 0
  double gsum;    // the same with w'_v − anchor for y_v: for the gradient, where w'_v − other_max is for the value
  bool infinite;  // somewhere w is −inf and z is not
};

// A row of the JSD against κ·m = q_weight·q + p_weight·p (hd.h). Its sums are Σ p·log(p/κm) and Σ q·log(q/κm), over
// ln_base, Σ p and Σ q.
template <class A>
struct JsdRow {
  LogitsNorm<A> p, q;
  A p_weight, q_weight;
};
struct JsdSum {
  double p_sum, q_sum, p_total, q_total;
};

enum class KlDirection { reverse, forward, jsd };

// What the gradient of a row's logits needs (docs/math.md section 3), with g the upstream gradient over τ:
//   reverse  dL/dz'_v = p_v·(d_v − mean)·slope       d_v = x_v − (w'_v − anchor) of KlSum, mean = Σ p·d
//   jsd      p_v·((d_v − mean) − rest)·slope          d_v = log(p_v/κm_v)/ln_base, mean + rest = Σ p·d / Σ p
//   forward  dL/dz'_v = (p_v − q_v)·slope
template <class A>
struct KlGrad {
  KlDirection direction;
  JsdRow<A> row;
  A slope, mean, rest;
  bool bad;  // the row holds NaN, +inf or nothing but −inf on either side
};

template <class A>
struct KlFunctions {
  void (*maxima)(const KlPart<A>& part, KlMaxima<A>* maxima);
  // The other side's softcapped logit where the first side's is `top`, its maximum; of several, the largest.
  A (*anchor)(const KlPart<A>& part, double temperature, A top);
  // KL of the first side from the other, relative to the maxima of the rows; gsum is 0 without an anchor.
  void (*kl)(const KlPart<A>& part, double temperature, const KlMaxima<A>& maxima, const A* anchor_ptr, KlSum* sum);
  void (*jsd)(const KlPart<A>& part, double temperature, const JsdRow<A>& row, JsdSum* sum);
  // The policy comes first. dlogits_ptr (length,), of its type, may be its logits themselves.
  void (*bwd)(const KlPart<A>& part, double temperature, const KlGrad<A>& grad, void* dlogits_ptr);
};

struct KlKernels {
  KlFunctions<float> fp32;
  KlFunctions<double> fp64;
};

}  // namespace rl4llm

RL4LLM_PER_ISA(KlKernels, kl_kernels)
