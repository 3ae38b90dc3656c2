// The CPU kernels on arrays of exactly the size that they may touch, for the address and undefined-behaviour sanitizers;
// results are compared with sums in double. Prints a line for each instruction set that runs here; 1 on a mistake.
// Built and run by tests/test_sanitizers.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "acip/decode.h"
#include "acip/training.h"

using namespace acip;

namespace {

std::mt19937 random_numbers(0);

float between(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_numbers); }

float of_bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
// Whole numbers up to 8 and halves of them, exactly; that is enough to test with.
uint16_t to_f16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value == 0) return 0;
    return uint16_t(((bits >> 16) & 0x8000u) | ((((bits >> 23) & 255u) - 112u) << 10) | ((bits >> 13) & 1023u));
}
double of_f16(uint16_t bits) {
    int exponent = (bits >> 10) & 31, rest = bits & 1023;
    double value = exponent ? std::ldexp(1024 + rest, exponent - 25) : std::ldexp(rest, -24);
    return bits & 0x8000u ? -value : value;
}

// Numbers of two or four bytes, in memory that ends where they do.
struct Numbers {
    Number type;
    size_t n;
    std::unique_ptr<uint8_t[]> bytes;

    Numbers(Number type, size_t n) : type(type), n(n), bytes(new uint8_t[n * size()]) {}
    size_t size() const { return type == Number::f32 ? 4 : 2; }
    double get(size_t i) const {
        if (type == Number::f32) {
            float value;
            std::memcpy(&value, &bytes[i * 4], 4);
            return value;
        }
        uint16_t bits;
        std::memcpy(&bits, &bytes[i * 2], 2);
        return type == Number::bf16 ? of_bf16(bits) : of_f16(bits);
    }
    void fill() {
        for (size_t i = 0; i < n; ++i) {
            float value = std::round(between(-8, 8)) / 2;
            uint16_t bits = type == Number::bf16 ? to_bf16(value) : to_f16(value);
            if (type == Number::f32)
                std::memcpy(&bytes[i * 4], &value, 4);
            else
                std::memcpy(&bytes[i * 2], &bits, 2);
        }
    }
};

int mistakes = 0;

void check(double actual, double expected, double magnitude, Number type, int64_t terms, const char* what) {
    double unit = type == Number::f32 ? 6e-8 : type == Number::bf16 ? 4e-3 : 5e-4;
    double bound = magnitude * (3 * unit + (terms + 40) * 1.2e-7) + 1e-30;
    if (!(std::abs(actual - expected) <= bound)) {
        ++mistakes;
        if (mistakes < 20) std::printf("%s: %g, not %g\n", what, actual, expected);
    }
}

void products(const Decode& kernels, Number activation, Number kind, int64_t rows, int64_t cols, int64_t tokens,
              int64_t group, bool zeros, bool pivoted) {
    Numbers x(activation, tokens * cols), bias(activation, rows), y(activation, tokens * rows);
    Numbers z(activation, tokens * rows), plain(activation, rows * cols);
    x.fill(), bias.fill(), plain.fill();
    std::vector<double> weight(rows * cols);
    std::unique_ptr<uint8_t[]> codes, zero;
    std::unique_ptr<float[]> floats(new float[rows]), s(new float[rows]);
    std::unique_ptr<uint16_t[]> scales;
    std::unique_ptr<int32_t[]> place(new int32_t[rows]);
    Product p{};
    p.weight = {kind, plain.bytes.get(), rows, cols, cols * int64_t(plain.size()), nullptr, nullptr, group};
    for (int64_t i = 0; i < rows; ++i) s[i] = between(0.5f, 2), floats[i] = between(0.01f, 0.1f), place[i] = int32_t(rows - 1 - i);
    if (kind == Number::i8) {
        codes.reset(new uint8_t[rows * cols]);
        for (int64_t i = 0; i < rows * cols; ++i) {
            codes[i] = uint8_t(int(random_numbers() % 255) - 127);
            weight[i] = double(int8_t(codes[i])) * floats[i / cols];
        }
        p.weight.data = codes.get(), p.weight.stride = cols, p.weight.scales = floats.get();
    } else if (kind == Number::i4) {
        int64_t width = (cols + 63) / 64 * 32, groups = (cols + group - 1) / group;
        codes.reset(new uint8_t[rows * width]), scales.reset(new uint16_t[rows * groups]);
        zero.reset(new uint8_t[rows * groups]);
        for (int64_t i = 0; i < rows * width; ++i) codes[i] = uint8_t(random_numbers());
        for (int64_t i = 0; i < rows * groups; ++i) {
            scales[i] = to_bf16(between(0.05f, 0.5f));
            zero[i] = zeros ? uint8_t(random_numbers() % 16) : 8;
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < cols; ++j) {
                uint8_t byte = codes[r * width + j / 64 * 32 + j % 32];
                int code = j % 64 < 32 ? byte & 15 : byte >> 4;
                weight[r * cols + j] = (code - zero[r * groups + j / group]) * double(of_bf16(scales[r * groups + j / group]));
            }
        p.weight.data = codes.get(), p.weight.stride = width, p.weight.scales = scales.get();
        p.weight.zeros = zeros ? zero.get() : nullptr;
    } else {
        for (int64_t i = 0; i < rows * cols; ++i) weight[i] = plain.get(i);
    }
    p.x = x.bytes.get(), p.x_stride = cols, p.s = s.get(), p.bias = bias.bytes.get(), p.y = y.bytes.get(), p.y_stride = rows;
    if (pivoted) p.z = z.bytes.get(), p.z_stride = rows, p.place = place.get();
    int64_t middle = rows / 3;
    kernels.product(activation, p, tokens, 0, middle);
    kernels.product(activation, p, tokens, middle, rows);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) {
            double sum = 0, size = 0;
            for (int64_t j = 0; j < cols; ++j) {
                double term = x.get(t * cols + j) * weight[r * cols + j];
                sum += term, size += std::abs(term);
            }
            int64_t at = pivoted ? place[r] : r;
            double b = bias.get(at);
            check(y.get(t * rows + at), sum * s[r] + b, size * s[r] + std::abs(b), activation, cols, "product");
            if (pivoted) check(z.get(t * rows + r), sum * s[r], size * s[r], activation, cols, "z");
        }
}

// Plain numbers of codes, and outputs put in order, places in order and not.
void many_tokens(const Decode& kernels, Number activation, Number kind, int64_t rows, int64_t cols, int64_t group) {
    int64_t width = kind == Number::i8 ? cols : (cols + 63) / 64 * 32, groups = (cols + group - 1) / group;
    std::unique_ptr<uint8_t[]> codes(new uint8_t[rows * width]), zeros(new uint8_t[rows * groups]);
    std::unique_ptr<uint16_t[]> scales(new uint16_t[rows * groups]);
    std::unique_ptr<float[]> floats(new float[rows]);
    for (int64_t i = 0; i < rows * width; ++i) codes[i] = uint8_t(random_numbers());
    for (int64_t i = 0; i < rows * groups; ++i) scales[i] = to_bf16(between(0.05f, 0.5f)), zeros[i] = random_numbers() % 16;
    for (int64_t i = 0; i < rows; ++i) floats[i] = between(0.01f, 0.1f);
    Matrix weight{kind, codes.get(), rows, cols, width, nullptr, zeros.get(), group};
    weight.scales = kind == Number::i8 ? static_cast<void*>(floats.get()) : scales.get();
    Numbers plain(activation, rows * cols);
    kernels.plain(activation, weight, plain.bytes.get(), 0, rows / 2);
    kernels.plain(activation, weight, plain.bytes.get(), rows / 2, rows);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < cols; ++j) {
            uint8_t byte = codes[kind == Number::i8 ? r * width + j : r * width + j / 64 * 32 + j % 32];
            double value = int8_t(byte) * double(floats[r]);
            if (kind == Number::i4) {
                int64_t at = r * groups + j / group;
                value = ((j % 64 < 32 ? byte & 15 : byte >> 4) - zeros[at]) * double(of_bf16(scales[at]));
            }
            check(plain.get(r * cols + j), value, std::abs(value), activation, 0, "plain");
        }

    int64_t rank = cols / 3, tokens = rows;
    Numbers pivots(activation, tokens * rank), others(activation, tokens * (cols - rank)), bias(activation, cols);
    Numbers y(activation, tokens * cols);
    pivots.fill(), others.fill(), bias.fill();
    std::vector<int32_t> place(cols);
    for (int64_t j = 0; j < cols; ++j) place[j] = int32_t(j);
    std::shuffle(place.begin(), place.end(), random_numbers);
    for (bool ordered : {false, true}) {
        if (ordered) std::sort(place.begin(), place.begin() + rank), std::sort(place.begin() + rank, place.end());
        std::unique_ptr<int32_t[]> places(new int32_t[cols]);
        std::copy(place.begin(), place.end(), places.get());
        const void* added = ordered == (rows % 2 == 0) ? bias.bytes.get() : nullptr;
        Parts parts{pivots.bytes.get(), others.bytes.get(), rank, cols - rank, rank, cols, places.get(), added};
        kernels.put(activation, parts, y.bytes.get(), cols, 0, tokens);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t j = 0; j < cols; ++j) {
                double v = j < rank ? pivots.get(t * rank + j) : others.get(t * (cols - rank) + j - rank);
                double b = added ? bias.get(place[j]) : 0;
                check(y.get(t * cols + place[j]), v + b, std::abs(v) + std::abs(b), activation, 0, "put");
            }
    }
}

void elementwise(const Decode& kernels, Number activation, int64_t n) {
    Numbers gate(activation, n), up(activation, n), out(activation, n);
    gate.fill(), up.fill();
    kernels.swiglu(activation, gate.bytes.get(), up.bytes.get(), out.bytes.get(), 0, n / 2);
    kernels.swiglu(activation, gate.bytes.get(), up.bytes.get(), out.bytes.get(), n / 2, n);
    for (int64_t j = 0; j < n; ++j) {
        double g = gate.get(j), u = up.get(j);
        check(out.get(j), g / (1 + std::exp(-g)) * u, std::abs(g * u), activation, 40, "swiglu");
    }
}

template <class T>
void training(const Training& kernels, Dtype dtype, int64_t rows, int64_t cols) {
    auto array = [](int64_t n) { return std::unique_ptr<T[]>(new T[n]); };
    auto z = array(rows * cols), h = array(rows * cols), out = array(rows * cols), s = array(cols), sum = array(cols);
    for (int64_t i = 0; i < rows * cols; ++i) z[i] = T(between(-1, 1)), h[i] = T(between(-1, 1));
    for (int64_t i = 0; i < cols; ++i) s[i] = i % 4 == 1 ? T(0) : T(between(-1, 1));
    kernels.scale_ranks(dtype, z.get(), cols, out.get(), cols, cols, s.get(), 0, rows);
    for (int64_t i = 0; i < rows * cols; ++i) check(out[i], double(z[i]) * s[i % cols], 1, Number::f32, 1, "scale");
    auto before = array(rows * cols);
    std::copy(h.get(), h.get() + rows * cols, before.get());
    kernels.mask_gradient(dtype, z.get(), cols, h.get(), cols, rows, s.get(), sum.get(), 0, cols);
    for (int64_t i = 0; i < cols; ++i) {
        double expected = 0;
        for (int64_t t = 0; t < rows; ++t) expected += s[i] == 0 ? 0 : double(z[t * cols + i]) * before[t * cols + i];
        check(sum[i], expected, double(rows), Number::f32, rows, "mask gradient");
    }
    kernels.dropout(dtype, z.get(), out.get(), false, 7, 1u << 30, 4.0 / 3, 0, rows * cols);
    kernels.dropout(dtype, z.get(), out.get(), true, 7, 1u << 30, -4.0 / 3, 0, rows * cols);
    for (int64_t i = 0; i < rows * cols; ++i) check(out[i], 0, 1, Number::f32, 1, "dropout");
    std::vector<int64_t> labels(rows);
    for (int64_t t = 0; t < rows; ++t) labels[t] = t % 5 == 4 ? -100 : int64_t(random_numbers() % uint32_t(cols));
    auto loss = array(rows);
    kernels.cross_entropy(dtype, out.get(), cols, labels.data(), -100, 1.0, loss.get(), 0, rows);
    for (int64_t t = 0; t < rows; ++t) {
        double total = 0;
        for (int64_t i = 0; i < cols; ++i) total += out[t * cols + i];
        check(total, 0, 2, Number::f32, cols, "cross-entropy");
    }
    for (int64_t t = 0; t < rows; ++t) labels[t] = std::max<int64_t>(labels[t], 0);
    for (double weight : {0.0, 0.3, 1.0}) {
        std::copy(before.get(), before.get() + rows * cols, out.get());
        kernels.soft_cross_entropy(dtype, out.get(), z.get(), cols, labels.data(), weight, loss.get(), 0, rows);
        for (int64_t t = 0; t < rows; ++t) {
            double total = 0;
            for (int64_t i = 0; i < cols; ++i) total += out[t * cols + i];
            check(total, 0, 2, Number::f32, cols + 40, "soft cross-entropy");
        }
    }
    int64_t block = cols < 3 ? cols : 3, queries = block * 2;
    auto scores = array(queries * cols), dp = array(queries * cols), sums = array(queries);
    for (int64_t i = 0; i < queries * cols; ++i) scores[i] = T(between(-3, 3)), dp[i] = T(between(-1, 1));
    kernels.causal_softmax(dtype, scores.get(), cols, cols, block, 0.5, sums.get(), false, 0, queries);
    kernels.softmax_gradient(dtype, dp.get(), scores.get(), cols, cols, block, 0.5, 0, queries);
    for (int64_t row = 0; row < queries; ++row) {
        double total = 0, gradient = 0;
        for (int64_t i = 0; i < cols; ++i) total += scores[row * cols + i], gradient += dp[row * cols + i];
        check(total, 1, 1, Number::f32, cols + 40, "softmax");
        check(gradient, 0, 2, Number::f32, cols + 40, "softmax gradient");
    }

    // A norm's rows have a mean square of one, however long x is: so dx is orthogonal to it.
    auto ones = array(cols), rstd = array(rows), dx = array(rows * cols);
    for (int64_t i = 0; i < cols; ++i) ones[i] = T(1);
    for (auto [begin, end] : {std::pair(int64_t(0), rows / 2), std::pair(rows / 2, rows)}) {
        kernels.rms_norm(dtype, z.get(), cols, ones.get(), 0, out.get(), rstd.get(), begin, end);
        kernels.rms_norm_gradient(dtype, before.get(), z.get(), cols, ones.get(), rstd.get(), dx.get(), begin, end);
    }
    for (int64_t t = 0; t < rows; ++t) {
        double squares = 0, along = 0, size = 0;
        for (int64_t i = t * cols; i < (t + 1) * cols; ++i) {
            squares += double(out[i]) * out[i], along += double(z[i]) * dx[i];
            size += std::abs(double(z[i])) * rstd[t] * (std::abs(double(before[i])) + std::abs(double(out[i])) * cols);
        }
        check(squares, double(cols), double(cols), Number::f32, cols + 10, "norm");
        check(along, 0, size, Number::f32, 3 * cols + 10, "norm gradient");
    }
    int64_t n = rows * cols;
    auto dup = array(n);
    for (int64_t i = 0; i < n; ++i) z[i] *= T(40);
    kernels.gated_silu(dtype, z.get(), h.get(), out.get(), 0, n / 2);
    kernels.gated_silu(dtype, z.get(), h.get(), out.get(), n / 2, n);
    kernels.gated_silu_gradient(dtype, before.get(), z.get(), h.get(), dx.get(), dup.get(), 0, n / 2);
    kernels.gated_silu_gradient(dtype, before.get(), z.get(), h.get(), dx.get(), dup.get(), n / 2, n);
    for (int64_t i = 0; i < n; ++i) {
        double x = z[i], g = before[i], up = h[i], part = 1 / (1 + std::exp(-x)), rest = 1 / (1 + std::exp(x));
        check(out[i], x * part * up, std::abs(x * up), Number::f32, 10, "gated silu");
        check(dx[i], g * up * part * (1 + x * rest), std::abs(g * up) * (1 + std::abs(x)), Number::f32, 25, "gate");
        check(dup[i], g * x * part, std::abs(g * x), Number::f32, 10, "up");
    }
}

// The same functions in two bytes: that they touch nothing else is the test.
void training_in_half(const Training& kernels, int64_t rows, int64_t cols) {
    Numbers x(Number::bf16, rows * cols), g(Number::bf16, rows * cols), y(Number::bf16, rows * cols);
    Numbers weight(Number::bf16, cols), dx(Number::bf16, rows * cols), dup(Number::bf16, rows * cols);
    x.fill(), g.fill(), weight.fill();
    std::unique_ptr<float[]> rstd(new float[rows]);
    int64_t n = rows * cols;
    kernels.rms_norm(Dtype::bf16, x.bytes.get(), cols, weight.bytes.get(), 1e-6, y.bytes.get(), rstd.get(), 0, rows);
    kernels.rms_norm_gradient(Dtype::bf16, g.bytes.get(), x.bytes.get(), cols, weight.bytes.get(), rstd.get(),
                              dx.bytes.get(), 0, rows);
    for (int64_t i = 0; i < n; ++i) {
        double exact = x.get(i) * rstd[i / cols] * weight.get(i % cols);
        check(y.get(i), exact, std::abs(exact), Number::bf16, cols, "norm in bfloat16");
    }
    kernels.gated_silu(Dtype::bf16, x.bytes.get(), g.bytes.get(), y.bytes.get(), 0, n);
    kernels.gated_silu_gradient(Dtype::bf16, y.bytes.get(), x.bytes.get(), g.bytes.get(), dx.bytes.get(),
                                dup.bytes.get(), 0, n);
}

}  // namespace

int main() {
    const Number activations[] = {Number::f32, Number::bf16, Number::f16};
    for (const char* isa : {"portable", "avx2", "avx512", "avx512_bf16"}) {
        const Decode* kernels = decode(isa);
        if (!kernels) continue;
        for (Number activation : activations)
            for (int kind = 0; kind < 4; ++kind)
                for (int64_t cols : {0, 1, 15, 33, 64, 100, 1090})
                    for (int64_t rows : {1, 3, 9, 14, 35})
                        for (int64_t tokens : {1, 2, 5, 7, 17, 40})
                            for (int64_t group : {32, 64, 128}) {
                                if (kind < 2 && group > 32) continue;
                                Number type = kind == 0 ? activation : kind == 1 ? Number::i8 : Number::i4;
                                products(*kernels, activation, type, rows, cols, tokens, group, kind == 3,
                                         (rows + tokens) % 2 == 0);
                            }
        for (Number activation : activations)
            for (Number kind : {Number::i8, Number::i4})
                for (int64_t cols : {0, 1, 15, 33, 64, 100, 390})
                    for (int64_t rows : {1, 4})
                        for (int64_t group : {32, 64, 128}) many_tokens(*kernels, activation, kind, rows, cols, group);
        for (Number activation : activations)
            for (int64_t n : {0, 1, 17, 300}) elementwise(*kernels, activation, n);
        for (int64_t rows : {1, 7, 40})
            for (int64_t cols : {1, 13, 64, 131}) {
                training<float>(*acip::training(isa), Dtype::f32, rows, cols);
                training<double>(*acip::training(isa), Dtype::f64, rows, cols);
                training_in_half(*acip::training(isa), rows, cols);
            }
        std::printf("%s: %d mistakes\n", isa, mistakes);
    }
    return mistakes ? 1 : 0;
}
