// The token formulas on vectors of one instruction set: for token_loss.isa.cpp, and for a user's own formula, which is
// compiled against this header on the user's machine (rl4llm_fast/user_losses.py). isa.h says how such a file is
// written.
//
// The vectors are the compiler's own (vector_size): a formula becomes selects and arithmetic on whole registers, with
// no loop that the compiler would have to vectorise by itself.
#pragma once

#if defined(RL4LLM_ISA_AVX512) || defined(RL4LLM_ISA_AVX2)
#include <immintrin.h>
#endif

#include "cpu/token_loss.h"

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

#define RL4LLM_INLINE static inline __attribute__((always_inline))

#if defined(RL4LLM_ISA_AVX512)
constexpr int kBytes = 64;
#elif defined(RL4LLM_ISA_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class S>
struct Integer;
template <>
struct Integer<float> {
  typedef int32_t type;
};
template <>
struct Integer<double> {
  typedef int64_t type;
};

// The maths namespace of the formulas; NaN goes through every function, as it does in eager.
template <class Scalar>
struct Maths {
  typedef Scalar S;
  static constexpr int width = kBytes / int(sizeof(S));
  typedef typename Integer<S>::type Int;
  typedef S F __attribute__((vector_size(kBytes)));
  typedef Int I __attribute__((vector_size(kBytes)));

  RL4LLM_INLINE F c(S x) { return x - F{}; }
  RL4LLM_INLINE F where(I condition, F a, F b) { return condition ? a : b; }
  RL4LLM_INLINE F minimum(F a, F b) { return (a < b) | (a != a) ? a : b; }
  RL4LLM_INLINE F maximum(F a, F b) { return (a > b) | (a != a) ? a : b; }
  RL4LLM_INLINE F clamp(F x, F low, F high) {
    const F raised = low > x ? low : x;
    return high < raised ? high : raised;
  }
  RL4LLM_INLINE F abs(F x) { return x < F{} ? -x : x; }
  RL4LLM_INLINE F sign(F x) { return x > F{} ? c(1) : (x < F{} ? c(-1) : x); }
  RL4LLM_INLINE F sigmoid(F x) { return S(1) / (S(1) + exp(-x)); }

  RL4LLM_INLINE F exp(F x) {
    if constexpr (sizeof(S) == sizeof(double)) {
      F result;
      for (int i = 0; i < width; ++i) result[i] = __builtin_exp(x[i]);
      return result;
    } else {
      return exp_fp32(x);
    }
  }

  // a·b + c, rounded once where the processor does it in one instruction.
  RL4LLM_INLINE F fma(F a, F b, F c) {
#if defined(RL4LLM_ISA_AVX512)
    return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(RL4LLM_ISA_AVX2)
    return F(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
    return a * b + c;
#endif
  }

  // e^x = 2^n · e^r, n = round(x/ln 2), |r| <= ln(2)/2: Cephes' polynomial, relative error 1e-7. Beyond the bounds
  // the result is 0 or inf.
  RL4LLM_INLINE F exp_fp32(F x) {
    x = clamp(x, c(-104), c(89));
    const F scaled = x * c(S(1.44269504088896341));
#if defined(RL4LLM_ISA_AVX512)
    const F n = F(_mm512_roundscale_ps(__m512(scaled), _MM_FROUND_TO_NEAREST_INT));
#else
    const F rounding = c(12582912);  // 1.5·2^23: adding it leaves the integer in the low bits
    const F shifted = scaled + rounding, n = shifted - rounding;
#endif
    const F r = fma(n, c(S(2.12194440e-4)), fma(n, c(S(-0.693359375)), x));
    F p = c(S(1.9875691500e-4));
    p = fma(p, r, c(S(1.3981999507e-3)));
    p = fma(p, r, c(S(8.3334519073e-3)));
    p = fma(p, r, c(S(4.1665795894e-2)));
    p = fma(p, r, c(S(1.6666665459e-1)));
    p = fma(p, r, c(S(5.0000001201e-1)));
    p = fma(p, r * r, r) + c(1);
#if defined(RL4LLM_ISA_AVX512)
    return F(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
    // In two factors, because n = 128 and subnormal results have no single one.
    const I k = (I)shifted - (I)rounding, half = k >> 1;
    return p * (F)((half + 127) << 23) * (F)((k - half + 127) << 23);
#endif
  }

  RL4LLM_INLINE F log(F x) {
    if constexpr (sizeof(S) == sizeof(double)) {
      F result;
      for (int i = 0; i < width; ++i) result[i] = __builtin_log(x[i]);
      return result;
    } else {
      return log_fp32(x);
    }
  }

  // log x = e·ln 2 + log m, m in [√½, √2): Cephes' polynomial in m − 1, relative error 1e-7.
  RL4LLM_INLINE F log_fp32(F x) {
    const I subnormal = x < c(S(1.17549435e-38));
    const I bits = (I)(subnormal ? x * c(8388608) : x);
    const I exponent = (bits - 0x3f3504f3) >> 23;
    const F e = __builtin_convertvector(exponent, F) - (subnormal ? c(23) : F{});
    const F f = (F)(bits - (exponent << 23)) - c(1), square = f * f;
    F p = c(S(7.0376836292e-2));
    p = p * f + c(S(-1.1514610310e-1));
    p = p * f + c(S(1.1676998740e-1));
    p = p * f + c(S(-1.2420140846e-1));
    p = p * f + c(S(1.4249322787e-1));
    p = p * f + c(S(-1.6668057665e-1));
    p = p * f + c(S(2.0000714765e-1));
    p = p * f + c(S(-2.4999993993e-1));
    p = p * f + c(S(3.3333331174e-1));
    const F result = f + (p * f * square + e * c(S(-2.12194440e-4)) - c(S(0.5)) * square) + e * c(S(0.693359375));
    const F infinite = c(S(infinity(1.0f)));
    return x == F{} ? -infinite : (x > F{}) & (x < infinite) ? result : (x < F{} ? c(S(not_a_number(1.0f))) : x);
  }

  // min(x, 0) − log(1 + u), u = e^−|x|; the logarithm keeps the bits of a small u that 1 + u has lost.
  RL4LLM_INLINE F logsigmoid(F x) {
    const F u = exp(-abs(x)), w = c(1) + u;
    return minimum(x, F{}) - (w == c(1) ? u : log(w) * (u / (w - c(1))));
  }
};

// Of the vectors of a segment all but the last have M::width lanes. Written in a loop's body that is inlined twice,
// once with that constant: the tests of it vanish there.
template <class M>
RL4LLM_INLINE typename M::F load(const typename M::S* ptr, int64_t i, int lanes) {
  typename M::F result;
  if (lanes == M::width) {
    __builtin_memcpy(&result, ptr + i, sizeof result);
  } else {
    typename M::S values[M::width] = {};
    for (int j = 0; j < lanes; ++j) values[j] = ptr[i + j];
    __builtin_memcpy(&result, values, sizeof result);
  }
  return result;
}

template <class M>
RL4LLM_INLINE void store(typename M::S* ptr, int64_t i, int lanes, typename M::F value) {
  if (lanes == M::width) {
    __builtin_memcpy(ptr + i, &value, sizeof value);
  } else {
    typename M::S values[M::width];
    __builtin_memcpy(values, &value, sizeof value);
    for (int j = 0; j < lanes; ++j) ptr[i + j] = values[j];
  }
}

// f(i, lanes) for the vectors of a segment.
template <class M, class F>
RL4LLM_INLINE void each_vector(int64_t length, const F& f) {
  const int64_t whole = length / M::width * M::width;
  for (int64_t i = 0; i < whole; i += M::width) f(i, M::width);
  if (whole < length) f(whole, int(length - whole));
}

template <class M>
RL4LLM_INLINE typename M::I live_lanes(const uint8_t* mask_ptr, int64_t i, int lanes) {
  if (mask_ptr == nullptr && lanes == M::width) return typename M::I{} == typename M::I{};
  // A loop: gcc takes the conversion of a whole vector of bytes apart, byte by byte.
  typename M::Int alive[M::width] = {};
  if (mask_ptr == nullptr) {
    for (int j = 0; j < lanes; ++j) alive[j] = -1;
  } else {
    for (int j = 0; j < lanes; ++j) alive[j] = -typename M::Int(mask_ptr[i + j] != 0);
  }
  typename M::I result;
  __builtin_memcpy(&result, alive, sizeof result);
  return result;
}

// Whether a whole vector has no live token, as behind the end of a padded answer: its inputs are not even read.
template <class M>
RL4LLM_INLINE bool all_dead(const uint8_t* mask_ptr, int64_t i, int lanes) {
  if (mask_ptr == nullptr || lanes != M::width) return false;
  uint64_t words[M::width > 8 ? 2 : 1] = {};
  __builtin_memcpy(words, mask_ptr + i, M::width);
  return (words[0] | words[sizeof words / sizeof *words - 1]) == 0;
}

template <class M>
RL4LLM_INLINE double sum_of(typename M::F value) {
  double result = 0;
  for (int j = 0; j < M::width; ++j) result += double(value[j]);
  return result;
}

// ω from log ω.
template <class M>
RL4LLM_INLINE typename M::F corrected(int correction, typename M::F log_omega, typename M::S cap, typename M::S floor) {
  int i = 0;
#define RL4LLM_CORRECT(formula) \
  if (correction == i++) return formulas::formula::eval<M>(log_omega, M::c(cap), M::c(floor));
  RL4LLM_CORRECTION_FORMULAS(RL4LLM_CORRECT)
  return log_omega;
}

// A whole segment in one loop; formula and metrics share what they have in common.
template <class M, class Formula>
void policy(const PolicySegment<typename M::S>& s, double* sums) {
  typedef typename M::F F;
  typedef typename M::I I;
  const F zero = {}, one = M::c(1), infinite = M::c(typename M::S(infinity(1.0f)));
  F count = zero, loss_sum = zero, low = zero, high = zero, ratio = zero, least = infinite, largest = -infinite;
  F k1 = zero, k3 = zero, kl_sum = zero, entropy_sum = zero;
  const auto vector = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    if (all_dead<M>(s.mask_ptr, i, lanes)) {
      if (s.loss_ptr) store<M>(s.loss_ptr, i, lanes, zero);
      if (s.dentropy_ptr) store<M>(s.dentropy_ptr, i, lanes, zero);
      return store<M>(s.dlogp_ptr, i, lanes, zero);
    }
    const I live = live_lanes<M>(s.mask_ptr, i, lanes);
    // Selected out before anything is computed with it: NaN in a dead token meets no arithmetic.
    const auto input = [&](const typename M::S* ptr) { return live ? load<M>(ptr, i, lanes) : zero; };
    const F logp = input(s.logp_ptr);
    const F old = s.old_ptr ? input(s.old_ptr) : logp;
    const F adv = s.one_adv ? (live ? M::c(*s.adv_ptr) : zero) : input(s.adv_ptr);
    const F log_s = s.log_s_ptr == nullptr ? zero
                    : s.one_log_s          ? (live ? M::c(*s.log_s_ptr) : zero)
                                           : input(s.log_s_ptr);
    const F ref = s.ref_ptr ? input(s.ref_ptr) : zero;
    const formulas::PolicyToken<F> token = Formula::template eval<M>(logp, old, ref, adv, log_s, s.knobs);
    F loss = token.loss, dlogp = token.dlogp;
    if (s.policy_weights_ptr) {
      F weight = input(s.policy_weights_ptr);
      if (s.correction >= 0) weight = corrected<M>(s.correction, old - weight, s.rollout_cap, s.rollout_floor);
      loss *= weight, dlogp *= weight;
    }
    if (s.kl_ptr) {
      const F kl = load<M>(s.kl_ptr, i, lanes);
      kl_sum += kl;
      if (s.kl_coef != 0) {
        loss += s.kl_coef * kl;
        dlogp += s.kl_coef * load<M>(s.dkl_ptr, i, lanes);
      }
    }
    const F token_weight = s.token_weights_ptr ? input(s.token_weights_ptr) : one;
    if (s.entropy_ptr) {
      const F entropy = input(s.entropy_ptr);
      entropy_sum += entropy;
      if (s.entropy_coef != 0) loss -= s.entropy_coef * entropy;
      if (s.dentropy_ptr) store<M>(s.dentropy_ptr, i, lanes, live ? -s.entropy_coef * token_weight * s.scale : zero);
    }
    loss = live ? loss * token_weight : zero;
    if (s.loss_ptr) store<M>(s.loss_ptr, i, lanes, loss);
    store<M>(s.dlogp_ptr, i, lanes, live ? dlogp * token_weight * s.scale : zero);
    loss_sum += loss;
    count += live ? one : zero;
    low += live ? token.clipped_low : zero;
    high += live ? token.clipped_high : zero;
    ratio += live ? token.ratio : zero;
    least = M::minimum(live ? token.ratio : infinite, least);
    largest = M::maximum(live ? token.ratio : -infinite, largest);
    k1 += live ? token.k1 : zero;
    k3 += live ? token.k3 : zero;
  };
  each_vector<M>(s.length, vector);
  const F totals[num_sums] = {count, loss_sum, low, high, ratio, k1, k3, kl_sum, entropy_sum};
  for (int k = 0; k < num_sums; ++k) sums[k] = sum_of<M>(totals[k]);
  double smallest = least[0], greatest = largest[0];
  for (int j = 1; j < M::width; ++j) {
    smallest = smallest < least[j] || smallest != smallest ? smallest : double(least[j]);
    greatest = greatest > largest[j] || greatest != greatest ? greatest : double(largest[j]);
  }
  sums[least_ratio] = smallest, sums[largest_ratio] = greatest;
}

template <class M, class Formula>
void kl(const KlSegment<typename M::S>& s) {
  typedef typename M::F F;
  const F zero = {};
  const auto vector = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    if (all_dead<M>(s.mask_ptr, i, lanes)) {
      store<M>(s.kl_ptr, i, lanes, zero);
      return store<M>(s.dkl_ptr, i, lanes, zero);
    }
    const typename M::I live = live_lanes<M>(s.mask_ptr, i, lanes);
    const F logp = live ? load<M>(s.logp_ptr, i, lanes) : zero;
    const F ref = live ? load<M>(s.ref_ptr, i, lanes) : zero;
    const F old = s.old_ptr ? (live ? load<M>(s.old_ptr, i, lanes) : zero) : logp;
    const formulas::KlToken<F> token = Formula::template eval<M>(logp, ref, old);
    store<M>(s.kl_ptr, i, lanes, live ? token.kl : zero);
    store<M>(s.dkl_ptr, i, lanes, live ? token.dkl : zero);
  };
  each_vector<M>(s.length, vector);
}

template <class M>
void scale(int64_t length, typename M::S g, const typename M::S* grad_ptr, const typename M::S* d_ptr,
           typename M::S* out_ptr) {
  typedef typename M::F F;
  const F zero = {};
  const auto vector = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const F d = load<M>(d_ptr, i, lanes);
    const F upstream = grad_ptr ? load<M>(grad_ptr, i, lanes) * g : M::c(g);
    store<M>(out_ptr, i, lanes, d == zero ? zero : upstream * d);
  };
  each_vector<M>(length, vector);
}

}  // namespace
}  // namespace RL4LLM_ISA
}  // namespace rl4llm
