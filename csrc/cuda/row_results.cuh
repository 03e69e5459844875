// What one thread computes of a whole row: its loss, its metrics, the gradient of its target.
//
// A logarithm and a division in float64 take a thread about a microsecond, in which the rest of the
// block would wait. So rows' sums are kept, and the results of up to 32 rows are computed at once,
// one row a lane, by one warp; the others go on.
#pragma once

#include "../kernels.h"
#include "row_sums.cuh"

namespace pyvizllm {

constexpr int kLossColumn = metric::kSize;
constexpr int kWeightColumn = metric::kSize + 1;  // class weights of the targets; with kOptions
constexpr int kColumns = metric::kSize + 2;

// A group's kept rows, in shared memory.
template <class Entry, class Group>
class KeptRows {
 public:
  // One for each lane of a warp; less where each of the block's warps keeps its own.
  static constexpr int kRows = Group::kPerBlock == 1 ? kWarpSize : 8;
  using Shared = Entry[Group::kPerBlock][kRows];

  explicit __device__ __forceinline__ KeptRows(Shared& shared) : rows_(shared[Group::index()]) {}

  // To be called by the whole group with the same entry.
  __device__ __forceinline__ void keep(const Entry& entry) {
    if (Group::thread() == 0) rows_[count_] = entry;
    ++count_;
  }
  __device__ __forceinline__ bool full() const { return count_ == kRows; }

  // Calls body(entry, mine) once in every lane of the group's first warp; `mine` tells whether it
  // has one. What the group wrote before is ordered before what body writes.
  template <class Body>
  __device__ __forceinline__ void flush(const Body& body) {
    Group::sync();
    if (Group::warp() == 0) {
      const int lane = Group::thread();
      body(rows_[lane % kRows], lane < count_);
      __syncwarp();  // the first lane writes the next rows over these
    }
    count_ = 0;
  }

 private:
  Entry (&rows_)[kRows];
  int count_ = 0;
};

// A row that was reduced, or one that does not count, with empty sums.
template <class T>
struct ReducedRow {
  int64_t row;
  int64_t target;
  AccumulateType<T> logit_of_target;  // of the input, before scale and cap
  RowSums<T> sums;
};

// The results of one row: what one lane has to add up.
struct RowResults {
  bool counts, correct, top5;
  double loss;
  double weight;  // what the mean divides by
  double negative_log_likelihood, entropy, log_sum_exp, top_probability, margin;
};

// Of a row that does not count, or of none.
__device__ __forceinline__ RowResults no_results() {
  return {};
}

// Where a NaN is among the logits, nothing ranks.
template <class T>
__device__ __forceinline__ double rank_of(const RowSums<T>& sums) {
  return sums.exp == sums.exp ? double(sums.rank) : nan("");
}

// One row's place in the records, or none.
struct RecordPlace {
  double* record;  // of this row, or null
  int64_t rows;

  __device__ __forceinline__ RecordPlace(const CrossEntropyArguments& a, double* records,
                                         int64_t row)
      : record(records == nullptr ? nullptr : records + row), rows(a.rows) {}

  template <class T>
  __device__ __forceinline__ void write(const RowSums<T>& sums, double max, double shifted,
                                        double target_logit, double rank, double other) const {
    if (record == nullptr) return;
    record[row_record::kMax * rows] = max;
    record[row_record::kSumExp * rows] = sums.exp;
    record[row_record::kSumExpShifted * rows] = sums.exp_shifted;
    record[row_record::kSumShifted * rows] = shifted;
    record[row_record::kTargetLogit * rows] = target_logit;
    record[row_record::kRank * rows] = rank;
    record[row_record::kOtherMax * rows] = rank_of(sums) == rank_of(sums) ? other : rank_of(sums);
  }
  // Of a row that does not count.
  __device__ __forceinline__ void write_nothing() const {
    if (record == nullptr) return;
    for (int i = 0; i < row_record::kSize; ++i) record[i * rows] = nan("");
  }
};

// What is the same with options and without.
template <class T>
__device__ __forceinline__ void set_metrics(const CrossEntropyArguments& a, RowResults& results,
                                            const RowSums<T>& sums, double log_sum,
                                            double target_logit, double other, double rank) {
  results.correct = rank == 0;
  results.top5 = rank < 5;
  results.entropy = log_sum - sums.exp_shifted / sums.exp;
  results.top_probability = sums.exp == 0 ? nan("") : 1 / sums.exp;  // 0: all are -Inf
  // A NaN among the logits makes the sum NaN, but not `other`.
  const bool compared = sums.exp == sums.exp;
  results.margin = a.classes == 1 ? 0 : compared ? target_logit - other : nan("");
}

// In the place of Options (row_options.cuh), where there are none.
template <class T>
struct NoOptions {
  struct Constants {
    template <class Prepared>
    Constants(const CrossEntropyArguments&, const Prepared&) {}
  };
  struct Shared {};
  __device__ __forceinline__ NoOptions(const CrossEntropyArguments&, const Constants&, Shared&) {}
  __device__ __forceinline__ bool is_here(int64_t) const { return true; }
  __device__ __forceinline__ AccumulateType<T> of_sums(AccumulateType<T> max) const { return max; }
  __device__ __forceinline__ AccumulateType<T> of_state(AccumulateType<T> max) const { return max; }
};

template <Variant kVariant, class T>
__device__ __forceinline__ RowResults results_of(const CrossEntropyArguments& a,
                                                 const NoOptions<T>&, const RecordPlace& place,
                                                 const ReducedRow<T>& row) {
  const RowSums<T>& sums = row.sums;
  const double log_sum = log(sums.exp);
  RowResults results = {};
  results.counts = true;
  results.negative_log_likelihood = log_sum - (double(row.logit_of_target) - double(sums.max));
  results.log_sum_exp = double(sums.max) + log_sum;
  results.loss = results.negative_log_likelihood;
  if constexpr (kVariant == Variant::kMetrics) {
    const double shifted = sums.shifted - double(a.classes) * double(reference_of(sums.max));
    if (a.label_smoothing != 0) {
      const double mean = log_sum - shifted / double(a.classes);
      results.loss = (1 - a.label_smoothing) * results.loss + a.label_smoothing * mean;
    }
    const double rank = rank_of(sums);
    set_metrics(a, results, sums, log_sum, double(row.logit_of_target), double(sums.other_max),
                rank);
    place.write(sums, double(sums.max), shifted, double(row.logit_of_target), rank,
                double(sums.other_max));
  }
  if (a.z_loss != 0) results.loss += a.z_loss * results.log_sum_exp * results.log_sum_exp;
  return results;
}

// 2 z (log-sum-exp): d(z-loss)/d(logit) is that times p.
__device__ __forceinline__ double z_factor_of(const CrossEntropyArguments& a, double max,
                                              double sum_exp) {
  return a.z_loss == 0 ? 0 : 2 * a.z_loss * (max + log(sum_exp));
}

// The gradient of the target's logit. p - 1 as expm1(log p): no worse near p = 1 than the sum,
// which is of float32 within a tile, and before any rounding to T.
template <class T>
__device__ __forceinline__ double target_gradient(const CrossEntropyArguments& a,
                                                  const NoOptions<T>&, int64_t, int64_t,
                                                  AccumulateType<T> logit_of_target,
                                                  double upstream, AccumulateType<T> max,
                                                  double sum_exp) {
  const double log_p = (double(logit_of_target) - max) - log(sum_exp);
  const double uniform = a.label_smoothing / double(a.classes);
  const double of_z_loss = z_factor_of(a, max, sum_exp) * exp(log_p);
  return upstream * (expm1(log_p) + of_z_loss + a.label_smoothing - uniform);
}

// Sums of results over the rows of a block: a group's first warp adds the group's rows, the block
// adds its groups at the end. The order is fixed.
template <class Group, Variant kVariant>
class ResultColumns {
 public:
  using Shared = double[Group::kPerBlock][kColumns];

  explicit __device__ __forceinline__ ResultColumns(Shared& shared)
      : shared_(shared), own_(shared[Group::index()]) {
    if (Group::warp() != 0) return;
    for (int i = Group::thread(); i < kColumns; i += kWarpSize) own_[i] = 0;
    __syncwarp();
  }

  // To be called by all lanes of the group's first warp.
  __device__ __forceinline__ void add(const RowResults& results) {
    add_column(kLossColumn, results.loss);
    add_count(metric::kTokens, results.counts);
    if constexpr (kVariant == Variant::kLoss) return;
    if constexpr (kVariant == Variant::kOptions) add_column(kWeightColumn, results.weight);
    add_count(metric::kCorrect, results.correct);
    add_count(metric::kTop5Correct, results.top5);
    add_column(metric::kNegativeLogLikelihood, results.negative_log_likelihood);
    add_column(metric::kEntropy, results.entropy);
    add_column(metric::kLogSumExp, results.log_sum_exp);
    add_column(metric::kTopProbability, results.top_probability);
    add_column(metric::kMargin, results.margin);
    add_calibration(results.top_probability, results.correct);
  }

  // The sums of the block. Every thread of it must call this, once.
  __device__ __forceinline__ void write(double* group) const {  // [kColumns]
    __syncthreads();
    if (threadIdx.x >= kColumns) return;
    double sum = 0;
    for (int g = 0; g < Group::kPerBlock; ++g) sum += shared_[g][threadIdx.x];
    group[threadIdx.x] = sum;
  }

 private:
  __device__ __forceinline__ void add_column(int column, double value) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (Group::thread() == 0) own_[column] += value;
  }
  __device__ __forceinline__ void add_count(int column, bool value) {
    const int count = __popc(__ballot_sync(kWholeWarp, value));
    if (Group::thread() == 0) own_[column] += count;
  }
  // Row by row, so that rows of one bin are added in order; lane b adds those of bin b. A row that
  // does not count has no probability, and so no bin, as one whose probability is NaN.
  __device__ __forceinline__ void add_calibration(double probability, bool correct) {
    const bool binned = probability > 0 && probability <= 1;
    const int own_bin = binned ? int(ceil(probability * metric::kCalibrationBins)) - 1 : -1;
    for (unsigned rows = __ballot_sync(kWholeWarp, binned); rows != 0; rows &= rows - 1) {
      const int row = __popc((rows & -rows) - 1);
      const int bin = __shfl_sync(kWholeWarp, own_bin, row);
      const bool row_correct = __shfl_sync(kWholeWarp, int(correct), row);
      const double row_probability = __shfl_sync(kWholeWarp, probability, row);
      if (bin != Group::thread()) continue;
      own_[metric::kCalibrationCount + bin] += 1;
      own_[metric::kCalibrationCorrect + bin] += row_correct;
      own_[metric::kCalibrationConfidence + bin] += row_probability;
    }
  }

  Shared& shared_;
  double* own_;
};

}  // namespace pyvizllm
