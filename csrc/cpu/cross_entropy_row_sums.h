// Reads a row of logits for its maximum, the target's rank and the sums over e^distance.
//
// A row is read in blocks that stay in L1: first for the maximum (and the rank, counted by the same
// loop), then for the sums. Sums are relative to the maximum so far, float32 over the lanes of a
// block and float64 over blocks; a larger maximum rescales what has been summed.
#pragma once

#include "../kernels.h"
#include "cross_entropy_logits.h"
#include "simd.h"

namespace pyvizllm::CPU_CAPABILITY {

// Elements of a row that are reduced together: first their maximum, then, from L1, their sums.
constexpr int64_t kRowBlock = 64 * Simd<float>::kLanes;  // of float32, 64 are added up in a lane

inline int64_t block_count(int64_t classes) {
  return (classes + kRowBlock - 1) / kRowBlock;
}

// Sums over a row; d is the distance of a logit from the maximum, c its coefficient.
template <class A>
struct RowSums {
  A max_key = -std::numeric_limits<A>::infinity();
  double sum_exp = 0;           // of e^d
  double sum_exp_shifted = 0;   // of d e^d, for the entropy
  double sum_shifted = 0;       // of d or, with coefficients, c d; for the loss
  double sum_coefficients = 0;  // of c
  int64_t rank = 0;             // logits that are larger, or equal and before the target
  A other_key = -std::numeric_limits<A>::infinity();  // the largest but the target's
};

// What a row is read for. Each has the sums of those before it.
enum class Sums { kExp, kEntropy, kShifted, kCoefficients };

// The first `lanes` elements, and 0 in the other lanes.
template <class T>
inline auto load_lanes(const T* p, int lanes) {
  return lanes == Simd<AccumulateType<T>>::kLanes ? load(p) : load_partial(p, lanes, 0);
}

template <class T, class V>
inline void store_lanes(T* p, int lanes, V v) {
  lanes == Simd<AccumulateType<T>>::kLanes ? store(p, v) : store_partial(p, lanes, v);
}

// The coefficient of each class's negative log-likelihood in the loss of a row, up to a factor:
// class weights, which all rows share, or weight * ((1 - s) * probability + s / C).
template <class T>
class Coefficients {
 public:
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;

  // buffer: [kRowBlock], for probabilities times weights.
  Coefficients(const CrossEntropyArguments& a, A* buffer)
      : weight_(static_cast<const A*>(a.weight)),
        share_(A(1 - a.label_smoothing)),
        uniform_(A(a.label_smoothing / double(a.classes))),
        buffer_(buffer) {}

  void set_row(const T* probabilities) { probabilities_ = probabilities; }

  // Calls body(of), where of(index, lanes) is a vector of the block of `count` classes at `begin`.
  template <class Body>
  void with_block(int64_t begin, int64_t count, const Body& body) const {
    if (probabilities_ == nullptr) return body(Stored{weight_ + begin});
    const Smoothed smoothed{probabilities_ + begin, share_, uniform_};
    if (weight_ == nullptr) return body(smoothed);
    constexpr int kLanes = Simd<A>::kLanes;
    const Stored weight{weight_ + begin};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(buffer_ + i, weight(i, kLanes) * smoothed(i, kLanes));
    }
    if (i < count) {
      const int lanes = int(count - i);
      store_partial(buffer_ + i, lanes, weight(i, lanes) * smoothed(i, lanes));
    }
    body(Stored{buffer_});
  }

 private:
  struct Stored {
    const A* values;
    V operator()(int64_t i, int lanes) const { return load_lanes(values + i, lanes); }
  };
  // Of lanes beyond the row's end, 0 too.
  struct Smoothed {
    const T* probabilities;
    A share;
    A uniform;
    V operator()(int64_t i, int lanes) const {
      prefetch_ahead(probabilities + i);
      const V q = load_lanes(probabilities + i, lanes) * share + uniform;
      return lanes == Simd<A>::kLanes ? q : first_lanes(q, lanes);
    }
  };

  const A* weight_;
  const T* probabilities_ = nullptr;
  A share_;
  A uniform_;
  A* buffer_;
};

// Calls body(vector, index, lanes) with lanes < kLanes at the end of the row only; the other lanes
// hold an element of the row.
template <class T, class Body>
inline void for_each_vector(const T* x, int64_t count, const Body& body) {
  constexpr int kLanes = Simd<AccumulateType<T>>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(load(x + i), i, kLanes);
  if (i < count) {
    body(load_partial(x + i, count - i, load_one(x + i)), i, int(count - i));
  }
}

// The largest key, which NaNs are not.
template <class Logits, class T>
AccumulateType<T> largest_key(const T* x, int64_t count, const Logits& logits) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  constexpr int kLanes = Simd<A>::kLanes;
  constexpr int kChains = 4;  // as many cycles as one maximum waits for another
  const V lowest = V{} - std::numeric_limits<A>::infinity();
  V max[kChains] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) {
      max[chain] = maximum(logits.key(load(x + i + chain * kLanes)), max[chain]);
    }
  }
  for_each_vector(x + i, count - i,
                  [&](V v, int64_t, int) { max[0] = maximum(logits.key(v), max[0]); });
  return max_lanes<A>(maximum(maximum(max[0], max[1]), maximum(max[2], max[3])));
}

// The same, and adds to `ahead` the keys that are larger than the target's, with kEqual also those
// that equal it.
template <bool kEqual, class Logits, class T>
AccumulateType<T> largest_key_and_rank(const T* x, int64_t count, const Logits& logits,
                                       AccumulateType<T> target, int64_t& ahead) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  constexpr int kLanes = Simd<A>::kLanes;
  constexpr int kChains = 2;  // four gain nothing more
  const V lowest = V{} - std::numeric_limits<A>::infinity();
  V max[kChains] = {lowest, lowest};
  decltype(lowest > lowest) counts[kChains] = {};
  const auto is_ahead = [&](V key) { return kEqual ? key >= target : key > target; };  // -1 or 0
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    for (int chain = 0; chain < kChains; ++chain) {
      const V key = logits.key(load(x + i + chain * kLanes));
      max[chain] = maximum(key, max[chain]);
      counts[chain] -= is_ahead(key);
    }
  }
  for_each_vector(x + i, count - i, [&](V v, int64_t, int lanes) {
    const V key = logits.key(v);
    max[0] = maximum(key, max[0]);
    counts[0] -= lanes == kLanes ? is_ahead(key) : first_lanes(is_ahead(key), lanes);
  });
  ahead += int64_t(sum_lanes(counts[0] + counts[1]));
  return max_lanes<A>(maximum(max[0], max[1]));
}

// The largest key of a block, whose rank and largest key but the target's are added to the row.
// target: within the block, negative or beyond its end where it is in another.
template <class Logits, class T>
AccumulateType<T> rank_block(const T* x, int64_t count, const Logits& logits, int64_t target,
                             AccumulateType<T> target_key, RowSums<AccumulateType<T>>& row) {
  using A = AccumulateType<T>;
  A max;
  if (target >= count) {
    max = largest_key_and_rank<true>(x, count, logits, target_key, row.rank);
  } else if (target < 0) {
    max = largest_key_and_rank<false>(x, count, logits, target_key, row.rank);
  } else {
    const A before = largest_key_and_rank<true>(x, target, logits, target_key, row.rank);
    max = largest_key_and_rank<false>(x + target + 1, count - target - 1, logits, target_key,
                                      row.rank);
    max = before > max ? before : max;
  }
  row.other_key = max > row.other_key ? max : row.other_key;
  const bool has_target = target >= 0 && target < count;
  return has_target && target_key > max ? target_key : max;
}

// The sums become relative to a new largest key.
template <class Logits, class A>
void raise_maximum(const Logits& logits, A max_key, RowSums<A>& row, double weight_before) {
  const double delta = logits.between(logits.reference(row.max_key), logits.reference(max_key));
  if (row.sum_exp != 0) {  // else the sums are empty, and 0 * exp(delta) may be 0 * Inf
    const double factor = std::exp(delta);
    row.sum_exp_shifted = factor * (row.sum_exp_shifted + delta * row.sum_exp);
    row.sum_exp *= factor;
  }
  if (weight_before != 0) row.sum_shifted += delta * weight_before;
  row.max_key = max_key;
}

// A row's exponentials, kept from the sums for the gradient: one exp an element instead of two.
// Each block's are relative to the maximum that was known when it was read. With a cap they are
// kept times its derivatives.
template <class A>
struct KeptRow {
  A* exps;     // [classes]
  A* max_key;  // [blocks]
};

// Adds a block whose largest key is known. kKeep: also writes e^d, relative to the maximum so far,
// to `kept`, which may be where the logits are, with a cap times its derivative.
// coefficients(index, lanes): for Sums::kCoefficients. target: as in rank_block.
template <Sums kSums, bool kKeep, class Logits, class T, class Of>
void add_block(const T* x, int64_t count, const Logits& logits, const Of& coefficients,
               int64_t target, RowSums<AccumulateType<T>>& row, AccumulateType<T>* kept) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  constexpr int kLanes = Simd<A>::kLanes;
  const auto reference = logits.reference(row.max_key);
  V sum_exp{}, sum_exp_shifted{}, sum_shifted{}, sum_coefficients{};
  const V exp_min = V{} + kExpMin<A>;
  // The target's is added by itself: beside the 1 of a sure one float32 would lose the others,
  // which are all that its gradient is made of.
  const int64_t target_vector = target >= 0 && target < count ? target / kLanes * kLanes : -1;
  A target_exp = 0;
  for_each_vector(x, count, [&](V v, int64_t i, int lanes) {
    const auto valid = [&](V of) { return lanes == kLanes ? of : first_lanes(of, lanes); };
    prefetch_ahead(x + i);
    V distance, derivative;
    if constexpr (kKeep && Logits::kCapped) {
      const Capped<V> z = logits.capped(v);
      derivative = z.derivative;
      distance = valid(z.value - reference.max);
    } else {
      distance = valid(logits.distance(v, reference));
    }
    // The bound comes first: maximum() passes its second operand, a NaN, through.
    const V bounded = maximum(exp_min, distance);
    const V e = valid(exp(bounded));
    V added = e;
    if (i == target_vector) {
      target_exp = e[target - i];
      added[target - i] = 0;
    }
    sum_exp += added;
    if constexpr (kKeep && Logits::kCapped) {
      store_lanes(kept + i, lanes, e * derivative);
    } else if constexpr (kKeep) {
      store_lanes(kept + i, lanes, e);
    }
    if constexpr (kSums != Sums::kExp) sum_exp_shifted += e * bounded;
    if constexpr (kSums == Sums::kShifted) sum_shifted += distance;
    if constexpr (kSums == Sums::kCoefficients) {
      const V c = coefficients(i, lanes);
      sum_coefficients += c;
      sum_shifted += c == 0 ? V{} : c * distance;  // 0 * -Inf is 0 here
    }
  });
  row.sum_exp += sum_lanes(sum_exp) + double(target_exp);
  if constexpr (kSums != Sums::kExp) row.sum_exp_shifted += sum_lanes(sum_exp_shifted);
  if constexpr (kSums >= Sums::kShifted) row.sum_shifted += sum_lanes(sum_shifted);
  if constexpr (kSums == Sums::kCoefficients) row.sum_coefficients += sum_lanes(sum_coefficients);
}

// How rows are read: the same for all of a call.
template <class T, class Logits>
struct RowReader {
  using A = AccumulateType<T>;

  Logits logits;
  int64_t classes;
  Sums sums;
  bool rank;     // count it
  bool indices;  // targets are classes, not probabilities

  // target: -1 where no class of the row is. kept: for kKeep.
  template <bool kKeep>
  RowSums<A> read(const T* x, int64_t target, const Coefficients<T>& coefficients,
                  KeptRow<A>* kept) const {
    switch (sums) {
      case Sums::kExp:
        return read<Sums::kExp, kKeep>(x, target, coefficients, kept);
      case Sums::kEntropy:
        return read<Sums::kEntropy, kKeep>(x, target, coefficients, kept);
      case Sums::kShifted:
        return read<Sums::kShifted, kKeep>(x, target, coefficients, kept);
      case Sums::kCoefficients:
        return read<Sums::kCoefficients, kKeep>(x, target, coefficients, kept);
    }
    __builtin_unreachable();  // those are all: no Sums comes from outside
  }

  template <Sums kSums, bool kKeep>
  RowSums<A> read(const T* x, int64_t target, const Coefficients<T>& coefficients,
                  KeptRow<A>* kept) const {
    RowSums<A> row;
    // Without a target nothing is ahead of +Inf, and all are "other".
    const int64_t apart = indices ? target : -1;  // with probabilities only the rank has a target
    const A target_key = target < 0 ? std::numeric_limits<A>::infinity() : key_at(x, target);
    for (int64_t begin = 0; begin < classes; begin += kRowBlock) {
      const int64_t count = classes - begin < kRowBlock ? classes - begin : kRowBlock;
      const A max = rank ? rank_block(x + begin, count, logits, target - begin, target_key, row)
                         : largest_key(x + begin, count, logits);
      if (max > row.max_key) {
        raise_maximum(logits, max, row,
                      kSums == Sums::kCoefficients ? row.sum_coefficients : double(begin));
      }
      const auto add = [&](const auto& of) {
        add_block<kSums, kKeep>(x + begin, count, logits, of, apart - begin, row,
                                kKeep ? kept->exps + begin : nullptr);
      };
      if constexpr (kSums == Sums::kCoefficients) {
        coefficients.with_block(begin, count, add);
      } else {
        add(nullptr);
      }
      if constexpr (kKeep) kept->max_key[begin / kRowBlock] = row.max_key;
    }
    return row;
  }

  A key_at(const T* x, int64_t index) const {
    return logits.key(typename Simd<A>::Vector{} + load_one(x + index))[0];
  }
};

}  // namespace pyvizllm::CPU_CAPABILITY
