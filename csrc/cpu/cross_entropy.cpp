// Softmax cross-entropy over rows of logits: loss, metrics and gradient.
//
// forward   reads the logits once from memory (twice from cache) and writes per row the loss, the
//           maximum and the sum of exp(logit - maximum); probabilities are never stored.
// backward  reads the logits once and writes the gradient once.
// fused     both in one: the row's exponentials are still in cache when its gradient is written, so
//           memory sees one read and one write of classes * sizeof(T) bytes a row. The gradient may
//           overwrite the logits.
//
// Targets that are probabilities are read once more, classes * sizeof(T) bytes a row. A scale, a
// cap and metrics cost no memory traffic.
//
// All arithmetic is float32 (float64 for float64 input) with float64 sums over blocks, and rounds
// once on output. Rows are cut into groups that depend on the shape alone and group results are
// added in order: results are the same for any number of threads.
#include <memory>
#include <type_traits>

#include "../kernels.h"
#include "cross_entropy_gradient.h"
#include "cross_entropy_groups.h"
#include "cross_entropy_loss.h"
#include "cross_entropy_positions.h"
#include "cross_entropy_row_sums.h"
#include "simd.h"

namespace pyvizllm::CPU_CAPABILITY {
namespace {

template <class T, class Logits>
void forward(const CrossEntropyArguments& a, double divisor, void* loss, CrossEntropyRowState state,
             double* metrics, double* records) {
  using A = AccumulateType<T>;
  const Groups groups(a.rows, a.classes);
  const std::unique_ptr<GroupSums[]> sums(new GroupSums[groups.count]);
  const Problem<T, Logits> problem(a, metrics != nullptr, records);
  groups.run<A>(kRowBlock, [&](int64_t group, int64_t begin, int64_t end, A* scratch) {
    Coefficients<T> coefficients(a, scratch);
    for (int64_t r = begin; r < end; ++r) {
      const RowTarget<A> target = problem.target_of(r, coefficients);
      RowSums<A> row;
      double value = 0;
      if (target.counts) {
        row = problem.reader.template read<false>(problem.logits_of(r), target.index, coefficients,
                                                  nullptr);
        value = problem.row_loss(r, target, row, sums[group]);
      } else {
        problem.record_ignored(r);
      }
      problem.write_state(row, r, state);
      problem.write_loss(value, r, loss);
    }
  });
  reduce_groups<A>(a, divisor, sums.get(), groups.count, loss, metrics);
}

template <class T>
void write_zeros(T* gradient, int64_t classes) {
  std::memset(static_cast<void*>(gradient), 0, size_t(classes) * sizeof(T));
}

template <class T, class Logits>
void backward(const CrossEntropyArguments& a, double mean_divisor, CrossEntropyRowState state,
              const void* grad_loss, int64_t grad_loss_stride, void* grad,
              int64_t grad_row_stride) {
  using A = AccumulateType<T>;
  const double divisor = a.reduction == Reduction::kMean ? mean_divisor : 1;
  const Problem<T, Logits> problem(a, false, nullptr);
  Groups(a.rows, a.classes).run<A>(kRowBlock, [&](int64_t, int64_t begin, int64_t end, A* scratch) {
    Coefficients<T> coefficients(a, scratch);
    for (int64_t r = begin; r < end; ++r) {
      T* gradient = static_cast<T*>(grad) + r * grad_row_stride;
      const RowTarget<A> target = problem.target_of(r, coefficients);
      if (!target.counts) {
        write_zeros(gradient, a.classes);
        continue;
      }
      const A max = static_cast<const A*>(state.max)[r];
      const double upstream = problem.upstream_of(r, grad_loss, grad_loss_stride) / divisor;
      const RowSoftmax<Logits> row{problem.reader.logits.reference_at(max), state.sum_exp[r],
                                   problem.coefficient_sum(target, coefficients)};
      problem.gradient(target, coefficients, upstream, row)
          .write(problem.logits_of(r), row.reference, gradient);
    }
  });
}

template <class T, class Logits>
void fused(const CrossEntropyArguments& a, double divisor, void* loss, void* grad,
           int64_t grad_row_stride, double* metrics, double* records) {
  using A = AccumulateType<T>;
  const Groups groups(a.rows, a.classes);
  const std::unique_ptr<GroupSums[]> sums(new GroupSums[groups.count]);
  const Problem<T, Logits> problem(a, metrics != nullptr, records);
  const double upstream = a.reduction == Reduction::kMean ? 1 / divisor : 1;
  // Exponentials are kept where the gradient will be, if they fit there and nobody reads the logits
  // again, which may be there, too: then they cost no cache.
  const bool again = a.probabilities != nullptr || (Logits::kCapped && a.label_smoothing != 0);
  const bool kept_in_gradient = std::is_same_v<T, A> && !again;
  const int64_t kept_elements = kept_in_gradient ? 0 : a.classes;
  const auto run_group = [&](int64_t group, int64_t begin, int64_t end, A* scratch) {
    Coefficients<T> coefficients(a, scratch);
    KeptRow<A> kept{scratch + kRowBlock, scratch + kRowBlock + kept_elements};
    for (int64_t r = begin; r < end; ++r) {
      const T* x = problem.logits_of(r);
      T* gradient = static_cast<T*>(grad) + r * grad_row_stride;
      if constexpr (std::is_same_v<T, A>) {
        if (kept_in_gradient) kept.exps = gradient;
      }
      const RowTarget<A> target = problem.target_of(r, coefficients);
      double value = 0;
      if (target.counts) {
        const RowSums<A> row =
            problem.reader.template read<true>(x, target.index, coefficients, &kept);
        value = problem.row_loss(r, target, row, sums[group]);
        const RowSoftmax<Logits> softmax{problem.reader.logits.reference(row.max_key), row.sum_exp,
                                         problem.coefficient_sum(target, row)};
        problem.gradient(target, coefficients, upstream, softmax)
            .write(x, kept, row.max_key, gradient);
      } else {
        write_zeros(gradient, a.classes);
        problem.record_ignored(r);
      }
      problem.write_loss(value, r, loss);
    }
  };
  groups.run<A>(kRowBlock + kept_elements + block_count(a.classes), run_group);
  reduce_groups<A>(a, divisor, sums.get(), groups.count, loss, metrics);
}

// Calls body.operator()<T>() for the logits' element type.
template <class Body>
void dispatch_type(const CrossEntropyArguments& a, const Body& body) {
  switch (a.dtype) {
    case DType::kFloat32:
      return body.template operator()<float>();
    case DType::kFloat64:
      return body.template operator()<double>();
    case DType::kFloat16:
      return body.template operator()<Float16>();
    case DType::kBFloat16:
      return body.template operator()<BFloat16>();
  }
  __builtin_unreachable();  // registration.cpp throws for every other dtype
}

// Calls body.operator()<T, Logits>(), where Logits is what becomes of them.
template <class Body>
void dispatch(const CrossEntropyArguments& a, const Body& body) {
  dispatch_type(a, [&]<class T>() {
    using A = AccumulateType<T>;
    if (a.softcap != 0) return body.template operator()<T, CappedLogits<A>>();
    if (a.logit_scale != 1) return body.template operator()<T, ScaledLogits<A>>();
    return body.template operator()<T, PlainLogits<A>>();
  });
}

// Rows of fewer classes than this are read side by side: alone they leave lanes empty, and what
// follows from their sums is as long as the sums.
constexpr int64_t kFewClasses = 48;

// Whether the lanes of vectors are positions: of images, or rows of few classes. Those become the
// positions of one batch. layouts: where the gradient's rows are that far apart.
bool has_positions(CrossEntropyArguments& a, int64_t grad_row_stride, Layouts& layouts) {
  if (a.rows == 0) return false;
  if (a.positions != 0) {
    layouts.logits = {a.batch_stride, a.class_stride, 1};
    layouts.gradient = {a.classes * a.positions, a.positions, 1};
    return true;
  }
  const bool plain = a.target != nullptr && a.softcap == 0 && a.logit_scale == 1;
  const bool few = a.classes > 0 && a.classes < kFewClasses;
  if (!plain || !few || a.total_classes != 0) return false;
  a.positions = a.rows;
  layouts.logits = {0, 1, a.row_stride};
  layouts.gradient = {0, 1, grad_row_stride};
  return true;
}

}  // namespace

TargetCheck check_rows(const CrossEntropyArguments& a, int64_t begin, int64_t end) {
  TargetCheck check{0, 0, -1};
  for (int64_t r = begin; r < end; ++r) {
    const int64_t target = target_at(a, r);
    if (target == a.ignore_index) continue;
    if (is_elsewhere(a, target) && a.total_classes == 0) {
      check.first_invalid = r;
      return check;
    }
    ++check.tokens;
    check.weight += class_weight(a, target);
  }
  return check;
}

TargetCheck check_targets(const CrossEntropyArguments& a) {
  const Groups groups(a.rows, 1);
  if (groups.count <= 1) return check_rows(a, 0, a.rows);
  const std::unique_ptr<TargetCheck[]> checks(new TargetCheck[groups.count]);
  groups.run<char>(0, [&](int64_t group, int64_t begin, int64_t end, char*) {
    checks[group] = check_rows(a, begin, end);
  });
  TargetCheck all{0, 0, -1};
  for (int64_t group = 0; group < groups.count; ++group) {
    if (checks[group].first_invalid >= 0) return checks[group];
    all.tokens += checks[group].tokens;
    all.weight += checks[group].weight;
  }
  return all;
}

void cross_entropy_forward(const CrossEntropyArguments& arguments, double divisor, void* loss,
                           CrossEntropyRowState state, double* metrics, double* records) {
  CrossEntropyArguments a = arguments;
  Layouts layouts;
  if (has_positions(a, 0, layouts)) {
    return dispatch_type(a, [&]<class T>() {
      loss_positions<T, false>(a, layouts, divisor, loss, state, nullptr, metrics, records);
    });
  }
  dispatch(a, [&]<class T, class Logits>() {
    forward<T, Logits>(a, divisor, loss, state, metrics, records);
  });
}

void cross_entropy_backward(const CrossEntropyArguments& arguments, double divisor,
                            CrossEntropyRowState state, const void* grad_loss,
                            int64_t grad_loss_stride, void* grad, int64_t grad_row_stride) {
  CrossEntropyArguments a = arguments;
  Layouts layouts;
  if (has_positions(a, grad_row_stride, layouts)) {
    return dispatch_type(a, [&]<class T>() {
      backward_positions<T>(a, layouts, divisor, state, grad_loss, grad_loss_stride, grad);
    });
  }
  dispatch(a, [&]<class T, class Logits>() {
    backward<T, Logits>(a, divisor, state, grad_loss, grad_loss_stride, grad, grad_row_stride);
  });
}

void cross_entropy_fused(const CrossEntropyArguments& arguments, double divisor, void* loss,
                         void* grad, int64_t grad_row_stride, double* metrics, double* records) {
  CrossEntropyArguments a = arguments;
  Layouts layouts;
  if (has_positions(a, grad_row_stride, layouts)) {
    return dispatch_type(a, [&]<class T>() {
      loss_positions<T, true>(a, layouts, divisor, loss, {}, grad, metrics, records);
    });
  }
  dispatch(a, [&]<class T, class Logits>() {
    fused<T, Logits>(a, divisor, loss, grad, grad_row_stride, metrics, records);
  });
}

}  // namespace pyvizllm::CPU_CAPABILITY
