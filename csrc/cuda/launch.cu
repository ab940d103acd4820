// The launchers: the choice of a type's kernels, and the bounds of integer sums.
#include "bounds.cuh"
#include "launch.cuh"

namespace geot::cuda {
namespace {

template <class T>
const char* bounds_of(const BoundsCall& call, Where where) {
  const int64_t most = kBlocksOfMultiprocessor * multiprocessors(where.device) + 1;
  const int64_t wanted = call.in.num_molecules * ((call.in.num_atoms + 31) / 32);
  const char* error =
      launch<Norms<T>>(most < wanted ? most : wanted, Norms<T>::kMaxThreads, 0, where.stream, call);
  if (error != nullptr) return error;
  return launch<Quantum<Compute<T>>>(1, 32, 0, where.stream, call);
}

}  // namespace

const char* launch_attention_fwd(ForwardCall call, Where where) {
  switch (call.in.dtype) {
    case DType::kFloat:
      return attention_fwd<float>(call, where);
    case DType::kDouble:
      return attention_fwd<double>(call, where);
    case DType::kHalf:
      return attention_fwd<Half>(call, where);
    default:
      return attention_fwd<BFloat16>(call, where);
  }
}

const char* launch_attention_bwd(BackwardCall call, Where where, int* parts) {
  switch (call.in.dtype) {
    case DType::kFloat:
      return attention_bwd<float>(call, where, parts);
    case DType::kDouble:
      return attention_bwd<double>(call, where, parts);
    case DType::kHalf:
      return attention_bwd<Half>(call, where, parts);
    default:
      return attention_bwd<BFloat16>(call, where, parts);
  }
}

const char* launch_attention_bwd_bwd(SecondBackwardCall call, Where where, int* parts) {
  return call.in.dtype == DType::kDouble ? attention_bwd_bwd<double>(call, where, parts)
                                         : attention_bwd_bwd<float>(call, where, parts);
}

const char* launch_bounds(const BoundsCall& call, Where where) {
  switch (call.in.dtype) {
    case DType::kFloat:
      return bounds_of<float>(call, where);
    case DType::kDouble:
      return bounds_of<double>(call, where);
    case DType::kHalf:
      return bounds_of<Half>(call, where);
    default:
      return bounds_of<BFloat16>(call, where);
  }
}

int64_t shared_memory(int64_t device) { return shared_limit(int(device)); }

// Enough blocks to fill the device; each takes molecule after molecule, and loads its table once.
int64_t chunks(int64_t num_molecules, int64_t max_atoms, int64_t num_heads, int64_t device) {
  const int64_t most = num_molecules * ((max_atoms + 63) / 64),
                heads = num_heads < 1 ? 1 : num_heads;
  const int64_t wanted =
      (kBlocksOfMultiprocessor * multiprocessors(int(device)) + heads - 1) / heads;
  return most < 1 ? 1 : most < wanted ? most : wanted;
}

}  // namespace geot::cuda
