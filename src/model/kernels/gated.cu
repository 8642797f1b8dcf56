// Gated activations (Shazeer 2020), y = act(a)∘b, and their gradients.
//
// All activations are a·s(a): with s = σ(a) SiLU, with s = σ(√(8/π)·(a + 0.044715·a³)) the approximation of GELU, with
// s = Φ(a) GELU itself (Hendrycks & Gimpel 2016). Their slope is s + a·s′.
//
// a and b, and their gradients, are (rows, n) whose rows begin `pitch` numbers apart, so that both may be halves of one
// tensor; y and g are dense. Blocks of 256 threads, any number of them: each takes a row, then the row gridDim.x further,
// and a thread 16 bytes of each tensor at a time.
#include "common.cuh"

constexpr unsigned THREADS = 256;

/// s of an activation, and a·s′.
struct Share {
    float s, rest;
};

/// Of σ(z): σ′ = σ·(1 − σ).
__device__ inline Share logistic(float a, float z, float slope) {
    const float s = 1 / (1 + expf(-z)), value = a * s;
    return {s, (value - value * s) * slope};
}

struct Silu {
    __device__ static Share share(float a) { return logistic(a, a, 1); }
};

struct GeluTanh {
    __device__ static Share share(float a) {
        constexpr double ROOT = 1.5957691216057308, CUBE = ROOT * 0.044715;
        const float square = a * a;
        return logistic(a, a * (float(ROOT) + float(CUBE) * square), float(ROOT) + float(3 * CUBE) * square);
    }
};

struct Gelu {
    __device__ static Share share(float a) {
        constexpr float HALF_ROOT = 0.7071067811865476f, DENSITY = 0.3989422804014327f;
        // erfc, because 1 + erf of a negative number is a difference of two that are nearly the same
        return {0.5f * erfcf(-a * HALF_ROOT), a * DENSITY * expf(-0.5f * a * a)};
    }
};

/// Calls `f` with where numbers are in a tensor with a pitch and in a dense one, for packs of 16 bytes if a thread's
/// tensors allow it, else for single numbers.
template <typename T, typename F>
__device__ void each(unsigned rows, unsigned n, unsigned pitch, bool aligned, F f) {
    const bool packs = aligned && n % PACKED<T> == 0 && pitch % PACKED<T> == 0;
    for (size_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const size_t from = row * pitch, to = row * n;
        if (packs) {
            for (unsigned i = threadIdx.x * PACKED<T>; i < n; i += THREADS * PACKED<T>) f(Pack<T>(), from + i, to + i);
        } else {
            for (unsigned i = threadIdx.x; i < n; i += THREADS) f(Pack<T, 1>(), from + i, to + i);
        }
    }
}

/// gated_ACT_T(a, b, y, rows, n, pitch): y = act(a)∘b.
template <typename T, typename Activation>
__device__ void gated(const T* a, const T* b, T* y, unsigned rows, unsigned n, unsigned pitch) {
    each<T>(rows, n, pitch, aligned(a) && aligned(b) && aligned(y), [&](auto ys, size_t from, size_t to) {
        using P = decltype(ys);
        const P as = P::load(a + from), bs = P::load(b + from);
        for (unsigned i = 0; i < sizeof(P) / sizeof(T); ++i) {
            const float value = widened(as.x[i]);
            ys.x[i] = rounded<T>(value * Activation::share(value).s * widened(bs.x[i]));
        }
        ys.store(y + to);
    });
}

/// gated_back_ACT_T(a, b, g, da, db, rows, n, pitch): da = g∘b∘act′(a) and db = g∘act(a).
template <typename T, typename Activation>
__device__ void gated_back(
    const T* a, const T* b, const T* g, T* da, T* db, unsigned rows, unsigned n, unsigned pitch) {
    const bool packs = aligned(a) && aligned(b) && aligned(g) && aligned(da) && aligned(db);
    each<T>(rows, n, pitch, packs, [&](auto das, size_t from, size_t to) {
        using P = decltype(das);
        const P as = P::load(a + from), bs = P::load(b + from), gs = P::load(g + to);
        P dbs;
        for (unsigned i = 0; i < sizeof(P) / sizeof(T); ++i) {
            const float gradient = widened(gs.x[i]);
            const Share share = Activation::share(widened(as.x[i]));
            dbs.x[i] = rounded<T>(gradient * (widened(as.x[i]) * share.s));
            das.x[i] = rounded<T>(gradient * widened(bs.x[i]) * (share.s + share.rest));
        }
        das.store(da + from);
        dbs.store(db + from);
    });
}

#define DEFINE_ONE(ACT, Activation, NAME, T)                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                          \
        gated_##ACT##_##NAME(                                                                      \
            const T* a, const T* b, T* y, unsigned rows, unsigned n, unsigned pitch) {             \
        gated<T, Activation>(a, b, y, rows, n, pitch);                                             \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) gated_back_##ACT##_##NAME(               \
        const T* a, const T* b, const T* g, T* da, T* db, unsigned rows, unsigned n,               \
        unsigned pitch) {                                                                          \
        gated_back<T, Activation>(a, b, g, da, db, rows, n, pitch);                                \
    }
#define DEFINE(NAME, T)              \
    DEFINE_ONE(silu, Silu, NAME, T)  \
    DEFINE_ONE(gelu_tanh, GeluTanh, NAME, T) \
    DEFINE_ONE(gelu, Gelu, NAME, T)
FOR_DTYPES(DEFINE)
#undef DEFINE
#undef DEFINE_ONE
