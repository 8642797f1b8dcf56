// Attention for f32 in plain arithmetic: the matrix unit would lose 13 of its bits.
#pragma once

#include "attention.cuh"

constexpr unsigned SIDE = 16;

// ---------------------------------------------------------------------------------------------------------------------
// Products of 16 × 16 matrices by a warp.

/// A factor of a product, (16, 16) in shared memory; TURNED, memory holds it column by column.
template <bool TURNED = false>
struct Factor {
    const float* at;
    unsigned pitch;
};

/// Sums of products, (16, 16): a lane holds two rows of four.
struct Square {
    float x[2][4];

    __device__ static unsigned row() { return threadIdx.x % WARP / 4 * 2; }
    __device__ static unsigned column() { return threadIdx.x % 4 * 4; }

    __device__ void clear() {
        for (auto& row : x) {
            for (float& sum : row) sum = 0;
        }
    }

    template <bool A, bool B>
    __device__ void add(const Factor<A>& a, const Factor<B>& b) {
#pragma unroll
        for (unsigned k = 0; k < SIDE; k += 4) {
            float left[2][4], right[4][4];
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                if constexpr (A) {
                    const auto pair = Pack<float, 2>::load(a.at + (k + i) * a.pitch + row());
                    left[0][i] = pair.x[0], left[1][i] = pair.x[1];
                } else if (i < 2) {
                    const auto four = Pack<float>::load(a.at + (row() + i) * a.pitch + k);
                    for (unsigned j = 0; j < 4; ++j) left[i][j] = four.x[j];
                }
                const unsigned at = B ? (column() + i) * b.pitch + k : (k + i) * b.pitch + column();
                const auto four = Pack<float>::load(b.at + at);
                for (unsigned j = 0; j < 4; ++j) (B ? right[j][i] : right[i][j]) = four.x[j];
            }
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                for (unsigned r = 0; r < 2; ++r) {
                    for (unsigned c = 0; c < 4; ++c) x[r][c] += left[r][i] * right[i][c];
                }
            }
        }
    }

    __device__ void store(float* to, unsigned pitch) const {
        for (unsigned r = 0; r < 2; ++r) {
            Pack<float> four;
            for (unsigned c = 0; c < 4; ++c) four.x[c] = x[r][c];
            four.store(to + (row() + r) * pitch + column());
        }
    }
};

// Wherever a warp looks at single sums it does so in shared memory, and there two neighbouring lanes share a row.
__device__ inline unsigned lane_row() { return threadIdx.x % WARP / 2; }
__device__ inline unsigned lane_half() { return threadIdx.x % 2; }

/// Multiplies each row of N neighbouring matrices by the factor that its two lanes name.
template <unsigned N>
__device__ void scale_rows(Square (&sums)[N], float factor) {
    for (unsigned r = 0; r < 2; ++r) {
        const float of_row = __shfl_sync(ALL, factor, 2 * (Square::row() + r));
#pragma unroll
        for (auto& sum : sums) {
            for (float& x : sum.x[r]) x *= of_row;
        }
    }
}

/// Writes N neighbouring matrices, each row times its lanes' factor, to 16 rows of a tensor, `rows` and `columns` of
/// which exist; `room` has 16 rows.
template <unsigned N>
__device__ void give_squares(
    const Square (&sums)[N], float factor, float* room, unsigned pitch, float* to, size_t stride, unsigned rows,
    unsigned columns) {
    const bool packs = aligned(to) && stride % 4 == 0 && columns % 4 == 0;
    const float* const from = room + lane_row() * pitch;
#pragma unroll
    for (unsigned n = 0; n < N; ++n) {
        sums[n].store(room, pitch);
        __syncwarp();
        for (unsigned i = 0; i < SIDE / 2; i += 4) {
            const unsigned column = SIDE / 2 * lane_half() + i, at = SIDE * n + column;
            if (lane_row() >= rows || at >= columns) continue;
            float* const place = to + lane_row() * stride + at;
            if (packs) {
                Pack<float> pack;
                for (unsigned j = 0; j < 4; ++j) pack.x[j] = from[column + j] * factor;
                pack.store(place);
            } else {
#pragma unroll 1
                for (unsigned j = 0; j < 4 && at + j < columns; ++j) place[j] = from[column + j] * factor;
            }
        }
        __syncwarp();
    }
}

// ---------------------------------------------------------------------------------------------------------------------

/// What a launch of width D is made of; the table in attention.cu is this.
template <unsigned D>
struct PlainLaunches {
    static constexpr unsigned ROWS = 32, STEP = 32, WARPS = ROWS / SIDE, THREADS = WARPS * WARP;
    /// Of a row in shared memory: 16 bytes more than it needs, so that rows begin in different banks.
    static constexpr unsigned PITCH = D + 4;
    static constexpr unsigned SCORES_PITCH = STEP + 8;
    /// Warps that share 16 rows in attention_back_kv: one has no registers for dk and dv of 256 columns.
    static constexpr unsigned PARTS = D > 128 ? 2 : 1, KV_THREADS = THREADS * PARTS;
    /// Blocks that a multiprocessor shall hold at once, and of attention_back_kv: as many as leave a thread the
    /// registers that it needs.
    static constexpr unsigned BLOCKS = 4, KV_BLOCKS = 4 / PARTS;
};

/// Of a (16, 16) matrix of scores in shared memory.
constexpr unsigned TILE_PITCH = 20;
constexpr unsigned TILE = SIDE * TILE_PITCH;

/// Copies ROWS rows of one head, from row `start` of n, to shared memory (ROWS, D); zeros beyond n and beyond d.
template <unsigned ROWS, unsigned D, unsigned THREADS>
__device__ void take(float* to, const float* head, size_t stride, unsigned start, unsigned n, unsigned d) {
    constexpr unsigned PITCH = PlainLaunches<D>::PITCH;
    if (aligned(head) && stride % 4 == 0 && d % 4 == 0) {
        constexpr unsigned PACKS = D / 4;
#pragma unroll 8
        for (unsigned i = threadIdx.x; i < ROWS * PACKS; i += THREADS) {
            const unsigned row = i / PACKS, column = i % PACKS * 4;
            Pack<float> pack = {};
            if (start + row < n && column < d) pack = Pack<float>::load(head + size_t(start + row) * stride + column);
            pack.store(to + row * PITCH + column);
        }
    } else {
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < ROWS * D; i += THREADS) {
            const unsigned row = i / D, column = i % D;
            const bool exists = start + row < n && column < d;
            to[row * PITCH + column] = exists ? head[size_t(start + row) * stride + column] : 0;
        }
    }
}

/// A block takes 32 queries of a head, a warp 16 of them; keys pass by 32 at a time. A row's sums are relative to the
/// largest score so far, and are scaled down when a larger one comes.
template <unsigned D>
__device__ void attention(
    const float* q, const float* k, const float* v, Seen seen, float* y, float* lse, Sides sides, float scale,
    float cap) {
    using L = PlainLaunches<D>;
    constexpr unsigned TILES = D / SIDE, THREADS = L::THREADS, PITCH = L::PITCH, STEP = L::STEP;
    DYNAMIC_SHARED(room);
    float* const qs = reinterpret_cast<float*>(room);
    float* const ks = qs + L::ROWS * PITCH;
    float* const vs = ks + STEP * PITCH;
    const unsigned warp = threadIdx.x / WARP;
    // probabilities take the place of the scores they are made of
    float* const scores = vs + STEP * PITCH + warp * SIDE * L::SCORES_PITCH;

    // under a causal mask the last queries see most: they go first
    const unsigned start = (gridDim.x - 1 - blockIdx.x) * L::ROWS, head = blockIdx.y, batch = blockIdx.z;
    const size_t stride = sides.stride(sides.h), kv_stride = sides.stride(sides.kv);
    const size_t queries = sides.head(batch, sides.t, sides.h, head);
    const size_t keys = sides.head(batch, sides.s, sides.kv, head / (sides.h / sides.kv));
    take<L::ROWS, D, THREADS>(qs, q + queries, stride, start, sides.t, sides.d);

    const unsigned mine = start + warp * SIDE, query = mine + lane_row();
    const Run run = seen.of(batch, query, sides.t);
    const Run span = seen.template sight<L::ROWS>(batch, start, sides.t).some;
    const Bend bend(scale, cap);
    const float unit = bend.cap != 0 ? 1 : bend.inner;
    float largest = -INFINITY, sum = 0;
    Square ys[TILES];
#pragma unroll
    for (auto& tile : ys) tile.clear();

    for (unsigned key = span.first / STEP * STEP; key < span.end; key += STEP) {
        __syncthreads();
        take<STEP, D, THREADS>(ks, k + keys, kv_stride, key, sides.s, sides.d);
        take<STEP, D, THREADS>(vs, v + keys, kv_stride, key, sides.s, sides.d);
        __syncthreads();
        {
            Square products[STEP / SIDE];
#pragma unroll
            for (auto& tile : products) tile.clear();
#pragma unroll 2
            for (unsigned i = 0; i < TILES; ++i) {
                const Factor<> a = {qs + warp * SIDE * PITCH + i * SIDE, PITCH};
#pragma unroll
                for (unsigned n = 0; n < STEP / SIDE; ++n) {
                    products[n].add(a, Factor<true>{ks + n * SIDE * PITCH + i * SIDE, PITCH});
                }
            }
#pragma unroll
            for (unsigned n = 0; n < STEP / SIDE; ++n) products[n].store(scores + n * SIDE, L::SCORES_PITCH);
        }
        __syncwarp();

        // of its row's columns a lane takes four, and leaves four to its neighbour; what either writes here, it writes
        // after a shuffle that needs all that both have read
        float* const lane_scores = scores + lane_row() * L::SCORES_PITCH + 4 * lane_half();
        if (bend.cap != 0) {
            // few models have a cap: a loop of its own keeps the tangent out of the registers of the others
#pragma unroll 1
            for (unsigned i = 0; i < STEP / 8; ++i) {
                auto four = Pack<float>::load(lane_scores + 8 * i);
                float slope;
                for (float& x : four.x) x = bend.score(x, slope);
                four.store(lane_scores + 8 * i);
            }
        }
        Pack<float> xs[STEP / 8];
        float top = largest;
#pragma unroll
        for (unsigned i = 0; i < STEP / 8; ++i) {
            const unsigned column = 8 * i + 4 * lane_half();
            xs[i] = Pack<float>::load(lane_scores + 8 * i);
            for (unsigned j = 0; j < 4; ++j) {
                xs[i].x[j] = run.holds(key + column + j) ? xs[i].x[j] * unit : -INFINITY;
                top = fmaxf(top, xs[i].x[j]);
            }
        }
        top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
        // a row that has seen nothing yet: −∞ − −∞ would be NaN
        const float shift = top == -INFINITY ? 0 : top;
        const float factor = exp2f(largest - shift);
        float added = 0;
#pragma unroll
        for (unsigned i = 0; i < STEP / 8; ++i) {
            for (float& x : xs[i].x) added += x = exp2f(x - shift);
            xs[i].store(lane_scores + 8 * i);
        }
        added += __shfl_xor_sync(ALL, added, 1);
        sum = sum * factor + added;
        largest = top;
        if (__any_sync(ALL, factor != 1)) scale_rows(ys, factor);
        __syncwarp();
#pragma unroll 1
        for (unsigned n = 0; n < STEP / SIDE; ++n) {
            const Factor<> a = {scores + n * SIDE, L::SCORES_PITCH};
#pragma unroll
            for (unsigned i = 0; i < TILES; ++i) ys[i].add(a, Factor<>{vs + n * SIDE * PITCH + i * SIDE, PITCH});
        }
        __syncwarp();
    }

    const unsigned rows = mine < sides.t ? sides.t - mine : 0;
    give_squares(ys, 1 / sum, scores, L::SCORES_PITCH, y + queries + mine * stride, stride, rows, sides.d);
    if (query < sides.t && lane_half() == 0) {
        lse[(size_t(batch) * sides.h + head) * sides.t + query] = (largest + log2f(sum)) * LN_2;
    }
}

/// What the gradients need of a query.
struct Query {
    Run run;
    /// In units of ln 2.
    float lse;
    float dots;

    __device__ static Query of(
        const Seen& seen, const float* lse, const float* dots, const Sides& sides, unsigned batch, unsigned head,
        unsigned query) {
        if (query >= sides.t) return {{0, 0}, 0, 0};
        const size_t at = (size_t(batch) * sides.h + head) * sides.t + query;
        return {seen.of(batch, query, sides.t), lse[at] * LOG2_E, dots[at]};
    }
};

/// p and ds of a lane's share of 16 queries × 16 keys, from two tiles of q·k and dp; where two warps have each summed
/// over their part of d, the other's tiles are `rest`, else null.
struct Slopes {
    Pack<float> p[2], ds[2];

    __device__ Slopes(const float* tiles, const float* rest, const Query& query, unsigned key, const Bend& bend) {
#pragma unroll
        for (unsigned i = 0; i < 2; ++i) {
            const unsigned column = 8 * i + 4 * lane_half(), at = lane_row() * TILE_PITCH + column;
            auto products = Pack<float>::load(tiles + at), dps = Pack<float>::load(tiles + TILE + at);
            if (rest != nullptr) {
                const auto others = Pack<float>::load(rest + at), dp_others = Pack<float>::load(rest + TILE + at);
                for (unsigned j = 0; j < 4; ++j) products.x[j] += others.x[j], dps.x[j] += dp_others.x[j];
            }
            for (unsigned j = 0; j < 4; ++j) {
                float slope;
                const float score = bend.score(products.x[j], slope);
                // where nothing is seen the power may be infinite
                p[i].x[j] = query.run.holds(key + column + j) ? exp2f(score - query.lse) : 0;
                ds[i].x[j] = p[i].x[j] * (dps.x[j] - query.dots) * slope;
            }
        }
    }
};

/// A lane's share of a tile, in the place of what it was made of.
__device__ inline void put(float* tile, const Pack<float> (&share)[2]) {
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) share[i].store(tile + lane_row() * TILE_PITCH + 8 * i + 4 * lane_half());
}

/// Σ over COUNT·16 columns of 16 rows with 16 rows, of two pairs at once, into two tiles.
template <unsigned COUNT>
__device__ void multiply_pairs(
    const float* q, const float* k, const float* g, const float* v, unsigned pitch, float* tiles) {
    Square products, dps;
    products.clear();
    dps.clear();
#pragma unroll 4
    for (unsigned i = 0; i < COUNT; ++i) {
        products.add(Factor<>{q + i * SIDE, pitch}, Factor<true>{k + i * SIDE, pitch});
        dps.add(Factor<>{g + i * SIDE, pitch}, Factor<true>{v + i * SIDE, pitch});
    }
    products.store(tiles, TILE_PITCH);
    dps.store(tiles + TILE, TILE_PITCH);
}

/// A block takes 32 queries of a head, a warp 16 of them; keys pass by 32 at a time.
template <unsigned D>
__device__ void attention_back_q(
    const float* q, const float* k, const float* v, const float* g, const float* lse, const float* dots, Seen seen,
    float* dq, Sides sides, float scale, float cap) {
    using L = PlainLaunches<D>;
    constexpr unsigned TILES = D / SIDE, THREADS = L::THREADS, PITCH = L::PITCH, STEP = L::STEP;
    DYNAMIC_SHARED(room);
    float* const qs = reinterpret_cast<float*>(room);
    float* const gs = qs + L::ROWS * PITCH;
    float* const ks = gs + L::ROWS * PITCH;
    float* const vs = ks + STEP * PITCH;
    const unsigned warp = threadIdx.x / WARP;
    float* const tiles = vs + STEP * PITCH + warp * 2 * TILE;

    const unsigned start = (gridDim.x - 1 - blockIdx.x) * L::ROWS, head = blockIdx.y, batch = blockIdx.z;
    const size_t stride = sides.stride(sides.h), kv_stride = sides.stride(sides.kv);
    const size_t queries = sides.head(batch, sides.t, sides.h, head);
    const size_t keys = sides.head(batch, sides.s, sides.kv, head / (sides.h / sides.kv));
    take<L::ROWS, D, THREADS>(qs, q + queries, stride, start, sides.t, sides.d);
    take<L::ROWS, D, THREADS>(gs, g + queries, stride, start, sides.t, sides.d);

    const unsigned mine = start + warp * SIDE;
    const Query query = Query::of(seen, lse, dots, sides, batch, head, mine + lane_row());
    const Run span = seen.template sight<L::ROWS>(batch, start, sides.t).some;
    const Bend bend(scale, cap);
    Square sums[TILES];
#pragma unroll
    for (auto& tile : sums) tile.clear();

    for (unsigned key = span.first / STEP * STEP; key < span.end; key += STEP) {
        __syncthreads();
        take<STEP, D, THREADS>(ks, k + keys, kv_stride, key, sides.s, sides.d);
        take<STEP, D, THREADS>(vs, v + keys, kv_stride, key, sides.s, sides.d);
        __syncthreads();
        for (unsigned n = 0; n < STEP; n += SIDE) {
            const unsigned own = warp * SIDE * PITCH, other = n * PITCH;
            multiply_pairs<TILES>(qs + own, ks + other, gs + own, vs + other, PITCH, tiles);
            __syncwarp();
            const Slopes slopes(tiles, nullptr, query, key + n, bend);
            __syncwarp();
            put(tiles, slopes.ds);
            __syncwarp();
            const Factor<> a = {tiles, TILE_PITCH};
#pragma unroll
            for (unsigned i = 0; i < TILES; ++i) sums[i].add(a, Factor<>{ks + other + i * SIDE, PITCH});
            __syncwarp();
        }
    }

    const unsigned rows = mine < sides.t ? sides.t - mine : 0;
    give_squares(sums, scale, tiles, TILE_PITCH, dq + queries + mine * stride, stride, rows, sides.d);
}

/// A block takes 32 keys of a head, a warp (for D = 256 two, each with half of the columns) 16 of them; the queries of
/// all heads that share the keys pass by 32 at a time, so that their sum needs no other place.
template <unsigned D>
__device__ void attention_back_kv(
    const float* q, const float* k, const float* v, const float* g, const float* lse, const float* dots, Seen seen,
    float* dk, float* dv, Sides sides, float scale, float cap) {
    using L = PlainLaunches<D>;
    constexpr unsigned WARPS = L::WARPS * L::PARTS, THREADS = L::KV_THREADS, PITCH = L::PITCH, STEP = L::STEP;
    constexpr unsigned COLUMNS = D / L::PARTS, TILES = COLUMNS / SIDE;
    DYNAMIC_SHARED(room);
    float* const ks = reinterpret_cast<float*>(room);
    float* const vs = ks + L::ROWS * PITCH;
    float* const qs = vs + L::ROWS * PITCH;
    float* const gs = qs + STEP * PITCH;
    float* const all_tiles = gs + STEP * PITCH;
    Query* const of_queries = reinterpret_cast<Query*>(all_tiles + WARPS * 2 * TILE);
    const unsigned warp = threadIdx.x / WARP, part = warp / L::WARPS, column = part * COLUMNS;
    float* const tiles = all_tiles + warp * 2 * TILE;
    const float* const rest = L::PARTS == 1 ? nullptr : all_tiles + (warp + L::WARPS) % WARPS * 2 * TILE;
    const auto meet = [] {
        if constexpr (L::PARTS == 1) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    };

    const unsigned start = blockIdx.x * L::ROWS, shared = blockIdx.y, batch = blockIdx.z;
    const unsigned group = sides.h / sides.kv;
    const size_t stride = sides.stride(sides.h), kv_stride = sides.stride(sides.kv);
    const size_t keys = sides.head(batch, sides.s, sides.kv, shared);
    take<L::ROWS, D, THREADS>(ks, k + keys, kv_stride, start, sides.s, sides.d);
    take<L::ROWS, D, THREADS>(vs, v + keys, kv_stride, start, sides.s, sides.d);

    const unsigned local = warp % L::WARPS * SIDE, mine = start + local;
    const Bend bend(scale, cap);
    Square dks[TILES], dvs[TILES];
#pragma unroll
    for (unsigned i = 0; i < TILES; ++i) dks[i].clear(), dvs[i].clear();

    for (unsigned query = 0; query < sides.t; query += STEP) {
        // every warp comes to the same answer
        if (!seen.template sight<STEP>(batch, query, sides.t).some.meets(start, L::ROWS)) continue;
        for (unsigned head = shared * group; head < (shared + 1) * group; ++head) {
            const size_t queries = sides.head(batch, sides.t, sides.h, head);
            __syncthreads();
            take<STEP, D, THREADS>(qs, q + queries, stride, query, sides.t, sides.d);
            take<STEP, D, THREADS>(gs, g + queries, stride, query, sides.t, sides.d);
            if (threadIdx.x < STEP) {
                of_queries[threadIdx.x] = Query::of(seen, lse, dots, sides, batch, head, query + threadIdx.x);
            }
            __syncthreads();
            for (unsigned n = 0; n < STEP; n += SIDE) {
                const unsigned own = local * PITCH + column, other = n * PITCH + column;
                multiply_pairs<TILES>(qs + other, ks + own, gs + other, vs + own, PITCH, tiles);
                meet();
                const Slopes slopes(tiles, rest, of_queries[n + lane_row()], mine, bend);
                meet();
                put(tiles, slopes.p);
                put(tiles + TILE, slopes.ds);
                __syncwarp();
                const Factor<true> p = {tiles, TILE_PITCH}, slope = {tiles + TILE, TILE_PITCH};
#pragma unroll
                for (unsigned i = 0; i < TILES; ++i) {
                    dvs[i].add(p, Factor<>{gs + other + i * SIDE, PITCH});
                    dks[i].add(slope, Factor<>{qs + other + i * SIDE, PITCH});
                }
                __syncwarp();
            }
        }
    }

    const unsigned rows = mine < sides.s ? sides.s - mine : 0, columns = column < sides.d ? sides.d - column : 0;
    const size_t to = keys + mine * kv_stride + column;
    give_squares(dks, scale, tiles, TILE_PITCH, dk + to, kv_stride, rows, columns);
    give_squares(dvs, 1, tiles, TILE_PITCH, dv + to, kv_stride, rows, columns);
}
