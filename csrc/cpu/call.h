// What the three passes are called with. No torch, no SIMD: every instruction set sees the same.
#pragma once

#include <cstdint>

namespace geot::cpu {

struct Schedule;

// A tensor [B, N, H, D] of any strides but the last, which is 1. Packed rows [T, H, D] are B = 1.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride_b = 0, stride_n = 0, stride_h = 0;

  explicit operator bool() const { return data != nullptr; }
  T* at(int64_t b, int64_t n, int64_t h) const {
    return data + b * stride_b + n * stride_n + h * stride_h;
  }
};

// The knots of a table [P, num_knots, 2, C], or Gaussians [2 + C, num_gaussians].
template <class T>
struct Radial {
  const T* data = nullptr;
  int64_t num_tables = 1, num_knots = 0, num_gaussians = 0;
  double r_min = 0, r_max = 0;
};

template <class T>
struct Inputs {
  int64_t num_molecules, num_rows;  // num_rows: B N, or T when packed
  int64_t num_atoms;                // N of the padded layout
  int64_t num_heads, head_dim;
  Rows<const T> q, k, v;
  const T* positions;  // [num_rows, 3]
  Radial<T> radial;
  const T* affine;  // [num_affine, 2] or null
  int64_t num_affine;
  const bool* mask;           // [B, N] or null
  const int64_t* ptr;         // [B + 1] or null
  const int64_t* atom_types;  // [num_rows] or null
  const int64_t* pair_index;  // [num_types, num_types] or null
  int64_t num_types;
  double scale;
  bool is_filter, is_linear;

  int64_t num_channels() const { return is_filter ? num_heads * head_dim : num_heads; }
  bool is_table() const { return radial.num_gaussians == 0; }
};

// Calls body(context) once in each of at most `most` threads, all at the same time.
using RunThreads = void (*)(int64_t most, void (*body)(void*), void* context);

// Results are written everywhere, 0 on padded rows. A null result is not computed.
template <class T>
struct ForwardCall {
  Inputs<T> inputs;
  Rows<T> out;
  T* row;  // [num_rows, H]
  RunThreads run_threads;
};

template <class T>
struct BackwardCall {
  Inputs<T> inputs;
  Rows<const T> d_out;  // may be absent
  const T* d_row;       // [num_rows, H], linear only; may be null
  Rows<const T> out;    // softmax only
  const T* row;         // softmax only
  Rows<T> dq, dk, dv;
  T* d_positions;  // [num_rows, 3]
  T* d_radial;     // like radial.data
  T* d_affine;     // like affine
  RunThreads run_threads;
};

// Dotted are the tangents, each may be absent; the results are the gradients of <dO, Ȯ> + <dr, ṙ>.
template <class T>
struct SecondBackwardCall {
  Inputs<T> inputs;
  Rows<const T> q_dot, k_dot, v_dot;
  const T* x_dot;
  const T* radial_dot;
  const T* affine_dot;
  Rows<const T> d_out;
  const T* d_row;
  Rows<const T> out;
  const T* row;
  Rows<T> grad_d_out;
  T* grad_d_row;
  Rows<T> grad_q, grad_k, grad_v;
  T* grad_positions;
  T* grad_radial;
  T* grad_affine;
  RunThreads run_threads;
};

// The passes of one instruction set, in its namespace.
#define GEOT_DECLARE_PASSES(isa)                                              \
  namespace isa {                                                             \
  void attention_fwd(const ForwardCall<float>&, const Schedule&);             \
  void attention_fwd(const ForwardCall<double>&, const Schedule&);            \
  void attention_bwd(const BackwardCall<float>&, const Schedule&);            \
  void attention_bwd(const BackwardCall<double>&, const Schedule&);           \
  void attention_bwd_bwd(const SecondBackwardCall<float>&, const Schedule&);  \
  void attention_bwd_bwd(const SecondBackwardCall<double>&, const Schedule&); \
  }

}  // namespace geot::cpu
