// The score S_ij = κ Σ_c q_ic k_jc f_hc(z_ij), its tangent and their adjoints, for a group of 8
// heads.
//
// The lanes of a vector are the channels c. Pair by pair, all heads: where the pair is in the table
// serves all of them, and their sums over c become one row [8 heads], turned over to [h, J, I]. A
// filter serves both directions, f_c(z_ij) = f_c(z_ji): in a block on the diagonal, where i and j
// are the same atoms, each pair i <= j is looked up, and its gradient added, once.
#pragma once

#include "../common/score.h"
#include "products.h"
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
    for (auto* x : {&s_, &s_dot_}) {
      *x = reinterpret_cast<PairsOfHeads<T>*>(arena.take<T>(kHeads * kKeys * kRows));
    }
    for (T** x : {&rows_, &rows_dot_}) *x = arena.take_zeros<T>(kHeads * kKeys * kRows);
  }

  void select(Group group, const T* radial_dot) {
    group_ = group;
    const int64_t D = inputs_.head_dim, first = group.first * D;
    table_.set(inputs_.radial.data, first, group.count, D, sizes_.width);
    if (dot_) dot_.set(radial_dot, first, group.count, D, sizes_.width);
  }
  void begin_gradient() { gradient_.zero(); }
  void add_gradient_to(T* d_radial, Into into) const {
    const int64_t D = inputs_.head_dim;
    gradient_.add_to(d_radial, group_.first * D, group_.count, D, sizes_.width, into);
  }

  void begin_tile(const Atoms<T>& atoms, const Tile&) { atoms_ = &atoms; }
  void begin_tile_tangent(const Tangents<T>& dots, const Tile&) { dots_ = &dots; }

  // S of all heads.
  void begin_block(const Pairs<T>& pairs, const Block& block, bool) {
    pairs_ = &pairs;
    block_ = block;
    const auto table = table_;
    sum_channels<false>(*s_, [=, &pairs](int64_t pair) GEOT_LAMBDA {
      const auto interval = table.interval(pairs.knot[pair]);
      return [=, w = pairs.value.at(pair)](int64_t c) GEOT_LAMBDA {
        const V f = value(interval.at(c), w);
        return [=](const FilterChannel<V>& x) GEOT_LAMBDA { return x.term(f); };
      };
    });
  }
  // Ṡ of all heads.
  void begin_block_tangent(bool) { dots_->q ? sum_tangents<true>() : sum_tangents<false>(); }
  // S and Ṡ [J, I] of a head. What they point to may be written over until the next block.
  T* scores(int64_t h) { return (*s_)[h]; }
  T* score_tangents(int64_t h) { return (*s_dot_)[h]; }

  // The adjoints: E in the place of S, S̄ in that of Ṡ, when all heads have them.
  void pull(int64_t, const Wanted&, const Gradients<T>&) {}
  void pull_second(int64_t, const Wanted&, const Gradients<T>&) {}
  void end_block(const Wanted& wanted, const Gradients<T>& to) {
    turn_over_to_rows(*s_, rows_);
    pull_pairs<Order::kFirst, false>(wanted, to);
  }
  void end_block_second(const Wanted& wanted, const Gradients<T>& to) {
    turn_over_to_rows(*s_, rows_);
    turn_over_to_rows(*s_dot_, rows_dot_);
    dots_->q ? pull_pairs<Order::kSecond, true>(wanted, to)
             : pull_pairs<Order::kSecond, false>(wanted, to);
  }
  const T* b() const { return b_; }          // dL/du of the pairs, or b̄
  const T* e_dot() const { return e_dot_; }  // ẽ

 private:
  using V = Vec<T>;
  using Row = Vector<T, kHeads>;
  static constexpr int W = kWidth<T>;
  enum class Order { kFirst, kSecond };

  void layout(Arena& arena, KnotTable<T, W>& table) const {
    table.layout(arena, inputs_.radial, inputs_.num_channels(), kHeads * sizes_.width);
  }

  // The channels of one atom's features, all heads in a row.
  struct Atom {
    const T *q, *k, *q_dot, *k_dot;
  };
  // Query atom i of the tile; key atom j of the block. On the diagonal they are the same atoms.
  template <bool kDots>
  GEOT_INLINE Atom atom(int64_t i, int64_t j) const {
    const int64_t n = block_.tile.first + i, m = block_.first + j;
    return {atoms_->q.at(0, n), atoms_->k.at(0, m), kDots ? dots_->q.at(0, n) : nullptr,
            kDots ? dots_->k.at(0, m) : nullptr};
  }
  template <bool kDots>
  static GEOT_INLINE FilterChannel<V> channel(const Atom& query, const Atom& key, int64_t c) {
    return {load<V>(query.q + c), load<V>(key.k + c), kDots ? load<V>(query.q_dot + c) : V{},
            kDots ? load<V>(key.k_dot + c) : V{}};
  }

  // A row [8 heads]: element h the sum of the elements of sums[h].
  static GEOT_INLINE void store_row(T* to, const V (&sums)[kHeads]) {
    constexpr int N = W < kHeads ? W : kHeads;
#pragma GCC unroll 8
    for (int first = 0; first < kHeads; first += N) {
      V r[N];
#pragma GCC unroll 8
      for (int e = 0; e < N; ++e) r[e] = sums[first + e];
      const V row = sums_of(r);
      if constexpr (W > N) {
        store(to, __builtin_shufflevector(row, row, 0, 1, 2, 3, 4, 5, 6, 7));
      } else {
        store(to + first, row);
      }
    }
  }

  // Calls body(integral constants): how many vectors a head has, where that is known in advance
  // (else 0), and for how many heads to compute (absent ones are 0): a pair is one run of code.
  template <class Body>
  GEOT_INLINE void with_layout(Body body) const {
    const auto with_heads = [&](auto chunks) {
      group_.count > kHeads / 2 ? body(chunks, std::integral_constant<int, kHeads>{})
                                : body(chunks, std::integral_constant<int, kHeads / 2>{});
    };
    switch (sizes_.chunks) {
      case 1:
        return with_heads(std::integral_constant<int, 1>{});
      case 2:
        return with_heads(std::integral_constant<int, 2>{});
      default:
        return with_heads(std::integral_constant<int, 0>{});
    }
  }

  // out [h, J, I] = Σ_c prepare(pair)(c)(channel c)
  template <bool kDots, class Prepare>
  void sum_channels(PairsOfHeads<T>& out, Prepare prepare) {
    with_layout([&](auto chunks, auto count) {
      block_.is_diagonal() ? sum_rows<kDots, true, chunks.value, count.value>(prepare)
                           : sum_rows<kDots, false, chunks.value, count.value>(prepare);
    });
    for_each_octet(block_, [&](int64_t at, int64_t) {
      Row row[kHeads];
#pragma GCC unroll 8
      for (int i = 0; i < kHeads; ++i) row[i] = load<Row>(rows_ + (at + i) * kHeads);
      turn_to_heads<T>(row, out, at, group_.count);
    });
  }

  template <bool kDots, bool kDiagonal, int kChunks, int kCount, class Prepare>
  void sum_rows(Prepare prepare) {
    const int64_t width = sizes_.width;
    T* const rows = rows_;
    for (int64_t j = 0; j < block_.keys; ++j) {
      const int64_t end = kDiagonal ? j + 1 : block_.tile.rows;
      const Atom at_j = atom<kDots>(kDiagonal ? j : 0, j);
      for (int64_t i = 0; i < end; ++i) {
        const Atom at_i = atom<kDots>(i, kDiagonal ? i : 0);
        const auto of_channel = prepare(j * kRows + i);
        V sums[kHeads] = {}, sums_back[kHeads] = {};
        const auto add = [&](int h, int64_t c, bool is_first) GEOT_LAMBDA {
          const auto term = of_channel(c);
          const V there = term(channel<kDots>(at_i, at_j, c));
          sums[h] = is_first ? there : sums[h] + there;
          if constexpr (kDiagonal) {
            const V back = term(channel<kDots>(at_j, at_i, c));
            sums_back[h] = is_first ? back : sums_back[h] + back;
          }
        };
#pragma GCC unroll 8
        for (int h = 0; h < kCount; ++h) {
          if constexpr (kChunks > 0) {
#pragma GCC unroll 2
            for (int n = 0; n < kChunks; ++n) add(h, (h * kChunks + n) * W, n == 0);
          } else {
            for (int64_t c = 0; c < width; c += W) add(h, h * width + c, c == 0);
          }
        }
        store_row(rows + (j * kRows + i) * kHeads, sums);
        if constexpr (kDiagonal) store_row(rows + (i * kRows + j) * kHeads, sums_back);
      }
    }
  }
  void turn_over_to_rows(const PairsOfHeads<T>& x, T* rows) const {
    for_each_octet(block_, [&](int64_t at, int64_t) {
      Row row[kHeads];
      turn_to_rows<T>(x, row, at, group_.count);
#pragma GCC unroll 8
      for (int i = 0; i < kHeads; ++i) store(rows + (at + i) * kHeads, row[i]);
    });
  }

  // f̃ = f' u̇ + ḟ at channel c of a pair.
  GEOT_INLINE V tangent(int64_t pair, const Knots<V>& k, const Knots<V>& k_dot) const {
    const V f = pairs_->u_dot[pair] * derivative(k, pairs_->slope.at(pair));
    return dot_ ? f + value(k_dot, pairs_->value.at(pair)) : f;
  }
  GEOT_INLINE Knots<V> knots_dot(int64_t pair, int64_t c) const {
    return dot_ ? dot_.at(pairs_->knot[pair], c) : Knots<V>{};
  }

  template <bool kDots>
  void sum_tangents() {
    const bool moves = dots_->moves_radial;
    sum_channels<kDots>(*s_dot_, [=, this](int64_t pair) GEOT_LAMBDA {
      return [=, this](int64_t c) GEOT_LAMBDA {
        const Knots<V> k = table_.at(pairs_->knot[pair], c);
        const V f = value(k, pairs_->value.at(pair));
        const V f_dot = moves ? tangent(pair, k, knots_dot(pair, c)) : V{};
        return [=](const FilterChannel<V>& x) GEOT_LAMBDA { return x.term_tangent(f, f_dot); };
      };
    });
  }

  template <Order kOrder, bool kDots>
  void pull_pairs(const Wanted& wanted, const Gradients<T>& to) {
    const auto with = [&](auto features) {
      block_.is_diagonal() ? pull_pairs_of<kOrder, kDots, true, features.value>(wanted, to)
                           : pull_pairs_of<kOrder, kDots, false, features.value>(wanted, to);
    };
    wanted.q || wanted.k ? with(std::true_type{}) : with(std::false_type{});
  }

  // Vectors of channels at once: more of them are more sums of atom j in registers.
  static constexpr int kMost = kRegisters >= 32 ? 4 : 2;

  template <Order kOrder, bool kDots, bool kDiagonal, bool kFeatures>
  void pull_pairs_of(const Wanted& wanted, const Gradients<T>& to) {
    const int64_t columns = group_.count * sizes_.width;
    const bool one_chunk = sizes_.chunks == 1;
    for (int64_t j = 0; j < block_.keys; ++j) {
      const int64_t end = kDiagonal ? j + 1 : block_.tile.rows;
      if (wanted.geometry) {
        std::memset(static_cast<void*>(terms_), 0, sizeof(terms_));
        std::memset(static_cast<void*>(terms_dot_), 0, sizeof(terms_dot_));
      }
      int64_t c = 0;
      for (; one_chunk && c + kMost * W <= columns; c += kMost * W) {
        pull_columns<kOrder, kDots, kDiagonal, kFeatures, kMost>(wanted, to, j, c);
      }
      for (; c < columns; c += W) {
        pull_columns<kOrder, kDots, kDiagonal, kFeatures, 1>(wanted, to, j, c);
      }
      if (wanted.geometry) {
        store_sums(terms_, end, b_ + j * kRows);
        if (kOrder == Order::kSecond) store_sums(terms_dot_, end, e_dot_ + j * kRows);
      }
    }
  }

  // An atom's channels, and what they get.
  struct Side {
    V q, k, q_dot, k_dot, dq, dk;
  };

  // All pairs of key atom j, N vectors of channels from c on, each of a head of its own.
  template <Order kOrder, bool kDots, bool kDiagonal, bool kFeatures, int N>
  void pull_columns(const Wanted& wanted, const Gradients<T>& to, int64_t j, int64_t c) {
    constexpr bool kSecond = kOrder == Order::kSecond;
    const Pairs<T>& pairs = *pairs_;
    const auto table = table_, gradient = gradient_;
    const bool geometry = wanted.geometry, radial = wanted.radial;
    const bool moves = kSecond && dots_->moves_radial;
    const T *e = rows_, *s_bar = rows_dot_;
    const int64_t tile = block_.tile.first, end = kDiagonal ? j + 1 : block_.tile.rows;
    const int64_t head = c / sizes_.width;

    // One direction of a pair, `way` its place: adds to g and g_dot, and to the two atoms.
    const auto pull_way = [&](int64_t way, int n, Side& query, Side& key, V f, V f_dot, V& g,
                              V& g_dot) GEOT_LAMBDA {
      const FilterChannel<V> x = {query.q, key.k, query.q_dot, key.k_dot};
      const T e_here = e[way * kHeads + head + n];
      if constexpr (kSecond) {
        const T s_bar_here = s_bar[way * kHeads + head + n];
        g += x.pull_second(e_here, s_bar_here);
        g_dot += x.pull(e_here);
        query.dq += filter_pull_second(e_here, s_bar_here, x.k, x.k_dot, f, f_dot);
        key.dk += filter_pull_second(e_here, s_bar_here, x.q, x.q_dot, f, f_dot);
      } else {
        g += x.pull(e_here);
        query.dq += e_here * f * x.k;
        key.dk += e_here * f * x.q;
      }
    };

    const Atom atom_j = atom<kDots>(kDiagonal ? j : 0, j);
    Side at_j[N];
    for (int n = 0; n < N; ++n) at_j[n] = side<kDots, kDiagonal, true>(atom_j, c + n * W);
    for (int64_t i = 0; i < end; ++i) {
      const int64_t pair = j * kRows + i, knot = pairs.knot[pair];
      const bool is_one_atom = kDiagonal && i == j;
      const Weights<T> w = pairs.value.at(pair), w_slope = pairs.slope.at(pair);
      const Atom atom_i = atom<kDots>(i, kDiagonal ? i : 0);
      const auto interval = table.interval(knot), gradient_interval = gradient.interval(knot);
      V b{}, e_dot{};
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const int64_t column = c + n * W;
        const Knots<V> k = interval.at(column);
        const Knots<V> k_dot = kSecond ? knots_dot(pair, column) : Knots<V>{};
        const V f = kFeatures ? value(k, w) : V{};
        const V f_dot = kSecond && kFeatures && moves ? tangent(pair, k, k_dot) : V{};
        V g{}, g_dot{};
        if (is_one_atom) {
          pull_way(pair, n, at_j[n], at_j[n], f, f_dot, g, g_dot);
        } else {
          Side at_i = side<kDots, true, kDiagonal>(atom_i, column);
          pull_way(pair, n, at_i, at_j[n], f, f_dot, g, g_dot);
          if constexpr (kDiagonal) {
            pull_way(i * kRows + j, n, at_j[n], at_i, f, f_dot, g, g_dot);
          }
          if constexpr (kFeatures) {
            add(to.q.at(0, tile + i) + column, at_i.dq);
            if constexpr (kDiagonal) add(to.k.at(0, tile + i) + column, at_i.dk);
          }
        }
        if (geometry) {
          const V slope = derivative(k, w_slope);
          b += g * slope;
          if constexpr (kSecond) {
            e_dot += g_dot * slope;
            if (moves) {
              V tangent_slope = pairs.u_dot[pair] * derivative(k, pairs.curvature.at(pair));
              if (dot_) tangent_slope += derivative(k_dot, w_slope);
              b += g_dot * tangent_slope;
            }
          }
        }
        if (radial) {
          Knots<V> sums = gradient_interval.at(column);
          pull_value(sums, w, g);
          if (moves) pull_derivative(sums, w_slope, g_dot * pairs.u_dot[pair]);
          gradient_interval.put(column, sums);
        }
      }
      if (geometry) {
        add(terms_ + i * W, b);
        if constexpr (kSecond) add(terms_dot_ + i * W, e_dot);
      }
    }
    if constexpr (kFeatures) {
      for (int n = 0; n < N; ++n) {
        add(to.k.at(0, block_.first + j) + c + n * W, at_j[n].dk);
        if constexpr (kDiagonal) add(to.q.at(0, tile + j) + c + n * W, at_j[n].dq);
      }
    }
  }
  template <bool kDots, bool kQuery, bool kKey>
  static GEOT_INLINE Side side(const Atom& x, int64_t c) {
    return {kQuery ? load<V>(x.q + c) : V{},
            kKey ? load<V>(x.k + c) : V{},
            kQuery && kDots ? load<V>(x.q_dot + c) : V{},
            kKey && kDots ? load<V>(x.k_dot + c) : V{},
            V{},
            V{}};
  }
  static GEOT_INLINE void add(T* to, V x) { store(to, load<V>(to) + x); }

  // out [I] = the sums of the rows of terms [I, W]
  static void store_sums(const T* terms, int64_t rows, T* out) {
    for (int64_t i = 0; i < kRows; i += W) {
      V r[W] = {};
      if (i < rows) {
#pragma GCC unroll 16
        for (int e = 0; e < W; ++e) r[e] = load<V>(terms + (i + e) * W);
      }
      store(out + i, sums_of(r));
    }
  }

  const Inputs<T>& inputs_;
  const Sizes<T>& sizes_;
  Group group_{};
  const Atoms<T>* atoms_ = nullptr;
  const Tangents<T>* dots_ = nullptr;
  const Pairs<T>* pairs_ = nullptr;
  Block block_{};
  KnotTable<T, W> table_, dot_, gradient_;
  PairsOfHeads<T>*s_, *s_dot_;
  T *rows_, *rows_dot_;             // [J, I, 8 heads]
  alignas(64) T terms_[kRows * W];  // [I, W], to be summed
  alignas(64) T terms_dot_[kRows * W];
  alignas(64) PairNumbers<T> b_;
  alignas(64) PairNumbers<T> e_dot_;
};

}  // namespace geot::cpu::GEOT_ISA
