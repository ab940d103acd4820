// The products that do not depend on the score: tiles turned over, A - δ, and sums over queries or
// keys.
#pragma once

#include "matmul.h"
#include "pairs.h"

namespace geot::cpu::GEOT_ISA {

// x [I, width] of a tile, turned over: [width, I].
template <class T>
void turn_over(const Tile& tile, const Features<T>& x, int64_t h, T* out) {
  constexpr int W = kWidth<T>;
  for (int64_t n = 0; n < tile.vectors; ++n) {
    for (int64_t d = 0; d < x.width; d += W) {
      Vec<T> r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const int64_t row = n * W + i;
        r[i] = row < tile.rows ? load<Vec<T>>(x.at(h, tile.first + row) + d) : Vec<T>{};
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + (d + i) * kRows + n * W, r[i]);
    }
  }
}

// C [J, I] += k [J, D] x [D, I], with x turned over.
template <Into kInto, class T>
void products(const Block& block, int64_t head_dim, const Features<T>& k, int64_t h,
              const T* x_turned, T* c) {
  matmul<Stored::kRows, kInto>(block.keys, block.tile.vectors, head_dim, k.at(h, block.first),
                               k.stride, x_turned, kRows, c, kRows);
}
// out [I, width] += E^T [I, J] x [J, width]
template <class T>
void add_to_queries(const Block& block, int64_t chunks, const T* e, const Features<T>& x,
                    const Features<T>& out, int64_t h) {
  matmul<Stored::kColumns, Into::kAdd>(block.tile.rows, chunks, block.keys, e, kRows,
                                       x.at(h, block.first), x.stride, out.at(h, block.tile.first),
                                       out.stride);
}
// out [J, width] += E [J, I] x [I, width]
template <class T>
void add_to_keys(const Block& block, int64_t chunks, const T* e, const Features<T>& x,
                 const Features<T>& out, int64_t h) {
  matmul<Stored::kRows, Into::kAdd>(block.keys, chunks, block.tile.rows, e, kRows,
                                    x.at(h, block.tile.first), x.stride, out.at(h, block.first),
                                    out.stride);
}

// A_ij - δ_i = dO_i·v_j + (dr_i - δ_i), [J, I]; `d_out` turned over, or null where there is none.
template <class T>
void a_minus_delta(const Block& block, int64_t head_dim, const T* shift, const Features<T>& v,
                   int64_t h, const T* d_out, T* a) {
  for_each_vector<T>(block, [&](int64_t, int64_t n, int64_t at) {
    store(a + at, load<Vec<T>>(shift + n * kWidth<T>));
  });
  if (d_out != nullptr) products<Into::kAdd>(block, head_dim, v, h, d_out, a);
}

// body(place in [J, I] of 8 query atoms, how many of them there are)
template <class Body>
GEOT_INLINE void for_each_octet(const Block& block, Body body) {
  for (int64_t j = 0; j < block.keys; ++j) {
    for (int64_t i = 0; i < block.tile.rows; i += kHeads) {
      const int64_t rest = block.tile.rows - i;
      body(j * kRows + i, rest < kHeads ? rest : kHeads);
    }
  }
}
// From a pair's heads in a row, 8 pairs of them, to [h, J, I], and back.
template <class T>
GEOT_INLINE void turn_to_heads(Vector<T, kHeads> (&row)[kHeads], PairsOfHeads<T>& out, int64_t at,
                               int64_t heads) {
  transpose(row);
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) {
    if (h < heads) store(out[h] + at, row[h]);
  }
}
template <class T>
GEOT_INLINE void turn_to_rows(const PairsOfHeads<T>& x, Vector<T, kHeads> (&row)[kHeads],
                              int64_t at, int64_t heads) {
  using V = Vector<T, kHeads>;
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h) row[h] = h < heads ? load<V>(x[h] + at) : V{};
  transpose(row);
}

// -δ_i = -dO_i·O_i
template <class T>
void subtract_delta(const RowNumbers<T>& to, const Features<T>& d_out, const Rows<const T>& out,
                    const Molecule& m, Group group, int64_t head_dim) {
  using V = Vec<T>;
  constexpr int W = kWidth<T>;
  for (int64_t h = 0; h < group.count; ++h) {
    for (int64_t i = 0; i < to.capacity; i += W) {
      V products[W] = {};
      for (int e = 0; e < W && i + e < m.count && d_out; ++e) {
        const T* o = out.at(m.batch, m.atoms[i + e], group.first + h);
        const T* g = d_out.at(h, i + e);
        int64_t d = 0;
        for (; d + W <= head_dim; d += W) products[e] -= load<V>(g + d) * load<V>(o + d);
        for (int64_t l = 0; d + l < head_dim; ++l) products[e][l] -= g[d + l] * o[d + l];
      }
      store(to.at(h, i), sums_of(products));
    }
  }
}

}  // namespace geot::cpu::GEOT_ISA
