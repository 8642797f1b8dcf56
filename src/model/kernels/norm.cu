// Root mean square norm (Zhang & Sennrich 2019), y = x / √(mean x² + ε) ∘ w, and its gradient; sums of rows.
//
// x, g, y, dx (rows, n), w (n). Around a residual sum both come with it: the norm of x + added, the gradient with what
// reaches x on another way. Any number of blocks, of as many threads as a row has packs of 16 bytes, rounded up to whole
// warps, 256 at most.
#include "common.cuh"

constexpr unsigned THREADS = 256;

/// Calls `f(at)` with WIDTH = 16 bytes or one number, so that the block covers a row of n.
template <unsigned WIDTH, typename F>
__device__ void along(unsigned n, F f) {
    for (unsigned at = threadIdx.x * WIDTH; at < n; at += blockDim.x * WIDTH) f(at);
}

/// sum = x + added over a row; a thread reads from it later what it wrote itself.
template <typename T, unsigned WIDTH>
__device__ void sum_row(const T* x, const T* added, T* sum, unsigned n) {
    using P = Pack<T, WIDTH>;
    along<WIDTH>(n, [&](unsigned at) {
        P xs = P::load(x + at);
        const P others = P::load(added + at);
        for (unsigned i = 0; i < WIDTH; ++i) xs.x[i] = rounded<T>(widened(xs.x[i]) + widened(others.x[i]));
        xs.store(sum + at);
    });
}

template <typename T, unsigned WIDTH>
__device__ void norm(const T* x, const T* w, T* y, unsigned n, float eps) {
    using P = Pack<T, WIDTH>;
    float square = 0;
    along<WIDTH>(n, [&](unsigned at) {
        const P xs = P::load(x + at);
        for (unsigned i = 0; i < WIDTH; ++i) square += widened(xs.x[i]) * widened(xs.x[i]);
    });
    const float inverse = 1 / sqrtf(block_sums(make_float2(square, 0)).x / n + eps);
    along<WIDTH>(n, [&](unsigned at) {
        const P xs = P::load(x + at), ws = P::load(w + at);
        P ys;
        for (unsigned i = 0; i < WIDTH; ++i) ys.x[i] = rounded<T>(widened(xs.x[i]) * inverse * widened(ws.x[i]));
        ys.store(y + at);
    });
}

/// rms_norm_T(x, added, w, sum, y, rows, n, eps): y of x, or with an `added` that is not null of sum = x + added. A block
/// takes a row, then the row gridDim.x further.
template <typename T>
__device__ void rms_norm(
    const T* x, const T* added, const T* w, T* sum, T* y, unsigned rows, unsigned n, float eps) {
    const bool packs =
        n % PACKED<T> == 0 && aligned(x) && aligned(added) && aligned(w) && aligned(sum) && aligned(y);
    const auto row_of = [&](auto width, size_t start) {
        constexpr unsigned WIDTH = decltype(width)::value;
        const T* read = x + start;
        if (added != nullptr) {
            sum_row<T, WIDTH>(read, added + start, sum + start, n);
            read = sum + start;
        }
        norm<T, WIDTH>(read, w, y + start, n, eps);
    };
    for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
        const size_t start = size_t(row) * n;
        if (packs) {
            row_of(std::integral_constant<unsigned, PACKED<T>>(), start);
        } else {
            row_of(std::integral_constant<unsigned, 1>(), start);
        }
    }
}

/// One row of the gradient; `added`, unless null, is added to it, and it to `dw`.
template <typename T, unsigned WIDTH>
__device__ void norm_back(
    const T* x, const T* w, const T* g, const T* added, T* dx, float* dw, unsigned n, float eps) {
    using P = Pack<T, WIDTH>;
    float2 sums = make_float2(0, 0);
    along<WIDTH>(n, [&](unsigned at) {
        const P xs = P::load(x + at), ws = P::load(w + at), gs = P::load(g + at);
        for (unsigned i = 0; i < WIDTH; ++i) {
            sums.x += widened(xs.x[i]) * widened(xs.x[i]);
            sums.y += widened(gs.x[i]) * widened(ws.x[i]) * widened(xs.x[i]);
        }
    });
    sums = block_sums(sums);
    const float inverse = 1 / sqrtf(sums.x / n + eps);
    const float mean = sums.y * inverse / n;
    along<WIDTH>(n, [&](unsigned at) {
        const P xs = P::load(x + at), ws = P::load(w + at), gs = P::load(g + at);
        P dxs, others;
        if (added != nullptr) others = P::load(added + at);
        for (unsigned i = 0; i < WIDTH; ++i) {
            const float normed = widened(xs.x[i]) * inverse;
            float gradient = (widened(gs.x[i]) * widened(ws.x[i]) - normed * mean) * inverse;
            if (added != nullptr) gradient += widened(others.x[i]);
            dxs.x[i] = rounded<T>(gradient);
            if (dw != nullptr) dw[at + i] += widened(gs.x[i]) * normed;
        }
        dxs.store(dx + at);
    });
}

/// rms_norm_back_T(x, w, g, added, dx, partial, rows, n, eps), with x̂ = x / √(mean x² + ε): dx = (g∘w − x̂ ·
/// mean(g∘w∘x̂)) / √(mean x² + ε), plus `added` unless that is null, and dw = Σ_rows g∘x̂, of which block k writes its own rows' share to partial (gridDim.x, n);
/// sum_rows adds the shares up. A null `partial` asks for no dw.
///
/// Block k takes rows k·⌈rows/gridDim.x⌉ and following. Dynamic shared memory: 4·n bytes with a `partial`, else none.
template <typename T>
__device__ void rms_norm_back(
    const T* x, const T* w, const T* g, const T* added, T* dx, float* partial, unsigned rows, unsigned n, float eps) {
    DYNAMIC_SHARED(room);
    float* const dw = partial == nullptr ? nullptr : reinterpret_cast<float*>(room);
    const bool packs =
        n % PACKED<T> == 0 && aligned(x) && aligned(w) && aligned(g) && aligned(added) && aligned(dx);
    const unsigned share = (rows + gridDim.x - 1) / gridDim.x;
    const unsigned first = min(blockIdx.x * share, rows), end = min(first + share, rows);
    // each number of dw belongs to one thread, whichever way the block covers a row
    const auto each = [&](auto f) {
        if (packs) {
            along<PACKED<T>>(n, [&](unsigned at) {
                for (unsigned i = 0; i < PACKED<T>; ++i) f(at + i);
            });
        } else {
            along<1>(n, f);
        }
    };
    if (dw != nullptr) each([&](unsigned at) { dw[at] = 0; });
    for (unsigned row = first; row < end; ++row) {
        const size_t start = size_t(row) * n;
        const T* const others = added == nullptr ? nullptr : added + start;
        if (packs) {
            norm_back<T, PACKED<T>>(x + start, w, g + start, others, dx + start, dw, n, eps);
        } else {
            norm_back<T, 1>(x + start, w, g + start, others, dx + start, dw, n, eps);
        }
    }
    if (dw != nullptr) each([&](unsigned at) { partial[size_t(blockIdx.x) * n + at] = dw[at]; });
}

#define DEFINE(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_##NAME(                                       \
        const T* x, const T* added, const T* w, T* sum, T* y, unsigned rows, unsigned n, float eps) {            \
        rms_norm<T>(x, added, w, sum, y, rows, n, eps);                                                          \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_back_##NAME(                                  \
        const T* x, const T* w, const T* g, const T* added, T* dx, float* partial, unsigned rows, unsigned n,    \
        float eps) {                                                                                             \
        rms_norm_back<T>(x, w, g, added, dx, partial, rows, n, eps);                                             \
    }
FOR_DTYPES(DEFINE)
#undef DEFINE

/// sum_rows(partial, out, rows, n): out[j] = Σ_i partial[i][j].
///
/// ⌈n/32⌉ blocks of 256 threads, or fewer: a lane takes a column, and each of the 8 warps every eighth row of it; their
/// sums are added from the first warp to the last.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_rows(const float* partial, float* out, unsigned rows, unsigned n) {
    constexpr unsigned WARPS = THREADS / WARP;
    __shared__ float sums[WARPS][WARP];
    const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (unsigned start = blockIdx.x * WARP; start < n; start += gridDim.x * WARP) {
        const unsigned column = start + lane;
        float sum = 0;
        if (column < n) {
#pragma unroll 8
            for (unsigned row = warp; row < rows; row += WARPS) sum += partial[size_t(row) * n + column];
        }
        sums[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && column < n) {
            for (unsigned other = 1; other < WARPS; ++other) sum += sums[other][lane];
            out[column] = sum;
        }
        // the next columns are written where these are read
        __syncthreads();
    }
}
