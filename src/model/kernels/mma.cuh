// The matrix unit of compute capability 8.0, by warps: products of 16-bit numbers summed in f32 registers, loads of their
// factors from shared memory, and copies into it that run in the background.
//
// Which lane holds what is laid down in the PTX ISA (mma.m16n8k16, ldmatrix). With row = lane/4 and column = 2·(lane%4),
// two neighbouring 16-bit numbers to a register, the lower column in the lower half:
//
//   left, 16 × 16      x[0], x[1] at (row, column), (row + 8, column); x[2], x[3] the same 8 columns further
//   right, 16 × 8      b0, b1 at (column, row), (column + 8, row), the neighbour being the next row
//   sums, 16 × 8       x[0], x[1] at (row, column), (row, column + 1); x[2], x[3] the same 8 rows below
//
// Hence two neighbouring tiles of sums, rounded, are a left factor as they lie: nothing need pass through shared memory.
#pragma once

#include "common.cuh"

/// Sums of products of M × N tiles of 16 rows and 8 columns.
template <unsigned M, unsigned N>
struct Sums {
    float x[M][N][4];

    /// Of element i of a tile, counted from the tile's corner.
    __device__ static unsigned row(unsigned i) { return threadIdx.x % WARP / 4 + i / 2 * 8; }
    __device__ static unsigned column(unsigned i) { return threadIdx.x % 4 * 2 + i % 2; }

    /// Calls f(m, n, i, x) with every number of this lane.
    template <typename F>
    __device__ void each(const F& f) {
#pragma unroll
        for (unsigned m = 0; m < M; ++m) {
#pragma unroll
            for (unsigned n = 0; n < N; ++n) {
#pragma unroll
                for (unsigned i = 0; i < 4; ++i) f(m, n, i, x[m][n][i]);
            }
        }
    }

    __device__ void clear() {
        each([](unsigned, unsigned, unsigned, float& sum) { sum = 0; });
    }
};

/// M left factors side by side with N/2 below each other: what N tiles of sums are as factors.
template <unsigned M, unsigned N>
struct Left {
    unsigned x[M][N / 2][4];
};

#ifndef SVDHUB_ON_CPU

/// sums += left · right
template <typename T>
__device__ inline void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ inline void multiply<__half>(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply<__nv_bfloat16>(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four matrices of 8 × 8 numbers of 16 bits: lane i says where row i%8 of matrix i/8 starts, in shared memory at a
/// multiple of 16 bytes. A lane gets of each the two neighbours at (row, column).
__device__ inline void load_four(unsigned (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
}

/// The same, each matrix turned: a lane gets the two below each other at (column, row).
__device__ inline void load_four_turned(unsigned (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row)))
                 : "memory");
}

/// Copies BYTES (4 or 16) to shared memory in the background; zeros where they do not exist.
template <unsigned BYTES>
__device__ inline void copy_later(void* to, const void* from, bool exists) {
    const unsigned place = unsigned(__cvta_generic_to_shared(to)), count = exists ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(count) : "memory");
    } else {
        static_assert(BYTES == 4, "a copy is of 4 or 16 bytes");
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(place), "l"(from), "r"(count) : "memory");
    }
}

/// Waits for the copies of this thread; those of others need a barrier as well.
__device__ inline void copies_arrive() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Two numbers rounded to the nearest of a dtype, ties to even, in one register.
template <typename T>
__device__ inline unsigned rounded_pair(float low, float high);
template <>
__device__ inline unsigned rounded_pair<__half>(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <>
__device__ inline unsigned rounded_pair<__nv_bfloat16>(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/// 2ˣ in one instruction: exp2f takes four, for results below 2⁻¹²⁶, which are 0 here.
__device__ inline float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

#endif

/// Sums as a left factor.
template <typename T, unsigned M, unsigned N>
__device__ Left<M, N> as_left(const Sums<M, N>& sums) {
    Left<M, N> left;
#pragma unroll
    for (unsigned m = 0; m < M; ++m) {
#pragma unroll
        for (unsigned n = 0; n < N; ++n) {
            const auto& x = sums.x[m][n];
            left.x[m][n / 2][n % 2 * 2] = rounded_pair<T>(x[0], x[1]);
            left.x[m][n / 2][n % 2 * 2 + 1] = rounded_pair<T>(x[2], x[3]);
        }
    }
    return left;
}

/// Rows of D 16-bit numbers in shared memory. The packs of eight in a row change places from row to row, so that eight
/// rows below each other, what a load of a matrix reads at once, lie in different banks.
template <unsigned D>
struct Rows {
    /// Rows of 64·n numbers all start in the same bank, of 32 + 64·n in one of two.
    static constexpr unsigned TWIST = D % 64 == 0 ? 7 : 3;
    static constexpr unsigned PACKS = D / 8;

    __device__ static unsigned twist(unsigned row) { return (D % 64 == 0 ? row : row / 2) & TWIST; }

    /// Where a pack is.
    __device__ static unsigned place(unsigned row, unsigned pack) { return row * D + (pack ^ twist(row)) * 8; }

    /// Copies COUNT rows of one head, from row `start` of n, by THREADS threads; zeros beyond n and beyond d. They are
    /// there after copies_arrive() and a barrier.
    template <unsigned COUNT, unsigned THREADS, typename T>
    __device__ static void fetch(T* to, const T* head, unsigned stride, unsigned start, unsigned n, unsigned d) {
        // as many threads to a row as packs change places: each thread's twist is always the same
        constexpr unsigned LANES = TWIST + 1, STEP = THREADS / LANES;
        static_assert(STEP % 8 == 0 && PACKS % LANES == 0, "a thread's rows have one twist");
        if (aligned(head) && d % 8 == 0) {
            const unsigned first = threadIdx.x / LANES, lane = threadIdx.x % LANES;
            T* const room = to + place(first, lane);
            // of a row that does not exist nothing is read, wherever it would be
            const T* from = head + size_t(start + first) * stride + lane * 8;
#pragma unroll
            for (unsigned i = 0; i < COUNT; i += STEP, from += STEP * stride) {
                if (COUNT % STEP != 0 && first + i >= COUNT) break;
#pragma unroll
                for (unsigned pack = 0; pack < PACKS; pack += LANES) {
                    const bool exists = start + first + i < n && (pack + lane) * 8 < d;
                    copy_later<16>(room + i * D + pack * 8, from + pack * 8, exists);
                }
            }
        } else {
#pragma unroll 1
            for (unsigned i = threadIdx.x; i < COUNT * D; i += THREADS) {
                const unsigned row = i / D, column = i % D;
                const bool exists = start + row < n && column < d;
                T* const number = to + place(row, column / 8) + column % 8;
                *number = exists ? head[size_t(start + row) * stride + column] : rounded<T>(0);
            }
        }
    }
};

/// Where the lane's rows of four matrices of 8 × 8 start, as seen from a corner of 16 rows and 16 columns: the second
/// matrix lies below the first (DOWN) or to its right.
template <unsigned D, bool DOWN>
struct Corner {
    unsigned offset, twist;

    __device__ Corner() {
        const unsigned lane = threadIdx.x % WARP;
        const unsigned row = DOWN ? lane % 16 : lane % 8 + lane / 16 * 8;
        const unsigned pack = DOWN ? lane / 16 : lane / 8 % 2;
        offset = row * D;
        twist = Rows<D>::twist(row) ^ pack;
    }

    /// In units of 16 rows and 16 columns.
    template <typename T>
    __device__ const T* at(const T* rows, unsigned row, unsigned column) const {
        // packs change places within groups of TWIST + 1; with the group apart, the compiler sees few different sums
        const unsigned pack = 2 * column, in_group = pack % (Rows<D>::TWIST + 1);
        return rows + offset + (in_group ^ twist) * 8 + row * 16 * D + (pack - in_group) * 8;
    }
};

/// Rows of shared memory as left factors, loaded whenever they are used.
template <unsigned D, unsigned M, typename T>
struct LoadedRows {
    const T* rows;
    Corner<D, true> corner;

    __device__ explicit LoadedRows(const T* rows) : rows(rows) {}

    __device__ void factor(unsigned (&x)[4], unsigned m, unsigned k) const { load_four(x, corner.at(rows, m, k)); }
};

/// Rows of shared memory as left factors, loaded once: M·D/4 registers.
template <unsigned D, unsigned M>
struct KeptRows {
    unsigned x[M][D / 16][4];

    template <typename T>
    __device__ explicit KeptRows(const T* rows) {
        const Corner<D, true> corner;
#pragma unroll
        for (unsigned m = 0; m < M; ++m) {
#pragma unroll
            for (unsigned k = 0; k < D / 16; ++k) load_four(x[m][k], corner.at(rows, m, k));
        }
    }

    __device__ void factor(unsigned (&to)[4], unsigned m, unsigned k) const {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) to[i] = x[m][k][i];
    }
};

/// sums += left · rightᵀ for 16·M rows `left` and 8·N rows `right` of shared memory.
template <unsigned D, unsigned M, unsigned N, typename LeftRows, typename T>
__device__ void add_products(Sums<M, N>& sums, const LeftRows& left, const T* right) {
    const Corner<D, false> corner;
#pragma unroll
    for (unsigned k = 0; k < D / 16; ++k) {
        unsigned a[M][4];
#pragma unroll
        for (unsigned m = 0; m < M; ++m) left.factor(a[m], m, k);
#pragma unroll
        for (unsigned n = 0; n < N; n += 2) {
            unsigned b[4];
            load_four(b, corner.at(right, n / 2, k));
#pragma unroll
            for (unsigned m = 0; m < M; ++m) {
                multiply<T>(sums.x[m][n], a[m], b[0], b[1]);
                multiply<T>(sums.x[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/// sums += left · right for 8·N rows `right` of shared memory.
template <unsigned D, unsigned M, unsigned N, typename T>
__device__ void add_rows(Sums<M, D / 8>& sums, const Left<M, N>& left, const T* right) {
    const Corner<D, true> corner;
#pragma unroll
    for (unsigned k = 0; k < N / 2; ++k) {
#pragma unroll
        for (unsigned n = 0; n < D / 8; n += 2) {
            unsigned b[4];
            load_four_turned(b, corner.at(right, k, n / 2));
#pragma unroll
            for (unsigned m = 0; m < M; ++m) {
                multiply<T>(sums.x[m][n], left.x[m][k], b[0], b[1]);
                multiply<T>(sums.x[m][n + 1], left.x[m][k], b[2], b[3]);
            }
        }
    }
}
