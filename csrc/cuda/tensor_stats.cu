// Statistics and the 4096-bin histogram of a list of tensors on the GPU, from one read of each.
//
// Reads every element once, numel * sizeof(T) bytes, and writes 64 bytes a chunk of 32768 elements
// and, for each tensor a block has a part of, the bins that are not empty. Fused, because each of
// the statistics alone would cost the same read.
//
// Tensors of all dtypes are cut into one sequence of chunks; a block takes a run of them and counts
// into shared memory (statistics.cuh). Two launches: the chunks, and what adds them up.
#include "launch.cuh"
#include "reduce.cuh"
#include "statistics.cuh"
#include "vec.cuh"

namespace pyvizllm {
namespace {

// 16-byte loads a thread has in flight. More: fewer float64 additions and longer waits hidden by
// fewer warps, for 4 registers each; no more than 32 elements fit a tile.
constexpr int kTileVectors = 4;
// Blocks that share a multiprocessor, which is also the size of the grid. More: more warps to hide
// the loads; each takes 17 KiB of shared memory and leaves 65536 / 256 / blocks registers a thread.
constexpr int kStatsBlocks = 4;

// note: [tensor table]
// The table travels as a kernel parameter: no upload, nothing to keep alive or to key on pointers,
// and a captured graph holds its own copy. Parameters may take 32764 bytes; a longer list takes
// several launches.
constexpr int kTableTensors = 1280;

struct TensorTable {
  struct Entry {
    const void* data;
    int64_t numel;
    int first_chunk;  // in the partial sums of the whole list
    DType dtype;
  };
  Entry entries[kTableTensors];
  int count;
};

// What the second kernel needs of it.
struct CombineTable {
  int first_chunks[kTableTensors + 1];  // the last is where the table's chunks end
};

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

// Vectors lie on 16-byte addresses whatever the tensor's own alignment, so that only a chunk's
// first and last are partial. A thread's vectors are a block apart: a warp's loads are contiguous.
template <bool kHistogram, class T>
__device__ __forceinline__ void add_chunk(const T* data, int count, Counters& counters,
                                          unsigned call, Partial* partial) {
  constexpr int kLanes = Vector<T>::kLanes;
  constexpr int kBlockVector = kThreads * kLanes;
  Statistics<AccumulateType<T>> statistics;
  const int head = int(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
  int index = int(threadIdx.x) * kLanes - head;
  for (int begin = -head; begin < count; begin += kTileVectors * kBlockVector) {
    if (begin >= 0 && begin + kTileVectors * kBlockVector <= count) {
      Vector<T> vectors[kTileVectors];
#pragma unroll
      for (int v = 0; v < kTileVectors; ++v) {
        vectors[v] = Vector<T>::load(data + index + v * kBlockVector);
      }
      add_vectors<kHistogram>(vectors, 0xffffffffu, statistics, counters);
      index += kTileVectors * kBlockVector;
    } else {
#pragma unroll 1
      for (int v = 0; v < kTileVectors; ++v, index += kBlockVector) {
        const uint32_t valid = lanes_within<T>(index, count);
        const Vector<T> vectors[1] = {load_lanes(data + index, valid, AccumulateType<T>(0))};
        add_vectors<kHistogram>(vectors, valid, statistics, counters);
      }
    }
  }
  write_partial(statistics, count, call, partial);
}

// Calls body(data + offset) with a pointer of the tensor's type.
template <class Body>
__device__ __forceinline__ void with_elements(const TensorTable::Entry& entry, int64_t offset,
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

// Block b takes its share of the chunks [first_chunk, end_chunk).
template <bool kHistogram>
__global__ void __launch_bounds__(kThreads, kStatsBlocks)
    tensor_stats_chunks_kernel(const __grid_constant__ TensorTable table, int first_chunk,
                               int end_chunk,
                               Partial* partials,            // [chunks of the whole list]
                               int64_t* histogram,           // [table.count, kBins], or null
                               unsigned* finished_blocks) {  // [1], for the next kernel
  __shared__ Counters counters;
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished_blocks = 0;
  if constexpr (kHistogram) {
    counters.clear();
    __syncthreads();
  }
  const Run run = run_of_block(first_chunk, end_chunk);
  int tensor = find_tensor(table.entries, table.count, run.begin);
  unsigned pending = 0;  // counts in shared memory, all of one tensor
  const auto flush = [&] {
    __syncthreads();
    counters.flush(histogram + int64_t(tensor) * kBins);
    __syncthreads();
    pending = 0;
  };
  for (int chunk = run.begin; chunk < run.end; ++chunk) {
    int next = tensor;
    while (next + 1 < table.count && table.entries[next + 1].first_chunk <= chunk) ++next;
    if (kHistogram && pending > 0 && (next != tensor || pending > kMaxPending)) flush();
    tensor = next;
    const TensorTable::Entry& entry = table.entries[tensor];
    const int64_t offset = (chunk - entry.first_chunk) * kChunk;
    const int64_t left = entry.numel - offset;
    const int count = int(left < kChunk ? left : kChunk);
    pending += unsigned(count);
    with_elements(entry, offset, [&](const auto* data) {
      add_chunk<kHistogram>(data, count, counters, unsigned(chunk - run.begin), partials + chunk);
    });
  }
  if (kHistogram && pending > 0) flush();
}

// Block b adds the chunks of the table's tensor b, and the last one to finish all tensors.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    tensor_stats_combine_kernel(const __grid_constant__ CombineTable table, const Partial* partials,
                                int64_t first, int64_t count,  // the table's place in the list
                                double* values,                // [stat::kValues, count]
                                int64_t* counts,               // [stat::kCounts, count]
                                double* total_norm,            // null where another table follows
                                unsigned* finished_blocks) {
  const int entry = int(blockIdx.x);
  combine_partials<1>(partials, table.first_chunks[entry], table.first_chunks[entry + 1],
                      first + entry, count, values, counts);
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
  int next_chunk = 0;
  for (int64_t first = 0; first < count; first += kTableTensors) {
    TensorTable table;
    CombineTable combine;
    table.count = int(count - first < kTableTensors ? count - first : kTableTensors);
    const int first_chunk = next_chunk;
    for (int i = 0; i < table.count; ++i) {
      const TensorSpan& tensor = tensors[first + i];
      table.entries[i] = {tensor.data, tensor.numel, next_chunk, tensor.dtype};
      combine.first_chunks[i] = next_chunk;
      next_chunk += int(chunks_of(tensor.numel));
    }
    combine.first_chunks[table.count] = next_chunk;
    const int64_t chunks = next_chunk - first_chunk;
    const int64_t blocks = chunks < max_blocks ? chunks : max_blocks;
    launch("tensor_stats_chunks_kernel",
           counting ? tensor_stats_chunks_kernel<true> : tensor_stats_chunks_kernel<false>,
           blocks > 0 ? blocks : 1, stream, table, first_chunk, next_chunk, partials,
           counting ? histogram + first * kBins : nullptr, finished_blocks);
    launch("tensor_stats_combine_kernel", tensor_stats_combine_kernel, table.count, stream, combine,
           partials, first, count, values, counts,
           first + table.count == count ? total_norm : nullptr, finished_blocks);
  }
}

}  // namespace pyvizllm
