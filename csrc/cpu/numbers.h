// Numbers of two bytes, and an exponential, for the kernels. No include guard and no namespace: each kernel file includes
// it once, inside the unnamed namespace of its instruction set, so that no two sets share a compiled function.

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }
inline float to_float(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    return __builtin_bit_cast(float, bits);
}
inline float to_float(f16 value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31u, rest = value.bits & 1023u;
    uint32_t bits = sign | ((exponent == 31u ? 255u : exponent + 112u) << 23) | (rest << 13);
    float result = __builtin_bit_cast(float, bits);
    if (exponent == 0) {
        result = float(rest) * 5.9604644775390625e-8f;  // 2^-24
        result = sign ? -result : result;
    }
    return result;
#endif
}

inline void from_float(float* to, float value) { *to = value; }
inline void from_float(double* to, double value) { *to = value; }
inline void from_float(bf16* to, float value) {
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    // To the nearest, ties to even; a NaN stays one (rounding could carry it into infinity), torch's.
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = uint16_t(value != value ? 0x7fc0u : rounded);
}
inline void from_float(f16* to, float value) {
#if defined(__F16C__)
    to->bits = uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) {
        to->bits = uint16_t(sign | 0x7e00u);
    } else if (size >= 0x477ff000u) {  // rounds to 2^16 or more
        to->bits = uint16_t(sign | 0x7c00u);
    } else if (size >= 0x38800000u) {
        uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u);
        to->bits = uint16_t(sign | ((rounded - 0x38000000u) >> 13));
    } else {  // below the smallest normal number: a multiple of 2^-24, which added to 0.5 is in the lowest bits
        size = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) + 0.5f);
        to->bits = uint16_t(sign | uint16_t(size - 0x3f000000u));
    }
#endif
}

// e^x for x ≤ 88, to 2 units in the last place, and e^-87 for what is below that: x = n ln 2 + r with |r| ≤ ln 2 / 2, a
// polynomial for e^r (its Taylor series to the seventh power, whose remainder is below 2e-9), and n added to the exponent.
// Numbers from 2^23 on have no fraction: that rounds n, and leaves it in the lowest bits, with any instruction set.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t power = (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23;
    return p * __builtin_bit_cast(float, power);
}
inline double exponential(double x) { return std::exp(x); }
