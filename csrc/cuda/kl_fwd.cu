// kl_divergence: the exact KL of two sets of logits per row (docs/math.md section 3, "Exact"). Its gradient: kl_bwd.cu.
// The reverse and the forward KL are one kernel, Σ a·(log a − log b): the launch swaps the sides. The JSD needs both
// normalisers before its first term: the same kernel finds them, a second one reads again. V and the dtypes alone
// decide in which order a row's columns are added, wherever it stands.
#include "cuda/kl.cuh"

namespace rl4llm {
namespace {

constexpr int kFwdColumns = 16;  // columns of both sides that a thread holds at once; not yet measured
template <class A, class B>
constexpr int kFwdChunks = kFwdColumns / kChunk<A, B>;
constexpr int64_t kFwdGroup = int64_t(kThreads) * kFwdColumns;
constexpr int kPartial = 8, kJsdPartial = 4;

// Stands for −inf where it is multiplied by a weight that is exactly 0.
constexpr float kLowest = -3.40282347e38f;

// A part of a pair of rows, z of the distribution a and w of b: x_v = z'_v − max, y_v = w'_v − other_max. Differences
// are in units of the logits, before k = log2(e)/τ: logits of finfo.min, which libraries write for masked tokens, do
// not overflow there. They are summed twice: dsum makes the value, gsum the gradient. The likeliest token counts 0 in
// gsum, so what a peaked row is off by does not drown the little that is left of p·(log p − log q − KL).
struct Sums {
  float max, sum;              // of z: max z', Σ 2^(x_v·k)
  float dsum;                  // Σ 2^(x_v·k)·(x_v − y_v)
  float other_max, other_sum;  // of w: max w', Σ 2^(y_v·k)
  float anchor, gsum;          // w' where z' is largest, Σ 2^(x_v·k)·(x_v − (w'_v − anchor))
  bool infinite;               // somewhere w is −inf and z is not
};

__device__ __forceinline__ Sums no_sums() {
  const float none = -infinity(0.0f);
  return {none, 0.0f, 0.0f, none, 0.0f, none, 0.0f, false};
}

// Where every logit so far is −inf, subtract 0, so that −inf stays −inf.
__device__ __forceinline__ float reference(float max) { return max == -infinity(0.0f) ? 0.0f : max; }

// The same sums, relative to new maxima >= the old and to the anchor at the new one.
__device__ __forceinline__ Sums rebase_fast(Sums part, float new_max, float new_other_max, float new_anchor, float k) {
  const float shift = fmaxf(part.max - reference(new_max), kLowest);
  const float other_shift = fmaxf(part.other_max - reference(new_other_max), kLowest);
  const float scale = exp2_fast(shift * k);
  // What no longer counts may be infinite: 0·inf must not arise. NaN must stay, so the sums are multiplied.
  const bool gone = scale == 0.0f;
  const float dsum = gone ? 0.0f : scale * (part.dsum + part.sum * (shift - other_shift));
  const float gsum = gone ? 0.0f : scale * (part.gsum + part.sum * bounded_difference(shift, part.anchor - new_anchor));
  return {new_max, part.sum * scale, dsum, new_other_max, part.other_sum * exp2_fast(other_shift * k), new_anchor,
          gsum,    part.infinite};
}

// The anchor of a part where its maximum is the row's.
__device__ __forceinline__ float anchor_at(const Sums& part, float max) {
  return part.max == max ? part.anchor : -infinity(0.0f);
}

// The sums of 32 lanes as one, the same bits in every lane.
__device__ __forceinline__ Sums warp_merge(Sums part, float k) {
  const float max = warp_max(part.max);
  part = rebase_fast(part, max, warp_max(part.other_max), warp_max(anchor_at(part, max)), k);
  return {part.max,
          warp_sum(part.sum),
          warp_sum(part.dsum),
          part.other_max,
          warp_sum(part.other_sum),
          part.anchor,
          warp_sum(part.gsum),
          __any_sync(kAllLanes, part.infinite) != 0};
}

// A pair of rows, the part of them that this block reads, and the numbers that shift and scale them.
template <class A, class B>
struct Pair {
  int64_t row;
  const A* a_ptr;
  const B* b_ptr;
  int64_t first, last;  // no columns where the row is not live: it is not read at all
  bool live;
  float tau, softcap, k;
};

template <class A, class B>
__device__ __forceinline__ Pair<A, B> find_pair(const KlRows& rows, const KlSide& a, const KlSide& b, int parts,
                                                int64_t part_columns) {
  const int64_t row = blockIdx.x / unsigned(parts);
  const bool live = is_live(rows, row);
  const int64_t first = int64_t(blockIdx.x % unsigned(parts)) * part_columns;
  const int64_t last = first + part_columns < rows.V ? first + part_columns : rows.V;
  const float tau = read_number(rows.temperature, row);
  return {row,
          row_of(static_cast<const A*>(a.ptr), row, rows.T, a.stride_b, a.stride_t),
          row_of(static_cast<const B*>(b.ptr), row, rows.T, b.stride_b, b.stride_t),
          first,
          live ? last : first,
          live,
          tau,
          rows.has_softcap ? read_number(rows.softcap, 0) : 0.0f,
          float(kLog2E) / tau};
}

// Calls use(a's chunks, b's chunks) for this thread's columns of the pair, kFwdColumns of each at once.
template <class A, class B, class Use>
__device__ __forceinline__ void for_columns(const Pair<A, B>& pair, const Use& use) {
  constexpr int kColumns = kChunk<A, B>, kChunks = kFwdChunks<A, B>;
  constexpr int64_t kStep = int64_t(kThreads) * kColumns;
  Columns<A, kColumns> a[kChunks];
  Columns<B, kColumns> b[kChunks];
  for (int64_t start = pair.first + int64_t(threadIdx.x) * kColumns; start < pair.last; start += kFwdGroup) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      load_columns(a[i], pair.a_ptr, start + i * kStep, pair.last);
      load_columns(b[i], pair.b_ptr, start + i * kStep, pair.last);
    }
    use(a, b);
  }
}

// Adds columns to a thread's sums: one rescaling for all of them.
template <class A, class B, bool SOFTCAP>
__device__ __forceinline__ Sums add_columns(Sums sums, Columns<A, kChunk<A, B>> (&a)[kFwdChunks<A, B>],
                                            Columns<B, kChunk<A, B>> (&b)[kFwdChunks<A, B>], float k, float softcap) {
  constexpr int kColumns = kChunk<A, B>;
  float z[kFwdColumns], w[kFwdColumns];
  float new_max = sums.max, new_other_max = sums.other_max, lowest = 0.0f;
#pragma unroll
  for (int i = 0; i < kFwdColumns; ++i) {
    z[i] = shifted_logit<SOFTCAP>(to_float(a[i / kColumns][i % kColumns]), softcap);
    w[i] = shifted_logit<SOFTCAP>(to_float(b[i / kColumns][i % kColumns]), softcap);
    new_max = fmaxf(new_max, z[i]);
    new_other_max = fmaxf(new_other_max, w[i]);
    lowest = fminf(lowest, w[i]);
  }
  if (lowest == -infinity(0.0f)) {  // rare: one comparison a column instead of three
#pragma unroll
    for (int i = 0; i < kFwdColumns; ++i) sums.infinite |= w[i] == -infinity(0.0f) && z[i] != -infinity(0.0f);
  }
  float anchor = anchor_at(sums, new_max);  // of equally likely tokens, the largest of the other side
#pragma unroll
  for (int i = 0; i < kFwdColumns; ++i) anchor = z[i] == new_max ? fmaxf(anchor, w[i]) : anchor;
  sums = rebase_fast(sums, new_max, new_other_max, anchor, k);
  const float zero = reference(new_max), other_zero = reference(new_other_max);
#pragma unroll
  for (int i = 0; i < kFwdColumns; ++i) {
    // NaN: fmaxf dropped it, but 2^NaN puts it into the sums. +inf: inf − inf does the same.
    const float x = z[i] - zero, y = w[i] - other_zero;
    const float weight = exp2_fast(x * k);
    sums.sum += weight;
    sums.other_sum += exp2_fast(y * k);
    sums.dsum += weight * (fmaxf(x, kLowest) - fmaxf(y, kLowest));
    sums.gsum += weight * bounded_difference(x, w[i] - anchor);
  }
  return sums;
}

// Writes a row's results from its sums; a and b are the norms of the leading and the other side. For the gradient of
// the reverse KL the other side is counted from the anchor, not from its maximum.
__device__ void finish_row(const KlRows& rows, const KlResults& results, const KlNorms& a, const KlNorms& b,
                           int64_t row, bool live, Sums sums, float tau) {
  const float a_log_sum = log_sum(RowSum<float>{sums.max, sums.sum, 0.0f});
  float b_log_sum = log_sum(RowSum<float>{sums.other_max, sums.other_sum, 0.0f});
  const float bad = 0.0f * (a_log_sum + b_log_sum);  // a bad row on either side is NaN all over
  // The logarithm of the ratio, not the difference of the logarithms: near KL = 0 all of it would be rounding.
  const float kl = sums.dsum / sums.sum / tau + natural_log(sums.other_sum / sums.sum);
  const float mean = sums.gsum / sums.sum;
  const bool mixed = rows.direction == Divergence::jsd;
  const float q_over_p = (sums.anchor - sums.other_max) / tau - b_log_sum + a_log_sum;  // its logarithm, at the anchor
  const double scale = mixed ? mixture_scale(read_beta(rows.beta), q_over_p) : 1;
  float origin = sums.other_max;
  if (rows.direction == Divergence::reverse && !sums.infinite) {
    origin = sums.anchor;
    b_log_sum += (sums.other_max - origin) / tau;
  }
  // infinite: a token that only the other distribution cannot draw
  results.kl_ptr[row] = live ? (sums.infinite ? infinity(0.0f) : kl) + bad : 0.0f;
  results.inner_ptr[row] = {live ? (sums.infinite ? infinity(0.0f) : mean) + bad : 0.0f, live ? scale : 0.0};
  a.row_max_ptr[row] = live ? sums.max : 0.0f;
  a.log_sum_ptr[row] = live ? a_log_sum : 0.0f;
  b.row_max_ptr[row] = live ? origin : 0.0f;
  b.log_sum_ptr[row] = live ? b_log_sum : 0.0f;
}

// Computes: KL(a‖b) = Σ 2^x_v·((z'_v − max z') − (w'_v − max w'))/(s·τ) + log(s_b/s), s = Σ 2^x_v
// Grid: (N·parts,), block -> (row, part); V alone decides the cut, kl_divergence_merge_kernel joins the parts
// Traffic: V·(sizeof(A) + sizeof(B)) read, 36 bytes written (32·parts more each way when the row is cut)
// Numerics: fp32; per-thread online maxima, threads joined in one tree; a_v = 0: 0; only b_v = 0: inf; bad row: NaN
// Gradient: kl_divergence_bwd_kernel, from the maxima and log-sums of both sides
template <class A, class B, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads)
    kl_divergence_fwd_kernel(KlRows rows, KlSide a, KlSide b, KlResults results, KlNorms a_norms, KlNorms b_norms,
                             int parts, int64_t part_columns) {
  const Pair<A, B> pair = find_pair<A, B>(rows, a, b, parts, part_columns);
  Sums sums = no_sums();
  const auto add = [&](Columns<A, kChunk<A, B>>(&z)[kFwdChunks<A, B>], Columns<B, kChunk<A, B>>(&w)[kFwdChunks<A, B>]) {
    sums = add_columns<A, B, SOFTCAP>(sums, z, w, pair.k, pair.softcap);
  };
  for_columns(pair, add);

  __shared__ Sums warp_sums[kWarps];
  sums = warp_merge(sums, pair.k);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  sums = warp_merge(threadIdx.x < kWarps ? warp_sums[threadIdx.x] : no_sums(), pair.k);
  if (threadIdx.x > 0) return;
  if (parts == 1) {
    finish_row(rows, results, a_norms, b_norms, pair.row, pair.live, sums, pair.tau);
  } else {
    float* partial_ptr = results.partial_ptr + int64_t(blockIdx.x) * kPartial;
    partial_ptr[0] = sums.max;
    partial_ptr[1] = sums.sum;
    partial_ptr[2] = sums.dsum;
    partial_ptr[3] = sums.other_max;
    partial_ptr[4] = sums.other_sum;
    partial_ptr[5] = sums.anchor;
    partial_ptr[6] = sums.gsum;
    partial_ptr[7] = sums.infinite ? 1.0f : 0.0f;
  }
}

// Computes: both maxima over the parts, every sum scaled by 2^((m_j − max)·k); then as kl_divergence_fwd_kernel
// Grid: (ceil(N/256),), thread -> row
// Traffic: 32·parts bytes read, 36 written
// Numerics: fp32; the parts of a row are joined from the left; a part of −inf only weighs 0
// Gradient: kl_divergence_bwd_kernel
__global__ void __launch_bounds__(kThreads)
    kl_divergence_merge_kernel(KlRows rows, KlResults results, KlNorms a_norms, KlNorms b_norms, int parts) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows.N) return;
  const float tau = read_number(rows.temperature, row), k = float(kLog2E) / tau;
  Sums sums = no_sums();
  for (int part = 0; part < parts; ++part) {
    const float* partial_ptr = results.partial_ptr + (row * parts + part) * kPartial;
    Sums next = {partial_ptr[0], partial_ptr[1], partial_ptr[2], partial_ptr[3],
                 partial_ptr[4], partial_ptr[5], partial_ptr[6], partial_ptr[7] > 0};
    const float max = fmaxf(sums.max, next.max), other_max = fmaxf(sums.other_max, next.other_max);
    const float anchor = fmaxf(anchor_at(sums, max), anchor_at(next, max));
    sums = rebase_fast(sums, max, other_max, anchor, k);
    next = rebase_fast(next, max, other_max, anchor, k);
    sums.sum += next.sum;
    sums.dsum += next.dsum;
    sums.gsum += next.gsum;
    sums.other_sum += next.other_sum;
    sums.infinite |= next.infinite;
  }
  finish_row(rows, results, a_norms, b_norms, row, is_live(rows, row), sums, tau);
}

// Computes: Σ p·log2(p/κm), Σ q·log2(q/κm), m = β·q + (1−β)·p, Σ p and Σ q, from the norms of both sides
// Grid: (N·parts,), block -> (row, part); kl_divergence_jsd_merge_kernel adds the parts
// Traffic: V·(sizeof(T) + sizeof(R)) read once more, 16·parts bytes written
// Numerics: fp32; from log2(q/p), so that nothing overflows and p = q gives 0; p = 0 and q = 0 weigh 0
// Gradient: kl_divergence_bwd_kernel
template <class T, class R, bool SOFTCAP>
__global__ void __launch_bounds__(kThreads)
    kl_divergence_jsd_kernel(KlRows rows, KlResults results, int parts, int64_t part_columns) {
  const Pair<T, R> pair = find_pair<T, R>(rows, rows.logits, rows.ref, parts, part_columns);
  const Mixture mixture = read_mixture(read_beta(rows.beta), results.inner_ptr[pair.row]);
  const float max = results.logits.row_max_ptr[pair.row], ref_max = results.ref.row_max_ptr[pair.row];
  const float log2_sum = results.logits.log_sum_ptr[pair.row] * float(kLog2E);
  const float ref_log2_sum = results.ref.log_sum_ptr[pair.row] * float(kLog2E);
  float p_sum = 0.0f, q_sum = 0.0f, p_total = 0.0f, q_total = 0.0f;
  const auto add = [&](Columns<T, kChunk<T, R>>(&z)[kFwdChunks<T, R>], Columns<R, kChunk<T, R>>(&w)[kFwdChunks<T, R>]) {
#pragma unroll
    for (int i = 0; i < kFwdColumns; ++i) {
      const float own = to_float(z[i / kChunk<T, R>][i % kChunk<T, R>]);
      const float other = to_float(w[i / kChunk<T, R>][i % kChunk<T, R>]);
      const float log2_p = (shifted_logit<SOFTCAP>(own, pair.softcap) - max) * pair.k - log2_sum;
      const float log2_q = (shifted_logit<SOFTCAP>(other, pair.softcap) - ref_max) * pair.k - ref_log2_sum;
      const Ratios ratios = log2_ratios(log2_p, log2_q, mixture);
      const float p = exp2_fast(log2_p), q = exp2_fast(log2_q);
      p_sum += p * ratios.p_over_m;
      q_sum += q * ratios.q_over_m;
      p_total += p;
      q_total += q;
    }
  };
  for_columns(pair, add);

  __shared__ float warp_sums[kJsdPartial][kWarps];
  const float sums[kJsdPartial] = {warp_sum(p_sum), warp_sum(q_sum), warp_sum(p_total), warp_sum(q_total)};
  if (threadIdx.x % kWarp == 0) {
    for (int i = 0; i < kJsdPartial; ++i) warp_sums[i][threadIdx.x / kWarp] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  for (int i = 0; i < kJsdPartial; ++i) {
    const float sum = warp_sum(threadIdx.x < kWarps ? warp_sums[i][threadIdx.x] : 0.0f);
    if (threadIdx.x == 0) results.partial_ptr[kJsdPartial * int64_t(blockIdx.x) + i] = sum;
  }
}

// Computes: JSD = β·KL(q‖κm)/Σ q + (1−β)·KL(p‖κm)/Σ p + log κ, inner = KL(p‖κm)/Σ p in bits, κ
// Grid: (ceil(N/256),), thread -> row
// Traffic: 16·(parts + 1) bytes read, 12 written
// Numerics: fp32; the parts are added from the left; fp64 from the sums on
// Gradient: kl_divergence_bwd_kernel
__global__ void __launch_bounds__(kThreads) kl_divergence_jsd_merge_kernel(KlRows rows, KlResults results, int parts) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows.N) return;
  float p_sum = 0.0f, q_sum = 0.0f, p_total = 0.0f, q_total = 0.0f;
  for (int64_t part = row * parts; part < (row + 1) * parts; ++part) {
    const float* partial_ptr = results.partial_ptr + part * kJsdPartial;
    p_sum += partial_ptr[0];
    q_sum += partial_ptr[1];
    p_total += partial_ptr[2];
    q_total += partial_ptr[3];
  }
  const bool live = is_live(rows, row);
  const float beta = read_beta(rows.beta);
  // Over the sums of p and q as they are rounded, 1 but for that: then the gradients of a row add up to 0, where 1/τ
  // would blow up what is left. Where only q is bad, fmaxf has dropped its NaN from the terms of p.
  const double p_mean = double(p_sum) / p_total + 0.0 * q_sum, q_mean = double(q_sum) / q_total;
  const double kl = kLn2 * (beta * q_mean + (1 - beta) * p_mean) + natural_log(results.inner_ptr[row].scale);
  results.kl_ptr[row] = live ? float(kl) : 0.0f;
  results.inner_ptr[row].mean = live ? p_mean : 0.0;
}

template <class A, class B>
void launch_fwd(const KlRows& rows, const KlSide& a, const KlSide& b, const KlResults& results, const KlNorms& a_norms,
                const KlNorms& b_norms, cudaStream_t stream) {
  const int parts = int(row_parts(rows.V));
  const unsigned grid = unsigned(rows.N * parts);
  const int64_t columns = part_columns(rows.V);
  if (rows.has_softcap) {
    kl_divergence_fwd_kernel<A, B, true>
        <<<grid, kThreads, 0, stream>>>(rows, a, b, results, a_norms, b_norms, parts, columns);
  } else {
    kl_divergence_fwd_kernel<A, B, false>
        <<<grid, kThreads, 0, stream>>>(rows, a, b, results, a_norms, b_norms, parts, columns);
  }
}

template <class T, class R>
void launch_jsd(const KlRows& rows, const KlResults& results, cudaStream_t stream) {
  const int parts = int(row_parts(rows.V));
  const unsigned grid = unsigned(rows.N * parts);
  const int64_t columns = part_columns(rows.V);
  if (rows.has_softcap) {
    kl_divergence_jsd_kernel<T, R, true><<<grid, kThreads, 0, stream>>>(rows, results, parts, columns);
  } else {
    kl_divergence_jsd_kernel<T, R, false><<<grid, kThreads, 0, stream>>>(rows, results, parts, columns);
  }
}

}  // namespace

int64_t kl_divergence_fwd_programs(const KlRows& rows) { return rows.N * row_parts(rows.V); }

int64_t kl_divergence_partials(int64_t N, int64_t V, Divergence direction) {
  const int64_t parts = row_parts(V);
  return N * parts * (parts > 1 ? kPartial : direction == Divergence::jsd ? kJsdPartial : 0);
}

cudaError_t kl_divergence_fwd(const KlRows& rows, const KlResults& results, cudaStream_t stream) {
  if (rows.N == 0) return cudaSuccess;
  const bool swapped = rows.direction == Divergence::forward;  // KL(q‖p): the reference leads
  const KlSide &a = swapped ? rows.ref : rows.logits, &b = swapped ? rows.logits : rows.ref;
  const KlNorms &a_norms = swapped ? results.ref : results.logits, &b_norms = swapped ? results.logits : results.ref;
  const int parts = int(row_parts(rows.V));
  const unsigned rows_grid = unsigned(ceil_div(rows.N, kThreads));
  const cudaError_t error = with_types(a, b, [&](auto one, auto other) {
    launch_fwd<decltype(one), decltype(other)>(rows, a, b, results, a_norms, b_norms, stream);
  });
  if (error != cudaSuccess) return error;
  if (parts > 1) {
    kl_divergence_merge_kernel<<<rows_grid, kThreads, 0, stream>>>(rows, results, a_norms, b_norms, parts);
  }
  if (rows.direction != Divergence::jsd) return cudaGetLastError();
  const cudaError_t again = with_types(rows.logits, rows.ref, [&](auto one, auto other) {
    launch_jsd<decltype(one), decltype(other)>(rows, results, stream);
  });
  if (again != cudaSuccess) return again;
  kl_divergence_jsd_merge_kernel<<<rows_grid, kThreads, 0, stream>>>(rows, results, parts);
  return cudaGetLastError();
}

}  // namespace rl4llm
