// Columns of a tensor: copied out of it or into it, and multiplied by a factor each.
#include "common.cuh"

constexpr unsigned THREADS = 256;

/// copy_columns_T(from, to, rows, n, from_pitch, to_pitch): n columns of rows that begin a pitch apart, on either side.
///
/// Blocks of 256 threads, any number of them: each takes a row, then the row gridDim.x further.
template <typename T>
__device__ void copy_columns(const T* from, T* to, unsigned rows, unsigned n, unsigned from_pitch, unsigned to_pitch) {
    const bool packs = aligned(from) && aligned(to) && (n | from_pitch | to_pitch) % PACKED<T> == 0;
    for (size_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T* const source = from + row * from_pitch;
        T* const target = to + row * to_pitch;
        if (packs) {
            for (unsigned i = threadIdx.x * PACKED<T>; i < n; i += THREADS * PACKED<T>) {
                Pack<T>::load(source + i).store(target + i);
            }
        } else {
            for (unsigned i = threadIdx.x; i < n; i += THREADS) target[i] = source[i];
        }
    }
}

/// scale_columns_T(x, factors, y, rows, n, count): y = x·diag(factors), zero from column `count` on. x and y (rows, n).
///
/// Blocks of 256 threads, any number of them: each takes a row, then the row gridDim.x further.
template <typename T>
__device__ void scale_columns(const T* x, const float* factors, T* y, unsigned rows, unsigned n, unsigned count) {
    const bool packs = aligned(x) && aligned(y) && n % PACKED<T> == 0;
    const auto factor = [&](unsigned column) { return column < count ? factors[column] : 0.f; };
    for (size_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T* const source = x + row * n;
        T* const target = y + row * n;
        if (packs) {
            for (unsigned i = threadIdx.x * PACKED<T>; i < n; i += THREADS * PACKED<T>) {
                auto xs = Pack<T>::load(source + i);
                for (unsigned j = 0; j < PACKED<T>; ++j) xs.x[j] = rounded<T>(widened(xs.x[j]) * factor(i + j));
                xs.store(target + i);
            }
        } else {
            for (unsigned i = threadIdx.x; i < n; i += THREADS) target[i] = rounded<T>(widened(source[i]) * factor(i));
        }
    }
}

#define DEFINE(NAME, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) copy_columns_##NAME(                     \
        const T* from, T* to, unsigned rows, unsigned n, unsigned from_pitch, unsigned to_pitch) { \
        copy_columns<T>(from, to, rows, n, from_pitch, to_pitch);                                  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) scale_columns_##NAME(                    \
        const T* x, const float* factors, T* y, unsigned rows, unsigned n, unsigned count) {       \
        scale_columns<T>(x, factors, y, rows, n, count);                                           \
    }
FOR_DTYPES(DEFINE)
#undef DEFINE
