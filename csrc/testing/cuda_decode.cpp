// The CUDA kernels of deployed layers on the CPU, under the execution shim and the sanitizers, on arrays of exactly the
// size that they may touch; results are compared with sums in double. Prints what was asked of global memory against
// what there is of weights, and "N mistakes"; returns 1 if there was one. With an argument only a few of the problems.
// Built and run by tests/test_cuda_kernels.py.
#include <cmath>
#include <cstdio>
#include <random>

#include "acip/cuda_decode.h"
#include "gpu_shim.h"

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

// An array that lies alone on the heap, ends where it does, and is known to the shim by its kind.
struct Memory {
    std::unique_ptr<unsigned char[]> bytes;
    size_t n = 0;
    Memory() = default;
    Memory(size_t n, const char* name, bool writable) : bytes(new unsigned char[n]), n(n) {
        std::memset(bytes.get(), 0xff, n);  // NaN
        shim::add_array(bytes.get(), n, name, writable);
    }
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(bytes.get());
    }
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
        matrix = {type, data.bytes.get(), rows, cols, width, scales.bytes.get(), zeros.as<uint8_t>(), group};
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
    } layers[3];
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

// Runs a case with every one of `choices`; all must agree to the bit where their splits do.
void run(const Case& about, int64_t tokens, const std::vector<Choices>& choices, const Device& gpu,
         bool print = false) {
    shim::arrays.clear();
    std::vector<Made> made;
    std::vector<Layer> layers;
    size_t weights = 0, row_scales = 0;
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
        layers.push_back({one.form, one.first->matrix, one.second ? one.second->matrix : Matrix{}, one.s.as<float>(),
                          one.bias.bytes.get(), one.place.as<int32_t>()});
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
    for (const Choices& choice : choices) {
        Problem problem{about.activation, about.mode, layers.data(), about.count, x.bytes.get(), nullptr,
                        about.in, width, tokens};
        Schedule plan{};
        Status status = schedule(problem, gpu, choice, &plan);
        if (status != Status::ok) {
            mistake(message(status));
            continue;
        }
        Memory y(2 * tokens * width, "y", true);
        problem.y = y.bytes.get();
        // Aligned as an allocator of a GPU's memory does it.
        std::unique_ptr<unsigned char[]> heap(new unsigned char[plan.workspace_bytes + 256]);
        auto address = reinterpret_cast<uintptr_t>(heap.get());
        unsigned char* workspace = heap.get() + (256 - address % 256) % 256;
        std::memset(workspace, 0xff, plan.workspace_bytes);
        shim::add_array(workspace, plan.workspace_bytes, "workspace", true);
        for (auto& entry : shim::arrays) entry.second.loaded = entry.second.stored = 0;
        device::kBulk = choice.launch != Launch::dependent;  // and `cp.async` else
        status = decode(problem, gpu, workspace, plan.workspace_bytes, nullptr, choice);
        if (status != Status::ok) mistake(std::string("decode: ") + message(status));
        for (auto& text : shim::reports) mistake(text);
        shim::reports.clear();
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t j = 0; j < width; ++j) {
                double value = value_of(about.activation, y.as<uint16_t>()[t * width + j]);
                Value& want = wanted[t][j];
                if (!(std::abs(value - want.value) <= want.error))
                    mistake("output " + std::to_string(j) + " of token " + std::to_string(t) + ": " +
                            std::to_string(value) + ", not " + std::to_string(want.value));
            }
        std::vector<unsigned char> output(y.bytes.get(), y.bytes.get() + y.n);
        auto& first = seen[plan.splits];
        if (first.empty()) first = output;
        if (first != output) mistake("a rerun differs");
        size_t of_weights = 0, others = 0;
        for (auto& entry : shim::arrays)
            (entry.second.name == "weights" ? of_weights : others) += entry.second.loaded + entry.second.stored;
        // An 8-bit row's scale is read for each split of the row.
        if (of_weights > 1.02 * weights + (plan.splits - 1) * row_scales || of_weights < weights)
            mistake(std::to_string(of_weights) + " bytes of weights were read, of " + std::to_string(weights));
        if (print)
            std::printf("bytes: %zu weights, %zu read, %zu others, %d stages, %d blocks, %d slots, %d splits\n",
                        weights, of_weights, others, plan.stages, plan.blocks, plan.slots, plan.splits);
        shim::arrays.erase(reinterpret_cast<const char*>(y.bytes.get()) + y.n);
        shim::arrays.erase(reinterpret_cast<const char*>(workspace) + plan.workspace_bytes);
    }
}

}  // namespace

int main(int count, char**) {
    const bool quick = count > 1;
    constexpr Form kDense = Form::dense, kFactors = Form::factors, kPivoted = Form::pivoted;
    constexpr Number kI8 = Number::i8, kI4 = Number::i4;
    const Choices once{}, again{Launch::dependent, 0, 0}, split{Launch::cooperative, 3, 2};
    const Device gpu{3, 163 << 10, true};
    for (Number x : {Number::bf16, Number::f16}) {
        if (quick && x == Number::f16) break;
        const Case cases[] = {
            {x, Mode::concatenate, 200, {{kFactors, 50, 24, x, 0, false, true, true}}, 1},
            {x, Mode::concatenate, 33, {{kFactors, 17, 5, x, 0, false, false, true}}, 1},
            {x, Mode::concatenate, 1, {{kFactors, 1, 1, x, 0, false, true, false}}, 1},
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
                shim::backwards = tokens == 2;
                run(one, tokens, {once, again, split}, gpu);
            }
    }
    // On a GPU that others use too: the other form, and an error for who asked for this one by name.
    device::refuse_cooperative = true;
    const Case plain{Number::bf16, Mode::concatenate, 64, {{kFactors, 32, 16, Number::bf16, 0, false, true, true}}, 1};
    run(plain, 1, {once}, gpu);
    device::refuse_cooperative = false;
    if (quick) return std::printf("%d mistakes\n", mistakes), mistakes != 0;
    // What is asked of memory at sizes that are more like a model's.
    const Case larger[] = {
        {Number::bf16, Mode::concatenate, 1024, {{kFactors, 1024, 256, Number::bf16, 0, false, true, false}}, 1},
        {Number::bf16, Mode::concatenate, 1024, {{kFactors, 1024, 256, kI8, 0, false, true, false}}, 1},
        {Number::bf16, Mode::concatenate, 1024, {{kFactors, 1024, 256, kI4, 64, true, true, false}}, 1},
    };
    for (const Case& one : larger)
        for (int64_t tokens : {1, 16}) run(one, tokens, {once}, gpu, true);
    std::printf("%d mistakes\n", mistakes);
    return mistakes != 0;
}
