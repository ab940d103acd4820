// Shared memory: how it is divided, and tiles of features in it.
#pragma once

#include "call.h"
#include "platform.cuh"

namespace geot::cuda {

// Sums and geometry of a type of features.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

GEOT_INLINE constexpr int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Gives out pieces of memory, one after the other. (Pointers stay pointers: from arithmetic of
// integers no compiler knows any longer that they point to shared memory.)
class Carver {
 public:
  GEOT_INLINE explicit Carver(char* base) : base_(base), used_(0) {}

  template <class T>
  GEOT_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * int64_t(sizeof(T)), 16);
    return piece;
  }
  GEOT_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_;
};

// Four numbers side by side, aligned for loads of 16 bytes; sums of four channels.
template <class F>
struct alignas(16) Four {
  F at[4];

  GEOT_DEVICE F sum() const { return (at[0] + at[1]) + (at[2] + at[3]); }
};
#define GEOT_FOUR_BY_FOUR(op)                                                                \
  template <class F>                                                                         \
  GEOT_DEVICE Four<F> operator op(const Four<F>& a, const Four<F>& b) {                      \
    return {a.at[0] op b.at[0], a.at[1] op b.at[1], a.at[2] op b.at[2], a.at[3] op b.at[3]}; \
  }
GEOT_FOUR_BY_FOUR(+)
GEOT_FOUR_BY_FOUR(-)
GEOT_FOUR_BY_FOUR(*)
#undef GEOT_FOUR_BY_FOUR
template <class F>
GEOT_DEVICE Four<F> operator*(F a, const Four<F>& b) {
  return {a * b.at[0], a * b.at[1], a * b.at[2], a * b.at[3]};
}
template <class F>
GEOT_DEVICE Four<F> operator*(const Four<F>& a, F b) {
  return b * a;
}
template <class F>
GEOT_DEVICE void operator+=(Four<F>& a, const Four<F>& b) {
  a = a + b;
}
template <class F>
GEOT_DEVICE void operator-=(Four<F>& a, const Four<F>& b) {
  a = a - b;
}

// Rows of features of one head, [rows, stride]; channels beyond D are 0 up to a multiple of 16.
// The stride lets neighbouring rows start in different banks.
template <class T>
struct Tile {
  T* data;
  int stride;

  static GEOT_INLINE int stride_of(int64_t head_dim) {
    return int(round_up(head_dim, 16)) + 16 / int(sizeof(T));
  }
  static GEOT_INLINE Tile take(Carver& carver, int64_t rows, int64_t head_dim) {
    const int stride = stride_of(head_dim);
    return {carver.take<T>(rows * stride), stride};
  }
  GEOT_DEVICE T* row(int i) const { return data + i * stride; }
  GEOT_DEVICE Tile from(int row) const { return {data + row * stride, stride}; }
  GEOT_DEVICE Four<T> four(int i, int c) const {
    return *reinterpret_cast<const Four<T>*>(row(i) + c);
  }
};

// The features of one molecule and head in global memory.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;

  GEOT_DEVICE HeadRows(const Rows& rows, int64_t b, int64_t first, int64_t head)
      : data(static_cast<T*>(rows.data)), stride(rows.stride_n) {
    if (data != nullptr) data += b * rows.stride_b + first * rows.stride_n + head * rows.stride_h;
  }
  GEOT_DEVICE explicit operator bool() const { return data != nullptr; }
  GEOT_DEVICE T* row(int64_t i) const { return data + i * stride; }
};

// Which atoms of a molecule are real: those before `last` that the mask, if any, marks.
struct Real {
  const bool* mask;  // of the molecule
  int last;

  GEOT_DEVICE bool operator()(int i) const { return i < last && (mask == nullptr || mask[i]); }
};

// Loads rows [first, first + count) into a tile, all threads of the block together: zeros where no
// real atom is, whatever stands there.
template <class T>
GEOT_DEVICE void load_tile(const Tile<T>& to, const HeadRows<T>& from, int first, int count,
                           const Real& real, int head_dim) {
  struct alignas(16) Piece {
    T at[16 / sizeof(T)];
  };
  constexpr int kPiece = 16 / sizeof(T);
  const int pieces = int(round_up(head_dim, 16)) / kPiece;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(from.data) | uintptr_t(from.stride * int64_t(sizeof(T)))) % 16 ==
          0 &&
      head_dim % kPiece == 0;
  for (int n = thread_index(); n < count * pieces; n += num_threads()) {
    const int i = n / pieces, c = n % pieces * kPiece;
    Piece piece{};
    if (real(first + i) && c < head_dim) {
      const T* source = from.row(first + i) + c;
      if (aligned) {
        piece = *reinterpret_cast<const Piece*>(source);
      } else {
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
          if (c + e < head_dim) piece.at[e] = source[e];
        }
      }
    }
    *reinterpret_cast<Piece*>(to.row(i) + c) = piece;
  }
}

}  // namespace geot::cuda
