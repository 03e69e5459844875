// CUDA dispatch of the operators that registration.cpp defines.
//
// Compiled into every build that has the CUDA kernels, also under a CPU build of torch, where no
// CUDA tensor ever arrives. Every function has the same neighbours: a device guard, the current
// stream, and memory of torch's allocator, whose blocks are reused in the order of the stream.
#ifdef PYVIZLLM_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "check_adamw.h"
#include "kernels.h"
#include "sketch.h"

// Of libtorch_cuda. Weak, so that the library loads under a torch that has none.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pyvizllm {
namespace {

// The tensor's device is the current one while this lives.
class DeviceStream {
 public:
  explicit DeviceStream(const Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "pyvizllm: expected a torch built with CUDA, got one without");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_) == 0,
                    "pyvizllm: torch has no current CUDA stream on device ", device_);
  }

  void* stream() const { return stream_; }

  void check(const Tensor& tensor, const char* what) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, what,
                    ": expected all tensors on cuda:", device_, ", got one on ",
                    tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index())
                                     : std::string("another device"));
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return new_empty(like, {bytes}, ScalarType::Byte);
}

// [metric::kSize], or an empty tensor when metrics are not wanted.
Tensor new_metrics(const Tensor& input, Wanted wanted) {
  return new_empty(input, {wanted == Wanted::kLoss ? 0 : metric::kSize}, ScalarType::Double);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& input, const Tensor& target, std::optional<Tensor> weight, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, double logit_scale,
    int64_t total_classes, std::string reduction, int64_t wanted) {
  const auto a = cross_entropy_arguments(input, target, weight,
                                         {ignore_index, label_smoothing, z_loss, softcap,
                                          logit_scale, total_classes, std::move(reduction)});
  const DeviceStream device(input);
  device.check(target, "cross_entropy");
  if (weight.has_value()) device.check(*weight, "cross_entropy");
  Tensor loss = new_loss(a, input);
  Tensor row_max = new_empty(input, {a.rows}, accumulate_type(a.dtype));
  Tensor row_sum = new_empty(input, {a.rows}, ScalarType::Double);
  Tensor sums = new_metrics(input, Wanted(wanted));
  Tensor records = new_records(a, input, Wanted(wanted));
  Tensor workspace = new_workspace(input, cross_entropy_workspace_cuda(a));
  cross_entropy_forward_cuda(
      a, loss.mutable_data_ptr(),
      {row_max.mutable_data_ptr(), static_cast<double*>(row_sum.mutable_data_ptr())},
      pointer_or_null(sums), pointer_or_null(records), workspace.mutable_data_ptr(),
      device.stream());
  return {loss, row_max, row_sum, sums, records};
}

Tensor cross_entropy_backward(const Tensor& grad_loss,  // [] or [rows] acc, any stride
                              const Tensor& input, const Tensor& target,
                              std::optional<Tensor> weight, const Tensor& row_max,
                              const Tensor& row_sum, int64_t ignore_index, double label_smoothing,
                              double z_loss, double softcap, double logit_scale,
                              int64_t total_classes, std::string reduction) {
  const auto a = cross_entropy_arguments(input, target, weight,
                                         {ignore_index, label_smoothing, z_loss, softcap,
                                          logit_scale, total_classes, std::move(reduction)});
  check_backward_arguments(a, input, grad_loss, row_max, row_sum);
  const DeviceStream device(input);
  for (const Tensor* tensor : {&grad_loss, &target, &row_max, &row_sum}) {
    device.check(*tensor, "cross_entropy_backward");
  }
  if (weight.has_value()) device.check(*weight, "cross_entropy_backward");
  Tensor grad = new_gradient(input);
  Tensor workspace = new_workspace(input, cross_entropy_workspace_cuda(a));
  cross_entropy_backward_cuda(
      a, {row_max.data_ptr(), static_cast<double*>(row_sum.data_ptr())}, grad_loss.const_data_ptr(),
      grad_loss.dim() > 0 ? grad_loss.stride(0) : 0, grad.mutable_data_ptr(), a.classes,
      workspace.mutable_data_ptr(), device.stream());
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> run_fused(const Tensor& input, const Tensor& target,
                                             const std::optional<Tensor>& weight,
                                             const CrossEntropyOptions& options, Wanted wanted,
                                             const Tensor& grad) {
  const auto a = cross_entropy_arguments(input, target, weight, options);
  const DeviceStream device(input);
  device.check(target, "cross_entropy");
  if (weight.has_value()) device.check(*weight, "cross_entropy");
  Tensor loss = new_loss(a, input);
  Tensor sums = new_metrics(input, wanted);
  Tensor records = new_records(a, input, wanted);
  Tensor workspace = new_workspace(input, cross_entropy_workspace_cuda(a));
  cross_entropy_fused_cuda(a, loss.mutable_data_ptr(), grad.mutable_data_ptr(), grad.stride(0),
                           pointer_or_null(sums), pointer_or_null(records),
                           workspace.mutable_data_ptr(), device.stream());
  return {loss, sums, records};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_fused(
    const Tensor& input, const Tensor& target, std::optional<Tensor> weight, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, double logit_scale,
    int64_t total_classes, std::string reduction, int64_t wanted) {
  Tensor grad = new_gradient(input);
  auto [loss, sums, records] = run_fused(input, target, weight,
                                         {ignore_index, label_smoothing, z_loss, softcap,
                                          logit_scale, total_classes, std::move(reduction)},
                                         Wanted(wanted), grad);
  return {loss, grad, sums, records};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fused_inplace(
    const Tensor& input, const Tensor& target, std::optional<Tensor> weight, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, double logit_scale,
    int64_t total_classes, std::string reduction, int64_t wanted) {
  return run_fused(input, target, weight,
                   {ignore_index, label_smoothing, z_loss, softcap, logit_scale, total_classes,
                    std::move(reduction)},
                   Wanted(wanted), input);
}

std::tuple<Tensor, Tensor, Tensor> tensor_stats(std::vector<Tensor> tensors,
                                                std::optional<Tensor> histogram) {
  int64_t* const histogram_data = histogram_pointer(tensors, histogram, "tensor_stats");
  const DeviceStream device(tensors[0]);
  for (const Tensor& tensor : tensors) device.check(tensor, "tensor_stats");
  if (histogram.has_value()) device.check(*histogram, "tensor_stats");
  const std::vector<TensorSpan> spans = tensor_spans(tensors);
  const int64_t count = int64_t(spans.size());
  Tensor values = new_empty(tensors[0], {stat::kValues, count}, ScalarType::Double);
  Tensor counts = new_empty(tensors[0], {stat::kCounts, count}, ScalarType::Long);
  Tensor total_norm = new_empty(tensors[0], {}, ScalarType::Double);
  Tensor workspace = new_workspace(tensors[0], tensor_stats_workspace_cuda(spans.data(), count));
  tensor_stats_cuda(spans.data(), count, histogram_data,
                    static_cast<double*>(values.mutable_data_ptr()),
                    static_cast<int64_t*>(counts.mutable_data_ptr()),
                    static_cast<double*>(total_norm.mutable_data_ptr()),
                    workspace.mutable_data_ptr(), device.stream());
  return {values, counts, total_norm};
}

void scale(std::vector<Tensor> tensors, const Tensor& coefficient) {
  const DeviceStream device(coefficient);
  for (const Tensor& tensor : tensors) device.check(tensor, "scale_");
  const std::vector<ScaledTensor> scaled = scaled_tensors(tensors, coefficient);
  scale_cuda(scaled.data(), int64_t(scaled.size()),
             static_cast<const double*>(coefficient.const_data_ptr()), device.stream());
}

Tensor sketch(std::vector<Tensor> tensors, std::vector<int64_t> seeds) {
  check_seeds(tensors, seeds);
  const DeviceStream device(tensors[0]);
  for (const Tensor& tensor : tensors) device.check(tensor, "sketch");
  const std::vector<TensorSpan> spans = tensor_spans(tensors, "sketch");
  const int64_t count = int64_t(spans.size());
  Tensor sketches = new_empty(tensors[0], {count, kSketchSize}, ScalarType::Double);
  Tensor workspace = new_workspace(tensors[0], sketch_workspace_cuda(spans.data(), count));
  sketch_cuda(spans.data(), count, seeds.data(), static_cast<double*>(sketches.mutable_data_ptr()),
              workspace.mutable_data_ptr(), device.stream());
  return sketches;
}

void first_nonfinite(std::vector<Tensor> tensors, const Tensor& counts, int64_t row,
                     const Tensor& found) {
  check_found(tensors, counts, row, found);
  const DeviceStream device(found);
  for (const Tensor& tensor : tensors) device.check(tensor, "first_nonfinite_");
  device.check(counts, "first_nonfinite_");
  const std::vector<TensorSpan> spans = tensor_spans(tensors, "first_nonfinite_");
  first_nonfinite_cuda(spans.data(), int64_t(spans.size()),
                       static_cast<const int64_t*>(counts.const_data_ptr()), row,
                       static_cast<int64_t*>(found.mutable_data_ptr()), device.stream());
}

AdamWOutputs adamw(std::vector<Tensor> params, std::vector<Tensor> grads,
                   std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                   std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> masters,
                   std::vector<Tensor> steps, std::optional<Tensor> lr_tensor, double lr,
                   double beta1, double beta2, double eps, double weight_decay, bool maximize,
                   std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                   std::optional<Tensor> clip_coefficient, bool statistics,
                   std::optional<Tensor> update_histogram, std::optional<Tensor> param_histogram) {
  AdamWLists lists{std::move(params),      std::move(grads),           std::move(exp_avgs),
                   std::move(exp_avg_sqs), std::move(max_exp_avg_sqs), std::move(masters),
                   std::move(steps)};
  STD_TORCH_CHECK(!lists.params.empty(),
                  "adamw_: expected at least one parameter, got an empty list");
  const DeviceStream device(lists.params[0]);
  for (const std::vector<Tensor>* list :
       {&lists.params, &lists.grads, &lists.exp_avgs, &lists.exp_avg_sqs, &lists.max_exp_avg_sqs,
        &lists.masters, &lists.steps}) {
    for (const Tensor& tensor : *list) device.check(tensor, "adamw_");
  }
  for (const std::optional<Tensor>* optional :
       {&lr_tensor, &grad_scale, &found_inf, &clip_coefficient, &update_histogram,
        &param_histogram}) {
    if (optional->has_value()) device.check(**optional, "adamw_");
  }
  AdamWTensors tensors(lists);
  const AdamWOptions options = adamw_options(lr_tensor, lr, beta1, beta2, eps, weight_decay,
                                             maximize, grad_scale, found_inf, clip_coefficient);
  AdamWOutputs outputs = new_adamw_outputs(lists.params[0], tensors.size(), statistics);
  const AdamWStatistics collected =
      adamw_statistics(outputs, lists.params, update_histogram, param_histogram);
  const bool collects = statistics || update_histogram.has_value() || param_histogram.has_value();
  Tensor workspace = new_workspace(lists.params[0],
                                   adamw_workspace_cuda(tensors.data(), tensors.size(), collects));
  adamw_cuda(tensors.data(), tensors.size(), options, collected, workspace.mutable_data_ptr(),
             device.stream());
  tensors.finish();
  return outputs;
}

}  // namespace
}  // namespace pyvizllm

STABLE_TORCH_LIBRARY_IMPL(pyvizllm, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&pyvizllm::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&pyvizllm::cross_entropy_backward));
  m.impl("cross_entropy_fused", TORCH_BOX(&pyvizllm::cross_entropy_fused));
  m.impl("cross_entropy_fused_", TORCH_BOX(&pyvizllm::cross_entropy_fused_inplace));
  m.impl("tensor_stats", TORCH_BOX(&pyvizllm::tensor_stats));
  m.impl("scale_", TORCH_BOX(&pyvizllm::scale));
  m.impl("adamw_", TORCH_BOX(&pyvizllm::adamw));
  m.impl("sketch", TORCH_BOX(&pyvizllm::sketch));
  m.impl("first_nonfinite_", TORCH_BOX(&pyvizllm::first_nonfinite));
}
#endif
