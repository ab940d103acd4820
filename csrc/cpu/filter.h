// The score S_ij = κ Σ_c q_ic k_jc f_hc(z_ij), its tangent and their adjoints, head by head.
//
// The lanes of a vector are the channels c. A filter serves both directions, f_c(z_ij) = f_c(z_ji):
// in a block on the diagonal each pair of atoms is looked up, and its gradient added, once.
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
      : inputs_(inputs), sizes_(sizes), has_dot_(has_radial_dot) {
    for (int64_t h = 0; h < sizes.heads_per_group; ++h) {
      layout(arena, table_[h]);
      if (has_radial_dot) layout(arena, dot_[h]);
      if (sums_radial) layout(arena, gradient_[h]);
    }
    for (T** x : {&value_, &slope_, &tangent_, &tangent_slope_}) {
      *x = arena.take<T>(kKeys * kRows * sizes.width);
    }
  }

  void select(Group group, const T* radial_dot) {
    group_ = group;
    for (int64_t h = 0; h < group.count; ++h) {
      table_[h].set(inputs_.radial.data, first_channel(h), inputs_.head_dim);
      if (has_dot_) dot_[h].set(radial_dot, first_channel(h), inputs_.head_dim);
    }
  }
  void begin_gradient() {
    for (int64_t h = 0; h < group_.count; ++h) gradient_[h].zero();
  }
  void add_gradient_to(T* d_radial) const {
    for (int64_t h = 0; h < group_.count; ++h) {
      gradient_[h].add_to(d_radial, first_channel(h), inputs_.head_dim);
    }
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
    clear(s_);
    in_steps([&](auto chunks, int64_t c) {
      reduce<1>(chunks, c, kOrdered, {s_}, [&](const Place& at, int64_t cc, V(&sum)[1]) {
        const FilterChannel<V> x = channel<false>(h, at.i, at.j, cc);
        sum[0] += x.term(load<V>(value_ + at.filter + cc));
      });
    });
    return s_;
  }
  // Ṡ [J, I] of a head, likewise.
  T* score_tangents(int64_t h) {
    if (dots_->moves_radial) look_up_tangent(h);
    clear(s_dot_);
    const auto with = [&](auto has_dots) {
      in_steps([&](auto chunks, int64_t c) {
        reduce<1>(chunks, c, kOrdered, {s_dot_}, [&](const Place& at, int64_t cc, V(&sum)[1]) {
          const FilterChannel<V> x = channel<has_dots.value>(h, at.i, at.j, cc);
          sum[0] += x.term_tangent(load<V>(value_ + at.filter + cc), tangent(at, cc));
        });
      });
    };
    has_dots() ? with(std::true_type{}) : with(std::false_type{});
    return s_dot_;
  }

  // The adjoint of `scores`: E, in the place of S.
  void pull(int64_t h, const Wanted& wanted, const Gradients<T>& to) {
    if (wanted.q || wanted.k) {
      for_each_ordered(h, to, [&](const Place& at, int64_t c, V q, V k, V& dq, V& dk) {
        const V ef = s_[at.pair] * load<V>(value_ + at.filter + c);
        dq += ef * k;
        dk += ef * q;
      });
    }
    if (!wanted.geometry && !wanted.radial) return;
    in_steps([&](auto chunks, int64_t c) {
      reduce<1>(chunks, c, kOnce, {b_}, [&](const Place& at, int64_t cc, V(&sum)[1]) {
        V g = channel<false>(h, at.i, at.j, cc).pull(s_[at.pair]);
        if (at.back >= 0) g += channel<false>(h, at.j, at.i, cc).pull(s_[at.back]);
        if (wanted.geometry) sum[0] += g * load<V>(slope_ + at.filter + cc);
        if (wanted.radial) {
          gradient_[h].add(pairs_->interval[at.pair], cc, adjoint_of_value(g, pairs_->u[at.pair]));
        }
      });
    });
  }

  // The adjoint of `score_tangents` and of `scores`: E in the place of S, S̄ in that of Ṡ.
  void pull_second(int64_t h, const Wanted& wanted, const Gradients<T>& to) {
    const auto with = [&](auto has_dots) { pull_second_with<has_dots.value>(h, wanted, to); };
    has_dots() ? with(std::true_type{}) : with(std::false_type{});
  }

  void end_block(const Wanted&) {}
  void end_block_second(const Wanted&) {}
  const T* b() const { return b_; }          // dL/du of the pairs, or b̄
  const T* e_dot() const { return e_dot_; }  // ẽ

 private:
  using V = Vec<T>;
  static constexpr int W = kWidth<T>;
  static constexpr int kMostHeads = 8;

  // A pair of a block: its atoms there, its place in [J, I], that of its way back where a loop
  // visits it only once (else -1), and where its filter is.
  struct Place {
    int64_t i, j, pair, back, filter;
  };
  enum Visits { kOrdered, kOnce };  // on the diagonal: each pair in both directions, or for both

  int64_t first_channel(int64_t h) const { return (group_.first + h) * inputs_.head_dim; }
  void layout(Arena& arena, Cubics<T, W>& cubics) const {
    cubics.layout(arena, inputs_.radial, inputs_.num_channels(), sizes_.width);
  }
  static void clear(PairNumbers<T>& x) { std::memset(static_cast<void*>(x), 0, sizeof(x)); }
  bool has_dots() const { return bool(dots_->q); }

  GEOT_INLINE Place place(int64_t i, int64_t j, Visits visits) const {
    const int64_t pair = j * kRows + i, back = i * kRows + j;
    const bool diagonal = block_.is_diagonal();
    return {i, j, pair, diagonal && visits == kOnce && i != j ? back : -1,
            (diagonal && i > j ? back : pair) * sizes_.width};
  }
  GEOT_INLINE int64_t end_of(int64_t j, Visits visits) const {
    return visits == kOnce && block_.is_diagonal() ? j + 1 : block_.tile.rows;
  }

  // In a diagonal block an atom's number is the same among queries and keys.
  template <bool kDots>
  GEOT_INLINE FilterChannel<V> channel(int64_t h, int64_t i, int64_t j, int64_t c) const {
    const int64_t n = block_.tile.first + i, m = block_.first + j;
    FilterChannel<V> x{load<V>(atoms_->q.at(h, n) + c), load<V>(atoms_->k.at(h, m) + c), V{}, V{}};
    if constexpr (kDots) {
      x.q_dot = load<V>(dots_->q.at(h, n) + c);
      x.k_dot = load<V>(dots_->k.at(h, m) + c);
    }
    return x;
  }
  GEOT_INLINE V tangent(const Place& at, int64_t c) const {
    return dots_->moves_radial ? load<V>(tangent_ + at.filter + c) : V{};
  }

  // body(how many vectors of channels at once, first channel)
  template <class Body>
  GEOT_INLINE void in_steps(Body body) const {
    int64_t c = 0;
    for (; c + 4 * W <= sizes_.width; c += 4 * W) body(std::integral_constant<int, 4>{}, c);
    for (; c + 2 * W <= sizes_.width; c += 2 * W) body(std::integral_constant<int, 2>{}, c);
    for (; c < sizes_.width; c += W) body(std::integral_constant<int, 1>{}, c);
  }

  // Adds to each `out` [J, I] the sum over the channels of what body(place, c, sums) adds to sums.
  template <int K, int kChunks, class Body>
  GEOT_INLINE void reduce(std::integral_constant<int, kChunks>, int64_t c, Visits visits,
                          T* const (&out)[K], Body body) const {
    for (int64_t j = 0; j < block_.keys; ++j) {
      const int64_t end = end_of(j, visits);
      for (int64_t first = 0; first < end; first += W) {
        V sums[K][W];
#pragma GCC unroll 16
        for (int e = 0; e < W; ++e) {
          V sum[K] = {};
          if (first + e < end) {
            const Place at = place(first + e, j, visits);
#pragma GCC unroll 4
            for (int n = 0; n < kChunks; ++n) body(at, c + n * W, sum);
          }
#pragma GCC unroll 2
          for (int k = 0; k < K; ++k) sums[k][e] = sum[k];
        }
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) {
          T* to = out[k] + j * kRows + first;
          store(to, load<V>(to) + sums_of(sums[k]));
        }
      }
    }
  }

  // body(place, c, q_i, k_j, sum of grad q_i, sum of grad k_j) for all ordered pairs.
  template <class Body>
  GEOT_INLINE void for_each_ordered(int64_t h, const Gradients<T>& to, Body body) const {
    for (int64_t c = 0; c < sizes_.width; c += W) {
      for (int64_t j = 0; j < block_.keys; ++j) {
        const V k = load<V>(atoms_->k.at(h, block_.first + j) + c);
        T* dk_at = to.k.at(h, block_.first + j) + c;
        V dk = load<V>(dk_at);
        for (int64_t i = 0; i < block_.tile.rows; ++i) {
          T* dq_at = to.q.at(h, block_.tile.first + i) + c;
          V dq = load<V>(dq_at);
          body(place(i, j, kOrdered), c, load<V>(atoms_->q.at(h, block_.tile.first + i) + c), k, dq,
               dk);
          store(dq_at, dq);
        }
        store(dk_at, dk);
      }
    }
  }

  void look_up(int64_t h) {
    for_each_filter([&](int64_t pair, int64_t c) {
      const Cubic<V> f = table_[h].cubic(pairs_->interval[pair], c);
      store(value_ + pair * sizes_.width + c, f.value(pairs_->u[pair]));
      if (needs_slope_) store(slope_ + pair * sizes_.width + c, f.slope(pairs_->u[pair]));
    });
  }
  // f̃ = f' u̇ + ḟ, and its derivative f'' u̇ + ḟ'.
  void look_up_tangent(int64_t h) {
    for_each_filter([&](int64_t pair, int64_t c) {
      const T t = pairs_->u[pair], u_dot = pairs_->u_dot[pair];
      const Cubic<V> f = table_[h].cubic(pairs_->interval[pair], c);
      V tangent = u_dot * f.slope(t), slope = u_dot * f.curvature(t);
      if (has_dot_) {
        const Cubic<V> f_dot = dot_[h].cubic(pairs_->interval[pair], c);
        tangent += f_dot.value(t);
        slope += f_dot.slope(t);
      }
      store(tangent_ + pair * sizes_.width + c, tangent);
      if (needs_tangent_slope_) store(tangent_slope_ + pair * sizes_.width + c, slope);
    });
  }
  template <class Body>
  GEOT_INLINE void for_each_filter(Body body) const {
    for (int64_t j = 0; j < block_.keys; ++j) {
      for (int64_t i = 0; i < end_of(j, kOnce); ++i) {
        for (int64_t c = 0; c < sizes_.width; c += W) body(j * kRows + i, c);
      }
    }
  }

  template <bool kDots>
  void pull_second_with(int64_t h, const Wanted& wanted, const Gradients<T>& to) {
    if (wanted.q || wanted.k) {
      for_each_ordered(h, to, [&](const Place& at, int64_t c, V q, V k, V& dq, V& dk) {
        const FilterChannel<V> x = channel<kDots>(h, at.i, at.j, c);
        const V f = load<V>(value_ + at.filter + c), f_dot = tangent(at, c);
        const T e = s_[at.pair], s_bar = s_dot_[at.pair];
        dq += filter_pull_second(e, s_bar, k, x.k_dot, f, f_dot);
        dk += filter_pull_second(e, s_bar, q, x.q_dot, f, f_dot);
      });
    }
    if (!wanted.geometry && !wanted.radial) return;
    in_steps([&](auto chunks, int64_t c) {
      reduce<2>(chunks, c, kOnce, {b_, e_dot_}, [&](const Place& at, int64_t cc, V(&sum)[2]) {
        const FilterChannel<V> x = channel<kDots>(h, at.i, at.j, cc);
        V g = x.pull_second(s_[at.pair], s_dot_[at.pair]), g_dot = x.pull(s_[at.pair]);
        if (at.back >= 0) {
          const FilterChannel<V> y = channel<kDots>(h, at.j, at.i, cc);
          g += y.pull_second(s_[at.back], s_dot_[at.back]);
          g_dot += y.pull(s_[at.back]);
        }
        if (wanted.geometry) {
          const V slope = load<V>(slope_ + at.filter + cc);
          sum[0] += g * slope;
          sum[1] += g_dot * slope;
          if (dots_->moves_radial) sum[0] += g_dot * load<V>(tangent_slope_ + at.filter + cc);
        }
        if (wanted.radial) {
          gradient_[h].add(
              pairs_->interval[at.pair], cc,
              adjoint_of_value_and_slope(g, g_dot * pairs_->u_dot[at.pair], pairs_->u[at.pair]));
        }
      });
    });
  }

  const Inputs<T>& inputs_;
  const Sizes<T>& sizes_;
  const bool has_dot_;
  bool needs_slope_ = false, needs_tangent_slope_ = false;
  Group group_{};
  const Atoms<T>* atoms_ = nullptr;
  const Tangents<T>* dots_ = nullptr;
  const Pairs<T>* pairs_ = nullptr;
  Block block_{};
  Cubics<T, W> table_[kMostHeads], dot_[kMostHeads], gradient_[kMostHeads];
  T *value_, *slope_, *tangent_, *tangent_slope_;  // of one head, [J, I, width]
  alignas(64) PairNumbers<T> s_;
  alignas(64) PairNumbers<T> s_dot_;
  alignas(64) PairNumbers<T> b_;
  alignas(64) PairNumbers<T> e_dot_;
};

}  // namespace geot::cpu::GEOT_ISA
