// Rows side by side, one in each lane: the sums and targets of as many positions as a vector of the
// accumulation type has lanes. A column is their logits, [classes, lanes].
#pragma once

#include <limits>

#include "cross_entropy_loss.h"
#include "cross_entropy_row_sums.h"
#include "simd.h"

namespace pyvizllm::CPU_CAPABILITY {

// A double for each lane of a vector of A.
template <class A>
struct WideLanes {
  using V = typename Simd<A>::Vector;
  static constexpr int kParts = sizeof(double) / sizeof(A);
  static constexpr int kPartLanes = Simd<double>::kLanes;
  static constexpr int kLanes = Simd<A>::kLanes;

  Doubles parts[kParts] = {};

  WideLanes() = default;
  explicit WideLanes(V v) { add(v); }
  explicit WideLanes(double value) {
    for (Doubles& part : parts) part += value;
  }
  explicit WideLanes(const double (&values)[kLanes]) { std::memcpy(parts, values, sizeof(parts)); }

  void add(V v) {
    if constexpr (kParts == 1) {
      parts[0] += v;
    } else {
      add_widened(v, parts);
    }
  }
  void add(const WideLanes& other) {
    for (int p = 0; p < kParts; ++p) parts[p] += other.parts[p];
  }

  double operator[](int lane) const { return parts[lane / kPartLanes][lane % kPartLanes]; }
  void set(int lane, double value) { parts[lane / kPartLanes][lane % kPartLanes] = value; }

  V narrowed() const {
    using Narrow = VectorOf<A, kPartLanes>;
    Narrow narrow[kParts];
    for (int p = 0; p < kParts; ++p) narrow[p] = __builtin_convertvector(parts[p], Narrow);
    return bit_cast<V>(narrow);
  }

  double sum() const {
    Doubles total{};
    for (const Doubles& part : parts) total += part;
    return sum_lanes(total);
  }
};

// The targets of a column. Lanes beyond the last position have one that does not count.
template <class A>
struct ColumnTargets {
  static constexpr int kLanes = Simd<A>::kLanes;
  using Integers = decltype(typename Simd<A>::Vector{} > typename Simd<A>::Vector{});
  using Integer = std::remove_reference_t<decltype(Integers{}[0])>;

  Integer index[kLanes];
  A key[kLanes] = {};
  A counts[kLanes] = {};  // 1 or 0
  double weight[kLanes] = {};

  ColumnTargets() {
    for (Integer& of_lane : index) of_lane = -1;
  }

  void set(int lane, const RowTarget<A>& target) {
    index[lane] = Integer(target.index);
    key[lane] = target.key;
    counts[lane] = target.counts;
    weight[lane] = target.weight;
  }
  RowTarget<A> of(int lane) const {
    return {counts[lane] != 0, index[lane], weight[lane], key[lane]};
  }
};

// RowSums of a column.
template <class A>
struct ColumnSums {
  using V = typename Simd<A>::Vector;
  using Integers = typename ColumnTargets<A>::Integers;
  static constexpr int kLanes = Simd<A>::kLanes;

  V max_key{};
  V other_key{};
  Integers rank{};
  WideLanes<A> sum_exp, sum_exp_shifted, sum_shifted;

  RowSums<A> of(int lane) const {
    RowSums<A> row;
    row.max_key = max_key[lane];
    row.sum_exp = sum_exp[lane];
    row.sum_exp_shifted = sum_exp_shifted[lane];
    row.sum_shifted = sum_shifted[lane];
    row.rank = rank[lane];
    row.other_key = other_key[lane];
    return row;
  }

  // The ranks, and the largest keys but the targets'.
  void add_ranks(const A* column, int64_t classes, const ColumnTargets<A>& targets) {
    const V target_key = load(targets.key);
    Integers target, index{};
    std::memcpy(&target, targets.index, sizeof(target));
    other_key = V{} - std::numeric_limits<A>::infinity();
    for (int64_t c = 0; c < classes; ++c, ++index) {
      const V key = load(column + c * kLanes);
      const Integers is_target = index == target;
      rank -= ~is_target & (index < target ? key >= target_key : key > target_key);
      other_key = is_target ? other_key : maximum(key, other_key);
    }
  }

  // Once max_key is known. kKeep: also writes e^d over the logits. weight: for kCoefficients.
  template <Sums kSums, bool kKeep>
  void add_exps(A* column, int64_t classes, const A* weight) {
    const V reference = finite_or_zero(max_key);
    const V exp_min = V{} + kExpMin<A>;
    for (int64_t c = 0; c < classes; ++c) {
      A* const at = column + c * kLanes;
      const V distance = load(at) - reference;
      const V bounded = maximum(exp_min, distance);  // a NaN passes
      const V e = exp(bounded);
      // One by one in float64: beside the 1 of a sure class float32 would lose the others, which
      // are all that its gradient is made of.
      sum_exp.add(e);
      if constexpr (kKeep) store(at, e);
      if constexpr (kSums != Sums::kExp) sum_exp_shifted.add(e * bounded);
      if constexpr (kSums == Sums::kShifted) sum_shifted.add(distance);
      if constexpr (kSums == Sums::kCoefficients) {
        if (weight[c] != 0) sum_shifted.add(distance * weight[c]);  // 0 * -Inf is 0 here
      }
    }
  }

  template <bool kKeep>
  void add_exps(Sums sums, A* column, int64_t classes, const A* weight) {
    switch (sums) {
      case Sums::kExp:
        return add_exps<Sums::kExp, kKeep>(column, classes, weight);
      case Sums::kEntropy:
        return add_exps<Sums::kEntropy, kKeep>(column, classes, weight);
      case Sums::kShifted:
        return add_exps<Sums::kShifted, kKeep>(column, classes, weight);
      case Sums::kCoefficients:
        return add_exps<Sums::kCoefficients, kKeep>(column, classes, weight);
    }
    __builtin_unreachable();  // those are all: no Sums comes from outside
  }
};

}  // namespace pyvizllm::CPU_CAPABILITY
