// Kernels with the mistakes that the emulator must find, and one without.
#include "../../csrc/cuda/launch.cuh"

namespace {

using pyvizllm::kThreads;
using pyvizllm::kWholeWarp;

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

}  // namespace

// Null, or what the launch threw.
extern "C" const char* run_fault(const char* name, float* out) {
  static std::string message;
  const std::pair<const char*, void (*)(float*)> kernels[] = {
      {"reverse", reverse_kernel},           {"missing_barrier", missing_barrier_kernel},
      {"half_barrier", half_barrier_kernel}, {"two_barriers", two_barriers_kernel},
      {"half_warp", half_warp_kernel},       {"foreign_lane", foreign_lane_kernel},
  };
  for (const auto& [known, kernel] : kernels) {
    if (std::string(name) != known) continue;
    try {
      pyvizllm::launch(name, kernel, 1, nullptr, out);
      return nullptr;
    } catch (const std::exception& error) {
      message = error.what();
      return message.c_str();
    }
  }
  return "no such kernel";
}
