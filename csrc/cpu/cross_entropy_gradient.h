// Writes the gradient of a row of logits, with one rounding.
//
// With p the softmax of z, q_c the coefficient of class c's negative log-likelihood and Q their
// sum: d loss / d z_c = p_c (Q + 2 z_loss lse) - q_c, times d z_c / d x_c. Read from the logits
// again, or from the exponentials that the sums have kept.
#pragma once

#include "cross_entropy_row_sums.h"

namespace pyvizllm::CPU_CAPABILITY {

// A row's softmax, all ranks' where there are several.
template <class Logits>
struct RowSoftmax {
  typename Logits::Reference reference;
  double sum_exp;
  double coefficient_sum;
};

// The gradient of the logits is (e^d * scale - c * offset) * dz/dx, but for the target's.
template <class T, class Logits>
struct RowGradient {
  using A = AccumulateType<T>;
  using V = typename Simd<A>::Vector;
  static constexpr int kLanes = Simd<A>::kLanes;

  const Logits& logits;
  int64_t classes;
  double scale;
  double offset;
  const Coefficients<T>* coefficients;  // null: all are 1
  int64_t target;                       // -1: none
  A at_target;

  // From the logits; the gradient may overwrite them.
  void write(const T* x, typename Logits::Reference reference, T* gradient) const {
    const V exp_min = V{} + kExpMin<A>;
    const A factor = A(scale);
    for (int64_t begin = 0; begin < classes; begin += kRowBlock) {
      write_block(begin, gradient, [&](int64_t i, int lanes, V c) {
        prefetch_ahead(x + i);
        const V v = load_lanes(x + i, lanes);
        if constexpr (Logits::kCapped) {
          const auto z = logits.capped(v);
          return (exp(maximum(exp_min, z.value - reference.max)) * factor - c) * z.derivative;
        } else {
          return exp(maximum(exp_min, logits.distance(v, reference))) * factor - c;
        }
      });
    }
    if (target >= 0) store_one(gradient + target, at_target);
  }

  // From what the sums have kept; the gradient may overwrite that, and the logits.
  void write(const T* x, const KeptRow<A>& kept, A max_key, T* gradient) const {
    const auto reference = logits.reference(max_key);
    for (int64_t begin = 0; begin < classes; begin += kRowBlock) {
      const A block_key = kept.max_key[begin / kRowBlock];
      // Of a block before the first finite logit all exponentials are 0.
      const bool empty = block_key == -std::numeric_limits<A>::infinity();
      const double distance = logits.between(logits.reference(block_key), reference);
      const A factor = A(scale * (empty ? 0 : std::exp(distance)));
      write_block(begin, gradient, [&](int64_t i, int lanes, V c) {
        const V of_softmax = load_lanes(kept.exps + i, lanes) * factor;
        if constexpr (Logits::kCapped) {
          if (offset == 0) return of_softmax;
          return of_softmax - c * logits.capped(load_lanes(x + i, lanes)).derivative;
        } else {
          return of_softmax - c;
        }
      });
    }
    if (target >= 0) store_one(gradient + target, at_target);
  }

 private:
  // Stores of(i, lanes, what is subtracted) over a block.
  template <class Of>
  void write_block(int64_t begin, T* gradient, const Of& of) const {
    const int64_t end = classes - begin < kRowBlock ? classes : begin + kRowBlock;
    const V factor = V{} + A(offset);
    if (coefficients == nullptr) {
      write_vectors(begin, end, gradient, of, [&](int64_t, int) { return factor; });
      return;
    }
    coefficients->with_block(begin, end - begin, [&](const auto& c) {
      write_vectors(begin, end, gradient, of,
                    [&](int64_t i, int lanes) { return c(i - begin, lanes) * factor; });
    });
  }

  template <class Of, class Subtracted>
  static void write_vectors(int64_t begin, int64_t end, T* gradient, const Of& of,
                            const Subtracted& subtracted) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      store(gradient + i, of(i, kLanes, subtracted(i, kLanes)));
    }
    if (i < end) {
      const int lanes = int(end - i);
      store_partial(gradient + i, lanes, of(i, lanes, subtracted(i, lanes)));
    }
  }
};

}  // namespace pyvizllm::CPU_CAPABILITY
