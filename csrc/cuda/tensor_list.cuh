// A list of tensors of any number and sizes, cut into chunks for the blocks of a launch.
//
// note: [tensor table]
// The list travels as a kernel parameter: no upload, nothing to keep alive or to key on pointers,
// and a captured graph holds its own copy. Parameters may take 32764 bytes; a longer list takes
// several launches.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace pyvizllm {

// Elements of a chunk. Larger: fewer reductions (one costs a warp some 150 instructions) and longer
// runs of loads; smaller: the last blocks of a launch end closer together.
constexpr int64_t kChunk = 32768;
static_assert(kChunk < 65536, "16 bits hold each count of a chunk");

inline int64_t chunks_of(int64_t numel) {
  return (numel + kChunk - 1) / kChunk;
}

// The least a table has to know of a tensor; entries derive from it.
struct TensorEntry {
  int64_t numel;
  int first_chunk;  // among those of all tables; filled in by for_each_table
  int tensor;       // its place in the list; likewise
};

// Part of a list. Empty tensors are allowed anywhere; each shares its successor's first chunk.
template <class Entry, int kSize>
struct TensorTable {
  static constexpr int kCapacity = kSize;

  Entry entries[kCapacity];
  int count;
  int first_chunk, end_chunk;  // those of this table

  // Where the chunks of an entry end.
  __device__ __forceinline__ int end_of(int entry) const {
    return entry + 1 < count ? entries[entry + 1].first_chunk : end_chunk;
  }
  __host__ __device__ __forceinline__ int64_t chunks() const { return end_chunk - first_chunk; }
};

// One chunk, as a block sees it.
struct ListChunk {
  int entry;       // of its tensor, in the table
  int index;       // among the chunks of all tables
  int turn;        // 0, 1, ...: of this block
  int count;       // elements
  int64_t offset;  // of its first element in the tensor
};

// Calls body(ListChunk) with this block's share of the table's chunks: neighbours in ascending
// order, so that a block rarely turns to another tensor. All threads do so together.
template <class Table, class Body>
__device__ __forceinline__ void for_each_chunk(const Table& table, const Body& body) {
  const int64_t chunks = table.chunks(), blocks = gridDim.x;
  const int begin = table.first_chunk + int(chunks * blockIdx.x / blocks);
  const int end = table.first_chunk + int(chunks * (blockIdx.x + 1) / blocks);
  // The last entry that starts at or before the first chunk: empty tensors are passed over.
  int entry = 0;
  for (int high = table.count; high - entry > 1;) {
    const int middle = (entry + high) / 2;
    (table.entries[middle].first_chunk <= begin ? entry : high) = middle;
  }
  for (int chunk = begin; chunk < end; ++chunk) {
    while (chunk >= table.end_of(entry)) ++entry;
    const int64_t offset = (chunk - table.entries[entry].first_chunk) * kChunk;
    const int64_t left = table.entries[entry].numel - offset;
    body(ListChunk{entry, chunk, chunk - begin, int(left < kChunk ? left : kChunk), offset});
  }
}

// Cuts a list of `count` tensors into tables and calls launch_table(table) with each, none of them
// without a tensor. fill(t, entry) fills in the entry of tensor t, or returns false to leave it
// out. Chunks are numbered from first_chunk on; returns the number after the last.
template <class Table, class Fill, class LaunchTable>
int for_each_table(int64_t count, int first_chunk, const Fill& fill,
                   const LaunchTable& launch_table) {
  Table table;
  const auto begin = [&table](int chunk) {
    table.count = 0;
    table.first_chunk = table.end_chunk = chunk;
  };
  begin(first_chunk);
  for (int64_t t = 0; t < count; ++t) {
    auto& entry = table.entries[table.count];
    if (!fill(t, entry)) continue;
    entry.tensor = int(t);
    entry.first_chunk = table.end_chunk;
    table.end_chunk += int(chunks_of(entry.numel));
    if (++table.count < Table::kCapacity) continue;
    launch_table(table);
    begin(table.end_chunk);
  }
  if (table.count > 0) launch_table(table);
  return table.end_chunk;
}

inline int64_t multiprocessors(const char* what) {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), what);
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), what);
  return count;
}

}  // namespace pyvizllm
