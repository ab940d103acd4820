// The score S_ij = κ Σ_c q_ic k_jc f_c(z_ij) of one head, its tangent and their adjoints, for a
// warp's pairs (MATH.md sections 1 to 3). `own` are features of rows, `other` of columns: (q, k) by
// rows, (k, q) by keys.
//
// A lane goes through the channels of its pairs, four at a time, and reads the table where it lies:
// a row of it is as long as all heads' channels.
#pragma once

#include "../common/score.h"
#include "radial.cuh"
#include "row_sum.cuh"

namespace geot::cuda {

template <class T>
class Filter {
 public:
  using Feature = T;
  using F = T;
  static constexpr int kTiles = sizeof(F) == 8 ? 2 : 4, kColumns = 8 * kTiles;
  static constexpr bool kIsNarrow = false;

  struct Memory {
    SumMemory<F> sums;
    Matrix<F> z, z_dot, b, e_dot;
  };
  static GEOT_INLINE Memory take(Carver& carver, const Inputs& in, const Plan& plan, bool, bool,
                                 int columns, int num_sums, bool is_second = false) {
    const int rows = kWarpRows * plan.warps;
    Memory memory{};
    memory.sums = SumMemory<F>::take(carver, num_sums, rows, in.head_dim);
    memory.z = Matrix<F>::take(carver, rows, columns);
    if (num_sums > 1) memory.b = Matrix<F>::take(carver, rows, columns);
    if (is_second) {
      memory.z_dot = Matrix<F>::take(carver, rows, columns);
      memory.e_dot = Matrix<F>::take(carver, rows, columns);
    }
    return memory;
  }

  GEOT_DEVICE Filter(const Work& work, const Memory& memory, const void* radial_dot,
                     const Sums* sums)
      : memory_(memory),
        grid_(Grid<F>::make(work.in.r_min, work.in.r_max, int(work.in.num_knots) - 1)),
        scale_(F(work.in.scale)),
        head_dim_(int(work.in.head_dim)),
        has_tables_(work.in.num_tables > 1),
        by_four_(head_dim_ % 4 == 0 && reinterpret_cast<uintptr_t>(work.in.radial) % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(radial_dot) % 16 == 0),
        stride_(work.in.num_channels) {
    const int64_t first = work.head * work.in.head_dim;
    table_ = static_cast<const F*>(work.in.radial) + first;
    if (radial_dot != nullptr) table_dot_ = static_cast<const F*>(radial_dot) + first;
    if (sums != nullptr && sums->knots != nullptr) {
      sums_ = sums->knots + first;
      per_quantum_ = F(sums->quantum[1]);
    }
  }

  // What pairs have that outlasts the channels: z and ż; sums b̄ and ẽ.
  struct Side {
    View<F> z, z_dot, b, e_dot;
  };
  GEOT_DEVICE Side by_rows(int column) const {
    return {memory_.z.rows(column), memory_.z_dot.rows(column), memory_.b.rows(column),
            memory_.e_dot.rows(column)};
  }
  GEOT_DEVICE Side by_columns(int row) const {
    return {memory_.z.columns(row), memory_.z_dot.columns(row), {}, {}};
  }

  using RowSum = SharedSum<F>;
  GEOT_DEVICE RowSum sum(int which) const { return {memory_.sums, which, head_dim_}; }

  template <bool, class PairAt>
  GEOT_DEVICE void scores(const View<F>& s, const View<F>&, const Side& side, const Tile<F>& own,
                          const Tile<F>& other, int columns, const PairAt& pair_at) const {
    for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
      const PairOfAtoms<F> pair = pair_at(half, j);
      side.z(i, j) = pair.z;
      const Place<F> place = place_of(grid_, pair.table, pair.z);
      const Weights<F> weights = weights_of_value(place.t);
      Four<F> sum{};
      for (int c = 0; c < head_dim_; c += 4) {
        sum += channels(own, {}, i, other, {}, j, c).term(value(knots(table_, place, c), weights));
      }
      s(i, j) = scale_ * sum.sum();
    });
  }

  template <class PairAt, class Finish>
  GEOT_DEVICE void pull(RowSum& sum, const View<F>& e, const View<F>&, const Side& side,
                        const Tile<F>& own, const Tile<F>& other, int columns,
                        const PairAt& pair_at, bool needs_b, bool needs_radial,
                        const Finish& finish) const {
    for (int c = 0; c < head_dim_; c += 4) {
      Four<F> sums[2] = {};
      for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
        const Place<F> place = place_at(side, half, i, j, pair_at);
        const Knots<Four<F>> k = knots(table_, place, c);
        const Channels ch = channels(own, {}, i, other, {}, j, c);
        const F pull = e(i, j);
        sums[half] += pull * (ch.k * value(k, weights_of_value(place.t)));
        if (!needs_b && !needs_radial) return;
        const Four<F> g = ch.pull(scale_ * pull);
        if (needs_b) {
          const F b = (g * derivative(k, weights_of_slope(place.t))).sum() * place.per_h;
          side.b(i, j) = c == 0 ? b : side.b(i, j) + b;
        }
        if (needs_radial && pull != 0) {
          Knots<Four<F>> d_knots{};
          pull_value(d_knots, weights_of_value(place.t), g);
          add_to_sums(place.knot, c, d_knots);
        }
      });
      sum.add_four(c, sums);
    }
    if (!needs_b) return;
    for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
      finish(half, i, j, pair_at(half, j), side.b(i, j));
    });
  }

  template <class PairAt, class TangentAt>
  GEOT_DEVICE void scores_and_tangents(const View<F>& s, const View<F>& s_dot, const Side& side,
                                       const Tile<F>& own, const Tile<F>& own_dot,
                                       const Tile<F>& other, const Tile<F>& other_dot, int columns,
                                       const PairAt& pair_at, const TangentAt& tangent_at) const {
    for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
      const PairOfAtoms<F> pair = pair_at(half, j);
      const F z_dot = tangent_at(pair, half, j).z_dot;
      side.z(i, j) = pair.z;
      side.z_dot(i, j) = z_dot;
      const Place<F> place = place_of(grid_, pair.table, pair.z);
      Four<F> sum{}, sum_dot{};
      for (int c = 0; c < head_dim_; c += 4) {
        const Channels ch = channels(own, own_dot, i, other, other_dot, j, c);
        const Jets jets = jets_of(place, c, z_dot);
        sum += ch.term(jets.f);
        sum_dot += ch.term_tangent(jets.f, jets.f_dot);
      }
      s(i, j) = scale_ * sum.sum();
      s_dot(i, j) = scale_ * sum_dot.sum();
    });
  }

  template <class PairAt, class TangentAt, class Finish>
  GEOT_DEVICE void pull_second(RowSum& sum, const View<F>& e, const View<F>& s_bar,
                               const Side& side, const Tile<F>& own, const Tile<F>& own_dot,
                               const Tile<F>& other, const Tile<F>& other_dot, int columns,
                               const PairAt& pair_at, const TangentAt& tangent_at, bool needs_b,
                               bool needs_radial, const Finish& finish) const {
    for (int c = 0; c < head_dim_; c += 4) {
      Four<F> sums[2] = {};
      for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
        const Place<F> place = place_at(side, half, i, j, pair_at);
        const F z_dot = side.z_dot(i, j), pull = e(i, j), pull_bar = s_bar(i, j);
        const Jets f = jets_of(place, c, z_dot);
        const Channels ch = channels(own, own_dot, i, other, other_dot, j, c);
        sums[half] += filter_pull_second(pull, pull_bar, ch.k, ch.k_dot, f.f, f.f_dot);
        if (!needs_b && !needs_radial) return;
        const Four<F> g_dot = ch.pull(scale_ * pull);
        const Four<F> g_bar = ch.pull_second(scale_ * pull, scale_ * pull_bar);
        if (needs_b) {
          const F b = (g_bar * f.f1 + g_dot * f.f1_dot).sum(), e_dot = (g_dot * f.f1).sum();
          side.b(i, j) = c == 0 ? b : side.b(i, j) + b;
          side.e_dot(i, j) = c == 0 ? e_dot : side.e_dot(i, j) + e_dot;
        }
        if (needs_radial && (pull != 0 || pull_bar != 0)) {
          Knots<Four<F>> d_knots{};
          pull_value(d_knots, weights_of_value(place.t), g_bar);
          pull_derivative(d_knots, weights_of_slope(place.t), (z_dot * place.per_h) * g_dot);
          add_to_sums(place.knot, c, d_knots);
        }
      });
      sum.add_four(c, sums);
    }
    if (!needs_b) return;
    for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
      const PairOfAtoms<F> pair = pair_at(half, j);
      finish(half, i, j, pair, tangent_at(pair, half, j), side.b(i, j), side.e_dot(i, j));
    });
  }

  GEOT_DEVICE bool sums_gradient() const { return sums_ != nullptr; }
  GEOT_DEVICE void finish(const Work&, const Sums&) const {}

 private:
  using Channels = FilterChannel<Four<F>>;  // q: of the row, k: of the column

  template <class PairAt>
  GEOT_DEVICE Place<F> place_at(const Side& side, int half, int i, int j,
                                const PairAt& pair_at) const {
    return place_of(grid_, has_tables_ ? pair_at(half, j).table : 0, side.z(i, j));
  }

  // f and f', and their tangents f' ż + ḟ and f'' ż + ḟ', of four channels.
  struct Jets {
    Four<F> f, f1, f_dot, f1_dot;
  };
  GEOT_DEVICE Jets jets_of(const Place<F>& place, int c, F z_dot) const {
    const Knots<Four<F>> k = knots(table_, place, c);
    Jets jets;
    jets.f = value(k, weights_of_value(place.t));
    jets.f1 = place.per_h * derivative(k, weights_of_slope(place.t));
    jets.f_dot = z_dot * jets.f1;
    jets.f1_dot =
        (z_dot * place.per_h * place.per_h) * derivative(k, weights_of_curvature(place.t));
    if (table_dot_ != nullptr) {
      const Knots<Four<F>> k_dot = knots(table_dot_, place, c);
      jets.f_dot += value(k_dot, weights_of_value(place.t));
      jets.f1_dot += place.per_h * derivative(k_dot, weights_of_slope(place.t));
    }
    return jets;
  }

  static GEOT_DEVICE Channels channels(const Tile<F>& own, const Tile<F>& own_dot, int i,
                                       const Tile<F>& other, const Tile<F>& other_dot, int j,
                                       int c) {
    const auto four = [&](const Tile<F>& tile, int row) {
      return tile.data != nullptr ? tile.four(row, c) : Four<F>{};
    };
    return {four(own, i), four(other, j), four(own_dot, i), four(other_dot, j)};
  }

  GEOT_DEVICE Knots<Four<F>> knots(const F* table, const Place<F>& place, int c) const {
    const F* row = table + int64_t(place.knot) * 2 * stride_ + c;
    return {four(row, c), four(row + stride_, c), four(row + 2 * stride_, c),
            four(row + 3 * stride_, c)};
  }
  GEOT_DEVICE Four<F> four(const F* row, int c) const {
    if (by_four_) return *reinterpret_cast<const Four<F>*>(row);
    Four<F> x{};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (c + n < head_dim_) x.at[n] = row[n];
    }
    return x;
  }
  GEOT_DEVICE void add_to_sums(int knot, int c, const Knots<Four<F>>& k) const {
    unsigned long long* row = sums_ + int64_t(knot) * 2 * stride_ + c;
    const Four<F>* const parts[4] = {&k.y0, &k.s0, &k.y1, &k.s1};
#pragma unroll
    for (int part = 0; part < 4; ++part) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (c + n < head_dim_) {
          add_global(row + part * stride_ + n, units_of(parts[part]->at[n], per_quantum_));
        }
      }
    }
  }

  Memory memory_;
  Grid<F> grid_;
  F scale_;
  int head_dim_;
  bool has_tables_, by_four_;
  int64_t stride_;
  const F *table_, *table_dot_ = nullptr;
  unsigned long long* sums_ = nullptr;
  F per_quantum_ = 0;
};

}  // namespace geot::cuda
