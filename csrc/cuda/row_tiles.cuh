// A row's way through shared memory, tile by tile, ahead of its use.
//
// A thread copies the vectors that it will read itself, asynchronously (cp.async, sm_80 and newer),
// into slots that are its own: the copies need registers and barriers nowhere, so that a few blocks
// keep enough bytes on their way to fill the memory's pipe, across the ends of rows too. A bulk
// copy by one thread would save instructions, a few per cent of what there is to spare, and would
// need a barrier of the block for every tile.
//
// Vectors lie on 16-byte addresses whatever the row's own alignment. A row's first and last may be
// partial: they are copied with what they have of the rows beside it, which is not looked at and
// may change meanwhile. Where there is no row beside it nothing outside is read: these two vectors
// of all rows are loaded lane by lane.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "vec.cuh"

namespace pyvizllm {

// Until of the groups of copies that this thread began only the latest `later` may be under way.
__device__ __forceinline__ void wait_for_copies(int later) {
  __pipeline_wait_prior(later);
  // CUDA's wait alone does not tell the compiler that shared memory has changed.
  asm volatile("" ::: "memory");
}

// The threads that work on one row together: a warp, or a block.
template <int kThreadsPerRow>
struct RowGroup {
  static constexpr int kSize = kThreadsPerRow;
  static constexpr int kWarps = kSize / kWarpSize;
  static constexpr int kPerBlock = kThreads / kSize;
  static_assert(kSize == kWarpSize || kSize == kThreads);

  static __device__ __forceinline__ int thread() { return int(threadIdx.x) % kSize; }
  static __device__ __forceinline__ int warp() { return thread() / kWarpSize; }
  static __device__ __forceinline__ int index() { return int(threadIdx.x) / kSize; }
  static __device__ __forceinline__ void sync() {
    if constexpr (kSize == kWarpSize) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};
using WarpGroup = RowGroup<kWarpSize>;
using BlockGroup = RowGroup<kThreads>;

// What one group works on: whole vectors of a row, but for partial ones at the row's ends. Vectors
// are counted in 32 bits, which the host has checked to suffice, and which spares registers.
template <class T>
struct RowPart {
  static constexpr int kLanes = Vector<T>::kLanes;

  // Of the first vector: a multiple of 16 bytes, hence up to a vector before the row.
  const T* base;
  int vectors;  // 0 where there is nothing to load
  // Eight bits for the valid lanes of the first vector, eight for those of the last; and for each
  // of the two whether it has lanes outside of the memory of all rows. One register.
  uint32_t ends;

  __device__ __forceinline__ uint32_t valid(int vector) const {
    if (vector >= vectors) return 0;
    uint32_t lanes = kAllLanes<T>;
    if (vector == 0) lanes &= ends;
    if (vector == vectors - 1) lanes &= ends >> 8;
    return lanes;
  }
  // Whether all of a vector may be read.
  __device__ __forceinline__ bool readable(int vector) const {
    return !(vector == 0 && ends >> 16 & 1) && !(vector == vectors - 1 && ends >> 17 & 1);
  }
  // Whether all lanes of the vectors from `first` to `last` are valid.
  __device__ __forceinline__ bool full(int first, int last) const {
    const bool first_is_partial = (ends & kAllLanes<T>) != kAllLanes<T>;
    const bool last_is_partial = (ends >> 8 & kAllLanes<T>) != kAllLanes<T>;
    return first >= first_is_partial && last < vectors - last_is_partial;
  }
  // Whether element `index` of `row` is in one of the vectors.
  __device__ __forceinline__ bool holds(const T* row, int64_t index) const {
    const int64_t place = index - (base - row);
    return place >= 0 && place < int64_t(vectors) * kLanes;
  }
  // Where `gradient`, a row of the same length, has its counterpart of the first vector.
  template <class U>
  __device__ __forceinline__ U* counterpart(U* gradient, const T* row) const {
    return gradient + (base - row);
  }
};

constexpr int kWholeRow = 1 << 30;  // as many vectors of a row as it has

// Part `rank`, of `vectors` vectors, of a row of `classes` elements. So many elements of the memory
// of all rows lie `before` it and `behind` it.
template <class T>
__device__ __forceinline__ RowPart<T> part_of_row(const T* row, int64_t classes, int64_t before,
                                                  int64_t behind, int rank, int vectors) {
  constexpr int kLanes = Vector<T>::kLanes;
  const int head = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int64_t all = (head + classes + kLanes - 1) / kLanes;
  const int64_t first = int64_t(rank) * vectors;
  if (first >= all) return {row, 0, 0};
  const bool is_first = rank == 0, is_last = first + vectors >= all;
  const int tail = int(all * kLanes - head - classes);
  const uint32_t of_first = is_first ? kAllLanes<T> << head & kAllLanes<T> : kAllLanes<T>;
  const uint32_t of_last = is_last ? kAllLanes<T> >> tail : kAllLanes<T>;
  const uint32_t outside = uint32_t(is_first && before < head) | (is_last && behind < tail) << 1;
  return {row - head + first * kLanes, is_last ? int(all - first) : vectors,
          of_first | of_last << 8 | outside << 16};
}

template <class T>
__device__ __forceinline__ RowPart<T> no_part() {
  return {nullptr, 0, 0};
}

// Vectors whose arithmetic is interleaved. More: fewer stalls of a warp; less: fewer registers.
constexpr int kUnrolledVectors = 2;

// What a thread has of a tile, where all of it is valid. Vectors are read where they are used, if
// need be twice: shared memory has bandwidth to spare, and registers are few.
template <class T, int kCount>
struct FullTile {
  static constexpr int kUnrolled = kUnrolledVectors, kUnrolledReads = kCount;
  uint4* slot;

  static __device__ __forceinline__ constexpr int count() { return kCount; }
  static __device__ __forceinline__ constexpr uint32_t valid(int) { return kAllLanes<T>; }
  static __device__ __forceinline__ void fill(AccumulateType<T>) {}
  __device__ __forceinline__ Vector<T> operator[](int v) const {
    const uint4 raw = slot[v * kThreads];
    return {{raw.x, raw.y, raw.z, raw.w}};
  }
};

// The same where not all of it is valid. Lanes that are not hold anything until they are filled.
template <class T, int kSpan>
struct EdgeTile {
  static constexpr int kUnrolled = 1, kUnrolledReads = 1;
  uint4* slot;
  const RowPart<T>& part;
  int index;    // of the first vector
  int vectors;  // that one of the group's threads has at least

  __device__ __forceinline__ int count() const { return vectors; }
  __device__ __forceinline__ uint32_t valid(int v) const { return part.valid(index + v * kSpan); }
  // In shared memory, so that what reads the vectors has not to tell them from those of full tiles.
  __device__ __forceinline__ void fill(AccumulateType<T> value) const {
    const T element = round_to<T>(value);
#pragma unroll 1
    for (int v = 0; v < vectors; ++v) {
      const uint32_t lanes = valid(v);
      if (lanes == kAllLanes<T>) continue;
      char* const bytes = reinterpret_cast<char*>(slot + v * kThreads);
#pragma unroll
      for (int lane = 0; lane < Vector<T>::kLanes; ++lane) {
        if (!(lanes >> lane & 1)) std::memcpy(bytes + lane * sizeof(T), &element, sizeof(T));
      }
    }
  }
  __device__ __forceinline__ Vector<T> operator[](int v) const {
    const uint4 raw = slot[v * kThreads];
    return {{raw.x, raw.y, raw.z, raw.w}};
  }
};

// A thread's slots of shared memory, and the tiles in them: kVectors vectors of each of the
// group's threads, one thread's a group's width apart.
template <class T, class Group, int kVectors>
class TileSlots {
 public:
  static constexpr int kSpan = Group::kSize;           // vectors between those of a thread
  static constexpr int kStep = kSpan * kVectors;       // vectors of a tile
  static constexpr int kShared = kVectors * kThreads;  // the same of all of the block's groups

  explicit __device__ __forceinline__ TileSlots(uint4* memory) : own_(memory + threadIdx.x) {}

  // Begins to copy a tile, which may lie beyond the part's end. One group of copies in any case.
  __device__ __forceinline__ void start(const RowPart<T>& part, int tile, int slot) const {
    const int begin = tile * kStep + Group::thread();
    const T* const from = part.base + int64_t(begin) * RowPart<T>::kLanes;
    if (part.full(begin, begin + (kVectors - 1) * kSpan)) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) copy(from, slot, v);
    } else {
#pragma unroll 1
      for (int v = 0; v < kVectors; ++v) {
        const int index = begin + v * kSpan;
        if (index >= part.vectors) break;
        if (part.readable(index)) {
          copy(from, slot, v);
        } else {
          const T* const vector = part.base + int64_t(index) * RowPart<T>::kLanes;
          *address(slot, v) = load_lanes(vector, part.valid(index), AccumulateType<T>(0)).raw();
        }
      }
    }
    __pipeline_commit();
  }

  // Calls body(tile, index) with a tile that has arrived: in each thread of the group where the
  // tile has vectors at all, with a FullTile or an EdgeTile. `index` is the first vector's number,
  // the others are kSpan apart.
  template <class Body>
  __device__ __forceinline__ void read(const RowPart<T>& part, int tile, int slot,
                                       const Body& body) const {
    const int begin = tile * kStep + Group::thread();
    const int left = part.vectors - tile * kStep;
    if (part.full(begin, begin + (kVectors - 1) * kSpan)) {
      body(FullTile<T, kVectors>{address(slot, 0)}, begin);
    } else if (left > 0) {
      const int count = left >= kStep ? kVectors : (left + kSpan - 1) / kSpan;
      body(EdgeTile<T, kSpan>{address(slot, 0), part, begin, count}, begin);
    }
  }

 private:
  __device__ __forceinline__ uint4* address(int slot, int vector) const {
    return own_ + (slot * kVectors + vector) * kThreads;
  }
  // Vector v of those that begin at `from`.
  __device__ __forceinline__ void copy(const T* from, int slot, int v) const {
    __pipeline_memcpy_async(address(slot, v), from + v * (kSpan * RowPart<T>::kLanes),
                            sizeof(uint4));
  }

  uint4* own_;
};

// Rows of any length, one after the other, through a ring of kStages tiles.
template <class T, class Group, int kVectors, int kStages>
class RowStream {
 public:
  using Slots = TileSlots<T, Group, kVectors>;
  static constexpr int kSharedVectors = kStages * Slots::kShared;

  __device__ __forceinline__ RowStream(uint4* memory, const RowPart<T>& first, int = kStages)
      : slots_(memory), part_(first) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) slots_.start(part_, s, s);
  }

  // Calls body (see TileSlots::read) on the current row, while it starts to copy next().
  template <class Next, class Body>
  __device__ __forceinline__ void run(const Next& next, const Body& body) {
    // At least kStages, if need be empty, so that all of those of `next` are started.
    int tiles = (part_.vectors + Slots::kStep - 1) / Slots::kStep;
    if (tiles < kStages) tiles = kStages;
    RowPart<T> ahead = part_;
    int tile_ahead = kStages;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile_ahead == tiles) {
        ahead = next();
        tile_ahead = 0;
      }
      wait_for_copies(kStages - 1);
      slots_.read(part_, tile, slot_, body);
      slots_.start(ahead, tile_ahead++, slot_);
      slot_ = slot_ + 1 == kStages ? 0 : slot_ + 1;
    }
    part_ = ahead;
  }

  // As those of ResidentRow: the second time, the row comes from L2 where it fits.
  template <class Body>
  __device__ __forceinline__ void read(const Body& body) {
    const RowPart<T> again = part_;
    run([&] { return again; }, body);
  }
  template <class Next, class Body>
  __device__ __forceinline__ void read_again(const Next& next, const Body& body) {
    run(next, body);
  }

  // In the place of run(), where there is no current row.
  __device__ __forceinline__ void skip(const RowPart<T>& next) {
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) {
      slots_.start(next, s, slot_);
      slot_ = slot_ + 1 == kStages ? 0 : slot_ + 1;
    }
    part_ = next;
  }

  __device__ __forceinline__ const RowPart<T>& part() const { return part_; }

 private:
  Slots slots_;
  RowPart<T> part_;
  int slot_ = 0;
};

// A part that stays in shared memory until it was read twice. It has at most `tiles` tiles; those
// that it lacks are empty.
template <class T, class Group, int kVectors>
class ResidentRow {
 public:
  using Slots = TileSlots<T, Group, kVectors>;

  __device__ __forceinline__ ResidentRow(uint4* memory, const RowPart<T>& first, int tiles)
      : slots_(memory), part_(first), tiles_(tiles) {
    for (int tile = 0; tile < tiles_; ++tile) slots_.start(part_, tile, tile);
  }

  template <class Body>
  __device__ __forceinline__ void read(const Body& body) const {
#pragma unroll 1
    for (int tile = 0; tile < tiles_; ++tile) {
      wait_for_copies(tiles_ - 1 - tile);  // all of `tiles_` are on their way, none behind
      slots_.read(part_, tile, tile, body);
    }
  }

  // The second time. Each tile's place is at once given to the next part's.
  template <class Next, class Body>
  __device__ __forceinline__ void read_again(const Next& next, const Body& body) {
    const RowPart<T> ahead = next();
#pragma unroll 1
    for (int tile = 0; tile < tiles_; ++tile) {
      slots_.read(part_, tile, tile, body);
      slots_.start(ahead, tile, tile);
    }
    part_ = ahead;
  }

  // In the place of both, where there is no current row.
  __device__ __forceinline__ void skip(const RowPart<T>& next) {
#pragma unroll 1
    for (int tile = 0; tile < tiles_; ++tile) slots_.start(next, tile, tile);
    part_ = next;
  }

  __device__ __forceinline__ const RowPart<T>& part() const { return part_; }

 private:
  Slots slots_;
  RowPart<T> part_;
  int tiles_;
};

}  // namespace pyvizllm
