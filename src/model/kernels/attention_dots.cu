// What both gradients of attention.cu subtract from dp, of every query: dots = Σ_d y·g.
#include "attention.cuh"

/// attention_dots_T(y, g, dots, rows, t, h, d): dots[b][h][t] = Σ y·g over d, of b·t·h rows. As many lanes as have packs take
/// a row, a power of two of them, then the row as many further as others have begun.
template <typename T>
__device__ void attention_dots(const T* y, const T* g, float* dots, unsigned rows, unsigned t, unsigned h, unsigned d) {
    const bool packs = d % PACKED<T> == 0 && aligned(y) && aligned(g);
    const unsigned width = packs ? PACKED<T> : 1;
    unsigned lanes = 1;
    while (lanes < WARP && lanes * width < d) lanes *= 2;
    const unsigned of_warp = WARP / lanes, lane = threadIdx.x % lanes;
    const unsigned warps = gridDim.x * (blockDim.x / WARP);
    const unsigned warp = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    // all lanes of a warp go as often, since they add up together
    for (size_t start = size_t(warp) * of_warp; start < rows; start += size_t(warps) * of_warp) {
        const unsigned row = unsigned(start) + threadIdx.x % WARP / lanes;
        float sum = 0;
        const auto add = [&](auto ys, unsigned at) {
            using P = decltype(ys);
            ys = P::load(y + size_t(row) * d + at);
            const P gs = P::load(g + size_t(row) * d + at);
            for (unsigned i = 0; i < sizeof(P) / sizeof(T); ++i) sum += widened(ys.x[i]) * widened(gs.x[i]);
        };
        if (row < rows && packs) {
            for (unsigned at = lane * width; at < d; at += lanes * width) add(Pack<T>(), at);
        } else if (row < rows) {
            for (unsigned at = lane; at < d; at += lanes) add(Pack<T, 1>(), at);
        }
        for (unsigned step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
        if (lane != 0 || row >= rows) continue;
        const unsigned token = row / h, head = row - token * h, batch = token / t, query = token - batch * t;
        dots[(size_t(batch) * h + head) * t + query] = sum;
    }
}

#define DEFINE_DOTS(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) attention_dots_##NAME(                                          \
        const T* y, const T* g, float* dots, unsigned rows, unsigned t, unsigned h, unsigned d) {                     \
        attention_dots<T>(y, g, dots, rows, t, h, d);                                                                 \
    }
FOR_DTYPES(DEFINE_DOTS)
#undef DEFINE_DOTS
