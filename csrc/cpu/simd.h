// One vector type for every instruction set, over the compiler's own vector extension.
//
// This file is compiled once per CPU capability (DEFAULT, AVX2, AVX512). Everything lives in the
// namespace CPU_CAPABILITY, so the linker can never merge two instruction sets' code; for the same
// reason kernels use no std:: template that may stay out of line. Intrinsics stand only where the
// compiler does not find the instruction by itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 header leaves unused mask operands uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyvizllm::CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kLanes>
using VectorOf [[gnu::vector_size(sizeof(T) * kLanes)]] = T;

template <class A>
struct Simd {
  static constexpr int kLanes = kVectorBytes / sizeof(A);
  typedef A Vector __attribute__((vector_size(kVectorBytes)));
};

using Floats = Simd<float>::Vector;
using Ints = Simd<int32_t>::Vector;
using Words = Simd<uint32_t>::Vector;
using Doubles = Simd<double>::Vector;
constexpr int kFloatLanes = Simd<float>::kLanes;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// 16-bit floating-point types as their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using AccumulateType = typename Accumulate<T>::type;

// -- Elementwise ---------------------------------------------------------------------------------

// The larger of each lane; b where either is NaN.
inline Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return Floats(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return Floats(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}
inline Floats minimum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return Floats(_mm512_min_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return Floats(_mm256_min_ps(__m256(a), __m256(b)));
#else
  return a < b ? a : b;
#endif
}
inline Doubles maximum(Doubles a, Doubles b) {
  return a > b ? a : b;
}
inline Doubles minimum(Doubles a, Doubles b) {
  return a < b ? a : b;
}

// Lane i of the result is lane i ^ mask of a; 0 <= mask < kFloatLanes.
inline Floats exchange_lanes(Floats a, int mask) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return Floats(_mm512_permutexvar_ps(_mm512_xor_si512(lanes, _mm512_set1_epi32(mask)), __m512(a)));
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i from = _mm256_xor_si256(lanes, _mm256_set1_epi32(mask));
  return Floats(_mm256_permutevar8x32_ps(__m256(a), from));
#else
  Floats result;
  for (int lane = 0; lane < kFloatLanes; ++lane) result[lane] = a[lane ^ mask];
  return result;
#endif
}

inline Floats absolute(Floats a) {
  return bit_cast<Floats>(bit_cast<Words>(a) & 0x7fffffffu);
}

inline Floats square_root(Floats a) {
#if defined(__AVX512F__)
  return Floats(_mm512_sqrt_ps(__m512(a)));
#elif defined(__AVX2__)
  return Floats(_mm256_sqrt_ps(__m256(a)));
#else
  for (int lane = 0; lane < kFloatLanes; ++lane) a[lane] = std::sqrt(a[lane]);
  return a;
#endif
}
inline Doubles square_root(Doubles a) {
  for (int lane = 0; lane < Simd<double>::kLanes; ++lane) a[lane] = std::sqrt(a[lane]);
  return a;
}

// The lower bound of exp's argument: exp rounds to zero from here on, and never meets -Inf.
template <class A>
constexpr A kExpMin = sizeof(A) == 8 ? A(-746) : A(-105);

// e^x for kExpMin <= x <= 0 and NaN, within one unit in the last place, gradual underflow included.
// Where x is a little above 0, by rounding, the result is as exact. Cody-Waite reduction to
// |r| <= log(2)/2 and e^r = 1 + r + r^2 q(r), q fitted to minimise the relative error (3e-9) by
// iterated weighted least squares.
inline Floats exp(Floats x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits.
  constexpr float kRound = 12582912.0f;
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  Floats r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682e-6f;
  // Two halves of the polynomial side by side: what is waited for is the chain, not the additions.
  const Floats r2 = r * r;
  const Floats high_terms = (r * 1.381459762e-03f + 8.368716575e-03f) * r + 4.166838899e-02f;
  const Floats low_terms = r * 1.666652113e-01f + 4.999999404e-01f;
  const Floats q = high_terms * r2 + low_terms;
  const Floats e = (r2 * q + r) + 1.0f;
#if defined(__AVX512F__)
  return Floats(_mm512_scalef_ps(__m512(e), __m512(n)));
#else
  // In two factors: n reaches -151, below the least exponent of a normal float.
  const Ints exponent = bit_cast<Ints>(shifted) - bit_cast<int32_t>(kRound);
  const Ints half = exponent >> 1;
  const Floats low = bit_cast<Floats>((half + 127) << 23);
  const Floats high = bit_cast<Floats>((exponent - half + 127) << 23);
  return e * low * high;
#endif
}

inline Doubles exp(Doubles x) {
  for (int lane = 0; lane < Simd<double>::kLanes; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// The natural logarithm of 0, normal positive numbers, Inf and NaN, within two units in the last
// place. With x = 2^n m and s = (m - 1) / (m + 1): log(x) = n log(2) + 2 atanh(s), |s| < 0.172, by
// its series, whose next term is below 2^-54 of the first.
inline Doubles log(Doubles x) {
  using Longs = decltype(x < x);
  const Longs bits = bit_cast<Longs>(x);
  const Longs n = (bits - bit_cast<int64_t>(0.70710678118654752)) >> 52;
  const Doubles m = bit_cast<Doubles>(bits - (n << 52));
  const Doubles s = (m - 1) / (m + 1);
  const Doubles z = s * s;
  Doubles series = z * (2.0 / 21) + 2.0 / 19;
  series = series * z + 2.0 / 17;
  series = series * z + 2.0 / 15;
  series = series * z + 2.0 / 13;
  series = series * z + 2.0 / 11;
  series = series * z + 2.0 / 9;
  series = series * z + 2.0 / 7;
  series = series * z + 2.0 / 5;
  series = series * z + 2.0 / 3;
  // log(2) in two parts, the first of which times n is exact.
  const Doubles power = __builtin_convertvector(n, Doubles);
  const Doubles of_m = 2 * s + (s * z * series + power * 1.9082149292705877e-10);
  const Doubles result = power * 0.69314718036912382 + of_m;
  const Doubles infinity = Doubles{} + __builtin_inf();
  return x == 0 ? -infinity : x < infinity ? result : x;
}

// Whether v <= bound in all lanes; a NaN is not.
inline bool all_within(Floats v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(__m512(v), _mm512_set1_ps(bound), _CMP_LE_OQ) == 0xffff;
#elif defined(__AVX2__)
  const __m256 within = _mm256_cmp_ps(__m256(v), _mm256_set1_ps(bound), _CMP_LE_OQ);
  return _mm256_movemask_ps(within) == 0xff;
#else
  for (int lane = 0; lane < kFloatLanes; ++lane) {
    if (!(v[lane] <= bound)) return false;
  }
  return true;
#endif
}

// z = cap * tanh(scale * x / cap), and 1 - tanh^2, which is dz/dx / scale; within 4 and 8 units in
// the last place.
template <class V>
struct Capped {
  V value;
  V derivative;
};

template <class A>
struct SoftCap {
  A scale;
  A cap;
  A inverse;  // 1 / cap
  A rate;     // scale / cap
};

// Where |y| is above 1, with e = e^(-2|y|): z is cap (1 - 2 e / (1 + e)), and the derivative
// 4 e / (1 + e)^2, which does not cancel where it is near 0.
inline Capped<Floats> capped_above_1(Floats y, float cap, Capped<Floats> up_to_1) {
  const Words sign = bit_cast<Words>(y) & 0x80000000u;
  const auto is_above = absolute(y) > 1.0f;  // -1 where it is
  const Floats e = exp(maximum(Floats{} + kExpMin<float>, absolute(y) * -2.0f));
  const Floats inverse = 1.0f / (e + 1.0f);
  const Floats magnitude = cap + (e * inverse) * (-2.0f * cap);
  const Floats value = bit_cast<Floats>(bit_cast<Words>(magnitude) | sign);
  return {is_above ? value : up_to_1.value,
          is_above ? 4.0f * e * inverse * inverse : up_to_1.derivative};
}

// Where |y| is up to 1, tanh(y) = y + y u q(u) with u = y^2; q is fitted to minimise the relative
// error (6e-8) by iterated weighted least squares. Either way the last operation is an addition:
// what is subtracted from z meets z as it is rounded, and is not fused into it. A branch for the
// whole vector: logits are soft-capped so that few come near the cap.
inline Capped<Floats> soft_capped(Floats x, const SoftCap<float>& by) {
  const Floats scaled = x * by.scale;
  const Floats y = x * by.rate;
  const Floats u = y * y;
  const Floats u2 = u * u;
  const Floats high_terms = u * 1.058263403e-03f + -6.259335882e-03f;
  const Floats middle_terms = u * 2.035975582e-02f + -5.349870597e-02f;
  const Floats low_terms = u * 1.332640884e-01f + -3.333298678e-01f;
  const Floats q = (high_terms * u2 + middle_terms) * u2 + low_terms;
  const Floats value = (scaled * u) * q + scaled;
  const Floats tanh = value * by.inverse;
  const Capped<Floats> up_to_1{value, 1.0f - tanh * tanh};
  return all_within(absolute(y), 1.0f) ? up_to_1 : capped_above_1(y, by.cap, up_to_1);
}

inline Capped<Doubles> soft_capped(Doubles x, const SoftCap<double>& by) {
  Capped<Doubles> result;
  for (int lane = 0; lane < Simd<double>::kLanes; ++lane) {
    const double y = x[lane] * by.rate;
    const double e = std::exp(-2 * std::fabs(y));
    result.value[lane] = __builtin_fma(by.cap, std::tanh(y), 0.0);  // rounded, as above
    result.derivative[lane] = 4 * e / ((1 + e) * (1 + e));
  }
  return result;
}

// The first `count` lanes of v, and `fill` in the others.
template <class V>
inline V first_lanes(V v, int64_t count, V fill = V{}) {
  decltype(v < v) number;  // compared as a vector: a branch a lane would cost more than the rest
  for (int lane = 0; lane < int(sizeof(V) / sizeof(v[0])); ++lane) number[lane] = lane;
  return number < decltype(number){} + decltype(+number[0])(count) ? v : fill;
}

// -- Across lanes, in a fixed order ---------------------------------------------------------------

// fold(a, b) of the halves, of the halves of that, and so on.
template <class V, class Fold>
inline auto fold_lanes(V v, const Fold& fold) {
  using Element = std::remove_reference_t<decltype(v[0])>;
  constexpr int kLanes = sizeof(V) / sizeof(Element);
  if constexpr (kLanes == 1) {
    return v[0];
  } else {
    VectorOf<Element, kLanes / 2> halves[2];
    std::memcpy(halves, &v, sizeof(halves));
    return fold_lanes(fold(halves[0], halves[1]), fold);
  }
}

template <class V>
inline double sum_lanes(V v) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0]);
  const auto wide = __builtin_convertvector(v, VectorOf<double, kLanes>);
  return fold_lanes(wide, [](auto a, auto b) { return a + b; });
}

template <class A>
inline A max_lanes(typename Simd<A>::Vector v) {
  return fold_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Adds the lower lanes of v to sums[0] and the upper ones to sums[1].
inline void add_widened(Floats v, Doubles (&sums)[2]) {
  using HalfFloats = VectorOf<float, kFloatLanes / 2>;
  HalfFloats halves[2];
  std::memcpy(halves, &v, sizeof(halves));
  sums[0] += __builtin_convertvector(halves[0], Doubles);
  sums[1] += __builtin_convertvector(halves[1], Doubles);
}

// A bit per lane, set where the lane is 0.
inline uint32_t zero_lanes(Words w) {
#if defined(__AVX512F__)
  return _mm512_testn_epi32_mask(__m512i(w), __m512i(w));
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(__m256i(w == 0))));
#elif defined(__x86_64__)
  return uint32_t(_mm_movemask_ps(_mm_castsi128_ps(__m128i(w == 0))));
#else
  uint32_t lanes = 0;
  for (int lane = 0; lane < kFloatLanes; ++lane) lanes |= uint32_t(w[lane] == 0) << lane;
  return lanes;
#endif
}

inline bool all_zero(Words w) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(w), __m512i(w)) == 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256(__m256i(w), __m256i(w));
#else
  return zero_lanes(w) == (1u << kFloatLanes) - 1;
#endif
}

constexpr int kIntoL2 = 2;  // locality of __builtin_prefetch: L1 is for what is worked on

// Asks for memory that a loop over x comes to some microseconds later. The processor's own
// prefetcher stops at the end of each page, and while a block is worked on it sees no loads at all.
// Never faults.
template <class T>
inline void prefetch_ahead(const T* x) {
  __builtin_prefetch(x + 16384 / sizeof(T), 0, kIntoL2);
}

// -- Memory: load widens to the accumulation type, store rounds once to nearest even --------------

using Halves = VectorOf<uint16_t, kFloatLanes>;

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Floats v) {
  std::memcpy(p, &v, sizeof(v));
}

inline Doubles load(const double* p) {
  Doubles v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(double* p, Doubles v) {
  std::memcpy(p, &v, sizeof(v));
}

inline Words widen(Halves h) {
#if defined(__AVX512F__)
  return Words(_mm512_cvtepu16_epi32(__m256i(h)));
#elif defined(__AVX2__)
  return Words(_mm256_cvtepu16_epi32(__m128i(h)));
#else
  return __builtin_convertvector(h, Words);
#endif
}
inline Halves narrow(Words w) {
#if defined(__AVX512F__)
  return Halves(_mm512_cvtepi32_epi16(__m512i(w)));
#else
  return __builtin_convertvector(w, Halves);
#endif
}

inline Floats load(const BFloat16* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bit_cast<Floats>(widen(bits) << 16);
}
inline void store(BFloat16* p, Floats v) {
  const Words bits = bit_cast<Words>(v);
  const Words rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  // Rounding could carry a NaN's mantissa into the sign: NaN gets one fixed pattern.
  const Halves narrowed = narrow(v == v ? rounded : Words{} + 0x7fc0u);
  std::memcpy(p, &narrowed, sizeof(narrowed));
}

inline Floats load(const Float16* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof(bits));
#if defined(__AVX512F__)
  return Floats(_mm512_cvtph_ps(__m256i(bits)));
#elif defined(__F16C__)
  return Floats(_mm256_cvtph_ps(__m128i(bits)));
#else
  // The exponent and mantissa moved into place are x * 2^-112, subnormals included; the product
  // restores the bias exactly. Inf and NaN (exponent 31) need the exponent 255, and
  // NaNs come out quiet, as from the instruction.
  const Words wide = widen(bits);
  const Words magnitude = (wide & 0x7fffu) << 13;
  const Words finite = bit_cast<Words>(bit_cast<Floats>(magnitude) * 0x1p112f);
  const Words quiet = (wide & 0x3ffu) != 0u ? Words{} + 0x00400000u : Words{};
  const Words special = magnitude | quiet | 0x7f800000u;
  const Words value = (wide & 0x7c00u) == 0x7c00u ? special : finite;
  return bit_cast<Floats>(value | ((wide & 0x8000u) << 16));
#endif
}
inline void store(Float16* p, Floats v) {
  Halves narrowed;
#if defined(__AVX512F__)
  narrowed = Halves(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  narrowed = Halves(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Words sign = (bit_cast<Words>(v) >> 16) & 0x8000u;
  const Words bits = bit_cast<Words>(v) & 0x7fffffffu;
  // Normal results: round the 13 dropped bits to nearest even, then move the bias from 127 to 15.
  const Words normal = (bits + (0xfffu + ((bits >> 13) & 1u)) - (112u << 23)) >> 13;
  // Subnormal results: adding 0.5 makes the FPU round to multiples of 2^-24 in the low bits.
  const Words subnormal = bit_cast<Words>(bit_cast<Floats>(bits) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const Words infinite = Words{} + 0x7c00u;
  Words result = bits < (113u << 23) ? subnormal : normal;
  result = bits >= 0x477ff000u ? infinite : result;  // 65520 and above round to Inf
  result = bits > 0x7f800000u ? Words{} + 0x7e00u : result;
  narrowed = narrow(result | sign);
#endif
  std::memcpy(p, &narrowed, sizeof(narrowed));
}

// Copies the first `count` < kElements elements. load_elements makes the others 0.
template <int kElements, class T>
inline void load_elements(T* to, const T* p, int64_t count) {
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_storeu_epi16(to, _mm256_maskz_loadu_epi16(__mmask16(lanes), p));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_storeu_epi32(to, _mm512_maskz_loadu_epi32(__mmask16(lanes), p));
  } else {
    _mm512_storeu_epi64(to, _mm512_maskz_loadu_epi64(__mmask8(lanes), p));
  }
#else
  for (int i = 0; i < kElements; ++i) to[i] = i < count ? p[i] : T{};
#endif
}
template <int kElements, class T>
inline void store_elements(T* p, const T* from, int64_t count) {
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16(lanes), _mm256_loadu_epi16(from));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, __mmask16(lanes), _mm512_loadu_epi32(from));
  } else {
    _mm512_mask_storeu_epi64(p, __mmask8(lanes), _mm512_loadu_epi64(from));
  }
#else
  for (int i = 0; i < count; ++i) p[i] = from[i];
#endif
}

// The first `count` < lanes elements, the other lanes taken from `fill`.
template <class T>
inline auto load_partial(const T* p, int64_t count, AccumulateType<T> fill) {
  using V = typename Simd<AccumulateType<T>>::Vector;
  constexpr int kLanes = Simd<AccumulateType<T>>::kLanes;
  T elements[kLanes];
  load_elements<kLanes>(elements, p, count);
  return first_lanes(load(elements), count, V{} + fill);
}
template <class T, class V>
inline void store_partial(T* p, int64_t count, V v) {
  constexpr int kLanes = sizeof(V) / sizeof(v[0]);
  T elements[kLanes];
  store(elements, v);
  store_elements<kLanes>(p, elements, count);
}

template <class T>
inline AccumulateType<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, AccumulateType<T>>) {
    return *p;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return bit_cast<float>(uint32_t(p->bits) << 16);
  } else {
    return load_partial(p, 1, 0)[0];
  }
}
template <class T>
inline void store_one(T* p, AccumulateType<T> value) {
  if constexpr (std::is_same_v<T, AccumulateType<T>>) {
    *p = value;
  } else {
    typename Simd<AccumulateType<T>>::Vector v{};
    v[0] = value;  // a sum with 0 would lose the sign of -0
    store_partial(p, 1, v);
  }
}

}  // namespace pyvizllm::CPU_CAPABILITY
