// whiten on the CPU: count, mean and Σ(x − mean)² over live elements, and x normalised by them (docs/math.md section
// 4).
//
// Elements are cut into parts of kPart, always; each part's mean and squares are taken in two passes through the cache,
// in fp64, and parts are joined in order (Chan et al. 1983), so that the bits do not depend on the number of threads.
#include <cmath>
#include <vector>

#include "cpu/tensor_args.h"

namespace rl4llm {
namespace {

constexpr int64_t kPart = 8192;
constexpr int kSums = 8;  // independent sums, for the processor to keep busy with

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

// term(i) summed over [begin, end) in a fixed order.
template <class Term>
double sum_over(int64_t begin, int64_t end, const Term& term) {
  double sums[kSums] = {};
  int64_t i = begin;
  for (; i + kSums <= end; i += kSums) {
    for (int k = 0; k < kSums; ++k) sums[k] += term(i + k);
  }
  for (; i < end; ++i) sums[0] += term(i);
  double sum = 0;
  for (const double x : sums) sum += x;
  return sum;
}

template <class Read>
Stats part_stats(const Read& read, const uint8_t* mask_ptr, int64_t begin, int64_t end) {
  Stats stats;
  const auto live = [&](int64_t i) { return !mask_ptr || mask_ptr[i]; };
  stats.count = mask_ptr ? sum_over(begin, end, [&](int64_t i) { return double(mask_ptr[i]); }) : double(end - begin);
  if (stats.count == 0) return stats;
  stats.mean = sum_over(begin, end, [&](int64_t i) { return live(i) ? read(i) : 0; }) / stats.count;
  stats.squares = sum_over(begin, end, [&](int64_t i) {
    const double centred = live(i) ? read(i) - stats.mean : 0;
    return centred * centred;
  });
  return stats;
}

// f(read), where read(i) is element i as a double.
template <class F>
void with_reader(const Tensor& x, const F& f) {
  const void* x_ptr = x.data_ptr();
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) {
    f([x_ptr](int64_t i) { return double(static_cast<const float*>(x_ptr)[i]); });
  } else if (type == ScalarType::Double) {
    f([x_ptr](int64_t i) { return static_cast<const double*>(x_ptr)[i]; });
  } else if (type == ScalarType::BFloat16) {
    f([x_ptr](int64_t i) { return double(bits_to_float(uint32_t(static_cast<const uint16_t*>(x_ptr)[i]) << 16)); });
  } else {
    f([x_ptr, type](int64_t i) { return read_element(x_ptr, type, i); });
  }
}

const uint8_t* mask_of(const std::optional<Tensor>& mask, int64_t count) {
  return reinterpret_cast<const uint8_t*>(data_of<bool>(mask, "mask", count));
}

Tensor whiten_stats(Tensor x, std::optional<Tensor> mask) {
  const int64_t count = x.numel(), parts = (count + kPart - 1) / kPart;
  if (!x.is_contiguous()) fail("x: wanted contiguous data");
  const uint8_t* mask_ptr = mask_of(mask, count);
  std::vector<Stats> stats(static_cast<size_t>(parts));
  with_reader(x, [&](const auto& read) {
    parallel_jobs(parts, 4, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t last = (p + 1) * kPart < count ? (p + 1) * kPart : count;
        stats[size_t(p)] = part_stats(read, mask_ptr, p * kPart, last);
      }
    });
  });
  Stats all;
  for (const Stats& part : stats) all.join(part);
  const Tensor out = empty_like_of(x, {3}, ScalarType::Double);
  double* out_ptr = static_cast<double*>(out.data_ptr());
  out_ptr[0] = all.count, out_ptr[1] = all.mean, out_ptr[2] = all.squares;
  return out;
}

template <class A, class Read>
void normalise(const Read& read, const uint8_t* mask_ptr, int64_t count, double mean, double scale, double shift,
               A* out_ptr) {
  parallel_jobs((count + kPart - 1) / kPart, 4, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kPart < count ? end * kPart : count;
    for (int64_t i = begin * kPart; i < last; ++i) {
      const A whitened = A((read(i) - mean) * scale + shift);
      out_ptr[i] = !mask_ptr || mask_ptr[i] ? whitened : A(0);
    }
  });
}

Tensor whiten_apply(Tensor x, std::optional<Tensor> mask, Tensor stats, Tensor eps, bool shift_mean) {
  const int64_t count = x.numel();
  if (!x.is_contiguous()) fail("x: wanted contiguous data");
  const uint8_t* mask_ptr = mask_of(mask, count);
  const double* stats_ptr = data_of<double>(stats, "stats", 3);
  const double live = stats_ptr[0], mean = stats_ptr[1], variance = stats_ptr[2] / (live > 2 ? live - 1 : 1);
  // With one live element there is no spread to divide by: 0.
  const double scale = live == 1 ? 0 : 1 / std::sqrt(variance + read_scalar(eps, "eps"));
  const double shift = shift_mean ? 0 : mean;
  const ScalarType acc = accumulation_type(x.scalar_type());
  const Tensor out = empty_like_of(x, x.sizes(), acc);
  with_reader(x, [&](const auto& read) {
    if (acc == ScalarType::Double) {
      normalise(read, mask_ptr, count, mean, scale, shift, static_cast<double*>(out.data_ptr()));
    } else {
      normalise(read, mask_ptr, count, mean, scale, shift, static_cast<float*>(out.data_ptr()));
    }
  });
  return out;
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) {
  m.impl("whiten_stats", TORCH_BOX(&rl4llm::whiten_stats));
  m.impl("whiten_apply", TORCH_BOX(&rl4llm::whiten_apply));
}
