// Attention and its gradients on a GPU: right against f64, and how fast.
//
//     nvcc -O3 -std=c++17 -gencode arch=compute_80,code=sm_90 -o on_gpu tests/kernels/on_gpu.cu && ./on_gpu
//
// and, for what the program takes on an H100,
//
//     nvcc -O3 -std=c++17 -DATTENTION_BY_WARPGROUPS -gencode arch=compute_90a,code=sm_90a -o on_gpu tests/kernels/on_gpu.cu
//
// That is the machine code of an H100 by way of the PTX that the program ships. `tests/kernels/run` holds the kernels
// tighter, number by number; here they meet what a CPU only imitates: the matrix unit, real copies in the background,
// warps that do not wait for each other.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../src/model/kernels/attention.cu"
#include "../../src/model/kernels/attention_dots.cu"
#include "launches.h"

namespace {

void need(cudaError_t error, const char* what, int line) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "line %d, %s: %s\n", line, what, cudaGetErrorString(error));
    std::exit(2);
}
#define NEED(CALL) need(CALL, #CALL, __LINE__)

/// Numbers on the GPU between guard zones, all NaN at first.
template <typename T>
class Memory {
public:
    explicit Memory(size_t count) : count(count), bytes(count * sizeof(T) + 2 * ZONE) {
        NEED(cudaMalloc(&memory, bytes));
        poison();
    }
    explicit Memory(const std::vector<T>& from) : Memory(from.size()) {
        NEED(cudaMemcpy(data(), from.data(), count * sizeof(T), cudaMemcpyHostToDevice));
    }
    Memory(const Memory&) = delete;
    ~Memory() { NEED(cudaFree(memory)); }

    void poison() { NEED(cudaMemset(memory, 0xff, bytes)); }
    T* data() const { return reinterpret_cast<T*>(memory + ZONE); }

    std::vector<T> numbers() const {
        std::vector<T> numbers(count);
        NEED(cudaMemcpy(numbers.data(), data(), count * sizeof(T), cudaMemcpyDeviceToHost));
        return numbers;
    }
    bool guarded() const {
        std::vector<unsigned char> all(bytes);
        NEED(cudaMemcpy(all.data(), memory, bytes, cudaMemcpyDeviceToHost));
        const auto poison = [](unsigned char x) { return x == 0xff; };
        return std::all_of(all.begin(), all.begin() + ZONE, poison) && std::all_of(all.end() - ZONE, all.end(), poison);
    }

    const size_t count;

private:
    static constexpr size_t ZONE = 4096;
    size_t bytes;
    unsigned char* memory = nullptr;
};

/// Nearly normal numbers: a sum of four uniform ones, made of a counter (splitmix64).
template <typename T>
__global__ void fill(T* to, size_t count, unsigned long long seed, float size) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        unsigned long long x = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ x >> 27) * 0x94d049bb133111ebull;
        x ^= x >> 31;
        float sum = 0;
        for (unsigned part = 0; part < 4; ++part) sum += float(x >> 16 * part & 0xffff) / 65536 - 0.5f;
        to[i] = rounded<T>(sum * 1.7320508f * size);
    }
}

template <typename T>
void fill_all(const Memory<T>& to, unsigned long long seed, float size) {
    fill<T><<<1024, 256>>>(to.data(), to.count, seed, size);
    NEED(cudaGetLastError());
}

struct Problem {
    unsigned b, t, s, h, kv, d;
    float scale, cap;
};

// ---------------------------------------------------------------------------------------------------------------------
// The reference, one thread to a number and f64 throughout.

struct Exact {
    double *score, *slope, *dp, *lse, *dots, *y, *dq, *dk, *dv;
};

template <typename T>
__global__ void exact_scores(Problem p, const T* q, const T* k, const T* v, const T* g, Seen seen, Exact to) {
    const size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= size_t(p.b) * p.h * p.t * p.s) return;
    const unsigned j = at % p.s, i = at / p.s % p.t, head = at / p.s / p.t % p.h, batch = at / p.s / p.t / p.h;
    const size_t query = ((size_t(batch) * p.t + i) * p.h + head) * p.d;
    const size_t key = ((size_t(batch) * p.s + j) * p.kv + head / (p.h / p.kv)) * p.d;
    double z = 0, dp = 0;
    for (unsigned x = 0; x < p.d; ++x) {
        z += double(widened(q[query + x])) * widened(k[key + x]);
        dp += double(widened(g[query + x])) * widened(v[key + x]);
    }
    z *= p.scale;
    const double bent = p.cap > 0 ? tanh(z / p.cap) : 0;
    to.score[at] = !seen.of(batch, i, p.t).holds(j) ? -INFINITY : p.cap > 0 ? p.cap * bent : z;
    to.slope[at] = 1 - bent * bent;
    to.dp[at] = dp;
}

__global__ void exact_rows(Problem p, Exact to) {
    const size_t row = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= size_t(p.b) * p.h * p.t) return;
    const double* const scores = to.score + row * p.s;
    double top = -INFINITY, sum = 0, dots = 0;
    for (unsigned j = 0; j < p.s; ++j) top = fmax(top, scores[j]);
    for (unsigned j = 0; j < p.s; ++j) sum += exp(scores[j] - top);
    const double lse = top + log(sum);
    for (unsigned j = 0; j < p.s; ++j) dots += exp(scores[j] - lse) * to.dp[row * p.s + j];
    to.lse[row] = lse;
    to.dots[row] = dots;
}

template <typename T>
__global__ void exact_queries(Problem p, const T* k, const T* v, Exact to) {
    const size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= size_t(p.b) * p.t * p.h * p.d) return;
    const unsigned x = at % p.d, head = at / p.d % p.h, i = at / p.d / p.h % p.t, batch = at / p.d / p.h / p.t;
    const size_t row = (size_t(batch) * p.h + head) * p.t + i;
    double y = 0, dq = 0;
    for (unsigned j = 0; j < p.s; ++j) {
        const size_t key = ((size_t(batch) * p.s + j) * p.kv + head / (p.h / p.kv)) * p.d, one = row * p.s + j;
        const double power = exp(to.score[one] - to.lse[row]);
        y += power * widened(v[key + x]);
        dq += power * (to.dp[one] - to.dots[row]) * to.slope[one] * p.scale * widened(k[key + x]);
    }
    to.y[at] = y;
    to.dq[at] = dq;
}

template <typename T>
__global__ void exact_keys(Problem p, const T* q, const T* g, Exact to) {
    const size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= size_t(p.b) * p.s * p.kv * p.d) return;
    const unsigned x = at % p.d, shared = at / p.d % p.kv, j = at / p.d / p.kv % p.s, batch = at / p.d / p.kv / p.s;
    const unsigned group = p.h / p.kv;
    double dk = 0, dv = 0;
    for (unsigned head = shared * group; head < (shared + 1) * group; ++head) {
        for (unsigned i = 0; i < p.t; ++i) {
            const size_t row = (size_t(batch) * p.h + head) * p.t + i, one = row * p.s + j;
            const size_t query = ((size_t(batch) * p.t + i) * p.h + head) * p.d;
            const double power = exp(to.score[one] - to.lse[row]);
            dv += power * widened(g[query + x]);
            dk += power * (to.dp[one] - to.dots[row]) * to.slope[one] * p.scale * widened(q[query + x]);
        }
    }
    to.dk[at] = dk;
    to.dv[at] = dv;
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernels as the program launches them.

#define BY_WIDTH(NAME, DTYPE)                                                                                     \
    (width == 32 ? NAME##_##DTYPE##_d32 : width == 64 ? NAME##_##DTYPE##_d64 : width == 96 ? NAME##_##DTYPE##_d96 \
     : width == 128 ? NAME##_##DTYPE##_d128 : NAME##_##DTYPE##_d256)
#define KERNELS(T, DTYPE)                                                             \
    template <>                                                                       \
    struct Kernels<T> {                                                               \
        static auto forward(unsigned width) { return BY_WIDTH(attention, DTYPE); }    \
        static auto back_q(unsigned width) { return BY_WIDTH(attention_back_q, DTYPE); }   \
        static auto back_kv(unsigned width) { return BY_WIDTH(attention_back_kv, DTYPE); } \
        static auto dots() { return attention_dots_##DTYPE; }                         \
        static constexpr const char* NAME = #DTYPE;                                   \
    };
template <typename T>
struct Kernels;
KERNELS(float, f32)
KERNELS(__half, f16)
KERNELS(__nv_bfloat16, bf16)

template <typename K>
void allow(K* kernel, size_t shared_bytes) {
    NEED(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
}

/// A problem on the GPU, with room for what the kernels make of it.
template <typename T>
struct Attention {
    Problem p;
    Geometry geometry;
    Memory<T> q, k, v, g, y, dq, dk, dv;
    Memory<float> lse, dots;
    Memory<unsigned> first, end;

    Attention(Problem p, const std::vector<unsigned>& firsts, const std::vector<unsigned>& ends, float size = 1)
        : p(p), geometry(p.d, sizeof(T)), q(size_t(p.b) * p.t * p.h * p.d), k(size_t(p.b) * p.s * p.kv * p.d),
          v(k.count), g(q.count), y(q.count), dq(q.count), dk(k.count), dv(k.count), lse(size_t(p.b) * p.h * p.t),
          dots(lse.count), first(firsts), end(ends) {
        static unsigned long long seed = 0;
        seed += 4;
        fill_all(q, seed << 40, size);
        fill_all(k, (seed + 1) << 40, 1);
        fill_all(v, (seed + 2) << 40, 1);
        fill_all(g, (seed + 3) << 40, 1);
        allow(Kernels<T>::forward(geometry.width), geometry.forward);
        allow(Kernels<T>::back_q(geometry.width), geometry.back_q);
        allow(Kernels<T>::back_kv(geometry.width), geometry.back_kv);
    }

    dim3 query_blocks(unsigned rows) const { return {(p.t + rows - 1) / rows, p.h, p.b}; }
    dim3 key_blocks() const { return {(p.s + geometry.kv_rows - 1) / geometry.kv_rows, p.kv, p.b}; }

    void forward() const {
        Kernels<T>::forward(geometry.width)<<<query_blocks(geometry.rows), geometry.threads, geometry.forward>>>(
            q.data(), k.data(), v.data(), first.data(), end.data(), unsigned(first.count), y.data(), lse.data(), p.b,
            p.t, p.s, p.h, p.kv, p.d, p.scale, p.cap);
        NEED(cudaGetLastError());
    }
    void make_dots() const {
        Kernels<T>::dots()<<<1024, 256>>>(y.data(), g.data(), dots.data(), p.b * p.t * p.h, p.t, p.h, p.d);
        NEED(cudaGetLastError());
    }
    void back_q() const {
        Kernels<T>::back_q(geometry.width)<<<query_blocks(geometry.q_rows), geometry.q_threads, geometry.back_q>>>(
            q.data(), k.data(), v.data(), g.data(), lse.data(), dots.data(), first.data(), end.data(),
            unsigned(first.count), dq.data(), p.b, p.t, p.s, p.h, p.kv, p.d, p.scale, p.cap);
        NEED(cudaGetLastError());
    }
    void back_kv() const {
        Kernels<T>::back_kv(geometry.width)<<<key_blocks(), geometry.kv_threads, geometry.back_kv>>>(
            q.data(), k.data(), v.data(), g.data(), lse.data(), dots.data(), first.data(), end.data(),
            unsigned(first.count), dk.data(), dv.data(), p.b, p.t, p.s, p.h, p.kv, p.d, p.scale, p.cap);
        NEED(cudaGetLastError());
    }
    void all() const {
        forward();
        make_dots();
        back_q();
        back_kv();
        NEED(cudaDeviceSynchronize());
    }
};

// ---------------------------------------------------------------------------------------------------------------------

float wide(float x) { return x; }
float wide(__half x) { return __half2float(x); }
float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

bool right = true;

/// ‖found − wanted‖ / ‖wanted‖ and the worst number's error in units of the root mean square.
template <typename T>
bool near(const char* name, const Memory<T>& found, const Memory<double>& wanted, double limit) {
    const auto is = found.numbers();
    const auto shall = wanted.numbers();
    double error = 0, size = 0, worst = 0;
    for (size_t i = 0; i < is.size(); ++i) {
        const double missed = std::abs(wide(is[i]) - shall[i]);
        error += missed * missed;
        size += shall[i] * shall[i];
        worst = missed <= worst ? worst : missed;
    }
    const double relative = std::sqrt(error / size), apart = worst / std::sqrt(size / double(is.size()));
    // not a number is not right
    const bool good = relative <= limit && apart <= 40 * limit && found.guarded();
    std::printf("  %s %.1e/%.0e%s", name, relative, apart, good ? "" : " (WRONG)");
    return good;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

enum class Mask { All, Causal, Window, Packed };

template <typename T>
void hold(Problem p, Mask mask, double limit) {
    p.scale = float(2 / std::sqrt(p.d));
    const unsigned before = p.s - std::min(p.s, p.t), window = 70;
    std::vector<unsigned> firsts, ends;
    for (unsigned batch = 0; batch < (mask == Mask::Packed ? p.b : 1); ++batch) {
        unsigned sequence = 0;
        for (unsigned i = 0; i < p.t; ++i) {
            const unsigned last = std::min(before + i + 1, p.s);
            if (i > 0 && (i * 7 + batch * 3) % 83 == 0) sequence = last - 1;
            firsts.push_back(mask == Mask::Window ? last - std::min(last, window) : mask == Mask::Packed ? sequence : 0);
            ends.push_back(mask == Mask::All ? p.s : last);
        }
    }
    Attention<T> is(p, firsts, ends);
    const size_t pairs = size_t(p.b) * p.h * p.t * p.s;
    const Memory<double> score(pairs), slope(pairs), dp(pairs), lse(is.lse.count), dots(lse.count), y(is.q.count),
        dq(is.q.count), dk(is.k.count), dv(is.k.count);
    const Exact exact = {score.data(), slope.data(), dp.data(), lse.data(), dots.data(),
                         y.data(),     dq.data(),    dk.data(), dv.data()};
    const auto blocks = [](size_t count) { return unsigned((count + 255) / 256); };
    const Seen seen = {is.first.data(), is.end.data(), unsigned(is.first.count)};
    exact_scores<T><<<blocks(pairs), 256>>>(p, is.q.data(), is.k.data(), is.v.data(), is.g.data(), seen, exact);
    exact_rows<<<blocks(lse.count), 256>>>(p, exact);
    exact_queries<T><<<blocks(y.count), 256>>>(p, is.k.data(), is.v.data(), exact);
    exact_keys<T><<<blocks(dk.count), 256>>>(p, is.q.data(), is.g.data(), exact);
    NEED(cudaGetLastError());
    NEED(cudaDeviceSynchronize());

    is.all();
    std::printf(
        "%-4s b %u t %3u s %3u h %u kv %u d %3u mask %d cap %g:", Kernels<T>::NAME, p.b, p.t, p.s, p.h, p.kv, p.d,
        int(mask), p.cap);
    bool good = near("y", is.y, y, limit);
    good &= near("lse", is.lse, lse, 1e-4);
    good &= near("dots", is.dots, dots, 4 * limit);
    good &= near("dq", is.dq, dq, 2 * limit);
    good &= near("dk", is.dk, dk, 2 * limit);
    good &= near("dv", is.dv, dv, 2 * limit);

    // the same bits every time
    const auto ys = is.y.numbers(), dqs = is.dq.numbers(), dks = is.dk.numbers(), dvs = is.dv.numbers();
    for (unsigned again = 0; again < 3; ++again) {
        for (Memory<T>* memory : {&is.y, &is.dq, &is.dk, &is.dv}) memory->poison();
        is.all();
        const bool same = same_bits(ys, is.y.numbers()) && same_bits(dqs, is.dq.numbers()) &&
                          same_bits(dks, is.dk.numbers()) && same_bits(dvs, is.dv.numbers());
        if (!same) std::printf("  OTHER BITS");
        good &= same;
    }
    std::printf("  %s\n", good ? "PASS" : "FAIL");
    std::fflush(stdout);
    right &= good;
}

/// Median of the milliseconds of a launch.
template <typename F>
double median_ms(const F& launch) {
    constexpr unsigned TIMES = 11;
    cudaEvent_t before, after;
    NEED(cudaEventCreate(&before));
    NEED(cudaEventCreate(&after));
    for (unsigned i = 0; i < 3; ++i) launch();
    std::vector<float> times;
    for (unsigned i = 0; i < TIMES; ++i) {
        float ms = 0;
        NEED(cudaEventRecord(before));
        launch();
        NEED(cudaEventRecord(after));
        NEED(cudaEventSynchronize(after));
        NEED(cudaEventElapsedTime(&ms, before, after));
        times.push_back(ms);
    }
    NEED(cudaEventDestroy(before));
    NEED(cudaEventDestroy(after));
    std::sort(times.begin(), times.end());
    return times[TIMES / 2];
}

/// What a kernel needs, and how many of its blocks a multiprocessor holds.
template <typename K>
void describe(const char* name, K* kernel, unsigned threads, size_t shared_bytes) {
    cudaFuncAttributes needs;
    int blocks = 0;
    NEED(cudaFuncGetAttributes(&needs, reinterpret_cast<const void*>(kernel)));
    NEED(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, int(threads), shared_bytes));
    std::printf(
        "  %-8s %3d registers, %zu local bytes, %6zu shared, %u threads, %d blocks\n", name, needs.numRegs,
        needs.localSizeBytes, shared_bytes, threads, blocks);
}

template <typename T>
void time_shape(Problem p) {
    p.scale = float(1 / std::sqrt(p.d));
    std::vector<unsigned> firsts(p.t, 0), ends(p.t);
    for (unsigned i = 0; i < p.t; ++i) ends[i] = i + 1;
    const Attention<T> is(p, firsts, ends);
    is.all();
    const double forward = median_ms([&] { is.forward(); }), dots = median_ms([&] { is.make_dots(); });
    const double back_q = median_ms([&] { is.back_q(); }), back_kv = median_ms([&] { is.back_kv(); });
    // two products of t × t × d in the forward pass and five in the backward pass, half of which a causal mask hides
    const double work = 4.0 * p.b * p.h * p.t * p.t * p.d / 2 * 1e-9;
    const double back = dots + back_q + back_kv;
    std::printf("%s b %u t %u h %u kv %u d %u\n", Kernels<T>::NAME, p.b, p.t, p.h, p.kv, p.d);
    const Geometry& sizes = is.geometry;
    describe("forward", Kernels<T>::forward(sizes.width), sizes.threads, sizes.forward);
    describe("back_q", Kernels<T>::back_q(sizes.width), sizes.q_threads, sizes.back_q);
    describe("back_kv", Kernels<T>::back_kv(sizes.width), sizes.kv_threads, sizes.back_kv);
    std::printf(
        "  forward %.3f ms, %.0f TFLOP/s; back_q %.3f ms (3 products: %.0f); back_kv %.3f ms (4 products: %.0f); "
        "dots %.3f ms; backward %.3f ms, %.0f TFLOP/s by 2.5 forwards\n",
        forward, work / forward, back_q, 1.5 * work / back_q, back_kv, 2 * work / back_kv, dots, back,
        2.5 * work / back);
    std::fflush(stdout);
}

}  // namespace

int main() {
    using bf16 = __nv_bfloat16;
    cudaDeviceProp device;
    NEED(cudaGetDeviceProperties(&device, 0));
    std::printf("%s, %d multiprocessors\nrelative error / worst number's error over the root mean square\n",
                device.name, device.multiProcessorCount);
    hold<bf16>({2, 300, 300, 8, 2, 64, 0, 0}, Mask::Causal, 6e-3);
    hold<bf16>({2, 300, 300, 4, 4, 96, 0, 0}, Mask::Causal, 6e-3);
    hold<bf16>({2, 300, 300, 4, 2, 80, 0, 0}, Mask::Packed, 6e-3);
    hold<bf16>({2, 257, 257, 4, 1, 128, 0, 0}, Mask::Causal, 6e-3);
    hold<bf16>({1, 300, 300, 4, 2, 128, 0, 5}, Mask::Window, 6e-3);
    hold<bf16>({1, 200, 333, 4, 2, 256, 0, 0}, Mask::Causal, 6e-3);
    hold<bf16>({1, 130, 130, 4, 2, 256, 0, 4}, Mask::Packed, 6e-3);
    hold<bf16>({2, 300, 300, 9, 3, 64, 0, 0}, Mask::Packed, 6e-3);
    hold<bf16>({3, 1, 333, 8, 2, 64, 0, 0}, Mask::All, 6e-3);
    hold<bf16>({2, 140, 300, 4, 2, 33, 0, 0}, Mask::Causal, 6e-3);
    hold<bf16>({2, 140, 140, 4, 2, 32, 0, 3}, Mask::Window, 6e-3);
    hold<bf16>({1, 1000, 1000, 2, 1, 64, 0, 0}, Mask::Window, 6e-3);
    hold<bf16>({1, 2100, 2100, 2, 1, 64, 0, 0}, Mask::Causal, 6e-3);
    hold<__half>({2, 300, 300, 4, 2, 80, 0, 0}, Mask::Packed, 1e-3);
    hold<__half>({1, 257, 257, 4, 2, 64, 0, 5}, Mask::Causal, 1e-3);
    hold<float>({1, 129, 140, 4, 2, 80, 0, 5}, Mask::Packed, 1e-5);
    hold<float>({1, 129, 129, 4, 2, 256, 0, 0}, Mask::Causal, 1e-5);

    time_shape<bf16>({8, 2048, 2048, 32, 32, 96, 0, 0});
    time_shape<bf16>({8, 2048, 2048, 32, 8, 64, 0, 0});
    time_shape<bf16>({16, 2048, 2048, 9, 3, 64, 0, 0});
    time_shape<bf16>({8, 2048, 2048, 32, 8, 128, 0, 0});
    std::printf("%s\n", right ? "ALL PASS" : "SOME FAIL");
    return right ? 0 : 1;
}
