// How the CPU kernels count the bins of the 4096-bin histogram: one load and one store an element,
// or on AVX-512 two elements.
#pragma once

#include <memory>
#include <type_traits>

#include "../bins.h"
#include "simd.h"

namespace pyvizllm::CPU_CAPABILITY {

constexpr int64_t kChunk = 65536;      // a multiple of kChunkBlock
constexpr int64_t kChunkBlock = 1024;  // a multiple of every vector's lanes

// note: [four counters]
// Neighbours often share a bin. An increment of a counter that was written a few cycles ago waits
// for that store; four counters a bin, used in turn, do not. They are adjacent, since addresses
// 4 KiB apart would look like one to the store buffer, and the bin is kept as a byte offset,
// 16 * bin, which just fits 16 bits.
constexpr int kCopies = 4;
constexpr uint32_t kCopiesMask = 0xfff0;

// note: [pairs]
// Counting costs a load and a store an element, so neighbours that both lie in a window of 16
// octaves share one increment, in a table of pairs. The window is so wide that of usual data only
// some vector in a hundred does not lie in it: a mispredicted branch costs as much as a vector.
// Those vectors are counted element by element.
//
// What counts is how many cache lines of the table are in use: the codes of a bin and of its
// negative are neighbours, a pair and its reverse are one, and rows are not a power of two apart,
// which would put all of them into the same few sets of the cache.
constexpr int kPairLanes = kFloatLanes / 2;
using PairWords = VectorOf<uint32_t, kPairLanes>;

class PairWindow {
 public:
  static constexpr int kCodes = 256;
  static constexpr int kStride = kCodes + 8;  // of the rows, each of one larger code

  explicit PairWindow(uint32_t first = 1) : first_(first) {}

  // Where a vector's bins lie in the window, and the sign above; whether all of them do.
  Words places(Words bits) const { return (bits >> kBinShift) - first_; }
  static bool all_within(Words places) { return all_zero(places & (kSign - kPlaces)); }

  // The table's index for each two neighbours.
  static PairWords pairs(Words places) {
    const Halves narrowed = narrow(places);
    const Halves codes = ((narrowed << 1) & uint16_t(kCodes - 1)) | (narrowed >> 11);
    const PairWords two = bit_cast<PairWords>(codes);
    const Halves swapped = bit_cast<Halves>((two >> 16) | (two << 16));
    const PairWords larger = bit_cast<PairWords>(codes > swapped ? codes : swapped);
    const PairWords smaller = bit_cast<PairWords>(codes > swapped ? swapped : codes);
    return (larger & 0xffffu) * kStride + (smaller & 0xffffu);
  }

  // The bin of a code, which is twice the place, plus one for negative values.
  uint32_t bin(uint32_t code) const { return (code & 1) * kSign + (code >> 1) + first_; }

  // The window for values of at most this magnitude, and some that are up to four times as large.
  static PairWindow for_magnitude(float abs_max) {
    constexpr int64_t kAbove = 16;
    const int64_t last = int64_t(bin_of_bits(bit_cast<uint32_t>(abs_max))) + kAbove;
    const int64_t first = last - int64_t(kPlaces) + 1;
    constexpr int64_t kLargest = kSign - kPlaces;
    return PairWindow(uint32_t(first < 1 ? 1 : (first > kLargest ? kLargest : first)));
  }
  // Zeros and outliers alone are no reason to move.
  bool is_near(const PairWindow& other) const {
    constexpr uint32_t kNear = 16;
    return first_ < other.first_ + kNear && other.first_ < first_ + kNear;
  }

 private:
  static constexpr uint32_t kPlaces = kCodes / 2;
  static constexpr uint32_t kSign = kBins / 2;

  uint32_t first_;  // the bin of the least magnitude, at least 1: zeros never lie in the window
};

// The counts of a tensor's chunks that one thread has seen.
class Counters {
 public:
  // Only AVX-512 narrows and joins lanes in so few instructions that pairs are worth it.
  static constexpr bool kPairs = kVectorBytes == 64;

  Counters()
      : counts_(new uint32_t[kCopies * kBins]()),
        pairs_(kPairs ? new uint32_t[PairWindow::kCodes * PairWindow::kStride]() : nullptr) {}

  void add(uint16_t offset, int copy) {
    ++*reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(counts_.get()) + offset + 4 * copy);
  }
  void add_pair(uint32_t pair) { ++pairs_[pair]; }
  void add_zeros(int64_t count) { counts_[0] += uint32_t(count); }

  const PairWindow& window() const { return window_; }

  // Told at the end of a block how its elements were counted; whether the window should be moved.
  // Adding up a table of pairs costs as much as counting some ten blocks, an empty one nothing.
  bool misses(int64_t pairs, int64_t singles) {
    pairs_counted_ += pairs;
    singles_counted_ += singles;
    return 2 * singles > kChunkBlock && (pairs_counted_ == 0 || singles_counted_ > kChunk);
  }

  void move_window(float abs_max) {
    singles_counted_ = 0;
    const PairWindow moved = PairWindow::for_magnitude(abs_max);
    if (moved.is_near(window_)) return;
    add_pairs_up();
    window_ = moved;
  }

  // Adds to row and clears. Other threads may add to the same row.
  void flush(int64_t* row) {
    add_pairs_up();
    uint32_t* c = counts_.get();
    for (int bin = 0; bin < kBins; ++bin, c += kCopies) {
      const int64_t total = int64_t(c[0]) + c[1] + c[2] + c[3];
      if (total != 0) __atomic_fetch_add(row + bin, total, __ATOMIC_RELAXED);
    }
    std::memset(counts_.get(), 0, sizeof(uint32_t) * kCopies * kBins);
  }

 private:
  void add_pairs_up() {
    if (pairs_counted_ == 0) return;
    pairs_counted_ = 0;
    constexpr int kCodes = PairWindow::kCodes;
    uint32_t sums[kCodes] = {};
    const uint32_t* pair = pairs_.get();
    for (int larger = 0; larger < kCodes; ++larger, pair += PairWindow::kStride) {
      uint32_t row = 0;
      for (int code = 0; code <= larger; ++code) {
        sums[code] += pair[code];
        row += pair[code];
      }
      sums[larger] += row;
    }
    for (int code = 0; code < kCodes; ++code) {
      counts_[kCopies * window_.bin(code)] += sums[code];
    }
    std::memset(pairs_.get(), 0, sizeof(uint32_t) * kCodes * PairWindow::kStride);
  }

  std::unique_ptr<uint32_t[]> counts_;  // [kBins, kCopies]
  std::unique_ptr<uint32_t[]> pairs_;   // [kCodes, kStride]
  PairWindow window_;
  int64_t pairs_counted_ = 0;    // since pairs_ was empty
  int64_t singles_counted_ = 0;  // since the window was last looked at
};

// The same interface over a row of the histogram that no other thread touches.
class RowCounter {
 public:
  static constexpr bool kPairs = false;

  explicit RowCounter(int64_t* row) : row_(row) {}
  void add(uint16_t offset, int) { ++row_[offset / 16]; }
  void add_zeros(int64_t count) { row_[0] += count; }

 private:
  int64_t* row_;
};

struct NoCounter {
  static constexpr bool kPairs = false;
};

// note: [counting behind]
// A block's offsets pass through memory: two instructions an element, a load and an increment,
// where taking them from a vector register needs five. They are counted kBehind elements later,
// when the store has reached the cache; meanwhile the arithmetic of the next vectors fills the
// gaps.
constexpr int64_t kBehind = 128;

inline void store_offsets(Words bits, uint16_t* offsets) {
  const Halves narrowed = narrow((bits >> (kBinShift - 4)) & kCopiesMask);
  std::memcpy(offsets, &narrowed, sizeof(narrowed));
}

template <class Counter>
inline void count_offsets(const uint16_t* offsets, Counter& counter) {
  for (int lane = 0; lane < kFloatLanes; ++lane) counter.add(offsets[lane], lane % kCopies);
}

inline void store_pairs(Words places, uint32_t* pairs) {
  const PairWords joined = PairWindow::pairs(places);
  std::memcpy(pairs, &joined, sizeof(joined));
}

template <class Counter>
inline void count_pairs(const uint32_t* pairs, Counter& counter) {
  for (int lane = 0; lane < kPairLanes; ++lane) counter.add_pair(pairs[lane]);
}

template <class Counter>
inline void count_one(float value, Counter& counter) {
  counter.add(uint16_t(bin_of_bits(bit_cast<uint32_t>(value)) * 16), 0);
}
inline void count_one(float, NoCounter&) {}

// Indices of a block's counters, on their way from vector registers to addresses.
struct BlockScratch {
  uint16_t offsets[kChunkBlock];
  uint32_t pairs[kChunkBlock / 2];
};

// The counts of one thread, on their way to the histogram's rows.
//
//   if (ThreadHistogram::fits_one_chunk(numel)) { RowCounter counter = h.row(tensor); ... }
//   else { Counters& counter = h.counters(tensor, chunk.count); ... }
class ThreadHistogram {
 public:
  explicit ThreadHistogram(int64_t* histogram) : histogram_(histogram) {}
  ThreadHistogram(const ThreadHistogram&) = delete;
  ThreadHistogram& operator=(const ThreadHistogram&) = delete;
  ~ThreadHistogram() { flush(); }

  // No other thread has a part of such a tensor: it is counted straight into its row.
  static bool fits_one_chunk(int64_t numel) { return numel <= kChunk; }
  RowCounter row(int64_t tensor) { return RowCounter(histogram_ + tensor * kBins); }

  // For the next `count` elements of a tensor of several chunks.
  Counters& counters(int64_t tensor, int64_t count) {
    if (!counters_) counters_.reset(new Counters);
    if (tensor != tensor_ || pending_ > kMaxPending) flush();
    tensor_ = tensor;
    pending_ += count;
    return *counters_;
  }

 private:
  static constexpr int64_t kMaxPending = int64_t(1) << 31;  // a 32-bit counter cannot overflow

  void flush() {
    if (pending_ > 0) counters_->flush(histogram_ + tensor_ * kBins);
    pending_ = 0;
  }

  int64_t* histogram_;
  std::unique_ptr<Counters> counters_;  // large, and small tensors do not need it
  int64_t tensor_ = -1;
  int64_t pending_ = 0;
};

}  // namespace pyvizllm::CPU_CAPABILITY
