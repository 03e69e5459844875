// The counts of the 4096 bit-pattern bins (bins.h) as TensorBoard's buckets: right edges and
// counts.
#pragma once

#include <cstdint>
#include <vector>

namespace pyvizllm::events {

// Of the finite values of one tensor, or of several steps.
struct Moments {
  double min, max;  // NaN where there are none
  double sum, sum_squares;
};

// One histogram as TensorBoard wants it; empty where there is nothing to show.
struct Buckets {
  std::vector<double> limits;  // right edges, rising
  std::vector<double> counts;
  double min, max, num, sum, sum_squares;
};

// `given`, or where one of its numbers is not finite (a NaN or Inf was among the values), what the
// bins say: edges for min and max, the middles of the bins for the sums.
Moments finite_moments(const int64_t* counts, const Moments& given);  // counts: [4096]

// On the value axis: exact edges, only the occupied range, +0 and -0 together. Neighbouring bins
// narrower than 1/1024 of that range are merged (TensorBoard draws 30 bins over it; the log10 axis
// keeps the detail near zero), and a run of empty bins is one empty bucket, so that a histogram has
// a few hundred buckets at most.
void value_buckets(const int64_t* counts, const Moments& moments, Buckets& out);

// On the log10|x| axis, both signs folded, eight buckets an octave. Zeros are left out, and with
// them everything below 2^-129, which shares their bin. The sums come from the middles of the bins.
void log10_buckets(const int64_t* counts, const Moments& moments, Buckets& out);

}  // namespace pyvizllm::events
