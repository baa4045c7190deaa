// Exact KL divergence of one part of two rows of logits, and its gradient (docs/math.md section 3).
//
// Computes: maxima; anchor; kl: Σ 2^x, Σ 2^y, Σ 2^x·(x − y) twice; jsd: Σ p·log(p/m), Σ q·log(q/m), Σ p; bwd: dL/dz.
// Grid:     one call per part of kPart logits of one row; kl.cpp hands the parts to threads.
// Traffic:  maxima reads both rows from memory, kl again from the cache, bwd reads both and writes one (a block of each
//           is widened into L1 and worked on there); the JSD needs both normalisers first: a third reading.
// Numerics: a block of kBlock logits in fp32, 4 × Vec::width sums relative to both maxima; blocks in fp64 and from the
//           left (fp64 on either side: fp64 throughout). Differences are made in the logits' own units, where they are
//           nearly exact for close distributions. For the gradient of the reverse KL they are counted from the
//           likeliest token, which so adds 0: what a peaked row is off by does not drown the little that is left of d −
//           Σ p·d (the JSD's: KlMixture in hd.h). −inf on both sides adds exactly 0; on the other side alone it is
//           looked for in the logits: finite ones may overflow on the way.
// Gradient: KlGrad in kl.h, the softcap's chain, rounded once; exactly 0 at a policy logit of −inf.
#include "cpu/kl_blocks.h"

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

// --- formulas

// z' − origin; in fp64 over τ, since it divides before it subtracts (see hd.h).
template <bool kSoftcap>
RL4LLM_INLINE Vec distance(Vec z, Scale<float> by, float origin) {
  return shifted_logit<kSoftcap>(z, by.softcap, origin);
}
template <bool kSoftcap>
RL4LLM_INLINE Vec64 distance(Vec64 z, Scale<double> by, double origin) {
  return {shifted_logit<kSoftcap>(z, by.softcap, 0.0).v / by.temperature - origin / by.temperature};
}
RL4LLM_INLINE double unit_of(float, double temperature) { return temperature; }
RL4LLM_INLINE double unit_of(double, double) { return 1; }

template <class A>
RL4LLM_INLINE Scale<A> scale_of(const KlPart<A>& part, double temperature) {
  return {A(1 / (ln_base(A()) * unit_of(A(), temperature))), A(temperature), part.softcap};
}

// b^x and log_b x, b = e^ln_base.
RL4LLM_INLINE Vec power(Vec x) { return exp2(x); }
RL4LLM_INLINE Vec64 power(Vec64 x) { return {__builtin_exp(x.v)}; }
// Of x + rest, rest below an ulp of x; fp64 has digits to spare.
RL4LLM_INLINE Vec log(Vec x, Vec rest) { return log2(x, rest); }
RL4LLM_INLINE Vec64 log(Vec64 x, Vec64) { return {__builtin_log(x.v)}; }

// log p_v, held where p_v is 0 anyway.
template <class F, class A>
RL4LLM_INLINE F log_p(F distance, A k, A log_sum) {
  return max(F::of(kLeast<F>), fma(distance, F::of(k), F::of(-log_sum)));
}

// p_v, q_v, log(p_v/κm_v), log(q_v/κm_v) from a = log p_v and b = log q_v, all over ln_base. The larger of p and q
// leads, so that κm is that one times a sum s, κ at the most; nothing cancels where p and q are close.
template <class F>
struct Jsd {
  F p, q, p_over_m, q_over_m;
};
template <class F, class A>
RL4LLM_INLINE Jsd<F> jsd(F a, F b, const JsdRow<A>& row) {
  const F p_weight = F::of(row.p_weight), q_weight = F::of(row.q_weight), zero = F::of(0), one = F::of(1);
  const F diff = a - b, lead = power(max(a, b)), t = power(zero - abs(diff));
  const F weight = select_less(a, b, p_weight, q_weight), lead_weight = select_less(a, b, q_weight, p_weight);
  const F s = fma(weight, t, lead_weight);
  const F log_s = log(s, fma(weight, t, lead_weight - s));
  return {lead * select_less(a, b, t, one), lead * select_less(b, a, t, one), select_less(a, b, diff, zero) - log_s,
          select_less(b, a, zero - diff, zero) - log_s};
}

// --- kernels

// Whether some w is −inf where z is not.
template <class F, class A>
bool has_hole(const A* z_ptr, const A* w_ptr, int length) {
  const F least = F::of(-largest(A())), zero = F::of(0), one = F::of(1);
  F found = zero;
  for (int v = 0; v < length; v += 2 * F::width) {
    F z[2], w[2];
    load2(z_ptr + v, z[0], z[1]);
    load2(w_ptr + v, w[0], w[1]);
    for (int i = 0; i < 2; ++i) {
      found = max(found, select_less(w[i], least, select_less(z[i], least, zero, one), zero));
    }
  }
  return max_of(found) > A(0);
}

// The maximum of a part of one side before the softcap, NaN left out.
template <class T>
double largest_of(const void* logits_ptr, int64_t length) {
  typedef typename Element<T>::vec F;
  constexpr int neighbours = 2 * F::width, step = kVecs * F::width;
  const T* z_ptr = (const T*)logits_ptr;
  F top[kVecs];
  for (int i = 0; i < kVecs; ++i) top[i] = F::of(-__builtin_inf());
  const auto take = [&](const T* ptr) __attribute__((always_inline)) {
    for (int i = 0; i < kVecs; i += 2) {
      F a, b;
      load2(ptr + i / 2 * neighbours, a, b);
      top[i] = max(a, top[i]), top[i + 1] = max(b, top[i + 1]);
    }
  };
  const int64_t whole = length - length % step;
  for (int64_t v = 0; v < whole; v += step) take(z_ptr + v);
  if (whole < length) {
    T tail[step];
    load_tail(z_ptr + whole, int(length - whole), step, tail);
    take(tail);
  }
  return max_of(max4(top));
}

template <class A>
A softcapped_maximum(const void* logits_ptr, LogitsType type, int64_t length, A c) {
  const double raw = type == LogitsType::fp64   ? largest_of<double>(logits_ptr, length)
                     : type == LogitsType::fp32 ? largest_of<float>(logits_ptr, length)
                     : type == LogitsType::bf16 ? largest_of<bf16>(logits_ptr, length)
                                                : largest_of<fp16>(logits_ptr, length);
  typedef typename VecOf<A>::type F;
  const bool capped = c != A(0) && raw != -__builtin_inf();
  return capped ? A(first_of(shifted_logit<true>(F::of(A(raw)), c, A(0)))) : A(raw);
}

template <class A>
void maxima(const KlPart<A>& part, KlMaxima<A>* out) {
  *out = {softcapped_maximum(part.logits_ptr, part.type, part.length, part.softcap),
          softcapped_maximum(part.other_ptr, part.other_type, part.length, part.softcap)};
}

template <bool kSoftcap, class A>
A anchor_kernel(const KlPart<A>& part, double temperature, A top) {
  typedef typename VecOf<A>::type F;
  const Scale<A> scale = scale_of(part, temperature);
  const F none = F::of(-infinity(A())), zero = F::of(0);
  F found = none;
  for_each_block(
      part, [&](const Block<A>& block, int64_t, int, int padded) __attribute__((always_inline)) {
        for (int v = 0; v < padded; v += 2 * F::width) {
          F z[2], w[2];
          load2(block.z + v, z[0], z[1]);
          load2(block.w + v, w[0], w[1]);
          for (int i = 0; i < 2; ++i) {
            const F other = shifted_logit<kSoftcap>(w[i], scale.softcap, A(0));
            found = max(select_less(distance<kSoftcap>(z[i], scale, top), zero, none, other), found);
          }
        }
      });
  return max_of(found);
}

template <class A>
A anchor(const KlPart<A>& part, double temperature, A top) {
  return part.softcap != A(0) ? anchor_kernel<true>(part, temperature, top)
                              : anchor_kernel<false>(part, temperature, top);
}

// x − y as a term of gsum: a row of them still has a finite sum.
template <class F>
RL4LLM_INLINE F bounded_difference(F x, F y) {
  const F bound = F::of(1e36f), difference = x - y;
  return max(select_less(difference, bound, difference, bound), F::of(-1e36f));
}

template <bool kSoftcap, bool kAnchored, class A>
void kl_fwd_kernel(const KlPart<A>& part, double temperature, const KlMaxima<A>& maxima, A anchor, KlSum* out) {
  typedef typename VecOf<A>::type F;
  constexpr int step = kVecs * F::width;
  const Scale<A> scale = scale_of(part, temperature);
  const F least = F::of(kLeast<F>), floor = F::of(-largest(A()));
  // Where a side holds nothing, all its terms are 0 (or NaN), whatever the origin.
  const A origin = maxima.max == -infinity(A()) ? A(0) : maxima.max;
  const A other_origin = maxima.other_max == -infinity(A()) ? A(0) : maxima.other_max;
  KlSum row = {0, 0, 0, 0, false};

  for_each_block(
      part, [&](const Block<A>& block, int64_t, int, int length) __attribute__((always_inline)) {
        F sum[kVecs], other_sum[kVecs], dsum[kVecs], gsum[kVecs], other_low = F::of(0);
        for (int i = 0; i < kVecs; ++i) sum[i] = other_sum[i] = dsum[i] = gsum[i] = F::of(0);
        for (int v = 0; v < length; v += step) {
          F z[kVecs], w[kVecs];
          for (int i = 0; i < kVecs; i += 2) load2(block.z + v + i * F::width, z[i], z[i + 1]);
          for (int i = 0; i < kVecs; i += 2) load2(block.w + v + i * F::width, w[i], w[i + 1]);
          for (int i = 0; i < kVecs; ++i) {
            other_low = select_less(w[i], other_low, w[i], other_low);
            // Held at the most negative finite number, so that −inf on both sides is a difference of 0.
            const F x = max(floor, distance<kSoftcap>(z[i], scale, origin));
            const F y = max(floor, distance<kSoftcap>(w[i], scale, other_origin));
            const F e = power(max(least, x * F::of(scale.k)));
            sum[i] = sum[i] + e;
            other_sum[i] = other_sum[i] + power(max(least, y * F::of(scale.k)));
            dsum[i] = fma(e, x - y, dsum[i]);
            if constexpr (kAnchored) {
              gsum[i] = fma(e, bounded_difference(x, distance<kSoftcap>(w[i], scale, anchor)), gsum[i]);
            }
          }
        }
        if (max_of(F::of(0) - other_low) == infinity(A())) row.infinite |= has_hole<F>(block.z, block.w, length);
        row.sum += sum4(sum);
        row.other_sum += sum4(other_sum);
        row.dsum += sum4(dsum);
        row.gsum += sum4(gsum);
      });
  *out = row;
}

template <bool kSoftcap, class A>
void jsd_fwd_kernel(const KlPart<A>& part, double temperature, const JsdRow<A>& row, JsdSum* out) {
  typedef typename VecOf<A>::type F;
  constexpr int step = kVecs * F::width;
  const Scale<A> scale = scale_of(part, temperature);
  JsdSum total = {0, 0, 0, 0};
  for_each_block(
      part, [&](const Block<A>& block, int64_t, int, int length) __attribute__((always_inline)) {
        F p_sum[kVecs], q_sum[kVecs], p_total[kVecs], q_total[kVecs];
        for (int i = 0; i < kVecs; ++i) p_sum[i] = q_sum[i] = p_total[i] = q_total[i] = F::of(0);
        for (int v = 0; v < length; v += step) {
          F z[kVecs], w[kVecs];
          for (int i = 0; i < kVecs; i += 2) load2(block.z + v + i * F::width, z[i], z[i + 1]);
          for (int i = 0; i < kVecs; i += 2) load2(block.w + v + i * F::width, w[i], w[i + 1]);
          for (int i = 0; i < kVecs; ++i) {
            const Jsd<F> at = jsd(log_p(distance<kSoftcap>(z[i], scale, row.p.max), scale.k, row.p.log_sum),
                                  log_p(distance<kSoftcap>(w[i], scale, row.q.max), scale.k, row.q.log_sum), row);
            p_sum[i] = fma(at.p, at.p_over_m, p_sum[i]);
            q_sum[i] = fma(at.q, at.q_over_m, q_sum[i]);
            p_total[i] = p_total[i] + at.p;
            q_total[i] = q_total[i] + at.q;
          }
        }
        total.p_sum += sum4(p_sum);
        total.q_sum += sum4(q_sum);
        total.p_total += sum4(p_total);
        total.q_total += sum4(q_total);
      });
  *out = total;
}

template <KlDirection kDirection, bool kSoftcap, class F, class A>
RL4LLM_INLINE F dlogit(F z, F w, Scale<A> scale, const KlGrad<A>& grad) {
  const JsdRow<A>& row = grad.row;
  const F x = distance<kSoftcap>(z, scale, row.p.max), y = distance<kSoftcap>(w, scale, row.q.max);
  const F a = log_p(x, scale.k, row.p.log_sum);
  F du;
  if constexpr (kDirection == KlDirection::forward) {
    du = power(a) - power(log_p(y, scale.k, row.q.log_sum));
  } else if constexpr (kDirection == KlDirection::reverse) {
    du = power(a) * (bounded_difference(x, y) - F::of(grad.mean));
  } else {
    const Jsd<F> at = jsd(a, log_p(y, scale.k, row.q.log_sum), row);
    du = at.p * (at.p_over_m - F::of(grad.mean) - F::of(grad.rest));
  }
  du = du * F::of(grad.slope);
  if constexpr (kSoftcap) {
    F shifted, t;
    softcap(z, scale.softcap, A(0), shifted, t);
    du = du * fma(t, F::of(0) - t, F::of(1));
  }
  return select_less(z, F::of(-largest(A())), F::of(0), du);
}

template <KlDirection kDirection, bool kSoftcap, class A>
void kl_bwd_kernel(const KlPart<A>& part, double temperature, const KlGrad<A>& row_grad, void* dlogits_ptr) {
  typedef typename VecOf<A>::type F;
  constexpr int step = kVecs * F::width;
  const Scale<A> scale = scale_of(part, temperature);
  const KlGrad<A> grad = row_grad;  // a copy: the compiler cannot know that the stores leave the original alone
  const bool in_order = part.type != part.other_type;
  for_each_block(
      part, [&](Block<A> & block, int64_t at, int length, int padded) __attribute__((always_inline)) {
        if (grad.bad) {  // the row's own NaN is enough: the payload of one in w could vanish when bf16 rounds it
          for (int v = 0; v < padded; ++v) block.w[v] = 0;
        }
        for (int v = 0; v < padded; v += step) {
          F z[kVecs], w[kVecs];
          for (int i = 0; i < kVecs; i += 2) load2(block.z + v + i * F::width, z[i], z[i + 1]);
          for (int i = 0; i < kVecs; i += 2) load2(block.w + v + i * F::width, w[i], w[i + 1]);
          for (int i = 0; i < kVecs; ++i) z[i] = dlogit<kDirection, kSoftcap>(z[i], w[i], scale, grad);
          for (int i = 0; i < kVecs; i += 2) store2(block.z + v + i * F::width, z[i], z[i + 1]);
        }
        narrow(block.z, part.type, at, length, in_order, dlogits_ptr);
      });
}

template <bool kSoftcap, class A>
void kl_with(const KlPart<A>& part, double temperature, const KlMaxima<A>& maxima, const A* anchor_ptr, KlSum* sum) {
  anchor_ptr ? kl_fwd_kernel<kSoftcap, true>(part, temperature, maxima, *anchor_ptr, sum)
             : kl_fwd_kernel<kSoftcap, false>(part, temperature, maxima, A(0), sum);
}

template <class A>
void kl(const KlPart<A>& part, double temperature, const KlMaxima<A>& maxima, const A* anchor_ptr, KlSum* sum) {
  part.softcap != A(0) ? kl_with<true>(part, temperature, maxima, anchor_ptr, sum)
                       : kl_with<false>(part, temperature, maxima, anchor_ptr, sum);
}

template <class A>
void jsd(const KlPart<A>& part, double temperature, const JsdRow<A>& row, JsdSum* sum) {
  part.softcap != A(0) ? jsd_fwd_kernel<true>(part, temperature, row, sum)
                       : jsd_fwd_kernel<false>(part, temperature, row, sum);
}

template <bool kSoftcap, class A>
void bwd_with(const KlPart<A>& part, double temperature, const KlGrad<A>& grad, void* dlogits_ptr) {
  switch (grad.direction) {
    case KlDirection::reverse:
      return kl_bwd_kernel<KlDirection::reverse, kSoftcap>(part, temperature, grad, dlogits_ptr);
    case KlDirection::forward:
      return kl_bwd_kernel<KlDirection::forward, kSoftcap>(part, temperature, grad, dlogits_ptr);
    default:
      return kl_bwd_kernel<KlDirection::jsd, kSoftcap>(part, temperature, grad, dlogits_ptr);
  }
}

template <class A>
void bwd(const KlPart<A>& part, double temperature, const KlGrad<A>& grad, void* dlogits_ptr) {
  part.softcap != A(0) ? bwd_with<true>(part, temperature, grad, dlogits_ptr)
                       : bwd_with<false>(part, temperature, grad, dlogits_ptr);
}

}  // namespace

extern const KlKernels kl_kernels;
const KlKernels kl_kernels = {{&maxima<float>, &anchor<float>, &kl<float>, &jsd<float>, &bwd<float>},
                              {&maxima<double>, &anchor<double>, &kl<double>, &jsd<double>, &bwd<double>}};

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
