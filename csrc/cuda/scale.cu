// Multiplies a list of tensors by one coefficient, in place: what clipping does to gradients, and
// what an upstream gradient does to one that was computed ahead of it.
//
// Reads and writes every element once, 2 * numel * sizeof(T) bytes, unless the coefficient is 1:
// every block reads it from device memory and then ends at once, so the host never waits for it.
// The product is formed in the accumulation type and rounded once.
#include <algorithm>

#include "../kernels.h"
#include "launch.cuh"
#include "tensor_list.cuh"
#include "vec.cuh"

namespace pyvizllm {
namespace {

constexpr int kTileVectors = 4;
constexpr int kScaleBlocks = 4;  // that share a multiprocessor: 64 KiB of loads in flight

struct ScaleEntry : TensorEntry {
  void* data;
  DType dtype;
};
using ScaleTable = TensorTable<ScaleEntry, 1000>;  // note: [tensor table]

template <class T>
__device__ __forceinline__ void multiply(T* data, int count, AccumulateType<T> factor) {
  constexpr int kLanes = Vector<T>::kLanes;
  const auto body = [&]<int kVectors>(Vector<T>(&vectors)[kVectors], int index, uint32_t valid) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        vectors[v].set(lane, vectors[v].get(lane) * factor);
      }
      store_lanes(data + index + v * kThreads * kLanes, valid & kAllLanes<T>, vectors[v]);
    }
  };
  for_each_vectors<kTileVectors>(static_cast<const T*>(data), count, body);
}

// Each block takes its share of the table's chunks.
__global__ void __launch_bounds__(kThreads, kScaleBlocks)
    scale_kernel(const __grid_constant__ ScaleTable table, const double* coefficient) {  // []
  const double factor = *coefficient;
  if (factor == 1) return;
  for_each_chunk(table, [&](const ListChunk& chunk) {
    const ScaleEntry& entry = table.entries[chunk.entry];
    const auto run = [&]<class T>(T* data) {
      multiply(data + chunk.offset, chunk.count, AccumulateType<T>(factor));
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
  });
}

}  // namespace

void scale_cuda(const ScaledTensor* tensors, int64_t count, const double* coefficient,
                void* stream) {
  const int64_t max_blocks = multiprocessors("scale") * kScaleBlocks;
  const auto fill = [&](int64_t t, ScaleEntry& entry) {
    entry.numel = tensors[t].numel;
    entry.data = tensors[t].data;
    entry.dtype = tensors[t].dtype;
    return entry.numel > 0;
  };
  for_each_table<ScaleTable>(count, 0, fill, [&](const ScaleTable& table) {
    launch("scale_kernel", scale_kernel, std::min(table.chunks(), max_blocks), stream, table,
           coefficient);
  });
}

}  // namespace pyvizllm
