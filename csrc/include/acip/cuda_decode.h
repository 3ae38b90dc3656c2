// Linear layers of few tokens on an NVIDIA GPU (sm_80 and newer): all of a group's products in one launch.
//
// Raw pointers, sizes and a stream; no torch header, none of CUDA's. Pointers are to the GPU's memory. A call allocates
// nothing and waits for nothing, and can be captured in a graph; results are the same to the bit whenever they are
// asked for, on one kind of device. Memory between the products is the caller's: `workspace_bytes` says how much, what
// is in it before a call does not matter, and two calls may share it if one stream orders them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "acip/decode.h"

namespace acip {
namespace cuda {

constexpr int kMostTokens = 16;
constexpr int kMostSiblings = 4;

// dense: x Wᵀ, W the `first` matrix. factors: ((x Vhᵀ) ⊙ s) Uᵀ, Vh the first and U the `second`. pivoted: z = x Bᵀ and
// z Cᵀ side by side, output i at `place[i]`.
enum class Form { dense, factors, pivoted };

// A matrix's numbers are the activations', i8 or i4 (see acip/decode.h). Null: no `s` (of factors only), no `bias`.
struct Layer {
    Form form;
    Matrix first, second;
    const float* s;        // [rank]
    const void* bias;      // [outputs], activations' numbers
    const int32_t* place;  // [outputs], of a pivoted layer
};

// concatenate: the outputs of up to `kMostSiblings` layers of one input side by side. swiglu: silu(first) ⊙ second of
// two layers. gated_mlp: a third layer of that.
enum class Mode { concatenate, swiglu, gated_mlp };

struct Problem {
    Number activation;  // bf16 or f16: of x, biases and y
    Mode mode;
    const Layer* layers;
    int count;
    const void* x;      // [tokens, inputs], a row contiguous
    void* y;            // [tokens, outputs], a row contiguous
    int64_t x_stride, y_stride;  // elements from one token to the next
    int64_t tokens;     // up to `kMostTokens`
};

struct Device {
    int multiprocessors;
    size_t shared_bytes;  // that one block may have
    bool dependent;       // whether launches may overlap (programmatic dependent launch, sm_90 and newer)
};

// cooperative: one launch whose blocks wait for each other between products. dependent: a launch for each side of such
// a barrier. automatic: cooperative, and where it is refused, as on a GPU that others use too, dependent.
enum class Launch { automatic, cooperative, dependent };

// How weights come to shared memory. bulk: where there are bulk copies (sm_90), by them, but for rows that are not
// aligned to 16 bytes. threads: each thread copies 16 bytes at a time (cp.async), as on sm_80.
enum class Copies { bulk, threads };

// How the work is laid out; zeros are chosen. For tests and whoever tunes.
struct Choices {
    Launch launch = Launch::automatic;
    int splits = 0;  // parts of a first factor's columns
    int slots = 0;   // tiles of weights that a warp has on their way
    Copies copies = Copies::bulk;
};

// What a call comes to.
struct Schedule {
    int stages;           // with a barrier between each and the next
    int blocks;
    int slots;
    int splits;           // of the first layer's first factor
    size_t shared_bytes;  // of a block, in one cooperative launch
    size_t workspace_bytes;
};

enum class Status {
    ok,
    invalid,      // a size, pointer or combination that makes no problem
    unsupported,  // a problem, but not one for these kernels on this device: more tokens, siblings or weights
    workspace,    // too small, or not aligned to 256 bytes
    no_device,
    failed,       // CUDA refused the launch
};

// What a status means, in English.
const char* message(Status status);

// What the kernels need to know of CUDA's device `number`.
Status describe(int number, Device* device);

Status schedule(const Problem& problem, const Device& device, const Choices& choices, Schedule* result);

// `schedule`'s workspace for any choices.
Status workspace_bytes(const Problem& problem, const Device& device, size_t* bytes);

// y of x, on `stream` (a cudaStream_t) of the current device.
Status decode(const Problem& problem, const Device& device, void* workspace, size_t bytes, void* stream,
              const Choices& choices = Choices());

}  // namespace cuda
}  // namespace acip
