#include "events/buckets.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "bins.h"

namespace pyvizllm::events {
namespace {

constexpr int kHalf = kBins / 2;
constexpr int kFinite = 2040;  // bins of each sign that hold finite values
constexpr int kValueBins = 2 * kFinite - 1;
constexpr int kLog10Bins = kFinite - 1;
constexpr double kValueResolution = 1024;

struct Edges {
  std::array<double, kFinite + 1> magnitude;  // of bins 0..2039; float32 ends at the last, 2^128
  std::array<double, kValueBins + 1> value;   // bins 2048 and 0 are one bucket around zero
  std::array<double, kLog10Bins + 1> log10;   // starts above the bins that hold zero
};

Edges make_edges() {
  Edges edges;
  for (int bin = 0; bin < kFinite; ++bin) {
    edges.magnitude[bin] = std::bit_cast<float>(static_cast<uint32_t>(bin) << kBinShift);
  }
  edges.magnitude[kFinite] = std::ldexp(1.0, 128);
  for (int bin = 1; bin <= kFinite; ++bin) {
    edges.value[kFinite - bin] = -edges.magnitude[bin];
    edges.value[kFinite - 1 + bin] = edges.magnitude[bin];
    edges.log10[bin - 1] = std::log10(edges.magnitude[bin]);
  }
  return edges;
}

const Edges& edges() {
  static const Edges instance = make_edges();
  return instance;
}

// The occupied ones of `bins` bins as buckets. merged: bins whose left edges lie in the same one of
// this many parts of the occupied range share a bucket; 0 for none.
void fill(const int64_t* dense, const double* edge, int bins, double merged, Buckets& out) {
  out.limits.clear();
  out.counts.clear();
  out.num = out.sum = out.sum_squares = 0;
  int first = 0, end = bins;
  while (first < bins && dense[first] == 0) ++first;
  if (first == bins) return;
  while (dense[end - 1] == 0) --end;

  const double low = edge[first], high = edge[end];
  const double width = merged > 0 ? (high - low) / merged : 0;
  double part = 0, right = low;  // of the bucket that is being filled
  int64_t count = 0;
  const auto close_bucket = [&] {
    out.limits.push_back(right);
    out.counts.push_back(static_cast<double>(count));
  };
  for (int bin = first; bin < end; ++bin) {
    if (dense[bin] == 0) continue;
    const double left = edge[bin];
    const double here = merged > 0 ? std::floor(left / width) : bin;
    if (bin != first && here != part) {
      close_bucket();
      count = 0;
      if (right != left) {  // empty bins in between
        out.limits.push_back(left);
        out.counts.push_back(0);
      }
    }
    part = here;
    right = edge[bin + 1];
    count += dense[bin];
    const double weight = static_cast<double>(dense[bin]), middle = (left + right) / 2;
    out.num += weight;
    out.sum += weight * middle;
    out.sum_squares += weight * (middle * middle);
  }
  close_bucket();
  out.min = std::clamp(out.min, low, high);
  out.max = std::clamp(out.max, low, high);
}

}  // namespace

Moments finite_moments(const int64_t* counts, const Moments& given) {
  if (std::isfinite(given.min) && std::isfinite(given.max) && std::isfinite(given.sum) &&
      std::isfinite(given.sum_squares)) {
    return given;
  }
  const auto& magnitude = edges().magnitude;
  constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();
  Moments moments{kNothing, kNothing, 0, 0};
  for (int bin = 0; bin < kBins; ++bin) {
    const int of_sign = bin % kHalf;
    if (of_sign >= kFinite || counts[bin] == 0) continue;
    const double near = magnitude[of_sign], far = magnitude[of_sign + 1];
    const double low = bin < kHalf ? near : -far, high = bin < kHalf ? far : -near;
    const double weight = static_cast<double>(counts[bin]), middle = (low + high) / 2;
    moments.min = std::fmin(moments.min, low);  // fmin and fmax pass over NaN
    moments.max = std::fmax(moments.max, high);
    moments.sum += weight * middle;
    moments.sum_squares += weight * (middle * middle);
  }
  return moments;
}

void value_buckets(const int64_t* counts, const Moments& moments, Buckets& out) {
  std::array<int64_t, kValueBins> dense;
  constexpr int kZero = kFinite - 1;
  dense[kZero] = counts[0] + counts[kHalf];
  for (int bin = 1; bin < kFinite; ++bin) {
    dense[kZero - bin] = counts[kHalf + bin];
    dense[kZero + bin] = counts[bin];
  }
  out.min = moments.min;
  out.max = moments.max;
  fill(dense.data(), edges().value.data(), kValueBins, kValueResolution, out);
  out.sum = moments.sum;
  out.sum_squares = moments.sum_squares;
}

void log10_buckets(const int64_t* counts, const Moments& moments, Buckets& out) {
  std::array<int64_t, kLog10Bins> dense;
  for (int bin = 1; bin < kFinite; ++bin) dense[bin - 1] = counts[bin] + counts[kHalf + bin];
  // The smallest |x| is unknown: it is shown as the edge of its bin.
  out.min = -std::numeric_limits<double>::infinity();
  out.max = std::log10(std::max(std::fabs(moments.min), std::fabs(moments.max)));
  fill(dense.data(), edges().log10.data(), kLog10Bins, 0, out);
}

}  // namespace pyvizllm::events
