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

// Pairs of sums, in shared memory first, or in global memory right away: of one head's knots
// [P num_knots, 2], or of the affine map [P', 2].
template <class F>
class IntegerSums {
 public:
  static GEOT_INLINE unsigned* take(Carver& carver, int64_t num_pairs) {
    return carver.take<unsigned>(4 * num_pairs);
  }
  // `shared`: null where sums have no place there; `global`: null where there are no sums.
  GEOT_DEVICE void begin(unsigned* shared, unsigned long long* global, int64_t num_pairs,
                         int64_t stride, F per_quantum) {
    shared_ = shared;
    global_ = global;
    num_pairs_ = num_pairs;
    stride_ = stride;
    per_quantum_ = per_quantum;
    for (int64_t n = thread_index(); shared != nullptr && n < 4 * num_pairs; n += num_threads()) {
      shared[n] = 0;
    }
  }
  GEOT_DEVICE explicit operator bool() const { return global_ != nullptr; }

  GEOT_DEVICE void add(int64_t pair, F x, F y) const {
    add_to(2 * pair, x);
    add_to(2 * pair + 1, y);
  }

  // Shared sums to global memory; between barriers.
  GEOT_DEVICE void flush() const {
    for (int64_t n = thread_index(); shared_ != nullptr && n < 2 * num_pairs_; n += num_threads()) {
      const unsigned long long sum =
          shared_[2 * n] | static_cast<unsigned long long>(shared_[2 * n + 1]) << 32;
      if (sum != 0) add_global(global_ + n * stride_, sum);
    }
  }

 private:
  GEOT_DEVICE void add_to(int64_t n, F x) const {
    const unsigned long long units = units_of(x, per_quantum_);
    if (shared_ == nullptr) return add_global(global_ + n * stride_, units);
    const unsigned low = unsigned(units), before = add_shared(shared_ + 2 * n, low);
    const unsigned high = unsigned(units >> 32) + (before + low < before ? 1 : 0);
    if (high != 0) add_shared(shared_ + 2 * n + 1, high);
  }

  unsigned* shared_;
  unsigned long long* global_;
  int64_t num_pairs_, stride_;
  F per_quantum_;
};

// Those of the affine map; all heads add to the same.
template <class F>
class AffineSums {
 public:
  static GEOT_INLINE unsigned* take(Carver& carver, const Inputs& in, const Sums& sums) {
    const bool is_shared = sums.affine != nullptr && in.num_affine <= kMostShared;
    return is_shared ? IntegerSums<F>::take(carver, in.num_affine) : nullptr;
  }
  GEOT_DEVICE AffineSums(const Inputs& in, const Sums& sums, unsigned* shared) {
    const bool is_wanted = sums.affine != nullptr;
    sums_.begin(shared, sums.affine, in.num_affine, 1, is_wanted ? F(sums.quantum[3]) : F(0));
  }
  GEOT_DEVICE explicit operator bool() const { return bool(sums_); }
  GEOT_DEVICE void add(int pair, F d_m, F d_c) const { sums_.add(pair, d_m, d_c); }
  // All threads of the block, after a barrier at its end.
  GEOT_DEVICE void finish() const {
    if (sums_) sums_.flush();
  }

 private:
  static constexpr int64_t kMostShared = 512;
  IntegerSums<F> sums_;
};

}  // namespace geot::cuda
