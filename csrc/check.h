// From tensors to the arguments of kernels.h: what the registrations of all devices share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bins.h"
#include "kernels.h"

// What an error of torch's C functions was. Of torch 2.13 and newer: null in an older one.
extern "C" [[gnu::weak, gnu::visibility("default")]] const char*
torch_exception_get_what_without_backtrace();

namespace pyvizllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* what) {
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

inline ScalarType accumulate_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline Reduction reduction_of(const std::string& name) {
  if (name == "none") return Reduction::kNone;
  if (name == "mean") return Reduction::kMean;
  STD_TORCH_CHECK(name == "sum", "cross_entropy: expected reduction 'none', 'mean' or 'sum', got '",
                  name, "'");
  return Reduction::kSum;
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

// A contiguous tensor on like's device. Not torch::stable::new_empty, which has the dispatcher look
// for the operator by its name: five of those take longer than the loss of a few hundred rows.
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  const bool failed = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                               code, device_type, device_index, &made) != 0;
  STD_TORCH_CHECK(!failed, "pyvizllm: a tensor could not be made: ",
                  torch_exception_get_what_without_backtrace == nullptr
                      ? "torch has written to stderr why"
                      : torch_exception_get_what_without_backtrace());
  return Tensor(made);
}
inline std::vector<int64_t> gradient_sizes(const Tensor& input) {
  std::vector<int64_t> sizes{input.size(0), input.size(1)};
  if (input.dim() == 3) sizes.push_back(input.size(2));
  return sizes;
}
inline Tensor new_gradient(const Tensor& input) {
  return new_empty(input, gradient_sizes(input), input.scalar_type());
}

// The options of the cross_entropy operators that are numbers and names, in the schemas' order.
struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;
  double logit_scale;
  int64_t total_classes;
  std::string reduction;
};

// The type and shape, for an error.
inline std::string description(const Tensor& tensor) {
  std::string text = torch::headeronly::toString(tensor.scalar_type());
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i == 0 ? " [" : ", ") + std::to_string(tensor.size(i));
  }
  return text + (tensor.dim() == 0 ? " []" : "]");
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, "cross_entropy: expected ", name, " [rows, classes], got ",
                  description(tensor));
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, "cross_entropy: expected ", name,
                  " with class stride 1, got ", tensor.stride(1));
}

// Classes in the middle, [batch, classes, positions]: on the CPU only, and not with every option.
inline void set_positions(const Tensor& input, const Tensor& target,
                          const CrossEntropyOptions& options, CrossEntropyArguments& a) {
  const bool adjacent = input.size(2) <= 1 || input.stride(2) == 1;
  STD_TORCH_CHECK(
      input.is_cpu() && a.classes > 0 && adjacent && target.dim() == 1 && options.softcap == 0 &&
          options.logit_scale == 1 && options.total_classes == 0,
      "cross_entropy: expected input [batch, classes, positions] on the CPU, with a class, "
      "positions next to each other, class indices, and no softcap, logit_scale or "
      "total_classes, got input ",
      description(input), " with position stride ", input.stride(2), ", target ",
      description(target), ", softcap ", options.softcap, ", logit_scale ", options.logit_scale,
      ", total_classes ", options.total_classes);
  a.positions = input.size(2);
  a.rows *= a.positions;
  a.batch_stride = input.stride(0);
  a.class_stride = input.stride(1);
}

inline CrossEntropyArguments cross_entropy_arguments(
    const Tensor& input,                  // [rows, classes], or [batch, classes, positions]
    const Tensor& target,                 // [rows], or probabilities [rows, classes]
    const std::optional<Tensor>& weight,  // [classes]
    const CrossEntropyOptions& options) {
  if (input.dim() != 3) check_matrix(input, "input");
  CrossEntropyArguments a = {};
  a.logits = input.const_data_ptr();
  a.dtype = dtype_of(input, "cross_entropy");
  a.rows = input.size(0);
  a.classes = input.size(1);
  a.row_stride = input.stride(0);
  if (input.dim() == 3) set_positions(input, target, options, a);
  if (target.dim() == 2) {
    check_matrix(target, "target");
    STD_TORCH_CHECK(target.size(0) == a.rows && target.size(1) == a.classes &&
                        target.scalar_type() == input.scalar_type(),
                    "cross_entropy: expected probabilities of input's shape and dtype ",
                    description(input), ", got ", description(target));
    a.probabilities = target.const_data_ptr();
    a.probability_row_stride = target.stride(0);
  } else {
    STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == a.rows && target.is_contiguous(),
                    "cross_entropy: expected a contiguous target [rows] for input [rows, classes] ",
                    description(input), ", got ", description(target));
    a.target_is_int64 = target.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(a.target_is_int64 || target.scalar_type() == ScalarType::Int,
                    "cross_entropy: expected target of int64 or int32, got ",
                    torch::headeronly::toString(target.scalar_type()));
    a.target = target.const_data_ptr();
  }
  // Of no class there are no probabilities, and of an empty slice no logit to read.
  STD_TORCH_CHECK(a.classes > 0 || a.rows == 0 || (target.dim() == 1 && options.total_classes == 0),
                  "cross_entropy: expected at least one class, got input [", a.rows, ", 0]");
  STD_TORCH_CHECK(options.total_classes == 0 || (target.dim() == 1 && !weight.has_value()),
                  "cross_entropy: expected class indices and no class weights of a slice of the "
                  "classes");
  if (weight.has_value()) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == a.classes && weight->is_contiguous() &&
                        weight->scalar_type() == accumulate_type(a.dtype),
                    "cross_entropy: expected a contiguous weight [classes] of float32, or float64 "
                    "for float64 input, got ",
                    description(*weight), " for input ", description(input));
    a.weight = weight->const_data_ptr();
  }
  a.ignore_index = options.ignore_index;
  a.label_smoothing = options.label_smoothing;
  a.z_loss = options.z_loss;
  a.softcap = options.softcap;
  a.logit_scale = options.logit_scale;
  a.total_classes = options.total_classes;
  a.reduction = reduction_of(options.reduction);
  return a;
}

// What of a batch is wanted beside its loss.
enum class Wanted : int64_t { kLoss, kMetrics, kMetricsAndRecords };

inline Tensor new_loss(const CrossEntropyArguments& a, const Tensor& input) {
  std::vector<int64_t> sizes;
  if (a.reduction == Reduction::kNone) sizes.push_back(a.rows);
  return new_empty(input, sizes, accumulate_type(a.dtype));
}

// [row_record::kSize, rows], or an empty tensor when records are not wanted.
inline Tensor new_records(const CrossEntropyArguments& a, const Tensor& input, Wanted wanted) {
  const bool all = wanted == Wanted::kMetricsAndRecords;
  return new_empty(input, {row_record::kSize, all ? a.rows : 0}, ScalarType::Double);
}

inline double* pointer_or_null(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<double*>(tensor.mutable_data_ptr()) : nullptr;
}

inline void check_backward_arguments(const CrossEntropyArguments& a, const Tensor& input,
                                     const Tensor& grad_loss, const Tensor& row_max,
                                     const Tensor& row_sum) {
  const ScalarType acc = accumulate_type(a.dtype);
  STD_TORCH_CHECK(grad_loss.scalar_type() == acc && row_max.scalar_type() == acc &&
                      row_sum.scalar_type() == ScalarType::Double && row_max.numel() == a.rows &&
                      row_sum.numel() == a.rows && row_max.is_contiguous() &&
                      row_sum.is_contiguous(),
                  "cross_entropy_backward: expected what cross_entropy_forward returned for input ",
                  description(input), ", got grad_loss ", description(grad_loss), ", row_max ",
                  description(row_max), ", row_sum ", description(row_sum));
  const int64_t expected = a.reduction == Reduction::kNone ? a.rows : 1;
  STD_TORCH_CHECK(grad_loss.numel() == expected && grad_loss.dim() <= 1,
                  "cross_entropy_backward: expected grad_loss [] or [rows] of ", expected,
                  " elements, got ", grad_loss.dim(), " dimensions and ", grad_loss.numel());
}

// The histogram's counts, or null where none is wanted.
inline int64_t* histogram_pointer(const std::vector<Tensor>& tensors,
                                  const std::optional<Tensor>& histogram, const char* what) {
  const int64_t count = int64_t(tensors.size());
  STD_TORCH_CHECK(count > 0, what, ": expected at least one tensor, got an empty list");
  if (!histogram.has_value()) return nullptr;
  STD_TORCH_CHECK(histogram->scalar_type() == ScalarType::Long && histogram->is_contiguous() &&
                      histogram->dim() == 2 && histogram->size(0) == count &&
                      histogram->size(1) == kBins,
                  what, ": expected histogram to be a contiguous int64 tensor of shape [", count,
                  ", ", kBins, "], got ", description(*histogram));
  return static_cast<int64_t*>(histogram->mutable_data_ptr());
}

// Replaces tensors that are not contiguous by copies; the list must outlive the spans.
inline std::vector<TensorSpan> tensor_spans(std::vector<Tensor>& tensors,
                                            const char* what = "tensor_stats") {
  std::vector<TensorSpan> spans;
  spans.reserve(tensors.size());
  for (Tensor& tensor : tensors) {
    if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
    spans.push_back({tensor.const_data_ptr(), dtype_of(tensor, what), tensor.numel()});
  }
  return spans;
}

inline void check_seeds(const std::vector<Tensor>& tensors, const std::vector<int64_t>& seeds) {
  STD_TORCH_CHECK(!tensors.empty(), "sketch: expected at least one tensor, got an empty list");
  STD_TORCH_CHECK(seeds.size() == tensors.size(), "sketch: expected a seed for each of ",
                  tensors.size(), " tensors, got ", seeds.size());
}

inline void check_found(const std::vector<Tensor>& tensors, const Tensor& counts, int64_t row,
                        const Tensor& found) {
  const int64_t count = int64_t(tensors.size());
  STD_TORCH_CHECK(count > 0, "first_nonfinite_: expected at least one tensor, got an empty list");
  STD_TORCH_CHECK(
      counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.dim() == 2 &&
          counts.size(0) == stat::kCounts && counts.size(1) == count,
      "first_nonfinite_: expected counts to be tensor_stats' of the same ", count, " tensors");
  STD_TORCH_CHECK(found.scalar_type() == ScalarType::Long && found.is_contiguous() &&
                      found.dim() == 1 && found.size(0) == count,
                  "first_nonfinite_: expected found to be a contiguous int64 tensor of shape [",
                  count, "]");
  STD_TORCH_CHECK(row >= 0 && row < int64_t(1) << (62 - kFoundRowShift),
                  "first_nonfinite_: expected row in [0, 2**22), got ", row);
}

inline std::vector<ScaledTensor> scaled_tensors(const std::vector<Tensor>& tensors,
                                                const Tensor& coefficient) {
  STD_TORCH_CHECK(coefficient.scalar_type() == ScalarType::Double && coefficient.numel() == 1,
                  "scale_: expected coefficient to be one float64 number, got ",
                  coefficient.numel(), " of ",
                  torch::headeronly::toString(coefficient.scalar_type()));
  std::vector<ScaledTensor> scaled;
  scaled.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    const DType dtype = dtype_of(tensor, "scale_");
    auto* const data = static_cast<char*>(tensor.mutable_data_ptr());
    if (tensor.is_contiguous()) {
      scaled.push_back({data, dtype, tensor.numel()});
      continue;
    }
    STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) == 1 || tensor.stride(1) == 1) &&
                        tensor.stride(0) >= tensor.size(1),
                    "scale_: expected contiguous tensors, or matrices whose rows are");
    const int64_t row_bytes = tensor.stride(0) * int64_t(tensor.element_size());
    for (int64_t row = 0; row < tensor.size(0); ++row) {
      scaled.push_back({data + row * row_bytes, dtype, tensor.size(1)});
    }
  }
  return scaled;
}

}  // namespace pyvizllm
