// Sums over live elements on vectors of one instruction set. isa.h says how such a file is written.
//
// What is computed is computed in fp64, a vector of doubles at a time; fp32 is widened behind its load and rounded
// before its store.
#include "cpu/moments.h"

#include "cpu/scan_lanes.h"

namespace rl4llm {
namespace RL4LLM_ISA {
namespace {

typedef Lanes<double> L;
typedef L::F F;
constexpr int kWidth = L::width;
constexpr int kSums = 4;  // vectors of sums, for the processor to keep busy with

RL4LLM_INLINE F load_wide(const double* ptr, int lanes) { return load<L>(ptr, lanes); }
RL4LLM_INLINE F load_wide(const float* ptr, int lanes) {
  typedef float Narrow __attribute__((vector_size(kWidth * sizeof(float))));
  Narrow narrow = {};
  if (lanes == kWidth) {
    __builtin_memcpy(&narrow, ptr, sizeof narrow);
  } else {
    for (int j = 0; j < lanes; ++j) narrow[j] = ptr[j];
  }
  return __builtin_convertvector(narrow, F);
}

RL4LLM_INLINE void store_narrow(double* ptr, int lanes, F x) { store<L>(ptr, lanes, x); }
RL4LLM_INLINE void store_narrow(float* ptr, int lanes, F x) {
  typedef float Narrow __attribute__((vector_size(kWidth * sizeof(float))));
  const Narrow narrow = __builtin_convertvector(x, Narrow);
  if (lanes == kWidth) {
    __builtin_memcpy(ptr, &narrow, sizeof narrow);
  } else {
    for (int j = 0; j < lanes; ++j) ptr[j] = narrow[j];
  }
}

// x, and 0 where an element is not live or not there.
RL4LLM_INLINE F live_only(F x, const uint8_t* mask_ptr, int64_t i, int lanes) {
  if (mask_ptr == nullptr && lanes == kWidth) return x;
#if defined(RL4LLM_ISA_AVX512) || defined(RL4LLM_ISA_AVX2)
  LiveLanes<L> live;
  live_lanes<L>(mask_ptr ? mask_ptr + i : nullptr, lanes, live);
  return only(live, x);
#else  // of two lanes: live_lanes, whose bytes are a vector of two, takes 1.7 times as long
  L::I live = {};
  for (int j = 0; j < lanes; ++j) live[j] = -int64_t(mask_ptr == nullptr || mask_ptr[i + j] != 0);
  return (F)((L::I)x & live);
#endif
}

// Whether no element is live of a step's kSums vectors: behind an answer's end, where nothing else need be read.
RL4LLM_INLINE bool all_dead(const uint8_t* mask_ptr) {
  constexpr int kWords = kSums * kWidth / 8;
  uint64_t words[kWords], any = 0;
  __builtin_memcpy(words, mask_ptr, sizeof words);
  for (int k = 0; k < kWords; ++k) any |= words[k];
  return any == 0;
}

// Σ term(i, lanes) over live elements, term giving those of [i, i + lanes).
template <class Term>
RL4LLM_INLINE double sum_over(int64_t count, const uint8_t* mask_ptr, const Term& term) {
  F sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
    if (mask_ptr && all_dead(mask_ptr + i)) continue;
    for (int k = 0; k < kSums; ++k) {
      sums[k] += live_only(term(i + k * kWidth, kWidth), mask_ptr, i + k * kWidth, kWidth);
    }
  }
  for (; i < count; i += kWidth) {
    const int lanes = count - i < kWidth ? int(count - i) : kWidth;
    sums[0] += live_only(term(i, lanes), mask_ptr, i, lanes);
  }
  const F all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int j = 0; j < kWidth; ++j) sum += all[j];
  return sum;
}

#define RL4LLM_TERM [=](int64_t i, int lanes) __attribute__((always_inline))

template <class S>
double sum(int64_t count, const S* x_ptr, const uint8_t* mask_ptr) {
  return sum_over(count, mask_ptr, RL4LLM_TERM { return load_wide(x_ptr + i, lanes); });
}

template <class S>
double difference(int64_t count, const S* x_ptr, const S* y_ptr, const uint8_t* mask_ptr) {
  return sum_over(count, mask_ptr, RL4LLM_TERM { return load_wide(x_ptr + i, lanes) - load_wide(y_ptr + i, lanes); });
}

template <class S>
double squares(int64_t count, const S* x_ptr, const uint8_t* mask_ptr, double mean) {
  const F centre = constant<L>(mean);
  return sum_over(
      count, mask_ptr, RL4LLM_TERM {
        const F x = load_wide(x_ptr + i, lanes) - centre;
        return x * x;
      });
}

template <class S>
void normalise(int64_t count, const S* x_ptr, const uint8_t* mask_ptr, double mean, double scale, double shift,
               S* out_ptr) {
  const F centre = constant<L>(mean), by = constant<L>(scale), to = constant<L>(shift);
  for (int64_t i = 0; i < count; i += kWidth) {
    const int lanes = count - i < kWidth ? int(count - i) : kWidth;
    const F x = (load_wide(x_ptr + i, lanes) - centre) * by + to;
    store_narrow(out_ptr + i, lanes, live_only(x, mask_ptr, i, lanes));
  }
}

template <class S>
void fill(int64_t count, S x, const uint8_t* mask_ptr, S* out_ptr) {
  typedef Lanes<S> Own;
  const typename Own::F all = constant<Own>(x);
  for (int64_t i = 0; i < count; i += Own::width) {
    const int lanes = count - i < Own::width ? int(count - i) : Own::width;
    LiveLanes<Own> live;
    live_lanes<Own>(mask_ptr ? mask_ptr + i : nullptr, lanes, live);
    store<Own>(out_ptr + i, lanes, only(live, all));
  }
}

// How many tokens are live.
int64_t live_count(int64_t length, const uint8_t* mask_ptr) {
  typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
  constexpr int64_t kMost = 255;  // as far as a byte counts
  const int64_t whole = length / kBytes;
  int64_t total = 0;
  for (int64_t first = 0; first < whole; first += kMost) {
    Bytes counts = {};
    for (int64_t k = first; k < (whole < first + kMost ? whole : first + kMost); ++k) {
      Bytes bytes;
      __builtin_memcpy(&bytes, mask_ptr + k * kBytes, sizeof bytes);
      counts -= (Bytes)(bytes != Bytes{});
    }
    for (int j = 0; j < kBytes; ++j) total += counts[j];
  }
  for (int64_t i = whole * kBytes; i < length; ++i) total += mask_ptr[i] != 0;
  return total;
}

template <class S>
constexpr MomentFunctions<S> functions = {sum<S>, difference<S>, squares<S>, normalise<S>, fill<S>};

}  // namespace

extern const MomentKernels moment_kernels = {functions<float>, functions<double>, live_count};

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
