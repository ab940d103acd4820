// The normalizers, number by number, for all three passes (MATH.md sections 1 to 3).
//
//   softmax   P = exp(S - L),   E = P (A - δ),   G = Ṡ (A - δ) - ρ A + Ȧ,   Ṗ = P (Ṡ - ρ),   S̄ = P
//   (G - ε) linear    P = S,            E = A,                                      Ṗ = Ṡ, S̄ = Ȧ
//
// `a` stands for A - δ throughout (linear: δ = 0), which is what a kernel accumulates. In G that
// drops -ρ δ, a constant of the row, which G - ε does not see; so ε = Σ P G is taken of
// G = (Ṡ - ρ) a + Ȧ. V is a scalar or a SIMD vector;
// Math<V> gives its exponential.
#pragma once

#include "math.h"

namespace geot {

struct Softmax {
  static constexpr bool kIsLinear = false;

  template <class V>
  static GEOT_INLINE V weight(V s, V log_sum) {
    return Math<V>::exp(s - log_sum);
  }
  template <class V>
  static GEOT_INLINE V score_gradient(V p, V a) {
    return p * a;
  }
  template <class V>
  static GEOT_INLINE V second(V s_dot, V a, V rho, V a_dot) {
    return (s_dot - rho) * a + a_dot;
  }
  template <class V>
  static GEOT_INLINE V weight_tangent(V p, V s_dot, V rho) {
    return p * (s_dot - rho);
  }
  template <class V>
  static GEOT_INLINE V score_second_gradient(V p, V g, V epsilon) {
    return p * (g - epsilon);
  }
};

struct Linear {
  static constexpr bool kIsLinear = true;

  template <class V>
  static GEOT_INLINE V weight(V s, V) {
    return s;
  }
  template <class V>
  static GEOT_INLINE V score_gradient(V, V a) {
    return a;
  }
  template <class V>
  static GEOT_INLINE V second(V, V, V, V a_dot) {
    return a_dot;
  }
  template <class V>
  static GEOT_INLINE V weight_tangent(V, V s_dot, V) {
    return s_dot;
  }
  template <class V>
  static GEOT_INLINE V score_second_gradient(V, V g, V) {
    return g;
  }
};

}  // namespace geot
