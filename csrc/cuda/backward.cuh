// First backward: with A_ij = dO_i·v_j + dr_i and E = P (A - δ), δ_i = Σ_j P_ij A_ij (softmax) or
// E = A (linear), E pulls back on the scores and dv_j = Σ_i P_ij dO_i (MATH.md section 2).
//
// Two sweeps, of one shape: rows against tiles of columns, with (q, dO) against (k, v) by rows and
// (k, v) against (q, dO) by keys. By rows a first round over the columns finds δ, and the sum of
// exp(S - L), which for large scores is not 1; a second one gives dq and the gradient of f. By keys
// these numbers of rows are read again. Where one block has all of a molecule, the sweep by rows
// leaves P and E in shared memory, and finishes with what the sweep by keys would give.
#pragma once

#include "sweeps.cuh"

namespace geot::cuda {

// By rows or by keys: where the two parts of the features, and the results, are.
template <class ScoreOf, bool kByKeys>
struct Backward {
  using Call = BackwardCall;
  using Score = ScoreOf;
  using T = typename Score::Feature;
  using F = typename Score::F;
  static constexpr int kMaxThreads = 32 * kMaxWarps, kMinBlocks = Score::kIsNarrow ? 3 : 1;
  static constexpr int kColumns = Score::kColumns, kTiles = Score::kTiles;

  struct Memory {
    typename Score::Memory score;
    Tile<T> own1, own2, other1, other2;  // by rows: q, dO, k, v
    Atom<F>* others;
    RowNumbers<F>* numbers;
    Matrix<F> p, e, b;  // at first S, A and f', in their place P, E and m dL/dz
    unsigned* affine;
    int* reach;
  };
  // Whether the sweep by rows does all there is to do for a molecule.
  static GEOT_INLINE bool is_whole(const Call& call) { return !kByKeys && call.plan.is_whole; }
  static GEOT_INLINE Memory take(Carver& carver, const Call& call) {
    const int64_t head_dim = call.in.head_dim;
    const int rows = kWarpRows * call.plan.warps, columns = is_whole(call) ? rows : kColumns;
    const int tile = columns < kColumns ? columns : kColumns;
    Memory memory{};
    memory.score = Score::take(carver, call.in, call.plan, false, has_sums(call.sums), columns, 2);
    memory.own1 = Tile<T>::take(carver, rows, head_dim);
    memory.own2 = Tile<T>::take(carver, rows, head_dim);
    memory.other1 = Tile<T>::take(carver, tile, head_dim);
    memory.other2 = Tile<T>::take(carver, tile, head_dim);
    memory.others = carver.take<Atom<F>>(columns);
    if (kByKeys) memory.numbers = carver.take<RowNumbers<F>>(kColumns);
    memory.p = Matrix<F>::take(carver, rows, columns);
    memory.e = Matrix<F>::take(carver, rows, columns);
    memory.b = Matrix<F>::take(carver, rows, columns);
    memory.affine = AffineSums<F>::take(carver, call.in, call.sums);
    memory.reach = carver.take<int>(kMaxWarps);
    return memory;
  }

  static GEOT_DEVICE void run(const Call& call, char* shared) {
    run_sweep<Backward>(call, nullptr, shared);
  }

  static GEOT_DEVICE void sweep(const Call& call, const Work& work, const Memory& memory,
                                const Score& score, const AffineSums<F>& affine, const Molecule& m,
                                int first) {
    const Inputs& in = call.in;
    const int head_dim = int(in.head_dim), last = m.real.last;
    const int own_first = first + warp() * kWarpRows;
    const Tile<T> own1 = memory.own1.from(warp() * kWarpRows);
    const Tile<T> own2 = memory.own2.from(warp() * kWarpRows);
    const bool needs_b = call.d_positions != nullptr || call.sums.affine != nullptr;
    const bool needs_radial = score.sums_gradient();
    const Atom<F> atoms[2] = {load_atom<F>(in, m, own_first + row_of(0)),
                              load_atom<F>(in, m, own_first + row_of(2))};
    RowNumbers<F> numbers[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = own_first + row_of(2 * half);
      numbers[half] = {0, 1, 0, 0, 0};
      if (!kByKeys && m.real(i)) {
        const int64_t at = work.at(m, i);
        if (!in.is_linear) {
          numbers[half].log_sum = static_cast<const F*>(call.row)[at];
        } else if (call.d_row != nullptr) {
          numbers[half].delta = -static_cast<const F*>(call.d_row)[at];
        }
      }
    }
    F total[2] = {}, weighted[2] = {};  // Σ exp(S - L), Σ exp(S - L) A
    typename Score::RowSum sum1 = score.sum(0), sum2 = score.sum(1);
    Vector3<F> force_on[2] = {};

    const int tiles = (last + kColumns - 1) / kColumns;
    const bool has_two_rounds = !kByKeys && !in.is_linear && tiles > 1;
    for (int step = 0; step < (has_two_rounds ? 2 * tiles : tiles); ++step) {
      const int j0 = (step < tiles ? step : step - tiles) * kColumns;
      const int columns = last - j0 < kColumns ? last - j0 : kColumns;
      const int at = is_whole(call) ? j0 : 0;
      const Atom<F>* others = memory.others + at;
      GEOT_SYNC_BLOCK();  // who reads the tiles before
      load(call, work, memory, m, first, step == 0, j0, columns);
      GEOT_SYNC_BLOCK();
      const PairAt<F> pair_at{in, atoms, others};
      const View<F> p = memory.p.rows(at), e = memory.e.rows(at), b = memory.b.rows(at);
      const typename Score::Side side = score.by_rows(at);
      if (step < tiles || !is_whole(call)) {  // or the matrices still have S and A
        score.template scores<true>(p, b, side, own1, memory.other1, columns, pair_at);
        products<T, F, kTiles>(own2, memory.other2, columns, head_dim,
                               [&](int i, int j, F product) { e(i, j) = product; });
      }
      if (!kByKeys && !in.is_linear && step < tiles) {
        for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
          if (others[j].is_real()) {
            const F weight = Softmax::weight(p(i, j), numbers[half].log_sum);
            total[half] += weight;
            weighted[half] += weight * e(i, j);
          }
        });
        if (step == tiles - 1) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            numbers[half].per_total = F(1) / sum_of_row(total[half]);
            numbers[half].delta = sum_of_row(weighted[half]) * numbers[half].per_total;
          }
        }
      }
      if (has_two_rounds && step < tiles) continue;

      for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
        const RowNumbers<F>& row = kByKeys ? memory.numbers[j] : numbers[half];
        F weight = p(i, j), pull = e(i, j) - row.delta;
        if (!atoms[half].is_real() || !others[j].is_real()) {
          weight = pull = 0;
        } else if (in.is_linear) {
          pull = Linear::score_gradient(weight, pull);
        } else {
          weight = Softmax::weight(weight, row.log_sum) * row.per_total;
          pull = Softmax::score_gradient(weight, pull);
        }
        p(i, j) = weight;
        e(i, j) = pull;
      });
      GEOT_SYNC_WARP();
      if (kByKeys) sum2.add(p, memory.other2, columns);
      score.pull(sum1, e, b, side, own1, memory.other1, columns, pair_at, needs_b, needs_radial,
                 [&](int half, int i, int j, const PairOfAtoms<F>& pair, F of_z) {
                   if (affine && of_z != 0) affine.add(pair.affine, of_z * pair.dist, of_z);
                   b(i, j) = pair.m * of_z;
                   force_on[half] = force_on[half] + force(b(i, j), pair.u());
                 });
    }
    const F scales[2] = {F(in.scale), F(in.scale)}, ones[2] = {1, 1};
    const HeadRows<T> d_own = work.features<T>(kByKeys ? call.dk : call.dq, m);
    if (d_own) sum1.store(d_own, own_first, m.count, m.real, scales);
    if (kByKeys) {
      const HeadRows<T> dv = work.features<T>(call.dv, m);
      if (dv) sum2.store(dv, own_first, m.count, m.real, ones);
    } else if (is_whole(call)) {
      finish_whole(call, work, memory, score, m, own_first, atoms, sum1, force_on);
    }
    store_rows<kByKeys>(call, call.d_positions, work, m, own_first, numbers, force_on);
  }

 private:
  // Loads what columns [j0, j0 + columns) need, and at first the rows.
  static GEOT_DEVICE void load(const Call& call, const Work& work, const Memory& memory,
                               const Molecule& m, int first, bool is_first, int j0, int columns) {
    const Inputs& in = call.in;
    const int head_dim = int(in.head_dim), count = int(round_up(columns, 16));
    const HeadRows<T> q = work.features<T>(in.q, m), k = work.features<T>(in.k, m),
                      v = work.features<T>(in.v, m), d_out = work.features<T>(call.d_out, m);
    if (is_first) {
      const int rows = kWarpRows * call.plan.warps;
      load_tile(memory.own1, kByKeys ? k : q, first, rows, m.real, head_dim);
      load_tile(memory.own2, kByKeys ? v : d_out, first, rows, m.real, head_dim);
    }
    load_tile(memory.other1, kByKeys ? q : k, j0, count, m.real, head_dim);
    load_tile(memory.other2, kByKeys ? d_out : v, j0, count, m.real, head_dim);
    for (int j = thread_index(); j < count; j += num_threads()) {
      memory.others[j + (is_whole(call) ? j0 : 0)] = load_atom<F>(in, m, j0 + j);
      if (kByKeys) {
        const int64_t row = work.head * in.num_rows + m.first + j0 + j;
        memory.numbers[j] =
            m.real(j0 + j) ? static_cast<const RowNumbers<F>*>(call.numbers)[row] : RowNumbers<F>{};
      }
    }
  }

  // The sweep by keys of a molecule whose P, E and m b the block has: one sum after the other.
  static GEOT_DEVICE void finish_whole(const Call& call, const Work& work, const Memory& memory,
                                       const Score& score, const Molecule& m, int own_first,
                                       const Atom<F> (&atoms)[2], typename Score::RowSum& sum,
                                       Vector3<F> (&force_on)[2]) {
    const F scales[2] = {F(call.in.scale), F(call.in.scale)}, ones[2] = {1, 1};
    const HeadRows<T> dk = work.features<T>(call.dk, m), dv = work.features<T>(call.dv, m);
    const auto for_each_tile = [&](const auto& body) {
      for (int i0 = 0; i0 < m.real.last; i0 += kColumns) {
        const int columns = m.real.last - i0 < kColumns ? m.real.last - i0 : kColumns;
        body(i0, columns, PairAt<F>{call.in, atoms, memory.others + i0});
      }
    };
    GEOT_SYNC_BLOCK();  // who writes P, E and m b
    if (dv) {
      sum.clear();
      for_each_tile([&](int i0, int columns, const PairAt<F>&) {
        sum.add(memory.p.columns(i0), memory.own2.from(i0), columns);
      });
      sum.store(dv, own_first, m.count, m.real, ones);
    }
    if (dk) {
      sum.clear();
      for_each_tile([&](int i0, int columns, const PairAt<F>& pair_at) {
        score.pull(sum, memory.e.columns(i0), {}, score.by_columns(i0), memory.own1,
                   memory.own1.from(i0), columns, pair_at, false, false,
                   [](int, int, int, const PairOfAtoms<F>&, F) {});
      });
      sum.store(dk, own_first, m.count, m.real, scales);
    }
    if (call.d_positions != nullptr) {
      for_each_tile([&](int i0, int columns, const PairAt<F>& pair_at) {
        const View<F> b = memory.b.columns(i0);
        for_each_pair_in_turn<F>(columns, [&](int half, int j, int i) {
          force_on[half] = force_on[half] + force(b(j, i), pair_at(half, i).u());
        });
      });
    }
  }
};

}  // namespace geot::cuda
