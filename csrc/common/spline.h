// The radial function as a table of knots: the cubic of an interval, its derivatives, and where the
// table's coordinate is. Weights and adjoint are MATH.md section 4.
//
//   f = y0 + w_y (y1 - y0) + w_0 s0 + w_1 s1,     u = (z - z_min) / h,  t = u - g,  0 <= t <= 1
//
// A knot holds the value y and the slope s, times h. Derivatives are those by t; du/dz is
// `Grid::slope_of_coordinate`. Written with y1 - y0, no derivative is a difference of large
// numbers. V is a scalar or a SIMD vector.
#pragma once

#include "macros.h"

namespace geot {

// What the two knots of an interval hold, or their gradients.
template <class V>
struct Knots {
  V y0, s0, y1, s1;
};

// The weights of y1 - y0, s0 and s1 in a derivative of f.
template <class V>
struct Weights {
  V rise, s0, s1;
};
template <class V>
GEOT_INLINE Weights<V> weights_of_value(V t) {
  const V u = 1 - t;
  return {t * t * (3 - 2 * t), t * u * u, -t * t * u};
}
template <class V>
GEOT_INLINE Weights<V> weights_of_slope(V t) {
  return {6 * t * (1 - t), (3 * t - 4) * t + 1, (3 * t - 2) * t};
}
template <class V>
GEOT_INLINE Weights<V> weights_of_curvature(V t) {
  return {6 - 12 * t, 6 * t - 4, 6 * t - 2};
}

template <class V, class S>
GEOT_INLINE V derivative(const Knots<V>& k, const Weights<S>& w) {
  return w.rise * (k.y1 - k.y0) + w.s0 * k.s0 + w.s1 * k.s1;
}
template <class V, class S>
GEOT_INLINE V value(const Knots<V>& k, const Weights<S>& w) {
  return k.y0 + derivative(k, w);
}

// The adjoint of `derivative` and of `value`: what a weight g on them adds to the knots.
template <class V, class S>
GEOT_INLINE void pull_derivative(Knots<V>& k, const Weights<S>& w, V g) {
  const V rise = g * w.rise;
  k.y0 -= rise;
  k.s0 += g * w.s0;
  k.y1 += rise;
  k.s1 += g * w.s1;
}
template <class V, class S>
GEOT_INLINE void pull_value(Knots<V>& k, const Weights<S>& w, V g) {
  k.y0 += g;
  pull_derivative(k, w, g);
}

// Uniform knots from z_min to z_max.
template <class T>
struct Grid {
  T z_min, z_max, per_h;
  int intervals;

  static GEOT_INLINE Grid make(double z_min, double z_max, int intervals) {
    return {T(z_min), T(z_max), T(intervals / (z_max - z_min)), intervals};
  }
  // u, clamped: the function is constant below z_min and beyond z_max. NaN stays NaN.
  template <class V>
  GEOT_INLINE V coordinate(V z) const {
    V u = (z - z_min) * per_h;
    u = u < T(0) ? V{} : u;
    return u > T(intervals) ? V{} + T(intervals) : u;
  }
  // What to truncate for the interval g: a number, and in range, also where u is NaN.
  template <class V>
  GEOT_INLINE V in_range(V u) const {
    u = u >= T(0) ? u : V{};
    return u < T(intervals - 1) ? u : V{} + T(intervals - 1);
  }
  // du/dz: 0 where the function is constant.
  template <class V>
  GEOT_INLINE V slope_of_coordinate(V z) const {
    const V inside = z >= z_min ? V{} + per_h : V{};
    return z <= z_max ? inside : V{};
  }
};

}  // namespace geot
