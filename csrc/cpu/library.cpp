// The three passes as operators geot_cpu::*, through libtorch's stable ABI: reads tensors, makes
// results, plans, and calls the kernels of the best instruction set that this processor has.
//
// Arguments have been checked. Features may have any strides; results are contiguous.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "plan.h"

namespace geot::cpu {

GEOT_DECLARE_PASSES(baseline)
#if defined(GEOT_HAS_AVX2)
GEOT_DECLARE_PASSES(avx2)
#endif
#if defined(GEOT_HAS_AVX512)
GEOT_DECLARE_PASSES(avx512)
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// 0 baseline, 1 AVX2, 2 AVX-512: the best that this processor has.
int best_isa() {
  int best = 0;
#if defined(GEOT_HAS_AVX512)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  best = avx2 ? (avx512 ? 2 : 1) : 0;
#endif
  return best;
}
int chosen_isa = best_isa();

#if defined(GEOT_HAS_AVX512)
#define GEOT_DISPATCH(pass, Call)                                \
  template <class T>                                             \
  void dispatch(const Call<T>& call, const Schedule& schedule) { \
    if (chosen_isa == 2) return avx512::pass(call, schedule);    \
    if (chosen_isa == 1) return avx2::pass(call, schedule);      \
    baseline::pass(call, schedule);                              \
  }
#else
#define GEOT_DISPATCH(pass, Call)                                \
  template <class T>                                             \
  void dispatch(const Call<T>& call, const Schedule& schedule) { \
    baseline::pass(call, schedule);                              \
  }
#endif
GEOT_DISPATCH(attention_fwd, ForwardCall)
GEOT_DISPATCH(attention_bwd, BackwardCall)
GEOT_DISPATCH(attention_bwd_bwd, SecondBackwardCall)

// In the threads of torch, which torch.set_num_threads counts.
void run_threads(int64_t most, void (*body)(void*), void* context) {
  const int64_t threads = std::min<int64_t>(most, torch::stable::get_num_threads());
  if (threads <= 1) return body(context);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context);
  });
}

Tensor with_packed_channels(const Tensor& x) {
  const bool fine = x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1;
  return fine ? x : torch::stable::contiguous(x);
}
Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}
// Asks for large pages: fresh memory comes 4 KiB at a time, a microsecond each, which for a result
// of a few MB is longer than the kernels take.
void ask_for_large_pages([[maybe_unused]] const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLarge = 1 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + kPage - 1) / kPage * kPage;
  const uintptr_t size = x.numel() * x.element_size() / kPage * kPage;
  if (size >= kLarge) madvise(reinterpret_cast<void*>(begin), size - kPage, MADV_HUGEPAGE);
#endif
}
Tensor empty(std::vector<int64_t> sizes, const Tensor& like) {
  Tensor x = torch::stable::new_empty(like, sizes);
  ask_for_large_pages(x);
  return x;
}
Tensor new_like(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return empty(sizes, x);
}

template <class T>
T* data_of(const OptionalTensor& x) {
  return x ? const_cast<T*>(static_cast<const T*>(x->data_ptr())) : nullptr;
}
template <class T>
Rows<T> rows_of(const OptionalTensor& x) {
  if (!x) return {};
  const int64_t n = x->dim() - 3;
  return {data_of<T>(x), n == 0 ? 0 : x->stride(0), x->stride(n), x->stride(n + 1)};
}

// The tensors of `Inputs`, held as long as the call runs.
struct Arguments {
  Tensor q, k, v, positions, radial;
  OptionalTensor affine, mask, ptr, atom_types, pair_index;
  double r_min, r_max, scale;
  bool is_filter, is_linear;

  void settle() {
    for (Tensor* x : {&q, &k, &v}) *x = with_packed_channels(*x);
    for (Tensor* x : {&positions, &radial}) *x = as_contiguous(*x);
    for (OptionalTensor* x : {&affine, &mask, &ptr, &atom_types, &pair_index}) {
      if (*x) *x = as_contiguous(**x);
    }
  }

  template <class T>
  Inputs<T> inputs() const {
    const int64_t n = q.dim() - 3;
    Inputs<T> in{};
    in.num_molecules = ptr ? ptr->size(0) - 1 : q.size(0);
    in.num_atoms = q.size(n);
    in.num_rows = ptr ? q.size(0) : q.size(0) * q.size(1);
    in.num_heads = q.size(n + 1);
    in.head_dim = q.size(n + 2);
    in.q = rows_of<const T>(q);
    in.k = rows_of<const T>(k);
    in.v = rows_of<const T>(v);
    in.positions = static_cast<const T*>(positions.data_ptr());
    in.radial.data = static_cast<const T*>(radial.data_ptr());
    in.radial.r_min = r_min;
    in.radial.r_max = r_max;
    if (radial.dim() == 4) {
      in.radial.num_tables = radial.size(0);
      in.radial.num_knots = radial.size(1);
    } else {
      in.radial.num_gaussians = radial.size(1);
    }
    in.affine = data_of<const T>(affine);
    in.num_affine = affine ? affine->size(0) : 0;
    in.mask = data_of<const bool>(mask);
    in.ptr = data_of<const int64_t>(ptr);
    in.atom_types = data_of<const int64_t>(atom_types);
    in.pair_index = atom_types ? data_of<const int64_t>(pair_index) : nullptr;
    in.num_types = pair_index ? pair_index->size(0) : 0;
    in.scale = scale;
    in.is_filter = is_filter;
    in.is_linear = is_linear;
    return in;
  }
};

// The gradients that the bits of `needs` ask for.
struct Results {
  int64_t needs;
  std::vector<Tensor> tensors;

  explicit Results(int64_t bits) : needs(bits) {}
  OptionalTensor add(int bit, const OptionalTensor& like) {
    if (!(needs >> bit & 1) || !like) return std::nullopt;
    tensors.push_back(new_like(*like));
    return tensors.back();
  }
};

template <class Body>
void by_dtype(const Tensor& q, Body body) {
  q.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor radial,
                                     OptionalTensor affine, OptionalTensor mask, OptionalTensor ptr,
                                     OptionalTensor atom_types, OptionalTensor pair_index,
                                     double r_min, double r_max, double scale, bool is_filter,
                                     bool is_linear) {
  Arguments arguments{q,          k,          v,     positions, radial, affine,    mask,     ptr,
                      atom_types, pair_index, r_min, r_max,     scale,  is_filter, is_linear};
  arguments.settle();
  Tensor out = new_like(q);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < q.dim(); ++i) sizes.push_back(q.size(i));
  Tensor row = empty(sizes, q);
  by_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    ForwardCall<T> call{arguments.inputs<T>(), rows_of<T>(out), static_cast<T*>(row.data_ptr()),
                        run_threads};
    const Plan plan(call.inputs, Pass::kForward, false);
    dispatch(call, plan.schedule());
  });
  return {out, row};
}

std::vector<Tensor> attention_bwd(OptionalTensor d_out, OptionalTensor d_row, Tensor out,
                                  Tensor row, Tensor q, Tensor k, Tensor v, Tensor positions,
                                  Tensor radial, OptionalTensor affine, OptionalTensor mask,
                                  OptionalTensor ptr, OptionalTensor atom_types,
                                  OptionalTensor pair_index, double r_min, double r_max,
                                  double scale, bool is_filter, bool is_linear, int64_t needs) {
  Arguments arguments{q,          k,          v,     positions, radial, affine,    mask,     ptr,
                      atom_types, pair_index, r_min, r_max,     scale,  is_filter, is_linear};
  arguments.settle();
  for (OptionalTensor* x : {&d_out, &d_row}) {
    if (*x) *x = as_contiguous(**x);
  }
  out = as_contiguous(out);
  row = as_contiguous(row);
  Results results(needs);
  const OptionalTensor dq = results.add(0, q), dk = results.add(1, k), dv = results.add(2, v),
                       d_positions = results.add(3, positions), d_radial = results.add(4, radial),
                       d_affine = results.add(5, affine);
  by_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    BackwardCall<T> call{};
    call.inputs = arguments.inputs<T>();
    call.d_out = rows_of<const T>(d_out);
    call.d_row = data_of<const T>(d_row);
    call.out = rows_of<const T>(out);
    call.row = data_of<const T>(row);
    call.dq = rows_of<T>(dq);
    call.dk = rows_of<T>(dk);
    call.dv = rows_of<T>(dv);
    call.d_positions = data_of<T>(d_positions);
    call.d_radial = data_of<T>(d_radial);
    call.d_affine = data_of<T>(d_affine);
    call.run_threads = run_threads;
    const Plan plan(call.inputs, Pass::kBackward, call.d_radial || call.d_affine);
    dispatch(call, plan.schedule());
  });
  return results.tensors;
}

std::vector<Tensor> attention_bwd_bwd(OptionalTensor q_dot, OptionalTensor k_dot,
                                      OptionalTensor v_dot, OptionalTensor positions_dot,
                                      OptionalTensor radial_dot, OptionalTensor affine_dot,
                                      OptionalTensor d_out, OptionalTensor d_row, Tensor out,
                                      Tensor row, Tensor q, Tensor k, Tensor v, Tensor positions,
                                      Tensor radial, OptionalTensor affine, OptionalTensor mask,
                                      OptionalTensor ptr, OptionalTensor atom_types,
                                      OptionalTensor pair_index, double r_min, double r_max,
                                      double scale, bool is_filter, bool is_linear, int64_t needs) {
  Arguments arguments{q,          k,          v,     positions, radial, affine,    mask,     ptr,
                      atom_types, pair_index, r_min, r_max,     scale,  is_filter, is_linear};
  arguments.settle();
  for (OptionalTensor* x :
       {&q_dot, &k_dot, &v_dot, &positions_dot, &radial_dot, &affine_dot, &d_out, &d_row}) {
    if (*x) *x = as_contiguous(**x);
  }
  out = as_contiguous(out);
  row = as_contiguous(row);
  Results results(needs);
  const OptionalTensor grad_d_out = results.add(0, q), grad_d_row = results.add(1, row),
                       grad_q = results.add(2, q), grad_k = results.add(3, k),
                       grad_v = results.add(4, v), grad_positions = results.add(5, positions),
                       grad_radial = results.add(6, radial), grad_affine = results.add(7, affine);
  by_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    SecondBackwardCall<T> call{};
    call.inputs = arguments.inputs<T>();
    call.q_dot = rows_of<const T>(q_dot);
    call.k_dot = rows_of<const T>(k_dot);
    call.v_dot = rows_of<const T>(v_dot);
    call.x_dot = data_of<const T>(positions_dot);
    call.radial_dot = data_of<const T>(radial_dot);
    call.affine_dot = data_of<const T>(affine_dot);
    call.d_out = rows_of<const T>(d_out);
    call.d_row = data_of<const T>(d_row);
    call.out = rows_of<const T>(out);
    call.row = data_of<const T>(row);
    call.grad_d_out = rows_of<T>(grad_d_out);
    call.grad_d_row = data_of<T>(grad_d_row);
    call.grad_q = rows_of<T>(grad_q);
    call.grad_k = rows_of<T>(grad_k);
    call.grad_v = rows_of<T>(grad_v);
    call.grad_positions = data_of<T>(grad_positions);
    call.grad_radial = data_of<T>(grad_radial);
    call.grad_affine = data_of<T>(grad_affine);
    call.run_threads = run_threads;
    const Plan plan(call.inputs, Pass::kSecondBackward, call.grad_radial || call.grad_affine);
    dispatch(call, plan.schedule());
  });
  return results.tensors;
}

// Lowers or restores the instruction set, for tests; returns the one in use.
int64_t set_isa(int64_t isa) {
  if (isa >= 0) chosen_isa = std::min<int>(int(isa), best_isa());
  return chosen_isa;
}

}  // namespace
}  // namespace geot::cpu

#define GEOT_INPUTS                                                                               \
  "Tensor q, Tensor k, Tensor v, Tensor positions, Tensor radial, Tensor? affine, Tensor? mask, " \
  "Tensor? ptr, Tensor? atom_types, Tensor? pair_index, float r_min, float r_max, float scale, "  \
  "bool is_filter, bool is_linear"

#define GEOT_PULLED "Tensor? d_out, Tensor? d_row, Tensor out, Tensor row"
#define GEOT_DOTTED                                                                          \
  "Tensor? q_dot, Tensor? k_dot, Tensor? v_dot, Tensor? positions_dot, Tensor? radial_dot, " \
  "Tensor? affine_dot"

STABLE_TORCH_LIBRARY(geot_cpu, m) {
  m.def("attention(" GEOT_INPUTS ") -> (Tensor, Tensor)");
  m.def("attention_bwd(" GEOT_PULLED ", " GEOT_INPUTS ", int needs) -> Tensor[]");
  m.def("attention_bwd_bwd(" GEOT_DOTTED ", " GEOT_PULLED ", " GEOT_INPUTS
        ", int needs) -> Tensor[]");
  m.def("set_isa(int isa) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(geot_cpu, CompositeExplicitAutograd, m) {
  m.impl("attention", TORCH_BOX(&geot::cpu::attention));
  m.impl("attention_bwd", TORCH_BOX(&geot::cpu::attention_bwd));
  m.impl("attention_bwd_bwd", TORCH_BOX(&geot::cpu::attention_bwd_bwd));
  m.impl("set_isa", TORCH_BOX(&geot::cpu::set_isa));
}
