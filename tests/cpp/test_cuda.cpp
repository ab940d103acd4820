// The kernels of csrc/cuda without torch, run by the emulator: the forward pass against loops, the
// backward passes against those of csrc/cpu in double, of the numbers that the type of the features
// leaves. What Python does around the operators is done here.
//
// The argument names a part. Printed are the bits of all results: no order of threads changes them.
#include <algorithm>
#include <bit>
#include <string>

#include "cuda/call.h"
#include "cuda/shared.cuh"
#include "problem.h"

namespace geot::cpu {
GEOT_DECLARE_PASSES(GEOT_ISA)
}

namespace geot::test {
namespace {

using cuda::BFloat16;
using cuda::Half;

// Where features are: side by side; one number further, in rows of an odd length; as [B, H, N, D].
// With kOdd all other tensors, too, start one number further.
enum Layout { kContiguous, kOdd, kHeadsFirst };

constexpr int kDOut = kNumInputs, kDRow = kNumInputs + 1, kEverything = (1 << (kNumInputs + 2)) - 1;

// A problem, and the tangents and cotangents of its passes; those that are 0 may be absent.
struct Given {
  Problem<double> problem;
  Tensor<double> d_out, d_row;
  Tensors<double> dots;
  Layout layout;

  Given(const Shape& shape, Layout l) : problem(shape), layout(l) {}
};

// Gradients of the six inputs by the first and second backward pass; and of d_out and d_row.
struct Results {
  Tensor<double> out, row, d_out, d_row;
  Tensors<double> first, second;
};

template <class T>
void round_to(Tensor<double>& x) {
  for (int64_t i = 0; i < x.size; ++i) x[i] = cuda::convert<double>(cuda::convert<T>(x[i]));
}

// Numbers that T can hold, in the real rows of [num_rows, row_size].
template <class T>
Tensor<double> draw_rows(const Problem<double>& p, int64_t row_size) {
  Tensor<double> x(p.num_rows * row_size);
  for (const int64_t row : p.rows) {
    for (int64_t c = 0; c < row_size; ++c) x[row * row_size + c] = normal();
  }
  round_to<T>(x);
  return x;
}

// `there`: a bit for each of the six tangents, d_out and d_row.
template <class T>
Given draw(const Shape& shape, Layout layout, int there = kEverything) {
  using F = cuda::Compute<T>;
  Given given(shape, layout);
  Problem<double>& p = given.problem;
  for (int n = 0; n < kNumInputs; ++n) {
    n <= kV ? round_to<T>(p.inputs[n]) : round_to<F>(p.inputs[n]);
    if (!(there >> n & 1)) continue;
    if (n <= kV) {
      given.dots[n] = draw_rows<T>(p, p.row_size(n));
    } else if (n == kX) {
      given.dots[n] = draw_rows<F>(p, 3);
    } else {
      given.dots[n] = Tensor<double>(p.size_of(n));
      given.dots[n].draw(1);
      round_to<F>(given.dots[n]);
    }
  }
  given.d_out = draw_rows<T>(p, p.row_size(kV));
  if (!(there >> kDOut & 1)) given.d_out.fill(0);  // as Python does
  if (shape.is_linear && there >> kDRow & 1) given.d_row = draw_rows<F>(p, shape.heads);
  return given;
}

// What csrc/cpu gives, all of it.
Results run_on_cpu(const Given& given) {
  const Problem<double>& p = given.problem;
  const auto rows = [&](const Tensor<double>& x) { return p.rows_of<const double>(x.data.get()); };
  const auto new_rows = [&](Tensor<double>& x, int n) {
    x = Tensor<double>(p.size_of(n));
    return n <= kV ? p.rows_of<double>(x.data.get()) : cpu::Rows<double>{x.data.get()};
  };
  Results r;
  r.row = Tensor<double>(p.num_rows * p.shape.heads);
  const cpu::ForwardCall<double> forward{p.call_inputs(), new_rows(r.out, kV), r.row.data.get(),
                                         run_threads};
  cpu::GEOT_ISA::attention_fwd(forward,
                               cpu::Plan(forward.inputs, cpu::Pass::kForward, false).schedule());

  cpu::BackwardCall<double> first{};
  first.inputs = p.call_inputs();
  first.d_out = rows(given.d_out);
  first.d_row = given.d_row.data.get();
  first.out = rows(r.out);
  first.row = r.row.data.get();
  first.dq = new_rows(r.first[kQ], kQ);
  first.dk = new_rows(r.first[kK], kK);
  first.dv = new_rows(r.first[kV], kV);
  first.d_positions = new_rows(r.first[kX], kX).data;
  first.d_radial = new_rows(r.first[kRadial], kRadial).data;
  first.d_affine = new_rows(r.first[kMap], kMap).data;
  first.run_threads = run_threads;
  cpu::GEOT_ISA::attention_bwd(first,
                               cpu::Plan(first.inputs, cpu::Pass::kBackward, true).schedule());
  if (p.shape.radial == kGaussians) return r;

  cpu::SecondBackwardCall<double> second{};
  second.inputs = p.call_inputs();
  second.q_dot = rows(given.dots[kQ]);
  second.k_dot = rows(given.dots[kK]);
  second.v_dot = rows(given.dots[kV]);
  second.x_dot = given.dots[kX].data.get();
  second.radial_dot = given.dots[kRadial].data.get();
  second.affine_dot = given.dots[kMap].data.get();
  second.d_out = rows(given.d_out);
  second.d_row = given.d_row.data.get();
  second.out = rows(r.out);
  second.row = r.row.data.get();
  second.grad_d_out = new_rows(r.d_out, kV);
  if (p.shape.is_linear) r.d_row = Tensor<double>(r.row.size);
  second.grad_d_row = r.d_row.data.get();
  second.grad_q = new_rows(r.second[kQ], kQ);
  second.grad_k = new_rows(r.second[kK], kK);
  second.grad_v = new_rows(r.second[kV], kV);
  second.grad_positions = new_rows(r.second[kX], kX).data;
  second.grad_radial = new_rows(r.second[kRadial], kRadial).data;
  second.grad_affine = new_rows(r.second[kMap], kMap).data;
  second.run_threads = run_threads;
  cpu::GEOT_ISA::attention_bwd_bwd(
      second, cpu::Plan(second.inputs, cpu::Pass::kSecondBackward, true).schedule());
  return r;
}

// A tensor of a call; ends where its memory ends. No numbers: it is absent.
template <class F>
class Numbers {
 public:
  Numbers() = default;
  Numbers(int64_t size, Layout layout)
      : size_(size),
        shift_(layout == kOdd ? 1 : 0),
        memory_(size ? new F[size + shift_] : nullptr) {
    for (int64_t i = 0; size && i < size + shift_; ++i) memory_[i] = cuda::convert<F>(kNaN);
  }
  Numbers(const Tensor<double>& x, Layout layout) : Numbers(x.size, layout) {
    for (int64_t i = 0; i < size_; ++i) data()[i] = cuda::convert<F>(x[i]);
  }
  F* data() const { return memory_ ? memory_.get() + shift_ : nullptr; }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return cuda::convert<double>(data()[i]); }
  Tensor<double> values() const {
    Tensor<double> x(size_);
    for (int64_t i = 0; i < size_; ++i) x[i] = (*this)[i];
    return x;
  }

 private:
  int64_t size_ = 0, shift_ = 0;
  std::unique_ptr<F[]> memory_;
};

// Features in a layout.
template <class T>
class Features {
 public:
  Features() = default;
  Features(const Problem<double>& p, Layout layout) : problem_(&p) {
    const int64_t b = p.shape.is_packed ? 1 : p.shape.sizes.size(), h = p.shape.heads;
    const int64_t n = p.shape.is_packed ? p.num_rows : p.width, d = p.shape.channels;
    if (layout == kHeadsFirst) {
      rows_ = {nullptr, h * n * d, d, n * d};
      numbers_ = Numbers<T>(b * h * n * d, layout);
    } else {
      const int64_t row = h * d + (layout == kOdd ? 1 - h * d % 2 : 0);
      rows_ = {nullptr, n * row, row, d};
      numbers_ = Numbers<T>(b * n == 0 ? 0 : (b * n - 1) * row + h * d, layout);
    }
    rows_.data = numbers_.data();
  }
  Features(const Problem<double>& p, const Tensor<double>& x, Layout layout)
      : Features(x.size == 0 ? Features() : Features(p, layout)) {
    for (int64_t i = 0; i < x.size; ++i) numbers_.data()[at(i)] = cuda::convert<T>(x[i]);
  }
  const cuda::Rows& rows() const { return rows_; }
  Tensor<double> values() const {
    Tensor<double> x(rows_.data == nullptr ? 0 : problem_->size_of(kV));
    for (int64_t i = 0; i < x.size; ++i) x[i] = numbers_[at(i)];
    return x;
  }

 private:
  int64_t at(int64_t i) const {
    const int64_t d = problem_->shape.channels, h = problem_->shape.heads, row = i / (h * d);
    const int64_t b = problem_->shape.is_packed ? 0 : row / problem_->width;
    const int64_t n = problem_->shape.is_packed ? row : row % problem_->width;
    return b * rows_.stride_b + n * rows_.stride_n + i / d % h * rows_.stride_h + i % d;
  }

  const Problem<double>* problem_ = nullptr;
  cuda::Rows rows_{};
  Numbers<T> numbers_;
};

template <class T>
constexpr cuda::DType kDType = std::is_same_v<T, double>  ? cuda::DType::kDouble
                               : std::is_same_v<T, float> ? cuda::DType::kFloat
                               : std::is_same_v<T, Half>  ? cuda::DType::kHalf
                                                          : cuda::DType::kBFloat16;

void check(const char* error) {
  if (error != nullptr) std::printf("%s\n", error);
  CHECK(error == nullptr);
}

// The calls of a problem whose features are T, with the tensors that they are given. Features that
// Python makes are contiguous.
template <class T>
class Run {
 public:
  using F = cuda::Compute<T>;

  explicit Run(const Given& given)
      : given_(given),
        p_(given.problem),
        q_(p_, p_.inputs[kQ], given.layout),
        k_(p_, p_.inputs[kK], given.layout),
        v_(p_, p_.inputs[kV], given.layout),
        positions_(p_.inputs[kX], given.layout),
        radial_(p_.inputs[kRadial], given.layout),
        affine_(p_.inputs[kMap], given.layout),
        ptr_(p_.ptr),
        out_(p_, kContiguous),
        row_(p_.num_rows * p_.shape.heads, kContiguous),
        d_out_(p_, given.d_out, kContiguous),
        d_row_(given.d_row, given.layout) {
    for (const int n : {kQ, kK, kV}) dots_[n] = Features<T>(p_, given.dots[n], kContiguous);
    for (const int n : {kX, kRadial, kMap}) {
      other_dots_[n - kX] = Numbers<F>(given.dots[n], given.layout);
    }
  }

  // `wanted`: a bit for each of the six gradients, and for those of d_out and d_row.
  Results results(int wanted) {
    Results r;
    check(cuda::launch_attention_fwd({inputs(), {}, out_.rows(), row_.data()}, {}));
    r.out = out_.values();
    r.row = row_.values();
    r.first = backward(wanted);
    if constexpr (sizeof(T) > 2) {
      if (p_.shape.radial != kGaussians) second_backward(r, wanted);
    }
    return r;
  }

 private:
  cuda::Inputs inputs() const {
    const cpu::Inputs<double> from = p_.call_inputs();
    cuda::Inputs in{};
    in.dtype = kDType<T>;
    in.num_molecules = from.num_molecules;
    in.num_rows = from.num_rows;
    in.num_atoms = p_.width;
    if (p_.shape.is_packed && in.num_molecules > 0) {
      in.num_atoms = *std::max_element(p_.shape.sizes.begin(), p_.shape.sizes.end());
    }
    in.num_heads = from.num_heads;
    in.head_dim = from.head_dim;
    in.q = q_.rows();
    in.k = k_.rows();
    in.v = v_.rows();
    in.positions = positions_.data();
    in.radial = radial_.data();
    in.affine = affine_.data();
    in.mask = from.mask;
    in.ptr = p_.shape.is_packed ? ptr_.data() : nullptr;
    in.types = from.atom_types;
    in.pairs = from.pair_index;
    if (from.is_table()) {
      in.num_tables = from.radial.num_tables;
      in.num_knots = from.radial.num_knots;
    }
    in.num_gaussians = from.radial.num_gaussians;
    in.num_channels = p_.num_channels();
    in.num_types = from.num_types;
    in.num_affine = from.num_affine;
    in.r_min = from.radial.r_min;
    in.r_max = from.radial.r_max;
    in.scale = from.scale;
    in.is_filter = from.is_filter;
    in.is_linear = from.is_linear;
    return in;
  }

  // The results of a backward pass, of which Python makes gradients.
  struct Gradients {
    Features<T> features[3];
    Numbers<F> positions, numbers, moments;
    std::vector<unsigned long long> knots, affine;
    double quantum[4] = {kNaN, kNaN, kNaN, kNaN};
    cuda::Sums sums{};
  };
  Gradients make(int wanted, bool is_second) const {
    const cuda::Inputs in = inputs();
    Gradients g;
    for (const int n : {kQ, kK, kV}) {
      if (wanted >> n & 1) g.features[n] = Features<T>(p_, kContiguous);
    }
    if (wanted >> kX & 1) {
      g.positions = Numbers<F>(2 * in.num_heads * in.num_rows * 3, given_.layout);
    }
    g.numbers = Numbers<F>(in.num_heads * in.num_rows * 5, given_.layout);
    if (wanted >> kRadial & 1 && in.num_gaussians == 0) {
      g.knots.assign(radial_.size(), 0);
      g.sums.knots = g.knots.data();
    } else if (wanted >> kRadial & 1) {
      const int64_t chunks = cuda::chunks(in.num_molecules, in.num_atoms, in.num_heads, 0);
      g.moments = Numbers<F>(chunks * in.num_heads * 3 * in.num_gaussians, given_.layout);
      g.sums.moments = g.moments.data();
    }
    if (wanted >> kMap & 1 && in.affine != nullptr) {
      g.affine.assign(affine_.size(), 0);
      g.sums.affine = g.affine.data();
    }
    if (g.sums.knots != nullptr || g.sums.affine != nullptr) {
      find_quantum(g.quantum, wanted >> kMap & 1, is_second);
      g.sums.quantum = g.quantum;
    }
    return g;
  }

  void find_quantum(double (&quantum)[4], bool needs_affine, bool is_second) const {
    const std::vector<double> radial = radial_bounds(is_second);
    std::vector<unsigned long long> norms(cuda::kNumNorms, 0);
    cuda::BoundsCall call{};
    call.in = inputs();
    call.d_out = d_out_.rows();
    call.d_row = d_row_.data();
    if (is_second) {
      call.q_dot = dots_[kQ].rows();
      call.k_dot = dots_[kK].rows();
      call.v_dot = dots_[kV].rows();
      call.x_dot = other_dots_[0].data();
    }
    call.row = p_.shape.is_linear ? nullptr : row_.data();
    call.norms = norms.data();
    call.radial = needs_affine || is_second ? radial.data() : nullptr;
    call.is_second = is_second;
    call.quantum = quantum;
    check(cuda::launch_bounds(call, {}));
  }

  // The largest value and slope of knots.
  void largest(const Tensor<double>& knots, double (&top)[2]) const {
    for (int64_t i = 0; i < knots.size; ++i) {
      double& x = top[i / p_.num_channels() % 2];
      x = std::max(x, std::abs(knots[i]));
    }
  }
  // As `_radial_bounds` of geot_kernels/backends/cuda.py, but for tables less tight.
  std::vector<double> radial_bounds(bool is_second) const {
    double f = 0, f1 = 0, f2 = 0, f_dot = 0, f1_dot = 0, of_map[4] = {1, 0, 0, 0};
    if (p_.shape.radial == kGaussians) {
      for (int64_t c = 0; c < p_.num_channels(); ++c) {
        double sums[2] = {};
        for (int64_t k = 0; k < kGaussianCount; ++k) {
          const double weight = std::abs(p_.inputs[kRadial][(2 + c) * kGaussianCount + k]);
          sums[0] += weight;
          sums[1] += weight * std::sqrt(2 * std::abs(p_.inputs[kRadial][kGaussianCount + k]) /
                                        std::exp(1.0));
        }
        f = std::max(f, sums[0]);
        f1 = std::max(f1, sums[1]);
      }
    } else {
      const double per_h = double(p_.shape.knots - 1) / (kZMax - kZMin);
      double top[2] = {}, top_dot[2] = {};
      largest(p_.inputs[kRadial], top);
      f = top[0] + top[1];
      f1 = per_h * (3 * top[0] + 2 * top[1]);
      f2 = per_h * per_h * (12 * top[0] + 8 * top[1]);
      if (is_second) largest(given_.dots[kRadial], top_dot);
      f_dot = top_dot[0] + top_dot[1];
      f1_dot = per_h * (3 * top_dot[0] + 2 * top_dot[1]);
    }
    const Tensor<double>&map = p_.inputs[kMap], &map_dot = given_.dots[kMap];
    if (map.size != 0) of_map[0] = 0;
    for (int64_t i = 0; i < map.size; i += 2) of_map[0] = std::max(of_map[0], std::abs(map[i]));
    for (int64_t i = 0; is_second && i < map_dot.size; ++i) {
      of_map[1 + i % 2] = std::max(of_map[1 + i % 2], std::abs(map_dot[i]));
    }
    return {f,         f1,        f2,
            f_dot,     f1_dot,    of_map[0],
            of_map[1], of_map[2], std::numeric_limits<double>::infinity()};
  }

  Tensors<double> gradients(const Gradients& g, int parts) const {
    Tensors<double> grads;
    for (const int n : {kQ, kK, kV}) grads[n] = g.features[n].values();
    if (g.positions.size() != 0) {
      const int64_t size = p_.num_rows * 3;
      grads[kX] = Tensor<double>(size);
      grads[kX].fill(0);
      for (int64_t i = 0; i < parts * p_.shape.heads * size; ++i) {
        grads[kX][i % size] += g.positions[i];
      }
    }
    if (!g.knots.empty()) grads[kRadial] = in_units(g.knots, g.quantum[0]);
    if (g.moments.size() != 0) grads[kRadial] = gradient_of_gaussians(g.moments);
    if (!g.affine.empty()) grads[kMap] = in_units(g.affine, g.quantum[2]);
    return grads;
  }
  static Tensor<double> in_units(const std::vector<unsigned long long>& sums, double quantum) {
    Tensor<double> x(sums.size());
    for (int64_t i = 0; i < x.size; ++i) x[i] = double(int64_t(sums[i])) * quantum;
    return x;
  }
  // From Σ g e^p φ, [chunks, H, 3, K].
  Tensor<double> gradient_of_gaussians(const Numbers<F>& moments) const {
    const int64_t H = p_.shape.heads, K = kGaussianCount;
    const Tensor<double>& r = p_.inputs[kRadial];
    Tensor<double> x(r.size);
    x.fill(0);
    for (int64_t i = 0; i < moments.size(); ++i) {
      const int64_t k = i % K, power = i / K % 3, h = i / (3 * K) % H;
      const double weight = r[(2 + h) * K + k];
      if (power == 0) x[(2 + h) * K + k] += moments[i];
      if (power == 1) x[k] += 2 * r[K + k] * weight * moments[i];
      if (power == 2) x[K + k] -= weight * moments[i];
    }
    return x;
  }

  Tensors<double> backward(int wanted) const {
    const Gradients g = make(wanted, false);
    cuda::BackwardCall call{};
    call.in = inputs();
    call.d_out = d_out_.rows();
    call.d_row = d_row_.data();
    call.row = row_.data();
    call.dq = g.features[kQ].rows();
    call.dk = g.features[kK].rows();
    call.dv = g.features[kV].rows();
    call.d_positions = g.positions.data();
    call.numbers = g.numbers.data();
    call.sums = g.sums;
    int parts = 0;
    check(cuda::launch_attention_bwd(call, {}, &parts));
    return gradients(g, parts);
  }

  void second_backward(Results& r, int wanted) const {
    const Gradients g = make(wanted, true);
    const Features<T> grad_d_out =
        wanted >> kDOut & 1 ? Features<T>(p_, kContiguous) : Features<T>();
    const Numbers<F> grad_d_row(p_.shape.is_linear && wanted >> kDRow & 1 ? row_.size() : 0,
                                given_.layout);
    cuda::SecondBackwardCall call{};
    call.in = inputs();
    call.q_dot = dots_[kQ].rows();
    call.k_dot = dots_[kK].rows();
    call.v_dot = dots_[kV].rows();
    call.x_dot = other_dots_[0].data();
    call.radial_dot = other_dots_[kRadial - kX].data();
    call.affine_dot = other_dots_[kMap - kX].data();
    call.d_out = d_out_.rows();
    call.d_row = d_row_.data();
    call.out = out_.rows();
    call.row = row_.data();
    call.grad_d_out = grad_d_out.rows();
    call.grad_q = g.features[kQ].rows();
    call.grad_k = g.features[kK].rows();
    call.grad_v = g.features[kV].rows();
    call.grad_d_row = grad_d_row.data();
    call.grad_positions = g.positions.data();
    call.numbers = g.numbers.data();
    call.sums = g.sums;
    int parts = 0;
    check(cuda::launch_attention_bwd_bwd(call, {}, &parts));
    r.second = gradients(g, parts);
    r.d_out = grad_d_out.values();
    r.d_row = grad_d_row.values();
  }

  const Given& given_;
  const Problem<double>& p_;
  Features<T> q_, k_, v_;
  Numbers<F> positions_, radial_, affine_;
  std::vector<int64_t> ptr_;
  Features<T> out_;
  Numbers<F> row_;
  Features<T> d_out_;
  Numbers<F> d_row_;
  Features<T> dots_[3];
  Numbers<F> other_dots_[3];
};

// Of a result, relative to its largest number. Integer sums have 63 bits for a bound that may be
// far too large: less than a double can hold.
constexpr double kToleranceOfSums = 1e-6;
template <class T>
constexpr double kTolerance = std::is_same_v<T, double>  ? 1e-11
                              : std::is_same_v<T, float> ? 1e-4
                              : std::is_same_v<T, Half>  ? 4e-3
                                                         : 3e-2;

uint64_t bits_of_all = 0xcbf29ce484222325;
double largest_error = 0;  // over its tolerance

void compare(const std::string& what, const Problem<double>& p, const Tensor<double>& got,
             const Tensor<double>& expected, double tolerance, bool has_rows) {
  if (got.size == 0) return;
  CHECK(got.size == expected.size);
  double largest = 1, apart = 0;
  for (int64_t i = 0; i < got.size; ++i) largest = std::max(largest, std::abs(expected[i]));
  bool is_zero = true;
  for (int64_t i = 0; i < got.size; ++i) {
    bits_of_all = (bits_of_all ^ std::bit_cast<uint64_t>(got[i])) * 0x100000001b3;
    // NaN is further than anything.
    if (const double x = std::abs(got[i] - expected[i]); !(x <= apart)) apart = x;
    if (has_rows && !p.is_real(i / (got.size / p.num_rows))) is_zero &= got[i] == 0;
  }
  largest_error = std::max(largest_error, apart / largest / tolerance);
  if (!(apart <= tolerance * largest)) {
    const Shape& s = p.shape;
    std::printf(
        "%s: %g apart, largest %g; packed %d filter %d linear %d radial %d, heads %d, "
        "channels %d, sizes",
        what.c_str(), apart, largest, s.is_packed, s.is_filter, s.is_linear, s.radial, int(s.heads),
        int(s.channels));
    for (const int64_t n : s.sizes) std::printf(" %d", int(n));
    std::printf("\n");
  }
  CHECK(apart <= tolerance * largest);
  CHECK(is_zero);
}

template <class T>
void test(const Shape& shape, Layout layout = kContiguous, int wanted = kEverything,
          int there = kEverything) {
  const Given given = draw<T>(shape, layout, there);
  const Problem<double>& p = given.problem;
  const Results got = Run<T>(given).results(wanted), expected = run_on_cpu(given);
  Tensor<double> out(got.out.size), row(got.row.size);
  p.forward(out, row);
  compare("out", p, got.out, out, kTolerance<T>, true);
  compare("row", p, got.row, row, kTolerance<T>, true);
  for (int n = 0; n < kNumInputs; ++n) {
    const double tolerance = n <= kX ? kTolerance<T> : std::max(kTolerance<T>, kToleranceOfSums);
    const std::string name = kNames[n];
    compare("grad " + name, p, got.first[n], expected.first[n], tolerance, n <= kX);
    compare("second grad " + name, p, got.second[n], expected.second[n], tolerance, n <= kX);
  }
  compare("second grad d_out", p, got.d_out, expected.d_out, kTolerance<T>, true);
  compare("second grad d_row", p, got.d_row, expected.d_row, kTolerance<T>, true);
}

// body(shape of every variant) without sizes.
template <class Body>
void for_variants(Body body) {
  for (const bool is_filter : {false, true}) {
    for (const bool is_linear : {false, true}) {
      for (const int radial : {kTable, kPairTables, kAffine, kGaussians}) {
        if (is_filter && radial == kGaussians) continue;
        body(Shape{{}, 0, 0, is_linear != is_filter, is_filter, is_linear, radial});
      }
    }
  }
}
Shape with(Shape shape, std::vector<int64_t> sizes, int64_t heads, int64_t channels) {
  shape.sizes = std::move(sizes);
  shape.heads = heads;
  shape.channels = channels;
  return shape;
}
Shape other_layout(Shape shape) {
  shape.is_packed = !shape.is_packed;
  return shape;
}

// One, two and four warps, whole molecules and two sweeps.
void test_sizes() {
  for_variants([](const Shape& variant) {
    test<float>(with(variant, {7, 0, 1, 14}, 2, 5));
    test<double>(with(other_layout(variant), {5, 0, 16}, 3, 2), kOdd);
    test<double>(with(variant, {17, 0, 30}, 1, 6));
    test<float>(with(other_layout(variant), {3, 0, 32}, 2, 8), kHeadsFirst);
    test<float>(with(variant, {33, 0, 2}, 1, 6), kOdd);
    test<float>(with(other_layout(variant), {64}, 1, 4));
    test<double>(with(other_layout(variant), {41, 2}, 1, 3));
    test<float>(with(variant, {65, 0, 4}, 1, 4));
    test<double>(with(other_layout(variant), {3, 70}, 1, 3));
  });
}

// Channels: sums in registers of all widths and in shared memory.
void test_channels() {
  for (const int64_t channels : {1, 2, 16, 24, 33, 64, 80, 128}) {
    const Shape bias{{9, 17}, 2, channels, false, false, false, kTable};
    const Shape filter{{9, 17}, 2, channels, true, true, true, kTable};
    test<float>(bias);
    test<float>(bias, kOdd);
    test<float>(filter, channels % 16 == 0 ? kOdd : kContiguous);
    test<double>(bias, kHeadsFirst);
    if (channels < 128) test<double>(filter, kHeadsFirst);
  }
  // Tiles for which shared memory has place for two warps, or one.
  for (const int64_t channels : {48, 96}) {
    test<double>({{40}, 1, channels, true, true, false, kTable});
  }
  test<double>({{40}, 1, 128, false, false, false, kTable});
}

template <class T>
void test_16_bit() {
  for (const bool is_linear : {false, true}) {
    for (const int radial : {kTable, kPairTables, kAffine}) {
      const Shape variant{{}, 0, 0, is_linear, false, is_linear, radial};
      test<T>(with(variant, {7, 0, 14}, 2, 16));
      test<T>(with(other_layout(variant), {30, 8}, 1, 24), kOdd);
      test<T>(with(other_layout(variant), {41, 0, 64}, 1, 16), kHeadsFirst);
      test<T>(with(variant, {70, 3}, 1, 8));
    }
  }
  for (const int64_t channels : {1, 2, 16, 24, 33, 40, 128}) {
    const Shape shape{{9, 20}, 2, channels, false, false, false, kTable};
    for (const Layout layout : {kContiguous, kOdd, kHeadsFirst}) {
      test<T>(shape, layout);
      test<T>(other_layout(shape), layout);
    }
  }
  test<T>({{70, 60}, 1, 128, false, false, false, kAffine});
}

// Tables, or their sums, that leave no place for the rest in shared memory.
void test_large_tables() {
  for (const int64_t knots : {2500, 6000, 15000}) {
    for (const bool is_linear : {false, true}) {
      test<double>({{20, 9}, 1, 4, false, false, is_linear, kTable, knots});
      test<Half>({{20, 9}, 1, 4, true, false, is_linear, kTable, 2 * knots});
      test<double>({{7, 12}, 1, 4, true, false, is_linear, kPairTables, knots / 6});
    }
  }
}

// A block that goes through several molecules, some of them empty: there are few blocks for a head.
void test_many_molecules() {
  for (const bool is_packed : {false, true}) {
    test<float>({{5, 0, 0, 3, 8, 0}, 33, 2, is_packed, false, false, kAffine});
    test<float>({{5, 0, 3, 0}, 33, 2, is_packed, true, true, kPairTables});
    test<float>({{5, 0, 3, 8, 0, 4}, 33, 2, is_packed, false, false, kGaussians});
    test<Half>({{17, 0, 3, 9}, 33, 2, is_packed, false, true, kTable});
    test<double>({{0, 17, 0, 3}, 33, 1, is_packed, false, false, kPairTables});
    test<float>({{0, 0}, 2, 3, is_packed, false, false, kTable});
    test<float>({{}, 2, 3, is_packed, true, false, kTable});
    test<float>({{1}, 1, 1, is_packed, false, false, kGaussians});
  }
  test<float>({{0, 66, 0, 3}, 22, 1, false, false, false, kTable});
}

// Any results may be left out, and tangents that are 0.
void test_parts(int rounds) {
  const auto bits = [] { return int(generator() & kEverything); };
  for_variants([&](const Shape& variant) {
    for (int round = 0; round < rounds; ++round) {
      test<float>(with(variant, {7, 0, 13}, 2, 4), kContiguous, bits(), bits());
      test<double>(with(other_layout(variant), {65}, 1, 3), kOdd, bits(), bits());
    }
  });
}

// As little as passes every barrier where it is needed: a whole molecule of two warps; more columns
// than a tile has; more molecules than blocks, so that one goes from a molecule without atoms on to
// another.
void test_barriers() {
  test<float>({{20}, 1, 2, true, false, false, kTable});
  test<float>({{66}, 1, 2, true, false, false, kTable});
  std::vector<int64_t> sizes(66, 0);
  sizes.back() = 15;
  test<float>({sizes, 1, 1, false, false, false, kTable});
}

int run_all(const std::string& part) {
  const bool all = part == "all";
  if (all || part == "sizes") test_sizes();
  if (all || part == "channels") test_channels();
  if (all || part == "16bit") test_16_bit<Half>();
  if (all || part == "16bit") test_16_bit<BFloat16>();
  if (all || part == "tables") test_large_tables();
  if (all || part == "molecules") test_many_molecules();
  if (all || part == "parts") test_parts(2);
  if (all || part == "barriers") test_barriers();
  std::printf("largest error: %g of its tolerance\n", largest_error);
  std::printf("bits %016llx\n", static_cast<unsigned long long>(bits_of_all));
  return summary();
}

}  // namespace
}  // namespace geot::test

int main(int count, char** arguments) {
  return geot::test::run_all(count > 1 ? arguments[1] : "all");
}
