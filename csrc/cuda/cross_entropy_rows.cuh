// Which rows a group works on, and what its threads do with the vectors of one.
#pragma once

#undef NDEBUG  // the check of the targets is an assertion, as in torch
#include <cassert>

#include "../kernels.h"
#include "cross_entropy_launch.cuh"
#include "row_sums.cuh"

namespace pyvizllm {

__device__ __forceinline__ int64_t target_at(const CrossEntropyArguments& a, int64_t row) {
  return a.target_is_int64 ? static_cast<const int64_t*>(a.target)[row]
                           : static_cast<const int32_t*>(a.target)[row];
}

// The rows of one group: number `first`, and every `step`-th after it. While one is worked on, the
// next row's target is known, so that the row can be copied ahead or left out, and that of the row
// after it is on its way.
template <class T>
class RowWalk {
 public:
  // Works on part `rank`, of `vectors` vectors, of each row.
  __device__ __forceinline__ RowWalk(const CrossEntropyArguments& a, int64_t first, int step,
                                     int rank, int vectors)
      : a_(a), row_(first), step_(step), rank_(rank), vectors_(vectors) {
    target_ = target_of(first);
    next_target_ = target_of(first + step);
    after_target_ = target_of(first + 2 * int64_t(step));
  }

  __device__ __forceinline__ bool has_row() const { return row_ < a_.rows; }
  __device__ __forceinline__ bool has_next() const { return row_ + step_ < a_.rows; }
  __device__ __forceinline__ bool counts() const { return target_ != a_.ignore_index; }
  __device__ __forceinline__ int64_t row() const { return row_; }
  __device__ __forceinline__ int64_t next_row() const { return row_ + step_; }
  __device__ __forceinline__ int64_t target() const { return target_; }
  // What is to be loaded of a row: nothing where it does not count.
  __device__ __forceinline__ RowPart<T> part() const {
    return counts() ? part_of(row_) : no_part<T>();
  }
  __device__ __forceinline__ RowPart<T> next_part() const {
    return next_target_ != a_.ignore_index ? part_of(next_row()) : no_part<T>();
  }
  __device__ __forceinline__ RowPart<T> part_of(int64_t row) const {
    return part_of_row(logits_of(row), a_.classes, rank_, vectors_);
  }
  __device__ __forceinline__ const T* logits_of(int64_t row) const {
    return static_cast<const T*>(a_.logits) + row * a_.row_stride;
  }
  __device__ __forceinline__ AccumulateType<T> logit_of_target() const {
    const int64_t target = target_;
    assert(target >= 0 && target < a_.classes);
    return widen(logits_of(row_)[target]);
  }
  __device__ __forceinline__ void advance() {
    row_ += step_;
    target_ = next_target_;
    next_target_ = after_target_;
    after_target_ = target_of(row_ + 2 * int64_t(step_));
  }

 private:
  __device__ __forceinline__ int64_t target_of(int64_t row) const {
    return row < a_.rows ? target_at(a_, row) : a_.ignore_index;
  }

  const CrossEntropyArguments& a_;
  int64_t row_;
  int step_, rank_, vectors_;
  int64_t target_, next_target_, after_target_;
};

// The tokens that count, from the counts of blocks; 1 where the reduction does not divide by them.
__device__ __forceinline__ double divisor_of(const unsigned long long* counts) {  // or null
  if (counts == nullptr) return 1;
  unsigned long long count = 0;
  for (int i = int(threadIdx.x) % kWarpSize; i < kCountBlocks; i += kWarpSize) count += counts[i];
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) count += shuffle_xor(count, mask);
  return double(count);
}

// Adds a part to sums; `target` is the row's.
template <bool kExtras, class Reader, class T>
__device__ __forceinline__ RowSums<T> sums_of(Reader&& read, const RowPart<T>& part, const T* row,
                                              int span, int64_t target) {
  // Of another part, the target is before or behind all vectors.
  constexpr int kLanes = RowPart<T>::kLanes;
  const int64_t place = target - (part.base - row);
  const int vector =
      place < 0 ? -1 : (place / kLanes < part.vectors ? int(place / kLanes) : part.vectors);
  const int lane = int(place % kLanes);
  RowSums<T> sums = RowSums<T>::empty();
  read(kMinusInfinity<AccumulateType<T>>, [&](const auto& tile, int index) {
    sums.template add<kExtras>(tile, index, span, vector, lane);
  });
  return sums;
}

// The gradient of the vectors of a tile, but for the target's.
template <class T, class Tile>
__device__ __forceinline__ void store_gradient(const RowGradient<T>& g, const Tile& tile,
                                               T* gradient, int index, int span) {
  constexpr int kLanes = Vector<T>::kLanes;
#pragma unroll kUnrolledVectors
  for (int v = 0; v < Tile::kVectors; ++v) {
    store_lanes(gradient + int64_t(index + v * span) * kLanes, tile.valid, g.of(tile[v]));
  }
}

template <class T, class Group>
__device__ __forceinline__ void store_zeros(const RowPart<T>& part, const T* logits, T* gradient) {
  T* const to = part.counterpart(gradient, logits);
  for (int index = Group::thread(); index < part.vectors; index += Group::kSize) {
    store_lanes(to + int64_t(index) * RowPart<T>::kLanes, part.valid(index), Vector<T>{});
  }
}

}  // namespace pyvizllm
