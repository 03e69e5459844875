// Softmax cross-entropy where the classes are in the middle: logits [batch, classes, positions], as
// of images. Lanes are positions: nothing is added up across lanes. So are rows of few classes,
// which would not fill a vector each.
//
// A tile of positions is read from memory once, class by class in runs of neighbours (rows one by
// one), and widened into columns that stay in cache: of as many positions as a vector has lanes,
// [classes, lanes].
// Maxima are found while it is read. From the columns come the ranks, the sums and, in fused mode,
// the gradient, whose exponentials take the logits' place. The backward needs no columns. Memory
// sees what it sees of rows: one read of the logits and one write of the gradient.
//
// What follows from the sums are the formulas of rows, in vectors (cross_entropy_loss.h).
#pragma once

#include <limits>
#include <memory>
#include <type_traits>

#include "cross_entropy_columns.h"
#include "cross_entropy_groups.h"
#include "cross_entropy_loss.h"

namespace pyvizllm::CPU_CAPABILITY {

constexpr int64_t kTileElements = 8192;  // with float32 a good half of L1
constexpr int64_t kTileStep = 64;        // whole cache lines, and whole vectors, of every type
constexpr int64_t kAhead = 2;            // classes whose logits are on their way

// Where an element is: [batch, classes, positions], strides in elements.
struct Layout {
  int64_t batch;
  int64_t of_class;
  int64_t position;
};

// Logits and gradient of a call.
struct Layouts {
  Layout logits;
  Layout gradient;
};

// The tiles of a call depend on the shape alone. The last of each batch may be narrower.
struct Tiles {
  int64_t width;
  int64_t per_batch;
  int64_t count;

  explicit Tiles(const CrossEntropyArguments& a) {
    const int64_t by_size = kTileElements / a.classes / kTileStep * kTileStep;
    width = by_size > kTileStep ? by_size : kTileStep;
    per_batch = (a.positions + width - 1) / width;
    count = a.rows / a.positions * per_batch;
  }
};

// One tile, and a thread's memory for it.
template <class T>
class Tile {
 public:
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  using Wide = WideLanes<A>;
  using TileProblem = Problem<T, PlainLogits<A>>;
  static constexpr int kLanes = Simd<A>::kLanes;
  static constexpr int kArrays = 5;

  static int64_t scratch(const Tiles& tiles, int64_t classes, bool columns) {
    return tiles.width * (kArrays + (columns ? classes : 0));
  }

  // scratch: of that size.
  Tile(const TileProblem& problem, const Layouts& layouts, const Tiles& tiles, int64_t index,
       A* scratch)
      : problem_(problem),
        a_(problem.a),
        layouts_(layouts),
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
    const auto offset_in = [&](const Layout& layout) {
      return batch * layout.batch + begin * layout.position;
    };
    logits_ = static_cast<const T*>(a_.logits) + offset_in(layouts.logits);
    gradient_begin_ = offset_in(layouts.gradient);
  }

  int64_t count() const { return count_; }
  int64_t row(int64_t position) const { return row_ + position; }
  int lanes_at(int64_t i) const { return count_ - i < kLanes ? int(count_ - i) : kLanes; }

  // The logits into the columns, and their maxima.
  void read() {
    if (layouts_.logits.position != 1) return read_rows();
    const V lowest = V{} - std::numeric_limits<A>::infinity();
    for (int64_t i = 0; i < count_; i += kLanes) store(max_ + i, lowest);
    for (int64_t c = 0; c < a_.classes; ++c) {
      const T* const ahead = ahead_of(c);
      for_each_vector(logits_ + c * layouts_.logits.of_class, count_, [&](V v, int64_t i, int) {
        __builtin_prefetch(ahead + i);
        store(column(i) + c * kLanes, v);
        store(max_ + i, maximum(v, load(max_ + i)));
      });
    }
  }

  // Of the positions from i on. key_of(lane, class): of a logit.
  template <class KeyOf>
  ColumnTargets<A> targets_at(int64_t i, const KeyOf& key_of) const {
    ColumnTargets<A> targets;
    for (int lane = 0; lane < lanes_at(i); ++lane) {
      targets.set(lane, problem_.index_target_of(
                            row(i + lane), [&](int64_t index) { return key_of(lane, index); }));
    }
    return targets;
  }
  ColumnTargets<A> targets_in_columns(int64_t i) const {
    return targets_at(i, [&](int lane, int64_t index) { return column(i)[index * kLanes + lane]; });
  }
  ColumnTargets<A> targets_in_logits(int64_t i) const {
    return targets_at(i, [&](int lane, int64_t index) {
      return load_one(logits_ + index * layouts_.logits.of_class + i + lane);
    });
  }

  // kKeep: the columns become exponentials.
  template <bool kKeep>
  ColumnSums<A> sums_at(int64_t i, const ColumnTargets<A>& targets) {
    ColumnSums<A> sums;
    sums.max_key = load(max_ + i);
    if (problem_.reader.rank) sums.add_ranks(column(i), a_.classes, targets);
    sums.template add_exps<kKeep>(problem_.reader.sums, column(i), a_.classes, weight());
    return sums;
  }

  // The loss of each position, 0 of those that do not count; adds metrics to the group's.
  Wide losses(int64_t i, const ColumnTargets<A>& targets, const ColumnSums<A>& sums,
              GroupSums& group) const {
    const Wide max(sums.max_key);
    const Wide reference(finite_or_zero(sums.max_key));
    const Wide key(load(targets.key));
    const Wide counts(load(targets.counts));
    const Wide weight(targets.weight);
    Wide losses, log_sums, likelihoods;
    for (int p = 0; p < Wide::kParts; ++p) {
      log_sums.parts[p] = log(sums.sum_exp.parts[p]);
      likelihoods.parts[p] = log_sums.parts[p] - (key.parts[p] - reference.parts[p]);
      const Doubles loss = problem_.target_loss(weight.parts[p], likelihoods.parts[p]) +
                           problem_.smoothing_loss(log_sums.parts[p], sums.sum_shifted.parts[p]) +
                           problem_.z_loss(weight.parts[p], max.parts[p] + log_sums.parts[p]);
      losses.parts[p] = counts.parts[p] != 0 ? loss : Doubles{};
    }
    if (problem_.reader.rank) note(i, targets, sums, log_sums, likelihoods, group);
    return losses;
  }

  // One value of each position from i on, [rows].
  void write(V values, int64_t i, void* of_rows) const {
    std::memcpy(static_cast<A*>(of_rows) + row(i), &values, sizeof(A) * size_t(lanes_at(i)));
  }

  // What the gradient is made of. e: of the target's distance from the maximum.
  void set_gradient(int64_t i, const ColumnTargets<A>& targets, const Wide& sum_exp,
                    const Wide& upstream) {
    const V max = load(max_ + i);
    const V distance = load(targets.key) - finite_or_zero(max);
    const Wide e(exp(maximum(V{} + kExpMin<A>, distance)));
    const Wide wide_max(max);
    const Wide weight(targets.weight);
    Wide factor, offset, at_target;
    for (int p = 0; p < Wide::kParts; ++p) {
      const Doubles sum = sum_exp.parts[p];
      const Doubles coefficients = problem_.index_coefficient_sum(weight.parts[p]);
      const Doubles z_factor =
          a_.z_loss == 0 ? Doubles{}
                         : problem_.z_factor(weight.parts[p], wide_max.parts[p] + log(sum));
      factor.parts[p] = upstream.parts[p] * (coefficients + z_factor) / sum;
      offset.parts[p] = upstream.parts[p] * problem_.uniform;
      at_target.parts[p] = upstream.parts[p] * problem_.at_target(weight.parts[p], e.parts[p], sum,
                                                                  coefficients, z_factor);
    }
    store(factor_ + i, factor.narrowed());
    store(offset_ + i, offset.narrowed());
    store(at_target_ + i, at_target.narrowed());
    store(counts_ + i, load(targets.counts));
  }

  // The maxima as the forward wrote them.
  void set_maxima(const A* of_rows) {
    for (int64_t i = 0; i < count_; ++i) max_[i] = of_rows[row(i)];
    for (int64_t i = count_; i % kLanes != 0; ++i) max_[i] = 0;
  }

  // From the columns, which hold exponentials; the gradient may overwrite the logits.
  void write_from_exps(T* grad) const {
    write_gradient(grad, [&](int64_t i, int64_t c) { return load(column(i) + c * kLanes); });
  }
  // From the columns, which hold logits.
  void write_from_columns(T* grad) const {
    write_gradient(grad,
                   [&](int64_t i, int64_t c) { return exp_at(load(column(i) + c * kLanes), i); });
  }
  void write_from_logits(T* grad) const {
    write_gradient(grad, [&](int64_t i, int64_t c) {
      __builtin_prefetch(ahead_of(c) + i);
      return exp_at(load_lanes(logits_ + c * layouts_.logits.of_class + i, lanes_at(i)), i);
    });
  }

 private:
  A* column(int64_t position) const { return columns_ + position * a_.classes; }
  // Of elements as they are in memory, in the first part of the column.
  T* narrow_column(int64_t position) const { return reinterpret_cast<T*>(column(position)); }
  const A* weight() const { return static_cast<const A*>(a_.weight); }
  // The runs of neighbours are too short for the processor to see that one comes after the other.
  const T* ahead_of(int64_t c) const {
    const int64_t next = c + kAhead < a_.classes ? c + kAhead : c;
    return logits_ + next * layouts_.logits.of_class;
  }
  V exp_at(V logits, int64_t i) const {
    const V distance = logits - finite_or_zero(load(max_ + i));
    return exp(maximum(V{} + kExpMin<A>, distance));
  }

  // As read(), of rows: class stride 1. Elements change places as they are, and vectors are widened
  // from the last one on: what is narrow lies in the same memory, before what is wide.
  void read_rows() {
    for (int64_t i = 0; i < count_; i += kLanes) {
      A* const columns = column(i);
      T* const narrow = narrow_column(i);
      for (int lane = 0; lane < kLanes; ++lane) {
        const T* const x = logits_ + (i + lane) * layouts_.logits.position;
        const bool is_row = lane < lanes_at(i);
        for (int64_t c = 0; c < a_.classes; ++c) narrow[c * kLanes + lane] = is_row ? x[c] : T{};
      }
      V max = V{} - std::numeric_limits<A>::infinity();
      for (int64_t c = a_.classes - 1; c >= 0; --c) {
        const V v = load(narrow + c * kLanes);
        store(columns + c * kLanes, v);
        max = maximum(v, max);
      }
      store(max_ + i, max);
    }
  }

  void note(int64_t i, const ColumnTargets<A>& targets, const ColumnSums<A>& sums,
            const Wide& log_sums, const Wide& likelihoods, GroupSums& group) const {
    for (int lane = 0; lane < lanes_at(i); ++lane) {
      const RowTarget<A> target = targets.of(lane);
      if (!target.counts) {
        problem_.record_ignored(row(i + lane));
        continue;
      }
      RowFacts facts = {};
      facts.max = double(sums.max_key[lane]);
      facts.log_sum = log_sums[lane];
      facts.negative_log_likelihood = likelihoods[lane];
      const RowSums<A> of_row = sums.of(lane);
      problem_.note(row(i + lane), target, of_row, of_row.sum_shifted, facts, group);
    }
  }

  // of(position, class): the exponentials of a vector.
  template <class Of>
  void write_gradient(T* grad, const Of& of) const {
    T* const gradient = grad + gradient_begin_;
    const bool weighted_classes = a_.weight != nullptr && problem_.uniform != 0;
    const auto at = [&](int64_t i, int64_t c) {
      const A coefficient = weighted_classes ? weight()[c] : A(1);
      const V g = of(i, c) * load(factor_ + i) - load(offset_ + i) * coefficient;
      return load(counts_ + i) != 0 ? g : V{};
    };
    const Layout& layout = layouts_.gradient;
    if (layout.position != 1) return write_rows(gradient, at);
    for (int64_t c = 0; c < a_.classes; ++c) {
      T* const row = gradient + c * layout.of_class;
      int64_t i = 0;
      for (; i + kLanes <= count_; i += kLanes) store(row + i, at(i, c));
      if (i < count_) store_partial(row + i, count_ - i, at(i, c));
    }
    for (int64_t i = 0; i < count_; ++i) {
      if (counts_[i] == 0) continue;
      store_one(gradient + target_at(a_, row(i)) * layout.of_class + i, at_target_[i]);
    }
  }

  // Of class stride 1. The columns become the gradient, are narrowed in their own memory, from the
  // first vector on, and change places.
  template <class At>
  void write_rows(T* gradient, const At& at) const {
    for (int64_t i = 0; i < count_; i += kLanes) {
      A* const columns = column(i);
      T* const narrow = narrow_column(i);
      for (int64_t c = 0; c < a_.classes; ++c) store(columns + c * kLanes, at(i, c));
      for (int lane = 0; lane < lanes_at(i); ++lane) {
        if (counts_[i + lane] == 0) continue;
        columns[target_at(a_, row(i + lane)) * kLanes + lane] = at_target_[i + lane];
      }
      if constexpr (!std::is_same_v<T, A>) {
        for (int64_t c = 0; c < a_.classes; ++c) {
          store(narrow + c * kLanes, load(columns + c * kLanes));
        }
      }
      for (int lane = 0; lane < lanes_at(i); ++lane) {
        T* const to = gradient + (i + lane) * layouts_.gradient.position;
        for (int64_t c = 0; c < a_.classes; ++c) to[c] = narrow[c * kLanes + lane];
      }
    }
  }

  const TileProblem& problem_;
  const CrossEntropyArguments& a_;
  const Layouts& layouts_;
  int64_t row_;    // the first
  int64_t count_;  // positions
  const T* logits_;
  int64_t gradient_begin_;
  A *max_, *factor_, *offset_, *counts_, *at_target_;  // [width]
  A* columns_;                                         // [width / kLanes, classes, kLanes]
};

// kGradient: for an upstream gradient of 1, instead of the state of rows for the backward.
template <class T, bool kGradient>
void loss_positions(const CrossEntropyArguments& a, const Layouts& layouts, double divisor,
                    void* loss, CrossEntropyRowState state, void* grad, double* metrics,
                    double* records) {
  using A = AccumulateType<T>;
  const Tiles tiles(a);
  const Groups groups(tiles.count, tiles.width * a.classes);
  const std::unique_ptr<GroupSums[]> sums(new GroupSums[groups.count]);
  const Problem<T, PlainLogits<A>> problem(a, metrics != nullptr, records);
  const WideLanes<A> upstream(a.reduction == Reduction::kMean ? 1 / divisor : 1);
  const auto run_tile = [&](Tile<T>& tile, GroupSums& group) {
    WideLanes<A> total;
    tile.read();
    for (int64_t i = 0; i < tile.count(); i += Tile<T>::kLanes) {
      const ColumnTargets<A> targets = tile.targets_in_columns(i);
      const ColumnSums<A> column = tile.template sums_at<kGradient>(i, targets);
      const WideLanes<A> losses = tile.losses(i, targets, column, group);
      total.add(losses);
      if (a.reduction == Reduction::kNone) tile.write(losses.narrowed(), i, loss);
      if constexpr (kGradient) {
        tile.set_gradient(i, targets, column.sum_exp, upstream);
      } else {
        tile.write(column.max_key, i, state.max);
        std::memcpy(state.sum_exp + tile.row(i), column.sum_exp.parts,
                    sizeof(double) * size_t(tile.lanes_at(i)));
      }
    }
    if constexpr (kGradient) tile.write_from_exps(static_cast<T*>(grad));
    group.loss += total.sum();
  };
  const int64_t scratch_size = Tile<T>::scratch(tiles, a.classes, true);
  groups.run<A>(scratch_size, [&](int64_t group, int64_t begin, int64_t end, A* scratch) {
    for (int64_t t = begin; t < end; ++t) {
      Tile<T> tile(problem, layouts, tiles, t, scratch);
      run_tile(tile, sums[group]);
    }
  });
  reduce_groups<A>(a, divisor, sums.get(), groups.count, loss, metrics);
}

template <class T>
void backward_positions(const CrossEntropyArguments& a, const Layouts& layouts, double mean_divisor,
                        CrossEntropyRowState state, const void* grad_loss, int64_t grad_loss_stride,
                        void* grad) {
  using A = AccumulateType<T>;
  const Tiles tiles(a);
  const Problem<T, PlainLogits<A>> problem(a, false, nullptr);
  const double divisor = a.reduction == Reduction::kMean ? mean_divisor : 1;
  const WideLanes<A> of_all(problem.upstream_of(0, grad_loss, grad_loss_stride) / divisor);
  const bool columns = layouts.logits.position != 1 || layouts.gradient.position != 1;
  const auto run_tile = [&](Tile<T>& tile) {
    WideLanes<A> upstream = of_all;
    if (columns) tile.read();
    tile.set_maxima(static_cast<const A*>(state.max));
    for (int64_t i = 0; i < tile.count(); i += Tile<T>::kLanes) {
      WideLanes<A> sum_exp(1);
      std::memcpy(sum_exp.parts, state.sum_exp + tile.row(i),
                  sizeof(double) * size_t(tile.lanes_at(i)));
      for (int lane = 0; a.reduction == Reduction::kNone && lane < tile.lanes_at(i); ++lane) {
        upstream.set(lane, problem.upstream_of(tile.row(i + lane), grad_loss, grad_loss_stride));
      }
      const auto targets = columns ? tile.targets_in_columns(i) : tile.targets_in_logits(i);
      tile.set_gradient(i, targets, sum_exp, upstream);
    }
    if (columns) {
      tile.write_from_columns(static_cast<T*>(grad));
    } else {
      tile.write_from_logits(static_cast<T*>(grad));
    }
  };
  const int64_t scratch_size = Tile<T>::scratch(tiles, a.classes, columns);
  const Groups groups(tiles.count, tiles.width * a.classes);
  groups.run<A>(scratch_size, [&](int64_t, int64_t begin, int64_t end, A* scratch) {
    for (int64_t t = begin; t < end; ++t) {
      Tile<T> tile(problem, layouts, tiles, t, scratch);
      run_tile(tile);
    }
  });
}

}  // namespace pyvizllm::CPU_CAPABILITY
