// The gradient of singular values, and the step that moves them.
//
// What moves lies in many small tensors, what is known of it in one long one. A table says of each tensor where it lies and
// which numbers of the long one are its own: one launch takes all of them, block (x, k) numbers of the k-th.
#include "common.cuh"

constexpr unsigned THREADS = 128;

/// sigma_products_T(xv, gu, partial, rows, q): with xv = x·vᵀ and gu = g·uᵀ, both (rows, q), ∂L/∂σᵢ = Σ_r
/// xv[r][i]·gu[r][i].
///
/// Block (j, k) takes columns 128·j and following, one a thread, and rows k·⌈rows/gridDim.y⌉ and following; its sums
/// are partial[k], of partial (gridDim.y, q), which sum_rows adds up. Grid: (⌈q/128⌉, as many as fill the device).
template <typename T>
__device__ void sigma_products(const T* xv, const T* gu, float* partial, unsigned rows, unsigned q) {
    const unsigned column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= q) return;
    const unsigned share = (rows + gridDim.y - 1) / gridDim.y;
    const unsigned first = min(blockIdx.y * share, rows), end = min(first + share, rows);
    float sum = 0;
#pragma unroll 8
    for (unsigned row = first; row < end; ++row) {
        const size_t at = size_t(row) * q + column;
        sum += widened(xv[at]) * widened(gu[at]);
    }
    partial[size_t(blockIdx.y) * q + column] = sum;
}

#define DEFINE(NAME, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) sigma_products_##NAME(                   \
        const T* xv, const T* gu, float* partial, unsigned rows, unsigned q) {                     \
        sigma_products<T>(xv, gu, partial, rows, q);                                               \
    }
FOR_DTYPES(DEFINE)
#undef DEFINE

/// xⁿ by squaring, in the order of compiler-rt's __powidf2, which Rust's `powi` calls.
__device__ double power(double x, unsigned n) {
    double result = 1;
    for (;; x = __dmul_rn(x, x)) {
        if (n % 2 == 1) result = __dmul_rn(result, x);
        n /= 2;
        if (n == 0) return result;
    }
}

/// A row of the table: the two halves of an address, and the numbers start … start + length.
struct Part {
    unsigned low, high, start, length;

    __device__ float* values() const { return reinterpret_cast<float*>(size_t(high) << 32 | low); }
};

/// gather(parts, all): copies the numbers of each part to its place. Blocks of 128 threads, any number of them for a part.
extern "C" __global__ void __launch_bounds__(THREADS) gather(const Part* parts, float* all) {
    const Part part = parts[blockIdx.y];
    for (size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x; i < part.length; i += size_t(gridDim.x) * THREADS) {
        all[part.start + i] = part.values()[i];
    }
}

/// adamw(parts, gradients, first, second, learning_rate, beta1, beta2, eps, decay, step): one step of AdamW (Loshchilov &
/// Hutter 2019) on the f32 numbers of each part, in place; `step` counts from 1.
///
/// The twin of train/optimizer.rs, to the bit: in f64, each operation rounded by itself, where a compiler would fuse
/// products with sums. Blocks of 128 threads, any number of them for a part.
extern "C" __global__ void __launch_bounds__(THREADS) adamw(
    const Part* parts, const float* gradients, float* first, float* second, double learning_rate, double beta1,
    double beta2, double eps, double decay, unsigned step) {
    const double correction1 = __dsub_rn(1, power(beta1, step)), correction2 = __dsub_rn(1, power(beta2, step));
    const double length = __ddiv_rn(learning_rate, correction1), root2 = __dsqrt_rn(correction2);
    const double kept = __dsub_rn(1, __dmul_rn(learning_rate, decay));
    const double rest1 = __dsub_rn(1, beta1), rest2 = __dsub_rn(1, beta2);
    const Part part = parts[blockIdx.y];
    float* const values = part.values();
    for (size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x; i < part.length; i += size_t(gridDim.x) * THREADS) {
        const size_t at = part.start + i;
        const double g = gradients[at];
        const double decayed = __dmul_rn(values[i], kept);
        const double m = __dadd_rn(first[at], __dmul_rn(__dsub_rn(g, first[at]), rest1));
        const double v = __dadd_rn(__dmul_rn(second[at], beta2), __dmul_rn(__dmul_rn(g, g), rest2));
        first[at] = float(m);
        second[at] = float(v);
        const double size = __dadd_rn(__ddiv_rn(__dsqrt_rn(v), root2), eps);
        values[i] = float(__dsub_rn(decayed, __ddiv_rn(__dmul_rn(length, m), size)));
    }
}
