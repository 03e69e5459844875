// The kernels' host functions: raw pointers, sizes and strides, and no torch type.
//
// registration.cpp turns tensors into these arguments and has checked shapes, dtypes and devices.
// "acc" is the accumulation type: double for float64 input, float for all others.
#pragma once

#include <cstdint>

namespace pyvizllm {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class Reduction { kNone, kMean, kSum };

// Layout of the packed metrics of cross_entropy: sums over the tokens that count.
namespace metric {
constexpr int kTokens = 0;
constexpr int kCorrect = 1;                // argmax == target
constexpr int kNegativeLogLikelihood = 2;  // nats, without label smoothing and z-loss
constexpr int kEntropy = 3;                // nats
constexpr int kLogSumExp = 4;
constexpr int kTopProbability = 5;
constexpr int kTop5Correct = 6;       // fewer than five logits rank before the target's
constexpr int kMargin = 7;            // target's logit - the largest of the others
constexpr int kCalibrationBins = 15;  // (i/15, (i+1)/15] of the top probability
constexpr int kCalibrationCount = 8;
constexpr int kCalibrationCorrect = kCalibrationCount + kCalibrationBins;
constexpr int kCalibrationConfidence = kCalibrationCorrect + kCalibrationBins;
constexpr int kSize = kCalibrationConfidence + kCalibrationBins;
}  // namespace metric

// Rows of the float64 record of each token, [row_record::kSize, rows]. Logits are those after scale
// and cap; distances are from their maximum. NaN for tokens that do not count.
namespace row_record {
constexpr int kMax = 0;
constexpr int kSumExp = 1;         // of e^distance
constexpr int kSumExpShifted = 2;  // of distance * e^distance
constexpr int kSumShifted = 3;   // of distance, or of class weight * distance where there are some
constexpr int kTargetLogit = 4;  // -Inf where the target is elsewhere
constexpr int kRank = 5;         // logits that are larger, or equal and before the target
constexpr int kOtherMax = 6;     // the largest logit but the target's
constexpr int kSize = 7;
}  // namespace row_record

// What first_nonfinite writes: the row that the caller has given, and below it the element's index.
constexpr int kFoundRowShift = 40;

struct CrossEntropyArguments {
  const void* logits;  // [rows, classes], class stride 1; or as `positions` has it
  DType dtype;
  int64_t rows;
  int64_t classes;
  int64_t row_stride;  // elements
  // CPU only. Other than 0: logits are [rows / positions, classes, positions] with position stride
  // 1, and have neither scale nor cap, nor do they meet probabilities; a gradient is contiguous.
  int64_t positions;
  int64_t batch_stride;  // elements
  int64_t class_stride;  // elements
  const void* target;    // [rows], contiguous; null with probabilities
  bool target_is_int64;  // else int32
  int64_t ignore_index;
  const void* probabilities;       // [rows, classes] of the logits' dtype, class stride 1; or null
  int64_t probability_row_stride;  // elements
  const void* weight;              // [classes] acc, contiguous; or null
  double label_smoothing;
  double z_loss;
  double softcap;      // logits become softcap * tanh(logits * logit_scale / softcap); 0: no cap
  double logit_scale;  // logits are multiplied by it, before the cap
  Reduction reduction;
  // Of all ranks, where each holds a slice of the classes; label smoothing is uniform over them. A
  // target outside [0, classes) is then another rank's, and not an error: the row has no target's
  // term. 0: `classes` are all there are.
  int64_t total_classes;
};

// What the backward needs of a row; its log-sum-exp is max + log(sum_exp). Kept apart, because
// log-sum-exp minus logit cancels when logits are large.
struct CrossEntropyRowState {
  void* max;        // [rows] acc
  double* sum_exp;  // [rows]: sum of exp(logit - max); float64, since p - 1 needs it near 1
};

struct TargetCheck {
  int64_t tokens;         // rows whose target is not ignore_index
  double weight;          // of their targets' classes; tokens where there are no class weights
  int64_t first_invalid;  // the first row whose target is out of range, or -1
};

// One tensor of a list. Empty tensors are allowed anywhere.
struct TensorSpan {
  const void* data;  // contiguous
  DType dtype;
  int64_t numel;
};

// One tensor of a list that is written to. Empty tensors are allowed anywhere.
struct ScaledTensor {
  void* data;  // contiguous
  DType dtype;
  int64_t numel;
};

// Rows of the packed float64 statistics of tensor_stats, each [tensors].
namespace stat {
constexpr int kSum = 0;
constexpr int kSumSquares = 1;
constexpr int kAbsSum = 2;
constexpr int kNorm = 3;
constexpr int kMin = 4;
constexpr int kMax = 5;
constexpr int kAbsMax = 6;
constexpr int kValues = 7;
// Rows of the packed int64 counts, each [tensors].
constexpr int kZeros = 0;
constexpr int kNans = 1;
constexpr int kPosInfs = 2;
constexpr int kNegInfs = 3;
constexpr int kNumel = 4;
constexpr int kCounts = 5;
}  // namespace stat

// One parameter of AdamW and what belongs to it. All are contiguous and of numel elements, but
// step.
struct AdamWTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // amsgrad: the running maximum of exp_avg_sq; else null
  float* master;         // float32 weights of which param is the rounded copy; else null
  float* step;           // [] the steps taken; the kernel adds one
  DType param_dtype;
  DType grad_dtype;
  DType state_dtype;  // of exp_avg, exp_avg_sq and max_exp_avg_sq
  int64_t numel;
};

// One parameter group. The pointers are to one element in the parameters' memory, or null.
struct AdamWOptions {
  double lr;
  const void* lr_tensor;  // read in place of lr
  DType lr_dtype;         // float32 or float64
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool maximize;
  const float* grad_scale;         // gradients are divided by it
  const float* found_inf;          // other than 0: nothing at all is changed
  const double* clip_coefficient;  // unscaled gradients are multiplied by it
};

// What one step did, as tensor_stats would tell of the tensors. Any of the pointers may be null:
// what is not wanted costs nothing. A step that found_inf skips has the statistics of empty
// tensors.
struct AdamWStatistics {
  double* update_values;      // [stat::kValues, tensors]: of the change, of masters if any
  int64_t* update_counts;     // [stat::kCounts, tensors]
  int64_t* update_histogram;  // [tensors, kBins], added to
  double* param_values;       // of the parameter after the step, in its own dtype
  int64_t* param_counts;
  int64_t* param_histogram;
};

// -- CUDA ----------------------------------------------------------------------------------------
// All pointers are device memory but the TensorSpans themselves. `stream` is a cudaStream_t; work
// is queued on it, the host waits for nothing, and a CUDA graph can capture it. `workspace` needs
// no initial value and must live until the work is done (a tensor of torch's allocator does). A
// launch that fails throws std::runtime_error. Targets out of range are a device-side assertion.

int64_t cross_entropy_workspace_cuda(const CrossEntropyArguments&);  // bytes
void cross_entropy_forward_cuda(const CrossEntropyArguments&, void* loss, CrossEntropyRowState,
                                double* metrics, double* records, void* workspace, void* stream);
void cross_entropy_backward_cuda(const CrossEntropyArguments&, CrossEntropyRowState,
                                 const void* grad_loss, int64_t grad_loss_stride, void* grad,
                                 int64_t grad_row_stride, void* workspace, void* stream);
void cross_entropy_fused_cuda(const CrossEntropyArguments&, void* loss, void* grad,
                              int64_t grad_row_stride, double* metrics, double* records,
                              void* workspace, void* stream);

int64_t tensor_stats_workspace_cuda(const TensorSpan* tensors, int64_t count);  // bytes
// Adds to histogram [count, kBins], which may be null.
void tensor_stats_cuda(const TensorSpan* tensors, int64_t count, int64_t* histogram, double* values,
                       int64_t* counts, double* total_norm, void* workspace, void* stream);

// Multiplies the tensors by *coefficient; where that is 1, they are not touched.
void scale_cuda(const ScaledTensor* tensors, int64_t count, const double* coefficient,
                void* stream);

int64_t sketch_workspace_cuda(const TensorSpan* tensors, int64_t count);  // bytes
// seeds [count] is host memory; sketches [count, 64].
void sketch_cuda(const TensorSpan* tensors, int64_t count, const int64_t* seeds, double* sketches,
                 void* workspace, void* stream);

// counts [stat::kCounts, count] of tensor_stats; found [count], see kFoundRowShift.
void first_nonfinite_cuda(const TensorSpan* tensors, int64_t count, const int64_t* counts,
                          int64_t row, int64_t* found, void* stream);

int64_t adamw_workspace_cuda(const AdamWTensor* tensors, int64_t count, bool statistics);  // bytes
void adamw_cuda(const AdamWTensor* tensors, int64_t count, const AdamWOptions&,
                const AdamWStatistics&, void* workspace, void* stream);

// -- CPU -----------------------------------------------------------------------------------------

// The CPU kernels of one instruction set.
struct CpuKernels {
  const char* capability;  // "DEFAULT", "AVX2" or "AVX512"
  TargetCheck (*check_targets)(const CrossEntropyArguments&);
  // divisor: what the reduction "mean" divides by.
  void (*cross_entropy_forward)(const CrossEntropyArguments&, double divisor, void* loss,
                                CrossEntropyRowState, double* metrics, double* records);
  void (*cross_entropy_backward)(const CrossEntropyArguments&, double divisor, CrossEntropyRowState,
                                 const void* grad_loss, int64_t grad_loss_stride, void* grad,
                                 int64_t grad_row_stride);
  void (*cross_entropy_fused)(const CrossEntropyArguments&, double divisor, void* loss, void* grad,
                              int64_t grad_row_stride, double* metrics, double* records);
  void (*tensor_stats)(const TensorSpan* tensors, int64_t count, int64_t* histogram, double* values,
                       int64_t* counts, double* total_norm);
  void (*scale)(const ScaledTensor* tensors, int64_t count, const double* coefficient);
  void (*adamw)(const AdamWTensor* tensors, int64_t count, const AdamWOptions&,
                const AdamWStatistics&);
  void (*sketch)(const TensorSpan* tensors, int64_t count, const int64_t* seeds, double* sketches);
  void (*first_nonfinite)(const TensorSpan* tensors, int64_t count, const int64_t* counts,
                          int64_t row, int64_t* found);
};

// The kernels for the machine's best instruction set, chosen once. Honours torch's own environment
// variable ATEN_CPU_CAPABILITY ("default", "avx2", "avx512").
const CpuKernels& cpu_kernels();

// Runs body(begin, end, context) over disjoint ranges that cover [0, size) on torch's thread pool.
void parallel_for_ranges(int64_t size, void (*body)(int64_t, int64_t, void*), void* context);

// How many threads that pool has.
int64_t thread_count();

// Hands out the indices 0..count-1, each once, to the threads of parallel_queue. A thread gets them
// in runs, since neighbours share a tensor and what is kept for it; the runs become shorter towards
// the end, so that a thread held up by other work on the machine simply takes fewer.
class WorkQueue {
 public:
  // threads: how many take part, at most.
  WorkQueue(int64_t* next, int64_t count, int64_t threads)
      : next_(next), count_(count), parts_(2 * threads) {}

  // The next index, or -1 when none is left. Always inlined: out of line, the code of one
  // instruction set could be linked into all.
  [[gnu::always_inline]] int64_t take() {
    if (begin_ == end_ && !take_run()) return -1;
    return begin_++;
  }

 private:
  [[gnu::always_inline]] bool take_run() {
    begin_ = __atomic_load_n(next_, __ATOMIC_RELAXED);
    do {
      if (begin_ == count_) return end_ = begin_, false;
      const int64_t part = (count_ - begin_) / parts_;
      end_ = begin_ + (part > 0 ? part : 1);
    } while (!__atomic_compare_exchange_n(next_, &begin_, end_, true, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return true;
  }

  int64_t* next_;  // of all threads
  int64_t count_;
  int64_t parts_;
  int64_t begin_ = 0, end_ = 0;  // the run
};

// Calls worker(queue) once on each thread that takes part; the queue holds `count` indices.
// small: there is so little to do that waking other threads would take longer.
template <class Worker>
void parallel_queue(int64_t count, const Worker& worker, bool small = false) {
  struct Context {
    int64_t next;
    int64_t count;
    int64_t threads;
    const Worker* worker;
  } context{0, count, thread_count(), &worker};
  if (small) {
    WorkQueue queue(&context.next, count, 1);
    return worker(queue);
  }
  parallel_for_ranges(
      count,
      [](int64_t, int64_t, void* c) {
        Context& context = *static_cast<Context*>(c);
        WorkQueue queue(&context.next, context.count, context.threads);
        (*context.worker)(queue);
      },
      &context);
}

}  // namespace pyvizllm
