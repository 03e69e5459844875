// The part of CUDA C++ that the kernels use, for a host compiler: found before NVIDIA's header of
// this name, it lets the unmodified .cu files run on the CPU, one fiber per CUDA thread.
//
// What it finds: missing and divergent barriers, wrong masks and shuffles, shared memory that is
// read before it is written (it holds NaN), asynchronous copies that are not waited for, blocks of
// a cluster that do not wait for each other, results that depend on the order of threads or blocks.
// What it cannot see: data races that every order hides, timing, rounding of approximate functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static thread_local  // an OS thread runs one block at a time

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

namespace cuda_on_cpu {

using Where = std::source_location;

// What one CUDA thread knows of itself.
struct Coordinates {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
const Coordinates& self();

// Waits for the whole block. Every thread must come to the same line.
void wait_for_block(const Where& where);

// Waits for the lanes of `mask` at the same line; returns what each of the 32 lanes brought.
const uint64_t* exchange(unsigned mask, uint64_t value, const Where& where);

// Ends the launch with a message. The threads of the block do not go on.
[[noreturn]] void fail(const std::source_location& where, const char* message);

// The barrier of a cluster, in two halves; where the same variable lies in another block of it.
void arrive_at_cluster();
void wait_for_cluster(const Where& where);
unsigned cluster_rank();
unsigned cluster_size();
void* map_to_block(void* shared, unsigned rank);

// Asynchronous copies. All but those of the last `later_groups` groups are waited for.
void begin_copy(void* to, const void* from, size_t bytes);
void end_copy_group();
void wait_for_copies(size_t later_groups);

using Body = void (*)(void* context);
// false: it failed
bool run_grid(dim3 grid, dim3 block, unsigned cluster, Body body, void* context);
const char* last_failure();

// What the device says of itself. A kernel may ask it once and remember the answers by the number.
struct Device {
  int number;
  int multiprocessors;  // one: few blocks, so that tests of persistent blocks see long runs of work
  int shared_bytes;     // a block may have
  int largest_cluster;  // 0: it has none
};
Device& device();

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline unsigned lane() {
  return self().thread.x % 32;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const Where& where) {
  if (source > 31 || !(mask >> source & 1)) fail(where, "shuffle from a lane outside the mask");
  return unpack<T>(exchange(mask, pack(value), where)[source]);
}

}  // namespace cuda_on_cpu

// No macros: gridDim and blockDim are also members of cudaLaunchConfig_t.
template <auto kMember>
struct BuiltinVariable {
  template <auto kCoordinate>
  struct Coordinate {
    operator unsigned() const { return cuda_on_cpu::self().*kMember.*kCoordinate; }
  };
  using Type = std::decay_t<decltype(cuda_on_cpu::self().*kMember)>;
  [[no_unique_address]] Coordinate<&Type::x> x;
  [[no_unique_address]] Coordinate<&Type::y> y;
  [[no_unique_address]] Coordinate<&Type::z> z;
};
inline constexpr BuiltinVariable<&cuda_on_cpu::Coordinates::thread> threadIdx;
inline constexpr BuiltinVariable<&cuda_on_cpu::Coordinates::block> blockIdx;
inline constexpr BuiltinVariable<&cuda_on_cpu::Coordinates::block_size> blockDim;
inline constexpr BuiltinVariable<&cuda_on_cpu::Coordinates::grid_size> gridDim;

// -- Barriers and warp collectives ---------------------------------------------------------------

#define CUDA_ON_CPU_WHERE cuda_on_cpu::Where where = cuda_on_cpu::Where::current()

inline void __syncthreads(CUDA_ON_CPU_WHERE) {
  cuda_on_cpu::wait_for_block(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_WHERE) {
  cuda_on_cpu::exchange(mask, 0, where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, CUDA_ON_CPU_WHERE) {
  return cuda_on_cpu::shuffle(mask, value, unsigned(source) % 32, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, CUDA_ON_CPU_WHERE) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() ^ unsigned(bits), where);
}
inline unsigned __clusterRelativeBlockRank() {
  return cuda_on_cpu::cluster_rank();
}
inline unsigned __clusterSizeInBlocks() {
  return cuda_on_cpu::cluster_size();
}
inline void __cluster_barrier_arrive() {
  cuda_on_cpu::arrive_at_cluster();
}
inline void __cluster_barrier_wait(CUDA_ON_CPU_WHERE) {
  cuda_on_cpu::wait_for_cluster(where);
}
inline void* __cluster_map_shared_rank(void* shared, unsigned rank) {
  return cuda_on_cpu::map_to_block(shared, rank);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_WHERE) {
  const uint64_t* votes = cuda_on_cpu::exchange(mask, predicate != 0, where);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= unsigned(mask >> lane & votes[lane] & 1) << lane;
  return result;
}

// -- Atomics: blocks run on several OS threads ---------------------------------------------------

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  unsigned long long old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
  return old;
}

inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// -- Bits ----------------------------------------------------------------------------------------

inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline float __uint_as_float(unsigned bits) {
  return cuda_on_cpu::unpack<float>(bits);
}
inline unsigned __float_as_uint(float value) {
  return unsigned(cuda_on_cpu::pack(value));
}
inline double __longlong_as_double(long long bits) {
  return cuda_on_cpu::unpack<double>(uint64_t(bits));
}
inline long long __double_as_longlong(double value) {
  return (long long)(cuda_on_cpu::pack(value));
}
inline double __hiloint2double(int high, int low) {
  return cuda_on_cpu::unpack<double>(uint64_t(uint32_t(high)) << 32 | uint32_t(low));
}
inline int __double2hiint(double value) {
  return int(cuda_on_cpu::pack(value) >> 32);
}
inline int __double2loint(double value) {
  return int(cuda_on_cpu::pack(value));
}

// -- Arithmetic: compiled without contraction, the host rounds each product -----------------------

inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline float __fdividef(float a, float b) {
  return a / b;
}

// -- Runtime -------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidClusterSize = 912,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  return config.numAttrs == 0 ? 1 : config.attrs[0].val.clusterDim.x;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "invalid argument";
  return cuda_on_cpu::last_failure();
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::device().number;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_on_cpu::Device& device = cuda_on_cpu::device();
  *value = attribute == cudaDevAttrMultiProcessorCount ? device.multiprocessors
           : attribute == cudaDevAttrClusterLaunch     ? device.largest_cluster > 0
                                                       : device.shared_bytes;
  return cudaSuccess;
}
// What a kernel may ask for at its launch on the current device; without asking, 48 KB.
inline size_t& shared_bytes_of(const void* kernel) {
  static std::map<std::pair<int, const void*>, size_t> known;
  const int number = cuda_on_cpu::device().number;
  return known.try_emplace({number, kernel}, 48 * 1024).first->second;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                        int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    shared_bytes_of(kernel) = size_t(value);
  }
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                                 size_t) {
  *blocks = 2;
  return cudaSuccess;
}
// As a device does that has the attribute and yet not room for the cluster.
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                  const cudaLaunchConfig_t* config) {
  const bool fits = int(cluster_of(*config)) <= cuda_on_cpu::device().largest_cluster;
  *clusters = fits ? 2 : 0;
  return fits ? cudaSuccess : cudaErrorInvalidClusterSize;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Copies = std::tuple<std::decay_t<Parameters>...>;
  struct Call {
    void (*kernel)(Parameters...);
    Copies arguments;
  } call{kernel, Copies(static_cast<Parameters>(arguments)...)};
  if (config->dynamicSmemBytes > shared_bytes_of(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  const bool done = cuda_on_cpu::run_grid(
      config->gridDim, config->blockDim, cluster_of(*config),
      [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->arguments); },
      &call);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}
