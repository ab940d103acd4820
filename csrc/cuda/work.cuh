// What a block works on, and the atoms of its pairs.
//
// A block belongs to one head and goes through items, each 16 rows for every warp of one molecule:
// blocks [chunks, H], items [molecules, row_tiles]. Against these rows come the other atoms of the
// molecule, a tile at a time. By rows (query atoms are rows) or by keys, which swaps the parts.
#pragma once

#include "../common/geometry.h"
#include "fragment.cuh"

namespace geot::cuda {

struct Molecule {
  int64_t b, first;  // its number; its first row among all
  int count;         // rows, padding included
  Real real;
};

struct Work {
  const Inputs& in;
  const Plan& plan;
  int64_t head, chunk;

  GEOT_DEVICE Work(const Inputs& inputs, const Plan& p)
      : in(inputs),
        plan(p),
        head(block_index() % inputs.num_heads),
        chunk(block_index() / inputs.num_heads) {}
  GEOT_DEVICE int64_t first_item() const { return chunk; }
  GEOT_DEVICE int64_t num_items() const { return in.num_molecules * plan.row_tiles; }
  GEOT_DEVICE int first_row(int64_t item) const {
    return int(item % plan.row_tiles) * kWarpRows * plan.warps;
  }

  // The molecule of an item; all threads of the block together. `reach`: numbers of the warps.
  GEOT_DEVICE Molecule molecule(int64_t item, int* reach) const {
    const int64_t b = item / plan.row_tiles;
    if (in.ptr != nullptr) {
      const int64_t first = in.ptr[b];
      const int64_t rows = in.ptr[b + 1] - first;  // there is room for `num_atoms`, as was promised
      const int count = int(rows < in.num_atoms ? rows : in.num_atoms);
      return {0, first, count, {nullptr, count}};
    }
    const int64_t first = b * in.num_atoms;
    const int count = int(in.num_atoms);
    if (in.mask == nullptr) return {b, first, count, {nullptr, count}};
    const bool* mask = in.mask + first;
    int last = 0;
    for (int i = thread_index(); i < count; i += num_threads()) {
      if (mask[i]) last = i + 1;
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = shuffle_xor(last, lanes);
      last = last > other ? last : other;
    }
    if (plan.warps > 1) {
      GEOT_SYNC_BLOCK();  // those who read what came before
      if (lane() == 0) reach[warp()] = last;
      GEOT_SYNC_BLOCK();
      for (int w = 0; w < plan.warps; ++w) last = last > reach[w] ? last : reach[w];
    }
    return {b, first, count, {mask, last}};
  }

  // In the padded layout features have a stride of molecules, in the packed one rows go through.
  template <class T>
  GEOT_DEVICE HeadRows<T> features(const Rows& rows, const Molecule& m) const {
    return HeadRows<T>(rows, m.b, in.ptr == nullptr ? 0 : m.first, head);
  }
  // A number of each row and head, [num_rows, H].
  GEOT_DEVICE int64_t at(const Molecule& m, int i) const {
    return (m.first + i) * in.num_heads + head;
  }
};

template <class F>
GEOT_DEVICE Vector3<F> load_vector(const void* positions, int64_t row) {
  const F* x = static_cast<const F*>(positions) + 3 * row;
  return {x[0], x[1], x[2]};
}

// An atom: its position and its type, -1 where none is real.
template <class F>
struct alignas(16) Atom {
  Vector3<F> x;
  int type;

  GEOT_DEVICE bool is_real() const { return type >= 0; }
};
template <class F>
GEOT_DEVICE Atom<F> load_atom(const Inputs& in, const Molecule& m, int i) {
  if (!m.real(i)) return {{0, 0, 0}, -1};
  const int64_t row = m.first + i;
  return {load_vector<F>(in.positions, row), in.types != nullptr ? int(in.types[row]) : 0};
}

// A pair: z = m d + c, and which table f is in.
template <class F>
struct PairOfAtoms {
  Vector3<F> apart;
  F dist, m, z;
  int table;   // its first knot
  int affine;  // its row in the map

  GEOT_DEVICE Vector3<F> u() const { return apart * inverse_distance(dist); }
};
// Where all pairs have one table, and no map.
template <class F>
GEOT_DEVICE PairOfAtoms<F> plain_pair_of(const Atom<F>& own, const Atom<F>& other) {
  PairOfAtoms<F> pair;
  pair.apart = own.x - other.x;
  pair.dist = distance(pair.apart);
  pair.m = 1;
  pair.z = pair.dist;
  pair.table = pair.affine = 0;
  return pair;
}
template <class F>
GEOT_DEVICE PairOfAtoms<F> pair_of(const Inputs& in, const Atom<F>& own, const Atom<F>& other) {
  PairOfAtoms<F> pair = plain_pair_of(own, other);
  if (in.pairs != nullptr) {
    const int64_t i = own.type < 0 ? 0 : own.type, j = other.type < 0 ? 0 : other.type;
    pair.affine = int(in.pairs[i * in.num_types + j]);
    if (in.num_tables > 1) pair.table = pair.affine * int(in.num_knots);
  }
  if (in.affine != nullptr) {
    const F* map = static_cast<const F*>(in.affine) + 2 * pair.affine;
    pair.m = map[0];
    pair.z = map[0] * pair.dist + map[1];
  }
  return pair;
}

// The pair of a lane's row, 0 or 1, and a column.
template <class F>
struct PairAt {
  const Inputs& in;
  const Atom<F> (&own)[2];
  const Atom<F>* others;

  GEOT_DEVICE PairOfAtoms<F> operator()(int half, int j) const {
    return pair_of(in, own[half], others[j]);
  }
  GEOT_DEVICE PairOfAtoms<F> plain(int half, int j) const {
    return plain_pair_of(own[half], others[j]);
  }
};

// How a pair moves: ẋ_ij, ḋ, ṁ, ż.
template <class F>
struct PairTangent {
  Vector3<F> x_dot;
  F d_dot, m_dot, z_dot;
};

}  // namespace geot::cuda
