// What the sweeps of both backward passes share: going through the items of a block, and what is
// stored of each row beside features.
#pragma once

#include "../common/normalizer.h"
#include "bias.cuh"
#include "filter.cuh"

namespace geot::cuda {

// What E and P of a row need: E = P (A - δ), P = exp(S - L) / Σ exp(S - L). The second backward
// pass has two more.
template <class F>
struct RowNumbers {
  F log_sum, per_total, delta, rho, epsilon;
};

template <class Sweep>
GEOT_DEVICE void run_sweep(const typename Sweep::Call& call, const void* radial_dot, char* shared) {
  using F = typename Sweep::F;
  const Work work(call.in, call.plan);
  Carver carver(shared);
  const typename Sweep::Memory memory = Sweep::take(carver, call);
  const typename Sweep::Score score(work, memory.score, radial_dot, &call.sums);
  const AffineSums<F> affine(call.in, call.sums, memory.affine);
  for (int64_t item = work.first_item(); item < work.num_items(); item += call.plan.chunks) {
    const Molecule m = work.molecule(item, memory.reach);
    const int first = work.first_row(item);
    if (first < m.count) Sweep::sweep(call, work, memory, score, affine, m, first);
  }
  if (has_sums(call.sums) || affine) {
    GEOT_SYNC_BLOCK();  // who adds to them
    if (has_sums(call.sums)) score.finish(work, call.sums);
    affine.finish();
  }
}

// Stores what a sweep by keys has to know of rows, and this sweep's part of the gradient of
// positions, where there is one.
template <bool kByKeys, class F, class Call>
GEOT_DEVICE void store_rows(const Call& call, void* d_positions, const Work& work,
                            const Molecule& m, int first, const RowNumbers<F> (&numbers)[2],
                            const Vector3<F> (&force_on)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = first + row_of(2 * half);
    const int64_t row = work.head * call.in.num_rows + m.first + i;
    const bool writes = lane() % 4 == 0 && i < m.count;
    if (!kByKeys && !call.plan.is_whole && writes) {
      static_cast<RowNumbers<F>*>(call.numbers)[row] = numbers[half];
    }
    if (d_positions != nullptr) {
      const F x = sum_of_row(force_on[half].x), y = sum_of_row(force_on[half].y),
              z = sum_of_row(force_on[half].z);
      if (writes) {
        const int64_t part = kByKeys ? call.in.num_heads * call.in.num_rows : 0;
        F* to = static_cast<F*>(d_positions) + 3 * (part + row);
        const bool is_real = m.real(i);
        to[0] = is_real ? x : F(0);
        to[1] = is_real ? y : F(0);
        to[2] = is_real ? z : F(0);
      }
    }
  }
}

}  // namespace geot::cuda
