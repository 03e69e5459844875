// The histogram bin of a value, shared by every device so that counts agree bit for bit, but for
// which of the NaN bins a NaN that had to be converted to float32 falls into.
//
// The bin of x is the top 12 bits of its float32 bit pattern: 1 sign, 8 exponent and 3 mantissa
// bits. 4096 bins, eight per octave, over the whole range of floating point; no pass over the data
// is needed to find a range. Positive values take bins 0..2047, negative ones 2048..4095.
//   bin    0 and 2048   +-0 and the subnormals below 2^-129
//   bin 2040 and 4088   +-Inf (and NaNs whose top three mantissa bits are clear)
//   bin 2041..2047 and 4089..4095   NaN, by payload; what counts is their sum
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYVIZLLM_HOST_DEVICE __host__ __device__
#else
#define PYVIZLLM_HOST_DEVICE
#endif

namespace pyvizllm {

constexpr int kBins = 4096;
constexpr int kBinShift = 20;  // float32 bits below the bin

PYVIZLLM_HOST_DEVICE constexpr uint32_t bin_of_bits(uint32_t float32_bits) {
  return float32_bits >> kBinShift;
}

}  // namespace pyvizllm
