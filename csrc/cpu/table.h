// A table's intervals as cubics, channels contiguous and padded: what the lookups read, and what
// the gradient is summed in before it goes back to the knots.
#pragma once

#include "../common/cubic.h"
#include "arena.h"
#include "call.h"

namespace geot::cpu::GEOT_ISA {

// Cubics of `width` channels, [P G, 4, width], handled N channels at a time.
template <class T, int N>
class Cubics {
 public:
  using V = Vector<T, N>;

  void layout(Arena& arena, const Radial<T>& radial, int64_t num_channels, int64_t width) {
    tables_ = radial.num_tables;
    intervals_ = radial.num_knots - 1;
    num_channels_ = num_channels;
    width_ = width;
    data_ = arena.take<T>(tables_ * intervals_ * 4 * width);
  }
  explicit operator bool() const { return data_ != nullptr; }

  // Channels [first, first + count) of knots [P, G + 1, 2, C].
  void set(const T* knots, int64_t first, int64_t count) {
    for_each_interval([&](int64_t at, int64_t interval) {
      const T* here = knots + at * num_channels_ + first;
      for (int64_t c = 0; c < width_; c += N) {
        const Knots<V> k = {part(here, 0, c, count), part(here, 1, c, count),
                            part(here, 2, c, count), part(here, 3, c, count)};
        const Cubic<V> f = cubic_of_knots(k);
        store(row(interval, 0) + c, f.c0);
        store(row(interval, 1) + c, f.c1);
        store(row(interval, 2) + c, f.c2);
        store(row(interval, 3) + c, f.c3);
      }
    });
  }

  void zero() {
    std::memset(static_cast<void*>(data_), 0, tables_ * intervals_ * 4 * width_ * sizeof(T));
  }

  // The adjoint of `set`: adds what was summed here to the gradient of the knots.
  void add_to(T* d_knots, int64_t first, int64_t count) const {
    for_each_interval([&](int64_t at, int64_t interval) {
      T* here = d_knots + at * num_channels_ + first;
      for (int64_t c = 0; c < width_; c += N) {
        const Knots<V> k = knots_of_cubic(cubic(interval, c));
        add_part(here, 0, c, count, k.y0);
        add_part(here, 1, c, count, k.s0);
        add_part(here, 2, c, count, k.y1);
        add_part(here, 3, c, count, k.s1);
      }
    });
  }

  GEOT_INLINE Cubic<V> cubic(int64_t interval, int64_t c) const {
    return {load<V>(row(interval, 0) + c), load<V>(row(interval, 1) + c),
            load<V>(row(interval, 2) + c), load<V>(row(interval, 3) + c)};
  }
  GEOT_INLINE void add(int64_t interval, int64_t c, const Cubic<V>& f) {
    T* p = row(interval, 0) + c;
    store(p, load<V>(p) + f.c0);
    store(p + width_, load<V>(p + width_) + f.c1);
    store(p + 2 * width_, load<V>(p + 2 * width_) + f.c2);
    store(p + 3 * width_, load<V>(p + 3 * width_) + f.c3);
  }

 private:
  GEOT_INLINE T* row(int64_t interval, int64_t coefficient) const {
    return data_ + (4 * interval + coefficient) * width_;
  }
  // body(the interval's first row among those of the knots, its number)
  template <class Body>
  void for_each_interval(Body body) const {
    for (int64_t p = 0; p < tables_; ++p) {
      for (int64_t g = 0; g < intervals_; ++g) {
        body(2 * (p * (intervals_ + 1) + g), p * intervals_ + g);
      }
    }
  }
  GEOT_INLINE V part(const T* rows, int64_t r, int64_t c, int64_t count) const {
    const T* p = rows + r * num_channels_ + c;
    if (c + N <= count) return load<V>(p);
    V x{};
    for (int64_t i = 0; c + i < count; ++i) x[i] = p[i];
    return x;
  }
  GEOT_INLINE void add_part(T* rows, int64_t r, int64_t c, int64_t count, V x) const {
    T* p = rows + r * num_channels_ + c;
    if (c + N <= count) {
      store(p, load<V>(p) + x);
    } else {
      for (int64_t i = 0; c + i < count; ++i) p[i] += x[i];
    }
  }

  T* data_ = nullptr;
  int64_t tables_ = 0, intervals_ = 0, num_channels_ = 0, width_ = 0;
};

}  // namespace geot::cpu::GEOT_ISA
