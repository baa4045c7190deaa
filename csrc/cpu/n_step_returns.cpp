// rl4llm_fast::n_step_returns on the CPU: G_t = Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n} (docs/math.md section 4).
//
// The tokens that take a step are gathered into one run and cut into blocks of n. A window of n then is the end of one
// block and the beginning of the next (van Herk 1992): sums from each token to its block's end and from the block's
// start to each token give every window with one multiply-add, whatever n is. No difference of long sums is taken, so
// nothing cancels and a NaN reaches n tokens back, no further. In fp64; one thread a sequence.
#include <algorithm>
#include <vector>

#include "cpu/sequences.h"

namespace rl4llm {
namespace {

// Scratch of one thread.
struct Run {
  std::vector<int64_t> position;
  std::vector<double> reward, value, to_end, from_start, power;
};

void windows(Run& run, int64_t n, double gamma, double bootstrap) {
  const int64_t length = int64_t(run.position.size());
  const int64_t block = std::min(n, length);
  run.to_end.resize(size_t(length)), run.from_start.resize(size_t(length)), run.power.resize(size_t(block) + 1);
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
        const void *reward_ptr = reward.at(span), *value_ptr = value.at(span);
        const char* mask_ptr = sequences.mask.at(span);
        run.position.clear(), run.reward.clear(), run.value.clear();
        for (int64_t t = 0; t < length; ++t) {
          const bool live = !mask_ptr || mask_ptr[t * sequences.mask.stride_t];
          if (!live && sequences.skip) continue;
          run.position.push_back(t);
          run.reward.push_back(live ? read_element(reward_ptr, type, t * reward.stride_t) : 0);
          run.value.push_back(live ? read_element(value_ptr, type, t * value.stride_t) : 0);
        }
        windows(run, n, discount, bootstrap ? read_element(bootstrap->data_ptr(), acc, b) : 0);
        S* row_ptr = out_ptr + span.out;
        std::fill(row_ptr, row_ptr + span.length, S(0));
        for (size_t i = 0; i < run.position.size(); ++i) {
          const int64_t t = run.position[i];
          if (!mask_ptr || mask_ptr[t * sequences.mask.stride_t]) row_ptr[t] = S(run.to_end[i]);
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
