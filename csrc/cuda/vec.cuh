// Sixteen-byte vectors, and the loop over data of any length at any address.
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

  __device__ __forceinline__ uint4 raw() const {
    static_assert(kBytes == 16);
    return {words[0], words[1], words[2], words[3]};
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

// Calls body(vectors, index, valid) with the parts of `data` that are this thread's, in ascending
// order: kVectors vectors at once where the whole block has them, else one. Vectors lie on 16-byte
// addresses whatever the data's own alignment, so that only the first and the last are partial;
// they are kThreads vectors apart, so that a warp's loads are contiguous. `index` is that of the
// first lane, negative in a partial first vector. Bit i of `valid`: whether the i-th lane of all
// vectors lies in the data; the others hold 0.
template <int kVectors, class T, class Body>
__device__ __forceinline__ void for_each_vectors(const T* data, int count, const Body& body) {
  constexpr int kLanes = Vector<T>::kLanes;
  constexpr int kBlockVector = kThreads * kLanes;
  static_assert(kVectors * kLanes <= 32, "valid has a bit for each element");
  const int head = int(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
  int index = int(threadIdx.x) * kLanes - head;
  for (int begin = -head; begin < count; begin += kVectors * kBlockVector) {
    if (begin >= 0 && begin + kVectors * kBlockVector <= count) {
      Vector<T> vectors[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        vectors[v] = Vector<T>::load(data + index + v * kBlockVector);
      }
      body(vectors, index, 0xffffffffu);
      index += kVectors * kBlockVector;
    } else {
#pragma unroll 1
      for (int v = 0; v < kVectors; ++v, index += kBlockVector) {
        const uint32_t valid = lanes_within<T>(index, count);
        Vector<T> vectors[1] = {load_lanes(data + index, valid, AccumulateType<T>(0))};
        body(vectors, index, valid);
      }
    }
  }
}

}  // namespace pyvizllm
