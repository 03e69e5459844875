// Statistics and 4096-bin histograms as the CPU kernels collect them: tensor_stats from memory,
// AdamW from its registers.
//
// A tensor is cut into chunks that depend on its size alone; each chunk has a Partial of its own,
// and partial results are added in order: the same numbers for any number of threads. Counts are
// integers, so the histogram needs no order.
//
// A chunk is added block by block. Within a block the sums are float32 over vector lanes, then
// float64. A block with a NaN, an Inf, or values whose squares leave float32 is summed again in
// float64, element by element, which is why its elements must still be in memory at its end.
#pragma once

#include <limits>
#include <memory>
#include <type_traits>

#include "../kernels.h"
#include "counters.h"
#include "simd.h"

namespace pyvizllm::CPU_CAPABILITY {

struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t count;
};

// The chunks of a list of tensors, in order. Empty tensors have none.
class ChunkTable {
 public:
  template <class Tensor>
  ChunkTable(const Tensor* tensors, int64_t count) {
    for (int64_t t = 0; t < count; ++t) {
      size_ += (tensors[t].numel + kChunk - 1) / kChunk;
      elements_ += tensors[t].numel;
    }
    chunks_.reset(new Chunk[size_]);
    int64_t next = 0;
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t begin = 0; begin < tensors[t].numel; begin += kChunk) {
        const int64_t left = tensors[t].numel - begin;
        chunks_[next++] = Chunk{t, begin, left < kChunk ? left : kChunk};
      }
    }
  }

  int64_t size() const { return size_; }
  // Whether one thread has done it before another one is awake: some ten microseconds.
  bool is_small() const { return elements_ + kChunkCost * size_ < 32768; }
  const Chunk& operator[](int64_t index) const { return chunks_[index]; }

 private:
  static constexpr int64_t kChunkCost = 256;  // in elements

  int64_t size_ = 0;
  int64_t elements_ = 0;
  std::unique_ptr<Chunk[]> chunks_;
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
inline void add_exactly(const T* x, int64_t count, Partial& p) {
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

// The statistics of one block of at most kChunkBlock elements, a vector at a time:
//
//   BlockStatistics block(counter, offsets);
//   for each whole vector v of the block: block.add(v);
//   block.finish(x, count, sums);  // x: the block's elements in memory, which hold what was added
//
// The counter is a Counters, a RowCounter or a NoCounter. Inlined, all of it lives in registers.
template <class Counter>
class BlockStatistics {
 public:
  static constexpr bool kHistogram = !std::is_same_v<Counter, NoCounter>;

  BlockStatistics(Counter& counter, BlockScratch& scratch) : counter_(counter), scratch_(scratch) {
    if constexpr (Counter::kPairs) window_ = counter.window();
  }

  void add(Floats v) {
    ++vectors_;
    const Words bits = bit_cast<Words>(v);
    const Words magnitude = bits & 0x7fffffffu;
    if (!count_as_pairs(bits) && !count_singly(bits, magnitude)) return;
    sum_ += v;
    squares_ += v * v;
    abs_sum_ += bit_cast<Floats>(magnitude);
    min_ = minimum(v, min_);
    max_ = maximum(v, max_);
  }

  // Adds the block to its chunk. What x holds after the last whole vector is added here.
  template <class T>
  void finish(const T* x, int64_t count, ChunkSums& chunk) {
    if constexpr (kHistogram) {
      for (; counted_ < stored_; counted_ += kFloatLanes) {
        count_offsets(scratch_.offsets + counted_, counter_);
      }
    }
    if constexpr (Counter::kPairs) {
      for (; pairs_counted_ < pairs_stored_; pairs_counted_ += kPairLanes) {
        count_pairs(scratch_.pairs + pairs_counted_, counter_);
      }
      if (counter_.misses(pairs_stored_, stored_)) {
        counter_.move_window(std::fabs(max_lanes<float>(maximum(-min_, max_))));
      }
    }
    if (zero_vectors_ > 0) {
      min_ = minimum(Floats{}, min_);
      max_ = maximum(Floats{}, max_);
      if constexpr (kHistogram) counter_.add_zeros(zero_vectors_ * kFloatLanes);
    }
    const int64_t added = vectors_ * kFloatLanes;
    if (squares_are_safe(maximum(-min_, max_), abs_sum_)) {
      chunk.add(sum_, squares_, abs_sum_, min_, max_, zeros_);
      add_exactly(x + added, count - added, chunk.exact);
    } else {
      add_exactly(x, count, chunk.exact);
    }
    for (int64_t i = added; i < count; ++i) count_one(load_one(x + i), counter_);
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  // False, and nothing is done, where not all of the vector lies in the window.
  bool count_as_pairs(Words bits) {
    if constexpr (Counter::kPairs) {
      const Words places = window_.places(bits);
      if (!PairWindow::all_within(places)) return false;
      store_pairs(places, scratch_.pairs + pairs_stored_);
      pairs_stored_ += kPairLanes;
      if (pairs_stored_ - pairs_counted_ > kBehind / 2) {  // note: [counting behind]
        count_pairs(scratch_.pairs + pairs_counted_, counter_);
        pairs_counted_ += kPairLanes;
      }
      return true;
    }
    return false;
  }

  // False for a vector of zeros, common in embedding gradients: that is all there is to do for it.
  bool count_singly(Words bits, Words magnitude) {
    if (const uint32_t zero = zero_lanes(magnitude)) {
      zeros_ += __builtin_popcount(zero);
      if (zero_lanes(bits) == (1u << kFloatLanes) - 1) {
        ++zero_vectors_;
        return false;
      }
    }
    if constexpr (kHistogram) {  // note: [counting behind]
      store_offsets(bits, scratch_.offsets + stored_);
      stored_ += kFloatLanes;
      if (stored_ - counted_ > kBehind) {
        count_offsets(scratch_.offsets + counted_, counter_);
        counted_ += kFloatLanes;
      }
    }
    return true;
  }

  Counter& counter_;
  BlockScratch& scratch_;
  PairWindow window_;
  Floats sum_{}, squares_{}, abs_sum_{};
  Floats min_ = Floats{} + kInfinity, max_ = Floats{} - kInfinity;
  int64_t vectors_ = 0, zeros_ = 0, zero_vectors_ = 0;
  int64_t stored_ = 0, counted_ = 0;              // offsets
  int64_t pairs_stored_ = 0, pairs_counted_ = 0;  // pairs
};

inline void write_statistics(const Partial& p, int64_t numel, int64_t tensor, int64_t count,
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

// Adds the chunks' partial results up and writes the statistics of all tensors; returns the sum of
// all squares.
template <class Tensor>
inline double write_all_statistics(const Tensor* tensors, int64_t count, const ChunkTable& chunks,
                                   const Partial* partials,  // [chunks]
                                   double* values,           // [stat::kValues, count]
                                   int64_t* counts) {        // [stat::kCounts, count]
  double total = 0;
  int64_t c = 0;
  for (int64_t t = 0; t < count; ++t) {
    Partial sum;
    for (; c < chunks.size() && chunks[c].tensor == t; ++c) sum.add(partials[c]);
    write_statistics(sum, tensors[t].numel, t, count, values, counts);
    total += sum.sum_squares;
  }
  return total;
}

}  // namespace pyvizllm::CPU_CAPABILITY
