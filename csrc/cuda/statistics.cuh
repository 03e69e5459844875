// Statistics and histogram counts of values that a kernel holds in registers.
//
// A block handles one chunk of a list (tensor_list.cuh) at a time. Its threads add what they
// hold to a Statistics each, and count bins in shared memory. Per chunk the block writes a Partial
// (64 bytes), and a second kernel adds the partials of each tensor in an order that depends on the
// sizes alone: the same bits from run to run and on any GPU. Counts are integers, so that their
// atomics need no order.
#pragma once

#include <cmath>
#include <limits>

#include "../bins.h"
#include "../kernels.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "tensor_list.cuh"

namespace pyvizllm {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct alignas(16) Partial {
  double sum, sum_squares, abs_sum, min, max;
  unsigned zeros, nans, pos_infs, neg_infs;
  int64_t numel;
};

// The lesser and the greater; a NaN on the right is passed over, and none is on the left.
__device__ __forceinline__ float lesser(float a, float b) {
  return fminf(a, b);
}
__device__ __forceinline__ float greater(float a, float b) {
  return fmaxf(a, b);
}
// The library's fmin of float64 is ten instructions, most of them for a NaN on the left.
__device__ __forceinline__ double lesser(double a, double b) {
  return b < a ? b : a;
}
__device__ __forceinline__ double greater(double a, double b) {
  return b > a ? b : a;
}

// -- A thread's part of a chunk ------------------------------------------------------------------

template <class A>  // float or double
struct Statistics {
  double sum = 0;
  double sum_squares = 0;
  double abs_sum = 0;
  A min = A(kInfinity);
  A max = -A(kInfinity);
  uint64_t counts = 0;  // 16 bits each: zeros, NaNs, +Infs, -Infs

  // Adds value(i) for the i < kCount whose bit is set in `valid`.
  //
  // The sums of one call are float32, so kCount should be small. Where there is a NaN or an Inf, or
  // squares leave the range of float32, the values are added once more in float64, one by one.
  template <int kCount, class Value>
  __device__ __forceinline__ void add(uint32_t valid, const Value& value) {
    A tile_sum = 0, squares = 0, absolute = 0, low = A(kInfinity), high = -A(kInfinity);
    unsigned zeros = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!(valid >> i & 1)) continue;
      const A v = value(i);
      tile_sum += v;
      squares = fma(v, v, squares);
      absolute += fabs(v);
      low = lesser(low, v);  // passes over NaNs
      high = greater(high, v);
      zeros += v == 0;
    }
    min = lesser(min, low);
    max = greater(max, high);
    counts += zeros;
    const A abs_max = greater(-low, high);
    // The square of the largest must be well above the subnormal numbers, and the sums finite.
    const bool safe = std::is_same_v<A, double> ||
                      (abs_max < A(0x1p58) && (abs_max > A(0x1p-60) || absolute == 0));
    if (safe && absolute < A(kInfinity)) {
      sum += double(tile_sum);
      sum_squares += double(squares);
      abs_sum += double(absolute);
    } else {
      add_exactly<kCount>(valid, value);
    }
  }

 private:
  template <int kCount, class Value>
  __device__ __forceinline__ void add_exactly(uint32_t valid, const Value& value) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!(valid >> i & 1)) continue;
      const double v = double(value(i));
      sum += v;
      sum_squares += v * v;
      abs_sum += fabs(v);
    }
    unsigned nans = 0, infs = 0;  // the latter 16 bits each
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!(valid >> i & 1)) continue;
      const A v = value(i);
      nans += v != v;
      infs += v == A(kInfinity) ? 1u : v == -A(kInfinity) ? 0x10000u : 0u;
    }
    counts += uint64_t(infs) << 32 | nans << 16;
  }
};

// -- Counting ------------------------------------------------------------------------------------

// A block's counters of one tensor, in shared memory.
//
// The result of the atomic is not used, so that it becomes ATOMS.POPC.INC: lanes of a warp that
// count the same bin (a constant, or an embedding's zeros) are added up by the hardware and do not
// wait for each other. What remains are bank conflicts: 2.5 passes for normal, 3.4 for heavy-tailed
// values.
struct alignas(16) Counters {
  unsigned bins[kBins];

  __device__ __forceinline__ void count(double value) { count(float(value)); }
  __device__ __forceinline__ void count(float value) {
    atomicAdd(&bins[bin_of_bits(__float_as_uint(value))], 1u);
  }

  // Every thread of the block must call it, and wait at a barrier before the first count.
  __device__ __forceinline__ void clear() {
    for (int i = int(threadIdx.x) * 4; i < kBins; i += kThreads * 4) {
      *reinterpret_cast<uint4*>(bins + i) = make_uint4(0, 0, 0, 0);
    }
  }

  // Adds the counts to a row of the histogram and clears them. Every thread of the block must call
  // it between two barriers: after all have counted, and before one counts again.
  __device__ __forceinline__ void flush(int64_t* row) {  // [kBins]
#pragma unroll
    for (int i = int(threadIdx.x) * 4; i < kBins; i += kThreads * 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(bins + i);
      if ((four.x | four.y | four.z | four.w) == 0) continue;
      *reinterpret_cast<uint4*>(bins + i) = make_uint4(0, 0, 0, 0);
      const unsigned counts[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (counts[j] == 0) continue;
        atomicAdd(reinterpret_cast<unsigned long long*>(row + i + j),
                  (unsigned long long)counts[j]);
      }
    }
  }
};

// A 32-bit counter cannot overflow while no more than this is counted between two flushes.
constexpr unsigned kMaxPending = 1u << 31;

// -- A block's part ------------------------------------------------------------------------------

struct Sums {
  double sum, sum_squares, abs_sum, min, max;
  uint64_t counts;
};

__device__ __forceinline__ Sums add(const Sums& a, const Sums& b) {
  return {a.sum + b.sum,        a.sum_squares + b.sum_squares, a.abs_sum + b.abs_sum,
          lesser(a.min, b.min), greater(a.max, b.max),         a.counts + b.counts};
}

// Adds what the threads of a block hold of a chunk of `numel` elements, and writes it.
// Must be reached by the whole block. Costs one barrier: `call` numbers the calls of a kernel, and
// neighbours use different halves of the shared memory, so that no fast warp overwrites what the
// first still reads.
template <class A>
__device__ __forceinline__ void write_partial(const Statistics<A>& of_thread, int64_t numel,
                                              unsigned call, Partial* partial) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ Sums of_warp[2][kWarps];
  Sums sums = {of_thread.sum,         of_thread.sum_squares, of_thread.abs_sum,
               double(of_thread.min), double(of_thread.max), of_thread.counts};
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    sums = add(sums, shuffle_xor(sums, mask));
  }
  const int lane = int(threadIdx.x) % kWarpSize;
  if (lane == 0) of_warp[call % 2][threadIdx.x / kWarpSize] = sums;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  sums = of_warp[call % 2][lane % kWarps];
#pragma unroll
  for (int mask = kWarps / 2; mask > 0; mask /= 2) {
    sums = add(sums, shuffle_xor(sums, mask));
  }
  if (lane == 0) {
    *partial = {sums.sum,
                sums.sum_squares,
                sums.abs_sum,
                sums.min,
                sums.max,
                unsigned(sums.counts & 0xffff),
                unsigned(sums.counts >> 16 & 0xffff),
                unsigned(sums.counts >> 32 & 0xffff),
                unsigned(sums.counts >> 48),
                numel};
  }
}

// -- A tensor ------------------------------------------------------------------------------------

struct TensorSums {
  double sum, sum_squares, abs_sum, min, max;
  int64_t zeros, nans, pos_infs, neg_infs, numel;
};

__device__ __forceinline__ TensorSums add(const TensorSums& a, const TensorSums& b) {
  return {a.sum + b.sum,        a.sum_squares + b.sum_squares, a.abs_sum + b.abs_sum,
          lesser(a.min, b.min), greater(a.max, b.max),         a.zeros + b.zeros,
          a.nans + b.nans,      a.pos_infs + b.pos_infs,       a.neg_infs + b.neg_infs,
          a.numel + b.numel};
}

// Adds the chunks [begin, end), every kStride-th partial, and writes them as tensor `tensor` of a
// list of `count`. Must be reached by the whole block.
template <int kStride>
__device__ __forceinline__ void combine_partials(const Partial* partials, int begin, int end,
                                                 int64_t tensor, int64_t count,
                                                 double* values,     // [stat::kValues, count]
                                                 int64_t* counts) {  // [stat::kCounts, count]
  TensorSums p = {0, 0, 0, kInfinity, -kInfinity, 0, 0, 0, 0, 0};
  for (int c = begin + int(threadIdx.x); c < end; c += kThreads) {
    const Partial& q = partials[int64_t(c) * kStride];
    p = add(p, {q.sum, q.sum_squares, q.abs_sum, q.min, q.max, q.zeros, q.nans, q.pos_infs,
                q.neg_infs, q.numel});
  }
  p = block_reduce(p, [](const TensorSums& a, const TensorSums& b) { return add(a, b); });
  if (threadIdx.x != 0) return;
  const bool poisoned = p.nans > 0;
  const double abs_max = p.numel > 0 ? greater(-p.min, p.max) : 0;
  values[stat::kSum * count + tensor] = p.sum;
  values[stat::kSumSquares * count + tensor] = p.sum_squares;
  values[stat::kAbsSum * count + tensor] = p.abs_sum;
  values[stat::kNorm * count + tensor] = sqrt(p.sum_squares);
  values[stat::kMin * count + tensor] = poisoned ? kNaN : p.min;
  values[stat::kMax * count + tensor] = poisoned ? kNaN : p.max;
  values[stat::kAbsMax * count + tensor] = poisoned ? kNaN : abs_max;
  counts[stat::kZeros * count + tensor] = p.zeros;
  counts[stat::kNans * count + tensor] = p.nans;
  counts[stat::kPosInfs * count + tensor] = p.pos_infs;
  counts[stat::kNegInfs * count + tensor] = p.neg_infs;
  counts[stat::kNumel * count + tensor] = p.numel;
}

}  // namespace pyvizllm
