// What the C++ tests need: checks that count, random numbers, a summary.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>

inline int failures = 0, checks = 0;

#define CHECK(condition)                                          \
  do {                                                            \
    ++checks;                                                     \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      if (++failures >= 20) std::exit(1);                         \
    }                                                             \
  } while (false)

// |got - expected| within `tolerance`, relative to `expected` where that is larger than 1.
#define CHECK_NEAR(got, expected, tolerance)                                                  \
  do {                                                                                        \
    const double got_ = (got), expected_ = (expected);                                        \
    ++checks;                                                                                 \
    if (!(std::abs(got_ - expected_) <= (tolerance) * std::fmax(1.0, std::abs(expected_)))) { \
      std::printf("%s:%d: %s is %.17g, expected %.17g\n", __FILE__, __LINE__, #got, got_,     \
                  expected_);                                                                 \
      if (++failures >= 20) std::exit(1);                                                     \
    }                                                                                         \
  } while (false)

inline std::mt19937_64 generator(0);

inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}
inline double normal() { return std::normal_distribution<double>()(generator); }

inline int summary() {
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
