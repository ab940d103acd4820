// A pair of atoms: distance, direction, radial coordinate, and how their derivatives pull back on
// the positions (MATH.md sections 1 to 3). V is a scalar or a SIMD vector of pairs; Math<V> gives
// its square root.
#pragma once

#include "math.h"

namespace geot {

template <class V>
struct Vector3 {
  V x, y, z;

  GEOT_INLINE Vector3 operator-(const Vector3& o) const { return {x - o.x, y - o.y, z - o.z}; }
  GEOT_INLINE Vector3 operator+(const Vector3& o) const { return {x + o.x, y + o.y, z + o.z}; }
  GEOT_INLINE Vector3 operator*(V s) const { return {x * s, y * s, z * s}; }
  GEOT_INLINE V dot(const Vector3& o) const { return x * o.x + y * o.y + z * o.z; }
};

template <class V>
GEOT_INLINE V distance(const Vector3<V>& apart) {
  return Math<V>::sqrt(apart.dot(apart));
}

// 1 / d; 0 where two atoms are at one point, so that every derivative there is 0.
template <class V>
GEOT_INLINE V inverse_distance(V dist) {
  return dist != 0 ? 1 / (dist != 0 ? dist : V{} + 1) : V{};
}

// The radial coordinate's tangent ż = m ḋ + ṁ d + ċ.
template <class V>
GEOT_INLINE V coordinate_tangent(V m, V d_dot, V m_dot, V dist, V c_dot) {
  return m * d_dot + m_dot * dist + c_dot;
}

// What a pair gives to x_i (and takes from x_j): dL/dd along u.
template <class V>
GEOT_INLINE Vector3<V> force(V slope, const Vector3<V>& u) {
  return u * slope;
}

// w = (m b̄ + ṁ ẽ) u + (m ẽ / d)(ẋ_ij - u ḋ)
template <class V>
GEOT_INLINE Vector3<V> second_force(V m, V m_dot, V b_bar, V e_dot, V per_dist, const Vector3<V>& u,
                                    const Vector3<V>& x_dot, V d_dot) {
  return u * (m * b_bar + m_dot * e_dot) + (x_dot - u * d_dot) * (m * e_dot * per_dist);
}

}  // namespace geot
