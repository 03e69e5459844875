// Asynchronous copies to shared memory: see cuda_runtime.h beside this file.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  cuda_on_cpu::begin_copy(to, from, bytes);
}
inline void __pipeline_commit() {
  cuda_on_cpu::end_copy_group();
}
inline void __pipeline_wait_prior(size_t later_groups) {
  cuda_on_cpu::wait_for_copies(later_groups);
}
