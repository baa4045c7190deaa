// C entry points for plugin.py, appended to the translated token_logprobs.cu. They pass what csrc/cuda/bind.cpp passes.
extern "C" {

int64_t emulated_parts(int64_t V) { return rl4llm::token_logprobs_parts(V); }

int emulated_fwd(const rl4llm::TokenLogprobsRows* rows, const rl4llm::TokenLogprobsResults* results) {
  return rl4llm::token_logprobs_fwd(*rows, *results, nullptr);
}

int emulated_bwd(const rl4llm::TokenLogprobsRows* rows, const rl4llm::TokenLogprobsGrads* grads) {
  return rl4llm::token_logprobs_bwd(*rows, *grads, nullptr);
}

}  // extern "C"
