// AdamW over a list of tensors, in one pass over memory.
//
// Reads p, g, m and v once and writes p, m and v once: 16 + 12 bytes a float32 element, and nothing
// else. Clipping, unscaling, weight decay, both moments and the step happen while the element is in
// registers; the clip coefficient, the gradient scale and whether to step at all are read here, so
// that nobody waits for them. Everything is float32 inside (float64 for float64 parameters) and
// rounded once, where it is stored.
//
// Tensors are cut into chunks that depend on their sizes alone, which threads take from a queue.
#include <memory>
#include <type_traits>

#include "adamw_step.h"
#include "statistics.h"

namespace pyvizllm::CPU_CAPABILITY {
namespace {

template <class P, class G, class S>
void step_chunk(const AdamWTensor& tensor, const Chunk& chunk, const StepConstants& constants) {
  using A = AccumulateType<P>;
  const Update<A> update(constants);
  step_range<false>(Slice<P, G, S>(tensor, chunk.begin), 0, chunk.count, update,
                    static_cast<A*>(nullptr));
}

// note: [counting while memory works]
// A block's update and new parameters are counted after the block was stepped, which takes about
// as long as fetching a block does. So that both happen at once, counting asks
// for the memory of the next block: of two arrays with the update, of two with the parameter.
struct NextBlock {
  const char* first;
  const char* second;
  int64_t first_stride;  // bytes a vector
  int64_t second_stride;

  template <class T, class U>
  NextBlock(const T* a, const U* b)
      : first(reinterpret_cast<const char*>(a)),
        second(reinterpret_cast<const char*>(b)),
        first_stride(sizeof(T) * kFloatLanes),
        second_stride(sizeof(U) * kFloatLanes) {}

  void prefetch(int64_t vector) const {  // never faults
    __builtin_prefetch(first + vector * first_stride, 0, kIntoL2);
    __builtin_prefetch(second + vector * second_stride, 0, kIntoL2);
  }
};

template <class T, class Counter>
void collect_block(const T* x, int64_t count, const NextBlock& next, Counter& counter,
                   ChunkSums& sums) {
  BlockScratch scratch;
  BlockStatistics<Counter> block(counter, scratch);
  int64_t vector = 0;
  for (int64_t i = 0; i + kFloatLanes <= count; i += kFloatLanes) {
    next.prefetch(vector++);
    block.add(load(x + i));
  }
  block.finish(x, count, sums);
}

// Float64 takes the exact path, as in tensor_stats.
template <class Counter>
void collect_block(const double* x, int64_t count, const NextBlock&, Counter& counter,
                   ChunkSums& sums) {
  add_exactly(x, count, sums.exact);
  for (int64_t i = 0; i < count; ++i) count_one(float(x[i]), counter);
}

// Calls body with the counter of the chunk's tensor.
template <class Body>
void with_counter(ThreadHistogram* histogram, const AdamWTensor& tensor, const Chunk& chunk,
                  const Body& body) {
  if (histogram == nullptr) {
    NoCounter counter;
    body(counter);
  } else if (ThreadHistogram::fits_one_chunk(tensor.numel)) {
    RowCounter counter = histogram->row(chunk.tensor);
    body(counter);
  } else {
    body(histogram->counters(chunk.tensor, chunk.count));
  }
}

template <class Counter>
constexpr bool kSumsOnly = std::is_same_v<Counter, NoCounter&>;

// What one chunk adds to the statistics.
struct Collected {
  Partial update;
  Partial param;
};

// note: [float32 in registers]
// Without histograms, a block of float32 parameters is summed while its elements are in registers,
// in the time that its memory takes anyway. With histograms that is slower: the arithmetic of the
// sums then fills the gaps between the counters' increments. Flattened, since a BlockStatistics
// that is passed to a call lives in memory, where each store to a tensor may change it.
[[gnu::flatten, gnu::noinline]] void step_and_sum_block(const Slice<float, float, float>& slice,
                                                        int64_t begin, int64_t count,
                                                        const Update<float>& constants,
                                                        ChunkSums& update_sums,
                                                        ChunkSums& param_sums) {
  const Slice<float, float, float> s = slice;
  const Update<float> update = constants;
  float change[kChunkBlock];
  NoCounter none;
  BlockScratch unused;
  BlockStatistics<NoCounter> updates(none, unused), params(none, unused);
  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) {
    step_vector<true, true>(s, begin + i, kFloatLanes, update, change + i);
    updates.add(load(change + i));
    params.add(load(s.param + begin + i));
  }
  if (i < count) {
    step_vector<true, false>(s, begin + i, count % kFloatLanes, update, change + i);
  }
  updates.finish(change, count, update_sums);
  params.finish(s.param + begin, count, param_sums);
}

template <class P, class G, class S>
Collected step_and_collect_chunk(const AdamWTensor& tensor, const Chunk& chunk,
                                 const StepConstants& constants, ThreadHistogram* update_histogram,
                                 ThreadHistogram* param_histogram) {
  using A = AccumulateType<P>;
  const Update<A> update(constants);
  const Slice<P, G, S> s(tensor, chunk.begin);
  A change[kChunkBlock];
  ChunkSums update_sums, param_sums;
  with_counter(update_histogram, tensor, chunk, [&](auto& update_counter) {
    with_counter(param_histogram, tensor, chunk, [&](auto& param_counter) {
      for (int64_t begin = 0; begin < chunk.count; begin += kChunkBlock) {
        const int64_t left = chunk.count - begin;
        const int64_t count = left < kChunkBlock ? left : kChunkBlock;
        const int64_t next = begin + kChunkBlock;
        if constexpr (std::is_same_v<P, float> && kSumsOnly<decltype(update_counter)> &&
                      kSumsOnly<decltype(param_counter)>) {
          step_and_sum_block(s, begin, count, update, update_sums, param_sums);
        } else {
          step_range<true>(s, begin, count, update, change);
          collect_block(change, count, NextBlock(s.param + next, s.grad + next), update_counter,
                        update_sums);
          collect_block(s.param + begin, count, NextBlock(s.exp_avg + next, s.exp_avg_sq + next),
                        param_counter, param_sums);
        }
      }
    });
  });
  return {update_sums.total(), param_sums.total()};
}

// Calls body with a null pointer of each of the tensor's types: parameter, gradient, moments.
template <class Body>
auto with_types(const AdamWTensor& t, const Body& body) {
  const auto low_precision = [&]<class P>(P* p) {
    float* const f = nullptr;
    if (t.grad_dtype == DType::kFloat32) return body(p, f, f);  // wide moments: check_adamw.h
    return t.state_dtype == DType::kFloat32 ? body(p, p, f) : body(p, p, p);
  };
  switch (t.param_dtype) {
    case DType::kFloat32:
      return body((float*)nullptr, (float*)nullptr, (float*)nullptr);
    case DType::kFloat64:
      return body((double*)nullptr, (double*)nullptr, (double*)nullptr);
    case DType::kFloat16:
      return low_precision((Float16*)nullptr);
    case DType::kBFloat16:
      return low_precision((BFloat16*)nullptr);
  }
  __builtin_unreachable();  // registration.cpp throws for every other dtype
}

// Adds one to every step and forms the constants of each tensor.
void advance_steps(const AdamWTensor* tensors, int64_t count, const AdamWOptions& o,
                   StepConstants* constants) {
  double lr = o.lr;
  if (o.lr_tensor != nullptr) {
    lr = o.lr_dtype == DType::kFloat64 ? *static_cast<const double*>(o.lr_tensor)
                                       : double(*static_cast<const float*>(o.lr_tensor));
  }
  double gradient = o.maximize ? -1 : 1;
  if (o.clip_coefficient != nullptr) gradient *= *o.clip_coefficient;
  if (o.grad_scale != nullptr) gradient /= double(*o.grad_scale);
  float previous_step = -1;
  for (int64_t t = 0; t < count; ++t) {
    const float step = *tensors[t].step += 1;
    if (t > 0 && step == previous_step) {  // nearly always: two pow() less
      constants[t] = constants[t - 1];
      continue;
    }
    previous_step = step;
    const double correction1 = 1 - std::pow(o.beta1, double(step));
    const double correction2 = std::sqrt(1 - std::pow(o.beta2, double(step)));
    constants[t] = {gradient,
                    1 - o.beta1,
                    1 - o.beta2,
                    o.beta1,
                    o.beta2,
                    lr / correction1 * correction2,
                    o.eps * correction2,
                    lr * o.weight_decay};
  }
}

void step_and_collect(const AdamWTensor* tensors, int64_t count, const ChunkTable& chunks,
                      const StepConstants* constants, const AdamWStatistics& s) {
  const std::unique_ptr<Partial[]> updates(new Partial[chunks.size()]);
  const std::unique_ptr<Partial[]> params(new Partial[chunks.size()]);
  const auto run = [&](WorkQueue& queue) {
    ThreadHistogram updates_histogram(s.update_histogram), params_histogram(s.param_histogram);
    for (int64_t c; (c = queue.take()) >= 0;) {
      const Chunk& chunk = chunks[c];
      const AdamWTensor& tensor = tensors[chunk.tensor];
      with_types(tensor, [&]<class P, class G, class S>(P*, G*, S*) {
        const Collected collected = step_and_collect_chunk<P, G, S>(
            tensor, chunk, constants[chunk.tensor],
            s.update_histogram == nullptr ? nullptr : &updates_histogram,
            s.param_histogram == nullptr ? nullptr : &params_histogram);
        updates[c] = collected.update;
        params[c] = collected.param;
      });
    }
  };
  parallel_queue(chunks.size(), run, chunks.is_small());
  if (s.update_values != nullptr) {
    write_all_statistics(tensors, count, chunks, updates.get(), s.update_values, s.update_counts);
  }
  if (s.param_values != nullptr) {
    write_all_statistics(tensors, count, chunks, params.get(), s.param_values, s.param_counts);
  }
}

// The statistics of empty tensors, for a step that was skipped.
void write_nothing(int64_t count, const AdamWStatistics& s) {
  for (int64_t t = 0; t < count; ++t) {
    if (s.update_values != nullptr) {
      write_statistics(Partial(), 0, t, count, s.update_values, s.update_counts);
    }
    if (s.param_values != nullptr) {
      write_statistics(Partial(), 0, t, count, s.param_values, s.param_counts);
    }
  }
}

}  // namespace

void adamw(const AdamWTensor* tensors, int64_t count, const AdamWOptions& options,
           const AdamWStatistics& statistics) {
  if (options.found_inf != nullptr && *options.found_inf != 0) {
    write_nothing(count, statistics);
    return;
  }
  const std::unique_ptr<StepConstants[]> constants(new StepConstants[count]);
  advance_steps(tensors, count, options, constants.get());
  const ChunkTable chunks(tensors, count);
  const bool collects = statistics.update_values != nullptr || statistics.param_values != nullptr ||
                        statistics.update_histogram != nullptr ||
                        statistics.param_histogram != nullptr;
  if (collects) {
    step_and_collect(tensors, count, chunks, constants.get(), statistics);
    return;
  }
  const auto run = [&](WorkQueue& queue) {
    for (int64_t c; (c = queue.take()) >= 0;) {
      const Chunk& chunk = chunks[c];
      const AdamWTensor& tensor = tensors[chunk.tensor];
      with_types(tensor, [&]<class P, class G, class S>(P*, G*, S*) {
        step_chunk<P, G, S>(tensor, chunk, constants[chunk.tensor]);
      });
    }
  };
  parallel_queue(chunks.size(), run, chunks.is_small());
}

}  // namespace pyvizllm::CPU_CAPABILITY
