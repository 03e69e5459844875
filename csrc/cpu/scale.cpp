// Multiplies a list of tensors by one coefficient, in place: what clipping does to gradients, and
// what an upstream gradient does to one that was computed ahead of it.
// Reads and writes every element once, 2 * numel * sizeof(T) bytes, unless the coefficient is 1:
// then nothing is touched. The product is formed in the accumulation type and rounded once, the
// same bits as torch's mul_ with the coefficient as a tensor without dimensions.
#include "statistics.h"

namespace pyvizllm::CPU_CAPABILITY {
namespace {

template <class T>
void multiply(T* x, int64_t count, AccumulateType<T> factor) {
  constexpr int64_t kLanes = Simd<AccumulateType<T>>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, load(x + i) * factor);
  for (; i < count; ++i) store_one(x + i, load_one(x + i) * factor);
}

void multiply_chunk(const ScaledTensor& tensor, const Chunk& chunk, double coefficient) {
  const auto run = [&]<class T>(T* data) {
    multiply(data + chunk.begin, chunk.count, AccumulateType<T>(coefficient));
  };
  switch (tensor.dtype) {
    case DType::kFloat32:
      return run(static_cast<float*>(tensor.data));
    case DType::kFloat64:
      return run(static_cast<double*>(tensor.data));
    case DType::kFloat16:
      return run(static_cast<Float16*>(tensor.data));
    case DType::kBFloat16:
      return run(static_cast<BFloat16*>(tensor.data));
  }
  __builtin_unreachable();  // registration.cpp throws for every other dtype
}

}  // namespace

void scale(const ScaledTensor* tensors, int64_t count, const double* coefficient) {
  if (*coefficient == 1) return;
  const ChunkTable chunks(tensors, count);
  const auto run = [&](WorkQueue& queue) {
    for (int64_t c; (c = queue.take()) >= 0;) {
      multiply_chunk(tensors[chunks[c].tensor], chunks[c], *coefficient);
    }
  };
  parallel_queue(chunks.size(), run, chunks.is_small());
}

}  // namespace pyvizllm::CPU_CAPABILITY
