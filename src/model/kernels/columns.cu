// Columns of a tensor: copied out of it or into it, and multiplied by a factor each; and sums of two tensors.
#include "common.cuh"

constexpr unsigned THREADS = 256;

/// copy_columns_T(from, to, rows, n, from_pitch, to_pitch): n columns of rows that begin a pitch apart, on either side.
///
/// Blocks of 256 threads, any number of them in x and y: each takes a row, then the row gridDim.x further, and of it the
/// columns of its y.
template <typename T>
__device__ void copy_columns(const T* from, T* to, unsigned rows, unsigned n, unsigned from_pitch, unsigned to_pitch) {
    const bool packs = aligned(from) && aligned(to) && (n | from_pitch | to_pitch) % PACKED<T> == 0;
    for (size_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T* const source = from + row * from_pitch;
        T* const target = to + row * to_pitch;
        const size_t thread = blockIdx.y * THREADS + threadIdx.x, threads = size_t(gridDim.y) * THREADS;
        if (packs) {
            for (size_t i = thread * PACKED<T>; i < n; i += threads * PACKED<T>) {
                Pack<T>::load(source + i).store(target + i);
            }
        } else {
            for (size_t i = thread; i < n; i += threads) target[i] = source[i];
        }
    }
}

/// scale_columns_T(x, factors, y, rows, n, count): y = x·diag(factors), zero from column `count` on. x and y (rows, n).
///
/// Any number of blocks of 256 threads: rows are often short.
template <typename T>
__device__ void scale_columns(const T* x, const float* factors, T* y, unsigned rows, unsigned n, unsigned count) {
    const bool packs = aligned(x) && aligned(y) && n % PACKED<T> == 0;
    const size_t all = size_t(rows) * n, width = packs ? PACKED<T> : 1;
    const size_t thread = size_t(blockIdx.x) * THREADS + threadIdx.x, threads = size_t(gridDim.x) * THREADS;
    const auto scaled = [&](T number, unsigned column) {
        return rounded<T>(widened(number) * (column < count ? factors[column] : 0.f));
    };
    for (size_t i = thread * width; i < all; i += threads * width) {
        const unsigned column = i % n;
        if (packs) {
            auto xs = Pack<T>::load(x + i);
            for (unsigned j = 0; j < PACKED<T>; ++j) xs.x[j] = scaled(xs.x[j], column + j);
            xs.store(y + i);
        } else {
            y[i] = scaled(x[i], column);
        }
    }
}

/// add_T(a, b, y, count): y = a + b. Any number of blocks of 256 threads.
template <typename T>
__device__ void add(const T* a, const T* b, T* y, size_t count) {
    const bool packs = aligned(a) && aligned(b) && aligned(y);
    const size_t thread = size_t(blockIdx.x) * THREADS + threadIdx.x, threads = size_t(gridDim.x) * THREADS;
    const size_t whole = packs ? count / PACKED<T> * PACKED<T> : 0;
    for (size_t i = thread * PACKED<T>; i < whole; i += threads * PACKED<T>) {
        auto as = Pack<T>::load(a + i);
        const auto bs = Pack<T>::load(b + i);
        for (unsigned j = 0; j < PACKED<T>; ++j) as.x[j] = rounded<T>(widened(as.x[j]) + widened(bs.x[j]));
        as.store(y + i);
    }
    for (size_t i = whole + thread; i < count; i += threads) y[i] = rounded<T>(widened(a[i]) + widened(b[i]));
}

#define DEFINE(NAME, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) copy_columns_##NAME(                     \
        const T* from, T* to, unsigned rows, unsigned n, unsigned from_pitch, unsigned to_pitch) { \
        copy_columns<T>(from, to, rows, n, from_pitch, to_pitch);                                  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) scale_columns_##NAME(                    \
        const T* x, const float* factors, T* y, unsigned rows, unsigned n, unsigned count) {       \
        scale_columns<T>(x, factors, y, rows, n, count);                                           \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS)                                          \
        add_##NAME(const T* a, const T* b, T* y, size_t count) {                                   \
        add<T>(a, b, y, count);                                                                    \
    }
FOR_DTYPES(DEFINE)
#undef DEFINE
