// Inputs and outputs of a kernel under test, and the judge.
//
// Before a call every output is NaN. In front of and behind every input and output lies a guard zone, NaN too: what is
// read there spoils the result, what is written there is found.
//
// A result may miss the f64 reference by what its arithmetic costs and no more. With u the unit roundoff of the dtype
// (2⁻²⁴, 2⁻¹¹, 2⁻⁸) and v = 2⁻²⁴ that of the sums,
//
//     tolerance = u·|result| + tiny + v·(8 + √n)·Σ|terms| + what the kernel rounds on its way
//
// n is the length of the sum, whose roundings wander like √n; 8 stands for the operations around it; tiny is half the
// smallest f16, which is absolute. The last part is derived beside each test.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "../../src/model/kernels/common.cuh"

namespace check {

inline std::mt19937_64 generator;

inline double normal() { return std::normal_distribution<double>()(generator); }

/// From `low` to `high`, both included.
inline unsigned uniform(unsigned low, unsigned high) {
    return std::uniform_int_distribution<unsigned>(low, high)(generator);
}

template <typename T>
struct Dtype;
template <>
struct Dtype<float> {
    static constexpr const char* NAME = "f32";
    static constexpr double UNIT = 0x1p-24, TINY = 0;
};
template <>
struct Dtype<__half> {
    static constexpr const char* NAME = "f16";
    static constexpr double UNIT = 0x1p-11, TINY = 0x1p-25;
};
template <>
struct Dtype<__nv_bfloat16> {
    static constexpr const char* NAME = "bf16";
    static constexpr double UNIT = 0x1p-8, TINY = 0;
};

constexpr double V = 0x1p-24;

/// Σ|terms| → what its f32 sum may miss.
inline double summed(double terms, double n) { return V * (8 + std::sqrt(n)) * terms; }

/// Numbers between guard zones; `shift` numbers behind a multiple of 128 bytes.
template <typename T>
class Memory {
public:
    explicit Memory(size_t count, size_t shift = 0)
        : count(count), bytes((count + shift) * sizeof(T) + 2 * ZONE + 128) {
        memory.reset(new unsigned char[bytes]);
        std::memset(memory.get(), on_cpu::POISON, bytes);
        const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.get()) + ZONE + 127) / 128 * 128;
        numbers = reinterpret_cast<T*>(start) + shift;
    }

    T* data() const { return numbers; }
    T& operator[](size_t i) const { return numbers[i]; }

    bool guarded() const {
        const auto* const first = reinterpret_cast<const unsigned char*>(numbers);
        const auto* const end = reinterpret_cast<const unsigned char*>(numbers + count);
        for (const unsigned char* at = memory.get(); at < memory.get() + bytes; ++at) {
            if ((at < first || at >= end) && *at != on_cpu::POISON) return false;
        }
        return true;
    }

    const size_t count;

private:
    static constexpr size_t ZONE = 64 << 10;
    size_t bytes;
    std::unique_ptr<unsigned char[]> memory;
    T* numbers;
};

/// Normal numbers times `size`, rounded to the dtype, with themselves in f64.
template <typename T>
struct Input : Memory<T> {
    std::vector<double> exact;

    explicit Input(size_t count, double size = 1, size_t shift = 0) : Memory<T>(count, shift), exact(count) {
        for (size_t i = 0; i < count; ++i) {
            (*this)[i] = rounded<T>(float(size * normal()));
            exact[i] = widened((*this)[i]);
        }
    }
    /// Given numbers, rounded to the dtype.
    explicit Input(const std::vector<double>& numbers) : Memory<T>(numbers.size()), exact(numbers) {
        for (size_t i = 0; i < numbers.size(); ++i) (*this)[i] = rounded<T>(float(numbers[i]));
    }
};

/// What was found over what may be, per kernel.
struct Verdict {
    size_t numbers = 0, wrong = 0;
    double worst = 0;
    std::string first;
};
inline std::map<std::string, Verdict> verdicts;

/// `about` says which case of a kernel it was.
inline void judge(
    const std::string& kernel, const std::string& about, size_t i, double found, double wanted, double tolerance) {
    Verdict& verdict = verdicts[kernel];
    ++verdict.numbers;
    const double ratio = std::abs(found - wanted) / tolerance;
    // not a number is not right
    if (ratio <= 1 || found == wanted) {
        verdict.worst = std::max(verdict.worst, found == wanted ? 0 : ratio);
        return;
    }
    if (verdict.wrong++ == 0) {
        char line[256];
        std::snprintf(
            line, sizeof line, "%s: number %zu is %.9g, not %.9g ± %.2g", about.c_str(), i, found, wanted, tolerance);
        verdict.first = line;
    }
}

/// All of an output, whose guard zones must be whole. `tolerance` is without u·|result| + tiny, the output's own
/// rounding.
template <typename T>
void judge_all(
    const std::string& kernel, const std::string& about, const Memory<T>& found, const std::vector<double>& wanted,
    const std::vector<double>& tolerance) {
    for (size_t i = 0; i < found.count; ++i) {
        const double own = Dtype<T>::UNIT * std::abs(wanted[i]) + Dtype<T>::TINY;
        judge(kernel, about, i, widened(found[i]), wanted[i], own + tolerance[i]);
    }
    if (!found.guarded()) {
        Verdict& verdict = verdicts[kernel];
        if (verdict.wrong++ == 0) verdict.first = about + ": written outside of the output";
    }
}

/// Prints a line for each kernel; the exit code.
inline int report() {
    bool right = true;
    for (const auto& [kernel, verdict] : verdicts) {
        std::printf(
            "%-28s %9zu numbers, worst error %.2f of the tolerance%s\n", kernel.c_str(), verdict.numbers, verdict.worst,
            verdict.wrong == 0 ? "" : ", WRONG");
        if (verdict.wrong > 0) {
            std::printf("    %zu wrong; %s\n", verdict.wrong, verdict.first.c_str());
            right = false;
        }
    }
    return right ? 0 : 1;
}

inline int main_with(int count, char** arguments, const std::function<void()>& tests) {
    const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device()();
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
    std::fflush(stdout);
    generator.seed(seed);
    on_cpu::order_seed = seed;
    tests();
    return report();
}

}  // namespace check
