// preference_loss and its backward on the CPU: checks, pairs and threads around the passes over an answer's tokens.
//
// A thread takes whole pairs, so the result depends neither on the number of threads nor on the other pairs; what is
// made of their losses is a few hundred numbers, in fp64 and in order.
#include <algorithm>
#include <array>
#include <vector>

#include "cpu/moments.h"
#include "cpu/offsets.h"
#include "cpu/scalar_maths.h"
#include "cpu/tensor_args.h"
#include "pair_formulas_gen.h"

namespace rl4llm {
namespace {

namespace pairs = pair_formulas;

typedef pairs::PairLoss<double> (*PairFunction)(double chosen, double rejected, double nll, double per_pair,
                                                double beta, const double* knobs);
struct PairFormula {
  const char* name;
  bool token_nll, labelled;
  PairFunction function;
};
const PairFormula kFormulas[] = {
#define RL4LLM_PAIR(formula) \
  {#formula, pairs::formula::token_nll, pairs::formula::labelled, &pairs::formula::eval<ScalarMaths>},
    RL4LLM_PAIR_FORMULAS(RL4LLM_PAIR)};

const PairFormula& find_formula(const std::string& name) {
  for (const PairFormula& formula : kFormulas) {
    if (name == formula.name) return formula;
  }
  fail("formula: there is no formula ", name);
}

template <class S>
const MomentFunctions<S>& functions() {
  return kernels_for<S>(moment_kernels());
}

// One side of all pairs: rows (B, T), or packed tokens with the offsets of every answer.
template <class S>
struct Answers {
  const S* logp_ptr = nullptr;
  const S* ref_ptr;
  const uint8_t* mask_ptr;
  const int64_t* offsets_ptr;
  int64_t B, N, T;

  Answers(const Tensor& logp, const std::optional<Tensor>& ref, const std::optional<Tensor>& mask,
          const std::optional<Tensor>& cu_seqlens, const char* name) {
    N = logp.numel();
    logp_ptr = data_of<S>(logp, name, N);
    ref_ptr = data_of<S>(ref, "ref", N);
    mask_ptr = reinterpret_cast<const uint8_t*>(data_of<bool>(mask, "mask", N));
    if (logp.dim() != (cu_seqlens ? 1 : 2)) {
      fail(name, ": wanted (B, T), or packed (N,) with cu_seqlens; got ", shape_of(logp));
    }
    B = cu_seqlens ? cu_seqlens->numel() - 1 : logp.size(0);
    T = cu_seqlens ? 0 : logp.size(1);
    offsets_ptr = cu_seqlens ? data_of<int64_t>(*cu_seqlens, "cu_seqlens", B + 1) : nullptr;
    if (offsets_ptr) check_offsets(offsets_ptr, B + 1, N);
  }
  int64_t begin(int64_t b) const { return offsets_ptr ? offsets_ptr[b] : b * T; }
  int64_t length(int64_t b) const { return begin(b + 1) - begin(b); }
  const uint8_t* mask_at(int64_t b) const { return mask_ptr ? mask_ptr + begin(b) : nullptr; }
};

// f(i) for every pair of answers (or for every answer, where there are no pairs), in one start of the threads: each
// start costs about as much as ten thousand tokens, so a thread takes some of them at a time.
template <class F>
void each_pair(int64_t B, int64_t tokens, const F& f) {
  const int64_t grain = std::max<int64_t>(1, (1 << 16) * B / std::max<int64_t>(1, tokens));
  torch::stable::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

struct Sum {
  double sum = 0;
  int64_t length = 1;  // live tokens, at least 1
};

template <class S>
int64_t live_tokens(const Answers<S>& side, int64_t i) {
  const uint8_t* mask_ptr = side.mask_at(i);
  const int64_t length = side.length(i);
  return std::max<int64_t>(1, mask_ptr ? moment_kernels().live_count(length, mask_ptr) : length);
}

template <class S>
int64_t live_tokens(const Answers<S>& side) {
  int64_t total = 0;
  for (int64_t i = 0; i < side.B; ++i) total += live_tokens(side, i);
  return total;
}

template <class S>
Sum sum_of(const Answers<S>& side, int64_t i) {
  const int64_t n = side.begin(i), length = side.length(i);
  const double sum = side.ref_ptr
                         ? functions<S>().difference(length, side.logp_ptr + n, side.ref_ptr + n, side.mask_at(i))
                         : functions<S>().sum(length, side.logp_ptr + n, side.mask_at(i));
  return {sum, live_tokens(side, i)};
}

// slope at the live tokens of answer i, 0 at the others
template <class S>
void spread(const Answers<S>& side, int64_t i, S slope, S* grad_ptr) {
  functions<S>().fill(side.length(i), slope, side.mask_at(i), grad_ptr + side.begin(i));
}

template <class F>
void for_dtype(const Tensor& tensor, const char* name, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    default:
      fail(name, ": wanted float32 or float64, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

struct Pair {
  double loss, better, worse, per_pair;
};
typedef std::array<double, pairs::num_labelled_metrics> Metrics;

Metrics pair_metrics(const std::vector<Pair>& found) {
  Metrics metrics = {};
  for (const Pair& pair : found) {
    metrics[pairs::metric_reward_chosen] += pair.better;
    metrics[pairs::metric_reward_rejected] += pair.worse;
    metrics[pairs::metric_accuracy] += pair.better > pair.worse;
    metrics[pairs::metric_margin] += pair.better - pair.worse;
  }
  for (double& metric : metrics) metric /= double(std::max<size_t>(found.size(), 1));
  return metrics;
}

// Of answers without pairs, which are desirable or not.
Metrics labelled_metrics(const std::vector<Pair>& found, const double* knobs) {
  double good = 0, bad = 0, better = 0, worse = 0, right = 0;
  for (const Pair& answer : found) {
    const bool desirable = answer.per_pair > 0.5;
    const double reward = answer.better, bound = knobs[pairs::knob_kl];
    (desirable ? good : bad) += 1;
    (desirable ? better : worse) += reward;
    right += desirable ? reward > bound : reward < bound;
  }
  better /= std::max(good, 1.0), worse /= std::max(bad, 1.0), right /= std::max(good + bad, 1.0);
  const double ratio = knobs[pairs::knob_lambda_d] * good / (knobs[pairs::knob_lambda_u] * bad);
  return {better, worse, right, better - worse, ratio};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss_fwd(
    Tensor chosen, std::optional<Tensor> rejected, std::optional<Tensor> ref_chosen, std::optional<Tensor> ref_rejected,
    std::optional<Tensor> mask_chosen, std::optional<Tensor> mask_rejected, std::optional<Tensor> cu_chosen,
    std::optional<Tensor> cu_rejected, std::optional<Tensor> per_pair, Tensor params, std::string formula, bool average,
    bool gradients) {
  const PairFormula& pair_formula = find_formula(formula);
  const int64_t B = cu_chosen ? cu_chosen->numel() - 1 : chosen.size(0);
  const ScalarType type = chosen.scalar_type();
  const Tensor loss_out = empty_like_of(chosen, {}, type), slopes = empty_like_of(chosen, {2, B}, type);
  const int64_t num_metrics = pair_formula.labelled ? int64_t(pairs::num_labelled_metrics) : pairs::num_metrics;
  const Tensor metrics_out = empty_like_of(chosen, {num_metrics}, type);
  const Tensor grad_chosen = gradients ? empty_like_of(chosen, chosen.sizes(), type) : empty_like_of(chosen, {0}, type);
  const Tensor grad_rejected =
      gradients && rejected ? empty_like_of(*rejected, rejected->sizes(), type) : empty_like_of(chosen, {0}, type);
  const double* params_ptr = data_of<double>(params, "params", int64_t(pairs::num_params) + pairs::max_knobs);
  const double beta = params_ptr[pairs::param_beta], *knobs = params_ptr + pairs::num_params;

  for_dtype(chosen, "chosen", [&](auto s) {
    using S = decltype(s);
    const S* per_pair_ptr = data_of<S>(per_pair, "per_pair", B);
    const Answers<S> won(chosen, ref_chosen, mask_chosen, cu_chosen, "chosen");
    std::optional<Answers<S>> lost;
    if (rejected) lost.emplace(*rejected, ref_rejected, mask_rejected, cu_rejected, "rejected");
    if (lost && lost->B != B) fail("rejected: wanted ", B, " answers, got ", lost->B);
    const double nll_scale = pair_formula.token_nll && B ? double(B) / double(live_tokens(won)) : 0;

    S* slopes_ptr = static_cast<S*>(slopes.data_ptr());
    S *grad_chosen_ptr = static_cast<S*>(grad_chosen.data_ptr()),
      *grad_rejected_ptr = static_cast<S*>(grad_rejected.data_ptr());
    std::vector<Pair> found(static_cast<size_t>(B));
    // A pair's answers are read, and their gradients written while the masks are in the cache.
    each_pair(B, won.N + (lost ? lost->N : 0), [&](int64_t i) {
      const Sum w = sum_of(won, i), l = lost ? sum_of(*lost, i) : Sum();
      const double won_length = average ? double(w.length) : 1, lost_length = average ? double(l.length) : 1;
      const double x = w.sum / won_length, y = l.sum / lost_length;
      const double nll = pair_formula.token_nll ? -w.sum * nll_scale : 0;
      const double extra = per_pair_ptr ? double(per_pair_ptr[i]) : params_ptr[pairs::param_per_pair];
      const auto pair = pair_formula.function(x, y, nll, extra, beta, knobs);
      // No −0·scale: a formula without this nll has no slope in it.
      const double through_nll = pair_formula.token_nll ? pair.d_nll * nll_scale : 0;
      slopes_ptr[i] = S((pair.d_chosen / won_length - through_nll) / double(B));
      slopes_ptr[B + i] = S(pair.d_rejected / lost_length / double(B));
      found[size_t(i)] = {pair.loss, beta * x, beta * y, extra};
      if (!gradients) return;
      spread(won, i, slopes_ptr[i], grad_chosen_ptr);
      if (lost) spread(*lost, i, slopes_ptr[B + i], grad_rejected_ptr);
    });
    double loss = 0;
    for (const Pair& pair : found) loss += pair.loss;
    static_cast<S*>(loss_out.data_ptr())[0] = S(loss / double(std::max<int64_t>(B, 1)));
    const Metrics metrics = pair_formula.labelled ? labelled_metrics(found, knobs) : pair_metrics(found);
    for (int64_t k = 0; k < num_metrics; ++k) static_cast<S*>(metrics_out.data_ptr())[k] = S(metrics[size_t(k)]);
  });
  return {loss_out, slopes, metrics_out, grad_chosen, grad_rejected};
}

std::tuple<Tensor, Tensor> preference_loss_bwd(Tensor grad, Tensor slopes, Tensor chosen,
                                               std::optional<Tensor> rejected, std::optional<Tensor> mask_chosen,
                                               std::optional<Tensor> mask_rejected, std::optional<Tensor> cu_chosen,
                                               std::optional<Tensor> cu_rejected) {
  const Tensor grad_chosen = empty_like_of(chosen, chosen.sizes(), chosen.scalar_type());
  const Tensor grad_rejected = rejected ? empty_like_of(*rejected, rejected->sizes(), rejected->scalar_type())
                                        : empty_like_of(chosen, {0}, chosen.scalar_type());
  for_dtype(chosen, "chosen", [&](auto s) {
    using S = decltype(s);
    const Answers<S> won(chosen, std::nullopt, mask_chosen, cu_chosen, "chosen");
    const S* slopes_ptr = data_of<S>(slopes, "slopes", 2 * won.B);
    const S upstream = *data_of<S>(grad, "grad", 1);
    std::optional<Answers<S>> lost;
    if (rejected) lost.emplace(*rejected, std::nullopt, mask_rejected, cu_rejected, "rejected");
    if (lost && lost->B != won.B) fail("rejected: wanted ", won.B, " answers, got ", lost->B);
    S *grad_chosen_ptr = static_cast<S*>(grad_chosen.data_ptr()),
      *grad_rejected_ptr = static_cast<S*>(grad_rejected.data_ptr());
    // A slope of 0 stays 0 whatever comes from above.
    const auto scaled = [&](int64_t i) { return slopes_ptr[i] == S(0) ? S(0) : upstream * slopes_ptr[i]; };
    each_pair(won.B, won.N + (lost ? lost->N : 0), [&](int64_t i) {
      spread(won, i, scaled(i), grad_chosen_ptr);
      if (lost) spread(*lost, i, scaled(won.B + i), grad_rejected_ptr);
    });
  });
  return {grad_chosen, grad_rejected};
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) {
  m.impl("preference_loss_fwd", TORCH_BOX(&rl4llm::preference_loss_fwd));
  m.impl("preference_loss_bwd", TORCH_BOX(&rl4llm::preference_loss_bwd));
}
