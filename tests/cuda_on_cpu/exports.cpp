// The kernels' host functions for ctypes. Each returns null, or the message of what was thrown.
#include <stdexcept>
#include <string>

#include "../../csrc/cuda/cross_entropy_plan.h"
#include "../../csrc/kernels.h"

using namespace pyvizllm;

namespace {

template <class Body>
const char* message_of(const Body& body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

int64_t arguments_size() {
  return sizeof(CrossEntropyArguments);
}
int64_t cross_entropy_workspace(const CrossEntropyArguments* a) {
  return cross_entropy_workspace_cuda(*a);
}
int64_t tensor_stats_workspace(const TensorSpan* tensors, int64_t count) {
  return tensor_stats_workspace_cuda(tensors, count);
}
int64_t sketch_workspace(const TensorSpan* tensors, int64_t count) {
  return sketch_workspace_cuda(tensors, count);
}
int64_t adamw_workspace(const AdamWTensor* tensors, int64_t count, bool statistics) {
  return adamw_workspace_cuda(tensors, count, statistics);
}

// plan: path, cluster, part_vectors, tiles, shared_bytes.
void fused_plan(int64_t classes, int64_t element_size, int64_t aligned, int64_t shared_bytes,
                int64_t largest_cluster, int64_t* plan) {
  const FusedPlan chosen =
      plan_fused({classes, int(element_size), aligned != 0}, {256, 8, 4, 8 * 1024},
                 {1, shared_bytes, int(largest_cluster)});
  plan[0] = int64_t(chosen.path);
  plan[1] = chosen.cluster;
  plan[2] = chosen.part_vectors;
  plan[3] = chosen.tiles;
  plan[4] = chosen.shared_bytes;
}

const char* cross_entropy_forward(const CrossEntropyArguments* a, void* loss, void* row_max,
                                  double* row_sum, double* metrics, double* records,
                                  void* workspace) {
  return message_of([&] {
    cross_entropy_forward_cuda(*a, loss, {row_max, row_sum}, metrics, records, workspace, nullptr);
  });
}

const char* cross_entropy_backward(const CrossEntropyArguments* a, void* row_max, double* row_sum,
                                   const void* grad_loss, int64_t grad_loss_stride, void* grad,
                                   int64_t grad_row_stride, void* workspace) {
  return message_of([&] {
    cross_entropy_backward_cuda(*a, {row_max, row_sum}, grad_loss, grad_loss_stride, grad,
                                grad_row_stride, workspace, nullptr);
  });
}

const char* cross_entropy_fused(const CrossEntropyArguments* a, void* loss, void* grad,
                                int64_t grad_row_stride, double* metrics, double* records,
                                void* workspace) {
  return message_of([&] {
    cross_entropy_fused_cuda(*a, loss, grad, grad_row_stride, metrics, records, workspace, nullptr);
  });
}

const char* tensor_stats(const TensorSpan* tensors, int64_t count, int64_t* histogram,
                         double* values, int64_t* counts, double* total_norm, void* workspace) {
  return message_of([&] {
    tensor_stats_cuda(tensors, count, histogram, values, counts, total_norm, workspace, nullptr);
  });
}

const char* scale(const ScaledTensor* tensors, int64_t count, const double* coefficient) {
  return message_of([&] { scale_cuda(tensors, count, coefficient, nullptr); });
}

const char* sketch(const TensorSpan* tensors, int64_t count, const int64_t* seeds, double* sketches,
                   void* workspace) {
  return message_of([&] { sketch_cuda(tensors, count, seeds, sketches, workspace, nullptr); });
}

const char* first_nonfinite(const TensorSpan* tensors, int64_t count, const int64_t* counts,
                            int64_t row, int64_t* found) {
  return message_of([&] { first_nonfinite_cuda(tensors, count, counts, row, found, nullptr); });
}

const char* adamw(const AdamWTensor* tensors, int64_t count, const AdamWOptions* options,
                  const AdamWStatistics* statistics, void* workspace) {
  return message_of([&] { adamw_cuda(tensors, count, *options, *statistics, workspace, nullptr); });
}
}
