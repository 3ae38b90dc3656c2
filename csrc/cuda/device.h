// What the kernels need of a GPU, one small function each; compiled for a CPU, csrc/testing/gpu_shim.h has them all.
//
// Everything that goes through memory goes through here: the shim checks bounds, orders and copies, and counts bytes.
#pragma once

#if !defined(__CUDACC__)
#include "../testing/gpu_shim.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace acip {
namespace device {

// ---- numbers of two bytes, by their bits

struct Bf16 {};
struct F16 {};

__device__ __forceinline__ float to_float(Bf16, uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ float to_float(F16, uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t round(Bf16, float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ __forceinline__ uint16_t round(F16, float value) { return __half_as_ushort(__float2half_rn(value)); }

// word & mask, then | or ^ bits: one instruction, which the compiler makes two of where both are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(word) : "r"(word), "r"(mask), "r"(bits));
    return word;
}
__device__ __forceinline__ uint32_t and_xor(uint32_t word, uint32_t mask, uint32_t bits) {
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(word) : "r"(word), "r"(mask), "r"(bits));
    return word;
}
// a - b of two numbers each.
__device__ __forceinline__ uint32_t subtract(Bf16, uint32_t a, uint32_t b) {
    __nv_bfloat162 x, y;
    memcpy(&x, &a, 4), memcpy(&y, &b, 4);
    x = __hsub2(x, y);
    memcpy(&a, &x, 4);
    return a;
}
__device__ __forceinline__ uint32_t subtract(F16, uint32_t a, uint32_t b) {
    __half2 x, y;
    memcpy(&x, &a, 4), memcpy(&y, &b, 4);
    x = __hsub2(x, y);
    memcpy(&a, &x, 4);
    return a;
}
__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }

// c += a b on tensor cores: mma.m16n8k16, fragments as the PTX manual lays them out.
__device__ __forceinline__ void mma(Bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(F16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- memory

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}
template <class T>
__device__ __forceinline__ T read_shared(const void* from) {
    return *static_cast<const T*>(from);
}
template <class T>
__device__ __forceinline__ void write_shared(void* to, T value) {
    *static_cast<T*>(to) = value;
}
// Past the first-level cache, which does not see what other multiprocessors wrote.
template <class T>
__device__ __forceinline__ T read_global(const void* from) {
    return __ldcg(static_cast<const T*>(from));
}
template <class T>
__device__ __forceinline__ void write_global(void* to, T value) {
    *static_cast<T*>(to) = value;
}

// So that it is in the second-level cache when it is read; where there is none of it, nothing happens.
__device__ __forceinline__ void prefetch(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// ---- copies to shared memory, and the mbarriers that tell when they are there

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kBulk = true;
#else
constexpr bool kBulk = false;
#endif

__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void barrier_init(uint64_t* at, uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count) : "memory");
}
// Between this thread's ordinary accesses to shared memory and bulk copies that are ordered behind them.
__device__ __forceinline__ void fence_async() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// `count` is 1 before sm_90.
__device__ __forceinline__ void barrier_arrive(uint64_t* at, uint32_t count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0], %1;\n}" ::"r"(shared_address(at)),
                 "r"(count)
                 : "memory");
#else
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(at))
                 : "memory");
#endif
}
// An arrival that adds to the bytes that have to come before the phase is over.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* at, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(
                     shared_address(at)),
                 "r"(bytes)
                 : "memory");
#endif
}
// An arrival when all of this thread's `copy_async` are there.
__device__ __forceinline__ void barrier_arrive_after_copies(uint64_t* at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(at)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* at, uint32_t parity) {
    uint32_t over;
    do {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile(
            "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
            : "=r"(over)
            : "r"(shared_address(at)), "r"(parity)
            : "memory");
#else
        asm volatile(
            "{\n.reg .pred over;\nmbarrier.test_wait.parity.shared.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
            : "=r"(over)
            : "r"(shared_address(at)), "r"(parity)
            : "memory");
#endif
    } while (!over);
}

// `size` of kBytes bytes are read, zeros are written for the others.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, uint32_t size) {
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size),
                     "n"(kBytes)
                     : "memory");
}
// True of one lane of a warp that is here as a whole, and known to the compiler to be: what bulk copies take is then in
// the registers that all lanes share, without a loop that looks for lanes.
__device__ __forceinline__ bool elected() {
    uint32_t is = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(is));
#endif
    return is;
}
// A multiple of 16 bytes, which is what both addresses are multiples of too.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* at) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(at))
                 : "memory");
#endif
}

// ---- order among blocks and launches

__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }

// Programmatic dependent launch: the next launch may start; the one before has ended, and what it wrote can be read.
__device__ __forceinline__ void let_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_last_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- the host's side

using Stream = cudaStream_t;

enum class Launched { yes, refused, failed };

// most: shared memory that any launch on this device may ask for. cooperative: all blocks run at once, or it is refused;
// dependent: it may start before the launch before it has ended; CUDA knows no launch that is both.
template <class Job>
Launched launch(void (*kernel)(Job), const Job& job, int blocks, int threads, size_t shared, size_t most,
                bool cooperative, bool dependent, Stream stream) {
    // What a kernel may have beyond 48 KiB has to be asked for; always the same, so that threads of the host that launch
    // at once do not take it from each other. And memory that is shared out alike lets two launches be there at once.
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)) != cudaSuccess ||
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) !=
            cudaSuccess) {
        cudaGetLastError();
        return Launched::failed;
    }
    cudaLaunchAttribute attribute{};
    if (cooperative) {
        attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;
    } else if (dependent) {
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = cooperative || dependent ? 1 : 0;
    cudaError_t error = cudaLaunchKernelEx(&config, kernel, job);
    if (error == cudaSuccess) return Launched::yes;
    cudaGetLastError();  // so that nobody else finds it
    return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported ? Launched::refused
                                                                                        : Launched::failed;
}

}  // namespace device
}  // namespace acip
#endif
