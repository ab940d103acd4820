// The passes of csrc/cpu, called without torch: the forward pass against loops, each backward pass
// against differences of the pass before, any part of it against the whole, threads against one.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "problem.h"

namespace geot::cpu {
GEOT_DECLARE_PASSES(GEOT_ISA)
}

namespace geot::test {
namespace {

using cpu::Pass;
using cpu::Plan;

// What a pass is given and gives, as large as it is said to be and no larger.
template <class T>
struct Results {
  Tensor<T> d_out, d_row;
  Tensors<T> inputs;
};

template <class T>
struct Run {
  const Problem<T>& problem;
  Tensor<T> out, row;

  explicit Run(const Problem<T>& p)
      : problem(p), out(p.size_of(kV)), row(p.num_rows * p.shape.heads) {
    cpu::ForwardCall<T> call{p.call_inputs(), p.template rows_of<T>(out.data.get()), row.data.get(),
                             run_threads};
    cpu::GEOT_ISA::attention_fwd(call, Plan(call.inputs, Pass::kForward, false).schedule());
  }

  Tensors<T> backward(const Tensor<T>& d_out, const Tensor<T>& d_row, int wanted) const {
    Tensors<T> grads = make(wanted);
    cpu::BackwardCall<T> call{};
    call.inputs = problem.call_inputs();
    call.d_out = problem.template rows_of<const T>(d_out.data.get());
    call.d_row = d_row.data.get();
    call.out = problem.template rows_of<const T>(out.data.get());
    call.row = row.data.get();
    call.dq = problem.template rows_of<T>(grads[kQ].data.get());
    call.dk = problem.template rows_of<T>(grads[kK].data.get());
    call.dv = problem.template rows_of<T>(grads[kV].data.get());
    call.d_positions = grads[kX].data.get();
    call.d_radial = grads[kRadial].data.get();
    call.d_affine = grads[kMap].data.get();
    call.run_threads = run_threads;
    const Plan plan(call.inputs, Pass::kBackward, call.d_radial || call.d_affine);
    cpu::GEOT_ISA::attention_bwd(call, plan.schedule());
    return grads;
  }

  // Bits of `wanted` from kNumInputs on: those of d_out and of d_row.
  Results<T> second_backward(const Tensors<T>& dots, const Tensor<T>& d_out, const Tensor<T>& d_row,
                             int wanted) const {
    Results<T> grads;
    if (wanted >> kNumInputs & 1) grads.d_out = Tensor<T>(problem.size_of(kV));
    if (problem.shape.is_linear && wanted >> (kNumInputs + 1) & 1)
      grads.d_row = Tensor<T>(row.size);
    grads.inputs = make(wanted);
    cpu::SecondBackwardCall<T> call{};
    call.inputs = problem.call_inputs();
    call.q_dot = problem.template rows_of<const T>(dots[kQ].data.get());
    call.k_dot = problem.template rows_of<const T>(dots[kK].data.get());
    call.v_dot = problem.template rows_of<const T>(dots[kV].data.get());
    call.x_dot = dots[kX].data.get();
    call.radial_dot = dots[kRadial].data.get();
    call.affine_dot = dots[kMap].data.get();
    call.d_out = problem.template rows_of<const T>(d_out.data.get());
    call.d_row = d_row.data.get();
    call.out = problem.template rows_of<const T>(out.data.get());
    call.row = row.data.get();
    call.grad_d_out = problem.template rows_of<T>(grads.d_out.data.get());
    call.grad_d_row = grads.d_row.data.get();
    call.grad_q = problem.template rows_of<T>(grads.inputs[kQ].data.get());
    call.grad_k = problem.template rows_of<T>(grads.inputs[kK].data.get());
    call.grad_v = problem.template rows_of<T>(grads.inputs[kV].data.get());
    call.grad_positions = grads.inputs[kX].data.get();
    call.grad_radial = grads.inputs[kRadial].data.get();
    call.grad_affine = grads.inputs[kMap].data.get();
    call.run_threads = run_threads;
    const Plan plan(call.inputs, Pass::kSecondBackward, call.grad_radial || call.grad_affine);
    cpu::GEOT_ISA::attention_bwd_bwd(call, plan.schedule());
    return grads;
  }

 private:
  Tensors<T> make(int wanted) const {
    Tensors<T> grads;
    for (int n = 0; n < kNumInputs; ++n) {
      if (wanted >> n & 1) grads[n] = Tensor<T>(problem.size_of(n));
    }
    return grads;
  }
};

constexpr int kEverything = (1 << (kNumInputs + 2)) - 1;

template <class T>
Tensor<T> copy(const Tensor<T>& x) {
  Tensor<T> y(x.size);
  for (int64_t i = 0; i < x.size; ++i) y[i] = x[i];
  return y;
}

// <a, b> over what is there in a; NaN where a holds one.
template <class T>
double dot(const Tensor<T>& a, const Tensor<T>& b) {
  double sum = 0;
  for (int64_t i = 0; i < a.size; ++i) sum += a[i] == 0 ? 0 : double(a[i]) * b[i];
  return sum;
}

// Random numbers for the real rows of a tensor like input n; NaN in the others.
template <class T>
Tensor<T> draw_like(const Problem<T>& p, int n, bool packed_rows) {
  Tensor<T> x(p.size_of(n));
  x.draw(1);
  for (int64_t i = 0; packed_rows && i < x.size; ++i) {
    if (!p.is_real(i / p.row_size(n))) x[i] = T(kNaN);
  }
  return x;
}
template <class T>
Tensor<T> draw_rows(const Problem<T>& p) {
  Tensor<T> x(p.num_rows * p.shape.heads);
  x.draw(1);
  for (int64_t i = 0; i < x.size; ++i) x[i] = p.is_real(i / p.shape.heads) ? x[i] : T(kNaN);
  return x;
}

// Everything a problem's two backward passes are given.
template <class T>
struct Cotangents {
  Tensor<T> d_out, d_row;
  Tensors<T> dots;

  explicit Cotangents(const Problem<T>& p) : d_out(draw_like(p, kV, true)) {
    if (p.shape.is_linear) d_row = draw_rows(p);
    for (int n = 0; n < kNumInputs; ++n) dots[n] = draw_like(p, n, n <= kX);
  }
};

template <class T>
double project(const Problem<T>& p, const Cotangents<T>& c) {
  const Run<T> run(p);
  return dot(run.out, c.d_out) + (p.shape.is_linear ? dot(run.row, c.d_row) : 0);
}
template <class T>
double project_gradient(const Problem<T>& p, const Cotangents<T>& c) {
  const Tensors<T> grads = Run<T>(p).backward(c.d_out, c.d_row, kEverything);
  double sum = 0;
  for (int n = 0; n < kNumInputs; ++n) sum += dot(grads[n], c.dots[n]);
  return sum;
}

// <gradient of `function` by input n, direction> by differences.
template <class T, class Function>
double difference(Problem<T>& p, int n, const Tensor<T>& direction, Function function) {
  constexpr double h = 1e-5;
  const Tensor<T> before = copy(p.inputs[n]);
  double values[2];
  for (int side = 0; side < 2; ++side) {
    for (int64_t i = 0; i < before.size; ++i) {
      p.inputs[n][i] = before[i] + (side ? h : -h) * direction[i];
    }
    values[side] = function();
  }
  for (int64_t i = 0; i < before.size; ++i) p.inputs[n][i] = before[i];
  return (values[1] - values[0]) / (2 * h);
}

// Two atoms at one point stay there: a distance has a cusp at 0.
template <class T>
Tensor<T> smooth_direction(const Problem<T>& p, int n) {
  Tensor<T> x = draw_like(p, n, n <= kX);
  for (size_t b = 0, i = 0; n == kX && b < p.shape.sizes.size(); i += p.shape.sizes[b++]) {
    for (int a = 0; p.shape.sizes[b] > 4 && a < 3; ++a) {
      x[3 * p.rows[i + 1] + a] = x[3 * p.rows[i] + a];
    }
  }
  return x;
}

template <class T>
void check_padding(const Problem<T>& p, const Tensor<T>& x) {
  for (int64_t row = 0; x.size && row < p.num_rows; ++row) {
    const int64_t size = x.size / p.num_rows;
    for (int64_t i = 0; !p.is_real(row) && i < size; ++i) CHECK(x[row * size + i] == 0);
  }
}

void test_forward_against_loops(const Shape& shape) {
  const Problem<double> p(shape);
  const Run<double> run(p);
  Tensor<double> out(run.out.size), row(run.row.size);
  p.forward(out, row);
  for (int64_t i = 0; i < out.size; ++i) CHECK_NEAR(run.out[i], out[i], 1e-11);
  for (int64_t i = 0; i < row.size; ++i) CHECK_NEAR(run.row[i], row[i], 1e-11);
}

void test_backward_against_differences(const Shape& shape) {
  Problem<double> p(shape, true);
  const Cotangents<double> c(p);
  const Run<double> run(p);
  const Tensors<double> grads = run.backward(c.d_out, c.d_row, kEverything);
  for (int n = 0; n < kNumInputs; ++n) {
    const Tensor<double> direction = smooth_direction(p, n);
    const double expected = difference(p, n, direction, [&] { return project(p, c); });
    CHECK_NEAR(dot(grads[n], direction), expected, 1e-6);
    if (n <= kX) check_padding(p, grads[n]);
  }
}

void test_second_backward_against_differences(const Shape& shape) {
  Problem<double> p(shape, true);
  Cotangents<double> c(p);
  c.dots[kX] = smooth_direction(p, kX);
  const Results<double> grads =
      Run<double>(p).second_backward(c.dots, c.d_out, c.d_row, kEverything);
  const double psi = project_gradient(p, c);  // linear in what comes in
  CHECK_NEAR(dot(grads.d_out, c.d_out) + dot(grads.d_row, c.d_row), psi, 1e-9);
  for (int n = 0; n < kNumInputs; ++n) {
    const Tensor<double> direction = smooth_direction(p, n);
    const double expected = difference(p, n, direction, [&] { return project_gradient(p, c); });
    CHECK_NEAR(dot(grads.inputs[n], direction), expected, 1e-5);
    if (n <= kX) check_padding(p, grads.inputs[n]);
  }
  check_padding(p, grads.d_out);
  check_padding(p, grads.d_row);
}

template <class T>
void check_same(const Tensor<T>& got, const Tensor<T>& whole, double tolerance) {
  double largest = 1;
  for (int64_t i = 0; i < whole.size; ++i) largest = std::max(largest, std::abs(double(whole[i])));
  for (int64_t i = 0; i < got.size; ++i) {
    CHECK(std::abs(double(got[i]) - double(whole[i])) <= tolerance * largest);
  }
}

// Any results may be left out, and tangents that are 0.
template <class T>
void test_parts_against_the_whole(const Shape& shape, int rounds) {
  const Problem<T> p(shape);
  const Run<T> run(p);
  const double tolerance = 1000 * std::numeric_limits<T>::epsilon();
  for (int round = 0; round < rounds; ++round) {
    Cotangents<T> zeros(p), fewer(p);
    const int wanted = int(generator() & kEverything), there = int(generator() & kEverything);
    for (int n = 0; n < kNumInputs; ++n) {
      zeros.dots[n] = copy(fewer.dots[n]);
      if (there >> n & 1) continue;
      for (int64_t i = 0; i < zeros.dots[n].size; ++i) zeros.dots[n][i] = 0;
      fewer.dots[n] = Tensor<T>();
    }
    zeros.d_out = copy(fewer.d_out);
    zeros.d_row = copy(fewer.d_row);
    if (!(there >> kNumInputs & 1)) {
      for (int64_t i = 0; i < zeros.d_out.size; ++i) zeros.d_out[i] = 0;
      fewer.d_out = Tensor<T>();
    }
    const Tensors<T> a = run.backward(zeros.d_out, zeros.d_row, kEverything);
    const Tensors<T> b = run.backward(fewer.d_out, fewer.d_row, wanted);
    for (int n = 0; n < kNumInputs; ++n) check_same(b[n], a[n], tolerance);
    if (shape.radial == kGaussians) continue;  // their second backward is not here
    const auto c = run.second_backward(zeros.dots, zeros.d_out, zeros.d_row, kEverything);
    const auto d = run.second_backward(fewer.dots, fewer.d_out, fewer.d_row, wanted);
    for (int n = 0; n < kNumInputs; ++n) check_same(d.inputs[n], c.inputs[n], tolerance);
    check_same(d.d_out, c.d_out, tolerance);
    check_same(d.d_row, c.d_row, tolerance);
  }
}

template <class T>
bool same_bits(const Tensor<T>& a, const Tensor<T>& b) {
  return a.size == b.size &&
         (a.size == 0 || !std::memcmp(a.data.get(), b.data.get(), a.size * sizeof(T)));
}

template <class T>
void test_threads_against_one(const Shape& shape, int fewest) {
  const Problem<T> p(shape);
  const Cotangents<T> c(p);
  const Run<T> first(p);
  const Tensors<T> grads = first.backward(c.d_out, c.d_row, kEverything);
  const bool twice = shape.radial != kGaussians;
  Results<T> second;
  if (twice) second = first.second_backward(c.dots, c.d_out, c.d_row, kEverything);
  for (num_threads = fewest; num_threads <= 4; ++num_threads) {
    const Run<T> run(p);
    CHECK(same_bits(run.out, first.out) && same_bits(run.row, first.row));
    const Tensors<T> again = run.backward(c.d_out, c.d_row, kEverything);
    for (int n = 0; n < kNumInputs; ++n) CHECK(same_bits(again[n], grads[n]));
    if (!twice) continue;
    const Results<T> more = run.second_backward(c.dots, c.d_out, c.d_row, kEverything);
    for (int n = 0; n < kNumInputs; ++n) CHECK(same_bits(more.inputs[n], second.inputs[n]));
    CHECK(same_bits(more.d_out, second.d_out) && same_bits(more.d_row, second.d_row));
  }
  num_threads = 1;
}

// body(shape of every variant), with the sizes that `make` names.
template <class Body>
void for_variants(Body body) {
  for (const bool is_filter : {false, true}) {
    for (const bool is_linear : {false, true}) {
      for (const int radial : {kTable, kPairTables, kAffine, kGaussians}) {
        if (is_filter && radial == kGaussians) continue;
        Shape shape{{}, 0, 0, is_linear != is_filter, is_filter, is_linear, radial};
        body(shape);
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

void test_values() {
  for_variants([](const Shape& variant) {
    Shape shape = with(variant, {7, 0, 1, 9, 2, 17}, 3, 5);
    for (const bool is_packed : {false, true}) {
      shape.is_packed = is_packed;
      test_forward_against_loops(shape);
      test_backward_against_differences(shape);
      if (variant.radial != kGaussians) test_second_backward_against_differences(shape);
      test_parts_against_the_whole<float>(shape, 3);
    }
    test_parts_against_the_whole<double>(with(variant, {33, 8}, 9, 3), 2);
    test_forward_against_loops(with(variant, {31, 32, 33}, 2, 16));
    const Shape chunks = with(variant, {70, 5}, 1, 3);
    test_forward_against_loops(chunks);
    test_backward_against_differences(chunks);
    if (variant.radial != kGaussians) test_second_backward_against_differences(chunks);
    test_forward_against_loops(with(variant, {}, 2, 3));
    test_parts_against_the_whole<float>(with(variant, {0, 0}, 2, 3), 1);
    test_parts_against_the_whole<float>(with(variant, {1}, 1, 1), 1);
  });
  for (const int64_t channels : {2, 8, 12, 16, 24, 32, 48, 64, 80, 128}) {
    const Shape bias{{9, 3}, 2, channels, false, false, false, kTable};
    const Shape filter{{9, 3}, 2, channels, true, true, true, kTable};
    for (const Shape& shape : {bias, filter}) {
      test_forward_against_loops(shape);
      test_backward_against_differences(shape);
      test_second_backward_against_differences(shape);
      test_parts_against_the_whole<float>(shape, 1);
    }
  }
}

void test_threads(int fewest) {
  for_variants([&](const Shape& variant) {
    test_threads_against_one<float>(with(variant, {150, 70}, 2, 4), fewest);
    test_threads_against_one<double>(with(variant, {30, 20, 25, 9, 30, 30, 9, 30, 30}, 9, 4),
                                     fewest);
  });
  const Shape large{{300, 3, 3, 3, 3, 3, 3, 280}, 1, 4, true, false, false, kAffine};
  test_threads_against_one<float>(large, fewest);
}

int run_all(const std::string& part) {
  if (part != "threads") test_values();
  test_threads(part == "threads" ? 4 : 2);
  return summary();
}

}  // namespace
}  // namespace geot::test

int main(int count, char** arguments) {
  return geot::test::run_all(count > 1 ? arguments[1] : "all");
}
