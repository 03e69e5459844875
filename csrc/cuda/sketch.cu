// The sketch (csrc/sketch.h) of each of a list of tensors.
//
// Reads every element once, numel * sizeof(T) bytes, and writes 64 numbers a chunk of 32768
// elements, which a second kernel adds up. A thread owns one of the 64 numbers and reads, of each
// row, the element that belongs to it: the 64 threads of a row read all of it, in any order.
// Sums are float32 within a chunk and float64 beyond; float64 elements are summed in float64.
#include "../sketch.h"

#include <algorithm>

#include "../kernels.h"
#include "launch.cuh"
#include "tensor_list.cuh"
#include "vec.cuh"

namespace pyvizllm {
namespace {

constexpr int kSketchBlocks = 4;                     // that share a multiprocessor
constexpr int kRowsAtOnce = kThreads / kSketchSize;  // rows of a block
static_assert(kChunk % kSketchSize == 0);

struct SketchEntry : TensorEntry {
  const void* data;
  int64_t seed;
  DType dtype;
};
using SketchTable = TensorTable<SketchEntry, 800>;  // note: [tensor table]

// This thread's share of a chunk.
template <class T>
__device__ __forceinline__ double sum_of(const T* data, const ListChunk& chunk,
                                         const SketchHash& hash) {
  const int number = int(threadIdx.x) % kSketchSize;
  const int64_t first = chunk.offset / kSketchSize;
  AccumulateType<T> sum = 0;
#pragma unroll 4
  for (int row = int(threadIdx.x) / kSketchSize; row * kSketchSize < chunk.count;
       row += kRowsAtOnce) {
    const int element = number ^ hash.exchange(first + row);
    const int index = row * kSketchSize + element;
    if (index >= chunk.count) continue;  // the last row may be short
    const AccumulateType<T> value = widen(data[chunk.offset + index]);
    sum += hash.signs(first + row) >> element & 1 ? -value : value;
  }
  return sum;
}

// Every thread's value added up over the rows of the block, in the threads of the first row.
__device__ __forceinline__ double sum_over_rows(double value) {
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = value;
  __syncthreads();
  value = 0;
  for (int row = 0; row < kRowsAtOnce; ++row) {
    value += shared[row * kSketchSize + int(threadIdx.x) % kSketchSize];
  }
  __syncthreads();  // the next call may overwrite what a slow warp still reads
  return value;
}

// Each block takes its share of the table's chunks.
__global__ void __launch_bounds__(kThreads, kSketchBlocks)
    sketch_chunks_kernel(const __grid_constant__ SketchTable table,
                         double* partials) {  // [chunks, 64]
  for_each_chunk(table, [&](const ListChunk& chunk) {
    const SketchEntry& entry = table.entries[chunk.entry];
    const SketchHash hash(entry.seed);
    double sum = 0;
    switch (entry.dtype) {
      case DType::kFloat32:
        sum = sum_of(static_cast<const float*>(entry.data), chunk, hash);
        break;
      case DType::kFloat64:
        sum = sum_of(static_cast<const double*>(entry.data), chunk, hash);
        break;
      case DType::kFloat16:
        sum = sum_of(static_cast<const __half*>(entry.data), chunk, hash);
        break;
      case DType::kBFloat16:
        sum = sum_of(static_cast<const __nv_bfloat16*>(entry.data), chunk, hash);
        break;
    }
    sum = sum_over_rows(sum);
    if (threadIdx.x < kSketchSize) {
      partials[int64_t(chunk.index) * kSketchSize + threadIdx.x] = sum;
    }
  });
}

// A block for each tensor of the table.
__global__ void __launch_bounds__(kThreads, kSketchBlocks)
    sketch_combine_kernel(const __grid_constant__ SketchTable table,
                          const double* partials,  // [chunks, 64]
                          double* sketches) {      // [tensors, 64]
  const int entry = int(blockIdx.x), number = int(threadIdx.x) % kSketchSize;
  double sum = 0;
  for (int chunk = table.entries[entry].first_chunk + int(threadIdx.x) / kSketchSize;
       chunk < table.end_of(entry); chunk += kRowsAtOnce) {
    sum += partials[int64_t(chunk) * kSketchSize + number];
  }
  sum = sum_over_rows(sum);
  if (threadIdx.x < kSketchSize) {
    sketches[int64_t(table.entries[entry].tensor) * kSketchSize + threadIdx.x] = sum;
  }
}

}  // namespace

int64_t sketch_workspace_cuda(const TensorSpan* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < count; ++t) chunks += chunks_of(tensors[t].numel);
  return chunks * kSketchSize * int64_t(sizeof(double));
}

void sketch_cuda(const TensorSpan* tensors, int64_t count, const int64_t* seeds, double* sketches,
                 void* workspace, void* stream) {
  const int64_t max_blocks = multiprocessors("sketch") * kSketchBlocks;
  double* const partials = static_cast<double*>(workspace);
  const auto fill = [&](int64_t t, SketchEntry& entry) {
    entry.numel = tensors[t].numel;
    entry.data = tensors[t].data;
    entry.dtype = tensors[t].dtype;
    entry.seed = seeds[t];
    return true;  // an empty tensor has a sketch too: zeros
  };
  for_each_table<SketchTable>(count, 0, fill, [&](const SketchTable& table) {
    if (table.chunks() > 0) {
      launch("sketch_chunks_kernel", sketch_chunks_kernel, std::min(table.chunks(), max_blocks),
             stream, table, partials);
    }
    launch("sketch_combine_kernel", sketch_combine_kernel, table.count, stream, table, partials,
           sketches);
  });
}

}  // namespace pyvizllm
