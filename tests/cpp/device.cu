// The headers of csrc/common on a device: that they compile there, in float and double.
#include "common/geometry.h"
#include "common/normalizer.h"
#include "common/score.h"
#include "common/spline.h"

namespace geot {
template <>
struct Math<float> {
  static __device__ float sqrt(float x) { return ::sqrtf(x); }
  static __device__ float exp(float x) { return ::expf(x); }
};
template <>
struct Math<double> {
  static __device__ double sqrt(double x) { return ::sqrt(x); }
  static __device__ double exp(double x) { return ::exp(x); }
};

template <class T, class Normalizer>
__global__ void every_function(const T* in, Grid<T> grid, T* out) {
  const Vector3<T> x{in[0], in[1], in[2]}, x_dot{in[3], in[4], in[5]};
  const T dist = distance(x - x_dot), per_dist = inverse_distance(dist);
  const Vector3<T> u = (x + x_dot) * per_dist;
  const T z = grid.coordinate(dist), t = z - int(grid.in_range(z));
  const Knots<T> knots{in[6], in[7], in[8], in[9]};
  const Weights<T> weights = weights_of_value(t), slopes = weights_of_slope(t);
  const T f = value(knots, weights), slope = derivative(knots, slopes);
  const T z_dot = coordinate_tangent(in[10], u.dot(x_dot), in[11], dist, in[12]);
  const FilterChannel<T> channel{in[13], in[14], in[15], in[16]};
  const T s = channel.term(f);
  const T s_dot = channel.term_tangent(f, slope * z_dot);
  const T p = Normalizer::weight(s, in[17]), e = Normalizer::score_gradient(p, in[18]);
  const T g = Normalizer::second(s_dot, in[18], in[19], in[20]);
  const T s_bar = Normalizer::score_second_gradient(p, g, in[21]);
  Knots<T> to{};
  pull_value(to, weights, e);
  pull_derivative(to, slopes, s_bar);
  const Vector3<T> w =
      second_force(in[10], in[11], channel.pull_second(e, s_bar), channel.pull(e), per_dist, u,
                   x_dot, z_dot) +
      force(derivative(knots, weights_of_curvature(t)) * grid.slope_of_coordinate(dist), u);
  out[0] = to.y0 + to.s0 + to.y1 + to.s1 + w.x + w.y + w.z;
  out[1] = Normalizer::weight_tangent(p, s_dot, in[19]) +
           filter_pull_second(e, s_bar, in[22], in[23], in[24], in[25]);
}

template __global__ void every_function<float, Softmax>(const float*, Grid<float>, float*);
template __global__ void every_function<double, Softmax>(const double*, Grid<double>, double*);
template __global__ void every_function<float, Linear>(const float*, Grid<float>, float*);
template __global__ void every_function<double, Linear>(const double*, Grid<double>, double*);
}  // namespace geot
