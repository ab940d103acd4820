// The second backward pass of features GEOT_TYPE, float or double: a .cu file for each compiles
// this.
#include "launch.cuh"
#include "second_backward.cuh"

namespace geot::cuda {

template <>
const char* attention_bwd_bwd<GEOT_TYPE>(SecondBackwardCall& call, Where where, int* parts) {
  using T = GEOT_TYPE;
  const bool needs_keys =
      call.grad_k.data != nullptr || call.grad_v.data != nullptr || call.grad_positions != nullptr;
  if (call.in.is_filter)
    return launch_sweeps<SecondBackward, Filter<T>>(call, where, needs_keys, parts);
  if constexpr (sizeof(T) == 8) {
    return launch_sweeps<SecondBackward, Bias<T, 0, 2>>(call, where, needs_keys, parts);
  } else {
    if (call.in.head_dim <= 32)
      return launch_sweeps<SecondBackward, Bias<T, 32, 4>>(call, where, needs_keys, parts);
    if (call.in.head_dim <= 64)
      return launch_sweeps<SecondBackward, Bias<T, 64, 4>>(call, where, needs_keys, parts);
    return launch_sweeps<SecondBackward, Bias<T, 0, 4>>(call, where, needs_keys, parts);
  }
}

}  // namespace geot::cuda
