// Cross entropy and its gradient in place of the logits.
#include "common.cuh"

constexpr unsigned THREADS = 512;

/// Σ exp(x − largest) over some numbers; sums of parts combine (Milakov & Gimelshein 2018).
struct Exponentials {
    float largest, sum;

    __device__ void add(Exponentials other) {
        const float top = fmaxf(largest, other.largest);
        // −∞ − −∞, where neither has a number yet or all of them are −∞, would be NaN
        if (top == -INFINITY) return;
        sum = sum * expf(largest - top) + other.sum * expf(other.largest - top);
        largest = top;
    }
};

/// The same for every thread of the block.
__device__ Exponentials block_sum(Exponentials x) {
    __shared__ Exponentials of_warp[THREADS / WARP];
    for (unsigned step = WARP / 2; step > 0; step /= 2) {
        x.add({__shfl_xor_sync(~0u, x.largest, step), __shfl_xor_sync(~0u, x.sum, step)});
    }
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    Exponentials sum = of_warp[0];
    for (unsigned warp = 1; warp < THREADS / WARP; ++warp) sum.add(of_warp[warp]);
    // the next row writes where this one reads
    __syncthreads();
    return sum;
}

template <unsigned WIDTH, typename T>
__device__ void row_loss(T* logits, unsigned target, float* loss, unsigned n, float factor) {
    using P = Pack<T, WIDTH>;
    const float wanted = widened(logits[target]);
    Exponentials all = {-INFINITY, 0};
    for (unsigned at = threadIdx.x * WIDTH; at < n; at += THREADS * WIDTH) {
        const P xs = P::load(logits + at);
        float largest = widened(xs.x[0]);
        for (unsigned i = 1; i < WIDTH; ++i) largest = fmaxf(largest, widened(xs.x[i]));
        // most often the largest so far stays, and nothing is scaled
        if (largest > all.largest) all.add({largest, 0});
        // what is not −∞ here is NaN, and shall be seen
        if (all.largest == -INFINITY && largest == -INFINITY) continue;
        for (unsigned i = 0; i < WIDTH; ++i) all.sum += expf(widened(xs.x[i]) - all.largest);
    }
    all = block_sum(all);
    if (threadIdx.x == 0) *loss = all.largest - wanted + logf(all.sum);
    const float inverse = 1 / all.sum;
    for (unsigned at = threadIdx.x * WIDTH; at < n; at += THREADS * WIDTH) {
        P xs = P::load(logits + at);
        for (unsigned i = 0; i < WIDTH; ++i) {
            const float p = expf(widened(xs.x[i]) - all.largest) * inverse;
            xs.x[i] = rounded<T>(factor * (p - (at + i == target ? 1.f : 0.f)));
        }
        xs.store(logits + at);
    }
}

/// cross_entropy_T(logits, targets, losses, rows, n, factor): losses[i] = −log softmax(logits[i])[targets[i]], and
/// logits[i] becomes the gradient of factor·losses[i], factor·(softmax(logits[i]) − onehot(targets[i])).
///
/// logits (rows, n), targets and losses (rows), targets below n. A block of 512 threads takes a row, then the row
/// gridDim.x further. A row is read twice and written once.
template <typename T>
__device__ void cross_entropy(
    T* logits, const unsigned* targets, float* losses, unsigned rows, unsigned n, float factor) {
    const bool packs = n % PACKED<T> == 0 && aligned(logits);
    for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
        T* const start = logits + size_t(row) * n;
        if (packs) {
            row_loss<PACKED<T>>(start, targets[row], losses + row, n, factor);
        } else {
            row_loss<1>(start, targets[row], losses + row, n, factor);
        }
    }
}

#define DEFINE(NAME, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_##NAME(                    \
        T* logits, const unsigned* targets, float* losses, unsigned rows, unsigned n,              \
        float factor) {                                                                            \
        cross_entropy<T>(logits, targets, losses, rows, n, factor);                                \
    }
FOR_DTYPES(DEFINE)
#undef DEFINE
