// Log-probabilities and entropy of one part of a row of logits, and their gradient (docs/math.md section 1).
//
// Computes: fwd: max z', Σ 2^x, Σ 2^x·x with x = (z' − max)·log2(e)/τ;  bwd: dL/dz of every logit.
// Grid:     one call per part of kPart logits of one row; token_logprobs.cpp hands the parts to threads.
// Traffic:  fwd reads the logits once (a block with a new maximum again, from L1), bwd reads and writes them once.
// Numerics: a block of kBlock logits in fp32, 4 × Vec::width sums relative to about the maximum so far; blocks in fp64,
//           in order (fp64 logits: fp64 throughout). −inf adds exactly 0 wherever it stands; NaN and +inf come out as a
//           NaN sum, since max skips NaN but 2^x does not.
// Gradient: p_v·(log2(p_v)·slope + intercept), the softcap's chain, rounded once; see RowGrad in hd.h.
#include "cpu/token_logprobs.h"

#include "cpu/logits_vec.h"

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

// How far, as a power of 2, a logit may rise above what the sums are relative to before they are made anew: little
// enough that no digit of xsum is lost.
constexpr double kHeadroom = 2;

// A part is read as kStreams stretches side by side: a CPU's prefetcher follows each, and one alone would not keep the
// memory busy.
constexpr int kStreams = 4;

template <bool kEntropy, bool kSoftcap, class T, class A>
void token_logprobs_fwd_kernel(LogitsPart<A> part, double temperature, RowSum<double>* out) {
  typedef typename Element<T>::vec F;
  constexpr int neighbours = 2 * F::width, step = kStreams * neighbours;  // logits of a stream, of all, an iteration
  const F least = F::of(kLeast<F>);
  const Scale<A> scale = {A(kLog2E / temperature), A(temperature), part.softcap};
  RowSum<double> row = {-infinity(double()), 0, 0};  // relative to row.max, at most kHeadroom below the maximum
  A highest = -infinity(A());
  F top[kVecs], sum[kVecs], xsum[kVecs];
  const auto softcapped = [&](A z) { return first_of(shifted_logit<kSoftcap>(F::of(z), part.softcap, A(0))); };

  // The logits [0, length) of every stream; streams begin `apart` logits after one another.
  const auto maximum = [&](const T* z_ptr, int64_t apart, int length) __attribute__((always_inline)) {
    for (int i = 0; i < kVecs; ++i) top[i] = F::of(-infinity(A()));
    bool nan = false;
    for (int v = 0; v < length; v += neighbours) {
      for (int s = 0; s < kStreams; ++s) {
        F a, b;
        load2(z_ptr + s * apart + v, a, b);
        top[0] = max(a, top[0]), top[1] = max(b, top[1]);
        nan |= any_nan(a) || any_nan(b);
      }
    }
    if (nan) row.sum = not_a_number(double());  // which max skips
    return max_of(max4(top));
  };
  const auto add = [&](const T* z_ptr, int64_t apart, int length) __attribute__((always_inline)) {
    const A origin = A(row.max);
    for (int i = 0; i < kVecs; ++i) top[i] = F::of(-infinity(A())), sum[i] = xsum[i] = F::of(0);
    for (int v = 0; v < length; v += neighbours) {
      for (int s = 0; s < kStreams; ++s) {
        F z[2];
        load2(z_ptr + s * apart + v, z[0], z[1]);
        for (int i = 0; i < 2; ++i) {
          const int k = s % 2 * 2 + i;
          top[k] = max(z[i], top[k]);
          F x = exponent<kSoftcap>(z[i], scale, origin, A(0));
          if (kEntropy) x = max(least, x);  // so that 0·x is 0
          const F e = kEntropy ? exp2(x) : exp2_or_0(x);
          sum[k] = sum[k] + e;
          if (kEntropy) xsum[k] = fma(e, x, xsum[k]);
        }
      }
    }
    return max_of(max4(top));
  };
  const auto add_block = [&](const T* z_ptr, int64_t apart, int length) __attribute__((always_inline)) {
    if (row.max == -infinity(double())) {
      const A block_max = maximum(z_ptr, apart, length);
      if (block_max == -infinity(A())) return;
      row.max = softcapped(block_max);
    }
    A block_max = add(z_ptr, apart, length);
    while (first_of(exponent<kSoftcap>(F::of(block_max), scale, A(row.max), A(0))) > A(kHeadroom)) {
      row = rebase(row, double(softcapped(block_max)), DivideFirst{temperature});
      block_max = add(z_ptr, apart, length);
    }
    row.sum += sum4(sum);
    if (kEntropy) row.xsum += sum4(xsum);
    if (block_max > highest) highest = block_max;
  };

  const T* logits_ptr = (const T*)part.logits_ptr;  // (length,)
  const int64_t whole = part.length - part.length % step, stream = whole / kStreams;
  constexpr int block = kBlock / kStreams;
  for (int64_t v = 0; v < stream; v += block) {
    add_block(logits_ptr + v, stream, int(stream - v < block ? stream - v : block));
  }
  if (whole < part.length) {
    T tail[step];
    load_tail(logits_ptr + whole, int(part.length - whole), step, tail);
    add_block(tail, neighbours, neighbours);
  }
  if (highest > -infinity(A())) {
    const double row_max = softcapped(highest);
    if (row_max > row.max) row = rebase(row, row_max, DivideFirst{temperature});
  }
  *out = row;
}

// dL/dz of logits z; chosen: Σ g/τ over the choices of these logits.
template <bool kEntropy, bool kSoftcap, bool kChosen, class F, class A>
RL4LLM_INLINE F dlogit(F z, const RowGrad<A>& row, F chosen) {
  const Scale<A> scale = {row.k, row.temperature, row.softcap};
  F x = exponent<kSoftcap>(z, scale, row.max, -row.log2_sum), du;
  if (kEntropy) {
    x = max(F::of(kLeast<F>), x);  // so that 0·x is 0
    du = exp2(x) * fma(x, F::of(row.slope), F::of(row.intercept));
  } else {
    du = exp2_or_0(x) * F::of(row.intercept);
  }
  if (kChosen) du = du + chosen;
  if constexpr (!kSoftcap) return du;
  F shifted, t;
  softcap(z, row.softcap, row.max, shifted, t);
  return du * fma(t, F::of(0) - t, F::of(1));
}

template <bool kEntropy, bool kSoftcap, bool kCareful, class T, class A>
void token_logprobs_bwd_kernel(LogitsPart<A> part, const RowGrad<A>& row_grad, void* dlogits_ptr) {
  typedef typename Element<T>::vec F;
  constexpr int step = kVecs * F::width;
  const RowGrad<A> row = row_grad;  // a copy: the compiler cannot know that the stores leave the original alone
  const auto step_at = [&](const T* z_ptr, T* dz_ptr) __attribute__((always_inline)) {
    F z[kVecs];
    for (int i = 0; i < kVecs; i += 2) load2(z_ptr + i * F::width, z[i], z[i + 1]);
    for (int i = 0; i < kVecs; ++i) {
      const F dz = dlogit<kEntropy, kSoftcap, false>(z[i], row, z[i]);
      // p = 0 makes the gradient of −inf exactly 0, unless the row's coefficients are NaN or infinite.
      z[i] = kCareful ? select_less(z[i], F::of(-largest(A())), F::of(0), dz) : dz;
    }
    for (int i = 0; i < kVecs; i += 2) store2(dz_ptr + i * F::width, z[i], z[i + 1]);
  };

  const T* logits_ptr = (const T*)part.logits_ptr;  // (length,)
  T* out_ptr = (T*)dlogits_ptr;                     // (length,)
  const int64_t whole = part.length - part.length % step;
  for (int64_t v = 0; v < whole; v += step) step_at(logits_ptr + v, out_ptr + v);
  if (whole < part.length) {
    T tail[step];
    load_tail(logits_ptr + whole, int(part.length - whole), step, tail);
    step_at(tail, tail);
    for (int64_t v = whole; v < part.length; ++v) out_ptr[v] = tail[v - whole];
  }
}

template <class T, class A>
void fwd(LogitsPart<A> part, double temperature, bool entropy, RowSum<double>* sum) {
  if (part.softcap != A(0)) {
    if (entropy) return token_logprobs_fwd_kernel<true, true, T>(part, temperature, sum);
    return token_logprobs_fwd_kernel<false, true, T>(part, temperature, sum);
  }
  if (entropy) return token_logprobs_fwd_kernel<true, false, T>(part, temperature, sum);
  return token_logprobs_fwd_kernel<false, false, T>(part, temperature, sum);
}

template <class T, class A>
void bwd(LogitsPart<A> part, const RowGrad<A>& row, bool careful, void* dlogits_ptr) {
  const bool softcap = row.softcap != A(0);
  if (careful) {  // rare: one instance that does everything
    if (softcap) return token_logprobs_bwd_kernel<true, true, true, T>(part, row, dlogits_ptr);
    return token_logprobs_bwd_kernel<true, false, true, T>(part, row, dlogits_ptr);
  }
  if (softcap) return token_logprobs_bwd_kernel<true, true, false, T>(part, row, dlogits_ptr);
  if (row.slope != A(0)) return token_logprobs_bwd_kernel<true, false, false, T>(part, row, dlogits_ptr);
  return token_logprobs_bwd_kernel<false, false, false, T>(part, row, dlogits_ptr);
}

// One logit, by the vector code: a chosen token's numbers agree with its row's to the bit.
template <class T>
RL4LLM_INLINE typename Element<T>::vec load1(const void* logit_ptr) {
  typedef typename Element<T>::vec F;
  T copies[2 * F::width];
  for (int i = 0; i < 2 * F::width; ++i) copies[i] = *(const T*)logit_ptr;
  F a, b;
  load2(copies, a, b);
  return a;
}

template <class T, class A>
double scaled_logit(const void* logit_ptr, A softcap, A origin, double temperature) {
  const auto z = load1<T>(logit_ptr);
  // fp32: z' − origin first, in which softcap loses nothing; fp64: as Vec64's exponent.
  const A subtract = sizeof(A) == 8 ? A(0) : origin;
  const double shifted = first_of(softcap != A(0) ? shifted_logit<true>(z, softcap, subtract)
                                                  : shifted_logit<false>(z, softcap, subtract));
  return shifted / temperature - (sizeof(A) == 8 ? origin / temperature : 0.0);
}

template <class T, class A>
A chosen_dlogit(const void* logit_ptr, const RowGrad<A>& row, A chosen) {
  typedef typename Element<T>::vec F;
  const F z = load1<T>(logit_ptr);
  if (first_of(z) == -infinity(A())) return A(0);
  if (row.softcap != A(0)) return first_of(dlogit<true, true, true>(z, row, F::of(chosen)));
  return first_of(dlogit<true, false, true>(z, row, F::of(chosen)));
}

template <class T, class A>
void store(void* dlogit_ptr, A value) {
  typedef typename Element<T>::vec F;
  T copies[2 * F::width];
  store2(copies, F::of(value), F::of(value));
  *(T*)dlogit_ptr = copies[0];
}

template <class T, class A>
constexpr TokenLogprobsFunctions<A> functions() {
  return {&fwd<T, A>, &bwd<T, A>, &scaled_logit<T, A>, &chosen_dlogit<T, A>, &store<T, A>};
}

}  // namespace

extern const TokenLogprobsKernels token_logprobs_kernels;
const TokenLogprobsKernels token_logprobs_kernels = {functions<float, float>(), functions<bf16, float>(),
                                                     functions<fp16, float>(), functions<double, double>()};

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
