// Small dense products, the only ones there are: C [m, n] = or += A [m, k] B [k, n], the lanes of
// a vector along n, A read number by number.
#pragma once

#include <utility>

#include "simd.h"

namespace geot::cpu::GEOT_ISA {

// Where A's numbers are: rows of A contiguous (`kRows`), or columns, i.e. its transpose is stored.
enum class Stored { kRows, kColumns };

template <class T, int M, int NV, Stored kStored, Into kInto>
GEOT_INLINE void matmul_block(int64_t depth, const T* __restrict__ a, int64_t lda,
                              const T* __restrict__ b, int64_t ldb, T* __restrict__ c,
                              int64_t ldc) {
  using V = Vec<T>;
  constexpr int W = kWidth<T>;
  V acc[M][NV];  // [M, NV W]
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      acc[m][n] = kInto == Into::kAdd ? load<V>(c + m * ldc + n * W) : V{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    V row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = load<V>(b + k * ldb + n * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const T x = kStored == Stored::kRows ? a[m * lda + k] : a[k * lda + m];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * W, acc[m][n]);
  }
}

// As many rows as registers hold; what is left over, once, at its own size.
template <class T, int M, int NV, Stored kStored, Into kInto>
void matmul_strip(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb,
                  T* c, int64_t ldc) {
  const int64_t step = kStored == Stored::kRows ? lda : 1;
  int64_t m = 0;
  for (; m + M <= rows; m += M) {
    matmul_block<T, M, NV, kStored, kInto>(depth, a + m * step, lda, b, ldb, c + m * ldc, ldc);
  }
  if constexpr (M > 1) {
    if (m < rows) {
      const auto rest = [&]<int R>(std::integral_constant<int, R>) {
        if (rows - m == R) {
          matmul_block<T, R, NV, kStored, kInto>(depth, a + m * step, lda, b, ldb, c + m * ldc,
                                                 ldc);
        }
      };
      [&]<int... R>(std::integer_sequence<int, R...>) {
        (rest(std::integral_constant<int, R + 1>{}), ...);
      }(std::make_integer_sequence<int, M - 1>{});
    }
  }
}

// `vectors` is n in units of the vector's width.
template <Stored kStored, Into kInto, class T>
GEOT_INLINE void matmul(int64_t rows, int64_t vectors, int64_t depth, const T* a, int64_t lda,
                        const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int M = kRegisters / 4;
  int64_t n = 0;
  for (; n + 2 <= vectors; n += 2) {
    matmul_strip<T, M, 2, kStored, kInto>(rows, depth, a, lda, b + n * kWidth<T>, ldb,
                                          c + n * kWidth<T>, ldc);
  }
  if (n < vectors) {
    matmul_strip<T, M, 1, kStored, kInto>(rows, depth, a, lda, b + n * kWidth<T>, ldb,
                                          c + n * kWidth<T>, ldc);
  }
}

}  // namespace geot::cpu::GEOT_ISA
