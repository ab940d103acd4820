// The radial function of one head of a bias, and its gradient: a table, in shared memory where it
// fits, or a sum of Gaussians (MATH.md sections 4 and 5).
#pragma once

#include "sums.cuh"
#include "work.cuh"

namespace geot::cuda {

// f and its derivatives by z.
template <class F>
struct Jet {
  F f, f1, f2;
};

// Where z lies in a table: the knot before it, how far beyond, and dt/dz.
template <class F>
struct Place {
  int knot;
  F t, per_h;
};
template <class F>
GEOT_DEVICE Place<F> place_of(const Grid<F>& grid, int table, F z) {
  const F u = grid.coordinate(z);
  if constexpr (sizeof(F) == 8) {
    const int interval = int(grid.in_range(u));
    return {table + interval, u - F(interval), grid.slope_of_coordinate(z)};
  } else {
    // Truncation without conversions, which are slow: beyond 1.5 2^23 numbers are whole, and the
    // low bits are theirs. Between u - 1/2 rounded up or down there is no difference: t is 1 or 0.
    constexpr float kWhole = 12582912;
    union {
      float number;
      int bits;
    } whole{grid.in_range(u - 0.5f) + kWhole};
    return {table + (whole.bits & 0x3fffff), u - (whole.number - kWhole),
            grid.slope_of_coordinate(z)};
  }
}

// Knots [P num_knots] of (value, slope), `stride` numbers apart, or a copy that has them together.
template <class F>
struct HeadTable {
  const F* data;
  int64_t stride;
  const F* copy;

  static GEOT_DEVICE Knots<F> in_copy(const F* copy, int knot) {
    struct alignas(2 * sizeof(F)) Knot {
      F y, s;
    };
    const Knot* k = reinterpret_cast<const Knot*>(copy) + knot;
    const Knot left = k[0], right = k[1];
    return {left.y, left.s, right.y, right.s};
  }
  GEOT_DEVICE Knots<F> at(int knot) const {
    if (copy != nullptr) return in_copy(copy, knot);
    const F* k = data + 2 * knot * stride;
    return {k[0], k[stride], k[2 * stride], k[3 * stride]};
  }
};

template <int kOrder, class F>
GEOT_DEVICE Jet<F> jet_of(const Knots<F>& k, const Place<F>& place) {
  Jet<F> jet{value(k, weights_of_value(place.t)), 0, 0};
  if constexpr (kOrder > 0) jet.f1 = derivative(k, weights_of_slope(place.t)) * place.per_h;
  if constexpr (kOrder > 1) {
    jet.f2 = derivative(k, weights_of_curvature(place.t)) * (place.per_h * place.per_h);
  }
  return jet;
}

template <class F>
struct RadialMemory {
  F *table, *table_dot, *gaussians, *moments;
  unsigned* sums;

  static GEOT_INLINE RadialMemory take(Carver& carver, const Inputs& in, const Plan& plan,
                                       bool has_dot, bool has_sums) {
    const int64_t knots = in.num_tables * in.num_knots, k = in.num_gaussians;
    RadialMemory memory{};
    if (k > 0) {
      memory.gaussians = carver.take<F>(3 * k);
      if (has_sums) memory.moments = carver.take<F>(plan.warps * 3 * k);
    }
    if (plan.shares_table && k == 0) {
      memory.table = carver.take<F>(2 * knots);
      if (has_dot) memory.table_dot = carver.take<F>(2 * knots);
    }
    if (plan.shares_sums && k == 0 && has_sums) {
      memory.sums = IntegerSums<F>::take(carver, knots);
    }
    return memory;
  }
};

template <class F>
class HeadRadial {
 public:
  // All threads of the block; what it holds can be read after a barrier.
  GEOT_DEVICE HeadRadial(const Work& work, const RadialMemory<F>& memory, const void* radial_dot,
                         const Sums* sums)
      : grid_(Grid<F>::make(work.in.r_min, work.in.r_max, int(work.in.num_knots) - 1)),
        num_gaussians_(int(work.in.num_gaussians)),
        is_plain_(memory.table != nullptr && work.in.pairs == nullptr && work.in.affine == nullptr),
        gaussians_(memory.gaussians),
        moments_(memory.moments) {
    const Inputs& in = work.in;
    const F* radial = static_cast<const F*>(in.radial);
    if (num_gaussians_ > 0) {
      for (int n = thread_index(); n < 3 * num_gaussians_; n += num_threads()) {
        const int64_t row = n < 2 * num_gaussians_ ? 0 : work.head;
        gaussians_[n] = radial[n + row * num_gaussians_];
      }
      for (int n = thread_index(); moments_ != nullptr && n < 3 * num_gaussians_ * work.plan.warps;
           n += num_threads()) {
        moments_[n] = 0;
      }
      sums_.begin(nullptr, nullptr, 0, 0, F(0));
      return;
    }
    const int64_t knots = in.num_tables * in.num_knots;
    table_ = load(memory.table, radial + work.head, knots, in.num_channels);
    if (radial_dot != nullptr) {
      table_dot_ = load(memory.table_dot, static_cast<const F*>(radial_dot) + work.head, knots,
                        in.num_channels);
    }
    const bool wanted = sums != nullptr && sums->knots != nullptr;
    sums_.begin(wanted ? memory.sums : nullptr, wanted ? sums->knots + work.head : nullptr, knots,
                in.num_channels, wanted ? F(sums->quantum[1]) : F(0));
  }

  GEOT_DEVICE Place<F> place(const PairOfAtoms<F>& pair) const {
    return place_of(grid_, pair.table, pair.z);
  }

  // Gaussians have no second derivative here: their second backward pass is plain PyTorch's.
  template <int kOrder>
  GEOT_DEVICE Jet<F> jet(const PairOfAtoms<F>& pair) const {
    if (num_gaussians_ == 0) {
      const Place<F> place = this->place(pair);
      return jet_of<kOrder>(table_.at(place.knot), place);
    }
    Jet<F> sum{};
    for (int k = 0; k < num_gaussians_; ++k) {
      const F apart = pair.z - center(k), phi = weight(k) * Math<F>::exp(-gamma(k) * apart * apart);
      sum.f += phi;
      if constexpr (kOrder > 0) sum.f1 -= 2 * gamma(k) * apart * phi;
    }
    return sum;
  }
  // Whether pairs are plain and the table is copied: what most problems are, and loops are short.
  GEOT_DEVICE bool is_plain() const { return is_plain_; }
  template <int kOrder>
  GEOT_DEVICE Jet<F> plain_jet(const PairOfAtoms<F>& pair) const {
    const Place<F> place = this->place(pair);
    return jet_of<kOrder>(HeadTable<F>::in_copy(table_.copy, place.knot), place);
  }
  GEOT_DEVICE bool has_dot() const { return table_dot_.data != nullptr; }
  GEOT_DEVICE Jet<F> jet_dot(const PairOfAtoms<F>& pair) const {
    const Place<F> place = this->place(pair);
    return jet_of<1>(table_dot_.at(place.knot), place);
  }

  GEOT_DEVICE bool sums_gradient() const { return sums_ || moments_ != nullptr; }

  GEOT_DEVICE bool is_table() const { return num_gaussians_ == 0; }

  // Adds g = dL/df of a pair to the sums of knots.
  GEOT_DEVICE void add_to_knots(const PairOfAtoms<F>& pair, F g) const {
    const Place<F> place = this->place(pair);
    Knots<F> knots{};
    pull_value(knots, weights_of_value(place.t), g);
    add(place.knot, knots);
  }
  // Adds Σ g φ, Σ g e φ, Σ g e² φ with e = z - μ, of the pairs of a warp, to those of Gaussians.
  template <class PairAt>
  GEOT_DEVICE void add_to_moments(const View<F>& g, int columns, const PairAt& pair_at) const {
#pragma unroll 1
    for (int k = 0; k < num_gaussians_; ++k) {
      F m[3] = {};
      for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
        const F apart = pair_at(half, j).z - center(k);
        const F g_phi = g(i, j) * Math<F>::exp(-gamma(k) * apart * apart);
        m[0] += g_phi;
        m[1] += g_phi * apart;
        m[2] += g_phi * apart * apart;
      });
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        const F sum = sum_of_warp(m[p]);
        if (lane() == 0) moments_[(3 * warp() + p) * num_gaussians_ + k] += sum;
      }
    }
  }
  // ḡ on the value, and g̃ ż on the derivative.
  GEOT_DEVICE void add_second_to_knots(const PairOfAtoms<F>& pair, F g_bar, F g_z_dot) const {
    const Place<F> place = this->place(pair);
    Knots<F> knots{};
    pull_value(knots, weights_of_value(place.t), g_bar);
    pull_derivative(knots, weights_of_slope(place.t), g_z_dot * place.per_h);
    add(place.knot, knots);
  }

  // All threads of the block, after a barrier at its end.
  GEOT_DEVICE void finish(const Work& work, const Sums& sums) const {
    if (sums_) sums_.flush();
    if (moments_ == nullptr) return;
    F* to = static_cast<F*>(sums.moments) +
            (work.chunk * work.in.num_heads + work.head) * 3 * num_gaussians_;
    for (int n = thread_index(); n < 3 * num_gaussians_; n += num_threads()) {
      F sum = 0;
      for (int w = 0; w < work.plan.warps; ++w) sum += moments_[w * 3 * num_gaussians_ + n];
      to[n] = sum;
    }
  }

 private:
  GEOT_DEVICE void add(int knot, const Knots<F>& k) const {
    sums_.add(knot, k.y0, k.s0);
    sums_.add(knot + 1, k.y1, k.s1);
  }
  static GEOT_DEVICE HeadTable<F> load(F* shared, const F* global, int64_t knots, int64_t stride) {
    for (int64_t n = thread_index(); shared != nullptr && n < 2 * knots; n += num_threads()) {
      shared[n] = global[n * stride];
    }
    return {global, stride, shared};
  }
  GEOT_DEVICE F center(int k) const { return gaussians_[k]; }
  GEOT_DEVICE F gamma(int k) const { return gaussians_[num_gaussians_ + k]; }
  GEOT_DEVICE F weight(int k) const { return gaussians_[2 * num_gaussians_ + k]; }

  Grid<F> grid_;
  int num_gaussians_;
  bool is_plain_;
  F *gaussians_, *moments_;
  HeadTable<F> table_{}, table_dot_{};
  IntegerSums<F> sums_;
};

}  // namespace geot::cuda
