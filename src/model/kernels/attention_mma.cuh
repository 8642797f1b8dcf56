// Attention for f16 and bf16 on the matrix unit, as FlashAttention-2 goes about it (Dao 2023): scores and probabilities
// stay in the registers of the warp that sums them up, and the next rows arrive while it works on these.
#pragma once

#include "attention.cuh"
#include "wgmma.cuh"

/// What a launch is made of; the tables in attention.cu are this. A warp takes TILES·16 of the rows. By itself it should have
/// two such tiles, so that what it loads of the other side serves two products: with one, shared memory is slower than the
/// matrix unit.
template <
    typename HowToMultiply, unsigned OF_ROWS, unsigned OF_STEP, unsigned OF_CHUNK, unsigned OF_WARPS, unsigned OF_BLOCKS,
    unsigned OF_PARTS = 1, bool DOES_KEEP = false>
struct Tiling {
    using Unit = HowToMultiply;
    static constexpr unsigned ROWS = OF_ROWS, STEP = OF_STEP;
    /// Columns of scores that a warp has in registers at once.
    static constexpr unsigned CHUNK = OF_CHUNK;
    static constexpr unsigned WARPS = OF_WARPS, THREADS = WARPS * WARP;
    /// Blocks that a multiprocessor shall hold, which is how many registers a thread may have.
    static constexpr unsigned BLOCKS = OF_BLOCKS;
    /// Warps that share rows.
    static constexpr unsigned PARTS = OF_PARTS;
    /// Whether a warp has registers for its own rows as factors: the next best where there is one tile of them.
    static constexpr bool KEEPS = DOES_KEEP;
    static constexpr unsigned TILES = ROWS * PARTS / WARPS / 16;
    /// Rows that are multiplied together.
    static constexpr unsigned TOGETHER = Unit::template TOGETHER<TILES>;

    template <unsigned D, unsigned COUNT, typename T>
    using Tile = typename Unit::template Tile<D, COUNT, T>;
    /// A warp's rows as a factor.
    template <unsigned D, typename T>
    using Own = typename Unit::template Own<D, TILES, KEEPS, ROWS, T>;
};

template <unsigned D>
struct WarpLaunches {
    /// Eight warps to a multiprocessor, each with the most registers that a thread can have.
    template <unsigned ROWS, unsigned STEP, unsigned CHUNK, unsigned WARPS, unsigned PARTS = 1, bool KEEPS = false>
    using Each = Tiling<Warps, ROWS, STEP, CHUNK, WARPS, 8 / WARPS, PARTS, KEEPS>;
    using Forward = std::conditional_t<D <= 96, Each<128, 64, 64, 4>, Each<128, 32, 32, D <= 128 ? 4 : 8>>;
    using BackQ = std::conditional_t<
        D <= 64, Each<128, 64, 64, 4>, std::conditional_t<D <= 128, Each<128, 32, 32, 4>, Each<128, 16, 16, 8>>>;
    using BackKv = std::conditional_t<
        D <= 64, Each<128, 64, 32, 4>,
        std::conditional_t<
            D == 96, Each<128, 64, 32, 8, 1, true>,
            std::conditional_t<D == 128, Each<128, 32, 32, 8>, Each<64, 32, 32, 8, 2>>>>;
};

/// Four warpgroups to a multiprocessor in the forward pass, and two with twice as many registers in the backward pass: while
/// one multiplies, another takes its exponentials.
template <unsigned D>
struct GroupLaunches {
    template <unsigned ROWS>
    using Each = Tiling<Warpgroups, ROWS, 64, 64, ROWS / 16, 2>;
    using Forward = Each<128>;
    using BackQ = Each<64>;
    using BackKv = Each<64>;
};

#ifdef ATTENTION_BY_WARPGROUPS
constexpr bool BY_WARPGROUPS = true;
#else
constexpr bool BY_WARPGROUPS = false;
#endif

/// Warpgroups pay for heads that are neither small nor so large that their sums leave a thread no registers.
template <unsigned D>
using MmaLaunches = std::conditional_t<BY_WARPGROUPS && D >= 64 && D <= 128, GroupLaunches<D>, WarpLaunches<D>>;

/// From q·k to a score. Where that takes more than a factor above 0 it is done number by number.
struct MmaBend {
    Bend bend;
    bool bends;
    /// From a score to units of ln 2.
    float unit;

    __device__ MmaBend(float scale, float cap)
        : bend(scale, cap), bends(!(cap == 0 && scale > 0)), unit(bends ? 1 : bend.inner) {}

    /// tanh x = 1 − 2/(1 + e²ˣ) is off by some 10⁻⁷, of a number that the cap then takes to 16 bits.
    __device__ float score(float product, float& slope) const {
        slope = 1;
        if (bend.cap == 0) return product * bend.inner;
        const float bent = 1 - __fdividef(2, 1 + power_of_two(2 * LOG2_E * bend.inner * product));
        slope = 1 - bent * bent;
        return bent * bend.cap;
    }
};

/// max or sum over the four lanes that share a row of sums.
template <typename F>
__device__ float over_row(float x, const F& f) {
    x = f(x, __shfl_xor_sync(ALL, x, 1));
    return f(x, __shfl_xor_sync(ALL, x, 2));
}

/// −∞ as the score of what a query does not see; queries are rows.
template <unsigned M, unsigned N>
__device__ void hide(Sums<M, N>& scores, const Seen& seen, unsigned batch, unsigned query, unsigned t, unsigned key) {
#pragma unroll
    for (unsigned m = 0; m < M; ++m) {
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            const Run run = seen.of(batch, query + 16 * m + scores.row(2 * half), t);
#pragma unroll
            for (unsigned n = 0; n < N; ++n) {
#pragma unroll
                for (unsigned i = 0; i < 2; ++i) {
                    if (!run.holds(key + 8 * n + scores.column(i))) scores.x[m][n][2 * half + i] = -INFINITY;
                }
            }
        }
    }
}

/// Writes a warp's rows of sums, each times its factor, to a tensor, `rows` and `columns` of which exist. They leave in packs
/// by way of a tile, of whose rows from `first` on nobody has any more use.
template <unsigned D, unsigned M, typename Tile, typename T>
__device__ void give(
    const Sums<M, D / 8>& sums, const float (&factors)[M][2], const Tile& room, unsigned first, T* to, size_t stride,
    unsigned rows, unsigned columns) {
#pragma unroll
    for (unsigned m = 0; m < M; ++m) {
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
#pragma unroll
            for (unsigned n = 0; n < D / 8; ++n) {
                const auto& x = sums.x[m][n];
                const float factor = factors[m][half];
                const unsigned pair = rounded_pair<T>(x[2 * half] * factor, x[2 * half + 1] * factor);
                T* const place = room.place(first + 16 * m + sums.row(2 * half), n) + sums.column(0);
                *reinterpret_cast<unsigned*>(place) = pair;
            }
        }
    }
    __syncwarp();
    const bool packs = aligned(to) && columns % 8 == 0;
#pragma unroll 4
    for (unsigned i = threadIdx.x % WARP; i < 16 * M * D / 8; i += WARP) {
        const unsigned row = i / (D / 8), pack = i % (D / 8);
        if (row >= rows || pack * 8 >= columns) continue;
        const T* const from = room.place(first + row, pack);
        T* const place = to + row * stride + pack * 8;
        if (packs) {
            Pack<T>::load(from).store(place);
        } else {
#pragma unroll 1
            for (unsigned j = 0; j < 8 && pack * 8 + j < columns; ++j) place[j] = from[j];
        }
    }
}

/// By how much, in powers of two, a score may be above what its row's sums are relative to.
constexpr float SLACK = 8;

/// A block takes 128 queries of a head; keys pass by `step` at a time. A row's sums are relative to one of its scores,
/// and are scaled down when one comes that is larger by more than the slack: most steps then leave them as they are.
template <unsigned D, typename T>
__device__ void attention(
    const T* q, const T* k, const T* v, Seen seen, T* y, float* lse, Sides sides, float scale, float cap) {
    using L = typename MmaLaunches<D>::Forward;
    using U = typename L::Unit;
    using Queries = typename L::template Tile<D, L::ROWS, T>;
    using Keys = typename L::template Tile<D, L::STEP, T>;
    constexpr unsigned M = L::TILES, N = L::STEP / 8;
    DYNAMIC_SHARED(room);
    const Queries qs = {reinterpret_cast<T*>(room)};
    T* const stages = qs.numbers + Queries::SIZE;

    // under a causal mask the last queries see most: they go first
    const unsigned start = (gridDim.x - 1 - blockIdx.x) * L::ROWS, head = blockIdx.y, batch = blockIdx.z;
    const unsigned stride = sides.stride(sides.h), kv_stride = sides.stride(sides.kv);
    const size_t queries = sides.head(batch, sides.t, sides.h, head);
    const size_t keys = sides.head(batch, sides.s, sides.kv, head / (sides.h / sides.kv));
    const Source<1, T> of_queries = {{q + queries}, stride, sides.t, sides.d};
    const Source<2, T> of_keys = {{k + keys, v + keys}, kv_stride, sides.s, sides.d};
    fetch<L::ROWS, L::THREADS>({qs}, of_queries, start);
    const auto ks = [&](unsigned turn) { return Keys{stages + turn * 2 * Keys::SIZE}; };
    const auto vs = [&](unsigned turn) { return Keys{stages + (turn * 2 + 1) * Keys::SIZE}; };
    const auto fetch_keys = [&](unsigned key, unsigned turn) {
        fetch<L::STEP, L::THREADS>({ks(turn), vs(turn)}, of_keys, key);
    };

    const unsigned local = threadIdx.x / WARP * 16 * M, mine = start + local;
    const Run span = seen.template sight<L::ROWS>(batch, start, sides.t).some;
    const Sight sight = seen.template sight<L::TOGETHER>(batch, start + local / L::TOGETHER * L::TOGETHER, sides.t);
    const MmaBend bend(scale, cap);
    const typename L::template Own<D, T> own(qs, local);
    float shifts[M][2], sum[M][2];
#pragma unroll
    for (unsigned i = 0; i < 2 * M; ++i) shifts[i / 2][i % 2] = -INFINITY, sum[i / 2][i % 2] = 0;
    Sums<M, D / 8> ys;
    ys.clear();

    unsigned key = span.first / L::STEP * L::STEP;
    fetch_keys(key, 0);
    for (unsigned turn = 0; key < span.end; key += L::STEP, turn ^= 1) {
        U::copies_arrive();
        __syncthreads();
        if (key + L::STEP < span.end) fetch_keys(key + L::STEP, turn ^ 1);
        if (!sight.some.meets(key, L::STEP)) continue;

        Sums<M, N> scores;
        scores.clear();
        U::begin(scores);
        add_products<D>(scores, own, ks(turn), 0);
        U::end(scores);
        if (bend.bends) {
            float slope;
            scores.each([&](unsigned, unsigned, unsigned, float& x) { x = bend.score(x, slope); });
        }
        if (!sight.every.covers(key, L::STEP)) hide(scores, seen, batch, mine, sides.t, key);
        float factors[M][2];
        bool changes = false;
#pragma unroll
        for (unsigned m = 0; m < M; ++m) {
#pragma unroll
            for (unsigned half = 0; half < 2; ++half) {
                // two of each: a chain of one would wait for each of its links
                float tops[2] = {-INFINITY, -INFINITY}, added[2] = {0, 0};
#pragma unroll
                for (unsigned n = 0; n < N; ++n) {
                    const float* const pair = scores.x[m][n] + 2 * half;
                    tops[n % 2] = fmaxf(tops[n % 2], fmaxf(pair[0], pair[1]));
                }
                const auto larger = [](float a, float b) { return fmaxf(a, b); };
                const float top = over_row(fmaxf(tops[0], tops[1]), larger) * bend.unit;
                float& shift = shifts[m][half];
                const float before = shift;
                if (top > shift + SLACK) shift = top;
                // a row that has seen nothing yet: −∞ − −∞ would be NaN
                const float from = shift == -INFINITY ? 0 : shift;
                factors[m][half] = power_of_two(before - from);
                changes |= shift != before;
#pragma unroll
                for (unsigned n = 0; n < N; ++n) {
#pragma unroll
                    for (unsigned i = 0; i < 2; ++i) {
                        float& x = scores.x[m][n][2 * half + i];
                        added[i] += x = power_of_two(x * bend.unit - from);
                    }
                }
                sum[m][half] = sum[m][half] * factors[m][half] + (added[0] + added[1]);
            }
        }
        if (__any_sync(ALL, changes)) {
            ys.each([&](unsigned m, unsigned, unsigned i, float& x) { x *= factors[m][i / 2]; });
        }
        const auto ps = as_left<T>(scores);
        U::begin(ys);
        add_rows<D>(ys, ps, vs(turn), 0);
        U::end(ys);
    }

    float factors[M][2];
#pragma unroll
    for (unsigned m = 0; m < M; ++m) {
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
            const float total = over_row(sum[m][half], [](float a, float b) { return a + b; });
            factors[m][half] = 1 / total;
            const unsigned query = mine + 16 * m + ys.row(2 * half);
            if (query < sides.t && threadIdx.x % 4 == 0) {
                const size_t at = (size_t(batch) * sides.h + head) * sides.t + query;
                lse[at] = (shifts[m][half] + log2f(total)) * LN_2;
            }
        }
    }
    // nobody reads queries any more: their place is free
    __syncthreads();
    const unsigned rows = mine < sides.t ? sides.t - mine : 0;
    give<D>(ys, factors, qs, local, y + queries + size_t(mine) * stride, stride, rows, sides.d);
}

/// p and ds in the place of q·k and dp − dots. `lse`, in units of ln 2, is a function of a place; `hide` makes −∞ of the
/// scores of what is not seen.
template <unsigned M, unsigned N, typename Lse, typename Hide>
__device__ void slopes(Sums<M, N>& ps, Sums<M, N>& ds, const MmaBend& bend, const Lse& lse, const Hide& hide) {
    if (bend.bends) {
        ps.each([&](unsigned m, unsigned n, unsigned i, float& x) {
            float slope;
            x = bend.score(x, slope);
            ds.x[m][n][i] *= slope;
        });
    }
    hide();
    ps.each([&](unsigned m, unsigned n, unsigned i, float& x) {
        x = power_of_two(x * bend.unit - lse(m, n, i));
        ds.x[m][n][i] *= x;
    });
}

/// A block takes 128 queries of a head; keys pass by `step` at a time.
template <unsigned D, typename T>
__device__ void attention_back_q(
    const T* q, const T* k, const T* v, const T* g, const float* lse, const float* dots, Seen seen, T* dq,
    Sides sides, float scale, float cap) {
    using L = typename MmaLaunches<D>::BackQ;
    using U = typename L::Unit;
    using Queries = typename L::template Tile<D, L::ROWS, T>;
    using Keys = typename L::template Tile<D, L::STEP, T>;
    constexpr unsigned M = L::TILES, CHUNK = L::CHUNK;
    DYNAMIC_SHARED(room);
    const Queries qs = {reinterpret_cast<T*>(room)}, gs = {qs.numbers + Queries::SIZE};
    T* const stages = gs.numbers + Queries::SIZE;
    float* const lses = reinterpret_cast<float*>(stages + 4 * Keys::SIZE);
    float* const all_dots = lses + L::ROWS;

    const unsigned start = (gridDim.x - 1 - blockIdx.x) * L::ROWS, head = blockIdx.y, batch = blockIdx.z;
    const unsigned stride = sides.stride(sides.h), kv_stride = sides.stride(sides.kv);
    const size_t queries = sides.head(batch, sides.t, sides.h, head);
    const size_t keys = sides.head(batch, sides.s, sides.kv, head / (sides.h / sides.kv));
    const Source<2, T> of_queries = {{q + queries, g + queries}, stride, sides.t, sides.d};
    const Source<2, T> of_keys = {{k + keys, v + keys}, kv_stride, sides.s, sides.d};
    fetch<L::ROWS, L::THREADS>({qs, gs}, of_queries, start);
    for (unsigned i = threadIdx.x; i < L::ROWS; i += L::THREADS) {
        const bool exists = start + i < sides.t;
        const size_t at = (size_t(batch) * sides.h + head) * sides.t + (exists ? start + i : 0);
        copy_later<4>(lses + i, lse + at, exists);
        copy_later<4>(all_dots + i, dots + at, exists);
    }
    const auto ks = [&](unsigned turn) { return Keys{stages + turn * 2 * Keys::SIZE}; };
    const auto vs = [&](unsigned turn) { return Keys{stages + (turn * 2 + 1) * Keys::SIZE}; };
    const auto fetch_keys = [&](unsigned key, unsigned turn) {
        fetch<L::STEP, L::THREADS>({ks(turn), vs(turn)}, of_keys, key);
    };

    const unsigned local = threadIdx.x / WARP * 16 * M, mine = start + local;
    const Run span = seen.template sight<L::ROWS>(batch, start, sides.t).some;
    // a warp asks for its sight once a step, and has no registers to spare
    Sight* const sights = reinterpret_cast<Sight*>(all_dots + L::ROWS);
    const Sight& sight = sights[threadIdx.x / WARP];
    sights[threadIdx.x / WARP] =
        seen.template sight<L::TOGETHER>(batch, start + local / L::TOGETHER * L::TOGETHER, sides.t);
    const MmaBend bend(scale, cap);
    const typename L::template Own<D, T> own_q(qs, local), own_g(gs, local);
    Sums<M, D / 8> dqs;
    dqs.clear();
    unsigned key = span.first / L::STEP * L::STEP;
    fetch_keys(key, 0);
    for (unsigned turn = 0; key < span.end; key += L::STEP, turn ^= 1) {
        U::copies_arrive();
        __syncthreads();
        if (key + L::STEP < span.end) fetch_keys(key + L::STEP, turn ^ 1);
#pragma unroll 1
        for (unsigned n = 0; n < L::STEP; n += CHUNK) {
            if (!sight.some.meets(key + n, CHUNK)) continue;
            Sums<M, CHUNK / 8> ps, ds;
            ps.clear();
            const auto row = [&](unsigned m, unsigned i) { return local + 16 * m + ps.row(i); };
            ds.each([&](unsigned m, unsigned, unsigned i, float& x) { x = -all_dots[row(m, i)]; });
            U::begin(ps, ds);
            add_products<D>(ps, own_q, ks(turn), n);
            add_products<D>(ds, own_g, vs(turn), n);
            U::end(ps, ds);
            slopes(
                ps, ds, bend, [&](unsigned m, unsigned, unsigned i) { return lses[row(m, i)] * LOG2_E; },
                [&] {
                    if (!sight.every.covers(key + n, CHUNK)) hide(ps, seen, batch, mine, sides.t, key + n);
                });
            const auto left = as_left<T>(ds);
            U::begin(dqs);
            add_rows<D>(dqs, left, ks(turn), n);
            U::end(dqs);
        }
    }

    // nobody reads queries any more: their place is free
    __syncthreads();
    const unsigned rows = mine < sides.t ? sides.t - mine : 0;
    float factors[M][2];
#pragma unroll
    for (unsigned i = 0; i < 2 * M; ++i) factors[i / 2][i % 2] = scale;
    give<D>(dqs, factors, qs, local, dq + queries + size_t(mine) * stride, stride, rows, sides.d);
}

/// What attention_back_kv shares of the queries that it holds.
template <unsigned STEP>
struct OfQueries {
    float lse[STEP], dots[STEP];
    unsigned first[STEP], end[STEP];

    __device__ Run run(unsigned query) const { return {first[query], end[query]}; }
};

/// A block takes keys of a head (128, or 64 of D = 256); the queries of all heads that share them pass by `step` at a
/// time, so that their sum needs no other place. Sums of scores are turned, keys being rows, and so are a left factor.
/// For D = 256, where a thread has no registers for both, a warp sums dk and another dv of the same keys.
template <unsigned D, typename T>
__device__ void attention_back_kv(
    const T* q, const T* k, const T* v, const T* g, const float* lse, const float* dots, Seen seen, T* dk, T* dv,
    Sides sides, float scale, float cap) {
    using L = typename MmaLaunches<D>::BackKv;
    using U = typename L::Unit;
    constexpr unsigned M = L::TILES, CHUNK = L::CHUNK, N = CHUNK / 8, STEP = L::STEP;
    using Keys = typename L::template Tile<D, L::ROWS, T>;
    using Queries = typename L::template Tile<D, STEP, T>;
    DYNAMIC_SHARED(room);
    const Keys ks = {reinterpret_cast<T*>(room)}, vs = {ks.numbers + Keys::SIZE};
    T* const stages = vs.numbers + Keys::SIZE;
    auto* const of_queries = reinterpret_cast<OfQueries<STEP>*>(stages + 4 * Queries::SIZE);
    Sight* const sights = reinterpret_cast<Sight*>(of_queries + 2);

    const unsigned start = blockIdx.x * L::ROWS, shared = blockIdx.y, batch = blockIdx.z;
    const unsigned group = sides.h / sides.kv;
    const unsigned stride = sides.stride(sides.h), kv_stride = sides.stride(sides.kv);
    const size_t keys = sides.head(batch, sides.s, sides.kv, shared);
    const Source<2, T> of_keys = {{k + keys, v + keys}, kv_stride, sides.s, sides.d};
    fetch<L::ROWS, L::THREADS>({ks, vs}, of_keys, start);
    const auto qs = [&](unsigned turn) { return Queries{stages + turn * 2 * Queries::SIZE}; };
    const auto gs = [&](unsigned turn) { return Queries{stages + (turn * 2 + 1) * Queries::SIZE}; };
    const auto fetch_queries = [&](unsigned query, unsigned head, unsigned turn) {
        const size_t queries = sides.head(batch, sides.t, sides.h, head);
        const Source<2, T> from = {{q + queries, g + queries}, stride, sides.t, sides.d};
        fetch<STEP, L::THREADS>({qs(turn), gs(turn)}, from, query);
        const unsigned i = threadIdx.x;
        if (i < STEP) {
            const bool exists = query + i < sides.t;
            const size_t one = exists ? query + i : 0, row = seen.row(batch, one, sides.t);
            const size_t at = (size_t(batch) * sides.h + head) * sides.t + one;
            copy_later<4>(of_queries[turn].lse + i, lse + at, exists);
            copy_later<4>(of_queries[turn].dots + i, dots + at, exists);
            copy_later<4>(of_queries[turn].first + i, seen.first + row, exists);
            copy_later<4>(of_queries[turn].end + i, seen.end + row, exists);
        }
    };

    constexpr unsigned SHARE = L::WARPS / L::PARTS;
    const unsigned warp = threadIdx.x / WARP, local = warp % SHARE * 16 * M, mine = start + local;
    const bool sums_keys = L::PARTS == 1 || warp < SHARE, sums_values = L::PARTS == 1 || warp >= SHARE;
    const MmaBend bend(scale, cap);
    Sums<M, D / 8> sums[2 / L::PARTS];
#pragma unroll
    for (auto& one : sums) one.clear();
    auto &dks = sums[0], &dvs = sums[2 / L::PARTS - 1];

    if constexpr (L::KEEPS) {
        U::copies_arrive();
        __syncthreads();
    }
    const typename L::template Own<D, T> own_k(ks, local), own_v(vs, local);
    const unsigned together = start + local / L::TOGETHER * L::TOGETHER;

    // what of the queries, if any, sees these keys: one step of them to a lane, many at once because nothing else goes
    // on meanwhile
    for (unsigned from = 0; from < sides.t; from += WARP * STEP) {
        __syncthreads();
        constexpr unsigned STEPS = WARP / L::WARPS;
        Sight shares[STEPS];
#pragma unroll
        for (unsigned i = 0; i < STEPS; ++i) {
            shares[i] = seen.template share<STEP>(batch, from + (warp * STEPS + i) * STEP, sides.t);
        }
#pragma unroll
        for (unsigned i = 0; i < STEPS; ++i) {
            const Sight sight = Seen::over_warp(shares[i]);
            if (threadIdx.x % WARP == 0) sights[warp * STEPS + i] = sight;
        }
        __syncthreads();
        unsigned steps = __ballot_sync(ALL, sights[threadIdx.x % WARP].some.meets(start, L::ROWS));
        if (steps == 0) continue;
        unsigned next = __ffs(int(steps)) - 1, head = shared * group;
        fetch_queries(from + next * STEP, head, 0);
        for (unsigned turn = 0; steps != 0; turn ^= 1) {
            U::copies_arrive();
            __syncthreads();
            const Sight sight = sights[next];
            if (++head == (shared + 1) * group) {
                head = shared * group;
                steps &= steps - 1;
                next = __ffs(int(steps)) - 1;
            }
            if (steps != 0) fetch_queries(from + next * STEP, head, turn ^ 1);
            if (!sight.some.meets(together, L::TOGETHER)) continue;
            const bool all_seen = sight.every.covers(mine, 16 * M);
#pragma unroll 1
            for (unsigned query = 0; query < STEP; query += CHUNK) {
                const auto& of = of_queries[turn];
                Sums<M, N> ps, ds;
                ps.clear();
                const auto column = [&](unsigned n, unsigned i) { return query + 8 * n + ps.column(i); };
                ds.each([&](unsigned, unsigned n, unsigned i, float& x) { x = -of.dots[column(n, i)]; });
                U::begin(ps, ds);
                add_products<D>(ps, own_k, qs(turn), query);
                if (sums_keys) add_products<D>(ds, own_v, gs(turn), query);
                U::end(ps, ds);
                slopes(
                    ps, ds, bend, [&](unsigned, unsigned n, unsigned i) { return of.lse[column(n, i)] * LOG2_E; },
                    [&] {
                        if (all_seen) return;
                        ps.each([&](unsigned m, unsigned n, unsigned i, float& x) {
                            const Run run = of.run(column(n, i));
                            if (!run.holds(mine + 16 * m + ps.row(i))) x = -INFINITY;
                        });
                    });
                if (sums_values) {
                    const auto left = as_left<T>(ps);
                    U::begin(dvs);
                    add_rows<D>(dvs, left, gs(turn), query);
                }
                if (sums_keys) {
                    const auto left = as_left<T>(ds);
                    U::begin(dks);
                    add_rows<D>(dks, left, qs(turn), query);
                }
                U::end(dvs, dks);
            }
        }
    }

    // all have read their keys and values, and nothing more arrives: the place is free
    copies_arrive();
    __syncthreads();
    const unsigned rows = mine < sides.s ? sides.s - mine : 0;
    const size_t to = keys + size_t(mine) * kv_stride;
    float key_factors[M][2], value_factors[M][2];
#pragma unroll
    for (unsigned i = 0; i < 2 * M; ++i) key_factors[i / 2][i % 2] = scale, value_factors[i / 2][i % 2] = 1;
    if (sums_keys) give<D>(dks, key_factors, ks, local, dk + to, kv_stride, rows, sides.d);
    if (sums_values) give<D>(dvs, value_factors, vs, local, dv + to, kv_stride, rows, sides.d);
}
