// The sketch (csrc/sketch.h) of each of a list of tensors.
//
// Reads every element once, numel * sizeof(T) bytes, and writes 64 numbers a tensor. Sums are
// float32 over 64 rows and float64 beyond, in an order that no number of threads changes; float64
// elements are summed in float64.
#include "../sketch.h"
#include "statistics.h"

namespace pyvizllm::CPU_CAPABILITY {
namespace {

constexpr int64_t kRowsInFloat = 64;
static_assert(kChunk % (kRowsInFloat * kSketchSize) == 0);

Words lane_numbers() {
  Words numbers;
  for (int lane = 0; lane < kFloatLanes; ++lane) numbers[lane] = uint32_t(lane);
  return numbers;
}

template <class T>
void add_row(const T* x, uint64_t signs, int exchange, Floats* sums) {
  const Words lanes = lane_numbers();
  for (int v = 0; v < kSketchSize / kFloatLanes; ++v) {
    prefetch_ahead(x + v * kFloatLanes);
    const Words bits = Words{} + uint32_t(signs >> (v * kFloatLanes));
    const Words flips = (bits >> lanes) << 31;
    const Floats signed_x = bit_cast<Floats>(bit_cast<Words>(load(x + v * kFloatLanes)) ^ flips);
    sums[v ^ exchange / kFloatLanes] += exchange_lanes(signed_x, exchange % kFloatLanes);
  }
}

// Part of a row, or one that vectors are too narrow for.
template <class T>
void add_elements(const T* x, int64_t count, uint64_t signs, int exchange, double* sums) {
  for (int64_t j = 0; j < count; ++j) {
    const double value = double(load_one(x + j));
    sums[j ^ exchange] += signs >> j & 1 ? -value : value;
  }
}

template <class T>
void sketch_chunk(const T* x, const Chunk& chunk, const SketchHash& hash, double* sums) {
  const int64_t first = chunk.begin / kSketchSize, rows = chunk.count / kSketchSize;
  for (int64_t begin = 0; begin < rows; begin += kRowsInFloat) {
    const int64_t end = rows - begin < kRowsInFloat ? rows : begin + kRowsInFloat;
    alignas(kVectorBytes) Floats block[kSketchSize / kFloatLanes] = {};
    for (int64_t row = begin; row < end; ++row) {
      add_row(x + row * kSketchSize, hash.signs(first + row), hash.exchange(first + row), block);
    }
    for (int k = 0; k < kSketchSize; ++k) sums[k] += block[k / kFloatLanes][k % kFloatLanes];
  }
  add_elements(x + rows * kSketchSize, chunk.count % kSketchSize, hash.signs(first + rows),
               hash.exchange(first + rows), sums);
}

void sketch_chunk(const double* x, const Chunk& chunk, const SketchHash& hash, double* sums) {
  const int64_t first = chunk.begin / kSketchSize;
  for (int64_t row = 0; row * kSketchSize < chunk.count; ++row) {
    const int64_t left = chunk.count - row * kSketchSize;
    add_elements(x + row * kSketchSize, left < kSketchSize ? left : kSketchSize,
                 hash.signs(first + row), hash.exchange(first + row), sums);
  }
}

void sketch_chunk(const TensorSpan& tensor, const Chunk& chunk, int64_t seed, double* sums) {
  const SketchHash hash(seed);
  const auto run = [&]<class T>(const T* data) {
    sketch_chunk(data + chunk.begin, chunk, hash, sums);
  };
  switch (tensor.dtype) {
    case DType::kFloat32:
      return run(static_cast<const float*>(tensor.data));
    case DType::kFloat64:
      return run(static_cast<const double*>(tensor.data));
    case DType::kFloat16:
      return run(static_cast<const Float16*>(tensor.data));
    case DType::kBFloat16:
      return run(static_cast<const BFloat16*>(tensor.data));
  }
  __builtin_unreachable();  // registration.cpp throws for every other dtype
}

}  // namespace

void sketch(const TensorSpan* tensors, int64_t count, const int64_t* seeds, double* sketches) {
  const ChunkTable chunks(tensors, count);
  const std::unique_ptr<double[]> partials(new double[chunks.size() * kSketchSize]());
  const auto run = [&](WorkQueue& queue) {
    for (int64_t c; (c = queue.take()) >= 0;) {
      const int64_t t = chunks[c].tensor;
      sketch_chunk(tensors[t], chunks[c], seeds[t], partials.get() + c * kSketchSize);
    }
  };
  parallel_queue(chunks.size(), run, chunks.is_small());
  std::memset(sketches, 0, size_t(count) * kSketchSize * sizeof(double));
  for (int64_t c = 0; c < chunks.size(); ++c) {
    double* const sums = sketches + chunks[c].tensor * kSketchSize;
    for (int k = 0; k < kSketchSize; ++k) sums[k] += partials[c * kSketchSize + k];
  }
}

}  // namespace pyvizllm::CPU_CAPABILITY
