// Rows with options: scaled and capped logits, class weights, class probabilities as targets, a
// slice of the classes. What row_sums.cuh and row_gradient.cuh do without, decided at run time.
//
// z is a logit after scale and cap. A row's target is a distribution q' over the classes, which
// need not add up to 1: of probabilities q' = w ((1 - s) q + s / C), of an index t
// q' = w ((1 - s) [c = t] + s / C), with class weights w and label smoothing s. The loss is
// sum q' (log-sum-exp - z), its gradient p sum q' - q'. Where q' is 0 the term is 0, also where z
// is -Inf. Beside the logits a row's probabilities are read, and the weights, which caches hold.
#pragma once

#include <cmath>

#include "../kernels.h"
#include "row_gradient.cuh"
#include "row_results.cuh"

namespace pyvizllm {

constexpr int kCountBlocks = 32;  // of the kernels that count before the rows are read

// What was computed before the rows (cross_entropy_options.cu); null where there is none.
struct Prepared {
  const double* weight_parts;   // [kCountBlocks]: sums of the class weights
  const double* mass;           // [rows]: sums of the probabilities
  const double* weighted_mass;  // [rows]: of weight * probability
  double uniform;               // what label smoothing gives to each class
  bool ranks;                   // whether metrics or records are wanted
  bool linear;                  // whether `shifted` of the sums is: for the loss or the records
};

__device__ __forceinline__ float product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double product(double a, double b) {
  return __dmul_rn(a, b);
}
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  return tanhf(x);
}
__device__ __forceinline__ double hyperbolic_tangent(double x) {
  return tanh(x);
}

__device__ __forceinline__ float quotient(float a, float b) {
  return __fdividef(a, b);
}
__device__ __forceinline__ double quotient(double a, double b) {
  return a / b;
}

// What becomes of a logit x. Its order is that of raw(x), which is exact, whatever its z is rounded
// to: ranks are counted there. Distances of z are factor * (key - key'): with a scale alone the
// difference is taken before the product, so that rows around 1e4 lose no digits.
template <class A>
struct Transform {
  A sign, factor, rate, cap, scale;
  bool caps;

  explicit Transform(const CrossEntropyArguments& a)
      : sign(A((a.logit_scale > 0) - (a.logit_scale < 0))),
        factor(A(a.softcap != 0 || a.logit_scale == 0 ? 1 : std::fabs(a.logit_scale))),
        rate(A(a.softcap != 0 ? std::fabs(a.logit_scale) / a.softcap : 0)),
        cap(A(a.softcap)),
        scale(A(a.logit_scale)),
        caps(a.softcap != 0) {}

  __device__ __forceinline__ A raw(A logit) const { return logit * sign; }
  // Products are rounded and not fused into what follows: the largest is at a distance of 0.
  __device__ __forceinline__ A key(A raw) const {
    return caps ? product(cap, hyperbolic_tangent(product(raw, rate))) : raw;
  }
  __device__ __forceinline__ double z(A raw) const { return double(factor) * double(key(raw)); }
  // dz/dlogit. 1 - tanh^2 would lose its digits where the cap is near: from e = exp(-2|y|), it is
  // 4 e / (1 + e)^2.
  __device__ __forceinline__ A slope(A raw) const {
    if (!caps) return scale;
    const A e = exponential<A>(A(-2) * fabs(product(raw, rate)));
    const A inverse = quotient(A(1), 1 + e);
    return scale * (4 * e * inverse * inverse);
  }
};

// What distances are taken from: distance(key) = factor * (key - this key) + correction.
template <class A>
struct Maximum {
  A key;
  A correction;  // a maximum that is known as z need not be that of any key
  double z;
};

// kLanes numbers that begin at any multiple of their size, as A; of the lanes that are not valid,
// none is read.
template <int kLanes, class U, class A>
__device__ __forceinline__ void load_numbers(const U* x, uint32_t valid, A (&numbers)[kLanes]) {
  constexpr int kPerVector = Vector<U>::kLanes, kVectors = kLanes / kPerVector;
  static_assert(kLanes % kPerVector == 0);
  if (valid == (1u << kLanes) - 1 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Vector<U> vector = Vector<U>::load(x + v * kPerVector);
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) numbers[v * kPerVector + i] = vector.get(i);
    }
    return;
  }
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    numbers[lane] = valid >> lane & 1 ? A(widen(x[lane])) : A(0);
  }
}

// The sum of a number of each block.
__device__ __forceinline__ double sum_of_blocks(const double* parts) {  // [kCountBlocks]
  double sum = 0;
  for (int i = int(threadIdx.x) % kWarpSize; i < kCountBlocks; i += kWarpSize) sum += parts[i];
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// 0 where the factor is, also times Inf. A NaN stays.
__device__ __forceinline__ double term(double factor, double value) {
  return factor == 0 && value == value ? 0 : factor * value;
}
// Of float32 terms a NaN may go: the row's exponentials have it too.
__device__ __forceinline__ float term(float factor, float value) {
  return factor == 0 ? 0 : factor * value;
}

// What does not depend on the row. Little of it is in registers: kernel parameters are read where
// they are used, and the sum of the weights is in shared memory.
template <class T>
class Options {
 public:
  using A = AccumulateType<T>;
  struct Constants {  // a kernel parameter
    Prepared prepared;
    Transform<A> transform;

    Constants(const CrossEntropyArguments& a, const Prepared& prepared)
        : prepared(prepared), transform(a) {}
  };
  using Shared = double;

  // What a row's target says, whatever its kind.
  struct Target {
    bool here;         // not another rank's
    double weight;     // what the mean divides by, and z-loss is multiplied by
    double at_target;  // q' of the target
    double total;      // sum of q' over all classes
    double mass;       // sum of the factors of `shifted`
  };

  // To be called by the whole block.
  __device__ __forceinline__ Options(const CrossEntropyArguments& a, const Constants& constants,
                                     Shared& weights)
      : transform(constants.transform), a_(a), prepared_(constants.prepared), weights_(weights) {
    const double sum =
        a.weight != nullptr ? sum_of_blocks(prepared_.weight_parts) : double(a.classes);
    if (threadIdx.x == 0) weights = sum;
    __syncthreads();
  }

  __device__ __forceinline__ bool is_here(int64_t target) const {
    return target >= 0 && target < a_.classes;
  }
  __device__ __forceinline__ Maximum<A> of_sums(A max) const {
    return {max, 0, double(transform.factor) * double(max)};
  }
  __device__ __forceinline__ Maximum<A> of_state(A max) const {
    if (transform.caps) return {max, 0, double(max)};
    const A key = max / transform.factor;
    // One rounding: what the quotient has lost.
    const double correction = fma(double(transform.factor), double(key), -double(max));
    return {key, A(correction), double(max)};
  }
  __device__ __forceinline__ double distance(A key, const Maximum<A>& maximum) const {
    return double(transform.factor) * (double(key) - double(maximum.key)) +
           double(maximum.correction);
  }
  // Relative to a maximum that is rounded, as the backward gets it.
  __device__ __forceinline__ double sum_of_state(const RowSums<T>& sums, A max) const {
    if (sums.exp == 0) return 0;  // all of the row is -Inf: there is no distance
    const double rounding = distance(sums.max, of_state(max));
    return rounding == 0 ? sums.exp : sums.exp * exp(rounding);
  }
  // What the linear terms take keys' distances from; `raw` is that of the target, or of the first
  // logit where the target is another rank's.
  __device__ __forceinline__ A reference(A raw) const {
    const A key = transform.key(raw);
    return fabs(key) < -kMinusInfinity<A> ? key : A(0);
  }
  __device__ __forceinline__ const A* weight() const { return static_cast<const A*>(a_.weight); }
  __device__ __forceinline__ const T* probabilities(int64_t row) const {
    return static_cast<const T*>(a_.probabilities) + row * a_.probability_row_stride;
  }
  __device__ __forceinline__ bool has_probabilities() const { return a_.probabilities != nullptr; }
  __device__ __forceinline__ bool ranks() const { return prepared_.ranks; }
  __device__ __forceinline__ bool linear() const { return prepared_.linear; }
  __device__ __forceinline__ double uniform() const { return prepared_.uniform; }
  __device__ __forceinline__ double kept() const { return 1 - a_.label_smoothing; }

  __device__ __forceinline__ Target target(int64_t row, int64_t target) const {
    Target result = {};
    result.here = is_here(target);
    const double weight = a_.weight != nullptr && result.here ? double(this->weight()[target]) : 1;
    // Of all ranks together, where there are some: they have no class weights.
    const double all = a_.total_classes != 0 ? double(a_.total_classes) : weights_;
    // A class that is never met may have an infinite weight.
    const double smoothed = term(uniform(), all);
    if (has_probabilities()) {
      const double q = double(widen(probabilities(row)[target]));
      result.weight = 1;
      result.at_target = weight * (kept() * q + uniform());
      result.total = kept() * prepared_.weighted_mass[row] + smoothed;
      result.mass = result.total;
    } else {
      result.weight = weight;
      result.at_target = weight * (kept() + uniform());
      result.total = term(kept(), weight) + smoothed;
      result.mass = weights_;
    }
    return result;
  }
  // The sum of the probabilities.
  __device__ __forceinline__ double mass(int64_t row) const { return prepared_.mass[row]; }

  // 2 z (log-sum-exp) of a row: d(z-loss)/d(logit) is that times p.
  __device__ __forceinline__ double z_factor(const Target& target, double max,
                                             double sum_exp) const {
    return target.weight * z_factor_of(a_, max, sum_exp);
  }

  const Transform<A>& transform;

 private:
  const CrossEntropyArguments& a_;
  const Prepared& prepared_;
  const Shared& weights_;  // the sum over the classes that are here
};

// What each class of a row is multiplied by: w (kept * q + uniform()).
template <class T>
struct ClassFactors {
  using A = AccumulateType<T>;
  static constexpr int kLanes = Vector<T>::kLanes;

  // Of the part's first vector; null where there are none.
  const A* weight;
  const T* probabilities;
  A kept, uniform;

  __device__ __forceinline__ ClassFactors(const Options<T>& options, const RowPart<T>& part,
                                          const T* logits, int64_t row, double kept, double uniform)
      : weight(options.weight() == nullptr ? nullptr : part.counterpart(options.weight(), logits)),
        probabilities(options.has_probabilities()
                          ? part.counterpart(options.probabilities(row), logits)
                          : nullptr),
        kept(A(kept)),
        uniform(A(uniform)) {}

  // Of one vector: the factors, and q itself.
  __device__ __forceinline__ void load(int vector, uint32_t valid, A (&factors)[kLanes],
                                       A (&q)[kLanes]) const {
    const int64_t offset = int64_t(vector) * kLanes;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) q[lane] = 0, factors[lane] = uniform;
    if (probabilities != nullptr) {
      load_numbers(probabilities + offset, valid, q);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) factors[lane] = kept * q[lane] + uniform;
    }
    if (weight != nullptr) {
      A w[kLanes];
      load_numbers(weight + offset, valid, w);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) factors[lane] *= w[lane];
    }
  }
};

// Adds tiles to a row's sums, whose `max` is a key and `other_max` raw. `shifted` becomes the sum
// of factor * (key - reference), where the factor is w for an index and q' for probabilities, and
// `expected` that of q * (key - reference): the target is known before the row is read, the maximum
// is not.
template <class T>
struct OptionSums {
  using A = AccumulateType<T>;
  static constexpr int kLanes = Vector<T>::kLanes;

  const Options<T>& options;
  ClassFactors<T> factors;
  TargetPlace<T> target;  // its logit raw
  A reference;

  template <class Tile>
  __device__ __forceinline__ void add(RowSums<T>& sums, const Tile& tile, int index,
                                      int span) const {
    const Transform<A>& transform = options.transform;
    A exp = 0, exp_shifted = 0, shifted = 0, expected = 0;
#pragma unroll 1
    for (int v = 0; v < tile.count(); ++v) {
      const int vector = index + v * span;
      const uint32_t lanes = tile.valid(v);
      if (lanes == 0) break;
      const Vector<T> logits = tile[v];
      A raw[kLanes], key[kLanes];
      A largest = kMinusInfinity<A>;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool valid = lanes >> lane & 1;
        raw[lane] = valid ? transform.raw(logits.get(lane)) : kMinusInfinity<A>;
        key[lane] = valid ? transform.key(raw[lane]) : kMinusInfinity<A>;
        largest = larger(key[lane], largest);
      }
      if (options.ranks()) add_ranks(sums, raw, lanes, vector);
      if (largest > sums.max) {
        sums.exp += double(exp);
        sums.exp_shifted += double(exp_shifted);
        exp = exp_shifted = 0;
        sums.template rebase<Variant::kOptions>(largest, transform.factor);
      }
      const A maximum = reference_of(sums.max);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const A d = transform.factor * (key[lane] - maximum);
        const A e = exponential<T>(d);
        exp += e;
        exp_shifted += e * larger(d, kExpMin<A>);
      }
      if (options.linear()) add_linear(key, lanes, vector, shifted, expected);
    }
    sums.exp += double(exp);
    sums.exp_shifted += double(exp_shifted);
    sums.shifted += double(shifted);
    sums.expected += double(expected);
  }

 private:
  __device__ __forceinline__ void add_ranks(RowSums<T>& sums, const A (&raw)[kLanes],
                                            uint32_t valid, int vector) const {
    if (vector == target.vector) {
      sums.compare(raw, valid, vector, target);
      return;
    }
    const A threshold = vector < target.vector ? below(target.logit) : target.logit;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.rank += valid >> lane & 1 && !(raw[lane] <= threshold);
      sums.other_max = larger(raw[lane], sums.other_max);
    }
  }
  __device__ __forceinline__ void add_linear(const A (&key)[kLanes], uint32_t valid, int vector,
                                             A& shifted, A& expected) const {
    A factor[kLanes], q[kLanes];
    factors.load(vector, valid, factor, q);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const A d = valid >> lane & 1 ? key[lane] - reference : A(0);
      shifted += term(factor[lane], d);
      expected += term(q[lane], d);
    }
  }
};

}  // namespace pyvizllm
