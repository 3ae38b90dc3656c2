// What an ACIP training step does around its matrix products, on the CPU: one pass over memory each.
//
// Raw pointers, sizes and ranges; no torch header. Every function works on a part of its problem (a range of rows,
// columns or elements), so that the caller's own thread pool can share it out; the result does not depend on how.
#pragma once

#include <cstdint>

namespace acip {

enum class Dtype { f32, f64, bf16 };

// The functions of one instruction set. `z`, `h`, `x` hold `dtype`; everything per rank, and every sum, is float32
// (float64 for f64), passed as `void*` for that reason.
struct Training {
    const char* name;

    // out[t, i] = z[t, i] * s[i], and zero where s[i] is zero, whatever z is. Rows [begin, end); `ld*` are row strides.
    void (*scale_ranks)(Dtype dtype, const void* z, int64_t ldz, void* out, int64_t ldout, int64_t rank, const void* s,
                        int64_t begin, int64_t end);

    // sum[i] = Σ_t z[t, i] h[t, i], then h[t, i] *= s[i] (zero where s[i] is zero, the sum too), in one pass.
    // Columns [begin, end) of `tokens` rows. Sums run over 32 tokens at a time, and then over those, always in this
    // order. `sum` may be null.
    void (*mask_gradient)(Dtype dtype, const void* z, int64_t ldz, void* h, int64_t ldh, int64_t tokens, const void* s,
                          void* sum, int64_t begin, int64_t end);

    // out[j] = keep(seed, j) ? x[j] * scale : 0, or with `add`, out[j] += that. Elements [begin, end).
    // keep(seed, j): 16 bits of a hash of the element's number and the seed are not below `threshold` (see training.cpp).
    void (*dropout)(Dtype dtype, const void* x, void* out, bool add, uint64_t seed, uint32_t threshold, double scale,
                    int64_t begin, int64_t end);

    // Rows [begin, end) of logits [rows, classes]: loss[row] = log Σ exp(logits) - logits[label], and the logits are
    // overwritten by grad_scale · (softmax - one-hot). A label of `ignore` gives a loss and a gradient of zero.
    void (*cross_entropy)(Dtype dtype, void* logits, int64_t classes, const int64_t* labels, int64_t ignore,
                          double grad_scale, void* loss, int64_t begin, int64_t end);

    // Rows [begin, end) of logits and a teacher's, [rows, classes], of which q and p are the softmax: loss[row] =
    // (1 - weight) · -log q[label] + weight · Σ p log(p / q), and the logits are overwritten by its gradient,
    // q - (1 - weight) · one-hot - weight · p.
    void (*soft_cross_entropy)(Dtype dtype, void* logits, const void* teacher, int64_t classes, const int64_t* labels,
                               double weight, void* loss, int64_t begin, int64_t end);

    // Rows [begin, end) of scores [rows, ld], of which row r has a query at `r % block` of a block that ends with column
    // `keys` - 1: it sees columns up to `keys - block + r % block`. In place: the probabilities of a softmax over
    // `scale` times what it sees, and zero elsewhere. `log_sums[r]` (float32, float64 for f64) is written, the log of
    // the sum of exponentials; or, `known`, taken.
    void (*causal_softmax)(Dtype dtype, void* scores, int64_t ld, int64_t keys, int64_t block, double scale,
                           void* log_sums, bool known, int64_t begin, int64_t end);

    // Its gradient, in place: dp[r, j] becomes scale · p[r, j] · (dp[r, j] - Σ_j p[r, j] dp[r, j]).
    void (*softmax_gradient)(Dtype dtype, void* dp, const void* p, int64_t ld, int64_t keys, int64_t block,
                             double scale, int64_t begin, int64_t end);

    // Rows [begin, end) of x and y [rows, width]: rstd[row] = 1 / √(mean of x² + eps), which is written (float32, float64
    // for f64), and y = weight · (x · rstd), both products rounded to `dtype`, as transformers has it.
    void (*rms_norm)(Dtype dtype, const void* x, int64_t width, const void* weight, double eps, void* y, void* rstd,
                     int64_t begin, int64_t end);

    // Its gradient: with n = x · rstd and h = weight · g, dx = rstd · (h - n · mean of n h), rounded once.
    void (*rms_norm_gradient)(Dtype dtype, const void* g, const void* x, int64_t width, const void* weight,
                              const void* rstd, void* dx, int64_t begin, int64_t end);

    // Rotary position embedding: of the `heads` heads of rows [begin, end), each a token of a batch, for x [batch, heads,
    // tokens, 2 half] with these strides in elements (a head's numbers are neighbours) to y [batch, tokens, heads, 2 half].
    // With x = (x1, x2): y1 = x1 · cos1 - x2 · sin1 and y2 = x2 · cos2 + x1 · sin2; `back` is the transposed map. cos, sin
    // [batch or 1, tokens, 2 half], whose batches are that far apart.
    void (*rotary)(Dtype dtype, const void* x, const int64_t strides[3], const void* cos, int64_t cos_batch,
                   const void* sin, int64_t sin_batch, void* y, int64_t heads, int64_t tokens, int64_t half, bool back,
                   int64_t begin, int64_t end);

    // y = gate · σ(gate) · up, σ the logistic function, rounded once. Elements [begin, end).
    void (*gated_silu)(Dtype dtype, const void* gate, const void* up, void* y, int64_t begin, int64_t end);

    // Its gradients: dgate = g · up · σ(gate) · (1 + gate · σ(-gate)) and dup = g · gate · σ(gate).
    void (*gated_silu_gradient)(Dtype dtype, const void* g, const void* gate, const void* up, void* dgate, void* dup,
                                int64_t begin, int64_t end);
};

// By name ("portable", "avx2", "avx512", "avx512_bf16"), or null for the best one that this processor runs.
// Returns null for a name that does not exist or cannot run here.
const Training* training(const char* isa);

}  // namespace acip
