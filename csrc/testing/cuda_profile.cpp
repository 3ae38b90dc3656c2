// What the CUDA kernels cost on a GPU, without torch: Llama-3.1-8B's layers at half their size, at one token and at 16.
// For bench/cuda_profile.py, which compiles and runs it:
//
//   nvcc -std=c++17 -O3 -I csrc/include -arch=native csrc/cuda/decode.cu -x cu csrc/testing/cuda_profile.cpp -o profile
//
// Prints "copy: BYTES/S", which a large copy in the GPU's memory reads and writes; and of each problem, by each launch and
// kind of copies, "time: GROUP WEIGHTS TOKENS LAUNCH COPIES BYTES SECONDS", the median over replays of a CUDA graph that
// runs through copies of the weights, together three times the L2. "barrier: LAUNCH SECONDS" is what a layer of two
// stages of next to no weights takes longer than one of one stage. With an argument each problem is launched once
// instead, cooperatively, for a profiler, and "once: GROUP WEIGHTS TOKENS BYTES" printed. Returns 2 without a GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "acip/cuda_decode.h"

using namespace acip;
using namespace acip::cuda;

namespace {

void expect(cudaError_t error) {
    if (error != cudaSuccess) std::printf("CUDA: %s\n", cudaGetErrorString(error)), std::exit(1);
}
void expect(Status status) {
    if (status != Status::ok) std::printf("acip: %s\n", message(status)), std::exit(1);
}

void* allocate(size_t bytes) {
    void* at = nullptr;
    expect(cudaMalloc(&at, bytes));
    return at;
}

// Random numbers: bfloat16 of sizes from 1/512 to 1/128, or any integers.
class Numbers {
    std::vector<uint16_t> floats = std::vector<uint16_t>(1 << 20), bytes = floats;

public:
    Numbers() {
        std::mt19937 random(0);
        for (uint16_t& one : floats) one = uint16_t((random() & 0x807f) | (0x3b00 + (random() & 0x80)));
        for (uint16_t& one : bytes) one = uint16_t(random());
    }
    void* make(size_t n, bool integers = false) const {
        char* at = static_cast<char*>(allocate(n));
        const auto& from = integers ? bytes : floats;
        for (size_t i = 0; i < n; i += 2 * from.size())
            expect(cudaMemcpy(at + i, from.data(), std::min(n - i, 2 * from.size()), cudaMemcpyHostToDevice));
        return at;
    }
};

struct Shape {
    int64_t out, in;
};

struct Group {
    std::string name;
    Mode mode;
    Form form;
    std::vector<Shape> shapes;
};

class Problems {
    const Numbers& numbers;
    std::vector<void*> made;

public:
    explicit Problems(const Numbers& numbers) : numbers(numbers) {}
    ~Problems() {
        for (void* one : made) cudaFree(one);
    }
    size_t bytes = 0;
    std::vector<std::vector<Layer>> layers;
    Problem problem{};
    void* workspace = nullptr;
    size_t workspace_bytes = 0;

    void* keep(void* at) { return made.push_back(at), at; }

    Matrix matrix(Number type, int64_t rows, int64_t cols) {
        int64_t stride = type == Number::bf16 ? 2 * cols : type == Number::i8 ? cols : (cols + 63) / 64 * 32;
        Matrix m{type, keep(numbers.make(rows * stride, type != Number::bf16)), rows, cols, stride, nullptr, nullptr, 0};
        bytes += rows * stride;
        if (type == Number::i8) {
            std::vector<float> scales(rows, 1e-4f);
            m.scales = keep(allocate(4 * rows)), bytes += 4 * rows;
            expect(cudaMemcpy(const_cast<void*>(m.scales), scales.data(), 4 * rows, cudaMemcpyHostToDevice));
        } else if (type == Number::i4) {
            int64_t groups = (cols + 63) / 64;
            m.scales = keep(numbers.make(2 * rows * groups)), m.group = 64;
            std::vector<uint8_t> zeros(rows * groups, 7);
            void* at = keep(allocate(rows * groups));
            expect(cudaMemcpy(at, zeros.data(), rows * groups, cudaMemcpyHostToDevice));
            m.zeros = static_cast<uint8_t*>(at), bytes += 3 * rows * groups;
        }
        return m;
    }

    // Where a pivoted layer's outputs go: a permutation, of which neither part is in order.
    static void* places(int64_t out) {
        std::vector<int32_t> place(out);
        for (int64_t i = 0; i < out; ++i) place[i] = int32_t(i * 5 % out);
        if (out % 5 == 0) std::printf("not a permutation\n"), std::exit(1);
        void* at = allocate(4 * out);
        expect(cudaMemcpy(at, place.data(), 4 * out, cudaMemcpyHostToDevice));
        return at;
    }

    // `copies` of a group's weights; with none, as many as are `least` bytes together.
    void make(const Group& group, Number type, int64_t tokens, const Device& device, size_t least, int copies = 0) {
        size_t of_one = 0;
        for (int i = 0; copies ? i < copies : i == 0 || (size_t(i) * of_one < least && i < 64); ++i) {
            bytes = 0;
            std::vector<Layer> some;
            for (const Shape& shape : group.shapes) {
                const double both = double(shape.out + shape.in), half = double(shape.out) * double(shape.in) / 2;
                const bool pivoted = group.form == Form::pivoted;
                const double most = pivoted ? (both - std::sqrt(both * both - 4 * half)) / 2 : half / both;
                int64_t rank = std::max<int64_t>(16, int64_t(most) / 64 * 64);
                Layer layer{};
                layer.form = group.form;
                layer.first = matrix(type, group.form == Form::dense ? shape.out : rank, shape.in);
                if (group.form == Form::factors) layer.second = matrix(type, shape.out, rank);
                if (group.form == Form::pivoted) {
                    layer.second = matrix(type, shape.out - rank, rank);
                    layer.place = static_cast<const int32_t*>(keep(places(shape.out)));
                }
                some.push_back(layer);
            }
            layers.push_back(some), of_one = bytes;
        }
        int64_t width = 0;
        for (const Shape& shape : group.shapes) width += shape.out;
        if (group.mode != Mode::concatenate) width = group.shapes.back().out;
        const int64_t in = group.shapes[0].in;
        problem = {Number::bf16, group.mode, layers[0].data(), int(layers[0].size()), keep(numbers.make(2 * tokens * in)),
                   keep(allocate(2 * tokens * width)), in, width, tokens};
        expect(cuda::workspace_bytes(problem, device, &workspace_bytes));
        workspace = keep(allocate(std::max<size_t>(workspace_bytes, 256)));
    }

    Status call(size_t number, const Device& device, cudaStream_t stream, const Choices& choices) {
        problem.layers = layers[number].data();
        return decode(problem, device, workspace, workspace_bytes, stream, choices);
    }
};

// Of one call.
double seconds(Problems& problems, const Device& device, cudaStream_t stream, const Choices& choices, int repeat = 1) {
    expect(problems.call(0, device, stream, choices));  // loads the kernel
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    cudaEvent_t begin, end;
    expect(cudaEventCreate(&begin)), expect(cudaEventCreate(&end));
    expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    const size_t calls = problems.layers.size() * repeat;
    for (size_t i = 0; i < calls; ++i) expect(problems.call(i % problems.layers.size(), device, stream, choices));
    expect(cudaStreamEndCapture(stream, &graph));
    expect(cudaGraphInstantiate(&replay, graph, 0));
    std::vector<double> found;
    for (int i = 0; i < 23; ++i) {
        expect(cudaEventRecord(begin, stream)), expect(cudaGraphLaunch(replay, stream));
        expect(cudaEventRecord(end, stream)), expect(cudaEventSynchronize(end));
        float milliseconds = 0;
        expect(cudaEventElapsedTime(&milliseconds, begin, end));
        if (i >= 3) found.push_back(milliseconds / 1e3 / double(calls));
    }
    expect(cudaGraphExecDestroy(replay)), expect(cudaGraphDestroy(graph));
    expect(cudaEventDestroy(begin)), expect(cudaEventDestroy(end));
    std::nth_element(found.begin(), found.begin() + found.size() / 2, found.end());
    return found[found.size() / 2];
}

double copy_rate(const Numbers& numbers, cudaStream_t stream) {
    const size_t n = size_t(1) << 30;
    void *from = numbers.make(n), *to = allocate(n);
    cudaEvent_t begin, end;
    expect(cudaEventCreate(&begin)), expect(cudaEventCreate(&end));
    double best = 0;
    for (int i = 0; i < 10; ++i) {
        expect(cudaEventRecord(begin, stream));
        expect(cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, stream));
        expect(cudaEventRecord(end, stream)), expect(cudaEventSynchronize(end));
        float milliseconds = 0;
        expect(cudaEventElapsedTime(&milliseconds, begin, end));
        best = std::max(best, 2 * double(n) / (milliseconds / 1e3));
    }
    expect(cudaFree(from)), expect(cudaFree(to)), expect(cudaEventDestroy(begin)), expect(cudaEventDestroy(end));
    return best;
}

}  // namespace

int main(int count, char**) {
    const bool once = count > 1;
    Device device;
    if (describe(0, &device) != Status::ok) return std::printf("no GPU\n"), 2;
    int cache = 0;
    expect(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, 0));
    cudaStream_t stream;
    expect(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const Numbers numbers;
    const Group groups[] = {
        {"o", Mode::concatenate, Form::factors, {{4096, 4096}}},
        {"o, pivoted", Mode::concatenate, Form::pivoted, {{4096, 4096}}},
        {"q/k/v", Mode::concatenate, Form::factors, {{4096, 4096}, {1024, 4096}, {1024, 4096}}},
        {"gate/up", Mode::swiglu, Form::factors, {{14336, 4096}, {14336, 4096}}},
        {"MLP", Mode::gated_mlp, Form::factors, {{14336, 4096}, {14336, 4096}, {4096, 14336}}},
    };
    const struct {
        const char* name;
        Number type;
    } weights[] = {{"bfloat16", Number::bf16}, {"int8", Number::i8}, {"int4", Number::i4}};
    const struct {
        const char* name;
        Launch launch;
    } launches[] = {{"cooperative", Launch::cooperative}, {"dependent", Launch::dependent}};

    if (!once) {
        std::printf("copy: %.6g\n", copy_rate(numbers, stream));
        // Of next to no weights: one stage of 4096 rows of 64 columns, and one of 16 rows before it.
        const Group one{"", Mode::concatenate, Form::dense, {{4096, 64}}}, two{"", Mode::concatenate, Form::factors, {{4096, 64}}};
        Problems single(numbers), both(numbers);
        single.make(one, Number::bf16, 1, device, 0, 1), both.make(two, Number::bf16, 1, device, 0, 1);
        for (auto& launch : launches) {
            Choices choices{launch.launch};
            double difference = seconds(both, device, stream, choices, 50) - seconds(single, device, stream, choices, 50);
            std::printf("barrier: %s %.4g\n", launch.name, difference);
        }
    }
    for (const Group& group : groups)
        for (auto& weight : weights)
            for (int64_t tokens : {1, 16}) {
                Problems problems(numbers);
                problems.make(group, weight.type, tokens, device, 3 * size_t(cache), once ? 1 : 0);
                if (once) {
                    expect(problems.call(0, device, stream, Choices{Launch::cooperative}));
                    std::printf("once: %s %s %lld %zu\n", group.name.c_str(), weight.name, (long long)tokens, problems.bytes);
                    continue;
                }
                for (auto& launch : launches)
                    for (Copies copies : {Copies::bulk, Copies::threads}) {
                        if (copies == Copies::threads && !device.dependent) continue;  // there are no others
                        Choices choices{launch.launch, 0, 0, copies};
                        std::printf("time: %s %s %lld %s %s %zu %.6g\n", group.name.c_str(), weight.name, (long long)tokens,
                                    launch.name, copies == Copies::bulk && device.dependent ? "bulk" : "threads",
                                    problems.bytes, seconds(problems, device, stream, choices));
                        std::fflush(stdout);
                    }
            }
    expect(cudaStreamSynchronize(stream));
    return 0;
}
