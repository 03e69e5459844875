// Softmax cross-entropy over rows of logits: loss, metrics and gradient.
//
// forward   reads the logits once from memory (twice from cache) and writes per row the loss, the
//           maximum and the sum of exp(logit - maximum); probabilities are never stored.
// backward  reads the logits once and writes the gradient once.
// fused     both in one: the row is still in cache when its gradient is written, so memory sees one
//           read and one write of classes * sizeof(T) bytes a row. The gradient may overwrite the
//           logits.
//
// All arithmetic is float32 (float64 for float64 input) with float64 sums over blocks, and rounds
// once on output. Rows are cut into groups that depend on the shape alone and group results are
// added in order: results are the same for any number of threads.
#include <limits>
#include <memory>

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

// kSmooth: also sum d (label smoothing). kMetrics: also sum d e^d (entropy).
template <bool kSmooth, bool kMetrics, class T>
void add_block(const T* x, int64_t count, int64_t before, RowSums<AccumulateType<T>>& row) {
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
    if constexpr (kMetrics) sum_exp_shifted += e * bounded;
    if constexpr (kSmooth) {
      if (lanes == Simd<A>::kLanes) {
        sum_shifted += distance;
      } else {
        for (int lane = 0; lane < lanes; ++lane) sum_shifted[lane] += distance[lane];
      }
    }
  });
  row.sum_exp += sum_lanes(sum_exp);
  if constexpr (kMetrics) row.sum_exp_shifted += sum_lanes(sum_exp_shifted);
  if constexpr (kSmooth) row.sum_shifted += sum_lanes(sum_shifted);
}

template <bool kSmooth, bool kMetrics, class T>
RowSums<AccumulateType<T>> reduce_row(const T* x, int64_t classes) {
  RowSums<AccumulateType<T>> row;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t count = classes - begin < kBlock ? classes - begin : kBlock;
    add_block<kSmooth, kMetrics>(x + begin, count, begin, row);
  }
  return row;
}

template <class T>
RowSums<AccumulateType<T>> reduce_row(const T* x, int64_t classes, bool smooth, bool metrics) {
  if (smooth) {
    return metrics ? reduce_row<true, true>(x, classes) : reduce_row<true, false>(x, classes);
  }
  return metrics ? reduce_row<false, true>(x, classes) : reduce_row<false, false>(x, classes);
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

// Writes upstream * d(loss)/d(logits) of one row. The gradient may be the logits themselves.
template <class T>
void write_row_gradient(const CrossEntropyArguments& a, const T* x, int64_t target, double upstream,
                        double max, double sum_exp, T* gradient) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  constexpr int kLanes = Simd<A>::kLanes;
  const double log_sum = std::log(sum_exp);
  const double z_factor = 2 * a.z_loss * (max + log_sum);  // d(z_loss)/d(logit) = z_factor * p
  const double uniform = a.label_smoothing / double(a.classes);

  // p - 1 of the target as expm1(log p): exact when p is near 1, and before any rounding to T.
  const double log_p = (double(load_one(x + target)) - max) - log_sum;
  const double target_gradient =
      upstream * (std::expm1(log_p) + z_factor * std::exp(log_p) + a.label_smoothing - uniform);

  const A scale = A(upstream * (1 + z_factor) / sum_exp);
  const A offset = A(upstream * uniform);
  const A reference = A(max);
  const V exp_min = V{} + kExpMin<A>;
  const auto gradient_of = [&](V v) {
    return exp(maximum(exp_min, v - reference)) * scale - offset;
  };
  int64_t i = 0;
  for (; i + kLanes <= a.classes; i += kLanes) store(gradient + i, gradient_of(load(x + i)));
  if (i < a.classes) {
    store_partial(gradient + i, a.classes - i, gradient_of(load_partial(x + i, a.classes - i, 0)));
  }
  store_one(gradient + target, A(target_gradient));
}

// Calls body(group, first row, last row) over groups of rows on the thread pool. The groups depend
// on the shape alone.
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

  template <class Body>
  void run(const CrossEntropyArguments& a, const Body& body) const {
    parallel_queue(count, [&](WorkQueue& queue) {
      for (int64_t group; (group = queue.take()) >= 0;) {
        const int64_t last = (group + 1) * rows_per_group;
        body(group, group * rows_per_group, last < a.rows ? last : a.rows);
      }
    });
  }
};

// Adds the groups' sums in order and writes the reduced loss.
template <class A>
void reduce_groups(const CrossEntropyArguments& a, int64_t tokens, const GroupSums* groups,
                   int64_t count, void* loss, double* metrics) {
  double total = 0;
  for (int64_t group = 0; group < count; ++group) {
    total += groups[group].loss;
    if (metrics == nullptr) continue;
    for (int i = 0; i < metric::kSize; ++i) metrics[i] += groups[group].metrics[i];
  }
  if (a.reduction == Reduction::kSum) *static_cast<A*>(loss) = A(total);
  if (a.reduction == Reduction::kMean) *static_cast<A*>(loss) = A(total / double(tokens));
}

template <class T>
void forward(const CrossEntropyArguments& a, int64_t tokens, void* loss, CrossEntropyRowState state,
             double* metrics) {
  using A = AccumulateType<T>;
  const Groups groups(a);
  const std::unique_ptr<GroupSums[]> sums(new GroupSums[groups.count]);
  const bool smooth = a.label_smoothing != 0;
  groups.run(a, [&](int64_t group, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.logits) + r * a.row_stride;
      const int64_t target = target_at(a, r);
      RowSums<A> row;
      double value = 0;
      if (target != a.ignore_index) {
        row = reduce_row(x, a.classes, smooth, metrics != nullptr);
        value = row_loss(a, x, target, row, metrics != nullptr, sums[group]);
      }
      static_cast<A*>(state.max)[r] = row.max;
      state.sum_exp[r] = row.sum_exp;
      if (a.reduction == Reduction::kNone) static_cast<A*>(loss)[r] = A(value);
    }
  });
  reduce_groups<A>(a, tokens, sums.get(), groups.count, loss, metrics);
}

template <class T>
void backward(const CrossEntropyArguments& a, int64_t tokens, CrossEntropyRowState state,
              const void* grad_loss, int64_t grad_loss_stride, void* grad,
              int64_t grad_row_stride) {
  using A = AccumulateType<T>;
  const double divisor = a.reduction == Reduction::kMean ? double(tokens) : 1;
  Groups(a).run(a, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* gradient = static_cast<T*>(grad) + r * grad_row_stride;
      const int64_t target = target_at(a, r);
      if (target == a.ignore_index) {
        std::memset(static_cast<void*>(gradient), 0, size_t(a.classes) * sizeof(T));
        continue;
      }
      const T* x = static_cast<const T*>(a.logits) + r * a.row_stride;
      const int64_t upstream_index = a.reduction == Reduction::kNone ? r * grad_loss_stride : 0;
      const double upstream = double(static_cast<const A*>(grad_loss)[upstream_index]) / divisor;
      write_row_gradient(a, x, target, upstream, double(static_cast<const A*>(state.max)[r]),
                         state.sum_exp[r], gradient);
    }
  });
}

template <class T>
void fused(const CrossEntropyArguments& a, int64_t tokens, void* loss, void* grad,
           int64_t grad_row_stride, double* metrics) {
  using A = AccumulateType<T>;
  const Groups groups(a);
  const std::unique_ptr<GroupSums[]> sums(new GroupSums[groups.count]);
  const bool smooth = a.label_smoothing != 0;
  const double upstream = a.reduction == Reduction::kMean ? 1 / double(tokens) : 1;
  groups.run(a, [&](int64_t group, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(a.logits) + r * a.row_stride;
      T* gradient = static_cast<T*>(grad) + r * grad_row_stride;
      const int64_t target = target_at(a, r);
      double value = 0;
      if (target != a.ignore_index) {
        const RowSums<A> row = reduce_row(x, a.classes, smooth, metrics != nullptr);
        value = row_loss(a, x, target, row, metrics != nullptr, sums[group]);
        write_row_gradient(a, x, target, upstream, double(row.max), row.sum_exp, gradient);
      } else {
        std::memset(static_cast<void*>(gradient), 0, size_t(a.classes) * sizeof(T));
      }
      if (a.reduction == Reduction::kNone) static_cast<A*>(loss)[r] = A(value);
    }
  });
  reduce_groups<A>(a, tokens, sums.get(), groups.count, loss, metrics);
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
  TargetCheck check{0, -1};
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t target = target_at(a, r);
    if (target == a.ignore_index) continue;
    if (target < 0 || target >= a.classes) {
      check.first_invalid = r;
      return check;
    }
    ++check.tokens;
  }
  return check;
}

void cross_entropy_forward(const CrossEntropyArguments& a, int64_t tokens, void* loss,
                           CrossEntropyRowState state, double* metrics) {
  dispatch(a.dtype, [&]<class T>(T*) { forward<T>(a, tokens, loss, state, metrics); });
}

void cross_entropy_backward(const CrossEntropyArguments& a, int64_t tokens,
                            CrossEntropyRowState state, const void* grad_loss,
                            int64_t grad_loss_stride, void* grad, int64_t grad_row_stride) {
  dispatch(a.dtype, [&]<class T>(T*) {
    backward<T>(a, tokens, state, grad_loss, grad_loss_stride, grad, grad_row_stride);
  });
}

void cross_entropy_fused(const CrossEntropyArguments& a, int64_t tokens, void* loss, void* grad,
                         int64_t grad_row_stride, double* metrics) {
  dispatch(a.dtype,
           [&]<class T>(T*) { fused<T>(a, tokens, loss, grad, grad_row_stride, metrics); });
}

}  // namespace pyvizllm::CPU_CAPABILITY
