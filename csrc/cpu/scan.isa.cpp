// The scans of returns on vectors of one instruction set. isa.h says how such a file is written.
//
// A vector of W tokens is scanned in its register, in log2(W) steps; only the carry from vector to vector is serial.
#include "cpu/scan_lanes.h"

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

#define RL4LLM_METHOD inline __attribute__((always_inline))

// One vector of tokens as a formula sees it: inputs are 0 where a token is not live. Most calls are plain: the
// formula's first inputs and both results, no KL and no score. Told so at compile time, a vector of gae costs three
// quarters.
template <class L, bool is_plain>
struct Tokens {
  static constexpr bool plain = is_plain;
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
  static constexpr int inputs = 2;  // of a plain call
  S decay, of_reward, of_value, beta;
  F reward, value;

  explicit Gae(const ScanRow<S>& row)
      : decay(S(row.numbers.gamma * row.numbers.lam)),
        of_reward(decay),
        of_value(S(row.numbers.gamma * (1 - row.numbers.lam))),
        beta(S(row.numbers.beta)) {}
  template <class Tokens>
  RL4LLM_METHOD F offset(const ScanRow<S>& row, const Tokens& tokens, F&, F&) {
    reward = tokens.input[in_rewards];
    value = tokens.input[in_values];
    if (!Tokens::plain && row.input_ptr[in_kl]) reward -= beta * tokens.input[in_kl];
    return fused(constant<L>(of_reward), reward, of_value * value);
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
  static constexpr int inputs = 2;
  S decay, of_value;
  F grad_advantages;

  explicit GaeBackward(const ScanRow<S>& row)
      : decay(S(row.numbers.gamma * row.numbers.lam)), of_value(S(row.numbers.gamma * (1 - row.numbers.lam))) {}
  template <class Tokens>
  RL4LLM_METHOD F offset(const ScanRow<S>&, const Tokens& tokens, F&, F&) {
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
  static constexpr int inputs = 4;
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
  template <class Tokens>
  RL4LLM_METHOD F offset(const ScanRow<S>&, const Tokens& tokens, F& factor, F& incoming_value) {
    reward = tokens.input[in_rewards];
    value = tokens.input[in_values];
    // The value of the token itself or else of the next one on the right; then one lane further.
    F known = value;
    typename L::I is_known = tokens.takes_step;
    fill(known, is_known);
    known = is_known ? known : incoming_value;
    next_value = slide<1>(known, incoming_value);
    incoming_value = broadcast<0>(known);
    const F ratio = exp(tokens.input[in_logp] - tokens.input[in_rollout_logp]);
    rho = ratio > rho_max ? constant<L>(rho_max) : ratio;  // NaN stays
    factor = decay * (ratio > c_max ? constant<L>(c_max) : ratio);
    return rho * ((reward + gamma * next_value) - value);
  }
  RL4LLM_METHOD F first(F, F next) const { return rho * ((reward + gamma * (next_value + next)) - value); }
  RL4LLM_METHOD F second(F x, F) const { return value + x; }
};

// A carry that has faded this far adds nothing any more; kept off the subnormal numbers, on which processors crawl.
template <class L>
RL4LLM_INLINE typename L::F without_subnormals(typename L::F x) {
  const typename L::F least = constant<L>(typename L::S(1e-30));
  return ((x < least) & (x > -least)) ? typename L::F{} : x;
}
// Nor may the product reach 0: 0·inf would be NaN.
template <class L>
RL4LLM_INLINE typename L::F not_below_least(typename L::F x) {
  const typename L::F least = constant<L>(typename L::S(1e-30));
  return ((x < least) & (x > -least)) ? least : x;
}

// What goes from vector to vector, in every lane.
template <class L>
struct Carry {
  typename L::F local, product, next_value;
};

typedef ScanUse Use;

// What a walk over one stage works with.
template <class L>
struct Stage {
  typedef typename L::S S;
  const S* input_ptr[num_inputs];  // at the stage's first token, side by side; null: absent
  const uint8_t* mask_ptr;
  S* out_ptr[2];
  int64_t score_at;
};

template <class L>
struct Powers {
  typename L::S of[L::width + 1];       // b^k
  typename L::S carried[2 * L::width];  // b^W … b^1, then 1: what carries from before into the first k of W lanes
  typename L::F all;                    // the same into each of W lanes
};

enum class Kind { all, some, tail };  // every token of the vector is live; not every one is; the sequence ends in it

// One vector of tokens: scans it, joins it to the carry (and, in a block of several, keeps the product), writes.
template <bool plain, class Formula, class L, Use use, Kind kind>
RL4LLM_INLINE void step(Formula& formula, const ScanRow<typename L::S>& row, const Stage<L>& stage, int64_t i,
                        int count, const LiveLanes<L>& live, const Powers<L>& powers, typename L::F x_in,
                        Carry<L>& carry) {
  typedef typename L::F F;
  typedef typename L::I I;
  constexpr bool reverse = Formula::reverse, all_live = kind == Kind::all;
  const int lanes = kind == Kind::tail ? count : L::width;
  const F zero = {}, one = zero + 1;
  Tokens<L, plain> tokens;
  tokens.live = live.lanes;
  tokens.takes_step = I{} == I{};
  if (!all_live) {
    if (row.skip) tokens.takes_step = live.lanes;
    for (int j = lanes; j < L::width; ++j) tokens.takes_step[j] = 0;
  }
  for (int k = 0; k < (plain ? Formula::inputs : num_inputs); ++k) {
    const bool there = plain || stage.input_ptr[k];
    tokens.input[k] = there ? load<L>(stage.input_ptr[k] + i, lanes) : zero;
    if (!all_live && there) tokens.input[k] = only(live, tokens.input[k]);
  }
  if constexpr (!plain) {
    const int64_t score_at = stage.score_at - i;
    if (score_at >= 0 && score_at < lanes) tokens.input[in_rewards][score_at] += row.score;
  }

  F factor = constant<L>(formula.decay), products = powers.all;
  F local = formula.offset(row, tokens, factor, carry.next_value);
  // Live tokens side by side in the first lanes: scanned as a full vector is, since beyond them there is nothing.
  const bool side_by_side = kCompresses && Formula::uniform && reverse && !all_live && row.skip;
  if (side_by_side) {
    local = compress(local, live.bits);
    products = load<L>(powers.carried + L::width - __builtin_popcount(live.bits), L::width);
    scan_lanes_uniform<reverse>(local, powers.of);
  } else if (Formula::uniform && (all_live || (kind == Kind::some && !row.skip))) {
    scan_lanes_uniform<reverse>(local, powers.of);
  } else {
    products = tokens.takes_step ? factor : one;
    local = tokens.takes_step ? local : zero;
    scan_lanes<reverse>(local, products);
  }
  // What goes to the next vector waits for no shuffle of what came in: the same numbers, and the one serial path.
  constexpr int edge = reverse ? 0 : L::width - 1;
  Carry<L> next_carry = carry;
  next_carry.local = fused(broadcast<edge>(products), carry.local, broadcast<edge>(local));
  local = fused(products, carry.local, local);
  if (use != Use::whole) {
    next_carry.product = not_below_least<L>(broadcast<edge>(products) * carry.product);
    products *= carry.product;
  }
  if (use != Use::summary) {
    F x = use == Use::whole ? local : fused(products, x_in, local);
    const F incoming = use == Use::whole ? carry.local : fused(carry.product, x_in, carry.local);
    F next = from<1, reverse>(x, incoming);
    if (side_by_side) x = expand(x, live.bits), next = expand(next, live.bits);
    if (plain || stage.out_ptr[0]) {
      const F out = formula.first(x, next);
      store<L>(stage.out_ptr[0] + i, lanes, all_live ? out : only(live, out));
    }
    if (plain || stage.out_ptr[1]) {
      const F out = formula.second(x, next);
      store<L>(stage.out_ptr[1] + i, lanes, all_live ? out : only(live, out));
    }
  }
  carry = next_carry;
}

// What will be read soon. Scans run through neighbouring sequences without a gap (scan.cpp), so that what lies beyond
// the sequence is asked for too.
template <bool reverse>
RL4LLM_INLINE void prefetch(const void* ptr) {
  constexpr uint64_t kAhead = 2048;  // bytes; in a loop of the kernel alone 1024 took 6% longer, no prefetch 19%
  const uint64_t address = reinterpret_cast<uint64_t>(ptr);
  __builtin_prefetch(reinterpret_cast<const void*>(reverse ? address - kAhead : address + kAhead));
}

template <class Formula, class S>
bool is_plain(const ScanRow<S>& row) {
  for (int n = 0; n < num_inputs; ++n) {
    if ((row.input_ptr[n] != nullptr) != (n < Formula::inputs)) return false;
  }
  return row.score_at < 0 && row.out_ptr[0] && row.out_ptr[1];
}

template <bool plain, class Formula, class L, Use use>
void walk(const ScanRow<typename L::S>& row, int64_t begin, int64_t end, typename L::S x_in_number,
          ScanState<typename L::S>& state) {
  typedef typename L::S S;
  typedef typename L::F F;
  constexpr int width = L::width;
  constexpr bool reverse = Formula::reverse;
  Formula formula(row);
  Powers<L> powers;
  powers.of[0] = 1;
  for (int k = 1; k <= width; ++k) powers.of[k] = powers.of[k - 1] * formula.decay;
  for (int j = 0; j < width; ++j) {
    powers.all[j] = powers.of[reverse ? width - j : j + 1];
    powers.carried[j] = powers.of[width - j], powers.carried[width + j] = 1;
  }
  const F x_in = constant<L>(x_in_number);
  Carry<L> carry = {constant<L>(state.local), constant<L>(state.product), constant<L>(state.next_value)};

  S buffer[num_inputs][kStage];
  uint8_t mask_buffer[kStage];
  // Stages, like blocks, are counted from the first token: the last one may be short.
  const int64_t stages = (end - begin + kStage - 1) / kStage;
  for (int64_t k = 0; k < stages; ++k) {
    const int64_t start = begin + (reverse ? stages - 1 - k : k) * kStage;
    const int64_t count = end - start < kStage ? end - start : kStage;
    Stage<L> stage;
    for (int n = 0; n < num_inputs; ++n) {
      const int64_t size = row.element == ScanElement::same ? int64_t(sizeof(S)) : 2;
      const char* ptr = static_cast<const char*>(row.input_ptr[n]);
      if (ptr) ptr += start * row.stride[n] * size;
      if (ptr && (row.element != ScanElement::same || row.stride[n] != 1)) {
        widen(row.element, ptr, row.stride[n], count, buffer[n]);
        ptr = reinterpret_cast<const char*>(buffer[n]);
      }
      stage.input_ptr[n] = reinterpret_cast<const S*>(ptr);
    }
    stage.mask_ptr = row.mask_ptr ? row.mask_ptr + start * row.mask_stride : nullptr;
    if (stage.mask_ptr && row.mask_stride != 1) {
      for (int64_t i = 0; i < count; ++i) mask_buffer[i] = stage.mask_ptr[i * row.mask_stride];
      stage.mask_ptr = mask_buffer;
    }
    for (int n = 0; n < 2; ++n) stage.out_ptr[n] = row.out_ptr[n] ? row.out_ptr[n] + start : nullptr;
    stage.score_at = row.score_at - start;

    const int64_t last = (count - 1) / width * width;
    for (int64_t taken = 0; taken <= last; taken += width) {
      const int64_t i = reverse ? last - taken : taken;
      const int lanes = count - i < width ? int(count - i) : width;
      for (int n = 0; n < (plain ? Formula::inputs : num_inputs); ++n) {
        if (plain || stage.input_ptr[n]) prefetch<reverse>(stage.input_ptr[n] + i);
      }
      LiveLanes<L> live;
      const Live kind = live_lanes<L>(stage.mask_ptr ? stage.mask_ptr + i : nullptr, lanes, live);
      if (kind == Live::all) {
        step<plain, Formula, L, use, Kind::all>(formula, row, stage, i, width, live, powers, x_in, carry);
      } else if (lanes == width && (kind == Live::some || !row.skip)) {
        step<plain, Formula, L, use, Kind::some>(formula, row, stage, i, width, live, powers, x_in, carry);
      } else if (kind == Live::some || !row.skip) {
        step<plain, Formula, L, use, Kind::tail>(formula, row, stage, i, lanes, live, powers, x_in, carry);
      } else if (use != Use::summary) {  // nothing happens
        for (S* ptr : stage.out_ptr) {
          if (plain || ptr) store<L>(ptr + i, lanes, F{});
        }
      }
    }
    carry.local = without_subnormals<L>(carry.local);
  }
  state = {carry.local[0], carry.product[0], carry.next_value[0]};
}

template <bool plain, class Formula, class L, class S>
void scan(const ScanRow<S>& row, int64_t begin, int64_t end, ScanUse use, S x_in, ScanState<S>& state) {
  if (use == Use::whole) {
    walk<plain, Formula, L, Use::whole>(row, begin, end, x_in, state);
  } else if (use == Use::summary) {
    walk<plain, Formula, L, Use::summary>(row, begin, end, x_in, state);
  } else {
    walk<plain, Formula, L, Use::part>(row, begin, end, x_in, state);
  }
}

template <template <class> class Formula, class S>
void scan(const ScanRow<S>& row, int64_t begin, int64_t end, ScanUse use, S x_in, ScanState<S>& state) {
  typedef Lanes<S> L;
  if (is_plain<Formula<L>>(row)) {
    scan<true, Formula<L>, L>(row, begin, end, use, x_in, state);
  } else {
    scan<false, Formula<L>, L>(row, begin, end, use, x_in, state);
  }
}

}  // namespace

template <class S>
static constexpr ScanFunctions<S> functions = {scan<Gae, S>, scan<GaeBackward, S>, scan<Vtrace, S>};

extern const ScanKernels scan_kernels = {functions<float>, functions<double>};

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
