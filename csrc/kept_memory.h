// Memory of the logits' gradients on the CPU, kept from one step to the next.
//
// note: [kept memory]
// A gradient of the logits is large, and the next step's is as large. Of malloc it would get new
// pages from the system each time: a page fault for every 4 KiB, which takes several times as long
// as writing the gradient does. So one block stays when its gradient is gone, for the next one that
// it fits; at most kMostKept bytes in all.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "check.h"

namespace pyvizllm {

constexpr int64_t kLeastKept = int64_t(1) << 20;  // what is smaller malloc keeps by itself
constexpr int64_t kMostKept = int64_t(1) << 29;

class MemoryBlock {
 public:
  explicit MemoryBlock(int64_t bytes)
      : capacity_((bytes + kAlignment - 1) / kAlignment * kAlignment),
        data_(std::aligned_alloc(kAlignment, size_t(capacity_))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  MemoryBlock(const MemoryBlock&) = delete;
  MemoryBlock& operator=(const MemoryBlock&) = delete;
  ~MemoryBlock() { std::free(data_); }

  void* data() const { return data_; }
  // A block of more than twice the size is left from other steps than those to come.
  bool fits(int64_t bytes) const { return bytes <= capacity_ && capacity_ <= 2 * bytes; }

 private:
  static constexpr int64_t kAlignment = 64;  // torch's own

  int64_t capacity_;  // bytes
  void* data_;
};

// The block that waits for the next gradient. No lock: a fork could copy it locked.
inline std::atomic<MemoryBlock*> kept_block{nullptr};

inline void keep(MemoryBlock* block) {
  delete kept_block.exchange(block);
}

inline std::unique_ptr<MemoryBlock> block_of(int64_t bytes) {
  std::unique_ptr<MemoryBlock> block(kept_block.exchange(nullptr));
  if (block != nullptr && block->fits(bytes)) return block;
  block.reset();  // before there is another
  return std::make_unique<MemoryBlock>(bytes);
}

// As new_gradient, for an input on the CPU.
inline Tensor new_cpu_gradient(const Tensor& input) {
  const int64_t bytes = input.numel() * int64_t(input.element_size());
  if (bytes < kLeastKept || bytes > kMostKept) return new_gradient(input);
  const std::vector<int64_t> sizes = gradient_sizes(input);
  std::unique_ptr<MemoryBlock> block = block_of(bytes);
  Tensor gradient =
      torch::stable::from_blob(block->data(), sizes, contiguous_strides(sizes), input.device(),
                               input.scalar_type(), [kept = block.get()](void*) { keep(kept); });
  block.release();
  return gradient;
}

}  // namespace pyvizllm
