// rl4llm_fast::kl_divergence_fwd, _bwd and _bwd_ on the CPU: checks, rows, threads (schemas.py says the arguments).
// The arithmetic is in kl.isa.cpp and hd.h.
#include "cpu/kl.h"

#include <string>
#include <tuple>
#include <vector>

#include "cpu/logits_rows.h"

namespace rl4llm {
namespace {

LogitsType logits_type(const Rows& rows, const char* name) {
  switch (rows.type) {
    case ScalarType::Float:
      return LogitsType::fp32;
    case ScalarType::BFloat16:
      return LogitsType::bf16;
    case ScalarType::Half:
      return LogitsType::fp16;
    case ScalarType::Double:
      return LogitsType::fp64;
    default:
      fail(name, ": wanted float32, bfloat16, float16 or float64, got ", torch::headeronly::toString(rows.type));
  }
}

template <class A>
const KlFunctions<A>& functions() {
  return kernels_for<A>(kl_kernels());
}

// The arguments that both passes share, checked.
struct KlArguments {
  Rows policy, ref;
  LogitsType policy_type, ref_type;
  const bool* mask_ptr;  // (N,) or null
  PerRow temperature;
  double softcap, beta;
  KlDirection direction;
  Parts cut;
  ScalarType acc;

  KlArguments(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask, const Tensor& tau,
              const std::optional<Tensor>& softcap, const std::string& direction, const Tensor& beta)
      : policy(logits, "logits"),
        ref(ref_logits, "ref_logits"),
        policy_type(logits_type(policy, "logits")),
        ref_type(logits_type(ref, "ref_logits")),
        mask_ptr(data_of<bool>(mask, "mask", policy.N)),
        temperature(tau, "temperature", policy.N),
        softcap(read_softcap(softcap)),
        beta(read_scalar(beta, "beta")),
        cut(policy) {
    if (ref.B != policy.B || ref.T != policy.T || ref.V != policy.V) {
      fail("ref_logits: wanted ", shape_of(logits), " like logits, got ", shape_of(ref_logits));
    }
    check_temperature(temperature);
    if (direction == "reverse") {
      this->direction = KlDirection::reverse;
    } else if (direction == "forward") {
      this->direction = KlDirection::forward;
    } else if (direction == "jsd") {
      this->direction = KlDirection::jsd;
      if (!(this->beta > 0 && this->beta < 1)) fail("beta: wanted a number in (0, 1), got ", this->beta);
    } else {
      fail("direction: wanted reverse, forward or jsd, got ", direction);
    }
    const bool wide = policy.type == ScalarType::Double || ref.type == ScalarType::Double;
    acc = wide ? ScalarType::Double : ScalarType::Float;
  }

  bool live(int64_t n) const { return !mask_ptr || mask_ptr[n]; }

  // Part i of row n; ref_first: the reference as the first side.
  template <class A>
  KlPart<A> part(int64_t n, int64_t i, bool ref_first) const {
    const int64_t v = i * kPart, length = std::min(kPart, policy.V - v);
    if (ref_first) return {ref.at(n, v), policy.at(n, v), ref_type, policy_type, length, A(softcap)};
    return {policy.at(n, v), ref.at(n, v), policy_type, ref_type, length, A(softcap)};
  }
};

template <class A>
JsdRow<A> jsd_row(const KlArguments& args, A row_max, A log_sum, A ref_row_max, A ref_log_sum, double scale) {
  const KlMixture mixture = mixture_of(args.beta, scale);
  return {{row_max, A(double(log_sum) / ln_base(A()))},
          {ref_row_max, A(double(ref_log_sum) / ln_base(A()))},
          A(mixture.p),
          A(mixture.q)};
}

// The forward pass in stages (maxima, sums, and for the JSD its terms), each by parts: on all threads, or for one row
// after the other while it lies in the cache. Parts combine from the left in both.
template <class A>
class KlForward {
 public:
  A* kl_ptr;
  KlInner* inner_ptr;
  A *row_max_ptr, *log_sum_ptr, *ref_row_max_ptr, *ref_log_sum_ptr;  // all (N,)

  void run(const KlArguments& args) const {
    if (args.cut.whole_rows) {
      parallel_jobs(args.policy.N, std::max<int64_t>(1, args.cut.batch / args.cut.parts),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t n = begin; n < end; ++n) run_rows(args, n, n + 1);
                    });
    } else {
      run_rows(args, 0, args.policy.N);
    }
  }

 private:
  void run_rows(const KlArguments& args, int64_t begin, int64_t end) const {
    by_parts<KlMaxima<A>>(args, begin, end, &KlForward::maxima, &KlForward::finish_maxima);
    by_parts<KlSum>(args, begin, end, &KlForward::sum, &KlForward::finish);
    if (args.direction == KlDirection::jsd) {
      by_parts<JsdSum>(args, begin, end, &KlForward::jsd_sum, &KlForward::finish_jsd);
    }
    for (int64_t n = begin; n < end; ++n) {
      if (!args.live(n)) clear(n);
    }
  }

  // One stage of the live rows [begin, end): at(args, n, i) of every part, then finish(args, n, the row's parts).
  template <class Part>
  void by_parts(const KlArguments& args, int64_t begin, int64_t end,
                Part (KlForward::*at)(const KlArguments&, int64_t, int64_t) const,
                void (KlForward::*finish)(const KlArguments&, int64_t, const Part*) const) const {
    const int64_t parts = args.cut.parts;
    std::vector<Part> found(size_t((end - begin) * parts));
    const auto work = [&](int64_t first, int64_t last) {
      for (int64_t job = first; job < last; ++job) {
        const int64_t n = begin + job / parts;
        if (args.live(n)) found[size_t(job)] = (this->*at)(args, n, job % parts);
      }
    };
    const int64_t jobs = (end - begin) * parts;
    args.cut.whole_rows ? work(0, jobs) : parallel_jobs(jobs, args.cut.batch, work);
    for (int64_t n = begin; n < end; ++n) {
      if (args.live(n)) (this->*finish)(args, n, &found[size_t((n - begin) * parts)]);
    }
  }

  void clear(int64_t n) const {
    kl_ptr[n] = row_max_ptr[n] = log_sum_ptr[n] = ref_row_max_ptr[n] = ref_log_sum_ptr[n] = 0;
    inner_ptr[n] = {0, 0};
  }

  // The other side's logit at the policy's likeliest token, until `finish` writes the row's results there.
  A anchor(int64_t n) const { return A(inner_ptr[n].mean); }

  static bool ref_first(const KlArguments& args) { return args.direction == KlDirection::forward; }

  // Where the maximum and the log-sum of the first and of the other side of row n go.
  struct Norms {
    A &max, &log_sum, &other_max, &other_log_sum;
  };
  Norms norms(const KlArguments& args, int64_t n) const {
    if (ref_first(args)) return {ref_row_max_ptr[n], ref_log_sum_ptr[n], row_max_ptr[n], log_sum_ptr[n]};
    return {row_max_ptr[n], log_sum_ptr[n], ref_row_max_ptr[n], ref_log_sum_ptr[n]};
  }

  KlMaxima<A> maxima(const KlArguments& args, int64_t n, int64_t i) const {
    KlMaxima<A> result;
    functions<A>().maxima(args.part<A>(n, i, ref_first(args)), &result);
    return result;
  }

  void finish_maxima(const KlArguments& args, int64_t n, const KlMaxima<A>* parts) const {
    const Norms row = norms(args, n);
    row.max = row.other_max = -infinity(A());
    for (int64_t i = 0; i < args.cut.parts; ++i) {
      row.max = std::max(row.max, parts[i].max);
      row.other_max = std::max(row.other_max, parts[i].other_max);
    }
    if (args.direction == KlDirection::forward) return;
    int64_t i = 0;
    while (i < args.cut.parts - 1 && parts[i].max != row.max) ++i;
    const A anchor = functions<A>().anchor(args.part<A>(n, i, false), args.temperature[n], row.max);
    const bool none = anchor == -infinity(A()) && args.direction == KlDirection::reverse;
    inner_ptr[n].mean = none ? row.other_max : anchor;
  }

  KlSum sum(const KlArguments& args, int64_t n, int64_t i) const {
    KlSum result;
    const Norms row = norms(args, n);
    const A origin = anchor(n);
    functions<A>().kl(args.part<A>(n, i, ref_first(args)), args.temperature[n], {row.max, row.other_max},
                      args.direction == KlDirection::reverse ? &origin : nullptr, &result);
    return result;
  }

  void finish(const KlArguments& args, int64_t n, const KlSum* parts) const {
    KlSum sums = parts[0];
    for (int64_t i = 1; i < args.cut.parts; ++i) {
      sums.sum += parts[i].sum;
      sums.other_sum += parts[i].other_sum;
      sums.dsum += parts[i].dsum;
      sums.gsum += parts[i].gsum;
      sums.infinite |= parts[i].infinite;
    }
    const Norms row = norms(args, n);
    const double first = log_sum(RowSum<double>{row.max, sums.sum, 0});
    const double second = log_sum(RowSum<double>{row.other_max, sums.other_sum, 0});
    const double unit = sizeof(A) == sizeof(double) ? 1 : args.temperature[n];
    // One logarithm of the ratio: the difference of two would lose what both have in common.
    const double kl = sums.dsum / sums.sum / unit + natural_log(sums.other_sum / sums.sum) + 0 * (first + second);
    const bool infinite = sums.infinite && kl == kl;
    double other_log_sum = second;
    if (args.direction == KlDirection::reverse && !infinite) {  // counted from the anchor, as its gradient wants it
      other_log_sum += (double(row.other_max) - double(anchor(n))) / args.temperature[n];
      row.other_max = anchor(n);
    }
    double scale = 1;
    if (args.direction == KlDirection::jsd) {
      const double ref_at_anchor = (double(anchor(n)) - double(row.other_max)) / args.temperature[n];
      scale = mixture_scale(args.beta, ref_at_anchor - second + first);
    }
    row.log_sum = A(first);
    row.other_log_sum = A(other_log_sum);
    kl_ptr[n] = infinite ? infinity(A()) : A(kl);
    inner_ptr[n] = {infinite ? infinity(1.0) : sums.gsum / sums.sum, scale};
  }

  JsdSum jsd_sum(const KlArguments& args, int64_t n, int64_t i) const {
    JsdSum result;
    const JsdRow<A> row =
        jsd_row(args, row_max_ptr[n], log_sum_ptr[n], ref_row_max_ptr[n], ref_log_sum_ptr[n], inner_ptr[n].scale);
    functions<A>().jsd(args.part<A>(n, i, false), args.temperature[n], row, &result);
    return result;
  }

  void finish_jsd(const KlArguments& args, int64_t n, const JsdSum* parts) const {
    JsdSum row = parts[0];
    for (int64_t i = 1; i < args.cut.parts; ++i) {
      row.p_sum += parts[i].p_sum;
      row.q_sum += parts[i].q_sum;
      row.p_total += parts[i].p_total;
      row.q_total += parts[i].q_total;
    }
    // Over the sums of p and q as they are rounded, 1 but for that: then the gradients of a row add up to 0, where 1/τ
    // would blow up what is left.
    const double p_mean = row.p_sum / row.p_total, q_mean = row.q_sum / row.q_total;
    kl_ptr[n] = A(ln_base(A()) * (args.beta * q_mean + (1 - args.beta) * p_mean) + natural_log(inner_ptr[n].scale));
    inner_ptr[n].mean = p_mean;
  }
};

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors kl_divergence_fwd(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask, Tensor temperature,
                             std::optional<Tensor> softcap, std::string direction, Tensor beta) {
  const KlArguments args(logits, ref_logits, mask, temperature, softcap, direction, beta);
  const auto per_row = [&] { return empty_like_of(logits, {args.policy.N}, args.acc); };
  const Tensor inner = empty_like_of(logits, {args.policy.N, 2}, ScalarType::Double);
  const SixTensors out{per_row(), inner, per_row(), per_row(), per_row(), per_row()};
  const auto run = [&](auto a) {
    using A = decltype(a);
    const auto at = [](const Tensor& t) { return static_cast<A*>(t.data_ptr()); };
    KlForward<A>{at(std::get<0>(out)), static_cast<KlInner*>(inner.data_ptr()),
                 at(std::get<2>(out)), at(std::get<3>(out)),
                 at(std::get<4>(out)), at(std::get<5>(out))}
        .run(args);
  };
  args.acc == ScalarType::Double ? run(double()) : run(float());
  return out;
}

template <class A>
struct KlSaved {
  const KlInner* inner_ptr;
  const A *row_max_ptr, *log_sum_ptr, *ref_row_max_ptr, *ref_log_sum_ptr, *grad_ptr;  // all (N,)
};

template <class A>
KlGrad<A> kl_grad(const KlArguments& args, const KlSaved<A>& saved, int64_t n) {
  const A log_sum = canonical(saved.log_sum_ptr[n]), ref_log_sum = canonical(saved.ref_log_sum_ptr[n]);
  const double tau = args.temperature[n], g = double(canonical(saved.grad_ptr[n])) / tau;
  KlGrad<A> grad;
  grad.direction = args.direction;
  grad.row =
      jsd_row(args, saved.row_max_ptr[n], log_sum, saved.ref_row_max_ptr[n], ref_log_sum, saved.inner_ptr[n].scale);
  grad.bad = log_sum != log_sum || ref_log_sum != ref_log_sum;
  const double mean = canonical(saved.inner_ptr[n].mean);
  grad.mean = A(mean);
  grad.rest = A(mean - double(grad.mean));
  double slope = g;  // d_v is in nats in fp64; in fp32 in the logits' units, or a logarithm of base 2
  if (args.direction == KlDirection::reverse && sizeof(A) != sizeof(double)) slope /= tau;
  if (args.direction == KlDirection::jsd) slope *= (1 - args.beta) * ln_base(A());
  grad.slope = A(slope);
  if (grad.bad) grad.slope = grad.mean = grad.rest = not_a_number(A());
  return grad;
}

// out may be the logits' own rows.
template <class A>
void kl_bwd_rows(const KlArguments& args, const Rows& out, const KlSaved<A>& saved) {
  parallel_jobs(args.cut.jobs, args.cut.batch, [&](int64_t begin, int64_t end) {
    KlGrad<A> grad{};
    for (int64_t job = begin; job < end; ++job) {
      const int64_t n = job / args.cut.parts, i = job % args.cut.parts;
      const KlPart<A> part = args.part<A>(n, i, false);
      char* out_ptr = out.at(n, i * kPart);
      if (!args.live(n)) {
        __builtin_memset(out_ptr, 0, size_t(part.length * out.element_size));
        continue;
      }
      if (job == begin || i == 0) grad = kl_grad(args, saved, n);
      functions<A>().bwd(part, args.temperature[n], grad, out_ptr);
    }
  });
}

void run_bwd(const Tensor& dlogits, const KlArguments& args, const Tensor& inner, const Tensor& row_max,
             const Tensor& log_sum, const Tensor& ref_row_max, const Tensor& ref_log_sum, const Tensor& grad) {
  const Rows out(dlogits, "dlogits");
  const auto run = [&](auto a) {
    using A = decltype(a);
    const int64_t N = args.policy.N;
    const KlSaved<A> saved{reinterpret_cast<const KlInner*>(data_of<double>(inner, "inner", 2 * N)),
                           data_of<A>(row_max, "row_max", N),
                           data_of<A>(log_sum, "log_sum", N),
                           data_of<A>(ref_row_max, "ref_row_max", N),
                           data_of<A>(ref_log_sum, "ref_log_sum", N),
                           data_of<A>(grad, "grad", N)};
    kl_bwd_rows<A>(args, out, saved);
  };
  args.acc == ScalarType::Double ? run(double()) : run(float());
}

Tensor kl_divergence_bwd(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask, Tensor temperature,
                         std::optional<Tensor> softcap, std::string direction, Tensor beta, Tensor inner,
                         Tensor row_max, Tensor log_sum, Tensor ref_row_max, Tensor ref_log_sum, Tensor grad) {
  const KlArguments args(logits, ref_logits, mask, temperature, softcap, direction, beta);
  const Tensor dlogits = empty_like_of(logits, {args.policy.B, args.policy.T, args.policy.V}, args.policy.type);
  run_bwd(dlogits, args, inner, row_max, log_sum, ref_row_max, ref_log_sum, grad);
  return dlogits;
}

void kl_divergence_bwd_(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask, Tensor temperature,
                        std::optional<Tensor> softcap, std::string direction, Tensor beta, Tensor inner, Tensor row_max,
                        Tensor log_sum, Tensor ref_row_max, Tensor ref_log_sum, Tensor grad) {
  const KlArguments args(logits, ref_logits, mask, temperature, softcap, direction, beta);
  run_bwd(logits, args, inner, row_max, log_sum, ref_row_max, ref_log_sum, grad);
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) {
  m.impl("kl_divergence_fwd", TORCH_BOX(&rl4llm::kl_divergence_fwd));
  m.impl("kl_divergence_bwd", TORCH_BOX(&rl4llm::kl_divergence_bwd));
  m.impl("kl_divergence_bwd_", TORCH_BOX(&rl4llm::kl_divergence_bwd_));
}
