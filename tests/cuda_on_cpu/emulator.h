// Just enough CUDA to run this library's kernels on a CPU, for tests: one std::thread for each thread of a block,
// blocks one after the other, barriers where CUDA has them. Slow, and it says nothing about speed; it executes every
// index, vector load, tail and reduction of the very source that nvcc compiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

namespace emulator {

constexpr int kLanes = 32;
struct Index {
  unsigned x;
};
inline thread_local Index thread_index, block_index;
inline Index block_size, grid_size;

struct Warp {
  std::barrier<> barrier{kLanes};
  float values[kLanes];
};
inline std::vector<std::unique_ptr<Warp>> warps;
inline std::unique_ptr<std::barrier<>> block_barrier;

// What every lane of the warp gave, seen by all of them.
template <class Use>
auto exchange(float value, const Use& use) {
  Warp& warp = *warps[thread_index.x / kLanes];
  warp.values[thread_index.x % kLanes] = value;
  warp.barrier.arrive_and_wait();
  const auto result = use(warp.values);
  warp.barrier.arrive_and_wait();
  return result;
}

inline float shuffle_xor(float value, int offset) {
  return exchange(value, [&](const float* values) { return values[thread_index.x % kLanes ^ unsigned(offset)]; });
}

inline bool any(bool predicate) {
  return exchange(predicate ? 1.0f : 0.0f, [](const float* values) {
    bool found = false;
    for (int lane = 0; lane < kLanes; ++lane) found = found || values[lane] != 0.0f;
    return found;
  });
}

inline void launch(unsigned grid, unsigned threads, const std::function<void()>& kernel) {
  block_size.x = threads, grid_size.x = grid;
  block_barrier = std::make_unique<std::barrier<>>(threads);
  warps.clear();
  for (unsigned i = 0; i < threads / kLanes; ++i) warps.push_back(std::make_unique<Warp>());
  std::barrier<> end_of_block(threads);
  std::vector<std::thread> pool;
  for (unsigned t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      thread_index.x = t;
      for (unsigned block = 0; block < grid; ++block) {
        block_index.x = block;
        kernel();
        end_of_block.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
}

inline uint32_t funnel_shift_right(uint32_t low, uint32_t high, unsigned shift) {
  return uint32_t(((uint64_t(high) << 32) | low) >> (shift & 31));
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define __syncthreads() emulator::block_barrier->arrive_and_wait()
#define __shfl_xor_sync(mask, value, offset) emulator::shuffle_xor(value, offset)
#define __any_sync(mask, predicate) emulator::any(predicate)
#define __ldcs(ptr) (*(ptr))
#define __stcs(ptr, value) (*(ptr) = (value))
#define __funnelshift_r emulator::funnel_shift_right
#define cudaGetLastError() cudaSuccess
