// A group's channels of a table, contiguous and padded, as the lookups read them; and their
// gradient, laid out alike.
#pragma once

#include "../common/spline.h"
#include "arena.h"
#include "molecule.h"

namespace geot::cpu::GEOT_ISA {

// Knots [P (G + 1), 2, width], handled N channels at a time. A copy is another handle.
template <class T, int N>
class KnotTable {
 public:
  using V = Vector<T, N>;

  void layout(Arena& arena, const Radial<T>& radial, int64_t num_channels, int64_t width) {
    rows_ = 2 * radial.num_tables * radial.num_knots;
    num_channels_ = num_channels;
    width_ = width;
    data_ = arena.take<T>(rows_ * width);
  }
  explicit operator bool() const { return data_ != nullptr; }

  // Channels [first, first + heads * count) of knots [P, G + 1, 2, C]: `count` for each head, which
  // has room for `head_width`.
  void set(const T* knots, int64_t first, int64_t heads, int64_t count, int64_t head_width) {
    for (int64_t r = 0; r < rows_; ++r) {
      const T* from = knots + r * num_channels_ + first;
      for (int64_t h = 0; h < heads; ++h) {
        copy_padded<N>(data_ + r * width_ + h * head_width, from + h * count, count, head_width,
                       T(1));
      }
      for (int64_t c = heads * head_width; c < width_; ++c) data_[r * width_ + c] = 0;
    }
  }
  void zero() { std::memset(static_cast<void*>(data_), 0, rows_ * width_ * sizeof(T)); }
  // The adjoint of `set`: adds to the gradient of the knots, or sets it.
  void add_to(T* d_knots, int64_t first, int64_t heads, int64_t count, int64_t head_width,
              Into into) const {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t h = 0; h < heads; ++h) {
        T* to = d_knots + r * num_channels_ + first + h * count;
        const T* from = data_ + r * width_ + h * head_width;
        if (into == Into::kSet) {
          copy_unpadded<N>(to, from, count, T(1));
        } else {
          for (int64_t c = 0; c < count; ++c) to[c] += from[c];
        }
      }
    }
  }

  // The interval that starts at a knot: its four rows.
  struct Interval {
    T *y0, *s0, *y1, *s1;

    GEOT_INLINE Knots<V> at(int64_t c) const {
      return {load<V>(y0 + c), load<V>(s0 + c), load<V>(y1 + c), load<V>(s1 + c)};
    }
    GEOT_INLINE void put(int64_t c, const Knots<V>& k) const {
      store(y0 + c, k.y0);
      store(s0 + c, k.s0);
      store(y1 + c, k.y1);
      store(s1 + c, k.s1);
    }
  };
  GEOT_INLINE Interval interval(int64_t knot) const {
    T* p = data_ + 2 * knot * width_;
    return {p, p + width_, p + 2 * width_, p + 3 * width_};
  }
  GEOT_INLINE Knots<V> at(int64_t knot, int64_t c) const { return interval(knot).at(c); }

 private:
  T* data_ = nullptr;
  int64_t rows_ = 0, num_channels_ = 0, width_ = 0;
};

}  // namespace geot::cpu::GEOT_ISA
