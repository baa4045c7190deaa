// policy_loss, kl_estimate and their backward on the CPU: checks, rows and threads around token_loss.isa.cpp.
//
// The mask is counted first: what a row weighs is then known, and the derivatives are written as the gradient of the
// loss, which a backward pass without a factor hands on as it is. Every segment of a row writes its sums; they are
// combined in order, in double, so that the result depends neither on the number of threads nor on which thread did
// what.
#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/moments.h"
#include "cpu/tensor_args.h"
#include "cpu/token_loss.h"

namespace rl4llm {
namespace {

const char* const kPolicyNames[] = {
#define RL4LLM_NAME(formula) #formula,
    RL4LLM_POLICY_FORMULAS(RL4LLM_NAME)};
const char* const kKlNames[] = {RL4LLM_KL_FORMULAS(RL4LLM_NAME)};
const char* const kCorrectionNames[] = {RL4LLM_CORRECTION_FORMULAS(RL4LLM_NAME)};

template <int count>
int find_formula(const char* const (&names)[count], const std::string& name, const char* argument) {
  for (int i = 0; i < count; ++i) {
    if (name == names[i]) return i;
  }
  fail(argument, ": there is no formula ", name);
}

// The maths of the weight formulas: one double.
struct HostMaths {
  typedef double S;
  typedef double F;
  static double c(double x) { return x; }
  static double maximum(double a, double b) { return a > b || a != a ? a : b; }
};

double sequence_weight(const std::string& aggregation, double length, double num_tokens, const double* params) {
  const double num_sequences = params[formulas::param_num_sequences], max_length = params[formulas::param_max_length];
#define RL4LLM_WEIGHT(formula) \
  if (aggregation == #formula) return formulas::formula::eval<HostMaths>(length, num_tokens, num_sequences, max_length);
  RL4LLM_WEIGHT_FORMULAS(RL4LLM_WEIGHT)
  if (aggregation == "none") return 1;
  fail("aggregation: there is no ", aggregation);
}

template <class S>
const TokenLossFunctions<S>& functions() {
  return kernels_for<S>(token_loss_kernels());
}

struct UserFormula {
  PolicyFunction<float> fp32;
  PolicyFunction<double> fp64;
};

std::mutex user_formulas_lock;
// By name and instruction set. Never destroyed: a thread may still run at exit.
auto& user_formulas = *new std::map<std::pair<std::string, std::string>, UserFormula>;

template <class S>
PolicyFunction<S> policy_function(const std::string& name) {
  for (int i = 0; i < kPolicyFormulas; ++i) {
    if (name == kPolicyNames[i]) return functions<S>().policy[i];
  }
  const std::lock_guard<std::mutex> lock(user_formulas_lock);
  const auto found = user_formulas.find({name, isa_name(chosen_isa())});
  if (found == user_formulas.end()) {
    fail("formula: there is no formula ", name, " for ", isa_name(chosen_isa()), "; a new one wants make setup");
  }
  if constexpr (sizeof(S) == sizeof(double)) {
    return found->second.fp64;
  } else {
    return found->second.fp32;
  }
}

// A pointer into per-token data, or null.
template <class T>
const T* shift(const T* ptr, int64_t n) {
  return ptr ? ptr + n : nullptr;
}

// Per-token data of a row: (B, T), or one value per row (B, 1).
template <class S>
struct PerToken {
  const S* ptr = nullptr;
  bool one = false;
  int64_t T = 0;

  PerToken(const std::optional<Tensor>& tensor, const char* name, int64_t B, int64_t T) : T(T) {
    if (!tensor) return;
    one = T != 1 && tensor->dim() == 2 && tensor->size(1) == 1;
    ptr = data_of<S>(*tensor, name, one ? B : B * T);
  }
  const S* at(int64_t row, int64_t t) const { return ptr == nullptr ? nullptr : one ? ptr + row : ptr + row * T + t; }
};

// A row in segments; small ones are dealt out to a thread in bunches worth its start.
struct Cut {
  int64_t B, T, segments, jobs, grain;
  Cut(int64_t B, int64_t T) : B(B), T(T), segments((T + kSegment - 1) / kSegment), jobs(B * segments) {
    grain = std::max<int64_t>(1, 8 * kSegment / std::max<int64_t>(1, std::min(T, kSegment)));
  }
  template <class F>
  void each(const F& f) const {  // f(job, row, first token of the segment in its row, length)
    torch::stable::parallel_for(0, jobs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        const int64_t t = job % segments * kSegment;
        f(job, job / segments, t, std::min(kSegment, T - t));
      }
    });
  }
};

struct PolicyLossArgs {
  Tensor logp;
  std::optional<Tensor> old;
  Tensor advantages;
  std::optional<Tensor> ref, entropy, mask, policy_weights, token_weights, log_s;
  Tensor params;
  std::string formula, kl, aggregation, correction;
};

struct PolicyLossResult {
  Tensor loss, dlogp, dentropy, scale, metrics;
};

// The live tokens of each row.
std::vector<double> live_counts(const PolicyLossArgs& a, int64_t B, int64_t T) {
  std::vector<double> count(static_cast<size_t>(B), double(T));
  if (a.mask) {
    const uint8_t* mask_ptr = reinterpret_cast<const uint8_t*>(data_of<bool>(*a.mask, "mask", B * T));
    const auto live_count = moment_kernels().live_count;
    torch::stable::parallel_for(0, B, std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, T)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t row = begin; row < end; ++row) {
                                    count[size_t(row)] = double(live_count(T, mask_ptr + row * T));
                                  }
                                });
  }
  return count;
}

// What each row weighs in the loss and its derivatives.
std::vector<double> row_scales(const PolicyLossArgs& a, const std::vector<double>& count, const double* params) {
  std::vector<double> scale(count.size());
  double num_tokens = params[formulas::param_num_tokens];
  if (num_tokens < 0) {
    num_tokens = 0;
    for (const double length : count) num_tokens += length;
  }
  for (size_t row = 0; row < count.size(); ++row) {
    scale[row] = params[formulas::param_dp_size] * sequence_weight(a.aggregation, count[row], num_tokens, params);
  }
  return scale;
}

// log s of each row: the mean of logp − old over its live tokens.
template <class S>
std::vector<S> mean_log_ratios(int64_t B, int64_t T, const S* logp_ptr, const S* old_ptr, const uint8_t* mask_ptr,
                               const std::vector<double>& count) {
  std::vector<S> mean(static_cast<size_t>(B));
  const auto difference = kernels_for<S>(moment_kernels()).difference;
  parallel_jobs(B, std::max<int64_t>(1, 8 * kSegment / std::max<int64_t>(1, T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row * T;
      mean[size_t(row)] =
          S(difference(T, logp_ptr + n, old_ptr + n, shift(mask_ptr, n)) / std::max(count[size_t(row)], 1.0));
    }
  });
  return mean;
}

// From the sums of the segments: the loss and the metrics.
template <class S>
void finish(const PolicyLossArgs& a, const Cut& cut, const std::vector<double>& sums, const std::vector<double>& scale,
            const PolicyLossResult& out) {
  std::vector<double> total(num_partials, 0.0), row_loss(size_t(cut.B));
  total[least_ratio] = infinity(1.0), total[largest_ratio] = -infinity(1.0);
  for (int64_t job = 0; job < cut.jobs; ++job) {
    const double* part = &sums[size_t(job) * num_partials];
    row_loss[size_t(job / cut.segments)] += part[sum_loss];
    for (int k = 0; k < num_partials; ++k) {
      if (k == least_ratio) {
        total[k] = total[k] != total[k] || total[k] < part[k] ? total[k] : part[k];
      } else if (k == largest_ratio) {
        total[k] = total[k] != total[k] || total[k] > part[k] ? total[k] : part[k];
      } else {
        total[k] += part[k];
      }
    }
  }
  S* scale_ptr = static_cast<S*>(out.scale.data_ptr());
  double loss = 0;
  for (size_t row = 0; row < scale.size(); ++row) {
    scale_ptr[row] = 1;  // the derivatives have it
    loss += scale[row] * row_loss[row];
  }
  if (a.aggregation != "none") static_cast<S*>(out.loss.data_ptr())[0] = S(loss);

  const bool some = total[sum_count] > 0;
  const auto mean = [&](PolicySum k) { return some ? total[k] / total[sum_count] : 0.0; };
  double metrics[formulas::num_metrics];
  metrics[formulas::metric_clip_fraction_low] = mean(sum_clipped_low);
  metrics[formulas::metric_clip_fraction_high] = mean(sum_clipped_high);
  metrics[formulas::metric_clip_fraction] =
      metrics[formulas::metric_clip_fraction_low] + metrics[formulas::metric_clip_fraction_high];
  metrics[formulas::metric_ratio_mean] = some ? mean(sum_ratio) : 1;
  metrics[formulas::metric_ratio_min] = some ? total[least_ratio] : 1;
  metrics[formulas::metric_ratio_max] = some ? total[largest_ratio] : 1;
  metrics[formulas::metric_kl_old_k1] = mean(sum_k1);
  metrics[formulas::metric_kl_old_k3] = mean(sum_k3);
  metrics[formulas::metric_kl_ref] = mean(sum_kl);
  metrics[formulas::metric_entropy] = mean(sum_entropy);
  for (int k = 0; k < formulas::num_metrics; ++k) static_cast<S*>(out.metrics.data_ptr())[k] = S(metrics[k]);
}

template <class S>
void run_policy_loss(const PolicyLossArgs& a, const PolicyLossResult& out) {
  const int64_t B = a.logp.size(0), T = a.logp.size(1), N = B * T;
  const Cut cut(B, T);
  const auto policy = policy_function<S>(a.formula);
  const auto kl = a.ref && !a.kl.empty() ? functions<S>().kl[find_formula(kKlNames, "kl_" + a.kl, "kl")] : nullptr;
  const int correction =
      a.correction.empty() ? -1 : find_formula(kCorrectionNames, "rollout_" + a.correction, "correction");
  const int64_t num_values = formulas::num_params + formulas::max_knobs;
  const double* params = data_of<double>(a.params, "params", num_values);
  S knobs[formulas::max_knobs];
  for (int k = 0; k < formulas::max_knobs; ++k) knobs[k] = S(params[formulas::num_params + k]);

  const S* logp_ptr = data_of<S>(a.logp, "logp", N);
  const S* old_ptr = data_of<S>(a.old, "old", N);
  const S* ref_ptr = data_of<S>(a.ref, "ref", N);
  const S* entropy_ptr = data_of<S>(a.entropy, "entropy", N);
  const S* policy_weights_ptr = data_of<S>(a.policy_weights, "policy_weights", N);
  const S* token_weights_ptr = data_of<S>(a.token_weights, "token_weights", N);
  const uint8_t* mask_ptr = reinterpret_cast<const uint8_t*>(data_of<bool>(a.mask, "mask", N));
  const bool makes_log_s = a.log_s && a.log_s->dim() == 1;
  const PerToken<S> adv(a.advantages, "advantages", B, T),
      log_s(makes_log_s ? std::optional<Tensor>() : a.log_s, "log_s", B, T);
  S* loss_ptr = a.aggregation == "none" ? static_cast<S*>(out.loss.data_ptr()) : nullptr;
  S* dlogp_ptr = static_cast<S*>(out.dlogp.data_ptr());
  S* dentropy_ptr = out.dentropy.numel() == N && N > 0 ? static_cast<S*>(out.dentropy.data_ptr()) : nullptr;
  const S dp_size = S(params[formulas::param_dp_size]);

  const std::vector<double> count = live_counts(a, B, T), scale = row_scales(a, count, params);
  std::vector<S> own_log_s;
  if (makes_log_s) {
    own_log_s = mean_log_ratios(B, T, logp_ptr, old_ptr ? old_ptr : logp_ptr, mask_ptr, count);
  }
  std::vector<double> sums(size_t(cut.jobs) * num_partials);
  cut.each([&](int64_t job, int64_t row, int64_t t, int64_t length) {
    alignas(64) S kl_values[kSegment], dkl_values[kSegment];
    const int64_t n = row * T + t;
    if (kl) {
      kl({length, shift(mask_ptr, n), logp_ptr + n, ref_ptr + n, shift(old_ptr, n), kl_values, dkl_values});
    }
    PolicySegment<S> segment = {};
    segment.length = length;
    segment.mask_ptr = shift(mask_ptr, n);
    segment.logp_ptr = logp_ptr + n;
    segment.old_ptr = shift(old_ptr, n);
    segment.ref_ptr = shift(ref_ptr, n);
    segment.adv_ptr = adv.at(row, t), segment.one_adv = adv.one;
    segment.log_s_ptr = log_s.at(row, t), segment.one_log_s = log_s.one;
    if (!own_log_s.empty()) segment.log_s_ptr = &own_log_s[size_t(row)], segment.one_log_s = true;
    segment.policy_weights_ptr = shift(policy_weights_ptr, n);
    segment.token_weights_ptr = shift(token_weights_ptr, n);
    if (kl) segment.kl_ptr = kl_values, segment.dkl_ptr = dkl_values;
    segment.entropy_ptr = shift(entropy_ptr, n);
    segment.correction = correction;
    segment.rollout_cap = S(params[formulas::param_rollout_cap]);
    segment.rollout_floor = S(params[formulas::param_rollout_floor]);
    segment.kl_coef = S(params[formulas::param_kl_coef]);
    segment.entropy_coef = S(params[formulas::param_entropy_coef]);
    segment.knobs = knobs;
    segment.scale = S(scale[size_t(row)]);
    segment.loss_ptr = loss_ptr ? loss_ptr + n : nullptr;
    segment.dlogp_ptr = dlogp_ptr + n;
    segment.dentropy_ptr = dentropy_ptr ? dentropy_ptr + n : nullptr;
    policy(segment, &sums[size_t(job) * num_partials]);
    if (loss_ptr && dp_size != 1) functions<S>().scale(length, dp_size, nullptr, loss_ptr + n, loss_ptr + n);
  });
  finish<S>(a, cut, sums, scale, out);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    Tensor logp, std::optional<Tensor> old, Tensor advantages, std::optional<Tensor> ref, std::optional<Tensor> entropy,
    std::optional<Tensor> mask, std::optional<Tensor> policy_weights, std::optional<Tensor> token_weights,
    std::optional<Tensor> log_s, Tensor params, std::string formula, std::string kl, std::string aggregation,
    std::string correction, bool entropy_grad) {
  if (logp.dim() != 2) fail("logp: wanted (B, T), got ", shape_of(logp));
  const int64_t B = logp.size(0), T = logp.size(1);
  const ScalarType type = logp.scalar_type();
  const PolicyLossResult out = {
      aggregation == "none" ? empty_like_of(logp, {B, T}, type) : empty_like_of(logp, {}, type),
      empty_like_of(logp, {B, T}, type),
      entropy_grad ? empty_like_of(logp, {B, T}, type) : empty_like_of(logp, {0}, type), empty_like_of(logp, {B}, type),
      empty_like_of(logp, {int64_t(formulas::num_metrics)}, type)};
  const PolicyLossArgs args = {logp,          old,   advantages, ref,     entropy, mask,        policy_weights,
                               token_weights, log_s, params,     formula, kl,      aggregation, correction};
  for_dtype(logp, "logp", [&](auto s) { run_policy_loss<decltype(s)>(args, out); });
  return {out.loss, out.dlogp, out.dentropy, out.scale, out.metrics};
}

std::tuple<Tensor, Tensor> kl_estimate_fwd(Tensor logp, Tensor ref, std::optional<Tensor> old,
                                           std::optional<Tensor> mask, std::string variant) {
  const int64_t N = logp.numel();
  const Tensor kl = empty_like_of(logp, logp.sizes(), logp.scalar_type()),
               dkl = empty_like_of(logp, logp.sizes(), logp.scalar_type());
  for_dtype(logp, "logp", [&](auto s) {
    using S = decltype(s);
    const auto run = functions<S>().kl[find_formula(kKlNames, "kl_" + variant, "variant")];
    const S *logp_ptr = data_of<S>(logp, "logp", N), *ref_ptr = data_of<S>(ref, "ref", N);
    const S* old_ptr = data_of<S>(old, "old", N);
    const uint8_t* mask_ptr = reinterpret_cast<const uint8_t*>(data_of<bool>(mask, "mask", N));
    S *kl_ptr = static_cast<S*>(kl.data_ptr()), *dkl_ptr = static_cast<S*>(dkl.data_ptr());
    Cut(1, N).each([&](int64_t, int64_t, int64_t n, int64_t length) {
      run({length, shift(mask_ptr, n), logp_ptr + n, ref_ptr + n, shift(old_ptr, n), kl_ptr + n, dkl_ptr + n});
    });
  });
  return {kl, dkl};
}

// grad·scale·d for dlogp, and for dentropy where it is not empty.
std::tuple<Tensor, Tensor> token_loss_bwd(Tensor grad, Tensor logp, std::optional<Tensor> entropy,
                                          std::optional<Tensor> scale, Tensor dlogp, Tensor dentropy) {
  const Tensor grad_logp = empty_like_of(dlogp, dlogp.sizes(), dlogp.scalar_type()),
               grad_entropy = empty_like_of(dentropy, dentropy.sizes(), dentropy.scalar_type());
  const int64_t B = scale ? dlogp.size(0) : 1, T = B == 0 ? 0 : dlogp.numel() / B;
  for_dtype(dlogp, "dlogp", [&](auto s) {
    using S = decltype(s);
    const S* grad_ptr = data_of<S>(grad, "grad", grad.dim() == 0 ? 1 : B * T);
    const S* scale_ptr = data_of<S>(scale, "scale", B);
    const auto run = [&](const Tensor& d, const Tensor& out) {
      const S* d_ptr = data_of<S>(d, "dlogp", B * T);
      S* out_ptr = static_cast<S*>(out.data_ptr());
      Cut(B, T).each([&](int64_t, int64_t row, int64_t t, int64_t length) {
        const int64_t n = row * T + t;
        const S row_scale = scale_ptr ? scale_ptr[row] : S(1);
        const bool each = grad.dim() != 0;
        functions<S>().scale(length, each ? row_scale : row_scale * *grad_ptr, each ? grad_ptr + n : nullptr, d_ptr + n,
                             out_ptr + n);
      });
    };
    run(dlogp, grad_logp);
    if (dentropy.numel() > 0) run(dentropy, grad_entropy);
  });
  return {grad_logp, grad_entropy};
}

}  // namespace

void register_policy_formula(const char* name, const char* isa, PolicyFunction<float> fp32,
                             PolicyFunction<double> fp64) {
  const std::lock_guard<std::mutex> lock(user_formulas_lock);
  user_formulas[{name, isa}] = {fp32, fp64};
}

}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) {
  m.impl("policy_loss_fwd", TORCH_BOX(&rl4llm::policy_loss_fwd));
  m.impl("kl_estimate_fwd", TORCH_BOX(&rl4llm::kl_estimate_fwd));
  m.impl("token_loss_bwd", TORCH_BOX(&rl4llm::token_loss_bwd));
}
