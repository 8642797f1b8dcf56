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
// not below d, and the rest is zero in shared memory. -DATTENTION_WIDTH=D compiles one of them: a driver that must compile all of
// the PTX for its device takes some 9 seconds, for one width 2. With size the bytes of a number,
//
//   rows  = size == 2 ? 64 : 32                    rows of the tensor that a block writes
//   step  = size == 2 && D <= 128 ? 64 : 32        rows of the other side that it holds at once
//   warps = rows / 16                              pitch = D + 16 / size
//
//                      grid               threads              dynamic shared memory in bytes
//   attention          (⌈t/rows⌉, h, b)   32·warps             size·pitch·(rows + 2·step) + 4·rows·(step + 8)
//   attention_back_q   (⌈t/rows⌉, h, b)   32·warps             2·size·pitch·(rows + step) + 80·threads
//   attention_back_kv  (⌈s/rows⌉, kv, b)  32·warps, for D =    2·size·pitch·(rows + step) + 80·threads + 16·step
//                                         256 twice as many
//   attention_dots     any                256                  0
//
// That is at most 79 KiB for D ≤ 128 and 141 KiB for D = 256. A launch must first be allowed what is above 48 KiB
// (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES). h, kv and b are at most 65535, what a grid holds.
#include "common.cuh"

namespace wmma = nvcuda::wmma;

constexpr unsigned ALL = ~0u;
constexpr unsigned SIDE = 16;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// ---------------------------------------------------------------------------------------------------------------------
// Products of 16 × 16 matrices by a warp: the matrix unit for 16-bit dtypes, plain arithmetic for f32, which would lose
// 13 of its bits there.

/// The left factor of a product, (16, 16) in shared memory; TURNED, memory holds it column by column.
template <typename T, bool TURNED = false>
struct Left {
    using Layout = std::conditional_t<TURNED, wmma::col_major, wmma::row_major>;
    wmma::fragment<wmma::matrix_a, SIDE, SIDE, SIDE, T, Layout> x;

    __device__ void load(const T* at, unsigned pitch) { wmma::load_matrix_sync(x, at, pitch); }
};

/// The right factor.
template <typename T, bool TURNED = false>
struct Right {
    using Layout = std::conditional_t<TURNED, wmma::col_major, wmma::row_major>;
    wmma::fragment<wmma::matrix_b, SIDE, SIDE, SIDE, T, Layout> x;

    __device__ void load(const T* at, unsigned pitch) { wmma::load_matrix_sync(x, at, pitch); }
};

template <bool TURNED>
struct Left<float, TURNED> {
    const float* at;
    unsigned pitch;

    __device__ void load(const float* from, unsigned from_pitch) { at = from, pitch = from_pitch; }
};

template <bool TURNED>
struct Right<float, TURNED> {
    const float* at;
    unsigned pitch;

    __device__ void load(const float* from, unsigned from_pitch) { at = from, pitch = from_pitch; }
};

/// Sums of products, (16, 16) in f32, spread over the lanes as the matrix unit likes it.
template <typename T>
struct Sums {
    wmma::fragment<wmma::accumulator, SIDE, SIDE, SIDE, float> x;

    __device__ void clear() { wmma::fill_fragment(x, 0.f); }

    template <bool A, bool B>
    __device__ void add(const Left<T, A>& a, const Right<T, B>& b) { wmma::mma_sync(x, a.x, b.x, x); }

    __device__ void store(float* to, unsigned pitch) const {
        wmma::store_matrix_sync(to, x, pitch, wmma::mem_row_major);
    }
};

/// In f32 a lane holds two rows of four.
template <>
struct Sums<float> {
    float x[2][4];

    __device__ static unsigned row() { return threadIdx.x % WARP / 4 * 2; }
    __device__ static unsigned column() { return threadIdx.x % 4 * 4; }

    __device__ void clear() {
        for (auto& row : x) {
            for (float& sum : row) sum = 0;
        }
    }

    template <bool A, bool B>
    __device__ void add(const Left<float, A>& a, const Right<float, B>& b) {
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

/// Multiplies each row of N neighbouring matrices by the factor that its two lanes name; `room` has 16 rows.
template <unsigned N, typename T>
__device__ void scale_rows(Sums<T> (&sums)[N], float factor, float* room, unsigned pitch) {
    if constexpr (std::is_same_v<T, float>) {
        for (unsigned r = 0; r < 2; ++r) {
            const float of_row = __shfl_sync(ALL, factor, 2 * (Sums<T>::row() + r));
#pragma unroll
            for (auto& sum : sums) {
                for (float& x : sum.x[r]) x *= of_row;
            }
        }
    } else {
        // which lane holds which row is nobody's business: a matrix of the factors is spread in the same way
        for (unsigned i = 0; i < SIDE / 2; ++i) room[lane_row() * pitch + SIDE / 2 * lane_half() + i] = factor;
        __syncwarp();
        decltype(sums[0].x) factors;
        wmma::load_matrix_sync(factors, room, pitch, wmma::mem_row_major);
#pragma unroll
        for (auto& sum : sums) {
            for (unsigned i = 0; i < sum.x.num_elements; ++i) sum.x.x[i] *= factors.x[i];
        }
    }
}

/// Writes N neighbouring matrices, each row times its lanes' factor, to 16 rows of a tensor, `rows` and `columns` of
/// which exist; `room` has 16 rows.
template <unsigned N, typename T>
__device__ void give(
    const Sums<T> (&sums)[N], float factor, float* room, unsigned pitch, T* to, size_t stride, unsigned rows,
    unsigned columns) {
    const bool packs = aligned(to) && stride % PACKED<T> == 0 && columns % PACKED<T> == 0;
    const float* const from = room + lane_row() * pitch;
#pragma unroll
    for (unsigned n = 0; n < N; ++n) {
        sums[n].store(room, pitch);
        __syncwarp();
        for (unsigned i = 0; i < SIDE / 2; i += PACKED<T>) {
            const unsigned column = SIDE / 2 * lane_half() + i, at = SIDE * n + column;
            if (lane_row() >= rows || at >= columns) continue;
            T* const place = to + lane_row() * stride + at;
            if (packs) {
                Pack<T> pack;
                for (unsigned j = 0; j < PACKED<T>; ++j) pack.x[j] = rounded<T>(from[column + j] * factor);
                pack.store(place);
            } else {
#pragma unroll 1
                for (unsigned j = 0; j < PACKED<T> && at + j < columns; ++j) {
                    place[j] = rounded<T>(from[column + j] * factor);
                }
            }
        }
        __syncwarp();
    }
}

// ---------------------------------------------------------------------------------------------------------------------

struct Sides {
    unsigned b, t, s, h, kv, d;

    /// From one row of a head to its next, among so many heads.
    __device__ size_t stride(unsigned heads) const { return size_t(heads) * d; }

    /// Where a head starts in (b, n, heads, d).
    __device__ size_t head(unsigned batch, unsigned n, unsigned heads, unsigned head) const {
        return (size_t(batch) * n * heads + head) * d;
    }
};

/// What a launch of width D is made of; the table above is this.
template <typename T, unsigned D>
struct Shape {
    static constexpr unsigned ROWS = sizeof(T) == 2 ? 64 : 32;
    static constexpr unsigned STEP = sizeof(T) == 2 && D <= 128 ? 64 : 32;
    static constexpr unsigned WARPS = ROWS / SIDE;
    /// Of a row in shared memory: 16 bytes more than it needs, so that rows begin in different banks.
    static constexpr unsigned PITCH = D + PACKED<T>;
    static constexpr unsigned SCORES_PITCH = STEP + 8;
    /// Warps that share 16 rows in attention_back_kv: one has no registers for dk and dv of 256 columns.
    static constexpr unsigned PARTS = D > 128 ? 2 : 1;
    /// Blocks that a multiprocessor shall hold at once, and of attention_back_kv: as many as leave a thread the
    /// registers that it needs.
    static constexpr unsigned BLOCKS = sizeof(T) == 4 || D <= 32 ? 4 : D <= 128 ? 3 : 2;
    static constexpr unsigned KV_BLOCKS = sizeof(T) == 4 ? 4 / PARTS : D == 64 ? 3 : 2 / PARTS;
};

/// Of a (16, 16) matrix of scores in shared memory, in f32 or T.
template <typename T>
constexpr unsigned TILE_PITCH = 20 * 4 / sizeof(T);
constexpr unsigned TILE = SIDE * TILE_PITCH<float>;

/// Copies ROWS rows of one head, from row `start` of n, to shared memory (ROWS, D); zeros beyond n and beyond d.
template <unsigned ROWS, unsigned D, unsigned THREADS, typename T>
__device__ void take(T* to, const T* head, size_t stride, unsigned start, unsigned n, unsigned d) {
    constexpr unsigned PITCH = Shape<T, D>::PITCH;
    if (aligned(head) && stride % PACKED<T> == 0 && d % PACKED<T> == 0) {
        constexpr unsigned PACKS = D / PACKED<T>;
#pragma unroll 8
        for (unsigned i = threadIdx.x; i < ROWS * PACKS; i += THREADS) {
            const unsigned row = i / PACKS, column = i % PACKS * PACKED<T>;
            Pack<T> pack = {};
            if (start + row < n && column < d) pack = Pack<T>::load(head + size_t(start + row) * stride + column);
            pack.store(to + row * PITCH + column);
        }
    } else {
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < ROWS * D; i += THREADS) {
            const unsigned row = i / D, column = i % D;
            const bool exists = start + row < n && column < d;
            to[row * PITCH + column] = exists ? head[size_t(start + row) * stride + column] : rounded<T>(0);
        }
    }
}

/// A run of keys. No key is in it where `end` is not above `first`.
struct Run {
    unsigned first, end;

    __device__ bool holds(unsigned key) const { return key - first < end - first; }
    __device__ bool meets(unsigned start, unsigned count) const { return first < start + count && start < end; }
};

struct Seen {
    const unsigned *first, *end;
    unsigned rows;

    /// Of one query; none beyond the last.
    __device__ Run of(unsigned batch, unsigned query, unsigned t) const {
        if (query >= t) return {0, 0};
        const size_t at = (size_t(batch) * t + query) % rows;
        return {first[at], end[at]};
    }

    /// From the least to the greatest key that COUNT queries see; the whole warp asks.
    template <unsigned COUNT>
    __device__ Run span(unsigned batch, unsigned start, unsigned t) const {
        Run span = {~0u, 0};
        for (unsigned i = threadIdx.x % WARP; i < COUNT && start + i < t; i += WARP) {
            const Run run = of(batch, start + i, t);
            span = {min(span.first, run.first), max(span.end, run.end)};
        }
        for (unsigned step = WARP / 2; step > 0; step /= 2) {
            span.first = min(span.first, __shfl_xor_sync(ALL, span.first, step));
            span.end = max(span.end, __shfl_xor_sync(ALL, span.end, step));
        }
        return span;
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

/// attention_T_dD(q, k, v, first, end, seen_rows, y, lse, b, t, s, h, kv, d, scale, cap): y and lse.
///
/// A block takes `rows` queries of a head, a warp 16 of them; keys pass by `step` at a time. A row's sums are relative
/// to the largest score so far, and are scaled down when a larger one comes.
template <typename T, unsigned D>
__device__ void attention(
    const T* q, const T* k, const T* v, Seen seen, T* y, float* lse, Sides sides, float scale, float cap) {
    using S = Shape<T, D>;
    constexpr unsigned TILES = D / SIDE, THREADS = S::WARPS * WARP, PITCH = S::PITCH, STEP = S::STEP;
    DYNAMIC_SHARED(room);
    T* const qs = reinterpret_cast<T*>(room);
    T* const ks = qs + S::ROWS * PITCH;
    T* const vs = ks + STEP * PITCH;
    const unsigned warp = threadIdx.x / WARP;
    float* const scores = reinterpret_cast<float*>(vs + STEP * PITCH) + warp * SIDE * S::SCORES_PITCH;
    // probabilities take the place of the scores they are made of
    T* const ps = reinterpret_cast<T*>(scores);
    constexpr unsigned PS_PITCH = S::SCORES_PITCH * 4 / sizeof(T);

    // under a causal mask the last queries see most: they go first
    const unsigned start = (gridDim.x - 1 - blockIdx.x) * S::ROWS, head = blockIdx.y, batch = blockIdx.z;
    const size_t stride = sides.stride(sides.h), kv_stride = sides.stride(sides.kv);
    const size_t queries = sides.head(batch, sides.t, sides.h, head);
    const size_t keys = sides.head(batch, sides.s, sides.kv, head / (sides.h / sides.kv));
    take<S::ROWS, D, THREADS>(qs, q + queries, stride, start, sides.t, sides.d);

    const unsigned mine = start + warp * SIDE, query = mine + lane_row();
    const Run run = seen.of(batch, query, sides.t);
    const Run span = seen.template span<S::ROWS>(batch, start, sides.t);
    const Bend bend(scale, cap);
    const float unit = bend.cap != 0 ? 1 : bend.inner;
    float largest = -INFINITY, sum = 0;
    Sums<T> ys[TILES];
#pragma unroll
    for (auto& tile : ys) tile.clear();

    for (unsigned key = span.first / STEP * STEP; key < span.end; key += STEP) {
        __syncthreads();
        take<STEP, D, THREADS>(ks, k + keys, kv_stride, key, sides.s, sides.d);
        take<STEP, D, THREADS>(vs, v + keys, kv_stride, key, sides.s, sides.d);
        __syncthreads();
        {
            Sums<T> products[STEP / SIDE];
#pragma unroll
            for (auto& tile : products) tile.clear();
#pragma unroll 2
            for (unsigned i = 0; i < TILES; ++i) {
                Left<T> a;
                a.load(qs + warp * SIDE * PITCH + i * SIDE, PITCH);
#pragma unroll
                for (unsigned n = 0; n < STEP / SIDE; ++n) {
                    Right<T, true> b;
                    b.load(ks + n * SIDE * PITCH + i * SIDE, PITCH);
                    products[n].add(a, b);
                }
            }
#pragma unroll
            for (unsigned n = 0; n < STEP / SIDE; ++n) products[n].store(scores + n * SIDE, S::SCORES_PITCH);
        }
        __syncwarp();

        // of its row's columns a lane takes four, and leaves four to its neighbour; what either writes here, it writes
        // after a shuffle that needs all that both have read
        float* const lane_scores = scores + lane_row() * S::SCORES_PITCH + 4 * lane_half();
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
            Pack<T, 4> four;
            for (unsigned j = 0; j < 4; ++j) {
                const float p = exp2f(xs[i].x[j] - shift);
                added += p;
                four.x[j] = rounded<T>(p);
            }
            four.store(ps + lane_row() * PS_PITCH + 8 * i + 4 * lane_half());
        }
        added += __shfl_xor_sync(ALL, added, 1);
        sum = sum * factor + added;
        largest = top;
        if (__any_sync(ALL, factor != 1)) {
            // 16-bit probabilities leave the second half of the scores' columns free
            scale_rows(ys, factor, scores + STEP / 2, S::SCORES_PITCH);
        }
        __syncwarp();
#pragma unroll 1
        for (unsigned n = 0; n < STEP / SIDE; ++n) {
            Left<T> a;
            a.load(ps + n * SIDE, PS_PITCH);
#pragma unroll
            for (unsigned i = 0; i < TILES; ++i) {
                Right<T> b;
                b.load(vs + n * SIDE * PITCH + i * SIDE, PITCH);
                ys[i].add(a, b);
            }
        }
        __syncwarp();
    }

    const unsigned rows = mine < sides.t ? sides.t - mine : 0;
    give(ys, 1 / sum, scores, S::SCORES_PITCH, y + queries + mine * stride, stride, rows, sides.d);
    if (query < sides.t && lane_half() == 0) {
        lse[(size_t(batch) * sides.h + head) * sides.t + query] = (largest + log2f(sum)) * LN_2;
    }
}

/// attention_dots_T(y, g, dots, b, t, h, d): dots[b][h][t] = Σ y·g over d. A warp takes a row of d, then the row as
/// many warps further as there are.
template <typename T>
__device__ void attention_dots(const T* y, const T* g, float* dots, unsigned b, unsigned t, unsigned h, unsigned d) {
    const bool packs = d % PACKED<T> == 0 && aligned(y) && aligned(g);
    const size_t warp = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    const size_t warps = size_t(gridDim.x) * blockDim.x / WARP;
    for (size_t row = warp; row < size_t(b) * t * h; row += warps) {
        float sum = 0;
        const auto add = [&](auto ys, unsigned at) {
            using P = decltype(ys);
            ys = P::load(y + row * d + at);
            const P gs = P::load(g + row * d + at);
            for (unsigned i = 0; i < sizeof(P) / sizeof(T); ++i) sum += widened(ys.x[i]) * widened(gs.x[i]);
        };
        const unsigned lane = threadIdx.x % WARP;
        if (packs) {
            for (unsigned at = lane * PACKED<T>; at < d; at += WARP * PACKED<T>) add(Pack<T>(), at);
        } else {
            for (unsigned at = lane; at < d; at += WARP) add(Pack<T, 1>(), at);
        }
        for (unsigned step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
        const size_t batch = row / h / t, query = row / h % t, head = row % h;
        if (lane == 0) dots[(batch * h + head) * t + query] = sum;
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
            const unsigned column = 8 * i + 4 * lane_half(), at = lane_row() * TILE_PITCH<float> + column;
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
template <typename T>
__device__ void put(T* tile, const Pack<float> (&share)[2]) {
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
        Pack<T, 4> four;
        for (unsigned j = 0; j < 4; ++j) four.x[j] = rounded<T>(share[i].x[j]);
        four.store(tile + lane_row() * TILE_PITCH<T> + 8 * i + 4 * lane_half());
    }
}

/// Σ over COUNT·16 columns of 16 rows with 16 rows, of two pairs at once, into two tiles.
template <unsigned COUNT, typename T>
__device__ void multiply(const T* q, const T* k, const T* g, const T* v, unsigned pitch, float* tiles) {
    Sums<T> products, dps;
    products.clear();
    dps.clear();
#pragma unroll 4
    for (unsigned i = 0; i < COUNT; ++i) {
        Left<T> a;
        Right<T, true> b;
        a.load(q + i * SIDE, pitch);
        b.load(k + i * SIDE, pitch);
        products.add(a, b);
        a.load(g + i * SIDE, pitch);
        b.load(v + i * SIDE, pitch);
        dps.add(a, b);
    }
    products.store(tiles, TILE_PITCH<float>);
    dps.store(tiles + TILE, TILE_PITCH<float>);
}

/// attention_back_q_T_dD(q, k, v, g, lse, dots, first, end, seen_rows, dq, b, t, s, h, kv, d, scale, cap): dq.
///
/// A block takes `rows` queries of a head, a warp 16 of them; keys pass by `step` at a time.
template <typename T, unsigned D>
__device__ void attention_back_q(
    const T* q, const T* k, const T* v, const T* g, const float* lse, const float* dots, Seen seen, T* dq,
    Sides sides, float scale, float cap) {
    using S = Shape<T, D>;
    constexpr unsigned TILES = D / SIDE, THREADS = S::WARPS * WARP, PITCH = S::PITCH, STEP = S::STEP;
    DYNAMIC_SHARED(room);
    T* const qs = reinterpret_cast<T*>(room);
    T* const gs = qs + S::ROWS * PITCH;
    T* const ks = gs + S::ROWS * PITCH;
    T* const vs = ks + STEP * PITCH;
    const unsigned warp = threadIdx.x / WARP;
    float* const tiles = reinterpret_cast<float*>(vs + STEP * PITCH) + warp * 2 * TILE;
    T* const ds = reinterpret_cast<T*>(tiles);

    const unsigned start = (gridDim.x - 1 - blockIdx.x) * S::ROWS, head = blockIdx.y, batch = blockIdx.z;
    const size_t stride = sides.stride(sides.h), kv_stride = sides.stride(sides.kv);
    const size_t queries = sides.head(batch, sides.t, sides.h, head);
    const size_t keys = sides.head(batch, sides.s, sides.kv, head / (sides.h / sides.kv));
    take<S::ROWS, D, THREADS>(qs, q + queries, stride, start, sides.t, sides.d);
    take<S::ROWS, D, THREADS>(gs, g + queries, stride, start, sides.t, sides.d);

    const unsigned mine = start + warp * SIDE;
    const Query query = Query::of(seen, lse, dots, sides, batch, head, mine + lane_row());
    const Run span = seen.template span<S::ROWS>(batch, start, sides.t);
    const Bend bend(scale, cap);
    Sums<T> sums[TILES];
#pragma unroll
    for (auto& tile : sums) tile.clear();

    for (unsigned key = span.first / STEP * STEP; key < span.end; key += STEP) {
        __syncthreads();
        take<STEP, D, THREADS>(ks, k + keys, kv_stride, key, sides.s, sides.d);
        take<STEP, D, THREADS>(vs, v + keys, kv_stride, key, sides.s, sides.d);
        __syncthreads();
        for (unsigned n = 0; n < STEP; n += SIDE) {
            const unsigned own = warp * SIDE * PITCH, other = n * PITCH;
            multiply<TILES>(qs + own, ks + other, gs + own, vs + other, PITCH, tiles);
            __syncwarp();
            const Slopes slopes(tiles, nullptr, query, key + n, bend);
            __syncwarp();
            put(ds, slopes.ds);
            __syncwarp();
            Left<T> a;
            a.load(ds, TILE_PITCH<T>);
#pragma unroll
            for (unsigned i = 0; i < TILES; ++i) {
                Right<T> b;
                b.load(ks + other + i * SIDE, PITCH);
                sums[i].add(a, b);
            }
            __syncwarp();
        }
    }

    const unsigned rows = mine < sides.t ? sides.t - mine : 0;
    give(sums, scale, tiles, TILE_PITCH<float>, dq + queries + mine * stride, stride, rows, sides.d);
}

/// attention_back_kv_T_dD(q, k, v, g, lse, dots, first, end, seen_rows, dk, dv, b, t, s, h, kv, d, scale, cap): dk and
/// dv.
///
/// A block takes `rows` keys of a head, a warp (for D = 256 two, each with half of the columns) 16 of them; the queries
/// of all heads that share the keys pass by `step` at a time, so that their sum needs no other place.
template <typename T, unsigned D>
__device__ void attention_back_kv(
    const T* q, const T* k, const T* v, const T* g, const float* lse, const float* dots, Seen seen, T* dk, T* dv,
    Sides sides, float scale, float cap) {
    using S = Shape<T, D>;
    constexpr unsigned WARPS = S::WARPS * S::PARTS, THREADS = WARPS * WARP, PITCH = S::PITCH, STEP = S::STEP;
    constexpr unsigned COLUMNS = D / S::PARTS, TILES = COLUMNS / SIDE;
    DYNAMIC_SHARED(room);
    T* const ks = reinterpret_cast<T*>(room);
    T* const vs = ks + S::ROWS * PITCH;
    T* const qs = vs + S::ROWS * PITCH;
    T* const gs = qs + STEP * PITCH;
    float* const all_tiles = reinterpret_cast<float*>(gs + STEP * PITCH);
    Query* const of_queries = reinterpret_cast<Query*>(all_tiles + WARPS * 2 * TILE);
    const unsigned warp = threadIdx.x / WARP, part = warp / S::WARPS, column = part * COLUMNS;
    float* const tiles = all_tiles + warp * 2 * TILE;
    const float* const rest = S::PARTS == 1 ? nullptr : all_tiles + (warp + S::WARPS) % WARPS * 2 * TILE;
    T* const ps = reinterpret_cast<T*>(tiles);
    T* const ds = reinterpret_cast<T*>(tiles + TILE);
    const auto meet = [] {
        if constexpr (S::PARTS == 1) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    };

    const unsigned start = blockIdx.x * S::ROWS, shared = blockIdx.y, batch = blockIdx.z;
    const unsigned group = sides.h / sides.kv;
    const size_t stride = sides.stride(sides.h), kv_stride = sides.stride(sides.kv);
    const size_t keys = sides.head(batch, sides.s, sides.kv, shared);
    take<S::ROWS, D, THREADS>(ks, k + keys, kv_stride, start, sides.s, sides.d);
    take<S::ROWS, D, THREADS>(vs, v + keys, kv_stride, start, sides.s, sides.d);

    const unsigned local = warp % S::WARPS * SIDE, mine = start + local;
    const Bend bend(scale, cap);
    Sums<T> dks[TILES], dvs[TILES];
#pragma unroll
    for (unsigned i = 0; i < TILES; ++i) dks[i].clear(), dvs[i].clear();

    for (unsigned query = 0; query < sides.t; query += STEP) {
        // every warp comes to the same answer
        if (!seen.template span<STEP>(batch, query, sides.t).meets(start, S::ROWS)) continue;
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
                multiply<TILES>(qs + other, ks + own, gs + other, vs + own, PITCH, tiles);
                meet();
                const Slopes slopes(tiles, rest, of_queries[n + lane_row()], mine, bend);
                meet();
                put(ps, slopes.p);
                put(ds, slopes.ds);
                __syncwarp();
                Left<T, true> p, slope;
                p.load(ps, TILE_PITCH<T>);
                slope.load(ds, TILE_PITCH<T>);
#pragma unroll
                for (unsigned i = 0; i < TILES; ++i) {
                    Right<T> b;
                    b.load(gs + other + i * SIDE, PITCH);
                    dvs[i].add(p, b);
                    b.load(qs + other + i * SIDE, PITCH);
                    dks[i].add(slope, b);
                }
                __syncwarp();
            }
        }
    }

    const unsigned rows = mine < sides.s ? sides.s - mine : 0, columns = column < sides.d ? sides.d - column : 0;
    const size_t to = keys + mine * kv_stride + column;
    give(dks, scale, tiles, TILE_PITCH<float>, dk + to, kv_stride, rows, columns);
    give(dvs, 1, tiles, TILE_PITCH<float>, dv + to, kv_stride, rows, columns);
}

// A kernel's threads, and the blocks of it that share a multiprocessor.
#define LAUNCH(T, D) __launch_bounds__(Shape<T, D>::WARPS * WARP, Shape<T, D>::BLOCKS)
#define KV_LAUNCH(T, D) __launch_bounds__(Shape<T, D>::WARPS * Shape<T, D>::PARTS * WARP, Shape<T, D>::KV_BLOCKS)

#define DEFINE_WIDTH(NAME, T, D)                                                                                      \
    extern "C" __global__ void LAUNCH(T, D) attention_##NAME##_d##D(                                                  \
        const T* q, const T* k, const T* v, const unsigned* first, const unsigned* end, unsigned seen_rows, T* y,     \
        float* lse, unsigned b, unsigned t, unsigned s, unsigned h, unsigned kv, unsigned d, float scale,             \
        float cap) {                                                                                                  \
        attention<T, D>(q, k, v, {first, end, seen_rows}, y, lse, {b, t, s, h, kv, d}, scale, cap);                   \
    }                                                                                                                 \
    extern "C" __global__ void LAUNCH(T, D) attention_back_q_##NAME##_d##D(                                           \
        const T* q, const T* k, const T* v, const T* g, const float* lse, const float* dots, const unsigned* first,   \
        const unsigned* end, unsigned seen_rows, T* dq, unsigned b, unsigned t, unsigned s, unsigned h, unsigned kv,  \
        unsigned d, float scale, float cap) {                                                                         \
        const Seen seen = {first, end, seen_rows};                                                                    \
        attention_back_q<T, D>(q, k, v, g, lse, dots, seen, dq, {b, t, s, h, kv, d}, scale, cap);                     \
    }                                                                                                                 \
    extern "C" __global__ void KV_LAUNCH(T, D) attention_back_kv_##NAME##_d##D(                                       \
        const T* q, const T* k, const T* v, const T* g, const float* lse, const float* dots, const unsigned* first,   \
        const unsigned* end, unsigned seen_rows, T* dk, T* dv, unsigned b, unsigned t, unsigned s, unsigned h,        \
        unsigned kv, unsigned d, float scale, float cap) {                                                            \
        const Seen seen = {first, end, seen_rows};                                                                    \
        attention_back_kv<T, D>(q, k, v, g, lse, dots, seen, dk, dv, {b, t, s, h, kv, d}, scale, cap);                \
    }
#define DEFINE_DOTS(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) attention_dots_##NAME(                                          \
        const T* y, const T* g, float* dots, unsigned b, unsigned t, unsigned h, unsigned d) {                        \
        attention_dots<T>(y, g, dots, b, t, h, d);                                                                    \
    }
FOR_DTYPES(DEFINE_DOTS)
#undef DEFINE_DOTS

#ifdef ATTENTION_WIDTH
// the argument of a macro that pastes it is not replaced itself
#define DEFINE_ONE(NAME, T, D) DEFINE_WIDTH(NAME, T, D)
#define DEFINE(NAME, T) DEFINE_ONE(NAME, T, ATTENTION_WIDTH)
FOR_DTYPES(DEFINE)
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
#undef KV_LAUNCH
#undef LAUNCH
