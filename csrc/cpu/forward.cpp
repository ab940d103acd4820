// Forward: O_i = Σ_j P_ij v_j, and of each row L_i = log Σ_j exp(S_ij), or r_i = Σ_j S_ij.
//
// A tile of query atoms meets its molecule's key atoms block by block. The softmax keeps a running
// maximum m and sum l of each row; a new maximum rescales what was summed before.
#include "variants.h"
#include "worker.h"

namespace geot::cpu::GEOT_ISA {
namespace {

template <class T, class Score, class Normalizer>
class ForwardWorker {
 public:
  ForwardWorker(Arena& arena, const ForwardCall<T>& call, const Schedule& schedule,
                Atoms<T>* const& large)
      : call_(call),
        schedule_(schedule),
        large_(large),
        sizes_(call.inputs, schedule),
        score_(arena, call.inputs, sizes_, false, false),
        pairs_(call.inputs) {
    atoms_.layout(arena, call.inputs, sizes_, schedule.largest_small);
    for (T** x : {&highest_, &total_}) *x = arena.take<T>(sizes_.heads_per_group * kRows);
    weighted_ = arena.take<T>(sizes_.heads_per_group * kRows * sizes_.width);
  }

  void run(const Job& job) {
    if (job.group != current_) {
      group_ = group_of(job.group, schedule_, call_.inputs.num_heads);
      score_.select(group_, nullptr);
      current_ = job.group;
    }
    for (int64_t n = job.first_item; n < job.last_item; ++n) {
      const Item& item = schedule_.items[n];
      const Molecule& m = schedule_.molecules[item.molecule];
      if (m.large < 0) {
        atoms_.pack(call_.inputs, m, group_);
        if (const Molecule* next = next_small(schedule_, job, n)) {
          Atoms<T>::prefetch(call_.inputs, *next, group_);
        }
        run_tiles(atoms_, 0, m.count);
      } else {
        run_tiles(large_[m.large * schedule_.num_groups + job.group], m.chunk_begin(item.rows),
                  m.chunk_begin(item.rows + 1));
      }
    }
  }

 private:
  using V = Vec<T>;
  static constexpr int W = kWidth<T>;

  void run_tiles(const Atoms<T>& atoms, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kRows) {
      const Tile tile = tile_at<T>(i, end);
      score_.begin_tile(atoms, tile);
      const int64_t count = atoms.molecule->count;
      for (int64_t j = 0; j < count; j += kKeys) {
        const Block block{tile, j, count - j < kKeys ? count - j : kKeys};
        pairs_.compute(atoms, block, 0);
        score_.begin_block(pairs_, block, false);
        for (int64_t h = 0; h < group_.count; ++h) add_block(atoms, block, h);
      }
      for (int64_t h = 0; h < group_.count; ++h) store_rows(atoms, tile, h);
    }
  }

  void add_block(const Atoms<T>& atoms, const Block& block, int64_t h) {
    T* s = score_.scores(h);  // [J, I]
    const bool is_first = block.first == 0;
    T* out = weighted_ + h * kRows * sizes_.width;
    for (int64_t n = 0; n < block.tile.vectors; ++n) {
      if constexpr (Normalizer::kIsLinear) {
        V sum = is_first ? V{} : load<V>(total(h, n));
        for (int64_t j = 0; j < block.keys; ++j) sum += load<V>(s + j * kRows + n * W);
        store(total(h, n), sum);
      } else {
        normalize(s + n * W, block, is_first, h, n, out);
      }
    }
    // O [I, width] += P^T [I, J] v [J, width]
    const auto product = [&](auto into) {
      matmul<Stored::kColumns, into.value>(block.tile.rows, sizes_.chunks, block.keys, s, kRows,
                                           atoms.v.at(h, block.first), atoms.v.stride, out,
                                           sizes_.width);
    };
    if (is_first) {
      product(std::integral_constant<Into, Into::kSet>{});
    } else {
      product(std::integral_constant<Into, Into::kAdd>{});
    }
  }

  // exp(S - m) in the place of S, a vector of rows i.
  void normalize(T* s, const Block& block, bool is_first, int64_t h, int64_t n, T* out) {
    V highest = load<V>(s);
    for (int64_t j = 1; j < block.keys; ++j) highest = larger(load<V>(s + j * kRows), highest);
    V sum{};
    if (!is_first) {
      const V before = load<V>(highest_ + h * kRows + n * W);
      highest = larger(before, highest);
      const V factor = exp_of(before - highest);
      sum = load<V>(total(h, n)) * factor;
      for (int i = 0; i < W && n * W + i < block.tile.rows; ++i) {
        T* row = out + (n * W + i) * sizes_.width;
        for (int64_t d = 0; d < sizes_.width; d += W) store(row + d, load<V>(row + d) * factor[i]);
      }
    }
    for (int64_t j = 0; j < block.keys; ++j) {
      const V p = exp_of(load<V>(s + j * kRows) - highest);
      store(s + j * kRows, p);
      sum += p;
    }
    store(highest_ + h * kRows + n * W, highest);
    store(total(h, n), sum);
  }

  void store_rows(const Atoms<T>& atoms, const Tile& tile, int64_t h) {
    alignas(64) T row[kRows], factor[kRows];
    for (int64_t n = 0; n < tile.vectors; ++n) {
      const V sum = load<V>(total(h, n));
      if constexpr (Normalizer::kIsLinear) {
        store(row + n * W, sum);
      } else {
        store(row + n * W, load<V>(highest_ + h * kRows + n * W) + log_of(sum));
        store(factor + n * W, 1 / sum);
      }
    }
    const Molecule& m = *atoms.molecule;
    const int64_t head = group_.first + h, D = sizes_.head_dim;
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t atom = m.atoms[tile.first + i];
      call_.row[(m.first_row + atom) * call_.inputs.num_heads + head] = row[i];
      T* to = call_.out.at(m.batch, atom, head);
      const T* from = weighted_ + (h * kRows + i) * sizes_.width;
      const T times = Normalizer::kIsLinear ? T(1) : factor[i];
      copy_unpadded<W>(to, from, D, times);
    }
  }

  T* total(int64_t h, int64_t n) const { return total_ + h * kRows + n * W; }

  const ForwardCall<T>& call_;
  const Schedule& schedule_;
  Atoms<T>* const& large_;  // of molecules that several jobs share, [large, group]
  const Sizes<T> sizes_;
  Score score_;
  Pairs<T> pairs_;
  Atoms<T> atoms_;
  T *highest_, *total_, *weighted_;  // m and l [h, I], the sum of P v [h, I, width]
  Group group_{};
  int64_t current_ = -1;
};

template <class T>
void attention_fwd_of(const ForwardCall<T>& call, const Schedule& schedule) {
  const Inputs<T>& inputs = call.inputs;
  Arena arena(Arena::kCall);
  Atoms<T>* large = arena.take<Atoms<T>>(schedule.num_large * schedule.num_groups);
  const Sizes<T> sizes(inputs, schedule);
  for_each_large(schedule, [&](const Molecule& m, int64_t, int64_t at) {
    new (large + at) Atoms<T>();
    large[at].layout(arena, inputs, sizes, m.count);
  });
  for_each_large(call.run_threads, schedule, [&](const Molecule& m, int64_t group, int64_t at) {
    large[at].pack(inputs, m, group_of(group, schedule, inputs.num_heads));
  });
  for_variant<T>(inputs, [&](auto score, auto normalizer) {
    using Score = typename decltype(score)::type;
    run_jobs<ForwardWorker<T, Score, decltype(normalizer)>>(call, schedule, large);
  });
  zero_padding(call.out, schedule, inputs.num_heads, inputs.head_dim);
  zero_padding(call.row, schedule, inputs.num_heads);
}

}  // namespace

void attention_fwd(const ForwardCall<float>& call, const Schedule& schedule) {
  attention_fwd_of(call, schedule);
}
void attention_fwd(const ForwardCall<double>& call, const Schedule& schedule) {
  attention_fwd_of(call, schedule);
}

}  // namespace geot::cpu::GEOT_ISA
