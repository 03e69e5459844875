// float16 as the kernels use it: conversions only.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) {
  return {bits};
}
inline uint16_t __half_as_ushort(__half value) {
  return value.bits;
}
inline float __half2float(__half value) {
  const unsigned sign = unsigned(value.bits & 0x8000) << 16;
  const unsigned magnitude = value.bits & 0x7fff;
  if (magnitude > 0x7c00) return __uint_as_float(sign | 0x7fc00000 | (magnitude & 0x3ff) << 13);
  if (magnitude == 0x7c00) return __uint_as_float(sign | 0x7f800000);
  if (magnitude >= 0x400) return __uint_as_float(sign | ((magnitude << 13) + 0x38000000));
  const float subnormal = float(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}
inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned sign = bits >> 16 & 0x8000;
  unsigned magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above
  if (magnitude < 0x38800000) {
    // Subnormal: the spacing at one half is the least float16, so the addition rounds.
    const float shifted = __uint_as_float(magnitude) + 0.5f;
    return {uint16_t(sign | (__float_as_uint(shifted) - __float_as_uint(0.5f)))};
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return {uint16_t(sign | (magnitude - 0x38000000) >> 13)};
}
