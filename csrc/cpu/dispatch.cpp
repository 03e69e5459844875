// Chooses the CPU kernels for the machine's best instruction set.
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

#define DECLARE_KERNELS(capability)                                                              \
  namespace capability {                                                                         \
  TargetCheck check_targets(const CrossEntropyArguments&);                                       \
  void cross_entropy_forward(const CrossEntropyArguments&, double, void*, CrossEntropyRowState,  \
                             double*, double*);                                                  \
  void cross_entropy_backward(const CrossEntropyArguments&, double, CrossEntropyRowState,        \
                              const void*, int64_t, void*, int64_t);                             \
  void cross_entropy_fused(const CrossEntropyArguments&, double, void*, void*, int64_t, double*, \
                           double*);                                                             \
  void tensor_stats(const TensorSpan*, int64_t, int64_t*, double*, int64_t*, double*);           \
  void scale(const ScaledTensor*, int64_t, const double*);                                       \
  void adamw(const AdamWTensor*, int64_t, const AdamWOptions&, const AdamWStatistics&);          \
  void sketch(const TensorSpan*, int64_t, const int64_t*, double*);                              \
  void first_nonfinite(const TensorSpan*, int64_t, const int64_t*, int64_t, int64_t*);           \
  const CpuKernels kernels = {#capability,                                                       \
                              check_targets,                                                     \
                              cross_entropy_forward,                                             \
                              cross_entropy_backward,                                            \
                              cross_entropy_fused,                                               \
                              tensor_stats,                                                      \
                              scale,                                                             \
                              adamw,                                                             \
                              sketch,                                                            \
                              first_nonfinite};                                                  \
  }

namespace pyvizllm {

DECLARE_KERNELS(DEFAULT)
#ifdef HAVE_AVX2_CAPABILITY
DECLARE_KERNELS(AVX2)
#endif
#ifdef HAVE_AVX512_CAPABILITY
DECLARE_KERNELS(AVX512)
#endif

namespace {

// Every instruction set that the build uses for a capability is asked for.
#ifdef HAVE_AVX2_CAPABILITY
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}
#endif
#ifdef HAVE_AVX512_CAPABILITY
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const CpuKernels& choose() {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const auto allowed = [wanted](const char* name) {
    return wanted == nullptr || std::strcmp(wanted, name) == 0;
  };
#ifdef HAVE_AVX512_CAPABILITY
  if (has_avx512() && allowed("avx512")) return AVX512::kernels;
#endif
#ifdef HAVE_AVX2_CAPABILITY
  if (has_avx2() && (allowed("avx2") || allowed("avx512"))) return AVX2::kernels;
#endif
  (void)allowed;
  return DEFAULT::kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

}  // namespace pyvizllm
