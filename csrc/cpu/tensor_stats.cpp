// Statistics and the 4096-bin histogram of a list of tensors, from one read of each.
//
// Reads every element once, numel * sizeof(T) bytes, and writes a few numbers a tensor: fused,
// because each of the statistics alone would cost the same read. How a chunk is summed and counted
// is in statistics.h; here threads take chunks from a queue.
#include "statistics.h"

namespace pyvizllm::CPU_CAPABILITY {
namespace {

// One block of at most kChunkBlock elements.
template <class T, class Counter>
void add_block(const T* x, int64_t count, Counter& counter, ChunkSums& sums) {
  BlockScratch scratch;
  BlockStatistics<Counter> block(counter, scratch);
  for (int64_t i = 0; i + kFloatLanes <= count; i += kFloatLanes) {
    prefetch_ahead(x + i);
    block.add(load(x + i));
  }
  block.finish(x, count, sums);
}

// Float64 takes the exact path; its bin is that of the value rounded to float32.
template <class Counter>
void add_block(const double* x, int64_t count, Counter& counter, ChunkSums& sums) {
  add_exactly(x, count, sums.exact);
  for (int64_t i = 0; i < count; ++i) count_one(float(x[i]), counter);
}

template <class Counter>
Partial reduce_chunk(const TensorSpan& tensor, const Chunk& chunk, Counter& counter) {
  ChunkSums sums;
  const auto run = [&]<class T>(const T* data) {
    for (int64_t begin = 0; begin < chunk.count; begin += kChunkBlock) {
      const int64_t left = chunk.count - begin;
      add_block(data + chunk.begin + begin, left < kChunkBlock ? left : kChunkBlock, counter, sums);
    }
    return sums.total();
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

Partial reduce_and_count(const TensorSpan& tensor, const Chunk& chunk, ThreadHistogram& histogram) {
  if (ThreadHistogram::fits_one_chunk(tensor.numel)) {
    RowCounter counter = histogram.row(chunk.tensor);
    return reduce_chunk(tensor, chunk, counter);
  }
  return reduce_chunk(tensor, chunk, histogram.counters(chunk.tensor, chunk.count));
}

}  // namespace

void tensor_stats(const TensorSpan* tensors, int64_t count, int64_t* histogram, double* values,
                  int64_t* counts, double* total_norm) {
  const ChunkTable chunks(tensors, count);
  const std::unique_ptr<Partial[]> partials(new Partial[chunks.size()]);
  const auto run = [&](WorkQueue& queue) {
    if (histogram == nullptr) {
      NoCounter none;
      for (int64_t c; (c = queue.take()) >= 0;) {
        partials[c] = reduce_chunk(tensors[chunks[c].tensor], chunks[c], none);
      }
      return;
    }
    ThreadHistogram thread_histogram(histogram);
    for (int64_t c; (c = queue.take()) >= 0;) {
      partials[c] = reduce_and_count(tensors[chunks[c].tensor], chunks[c], thread_histogram);
    }
  };
  parallel_queue(chunks.size(), run, chunks.is_small());
  *total_norm =
      std::sqrt(write_all_statistics(tensors, count, chunks, partials.get(), values, counts));
}

}  // namespace pyvizllm::CPU_CAPABILITY
