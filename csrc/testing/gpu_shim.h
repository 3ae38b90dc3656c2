// A GPU of one's own, for tests: CUDA kernels of this package, compiled by g++, run on the CPU.
//
// Every CUDA thread is a fiber; fibers run one at a time, each until it has to wait, so a run is deterministic. What
// the kernels use of a GPU is here and nothing else: grid, blocks, warps of 32, `__syncthreads`, `__syncwarp`,
// shuffles, `mma.sync.m16n8k16` with fragments as the PTX manual lays them out, a cooperative grid's barrier, dynamic
// shared memory, `cp.async`, mbarriers and bulk copies. What a GPU would let pass is reported:
//
// - an access outside of shared memory, outside of every registered array in global memory, to the wrong address for
//   its size, or a write to an array that is only to be read (the arrays lie on the heap: the address sanitizer sees
//   what goes past the accessors);
// - a race: two threads of a block touch one word of shared memory, one of them writes, and no barrier orders them
//   (vector clocks, as in FastTrack, PLDI 2009; a shuffle or mma orders nothing); in global memory a word that another
//   thread wrote, with no barrier since, of the block or, from another block, of the grid;
// - a bulk copy over what was read or written with no proxy fence since, or to an mbarrier made with none;
// - a copy that is read before it was waited for: copies arrive as late as they may, when no thread can go on, and
//   until then the words hold NaN;
// - lanes of a warp that are at different collectives, and threads that wait for ever.
//
// Bytes that are asked for in global memory are counted by array. What lanes of one warp load between two collectives
// counts once for each byte, as a load instruction of a warp does; what is copied to shared memory counts each time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __noinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__

namespace shim {

constexpr int kLanes = 32;
constexpr size_t kStack = 128 << 10;

using Clock = std::vector<uint32_t>;

// Most of the time is spent here, on memory that is the shim's own: not looked at by sanitizers, and in vectors.
#if defined(__clang__)
#define ACIP_HOT __attribute__((no_sanitize("address", "undefined")))
#else
#define ACIP_HOT __attribute__((no_sanitize("address", "undefined"), optimize("O3")))
#endif
ACIP_HOT inline void latest(uint32_t* to, const uint32_t* from, size_t count) {
    for (size_t i = 0; i < count; ++i) to[i] = to[i] < from[i] ? from[i] : to[i];
}
#undef ACIP_HOT

inline void join(Clock& to, const Clock& from) { latest(to.data(), from.data(), to.size()); }

// ---- what is reported

inline std::vector<std::string> reports;

template <class... Values>
void report(const char* format, Values... values) {
    char text[400];
    std::snprintf(text, sizeof text, format, values...);
    if (reports.size() < 20) reports.push_back(text);
}

// ---- global memory

struct Array {
    const char* begin;
    size_t bytes;
    std::string name;
    bool writable;
    size_t loaded = 0, stored = 0;
    size_t early = 0;  // loaded by blocks that have been at no barrier of the grid yet
    struct Write {
        int block = -1, thread = 0;
        uint32_t clock = 0, epoch = 0;
    };
    std::vector<Write> writes;  // by two bytes
};

inline std::map<const char*, Array> arrays;  // by their ends

inline Array& add_array(const void* begin, size_t bytes, const std::string& name, bool writable) {
    const char* first = static_cast<const char*>(begin);
    Array& array = arrays[first + bytes];
    array = Array{first, bytes, name, writable, 0, 0, 0, {}};
    if (writable) array.writes.resize((bytes + 1) / 2);
    return array;
}

inline Array* find_array(const void* address, size_t bytes) {
    const char* first = static_cast<const char*>(address);
    auto found = arrays.upper_bound(first);
    if (found == arrays.end() || first < found->second.begin || first + bytes > found->first) return nullptr;
    return &found->second;
}

// ---- threads

struct Block;

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake = nullptr;
    Block* block = nullptr;
    int index = 0;
    bool done = false;
    const uint64_t* waits = nullptr;  // until this is no longer `value`
    uint64_t value = 0;
    uint32_t collectives = 0;  // that its warp has come through
    Clock clock;
    Clock fenced;  // of what came before a proxy fence of the thread that did it
    std::deque<std::function<void()>> copies;  // that are on their way, in order
};

struct Word {
    int32_t writer = -1;
    uint32_t clock = 0;
    bool coming = false;  // by a copy that nobody has waited for
    bool copied = false;  // by a bulk copy, the last time
    std::vector<std::pair<int32_t, uint32_t>> reads;
};

struct Barrier {
    uint32_t count = 0, pending = 0;
    int64_t bytes = 0;  // that are still to come
    uint64_t phase = 0;
    Clock clock, passed, fenced, passed_fenced;
    int32_t maker = -1;
    uint32_t made = 0;
};

struct Rendezvous {  // where a warp's, a block's or the grid's threads meet
    int here = 0;
    uint64_t generation = 0;
    int kind = -1;
};

struct Warp {
    Rendezvous meeting;
    struct Lane {
        uint32_t words[6];
        float floats[4];
        uint32_t result;
    } lanes[kLanes];
    // Bytes loaded since the last collective, by 16: this interval's and the one's before.
    std::unordered_map<uintptr_t, uint32_t> loaded[2];
    uint32_t interval = 0;
};

struct Block {
    int index = 0;
    uint32_t epoch = 0;  // barriers of the grid
    std::unique_ptr<char[]> shared;
    size_t shared_bytes = 0;
    std::vector<Word> words;
    std::map<const void*, Barrier> barriers;
    std::vector<Warp> warps;
    Rendezvous meeting;
    std::vector<Thread> threads;
};

struct Grid {
    std::vector<Block> blocks;
    Rendezvous meeting;
    bool cooperative = false;
};

struct Index {
    unsigned x;
};

inline Grid* grid = nullptr;
inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline void* scheduler_fake = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
inline uint32_t launches = 0;  // a launch after another is a barrier too
inline bool backwards = false;  // the order in which threads take turns
inline std::function<void()> body;
inline std::vector<std::unique_ptr<char[]>> stacks;

inline void enter(Thread& thread) {
    current = &thread;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake, thread.stack.get(), kStack);
#endif
    swapcontext(&scheduler, &thread.context);
    // The sanitizer forgets what it knows of a stack of this size that is entered: right at first, and long.
    thread.context.uc_stack.ss_size = 0;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
    current = nullptr;
}

inline void leave(bool for_good) {
    Thread& thread = *current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.fake, scheduler_stack, scheduler_stack_bytes);
#else
    (void)for_good;
#endif
    swapcontext(&thread.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(thread.fake, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

inline void wait_while(const uint64_t& is, uint64_t value) {
    if (is != value) return;
    current->waits = &is, current->value = value;
    leave(false);
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    body();
    current->done = true;
    leave(true);
}

inline void start(Thread& thread) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
}

// Everyone's clock becomes the latest of all, and their own goes on.
template <class Threads>
void order(const Threads& threads) {
    Clock clock = threads.front()->clock, fenced = threads.front()->fenced;
    for (Thread* thread : threads) join(clock, thread->clock), join(fenced, thread->fenced);
    for (Thread* thread : threads) {
        join(thread->clock, clock), join(thread->fenced, fenced);
        ++thread->clock[thread->index];
    }
}

// The last one of `size` threads to come does `work` for all.
template <class Work>
void meet(Rendezvous& meeting, int size, int kind, const char* what, Work work) {
    if (meeting.here && meeting.kind != kind)
        report("block %d, thread %d: threads that should be together are not, here at %s", current->block->index,
               current->index, what);
    meeting.kind = kind;
    uint64_t generation = meeting.generation;
    if (++meeting.here < size) return wait_while(meeting.generation, generation);
    work();
    meeting.here = 0, ++meeting.generation;
}

inline std::vector<Thread*> lanes_of(Block& block, int warp) {
    std::vector<Thread*> lanes;
    for (int i = 0; i < kLanes; ++i) lanes.push_back(&block.threads[warp * kLanes + i]);
    return lanes;
}

// A collective of a warp; `memory`: whether it orders what its lanes do in memory.
template <class Work>
void meet_warp(int kind, const char* what, bool memory, Work work) {
    Block& block = *current->block;
    int number = current->index / kLanes;
    Warp& warp = block.warps[number];
    meet(warp.meeting, kLanes, kind, what, [&] {
        if (memory) order(lanes_of(block, number));
        work(warp);
    });
    ++current->collectives;
}

// ---- a launch

// Runs `kernel()` for every thread of `blocks` blocks.
inline void run(int blocks, int threads, size_t shared_bytes, bool cooperative, std::function<void()> kernel) {
    Grid here;
    grid = &here, here.cooperative = cooperative, body = std::move(kernel);
    here.blocks.resize(blocks);
    size_t used = 0;
    ++launches;
    for (int b = 0; b < blocks; ++b) {
        Block& block = here.blocks[b];
        block.index = b, block.shared_bytes = shared_bytes;
        block.shared.reset(new char[shared_bytes]);
        std::memset(block.shared.get(), 0xff, shared_bytes);
        block.words.resize((shared_bytes + 3) / 4);
        block.warps.resize(threads / kLanes);
        block.threads = std::vector<Thread>(threads);
        for (int i = 0; i < threads; ++i) {
            Thread& thread = block.threads[i];
            thread.block = &block, thread.index = i;
            thread.clock.assign(threads, 0), thread.clock[i] = 1;
            thread.fenced.assign(threads, 0);
            if (used == stacks.size()) stacks.emplace_back(new char[kStack]);
            thread.stack = std::move(stacks[used++]);
            start(thread);
        }
    }
    std::vector<Thread*> all;
    for (Block& block : here.blocks)
        for (Thread& thread : block.threads) all.push_back(&thread);
    if (backwards) std::reverse(all.begin(), all.end());
    for (;;) {
        bool moved = false, left = false;
        for (Thread* thread : all) {
            if (thread->done) continue;
            left = true;
            if (thread->waits && *thread->waits == thread->value) continue;
            thread->waits = nullptr;
            enter(*thread), moved = true;
        }
        if (!left) break;
        if (moved) continue;
        // Nobody can go on: now what is on its way arrives, the last first.
        for (auto thread = all.rbegin(); thread != all.rend(); ++thread) {
            while (!(*thread)->copies.empty()) {
                (*thread)->copies.front()();
                (*thread)->copies.pop_front(), moved = true;
            }
        }
        if (!moved) {
            for (Thread* thread : all)
                if (!thread->done) {
                    report("block %d, thread %d waits for ever", thread->block->index, thread->index);
                    break;
                }
            break;
        }
    }
    used = 0;
    for (Block& block : here.blocks) {
        bool waiting = false;
        for (auto& entry : block.barriers) waiting |= entry.second.bytes != 0;
        if (waiting) report("block %d ended with bytes on their way to it", block.index);
        for (Thread& thread : block.threads) {
            if (!thread.copies.empty()) report("block %d ended with copies on their way to it", block.index);
            stacks[used++] = std::move(thread.stack);
        }
    }
    grid = nullptr;
}

// ---- shared memory

inline bool within_shared(const void* address, size_t bytes, const char* what) {
    Block& block = *current->block;
    const char* at = static_cast<const char*>(address);
    if (at < block.shared.get() || at + bytes > block.shared.get() + block.shared_bytes) {
        report("block %d, thread %d: %s of %zu bytes at %td, outside of the %zu bytes of shared memory", block.index,
               current->index, what, bytes, at - block.shared.get(), block.shared_bytes);
        return false;
    }
    if ((at - block.shared.get()) % bytes && bytes <= 16) {
        report("block %d, thread %d: %s of %zu bytes at %td, which is not aligned", block.index, current->index, what,
               bytes, at - block.shared.get());
        return false;
    }
    return true;
}

inline void race(const char* what, size_t word, int32_t other) {
    report("block %d: thread %d %s word %zu of shared memory, and thread %d did with no barrier in between",
           current->block->index, current->index, what, word, other);
}

inline void note_shared(const void* address, size_t bytes, bool writes, bool copy = false) {
    Block& block = *current->block;
    size_t offset = static_cast<const char*>(address) - block.shared.get();
    int32_t self = current->index;
    const Clock& clock = current->clock;
    for (size_t i = offset / 4; i <= (offset + bytes - 1) / 4; ++i) {
        Word& word = block.words[i];
        if (word.coming) {
            report("block %d, thread %d: word %zu of shared memory is on its way and was not waited for", block.index,
                   self, i);
            word.coming = false;
        }
        if (word.writer >= 0 && word.writer != self && clock[word.writer] < word.clock) {
            race(writes ? "writes" : "reads", i, word.writer);
            word.writer = -1;
        }
        if (!writes) {
            auto mine = std::find_if(word.reads.begin(), word.reads.end(), [&](auto& r) { return r.first == self; });
            if (mine == word.reads.end())
                word.reads.emplace_back(self, clock[self]);
            else
                mine->second = clock[self];
            continue;
        }
        for (auto& read : word.reads)
            if (read.first != self && clock[read.first] < read.second) {
                race("writes", i, read.first);
                break;
            }
        word.reads.clear();
        word.writer = self, word.clock = clock[self], word.coming = copy, word.copied = false;
    }
}

// ---- global memory

inline bool within_global(const void* address, size_t bytes, size_t alignment, const char* what, Array*& array) {
    array = find_array(address, bytes);
    if (!array) {
        report("block %d, thread %d: %s of %zu bytes at %p, in no array", current->block->index, current->index, what,
               bytes, address);
        return false;
    }
    if (reinterpret_cast<uintptr_t>(address) % alignment) {
        report("block %d, thread %d: %s of %zu bytes at byte %td of %s, which is not aligned", current->block->index,
               current->index, what, bytes, static_cast<const char*>(address) - array->begin, array->name.c_str());
        return false;
    }
    return true;
}

inline void note_global(Array& array, const void* address, size_t bytes, bool writes) {
    if (!array.writable) return;
    size_t offset = static_cast<const char*>(address) - array.begin;
    Block& block = *current->block;
    for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
        Array::Write& last = array.writes[i];
        uint32_t epoch = launches * 64 + block.epoch;
        bool ordered = last.block < 0 || last.epoch / 64 != launches ||
                       (last.block == block.index ? last.thread == current->index ||
                                                        current->clock[last.thread] >= last.clock
                                                  : epoch > last.epoch);
        if (!ordered) {
            report("block %d, thread %d %s byte %zu of %s, which block %d wrote with no barrier in between",
                   block.index, current->index, writes ? "writes" : "reads", i * 2, array.name.c_str(), last.block);
            last.block = -1;
        }
        if (writes) last = {block.index, current->index, current->clock[current->index], epoch};
    }
}

inline void count_load(Array& array, const void* address, size_t bytes) {
    Warp& warp = current->block->warps[current->index / kLanes];
    if (current->collectives > warp.interval) {
        warp.interval = current->collectives;
        warp.loaded[warp.interval & 1].clear();
    }
    uintptr_t at = reinterpret_cast<uintptr_t>(address);
    uint32_t& seen = warp.loaded[current->collectives & 1][at / 16];
    uint32_t wanted = ((1u << bytes) - 1) << (at % 16);
    array.loaded += __builtin_popcount(wanted & ~seen);
    if (!current->block->epoch) array.early += __builtin_popcount(wanted & ~seen);
    seen |= wanted;
}

// ---- copies

inline Barrier* barrier_at(const void* address) {
    auto found = current->block->barriers.find(address);
    if (found == current->block->barriers.end()) {
        report("block %d, thread %d: no mbarrier was made at %td", current->block->index, current->index,
               static_cast<const char*>(address) - current->block->shared.get());
        return nullptr;
    }
    Barrier& barrier = found->second;
    if (barrier.maker != current->index && current->clock[barrier.maker] < barrier.made)
        report("block %d, thread %d uses an mbarrier that thread %d made with no barrier in between",
               current->block->index, current->index, barrier.maker);
    return &barrier;
}

inline void complete(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.passed = barrier.clock, barrier.passed_fenced = barrier.fenced;
    barrier.pending = barrier.count;
    ++barrier.phase;
}

inline void arrive(Barrier& barrier, const Clock& clock, const Clock& fenced, int block, uint32_t count) {
    if (barrier.pending < count) return report("block %d: more arrivals than an mbarrier takes", block);
    join(barrier.clock, clock), join(barrier.fenced, fenced);
    barrier.pending -= count;
    complete(barrier);
}
inline void arrive(Barrier& barrier, uint32_t count) {
    arrive(barrier, current->clock, current->fenced, current->block->index, count);
    ++current->clock[current->index];
}

// A bulk copy to shared memory is about to begin: what threads did there has to have been fenced by them.
inline void check_fenced(const void* address, size_t bytes, const Barrier& barrier) {
    Block& block = *current->block;
    const Clock& fenced = current->fenced;
    size_t offset = static_cast<const char*>(address) - block.shared.get();
    bool missing = fenced[barrier.maker] < barrier.made;
    for (size_t i = offset / 4; i < (offset + bytes) / 4; ++i) {
        const Word& word = block.words[i];
        missing |= word.writer >= 0 && !word.copied && fenced[word.writer] < word.clock;
        for (auto& read : word.reads) missing |= fenced[read.first] < read.second;
    }
    if (missing)
        report("block %d, thread %d: a bulk copy with no proxy fence since its memory or mbarrier was used",
               block.index, current->index);
}

inline void land(Block& block, void* to, const void* from, size_t size, size_t bytes) {
    std::memcpy(to, from, size);
    std::memset(static_cast<char*>(to) + size, 0, bytes - size);
    size_t offset = static_cast<char*>(to) - block.shared.get();
    for (size_t i = offset / 4; i < (offset + bytes) / 4; ++i) block.words[i].coming = false;
}

}  // namespace shim

// ---- what kernels call

#define threadIdx (shim::Index{unsigned(shim::current->index)})
#define blockIdx (shim::Index{unsigned(shim::current->block->index)})
#define gridDim (shim::Index{unsigned(shim::grid->blocks.size())})

struct uint4 {
    uint32_t x, y, z, w;
};
struct uint2 {
    uint32_t x, y;
};
struct float4 {
    float x, y, z, w;
};

inline int min(int a, int b) { return a < b ? a : b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

inline void __syncthreads() {
    shim::Block& block = *shim::current->block;
    shim::meet(block.meeting, int(block.threads.size()), 0, "__syncthreads", [&] {
        std::vector<shim::Thread*> all;
        for (shim::Thread& thread : block.threads) all.push_back(&thread);
        shim::order(all);
    });
    ++shim::current->collectives;
}

inline void __syncwarp() {
    shim::meet_warp(1, "__syncwarp", true, [](shim::Warp&) {});
}

template <class T>
T shuffle_from(T value, int lane_from, int kind) {
    static_assert(sizeof(T) == 4);
    shim::Warp& warp = shim::current->block->warps[shim::current->index / shim::kLanes];
    int lane = shim::current->index % shim::kLanes;
    std::memcpy(&warp.lanes[lane].words[0], &value, 4);
    warp.lanes[lane].words[1] = uint32_t(lane_from) % shim::kLanes;
    shim::meet_warp(kind, "a shuffle", false, [](shim::Warp& all) {
        for (auto& one : all.lanes) one.result = all.lanes[one.words[1]].words[0];
    });
    std::memcpy(&value, &warp.lanes[lane].result, 4);
    return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return shuffle_from(value, lane, 2);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shuffle_from(value, (shim::current->index % shim::kLanes) ^ mask, 3);
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t both = uint64_t(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(both >> 8 * ((selector >> 4 * i) & 7) & 255) << 8 * i;
    return result;
}

namespace acip {
namespace device {

namespace numbers {
#include "../cpu/numbers.h"
}

struct Bf16 {};
struct F16 {};

inline float to_float(Bf16, uint16_t bits) { return numbers::to_float(numbers::bf16{bits}); }
inline float to_float(F16, uint16_t bits) { return numbers::to_float(numbers::f16{bits}); }
inline uint16_t round(Bf16, float value) {
    numbers::bf16 to;
    numbers::from_float(&to, value);
    return to.bits;
}
inline uint16_t round(F16, float value) {
    numbers::f16 to;
    numbers::from_float(&to, value);
    return to.bits;
}
inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }
inline uint32_t and_xor(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) ^ bits; }
template <class X>
uint32_t subtract(X, uint32_t a, uint32_t b) {
    uint32_t low = round(X{}, to_float(X{}, uint16_t(a)) - to_float(X{}, uint16_t(b)));
    uint32_t high = round(X{}, to_float(X{}, uint16_t(a >> 16)) - to_float(X{}, uint16_t(b >> 16)));
    return low | high << 16;
}
inline float exponential(float x) { return std::exp(x); }
inline float quotient(float a, float b) { return a / b; }

inline unsigned char* shared_memory() {
    return reinterpret_cast<unsigned char*>(shim::current->block->shared.get());
}

template <class T>
T read_shared(const void* from) {
    T value{};
    if (!shim::within_shared(from, sizeof(T), "a read")) return value;
    shim::note_shared(from, sizeof(T), false);
    std::memcpy(&value, from, sizeof(T));
    return value;
}
template <class T>
void write_shared(void* to, T value) {
    if (!shim::within_shared(to, sizeof(T), "a write")) return;
    shim::note_shared(to, sizeof(T), true);
    std::memcpy(to, &value, sizeof(T));
}

template <class T>
T read_global(const void* from) {
    T value{};
    shim::Array* array;
    if (!shim::within_global(from, sizeof(T), sizeof(T), "a load", array)) return value;
    shim::note_global(*array, from, sizeof(T), false);
    shim::count_load(*array, from, sizeof(T));
    std::memcpy(&value, from, sizeof(T));
    return value;
}
template <class T>
void write_global(void* to, T value) {
    shim::Array* array;
    if (!shim::within_global(to, sizeof(T), sizeof(T), "a store", array)) return;
    if (!array->writable) return shim::report("a store into %s, which is only to be read", array->name.c_str());
    shim::note_global(*array, to, sizeof(T), true);
    array->stored += sizeof(T);
    std::memcpy(to, &value, sizeof(T));
}

inline void prefetch(const void* from) {
    shim::Array* array;
    shim::within_global(from, 1, 1, "a prefetch", array);
}

inline void barrier_init(uint64_t* at, uint32_t count) {
    if (!shim::within_shared(at, 8, "an mbarrier")) return;
    shim::Thread& self = *shim::current;
    shim::Barrier& barrier = self.block->barriers[at];
    barrier = shim::Barrier{};
    barrier.count = barrier.pending = count;
    barrier.clock = barrier.passed = barrier.fenced = barrier.passed_fenced = shim::Clock(self.clock.size(), 0);
    barrier.maker = self.index, barrier.made = self.clock[self.index];
}
inline void fence_async() {
    shim::Thread& self = *shim::current;
    self.fenced[self.index] = self.clock[self.index]++;
}
inline void barrier_arrive(uint64_t* at, uint32_t count) {
    if (shim::Barrier* barrier = shim::barrier_at(at)) shim::arrive(*barrier, count);
}
inline void barrier_arrive_expecting(uint64_t* at, uint32_t bytes) {
    if (shim::Barrier* barrier = shim::barrier_at(at)) {
        barrier->bytes += bytes;
        shim::arrive(*barrier, 1);
    }
}
inline void barrier_arrive_after_copies(uint64_t* at) {
    // What this thread does from here on is not part of what it hands over.
    shim::Thread* self = shim::current;
    shim::Clock clock = self->clock, fenced = self->fenced;
    ++self->clock[self->index];
    if (shim::Barrier* barrier = shim::barrier_at(at))
        self->copies.push_back([=] { shim::arrive(*barrier, clock, fenced, self->block->index, 1); });
}
inline void barrier_wait(uint64_t* at, uint32_t parity) {
    shim::Barrier* barrier = shim::barrier_at(at);
    if (!barrier) return;
    // The phase of this parity is over when the one that goes on has the other.
    while ((barrier->phase & 1) == parity) shim::wait_while(barrier->phase, barrier->phase);
    shim::join(shim::current->clock, barrier->passed), shim::join(shim::current->fenced, barrier->passed_fenced);
}

inline bool startable(void* to, const void* from, size_t size, size_t bytes, size_t alignment, const char* what) {
    shim::Array* array;
    if (reinterpret_cast<uintptr_t>(to) % alignment) {
        shim::report("block %d, thread %d: %s to an address that is not a multiple of %zu", shim::current->block->index,
                     shim::current->index, what, alignment);
        return false;
    }
    for (size_t i = 0; i < bytes; i += alignment)
        if (!shim::within_shared(static_cast<char*>(to) + i, alignment, what)) return false;
    if (size) {
        if (!shim::within_global(from, size, alignment, what, array)) return false;
        array->loaded += size;
        if (!shim::current->block->epoch) array->early += size;
        shim::note_global(*array, from, size, false);
    }
    shim::note_shared(to, bytes, true, true);
    std::memset(to, 0xff, bytes);
    return true;
}

// cp.async: `size` of kBytes bytes are read, zeros are written for the others.
template <int kBytes>
void copy_async(void* to, const void* from, uint32_t size) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
    if (!startable(to, from, size, kBytes, kBytes, "a copy")) return;
    shim::Block* block = shim::current->block;
    shim::current->copies.push_back([=] { shim::land(*block, to, from, size, kBytes); });
}

inline bool kBulk = true;  // or as on a GPU before sm_90

inline bool elected() {
    shim::meet_warp(6, "an election", false, [](shim::Warp&) {});
    return shim::current->index % shim::kLanes == 0;
}

// cp.async.bulk from global to shared memory.
inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* at) {
    if (bytes % 16) return shim::report("a bulk copy of %u bytes, which is no multiple of 16", bytes);
    shim::Barrier* barrier = shim::barrier_at(at);
    if (!barrier) return;
    if (shim::within_shared(to, 16, "a bulk copy")) shim::check_fenced(to, bytes, *barrier);
    if (!startable(to, from, bytes, bytes, 16, "a bulk copy")) return;
    shim::Thread* self = shim::current;
    for (size_t i = 0; i < bytes; i += 4)
        self->block->words[(static_cast<char*>(to) - self->block->shared.get() + i) / 4].copied = true;
    shim::Clock clock = self->clock, fenced = self->fenced;
    self->copies.push_back([=] {
        shim::land(*self->block, to, from, bytes, bytes);
        shim::join(barrier->clock, clock), shim::join(barrier->fenced, fenced);
        barrier->bytes -= bytes;
        if (barrier->bytes < 0) shim::report("block %d: more bytes came than were expected", self->block->index);
        shim::complete(*barrier);
    });
}

// mma.sync.aligned.m16n8k16.row.col.f32, PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type":
// A: register i of a lane holds two numbers of row lane / 4 (+ 8 for odd i), columns lane % 4 · 2 (+ 8 for i ≥ 2) and
// the next; B: register i rows lane % 4 · 2 (+ 8 i) and the next, column lane / 4; C: number i row lane / 4 (+ 8 for
// i ≥ 2), column lane % 4 · 2 + (i & 1).
template <class X>
void mma(X, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    shim::Warp& warp = shim::current->block->warps[shim::current->index / shim::kLanes];
    auto& mine = warp.lanes[shim::current->index % shim::kLanes];
    for (int i = 0; i < 4; ++i) mine.words[i] = a[i], mine.floats[i] = c[i];
    mine.words[4] = b0, mine.words[5] = b1;
    shim::meet_warp(4, "mma", false, [](shim::Warp& all) {
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; ++lane)
            for (int half = 0; half < 2; ++half) {
                auto& from = all.lanes[lane];
                for (int i = 0; i < 4; ++i)
                    A[lane / 4 + 8 * (i & 1)][lane % 4 * 2 + 8 * (i >> 1) + half] =
                        to_float(X{}, uint16_t(from.words[i] >> 16 * half));
                for (int i = 0; i < 2; ++i)
                    B[lane % 4 * 2 + 8 * i + half][lane / 4] = to_float(X{}, uint16_t(from.words[4 + i] >> 16 * half));
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                int row = lane / 4 + 8 * (i >> 1), column = lane % 4 * 2 + (i & 1);
                float sum = all.lanes[lane].floats[i];
                for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
                all.lanes[lane].floats[i] = sum;
            }
    });
    for (int i = 0; i < 4; ++i) c[i] = mine.floats[i];
}

inline void sync_grid() {
    if (!shim::grid->cooperative) shim::report("a barrier of a grid that was not launched for one");
    int all = int(shim::grid->blocks.size() * shim::grid->blocks[0].threads.size());
    shim::meet(shim::grid->meeting, all, 5, "the grid's barrier", [&] {
        for (shim::Block& block : shim::grid->blocks) {
            std::vector<shim::Thread*> threads;
            for (shim::Thread& thread : block.threads) threads.push_back(&thread);
            shim::order(threads);
            ++block.epoch;
        }
    });
    ++shim::current->collectives;
}
// Launches run one after the other.
inline void let_next_launch() {}
inline void await_last_launch() {}

using Stream = void*;
inline bool refuse_cooperative = false;  // as a GPU does that is shared with others
inline size_t most_shared = 227 << 10, last_shared = 0;  // of a block: that there is, of the last launch

enum class Launched { yes, refused, failed };
template <class Job>
Launched launch(void (*kernel)(Job), const Job& job, int blocks, int threads, size_t shared, size_t most,
                bool cooperative, bool, Stream) {
    if (cooperative && refuse_cooperative) return Launched::refused;
    if (shared > most || most > most_shared) return Launched::failed;
    last_shared = shared;
    shim::run(blocks, threads, shared, cooperative, [=] { kernel(job); });
    return Launched::yes;
}

}  // namespace device
}  // namespace acip
