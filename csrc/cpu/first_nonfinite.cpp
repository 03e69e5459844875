// Where the first NaN or Inf of each tensor of a list is, for those that tensor_stats has found to
// have one.
//
// Reads nothing of the tensors whose counts are zero, which is all of them in a healthy training.
#include "statistics.h"

namespace pyvizllm::CPU_CAPABILITY {
namespace {

template <class T>
int64_t find(const T* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto value = load_one(x + i);
    if (value - value != 0) return i;  // NaN - NaN and Inf - Inf are NaN
  }
  return -1;
}

int64_t find(const TensorSpan& tensor) {
  switch (tensor.dtype) {
    case DType::kFloat32:
      return find(static_cast<const float*>(tensor.data), tensor.numel);
    case DType::kFloat64:
      return find(static_cast<const double*>(tensor.data), tensor.numel);
    case DType::kFloat16:
      return find(static_cast<const Float16*>(tensor.data), tensor.numel);
    case DType::kBFloat16:
      return find(static_cast<const BFloat16*>(tensor.data), tensor.numel);
  }
  __builtin_unreachable();  // registration.cpp throws for every other dtype
}

}  // namespace

void first_nonfinite(const TensorSpan* tensors, int64_t count, const int64_t* counts, int64_t row,
                     int64_t* found) {
  for (int64_t t = 0; t < count; ++t) {
    const auto of = [&](int what) { return counts[what * count + t]; };
    if (found[t] >= 0 || of(stat::kNans) + of(stat::kPosInfs) + of(stat::kNegInfs) == 0) continue;
    const int64_t index = find(tensors[t]);
    if (index >= 0) found[t] = row << kFoundRowShift | index;
  }
}

}  // namespace pyvizllm::CPU_CAPABILITY
