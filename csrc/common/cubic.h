// The radial function as a table: the cubic of one interval, its derivatives and their adjoint.
//
//   f(t) = c0 + c1 t + c2 t² + c3 t³,   u = (z - z_min) / h,   t = u - g,   0 <= t <= 1
//
// with c from the knots' values y and slopes s (times h) of MATH.md section 4, written with
// y1 - y0, so that no derivative is a difference of large numbers. Derivatives are those by t;
// du/dz is `slope_of_coordinate`. V is a scalar or a SIMD vector of channels.
#pragma once

#include "macros.h"

namespace geot {

// What the two knots of an interval hold, or the weights that reach them.
template <class V>
struct Knots {
  V y0, s0, y1, s1;
};

template <class V>
struct Cubic {
  V c0, c1, c2, c3;

  template <class S>
  GEOT_INLINE V value(S t) const {
    return c0 + t * (c1 + t * (c2 + t * c3));
  }
  template <class S>
  GEOT_INLINE V slope(S t) const {
    return c1 + t * (2 * c2 + (3 * t) * c3);
  }
  template <class S>
  GEOT_INLINE V curvature(S t) const {
    return 2 * c2 + (6 * t) * c3;
  }
};

template <class V>
GEOT_INLINE Cubic<V> cubic_of_knots(const Knots<V>& k) {
  const V rise = k.y1 - k.y0;
  return {k.y0, k.s0, 3 * rise - 2 * k.s0 - k.s1, k.s0 + k.s1 - 2 * rise};
}

// The adjoint of `cubic_of_knots`: from weights on the coefficients to weights on the knots.
template <class V>
GEOT_INLINE Knots<V> knots_of_cubic(const Cubic<V>& a) {
  const V rise = 3 * a.c2 - 2 * a.c3;
  return {a.c0 - rise, a.c1 - 2 * a.c2 + a.c3, rise, a.c3 - a.c2};
}

// The adjoint of `value` and of `slope`: weight `g` on f(t), weight `g_dot` on f'(t).
template <class V, class S>
GEOT_INLINE Cubic<V> adjoint_of_value(V g, S t) {
  return {g, g * t, g * (t * t), g * (t * t * t)};
}
template <class V, class S>
GEOT_INLINE Cubic<V> adjoint_of_value_and_slope(V g, V g_dot, S t) {
  return {g, g * t + g_dot, g * (t * t) + g_dot * (2 * t), g * (t * t * t) + g_dot * (3 * t * t)};
}

// Uniform knots from z_min to z_max.
template <class T>
struct Grid {
  T z_min, z_max, per_h;
  int intervals;

  static Grid make(double z_min, double z_max, int intervals) {
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
