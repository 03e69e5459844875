// Sixteen-byte vectors, and the one loop over a row of any length at any address.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace pyvizllm {

template <class T>
using AccumulateType = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ __forceinline__ AccumulateType<T> widen(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    return value;
  }
}

template <class T>
__device__ __forceinline__ T round_to(AccumulateType<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// What one load or store instruction moves: 16 bytes, or 8 where a wider dtype beside it takes 16.
// Lanes are widened on reading and rounded on writing; a lane's number must be a constant once
// loops are unrolled, or the words leave their registers.
template <class T, int kBytes = 16>
struct alignas(kBytes) Vector {
  static_assert(kBytes == 16 || kBytes == 8);
  using A = AccumulateType<T>;
  static constexpr int kLanes = kBytes / sizeof(T);

  uint32_t words[kBytes / 4];

  __device__ __forceinline__ A get(int lane) const {
    // The same as widen(element(lane)), in one instruction.
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const uint32_t word = words[lane / 2];
      return __uint_as_float(lane % 2 ? word & 0xffff0000u : word << 16);
    } else {
      return widen(element(lane));
    }
  }
  __device__ __forceinline__ void set(int lane, A value) { set_element(lane, round_to<T>(value)); }

  // The bits as they are: a NaN keeps its payload.
  __device__ __forceinline__ T element(int lane) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[lane]);
    } else if constexpr (std::is_same_v<T, double>) {
      return __hiloint2double(int(words[2 * lane + 1]), int(words[2 * lane]));
    } else {
      const uint16_t bits = uint16_t(lane % 2 ? words[lane / 2] >> 16 : words[lane / 2]);
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __ushort_as_bfloat16(bits);
      } else {
        return __ushort_as_half(bits);
      }
    }
  }
  __device__ __forceinline__ void set_element(int lane, T value) {
    if constexpr (std::is_same_v<T, float>) {
      words[lane] = __float_as_uint(value);
    } else if constexpr (std::is_same_v<T, double>) {
      words[2 * lane] = uint32_t(__double2loint(value));
      words[2 * lane + 1] = uint32_t(__double2hiint(value));
    } else {
      uint32_t bits;
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        bits = __bfloat16_as_ushort(value);
      } else {
        bits = __half_as_ushort(value);
      }
      uint32_t& word = words[lane / 2];
      word = lane % 2 ? (word & 0xffffu) | bits << 16 : (word & 0xffff0000u) | bits;
    }
  }

  // x must be a multiple of kBytes; for store, in global memory.
  static __device__ __forceinline__ Vector load(const T* x) {
    if constexpr (kBytes == 8) {
      const uint2 raw = *reinterpret_cast<const uint2*>(x);
      return {{raw.x, raw.y}};
    } else {
      const uint4 raw = *reinterpret_cast<const uint4*>(x);
      return {{raw.x, raw.y, raw.z, raw.w}};
    }
  }
  __device__ __forceinline__ void store(T* x) const {
#ifdef __CUDA_ARCH__
    // One instruction: nvcc makes one for each word of an assignment whose words were computed
    // singly.
    const size_t address = __cvta_generic_to_global(x);
    if constexpr (kBytes == 8) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1])
                   : "memory");
    } else {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
#else
    std::memcpy(x, words, kBytes);
#endif
  }
};

// Bit i: whether the vector's lane i, element index + i, lies in a row of `count` elements.
template <class T>
__device__ __forceinline__ uint32_t lanes_within(int64_t index, int64_t count) {
  constexpr int kLanes = Vector<T>::kLanes;
  const int first = index >= 0 ? 0 : (index > -kLanes ? int(-index) : kLanes);
  const int64_t left = count - index;
  const int last = left >= kLanes ? kLanes : (left > 0 ? int(left) : 0);
  return ((1u << last) - 1) & ~((1u << first) - 1);
}

template <class T>
constexpr uint32_t kAllLanes = (1u << Vector<T>::kLanes) - 1;

// A vector of which only the lanes in `valid` may be read; the others are `fill`.
template <class T>
__device__ __forceinline__ Vector<T> load_lanes(const T* x, uint32_t valid,
                                                AccumulateType<T> fill) {
  if (valid == kAllLanes<T>) return Vector<T>::load(x);
  Vector<T> vector = {};
#pragma unroll
  for (int lane = 0; lane < Vector<T>::kLanes; ++lane) {
    vector.set_element(lane, valid >> lane & 1 ? x[lane] : round_to<T>(fill));
  }
  return vector;
}

// Writes the lanes in `valid`, also where x is no multiple of 16 bytes: then one by one.
template <class T>
__device__ __forceinline__ void store_lanes(T* x, uint32_t valid, const Vector<T>& vector) {
  if (valid == kAllLanes<T> && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    vector.store(x);
    return;
  }
#pragma unroll
  for (int lane = 0; lane < Vector<T>::kLanes; ++lane) {
    if (valid >> lane & 1) x[lane] = vector.element(lane);
  }
}

// The elements that one thread holds of a row: kVectors vectors, kThreads vectors apart, so that a
// warp's loads are contiguous and each thread has kVectors of them in flight.
template <class T, int kVectors>
struct Tile {
  static constexpr int kLanes = Vector<T>::kLanes;
  static constexpr int kSize = kVectors * kLanes;
  static_assert(kSize <= 32, "valid has a bit for each element");

  Vector<T> vectors[kVectors];
  int64_t begin;   // index in the row of the first lane; negative in a row's first, partial vector
  uint32_t valid;  // bit i: whether element i lies in the row

  __device__ __forceinline__ int64_t index(int i) const {
    return begin + i / kLanes * (kThreads * kLanes) + i % kLanes;
  }
  __device__ __forceinline__ bool holds(int i) const { return valid >> i & 1; }
  __device__ __forceinline__ AccumulateType<T> get(int i) const {
    return vectors[i / kLanes].get(i % kLanes);
  }
  __device__ __forceinline__ uint32_t lanes(int vector) const {
    return valid >> vector * kLanes & kAllLanes<T>;
  }
};

// Calls body(tile) with this thread's part of a row, in ascending order. Vectors lie on 16-byte
// addresses whatever the row's own alignment, so that only its first and last are partial; lanes
// outside the row hold `fill` and are not valid. Every thread of the block calls body equally
// often, if need be with nothing valid, so body may use warp collectives.
template <int kVectors, class T, class Body>
__device__ __forceinline__ void for_each_tile(const T* row, int64_t count, AccumulateType<T> fill,
                                              const Body& body) {
  using RowTile = Tile<T, kVectors>;
  constexpr int kLanes = RowTile::kLanes;
  constexpr int64_t kStep = int64_t(kThreads) * RowTile::kSize;
  const int head = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  for (int64_t first = -head; first < count; first += kStep) {
    RowTile tile;
    tile.begin = first + int64_t(threadIdx.x) * kLanes;
    tile.valid = 0;
    if (first >= 0 && first + kStep <= count) {
      tile.valid = 0xffffffffu;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        tile.vectors[v] = Vector<T>::load(row + tile.index(v * kLanes));
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t index = tile.index(v * kLanes);
        const uint32_t valid = lanes_within<T>(index, count);
        tile.vectors[v] = load_lanes(row + index, valid, fill);
        tile.valid |= valid << v * kLanes;
      }
    }
    body(tile);
  }
}

}  // namespace pyvizllm
