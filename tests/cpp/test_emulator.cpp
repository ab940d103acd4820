// csrc/cuda/platform.cuh: what collectives, atomics and conversions do, on the host and, compiled
// by nvcc, on a device; what the emulator finds wrong, on the host alone.
//
// With an argument the program runs one kernel, for a sanitizer to find its fault.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/platform.cuh"

namespace geot::cuda {
namespace {

// Memory that host and kernels see.
template <class T>
struct Buffer {
  explicit Buffer(size_t size) : size(size) {
#if defined(GEOT_CUDA_ON_HOST)
    data = new T[size]();
#else
    cudaMallocManaged(&data, size * sizeof(T));
    std::fill_n(data, size, T{});
#endif
  }
  ~Buffer() {
#if defined(GEOT_CUDA_ON_HOST)
    delete[] data;
#else
    cudaFree(data);
#endif
  }
  Buffer(const Buffer&) = delete;
  T& operator[](size_t n) { return data[n]; }

  size_t size;
  T* data = nullptr;
};

struct Pointers {
  void *in, *out;
  int n = 0;
};

template <class Kernel>
std::string run(int64_t blocks, int threads, size_t shared_bytes, const Pointers& call) {
  const char* message = launch<Kernel>(blocks, threads, shared_bytes, 0, call);
#if !defined(GEOT_CUDA_ON_HOST)
  if (message == nullptr && cudaDeviceSynchronize() != cudaSuccess) message = "it did not run";
#endif
  return message ? message : "";
}

struct Small {
  static constexpr int kMaxThreads = 128, kMinBlocks = 1;
  using Call = Pointers;
};

// out [blocks, threads] = f(in [32])
template <class T>
struct Shuffles : Small {
  static GEOT_DEVICE void run(const Call& call, char*) {
    T x = static_cast<const T*>(call.in)[lane()];
    for (int mask = 16; mask > 0; mask /= 2) x = 2 * x - shuffle_xor(x, mask);
    x += shuffle(x, (lane() * 7 + 3) % 32) + T(warp());
    static_cast<T*>(call.out)[block_index() * num_threads() + thread_index()] = x;
  }
};

template <class T>
void test_shuffles() {
  Buffer<T> in(32), out(3 * 64);
  for (int n = 0; n < 32; ++n) in[n] = T(n * n + 1);
  CHECK(run<Shuffles<T>>(3, 64, 0, {in.data, out.data}) == "");
  std::vector<T> x(in.data, in.data + 32), y(32);
  for (int mask = 16; mask > 0; mask /= 2) {
    for (int n = 0; n < 32; ++n) y[n] = 2 * x[n] - x[n ^ mask];
    x = y;
  }
  for (int n = 0; n < 3 * 64; ++n) {
    CHECK(out[n] == x[n % 32] + x[(n % 32 * 7 + 3) % 32] + T(n % 64 / 32));
  }
}

struct Votes : Small {
  static GEOT_DEVICE void run(const Call& call, char*) {
    auto* out = static_cast<unsigned*>(call.out);
    const int index = thread_index();
    for (int n = 0; n < 5; ++n) {
      const unsigned voted = ballot((lane() * 5 + warp() + n) % 3 == 0);
      const bool any = any_in_block(index == call.n && n % 2 == 0);
      out[n * num_threads() + index] = any ? voted : ~voted;
    }
  }
};

void test_votes() {
  Buffer<unsigned> out(5 * 96);
  for (int voter : {0, 33, 95, 96}) {
    CHECK(run<Votes>(1, 96, 0, {nullptr, out.data, voter}) == "");
    for (int n = 0; n < 5; ++n) {
      for (int index = 0; index < 96; ++index) {
        unsigned voted = 0;
        for (int l = 0; l < 32; ++l) {
          voted |= static_cast<unsigned>((l * 5 + index / 32 + n) % 3 == 0) << l;
        }
        CHECK(out[n * 96 + index] == (voter < 96 && n % 2 == 0 ? voted : ~voted));
      }
    }
  }
}

// Reverses `n` numbers of each block through shared memory, in rounds.
struct Reverse : Small {
  static GEOT_DEVICE void run(const Call& call, char* shared) {
    auto* x = reinterpret_cast<int*>(shared);
    auto* out = static_cast<int*>(call.out) + block_index() * num_threads();
    const int n = thread_index(), opposite = num_threads() - 1 - n;
    x[n] = out[n];
    for (int round = 0; round < call.n; ++round) {
      GEOT_SYNC_BLOCK();  // first barrier
      const int other = x[opposite];
      GEOT_SYNC_BLOCK();  // second barrier
      x[n] = other + 1;
    }
    GEOT_SYNC_WARP();  // third barrier
    out[n] = shuffle(x[n ^ 1], lane() ^ 1);
  }
};

std::string reverse(Buffer<int>& out) {
  const int blocks = static_cast<int>(out.size) / 64;
  for (int n = 0; n < blocks * 64; ++n) out[n] = n;
  return run<Reverse>(blocks, 64, 64 * sizeof(int), {nullptr, out.data, 3});
}

void test_barriers() {
  Buffer<int> out(20 * 64);
  CHECK(reverse(out) == "");
  for (int n = 0; n < 20 * 64; ++n) CHECK(out[n] == n / 64 * 64 + 63 - n % 64 + 3);
}

struct Atomics : Small {
  static GEOT_DEVICE void run(const Call& call, char* shared) {
    auto* total = reinterpret_cast<unsigned*>(shared);
    auto* out = static_cast<unsigned long long*>(call.out);
    auto* largest = static_cast<unsigned*>(call.in);
    if (thread_index() == 0) *total = 0;
    GEOT_SYNC_BLOCK();
    const unsigned old = add_shared(total, 3);
    add_global(out, old);
    max_global(out + 1, (1ull << 40) + old);
    max_global(largest, 7 * old + static_cast<unsigned>(block_index()));
  }
};

void test_atomics() {
  Buffer<unsigned long long> out(2);
  Buffer<unsigned> largest(1);
  CHECK(run<Atomics>(5, 128, sizeof(unsigned), {largest.data, out.data}) == "");
  CHECK(out[0] == 5 * 3 * (127 * 128 / 2));
  CHECK(out[1] == (1ull << 40) + 3 * 127);
  CHECK(largest[0] == 7 * 3 * 127 + 4);
}

// in: a [16, 16], b [16, 8] of T; out: c [16, 8] in float. b through ldmatrix, or as `n` says.
template <class T>
struct Product : Small {
  static GEOT_DEVICE void run(const Call& call, char* shared) {
    const auto* in = static_cast<const T*>(call.in);
    auto* out = static_cast<float*>(call.out);
    T* b = reinterpret_cast<T*>(shared);
    for (int n = lane(); n < 16 * 8; n += 32) b[n] = in[256 + n];
    GEOT_SYNC_WARP();
    const int g = lane() / 4, t = lane() % 4;
    const auto two = [](const T* low, const T* high) {
      return pack<T>(convert<float>(*low), convert<float>(*high));
    };
    uint32_t left[4], right[2];
    for (int n = 0; n < 4; ++n) {
      const T* row = in + (g + n % 2 * 8) * 16 + n / 2 * 8 + 2 * t;
      left[n] = two(row, row + 1);
    }
    if (call.n) {
      load_transposed(right, b + lane() % 16 * 8);
    } else {
      for (int n = 0; n < 2; ++n) {
        const T* column = b + (n * 8 + 2 * t) * 8 + g;
        right[n] = two(column, column + 8);
      }
    }
    float c[4];
    for (int n = 0; n < 4; ++n) c[n] = static_cast<float>(100 * (g + n / 2 * 8) + 2 * t + n % 2);
    mma<T>(c, left, right);
    for (int n = 0; n < 4; ++n) out[(g + n / 2 * 8) * 8 + 2 * t + n % 2] = c[n];
  }
};

template <class T>
void set(T& x, double value);
#if defined(GEOT_CUDA_ON_HOST)
template <class T>
void set(T& x, double value) {
  x = convert<T>(value);
}
#else
template <>
void set(Half& x, double value) {
  x = __double2half(value);
}
template <>
void set(BFloat16& x, double value) {
  x = __double2bfloat16(value);
}
#endif

template <class T>
void test_products() {
  for (int transposed : {0, 1}) {
    Buffer<T> in(256 + 128);
    Buffer<float> out(128);
    std::vector<double> numbers(in.size);
    for (size_t n = 0; n < in.size; ++n) {
      numbers[n] = std::round(uniform(-64, 64)) / 8;  // exact in both types, as are their products
      set(in[n], numbers[n]);
    }
    CHECK(run<Product<T>>(1, 32, 128 * sizeof(T), {in.data, out.data, transposed}) == "");
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        double sum = 100 * m + n;
        for (int k = 0; k < 16; ++k) sum += numbers[m * 16 + k] * numbers[256 + k * 8 + n];
        CHECK_NEAR(out[m * 8 + n], sum, 1e-6);
      }
    }
  }
}

// in: numbers of F; out: of To.
template <class To, class F>
struct Converts : Small {
  static GEOT_DEVICE void run(const Call& call, char*) {
    const int64_t n = block_index() * num_threads() + thread_index();
    if (n < call.n) static_cast<To*>(call.out)[n] = convert<To>(static_cast<const F*>(call.in)[n]);
  }
};

template <class To, class F>
void convert_all(Buffer<F>& in, Buffer<To>& out) {
  const int n = static_cast<int>(in.size);
  CHECK((run<Converts<To, F>>((n + 127) / 128, 128, 0, {in.data, out.data, n})) == "");
}

template <class T>
uint16_t pattern(const T& x) {
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}

// Every pattern there and back, through float and double.
template <class T, class Wide>
void test_round_trip(std::vector<double>& values) {
  Buffer<T> in(65536), out(65536);
  Buffer<Wide> wide(65536);
  for (int n = 0; n < 65536; ++n) {
    const auto bits = static_cast<uint16_t>(n);
    std::memcpy(&in[n], &bits, 2);
  }
  convert_all(in, wide);
  convert_all(wide, out);
  values.clear();
  for (int n = 0; n < 65536; ++n) {
    const auto bits = static_cast<uint16_t>(n);
    if (std::isnan(wide[n])) {
      const uint16_t got = pattern(out[n]), infinity = std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;
      CHECK((got & 0x7fff) > infinity);
    } else {
      CHECK(pattern(out[n]) == bits);
    }
    values.push_back(wide[n]);
  }
}

// The nearest of the finite numbers, which patterns count upwards from 0; of two the even one.
uint16_t nearest(const std::vector<double>& values, int infinity, double x) {
  const double size = std::abs(x);
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const auto above = std::lower_bound(values.begin(), values.begin() + infinity, size);
  const int high = static_cast<int>(above - values.begin());
  if (high == 0) return static_cast<uint16_t>(sign);
  // Infinity counts as the number that would follow.
  const double last = values[infinity - 1], step = last - values[infinity - 2];
  const double low_gap = size - values[high - 1];
  const double high_gap = (high == infinity ? last + step : values[high]) - size;
  const bool up = high_gap < low_gap || (high_gap == low_gap && high % 2 == 0);
  return static_cast<uint16_t>(sign | (up ? high : high - 1));
}

template <class T, class Wide>
void test_rounding(const std::vector<double>& values) {
  const int infinity = std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;
  Buffer<Wide> in(40000);
  Buffer<T> out(in.size);
  for (size_t n = 0; n < in.size; ++n) {
    const int k = static_cast<int>(uniform(0, infinity - 1));
    const double middle = values[k] / 2 + values[k + 1] / 2, sign = n % 2 ? -1 : 1;
    if (n % 4 == 0) {
      in[n] = static_cast<Wide>(sign * std::exp2(uniform(-30, 20)));
    } else if (n % 4 == 1) {
      in[n] = static_cast<Wide>(sign * (values[k] + uniform(0, 1) * (values[k + 1] - values[k])));
    } else {
      const Wide tie = static_cast<Wide>(std::isinf(middle) ? values[k] : middle);
      const Wide aside = std::nextafter(tie, static_cast<Wide>(n % 8 < 4 ? 0 : INFINITY));
      in[n] = static_cast<Wide>(sign) * (n % 16 < 8 ? tie : aside);
    }
  }
  const double last = values[infinity - 1], step = last - values[infinity - 2];
  in[0] = static_cast<Wide>(last + step / 2), in[1] = static_cast<Wide>(-last - step / 4);
  in[2] = INFINITY, in[3] = -INFINITY, in[4] = 0, in[5] = static_cast<Wide>(-0.0);
  in[6] = std::numeric_limits<Wide>::max(), in[7] = -std::numeric_limits<Wide>::denorm_min();
  convert_all(in, out);
  for (size_t n = 8; n < in.size; ++n) CHECK(pattern(out[n]) == nearest(values, infinity, in[n]));
  CHECK(pattern(out[0]) == infinity && pattern(out[1]) == (0x8000 | (infinity - 1)));
  CHECK(pattern(out[2]) == infinity && pattern(out[3]) == (0x8000 | infinity));
  CHECK(pattern(out[4]) == 0 && pattern(out[5]) == 0x8000);
  CHECK(pattern(out[6]) == infinity && pattern(out[7]) == 0x8000);
}

template <class T>
void test_conversions() {
  std::vector<double> values;
  test_round_trip<T, double>(values);
  test_round_trip<T, float>(values);
  test_rounding<T, float>(values);
  test_rounding<T, double>(values);
}

struct Functions : Small {
  static GEOT_DEVICE void run(const Call& call, char*) {
    auto* out = static_cast<double*>(call.out);
    using D = Math<double>;
    using F = Math<float>;
    if (thread_index() != 0) return;
    out[0] = D::sqrt(2) + D::exp(1) + D::log(3) + D::abs(-4) + D::floor(-0.5);
    out[1] = F::sqrt(2) + F::exp(1) + F::log(3) + F::abs(-4) + F::floor(-0.5f);
  }
};

void test_functions() {
  Buffer<double> out(2);
  CHECK(run<Functions>(1, 32, 0, {nullptr, out.data}) == "");
  const double expected = std::sqrt(2.0) + std::exp(1.0) + std::log(3.0) + 4 - 1;
  CHECK_NEAR(out[0], expected, 1e-15);
  CHECK_NEAR(out[1], expected, 1e-6);
}

void test_launches() {
  Buffer<int> out(64);
  CHECK(run<Reverse>(0, 64, 256, {nullptr, nullptr}) == "");
  CHECK(run<Reverse>(int64_t{1} << 31, 64, 256, {nullptr, nullptr}) != "");
  CHECK(run<Reverse>(1, 33, 256, {nullptr, nullptr}) != "");
  CHECK(run<Reverse>(1, 160, 256, {nullptr, nullptr}) != "");
  CHECK(run<Reverse>(1, 64, size_t{1} << 20, {nullptr, nullptr}) != "");
  CHECK(multiprocessors(0) > 0 && shared_limit(0) > 48 * 1024);
  CHECK(run<Reverse>(1, 64, 64 * 1024, {nullptr, out.data, 1}) == "");
}

#if defined(GEOT_CUDA_ON_HOST)

enum Fault { kEnded = 1, kTwoBarriers, kTwoCollectives, kWarpAndBlock, kUnaligned, kOutside };

struct Faulty : Small {
  static GEOT_DEVICE void run(const Call& call, char* shared) {
    const int index = thread_index();
    uint32_t b[2];
    if (call.n == kEnded && index == 5) return;
    if (call.n == kTwoBarriers && index >= 32) any_in_block(true);
    if (call.n == kTwoCollectives && index == 7) shuffle_xor(index, 1);
    if (call.n == kWarpAndBlock && index == 40) GEOT_SYNC_WARP();
    if (call.n == kUnaligned)
      load_transposed(b, reinterpret_cast<const Half*>(shared + index % 2 * 8));
    if (call.n == kOutside) load_transposed(b, reinterpret_cast<const Half*>(shared + 64));
    if (call.n == kTwoCollectives) ballot(index < 3);
    GEOT_SYNC_BLOCK();
  }
};

void test_faults() {
  const auto has = [](int fault, const char* part, const char* other) {
    const std::string message = run<Faulty>(2, 64, 64, {nullptr, nullptr, fault});
    const bool found = message.find(part) != message.npos && message.find(other) != message.npos;
    if (!found) std::printf("fault %d: %s\n", fault, message.c_str());
    return found;
  };
  CHECK(has(kEnded, "[63 threads from 0 on in GEOT_SYNC_BLOCK at test_emulator.cpp:",
            "[1 threads from 5 on ended]"));
  CHECK(has(kTwoBarriers, "in any_in_block at test_emulator", "in GEOT_SYNC_BLOCK at test_emul"));
  CHECK(has(kTwoCollectives, "in shuffle_xor at test_emulator", "in ballot at test_emulator"));
  CHECK(has(kWarpAndBlock, "[63 threads from 0 on in GEOT_SYNC_BLOCK",
            "[1 threads from 40 on in GEOT_SYNC_WARP"));
  CHECK(has(kUnaligned, "load_transposed", "16 bytes"));
  CHECK(has(kOutside, "load_transposed", "not in shared memory"));
  CHECK(run<Faulty>(2, 64, 64, {nullptr, nullptr}) == "");  // a fault leaves nothing behind
}

void test_threads_launch_at_once() {
  std::vector<std::thread> threads;
  std::vector<std::string> messages(3);
  for (auto& message : messages) {
    threads.emplace_back([&message] {
      Buffer<int> out(4 * 64);
      message = reverse(out);
      for (int n = 0; n < 4 * 64; ++n) {
        if (out[n] != n / 64 * 64 + 66 - n % 64) message = "wrong";
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (auto& message : messages) CHECK(message == "");
}

// Without a barrier thread 0 reads what others write, or has written.
struct Race : Small {
  static GEOT_DEVICE void run(const Call& call, char* shared) {
    auto* x = reinterpret_cast<int*>(shared);
    x[thread_index()] = thread_index();
    shuffle(thread_index(), 0);  // which orders no memory
    int sum = 0;
    if (thread_index() == 0) {
      for (int n = 0; n < num_threads(); ++n) sum += x[n];
      static_cast<int*>(call.out)[block_index()] = sum;
    }
  }
};

// A barrier of the warp orders nothing for another warp.
struct RaceOfWarps : Small {
  static GEOT_DEVICE void run(const Call& call, char* shared) {
    auto* x = reinterpret_cast<int*>(shared);
    if (thread_index() == 0) *x = 1;
    GEOT_SYNC_WARP();
    if (thread_index() == call.n) static_cast<int*>(call.out)[0] = *x;
  }
};

// load_transposed() reads what other lanes write.
struct RaceOfMatrix : Small {
  static GEOT_DEVICE void run(const Call& call, char* shared) {
    Half* x = reinterpret_cast<Half*>(shared);
    x[thread_index()] = Half{};
    uint32_t b[2];
    load_transposed(b, x + thread_index() % 4 * 8);
    static_cast<uint32_t*>(call.out)[thread_index()] = b[0] + b[1];
  }
};

// Two blocks write one number; atomics on one side alone.
struct RaceOfBlocks : Small {
  static GEOT_DEVICE void run(const Call& call, char*) {
    GEOT_SYNC_BLOCK();
    if (thread_index() == 3) *static_cast<unsigned*>(call.out) = 1;
    GEOT_SYNC_BLOCK();
  }
};
struct RaceWithAtomic : Small {
  static GEOT_DEVICE void run(const Call& call, char*) {
    auto* out = static_cast<unsigned*>(call.out);
    if (thread_index() == 3) *out = 1;
    if (thread_index() == 4) add_shared(out, 1);
  }
};

// Writes number `n` of shared memory.
struct Overrun : Small {
  static GEOT_DEVICE void run(const Call& call, char* shared) {
    if (thread_index() == 31 && block_index() == 1) reinterpret_cast<float*>(shared)[call.n] = 1;
    GEOT_SYNC_BLOCK();
  }
};

// Reads shared memory before it was written.
struct Unwritten : Small {
  static GEOT_DEVICE void run(const Call& call, char* shared) {
    auto* x = reinterpret_cast<float*>(shared);
    if (thread_index() == 0) static_cast<float*>(call.out)[block_index()] = x[0];
    GEOT_SYNC_BLOCK();
    if (thread_index() == 1) x[0] = 1;
  }
};

void test_shared_memory_begins_as_nan() {
  Buffer<float> out(3);
  CHECK(run<Unwritten>(3, 32, sizeof(float), {nullptr, out.data}) == "");
  for (int block = 0; block < 3; ++block) CHECK(std::isnan(out[block]));
}

struct ManyShuffles : Small {
  static GEOT_DEVICE void run(const Call& call, char*) {
    unsigned x = static_cast<unsigned>(lane());
    for (int n = 0; n < call.n; ++n) x += shuffle_xor(x, 1);
    static_cast<unsigned*>(call.out)[block_index() * num_threads() + thread_index()] = x;
  }
};
struct ManyProducts : Small {
  static GEOT_DEVICE void run(const Call& call, char*) {
    float c[4] = {};
    const uint32_t a[4] = {1, 2, 3, 4}, b[2] = {5, 6};
    for (int n = 0; n < call.n; ++n) mma<Half>(c, a, b);
    static_cast<float*>(call.out)[block_index() * num_threads() + thread_index()] = c[0];
  }
};

template <class Kernel>
void time(const char* name, int blocks, int threads, int n) {
  Buffer<float> out(static_cast<size_t>(blocks * threads));
  const auto begin = std::chrono::steady_clock::now();
  CHECK(run<Kernel>(blocks, threads, 4096, {nullptr, out.data, n}) == "");
  const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - begin;
  const double warps = blocks * threads / 32;
  std::printf("%s: %.0f ns for a block of %d threads, %.0f ns for each of %d by a warp\n", name,
              taken.count() / blocks, threads, taken.count() / warps / std::max(n, 1), n);
}

int run_one(const std::string& name) {
  Buffer<int> out(20 * 64);
  std::string message;
  if (name == "reverse") message = reverse(out);
  if (name == "race") message = run<Race>(2, 32, 128, {nullptr, out.data});
  if (name == "warp") message = run<RaceOfWarps>(1, 64, 4, {nullptr, out.data, 31});
  if (name == "warps") message = run<RaceOfWarps>(1, 64, 4, {nullptr, out.data, 32});
  if (name == "matrix") message = run<RaceOfMatrix>(1, 32, 64, {nullptr, out.data});
  if (name == "blocks") message = run<RaceOfBlocks>(2, 32, 0, {nullptr, out.data});
  if (name == "atomic") message = run<RaceWithAtomic>(1, 32, 0, {nullptr, out.data});
  if (name == "inside") message = run<Overrun>(2, 32, 100, {nullptr, nullptr, 24});
  if (name == "overrun") message = run<Overrun>(2, 32, 100, {nullptr, nullptr, 25});
  if (name == "time") {
    time<ManyShuffles>("launch", 1000, 128, 0);
    time<ManyShuffles>("shuffle", 100, 128, 1000);
    time<ManyProducts>("mma", 100, 128, 1000);
  }
  std::printf("%s", message.c_str());
  unsigned sum = 0;
  for (size_t n = 0; n < out.size; ++n) sum = sum * 31 + static_cast<unsigned>(out[n]);
  std::printf("result %u\n", sum);
  return message != "";
}

#endif

}  // namespace
}  // namespace geot::cuda

int main([[maybe_unused]] int argc, [[maybe_unused]] char** argv) {
  using namespace geot::cuda;
#if defined(GEOT_CUDA_ON_HOST)
  if (argc > 1) return run_one(argv[1]);
  test_faults();
  test_threads_launch_at_once();
  test_shared_memory_begins_as_nan();
#endif
  test_shuffles<int>();
  test_shuffles<unsigned>();
  test_shuffles<float>();
  test_shuffles<double>();
  test_votes();
  test_barriers();
  test_atomics();
  test_products<Half>();
  test_products<BFloat16>();
  test_conversions<Half>();
  test_conversions<BFloat16>();
  test_functions();
  test_launches();
  return summary();
}
