// Linear layers of few tokens on the CPU: products that are bound by reading weights, each weight read once.
//
// Raw pointers, sizes and ranges; no torch header. A layer of two factors is two products with a barrier between them, a
// pivoted one too, the first of which also stores; siblings are more products on either side of the barrier. So the
// caller lays out stages of products, and its threads take ranges of rows of each. Every output is one thread's sum in
// one order: results do not depend on how rows are shared out.
//
// Products of many tokens are a matrix library's; what it does not know, quantized weights and the pivoted form's order,
// is here too.
#pragma once

#include <cstdint>

namespace acip {

enum class Number { f32, bf16, f16, i8, i4 };

// [rows, cols], a row contiguous.
//
// i8: int8 from -127 to 127; `scales` float32 [rows]; a weight is `q · scale`.
// i4: two to a byte, a row in blocks of 64 columns: byte j of a block has column j in its low and j + 32 in its high
// half; the last block is whole. `scales` bfloat16 [rows, ceil(cols / group)], `zeros` uint8 like them, or null for 8; a
// weight is `(q - zero) · scale`. group: 32, 64 or 128.
struct Matrix {
    Number type;
    const void* data;
    int64_t rows, cols;
    int64_t stride;  // bytes from one row to the next
    const void* scales;
    const uint8_t* zeros;
    int64_t group;
};

// y[t, place[r]] = bias[place[r]] + v and z[t, r] = v for v = s[r] · Σ_j x[t, j] weight[r, j], rounded to the activations'
// number before it goes on, sums in float32. Null: no `s`, no `bias`, `place[r] = r`, no `y`, no `z`.
struct Product {
    Matrix weight;
    const void* x;
    const float* s;
    const void* bias;
    const int32_t* place;
    void* y;
    void* z;
    int64_t x_stride, y_stride, z_stride;  // elements from one token to the next
};

// A pivoted layer's outputs as its two products have them, [tokens, rank] and [tokens, cols - rank], and where they go: a
// permutation. Null: no `bias`. Fast where the places of pivots are in order, and those of the others too.
struct Parts {
    const void *pivots, *others;
    int64_t pivots_stride, others_stride;  // elements from one token to the next
    int64_t rank, cols;
    const int32_t* place;
    const void* bias;
};

// The functions of one instruction set. `activation`, of x, bias, y and z, is f32, bf16 or f16; a weight is of that
// number, i8 or i4.
struct Decode {
    const char* name;

    // Rows [begin, end) of a product for `tokens` tokens.
    void (*product)(Number activation, const Product& product, int64_t tokens, int64_t begin, int64_t end);

    // out[j] = gate[j] / (1 + exp(-gate[j])) · up[j], elements [begin, end).
    void (*swiglu)(Number activation, const void* gate, const void* up, void* out, int64_t begin, int64_t end);

    // Rows [begin, end) of a quantized weight as plain numbers, out [rows, cols]: each made in float32 and rounded once.
    void (*plain)(Number activation, const Matrix& weight, void* out, int64_t begin, int64_t end);

    // y[t, place[j]] = bias[place[j]] + (j < rank ? pivots[t, j] : others[t, j - rank]), j < cols, tokens [begin, end).
    void (*put)(Number activation, const Parts& parts, void* y, int64_t y_stride, int64_t begin, int64_t end);
};

// By name ("portable", "avx2", "avx512", "avx512_bf16"), or null for the best one that this processor runs.
// Returns null for a name that does not exist or cannot run here.
const Decode* decode(const char* isa);

}  // namespace acip
