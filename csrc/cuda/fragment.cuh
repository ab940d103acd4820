// What a warp holds of a matrix of pairs, 16 rows by 8 kTiles columns, and its products.
//
// The layout is that of the tensor cores' accumulators: with g = lane / 4 and c = lane % 4, a lane
// has rows g and g + 8 and, of each eight columns, 2c and 2c + 1:
//
//   at[n][0] (g, 8n + 2c)   at[n][1] (g, 8n + 2c + 1)   at[n][2], at[n][3] the same in row g + 8
//
// 16-bit features are multiplied by tensor cores, others number by number in the same layout.
#pragma once

#include "shared.cuh"

namespace geot::cuda {

constexpr int kWarpRows = 16, kMaxWarps = 4;

GEOT_DEVICE int row_of(int e) { return lane() / 4 + e / 2 * 8; }
GEOT_DEVICE int column_of(int n, int e) { return 8 * n + lane() % 4 * 2 + e % 2; }

template <class F, int kTiles>
struct Fragment {
  static constexpr int kColumns = 8 * kTiles;
  F at[kTiles][4];

  GEOT_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) at[n][e] = 0;
    }
  }
};

// Calls body(n, e, column) for each pair of this lane in the first `columns` columns, and a few
// beyond: eight columns are always whole.
template <int kTiles, class Body>
GEOT_DEVICE void for_each_pair(int columns, const Body& body) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (8 * n < columns) {
#pragma unroll
      for (int e = 0; e < 4; ++e) body(n, e, column_of(n, e));
    }
  }
}

// The sum, or the largest, of the four lanes that share a row.
template <class F>
GEOT_DEVICE F sum_of_row(F x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
template <class F>
GEOT_DEVICE F largest_of_row(F x) {
  F other = shuffle_xor(x, 1);
  x = x > other ? x : other;
  other = shuffle_xor(x, 2);
  return x > other ? x : other;
}
template <class F>
GEOT_DEVICE F sum_of_warp(F x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}

template <class T>
constexpr bool kIs16Bit = sizeof(T) == 2;

GEOT_DEVICE uint32_t two(const void* p) { return *static_cast<const uint32_t*>(p); }

// s_ij += own_i · other_j:  [16, D] @ [D, J] -> [16, J]. `own`: the 16 rows of this warp.
template <class T, class F, int kTiles>
GEOT_DEVICE void add_products(Fragment<F, kTiles>& s, const Tile<T>& own, const Tile<T>& other,
                              int columns, int head_dim) {
  const int g = lane() / 4, c = lane() % 4;
  if constexpr (kIs16Bit<T>) {
    for (int k = 0; k < head_dim; k += 16) {
      const T *top = own.row(g) + k + 2 * c, *bottom = own.row(g + 8) + k + 2 * c;
      const uint32_t a[4] = {two(top), two(bottom), two(top + 8), two(bottom + 8)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (8 * n < columns) {
          const T* right = other.row(8 * n + g) + k + 2 * c;
          const uint32_t b[2] = {two(right), two(right + 8)};
          mma<T>(s.at[n], a, b);
        }
      }
    }
  } else {
    for (int k = 0; k < head_dim; k += 4) {
      const Four<T> top = own.four(g, k), bottom = own.four(g + 8, k);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (8 * n < columns) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const Four<T> right = other.four(8 * n + 2 * c + e, k);
            s.at[n][e] += (top * right).sum();
            s.at[n][2 + e] += (bottom * right).sum();
          }
        }
      }
    }
  }
}

// Numbers of pairs in shared memory, seen from the 16 rows of a warp. Rows and columns may have
// changed places.
template <class F>
struct View {
  F* data;
  int row_stride, column_stride;

  GEOT_DEVICE F& operator()(int i, int j) const { return data[i * row_stride + j * column_stride]; }
};

// Numbers of pairs, rows of all warps by columns. Of a whole molecule it is square, and after a
// barrier warps can take its columns for rows.
template <class F>
struct Matrix {
  F* data;
  int stride;

  static GEOT_INLINE Matrix take(Carver& carver, int rows, int columns) {
    const int stride = columns + 8;
    return {carver.take<F>(int64_t(rows) * stride), stride};
  }
  GEOT_DEVICE View<F> rows(int first_column) const {
    return {data + warp() * kWarpRows * stride + first_column, stride, 1};
  }
  GEOT_DEVICE View<F> columns(int first_row) const {
    return {data + first_row * stride + warp() * kWarpRows, 1, stride};
  }
};

// Calls body(half, i, j) for each pair of this lane in the first `columns` columns (rounded up to
// eight), where row i is its row `half`. For what is too long to be unrolled over all pairs; their
// numbers are in a View, where each belongs to this lane.
template <class F, class Body>
GEOT_DEVICE void for_each_pair_in_turn(int columns, const Body& body) {
  [[maybe_unused]] constexpr int kSideBySide = sizeof(F) == 8 ? 1 : 2;  // or registers run out
#pragma unroll 1
  for (int n = 0; 8 * n < columns; ++n) {
#pragma unroll kSideBySide
    for (int e = 0; e < 2; ++e) {
      body(0, row_of(0), column_of(n, e));
      body(1, row_of(2), column_of(n, e));
    }
  }
}

// Calls put(i, j, own_i · other_j) for each pair of this lane.
template <class T, class F, int kTiles, class Put>
GEOT_DEVICE void products(const Tile<T>& own, const Tile<T>& other, int columns, int head_dim,
                          const Put& put) {
  Fragment<F, kTiles> s;
  s.clear();
  add_products(s, own, other, columns, head_dim);
  for_each_pair<kTiles>(columns, [&](int n, int e, int j) { put(row_of(e), j, s.at[n][e]); });
}

}  // namespace geot::cuda
