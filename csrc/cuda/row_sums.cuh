// The sums over a row that softmax cross-entropy needs, and what its gradient is computed from.
//
// Everything is relative to the maximum: distances d = logit - max are exact or round once, and
// e^d <= 1. A thread keeps its own maximum; a tile that raises it scales the sums down once. Within
// a tile float32 is added (float64 for float64 input), between tiles float64.
//
// The exponential is what the arithmetic is spent on. float32 input takes expf (about 8
// instructions). For 16-bit input e^d is 2^(d log2 e) by the special function unit, one
// instruction: relative error 2^-22 and 2|d| 2^-24 from rounding the exponent, which the 2^-9 and
// 2^-12 of rounding the gradient hide, and which put at most 2^-20 into the sum and so, absolutely,
// into the loss and log-sum-exp (terms with large |d| add little to the sum). The maximum is
// subtracted before: folded into a multiply-add, max * log2 e would cost rows around 1e4 three
// digits.
#pragma once

#include <cmath>
#include <limits>

#include "cluster.cuh"
#include "reduce.cuh"
#include "row_tiles.cuh"

namespace pyvizllm {

// What is computed of a row: what the plain loss needs; more, for metrics and label smoothing; or
// that with options decided at run time (row_options.cuh), so that few kernels serve them all.
enum class Variant { kLoss, kMetrics, kOptions };

template <class T>
constexpr bool kIs16Bit = sizeof(T) == 2;

// 2^x, zero where that is below 2^-126.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0 : result;
#endif
}

constexpr float kLog2E = 1.4426950408889634f;

// e^d for d <= 0, of logits of type T.
template <class T, class A = AccumulateType<T>>
__device__ __forceinline__ A exponential(A d) {
  if constexpr (kIs16Bit<T>) {
    return exp2_approximate(d * kLog2E);
  } else if constexpr (sizeof(A) == 8) {
    return exp(d);
  } else {
    return expf(d);
  }
}

template <class A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

// The lower bound of exponents: exp rounds to zero from here on. Keeps d * e^d from being -Inf * 0.
template <class A>
constexpr A kExpMin = sizeof(A) == 8 ? A(-746) : A(-105);

// Where a row is all -Inf so far, distances are taken from 0: (-Inf) - (-Inf) would be NaN.
template <class A>
__device__ __forceinline__ A reference_of(A max) {
  return max == kMinusInfinity<A> ? A(0) : max;
}

// Of a NaN and a number, the number: a NaN never becomes the maximum, it poisons the sums.
__device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}
__device__ __forceinline__ double larger(double a, double b) {
  return fmax(a, b);
}

// The next number below, so that x > below(y) where x >= y. NaN for -Inf, which nothing is below.
__device__ __forceinline__ float below(float x) {
  if (x == 0) return -0x1p-149f;
  const unsigned bits = __float_as_uint(x);
  return __uint_as_float(x > 0 ? bits - 1 : bits + 1);
}
__device__ __forceinline__ double below(double x) {
  if (x == 0) return -0x1p-1074;
  const long long bits = __double_as_longlong(x);
  return __longlong_as_double(x > 0 ? bits - 1 : bits + 1);
}

// Where in a part the target is, and its logit. Of another part, it is before or behind all
// vectors.
template <class T>
struct TargetPlace {
  int vector;
  int lane;
  AccumulateType<T> logit;
};

// Of the two elements in each of two words.
template <class T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
  return result;
#else
  const Vector<T> x = {{a}}, y = {{b}};
  Vector<T> result = {};
  for (int lane = 0; lane < 2; ++lane) result.set(lane, larger(x.get(lane), y.get(lane)));
  return result.words[0];
#endif
}

template <class T, class Tile>
__device__ __forceinline__ AccumulateType<T> largest(const Tile& tile) {
  using A = AccumulateType<T>;
  if constexpr (kIs16Bit<T>) {
    Vector<T> pairs = tile[0];
#pragma unroll Tile::kUnrolledReads
    for (int v = 1; v < tile.count(); ++v) {
      const Vector<T> vector = tile[v];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        pairs.words[w] = larger_pair<T>(pairs.words[w], vector.words[w]);
      }
    }
    pairs.words[0] = larger_pair<T>(pairs.words[0], pairs.words[1]);
    pairs.words[2] = larger_pair<T>(pairs.words[2], pairs.words[3]);
    pairs.words[0] = larger_pair<T>(pairs.words[0], pairs.words[2]);
    // Both may be NaN.
    return larger(kMinusInfinity<A>, larger(pairs.get(0), pairs.get(1)));
  } else {
    A max = kMinusInfinity<A>;
#pragma unroll Tile::kUnrolledReads
    for (int v = 0; v < tile.count(); ++v) {
      const Vector<T> vector = tile[v];
#pragma unroll
      for (int lane = 0; lane < Vector<T>::kLanes; ++lane) max = larger(vector.get(lane), max);
    }
    return max;
  }
}

// Sums over some of a row's elements, relative to their maximum.
template <class T>
struct RowSums {
  using A = AccumulateType<T>;
  static constexpr int kLanes = Vector<T>::kLanes;

  A max;
  A other_max;         // the largest but the target; not with kLoss, as are all but `exp`
  double exp;          // sum of e^d, d = logit - max
  double exp_shifted;  // sum of d e^d, for the entropy
  double shifted;      // sum of logits, for label smoothing; with kOptions, see row_options.cuh
  double expected;     // with kOptions only
  unsigned rank;       // elements that rank before the target: larger, or equal and before it

  static __device__ __forceinline__ RowSums empty() {
    return {kMinusInfinity<A>, kMinusInfinity<A>, 0, 0, 0, 0, 0};
  }

  // Makes the sums relative to another maximum, if that is larger. `factor`: with kOptions, what
  // distances are multiplied by.
  template <Variant kVariant>
  __device__ __forceinline__ void rebase(A other, A factor_of_distances = 1) {
    if (!(other > max)) return;
    A delta = reference_of(max) - reference_of(other);
    if constexpr (kVariant == Variant::kOptions) delta *= factor_of_distances;
    if (exp != 0) {  // else the sums are empty, and 0 * exp(delta) may be 0 * Inf
      const double factor = exponential<T>(delta);
      if constexpr (kVariant != Variant::kLoss) {
        exp_shifted = factor * (exp_shifted + double(delta) * exp);
      }
      exp *= factor;
    }
    max = other;
  }

  // Adds a tile, whose vectors are `span` apart. Lanes that are not valid become -Inf.
  template <Variant kVariant, class Tile>
  __device__ __forceinline__ void add(const Tile& tile, int index, int span,
                                      const TargetPlace<T>& target) {
    constexpr bool kExtras = kVariant != Variant::kLoss;
    tile.fill(kMinusInfinity<A>);
    const A tile_max = largest<T>(tile);
    rebase<kVariant>(tile_max);
    const A reference = reference_of(max);
    const int last = index + (tile.count() - 1) * span;
    const bool around = index <= target.vector && last >= target.vector;
    // Nothing but NaN is above Inf: tiles around the target are counted below.
    const A threshold = around                 ? -kMinusInfinity<A>
                        : last < target.vector ? below(target.logit)
                                               : target.logit;
    A sum = 0, sum_shifted = 0, sum_distance = 0;
#pragma unroll Tile::kUnrolled
    for (int v = 0; v < tile.count(); ++v) {
      const Vector<T> vector = tile[v];
      A part = 0, part_shifted = 0, part_distance = 0;  // short chains, and smaller errors
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const A logit = vector.get(lane);
        const A d = logit - reference;
        const A e = exponential<T>(d);
        part += e;
        if constexpr (!kExtras) continue;
        const bool valid = tile.valid(v) >> lane & 1;
        part_shifted += e * larger(d, kExpMin<A>);
        part_distance += valid ? d : A(0);
        rank += valid && !(logit <= threshold);
      }
      sum += part;
      sum_shifted += part_shifted;
      sum_distance += part_distance;
    }
    exp += double(sum);
    if constexpr (!kExtras) return;
    exp_shifted += double(sum_shifted);
    int count = 0;
#pragma unroll
    for (int v = 0; v < tile.count(); ++v) count += __popc(tile.valid(v));
    shifted += double(sum_distance) + count * double(reference);
    if (!around) {
      other_max = larger(tile_max, other_max);
      return;
    }
#pragma unroll 1
    for (int v = 0; v < tile.count(); ++v) {
      const Vector<T> vector = tile[v];
      A logits[kLanes];
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) logits[lane] = vector.get(lane);
      compare(logits, tile.valid(v), index + v * span, target);
    }
  }

  // Adds vector `vector` to what depends on the target's logit.
  __device__ __forceinline__ void compare(const A (&logits)[kLanes], uint32_t valid, int vector,
                                          const TargetPlace<T>& target) {
    const A before = below(target.logit);
    const int lanes_before = vector < target.vector    ? kLanes
                             : vector == target.vector ? target.lane
                                                       : 0;
    const int target_lane = vector == target.vector ? target.lane : -1;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(valid >> lane & 1) || lane == target_lane) continue;
      rank += !(logits[lane] <= (lane < lanes_before ? before : target.logit));
      other_max = larger(logits[lane], other_max);
    }
  }
};

// The combined sums of 2 * kHalf neighbouring lanes, the same bits in each of them.
template <Variant kVariant, int kHalf, class T>
__device__ __forceinline__ RowSums<T> combine_lanes(RowSums<T> sums, AccumulateType<T> factor) {
  AccumulateType<T> max = sums.max;
#pragma unroll
  for (int mask = kHalf; mask > 0; mask /= 2) max = larger(max, shuffle_xor(max, mask));
  sums.template rebase<kVariant>(max, factor);
#pragma unroll
  for (int mask = kHalf; mask > 0; mask /= 2) {
    sums.exp += shuffle_xor(sums.exp, mask);
    if constexpr (kVariant == Variant::kLoss) continue;
    sums.exp_shifted += shuffle_xor(sums.exp_shifted, mask);
    sums.shifted += shuffle_xor(sums.shifted, mask);
    sums.rank += shuffle_xor(sums.rank, mask);
    sums.other_max = larger(sums.other_max, shuffle_xor(sums.other_max, mask));
    if constexpr (kVariant == Variant::kOptions) {
      sums.expected += shuffle_xor(sums.expected, mask);
    }
  }
  return sums;
}

// Combines the sums of all threads that work on a row: of a warp by shuffles, of a block with one
// barrier, of a cluster with one more barrier of its own. Every thread gets the same bits, in an
// order that is fixed. A row's partial sums lie where those of the row before last lay: all
// threads have passed the barrier of the row between, and so have read them.
template <class T, class Group, Variant kVariant, bool kClusters>
class RowReduction {
 public:
  struct Shared {
    RowSums<T> of_warp[2][Group::kWarps];
    RowSums<T> of_block[2][kClusters ? kMaxCluster : 1];
  };

  // Every thread of the cluster must come here before any reduces.
  explicit __device__ __forceinline__ RowReduction(Shared& shared) : shared_(shared) {
    if constexpr (kClusters) {  // a block must have started to be written into
      cluster_arrive();
      cluster_wait();
    }
  }

  __device__ __forceinline__ RowSums<T> operator()(RowSums<T> sums, AccumulateType<T> factor) {
    sums = combine_lanes<kVariant, kWarpSize / 2>(sums, factor);
    if constexpr (Group::kWarps == 1) {
      __syncwarp();  // the block's barrier too orders what was read before against later writes
      return sums;
    } else {
      parity_ ^= 1;
      const int lane = int(threadIdx.x) % kWarpSize;
      if (lane == 0) shared_.of_warp[parity_][Group::warp()] = sums;
      __syncthreads();
      sums = combine_lanes<kVariant, Group::kWarps / 2>(
          shared_.of_warp[parity_][lane % Group::kWarps], factor);
      if constexpr (kClusters) sums = of_cluster(sums, lane, factor);
      return sums;
    }
  }

 private:
  __device__ __forceinline__ RowSums<T> of_cluster(const RowSums<T>& sums, int lane,
                                                   AccumulateType<T> factor) {
    const unsigned blocks = cluster_size();
    if (blocks == 1) return sums;
    if (threadIdx.x < blocks) {
      *in_block(&shared_.of_block[parity_][cluster_rank()], threadIdx.x) = sums;
    }
    cluster_arrive();
    cluster_wait();
    // Lanes beyond the blocks bring empty sums, which change nothing.
    return combine_lanes<kVariant, kMaxCluster / 2>(
        lane % kMaxCluster < int(blocks) ? shared_.of_block[parity_][lane % kMaxCluster]
                                         : RowSums<T>::empty(),
        factor);
  }

  Shared& shared_;
  int parity_ = 0;
};

}  // namespace pyvizllm
