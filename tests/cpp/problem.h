// Random problems for the passes of csrc/cpu, their naive forward pass, and threads to run them.
//
// Every tensor lies in a piece of memory of its own and of its exact size; padded rows of inputs,
// and results before a pass has run, are NaN.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/call.h"
#include "cpu/plan.h"

namespace geot::test {

using cpu::Inputs;
using cpu::Rows;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Shape {
  std::vector<int64_t> sizes;  // real atoms of each molecule
  int64_t heads, channels;
  bool is_packed, is_filter, is_linear;
  int radial;  // one of kTable ...
  int64_t knots = 40;
};
enum { kTable, kPairTables, kAffine, kGaussians };

inline int num_threads = 1;

inline void run_threads(int64_t most, void (*body)(void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < most && i < num_threads; ++i) threads.emplace_back(body, context);
  body(context);
  for (std::thread& thread : threads) thread.join();
}

// A tensor; the six that are differentiable, their tangents and gradients are laid out alike.
template <class T>
struct Tensor {
  std::unique_ptr<T[]> data;
  int64_t size = 0;

  explicit Tensor(int64_t n = 0) : data(n ? new T[n] : nullptr), size(n) { fill(T(kNaN)); }
  void fill(T x) {
    for (int64_t i = 0; i < size; ++i) data[i] = x;
  }
  void draw(double spread) {
    for (int64_t i = 0; i < size; ++i) data[i] = T(spread * normal());
  }
  T& operator[](int64_t i) { return data[i]; }
  const T& operator[](int64_t i) const { return data[i]; }
};

enum Input { kQ, kK, kV, kX, kRadial, kMap, kNumInputs };
inline const char* const kNames[] = {"q", "k", "v", "positions", "radial", "affine"};

template <class T>
struct Tensors {
  Tensor<T> at[kNumInputs];
  Tensor<T>& operator[](int n) { return at[n]; }
  const Tensor<T>& operator[](int n) const { return at[n]; }
};

constexpr int64_t kTypes = 3, kPairs = 6, kGaussianCount = 5;
constexpr double kZMin = 0.4, kZMax = 9.0;

template <class T>
class Problem {
 public:
  Shape shape;
  int64_t num_rows = 0, width = 0;  // width: N of the padded layout
  Tensors<T> inputs;
  std::vector<int64_t> ptr, rows;  // rows: of the real atoms, molecule after molecule
  std::unique_ptr<bool[]> mask;

  explicit Problem(Shape s, bool smooth = false) : shape(std::move(s)) {
    const int64_t molecules = shape.sizes.size();
    ptr.push_back(0);
    for (const int64_t n : shape.sizes) {
      ptr.push_back(ptr.back() + n);
      width = std::max(width, n + 2);
    }
    num_rows = shape.is_packed ? ptr.back() : molecules * width;
    if (!shape.is_packed) mask.reset(new bool[num_rows]());
    for (int64_t b = 0; b < molecules; ++b) {
      // Padding in front, at the end and, of every third atom, in between.
      for (int64_t n = 0, at = 1; n < shape.sizes[b]; ++n, ++at) {
        if (shape.is_packed) {
          rows.push_back(ptr[b] + n);
        } else {
          if (n % 3 == 1 && width - at > shape.sizes[b] - n) ++at;
          rows.push_back(b * width + at);
          mask[rows.back()] = true;
        }
      }
    }
    for (int n = 0; n < kNumInputs; ++n) inputs[n] = Tensor<T>(size_of(n));
    for (const int n : {kQ, kK, kV}) {
      for (const int64_t row : rows) {
        for (int64_t c = 0; c < row_size(n); ++c) inputs[n][row * row_size(n) + c] = T(normal());
      }
    }
    types_.assign(num_rows, -1);
    for (size_t i = 0; i < rows.size(); ++i) {
      types_[rows[i]] = int64_t(i) % kTypes;
      for (int a = 0; a < 3; ++a) inputs[kX][3 * rows[i] + a] = T(1.1 * normal());
    }
    for (size_t b = 0, i = 0; b < shape.sizes.size(); i += shape.sizes[b++]) {
      if (shape.sizes[b] > 4) {  // two atoms at one point, one far away
        for (int a = 0; a < 3; ++a) inputs[kX][3 * rows[i + 1] + a] = inputs[kX][3 * rows[i] + a];
        inputs[kX][3 * rows[i + 2]] += T(100);
      }
    }
    for (int64_t i = 0; i < kTypes * kTypes; ++i) {
      const int64_t low = std::min(i / kTypes, i % kTypes), high = std::max(i / kTypes, i % kTypes);
      pair_index_[i] = low * (2 * kTypes - low - 1) / 2 + high;
    }
    draw_radial(smooth);
  }

  int64_t num_channels() const { return shape.is_filter ? width_of_row() : shape.heads; }
  int64_t width_of_row() const { return shape.heads * shape.channels; }
  int64_t num_tables() const { return shape.radial == kPairTables ? kPairs : 1; }
  int64_t row_size(int n) const { return n == kX ? 3 : width_of_row(); }
  int64_t size_of(int n) const {
    if (n <= kX) return num_rows * row_size(n);
    if (n == kMap) return shape.radial == kAffine ? 2 * kPairs : 0;
    if (shape.radial == kGaussians) return (2 + num_channels()) * kGaussianCount;
    return num_tables() * shape.knots * 2 * num_channels();
  }
  bool is_real(int64_t row) const { return shape.is_packed || mask[row]; }

  // Rows of a tensor of features.
  template <class U>
  Rows<U> rows_of(U* data) const {
    if (data == nullptr) return {};
    return {data, width * width_of_row(), width_of_row(), shape.channels};
  }

  Inputs<T> call_inputs() const {
    Inputs<T> in{};
    in.num_molecules = shape.sizes.size();
    in.num_rows = num_rows;
    in.num_atoms = width;
    in.num_heads = shape.heads;
    in.head_dim = shape.channels;
    in.q = rows_of<const T>(inputs[kQ].data.get());
    in.k = rows_of<const T>(inputs[kK].data.get());
    in.v = rows_of<const T>(inputs[kV].data.get());
    in.positions = inputs[kX].data.get();
    in.radial.data = inputs[kRadial].data.get();
    in.radial.r_min = kZMin;
    in.radial.r_max = kZMax;
    if (shape.radial == kGaussians) {
      in.radial.num_gaussians = kGaussianCount;
    } else {
      in.radial.num_tables = num_tables();
      in.radial.num_knots = shape.knots;
    }
    in.affine = inputs[kMap].data.get();
    in.num_affine = in.affine ? kPairs : 0;
    in.mask = mask.get();
    in.ptr = shape.is_packed ? ptr.data() : nullptr;
    const bool has_types = shape.radial == kPairTables || shape.radial == kAffine;
    in.atom_types = has_types ? types_.data() : nullptr;
    in.pair_index = has_types ? pair_index_ : nullptr;
    in.num_types = has_types ? kTypes : 0;
    in.scale = 0.4;
    in.is_filter = shape.is_filter;
    in.is_linear = shape.is_linear;
    return in;
  }

  // f_c at a pair of atoms.
  double radial(int64_t row_i, int64_t row_j, int64_t c) const {
    double square = 0;
    for (int a = 0; a < 3; ++a) {
      const double apart = double(inputs[kX][3 * row_i + a]) - inputs[kX][3 * row_j + a];
      square += apart * apart;
    }
    double z = std::sqrt(square);
    const int64_t p = types_[row_i] < 0 ? 0 : pair_index_[types_[row_i] * kTypes + types_[row_j]];
    if (shape.radial == kAffine) z = inputs[kMap][2 * p] * z + inputs[kMap][2 * p + 1];
    const Tensor<T>& r = inputs[kRadial];
    if (shape.radial == kGaussians) {
      double f = 0;
      for (int64_t k = 0; k < kGaussianCount; ++k) {
        const double apart = z - r[k];
        f += r[(2 + c) * kGaussianCount + k] *
             std::exp(-double(r[kGaussianCount + k]) * apart * apart);
      }
      return f;
    }
    const double u = std::clamp((z - kZMin) / (kZMax - kZMin), 0.0, 1.0) * (shape.knots - 1);
    const int64_t g = std::min(int64_t(u), shape.knots - 2);
    const double t = u - g;
    const int64_t table = num_tables() > 1 ? p : 0;
    const T* knot = &r[((table * shape.knots + g) * 2) * num_channels()];
    const int64_t next = num_channels();
    return (1 + 2 * t) * (1 - t) * (1 - t) * knot[c] + t * (1 - t) * (1 - t) * knot[next + c] +
           t * t * (3 - 2 * t) * knot[2 * next + c] + t * t * (t - 1) * knot[3 * next + c];
  }

  // O of all rows, and the rows' numbers: by loops.
  void forward(Tensor<double>& out, Tensor<double>& row_number) const {
    const int64_t H = shape.heads, D = shape.channels;
    out.fill(0);
    row_number.fill(0);
    for (size_t b = 0; b + 1 < ptr.size(); ++b) {
      for (int64_t i = ptr[b]; i < ptr[b + 1]; ++i) {
        for (int64_t h = 0; h < H; ++h) {
          std::vector<double> s;
          double highest = -std::numeric_limits<double>::infinity(), sum = 0;
          for (int64_t j = ptr[b]; j < ptr[b + 1]; ++j) {
            s.push_back(score(rows[i], rows[j], h));
            highest = std::max(highest, s.back());
          }
          for (double& x : s) sum += shape.is_linear ? x : (x = std::exp(x - highest));
          row_number[rows[i] * H + h] = shape.is_linear ? sum : highest + std::log(sum);
          for (int64_t j = ptr[b]; j < ptr[b + 1]; ++j) {
            const double p = shape.is_linear ? s[j - ptr[b]] : s[j - ptr[b]] / sum;
            for (int64_t d = 0; d < D; ++d) {
              out[(rows[i] * H + h) * D + d] += p * inputs[kV][(rows[j] * H + h) * D + d];
            }
          }
        }
      }
    }
  }

 private:
  double score(int64_t row_i, int64_t row_j, int64_t h) const {
    double s = shape.is_filter ? 0 : radial(row_i, row_j, h);
    for (int64_t d = 0; d < shape.channels; ++d) {
      const int64_t c = h * shape.channels + d;
      const double f = shape.is_filter ? radial(row_i, row_j, c) : 1;
      s +=
          0.4 * inputs[kQ][row_i * width_of_row() + c] * inputs[kK][row_j * width_of_row() + c] * f;
    }
    return s;
  }

  // Any knots, or those of one cubic, which is smooth across them: differences need that.
  void draw_radial(bool smooth) {
    Tensor<T>& r = inputs[kRadial];
    for (int64_t i = 0; i < r.size; ++i) r[i] = T(normal());
    for (int64_t p = 0; p < inputs[kMap].size; p += 2) {
      inputs[kMap][p] = T(1 + 0.1 * normal());
      inputs[kMap][p + 1] = T(0.1 * normal());
    }
    if (shape.radial == kGaussians) {
      for (int64_t i = 0; i < 2 * kGaussianCount; ++i) r[i] = T(uniform(0.2, 2));
    } else if (smooth) {
      const int64_t C = num_channels(), knots = shape.knots;
      for (int64_t p = 0; p < num_tables(); ++p) {
        for (int64_t c = 0; c < C; ++c) {
          const double a[4] = {normal(), normal(), normal(), normal()};
          for (int64_t g = 0; g < knots; ++g) {
            const double x = 2.0 * g / (knots - 1) - 1;
            T* at = &r[(p * knots + g) * 2 * C + c];
            at[0] = T(a[0] + x * (a[1] + x * (a[2] + x * a[3])));
            at[C] = T((a[1] + x * (2 * a[2] + x * 3 * a[3])) * 2 / (knots - 1));
          }
        }
      }
    }
  }

  std::vector<int64_t> types_;
  int64_t pair_index_[kTypes * kTypes];
};

}  // namespace geot::test
