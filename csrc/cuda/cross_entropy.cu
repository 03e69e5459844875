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
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "cluster.cuh"
#include "cross_entropy_launch.cuh"
#include "cross_entropy_rows.cuh"
#include "row_results.cuh"

namespace pyvizllm {
namespace {

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
                  int(gridDim.x) * Group::kPerBlock, 0, kWholeRow);
  Stream stream(tiles, walk.part());
  Kept kept(kept_memory);
  const auto next = [&] { return walk.next_part(); };
  for (; walk.has_row(); walk.advance()) {
    ReducedRow<T> reduced = {walk.row(), walk.target(), 0, RowSums<T>::empty()};
    if (walk.counts()) {
      reduced.logit_of_target = walk.logit_of_target();
      const auto read = [&](A fill, const auto& body) { stream.run(next, fill, body); };
      reduced.sums = reduce(sums_of<kExtras>(read, stream.part(), walk.logits_of(walk.row()),
                                             Stream::Slots::kSpan, walk.target()));
    } else {
      stream.skip(next());
    }
    kept.keep(reduced);
    if (!kept.full() && walk.has_next()) continue;
    kept.flush([&](const ReducedRow<T>& row, bool mine) {
      const bool counts = mine && row.target != a.ignore_index;
      const RowResults results = counts ? results_of<kExtras>(a, row) : no_results();
      if (mine) {
        row_max[row.row] = row.sums.max;
        row_sum[row.row] = row.sums.exp;
        if (loss != nullptr) loss[row.row] = A(results.loss);
      }
      columns.add(results);
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
                  int(gridDim.x) * Group::kPerBlock, 0, kWholeRow);
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
  const auto next = [&] { return walk.next_part(); };
  for (; walk.has_row(); walk.advance()) {
    BackwardRow<T> row = {walk.row(), walk.target(), 0, max, sum_exp, double(upstream) / divisor};
    load(walk.next_row());
    const T* const logits = walk.logits_of(row.row);
    T* const gradient = grad + row.row * grad_row_stride;
    if (walk.counts()) {
      row.logit_of_target = walk.logit_of_target();
      kept.keep(row);
      const RowGradient<T> g(
          row.max, row.upstream * (1 + z_factor_of(a, row.max, row.sum_exp)) / row.sum_exp,
          row.upstream * a.label_smoothing / double(a.classes));
      T* const to = stream.part().counterpart(gradient, logits);
      stream.run(next, 0, [&](const auto& tile, int index) {
        store_gradient(g, tile, to, index, Stream::Slots::kSpan);
      });
    } else {
      store_zeros<T, Group>(walk.part_of(row.row), logits, gradient);
      stream.skip(next());
    }
    if (!kept.full() && walk.has_next()) continue;
    kept.flush([&](const BackwardRow<T>& r, bool mine) {
      if (!mine) return;
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
                  int(gridDim.x / blocks) * Group::kPerBlock, rank, part_vectors);
  Reader reader(dynamic_shared_memory(), walk.part(), tiles);
  Reduction reduce(reduction_memory);
  Kept kept(kept_memory);
  const double upstream = 1 / divisor_of(counts);
  const auto next = [&] { return walk.next_part(); };
  for (; walk.has_row(); walk.advance()) {
    const T* const logits = walk.logits_of(walk.row());
    T* const gradient = grad + walk.row() * grad_row_stride;
    ReducedRow<T> reduced = {walk.row(), walk.target(), 0, RowSums<T>::empty()};
    if (walk.counts()) {
      const RowPart<T>& part = reader.part();
      // Before the barriers of the reduction: the gradient may go over it.
      reduced.logit_of_target = walk.logit_of_target();
      const auto read = [&](A fill, const auto& body) { reader.read(fill, body); };
      reduced.sums =
          reduce(sums_of<kExtras>(read, part, logits, Reader::Slots::kSpan, walk.target()));
      // By the block that writes over the target's place; its gradient comes later, by the flush.
      if (part.holds(logits, walk.target())) kept.keep(reduced);
      const double sum = reduced.sums.exp, max = double(reduced.sums.max);
      const RowGradient<T> g(reduced.sums.max, upstream * (1 + z_factor_of(a, max, sum)) / sum,
                             upstream * a.label_smoothing / double(a.classes));
      T* const to = part.counterpart(gradient, logits);
      reader.read_again(next, 0, [&](const auto& tile, int index) {
        store_gradient(g, tile, to, index, Reader::Slots::kSpan);
      });
    } else {
      if (rank == 0) kept.keep(reduced);
      store_zeros<T, Group>(walk.part_of(walk.row()), logits, gradient);
      reader.skip(next());
    }
    if (!kept.full() && walk.has_next()) continue;
    kept.flush([&](const ReducedRow<T>& row, bool mine) {
      const bool counts = mine && row.target != a.ignore_index;
      const RowResults results = counts ? results_of<kExtras>(a, row) : no_results();
      if (mine && loss != nullptr) loss[row.row] = A(results.loss);
      if (counts) {
        grad[row.row * grad_row_stride + row.target] = round_to<T>(
            A(target_gradient(a, row.logit_of_target, upstream, row.sums.max, row.sums.exp)));
      }
      columns.add(results);
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

// The kernels count a row's vectors, and the elements of a sum, in 32 bits.
template <class T>
void check_classes(int64_t classes) {
  const int64_t in_vectors = int64_t(kWholeRow) * Vector<T>::kLanes;
  const int64_t most = std::min(in_vectors, int64_t(1) << 32) - 1024;
  if (classes <= most) return;
  throw std::invalid_argument("cross_entropy: expected at most " + std::to_string(most) +
                              " classes of this dtype on CUDA, got " + std::to_string(classes));
}

// Calls body with a null pointer of the logits' element type.
template <class Body>
void dispatch(const CrossEntropyArguments& a, const Body& body) {
  const auto run = [&]<class T>(T* type) {
    check_classes<T>(a.classes);
    body(type);
  };
  switch (a.dtype) {
    case DType::kFloat32:
      return run(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return run(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return run(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return run(static_cast<__nv_bfloat16*>(nullptr));
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

// Where the time that is saved by summing no more than the loss needs is not worth a kernel.
template <class T>
constexpr bool kAlwaysExtras = sizeof(T) == 8;

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
                                CrossEntropyRowState state, double* metrics, double*,
                                void* workspace, void* stream) {
  dispatch(a, [&]<class T>(T*) {
    using A = AccumulateType<T>;
    auto* work = static_cast<Workspace*>(workspace);
    A* losses = static_cast<A*>(loss);
    int64_t groups = 0;
    if (a.rows > 0) {
      with_group<T>(a, [&]<class Group>(Group) {
        groups = stream_blocks(divide_up(a.rows, Group::kPerBlock), kBlocks<T>);
        const auto kernel = wants_extras(a, metrics)
                                ? cross_entropy_forward_kernel<T, Group, true>
                                : cross_entropy_forward_kernel<T, Group, kAlwaysExtras<T>>;
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
  dispatch(a, [&]<class T>(T*) {
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
                              int64_t grad_row_stride, double* metrics, double*, void* workspace,
                              void* stream) {
  dispatch(a, [&]<class T>(T*) {
    using A = AccumulateType<T>;
    auto* work = static_cast<Workspace*>(workspace);
    A* losses = static_cast<A*>(loss);
    int64_t groups = 0;
    if (a.rows > 0) {
      const auto* counts = count_tokens(a, work, stream);
      const auto run = [&]<class Group, bool kOnChip>(const FusedPlan& plan) {
        const auto launch_it = wants_extras(a, metrics) ? launch_fused<T, Group, true, kOnChip>
                                                        : launch_fused<T, Group, !kOnChip, kOnChip>;
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
