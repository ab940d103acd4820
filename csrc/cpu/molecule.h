// One molecule's atoms for one group of heads, in the layout that the kernels read: real atoms
// only, contiguous, channels padded with zeros to whole vectors. What is sums is laid out alike.
#pragma once

#include "arena.h"
#include "call.h"
#include "schedule.h"

namespace geot::cpu::GEOT_ISA {

// A call's sizes.
template <class T>
struct Sizes {
  int64_t head_dim, width, chunks;  // D; D padded to whole vectors; vectors
  int64_t heads_per_group;
  bool heads_first;  // how features are laid out: for products of matrices, or atom by atom

  explicit Sizes(const Inputs<T>& inputs, const Schedule& schedule)
      : head_dim(inputs.head_dim),
        width((head_dim + kWidth<T> - 1) / kWidth<T> * kWidth<T>),
        chunks(width / kWidth<T>),
        heads_per_group(schedule.heads_per_group),
        heads_first(!inputs.is_filter) {}
};

// Features [heads, capacity, width], or by atom [capacity, heads, width]: then absent heads are 0.
template <class T>
struct Features {
  T* data = nullptr;
  int64_t head_stride = 0, stride = 0, width = 0;

  explicit operator bool() const { return data != nullptr; }
  T* at(int64_t h, int64_t n) const { return data + h * head_stride + n * stride; }

  bool is_by_atom() const { return head_stride == width && stride > width; }
  void layout(Arena& arena, const Sizes<T>& sizes, int64_t capacity) {
    const int64_t heads = sizes.heads_per_group;
    width = sizes.width;
    head_stride = sizes.heads_first ? capacity * width : width;
    stride = sizes.heads_first ? width : heads * width;
    data = arena.take<T>(heads * capacity * width);
  }
};

// A group of heads: heads [first, first + count) of the tensors.
struct Group {
  int64_t first, count;
};
inline Group group_of(int64_t group, const Schedule& schedule, int64_t num_heads) {
  const int64_t first = group * schedule.heads_per_group;
  const int64_t rest = num_heads - first;
  return {first, rest < schedule.heads_per_group ? rest : schedule.heads_per_group};
}

// factor x [count], the rest of `width` zeros, N at a time.
template <int N, class T>
GEOT_INLINE void copy_padded(T* to, const T* from, int64_t count, int64_t width, T factor) {
  using V = Vector<T, N>;
  int64_t d = 0;
  for (; d + N <= count; d += N) store(to + d, factor * load<V>(from + d));
  if (d < width) {
    V rest{};
    for (int64_t l = 0; d + l < count; ++l) rest[l] = factor * from[d + l];
    store(to + d, rest);
  }
}
// factor x [count] of a padded row.
template <int N, class T>
GEOT_INLINE void copy_unpadded(T* to, const T* from, int64_t count, T factor) {
  using V = Vector<T, N>;
  int64_t d = 0;
  for (; d + N <= count; d += N) store(to + d, factor * load<V>(from + d));
  for (; d < count; ++d) to[d] = factor * from[d];
}

// Asks for the rows that `pack` is going to read: they are pieces of a row of all heads, which no
// hardware foresees.
template <class T>
void prefetch(const Rows<const T>& from, const Molecule& m, Group group, int64_t head_dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (!from) return;
  for (int64_t i = 0; i < m.count; ++i) {
    const T* row = from.at(m.batch, m.atoms[i], group.first);
    for (int64_t h = 0; h < group.count; ++h, row += from.stride_h) {
      for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(row + d, 0, 2);
    }
  }
}

template <class T>
void pack(const Features<T>& to, const Rows<const T>& from, const Molecule& m, Group group,
          int64_t head_dim, T factor = 1) {
  for (int64_t i = 0; i < m.count; ++i) {
    const T* source = from.at(m.batch, m.atoms[i], group.first);
    for (int64_t h = 0; h < group.count; ++h) {
      copy_padded<kWidth<T>>(to.at(h, i), source + h * from.stride_h, head_dim, to.width, factor);
    }
    for (int64_t h = group.count; to.is_by_atom() && h < to.stride / to.width; ++h) {
      std::memset(static_cast<void*>(to.at(h, i)), 0, to.width * sizeof(T));
    }
  }
}

template <class T>
void zero(const Features<T>& sums, int64_t heads, int64_t count) {
  if (sums.is_by_atom()) {
    std::memset(static_cast<void*>(sums.data), 0, count * sums.stride * sizeof(T));
    return;
  }
  for (int64_t h = 0; h < heads; ++h) {
    std::memset(static_cast<void*>(sums.at(h, 0)), 0, count * sums.width * sizeof(T));
  }
}

template <class T>
void pack_or_zero(const Features<T>& to, const Rows<const T>& from, const Molecule& m, Group group,
                  int64_t head_dim, T factor) {
  from ? pack(to, from, m, group, head_dim, factor) : zero(to, group.count, m.count);
}

template <class T>
void unpack(const Rows<T>& to, const Features<T>& from, const Molecule& m, Group group,
            int64_t head_dim, T factor = 1) {
  for (int64_t i = 0; i < m.count; ++i) {
    T* target = to.at(m.batch, m.atoms[i], group.first);
    for (int64_t h = 0; h < group.count; ++h) {
      copy_unpadded<kWidth<T>>(target + h * to.stride_h, from.at(h, i), head_dim, factor);
    }
  }
}

// A number for each head and atom, [heads, capacity].
template <class T>
struct RowNumbers {
  T* data = nullptr;
  int64_t capacity = 0;

  explicit operator bool() const { return data != nullptr; }
  T* at(int64_t h, int64_t i) const { return data + h * capacity + i; }
  void layout(Arena& arena, int64_t heads, int64_t rows) {
    capacity = rows;
    data = arena.take<T>(heads * rows);
  }
  void zero(int64_t heads) const {
    std::memset(static_cast<void*>(data), 0, heads * capacity * sizeof(T));
  }
  // From and to [num_rows, H]; `filler` in the lanes of a tile beyond the last atom.
  void pack(const T* from, int64_t num_heads, const Molecule& m, Group group, T filler) const {
    for (int64_t h = 0; h < group.count; ++h) {
      for (int64_t i = 0; i < m.count; ++i) {
        *at(h, i) = from[(m.first_row + m.atoms[i]) * num_heads + group.first + h];
      }
      for (int64_t i = m.count; i < capacity; ++i) *at(h, i) = filler;
    }
  }
  void unpack(T* to, int64_t num_heads, const Molecule& m, Group group) const {
    for (int64_t h = 0; h < group.count; ++h) {
      for (int64_t i = 0; i < m.count; ++i) {
        to[(m.first_row + m.atoms[i]) * num_heads + group.first + h] = *at(h, i);
      }
    }
  }
};

template <class T>
void pack_or_zero(const RowNumbers<T>& to, const T* from, int64_t num_heads, const Molecule& m,
                  Group group) {
  from != nullptr ? to.pack(from, num_heads, m, group, T(0)) : to.zero(group.count);
}

// x, y, z apart, [3, capacity].
template <class T>
struct Coordinates {
  T* data = nullptr;
  int64_t capacity = 0;

  explicit operator bool() const { return data != nullptr; }
  T* axis(int a) const { return data + a * capacity; }
  void layout(Arena& arena, int64_t rows) {
    capacity = rows;
    data = arena.take<T>(3 * rows);
  }
  void zero() const { std::memset(static_cast<void*>(data), 0, 3 * capacity * sizeof(T)); }
  void pack(const T* from, const Molecule& m) const {
    zero();
    for (int64_t i = 0; i < m.count; ++i) {
      for (int a = 0; a < 3; ++a) axis(a)[i] = from[3 * (m.first_row + m.atoms[i]) + a];
    }
  }
  GEOT_INLINE Vector3<Vec<T>> lanes(int64_t i) const {
    using V = Vec<T>;
    return {load<V>(axis(0) + i), load<V>(axis(1) + i), load<V>(axis(2) + i)};
  }
  GEOT_INLINE Vector3<Vec<T>> everywhere(int64_t j) const {
    using V = Vec<T>;
    return {broadcast<V>(axis(0)[j]), broadcast<V>(axis(1)[j]), broadcast<V>(axis(2)[j])};
  }
};

// The sums of a positions' gradient, apart for atoms as queries and as keys: jobs that run at once
// may have the same atoms as the one and as the other.
template <class T>
struct PositionsGradient {
  Coordinates<T> queries, keys;

  explicit operator bool() const { return bool(queries); }
  void layout(Arena& arena, int64_t rows) {
    queries.layout(arena, rows);
    keys.layout(arena, rows);
  }
  void zero() const {
    queries.zero();
    keys.zero();
  }
  void unpack(T* to, const Molecule& m) const {
    for (int64_t i = 0; i < m.count; ++i) {
      for (int a = 0; a < 3; ++a) {
        to[3 * (m.first_row + m.atoms[i]) + a] = queries.axis(a)[i] + keys.axis(a)[i];
      }
    }
  }
};

// What every pass reads of a molecule.
template <class T>
struct Atoms {
  const Molecule* molecule = nullptr;
  Coordinates<T> x;
  int64_t* types = nullptr;
  Features<T> q, k, v;  // q times κ

  static int64_t capacity(int64_t count) { return (count + kRows - 1) / kRows * kRows; }

  void layout(Arena& arena, const Inputs<T>& inputs, const Sizes<T>& sizes, int64_t count) {
    const int64_t rows = capacity(count);
    x.layout(arena, rows);
    if (inputs.pair_index != nullptr) types = arena.take<int64_t>(rows);
    for (Features<T>* f : {&q, &k, &v}) f->layout(arena, sizes, rows);
  }

  static void prefetch(const Inputs<T>& inputs, const Molecule& m, Group group) {
    for (const Rows<const T>* rows : {&inputs.q, &inputs.k, &inputs.v}) {
      cpu::GEOT_ISA::prefetch(*rows, m, group, inputs.head_dim);
    }
  }

  void pack(const Inputs<T>& inputs, const Molecule& m, Group group) {
    molecule = &m;
    x.pack(inputs.positions, m);
    if (types != nullptr) {
      for (int64_t i = 0; i < capacity(m.count); ++i) {
        types[i] = i < m.count ? inputs.atom_types[m.first_row + m.atoms[i]] : 0;
      }
    }
    cpu::GEOT_ISA::pack(q, inputs.q, m, group, inputs.head_dim, T(inputs.scale));
    cpu::GEOT_ISA::pack(k, inputs.k, m, group, inputs.head_dim);
    cpu::GEOT_ISA::pack(v, inputs.v, m, group, inputs.head_dim);
  }
};

}  // namespace geot::cpu::GEOT_ISA
