// gae, its backward and vtrace: the scan x_t = a_t + b_t·x_{t+1} along sequences (docs/math.md section 4).
//
// A warp scans a tile of 128 tokens; the tiles of a part of 4,096 tokens are joined one after the other, and so are the
// parts of a sequence. So the bits follow from a token's place in its sequence alone: whether one warp works on a row
// or eight, padded or packed, changes nothing. Sequences of one part are read once. Longer ones take two launches: each
// part's own (a, b) first, then the results; so a few long rows fill the GPU, and their second reading mostly finds
// the cache.
#include "cuda/scan.cuh"

namespace rl4llm {
namespace {

struct Numbers {
  float gamma, decay, of_value, beta, rho_max, c_max;
};

__device__ __forceinline__ Numbers read_numbers(const ScanTensors& a) {
  const double gamma = read_double(a.gamma), lam = read_double(a.lam);
  return {float(gamma),
          float(gamma * lam),
          float(gamma * (1 - lam)),
          float(read_double(a.beta)),
          float(read_double(a.rho_max)),
          float(read_double(a.c_max))};
}

// The tokens of a thread, as read.
template <int inputs>
struct Loaded {
  float in[inputs][kTokens];
  unsigned live;
};

// A_t = r_t − V_t + x_{t+1}, R_t = r_t + x_{t+1}, x_t = γ(λ·r_t + (1−λ)·V_t) + γλ·x_{t+1}.
struct Gae {
  static constexpr bool reverse = true, next_values = false;
  static constexpr int inputs = 3;
  float r[kTokens], v[kTokens];

  __device__ __forceinline__ void offset(const Numbers& n, const Loaded<inputs>& t, const float (&)[kTokens], int i,
                                         float score, float& a, float& b) {
    r[i] = fmaf(-n.beta, t.in[2][i], t.in[0][i]) + score, v[i] = t.in[1][i];
    a = fmaf(n.decay, r[i], n.of_value * v[i]), b = n.decay;
  }
  __device__ __forceinline__ float first(const Numbers&, int i, float, float next) const {
    return (r[i] - v[i]) + next;
  }
  __device__ __forceinline__ float second(const Numbers&, int i, float, float next) const { return r[i] + next; }
};

// The adjoint: h_t = dA_t + dR_t + γλ·h_{t−1}; dr_t = h_t, dV_t = −dA_t + γ(1−λ)·h_{t−1}.
struct GaeBackward {
  static constexpr bool reverse = false, next_values = false;
  static constexpr int inputs = 2;
  float grad_advantage[kTokens];

  __device__ __forceinline__ void offset(const Numbers& n, const Loaded<inputs>& t, const float (&)[kTokens], int i,
                                         float, float& a, float& b) {
    grad_advantage[i] = t.in[0][i];
    a = t.in[0][i] + t.in[1][i], b = n.decay;
  }
  __device__ __forceinline__ float first(const Numbers&, int, float h, float) const { return h; }
  __device__ __forceinline__ float second(const Numbers& n, int i, float, float before) const {
    return fmaf(n.of_value, before, -grad_advantage[i]);
  }
};

// x_t = v_t − V_t = ρ_t(r_t + γ·V_{t+1} − V_t) + γ·c_t·x_{t+1}, A_t = ρ_t(r_t + γ(V_{t+1} + x_{t+1}) − V_t).
struct Vtrace {
  static constexpr bool reverse = true, next_values = true;
  static constexpr int inputs = 4;
  float r[kTokens], v[kTokens], next_value[kTokens], rho[kTokens];

  __device__ __forceinline__ void offset(const Numbers& n, const Loaded<inputs>& t, const float (&next)[kTokens], int i,
                                         float, float& a, float& b) {
    r[i] = t.in[0][i], v[i] = t.in[1][i], next_value[i] = next[i];
    const float ratio = expf(t.in[2][i] - t.in[3][i]);
    rho[i] = ratio > n.rho_max ? n.rho_max : ratio;  // NaN stays
    a = rho[i] * (fmaf(n.gamma, next[i], r[i]) - v[i]);
    b = n.decay * (ratio > n.c_max ? n.c_max : ratio);
  }
  __device__ __forceinline__ float first(const Numbers& n, int i, float, float next) const {
    return rho[i] * (fmaf(n.gamma, next_value[i] + next, r[i]) - v[i]);
  }
  __device__ __forceinline__ float second(const Numbers&, int i, float x, float) const { return v[i] + x; }
};

// V of the token after a part that takes the next step, or what stands behind the last one.
template <class T>
__device__ float value_behind(const ScanTensors& a, const Span& s, const bool* mask_ptr) {
  int t = s.end;
  if (mask_ptr && a.skip && t <= s.last) t = find_live<false>(mask_ptr, a.mask.stride_t, t, s.last + 1);
  if (t < 0 || t > s.last) return a.bootstrap_ptr ? a.bootstrap_ptr[s.b] : 0.0f;
  if (mask_ptr && !mask_ptr[t * a.mask.stride_t]) return 0.0f;
  return to_float(tokens_of<T>(a.inputs[1], s)[t * a.inputs[1].stride_t]);
}

// What a group of warps gives each other in a round; two of it, so that one barrier a round is enough.
struct Exchange {
  float a[kWarps], b[kWarps], value[kWarps];
  bool known[kWarps];
};

// V of the next token that takes a step, for the tokens of a thread; carry: what comes in from the round before.
template <int WARPS>
__device__ __forceinline__ void next_values(const float (&v)[kTokens], unsigned steps, float& carry, Exchange& shared,
                                            float (&next)[kTokens]) {
  const int lane = threadIdx.x % kWarp, member = threadIdx.x / kWarp % WARPS;
  float own = 0;
#pragma unroll
  for (int i = kTokens - 1; i >= 0; --i) own = steps >> i & 1 ? v[i] : own;
  const unsigned known = __ballot_sync(kAllLanes, steps != 0), later = known & ~((2u << lane) - 1);
  const float from_right = __shfl_sync(kAllLanes, own, later ? __ffs(later) - 1 : 0);
  const float of_tile = __shfl_sync(kAllLanes, own, known ? __ffs(known) - 1 : 0);
  float behind = carry;
  if constexpr (WARPS == 1) {
    if (known) carry = of_tile;
  } else {
    if (lane == 0) shared.value[member] = of_tile, shared.known[member] = known != 0;
    __syncthreads();
#pragma unroll
    for (int w = WARPS - 1; w >= 0; --w) {
      if (w == member) behind = carry;
      if (shared.known[w]) carry = shared.value[w];
    }
  }
  float value = later ? from_right : behind;
#pragma unroll
  for (int i = kTokens - 1; i >= 0; --i) {
    next[i] = value;
    value = steps >> i & 1 ? v[i] : value;
  }
}

// One part of a sequence.
//
// Computes: the formula's x_t = a_t + b_t·x_{t+1} (the adjoint: x_{t−1}) and its two results a token
// Grid: (ceil(slots·WARPS/8),), WARPS warps -> part of a sequence
// Traffic: a token's inputs read, 4 or 8 bytes written; inputs once more where a sequence has several parts
// Numerics: fp32; four tokens in a thread in order, a tree over a warp's 128, then tiles and parts in order
// Gradient: that of Gae is GaeBackward; none flows through Vtrace
template <class Formula, class T, int WARPS, bool WRITE>
__global__ void __launch_bounds__(kThreads, Formula::next_values ? 2 : 3)
    scan_kernel(const ScanTensors a, int64_t parts, int64_t slots) {
  constexpr bool reverse = Formula::reverse;
  constexpr int inputs = Formula::inputs;
  __shared__ Exchange shared[2];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, member = warp % WARPS;
  const int64_t slot = int64_t(blockIdx.x) * (kWarps / WARPS) + warp / WARPS;
  if (slot >= slots) return;
  Span s = locate(a, slot, parts);
  if (s.part < 0 || (s.part > 0 && s.begin == s.length)) return;
  const Numbers n = read_numbers(a);
  const bool* mask_ptr = a.mask.ptr ? tokens_of<bool>(a.mask, s) : nullptr;
  s.last = s.length - 1;
  // A token that is skipped passes on what comes in, so that only these two need know where the live ones end.
  if (mask_ptr && (!a.skip || a.scores_ptr)) s.last = find_live<true>(mask_ptr, a.mask.stride_t, 0, s.length);
  const T* input_ptr[inputs];
#pragma unroll
  for (int k = 0; k < inputs; ++k) input_ptr[k] = a.inputs[k].ptr ? tokens_of<T>(a.inputs[k], s) : nullptr;
  const float score = a.scores_ptr ? a.scores_ptr[s.b] : 0.0f;

  float carry = 0, product = 1, behind = 0;
  if (Formula::next_values) {
    behind = value_behind<T>(a, s, mask_ptr);
  } else if (WRITE && a.bootstrap_ptr) {
    carry = n.gamma * a.bootstrap_ptr[s.b];
  }
  if (WRITE && a.partial_ptr && s.length > kPart) {
    const float* pair_ptr = a.partial_ptr + s.first_slot * 2;
    const int last_part = (s.length - 1) / kPart, between = reverse ? last_part - int(s.part) : int(s.part);
#pragma unroll 8
    for (int j = 0; j < between; ++j) {
      const int q = reverse ? last_part - j : j;
      carry = fmaf(pair_ptr[2 * q + 1], carry, pair_ptr[2 * q]);
    }
  }

  const int rounds = (s.end - s.begin + WARPS * kTile - 1) / (WARPS * kTile);
  const auto first_token = [&](int k) {
    return s.begin + ((reverse ? rounds - 1 - k : k) * WARPS + member) * kTile + lane * kTokens;
  };
  const auto load = [&](int t, Loaded<inputs>& tokens) {
    tokens.live = live_tokens(mask_ptr, a.mask.stride_t, t, s.end);
#pragma unroll
    for (int k = 0; k < inputs; ++k) {
      load_tokens(input_ptr[k], a.inputs[k].stride_t, t, s.end, tokens.live, tokens.in[k]);
    }
  };
  Loaded<inputs> tokens, ahead;
  if (rounds > 0) load(first_token(0), ahead);
  for (int k = 0; k < rounds; ++k) {
    const int t = first_token(k);
    tokens = ahead;
    if (k + 1 < rounds) load(first_token(k + 1), ahead);  // on its way while this round is scanned
    unsigned steps = tokens.live;
    if (!a.skip) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) steps |= (t + i <= s.last && t + i < s.end ? 1u : 0u) << i;
    }
    Exchange& mine = shared[k % 2];
    float next[kTokens] = {};
    if constexpr (Formula::next_values) next_values<WARPS>(tokens.in[1], steps, behind, mine, next);

    Formula formula;
    float offset[kTokens], factor[kTokens];
    float A = 0, B = 1;  // x -> A + B·x over the tokens of this thread, then of the lanes beyond it
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const int i = reverse ? kTokens - 1 - j : j;
      const bool scored = a.scores_ptr && t + i == s.last;
      formula.offset(n, tokens, next, i, scored ? score : 0.0f, offset[i], factor[i]);
      if (!(steps >> i & 1)) offset[i] = 0, factor[i] = 1;
      A = fmaf(factor[i], A, offset[i]), B *= factor[i];
    }
    const int beyond = reverse ? kWarp - 1 - lane : lane;  // lanes that the scan has met before this one
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const float other_A = from_lane<reverse>(A, distance), other_B = from_lane<reverse>(B, distance);
      if (beyond >= distance) A = fmaf(B, other_A, A), B *= other_B;
    }
    const float tile_A = __shfl_sync(kAllLanes, A, reverse ? 0 : kWarp - 1);
    const float tile_B = __shfl_sync(kAllLanes, B, reverse ? 0 : kWarp - 1);
    float x = carry;
    if constexpr (WARPS == 1) {
      carry = fmaf(tile_B, carry, tile_A), product *= tile_B;
    } else {
      if (lane == 0) mine.a[member] = tile_A, mine.b[member] = tile_B;
      __syncthreads();
#pragma unroll
      for (int j = 0; j < WARPS; ++j) {
        const int w = reverse ? WARPS - 1 - j : j;
        if (w == member) x = carry;
        carry = fmaf(mine.b[w], carry, mine.a[w]), product *= mine.b[w];
      }
    }
    if constexpr (WRITE) {
      const float lane_A = from_lane<reverse>(A, 1), lane_B = from_lane<reverse>(B, 1);
      if (beyond > 0) x = fmaf(lane_B, x, lane_A);
      float first[kTokens], second[kTokens];
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const int i = reverse ? kTokens - 1 - j : j;
        const float incoming = x;
        x = fmaf(factor[i], x, offset[i]);
        first[i] = formula.first(n, i, x, incoming), second[i] = formula.second(n, i, x, incoming);
      }
      const int64_t place = s.row * a.T + s.start;
      if (a.out_ptr[0]) store_tokens(a.out_ptr[0] + place, t, s.end, tokens.live, first);
      if (a.out_ptr[1]) store_tokens(a.out_ptr[1] + place, t, s.end, tokens.live, second);
    }
  }
  if (member == 0 && lane == 0) {
    if (!WRITE) {
      a.partial_ptr[2 * slot] = carry, a.partial_ptr[2 * slot + 1] = product;
    } else if (a.x_out_ptr && s.end == s.length) {
      a.x_out_ptr[s.b] = n.gamma * carry;
    }
  }
}

template <class Formula, class T, int WARPS>
void launch_parts(const ScanTensors& a, int64_t parts, int64_t slots, bool several, cudaStream_t stream) {
  const unsigned grid = unsigned((slots * WARPS + kWarps - 1) / kWarps);
  if (several) scan_kernel<Formula, T, WARPS, false><<<grid, kThreads, 0, stream>>>(a, parts, slots);
  scan_kernel<Formula, T, WARPS, true><<<grid, kThreads, 0, stream>>>(a, parts, slots);
}

template <class Formula, class T>
cudaError_t launch_scan(const ScanTensors& a, cudaStream_t stream) {
  const bool packed = a.offsets_ptr != nullptr;
  const int64_t slots = scan_slots(a.B, a.T, packed);
  if (a.B == 0) return cudaSuccess;
  const int64_t parts = packed ? 1 : slots / a.B, mean = packed ? a.T / a.B : a.T;
  if (mean <= kShortRow) {
    launch_parts<Formula, T, 1>(a, parts, slots, a.T > kPart, stream);
  } else {
    launch_parts<Formula, T, kWarps>(a, parts, slots, a.T > kPart, stream);
  }
  return cudaGetLastError();
}

template <class Formula>
cudaError_t launch_dtype(const ScanTensors& a, cudaStream_t stream) {
  switch (a.dtype) {
    case Dtype::fp32:
      return launch_scan<Formula, float>(a, stream);
    case Dtype::bf16:
      return launch_scan<Formula, __nv_bfloat16>(a, stream);
    case Dtype::fp16:
      return launch_scan<Formula, __half>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int64_t scan_slots(int64_t B, int64_t T, bool packed) {
  if (packed) return T / kPart + B;
  return B * (T > kPart ? (T + kPart - 1) / kPart : 1);
}

int64_t scan_partials(int64_t B, int64_t T, bool packed) { return T > kPart ? 2 * scan_slots(B, T, packed) : 0; }

cudaError_t gae_fwd_scan(const ScanTensors& a, cudaStream_t stream) { return launch_dtype<Gae>(a, stream); }

cudaError_t gae_bwd_scan(const ScanTensors& a, cudaStream_t stream) {
  return launch_scan<GaeBackward, float>(a, stream);
}

cudaError_t vtrace_scan(const ScanTensors& a, cudaStream_t stream) { return launch_dtype<Vtrace>(a, stream); }

}  // namespace rl4llm
