// The first backward pass of features GEOT_TYPE: a .cu file for each type compiles this.
#include "backward.cuh"
#include "launch.cuh"

namespace geot::cuda {

template <>
const char* attention_bwd<GEOT_TYPE>(BackwardCall& call, Where where, int* parts) {
  using T = GEOT_TYPE;
  const bool needs_keys =
      call.dk.data != nullptr || call.dv.data != nullptr || call.d_positions != nullptr;
  if constexpr (!kIs16Bit<T>) {
    if (call.in.is_filter)
      return launch_sweeps<Backward, Filter<T>>(call, where, needs_keys, parts);
  }
  if constexpr (sizeof(T) == 8) {
    return launch_sweeps<Backward, Bias<T, 0, 4>>(call, where, needs_keys, parts);
  } else {
    if (call.in.head_dim <= 32)
      return launch_sweeps<Backward, Bias<T, 32, 4>>(call, where, needs_keys, parts);
    if (call.in.head_dim <= 64)
      return launch_sweeps<Backward, Bias<T, 64, 4>>(call, where, needs_keys, parts);
    return launch_sweeps<Backward, Bias<T, 128, 2>>(call, where, needs_keys, parts);
  }
}

}  // namespace geot::cuda
