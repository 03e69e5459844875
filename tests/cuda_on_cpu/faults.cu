// Kernels with the mistakes that the emulator must find, and one without.
#include <cuda_pipeline_primitives.h>

#include "../../csrc/cuda/cluster.cuh"

namespace {

using namespace pyvizllm;

// out[t] = kThreads - 1 - t, through shared memory.
__global__ void reverse_kernel(float* out) {  // [kThreads]
  __shared__ float values[kThreads];
  values[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void missing_barrier_kernel(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void half_barrier_kernel(float* out) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
  out[threadIdx.x] = float(kThreads - 1 - threadIdx.x);
}

__global__ void two_barriers_kernel(float* out) {
  if (threadIdx.x < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = float(kThreads - 1 - threadIdx.x);
}

__global__ void half_warp_kernel(float* out) {
  const float value = float(kThreads - 1 - threadIdx.x);
  out[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_xor_sync(kWholeWarp, value, 0) : value;
}

__global__ void foreign_lane_kernel(float* out) {
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(half, float(kThreads - 1 - threadIdx.x), 16);
}

// The same, each of two blocks writing what the other needs: with a barrier before, since a block
// must have started, and one after.
template <bool kStart, bool kEnd, int kPeer>
__global__ void cluster_kernel(float* out) {
  __shared__ float values[kThreads];
  if (kStart) {
    cluster_arrive();
    cluster_wait();
  }
  const unsigned peer = (cluster_rank() + kPeer) % (kPeer == 1 ? 2 : 4);
  in_block(&values[0], peer)[threadIdx.x] = float(kThreads - 1 - threadIdx.x);
  if (kEnd) {
    cluster_arrive();
    cluster_wait();
  }
  if (threadIdx.x / (kThreads / 2) == cluster_rank()) out[threadIdx.x] = values[threadIdx.x];
}

__global__ void half_cluster_kernel(float* out) {
  if (cluster_rank() == 0) {
    cluster_arrive();
    cluster_wait();
  }
  out[threadIdx.x] = float(kThreads - 1 - threadIdx.x);
}

template <bool kWait>
__global__ void copy_kernel(float* out) {
  __shared__ uint4 slots[kThreads];
  alignas(16) float values[4] = {float(kThreads - 1 - threadIdx.x)};
  __pipeline_memcpy_async(&slots[threadIdx.x], values, sizeof(uint4));
  __pipeline_commit();
  if (kWait) __pipeline_wait_prior(0);
  out[threadIdx.x] = __uint_as_float(slots[threadIdx.x].x);
}

}  // namespace

// Null, or what the launch threw.
extern "C" const char* run_fault(const char* name, float* out) {
  static std::string message;
  struct Fault {
    const char* name;
    void (*kernel)(float*);
    int blocks;  // of one cluster
  };
  const Fault faults[] = {
      {"reverse", reverse_kernel, 1},
      {"missing_barrier", missing_barrier_kernel, 1},
      {"half_barrier", half_barrier_kernel, 1},
      {"two_barriers", two_barriers_kernel, 1},
      {"half_warp", half_warp_kernel, 1},
      {"foreign_lane", foreign_lane_kernel, 1},
      {"copy", copy_kernel<true>, 1},
      {"copy_not_waited_for", copy_kernel<false>, 1},
      {"cluster", cluster_kernel<true, true, 1>, 2},
      {"block_not_started", cluster_kernel<false, true, 1>, 2},
      {"missing_cluster_barrier", cluster_kernel<true, false, 1>, 2},
      {"foreign_block", cluster_kernel<true, true, 2>, 2},
      {"half_cluster", half_cluster_kernel, 2},
  };
  for (const Fault& fault : faults) {
    if (std::string(name) != fault.name) continue;
    try {
      launch_clusters(name, fault.kernel, {1, fault.blocks, 0}, nullptr, out);
      return nullptr;
    } catch (const std::exception& error) {
      message = error.what();
      return message.c_str();
    }
  }
  return "no such kernel";
}
