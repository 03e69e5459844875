// cross_entropy with options (row_options.cuh): softcap, scale, class weights, class probabilities,
// slices of the classes. The same kernels as without, in a variant that decides at run time, and
// in a file of their own, so that both compile at the same time.
//
// Probabilities are read once before the rows, classes * sizeof(T) bytes a row, for their sum,
// which the gradient of every class depends on, and for the most probable class, which ranks and
// metrics are about; then once more with the logits.
#include "cross_entropy_kernels.cuh"

namespace pyvizllm {
namespace {

// What is known of a row of probabilities: sums, and the first of its largest.
template <class A>
struct Probable {
  A largest;
  int64_t index;
  double mass, weighted_mass;
};

struct Combine {
  template <class A>
  __device__ __forceinline__ Probable<A> operator()(const Probable<A>& a,
                                                    const Probable<A>& b) const {
    const bool first = a.largest > b.largest || (a.largest == b.largest && a.index < b.index);
    return {first ? a.largest : b.largest, first ? a.index : b.index, a.mass + b.mass,
            a.weighted_mass + b.weighted_mass};
  }
};

// A warp takes a row: 16 bytes a lane, and no barrier.
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    cross_entropy_probability_kernel(const __grid_constant__ CrossEntropyArguments a,
                                     int64_t* targets,         // [rows]
                                     double* mass,             // [rows]
                                     double* weighted_mass) {  // [rows]
  using A = AccumulateType<T>;
  constexpr int kLanes = Vector<T>::kLanes;
  const auto* const weights = static_cast<const A*>(a.weight);
  const int64_t step = int64_t(gridDim.x) * WarpGroup::kPerBlock;
  int64_t row = int64_t(blockIdx.x) * WarpGroup::kPerBlock + WarpGroup::index();
  for (; row < a.rows; row += step) {
    const T* const q = static_cast<const T*>(a.probabilities) + row * a.probability_row_stride;
    const RowPart<T> part = part_of_row(q, a.classes, 0, 0, 0, kWholeRow);
    Probable<A> found = {kMinusInfinity<A>, 0, 0, 0};
#pragma unroll 2
    for (int v = WarpGroup::thread(); v < part.vectors; v += kWarpSize) {
      const T* const from = part.base + int64_t(v) * kLanes;
      const uint32_t valid = part.valid(v);
      A values[kLanes], w[kLanes];
      load_numbers(from, valid, values);
      A sum = 0, weighted = 0;
      if (weights != nullptr) load_numbers(weights + (from - q), valid, w);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        sum += values[lane];
        weighted += weights != nullptr ? w[lane] * values[lane] : values[lane];
        if (!(valid >> lane & 1) || !(values[lane] > found.largest)) continue;
        found.largest = values[lane];
        found.index = from - q + lane;
      }
      found.mass += double(sum);
      found.weighted_mass += double(weighted);
    }
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      const Probable<A> other = {shuffle_xor(found.largest, mask), shuffle_xor(found.index, mask),
                                 shuffle_xor(found.mass, mask),
                                 shuffle_xor(found.weighted_mass, mask)};
      found = Combine()(found, other);
    }
    if (WarpGroup::thread() != 0) continue;
    targets[row] = found.index;
    mass[row] = found.mass;
    weighted_mass[row] = found.weighted_mass;
  }
}

}  // namespace

void prepare_probabilities(RowCall& call) {
  CrossEntropyArguments& a = call.a;
  double* const memory = call.work->of_probabilities(a.rows);
  auto* const targets = reinterpret_cast<int64_t*>(memory + 2 * a.rows);
  dispatch(a, [&]<class T>(T*) {
    launch("cross_entropy_probability_kernel", cross_entropy_probability_kernel<T>,
           stream_blocks<WarpGroup>(a.rows, kResidentBlocks), call.stream, a, targets, memory,
           memory + a.rows);
  });
  call.prepared.mass = memory;
  call.prepared.weighted_mass = memory + a.rows;
  a.target = targets;
  a.target_is_int64 = true;
  a.ignore_index = -1;  // none
}

int64_t forward_with_options(const RowCall& call, CrossEntropyRowState state) {
  return dispatch(call.a,
                  [&]<class T>(T*) { return launch_forward<Variant::kOptions, T>(call, state); });
}

void backward_with_options(const RowCall& call, CrossEntropyRowState state, const void* grad_loss,
                           int64_t grad_loss_stride) {
  dispatch(call.a, [&]<class T>(T*) {
    launch_backward<Variant::kOptions, T>(call, state, grad_loss, grad_loss_stride);
  });
}

int64_t fused_with_options(const RowCall& call) {
  return dispatch(call.a, [&]<class T>(T*) {
    return launch_fused<Variant::kOptions, Variant::kOptions, T>(call);
  });
}

}  // namespace pyvizllm
