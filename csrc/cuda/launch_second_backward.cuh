// The second backward pass of features GEOT_TYPE, float or double: a .cu file for each compiles
// this.
#include "launch.cuh"
#include "second_backward.cuh"

namespace geot::cuda {
namespace {

template <class Score>
const char* launch_sweeps(SecondBackwardCall& call, Where where, int* parts) {
  const char* error = launch_planned<SecondBackward<Score, false>>(call, where);
  const bool is_needed =
      call.grad_k.data != nullptr || call.grad_v.data != nullptr || call.grad_positions != nullptr;
  *parts = 1;
  if (error != nullptr || call.plan.is_whole || !is_needed) return error;
  *parts = 2;
  call.sums = {};
  return launch_planned<SecondBackward<Score, true>>(call, where);
}

}  // namespace

template <>
const char* attention_bwd_bwd<GEOT_TYPE>(SecondBackwardCall& call, Where where, int* parts) {
  using T = GEOT_TYPE;
  if (call.in.is_filter) return launch_sweeps<Filter<T>>(call, where, parts);
  if constexpr (sizeof(T) == 8) {
    return launch_sweeps<Bias<T, 0, 2>>(call, where, parts);
  } else {
    if (call.in.head_dim <= 32) return launch_sweeps<Bias<T, 32, 4>>(call, where, parts);
    if (call.in.head_dim <= 64) return launch_sweeps<Bias<T, 64, 4>>(call, where, parts);
    return launch_sweeps<Bias<T, 0, 4>>(call, where, parts);
  }
}

}  // namespace geot::cuda
