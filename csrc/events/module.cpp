// pyvizllm._events: publications to the bytes of TensorBoard's files, without holding the GIL while
// there is work to do. pyvizllm/_events.pyi documents what Python sees.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "bins.h"
#include "events/buckets.h"
#include "events/crc32c.h"
#include "events/summary.h"

namespace py = pybind11;

namespace pyvizllm::events {
namespace {

constexpr py::ssize_t kMoments = 4;

using Strings = std::vector<std::string>;

// A bytes object whose content is still to be written: by us alone, and without the GIL.
py::bytes allocate(size_t size) {
  auto bytes = py::reinterpret_steal<py::bytes>(
      PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(size)));
  if (!bytes) throw py::error_already_set();
  return bytes;
}

py::bytes framed(std::string_view head, std::string_view body) {
  const size_t size = head.size() + body.size();
  py::bytes record = allocate(record_size(size));
  char* data = PyBytes_AS_STRING(record.ptr());
  {
    py::gil_scoped_release release;
    char* event = data + kRecordHead;
    std::memcpy(event, head.data(), head.size());
    std::memcpy(event + head.size(), body.data(), body.size());
    frame(data, size);
  }
  return record;
}

void check_lengths(const char* operation, size_t tags, size_t descriptions) {
  if (descriptions == 0 || descriptions == tags) return;
  throw py::value_error(std::string(operation) + ": expected no description or " +
                        std::to_string(tags) + ", got " + std::to_string(descriptions));
}

// `array` as a contiguous one; ValueError unless it is [rows, columns] of type T already.
template <typename T>
py::array_t<T> matrix(const char* argument, const char* type, const py::array& array,
                      py::ssize_t rows, py::ssize_t columns) {
  const bool fits = array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == columns;
  if (!fits || !py::isinstance<py::array_t<T>>(array)) {
    throw py::value_error(std::string("histogram_records: expected ") + argument + " of shape [" +
                          std::to_string(rows) + ", " + std::to_string(columns) + "] and dtype " +
                          type + ", got shape " + py::str(array.attr("shape")).cast<std::string>() +
                          " and dtype " + py::str(array.dtype()).cast<std::string>());
  }
  return py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(array);
}

// The tags of T tensors on one axis, and what they mean: [T] or none.
struct Axis {
  const Strings& tags;
  const Strings& descriptions;

  void append(std::string& summary, size_t row, const Buckets& buckets) const {
    if (buckets.limits.empty()) return;
    append_histogram(summary, tags[row], buckets,
                     descriptions.empty() ? std::string_view() : descriptions[row]);
  }
};

py::list histogram_records(double wall_time, int64_t step, const Strings& tags,
                           const Strings& log10_tags, const py::array& counts,
                           const py::array& moments, const Strings& descriptions,
                           const Strings& log10_descriptions, size_t limit) {
  if (log10_tags.size() != tags.size()) {
    throw py::value_error("histogram_records: expected " + std::to_string(tags.size()) +
                          " log10_tags, got " + std::to_string(log10_tags.size()));
  }
  const auto rows = static_cast<py::ssize_t>(tags.size());
  const auto bins = matrix<int64_t>("counts", "int64", counts, rows, kBins);
  const auto statistics = matrix<double>("moments", "float64", moments, rows, kMoments);
  check_lengths("histogram_records", tags.size(), descriptions.size());
  check_lengths("histogram_records", tags.size(), log10_descriptions.size());
  const int64_t* bin_row = bins.data();
  const double* moment_row = statistics.data();
  const Axis value{tags, descriptions}, log10{log10_tags, log10_descriptions};

  py::list records;
  std::string summary, head;
  Buckets buckets;
  for (size_t row = 0; row < tags.size();) {
    {
      py::gil_scoped_release release;
      summary.clear();
      for (; row < tags.size() && summary.size() < limit; ++row) {
        const Moments finite =
            finite_moments(bin_row, {moment_row[0], moment_row[1], moment_row[2], moment_row[3]});
        value_buckets(bin_row, finite, buckets);
        value.append(summary, row, buckets);
        log10_buckets(bin_row, finite, buckets);
        log10.append(summary, row, buckets);
        bin_row += kBins;
        moment_row += kMoments;
      }
      head = event_head(wall_time, step, summary.size());
    }
    if (!summary.empty()) records.append(framed(head, summary));
  }
  return records;
}

py::bytes scalar_summary(const Strings& tags, const std::vector<double>& values,
                         const Strings& descriptions) {
  if (values.size() != tags.size()) {
    throw py::value_error("scalar_summary: expected " + std::to_string(tags.size()) +
                          " values, got " + std::to_string(values.size()));
  }
  check_lengths("scalar_summary", tags.size(), descriptions.size());
  std::string summary;
  {
    py::gil_scoped_release release;
    for (size_t i = 0; i < tags.size(); ++i) {
      append_scalar(summary, tags[i], static_cast<float>(values[i]),
                    descriptions.empty() ? "" : descriptions[i]);
    }
  }
  return summary;
}

py::bytes summary_record(double wall_time, int64_t step, std::string_view summary) {
  return framed(event_head(wall_time, step, summary.size()), summary);
}

py::bytes record(std::string_view event) {
  return framed({}, event);
}

uint32_t checksum(std::string_view data, bool portable) {
  return portable ? crc32c_portable(data.data(), data.size()) : crc32c(data.data(), data.size());
}

}  // namespace
}  // namespace pyvizllm::events

PYBIND11_MODULE(_events, module) {
  namespace events = pyvizllm::events;
  module.doc() = "Publications to the bytes of TensorBoard's files.";
  module.def("histogram_records", &events::histogram_records, py::arg("wall_time"), py::arg("step"),
             py::arg("tags"), py::arg("log10_tags"), py::arg("counts"), py::arg("moments"),
             py::arg("descriptions"), py::arg("log10_descriptions"), py::arg("limit"));
  module.def("scalar_summary", &events::scalar_summary, py::arg("tags"), py::arg("values"),
             py::arg("descriptions"));
  module.def("summary_record", &events::summary_record, py::arg("wall_time"), py::arg("step"),
             py::arg("summary"));
  module.def("record", &events::record, py::arg("event"));
  module.def("crc32c", &events::checksum, py::arg("data"), py::arg("portable") = false);
}
