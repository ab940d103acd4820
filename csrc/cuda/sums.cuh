// Sums over all pairs, of knots and of the affine map: integers, in units of a quantum that a bound
// on what the sums could be gives (bounds.cuh). Integers have one sum in any order, so results
// repeat bit for bit.
//
// In shared memory a sum is two words, added to by native 32-bit atomics: the lower, and the upper
// with the carry.
#pragma once

#include "../common/spline.h"
#include "shared.cuh"

namespace geot::cuda {

template <class F>
GEOT_DEVICE unsigned long long units_of(F x, F per_quantum) {
  return static_cast<unsigned long long>(llrint(x * per_quantum));
}

// Whether there are sums of the radial function's parameters.
GEOT_INLINE bool has_sums(const Sums& sums) {
  return sums.knots != nullptr || sums.moments != nullptr;
}

// The sums of one head's knots [P num_knots, 2], in shared memory, or in global right away.
template <class F>
class KnotSums {
 public:
  // `shared`: 4 words for each knot, or null.
  GEOT_DEVICE void begin(unsigned* shared, unsigned long long* global, int64_t num_knots,
                         int64_t stride, F per_quantum) {
    shared_ = shared;
    global_ = global;
    num_knots_ = num_knots;
    stride_ = stride;
    per_quantum_ = per_quantum;
    if (shared_ != nullptr) {
      for (int64_t n = thread_index(); n < 4 * num_knots; n += num_threads()) shared_[n] = 0;
    }
  }
  GEOT_DEVICE explicit operator bool() const { return global_ != nullptr; }

  // What an interval's two knots are given.
  GEOT_DEVICE void add(int64_t knot, const Knots<F>& k) const {
    add(2 * knot, k.y0);
    add(2 * knot + 1, k.s0);
    add(2 * knot + 2, k.y1);
    add(2 * knot + 3, k.s1);
  }

  // Shared sums to global memory; between barriers.
  GEOT_DEVICE void flush() const {
    if (shared_ == nullptr) return;
    for (int64_t n = thread_index(); n < 2 * num_knots_; n += num_threads()) {
      const unsigned long long sum =
          shared_[2 * n] | static_cast<unsigned long long>(shared_[2 * n + 1]) << 32;
      if (sum != 0) add_global(global_ + n * stride_, sum);
    }
  }

 private:
  GEOT_DEVICE void add(int64_t n, F x) const {
    const unsigned long long units = units_of(x, per_quantum_);
    if (shared_ == nullptr) return add_global(global_ + n * stride_, units);
    const unsigned low = unsigned(units), before = add_shared(shared_ + 2 * n, low);
    const unsigned high = unsigned(units >> 32) + (before + low < before ? 1 : 0);
    if (high != 0) add_shared(shared_ + 2 * n + 1, high);
  }

  unsigned* shared_;
  unsigned long long* global_;
  int64_t num_knots_, stride_;
  F per_quantum_;
};

// The sums of (m, c) of each pair of types, [P', 2].
template <class F>
struct AffineSums {
  unsigned long long* global;
  F per_quantum;

  GEOT_DEVICE AffineSums(const Sums& sums)
      : global(sums.affine), per_quantum(global != nullptr ? F(sums.quantum[3]) : F(0)) {}
  GEOT_DEVICE explicit operator bool() const { return global != nullptr; }
  GEOT_DEVICE void add(int pair, F d_m, F d_c) const {
    add_global(global + 2 * pair, units_of(d_m, per_quantum));
    add_global(global + 2 * pair + 1, units_of(d_c, per_quantum));
  }
};

}  // namespace geot::cuda
