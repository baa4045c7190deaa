// rl4llm_fast::n_step_returns on the CPU: G_t = Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n} (docs/math.md section 4).
//
// The tokens that take a step are gathered into one run. Where n is small, G^(k)_t = r_t + γ·G^(k−1)_{t+1} is taken n
// times over the run, which lies in the cache. Otherwise the run is cut into blocks of n. A window of n then is the end
// of one block and the beginning of the next (van Herk 1992): sums from each token to its block's end and from the
// block's start to each token give every window with one multiply-add, whatever n is. Neither takes a difference of
// long sums, so nothing cancels and a NaN reaches n tokens back, no further. In fp64; one thread a sequence.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/sequences.h"

namespace rl4llm {
namespace {

constexpr int64_t kFew = 16;  // steps, up to which passes over the run are the faster way

// Scratch of one thread: room for the longest sequence.
struct Run {
  int64_t length = 0;
  std::vector<int64_t> position;  // where a token of the run stands in its sequence
  std::vector<double> reward, value, to_end, from_start, power;

  void make_room(int64_t tokens) {
    if (int64_t(to_end.size()) > tokens) return;
    position.resize(size_t(tokens)), reward.resize(size_t(tokens)), value.resize(size_t(tokens));
    to_end.resize(size_t(tokens) + 1);
  }
};

// The results, in to_end.
void passes(Run& run, int64_t n, double gamma, double bootstrap) {
  double* sum = run.to_end.data();
  const double* reward = run.reward.data();
  std::copy(run.value.begin(), run.value.begin() + run.length, sum);
  sum[run.length] = bootstrap;
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t t = 0; t < run.length; ++t) sum[t] = reward[t] + gamma * sum[t + 1];
  }
}

void windows(Run& run, int64_t n, double gamma, double bootstrap) {
  const int64_t length = run.length;
  const int64_t block = std::min(n, length);
  run.from_start.resize(size_t(length)), run.power.resize(size_t(block) + 1);
  run.power[0] = 1;
  for (size_t k = 1; k < run.power.size(); ++k) run.power[k] = run.power[k - 1] * gamma;
  for (int64_t start = 0; start < length; start += block) {
    const int64_t end = std::min(start + block, length);
    double sum = 0;
    for (int64_t t = start; t < end; ++t) {
      sum += run.power[size_t(t - start)] * run.reward[size_t(t)];
      run.from_start[size_t(t)] = sum;
    }
    sum = 0;
    for (int64_t t = end - 1; t >= start; --t) run.to_end[size_t(t)] = sum = run.reward[size_t(t)] + gamma * sum;
  }
  for (int64_t start = 0; start < length; start += block) {
    const int64_t end = std::min(start + block, length);
    for (int64_t t = start; t < end; ++t) {
      const int64_t last = t + n < length ? t + n : length;  // n may be near the largest integer: see the caller
      double sum = run.to_end[size_t(t)];
      if (last > end) sum += run.power[size_t(end - t)] * run.from_start[size_t(last - 1)];
      const double behind = last < length ? run.value[size_t(last)] : bootstrap;
      run.to_end[size_t(t)] = sum + run.power[size_t(last - t)] * behind;
    }
  }
}

// f(an element of the type that is stored); bf16 as its bits.
template <class F>
void with_elements(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(uint16_t());
    case ScalarType::Half:
      return f(torch::headeronly::Half());
    default:
      fail("rewards: wanted float64, float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  }
}

// The tokens of a sequence, as doubles; those that are not live count as zeros, or not at all.
template <class T>
void gather(Run& run, const Tokens& mask, const char* mask_ptr, bool skip, const T* reward_ptr, int64_t reward_stride,
            const T* value_ptr, int64_t value_stride, int64_t length) {
  const auto wide = [](T x) {
    if constexpr (std::is_same_v<T, uint16_t>) return double(bits_to_float(uint32_t(x) << 16));
    return double(x);
  };
  if (!mask_ptr) {
    run.length = length;
    for (int64_t t = 0; t < length; ++t) run.reward[size_t(t)] = wide(reward_ptr[t * reward_stride]);
    for (int64_t t = 0; t < length; ++t) run.value[size_t(t)] = wide(value_ptr[t * value_stride]);
    return;
  }
  int64_t count = 0;
  for (int64_t t = 0; t < length; ++t) {
    const bool live = mask_ptr[t * mask.stride_t];
    run.position[size_t(count)] = t;
    run.reward[size_t(count)] = live ? wide(reward_ptr[t * reward_stride]) : 0;
    run.value[size_t(count)] = live ? wide(value_ptr[t * value_stride]) : 0;
    count += live || !skip;
  }
  run.length = count;
}

Tensor n_step_returns(Tensor rewards, Tensor values, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                      std::optional<Tensor> bootstrap, int64_t n, Tensor gamma, std::string mask_mode) {
  const Sequences sequences(rewards, mask, cu_seqlens, mask_mode);
  if (n < 1) fail("n: wanted at least 1, got ", n);
  n = std::min(n, sequences.N + 1);
  const ScalarType type = rewards.scalar_type(), acc = accumulation_type(type);
  const Tensor out = sequences.result(rewards, acc);
  const Tokens reward = sequences.tokens(rewards, "rewards"), value = sequences.tokens(values, "values");
  const double discount = read_scalar(gamma, "gamma");
  if (bootstrap &&
      (bootstrap->numel() != sequences.B || bootstrap->scalar_type() != acc || !bootstrap->is_contiguous())) {
    fail("bootstrap: wanted (", sequences.B, ",) in the accumulation dtype, got ", shape_of(*bootstrap));
  }
  const auto run_all = [&](auto* out_ptr) {
    using S = std::remove_pointer_t<decltype(out_ptr)>;
    const int64_t mean = std::max<int64_t>(1, sequences.N / std::max<int64_t>(1, sequences.B));
    parallel_jobs(sequences.B, std::max<int64_t>(1, 8192 / mean), [&](int64_t first, int64_t last) {
      Run run;
      for (int64_t b = first; b < last; ++b) {
        const Span span = sequences.span(b);
        const int64_t length = sequences.live_length(span);
        const char* mask_ptr = sequences.mask.at(span);
        run.make_room(length);
        with_elements(type, [&](auto element) {
          using T = decltype(element);
          gather(run, sequences.mask, mask_ptr, sequences.skip, reinterpret_cast<const T*>(reward.at(span)),
                 reward.stride_t, reinterpret_cast<const T*>(value.at(span)), value.stride_t, length);
        });
        const double behind = bootstrap ? read_element(bootstrap->data_ptr(), acc, b) : 0;
        (n <= kFew ? passes : windows)(run, n, discount, behind);
        S* row_ptr = out_ptr + span.out;
        if (!mask_ptr) {
          for (int64_t t = 0; t < length; ++t) row_ptr[t] = S(run.to_end[size_t(t)]);
          continue;
        }
        std::fill(row_ptr, row_ptr + span.length, S(0));
        for (int64_t i = 0; i < run.length; ++i) {
          const int64_t t = run.position[size_t(i)];
          if (mask_ptr[t * sequences.mask.stride_t]) row_ptr[t] = S(run.to_end[size_t(i)]);
        }
      }
    });
  };
  if (acc == ScalarType::Double) {
    run_all(static_cast<double*>(out.data_ptr()));
  } else {
    run_all(static_cast<float*>(out.data_ptr()));
  }
  return out;
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) { m.impl("n_step_returns", TORCH_BOX(&rl4llm::n_step_returns)); }
