// Which rows a group works on, and what its threads do with the vectors of one, with options and
// without.
#pragma once

#undef NDEBUG  // the check of the targets is an assertion, as in torch
#include <cassert>

#include "../kernels.h"
#include "cross_entropy_launch.cuh"
#include "row_option_results.cuh"

namespace pyvizllm {

__device__ __forceinline__ int64_t target_at(const CrossEntropyArguments& a, int64_t row) {
  return a.target_is_int64 ? static_cast<const int64_t*>(a.target)[row]
                           : static_cast<const int32_t*>(a.target)[row];
}

// The rows of one group: number `first`, and every `step`-th after it. While one is worked on, the
// next row's target is known, so that the row can be copied ahead or left out, and that of the row
// after it is on its way.
template <class T, Variant kVariant>
class RowWalk {
 public:
  using A = AccumulateType<T>;

  // Works on part `rank`, of `vectors` vectors, of each row.
  __device__ __forceinline__ RowWalk(const CrossEntropyArguments& a, int64_t first, int step,
                                     int rank, int vectors)
      : a_(a), row_(first), step_(step), rank_(rank), vectors_(vectors) {
    target_ = target_of(first);
    next_target_ = target_of(first + step);
    after_target_ = target_of(first + 2 * int64_t(step));
    if constexpr (kAhead) {
      logit_ = logit_at(row_, target_);
      next_logit_ = logit_at(next_row(), next_target_);
    }
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
    return part_of_row(logits_of(row), a_.classes, row * a_.row_stride,
                       (a_.rows - 1 - row) * a_.row_stride, rank_, vectors_);
  }
  __device__ __forceinline__ const T* logits_of(int64_t row) const {
    return static_cast<const T*>(a_.logits) + row * a_.row_stride;
  }
  // Of a target that is another rank's, the row's first logit.
  __device__ __forceinline__ A logit_of_target() const {
    if constexpr (kAhead) return logit_;
    return logit_at(row_, target_);
  }
  __device__ __forceinline__ void advance() {
    row_ += step_;
    target_ = next_target_;
    next_target_ = after_target_;
    after_target_ = target_of(row_ + 2 * int64_t(step_));
    if constexpr (kAhead) {
      logit_ = next_logit_;
      next_logit_ = logit_at(next_row(), next_target_);
    }
  }

 private:
  // The logit of the next row's target is on its way, too: ranks are counted from a row's first
  // tile on. With options there are no registers for it.
  static constexpr bool kAhead = kVariant == Variant::kMetrics;

  __device__ __forceinline__ int64_t target_of(int64_t row) const {
    return row < a_.rows ? target_at(a_, row) : a_.ignore_index;
  }
  __device__ __forceinline__ A logit_at(int64_t row, int64_t target) const {
    if (target == a_.ignore_index) return 0;
    if constexpr (kVariant == Variant::kOptions) {
      const bool here = target >= 0 && target < a_.classes;
      if (a_.total_classes != 0 && !here) return widen(logits_of(row)[0]);
    }
    assert(target >= 0 && target < a_.classes);
    return widen(logits_of(row)[target]);
  }

  const CrossEntropyArguments& a_;
  int64_t row_;
  int step_, rank_, vectors_;
  int64_t target_, next_target_, after_target_;
  A logit_, next_logit_;
};

// What the mean divides by, from what blocks have counted; 1 where the reduction does not divide.
__device__ __forceinline__ double divisor_of(const double* counts) {  // or null
  return counts == nullptr ? 1 : sum_of_blocks(counts);
}

// Where in a part the row's target is.
template <class T>
__device__ __forceinline__ TargetPlace<T> place_of(const RowPart<T>& part, const T* row,
                                                   int64_t target, AccumulateType<T> logit) {
  constexpr int kLanes = RowPart<T>::kLanes;
  const int64_t place = target - (part.base - row);
  const int vector =
      place < 0 ? -1 : (place / kLanes < part.vectors ? int(place / kLanes) : part.vectors);
  return {vector, int(place % kLanes), logit};
}

template <class T, Variant kVariant>
using OptionsOf = std::conditional_t<kVariant == Variant::kOptions, Options<T>, NoOptions<T>>;

template <class T, Variant kVariant>
using ConstantsOf = typename OptionsOf<T, kVariant>::Constants;

// What distances are multiplied by, and the maximum and the sum that the backward gets.
template <class T>
__device__ __forceinline__ AccumulateType<T> factor_of(const NoOptions<T>&) {
  return 1;
}
template <class T>
__device__ __forceinline__ AccumulateType<T> factor_of(const Options<T>& options) {
  return options.transform.factor;
}
template <class T>
__device__ __forceinline__ AccumulateType<T> state_max(const NoOptions<T>&,
                                                       const RowSums<T>& sums) {
  return sums.max;
}
template <class T>
__device__ __forceinline__ AccumulateType<T> state_max(const Options<T>& options,
                                                       const RowSums<T>& sums) {
  return AccumulateType<T>(options.of_sums(sums.max).z);
}
template <class T>
__device__ __forceinline__ double state_sum(const NoOptions<T>&, const RowSums<T>& sums) {
  return sums.exp;
}
template <class T>
__device__ __forceinline__ double state_sum(const Options<T>& options, const RowSums<T>& sums) {
  return options.sum_of_state(sums, state_max(options, sums));
}

// The sums of a part of the row.
template <Variant kVariant, class T, class Read>
__device__ __forceinline__ RowSums<T> sums_of(const NoOptions<T>&, const Read& read,
                                              const RowPart<T>& part, const T* logits, int span,
                                              const ReducedRow<T>& row) {
  const TargetPlace<T> target = place_of(part, logits, row.target, row.logit_of_target);
  RowSums<T> sums = RowSums<T>::empty();
  read(
      [&](const auto& tile, int index) { sums.template add<kVariant>(tile, index, span, target); });
  return sums;
}
template <Variant kVariant, class T, class Read>
__device__ __forceinline__ RowSums<T> sums_of(const Options<T>& options, const Read& read,
                                              const RowPart<T>& part, const T* logits, int span,
                                              const ReducedRow<T>& row) {
  const bool index = !options.has_probabilities();  // then the factor is the class weight
  const auto raw = options.transform.raw(row.logit_of_target);
  const OptionSums<T> adder = {options,
                               ClassFactors<T>(options, part, logits, row.row, options.kept(),
                                               index ? 1 : options.uniform()),
                               place_of(part, logits, row.target, raw), options.reference(raw)};
  RowSums<T> sums = RowSums<T>::empty();
  read([&](const auto& tile, int index) { adder.add(sums, tile, index, span); });
  return sums;
}

// What computes a part's gradient, but for the target's.
template <class T>
__device__ __forceinline__ RowGradient<T> gradient_of(const CrossEntropyArguments& a,
                                                      const NoOptions<T>&, const RowPart<T>&,
                                                      const T*, int64_t, int64_t, double upstream,
                                                      AccumulateType<T> max, double sum_exp) {
  return RowGradient<T>(max, upstream * (1 + z_factor_of(a, double(max), sum_exp)) / sum_exp,
                        upstream * a.label_smoothing / double(a.classes));
}
template <class T>
__device__ __forceinline__ OptionGradient<T> gradient_of(
    const CrossEntropyArguments&, const Options<T>& options, const RowPart<T>& part,
    const T* logits, int64_t row, int64_t target, double upstream,
    const Maximum<AccumulateType<T>>& maximum, double sum_exp) {
  const auto of_row = options.target(row, target);
  const double scale = of_row.total + options.z_factor(of_row, maximum.z, sum_exp);
  return {options.transform,
          ClassFactors<T>(options, part, logits, row, upstream * options.kept(),
                          upstream * options.uniform()),
          maximum, RowGradient<T>(0, upstream * scale / sum_exp, 0)};
}

// The gradient of the vectors of a tile, but for the target's.
template <class T, class Tile>
__device__ __forceinline__ void store_gradient(const RowGradient<T>& g, const Tile& tile,
                                               T* gradient, int index, int span) {
  constexpr int kLanes = Vector<T>::kLanes;
#pragma unroll Tile::kUnrolled
  for (int v = 0; v < tile.count(); ++v) {
    store_lanes(gradient + int64_t(index + v * span) * kLanes, tile.valid(v), g.of(tile[v]));
  }
}
template <class T, class Tile>
__device__ __forceinline__ void store_gradient(const OptionGradient<T>& g, const Tile& tile,
                                               T* gradient, int index, int span) {
  constexpr int kLanes = Vector<T>::kLanes;
#pragma unroll 1
  for (int v = 0; v < tile.count(); ++v) {
    const int vector = index + v * span;
    const uint32_t valid = tile.valid(v);
    if (valid == 0) break;
    store_lanes(gradient + int64_t(vector) * kLanes, valid, g.of(tile[v], valid, vector));
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
