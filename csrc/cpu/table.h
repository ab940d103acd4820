// A group's channels of a table, contiguous and padded, as the lookups read them; and their
// gradient, laid out alike.
#pragma once

#include "../common/spline.h"
#include "arena.h"
#include "molecule.h"

namespace geot::cpu::GEOT_ISA {

// Knots [heads, P (G + 1), 2, width], handled N channels at a time. A copy is another handle.
template <class T, int N>
class KnotTable {
 public:
  using V = Vector<T, N>;

  void layout(Arena& arena, const Radial<T>& radial, int64_t num_channels, int64_t heads,
              int64_t width) {
    rows_ = 2 * radial.num_tables * radial.num_knots;
    num_channels_ = num_channels;
    heads_ = heads;
    width_ = width;
    data_ = arena.take<T>(heads * rows_ * width);
  }
  explicit operator bool() const { return data_ != nullptr; }

  // Channels [first, first + heads * count) of knots [P, G + 1, 2, C], `count` for each head.
  void set(const T* knots, int64_t first, int64_t heads, int64_t count) {
    for_each_row(heads, [&](int64_t r, int64_t h) {
      copy_padded<N>(data_ + (h * rows_ + r) * width_,
                     knots + r * num_channels_ + first + h * count, count, width_, T(1));
    });
  }
  void zero() { std::memset(static_cast<void*>(data_), 0, heads_ * rows_ * width_ * sizeof(T)); }
  // The adjoint of `set`: adds to the gradient of the knots, or sets it.
  void add_to(T* d_knots, int64_t first, int64_t heads, int64_t count, Into into) const {
    for_each_row(heads, [&](int64_t r, int64_t h) {
      T* to = d_knots + r * num_channels_ + first + h * count;
      const T* from = data_ + (h * rows_ + r) * width_;
      if (into == Into::kSet) return copy_unpadded<N>(to, from, count, T(1));
      int64_t c = 0;
      for (; c + N <= count; c += N) store(to + c, load<V>(to + c) + load<V>(from + c));
      for (; c < count; ++c) to[c] += from[c];
    });
  }

  KnotTable of_head(int64_t h) const {
    KnotTable table = *this;
    table.data_ += data_ != nullptr ? h * rows_ * width_ : 0;
    return table;
  }

  // The interval that starts at a knot.
  GEOT_INLINE Knots<V> at(int64_t knot, int64_t c) const {
    const T* p = data_ + 2 * knot * width_ + c;
    return {load<V>(p), load<V>(p + width_), load<V>(p + 2 * width_), load<V>(p + 3 * width_)};
  }
  GEOT_INLINE void put(int64_t knot, int64_t c, const Knots<V>& k) const {
    T* p = data_ + 2 * knot * width_ + c;
    store(p, k.y0);
    store(p + width_, k.s0);
    store(p + 2 * width_, k.y1);
    store(p + 3 * width_, k.s1);
  }

 private:
  // Row by row, all heads of each: a row of all channels is a page, or more.
  template <class Body>
  GEOT_INLINE void for_each_row(int64_t heads, Body body) const {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t h = 0; h < heads; ++h) body(r, h);
    }
  }

  T* data_ = nullptr;
  int64_t rows_ = 0, num_channels_ = 0, heads_ = 0, width_ = 0;
};

}  // namespace geot::cpu::GEOT_ISA
