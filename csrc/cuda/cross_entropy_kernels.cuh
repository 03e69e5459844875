// The kernels of cross_entropy that work on rows, and their launches. See cross_entropy.cu.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "cluster.cuh"
#include "cross_entropy_launch.cuh"
#include "cross_entropy_rows.cuh"

namespace pyvizllm {
namespace {

// What of the rows and their sums is to be written. What is null is not.
template <class T>
struct RowOutputs {
  AccumulateType<T>* loss;     // [rows]
  AccumulateType<T>* row_max;  // [rows]
  double* row_sum;             // [rows]
  double* records;             // [row_record::kSize, rows]
  double* groups;              // [gridDim.x, kColumns]
};

// Computes the results of a kept row, and writes its loss and its record.
template <Variant kVariant, class T>
__device__ __forceinline__ RowResults finish_row(const CrossEntropyArguments& a,
                                                 const OptionsOf<T, kVariant>& options,
                                                 const RowOutputs<T>& out, const ReducedRow<T>& row,
                                                 bool mine) {
  const RecordPlace place(a, out.records, row.row);
  const bool counts = mine && row.target != a.ignore_index;
  const RowResults results = counts ? results_of<kVariant>(a, options, place, row) : no_results();
  if (mine && out.loss != nullptr) out.loss[row.row] = AccumulateType<T>(results.loss);
  if constexpr (kVariant != Variant::kLoss) {
    if (mine && !counts) place.write_nothing();
  }
  return results;
}

template <class T, class Group, Variant kVariant>
__global__ void __launch_bounds__(kThreads, kBlocksOf<T, kVariant>)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyArguments a,
                                 const __grid_constant__ ConstantsOf<T, kVariant> constants,
                                 const __grid_constant__ RowOutputs<T> out) {
  using Stream = RowStream<T, Group, kTileVectors<T>, kStages>;
  using Reduction = RowReduction<T, Group, kVariant, false>;
  using Kept = KeptRows<ReducedRow<T>, Group>;
  __shared__ uint4 tiles[Stream::kSharedVectors];
  __shared__ typename Reduction::Shared reduction_memory;
  __shared__ typename ResultColumns<Group, kVariant>::Shared column_memory;
  __shared__ typename Kept::Shared kept_memory;
  ResultColumns<Group, kVariant> columns(column_memory);
  Reduction reduce(reduction_memory);
  __shared__ typename OptionsOf<T, kVariant>::Shared option_memory;
  const OptionsOf<T, kVariant> options(a, constants, option_memory);
  RowWalk<T, kVariant> walk(a, int64_t(blockIdx.x) * Group::kPerBlock + Group::index(),
                            int(gridDim.x) * Group::kPerBlock, 0, kWholeRow);
  Stream stream(tiles, walk.part());
  Kept kept(kept_memory);
  const auto next = [&] { return walk.next_part(); };
  for (; walk.has_row(); walk.advance()) {
    ReducedRow<T> reduced = {walk.row(), walk.target(), 0, RowSums<T>::empty()};
    if (walk.counts()) {
      reduced.logit_of_target = walk.logit_of_target();
      const auto read = [&](const auto& body) { stream.run(next, body); };
      reduced.sums =
          reduce(sums_of<kVariant>(options, read, stream.part(), walk.logits_of(walk.row()),
                                   Stream::Slots::kSpan, reduced),
                 factor_of(options));
    } else {
      stream.skip(next());
    }
    kept.keep(reduced);
    if (!kept.full() && walk.has_next()) continue;
    kept.flush([&](const ReducedRow<T>& row, bool mine) {
      const RowResults results = finish_row<kVariant>(a, options, out, row, mine);
      if (mine) {
        out.row_max[row.row] = state_max(options, row.sums);
        out.row_sum[row.row] = state_sum(options, row.sums);
      }
      columns.add(results);
    });
  }
  columns.write(out.groups + int64_t(blockIdx.x) * kColumns);
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

template <class T, class Group, Variant kVariant>
__global__ void __launch_bounds__(kThreads, kBlocksOf<T, kVariant>)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyArguments a,
                                  const __grid_constant__ ConstantsOf<T, kVariant> constants,
                                  const double* counts,                // for the mean, or null
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
  __shared__ typename OptionsOf<T, kVariant>::Shared option_memory;
  const OptionsOf<T, kVariant> options(a, constants, option_memory);
  RowWalk<T, kVariant> walk(a, int64_t(blockIdx.x) * Group::kPerBlock + Group::index(),
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
      if (options.is_here(row.target)) kept.keep(row);
      const auto g = gradient_of(a, options, stream.part(), logits, row.row, row.target,
                                 row.upstream, options.of_state(row.max), row.sum_exp);
      T* const to = stream.part().counterpart(gradient, logits);
      stream.run(next, [&](const auto& tile, int index) {
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
          round_to<T>(A(target_gradient(a, options, r.row, r.target, r.logit_of_target, r.upstream,
                                        options.of_state(r.max), r.sum_exp)));
    });
  }
}

// kOnChip: the row stays in shared memory, `tiles` tiles of it in each block of the cluster, which
// works on `part_vectors` vectors. Else one block reads it twice, through a ring.
template <class T, class Group, Variant kVariant, bool kOnChip>
__global__ void __launch_bounds__(kThreads,
                                  kOnChip ? kOnChipBlocks<T, kVariant> : kTwoReadBlocks<T>)
    cross_entropy_fused_kernel(const __grid_constant__ CrossEntropyArguments a,
                               const __grid_constant__ ConstantsOf<T, kVariant> constants,
                               const __grid_constant__ RowOutputs<T> out,
                               const double* counts,              // for the mean, or null
                               T* grad, int64_t grad_row_stride,  // [rows, classes], may be logits
                               int part_vectors, int tiles) {
  using A = AccumulateType<T>;
  constexpr bool kClusters = kOnChip && Group::kPerBlock == 1;
  using Reader = std::conditional_t<kOnChip, ResidentRow<T, Group, kTileVectors<T>>,
                                    RowStream<T, Group, kTileVectors<T>, kStages>>;
  using Reduction = RowReduction<T, Group, kVariant, kClusters>;
  using Kept = KeptRows<ReducedRow<T>, Group>;
  __shared__ typename Reduction::Shared reduction_memory;
  __shared__ typename ResultColumns<Group, kVariant>::Shared column_memory;
  __shared__ typename Kept::Shared kept_memory;
  ResultColumns<Group, kVariant> columns(column_memory);
  __shared__ typename OptionsOf<T, kVariant>::Shared option_memory;
  const OptionsOf<T, kVariant> options(a, constants, option_memory);
  const unsigned blocks = kClusters ? cluster_size() : 1;
  const unsigned rank = kClusters ? cluster_rank() : 0;
  RowWalk<T, kVariant> walk(a, int64_t(blockIdx.x / blocks) * Group::kPerBlock + Group::index(),
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
      const auto read = [&](const auto& body) { reader.read(body); };
      reduced.sums =
          reduce(sums_of<kVariant>(options, read, part, logits, Reader::Slots::kSpan, reduced),
                 factor_of(options));
      // By the block that writes over the target's place; its gradient comes later, by the flush.
      const bool here = options.is_here(walk.target());
      if (here ? part.holds(logits, walk.target()) : rank == 0) kept.keep(reduced);
      const auto g = gradient_of(a, options, part, logits, walk.row(), walk.target(), upstream,
                                 options.of_sums(reduced.sums.max), reduced.sums.exp);
      T* const to = part.counterpart(gradient, logits);
      reader.read_again(next, [&](const auto& tile, int index) {
        store_gradient(g, tile, to, index, Reader::Slots::kSpan);
      });
    } else {
      if (rank == 0) kept.keep(reduced);
      store_zeros<T, Group>(walk.part_of(walk.row()), logits, gradient);
      reader.skip(next());
    }
    if (!kept.full() && walk.has_next()) continue;
    kept.flush([&](const ReducedRow<T>& row, bool mine) {
      columns.add(finish_row<kVariant>(a, options, out, row, mine));
      if (!mine || row.target == a.ignore_index || !options.is_here(row.target)) return;
      grad[row.row * grad_row_stride + row.target] =
          round_to<T>(A(target_gradient(a, options, row.row, row.target, row.logit_of_target,
                                        upstream, options.of_sums(row.sums.max), row.sums.exp)));
    });
  }
  columns.write(out.groups + int64_t(blockIdx.x) * kColumns);
}

// -- Launches ------------------------------------------------------------------------------------

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
auto dispatch(const CrossEntropyArguments& a, const Body& body) {
  const auto run = [&]<class T>(T* type) {
    check_classes<T>(a.classes);
    return body(type);
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
auto with_group(const CrossEntropyArguments& a, const Body& body) {
  if constexpr (sizeof(T) < 8) {
    if (is_of_one_warp(row_shape<T>(a))) return body(WarpGroup());
  }
  return body(BlockGroup());
}

// Each returns the number of blocks, all of which have written a row of `groups`.
template <Variant kVariant, class T>
int64_t launch_forward(const RowCall& call, CrossEntropyRowState state) {
  const CrossEntropyArguments& a = call.a;
  using A = AccumulateType<T>;
  return with_group<T>(a, [&]<class Group>(Group) {
    const int64_t groups = stream_blocks<Group>(a.rows, kBlocksOf<T, kVariant>);
    launch("cross_entropy_forward_kernel", cross_entropy_forward_kernel<T, Group, kVariant>, groups,
           call.stream, a, ConstantsOf<T, kVariant>(call.a, call.prepared),
           RowOutputs<T>{static_cast<A*>(call.loss), static_cast<A*>(state.max), state.sum_exp,
                         call.records, call.work->groups});
    return groups;
  });
}

template <Variant kVariant, class T>
void launch_backward(const RowCall& call, CrossEntropyRowState state, const void* grad_loss,
                     int64_t grad_loss_stride) {
  const CrossEntropyArguments& a = call.a;
  using A = AccumulateType<T>;
  with_group<T>(a, [&]<class Group>(Group) {
    launch("cross_entropy_backward_kernel", cross_entropy_backward_kernel<T, Group, kVariant>,
           stream_blocks<Group>(a.rows, kBlocksOf<T, kVariant>), call.stream, a,
           ConstantsOf<T, kVariant>(call.a, call.prepared), call.counts,
           static_cast<const A*>(state.max), state.sum_exp, static_cast<const A*>(grad_loss),
           a.reduction == Reduction::kNone ? grad_loss_stride : 0, static_cast<T*>(call.grad),
           call.grad_row_stride);
  });
}

// By the plan; returns 0 where the device refuses its clusters.
template <class Group, Variant kVariant, bool kOnChip, class T>
int64_t launch_plan(const RowCall& call, const FusedPlan& plan) {
  const auto kernel = cross_entropy_fused_kernel<T, Group, kVariant, kOnChip>;
  const char* name = "cross_entropy_fused_kernel";
  const int64_t wanted = divide_up(call.a.rows, Group::kPerBlock);
  ClusterShape shape = {0, plan.cluster, size_t(plan.shared_bytes)};
  const int64_t resident = resident_clusters(name, reinterpret_cast<const void*>(kernel), shape);
  if (resident == 0) return 0;
  shape.clusters = groups_of(wanted, plan.cluster, kOnChip ? resident : resident * kWaves<Group>);
  launch_clusters(name, kernel, shape, call.stream, call.a,
                  ConstantsOf<T, kVariant>(call.a, call.prepared),
                  RowOutputs<T>{static_cast<AccumulateType<T>*>(call.loss), nullptr, nullptr,
                                call.records, call.work->groups},
                  call.counts, static_cast<T*>(call.grad), call.grad_row_stride,
                  int(plan.part_vectors), plan.tiles);
  return shape.clusters * shape.blocks;
}

// kStreaming: of the kernel that reads rows twice.
template <Variant kVariant, Variant kStreaming, class T>
int64_t launch_fused(const RowCall& call) {
  const FusedPlan plan = fused_plan<T>(call.a);
  int64_t groups = 0;
  if constexpr (sizeof(T) < 8) {
    if (plan.path == FusedPath::kWarp) {
      groups = launch_plan<WarpGroup, kVariant, true, T>(call, plan);
    }
    if (plan.path == FusedPath::kOnChip) {
      groups = launch_plan<BlockGroup, kVariant, true, T>(call, plan);
    }
  }
  if (groups > 0) return groups;
  return launch_plan<BlockGroup, kStreaming, false, T>(call, streaming_plan<T>());
}

}  // namespace
}  // namespace pyvizllm
