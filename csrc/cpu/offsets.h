// Where packed sequences start: cu_seqlens (B+1,), from 0 to the number of tokens. No torch headers.
#pragma once

#include <cstdint>

namespace rl4llm {

// Throws std::invalid_argument (ValueError in Python) unless `count` offsets start at 0, never decrease and end at
// `tokens`.
void check_offsets(const int64_t* offsets_ptr, int64_t count, int64_t tokens);

}  // namespace rl4llm
