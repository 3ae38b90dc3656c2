// Compiled once for each instruction set, with ACIP_ISA as its name.
//
// What bounds these products is memory: a weight of 2 bytes takes two operations a token, and two cores that read 30 GB/s
// do 400 of them in the time of one weight's cache line. So rows are read four at a time, each by a stream of its own
// that the processor's prefetcher follows, for up to six tokens at once, whose inputs stay in the first cache; for more
// tokens the same four rows are read again, from the cache.
//
// The loops are templates over how 16 (or 8) weights become floats; with bfloat16 instructions, products of bfloat16
// inputs are 32 at a time. What bounds products of integers is how few operations bring them to a product: codes of 4 bits
// stay integers, where there are instructions for these, and so do those of 8 of one token.
#include "acip/decode.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace acip {
namespace ACIP_ISA {
namespace {

#include "numbers.h"

// ---- vectors of floats

#if defined(__AVX512F__)
struct V {
    static constexpr int64_t n = 16;
    __m512 v;
    static V zero() { return {_mm512_setzero_ps()}; }
    static V of(float value) { return {_mm512_set1_ps(value)}; }
    static V multiply_add(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
    static V multiply(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
};
// The sums of four vectors' lanes: halves are added while they are interleaved, 13 operations for all four.
inline void sums_of(V a, V b, V c, V d, float* out) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    __m512d first = _mm512_castps_pd(ab), second = _mm512_castps_pd(cd);
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const bf16* p) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline V load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline V load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// The low and the high halves of 16 bytes, as the floats that two tables of 16 have for them.
inline void load_halves(const uint8_t* p, const float* low_table, const float* high_table, V& low, V& high) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low.v = _mm512_permutexvar_ps(bytes, _mm512_loadu_ps(low_table));  // looks at four bits of an index
    high.v = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), _mm512_loadu_ps(high_table));
}
#elif defined(__AVX2__)
struct V {
    static constexpr int64_t n = 8;
    __m256 v;
    static V zero() { return {_mm256_setzero_ps()}; }
    static V of(float value) { return {_mm256_set1_ps(value)}; }
    static V multiply_add(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static V add(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
    static V multiply(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
};
inline void sums_of(V a, V b, V c, V d, float* out) {
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline V load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline V load(const bf16* p) {
    __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline V load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline V load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline __m256 look_up(__m256i index, const float* table) {
    __m256 a = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // by bit 3
}
inline void load_halves(const uint8_t* p, const float* low_table, const float* high_table, V& low, V& high) {
    __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    low.v = look_up(bytes, low_table);
    high.v = look_up(_mm256_srli_epi32(bytes, 4), high_table);
}
#else
struct V {
    static constexpr int64_t n = 8;
    float v[8];
    static V zero() { return {}; }
    static V of(float value) {
        V result;
        for (float& lane : result.v) lane = value;
        return result;
    }
    static V multiply_add(V a, V b, V c) {
        for (int i = 0; i < 8; ++i) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    static V add(V a, V b) {
        for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
        return a;
    }
};
inline void sums_of(V a, V b, V c, V d, float* out) {
    const V* all[] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; ++i) {
        const float* v = all[i]->v;
        out[i] = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    }
}
template <class T>
inline V load(const T* p) {
    V result;
    for (int i = 0; i < 8; ++i) result.v[i] = to_float(p[i]);
    return result;
}
inline V load(const int8_t* p) {
    V result;
    for (int i = 0; i < 8; ++i) result.v[i] = p[i];
    return result;
}
inline void load_halves(const uint8_t* p, const float* low_table, const float* high_table, V& low, V& high) {
    for (int i = 0; i < 8; ++i) {
        low.v[i] = low_table[p[i] & 15];
        high.v[i] = high_table[p[i] >> 4];
    }
}
#endif

// The first `count` of a vector, zero behind them: for the end of a row, behind which may be anything or nothing.
#if defined(__AVX512F__)
inline V load_part(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p)}; }
template <class T>
inline V load_part(const T* p, int64_t count) {
    T whole[V::n];
    if constexpr (sizeof(T) == 1)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(whole), _mm_maskz_loadu_epi8(__mmask16((1u << count) - 1), p));
    else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole),
                            _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
    return load(whole);  // the compiler sees through the array
}
#else
template <class T>
inline V load_part(const T* p, int64_t count) {
    T whole[V::n] = {};
    if constexpr (sizeof(T) == 4) {
        std::memcpy(whole, p, count * sizeof(T));
        return load(whole);
    }
    // A copy of a length that the compiler does not know is a call: two of a length that it knows, which overlap.
    const char* from = reinterpret_cast<const char*>(p);
    const int64_t bytes = count * int64_t(sizeof(T));
    auto both = [&](auto half) __attribute__((always_inline)) {
        auto second = half;
        std::memcpy(&half, from, sizeof half);
        std::memcpy(&second, from + bytes - sizeof half, sizeof half);
        std::memcpy(whole, &half, sizeof half);
        std::memcpy(reinterpret_cast<char*>(whole) + bytes - sizeof half, &second, sizeof half);
    };
    if (bytes >= 8) both(uint64_t());
    else if (bytes >= 4) both(uint32_t());
    else if (bytes >= 2) both(uint16_t());
    else if (bytes == 1) both(uint8_t());
    return load(whole);
}
#endif

// The processor's own prefetcher stops at a page's end, and leaves some of the waiting where there is more to do than to
// read, for integers and for several tokens: streams are asked for ahead, from memory, and then, with `near`, from the
// second cache. (Floats of 2 to 8 tokens are a tenth faster by either. Of one token, which does little but wait for
// memory, the second is a loss, and so is asking twice as far ahead.)
inline void fetch(const void* weights, bool near) {
    __builtin_prefetch(static_cast<const char*>(weights) + 4096, 0, 2);
    if (near) __builtin_prefetch(static_cast<const char*>(weights) + 512, 0, 3);
}
// Where integers are multiplied as integers there is less to do between two lines, and more of them are under way.
inline void fetch_further(const void* weights) {
    __builtin_prefetch(static_cast<const char*>(weights) + 6144, 0, 2);
    __builtin_prefetch(static_cast<const char*>(weights) + 1024, 0, 3);
}

// ---- four rows, T tokens

constexpr int64_t kRows = 4;
constexpr int64_t kTokens = 6;
// Sums are finished for this many fours at a time: what a row takes besides its weights is then vectors too.
constexpr int64_t kSteps = 16;
using Sums = float[kRows][kSteps];  // of a token

inline void put(V a, V b, V c, V d, Sums& sums, int64_t step) {
    float four[kRows];
    sums_of(a, b, c, d, four);
    for (int64_t r = 0; r < kRows; ++r) sums[r][step] = four[r];
}

// Rows of W, a type that `load` makes floats of.
template <class W, class X, int64_t T>
inline void rows(const Matrix& matrix, const int64_t (&at)[kRows], const X* x, int64_t x_stride, Sums* out,
                 int64_t step) {
    // One token has too few sums to hide an addition's latency: they are doubled.
    constexpr int64_t kSums = T == 1 ? 2 : 1;
    const W* w[kRows];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
        w[r] = reinterpret_cast<const W*>(static_cast<const char*>(matrix.data) + at[r] * matrix.stride);
    V sums[kSums][kRows][T];
#pragma GCC unroll 8
    for (int64_t u = 0; u < kSums; ++u)
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int64_t t = 0; t < T; ++t) sums[u][r][t] = V::zero();
    int64_t j = 0;
    for (; j + kSums * V::n <= matrix.cols; j += kSums * V::n) {
#pragma GCC unroll 8
        for (int64_t u = 0; u < kSums; ++u) {
            V weights[kRows];
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) {
                const int64_t column = j + u * V::n;
                if (V::n * sizeof(W) == 64 || column * sizeof(W) % 64 == 0)  // once a cache line
                    fetch(w[r] + column, T > 1 || __is_same(W, int8_t));
                weights[r] = load(w[r] + column);
            }
#pragma GCC unroll 8
            for (int64_t t = 0; t < T; ++t) {
                V input = load(x + t * x_stride + j + u * V::n);
#pragma GCC unroll 8
                for (int64_t r = 0; r < kRows; ++r)
                    sums[u][r][t] = V::multiply_add(weights[r], input, sums[u][r][t]);
            }
        }
    }
    for (; j < matrix.cols; j += V::n) {
        int64_t left = matrix.cols - j < V::n ? matrix.cols - j : V::n;
        for (int64_t t = 0; t < T; ++t) {
            V input = load_part(x + t * x_stride + j, left);
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r)
                sums[0][r][t] = V::multiply_add(load_part(w[r] + j, left), input, sums[0][r][t]);
        }
    }
#pragma GCC unroll 8
    for (int64_t t = 0; t < T; ++t) {
        if (kSums == 2)
            for (int64_t r = 0; r < kRows; ++r) sums[0][r][t] = V::add(sums[0][r][t], sums[kSums - 1][r][t]);
        put(sums[0][0][t], sums[0][1][t], sums[0][2][t], sums[0][3][t], out[t], step);
    }
}

#if defined(__AVX512BF16__)
// Both bfloat16: 32 products at a time.
inline __m512bh load_32(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load_32(const bf16* p, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, p); }

template <int64_t T>
inline void rows_bf16(const Matrix& matrix, const int64_t (&at)[kRows], const bf16* x, int64_t x_stride, Sums* out,
                      int64_t step) {
    constexpr int64_t kSums = T == 1 ? 2 : 1;
    const bf16* w[kRows];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
        w[r] = reinterpret_cast<const bf16*>(static_cast<const char*>(matrix.data) + at[r] * matrix.stride);
    __m512 sums[kSums][kRows][T];
#pragma GCC unroll 8
    for (int64_t u = 0; u < kSums; ++u)
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int64_t t = 0; t < T; ++t) sums[u][r][t] = _mm512_setzero_ps();
    int64_t j = 0;
    for (; j + kSums * 32 <= matrix.cols; j += kSums * 32) {
#pragma GCC unroll 8
        for (int64_t u = 0; u < kSums; ++u) {
            __m512bh weights[kRows];
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) {
                fetch(w[r] + j + u * 32, T > 1);
                weights[r] = load_32(w[r] + j + u * 32);
            }
#pragma GCC unroll 8
            for (int64_t t = 0; t < T; ++t) {
                __m512bh input = load_32(x + t * x_stride + j + u * 32);
#pragma GCC unroll 8
                for (int64_t r = 0; r < kRows; ++r)
                    sums[u][r][t] = _mm512_dpbf16_ps(sums[u][r][t], weights[r], input);
            }
        }
    }
    for (; j < matrix.cols; j += 32) {
        int64_t left = matrix.cols - j < 32 ? matrix.cols - j : 32;
        __mmask32 mask = __mmask32((uint64_t(1) << left) - 1);
#pragma GCC unroll 8
        for (int64_t t = 0; t < T; ++t) {
            __m512bh input = load_32(x + t * x_stride + j, mask);
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r)
                sums[0][r][t] = _mm512_dpbf16_ps(sums[0][r][t], load_32(w[r] + j, mask), input);
        }
    }
#pragma GCC unroll 8
    for (int64_t t = 0; t < T; ++t) {
        if (kSums == 2)
            for (int64_t r = 0; r < kRows; ++r) sums[0][r][t] = _mm512_add_ps(sums[0][r][t], sums[kSums - 1][r][t]);
        put(V{sums[0][0][t]}, V{sums[0][1][t]}, V{sums[0][2][t]}, V{sums[0][3][t]}, out[t], step);
    }
}
#endif

// ---- 4 bits

// For each zero, the numbers that the 16 codes stand for.
struct Tables {
    float numbers[16][16];
    constexpr Tables() : numbers() {
        for (int zero = 0; zero < 16; ++zero)
            for (int code = 0; code < 16; ++code) numbers[zero][code] = float(code - zero);
    }
};
alignas(64) constexpr Tables kTables;

#if defined(__AVX512BF16__)
// The bits of the bfloat16 of a whole number from 0 to 255.
constexpr uint16_t bf16_of(int value) {
    int exponent = 0;
    while ((value >> exponent) > 1) ++exponent;
    return value ? uint16_t((127 + exponent) << 7 | ((value << (15 - exponent) >> 8) & 0x7f)) : uint16_t(0);
}

// Both bytes of the bfloat16 of 0 to 127; 16 and each code, twice, as an index has a bit of the next code above its
// four; and the places of every other of 64 words.
struct Numbers {
    uint8_t low[128], high[128];
    uint16_t sixteen_and[32], even[32];
    constexpr Numbers() : low(), high(), sixteen_and(), even() {
        for (int i = 0; i < 128; ++i) low[i] = uint8_t(bf16_of(i)), high[i] = uint8_t(bf16_of(i) >> 8);
        for (int i = 0; i < 32; ++i) sixteen_and[i] = bf16_of(16 + i % 16), even[i] = uint16_t(2 * i);
    }
};
alignas(64) constexpr Numbers kNumbers;
#endif

struct Int4Row {
    const uint8_t* codes;
    const bf16* scales;
    const uint8_t* zeros;

    Int4Row() = default;
    Int4Row(const Matrix& matrix, int64_t groups, int64_t row)
        : codes(static_cast<const uint8_t*>(matrix.data) + row * matrix.stride) {
        scales = static_cast<const bf16*>(matrix.scales) + row * groups;
        zeros = matrix.zeros ? matrix.zeros + row * groups : nullptr;
    }
    int zero(int64_t group) const { return zeros ? zeros[group] & 15 : 8; }
};

// A group is 2 to the power of this many columns: a division would take as long as some of a short row's weights.
inline int group_bits(const Matrix& matrix) { return __builtin_ctzll(uint64_t(matrix.group)); }
inline int64_t groups_of(const Matrix& matrix, int64_t cols) {
    return (cols + matrix.group - 1) >> group_bits(matrix);
}

// ---- integers as integers

// Codes are multiplied as they are, by inputs as whole numbers of a unit that a group of columns shares: in `kDigits`
// digits of 8 bits, for the instructions that multiply codes by bytes and add up, exactly. The unit is a power of two, so
// that the largest input of a group has 15 bits (bfloat16) or 22: an input is off by half a unit at most, 2^-15 or 2^-22
// of the largest, and not at all if it is a bfloat16 of more than 2^-7 of the largest. An infinity or a NaN makes its
// group's unit a NaN, and so every output.
template <class X>
constexpr int kDigits = sizeof(X) == 2 && !__is_same(X, f16) ? 2 : 3;

struct Digits {
    const int8_t* x = nullptr;  // for each vector of codes, from the uppermost digit on, what its parts are multiplied by
    const float* units;         // of each group
    const float* less;          // 4 bits: -unit · Σ x of each group, for its zero
    const int32_t* starts;      // 8 bits: -128 Σ x of a lane's columns
    int64_t stride, groups, starts_stride;  // from one token to the next

    Digits from(int64_t token) const {
        Digits to = *this;
        to.x += token * stride, to.units += token * groups, to.less += token * groups;
        to.starts += token * starts_stride;
        return to;
    }
};

#if defined(__AVX512F__)
// A vector of codes is two blocks of 64 columns.
using Codes = __m512i;
constexpr int64_t kColumns4 = 128;
inline Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes load_half_codes(const uint8_t* p) { return _mm512_maskz_loadu_epi64(0x0f, p); }
inline Codes zero_codes() { return _mm512_setzero_si512(); }
inline Codes low_halves(Codes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Codes high_halves(Codes v) { return low_halves(_mm512_srli_epi16(v, 4)); }
inline Codes next_digit(Codes sum) { return _mm512_slli_epi32(sum, 8); }
inline V as_floats(Codes sum) { return {_mm512_cvtepi32_ps(sum)}; }
inline Codes add(Codes a, Codes b) { return _mm512_add_epi32(a, b); }
inline Codes sizes_of(V v) { return _mm512_and_si512(_mm512_castps_si512(v.v), _mm512_set1_epi32(0x7fffffff)); }
inline Codes largest(Codes a, Codes b) { return _mm512_max_epi32(a, b); }
inline Codes nearest(V v, int32_t most) {
    return _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(v.v), _mm512_set1_epi32(most)), _mm512_set1_epi32(-most));
}
inline int32_t largest_of(Codes v) { return _mm512_reduce_max_epi32(v); }
inline int32_t sum_of(Codes v) { return _mm512_reduce_add_epi32(v); }
// The lowest digit, from -128 to 127, goes to memory; what is left of the others.
inline Codes take_digit(Codes v, int8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v));
    return _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
}
#if defined(__AVX512VNNI__)
inline Codes dot(Codes sum, Codes codes, const int8_t* x) {
    return _mm512_dpbusd_epi32(sum, codes, _mm512_loadu_si512(x));
}
inline Codes dot(Codes sum, Codes low, Codes high, const int8_t* x) { return dot(dot(sum, low, x), high, x + 64); }
#else
inline __m512i words(Codes codes, const int8_t* x) { return _mm512_maddubs_epi16(codes, _mm512_loadu_si512(x)); }
inline Codes add_words(Codes sum, __m512i words) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
}
inline Codes dot(Codes sum, Codes codes, const int8_t* x) { return add_words(sum, words(codes, x)); }
inline Codes dot(Codes sum, Codes low, Codes high, const int8_t* x) {
    return add_words(sum, _mm512_add_epi16(words(low, x), words(high, x + 64)));
}
#endif

// Where the numbers of the groups of a vector's lanes are: half of the lanes are of each block.
struct Place {
    __m512i column = _mm512_maskz_set1_epi32(0xff00, 64);
    __m128i bits;
    explicit Place(int bits) : bits(_mm_cvtsi32_si128(bits)) {}
    __m512i low() const { return _mm512_srl_epi32(column, bits); }
    __m512i high() const { return _mm512_add_epi32(low(), _mm512_set1_epi32(1)); }  // of groups of 32
    void next() { column = _mm512_add_epi32(column, _mm512_set1_epi32(kColumns4)); }
};
inline V at(const V& groups, __m512i place) { return {_mm512_permutexvar_ps(place, groups.v)}; }
#elif defined(__AVX2__)
using Codes = __m256i;
constexpr int64_t kColumns4 = 64;
inline Codes load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Codes load_half_codes(const uint8_t* p) { return load_codes(p); }  // is not called
inline Codes zero_codes() { return _mm256_setzero_si256(); }
inline Codes low_halves(Codes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Codes high_halves(Codes v) { return low_halves(_mm256_srli_epi16(v, 4)); }
inline Codes next_digit(Codes sum) { return _mm256_slli_epi32(sum, 8); }
inline V as_floats(Codes sum) { return {_mm256_cvtepi32_ps(sum)}; }
inline Codes add(Codes a, Codes b) { return _mm256_add_epi32(a, b); }
inline Codes sizes_of(V v) { return _mm256_and_si256(_mm256_castps_si256(v.v), _mm256_set1_epi32(0x7fffffff)); }
inline Codes largest(Codes a, Codes b) { return _mm256_max_epi32(a, b); }
inline Codes nearest(V v, int32_t most) {
    return _mm256_max_epi32(_mm256_min_epi32(_mm256_cvtps_epi32(v.v), _mm256_set1_epi32(most)), _mm256_set1_epi32(-most));
}
inline int32_t largest_of(Codes v) {
    alignas(32) int32_t all[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(all), v);
    int32_t most = all[0];
    for (int32_t one : all) most = one > most ? one : most;
    return most;
}
inline int32_t sum_of(Codes v) {
    alignas(32) int32_t all[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(all), v);
    int32_t sum = 0;
    for (int32_t one : all) sum += one;
    return sum;
}
inline Codes take_digit(Codes v, int8_t* to) {
    const __m256i first_bytes = _mm256_shuffle_epi8(v, _mm256_set1_epi32(0x0c080400));
    const int32_t low = _mm256_extract_epi32(first_bytes, 0), high = _mm256_extract_epi32(first_bytes, 4);
    std::memcpy(to, &low, 4);
    std::memcpy(to + 4, &high, 4);
    return _mm256_srai_epi32(_mm256_add_epi32(v, _mm256_set1_epi32(128)), 8);
}
inline __m256i words(Codes codes, const int8_t* x) {
    return _mm256_maddubs_epi16(codes, load_codes(reinterpret_cast<const uint8_t*>(x)));
}
inline Codes add_words(Codes sum, __m256i words) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
inline Codes dot(Codes sum, Codes codes, const int8_t* x) { return add_words(sum, words(codes, x)); }
inline Codes dot(Codes sum, Codes low, Codes high, const int8_t* x) {
    return add_words(sum, _mm256_add_epi16(words(low, x), words(high, x + 32)));
}

struct Place {
    int64_t column = 0;
    int bits;
    explicit Place(int bits) : bits(bits) {}
    int64_t low() const { return column >> bits; }
    int64_t high() const { return low() + 1; }
    void next() { column += kColumns4; }
};
inline V at(const V& groups, int64_t place) { return V::of(reinterpret_cast<const float*>(&groups)[place]); }
#endif

#if defined(__AVX2__)
// kHalves: groups of 32, so that each half of a block has a scale of its own.
template <class X, int64_t T, bool kHalves>
inline void rows_i4(const Matrix& matrix, const int64_t (&rows)[kRows], const Digits& x, Sums* out, int64_t step) {
    constexpr int64_t kBytes = sizeof(Codes);
    const int bits = group_bits(matrix);
    const int64_t all_groups = groups_of(matrix, matrix.cols), columns = V::n << bits;
    Int4Row w[kRows];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) w[r] = Int4Row(matrix, all_groups, rows[r]);
    V sums[kRows][T];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int64_t t = 0; t < T; ++t) sums[r][t] = V::zero();
    // As many groups at a time as a vector has lanes: their scales times the inputs' units, and what zeros take off.
    for (int64_t first = 0; first < matrix.cols; first += columns) {
        const int64_t group = first >> bits, left = all_groups - group < V::n ? all_groups - group : V::n;
        V units[kRows][T];
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r) {
            const int8_t* zeros = reinterpret_cast<const int8_t*>(w[r].zeros) + group;  // up to 15
            V scale, zero = V::of(8.0f);
            if (left == V::n) {
                scale = load(w[r].scales + group);
                if (matrix.zeros) zero = load(zeros);
            } else {
                scale = load_part(w[r].scales + group, left);
                if (matrix.zeros) zero = load_part(zeros, left);
            }
            zero = V::multiply(zero, scale);
#pragma GCC unroll 8
            for (int64_t t = 0; t < T; ++t) {
                units[r][t] = V::multiply(scale, load(x.units + t * x.groups + group));
                sums[r][t] = V::multiply_add(zero, load(x.less + t * x.groups + group), sums[r][t]);
            }
        }
        Place place(bits);
        auto some = [&](int64_t j, auto load) __attribute__((always_inline)) {
            const auto low_place = place.low(), high_place = place.high();
            place.next();
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) {
                const uint8_t* bytes = w[r].codes + (uint64_t(j) >> 1);
                fetch_further(bytes);
                const Codes codes = load(bytes), low = low_halves(codes), high = high_halves(codes);
#pragma GCC unroll 8
                for (int64_t t = 0; t < T; ++t) {
                    const int8_t* digit = x.x + t * x.stride + uint64_t(j) * kDigits<X>;
                    if (kHalves) {
                        Codes first_sum = zero_codes(), second_sum = zero_codes();
#pragma GCC unroll 8
                        for (int d = 0; d < kDigits<X>; ++d, digit += 2 * kBytes) {
                            if (d) first_sum = next_digit(first_sum), second_sum = next_digit(second_sum);
                            first_sum = dot(first_sum, low, digit);
                            second_sum = dot(second_sum, high, digit + kBytes);
                        }
                        sums[r][t] = V::multiply_add(as_floats(first_sum), at(units[r][t], low_place), sums[r][t]);
                        sums[r][t] = V::multiply_add(as_floats(second_sum), at(units[r][t], high_place), sums[r][t]);
                    } else {
                        Codes sum = zero_codes();
#pragma GCC unroll 8
                        for (int d = 0; d < kDigits<X>; ++d, digit += 2 * kBytes)
                            sum = dot(d ? next_digit(sum) : sum, low, high, digit);
                        sums[r][t] = V::multiply_add(as_floats(sum), at(units[r][t], low_place), sums[r][t]);
                    }
                }
            }
        };
        const int64_t end = matrix.cols - first < columns ? matrix.cols : first + columns;
        int64_t j = first;
        for (; j + kColumns4 / 2 < end; j += kColumns4) some(j, load_codes);
        if (j < end) kColumns4 == 64 ? some(j, load_codes) : some(j, load_half_codes);
    }
#pragma GCC unroll 8
    for (int64_t t = 0; t < T; ++t) put(sums[0][t], sums[1][t], sums[2][t], sums[3][t], out[t], step);
}

// 8 bits, of one token: a code and 128 make a byte without a sign, and what that is too much the sums begin below nothing
// with. 128 columns share a unit, 64 are a vector of codes.
constexpr int64_t kUnit8 = 128;
#if defined(__AVX512VNNI__)
inline void rows_i8(const Matrix& matrix, const int64_t (&rows)[kRows], const Digits& x, Sums* out, int64_t step) {
    constexpr int D = kDigits<bf16>;
    const int8_t* w[kRows];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) w[r] = static_cast<const int8_t*>(matrix.data) + rows[r] * matrix.stride;
    V sums[kRows] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
    auto some = [&](int64_t j, auto load) __attribute__((always_inline)) {
        const int8_t* digits = x.x + D * j;
        __m512i upper[kRows], lower[kRows];
#pragma GCC unroll 8
        for (int64_t half = 0; half < 2; ++half)
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) {
                const int8_t* p = w[r] + j + 64 * half;
                fetch_further(p);
                const __m512i codes = _mm512_xor_si512(load(p, half), sign);
                upper[r] = dot(half ? upper[r] : zero_codes(), codes, digits + 64 * half);
                lower[r] = dot(half ? lower[r] : _mm512_loadu_si512(x.starts + j / 8), codes, digits + 128 + 64 * half);
            }
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r)
            sums[r] = V::multiply_add(as_floats(_mm512_add_epi32(next_digit(upper[r]), lower[r])),
                                      V::of(x.units[j / kUnit8]), sums[r]);
    };
    int64_t j = 0;
    for (; j + kUnit8 <= matrix.cols; j += kUnit8)
        some(j, [](const int8_t* p, int64_t) { return _mm512_loadu_si512(p); });
    if (const int64_t left = matrix.cols - j)
        some(j, [&](const int8_t* p, int64_t half) __attribute__((always_inline)) {
            const int64_t count = left - 64 * half;
            return _mm512_maskz_loadu_epi8(count >= 64 ? ~__mmask64(0) : count > 0 ? (__mmask64(1) << count) - 1 : 0, p);
        });
    put(sums[0], sums[1], sums[2], sums[3], out[0], step);
}
#endif

// One token's digits for codes of 4 bits of groups of `group` columns, or of 8 bits; room up to whole vectors of codes.
template <class X>
inline void digits_of(const X* x, int64_t cols, int64_t group, bool four, int8_t* out, float* units, float* less,
                      [[maybe_unused]] int32_t* starts) {
    constexpr int D = kDigits<X>, kBits = D == 2 ? 15 : 22;
    constexpr int32_t kMost = D == 2 ? 0x7f7f : 0x7f7f7f;  // which an input of 15 bits may exceed by one
    const int64_t step = four ? kColumns4 : kUnit8;
    int64_t g = 0;
    for (int64_t j = 0; j < cols; j += group, ++g) {
        auto inputs = [&](int64_t i) __attribute__((always_inline)) {
            const int64_t left = cols - j - i;
            return left >= V::n ? load(x + j + i) : left > 0 ? load_part(x + j + i, left) : V::zero();
        };
        Codes sizes = zero_codes(), sums = zero_codes();  // sizes by their bits, of which a NaN's are the largest
        for (int64_t i = 0; i < group; i += V::n) sizes = largest(sizes, sizes_of(inputs(i)));
        const int found = largest_of(sizes) >> 23, exponent = found < kBits ? kBits : found;
        const V to = V::of(__builtin_bit_cast(float, uint32_t(253 + kBits - exponent) << 23));
        units[g] = __builtin_bit_cast(float, found == 255 ? 0x7fc00000u : uint32_t(exponent + 1 - kBits) << 23);
        for (int64_t i = 0; i < group; i += V::n) {
            Codes rest = nearest(V::multiply(inputs(i), to), kMost);
            sums = add(sums, rest);
            // Of 4 bits: all low halves of a vector of codes, and then its high ones.
            const int64_t column = j + i, within = column % step, block = within / 64, half = within / 32 % 2;
            const int64_t place = four ? half * (step / 2) + block * 32 + within % 32 : within;
            for (int d = D - 1; d >= 0; --d) rest = take_digit(rest, out + (column - within) * D + d * step + place);
        }
        if (four) less[g] = -units[g] * float(sum_of(sums));
#if defined(__AVX512VNNI__)
        if (!four) {
            sums = zero_codes();
            for (int d = 0; d < D; ++d)
                for (int half = 0; half < 2; ++half)
                    sums = dot(half || !d ? sums : next_digit(sums), _mm512_set1_epi8(1), out + j * D + d * step + 64 * half);
            _mm512_storeu_si512(starts + g * 16, _mm512_sub_epi32(zero_codes(), _mm512_slli_epi32(sums, 7)));
        }
#endif
    }
    for (; g % 16; ++g) {
        units[g] = 0.0f;
        if (four) less[g] = 0.0f;
    }
}
#else
// x has zeros behind its columns up to a whole block. A block's two halves of 32 columns may be of two groups; groups of
// 64 and 128 are summed by halves too.
template <int64_t T>
inline void rows_i4(const Matrix& matrix, const int64_t (&at)[kRows], const float* x, int64_t x_stride, Sums* out,
                    int64_t step) {
    const int bits = group_bits(matrix);
    const int64_t groups = groups_of(matrix, matrix.cols), last = groups - 1;
    Int4Row w[kRows];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) w[r] = Int4Row(matrix, groups, at[r]);
    V sums[kRows][T];
    for (int64_t r = 0; r < kRows; ++r)
        for (int64_t t = 0; t < T; ++t) sums[r][t] = V::zero();
    for (int64_t j = 0; j < matrix.cols; j += 64) {
        int64_t low_group = j >> bits, high_group = (j + 32) >> bits;
        high_group = high_group < last ? high_group : last;  // beyond the last column there are only zeros
        for (int64_t r = 0; r < kRows; ++r) {
            fetch(w[r].codes + j / 2, true);
            const float* low_table = kTables.numbers[w[r].zero(low_group)];
            const float* high_table = kTables.numbers[w[r].zero(high_group)];
            V low[T], high[T];
            for (int64_t t = 0; t < T; ++t) low[t] = high[t] = V::zero();
            for (int64_t i = 0; i < 32; i += V::n) {
                V low_weight, high_weight;
                load_halves(w[r].codes + j / 2 + i, low_table, high_table, low_weight, high_weight);
#pragma GCC unroll 8
                for (int64_t t = 0; t < T; ++t) {
                    const float* input = x + t * x_stride + j + i;
                    low[t] = V::multiply_add(low_weight, load(input), low[t]);
                    high[t] = V::multiply_add(high_weight, load(input + 32), high[t]);
                }
            }
            V low_scale = V::of(to_float(w[r].scales[low_group])), high_scale = V::of(to_float(w[r].scales[high_group]));
#pragma GCC unroll 8
            for (int64_t t = 0; t < T; ++t) {
                sums[r][t] = V::multiply_add(low[t], low_scale, sums[r][t]);
                sums[r][t] = V::multiply_add(high[t], high_scale, sums[r][t]);
            }
        }
    }
    for (int64_t t = 0; t < T; ++t) put(sums[0][t], sums[1][t], sums[2][t], sums[3][t], out[t], step);
}

#endif

#if defined(__AVX512BF16__)
// ---- integers as bfloat16, which holds them exactly: 64 bytes of codes at a time, in the order in which they come apart

// The inputs in that order, with zeros behind the last. Of 4 bits also what sums begin with, 16 lanes for two blocks, and
// the inputs' sums over each group, in sixteens. few: for so few tokens that 8 bits are looked up.
struct Inputs {
    const bf16* x;
    int64_t stride;
    const float* starts;
    const float* sums;
    int64_t sums_stride;
    bool few;
};
constexpr int64_t kFew = 4;

inline __m512bh load_32(const bf16* p, int64_t left) {
    return load_32(p, left >= 32 ? ~__mmask32(0) : left > 0 ? (__mmask32(1) << left) - 1 : 0);
}

// 8 bits, looked up: columns 16 i to 16 i + 7 of each 64, and then the others. Converted: as they are.
constexpr int64_t kColumns8 = 64;
inline void arrange_i8(const bf16* x, int64_t cols, bool few, bf16* out) {
    for (int64_t j = 0; j < cols; j += kColumns8) {
        __m512i first = (__m512i)load_32(x + j, cols - j), second = (__m512i)load_32(x + j + 32, cols - j - 32);
        _mm512_storeu_si512(out + j, few ? _mm512_shuffle_i64x2(first, second, 0x88) : first);
        _mm512_storeu_si512(out + j + 32, few ? _mm512_shuffle_i64x2(first, second, 0xdd) : second);
    }
}

// 4 bits: a word of 16 bits has four codes, from its lowest bits on of columns 2 i, 2 i + 32, 2 i + 1 and 2 i + 33 of a
// block, and 32 words are two blocks.
// starts: `start` times the inputs that a lane of two blocks' products takes.
inline void arrange_i4(const bf16* x, int64_t cols, int64_t group, float start, bf16* out, float* starts, float* sums) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    const __m512i even = _mm512_load_si512(kNumbers.even);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int64_t j = 0; j < cols; j += kColumns4) {
        __m512i part[4];
        for (int64_t i = 0; i < 4; ++i) part[i] = (__m512i)load_32(x + j + 32 * i, cols - j - 32 * i);
        __m512 low = _mm512_setzero_ps(), high = low;
        for (int64_t i = 0; i < 4; ++i) {
            __m512i mixed = _mm512_permutex2var_epi16(part[i % 2], i < 2 ? even : odd, part[i % 2 + 2]);
            _mm512_storeu_si512(out + j + 32 * i, mixed);
            __m512& sum = i % 2 ? high : low;
            sum = _mm512_dpbf16_ps(sum, ones, (__m512bh)mixed);
        }
        const __m512 by = _mm512_set1_ps(start);
        if (group == 32) {
            _mm512_storeu_ps(starts + j / 4, _mm512_mul_ps(low, by));
            _mm512_storeu_ps(starts + j / 4 + 16, _mm512_mul_ps(high, by));
        } else {
            _mm512_storeu_ps(starts + j / 8, _mm512_mul_ps(_mm512_add_ps(low, high), by));
        }
    }
    if (!sums) return;
    int64_t g = 0;
    for (int64_t j = 0; j < cols; j += group, ++g) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = j; i < j + group; i += 32) sum = _mm512_dpbf16_ps(sum, ones, load_32(x + i, cols - i));
        sums[g] = _mm512_reduce_add_ps(sum);
    }
    for (; g % 16; ++g) sums[g] = 0.0f;
}

// A code q in the upper bits of the mantissa is the bfloat16 16 + q, whatever its zero: of a group of any zero it takes
// one look-up or two operations. What that is too much, 24 times the inputs for a zero of 8, a lane's sum begins below
// nothing with, which takes no operation; where groups have zeros of their own that is 16 times the inputs, and the zeros
// are taken off with the group's sum. These are sums in float32 of numbers up to 31 times an input, and products of
// integers, exact unless inputs of a group are of very different sizes. kHalves: groups of 32, so that each half of a
// block has a scale of its own. Scales of 32 groups are a register, as they are stored: a word of it moved to the upper
// half of a lane is that scale as a float.
template <int64_t T, bool kHalves>
inline void rows_i4_bf16(const Matrix& matrix, const int64_t (&at)[kRows], const Inputs& x, Sums* out, int64_t step) {
    constexpr int64_t kGroups = 32;
    const int bits = group_bits(matrix);
    const int64_t all_groups = groups_of(matrix, matrix.cols), columns = kGroups << bits;
    const int64_t starts_stride = x.stride / (kHalves ? 4 : 8);
    Int4Row w[kRows];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) w[r] = Int4Row(matrix, all_groups, at[r]);
    __m512 sums[kRows][T];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int64_t t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
    // Where a lane's scale is: half of a sum's lanes are of each of two blocks.
    const __m512i first_place = _mm512_maskz_set1_epi16(0xffff0000u, kHalves ? 2 : 64);
    const __m512i next_place = _mm512_set1_epi16(kHalves ? 4 : kColumns4);
    const __m128i shift = _mm_cvtsi32_si128(bits);
    const __m512i table = _mm512_load_si512(kNumbers.sixteen_and), mantissa = _mm512_set1_epi16(0x0078),
                  sixteen = _mm512_set1_epi16(0x4180);
    for (int64_t first = 0; first < matrix.cols; first += columns) {
        const int64_t group = first >> bits, left = all_groups - group;
        const __mmask32 some = left < kGroups ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
        __m512i scales[kRows];
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r) scales[r] = _mm512_maskz_loadu_epi16(some, w[r].scales + group);
        if (matrix.zeros)
            for (int64_t g = 0; g < left && g < kGroups; g += 16)
#pragma GCC unroll 8
                for (int64_t r = 0; r < kRows; ++r) {
                    __m256i stored = _mm256_maskz_loadu_epi16(__mmask16(some >> g), w[r].scales + group + g);
                    __m128i zeros = _mm_maskz_loadu_epi8(__mmask16(some >> g), w[r].zeros + group + g);
                    __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
                    __m512 offset = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros)));
#pragma GCC unroll 8
                    for (int64_t t = 0; t < T; ++t)
                        sums[r][t] = _mm512_fnmadd_ps(offset, _mm512_loadu_ps(x.sums + t * x.sums_stride + group + g),
                                                      sums[r][t]);
                }
        __m512i place = first_place;
        auto two_blocks = [&](int64_t j, __mmask8 mask) __attribute__((always_inline)) {
            const __m512i low_place = kHalves ? place : _mm512_srl_epi16(place, shift);
            const __m512i high_place = _mm512_add_epi16(low_place, _mm512_set1_epi16(1));
            place = _mm512_add_epi16(place, next_place);
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) {
                const uint8_t* bytes = w[r].codes + (uint64_t(j) >> 1);
                fetch(bytes, true);
                __m512i codes = _mm512_maskz_loadu_epi64(mask, bytes);
                auto code = [&](int right) __attribute__((always_inline)) {
                    return (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, right), mantissa, sixteen, 0xea);
                };
                auto scale_at = [&](__m512i words) __attribute__((always_inline)) {
                    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, words, scales[r]));
                };
                // The lowest four bits are looked up, by five, instead of shifted.
                __m512bh weights[4] = {(__m512bh)_mm512_permutexvar_epi16(codes, table), code(1), code(5), code(9)};
                const __m512 low_scale = scale_at(low_place), high_scale = kHalves ? scale_at(high_place) : low_scale;
#pragma GCC unroll 8
                for (int64_t t = 0; t < T; ++t) {
                    const float* starts = x.starts + t * starts_stride + (uint64_t(j) >> (kHalves ? 2 : 3));
                    __m512bh inputs[4];
#pragma GCC unroll 8
                    for (int64_t i = 0; i < 4; ++i) inputs[i] = load_32(x.x + t * x.stride + j + 32 * i);
                    __m512 low = _mm512_dpbf16_ps(_mm512_loadu_ps(starts), weights[0], inputs[0]);
                    low = _mm512_dpbf16_ps(low, weights[2], inputs[2]);
                    __m512 high = _mm512_dpbf16_ps(kHalves ? _mm512_loadu_ps(starts + 16) : low, weights[1], inputs[1]);
                    high = _mm512_dpbf16_ps(high, weights[3], inputs[3]);
                    if (kHalves) sums[r][t] = _mm512_fmadd_ps(low, low_scale, sums[r][t]);
                    sums[r][t] = _mm512_fmadd_ps(high, high_scale, sums[r][t]);
                }
            }
        };
        const int64_t end = matrix.cols - first < columns ? matrix.cols : first + columns;
        int64_t j = first;
        for (; j + 64 < end; j += kColumns4) two_blocks(j, 0xff);
        if (j < end) two_blocks(j, 0x0f);
    }
#pragma GCC unroll 8
    for (int64_t t = 0; t < T; ++t) put(V{sums[0][t]}, V{sums[1][t]}, V{sums[2][t]}, V{sums[3][t]}, out[t], step);
}

// 64 integers of 8 bits in the order of `arrange_i8`: both bytes of the bfloat16 by the size, then the sign.
inline void look_up_64(const int8_t* p, __mmask64 mask, __m512bh& first, __m512bh& second) {
    __m512i codes = _mm512_maskz_loadu_epi8(mask, p), size = _mm512_abs_epi8(codes);
    auto look_up = [&](const uint8_t* table) __attribute__((always_inline)) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), size, _mm512_load_si512(table + 64));
    };
    __m512i low = look_up(kNumbers.low), high = look_up(kNumbers.high);
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(int8_t(0x80)), 0xf8);
    first = (__m512bh)_mm512_unpacklo_epi8(low, high);
    second = (__m512bh)_mm512_unpackhi_epi8(low, high);
}
inline __m512bh convert_32(const int8_t* p, __mmask32 mask) {
    auto convert = [&](int at) __attribute__((always_inline)) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(__mmask16(mask >> at), p + at)));
    };
    return _mm512_cvtne2ps_pbh(convert(16), convert(0));
}

// For few tokens integers are looked up, which takes the fewest operations. For more, products fill the pipes that
// look-ups take, while conversions have pipes of their own, and tables take the registers of sums.
template <int64_t T, bool kLookedUp>
inline void rows_i8_bf16(const Matrix& matrix, const int64_t (&at)[kRows], const Inputs& x, Sums* out, int64_t step) {
    const int8_t* w[kRows];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) w[r] = static_cast<const int8_t*>(matrix.data) + at[r] * matrix.stride;
    // As in `rows`: of one token two sums for a row, so that fewer additions wait for one another.
    constexpr int64_t kSums = T == 1 ? 2 : 1;
    __m512 sums[kSums][kRows][T];
#pragma GCC unroll 8
    for (int64_t u = 0; u < kSums; ++u)
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int64_t t = 0; t < T; ++t) sums[u][r][t] = _mm512_setzero_ps();
    auto columns = [&](int64_t j, __mmask64 mask) __attribute__((always_inline)) {
        __m512bh weights[2][kRows];
#pragma GCC unroll 8
        for (int64_t half = 0; half < 2; ++half) {
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r)
                if (!kLookedUp)
                    weights[half][r] = convert_32(w[r] + j + 32 * half, __mmask32(mask >> 32 * half));
                else if (half == 0)
                    look_up_64(w[r] + j, mask, weights[0][r], weights[1][r]);
#pragma GCC unroll 8
            for (int64_t t = 0; t < T; ++t) {
                __m512bh input = load_32(x.x + t * x.stride + j + 32 * half);
#pragma GCC unroll 8
                for (int64_t r = 0; r < kRows; ++r) {
                    __m512& sum = sums[kSums == 2 ? half : 0][r][t];
                    sum = _mm512_dpbf16_ps(sum, weights[half][r], input);
                }
            }
        }
    };
    int64_t j = 0;
    for (; j + kColumns8 <= matrix.cols; j += kColumns8) {
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r) fetch(w[r] + j, true);
        columns(j, ~__mmask64(0));
    }
    if (j < matrix.cols) columns(j, (__mmask64(1) << (matrix.cols - j)) - 1);
#pragma GCC unroll 8
    for (int64_t t = 0; t < T; ++t) {
        if (kSums == 2)
            for (int64_t r = 0; r < kRows; ++r) sums[0][r][t] = _mm512_add_ps(sums[0][r][t], sums[kSums - 1][r][t]);
        put(V{sums[0][0][t]}, V{sums[0][1][t]}, V{sums[0][2][t]}, V{sums[0][3][t]}, out[t], step);
    }
}
#endif

// ---- a product

// Rows [begin, end) as four streams through memory, however short the rows are: the four that are read together are a
// quarter of the range apart, or a little more, so that it is whole pages: then streams come to their pages' ends at the
// same time, and wait for the next ones' addresses together. Else whole lines. The last stream is the shorter for it.
struct Streams {
    int64_t begin, end, length;
    Streams(int64_t begin, int64_t end, int64_t stride)
        : begin(begin), end(end), length((end - begin + kRows - 1) / kRows) {
        const int64_t part = stride & -stride;  // none of rows of no columns
        for (int64_t apart : {4096, 64}) {
            const int64_t unit = part && apart > part ? apart / part : 1, some = (length + unit - 1) / unit * unit;
            if (12 * (some - length) <= length) {
                length = some;
                break;
            }
        }
    }
    int64_t first(int64_t stream) const { return begin + stream * length; }
};

// What goes in, as the kernel of these weights takes it: as it is, as floats, or arranged.
template <class X>
struct Source {
    const X* x;
    int64_t stride;
    const float* floats = nullptr;
#if defined(__AVX2__)
    Digits digits = {};
#endif
#if defined(__AVX512BF16__)
    Inputs arranged = {};
#endif
};

// One token waits for codes to come apart, which takes the fewest operations by whole numbers; several wait for products,
// of which bfloat16's instruction does most.
template <class X>
constexpr bool kAsBf16 =
#if defined(__AVX512BF16__)
    __is_same(X, bf16);
#else
    false;
#endif

// Sums of each stream's rows from `from + begin` to `from + end`, as those steps, for T tokens from `token` on.
template <class X, int64_t T>
void some_rows(const Matrix& matrix, const Streams& streams, int64_t from, int64_t begin, int64_t end,
               const Source<X>& source, int64_t token, Sums* sums) {
    auto each = [&](auto kernel) __attribute__((always_inline)) {
        for (int64_t step = begin; step < end; ++step) {
            int64_t at[kRows];
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) {
                // A row that is not there repeats another one: no second loop for what is left over.
                int64_t row = streams.first(r) + from + step;
                at[r] = row < streams.end ? row : streams.end - 1;
            }
            kernel(at, step);
        }
    };
    const bool four = matrix.type == Number::i4, eight = matrix.type == Number::i8;
#if defined(__AVX2__)
    if constexpr (T == 1 || !kAsBf16<X>)
        if (source.digits.x) {
            const Digits digits = source.digits.from(token);
#if defined(__AVX512VNNI__)
            if constexpr (T == 1 && kAsBf16<X>)
                if (eight) return each([&](auto& at, int64_t step) { rows_i8(matrix, at, digits, sums, step); });
#endif
            if (matrix.group == 32)
                return each([&](auto& at, int64_t step) { rows_i4<X, T, true>(matrix, at, digits, sums, step); });
            return each([&](auto& at, int64_t step) { rows_i4<X, T, false>(matrix, at, digits, sums, step); });
        }
#endif
#if defined(__AVX512BF16__)
    if constexpr (kAsBf16<X>) {
        Inputs inputs = source.arranged;
        inputs.x += token * inputs.stride, inputs.sums += token * inputs.sums_stride;
        inputs.starts += token * inputs.stride / (matrix.group == 32 ? 4 : 8);
        if constexpr (T <= kFew)
            if (eight && inputs.few)
                return each([&](auto& at, int64_t step) { rows_i8_bf16<T, true>(matrix, at, inputs, sums, step); });
        if (eight)
            return each([&](auto& at, int64_t step) { rows_i8_bf16<T, false>(matrix, at, inputs, sums, step); });
        if (four && matrix.group == 32)
            return each([&](auto& at, int64_t step) { rows_i4_bf16<T, true>(matrix, at, inputs, sums, step); });
        if (four) return each([&](auto& at, int64_t step) { rows_i4_bf16<T, false>(matrix, at, inputs, sums, step); });
        const bf16* x = source.x + token * source.stride;
        return each([&](auto& at, int64_t step) { rows_bf16<T>(matrix, at, x, source.stride, sums, step); });
    }
#endif
    if (four || eight) {
        const float* x = source.floats + token * source.stride;
#if !defined(__AVX2__)
        if (four) return each([&](auto& at, int64_t step) { rows_i4<T>(matrix, at, x, source.stride, sums, step); });
#endif
        return each([&](auto& at, int64_t step) {
            rows<int8_t, float, T>(matrix, at, x, source.stride, sums, step);
        });
    }
    const X* x = source.x + token * source.stride;
    each([&](auto& at, int64_t step) { rows<X, X, T>(matrix, at, x, source.stride, sums, step); });
}

template <class X>
void some_tokens(const Matrix& matrix, const Streams& streams, int64_t from, int64_t begin, int64_t end,
                 const Source<X>& source, int64_t token, int64_t tokens, Sums* sums) {
    switch (tokens) {
        case 1: return some_rows<X, 1>(matrix, streams, from, begin, end, source, token, sums);
        case 2: return some_rows<X, 2>(matrix, streams, from, begin, end, source, token, sums);
        case 3: return some_rows<X, 3>(matrix, streams, from, begin, end, source, token, sums);
        case 4: return some_rows<X, 4>(matrix, streams, from, begin, end, source, token, sums);
        case 5: return some_rows<X, 5>(matrix, streams, from, begin, end, source, token, sums);
        default: return some_rows<X, 6>(matrix, streams, from, begin, end, source, token, sums);
    }
}

// Inputs for integers are made what their kernel takes once, not for every row.
template <class X>
Source<X> source_of(const Product& p, int64_t tokens) {
    const X* x = static_cast<const X*>(p.x);
    const int64_t cols = p.weight.cols;
    const bool four = p.weight.type == Number::i4;
    if (!four && p.weight.type != Number::i8) return {x, p.x_stride};
    [[maybe_unused]] auto room = [](auto& memory, int64_t size) {
        if (int64_t(memory.size()) < size) memory.resize(size);
        return memory.data();
    };
#if defined(__AVX2__)
    // Rows of 8 bits that are whole lines come as fast as memory gives them by either way, and a little faster looked up.
    if (kAsBf16<X> ? tokens == 1 && (four || p.weight.stride % 64) : four) {
        thread_local std::vector<int8_t> x_digits;
        thread_local std::vector<float> units, less;
        thread_local std::vector<int32_t> starts;
        const int64_t units8 = (cols + kUnit8 - 1) / kUnit8;  // which are whole groups of 4 bits as well
        Digits to;
        to.stride = units8 * kUnit8 * kDigits<X>, to.starts_stride = four ? 0 : units8 * 16;
        to.groups = ((four ? groups_of(p.weight, cols) : units8) + 15) / 16 * 16;
        int8_t* digits = room(x_digits, tokens * to.stride);
        float *unit = room(units, tokens * to.groups), *takes = room(less, tokens * to.groups);
        int32_t* start = room(starts, tokens * to.starts_stride);
        to.x = digits, to.units = unit, to.less = takes, to.starts = start;
        for (int64_t t = 0; t < tokens; ++t)
            digits_of(x + t * p.x_stride, cols, four ? p.weight.group : kUnit8, four, digits + t * to.stride,
                      unit + t * to.groups, takes + t * to.groups, start + t * to.starts_stride);
        Source<X> source{x, p.x_stride};
        source.digits = to;
        return source;
    }
#endif
#if defined(__AVX512BF16__)
    if constexpr (kAsBf16<X>) {
        thread_local std::vector<bf16> arranged;
        thread_local std::vector<float> starts, sums;
        const int64_t unit = four ? kColumns4 : kColumns8, stride = (cols + unit - 1) / unit * unit;
        const int64_t starts_stride = !four ? 0 : stride / (p.weight.group == 32 ? 4 : 8);
        const int64_t groups = four && p.weight.zeros ? (groups_of(p.weight, cols) + 15) / 16 * 16 : 0;
        Inputs to{room(arranged, tokens * stride), stride, room(starts, tokens * starts_stride),
                  room(sums, tokens * groups), groups, tokens <= kFew};
        for (int64_t t = 0; t < tokens; ++t)
            if (four)
                arrange_i4(x + t * p.x_stride, cols, p.weight.group, p.weight.zeros ? -16.0f : -24.0f,
                           arranged.data() + t * stride, starts.data() + t * starts_stride,
                           groups ? sums.data() + t * groups : nullptr);
            else
                arrange_i8(x + t * p.x_stride, cols, to.few, arranged.data() + t * stride);
        Source<X> source{x, p.x_stride};
        source.arranged = to;
        return source;
    }
#endif
    // Floats; 4-bit ones want zeros behind the last column.
    if (__is_same(X, float) && !four) return {x, p.x_stride, reinterpret_cast<const float*>(x)};
    thread_local std::vector<float> floats;
    int64_t stride = four ? (cols + 63) / 64 * 64 : cols;
    if (int64_t(floats.size()) < tokens * stride) floats.resize(tokens * stride);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < cols; ++j) floats[t * stride + j] = to_float(x[t * p.x_stride + j]);
        for (int64_t j = cols; j < stride; ++j) floats[t * stride + j] = 0.0f;
    }
    return {x, stride, floats.data()};
}

#if defined(__AVX512F__)
inline void store(float* to, __m512 v) { _mm512_storeu_ps(to, v); }
inline void store(f16* to, __m512 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// As `from_float`: to the nearest, ties to even, a NaN stays one.
inline void store(bf16* to, __m512 v) {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(rounded, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), high,
                                   _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}

// `finish` of kSteps rows whose outputs lie side by side.
template <class X>
inline void finish_side_by_side(const Product& p, int64_t token, int64_t row, const float* sums) {
    __m512 v = _mm512_loadu_ps(sums);
    if (p.weight.type == Number::i8)
        v = _mm512_mul_ps(v, _mm512_loadu_ps(static_cast<const float*>(p.weight.scales) + row));
    if (p.s) v = _mm512_mul_ps(v, _mm512_loadu_ps(p.s + row));
    if (p.z) {
        X* z = static_cast<X*>(p.z) + token * p.z_stride + row;
        store(z, v);
        v = load(z).v;
    }
    if (!p.y) return;
    if (p.bias) v = _mm512_add_ps(v, load(static_cast<const X*>(p.bias) + row).v);
    store(static_cast<X*>(p.y) + token * p.y_stride + row, v);
}
#endif

// One token's outputs of `count` rows from `row` on, of their sums.
template <class X>
__attribute__((always_inline)) inline void finish(const Product& p, int64_t token, int64_t row, int64_t count,
                                                  const float* sums) {
#if defined(__AVX512F__)
    if (count == kSteps && !p.place) return finish_side_by_side<X>(p, token, row, sums);
#endif
    float v[kSteps];
    for (int64_t k = 0; k < count; ++k) v[k] = sums[k];
    if (p.weight.type == Number::i8)
        for (int64_t k = 0; k < count; ++k) v[k] *= static_cast<const float*>(p.weight.scales)[row + k];
    if (p.s)
        for (int64_t k = 0; k < count; ++k) v[k] *= p.s[row + k];
    if (p.z) {
        X* z = static_cast<X*>(p.z) + token * p.z_stride + row;
        for (int64_t k = 0; k < count; ++k) {
            from_float(z + k, v[k]);
            v[k] = to_float(z[k]);  // what is stored twice is one number
        }
    }
    if (!p.y) return;
    X* y = static_cast<X*>(p.y) + token * p.y_stride;
    const X* bias = static_cast<const X*>(p.bias);
    if (p.place) {
        for (int64_t k = 0; k < count; ++k) {
            int64_t place = p.place[row + k];
            from_float(y + place, bias ? v[k] + to_float(bias[place]) : v[k]);
        }
        return;
    }
    if (bias)
        for (int64_t k = 0; k < count; ++k) v[k] += to_float(bias[row + k]);
    for (int64_t k = 0; k < count; ++k) from_float(y + row + k, v[k]);
}

// ---- tokens as lanes

// From some ten tokens on the sum over a vector's lanes, which every output takes above, costs more than a short row's
// products. Here a vector is 16 tokens: a row's number (in bfloat16 its next two) is broadcast to all of them, and no sum
// is left over. Inputs are brought into that order once a call, outputs out of it 16 rows at a time.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr int64_t kLaneRows = 8;      // at a time: as many pointers as there are registers for
constexpr int64_t kLaneBytes = 524288;  // of inputs that are arranged together: they shall stay in the second cache

// 16 vectors of 16 units of 32 bits, rows for columns.
inline void transpose(__m512i (&v)[16]) {
    __m512i a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) {
        v[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
}

inline __m512i load_some(const float* p, int64_t count) { return _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), p); }
inline __m512i load_some(const bf16* p, int64_t count) {
    return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), p);
}

// Units of 32 bits: a float, or two bfloat16.
template <class X>
constexpr int64_t kUnit = 4 / sizeof(X);

// lanes[unit][token] of up to 16 tokens, zeros for those that are not there and behind the last column.
template <class X>
void arrange_lanes(const X* x, int64_t stride, int64_t tokens, int64_t cols, float* lanes) {
    const int64_t units = (cols + kUnit<X> - 1) / kUnit<X>;
    for (int64_t u = 0; u < units; u += 16) {
        const int64_t left = cols - u * kUnit<X>, count = left < 16 * kUnit<X> ? left : 16 * kUnit<X>;
        __m512i v[16];
#pragma GCC unroll 16
        for (int64_t t = 0; t < kLanes; ++t)
            v[t] = t < tokens ? load_some(x + t * stride + u * kUnit<X>, count) : _mm512_setzero_si512();
        transpose(v);
        if (units - u >= 16) {
#pragma GCC unroll 16
            for (int64_t c = 0; c < 16; ++c) _mm512_store_si512(lanes + (u + c) * kLanes, v[c]);
        } else {
            alignas(64) float all[16][kLanes];
#pragma GCC unroll 16
            for (int64_t c = 0; c < 16; ++c) _mm512_store_si512(all[c], v[c]);
            std::memcpy(lanes + u * kLanes, all, (units - u) * sizeof(all[0]));
        }
    }
}

// sum + a unit of a row, in memory, times that of 16 tokens.
inline __m512 lane_products(__m512 sum, const float* weight, __m512i lanes) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*weight), _mm512_castsi512_ps(lanes), sum);
}
#if defined(__AVX512BF16__)
inline __m512 lane_products(__m512 sum, const bf16* weights, __m512i lanes) {
    // Compilers broadcast into a register first, which takes a third of the rate (GCC 12, Zen 4).
    struct Two { bf16 both[2]; };
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(lanes), "m"(*reinterpret_cast<const Two*>(weights)));
    return sum;
}
#endif

// to[block][row][token] = the sums of 8 rows `w` for B blocks of 16 tokens. apart: floats from one block to the next.
// ahead: bytes to the rows after the next ones, which are asked for meanwhile, into the second cache, as the first one is
// the inputs'; 8 short rows are no stream that the processor would follow by itself. 0: they have been read.
template <class X, int64_t B>
void lane_rows(const X* const (&w)[kLaneRows], int64_t cols, const float* lanes, int64_t apart, int64_t ahead,
               float (*to)[16][kLanes]) {
    __m512 sums[kLaneRows][B];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kLaneRows; ++r)
#pragma GCC unroll 2
        for (int64_t b = 0; b < B; ++b) sums[r][b] = _mm512_setzero_ps();
    auto unit = [&](int64_t u, auto weight) __attribute__((always_inline)) {
        __m512i x[B];
#pragma GCC unroll 2
        for (int64_t b = 0; b < B; ++b) x[b] = _mm512_load_si512(lanes + b * apart + u * kLanes);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kLaneRows; ++r)
#pragma GCC unroll 2
            for (int64_t b = 0; b < B; ++b) sums[r][b] = lane_products(sums[r][b], weight(r), x[b]);
    };
    const int64_t whole = cols / kUnit<X>;
    for (int64_t line = 0; line < whole; line += 16) {
        if (ahead)
#pragma GCC unroll 8
            for (int64_t r = 0; r < kLaneRows; ++r)
                __builtin_prefetch(reinterpret_cast<const char*>(w[r] + line * kUnit<X>) + ahead, 0, 2);
        const int64_t end = whole - line < 16 ? whole : line + 16;
        for (int64_t u = line; u < end; ++u) unit(u, [&](int64_t r) { return w[r] + u * kUnit<X>; });
    }
    if (cols % kUnit<X>) {  // half a unit, and behind it another row or nothing
        X last[kLaneRows][kUnit<X>] = {};
        for (int64_t r = 0; r < kLaneRows; ++r) last[r][0] = w[r][cols - 1];
        unit(whole, [&](int64_t r) { return last[r]; });
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kLaneRows; ++r)
#pragma GCC unroll 2
        for (int64_t b = 0; b < B; ++b) _mm512_store_ps(to[b][r], sums[r][b]);
}

// Counted operations: of a row's products, and of what its outputs take besides.
template <class X>
bool lanes_pay(int64_t tokens, int64_t cols) {
    const int64_t vector = 16 * kUnit<X>, blocks = (tokens + kLanes - 1) / kLanes;
    const int64_t by_rows = tokens * ((cols + vector - 1) / vector + 5);
    const int64_t by_lanes = blocks * ((cols + kUnit<X> - 1) / kUnit<X> + 8);
    return cols > 0 && by_lanes < by_rows;
}

template <class X>
void product_by_lanes(const Product& p, int64_t tokens, int64_t begin, int64_t end) {
    const int64_t cols = p.weight.cols, apart = (cols + kUnit<X> - 1) / kUnit<X> * kLanes;
    thread_local std::vector<float> memory;
    // An even number of blocks, as two are computed together.
    const int64_t room = kLaneBytes / (2 * apart * int64_t(sizeof(float))) * 2, all = (tokens + kLanes - 1) / kLanes;
    const int64_t most = all < room ? all : room < 2 ? 2 : room;
    if (int64_t(memory.size()) < most * apart + 16) memory.resize(most * apart + 16);
    float* lanes = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(float);
    for (int64_t first = 0; first < tokens; first += most * kLanes) {
        const int64_t some = tokens - first < most * kLanes ? tokens - first : most * kLanes;
        const int64_t blocks = (some + kLanes - 1) / kLanes;
        for (int64_t b = 0; b < blocks; ++b)
            arrange_lanes(static_cast<const X*>(p.x) + (first + b * kLanes) * p.x_stride, p.x_stride,
                          some - b * kLanes < kLanes ? some - b * kLanes : kLanes, cols, lanes + b * apart);
        for (int64_t row = begin; row < end; row += 16) {
            const int64_t count = end - row < 16 ? end - row : 16;
            for (int64_t b = 0; b < blocks; b += 2) {
                const int64_t both = blocks - b < 2 ? 1 : 2;
                alignas(64) float sums[2][16][kLanes];
                for (int64_t half = 0; half < count; half += kLaneRows) {
                    const X* w[kLaneRows];
                    for (int64_t r = 0; r < kLaneRows; ++r) {
                        // A row that is not there repeats the last one.
                        int64_t at = half + r < count ? row + half + r : row + count - 1;
                        w[r] = reinterpret_cast<const X*>(static_cast<const char*>(p.weight.data) + at * p.weight.stride);
                    }
                    auto to = reinterpret_cast<float(*)[16][kLanes]>(sums[0][half]);
                    const int64_t ahead = b == 0 ? 2 * kLaneRows * p.weight.stride : 0;
                    if (both == 2)
                        lane_rows<X, 2>(w, cols, lanes + b * apart, apart, ahead, to);
                    else
                        lane_rows<X, 1>(w, cols, lanes + b * apart, apart, ahead, to);
                }
                for (int64_t k = 0; k < both; ++k) {
                    __m512i v[16];
#pragma GCC unroll 16
                    for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(sums[k][i]);
                    transpose(v);
#pragma GCC unroll 16
                    for (int i = 0; i < 16; ++i) _mm512_store_si512(sums[k][i], v[i]);
                    const int64_t token = first + (b + k) * kLanes;
                    for (int64_t t = 0; t < kLanes && token + t < tokens; ++t)
                        if (count == kSteps)
                            finish<X>(p, token + t, row, kSteps, sums[k][t]);
                        else
                            finish<X>(p, token + t, row, count, sums[k][t]);
                }
            }
        }
    }
}
#endif

template <class X>
constexpr bool kHasLanes =
#if defined(__AVX512BF16__)
    __is_same(X, float) || __is_same(X, bf16);
#elif defined(__AVX512F__)
    __is_same(X, float);
#else
    false;
#endif

template <class X>
void product(const Product& p, int64_t tokens, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
    if constexpr (kHasLanes<X>) {
        const bool whole_numbers = p.weight.type == Number::i8 || p.weight.type == Number::i4;
        if (!whole_numbers && lanes_pay<X>(tokens, p.weight.cols)) return product_by_lanes<X>(p, tokens, begin, end);
    }
#endif
    constexpr int64_t kMost = 32;  // tokens for which a weight is read once
    const Streams streams(begin, end, p.weight.stride);
    const Source<X> source = source_of<X>(p, tokens);
    alignas(64) Sums sums[kMost];
    for (int64_t first = 0; first < tokens; first += kMost) {
        const int64_t some = tokens - first < kMost ? tokens - first : kMost, parts = (some + kTokens - 1) / kTokens;
        // What a part of the tokens has read the next finds in a cache: in the first one, or if not even four rows are
        // that short, in the second.
        const int64_t four = kRows * p.weight.stride, room = four <= 16384 ? 16384 : 131072;
        const int64_t together = parts == 1 ? kSteps : four * kSteps <= room ? kSteps : four < room ? room / four : 1;
        for (int64_t from = 0; from < streams.length; from += kSteps) {
            const int64_t steps = streams.length - from < kSteps ? streams.length - from : kSteps;
            for (int64_t step = 0; step < steps; step += together) {
                int64_t stop = step + together < steps ? step + together : steps;
                // Equal parts: 8 tokens are 4 and 4.
                for (int64_t token = 0, part = parts; part > 0; --part) {
                    int64_t T = (some - token + part - 1) / part;
                    some_tokens(p.weight, streams, from, step, stop, source, first + token, T, sums + token);
                    token += T;
                }
            }
            for (int64_t r = 0; r < kRows; ++r) {
                int64_t row = streams.first(r) + from, left = end - row, count = left < steps ? left : steps;
                if (count <= 0) break;
                for (int64_t t = 0; t < some; ++t)
                    if (count == kSteps)
                        finish<X>(p, first + t, row, kSteps, sums[t][r]);
                    else
                        finish<X>(p, first + t, row, count, sums[t][r]);
            }
        }
    }
}

template <class X>
void swiglu(const X* gate, const X* up, X* out, int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
        // The logistic function by e^-|g|, which cannot overflow; a NaN comes through by g itself.
        float g = to_float(gate[j]), power = exponential(g < 0 ? g : -g);
        from_float(out + j, g * ((g < 0 ? power : 1.0f) / (1.0f + power)) * to_float(up[j]));
    }
}

// ---- for products of many tokens

// The numbers of a block of 64 columns, of the 16 that its first and its second half's codes stand for.
template <class X>
inline void look_up_block(const uint8_t* codes, const X* low, const X* high, X* out) {
#if defined(__AVX512F__)
    if constexpr (sizeof(X) == 2) {
        __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        auto table = [](const X* p) {
            return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        };
        __m512i first = _mm512_permutexvar_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(15)), table(low));
        __m512i second = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table(high));
        _mm512_storeu_si512(out, first);
        _mm512_storeu_si512(out + 32, second);
        return;
    }
#endif
    if constexpr (sizeof(X) == 4) {
        for (int64_t j = 0; j < 32; j += V::n) {
            V first, second;
            load_halves(codes + j, low, high, first, second);
            std::memcpy(out + j, &first, sizeof(V));
            std::memcpy(out + j + 32, &second, sizeof(V));
        }
        return;
    }
    for (int64_t j = 0; j < 32; ++j) {
        out[j] = low[codes[j] & 15];
        out[j + 32] = high[codes[j] >> 4];
    }
}

template <class X>
void plain(const Matrix& matrix, X* out, int64_t begin, int64_t end) {
    const int64_t cols = matrix.cols, blocks = (cols + 63) / 64;
    for (int64_t row = begin; row < end; ++row) {
        X* to = out + row * cols;
        if (matrix.type == Number::i8) {
            const int8_t* codes = static_cast<const int8_t*>(matrix.data) + row * matrix.stride;
            const float scale = static_cast<const float*>(matrix.scales)[row];
#pragma omp simd
            for (int64_t j = 0; j < cols; ++j) from_float(to + j, float(codes[j]) * scale);
            continue;
        }
        const Int4Row w(matrix, groups_of(matrix, cols), row);
        X tables[2][16];
        auto make = [&](X* table, int64_t group) {
            const float scale = to_float(w.scales[group]);
            const int zero = w.zero(group);
#pragma omp simd
            for (int code = 0; code < 16; ++code) from_float(table + code, float(code - zero) * scale);
        };
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * 64, group = first >> group_bits(matrix), left = cols - first;
            if (first % matrix.group == 0) make(tables[0], group);
            if (matrix.group == 32 && left > 32) make(tables[1], group + 1);
            const X* high = tables[matrix.group == 32];
            if (left >= 64) {
                look_up_block(w.codes + block * 32, tables[0], high, to + first);
            } else {
                X whole[64];
                look_up_block(w.codes + block * 32, tables[0], left > 32 ? high : tables[0], whole);
                std::memcpy(to + first, whole, left * sizeof(X));
            }
        }
    }
}

// One token's outputs of the pivots and of the others, each in order, as `is_pivot` says where they go: a bit an output.
template <class X>
inline void merge(const X* pivots, const X* others, const uint16_t* is_pivot, int64_t cols, X* to) {
    for (int64_t j = 0; j < cols; j += 16) {
        const int64_t left = cols - j < 16 ? cols - j : 16;
        const uint32_t here = (1u << left) - 1, mask = is_pivot[j / 16], n = __builtin_popcount(mask);
#if defined(__AVX512F__)
        auto first = [](const X* p, int64_t count) {
            __mmask16 some = __mmask16((1u << count) - 1);
            if constexpr (sizeof(X) == 4) return _mm512_maskz_loadu_epi32(some, p);
            else return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p));
        };
        __m512i rest = _mm512_maskz_expand_epi32(__mmask16(here & ~mask), first(others, left - n));
        __m512i all = _mm512_mask_expand_epi32(rest, __mmask16(mask), first(pivots, n));
        if constexpr (sizeof(X) == 4) _mm512_mask_storeu_epi32(to + j, __mmask16(here), all);
        else _mm256_mask_storeu_epi16(to + j, __mmask16(here), _mm512_cvtepi32_epi16(all));
        pivots += n, others += left - n;
#else
        for (uint32_t bit = 0; bit < uint32_t(left); ++bit) to[j + bit] = mask >> bit & 1 ? *pivots++ : *others++;
        (void)here, (void)n;
#endif
    }
}

template <class X>
void put_tokens(const Parts& parts, X* y, int64_t y_stride, int64_t begin, int64_t end) {
    const int64_t rank = parts.rank, cols = parts.cols;
    const int32_t* place = parts.place;
    const X* bias = static_cast<const X*>(parts.bias);
    // Pivots are in the order of the outputs, as are the others, unless somebody made the places by hand.
    thread_local std::vector<uint16_t> is_pivot;
    is_pivot.assign((cols + 15) / 16, 0);
    int64_t in_order = 0;
    for (int64_t j = 0; j < cols; ++j) in_order += j == 0 || j == rank || place[j - 1] < place[j];
    for (int64_t j = 0; j < rank; ++j) is_pivot[place[j] / 16] |= uint16_t(1u << place[j] % 16);
    for (int64_t t = begin; t < end; ++t) {
        const X* first = static_cast<const X*>(parts.pivots) + t * parts.pivots_stride;
        const X* rest = static_cast<const X*>(parts.others) + t * parts.others_stride;
        X* to = y + t * y_stride;
        if (in_order == cols)
            merge(first, rest, is_pivot.data(), cols, to);
        else
            for (int64_t j = 0; j < cols; ++j) to[place[j]] = j < rank ? first[j] : rest[j - rank];
        if (bias)
#pragma omp simd
            for (int64_t j = 0; j < cols; ++j) from_float(to + j, to_float(to[j]) + to_float(bias[j]));
    }
}

// `function` for the numbers of activations: of a pointer that only names their type.
template <class Function>
void by_number(Number activation, Function function) {
    switch (activation) {
        case Number::bf16: return function(static_cast<bf16*>(nullptr));
        case Number::f16: return function(static_cast<f16*>(nullptr));
        default: return function(static_cast<float*>(nullptr));
    }
}

void product_of(Number activation, const Product& p, int64_t tokens, int64_t begin, int64_t end) {
    by_number(activation, [&](auto* x) { product<std::remove_pointer_t<decltype(x)>>(p, tokens, begin, end); });
}

void swiglu_of(Number activation, const void* gate, const void* up, void* out, int64_t begin, int64_t end) {
    by_number(activation, [&](auto* x) {
        using X = std::remove_pointer_t<decltype(x)>;
        swiglu(static_cast<const X*>(gate), static_cast<const X*>(up), static_cast<X*>(out), begin, end);
    });
}

void plain_of(Number activation, const Matrix& weight, void* out, int64_t begin, int64_t end) {
    by_number(activation, [&](auto* x) { plain(weight, static_cast<decltype(x)>(out), begin, end); });
}

void put_of(Number activation, const Parts& parts, void* y, int64_t y_stride, int64_t begin, int64_t end) {
    by_number(activation, [&](auto* x) { put_tokens(parts, static_cast<decltype(x)>(y), y_stride, begin, end); });
}

#define ACIP_TEXT_OF(name) #name
#define ACIP_TEXT(name) ACIP_TEXT_OF(name)

}  // namespace

extern const Decode decode_table;
const Decode decode_table = {ACIP_TEXT(ACIP_ISA), product_of, swiglu_of, plain_of, put_of};

}  // namespace ACIP_ISA
}  // namespace acip
