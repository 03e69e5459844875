// The step of AdamW, on one element and on a vector of each array.
//
// note: [arithmetic]
// Float32 inside (float64 for float64 parameters), rounded once where stored. With
// c = sqrt(1 - beta2^t), p - lr * decay * p - lr / (1 - beta1^t) * m / (sqrt(v) / c + eps) is
// formed as p - (lr * decay * p + size * m / (sqrt(v) + eps * c)), whose last subtraction is the
// only one that rounds at the size of p. See also [moments].
#pragma once

#include <cmath>

#include "../kernels.h"
#include "launch.cuh"
#include "tensor_list.cuh"
#include "vec.cuh"

namespace pyvizllm {

// note: [moments]
// beta2 = 0.999 rounded to float32 makes 1 - beta2 wrong by 1e-5, and with it v. So beta is the sum
// of two float32 numbers. Both are positive, so that an infinite moment stays infinite as in torch,
// where x + (1 - beta) * (y - x) would make it NaN.
struct Decay {
  double beta, weight;  // weight: 1 - beta
  float high, low;      // beta: high below it, low the rest
  float float_weight;

  // beta * x + (1 - beta) * y * z. The weight goes first, so that y * z does not overflow alone.
  __device__ __forceinline__ float operator()(float x, float y, float z) const {
    return fma(x, high, fma(x, low, float_weight * y * z));
  }
  __device__ __forceinline__ double operator()(double x, double y, double z) const {
    return fma(x, beta, weight * y * z);
  }
};

inline Decay decay_of(double beta) {
  float high = float(beta);
  if (high >= beta && beta > 0) high = std::nextafter(high, 0.0f);
  return {beta, 1 - beta, high, float(beta - high), float(1 - beta)};
}

struct AdamWStepOptions {
  AdamWOptions options;
  Decay decay1, decay2;
};

// What the elements of one tensor have in common in this step; formed in float64.
template <class A>
struct Constants {
  A gradient;      // times the gradient: clipping, unscaling, and the sign of `maximize`
  A size;          // lr / (1 - beta1^t) * sqrt(1 - beta2^t)
  A eps;           // eps * sqrt(1 - beta2^t)
  A weight_decay;  // lr * weight_decay
};

// Must be reached by the whole block, which then may read the constants in shared memory.
template <class A>
__device__ __forceinline__ void make_constants(const AdamWOptions& o, const float* step,
                                               Constants<A>& constants) {
  __shared__ double power[2];
  __syncthreads();  // all have read the constants of the tensor before
  if (threadIdx.x < 2) {
    power[threadIdx.x] = pow(threadIdx.x == 0 ? o.beta1 : o.beta2, double(*step + 1));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double lr = o.lr;
    if (o.lr_tensor != nullptr) {
      lr = o.lr_dtype == DType::kFloat64 ? *static_cast<const double*>(o.lr_tensor)
                                         : double(*static_cast<const float*>(o.lr_tensor));
    }
    double gradient = o.maximize ? -1 : 1;
    if (o.clip_coefficient != nullptr) gradient *= *o.clip_coefficient;
    if (o.grad_scale != nullptr) gradient /= double(*o.grad_scale);
    const double correction = sqrt(1 - power[1]);
    constants = {A(gradient), A(lr / (1 - power[0]) * correction), A(o.eps * correction),
                 A(lr * o.weight_decay)};
  }
  __syncthreads();
}

// The step of one element.
template <class A>
struct Step {
  Constants<A> constants;
  const AdamWStepOptions& options;

  __device__ __forceinline__ A gradient(A g) const { return g * constants.gradient; }
  __device__ __forceinline__ A first_moment(A m, A g) const { return options.decay1(m, g, A(1)); }
  __device__ __forceinline__ A second_moment(A v, A g) const { return options.decay2(v, g, g); }
  // x: the second moment, or its running maximum.
  __device__ __forceinline__ A parameter(A p, A m, A x) const {
    const A change = constants.size * m / (sqrt(x) + constants.eps);
    // An infinite parameter stays so, as in torch: 0 * Inf and Inf - Inf would be NaN.
    const bool finite = p - p == 0;
    return p - fma(constants.weight_decay, finite ? p : A(0), change);
  }
};

// -- Memory --------------------------------------------------------------------------------------

struct AdamWEntry : TensorEntry {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // or null
  float* master;         // or null
  float* step;
};

// What a thread loads at once: of each array 4 elements, 2 of float64. More would not fit the
// registers where there are master weights.
template <class P, class G, class S>
struct Group {
  static constexpr int kLanes = sizeof(P) == 8 ? 2 : 4;
  template <class T>
  using Lanes = Vector<T, kLanes* int(sizeof(T))>;

  Lanes<P> param;
  Lanes<G> grad;
  Lanes<S> exp_avg, exp_avg_sq, max_exp_avg_sq;
  Vector<float> master;
};

// A part of a tensor.
template <class P, class G, class S>
struct Slice {
  using A = AccumulateType<P>;
  using Group = pyvizllm::Group<P, G, S>;
  static constexpr int kLanes = Group::kLanes;
  // Only 16-bit parameters are rounded copies of others.
  static constexpr bool kMayHaveMaster = sizeof(P) == 2;

  P* param;
  const G* grad;
  S* exp_avg;
  S* exp_avg_sq;
  S* max_exp_avg_sq;  // or null
  float* master;      // or null

  __device__ __forceinline__ Slice(const AdamWEntry& t, int64_t offset)
      : param(static_cast<P*>(t.param) + offset),
        grad(static_cast<const G*>(t.grad) + offset),
        exp_avg(static_cast<S*>(t.exp_avg) + offset),
        exp_avg_sq(static_cast<S*>(t.exp_avg_sq) + offset),
        max_exp_avg_sq(t.max_exp_avg_sq == nullptr ? nullptr
                                                   : static_cast<S*>(t.max_exp_avg_sq) + offset),
        master(t.master == nullptr ? nullptr : t.master + offset) {}

  // The elements before the first address at which all arrays can be read as vectors; `count`, if
  // their alignments differ.
  __device__ __forceinline__ int head(int count) const {
    constexpr int kBytes = kLanes * sizeof(P);
    const int head = int(-reinterpret_cast<uintptr_t>(param) % kBytes / sizeof(P));
    const auto fits = [head](const auto* x) {
      return x == nullptr || reinterpret_cast<uintptr_t>(x + head) % (kLanes * sizeof(*x)) == 0;
    };
    const bool all = fits(param) && fits(grad) && fits(exp_avg) && fits(exp_avg_sq) &&
                     fits(max_exp_avg_sq) && fits(master);
    return all && head < count ? head : count;
  }

  __device__ __forceinline__ Group load(int i) const {
    Group group;
    group.param = group.param.load(param + i);
    group.grad = group.grad.load(grad + i);
    group.exp_avg = group.exp_avg.load(exp_avg + i);
    group.exp_avg_sq = group.exp_avg_sq.load(exp_avg_sq + i);
    if (max_exp_avg_sq != nullptr) {
      group.max_exp_avg_sq = group.max_exp_avg_sq.load(max_exp_avg_sq + i);
    }
    if constexpr (kMayHaveMaster) {
      if (master != nullptr) group.master = group.master.load(master + i);
    }
    return group;
  }

  __device__ __forceinline__ void store(int i, const Group& group) const {
    group.param.store(param + i);
    group.exp_avg.store(exp_avg + i);
    group.exp_avg_sq.store(exp_avg_sq + i);
    if (max_exp_avg_sq != nullptr) group.max_exp_avg_sq.store(max_exp_avg_sq + i);
    if constexpr (kMayHaveMaster) {
      if (master != nullptr) group.master.store(master + i);
    }
  }

  // note: [masters]
  // The weight that a step starts from: the master, unless the parameter is no longer the rounded
  // copy of it. Then somebody has assigned to the parameter, or loaded it.
  __device__ __forceinline__ static A weight_of(A param, float master) {
    const A copy = widen(round_to<P>(A(master)));
    return copy == param ? A(master) : param;
  }

  // Steps a group in registers. change: of the master weights, or else of the parameter as stored;
  // after: the parameter as stored.
  __device__ __forceinline__ void step_group(const Step<A>& step, Group& group, A (&change)[kLanes],
                                             A (&after)[kLanes]) const {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const A g = step.gradient(group.grad.get(i));
      const A m = step.first_moment(group.exp_avg.get(i), g);
      const A v = step.second_moment(group.exp_avg_sq.get(i), g);
      group.exp_avg.set(i, m);
      group.exp_avg_sq.set(i, v);
      A x = v;
      if (max_exp_avg_sq != nullptr) {
        x = group.max_exp_avg_sq.get(i);
        x = x < v ? v : x;
        group.max_exp_avg_sq.set(i, x);
      }
      A before = group.param.get(i);
      if constexpr (kMayHaveMaster) {
        if (master != nullptr) before = weight_of(before, group.master.get(i));
      }
      const A p = step.parameter(before, m, x);
      group.param.set(i, p);
      after[i] = group.param.get(i);
      change[i] = after[i] - before;
      if constexpr (kMayHaveMaster) {
        group.master.set(i, p);
        if (master != nullptr) change[i] = p - before;
      }
    }
  }

  // Steps one element in memory: at the edges, and where arrays have different alignments.
  __device__ __forceinline__ void step_element(const Step<A>& step, int i, A (&change)[1],
                                               A (&after)[1]) const {
    const A g = step.gradient(widen(grad[i]));
    const A m = step.first_moment(widen(exp_avg[i]), g);
    const A v = step.second_moment(widen(exp_avg_sq[i]), g);
    exp_avg[i] = round_to<S>(m);
    exp_avg_sq[i] = round_to<S>(v);
    A x = v;
    if (max_exp_avg_sq != nullptr) {
      x = widen(max_exp_avg_sq[i]);
      x = x < v ? v : x;
      max_exp_avg_sq[i] = round_to<S>(x);
    }
    const bool has_master = kMayHaveMaster && master != nullptr;
    A before = widen(param[i]);
    if (has_master) before = weight_of(before, master[i]);
    const A p = step.parameter(before, m, x);
    if (has_master) master[i] = float(p);
    const P stored = round_to<P>(p);
    param[i] = stored;
    after[0] = widen(stored);
    change[0] = (has_master ? p : after[0]) - before;
  }
};

}  // namespace pyvizllm
