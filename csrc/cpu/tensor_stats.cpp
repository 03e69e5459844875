// Statistics and the 4096-bin histogram of a list of tensors, from one read of each.
//
// Tensors are cut into chunks that depend on their sizes alone; threads take chunks from a queue
// and write one partial result a chunk, and partial results are added in order: the same numbers
// for any number of threads. Counts are integers, so the histogram needs no order.
//
// Within a block the sums are float32 over vector lanes, then float64. A block with a NaN, an Inf,
// or values whose squares leave float32 is summed again in float64, element by element.
#include <limits>
#include <memory>
#include <type_traits>

#include "../bins.h"
#include "../kernels.h"
#include "simd.h"

namespace pyvizllm::CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 65536;  // a multiple of kBlock
constexpr int64_t kBlock = 1024;

struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t count;
};

struct Partial {
  double sum = 0;
  double sum_squares = 0;
  double abs_sum = 0;
  double min = std::numeric_limits<double>::infinity();
  double max = -std::numeric_limits<double>::infinity();
  int64_t zeros = 0;
  int64_t nans = 0;
  int64_t pos_infs = 0;
  int64_t neg_infs = 0;

  void add(const Partial& other) {
    sum += other.sum;
    sum_squares += other.sum_squares;
    abs_sum += other.abs_sum;
    min = other.min < min ? other.min : min;
    max = other.max > max ? other.max : max;
    zeros += other.zeros;
    nans += other.nans;
    pos_infs += other.pos_infs;
    neg_infs += other.neg_infs;
  }
};

template <class T>
void add_exactly(const T* x, int64_t count, Partial& p) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    const double v = double(load_one(x + i));
    p.sum += v;
    p.sum_squares += v * v;
    p.abs_sum += std::fabs(v);
    p.min = v < p.min ? v : p.min;
    p.max = v > p.max ? v : p.max;
    p.zeros += v == 0;
    p.nans += v != v;
    p.pos_infs += v == kInfinity;
    p.neg_infs += v == -kInfinity;
  }
}

// note: [four counters]
// Gradients sit in some hundred bins, so neighbours often share one. An increment of a counter that
// was written a few cycles ago waits for that store; four counters a bin, used in turn, do not.
// They are adjacent, since addresses 4 KiB apart would look like one to the store buffer, and the
// bin is kept as a byte offset, 16 * bin, which just fits 16 bits. All-zero vectors, common in
// embedding gradients, are counted without touching a counter.
class Counters {
 public:
  static constexpr int kCopies = 4;
  static constexpr int kOffsetShift = 16;  // float32 bits to byte offset
  static constexpr uint32_t kOffsetMask = 0xfff0;

  Counters() : counts_(new uint32_t[kCopies * kBins]()) {}

  void add(uint16_t offset, int copy) {
    ++*reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(counts_.get()) + offset + 4 * copy);
  }
  void add_zeros(int64_t count) { counts_[0] += uint32_t(count); }

  // Adds to row and clears. Other threads may add to the same row.
  void flush(int64_t* row) {
    uint32_t* c = counts_.get();
    for (int bin = 0; bin < kBins; ++bin, c += kCopies) {
      const int64_t total = int64_t(c[0]) + c[1] + c[2] + c[3];
      if (total != 0) __atomic_fetch_add(row + bin, total, __ATOMIC_RELAXED);
    }
    std::memset(counts_.get(), 0, sizeof(uint32_t) * kCopies * kBins);
  }

 private:
  std::unique_ptr<uint32_t[]> counts_;
};

// The same interface over a row of the histogram that no other thread touches.
class RowCounter {
 public:
  explicit RowCounter(int64_t* row) : row_(row) {}
  void add(uint16_t offset, int) { ++row_[offset / 16]; }
  void add_zeros(int64_t count) { row_[0] += count; }

 private:
  int64_t* row_;
};

struct NoCounter {};

template <class Counter>
inline void count_vector(Words bits, Counter& counter) {
  uint64_t fours[kFloatLanes / 4];
  const Halves offsets = narrow((bits >> Counters::kOffsetShift) & Counters::kOffsetMask);
  std::memcpy(fours, &offsets, sizeof(fours));
  for (uint64_t four : fours) {
    counter.add(uint16_t(four), 0);
    counter.add(uint16_t(four >> 16), 1);
    counter.add(uint16_t(four >> 32), 2);
    counter.add(uint16_t(four >> 48), 3);
  }
}

inline void count_one(float value, RowCounter& counter) {
  counter.add(uint16_t(bin_of_bits(bit_cast<uint32_t>(value)) * 16), 0);
}
inline void count_one(float value, Counters& counter) {
  counter.add(uint16_t(bin_of_bits(bit_cast<uint32_t>(value)) * 16), 0);
}
inline void count_one(float, NoCounter&) {}

// One block of at most kBlock elements.
template <class T, class Counter>
void add_block(const T* x, int64_t count, Counter& counter, Partial& p) {
  constexpr bool kHistogram = !std::is_same_v<Counter, NoCounter>;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Floats sum{}, squares{}, abs_sum{};
  Floats min = Floats{} + kInfinity, max = Floats{} - kInfinity;
  int64_t zeros = 0, zero_vectors = 0;

  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) {
    const Floats v = load(x + i);
    const Words bits = bit_cast<Words>(v);
    const Words magnitude = bits & 0x7fffffffu;
    if (const uint32_t zero = zero_lanes(magnitude)) {
      zeros += __builtin_popcount(zero);
      if (zero_lanes(bits) == (1u << kFloatLanes) - 1) {
        ++zero_vectors;
        continue;
      }
    }
    sum += v;
    squares += v * v;
    abs_sum += bit_cast<Floats>(magnitude);
    min = minimum(v, min);
    max = maximum(v, max);
    if constexpr (kHistogram) count_vector(bits, counter);
  }

  Partial block;
  block.sum = sum_lanes(sum);
  block.sum_squares = sum_lanes(squares);
  block.abs_sum = sum_lanes(abs_sum);
  block.zeros = zeros;
  block.min = -max_lanes<float>(-min);
  block.max = max_lanes<float>(max);
  if (zero_vectors > 0) {
    block.min = block.min < 0 ? block.min : 0;
    block.max = block.max > 0 ? block.max : 0;
    if constexpr (kHistogram) counter.add_zeros(zero_vectors * kFloatLanes);
  }
  // The squares of the largest must be normal floats, and the sums finite.
  const double abs_max = -block.min > block.max ? -block.min : block.max;
  const bool safe = abs_max < 0x1p58 && (abs_max > 0x1p-40 || block.abs_sum == 0);
  if (safe && block.abs_sum == block.abs_sum) {
    p.add(block);
    add_exactly(x + i, count - i, p);
  } else {
    add_exactly(x, count, p);
  }
  for (; i < count; ++i) count_one(load_one(x + i), counter);
}

// Float64 takes the exact path; its bin is that of the value rounded to float32.
template <class Counter>
void add_block(const double* x, int64_t count, Counter& counter, Partial& p) {
  add_exactly(x, count, p);
  for (int64_t i = 0; i < count; ++i) count_one(float(x[i]), counter);
}

template <class Counter>
void add_chunk(const TensorSpan& tensor, const Chunk& chunk, Counter& counter, Partial& p) {
  const auto run = [&]<class T>(const T* data) {
    for (int64_t begin = 0; begin < chunk.count; begin += kBlock) {
      const int64_t left = chunk.count - begin;
      add_block(data + chunk.begin + begin, left < kBlock ? left : kBlock, counter, p);
    }
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

// The counts of one thread, on their way to the histogram's rows.
class ThreadHistogram {
 public:
  explicit ThreadHistogram(int64_t* histogram) : histogram_(histogram) {}
  ~ThreadHistogram() { flush(); }

  void add(const TensorSpan& tensor, const Chunk& chunk, Partial& p) {
    int64_t* row = histogram_ + chunk.tensor * kBins;
    if (tensor.numel <= kChunk) {  // no other thread has a part of it: count straight into the row
      RowCounter counter(row);
      add_chunk(tensor, chunk, counter, p);
      return;
    }
    if (chunk.tensor != tensor_ || pending_ > kMaxPending) flush();
    tensor_ = chunk.tensor;
    pending_ += chunk.count;
    add_chunk(tensor, chunk, counters_, p);
  }

 private:
  static constexpr int64_t kMaxPending = int64_t(1) << 31;  // a 32-bit counter cannot overflow

  void flush() {
    if (pending_ > 0) counters_.flush(histogram_ + tensor_ * kBins);
    pending_ = 0;
  }

  int64_t* histogram_;
  Counters counters_;
  int64_t tensor_ = -1;
  int64_t pending_ = 0;
};

void write_statistics(const Partial& p, int64_t numel, int64_t tensor, int64_t count,
                      double* values, int64_t* counts) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const bool poisoned = p.nans > 0;
  const double abs_max = -p.min > p.max ? -p.min : p.max;
  values[stat::kSum * count + tensor] = p.sum;
  values[stat::kSumSquares * count + tensor] = p.sum_squares;
  values[stat::kAbsSum * count + tensor] = p.abs_sum;
  values[stat::kNorm * count + tensor] = std::sqrt(p.sum_squares);
  values[stat::kMin * count + tensor] = poisoned ? nan : p.min;
  values[stat::kMax * count + tensor] = poisoned ? nan : p.max;
  values[stat::kAbsMax * count + tensor] = poisoned ? nan : (numel > 0 ? abs_max : 0);
  counts[stat::kZeros * count + tensor] = p.zeros;
  counts[stat::kNans * count + tensor] = p.nans;
  counts[stat::kPosInfs * count + tensor] = p.pos_infs;
  counts[stat::kNegInfs * count + tensor] = p.neg_infs;
  counts[stat::kNumel * count + tensor] = numel;
}

}  // namespace

void tensor_stats(const TensorSpan* tensors, int64_t count, int64_t* histogram, double* values,
                  int64_t* counts, double* total_norm) {
  int64_t chunk_count = 0;
  for (int64_t t = 0; t < count; ++t) chunk_count += (tensors[t].numel + kChunk - 1) / kChunk;
  const std::unique_ptr<Chunk[]> chunks(new Chunk[chunk_count]);
  const std::unique_ptr<Partial[]> partials(new Partial[chunk_count]);
  int64_t next = 0;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t begin = 0; begin < tensors[t].numel; begin += kChunk) {
      const int64_t left = tensors[t].numel - begin;
      chunks[next++] = Chunk{t, begin, left < kChunk ? left : kChunk};
    }
  }

  parallel_queue(chunk_count, [&](WorkQueue& queue) {
    if (histogram == nullptr) {
      NoCounter none;
      for (int64_t c; (c = queue.take()) >= 0;) {
        add_chunk(tensors[chunks[c].tensor], chunks[c], none, partials[c]);
      }
      return;
    }
    ThreadHistogram thread_histogram(histogram);
    for (int64_t c; (c = queue.take()) >= 0;) {
      thread_histogram.add(tensors[chunks[c].tensor], chunks[c], partials[c]);
    }
  });

  double total = 0;
  int64_t c = 0;
  for (int64_t t = 0; t < count; ++t) {
    Partial sum;
    for (; c < chunk_count && chunks[c].tensor == t; ++c) sum.add(partials[c]);
    write_statistics(sum, tensors[t].numel, t, count, values, counts);
    total += sum.sum_squares;
  }
  *total_norm = std::sqrt(total);
}

}  // namespace pyvizllm::CPU_CAPABILITY
