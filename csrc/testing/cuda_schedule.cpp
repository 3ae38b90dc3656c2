// How the CUDA kernels would lay out bfloat16 problems, for bench/cuda_builds.py: no GPU is asked.
//
// Reads lines of "multiprocessors shared_bytes tokens mode layers", then for each layer "form out in rank kind group",
// numbers as acip_kernels/ops/fused_linear/op.py has them; prints "stages blocks slots splits shared_bytes
// workspace_bytes uneven" for each. uneven: how many times its share of the weights the busiest block of each stage
// reads, over all stages. Every task has to be one block's, which is checked.
#include <cstdio>

#include "../cuda/decode.cu"

using namespace acip::cuda;

namespace {

// What is counted is sizes: addresses are never followed, and aligned.
acip::Matrix weight(long long rows, long long cols, int kind, int group) {
    const void* somewhere = reinterpret_cast<const void*>(uintptr_t(4096));
    acip::Number type = kind == 0 ? acip::Number::bf16 : kind == 1 ? acip::Number::i8 : acip::Number::i4;
    long long stride = kind == 0 ? 2 * cols : kind == 1 ? cols : (cols + 63) / 64 * 32;
    const uint8_t* zeros = kind == 3 ? static_cast<const uint8_t*>(somewhere) : nullptr;
    return {type, somewhere, rows, cols, stride, kind ? somewhere : nullptr, zeros, group};
}

// 0 if a task is nobody's or two blocks'.
double uneven(const Problem& problem, const Device& device) {
    Job job;
    Schedule plan{};
    if (build(problem, device, Choices(), nullptr, &job, &plan) != Status::ok) return 0;
    double busiest = 0, all = 0;
    for (int stage = 0; stage < plan.stages; ++stage) {
        const Stage& about = job.stages[stage];
        int tasks = 0;
        for (int i = 0; i < about.count; ++i) tasks += job.products[about.first + i].tasks;
        if (first_task(job, stage, 0) != 0 || first_task(job, stage, plan.blocks) != tasks) return 0;
        double most = 0;
        for (int block = 0; block < plan.blocks; ++block) {
            int end = first_task(job, stage, block + 1);
            if (end < first_task(job, stage, block)) return 0;
            double bytes = 0;
            for (int task = first_task(job, stage, block); task < end; ++task)
                for (int part = 0; part < about.parts; ++part) {
                    const Task at = task_of(job, stage, task, part);
                    const Product& p = job.products[at.product];
                    int chunks = min((at.split + 1) * p.span, p.chunks) - at.split * p.span;
                    if (at.row < 0 || at.row >= p.rows || (chunks < 1 && p.from == From::weights)) return 0;
                    if (p.from == From::weights)
                        bytes += double(min(kRows, p.rows - at.row)) * p.row_bytes * chunks / p.chunks;
                }
            most = bytes > most ? bytes : most, all += bytes;
        }
        busiest += most * plan.blocks;
    }
    return busiest / all;
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
            layers[i].first = weight(form ? rank : out, in, kind, group);
            if (form) layers[i].second = weight(form == 2 ? out - rank : out, rank, kind, group);
            layers[i].place = form == 2 ? reinterpret_cast<const int32_t*>(uintptr_t(4096)) : nullptr;
            if (i == 0) inputs = in;
            width += out;
        }
        Problem problem{acip::Number::bf16, Mode(mode), layers, count, nullptr, nullptr, inputs, width, tokens};
        Schedule s{};
        const Device device{multiprocessors, size_t(shared), true};
        Status status = schedule(problem, device, Choices(), &s);
        if (status == Status::ok)
            std::printf("%d %d %d %d %zu %zu %.4f\n", s.stages, s.blocks, s.slots, s.splits, s.shared_bytes,
                        s.workspace_bytes, uneven(problem, device));
        else
            std::printf("%s\n", message(status));
    }
    return 0;
}
