#include "events/summary.h"

#include <bit>
#include <cstring>
#include <vector>

#include "events/crc32c.h"

namespace pyvizllm::events {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are written as they lie");

// A field's number and wire type, as the byte in front of its value.
constexpr char varint_field(int number) {
  return static_cast<char>(number << 3);
}
constexpr char double_field(int number) {
  return static_cast<char>(number << 3 | 1);
}
constexpr char bytes_field(int number) {
  return static_cast<char>(number << 3 | 2);
}
constexpr char float_field(int number) {
  return static_cast<char>(number << 3 | 5);
}

constexpr size_t varint_size(uint64_t number) {
  size_t size = 1;
  for (; number > 127; number >>= 7) ++size;
  return size;
}

// Of a field of `size` bytes with what stands before it.
constexpr size_t field_size(size_t size) {
  return 1 + varint_size(size) + size;
}

template <typename T>
void append_raw(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void append_varint(std::string& out, uint64_t number) {
  for (; number > 127; number >>= 7) out.push_back(static_cast<char>((number & 127) | 128));
  out.push_back(static_cast<char>(number));
}

void append_head(std::string& out, int field, size_t size) {
  out.push_back(bytes_field(field));
  append_varint(out, size);
}

void append_bytes(std::string& out, int field, std::string_view bytes) {
  append_head(out, field, bytes.size());
  out.append(bytes);
}

void append_double(std::string& out, int field, double value) {
  out.push_back(double_field(field));
  append_raw(out, value);
}

void append_packed(std::string& out, int field, const std::vector<double>& values) {
  append_head(out, field, values.size() * sizeof(double));
  out.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(double));
}

// Summary.Value's tag = 1, simple_value = 2, histo = 5, metadata = 9.
// SummaryMetadata's plugin_data = 1 (whose plugin_name = 1), summary_description = 3.
std::string metadata(std::string_view plugin, std::string_view description) {
  if (description.empty()) return {};
  std::string inner;
  append_head(inner, 1, field_size(plugin.size()));
  append_bytes(inner, 1, plugin);
  append_bytes(inner, 3, description);
  std::string field;
  append_bytes(field, 9, inner);
  return field;
}

}  // namespace

void append_scalar(std::string& summary, std::string_view tag, float value,
                   std::string_view description) {
  const std::string meta = metadata("scalars", description);
  append_head(summary, 1, field_size(tag.size()) + 1 + sizeof(float) + meta.size());
  append_bytes(summary, 1, tag);
  summary.push_back(float_field(2));
  append_raw(summary, value);
  summary.append(meta);
}

void append_histogram(std::string& summary, std::string_view tag, const Buckets& buckets,
                      std::string_view description) {
  const std::string meta = metadata("histograms", description);
  const size_t packed = field_size(buckets.limits.size() * sizeof(double));
  const size_t histo = 5 * (1 + sizeof(double)) + 2 * packed;
  append_head(summary, 1, field_size(tag.size()) + field_size(histo) + meta.size());
  append_bytes(summary, 1, tag);
  append_head(summary, 5, histo);
  append_double(summary, 1, buckets.min);
  append_double(summary, 2, buckets.max);
  append_double(summary, 3, buckets.num);
  append_double(summary, 4, buckets.sum);
  append_double(summary, 5, buckets.sum_squares);
  append_packed(summary, 6, buckets.limits);
  append_packed(summary, 7, buckets.counts);
  summary.append(meta);
}

void frame(char* record, size_t event_size) {
  const uint64_t length = event_size;
  std::memcpy(record, &length, sizeof length);
  const uint32_t of_length = masked(crc32c(record, sizeof length));
  std::memcpy(record + sizeof length, &of_length, sizeof of_length);
  const uint32_t of_event = masked(crc32c(record + kRecordHead, event_size));
  std::memcpy(record + kRecordHead + event_size, &of_event, sizeof of_event);
}

// Event's wall_time = 1, step = 2, summary = 5.
std::string event_head(double wall_time, int64_t step, size_t summary_size) {
  std::string head;
  append_double(head, 1, wall_time);
  head.push_back(varint_field(2));
  append_varint(head, static_cast<uint64_t>(step));
  append_head(head, 5, summary_size);
  return head;
}

}  // namespace pyvizllm::events
