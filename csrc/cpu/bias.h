// The score S_ij = κ q_i·k_j + f_h(z_ij), its tangent and their adjoints, for a group of 8 heads.
//
// The radial function of all heads of a block is looked up first, a pair's 8 heads as one row, and
// turned over to [h, J, I]; then head by head the products are added to it.
#pragma once

#include "gaussians.h"
#include "products.h"
#include "table.h"

namespace geot::cpu::GEOT_ISA {

// The table at a block's pairs.
template <class T>
class BiasTable {
 public:
  BiasTable(Arena& arena, const Inputs<T>& inputs, bool has_dot, bool sums_gradient)
      : radial_(inputs.radial) {
    table_.layout(arena, radial_, inputs.num_heads, kHeads);
    if (has_dot) dot_.layout(arena, radial_, inputs.num_heads, kHeads);
    if (sums_gradient) gradient_.layout(arena, radial_, inputs.num_heads, kHeads);
  }

  void select(Group group, const T* dot) {
    group_ = group;
    table_.set(radial_.data, group.first, 1, group.count, kHeads);
    if (dot != nullptr) dot_.set(dot, group.first, 1, group.count, kHeads);
  }
  void begin_gradient() { gradient_.zero(); }
  void add_gradient_to(T* d_radial, Into into) const {
    gradient_.add_to(d_radial, group_.first, 1, group_.count, kHeads, into);
  }

  void values(const Pairs<T>& pairs, const Block& block, PairsOfHeads<T>& f) {
    look_up<1>(pairs, block, {&f}, [&](const Knots<V>& k, int64_t at, V(&x)[1]) {
      x[0] = value(k, pairs.value.at(at));
    });
  }
  void values_and_slopes(const Pairs<T>& pairs, const Block& block, PairsOfHeads<T>& f,
                         PairsOfHeads<T>& slope) {
    look_up<2>(pairs, block, {&f, &slope}, [&](const Knots<V>& k, int64_t at, V(&x)[2]) {
      x[0] = value(k, pairs.value.at(at));
      x[1] = derivative(k, pairs.slope.at(at));
    });
  }
  // f̃ = f' u̇ + ḟ and, with `with_slope`, its derivative f'' u̇ + ḟ'.
  void tangents(const Pairs<T>& pairs, const Block& block, bool with_slope,
                PairsOfHeads<T>& tangent, PairsOfHeads<T>& tangent_slope) {
    const auto dot = dot_;
    if (with_slope) {
      look_up<2>(pairs, block, {&tangent, &tangent_slope},
                 [&](const Knots<V>& k, int64_t at, V(&x)[2]) {
                   x[0] = derivative(k, pairs.slope.at(at)) * pairs.u_dot[at];
                   x[1] = derivative(k, pairs.curvature.at(at)) * pairs.u_dot[at];
                   if (dot) {
                     const auto k_dot = dot.at(pairs.knot[at], 0);
                     x[0] += value(k_dot, pairs.value.at(at));
                     x[1] += derivative(k_dot, pairs.slope.at(at));
                   }
                 });
    } else {
      look_up<1>(pairs, block, {&tangent}, [&](const Knots<V>& k, int64_t at, V(&x)[1]) {
        x[0] = derivative(k, pairs.slope.at(at)) * pairs.u_dot[at];
        if (dot) x[0] += value(dot.at(pairs.knot[at], 0), pairs.value.at(at));
      });
    }
  }

  // Weights `g` on the values.
  void pull(const Pairs<T>& pairs, const Block& block, const PairsOfHeads<T>& g) {
    const auto gradient = gradient_;
    const int64_t heads = group_.count;
    for_each_octet(block, [&](int64_t at, int64_t lanes) {
      V row[kHeads];
      turn_to_rows<T>(g, row, at, heads);
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t knot = pairs.knot[at + i];
        const auto interval = gradient.interval(knot);
        Knots<V> sums = interval.at(0);
        pull_value(sums, pairs.value.at(at + i), row[i]);
        interval.put(0, sums);
      }
    });
  }
  // Weights `g` on the values and `g_dot` u̇ on the slopes.
  void pull_second(const Pairs<T>& pairs, const Block& block, const PairsOfHeads<T>& g,
                   const PairsOfHeads<T>& g_dot) {
    const auto gradient = gradient_;
    const int64_t heads = group_.count;
    for_each_octet(block, [&](int64_t at, int64_t lanes) {
      V row[kHeads], row_dot[kHeads];
      turn_to_rows<T>(g, row, at, heads);
      turn_to_rows<T>(g_dot, row_dot, at, heads);
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t knot = pairs.knot[at + i];
        const auto interval = gradient.interval(knot);
        Knots<V> sums = interval.at(0);
        pull_value(sums, pairs.value.at(at + i), row[i]);
        pull_derivative(sums, pairs.slope.at(at + i), row_dot[i] * pairs.u_dot[at + i]);
        interval.put(0, sums);
      }
    });
  }

 private:
  using V = Vector<T, kHeads>;

  // evaluate(knots of a pair's heads, place of the pair, the K rows wanted)
  template <int K, class Evaluate>
  GEOT_INLINE void look_up(const Pairs<T>& pairs, const Block& block,
                           PairsOfHeads<T>* const (&out)[K], Evaluate evaluate) const {
    const auto table = table_;
    const int64_t heads = group_.count;
    for_each_octet(block, [&](int64_t at, int64_t) {
      V row[K][kHeads];
#pragma GCC unroll 8
      for (int i = 0; i < kHeads; ++i) {
        V x[K];
        evaluate(table.at(pairs.knot[at + i], 0), at + i, x);
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) row[k][i] = x[k];
      }
#pragma GCC unroll 2
      for (int k = 0; k < K; ++k) turn_to_heads<T>(row[k], *out[k], at, heads);
    });
  }

  const Radial<T>& radial_;
  Group group_{};
  KnotTable<T, kHeads> table_, dot_, gradient_;
};

template <class T, class RadialFunction>
class BiasScore {
 public:
  BiasScore(Arena& arena, const Inputs<T>& inputs, const Sizes<T>& sizes, bool has_radial_dot,
            bool sums_radial)
      : sizes_(sizes),
        radial_(arena, inputs, has_radial_dot, sums_radial),
        q_(arena.take<T>(kHeads * sizes.width * kRows)),
        q_dot_(arena.take<T>(kHeads * sizes.width * kRows)) {
    for (auto* f : {&value_, &slope_, &tangent_, &tangent_slope_}) {
      *f = reinterpret_cast<PairsOfHeads<T>*>(arena.take<T>(kHeads * kKeys * kRows));
    }
  }

  void select(Group group, const T* radial_dot) {
    group_ = group;
    radial_.select(group, radial_dot);
  }
  void begin_gradient() { radial_.begin_gradient(); }
  void add_gradient_to(T* d_radial, Into into) const { radial_.add_gradient_to(d_radial, into); }

  void begin_tile(const Atoms<T>& atoms, const Tile& tile) {
    atoms_ = &atoms;
    for (int64_t h = 0; h < group_.count; ++h) turn_over(tile, atoms.q, h, turned(q_, h));
  }
  void begin_tile_tangent(const Tangents<T>& dots, const Tile& tile) {
    dots_ = &dots;
    if (!dots.q) return;
    for (int64_t h = 0; h < group_.count; ++h) turn_over(tile, dots.q, h, turned(q_dot_, h));
  }

  void begin_block(const Pairs<T>& pairs, const Block& block, bool needs_slope) {
    pairs_ = &pairs;
    block_ = block;
    if (needs_slope) {
      radial_.values_and_slopes(pairs, block, *value_, *slope_);
    } else {
      radial_.values(pairs, block, *value_);
    }
  }
  void begin_block_tangent(bool needs_slope) {
    if (dots_->moves_radial) {
      radial_.tangents(*pairs_, block_, needs_slope, *tangent_, *tangent_slope_);
    }
  }

  // S [J, I] of a head. What it points to may be written over until the next block.
  T* scores(int64_t h) {
    T* s = (*value_)[h];
    products<Into::kAdd>(block_, sizes_.head_dim, atoms_->k, h, turned(q_, h), s);
    return s;
  }
  // Ṡ [J, I] of a head, likewise.
  T* score_tangents(int64_t h) {
    T* s = (*tangent_)[h];
    if (!dots_->moves_radial) std::memset(static_cast<void*>(s), 0, sizeof(PairNumbers<T>));
    if (dots_->q) products<Into::kAdd>(block_, sizes_.head_dim, atoms_->k, h, turned(q_dot_, h), s);
    if (dots_->k) products<Into::kAdd>(block_, sizes_.head_dim, dots_->k, h, turned(q_, h), s);
    return s;
  }

  // The adjoint of `scores`: E, in the place of S.
  void pull(int64_t h, const Wanted& wanted, const Gradients<T>& to) {
    const T* e = (*value_)[h];
    if (wanted.q) add_to_queries(block_, sizes_.chunks, e, atoms_->k, to.q, h);
    if (wanted.k) add_to_keys(block_, sizes_.chunks, e, atoms_->q, to.k, h);
    if (!wanted.geometry) return;
    for_each_vector<T>(block_, [&](int64_t, int64_t, int64_t at) {
      const V b = load<V>(e + at) * load<V>((*slope_)[h] + at);
      store(b_ + at, h == 0 ? b : load<V>(b_ + at) + b);
    });
  }
  // The adjoint of `score_tangents` and of `scores`: E in the place of S, S̄ in that of Ṡ.
  void pull_second(int64_t h, const Wanted& wanted, const Gradients<T>& to) {
    const T *e = (*value_)[h], *s_bar = (*tangent_)[h];
    if (wanted.q) {
      add_to_queries(block_, sizes_.chunks, s_bar, atoms_->k, to.q, h);
      if (dots_->k) add_to_queries(block_, sizes_.chunks, e, dots_->k, to.q, h);
    }
    if (wanted.k) {
      add_to_keys(block_, sizes_.chunks, s_bar, atoms_->q, to.k, h);
      if (dots_->q) add_to_keys(block_, sizes_.chunks, e, dots_->q, to.k, h);
    }
    if (!wanted.geometry) return;
    for_each_vector<T>(block_, [&](int64_t, int64_t, int64_t at) {
      const V slope = load<V>((*slope_)[h] + at), e_at = load<V>(e + at);
      V b = load<V>(s_bar + at) * slope, e_dot = e_at * slope;
      if (dots_->moves_radial) b += e_at * load<V>((*tangent_slope_)[h] + at);
      store(b_ + at, h == 0 ? b : load<V>(b_ + at) + b);
      store(e_dot_ + at, h == 0 ? e_dot : load<V>(e_dot_ + at) + e_dot);
    });
  }

  // After the last head.
  void end_block(const Wanted& wanted, const Gradients<T>&) {
    if (wanted.radial) radial_.pull(*pairs_, block_, *value_);
  }
  void end_block_second(const Wanted& wanted, const Gradients<T>&) {
    if (wanted.radial) radial_.pull_second(*pairs_, block_, *tangent_, *value_);
  }
  const T* b() const { return b_; }          // dL/du of the pairs, or b̄
  const T* e_dot() const { return e_dot_; }  // ẽ

 private:
  using V = Vec<T>;

  T* turned(T* x, int64_t h) const { return x + h * sizes_.width * kRows; }

  const Sizes<T>& sizes_;
  RadialFunction radial_;
  T *q_, *q_dot_;  // [h, width, I], turned over
  PairsOfHeads<T>*value_, *slope_, *tangent_, *tangent_slope_;
  Group group_{};
  const Atoms<T>* atoms_ = nullptr;
  const Tangents<T>* dots_ = nullptr;
  const Pairs<T>* pairs_ = nullptr;
  Block block_{};
  alignas(64) PairNumbers<T> b_;
  alignas(64) PairNumbers<T> e_dot_;
};

}  // namespace geot::cpu::GEOT_ISA
