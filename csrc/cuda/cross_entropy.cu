// Softmax cross-entropy over rows of logits on the GPU: loss, metrics and gradient.
//
// forward   reads the logits once, classes * sizeof(T) bytes a row, and writes per row the loss,
//           the maximum and the sum of exp(logit - maximum); probabilities are never stored.
// backward  reads the logits once and writes the gradient once.
// fused     both in one launch: the row that was just reduced is read again, from L2 where it fits,
//           and its gradient written, over the logits if asked. Memory sees one read and one write.
//
// One block works on one row at a time. A thread takes tiles of four vectors: first the tile's
// maximum, then its sums relative to the running maximum in float32 (float64 for float64 input),
// which are added to float64 sums; everything rounds once on output. Blocks add up the loss and the
// metrics of their rows, and a second kernel adds the blocks: no floating-point atomics, and an
// order that depends on the number of rows alone. Nothing waits for the host.
#undef NDEBUG  // the check of the targets is an assertion, as in torch
#include <cassert>
#include <cmath>
#include <limits>

#include "../kernels.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace pyvizllm {
namespace {

// Vectors in flight per thread: the more the better for memory, until ptxas spills.
template <class T>
constexpr int kTileVectors = sizeof(T) == 8 ? 2 : 4;
constexpr int kGradientVectors = 2;
constexpr int64_t kMaxGroups = 4096;  // blocks, hence partial sums, of one launch

constexpr int kLossColumn = metric::kSize;
constexpr int kColumns = metric::kSize + 1;

// What the blocks leave to the second kernel: sums over the rows of each.
struct Workspace {
  unsigned long long tokens;  // only where the gradient needs it
  double groups[1];           // [groups, kColumns]
};

int64_t groups_of(int64_t rows) {
  return rows < kMaxGroups ? rows : kMaxGroups;
}

__device__ __forceinline__ float exponential(float x) {
  return expf(x);
}
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}

// The lower bound of exponents: exp rounds to zero from here on. Keeps d * e^d from being -Inf * 0.
template <class A>
constexpr A kExpMin = sizeof(A) == 8 ? A(-746) : A(-105);

template <class A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

// Where a row is all -Inf so far, distances are taken from 0: (-Inf) - (-Inf) would be NaN.
template <class A>
__device__ __forceinline__ A reference_of(A max) {
  return max == kMinusInfinity<A> ? A(0) : max;
}

// Of two equal or one NaN, b: a NaN never becomes the maximum, it poisons the sums.
template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return a > b ? a : b;
}

// Sums over some of a row's elements, relative to their maximum.
template <class A>
struct RowSums {
  A max;
  A max_before_target;
  double sum_exp;          // sum of e^d, d = logit - max
  double sum_exp_shifted;  // sum of d e^d, for the entropy
  double sum_shifted;      // sum of d, for label smoothing
  int64_t count;           // elements in sum_shifted

  __device__ double log_sum_exp() const { return double(max) + log(sum_exp); }

  // Makes the sums relative to another maximum, if that is larger.
  __device__ __forceinline__ void rebase(A other) {
    if (!(other > max)) return;
    const double delta = double(reference_of(max)) - double(reference_of(other));
    if (sum_exp != 0) {  // else the sums are empty, and 0 * exp(delta) may be 0 * Inf
      const double factor = double(exponential(A(delta)));
      sum_exp_shifted = factor * (sum_exp_shifted + delta * sum_exp);
      sum_exp *= factor;
    }
    if (count > 0) sum_shifted += delta * double(count);
    max = other;
  }
};

template <class A>
struct Maxima {
  A max;
  A before_target;
};

struct Sums {
  double exp;
  double exp_shifted;
  double shifted;
};

template <class T>
__device__ __forceinline__ void add_tile(const Tile<T, kTileVectors<T>>& tile, int64_t target,
                                         bool smooth, bool metrics,
                                         RowSums<AccumulateType<T>>& row) {
  using A = AccumulateType<T>;
  constexpr int kSize = Tile<T, kTileVectors<T>>::kSize;
  A max = kMinusInfinity<A>;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    max = larger(tile.get(i), max);
  }
  row.rebase(max);

  const A reference = reference_of(row.max);
  A sum_exp = 0, sum_exp_shifted = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const A distance = tile.get(i) - reference;
    const A bounded = distance < kExpMin<A> ? kExpMin<A> : distance;  // a NaN stays
    const A e = exponential(bounded);
    sum_exp += e;
    sum_exp_shifted += e * bounded;
  }
  row.sum_exp += double(sum_exp);
  row.sum_exp_shifted += double(sum_exp_shifted);

  if (smooth) {
    A sum_shifted = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (!tile.holds(i)) continue;
      sum_shifted += tile.get(i) - reference;
      ++row.count;
    }
    row.sum_shifted += double(sum_shifted);
  }
  if (!metrics || tile.begin >= target) return;
  if (tile.index(kSize - 1) < target) {
    row.max_before_target = larger(max, row.max_before_target);
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (tile.index(i) >= target) continue;
    row.max_before_target = larger(tile.get(i), row.max_before_target);
  }
}

// The sums over a whole row, in every thread of the block.
template <class T>
__device__ __forceinline__ RowSums<AccumulateType<T>> reduce_row(const T* x, int64_t classes,
                                                                 int64_t target, bool smooth,
                                                                 bool metrics) {
  using A = AccumulateType<T>;
  RowSums<A> row = {kMinusInfinity<A>, kMinusInfinity<A>, 0, 0, 0, 0};
  for_each_tile<kTileVectors<T>>(x, classes, kMinusInfinity<A>, [&](const auto& tile) {
    add_tile(tile, target, smooth, metrics, row);
  });
  const auto maxima = block_reduce(
      Maxima<A>{row.max, row.max_before_target}, [](const Maxima<A>& a, const Maxima<A>& b) {
        return Maxima<A>{larger(a.max, b.max), larger(a.before_target, b.before_target)};
      });
  row.rebase(maxima.max);
  const auto sums = block_reduce(
      Sums{row.sum_exp, row.sum_exp_shifted, row.sum_shifted}, [](const Sums& a, const Sums& b) {
        return Sums{a.exp + b.exp, a.exp_shifted + b.exp_shifted, a.shifted + b.shifted};
      });
  return {maxima.max, maxima.before_target, sums.exp, sums.exp_shifted, sums.shifted, classes};
}

// -- One row's results, computed by one thread ---------------------------------------------------

__device__ __forceinline__ int64_t target_at(const CrossEntropyArguments& a, int64_t row) {
  return a.target_is_int64 ? static_cast<const int64_t*>(a.target)[row]
                           : static_cast<const int32_t*>(a.target)[row];
}

template <class A>
__device__ void add_metrics(const RowSums<A>& row, double negative_log_likelihood, bool correct,
                            double* m) {
  const double top_probability = 1 / row.sum_exp;
  m[metric::kCorrect] += correct;
  m[metric::kNegativeLogLikelihood] += negative_log_likelihood;
  m[metric::kEntropy] += log(row.sum_exp) - row.sum_exp_shifted / row.sum_exp;
  m[metric::kLogSumExp] += row.log_sum_exp();
  m[metric::kTopProbability] += top_probability;
  if (!(top_probability > 0 && top_probability <= 1)) return;  // NaN has no calibration bin
  const int bin = int(ceil(top_probability * metric::kCalibrationBins)) - 1;
  m[metric::kCalibrationCount + bin] += 1;
  m[metric::kCalibrationCorrect + bin] += correct;
  m[metric::kCalibrationConfidence + bin] += top_probability;
}

// The loss of one row; adds to the block's sums [kColumns].
template <class A>
__device__ double row_loss(const CrossEntropyArguments& a, A logit_of_target, int64_t target,
                           const RowSums<A>& row, bool metrics, double* group) {
  const double log_sum = log(row.sum_exp);
  const double nll = log_sum - (double(logit_of_target) - double(row.max));
  double loss = nll;
  if (a.label_smoothing != 0) {
    const double mean_nll = log_sum - row.sum_shifted / double(a.classes);
    loss = (1 - a.label_smoothing) * nll + a.label_smoothing * mean_nll;
  }
  if (a.z_loss != 0) loss += a.z_loss * row.log_sum_exp() * row.log_sum_exp();
  group[kLossColumn] += loss;
  group[metric::kTokens] += 1;
  if (metrics) {
    // The argmax is the first of equal maxima, so that constant rows are not all correct.
    const bool first = row.max_before_target < row.max || target == 0;
    const bool correct = row.sum_exp == row.sum_exp && logit_of_target == row.max && first;
    add_metrics(row, nll, correct, group);
  }
  return loss;
}

// d(loss)/d(logit) = e^(logit - reference) * scale - offset, but for the target's.
template <class A>
struct RowGradient {
  A reference;
  A scale;
  A offset;
  A of_target;
};

template <class A>
__device__ RowGradient<A> row_gradient(const CrossEntropyArguments& a, A logit_of_target,
                                       double upstream, A max, double sum_exp) {
  const double log_sum = log(sum_exp);
  const double z_factor = 2 * a.z_loss * (double(max) + log_sum);  // d(z_loss)/d(logit) / p
  const double uniform = a.label_smoothing / double(a.classes);
  // p - 1 of the target as expm1(log p): exact when p is near 1, and before any rounding to T.
  const double log_p = (double(logit_of_target) - double(max)) - log_sum;
  const double of_target = expm1(log_p) + z_factor * exp(log_p) + a.label_smoothing - uniform;
  return {max, A(upstream * (1 + z_factor) / sum_exp), A(upstream * uniform),
          A(upstream * of_target)};
}

// Every thread of the block must call it. `gradient` may be x itself.
template <class T>
__device__ __forceinline__ void write_row_gradient(const T* x, T* gradient, int64_t classes,
                                                   int64_t target,
                                                   const RowGradient<AccumulateType<T>>& g) {
  using A = AccumulateType<T>;
  constexpr int kLanes = Vector<T>::kLanes;
  for_each_tile<kGradientVectors>(x, classes, A(0), [&](const auto& tile) {
#pragma unroll
    for (int v = 0; v < kGradientVectors; ++v) {
      Vector<T> out = {};
      const int64_t index = tile.index(v * kLanes);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const A distance = tile.vectors[v].get(lane) - g.reference;
        const A bounded = distance < kExpMin<A> ? kExpMin<A> : distance;
        const A value = exponential(bounded) * g.scale - g.offset;
        out.set(lane, index + lane == target ? g.of_target : value);
      }
      store_lanes(gradient + index, tile.lanes(v), out);
    }
  });
}

template <class T>
__device__ __forceinline__ void zero_row(T* gradient, int64_t classes) {
  for (int64_t i = threadIdx.x; i < classes; i += kThreads) {
    gradient[i] = round_to<T>(0);
  }
}

// Written and read by thread 0 alone: no barrier.
__device__ __forceinline__ void clear(double* group) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < kColumns; ++i) group[i] = 0;
}
__device__ __forceinline__ void write_group(const double* group, double* groups) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < kColumns; ++i) groups[int64_t(blockIdx.x) * kColumns + i] = group[i];
}

// -- Kernels -------------------------------------------------------------------------------------

// Adds the number of rows that count to *tokens, which is zero before.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    cross_entropy_count_kernel(const __grid_constant__ CrossEntropyArguments a,
                               unsigned long long* tokens) {
  unsigned long long count = 0;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x; r < a.rows; r += step) {
    count += target_at(a, r) != a.ignore_index;
  }
  count = block_reduce(count, Add());
  if (threadIdx.x == 0) atomicAdd(tokens, count);  // of integers: exact in any order
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyArguments a, bool metrics,
                                 AccumulateType<T>* loss,     // [rows], or null
                                 AccumulateType<T>* row_max,  // [rows]
                                 double* row_sum,             // [rows]
                                 double* groups) {            // [gridDim.x, kColumns]
  using A = AccumulateType<T>;
  __shared__ double group[kColumns];
  clear(group);
  for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const T* x = static_cast<const T*>(a.logits) + r * a.row_stride;
    const int64_t target = target_at(a, r);
    RowSums<A> row = {kMinusInfinity<A>, kMinusInfinity<A>, 0, 0, 0, 0};
    double value = 0;
    if (target != a.ignore_index) {
      assert(target >= 0 && target < a.classes);
      row = reduce_row(x, a.classes, target, a.label_smoothing != 0, metrics);
      if (threadIdx.x == 0) value = row_loss(a, widen(x[target]), target, row, metrics, group);
    }
    if (threadIdx.x != 0) continue;
    row_max[r] = row.max;
    row_sum[r] = row.sum_exp;
    if (loss != nullptr) loss[r] = A(value);
  }
  write_group(group, groups);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyArguments a,
                                  const unsigned long long* tokens,    // [] for the mean, or null
                                  const AccumulateType<T>* row_max,    // [rows]
                                  const double* row_sum,               // [rows]
                                  const AccumulateType<T>* grad_loss,  // [] or [rows]
                                  int64_t grad_loss_stride,            // 0 for []
                                  T* grad, int64_t grad_row_stride) {  // [rows, classes]
  using A = AccumulateType<T>;
  __shared__ RowGradient<A> shared;
  for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const T* x = static_cast<const T*>(a.logits) + r * a.row_stride;
    T* gradient = grad + r * grad_row_stride;
    const int64_t target = target_at(a, r);
    if (target == a.ignore_index) {
      zero_row(gradient, a.classes);
      continue;
    }
    assert(target >= 0 && target < a.classes);
    __syncthreads();  // slow threads may still read what was shared for the row before
    if (threadIdx.x == 0) {
      const double divisor = tokens != nullptr ? double(*tokens) : 1;
      const double upstream = double(grad_loss[r * grad_loss_stride]) / divisor;
      shared = row_gradient(a, widen(x[target]), upstream, row_max[r], row_sum[r]);
    }
    __syncthreads();
    write_row_gradient(x, gradient, a.classes, target, shared);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    cross_entropy_fused_kernel(const __grid_constant__ CrossEntropyArguments a, bool metrics,
                               const unsigned long long* tokens,  // [] for the mean, or null
                               AccumulateType<T>* loss,           // [rows], or null
                               T* grad, int64_t grad_row_stride,  // [rows, classes], may be logits
                               double* groups) {                  // [gridDim.x, kColumns]
  using A = AccumulateType<T>;
  __shared__ double group[kColumns];
  __shared__ RowGradient<A> shared;
  clear(group);
  const double upstream = tokens != nullptr ? 1 / double(*tokens) : 1;
  for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const T* x = static_cast<const T*>(a.logits) + r * a.row_stride;
    T* gradient = grad + r * grad_row_stride;
    const int64_t target = target_at(a, r);
    double value = 0;
    if (target == a.ignore_index) {
      zero_row(gradient, a.classes);
    } else {
      assert(target >= 0 && target < a.classes);
      const RowSums<A> row = reduce_row(x, a.classes, target, a.label_smoothing != 0, metrics);
      if (threadIdx.x == 0) {
        // Also read before the barrier: the target's logit, which the gradient may overwrite. What
        // was shared for the row before is read no more: reduce_row has barriers.
        const A logit_of_target = widen(x[target]);
        value = row_loss(a, logit_of_target, target, row, metrics, group);
        shared = row_gradient(a, logit_of_target, upstream, row.max, row.sum_exp);
      }
      __syncthreads();
      write_row_gradient(x, gradient, a.classes, target, shared);
    }
    if (threadIdx.x == 0 && loss != nullptr) loss[r] = A(value);
  }
  write_group(group, groups);
}

// Adds the groups in a fixed order. Block i < kSize writes metric i, the last the reduced loss.
template <class A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    cross_entropy_reduce_kernel(const double* groups,  // [count, kColumns]
                                int64_t count, bool mean,
                                A* loss,            // [], or null
                                double* metrics) {  // [metric::kSize], or null
  const auto column = [&](int index) {
    double sum = 0;
    for (int64_t g = threadIdx.x; g < count; g += kThreads) sum += groups[g * kColumns + index];
    return block_reduce(sum, Add());
  };
  const int index = metrics != nullptr ? int(blockIdx.x) : kLossColumn;
  const double sum = column(index);
  const double divisor = mean ? column(metric::kTokens) : 1;
  if (threadIdx.x != 0) return;
  if (index < metric::kSize) {
    metrics[index] = sum;
  } else if (loss != nullptr) {
    *loss = A(sum / divisor);
  }
}

// -- Host functions ------------------------------------------------------------------------------

// Calls body with a null pointer of the logits' element type.
template <class Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return body(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return body(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
  }
  throw std::runtime_error("cross_entropy: expected a dtype that has a kernel");
}

// The number of tokens that count, on the device, where the reduction divides by it; else null.
const unsigned long long* count_tokens(const CrossEntropyArguments& a, Workspace* workspace,
                                       void* stream) {
  if (a.reduction != Reduction::kMean) return nullptr;
  unsigned long long* tokens = &workspace->tokens;
  check_cuda(cudaMemsetAsync(tokens, 0, sizeof(*tokens), static_cast<cudaStream_t>(stream)),
             "cross_entropy");
  const int64_t blocks = (a.rows + kThreads - 1) / kThreads;
  launch("cross_entropy_count_kernel", cross_entropy_count_kernel, blocks < 256 ? blocks : 256,
         stream, a, tokens);
  return tokens;
}

template <class A>
void reduce_groups(const CrossEntropyArguments& a, const Workspace* workspace, A* loss,
                   double* metrics, void* stream) {
  if (a.reduction == Reduction::kNone && metrics == nullptr) return;
  launch("cross_entropy_reduce_kernel", cross_entropy_reduce_kernel<A>,
         metrics != nullptr ? kColumns : 1, stream, workspace->groups, groups_of(a.rows),
         a.reduction == Reduction::kMean, a.reduction == Reduction::kNone ? nullptr : loss,
         metrics);
}

}  // namespace

int64_t cross_entropy_workspace_cuda(int64_t rows) {
  return int64_t(sizeof(Workspace)) + groups_of(rows) * kColumns * int64_t(sizeof(double));
}

void cross_entropy_forward_cuda(const CrossEntropyArguments& a, void* loss,
                                CrossEntropyRowState state, double* metrics, void* workspace,
                                void* stream) {
  dispatch(a.dtype, [&]<class T>(T*) {
    using A = AccumulateType<T>;
    auto* work = static_cast<Workspace*>(workspace);
    A* losses = static_cast<A*>(loss);
    if (a.rows > 0) {
      launch("cross_entropy_forward_kernel", cross_entropy_forward_kernel<T>, groups_of(a.rows),
             stream, a, metrics != nullptr, a.reduction == Reduction::kNone ? losses : nullptr,
             static_cast<A*>(state.max), state.sum_exp, work->groups);
    }
    reduce_groups(a, work, losses, metrics, stream);
  });
}

void cross_entropy_backward_cuda(const CrossEntropyArguments& a, CrossEntropyRowState state,
                                 const void* grad_loss, int64_t grad_loss_stride, void* grad,
                                 int64_t grad_row_stride, void* workspace, void* stream) {
  if (a.rows == 0) return;
  dispatch(a.dtype, [&]<class T>(T*) {
    using A = AccumulateType<T>;
    const auto* tokens = count_tokens(a, static_cast<Workspace*>(workspace), stream);
    launch("cross_entropy_backward_kernel", cross_entropy_backward_kernel<T>, groups_of(a.rows),
           stream, a, tokens, static_cast<const A*>(state.max), state.sum_exp,
           static_cast<const A*>(grad_loss), a.reduction == Reduction::kNone ? grad_loss_stride : 0,
           static_cast<T*>(grad), grad_row_stride);
  });
}

void cross_entropy_fused_cuda(const CrossEntropyArguments& a, void* loss, void* grad,
                              int64_t grad_row_stride, double* metrics, void* workspace,
                              void* stream) {
  dispatch(a.dtype, [&]<class T>(T*) {
    using A = AccumulateType<T>;
    auto* work = static_cast<Workspace*>(workspace);
    A* losses = static_cast<A*>(loss);
    if (a.rows > 0) {
      const auto* tokens = count_tokens(a, work, stream);
      launch("cross_entropy_fused_kernel", cross_entropy_fused_kernel<T>, groups_of(a.rows), stream,
             a, metrics != nullptr, tokens, a.reduction == Reduction::kNone ? losses : nullptr,
             static_cast<T*>(grad), grad_row_stride, work->groups);
    }
    reduce_groups(a, work, losses, metrics, stream);
  });
}

}  // namespace pyvizllm
