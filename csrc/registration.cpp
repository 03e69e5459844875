// The operators of pyvizllm, registered through LibTorch's stable ABI.
//
// Schemas, checks and dispatch only: tensors become the raw pointers of kernels.h. Autograd and the
// fake kernels are registered in Python (pyvizllm/ops).
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "bins.h"
#include "kernels.h"

namespace pyvizllm {

void parallel_for_ranges(int64_t size, void (*body)(int64_t, int64_t, void*), void* context) {
  STD_TORCH_CHECK(torch_parallel_for(0, size, 1, body, context) == 0,
                  "pyvizllm: torch's thread pool failed to run a kernel");
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, what, ": expected a tensor of float32, float64, float16 or bfloat16, ",
                      "got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

ScalarType accumulate_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

Reduction reduction_of(const std::string& name) {
  if (name == "none") return Reduction::kNone;
  if (name == "mean") return Reduction::kMean;
  STD_TORCH_CHECK(name == "sum", "cross_entropy: expected reduction 'none', 'mean' or 'sum', got '",
                  name, "'");
  return Reduction::kSum;
}

Tensor new_empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}
Tensor new_zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

Tensor new_gradient(const Tensor& input) {
  return new_empty(input, {input.size(0), input.size(1)}, input.scalar_type());
}

// -- cross_entropy -------------------------------------------------------------------------------

CrossEntropyArguments cross_entropy_arguments(const Tensor& input,   // [rows, classes]
                                              const Tensor& target,  // [rows]
                                              int64_t ignore_index, double label_smoothing,
                                              double z_loss, const std::string& reduction) {
  STD_TORCH_CHECK(input.dim() == 2 && target.dim() == 1 && target.size(0) == input.size(0),
                  "cross_entropy: expected input [rows, classes] and target [rows]");
  STD_TORCH_CHECK(input.size(1) <= 1 || input.stride(1) == 1,
                  "cross_entropy: expected input with class stride 1, got ", input.stride(1));
  STD_TORCH_CHECK(target.is_contiguous(), "cross_entropy: expected a contiguous target");
  const bool is_int64 = target.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_int64 || target.scalar_type() == ScalarType::Int,
                  "cross_entropy: expected target of int64 or int32, got ",
                  torch::headeronly::toString(target.scalar_type()));
  return {input.const_data_ptr(),
          dtype_of(input, "cross_entropy"),
          input.size(0),
          input.size(1),
          input.stride(0),
          target.const_data_ptr(),
          is_int64,
          ignore_index,
          label_smoothing,
          z_loss,
          reduction_of(reduction)};
}

// The number of tokens that count. pyvizllm/ops turns the error into torch's IndexError.
int64_t count_tokens(const CrossEntropyArguments& a) {
  const TargetCheck check = cpu_kernels().check_targets(a);
  if (check.first_invalid >= 0) {
    const int64_t row = check.first_invalid;
    const int64_t target = a.target_is_int64 ? static_cast<const int64_t*>(a.target)[row]
                                             : static_cast<const int32_t*>(a.target)[row];
    STD_TORCH_CHECK(false, "cross_entropy: target ", target, " at position ", row,
                    " is out of bounds: expected 0 <= target < ", a.classes,
                    " or ignore_index = ", a.ignore_index);
  }
  return check.tokens;
}

Tensor new_loss(const CrossEntropyArguments& a, const Tensor& input) {
  std::vector<int64_t> sizes;
  if (a.reduction == Reduction::kNone) sizes.push_back(a.rows);
  return new_empty(input, sizes, accumulate_type(a.dtype));
}

// Zeros to add to, [metric::kSize], or an empty tensor when metrics are not wanted.
Tensor new_metrics(const Tensor& input, bool wanted) {
  return new_zeros(input, {wanted ? metric::kSize : 0}, ScalarType::Double);
}
double* metrics_pointer(const Tensor& metrics) {
  return metrics.numel() > 0 ? static_cast<double*>(metrics.mutable_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_cpu(
    const Tensor& input, const Tensor& target, int64_t ignore_index, double label_smoothing,
    double z_loss, std::string reduction, bool metrics) {
  const auto a =
      cross_entropy_arguments(input, target, ignore_index, label_smoothing, z_loss, reduction);
  const int64_t tokens = count_tokens(a);
  Tensor loss = new_loss(a, input);
  Tensor row_max = new_empty(input, {a.rows}, accumulate_type(a.dtype));
  Tensor row_sum = new_empty(input, {a.rows}, ScalarType::Double);
  Tensor sums = new_metrics(input, metrics);
  cpu_kernels().cross_entropy_forward(
      a, tokens, loss.mutable_data_ptr(),
      {row_max.mutable_data_ptr(), row_sum.mutable_data_ptr<double>()}, metrics_pointer(sums));
  return {loss, row_max, row_sum, sums};
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_loss,  // [] or [rows] acc, any stride
                                  const Tensor& input, const Tensor& target, const Tensor& row_max,
                                  const Tensor& row_sum, int64_t ignore_index,
                                  double label_smoothing, double z_loss, std::string reduction) {
  const auto a =
      cross_entropy_arguments(input, target, ignore_index, label_smoothing, z_loss, reduction);
  const ScalarType acc = accumulate_type(a.dtype);
  STD_TORCH_CHECK(grad_loss.scalar_type() == acc && row_max.scalar_type() == acc &&
                      row_sum.scalar_type() == ScalarType::Double && row_max.numel() == a.rows &&
                      row_sum.numel() == a.rows,
                  "cross_entropy_backward: expected what cross_entropy_forward returned");
  const int64_t expected = a.reduction == Reduction::kNone ? a.rows : 1;
  STD_TORCH_CHECK(grad_loss.numel() == expected, "cross_entropy_backward: expected grad_loss of ",
                  expected, " elements, got ", grad_loss.numel());
  const int64_t tokens = count_tokens(a);
  Tensor grad = new_gradient(input);
  cpu_kernels().cross_entropy_backward(
      a, tokens, {row_max.data_ptr(), static_cast<double*>(row_sum.data_ptr())},
      grad_loss.const_data_ptr(), grad_loss.dim() > 0 ? grad_loss.stride(0) : 0,
      grad.mutable_data_ptr(), a.classes);
  return grad;
}

std::tuple<Tensor, Tensor> run_fused_cpu(const Tensor& input, const Tensor& target,
                                         int64_t ignore_index, double label_smoothing,
                                         double z_loss, const std::string& reduction, bool metrics,
                                         const Tensor& grad) {
  const auto a =
      cross_entropy_arguments(input, target, ignore_index, label_smoothing, z_loss, reduction);
  const int64_t tokens = count_tokens(a);
  Tensor loss = new_loss(a, input);
  Tensor sums = new_metrics(input, metrics);
  cpu_kernels().cross_entropy_fused(a, tokens, loss.mutable_data_ptr(), grad.mutable_data_ptr(),
                                    grad.stride(0), metrics_pointer(sums));
  return {loss, sums};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fused_cpu(const Tensor& input,
                                                           const Tensor& target,
                                                           int64_t ignore_index,
                                                           double label_smoothing, double z_loss,
                                                           std::string reduction, bool metrics) {
  Tensor grad = new_gradient(input);
  auto [loss, sums] =
      run_fused_cpu(input, target, ignore_index, label_smoothing, z_loss, reduction, metrics, grad);
  return {loss, grad, sums};
}

std::tuple<Tensor, Tensor> cross_entropy_fused_inplace_cpu(const Tensor& input,
                                                           const Tensor& target,
                                                           int64_t ignore_index,
                                                           double label_smoothing, double z_loss,
                                                           std::string reduction, bool metrics) {
  return run_fused_cpu(input, target, ignore_index, label_smoothing, z_loss, reduction, metrics,
                       input);
}

// -- tensor_stats --------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> tensor_stats_cpu(std::vector<Tensor> tensors,
                                                    std::optional<Tensor> histogram) {
  const int64_t count = int64_t(tensors.size());
  STD_TORCH_CHECK(count > 0, "tensor_stats: expected at least one tensor, got an empty list");
  int64_t* histogram_data = nullptr;
  if (histogram.has_value()) {
    STD_TORCH_CHECK(histogram->scalar_type() == ScalarType::Long && histogram->is_contiguous() &&
                        histogram->dim() == 2 && histogram->size(0) == count &&
                        histogram->size(1) == kBins,
                    "tensor_stats: expected histogram to be a contiguous int64 tensor of shape [",
                    count, ", ", kBins, "]");
    histogram_data = static_cast<int64_t*>(histogram->mutable_data_ptr());
  }
  std::vector<TensorSpan> spans;
  spans.reserve(tensors.size());
  for (Tensor& tensor : tensors) {
    if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
    spans.push_back({tensor.const_data_ptr(), dtype_of(tensor, "tensor_stats"), tensor.numel()});
  }
  Tensor values = new_empty(tensors[0], {stat::kValues, count}, ScalarType::Double);
  Tensor counts = new_empty(tensors[0], {stat::kCounts, count}, ScalarType::Long);
  Tensor total_norm = new_empty(tensors[0], {}, ScalarType::Double);
  cpu_kernels().tensor_stats(spans.data(), count, histogram_data,
                             static_cast<double*>(values.mutable_data_ptr()),
                             static_cast<int64_t*>(counts.mutable_data_ptr()),
                             static_cast<double*>(total_norm.mutable_data_ptr()));
  return {values, counts, total_norm};
}

std::string cpu_capability() {
  return cpu_kernels().capability;
}

}  // namespace
}  // namespace pyvizllm

STABLE_TORCH_LIBRARY(pyvizllm, m) {
  // Loss, row maxima [rows], row sums of exp(logit - max) [rows] float64 and packed metrics [51]
  // (or [0]).
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, int ignore_index, float label_smoothing, "
      "float z_loss, str reduction, bool metrics) -> (Tensor, Tensor, Tensor, Tensor)");
  // The gradient of the input, [rows, classes].
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor row_max, "
      "Tensor row_sum, int ignore_index, float label_smoothing, float z_loss, str reduction) "
      "-> Tensor");
  // Loss, gradient of the input for an upstream gradient of 1, and packed metrics.
  m.def(
      "cross_entropy_fused(Tensor input, Tensor target, int ignore_index, float label_smoothing, "
      "float z_loss, str reduction, bool metrics) -> (Tensor, Tensor, Tensor)");
  // The same with the gradient written over the input.
  m.def(
      "cross_entropy_fused_(Tensor(a!) input, Tensor target, int ignore_index, "
      "float label_smoothing, float z_loss, str reduction, bool metrics) -> (Tensor, Tensor)");
  // Float64 statistics [7, T], int64 counts [5, T] and the total norm []; adds to the histogram.
  m.def("tensor_stats(Tensor[] tensors, Tensor(a!)? histogram) -> (Tensor, Tensor, Tensor)");
  // The instruction set of the CPU kernels in use.
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyvizllm, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&pyvizllm::cross_entropy_forward_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&pyvizllm::cross_entropy_backward_cpu));
  m.impl("cross_entropy_fused", TORCH_BOX(&pyvizllm::cross_entropy_fused_cpu));
  m.impl("cross_entropy_fused_", TORCH_BOX(&pyvizllm::cross_entropy_fused_inplace_cpu));
  m.impl("tensor_stats", TORCH_BOX(&pyvizllm::tensor_stats_cpu));
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
