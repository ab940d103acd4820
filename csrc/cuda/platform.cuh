// All that the kernel bodies use of CUDA, in one place, so that they compile for a device and,
// with GEOT_CUDA_ON_HOST, for the host, where tests/cpp/emulator.h runs them.
//
// A kernel is a struct with
//   static constexpr int kMaxThreads, kMinBlocks;   for __launch_bounds__
//   Call                                             its arguments, trivially copyable
//   static GEOT_DEVICE void run(const Call& call, char* shared);
// and launch<Kernel>() runs it on a grid of one dimension. Blocks are whole warps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../common/math.h"

#if defined(GEOT_CUDA_ON_HOST)
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GEOT_DEVICE __device__ __forceinline__
#define GEOT_SYNC_BLOCK() __syncthreads()
#define GEOT_SYNC_WARP() __syncwarp()

namespace geot {

template <>
struct Math<float> {
  static GEOT_DEVICE float sqrt(float x) { return ::sqrtf(x); }
  static GEOT_DEVICE float exp(float x) { return ::expf(x); }
  static GEOT_DEVICE float log(float x) { return ::logf(x); }
  static GEOT_DEVICE float abs(float x) { return ::fabsf(x); }
  static GEOT_DEVICE float floor(float x) { return ::floorf(x); }
};
template <>
struct Math<double> {
  static GEOT_DEVICE double sqrt(double x) { return ::sqrt(x); }
  static GEOT_DEVICE double exp(double x) { return ::exp(x); }
  static GEOT_DEVICE double log(double x) { return ::log(x); }
  static GEOT_DEVICE double abs(double x) { return ::fabs(x); }
  static GEOT_DEVICE double floor(double x) { return ::floor(x); }
};

namespace cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

constexpr unsigned kWholeWarp = 0xffffffffu;

GEOT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
GEOT_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
GEOT_DEVICE int64_t block_index() { return blockIdx.x; }
GEOT_DEVICE int64_t num_blocks() { return gridDim.x; }

// Collectives: every lane of the warp, or every thread of the block, calls them together.

template <class T>
GEOT_DEVICE T shuffle_xor(T x, int lane_mask) {
  return __shfl_xor_sync(kWholeWarp, x, lane_mask);
}
template <class T>
GEOT_DEVICE T shuffle(T x, int source_lane) {
  return __shfl_sync(kWholeWarp, x, source_lane);
}
GEOT_DEVICE unsigned ballot(bool x) { return __ballot_sync(kWholeWarp, x); }
// Also a barrier.
GEOT_DEVICE bool any_in_block(bool x) { return __syncthreads_or(x); }

// Atomics, relaxed.

GEOT_DEVICE unsigned add_shared(unsigned* p, unsigned x) { return atomicAdd(p, x); }
GEOT_DEVICE void add_global(unsigned long long* p, unsigned long long x) { atomicAdd(p, x); }
GEOT_DEVICE void max_global(unsigned* p, unsigned x) { atomicMax(p, x); }
GEOT_DEVICE void max_global(unsigned long long* p, unsigned long long x) { atomicMax(p, x); }

// Rounds to nearest even, once; one side is float or double, or both are the same.
template <class F, class T>
GEOT_DEVICE F convert(T x) {
  if constexpr (std::is_same_v<F, T>) {
    return x;
  } else if constexpr (std::is_same_v<F, Half>) {
    static_assert(std::is_floating_point_v<T>);
    if constexpr (std::is_same_v<T, float>) return __float2half_rn(x);
    if constexpr (std::is_same_v<T, double>) return __double2half(x);
  } else if constexpr (std::is_same_v<F, BFloat16>) {
    static_assert(std::is_floating_point_v<T>);
    if constexpr (std::is_same_v<T, float>) return __float2bfloat16_rn(x);
    if constexpr (std::is_same_v<T, double>) return __double2bfloat16(x);
  } else if constexpr (std::is_same_v<T, Half>) {
    return static_cast<F>(__half2float(x));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return static_cast<F>(__bfloat162float(x));
  } else {
    return static_cast<F>(x);
  }
}

// Two 16-bit numbers in one register, `low` in its low half.
template <class T>
GEOT_DEVICE uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// c += a b of a warp: a [16, 16], b [16, 8], c [16, 8]. With g = lane / 4, t = lane % 4 a lane has
//   a[0], a[1], a[2], a[3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1, for a[2], a[3] 8 more
//   b[0], b[1]:             column g; rows 2t, 2t + 1, for b[1] 8 more
//   c[0], c[1], c[2], c[3]: row g, columns 2t, 2t + 1; row g + 8, the same columns
template <class T>
GEOT_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Two matrices [8, 8] of shared memory, transposed: the b of mma() where a row of memory is a row
// of b. `row`, aligned to 16 bytes, is row lane % 8 of matrix lane / 8; lanes 16 to 31 give any
// valid address.
template <class T>
GEOT_DEVICE void load_transposed(uint32_t (&b)[2], const T* row) {
  static_assert(sizeof(T) == 2);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(address)
               : "memory");
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMaxThreads, Kernel::kMinBlocks)
    kernel(const __grid_constant__ typename Kernel::Call call) {
  extern __shared__ __align__(16) char shared[];
  Kernel::run(call, shared);
}

// Null, or what went wrong. `stream` is the number that a cudaStream_t is.
template <class Kernel>
const char* launch(int64_t blocks, int threads, size_t shared_bytes, int64_t stream,
                   const typename Kernel::Call& call) {
  static_assert(std::is_trivially_copyable_v<typename Kernel::Call>);
  if (blocks < 0 || blocks > INT32_MAX) return "the number of blocks is not in [0, 2^31)";
  if (threads <= 0 || threads % 32 != 0 || threads > Kernel::kMaxThreads) {
    return "the number of threads is no multiple of 32, or larger than the kernel's kMaxThreads";
  }
  if (blocks == 0) return nullptr;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // or the next launch would report it
      return cudaGetErrorString(error);
    }
  }
  kernel<Kernel><<<static_cast<unsigned>(blocks), threads, shared_bytes,
                   reinterpret_cast<cudaStream_t>(stream)>>>(call);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, what, device) == cudaSuccess ? value : 0;
}
// Bytes of shared memory that a block can have; 0 where there is no such device.
inline int64_t shared_limit(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}
inline int multiprocessors(int device) {  // at least 1: then it is the launch that reports
  const int count = attribute(cudaDevAttrMultiProcessorCount, device);
  return count < 1 ? 1 : count;
}

}  // namespace cuda
}  // namespace geot

#endif

namespace geot::cuda {

GEOT_DEVICE int lane() { return thread_index() % 32; }
GEOT_DEVICE int warp() { return thread_index() / 32; }

template <class T>
GEOT_DEVICE float to_float(T x) {
  return convert<float>(x);
}

}  // namespace geot::cuda
