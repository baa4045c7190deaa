#include "cpu/offsets.h"

#include "cpu/tensor_args.h"

namespace rl4llm {

void check_offsets(const int64_t* offsets_ptr, int64_t count, int64_t tokens) {
  if (count < 1) fail("cu_seqlens: wanted (B+1,), got (0,)");
  if (offsets_ptr[0] != 0 || offsets_ptr[count - 1] != tokens) {
    fail("cu_seqlens: wanted offsets from 0 to the ", tokens, " tokens, got ", offsets_ptr[0], " to ",
         offsets_ptr[count - 1]);
  }
  for (int64_t i = 1; i < count; ++i) {
    if (offsets_ptr[i] < offsets_ptr[i - 1]) {
      fail("cu_seqlens: wanted offsets that never decrease, got ", offsets_ptr[i - 1], ", ", offsets_ptr[i],
           " at position ", i - 1);
    }
  }
}

}  // namespace rl4llm
