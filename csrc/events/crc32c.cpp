#include "events/crc32c.h"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace pyvizllm::events {
namespace {

static_assert(std::endian::native == std::endian::little, "words are read as they lie in memory");

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: the checksum of byte b followed by k zero bytes, so that eight bytes take eight
// look-ups that do not wait for each other.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0u);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < tables.size(); ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t shorter = tables[k - 1][byte];
      tables[k][byte] = (shorter >> 8) ^ tables[0][shorter & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint64_t load(const char* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

#if defined(__x86_64__)

// The attribute, and not a flag for the file, lets one object run on every x86-64.
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const char* data, size_t size) {
  uint64_t crc = 0xffffffffu;
  for (; size >= 8; size -= 8, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, sizeof word);
    crc = _mm_crc32_u64(crc, word);
  }
  auto rest = static_cast<uint32_t>(crc);
  for (; size > 0; --size, ++data) rest = _mm_crc32_u8(rest, static_cast<unsigned char>(*data));
  return ~rest;
}

#elif defined(__ARM_FEATURE_CRC32)

uint32_t crc32c_arm(const char* data, size_t size) {
  uint32_t crc = 0xffffffffu;
  for (; size >= 8; size -= 8, data += 8) crc = __crc32cd(crc, load(data));
  for (; size > 0; --size, ++data) crc = __crc32cb(crc, static_cast<unsigned char>(*data));
  return ~crc;
}

#endif

}  // namespace

uint32_t crc32c_portable(const char* data, size_t size) {
  uint32_t crc = 0xffffffffu;
  for (; size >= 8; size -= 8, data += 8) {
    const uint64_t word = load(data) ^ crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; size > 0; --size, ++data) {
    crc = (crc >> 8) ^ kTables[0][(crc ^ static_cast<unsigned char>(*data)) & 0xff];
  }
  return ~crc;
}

uint32_t crc32c(const char* data, size_t size) {
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2");
  return has_instruction ? crc32c_sse42(data, size) : crc32c_portable(data, size);
#elif defined(__ARM_FEATURE_CRC32)
  return crc32c_arm(data, size);
#else
  return crc32c_portable(data, size);
#endif
}

}  // namespace pyvizllm::events
