// The quantum of the integer sums (sums.cuh): a bound on what any of them can become, from the
// largest norms of rows. Norms bound the numbers of pairs (Cauchy and Schwarz), and the weights of
// a softmax sum up to 1:
//
//   |A_ij| <= |dO_i| |v_j| + |dr_i|,   Σ_j |E_ij| <= 2 max |A|,  of a linear normalizer N max |A|
//
// A quantum is the power of two for which the largest sum that could be still fits 63 bits. A bound
// may be a million times too large without costing a float32 sum its precision.
#pragma once

#include "work.cuh"

namespace geot::cuda {

GEOT_DEVICE double larger(double x, double other) {
  return other > x || other != other ? other : x;
}

template <class T>
struct Norms {
  using Call = BoundsCall;
  using F = Compute<T>;
  static constexpr int kMaxThreads = 128, kMinBlocks = 1;

  static GEOT_DEVICE void run(const Call& call, char*) {
    const Inputs& in = call.in;
    double largest[kNumNorms] = {};
    const int64_t parts = (in.num_atoms + kRows - 1) / kRows;
    for (int64_t item = block_index(); item < in.num_molecules * parts; item += num_blocks()) {
      const int64_t b = item / parts, part = item % parts * kRows;
      const int64_t first = in.ptr != nullptr ? in.ptr[b] : b * in.num_atoms;
      const int64_t rows = in.ptr != nullptr ? in.ptr[b + 1] - first : in.num_atoms;
      const bool* mask = in.mask != nullptr ? in.mask + first : nullptr;
      int64_t origin = 0;  // the first real atom
      while (mask != nullptr && origin < rows && !mask[origin]) ++origin;
      const int64_t last = part + kRows < rows ? part + kRows : rows;
      for (int64_t n = part * in.num_heads + thread_index(); n < last * in.num_heads;
           n += num_threads()) {
        const int64_t i = n / in.num_heads, head = n % in.num_heads;
        if (mask == nullptr || mask[i]) add_row(call, largest, b, first, i, head, origin);
      }
    }
#pragma unroll
    for (int which = 0; which < kNumNorms; ++which) {
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        largest[which] = larger(largest[which], shuffle_xor(largest[which], lanes));
      }
      if (lane() == 0 && largest[which] != 0) {
        union {
          double number;
          unsigned long long bits;
        } norm{largest[which]};
        max_global(call.norms + which, norm.bits);  // no norm is negative; NaN is above all
      }
    }
  }

 private:
  static constexpr int64_t kRows = 32;  // of a molecule, that a block takes at a time

  static GEOT_DEVICE void add(double& largest, double norm) { largest = larger(largest, norm); }
  static GEOT_DEVICE void add_row(const Call& call, double (&largest)[kNumNorms], int64_t b,
                                  int64_t first, int64_t i, int64_t head, int64_t origin) {
    const Inputs& in = call.in;
    const auto add_features = [&](Norm which, const Rows& rows) {
      const HeadRows<T> x(rows, in.ptr != nullptr ? 0 : b, in.ptr != nullptr ? first : 0, head);
      if (!x) return;
      double norm = 0;
      for (int64_t c = 0; c < in.head_dim; ++c) {
        const double number = double(convert<F>(x.row(i)[c]));
        norm += number * number;
      }
      add(largest[which], norm);
    };
    add_features(kQ, in.q);
    add_features(kK, in.k);
    add_features(kV, in.v);
    add_features(kDOut, call.d_out);
    add_features(kQDot, call.q_dot);
    add_features(kKDot, call.k_dot);
    add_features(kVDot, call.v_dot);
    const auto add_number = [&](Norm which, const void* numbers) {
      if (numbers == nullptr) return;
      const double x = double(static_cast<const F*>(numbers)[(first + i) * in.num_heads + head]);
      add(largest[which], x * x);
    };
    add_number(kDRow, call.d_row);
    add_number(kRow, call.row);
    const auto add_vector = [&](Norm which, const void* vectors) {
      if (vectors == nullptr || head != 0) return;
      const Vector3<F> x =
          load_vector<F>(vectors, first + i) - load_vector<F>(vectors, first + origin);
      add(largest[which], double(x.dot(x)));
    };
    add_vector(kX, in.positions);
    add_vector(kXDot, call.x_dot);
  }
};

template <class F>
struct Quantum {
  using Call = BoundsCall;
  static constexpr int kMaxThreads = 32, kMinBlocks = 1;

  static GEOT_DEVICE void run(const Call& call, char*) {
    if (thread_index() != 0) return;
    const Inputs& in = call.in;
    const auto norm = [&](Norm which) {
      union {
        unsigned long long bits;
        double number;
      } square{call.norms[which]};
      return Math<double>::sqrt(square.number);
    };
    double f = 0, f1 = 0, f2 = 0, f_dot = 0, f1_dot = 0, m = 1, m_dot = 0, c_dot = 0,
           farthest = HUGE_VAL;
    if (call.radial != nullptr) {
      const double* r = static_cast<const double*>(call.radial);
      f = r[0], f1 = r[1], f2 = r[2], f_dot = r[3], f1_dot = r[4];
      m = r[5], m_dot = r[6], c_dot = r[7], farthest = r[8];
    }
    const double n = double(in.num_atoms), scale = Math<double>::abs(in.scale);
    const double a = norm(kDOut) * norm(kV) + norm(kDRow), qk = scale * norm(kQ) * norm(kK);
    const double e = in.is_linear ? a * n : 2 * a;   // Σ_j |E_ij| of a row
    const double total = in.is_filter ? e * qk : e;  // Σ_j Σ_c |g_ij,c|
    double dist = 2 * norm(kX);
    dist = dist < farthest ? dist : farthest;
    const double reach = dist > 1 ? dist : 1;
    double knots = total, affine = total * f1 * reach;
    if (call.is_second) {
      const double d_dot = 2 * norm(kXDot), z_dot = m * d_dot + m_dot * dist + c_dot;
      const double f_moves = f_dot + f1 * z_dot;
      const double qk_moves = scale * (norm(kQDot) * norm(kK) + norm(kQ) * norm(kKDot));
      const double s_dot = in.is_filter ? qk_moves * f + qk * f_moves : qk_moves + f_moves;
      const double a_dot = norm(kDOut) * norm(kVDot);
      const double s_bar = in.is_linear ? a_dot * n : 8 * s_dot * a + 2 * a_dot;
      const double g_bar = in.is_filter ? e * qk_moves + s_bar * qk : s_bar;
      const double per_h = double(in.num_knots - 1) / (in.r_max - in.r_min);
      const double b_bar = g_bar * f1 + total * (f2 * z_dot + f1_dot);
      knots = g_bar + 1.5 * per_h * total * z_dot;
      affine = b_bar * reach + total * f1 * d_dot;
    }
    // What is not a number anywhere is not a number here, also where the bound has no need of it.
    const double others = 0 * (norm(kQ) + norm(kK) + norm(kX) + norm(kRow));
    const double rows = double(in.num_rows);
    store(call.quantum, knots * rows + others);
    store(call.quantum + 2, affine * rows * double(in.num_heads) + others);
  }

 private:
  // The quantum and one over it; both are normal numbers of F.
  static GEOT_DEVICE void store(double* to, double bound) {
    constexpr int kLeast = sizeof(F) == 8 ? -900 : -60, kMost = sizeof(F) == 8 ? 1000 : 127;
    if (!(bound < HUGE_VAL)) {
      to[0] = to[1] = 0 * HUGE_VAL;
      return;
    }
    int exponent = kLeast;
    if (bound > 0) {
      exponent = ilogb(bound) + 1;
      exponent = exponent < kLeast ? kLeast : exponent > kMost ? kMost : exponent;
    }
    to[0] = ldexp(1.0, exponent - 62);
    to[1] = ldexp(1.0, 62 - exponent);
  }
};

}  // namespace geot::cuda
