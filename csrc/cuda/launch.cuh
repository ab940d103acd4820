// How a pass is divided into blocks, and the choice of its kernel.
#pragma once

#include "call.h"
#include "fragment.cuh"
#include "platform.cuh"

namespace geot::cuda {

constexpr int64_t kBlocksOfMultiprocessor = 16;

// Plans and launches: as many warps as there are rows for; in shared memory what fits; whole
// molecules where a multiprocessor has room for two of them.
template <class Kernel>
const char* launch_planned(typename Kernel::Call& call, Where where) {
  const Inputs& in = call.in;
  if (in.num_heads == 0) return nullptr;
  const int64_t limit = shared_limit(where.device);
  const int64_t blocks = chunks(in.num_molecules, in.num_atoms, in.num_heads, where.device);
  for (int warps = in.num_atoms <= 16   ? 1
                   : in.num_atoms <= 32 ? 2
                                        : kMaxWarps;
       warps > 0; warps /= 2) {
    const int64_t rows = kWarpRows * warps, row_tiles = (in.num_atoms + rows - 1) / rows;
    for (int choice = row_tiles <= 1 ? 0 : 1; choice < 4; ++choice) {
      const bool is_whole = choice == 0;
      call.plan = {warps, row_tiles, blocks, is_whole, choice <= 2, choice <= 1};
      Carver carver(reinterpret_cast<char*>(16));  // for the size alone
      Kernel::take(carver, call);
      if (carver.used() <= (is_whole ? limit / 2 : limit)) {
        return launch<Kernel>(blocks * in.num_heads, 32 * warps, carver.used(), where.stream, call);
      }
    }
  }
  return "a block needs more shared memory than this device has";
}

// A sweep by rows and, where it has not done whole molecules, one by keys, if anybody needs it.
// `parts`: how many of the gradient of positions they have written.
template <template <class, bool> class Sweep, class Score, class Call>
const char* launch_sweeps(Call& call, Where where, bool needs_keys, int* parts) {
  const char* error = launch_planned<Sweep<Score, false>>(call, where);
  *parts = 1;
  if (error != nullptr || call.plan.is_whole || !needs_keys) return error;
  *parts = 2;
  call.sums = {};
  return launch_planned<Sweep<Score, true>>(call, where);
}

// The passes of one type of features. Filters and the second backward pass are computed in float
// and double only.
template <class T>
const char* attention_fwd(ForwardCall& call, Where where);
template <class T>
const char* attention_bwd(BackwardCall& call, Where where, int* parts);
template <class T>
const char* attention_bwd_bwd(SecondBackwardCall& call, Where where, int* parts);
#define GEOT_DECLARE_PASSES(T)                                   \
  template <>                                                    \
  const char* attention_fwd<T>(ForwardCall & call, Where where); \
  template <>                                                    \
  const char* attention_bwd<T>(BackwardCall & call, Where where, int* parts);
GEOT_DECLARE_PASSES(float)
GEOT_DECLARE_PASSES(double)
GEOT_DECLARE_PASSES(Half)
GEOT_DECLARE_PASSES(BFloat16)
#undef GEOT_DECLARE_PASSES
template <>
const char* attention_bwd_bwd<float>(SecondBackwardCall& call, Where where, int* parts);
template <>
const char* attention_bwd_bwd<double>(SecondBackwardCall& call, Where where, int* parts);

}  // namespace geot::cuda
