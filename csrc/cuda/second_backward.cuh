// Second backward: the gradients of <dO, Ȯ> + <dr, ṙ>, Ȯ and ṙ the tangents of the forward pass
// along the dotted inputs (MATH.md section 3).
//
//   G = (Ṡ - ρ)(A - δ) + Ȧ,   Ṗ = P (Ṡ - ρ),   S̄ = P (G - ε)      (linear: Ṗ = Ṡ, S̄ = Ȧ)
//
// E pulls back on Ṡ, S̄ on S. The sweeps are those of the first backward pass: by rows a first round
// finds δ, ρ and ε; of the features' two parts, (q, dO) against (k, v) or the other way round, each
// has a tangent (but dO), so that both sweeps are the same sums:
//
//   own 1 += Σ S̄ other1 + E ȯther1        own 2 += Σ Ṗ other2 + P ȯther2
#pragma once

#include "sweeps.cuh"

namespace geot::cuda {

template <class ScoreOf, bool kByKeys>
struct SecondBackward {
  using Call = SecondBackwardCall;
  using Score = ScoreOf;
  using F = typename Score::F;
  static constexpr int kMaxThreads = 32 * kMaxWarps, kMinBlocks = 1;
  static constexpr int kColumns = Score::kColumns, kTiles = Score::kTiles;

  struct Memory {
    typename Score::Memory score;
    Tile<F> own1, own2, other1, other2;                  // by rows: q, dO, k, v
    Tile<F> own1_dot, own2_dot, other1_dot, other2_dot;  // that of dO is nothing
    Atom<F>* others;
    Vector3<F>* x_dots;
    RowNumbers<F>* numbers;
    Matrix<F> p, p_dot, e, s_bar;  // at first S, Ṡ, A and Ȧ
    Matrix<F> along, across;       // of whole molecules: m b̄ + ṁ ẽ and m ẽ
    unsigned* affine;
    int* reach;
  };
  // Whether the sweep by rows does all there is to do for a molecule.
  static GEOT_INLINE bool is_whole(const Call& call) { return !kByKeys && call.plan.is_whole; }
  static GEOT_INLINE Memory take(Carver& carver, const Call& call) {
    const int64_t head_dim = call.in.head_dim;
    const int rows = kWarpRows * call.plan.warps, columns = is_whole(call) ? rows : kColumns;
    const int tile_rows = columns < kColumns ? columns : kColumns;
    const auto tile = [&](bool is_there, int count) {
      return is_there ? Tile<F>::take(carver, count, head_dim) : Tile<F>{};
    };
    const bool q_dot = call.q_dot.data != nullptr, k_dot = call.k_dot.data != nullptr,
               v_dot = call.v_dot.data != nullptr;
    Memory memory{};
    memory.score = Score::take(carver, call.in, call.plan, call.radial_dot != nullptr,
                               has_sums(call.sums), columns, 2, true);
    memory.own1 = tile(true, rows);
    memory.own2 = tile(true, rows);
    memory.own1_dot = tile(kByKeys ? k_dot : q_dot, rows);
    memory.own2_dot = tile(kByKeys && v_dot, rows);
    memory.other1 = tile(true, tile_rows);
    memory.other2 = tile(true, tile_rows);
    memory.other1_dot = tile(kByKeys ? q_dot : k_dot, tile_rows);
    memory.other2_dot = tile(!kByKeys && v_dot, tile_rows);
    memory.others = carver.take<Atom<F>>(columns);
    if (call.x_dot != nullptr) memory.x_dots = carver.take<Vector3<F>>(columns);
    if (kByKeys) memory.numbers = carver.take<RowNumbers<F>>(kColumns);
    memory.p = Matrix<F>::take(carver, rows, columns);
    memory.p_dot = Matrix<F>::take(carver, rows, columns);
    memory.e = Matrix<F>::take(carver, rows, columns);
    memory.s_bar = Matrix<F>::take(carver, rows, columns);
    if (is_whole(call) && call.grad_positions != nullptr) {
      memory.along = Matrix<F>::take(carver, rows, columns);
      memory.across = Matrix<F>::take(carver, rows, columns);
    }
    memory.affine = AffineSums<F>::take(carver, call.in, call.sums);
    memory.reach = carver.take<int>(kMaxWarps);
    return memory;
  }

  static GEOT_DEVICE void run(const Call& call, char* shared) {
    run_sweep<SecondBackward>(call, call.radial_dot, shared);
  }

  static GEOT_DEVICE void sweep(const Call& call, const Work& work, const Memory& memory,
                                const Score& score, const AffineSums<F>& affine, const Molecule& m,
                                int first) {
    const Inputs& in = call.in;
    const int head_dim = int(in.head_dim), last = m.real.last;
    const int own_first = first + warp() * kWarpRows;
    const auto own_part = [&](const Tile<F>& tile) {
      return tile.data != nullptr ? tile.from(warp() * kWarpRows) : tile;
    };
    const Tile<F> own1 = own_part(memory.own1), own2 = own_part(memory.own2),
                  own1_dot = own_part(memory.own1_dot), own2_dot = own_part(memory.own2_dot);
    const bool needs_b = call.grad_positions != nullptr || call.sums.affine != nullptr;
    const bool needs_radial = score.sums_gradient();
    Own own;
    RowNumbers<F> numbers[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = own_first + row_of(2 * half);
      own.atoms[half] = load_atom<F>(in, m, i);
      own.x_dots[half] = x_dot_of(call, m, i);
      numbers[half] = first_numbers(call, work, m, i);
    }
    RowSums sums{};
    typename Score::RowSum sum1 = score.sum(0), sum2 = score.sum(1);
    Vector3<F> force_on[2] = {};
    F row_dot[2] = {};  // ṙ

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
      const PairAt<F> pair_at{in, own.atoms, others};
      const auto tangent_at = [&](const PairOfAtoms<F>& pair, int half, int j) {
        return tangent_of(call, pair, x_dot_between(memory, own, half, at + j));
      };
      const View<F> p = memory.p.rows(at), p_dot = memory.p_dot.rows(at), e = memory.e.rows(at),
                    s_bar = memory.s_bar.rows(at);
      const typename Score::Side side = score.by_rows(at);
      if (step < tiles || !is_whole(call)) {  // or the matrices still have S, Ṡ, A and Ȧ
        score.scores_and_tangents(p, p_dot, side, own1, own1_dot, memory.other1, memory.other1_dot,
                                  columns, pair_at, tangent_at);
        products<F, F, kTiles>(own2, memory.other2, columns, head_dim,
                               [&](int i, int j, F product) {
                                 e(i, j) = product;
                                 s_bar(i, j) = 0;
                               });
        const auto add_a_dot = [&](const Tile<F>& left, const Tile<F>& right) {
          if (left.data == nullptr || right.data == nullptr) return;
          products<F, F, kTiles>(left, right, columns, head_dim,
                                 [&](int i, int j, F product) { s_bar(i, j) += product; });
        };
        add_a_dot(own2_dot, memory.other2);
        add_a_dot(own2, memory.other2_dot);
      }
      if (!kByKeys && !in.is_linear && step < tiles) {
        for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
          if (!others[j].is_real()) return;
          const F weight = Softmax::weight(p(i, j), numbers[half].log_sum);
          const F a = e(i, j) - numbers[half].delta;
          sums.p[half] += weight;
          sums.p_a[half] += weight * a;
          sums.p_s_dot[half] += weight * p_dot(i, j);
          sums.p_g[half] += weight * Softmax::second(p_dot(i, j), a, F(0), s_bar(i, j));
        });
        if (step == tiles - 1) finish_round(numbers, sums);
      }
      if (has_two_rounds && step < tiles) continue;

      for_each_pair_in_turn<F>(columns, [&](int half, int i, int j) {
        const RowNumbers<F>& row = kByKeys ? memory.numbers[j] : numbers[half];
        Coefficients c{};
        if (own.atoms[half].is_real() && others[j].is_real()) {
          const F a = e(i, j) - row.delta;
          if (in.is_linear) {
            c = coefficients<Linear>(p(i, j), p_dot(i, j), a, s_bar(i, j), row);
          } else {
            const F weight = Softmax::weight(p(i, j), row.log_sum) * row.per_total;
            c = coefficients<Softmax>(weight, p_dot(i, j), a, s_bar(i, j), row);
          }
        }
        p(i, j) = c.p;
        p_dot(i, j) = c.p_dot;
        e(i, j) = c.e;
        s_bar(i, j) = c.s_bar;
        row_dot[half] += c.p_dot;
      });
      GEOT_SYNC_WARP();
      sum2.add(p_dot, memory.other2, columns);
      if (memory.other2_dot.data != nullptr) sum2.add(p, memory.other2_dot, columns);
      const View<F> along = memory.along.rows(at), across = memory.across.rows(at);
      score.pull_second(
          sum1, e, s_bar, side, own1, own1_dot, memory.other1, memory.other1_dot, columns, pair_at,
          tangent_at, needs_b, needs_radial,
          [&](int half, int i, int j, const PairOfAtoms<F>& pair, const PairTangent<F>& tangent,
              F b_bar, F e_dot) {
            if (affine && (b_bar != 0 || e_dot != 0)) {
              affine.add(pair.affine, b_bar * pair.dist + e_dot * tangent.d_dot, b_bar);
            }
            // What `second_force` is made of.
            const F of_u = pair.m * b_bar + tangent.m_dot * e_dot, of_x_dot = pair.m * e_dot;
            add_force(force_on[half], of_u, of_x_dot, pair, tangent);
            if (memory.along.data != nullptr) {
              along(i, j) = of_u;
              across(i, j) = of_x_dot;
            }
          });
    }
    const F scales[2] = {F(in.scale), F(in.scale)}, ones[2] = {1, 1};
    const auto store = [&](const typename Score::RowSum& sum, const Rows& rows,
                           const F(&factors)[2]) {
      const HeadRows<F> to = work.features<F>(rows, m);
      if (to) sum.store(to, own_first, m.count, m.real, factors);
    };
    store(sum1, kByKeys ? call.grad_k : call.grad_q, scales);
    store(sum2, kByKeys ? call.grad_v : call.grad_d_out, ones);
    if (is_whole(call)) {
      finish_whole(call, memory, score, m, own, sum1, sum2, force_on);
      store(sum1, call.grad_k, scales);
      store(sum2, call.grad_v, ones);
    }
    store_row_sums(call, work, m, own_first, row_dot);
    store_rows<kByKeys>(call, call.grad_positions, work, m, own_first, numbers, force_on);
  }

 private:
  // What a sweep knows of its rows.
  struct Own {
    Atom<F> atoms[2];
    Vector3<F> x_dots[2];
  };
  // Sums of a row's first round; of exp(S - L) where it says P.
  struct RowSums {
    F p[2], p_s_dot[2], p_a[2], p_g[2];
  };

  static GEOT_DEVICE Vector3<F> x_dot_of(const Call& call, const Molecule& m, int i) {
    if (call.x_dot == nullptr || !m.real(i)) return {0, 0, 0};
    return load_vector<F>(call.x_dot, m.first + i);
  }
  static GEOT_DEVICE PairTangent<F> tangent_of(const Call& call, const PairOfAtoms<F>& pair,
                                               const Vector3<F>& x_dot) {
    PairTangent<F> tangent;
    tangent.x_dot = x_dot;
    tangent.d_dot = pair.u().dot(x_dot);
    tangent.m_dot = 0;
    F c_dot = 0;
    if (call.affine_dot != nullptr) {
      const F* map = static_cast<const F*>(call.affine_dot) + 2 * pair.affine;
      tangent.m_dot = map[0];
      c_dot = map[1];
    }
    tangent.z_dot = coordinate_tangent(pair.m, tangent.d_dot, tangent.m_dot, pair.dist, c_dot);
    return tangent;
  }

  struct Coefficients {
    F p, p_dot, e, s_bar;
  };
  template <class Normalizer>
  static GEOT_DEVICE Coefficients coefficients(F p, F s_dot, F a, F a_dot,
                                               const RowNumbers<F>& row) {
    const F g = Normalizer::second(s_dot, a, row.rho, a_dot);
    return {p, Normalizer::weight_tangent(p, s_dot, row.rho), Normalizer::score_gradient(p, a),
            Normalizer::score_second_gradient(p, g, row.epsilon)};
  }

  static GEOT_DEVICE void add_force(Vector3<F>& sum, F along, F across, const PairOfAtoms<F>& pair,
                                    const PairTangent<F>& tangent) {
    sum = sum + second_force(F(1), F(0), along, across, inverse_distance(pair.dist), pair.u(),
                             tangent.x_dot, tangent.d_dot);
  }

  static GEOT_DEVICE Vector3<F> x_dot_between(const Memory& memory, const Own& own, int half,
                                              int j) {
    return memory.x_dots != nullptr ? own.x_dots[half] - memory.x_dots[j] : Vector3<F>{0, 0, 0};
  }

  // L, and of δ what is known before: dO·O, so that what is summed up of A - δ is small.
  static GEOT_DEVICE RowNumbers<F> first_numbers(const Call& call, const Work& work,
                                                 const Molecule& m, int i) {
    RowNumbers<F> numbers{0, 1, 0, 0, 0};
    if (kByKeys || !m.real(i)) return numbers;
    const int64_t at = work.at(m, i);
    if (call.in.is_linear) {
      if (call.d_row != nullptr) numbers.delta = -static_cast<const F*>(call.d_row)[at];
      return numbers;
    }
    numbers.log_sum = static_cast<const F*>(call.row)[at];
    const F* out = work.features<F>(call.out, m).row(i);
    const F* d_out = work.features<F>(call.d_out, m).row(i);
    for (int c = 0; c < call.in.head_dim; ++c) numbers.delta += d_out[c] * out[c];
    return numbers;
  }
  // ρ = Σ P Ṡ and ε = Σ P ((Ṡ - ρ)(A - δ) + Ȧ), with P that sums up to 1 and Σ P (A - δ) = 0.
  static GEOT_DEVICE void finish_round(RowNumbers<F> (&numbers)[2], const RowSums& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowNumbers<F>& row = numbers[half];
      row.per_total = F(1) / sum_of_row(sums.p[half]);
      row.rho = sum_of_row(sums.p_s_dot[half]) * row.per_total;
      const F rest = sum_of_row(sums.p_a[half]) * row.per_total;
      row.delta += rest;
      const F a_dot_and_more = sum_of_row(sums.p_g[half]) * row.per_total;
      row.epsilon = a_dot_and_more - row.rho * rest;
    }
  }

  static GEOT_DEVICE void load(const Call& call, const Work& work, const Memory& memory,
                               const Molecule& m, int first, bool is_first, int j0, int columns) {
    const Inputs& in = call.in;
    const int head_dim = int(in.head_dim), count = int(round_up(columns, 16));
    const auto load_rows = [&](const Tile<F>& tile, const Rows& rows, int from, int number) {
      if (tile.data != nullptr) {
        load_tile(tile, work.features<F>(rows, m), from, number, m.real, head_dim);
      }
    };
    if (is_first) {
      const int rows = kWarpRows * call.plan.warps;
      load_rows(memory.own1, kByKeys ? in.k : in.q, first, rows);
      load_rows(memory.own2, kByKeys ? in.v : call.d_out, first, rows);
      load_rows(memory.own1_dot, kByKeys ? call.k_dot : call.q_dot, first, rows);
      load_rows(memory.own2_dot, call.v_dot, first, rows);
    }
    load_rows(memory.other1, kByKeys ? in.q : in.k, j0, count);
    load_rows(memory.other2, kByKeys ? call.d_out : in.v, j0, count);
    load_rows(memory.other1_dot, kByKeys ? call.q_dot : call.k_dot, j0, count);
    load_rows(memory.other2_dot, call.v_dot, j0, count);
    for (int j = thread_index(); j < count; j += num_threads()) {
      const int at = j + (is_whole(call) ? j0 : 0);
      memory.others[at] = load_atom<F>(in, m, j0 + j);
      if (memory.x_dots != nullptr) memory.x_dots[at] = x_dot_of(call, m, j0 + j);
      if (kByKeys) {
        const int64_t row = work.head * in.num_rows + m.first + j0 + j;
        memory.numbers[j] =
            m.real(j0 + j) ? static_cast<const RowNumbers<F>*>(call.numbers)[row] : RowNumbers<F>{};
      }
    }
  }

  // The sweep by keys of a molecule whose coefficients the block has.
  static GEOT_DEVICE void finish_whole(const Call& call, const Memory& memory, const Score& score,
                                       const Molecule& m, const Own& own,
                                       typename Score::RowSum& sum1, typename Score::RowSum& sum2,
                                       Vector3<F> (&force_on)[2]) {
    sum1.clear();
    sum2.clear();
    GEOT_SYNC_BLOCK();  // who writes the matrices
    for (int i0 = 0; i0 < m.real.last; i0 += kColumns) {
      const int columns = m.real.last - i0 < kColumns ? m.real.last - i0 : kColumns;
      const PairAt<F> pair_at{call.in, own.atoms, memory.others + i0};
      const auto tangent_at = [&](const PairOfAtoms<F>& pair, int half, int i) {
        return tangent_of(call, pair, x_dot_between(memory, own, half, i0 + i));
      };
      if (call.grad_v.data != nullptr) {
        sum2.add(memory.p_dot.columns(i0), memory.own2.from(i0), columns);
      }
      if (call.grad_k.data != nullptr) {
        const Tile<F> dot = memory.own1_dot;
        score.pull_second(sum1, memory.e.columns(i0), memory.s_bar.columns(i0),
                          score.by_columns(i0), memory.own1, dot, memory.own1.from(i0),
                          dot.data != nullptr ? dot.from(i0) : dot, columns, pair_at, tangent_at,
                          false, false,
                          [](int, int, int, const PairOfAtoms<F>&, const PairTangent<F>&, F, F) {});
      }
      if (call.grad_positions != nullptr) {
        const View<F> along = memory.along.columns(i0), across = memory.across.columns(i0);
        for_each_pair_in_turn<F>(columns, [&](int half, int j, int i) {
          const PairOfAtoms<F> pair = pair_at(half, i);
          add_force(force_on[half], along(j, i), across(j, i), pair, tangent_at(pair, half, i));
        });
      }
    }
  }

  // ṙ
  static GEOT_DEVICE void store_row_sums(const Call& call, const Work& work, const Molecule& m,
                                         int first, const F (&row_dot)[2]) {
    if (kByKeys || call.grad_d_row == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + row_of(2 * half);
      const F sum = sum_of_row(row_dot[half]);
      if (lane() % 4 == 0 && i < m.count) {
        static_cast<F*>(call.grad_d_row)[work.at(m, i)] = m.real(i) ? sum : F(0);
      }
    }
  }
};

}  // namespace geot::cuda
