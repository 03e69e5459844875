// Multiplies a list of tensors by one coefficient, in place: the second half of gradient clipping.
//
// Reads and writes every element once, 2 * numel * sizeof(T) bytes, unless the coefficient is 1:
// every block reads it from device memory and then ends at once, so the host never waits for it.
// The product is formed in the accumulation type and rounded once.
#include "../kernels.h"
#include "launch.cuh"
#include "vec.cuh"

namespace pyvizllm {
namespace {

constexpr int kTileVectors = 4;
constexpr int64_t kChunk = 65536;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kTableTensors = 1000;  // a kernel's parameters may take 32764 bytes

struct ClipTable {
  struct Entry {
    void* data;
    int64_t numel;
    int64_t first_chunk;
    DType dtype;
  };
  Entry entries[kTableTensors];
  int count;
};

// The last entry that starts at or before the chunk; empty tensors are passed over.
__device__ __forceinline__ int find_tensor(const ClipTable& table, int64_t chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entries[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return low;
}

template <class T>
__device__ __forceinline__ void multiply(T* data, int64_t count, double coefficient) {
  using A = AccumulateType<T>;
  const A factor = A(coefficient);
  for_each_tile<kTileVectors>(static_cast<const T*>(data), count, A(0), [&](auto tile) {
#pragma unroll
    for (int v = 0; v < kTileVectors; ++v) {
      Vector<T>& vector = tile.vectors[v];
#pragma unroll
      for (int lane = 0; lane < Vector<T>::kLanes; ++lane) {
        vector.set(lane, vector.get(lane) * factor);
      }
      store_lanes(data + tile.index(v * Vector<T>::kLanes), tile.lanes(v), vector);
    }
  });
}

// Block b takes the chunks b, b + gridDim.x, ...
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    clip_kernel(const __grid_constant__ ClipTable table, int64_t chunks,
                const double* coefficient) {  // []
  const double factor = *coefficient;
  if (factor == 1) return;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const ClipTable::Entry& entry = table.entries[find_tensor(table, chunk)];
    const int64_t offset = (chunk - entry.first_chunk) * kChunk;
    const int64_t left = entry.numel - offset;
    const auto run = [&]<class T>(T* data) {
      multiply(data + offset, left < kChunk ? left : kChunk, factor);
    };
    switch (entry.dtype) {
      case DType::kFloat32:
        run(static_cast<float*>(entry.data));
        break;
      case DType::kFloat64:
        run(static_cast<double*>(entry.data));
        break;
      case DType::kFloat16:
        run(static_cast<__half*>(entry.data));
        break;
      case DType::kBFloat16:
        run(static_cast<__nv_bfloat16*>(entry.data));
        break;
    }
  }
}

}  // namespace

void clip_cuda(const ScaledTensor* tensors, int64_t count, const double* coefficient,
               void* stream) {
  int device = 0, multiprocessors = 0;
  check_cuda(cudaGetDevice(&device), "clip");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "clip");
  const int64_t max_blocks = int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  for (int64_t first = 0; first < count; first += kTableTensors) {
    ClipTable table;
    table.count = int(count - first < kTableTensors ? count - first : kTableTensors);
    int64_t chunks = 0;
    for (int i = 0; i < table.count; ++i) {
      const ScaledTensor& tensor = tensors[first + i];
      table.entries[i] = {tensor.data, tensor.numel, chunks, tensor.dtype};
      chunks += (tensor.numel + kChunk - 1) / kChunk;
    }
    if (chunks == 0) continue;
    launch("clip_kernel", clip_kernel, chunks < max_blocks ? chunks : max_blocks, stream, table,
           chunks, coefficient);
  }
}

}  // namespace pyvizllm
