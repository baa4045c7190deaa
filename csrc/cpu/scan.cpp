// gae, its backward and vtrace on the CPU: checks, sequences and threads around scan.isa.cpp.
//
// A thread takes whole sequences, block after block; where T is the outer dimension, 16 neighbours together, whose
// tokens are brought side by side first: a cache line holds one token of each. Where there are fewer sequences than
// threads, long ones are shared: every block's own part of the scan first, then what comes in to each block, then the
// results. The numbers are the same either way, because a block always joins the next one through (local, product).
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/scan.h"
#include "cpu/sequences.h"

namespace rl4llm {
namespace {

template <class S>
const ScanFunctions<S>& functions() {
  return kernels_for<S>(scan_kernels());
}

constexpr int64_t kColumns = 16;  // sequences: 64 bytes of fp32

template <class S>
using Walk = void (*)(const ScanRow<S>&, int64_t, int64_t, ScanUse, S, ScanState<S>&);

// One sequence as the kernels take it, and how much of it there is to do.
template <class S>
struct Job {
  ScanRow<S> row;
  int64_t length = 0;  // up to the last live token
  int64_t blocks = 0;
  S x_in = 0, next_value = 0;  // what stands behind the last live token
  S* x_out_ptr = nullptr;      // where what leaves the sequence goes, or null
  S x_out_scale = 1;
};

template <class S>
class Scan {
 public:
  Scan(const Sequences& sequences, ScanNumbers numbers, bool reverse, Walk<S> walk)
      : sequences_(sequences), numbers_(numbers), reverse_(reverse), walk_(walk) {}

  void input(int i, const std::optional<Tensor>& tensor, const char* name) {
    if (tensor) inputs_[i] = sequences_.tokens(*tensor, name);
  }
  void output(int i, const Tensor& tensor) { out_ptr_[i] = static_cast<S*>(tensor.data_ptr()); }
  S* scores_ptr = nullptr;     // (B,) or null
  S* bootstrap_ptr = nullptr;  // (B,) or null
  S bootstrap_scale = 0;       // what comes in to the last token is this times the bootstrap value
  S* x_out_ptr = nullptr;      // (B,), or null: what leaves each sequence, times x_out_scale
  S x_out_scale = 1;

  void run() const {
    const int64_t B = sequences_.B, threads = torch::stable::get_num_threads();
    if (B == 0) return;
    if (B < threads) {
      for (int64_t b = 0; b < B; ++b) share(job(b));
      return;
    }
    if (std::any_of(inputs_, inputs_ + num_inputs, [](const Tokens& x) { return x.columns(); }) ||
        sequences_.mask.columns()) {
      return parallel_jobs(B, kColumns, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; b += kColumns) columns(b, std::min(b + kColumns, end));
      });
    }
    const int64_t mean = std::max<int64_t>(1, sequences_.N / B);
    const int64_t batch = std::max<int64_t>(1, std::min(std::max<int64_t>(16384 / mean, 16), B / (4 * threads)));
    parallel_jobs(B, batch, [&](int64_t begin, int64_t end) {
      // In the order of the scan, so that memory is gone through without a jump.
      for (int64_t k = 0; k < end - begin; ++k) alone(job(reverse_ ? end - 1 - k : begin + k));
    });
  }

 private:
  Job<S> job(int64_t b) const {
    const Span span = sequences_.span(b);
    Job<S> job;
    job.row = {};
    for (int i = 0; i < num_inputs; ++i) {
      job.row.input_ptr[i] = inputs_[i].at(span);
      job.row.stride[i] = inputs_[i].stride_t;
      if (inputs_[i].base_ptr) job.row.element = element_of(inputs_[i].type);
    }
    job.row.mask_ptr = static_cast<const uint8_t*>(static_cast<const void*>(sequences_.mask.at(span)));
    job.row.mask_stride = sequences_.mask.stride_t;
    job.row.skip = sequences_.skip;
    job.row.numbers = numbers_;
    for (int i = 0; i < 2; ++i) job.row.out_ptr[i] = out_ptr_[i] ? out_ptr_[i] + span.out : nullptr;
    job.length = sequences_.live_length(span);
    job.blocks = (job.length + kBlock - 1) / kBlock;
    job.row.score_at = scores_ptr && job.length > 0 ? job.length - 1 : -1;
    job.row.score = scores_ptr ? scores_ptr[b] : S(0);
    if (bootstrap_ptr) {
      job.next_value = bootstrap_ptr[b];
      job.x_in = bootstrap_scale == 0 ? S(0) : bootstrap_scale * bootstrap_ptr[b];
    }
    for (S* ptr : job.row.out_ptr) {
      if (ptr) std::fill(ptr + job.length, ptr + span.length, S(0));
    }
    if (x_out_ptr) job.x_out_ptr = x_out_ptr + b, job.x_out_scale = x_out_scale;
    return job;
  }

  static ScanElement element_of(ScalarType type) {
    return type == ScalarType::BFloat16 ? ScanElement::bf16
           : type == ScalarType::Half   ? ScanElement::fp16
                                        : ScanElement::same;
  }

  // The k-th block in the order of the scan.
  void block(const Job<S>& job, int64_t k, ScanUse use, S x_in, ScanState<S>& state) const {
    const int64_t begin = (reverse_ ? job.blocks - 1 - k : k) * kBlock;
    state.local = use == ScanUse::whole ? x_in : S(0), state.product = 1;
    walk_(job.row, begin, std::min(begin + kBlock, job.length), use, x_in, state);
  }

  void finish(const Job<S>& job, S x) const {
    if (job.x_out_ptr) *job.x_out_ptr = job.length > 0 ? job.x_out_scale * x : S(0);
  }

  void alone(const Job<S>& job) const {
    ScanState<S> state = {0, 1, job.next_value};
    S x = job.x_in;
    for (int64_t k = 0; k < job.blocks; ++k) {
      block(job, k, job.blocks == 1 ? ScanUse::whole : ScanUse::part, x, state);
      x = job.blocks == 1 ? state.local : state.local + state.product * x;
    }
    finish(job, x);
  }

  // Sequences [begin, end) whose tokens are columns: block after block of all of them.
  void columns(int64_t begin, int64_t end) const {
    std::vector<Job<S>> jobs;
    std::vector<ScanState<S>> states;
    std::vector<S> x;
    for (int64_t b = begin; b < end; ++b) {
      jobs.push_back(job(b));
      states.push_back({0, 1, jobs.back().next_value});
      x.push_back(jobs.back().x_in);
    }
    const Tokens* tokens[num_inputs + 1];
    std::vector<char> rows[num_inputs + 1];
    for (int i = 0; i <= num_inputs; ++i) tokens[i] = i < num_inputs ? &inputs_[i] : &sequences_.mask;
    const int64_t blocks = (sequences_.T + kBlock - 1) / kBlock;
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t place = reverse_ ? blocks - 1 - n : n, first = place * kBlock;
      const int64_t count = std::min(kBlock, sequences_.T - first);
      for (int i = 0; i <= num_inputs; ++i) {
        if (!tokens[i]->columns()) continue;
        rows[i].resize(size_t((end - begin) * count * tokens[i]->element_size));
        columns_to_rows(*tokens[i], begin, end - begin, first, count, rows[i].data());
      }
      for (size_t j = 0; j < jobs.size(); ++j) {
        if (place >= jobs[j].blocks) continue;
        Job<S> own = jobs[j];
        for (int i = 0; i <= num_inputs; ++i) {
          if (!tokens[i]->columns()) continue;
          const char* row_ptr = rows[i].data() + (int64_t(j) * count - first) * tokens[i]->element_size;
          if (i < num_inputs) {
            own.row.input_ptr[i] = row_ptr, own.row.stride[i] = 1;
          } else {
            own.row.mask_ptr = reinterpret_cast<const uint8_t*>(row_ptr), own.row.mask_stride = 1;
          }
        }
        const bool whole = own.blocks == 1;
        block(own, reverse_ ? own.blocks - 1 - place : place, whole ? ScanUse::whole : ScanUse::part, x[j], states[j]);
        x[j] = whole ? states[j].local : states[j].local + states[j].product * x[j];
      }
    }
    for (size_t j = 0; j < jobs.size(); ++j) finish(jobs[j], x[j]);
  }

  // The value that comes in to the k-th block: that of the next token on its right that takes a step.
  S next_value(const Job<S>& job, int64_t k) const {
    const ScanRow<S>& row = job.row;
    int64_t t = (job.blocks - k) * kBlock;
    const auto live = [&](int64_t i) { return !row.mask_ptr || row.mask_ptr[i * row.mask_stride]; };
    if (row.skip) {
      while (t < job.length && !live(t)) ++t;
    }
    if (t >= job.length) return job.next_value;
    if (!live(t) || !row.input_ptr[in_values]) return 0;
    return S(read_element(row.input_ptr[in_values], inputs_[in_values].type, t * row.stride[in_values]));
  }

  void share(const Job<S>& job) const {
    if (job.blocks <= 1) return alone(job);
    std::vector<ScanState<S>> states(static_cast<size_t>(job.blocks));
    const auto each_block = [&](const auto& work) {
      parallel_jobs(job.blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) work(k);
      });
    };
    each_block([&](int64_t k) {
      states[size_t(k)].next_value = next_value(job, k);
      block(job, k, ScanUse::summary, S(0), states[size_t(k)]);
    });
    std::vector<S> x_in(static_cast<size_t>(job.blocks) + 1);
    x_in[0] = job.x_in;
    for (size_t k = 0; k < states.size(); ++k) x_in[k + 1] = states[k].local + states[k].product * x_in[k];
    each_block([&](int64_t k) {
      ScanState<S> state = {0, 1, next_value(job, k)};
      block(job, k, ScanUse::part, x_in[size_t(k)], state);
    });
    finish(job, x_in.back());
  }

  const Sequences& sequences_;
  ScanNumbers numbers_;
  bool reverse_;
  Walk<S> walk_;
  Tokens inputs_[num_inputs];
  S* out_ptr_[2] = {nullptr, nullptr};
};

template <class F>
void for_accumulation(ScalarType type, const F& f) {
  if (type == ScalarType::Double) {
    f(double());
  } else {
    f(float());
  }
}

std::tuple<Tensor, Tensor> gae_fwd(Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> mask,
                                   std::optional<Tensor> cu_seqlens, std::optional<Tensor> bootstrap,
                                   std::optional<Tensor> kl, Tensor gamma, Tensor lam, Tensor beta,
                                   std::string mask_mode, bool advantages) {
  const Tensor& tokens = kl ? *kl : rewards;
  const Sequences sequences(tokens, mask, cu_seqlens, mask_mode);
  const bool per_sequence = kl && !same_shape(rewards, tokens);
  const ScalarType acc = accumulation_type(tokens.scalar_type());
  const Tensor returns = sequences.result(tokens, acc),
               first = advantages ? sequences.result(tokens, acc) : empty_like_of(tokens, {0}, acc);
  const ScanNumbers numbers = {read_scalar(gamma, "gamma"), values ? read_scalar(lam, "lam") : 1.0,
                               kl ? read_scalar(beta, "beta") : 0.0, 0, 0};
  for_accumulation(acc, [&](auto zero) {
    using S = decltype(zero);
    Scan<S> scan(sequences, numbers, true, functions<S>().gae);
    if (!per_sequence) scan.input(in_rewards, rewards, "rewards");
    scan.input(in_values, values, "values");
    scan.input(in_kl, kl, "kl");
    if (per_sequence) scan.scores_ptr = data_of<S>(rewards, "rewards", sequences.B);
    scan.bootstrap_ptr = data_of<S>(bootstrap, "bootstrap", sequences.B);
    scan.bootstrap_scale = S(numbers.gamma);
    if (advantages) scan.output(0, first);
    scan.output(1, returns);
    scan.run();
  });
  return {first, returns};
}

std::tuple<Tensor, Tensor, Tensor> gae_bwd(std::optional<Tensor> grad_advantages, std::optional<Tensor> grad_returns,
                                           std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, Tensor gamma,
                                           Tensor lam, std::string mask_mode) {
  if (!grad_advantages && !grad_returns) fail("grad_advantages, grad_returns: wanted at least one");
  const Tensor& tokens = grad_advantages ? *grad_advantages : *grad_returns;
  const Sequences sequences(tokens, mask, cu_seqlens, mask_mode);
  const ScalarType acc = tokens.scalar_type();
  const Tensor drewards = sequences.result(tokens, acc), dvalues = sequences.result(tokens, acc);
  const Tensor dbootstrap = empty_like_of(tokens, {sequences.B}, acc);
  const ScanNumbers numbers = {read_scalar(gamma, "gamma"), read_scalar(lam, "lam"), 0, 0, 0};
  for_accumulation(acc, [&](auto zero) {
    using S = decltype(zero);
    if (acc != scalar_type_of<S>()) fail("grad_advantages: wanted float32 or float64");
    Scan<S> scan(sequences, numbers, false, functions<S>().gae_bwd);
    scan.input(in_grad_advantages, grad_advantages, "grad_advantages");
    scan.input(in_grad_returns, grad_returns, "grad_returns");
    scan.output(0, drewards);
    scan.output(1, dvalues);
    scan.x_out_ptr = static_cast<S*>(dbootstrap.data_ptr());
    scan.x_out_scale = S(numbers.gamma);
    scan.run();
  });
  return {drewards, dvalues, dbootstrap};
}

std::tuple<Tensor, Tensor> vtrace(Tensor logp, Tensor rollout_logp, Tensor rewards, Tensor values,
                                  std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                  std::optional<Tensor> bootstrap, Tensor gamma, Tensor lam, Tensor rho_max,
                                  Tensor c_max, std::string mask_mode) {
  const Sequences sequences(logp, mask, cu_seqlens, mask_mode);
  const ScalarType acc = accumulation_type(logp.scalar_type());
  const Tensor advantages = sequences.result(logp, acc), targets = sequences.result(logp, acc);
  const ScanNumbers numbers = {read_scalar(gamma, "gamma"), read_scalar(lam, "lam"), 0, read_scalar(rho_max, "rho_max"),
                               read_scalar(c_max, "c_max")};
  for_accumulation(acc, [&](auto zero) {
    using S = decltype(zero);
    Scan<S> scan(sequences, numbers, true, functions<S>().vtrace);
    scan.input(in_rewards, rewards, "rewards");
    scan.input(in_values, values, "values");
    scan.input(in_logp, logp, "logp");
    scan.input(in_rollout_logp, rollout_logp, "rollout_logp");
    scan.bootstrap_ptr = data_of<S>(bootstrap, "bootstrap", sequences.B);
    scan.output(0, advantages);
    scan.output(1, targets);
    scan.run();
  });
  return {advantages, targets};
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) {
  m.impl("gae_fwd", TORCH_BOX(&rl4llm::gae_fwd));
  m.impl("gae_bwd", TORCH_BOX(&rl4llm::gae_bwd));
  m.impl("vtrace", TORCH_BOX(&rl4llm::vtrace));
}
