// Sums over columns for the 16 rows of a warp, [16, D]: in registers, or in shared memory.
#pragma once

#include "fragment.cuh"

namespace geot::cuda {

// Where sums in shared memory are, those of the rows of all warps one after the other.
template <class F>
struct SumMemory {
  Tile<F> tile;
  int rows;

  static GEOT_INLINE SumMemory take(Carver& carver, int num_sums, int rows, int64_t head_dim) {
    return {Tile<F>::take(carver, num_sums * rows, head_dim), rows};
  }
};

// sum_i += Σ_j s_ij other_j:  [16, J] @ [J, D] -> [16, D]. `s` is to be seen by the whole warp.
template <class T, class F, int kWidth>
GEOT_DEVICE void add_weighted(Fragment<F, kWidth / 8>& sum, const View<F>& s, const Tile<T>& other,
                              int columns, int head_dim) {
  const int g = lane() / 4, c = lane() % 4;
  if constexpr (kIs16Bit<T>) {
#pragma unroll 2
    for (int j0 = 0; j0 < columns; j0 += 16) {
      uint32_t a[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int i = g + m % 2 * 8, j = j0 + 2 * c + m / 2 * 8;
        // Columns are there eight at a time.
        const bool is_there = m < 2 || j0 + 8 < columns;
        a[m] = is_there ? pack<T>(s(i, j), s(i, j + 1)) : 0;
      }
      const T* rows = other.row(j0 + lane() % 16);
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        if (8 * n < head_dim) {
          uint32_t b[2];
          load_transposed<T>(b, rows + 8 * n);
          mma<T>(sum.at[n], a, b);
        }
      }
    }
  } else {
#pragma unroll 2
    for (int j = 0; j < columns; ++j) {
      const F top = s(g, j), bottom = s(g + 8, j);
      const T* row = other.row(j) + 2 * c;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        if (8 * n < head_dim) {
          const F x = row[8 * n], y = row[8 * n + 1];
          sum.at[n][0] += top * x;
          sum.at[n][1] += top * y;
          sum.at[n][2] += bottom * x;
          sum.at[n][3] += bottom * y;
        }
      }
    }
  }
}

// Stores sums of 16 rows, factors [2] for the lane's two; zeros where no real atom is.
template <class T, class F, int kTiles>
GEOT_DEVICE void store_sum(const HeadRows<T>& to, int first, int num_rows, const Real& real,
                           const Fragment<F, kTiles>& sum, const F (&factors)[2], int head_dim) {
  struct alignas(2 * sizeof(T)) Pair {
    T x, y;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = first + row_of(2 * half);
    if (i < num_rows) {
      const bool is_real = real(i);
      T* row = to.row(i);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int c = column_of(n, 0);
        if (c < head_dim) {
          const F x = is_real ? sum.at[n][2 * half] * factors[half] : F(0);
          const F y = is_real ? sum.at[n][2 * half + 1] * factors[half] : F(0);
          if (head_dim % 2 == 0) {
            *reinterpret_cast<Pair*>(row + c) = {convert<T>(x), convert<T>(y)};
          } else {
            row[c] = convert<T>(x);
            if (c + 1 < head_dim) row[c + 1] = convert<T>(y);
          }
        }
      }
    }
  }
}

template <class T, int kWidth>
class RegisterSum {
 public:
  using F = Compute<T>;

  GEOT_DEVICE RegisterSum(const SumMemory<F>&, int, int head_dim) : head_dim_(head_dim) { clear(); }
  GEOT_DEVICE void clear() { sum_.clear(); }
  GEOT_DEVICE void scale(const F (&factors)[2]) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum_.at[n][e] *= factors[e / 2];
    }
  }
  // += Σ_j p_ij other_j
  GEOT_DEVICE void add(const View<F>& p, const Tile<T>& other, int columns) {
    add_weighted<T, F, kWidth>(sum_, p, other, columns, head_dim_);
  }
  GEOT_DEVICE void store(const HeadRows<T>& to, int first, int num_rows, const Real& real,
                         const F (&factors)[2]) const {
    store_sum(to, first, num_rows, real, sum_, factors, head_dim_);
  }

 private:
  int head_dim_;
  Fragment<F, kWidth / 8> sum_;  // at[n]: channels 8n to 8n + 7
};

// The same in shared memory, of any number of channels: every number belongs to a lane.
template <class F>
class SharedSum {
 public:
  GEOT_DEVICE SharedSum(const SumMemory<F>& memory, int which, int head_dim)
      : head_dim_(head_dim), sum_(memory.tile.from(which * memory.rows + warp() * kWarpRows)) {
    clear();
  }
  GEOT_DEVICE void clear() {
    for_each([](F& x, int) { x = 0; });
  }
  GEOT_DEVICE void scale(const F (&factors)[2]) {
    for_each([&](F& x, int half) { x *= factors[half]; });
  }
  // += Σ_j p_ij other_j
  GEOT_DEVICE void add(const View<F>& p, const Tile<F>& other, int columns) {
    for (int c = 0; c < head_dim_; c += 4) {
      Four<F> sums[2] = {};
      for_each_pair_in_turn<F>(
          columns, [&](int half, int i, int j) { sums[half] += p(i, j) * other.four(j, c); });
      add_four(c, sums);
    }
  }
  // Channels c to c + 3 of the lane's two rows, parts of which its neighbours have.
  GEOT_DEVICE void add_four(int c, const Four<F> (&sums)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      F mine = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const F sum = sum_of_row(sums[half].at[n]);
        if (lane() % 4 == n) mine = sum;
      }
      sum_.row(row_of(2 * half))[c + lane() % 4] += mine;
    }
  }
  GEOT_DEVICE void store(const HeadRows<F>& to, int first, int num_rows, const Real& real,
                         const F (&factors)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(2 * half), i = first + row;
      if (i >= num_rows) continue;
      const bool is_real = real(i);
      for (int c = lane() % 4; c < head_dim_; c += 4) {
        to.row(i)[c] = is_real ? sum_.row(row)[c] * factors[half] : F(0);
      }
    }
  }

 private:
  template <class Body>
  GEOT_DEVICE void for_each(const Body& body) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      F* row = sum_.row(row_of(2 * half));
      for (int c = lane() % 4; c < round_up(head_dim_, 4); c += 4) body(row[c], half);
    }
  }

  int head_dim_;
  Tile<F> sum_;
};

}  // namespace geot::cuda
