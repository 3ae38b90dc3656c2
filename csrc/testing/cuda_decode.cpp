// The CUDA kernels of deployed layers on arrays of exactly the size that they may touch, compared with sums in double;
// one source for two programs. Compiled by g++ it runs them on the CPU, under the execution shim and the sanitizers, and
// counts what is asked of global memory against what there is of weights. Compiled by nvcc it runs the same cases on a
// GPU, each in a CUDA graph too; what memory they touch is for compute-sanitizer to see:
//
//   nvcc -std=c++17 -O3 -I csrc/include -arch=native csrc/cuda/decode.cu -x cu csrc/testing/cuda_decode.cpp -o cases
//
// Prints "N mistakes"; returns 1 if there was one, 2 without a GPU. With an argument only a few of the cases. Built and
// run by tests/test_cuda_kernels.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "acip/cuda_decode.h"
#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace acip {
namespace device {
namespace numbers {
#include "../cpu/numbers.h"
}
struct Bf16 {};
struct F16 {};
float to_float(Bf16, uint16_t bits) { return numbers::to_float(numbers::bf16{bits}); }
float to_float(F16, uint16_t bits) { return numbers::to_float(numbers::f16{bits}); }
uint16_t round(Bf16, float value) {
    numbers::bf16 to;
    return numbers::from_float(&to, value), to.bits;
}
uint16_t round(F16, float value) {
    numbers::f16 to;
    return numbers::from_float(&to, value), to.bits;
}
}  // namespace device
}  // namespace acip
#else
#include "gpu_shim.h"
#endif

using namespace acip;
using namespace acip::cuda;

namespace {

std::mt19937 random_numbers(0);
float between(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_numbers); }

int mistakes = 0;
void mistake(const std::string& what) {
    if (++mistakes < 20) std::printf("%s\n", what.c_str());
}

uint16_t bits_of(Number type, double value) {
    float single = float(value);
    return type == Number::bf16 ? device::round(device::Bf16{}, single) : device::round(device::F16{}, single);
}
double value_of(Number type, uint16_t bits) {
    return type == Number::bf16 ? device::to_float(device::Bf16{}, bits) : device::to_float(device::F16{}, bits);
}

#if defined(__CUDACC__)
constexpr bool kOnGpu = true;
void expect(cudaError_t error) {
    if (error != cudaSuccess) std::printf("CUDA: %s\n", cudaGetErrorString(error)), std::exit(1);
}
struct Free {
    void operator()(void* at) const { cudaFree(at); }
};
#else
constexpr bool kOnGpu = false;
#endif

// An array that lies alone in its memory and ends where it does; with a copy on the GPU, or known to the shim by its
// kind. It begins at a multiple of 256 bytes, as what is allocated on a GPU does, if `aligned`.
struct Memory {
    std::unique_ptr<unsigned char[]> bytes;
    size_t n = 0, begin = 0;
    Memory() = default;
    Memory(size_t n, const char* name, bool writable, bool aligned = false) : bytes(new unsigned char[n + 256]), n(n) {
        if (!aligned) bytes.reset(new unsigned char[n]);
        if (aligned) begin = (256 - reinterpret_cast<uintptr_t>(bytes.get()) % 256) % 256;
        std::memset(bytes.get() + begin, 0xff, n);  // NaN
#if defined(__CUDACC__)
        (void)name, (void)writable;
        void* at = nullptr;
        if (n) expect(cudaMalloc(&at, n));
        on_gpu.reset(at);
        send();
#else
        if (n) shim::add_array(bytes.get() + begin, n, name, writable);
#endif
    }
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(bytes.get() + begin);
    }
#if defined(__CUDACC__)
    std::unique_ptr<void, Free> on_gpu;
    void* send() const {  // and where it is there
        if (n) expect(cudaMemcpy(on_gpu.get(), bytes.get() + begin, n, cudaMemcpyHostToDevice));
        return on_gpu.get();
    }
    void receive() { expect(cudaMemcpy(bytes.get() + begin, on_gpu.get(), n, cudaMemcpyDeviceToHost)); }
#else
    void* send() const { return n ? bytes.get() + begin : nullptr; }
    void receive() {}
#endif
};

struct Weight {
    Matrix matrix;
    std::vector<double> values;
    Memory data, scales, zeros;

    Weight(Number type, int64_t rows, int64_t cols, int64_t group = 0, bool with_zeros = false) : values(rows * cols) {
        int64_t width = type == Number::i8 ? cols : type == Number::i4 ? (cols + 63) / 64 * 32 : 2 * cols;
        data = Memory(rows * width, "weights", false);
        if (type == Number::i8) {
            scales = Memory(4 * rows, "weights", false);
            for (int64_t i = 0; i < rows; ++i) scales.as<float>()[i] = between(0.005f, 0.01f);
            for (int64_t i = 0; i < rows * cols; ++i) {
                int8_t code = data.as<int8_t>()[i] = int8_t(random_numbers());
                values[i] = double(code) * scales.as<float>()[i / cols];
            }
        } else if (type == Number::i4) {
            int64_t groups = (cols + group - 1) / group;
            scales = Memory(2 * rows * groups, "weights", false);
            if (with_zeros) zeros = Memory(rows * groups, "weights", false);
            for (int64_t i = 0; i < rows * groups; ++i) {
                scales.as<uint16_t>()[i] = bits_of(Number::bf16, between(0.05f, 0.2f));
                if (with_zeros) zeros.as<uint8_t>()[i] = uint8_t(random_numbers() % 16);
            }
            for (int64_t i = 0; i < rows * width; ++i) data.as<uint8_t>()[i] = uint8_t(random_numbers());
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t j = 0; j < cols; ++j) {
                    uint8_t byte = data.as<uint8_t>()[r * width + j / 64 * 32 + j % 32];
                    int64_t at = r * groups + j / group;
                    int code = j % 64 < 32 ? byte & 15 : byte >> 4, zero = with_zeros ? zeros.as<uint8_t>()[at] : 8;
                    values[r * cols + j] = (code - zero) * value_of(Number::bf16, scales.as<uint16_t>()[at]);
                }
        } else {
            for (int64_t i = 0; i < rows * cols; ++i) {
                data.as<uint16_t>()[i] = bits_of(type, between(-1, 1));
                values[i] = value_of(type, data.as<uint16_t>()[i]);
            }
        }
        matrix = {type, data.send(), rows, cols, width, scales.send(), static_cast<uint8_t*>(zeros.send()), group};
    }
    size_t bytes() const { return data.n + scales.n + zeros.n; }
};

// A sum with the sum of its terms' sizes, and what rounding may have made of it.
struct Value {
    double value = 0, error = 0;
};

struct Case {
    Number activation;
    Mode mode;
    int64_t in;
    struct {
        Form form;
        int64_t out, rank;
        Number type;
        int64_t group;
        bool zeros, s, bias;
    } layers[4];
    int count;
};

struct Made {
    Form form;
    std::unique_ptr<Weight> first, second;
    Memory s, bias, place;
    int64_t out;
};

double unit(Number type) { return type == Number::bf16 ? 1.0 / 256 : 1.0 / 2048; }

// Σ_j x_j w_j, of x that may be wrong by its errors, as a float32 sum of `terms` terms, in any order.
std::vector<Value> product(const Weight& w, const std::vector<Value>& x) {
    std::vector<Value> y(w.matrix.rows);
    for (int64_t r = 0; r < w.matrix.rows; ++r) {
        double size = 0;
        for (int64_t j = 0; j < w.matrix.cols; ++j) {
            double weight = w.values[r * w.matrix.cols + j];
            y[r].value += weight * x[j].value, y[r].error += std::abs(weight) * x[j].error;
            size += std::abs(weight * x[j].value);
        }
        y[r].error += (size + y[r].error) * (w.matrix.cols + 40) * 6e-8;
    }
    return y;
}
void round_all(std::vector<Value>& x, Number type) {
    for (Value& one : x) one.error += (std::abs(one.value) + one.error) * unit(type) + 1e-7;
}

std::vector<Value> layer_of(const Made& layer, const std::vector<Value>& x, Number type) {
    std::vector<Value> y = product(*layer.first, x);
    const float* s = reinterpret_cast<const float*>(layer.s.bytes.get());
    const uint16_t* bias = reinterpret_cast<const uint16_t*>(layer.bias.bytes.get());
    const int32_t* place = reinterpret_cast<const int32_t*>(layer.place.bytes.get());
    if (layer.form != Form::dense) {
        if (s)
            for (size_t i = 0; i < y.size(); ++i) y[i].value *= s[i], y[i].error *= 1.0001 * std::abs(s[i]);
        round_all(y, type);
        std::vector<Value> z = y;
        y = product(*layer.second, z);
        if (layer.form == Form::pivoted) {
            std::vector<Value> all(layer.out);
            for (int64_t i = 0; i < layer.out; ++i) all[place[i]] = i < int64_t(z.size()) ? z[i] : y[i - z.size()];
            y = all;
        }
    }
    if (bias)
        for (int64_t i = 0; i < layer.out; ++i) y[i].value += value_of(type, bias[i]);
    round_all(y, type);
    return y;
}

// How a case is run: on a device, in a way.
struct Way {
    Device gpu;
    Choices choices;
};

// Runs a case in every one of these ways; all must agree to the bit where their splits do.
void run(const Case& about, int64_t tokens, const std::vector<Way>& ways, bool print = false) {
#if !defined(__CUDACC__)
    shim::arrays.clear();
#endif
    std::vector<Made> made;
    std::vector<Layer> layers;
    size_t weights = 0, row_scales = 0, firsts = 0;
    for (int i = 0; i < about.count; ++i) {
        auto& spec = about.layers[i];
        Made one{spec.form, nullptr, nullptr, {}, {}, {}, spec.out};
        int64_t in = i == 2 && about.mode == Mode::gated_mlp ? about.layers[0].out : about.in;
        int64_t rows = spec.form == Form::dense ? spec.out : spec.rank;
        one.first.reset(new Weight(spec.type, rows, in, spec.group, spec.zeros));
        weights += one.first->bytes();
        if (spec.form != Form::dense) {
            int64_t out = spec.form == Form::pivoted ? spec.out - spec.rank : spec.out;
            one.second.reset(new Weight(spec.type, out, spec.rank, spec.group, spec.zeros));
            weights += one.second->bytes();
        }
        if (spec.form != Form::dense) firsts += one.first->bytes();
        if (spec.type == Number::i8) row_scales += one.first->scales.n;
        if (spec.s) {
            one.s = Memory(4 * spec.rank, "s", false);
            for (int64_t j = 0; j < spec.rank; ++j) one.s.as<float>()[j] = between(0.5f, 2);
        }
        if (spec.bias) {
            one.bias = Memory(2 * spec.out, "bias", false);
            for (int64_t j = 0; j < spec.out; ++j)
                one.bias.as<uint16_t>()[j] = bits_of(about.activation, between(-1, 1));
        }
        if (spec.form == Form::pivoted) {
            one.place = Memory(4 * spec.out, "place", false);
            for (int64_t j = 0; j < spec.out; ++j) one.place.as<int32_t>()[j] = int32_t((j * 7 + 3) % spec.out);
            if (spec.out % 7 == 0)
                for (int64_t j = 0; j < spec.out; ++j) one.place.as<int32_t>()[j] = int32_t(spec.out - 1 - j);
        }
        made.push_back(std::move(one));
    }
    for (Made& one : made)
        layers.push_back({one.form, one.first->matrix, one.second ? one.second->matrix : Matrix{},
                          static_cast<float*>(one.s.send()), one.bias.send(),
                          static_cast<int32_t*>(one.place.send())});
    int64_t width = 0;
    for (int i = 0; i < about.count; ++i) width += about.layers[i].out;
    if (about.mode != Mode::concatenate) width = about.layers[about.count - 1].out;
    Memory x(2 * tokens * about.in, "x", false);
    for (int64_t i = 0; i < tokens * about.in; ++i) x.as<uint16_t>()[i] = bits_of(about.activation, between(-1, 1));

    std::vector<std::vector<Value>> wanted;
    for (int64_t t = 0; t < tokens; ++t) {
        std::vector<Value> input(about.in), output;
        for (int64_t j = 0; j < about.in; ++j)
            input[j].value = value_of(about.activation, x.as<uint16_t>()[t * about.in + j]);
        if (about.mode == Mode::concatenate) {
            for (Made& one : made)
                for (Value& v : layer_of(one, input, about.activation)) output.push_back(v);
        } else {
            auto gate = layer_of(made[0], input, about.activation), up = layer_of(made[1], input, about.activation);
            for (size_t i = 0; i < gate.size(); ++i) {
                double g = gate[i].value, u = up[i].value, silu = g / (1 + std::exp(-g));
                double error = 1.1 * gate[i].error * (std::abs(u) + up[i].error) + std::abs(silu) * up[i].error;
                output.push_back({silu * u, error + 1e-5 * std::abs(silu * u)});
            }
            round_all(output, about.activation);
            if (about.mode == Mode::gated_mlp) output = layer_of(made[2], output, about.activation);
        }
        wanted.push_back(output);
    }

    std::map<int, std::vector<unsigned char>> seen;
    for (const auto& [gpu, choices] : ways) {
        Problem problem{about.activation, about.mode, layers.data(), about.count, x.send(), nullptr,
                        about.in, width, tokens};
        Schedule plan{};
        Status status = schedule(problem, gpu, choices, &plan);
        if (status == Status::ok && plan.shared_bytes > gpu.shared_bytes) status = Status::unsupported;
        if (status != Status::ok) {
            mistake(message(status));
            continue;
        }
        auto check = [&](Memory& y) {
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t j = 0; j < width; ++j) {
                    double value = value_of(about.activation, y.as<uint16_t>()[t * width + j]);
                    Value& want = wanted[t][j];
                    if (!(std::abs(value - want.value) <= want.error))
                        mistake("output " + std::to_string(j) + " of token " + std::to_string(t) + ": " +
                                std::to_string(value) + ", not " + std::to_string(want.value));
                }
            std::vector<unsigned char> output(y.as<unsigned char>(), y.as<unsigned char>() + y.n);
            auto& first = seen[plan.splits];
            if (first.empty()) first = output;
            if (first != output) mistake("a rerun differs");
        };
        Memory y(2 * tokens * width, "y", true), workspace(plan.workspace_bytes, "workspace", true, true);
        problem.y = y.send();
#if defined(__CUDACC__)
        cudaStream_t stream;
        expect(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        status = decode(problem, gpu, workspace.send(), workspace.n, stream, choices);
        if (status != Status::ok) mistake(std::string("decode: ") + message(status));
        expect(cudaStreamSynchronize(stream));
        y.receive();
        check(y);
        // And captured, what would fail if it allocated or waited; replayed, on what the first replay left behind.
        std::memset(y.as<char>(), 0xff, y.n), std::memset(workspace.as<char>(), 0xff, workspace.n);
        y.send(), workspace.send();
        cudaGraph_t graph;
        cudaGraphExec_t replay;
        expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        status = decode(problem, gpu, workspace.on_gpu.get(), workspace.n, stream, choices);
        expect(cudaStreamEndCapture(stream, &graph));
        if (status != Status::ok) mistake(std::string("captured: ") + message(status));
        expect(cudaGraphInstantiate(&replay, graph, 0));
        for (int i = 0; i < 2; ++i) expect(cudaGraphLaunch(replay, stream));
        expect(cudaStreamSynchronize(stream));
        y.receive();
        check(y);
        expect(cudaGraphExecDestroy(replay)), expect(cudaGraphDestroy(graph)), expect(cudaStreamDestroy(stream));
        (void)print, (void)row_scales, (void)firsts;
#else
        for (auto& entry : shim::arrays) entry.second.loaded = entry.second.stored = entry.second.early = 0;
        status = decode(problem, gpu, workspace.send(), plan.workspace_bytes, nullptr, choices);
        if (status != Status::ok) mistake(std::string("decode: ") + message(status));
        for (auto& text : shim::reports) mistake(text);
        shim::reports.clear();
        if (choices.launch == Launch::cooperative && device::last_shared != plan.shared_bytes)
            mistake("a schedule of " + std::to_string(plan.shared_bytes) + " bytes of shared memory became " +
                    std::to_string(device::last_shared));
        check(y);
        size_t of_weights = 0, others = 0, early = 0;
        for (auto& entry : shim::arrays) {
            (entry.second.name == "weights" ? of_weights : others) += entry.second.loaded + entry.second.stored;
            if (entry.second.name == "weights") early += entry.second.early;
        }
        // An 8-bit row's scale is read for each split of the row.
        if (of_weights > 1.02 * weights + (plan.splits - 1) * row_scales || of_weights < weights)
            mistake(std::to_string(of_weights) + " bytes of weights were read, of " + std::to_string(weights));
        if (print)
            std::printf("bytes: %zu weights, %zu read, %zu others; %zu of first factors, %zu before a barrier; "
                        "%d stages, %d blocks, %d slots, %d splits\n",
                        weights, of_weights, others, firsts, early, plan.stages, plan.blocks, plan.slots, plan.splits);
        for (Memory* one : {&y, &workspace}) shim::arrays.erase(one->as<char>() + one->n);
#endif
    }
}

}  // namespace

int main(int count, char**) {
    const bool quick = count > 1;
    constexpr Form kDense = Form::dense, kFactors = Form::factors, kPivoted = Form::pivoted;
    constexpr Number kI8 = Number::i8, kI4 = Number::i4;
    const Choices once{}, again{Launch::dependent, 0, 0, Copies::threads}, split{Launch::cooperative, 3, 2};
    Device whole{3, 163 << 10, true};
    if (kOnGpu && describe(0, &whole) != Status::ok) return std::printf("no GPU\n"), 2;
    Device gpu = whole;
    gpu.multiprocessors = 3;
    // A device with memory for two slots and no inputs, so that a stage of its own makes them.
    const auto tight = [&](int64_t tokens) {
        Device device = gpu;
        device.shared_bytes = 1280 + 1280 * (tokens == 1 ? 8 : 16) + (80 << 10);
        return device;
    };
    for (Number x : {Number::bf16, Number::f16}) {
        if (quick && x == Number::f16) break;
        const Case cases[] = {
            {x, Mode::concatenate, 200, {{kFactors, 50, 24, x, 0, false, true, true}}, 1},
            {x, Mode::concatenate, 200, {{kFactors, 300, 97, x, 0, false, false, true}}, 1},
            {x, Mode::concatenate, 33, {{kFactors, 17, 5, x, 0, false, false, true}}, 1},
            {x, Mode::concatenate, 1, {{kFactors, 1, 1, x, 0, false, true, false}}, 1},
            {x, Mode::concatenate, 72,
             {{kFactors, 48, 16, x, 0, false, false, false},
              {kFactors, 48, 16, x, 0, false, true, false},
              {kFactors, 48, 16, x, 0, false, false, true},
              {kFactors, 48, 16, x, 0, false, false, false}}, 4},
            {x, Mode::concatenate, 64, {{kDense, 400, 0, x, 0, false, false, true}}, 1},
            {x, Mode::concatenate, 130, {{kPivoted, 49, 22, x, 0, false, false, true}}, 1},
            {x, Mode::concatenate, 150, {{kFactors, 33, 40, kI8, 0, false, true, true}}, 1},
            {x, Mode::concatenate, 272, {{kFactors, 20, 70, kI4, 64, true, true, true}}, 1},
            {x, Mode::concatenate, 300, {{kPivoted, 45, 20, kI4, 32, false, false, false}}, 1},
            {x, Mode::concatenate, 96,
             {{kFactors, 40, 33, x, 0, false, false, true},
              {kDense, 20, 0, kI8, 0, false, false, false},
              {kPivoted, 20, 6, kI4, 128, true, false, true}}, 3},
            {x, Mode::swiglu, 72,
             {{kFactors, 40, 16, x, 0, false, true, true}, {kFactors, 40, 30, kI4, 32, true, false, false}}, 2},
            {x, Mode::gated_mlp, 40,
             {{kFactors, 66, 21, x, 0, false, false, true},
              {kDense, 66, 0, kI8, 0, false, false, false},
              {kFactors, 40, 18, x, 0, false, true, true}}, 3},
            {x, Mode::gated_mlp, 40,
             {{kPivoted, 63, 20, x, 0, false, false, true},
              {kFactors, 63, 16, x, 0, false, false, false},
              {kPivoted, 44, 18, kI4, 32, true, false, true}}, 3},
        };
        for (const Case& one : cases)
            for (int64_t tokens : {1, 2, 9, 16}) {
                if (quick ? tokens != 2 : x == Number::f16 && tokens == 9) continue;
                std::vector<Way> ways = {{gpu, once}, {gpu, again}, {gpu, split}};
                if (kOnGpu) ways.push_back({whole, once}), ways.push_back({whole, again});
                if (x == Number::bf16) ways.push_back({tight(tokens), tokens == 2 ? again : once});
#if !defined(__CUDACC__)
                shim::backwards = tokens == 2;
#endif
                run(one, tokens, ways);
            }
    }
#if !defined(__CUDACC__)
    // On a GPU that others use too: the other form, and an error for who asked for this one by name.
    device::refuse_cooperative = true;
    const Case plain{Number::bf16, Mode::concatenate, 64, {{kFactors, 32, 16, Number::bf16, 0, false, true, true}}, 1};
    run(plain, 1, {{gpu, once}});
    device::refuse_cooperative = false;
#endif
    if (quick) return std::printf("%d mistakes\n", mistakes), mistakes != 0;
    // What is asked of memory at sizes that are more like a model's: every form and number.
    for (Number type : {Number::bf16, Number::f16, kI8, kI4}) {
        const Number x = type == Number::f16 ? type : Number::bf16;
        const int64_t group = type == kI4 ? 64 : 0;
        const bool zeros = type == kI4, small = type == Number::f16;
        const Case larger[] = {
            {x, Mode::concatenate, 1024, {{kFactors, 512, 128, type, group, zeros, true, false}}, 1},
            {x, Mode::concatenate, 768, {{kPivoted, 512, 128, type, group, zeros, false, false}}, 1},
            {x, Mode::concatenate, 1024, {{kDense, 128, 0, type, group, zeros, false, false}}, 1},
            {x, Mode::concatenate, 512,
             {{kFactors, 512, 64, type, group, zeros, false, false},
              {kFactors, 128, 64, type, group, zeros, false, false},
              {kPivoted, 128, 64, type, group, zeros, false, false}}, 3},
            {x, Mode::swiglu, 512,
             {{kFactors, 384, 64, type, group, zeros, false, false},
              {kFactors, 384, 128, type, group, zeros, false, false}}, 2},
            {x, Mode::gated_mlp, 256,
             {{kFactors, 512, 64, type, group, zeros, false, false},
              {kFactors, 512, 64, type, group, zeros, false, false},
              {kFactors, 256, 64, type, group, zeros, false, false}}, 3},
        };
        for (const Case& one : larger)
            for (int64_t tokens : {1, 16})
                if (!small || (tokens == 1 && one.mode != Mode::gated_mlp)) run(one, tokens, {{gpu, once}}, true);
    }
    // With too little memory for what is between the products; and with enough for all of a block's second factor, which
    // is on its way before the barrier then.
    const Case wide{Number::bf16, Mode::concatenate, 128, {{kFactors, 128, 1024, Number::bf16, 0, false, true, false}}, 1};
    run(wide, 16, {{tight(16), once}, {gpu, once}}, true);
    run(wide, 1, {{gpu, once}}, true);
    std::printf("%d mistakes\n", mistakes);
    return mistakes != 0;
}
