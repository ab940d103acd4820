// The score `filter`, channel by channel: its product, tangent and adjoints (MATH.md sections 1 to
// 3). κ is in q and q̇. (The score `bias` adds f to a product of matrices: nothing to write.)
#pragma once

#include "macros.h"

namespace geot {

// What a pair's ordered half knows of a channel: q_i, k_j and their tangents (0 where absent).
template <class V>
struct FilterChannel {
  V q, k, q_dot, k_dot;

  // The terms of S and of Ṡ.
  GEOT_INLINE V term(V f) const { return q * k * f; }
  GEOT_INLINE V term_tangent(V f, V f_dot) const {
    return (q_dot * k + q * k_dot) * f + q * k * f_dot;
  }
  // dL/df of first order, and g̃ of second.
  template <class S>
  GEOT_INLINE V pull(S e) const {
    return e * (q * k);
  }
  // ḡ
  template <class S>
  GEOT_INLINE V pull_second(S e, S s_bar) const {
    return e * (q_dot * k + q * k_dot) + s_bar * (q * k);
  }
};

// The terms of grad q from (k, k̇), and of grad k from (q, q̇).
template <class V, class S>
GEOT_INLINE V filter_pull_second(S e, S s_bar, V x, V x_dot, V f, V f_dot) {
  return e * (x_dot * f + x * f_dot) + s_bar * (x * f);
}

}  // namespace geot
