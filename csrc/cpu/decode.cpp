// Compiled once for each instruction set, with ACIP_ISA as its name.
//
// What bounds these products is memory: a weight of 2 bytes takes two operations a token, and two cores that read 30 GB/s
// do 400 of them in the time of one weight's cache line. So rows are read four at a time, each by a stream of its own
// that the processor's prefetcher follows, for up to six tokens at once, whose inputs stay in the first cache; for more
// tokens the same four rows are read again, from the cache.
//
// The loops are templates over how 16 (or 8) weights become floats; with bfloat16 instructions, products of bfloat16
// weights, and of 4-bit weights by a table of 32 bfloat16 numbers, are 32 at a time.
#include "acip/decode.h"

#include <cmath>
#include <cstring>
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
    std::memcpy(whole, p, count * sizeof(T));
    return load(whole);
}
#endif

// Integers are few bytes and many operations, with which the processor's own prefetcher does not overlap all of the
// waiting: their streams are asked for this much ahead. (Floats are not: there it is slower, if anything.)
constexpr int64_t kAhead = 4096;
inline void fetch(const void* weights) { __builtin_prefetch(static_cast<const char*>(weights) + kAhead, 0, 3); }

// ---- four rows, T tokens

constexpr int64_t kRows = 4;
constexpr int64_t kTokens = 6;

// Rows of W, a type that `load` makes floats of.
template <class W, class X, int64_t T>
inline void rows(const Matrix& matrix, const int64_t (&at)[kRows], const X* x, int64_t x_stride,
                 float (&out)[kTokens][kRows]) {
    // One token has too few sums to hide an addition's latency: they are doubled.
    constexpr int64_t kSums = T == 1 ? 2 : 1;
    const W* w[kRows];
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
                if (__is_same(W, int8_t)) fetch(w[r] + j + u * V::n);
                weights[r] = load(w[r] + j + u * V::n);
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
        sums_of(sums[0][0][t], sums[0][1][t], sums[0][2][t], sums[0][3][t], out[t]);
    }
}

#if defined(__AVX512BF16__)
// Both bfloat16: 32 products at a time.
inline __m512bh load_32(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load_32(const bf16* p, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, p); }

template <int64_t T>
inline void rows_bf16(const Matrix& matrix, const int64_t (&at)[kRows], const bf16* x, int64_t x_stride,
                      float (&out)[kTokens][kRows]) {
    constexpr int64_t kSums = T == 1 ? 2 : 1;
    const bf16* w[kRows];
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
            for (int64_t r = 0; r < kRows; ++r) weights[r] = load_32(w[r] + j + u * 32);
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
        sums_of(V{sums[0][0][t]}, V{sums[0][1][t]}, V{sums[0][2][t]}, V{sums[0][3][t]}, out[t]);
    }
}
#endif

// ---- 4 bits

// For each zero, the numbers that the 16 codes stand for; exact in bfloat16 too.
struct Tables {
    float numbers[16][16];
    uint16_t bf16s[16][32];  // twice, as an index of five bits has a bit of the next code above its four
    constexpr Tables() : numbers(), bf16s() {
        for (int zero = 0; zero < 16; ++zero)
            for (int code = 0; code < 16; ++code) {
                int value = code - zero;
                numbers[zero][code] = float(value);
                uint16_t bits = 0;
                if (value != 0) {
                    int size = value < 0 ? -value : value, exponent = 0;
                    while ((size >> exponent) > 1) ++exponent;
                    bits = uint16_t((value < 0 ? 0x8000 : 0) | ((127 + exponent) << 7) |
                                    ((size << (7 - exponent)) & 0x7f));
                }
                bf16s[zero][code] = bf16s[zero][code + 16] = bits;
            }
    }
};
alignas(64) constexpr Tables kTables;

struct Int4Row {
    const uint8_t* codes;
    const bf16* scales;
    const uint8_t* zeros;

    Int4Row() = default;
    Int4Row(const Matrix& matrix, int64_t row)
        : codes(static_cast<const uint8_t*>(matrix.data) + row * matrix.stride) {
        int64_t groups = (matrix.cols + matrix.group - 1) / matrix.group;
        scales = static_cast<const bf16*>(matrix.scales) + row * groups;
        zeros = matrix.zeros ? matrix.zeros + row * groups : nullptr;
    }
    int zero(int64_t group) const { return zeros ? zeros[group] & 15 : 8; }
};

// x has zeros behind its columns up to a whole block. A block's two halves of 32 columns may be of two groups; groups of
// 64 and 128 are summed by halves too.
template <int64_t T>
inline void rows_i4(const Matrix& matrix, const int64_t (&at)[kRows], const float* x, int64_t x_stride,
                    float (&out)[kTokens][kRows]) {
    Int4Row w[kRows];
    for (int64_t r = 0; r < kRows; ++r) w[r] = Int4Row(matrix, at[r]);
    V sums[kRows][T];
    for (int64_t r = 0; r < kRows; ++r)
        for (int64_t t = 0; t < T; ++t) sums[r][t] = V::zero();
    int64_t last = (matrix.cols + matrix.group - 1) / matrix.group - 1;
    for (int64_t j = 0; j < matrix.cols; j += 64) {
        int64_t low_group = j / matrix.group, high_group = (j + 32) / matrix.group;
        high_group = high_group < last ? high_group : last;  // beyond the last column there are only zeros
        for (int64_t r = 0; r < kRows; ++r) {
            fetch(w[r].codes + j / 2);
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
    for (int64_t t = 0; t < T; ++t) sums_of(sums[0][t], sums[1][t], sums[2][t], sums[3][t], out[t]);
}

#if defined(__AVX512BF16__)
// Scales are made floats for 1024 columns at a time, so that one is a broadcast from memory in the loop. kHalves: groups
// of 32, so that each half of a block has a scale of its own.
template <int64_t T, bool kHalves>
inline void rows_i4_bf16(const Matrix& matrix, const int64_t (&at)[kRows], const bf16* x, int64_t x_stride,
                         float (&out)[kTokens][kRows]) {
    constexpr int64_t kColumns = 1024;
    Int4Row w[kRows];
    for (int64_t r = 0; r < kRows; ++r) w[r] = Int4Row(matrix, at[r]);
    __m512 sums[kRows][T];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int64_t t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
    // A scale of zero for the half of the last block that may be of no group.
    alignas(64) float scales[kRows][48] = {};
    const int64_t groups_of_block = kHalves ? 2 : 1, blocks_of_group = matrix.group / 64;
    for (int64_t first = 0; first < matrix.cols; first += kColumns) {
        int64_t columns = matrix.cols - first < kColumns ? matrix.cols - first : kColumns;
        int64_t group = first / matrix.group, groups = (columns + matrix.group - 1) / matrix.group;
        for (int64_t r = 0; r < kRows; ++r)
            for (int64_t g = 0; g < groups; g += 16) {
                __mmask16 mask = groups - g < 16 ? __mmask16((1u << (groups - g)) - 1) : __mmask16(0xffff);
                __m256i bits = _mm256_maskz_loadu_epi16(mask, w[r].scales + group + g);
                _mm512_store_ps(scales[r] + g, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
            }
        auto block = [&](int64_t number, __mmask32 low_mask, __mmask32 high_mask) __attribute__((always_inline)) {
            const bf16* input = x + first + number * 64;
            int64_t low = kHalves ? number * groups_of_block : number / blocks_of_group;
            int64_t high = kHalves && low + 1 < groups ? low + 1 : low;
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) {
                fetch(w[r].codes + first / 2 + number * 32);
                __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(w[r].codes + first / 2 + number * 32)));
                __m512i low_table = _mm512_load_si512(kTables.bf16s[w[r].zero(group + low)]);
                __m512i high_table = kHalves ? _mm512_load_si512(kTables.bf16s[w[r].zero(group + high)]) : low_table;
                __m512bh low_weight = (__m512bh)_mm512_permutexvar_epi16(codes, low_table);
                __m512bh high_weight = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), high_table);
#pragma GCC unroll 8
                for (int64_t t = 0; t < T; ++t) {
                    __m512 part = _mm512_dpbf16_ps(_mm512_setzero_ps(), low_weight,
                                                   load_32(input + t * x_stride, low_mask));
                    if (kHalves) {
                        sums[r][t] = _mm512_fmadd_ps(part, _mm512_set1_ps(scales[r][low]), sums[r][t]);
                        part = _mm512_setzero_ps();
                    }
                    part = _mm512_dpbf16_ps(part, high_weight, load_32(input + t * x_stride + 32, high_mask));
                    sums[r][t] = _mm512_fmadd_ps(part, _mm512_set1_ps(scales[r][kHalves ? high : low]), sums[r][t]);
                }
            }
        };
        const __mmask32 all = ~__mmask32(0);
        int64_t whole = columns / 64, left = columns % 64;
        for (int64_t number = 0; number < whole; ++number) block(number, all, all);
        if (left)
            block(whole, left < 32 ? (__mmask32(1) << left) - 1 : all, left > 32 ? (__mmask32(1) << (left - 32)) - 1 : 0);
    }
#pragma GCC unroll 8
    for (int64_t t = 0; t < T; ++t) sums_of(V{sums[0][t]}, V{sums[1][t]}, V{sums[2][t]}, V{sums[3][t]}, out[t]);
}

// 32 integers of 8 bits as bfloat16, which holds them exactly.
inline __m512bh load_32(const int8_t* p) {
    __m512 low = load(p).v, high = load(p + 16).v;
    return _mm512_cvtne2ps_pbh(high, low);
}

template <int64_t T>
inline void rows_i8_bf16(const Matrix& matrix, const int64_t (&at)[kRows], const bf16* x, int64_t x_stride,
                         float (&out)[kTokens][kRows]) {
    const int8_t* w[kRows];
    for (int64_t r = 0; r < kRows; ++r) w[r] = static_cast<const int8_t*>(matrix.data) + at[r] * matrix.stride;
    __m512 sums[kRows][T];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int64_t t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
    int64_t j = 0;
    for (; j + 32 <= matrix.cols; j += 32) {
        __m512bh weights[kRows];
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r) {
            fetch(w[r] + j);
            weights[r] = load_32(w[r] + j);
        }
#pragma GCC unroll 8
        for (int64_t t = 0; t < T; ++t) {
            __m512bh input = load_32(x + t * x_stride + j);
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], weights[r], input);
        }
    }
    if (j < matrix.cols) {
        int64_t left = matrix.cols - j;
        __mmask32 mask = __mmask32((uint64_t(1) << left) - 1);
        int8_t padded[kRows][32] = {};
        for (int64_t r = 0; r < kRows; ++r) std::memcpy(padded[r], w[r] + j, left);
#pragma GCC unroll 8
        for (int64_t t = 0; t < T; ++t) {
            __m512bh input = load_32(x + t * x_stride + j, mask);
#pragma GCC unroll 8
            for (int64_t r = 0; r < kRows; ++r) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], load_32(padded[r]), input);
        }
    }
#pragma GCC unroll 8
    for (int64_t t = 0; t < T; ++t) sums_of(V{sums[0][t]}, V{sums[1][t]}, V{sums[2][t]}, V{sums[3][t]}, out[t]);
}
#endif

// ---- a product

template <class X, int64_t T>
void some_rows(const Product& p, const int64_t (&at)[kRows], const X* x, float (&out)[kTokens][kRows]) {
#if defined(__AVX512BF16__)
    if constexpr (__is_same(X, bf16)) {
        if (p.weight.type == Number::i8) return rows_i8_bf16<T>(p.weight, at, x, p.x_stride, out);
        if (p.weight.type == Number::i4 && p.weight.group == 32)
            return rows_i4_bf16<T, true>(p.weight, at, x, p.x_stride, out);
        if (p.weight.type == Number::i4) return rows_i4_bf16<T, false>(p.weight, at, x, p.x_stride, out);
        return rows_bf16<T>(p.weight, at, x, p.x_stride, out);
    }
#endif
    if (p.weight.type == Number::i8) return rows<int8_t, X, T>(p.weight, at, x, p.x_stride, out);
    if constexpr (__is_same(X, float))
        if (p.weight.type == Number::i4) return rows_i4<T>(p.weight, at, x, p.x_stride, out);
    rows<X, X, T>(p.weight, at, x, p.x_stride, out);
}

template <class X>
void some_tokens(const Product& p, const int64_t (&at)[kRows], const X* x, int64_t tokens,
                 float (&out)[kTokens][kRows]) {
    switch (tokens) {
        case 1: return some_rows<X, 1>(p, at, x, out);
        case 2: return some_rows<X, 2>(p, at, x, out);
        case 3: return some_rows<X, 3>(p, at, x, out);
        case 4: return some_rows<X, 4>(p, at, x, out);
        case 5: return some_rows<X, 5>(p, at, x, out);
        default: return some_rows<X, 6>(p, at, x, out);
    }
}

template <class X>
void product(const Product& p, int64_t tokens, int64_t begin, int64_t end) {
    // The four rows that are read together are a quarter of the range apart: each quarter is one stream through memory,
    // however short its rows are.
    int64_t quarter = (end - begin + kRows - 1) / kRows;
    X *y = static_cast<X*>(p.y), *z = static_cast<X*>(p.z);
    const int64_t y_stride = p.y_stride, z_stride = p.z_stride;
    // Integers are multiplied as floats, for which two-byte inputs are made floats once, not for every row; and 4-bit
    // ones want zeros behind the last column. With bfloat16 instructions only one token's inputs for 8 bits are.
    bool four = p.weight.type == Number::i4, floats = four || (p.weight.type == Number::i8 && !__is_same(X, float));
#if defined(__AVX512BF16__)
    if (__is_same(X, bf16)) floats = p.weight.type == Number::i8 && tokens == 1;
#endif
    Product wide = p;
    if (floats) {
        thread_local std::vector<float> memory;
        int64_t cols = p.weight.cols, stride = four ? (cols + 63) / 64 * 64 : cols;
        if (int64_t(memory.size()) < tokens * stride) memory.resize(tokens * stride);
        for (int64_t t = 0; t < tokens; ++t) {
            const X* x = static_cast<const X*>(p.x) + t * p.x_stride;
            for (int64_t j = 0; j < cols; ++j) memory[t * stride + j] = to_float(x[j]);
            for (int64_t j = cols; j < stride; ++j) memory[t * stride + j] = 0.0f;
        }
        wide.x = memory.data(), wide.x_stride = stride;
    }
    for (int64_t k = 0; k < quarter; ++k) {
        int64_t at[kRows], count = 0;
        for (int64_t r = 0; r < kRows; ++r) {
            at[r] = begin + r * quarter + k;
            if (at[r] < end) count = r + 1;
        }
        // A row that is not there repeats another one: no second loop for what is left over.
        for (int64_t r = count; r < kRows; ++r) at[r] = at[count - 1];
        float factors[kRows], biases[kRows];
        int64_t places[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
            places[r] = p.place ? p.place[at[r]] : at[r];
            factors[r] = p.s ? p.s[at[r]] : 1.0f;
            if (p.weight.type == Number::i8) factors[r] *= static_cast<const float*>(p.weight.scales)[at[r]];
            biases[r] = p.bias ? to_float(static_cast<const X*>(p.bias)[places[r]]) : 0.0f;
        }
        for (int64_t token = 0; token < tokens;) {
            // Equal parts: 8 tokens are 4 and 4.
            int64_t left = tokens - token, parts = (left + kTokens - 1) / kTokens, T = (left + parts - 1) / parts;
            float out[kTokens][kRows];
            if (floats)
                some_tokens(wide, at, static_cast<const float*>(wide.x) + token * wide.x_stride, T, out);
            else
                some_tokens(p, at, static_cast<const X*>(p.x) + token * p.x_stride, T, out);
            for (int64_t t = 0; t < T; ++t, ++token)
                for (int64_t r = 0; r < count; ++r) {
                    float sum = out[t][r] * factors[r];
                    if (z) {
                        X value;
                        from_float(&value, sum);
                        z[token * z_stride + at[r]] = value;
                        sum = to_float(value);  // what is stored twice is one number
                    }
                    if (y) from_float(y + token * y_stride + places[r], sum + biases[r]);
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

void product_of(Number activation, const Product& p, int64_t tokens, int64_t begin, int64_t end) {
    switch (activation) {
        case Number::bf16: return product<bf16>(p, tokens, begin, end);
        case Number::f16: return product<f16>(p, tokens, begin, end);
        default: return product<float>(p, tokens, begin, end);
    }
}

void swiglu_of(Number activation, const void* gate, const void* up, void* out, int64_t begin, int64_t end) {
    switch (activation) {
        case Number::bf16:
            return swiglu(static_cast<const bf16*>(gate), static_cast<const bf16*>(up), static_cast<bf16*>(out), begin,
                          end);
        case Number::f16:
            return swiglu(static_cast<const f16*>(gate), static_cast<const f16*>(up), static_cast<f16*>(out), begin,
                          end);
        default:
            return swiglu(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<float*>(out),
                          begin, end);
    }
}

#define ACIP_TEXT_OF(name) #name
#define ACIP_TEXT(name) ACIP_TEXT_OF(name)

}  // namespace

extern const Decode decode_table;
const Decode decode_table = {ACIP_TEXT(ACIP_ISA), product_of, swiglu_of};

}  // namespace ACIP_ISA
}  // namespace acip
