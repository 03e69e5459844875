// Sixteen-byte vectors, and the one loop over a row of any length at any address.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "launch.cuh"

namespace pyvizllm {

template <class T>
using AccumulateType = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ __forceinline__ AccumulateType<T> load_one(const T* x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(*x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(*x);
  } else {
    return *x;
  }
}

template <class T>
__device__ __forceinline__ void store_one(T* x, AccumulateType<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    *x = __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    *x = __float2bfloat16_rn(value);
  } else {
    *x = value;
  }
}

// What one load or store instruction moves. Lanes are widened on reading and rounded on writing;
// a lane's number must be a constant once loops are unrolled, or the words leave their registers.
template <class T>
struct alignas(16) Vector {
  using A = AccumulateType<T>;
  static constexpr int kLanes = 16 / sizeof(T);

  uint32_t words[4];

  __device__ __forceinline__ A get(int lane) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[lane]);
    } else if constexpr (std::is_same_v<T, double>) {
      return __hiloint2double(int(words[2 * lane + 1]), int(words[2 * lane]));
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const uint32_t word = words[lane / 2];
      return __uint_as_float(lane % 2 ? word & 0xffff0000u : word << 16);
    } else {
      const uint32_t word = words[lane / 2];
      return __half2float(__ushort_as_half(uint16_t(lane % 2 ? word >> 16 : word)));
    }
  }

  __device__ __forceinline__ void set(int lane, A value) {
    if constexpr (std::is_same_v<T, float>) {
      words[lane] = __float_as_uint(value);
    } else if constexpr (std::is_same_v<T, double>) {
      words[2 * lane] = uint32_t(__double2loint(value));
      words[2 * lane + 1] = uint32_t(__double2hiint(value));
    } else {
      uint32_t bits;
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
      } else {
        bits = __half_as_ushort(__float2half_rn(value));
      }
      uint32_t& word = words[lane / 2];
      word = lane % 2 ? (word & 0xffffu) | bits << 16 : (word & 0xffff0000u) | bits;
    }
  }

  // x must be a multiple of 16 bytes.
  static __device__ __forceinline__ Vector load(const T* x) {
    const uint4 raw = *reinterpret_cast<const uint4*>(x);
    return {{raw.x, raw.y, raw.z, raw.w}};
  }
  __device__ __forceinline__ void store(T* x) const {
    *reinterpret_cast<uint4*>(x) = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// The elements that one thread holds of a row of `count`: kVectors vectors, kThreads vectors apart,
// so that a warp's loads are contiguous and each thread has kVectors of them in flight.
template <class T, int kVectors>
struct Tile {
  static constexpr int kLanes = Vector<T>::kLanes;

  Vector<T> vectors[kVectors];
  int64_t begin;  // index in the row of the first lane; negative in a row's first, partial vector
  int64_t count;

  __device__ __forceinline__ int64_t index(int vector, int lane) const {
    return begin + vector * (kThreads * kLanes) + lane;
  }
  __device__ __forceinline__ bool holds(int vector, int lane) const {
    return uint64_t(index(vector, lane)) < uint64_t(count);
  }
  __device__ __forceinline__ AccumulateType<T> get(int vector, int lane) const {
    return vectors[vector].get(lane);
  }
};

// A vector of which some lanes may lie outside row[0, count): those are neither read nor written.
template <class T>
__device__ __forceinline__ Vector<T> load_within(const T* row, int64_t count, int64_t index,
                                                 AccumulateType<T> fill) {
  if (index >= 0 && index + Vector<T>::kLanes <= count) return Vector<T>::load(row + index);
  Vector<T> vector = {};
#pragma unroll
  for (int lane = 0; lane < Vector<T>::kLanes; ++lane) {
    const bool inside = uint64_t(index + lane) < uint64_t(count);
    vector.set(lane, inside ? load_one(row + index + lane) : fill);
  }
  return vector;
}

// Stores also where row + index is no multiple of 16 bytes: lane by lane.
template <class T>
__device__ __forceinline__ void store_within(T* row, int64_t count, int64_t index,
                                             const Vector<T>& vector) {
  const bool aligned = reinterpret_cast<uintptr_t>(row + index) % 16 == 0;
  if (aligned && index >= 0 && index + Vector<T>::kLanes <= count) {
    vector.store(row + index);
    return;
  }
#pragma unroll
  for (int lane = 0; lane < Vector<T>::kLanes; ++lane) {
    if (uint64_t(index + lane) < uint64_t(count)) store_one(row + index + lane, vector.get(lane));
  }
}

// Calls body(tile, whole) with this thread's part of a row, in ascending order. Vectors lie on
// 16-byte addresses whatever the row's own alignment, so that only its first and last are partial.
// Lanes outside the row hold `fill`; where `whole` is std::true_type there are none. Every thread
// of the block calls body equally often, with the same `whole`: body may use warp collectives.
template <int kVectors, class T, class Body>
__device__ __forceinline__ void for_each_tile(const T* row, int64_t count, AccumulateType<T> fill,
                                              const Body& body) {
  constexpr int kLanes = Vector<T>::kLanes;
  constexpr int64_t kStep = int64_t(kVectors) * kThreads * kLanes;
  const int head = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  for (int64_t first = -head; first < count; first += kStep) {
    Tile<T, kVectors> tile;
    tile.begin = first + int64_t(threadIdx.x) * kLanes;
    tile.count = count;
    if (first >= 0 && first + kStep <= count) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        tile.vectors[v] = Vector<T>::load(row + tile.index(v, 0));
      }
      body(tile, std::true_type());
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        tile.vectors[v] = load_within(row, count, tile.index(v, 0), fill);
      }
      body(tile, std::false_type());
    }
  }
}

}  // namespace pyvizllm
