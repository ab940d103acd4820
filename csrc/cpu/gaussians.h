// A sum of Gaussians, f_h(z) = Σ_k w_hk φ_k with φ_k = exp(-γ_k (z - μ_k)²), at a block's pairs:
// exact, with no table, K exponentials a pair (MATH.md section 5). Values, slopes and the first
// adjoint; the second backward pass goes through plain PyTorch.
#pragma once

#include "pairs.h"

namespace geot::cpu::GEOT_ISA {

template <class T>
class BiasGaussians {
 public:
  BiasGaussians(Arena& arena, const Inputs<T>& inputs, bool, bool sums_gradient)
      : num_gaussians_(inputs.radial.num_gaussians),
        centers_(inputs.radial.data),
        gammas_(centers_ + num_gaussians_),
        weights_(gammas_ + num_gaussians_) {
    if (sums_gradient) sums_ = arena.take<T>((2 + kHeads) * num_gaussians_ * kWidth<T>);
  }

  void select(Group group, const T*) { group_ = group; }
  void begin_gradient() {
    std::memset(static_cast<void*>(sums_), 0,
                (2 + kHeads) * num_gaussians_ * kWidth<T> * sizeof(T));
  }
  // The part is zeros, or what other jobs have added.
  void add_gradient_to(T* d_radial, Into) const {
    for (int64_t k = 0; k < num_gaussians_; ++k) {
      d_radial[k] += sum_of(load<V>(sum(0, k)));
      d_radial[num_gaussians_ + k] += sum_of(load<V>(sum(1, k)));
      for (int64_t h = 0; h < group_.count; ++h) {
        d_radial[(2 + group_.first + h) * num_gaussians_ + k] += sum_of(load<V>(sum(2 + h, k)));
      }
    }
  }

  void values(const Pairs<T>& pairs, const Block& block, PairsOfHeads<T>& f) {
    evaluate<false>(pairs, block, f, f);
  }
  void values_and_slopes(const Pairs<T>& pairs, const Block& block, PairsOfHeads<T>& f,
                         PairsOfHeads<T>& slope) {
    evaluate<true>(pairs, block, f, slope);
  }
  void tangents(const Pairs<T>&, const Block&, bool, PairsOfHeads<T>&, PairsOfHeads<T>&) {}
  void pull_second(const Pairs<T>&, const Block&, const PairsOfHeads<T>&, const PairsOfHeads<T>&) {}

  // dw_hk = Σ g_h φ_k,  dμ_k = Σ g·w_k 2γ_k (z-μ_k) φ_k,  dγ_k = -Σ g·w_k (z-μ_k)² φ_k
  void pull(const Pairs<T>& pairs, const Block& block, const PairsOfHeads<T>& g) {
    for_each_vector<T>(block, [&](int64_t, int64_t n, int64_t at) {
      const V z = load<V>(pairs.z + at);
      V g_here[kHeads];  // 0 in lanes that are no atom, whatever z is there
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) {
        g_here[h] = h < group_.count ? only_atoms(load<V>(g[h] + at), block, n) : V{};
      }
      for (int64_t k = 0; k < num_gaussians_; ++k) {
        const Gaussian phi = gaussian(z, k);
        V gw{};
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
          if (h >= group_.count) break;
          gw += g_here[h] * weight(h, k);
          add(2 + h, k, g_here[h] * phi.value);
        }
        add(0, k, gw * (2 * gammas_[k]) * phi.first_moment);
        add(1, k, -gw * (phi.apart * phi.first_moment));
      }
    });
  }

 private:
  using V = Vec<T>;

  struct Gaussian {
    V apart, value, first_moment;  // z - μ, φ, (z - μ) φ
  };
  GEOT_INLINE Gaussian gaussian(V z, int64_t k) const {
    const V apart = z - centers_[k];
    const V value = exp_of(-gammas_[k] * (apart * apart));
    return {apart, value, apart * value};
  }
  GEOT_INLINE T weight(int64_t h, int64_t k) const {
    return weights_[(group_.first + h) * num_gaussians_ + k];
  }
  GEOT_INLINE T* sum(int64_t which, int64_t k) const {
    return sums_ + (which * num_gaussians_ + k) * kWidth<T>;
  }
  GEOT_INLINE void add(int64_t which, int64_t k, V x) {
    store(sum(which, k), load<V>(sum(which, k)) + x);
  }
  static GEOT_INLINE V only_atoms(V x, const Block& block, int64_t n) {
    const auto lane = lane_numbers<V>() + Integer<T>(n * kWidth<T>);
    return lane < Integer<T>(block.tile.rows) ? x : V{};
  }

  template <bool kSlope>
  GEOT_INLINE void evaluate(const Pairs<T>& pairs, const Block& block, PairsOfHeads<T>& f,
                            PairsOfHeads<T>& slope) const {
    for_each_vector<T>(block, [&](int64_t, int64_t, int64_t at) {
      const V z = load<V>(pairs.z + at);
      V value[kHeads] = {}, rise[kHeads] = {};
      for (int64_t k = 0; k < num_gaussians_; ++k) {
        const Gaussian phi = gaussian(z, k);
        const V derivative = phi.first_moment * (-2 * gammas_[k]);
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
          if (h >= group_.count) break;
          value[h] += weight(h, k) * phi.value;
          if constexpr (kSlope) rise[h] += weight(h, k) * derivative;
        }
      }
      for (int64_t h = 0; h < group_.count; ++h) {
        store(f[h] + at, value[h]);
        if constexpr (kSlope) store(slope[h] + at, rise[h]);
      }
    });
  }

  const int64_t num_gaussians_;
  const T *centers_, *gammas_, *weights_;
  Group group_{};
  T* sums_ = nullptr;  // [2 + heads, K, lanes]: of μ, γ, w
};

}  // namespace geot::cpu::GEOT_ISA
