// From the sums over a row to its loss, metrics and record, and to what its gradient is made of.
// The formulas are for one row and for rows side by side: where they are templates, D is double or
// a vector of them.
//
// With L = log(sum of e^d) and d the distance from the maximum, the negative log-likelihood of
// class c is L - d_c: log-sum-exp minus logit would cancel where logits are large.
#pragma once

#include "../kernels.h"
#include "cross_entropy_gradient.h"
#include "cross_entropy_row_sums.h"

namespace pyvizllm::CPU_CAPABILITY {

inline int64_t target_at(const CrossEntropyArguments& a, int64_t row) {
  return a.target_is_int64 ? static_cast<const int64_t*>(a.target)[row]
                           : static_cast<const int32_t*>(a.target)[row];
}

inline bool is_elsewhere(const CrossEntropyArguments& a, int64_t target) {
  return target < 0 || target >= a.classes;
}

// Of one class; 1 where there are no class weights.
inline double class_weight(const CrossEntropyArguments& a, int64_t index) {
  if (a.weight == nullptr) return 1;
  return a.dtype == DType::kFloat64 ? static_cast<const double*>(a.weight)[index]
                                    : double(static_cast<const float*>(a.weight)[index]);
}

template <class A>
struct RowTarget {
  bool counts;    // false: ignored
  int64_t index;  // -1: none, or another rank's
  double weight;  // of the class; 1 with probabilities
  A key;          // of the target's logit, where there is one
};

// Sums over a group of rows.
struct GroupSums {
  double loss = 0;
  double metrics[metric::kSize] = {};
};

// What a row's metrics and record are made of.
struct RowFacts {
  double max;
  double log_sum;
  double negative_log_likelihood;
  double target_logit;
  double rank;
  double other_max;
};

// 0 where the factor is, also times Inf: 0 log 0 is 0. A NaN stays.
template <class D>
inline D weighted(D factor, D term) {
  return (factor == 0) & (term == term) ? D{} : factor * term;
}

template <class A>
void add_metrics(const RowSums<A>& row, const RowFacts& facts, int64_t classes, double* m) {
  // A sum that the rounding of a cap left below 1 is of one sure class, and in the last bin.
  const bool sure = row.sum_exp > 0 && row.sum_exp < 1;
  const bool empty = row.sum_exp == 0;  // all of the row is -Inf
  const double top_probability = empty  ? std::numeric_limits<double>::quiet_NaN()
                                 : sure ? 1
                                        : 1 / row.sum_exp;
  const bool correct = facts.rank == 0;
  m[metric::kTokens] += 1;
  m[metric::kCorrect] += correct;
  m[metric::kNegativeLogLikelihood] += facts.negative_log_likelihood;
  m[metric::kEntropy] += facts.log_sum - row.sum_exp_shifted / row.sum_exp;
  m[metric::kLogSumExp] += facts.max + facts.log_sum;
  m[metric::kTopProbability] += top_probability;
  m[metric::kTop5Correct] += facts.rank < 5;
  m[metric::kMargin] += classes == 1 ? 0 : facts.target_logit - facts.other_max;
  if (!(top_probability > 0 && top_probability <= 1)) return;  // NaN has no calibration bin
  const int bin = int(std::ceil(top_probability * metric::kCalibrationBins)) - 1;
  m[metric::kCalibrationCount + bin] += 1;
  m[metric::kCalibrationCorrect + bin] += correct;
  m[metric::kCalibrationConfidence + bin] += top_probability;
}

// The first of the largest.
template <class T>
int64_t argmax(const T* x, int64_t count) {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  V max = V{} - std::numeric_limits<A>::infinity();
  for_each_vector(x, count, [&](V v, int64_t, int) { max = maximum(v, max); });
  const A largest = max_lanes<A>(max);
  for (int64_t i = 0; i < count; ++i) {
    if (load_one(x + i) == largest) return i;
  }
  return 0;  // all are NaN
}

// A call's options, and what of a row follows from them.
template <class T, class Logits>
struct Problem {
  using A = AccumulateType<T>;

  const CrossEntropyArguments& a;
  RowReader<T, Logits> reader;
  double uniform;       // what label smoothing puts on each class
  double total_weight;  // of the classes, where `uniform` is not 0
  bool metrics;
  double* records;

  Problem(const CrossEntropyArguments& a, bool metrics, double* records)
      : a(a),
        reader{Logits(a), a.classes, sums_of(a, metrics, records != nullptr),
               metrics || records != nullptr, a.probabilities == nullptr},
        uniform(a.label_smoothing / double(a.total_classes != 0 ? a.total_classes : a.classes)),
        total_weight(0),
        metrics(metrics),
        records(records) {
    if (uniform == 0) return;  // a class that is never met may have an infinite weight
    if (a.weight == nullptr) total_weight = double(a.classes);
    for (int64_t c = 0; a.weight != nullptr && c < a.classes; ++c) {
      total_weight += class_weight(a, c);
    }
  }

  static Sums sums_of(const CrossEntropyArguments& a, bool metrics, bool records) {
    if (a.probabilities != nullptr) return Sums::kCoefficients;
    if (a.label_smoothing != 0 || records) {
      return a.weight != nullptr ? Sums::kCoefficients : Sums::kShifted;
    }
    return metrics ? Sums::kEntropy : Sums::kExp;
  }

  const T* logits_of(int64_t row) const {
    return static_cast<const T*>(a.logits) + row * a.row_stride;
  }
  const T* probabilities_of(int64_t row) const {
    return static_cast<const T*>(a.probabilities) + row * a.probability_row_stride;
  }

  // Also lets the coefficients be those of the row.
  RowTarget<A> target_of(int64_t row, Coefficients<T>& coefficients) const {
    const auto key_of = [&](int64_t index) { return reader.key_at(logits_of(row), index); };
    if (a.probabilities == nullptr) return index_target_of(row, key_of);
    coefficients.set_row(probabilities_of(row));
    if (!reader.rank) return {true, -1, 1, A(0)};
    const int64_t index = argmax(probabilities_of(row), a.classes);
    return {true, index, 1, key_of(index)};
  }

  template <class KeyOf>
  RowTarget<A> index_target_of(int64_t row, const KeyOf& key_of) const {
    const int64_t target = target_at(a, row);
    if (target == a.ignore_index) return {false, -1, 0, A(0)};
    if (is_elsewhere(a, target)) return {true, -1, 1, A(0)};
    return {true, target, class_weight(a, target), key_of(target)};
  }

  // The loss of one row; adds to the group's sums and writes the record.
  double row_loss(int64_t r, const RowTarget<A>& target, const RowSums<A>& row,
                  GroupSums& group) const {
    RowFacts facts = {};
    facts.max = reader.logits.value(row.max_key);
    facts.log_sum = std::log(row.sum_exp);
    const double log_sum_exp = facts.max + facts.log_sum;
    double loss = 0;
    double sum_shifted = row.sum_shifted;
    if (a.probabilities != nullptr) {
      loss = row.sum_coefficients * facts.log_sum - row.sum_shifted;
      facts.negative_log_likelihood = loss;
      if (reader.rank && (a.weight != nullptr || a.label_smoothing != 0)) {
        double sum = 0;
        sum_shifted = likelihood_sum(r, row.max_key, sum);
        facts.negative_log_likelihood = sum * facts.log_sum - sum_shifted;
      }
    } else {
      loss = index_loss(target, row, facts);
    }
    loss += z_loss(target.weight, log_sum_exp);
    group.loss += loss;
    if (reader.rank) note(r, target, row, sum_shifted, facts, group);
    return loss;
  }

  // The metrics and the record of a row.
  void note(int64_t r, const RowTarget<A>& target, const RowSums<A>& row, double sum_shifted,
            RowFacts& facts, GroupSums& group) const {
    rank(target, row, facts);
    if (metrics) add_metrics(row, facts, a.classes, group.metrics);
    if (records != nullptr) record(r, row, facts, sum_shifted);
  }

  double index_loss(const RowTarget<A>& target, const RowSums<A>& row, RowFacts& facts) const {
    if (target.index < 0) return smoothing_loss(facts.log_sum, double(row.sum_shifted));
    facts.negative_log_likelihood =
        facts.log_sum - reader.logits.distance_of(target.key, reader.logits.reference(row.max_key));
    return target_loss(target.weight, facts.negative_log_likelihood) +
           smoothing_loss(facts.log_sum, row.sum_shifted);
  }

  template <class D>
  D target_loss(D weight, D negative_log_likelihood) const {
    return weighted((1 - a.label_smoothing) * weight, negative_log_likelihood);
  }
  template <class D>
  D smoothing_loss(D log_sum, D sum_shifted) const {
    return uniform == 0 ? D{} : uniform * (total_weight * log_sum - sum_shifted);
  }
  template <class D>
  D z_loss(D weight, D log_sum_exp) const {
    return a.z_loss == 0 ? D{} : weighted(weight * a.z_loss, log_sum_exp * log_sum_exp);
  }

  // The sums of the probabilities q, and of q d, where the coefficients are not q.
  double likelihood_sum(int64_t r, A max_key, double& sum) const {
    using V = typename Simd<A>::Vector;
    const auto reference = reader.logits.reference(max_key);
    const T* q = probabilities_of(r);
    double shifted = 0;
    for (int64_t begin = 0; begin < a.classes; begin += kRowBlock) {
      const int64_t count = a.classes - begin < kRowBlock ? a.classes - begin : kRowBlock;
      V block_sum{}, block_shifted{};
      for_each_vector(logits_of(r) + begin, count, [&](V v, int64_t i, int lanes) {
        const V c =
            lanes == Simd<A>::kLanes ? load(q + begin + i) : load_partial(q + begin + i, lanes, 0);
        block_sum += c;
        block_shifted += c == 0 ? V{} : c * reader.logits.distance(v, reference);
      });
      sum += sum_lanes(block_sum);
      shifted += sum_lanes(block_shifted);
    }
    return shifted;
  }

  void rank(const RowTarget<A>& target, const RowSums<A>& row, RowFacts& facts) const {
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    const bool known = target.index >= 0 && row.sum_exp == row.sum_exp;
    facts.rank = known ? double(row.rank) : kNaN;
    facts.target_logit = target.index >= 0 ? reader.logits.value(target.key)
                                           : -std::numeric_limits<double>::infinity();
    facts.other_max = row.sum_exp == row.sum_exp ? other_max(row) : kNaN;
  }

  // -Inf where there is no other, also below a cap.
  double other_max(const RowSums<A>& row) const {
    return a.classes == 1 ? -std::numeric_limits<double>::infinity()
                          : reader.logits.value(row.other_key);
  }

  void record(int64_t r, const RowSums<A>& row, const RowFacts& facts, double sum_shifted) const {
    records[row_record::kMax * a.rows + r] = facts.max;
    records[row_record::kSumExp * a.rows + r] = row.sum_exp;
    records[row_record::kSumExpShifted * a.rows + r] = row.sum_exp_shifted;
    records[row_record::kSumShifted * a.rows + r] = sum_shifted;
    records[row_record::kTargetLogit * a.rows + r] = facts.target_logit;
    records[row_record::kRank * a.rows + r] = facts.rank;
    records[row_record::kOtherMax * a.rows + r] = facts.other_max;
  }

  void record_ignored(int64_t r) const {
    for (int i = 0; records != nullptr && i < row_record::kSize; ++i) {
      records[i * a.rows + r] = std::numeric_limits<double>::quiet_NaN();
    }
  }

  // The maximum is rounded to A, and the sum becomes relative to what it was rounded to.
  void write_state(const RowSums<A>& row, int64_t r, CrossEntropyRowState state) const {
    const Logits& logits = reader.logits;
    const A max = A(logits.value(row.max_key));
    static_cast<A*>(state.max)[r] = max;
    state.sum_exp[r] = row.sum_exp;
    if (row.sum_exp == 0) return;
    const double rounding = logits.distance_of(row.max_key, logits.reference_at(max));
    if (rounding != 0) state.sum_exp[r] *= std::exp(rounding);
  }

  // upstream: [] or [rows], of the loss.
  double upstream_of(int64_t r, const void* upstream, int64_t stride) const {
    return double(
        static_cast<const A*>(upstream)[a.reduction == Reduction::kNone ? r * stride : 0]);
  }

  void write_loss(double value, int64_t r, void* loss) const {
    if (a.reduction == Reduction::kNone) static_cast<A*>(loss)[r] = A(value);
  }

  // Sum of a row's coefficients.
  double coefficient_sum(const RowTarget<A>& target, const RowSums<A>& row) const {
    return a.probabilities != nullptr ? row.sum_coefficients : index_coefficient_sum(target.weight);
  }
  double coefficient_sum(const RowTarget<A>& target, const Coefficients<T>& coefficients) const {
    if (a.probabilities == nullptr) return index_coefficient_sum(target.weight);
    using V = typename Simd<A>::Vector;
    constexpr int kLanes = Simd<A>::kLanes;
    double sum = 0;
    for (int64_t begin = 0; begin < a.classes; begin += kRowBlock) {
      const int64_t count = a.classes - begin < kRowBlock ? a.classes - begin : kRowBlock;
      coefficients.with_block(begin, count, [&](const auto& of) {
        V block{};
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) block += of(i, kLanes);
        if (i < count) block += of(i, int(count - i));
        sum += sum_lanes(block);
      });
    }
    return sum;
  }
  template <class D>
  D index_coefficient_sum(D target_weight) const {
    if (a.weight == nullptr) return D{} + 1;  // over all ranks
    return weighted(D{} + (1 - a.label_smoothing), target_weight) + uniform * total_weight;
  }

  // d(z_loss) / d(logit) is this times p.
  template <class D>
  D z_factor(D target_weight, D log_sum_exp) const {
    return weighted(2 * a.z_loss * target_weight, log_sum_exp);
  }

  // d(loss) / d(logit) of the target, of which e^d is e. p - 1 is the other classes' part of the
  // sum: exact when p is near 1, where e is 1, and before any rounding to T. Where p is small that
  // would cancel against what smoothing gives to the other classes.
  template <class D>
  D at_target(D target_weight, D e, D sum_exp, D coefficient_sum, D z_factor) const {
    const D others = a.weight == nullptr ? D{} + (a.label_smoothing - uniform)
                                         : uniform * (total_weight - target_weight);
    const D of_target = weighted(D{} + (1 - a.label_smoothing + uniform), target_weight);
    const D p = e / sum_exp;
    const D near_1 = coefficient_sum * ((e - sum_exp) / sum_exp) + others;
    return (p < 0.5 ? coefficient_sum * p - of_target : near_1) + weighted(z_factor, p);
  }

  RowGradient<T, Logits> gradient(const RowTarget<A>& target, const Coefficients<T>& coefficients,
                                  double upstream, const RowSoftmax<Logits>& row) const {
    const bool soft = a.probabilities != nullptr;
    const bool weighted_classes = a.weight != nullptr && uniform != 0;
    const double z_factor_of_row =
        a.z_loss == 0 ? 0
                      : z_factor(target.weight,
                                 reader.logits.position(row.reference) + std::log(row.sum_exp));
    upstream *= a.logit_scale;
    RowGradient<T, Logits> g{reader.logits, a.classes, 0, 0, nullptr, -1, 0};
    g.scale = upstream * (row.coefficient_sum + z_factor_of_row) / row.sum_exp;
    g.offset = upstream * (soft ? 1 : uniform);
    g.coefficients = soft || weighted_classes ? &coefficients : nullptr;
    g.target = soft ? -1 : target.index;
    if (g.target < 0) return g;
    const double e = std::exp(reader.logits.distance_of(target.key, row.reference));
    double at = at_target(target.weight, e, row.sum_exp, row.coefficient_sum, z_factor_of_row);
    if constexpr (Logits::kCapped) {
      using V = typename Simd<A>::Vector;
      // The derivative is even: of a key as of its logit.
      at *= double(reader.logits.capped(V{} + target.key).derivative[0]);
    }
    g.at_target = A(upstream * at);
    return g;
  }
};

}  // namespace pyvizllm::CPU_CAPABILITY
