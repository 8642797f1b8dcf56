// The matrix unit of compute capability 9.0, by warpgroups: four warps multiply together, each of which holds 16 of the 64
// rows of sums, as it does of mma.m16n8k16 (mma.cuh). Factors are read where they lie in shared memory, in the background.
//
// There they lie in panels of 32 columns: rows of 64 bytes below each other, whose packs of eight change places every other
// row. The PTX ISA (wgmma.mma_async, "Shared Memory Matrix Layout") calls that a swizzle of 64 bytes, and reads of the same
// panels both rows as they are and columns as rows.
#pragma once

#include "mma.cuh"

/// Columns of a panel, and the bytes of one of its rows and of eight, after which the packs lie as in the first.
constexpr unsigned PANEL = 32, ROW_BYTES = 2 * PANEL, ROWS_BYTES = 8 * ROW_BYTES;

/// COUNT rows of D 16-bit numbers in shared memory, from a multiple of 512 bytes on.
template <unsigned D, unsigned COUNT, typename T>
struct Panels {
    static constexpr unsigned SIZE = D * COUNT, LANES = PANEL / 8;
    static_assert(D % PANEL == 0 && COUNT % 8 == 0, "whole panels, of whole groups of rows");
    T* numbers;

    /// Where a pack is.
    __device__ T* place(unsigned row, unsigned pack) const {
        return numbers + (pack / LANES * COUNT + row) * PANEL + (pack ^ row / 2) % LANES * 8;
    }

    /// How far behind its pack another one of a thread is.
    __device__ static unsigned further(unsigned rows, unsigned packs) {
        return (packs / LANES * COUNT + rows) * PANEL;
    }
};

#ifndef SVDHUB_ON_CPU

/// Where a factor lies, and how far apart its repeating parts are.
struct Descriptor {
    unsigned low, high;

    /// So many bytes further on.
    __device__ Descriptor further(unsigned bytes) const { return {low + (bytes >> 4), high}; }
    __device__ unsigned long long bits() const { return (unsigned long long)(high) << 32 | low; }
};

/// `leading` and `stride` in bytes: from panel to panel where columns are rows, and from eight rows to the next eight. All
/// lanes of a warp describe the same; taking it from one tells the compiler.
__device__ inline Descriptor describe(const void* at, unsigned leading, unsigned stride) {
    const unsigned swizzle_64 = 2u << 30, start = unsigned(__cvta_generic_to_shared(at));
    return {__shfl_sync(~0u, start >> 4 | leading >> 4 << 16, 0), swizzle_64 | stride >> 4};
}

/// sums += a · bᵀ and sums += a · b of 8·N columns, by 16 products to a sum.
template <unsigned N, typename T>
struct Wgmma;

#define WGMMA_SUMS(n) "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])
#define WGMMA_SUMS_4(n) WGMMA_SUMS(n), WGMMA_SUMS(n + 1), WGMMA_SUMS(n + 2), WGMMA_SUMS(n + 3)
#define WGMMA_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_LIST_32                                                                                        \
    WGMMA_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_LIST_48                                                                                        \
    WGMMA_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_LIST_64                                                                                        \
    WGMMA_LIST_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_SUMS_16 WGMMA_SUMS_4(0)
#define WGMMA_SUMS_32 WGMMA_SUMS_16, WGMMA_SUMS_4(4)
#define WGMMA_SUMS_48 WGMMA_SUMS_32, WGMMA_SUMS_4(8)
#define WGMMA_SUMS_64 WGMMA_SUMS_48, WGMMA_SUMS_4(12)

// COUNT sums of a thread; the numbers of the operands behind them
#define DEFINE(T, NAME, COLUMNS, COUNT, I, J, K, L, M)                                                                 \
    template <>                                                                                                        \
    struct Wgmma<COLUMNS / 8, T> {                                                                                     \
        __device__ static void by_rows(float (&sums)[COLUMNS / 8][4], Descriptor a, Descriptor b) {                    \
            asm volatile("{.reg .pred adds; setp.eq.u32 adds, 0, 0;"                                                   \
                         "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" WGMMA_LIST_##COUNT \
                         "}, %" #I ", %" #J ", adds, 1, 1, 0, 0;}"                                                     \
                         : WGMMA_SUMS_##COUNT                                                                          \
                         : "l"(a.bits()), "l"(b.bits()));                                                              \
        }                                                                                                              \
        __device__ static void by_columns(float (&sums)[COLUMNS / 8][4], const unsigned (&a)[4], Descriptor b) {       \
            asm volatile("{.reg .pred adds; setp.eq.u32 adds, 0, 0;"                                                   \
                         "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" WGMMA_LIST_##COUNT \
                         "}, {%" #I ", %" #J ", %" #K ", %" #L "}, %" #M ", adds, 1, 1, 1;}"                           \
                         : WGMMA_SUMS_##COUNT                                                                          \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()));                                 \
        }                                                                                                              \
    };
#define DEFINE_ALL(T, NAME)                           \
    DEFINE(T, NAME, 64, 32, 32, 33, 34, 35, 36)       \
    DEFINE(T, NAME, 96, 48, 48, 49, 50, 51, 52)       \
    DEFINE(T, NAME, 128, 64, 64, 65, 66, 67, 68)
DEFINE_ALL(__half, "f16")
DEFINE_ALL(__nv_bfloat16, "bf16")
#undef DEFINE_ALL
#undef DEFINE

/// What this thread's copies and stores have written, the matrix unit sees behind the next barrier.
__device__ inline void show_to_matrix_unit() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void wgmma_begins() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Waits for all products that were begun.
__device__ inline void wgmma_ends() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

/// A sum is made before this, and what is made of it behind.
__device__ inline void keep_here(float& sum) { asm volatile("" : "+f"(sum)); }

#endif

/// 64 rows of a tile, those of a warpgroup, as a left factor.
template <unsigned D, unsigned COUNT, typename T>
struct GroupRows {
    Descriptor descriptor;

    /// `row` is the first of a warp's 16.
    __device__ GroupRows(Panels<D, COUNT, T> tile, unsigned row)
        : descriptor(describe(tile.numbers + row / 64 * 64 * PANEL, 16, ROWS_BYTES)) {}
};

/// sums += left · rightᵀ for the warpgroup's 64 rows and 8·N rows of a tile, from `row` on: a multiple of 8.
template <unsigned D, unsigned N, unsigned LEFT, unsigned COUNT, typename T>
__device__ void add_products(
    Sums<1, N>& sums, const GroupRows<D, LEFT, T>& left, Panels<D, COUNT, T> right, unsigned row) {
    const Descriptor b = describe(right.numbers + row * PANEL, 16, ROWS_BYTES);
#pragma unroll
    for (unsigned k = 0; k < D / 16; ++k) {
        // half a panel further each time: swizzling goes by addresses
        const auto at = [&](unsigned count) { return k / 2 * count * ROW_BYTES + k % 2 * ROW_BYTES / 2; };
        Wgmma<N, T>::by_rows(sums.x[0], left.descriptor.further(at(LEFT)), b.further(at(COUNT)));
    }
}

/// sums += left · right for 8·N rows of a tile, from `row` on: a multiple of 8.
template <unsigned D, unsigned N, unsigned COUNT, typename T>
__device__ void add_rows(Sums<1, D / 8>& sums, const Left<1, N>& left, Panels<D, COUNT, T> right, unsigned row) {
    const Descriptor b = describe(right.numbers + row * PANEL, COUNT * ROW_BYTES, ROWS_BYTES);
#pragma unroll
    for (unsigned k = 0; k < N / 2; ++k) {
        Wgmma<D / 8, T>::by_columns(sums.x[0], left.x[0][k], b.further(16 * k * ROW_BYTES));
    }
}

/// How warpgroups multiply. Every warp of a group calls the same products.
struct Warpgroups {
    template <unsigned M>
    static constexpr unsigned TOGETHER = 64;

    template <unsigned D, unsigned COUNT, typename T>
    using Tile = Panels<D, COUNT, T>;
    template <unsigned D, unsigned M, bool KEEPS, unsigned COUNT, typename T>
    using Own = GroupRows<D, COUNT, T>;

    __device__ static void copies_arrive() {
        ::copies_arrive();
        show_to_matrix_unit();
    }
    template <typename... AllSums>
    __device__ static void begin(AllSums&... sums) {
        (keep(sums), ...);
        wgmma_begins();
    }
    template <typename... AllSums>
    __device__ static void end(AllSums&... sums) {
        wgmma_ends();
        (keep(sums), ...);
    }

    /// In its registers, which nobody may touch while products are on their way.
    template <unsigned N>
    __device__ static void keep(Sums<1, N>& sums) {
        sums.each([](unsigned, unsigned, unsigned, float& sum) { keep_here(sum); });
    }
};
