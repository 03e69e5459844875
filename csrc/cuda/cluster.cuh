// Thread-block clusters (sm_90 and newer): blocks of a grid that run at the same time and may write
// into each other's shared memory. On older devices every block is a cluster of its own.
#pragma once

#include <cstring>

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

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return unsigned(__cvta_generic_to_shared(shared));
}
// The same of the counterpart in the block of that rank.
__device__ __forceinline__ unsigned shared_address(const void* shared, unsigned rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(shared)), "r"(rank));
  return address;
}
#endif

// A message from every block of the cluster to every block, turn by turn: its first kBytes bytes.
//
// The barrier of a cluster orders all that a thread has written, so that it would wait for the
// gradients which are on their way to memory. Here a message is stored into the other block
// together with the news that it has come (st.async, PTX ISA), and nothing else is waited for.
// Messages of one turn lie where those of the turn before last lay: who sends has got the messages
// of the turn between, and those were sent when the ones before them had been read.
template <class Message, int kBytes>
class ClusterExchange {
 public:
  static_assert(kBytes % 16 == 0 && kBytes <= sizeof(Message) && sizeof(Message) % 16 == 0);
  struct alignas(16) Shared {
    Message messages[2][kMaxCluster];
    unsigned long long barriers[2];
  };

  // Every thread of the cluster must come here before any sends.
  explicit __device__ __forceinline__ ClusterExchange(Shared& shared) : shared_(shared) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      for (const unsigned long long& barrier : shared_.barriers) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier))
                     : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#endif
    cluster_arrive();
    cluster_wait();
  }

  // The messages of all blocks, by rank. To be called by every thread of the cluster, those of a
  // block with the same message, and with a barrier of the block since the last time. `turn`: how
  // often it has been called.
  __device__ __forceinline__ const Message* operator()(const Message& message, unsigned blocks,
                                                       unsigned turn) const {
    const unsigned slot = turn % 2, rank = cluster_rank();
#if !defined(__CUDA_ARCH__)
    if (threadIdx.x < blocks) *in_block(&shared_.messages[slot][rank], threadIdx.x) = message;
    cluster_arrive();
    cluster_wait();
#elif __CUDA_ARCH__ >= 900
    const unsigned barrier = shared_address(&shared_.barriers[slot]);
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(blocks * kBytes)
                   : "memory");
    }
    if (threadIdx.x < blocks) {
      const unsigned to = shared_address(&shared_.messages[slot][rank], threadIdx.x);
      const unsigned its_barrier = shared_address(&shared_.barriers[slot], threadIdx.x);
      unsigned long long words[sizeof(Message) / 8];
      std::memcpy(words, &message, sizeof(Message));
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [%0], {%1, %2}, "
            "[%3];" ::"r"(to + 16 * i),
            "l"(words[2 * i]), "l"(words[2 * i + 1]), "r"(its_barrier)
            : "memory");
      }
    }
    unsigned arrived = 0;
    while (arrived == 0) {
      asm volatile(
          "{ .reg .pred p;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(arrived)
          : "r"(barrier), "r"(turn / 2 % 2)
          : "memory");
    }
#endif
    return shared_.messages[slot];
  }

 private:
  Shared& shared_;
};

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
