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

template <unsigned WIDTH>
__device__ void row_loss(float* logits, unsigned target, float* loss, unsigned n) {
    using P = Pack<float, WIDTH>;
    const float wanted = logits[target];
    Exponentials all = {-INFINITY, 0};
    for (unsigned at = threadIdx.x * WIDTH; at < n; at += THREADS * WIDTH) {
        const P xs = P::load(logits + at);
        float largest = xs.x[0];
        for (unsigned i = 1; i < WIDTH; ++i) largest = fmaxf(largest, xs.x[i]);
        // most often the largest so far stays, and nothing is scaled
        if (largest > all.largest) all.add({largest, 0});
        if (all.largest == -INFINITY) continue;
        for (unsigned i = 0; i < WIDTH; ++i) all.sum += expf(xs.x[i] - all.largest);
    }
    all = block_sum(all);
    if (threadIdx.x == 0) *loss = all.largest - wanted + logf(all.sum);
    const float inverse = 1 / all.sum;
    for (unsigned at = threadIdx.x * WIDTH; at < n; at += THREADS * WIDTH) {
        P xs = P::load(logits + at);
        for (unsigned i = 0; i < WIDTH; ++i) {
            xs.x[i] = expf(xs.x[i] - all.largest) * inverse - (at + i == target ? 1.f : 0.f);
        }
        xs.store(logits + at);
    }
}

/// cross_entropy(logits, targets, losses, rows, n): losses[i] = −log softmax(logits[i])[targets[i]], and logits[i]
/// becomes its gradient, softmax(logits[i]) − onehot(targets[i]).
///
/// logits (rows, n), targets and losses (rows), targets below n. A block of 512 threads takes a row, then the row
/// gridDim.x further. A row is read twice and written once.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy(float* logits, const unsigned* targets, float* losses, unsigned rows, unsigned n) {
    const bool packs = n % PACKED<float> == 0 && aligned(logits);
    for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
        float* const start = logits + size_t(row) * n;
        if (packs) {
            row_loss<PACKED<float>>(start, targets[row], losses + row, n);
        } else {
            row_loss<1>(start, targets[row], losses + row, n);
        }
    }
}
