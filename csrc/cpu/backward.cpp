// First backward: with A_ij = dO_i·v_j + dr_i and E = P (A - δ) (softmax) or A (linear),
//
//   dv_j = Σ_i P_ij dO_i,   E pulls back on the scores, b_ij = dL/dz_ij on the positions.
//
// P is computed again from L. Blocks of pairs as in the forward pass; each adds to the sums of its
// query atoms and of its key atoms.
#include "variants.h"
#include "worker.h"

namespace geot::cpu::GEOT_ISA {
namespace {

template <class T>
Wanted wanted_of(const BackwardCall<T>& call) {
  return {bool(call.dq), bool(call.dk), call.d_positions || call.d_affine,
          call.d_radial != nullptr};
}

// A molecule's atoms, what comes in at each row, and the sums.
template <class T>
struct BackwardAtoms : Atoms<T> {
  Features<T> d_out;
  RowNumbers<T> log_sum, shift;  // L; what A - δ is without dO·v: dr - δ
  Gradients<T> to;
  Features<T> dv;
  PositionsGradient<T> dx;

  void layout(Arena& arena, const BackwardCall<T>& call, const Sizes<T>& sizes, int64_t count) {
    Atoms<T>::layout(arena, call.inputs, sizes, count);
    const int64_t rows = this->capacity(count), heads = sizes.heads_per_group;
    const Wanted wanted = wanted_of(call);
    if (call.d_out) d_out.layout(arena, sizes, rows);
    if (!call.inputs.is_linear) log_sum.layout(arena, heads, rows);
    shift.layout(arena, heads, rows);
    if (wanted.q || wanted.k) {
      to.q.layout(arena, sizes, rows);
      to.k.layout(arena, sizes, rows);
    }
    if (call.dv) dv.layout(arena, sizes, rows);
    if (wanted.geometry) dx.layout(arena, rows);
  }

  static void prefetch(const BackwardCall<T>& call, const Molecule& m, Group group) {
    Atoms<T>::prefetch(call.inputs, m, group);
    cpu::GEOT_ISA::prefetch(call.d_out, m, group, call.inputs.head_dim);
    cpu::GEOT_ISA::prefetch(call.out, m, group, call.inputs.head_dim);
  }

  void begin(const BackwardCall<T>& call, const Molecule& m, Group group) {
    const Inputs<T>& inputs = call.inputs;
    this->pack(inputs, m, group);
    if (d_out) cpu::GEOT_ISA::pack(d_out, call.d_out, m, group, inputs.head_dim);
    if (inputs.is_linear) {
      pack_or_zero(shift, call.d_row, inputs.num_heads, m, group);
    } else {
      log_sum.pack(call.row, inputs.num_heads, m, group, T(__builtin_huge_val()));
      subtract_delta(shift, d_out, call.out, m, group, inputs.head_dim);
    }
    for (const Features<T>* sums : {&to.q, &to.k, &dv}) {
      if (*sums) zero(*sums, group.count, m.count);
    }
    if (dx) dx.zero();
  }

  void finish(const BackwardCall<T>& call, const Molecule& m, Group group, T* dx_part) const {
    const int64_t D = call.inputs.head_dim;
    if (call.dq) unpack(call.dq, to.q, m, group, D, T(call.inputs.scale));
    if (call.dk) unpack(call.dk, to.k, m, group, D);
    if (call.dv) unpack(call.dv, dv, m, group, D);
    if (dx_part != nullptr) dx.unpack(dx_part, m);
  }
};

// What all jobs share: molecules that several of them work on, and the parts of the sums.
template <class T>
struct BackwardShared {
  BackwardAtoms<T>* large;
  Parts<T> dx, d_radial, d_affine;
};

template <class T, class Score, class Normalizer>
class BackwardWorker {
 public:
  BackwardWorker(Arena& arena, const BackwardCall<T>& call, const Schedule& schedule,
                 BackwardShared<T>& shared)
      : call_(call),
        schedule_(schedule),
        shared_(shared),
        sizes_(call.inputs, schedule),
        wanted_(wanted_of(call)),
        score_(arena, call.inputs, sizes_, false, wanted_.radial),
        pairs_(call.inputs),
        d_out_(arena.take<T>(sizes_.heads_per_group * sizes_.width * kRows)) {
    atoms_.layout(arena, call, sizes_, schedule.largest_small);
  }

  void run(const Job& job) {
    group_ = group_of(job.group, schedule_, call_.inputs.num_heads);
    if (job.group != current_) score_.select(group_, nullptr);
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
          BackwardAtoms<T>::prefetch(call_, *next, group_);
        }
        run_tiles(atoms_, 0, m.count, 0, m.count);
        atoms_.finish(call_, m, group_, shared_.dx.part(job.group));
      } else {
        run_tiles(shared_.large[m.large * schedule_.num_groups + job.group],
                  m.chunk_begin(item.rows), m.chunk_begin(item.rows + 1), m.chunk_begin(item.keys),
                  m.chunk_begin(item.keys + 1));
      }
    }
    if (wanted_.radial) {
      score_.add_gradient_to(shared_.d_radial.part(part),
                             schedule_.one_job_a_part ? Into::kSet : Into::kAdd);
    }
  }

 private:
  using V = Vec<T>;

  void run_tiles(const BackwardAtoms<T>& atoms, int64_t begin, int64_t end, int64_t first_key,
                 int64_t last_key) {
    for (int64_t i = begin; i < end; i += kRows) {
      const Tile tile = tile_at<T>(i, end);
      score_.begin_tile(atoms, tile);
      for (int64_t h = 0; h < group_.count && atoms.d_out; ++h) {
        turn_over(tile, atoms.d_out, h, d_out_ + h * sizes_.width * kRows);
      }
      for (int64_t j = first_key; j < last_key; j += kKeys) {
        run_block(atoms, {tile, j, last_key - j < kKeys ? last_key - j : kKeys});
      }
    }
  }

  void run_block(const BackwardAtoms<T>& atoms, const Block& block) {
    pairs_.compute(atoms, block, wanted_.geometry ? 1 : 0);
    score_.begin_block(pairs_, block, wanted_.geometry);
    for (int64_t h = 0; h < group_.count; ++h) {
      coefficients(atoms, block, h, score_.scores(h));
      if (call_.dv && atoms.d_out) {
        add_to_keys(block, sizes_.chunks, p_, atoms.d_out, atoms.dv, h);
      }
      score_.pull(h, wanted_, atoms.to);
    }
    score_.end_block(wanted_, atoms.to);
    if (wanted_.geometry) pairs_.pull(atoms, block, score_.b(), atoms.dx, d_affine_);
  }

  // P into p_, and E in the place of S.
  void coefficients(const BackwardAtoms<T>& atoms, const Block& block, int64_t h, T* s) {
    a_minus_delta(block, sizes_.head_dim, atoms.shift.at(h, block.tile.first), atoms.v, h,
                  atoms.d_out ? d_out_ + h * sizes_.width * kRows : nullptr, a_);
    for (int64_t n = 0; n < block.tile.vectors; ++n) {
      const int64_t lanes = n * kWidth<T>;
      V log_sum{};
      if constexpr (!Normalizer::kIsLinear) {
        log_sum = load<V>(atoms.log_sum.at(h, block.tile.first + lanes));
      }
      for (int64_t at = lanes; at < block.keys * kRows; at += kRows) {
        const V p = Normalizer::weight(load<V>(s + at), log_sum);
        store(p_ + at, p);
        store(s + at, Normalizer::score_gradient(p, load<V>(a_ + at)));
      }
    }
  }

  const BackwardCall<T>& call_;
  const Schedule& schedule_;
  BackwardShared<T>& shared_;
  const Sizes<T> sizes_;
  const Wanted wanted_;
  Score score_;
  Pairs<T> pairs_;
  BackwardAtoms<T> atoms_;
  T* d_out_;  // dO of a tile [h, width, I], turned over
  T* d_affine_ = nullptr;
  Group group_{};
  int64_t current_ = -1;
  alignas(64) PairNumbers<T> p_;
  alignas(64) PairNumbers<T> a_;
};

template <class T>
void attention_bwd_of(const BackwardCall<T>& call, const Schedule& schedule) {
  const Inputs<T>& inputs = call.inputs;
  const Sizes<T> sizes(inputs, schedule);
  const int64_t groups = schedule.num_groups;
  Arena arena(Arena::kCall);
  BackwardShared<T> shared{arena.take<BackwardAtoms<T>>(schedule.num_large * groups),
                           Parts<T>(arena, call.d_positions, 3 * inputs.num_rows, groups),
                           radial_parts(arena, inputs, schedule, call.d_radial),
                           affine_parts(arena, inputs, schedule, call.d_affine)};
  for_each_large(schedule, [&](const Molecule& m, int64_t, int64_t at) {
    new (shared.large + at) BackwardAtoms<T>();
    shared.large[at].layout(arena, call, sizes, m.count);
  });
  for_each_large(call.run_threads, schedule, [&](const Molecule& m, int64_t group, int64_t at) {
    shared.large[at].begin(call, m, group_of(group, schedule, inputs.num_heads));
  });
  for_variant<T>(inputs, [&](auto score, auto normalizer) {
    using Score = typename decltype(score)::type;
    run_jobs<BackwardWorker<T, Score, decltype(normalizer)>>(call, schedule, shared);
  });
  for_each_large(call.run_threads, schedule, [&](const Molecule& m, int64_t group, int64_t at) {
    shared.large[at].finish(call, m, group_of(group, schedule, inputs.num_heads),
                            shared.dx.part(group));
  });
  for (const Parts<T>* parts : {&shared.dx, &shared.d_radial, &shared.d_affine}) {
    parts->add_up(call.run_threads);
  }
  for (const Rows<T>* rows : {&call.dq, &call.dk, &call.dv}) {
    zero_padding(*rows, schedule, inputs.num_heads, inputs.head_dim);
  }
}

}  // namespace

void attention_bwd(const BackwardCall<float>& call, const Schedule& schedule) {
  attention_bwd_of(call, schedule);
}
void attention_bwd(const BackwardCall<double>& call, const Schedule& schedule) {
  attention_bwd_of(call, schedule);
}

}  // namespace geot::cpu::GEOT_ISA
