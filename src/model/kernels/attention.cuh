// What the kernels of attention for all dtypes share: sides, who sees what, and scores.
#pragma once

#include "common.cuh"

constexpr unsigned ALL = ~0u;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct Sides {
    unsigned b, t, s, h, kv, d;

    /// From one row of a head to its next, among so many heads: 2¹⁶ of 2⁸ at most.
    __device__ unsigned stride(unsigned heads) const { return heads * d; }

    /// Where a head starts in (b, n, heads, d).
    __device__ size_t head(unsigned batch, unsigned n, unsigned heads, unsigned head) const {
        return (size_t(batch) * n * heads + head) * d;
    }
};

/// A run of keys. No key is in it where `end` is not above `first`.
struct Run {
    unsigned first, end;

    __device__ bool holds(unsigned key) const { return key - first < end - first; }
    __device__ bool meets(unsigned start, unsigned count) const { return first < start + count && start < end; }
    __device__ bool covers(unsigned start, unsigned count) const { return first <= start && start + count <= end; }
};

/// What some of many queries see, from the first key to the last, and what every one of them sees.
struct Sight {
    Run some, every;
};

struct Seen {
    const unsigned *first, *end;
    unsigned rows;

    /// Where the run of a query is; the batch shares them, or there are b·t.
    __device__ size_t row(unsigned batch, size_t query, unsigned t) const {
        return rows == t ? query : size_t(batch) * t + query;
    }

    /// Of one query; none beyond the last.
    __device__ Run of(unsigned batch, unsigned query, unsigned t) const {
        if (query >= t) return {0, 0};
        const size_t at = row(batch, query, t);
        return {first[at], end[at]};
    }

    /// Of those of COUNT queries that exist; the whole warp asks.
    template <unsigned COUNT>
    __device__ Sight sight(unsigned batch, unsigned start, unsigned t) const {
        return over_warp(share<COUNT>(batch, start, t));
    }

    /// A lane's share of the queries, and what the warp has of them together.
    template <unsigned COUNT>
    __device__ Sight share(unsigned batch, unsigned start, unsigned t) const {
        Sight sight = {{~0u, 0}, {0, ~0u}};
#pragma unroll
        for (unsigned i = 0; i < COUNT; i += WARP) {
            const unsigned query = start + i + threadIdx.x % WARP;
            if (threadIdx.x % WARP >= COUNT || query >= t) continue;
            const Run run = of(batch, query, t);
            sight.some = {min(sight.some.first, run.first), max(sight.some.end, run.end)};
            sight.every = {max(sight.every.first, run.first), min(sight.every.end, run.end)};
        }
        return sight;
    }
    __device__ static Sight over_warp(const Sight& share) {
        return {
            {__reduce_min_sync(ALL, share.some.first), __reduce_max_sync(ALL, share.some.end)},
            {__reduce_max_sync(ALL, share.every.first), __reduce_min_sync(ALL, share.every.end)}};
    }
};

/// From q·k to a score in units of ln 2, because 2ˣ is what the hardware computes.
struct Bend {
    float inner, cap;

    __device__ Bend(float scale, float cap)
        : inner(cap > 0 ? scale / cap : scale * LOG2_E), cap(cap > 0 ? cap * LOG2_E : 0) {}

    __device__ float score(float product, float& slope) const {
        slope = 1;
        if (cap == 0) return product * inner;
        const float bent = tanhf(product * inner);
        slope = 1 - bent * bent;
        return bent * cap;
    }
};
