// rl4llm_fast::token_logprobs_fwd, _bwd and _bwd_ on the CPU: checks, rows, threads (schemas.py says the arguments).
// The arithmetic is in token_logprobs.isa.cpp and hd.h.
#include "cpu/token_logprobs.h"

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/logits_rows.h"

namespace rl4llm {
namespace {

// Token ids (N,) or (N, K), and which of them count.
struct TokenIds {
  const int64_t* ids_ptr;  // (N, K)
  const bool* mask_ptr;    // (N,) or null
  int64_t K, ignore_index;
  bool one_id;

  TokenIds(const Tensor& token_ids, const std::optional<Tensor>& mask, int64_t ignore_index, const Rows& rows)
      : ignore_index(ignore_index), one_id(token_ids.dim() == 1) {
    if ((token_ids.dim() != 1 && token_ids.dim() != 2) || token_ids.size(0) != rows.N) {
      fail("token_ids: wanted (", rows.N, ",) or (", rows.N, ", K), got ", shape_of(token_ids));
    }
    K = one_id ? 1 : token_ids.size(1);
    ids_ptr = data_of<int64_t>(token_ids, "token_ids", rows.N * K);
    mask_ptr = data_of<bool>(mask, "mask", rows.N);
  }

  int64_t id(int64_t n, int64_t j) const { return ids_ptr[n * K + j]; }
  bool counts(int64_t n, int64_t j) const { return id(n, j) != ignore_index; }
  bool live(int64_t n) const { return (!mask_ptr || mask_ptr[n]) && (!one_id || counts(n, 0)); }

  // Before anything is written: every id that counts lies in the vocabulary.
  void check(const Rows& rows) const {
    for (int64_t n = 0; n < rows.N; ++n) {
      if (!live(n)) continue;
      for (int64_t j = 0; j < K; ++j) {
        if (!counts(n, j) || (id(n, j) >= 0 && id(n, j) < rows.V)) continue;
        std::ostringstream text;
        text << "token_ids: " << id(n, j) << " at position (";
        if (rows.B > 1) text << n / rows.T << ", ";
        text << n % rows.T;
        if (!one_id) text << ", " << j;
        text << (rows.B == 1 && one_id ? ",)" : ")") << " is outside the vocabulary [0, " << rows.V << ")";
        throw std::out_of_range(text.str());
      }
    }
  }
};

template <class A>
const TokenLogprobsFunctions<A>& functions_for(ScalarType type) {
  const TokenLogprobsKernels& kernels = token_logprobs_kernels();
  if constexpr (std::is_same_v<A, double>) {
    return kernels.fp64;
  } else {
    if (type == ScalarType::Float) return kernels.fp32;
    if (type == ScalarType::BFloat16) return kernels.bf16;
    if (type == ScalarType::Half) return kernels.fp16;
    fail("logits: wanted float32, bfloat16, float16 or float64, got ", torch::headeronly::toString(type));
  }
}

template <class A>
LogitsPart<A> part_of(const Rows& rows, int64_t n, int64_t v, double softcap) {
  return {rows.at(n, v), std::min(kPart, rows.V - v), A(softcap)};
}

template <class A>
void token_logprobs_fwd_rows(const Rows& rows, const TokenIds& tokens, const PerRow& temperature, double softcap,
                             A* logp_ptr, A* entropy_ptr, A* row_max_ptr, A* log_sum_ptr) {
  const TokenLogprobsFunctions<A>& kernel = functions_for<A>(rows.type);
  const Parts cut(rows);
  std::vector<RowSum<double>> sums(size_t(cut.jobs));
  parallel_jobs(cut.jobs, cut.batch, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t n = job / cut.parts, v = job % cut.parts * kPart;
      if (!tokens.live(n)) continue;
      kernel.fwd(part_of<A>(rows, n, v, softcap), temperature[n], entropy_ptr != nullptr, &sums[size_t(job)]);
    }
  });

  // Parts to rows, always from the left; then the chosen tokens.
  parallel_jobs(rows.N, 1 + 16384 / (cut.parts + tokens.K), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (!tokens.live(n)) {
        for (int64_t j = 0; j < tokens.K; ++j) logp_ptr[n * tokens.K + j] = 0;
        if (entropy_ptr) entropy_ptr[n] = 0;
        row_max_ptr[n] = log_sum_ptr[n] = 0;
        continue;
      }
      const double tau = temperature[n];
      RowSum<double> row = sums[size_t(n * cut.parts)];
      for (int64_t i = 1; i < cut.parts; ++i) row = merge(row, sums[size_t(n * cut.parts + i)], DivideFirst{tau});
      const double row_log_sum = log_sum(row);
      row_max_ptr[n] = A(row.max);
      log_sum_ptr[n] = A(row_log_sum);
      if (entropy_ptr) entropy_ptr[n] = A(entropy(row, row_log_sum));
      for (int64_t j = 0; j < tokens.K; ++j) {
        A& logp = logp_ptr[n * tokens.K + j];
        if (!tokens.counts(n, j)) {
          logp = 0;
          continue;
        }
        const int64_t id = tokens.id(n, j);
        logp = A(kernel.scaled_logit(rows.at(n, id), A(softcap), A(row.max), tau) - row_log_sum);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs_fwd(Tensor logits, Tensor token_ids,
                                                              std::optional<Tensor> mask, Tensor temperature,
                                                              std::optional<Tensor> softcap, int64_t ignore_index,
                                                              bool return_entropy) {
  const Rows rows(logits, "logits");
  const TokenIds tokens(token_ids, mask, ignore_index, rows);
  const PerRow tau(temperature, "temperature", rows.N);
  const double c = read_softcap(softcap);
  check_temperature(tau);
  tokens.check(rows);

  const ScalarType acc = accumulation_type(rows.type);
  const Tensor logp =
      tokens.one_id ? empty_like_of(logits, {rows.N}, acc) : empty_like_of(logits, {rows.N, tokens.K}, acc);
  const Tensor entropy = empty_like_of(logits, {return_entropy ? rows.N : 0}, acc);
  const Tensor row_max = empty_like_of(logits, {rows.N}, acc), log_sum = empty_like_of(logits, {rows.N}, acc);
  const auto run = [&](auto a) {
    using A = decltype(a);
    const auto ptr = [](const Tensor& t) { return static_cast<A*>(t.data_ptr()); };
    token_logprobs_fwd_rows<A>(rows, tokens, tau, c, ptr(logp), return_entropy ? ptr(entropy) : nullptr, ptr(row_max),
                               ptr(log_sum));
  };
  acc == ScalarType::Double ? run(double()) : run(float());
  return {logp, entropy, row_max, log_sum};
}

// One chosen token of a row: how much of the upstream gradient falls on it, and what becomes of its logit.
template <class A>
struct Choice {
  int64_t id;
  A g, dlogit;
};

// The row's choices by id, each id once: what falls on equal ids adds up, in their order.
template <class A>
void collect_choices(const TokenIds& tokens, int64_t n, const A* grad_logp_ptr, std::vector<Choice<A>>& choices) {
  choices.clear();
  if (!grad_logp_ptr) return;
  for (int64_t j = 0; j < tokens.K; ++j) {
    if (tokens.counts(n, j)) choices.push_back({tokens.id(n, j), grad_logp_ptr[n * tokens.K + j], A(0)});
  }
  if (choices.size() < 2) return;
  std::stable_sort(choices.begin(), choices.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  size_t last = 0;
  for (size_t i = 1; i < choices.size(); ++i) {
    if (choices[i].id == choices[last].id) {
      choices[last].g += choices[i].g;
    } else {
      choices[++last] = choices[i];
    }
  }
  choices.resize(last + 1);
}

template <class A>
struct Upstream {
  const A *row_max_ptr, *log_sum_ptr, *entropy_ptr;  // (N,): the forward's
  const A *grad_logp_ptr, *grad_entropy_ptr;         // (N, K), (N,), or null
};

// out may be the logits' own rows.
template <class A>
void token_logprobs_bwd_rows(const Rows& rows, const Rows& out, const TokenIds& tokens, const PerRow& temperature,
                             double softcap, const Upstream<A>& up) {
  const TokenLogprobsFunctions<A>& kernel = functions_for<A>(rows.type);
  const Parts cut(rows);
  parallel_jobs(cut.jobs, cut.batch, [&](int64_t begin, int64_t end) {
    std::vector<Choice<A>> choices;
    RowGrad<A> row{};
    bool careful = false;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t n = job / cut.parts, v = job % cut.parts * kPart;
      const LogitsPart<A> part = part_of<A>(rows, n, v, softcap);
      char* out_ptr = out.at(n, v);
      if (!tokens.live(n)) {
        __builtin_memset(out_ptr, 0, size_t(part.length * rows.element_size));
        continue;
      }
      if (job == begin || v == 0) {
        collect_choices(tokens, n, up.grad_logp_ptr, choices);
        A g = 0;
        for (const Choice<A>& choice : choices) g += choice.g;
        const A h = up.grad_entropy_ptr ? up.grad_entropy_ptr[n] : A(0);
        row = row_grad<A>(up.row_max_ptr[n], canonical(up.log_sum_ptr[n]), h != A(0) ? up.entropy_ptr[n] : A(0),
                          canonical(g), canonical(h), temperature[n], A(softcap));
        careful = !(finite(row.max) && finite(row.log2_sum) && finite(row.slope) && finite(row.intercept));
        for (Choice<A>& choice : choices) choice.g = A(double(canonical(choice.g)) / temperature[n]);
      }
      // The chosen logits are read before the pass may overwrite them.
      const auto first = std::lower_bound(choices.begin(), choices.end(), v,
                                          [](const Choice<A>& choice, int64_t id) { return choice.id < id; });
      auto last = first;
      for (; last != choices.end() && last->id < v + part.length; ++last) {
        last->dlogit = kernel.chosen_dlogit(rows.at(n, last->id), row, last->g);
      }
      kernel.bwd(part, row, careful, out_ptr);
      for (auto choice = first; choice != last; ++choice) kernel.store(out.at(n, choice->id), choice->dlogit);
    }
  });
}

void run_bwd(const Tensor& logits, const Tensor& dlogits, const Tensor& token_ids, const std::optional<Tensor>& mask,
             const Tensor& temperature, const std::optional<Tensor>& softcap, int64_t ignore_index,
             const Tensor& row_max, const Tensor& log_sum, const std::optional<Tensor>& entropy,
             const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy) {
  const Rows rows(logits, "logits"), out(dlogits, "dlogits");
  const TokenIds tokens(token_ids, mask, ignore_index, rows);
  const PerRow tau(temperature, "temperature", rows.N);
  const double c = read_softcap(softcap);
  check_temperature(tau);
  tokens.check(rows);
  if (grad_entropy && !(entropy && entropy->numel() == rows.N))
    fail("entropy: wanted the forward's, with grad_entropy");
  const auto run = [&](auto a) {
    using A = decltype(a);
    const Upstream<A> up{data_of<A>(row_max, "row_max", rows.N), data_of<A>(log_sum, "log_sum", rows.N),
                         grad_entropy ? data_of<A>(entropy, "entropy", rows.N) : nullptr,
                         data_of<A>(grad_logp, "grad_logp", rows.N * tokens.K),
                         data_of<A>(grad_entropy, "grad_entropy", rows.N)};
    token_logprobs_bwd_rows<A>(rows, out, tokens, tau, c, up);
  };
  rows.type == ScalarType::Double ? run(double()) : run(float());
}

Tensor token_logprobs_bwd(Tensor logits, Tensor token_ids, std::optional<Tensor> mask, Tensor temperature,
                          std::optional<Tensor> softcap, int64_t ignore_index, Tensor row_max, Tensor log_sum,
                          std::optional<Tensor> entropy, std::optional<Tensor> grad_logp,
                          std::optional<Tensor> grad_entropy) {
  const Tensor dlogits = empty_like_of(logits, {logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type());
  run_bwd(logits, dlogits, token_ids, mask, temperature, softcap, ignore_index, row_max, log_sum, entropy, grad_logp,
          grad_entropy);
  return dlogits;
}

void token_logprobs_bwd_(Tensor logits, Tensor token_ids, std::optional<Tensor> mask, Tensor temperature,
                         std::optional<Tensor> softcap, int64_t ignore_index, Tensor row_max, Tensor log_sum,
                         std::optional<Tensor> entropy, std::optional<Tensor> grad_logp,
                         std::optional<Tensor> grad_entropy) {
  run_bwd(logits, logits, token_ids, mask, temperature, softcap, ignore_index, row_max, log_sum, entropy, grad_logp,
          grad_entropy);
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) {
  m.impl("token_logprobs_fwd", TORCH_BOX(&rl4llm::token_logprobs_fwd));
  m.impl("token_logprobs_bwd", TORCH_BOX(&rl4llm::token_logprobs_bwd));
  m.impl("token_logprobs_bwd_", TORCH_BOX(&rl4llm::token_logprobs_bwd_));
}
