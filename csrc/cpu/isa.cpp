#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rl4llm {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
std::atomic<int> forced{-1};

bool runs(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
  }
#endif
  return isa == Isa::baseline;
}

Isa best() { return runs(Isa::avx512) ? Isa::avx512 : runs(Isa::avx2) ? Isa::avx2 : Isa::baseline; }

Isa by_name(const std::string& name, const std::string& argument) {
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    if (!runs(Isa(i))) {
      throw std::invalid_argument(argument + ": this CPU does not run " + name + "; the best it runs is " +
                                  isa_name(best()));
    }
    return Isa(i);
  }
  throw std::invalid_argument(argument + ": wanted avx512, avx2 or baseline, got '" + name + "'");
}

Isa from_environment() {
  const char* name = std::getenv("RL4LLM_FAST_CPU_ISA");
  return name && *name ? by_name(name, "RL4LLM_FAST_CPU_ISA") : best();
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

void force_isa(const char* name) { forced = name ? int(by_name(name, "name")) : -1; }

Isa chosen_isa() {
  const int isa = forced.load(std::memory_order_relaxed);
  if (isa >= 0) return Isa(isa);
  static const Isa chosen = from_environment();  // a throw leaves it unset: the next call says it again
  return chosen;
}

}  // namespace rl4llm
