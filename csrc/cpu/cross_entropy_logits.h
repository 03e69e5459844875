// What becomes of a logit before the softmax: nothing, a scale, or a scale and a cap.
//
// z = x, z = scale * x, or z = cap * tanh(scale * x / cap). All three are monotone, so a row's
// maximum and the rank of its target are found among keys, x times the sign of the scale, with no
// arithmetic that could round: two logits are in the same order before and after. The row is read a
// second time for the distances of z from its maximum, and only there a tanh is taken.
//
// key(v)                      of a vector of logits
// value(key)                  z in double
// reference(key)              what distances are from, for the row's largest key so far
// reference_at(z)             the same for a maximum that is known as z alone, in the backward
// position(reference)         its z, in double
// distance(v, reference)      of a vector of logits
// distance_of(key, reference) in double, of the z that distance() is of
// between(a, b)               the distance of reference a from reference b
#pragma once

#include <limits>

#include "../kernels.h"
#include "simd.h"

namespace pyvizllm::CPU_CAPABILITY {

// Where a row is all -Inf so far, distances are taken from 0: (-Inf) - (-Inf) would be NaN.
template <class A>  // of one row, or a vector of rows
inline A finite_or_zero(A max) {
  return max == -__builtin_inff() ? A{} : max;
}

template <class A>
struct PlainLogits {
  using V = typename Simd<A>::Vector;
  struct Reference {
    A max;
  };
  static constexpr bool kCapped = false;

  explicit PlainLogits(const CrossEntropyArguments&) {}

  V key(V v) const { return v; }
  double value(A key) const { return double(key); }
  Reference reference(A key) const { return {finite_or_zero(key)}; }
  Reference reference_at(A z) const { return {z}; }
  double position(Reference r) const { return double(r.max); }
  double distance_of(A key, Reference r) const { return double(key) - double(r.max); }
  double between(Reference a, Reference b) const { return double(a.max) - double(b.max); }
  V distance(V v, Reference r) const { return v - r.max; }
};

// The difference is taken before the product: the largest logit is at a distance of exactly 0, and
// others lose nothing to a common offset.
template <class A>
struct ScaledLogits {
  using V = typename Simd<A>::Vector;
  struct Reference {
    A key;
    A correction;  // scale * key - reference, where no key meets the reference exactly
  };
  static constexpr bool kCapped = false;

  A sign;
  A scale;  // its magnitude

  explicit ScaledLogits(const CrossEntropyArguments& a)
      : sign(A((a.logit_scale > 0) - (a.logit_scale < 0))), scale(A(std::fabs(a.logit_scale))) {}

  V key(V v) const { return v * sign; }
  double value(A key) const { return double(scale) * double(key); }
  Reference reference(A key) const { return {finite_or_zero(key), 0}; }
  Reference reference_at(A z) const {
    const A key = scale == 0 ? A(0) : z / scale;
    return {key, A(__builtin_fma(double(scale), double(key), -double(z)))};
  }
  double position(Reference r) const { return value(r.key) - double(r.correction); }
  double distance_of(A key, Reference r) const {
    return double(scale) * (double(key) - double(r.key)) + double(r.correction);
  }
  double between(Reference a, Reference b) const {
    return distance_of(a.key, b) - double(a.correction);
  }
  V distance(V v, Reference r) const { return (v * sign - r.key) * scale + r.correction; }
};

template <class A>
struct CappedLogits {
  using V = typename Simd<A>::Vector;
  struct Reference {
    A max;
  };
  static constexpr bool kCapped = true;

  A sign;
  SoftCap<A> cap;

  explicit CappedLogits(const CrossEntropyArguments& a)
      : sign(A((a.logit_scale > 0) - (a.logit_scale < 0))),
        cap{A(a.logit_scale), A(a.softcap), A(1 / a.softcap), A(a.logit_scale / a.softcap)} {}

  V key(V v) const { return v * sign; }
  // z of a vector of logits, and dz/dx but for the scale.
  Capped<V> capped(V v) const { return soft_capped(v, cap); }
  // Rounded as in distance(): the largest logit is at a distance of exactly 0.
  double value(A key) const { return double(capped(V{} + key * sign).value[0]); }
  Reference reference(A key) const { return {A(value(key))}; }
  Reference reference_at(A z) const { return {z}; }
  double position(Reference r) const { return double(r.max); }
  double distance_of(A key, Reference r) const { return value(key) - double(r.max); }
  double between(Reference a, Reference b) const { return double(a.max) - double(b.max); }
  V distance(V v, Reference r) const { return capped(v).value - r.max; }
};

}  // namespace pyvizllm::CPU_CAPABILITY
