// SIMD vectors as the compiler's vector extension, of the width of this file's instruction set.
//
// One source serves all: it is compiled once for each instruction set, GEOT_ISA naming the
// namespace, so that no function of one is ever mistaken for that of another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../common/geometry.h"
#include "../common/macros.h"

#ifndef GEOT_ISA
#define GEOT_ISA baseline
#endif

#define GEOT_LAMBDA __attribute__((always_inline))

namespace geot::cpu::GEOT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

enum class Into { kSet, kAdd };  // what to do with a result

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  // The same at any address of a T.
  typedef T loose __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

template <class T>
constexpr int kWidth = kVectorBytes / sizeof(T);
template <class T>
using Vec = Vector<T, kWidth<T>>;

template <class V>
using Element = std::remove_cvref_t<decltype(std::declval<V>()[0])>;
template <class V>
constexpr int kElements = sizeof(V) / sizeof(Element<V>);

template <class V>
GEOT_INLINE V load(const Element<V>* p) {
  return *reinterpret_cast<const typename VectorOf<Element<V>, kElements<V>>::loose*>(p);
}
template <class V>
GEOT_INLINE void store(Element<V>* p, V x) {
  *reinterpret_cast<typename VectorOf<Element<V>, kElements<V>>::loose*>(p) = x;
}
template <class V>
GEOT_INLINE V broadcast(Element<V> x) {
  return V{} + x;
}
template <class V>
GEOT_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
// Integers as wide as a T.
template <class T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class V>
using Integers = Vector<Integer<Element<V>>, kElements<V>>;

template <class V>
GEOT_INLINE Integers<V> lane_numbers() {
  Integers<V> lanes;
  for (int i = 0; i < kElements<V>; ++i) lanes[i] = i;
  return lanes;
}

// Shuffles: element e of the result is element index(e) of (a, b).

template <class V, class Index, int... E>
GEOT_INLINE V shuffle_by(V a, V b, Index, std::integer_sequence<int, E...>) {
  return __builtin_shufflevector(a, b, Index::at(E)...);
}
template <class Index, class V>
GEOT_INLINE V shuffle(V a, V b) {
  return shuffle_by(a, b, Index{}, std::make_integer_sequence<int, kElements<V>>{});
}

// Within groups of L: element 2e of the result is a's e, 2e + 1 is b's e, from a group's lower or
// upper half; in units of U elements.
template <int N, int L, int U, bool kUpper>
struct Zip {
  static constexpr int at(int e) {
    const int group = e / L * L, inside = e % L, unit = inside / U;
    const int from = group + (unit / 2) * U + inside % U + (kUpper ? L / 2 : 0);
    return unit % 2 ? N + from : from;
  }
};
// Exchange of blocks of S elements between two vectors, as in a matrix of 2x2 blocks.
template <int N, int S, bool kUpper>
struct Exchange {
  static constexpr int at(int e) {
    if (kUpper) return e & S ? N + e : e + S;
    return e & S ? N + e - S : e;
  }
};

constexpr int kLane = 16;  // bytes that x86 shuffles within at no extra cost

template <int S, class V, int N>
GEOT_INLINE void exchange_blocks(V (&r)[N]) {
  if constexpr (S < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & S) continue;
      const V a = r[i], b = r[i + S];
      r[i] = shuffle<Exchange<N, S, false>>(a, b);
      r[i + S] = shuffle<Exchange<N, S, true>>(a, b);
    }
    exchange_blocks<2 * S>(r);
  }
}

// r[i][e] becomes r[e][i].
template <class V, int N>
GEOT_INLINE void transpose(V (&r)[N]) {
  static_assert(kElements<V> == N);
  constexpr int L = kLane / sizeof(Element<V>);
#pragma GCC unroll 16
  for (int i = 0; i < N; i += L) {
    if constexpr (L == 2) {
      const V a = r[i], b = r[i + 1];
      r[i] = shuffle<Zip<N, 2, 1, false>>(a, b);
      r[i + 1] = shuffle<Zip<N, 2, 1, true>>(a, b);
    } else {
      const V a = r[i], b = r[i + 1], c = r[i + 2], d = r[i + 3];
      const V ab0 = shuffle<Zip<N, 4, 1, false>>(a, b), ab1 = shuffle<Zip<N, 4, 1, true>>(a, b);
      const V cd0 = shuffle<Zip<N, 4, 1, false>>(c, d), cd1 = shuffle<Zip<N, 4, 1, true>>(c, d);
      r[i] = shuffle<Zip<N, 4, 2, false>>(ab0, cd0);
      r[i + 1] = shuffle<Zip<N, 4, 2, true>>(ab0, cd0);
      r[i + 2] = shuffle<Zip<N, 4, 2, false>>(ab1, cd1);
      r[i + 3] = shuffle<Zip<N, 4, 2, true>>(ab1, cd1);
    }
  }
  exchange_blocks<L>(r);
}

template <int S, class V, int N>
GEOT_INLINE V sum_blocks(V (&r)[N]) {
  if constexpr (N == 1) {
    return r[0];
  } else {
    V half[N / 2];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      constexpr int W = kElements<V>;
      half[i] = shuffle<Exchange<W, S, false>>(r[2 * i], r[2 * i + 1]) +
                shuffle<Exchange<W, S, true>>(r[2 * i], r[2 * i + 1]);
    }
    return sum_blocks<2 * S>(half);
  }
}

// Adds up the elements S, 2 S, 4 S, ... apart, in each of them.
template <int S, class V>
GEOT_INLINE V sum_replicas(V x) {
  constexpr int W = kElements<V>;
  if constexpr (S >= W) {
    return x;
  } else {
    return sum_replicas<2 * S>(shuffle<Exchange<W, S, false>>(x, x) +
                               shuffle<Exchange<W, S, true>>(x, x));
  }
}

template <class V>
GEOT_INLINE Element<V> sum_of(V x) {
  return sum_replicas<1>(x)[0];
}

// Element i of the result is the sum of the elements of r[i]; N vectors, 4 at least where there
// are 4 elements in 16 bytes.
template <class V, int N>
GEOT_INLINE V sums_of(V (&r)[N]) {
  constexpr int L = kLane / sizeof(Element<V>), W = kElements<V>;
  V group[N / L];
#pragma GCC unroll 16
  for (int i = 0; i < N / L; ++i) {
    V* x = r + i * L;
    V pair = shuffle<Zip<W, L, 1, false>>(x[0], x[1]) + shuffle<Zip<W, L, 1, true>>(x[0], x[1]);
    if constexpr (L == 4) {
      const V other =
          shuffle<Zip<W, L, 1, false>>(x[2], x[3]) + shuffle<Zip<W, L, 1, true>>(x[2], x[3]);
      const V both = pair;
      pair = shuffle<Zip<W, L, 2, false>>(both, other) + shuffle<Zip<W, L, 2, true>>(both, other);
    }
    group[i] = pair;
  }
  return sum_replicas<N>(sum_blocks<L>(group));
}

// Exponential and logarithm, to about one unit of rounding; NaN stays NaN.

template <class T>
struct ExpLog;

template <>
struct ExpLog<float> {
  static constexpr float kMagic = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
  static constexpr float kLowest = -87.33654f, kHighest = 88.0f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissa = 23, kBias = 127;
  // exp(r) = 1 + r + r² (c_0 + c_1 r + ...) for |r| <= ln(2)/2
  static constexpr float kExp[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                                   8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  static constexpr int kLogTerms = 5;
};
template <>
struct ExpLog<double> {
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 2^52
  static constexpr double kLowest = -708.3, kHighest = 709.4;
  static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kExp[] = {
      1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  static constexpr int kLogTerms = 11;
};

template <class V>
GEOT_INLINE V exp_of(V x) {
  using T = Element<V>;
  using C = ExpLog<T>;
  using Bit = std::make_unsigned_t<Integer<T>>;  // wraps around where x is out of range
  using Bits = Vector<Bit, kElements<V>>;
  V shifted = x * T(1.4426950408889634) + C::kMagic;
  const V n = shifted - C::kMagic;
  V r = x - n * C::kLn2High;
  r = r - n * C::kLn2Low;
  constexpr int kTerms = sizeof(C::kExp) / sizeof(T);
  V p = broadcast<V>(C::kExp[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) p = p * r + C::kExp[i];
  p = p * (r * r) + r + 1;
  const Bits two_to_n = ((Bits)shifted << C::kMantissa) + (Bit(C::kBias) << C::kMantissa);
  p = p * (V)two_to_n;
  p = x < C::kLowest ? V{} : p;
  return x > C::kHighest ? broadcast<V>(__builtin_huge_val()) : p;
}

// For x >= the smallest normal number, infinity included.
template <class V>
GEOT_INLINE V log_of(V x) {
  using T = Element<V>;
  using C = ExpLog<T>;
  using I = Integers<V>;
  const Integer<T> root_half =
      sizeof(T) == 4 ? Integer<T>(0x3f3504f3) : Integer<T>(0x3fe6a09e667f3bcdLL);
  const I exponent = ((I)x - root_half) >> C::kMantissa;  // of 2 in sqrt(1/2) <= m < sqrt(2)
  const V m = (V)((I)x - (exponent << C::kMantissa));
  const V s = (m - 1) / (m + 1), square = s * s;
  V series = broadcast<V>(T(1) / (2 * C::kLogTerms + 1));
#pragma GCC unroll 16
  for (int i = C::kLogTerms - 1; i >= 0; --i) series = series * square + T(1) / (2 * i + 1);
  const V n = __builtin_convertvector(exponent, V);
  const V log = n * C::kLn2High + (2 * s * series + n * C::kLn2Low);
  return x < broadcast<V>(__builtin_huge_val()) ? log : x;
}

}  // namespace geot::cpu::GEOT_ISA

namespace geot {

// Of SIMD vectors, element by element.
template <class V>
struct Math {
  static GEOT_INLINE V sqrt(V x) {
    V root;
    for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) {
      root[i] = sizeof(x[0]) == 4 ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
    }
    return root;
  }
  static GEOT_INLINE V exp(V x) { return cpu::GEOT_ISA::exp_of(x); }
};

}  // namespace geot
