// Compiled once for each instruction set, with ACIP_ISA as its name: plain loops that a compiler vectorizes.
//
// What bounds these functions is memory: a float32 activation of 1024 × 576 is 2.4 MB, read and written once, where
// separate tensor operations would take three to five passes.
#include "acip/training.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace acip {
namespace ACIP_ISA {
namespace {

#include "numbers.h"

template <class T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};
template <class T>
using wide = typename Wide<T>::type;

template <class T>
void scale_ranks(const T* z, int64_t ldz, T* out, int64_t ldout, int64_t rank, const wide<T>* s, int64_t begin,
                 int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const T* from = z + t * ldz;
        T* to = out + t * ldout;
#pragma omp simd
        for (int64_t i = 0; i < rank; ++i) {
            wide<T> value = to_float(from[i]) * s[i];
            from_float(to + i, s[i] == 0 ? wide<T>(0) : value);
        }
    }
}

// Columns are taken 64 at a time: their sums stay in registers or in the first cache.
constexpr int64_t kColumns = 64;
constexpr int64_t kTokens = 32;

template <class T>
void mask_gradient(const T* z, int64_t ldz, T* h, int64_t ldh, int64_t tokens, const wide<T>* s, wide<T>* sum,
                   int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kColumns) {
        int64_t n = first + kColumns < end ? kColumns : end - first;
        wide<T> total[kColumns] = {};
        for (int64_t block = 0; block < tokens; block += kTokens) {
            int64_t last = block + kTokens < tokens ? block + kTokens : tokens;
            wide<T> part[kColumns] = {};
            for (int64_t t = block; t < last; ++t) {
                const T* zt = z + t * ldz + first;
                T* ht = h + t * ldh + first;
                const wide<T>* st = s + first;
#pragma omp simd
                for (int64_t i = 0; i < n; ++i) {
                    wide<T> value = to_float(ht[i]);
                    part[i] += to_float(zt[i]) * value;
                    from_float(ht + i, st[i] == 0 ? wide<T>(0) : value * st[i]);
                }
            }
            for (int64_t i = 0; i < n; ++i) total[i] += part[i];
        }
        if (sum)
            for (int64_t i = 0; i < n; ++i) sum[first + i] = s[first + i] == 0 ? wide<T>(0) : total[i];
    }
}

// A counter-based generator: no state, so the backward pass makes the same choices again from the seed alone.
// It is "lowbias32" (C. Wellons, Hash Function Prospector) over multiples of an odd number, with a half of the random seed
// added to them and the other one between its multiplications. It counts pairs of elements, for either of which 16 of its
// bits decide: hashing is most of what dropout costs.
inline uint32_t hash(uint32_t counter, uint32_t low, uint32_t key) {
    uint32_t v = counter * 0x9e3779b1u + low;
    v ^= v >> 16;
    v *= 0x7feb352du;
    v ^= key;
    v ^= v >> 15;
    v *= 0x846ca68bu;
    v ^= v >> 16;
    return v;
}

template <class T, bool add>
void dropout(const T* x, T* out, uint64_t seed, uint32_t threshold, wide<T> scale, int64_t begin, int64_t end) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of a pair has the lower bits");
    using Half [[gnu::may_alias]] = uint16_t;
    constexpr int64_t block = 512;
    const uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32);
    alignas(64) uint32_t bits[block / 2];
    for (int64_t first = begin; first < end;) {
        const uint64_t pair = uint64_t(first) / 2;
        const int64_t skipped = first % 2;
        // The counter's upper half is constant over 2^32 pairs; a counter of 32 bits, so that as many fit a vector.
        const uint32_t start = uint32_t(pair), key = high ^ (uint32_t(pair >> 32) * 0x9e3779b9u);
        const int64_t left = int64_t((uint64_t(1) << 32) - start);
        const int64_t count = std::min({end - first, block - skipped, 2 * left - skipped});
        const uint32_t pairs = uint32_t((skipped + count + 1) / 2);
#pragma omp simd
        for (uint32_t i = 0; i < pairs; ++i) bits[i] = hash(start + i, low, key);
        const Half* decides = reinterpret_cast<const Half*>(bits) + skipped;
        const T* from = x + first;
        T* to = out + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
            wide<T> value = decides[i] >= threshold ? to_float(from[i]) * scale : wide<T>(0);
            from_float(to + i, add ? to_float(to[i]) + value : value);
        }
        first += count;
    }
}

template <class T>
void cross_entropy(T* logits, int64_t classes, const int64_t* labels, int64_t ignore, double grad_scale, wide<T>* loss,
                   int64_t begin, int64_t end) {
    using W = wide<T>;
    constexpr int lanes = 16;
    for (int64_t row = begin; row < end; ++row) {
        T* x = logits + row * classes;
        if (labels[row] == ignore) {
            std::memset(static_cast<void*>(x), 0, classes * sizeof(T));
            loss[row] = 0;
            continue;
        }
        W most = to_float(x[0]);
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < classes; ++i) most = to_float(x[i]) > most ? to_float(x[i]) : most;
        // 16 running sums, in double over blocks of 1024: vocabularies are long.
        double sum = 0;
        for (int64_t block = 0; block < classes; block += 1024) {
            int64_t last = block + 1024 < classes ? block + 1024 : classes;
            W parts[lanes] = {};
            int64_t i = block;
            for (; i + lanes <= last; i += lanes)
                for (int lane = 0; lane < lanes; ++lane) parts[lane] += exponential(to_float(x[i + lane]) - most);
            for (; i < last; ++i) parts[0] += exponential(to_float(x[i]) - most);
            for (int lane = 0; lane < lanes; ++lane) sum += parts[lane];
        }
        W label_logit = to_float(x[labels[row]]);
        loss[row] = W(std::log(sum)) + (most - label_logit);
        W scale = W(grad_scale / sum);
#pragma omp simd
        for (int64_t i = 0; i < classes; ++i) from_float(x + i, exponential(to_float(x[i]) - most) * scale);
        W label_grad = W(grad_scale) * (exponential(label_logit - most) / W(sum) - W(1));
        from_float(x + labels[row], label_grad);
        // exp(-87) is taken for everything below, and a logit of NaN or +inf must not become a number.
        if (!(most - most == 0) || !std::isfinite(sum)) {
            loss[row] = std::numeric_limits<W>::quiet_NaN();
        }
    }
}

template <class T>
void soft_cross_entropy(T* logits, const T* teacher, int64_t classes, const int64_t* labels, double weight,
                        wide<T>* loss, int64_t begin, int64_t end) {
    using W = wide<T>;
    constexpr int lanes = 16;
    for (int64_t row = begin; row < end; ++row) {
        T* x = logits + row * classes;
        const T* t = teacher + row * classes;
        W most = to_float(x[0]), taught_most = to_float(t[0]);
#pragma omp simd reduction(max : most, taught_most)
        for (int64_t i = 0; i < classes; ++i) {
            most = to_float(x[i]) > most ? to_float(x[i]) : most;
            taught_most = to_float(t[i]) > taught_most ? to_float(t[i]) : taught_most;
        }
        // As in cross_entropy; and of the teacher's exponentials, their products with the difference of both logits.
        double sum = 0, taught_sum = 0, product = 0;
        for (int64_t block = 0; block < classes; block += 1024) {
            int64_t last = block + 1024 < classes ? block + 1024 : classes;
            W parts[lanes] = {}, taught_parts[lanes] = {}, products[lanes] = {};
            auto add = [&](int64_t i, int lane) {
                W own = to_float(x[i]) - most, taught = to_float(t[i]) - taught_most, power = exponential(taught);
                parts[lane] += exponential(own);
                taught_parts[lane] += power;
                products[lane] += power * (taught - own);
            };
            int64_t i = block;
            for (; i + lanes <= last; i += lanes)
                for (int lane = 0; lane < lanes; ++lane) add(i + lane, lane);
            for (; i < last; ++i) add(i, 0);
            for (int lane = 0; lane < lanes; ++lane)
                sum += parts[lane], taught_sum += taught_parts[lane], product += products[lane];
        }
        W label_logit = to_float(x[labels[row]]), taught_label_logit = to_float(t[labels[row]]);
        double log_sum = std::log(sum), hard = log_sum + (double(most) - double(label_logit));
        loss[row] = W((1 - weight) * hard + weight * (product / taught_sum - std::log(taught_sum) + log_sum));
        W scale = W(1 / sum), taught_scale = W(weight / taught_sum);
#pragma omp simd
        for (int64_t i = 0; i < classes; ++i)
            from_float(x + i, exponential(to_float(x[i]) - most) * scale -
                                  exponential(to_float(t[i]) - taught_most) * taught_scale);
        from_float(x + labels[row], exponential(label_logit - most) * scale - W(1 - weight) -
                                        exponential(taught_label_logit - taught_most) * taught_scale);
        // As there: what is no number must not become one.
        if (!(most - most == 0) || !(taught_most - taught_most == 0) || !std::isfinite(sum + taught_sum))
            loss[row] = std::numeric_limits<W>::quiet_NaN();
    }
}

// Sixteen running sums: one order for every instruction set, and enough of them to hide an addition's latency.
constexpr int64_t kLanes = 16;

template <class W, class Term>
inline W sum_of(int64_t n, Term term) {
    W parts[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; ++lane) parts[lane] += term(i + lane);
    for (; i < n; ++i) parts[i % kLanes] += term(i);
    W sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += parts[lane];
    return sum;
}

template <class T>
void causal_softmax(T* scores, int64_t ld, int64_t keys, int64_t block, wide<T> scale, wide<T>* log_sums, bool known,
                    int64_t begin, int64_t end) {
    using W = wide<T>;
    std::vector<W> powers(known ? 0 : keys);
    for (int64_t row = begin; row < end; ++row) {
        T* x = scores + row * ld;
        int64_t seen = keys - block + row % block + 1;
        W top;
        if (known) {
            top = log_sums[row];
            // Against rounding, which may put a score just above the sum's logarithm: a probability is at most one.
#pragma omp simd
            for (int64_t i = 0; i < seen; ++i) {
                W power = to_float(x[i]) * scale - top;
                from_float(x + i, exponential(power > 0 ? W(0) : power));
            }
        } else {
            W most = to_float(x[0]) * scale;
#pragma omp simd reduction(max : most)
            for (int64_t i = 0; i < seen; ++i) most = to_float(x[i]) * scale > most ? to_float(x[i]) * scale : most;
            W* to = powers.data();
#pragma omp simd
            for (int64_t i = 0; i < seen; ++i) to[i] = exponential(to_float(x[i]) * scale - most);
            W sum = sum_of<W>(seen, [&](int64_t i) { return to[i]; }), inverse = W(1) / sum;
#pragma omp simd
            for (int64_t i = 0; i < seen; ++i) from_float(x + i, to[i] * inverse);
            log_sums[row] = top = most + std::log(sum);
        }
        if (seen < keys) std::memset(static_cast<void*>(x + seen), 0, (keys - seen) * sizeof(T));
        // A score of NaN or infinity must not become a number.
        if (!(top - top == 0)) from_float(x, std::numeric_limits<W>::quiet_NaN());
    }
}

template <class T>
void softmax_gradient(T* dp, const T* p, int64_t ld, int64_t keys, int64_t block, wide<T> scale, int64_t begin,
                      int64_t end) {
    using W = wide<T>;
    for (int64_t row = begin; row < end; ++row) {
        T* to = dp + row * ld;
        const T* q = p + row * ld;
        int64_t seen = keys - block + row % block + 1;
        W mean = sum_of<W>(seen, [&](int64_t i) { return to_float(to[i]) * to_float(q[i]); });
#pragma omp simd
        for (int64_t i = 0; i < seen; ++i) from_float(to + i, scale * to_float(q[i]) * (to_float(to[i]) - mean));
        if (seen < keys) std::memset(static_cast<void*>(to + seen), 0, (keys - seen) * sizeof(T));
    }
}

template <class T>
void rms_norm(const T* x, int64_t width, const T* weight, double eps, T* y, wide<T>* rstd, int64_t begin, int64_t end) {
    using W = wide<T>;
    for (int64_t row = begin; row < end; ++row) {
        const T* from = x + row * width;
        T* to = y + row * width;
        W squares = sum_of<W>(width, [&](int64_t i) { return to_float(from[i]) * to_float(from[i]); });
        W scale = W(1) / std::sqrt(squares / W(width) + W(eps));
        rstd[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            T normalised;
            from_float(&normalised, to_float(from[i]) * scale);
            from_float(to + i, to_float(weight[i]) * to_float(normalised));
        }
    }
}

template <class T>
void rms_norm_gradient(const T* g, const T* x, int64_t width, const T* weight, const wide<T>* rstd, T* dx,
                       int64_t begin, int64_t end) {
    using W = wide<T>;
    for (int64_t row = begin; row < end; ++row) {
        const T *up = g + row * width, *from = x + row * width;
        T* to = dx + row * width;
        W scale = rstd[row];
        auto upstream = [&](int64_t i) { return to_float(up[i]) * to_float(weight[i]); };
        auto normalised = [&](int64_t i) { return to_float(from[i]) * scale; };
        W mean = sum_of<W>(width, [&](int64_t i) { return upstream(i) * normalised(i); }) / W(width);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) from_float(to + i, scale * (upstream(i) - normalised(i) * mean));
    }
}

template <class T>
void rotary(const T* x, const int64_t strides[3], const T* cos, int64_t cos_batch, const T* sin, int64_t sin_batch,
            T* y, int64_t heads, int64_t tokens, int64_t half, bool back, int64_t begin, int64_t end) {
    using W = wide<T>;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t batch = row / tokens, token = row % tokens;
        const T* c = cos + batch * cos_batch + token * 2 * half;
        const T* s = sin + batch * sin_batch + token * 2 * half;
        // The transposed rotation has the other half's sine, and the other sign.
        const T *s1 = back ? s + half : s, *s2 = back ? s : s + half;
        const W sign = back ? W(-1) : W(1);
        for (int64_t head = 0; head < heads; ++head) {
            const T* from = x + batch * strides[0] + head * strides[1] + token * strides[2];
            T* to = y + (row * heads + head) * 2 * half;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                W first = to_float(from[i]), second = to_float(from[half + i]);
                from_float(to + i, first * to_float(c[i]) - second * (sign * to_float(s1[i])));
                from_float(to + half + i, second * to_float(c[half + i]) + first * (sign * to_float(s2[i])));
            }
        }
    }
}

// The logistic function of x and of -x, neither of them by a difference that would cancel. What is below the smallest
// normal number is zero: times an x of any size it must not become something. A NaN stays one.
template <class W>
struct Logistic {
    W of, of_negative;
    explicit Logistic(W x) {
        constexpr W most = sizeof(W) == 4 ? 87 : 708;  // e^most and its inverse are normal numbers
        W power = exponential(x < -most ? most : -x);
        power = x > most ? W(0) : power;
        W ratio = W(1) / (W(1) + power);
        of = x < -most ? W(0) : ratio;
        of_negative = power * ratio;
    }
};

template <class T>
void gated_silu(const T* gate, const T* up, T* y, int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
        wide<T> x = to_float(gate[j]);
        from_float(y + j, x * Logistic<wide<T>>(x).of * to_float(up[j]));
    }
}

template <class T>
void gated_silu_gradient(const T* g, const T* gate, const T* up, T* dgate, T* dup, int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
        wide<T> x = to_float(gate[j]), upstream = to_float(g[j]);
        Logistic<wide<T>> logistic(x);
        from_float(dgate + j, upstream * to_float(up[j]) * (logistic.of * (1 + x * logistic.of_negative)));
        from_float(dup + j, upstream * (x * logistic.of));
    }
}

// ---- by dtype

#define ACIP_BY_DTYPE(CALL)   \
    switch (dtype) {          \
        case Dtype::f32: {    \
            using T = float;  \
            CALL;             \
            break;            \
        }                     \
        case Dtype::f64: {    \
            using T = double; \
            CALL;             \
            break;            \
        }                     \
        case Dtype::bf16: {   \
            using T = bf16;   \
            CALL;             \
            break;            \
        }                     \
    }

void scale_ranks_of(Dtype dtype, const void* z, int64_t ldz, void* out, int64_t ldout, int64_t rank, const void* s,
                    int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(scale_ranks(static_cast<const T*>(z), ldz, static_cast<T*>(out), ldout, rank,
                              static_cast<const wide<T>*>(s), begin, end))
}

void mask_gradient_of(Dtype dtype, const void* z, int64_t ldz, void* h, int64_t ldh, int64_t tokens, const void* s,
                      void* sum, int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(mask_gradient(static_cast<const T*>(z), ldz, static_cast<T*>(h), ldh, tokens,
                                static_cast<const wide<T>*>(s), static_cast<wide<T>*>(sum), begin, end))
}

void dropout_of(Dtype dtype, const void* x, void* out, bool add, uint64_t seed, uint32_t threshold, double scale,
                int64_t begin, int64_t end) {
    if (add) {
        ACIP_BY_DTYPE((dropout<T, true>(static_cast<const T*>(x), static_cast<T*>(out), seed, threshold,
                                        wide<T>(scale), begin, end)))
    } else {
        ACIP_BY_DTYPE((dropout<T, false>(static_cast<const T*>(x), static_cast<T*>(out), seed, threshold,
                                         wide<T>(scale), begin, end)))
    }
}

void cross_entropy_of(Dtype dtype, void* logits, int64_t classes, const int64_t* labels, int64_t ignore,
                      double grad_scale, void* loss, int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(cross_entropy(static_cast<T*>(logits), classes, labels, ignore, grad_scale,
                                static_cast<wide<T>*>(loss), begin, end))
}

void soft_cross_entropy_of(Dtype dtype, void* logits, const void* teacher, int64_t classes, const int64_t* labels,
                           double weight, void* loss, int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(soft_cross_entropy(static_cast<T*>(logits), static_cast<const T*>(teacher), classes, labels, weight,
                                     static_cast<wide<T>*>(loss), begin, end))
}

void causal_softmax_of(Dtype dtype, void* scores, int64_t ld, int64_t keys, int64_t block, double scale,
                       void* log_sums, bool known, int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(causal_softmax(static_cast<T*>(scores), ld, keys, block, wide<T>(scale),
                                 static_cast<wide<T>*>(log_sums), known, begin, end))
}

void softmax_gradient_of(Dtype dtype, void* dp, const void* p, int64_t ld, int64_t keys, int64_t block, double scale,
                         int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(softmax_gradient(static_cast<T*>(dp), static_cast<const T*>(p), ld, keys, block, wide<T>(scale),
                                   begin, end))
}

void rms_norm_of(Dtype dtype, const void* x, int64_t width, const void* weight, double eps, void* y, void* rstd,
                 int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(rms_norm(static_cast<const T*>(x), width, static_cast<const T*>(weight), eps, static_cast<T*>(y),
                           static_cast<wide<T>*>(rstd), begin, end))
}

void rms_norm_gradient_of(Dtype dtype, const void* g, const void* x, int64_t width, const void* weight,
                          const void* rstd, void* dx, int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(rms_norm_gradient(static_cast<const T*>(g), static_cast<const T*>(x), width,
                                    static_cast<const T*>(weight), static_cast<const wide<T>*>(rstd),
                                    static_cast<T*>(dx), begin, end))
}

void rotary_of(Dtype dtype, const void* x, const int64_t strides[3], const void* cos, int64_t cos_batch,
               const void* sin, int64_t sin_batch, void* y, int64_t heads, int64_t tokens, int64_t half, bool back,
               int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(rotary(static_cast<const T*>(x), strides, static_cast<const T*>(cos), cos_batch,
                         static_cast<const T*>(sin), sin_batch, static_cast<T*>(y), heads, tokens, half, back, begin,
                         end))
}

void gated_silu_of(Dtype dtype, const void* gate, const void* up, void* y, int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(gated_silu(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(y), begin, end))
}

void gated_silu_gradient_of(Dtype dtype, const void* g, const void* gate, const void* up, void* dgate, void* dup,
                            int64_t begin, int64_t end) {
    ACIP_BY_DTYPE(gated_silu_gradient(static_cast<const T*>(g), static_cast<const T*>(gate),
                                      static_cast<const T*>(up), static_cast<T*>(dgate), static_cast<T*>(dup), begin,
                                      end))
}

#define ACIP_TEXT_OF(name) #name
#define ACIP_TEXT(name) ACIP_TEXT_OF(name)

}  // namespace

extern const Training training_table;
const Training training_table = {
    ACIP_TEXT(ACIP_ISA), scale_ranks_of,        mask_gradient_of,  dropout_of,
    cross_entropy_of,    soft_cross_entropy_of, causal_softmax_of, softmax_gradient_of,
    rms_norm_of,         rms_norm_gradient_of,  rotary_of,         gated_silu_of,
    gated_silu_gradient_of,
};

}  // namespace ACIP_ISA
}  // namespace acip
