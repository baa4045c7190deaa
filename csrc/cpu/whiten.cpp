// whiten on the CPU: count, mean and Σ(x − mean)² over live elements, and x normalised by them (docs/math.md section
// 4).
//
// Elements are cut into parts of kPart, always; each part's mean and squares are taken in two passes through the cache,
// in fp64, and parts are joined in order (Chan et al. 1983), so that the bits do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/moments.h"
#include "cpu/tensor_args.h"

namespace rl4llm {
namespace {

constexpr int64_t kPart = 8192;

struct Stats {
  double count = 0, mean = 0, squares = 0;

  void join(const Stats& other) {
    const double total = count + other.count;
    if (other.count == 0) return;
    const double part = other.count / total, step = other.mean - mean;
    squares += other.squares + step * step * count * part;
    mean += step * part;
    count = total;
  }
};

// Elements [i, i + n) of x in the accumulation dtype: where they lie, or widened into `room`.
template <class S>
const S* part_of(const Tensor& x, int64_t i, int64_t n, S* room) {
  const ScalarType type = x.scalar_type();
  const void* data_ptr = x.data_ptr();
  if (type == scalar_type_of<S>()) return static_cast<const S*>(data_ptr) + i;
  if (type == ScalarType::BFloat16) {
    const uint16_t* bits_ptr = static_cast<const uint16_t*>(data_ptr) + i;
    for (int64_t k = 0; k < n; ++k) room[k] = S(bits_to_float(uint32_t(bits_ptr[k]) << 16));
  } else {
    for (int64_t k = 0; k < n; ++k) room[k] = S(read_element(data_ptr, type, i + k));
  }
  return room;
}

// f(x_ptr, n, i) for parts [begin, end), where x_ptr holds elements [i, i + n) of x, or of x − minus.
template <class S, class F>
void each_part(const Tensor& x, const std::optional<Tensor>& minus, int64_t begin, int64_t end, const F& f) {
  S own[kPart], other[kPart];
  for (int64_t part = begin; part < end; ++part) {
    const int64_t i = part * kPart, n = std::min(kPart, x.numel() - i);
    const S* x_ptr = part_of(x, i, n, own);
    if (minus) {
      const S* minus_ptr = part_of(*minus, i, n, other);
      for (int64_t k = 0; k < n; ++k) own[k] = x_ptr[k] - minus_ptr[k];
      x_ptr = own;
    }
    f(x_ptr, n, i);
  }
}

template <class F>
void for_accumulation(const Tensor& x, const F& f) {
  if (!x.is_contiguous()) fail("x: wanted contiguous data");
  if (x.scalar_type() == ScalarType::Double) {
    f(double(), moment_kernels().fp64);
  } else {
    f(float(), moment_kernels().fp32);
  }
}

const uint8_t* mask_of(const std::optional<Tensor>& mask, int64_t count) {
  return reinterpret_cast<const uint8_t*>(data_of<bool>(mask, "mask", count));
}

Tensor whiten_stats(Tensor x, std::optional<Tensor> mask, std::optional<Tensor> minus) {
  check_minus(x, minus);
  const int64_t count = x.numel(), parts = (count + kPart - 1) / kPart;
  const uint8_t* mask_ptr = mask_of(mask, count);
  std::vector<Stats> stats(static_cast<size_t>(parts));
  for_accumulation(x, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    const auto live_count = moment_kernels().live_count;
    parallel_jobs(parts, 4, [&](int64_t begin, int64_t end) {
      each_part<S>(x, minus, begin, end, [&](const S* x_ptr, int64_t n, int64_t i) {
        const uint8_t* live_ptr = mask_ptr ? mask_ptr + i : nullptr;
        Stats& part = stats[size_t(i / kPart)];
        part.count = double(mask_ptr ? live_count(n, live_ptr) : n);
        if (part.count == 0) return;
        part.mean = kernels.sum(n, x_ptr, live_ptr) / part.count;
        part.squares = kernels.squares(n, x_ptr, live_ptr, part.mean);
      });
    });
  });
  Stats all;
  for (const Stats& part : stats) all.join(part);
  const Tensor out = empty_like_of(x, {3}, ScalarType::Double);
  double* out_ptr = static_cast<double*>(out.data_ptr());
  out_ptr[0] = all.count, out_ptr[1] = all.mean, out_ptr[2] = all.squares;
  return out;
}

Tensor whiten_apply(Tensor x, std::optional<Tensor> mask, Tensor stats, Tensor eps, bool shift_mean) {
  const int64_t count = x.numel();
  const uint8_t* mask_ptr = mask_of(mask, count);
  const double* stats_ptr = data_of<double>(stats, "stats", 3);
  const double live = stats_ptr[0], mean = stats_ptr[1], variance = stats_ptr[2] / (live > 2 ? live - 1 : 1);
  // With one live element there is no spread to divide by: 0.
  const double scale = live == 1 ? 0 : 1 / std::sqrt(variance + read_scalar(eps, "eps"));
  const double shift = shift_mean ? 0 : mean;
  const Tensor out = empty_like_of(x, x.sizes(), accumulation_type(x.scalar_type()));
  for_accumulation(x, [&](auto zero, const auto& kernels) {
    using S = decltype(zero);
    S* out_ptr = static_cast<S*>(out.data_ptr());
    parallel_jobs((count + kPart - 1) / kPart, 4, [&](int64_t begin, int64_t end) {
      each_part<S>(x, std::nullopt, begin, end, [&](const S* x_ptr, int64_t n, int64_t i) {
        kernels.normalise(n, x_ptr, mask_ptr ? mask_ptr + i : nullptr, mean, scale, shift, out_ptr + i);
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) {
  m.impl("whiten_stats", TORCH_BOX(&rl4llm::whiten_stats));
  m.impl("whiten_apply", TORCH_BOX(&rl4llm::whiten_apply));
}
