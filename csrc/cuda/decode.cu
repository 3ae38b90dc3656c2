// Layers of few tokens: the time of reading their weights, and as little else as there can be.
//
// A problem is a list of stages (first factors; second factors; for a whole MLP two more), a stage a list of products,
// each cut into tasks of 16 rows and, of first factors, a part of the columns. Every block has its share of each
// stage's tasks, and its 8 warps take their chunks in turn: 16 rows of up to 256 bytes. So what a warp reads, from the
// first stage to the last, is known when the launch begins, and it is read as one stream: a ring of slots in shared
// memory, private to the warp, that copies fill (`cp.async.bulk` on sm_90, `cp.async` before) as far ahead as there are
// slots. Weights depend on nothing, so the stream does not stop for a barrier: while the blocks wait for each other
// between two stages, the next stage's weights keep coming, on an H100 up to 128 KiB of them for each multiprocessor.
//
// Sums are float32. A chunk's products go through tensor cores, weights as the rows of m16n8k16, tokens as its columns.
// Which column a lane has as which k of a fragment is free as long as both operands agree: so a lane reads 16 (4-bit
// weights: 8) consecutive bytes of a row, and no shuffle is needed. Integers become numbers by their bits: set into the
// mantissa of 128 (bfloat16) or 1024 (float16), from which that and the zero are subtracted again, two at a time.
// Scales multiply sums.
//
// What is done besides is what such a kernel's time goes to when it is not memory's: a warp that waits for one thing
// after another, with too few others to do something meanwhile. So two blocks share a multiprocessor where they fit;
// inputs are in shared memory, made once by a block; a warp has what it needs of a product in registers, and no load of
// parameters for each chunk; and a block's barrier, with the outputs behind it, is for several tasks at a time.
//
// A task's eight sums are added up in the warps' order, a product's splits in theirs; there are no atomics but in the
// barriers. In the dependent form every stage is a launch of the same kernel, which starts to read weights before the
// launch before it has ended.
#include <cstring>
#include <type_traits>

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
// Bytes of a row in a slot of 4-bit weights, of others twice as many; and from one row of a slot to the next: rows that
// lanes read together are in different banks.
constexpr int kRowOf4 = 128, kPitch = 256 + 64, kPitchOf4 = 128 + 32;
// From one token's sums of a warp to the next's, in floats; for the same reason.
constexpr int kSumPitch = kRows + 4;
// Tasks between two barriers of a block: about as many outputs as a block has threads.
__host__ __device__ constexpr int batch_of(int tokens) { return tokens == 1 ? 8 : tokens <= 8 ? 2 : 1; }

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
    int made;  // inputs of one number, not 0, are the same, and are made in shared memory
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
    int slots, slot_bytes;  // of a warp
    int input_bytes;        // of a block
    int block_bytes;        // of shared memory, that a block may have
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

// A block's tasks of one product, one after the other, and a warp's chunks of each. What a task needs of its product is
// here, in registers: a launch's parameters can be indexed, but each such load waits for the one before it.
struct Run {
    int product, left, row, split, splits, span, chunks, start;

    __device__ __forceinline__ Run() : product(0), left(0), row(0), split(0), splits(1), span(0), chunks(0), start(0) {}

    // From `task` of the stage on, which is before `end`.
    __device__ __forceinline__ Run(const Job& job, int stage, int task, int end, int part, int warp) {
        left = end - task, product = job.stages[stage].first;
        while (task >= job.products[product].tasks) task -= job.products[product++].tasks;
        left = min(left, job.products[product].tasks - task);
        product += part;
        const Product& p = job.products[product];
        splits = p.splits, span = p.span, chunks = p.chunks;
        const int tile = splits == 1 ? task : int(__umulhi(task, p.inverse_splits));
        row = tile * kRows, split = task - tile * splits;
        // Chunks go to the warps in turn through all of a product's tasks, so that few of a task leave no warp idle.
        start = (warp - task * span) & (kWarps - 1);
    }
    __device__ __forceinline__ void next() {
        --left, start = (start - span) & (kWarps - 1);
        if (++split == splits) split = 0, row += kRows;
    }
    __device__ __forceinline__ int begin() const { return split * span + start; }
    __device__ __forceinline__ int end() const { return min((split + 1) * span, chunks); }
};

// A warp's chunks, one after the other, and where they are.
struct Walk {
    int stage, task, end, part, chunk, chunk_end;
    Run run;
    const unsigned char* weight;
    int64_t stride;
    int rows, row_bytes, layout;

    __device__ __forceinline__ Walk(const Job& job)
        : stage(job.begin - 1), task(0), end(0), part(0), chunk(0), chunk_end(0), weight(nullptr), stride(0), rows(0),
          row_bytes(0), layout(0) {}

    // From the chunk behind the last one to one that there is, or false behind them all.
    __device__ __forceinline__ bool settle(const Job& job, int warp) {
        while (chunk >= chunk_end) {
            if (run.left > 1) {
                run.next();
            } else {
                if (task >= end) {
                    if (stage < job.begin || ++part == job.stages[stage].parts) {
                        part = 0;
                        do {
                            if (++stage >= job.end) return false;
                            end = first_task(job, stage, blockIdx.x + 1);
                        } while (first_task(job, stage, blockIdx.x) >= end);
                    }
                    task = first_task(job, stage, blockIdx.x);
                }
                run = Run(job, stage, task, end, part, warp);
                task += run.left;
                const Product& p = job.products[run.product];
                weight = p.weight, stride = p.stride, rows = p.rows, row_bytes = p.row_bytes;
                layout = p.chunk_bytes_shift | p.step << 8 | (p.type == Number::i4 ? kPitchOf4 : kPitch) << 16;
            }
            chunk = run.begin(), chunk_end = run.end();
        }
        return true;
    }
    // Log2 of a chunk's bytes; what a copy may take at once; bytes from one row of a slot to the next.
    __device__ __forceinline__ int shift() const { return layout & 0xff; }
    __device__ __forceinline__ int step() const { return layout >> 8 & 0xff; }
    __device__ __forceinline__ int pitch() const { return layout >> 16; }
};

// ---- weights on their way

// Lanes side by side copy a row's bytes, those that are left the next rows'.
template <int kStep>
__device__ __forceinline__ void copy_rows(const Walk& walk, unsigned char* slot, const unsigned char* from, int rows,
                                          int bytes, int lane) {
    const int shift = walk.shift() - (kStep == 16 ? 4 : kStep == 8 ? 3 : 2), pitch = walk.pitch();
    const int offset = (lane & ((1 << shift) - 1)) * kStep, several = shift > 5 ? 1 : 32 >> shift;
    for (int more = 0; offset + more < (bytes + 15) / 16 * 16; more += 32 * kStep) {
        int row = lane >> shift;
        unsigned char* to = slot + row * pitch + offset + more;
        const unsigned char* at = from + row * walk.stride + offset + more;
        const uint32_t size = offset + more < bytes ? kStep : 0;
#pragma unroll(kStep == 16 ? 4 : 1)
        for (; row < rows; row += several, to += several * pitch, at += several * walk.stride)
            copy_async<kStep>(to, at, kStep == 16 ? 16 : size);
        if (shift <= 5) break;
    }
}

// 16 rows of as many bytes as a slot has room for, which is nearly all there is: 32 lanes have two rows at a time, of
// 4-bit weights four, and either is as far in the slot.
__device__ __forceinline__ void copy_tile(const Walk& walk, unsigned char* slot, const unsigned char* from, int lane) {
    static_assert(4 * kPitchOf4 == 2 * kPitch);
    const bool four = walk.pitch() != kPitch;
    const int row = four ? lane >> 3 : lane >> 4, offset = (four ? lane & 7 : lane & 15) * 16;
    const int64_t several = walk.stride << (four ? 2 : 1);
    slot += row * walk.pitch() + offset, from += row * walk.stride + offset;
#pragma unroll
    for (int i = 0; i < 8; ++i, from += several) {
        if (i == 4 && four) break;
        copy_async<16>(slot + i * 2 * kPitch, from, 16);
    }
}

// For rows that lie at odd addresses: a lane puts together four bytes.
template <class T>
__device__ __forceinline__ void copy_slowly(const Walk& walk, unsigned char* slot, const unsigned char* from, int rows,
                                            int bytes, int lane) {
    constexpr int kEach = int(sizeof(T));
#pragma unroll 1
    for (int row = 0; row < rows; ++row)
#pragma unroll 1
        for (int offset = 4 * lane; offset < (bytes + 15) / 16 * 16; offset += 128) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 4; i += kEach)
                if (offset + i < bytes)
                    word |= uint32_t(read_global<T>(from + row * walk.stride + offset + i)) << 8 * i;
            write_shared(slot + row * walk.pitch() + offset, word);
        }
}

// Starts what brings a chunk of weights to a slot; whoever copies how, there are 32 arrivals at `full`. Behind the end
// of a row there are zeros up to a multiple of 16 bytes. Here of rows that are not aligned to 16 bytes.
__device__ __forceinline__ void fill_unaligned(const Walk& walk, unsigned char* slot, const unsigned char* from,
                                               int rows, int bytes, uint64_t* full, int lane) {
    if (walk.step() >= 4) {
        if (walk.step() == 8)
            copy_rows<8>(walk, slot, from, rows, bytes, lane);
        else
            copy_rows<4>(walk, slot, from, rows, bytes, lane);
        barrier_arrive_after_copies(full);
    } else {
        if (walk.step() == 2)
            copy_slowly<uint16_t>(walk, slot, from, rows, bytes, lane);
        else
            copy_slowly<uint8_t>(walk, slot, from, rows, bytes, lane);
        barrier_arrive(full, 1);
    }
}

__device__ __forceinline__ void fill(const Job& job, const Walk& walk, unsigned char* slot, uint64_t* full, int lane) {
    const int rows = min(kRows, walk.rows - walk.run.row), offset = walk.chunk << walk.shift();
    const int bytes = min(1 << walk.shift(), walk.row_bytes - offset);
    const unsigned char* from = walk.weight + walk.run.row * walk.stride + offset;
    if (walk.pitch() == kPitchOf4) {
        // Scales and zeros are read when the weights are here, from a cache then: half of the lanes has either's rows.
        const Product& p = job.products[walk.run.product];
        const int64_t at = int64_t(walk.run.row + min(lane & 15, rows - 1)) * p.groups + (offset * 2 >> p.group_shift);
        if (lane < kRows)
            prefetch(static_cast<const uint16_t*>(p.scales) + at);
        else if (p.zeros)
            prefetch(p.zeros + at);
    }
    if (walk.step() < 16) return fill_unaligned(walk, slot, from, rows, bytes, full, lane);
    if (kBulk && job.bulk) {
        // One lane for all: of several lanes the machine makes a loop around every copy.
        if (elected()) {
            const int pitch = walk.pitch();
            barrier_arrive(full, 31);
            barrier_arrive_expecting(full, rows * bytes);
#pragma unroll 4
            for (int row = 0; row < rows; ++row, slot += pitch, from += walk.stride) copy_bulk(slot, from, bytes, full);
        }
    } else {
        if (rows == kRows && bytes == kRowOf4 << (walk.pitch() == kPitch))
            copy_tile(walk, slot, from, lane);
        else
            copy_rows<16>(walk, slot, from, rows, bytes, lane);
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

// From one token's inputs in shared memory to the next's, in bytes: zeros follow up to whole chunks, and what may be read
// behind the last short one, 128 columns at once, but is not used.
__host__ __device__ __forceinline__ int input_pitch(int cols) { return (cols + 255) / 256 * 512 + 256 + 64; }

// Parts of a sum that are asked for before one is waited for.
constexpr int kAtOnce = 4;

// The sum of a first product's splits: one number.
__device__ __forceinline__ float sum_of_splits(const Product& p, int tokens, int token, int k) {
    const float scale = p.s ? read_global<float>(p.s + k) : 1, *from = p.in + token * p.in_stride + k;
    const int splits = p.in_splits, each = tokens * p.in_stride;
    float sum = 0;
#pragma unroll 1
    for (int split = 0; split < splits; split += kAtOnce) {
        float parts[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (split + i < splits) parts[i] = read_global<float>(from + (split + i) * each);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sum += parts[i];
    }
    return sum * scale;
}

// Makes the inputs of a product, by all of a block's threads: activations as they are; or sums of splits, scaled and
// rounded. [token, column], with zeros behind the last column.
template <class X>
__device__ __forceinline__ void make_inputs(const Product& p, unsigned char* to, int tokens) {
    const int cols = p.cols, pitch = input_pitch(cols), quads = (cols + 255) / 256 * 64;
    for (int token = 0; token < tokens; ++token, to += pitch) {
        if (!p.in) {
            const unsigned char* from = p.x + token * p.x_stride;
            for (int i = threadIdx.x; i < quads / 2; i += kThreads)
                write_shared(to + 16 * i, read_8(from, 8 * i, cols, p.x_wide));
            continue;
        }
        for (int i = threadIdx.x; i < quads; i += kThreads) {
            const int k = 4 * i;
            uint16_t values[4] = {0, 0, 0, 0};
            if (k + 4 <= cols) {
                const float* from = p.in + token * p.in_stride + k;
                const int splits = p.in_splits, each = tokens * p.in_stride;
                float4 sum = {0, 0, 0, 0}, scale = {1, 1, 1, 1};
                if (p.s) {
                    scale.x = read_global<float>(p.s + k), scale.y = read_global<float>(p.s + k + 1);
                    scale.z = read_global<float>(p.s + k + 2), scale.w = read_global<float>(p.s + k + 3);
                }
#pragma unroll 1
                for (int split = 0; split < splits; split += kAtOnce) {
                    float4 parts[kAtOnce] = {};
#pragma unroll
                    for (int j = 0; j < kAtOnce; ++j)
                        if (split + j < splits) parts[j] = read_global<float4>(from + (split + j) * each);
#pragma unroll
                    for (int j = 0; j < kAtOnce; ++j)
                        sum.x += parts[j].x, sum.y += parts[j].y, sum.z += parts[j].z, sum.w += parts[j].w;
                }
                values[0] = round(X{}, sum.x * scale.x), values[1] = round(X{}, sum.y * scale.y);
                values[2] = round(X{}, sum.z * scale.z), values[3] = round(X{}, sum.w * scale.w);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (k + j < cols) values[j] = round(X{}, sum_of_splits(p, tokens, token, k + j));
            }
            uint2 packed = {values[0] | uint32_t(values[1]) << 16, values[2] | uint32_t(values[3]) << 16};
            write_shared(to + 8 * i, packed);
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
    constexpr uint32_t kBits = 0x007f007fu, kSign = 0x00800080u, kMagic = 0x43004300u;
    even = subtract(Bf16{}, and_or(word, kBits, kMagic), and_or(word, kSign, kMagic));
    odd = subtract(Bf16{}, and_or(high, kBits, kMagic), and_or(high, kSign, kMagic));
}
__device__ __forceinline__ void numbers_of_8(F16, uint32_t word, uint32_t& even, uint32_t& odd) {
    // With its sign's bit turned a byte is itself and 128: behind 1024 that is 1152 (0x6480) and itself.
    even = subtract(F16{}, and_xor(word, 0x00ff00ffu, 0x64806480u), 0x64806480u);
    odd = subtract(F16{}, and_xor(word >> 8, 0x00ff00ffu, 0x64806480u), 0x64806480u);
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

template <Number kType>
constexpr int kColumns = kType == Number::i8 || kType == Number::i4 ? 256 : 128;  // of a chunk, at most

// What of a product its chunks need, in registers for the same reason.
struct Weights {
    int product, cols, chunk_shift, made;
    Number type;
};

// c += the chunk's products. Lane 4 g + t has rows g and g + 8 and of every 32 columns eight: of two-byte weights 8 t
// to 8 t + 7; of 8-bit ones of every 64 columns 16 t to 16 t + 15; of 4-bit ones of every 64 columns 8 t to 8 t + 7 and
// 32 more. `inputs` are whole rows in shared memory; with none made, they are read where they are.
template <class X, int kTokens, Number kType>
__device__ __forceinline__ void multiply_chunk(const Job& job, const Weights& about, int row, int chunk,
                                               const unsigned char* inputs, int tokens, const unsigned char* slot,
                                               uint64_t* full, uint32_t parity, int lane,
                                               float (&c)[(kTokens + 7) / 8][4]) {
    constexpr int kTiles = (kTokens + 7) / 8;
    constexpr bool kPlain = kType != Number::i8 && kType != Number::i4, kOne = kTokens == 1 && kPlain;
    constexpr int kSlotPitch = kType == Number::i4 ? kPitchOf4 : kPitch;
    const int g = lane >> 2, t = lane & 3, first = chunk << about.chunk_shift;
    const int columns = min(1 << about.chunk_shift, about.cols - first);
    const Product& p = job.products[about.product];
    const unsigned char *low = slot + g * kSlotPitch, *high = low + 8 * kSlotPitch;

    // Of the chunk's 32 columns, lane t has the scales (the high half: a float32's) and zeros of numbers t and t + 4.
    uint32_t scales[2][2] = {};
    if (kType == Number::i4) {
        // All are asked for before one is waited for.
        const auto* all = static_cast<const uint16_t*>(p.scales);
        const unsigned char* zeros = p.zeros;
        const int rows = p.rows, shift = p.group_shift;
        const int64_t groups = p.groups;
        uint32_t of_scales[2][2] = {}, of_zeros[2][2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int column = 32 * (t + 4 * half), of = row + g + 8 * i;
                const int64_t at = of * groups + ((first + column) >> shift);
                const bool is = column < columns && of < rows;
                if (is) of_scales[i][half] = read_global<uint16_t>(all + at);
                if (is && zeros) of_zeros[i][half] = read_global<uint8_t>(zeros + at);
            }
        const uint32_t zero = zeros ? 0 : 8;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                scales[i][half] = of_scales[i][half] << 16 | of_zeros[i][half] | zero;
    }
    barrier_wait(full, parity);

    // 128 columns at a time; in turn, for the sake of registers.
#pragma unroll 1
    for (int begin = 0; begin < columns; begin += 128) {
        uint32_t b[4][kTiles][4];
        const bool wide = !about.made && p.x_wide && first + begin + 128 <= about.cols;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            // One token is all columns of the fragment: nothing else is read of the product's.
            const int token = kTokens == 1 ? 0 : 8 * n + g, k = first + begin + (kType == Number::i8 ? 16 : 8) * t;
            const bool is = kTokens == 1 || token < tokens;
            const unsigned char* from = inputs + token * input_pitch(about.cols) + 2 * k;
            uint4 values[4] = {};
#define ACIP_OFFSET(u) (kType == Number::i8 ? 64 * (u / 2) + 8 * (u % 2) : 32 * u)
            if (about.made) {
#pragma unroll
                for (int u = 0; u < 4; ++u)
                    if (is) values[u] = read_shared<uint4>(from + 2 * ACIP_OFFSET(u));
            } else if (wide) {
                const unsigned char* far = p.x + token * p.x_stride;
#pragma unroll
                for (int u = 0; u < 4; ++u)
                    if (is) values[u] = read_global<uint4>(far + 2 * (k + ACIP_OFFSET(u)));
            } else if (is) {
                const unsigned char* far = p.x + token * p.x_stride;
#pragma unroll
                for (int u = 0; u < 4; ++u)
                    if (k + ACIP_OFFSET(u) < about.cols)
                        values[u] = read_8(far, k + ACIP_OFFSET(u), about.cols, p.x_wide);
            }
#undef ACIP_OFFSET
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                if (kOne) {  // (see below)
                    values[u].x = g % 2 ? values[u].y : values[u].x, values[u].y = g % 2 ? values[u].w : values[u].z;
                }
                b[u][n][0] = values[u].x, b[u][n][1] = values[u].y, b[u][n][2] = values[u].z, b[u][n][3] = values[u].w;
                if (!kPlain) interleave(b[u][n]);
            }
        }

        if constexpr (kOne) {
            // A lane's 16 bytes of one row as they are: four words where the fragment has two columns of row g and two
            // of row g + 8. So the even columns of b have what the first and the third word take, the odd ones what the
            // others do, and a sum is that of row g and column 0 and that of row g + 8 and column 1.
            float sums[2][4] = {};
            const auto products = [&](auto whole) {
#pragma unroll
                for (int u = 0; u < 4; ++u) {
                    const int k = begin + 32 * u + 8 * t;
                    if (!whole.value && begin + 32 * u >= columns) break;
                    uint4 a = {0, 0, 0, 0}, a8 = {0, 0, 0, 0};
                    if (whole.value || k < columns)
                        a = read_shared<uint4>(low + 2 * k), a8 = read_shared<uint4>(high + 2 * k);
                    const uint32_t words[4] = {a.x, a.y, a.z, a.w}, words_8[4] = {a8.x, a8.y, a8.z, a8.w};
                    mma(X{}, sums[0], words, b[u][0][0], b[u][0][1]);
                    mma(X{}, sums[1], words_8, b[u][0][0], b[u][0][1]);
                }
            };
            if (begin + 128 <= columns)
                products(std::true_type{});
            else
                products(std::false_type{});
            c[0][0] += sums[0][0] + sums[0][3], c[0][2] += sums[1][0] + sums[1][3];
        } else if constexpr (kPlain) {
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                const int k = begin + 32 * u + 8 * t;
                if (begin + 32 * u >= columns) break;
                uint4 a = {0, 0, 0, 0}, a8 = {0, 0, 0, 0};
                if (k < columns) a = read_shared<uint4>(low + 2 * k), a8 = read_shared<uint4>(high + 2 * k);
                const uint32_t rows[4] = {a.x, a.y, a.z, a.w}, rows_8[4] = {a8.x, a8.y, a8.z, a8.w};
#pragma unroll
                for (int n = 0; n < kTiles; ++n) multiply<X>(c[n], rows, rows_8, b[u][n]);
            }
        } else if constexpr (kType == Number::i8) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int column = begin + 64 * pair;
                if (column >= columns) break;
                // Of 16 bytes, the first eight and the others.
                const uint4 a = read_shared<uint4>(low + column + 16 * t);
                const uint4 a8 = read_shared<uint4>(high + column + 16 * t);
                const uint32_t words[4] = {a.x, a.y, a.z, a.w}, words_8[4] = {a8.x, a8.y, a8.z, a8.w};
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    uint32_t rows[4], rows_8[4];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        numbers_of_8(X{}, words[2 * u + i], rows[2 * i], rows[2 * i + 1]);
                        numbers_of_8(X{}, words_8[2 * u + i], rows_8[2 * i], rows_8[2 * i + 1]);
                    }
#pragma unroll
                    for (int n = 0; n < kTiles; ++n) multiply<X>(c[n], rows, rows_8, b[2 * pair + u][n]);
                }
            }
        } else {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int column = begin + 64 * pair;
                if (column >= columns) break;
                constexpr uint32_t kMask = 0x000f000fu;
                const uint2 a = read_shared<uint2>(low + column / 2 + 8 * t);
                const uint2 a8 = read_shared<uint2>(high + column / 2 + 8 * t);
                const uint32_t words[2] = {a.x, a.y}, words_8[2] = {a8.x, a8.y};
#pragma unroll
                for (int u = 0; u < 2; ++u) {  // the bytes' low halves, and the high ones
                    const int from = (lane & ~3) | (2 * pair + u);
                    const uint32_t scale = __shfl_sync(~0u, begin ? scales[0][1] : scales[0][0], from);
                    const uint32_t scale_8 = __shfl_sync(~0u, begin ? scales[1][1] : scales[1][0], from);
                    // The zero is the lowest byte, behind the magic number's upper one; twice.
                    const uint32_t zero = __byte_perm(scale, magic<X>() >> 8, 0x4040);
                    const uint32_t zero_8 = __byte_perm(scale_8, magic<X>() >> 8, 0x4040);
                    const float by = to_float(Bf16{}, uint16_t(scale >> 16));
                    const float by_8 = to_float(Bf16{}, uint16_t(scale_8 >> 16));
                    uint32_t rows[4], rows_8[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int shift = 8 * (i % 2) + 4 * u;
                        rows[i] = subtract(X{}, and_or(words[i / 2] >> shift, kMask, magic<X>()), zero);
                        rows_8[i] = subtract(X{}, and_or(words_8[i / 2] >> shift, kMask, magic<X>()), zero_8);
                    }
#pragma unroll
                    for (int n = 0; n < kTiles; ++n) {
                        float part[4] = {0, 0, 0, 0};
                        multiply<X>(part, rows, rows_8, b[2 * pair + u][n]);
                        c[n][0] = fmaf(part[0], by, c[n][0]), c[n][2] = fmaf(part[2], by_8, c[n][2]);
                        if (kTokens > 1) c[n][1] = fmaf(part[1], by, c[n][1]), c[n][3] = fmaf(part[3], by_8, c[n][3]);
                    }
                }
            }
        }
    }
}

// ---- the kernel

// Shared memory: the slots' barriers; scales of a batch of tasks, twice; the warps' sums of it, twice; inputs; the
// warps' rings.
__host__ __device__ constexpr size_t scales_at() { return kWarps * kMostSlots * 8; }
__host__ __device__ constexpr size_t sums_at() { return scales_at() + 2 * 2 * kRows * 4; }
__host__ __device__ constexpr size_t inputs_at(int tokens) {
    return sums_at() + size_t(2 * kWarps * kSumPitch * 4) * tokens * batch_of(tokens);
}

template <class X, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens <= 8 ? 2 : 1) decode_kernel(const __grid_constant__ Job job) {
    constexpr int kTiles = (kTokens + 7) / 8, kBatch = batch_of(kTokens);
    // Of the first lane, for all: so the compiler knows that what follows from it is the same for a warp.
    const int warp = __shfl_sync(~0u, int(threadIdx.x / 32), 0), lane = threadIdx.x % 32, tokens = job.tokens;
    unsigned char* shared = shared_memory();
    uint64_t* full = reinterpret_cast<uint64_t*>(shared) + warp * kMostSlots;
    float* scales = reinterpret_cast<float*>(shared + scales_at());
    float* sums = reinterpret_cast<float*>(shared + sums_at());
    unsigned char* made = shared + inputs_at(kTokens);
    const int slots = job.slots, slot_bytes = job.slot_bytes;
    unsigned char* ring = made + job.input_bytes + warp * slots * slot_bytes;

    if (lane < slots) barrier_init(full + lane, 32);
    fence_async();
    __syncwarp();
    let_next_launch();
    Walk ahead(job);
    bool more = true;
    for (int i = 0; i < slots && more; ++i) {
        more = ahead.settle(job, warp);
        if (more) fill(job, ahead, ring + i * slot_bytes, full + i, lane), ahead.chunk += kWarps;
    }
    await_last_launch();

    int slot = 0, parity = 0, turn = 0;
    int made_of = 0;
    for (int stage = job.begin; stage < job.end; ++stage) {
        if (stage > job.begin) sync_grid();
        const int end = first_task(job, stage, blockIdx.x + 1);
        const int parts = job.stages[stage].parts;
        for (int part = 0; part < parts; ++part) {
            Run run;
            Weights weights{0, 0, 0, 0, Number::i8};
            for (int task = first_task(job, stage, blockIdx.x); task < end; task += kBatch) {
                const int several = min(kBatch, end - task);
                // One output of a thread; what it needs besides the sum is asked for first.
                const int of = threadIdx.x / (kRows * kTokens), token = threadIdx.x / kRows % kTokens;
                const Task at = task_of(job, stage, min(task + of, end - 1), part);
                const Product& p = job.products[at.product];
                const int row = at.row + threadIdx.x % kRows;
                const bool live = of < several && token < tokens && row < p.rows;
                int to = row;
                float scale = 1, bias = 0;
                const bool scaled = p.from == From::weights && p.type == Number::i8;
                if (live) {
                    if (scaled && token == 0)
                        scale = read_global<float>(static_cast<const float*>(p.scales) + row);
                    if (p.place) to = read_global<int32_t>(p.place + row);
                    if (p.bias)
                        bias = to_float(X{}, read_global<uint16_t>(static_cast<const uint16_t*>(p.bias) + to));
                }

                for (int one = 0; one < several; ++one) {
                    if (run.left > 1) {
                        run.next();
                    } else {
                        run = Run(job, stage, task + one, end, part, warp);
                        const Product& next = job.products[run.product];
                        weights = {run.product, next.from == From::weights ? next.cols : 0, next.chunk_shift, next.made,
                                   next.type};
                        if (next.made && next.made != made_of) {
                            if (one) __syncthreads();  // all warps have read the inputs before
                            make_inputs<X>(next, made, tokens);
                            made_of = next.made;
                            __syncthreads();  // all inputs are made
                        }
                    }
                    if (!weights.cols) continue;  // outputs that come from elsewhere
                    float c[kTiles][4] = {};
                    for (int chunk = run.begin(), last = run.end(); chunk < last; chunk += kWarps) {
                        unsigned char* at = ring + slot * slot_bytes;
                        if (weights.type == Number::i4)
                            multiply_chunk<X, kTokens, Number::i4>(job, weights, run.row, chunk, made, tokens, at,
                                                                   full + slot, parity, lane, c);
                        else if (weights.type == Number::i8)
                            multiply_chunk<X, kTokens, Number::i8>(job, weights, run.row, chunk, made, tokens, at,
                                                                   full + slot, parity, lane, c);
                        else
                            multiply_chunk<X, kTokens, Number::bf16>(job, weights, run.row, chunk, made, tokens, at,
                                                                     full + slot, parity, lane, c);
                        if (job.bulk) fence_async();
                        __syncwarp();  // all lanes have read the slot
                        if (more) more = ahead.settle(job, warp);
                        if (more) fill(job, ahead, at, full + slot, lane), ahead.chunk += kWarps;
                        if (++slot == slots) slot = 0, parity ^= 1;
                    }
                    // Of two buffers in turn: whoever writes one again has been at a barrier behind its readers.
                    float* mine = sums + ((turn * kWarps + warp) * kBatch + one) * kTokens * kSumPitch;
#pragma unroll
                    for (int n = 0; n < kTiles; ++n)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int column = 8 * n + 2 * (lane & 3) + (i & 1);
                            if (column < kTokens)
                                write_shared(mine + column * kSumPitch + (lane >> 2) + 8 * (i >> 1), c[n][i]);
                        }
                }
                // An 8-bit row's scale is read once, for all tokens.
                float* shares = scales + turn * kBatch * kRows + of * kRows + threadIdx.x % kRows;
                if (kTokens > 1 && token == 0 && of < kBatch) write_shared(shares, scale);
                __syncthreads();
                if (kTokens > 1 && of < kBatch) scale = read_shared<float>(shares);

                float value = 0, gate = 0;
                if (live && p.from == From::weights) {
                    const float* from = sums + (turn * kWarps * kBatch + of) * kTokens * kSumPitch + token * kSumPitch;
#pragma unroll
                    for (int w = 0; w < kWarps; ++w)
                        value += read_shared<float>(from + w * kBatch * kTokens * kSumPitch + threadIdx.x % kRows);
                } else if (live && p.from == From::sums) {
                    value = to_float(X{}, round(X{}, sum_of_splits(p, tokens, token, row)));
                } else if (live) {
                    const unsigned char* both = p.x + token * p.x_stride + 2 * row;
                    gate = to_float(X{}, read_global<uint16_t>(both));
                    value = to_float(X{}, read_global<uint16_t>(both + 2 * p.rows));
                }
                turn ^= 1;
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
    // Chunks are shorter where otherwise half of the warps would have none.
    p.chunk_shift = log2_of(plain(m.type) ? kColumns<Number::bf16> : kColumns<Number::i8>);
    while (p.chunk_shift > (plain(m.type) ? 5 : 6) && (m.cols >> p.chunk_shift) < kWarps / 2) --p.chunk_shift;
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

// Of a product that has them made, in shared memory.
int input_bytes(const Product& p, int64_t tokens) { return int(tokens * input_pitch(p.cols)); }

// A job that is being made. Stages and products are as they run; memory is counted, and laid out if there is some.
struct Builder {
    const Problem& problem;
    const Device& device;
    const Choices& choices;
    unsigned char* memory;
    const int blocks;          // that run at once
    const size_t block_bytes;  // of shared memory
    Job job{};
    int products = 0, stages = 0;
    size_t used = 0;
    bool apart = false;  // whether sums of splits have a stage of their own

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
                                    : choose_splits(job.products + first, products - first, blocks, problem.tokens);
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
            if (extra < 0) extra = open_stage(), apart = true;
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
        size_t bytes = inputs_at(kernel_tokens(problem.tokens)) + size_t(input_bytes(p, problem.tokens));
        return bytes + size_t(kWarps) * 2 * kRows * kPitch <= block_bytes;
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
            // One without weights waits for memory as long as several of them do that a block has at a time.
            const int several = batch_of(kernel_tokens(problem.tokens));
            const int alone = several > 2 ? 64 : 256;
            p.cost = uint32_t(p.from == From::weights ? kRows * p.row_bytes / p.splits / 64 + 16 : alone);
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

// As many slots as `shared` bytes have room for; 0 if not even two.
int slots_in(const Job& job, const Choices& choices, size_t shared) {
    size_t fixed = inputs_at(kernel_tokens(job.tokens)) + size_t(job.input_bytes);
    size_t ring = size_t(kWarps) * job.slot_bytes;
    size_t slots = shared < fixed ? 0 : (shared - fixed) / ring;
    if (slots > size_t(kMostSlots)) slots = kMostSlots;
    if (choices.slots && size_t(choices.slots) < slots) slots = size_t(choices.slots);
    return slots < 2 ? 0 : int(slots);
}

// The job, whose memory is at `memory` (null: it is counted only), with `resident` blocks on each multiprocessor.
// False if they have too little memory for that.
bool build_for(int resident, const Problem& problem, const Device& device, const Choices& choices, void* memory,
               Job* job, Schedule* schedule) {
    // A block takes 1 KiB besides its own memory, and one may have what is left of all of it by one block's KiB.
    constexpr size_t kReserved = 1024;
    const size_t block_bytes = (device.shared_bytes + kReserved) / resident / 128 * 128 - kReserved;
    Builder builder{problem, device, choices, static_cast<unsigned char*>(memory), resident * device.multiprocessors,
                    resident == 1 ? device.shared_bytes : block_bytes};
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
    made.bulk = choices.copies == Copies::bulk, made.block_bytes = int(builder.block_bytes);
    int64_t most_tasks = 0;
    for (int i = 0; i < builder.products; ++i) {
        const Product& p = made.products[i];
        if (p.from != From::weights) continue;
        made.slot_bytes = made.slot_bytes > kRows * kPitchOf4 || p.type != Number::i4 ? kRows * kPitch
                                                                                     : kRows * kPitchOf4;
    }
    // Activations as they are come to shared memory too, where that is a small part of it and leaves two slots.
    const size_t slots = inputs_at(kernel_tokens(tokens)) + size_t(2) * kWarps * made.slot_bytes;
    const size_t room = builder.block_bytes < slots ? 0 : builder.block_bytes - slots;
    for (int i = 0; i < builder.products; ++i) {
        Product& p = made.products[i];
        const size_t bytes = size_t(tokens) * input_pitch(p.cols);
        if (p.from != From::weights || (!p.in_splits && (bytes > room || bytes > builder.block_bytes / 3))) continue;
        if (bytes > size_t(made.input_bytes)) made.input_bytes = int(bytes);
        // Where memory is only counted addresses are null: what is equal then is never run.
        for (int j = 0; j <= i && !p.made; ++j)
            if (made.products[j].in == p.in && made.products[j].x == p.x) p.made = j + 1;
    }
    for (int i = 0; i < builder.stages; ++i) {
        int64_t tasks = 0;
        for (int j = 0; j < made.stages[i].count; ++j) tasks += made.products[made.stages[i].first + j].tasks;
        if (tasks > most_tasks) most_tasks = tasks;
    }
    schedule->stages = builder.stages;
    schedule->blocks = int(most_tasks < builder.blocks ? most_tasks : builder.blocks);
    for (int i = 0; i < builder.stages; ++i)
        made.stages[i].share = uint32_t(ceil_divide(made.stages[i].cost, schedule->blocks));
    *job = made;
    schedule->splits = made.products[0].splits;
    schedule->workspace_bytes = builder.used;
    return !builder.apart && slots_in(made, Choices(), builder.block_bytes);
}

// Two blocks on each multiprocessor, of which one is at work while the other waits; of many tokens, whose kernels take
// too many registers for that, or where two blocks have no memory for two slots each besides what is between the
// products, one.
Status build(const Problem& problem, const Device& device, const Choices& choices, void* memory, Job* job,
             Schedule* schedule) {
    if (Status status = check(problem, device, choices); status != Status::ok) return status;
    if (kernel_tokens(problem.tokens) > 8 || !build_for(2, problem, device, choices, memory, job, schedule))
        build_for(1, problem, device, choices, memory, job, schedule);
    return Status::ok;
}

size_t shared_of(const Job& job) {
    return inputs_at(kernel_tokens(job.tokens)) + size_t(job.input_bytes) + size_t(kWarps) * job.slots * job.slot_bytes;
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
    job.slots = result->slots = slots_in(job, choices, size_t(job.block_bytes));
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
        job.slots = slots_in(job, choices, size_t(job.block_bytes));
        if (!job.slots) return Status::unsupported;
        Launched done = launch(kernel, job, plan.blocks, kThreads, shared_of(job), device.shared_bytes,
                               plan.stages > 1, false, on);
        if (done == Launched::yes) return Status::ok;
        if (done == Launched::failed || choices.launch == Launch::cooperative) return Status::failed;
    }
    // Half of the memory for each launch where they overlap: the next one's blocks find room while this one's still run.
    // Where two blocks fill a multiprocessor, the next launch's find it when the first of them is done.
    const bool whole = size_t(job.block_bytes) == device.shared_bytes;
    job.slots = slots_in(job, choices, size_t(job.block_bytes) / (device.dependent && whole ? 2 : 1));
    if (!job.slots) job.slots = slots_in(job, choices, size_t(job.block_bytes));
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
