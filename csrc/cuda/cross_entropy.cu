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
// The kernels are in cross_entropy_kernels.cuh; those for rows with options are compiled in
// cross_entropy_options.cu. A warp works on a small row, a block or a cluster on a larger one; all
// read them as described in row_tiles.cuh, and reduce them as in row_sums.cuh. Rows' results are
// computed many at a time (row_results.cuh). Blocks add up the loss and the metrics of their rows,
// and a second kernel adds the blocks: no floating-point atomics, and an order that depends on
// shape and device alone. Nothing waits for the host.
#include "cross_entropy_kernels.cuh"

namespace pyvizllm {
namespace {

// -- Kernels that add up -------------------------------------------------------------------------

__device__ double weight_at(const CrossEntropyArguments& a, int64_t c) {
  return a.dtype == DType::kFloat64 ? static_cast<const double*>(a.weight)[c]
                                    : double(static_cast<const float*>(a.weight)[c]);
}

// Sums of each block: of the class weights of the rows that count, which are 1 where there are
// none, and of the weights of all classes.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    cross_entropy_count_kernel(const __grid_constant__ CrossEntropyArguments a,
                               double* counts,          // [kCountBlocks]
                               double* weight_parts) {  // [kCountBlocks]
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  const bool weighted = a.weight != nullptr && a.probabilities == nullptr;
  double count = 0, weights = 0;
#pragma unroll 4
  for (int64_t r = first; r < a.rows; r += step) {
    const int64_t target = target_at(a, r);
    if (target == a.ignore_index) continue;
    assert(!weighted || (target >= 0 && target < a.classes));
    count += weighted ? weight_at(a, target) : 1;
  }
  count = block_reduce(count, Add());
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
  if (a.weight == nullptr) return;
#pragma unroll 4
  for (int64_t c = first; c < a.classes; c += step) weights += weight_at(a, c);
  weights = block_reduce(weights, Add());
  if (threadIdx.x == 0) weight_parts[blockIdx.x] = weights;
}

// Adds the groups in a fixed order. Block i < kSize writes metric i, the last the reduced loss.
template <class A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    cross_entropy_reduce_kernel(const double* groups,  // [count, kColumns]
                                int64_t count,
                                int divisor_column,  // by which the loss is divided, or -1
                                A* loss,             // [], or null
                                double* metrics) {   // [metric::kSize], or null
  const auto column = [&](int index) {
    double sum = 0;
    for (int64_t g = threadIdx.x; g < count; g += kThreads) sum += groups[g * kColumns + index];
    return block_reduce(sum, Add());
  };
  const int index = metrics != nullptr ? int(blockIdx.x) : kLossColumn;
  const double sum = column(index);
  const double divisor = divisor_column >= 0 ? column(divisor_column) : 1;
  if (threadIdx.x != 0) return;
  if (index < metric::kSize) {
    metrics[index] = sum;
  } else if (loss != nullptr) {
    *loss = A(sum / divisor);
  }
}

// -- Host functions ------------------------------------------------------------------------------

// Where the time that is saved by summing no more than the loss needs is not worth a kernel.
template <class T>
constexpr Variant kLeast = sizeof(T) == 8 ? Variant::kMetrics : Variant::kLoss;

// What the call needs to know before the rows are read.
void prepare(RowCall& call, const double* metrics) {
  const CrossEntropyArguments& a = call.a;
  call.prepared.uniform =
      a.label_smoothing / double(a.total_classes != 0 ? a.total_classes : a.classes);
  call.prepared.ranks = metrics != nullptr || call.records != nullptr;
  call.prepared.linear =
      a.label_smoothing != 0 || a.probabilities != nullptr || call.records != nullptr;
  if (a.probabilities != nullptr) prepare_probabilities(call);
  if (a.reduction != Reduction::kMean && a.weight == nullptr) return;
  launch("cross_entropy_count_kernel", cross_entropy_count_kernel, kCountBlocks, call.stream, a,
         call.work->counts, call.work->weight_parts);
  if (a.reduction == Reduction::kMean) call.counts = call.work->counts;
  call.prepared.weight_parts = call.work->weight_parts;
}

// `loss` is that of the rows, or their reduction.
RowCall call_of(const CrossEntropyArguments& a, void* loss, double* records, void* workspace,
                void* stream) {
  RowCall call = {};
  call.a = a;
  call.work = static_cast<Workspace*>(workspace);
  call.stream = stream;
  call.loss = a.reduction == Reduction::kNone ? loss : nullptr;
  call.records = records;
  return call;
}

// Whether more is to be summed than the plain loss needs.
bool wants_more(const CrossEntropyArguments& a, const double* metrics, const double* records) {
  return metrics != nullptr || records != nullptr || a.label_smoothing != 0;
}

template <class T>
void reduce_groups(const RowCall& call, int64_t groups, void* loss, double* metrics) {
  using A = AccumulateType<T>;
  const Reduction reduction = call.a.reduction;
  if (reduction == Reduction::kNone && metrics == nullptr) return;
  const int divisor_column = reduction != Reduction::kMean ? -1
                             : has_options(call.a)         ? kWeightColumn
                                                           : metric::kTokens;
  launch("cross_entropy_reduce_kernel", cross_entropy_reduce_kernel<A>,
         metrics != nullptr ? metric::kSize + 1 : 1, call.stream, call.work->groups, groups,
         divisor_column, reduction == Reduction::kNone ? nullptr : static_cast<A*>(loss), metrics);
}

}  // namespace

int64_t cross_entropy_workspace_cuda(const CrossEntropyArguments& a) {
  return Workspace::bytes(a);
}

void cross_entropy_forward_cuda(const CrossEntropyArguments& a, void* loss,
                                CrossEntropyRowState state, double* metrics, double* records,
                                void* workspace, void* stream) {
  dispatch(a, [&]<class T>(T*) {
    RowCall call = call_of(a, loss, records, workspace, stream);
    int64_t groups = 0;
    if (a.rows > 0) {
      if (has_options(a)) {
        prepare(call, metrics);
        groups = forward_with_options(call, state);
      } else if (wants_more(a, metrics, records)) {
        groups = launch_forward<Variant::kMetrics, T>(call, state);
      } else {
        groups = launch_forward<kLeast<T>, T>(call, state);
      }
    }
    reduce_groups<T>(call, groups, loss, metrics);
  });
}

void cross_entropy_backward_cuda(const CrossEntropyArguments& a, CrossEntropyRowState state,
                                 const void* grad_loss, int64_t grad_loss_stride, void* grad,
                                 int64_t grad_row_stride, void* workspace, void* stream) {
  if (a.rows == 0) return;
  dispatch(a, [&]<class T>(T*) {
    RowCall call = call_of(a, nullptr, nullptr, workspace, stream);
    call.grad = grad;
    call.grad_row_stride = grad_row_stride;
    prepare(call, nullptr);
    if (has_options(a)) {
      backward_with_options(call, state, grad_loss, grad_loss_stride);
    } else {
      launch_backward<Variant::kLoss, T>(call, state, grad_loss, grad_loss_stride);
    }
  });
}

void cross_entropy_fused_cuda(const CrossEntropyArguments& a, void* loss, void* grad,
                              int64_t grad_row_stride, double* metrics, double* records,
                              void* workspace, void* stream) {
  dispatch(a, [&]<class T>(T*) {
    RowCall call = call_of(a, loss, records, workspace, stream);
    call.grad = grad;
    call.grad_row_stride = grad_row_stride;
    int64_t groups = 0;
    if (a.rows > 0) {
      prepare(call, metrics);
      if (has_options(a)) {
        groups = fused_with_options(call);
      } else if (wants_more(a, metrics, records)) {
        groups = launch_fused<Variant::kMetrics, Variant::kMetrics, T>(call);
      } else {
        groups = launch_fused<Variant::kLoss, Variant::kMetrics, T>(call);
      }
    }
    reduce_groups<T>(call, groups, loss, metrics);
  });
}

}  // namespace pyvizllm
