// Softmax cross-entropy over rows of logits on the GPU: loss, metrics and gradient.
//
// forward   reads the logits once, classes * sizeof(T) bytes a row, and writes per row the loss,
//           the maximum and the sum of exp(logit - maximum); probabilities are never stored.
// backward  reads the logits once and writes the gradient once.
// fused     both in one launch: a row stays in shared memory (of a cluster of blocks, where one
//           has too little) from the reduction to the gradient, which may go over the logits.
//           Memory sees one read and one write. Where no cluster can hold a row it is read twice,
//           the second time from L2 where it fits.
//
// A warp works on a small row, a block or a cluster on a larger one; all read them as described in
// row_tiles.cuh, and reduce them as in row_sums.cuh. Rows' results are computed many at a time
// (row_results.cuh). Blocks add up the loss and the metrics of their rows, and a second kernel adds
// the blocks: no floating-point atomics, and an order that depends on shape and device alone.
// Nothing waits for the host.
#undef NDEBUG  // the check of the targets is an assertion, as in torch
#include <cassert>

#include "../kernels.h"
#include "cluster.cuh"
#include "cross_entropy_launch.cuh"
#include "row_results.cuh"

namespace pyvizllm {
namespace {

__device__ __forceinline__ int64_t target_at(const CrossEntropyArguments& a, int64_t row) {
  return a.target_is_int64 ? static_cast<const int64_t*>(a.target)[row]
                           : static_cast<const int32_t*>(a.target)[row];
}

// The rows of one group: number `first`, and every `step`-th after it. The next row's target is
// known one row ahead, and that of the row after it is on its way.
template <class T>
class RowWalk {
 public:
  // Works on part `rank`, of `vectors` vectors, of each row.
  __device__ __forceinline__ RowWalk(const CrossEntropyArguments& a, int64_t first, int64_t step,
                                     int rank, int vectors)
      : a_(a), row_(first), step_(step), rank_(rank), vectors_(vectors) {
    target_ = target_of(first);
    next_target_ = target_of(first + step);
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
    next_target_ = target_of(row_ + step_);
  }

 private:
  __device__ __forceinline__ int64_t target_of(int64_t row) const {
    return row < a_.rows ? target_at(a_, row) : a_.ignore_index;
  }

  const CrossEntropyArguments& a_;
  int64_t row_, step_;
  int rank_, vectors_;
  int64_t target_, next_target_;
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
__device__ __forceinline__ void store_zeros(const RowPart<T>& part, T* gradient) {
  for (int index = Group::thread(); index < part.vectors; index += Group::kSize) {
    store_lanes(gradient + int64_t(index) * RowPart<T>::kLanes, part.valid(index), Vector<T>{});
  }
}

// -- Kernels -------------------------------------------------------------------------------------

// Counts the rows that count, one number a block.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    cross_entropy_count_kernel(const __grid_constant__ CrossEntropyArguments a,
                               unsigned long long* counts) {  // [kCountBlocks]
  unsigned long long count = 0;
  const int64_t step = int64_t(gridDim.x) * kThreads;
#pragma unroll 4
  for (int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x; r < a.rows; r += step) {
    count += target_at(a, r) != a.ignore_index;
  }
  count = block_reduce(count, Add());
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

template <class T, class Group, bool kExtras>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyArguments a,
                                 AccumulateType<T>* loss,     // [rows], or null
                                 AccumulateType<T>* row_max,  // [rows]
                                 double* row_sum,             // [rows]
                                 double* groups) {            // [gridDim.x, kColumns]
  using A = AccumulateType<T>;
  using Stream = RowStream<T, Group, kTileVectors<T>, kStages>;
  using Reduction = RowReduction<T, Group, kExtras, false>;
  using Kept = KeptRows<ReducedRow<T>, Group>;
  __shared__ uint4 tiles[Stream::kSharedVectors];
  __shared__ typename Reduction::Shared reduction_memory;
  __shared__ typename ResultColumns<Group, kExtras>::Shared column_memory;
  __shared__ typename Kept::Shared kept_memory;
  ResultColumns<Group, kExtras> columns(column_memory);
  Reduction reduce(reduction_memory);
  RowWalk<T> walk(a, int64_t(blockIdx.x) * Group::kPerBlock + Group::index(),
                  int64_t(gridDim.x) * Group::kPerBlock, 0, kWholeRow);
  Stream stream(tiles, walk.part());
  Kept kept(kept_memory);
  for (; walk.has_row(); walk.advance()) {
    ReducedRow<T> reduced = {walk.row(), walk.target(), 0, RowSums<T>::empty()};
    if (walk.counts()) {
      reduced.logit_of_target = walk.logit_of_target();
      const auto read = [&](A fill, const auto& body) { stream.run(walk.next_part(), fill, body); };
      reduced.sums = reduce(sums_of<kExtras>(read, stream.part(), walk.logits_of(walk.row()),
                                             Stream::Slots::kSpan, walk.target()));
    } else {
      stream.skip(walk.next_part());
    }
    kept.keep(reduced);
    if (!kept.full() && walk.has_next()) continue;
    kept.flush([&](const ReducedRow<T>& row, bool mine) {
      const bool counts = mine && row.target != a.ignore_index;
      const RowResults results = counts ? results_of<kExtras>(a, row) : no_results();
      columns.add(results);
      if (!mine) return;
      row_max[row.row] = row.sums.max;
      row_sum[row.row] = row.sums.exp;
      if (loss != nullptr) loss[row.row] = A(results.loss);
    });
  }
  columns.write(groups + int64_t(blockIdx.x) * kColumns);
}

// What the backward needs to know of a row.
template <class T>
struct BackwardRow {
  int64_t row;
  int64_t target;
  AccumulateType<T> logit_of_target;
  AccumulateType<T> max;
  double sum_exp;
  double upstream;
};

template <class T, class Group>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyArguments a,
                                  const unsigned long long* counts,    // for the mean, or null
                                  const AccumulateType<T>* row_max,    // [rows]
                                  const double* row_sum,               // [rows]
                                  const AccumulateType<T>* grad_loss,  // [] or [rows]
                                  int64_t grad_loss_stride,            // 0 for []
                                  T* grad, int64_t grad_row_stride) {  // [rows, classes]
  using A = AccumulateType<T>;
  using Stream = RowStream<T, Group, kTileVectors<T>, kStages>;
  using Kept = KeptRows<BackwardRow<T>, Group>;
  __shared__ uint4 tiles[Stream::kSharedVectors];
  __shared__ typename Kept::Shared kept_memory;
  RowWalk<T> walk(a, int64_t(blockIdx.x) * Group::kPerBlock + Group::index(),
                  int64_t(gridDim.x) * Group::kPerBlock, 0, kWholeRow);
  Stream stream(tiles, walk.part());
  Kept kept(kept_memory);
  const double divisor = divisor_of(counts);
  A max = 0, upstream = 0;
  double sum_exp = 1;
  const auto load = [&](int64_t row) {  // one row ahead of its use
    if (row >= a.rows) return;
    max = row_max[row];
    sum_exp = row_sum[row];
    upstream = grad_loss[row * grad_loss_stride];
  };
  load(walk.row());
  for (; walk.has_row(); walk.advance()) {
    BackwardRow<T> row = {walk.row(), walk.target(), 0, max, sum_exp, double(upstream) / divisor};
    load(walk.next_row());
    const RowPart<T> part = walk.part_of(row.row);
    T* gradient = part.counterpart(grad + row.row * grad_row_stride, walk.logits_of(row.row));
    if (walk.counts()) {
      row.logit_of_target = walk.logit_of_target();
      const RowGradient<T> g(
          row.max, row.upstream * (1 + z_factor_of(a, row.max, row.sum_exp)) / row.sum_exp,
          row.upstream * a.label_smoothing / double(a.classes));
      stream.run(walk.next_part(), 0, [&](const auto& tile, int index) {
        store_gradient(g, tile, gradient, index, Stream::Slots::kSpan);
      });
    } else {
      store_zeros<T, Group>(part, gradient);
      stream.skip(walk.next_part());
    }
    kept.keep(row);
    if (!kept.full() && walk.has_next()) continue;
    kept.flush([&](const BackwardRow<T>& r, bool mine) {
      if (!mine || r.target == a.ignore_index) return;
      grad[r.row * grad_row_stride + r.target] =
          round_to<T>(A(target_gradient(a, r.logit_of_target, r.upstream, r.max, r.sum_exp)));
    });
  }
}

// kOnChip: the row stays in shared memory, `tiles` tiles of it in each block of the cluster, which
// works on `part_vectors` vectors. Else one block reads it twice, through a ring.
template <class T, class Group, bool kExtras, bool kOnChip>
__global__ void __launch_bounds__(kThreads, kOnChip ? kBlocks<T> : kTwoReadBlocks)
    cross_entropy_fused_kernel(const __grid_constant__ CrossEntropyArguments a,
                               const unsigned long long* counts,  // for the mean, or null
                               AccumulateType<T>* loss,           // [rows], or null
                               T* grad, int64_t grad_row_stride,  // [rows, classes], may be logits
                               int part_vectors, int tiles,
                               double* groups) {  // [gridDim.x, kColumns]
  using A = AccumulateType<T>;
  constexpr bool kClusters = kOnChip && Group::kPerBlock == 1;
  using Reader = std::conditional_t<kOnChip, ResidentRow<T, Group, kTileVectors<T>>,
                                    RowStream<T, Group, kTileVectors<T>, kStages>>;
  using Reduction = RowReduction<T, Group, kExtras, kClusters>;
  using Kept = KeptRows<ReducedRow<T>, Group>;
  __shared__ typename Reduction::Shared reduction_memory;
  __shared__ typename ResultColumns<Group, kExtras>::Shared column_memory;
  __shared__ typename Kept::Shared kept_memory;
  ResultColumns<Group, kExtras> columns(column_memory);
  const unsigned blocks = kClusters ? cluster_size() : 1;
  const unsigned rank = kClusters ? cluster_rank() : 0;
  RowWalk<T> walk(a, int64_t(blockIdx.x / blocks) * Group::kPerBlock + Group::index(),
                  int64_t(gridDim.x / blocks) * Group::kPerBlock, rank, part_vectors);
  Reader reader(dynamic_shared_memory(), walk.part(), tiles);
  Reduction reduce(reduction_memory);
  Kept kept(kept_memory);
  const double upstream = 1 / divisor_of(counts);
  for (; walk.has_row(); walk.advance()) {
    const RowPart<T> part = walk.part_of(walk.row());
    const T* const logits = walk.logits_of(walk.row());
    T* gradient = part.counterpart(grad + walk.row() * grad_row_stride, logits);
    ReducedRow<T> reduced = {walk.row(), walk.target(), 0, RowSums<T>::empty()};
    // The block that writes the target's gradient keeps the row.
    bool keeps = rank == 0;
    if (walk.counts()) {
      // Before the barriers of the reduction: the gradient may go over it.
      reduced.logit_of_target = walk.logit_of_target();
      const int64_t place = walk.target() - (part.base - logits);
      keeps = place >= 0 && place < int64_t(part.vectors) * RowPart<T>::kLanes;
      const auto read = [&](A fill, const auto& body) { reader.read(fill, body); };
      const RowSums<T> sums =
          reduce(sums_of<kExtras>(read, part, logits, Reader::Slots::kSpan, walk.target()));
      reduced.sums = sums;
      const RowGradient<T> g(sums.max,
                             upstream * (1 + z_factor_of(a, sums.max, sums.exp)) / sums.exp,
                             upstream * a.label_smoothing / double(a.classes));
      reader.read_again(walk.next_part(), 0, [&](const auto& tile, int index) {
        store_gradient(g, tile, gradient, index, Reader::Slots::kSpan);
      });
    } else {
      store_zeros<T, Group>(part, gradient);
      reader.skip(walk.next_part());
    }
    if (keeps) kept.keep(reduced);
    if (!kept.full() && walk.has_next()) continue;
    kept.flush([&](const ReducedRow<T>& row, bool mine) {
      const bool counts = mine && row.target != a.ignore_index;
      const RowResults results = counts ? results_of<kExtras>(a, row) : no_results();
      columns.add(results);
      if (mine && loss != nullptr) loss[row.row] = A(results.loss);
      if (!counts) return;
      grad[row.row * grad_row_stride + row.target] = round_to<T>(
          A(target_gradient(a, row.logit_of_target, upstream, row.sums.max, row.sums.exp)));
    });
  }
  columns.write(groups + int64_t(blockIdx.x) * kColumns);
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

// Calls body with the group that works on a row of the kernels that keep none. float64 is there for
// gradcheck, not for speed: always a block.
template <class T, class Body>
void with_group(const CrossEntropyArguments& a, const Body& body) {
  if constexpr (sizeof(T) < 8) {
    if (is_of_one_warp(row_shape<T>(a))) return body(WarpGroup());
  }
  body(BlockGroup());
}

// Whether more is to be summed than the plain loss needs.
bool wants_extras(const CrossEntropyArguments& a, const double* metrics) {
  return metrics != nullptr || a.label_smoothing != 0;
}

// The counts of tokens, on the device, where the reduction divides by them; else null.
const unsigned long long* count_tokens(const CrossEntropyArguments& a, Workspace* workspace,
                                       void* stream) {
  if (a.reduction != Reduction::kMean) return nullptr;
  launch("cross_entropy_count_kernel", cross_entropy_count_kernel, kCountBlocks, stream, a,
         workspace->counts);
  return workspace->counts;
}

template <class A>
void reduce_groups(const CrossEntropyArguments& a, int64_t groups, const Workspace* workspace,
                   A* loss, double* metrics, void* stream) {
  if (a.reduction == Reduction::kNone && metrics == nullptr) return;
  launch("cross_entropy_reduce_kernel", cross_entropy_reduce_kernel<A>,
         metrics != nullptr ? kColumns : 1, stream, workspace->groups, groups,
         a.reduction == Reduction::kMean, a.reduction == Reduction::kNone ? nullptr : loss,
         metrics);
}

// Launches the fused kernel by the plan; returns the number of blocks, or 0 where the device
// refuses the plan's clusters.
template <class T, class Group, bool kExtras, bool kOnChip>
int64_t launch_fused(const CrossEntropyArguments& a, const FusedPlan& plan,
                     const unsigned long long* counts, AccumulateType<T>* loss, T* grad,
                     int64_t grad_row_stride, Workspace* work, void* stream) {
  const auto kernel = cross_entropy_fused_kernel<T, Group, kExtras, kOnChip>;
  const char* name = "cross_entropy_fused_kernel";
  const int64_t wanted = divide_up(a.rows, Group::kPerBlock);
  ClusterShape shape = {0, plan.cluster, size_t(plan.shared_bytes)};
  const int64_t resident = resident_clusters(name, reinterpret_cast<const void*>(kernel), shape);
  if (resident == 0) return 0;
  shape.clusters = groups_of(wanted, plan.cluster, kOnChip ? resident : resident * kWaves);
  launch_clusters(name, kernel, shape, stream, a, counts, loss, grad, grad_row_stride,
                  int(plan.part_vectors), plan.tiles, work->groups);
  return shape.clusters * shape.blocks;
}

}  // namespace

int64_t cross_entropy_workspace_cuda(int64_t rows) {
  // Of no more groups than blocks with a row each, in clusters of any size.
  const int64_t groups = rows < kMaxGroups / kMaxCluster ? rows * kMaxCluster : kMaxGroups;
  return int64_t(sizeof(Workspace)) + groups * kColumns * int64_t(sizeof(double));
}

void cross_entropy_forward_cuda(const CrossEntropyArguments& a, void* loss,
                                CrossEntropyRowState state, double* metrics, void* workspace,
                                void* stream) {
  dispatch(a.dtype, [&]<class T>(T*) {
    using A = AccumulateType<T>;
    auto* work = static_cast<Workspace*>(workspace);
    A* losses = static_cast<A*>(loss);
    int64_t groups = 0;
    if (a.rows > 0) {
      with_group<T>(a, [&]<class Group>(Group) {
        groups = stream_blocks(divide_up(a.rows, Group::kPerBlock), kBlocks<T>);
        const auto kernel = wants_extras(a, metrics)
                                ? cross_entropy_forward_kernel<T, Group, true>
                                : cross_entropy_forward_kernel<T, Group, false>;
        launch("cross_entropy_forward_kernel", kernel, groups, stream, a,
               a.reduction == Reduction::kNone ? losses : nullptr, static_cast<A*>(state.max),
               state.sum_exp, work->groups);
      });
    }
    reduce_groups(a, groups, work, losses, metrics, stream);
  });
}

void cross_entropy_backward_cuda(const CrossEntropyArguments& a, CrossEntropyRowState state,
                                 const void* grad_loss, int64_t grad_loss_stride, void* grad,
                                 int64_t grad_row_stride, void* workspace, void* stream) {
  if (a.rows == 0) return;
  dispatch(a.dtype, [&]<class T>(T*) {
    using A = AccumulateType<T>;
    const auto* counts = count_tokens(a, static_cast<Workspace*>(workspace), stream);
    with_group<T>(a, [&]<class Group>(Group) {
      launch("cross_entropy_backward_kernel", cross_entropy_backward_kernel<T, Group>,
             stream_blocks(divide_up(a.rows, Group::kPerBlock), kBlocks<T>), stream, a, counts,
             static_cast<const A*>(state.max), state.sum_exp, static_cast<const A*>(grad_loss),
             a.reduction == Reduction::kNone ? grad_loss_stride : 0, static_cast<T*>(grad),
             grad_row_stride);
    });
  });
}

void cross_entropy_fused_cuda(const CrossEntropyArguments& a, void* loss, void* grad,
                              int64_t grad_row_stride, double* metrics, void* workspace,
                              void* stream) {
  dispatch(a.dtype, [&]<class T>(T*) {
    using A = AccumulateType<T>;
    auto* work = static_cast<Workspace*>(workspace);
    A* losses = static_cast<A*>(loss);
    int64_t groups = 0;
    if (a.rows > 0) {
      const auto* counts = count_tokens(a, work, stream);
      const auto run = [&]<class Group, bool kOnChip>(const FusedPlan& plan) {
        const auto launch_it = wants_extras(a, metrics) ? launch_fused<T, Group, true, kOnChip>
                                                        : launch_fused<T, Group, false, kOnChip>;
        groups = launch_it(a, plan, counts, a.reduction == Reduction::kNone ? losses : nullptr,
                           static_cast<T*>(grad), grad_row_stride, work, stream);
      };
      const FusedPlan plan = fused_plan<T>(a);
      if constexpr (sizeof(T) < 8) {
        if (plan.path == FusedPath::kWarp) run.template operator()<WarpGroup, true>(plan);
        if (plan.path == FusedPath::kOnChip) run.template operator()<BlockGroup, true>(plan);
      }
      if (groups == 0) run.template operator()<BlockGroup, false>(streaming_plan<T>());
    }
    reduce_groups(a, groups, work, losses, metrics, stream);
  });
}

}  // namespace pyvizllm
