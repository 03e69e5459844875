// The gradient of a row's logits, from their sums.
#pragma once

#include "row_sums.cuh"

namespace pyvizllm {

// d(loss)/d(logit) = e^(logit - max) * scale - offset, but for the target's. For 16-bit input the
// exponential is that of 2^shift, so that it is no subnormal number, which would be rounded to
// zero.
template <class T>
struct RowGradient {
  using A = AccumulateType<T>;
  static constexpr float kShift = 24;

  A max;
  A scale;
  A offset;
  A shift;

  // scale: d(loss)/d(log p), finite, NaN or Inf; offset: what label smoothing subtracts.
  __device__ __forceinline__ RowGradient(A max, double scale, double offset)
      : max(max), scale(A(scale)), offset(A(offset)), shift(0) {
    if constexpr (kIs16Bit<T>) {
      if (!(fabs(scale) > 0x1p-100)) return;  // the scale itself would be subnormal
      shift = kShift;
      this->scale = A(scale * 0x1p-24);
    }
  }

  __device__ __forceinline__ A at(A logit) const { return at_distance(logit - max); }
  __device__ __forceinline__ A at_distance(A d) const {
    if constexpr (kIs16Bit<T>) {
      return exp2_approximate(fmaf(d, kLog2E, shift)) * scale - offset;
    } else {
      return exponential<T>(d) * scale - offset;
    }
  }

  __device__ __forceinline__ Vector<T> of(const Vector<T>& logits) const {
    A gradient[Vector<T>::kLanes];
#pragma unroll
    for (int lane = 0; lane < Vector<T>::kLanes; ++lane) gradient[lane] = at(logits.get(lane));
    return rounded(gradient);
  }

  static __device__ __forceinline__ Vector<T> rounded(const A (&gradient)[Vector<T>::kLanes]) {
    Vector<T> result = {};
    if constexpr (kIs16Bit<T>) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        result.words[w] = round_pair(gradient[2 * w], gradient[2 * w + 1]);
      }
    } else {
#pragma unroll
      for (int lane = 0; lane < Vector<T>::kLanes; ++lane) result.set(lane, gradient[lane]);
    }
    return result;
  }

 private:
  // Both in one instruction.
  static __device__ __forceinline__ uint32_t round_pair(A low, A high) {
#ifdef __CUDA_ARCH__
    uint32_t result;
    if constexpr (std::is_same_v<T, __half>) {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    }
    return result;
#else
    Vector<T> pair = {};
    pair.set(0, low);
    pair.set(1, high);
    return pair.words[0];
#endif
  }
};

}  // namespace pyvizllm
