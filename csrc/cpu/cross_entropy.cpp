// Softmax cross-entropy over rows of logits: loss, metrics and gradient.
//
// forward   reads the logits once from memory (twice from cache) and writes per row the loss, the
//           maximum and the sum of exp(logit - maximum); probabilities are never stored.
// backward  reads the logits once and writes the gradient once.
// fused     both in one: the row's exponentials are still in cache when its gradient is written, so
//           memory sees one read and one write of classes * sizeof(T) bytes a row. The gradient may
//           overwrite the logits.
//
// All arithmetic is float32 (float64 for float64 input) with float64 sums over blocks, and rounds
// once on output. Rows are cut into groups that depend on the shape alone and group results are
// added in order: results are the same for any number of threads.
#include <limits>
#include <memory>
#include <type_traits>

#include "../kernels.h"
#include "simd.h"

namespace pyvizllm::CPU_CAPABILITY {
namespace {

// Elements of a row that are reduced together: first their maximum, then, from L1, their sums.
constexpr int64_t kBlock = 2048;
constexpr int64_t kGroupElements = 32768;
constexpr int64_t kMaxGroups = 1024;

// Sums over a row, relative to its maximum.
template <class A>
struct RowSums {
  A max = -std::numeric_limits<A>::infinity();
  double sum_exp = 0;          // sum of e^d, d = logit - max
  double sum_exp_shifted = 0;  // sum of d e^d, for the entropy
  double sum_shifted = 0;      // sum of d, for label smoothing

  double log_sum_exp() const { return double(max) + std::log(sum_exp); }
};

template <class T, class Body>
inline void for_each_vector(const T* x, int64_t count, AccumulateType<T> fill, const Body& body) {
  constexpr int kLanes = Simd<AccumulateType<T>>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(load(x + i), kLanes);
  if (i < count) body(load_partial(x + i, count - i, fill), int(count - i));
}

// Where a row is all -Inf so far, distances are taken from 0: (-Inf) - (-Inf) would be NaN.
template <class A>
inline A reference_of(A max) {
  return max == -std::numeric_limits<A>::infinity() ? A(0) : max;
}

// kMore: also sum d and d e^d, which label smoothing and the entropy need. kKeep: also write e^d,
// relative to the maximum so far, to `kept`, in whole vectors.
template <bool kMore, bool kKeep, class T>
void add_block(const T* x, int64_t count, int64_t before, RowSums<AccumulateType<T>>& row,
               AccumulateType<T>* kept) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  constexpr A kInfinity = std::numeric_limits<A>::infinity();

  V block_max = V{} - kInfinity;
  for_each_vector(x, count, -kInfinity, [&](V v, int) { block_max = maximum(v, block_max); });
  const A max = max_lanes<A>(block_max);
  if (max > row.max) {
    const double delta = double(reference_of(row.max)) - double(reference_of(max));
    if (row.sum_exp != 0) {  // else the sums are empty, and 0 * exp(delta) may be 0 * Inf
      const double factor = std::exp(delta);
      row.sum_exp_shifted = factor * (row.sum_exp_shifted + delta * row.sum_exp);
      row.sum_exp *= factor;
    }
    row.sum_shifted += delta * double(before);
    row.max = max;
  }

  const A reference = reference_of(row.max);
  V sum_exp{}, sum_exp_shifted{}, sum_shifted{};
  const V exp_min = V{} + kExpMin<A>;
  for_each_vector(x, count, -kInfinity, [&](V v, int lanes) {
    const V distance = v - reference;
    // The bound comes first: maximum() passes its second operand, a NaN, through.
    const V bounded = maximum(exp_min, distance);
    const V e = exp(bounded);
    sum_exp += e;
    if constexpr (kKeep) {
      store(kept, e);
      kept += Simd<A>::kLanes;
    }
    if constexpr (kMore) {
      sum_exp_shifted += e * bounded;
      if (lanes == Simd<A>::kLanes) {
        sum_shifted += distance;
      } else {
        for (int lane = 0; lane < lanes; ++lane) sum_shifted[lane] += distance[lane];
      }
    }
  });
  row.sum_exp += sum_lanes(sum_exp);
  if constexpr (kMore) {
    row.sum_exp_shifted += sum_lanes(sum_exp_shifted);
    row.sum_shifted += sum_lanes(sum_shifted);
  }
}

// A row's exponentials, kept from the sums for the gradient: one exp an element instead of two.
// Each block's are relative to the maximum that was known when it was read.
template <class A>
struct KeptRow {
  A* exps;  // [blocks * kBlock]
  A* max;   // [blocks]

  static int64_t blocks(int64_t classes) { return (classes + kBlock - 1) / kBlock; }
  static int64_t elements(int64_t classes) { return blocks(classes) * (kBlock + 1); }
  KeptRow(A* memory, int64_t classes) : exps(memory), max(memory + blocks(classes) * kBlock) {}
};

template <bool kMore, bool kKeep, class T>
RowSums<AccumulateType<T>> reduce_row(const T* x, int64_t classes,
                                      KeptRow<AccumulateType<T>>* kept) {
  RowSums<AccumulateType<T>> row;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t count = classes - begin < kBlock ? classes - begin : kBlock;
    add_block<kMore, kKeep>(x + begin, count, begin, row, kKeep ? kept->exps + begin : nullptr);
    if constexpr (kKeep) kept->max[begin / kBlock] = row.max;
  }
  return row;
}

template <class T>
RowSums<AccumulateType<T>> reduce_row(const T* x, int64_t classes, bool more,
                                      KeptRow<AccumulateType<T>>* kept) {
  if (kept != nullptr) {
    return more ? reduce_row<true, true>(x, classes, kept)
                : reduce_row<false, true>(x, classes, kept);
  }
  return more ? reduce_row<true, false>(x, classes, kept)
              : reduce_row<false, false>(x, classes, kept);
}

// Whether target is the argmax: the first of equal maxima, so constant rows are not all "correct".
template <class T>
bool is_argmax(const T* x, int64_t target, AccumulateType<T> max) {
  using V = typename Simd<AccumulateType<T>>::Vector;
  if (load_one(x + target) != max) return false;
  V before = V{} - std::numeric_limits<AccumulateType<T>>::infinity();
  for_each_vector(x, target, -std::numeric_limits<AccumulateType<T>>::infinity(),
                  [&](V v, int) { before = maximum(v, before); });
  return max_lanes<AccumulateType<T>>(before) < max || target == 0;
}

inline int64_t target_at(const CrossEntropyArguments& a, int64_t row) {
  return a.target_is_int64 ? static_cast<const int64_t*>(a.target)[row]
                           : static_cast<const int32_t*>(a.target)[row];
}

// Sums over a group of rows.
struct GroupSums {
  double loss = 0;
  double metrics[metric::kSize] = {};
};

template <class A>
void add_metrics(const RowSums<A>& row, double negative_log_likelihood, bool correct, double* m) {
  const double top_probability = 1 / row.sum_exp;
  const double log_sum = std::log(row.sum_exp);
  m[metric::kTokens] += 1;
  m[metric::kCorrect] += correct;
  m[metric::kNegativeLogLikelihood] += negative_log_likelihood;
  m[metric::kEntropy] += log_sum - row.sum_exp_shifted / row.sum_exp;
  m[metric::kLogSumExp] += row.log_sum_exp();
  m[metric::kTopProbability] += top_probability;
  if (!(top_probability > 0 && top_probability <= 1)) return;  // NaN has no calibration bin
  const int bin = int(std::ceil(top_probability * metric::kCalibrationBins)) - 1;
  m[metric::kCalibrationCount + bin] += 1;
  m[metric::kCalibrationCorrect + bin] += correct;
  m[metric::kCalibrationConfidence + bin] += top_probability;
}

// The loss of one row; adds to the group's sums.
template <class T>
double row_loss(const CrossEntropyArguments& a, const T* x, int64_t target,
                const RowSums<AccumulateType<T>>& row, bool metrics, GroupSums& group) {
  const double log_sum = std::log(row.sum_exp);
  const double nll = log_sum - (double(load_one(x + target)) - double(row.max));
  double loss = nll;
  if (a.label_smoothing != 0) {
    const double mean_nll = log_sum - row.sum_shifted / double(a.classes);
    loss = (1 - a.label_smoothing) * nll + a.label_smoothing * mean_nll;
  }
  if (a.z_loss != 0) loss += a.z_loss * row.log_sum_exp() * row.log_sum_exp();
  group.loss += loss;
  if (metrics) {
    const bool correct = row.sum_exp == row.sum_exp && is_argmax(x, target, row.max);
    add_metrics(row, nll, correct, group.metrics);
  }
  return loss;
}

// The gradient of one row's logits is e^d * scale - offset, but for the target's.
template <class T>
struct RowGradient {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  static constexpr int kLanes = Simd<A>::kLanes;

  double scale;
  A offset;
  A at_target;

  RowGradient(const CrossEntropyArguments& a, double upstream, double target_logit, double max,
              double sum_exp) {
    const double log_sum = std::log(sum_exp);
    const double z_factor = 2 * a.z_loss * (max + log_sum);  // d(z_loss)/d(logit) = z_factor * p
    const double uniform = a.label_smoothing / double(a.classes);
    scale = upstream * (1 + z_factor) / sum_exp;
    offset = A(upstream * uniform);
    // p - 1 of the target as expm1(log p): exact when p is near 1, and before any rounding to T.
    const double log_p = (target_logit - max) - log_sum;
    at_target = A(upstream *
                  (std::expm1(log_p) + z_factor * std::exp(log_p) + a.label_smoothing - uniform));
  }

  // From the logits; the gradient may overwrite them.
  void write(const T* x, int64_t classes, int64_t target, A max, T* gradient) const {
    const A factor = A(scale);
    const V exp_min = V{} + kExpMin<A>;
    const auto of = [&](V v) { return exp(maximum(exp_min, v - max)) * factor - offset; };
    int64_t i = 0;
    for (; i + kLanes <= classes; i += kLanes) store(gradient + i, of(load(x + i)));
    if (i < classes) {
      store_partial(gradient + i, classes - i, of(load_partial(x + i, classes - i, 0)));
    }
    store_one(gradient + target, at_target);
  }

  // From the exponentials that the sums have kept.
  void write(const KeptRow<A>& kept, int64_t classes, int64_t target, A max, T* gradient) const {
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      const A block_max = kept.max[begin / kBlock];
      // Of a block before the first finite logit all exponentials are 0.
      const bool empty = block_max == -std::numeric_limits<A>::infinity();
      const A factor = A(scale * (empty ? 0 : std::exp(double(block_max) - double(max))));
      const int64_t end = classes - begin < kBlock ? classes : begin + kBlock;
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) {
        store(gradient + i, load(kept.exps + i) * factor - offset);
      }
      if (i < end) {
        store_partial(gradient + i, end - i, load(kept.exps + i) * factor - offset);
      }
    }
    store_one(gradient + target, at_target);
  }
};

// Calls body(group, first row, last row, scratch) over groups of rows on the thread pool. The
// groups depend on the shape alone.
struct Groups {
  int64_t rows_per_group;
  int64_t count;

  explicit Groups(const CrossEntropyArguments& a) {
    const int64_t classes = a.classes > 0 ? a.classes : 1;
    const int64_t by_size = (kGroupElements + classes - 1) / classes;
    const int64_t by_count = (a.rows + kMaxGroups - 1) / kMaxGroups;
    rows_per_group = by_size > by_count ? by_size : by_count;
    count = (a.rows + rows_per_group - 1) / rows_per_group;
  }

  // scratch: that many elements of A for each thread.
  template <class A, class Body>
  void run(const CrossEntropyArguments& a, int64_t scratch, const Body& body) const {
    parallel_queue(count, [&](WorkQueue& queue) {
      const std::unique_ptr<A[]> memory(new A[scratch]);
      for (int64_t group; (group = queue.take()) >= 0;) {
        const int64_t last = (group + 1) * rows_per_group;
        body(group, group * rows_per_group, last < a.rows ? last : a.rows, memory.get());
      }
    });
  }
};

// Adds the groups' sums in order and writes the reduced loss.
template <class A>
void reduce_groups(const CrossEntropyArguments& a, double divisor, const GroupSums* groups,
                   int64_t count, void* loss, double* metrics) {
  double total = 0;
  for (int64_t group = 0; group < count; ++group) {
    total += groups[group].loss;
    if (metrics == nullptr) continue;
    for (int i = 0; i < metric::kSize; ++i) metrics[i] += groups[group].metrics[i];
  }
  if (a.reduction == Reduction::kSum) *static_cast<A*>(loss) = A(total);
  if (a.reduction == Reduction::kMean) *static_cast<A*>(loss) = A(total / divisor);
}

template <class T>
void forward(const CrossEntropyArguments& a, double divisor, void* loss, CrossEntropyRowState state,
             double* metrics) {
  using A = AccumulateType<T>;
  const Groups groups(a);
  const std::unique_ptr<GroupSums[]> sums(new GroupSums[groups.count]);
  const bool more = a.label_smoothing != 0 || metrics != nullptr;
  groups.run<A>(a, 0, [&](int64_t group, int64_t begin, int64_t end, A*) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.logits) + r * a.row_stride;
      const int64_t target = target_at(a, r);
      RowSums<A> row;
      double value = 0;
      if (target != a.ignore_index) {
        row = reduce_row(x, a.classes, more, nullptr);
        value = row_loss(a, x, target, row, metrics != nullptr, sums[group]);
      }
      static_cast<A*>(state.max)[r] = row.max;
      state.sum_exp[r] = row.sum_exp;
      if (a.reduction == Reduction::kNone) static_cast<A*>(loss)[r] = A(value);
    }
  });
  reduce_groups<A>(a, divisor, sums.get(), groups.count, loss, metrics);
}

template <class T>
void write_zeros(T* gradient, int64_t classes) {
  std::memset(static_cast<void*>(gradient), 0, size_t(classes) * sizeof(T));
}

template <class T>
void backward(const CrossEntropyArguments& a, double mean_divisor, CrossEntropyRowState state,
              const void* grad_loss, int64_t grad_loss_stride, void* grad,
              int64_t grad_row_stride) {
  using A = AccumulateType<T>;
  const double divisor = a.reduction == Reduction::kMean ? mean_divisor : 1;
  Groups(a).run<A>(a, 0, [&](int64_t, int64_t begin, int64_t end, A*) {
    for (int64_t r = begin; r < end; ++r) {
      T* gradient = static_cast<T*>(grad) + r * grad_row_stride;
      const int64_t target = target_at(a, r);
      if (target == a.ignore_index) {
        write_zeros(gradient, a.classes);
        continue;
      }
      const T* x = static_cast<const T*>(a.logits) + r * a.row_stride;
      const A max = static_cast<const A*>(state.max)[r];
      const int64_t upstream_index = a.reduction == Reduction::kNone ? r * grad_loss_stride : 0;
      const double upstream = double(static_cast<const A*>(grad_loss)[upstream_index]) / divisor;
      RowGradient<T>(a, upstream, double(load_one(x + target)), double(max), state.sum_exp[r])
          .write(x, a.classes, target, max, gradient);
    }
  });
}

template <class T>
void fused(const CrossEntropyArguments& a, double divisor, void* loss, void* grad,
           int64_t grad_row_stride, double* metrics) {
  using A = AccumulateType<T>;
  const Groups groups(a);
  const std::unique_ptr<GroupSums[]> sums(new GroupSums[groups.count]);
  const bool more = a.label_smoothing != 0 || metrics != nullptr;
  const double upstream = a.reduction == Reduction::kMean ? 1 / divisor : 1;
  // Float32 rows wait for memory, which hides a second exp; keeping the first costs cache instead.
  constexpr bool kKeep = !std::is_same_v<T, float>;
  const auto run_group = [&](int64_t group, int64_t begin, int64_t end, A* scratch) {
    KeptRow<A> kept(scratch, a.classes);
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.logits) + r * a.row_stride;
      T* gradient = static_cast<T*>(grad) + r * grad_row_stride;
      const int64_t target = target_at(a, r);
      double value = 0;
      if (target != a.ignore_index) {
        const RowSums<A> row = reduce_row(x, a.classes, more, kKeep ? &kept : nullptr);
        value = row_loss(a, x, target, row, metrics != nullptr, sums[group]);
        const double target_logit = double(load_one(x + target));
        const RowGradient<T> row_gradient(a, upstream, target_logit, double(row.max), row.sum_exp);
        if constexpr (kKeep) {
          row_gradient.write(kept, a.classes, target, row.max, gradient);
        } else {
          row_gradient.write(x, a.classes, target, row.max, gradient);
        }
      } else {
        write_zeros(gradient, a.classes);
      }
      if (a.reduction == Reduction::kNone) static_cast<A*>(loss)[r] = A(value);
    }
  };
  groups.run<A>(a, kKeep ? KeptRow<A>::elements(a.classes) : 0, run_group);
  reduce_groups<A>(a, divisor, sums.get(), groups.count, loss, metrics);
}

// Calls body with a null pointer of the logits' element type.
template <class Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return body(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return body(static_cast<Float16*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr));
  }
  __builtin_unreachable();  // registration.cpp throws for every other dtype
}

}  // namespace

TargetCheck check_targets(const CrossEntropyArguments& a) {
  TargetCheck check{0, 0, -1};
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t target = target_at(a, r);
    if (target == a.ignore_index) continue;
    if (target < 0 || target >= a.classes) {
      check.first_invalid = r;
      return check;
    }
    ++check.tokens;
    check.weight += 1;
  }
  return check;
}

void cross_entropy_forward(const CrossEntropyArguments& a, double divisor, void* loss,
                           CrossEntropyRowState state, double* metrics, double*) {
  dispatch(a.dtype, [&]<class T>(T*) { forward<T>(a, divisor, loss, state, metrics); });
}

void cross_entropy_backward(const CrossEntropyArguments& a, double divisor,
                            CrossEntropyRowState state, const void* grad_loss,
                            int64_t grad_loss_stride, void* grad, int64_t grad_row_stride) {
  dispatch(a.dtype, [&]<class T>(T*) {
    backward<T>(a, divisor, state, grad_loss, grad_loss_stride, grad, grad_row_stride);
  });
}

void cross_entropy_fused(const CrossEntropyArguments& a, double divisor, void* loss, void* grad,
                         int64_t grad_row_stride, double* metrics, double*) {
  dispatch(a.dtype,
           [&]<class T>(T*) { fused<T>(a, divisor, loss, grad, grad_row_stride, metrics); });
}

}  // namespace pyvizllm::CPU_CAPABILITY
