// The three passes as operators geot_cuda::*, through libtorch's stable ABI: from tensors to what
// the launchers take. Results are written into tensors that the caller has made.
//
// Arguments have been checked. Features have channels side by side, in any other strides; all else
// is contiguous. The stream is an argument: libtorch's way to ask for it
// would keep the library from loading beside a torch without CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "call.h"

#if !defined(GEOT_CUDA_OPERATORS)
#define GEOT_CUDA_OPERATORS geot_cuda
#endif

namespace geot::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T = void>
T* data_of(const OptionalTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}
Rows rows_of(const OptionalTensor& x) {
  if (!x) return {};
  const int64_t n = x->dim() - 3;
  return {x->data_ptr(), n == 0 ? 0 : x->stride(0), x->stride(n), x->stride(n + 1)};
}

DType dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      return DType::kBFloat16;
  }
}

#define GEOT_INPUTS                                                                        \
  const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &positions,              \
      const Tensor &radial, const OptionalTensor &affine, const OptionalTensor &mask,      \
      const OptionalTensor &ptr, const OptionalTensor &types, const OptionalTensor &pairs, \
      int64_t max_atoms, double r_min, double r_max, double scale, bool is_filter, bool is_linear
#define GEOT_INPUT_NAMES                                                                       \
  q, k, v, positions, radial, affine, mask, ptr, types, pairs, max_atoms, r_min, r_max, scale, \
      is_filter, is_linear

Inputs inputs_of(GEOT_INPUTS) {
  const int64_t n = q.dim() - 3;
  Inputs in{};
  in.dtype = dtype_of(q);
  in.num_molecules = ptr ? ptr->size(0) - 1 : q.size(0);
  in.num_rows = ptr ? q.size(0) : q.size(0) * q.size(1);
  in.num_atoms = max_atoms;
  in.num_heads = q.size(n + 1);
  in.head_dim = q.size(n + 2);
  in.q = rows_of(q);
  in.k = rows_of(k);
  in.v = rows_of(v);
  in.positions = positions.data_ptr();
  in.radial = radial.data_ptr();
  in.affine = data_of(affine);
  in.mask = data_of<const bool>(mask);
  in.ptr = data_of<const int64_t>(ptr);
  in.types = pairs ? data_of<const int64_t>(types) : nullptr;
  in.pairs = types ? data_of<const int64_t>(pairs) : nullptr;
  if (radial.dim() == 4) {
    in.num_tables = radial.size(0);
    in.num_knots = radial.size(1);
    in.num_channels = radial.size(3);
  } else {
    in.num_gaussians = radial.size(1);
    in.num_channels = radial.size(0) - 2;
  }
  in.num_types = pairs ? pairs->size(0) : 0;
  in.num_affine = affine ? affine->size(0) : 0;
  in.r_min = r_min;
  in.r_max = r_max;
  in.scale = scale;
  in.is_filter = is_filter;
  in.is_linear = is_linear;
  return in;
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "geot_cuda: ", error); }

Sums sums_of(const OptionalTensor& knots, const OptionalTensor& affine,
             const OptionalTensor& quantum, const OptionalTensor& moments) {
  return {data_of<unsigned long long>(knots), data_of<unsigned long long>(affine),
          data_of<const double>(quantum), data_of(moments)};
}

void attention(GEOT_INPUTS, const Tensor& out, const Tensor& row, int64_t device, int64_t stream) {
  check(launch_attention_fwd({inputs_of(GEOT_INPUT_NAMES), {}, rows_of(out), row.data_ptr()},
                             {int(device), stream}));
}

// Returns how many parts of d_positions have been written.
int64_t attention_bwd(GEOT_INPUTS, const Tensor& d_out, const OptionalTensor& d_row,
                      const Tensor& row, const OptionalTensor& dq, const OptionalTensor& dk,
                      const OptionalTensor& dv, const OptionalTensor& d_positions,
                      const Tensor& numbers, const OptionalTensor& knot_sums,
                      const OptionalTensor& affine_sums, const OptionalTensor& quantum,
                      const OptionalTensor& moments, int64_t device, int64_t stream) {
  BackwardCall call{};
  call.in = inputs_of(GEOT_INPUT_NAMES);
  call.d_out = rows_of(d_out);
  call.d_row = data_of(d_row);
  call.row = row.data_ptr();
  call.dq = rows_of(dq);
  call.dk = rows_of(dk);
  call.dv = rows_of(dv);
  call.d_positions = data_of(d_positions);
  call.numbers = numbers.data_ptr();
  call.sums = sums_of(knot_sums, affine_sums, quantum, moments);
  int parts = 0;
  check(launch_attention_bwd(call, {int(device), stream}, &parts));
  return parts;
}

int64_t attention_bwd_bwd(GEOT_INPUTS, const OptionalTensor& q_dot, const OptionalTensor& k_dot,
                          const OptionalTensor& v_dot, const OptionalTensor& x_dot,
                          const OptionalTensor& radial_dot, const OptionalTensor& affine_dot,
                          const Tensor& d_out, const OptionalTensor& d_row, const Tensor& out,
                          const Tensor& row, const OptionalTensor& grad_d_out,
                          const OptionalTensor& grad_d_row, const OptionalTensor& grad_q,
                          const OptionalTensor& grad_k, const OptionalTensor& grad_v,
                          const OptionalTensor& grad_positions, const Tensor& numbers,
                          const OptionalTensor& knot_sums, const OptionalTensor& affine_sums,
                          const OptionalTensor& quantum, int64_t device, int64_t stream) {
  SecondBackwardCall call{};
  call.in = inputs_of(GEOT_INPUT_NAMES);
  call.q_dot = rows_of(q_dot);
  call.k_dot = rows_of(k_dot);
  call.v_dot = rows_of(v_dot);
  call.x_dot = data_of(x_dot);
  call.radial_dot = data_of(radial_dot);
  call.affine_dot = data_of(affine_dot);
  call.d_out = rows_of(d_out);
  call.d_row = data_of(d_row);
  call.out = rows_of(out);
  call.row = row.data_ptr();
  call.grad_d_out = rows_of(grad_d_out);
  call.grad_d_row = data_of(grad_d_row);
  call.grad_q = rows_of(grad_q);
  call.grad_k = rows_of(grad_k);
  call.grad_v = rows_of(grad_v);
  call.grad_positions = data_of(grad_positions);
  call.numbers = numbers.data_ptr();
  call.sums = sums_of(knot_sums, affine_sums, quantum, std::nullopt);
  int parts = 0;
  check(launch_attention_bwd_bwd(call, {int(device), stream}, &parts));
  return parts;
}

void bounds(GEOT_INPUTS, const Tensor& d_out, const OptionalTensor& d_row,
            const OptionalTensor& q_dot, const OptionalTensor& k_dot, const OptionalTensor& v_dot,
            const OptionalTensor& x_dot, const Tensor& row, const OptionalTensor& radial_bounds,
            bool is_second, const Tensor& norms, const Tensor& quantum, int64_t device,
            int64_t stream) {
  BoundsCall call{};
  call.in = inputs_of(GEOT_INPUT_NAMES);
  call.d_out = rows_of(d_out);
  call.q_dot = rows_of(q_dot);
  call.k_dot = rows_of(k_dot);
  call.v_dot = rows_of(v_dot);
  call.d_row = data_of(d_row);
  call.x_dot = data_of(x_dot);
  call.row = is_linear ? nullptr : row.data_ptr();
  call.norms = static_cast<unsigned long long*>(norms.data_ptr());
  call.radial = data_of<const double>(radial_bounds);
  call.is_second = is_second;
  call.quantum = static_cast<double*>(quantum.data_ptr());
  check(launch_bounds(call, {int(device), stream}));
}

}  // namespace
}  // namespace geot::cuda

#define GEOT_INPUT_SCHEMA                                                                         \
  "Tensor q, Tensor k, Tensor v, Tensor positions, Tensor radial, Tensor? affine, Tensor? mask, " \
  "Tensor? ptr, Tensor? types, Tensor? pairs, int max_atoms, float r_min, float r_max, "          \
  "float scale, bool is_filter, bool is_linear, "

STABLE_TORCH_LIBRARY(GEOT_CUDA_OPERATORS, m) {
  m.def("attention(" GEOT_INPUT_SCHEMA
        "Tensor(a!) out, Tensor(b!) row, int device, int stream) -> ()");
  m.def("attention_bwd(" GEOT_INPUT_SCHEMA
        "Tensor d_out, Tensor? d_row, Tensor row, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, "
        "Tensor(d!)? d_positions, Tensor(e!) numbers, Tensor(f!)? knot_sums, "
        "Tensor(g!)? affine_sums, Tensor? quantum, Tensor(h!)? moments, int device, int stream) "
        "-> int");
  m.def("attention_bwd_bwd(" GEOT_INPUT_SCHEMA
        "Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, Tensor? x_dot, Tensor? radial_dot, "
        "Tensor? affine_dot, Tensor d_out, Tensor? d_row, Tensor out, Tensor row, "
        "Tensor(a!)? grad_d_out, Tensor(b!)? grad_d_row, Tensor(c!)? grad_q, Tensor(d!)? grad_k, "
        "Tensor(e!)? grad_v, Tensor(f!)? grad_positions, Tensor(g!) numbers, "
        "Tensor(h!)? knot_sums, Tensor(i!)? affine_sums, Tensor? quantum, int device, int stream) "
        "-> int");
  m.def("bounds(" GEOT_INPUT_SCHEMA
        "Tensor d_out, Tensor? d_row, Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, Tensor? x_dot, "
        "Tensor row, Tensor? radial_bounds, bool is_second, Tensor(a!) norms, Tensor(b!) quantum, "
        "int device, "
        "int stream) -> ()");
  m.def("shared_memory(int device) -> int");
  m.def("chunks(int num_molecules, int max_atoms, int num_heads, int device) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(GEOT_CUDA_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("attention", TORCH_BOX(&geot::cuda::attention));
  m.impl("attention_bwd", TORCH_BOX(&geot::cuda::attention_bwd));
  m.impl("attention_bwd_bwd", TORCH_BOX(&geot::cuda::attention_bwd_bwd));
  m.impl("bounds", TORCH_BOX(&geot::cuda::bounds));
  m.impl("shared_memory", TORCH_BOX(&geot::cuda::shared_memory));
  m.impl("chunks", TORCH_BOX(&geot::cuda::chunks));
}
