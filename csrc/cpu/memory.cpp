// Memory of large results on the CPU.
//
// The first touch of fresh memory costs more than the kernels that write it (page faults, and the system's zeroing):
// 17 of 23 ms for a gradient of 512 × 49,152 fp32, 50 of 110 µs for a preference loss on 128k tokens. So results of
// kLeast bytes or more live in blocks that are kept when their tensor dies and handed to the next one, as GPU
// allocators do. Large ones lie in 2 MiB pages and are offered back to the system while they wait (MADV_FREE): they
// cost others nothing, and where nobody wanted them, nothing to use again.
//
// RL4LLM_FAST_CPU_CACHE_MIB bounds what waits (512 if unset, 0 for none); larger blocks are never kept.
#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#include "cpu/tensor_args.h"

// In torch from 2.11 on; the extension also loads in 2.10, where results come from torch's own allocator.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr, int64_t storage_offset,
                int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout,
                const uint8_t* opaque_metadata, int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx),
                void* deleter_ctx);

namespace rl4llm {
namespace {

constexpr size_t kLeast = 64 << 10;  // below it malloc keeps its memory by itself
constexpr size_t kPage = 2 << 20;

struct Block {
  void* ptr;
  size_t bytes;  // a multiple of kPage, or of kLeast below one
  bool large() const { return bytes >= kPage; }
};

void advise(const Block& block, int advice) { madvise(block.ptr, block.bytes, advice); }

Block new_block(size_t bytes) {
  if (bytes < kPage) return {std::aligned_alloc(4096, bytes), bytes};
  char* ptr =
      static_cast<char*>(mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (ptr == MAP_FAILED) return {nullptr, 0};
  const size_t before = (kPage - reinterpret_cast<uintptr_t>(ptr) % kPage) % kPage;
  if (before) munmap(ptr, before);
  if (before < kPage) munmap(ptr + before + bytes, kPage - before);
  const Block block = {ptr + before, bytes};
  advise(block, MADV_HUGEPAGE);
  return block;
}

void free_block(const Block& block) { block.large() ? void(munmap(block.ptr, block.bytes)) : std::free(block.ptr); }

class Cache {
 public:
  static Cache& instance() {
    static Cache* cache = new Cache;  // never destroyed: tensors may die after static objects do
    return *cache;
  }

  bool usable() const { return torch_from_blob != nullptr && limit_ > 0; }

  // A waiting block that is not much too large, or a new one.
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = waiting_.end();
      for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
        if (it->bytes < bytes || it->bytes > bytes + bytes / 4) continue;
        if (best == waiting_.end() || it->bytes < best->bytes) best = it;
      }
      if (best != waiting_.end()) {
        const Block block = *best;
        waiting_.erase(best);
        waiting_bytes_ -= block.bytes;
        return block;
      }
    }
    return new_block(bytes);
  }

  void give_back(Block block) {
    std::vector<Block> surplus;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (block.bytes > limit_) {
        surplus.push_back(block);
      } else {
#ifdef MADV_FREE
        if (block.large()) advise(block, MADV_FREE);
#endif
        waiting_.push_back(block);
        waiting_bytes_ += block.bytes;
        while (waiting_bytes_ > limit_) {  // the longest waiting first
          surplus.push_back(waiting_.front());
          waiting_bytes_ -= waiting_.front().bytes;
          waiting_.erase(waiting_.begin());
        }
      }
    }
    for (const Block& old : surplus) free_block(old);
  }

 private:
  Cache() {
    const char* text = std::getenv("RL4LLM_FAST_CPU_CACHE_MIB");
    limit_ = size_t(text ? std::strtoull(text, nullptr, 10) : 512) << 20;
  }

  size_t limit_, waiting_bytes_ = 0;
  std::vector<Block> waiting_;  // in the order in which they came back
  std::mutex mutex_;
};

void release(void* ptr, void* bytes) { Cache::instance().give_back({ptr, reinterpret_cast<size_t>(bytes)}); }

}  // namespace

Tensor empty_like_of(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  if (!like.is_cpu()) return torch::stable::new_empty(like, sizes, type);
  const int64_t dims = int64_t(sizes.size());
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1;
  for (size_t d = sizes.size(); d-- > 0; elements *= sizes[d]) strides[d] = elements;
  const size_t bytes = size_t(elements) * (type == ScalarType::Double || type == ScalarType::Long     ? 8
                                           : type == ScalarType::BFloat16 || type == ScalarType::Half ? 2
                                                                                                      : 4);
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  Cache& cache = Cache::instance();
  if (bytes >= kLeast && cache.usable()) {
    const size_t unit = bytes < kPage ? kLeast : kPage;
    const Block block = cache.take((bytes + unit - 1) / unit * unit);
    if (block.ptr) {
      if (!torch_from_blob(block.ptr, dims, sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1,
                           &handle, aoti_torch_layout_strided(), nullptr, 0, &release,
                           reinterpret_cast<void*>(block.bytes))) {
        return Tensor(handle);
      }
      release(block.ptr, reinterpret_cast<void*>(block.bytes));
    }
  }
  // Not new_empty: from a cold cache the dispatcher takes twice as long to get there. Out of memory: torch says so.
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), -1, &handle));
  return Tensor(handle);
}

namespace {

Tensor kept_empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return empty_like_of(like, torch::headeronly::IntHeaderOnlyArrayRef(shape), dtype);
}

}  // namespace
}  // namespace rl4llm

STABLE_TORCH_LIBRARY_IMPL(rl4llm_fast, CPU, m) { m.impl("kept_empty", TORCH_BOX(&rl4llm::kept_empty)); }
