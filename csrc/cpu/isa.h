// CPU kernels compiled once per instruction set, and the choice among them at run time.
//
// How to write one (see token_logprobs.isa.cpp):
// - name.h declares a struct of plain function pointers and says RL4LLM_PER_ISA(Struct, name);
// - name.isa.cpp (setup.py compiles it once per instruction set) includes vec.h, puts everything into
//   `namespace rl4llm { namespace RL4LLM_ISA { ... } }` and defines `extern const Struct name = {...};` there;
// - the op calls rl4llm::name().function(...).
// A *.isa.cpp uses no standard-library templates, and no inline function with external linkage outside namespace
// RL4LLM_ISA: the linker keeps one copy of such a function, perhaps the AVX-512 one, and an older CPU faults in it.
#pragma once

namespace rl4llm {

enum class Isa { baseline, avx2, avx512 };

// RL4LLM_FAST_CPU_ISA (read once), or the best that this CPU runs. Throws std::invalid_argument where the variable
// names what is not built or what this CPU cannot run.
Isa chosen_isa();
const char* isa_name(Isa isa);

// For tests: overrides the choice; nullptr returns to it.
void force_isa(const char* name);

}  // namespace rl4llm

#if defined(__x86_64__)
#define RL4LLM_PER_ISA(Struct, name)   \
  namespace rl4llm {                   \
  namespace baseline {                 \
  extern const Struct name;            \
  }                                    \
  namespace avx2 {                     \
  extern const Struct name;            \
  }                                    \
  namespace avx512 {                   \
  extern const Struct name;            \
  }                                    \
  static inline const Struct& name() { \
    switch (chosen_isa()) {            \
      case Isa::avx512:                \
        return avx512::name;           \
      case Isa::avx2:                  \
        return avx2::name;             \
      default:                         \
        return baseline::name;         \
    }                                  \
  }                                    \
  }
#else
#define RL4LLM_PER_ISA(Struct, name)                            \
  namespace rl4llm {                                            \
  namespace baseline {                                          \
  extern const Struct name;                                     \
  }                                                             \
  static inline const Struct& name() { return baseline::name; } \
  }
#endif
