// What the ops over rows of logits share: how rows are cut, and their options. For the ops' own files (*.cpp).
#pragma once

#include <algorithm>

#include "cpu/tensor_args.h"
#include "hd.h"

namespace rl4llm {

// A row is cut into parts of this many logits, always: so a row of any batch has the same bits, and one row alone can
// still keep several threads busy.
constexpr int64_t kPart = 16384;

// Rows cut into parts of kPart logits: job i is part i % parts of row i / parts.
struct Parts {
  int64_t parts, jobs, batch;
  bool whole_rows;  // there are plenty: a thread takes all parts of a row, for long streams from memory

  explicit Parts(const Rows& rows) : parts((rows.V + kPart - 1) / kPart), jobs(rows.N * parts) {
    batch = (kPart + rows.V - 1) / rows.V;  // enough work to be worth a thread's while
    whole_rows = rows.N >= 8 * int64_t(torch::stable::get_num_threads());
    if (whole_rows) batch = std::max(batch, parts);
  }
};

inline void check_temperature(const PerRow& temperature) {
  for (int64_t n = 0; n < temperature.count(); ++n) {
    if (!(temperature[n] > 0)) fail("temperature: wanted values > 0 in every row, got ", temperature[n], " in row ", n);
  }
}

inline double read_softcap(const std::optional<Tensor>& softcap) {
  if (!softcap) return 0;
  const double c = read_scalar(*softcap, "softcap");
  if (!(c > 0)) fail("softcap: wanted a number > 0, got ", c);
  return c;
}

template <class A>
bool finite(A x) {
  return x - x == A(0);
}

// Rounding to bf16 could carry a NaN's payload away.
template <class A>
A canonical(A x) {
  return x == x ? x : not_a_number(A());
}

}  // namespace rl4llm
