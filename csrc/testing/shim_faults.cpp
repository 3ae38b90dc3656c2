// Small kernels, right ones and ones with a bug planted: `shim_faults NAME` runs one under the shim, prints what was
// reported, and returns 1 if anything was, or a result is wrong. Built and run by tests/test_gpu_shim.py.
#include <cstdlib>
#include <memory>
#include <vector>

#include "gpu_shim.h"

using namespace acip::device;

namespace {

template <class T>
struct Heap {  // an array of exactly its size, that the shim knows
    std::unique_ptr<T[]> data;
    size_t n;
    Heap(size_t n, const char* name, bool writable) : data(new T[n]()), n(n) {
        shim::add_array(data.get(), n * sizeof(T), name, writable);
    }
    T* get() { return data.get(); }
};

int wrong = 0;

void expect(double actual, double wanted) {
    if (!(std::abs(actual - wanted) < 1e-6) && ++wrong < 5) std::printf("%g instead of %g\n", actual, wanted);
}

// Everybody writes a word and reads its neighbour's.
void neighbours(bool block, bool warp, int reach) {
    Heap<float> out(128, "out", true);
    shim::run(2, 64, 64 * 4, false, [&] {
        float* words = reinterpret_cast<float*>(shared_memory());
        unsigned self = threadIdx.x;
        write_shared(words + self, float(self));
        if (block) __syncthreads();
        if (warp) __syncwarp();
        unsigned other = (self + reach) % 64;
        write_global(out.get() + blockIdx.x * 64 + self, read_shared<float>(words + other));
    });
    for (int i = 0; i < 128; ++i) expect(out.data[i], (i % 64 + reach) % 64);
}

// D = A B of whole numbers, by fragments; `swapped` takes two of A's registers for each other.
template <class X>
void product(bool swapped) {
    uint16_t A[16][16], B[16][8];
    for (int i = 0; i < 16; ++i) {
        for (int k = 0; k < 16; ++k) A[i][k] = round(X{}, float((i * 7 + k * 3) % 11 - 5));
        for (int j = 0; j < 8; ++j) B[i][j] = round(X{}, float((i * 5 + j * 2) % 13 - 6));
    }
    float D[16][8];
    shim::run(1, 32, 16, false, [&] {
        int g = threadIdx.x / 4, t = threadIdx.x % 4;
        auto a = [&](int row, int k) { return A[row][k] | uint32_t(A[row][k + 1]) << 16; };
        auto b = [&](int k) { return B[k][g] | uint32_t(B[k + 1][g]) << 16; };
        uint32_t fragment[4] = {a(g, 2 * t), a(g + 8, 2 * t), a(g, 2 * t + 8), a(g + 8, 2 * t + 8)};
        if (swapped) std::swap(fragment[1], fragment[2]);
        float c[4] = {0, 0, 0, 0};
        mma(X{}, c, fragment, b(2 * t), b(2 * t + 8));
        D[g][2 * t] = c[0], D[g][2 * t + 1] = c[1], D[g + 8][2 * t] = c[2], D[g + 8][2 * t + 1] = c[3];
    });
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
            double sum = 0;
            for (int k = 0; k < 16; ++k) sum += double(to_float(X{}, A[i][k])) * to_float(X{}, B[k][j]);
            expect(D[i][j], sum);
        }
}

// A warp's ring of two slots of 512 bytes that copies fill, either kind of them. fences: 1 behind the making of
// mbarriers, 2 behind the reading of a slot. arrivals: of each lane.
void ring(bool bulk, bool awaited, bool freed, int expected = 16, int fences = 3, int arrivals = 1) {
    Heap<float> in(32 * 4 * 5, "in", false), out(32 * 4 * 5, "out", true);
    for (size_t i = 0; i < in.n; ++i) in.data[i] = float(i);
    shim::run(1, 32, 1024 + 16, false, [&] {
        unsigned char* memory = shared_memory();
        uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + 1024);
        int lane = threadIdx.x;
        if (lane < 2) barrier_init(barriers + lane, 32 * arrivals);
        if (fences & 1) fence_async();
        __syncwarp();
        auto fill = [&](int step) {
            void* to = memory + step % 2 * 512 + lane * 16;
            const void* from = in.get() + step * 128 + lane * 4;
            if (arrivals > 1) barrier_arrive(barriers + step % 2, arrivals - 1);
            if (bulk) {
                barrier_arrive_expecting(barriers + step % 2, expected);
                copy_bulk(to, from, 16, barriers + step % 2);
            } else {
                copy_async<16>(to, from, 16);
                barrier_arrive_after_copies(barriers + step % 2);
            }
        };
        fill(0), fill(1);
        for (int step = 0; step < 5; ++step) {
            if (awaited) barrier_wait(barriers + step % 2, step / 2 & 1);
            float4 value = read_shared<float4>(memory + step % 2 * 512 + (31 - lane) * 16);
            write_global(out.get() + step * 128 + (31 - lane) * 4, value);
            if (fences & 2) fence_async();
            if (freed) __syncwarp();
            if (step + 2 < 5) fill(step + 2);
        }
    });
    for (size_t i = 0; i < out.n; ++i) expect(out.data[i], double(i));
}

// Blocks add up what all of them wrote.
void whole_grid(bool synced, bool cooperative) {
    Heap<float> parts(3, "parts", true), out(3, "out", true);
    shim::run(3, 32, 16, cooperative, [&] {
        if (threadIdx.x == 0) write_global(parts.get() + blockIdx.x, float(blockIdx.x + 1));
        if (synced) sync_grid();
        if (threadIdx.x == 0) {
            float sum = 0;
            for (int i = 0; i < 3; ++i) sum += read_global<float>(parts.get() + i);
            write_global(out.get() + blockIdx.x, sum);
        }
    });
    for (int i = 0; i < 3; ++i) expect(out.data[i], 6);
}

void shared_end(int offset, bool past_accessors) {
    shim::run(1, 32, 256, false, [&] {
        unsigned char* at = shared_memory() + threadIdx.x * 8 + offset;
        if (past_accessors)
            *at = 1;
        else
            write_shared(at, uint2{1, 2});
    });
}

void global_end(int count, bool into_input) {
    Heap<float> in(32, "in", false), out(32, "out", true);
    shim::run(1, 32, 16, false, [&] {
        float value = read_global<float>(in.get() + threadIdx.x * count);
        write_global((into_input ? in.get() : out.get()) + threadIdx.x, value);
    });
}

void aligned(int offset) {
    Heap<float> in(64, "in", false);
    shim::run(1, 32, 1024, false, [&] { read_global<float4>(in.get() + offset); });
}

void together(bool all) {
    shim::run(1, 64, 16, false, [&] {
        if (all || threadIdx.x != 40) __syncthreads();
    });
}

void same_collective(bool same) {
    shim::run(1, 32, 16, false, [&] {
        if (same || threadIdx.x < 16)
            __syncwarp();
        else
            __shfl_sync(~0u, 1.0f, 0);
    });
}

// A shuffle carries values and orders nothing in memory.
void shuffled(bool synced) {
    shim::run(1, 32, 128, false, [&] {
        float* words = reinterpret_cast<float*>(shared_memory());
        write_shared(words + threadIdx.x, 1.0f);
        expect(__shfl_xor_sync(~0u, float(threadIdx.x), 1), threadIdx.x ^ 1);
        expect(__shfl_sync(~0u, float(threadIdx.x), 5), 5);
        if (synced) __syncwarp();
        read_shared<float>(words + (threadIdx.x ^ 1));
    });
}

// A warp that loads 64 bytes twice, of which a collective in between makes two requests.
void counted(size_t wanted, bool apart) {
    Heap<uint16_t> in(32, "in", false);
    shim::Array& array = *shim::find_array(in.get(), 64);
    shim::run(1, 32, 16, false, [&] {
        read_global<uint16_t>(in.get() + threadIdx.x);
        if (apart) __syncwarp();
        read_global<uint32_t>(in.get() + threadIdx.x / 2 * 2);
    });
    expect(double(array.loaded), double(wanted));
}

}  // namespace

int main(int, char** argv) {
    std::string name = argv[1];
    const std::map<std::string, std::function<void()>> kernels = {
        {"right", [] {
             for (bool order : {false, true}) {
                 shim::backwards = order;
                 neighbours(true, false, 40), neighbours(true, true, 1);
                 product<Bf16>(false), product<F16>(false);
                 ring(true, true, true), ring(false, true, true, 16, 0), ring(true, true, true, 16, 3, 4);
                 whole_grid(true, true), shared_end(0, false), shared_end(0, true), global_end(1, false), aligned(4);
                 together(true), same_collective(true), shuffled(true), counted(64, false), counted(128, true);
             }
         }},
        {"no __syncthreads", [] { neighbours(false, true, 40); }},
        {"no __syncwarp", [] { neighbours(false, false, 1); }},
        {"wrong fragment", [] { product<Bf16>(true); }},
        {"bulk copy not awaited", [] { ring(true, false, true); }},
        {"async copy not awaited", [] { ring(false, false, true); }},
        {"bulk copy over what is read", [] { ring(true, true, false); }},
        {"async copy over what is read", [] { ring(false, true, false); }},
        {"too few bytes expected", [] { ring(true, true, true, 8); }},
        {"too many bytes expected", [] { ring(true, true, true, 32); }},
        {"mbarriers made with no proxy fence", [] { ring(true, true, true, 16, 2); }},
        {"bulk copy over what is read, with no proxy fence", [] { ring(true, true, true, 16, 1); }},
        {"no grid barrier", [] { whole_grid(false, true); }},
        {"grid barrier in an ordinary launch", [] { whole_grid(true, false); }},
        {"write past shared memory", [] { shared_end(8, false); }},
        {"write past shared memory, past the accessors", [] { shared_end(8, true); }},
        {"unaligned write", [] { shared_end(4, false); }},
        {"load past an array", [] { global_end(2, false); }},
        {"store into an input", [] { global_end(1, true); }},
        {"unaligned load", [] { aligned(1); }},
        {"a thread misses a barrier", [] { together(false); }},
        {"lanes at different collectives", [] { same_collective(false); }},
        {"a shuffle for a barrier", [] { shuffled(false); }},
    };
    if (name == "names") {
        for (auto& kernel : kernels) std::printf("%s\n", kernel.first.c_str());
        return 0;
    }
    kernels.at(name)();
    for (auto& text : shim::reports) std::printf("%s\n", text.c_str());
    return wrong || !shim::reports.empty();
}
