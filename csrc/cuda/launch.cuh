// Launching a kernel, and checking that it was launched.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace pyvizllm {

// Every kernel runs blocks of this many threads: a constant, so that strides and trees unroll.
constexpr int kThreads = 256;
// At least so many of them share a multiprocessor. Where ptxas may choose, it spills to fit more.
constexpr int kResidentBlocks = 2;
constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": expected the CUDA call to succeed, got " +
                           cudaGetErrorString(status));
}

// Launches `blocks` blocks of kThreads threads on a cudaStream_t. Throws std::runtime_error with
// `name` where the launch fails; what fails while the kernel runs shows at a later call, as always.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, void* stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace pyvizllm
