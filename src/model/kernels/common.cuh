// What all kernels share: three dtypes, 16 bytes of them at a time, and sums over a warp and a block.
//
// Every kernel is `extern "C"` and ends in its dtype: _f32, _f16 or _bf16. All sums are f32 and have a fixed order: no
// atomics, so the same launch gives the same bits. A tensor may have more than 2³² elements; a side of it may not.
// tests/kernels compiles the same files with a C++ compiler and runs them without a GPU.
#pragma once

#ifdef SVDHUB_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

/// The shared memory whose size the launch gives.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

/// Calls `DEFINE(suffix, type)` for every dtype.
#define FOR_DTYPES(DEFINE) \
    DEFINE(f32, float)     \
    DEFINE(f16, __half)    \
    DEFINE(bf16, __nv_bfloat16)

constexpr unsigned WARP = 32;

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

/// To the nearest number of a dtype, ties to even.
template <typename T>
__device__ inline T rounded(float x);
template <>
__device__ inline float rounded<float>(float x) { return x; }
template <>
__device__ inline __half rounded<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

/// WIDTH neighbours, moved in one instruction where they are 16 (or 8) bytes.
template <typename T, unsigned WIDTH = 16 / sizeof(T)>
struct alignas(WIDTH * sizeof(T)) Pack {
    T x[WIDTH];

    __device__ static Pack load(const T* from) {
        Pack pack;
        if constexpr (sizeof(Pack) == 16) {
            const uint4 bits = *reinterpret_cast<const uint4*>(from);
            memcpy(&pack, &bits, sizeof(Pack));
        } else if constexpr (sizeof(Pack) == 8) {
            const uint2 bits = *reinterpret_cast<const uint2*>(from);
            memcpy(&pack, &bits, sizeof(Pack));
        } else {
            static_assert(WIDTH == 1, "a pack is 16 bytes, 8 bytes or one number");
            pack.x[0] = *from;
        }
        return pack;
    }

    __device__ void store(T* to) const {
        if constexpr (sizeof(Pack) == 16) {
            uint4 bits;
            memcpy(&bits, this, sizeof(Pack));
            *reinterpret_cast<uint4*>(to) = bits;
        } else if constexpr (sizeof(Pack) == 8) {
            uint2 bits;
            memcpy(&bits, this, sizeof(Pack));
            *reinterpret_cast<uint2*>(to) = bits;
        } else {
            *to = x[0];
        }
    }
};

/// How many numbers 16 bytes hold.
template <typename T>
constexpr unsigned PACKED = 16 / sizeof(T);

/// Whether packs may be read from here on. A view into a tensor need not start at a multiple of 16 bytes.
__device__ inline bool aligned(const void* at) { return reinterpret_cast<size_t>(at) % 16 == 0; }

/// Σ over a block of whole warps, for two sums at once; every thread gets them.
__device__ inline float2 block_sums(float2 x) {
    __shared__ float2 of_warp[WARP];
    for (unsigned step = WARP / 2; step > 0; step /= 2) {
        x.x += __shfl_xor_sync(~0u, x.x, step);
        x.y += __shfl_xor_sync(~0u, x.y, step);
    }
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    float2 sum = of_warp[0];
    for (unsigned warp = 1; warp < blockDim.x / WARP; ++warp) {
        sum.x += of_warp[warp].x;
        sum.y += of_warp[warp].y;
    }
    // the next call writes where this one reads
    __syncthreads();
    return sum;
}
