// Forward: O_i = Σ_j P_ij v_j, and L_i = log Σ_j exp(S_ij) of a softmax, r_i = Σ_j P_ij of a linear
// normalizer (MATH.md section 1). A warp keeps the sums of its 16 rows while the atoms of the
// molecule go by; of a softmax relative to the largest score so far.
#pragma once

#include "../common/normalizer.h"
#include "bias.cuh"
#include "filter.cuh"

namespace geot::cuda {

template <class Score>
struct Forward {
  using Call = ForwardCall;
  using T = typename Score::Feature;
  using F = typename Score::F;
  static constexpr int kMaxThreads = 32 * kMaxWarps, kMinBlocks = Score::kIsNarrow ? 4 : 1;
  static constexpr int kColumns = Score::kColumns, kTiles = Score::kTiles;

  struct Memory {
    typename Score::Memory score;
    Tile<T> q, k, v;
    Matrix<F> p;
    Atom<F>* others;
    int* reach;
  };
  static GEOT_INLINE Memory take(Carver& carver, const Call& call) {
    const int rows = kWarpRows * call.plan.warps;
    const int columns = call.plan.row_tiles <= 1 && rows < kColumns ? rows : kColumns;
    const int64_t head_dim = call.in.head_dim;
    Memory memory;
    memory.score = Score::take(carver, call.in, call.plan, false, false, columns, 1);
    memory.q = Tile<T>::take(carver, rows, head_dim);
    memory.k = Tile<T>::take(carver, columns, head_dim);
    memory.v = Tile<T>::take(carver, columns, head_dim);
    memory.p = Matrix<F>::take(carver, rows, columns);
    memory.others = carver.take<Atom<F>>(columns);
    memory.reach = carver.take<int>(kMaxWarps);
    return memory;
  }

  static GEOT_DEVICE void run(const Call& call, char* shared) {
    const Inputs& in = call.in;
    const int head_dim = int(in.head_dim);
    const Work work(in, call.plan);
    Carver carver(shared);
    const Memory memory = take(carver, call);
    const Score score(work, memory.score, nullptr, nullptr);
    const Tile<T> own = memory.q.from(warp() * kWarpRows);
    for (int64_t item = work.first_item(); item < work.num_items(); item += call.plan.chunks) {
      const Molecule m = work.molecule(item, memory.reach);
      const int first = work.first_row(item), own_first = first + warp() * kWarpRows;
      if (first >= m.count) continue;
      const Atom<F> atoms[2] = {load_atom<F>(in, m, own_first + row_of(0)),
                                load_atom<F>(in, m, own_first + row_of(2))};
      typename Score::RowSum out = score.sum(0);
      F largest[2] = {-F(HUGE_VAL), -F(HUGE_VAL)}, total[2] = {};
      for (int j0 = 0; j0 < m.real.last; j0 += kColumns) {
        const int columns = m.real.last - j0 < kColumns ? m.real.last - j0 : kColumns;
        GEOT_SYNC_BLOCK();  // who reads the tiles before
        if (j0 == 0) {
          load_tile(memory.q, work.features<T>(in.q, m), first, kWarpRows * call.plan.warps, m.real,
                    head_dim);
        }
        const int count = int(round_up(columns, 16));
        load_tile(memory.k, work.features<T>(in.k, m), j0, count, m.real, head_dim);
        load_tile(memory.v, work.features<T>(in.v, m), j0, count, m.real, head_dim);
        for (int j = thread_index(); j < count; j += num_threads()) {
          memory.others[j] = load_atom<F>(in, m, j0 + j);
        }
        GEOT_SYNC_BLOCK();
        const PairAt<F> pair_at{in, atoms, memory.others};
        const View<F> p = memory.p.rows(0);
        score.template scores<false>(p, p, score.by_rows(0), own, memory.k, columns, pair_at);
        if (in.is_linear) {
          for_each_pair<kTiles>(columns, [&](int, int e, int j) {
            F& s = p(row_of(e), j);
            if (!memory.others[j].is_real()) s = 0;
            total[e / 2] += s;
          });
        } else {
          normalize(p, out, largest, total, columns, memory.others);
        }
        GEOT_SYNC_WARP();
        out.add(p, memory.v, columns);
      }
      finish(call, work, m, first + warp() * kWarpRows, out, largest, total);
    }
  }

 private:
  // S -> exp(S - the largest so far); what has been summed up before is scaled accordingly.
  static GEOT_DEVICE void normalize(const View<F>& p, typename Score::RowSum& out, F (&largest)[2],
                                    F (&total)[2], int columns, const Atom<F>* others) {
    Fragment<F, kTiles> s;
    F top[2] = {largest[0], largest[1]};
    for_each_pair<kTiles>(columns, [&](int n, int e, int j) {
      s.at[n][e] = others[j].is_real() ? p(row_of(e), j) : -F(HUGE_VAL);
      top[e / 2] = s.at[n][e] > top[e / 2] ? s.at[n][e] : top[e / 2];
    });
    F factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = largest_of_row(top[half]);
      // Nothing but -infinity so far: any number serves.
      const F base = top[half] == -F(HUGE_VAL) ? F(0) : top[half];
      factors[half] = Math<F>::exp(largest[half] - base);
      largest[half] = top[half];
      top[half] = base;
      total[half] *= factors[half];
    }
    out.scale(factors);
    for_each_pair<kTiles>(columns, [&](int n, int e, int j) {
      const F weight = Softmax::weight(s.at[n][e], top[e / 2]);
      total[e / 2] += weight;
      p(row_of(e), j) = weight;
    });
  }

  static GEOT_DEVICE void finish(const Call& call, const Work& work, const Molecule& m, int first,
                                 const typename Score::RowSum& out, const F (&largest)[2],
                                 F (&total)[2]) {
    const bool is_linear = call.in.is_linear;
    F factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] = sum_of_row(total[half]);
      factors[half] = is_linear ? F(1) : F(1) / total[half];
      const int i = first + row_of(2 * half);
      if (lane() % 4 == 0 && i < m.count) {
        const F row = is_linear ? total[half] : largest[half] + Math<F>::log(total[half]);
        static_cast<F*>(call.row)[work.at(m, i)] = m.real(i) ? row : F(0);
      }
    }
    out.store(work.features<T>(call.out, m), first, m.count, m.real, factors);
  }
};

}  // namespace geot::cuda
