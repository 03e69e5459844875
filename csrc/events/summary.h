// What TensorBoard reads, in protocol buffers' wire format (tensorboardX's summary.proto,
// event.proto) and in its record files. Nothing here knows Python, so that all of it runs without
// the GIL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "events/buckets.h"

namespace pyvizllm::events {

// Appends one `Summary.value`. A description makes TensorBoard show it beside the chart.
void append_scalar(std::string& summary, std::string_view tag, float value,
                   std::string_view description);
void append_histogram(std::string& summary, std::string_view tag, const Buckets& buckets,
                      std::string_view description);

// A record is: length, its checksum, the event, its checksum.
constexpr size_t kRecordHead = 12, kRecordFoot = 4;
constexpr size_t record_size(size_t event_size) {
  return kRecordHead + event_size + kRecordFoot;
}

// Writes head and foot around the event that stands at record + kRecordHead.
void frame(char* record, size_t event_size);

// What stands before a serialised Summary of `summary_size` bytes to make an Event of it.
std::string event_head(double wall_time, int64_t step, size_t summary_size);

}  // namespace pyvizllm::events
