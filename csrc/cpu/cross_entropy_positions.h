// Softmax cross-entropy where the classes are in the middle: logits [batch, classes, positions], as
// of images. Lanes are positions: no row is gathered, and nothing is added up across lanes.
//
// A tile of positions is read from memory once, class by class in runs of neighbours, and widened
// into columns that stay in cache: of as many positions as a vector has lanes, [classes, lanes].
// Maxima are found while it is read. From the columns come the ranks, the sums and, in fused mode,
// the gradient, whose exponentials take the logits' place. The backward needs no columns. Memory
// sees what it sees of rows: one read of the logits and one write of the gradient.
//
// What a row's sums mean is the same here and there (cross_entropy_loss.h).
#pragma once

#include <limits>
#include <memory>

#include "cross_entropy_groups.h"
#include "cross_entropy_loss.h"

namespace pyvizllm::CPU_CAPABILITY {

constexpr int64_t kTileElements = 8192;  // with float32 a good half of L1
constexpr int64_t kTileStep = 64;        // whole cache lines, and whole vectors, of every type
// Classes whose float32 sums are added up before float64: no more than a lane of a short row has.
constexpr int64_t kColumnBlock = 8;

// The tiles of a call depend on the shape alone. The last of each batch may be narrower.
struct Tiles {
  int64_t width;
  int64_t per_batch;
  int64_t count;

  explicit Tiles(const CrossEntropyArguments& a) {
    const int64_t by_size = kTileElements / (a.classes > 0 ? a.classes : 1) / kTileStep * kTileStep;
    width = by_size > kTileStep ? by_size : kTileStep;
    per_batch = (a.positions + width - 1) / width;
    count = a.rows / a.positions * per_batch;
  }
};

// A double for each lane of a vector of A.
template <class A>
struct WideLanes {
  static constexpr int kParts = sizeof(double) / sizeof(A);
  Doubles parts[kParts] = {};

  void add(typename Simd<A>::Vector v) {
    if constexpr (kParts == 1) {
      parts[0] += v;
    } else {
      add_widened(v, parts);
    }
  }
  double operator[](int lane) const {
    constexpr int kLanes = Simd<double>::kLanes;
    return parts[lane / kLanes][lane % kLanes];
  }
};

// RowSums of as many positions as a vector has lanes.
template <class A>
struct ColumnSums {
  using V = typename Simd<A>::Vector;
  using Integers = decltype(V{} > V{});

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

  // The ranks, and the largest keys but the targets'. target: -1, with a key of Inf, for none.
  void add_ranks(const A* column, int64_t classes, Integers target, V target_key) {
    other_key = V{} - std::numeric_limits<A>::infinity();
    Integers index{};
    for (int64_t c = 0; c < classes; ++c, ++index) {
      const V key = load(column + c * Simd<A>::kLanes);
      const Integers before = index < target;
      rank -= index == target ? Integers{} : before ? key >= target_key : key > target_key;
      other_key = index == target ? other_key : maximum(key, other_key);
    }
  }

  // Once max_key is known. kKeep: also writes e^d over the logits. weight: for kCoefficients.
  template <Sums kSums, bool kKeep>
  void add_exps(A* column, int64_t classes, const A* weight) {
    const V reference = max_key == -std::numeric_limits<A>::infinity() ? V{} : max_key;
    const V exp_min = V{} + kExpMin<A>;
    for (int64_t begin = 0; begin < classes; begin += kColumnBlock) {
      const int64_t end = classes - begin < kColumnBlock ? classes : begin + kColumnBlock;
      V exps{}, exps_shifted{}, shifted{};
      for (int64_t c = begin; c < end; ++c) {
        A* const at = column + c * Simd<A>::kLanes;
        const V distance = load(at) - reference;
        const V bounded = maximum(exp_min, distance);  // a NaN passes
        const V e = exp(bounded);
        exps += e;
        if constexpr (kKeep) store(at, e);
        if constexpr (kSums != Sums::kExp) exps_shifted += e * bounded;
        if constexpr (kSums == Sums::kShifted) shifted += distance;
        if constexpr (kSums == Sums::kCoefficients) {
          if (weight[c] != 0) shifted += distance * weight[c];  // 0 * -Inf is 0 here
        }
      }
      sum_exp.add(exps);
      if constexpr (kSums != Sums::kExp) sum_exp_shifted.add(exps_shifted);
      if constexpr (kSums >= Sums::kShifted) sum_shifted.add(shifted);
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
    __builtin_unreachable();
  }
};

// One tile, and a thread's memory for it.
template <class T>
class Tile {
 public:
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  using TileProblem = Problem<T, PlainLogits<A>>;
  static constexpr int kLanes = Simd<A>::kLanes;
  static constexpr int kArrays = 5;

  static int64_t scratch(const Tiles& tiles, int64_t classes, bool columns) {
    return tiles.width * (kArrays + (columns ? classes : 0));
  }

  // scratch: of that size.
  Tile(const TileProblem& problem, const Tiles& tiles, int64_t index, A* scratch)
      : problem_(problem),
        a_(problem.a),
        max_(scratch),
        factor_(max_ + tiles.width),
        offset_(factor_ + tiles.width),
        counts_(offset_ + tiles.width),
        at_target_(counts_ + tiles.width),
        columns_(at_target_ + tiles.width) {
    const int64_t batch = index / tiles.per_batch;
    const int64_t begin = index % tiles.per_batch * tiles.width;
    count_ = a_.positions - begin < tiles.width ? a_.positions - begin : tiles.width;
    row_ = batch * a_.positions + begin;
    logits_ = static_cast<const T*>(a_.logits) + batch * a_.batch_stride + begin;
    gradient_begin_ = batch * a_.classes * a_.positions + begin;
  }

  int64_t count() const { return count_; }
  int64_t row(int64_t position) const { return row_ + position; }

  // The logits into the columns, and their maxima.
  void read() {
    const V lowest = V{} - std::numeric_limits<A>::infinity();
    for (int64_t i = 0; i < count_; i += kLanes) store(max_ + i, lowest);
    for (int64_t c = 0; c < a_.classes; ++c) {
      const T* x = logits_ + c * a_.class_stride;
      for_each_vector(x, count_, [&](V v, int64_t i, int) {
        store(column(i) + c * kLanes, v);
        store(max_ + i, maximum(v, load(max_ + i)));
      });
    }
  }

  // Calls body(position, target, sums) for each position that counts, and ignored(position) for the
  // others. kKeep: the columns become exponentials.
  template <bool kKeep, class Body, class Ignored>
  void for_each_position(const Body& body, const Ignored& ignored) {
    for (int64_t i = 0; i < count_; i += kLanes) {
      const int lanes = lanes_at(i);
      RowTarget<A> targets[kLanes];
      for (int lane = 0; lane < lanes; ++lane) {
        targets[lane] = problem_.index_target_of(row(i + lane), [&](int64_t index) {
          return column(i)[index * kLanes + lane];
        });
      }
      const ColumnSums<A> sums = sums_at<kKeep>(i, lanes, targets);
      for (int lane = 0; lane < lanes; ++lane) {
        if (targets[lane].counts) {
          body(i + lane, targets[lane], sums.of(lane));
        } else {
          ignored(i + lane);
        }
      }
    }
  }

  RowTarget<A> target_of(int64_t position) const {
    return problem_.index_target_of(row(position), [&](int64_t index) {
      return load_one(logits_ + index * a_.class_stride + position);
    });
  }

  void set_gradient(int64_t position, const RowGradient<T, PlainLogits<A>>& of, A max) {
    max_[position] = max;
    factor_[position] = A(of.scale);
    offset_[position] = A(of.offset);
    at_target_[position] = of.at_target;
    counts_[position] = 1;
  }
  void set_ignored(int64_t position) {
    max_[position] = factor_[position] = offset_[position] = counts_[position] = 0;
  }

  // From the columns, which hold exponentials; the gradient may overwrite the logits.
  void write_from_columns(T* grad) {
    write(grad, [&](const T*, int64_t i, int64_t c) { return load(column(i) + c * kLanes); });
  }
  void write_from_logits(T* grad) {
    const V exp_min = V{} + kExpMin<A>;
    write(grad, [&](const T* x, int64_t i, int64_t) {
      return exp(maximum(exp_min, load_lanes(x + i, lanes_at(i)) - load(max_ + i)));
    });
  }

 private:
  A* column(int64_t position) const { return columns_ + position * a_.classes; }
  int lanes_at(int64_t i) const { return count_ - i < kLanes ? int(count_ - i) : kLanes; }

  template <bool kKeep>
  ColumnSums<A> sums_at(int64_t i, int lanes, const RowTarget<A> (&targets)[kLanes]) {
    ColumnSums<A> sums;
    sums.max_key = load(max_ + i);
    if (problem_.reader.rank) {
      typename ColumnSums<A>::Integers target{};
      V key{};
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool known = lane < lanes && targets[lane].index >= 0;
        target[lane] = known ? targets[lane].index : -1;
        key[lane] = known ? targets[lane].key : std::numeric_limits<A>::infinity();
      }
      sums.add_ranks(column(i), a_.classes, target, key);
    }
    sums.template add_exps<kKeep>(problem_.reader.sums, column(i), a_.classes, weight());
    return sums;
  }

  const A* weight() const { return static_cast<const A*>(a_.weight); }

  // of(logits of the class, position, class): the exponentials of a vector.
  template <class Of>
  void write(T* grad, const Of& of) {
    T* const gradient = grad + gradient_begin_;
    const bool weighted_classes = a_.weight != nullptr && problem_.uniform != 0;
    for (int64_t i = count_; i % kLanes != 0; ++i) set_ignored(i);
    for (int64_t c = 0; c < a_.classes; ++c) {
      const V coefficient = V{} + (weighted_classes ? weight()[c] : A(1));
      T* const row = gradient + c * a_.positions;
      const T* const x = logits_ + c * a_.class_stride;
      for (int64_t i = 0; i < count_; i += kLanes) {
        const V g = of(x, i, c) * load(factor_ + i) - load(offset_ + i) * coefficient;
        const V kept = load(counts_ + i) != 0 ? g : V{};
        if (lanes_at(i) == kLanes) {
          store(row + i, kept);
        } else {
          store_partial(row + i, lanes_at(i), kept);
        }
      }
    }
    for (int64_t i = 0; i < count_; ++i) {
      if (counts_[i] != 0) {
        store_one(gradient + target_at(a_, row(i)) * a_.positions + i, at_target_[i]);
      }
    }
  }

  const TileProblem& problem_;
  const CrossEntropyArguments& a_;
  int64_t row_;    // the first
  int64_t count_;  // positions
  const T* logits_;
  int64_t gradient_begin_;
  A *max_, *factor_, *offset_, *counts_, *at_target_;  // [width]
  A* columns_;                                         // [width / kLanes, classes, kLanes]
};

template <class T>
void forward_positions(const CrossEntropyArguments& a, double divisor, void* loss,
                       CrossEntropyRowState state, double* metrics, double* records) {
  using A = AccumulateType<T>;
  const Tiles tiles(a);
  const Groups groups(tiles.count, tiles.width * a.classes);
  const std::unique_ptr<GroupSums[]> sums(new GroupSums[groups.count]);
  const Problem<T, PlainLogits<A>> problem(a, metrics != nullptr, records);
  const int64_t scratch_size = Tile<T>::scratch(tiles, a.classes, true);
  groups.run<A>(scratch_size, [&](int64_t group, int64_t begin, int64_t end, A* scratch) {
    for (int64_t t = begin; t < end; ++t) {
      Tile<T> tile(problem, tiles, t, scratch);
      tile.read();
      tile.template for_each_position<false>(
          [&](int64_t i, const RowTarget<A>& target, const RowSums<A>& row) {
            const int64_t r = tile.row(i);
            problem.write_loss(problem.row_loss(r, target, row, sums[group]), r, loss);
            problem.write_state(row, r, state);
          },
          [&](int64_t i) {
            problem.record_ignored(tile.row(i));
            problem.write_state(RowSums<A>{}, tile.row(i), state);
            problem.write_loss(0, tile.row(i), loss);
          });
    }
  });
  reduce_groups<A>(a, divisor, sums.get(), groups.count, loss, metrics);
}

template <class T>
void backward_positions(const CrossEntropyArguments& a, double mean_divisor,
                        CrossEntropyRowState state, const void* grad_loss,
                        int64_t grad_loss_stride, void* grad) {
  using A = AccumulateType<T>;
  const Tiles tiles(a);
  const Problem<T, PlainLogits<A>> problem(a, false, nullptr);
  const double divisor = a.reduction == Reduction::kMean ? mean_divisor : 1;
  const Coefficients<T> coefficients(a, nullptr);
  const auto run_group = [&](int64_t, int64_t begin, int64_t end, A* scratch) {
    for (int64_t t = begin; t < end; ++t) {
      Tile<T> tile(problem, tiles, t, scratch);
      for (int64_t i = 0; i < tile.count(); ++i) {
        const RowTarget<A> target = tile.target_of(i);
        if (!target.counts) {
          tile.set_ignored(i);
          continue;
        }
        const int64_t r = tile.row(i);
        const A max = static_cast<const A*>(state.max)[r];
        const double upstream = problem.upstream_of(r, grad_loss, grad_loss_stride) / divisor;
        const RowSoftmax<PlainLogits<A>> row{{max}, state.sum_exp[r],
                                             problem.coefficient_sum(target, coefficients)};
        tile.set_gradient(i, problem.gradient(target, coefficients, upstream, row), max);
      }
      tile.write_from_logits(static_cast<T*>(grad));
    }
  };
  Groups(tiles.count, tiles.width * a.classes)
      .run<A>(Tile<T>::scratch(tiles, a.classes, false), run_group);
}

template <class T>
void fused_positions(const CrossEntropyArguments& a, double divisor, void* loss, void* grad,
                     double* metrics, double* records) {
  using A = AccumulateType<T>;
  const Tiles tiles(a);
  const Groups groups(tiles.count, tiles.width * a.classes);
  const std::unique_ptr<GroupSums[]> sums(new GroupSums[groups.count]);
  const Problem<T, PlainLogits<A>> problem(a, metrics != nullptr, records);
  const double upstream = a.reduction == Reduction::kMean ? 1 / divisor : 1;
  const Coefficients<T> coefficients(a, nullptr);
  const int64_t scratch_size = Tile<T>::scratch(tiles, a.classes, true);
  groups.run<A>(scratch_size, [&](int64_t group, int64_t begin, int64_t end, A* scratch) {
    for (int64_t t = begin; t < end; ++t) {
      Tile<T> tile(problem, tiles, t, scratch);
      tile.read();
      tile.template for_each_position<true>(
          [&](int64_t i, const RowTarget<A>& target, const RowSums<A>& row) {
            const int64_t r = tile.row(i);
            problem.write_loss(problem.row_loss(r, target, row, sums[group]), r, loss);
            const RowSoftmax<PlainLogits<A>> softmax{problem.reader.logits.reference(row.max_key),
                                                     row.sum_exp,
                                                     problem.coefficient_sum(target, row)};
            tile.set_gradient(i, problem.gradient(target, coefficients, upstream, softmax), 0);
          },
          [&](int64_t i) {
            problem.record_ignored(tile.row(i));
            problem.write_loss(0, tile.row(i), loss);
            tile.set_ignored(i);
          });
      tile.write_from_columns(static_cast<T*>(grad));
    }
  });
  reduce_groups<A>(a, divisor, sums.get(), groups.count, loss, metrics);
}

}  // namespace pyvizllm::CPU_CAPABILITY
