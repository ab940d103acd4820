// The score S_ij = κ q_i·k_j + f(z_ij) of one head, its tangent and their adjoints, for a warp's
// pairs (MATH.md sections 1 to 3). `own` are features of rows, `other` of columns: (q, k) by rows,
// (k, q) by keys. What belongs to distances goes through the pairs in turn, into views.
#pragma once

#include "radial.cuh"
#include "row_sum.cuh"

namespace geot::cuda {

// `kWidth`: the most channels whose sums are in registers; 0: they are in shared memory.
// `kTiles`: columns of a tile, in eights.
template <class T, int kWidth, int kTilesOf>
class Bias {
 public:
  using Feature = T;
  using F = Compute<T>;
  static constexpr int kTiles = kTilesOf, kColumns = 8 * kTiles;
  static constexpr bool kIsNarrow =
      sizeof(F) == 4 && kWidth > 0 && kWidth <= 32;  // spares registers

  struct Memory {
    RadialMemory<F> radial;
    SumMemory<F> sums;
  };

  // `columns`: of the matrices of pairs; `num_sums`: of RowSum.
  static GEOT_INLINE Memory take(Carver& carver, const Inputs& in, const Plan& plan, bool has_dot,
                                 bool has_sums, int /*columns*/, int num_sums,
                                 bool /*is_second*/ = false) {
    Memory memory{RadialMemory<F>::take(carver, in, plan, has_dot, has_sums), {}};
    if (kWidth == 0) {
      memory.sums = SumMemory<F>::take(carver, num_sums, kWarpRows * plan.warps, in.head_dim);
    }
    return memory;
  }
  GEOT_DEVICE Bias(const Work& work, const Memory& memory, const void* radial_dot, const Sums* sums)
      : memory_(memory),
        radial_(work, memory.radial, radial_dot, sums),
        scale_(F(work.in.scale)),
        head_dim_(int(work.in.head_dim)) {}

  // Where the pairs of this warp with columns from `first` on are in the matrices.
  struct Side {};
  GEOT_DEVICE Side by_rows(int) const { return {}; }
  GEOT_DEVICE Side by_columns(int) const { return {}; }

  using RowSum = std::conditional_t<kWidth == 0, SharedSum<F>, RegisterSum<T, kWidth>>;
  GEOT_DEVICE RowSum sum(int which) const { return {memory_.sums, which, head_dim_}; }

  // S; and f' where that is wanted.
  template <bool kSlope, class PairAt>
  GEOT_DEVICE void scores(const View<F>& s, const View<F>& slope, const Side&, const Tile<T>& own,
                          const Tile<T>& other, int columns, const PairAt& pair_at) const {
    constexpr int kOrder = kSlope ? 1 : 0;
    const auto put = [&](int i, int j, const Jet<F>& jet) {
      s(i, j) = jet.f;
      if constexpr (kSlope) slope(i, j) = jet.f1;
    };
    if (radial_.is_plain()) {
      for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
        put(i, j, radial_.template plain_jet<kOrder>(pair_at.plain(half, j)));
      });
    } else {
      for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
        put(i, j, radial_.template jet<kOrder>(pair_at(half, j)));
      });
    }
    add_scaled(s, own, other, columns);
  }

  // Adds Σ_j E_ij ∂S_ij/∂own_i over κ, and to the gradient of f. Calls finish(half, i, j, pair, b)
  // with b = dL/dz of each pair where that is wanted.
  template <class PairAt, class Finish>
  GEOT_DEVICE void pull(RowSum& sum, const View<F>& e, const View<F>& slope, const Side&,
                        const Tile<T>&, const Tile<T>& other, int columns, const PairAt& pair_at,
                        bool needs_b, bool needs_radial, const Finish& finish) const {
    sum.add(e, other, columns);
    if (needs_radial && !radial_.is_table()) radial_.add_to_moments(e, columns, pair_at);
    const bool needs_knots = needs_radial && radial_.is_table();
    if (!needs_b && !needs_knots) return;
    for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
      const PairOfAtoms<F> pair = pair_at(half, j);
      const F g = e(i, j);
      if (needs_knots && g != 0) radial_.add_to_knots(pair, g);
      if (needs_b) finish(half, i, j, pair, g * slope(i, j));
    });
  }

  // S and Ṡ. Absent tangents are tiles of nothing.
  template <class PairAt, class TangentAt>
  GEOT_DEVICE void scores_and_tangents(const View<F>& s, const View<F>& s_dot, const Side&,
                                       const Tile<T>& own, const Tile<T>& own_dot,
                                       const Tile<T>& other, const Tile<T>& other_dot, int columns,
                                       const PairAt& pair_at, const TangentAt& tangent_at) const {
    for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
      const PairOfAtoms<F> pair = pair_at(half, j);
      const Jet<F> jet = radial_.template jet<1>(pair);
      s(i, j) = jet.f;
      s_dot(i, j) = jet.f1 * tangent_at(pair, half, j).z_dot;
      if (radial_.has_dot()) s_dot(i, j) += radial_.jet_dot(pair).f;
    });
    add_scaled(s, own, other, columns);
    if (own_dot.data != nullptr) add_scaled(s_dot, own_dot, other, columns);
    if (other_dot.data != nullptr) add_scaled(s_dot, own, other_dot, columns);
  }

  // Adds Σ_j (S̄ other + E other_dot), and to the gradient of f. Calls
  // finish(half, i, j, pair, tangent, b̄, ẽ) of each pair where these are wanted.
  template <class PairAt, class TangentAt, class Finish>
  GEOT_DEVICE void pull_second(RowSum& sum, const View<F>& e, const View<F>& s_bar, const Side&,
                               const Tile<T>&, const Tile<T>&, const Tile<T>& other,
                               const Tile<T>& other_dot, int columns, const PairAt& pair_at,
                               const TangentAt& tangent_at, bool needs_b, bool needs_radial,
                               const Finish& finish) const {
    sum.add(s_bar, other, columns);
    if (other_dot.data != nullptr) sum.add(e, other_dot, columns);
    if (!needs_b && !needs_radial) return;
    for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
      const PairOfAtoms<F> pair = pair_at(half, j);
      const PairTangent<F> tangent = tangent_at(pair, half, j);
      const F g_bar = s_bar(i, j), g_dot = e(i, j);
      if (needs_radial && (g_bar != 0 || g_dot != 0)) {
        radial_.add_second_to_knots(pair, g_bar, g_dot * tangent.z_dot);
      }
      if (needs_b) {
        const Jet<F> jet = radial_.template jet<2>(pair);
        F curvature = jet.f2 * tangent.z_dot;
        if (radial_.has_dot()) curvature += radial_.jet_dot(pair).f1;
        finish(half, i, j, pair, tangent, g_bar * jet.f1 + g_dot * curvature, g_dot * jet.f1);
      }
    });
  }

  GEOT_DEVICE bool sums_gradient() const { return radial_.sums_gradient(); }
  GEOT_DEVICE void finish(const Work& work, const Sums& sums) const { radial_.finish(work, sums); }

 private:
  // s_ij += κ own_i · other_j
  GEOT_DEVICE void add_scaled(const View<F>& s, const Tile<T>& own, const Tile<T>& other,
                              int columns) const {
    products<T, F, kTiles>(own, other, columns, head_dim_,
                           [&](int i, int j, F product) { s(i, j) += scale_ * product; });
  }

  Memory memory_;
  HeadRadial<F> radial_;
  F scale_;
  int head_dim_;
};

}  // namespace geot::cuda
