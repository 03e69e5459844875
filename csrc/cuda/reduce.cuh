// The block reduction.
#pragma once

#include <cstring>

#include "launch.cuh"

namespace pyvizllm {

// Any trivially copyable value from the lane whose number differs in the bits of `mask`.
template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int mask) {
  using Word = std::conditional_t<sizeof(T) % 8 == 0, long long, int>;
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(Word) == 0);
  constexpr int kWords = sizeof(T) / sizeof(Word);
  Word words[kWords];
  std::memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kWholeWarp, words[i], mask);
  T result;
  std::memcpy(&result, words, sizeof(T));
  return result;
}

// Combines the values of all kThreads threads of the block.
// - `combine` is called as combine(a, b) and returns T. Every thread's value takes part, so no
//   neutral element is needed; a thread that has nothing passes what is neutral to its operator.
// - Every thread gets the result, the same bits in each and from run to run: the order is fixed.
//   combine must be commutative (as IEEE + is), since lanes see their pairs from both sides.
// - Must be reached by the whole block. May be called again at once: by the second barrier no
//   fast warp of the next call overwrites what a slow one still reads.
// - Costs two barriers, 8 exchanges of T, and 8 T of shared memory for each T and combine.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, const Combine& combine) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ T of_warp[kWarps];
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    value = combine(value, shuffle_xor(value, mask));
  }
  const int lane = int(threadIdx.x) % kWarpSize;
  if (lane == 0) of_warp[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = of_warp[lane % kWarps];
  __syncthreads();
#pragma unroll
  for (int mask = kWarps / 2; mask > 0; mask /= 2) {
    value = combine(value, shuffle_xor(value, mask));
  }
  return value;
}

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

}  // namespace pyvizllm
