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

/// Where packs of eight 16-bit numbers are in rows of D in shared memory. They change places from row to row, so that eight
/// rows below each other, what a load of a matrix reads at once, lie in different banks.
template <unsigned D>
struct Twisted {
    /// Rows of 64·n numbers all start in the same bank, of 32 + 64·n in one of two.
    static constexpr unsigned TWIST = D % 64 == 0 ? 7 : 3;

    __device__ static unsigned twist(unsigned row) { return (D % 64 == 0 ? row : row / 2) & TWIST; }
};

/// Heads of tensors of the same shape that are read together: keys and values, or queries and the gradients of what came of
/// them.
template <unsigned HEADS, typename T>
struct Source {
    const T* heads[HEADS];
    /// From one row to the next, how many rows there are, and numbers in each.
    unsigned stride, n, d;

    __device__ bool packs() const {
        bool all = d % 8 == 0;
        for (const T* head : heads) all &= aligned(head);
        return all;
    }
};

/// Copies COUNT rows of each head, from row `start` on, to a tile of its own; zeros beyond n and beyond d. They are there
/// after copies_arrive() and a barrier. By THREADS threads, Tile::LANES packs of a row side by side: what a thread copies
/// changes places alike everywhere.
template <unsigned COUNT, unsigned THREADS, typename Tile, unsigned HEADS, typename T>
__device__ void fetch(const Tile (&tiles)[HEADS], const Source<HEADS, T>& from, unsigned start) {
    constexpr unsigned LANES = Tile::LANES, STEP = THREADS / LANES, PACKS = Tile::SIZE / COUNT / 8;
    static_assert(STEP % 8 == 0 && PACKS % LANES == 0, "a thread's rows have one twist");
    if (from.packs()) {
        const unsigned row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        const unsigned place = unsigned(tiles[0].place(row, lane) - tiles[0].numbers);
        // of a row that does not exist nothing is read, wherever it would be
        size_t at = size_t(start + row) * from.stride + lane * 8;
#pragma unroll
        for (unsigned i = 0; i < COUNT; i += STEP, at += STEP * from.stride) {
            if (COUNT % STEP != 0 && row + i >= COUNT) break;
#pragma unroll
            for (unsigned pack = 0; pack < PACKS; pack += LANES) {
                const bool exists = start + row + i < from.n && (pack + lane) * 8 < from.d;
                const unsigned to = place + Tile::further(i, pack);
#pragma unroll
                for (unsigned head = 0; head < HEADS; ++head) {
                    copy_later<16>(tiles[head].numbers + to, from.heads[head] + at + pack * 8, exists);
                }
            }
        }
    } else {
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < Tile::SIZE; i += THREADS) {
            const unsigned row = i / (8 * PACKS), column = i % (8 * PACKS);
            const bool exists = start + row < from.n && column < from.d;
            const size_t at = size_t(start + row) * from.stride + column;
#pragma unroll
            for (unsigned head = 0; head < HEADS; ++head) {
                const T number = exists ? from.heads[head][at] : rounded<T>(0);
                tiles[head].place(row, column / 8)[column % 8] = number;
            }
        }
    }
}

/// COUNT rows of D 16-bit numbers in shared memory.
template <unsigned D, unsigned COUNT, typename T>
struct Rows {
    static constexpr unsigned SIZE = D * COUNT;
    T* numbers;

    /// Where a pack is.
    __device__ T* place(unsigned row, unsigned pack) const {
        return numbers + row * D + (pack ^ Twisted<D>::twist(row)) * 8;
    }

    /// How far behind its pack another one of a thread is.
    static constexpr unsigned LANES = Twisted<D>::TWIST + 1;
    __device__ static unsigned further(unsigned rows, unsigned packs) { return rows * D + packs * 8; }
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
        twist = Twisted<D>::twist(row) ^ pack;
    }

    /// In units of 16 rows and 16 columns.
    template <typename T>
    __device__ const T* at(const T* rows, unsigned row, unsigned column) const {
        // packs change places within groups of TWIST + 1; with the group apart, the compiler sees few different sums
        const unsigned pack = 2 * column, in_group = pack % (Twisted<D>::TWIST + 1);
        return rows + offset + (in_group ^ twist) * 8 + row * 16 * D + (pack - in_group) * 8;
    }
};

/// M·16 rows of a tile as left factors, loaded whenever they are used.
template <unsigned D, unsigned M, typename T>
struct LoadedRows {
    const T* rows;
    Corner<D, true> corner;

    template <unsigned COUNT>
    __device__ LoadedRows(Rows<D, COUNT, T> tile, unsigned row) : rows(tile.numbers + row * D) {}

    __device__ void factor(unsigned (&x)[4], unsigned m, unsigned k) const { load_four(x, corner.at(rows, m, k)); }
};

/// The same, loaded once: M·D/4 registers.
template <unsigned D, unsigned M, typename T>
struct KeptRows {
    unsigned x[M][D / 16][4];

    template <unsigned COUNT>
    __device__ KeptRows(Rows<D, COUNT, T> tile, unsigned row) {
        const Corner<D, true> corner;
#pragma unroll
        for (unsigned m = 0; m < M; ++m) {
#pragma unroll
            for (unsigned k = 0; k < D / 16; ++k) load_four(x[m][k], corner.at(tile.numbers + row * D, m, k));
        }
    }

    __device__ void factor(unsigned (&to)[4], unsigned m, unsigned k) const {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) to[i] = x[m][k][i];
    }
};

/// sums += left · rightᵀ for 16·M rows `left` and 8·N rows of a tile, from `row` on.
template <unsigned D, unsigned M, unsigned N, typename LeftRows, unsigned COUNT, typename T>
__device__ void add_products(Sums<M, N>& sums, const LeftRows& left, Rows<D, COUNT, T> right, unsigned row) {
    const Corner<D, false> corner;
    const T* const rows = right.numbers + row * D;
#pragma unroll
    for (unsigned k = 0; k < D / 16; ++k) {
        unsigned a[M][4];
#pragma unroll
        for (unsigned m = 0; m < M; ++m) left.factor(a[m], m, k);
#pragma unroll
        for (unsigned n = 0; n < N; n += 2) {
            unsigned b[4];
            load_four(b, corner.at(rows, n / 2, k));
#pragma unroll
            for (unsigned m = 0; m < M; ++m) {
                multiply<T>(sums.x[m][n], a[m], b[0], b[1]);
                multiply<T>(sums.x[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/// sums += left · right for 8·N rows of a tile, from `row` on.
template <unsigned D, unsigned M, unsigned N, unsigned COUNT, typename T>
__device__ void add_rows(Sums<M, D / 8>& sums, const Left<M, N>& left, Rows<D, COUNT, T> right, unsigned row) {
    const Corner<D, true> corner;
    const T* const rows = right.numbers + row * D;
#pragma unroll
    for (unsigned k = 0; k < N / 2; ++k) {
#pragma unroll
        for (unsigned n = 0; n < D / 8; n += 2) {
            unsigned b[4];
            load_four_turned(b, corner.at(rows, k, n / 2));
#pragma unroll
            for (unsigned m = 0; m < M; ++m) {
                multiply<T>(sums.x[m][n], left.x[m][k], b[0], b[1]);
                multiply<T>(sums.x[m][n + 1], left.x[m][k], b[2], b[3]);
            }
        }
    }
}

/// How warps multiply, each by itself; wgmma.cuh has another way.
struct Warps {
    /// Rows that one product takes, of the M·16 that a warp has.
    template <unsigned M>
    static constexpr unsigned TOGETHER = 16 * M;

    template <unsigned D, unsigned COUNT, typename T>
    using Tile = Rows<D, COUNT, T>;
    template <unsigned D, unsigned M, bool KEEPS, unsigned COUNT, typename T>
    using Own = std::conditional_t<KEEPS, KeptRows<D, M, T>, LoadedRows<D, M, T>>;

    /// Waits for this thread's copies, so that products may read them behind a barrier.
    __device__ static void copies_arrive() { ::copies_arrive(); }
    /// Around products that add to these sums.
    template <typename... AllSums>
    __device__ static void begin(AllSums&...) {}
    template <typename... AllSums>
    __device__ static void end(AllSums&...) {}
};
