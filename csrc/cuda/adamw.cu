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
#include "vec.cuh"

namespace pyvizllm {
namespace {

enum class Collect { kNothing, kStatistics, kHistograms };

// Blocks that share a multiprocessor, which is also the size of the grid. More: more loads in
// flight; fewer: more registers a thread (65536 / 256 / blocks), of which statistics need 110. Each
// takes 34 KiB of shared memory where histograms are wanted. Float64 needs more registers: see the
// launch bounds.
constexpr int blocks_of(Collect collect) {
  return collect == Collect::kNothing ? 3 : 2;
}

constexpr int kTableTensors = 440;  // note: [tensor table] in tensor_stats.cu

struct TensorTable {
  AdamWEntry entries[kTableTensors];
  int count;
};

struct FinishTable {
  int first_chunks[kTableTensors + 1];  // the last is where the table's chunks end
  int tensors[kTableTensors];
  float* steps[kTableTensors];
};

__device__ __forceinline__ bool is_skipped(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0;
}

// -- Collecting ----------------------------------------------------------------------------------

struct BlockCounters {
  Counters update, param;
};

// Of the update, as the stored parameter shows it, and of the new parameter.
template <Collect kCollect, class A>
struct Collected {
  Statistics<A> update, param;

  template <int kCount>
  __device__ __forceinline__ void add(const A (&before)[kCount], const A (&after)[kCount],
                                      BlockCounters& counters) {
    if constexpr (kCollect == Collect::kHistograms) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        counters.update.count(after[i] - before[i]);
        counters.param.count(after[i]);
      }
    }
    constexpr uint32_t kAll = 0xffffffffu;
    update.template add<kCount>(kAll, [&](int i) { return after[i] - before[i]; });
    param.template add<kCount>(kAll, [&](int i) { return after[i]; });
  }
};

template <class A>
struct Collected<Collect::kNothing, A> {
  template <int kCount>
  __device__ __forceinline__ void add(const A (&)[kCount], const A (&)[kCount], BlockCounters&) {}
};

// note: [next group]
// A thread loads its next group before it works on this one: otherwise its loads would wait for the
// stores before them, since for all the compiler knows they may be to the same address.
template <Collect kCollect, class P, class G, class S>
__device__ __forceinline__ auto step_chunk(const Slice<P, G, S>& slice, int count,
                                           const Step<AccumulateType<P>>& step,
                                           BlockCounters& counters) {
  using A = AccumulateType<P>;
  constexpr int kLanes = Slice<P, G, S>::kLanes;
  constexpr int kStride = kThreads * kLanes;
  Collected<kCollect, A> collected;
  const int head = slice.head(count);
  const int in_groups = (count - head) / kLanes * kLanes;
  const int end = head + in_groups;
  int i = head + int(threadIdx.x) * kLanes;
  Group<P, G, S> next;
  if (i < end) next = slice.load(i);
  for (; i < end; i += kStride) {
    Group<P, G, S> group = next;
    if (i + kStride < end) next = slice.load(i + kStride);
    A before[kLanes], after[kLanes];
    slice.step_group(step, group, before, after);
    slice.store(i, group);
    collected.add(before, after, counters);
  }
#pragma unroll 1
  for (int rest = int(threadIdx.x); rest < count - in_groups; rest += kThreads) {
    A before[1], after[1];
    slice.step_element(step, rest < head ? rest : rest + in_groups, before, after);
    collected.add(before, after, counters);
  }
  return collected;
}

// -- Kernels -------------------------------------------------------------------------------------

// What is collected of the whole list of tensors.
struct Outputs {
  Partial* partials;          // [chunks, 2], of the update and of the parameter
  int64_t* update_histogram;  // [tensors, kBins], or null
  int64_t* param_histogram;   // the same
};

// Block b takes its share of the chunks [first_chunk, end_chunk). P, G and S are the dtypes of the
// parameters, the gradients and the moments: a kernel for all of them would need registers for the
// worst of them.
template <Collect kCollect, class P, class G, class S>
__global__ void __launch_bounds__(kThreads, sizeof(P) == 8 ? 1 : blocks_of(kCollect))
    adamw_chunks_kernel(const __grid_constant__ TensorTable table,
                        const __grid_constant__ AdamWStepOptions options, int first_chunk,
                        int end_chunk, Outputs outputs) {
  constexpr bool kHistograms = kCollect == Collect::kHistograms;
  __shared__ Constants<AccumulateType<P>> constants;
  __shared__ BlockCounters counters;
  if (is_skipped(options.options.found_inf)) return;
  if constexpr (kHistograms) {
    counters.update.clear();
    counters.param.clear();
  }
  const Run run = run_of_block(first_chunk, end_chunk);
  int entry = -1;        // of the last chunk
  unsigned pending = 0;  // counts in shared memory, all of that entry's tensor
  const auto flush = [&] {
    __syncthreads();
    const int64_t row = int64_t(table.entries[entry].tensor) * kBins;
    if (outputs.update_histogram != nullptr) counters.update.flush(outputs.update_histogram + row);
    if (outputs.param_histogram != nullptr) counters.param.flush(outputs.param_histogram + row);
    __syncthreads();
    pending = 0;
  };
  for (int chunk = run.begin; chunk < run.end; ++chunk) {
    int next = entry < 0 ? find_tensor(table.entries, table.count, chunk) : entry;
    while (next + 1 < table.count && table.entries[next + 1].first_chunk <= chunk) ++next;
    if (kHistograms && pending > 0 && (next != entry || pending > kMaxPending)) flush();
    const AdamWEntry& tensor = table.entries[next];
    if (next != entry) make_constants(options.options, tensor.step, constants);
    entry = next;
    const int64_t offset = (chunk - tensor.first_chunk) * kChunk;
    const int64_t left = tensor.numel - offset;
    const int count = int(left < kChunk ? left : kChunk);
    pending += unsigned(count);
    const Step<AccumulateType<P>> step = {constants, options};
    const auto collected =
        step_chunk<kCollect>(Slice<P, G, S>(tensor, offset), count, step, counters);
    if constexpr (kCollect != Collect::kNothing) {
      const unsigned call = 2 * unsigned(chunk - run.begin);
      Partial* const partials = outputs.partials + 2 * int64_t(chunk);
      write_partial(collected.update, count, call, partials);
      write_partial(collected.param, count, call + 1, partials + 1);
    }
  }
  if (kHistograms && pending > 0) flush();
}

// Block b counts the step of the table's tensor b, and adds up its statistics.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    adamw_finish_kernel(const __grid_constant__ FinishTable table, const float* found_inf,
                        const Partial* partials,  // [chunks of the whole list, 2]
                        int64_t count, AdamWStatistics statistics) {  // of `count` tensors
  const int entry = int(blockIdx.x);
  const bool skipped = is_skipped(found_inf);
  if (threadIdx.x == 0 && !skipped) *table.steps[entry] += 1;
  const int begin = table.first_chunks[entry];
  const int end = skipped ? begin : table.first_chunks[entry + 1];
  const int64_t tensor = table.tensors[entry];
  if (statistics.update_values != nullptr) {
    combine_partials<2>(partials, begin, end, tensor, count, statistics.update_values,
                        statistics.update_counts);
  }
  if (statistics.param_values != nullptr) {
    combine_partials<2>(partials + 1, begin, end, tensor, count, statistics.param_values,
                        statistics.param_counts);
  }
}

// -- Host functions ------------------------------------------------------------------------------

using ChunksKernel = void (*)(TensorTable, AdamWStepOptions, int, int, Outputs);

Collect collect_of(const AdamWStatistics& s) {
  if (s.update_histogram != nullptr || s.param_histogram != nullptr) return Collect::kHistograms;
  if (s.update_values != nullptr || s.param_values != nullptr) return Collect::kStatistics;
  return Collect::kNothing;
}

template <class P, class G, class S>
ChunksKernel kernel_of_types(Collect collect) {
  switch (collect) {
    case Collect::kNothing:
      return adamw_chunks_kernel<Collect::kNothing, P, G, S>;
    case Collect::kStatistics:
      return adamw_chunks_kernel<Collect::kStatistics, P, G, S>;
    case Collect::kHistograms:
      return adamw_chunks_kernel<Collect::kHistograms, P, G, S>;
  }
  throw std::logic_error("adamw: expected a member of Collect");
}

template <class P>
ChunksKernel kernel_of_low_precision(const AdamWTensor& t, Collect collect) {
  const bool wide_state = t.state_dtype == DType::kFloat32;
  if (t.grad_dtype == DType::kFloat32) {
    return wide_state ? kernel_of_types<P, float, float>(collect)
                      : kernel_of_types<P, float, P>(collect);
  }
  return wide_state ? kernel_of_types<P, P, float>(collect) : kernel_of_types<P, P, P>(collect);
}

ChunksKernel kernel_of(const AdamWTensor& t, Collect collect) {
  switch (t.param_dtype) {
    case DType::kFloat32:
      return kernel_of_types<float, float, float>(collect);
    case DType::kFloat64:
      return kernel_of_types<double, double, double>(collect);
    case DType::kFloat16:
      return kernel_of_low_precision<__half>(t, collect);
    case DType::kBFloat16:
      return kernel_of_low_precision<__nv_bfloat16>(t, collect);
  }
  throw std::logic_error("adamw: expected a member of DType");
}

// Fills tables with tensors of one kernel and launches them.
class Launcher {
 public:
  Launcher(int64_t count, const AdamWOptions& o, const AdamWStatistics& statistics, void* workspace,
           void* stream)
      : count_(count),
        max_blocks_(multiprocessors("adamw") * blocks_of(collect_of(statistics))),
        options_{o, decay_of(o.beta1), decay_of(o.beta2)},
        statistics_(statistics),
        partials_(static_cast<Partial*>(workspace)),
        stream_(stream) {}

  void add(const AdamWTensor& t, int64_t index, ChunksKernel kernel) {
    if (table_.count == kTableTensors) finish(kernel);
    const int i = table_.count++;
    table_.entries[i] = {t.param,  t.grad, t.exp_avg, t.exp_avg_sq, t.max_exp_avg_sq,
                         t.master, t.step, t.numel,   next_chunk_,  int(index)};
    finish_.first_chunks[i] = next_chunk_;
    finish_.tensors[i] = int(index);
    finish_.steps[i] = t.step;
    next_chunk_ += int(chunks_of(t.numel));
  }

  void finish(ChunksKernel kernel) {
    finish_.first_chunks[table_.count] = next_chunk_;
    const int first_chunk = finish_.first_chunks[0];
    const int64_t chunks = next_chunk_ - first_chunk;
    if (chunks > 0) {
      const Outputs outputs = {partials_, statistics_.update_histogram,
                               statistics_.param_histogram};
      launch("adamw_chunks_kernel", kernel, chunks < max_blocks_ ? chunks : max_blocks_, stream_,
             table_, options_, first_chunk, next_chunk_, outputs);
    }
    launch("adamw_finish_kernel", adamw_finish_kernel, table_.count, stream_, finish_,
           options_.options.found_inf, partials_, count_, statistics_);
    table_.count = 0;
  }

 private:
  int64_t count_;
  int64_t max_blocks_;
  AdamWStepOptions options_;
  AdamWStatistics statistics_;
  Partial* partials_;
  void* stream_;
  TensorTable table_ = {};
  FinishTable finish_ = {};
  int next_chunk_ = 0;
};

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
  Launcher launcher(count, options, statistics, workspace, stream);
  const Collect collect = collect_of(statistics);
  std::vector<ChunksKernel> done;
  for (int64_t first = 0; first < count; ++first) {
    const ChunksKernel kernel = kernel_of(tensors[first], collect);
    if (std::find(done.begin(), done.end(), kernel) != done.end()) continue;
    for (int64_t t = first; t < count; ++t) {
      if (kernel_of(tensors[t], collect) == kernel) launcher.add(tensors[t], t, kernel);
    }
    launcher.finish(kernel);
    done.push_back(kernel);
  }
}

}  // namespace pyvizllm
