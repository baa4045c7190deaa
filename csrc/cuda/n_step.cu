// n_step_returns: G_t = Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n} (docs/math.md section 4).
//
// A window of n steps is summed 16 terms at a time: one launch for every hexadecimal digit of n. A sum over 16·m steps
// is 16 sums over m steps, m further on each, and a digit d of n takes d of them. So up to n = 15 a token is read once
// from memory, whatever the shape, and its neighbours from the cache. No difference of long sums is taken, so nothing
// cancels, and a NaN reaches n tokens back, no further.
//
// Where there is a mask, the tokens that take a step are brought side by side first, so that a window is a run of
// neighbours.
#include "cuda/scan.cuh"

namespace rl4llm {
namespace {

constexpr int kDigit = 16;

// Where pack_kernel puts the tokens that take a step.
struct Packed {
  float *rewards_ptr, *values_ptr;  // (N,): those of a sequence from its first token's place on; 0 if it is not live
  int* place_ptr;                   // (N,): where in its sequence each comes from; −1 if it is not live
  int* count_ptr;                   // (B,): how many a sequence has
  int* part_count_ptr;              // (slots,): how many a part has
};

// Tokens that take a step, side by side; zeros for the results of those that are not live.
//
// Computes: a stable partition of each sequence; COUNT: the size of each part's own share
// Grid: (ceil(slots·WARPS/8),), WARPS warps -> part of a sequence
// Traffic: mask, reward and value of a token read, 12 bytes written; COUNT: the mask read
// Numerics: none
// Gradient: none flows
template <class T, int WARPS, bool COUNT>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const ScanTensors a, const Packed packed, int64_t parts, int64_t slots) {
  __shared__ int shared[2][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, member = warp % WARPS;
  const int64_t slot = int64_t(blockIdx.x) * (kWarps / WARPS) + warp / WARPS;
  if (slot >= slots) return;
  Span s = locate(a, slot, parts);
  if (s.part < 0 || (s.part > 0 && s.begin == s.length)) return;
  const bool* mask_ptr = tokens_of<bool>(a.mask, s);
  s.last = a.skip ? s.length - 1 : find_live<true>(mask_ptr, a.mask.stride_t, 0, s.length);
  int rank = s.begin;  // of the next token that takes a step
  if (a.skip) {
    rank = 0;
    if (!COUNT && s.length > kPart) {
      for (int q = lane; q < int(s.part); q += kWarp) rank += packed.part_count_ptr[s.first_slot + q];
      rank = warp_sum(rank);
      rank = rank < 0 ? 0 : rank < s.begin ? rank : s.begin;  // offsets that lie must not lead out of bounds
    }
  }
  const int64_t place = s.row * a.T + s.start;
  const T* reward_ptr = tokens_of<T>(a.inputs[0], s);
  const T* value_ptr = tokens_of<T>(a.inputs[1], s);
  const int rounds = (s.end - s.begin + WARPS * kTile - 1) / (WARPS * kTile);
  for (int k = 0; k < rounds; ++k) {
    const int t = s.begin + (k * WARPS + member) * kTile + lane * kTokens;
    const unsigned live = live_tokens(mask_ptr, a.mask.stride_t, t, s.end);
    unsigned steps = live;
    if (!a.skip) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) steps |= (t + i <= s.last && t + i < s.end ? 1u : 0u) << i;
    }
    const int own = __popc(steps);
    int before = own;  // then: of the lanes before this one
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, distance);
      if (lane >= distance) before += other;
    }
    const int of_tile = __shfl_sync(kAllLanes, before, kWarp - 1);
    before -= own;
    if constexpr (WARPS == 1) {
      before += rank, rank += of_tile;
    } else {
      int* mine = shared[k % 2];
      if (lane == 0) mine[member] = of_tile;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        if (w == member) before += rank;
        rank += mine[w];
      }
    }
    if constexpr (!COUNT) {
      float r[kTokens], v[kTokens];
      load_tokens(reward_ptr, a.inputs[0].stride_t, t, s.end, live, r);
      load_tokens(value_ptr, a.inputs[1].stride_t, t, s.end, live, v);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (steps >> i & 1) {
          packed.rewards_ptr[place + before] = r[i], packed.values_ptr[place + before] = v[i];
          packed.place_ptr[place + before] = live >> i & 1 ? t + i : -1;
          ++before;
        }
        if (t + i < s.end && !(live >> i & 1)) a.out_ptr[0][place + t + i] = 0;
      }
    }
  }
  if (member == 0 && lane == 0) {
    if (COUNT) {
      packed.part_count_ptr[slot] = rank;
    } else if (s.end == s.length) {
      packed.count_ptr[s.b] = a.skip ? rank : s.last + 1;
    }
  }
}

// γ^n for n >= 0; fp64, because a squaring rounds, and the rounding doubles with every one that follows.
__device__ double power(double gamma, int64_t n) {
  double result = 1;
  for (; n > 0; n /= 2, gamma *= gamma) {
    if (n & 1) result *= gamma;
  }
  return result;
}

struct Windows {
  ScanTokens sums;  // Σ of m steps from each place on; m = 1: rewards
  int64_t m, done;
  int digit;                // of n: m's; n = … + digit·m + done
  bool last;                // the highest digit
  const float* before_ptr;  // (N,) Σ of `done` steps; null: done = 0
  float* sixteen_ptr;       // (N,) Σ of 16·m steps, or null
  float* out_ptr;           // (N,) Σ of done + digit·m steps, or null where the digit is 0; the last: the returns
  const int *count_ptr, *place_ptr;  // as in Packed, or null: every token takes a step
};

// One digit of n.
//
// Computes: S_16m(i) = Σ_{q<16} γ^{qm}·S_m(i+qm); R(i) += γ^done·Σ_{q<digit} γ^{qm}·S_m(i+done+qm); the last time
//           + γ^n·V(i+n), or where the sequence ends before, γ to the number of its tokens from i on times the
//           bootstrap
// Grid: (ceil(slots·WARPS/8),), WARPS warps -> part of a sequence
// Traffic: 8 to 20 bytes a token, and up to 16 reads of what a neighbour reads too
// Numerics: fp32, nearest first; powers in fp64, rounded once
// Gradient: none flows
template <class S, class V, int WARPS>
__global__ void __launch_bounds__(kThreads)
    window_kernel(const ScanTensors a, const Windows w, int64_t parts, int64_t slots) {
  __shared__ float powers[kDigit + 2];
  const double gamma = read_double(a.gamma);
  if (threadIdx.x < kDigit) {
    powers[threadIdx.x] = float(power(gamma, threadIdx.x * w.m));
  } else if (threadIdx.x == kDigit) {
    powers[kDigit] = float(power(gamma, w.done));
  } else if (threadIdx.x == kDigit + 1) {
    powers[kDigit + 1] = float(power(gamma, w.done + w.digit * w.m));
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, member = warp % WARPS;
  const int64_t slot = int64_t(blockIdx.x) * (kWarps / WARPS) + warp / WARPS;
  if (slot >= slots) return;
  const Span s = locate(a, slot, parts);
  if (s.part < 0 || (s.part > 0 && s.begin == s.length)) return;
  int count = s.length;
  if (w.count_ptr) {
    count = w.count_ptr[s.b];
    count = count < 0 ? 0 : count < s.length ? count : s.length;  // offsets that lie must not lead out of bounds
  }
  const int end = s.end < count ? s.end : count;
  const int64_t place = s.row * a.T + s.start;
  const S* sums_ptr = tokens_of<S>(w.sums, s);
  const auto sum_at = [&](int64_t i) { return i < count ? to_float(sums_ptr[i * w.sums.stride_t]) : 0.0f; };
  for (int i = s.begin + member * kWarp + lane; i < end; i += WARPS * kWarp) {
    if (w.sixteen_ptr) {
      float sixteen = 0;
#pragma unroll 4
      for (int q = 0; q < kDigit; ++q) sixteen = fmaf(powers[q], sum_at(i + q * w.m), sixteen);
      w.sixteen_ptr[place + i] = sixteen;
    }
    if (!w.out_ptr) continue;
    float total = 0;
    for (int q = 0; q < w.digit; ++q) total = fmaf(powers[q], sum_at(i + w.done + q * w.m), total);
    if (w.before_ptr) total = fmaf(powers[kDigit], total, w.before_ptr[place + i]);
    if (!w.last) {
      w.out_ptr[place + i] = total;
      continue;
    }
    const int64_t behind = i + w.done + w.digit * w.m;
    if (behind < count) {
      const V value = tokens_of<V>(a.inputs[1], s)[behind * a.inputs[1].stride_t];
      total = fmaf(powers[kDigit + 1], to_float(value), total);
    } else if (a.bootstrap_ptr) {
      total = fmaf(float(power(gamma, count - i)), a.bootstrap_ptr[s.b], total);
    }
    const int t = w.place_ptr ? w.place_ptr[place + i] : i;
    if (t >= 0 && t < s.length) w.out_ptr[place + t] = total;
  }
}

template <class S, class V>
void launch_windows(const ScanTensors& a, const Windows& w, int64_t parts, int64_t slots, int warps,
                    cudaStream_t stream) {
  const unsigned grid = unsigned((slots * warps + kWarps - 1) / kWarps);
  if (warps == 1) {
    window_kernel<S, V, 1><<<grid, kThreads, 0, stream>>>(a, w, parts, slots);
  } else {
    window_kernel<S, V, kWarps><<<grid, kThreads, 0, stream>>>(a, w, parts, slots);
  }
}

// All digits of n, from the lowest; T: of the rewards and values as they came, or float where they were packed.
template <class T>
void launch_digits(const ScanTensors& a, int64_t n, const Packed& packed, float* free_ptr, int64_t parts, int64_t slots,
                   int warps, cudaStream_t stream) {
  const int64_t N = a.offsets_ptr ? a.T : a.B * a.T;
  float* sums_ptr[2] = {free_ptr, free_ptr + N};
  float* result_ptr = free_ptr + 2 * N;
  Windows w = {a.inputs[0], 1, 0, 0, false, nullptr, nullptr, nullptr, packed.count_ptr, packed.place_ptr};
  for (int k = 0; n > 0; ++k) {
    w.digit = int(n % kDigit), n /= kDigit;
    w.last = n == 0;
    w.sixteen_ptr = w.last ? nullptr : sums_ptr[k % 2];
    w.out_ptr = w.last ? a.out_ptr[0] : w.digit ? result_ptr : nullptr;
    if (k == 0) {
      launch_windows<T, T>(a, w, parts, slots, warps, stream);
    } else {
      launch_windows<float, T>(a, w, parts, slots, warps, stream);
    }
    if (w.digit) w.before_ptr = result_ptr;
    w.done += w.digit * w.m, w.m *= kDigit;
    w.sums = {w.sixteen_ptr, a.offsets_ptr ? 0 : a.T, 1};
  }
}

template <class T>
cudaError_t launch_n_step(ScanTensors a, int64_t n, cudaStream_t stream) {
  const bool packs = a.offsets_ptr != nullptr;
  if (a.B == 0 || a.T == 0) return cudaSuccess;
  const int64_t slots = scan_slots(a.B, a.T, packs), N = packs ? a.T : a.B * a.T;
  const int64_t parts = packs ? 1 : slots / a.B;
  const int warps = (packs ? a.T / a.B : a.T) <= kShortRow ? 1 : kWarps;
  Packed packed = {};
  float* free_ptr = a.partial_ptr;
  if (!a.mask.ptr) {
    launch_digits<T>(a, n, packed, free_ptr, parts, slots, warps, stream);
    return cudaGetLastError();
  }
  packed = {free_ptr, free_ptr + N, reinterpret_cast<int*>(free_ptr + 2 * N)};
  packed.count_ptr = packed.place_ptr + N, packed.part_count_ptr = packed.count_ptr + a.B;
  free_ptr = reinterpret_cast<float*>(packed.part_count_ptr + slots);
  const unsigned grid = unsigned((slots * warps + kWarps - 1) / kWarps);
  const bool count = a.skip && a.T > kPart;
  if (warps == 1) {
    if (count) pack_kernel<T, 1, true><<<grid, kThreads, 0, stream>>>(a, packed, parts, slots);
    pack_kernel<T, 1, false><<<grid, kThreads, 0, stream>>>(a, packed, parts, slots);
  } else {
    if (count) pack_kernel<T, kWarps, true><<<grid, kThreads, 0, stream>>>(a, packed, parts, slots);
    pack_kernel<T, kWarps, false><<<grid, kThreads, 0, stream>>>(a, packed, parts, slots);
  }
  const int64_t stride_b = packs ? 0 : a.T;
  a.inputs[0] = {packed.rewards_ptr, stride_b, 1}, a.inputs[1] = {packed.values_ptr, stride_b, 1};
  launch_digits<float>(a, n, packed, free_ptr, parts, slots, warps, stream);
  return cudaGetLastError();
}

}  // namespace

int64_t n_step_workspace(int64_t B, int64_t T, bool packed, bool masked, int64_t n) {
  const int64_t N = packed ? T : B * T;
  return (masked ? 3 * N + B + scan_slots(B, T, packed) : 0) + (n >= kDigit ? 3 * N : 0);
}

cudaError_t n_step_returns(const ScanTensors& a, int64_t n, cudaStream_t stream) {
  switch (a.dtype) {
    case Dtype::fp32:
      return launch_n_step<float>(a, n, stream);
    case Dtype::bf16:
      return launch_n_step<__nv_bfloat16>(a, n, stream);
    case Dtype::fp16:
      return launch_n_step<__half>(a, n, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace rl4llm
