// The checksum of TensorBoard's record files: CRC-32C (Castagnoli, reflected polynomial
// 0x82F63B78), masked as in TensorFlow's record format.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyvizllm::events {

// With the processor's own instruction where it has one (SSE4.2; arm64 compiled for it).
uint32_t crc32c(const char* data, size_t size);

// The same from tables, on any processor.
uint32_t crc32c_portable(const char* data, size_t size);

// A checksum of data that holds checksums is weak: what is stored is rotated and shifted.
constexpr uint32_t masked(uint32_t crc) {
  return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

}  // namespace pyvizllm::events
