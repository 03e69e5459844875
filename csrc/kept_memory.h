// Memory of the logits' gradients on the CPU, kept from one step to the next.
//
// note: [kept memory]
// A gradient of the logits is large, and the next step's is as large. Of malloc it would get new
// pages from the system each time: a page fault for every 4 KiB, which takes several times as long
// as writing the gradient does. So one block stays when its gradient is gone, for the next one that
// it fits.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <memory>

#include "check.h"

namespace pyvizllm {

// In bytes. Below, glibc's malloc learns to keep what is freed, and does it better for several
// threads; above, nobody should wonder where so much memory is.
constexpr int64_t kLeastKept = int64_t(1) << 25;
constexpr int64_t kMostKept = int64_t(1) << 29;

class MemoryBlock {
 public:
  // Without data where there is no memory.
  explicit MemoryBlock(int64_t bytes)
      : capacity_((bytes + kAlignment - 1) / kAlignment * kAlignment),
        data_(std::aligned_alloc(kAlignment, size_t(capacity_))) {}
  MemoryBlock(const MemoryBlock&) = delete;
  MemoryBlock& operator=(const MemoryBlock&) = delete;
  ~MemoryBlock() { std::free(data_); }

  void* data() const { return data_; }
  int64_t capacity() const { return capacity_; }

  // Whether a gradient gets it. One of less than half the size does not: where steps have two
  // losses, the larger one's block waits for that.
  bool take_for(int64_t bytes) {
    const bool fits = bytes >= kLeastKept && bytes <= capacity_ && capacity_ <= 2 * bytes;
    passed_over_ = fits ? 0 : passed_over_ + 1;
    return fits;
  }
  // Too small, or left from larger gradients than there are now.
  bool is_obsolete_for(int64_t bytes) const {
    return capacity_ < bytes || passed_over_ >= kMostPassedOver;
  }

 private:
  static constexpr int64_t kAlignment = 64;  // torch's own
  static constexpr int kMostPassedOver = 64;

  int64_t capacity_;  // bytes
  void* data_;
  int passed_over_ = 0;  // by so many gradients since it was in use
};

// The block that waits for the next gradient. No lock: a fork could copy it locked.
inline std::atomic<MemoryBlock*> kept_block{nullptr};

inline void drop_kept_block() {
  delete kept_block.exchange(nullptr);
}

// As long as a forked child lived, the parent's next gradient would be written into copies of the
// block's pages; and the child has no use for it.
[[maybe_unused]] inline const int at_forks = pthread_atfork(drop_kept_block, nullptr, nullptr);

// Of two blocks the larger one stays.
inline void keep(MemoryBlock* block) {
  const int64_t capacity = block->capacity();  // once it is there, it is anybody's
  MemoryBlock* other = kept_block.exchange(block);
  if (other != nullptr && other->capacity() > capacity) other = kept_block.exchange(other);
  delete other;
}

// The kept block, if it fits. Called for each gradient, whatever its size, or a block would stay
// when all that come have become small.
inline std::unique_ptr<MemoryBlock> take_kept_block(int64_t bytes) {
  std::unique_ptr<MemoryBlock> block(kept_block.exchange(nullptr));
  if (block == nullptr || block->take_for(bytes)) return block;
  if (!block->is_obsolete_for(bytes)) keep(block.release());
  return nullptr;
}

// As new_gradient, for an input on the CPU.
inline Tensor new_cpu_gradient(const Tensor& input) {
  const int64_t bytes = input.numel() * int64_t(input.element_size());
  std::unique_ptr<MemoryBlock> block = take_kept_block(bytes);
  if (bytes < kLeastKept || bytes > kMostKept) return new_gradient(input);
  if (block == nullptr) block = std::make_unique<MemoryBlock>(bytes);
  if (block->data() == nullptr) {
    drop_kept_block();
    block = std::make_unique<MemoryBlock>(bytes);
  }
  if (block->data() == nullptr) return new_gradient(input);  // whose error says how much it was
  const std::vector<int64_t> sizes = gradient_sizes(input);
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  MemoryBlock* const taken = block.release();  // the tensor's, also where from_blob raises
  return torch::stable::from_blob(taken->data(), sizes, strides, input.device(),
                                  input.scalar_type(), [taken](void*) { keep(taken); });
}

}  // namespace pyvizllm
