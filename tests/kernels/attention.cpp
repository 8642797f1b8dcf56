// Attention and its gradients against f64.
#include "../../src/model/kernels/attention.cu"
#include "../../src/model/kernels/attention_dots.cu"

#include "check.h"
#include "launches.h"

using namespace check;

namespace {

/// What queries see of the keys.
enum class Mask { All, Causal, Window, Packed };

struct Case {
    unsigned b, t, s, h, kv, d;
    Mask mask;
    double cap;
    /// Numbers that tensors start behind a multiple of 128 bytes.
    unsigned shift = 0;
    /// Of the queries: scores are about twice as large.
    double size = 1;
};

struct Runs {
    std::vector<unsigned> first, end;
};

/// Runs for t rows that the batch shares, or b·t rows where sequences are packed differently.
Runs runs(const Case& c) {
    Runs runs;
    const unsigned before = c.s - std::min(c.s, c.t), window = uniform(1, 20);
    for (unsigned batch = 0; batch < (c.mask == Mask::Packed ? c.b : 1); ++batch) {
        unsigned sequence = 0;
        for (unsigned i = 0; i < c.t; ++i) {
            const unsigned last = std::min(before + i + 1, c.s);
            // a new sequence begins now and then
            if (i > 0 && uniform(0, 15) == 0) sequence = last - 1;
            const unsigned first = c.mask == Mask::Window ? last - std::min(last, window) : sequence;
            runs.first.push_back(c.mask == Mask::Window || c.mask == Mask::Packed ? first : 0);
            runs.end.push_back(c.mask == Mask::All ? c.s : last);
        }
    }
    return runs;
}

/// The reference, and beside each result what its kernel may miss.
///
/// A score s = scale·q·k errs by Δ = v·(8 + √d)·scale·Σ|q·k|, a probability then by 2Δ of itself, since lse errs alike;
/// 16-bit kernels round p to the dtype before p·v and p·g, and ds before ds·k and ds·q.
struct Reference {
    std::vector<double> y, lse, dots, dq, dk, dv;
    std::vector<double> y_within, lse_within, dots_within, dq_within, dk_within, dv_within;

    Reference(
        const Case& c, const Runs& runs, double scale, double unit, double tiny, const std::vector<double>& q,
        const std::vector<double>& k, const std::vector<double>& v, const std::vector<double>& g)
        : y(q.size()), lse(size_t(c.b) * c.h * c.t), dots(lse.size()), dq(q.size()), dk(k.size()), dv(k.size()),
          y_within(q.size()), lse_within(lse.size()), dots_within(lse.size()), dq_within(q.size()),
          dk_within(k.size()), dv_within(k.size()) {
        const unsigned d = c.d, group = c.h / c.kv;
        const double inner = V * (8 + std::sqrt(d));
        for (unsigned batch = 0; batch < c.b; ++batch) {
            for (unsigned head = 0; head < c.h; ++head) {
                for (unsigned i = 0; i < c.t; ++i) {
                    const size_t seen = (size_t(batch) * c.t + i) % runs.first.size();
                    const unsigned first = runs.first[seen], end = runs.end[seen], count = end - first;
                    const size_t query = ((size_t(batch) * c.t + i) * c.h + head) * d;
                    const size_t row = (size_t(batch) * c.h + head) * c.t + i;
                    const auto key = [&](unsigned j) {
                        return ((size_t(batch) * c.s + first + j) * c.kv + head / group) * d;
                    };
                    std::vector<double> p(count), slope(count, 1);
                    double delta = 0, top = -INFINITY, sum = 0;
                    for (unsigned j = 0; j < count; ++j) {
                        double product = 0, size = 0;
                        for (unsigned x = 0; x < d; ++x) {
                            product += q[query + x] * k[key(j) + x];
                            size += std::abs(q[query + x] * k[key(j) + x]);
                        }
                        p[j] = scale * product;
                        delta = std::max(delta, inner * scale * size);
                        if (c.cap > 0) {
                            const double bent = std::tanh(p[j] / c.cap);
                            p[j] = c.cap * bent;
                            slope[j] = 1 - bent * bent;
                        }
                        top = std::max(top, p[j]);
                    }
                    for (double& score : p) sum += score = std::exp(score - top);
                    lse[row] = top + std::log(sum);
                    lse_within[row] = delta + summed(1, count) + V * 8 * std::abs(top);
                    const double largest = std::abs(lse[row]) + std::abs(top);
                    const double power = 2 * delta + V * (16 + std::sqrt(count) + 8 * largest);
                    for (unsigned j = 0; j < count; ++j) {
                        p[j] /= sum;
                        for (unsigned x = 0; x < d; ++x) {
                            const double term = p[j] * v[key(j) + x];
                            y[query + x] += term;
                            y_within[query + x] += (unit + power + V * (8 + std::sqrt(count))) * std::abs(term) +
                                                   tiny * std::abs(v[key(j) + x]);
                        }
                    }
                    double size = 0;
                    for (unsigned x = 0; x < d; ++x) {
                        dots[row] += y[query + x] * g[query + x];
                        size += std::abs(y[query + x] * g[query + x]);
                        // the dots are made of the kernel's y
                        const double missed = y_within[query + x] + unit * std::abs(y[query + x]) + tiny;
                        dots_within[row] += missed * std::abs(g[query + x]);
                    }
                    dots_within[row] += inner * size;
                    for (unsigned j = 0; j < count; ++j) {
                        double dp = 0, dp_size = 0;
                        for (unsigned x = 0; x < d; ++x) {
                            dp += g[query + x] * v[key(j) + x];
                            dp_size += std::abs(g[query + x] * v[key(j) + x]);
                        }
                        const double bare = p[j] * (dp - dots[row]), ds = bare * slope[j];
                        // dots come as f32; 1 − tanh² errs like its argument does
                        const double bend = c.cap > 0 ? V * 8 + 2 * delta / c.cap : 0;
                        const double ds_within = tiny + (unit + power) * std::abs(ds) + bend * std::abs(bare) +
                                                 p[j] * (inner * dp_size + V * std::abs(dots[row]));
                        const double many = V * (8 + std::sqrt(std::max(count, group * c.t)));
                        for (unsigned x = 0; x < d; ++x) {
                            const double kx = scale * k[key(j) + x], qx = scale * q[query + x], gx = g[query + x];
                            dq[query + x] += ds * kx;
                            dq_within[query + x] += (ds_within + many * std::abs(ds)) * std::abs(kx);
                            dk[key(j) + x] += ds * qx;
                            dk_within[key(j) + x] += (ds_within + many * std::abs(ds)) * std::abs(qx);
                            dv[key(j) + x] += p[j] * gx;
                            dv_within[key(j) + x] += (tiny + (unit + power + many) * p[j]) * std::abs(gx);
                        }
                    }
                }
            }
        }
    }
};

#define BY_WIDTH(NAME, DTYPE)                                                                                     \
    (width == 32 ? NAME##_##DTYPE##_d32 : width == 64 ? NAME##_##DTYPE##_d64 : width == 96 ? NAME##_##DTYPE##_d96 \
     : width == 128 ? NAME##_##DTYPE##_d128 : NAME##_##DTYPE##_d256)
#define KERNEL(NAME)                                                               \
    [&] {                                                                          \
        if constexpr (std::is_same_v<T, float>) return BY_WIDTH(NAME, f32);        \
        else if constexpr (std::is_same_v<T, __half>) return BY_WIDTH(NAME, f16);  \
        else return BY_WIDTH(NAME, bf16);                                          \
    }()

template <typename T>
auto dots_kernel() {
    if constexpr (std::is_same_v<T, float>) return attention_dots_f32;
    else if constexpr (std::is_same_v<T, __half>) return attention_dots_f16;
    else return attention_dots_bf16;
}

template <typename T>
void hold(const Case& c) {
    const auto [b, t, s, h, kv, d, mask, cap, shift, size] = c;
    const Geometry geometry(d, sizeof(T));
    const unsigned width = geometry.width;
    const float scale = float(2 / std::sqrt(d));

    const Runs seen = runs(c);
    const Input<T> q(size_t(b) * t * h * d, size, shift), k(size_t(b) * s * kv * d, 1, shift), v(k.count, 1, shift),
        g(q.count, 1, shift);
    const unsigned rows = unsigned(seen.first.size());
    const Memory<unsigned> first(rows), end(rows);
    std::copy(seen.first.begin(), seen.first.end(), first.data());
    std::copy(seen.end.begin(), seen.end.end(), end.data());
    const bool rounds = sizeof(T) == 2;
    const Reference wanted(
        c, seen, scale, rounds ? Dtype<T>::UNIT : 0, Dtype<T>::TINY, q.exact, k.exact, v.exact, g.exact);

    const unsigned query_blocks = (t + geometry.rows - 1) / geometry.rows;
    const unsigned q_blocks = (t + geometry.q_rows - 1) / geometry.q_rows;
    const unsigned key_blocks = (s + geometry.kv_rows - 1) / geometry.kv_rows;
    const Memory<T> y(q.count, shift);
    const Memory<float> lse(wanted.lse.size()), dots(wanted.dots.size());
    on_cpu::launch({query_blocks, h, b}, geometry.threads, geometry.forward, [&] {
        KERNEL(attention)(q.data(), k.data(), v.data(), first.data(), end.data(), rows, y.data(), lse.data(), b, t, s,
                          h, kv, d, scale, float(cap));
    });
    on_cpu::launch({3}, 256, 0, [&] { dots_kernel<T>()(y.data(), g.data(), dots.data(), b * t * h, t, h, d); });

    // the gradients are held against the reference by themselves
    const Input<float> exact_lse(wanted.lse), exact_dots(wanted.dots);
    const Memory<T> dq(q.count, shift), dk(k.count, shift), dv(k.count, shift);
    on_cpu::launch({q_blocks, h, b}, geometry.q_threads, geometry.back_q, [&] {
        KERNEL(attention_back_q)(q.data(), k.data(), v.data(), g.data(), exact_lse.data(), exact_dots.data(),
                                 first.data(), end.data(), rows, dq.data(), b, t, s, h, kv, d, scale, float(cap));
    });
    on_cpu::launch({key_blocks, kv, b}, geometry.kv_threads, geometry.back_kv, [&] {
        KERNEL(attention_back_kv)(q.data(), k.data(), v.data(), g.data(), exact_lse.data(), exact_dots.data(),
                                  first.data(), end.data(), rows, dk.data(), dv.data(), b, t, s, h, kv, d, scale,
                                  float(cap));
    });

    char about[128];
    std::snprintf(
        about, sizeof about, "b %u, t %u, s %u, h %u, kv %u, d %u, mask %d, cap %g", b, t, s, h, kv, d, int(mask), cap);
    const std::string dtype = Dtype<T>::NAME, at = "_d" + std::to_string(width);
    judge_all("attention_" + dtype + at, about + std::string(", y"), y, wanted.y, wanted.y_within);
    judge_all("attention_" + dtype + at, about + std::string(", lse"), lse, wanted.lse, wanted.lse_within);
    judge_all("attention_dots_" + dtype, about, dots, wanted.dots, wanted.dots_within);
    judge_all("attention_back_q_" + dtype + at, about, dq, wanted.dq, wanted.dq_within);
    judge_all("attention_back_kv_" + dtype + at, about + std::string(", dk"), dk, wanted.dk, wanted.dk_within);
    judge_all("attention_back_kv_" + dtype + at, about + std::string(", dv"), dv, wanted.dv, wanted.dv_within);
}

template <typename T>
void of_dtype() {
    for (const Case& c : {
             Case{2, 1, 37, 4, 1, 8, Mask::All, 0},
             {2, 65, 65, 2, 2, 30, Mask::Causal, 0},
             {2, 130, 150, 4, 1, 32, Mask::Packed, 5},
             {1, 200, 200, 2, 1, 32, Mask::Window, 0},
             {2, 65, 65, 2, 2, 40, Mask::Causal, 2},
             {2, 37, 65, 8, 2, 64, Mask::Window, 0},
             {1, 70, 131, 3, 1, 64, Mask::All, 0, 1},
             {2, 65, 65, 4, 1, 80, Mask::Packed, 0},
             {1, 37, 37, 2, 2, 96, Mask::Window, 3},
             {2, 67, 67, 4, 1, 128, Mask::Packed, 4},
             {1, 1, 65, 2, 1, 128, Mask::All, 0},
             {2, 65, 70, 2, 1, 256, Mask::Causal, 0},
             {1, 37, 37, 2, 2, 200, Mask::Packed, 5},
             // keys that nobody sees
             {1, 20, 300, 2, 1, 64, Mask::Window, 0},
             // more queries than attention_back_kv looks at together
             {1, 2100, 2100, 2, 1, 8, Mask::Window, 0},
             {1, 1060, 1060, 1, 1, 128, Mask::Window, 0},
         }) {
        hold<T>(c);
    }
    for (unsigned i = 0; i < 24; ++i) {
        const unsigned kv = uniform(1, 3), d = uniform(0, 1) == 0 ? 8 * uniform(1, 16) : uniform(1, 256);
        const unsigned t = uniform(1, 140), s = t + uniform(0, 1) * uniform(0, 70);
        const double cap = uniform(0, 1) * uniform(1, 8);
        const auto mask = Mask(uniform(0, 3));
        const unsigned b = uniform(1, 2), shift = uniform(0, 3) == 0;
        hold<T>({b, t, s, kv * uniform(1, 4), kv, d, mask, cap, shift, double(uniform(1, 8))});
    }
}

}  // namespace

int main(int count, char** arguments) {
    return main_with(count, arguments, of_dtype<DTYPE>);
}
