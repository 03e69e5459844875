// The +-1 hash sketch of a tensor: 64 numbers in which distances and angles survive (the count
// sketch of Charikar, Chen and Farach-Colton 2002, and the tug-of-war sketch of Alon, Matias and
// Szegedy 1996 in each of its buckets).
//
// The elements are read as rows of 64. Element j of row r is added to number j ^ exchange(r) of the
// sketch, with the sign that bit j of signs(r) says. The sign bits of a good hash are as good as
// independent, so that in the product of two sketches every mixed term vanishes in expectation:
// <S(x), S(y)> is an unbiased estimate of <x, y>, whatever the exchanges. They spread what is in
// one column of a matrix over all numbers, which keeps the variance near 2 |x|^4 / 64.
#pragma once

#include "bins.h"

namespace pyvizllm {

constexpr int kSketchSize = 64;

// Of a tensor, from its seed: Steele, Lea and Flood's SplitMix64 (2014) finishes both.
PYVIZLLM_HOST_DEVICE constexpr uint64_t mix_bits(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

struct SketchHash {
  uint64_t state;

  explicit PYVIZLLM_HOST_DEVICE constexpr SketchHash(int64_t seed)
      : state(mix_bits(uint64_t(seed) + 0x9e3779b97f4a7c15u)) {}

  // Bit j: whether element j of the row is subtracted.
  PYVIZLLM_HOST_DEVICE constexpr uint64_t signs(int64_t row) const {
    return mix_bits(state + uint64_t(row) * 0x9e3779b97f4a7c15u);
  }
  // 0 to 63.
  PYVIZLLM_HOST_DEVICE constexpr int exchange(int64_t row) const {
    return int((state ^ uint64_t(row) * 0xd1342543de82ef95u) * 0x9e3779b97f4a7c15u >> 58);
  }
};

}  // namespace pyvizllm
