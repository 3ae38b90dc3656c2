// Layers of few tokens: the time of reading their weights, and as little else as there can be.
//
// A problem is a list of stages (first factors; second factors; for a whole MLP two more), a stage a list of products,
// each cut into tasks of 16 rows and, of first factors, a part of the columns. Every block has its share of each
// stage's tasks, and each of its 8 warps every eighth chunk of a task's columns: 16 rows of up to 256 bytes. So what a
// warp reads, from the first stage to the last, is known when the launch begins, and it is read as one stream: a ring
// of slots in shared memory, private to the warp, that copies fill (`cp.async.bulk` on sm_90, `cp.async` before) as far
// ahead as there are slots. Weights depend on nothing, so the stream does not stop for a barrier: while the blocks wait
// for each other between two stages, the next stage's weights keep coming, on an H100 up to 160 KiB of them for each
// multiprocessor.
//
// Sums are float32. A chunk's products go through tensor cores, weights as the rows of m16n8k16, tokens as its columns;
// one token's products of two-byte weights are multiplied and added, as exact as float32 is. Which column a lane has as
// which k of a fragment is free as long as both operands agree: so a lane reads 16 (4-bit weights: 8) consecutive bytes
// of a row, and no shuffle is needed. Integers become numbers by their bits: set into the mantissa of 128 (bfloat16) or
// 1024 (float16), from which that and the zero are subtracted again, two at a time. Scales multiply sums.
//
// A task's eight sums are added up in the warps' order, a product's splits in theirs; there are no atomics but in the
// barriers. In the dependent form every stage is a launch of the same kernel, which starts to read weights before the
// launch before it has ended.
#include <cstring>

#include "acip/cuda_decode.h"
#include "device.h"

namespace acip {
namespace cuda {
namespace {

using namespace device;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;
constexpr int kMostSlots = 16;
constexpr int kMostSplits = 16;
constexpr int kMostStages = 7;
constexpr int kMostProducts = 4 * kMostSiblings;
// Bytes from one row of a slot to the next: rows that lanes read together are in different banks.
constexpr int kPitch = 256 + 64, kPitchOf4 = 128 + 32;
// From one token's sums of a warp to the next's, in floats; for the same reason.
constexpr int kSumPitch = kRows + 4;

// Where an output's value comes from, if not from weights: sums of splits; or a gate's and an up-projection's outputs.
enum class From : int { weights, sums, gate_and_up };
// Where it goes: to the sums of a split; to y; or it is multiplied with silu of the gate, which is in its place in y.
enum class To : int { partial, y, multiply };

struct Product {
    // The weight, [rows, cols].
    const unsigned char* weight;
    const void* scales;
    const unsigned char* zeros;
    int64_t stride;
    int rows, cols, row_bytes;
    Number type;
    int group_shift, groups;
    int step;          // bytes that a copy may take at once
    int chunk_shift;   // log2 of a chunk's columns
    int chunk_bytes_shift;
    int chunks, splits, span;  // of a row; of the chunks; chunks of a split
    // The input: activations; or the sums of `in_splits` splits, times s.
    const unsigned char* x;
    int x_stride;  // bytes
    bool x_wide;
    const float* in;
    int in_splits, in_stride;
    const float* s;
    // The output.
    From from;
    To to;
    float* out;
    int out_stride;
    unsigned char* y;
    int y_stride;
    const void* bias;
    const int32_t* place;
    // How the stage is shared out: this many tasks of equal cost, in units of 64 bytes; 2^32 over what is divided by.
    int tasks;
    uint32_t cost, inverse_cost, inverse_splits;
};

struct Stage {
    int first, count;  // products
    int parts;         // 2: a block has tasks of the first product, and then the same of the next
    uint32_t cost, share;  // of all tasks, of one block
};

struct Job {
    int begin, end;  // stages of this launch
    int tokens;
    bool bulk;  // where there are bulk copies: whether they bring what they can
    int slots, slot_bytes, input_bytes;  // of a warp
    Stage stages[kMostStages];
    Product products[kMostProducts];
};
static_assert(sizeof(Job) <= 4096, "what a launch passes, on every GPU and driver");

// ---- what a block has to do

// The first task of the stage that belongs to `block` or one behind it: its position over a task's cost, rounded up.
// (Where positions are large the quotient may come out one too small: the same for both blocks of a boundary.)
__device__ __forceinline__ int first_task(const Job& job, int stage, int block) {
    const Stage& s = job.stages[stage];
    uint32_t position = s.share * block;
    int task = 0;
    for (int i = 0; i < s.count; ++i) {
        const Product& p = job.products[s.first + i];
        const uint32_t whole = p.tasks * p.cost;
        if (position < whole) return task + (position ? min(p.tasks, int(__umulhi(position, p.inverse_cost)) + 1) : 0);
        position -= whole, task += p.tasks;
    }
    return task;
}

struct Task {
    int product, row, split;
};

__device__ __forceinline__ Task task_of(const Job& job, int stage, int task, int part) {
    int product = job.stages[stage].first;
    while (task >= job.products[product].tasks) task -= job.products[product++].tasks;
    const Product& p = job.products[product];
    const int tile = p.splits == 1 ? task : int(__umulhi(task, p.inverse_splits));
    return {product + part, tile * kRows, task - tile * p.splits};
}

// A warp's chunks, one after the other.
struct Walk {
    int stage, task, end, part, chunk, chunk_end, product, row;

    __device__ __forceinline__ Walk(const Job& job)
        : stage(job.begin - 1), task(0), end(0), part(0), chunk(0), chunk_end(0), product(0), row(0) {}

    // From the chunk behind the last one to one that there is, or false behind them all.
    __device__ __forceinline__ bool settle(const Job& job, int warp) {
        while (chunk >= chunk_end) {
            if (++task >= end) {
                if (stage < job.begin || ++part == job.stages[stage].parts) {
                    part = 0;
                    do {
                        if (++stage >= job.end) return false;
                        end = first_task(job, stage, blockIdx.x + 1);
                    } while (first_task(job, stage, blockIdx.x) >= end);
                }
                task = first_task(job, stage, blockIdx.x);
            }
            const Task at = task_of(job, stage, task, part);
            const Product& p = job.products[at.product];
            product = at.product, row = at.row;
            chunk = at.split * p.span + warp, chunk_end = min((at.split + 1) * p.span, p.chunks);
        }
        return true;
    }
};

// ---- weights on their way

template <int kStep>
__device__ __forceinline__ void copy_rows(const Product& p, unsigned char* slot, int pitch, const unsigned char* from,
                                          int rows, int bytes, int lane) {
    int shift = p.chunk_bytes_shift - (kStep == 16 ? 4 : kStep == 8 ? 3 : 2);
    for (int i = lane; i < rows << shift; i += 32) {
        int row = i >> shift, offset = (i - (row << shift)) * kStep;
        if (offset < (bytes + 15) / 16 * 16)
            copy_async<kStep>(slot + row * pitch + offset, from + row * p.stride + offset, offset < bytes ? kStep : 0);
    }
}

// For rows that lie at odd addresses: a lane puts together four bytes.
template <class T>
__device__ __forceinline__ void copy_slowly(const Product& p, unsigned char* slot, int pitch, const unsigned char* from,
                                            int rows, int bytes, int lane) {
    constexpr int kEach = int(sizeof(T));
    for (int row = 0; row < rows; ++row)
        for (int offset = 4 * lane; offset < (bytes + 15) / 16 * 16; offset += 128) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 4; i += kEach)
                if (offset + i < bytes)
                    word |= uint32_t(read_global<T>(from + row * p.stride + offset + i)) << 8 * i;
            write_shared(slot + row * pitch + offset, word);
        }
}

__device__ __forceinline__ int pitch_of(const Product& p) { return p.type == Number::i4 ? kPitchOf4 : kPitch; }

// Starts what brings a chunk of weights to a slot; whoever copies how, there are 32 arrivals at `full`. Behind the end
// of a row there are zeros up to a multiple of 16 bytes. Here of rows that are not aligned to 16 bytes.
__device__ __forceinline__ void fill_unaligned(const Product& p, unsigned char* slot, const unsigned char* from,
                                               int rows, int bytes, uint64_t* full, int lane) {
    const int pitch = pitch_of(p);
    if (p.step >= 4) {
        if (p.step == 8)
            copy_rows<8>(p, slot, pitch, from, rows, bytes, lane);
        else
            copy_rows<4>(p, slot, pitch, from, rows, bytes, lane);
        barrier_arrive_after_copies(full);
    } else {
        if (p.step == 2)
            copy_slowly<uint16_t>(p, slot, pitch, from, rows, bytes, lane);
        else
            copy_slowly<uint8_t>(p, slot, pitch, from, rows, bytes, lane);
        barrier_arrive(full, 1);
    }
}

__device__ __forceinline__ void fill(const Job& job, const Walk& walk, unsigned char* slot, uint64_t* full, int lane) {
    const Product& p = job.products[walk.product];
    int rows = min(kRows, p.rows - walk.row), offset = walk.chunk << p.chunk_bytes_shift;
    int bytes = min(1 << p.chunk_bytes_shift, p.row_bytes - offset), pitch = pitch_of(p);
    const unsigned char* from = p.weight + walk.row * p.stride + offset;
    if (p.step < 16) return fill_unaligned(p, slot, from, rows, bytes, full, lane);
    if (kBulk && job.bulk) {
        // One lane for all: of several lanes the machine makes a loop around every copy.
        if (elected()) {
            barrier_arrive(full, 31);
            barrier_arrive_expecting(full, rows * bytes);
#pragma unroll 4
            for (int row = 0; row < rows; ++row, slot += pitch, from += p.stride) copy_bulk(slot, from, bytes, full);
        }
    } else {
        copy_rows<16>(p, slot, pitch, from, rows, bytes, lane);
        barrier_arrive_after_copies(full);
    }
}

// ---- inputs

// Columns k to k + 7 of a row of activations, zeros from `cols` on.
__device__ __forceinline__ uint4 read_8(const unsigned char* row, int k, int cols, bool wide) {
    if (wide && k + 8 <= cols) return read_global<uint4>(row + 2 * k);
    uint4 words = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = min(8, cols - k) - 1; i >= 0; --i) {  // the last first: each moves those behind it up
        words.w = words.w << 16 | words.z >> 16, words.z = words.z << 16 | words.y >> 16;
        words.y = words.y << 16 | words.x >> 16, words.x = words.x << 16 | read_global<uint16_t>(row + 2 * (k + i));
    }
    return words;
}

__device__ __forceinline__ int input_pitch(const Product& p) { return (2 << p.chunk_shift) + 64; }

// The sum of a first product's splits: one number.
__device__ __forceinline__ float sum_of_splits(const Product& p, int tokens, int token, int k) {
    float sum = 0;
    for (int split = 0; split < p.in_splits; ++split)
        sum += read_global<float>(p.in + (split * tokens + token) * p.in_stride + k);
    return p.s ? sum * read_global<float>(p.s + k) : sum;
}

// Makes the inputs of this warp's chunks of a second factor: sums of splits, scaled and rounded, [chunk, token,
// column], with zeros behind the last column.
template <class X>
__device__ __forceinline__ void make_inputs(const Product& p, unsigned char* to, int tokens, int warp, int lane) {
    int pitch = input_pitch(p), quads_shift = p.chunk_shift - 2;
    for (int chunk = warp, local = 0; chunk < p.chunks; chunk += kWarps, ++local) {
        for (int i = lane; i < tokens << quads_shift; i += 32) {
            int token = i >> quads_shift, column = (i - (token << quads_shift)) * 4;
            int k = (chunk << p.chunk_shift) + column;
            uint16_t values[4] = {0, 0, 0, 0};
            if (k + 4 <= p.cols) {
                const float* from = p.in + token * p.in_stride + k;
                float4 sum = read_global<float4>(from);
                for (int split = 1; split < p.in_splits; ++split) {
                    float4 part = read_global<float4>(from + split * tokens * p.in_stride);
                    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
                }
                if (p.s) {
                    sum.x *= read_global<float>(p.s + k), sum.y *= read_global<float>(p.s + k + 1);
                    sum.z *= read_global<float>(p.s + k + 2), sum.w *= read_global<float>(p.s + k + 3);
                }
                values[0] = round(X{}, sum.x), values[1] = round(X{}, sum.y);
                values[2] = round(X{}, sum.z), values[3] = round(X{}, sum.w);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (k + j < p.cols) values[j] = round(X{}, sum_of_splits(p, tokens, token, k + j));
            }
            uint2 packed = {values[0] | uint32_t(values[1]) << 16, values[2] | uint32_t(values[3]) << 16};
            write_shared(to + (local * tokens + token) * pitch + column * 2, packed);
        }
    }
}

// ---- a chunk's products

template <class X>
__device__ __forceinline__ constexpr uint32_t magic() {
    return sizeof(X) && __is_same(X, Bf16) ? 0x43004300u : 0x64006400u;  // two times 128, or 1024
}

// Four signed bytes b0 to b3 as numbers: (b0, b2) and (b1, b3).
__device__ __forceinline__ void numbers_of_8(Bf16, uint32_t word, uint32_t& even, uint32_t& odd) {
    // Seven bits behind 128 (0x4300). The sign's bit weighs -128 and lies at the exponent's lowest: 128 or 256.
    uint32_t high = word >> 8;
    even = subtract(Bf16{}, (word & 0x007f007fu) | 0x43004300u, (word & 0x00800080u) | 0x43004300u);
    odd = subtract(Bf16{}, (high & 0x007f007fu) | 0x43004300u, (high & 0x00800080u) | 0x43004300u);
}
__device__ __forceinline__ void numbers_of_8(F16, uint32_t word, uint32_t& even, uint32_t& odd) {
    // With its sign's bit turned a byte is itself and 128: behind 1024 that is 1152 (0x6480) and itself.
    even = subtract(F16{}, (word & 0x00ff00ffu) ^ 0x64806480u, 0x64806480u);
    odd = subtract(F16{}, ((word >> 8) & 0x00ff00ffu) ^ 0x64806480u, 0x64806480u);
}

// c += a b for 16 rows (two a lane), 8 columns of each lane, in two steps.
template <class X>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&low)[4], const uint32_t (&high)[4],
                                         const uint32_t (&b)[4]) {
    const uint32_t first[4] = {low[0], high[0], low[1], high[1]}, second[4] = {low[2], high[2], low[3], high[3]};
    mma(X{}, c, first, b[0], b[1]);
    mma(X{}, c, second, b[2], b[3]);
}

// As integers come out of their words: columns (0, 2), (1, 3), (4, 6), (5, 7).
__device__ __forceinline__ void interleave(uint32_t (&b)[4]) {
    const uint32_t from[4] = {b[0], b[1], b[2], b[3]};
    b[0] = __byte_perm(from[0], from[1], 0x5410), b[1] = __byte_perm(from[0], from[1], 0x7632);
    b[2] = __byte_perm(from[2], from[3], 0x5410), b[3] = __byte_perm(from[2], from[3], 0x7632);
}

template <class X>
__device__ __forceinline__ void multiply_and_add(float& sum, const uint4& weights, const uint32_t (&b)[4]) {
    const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum = fmaf(to_float(X{}, uint16_t(words[i])), to_float(X{}, uint16_t(b[i])), sum);
        sum = fmaf(to_float(X{}, uint16_t(words[i] >> 16)), to_float(X{}, uint16_t(b[i] >> 16)), sum);
    }
}

template <Number kType>
constexpr int kColumns = kType == Number::i8 || kType == Number::i4 ? 256 : 128;  // of a chunk, at most

// c (and with one token of two-byte weights c[0][0] and c[0][2] of each lane's own columns) += the chunk's products.
// Lane 4 g + t has rows g and g + 8 and of every 32 columns eight: of two-byte weights 8 t to 8 t + 7; of 8-bit ones of
// every 64 columns 16 t to 16 t + 15; of 4-bit ones of every 64 columns 8 t to 8 t + 7 and 32 more.
template <class X, int kTokens, Number kType>
__device__ __forceinline__ void multiply_chunk(const Product& p, int row, int chunk, const unsigned char* inputs,
                                               int tokens, const unsigned char* slot, uint64_t* full, uint32_t parity,
                                               int lane, float (&c)[(kTokens + 7) / 8][4]) {
    constexpr int kTiles = (kTokens + 7) / 8, kRounds = kColumns<kType> / 128;
    constexpr bool kPlain = kType != Number::i8 && kType != Number::i4, kAdds = kTokens == 1 && kPlain;
    constexpr int kSlotPitch = kType == Number::i4 ? kPitchOf4 : kPitch;
    const int g = lane >> 2, t = lane & 3, first = chunk << p.chunk_shift;
    const int columns = min(1 << p.chunk_shift, p.cols - first);
    const unsigned char *low = slot + g * kSlotPitch, *high = low + 8 * kSlotPitch;

    // Of the chunk's 32 columns, lane t has the scales (the high half: a float32's) and zeros of numbers t and t + 4.
    uint32_t scales[2][2] = {};
    if (kType == Number::i4) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int column = 32 * (t + 4 * half), of = row + g + 8 * i;
                if (column < columns && of < p.rows) {
                    const int64_t at = int64_t(of) * p.groups + ((first + column) >> p.group_shift);
                    const uint32_t scale = read_global<uint16_t>(static_cast<const uint16_t*>(p.scales) + at);
                    scales[i][half] = scale << 16 | (p.zeros ? read_global<uint8_t>(p.zeros + at) : 8);
                }
            }
    }

    // 128 columns at a time; in turn, for the sake of registers.
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
        const int begin = 128 * round;
        if (begin >= columns) break;
        // Inputs first: they come while weights are awaited.
        uint32_t b[4][kTiles][4];
#pragma unroll
        for (int u = 0; u < 4; ++u)
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                const int token = kAdds ? 0 : 8 * n + g;
                const int k = begin + (kType == Number::i8 ? 64 * (u / 2) + 16 * t + 8 * (u % 2) : 32 * u + 8 * t);
                uint4 value = {0, 0, 0, 0};
                if (k < columns && token < tokens)
                    value = inputs ? read_shared<uint4>(inputs + token * input_pitch(p) + 2 * k)
                                   : read_8(p.x + token * p.x_stride, first + k, p.cols, p.x_wide);
                b[u][n][0] = value.x, b[u][n][1] = value.y, b[u][n][2] = value.z, b[u][n][3] = value.w;
                if (!kPlain) interleave(b[u][n]);
            }
        if (round == 0) barrier_wait(full, parity);

        if constexpr (kPlain) {
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                const int k = 32 * u + 8 * t;
                if (32 * u >= columns) break;
                uint4 a = {0, 0, 0, 0}, a8 = {0, 0, 0, 0};
                if (k < columns) a = read_shared<uint4>(low + 2 * k), a8 = read_shared<uint4>(high + 2 * k);
                if constexpr (kAdds) {
                    multiply_and_add<X>(c[0][0], a, b[u][0]);
                    multiply_and_add<X>(c[0][2], a8, b[u][0]);
                } else {
                    const uint32_t rows[4] = {a.x, a.y, a.z, a.w}, rows_8[4] = {a8.x, a8.y, a8.z, a8.w};
#pragma unroll
                    for (int n = 0; n < kTiles; ++n) multiply<X>(c[n], rows, rows_8, b[u][n]);
                }
            }
        } else if constexpr (kType == Number::i8) {
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                const int column = begin + 64 * (u / 2);
                if (column >= columns) break;
                // Of 16 bytes, the first eight and the others.
                const uint2 a = read_shared<uint2>(low + column + 16 * t + 8 * (u % 2));
                const uint2 a8 = read_shared<uint2>(high + column + 16 * t + 8 * (u % 2));
                uint32_t rows[4], rows_8[4];
                numbers_of_8(X{}, a.x, rows[0], rows[1]), numbers_of_8(X{}, a.y, rows[2], rows[3]);
                numbers_of_8(X{}, a8.x, rows_8[0], rows_8[1]), numbers_of_8(X{}, a8.y, rows_8[2], rows_8[3]);
#pragma unroll
                for (int n = 0; n < kTiles; ++n) multiply<X>(c[n], rows, rows_8, b[u][n]);
            }
        } else {
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                const int column = begin + 64 * (u / 2);
                if (column >= columns) break;
                constexpr uint32_t kMask = 0x000f000fu;
                // One half of these bytes, the low or the high one.
                const uint2 a = read_shared<uint2>(low + column / 2 + 8 * t);
                const uint2 a8 = read_shared<uint2>(high + column / 2 + 8 * t);
                const uint32_t words[2] = {a.x, a.y}, words_8[2] = {a8.x, a8.y};
                const uint32_t scale = __shfl_sync(~0u, round ? scales[0][1] : scales[0][0], (lane & ~3) | u);
                const uint32_t scale_8 = __shfl_sync(~0u, round ? scales[1][1] : scales[1][0], (lane & ~3) | u);
                const uint32_t zero = magic<X>() | (scale & 0xff) * 0x10001u;
                const uint32_t zero_8 = magic<X>() | (scale_8 & 0xff) * 0x10001u;
                const float by = to_float(Bf16{}, uint16_t(scale >> 16));
                const float by_8 = to_float(Bf16{}, uint16_t(scale_8 >> 16));
                uint32_t rows[4], rows_8[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int shift = 8 * (i % 2) + 4 * (u % 2);
                    rows[i] = subtract(X{}, ((words[i / 2] >> shift) & kMask) | magic<X>(), zero);
                    rows_8[i] = subtract(X{}, ((words_8[i / 2] >> shift) & kMask) | magic<X>(), zero_8);
                }
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    float part[4] = {0, 0, 0, 0};
                    multiply<X>(part, rows, rows_8, b[u][n]);
                    c[n][0] = fmaf(part[0], by, c[n][0]), c[n][1] = fmaf(part[1], by, c[n][1]);
                    c[n][2] = fmaf(part[2], by_8, c[n][2]), c[n][3] = fmaf(part[3], by_8, c[n][3]);
                }
            }
        }
    }
}

// ---- the kernel

// Shared memory: the slots' barriers; scales of a task's rows, twice; the warps' sums of a task, twice; their inputs;
// their rings.
__host__ __device__ constexpr size_t scales_at() { return kWarps * kMostSlots * 8; }
__host__ __device__ constexpr size_t sums_at() { return scales_at() + 2 * kRows * 4; }
__host__ __device__ constexpr size_t inputs_at(int tokens) {
    return sums_at() + (size_t(2 * kWarps * kSumPitch * 4) * tokens + 127) / 128 * 128;
}

template <class X, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens <= 8 ? 2 : 1) decode_kernel(const __grid_constant__ Job job) {
    constexpr int kTiles = (kTokens + 7) / 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tokens = job.tokens;
    unsigned char* shared = shared_memory();
    uint64_t* full = reinterpret_cast<uint64_t*>(shared) + warp * kMostSlots;
    float* scales = reinterpret_cast<float*>(shared + scales_at());
    float* sums = reinterpret_cast<float*>(shared + sums_at());
    unsigned char* made = shared + inputs_at(kTokens) + warp * job.input_bytes;
    unsigned char* ring = shared + inputs_at(kTokens) + kWarps * job.input_bytes + warp * job.slots * job.slot_bytes;

    if (lane < job.slots) barrier_init(full + lane, 32);
    fence_async();
    __syncwarp();
    let_next_launch();
    Walk ahead(job);
    bool more = true;
    for (int i = 0; i < job.slots && more; ++i) {
        more = ahead.settle(job, warp);
        if (more) fill(job, ahead, ring + i * job.slot_bytes, full + i, lane), ahead.chunk += kWarps;
    }
    await_last_launch();

    int slot = 0, parity = 0, turn = 0;
    int made_of = -1;
    for (int stage = job.begin; stage < job.end; ++stage) {
        if (stage > job.begin) sync_grid();
        const int end = first_task(job, stage, blockIdx.x + 1), parts = job.stages[stage].parts;
        for (int part = 0; part < parts; ++part)
            for (int task = first_task(job, stage, blockIdx.x); task < end; ++task) {
                const Task at = task_of(job, stage, task, part);
                const Product& p = job.products[at.product];
                // One output of a thread; what it needs besides the sum is asked for first.
                const int token = threadIdx.x / kRows, row = at.row + threadIdx.x % kRows;
                const bool live = token < tokens && row < p.rows;
                int to = row;
                float scale = 1, bias = 0;
                const bool scaled = p.from == From::weights && p.type == Number::i8;
                if (scaled && threadIdx.x < kRows && row < p.rows)
                    scale = read_global<float>(static_cast<const float*>(p.scales) + row);
                if (live) {
                    if (p.place) to = read_global<int32_t>(p.place + row);
                    if (p.bias)
                        bias = to_float(X{}, read_global<uint16_t>(static_cast<const uint16_t*>(p.bias) + to));
                }

                float c[kTiles][4] = {};
                if (p.from == From::weights) {
                    if (p.in && made_of != at.product) {
                        make_inputs<X>(p, made, tokens, warp, lane);
                        made_of = at.product;
                        __syncwarp();
                    }
                    const int last = min((at.split + 1) * p.span, p.chunks);
                    int local = 0;
                    for (int chunk = at.split * p.span + warp; chunk < last; chunk += kWarps, ++local) {
                        const unsigned char* inputs = p.in ? made + local * tokens * input_pitch(p) : nullptr;
                        unsigned char* weights = ring + slot * job.slot_bytes;
                        if (p.type == Number::i4)
                            multiply_chunk<X, kTokens, Number::i4>(p, at.row, chunk, inputs, tokens, weights,
                                                                   full + slot, parity, lane, c);
                        else if (p.type == Number::i8)
                            multiply_chunk<X, kTokens, Number::i8>(p, at.row, chunk, inputs, tokens, weights,
                                                                   full + slot, parity, lane, c);
                        else
                            multiply_chunk<X, kTokens, Number::bf16>(p, at.row, chunk, inputs, tokens, weights,
                                                                     full + slot, parity, lane, c);
                        fence_async();
                        __syncwarp();  // all lanes have read the slot
                        if (more) more = ahead.settle(job, warp);
                        if (more) fill(job, ahead, weights, full + slot, lane), ahead.chunk += kWarps;
                        if (++slot == job.slots) slot = 0, parity ^= 1;
                    }
                    if (kTokens == 1 && p.type != Number::i8 && p.type != Number::i4)
#pragma unroll
                        for (int i = 0; i < 4; i += 2) {
                            c[0][i] += __shfl_xor_sync(~0u, c[0][i], 1);
                            c[0][i] += __shfl_xor_sync(~0u, c[0][i], 2);
                        }
                }

                float value = 0, gate = 0;
                if (p.from == From::weights) {
                    // Of two buffers in turn: whoever writes one again has been at a barrier behind its readers.
                    float* mine = sums + (turn * kWarps + warp) * kTokens * kSumPitch;
#pragma unroll
                    for (int n = 0; n < kTiles; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            int of = 8 * n + 2 * (lane & 3) + (i & 1);
                            if (of < kTokens)
                                write_shared(mine + of * kSumPitch + (lane >> 2) + 8 * (i >> 1), c[n][i]);
                        }
                    if (scaled && threadIdx.x < kRows) write_shared(scales + turn * kRows + threadIdx.x, scale);
                    __syncthreads();
                    if (scaled) scale = read_shared<float>(scales + turn * kRows + threadIdx.x % kRows);
                    if (live)
                        for (int w = 0; w < kWarps; ++w)
                            value += read_shared<float>(sums + ((turn * kWarps + w) * kTokens + token) * kSumPitch +
                                                        row - at.row);
                    turn ^= 1;
                } else if (live && p.from == From::sums) {
                    value = to_float(X{}, round(X{}, sum_of_splits(p, tokens, token, row)));
                } else if (live) {
                    const unsigned char* both = p.x + token * p.x_stride + 2 * row;
                    gate = to_float(X{}, read_global<uint16_t>(both));
                    value = to_float(X{}, read_global<uint16_t>(both + 2 * p.rows));
                }
                if (!live) continue;
                value *= scale;
                if (p.to == To::partial) {
                    write_global(p.out + (at.split * tokens + token) * p.out_stride + row, value);
                    continue;
                }
                value += bias;
                unsigned char* y = p.y + token * p.y_stride + 2 * to;
                if (p.to == To::multiply) {
                    // The gate is this same thread's own.
                    if (p.from == From::weights) gate = to_float(X{}, read_global<uint16_t>(y));
                    value = quotient(gate, 1.0f + exponential(-gate)) * to_float(X{}, round(X{}, value));
                }
                write_global(y, round(X{}, value));
            }
    }
}

// ---- the host's side

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
int log2_of(int64_t n) {
    int shift = 0;
    while ((int64_t(1) << shift) < n) ++shift;
    return shift;
}

bool plain(Number type) { return type != Number::i8 && type != Number::i4; }

bool valid(const Matrix& m, Number activation, int64_t least_rows = 1) {
    constexpr int64_t kMost = int64_t(1) << 22;
    if (m.rows < least_rows || m.cols < 1 || m.rows > kMost || m.cols > kMost) return false;
    if (m.rows == 0) return true;
    if (!m.data) return false;
    if (plain(m.type)) return m.type == activation && m.stride >= 2 * m.cols && m.stride % 2 == 0;
    if (!m.scales) return false;
    if (m.type == Number::i8) return m.stride >= m.cols;
    return (m.group == 32 || m.group == 64 || m.group == 128) && m.stride >= ceil_divide(m.cols, 64) * 32;
}

// What of a product follows from its weight.
Product product_of(const Matrix& m) {
    Product p{};
    p.weight = static_cast<const unsigned char*>(m.data), p.scales = m.scales, p.zeros = m.zeros, p.stride = m.stride;
    p.rows = int(m.rows), p.cols = int(m.cols), p.type = m.type;
    p.row_bytes = int(plain(m.type) ? 2 * m.cols : m.type == Number::i8 ? m.cols : ceil_divide(m.cols, 64) * 32);
    if (m.type == Number::i4) p.group_shift = log2_of(m.group), p.groups = int(ceil_divide(m.cols, m.group));
    uint64_t all = reinterpret_cast<uintptr_t>(m.data) | uint64_t(m.stride) | uint64_t(p.row_bytes);
    p.step = all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : all % 2 == 0 ? 2 : 1;
    // Chunks are shorter where otherwise not every warp would have one.
    p.chunk_shift = log2_of(plain(m.type) ? kColumns<Number::bf16> : kColumns<Number::i8>);
    while (p.chunk_shift > (plain(m.type) ? 5 : 6) && (m.cols >> p.chunk_shift) < kWarps) --p.chunk_shift;
    p.chunk_bytes_shift = p.chunk_shift + (plain(m.type) ? 1 : m.type == Number::i8 ? 0 : -1);
    p.chunks = int(ceil_divide(m.cols, int64_t(1) << p.chunk_shift));
    p.splits = 1, p.span = p.chunks;
    return p;
}

void set_splits(Product& p, int splits) {
    splits = splits < kMostSplits ? splits : kMostSplits;
    p.span = int(ceil_divide(p.chunks, splits)), p.splits = int(ceil_divide(p.chunks, p.span));
    p.inverse_splits = uint32_t((uint64_t(1) << 32) / p.splits + 1);
}

// Into how many parts to cut the columns of first factors: bytes of the block that reads most, and what all blocks then
// read of sums, which are in the L2, at twice memory's rate. The fewest of those that are equally good.
int choose_splits(const Product* products, int count, int blocks, int64_t tokens) {
    int best = 1;
    double least = 0;
    for (int splits = 1; splits <= kMostSplits; ++splits) {
        int64_t tasks = 0, bytes = 0, ranks = 0, chunks = products[0].chunks;
        for (int i = 0; i < count; ++i) {
            tasks += ceil_divide(products[i].rows, kRows) * splits;
            bytes += int64_t(products[i].rows) * products[i].row_bytes, ranks += products[i].rows;
        }
        if (splits > 1 && chunks / splits < kWarps / 2) break;
        double time = double(bytes) / double(tasks) * double(ceil_divide(tasks, blocks)) +
                      double(splits * ranks * tokens * 4) / 2;
        if (splits == 1 || time < 0.98 * least) best = splits, least = time;
    }
    return best;
}

int kernel_tokens(int64_t tokens) { return tokens <= 1 ? 1 : tokens <= 8 ? 8 : 16; }

// Of a warp's chunks of a second factor.
int input_bytes(const Product& p, int64_t tokens) {
    return int(ceil_divide(p.chunks, kWarps) * tokens * ((2 << p.chunk_shift) + 64));
}

// A job that is being made. Stages and products are as they run; memory is counted, and laid out if there is some.
struct Builder {
    const Problem& problem;
    const Device& device;
    const Choices& choices;
    unsigned char* memory;
    Job job{};
    int products = 0, stages = 0;
    size_t used = 0;

    unsigned char* take(int64_t bytes) {
        unsigned char* at = memory ? memory + used : nullptr;
        used += size_t(ceil_divide(bytes, 256) * 256);
        return at;
    }
    int open_stage() {
        job.stages[stages] = {products, 0, 1, 0, 0};
        return stages++;
    }
    Product& add(const Product& p) {
        ++job.stages[stages - 1].count;
        return job.products[products++] = p;
    }

    // The first factors of `layers` as a stage, if there are any; each second factor's `in` and so on in `inputs`.
    void shrink(const Layer* layers, int count, const void* x, int64_t x_stride, Product* inputs) {
        int stage = open_stage(), first = products, at[kMostSiblings];
        for (int i = 0; i < count; ++i) {
            at[i] = products;
            if (layers[i].form != Form::dense) set_x(add(product_of(layers[i].first)), x, x_stride);
        }
        if (products == first) {
            --stages;
            return;
        }
        int splits = choices.splits ? choices.splits
                                    : choose_splits(job.products + first, products - first, device.multiprocessors,
                                                    problem.tokens);
        for (int i = 0; i < count; ++i) {
            if (layers[i].form == Form::dense) continue;
            Product& p = job.products[at[i]];
            set_splits(p, splits);
            p.to = To::partial, p.out_stride = int(ceil_divide(p.rows, 4) * 4);
            p.out = reinterpret_cast<float*>(take(int64_t(4) * p.splits * problem.tokens * p.out_stride));
            inputs[i].in = p.out, inputs[i].in_splits = p.splits, inputs[i].in_stride = p.out_stride;
        }
        finish_stage(stage);
        // Of ranks and tokens that a block's memory has no room for, a stage of their own makes activations, once.
        int extra = -1;
        for (int i = 0; i < count; ++i) {
            if (layers[i].form == Form::dense || fits(product_of(layers[i].second))) continue;
            if (extra < 0) extra = open_stage();
            Product z = inputs[i];
            z.from = From::sums, z.to = To::y, z.type = problem.activation, z.s = layers[i].s, z.splits = 1;
            z.rows = int(layers[i].first.rows);
            const int64_t stride = ceil_divide(z.rows, 8) * 8;
            z.y = take(2 * problem.tokens * stride), z.y_stride = int(2 * stride);
            add(z);
            set_x(inputs[i], z.y, stride);
        }
        if (extra >= 0) finish_stage(extra);
    }

    // Whether a second factor's inputs leave room for two slots in a block's memory.
    bool fits(const Product& p) const {
        size_t bytes = inputs_at(kernel_tokens(problem.tokens)) + size_t(kWarps) * input_bytes(p, problem.tokens);
        return bytes + size_t(kWarps) * 2 * kRows * kPitch <= device.shared_bytes;
    }

    void set_x(Product& p, const void* x, int64_t x_stride) {
        p.x = static_cast<const unsigned char*>(x), p.x_stride = int(2 * x_stride);
        p.x_wide = reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_stride % 8 == 0;
    }

    // A layer's last product: of the stage that is open.
    void expand(const Layer& layer, const Product& input, const void* x, int64_t x_stride, unsigned char* y,
                int64_t y_stride, To to) {
        Product p = product_of(layer.form == Form::dense ? layer.first : layer.second);
        if (layer.form == Form::dense)
            set_x(p, x, x_stride);
        else if (input.x_stride)
            p.x = input.x, p.x_stride = input.x_stride, p.x_wide = input.x_wide;
        else
            p.in = input.in, p.in_splits = input.in_splits, p.in_stride = input.in_stride, p.s = layer.s;
        p.to = to, p.y = y, p.y_stride = int(2 * y_stride), p.bias = layer.bias;
        if (layer.form == Form::pivoted) p.place = layer.place + layer.first.rows;
        if (p.rows) add(p);
        if (layer.form != Form::pivoted) return;
        Product pivots = p;
        pivots.from = From::sums, pivots.in = input.in, pivots.in_splits = input.in_splits;
        pivots.in_stride = input.in_stride, pivots.weight = nullptr, pivots.rows = int(layer.first.rows), pivots.chunks = 0;
        pivots.type = problem.activation, pivots.place = layer.place, pivots.row_bytes = 0;
        add(pivots);
    }

    void finish_stage(int stage) {
        Stage& s = job.stages[stage];
        for (int i = 0; i < s.count; ++i) {
            Product& p = job.products[s.first + i];
            p.tasks = int(ceil_divide(p.rows, kRows) * p.splits);
            // What a task takes besides its weights, about: its sums, and the barrier behind them.
            p.cost = uint32_t(kRows * p.row_bytes / p.splits / 64 + 16);
        }
        if (s.parts == 2) s.count = 1, job.products[s.first].cost += job.products[s.first + 1].cost;
        for (int i = 0; i < s.count; ++i) {
            Product& p = job.products[s.first + i];
            p.inverse_cost = 0xffffffffu / p.cost;  // below 2^32 / cost, so that multiples of it come out one too small
            s.cost += p.tasks * p.cost;
        }
    }
};

int64_t outputs_of(const Layer& layer) {
    return layer.form == Form::dense      ? layer.first.rows
           : layer.form == Form::pivoted ? layer.first.rows + layer.second.rows
                                         : layer.second.rows;
}

Status check(const Problem& problem, const Device& device, const Choices& choices) {
    if (problem.activation != Number::bf16 && problem.activation != Number::f16) return Status::unsupported;
    if (problem.tokens < 0 || !problem.layers || problem.count < 1 || device.multiprocessors < 1 ||
        choices.splits < 0 || choices.slots < 0)
        return Status::invalid;
    if (problem.mode == Mode::swiglu && problem.count != 2) return Status::invalid;
    if (problem.mode == Mode::gated_mlp && problem.count != 3) return Status::invalid;
    if (problem.tokens > kMostTokens || problem.count > kMostSiblings) return Status::unsupported;
    for (int i = 0; i < problem.count; ++i) {
        const Layer& layer = problem.layers[i];
        if (!valid(layer.first, problem.activation)) return Status::invalid;
        // A pivoted layer may be pivots alone.
        if (layer.form != Form::dense && (!valid(layer.second, problem.activation, layer.form == Form::factors) ||
                                          layer.second.cols != layer.first.rows))
            return Status::invalid;
        if (layer.form == Form::pivoted && !layer.place) return Status::invalid;
        if (layer.form != Form::factors && layer.s) return Status::invalid;
        bool down = problem.mode == Mode::gated_mlp && i == 2;
        if (layer.first.cols != (down ? outputs_of(problem.layers[0]) : problem.layers[0].first.cols))
            return Status::invalid;
    }
    if (problem.mode != Mode::concatenate && outputs_of(problem.layers[0]) != outputs_of(problem.layers[1]))
        return Status::invalid;
    // Activations and sums are addressed with 32 bits, and work is shared out so: this is up to 32 GiB of weights.
    int64_t elements = 0;
    for (int i = 0; i < problem.count; ++i)
        for (const Matrix* m : {&problem.layers[i].first, &problem.layers[i].second})
            if (m == &problem.layers[i].first || problem.layers[i].form != Form::dense) elements += m->rows * m->cols;
    if (elements > int64_t(1) << 34) return Status::unsupported;
    constexpr int64_t kMost = int64_t(1) << 26;
    if (problem.x_stride > kMost || problem.y_stride > kMost || problem.x_stride < 0 || problem.y_stride < 0)
        return Status::unsupported;
    int64_t inputs = problem.layers[0].first.cols, outputs = 0;
    for (int i = 0; i < problem.count; ++i) outputs += outputs_of(problem.layers[i]);
    if (problem.mode != Mode::concatenate) outputs = outputs_of(problem.layers[problem.count - 1]);
    if (problem.tokens > 1 && (problem.x_stride < inputs || problem.y_stride < outputs)) return Status::invalid;
    return Status::ok;
}

// The job, whose memory is at `memory` (null: it is counted only).
Status build(const Problem& problem, const Device& device, const Choices& choices, void* memory, Job* job,
             Schedule* schedule) {
    if (Status status = check(problem, device, choices); status != Status::ok) return status;
    Builder builder{problem, device, choices, static_cast<unsigned char*>(memory)};
    const Layer* layers = problem.layers;
    const int siblings = problem.mode == Mode::gated_mlp ? 2 : problem.count;
    const int64_t tokens = problem.tokens, middle = outputs_of(layers[0]);
    unsigned char* y = static_cast<unsigned char*>(problem.y);
    Product inputs[kMostSiblings] = {};
    builder.shrink(layers, siblings, problem.x, problem.x_stride, inputs);
    int stage = builder.open_stage();
    if (problem.mode == Mode::concatenate) {
        int64_t column = 0;
        for (int i = 0; i < siblings; ++i) {
            builder.expand(layers[i], inputs[i], problem.x, problem.x_stride, y ? y + 2 * column : y,
                           problem.y_stride, To::y);
            column += outputs_of(layers[i]);
        }
        builder.finish_stage(stage);
    } else {
        const bool last = problem.mode == Mode::swiglu;
        unsigned char* product = last ? y : builder.take(2 * tokens * middle);
        int64_t stride = last ? problem.y_stride : middle;
        if (layers[0].form != Form::pivoted && layers[1].form != Form::pivoted) {
            for (int i = 0; i < 2; ++i)
                builder.expand(layers[i], inputs[i], problem.x, problem.x_stride, product, stride,
                               i ? To::multiply : To::y);
            builder.job.stages[stage].parts = 2;
            builder.finish_stage(stage);
        } else {  // whose outputs lie apart: both first, and one more stage
            unsigned char* both = builder.take(4 * tokens * middle);
            for (int i = 0; i < 2; ++i)
                builder.expand(layers[i], inputs[i], problem.x, problem.x_stride, both ? both + 2 * i * middle : both,
                               2 * middle, To::y);
            builder.finish_stage(stage);
            stage = builder.open_stage();
            Product p{};
            p.from = From::gate_and_up, p.to = To::multiply, p.type = problem.activation, p.rows = int(middle);
            p.splits = 1, p.y = product, p.y_stride = int(2 * stride);
            builder.set_x(p, both, 2 * middle);
            builder.add(p);
            builder.finish_stage(stage);
        }
        if (!last) {
            Product input{};
            builder.shrink(layers + 2, 1, product, middle, &input);
            stage = builder.open_stage();
            builder.expand(layers[2], input, product, middle, y, problem.y_stride, To::y);
            builder.finish_stage(stage);
        }
    }

    Job& made = builder.job;
    made.begin = 0, made.end = builder.stages, made.tokens = int(tokens);
    made.bulk = choices.copies == Copies::bulk;
    int64_t most_tasks = 0;
    for (int i = 0; i < builder.products; ++i) {
        const Product& p = made.products[i];
        if (p.from != From::weights) continue;
        made.slot_bytes = made.slot_bytes > kRows * kPitchOf4 || p.type != Number::i4 ? kRows * kPitch
                                                                                     : kRows * kPitchOf4;
        int bytes = p.in_splits ? input_bytes(p, tokens) : 0;  // `in` is null where memory is only counted
        if (bytes > made.input_bytes) made.input_bytes = bytes;
    }
    for (int i = 0; i < builder.stages; ++i) {
        int64_t tasks = 0;
        for (int j = 0; j < made.stages[i].count; ++j) tasks += made.products[made.stages[i].first + j].tasks;
        if (tasks > most_tasks) most_tasks = tasks;
    }
    schedule->stages = builder.stages;
    schedule->blocks = int(most_tasks < device.multiprocessors ? most_tasks : device.multiprocessors);
    for (int i = 0; i < builder.stages; ++i)
        made.stages[i].share = uint32_t(ceil_divide(made.stages[i].cost, schedule->blocks));
    *job = made;
    schedule->splits = made.products[0].splits;
    schedule->workspace_bytes = builder.used;
    return Status::ok;
}

// As many slots as `shared` bytes have room for; 0 if not even two.
int slots_in(const Job& job, const Choices& choices, size_t shared) {
    size_t fixed = inputs_at(kernel_tokens(job.tokens)) + size_t(kWarps) * job.input_bytes;
    size_t ring = size_t(kWarps) * job.slot_bytes;
    size_t slots = shared < fixed ? 0 : (shared - fixed) / ring;
    if (slots > size_t(kMostSlots)) slots = kMostSlots;
    if (choices.slots && size_t(choices.slots) < slots) slots = size_t(choices.slots);
    return slots < 2 ? 0 : int(slots);
}
size_t shared_of(const Job& job) {
    return inputs_at(kernel_tokens(job.tokens)) + size_t(kWarps) * (job.input_bytes + job.slots * job.slot_bytes);
}

using Kernel = void (*)(Job);
Kernel kernel_of(Number activation, int64_t tokens) {
    constexpr int kOne = 1, kFew = 8, kMore = 16;
    switch (kernel_tokens(tokens)) {
        case kOne: return activation == Number::bf16 ? decode_kernel<Bf16, kOne> : decode_kernel<F16, kOne>;
        case kFew: return activation == Number::bf16 ? decode_kernel<Bf16, kFew> : decode_kernel<F16, kFew>;
        default: return activation == Number::bf16 ? decode_kernel<Bf16, kMore> : decode_kernel<F16, kMore>;
    }
}

}  // namespace

const char* message(Status status) {
    switch (status) {
        case Status::ok: return "ok";
        case Status::invalid: return "sizes, pointers or options that make no problem";
        case Status::unsupported: return "more tokens, siblings or weights than these kernels take on this device";
        case Status::workspace: return "the workspace is too small, or not aligned to 256 bytes";
        case Status::no_device:
            return "there is no CUDA device of this number, of sm_80 or newer, with a driver as new as the CUDA that "
                   "this was built with";
        case Status::failed: return "CUDA refused the launch";
    }
    return "no status";
}

Status describe(int number, Device* device) {
    if (!device) return Status::invalid;
#if defined(__CUDACC__)
    int multiprocessors = 0, shared = 0, major = 0;
    bool known = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, number) == cudaSuccess &&
                 cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, number) == cudaSuccess &&
                 cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number) == cudaSuccess;
    if (!known) cudaGetLastError();
    if (!known || major < 8) return Status::no_device;
    *device = {multiprocessors, size_t(shared), major >= 9};
#else
    if (number) return Status::no_device;
    *device = {3, device::most_shared, device::kBulk};
#endif
    return Status::ok;
}

Status schedule(const Problem& problem, const Device& device, const Choices& choices, Schedule* result) {
    if (!result) return Status::invalid;
    Job job;
    Status status = build(problem, device, choices, nullptr, &job, result);
    if (status != Status::ok) return status;
    job.slots = result->slots = slots_in(job, choices, device.shared_bytes);
    result->shared_bytes = shared_of(job);
    return job.slots ? Status::ok : Status::unsupported;
}

Status workspace_bytes(const Problem& problem, const Device& device, size_t* bytes) {
    Schedule result{};
    Status status = schedule(problem, device, Choices(), &result);
    if (status == Status::ok && bytes) *bytes = result.workspace_bytes;
    return bytes ? status : Status::invalid;
}

Status decode(const Problem& problem, const Device& device, void* workspace, size_t bytes, void* stream,
              const Choices& choices) {
    Job job;
    Schedule plan{};
    Status status = build(problem, device, choices, workspace, &job, &plan);
    if (status != Status::ok || problem.tokens == 0) return status;
    if (!problem.x || !problem.y) return Status::invalid;
    if (plan.workspace_bytes > bytes || (plan.workspace_bytes && !workspace) ||
        reinterpret_cast<uintptr_t>(workspace) % 256)
        return Status::workspace;
    const Kernel kernel = kernel_of(problem.activation, problem.tokens);
    const auto on = static_cast<Stream>(stream);
    if (choices.launch != Launch::dependent || plan.stages == 1) {
        job.slots = slots_in(job, choices, device.shared_bytes);
        if (!job.slots) return Status::unsupported;
        Launched done = launch(kernel, job, plan.blocks, kThreads, shared_of(job), device.shared_bytes,
                               plan.stages > 1, false, on);
        if (done == Launched::yes) return Status::ok;
        if (done == Launched::failed || choices.launch == Launch::cooperative) return Status::failed;
    }
    // Half of the memory for each launch where they overlap: the next one's blocks find room while this one's still run.
    job.slots = slots_in(job, choices, device.shared_bytes / (device.dependent ? 2 : 1));
    if (!job.slots) job.slots = slots_in(job, choices, device.shared_bytes);
    if (!job.slots) return Status::unsupported;
    for (int stage = 0; stage < plan.stages; ++stage) {
        job.begin = stage, job.end = stage + 1;
        const bool dependent = stage > 0 && device.dependent;
        Launched done = launch(kernel, job, plan.blocks, kThreads, shared_of(job), device.shared_bytes, false,
                               dependent, on);
        if (done != Launched::yes) return Status::failed;
    }
    return Status::ok;
}

}  // namespace cuda
}  // namespace acip
