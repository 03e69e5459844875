// From tensors to the arguments of the AdamW kernels: what the CPU and the CUDA registration share.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "check.h"

namespace pyvizllm {

// The operator's lists, one entry a parameter each; two of them may be empty.
struct AdamWLists {
  std::vector<Tensor> params;
  std::vector<Tensor> grads;
  std::vector<Tensor> exp_avgs;
  std::vector<Tensor> exp_avg_sqs;
  std::vector<Tensor> max_exp_avg_sqs;  // without amsgrad: empty
  std::vector<Tensor> masters;  // or empty; an empty tensor where a parameter has no master weights
  std::vector<Tensor> steps;    // each [] float32
};

using AdamWOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline void check_adamw_length(const std::vector<Tensor>& list, size_t expected, const char* name) {
  STD_TORCH_CHECK(list.size() == expected, "adamw_: expected ", expected, " ", name,
                  ", one a parameter, got ", list.size());
}

// A pointer to the one element of an optional tensor, or null.
inline const void* adamw_scalar(const std::optional<Tensor>& scalar, ScalarType dtype,
                                const char* name) {
  if (!scalar.has_value()) return nullptr;
  STD_TORCH_CHECK(scalar->scalar_type() == dtype && scalar->numel() == 1, "adamw_: expected ", name,
                  " to be one element of ", torch::headeronly::toString(dtype), ", got ",
                  scalar->numel(), " of ", torch::headeronly::toString(scalar->scalar_type()));
  return scalar->const_data_ptr();
}

inline AdamWOptions adamw_options(const std::optional<Tensor>& lr_tensor, double lr, double beta1,
                                  double beta2, double eps, double weight_decay, bool maximize,
                                  const std::optional<Tensor>& grad_scale,
                                  const std::optional<Tensor>& found_inf,
                                  const std::optional<Tensor>& clip_coefficient) {
  const bool wide = lr_tensor.has_value() && lr_tensor->scalar_type() == ScalarType::Double;
  const auto lr_type = wide ? ScalarType::Double : ScalarType::Float;
  return {lr,
          adamw_scalar(lr_tensor, lr_type, "lr_tensor"),
          wide ? DType::kFloat64 : DType::kFloat32,
          beta1,
          beta2,
          eps,
          weight_decay,
          maximize,
          static_cast<const float*>(adamw_scalar(grad_scale, ScalarType::Float, "grad_scale")),
          static_cast<const float*>(adamw_scalar(found_inf, ScalarType::Float, "found_inf")),
          static_cast<const double*>(
              adamw_scalar(clip_coefficient, ScalarType::Double, "clip_coefficient"))};
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Whether the elements of both lie in memory in the same order. Of the same sizes.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  }
  return true;
}

// Whether the elements fill a piece of memory, in any order: a transposed or channels-last tensor.
inline bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// The kernel's view of the lists. What does not lie in memory as its parameter does is copied, and
// copied back by finish().
class AdamWTensors {
 public:
  explicit AdamWTensors(AdamWLists& lists) : lists_(lists) {
    const size_t count = lists.params.size();
    STD_TORCH_CHECK(count > 0, "adamw_: expected at least one parameter, got an empty list");
    check_adamw_length(lists.grads, count, "grads");
    check_adamw_length(lists.exp_avgs, count, "exp_avgs");
    check_adamw_length(lists.exp_avg_sqs, count, "exp_avg_sqs");
    check_adamw_length(lists.steps, count, "steps");
    if (!lists.max_exp_avg_sqs.empty()) {
      check_adamw_length(lists.max_exp_avg_sqs, count, "max_exp_avg_sqs");
    }
    if (!lists.masters.empty()) check_adamw_length(lists.masters, count, "masters");
    check_places(lists.params);
    tensors_.reserve(count);
    for (size_t index = 0; index < count; ++index) tensors_.push_back(tensor(index));
  }

  const AdamWTensor* data() const { return tensors_.data(); }
  int64_t size() const { return int64_t(tensors_.size()); }

  // After the kernel: writes to the tensors that it could not write to.
  void finish() {
    for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
  }

 private:
  // All are stepped at once: two parameters over one memory would be by two threads.
  static void check_places(const std::vector<Tensor>& params) {
    std::vector<const void*> places;
    places.reserve(params.size());
    for (const Tensor& param : params) {
      if (param.numel() > 0) places.push_back(param.const_data_ptr());
    }
    std::sort(places.begin(), places.end());
    STD_TORCH_CHECK(std::adjacent_find(places.begin(), places.end()) == places.end(),
                    "adamw_: expected each parameter in memory of its own, got two that share it");
  }

  AdamWTensor tensor(size_t index) {
    Tensor& param = lists_.params[index];
    Tensor& grad = lists_.grads[index];
    Tensor& exp_avg = lists_.exp_avgs[index];
    Tensor& exp_avg_sq = lists_.exp_avg_sqs[index];
    Tensor* const maximum =
        lists_.max_exp_avg_sqs.empty() ? nullptr : &lists_.max_exp_avg_sqs[index];
    Tensor* master = lists_.masters.empty() ? nullptr : &lists_.masters[index];
    const int64_t numel = param.numel();
    if (master != nullptr && master->numel() == 0) master = nullptr;

    const std::array<Tensor*, 6> all{&param, &grad, &exp_avg, &exp_avg_sq, maximum, master};
    constexpr std::array<const char*, 6> kNames{"param",      "grad",           "exp_avg",
                                                "exp_avg_sq", "max_exp_avg_sq", "master"};
    bool contiguous = true;
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i] == nullptr) continue;
      STD_TORCH_CHECK(all[i]->numel() == numel, "adamw_: expected ", kNames[i], " of ", numel,
                      " elements at position ", index, ", got ", all[i]->numel());
      STD_TORCH_CHECK(same_sizes(*all[i], param), "adamw_: expected ", kNames[i],
                      " of the parameter's shape at position ", index, ", got another");
      contiguous &= all[i]->is_contiguous();
    }
    const AdamWTensor checked = check_dtypes(index, all);
    if (!contiguous) make_contiguous(all);

    AdamWTensor t = checked;
    t.param = param.mutable_data_ptr();
    t.grad = grad.const_data_ptr();
    t.exp_avg = exp_avg.mutable_data_ptr();
    t.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
    t.max_exp_avg_sq = maximum == nullptr ? nullptr : maximum->mutable_data_ptr();
    t.master = master == nullptr ? nullptr : static_cast<float*>(master->mutable_data_ptr());
    return t;
  }

  // The dtypes, the size and the step.
  AdamWTensor check_dtypes(size_t index, const std::array<Tensor*, 6>& all) {
    const auto& [param, grad, exp_avg, exp_avg_sq, maximum, master] = all;
    const DType dtype = dtype_of(*param, "adamw_");
    const bool low_precision = dtype == DType::kFloat16 || dtype == DType::kBFloat16;
    const auto allowed = [&](const Tensor& tensor, const char* name) {
      const DType got = dtype_of(tensor, "adamw_");
      STD_TORCH_CHECK(got == dtype || (low_precision && got == DType::kFloat32),
                      "adamw_: expected ", name, " of the parameter's dtype ",
                      torch::headeronly::toString(param->scalar_type()),
                      low_precision ? " or Float" : "", " at position ", index, ", got ",
                      torch::headeronly::toString(tensor.scalar_type()));
      return got;
    };
    const DType grad_dtype = allowed(*grad, "grad");
    const DType state_dtype = allowed(*exp_avg, "exp_avg");
    STD_TORCH_CHECK(grad_dtype == dtype || state_dtype == grad_dtype,
                    "adamw_: expected exp_avg of Float (moments_dtype=torch.float32) for a grad of "
                    "Float and a parameter of ",
                    torch::headeronly::toString(param->scalar_type()), " at position ", index,
                    ", got ", torch::headeronly::toString(exp_avg->scalar_type()));
    STD_TORCH_CHECK(exp_avg_sq->scalar_type() == exp_avg->scalar_type() &&
                        (maximum == nullptr || maximum->scalar_type() == exp_avg->scalar_type()),
                    "adamw_: expected exp_avg, exp_avg_sq and max_exp_avg_sq of one dtype at ",
                    "position ", index);
    STD_TORCH_CHECK(
        master == nullptr || (low_precision && master->scalar_type() == ScalarType::Float),
        "adamw_: expected masters of Float, of BFloat16 or Half parameters, got ",
        master == nullptr ? "" : torch::headeronly::toString(master->scalar_type()), " of ",
        torch::headeronly::toString(param->scalar_type()), " at position ", index);
    const Tensor& step = lists_.steps[index];
    STD_TORCH_CHECK(step.scalar_type() == ScalarType::Float && step.numel() == 1,
                    "adamw_: expected a step of one Float at position ", index, ", got ",
                    step.numel(), " of ", torch::headeronly::toString(step.scalar_type()));
    AdamWTensor t{};
    t.step = static_cast<float*>(step.mutable_data_ptr());
    t.param_dtype = dtype;
    t.grad_dtype = grad_dtype;
    t.state_dtype = state_dtype;
    t.numel = param->numel();
    return t;
  }

  void make_contiguous(const std::array<Tensor*, 6>& all) {
    const Tensor& param = *all[0];
    if (is_dense(param) && std::all_of(all.begin(), all.end(), [&](const Tensor* tensor) {
          return tensor == nullptr || same_strides(*tensor, param);
        })) {
      return;
    }
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i] == nullptr || all[i]->is_contiguous()) continue;
      const Tensor copy = torch::stable::contiguous(*all[i]);
      if (i != 1) copies_.emplace_back(*all[i], copy);  // gradients are only read
      *all[i] = copy;
    }
  }

  AdamWLists& lists_;
  std::vector<AdamWTensor> tensors_;
  std::vector<std::pair<Tensor, Tensor>> copies_;  // the tensor, its contiguous copy
};

// Statistics of the update and of the parameter, [stat::kValues or kCounts, count], or [.., 0].
inline AdamWOutputs new_adamw_outputs(const Tensor& like, int64_t count, bool wanted) {
  const int64_t columns = wanted ? count : 0;
  const auto values = [&] { return new_empty(like, {stat::kValues, columns}, ScalarType::Double); };
  const auto counts = [&] { return new_empty(like, {stat::kCounts, columns}, ScalarType::Long); };
  return {values(), counts(), values(), counts()};
}

inline AdamWStatistics adamw_statistics(const AdamWOutputs& outputs,
                                        const std::vector<Tensor>& params,
                                        const std::optional<Tensor>& update_histogram,
                                        const std::optional<Tensor>& param_histogram) {
  const auto pointer = [](const Tensor& t) {
    return t.numel() > 0 ? t.mutable_data_ptr() : nullptr;
  };
  const auto& [update_values, update_counts, param_values, param_counts] = outputs;
  return {static_cast<double*>(pointer(update_values)),
          static_cast<int64_t*>(pointer(update_counts)),
          histogram_pointer(params, update_histogram, "adamw_"),
          static_cast<double*>(pointer(param_values)),
          static_cast<int64_t*>(pointer(param_counts)),
          histogram_pointer(params, param_histogram, "adamw_")};
}

}  // namespace pyvizllm
