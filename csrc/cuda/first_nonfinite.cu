// Where the first NaN or Inf of each tensor of a list is, for those that tensor_stats has found to
// have one.
//
// Every block reads the counts of its tensors from device memory and reads nothing of those whose
// counts are zero, which is all of them in a healthy training: the host never waits to know. The
// least of all candidates wins, whatever the order of the blocks.
#include <algorithm>

#include "../kernels.h"
#include "launch.cuh"
#include "tensor_list.cuh"
#include "vec.cuh"

namespace pyvizllm {
namespace {

constexpr int kSearchBlocks = 4;  // that share a multiprocessor

struct SearchEntry : TensorEntry {
  const void* data;
  DType dtype;
};
using SearchTable = TensorTable<SearchEntry, 1000>;  // note: [tensor table]

template <class T>
__device__ __forceinline__ void search(const T* data, const ListChunk& chunk, int64_t row,
                                       int64_t* found) {
  for (int i = int(threadIdx.x); i < chunk.count; i += kThreads) {
    const AccumulateType<T> value = widen(data[chunk.offset + i]);
    if (value - value == 0) continue;  // NaN - NaN and Inf - Inf are NaN
    // As unsigned numbers -1, nothing found yet, is the largest, and earlier rows are smaller.
    atomicMin(reinterpret_cast<unsigned long long*>(found),
              static_cast<unsigned long long>(row << kFoundRowShift | (chunk.offset + i)));
    return;
  }
}

// Each block takes its share of the table's chunks.
__global__ void __launch_bounds__(kThreads, kSearchBlocks)
    first_nonfinite_kernel(const __grid_constant__ SearchTable table, int64_t tensors,
                           const int64_t* counts,  // [stat::kCounts, tensors]
                           int64_t row,
                           int64_t* found) {  // [tensors]
  for_each_chunk(table, [&](const ListChunk& chunk) {
    const SearchEntry& entry = table.entries[chunk.entry];
    const int64_t* const own = counts + entry.tensor;
    if (own[stat::kNans * tensors] + own[stat::kPosInfs * tensors] +
            own[stat::kNegInfs * tensors] ==
        0) {
      return;
    }
    int64_t* const target = found + entry.tensor;
    switch (entry.dtype) {
      case DType::kFloat32:
        search(static_cast<const float*>(entry.data), chunk, row, target);
        break;
      case DType::kFloat64:
        search(static_cast<const double*>(entry.data), chunk, row, target);
        break;
      case DType::kFloat16:
        search(static_cast<const __half*>(entry.data), chunk, row, target);
        break;
      case DType::kBFloat16:
        search(static_cast<const __nv_bfloat16*>(entry.data), chunk, row, target);
        break;
    }
  });
}

}  // namespace

void first_nonfinite_cuda(const TensorSpan* tensors, int64_t count, const int64_t* counts,
                          int64_t row, int64_t* found, void* stream) {
  const int64_t max_blocks = multiprocessors("first_nonfinite") * kSearchBlocks;
  const auto fill = [&](int64_t t, SearchEntry& entry) {
    entry.numel = tensors[t].numel;
    entry.data = tensors[t].data;
    entry.dtype = tensors[t].dtype;
    return entry.numel > 0;
  };
  for_each_table<SearchTable>(count, 0, fill, [&](const SearchTable& table) {
    launch("first_nonfinite_kernel", first_nonfinite_kernel, std::min(table.chunks(), max_blocks),
           stream, table, count, counts, row, found);
  });
}

}  // namespace pyvizllm
