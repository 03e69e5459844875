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
constexpr int kIntoL2 = 2;  // locality of __builtin_prefetch; L1 is the counters'

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

// A chunk's sums, still one per lane: adding the lanes up costs as much as a hundred elements.
struct ChunkSums {
  Doubles sum[2] = {}, squares[2] = {}, abs_sum[2] = {};
  Floats min = Floats{} + std::numeric_limits<float>::infinity();
  Floats max = Floats{} - std::numeric_limits<float>::infinity();
  Partial exact;  // what was added element by element, and the zeros of all blocks

  void add(Floats block_sum, Floats block_squares, Floats block_abs_sum, Floats block_min,
           Floats block_max, int64_t zeros) {
    add_widened(block_sum, sum);
    add_widened(block_squares, squares);
    add_widened(block_abs_sum, abs_sum);
    min = minimum(block_min, min);
    max = maximum(block_max, max);
    exact.zeros += zeros;
  }

  Partial total() const {
    Partial p;
    p.sum = sum_lanes(sum[0]) + sum_lanes(sum[1]);
    p.sum_squares = sum_lanes(squares[0]) + sum_lanes(squares[1]);
    p.abs_sum = sum_lanes(abs_sum[0]) + sum_lanes(abs_sum[1]);
    p.min = -max_lanes<float>(-min);
    p.max = max_lanes<float>(max);
    p.add(exact);
    return p;
  }
};

// Whether a block's float32 sums hold: no NaN, no Inf, and the squares of its largest values are
// normal floats. (A lane whose own largest is tiny beside another's loses nothing that counts.)
inline bool squares_are_safe(Floats abs_max, Floats abs_sum) {
  constexpr uint32_t kAllLanes = (1u << kFloatLanes) - 1;
  const auto no_lane = [](Ints condition) { return zero_lanes(Words(condition)) == kAllLanes; };
  const auto all_lanes = [](Ints condition) { return zero_lanes(Words(condition)) == 0; };
  const bool bounded =
      all_lanes((abs_max < 0x1p58f) & (abs_sum < std::numeric_limits<float>::infinity()));
  return bounded && (!no_lane(abs_max > 0x1p-40f) || no_lane(abs_sum > 0.0f));
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

// note: [counting behind]
// A block's offsets pass through memory: two instructions an element, a load and an increment,
// where taking them from a vector register needs five. They are counted kBehind elements later,
// when the store has reached the cache; meanwhile the arithmetic of the next vectors fills the
// gaps.
constexpr int64_t kBehind = 64;

inline void store_offsets(Words bits, uint16_t* offsets) {
  const Halves narrowed = narrow((bits >> Counters::kOffsetShift) & Counters::kOffsetMask);
  std::memcpy(offsets, &narrowed, sizeof(narrowed));
}

template <class Counter>
inline void count_offsets(const uint16_t* offsets, Counter& counter) {
  for (int lane = 0; lane < kFloatLanes; ++lane) {
    counter.add(offsets[lane], lane % Counters::kCopies);
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
void add_block(const T* x, int64_t count, Counter& counter, ChunkSums& p) {
  constexpr bool kHistogram = !std::is_same_v<Counter, NoCounter>;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Floats sum{}, squares{}, abs_sum{};
  Floats min = Floats{} + kInfinity, max = Floats{} - kInfinity;
  int64_t zeros = 0, zero_vectors = 0;
  uint16_t offsets[kBlock];
  int64_t stored = 0, counted = 0;

  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) {
    const Floats v = load(x + i);
    const Words bits = bit_cast<Words>(v);
    // The processor's own prefetcher stops at the end of a page, a block away. Never faults.
    __builtin_prefetch(x + i + kBlock, 0, kIntoL2);
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
    if constexpr (kHistogram) {  // note: [counting behind]
      store_offsets(bits, offsets + stored);
      stored += kFloatLanes;
      if (stored - counted > kBehind) {
        count_offsets(offsets + counted, counter);
        counted += kFloatLanes;
      }
    }
  }

  if constexpr (kHistogram) {
    for (; counted < stored; counted += kFloatLanes) count_offsets(offsets + counted, counter);
  }

  if (zero_vectors > 0) {
    min = minimum(Floats{}, min);
    max = maximum(Floats{}, max);
    if constexpr (kHistogram) counter.add_zeros(zero_vectors * kFloatLanes);
  }
  if (squares_are_safe(maximum(-min, max), abs_sum)) {
    p.add(sum, squares, abs_sum, min, max, zeros);
    add_exactly(x + i, count - i, p.exact);
  } else {
    add_exactly(x, count, p.exact);
  }
  for (; i < count; ++i) count_one(load_one(x + i), counter);
}

// Float64 takes the exact path; its bin is that of the value rounded to float32.
template <class Counter>
void add_block(const double* x, int64_t count, Counter& counter, ChunkSums& p) {
  add_exactly(x, count, p.exact);
  for (int64_t i = 0; i < count; ++i) count_one(float(x[i]), counter);
}

template <class Counter>
Partial reduce_chunk(const TensorSpan& tensor, const Chunk& chunk, Counter& counter) {
  ChunkSums p;
  const auto run = [&]<class T>(const T* data) {
    for (int64_t begin = 0; begin < chunk.count; begin += kBlock) {
      const int64_t left = chunk.count - begin;
      add_block(data + chunk.begin + begin, left < kBlock ? left : kBlock, counter, p);
    }
    return p.total();
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

  Partial reduce(const TensorSpan& tensor, const Chunk& chunk) {
    int64_t* row = histogram_ + chunk.tensor * kBins;
    if (tensor.numel <= kChunk) {  // no other thread has a part of it: count straight into the row
      RowCounter counter(row);
      return reduce_chunk(tensor, chunk, counter);
    }
    if (chunk.tensor != tensor_ || pending_ > kMaxPending) flush();
    tensor_ = chunk.tensor;
    pending_ += chunk.count;
    return reduce_chunk(tensor, chunk, counters_);
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
        partials[c] = reduce_chunk(tensors[chunks[c].tensor], chunks[c], none);
      }
      return;
    }
    ThreadHistogram thread_histogram(histogram);
    for (int64_t c; (c = queue.take()) >= 0;) {
      partials[c] = thread_histogram.reduce(tensors[chunks[c].tensor], chunks[c]);
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
