// Statistics and the 4096-bin histogram of a list of tensors on the GPU, from one read of each.
//
// Reads every element once, numel * sizeof(T) bytes, and writes 64 bytes a chunk of 32768 elements
// and, for each tensor a block has a part of, the bins that are not empty. Fused, because each of
// the statistics alone would cost the same read.
//
// Tensors of all dtypes are cut into one sequence of chunks; a block takes a run of them and counts
// into shared memory (statistics.cuh). Two launches: the chunks, and what adds them up.
#include <algorithm>

#include "launch.cuh"
#include "reduce.cuh"
#include "statistics.cuh"
#include "tensor_list.cuh"
#include "vec.cuh"

namespace pyvizllm {
namespace {

// 16-byte loads a thread has in flight. More: fewer float64 additions and longer waits hidden by
// fewer warps, for 4 registers each; no more than 32 elements fit a tile.
constexpr int kTileVectors = 4;
// Blocks that share a multiprocessor, which is also the size of the grid. More: more warps to hide
// the loads; each takes 17 KiB of shared memory and leaves 65536 / 256 / blocks registers a thread.
constexpr int kStatsBlocks = 4;

struct StatsEntry : TensorEntry {
  const void* data;
  DType dtype;
};
using StatsTable = TensorTable<StatsEntry, 1000>;  // note: [tensor table]

// Adds and counts the values of neighbouring vectors whose bit is set in `valid`.
template <bool kHistogram, class T, int kVectors>
__device__ __forceinline__ void add_vectors(const Vector<T> (&vectors)[kVectors], uint32_t valid,
                                            Statistics<AccumulateType<T>>& statistics,
                                            Counters& counters) {
  constexpr int kLanes = Vector<T>::kLanes, kSize = kVectors * kLanes;
  // Sixteen at a time: what one call adds it keeps in registers, in case it must be added again.
  constexpr int kAtOnce = kSize < 16 ? kSize : 16;
#pragma unroll
  for (int first = 0; first < kSize; first += kAtOnce) {
    const auto value = [&](int i) { return vectors[(first + i) / kLanes].get(i % kLanes); };
    if constexpr (kHistogram) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (valid >> (first + i) & 1) counters.count(value(i));
      }
    }
    statistics.template add<kAtOnce>(valid >> first, value);
  }
}

template <bool kHistogram, class T>
__device__ __forceinline__ void add_chunk(const T* data, int count, Counters& counters,
                                          unsigned call, Partial* partial) {
  Statistics<AccumulateType<T>> statistics;
  for_each_vectors<kTileVectors>(data, count, [&](const auto& vectors, int, uint32_t valid) {
    add_vectors<kHistogram>(vectors, valid, statistics, counters);
  });
  write_partial(statistics, count, call, partial);
}

// Calls body(data + offset) with a pointer of the tensor's type.
template <class Body>
__device__ __forceinline__ void with_elements(const StatsEntry& entry, int64_t offset,
                                              const Body& body) {
  switch (entry.dtype) {
    case DType::kFloat32:
      body(static_cast<const float*>(entry.data) + offset);
      break;
    case DType::kFloat64:
      body(static_cast<const double*>(entry.data) + offset);
      break;
    case DType::kFloat16:
      body(static_cast<const __half*>(entry.data) + offset);
      break;
    case DType::kBFloat16:
      body(static_cast<const __nv_bfloat16*>(entry.data) + offset);
      break;
  }
}

// Each block takes its share of the table's chunks.
template <bool kHistogram>
__global__ void __launch_bounds__(kThreads, kStatsBlocks)
    tensor_stats_chunks_kernel(const __grid_constant__ StatsTable table,
                               Partial* partials,            // [chunks of the whole list]
                               int64_t* histogram,           // [tensors, kBins], or null
                               unsigned* finished_blocks) {  // [1], for the next kernel
  __shared__ Counters counters;
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished_blocks = 0;
  if constexpr (kHistogram) {
    counters.clear();
    __syncthreads();
  }
  int entry = 0;
  unsigned pending = 0;  // counts in shared memory, all of that entry's tensor
  const auto flush = [&] {
    __syncthreads();
    counters.flush(histogram + int64_t(table.entries[entry].tensor) * kBins);
    __syncthreads();
    pending = 0;
  };
  for_each_chunk(table, [&](const ListChunk& chunk) {
    if (kHistogram && pending > 0 && (chunk.entry != entry || pending > kMaxPending)) flush();
    entry = chunk.entry;
    pending += unsigned(chunk.count);
    with_elements(table.entries[entry], chunk.offset, [&](const auto* data) {
      add_chunk<kHistogram>(data, chunk.count, counters, unsigned(chunk.turn),
                            partials + chunk.index);
    });
  });
  if (kHistogram && pending > 0) flush();
}

// Block b adds the chunks of the table's tensor b, and the last one to finish all tensors.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    tensor_stats_combine_kernel(const __grid_constant__ StatsTable table, const Partial* partials,
                                int64_t count,       // of the tensors of the whole list
                                double* values,      // [stat::kValues, count]
                                int64_t* counts,     // [stat::kCounts, count]
                                double* total_norm,  // null where another table follows
                                unsigned* finished_blocks) {
  const int entry = int(blockIdx.x);
  combine_partials<1>(partials, table.entries[entry].first_chunk, table.end_of(entry),
                      table.entries[entry].tensor, count, values, counts);
  if (total_norm == nullptr) return;
  // Whichever block comes last, it adds the same numbers in the same order.
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // the values above are seen by whoever sees the count
    last = atomicAdd(finished_blocks, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double sum = 0;
  for (int64_t t = threadIdx.x; t < count; t += kThreads) {
    sum += values[stat::kSumSquares * count + t];
  }
  sum = block_reduce(sum, Add());
  if (threadIdx.x == 0) *total_norm = sqrt(sum);
}

// -- Host functions ------------------------------------------------------------------------------

int64_t list_chunks(const TensorSpan* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < count; ++t) chunks += chunks_of(tensors[t].numel);
  return chunks;
}

}  // namespace

// The partial sums, and the count of finished blocks.
int64_t tensor_stats_workspace_cuda(const TensorSpan* tensors, int64_t count) {
  return list_chunks(tensors, count) * int64_t(sizeof(Partial)) + int64_t(sizeof(unsigned));
}

void tensor_stats_cuda(const TensorSpan* tensors, int64_t count, int64_t* histogram, double* values,
                       int64_t* counts, double* total_norm, void* workspace, void* stream) {
  auto* partials = static_cast<Partial*>(workspace);
  auto* finished_blocks = reinterpret_cast<unsigned*>(partials + list_chunks(tensors, count));
  const int64_t max_blocks = multiprocessors("tensor_stats") * kStatsBlocks;
  const bool counting = histogram != nullptr;
  const auto fill = [&](int64_t t, StatsEntry& entry) {
    entry.numel = tensors[t].numel;
    entry.data = tensors[t].data;
    entry.dtype = tensors[t].dtype;
    return true;
  };
  for_each_table<StatsTable>(count, 0, fill, [&](const StatsTable& table) {
    const int64_t blocks = std::min(table.chunks(), max_blocks);
    launch("tensor_stats_chunks_kernel",
           counting ? tensor_stats_chunks_kernel<true> : tensor_stats_chunks_kernel<false>,
           std::max<int64_t>(blocks, 1), stream, table, partials, histogram, finished_blocks);
    const bool last = table.entries[table.count - 1].tensor == count - 1;
    launch("tensor_stats_combine_kernel", tensor_stats_combine_kernel, table.count, stream, table,
           partials, count, values, counts, last ? total_norm : nullptr, finished_blocks);
  });
}

}  // namespace pyvizllm
