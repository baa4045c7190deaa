// Just enough CUDA to run this library's kernels on a CPU, for tests: a fibre for each thread of a block, blocks one
// after the other, a switch to the next fibre where CUDA has a barrier. Slow, and it says nothing about speed; it
// executes every index, vector load, tail and reduction of the very source that nvcc compiles.
#pragma once

#undef _FORTIFY_SOURCE  // it takes a jump to another fibre's stack for an attack

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
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
inline Index thread_index, block_index, block_size, grid_size;  // of the fibre that runs

struct Fibre {
  ucontext_t entry;  // how it starts
  jmp_buf resume;    // where it goes on: unlike swapcontext, a jump makes no system call
  std::unique_ptr<char[]> stack;
  bool started, done;
};
inline std::vector<Fibre> fibres;
inline jmp_buf scheduler;
inline const std::function<void()>* running;

inline void yield() {
  if (_setjmp(fibres[thread_index.x].resume) == 0) _longjmp(scheduler, 1);
}

struct Barrier {
  unsigned wanted, arrived = 0, generation = 0;
  void arrive_and_wait() {
    const unsigned own = generation;
    if (++arrived == wanted) {
      arrived = 0, ++generation;
      return;
    }
    while (generation == own) yield();
  }
};

struct Warp {
  Barrier barrier{kLanes};
  double values[kLanes];  // holds every float and every int as it is
};
inline std::vector<Warp> warps;
inline Barrier block_barrier;

// What every lane of the warp gave, seen by all of them.
template <class Use>
auto exchange(double value, const Use& use) {
  Warp& warp = warps[thread_index.x / kLanes];
  warp.values[thread_index.x % kLanes] = value;
  warp.barrier.arrive_and_wait();
  const auto result = use(warp.values);
  warp.barrier.arrive_and_wait();
  return result;
}

template <class T>
T shuffle_xor(T value, int offset) {
  return T(exchange(value, [&](const double* values) { return values[thread_index.x % kLanes ^ unsigned(offset)]; }));
}

template <class T>
T shuffle(T value, int lane) {
  return T(exchange(value, [&](const double* values) { return values[lane]; }));
}

// Beyond the warp's end CUDA gives a lane its own value; NaN here, so that using it shows.
template <class T>
T shuffle_by(T value, int offset) {
  const int lane = int(thread_index.x % kLanes) + offset;
  return T(exchange(value, [&](const double* values) { return lane >= 0 && lane < kLanes ? values[lane] : NAN; }));
}

inline unsigned ballot(bool predicate) {
  return exchange(predicate ? 1.0 : 0.0, [](const double* values) {
    unsigned bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= (values[lane] != 0.0 ? 1u : 0u) << lane;
    return bits;
  });
}

inline bool any(bool predicate) {
  return exchange(predicate ? 1.0 : 0.0, [](const double* values) {
    bool found = false;
    for (int lane = 0; lane < kLanes; ++lane) found = found || values[lane] != 0.0;
    return found;
  });
}

inline void run_fibre() {
  (*running)();
  fibres[thread_index.x].done = true;
  _longjmp(scheduler, 1);
}

// Runs a fibre until it yields or ends.
inline void resume(unsigned t) {
  thread_index.x = t;
  if (_setjmp(scheduler) != 0) return;
  if (fibres[t].started) _longjmp(fibres[t].resume, 1);
  fibres[t].started = true;
  setcontext(&fibres[t].entry);
}

inline int64_t launches = 0;  // since the library was loaded

inline void launch(unsigned grid, unsigned threads, const std::function<void()>& kernel) {
  ++launches;
  constexpr size_t kStack = 1 << 16;
  block_size.x = threads, grid_size.x = grid, running = &kernel;
  if (fibres.size() < threads) fibres.resize(threads);
  for (block_index.x = 0; block_index.x < grid; ++block_index.x) {
    block_barrier = {threads};
    warps.assign(threads / kLanes, Warp());
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& fibre = fibres[t];
      if (!fibre.stack) fibre.stack.reset(new char[kStack]);
      getcontext(&fibre.entry);
      fibre.entry.uc_stack.ss_sp = fibre.stack.get();
      fibre.entry.uc_stack.ss_size = kStack;
      makecontext(&fibre.entry, run_fibre, 0);
      fibre.started = fibre.done = false;
    }
    for (unsigned left = threads; left > 0;) {
      for (unsigned t = 0; t < threads; ++t) {
        if (fibres[t].done) continue;
        resume(t);
        left -= fibres[t].done;
      }
    }
  }
}

inline uint32_t funnel_shift_right(uint32_t low, uint32_t high, unsigned shift) {
  return uint32_t(((uint64_t(high) << 32) | low) >> (shift & 31));
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define __syncthreads() emulator::block_barrier.arrive_and_wait()
#define __shfl_xor_sync(mask, value, offset) emulator::shuffle_xor(value, offset)
#define __shfl_sync(mask, value, lane) emulator::shuffle(value, lane)
#define __shfl_up_sync(mask, value, offset) emulator::shuffle_by(value, -(offset))
#define __shfl_down_sync(mask, value, offset) emulator::shuffle_by(value, offset)
#define __ballot_sync(mask, predicate) emulator::ballot(predicate)
#define __ffs __builtin_ffs
#define __clz __builtin_clz
#define __popc __builtin_popcount
#define __any_sync(mask, predicate) emulator::any(predicate)
#define __ldcs(ptr) (*(ptr))
#define __stcs(ptr, value) (*(ptr) = (value))
#define __float_as_int std::bit_cast<int, float>
#define __int_as_float std::bit_cast<float, int>
#define __funnelshift_r emulator::funnel_shift_right
#define cudaGetLastError() cudaSuccess
