// Rotary position embedding (Su et al. 2021), half-split layout.
#include "common.cuh"

constexpr unsigned THREADS = 256;

/// What one token's heads (h, d) become; a thread takes WIDTH neighbours of a first half with those of the second, or
/// WIDTH that stay.
template <typename T, unsigned WIDTH>
__device__ void turn(
    const T* x, const float* cos, const float* sin, T* y, unsigned h, unsigned d, unsigned half, float sign) {
    using P = Pack<T, WIDTH>;
    const unsigned per_head = (d - half) / WIDTH;
    for (unsigned i = threadIdx.x; i < h * per_head; i += blockDim.x) {
        const unsigned at = i % per_head * WIDTH;
        const size_t start = size_t(i / per_head) * d;
        const P right = P::load(x + start + half + at);
        if (at >= half) {
            right.store(y + start + half + at);
            continue;
        }
        const P left = P::load(x + start + at);
        P turned_left, turned_right;
        // of angles, packs are narrower
        using Angles = Pack<float, WIDTH == 1 ? 1 : PACKED<float>>;
        constexpr unsigned EACH = sizeof(Angles) / sizeof(float);
        Angles cs[WIDTH / EACH], ss[WIDTH / EACH];
        for (unsigned j = 0; j < WIDTH; j += EACH) {
            cs[j / EACH] = Angles::load(cos + at + j);
            ss[j / EACH] = Angles::load(sin + at + j);
        }
        for (unsigned j = 0; j < WIDTH; ++j) {
            const float l = widened(left.x[j]), r = widened(right.x[j]);
            const float c = cs[j / EACH].x[j % EACH], s = sign * ss[j / EACH].x[j % EACH];
            turned_left.x[j] = rounded<T>(l * c - r * s);
            turned_right.x[j] = rounded<T>(l * s + r * c);
        }
        turned_left.store(y + start + at);
        turned_right.store(y + start + half + at);
    }
}

/// rotate_T(x, cos, sin, y, tokens, h, d, half, rows, x_pitch, y_pitch, sign): for i < half
/// yᵢ = xᵢ·cosᵢ − xᵢ₊ₕ·sinᵢ and yᵢ₊ₕ = xᵢ·sinᵢ + xᵢ₊ₕ·cosᵢ with h = half; elements from 2·half on are copied.
///
/// x, y (tokens, h, d), from token to token a pitch apart; cos, sin (rows, half), where token i has row i mod rows. sign −1
/// rotates back, which is the gradient. A block of at most 256 threads takes a token, then the token gridDim.x further.
template <typename T>
__device__ void rotate(
    const T* x, const float* cos, const float* sin, T* y, unsigned tokens, unsigned h, unsigned d, unsigned half,
    unsigned rows, unsigned x_pitch, unsigned y_pitch, float sign) {
    const bool packs =
        (d | half | x_pitch | y_pitch) % PACKED<T> == 0 && aligned(x) && aligned(y) && aligned(cos) && aligned(sin);
    for (size_t token = blockIdx.x; token < tokens; token += gridDim.x) {
        const T* const from = x + token * x_pitch;
        T* const to = y + token * y_pitch;
        const size_t angles = token % rows * half;
        if (packs) {
            turn<T, PACKED<T>>(from, cos + angles, sin + angles, to, h, d, half, sign);
        } else {
            turn<T, 1>(from, cos + angles, sin + angles, to, h, d, half, sign);
        }
    }
}

#define DEFINE(NAME, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) rotate_##NAME(                                             \
        const T* x, const float* cos, const float* sin, T* y, unsigned tokens, unsigned h, unsigned d, unsigned half, \
        unsigned rows, unsigned x_pitch, unsigned y_pitch, float sign) {                                             \
        rotate<T>(x, cos, sin, y, tokens, h, d, half, rows, x_pitch, y_pitch, sign);                                 \
    }
FOR_DTYPES(DEFINE)
#undef DEFINE
