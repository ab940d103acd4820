// A block of pairs, the query atoms i of a tile against some key atoms j, and its geometry.
//
// Everything about pairs is stored as [j, i]: the lanes of a vector are query atoms, so that sums
// over keys need no horizontal step.
#pragma once

#include "../common/geometry.h"
#include "../common/spline.h"
#include "molecule.h"

namespace geot::cpu::GEOT_ISA {

constexpr int64_t kKeys = 32;  // key atoms of a block

template <class T>
using PairNumbers = T[kKeys * kRows];  // [J, I]

constexpr int kHeads = 8;  // of a group, for the score `bias`
template <class T>
using PairsOfHeads = PairNumbers<T>[kHeads];  // [h, J, I]

struct Tile {
  int64_t first, rows, vectors;  // query atoms [first, first + rows), in so many vectors
};
template <class T>
Tile tile_at(int64_t first, int64_t end) {
  constexpr int64_t kLanes = kWidth<T> > kHeads ? kWidth<T> : kHeads;  // whole octets, too
  const int64_t rows = end - first < kRows ? end - first : kRows;
  return {first, rows, (rows + kLanes - 1) / kLanes * kLanes / kWidth<T>};
}

struct Block {
  Tile tile;
  int64_t first, keys;  // key atoms [first, first + keys)

  bool is_diagonal() const { return first == tile.first; }  // i and j are the same atoms
};

// The gradients that a backward pass is asked for, beyond those of the values.
struct Wanted {
  bool q, k, geometry, radial;  // geometry: of positions or of (m, c)
};

// Where the scores' gradients of q and k go: sums over pairs, without κ for q.
template <class T>
struct Gradients {
  Features<T> q, k;
};

// The tangents that the scores see; q̇ times κ. Each may be absent.
template <class T>
struct Tangents {
  Features<T> q, k;
  Coordinates<T> x;
  bool moves_radial = false;  // f̃ is not 0
};

// Calls body(j, n, at) for each key and each vector of query atoms; `at` is their place in [J, I].
template <class T, class Body>
GEOT_INLINE void for_each_vector(const Block& block, Body body) {
  for (int64_t j = 0; j < block.keys; ++j) {
    for (int64_t n = 0; n < block.tile.vectors; ++n) body(j, n, j * kRows + n * kWidth<T>);
  }
}

template <class T>
class Pairs {
 public:
  explicit Pairs(const Inputs<T>& inputs)
      : inputs_(inputs),
        grid_(Grid<T>::make(inputs.radial.r_min, inputs.radial.r_max,
                            int(inputs.radial.num_knots - 1))) {}

  // Weights of the interval's knots in f and its derivatives by u.
  struct WeightsOfPairs {
    alignas(64) PairNumbers<T> rise, s0, s1;

    GEOT_INLINE Weights<T> at(int64_t pair) const { return {rise[pair], s0[pair], s1[pair]}; }
    GEOT_INLINE void set(int64_t first, const Weights<Vec<T>>& w) {
      store(rise + first, w.rise);
      store(s0 + first, w.s0);
      store(s1 + first, w.s1);
    }
  };

  alignas(64) PairNumbers<int32_t> knot;  // where the interval starts, of all tables' knots
  WeightsOfPairs value, slope, curvature;
  alignas(64) PairNumbers<T> z;      // without a table: the radial coordinate
  alignas(64) PairNumbers<T> du_dz;  // 0 where the table is constant
  alignas(64) PairNumbers<T> u_dot;  // u̇

  // Locates the pairs; weights up to the `order`th derivative.
  void compute(const Atoms<T>& atoms, const Block& block, int order) {
    if (types_matter()) number_pairs(atoms, block);
    const bool is_table = inputs_.is_table();
    for_each_vector<T>(block, [&](int64_t j, int64_t n, int64_t at) {
      V x = distance(apart_of(atoms.x, block, j, n));
      if (inputs_.affine != nullptr) x = affine(0, at) * x + affine(1, at);
      if (!is_table) {
        store(z + at, x);
        store(du_dz + at, broadcast<V>(1));
        return;
      }
      const V u = grid_.coordinate(x);
      const auto g = __builtin_convertvector(grid_.in_range(u), Lanes32);
      const V t = u - __builtin_convertvector(g, V);
      store(knot + at, g);
      value.set(at, weights_of_value(t));
      if (order < 1) return;
      slope.set(at, weights_of_slope(t));
      store(du_dz + at, grid_.slope_of_coordinate(x));
      if (order > 1) curvature.set(at, weights_of_curvature(t));
    });
    if (inputs_.radial.num_tables > 1) {
      const int32_t num_knots = int32_t(inputs_.radial.num_knots);
      for (int64_t j = 0; j < block.keys; ++j) {
        for (int64_t i = 0; i < block.tile.rows; ++i) {
          const int64_t at = j * kRows + i;
          knot[at] += pair_[at] * num_knots;
        }
      }
    }
  }

  // u̇ from ẋ and (ṁ, ċ), each of which may be absent.
  void compute_tangent(const Atoms<T>& atoms, const Coordinates<T>& x_dot, const T* affine_dot,
                       const Block& block) {
    if (affine_dot != nullptr) {
      for (int64_t at = 0; at < block.keys * kRows; ++at) {
        const int64_t p = types_matter() ? pair_[at] : 0;
        affine_dot_[0][at] = affine_dot[2 * p];
        affine_dot_[1][at] = affine_dot[2 * p + 1];
      }
    }
    for_each_vector<T>(block, [&](int64_t j, int64_t n, int64_t at) {
      const auto apart = apart_of(atoms.x, block, j, n);
      const V dist = distance(apart);
      V d_dot{}, m_dot{}, c_dot{};
      if (x_dot) d_dot = (apart * inverse_distance(dist)).dot(apart_of(x_dot, block, j, n));
      if (affine_dot != nullptr) {
        m_dot = load<V>(affine_dot_[0] + at);
        c_dot = load<V>(affine_dot_[1] + at);
      }
      const V z_dot = coordinate_tangent(slope_of_affine(at), d_dot, m_dot, dist, c_dot);
      store(u_dot + at, load<V>(du_dz + at) * z_dot);
    });
  }

  // The first backward's end: `b` = dL/du to the positions and to (m, c).
  void pull(const Atoms<T>& atoms, const Block& block, const T* b, const PositionsGradient<T>& dx,
            T* d_affine) const {
    for_each_key_force(block, dx, [&](int64_t j, int64_t n, int64_t at) {
      const auto apart = apart_of(atoms.x, block, j, n);
      const V dist = distance(apart);
      const V dz = load<V>(b + at) * load<V>(du_dz + at);
      if (d_affine != nullptr) add_affine(d_affine, block, n, at, dz * dist, dz);
      return force(slope_of_affine(at) * dz, apart * inverse_distance(dist));
    });
  }

  // The second backward's end: `b_bar` on u and `e_dot` on u̇.
  void pull_second(const Atoms<T>& atoms, const Coordinates<T>& x_dot, bool has_affine_dot,
                   const Block& block, const T* b_bar, const T* e_dot,
                   const PositionsGradient<T>& dx, T* d_affine) const {
    for_each_key_force(block, dx, [&](int64_t j, int64_t n, int64_t at) {
      const auto apart = apart_of(atoms.x, block, j, n);
      const V dist = distance(apart), per_dist = inverse_distance(dist);
      const auto direction = apart * per_dist;
      const V per_z = load<V>(du_dz + at);
      const V b = load<V>(b_bar + at) * per_z, e = load<V>(e_dot + at) * per_z;
      Vector3<V> x_dot_ij{};
      if (x_dot) x_dot_ij = apart_of(x_dot, block, j, n);
      const V d_dot = direction.dot(x_dot_ij);
      if (d_affine != nullptr) add_affine(d_affine, block, n, at, b * dist + e * d_dot, b);
      const V m_dot = has_affine_dot ? load<V>(affine_dot_[0] + at) : V{};
      return second_force(slope_of_affine(at), m_dot, b, e, per_dist, direction, x_dot_ij, d_dot);
    });
  }

 private:
  using V = Vec<T>;
  using Lanes32 = Vector<int32_t, kWidth<T>>;

  bool types_matter() const { return inputs_.pair_index != nullptr; }

  static GEOT_INLINE Vector3<V> apart_of(const Coordinates<T>& x, const Block& block, int64_t j,
                                         int64_t n) {
    return x.lanes(block.tile.first + n * kWidth<T>) - x.everywhere(block.first + j);
  }

  GEOT_INLINE V affine(int which, int64_t at) const {
    return types_matter() ? load<V>(affine_[which] + at) : broadcast<V>(inputs_.affine[which]);
  }
  GEOT_INLINE V slope_of_affine(int64_t at) const {
    return inputs_.affine != nullptr ? affine(0, at) : broadcast<V>(1);
  }

  void number_pairs(const Atoms<T>& atoms, const Block& block) {
    for (int64_t j = 0; j < block.keys; ++j) {
      const int64_t* row = inputs_.pair_index + atoms.types[block.first + j] * inputs_.num_types;
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t at = j * kRows + i, p = row[atoms.types[block.tile.first + i]];
        pair_[at] = int32_t(p);
        if (inputs_.affine != nullptr) {
          affine_[0][at] = inputs_.affine[2 * p];
          affine_[1][at] = inputs_.affine[2 * p + 1];
        }
      }
    }
  }

  void add_affine(T* d_affine, const Block& block, int64_t n, int64_t at, V dm, V dc) const {
    for (int64_t i = 0; i < kWidth<T> && n * kWidth<T> + i < block.tile.rows; ++i) {
      const int64_t p = types_matter() ? pair_[at + i] : 0;
      d_affine[2 * p] += dm[i];
      d_affine[2 * p + 1] += dc[i];
    }
  }

  // Adds the pairs' forces to their query atoms and takes them from their key atoms.
  template <class Force>
  GEOT_INLINE void for_each_key_force(const Block& block, const PositionsGradient<T>& dx,
                                      Force force_of) const {
    const int64_t tile = block.tile.first;
    for (int64_t j = 0; j < block.keys; ++j) {
      Vector3<V> total{};
      for (int64_t n = 0; n < block.tile.vectors; ++n) {
        const auto is_atom = lane_numbers<V>() < Integer<T>(block.tile.rows - n * kWidth<T>);
        const Vector3<V> all = force_of(j, n, j * kRows + n * kWidth<T>);
        const Vector3<V> w = {is_atom ? all.x : V{}, is_atom ? all.y : V{}, is_atom ? all.z : V{}};
        const int64_t i = tile + n * kWidth<T>;
        const Vector3<V> sum = dx.queries.lanes(i) + w;
        store(dx.queries.axis(0) + i, sum.x);
        store(dx.queries.axis(1) + i, sum.y);
        store(dx.queries.axis(2) + i, sum.z);
        total = total + w;
      }
      dx.keys.axis(0)[block.first + j] -= sum_of(total.x);
      dx.keys.axis(1)[block.first + j] -= sum_of(total.y);
      dx.keys.axis(2)[block.first + j] -= sum_of(total.z);
    }
  }

  const Inputs<T>& inputs_;
  const Grid<T> grid_;
  alignas(64) PairNumbers<int32_t> pair_;
  alignas(64) PairNumbers<T> affine_[2];
  alignas(64) PairNumbers<T> affine_dot_[2];
};

}  // namespace geot::cpu::GEOT_ISA
