// Which way the fused kernel takes for rows of a given size on a given device: plain arithmetic,
// apart from the launch so that tests can ask for any device.
#pragma once

#include <cstdint>

namespace pyvizllm {

// What one block holds of a row, where a cluster can hold the rest. Larger: fewer blocks meet at a
// row's end. Smaller: more blocks share a multiprocessor, and load while others store. So much that
// two do.
constexpr int64_t kPartBytes = 100 * 1024;
// A row of at most so many bytes is one warp's. Larger: fewer barriers. Smaller: more warps.
constexpr int64_t kWarpRowBytes = 8 * 1024;
constexpr int kMostTiles = 8;  // of one block: as many groups of copies can be told apart

struct DeviceLimits {
  int multiprocessors;
  int64_t shared_per_block;  // bytes a block may have if it asks
  int largest_cluster;       // blocks; 1 where there are none
};

struct RowShape {
  int64_t classes;
  int element_size;
  bool aligned;  // all rows begin on a multiple of 16 bytes
};

struct KernelShape {
  int threads;           // of a block
  int warps;             // of a block
  int tile_vectors;      // 16-byte vectors of a thread's tile
  int64_t static_bytes;  // of shared memory, at most
};

enum class FusedPath { kWarp, kOnChip, kStreaming };

struct FusedPlan {
  FusedPath path;
  int cluster;           // blocks that share a row
  int64_t part_vectors;  // of a row, for each of them
  int tiles;             // of each thread, in shared memory
  int64_t shared_bytes;  // for them
};

// The vectors that a row may touch, wherever it begins.
inline int64_t vectors_of(const RowShape& shape) {
  const int64_t lanes = 16 / shape.element_size;
  return (shape.classes + (shape.aligned ? 0 : lanes - 1) + lanes - 1) / lanes;
}

inline bool is_of_one_warp(const RowShape& row) {
  return row.classes * row.element_size <= kWarpRowBytes;
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline FusedPlan plan_fused(const RowShape& row, const KernelShape& kernel,
                            const DeviceLimits& device) {
  const int64_t vectors = vectors_of(row);
  const int64_t room = device.shared_per_block - kernel.static_bytes;
  const auto plan = [&](FusedPath path, int cluster, int64_t part, int threads_per_row) {
    const int64_t rounds = divide_up(part, threads_per_row);  // vectors of a thread
    return FusedPlan{path, cluster, part, int(divide_up(rounds, kernel.tile_vectors)),
                     rounds * kernel.threads * 16};
  };
  if (is_of_one_warp(row)) {
    const FusedPlan warp = plan(FusedPath::kWarp, 1, vectors, kernel.threads / kernel.warps);
    if (warp.shared_bytes <= room) return warp;
  }
  for (int cluster = 1; cluster <= device.largest_cluster; cluster *= 2) {
    // A whole number of what a warp loads at once.
    const int64_t part = cluster == 1 ? vectors : divide_up(divide_up(vectors, cluster), 32) * 32;
    const FusedPlan chip = plan(FusedPath::kOnChip, cluster, part, kernel.threads);
    // One round more where rows do not begin on a vector.
    const bool small = chip.shared_bytes <= kPartBytes + kernel.threads * 16;
    if (chip.shared_bytes > room || chip.tiles > kMostTiles) continue;
    if (small || device.largest_cluster == 1) return chip;
  }
  return {FusedPath::kStreaming, 1, vectors, 0, 0};
}

}  // namespace pyvizllm
