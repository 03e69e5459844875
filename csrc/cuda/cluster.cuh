// Thread-block clusters (sm_90 and newer): blocks of a grid that run at the same time and may write
// into each other's shared memory. On older devices every block is a cluster of its own.
#pragma once

#include "launch.cuh"

namespace pyvizllm {

constexpr int kMaxCluster = 16;  // blocks; more than 8 is not portable, and asked for at the launch

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
__device__ __forceinline__ unsigned cluster_size() {
  return 1;
}
__device__ __forceinline__ unsigned cluster_rank() {
  return 0;
}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ T* in_block(T* shared, unsigned) {
  return shared;
}
#else
__device__ __forceinline__ unsigned cluster_size() {
  return __clusterSizeInBlocks();
}
// This block's number in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  return __clusterRelativeBlockRank();
}
// The barrier of all threads of the cluster, in two halves. What a thread wrote before it arrived,
// be it into another block's shared memory, is seen by all that have waited.
__device__ __forceinline__ void cluster_arrive() {
  __cluster_barrier_arrive();
}
__device__ __forceinline__ void cluster_wait() {
  __cluster_barrier_wait();
}
// The address of the same shared variable in the block of that rank, which must have started and
// must not have ended.
template <class T>
__device__ __forceinline__ T* in_block(T* shared, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
}
#endif

// How a kernel with dynamic shared memory is launched.
struct ClusterShape {
  int64_t clusters;
  int blocks;           // per cluster; 1 for an ordinary launch
  size_t shared_bytes;  // per block
};

// Calls body(config) with the launch's configuration.
template <class Body>
auto with_config(const ClusterShape& shape, void* stream, const Body& body) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(shape.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(shape.clusters * shape.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.blocks > 1 ? 1 : 0;
  return body(config);
}

// As launch() in launch.cuh.
template <class... Parameters, class... Arguments>
void launch_clusters(const char* name, void (*kernel)(Parameters...), const ClusterShape& shape,
                     void* stream, Arguments&&... arguments) {
  with_config(shape, stream, [&](const cudaLaunchConfig_t& config) {
    check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
  });
}

}  // namespace pyvizllm
