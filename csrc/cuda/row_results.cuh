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
constexpr int kColumns = metric::kSize + 1;

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
  AccumulateType<T> logit_of_target;
  RowSums<T> sums;
};

// The results of one row.
struct RowResults {
  double loss;
  double metrics[metric::kCalibrationCount];
  int bin;  // of the calibration, or -1
};

// Of a row that does not count, or of none.
__device__ __forceinline__ RowResults no_results() {
  return {0, {}, -1};
}

template <bool kExtras, class T>
__device__ __forceinline__ RowResults results_of(const CrossEntropyArguments& a,
                                                 const ReducedRow<T>& row) {
  const RowSums<T>& sums = row.sums;
  const double log_sum = log(sums.exp);
  const double log_sum_exp = double(sums.max) + log_sum;
  const double nll = log_sum - (double(row.logit_of_target) - double(sums.max));
  RowResults results = {};
  results.bin = -1;
  results.loss = nll;
  results.metrics[metric::kTokens] = 1;
  if constexpr (kExtras) {
    if (a.label_smoothing != 0) {
      const double mean_nll = log_sum - sums.shifted / double(a.classes);
      results.loss = (1 - a.label_smoothing) * nll + a.label_smoothing * mean_nll;
    }
    // The argmax is the first of equal maxima, so that constant rows are not all correct.
    const bool first = sums.max_before_target < sums.max || row.target == 0;
    const bool correct = sums.exp == sums.exp && row.logit_of_target == sums.max && first;
    const double top_probability = 1 / sums.exp;
    results.metrics[metric::kCorrect] = correct;
    results.metrics[metric::kNegativeLogLikelihood] = nll;
    results.metrics[metric::kEntropy] = log_sum - sums.exp_shifted / sums.exp;
    results.metrics[metric::kLogSumExp] = log_sum_exp;
    results.metrics[metric::kTopProbability] = top_probability;
    if (top_probability > 0 && top_probability <= 1) {  // NaN has no bin
      results.bin = int(ceil(top_probability * metric::kCalibrationBins)) - 1;
    }
  }
  if (a.z_loss != 0) results.loss += a.z_loss * log_sum_exp * log_sum_exp;
  return results;
}

// 2 z (log-sum-exp): d(z-loss)/d(logit) is that times p.
__device__ __forceinline__ double z_factor_of(const CrossEntropyArguments& a, double max,
                                              double sum_exp) {
  return a.z_loss == 0 ? 0 : 2 * a.z_loss * (max + log(sum_exp));
}

// The gradient of the target's logit. p - 1 as expm1(log p): no worse near p = 1 than the sum,
// which is of float32 within a tile, and before any rounding to T.
__device__ __forceinline__ double target_gradient(const CrossEntropyArguments& a,
                                                  double logit_of_target, double upstream,
                                                  double max, double sum_exp) {
  const double log_p = (logit_of_target - max) - log(sum_exp);
  const double uniform = a.label_smoothing / double(a.classes);
  const double of_z_loss = z_factor_of(a, max, sum_exp) * exp(log_p);
  return upstream * (expm1(log_p) + of_z_loss + a.label_smoothing - uniform);
}

// Sums of results over the rows of a block: a group's first warp adds the group's rows, the block
// adds its groups at the end. The order is fixed.
template <class Group, bool kExtras>
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
    add_column(metric::kTokens, results.metrics[metric::kTokens]);
    if constexpr (!kExtras) return;
    const double correct = results.metrics[metric::kCorrect];
    const double confidence = results.metrics[metric::kTopProbability];
#pragma unroll
    for (int i = metric::kCorrect; i < metric::kCalibrationCount; ++i) {
      add_column(i, results.metrics[i]);
    }
    // Row by row, so that rows of one bin are added in order; lane b adds those of bin b.
    for (unsigned rows = __ballot_sync(kWholeWarp, results.bin >= 0); rows != 0; rows &= rows - 1) {
      const int row = __popc((rows & -rows) - 1);
      const int bin = __shfl_sync(kWholeWarp, results.bin, row);
      const double row_correct = __shfl_sync(kWholeWarp, correct, row);
      const double row_confidence = __shfl_sync(kWholeWarp, confidence, row);
      if (bin != Group::thread()) continue;
      own_[metric::kCalibrationCount + bin] += 1;
      own_[metric::kCalibrationCorrect + bin] += row_correct;
      own_[metric::kCalibrationConfidence + bin] += row_confidence;
    }
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

  Shared& shared_;
  double* own_;
};

}  // namespace pyvizllm
