// How the CUDA kernels would lay out bfloat16 problems, for bench/cuda_builds.py: no GPU is asked.
//
// Reads lines of "multiprocessors shared_bytes tokens mode layers", then for each layer "form out in rank kind group",
// numbers as acip_kernels/ops/fused_linear/op.py has them; prints "stages blocks slots splits shared_bytes
// workspace_bytes" for each.
#include <cstdio>

#include "acip/cuda_decode.h"

using namespace acip::cuda;

namespace {

// What is counted is sizes: addresses are never followed, and aligned.
acip::Matrix matrix(long long rows, long long cols, int kind, int group) {
    const void* somewhere = reinterpret_cast<const void*>(uintptr_t(4096));
    acip::Number type = kind == 0 ? acip::Number::bf16 : kind == 1 ? acip::Number::i8 : acip::Number::i4;
    long long stride = kind == 0 ? 2 * cols : kind == 1 ? cols : (cols + 63) / 64 * 32;
    const uint8_t* zeros = kind == 3 ? static_cast<const uint8_t*>(somewhere) : nullptr;
    return {type, somewhere, rows, cols, stride, kind ? somewhere : nullptr, zeros, group};
}

}  // namespace

int main() {
    int multiprocessors, tokens, mode, count;
    long long shared;
    while (std::scanf("%d %lld %d %d %d", &multiprocessors, &shared, &tokens, &mode, &count) == 5) {
        Layer layers[kMostSiblings] = {};
        long long inputs = 0, width = 0;
        for (int i = 0; i < count && i < kMostSiblings; ++i) {
            int form, kind, group;
            long long out, in, rank;
            if (std::scanf("%d %lld %lld %lld %d %d", &form, &out, &in, &rank, &kind, &group) != 6) return 1;
            layers[i].form = Form(form);
            layers[i].first = matrix(form ? rank : out, in, kind, group);
            if (form) layers[i].second = matrix(form == 2 ? out - rank : out, rank, kind, group);
            layers[i].place = form == 2 ? reinterpret_cast<const int32_t*>(uintptr_t(4096)) : nullptr;
            if (i == 0) inputs = in;
            width += out;
        }
        Problem problem{acip::Number::bf16, Mode(mode), layers, count, nullptr, nullptr, inputs, width, tokens};
        Schedule s{};
        Status status = schedule(problem, {multiprocessors, size_t(shared), true}, Choices(), &s);
        if (status == Status::ok)
            std::printf("%d %d %d %d %zu %zu\n", s.stages, s.blocks, s.slots, s.splits, s.shared_bytes,
                        s.workspace_bytes);
        else
            std::printf("%s\n", message(status));
    }
    return 0;
}
