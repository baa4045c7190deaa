// What every CPU op needs around its kernel: reading stable-ABI tensors, checking them, and torch's threads.
// For the ops' own files (*.cpp); a *.isa.cpp includes none of this.
//
//   Rows             logits (B, T, V) with any strides over B and T
//   read_scalar      a 0-d hyperparameter tensor as a double;  PerRow: a 0-d or (N,) one
//   data_of<T>       a contiguous argument's pointer, after checking dtype and shape
//   empty_like_of    a new tensor on the device of another
//   kernels_for<S>   the fp32 or the fp64 kernels of an instruction set
//   parallel_jobs    jobs handed to torch's threads one batch after the other
//   fail             throws std::invalid_argument (ValueError in Python) from pieces of text
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace rl4llm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Pieces>
[[noreturn]] void fail(const Pieces&... pieces) {
  std::ostringstream text;
  (text << ... << pieces);
  throw std::invalid_argument(text.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

template <class T>
constexpr ScalarType scalar_type_of();
template <>
constexpr ScalarType scalar_type_of<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType scalar_type_of<double>() {
  return ScalarType::Double;
}
template <>
constexpr ScalarType scalar_type_of<int64_t>() {
  return ScalarType::Long;
}
template <>
constexpr ScalarType scalar_type_of<bool>() {
  return ScalarType::Bool;
}

// The kernels for scalars S among those that one instruction set has for fp32 and fp64.
template <class S, class Kernels>
const auto& kernels_for(const Kernels& kernels) {
  if constexpr (sizeof(S) == sizeof(double)) {
    return kernels.fp64;
  } else {
    return kernels.fp32;
  }
}

// fp64 sums for fp64, fp32 for everything else (schemas.py: accumulation_dtype).
inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The pointer of a contiguous argument of dtype T with `numel` elements.
template <class T>
T* data_of(const Tensor& tensor, const char* name, int64_t numel) {
  if (tensor.scalar_type() != scalar_type_of<T>()) {
    fail(name, ": wanted ", torch::headeronly::toString(scalar_type_of<T>()), ", got ",
         torch::headeronly::toString(tensor.scalar_type()));
  }
  if (!tensor.is_contiguous() || tensor.numel() != numel) {
    fail(name, ": wanted ", numel, " contiguous elements, got ", shape_of(tensor),
         tensor.is_contiguous() ? "" : ", not contiguous");
  }
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data_of(const std::optional<Tensor>& tensor, const char* name, int64_t numel) {
  return tensor ? data_of<T>(*tensor, name, numel) : nullptr;
}

// What whiten_stats takes from x: like it.
inline void check_minus(const Tensor& x, const std::optional<Tensor>& minus) {
  if (!minus) return;
  if (minus->scalar_type() != x.scalar_type() || minus->numel() != x.numel() || !minus->is_contiguous()) {
    fail("minus: wanted ", x.numel(), " contiguous elements of ", torch::headeronly::toString(x.scalar_type()),
         ", got ", shape_of(*minus), " of ", torch::headeronly::toString(minus->scalar_type()));
  }
}

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Element i of float data of any dtype.
inline double read_element(const void* data_ptr, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::Double:
      return static_cast<const double*>(data_ptr)[i];
    case ScalarType::Float:
      return static_cast<const float*>(data_ptr)[i];
    case ScalarType::BFloat16:
      return bits_to_float(uint32_t(static_cast<const uint16_t*>(data_ptr)[i]) << 16);
    case ScalarType::Half:
      return static_cast<float>(static_cast<const torch::headeronly::Half*>(data_ptr)[i]);
    default:
      fail("wanted float64, float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  }
}

inline double read_scalar(const Tensor& tensor, const char* name) {
  if (tensor.numel() != 1) fail(name, ": wanted one number, got shape ", shape_of(tensor));
  return read_element(tensor.data_ptr(), tensor.scalar_type(), 0);
}

// A hyperparameter that is one number, or one per row (N,).
class PerRow {
 public:
  PerRow(const Tensor& tensor, const char* name, int64_t rows)
      : data_ptr_(tensor.data_ptr()), type_(tensor.scalar_type()), count_(tensor.dim() == 0 ? 1 : rows) {
    if (tensor.dim() != 0 && (tensor.dim() != 1 || tensor.numel() != rows || !tensor.is_contiguous())) {
      fail(name, ": wanted a number or (", rows, ",), contiguous; got ", shape_of(tensor));
    }
    if (count_ > 0) (*this)[0];  // throws for a dtype that is no float
    per_row_ = tensor.dim() != 0;
  }
  double operator[](int64_t row) const { return read_element(data_ptr_, type_, per_row_ ? row : 0); }
  int64_t count() const { return count_; }

 private:
  const void* data_ptr_;
  ScalarType type_;
  int64_t count_;
  bool per_row_ = false;
};

// Logits (B, T, V) with unit stride over V.
struct Rows {
  char* base_ptr;
  int64_t B, T, V, stride_b, stride_t, N;
  int64_t element_size;
  ScalarType type;

  Rows(const Tensor& logits, const char* name)
      : base_ptr(static_cast<char*>(logits.data_ptr())),
        element_size(int64_t(logits.element_size())),
        type(logits.scalar_type()) {
    if (logits.dim() != 3) fail(name, ": wanted (B, T, V), got ", shape_of(logits));
    B = logits.size(0), T = logits.size(1), V = logits.size(2), N = B * T;
    stride_b = logits.stride(0), stride_t = logits.stride(1);
    if (V == 0 || (V > 1 && logits.stride(2) != 1)) {
      fail(name, ": wanted a vocabulary of at least one token, with unit stride; got ", shape_of(logits));
    }
  }
  // Row n, from column v.
  char* at(int64_t n, int64_t v) const { return base_ptr + (n / T * stride_b + n % T * stride_t + v) * element_size; }
};

// A new tensor on the device of `like`; a large one on the CPU in memory that an earlier one left (memory.cpp).
Tensor empty_like_of(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type);
inline Tensor empty_like_of(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty_like_of(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

// Runs work(begin, end) over [0, jobs) in batches, on torch's threads. Which thread gets a batch is left to chance, so
// work's results must not depend on it. work must not throw.
template <class Work>
void parallel_jobs(int64_t jobs, int64_t batch, const Work& work) {
  const int64_t batches = (jobs + batch - 1) / batch;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = batches < threads ? batches : threads;
  if (workers <= 1) {
    if (jobs > 0) work(int64_t(0), jobs);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < batches;) {
      work(i * batch, (i + 1) * batch < jobs ? (i + 1) * batch : jobs);
    }
  });
}

}  // namespace rl4llm
