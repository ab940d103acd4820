// What the headers of this folder need to serve host and device alike.
#pragma once

#if defined(__CUDACC__)
#define GEOT_INLINE __host__ __device__ __forceinline__
#else
#define GEOT_INLINE inline __attribute__((always_inline))
#endif
