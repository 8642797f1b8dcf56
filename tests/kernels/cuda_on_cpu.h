// CUDA as far as src/model/kernels speaks it, on a CPU: the same files compile with a C++ compiler and run.
//
// A block runs on one thread of the system; each of its CUDA threads is a fiber there, resumed in an order drawn anew
// after each barrier, so that a missing one shows as a wrong number. Shared memory is `thread_local`, hence the block's
// own. Blocks run side by side on as many threads as there are cores. Factors and sums of the matrix unit are spread over
// the lanes of a warp as the PTX ISA says. A copy in the background is made at once or when its thread waits for it, as
// chance has it, and so is a product of a warpgroup, so that a missing wait shows as a wrong number as well.
//
// Here, unlike on a GPU, these end the program: a barrier that not every thread reaches, an address that a load of a
// matrix or a copy does not take, a copy or a product that nobody waits for, dynamic shared memory that is written behind
// its end.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* const name = on_cpu::block().room.data()

using std::max;
using std::min;

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// Each operation rounded by itself: the compiler is told not to fuse (-ffp-contract=off).
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) return std::copysign(float(fraction) * 0x1p-24f, std::bit_cast<float>(sign));
    return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return {0x7fff};
    // below 2⁻¹⁴ the unit is 2⁻²⁴: added to ½, a number of this size is rounded to it
    if (size < 0x38800000) {
        const float shifted = std::bit_cast<float>(size) + 0.5f;
        return {uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000))};
    }
    const uint32_t rebased = size - (112u << 23);
    const uint32_t rounded = (rebased + 0xfff + (rebased >> 13 & 1)) >> 13;
    return {uint16_t(sign | std::min(rounded, 0x7c00u))};
}

namespace on_cpu {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 128 << 10;
constexpr size_t GUARD = 4096;
constexpr unsigned char POISON = 0xff;  // NaN in every dtype

[[noreturn]] inline void die(const char* why) {
    std::fprintf(stderr, "block (%u, %u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, why);
    std::_Exit(1);
}

/// Memory of a block, from a multiple of 1024 bytes on.
struct Room {
    std::unique_ptr<unsigned char[]> memory;
    size_t size = 0, capacity = 0;

    unsigned char* data() const {
        return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.get()) + 1023) / 1024 * 1024);
    }
    void renew(size_t bytes) {
        if (!memory || bytes > capacity) memory.reset(new unsigned char[(capacity = bytes) + GUARD + 1024]);
        std::memset(data(), POISON, (size = bytes) + GUARD);
    }
    bool intact() const {
        return std::all_of(data() + size, data() + size + GUARD, [](unsigned char x) { return x == POISON; });
    }
};

struct Fiber {
    jmp_buf context;
    ucontext_t start;
    std::unique_ptr<unsigned char[]> stack;
    bool started = false;
};

/// Threads that wait for each other.
struct Meeting {
    unsigned members = 0;
    std::vector<unsigned> waiting;
};

/// What the lanes of a warp show each other. Two of each: one is written while slow lanes read the other.
struct Warp {
    Meeting meeting;
    uint32_t words[2][WARP];
    float a[2][16][16], b[2][16][8];
    uint16_t rows[2][WARP][8];
};

/// A copy that is still to be made; zeros where there is no source.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;

    void make() const {
        if (from == nullptr) {
            std::memset(to, 0, bytes);
        } else {
            std::memcpy(to, from, bytes);
        }
    }
};

/// One block at a time, all its threads as fibers.
struct Block {
    Room room;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    std::vector<Meeting> groups;  // of four warps
    std::vector<unsigned> turns;  // of each thread: how often its warp has met
    std::vector<std::vector<Copy>> copies;  // of each thread
    std::vector<std::vector<std::function<void()>>> products;
    std::vector<unsigned> ready;
    Meeting meeting;
    unsigned current = 0, done = 0;
    jmp_buf home;
    std::function<void()> body;
    std::minstd_rand order;
    bool ahead = false;

    void run(unsigned threads) {
        while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
        warps.resize((threads + WARP - 1) / WARP);
        for (unsigned i = 0; i < warps.size(); ++i) warps[i].meeting.members = std::min(WARP, threads - i * WARP);
        groups.resize((threads + 4 * WARP - 1) / (4 * WARP));
        for (Meeting& group : groups) group.members = 4 * WARP;
        turns.assign(threads, 0);
        copies.resize(threads);
        products.resize(threads);
        meeting.members = threads;
        done = 0;
        for (unsigned i = 0; i < threads; ++i) meeting.waiting.push_back(i);
        release(meeting);
        while (!ready.empty()) {
            if (!ahead) std::swap(ready[order() % ready.size()], ready.back());
            current = ready.back();
            ready.pop_back();
            threadIdx.x = current;
            resume(*fibers[current]);
        }
        if (done != threads) die("threads wait at a barrier that others never reach");
        for (const auto& of_thread : copies) {
            if (!of_thread.empty()) die("nobody waits for a copy");
        }
        for (const auto& of_thread : products) {
            if (!of_thread.empty()) die("nobody waits for a product");
        }
        if (!room.intact()) die("dynamic shared memory is written behind its end");
    }

    void meet(Meeting& meeting) {
        meeting.waiting.push_back(current);
        if (meeting.waiting.size() == meeting.members) release(meeting);
        suspend(*fibers[current]);
    }

    /// Waits for the warp; returns which of two buffers to use before the next meeting.
    Warp& warp() { return warps[current / WARP]; }
    Meeting& group() { return groups[current / (4 * WARP)]; }
    unsigned turn() { return turns[current]++ % 2; }

private:
    /// After a barrier of the block either all threads go on together or each warp runs ahead as far as it can.
    void release(Meeting& meeting) {
        auto& threads = meeting.waiting;
        std::shuffle(threads.begin(), threads.end(), order);
        if (&meeting == &this->meeting) {
            ahead = order() % 2 == 0;
            const unsigned first = unsigned(order());
            const auto place = [&](unsigned thread) { return (thread / WARP + first) % warps.size(); };
            const auto before = [&](unsigned a, unsigned b) { return place(a) < place(b); };
            if (ahead) std::stable_sort(threads.begin(), threads.end(), before);
        }
        ready.insert(ready.end(), threads.begin(), threads.end());
        threads.clear();
    }
    void resume(Fiber& fiber) {
        if (_setjmp(home) != 0) return;
        if (fiber.started) _longjmp(fiber.context, 1);
        fiber.started = true;
        fiber.stack.reset(new unsigned char[STACK]);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK;
        makecontext(&fiber.start, live, 0);
        setcontext(&fiber.start);
    }
    void suspend(Fiber& fiber) {
        if (_setjmp(fiber.context) == 0) _longjmp(home, 1);
    }
    /// A fiber outlives the block: it takes the same place in the next one.
    static void live();
};

inline Block& block() {
    static thread_local Block block;
    return block;
}

inline void Block::live() {
    for (;;) {
        Block& mine = block();
        mine.body();
        ++mine.done;
        mine.suspend(*mine.fibers[mine.current]);
    }
}

inline uint64_t order_seed = 0;

/// Runs `kernel` for every block of `grid`.
inline void launch(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
    const size_t blocks = size_t(grid.x) * grid.y * grid.z;
    static unsigned launches = 0;
    const unsigned number = ++launches;
    std::atomic<size_t> next{0};
    const auto work = [&] {
        gridDim = grid;
        blockDim = {threads, 1, 1};
        Block& mine = block();
        mine.body = kernel;
        for (size_t i; (i = next++) < blocks;) {
            blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
            mine.order.seed(unsigned(order_seed + 7919 * number + i));
            mine.room.renew(shared_bytes);
            mine.run(threads);
        }
    };
    const size_t cores = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> others;
    for (size_t i = 1; i < std::min(cores, blocks); ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::block().meet(on_cpu::block().meeting); }

inline void __syncwarp() {
    on_cpu::Block& block = on_cpu::block();
    block.turn();
    block.meet(block.warp().meeting);
}

/// Shows a word to the warp; returns all lanes' words.
inline const uint32_t* on_cpu_exchange(uint32_t word) {
    on_cpu::Block& block = on_cpu::block();
    on_cpu::Warp& warp = block.warp();
    uint32_t* const words = warp.words[block.turn()];
    words[threadIdx.x % on_cpu::WARP] = word;
    block.meet(warp.meeting);
    return words;
}

template <typename T>
T __shfl_xor_sync(unsigned, T x, unsigned mask) {
    static_assert(sizeof(T) == 4);
    return std::bit_cast<T>(on_cpu_exchange(std::bit_cast<uint32_t>(x))[(threadIdx.x % on_cpu::WARP) ^ mask]);
}

template <typename T>
T __shfl_sync(unsigned, T x, unsigned lane) {
    static_assert(sizeof(T) == 4);
    return std::bit_cast<T>(on_cpu_exchange(std::bit_cast<uint32_t>(x))[lane % on_cpu::WARP]);
}

inline unsigned __ballot_sync(unsigned, bool x) {
    const uint32_t* const words = on_cpu_exchange(x);
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < on_cpu::WARP; ++lane) ballot |= words[lane] << lane;
    return ballot;
}

inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }

inline unsigned __reduce_min_sync(unsigned, unsigned x) {
    const uint32_t* const words = on_cpu_exchange(x);
    return *std::min_element(words, words + on_cpu::WARP);
}

inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    const uint32_t* const words = on_cpu_exchange(x);
    return *std::max_element(words, words + on_cpu::WARP);
}

inline int __ffs(int x) { return std::countr_zero(unsigned(x)) % 32 + (x != 0); }

inline float __fdividef(float a, float b) { return a / b; }

// ---------------------------------------------------------------------------------------------------------------------
// What mma.cuh says in PTX.

inline float power_of_two(float x) { return std::exp2(x); }

inline float on_cpu_wide(__half x) { return __half2float(x); }
inline float on_cpu_wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
unsigned rounded_pair(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(low).bits | __float2half_rn(high).bits << 16;
    else return __float2bfloat16_rn(low).bits | __float2bfloat16_rn(high).bits << 16;
}

template <typename T>
void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    on_cpu::Block& block = on_cpu::block();
    on_cpu::Warp& warp = block.warp();
    const unsigned turn = block.turn(), row = threadIdx.x % on_cpu::WARP / 4, column = threadIdx.x % 4 * 2;
    for (unsigned i = 0; i < 8; ++i) {
        const T x = {uint16_t(a[i / 2] >> 16 * (i % 2))};
        warp.a[turn][row + i / 2 % 2 * 8][column + i % 2 + i / 4 * 8] = on_cpu_wide(x);
    }
    for (unsigned i = 0; i < 4; ++i) {
        const T x = {uint16_t((i < 2 ? b0 : b1) >> 16 * (i % 2))};
        warp.b[turn][column + i % 2 + i / 2 * 8][row] = on_cpu_wide(x);
    }
    block.meet(warp.meeting);
    for (unsigned i = 0; i < 4; ++i) {
        for (unsigned k = 0; k < 16; ++k) {
            sums[i] += warp.a[turn][row + i / 2 * 8][k] * warp.b[turn][k][column + i % 2];
        }
    }
}

/// Shows the lane's row of eight to the warp; returns all lanes' rows.
inline const uint16_t (*on_cpu_rows(const void* row))[8] {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) on_cpu::die("a row of a matrix starts at a multiple of 16 bytes");
    on_cpu::Block& block = on_cpu::block();
    on_cpu::Warp& warp = block.warp();
    const unsigned turn = block.turn();
    std::memcpy(warp.rows[turn][threadIdx.x % on_cpu::WARP], row, 16);
    block.meet(warp.meeting);
    return warp.rows[turn];
}

inline void load_four(unsigned (&x)[4], const void* row) {
    const auto rows = on_cpu_rows(row);
    const unsigned lane = threadIdx.x % on_cpu::WARP;
    for (unsigned i = 0; i < 4; ++i) {
        const uint16_t* const pair = rows[8 * i + lane / 4] + lane % 4 * 2;
        x[i] = pair[0] | unsigned(pair[1]) << 16;
    }
}

inline void load_four_turned(unsigned (&x)[4], const void* row) {
    const auto rows = on_cpu_rows(row);
    const unsigned lane = threadIdx.x % on_cpu::WARP;
    for (unsigned i = 0; i < 4; ++i) {
        const auto pair = rows + 8 * i + lane % 4 * 2;
        x[i] = pair[0][lane / 4] | unsigned(pair[1][lane / 4]) << 16;
    }
}

template <unsigned BYTES>
void copy_later(void* to, const void* from, bool exists) {
    const auto start = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % BYTES; };
    if (start(to) != 0 || start(from) != 0) on_cpu::die("a copy goes from and to a multiple of its size");
    on_cpu::Block& block = on_cpu::block();
    const on_cpu::Copy copy = {to, exists ? from : nullptr, BYTES};
    if (block.order() % 2 == 0) {
        copy.make();
    } else {
        block.copies[threadIdx.x].push_back(copy);
    }
}

inline void copies_arrive() {
    auto& copies = on_cpu::block().copies[threadIdx.x];
    for (const on_cpu::Copy& copy : copies) copy.make();
    copies.clear();
}

// ---------------------------------------------------------------------------------------------------------------------
// What wgmma.cuh says in PTX. All four warps must call a product.

struct Descriptor {
    const char* at;
    unsigned leading, stride;

    Descriptor further(unsigned bytes) const { return {at + bytes, leading, stride}; }
};

inline Descriptor describe(const void* at, unsigned leading, unsigned stride) {
    return {static_cast<const char*>(at), leading, stride};
}

/// A number of a factor so many bytes behind where that starts: with a swizzle of 64 bytes, bits 4 and 5 of its address
/// change with bits 7 and 8.
template <typename T>
float on_cpu_swizzled(const Descriptor& factor, size_t bytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(factor.at) + bytes;
    return on_cpu_wide(*reinterpret_cast<const T*>(address ^ (address >> 7 & 3) << 4));
}

/// At once, or when the thread waits.
inline void on_cpu_later(std::function<void()> product) {
    on_cpu::Block& block = on_cpu::block();
    block.meet(block.group());
    if (block.order() % 2 == 0) {
        product();
    } else {
        block.products[threadIdx.x].push_back(std::move(product));
    }
}

template <unsigned N, typename T>
struct Wgmma {
    static void by_rows(float (&sums)[N][4], const Descriptor& a, const Descriptor& b) {
        on_cpu_later([&sums, a, b] {
            const auto number = [](const Descriptor& factor, unsigned row, unsigned k) {
                return on_cpu_swizzled<T>(factor, row / 8 * factor.stride + row % 8 * 64 + k * 2);
            };
            const unsigned lane = threadIdx.x % on_cpu::WARP, first = threadIdx.x / on_cpu::WARP % 4 * 16;
            for (unsigned n = 0; n < N; ++n) {
                for (unsigned i = 0; i < 4; ++i) {
                    const unsigned row = first + lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
                    for (unsigned k = 0; k < 16; ++k) sums[n][i] += number(a, row, k) * number(b, column, k);
                }
            }
        });
    }

    static void by_columns(float (&sums)[N][4], const unsigned (&a)[4], const Descriptor& b) {
        on_cpu::Block& block = on_cpu::block();
        on_cpu::Warp& warp = block.warp();
        const unsigned turn = block.turn(), lane = threadIdx.x % on_cpu::WARP, pair = lane % 4 * 2;
        for (unsigned i = 0; i < 8; ++i) {
            const T x = {uint16_t(a[i / 2] >> 16 * (i % 2))};
            warp.a[turn][lane / 4 + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = on_cpu_wide(x);
        }
        block.meet(warp.meeting);
        std::array<std::array<float, 16>, 2> rows;
        for (unsigned half = 0; half < 2; ++half) {
            std::copy_n(warp.a[turn][lane / 4 + half * 8], 16, rows[half].begin());
        }
        on_cpu_later([&sums, rows, b, pair] {
            for (unsigned n = 0; n < N; ++n) {
                for (unsigned i = 0; i < 4; ++i) {
                    const unsigned column = 8 * n + pair + i % 2;
                    for (unsigned k = 0; k < 16; ++k) {
                        const size_t bytes =
                            column / 32 * b.leading + column % 32 * 2 + k / 8 * b.stride + k % 8 * 64;
                        sums[n][i] += rows[i / 2][k] * on_cpu_swizzled<T>(b, bytes);
                    }
                }
            }
        });
    }
};

inline void show_to_matrix_unit() {}
inline void wgmma_begins() {}
inline void wgmma_ends() {
    auto& products = on_cpu::block().products[threadIdx.x];
    for (const auto& product : products) product();
    products.clear();
}
inline void keep_here(float&) {}
