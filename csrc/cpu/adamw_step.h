// The arithmetic of AdamW, on a vector of elements at a time.
//
// note: [closer than the textbook]
// beta2 = 0.999 in float32 makes 1 - beta2 wrong by 3e-5, and 1 - lr * weight_decay keeps one or
// two digits of a small product. So only the small numbers 1 - beta and lr * weight_decay are
// rounded, and what they multiply is added to the number that it changes. sqrt(1 - beta2^t) goes
// into the step size and into eps, which saves a division an element.
#pragma once

#include <limits>

#include "../kernels.h"
#include "simd.h"

namespace pyvizllm::CPU_CAPABILITY {

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
  // The new second moment. An infinite one stays so, as in torch: Inf - Inf would be NaN.
  Vector moment2(Vector v, Vector g) const {
    const Vector forgotten = minimum(Vector{} + std::numeric_limits<A>::max(), forget2 * v);
    return (from_moment2 ? v : Vector{}) + ((weight2 * g) * g - forgotten);
  }
  // The new parameter; x is the second moment, or its running maximum.
  Vector parameter(Vector p, Vector m, Vector x) const {
    // An infinite parameter stays so, as in torch: 0 * Inf and Inf - Inf would be NaN.
    const Vector decayed = p - p == Vector{} ? decay * p : Vector{};
    return p - (decayed + (m * size) / (square_root(x) + eps));
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

// The weights that a step starts from: the masters, where the parameters are still the rounded
// copies of them. Where not, somebody has assigned to the parameters, or loaded them.
template <class P>
inline Floats weight_of(Floats param, Floats master) {
  P rounded[kFloatLanes];
  store(rounded, master);
  return load(rounded) == param ? master : param;
}

// Elements i to i + lanes; lanes is less than a vector's at the end of a tensor only. With
// kCollect, writes what the parameters change by to `change`.
template <bool kCollect, bool kWhole, class P, class G, class S, class A>
inline void step_vector(const Slice<P, G, S>& s, int64_t i, int64_t lanes, const Update<A>& update,
                        A* change) {
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
  const auto write_change = [change, lanes](auto v) {
    if constexpr (kWhole) {
      store(change, v);
    } else {
      store_partial(change, lanes, v);
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
  auto before = read(s.param);
  const bool has_master = sizeof(P) == 2 && s.master != nullptr;
  if constexpr (sizeof(P) == 2) {
    if (has_master) before = weight_of<P>(before, read(s.master));
  }
  const auto after = update.parameter(before, m, x);
  if constexpr (sizeof(P) == 2) {
    if (has_master) write(s.master, after);
  }
  write(s.param, after);
  // Without a master, read again: what counts is the parameter as it was rounded.
  if constexpr (kCollect) {
    write_change((sizeof(P) == 2 && !has_master ? read(s.param) : after) - before);
  }
}

template <bool kCollect, class P, class G, class S, class A>
inline void step_range(const Slice<P, G, S>& slice, int64_t begin, int64_t count,
                       const Update<A>& update, A* change) {
  constexpr int64_t kLanes = Simd<A>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    step_vector<kCollect, true>(slice, begin + i, kLanes, update, change + i);
  }
  if (i < count) {
    step_vector<kCollect, false>(slice, begin + i, count % kLanes, update, change + i);
  }
}

}  // namespace pyvizllm::CPU_CAPABILITY
