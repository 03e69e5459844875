// AdamW over a list of tensors, in one pass over memory.
//
// Reads p, g, m and v once and writes p, m and v once: 16 + 12 bytes a float32 element, and nothing
// else. Clipping, unscaling, weight decay, both moments and the step happen while the element is in
// registers; the clip coefficient, the gradient scale and whether to step at all are read here, so
// that nobody waits for them. Everything is float32 inside (float64 for float64 parameters) and
// rounded once, where it is stored.
//
// note: [closer than the textbook]
// beta2 = 0.999 in float32 makes 1 - beta2 wrong by 3e-5, and 1 - lr * weight_decay keeps one or
// two digits of a small product. So only the small numbers 1 - beta and lr * weight_decay are
// rounded, and what they multiply is added to the number that it changes. sqrt(1 - beta2^t) goes
// into the step size and into eps, which saves a division an element.
//
// Tensors are cut into chunks that depend on their sizes alone, which threads take from a queue.
#include <memory>
#include <type_traits>

#include "../kernels.h"
#include "simd.h"
#include "statistics.h"

namespace pyvizllm::CPU_CAPABILITY {
namespace {

// What one tensor's elements have in common in this step, formed in float64 from its own step.
struct StepConstants {
  double gradient;  // times the gradient: clipping, unscaling, and the sign of `maximize`
  double weight1;   // 1 - beta1
  double weight2;   // 1 - beta2
  double beta1;
  double beta2;
  double size;   // lr / (1 - beta1^t) * sqrt(1 - beta2^t)
  double eps;    // eps * sqrt(1 - beta2^t)
  double decay;  // lr * weight_decay
};

template <class A>
struct Update {
  using Vector = typename Simd<A>::Vector;

  explicit Update(const StepConstants& c)
      : gradient(A(c.gradient)),
        // Interpolated from the nearer end, as torch's lerp does: exact for beta 0.
        from_moment1(c.weight1 < 0.5),
        from_moment2(c.weight2 < 0.5),
        weight1(from_moment1 ? A(c.weight1) : A(-c.beta1)),
        weight2(A(c.weight2)),
        forget2(from_moment2 ? A(c.weight2) : A(-c.beta2)),
        size(A(c.size)),
        eps(A(c.eps)),
        decay(A(c.decay)) {}

  // The new first moment.
  Vector moment1(Vector m, Vector g) const { return (from_moment1 ? m : g) + weight1 * (g - m); }
  // The new second moment.
  Vector moment2(Vector v, Vector g) const {
    return (from_moment2 ? v : Vector{}) + ((weight2 * g) * g - forget2 * v);
  }
  // The new parameter; x is the second moment, or its running maximum.
  Vector parameter(Vector p, Vector m, Vector x) const {
    return p - (decay * p + (m * size) / (square_root(x) + eps));
  }

  A gradient;
  bool from_moment1, from_moment2;
  A weight1, weight2, forget2;
  A size, eps, decay;
};

// The part of a tensor that one call steps over.
template <class P, class G, class S>
struct Slice {
  P* param;
  const G* grad;
  S* exp_avg;
  S* exp_avg_sq;
  S* max_exp_avg_sq;
  float* master;

  Slice(const AdamWTensor& t, int64_t begin)
      : param(static_cast<P*>(t.param) + begin),
        grad(static_cast<const G*>(t.grad) + begin),
        exp_avg(static_cast<S*>(t.exp_avg) + begin),
        exp_avg_sq(static_cast<S*>(t.exp_avg_sq) + begin),
        max_exp_avg_sq(t.max_exp_avg_sq == nullptr ? nullptr
                                                   : static_cast<S*>(t.max_exp_avg_sq) + begin),
        master(t.master == nullptr ? nullptr : t.master + begin) {}
};

// Elements i to i + lanes; lanes is less than a vector's at the end of a tensor only.
template <bool kWhole, class P, class G, class S, class A>
inline void step_vector(const Slice<P, G, S>& s, int64_t i, int64_t lanes,
                        const Update<A>& update) {
  const auto read = [i, lanes](const auto* x) {
    if constexpr (kWhole) return load(x + i);
    return load_partial(x + i, lanes, 0);
  };
  const auto write = [i, lanes](auto* x, auto v) {
    if constexpr (kWhole) {
      store(x + i, v);
    } else {
      store_partial(x + i, lanes, v);
    }
  };
  const auto g = read(s.grad) * update.gradient;
  const auto m = update.moment1(read(s.exp_avg), g);
  const auto v = update.moment2(read(s.exp_avg_sq), g);
  write(s.exp_avg, m);
  write(s.exp_avg_sq, v);
  auto x = v;
  if (s.max_exp_avg_sq != nullptr) {
    x = maximum(read(s.max_exp_avg_sq), v);
    write(s.max_exp_avg_sq, x);
  }
  if constexpr (sizeof(P) == 2) {
    if (s.master != nullptr) {
      const auto updated = update.parameter(read(s.master), m, x);
      write(s.master, updated);
      write(s.param, updated);
      return;
    }
  }
  write(s.param, update.parameter(read(s.param), m, x));
}

template <class P, class G, class S>
void step_chunk(const AdamWTensor& tensor, const Chunk& chunk, const StepConstants& constants) {
  using A = AccumulateType<P>;
  constexpr int64_t kLanes = Simd<A>::kLanes;
  const Slice<P, G, S> slice(tensor, chunk.begin);
  const Update<A> update(constants);
  int64_t i = 0;
  for (; i + kLanes <= chunk.count; i += kLanes) step_vector<true>(slice, i, kLanes, update);
  if (i < chunk.count) step_vector<false>(slice, i, chunk.count % kLanes, update);
}

// Calls body with a null pointer of each of the tensor's types: parameter, gradient, moments.
template <class Body>
auto with_types(const AdamWTensor& t, const Body& body) {
  const auto low_precision = [&]<class P>(P* p) {
    float* const f = nullptr;
    if (t.grad_dtype == DType::kFloat32) {
      return t.state_dtype == DType::kFloat32 ? body(p, f, f) : body(p, f, p);
    }
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

}  // namespace

void adamw(const AdamWTensor* tensors, int64_t count, const AdamWOptions& options,
           const AdamWStatistics&) {
  if (options.found_inf != nullptr && *options.found_inf != 0) return;
  const std::unique_ptr<StepConstants[]> constants(new StepConstants[count]);
  advance_steps(tensors, count, options, constants.get());

  const ChunkTable chunks(tensors, count);
  parallel_queue(chunks.size(), [&](WorkQueue& queue) {
    for (int64_t c; (c = queue.take()) >= 0;) {
      const Chunk& chunk = chunks[c];
      const AdamWTensor& tensor = tensors[chunk.tensor];
      with_types(tensor, [&]<class P, class G, class S>(P*, G*, S*) {
        step_chunk<P, G, S>(tensor, chunk, constants[chunk.tensor]);
      });
    }
  });
}

}  // namespace pyvizllm::CPU_CAPABILITY
