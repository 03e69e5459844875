// How a call's rows are shared out among threads, and what is made of the parts.
#pragma once

#include <memory>

#include "../kernels.h"
#include "cross_entropy_loss.h"

namespace pyvizllm::CPU_CAPABILITY {

constexpr int64_t kGroupElements = 32768;
constexpr int64_t kMaxGroups = 1024;

// Calls body(group, first row, last row, scratch) over groups of rows (or of other items) on the
// thread pool. The groups depend on the shape alone.
struct Groups {
  int64_t rows;
  int64_t rows_per_group;
  int64_t count;

  // elements: of a row.
  Groups(int64_t rows, int64_t elements) : rows(rows) {
    if (elements == 0) elements = 1;
    const int64_t by_size = (kGroupElements + elements - 1) / elements;
    const int64_t by_count = (rows + kMaxGroups - 1) / kMaxGroups;
    rows_per_group = by_size > by_count ? by_size : by_count;
    count = (rows + rows_per_group - 1) / rows_per_group;
  }

  // scratch: that many elements of A for each thread.
  template <class A, class Body>
  void run(int64_t scratch, const Body& body) const {
    parallel_queue(count, [&](WorkQueue& queue) {
      const std::unique_ptr<A[]> memory(new A[scratch]);
      for (int64_t group; (group = queue.take()) >= 0;) {
        const int64_t last = (group + 1) * rows_per_group;
        body(group, group * rows_per_group, last < rows ? last : rows, memory.get());
      }
    });
  }
};

// Adds the groups' sums in order and writes the reduced loss.
template <class A>
void reduce_groups(const CrossEntropyArguments& a, double divisor, const GroupSums* groups,
                   int64_t count, void* loss, double* metrics) {
  double total = 0;
  for (int64_t group = 0; group < count; ++group) {
    total += groups[group].loss;
    if (metrics == nullptr) continue;
    for (int i = 0; i < metric::kSize; ++i) metrics[i] += groups[group].metrics[i];
  }
  if (a.reduction == Reduction::kSum) *static_cast<A*>(loss) = A(total);
  if (a.reduction == Reduction::kMean) *static_cast<A*>(loss) = A(total / divisor);
}

}  // namespace pyvizllm::CPU_CAPABILITY
