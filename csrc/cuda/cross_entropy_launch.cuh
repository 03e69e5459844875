// How many blocks, of what size, cross_entropy's kernels are launched with, and what it is tuned
// by.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "../kernels.h"
#include "cluster.cuh"
#include "cross_entropy_plan.h"
#include "row_options.cuh"

namespace pyvizllm {

// -- What a GPU is to decide ---------------------------------------------------------------------

// Vectors of a thread's tile. More: longer loops without a branch, more on their way at once, more
// registers and shared memory.
template <class T>
constexpr int kTileVectors = sizeof(T) == 8 ? 2 : 4;
// Tiles of the ring of kernels that keep no row. More: more bytes on their way; less: more blocks.
constexpr int kStages = 2;
// Blocks of a multiprocessor that registers must suffice for (64 a thread for four, 80 for three,
// 128 for two). What is on its way needs none, so that few blocks are enough; more hide more of
// what they wait. Less for sm_100 and newer, where ptxas keeps more of what could be computed again
// and would spill, with metrics and with options. float64 takes all registers there are.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kLossBlocks = 3, kMetricBlocks = 2, kOptionBlocks = 2;
#else
constexpr int kLossBlocks = 4, kMetricBlocks = 3, kOptionBlocks = 2;
#endif
template <class T, Variant kVariant>
constexpr int kBlocksOf = sizeof(T) == 8                  ? (kVariant == Variant::kLoss ? 2 : 1)
                          : kVariant == Variant::kLoss    ? kLossBlocks
                          : kVariant == Variant::kMetrics ? kMetricBlocks
                                                          : kOptionBlocks;
// The same of the fused kernel that keeps rows: of float32, fewer fit shared memory.
template <class T, Variant kVariant>
constexpr int kOnChipBlocks =
    sizeof(T) == 4 && kVariant == Variant::kLoss ? kLossBlocks - 1 : kBlocksOf<T, kVariant>;
template <class T>
constexpr int kTwoReadBlocks = sizeof(T) == 8 ? 1 : 2;  // of the fused kernel that reads rows twice
// Blocks of the kernels that keep no row, for each that fits at once. More: the last to end is
// waited for less; less: starting a block, and the results of its rows, cost less, which counts
// where warps have a few small rows each.
template <class Group>
constexpr int kWaves = Group::kPerBlock == 1 ? 4 : 2;

// -- Limits --------------------------------------------------------------------------------------

constexpr int64_t kMaxGroups = 16384;        // blocks, hence partial sums, of one launch
constexpr int64_t kStaticBytes = 10 * 1024;  // with what CUDA takes for itself

// What the blocks leave to the next kernel.
struct Workspace {
  double counts[kCountBlocks];        // class weights of the rows that count; only for the mean
  double weight_parts[kCountBlocks];  // class weights of all classes, where there are some
  double groups[1];                   // [groups, kColumns]: sums over the rows of each block

  // Of no more groups than blocks with a row each, in clusters of any size.
  static int64_t most_groups(int64_t rows) {
    return rows < kMaxGroups / kMaxCluster ? rows * kMaxCluster : kMaxGroups;
  }
  // Behind the groups, where there are probabilities: [3, rows].
  double* of_probabilities(int64_t rows) { return groups + most_groups(rows) * kColumns; }

  static int64_t bytes(const CrossEntropyArguments& a) {
    const int64_t more = a.probabilities == nullptr ? 0 : 3 * a.rows;
    const int64_t numbers = most_groups(a.rows) * kColumns + more;
    return int64_t(sizeof(Workspace)) + numbers * int64_t(sizeof(double));
  }
};

// One call of an operator, as its launches need it.
struct RowCall {
  CrossEntropyArguments a;
  Prepared prepared;
  Workspace* work;
  void* stream;
  const double* counts;     // for the mean, or null
  void* loss;               // [rows], or null
  double* records;          // [row_record::kSize, rows], or null
  void* grad;               // [rows, classes]; null for the forward
  int64_t grad_row_stride;  // elements
};

// -- cross_entropy_options.cu --------------------------------------------------------------------

// Whether the kernels that know of no options will not do.
inline bool has_options(const CrossEntropyArguments& a) {
  return a.softcap != 0 || a.logit_scale != 1 || a.weight != nullptr ||
         a.probabilities != nullptr || a.total_classes != 0;
}

// Of probabilities computes what is to be known before the rows are read, and gives the call the
// most probable classes as targets.
void prepare_probabilities(RowCall& call);
int64_t forward_with_options(const RowCall& call, CrossEntropyRowState state);
void backward_with_options(const RowCall& call, CrossEntropyRowState state, const void* grad_loss,
                           int64_t grad_loss_stride);
int64_t fused_with_options(const RowCall& call);

// -- Blocks --------------------------------------------------------------------------------------

// The block's dynamic shared memory.
__device__ __forceinline__ uint4* dynamic_shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 dynamic_memory[];
  return dynamic_memory;
#else  // a compiler that has none: as much as any plan asks for
  __shared__ uint4 dynamic_memory[(kMostTiles + 1) * 4 * kThreads];
  return dynamic_memory;
#endif
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cross_entropy");
  return value;
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cross_entropy");
  return device;
}

// Asked once a device.
inline const DeviceLimits& device_limits() {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const int device = current_device();
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  return known[device] = {
             device_attribute(cudaDevAttrMultiProcessorCount, device),
             device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             device_attribute(cudaDevAttrClusterLaunch, device) != 0 ? kMaxCluster : 1};
}

// How many clusters (for clusters of one: blocks) of a kernel the device runs at once, or 0 where
// it refuses them. Lets the kernel have the shared memory. Asked once for each shape.
inline int64_t resident_clusters(const char* name, const void* kernel, const ClusterShape& shape) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, size_t>, int64_t> known;
  const auto key = std::make_tuple(current_device(), kernel, shape.blocks, shape.shared_bytes);
  const DeviceLimits& limits = device_limits();
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  // The same for all shapes: a smaller one must not take back what a larger one was granted.
  const int64_t most = limits.shared_per_block - kStaticBytes;
  if (int64_t(shape.shared_bytes) <= most) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)),
               name);
  }
  int count = 0;
  if (shape.blocks == 1) {
    check_cuda(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kThreads, shape.shared_bytes),
        name);
    return known[key] = int64_t(count) * limits.multiprocessors;
  }
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
  ClusterShape one = shape;
  one.clusters = 1;
  const cudaError_t status = with_config(one, nullptr, [&](const cudaLaunchConfig_t& config) {
    return cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  });
  if (status != cudaSuccess) {
    cudaGetLastError();  // so that the next launch does not report it
    count = 0;
  }
  return known[key] = count;
}

// Of `wanted` groups of blocks, those to launch, each for several of the rows if need be.
inline int64_t groups_of(int64_t wanted, int blocks, int64_t most) {
  if (most * blocks > kMaxGroups) most = kMaxGroups / blocks;
  return wanted < most ? wanted : most;
}

// `blocks`: of a multiprocessor.
template <class Group>
int64_t stream_blocks(int64_t rows, int blocks) {
  return groups_of(divide_up(rows, Group::kPerBlock), 1,
                   int64_t(device_limits().multiprocessors) * blocks * kWaves<Group>);
}

template <class T>
RowShape row_shape(const CrossEntropyArguments& a) {
  const bool aligned = reinterpret_cast<uintptr_t>(a.logits) % 16 == 0 &&
                       (a.rows == 1 || a.row_stride * int64_t(sizeof(T)) % 16 == 0);
  return {a.classes, int(sizeof(T)), aligned};
}

template <class T>
FusedPlan fused_plan(const CrossEntropyArguments& a) {
  return plan_fused(row_shape<T>(a),
                    {kThreads, kThreads / kWarpSize, kTileVectors<T>, kStaticBytes},
                    device_limits());
}

// Of a row that is read twice, through the ring.
template <class T>
FusedPlan streaming_plan() {
  return {FusedPath::kStreaming, 1, kWholeRow, 0,
          int64_t(kStages) * kTileVectors<T> * kThreads * 16};
}

}  // namespace pyvizllm
