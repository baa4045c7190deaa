// Maths that the CPU and the CUDA kernels share, once. No torch headers, no standard library.
//
// Everything here has internal linkage: the CPU kernels are compiled several times for different instruction sets, and
// a function with external linkage would be merged by the linker into one copy, which an older CPU may not run.
#pragma once

#if defined(__CUDACC__)
#define RL4LLM_HD static __host__ __device__ __forceinline__
#else
#define RL4LLM_HD static inline __attribute__((always_inline))
#endif

namespace rl4llm {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

RL4LLM_HD float infinity(float) { return __builtin_inff(); }
RL4LLM_HD double infinity(double) { return __builtin_inf(); }
RL4LLM_HD float not_a_number(float) { return __builtin_nanf(""); }
RL4LLM_HD double not_a_number(double) { return __builtin_nan(""); }
RL4LLM_HD float power_of_2(float x) { return __builtin_exp2f(x); }
RL4LLM_HD double power_of_2(double x) { return __builtin_exp2(x); }
RL4LLM_HD float power_of_e(float x) { return __builtin_expf(x); }
RL4LLM_HD double power_of_e(double x) { return __builtin_exp(x); }
RL4LLM_HD float natural_log(float x) { return __builtin_logf(x); }
RL4LLM_HD double natural_log(double x) { return __builtin_log(x); }

// What a policy loss adds up over live tokens, and the two numbers of which it takes the least and the largest.
enum PolicySum {
  sum_count,
  sum_loss,
  sum_clipped_low,
  sum_clipped_high,
  sum_ratio,
  sum_k1,
  sum_k3,
  sum_kl,
  sum_entropy,
  num_sums,
  least_ratio = num_sums,
  largest_ratio,
  num_partials
};

// log2(1 + f) = f·Σ c_i·f^i for 2/3 <= 1 + f < 4/3: minimax, relative error 5e-8 around 0 too.
constexpr float kLog2Curve8 = 0.202784181f, kLog2Curve7 = -0.222221166f, kLog2Curve6 = 0.201799735f,
                kLog2Curve5 = -0.236786529f, kLog2Curve4 = 0.28871128f, kLog2Curve3 = -0.360789567f,
                kLog2Curve2 = 0.480895966f, kLog2Curve1 = -0.721346557f, kLog2Curve0 = 1.44269502f;

// What the gradient of a row's exact KL subtracts from the log-ratios, and κ of the JSD, 1 elsewhere.
struct KlInner {
  double mean, scale;
};

// The gradient of the JSD, p·(log p/m − its mean)/τ, is a small difference where one token holds most of p. So the
// mixture is counted as κ·m, with κ = p/m at the likeliest token where q is not above p: log p/(κm) is about 0 there,
// and what rounding does to a peaked row does not drown the little that is left. κ is 1 where p = q.
struct KlMixture {
  double p, q;  // the weights of p and q in κ·m
};
RL4LLM_HD double mixture_scale(double beta, double log_q_over_p) {
  return log_q_over_p <= 0 ? 1 / ((1 - beta) + beta * power_of_e(log_q_over_p)) : 1;
}
RL4LLM_HD KlMixture mixture_of(double beta, double scale) { return {(1 - beta) * scale, beta * scale}; }

// A part of a row of logits, summed up; z' are the softcapped logits, x_v = (z'_v - max)·k, k = log2(e)/τ.
// A part of −inf only has max = −inf and sum = 0, or sum = NaN if there was a NaN in it.
template <class A>
struct RowSum {
  A max;   // max_v z'_v, before the temperature, so that one large offset of the row never meets a rounding
  A sum;   // Σ_v 2^x_v
  A xsum;  // Σ_v 2^x_v·x_v
};

// log2 of exp((z' − origin)/τ), from k = log2(e)/τ. fp64 divides before it subtracts, as the oracle does: the error
// rule leaves fp64 no room for a difference in how z'/τ rounds.
struct DivideFirst {
  double temperature;
};
RL4LLM_HD float exponent(float z, float origin, float k) { return (z - origin) * k; }
RL4LLM_HD double exponent(double z, double origin, DivideFirst by) {
  return (z / by.temperature - origin / by.temperature) * kLog2E;
}

// The same sums, relative to a new maximum >= part.max; K is float, or DivideFirst for fp64 sums.
template <class A, class K>
RL4LLM_HD RowSum<A> rebase(RowSum<A> part, A new_max, K k) {
  const A shift = exponent(part.max, new_max, k);
  const A scale = power_of_2(shift);
  // shift may be −inf or huge; where the scale is 0 the part no longer counts, and 0·inf must not arise.
  const A xsum = scale == A(0) ? A(0) : scale * (part.xsum + shift * part.sum);
  return {new_max, part.sum * scale, xsum};
}

// Two parts of a row as one. The order of the calls decides the rounding: always combine from the left.
template <class A, class K>
RL4LLM_HD RowSum<A> merge(RowSum<A> a, RowSum<A> b, K k) {
  const A nothing = -infinity(A());
  if (b.max == nothing) return {a.max, a.sum + b.sum, a.xsum};
  if (a.max == nothing) return {b.max, a.sum + b.sum, b.xsum};
  if (b.max > a.max) {
    a = rebase(a, b.max, k);
  } else {
    b = rebase(b, a.max, k);
  }
  return {a.max, a.sum + b.sum, a.xsum + b.xsum};
}

// log s = log Σ exp(u_v − m); NaN for a row of −inf only.
template <class A>
RL4LLM_HD A log_sum(RowSum<A> row) {
  return row.max == -infinity(A()) ? not_a_number(A()) : natural_log(row.sum);
}

// H = log s − Σ p_v (u_v − m)
template <class A>
RL4LLM_HD A entropy(RowSum<A> row, A log_sum) {
  return log_sum - A(kLn2) * (row.xsum / row.sum);
}

// logp = (u_y − m) − log s, from z'_y − max
template <class A>
RL4LLM_HD A chosen_logp(A shifted, A temperature, A log_sum) {
  return shifted / temperature - log_sum;
}

// What the gradient of a row's logits needs: dL/dz'_v = p_v·(log2(p_v)·slope + intercept) + 1[v=y]·g/τ.
// From docs/math.md section 1: −G·p_v − h·p_v·(log p_v + H), over τ, with log p_v = ln2·log2(p_v).
template <class A>
struct RowGrad {
  A max;        // as in RowSum
  A k;          // log2(e)/τ
  A log2_sum;   // log2 s
  A slope;      // −h·ln2/τ
  A intercept;  // −(G + h·H)/τ, G the sum of the live upstream gradients of the row's log-probabilities
  A softcap;    // c, or 0 for none
  A temperature;
};

template <class A>
RL4LLM_HD RowGrad<A> row_grad(A max, A log_sum, A entropy, A grad_logp_sum, A grad_entropy, double temperature,
                              A softcap) {
  // In fp64, once a row. Without an upstream gradient the entropy may be undefined: 0·NaN must not reach the row.
  const double weight = grad_entropy == A(0) ? 0.0 : double(grad_entropy) * double(entropy);
  return {max,
          A(kLog2E / temperature),
          A(double(log_sum) * kLog2E),
          A(-double(grad_entropy) * kLn2 / temperature),
          A(-(double(grad_logp_sum) + weight) / temperature),
          softcap,
          A(temperature)};
}

}  // namespace rl4llm
