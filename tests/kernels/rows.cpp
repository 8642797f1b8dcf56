// Every kernel but attention, against f64.
#include "check.h"

// each file has its own THREADS
#define THREADS NORM_THREADS
#include "../../src/model/kernels/norm.cu"
#undef THREADS
#define THREADS ROPE_THREADS
#include "../../src/model/kernels/rope.cu"
#undef THREADS
#define THREADS GATED_THREADS
#include "../../src/model/kernels/gated.cu"
#undef THREADS
#define THREADS COLUMNS_THREADS
#include "../../src/model/kernels/columns.cu"
#undef THREADS
#define THREADS LOSS_THREADS
#include "../../src/model/kernels/loss.cu"
#undef THREADS
#define THREADS SIGMA_THREADS
#include "../../src/model/kernels/sigma.cu"
#undef THREADS

using namespace check;

namespace {

template <typename T>
std::string named(const char* kernel) {
    return std::string(kernel) + "_" + Dtype<T>::NAME;
}

#define KERNEL(T, NAME)                                                                       \
    [] {                                                                                      \
        if constexpr (std::is_same_v<T, float>) return NAME##_f32;                            \
        else if constexpr (std::is_same_v<T, __half>) return NAME##_f16;                      \
        else return NAME##_bf16;                                                              \
    }()

/// Every f16 and bf16 comes back from f32 as it was; a number between two goes to the nearer, and midway to the even
/// one.
template <typename T>
void conversions() {
    const auto kernel = named<T>("conversion");
    for (unsigned bits = 0; bits < 0x7fff; ++bits) {
        const T low{uint16_t(bits)}, high{uint16_t(bits + 1)};
        const float a = widened(low), b = widened(high);
        if (!std::isfinite(a)) break;
        const float middle = std::isfinite(b) ? a + (b - a) / 2 : a + (a - widened(T{uint16_t(bits - 1)})) / 2;
        const auto is = [&](float x, unsigned wanted) {
            judge(kernel, "bits", bits, rounded<T>(x).bits, wanted, 0.5);
            judge(kernel, "bits below 0", bits, rounded<T>(-x).bits, wanted | 0x8000, 0.5);
        };
        is(a, bits);
        is(std::nextafterf(middle, 0), bits);
        is(middle, bits + bits % 2);
        is(std::nextafterf(middle, INFINITY), bits + 1);
    }
    judge(kernel, "infinity", 0, widened(rounded<T>(INFINITY)) == INFINITY, 1, 0.5);
    judge(kernel, "NaN", 0, std::isnan(widened(rounded<T>(NAN))), 1, 0.5);
}

template <typename T>
void norms() {
    struct Case {
        unsigned rows, n, blocks, shift;
    };
    for (const auto& [rows, n, blocks, shift] : {Case{1, 5, 1, 0}, {37, 129, 4, 0}, {9, 2048, 5, 0}, {6, 2048, 9, 1}}) {
        const double eps = 1e-2;
        const Input<T> x(size_t(rows) * n, 0.3, shift), w(n), g(size_t(rows) * n);
        const Input<T> added(x.count, 1, shift);
        const Memory<T> y(x.count, shift), dx(x.count, shift), dx_alone(x.count), sum(x.count, shift), both(x.count);
        const Memory<float> partial(size_t(blocks) * n), dw(n);
        on_cpu::launch({blocks}, 96, 0, [&, rows = rows, n = n] {
            KERNEL(T, rms_norm)(x.data(), nullptr, w.data(), nullptr, y.data(), rows, n, float(eps));
        });
        // the sum, and the norm of what it was rounded to
        const Memory<T> y_of_sum(x.count), y_again(x.count);
        on_cpu::launch({blocks}, 256, 0, [&, rows = rows, n = n] {
            KERNEL(T, rms_norm)(x.data(), added.data(), w.data(), sum.data(), y_of_sum.data(), rows, n, float(eps));
        });
        on_cpu::launch({blocks}, 256, 0, [&, rows = rows, n = n] {
            KERNEL(T, rms_norm)(sum.data(), nullptr, w.data(), nullptr, y_again.data(), rows, n, float(eps));
        });
        on_cpu::launch({blocks}, 256, 4 * n, [&, rows = rows, n = n] {
            KERNEL(T, rms_norm_back)(
                x.data(), w.data(), g.data(), added.data(), dx.data(), partial.data(), rows, n, float(eps));
        });
        on_cpu::launch({blocks}, 64, 0, [&, rows = rows, n = n] {
            KERNEL(T, rms_norm_back)(
                x.data(), w.data(), g.data(), nullptr, dx_alone.data(), nullptr, rows, n, float(eps));
        });
        on_cpu::launch({blocks}, 256, 0, [&] { KERNEL(T, add)(x.data(), added.data(), both.data(), x.count); });
        on_cpu::launch({(n + 255) / 256}, 256, 0, [&, n = n, blocks = blocks] {
            sum_rows(partial.data(), dw.data(), blocks, n);
        });

        std::vector<double> ys(x.count), dxs(x.count), dws(n), y_within(x.count), dx_within(x.count), dw_within(n);
        for (size_t r = 0; r < rows; ++r) {
            const double *xs = &x.exact[r * n], *gs = &g.exact[r * n], *ws = w.exact.data();
            double square = 0, along = 0, size = 0;
            for (unsigned i = 0; i < n; ++i) {
                square += xs[i] * xs[i];
                along += gs[i] * ws[i] * xs[i];
                size += std::abs(gs[i] * ws[i] * xs[i]);
            }
            const double inverse = 1 / std::sqrt(square / n + eps);
            for (unsigned i = 0; i < n; ++i) {
                const double normed = xs[i] * inverse;
                ys[r * n + i] = normed * ws[i];
                // the sum of squares carries its error into all of the row
                y_within[r * n + i] = summed(std::abs(normed * ws[i]), n);
                dxs[r * n + i] = (gs[i] * ws[i] - normed * along * inverse / n) * inverse;
                dx_within[r * n + i] =
                    summed((std::abs(gs[i] * ws[i]) + std::abs(normed) * size * inverse / n) * inverse, n);
                dws[i] += gs[i] * normed;
                dw_within[i] += summed(std::abs(gs[i] * normed), n + rows);
            }
        }
        const std::string about = std::to_string(rows) + " rows of " + std::to_string(n);
        judge_all(named<T>("rms_norm"), about, y, ys, y_within);
        judge_all(named<T>("rms_norm_back"), about + ", dx alone", dx_alone, dxs, dx_within);
        std::vector<double> sums(x.count), again(x.count), exactly(x.count, 1e-300), s_within(x.count);
        for (size_t i = 0; i < x.count; ++i) {
            sums[i] = x.exact[i] + added.exact[i];
            s_within[i] = summed(std::abs(x.exact[i]) + std::abs(added.exact[i]), 1);
            dxs[i] += added.exact[i];
            dx_within[i] += V * std::abs(added.exact[i]);
            again[i] = widened(y_again[i]);
        }
        judge_all(named<T>("rms_norm_back"), about + ", dx", dx, dxs, dx_within);
        judge_all(named<T>("rms_norm"), about + ", sum", sum, sums, s_within);
        judge_all(named<T>("rms_norm"), about + ", of the sum", y_of_sum, again, exactly);
        judge_all(named<T>("add"), about, both, sums, s_within);
        judge_all(named<T>("rms_norm_back"), about + ", dw", dw, dws, dw_within);
    }
}

void sums_of_rows() {
    for (const auto& [rows, n] : {std::pair(1u, 1u), {133u, 300u}, {7u, 1025u}}) {
        const Input<float> partial(size_t(rows) * n);
        const Memory<float> out(n);
        on_cpu::launch({2}, 256, 0, [&, rows = rows, n = n] { sum_rows(partial.data(), out.data(), rows, n); });
        std::vector<double> wanted(n), within(n);
        for (size_t i = 0; i < partial.count; ++i) {
            wanted[i % n] += partial.exact[i];
            within[i % n] += summed(std::abs(partial.exact[i]), rows);
        }
        judge_all("sum_rows", std::to_string(rows) + " rows", out, wanted, within);
    }
}

template <typename T>
void rotations() {
    struct Case {
        unsigned tokens, h, d, half, shift, rows;
        /// Numbers of other tensors between two tokens.
        unsigned x_gap, y_gap;
    };
    for (const auto& [tokens, h, d, half, shift, rows, x_gap, y_gap] :
         {Case{1, 1, 2, 1, 0, 1, 0, 0}, {74, 3, 64, 32, 0, 37, 128, 0}, {18, 5, 96, 24, 0, 18, 0, 8},
          {15, 2, 40, 5, 0, 15, 3, 1}, {14, 40, 128, 64, 0, 7, 16, 24}, {7, 2, 64, 32, 1, 7, 0, 0}}) {
        const unsigned x_pitch = h * d + x_gap, y_pitch = h * d + y_gap;
        const Input<T> x(size_t(tokens) * x_pitch, 1, shift);
        // a turn may also stretch: cos and sin need not belong together
        const Input<float> cos(size_t(rows) * half), sin(size_t(rows) * half);
        for (const float sign : {1.f, -1.f}) {
            Input<T> y(size_t(tokens) * y_pitch, 1, shift);
            on_cpu::launch({5}, sign > 0 ? 256 : 32, 0, [&, t = tokens, h = h, d = d, half = half, r = rows] {
                KERNEL(T, rotate)
                (x.data(), cos.data(), sin.data(), y.data(), t, h, d, half, r, x_pitch, y_pitch, sign);
            });
            // what lies in between stays
            std::vector<double> wanted(y.exact), within(y.count);
            for (size_t row = 0; row < size_t(tokens) * h; ++row) {
                const size_t from = row / h * x_pitch + row % h * d, to = row / h * y_pitch + row % h * d;
                for (unsigned i = 0; i < d; ++i) wanted[to + i] = x.exact[from + i];
                for (unsigned i = 0; i < half; ++i) {
                    const double left = x.exact[from + i], right = x.exact[from + i + half];
                    const size_t angle = row / h % rows * half + i;
                    const double c = cos.exact[angle], s = sign * sin.exact[angle];
                    wanted[to + i] = left * c - right * s;
                    wanted[to + i + half] = left * s + right * c;
                    within[to + i] = summed(std::abs(left * c) + std::abs(right * s), 2);
                    within[to + i + half] = summed(std::abs(left * s) + std::abs(right * c), 2);
                }
            }
            const std::string about = "d " + std::to_string(d) + ", half " + std::to_string(half);
            judge_all(named<T>("rotate"), about, y, wanted, within);
        }
    }
}

/// act(a) and act′(a), and what is in the exponential.
struct Value {
    double value, slope, z;
};

Value silu(double a) {
    const double s = 1 / (1 + std::exp(-a));
    return {a * s, s + a * s * (1 - s), a};
}

Value gelu_tanh(double a) {
    // (1 + tanh z)/2 without its cancellation
    const double root = std::sqrt(2 / M_PI), z = root * (a + 0.044715 * a * a * a), s = 1 / (1 + std::exp(-2 * z));
    const double slope = s + a / 2 * (1 - std::pow(std::tanh(z), 2)) * root * (1 + 3 * 0.044715 * a * a);
    return {a * s, slope, 2 * z};
}

Value gelu(double a) {
    const double s = std::erfc(-a / M_SQRT2) / 2, density = std::exp(-a * a / 2) / std::sqrt(2 * M_PI);
    return {a * s, s + a * density, a * a};
}

template <typename T, typename Forward, typename Backward>
void gates(const char* name, Value (*activation)(double), Forward forward, Backward backward) {
    struct Case {
        unsigned rows, n, shift;
        bool stacked;
    };
    for (const auto& [rows, n, shift, stacked] :
         {Case{1, 1, 0, false}, {5, 4099, 0, true}, {3, 1000, 1, false}, {7, 2064, 0, true}, {4, 24, 0, false}}) {
        // a and b are halves of one tensor, or two
        const unsigned pitch = stacked ? 2 * n : n;
        const size_t count = size_t(rows) * n, apart = stacked ? n : count;
        const Input<T> ab(2 * count, 2, shift), g(count, 1, shift);
        const Memory<T> y(count, shift), dab(2 * count, shift);
        on_cpu::launch({2}, 256, 0, [&, rows = rows, n = n] {
            forward(ab.data(), ab.data() + apart, y.data(), rows, n, pitch);
        });
        on_cpu::launch({3}, 256, 0, [&, rows = rows, n = n] {
            backward(ab.data(), ab.data() + apart, g.data(), dab.data(), dab.data() + apart, rows, n, pitch);
        });
        std::vector<double> ys(count), dabs(2 * count), y_within(count), dab_within(2 * count);
        for (size_t i = 0; i < count; ++i) {
            const size_t at_a = i / n * pitch + i % n, at_b = at_a + apart;
            const double b = ab.exact[at_b];
            const auto [value, slope, z] = activation(ab.exact[at_a]);
            // z in f32 errs by v·|z|, which is a relative error of e^−z; the two terms of a slope may cancel
            const double error = V * (8 + 4 * std::abs(z)), gb = std::abs(g.exact[i] * b);
            ys[i] = value * b;
            y_within[i] = error * std::abs(ys[i]);
            dabs[at_b] = g.exact[i] * value;
            dab_within[at_b] = error * std::abs(dabs[at_b]);
            dabs[at_a] = g.exact[i] * b * slope;
            dab_within[at_a] = error * gb * (std::abs(slope) + 1 + std::abs(z));
        }
        const std::string about = std::to_string(count) + " numbers";
        judge_all(named<T>(("gated_" + std::string(name)).c_str()), about, y, ys, y_within);
        judge_all(named<T>(("gated_back_" + std::string(name)).c_str()), about + ", da and db", dab, dabs, dab_within);
    }
}

template <typename T>
void columns() {
    struct Case {
        unsigned rows, n, from_pitch, to_pitch, count, shift;
    };
    for (const auto& [rows, n, from_pitch, to_pitch, count, shift] :
         {Case{1, 1, 1, 1, 1, 0}, {37, 3072, 9216, 3072, 3000, 0}, {9, 64, 64, 200, 0, 0}, {5, 31, 77, 45, 30, 1}}) {
        const Input<T> x(size_t(rows) * from_pitch, 1, shift);
        const Input<float> factors(count + 1);
        const Memory<T> y(size_t(rows) * to_pitch, shift), scaled(size_t(rows) * from_pitch, shift);
        for (size_t i = 0; i < y.count; ++i) y[i] = rounded<T>(7);
        on_cpu::launch({3, 2}, 256, 0, [&, rows = rows, n = n, from_pitch = from_pitch, to_pitch = to_pitch] {
            KERNEL(T, copy_columns)(x.data(), y.data(), rows, n, from_pitch, to_pitch);
        });
        on_cpu::launch({3}, 256, 0, [&, rows = rows, from_pitch = from_pitch, count = count] {
            KERNEL(T, scale_columns)(x.data(), factors.data(), scaled.data(), rows, from_pitch, count);
        });
        std::vector<double> wanted(y.count, 7), products(x.count), within(y.count, 1e-300), p_within(x.count);
        for (size_t row = 0; row < rows; ++row) {
            for (unsigned i = 0; i < n; ++i) wanted[row * to_pitch + i] = x.exact[row * from_pitch + i];
            for (unsigned i = 0; i < from_pitch; ++i) {
                const double factor = i < count ? factors.exact[i] : 0;
                products[row * from_pitch + i] = x.exact[row * from_pitch + i] * factor;
                p_within[row * from_pitch + i] = summed(std::abs(products[row * from_pitch + i]), 1) + 1e-300;
            }
        }
        judge_all(named<T>("copy_columns"), std::to_string(n) + " columns", y, wanted, within);
        judge_all(named<T>("scale_columns"), std::to_string(n) + " columns", scaled, products, p_within);
    }
}

template <typename T>
void losses() {
    struct Case {
        unsigned rows, n, shift;
        double size;
    };
    for (const auto& [rows, n, shift, size] :
         {Case{1, 1, 0, 1}, {5, 37, 0, 4}, {7, 5000, 0, 10}, {3, 4096, 1, 1}, {3, 2052, 0, 40}}) {
        const float factor = 0.25;
        // half the smallest bf16, and some of the smallest f32
        const double least = std::is_same_v<T, __nv_bfloat16> ? 0x1p-134 : 4 * 0x1p-149;
        Input<T> logits(size_t(rows) * n, size, shift);
        const Memory<unsigned> targets(rows);
        const Memory<float> found(rows);
        for (unsigned r = 0; r < rows; ++r) targets[r] = uniform(0, n - 1);
        // logits that a mask forbids, whole runs of them in front of the others
        for (size_t i = 0; i < logits.count; ++i) {
            if (n > 100 && i % n < n / 3 && targets[i / n] != i % n) {
                logits[i] = rounded<T>(-INFINITY);
                logits.exact[i] = -INFINITY;
            }
        }
        on_cpu::launch({2}, 512, 0, [&, rows = rows, n = n] {
            KERNEL(T, cross_entropy)(logits.data(), targets.data(), found.data(), rows, n, factor);
        });
        std::vector<double> wanted(rows), within(rows), gradient(logits.count), gradient_within(logits.count);
        for (size_t r = 0; r < rows; ++r) {
            const double* const x = &logits.exact[r * n];
            const double top = *std::max_element(x, x + n);
            double sum = 0;
            for (unsigned i = 0; i < n; ++i) sum += std::exp(x[i] - top);
            wanted[r] = top + std::log(sum) - x[targets[r]];
            // the logarithm of a sum errs by the sum's relative error, the differences by their size
            within[r] = summed(1, n) + V * 4 * (std::abs(top) + std::abs(x[targets[r]]) + std::log(sum));
            for (unsigned i = 0; i < n; ++i) {
                const double p = std::exp(x[i] - top) / sum;
                gradient[r * n + i] = factor * (p - (i == targets[r]));
                // x − top errs by its own size
                const double error = p == 0 ? 0 : V * (8 + std::sqrt(n) + std::abs(x[i] - top)) * p;
                gradient_within[r * n + i] = error + V * (i == targets[r]) + least;
            }
        }
        judge_all(named<T>("cross_entropy"), std::to_string(n) + " logits", found, wanted, within);
        judge_all(named<T>("cross_entropy"), std::to_string(n) + " logits, gradient", logits, gradient, gradient_within);
    }
}

template <typename T>
void products() {
    struct Case {
        unsigned rows, q, blocks;
    };
    for (const auto& [rows, q, blocks] : {Case{1, 1, 1}, {37, 65, 3}, {300, 307, 7}, {5, 128, 9}}) {
        const Input<T> xv(size_t(rows) * q), gu(size_t(rows) * q);
        const Memory<float> partial(size_t(blocks) * q), out(q);
        on_cpu::launch({(q + 127) / 128, blocks}, 128, 0, [&, rows = rows, q = q] {
            KERNEL(T, sigma_products)(xv.data(), gu.data(), partial.data(), rows, q);
        });
        on_cpu::launch({1}, 256, 0, [&, q = q, blocks = blocks] { sum_rows(partial.data(), out.data(), blocks, q); });
        std::vector<double> wanted(q), within(q);
        for (size_t i = 0; i < xv.count; ++i) {
            wanted[i % q] += xv.exact[i] * gu.exact[i];
            within[i % q] += summed(std::abs(xv.exact[i] * gu.exact[i]), rows);
        }
        judge_all(named<T>("sigma_products"), std::to_string(rows) + " rows", out, wanted, within);
    }
}

/// A transcription of train/optimizer.rs; the result is the same to the bit, whatever the parts.
void steps() {
    const double learning_rate = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0.1;
    const Input<float> values[] = {Input<float>(1), Input<float>(700), Input<float>(299)};
    const size_t count = 1000;
    std::vector<Part> parts;
    std::vector<float> x;
    for (const auto& part : values) {
        const size_t at = reinterpret_cast<size_t>(part.data());
        parts.push_back({unsigned(at), unsigned(at >> 32), unsigned(x.size()), unsigned(part.count)});
        x.insert(x.end(), part.data(), part.data() + part.count);
    }
    const Memory<float> gathered(count);
    on_cpu::launch({2, 3}, 128, 0, [&] { gather(parts.data(), gathered.data()); });
    for (size_t i = 0; i < count; ++i) judge("gather", "number", i, gathered[i], x[i], 1e-300);
    judge("gather", "guards", 0, gathered.guarded(), 1, 0.5);

    const Input<float> first(count, 0.1);
    Input<float> second(count, 0.1);
    for (size_t i = 0; i < count; ++i) second[i] = std::abs(second[i]);
    std::vector<float> m(first.data(), first.data() + count), v(second.data(), second.data() + count);
    for (const unsigned step : {1u, 2u, 37u, 1000u}) {
        const Input<float> gradients(count, 0.1);
        on_cpu::launch({3, 3}, 128, 0, [&] {
            adamw(parts.data(), gradients.data(), first.data(), second.data(), learning_rate, beta1, beta2, eps, decay,
                  step);
        });
        const auto power = [](double base, unsigned n) {
            double result = 1;
            for (;;) {
                if (n & 1) result *= base;
                if ((n /= 2) == 0) return result;
                base *= base;
            }
        };
        const double correction1 = 1 - power(beta1, step), correction2 = 1 - power(beta2, step);
        const double length = learning_rate / correction1, root2 = std::sqrt(correction2);
        for (size_t i = 0; i < count; ++i) {
            const double g = gradients[i], decayed = double(x[i]) * (1 - learning_rate * decay);
            const double mean = double(m[i]) + (g - double(m[i])) * (1 - beta1);
            const double square = double(v[i]) * beta2 + g * g * (1 - beta2);
            m[i] = float(mean), v[i] = float(square);
            x[i] = float(decayed - length * mean / (std::sqrt(square) / root2 + eps));
            const double least = 1e-300;
            const size_t part = i < 1 ? 0 : i < 701 ? 1 : 2;
            judge("adamw", "value", i, values[part][i - parts[part].start], x[i], least);
            judge("adamw", "first moment", i, first[i], m[i], least);
            judge("adamw", "second moment", i, second[i], v[i], least);
        }
    }
    const bool whole = values[0].guarded() && values[1].guarded() && values[2].guarded();
    judge("adamw", "guards", 0, whole && first.guarded() && second.guarded(), 1, 0.5);
}

template <typename T>
void of_dtype() {
    if constexpr (sizeof(T) == 2) conversions<T>();
    norms<T>();
    rotations<T>();
    gates<T>("silu", silu, KERNEL(T, gated_silu), KERNEL(T, gated_back_silu));
    gates<T>("gelu_tanh", gelu_tanh, KERNEL(T, gated_gelu_tanh), KERNEL(T, gated_back_gelu_tanh));
    gates<T>("gelu", gelu, KERNEL(T, gated_gelu), KERNEL(T, gated_back_gelu));
    products<T>();
    columns<T>();
    losses<T>();
}

}  // namespace

int main(int count, char** arguments) {
    return main_with(count, arguments, [] {
        of_dtype<float>();
        of_dtype<__half>();
        of_dtype<__nv_bfloat16>();
        sums_of_rows();
        steps();
    });
}
