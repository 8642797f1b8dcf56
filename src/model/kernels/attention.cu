// Scaled dot-product attention and its gradients without a t × s matrix in memory (Dao et al. 2022; Dao 2023).
//
// q, y, g, dq (b, t, h, d); k, v, dk, dv (b, s, kv, d) with h a multiple of kv: head i sees the keys of head i·kv/h,
// and none is repeated. Query i of row `batch` sees the run of keys first[n]..end[n], n = (batch·t + i) mod seen_rows,
// which is never empty; seen_rows is t where all rows of the batch share what is seen, else b·t. With z = scale·q·k
//
//   score = z, or cap·tanh(z/cap) with a cap above 0      p = exp(score − lse)      lse = log Σ_seen exp(score)
//   y = Σ_keys p·v                                        dots = Σ_d y·g = Σ_keys p·dp      dp = g·v
//   ds = p·(dp − dots)·(1 − tanh²)     dq = scale·Σ_keys ds·k     dk = scale·Σ_queries ds·q     dv = Σ_queries p·g
//
// lse and dots (b, h, t) are f32.
//
// Launches. A kernel is compiled for a head's width D of 32, 64, 96, 128 or 256; the caller takes the smallest that is
// not below d, and the rest is zero in shared memory. -DATTENTION_WIDTH=D compiles one of them: a driver that must
// compile all of the PTX for its device takes some 9 seconds, for one width 2.
//
//   attention, attention_back_q   grid (⌈t/rows⌉, h, b)
//   attention_back_kv             grid (⌈s/rows⌉, kv, b)
//   attention_dots                any grid, 256 threads, no shared memory; in attention_dots.cu, for all widths
//
// `rows` are those of the tensor that a block writes, `step` those of the other side that it works on at once; with 16
// bits it has two times as many, since the next arrive meanwhile.
//
//   16 bits            rows              step for D = 32 … 256   threads for D = 32 … 256   dynamic shared memory, bytes
//    by warps
//   attention          128               64, 64, 64, 32, 32      128, 128, 128, 128, 256    2·D·(rows + 4·step)
//   attention_back_q   128               64, 64, 32, 32, 16      128, 128, 128, 128, 256    4·D·(rows + 2·step) +
//                                                                                           8·rows + 128
//   attention_back_kv  128, D = 256: 64  64, 64, 64, 32, 32      128, 128, 256, 256, 256    4·D·(rows + 2·step) +
//                                                                                           32·step + 512
//    by warpgroups, D = 64, 96, 128
//   attention          128               64                      256                        2·D·(rows + 4·step)
//   attention_back_q   64                64                      128                        4·D·(rows + 2·step) +
//                                                                                           8·rows + 128
//   attention_back_kv  64                64                      128                        4·D·(rows + 2·step) +
//                                                                                           32·step + 512
//   f32
//   attention          32                32                      64                         384·(D + 4) + 5120
//   attention_back_q   32                32                      64                         512·(D + 4) + 5120
//   attention_back_kv  32                32                      64, D = 256: 128           512·(D + 4) + 512 +
//                                                                                           80·threads
//
// -DATTENTION_BY_WARPGROUPS, for compute capability 9.0 and no other (-arch=compute_90a), multiplies by warpgroups where it
// can. Without it, that is at most 99 KiB for D ≤ 128, what smaller cards have, and 162 KiB for D = 256, what an A100 has; an
// H100 has 227. A launch must
// first be allowed what is above 48 KiB (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES). h, kv and b are at most
// 65535, what a grid holds.
#include "attention_mma.cuh"
#include "attention_plain.cuh"

/// What a kernel of a dtype and a width is: its threads, the blocks of it that share a multiprocessor, and its code.
template <typename T, unsigned D>
struct Launches : MmaLaunches<D> {};
template <unsigned D>
struct Launches<float, D> {
    using Plain = PlainLaunches<D>;
    struct Forward {
        static constexpr unsigned THREADS = Plain::THREADS, BLOCKS = Plain::BLOCKS;
    };
    using BackQ = Forward;
    struct BackKv {
        static constexpr unsigned THREADS = Plain::KV_THREADS, BLOCKS = Plain::KV_BLOCKS;
    };
};
#define LAUNCH(T, D, KERNEL) __launch_bounds__(Launches<T, D>::KERNEL::THREADS, Launches<T, D>::KERNEL::BLOCKS)

// attention_T_dD(q, k, v, first, end, seen_rows, y, lse, b, t, s, h, kv, d, scale, cap): y and lse.
// attention_back_q_T_dD(q, k, v, g, lse, dots, first, end, seen_rows, dq, b, t, s, h, kv, d, scale, cap): dq.
// attention_back_kv_T_dD(q, k, v, g, lse, dots, first, end, seen_rows, dk, dv, b, t, s, h, kv, d, scale, cap): dk, dv.
#define DEFINE_WIDTH(NAME, T, D)                                                                                      \
    extern "C" __global__ void LAUNCH(T, D, Forward) attention_##NAME##_d##D(                                         \
        const T* q, const T* k, const T* v, const unsigned* first, const unsigned* end, unsigned seen_rows, T* y,     \
        float* lse, unsigned b, unsigned t, unsigned s, unsigned h, unsigned kv, unsigned d, float scale,             \
        float cap) {                                                                                                  \
        attention<D>(q, k, v, {first, end, seen_rows}, y, lse, {b, t, s, h, kv, d}, scale, cap);                      \
    }                                                                                                                 \
    extern "C" __global__ void LAUNCH(T, D, BackQ) attention_back_q_##NAME##_d##D(                                    \
        const T* q, const T* k, const T* v, const T* g, const float* lse, const float* dots, const unsigned* first,   \
        const unsigned* end, unsigned seen_rows, T* dq, unsigned b, unsigned t, unsigned s, unsigned h, unsigned kv,  \
        unsigned d, float scale, float cap) {                                                                         \
        const Seen seen = {first, end, seen_rows};                                                                    \
        attention_back_q<D>(q, k, v, g, lse, dots, seen, dq, {b, t, s, h, kv, d}, scale, cap);                        \
    }                                                                                                                 \
    extern "C" __global__ void LAUNCH(T, D, BackKv) attention_back_kv_##NAME##_d##D(                                  \
        const T* q, const T* k, const T* v, const T* g, const float* lse, const float* dots, const unsigned* first,   \
        const unsigned* end, unsigned seen_rows, T* dk, T* dv, unsigned b, unsigned t, unsigned s, unsigned h,        \
        unsigned kv, unsigned d, float scale, float cap) {                                                            \
        const Seen seen = {first, end, seen_rows};                                                                    \
        attention_back_kv<D>(q, k, v, g, lse, dots, seen, dk, dv, {b, t, s, h, kv, d}, scale, cap);                   \
    }

#ifdef ATTENTION_WIDTH
// the argument of a macro that pastes it is not replaced itself
#define DEFINE_ONE(NAME, T, D) DEFINE_WIDTH(NAME, T, D)
#define DEFINE(NAME, T) DEFINE_ONE(NAME, T, ATTENTION_WIDTH)
#ifdef ATTENTION_BY_WARPGROUPS
// f32 is not multiplied by them
DEFINE(f16, __half)
DEFINE(bf16, __nv_bfloat16)
#else
FOR_DTYPES(DEFINE)
#endif
#undef DEFINE
#undef DEFINE_ONE
#else
#define DEFINE(NAME, T)          \
    DEFINE_WIDTH(NAME, T, 32)    \
    DEFINE_WIDTH(NAME, T, 64)    \
    DEFINE_WIDTH(NAME, T, 96)    \
    DEFINE_WIDTH(NAME, T, 128)   \
    DEFINE_WIDTH(NAME, T, 256)
FOR_DTYPES(DEFINE)
#undef DEFINE
#endif
#undef DEFINE_WIDTH
#undef LAUNCH
