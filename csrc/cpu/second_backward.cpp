// Second backward: the gradients of <dO, Ȯ> + <dr, ṙ>, Ȯ and ṙ the tangents of the forward pass
// along the dotted inputs (MATH.md section 3).
//
//   G = (Ṡ - ρ)(A - δ) + Ȧ,   Ṗ = P (Ṡ - ρ),   S̄ = P (G - ε)      (linear: Ṗ = Ṡ, S̄ = Ȧ)
//
// E pulls back on Ṡ, S̄ on S. A first sweep over the keys of a tile gives ρ = Σ P Ṡ and ε = Σ P G;
// a second one computes the same numbers again and the sums. Absent tangents cost nothing. The
// first sweep also sums up P = exp(S - L) itself: with large scores that is not 1, so far as L is
// rounded.
#include "variants.h"
#include "worker.h"

namespace geot::cpu::GEOT_ISA {
namespace {

template <class T>
bool moves_geometry(const SecondBackwardCall<T>& call) {
  return call.x_dot != nullptr || call.affine_dot != nullptr;
}
template <class T>
Wanted wanted_of(const SecondBackwardCall<T>& call) {
  return {bool(call.grad_q), bool(call.grad_k), call.grad_positions || call.grad_affine,
          call.grad_radial != nullptr};
}

template <class T>
struct SecondBackwardAtoms : Atoms<T> {
  Features<T> d_out, v_dot;
  Tangents<T> dots;
  RowNumbers<T> log_sum, shift;                 // L; what A - δ is without dO·v: dr - δ
  RowNumbers<T> rho, epsilon, per_total, rest;  // per_total: 1 / Σ exp(S - L); rest: Σ P (A - δ)
  Gradients<T> to;
  Features<T> grad_d_out, grad_v;
  RowNumbers<T> grad_d_row;
  PositionsGradient<T> dx;

  void layout(Arena& arena, const SecondBackwardCall<T>& call, const Sizes<T>& sizes,
              int64_t count) {
    Atoms<T>::layout(arena, call.inputs, sizes, count);
    const int64_t rows = this->capacity(count), heads = sizes.heads_per_group;
    const Wanted wanted = wanted_of(call);
    const auto features = [&](Features<T>& f, bool there) {
      if (there) f.layout(arena, sizes, rows);
    };
    features(d_out, bool(call.d_out));
    features(v_dot, bool(call.v_dot));
    features(dots.q, call.q_dot || call.k_dot);
    features(dots.k, call.q_dot || call.k_dot);
    features(to.q, wanted.q || wanted.k);
    features(to.k, wanted.q || wanted.k);
    features(grad_d_out, bool(call.grad_d_out));
    features(grad_v, bool(call.grad_v));
    if (call.x_dot != nullptr) dots.x.layout(arena, rows);
    dots.moves_radial = moves_geometry(call) || call.radial_dot != nullptr;
    shift.layout(arena, heads, rows);
    if (!call.inputs.is_linear) {
      log_sum.layout(arena, heads, rows);
      rho.layout(arena, heads, rows);
      epsilon.layout(arena, heads, rows);
      per_total.layout(arena, heads, rows);
      rest.layout(arena, heads, rows);
    }
    if (call.grad_d_row != nullptr) grad_d_row.layout(arena, heads, rows);
    if (wanted.geometry) dx.layout(arena, rows);
  }

  static void prefetch(const SecondBackwardCall<T>& call, const Molecule& m, Group group) {
    Atoms<T>::prefetch(call.inputs, m, group);
    for (const Rows<const T>* x : {&call.d_out, &call.out, &call.q_dot, &call.k_dot, &call.v_dot}) {
      cpu::GEOT_ISA::prefetch(*x, m, group, call.inputs.head_dim);
    }
  }

  void begin(const SecondBackwardCall<T>& call, const Molecule& m, Group group) {
    const Inputs<T>& inputs = call.inputs;
    const int64_t D = inputs.head_dim;
    this->pack(inputs, m, group);
    if (d_out) cpu::GEOT_ISA::pack(d_out, call.d_out, m, group, D);
    if (v_dot) cpu::GEOT_ISA::pack(v_dot, call.v_dot, m, group, D);
    if (dots.q) {
      pack_or_zero(dots.q, call.q_dot, m, group, D, T(inputs.scale));
      pack_or_zero(dots.k, call.k_dot, m, group, D, T(1));
    }
    if (dots.x) dots.x.pack(call.x_dot, m);
    if (inputs.is_linear) {
      pack_or_zero(shift, call.d_row, inputs.num_heads, m, group);
    } else {
      log_sum.pack(call.row, inputs.num_heads, m, group, T(__builtin_huge_val()));
      subtract_delta(shift, d_out, call.out, m, group, D);
    }
    for (const Features<T>* sums : {&to.q, &to.k, &grad_d_out, &grad_v}) {
      if (*sums) zero(*sums, group.count, m.count);
    }
    if (grad_d_row) grad_d_row.zero(group.count);
    if (dx) dx.zero();
  }

  void finish(const SecondBackwardCall<T>& call, const Molecule& m, Group group, T* dx_part) const {
    const int64_t D = call.inputs.head_dim;
    if (call.grad_d_out) unpack(call.grad_d_out, grad_d_out, m, group, D);
    if (call.grad_q) unpack(call.grad_q, to.q, m, group, D, T(call.inputs.scale));
    if (call.grad_k) unpack(call.grad_k, to.k, m, group, D);
    if (call.grad_v) unpack(call.grad_v, grad_v, m, group, D);
    if (grad_d_row) grad_d_row.unpack(call.grad_d_row, call.inputs.num_heads, m, group);
    if (dx_part != nullptr) dx.unpack(dx_part, m);
  }
};

template <class T>
struct SecondBackwardShared {
  SecondBackwardAtoms<T>* large;
  Parts<T> dx, d_radial, d_affine;
};

template <class T, class Score, class Normalizer>
class SecondBackwardWorker {
 public:
  SecondBackwardWorker(Arena& arena, const SecondBackwardCall<T>& call, const Schedule& schedule,
                       SecondBackwardShared<T>& shared)
      : call_(call),
        schedule_(schedule),
        shared_(shared),
        sizes_(call.inputs, schedule),
        wanted_(wanted_of(call)),
        score_(arena, call.inputs, sizes_, call.radial_dot != nullptr, wanted_.radial),
        pairs_(call.inputs),
        d_out_(arena.take<T>(sizes_.heads_per_group * sizes_.width * kRows)) {
    atoms_.layout(arena, call, sizes_, schedule.largest_small);
    std::memset(static_cast<void*>(pairs_.u_dot), 0, sizeof(pairs_.u_dot));
  }

  void run(const Job& job) {
    group_ = group_of(job.group, schedule_, call_.inputs.num_heads);
    if (job.group != current_) score_.select(group_, call_.radial_dot);
    current_ = job.group;
    if (wanted_.radial) score_.begin_gradient();
    const int64_t part = job.slot * schedule_.num_groups + job.group;
    d_affine_ = shared_.d_affine.part(part);
    for (int64_t n = job.first_item; n < job.last_item; ++n) {
      const Item& item = schedule_.items[n];
      const Molecule& m = schedule_.molecules[item.molecule];
      if (m.large < 0) {
        atoms_.begin(call_, m, group_);
        if (const Molecule* next = next_small(schedule_, job, n)) {
          Data::prefetch(call_, *next, group_);
        }
        run_tiles(atoms_, 0, m.count, 0, m.count, true);
        atoms_.finish(call_, m, group_, shared_.dx.part(job.group));
      } else {
        // Step by step a row chunk meets its own keys first.
        run_tiles(shared_.large[m.large * schedule_.num_groups + job.group],
                  m.chunk_begin(item.rows), m.chunk_begin(item.rows + 1), m.chunk_begin(item.keys),
                  m.chunk_begin(item.keys + 1), item.keys == item.rows);
      }
    }
    if (wanted_.radial) {
      score_.add_gradient_to(shared_.d_radial.part(part),
                             schedule_.one_job_a_part ? Into::kSet : Into::kAdd);
    }
  }

 private:
  using V = Vec<T>;
  using Data = SecondBackwardAtoms<T>;

  void run_tiles(const Data& atoms, int64_t begin, int64_t end, int64_t first_key, int64_t last_key,
                 bool needs_rows) {
    const int64_t count = atoms.molecule->count;
    for (int64_t i = begin; i < end; i += kRows) {
      const Tile tile = tile_at<T>(i, end);
      score_.begin_tile(atoms, tile);
      score_.begin_tile_tangent(atoms.dots, tile);
      for (int64_t h = 0; h < group_.count && atoms.d_out; ++h) {
        turn_over(tile, atoms.d_out, h, d_out_ + h * sizes_.width * kRows);
      }
      if (!Normalizer::kIsLinear && needs_rows) {
        for (const auto* x : {&atoms.rho, &atoms.epsilon, &atoms.per_total, &atoms.rest}) {
          for (int64_t h = 0; h < group_.count; ++h) clear(x->at(h, i));
        }
        for_each_block(tile, 0, count, [&](const Block& block) { sum_rows(atoms, block); });
        for (int64_t h = 0; h < group_.count; ++h) finish_rows(atoms, tile, h);
      }
      for_each_block(tile, first_key, last_key, [&](const Block& b) { run_block(atoms, b); });
    }
  }

  static void clear(T* rows) { std::memset(static_cast<void*>(rows), 0, kRows * sizeof(T)); }

  template <class Body>
  void for_each_block(const Tile& tile, int64_t first, int64_t last, Body body) {
    for (int64_t j = first; j < last; j += kKeys) {
      body(Block{tile, j, last - j < kKeys ? last - j : kKeys});
    }
  }

  void begin_block(const Data& atoms, const Block& block, bool needs_slopes) {
    pairs_.compute(atoms, block, needs_slopes ? 2 : 1);
    if (moves_geometry(call_)) {
      pairs_.compute_tangent(atoms, atoms.dots.x, call_.affine_dot, block);
    }
    score_.begin_block(pairs_, block, needs_slopes);
    score_.begin_block_tangent(needs_slopes);
  }

  // A head's S and Ṡ, which E and S̄ replace; A - δ in a_, Ȧ in a_dot_.
  struct Scores {
    T *s, *s_dot;
  };
  Scores begin_head(const Data& atoms, const Block& block, int64_t h) {
    T* s = score_.scores(h);
    T* s_dot = score_.score_tangents(h);
    const T* d_out = atoms.d_out ? d_out_ + h * sizes_.width * kRows : nullptr;
    a_minus_delta(block, sizes_.head_dim, atoms.shift.at(h, block.tile.first), atoms.v, h, d_out,
                  a_);
    if (d_out != nullptr && atoms.v_dot) {
      products<Into::kSet>(block, sizes_.head_dim, atoms.v_dot, h, d_out, a_dot_);
    } else if (h == 0) {
      std::memset(static_cast<void*>(a_dot_), 0, sizeof(a_dot_));
    }
    return {s, s_dot};
  }

  // Σ P, Σ P Ṡ, Σ P (A - δ) and Σ P (Ṡ (A - δ) + Ȧ), from which `finish_rows` makes ρ and ε.
  void sum_rows(const Data& atoms, const Block& block) {
    begin_block(atoms, block, false);
    for (int64_t h = 0; h < group_.count; ++h) {
      const auto [s, s_dot] = begin_head(atoms, block, h);
      for (int64_t n = 0; n < block.tile.vectors; ++n) {
        const int64_t lanes = n * kWidth<T>, i = block.tile.first + lanes;
        const V log_sum = load<V>(atoms.log_sum.at(h, i));
        V rho = load<V>(atoms.rho.at(h, i)), epsilon = load<V>(atoms.epsilon.at(h, i));
        V total = load<V>(atoms.per_total.at(h, i)), rest = load<V>(atoms.rest.at(h, i));
        for (int64_t at = lanes; at < block.keys * kRows; at += kRows) {
          const V p = Normalizer::weight(load<V>(s + at), log_sum), dot = load<V>(s_dot + at);
          const V a = load<V>(a_ + at);
          total += p;
          rho += p * dot;
          rest += p * a;
          epsilon += p * Normalizer::second(dot, a, V{}, load<V>(a_dot_ + at));
        }
        store(atoms.per_total.at(h, i), total);
        store(atoms.rest.at(h, i), rest);
        store(atoms.rho.at(h, i), rho);
        store(atoms.epsilon.at(h, i), epsilon);
      }
    }
  }

  // ρ = Σ P Ṡ,  ε = Σ P ((Ṡ - ρ)(A - δ) + Ȧ), with P that sums up to 1.
  void finish_rows(const Data& atoms, const Tile& tile, int64_t h) {
    for (int64_t n = 0; n < tile.vectors; ++n) {
      const int64_t i = tile.first + n * kWidth<T>;
      const V per_total = 1 / load<V>(atoms.per_total.at(h, i));
      const V rho = load<V>(atoms.rho.at(h, i)) * per_total;
      const V rest = load<V>(atoms.rest.at(h, i)) * per_total;
      store(atoms.per_total.at(h, i), per_total);
      store(atoms.rho.at(h, i), rho);
      store(atoms.epsilon.at(h, i), load<V>(atoms.epsilon.at(h, i)) * per_total - rho * rest);
    }
  }

  void run_block(const Data& atoms, const Block& block) {
    begin_block(atoms, block, wanted_.geometry);
    for (int64_t h = 0; h < group_.count; ++h) {
      const auto [s, s_dot] = begin_head(atoms, block, h);
      differentiate(atoms, block, h, s, s_dot);
      if (call_.grad_d_out) {
        add_to_queries(block, sizes_.chunks, p_dot_, atoms.v, atoms.grad_d_out, h);
        if (atoms.v_dot) {
          add_to_queries(block, sizes_.chunks, p_, atoms.v_dot, atoms.grad_d_out, h);
        }
      }
      if (call_.grad_v && atoms.d_out) {
        add_to_keys(block, sizes_.chunks, p_dot_, atoms.d_out, atoms.grad_v, h);
      }
      score_.pull_second(h, wanted_, atoms.to);
    }
    score_.end_block_second(wanted_, atoms.to);
    if (wanted_.geometry) {
      pairs_.pull_second(atoms, atoms.dots.x, call_.affine_dot != nullptr, block, score_.b(),
                         score_.e_dot(), atoms.dx, d_affine_);
    }
  }

  // P into p_, Ṗ into p_dot_ and its row sums, E in the place of S, S̄ in that of Ṡ.
  void differentiate(const Data& atoms, const Block& block, int64_t h, T* s, T* s_dot) {
    for (int64_t n = 0; n < block.tile.vectors; ++n) {
      const int64_t lanes = n * kWidth<T>, i = block.tile.first + lanes;
      V log_sum{}, rho{}, epsilon{}, row{}, per_total = broadcast<V>(1);
      if constexpr (!Normalizer::kIsLinear) {
        log_sum = load<V>(atoms.log_sum.at(h, i));
        rho = load<V>(atoms.rho.at(h, i));
        epsilon = load<V>(atoms.epsilon.at(h, i));
        per_total = load<V>(atoms.per_total.at(h, i));
      }
      for (int64_t at = lanes; at < block.keys * kRows; at += kRows) {
        const V p = Normalizer::weight(load<V>(s + at), log_sum) * per_total;
        const V a = load<V>(a_ + at), dot = load<V>(s_dot + at);
        const V g = Normalizer::second(dot, a, rho, load<V>(a_dot_ + at));
        const V p_dot = Normalizer::weight_tangent(p, dot, rho);
        row += p_dot;
        store(p_ + at, p);
        store(p_dot_ + at, p_dot);
        store(s + at, Normalizer::score_gradient(p, a));
        store(s_dot + at, Normalizer::score_second_gradient(p, g, epsilon));
      }
      if (atoms.grad_d_row) {
        T* sum = atoms.grad_d_row.at(h, i);
        store(sum, load<V>(sum) + row);
      }
    }
  }

  const SecondBackwardCall<T>& call_;
  const Schedule& schedule_;
  SecondBackwardShared<T>& shared_;
  const Sizes<T> sizes_;
  const Wanted wanted_;
  Score score_;
  Pairs<T> pairs_;
  Data atoms_;
  T* d_out_;  // dO of a tile [h, width, I], turned over
  T* d_affine_ = nullptr;
  Group group_{};
  int64_t current_ = -1;
  alignas(64) PairNumbers<T> p_;
  alignas(64) PairNumbers<T> p_dot_;
  alignas(64) PairNumbers<T> a_;
  alignas(64) PairNumbers<T> a_dot_;
};

template <class T>
void attention_bwd_bwd_of(const SecondBackwardCall<T>& call, const Schedule& schedule) {
  const Inputs<T>& inputs = call.inputs;
  const Sizes<T> sizes(inputs, schedule);
  const int64_t groups = schedule.num_groups;
  Arena arena(Arena::kCall);
  SecondBackwardShared<T> shared{arena.take<SecondBackwardAtoms<T>>(schedule.num_large * groups),
                                 Parts<T>(arena, call.grad_positions, 3 * inputs.num_rows, groups),
                                 radial_parts(arena, inputs, schedule, call.grad_radial),
                                 affine_parts(arena, inputs, schedule, call.grad_affine)};
  for_each_large(schedule, [&](const Molecule& m, int64_t, int64_t at) {
    new (shared.large + at) SecondBackwardAtoms<T>();
    shared.large[at].layout(arena, call, sizes, m.count);
  });
  for_each_large(call.run_threads, schedule, [&](const Molecule& m, int64_t group, int64_t at) {
    shared.large[at].begin(call, m, group_of(group, schedule, inputs.num_heads));
  });
  for_table_variant<T>(inputs, [&](auto score, auto normalizer) {
    using Score = typename decltype(score)::type;
    run_jobs<SecondBackwardWorker<T, Score, decltype(normalizer)>>(call, schedule, shared);
  });
  for_each_large(call.run_threads, schedule, [&](const Molecule& m, int64_t group, int64_t at) {
    shared.large[at].finish(call, m, group_of(group, schedule, inputs.num_heads),
                            shared.dx.part(group));
  });
  for (const Parts<T>* parts : {&shared.dx, &shared.d_radial, &shared.d_affine}) {
    parts->add_up(call.run_threads);
  }
  for (const Rows<T>* rows : {&call.grad_d_out, &call.grad_q, &call.grad_k, &call.grad_v}) {
    zero_padding(*rows, schedule, inputs.num_heads, inputs.head_dim);
  }
  zero_padding(call.grad_d_row, schedule, inputs.num_heads);
}

}  // namespace

void attention_bwd_bwd(const SecondBackwardCall<float>& call, const Schedule& schedule) {
  attention_bwd_bwd_of(call, schedule);
}
void attention_bwd_bwd(const SecondBackwardCall<double>& call, const Schedule& schedule) {
  attention_bwd_bwd_of(call, schedule);
}

}  // namespace geot::cpu::GEOT_ISA
