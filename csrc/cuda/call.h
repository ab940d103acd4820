// What the kernels are called with, and the launchers. No torch, no CUDA: operators and kernels see
// the same. All pointers are of the device; numbers are of the type that `dtype` says.
#pragma once

#include <cstddef>
#include <cstdint>

namespace geot::cuda {

enum class DType : int { kFloat, kDouble, kHalf, kBFloat16 };

// A tensor [B, N, H, D] of any strides but the last, which is 1; results are contiguous. Packed
// rows [T, H, D] are B = 1.
struct Rows {
  void* data;
  int64_t stride_b, stride_n, stride_h;
};

// Positions, the radial function, and sums are double where features are, else float.
struct Inputs {
  DType dtype;
  int64_t num_molecules, num_rows;  // num_rows: B N, or T when packed
  int64_t num_atoms;                // N of the padded layout, or the largest packed molecule
  int64_t num_heads, head_dim;
  Rows q, k, v;
  const void* positions;  // [num_rows, 3]
  const void* radial;     // knots [P, num_knots, 2, C], or Gaussians [2 + C, num_gaussians]
  const void* affine;     // [P', 2] or null
  const bool* mask;       // [B, N] or null
  const int64_t* ptr;     // [B + 1] or null
  const int64_t* types;   // [num_rows] or null
  const int64_t* pairs;   // [num_types, num_types] or null
  int64_t num_tables, num_knots, num_gaussians, num_channels, num_types, num_affine;
  double r_min, r_max, scale;
  bool is_filter, is_linear;
};

// How the work is divided (see work.cuh), and what has a place in shared memory.
struct Plan {
  int warps;          // of a block; each takes 16 rows
  int64_t row_tiles;  // of the largest molecule
  int64_t chunks;     // blocks of a head
  bool is_whole;      // a block has all rows and all keys of a molecule
  bool shares_table, shares_sums;
};

// Where a sweep by rows puts integer sums, in units of a quantum (see sums.cuh); null: not wanted.
struct Sums {
  unsigned long long* knots;   // like the knots
  unsigned long long* affine;  // [P', 2]
  const double* quantum;       // of knots, one over it, of the affine map, one over it
  void* moments;               // of Gaussians: [chunks, H, 3, K]
};

struct ForwardCall {
  Inputs in;
  Plan plan;
  Rows out;
  void* row;  // [num_rows, H]: L, or the sums of a linear normalizer
};

struct BackwardCall {
  Inputs in;
  Plan plan;
  Rows d_out;
  const void* d_row;  // [num_rows, H] or null; linear only
  const void* row;    // L; softmax only
  Rows dq, dk, dv;    // each may be absent
  void* d_positions;  // parts to be added up: [2, H, num_rows, 3], by rows and by keys; or null
  void* numbers;      // what the sweep by keys has to know of rows: [H, num_rows, 5]
  Sums sums;
};

// Dotted is the tangent, each part may be absent; the results are gradients of <dO, Ȯ> + <dr, ṙ>.
struct SecondBackwardCall {
  Inputs in;
  Plan plan;
  Rows q_dot, k_dot, v_dot;
  const void *x_dot, *radial_dot, *affine_dot;
  Rows d_out;
  const void* d_row;
  Rows out;  // softmax only
  const void* row;
  Rows grad_d_out, grad_q, grad_k, grad_v;
  void* grad_d_row;
  void* grad_positions;
  void* numbers;
  Sums sums;
};

// The largest squared norms of rows, as the bits of doubles, in the order of `Norm`. Of positions
// and their tangents, those relative to the first atom of a molecule.
enum Norm { kQ, kK, kV, kDOut, kDRow, kRow, kQDot, kKDot, kVDot, kX, kXDot, kNumNorms };
struct BoundsCall {
  Inputs in;
  Rows d_out, q_dot, k_dot, v_dot;  // contiguous; those after d_out may be absent
  const void *d_row, *x_dot;
  const void* row;            // L; softmax only
  unsigned long long* norms;  // zeros at first
  const void* radial;  // bounds of |f|, |f'|, |f''|, |ḟ|, |ḟ'|, |m|, |ṁ|, |ċ|, and of d where
                       // f' is not 0; or null
  bool is_second;
  double* quantum;
};

// Each returns null, or what went wrong. `device` and `stream`: where to launch.
struct Where {
  int device;
  int64_t stream;
};
const char* launch_attention_fwd(ForwardCall call, Where where);
// How many parts of the gradient of positions they have written goes into `parts`.
const char* launch_attention_bwd(BackwardCall call, Where where, int* parts);
const char* launch_attention_bwd_bwd(SecondBackwardCall call, Where where, int* parts);
const char* launch_bounds(const BoundsCall& call, Where where);

// Of a block, at most, bytes.
int64_t shared_memory(int64_t device);

// How many blocks of a head there are: parts of the moments of Gaussians.
int64_t chunks(int64_t num_molecules, int64_t max_atoms, int64_t num_heads, int64_t device);

}  // namespace geot::cuda
