// The forward pass of features GEOT_TYPE: a .cu file for each type compiles this.
#include "forward.cuh"
#include "launch.cuh"

namespace geot::cuda {

template <>
const char* attention_fwd<GEOT_TYPE>(ForwardCall& call, Where where) {
  using T = GEOT_TYPE;
  if constexpr (!kIs16Bit<T>) {
    if (call.in.is_filter) return launch_planned<Forward<Filter<T>>>(call, where);
  }
  if constexpr (sizeof(T) == 8) {
    return launch_planned<Forward<Bias<T, 0, 4>>>(call, where);
  } else {
    if (call.in.head_dim <= 32) return launch_planned<Forward<Bias<T, 32, 4>>>(call, where);
    if (call.in.head_dim <= 64) return launch_planned<Forward<Bias<T, 64, 4>>>(call, where);
    return launch_planned<Forward<Bias<T, 128, 4>>>(call, where);
  }
}

}  // namespace geot::cuda
