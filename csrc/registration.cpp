// The operators of pyvizllm, registered through LibTorch's stable ABI.
//
// Schemas, checks and dispatch only: tensors become the raw pointers of kernels.h. Autograd and the
// fake kernels are registered in Python (pyvizllm/ops), CUDA in registration_cuda.cpp.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "check_adamw.h"
#include "kept_memory.h"
#include "kernels.h"
#include "sketch.h"

namespace pyvizllm {

void parallel_for_ranges(int64_t size, void (*body)(int64_t, int64_t, void*), void* context) {
  STD_TORCH_CHECK(torch_parallel_for(0, size, 1, body, context) == 0,
                  "pyvizllm: torch's thread pool failed to run a kernel");
}

int64_t thread_count() {
  return torch::stable::get_num_threads();
}

namespace {

// -- cross_entropy -------------------------------------------------------------------------------

// What the reduction "mean" divides by. pyvizllm/ops turns the error into torch's IndexError.
double divisor_of(const CrossEntropyArguments& a) {
  if (a.probabilities != nullptr) return double(a.rows);
  const TargetCheck check = cpu_kernels().check_targets(a);
  if (check.first_invalid >= 0) {
    const int64_t row = check.first_invalid;
    const int64_t target = a.target_is_int64 ? static_cast<const int64_t*>(a.target)[row]
                                             : static_cast<const int32_t*>(a.target)[row];
    STD_TORCH_CHECK(false, "cross_entropy: target ", target, " at position ", row,
                    " is out of bounds: expected 0 <= target < ", a.classes,
                    " or ignore_index = ", a.ignore_index);
  }
  return check.weight;
}

// Zeros to add to, [metric::kSize], or an empty tensor when metrics are not wanted.
Tensor new_metrics(const Tensor& input, Wanted wanted) {
  const int64_t size = wanted == Wanted::kLoss ? 0 : metric::kSize;
  Tensor sums = new_empty(input, {size}, ScalarType::Double);
  if (size > 0) std::fill_n(static_cast<double*>(sums.mutable_data_ptr()), size, 0.0);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_cpu(
    const Tensor& input, const Tensor& target, std::optional<Tensor> weight, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, double logit_scale,
    int64_t total_classes, std::string reduction, int64_t wanted) {
  const auto a = cross_entropy_arguments(input, target, weight,
                                         {ignore_index, label_smoothing, z_loss, softcap,
                                          logit_scale, total_classes, std::move(reduction)});
  const double divisor = divisor_of(a);
  Tensor loss = new_loss(a, input);
  Tensor row_max = new_empty(input, {a.rows}, accumulate_type(a.dtype));
  Tensor row_sum = new_empty(input, {a.rows}, ScalarType::Double);
  Tensor sums = new_metrics(input, Wanted(wanted));
  Tensor records = new_records(a, input, Wanted(wanted));
  cpu_kernels().cross_entropy_forward(
      a, divisor, loss.mutable_data_ptr(),
      {row_max.mutable_data_ptr(), static_cast<double*>(row_sum.mutable_data_ptr())},
      pointer_or_null(sums), pointer_or_null(records));
  return {loss, row_max, row_sum, sums, records};
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_loss,  // [] or [rows] acc, any stride
                                  const Tensor& input, const Tensor& target,
                                  std::optional<Tensor> weight, const Tensor& row_max,
                                  const Tensor& row_sum, int64_t ignore_index,
                                  double label_smoothing, double z_loss, double softcap,
                                  double logit_scale, int64_t total_classes,
                                  std::string reduction) {
  const auto a = cross_entropy_arguments(input, target, weight,
                                         {ignore_index, label_smoothing, z_loss, softcap,
                                          logit_scale, total_classes, std::move(reduction)});
  check_backward_arguments(a, input, grad_loss, row_max, row_sum);
  const double divisor = divisor_of(a);
  Tensor grad = new_cpu_gradient(input);
  cpu_kernels().cross_entropy_backward(
      a, divisor, {row_max.data_ptr(), static_cast<double*>(row_sum.data_ptr())},
      grad_loss.const_data_ptr(), grad_loss.dim() > 0 ? grad_loss.stride(0) : 0,
      grad.mutable_data_ptr(), a.classes);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> run_fused_cpu(const Tensor& input, const Tensor& target,
                                                 const std::optional<Tensor>& weight,
                                                 const CrossEntropyOptions& options, Wanted wanted,
                                                 const Tensor& grad) {
  const auto a = cross_entropy_arguments(input, target, weight, options);
  STD_TORCH_CHECK(a.positions == 0 || grad.is_contiguous(),
                  "cross_entropy: expected contiguous input [batch, classes, positions] in place");
  const double divisor = divisor_of(a);
  Tensor loss = new_loss(a, input);
  Tensor sums = new_metrics(input, wanted);
  Tensor records = new_records(a, input, wanted);
  cpu_kernels().cross_entropy_fused(a, divisor, loss.mutable_data_ptr(), grad.mutable_data_ptr(),
                                    grad.stride(0), pointer_or_null(sums),
                                    pointer_or_null(records));
  return {loss, sums, records};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fused_cpu(
    const Tensor& input, const Tensor& target, std::optional<Tensor> weight, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, double logit_scale,
    int64_t total_classes, std::string reduction, int64_t wanted) {
  Tensor grad = new_cpu_gradient(input);
  auto [loss, sums, records] = run_fused_cpu(input, target, weight,
                                             {ignore_index, label_smoothing, z_loss, softcap,
                                              logit_scale, total_classes, std::move(reduction)},
                                             Wanted(wanted), grad);
  return {loss, grad, sums, records};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fused_inplace_cpu(
    const Tensor& input, const Tensor& target, std::optional<Tensor> weight, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, double logit_scale,
    int64_t total_classes, std::string reduction, int64_t wanted) {
  return run_fused_cpu(input, target, weight,
                       {ignore_index, label_smoothing, z_loss, softcap, logit_scale, total_classes,
                        std::move(reduction)},
                       Wanted(wanted), input);
}

// -- tensor_stats --------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> tensor_stats_cpu(std::vector<Tensor> tensors,
                                                    std::optional<Tensor> histogram) {
  int64_t* const histogram_data = histogram_pointer(tensors, histogram, "tensor_stats");
  const std::vector<TensorSpan> spans = tensor_spans(tensors);
  const int64_t count = int64_t(spans.size());
  Tensor values = new_empty(tensors[0], {stat::kValues, count}, ScalarType::Double);
  Tensor counts = new_empty(tensors[0], {stat::kCounts, count}, ScalarType::Long);
  Tensor total_norm = new_empty(tensors[0], {}, ScalarType::Double);
  cpu_kernels().tensor_stats(spans.data(), count, histogram_data,
                             static_cast<double*>(values.mutable_data_ptr()),
                             static_cast<int64_t*>(counts.mutable_data_ptr()),
                             static_cast<double*>(total_norm.mutable_data_ptr()));
  return {values, counts, total_norm};
}

void scale_cpu(std::vector<Tensor> tensors, const Tensor& coefficient) {
  const std::vector<ScaledTensor> scaled = scaled_tensors(tensors, coefficient);
  cpu_kernels().scale(scaled.data(), int64_t(scaled.size()),
                      static_cast<const double*>(coefficient.const_data_ptr()));
}

Tensor sketch_cpu(std::vector<Tensor> tensors, std::vector<int64_t> seeds) {
  check_seeds(tensors, seeds);
  const std::vector<TensorSpan> spans = tensor_spans(tensors, "sketch");
  const int64_t count = int64_t(spans.size());
  Tensor sketches = new_empty(tensors[0], {count, kSketchSize}, ScalarType::Double);
  cpu_kernels().sketch(spans.data(), count, seeds.data(),
                       static_cast<double*>(sketches.mutable_data_ptr()));
  return sketches;
}

void first_nonfinite_cpu(std::vector<Tensor> tensors, const Tensor& counts, int64_t row,
                         const Tensor& found) {
  check_found(tensors, counts, row, found);
  const std::vector<TensorSpan> spans = tensor_spans(tensors, "first_nonfinite_");
  cpu_kernels().first_nonfinite(spans.data(), int64_t(spans.size()),
                                static_cast<const int64_t*>(counts.const_data_ptr()), row,
                                static_cast<int64_t*>(found.mutable_data_ptr()));
}

// -- adamw ---------------------------------------------------------------------------------------

AdamWOutputs adamw_cpu(std::vector<Tensor> params, std::vector<Tensor> grads,
                       std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                       std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> masters,
                       std::vector<Tensor> steps, std::optional<Tensor> lr_tensor, double lr,
                       double beta1, double beta2, double eps, double weight_decay, bool maximize,
                       std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                       std::optional<Tensor> clip_coefficient, bool statistics,
                       std::optional<Tensor> update_histogram,
                       std::optional<Tensor> param_histogram) {
  AdamWLists lists{std::move(params),      std::move(grads),           std::move(exp_avgs),
                   std::move(exp_avg_sqs), std::move(max_exp_avg_sqs), std::move(masters),
                   std::move(steps)};
  AdamWTensors tensors(lists);
  const AdamWOptions options = adamw_options(lr_tensor, lr, beta1, beta2, eps, weight_decay,
                                             maximize, grad_scale, found_inf, clip_coefficient);
  AdamWOutputs outputs = new_adamw_outputs(lists.params[0], tensors.size(), statistics);
  cpu_kernels().adamw(tensors.data(), tensors.size(), options,
                      adamw_statistics(outputs, lists.params, update_histogram, param_histogram));
  tensors.finish();
  return outputs;
}

std::string cpu_capability() {
  return cpu_kernels().capability;
}

}  // namespace
}  // namespace pyvizllm

STABLE_TORCH_LIBRARY(pyvizllm, m) {
  // input: [rows, classes], or on the CPU [batch, classes, positions] with batch * positions rows.
  // target: class indices [rows], or class probabilities [rows, classes]. wanted: 0 the loss, 1
  // also packed metrics [53], 2 also a record of each token [7, rows]; what is not wanted is empty.
  // Loss, row maxima [rows], row sums of exp(logit - max) [rows] float64, metrics and records.
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, float logit_scale, int total_classes, "
      "str reduction, int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The gradient of the input, of its shape.
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, "
      "Tensor row_max, Tensor row_sum, int ignore_index, float label_smoothing, float z_loss, "
      "float softcap, float logit_scale, int total_classes, str reduction) -> Tensor");
  // Loss, gradient of the input for an upstream gradient of 1, metrics and records.
  m.def(
      "cross_entropy_fused(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, float logit_scale, int total_classes, "
      "str reduction, int wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  // The same with the gradient written over the input.
  m.def(
      "cross_entropy_fused_(Tensor(a!) input, Tensor target, Tensor? weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, float logit_scale, int total_classes, "
      "str reduction, int wanted) -> (Tensor, Tensor, Tensor)");
  // Float64 statistics [7, T], int64 counts [5, T] and the total norm []; adds to the histogram.
  m.def("tensor_stats(Tensor[] tensors, Tensor(a!)? histogram) -> (Tensor, Tensor, Tensor)");
  // Multiplies by the coefficient, one float64 number; where that is 1, nothing is touched. Of a
  // tensor that is not contiguous, a matrix, the rows have to be.
  m.def("scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()");
  // One step of AdamW on parameters of one device. Returns float64 statistics [7, T] and int64
  // counts [5, T] of the update, and the same of the parameters after the step; [7, 0] and [5, 0]
  // unless wanted. Adds to the histograms.
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, "
      "Tensor(f!)[] steps, Tensor? lr_tensor, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool maximize, Tensor? grad_scale, Tensor? found_inf, "
      "Tensor? clip_coefficient, bool statistics, Tensor(g!)? update_histogram, "
      "Tensor(h!)? param_histogram) -> (Tensor, Tensor, Tensor, Tensor)");
  // The +-1 hash sketch of each tensor, [T, 64] float64, hashed by its seed.
  m.def("sketch(Tensor[] tensors, int[] seeds) -> Tensor");
  // Where `counts`, tensor_stats' of the same tensors, say that there is a NaN or Inf and found is
  // -1, found becomes row * 2**40 + the flat index of the first.
  m.def("first_nonfinite_(Tensor[] tensors, Tensor counts, int row, Tensor(a!) found) -> ()");
  // The instruction set of the CPU kernels in use.
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyvizllm, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&pyvizllm::cross_entropy_forward_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&pyvizllm::cross_entropy_backward_cpu));
  m.impl("cross_entropy_fused", TORCH_BOX(&pyvizllm::cross_entropy_fused_cpu));
  m.impl("cross_entropy_fused_", TORCH_BOX(&pyvizllm::cross_entropy_fused_inplace_cpu));
  m.impl("tensor_stats", TORCH_BOX(&pyvizllm::tensor_stats_cpu));
  m.impl("scale_", TORCH_BOX(&pyvizllm::scale_cpu));
  m.impl("adamw_", TORCH_BOX(&pyvizllm::adamw_cpu));
  m.impl("sketch", TORCH_BOX(&pyvizllm::sketch_cpu));
  m.impl("first_nonfinite_", TORCH_BOX(&pyvizllm::first_nonfinite_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(pyvizllm, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&pyvizllm::cpu_capability));
}

// `import pyvizllm._C` runs the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
