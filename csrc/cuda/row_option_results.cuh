// Rows with options (row_options.cuh): their gradient, and what is computed of a whole row.
#pragma once

#include "row_options.cuh"

namespace pyvizllm {

// d(loss)/d(logit) of a row's vectors, but for the target's.
template <class T>
struct OptionGradient {
  using A = AccumulateType<T>;
  static constexpr int kLanes = Vector<T>::kLanes;

  const Transform<A>& transform;
  ClassFactors<T> factors;  // q' times the upstream gradient
  Maximum<A> maximum;
  RowGradient<T> of_z;

  __device__ __forceinline__ Vector<T> of(const Vector<T>& logits, uint32_t valid,
                                          int vector) const {
    A factor[kLanes], q[kLanes], gradient[kLanes];
    factors.load(vector, valid, factor, q);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const A raw = transform.raw(logits.get(lane));
      const A d = transform.factor * (transform.key(raw) - maximum.key) + maximum.correction;
      gradient[lane] = (of_z.at_distance(d) - factor[lane]) * transform.slope(raw);
    }
    return RowGradient<T>::rounded(gradient);
  }
};

// Of the target's logit: p sum q' - q', or sum q' (p - 1) + (sum q' - q').
template <class T>
__device__ __forceinline__ double target_gradient(const CrossEntropyArguments&,
                                                  const Options<T>& options, int64_t row,
                                                  int64_t index, AccumulateType<T> logit,
                                                  double upstream,
                                                  const Maximum<AccumulateType<T>>& maximum,
                                                  double sum_exp) {
  const auto target = options.target(row, index);
  const auto raw = options.transform.raw(logit);
  const double log_p = options.distance(options.transform.key(raw), maximum) - log(sum_exp);
  const double of_z_loss = options.z_factor(target, maximum.z, sum_exp) * exp(log_p);
  // Near p = 1 the first difference cancels, near p = 0 the sum of the other two.
  const double of_loss = log_p < -0.7
                             ? target.total * exp(log_p) - target.at_target
                             : target.total * expm1(log_p) + (target.total - target.at_target);
  return upstream * (of_loss + of_z_loss) * double(options.transform.slope(raw));
}

template <Variant kVariant, class T>
__device__ __forceinline__ RowResults results_of(const CrossEntropyArguments& a,
                                                 const Options<T>& options,
                                                 const RecordPlace& place,
                                                 const ReducedRow<T>& row) {
  using A = AccumulateType<T>;
  const RowSums<T>& sums = row.sums;
  const auto target = options.target(row.row, row.target);
  const Transform<A>& transform = options.transform;
  const Maximum<A> maximum = options.of_sums(sums.max);
  const double log_sum = log(sums.exp);
  const A raw = transform.raw(row.logit_of_target);
  const double z = target.here ? transform.z(raw) : double(kMinusInfinity<A>);
  // From distances to the reference to those to the maximum.
  const double factor = double(transform.factor);
  const double offset = double(options.reference(raw)) - double(reference_of(sums.max));
  double shifted = factor * (sums.shifted + target.mass * offset);
  RowResults results = {};
  results.counts = true;
  results.weight = target.weight;
  results.log_sum_exp = maximum.z + log_sum;
  if (options.has_probabilities()) {
    results.loss = target.total * log_sum - shifted;
    shifted = factor * (sums.expected + options.mass(row.row) * offset);
    results.negative_log_likelihood = options.mass(row.row) * log_sum - shifted;
  } else {
    if (target.here) {
      results.negative_log_likelihood = log_sum - options.distance(transform.key(raw), maximum);
    }
    results.loss = term(options.kept() * target.weight, results.negative_log_likelihood);
    if (options.uniform() != 0) {
      results.loss += options.uniform() * (target.mass * log_sum - shifted);
    }
  }
  if (a.z_loss != 0) {
    results.loss += term(a.z_loss * target.weight, results.log_sum_exp * results.log_sum_exp);
  }
  // Below a cap, too, -Inf where there is no other.
  const double other = a.classes == 1 ? double(kMinusInfinity<A>) : transform.z(sums.other_max);
  const double rank = target.here ? rank_of(sums) : nan("");
  set_metrics(a, results, sums, log_sum, z, other, rank);
  place.write(sums, maximum.z, shifted, z, rank, other);
  return results;
}

}  // namespace pyvizllm
