// What csrc/cuda/platform.cuh gives to kernels, on the host: one thread of the operating system
// runs the threads of a block as fibers, block after block (emulator.cpp).
//
// Barriers and collectives are meetings of fibers. Shared memory has the size asked for and is
// filled with NaN before each block. Under ThreadSanitizer every CUDA thread is a thread of its
// own, ordered after others by barriers and by nothing else. Environment variables, read once:
//   GEOT_DROP_SYNC=file.cuh:12  the barrier of this line orders nothing (ThreadSanitizer), or is
//                               passed without waiting (otherwise)
//   GEOT_LIST_SYNC=1            prints at exit every GEOT_SYNC_*() that was passed
//   GEOT_SCHEDULE=reverse|N     last threads first; random order of this seed
//
// A kernel that waits in a loop for another block or thread never ends here.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define GEOT_DEVICE inline
#define GEOT_SYNC_BLOCK() ::geot::cuda::host::sync_block({__FILE__, __LINE__})
#define GEOT_SYNC_WARP() ::geot::cuda::host::sync_warp({__FILE__, __LINE__})

namespace geot {

template <class T>
struct HostMath {
  static T sqrt(T x) { return std::sqrt(x); }
  static T exp(T x) { return std::exp(x); }
  static T log(T x) { return std::log(x); }
  static T abs(T x) { return std::abs(x); }
  static T floor(T x) { return std::floor(x); }
};
template <>
struct Math<float> : HostMath<float> {};
template <>
struct Math<double> : HostMath<double> {};

namespace cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace host {

struct Site {
  const char* file = nullptr;
  int line = 0;
};

// a and b of mma() in float.
struct Operands {
  float a[8], b[4];
};

// The rows that a lane reads in load_transposed(): [matrix][low or high half].
struct Rows {
  uint64_t address[2][2];
};

void sync_block(Site site);
void sync_warp(Site site);
bool any_in_block(bool x, Site site);
unsigned ballot(bool x, Site site);
uint64_t shuffle(uint64_t bits, int source_lane, Site site);
uint64_t shuffle_xor(uint64_t bits, int lane_mask, Site site);
void multiply(float (&c)[4], const Operands& operands, Site site);
Rows exchange_rows(uint64_t row, Site site);

using Body = void (*)(const void* call, char* shared);
const char* launch(int64_t blocks, int threads, size_t shared_bytes, const void* call, Body body);

// A 16-bit number of kExponent and kMantissa bits, rounded to nearest even; NaN as the hardware
// writes it.
template <int kExponent, int kMantissa>
uint16_t narrow(double x) {
  static_assert(kExponent + kMantissa == 15);
  constexpr int kSmallest = 2 - (1 << (kExponent - 1));  // exponent of the smallest normal number
  constexpr uint64_t kInfinity = ((uint64_t{1} << kExponent) - 1) << kMantissa;
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 48 & 0x8000);
  const int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
  const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  if (exponent == 1024) return fraction ? 0x7fff : sign | static_cast<uint16_t>(kInfinity);
  const int raised = exponent > kSmallest ? exponent : kSmallest;
  const int shift = 52 - kMantissa + raised - exponent;
  if (shift > 53) return sign;  // below half of the smallest number, or zero
  const uint64_t mantissa = fraction | uint64_t{1} << 52, half = uint64_t{1} << (shift - 1);
  uint64_t rounded = mantissa >> shift;
  const uint64_t rest = mantissa - (rounded << shift);
  rounded += rest > half || (rest == half && rounded % 2 == 1);
  // A normal number's leading one adds 1 to the exponent, as does a carry.
  rounded += static_cast<uint64_t>(raised - kSmallest) << kMantissa;
  return sign | static_cast<uint16_t>(rounded < kInfinity ? rounded : kInfinity);
}

inline float widen(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, fraction = x.bits & 0x3ffu;
  const uint32_t exponent = x.bits >> 10 & 0x1fu;
  if (exponent == 0) {
    const float size = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -size : size;
  }
  const uint32_t raised = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | raised << 23 | fraction << 13);
}
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

template <class T>
uint64_t to_bits(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

template <class T>
void max_atomically(T* p, T x) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < x &&
         !__atomic_compare_exchange_n(p, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

}  // namespace host

// Where a collective is called, which its caller does not write.
#define GEOT_CALLED_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

int thread_index();
int num_threads();
int64_t block_index();
int64_t num_blocks();

template <class T>
T shuffle_xor(T x, int lane_mask, GEOT_CALLED_AT) {
  return host::from_bits<T>(host::shuffle_xor(host::to_bits(x), lane_mask, {file, line}));
}
template <class T>
T shuffle(T x, int source_lane, GEOT_CALLED_AT) {
  return host::from_bits<T>(host::shuffle(host::to_bits(x), source_lane, {file, line}));
}
inline unsigned ballot(bool x, GEOT_CALLED_AT) { return host::ballot(x, {file, line}); }
inline bool any_in_block(bool x, GEOT_CALLED_AT) { return host::any_in_block(x, {file, line}); }

inline unsigned add_shared(unsigned* p, unsigned x) {
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
inline void add_global(unsigned long long* p, unsigned long long x) {
  __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
inline void max_global(unsigned* p, unsigned x) { host::max_atomically(p, x); }
inline void max_global(unsigned long long* p, unsigned long long x) { host::max_atomically(p, x); }

template <class F, class T>
F convert(T x) {
  if constexpr (std::is_same_v<F, T>) {
    return x;
  } else if constexpr (std::is_same_v<F, Half>) {
    static_assert(std::is_floating_point_v<T>);
    return Half{host::narrow<5, 10>(x)};
  } else if constexpr (std::is_same_v<F, BFloat16>) {
    static_assert(std::is_floating_point_v<T>);
    return BFloat16{host::narrow<8, 7>(x)};
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<F>(x);
  } else {
    return static_cast<F>(host::widen(x));
  }
}

template <class T>
uint32_t pack(float low, float high) {
  return convert<T>(low).bits | uint32_t{convert<T>(high).bits} << 16;
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], GEOT_CALLED_AT) {
  host::Operands operands;
  for (int n = 0; n < 8; ++n) {
    operands.a[n] = host::widen(T{static_cast<uint16_t>(a[n / 2] >> 16 * (n % 2))});
  }
  for (int n = 0; n < 4; ++n) {
    operands.b[n] = host::widen(T{static_cast<uint16_t>(b[n / 2] >> 16 * (n % 2))});
  }
  host::multiply(c, operands, {file, line});
}

template <class T>
void load_transposed(uint32_t (&b)[2], const T* row, GEOT_CALLED_AT) {
  static_assert(sizeof(T) == 2);
  const host::Rows rows = host::exchange_rows(reinterpret_cast<uintptr_t>(row), {file, line});
  // The lane reads what it receives here, so that sanitizers see it.
  const int column = thread_index() % 32 / 4;
  for (int matrix = 0; matrix < 2; ++matrix) {
    const T low = reinterpret_cast<const T*>(rows.address[matrix][0])[column];
    const T high = reinterpret_cast<const T*>(rows.address[matrix][1])[column];
    b[matrix] = low.bits | uint32_t{high.bits} << 16;
  }
}

#undef GEOT_CALLED_AT

inline int64_t shared_limit(int /*device*/) { return 227 * 1024; }
inline int multiprocessors(int /*device*/) { return 4; }

// Null, or what went wrong; the text lives until this thread's next launch.
template <class Kernel>
const char* launch(int64_t blocks, int threads, size_t shared_bytes, int64_t /*stream*/,
                   const typename Kernel::Call& call) {
  static_assert(std::is_trivially_copyable_v<typename Kernel::Call>);
  static_assert(Kernel::kMinBlocks >= 1);
  if (blocks < 0 || blocks > INT32_MAX) return "the number of blocks is not in [0, 2^31)";
  if (threads <= 0 || threads % 32 != 0 || threads > Kernel::kMaxThreads) {
    return "the number of threads is no multiple of 32, or larger than the kernel's kMaxThreads";
  }
  if (shared_bytes > static_cast<size_t>(shared_limit(0))) return "too much shared memory";
  return host::launch(blocks, threads, shared_bytes, &call, [](const void* call, char* shared) {
    Kernel::run(*static_cast<const typename Kernel::Call*>(call), shared);
  });
}

}  // namespace cuda
}  // namespace geot
