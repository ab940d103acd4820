// The score S_ij = κ Σ_c q_ic k_jc f_hc(z_ij), its tangent and their adjoints, head by head.
//
// The lanes of a vector are the channels c. A filter serves both directions, f_c(z_ij) = f_c(z_ji):
// in a block on the diagonal, where i and j are the same atoms, each pair i <= j is looked up, and
// its gradient added, once.
#pragma once

#include "../common/score.h"
#include "pairs.h"
#include "table.h"

namespace geot::cpu::GEOT_ISA {

template <class T>
class FilterScore {
 public:
  FilterScore(Arena& arena, const Inputs<T>& inputs, const Sizes<T>& sizes, bool has_radial_dot,
              bool sums_radial)
      : inputs_(inputs), sizes_(sizes) {
    layout(arena, table_);
    if (has_radial_dot) layout(arena, dot_);
    if (sums_radial) layout(arena, gradient_);
    for (T** x : {&value_, &slope_, &tangent_, &tangent_slope_}) {
      *x = arena.take<T>(kKeys * (kRows + 1) * sizes.width);
    }
  }

  void select(Group group, const T* radial_dot) {
    group_ = group;
    table_.set(inputs_.radial.data, first_channel(), group.count, inputs_.head_dim);
    if (dot_) dot_.set(radial_dot, first_channel(), group.count, inputs_.head_dim);
  }
  void begin_gradient() { gradient_.zero(); }
  void add_gradient_to(T* d_radial, Into into) const {
    gradient_.add_to(d_radial, first_channel(), group_.count, inputs_.head_dim, into);
  }

  void begin_tile(const Atoms<T>& atoms, const Tile&) { atoms_ = &atoms; }
  void begin_tile_tangent(const Tangents<T>& dots, const Tile&) { dots_ = &dots; }
  void begin_block(const Pairs<T>& pairs, const Block& block, bool needs_slope) {
    pairs_ = &pairs;
    block_ = block;
    needs_slope_ = needs_slope;
    clear(b_);
  }
  void begin_block_tangent(bool needs_slope) {
    needs_tangent_slope_ = needs_slope;
    clear(e_dot_);
  }

  // S [J, I] of a head. What it points to may be written over until the next head.
  T* scores(int64_t h) {
    look_up(h);
    const T* value = value_;
    sum_channels<false>(
        h, s_, [=](const FilterChannel<V>& x, int64_t at) { return x.term(load<V>(value + at)); });
    return s_;
  }
  // Ṡ [J, I] of a head, likewise.
  T* score_tangents(int64_t h) {
    const bool moves = dots_->moves_radial;
    if (moves) look_up_tangent(h);
    const T *value = value_, *tangent = tangent_;
    const auto term = [=](const FilterChannel<V>& x, int64_t at) {
      return x.term_tangent(load<V>(value + at), moves ? load<V>(tangent + at) : V{});
    };
    dots_->q ? sum_channels<true>(h, s_dot_, term) : sum_channels<false>(h, s_dot_, term);
    return s_dot_;
  }

  // The adjoint of `scores`: E, in the place of S.
  void pull(int64_t h, const Wanted& wanted, const Gradients<T>& to) {
    pull_pairs<Order::kFirst, false>(h, wanted, to);
  }
  // The adjoint of `score_tangents` and of `scores`: E in the place of S, S̄ in that of Ṡ.
  void pull_second(int64_t h, const Wanted& wanted, const Gradients<T>& to) {
    dots_->q ? pull_pairs<Order::kSecond, true>(h, wanted, to)
             : pull_pairs<Order::kSecond, false>(h, wanted, to);
  }

  void end_block(const Wanted&) {}
  void end_block_second(const Wanted&) {}
  const T* b() const { return b_; }          // dL/du of the pairs, or b̄
  const T* e_dot() const { return e_dot_; }  // ẽ

 private:
  using V = Vec<T>;
  static constexpr int W = kWidth<T>;
  enum class Order { kFirst, kSecond };

  int64_t first_channel() const { return group_.first * inputs_.head_dim; }
  void layout(Arena& arena, KnotTable<T, W>& table) const {
    table.layout(arena, inputs_.radial, inputs_.num_channels(), sizes_.heads_per_group,
                 sizes_.width);
  }
  static void clear(PairNumbers<T>& x) { std::memset(static_cast<void*>(x), 0, sizeof(x)); }

  // A vector of channels of one atom's features; in a diagonal block the atom is query and key.
  struct Atom {
    V q, k, q_dot, k_dot;
  };
  // Where such vectors are, for a head.
  template <bool kDots>
  struct Reader {
    const T *q, *k, *q_dot, *k_dot;
    int64_t width;

    GEOT_INLINE Atom query(int64_t i, int64_t c) const {
      return {load<V>(q + i * width + c), V{}, kDots ? load<V>(q_dot + i * width + c) : V{}, V{}};
    }
    GEOT_INLINE Atom key(int64_t j, int64_t c) const {
      return {V{}, load<V>(k + j * width + c), V{}, kDots ? load<V>(k_dot + j * width + c) : V{}};
    }
    GEOT_INLINE Atom both(int64_t i, int64_t c) const {
      const Atom a = query(i, c), b = key(i, c);
      return {a.q, b.k, a.q_dot, b.k_dot};
    }
  };
  template <bool kDots>
  Reader<kDots> reader(int64_t h) const {
    const int64_t i = block_.tile.first, j = block_.first;
    return {atoms_->q.at(h, i), atoms_->k.at(h, j), kDots ? dots_->q.at(h, i) : nullptr,
            kDots ? dots_->k.at(h, j) : nullptr, sizes_.width};
  }
  static GEOT_INLINE FilterChannel<V> channel(const Atom& query, const Atom& key) {
    return {query.q, key.k, query.q_dot, key.k_dot};
  }

  // Where the filter of a pair is, in units of `width`; rows one longer than kRows do not fall on
  // each other in the cache.
  static GEOT_INLINE int64_t place(int64_t i, int64_t j) { return j * (kRows + 1) + i; }

  // out [I] += the sums of the rows of terms [I, W].
  static GEOT_INLINE void add_sums(const T* terms, int64_t rows, T* out) {
    constexpr int L = kLane / sizeof(T);
    int64_t first = 0;
    for (; first + W / 2 < rows; first += W) add_sums_of<W>(terms, first, rows, out);
    if constexpr (W > 2 * L) {
      if (first + W / 4 < rows) return add_sums_of<W / 2>(terms, first, rows, out);
    }
    if (first < rows) add_sums_of<W / 4 >= L ? W / 4 : W>(terms, first, rows, out);
  }
  template <int N>
  static GEOT_INLINE void add_sums_of(const T* terms, int64_t first, int64_t rows, T* out) {
    V r[N];
#pragma GCC unroll 16
    for (int e = 0; e < N; ++e) r[e] = load<V>(terms + (first + e) * W);
    const V sums = sums_of(r);
    const auto is_row = lane_numbers<V>() < Integer<T>(rows - first);
    store(out + first, load<V>(out + first) + (is_row ? sums : V{}));
  }

  // out [J, I] = Σ_c term(channel c of the pair, its filter's place)
  template <bool kDots, class Term>
  void sum_channels(int64_t h, T* out, Term term) {
    const Reader<kDots> atoms = reader<kDots>(h);
    const int64_t keys = block_.keys, rows = block_.tile.rows, width = sizes_.width;
    const bool diagonal = block_.is_diagonal();
    std::memset(static_cast<void*>(out), 0, sizeof(PairNumbers<T>));
    for (int64_t c = 0; c < width; c += W) {
      for (int64_t j = 0; j < keys; ++j) {
        const Atom key = atoms.key(j, c);
        const int64_t above = diagonal ? j : rows;
        int64_t i = 0;
        for (; i < above; ++i) {
          store(terms_[0] + i * W, term(channel(atoms.query(i, c), key), place(i, j) * width + c));
        }
        for (; i < rows; ++i) {
          store(terms_[0] + i * W, term(channel(atoms.query(i, c), key), place(j, i) * width + c));
        }
        add_sums(terms_[0], rows, out + j * kRows);
      }
    }
  }

  // body(place in [J, I], the filter's place) for each filter of the block.
  template <class Body>
  GEOT_INLINE void for_each_filter(Body body) const {
    const bool diagonal = block_.is_diagonal();
    for (int64_t j = 0; j < block_.keys; ++j) {
      const int64_t end = diagonal ? j + 1 : block_.tile.rows;
      for (int64_t i = 0; i < end; ++i) body(j * kRows + i, place(i, j));
    }
  }
  void look_up(int64_t h) {
    const auto table = table_.of_head(h);
    const Pairs<T>& pairs = *pairs_;
    const int64_t width = sizes_.width;
    T *values = value_, *slopes = needs_slope_ ? slope_ : nullptr;
    for_each_filter([=, &pairs](int64_t pair, int64_t at) {
      for (int64_t c = 0; c < width; c += W) {
        const Knots<V> k = table.at(pairs.knot[pair], c);
        store(values + at * width + c, value(k, pairs.value.at(pair)));
        if (slopes) store(slopes + at * width + c, derivative(k, pairs.slope.at(pair)));
      }
    });
  }
  // f̃ = f' u̇ + ḟ, and its derivative f'' u̇ + ḟ'.
  void look_up_tangent(int64_t h) {
    const auto table = table_.of_head(h), dot = dot_.of_head(h);
    const Pairs<T>& pairs = *pairs_;
    const int64_t width = sizes_.width;
    T *tangents = tangent_, *slopes = needs_tangent_slope_ ? tangent_slope_ : nullptr;
    for_each_filter([=, &pairs](int64_t pair, int64_t at) {
      const T u_dot = pairs.u_dot[pair];
      for (int64_t c = 0; c < width; c += W) {
        const Knots<V> k = table.at(pairs.knot[pair], c);
        V tangent = u_dot * derivative(k, pairs.slope.at(pair)), slope{};
        if (slopes) slope = u_dot * derivative(k, pairs.curvature.at(pair));
        if (dot) {
          const Knots<V> k_dot = dot.at(pairs.knot[pair], c);
          tangent += value(k_dot, pairs.value.at(pair));
          if (slopes) slope += derivative(k_dot, pairs.slope.at(pair));
        }
        store(tangents + at * width + c, tangent);
        if (slopes) store(slopes + at * width + c, slope);
      }
    });
  }

  template <Order kOrder, bool kDots>
  void pull_pairs(int64_t h, const Wanted& wanted, const Gradients<T>& to) {
    const auto with = [&](auto diagonal, auto features) {
      pull_pairs_of<kOrder, kDots, diagonal.value, features.value>(h, wanted, to);
    };
    const auto with_block = [&](auto features) {
      block_.is_diagonal() ? with(std::true_type{}, features) : with(std::false_type{}, features);
    };
    wanted.q || wanted.k ? with_block(std::true_type{}) : with_block(std::false_type{});
  }

  template <Order kOrder, bool kDots, bool kDiagonal, bool kFeatures>
  void pull_pairs_of(int64_t h, const Wanted& wanted, const Gradients<T>& to) {
    constexpr bool kSecond = kOrder == Order::kSecond;
    const Reader<kDots> atoms = reader<kDots>(h);
    const int64_t keys = block_.keys, rows = block_.tile.rows, width = sizes_.width;
    const Pairs<T>& pairs = *pairs_;
    const auto gradient = gradient_.of_head(h);
    const bool geometry = wanted.geometry, radial = wanted.radial;
    const bool moves = kSecond && dots_->moves_radial;
    const T *values = value_, *slopes = slope_, *tangents = tangent_;
    const T *tangent_slopes = tangent_slope_, *e = s_, *s_bar = s_dot_;
    T *terms = terms_[0], *terms_dot = terms_[1];
    T* dq = kFeatures ? to.q.at(h, block_.tile.first) : nullptr;
    T* dk = kFeatures ? to.k.at(h, block_.first) : nullptr;

    for (int64_t c = 0; c < width; c += W) {
      for (int64_t j = 0; j < keys; ++j) {
        const Atom at_j = kDiagonal ? atoms.both(j, c) : atoms.key(j, c);
        V dq_j{}, dk_j{};  // what atom j gets as query (on the diagonal) and as key

        // One direction of a pair, `way` its place in [J, I]: adds to g and g_dot, and to dq and
        // dk.
        const auto pull_way = [&](int64_t way, const Atom& query, const Atom& key, V f, V f_dot,
                                  V& g, V& g_dot, V& d_query, V& d_key) {
          const FilterChannel<V> x = channel(query, key);
          if constexpr (kSecond) {
            g += x.pull_second(e[way], s_bar[way]);
            g_dot += x.pull(e[way]);
            if constexpr (kFeatures) {
              d_query += filter_pull_second(e[way], s_bar[way], x.k, x.k_dot, f, f_dot);
              d_key += filter_pull_second(e[way], s_bar[way], x.q, x.q_dot, f, f_dot);
            }
          } else {
            g += x.pull(e[way]);
            if constexpr (kFeatures) {
              const V ef = e[way] * f;
              d_query += ef * x.k;
              d_key += ef * x.q;
            }
          }
        };
        const auto pull_filter = [&](int64_t i, V g, V g_dot) {
          const int64_t pair = j * kRows + i, at = place(i, j) * width + c;
          if (geometry) {
            const V slope = load<V>(slopes + at);
            V b = g * slope;
            if (moves) b += g_dot * load<V>(tangent_slopes + at);
            store(terms + i * W, b);
            if constexpr (kSecond) store(terms_dot + i * W, g_dot * slope);
          }
          if (radial) {
            Knots<V> sums = gradient.at(pairs.knot[pair], c);
            pull_value(sums, pairs.value.at(pair), g);
            if (moves) pull_derivative(sums, pairs.slope.at(pair), g_dot * pairs.u_dot[pair]);
            gradient.put(pairs.knot[pair], c, sums);
          }
        };

        for (int64_t i = 0; i < (kDiagonal ? j : rows); ++i) {
          const int64_t pair = j * kRows + i, at = place(i, j) * width + c;
          const Atom at_i = kDiagonal ? atoms.both(i, c) : atoms.query(i, c);
          const V f = load<V>(values + at), f_dot = moves ? load<V>(tangents + at) : V{};
          V g{}, g_dot{}, dq_i{}, dk_i{};
          pull_way(pair, at_i, at_j, f, f_dot, g, g_dot, dq_i, dk_j);
          if constexpr (kDiagonal) {
            pull_way(i * kRows + j, at_j, at_i, f, f_dot, g, g_dot, dq_j, dk_i);
          }
          if constexpr (kFeatures) {
            add(dq + i * width + c, dq_i);
            if constexpr (kDiagonal) add(dk + i * width + c, dk_i);
          }
          pull_filter(i, g, g_dot);
        }
        if constexpr (kDiagonal) {
          const int64_t pair = j * kRows + j, at = place(j, j) * width + c;
          const V f = load<V>(values + at), f_dot = moves ? load<V>(tangents + at) : V{};
          V g{}, g_dot{};
          pull_way(pair, at_j, at_j, f, f_dot, g, g_dot, dq_j, dk_j);
          pull_filter(j, g, g_dot);
        }
        if constexpr (kFeatures) {
          add(dk + j * width + c, dk_j);
          if constexpr (kDiagonal) add(dq + j * width + c, dq_j);
        }
        if (geometry) {
          add_sums(terms, kDiagonal ? j + 1 : rows, b_ + j * kRows);
          if constexpr (kSecond) {
            add_sums(terms_dot, kDiagonal ? j + 1 : rows, e_dot_ + j * kRows);
          }
        }
      }
    }
  }
  static GEOT_INLINE void add(T* to, V x) { store(to, load<V>(to) + x); }

  const Inputs<T>& inputs_;
  const Sizes<T>& sizes_;
  bool needs_slope_ = false, needs_tangent_slope_ = false;
  Group group_{};
  const Atoms<T>* atoms_ = nullptr;
  const Tangents<T>* dots_ = nullptr;
  const Pairs<T>* pairs_ = nullptr;
  Block block_{};
  KnotTable<T, W> table_, dot_, gradient_;
  T *value_, *slope_, *tangent_, *tangent_slope_;  // of one head, [J, I + 1, width]
  alignas(64) T terms_[2][kRows * W];              // [I, W], to be summed
  alignas(64) PairNumbers<T> s_;
  alignas(64) PairNumbers<T> s_dot_;
  alignas(64) PairNumbers<T> b_;
  alignas(64) PairNumbers<T> e_dot_;
};

}  // namespace geot::cpu::GEOT_ISA
