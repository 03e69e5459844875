// AdamW over a list of tensors on the GPU, with the statistics and histograms of what it did.
//
// Reads p, g, m and v once and writes p, m and v once: 16 + 12 bytes a float32 element (with
// amsgrad 8 more, and 8 for float32 master weights). Fused, because the update and the new
// parameter are in registers: their statistics and histograms cost no further byte but 128 a chunk
// of 32768 elements (statistics.cuh). The clip coefficient, the gradient scale, the learning rate
// and whether to step at all are read here, so that no host waits for them.
//
// Two launches for each combination of dtypes in the list: the step; then what adds up its
// statistics and counts the step, which must wait until no block reads the count any more.
// adamw_step.cuh has the arithmetic.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "adamw_step.cuh"
#include "launch.cuh"
#include "statistics.cuh"
#include "tensor_list.cuh"
#include "vec.cuh"

namespace pyvizllm {
namespace {

// Blocks that share a multiprocessor, which is also the size of the grid. More: more loads in
// flight; fewer: more registers a thread (65536 / 256 / blocks), of which collecting needs 110 and
// 34 KiB of shared memory. Float64 needs more registers: see the launch bounds.
constexpr int blocks_of(bool collects) {
  return collects ? 2 : 3;
}

using AdamWTable = TensorTable<AdamWEntry, 440>;  // note: [tensor table]

__device__ __forceinline__ bool is_skipped(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0;
}

// -- Collecting ----------------------------------------------------------------------------------

// What is collected of the whole list of tensors.
struct Outputs {
  Partial* partials;          // [chunks, 2], of the update and of the parameter
  int64_t* update_histogram;  // [tensors, kBins], or null
  int64_t* param_histogram;   // the same
};

// The counts of a block, of one tensor at a time.
struct BlockCounters {
  Counters update, param;

  __device__ __forceinline__ void clear() {
    update.clear();
    param.clear();
  }
  // As Counters::flush.
  __device__ __forceinline__ void flush(const Outputs& outputs, int tensor) {
    const int64_t row = int64_t(tensor) * kBins;
    if (outputs.update_histogram != nullptr) update.flush(outputs.update_histogram + row);
    if (outputs.param_histogram != nullptr) param.flush(outputs.param_histogram + row);
  }
};

// Of the update and of the new parameter.
template <bool kCollects, class A>
struct Collected {
  Statistics<A> update, param;

  // Which histograms are wanted is asked here: a kernel each would double the time to compile.
  template <int kCount>
  __device__ __forceinline__ void add(const A (&change)[kCount], const A (&after)[kCount],
                                      const Outputs& outputs, BlockCounters& counters) {
    if (outputs.update_histogram != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) counters.update.count(change[i]);
    }
    if (outputs.param_histogram != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) counters.param.count(after[i]);
    }
    constexpr uint32_t kAll = 0xffffffffu;
    update.template add<kCount>(kAll, [&](int i) { return change[i]; });
    param.template add<kCount>(kAll, [&](int i) { return after[i]; });
  }
};

template <class A>
struct Collected<false, A> {
  template <int kCount>
  __device__ __forceinline__ void add(const A (&)[kCount], const A (&)[kCount], const Outputs&,
                                      BlockCounters&) {}
};

// note: [next group]
// A thread loads its next group before it works on this one: otherwise its loads would wait for the
// stores before them, since for all the compiler knows they may be to the same address.
template <bool kCollects, class P, class G, class S>
__device__ __forceinline__ auto step_chunk(const Slice<P, G, S>& slice, int count,
                                           const Step<AccumulateType<P>>& step,
                                           const Outputs& outputs, BlockCounters& counters) {
  using A = AccumulateType<P>;
  constexpr int kLanes = Slice<P, G, S>::kLanes;
  constexpr int kStride = kThreads * kLanes;
  Collected<kCollects, A> collected;
  const int head = slice.head(count);
  const int in_groups = (count - head) / kLanes * kLanes;
  const int end = head + in_groups;
  int i = head + int(threadIdx.x) * kLanes;
  Group<P, G, S> next;
  if (i < end) next = slice.load(i);
  for (; i < end; i += kStride) {
    Group<P, G, S> group = next;
    if (i + kStride < end) next = slice.load(i + kStride);
    A change[kLanes], after[kLanes];
    slice.step_group(step, group, change, after);
    slice.store(i, group);
    collected.add(change, after, outputs, counters);
  }
#pragma unroll 1
  for (int rest = int(threadIdx.x); rest < count - in_groups; rest += kThreads) {
    A change[1], after[1];
    slice.step_element(step, rest < head ? rest : rest + in_groups, change, after);
    collected.add(change, after, outputs, counters);
  }
  return collected;
}

// -- Kernels -------------------------------------------------------------------------------------

// Each block takes its share of the table's chunks. P, G and S are the dtypes of the parameters,
// the gradients and the moments: a kernel for all of them would need registers for the worst of
// them.
template <bool kCollects, class P, class G, class S>
__global__ void __launch_bounds__(kThreads, sizeof(P) == 8 ? 1 : blocks_of(kCollects))
    adamw_chunks_kernel(const __grid_constant__ AdamWTable table,
                        const __grid_constant__ AdamWStepOptions options, Outputs outputs) {
  __shared__ Constants<AccumulateType<P>> constants;
  __shared__ BlockCounters counters;
  if (is_skipped(options.options.found_inf)) return;
  if constexpr (kCollects) counters.clear();
  int entry = -1;        // of the last chunk
  unsigned pending = 0;  // counts in shared memory, all of that entry's tensor
  const auto flush = [&] {
    __syncthreads();
    counters.flush(outputs, table.entries[entry].tensor);
    __syncthreads();
    pending = 0;
  };
  for_each_chunk(table, [&](const ListChunk& chunk) {
    const bool is_next = chunk.entry != entry;
    if (kCollects && pending > 0 && (is_next || pending > kMaxPending)) flush();
    const AdamWEntry& tensor = table.entries[chunk.entry];
    if (is_next) make_constants(options.options, tensor.step, constants);
    entry = chunk.entry;
    pending += unsigned(chunk.count);
    const Step<AccumulateType<P>> step = {constants, options};
    const auto collected = step_chunk<kCollects>(Slice<P, G, S>(tensor, chunk.offset), chunk.count,
                                                 step, outputs, counters);
    if constexpr (kCollects) {
      const unsigned call = 2 * unsigned(chunk.turn);
      Partial* const partials = outputs.partials + 2 * int64_t(chunk.index);
      write_partial(collected.update, chunk.count, call, partials);
      write_partial(collected.param, chunk.count, call + 1, partials + 1);
    }
  });
  if (kCollects && pending > 0) flush();
}

// Block b counts the step of the table's tensor b, and adds up its statistics.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    adamw_finish_kernel(const __grid_constant__ AdamWTable table, const float* found_inf,
                        const Partial* partials,  // [chunks of the whole list, 2]
                        int64_t count, AdamWStatistics statistics) {  // of `count` tensors
  const AdamWEntry& entry = table.entries[blockIdx.x];
  const bool skipped = is_skipped(found_inf);
  if (threadIdx.x == 0 && !skipped) *entry.step += 1;
  const int begin = entry.first_chunk;
  const int end = skipped ? begin : table.end_of(int(blockIdx.x));
  if (statistics.update_values != nullptr) {
    combine_partials<2>(partials, begin, end, entry.tensor, count, statistics.update_values,
                        statistics.update_counts);
  }
  if (statistics.param_values != nullptr) {
    combine_partials<2>(partials + 1, begin, end, entry.tensor, count, statistics.param_values,
                        statistics.param_counts);
  }
}

// -- Host functions ------------------------------------------------------------------------------

using ChunksKernel = void (*)(AdamWTable, AdamWStepOptions, Outputs);

bool collects(const AdamWStatistics& s) {
  return s.update_histogram != nullptr || s.param_histogram != nullptr ||
         s.update_values != nullptr || s.param_values != nullptr;
}

template <class P, class G, class S>
ChunksKernel kernel_of_types(bool collecting) {
  return collecting ? adamw_chunks_kernel<true, P, G, S> : adamw_chunks_kernel<false, P, G, S>;
}

// Float32 gradients come with float32 moments: check_adamw.h.
template <class P>
ChunksKernel kernel_of_low_precision(const AdamWTensor& t, bool collecting) {
  if (t.grad_dtype == DType::kFloat32) return kernel_of_types<P, float, float>(collecting);
  return t.state_dtype == DType::kFloat32 ? kernel_of_types<P, P, float>(collecting)
                                          : kernel_of_types<P, P, P>(collecting);
}

ChunksKernel kernel_of(const AdamWTensor& t, bool collecting) {
  switch (t.param_dtype) {
    case DType::kFloat32:
      return kernel_of_types<float, float, float>(collecting);
    case DType::kFloat64:
      return kernel_of_types<double, double, double>(collecting);
    case DType::kFloat16:
      return kernel_of_low_precision<__half>(t, collecting);
    case DType::kBFloat16:
      return kernel_of_low_precision<__nv_bfloat16>(t, collecting);
  }
  throw std::logic_error("adamw: expected a member of DType");
}

void fill_entry(const AdamWTensor& t, AdamWEntry& entry) {
  entry.numel = t.numel;
  entry.param = t.param;
  entry.grad = t.grad;
  entry.exp_avg = t.exp_avg;
  entry.exp_avg_sq = t.exp_avg_sq;
  entry.max_exp_avg_sq = t.max_exp_avg_sq;
  entry.master = t.master;
  entry.step = t.step;
}

}  // namespace

// Two partial sums a chunk, where statistics are wanted.
int64_t adamw_workspace_cuda(const AdamWTensor* tensors, int64_t count, bool statistics) {
  if (!statistics) return 0;
  int64_t chunks = 0;
  for (int64_t t = 0; t < count; ++t) chunks += chunks_of(tensors[t].numel);
  return 2 * chunks * int64_t(sizeof(Partial));
}

void adamw_cuda(const AdamWTensor* tensors, int64_t count, const AdamWOptions& options,
                const AdamWStatistics& statistics, void* workspace, void* stream) {
  const bool collecting = collects(statistics);
  const int64_t max_blocks = multiprocessors("adamw") * blocks_of(collecting);
  const AdamWStepOptions step = {options, decay_of(options.beta1), decay_of(options.beta2)};
  auto* const partials = static_cast<Partial*>(workspace);
  const Outputs outputs = {partials, statistics.update_histogram, statistics.param_histogram};
  std::vector<ChunksKernel> done;
  int next_chunk = 0;
  for (int64_t first = 0; first < count; ++first) {
    const ChunksKernel kernel = kernel_of(tensors[first], collecting);
    if (std::find(done.begin(), done.end(), kernel) != done.end()) continue;
    done.push_back(kernel);
    const auto fill = [&](int64_t t, AdamWEntry& entry) {
      fill_entry(tensors[t], entry);
      return kernel_of(tensors[t], collecting) == kernel;
    };
    next_chunk = for_each_table<AdamWTable>(count, next_chunk, fill, [&](const AdamWTable& table) {
      if (table.chunks() > 0) {
        launch("adamw_chunks_kernel", kernel, std::min(table.chunks(), max_blocks), stream, table,
               step, outputs);
      }
      launch("adamw_finish_kernel", adamw_finish_kernel, table.count, stream, table,
             options.found_inf, partials, count, statistics);
    });
  }
}

}  // namespace pyvizllm
