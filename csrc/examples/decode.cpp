// The CUDA kernels in a program without torch: one low-rank layer, y = ((x Vhᵀ) ⊙ s) Uᵀ, for one token in bfloat16.
//
//   nvcc -std=c++17 -O3 -I csrc/include -arch=native csrc/cuda/decode.cu csrc/examples/decode.cpp -o decode && ./decode
//
// (Or, to compile where there is no GPU, -gencode arch=compute_90a,code=sm_90a in place of -arch=native.)
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "acip/cuda_decode.h"

namespace {

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
float of_bf16(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

bool good(cudaError_t error) {
    if (error != cudaSuccess) std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    return error == cudaSuccess;
}
bool good(acip::cuda::Status status) {
    if (status != acip::cuda::Status::ok) std::fprintf(stderr, "acip: %s\n", acip::cuda::message(status));
    return status == acip::cuda::Status::ok;
}

// Numbers that are the same at every run, in bfloat16, here and on the GPU.
struct Numbers {
    std::vector<uint16_t> host;
    void* device = nullptr;
    bool fill(size_t n, unsigned seed) {
        host.resize(n);
        for (uint16_t& one : host) {
            seed = seed * 1664525u + 1013904223u;
            one = to_bf16(float(seed >> 8) / float(1 << 23) - 1.0f);
        }
        return good(cudaMalloc(&device, 2 * n)) && good(cudaMemcpy(device, host.data(), 2 * n, cudaMemcpyHostToDevice));
    }
    float operator[](size_t i) const { return of_bf16(host[i]); }
};

}  // namespace

int main() {
    using namespace acip::cuda;
    constexpr int64_t kIn = 4096, kOut = 4096, kRank = 1024;
    Device device;
    if (!good(describe(0, &device))) return 2;
    Numbers x, Vh, U;
    if (!x.fill(kIn, 1) || !Vh.fill(kRank * kIn, 2) || !U.fill(kOut * kRank, 3)) return 1;

    Layer layer{};
    layer.form = Form::factors;
    layer.first = {acip::Number::bf16, Vh.device, kRank, kIn, 2 * kIn, nullptr, nullptr, 0};
    layer.second = {acip::Number::bf16, U.device, kOut, kRank, 2 * kRank, nullptr, nullptr, 0};
    Problem problem{};
    problem.activation = acip::Number::bf16, problem.mode = Mode::concatenate;
    problem.layers = &layer, problem.count = 1, problem.tokens = 1;
    problem.x = x.device, problem.x_stride = kIn, problem.y_stride = kOut;
    // Memory is the caller's, and asked for once; a call allocates nothing.
    size_t bytes = 0;
    void* workspace = nullptr;
    if (!good(workspace_bytes(problem, device, &bytes)) || !good(cudaMalloc(&workspace, bytes)) ||
        !good(cudaMalloc(&problem.y, 2 * kOut)))
        return 1;
    cudaStream_t stream;
    if (!good(cudaStreamCreate(&stream)) || !good(decode(problem, device, workspace, bytes, stream))) return 1;
    std::vector<uint16_t> y(kOut);
    if (!good(cudaStreamSynchronize(stream)) ||
        !good(cudaMemcpy(y.data(), problem.y, 2 * kOut, cudaMemcpyDeviceToHost)))
        return 1;

    double worst = 0;
    std::vector<double> z(kRank);
    for (int64_t r = 0; r < kRank; ++r) {
        for (int64_t j = 0; j < kIn; ++j) z[r] += double(x[j]) * Vh[r * kIn + j];
        z[r] = of_bf16(to_bf16(float(z[r])));
    }
    for (int64_t i = 0; i < kOut; ++i) {
        double sum = 0, size = 0;
        for (int64_t r = 0; r < kRank; ++r) sum += z[r] * U[i * kRank + r], size += std::abs(z[r] * U[i * kRank + r]);
        worst = std::fmax(worst, std::abs(of_bf16(y[i]) - sum) / size);
    }
    std::printf("the largest error is %.2g of the sum of absolute values\n", worst);
    return worst < 1.0 / 128 ? 0 : 1;
}
