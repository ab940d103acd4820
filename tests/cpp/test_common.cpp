// The headers of csrc/common against differences and the formulas of docs/math.md, and the SIMD
// vectors of csrc/cpu: scalars and vectors, float and double.
#include <cstdlib>
#include <functional>
#include <limits>
#include <vector>

#include "check.h"
#include "common/geometry.h"
#include "common/normalizer.h"
#include "common/score.h"
#include "common/spline.h"
#include "cpu/simd.h"

namespace geot {
template <>
struct Math<float> {
  static float sqrt(float x) { return std::sqrt(x); }
  static float exp(float x) { return std::exp(x); }
};
template <>
struct Math<double> {
  static double sqrt(double x) { return std::sqrt(x); }
  static double exp(double x) { return std::exp(x); }
};
}  // namespace geot

namespace geot::test {
namespace {

using cpu::GEOT_ISA::kElements;
using cpu::GEOT_ISA::load;
using cpu::GEOT_ISA::store;
using cpu::GEOT_ISA::Vec;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A scalar or vector of random numbers, and its last element.
template <class V>
V draw(double low = -2, double high = 2) {
  V x{};
  if constexpr (std::is_floating_point_v<V>) {
    x = V(uniform(low, high));
  } else {
    for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = uniform(low, high);
  }
  return x;
}
template <class V>
double last(V x) {
  if constexpr (std::is_floating_point_v<V>) {
    return x;
  } else {
    return x[sizeof(V) / sizeof(x[0]) - 1];
  }
}
template <class V>
using Scalar = std::remove_cvref_t<decltype(last(V{}))>;

double difference(const std::function<double(double)>& f, double x, double h = 1e-5) {
  return (f(x + h) - f(x - h)) / (2 * h);
}

template <class V, class T>
void test_spline() {
  const double tolerance = 64 * std::numeric_limits<T>::epsilon();
  for (const double at : {0.0, 0.25, 0.6, 1.0}) {
    const Knots<V> k{draw<V>(), draw<V>(), draw<V>(), draw<V>()};
    const T t = T(at);
    const double y0 = last(k.y0), s0 = last(k.s0), y1 = last(k.y1), s1 = last(k.s1);
    const auto hermite = [&](double x) {
      return (1 + 2 * x) * (1 - x) * (1 - x) * y0 + x * (1 - x) * (1 - x) * s0 +
             x * x * (3 - 2 * x) * y1 + x * x * (x - 1) * s1;
    };
    const auto hermite_slope = [&](double x) { return difference(hermite, x, 1e-4); };
    const Weights<T> weights = weights_of_value(t), slopes = weights_of_slope(t);
    const double f = last(value(k, weights)), slope = last(derivative(k, slopes));
    const double curvature = last(derivative(k, weights_of_curvature(t)));
    CHECK_NEAR(f, hermite(t), tolerance);
    CHECK_NEAR(slope, hermite_slope(t), tolerance + 1e-7);
    CHECK_NEAR(curvature, difference(hermite_slope, t, 1e-4), tolerance + 1e-5);
    CHECK_NEAR(last(value(k, weights_of_value(V{} + t))), f, tolerance);
    if (at == 0) CHECK(f == y0 && slope == s0);
    if (at == 1) CHECK_NEAR(slope, s1, tolerance);

    const V g = draw<V>(), g_dot = draw<V>();
    Knots<V> to{draw<V>(), draw<V>(), draw<V>(), draw<V>()};
    const auto weigh = [&] {
      return last(to.y0) * y0 + last(to.s0) * s0 + last(to.y1) * y1 + last(to.s1) * s1;
    };
    const double before = weigh();
    pull_value(to, weights, g);
    CHECK_NEAR(weigh() - before, last(g) * f, tolerance);
    pull_derivative(to, slopes, g_dot);
    CHECK_NEAR(weigh() - before, last(g) * f + last(g_dot) * slope, tolerance);
  }
}

template <class V, class T>
void test_grid() {
  for (const int intervals : {1, 2, 1024}) {
    const Grid<T> grid = Grid<T>::make(0.5, 6.5, intervals);
    const double per_h = intervals / 6.0;
    const auto coordinate = [&](double z) { return last(grid.coordinate(V{} + T(z))); };
    const auto interval = [&](double u) { return int(last(grid.in_range(V{} + T(u)))); };
    const auto slope = [&](double z) { return last(grid.slope_of_coordinate(V{} + T(z))); };
    CHECK(coordinate(0.5) == 0 && coordinate(6.5) == intervals);
    CHECK(coordinate(0.4) == 0 && coordinate(-kInfinity) == 0);
    CHECK(coordinate(6.6) == intervals && coordinate(kInfinity) == intervals);
    CHECK(coordinate(1e30) == intervals && coordinate(-1e30) == 0);
    CHECK(std::isnan(coordinate(kNaN)));
    CHECK_NEAR(coordinate(2.0), 1.5 * per_h, 8 * std::numeric_limits<T>::epsilon());
    for (const double u : {0.0, 0.5, intervals - 0.5, double(intervals), kNaN, kInfinity, -1.0}) {
      CHECK(interval(u) >= 0 && interval(u) < intervals);
    }
    CHECK(interval(intervals) == intervals - 1 && interval(0.99) == 0);
    CHECK(interval(kNaN) == 0);
    for (const double z : {0.5, 3.0, 6.5}) CHECK(slope(z) == T(per_h));
    for (const double z : {0.4999, 6.5001, -kInfinity, kInfinity}) CHECK(slope(z) == 0);
    CHECK(slope(kNaN) == 0);
  }
}

template <class V, class T>
void test_geometry() {
  const double tolerance = 256 * std::numeric_limits<T>::epsilon() + 1e-8;
  const Vector3<V> zero{};
  CHECK(last(distance(zero)) == 0 && last(inverse_distance(V{})) == 0);
  CHECK(last((zero * inverse_distance(distance(zero))).x) == 0);
  const Vector3<V> x{draw<V>(), draw<V>(), draw<V>()}, x_dot{draw<V>(), draw<V>(), draw<V>()};
  const V m = draw<V>(), c = draw<V>(), m_dot = draw<V>(), c_dot = draw<V>();
  const V b = draw<V>(), e = draw<V>();
  const V d = distance(x), per_d = inverse_distance(d);
  const Vector3<V> u = x * per_d;
  const double dist = std::hypot(last(x.x), last(x.y), last(x.z));
  CHECK_NEAR(last(d), dist, tolerance);
  CHECK_NEAR(last(per_d), 1 / dist, tolerance);

  // b z + e ż and its gradient, by differences along each axis.
  const double a[3] = {last(x.x), last(x.y), last(x.z)};
  const double a_dot[3] = {last(x_dot.x), last(x_dot.y), last(x_dot.z)};
  const auto psi = [&](int axis, double at, bool tangent_only) {
    double y[3] = {a[0], a[1], a[2]};
    y[axis] = at;
    const double r = std::hypot(y[0], y[1], y[2]);
    const double r_dot = (y[0] * a_dot[0] + y[1] * a_dot[1] + y[2] * a_dot[2]) / r;
    const double z_dot = last(m) * r_dot + last(m_dot) * r + last(c_dot);
    return tangent_only ? z_dot : last(b) * (last(m) * r + last(c)) + last(e) * z_dot;
  };
  const V d_dot = u.dot(x_dot);
  CHECK_NEAR(last(coordinate_tangent(m, d_dot, m_dot, d, c_dot)), psi(0, a[0], true), tolerance);
  const Vector3<V> w = second_force(m, m_dot, b, e, per_d, u, x_dot, d_dot);
  const double got[3] = {last(w.x), last(w.y), last(w.z)};
  for (int axis = 0; axis < 3; ++axis) {
    const auto along = [&](double at) { return psi(axis, at, false); };
    CHECK_NEAR(got[axis], difference(along, a[axis]), tolerance * 4);
  }
  const Vector3<V> f = force(b, u);
  CHECK_NEAR(last(f.y), last(b) * a[1] / dist, tolerance);
}

// A row of scores and its tangent: E and S̄ are the derivatives of Σ Ṗ A + P Ȧ.
template <class Normalizer, class V, class T>
void test_normalizer() {
  constexpr int kKeys = 5;
  const double tolerance = 256 * std::numeric_limits<T>::epsilon() + 1e-8;
  std::vector<V> s, s_dot, a, a_dot;
  for (int j = 0; j < kKeys; ++j) {
    for (auto* x : {&s, &s_dot, &a, &a_dot}) x->push_back(draw<V>());
  }
  const auto psi = [&](int which, int at, double value) {
    double x[2][kKeys], p[kKeys], sum = 0, rho = 0, total = 0;
    for (int j = 0; j < kKeys; ++j) x[0][j] = last(s[j]), x[1][j] = last(s_dot[j]);
    x[which][at] = value;
    for (int j = 0; j < kKeys; ++j) sum += std::exp(x[0][j]);
    for (int j = 0; j < kKeys; ++j) {
      p[j] = Normalizer::kIsLinear ? x[0][j] : std::exp(x[0][j]) / sum;
      rho += p[j] * x[1][j];
    }
    for (int j = 0; j < kKeys; ++j) {
      const double p_dot = Normalizer::kIsLinear ? x[1][j] : p[j] * (x[1][j] - rho);
      total += p_dot * last(a[j]) + p[j] * last(a_dot[j]);
    }
    return total;
  };
  V log_sum{}, delta{}, rho{}, epsilon{};
  if constexpr (!Normalizer::kIsLinear) {
    for (int j = 0; j < kKeys; ++j) log_sum += Math<V>::exp(s[j]);
    if constexpr (std::is_floating_point_v<V>) {
      log_sum = std::log(log_sum);
    } else {
      log_sum = cpu::GEOT_ISA::log_of(log_sum);
    }
    for (int j = 0; j < kKeys; ++j) delta += Normalizer::weight(s[j], log_sum) * a[j];
    for (int j = 0; j < kKeys; ++j) rho += Normalizer::weight(s[j], log_sum) * s_dot[j];
    for (int j = 0; j < kKeys; ++j) {
      epsilon += Normalizer::weight(s[j], log_sum) *
                 Normalizer::second(s_dot[j], a[j] - delta, rho, a_dot[j]);
    }
  }
  V total{};
  for (int j = 0; j < kKeys; ++j) {
    const V p = Normalizer::weight(s[j], log_sum), shifted = a[j] - delta;
    const V e = Normalizer::score_gradient(p, shifted);
    const V g = Normalizer::second(s_dot[j], shifted, rho, a_dot[j]);
    const V s_bar = Normalizer::score_second_gradient(p, g, epsilon);
    total += Normalizer::weight_tangent(p, s_dot[j], rho) * a[j] + p * a_dot[j];
    CHECK_NEAR(last(s_bar), difference([&](double x) { return psi(0, j, x); }, last(s[j])),
               tolerance);
    CHECK_NEAR(last(e), difference([&](double x) { return psi(1, j, x); }, last(s_dot[j])),
               tolerance);
  }
  CHECK_NEAR(last(total), psi(0, 0, last(s[0])), tolerance);
}

// One channel: every function is a derivative of e Ṡ + s̄ S.
template <class V, class T>
void test_filter() {
  const double tolerance = 64 * std::numeric_limits<T>::epsilon() + 1e-8;
  const FilterChannel<V> x{draw<V>(), draw<V>(), draw<V>(), draw<V>()};
  const V f = draw<V>(), f_dot = draw<V>();
  const T e = draw<T>(), s_bar = draw<T>();
  const double q = last(x.q), k = last(x.k), q_dot = last(x.q_dot), k_dot = last(x.k_dot);
  const auto s = [&](double q_, double k_, double f_) { return q_ * k_ * f_; };
  const auto s_tangent = [&](double q_, double k_, double f_, double f_dot_) {
    return difference([&](double h) { return s(q_ + h * q_dot, k_ + h * k_dot, f_ + h * f_dot_); },
                      0, 1e-4);
  };
  const auto psi = [&](double q_, double k_, double f_, double f_dot_) {
    return e * s_tangent(q_, k_, f_, f_dot_) + s_bar * s(q_, k_, f_);
  };
  const double at = last(f), at_dot = last(f_dot);
  CHECK_NEAR(last(x.term(f)), s(q, k, at), tolerance);
  CHECK_NEAR(last(x.term_tangent(f, f_dot)), s_tangent(q, k, at, at_dot), tolerance + 1e-7);
  const auto by = [&](auto along, double place, double got) {
    CHECK_NEAR(got, difference(along, place, 1e-4), tolerance + 1e-6);
  };
  by([&](double y) { return psi(q, k, y, at_dot); }, at, last(x.pull_second(e, s_bar)));
  by([&](double y) { return psi(q, k, at, y); }, at_dot, last(x.pull(e)));
  by([&](double y) { return psi(y, k, at, at_dot); }, q,
     last(filter_pull_second(e, s_bar, x.k, x.k_dot, f, f_dot)));
  by([&](double y) { return psi(q, y, at, at_dot); }, k,
     last(filter_pull_second(e, s_bar, x.q, x.q_dot, f, f_dot)));
}

template <class V, class T>
void test_formulas() {
  for (int n = 0; n < 50; ++n) {
    test_spline<V, T>();
    test_geometry<V, T>();
    test_normalizer<Softmax, V, T>();
    test_normalizer<Linear, V, T>();
    test_filter<V, T>();
  }
  test_grid<V, T>();
}

template <class T>
void test_vectors() {
  using V = Vec<T>;
  constexpr int W = kElements<V>;
  const double tolerance = 4 * std::numeric_limits<T>::epsilon();
  V rows[W], turned[W];
  for (int i = 0; i < W; ++i) rows[i] = turned[i] = draw<V>();
  cpu::GEOT_ISA::transpose(turned);
  V summed[W];
  for (int i = 0; i < W; ++i) summed[i] = rows[i];
  const V sums = cpu::GEOT_ISA::sums_of(summed);
  for (int i = 0; i < W; ++i) {
    double sum = 0;
    for (int j = 0; j < W; ++j) {
      CHECK(turned[i][j] == rows[j][i]);
      sum += rows[i][j];
    }
    CHECK_NEAR(sums[i], sum, W * tolerance);
    CHECK_NEAR(cpu::GEOT_ISA::sum_of(rows[i]), sum, W * tolerance);
    CHECK(cpu::GEOT_ISA::lane_numbers<V>()[i] == i);
  }
  if constexpr (W >= 8) {
    V fewer[W / 2];
    for (int i = 0; i < W / 2; ++i) fewer[i] = rows[i];
    const V some = cpu::GEOT_ISA::sums_of(fewer);
    for (int i = 0; i < W / 2; ++i) CHECK_NEAR(some[i], sums[i], W * tolerance);
  }
  std::vector<T> memory(3 * W + 1, 7);
  store<V>(memory.data() + W + 1, rows[0]);  // at any address
  CHECK(last(load<V>(memory.data() + W + 1)) == rows[0][W - 1]);
  CHECK(memory[W] == 7 && memory[2 * W + 1] == 7);

  const auto exp = [](double x) { return last(cpu::GEOT_ISA::exp_of(V{} + T(x))); };
  const auto log = [](double x) { return last(cpu::GEOT_ISA::log_of(V{} + T(x))); };
  const double lowest = sizeof(T) == 4 ? -87 : -708;
  for (int n = 0; n < 20000; ++n) {
    const T x = T(uniform(lowest, -lowest));
    const double expected = std::exp(double(x));
    CHECK_NEAR(exp(x) / expected, 1, tolerance);
    const T y = T(std::exp(uniform(lowest, -lowest)));
    CHECK_NEAR(log(y), std::log(double(y)), tolerance);
  }
  CHECK(exp(0) == 1 && exp(-1e30) == 0 && exp(-kInfinity) == 0);
  CHECK(exp(1e30) == kInfinity && exp(kInfinity) == kInfinity);
  CHECK(std::isnan(exp(kNaN)) && std::isnan(log(kNaN)));
  CHECK(log(1) == 0 && log(kInfinity) == kInfinity);
}

int run_all() {
  test_formulas<double, double>();
  test_formulas<float, float>();
  test_formulas<Vec<double>, double>();
  test_formulas<Vec<float>, float>();
  test_vectors<double>();
  test_vectors<float>();
  return summary();
}

}  // namespace
}  // namespace geot::test

int main() { return geot::test::run_all(); }
