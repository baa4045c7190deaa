// The built-in token formulas, for one instruction set.
#include "cpu/token_loss_vec.h"

namespace rl4llm {
namespace RL4LLM_ISA {

#define RL4LLM_POLICY(formula) policy<Maths<S>, formulas::formula>,
#define RL4LLM_KL(formula) kl<Maths<S>, formulas::formula>,

template <class S>
static constexpr TokenLossFunctions<S> functions = {
    {RL4LLM_POLICY_FORMULAS(RL4LLM_POLICY)}, {RL4LLM_KL_FORMULAS(RL4LLM_KL)}, scale<Maths<S>>};

extern const TokenLossKernels token_loss_kernels = {functions<float>, functions<double>};

}  // namespace RL4LLM_ISA
}  // namespace rl4llm
