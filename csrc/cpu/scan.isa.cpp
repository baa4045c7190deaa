// The scans of returns on vectors of one instruction set. isa.h says how such a file is written.
//
// A vector of W tokens is scanned in its register, in log2(W) steps; only the carry from vector to vector is serial.
#include "cpu/scan.h"

#include "cpu/vec.h"

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

#if defined(RL4LLM_ISA_AVX512)
constexpr int kBytes = 64;
#elif defined(RL4LLM_ISA_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

#define RL4LLM_METHOD inline __attribute__((always_inline))

// Inputs are brought into the accumulation dtype this many tokens at a time, in the L1 cache; divides kBlock.
constexpr int64_t kStage = 512;

template <class Scalar>
struct Lanes {
  typedef Scalar S;
  static constexpr int width = kBytes / int(sizeof(S));
  typedef S F __attribute__((vector_size(kBytes)));
  typedef decltype(F{} < F{}) I;
  typedef uint8_t Bytes __attribute__((vector_size(kBytes / sizeof(S))));
};

template <class L>
RL4LLM_INLINE typename L::F constant(typename L::S x) {
  return x - typename L::F{};
}

// W neighbours of the 2·W numbers (low, high), from the s-th on.
template <int s, class F>
RL4LLM_INLINE F slide(F low, F high) {
  constexpr int width = int(sizeof(F) / sizeof(low[0]));
  if constexpr (width == 16) {
    return __builtin_shufflevector(low, high, s, s + 1, s + 2, s + 3, s + 4, s + 5, s + 6, s + 7, s + 8, s + 9, s + 10,
                                   s + 11, s + 12, s + 13, s + 14, s + 15);
  } else if constexpr (width == 8) {
    return __builtin_shufflevector(low, high, s, s + 1, s + 2, s + 3, s + 4, s + 5, s + 6, s + 7);
  } else if constexpr (width == 4) {
    return __builtin_shufflevector(low, high, s, s + 1, s + 2, s + 3);
  } else {
    return __builtin_shufflevector(low, high, s, s + 1);
  }
}

// What stands s lanes further on in the direction of the scan, which is `filler` beyond the vector.
template <int s, bool reverse, class F>
RL4LLM_INLINE F from(F x, F filler) {
  constexpr int width = int(sizeof(F) / sizeof(x[0]));
  if constexpr (reverse) return slide<s>(x, filler);
  return slide<width - s>(filler, x);
}

template <bool reverse, int s = 1, class F>
RL4LLM_INLINE void scan_lanes(F& x, F& product) {
  if constexpr (s < int(sizeof(F) / sizeof(x[0]))) {
    x += product * from<s, reverse>(x, F{});
    product *= from<s, reverse>(product, F{} + 1);
    scan_lanes<reverse, 2 * s>(x, product);
  }
}

// The same where every b is one number: powers[k] = b^k.
template <bool reverse, int s = 1, class F, class S>
RL4LLM_INLINE void scan_lanes_uniform(F& x, const S* powers) {
  if constexpr (s < int(sizeof(F) / sizeof(x[0]))) {
    x += powers[s] * from<s, reverse>(x, F{});
    scan_lanes_uniform<reverse, 2 * s>(x, powers);
  }
}

template <class L>
RL4LLM_INLINE typename L::F load(const typename L::S* ptr, int lanes) {
  typename L::F result = {};
  if (lanes == L::width) {
    __builtin_memcpy(&result, ptr, sizeof result);
  } else {
    for (int j = 0; j < lanes; ++j) result[j] = ptr[j];
  }
  return result;
}

template <class L>
RL4LLM_INLINE void store(typename L::S* ptr, int lanes, typename L::F value) {
  if (lanes == L::width) {
    __builtin_memcpy(ptr, &value, sizeof value);
  } else {
    for (int j = 0; j < lanes; ++j) ptr[j] = value[j];
  }
}

RL4LLM_INLINE Lanes<float>::F exp(Lanes<float>::F x) {
  x *= 1.44269504088896341f;
  x = x < -150.0f ? constant<Lanes<float>>(-150.0f) : x > 127.0f ? constant<Lanes<float>>(127.0f) : x;
  Vec result, argument;
  __builtin_memcpy(&argument.v, &x, sizeof x);
  result = exp2(argument);
  __builtin_memcpy(&x, &result.v, sizeof x);
  return x;
}
RL4LLM_INLINE Lanes<double>::F exp(Lanes<double>::F x) {
  for (int j = 0; j < Lanes<double>::width; ++j) x[j] = __builtin_exp(x[j]);
  return x;
}

// Per-token data of one stage as numbers of the accumulation dtype, side by side.
template <class S>
RL4LLM_INLINE void widen(ScanElement element, const void* ptr, int64_t stride, int64_t count, S* out_ptr) {
  if (element == ScanElement::same) {
    const S* in_ptr = static_cast<const S*>(ptr);
    for (int64_t i = 0; i < count; ++i) out_ptr[i] = in_ptr[i * stride];
  } else if (element == ScanElement::bf16) {
    const uint16_t* in_ptr = static_cast<const uint16_t*>(ptr);
    uint32_t bits[kStage];
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) bits[i] = uint32_t(in_ptr[i]) << 16;
    } else {
      for (int64_t i = 0; i < count; ++i) bits[i] = uint32_t(in_ptr[i * stride]) << 16;
    }
    float values[kStage];
    __builtin_memcpy(values, bits, uint64_t(count) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) out_ptr[i] = S(values[i]);
  } else {
    const uint16_t* in_ptr = static_cast<const uint16_t*>(ptr);
    int64_t i = 0;
#if defined(RL4LLM_ISA_AVX512) || defined(RL4LLM_ISA_AVX2)
    if constexpr (sizeof(S) == sizeof(float)) {
      if (stride == 1) {
        for (; i + 8 <= count; i += 8) {
          _mm256_storeu_ps(out_ptr + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in_ptr + i))));
        }
      }
    }
#endif
    for (; i < count; ++i) {
      // An fp16 times 2^-112 has the bits of an fp32, 13 places further up; its subnormals come right by themselves.
      const uint32_t half = in_ptr[i * stride], size = (half & 0x7fff) << 13;
      float value;
      __builtin_memcpy(&value, &size, sizeof value);
      value *= 0x1p112f;
      if (size >= 0x7c00u << 13) {
        const uint32_t bits = size | 0x7f800000u;
        __builtin_memcpy(&value, &bits, sizeof value);
      }
      out_ptr[i] = S(half & 0x8000 ? -value : value);
    }
  }
}

// One vector of tokens as a formula sees it: inputs are 0 where a token is not live.
template <class L>
struct Tokens {
  typename L::F input[num_inputs];
  typename L::I live;
  typename L::I takes_step;  // the others pass on what comes in
};

// A_t = r_t − V_t + x_{t+1} and R_t = r_t + x_{t+1}, where x_t = γ(λ·R_t + (1−λ)·V_t): what the token before gets of
// reward and value. So x_t = γ(λ·r_t + (1−λ)·V_t) + γλ·x_{t+1}, and needs no value of another token.
template <class L>
struct Gae {
  typedef typename L::S S;
  typedef typename L::F F;
  static constexpr bool reverse = true, uniform = true;
  S decay, of_reward, of_value, beta;
  F reward, value;

  explicit Gae(const ScanRow<S>& row)
      : decay(S(row.numbers.gamma * row.numbers.lam)),
        of_reward(decay),
        of_value(S(row.numbers.gamma * (1 - row.numbers.lam))),
        beta(S(row.numbers.beta)) {}
  RL4LLM_METHOD F offset(const ScanRow<S>& row, const Tokens<L>& tokens, F&, ScanState<S>&) {
    reward = tokens.input[in_rewards];
    value = tokens.input[in_values];
    if (row.input_ptr[in_kl]) reward -= beta * tokens.input[in_kl];
    return of_reward * reward + of_value * value;
  }
  RL4LLM_METHOD F first(F, F next) const { return (reward - value) + next; }
  RL4LLM_METHOD F second(F, F next) const { return reward + next; }
};

// The adjoint: h_t = g_t + b_t·h_{t−1} with g = dA + dR, b as above; dr_t = h_t, dV_t = −dA_t + γ(1−λ)·h_{t−1}.
template <class L>
struct GaeBackward {
  typedef typename L::S S;
  typedef typename L::F F;
  static constexpr bool reverse = false, uniform = true;
  S decay, of_value;
  F grad_advantages;

  explicit GaeBackward(const ScanRow<S>& row)
      : decay(S(row.numbers.gamma * row.numbers.lam)), of_value(S(row.numbers.gamma * (1 - row.numbers.lam))) {}
  RL4LLM_METHOD F offset(const ScanRow<S>&, const Tokens<L>& tokens, F&, ScanState<S>&) {
    grad_advantages = tokens.input[in_grad_advantages];
    return grad_advantages + tokens.input[in_grad_returns];
  }
  RL4LLM_METHOD F first(F h, F) const { return h; }
  RL4LLM_METHOD F second(F, F before) const { return of_value * before - grad_advantages; }
};

// x_t = v_t − V_t = ρ_t(r_t + γ·V_{t+1} − V_t) + γ·c_t·x_{t+1}; V_{t+1} is that of the next token that takes a step.
template <class L>
struct Vtrace {
  typedef typename L::S S;
  typedef typename L::F F;
  static constexpr bool reverse = true, uniform = false;
  S decay, gamma, rho_max, c_max;
  F reward, value, next_value, rho;

  explicit Vtrace(const ScanRow<S>& row)
      : decay(S(row.numbers.gamma * row.numbers.lam)),
        gamma(S(row.numbers.gamma)),
        rho_max(S(row.numbers.rho_max)),
        c_max(S(row.numbers.c_max)) {}
  template <int s = 1>
  RL4LLM_INLINE void fill(F& known, typename L::I& is_known) {
    if constexpr (s < L::width) {
      known = is_known ? known : slide<s>(known, F{});
      is_known |= slide<s>(is_known, typename L::I{});
      fill<2 * s>(known, is_known);
    }
  }
  RL4LLM_METHOD F offset(const ScanRow<S>&, const Tokens<L>& tokens, F& factor, ScanState<S>& state) {
    reward = tokens.input[in_rewards];
    value = tokens.input[in_values];
    // The value of the token itself or else of the next one on the right; then one lane further.
    F known = value;
    typename L::I is_known = tokens.takes_step;
    fill(known, is_known);
    const F incoming = constant<L>(state.next_value);
    known = is_known ? known : incoming;
    next_value = slide<1>(known, incoming);
    state.next_value = known[0];
    const F ratio = exp(tokens.input[in_logp] - tokens.input[in_rollout_logp]);
    rho = ratio > rho_max ? constant<L>(rho_max) : ratio;  // NaN stays
    factor = decay * (ratio > c_max ? constant<L>(c_max) : ratio);
    return rho * ((reward + gamma * next_value) - value);
  }
  RL4LLM_METHOD F first(F, F next) const { return rho * ((reward + gamma * (next_value + next)) - value); }
  RL4LLM_METHOD F second(F x, F) const { return value + x; }
};

enum class Live { all, none, some };

template <class L>
RL4LLM_INLINE Live live_lanes(const uint8_t* mask_ptr, int lanes, typename L::I& live) {
  typename L::Bytes bytes = {};
  if (mask_ptr == nullptr && lanes == L::width) {
    live = typename L::I{} == typename L::I{};
    return Live::all;
  }
  if (mask_ptr && lanes == L::width) {
    __builtin_memcpy(&bytes, mask_ptr, sizeof bytes);
  } else {
    for (int j = 0; j < lanes; ++j) bytes[j] = mask_ptr ? mask_ptr[j] : 1;
  }
  live = __builtin_convertvector(bytes, typename L::I) != typename L::I{};
  constexpr __SIZE_TYPE__ word = sizeof bytes < 8 ? sizeof bytes : 8;
  uint64_t all = ~uint64_t(0), any = 0;
  for (__SIZE_TYPE__ i = 0; i < sizeof bytes; i += word) {
    uint64_t part = 0;
    __builtin_memcpy(&part, reinterpret_cast<const char*>(&bytes) + i, word);
    all &= part, any |= part;
  }
  const uint64_t ones = 0x0101010101010101u >> (64 - 8 * word);
  return lanes == L::width && all == ones ? Live::all : any == 0 ? Live::none : Live::some;
}

// Beyond this many halvings a carry adds nothing any more; kept off the subnormal numbers, on which processors crawl.
template <class S>
RL4LLM_INLINE S without_subnormals(S x) {
  const S least = S(1e-30);
  return x < least && x > -least ? S(0) : x;
}
// The product must stay above 0 if it was: 0·inf would be NaN.
template <class S>
RL4LLM_INLINE S not_below_least(S product) {
  const S least = S(1e-30);
  return product < least && product > 0 ? least : product;
}

template <class Formula, class L, bool write>
void walk(const ScanRow<typename L::S>& row, int64_t begin, int64_t end, typename L::S x_in,
          ScanState<typename L::S>& state) {
  typedef typename L::S S;
  typedef typename L::F F;
  typedef typename L::I I;
  constexpr int width = L::width;
  constexpr bool reverse = Formula::reverse;
  Formula formula(row);
  S powers[width + 1];
  powers[0] = 1;
  for (int k = 1; k <= width; ++k) powers[k] = powers[k - 1] * formula.decay;
  F all_products;
  for (int j = 0; j < width; ++j) all_products[j] = powers[reverse ? width - j : j + 1];
  const F zero = {}, one = zero + 1;

  S buffer[num_inputs][kStage];
  uint8_t mask_buffer[kStage];
  for (int64_t staged = 0; staged < end - begin; staged += kStage) {
    // Stages, like blocks, are counted from the first token; so the last one may be short.
    const int64_t stages = (end - begin + kStage - 1) / kStage, k = staged / kStage;
    const int64_t start = begin + (reverse ? stages - 1 - k : k) * kStage;
    const int64_t count = end - start < kStage ? end - start : kStage;
    const S* input_ptr[num_inputs];
    for (int i = 0; i < num_inputs; ++i) {
      const int64_t size = row.element == ScanElement::same ? int64_t(sizeof(S)) : 2;
      const char* ptr = static_cast<const char*>(row.input_ptr[i]);
      if (ptr) ptr += start * row.stride[i] * size;
      if (ptr && (row.element != ScanElement::same || row.stride[i] != 1)) {
        widen(row.element, ptr, row.stride[i], count, buffer[i]);
        ptr = reinterpret_cast<const char*>(buffer[i]);
      }
      input_ptr[i] = reinterpret_cast<const S*>(ptr);
    }
    const uint8_t* mask_ptr = row.mask_ptr ? row.mask_ptr + start * row.mask_stride : nullptr;
    if (mask_ptr && row.mask_stride != 1) {
      for (int64_t i = 0; i < count; ++i) mask_buffer[i] = mask_ptr[i * row.mask_stride];
      mask_ptr = mask_buffer;
    }

    const int64_t last = (count - 1) / width * width;
    for (int64_t step = 0; step <= last; step += width) {
      const int64_t i = reverse ? last - step : step;
      const int lanes = count - i < width ? int(count - i) : width;
      Tokens<L> tokens;
      const Live live = live_lanes<L>(mask_ptr ? mask_ptr + i : nullptr, lanes, tokens.live);
      if (live == Live::none && row.skip) {  // nothing happens
        for (int k = 0; write && k < 2; ++k) {
          if (row.out_ptr[k]) store<L>(row.out_ptr[k] + start + i, lanes, zero);
        }
        continue;
      }
      for (int k = 0; k < num_inputs; ++k) {
        const F x = input_ptr[k] ? load<L>(input_ptr[k] + i, lanes) : zero;
        tokens.input[k] = tokens.live ? x : zero;
      }
      const int64_t score_at = row.score_at - start - i;
      if (score_at >= 0 && score_at < lanes) tokens.input[in_rewards][score_at] += row.score;

      tokens.takes_step = row.skip ? tokens.live : I{} == I{};
      for (int j = lanes; j < width; ++j) tokens.takes_step[j] = 0;

      F factor = constant<L>(formula.decay), products;
      F local = formula.offset(row, tokens, factor, state);
      if (Formula::uniform && lanes == width && (live == Live::all || !row.skip)) {
        products = all_products;
        scan_lanes_uniform<reverse>(local, powers);
      } else {
        products = tokens.takes_step ? factor : one;
        local = tokens.takes_step ? local : zero;
        scan_lanes<reverse>(local, products);
      }
      local += products * state.local;
      products *= state.product;
      if (write) {
        const F x = local + products * x_in;
        const F incoming = constant<L>(state.local + state.product * x_in);
        const F next = from<1, reverse>(x, incoming);
        if (row.out_ptr[0]) store<L>(row.out_ptr[0] + start + i, lanes, tokens.live ? formula.first(x, next) : zero);
        if (row.out_ptr[1]) store<L>(row.out_ptr[1] + start + i, lanes, tokens.live ? formula.second(x, next) : zero);
      }
      state.local = without_subnormals(local[reverse ? 0 : width - 1]);
      state.product = not_below_least(products[reverse ? 0 : width - 1]);
    }
  }
}

template <template <class> class Formula, class S>
void scan(const ScanRow<S>& row, int64_t begin, int64_t end, bool write, S x_in, ScanState<S>& state) {
  typedef Lanes<S> L;
  if (write) {
    walk<Formula<L>, L, true>(row, begin, end, x_in, state);
  } else {
    walk<Formula<L>, L, false>(row, begin, end, x_in, state);
  }
}

}  // namespace

template <class S>
static constexpr ScanFunctions<S> functions = {scan<Gae, S>, scan<GaeBackward, S>, scan<Vtrace, S>};

extern const ScanKernels scan_kernels = {functions<float>, functions<double>};

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
