// Statistics and the 4096-bin histogram of a list of tensors on the GPU, from one read of each.
//
// Reads every element once, numel * sizeof(T) bytes, and writes 72 bytes a chunk of 65536 elements
// and, for each tensor a block has a part of, the bins that are not empty. Fused, because each of
// the statistics alone would cost the same read.
//
// Tensors of all dtypes are cut into one sequence of chunks; a block takes a run of them and counts
// into shared memory. What is summed in floating point is written per chunk and added by a second
// kernel in an order that depends on the sizes alone: the same bits from run to run and on any GPU.
// Counts are integers, so their atomics need no order.
//
// Within a tile the sums are float32, then float64. A tile with a NaN, an Inf, or values whose
// squares leave float32 is summed again in float64, element by element.
#include <cmath>
#include <limits>

#include "../bins.h"
#include "../kernels.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace pyvizllm {
namespace {

constexpr int kTileVectors = 4;
constexpr int64_t kChunk = 65536;
constexpr int kBlocksPerMultiprocessor = 8;  // 16 KiB of counters each

// note: [tensor table]
// The table travels as a kernel parameter: no upload, nothing to keep alive, and a captured graph
// holds its own copy. Parameters may take 32764 bytes; a longer list takes several launches.
constexpr int kTableTensors = 1000;

struct TensorTable {
  struct Entry {
    const void* data;
    int64_t numel;
    int64_t first_chunk;  // in the partial sums of the whole list
    DType dtype;
  };
  Entry entries[kTableTensors];
  int count;
};

struct Partial {
  double sum;
  double sum_squares;
  double abs_sum;
  double min;
  double max;
  int64_t zeros;
  int64_t nans;
  int64_t pos_infs;
  int64_t neg_infs;
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

__device__ __forceinline__ Partial empty_partial() {
  return {0, 0, 0, kInfinity, -kInfinity, 0, 0, 0, 0};
}

__device__ __forceinline__ Partial add(const Partial& a, const Partial& b) {
  return {a.sum + b.sum,
          a.sum_squares + b.sum_squares,
          a.abs_sum + b.abs_sum,
          b.min < a.min ? b.min : a.min,
          b.max > a.max ? b.max : a.max,
          a.zeros + b.zeros,
          a.nans + b.nans,
          a.pos_infs + b.pos_infs,
          a.neg_infs + b.neg_infs};
}

template <class T>
__device__ __forceinline__ void add_tile_exactly(const Tile<T, kTileVectors>& tile, Partial& p) {
  constexpr int kSize = Tile<T, kTileVectors>::kSize;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (!tile.holds(i)) continue;
    const double v = double(tile.get(i));
    p.sum += v;
    p.sum_squares += v * v;
    p.abs_sum += fabs(v);
    p.min = v < p.min ? v : p.min;
    p.max = v > p.max ? v : p.max;
    p.zeros += v == 0;
    p.nans += v != v;
    p.pos_infs += v == kInfinity;
    p.neg_infs += v == -kInfinity;
  }
}

template <class T>
__device__ __forceinline__ void add_tile(const Tile<T, kTileVectors>& tile, Partial& p) {
  if constexpr (std::is_same_v<T, double>) {
    add_tile_exactly(tile, p);
    return;
  }
  constexpr int kSize = Tile<T, kTileVectors>::kSize;
  float sum = 0, squares = 0, abs_sum = 0, min = float(kInfinity), max = -float(kInfinity);
  int zeros = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (!tile.holds(i)) continue;
    const float v = float(tile.get(i));
    sum += v;
    squares += v * v;
    abs_sum += fabsf(v);
    min = v < min ? v : min;
    max = v > max ? v : max;
    zeros += v == 0;
  }
  // The squares of the largest must be normal floats, and the sums finite.
  const float abs_max = -min > max ? -min : max;
  const bool safe = abs_max < 0x1p58f && (abs_max > 0x1p-40f || abs_sum == 0);
  if (!safe || abs_sum != abs_sum) {
    add_tile_exactly(tile, p);
    return;
  }
  p.sum += double(sum);
  p.sum_squares += double(squares);
  p.abs_sum += double(abs_sum);
  p.min = min < p.min ? double(min) : p.min;
  p.max = max > p.max ? double(max) : p.max;
  p.zeros += zeros;
}

// Counts a tile in shared memory. The whole warp must call it.
// Where many lanes hold one bin (a constant, or an embedding's zeros), their atomics would wait for
// each other; so the bin of the warp's first element is counted by a vote, and added once.
template <class T>
__device__ __forceinline__ void count_tile(const Tile<T, kTileVectors>& tile, unsigned* counters) {
  constexpr int kSize = Tile<T, kTileVectors>::kSize;
  const auto bin_at = [&](int i) {  // float64 counts as the float32 it rounds to
    return bin_of_bits(__float_as_uint(float(tile.get(i))));
  };
  const unsigned common = __shfl_sync(kWholeWarp, bin_at(0), 0);
  unsigned common_count = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const bool holds = tile.holds(i);
    const unsigned bin = bin_at(i);
    common_count += unsigned(__popc(__ballot_sync(kWholeWarp, holds && bin == common)));
    if (holds && bin != common) atomicAdd(counters + bin, 1u);
  }
  if (threadIdx.x % kWarpSize == 0 && common_count > 0) atomicAdd(counters + common, common_count);
}

template <bool kHistogram, class T>
__device__ __forceinline__ void add_chunk(const T* data, int64_t count, unsigned* counters,
                                          Partial& p) {
  for_each_tile<kTileVectors>(data, count, AccumulateType<T>(0), [&](const auto& tile) {
    add_tile(tile, p);
    if constexpr (kHistogram) count_tile(tile, counters);
  });
}

// Moves the counts to a row of the histogram. Every thread of the block must call it.
__device__ __forceinline__ void flush(unsigned* counters, int64_t* row) {
  __syncthreads();  // all counts have arrived
  for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) {
    const unsigned count = counters[bin];
    if (count == 0) continue;
    counters[bin] = 0;
    atomicAdd(reinterpret_cast<unsigned long long*>(row + bin), (unsigned long long)count);
  }
  __syncthreads();  // all counters are zero before the next count
}

// The last entry that starts at or before the chunk: empty tensors, which share their successor's
// first chunk, are passed over.
__device__ __forceinline__ int find_tensor(const TensorTable& table, int64_t chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entries[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return low;
}

// Block b takes its share of the chunks [first_chunk, first_chunk + chunks), a run of neighbours.
template <bool kHistogram>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    tensor_stats_chunks_kernel(const __grid_constant__ TensorTable table, int64_t first_chunk,
                               int64_t chunks,
                               Partial* partials,     // [chunks of the whole list]
                               int64_t* histogram) {  // [table.count, kBins], or null
  constexpr int64_t kMaxPending = int64_t(1) << 31;   // a 32-bit counter cannot overflow
  __shared__ unsigned counters[kHistogram ? kBins : 1];
  if constexpr (kHistogram) {
    for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) counters[bin] = 0;
    __syncthreads();
  }
  const int64_t blocks = gridDim.x;
  const int64_t begin = first_chunk + chunks * blockIdx.x / blocks;
  const int64_t end = first_chunk + chunks * (blockIdx.x + 1) / blocks;
  int counted = -1;  // the tensor whose counts are pending
  int64_t pending = 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int tensor = find_tensor(table, chunk);
    const TensorTable::Entry& entry = table.entries[tensor];
    if (kHistogram && pending > 0 && (tensor != counted || pending > kMaxPending)) {
      flush(counters, histogram + int64_t(counted) * kBins);
      pending = 0;
    }
    const int64_t offset = (chunk - entry.first_chunk) * kChunk;
    const int64_t left = entry.numel - offset;
    const int64_t count = left < kChunk ? left : kChunk;
    counted = tensor;
    pending += count;

    Partial p = empty_partial();
    const auto run = [&]<class T>(const T* data) {
      add_chunk<kHistogram>(data + offset, count, counters, p);
    };
    switch (entry.dtype) {
      case DType::kFloat32:
        run(static_cast<const float*>(entry.data));
        break;
      case DType::kFloat64:
        run(static_cast<const double*>(entry.data));
        break;
      case DType::kFloat16:
        run(static_cast<const __half*>(entry.data));
        break;
      case DType::kBFloat16:
        run(static_cast<const __nv_bfloat16*>(entry.data));
        break;
    }
    p = block_reduce(p, [](const Partial& a, const Partial& b) { return add(a, b); });
    if (threadIdx.x == 0) partials[chunk] = p;
  }
  if (kHistogram && pending > 0) flush(counters, histogram + int64_t(counted) * kBins);
}

// Block b adds the chunks of the table's tensor b, and writes its statistics.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    tensor_stats_combine_kernel(const __grid_constant__ TensorTable table, const Partial* partials,
                                int64_t first, int64_t count,  // the table's place in the list
                                double* values,                // [stat::kValues, count]
                                int64_t* counts) {             // [stat::kCounts, count]
  const TensorTable::Entry& entry = table.entries[blockIdx.x];
  const int64_t chunks = (entry.numel + kChunk - 1) / kChunk;
  Partial p = empty_partial();
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads) {
    p = add(p, partials[entry.first_chunk + c]);
  }
  p = block_reduce(p, [](const Partial& a, const Partial& b) { return add(a, b); });
  if (threadIdx.x != 0) return;
  const int64_t tensor = first + blockIdx.x;
  const bool poisoned = p.nans > 0;
  const double abs_max = -p.min > p.max ? -p.min : p.max;
  values[stat::kSum * count + tensor] = p.sum;
  values[stat::kSumSquares * count + tensor] = p.sum_squares;
  values[stat::kAbsSum * count + tensor] = p.abs_sum;
  values[stat::kNorm * count + tensor] = sqrt(p.sum_squares);
  values[stat::kMin * count + tensor] = poisoned ? kNaN : p.min;
  values[stat::kMax * count + tensor] = poisoned ? kNaN : p.max;
  values[stat::kAbsMax * count + tensor] = poisoned ? kNaN : (entry.numel > 0 ? abs_max : 0);
  counts[stat::kZeros * count + tensor] = p.zeros;
  counts[stat::kNans * count + tensor] = p.nans;
  counts[stat::kPosInfs * count + tensor] = p.pos_infs;
  counts[stat::kNegInfs * count + tensor] = p.neg_infs;
  counts[stat::kNumel * count + tensor] = entry.numel;
}

// One block: the norm over all tensors.
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    tensor_stats_total_kernel(const double* values, int64_t count, double* total_norm) {
  double sum = 0;
  for (int64_t t = threadIdx.x; t < count; t += kThreads) {
    sum += values[stat::kSumSquares * count + t];
  }
  sum = block_reduce(sum, Add());
  if (threadIdx.x == 0) *total_norm = sqrt(sum);
}

// -- Host functions ------------------------------------------------------------------------------

int64_t chunks_of(int64_t numel) {
  return (numel + kChunk - 1) / kChunk;
}

int64_t resident_blocks() {
  int device = 0, multiprocessors = 0;
  check_cuda(cudaGetDevice(&device), "tensor_stats");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "tensor_stats");
  return int64_t(multiprocessors) * kBlocksPerMultiprocessor;
}

}  // namespace

int64_t tensor_stats_workspace_cuda(const TensorSpan* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < count; ++t) chunks += chunks_of(tensors[t].numel);
  return chunks * int64_t(sizeof(Partial));
}

void tensor_stats_cuda(const TensorSpan* tensors, int64_t count, int64_t* histogram, double* values,
                       int64_t* counts, double* total_norm, void* workspace, void* stream) {
  auto* partials = static_cast<Partial*>(workspace);
  const int64_t max_blocks = resident_blocks();
  int64_t next_chunk = 0;
  for (int64_t first = 0; first < count; first += kTableTensors) {
    TensorTable table;
    table.count = int(count - first < kTableTensors ? count - first : kTableTensors);
    const int64_t first_chunk = next_chunk;
    for (int i = 0; i < table.count; ++i) {
      const TensorSpan& tensor = tensors[first + i];
      table.entries[i] = {tensor.data, tensor.numel, next_chunk, tensor.dtype};
      next_chunk += chunks_of(tensor.numel);
    }
    const int64_t chunks = next_chunk - first_chunk;
    if (chunks > 0) {
      const bool counting = histogram != nullptr;
      launch("tensor_stats_chunks_kernel",
             counting ? tensor_stats_chunks_kernel<true> : tensor_stats_chunks_kernel<false>,
             chunks < max_blocks ? chunks : max_blocks, stream, table, first_chunk, chunks,
             partials, counting ? histogram + first * kBins : nullptr);
    }
    launch("tensor_stats_combine_kernel", tensor_stats_combine_kernel, table.count, stream, table,
           partials, first, count, values, counts);
  }
  launch("tensor_stats_total_kernel", tensor_stats_total_kernel, 1, stream, values, count,
         total_norm);
}

}  // namespace pyvizllm
