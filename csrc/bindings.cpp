// The kernels as torch operators: checks, outputs, torch's threads. The only file that includes torch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "acip/training.h"

namespace {

using at::Tensor;

const acip::Training* chosen = acip::training(nullptr);

acip::Dtype dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kFloat: return acip::Dtype::f32;
        case at::kDouble: return acip::Dtype::f64;
        case at::kBFloat16: return acip::Dtype::bf16;
        default: TORCH_CHECK(false, "acip native kernels take float32, float64 or bfloat16, got ", tensor.dtype());
    }
}

at::ScalarType precise(const Tensor& tensor) { return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_rows(const Tensor& tensor, const char* name) {
    TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU");
    TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1), name,
                " must be a matrix with contiguous rows, got sizes ", tensor.sizes(), " and strides ", tensor.strides());
}

void check_per_rank(const Tensor& s, const Tensor& z) {
    TORCH_CHECK(s.device().is_cpu() && s.dim() == 1 && s.size(0) == z.size(1) && s.is_contiguous() &&
                    s.scalar_type() == precise(z),
                "s must be contiguous [", z.size(1), "] of ", precise(z));
}

// Enough elements for a thread to be worth waking: about 10 microseconds of work.
constexpr int64_t kGrain = 32768;

Tensor scale_ranks(const Tensor& z, const Tensor& s) {
    check_rows(z, "z");
    check_per_rank(s, z);
    auto dtype = dtype_of(z);
    Tensor out = at::empty({z.size(0), z.size(1)}, z.options());
    int64_t rank = z.size(1), rows = z.size(0);
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(rank, 1)), [&](int64_t begin, int64_t end) {
        chosen->scale_ranks(dtype, z.const_data_ptr(), z.stride(0), out.mutable_data_ptr(), rank, rank,
                            s.const_data_ptr(), begin, end);
    });
    return out;
}

// h becomes h ⊙ s; returns Σ_tokens z ⊙ h of the h before.
Tensor mask_gradient_(const Tensor& z, Tensor h, const Tensor& s) {
    check_rows(z, "z");
    check_rows(h, "h");
    check_per_rank(s, z);
    TORCH_CHECK(h.sizes() == z.sizes() && h.scalar_type() == z.scalar_type(), "h must be as z, got ", h.sizes());
    auto dtype = dtype_of(z);
    int64_t rank = z.size(1), tokens = z.size(0);
    Tensor sum = at::empty({rank}, s.options());
    // Whole cache lines of columns to a thread; every column is summed by one thread, in one order.
    int64_t blocks = (rank + 31) / 32, grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(tokens * 32, 1));
    at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
        chosen->mask_gradient(dtype, z.const_data_ptr(), z.stride(0), h.mutable_data_ptr(), h.stride(0), tokens,
                              s.const_data_ptr(), sum.mutable_data_ptr(), begin * 32, std::min(end * 32, rank));
    });
    return sum;
}

void run_dropout(const Tensor& x, const Tensor& out, bool add, int64_t seed, int64_t threshold, double scale) {
    TORCH_CHECK(x.device().is_cpu() && out.device().is_cpu(), "dropout: tensors must be on the CPU");
    TORCH_CHECK(x.is_contiguous() && out.is_contiguous() && x.sizes() == out.sizes() &&
                    x.scalar_type() == out.scalar_type(),
                "dropout: x and out must be contiguous and alike");
    TORCH_CHECK(threshold >= 0 && threshold < (int64_t(1) << 32), "dropout: threshold must fit in 32 bits");
    auto dtype = dtype_of(x);
    at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
        chosen->dropout(dtype, x.const_data_ptr(), out.mutable_data_ptr(), add, uint64_t(seed), uint32_t(threshold),
                        scale, begin, end);
    });
}

Tensor dropout(const Tensor& x, int64_t seed, int64_t threshold, double scale) {
    Tensor out = at::empty(x.sizes(), x.options());
    run_dropout(x, out, false, seed, threshold, scale);
    return out;
}

void dropout_add_(Tensor out, const Tensor& x, int64_t seed, int64_t threshold, double scale) {
    run_dropout(x, out, true, seed, threshold, scale);
}

Tensor cross_entropy_(Tensor logits, const Tensor& labels, int64_t ignore, double grad_scale) {
    check_rows(logits, "logits");
    TORCH_CHECK(logits.is_contiguous(), "logits must be contiguous");
    TORCH_CHECK(labels.scalar_type() == at::kLong && labels.is_contiguous() && labels.dim() == 1 &&
                    labels.device().is_cpu() && labels.size(0) == logits.size(0),
                "labels must be contiguous int64 [", logits.size(0), "] on the CPU");
    int64_t rows = logits.size(0), classes = logits.size(1);
    TORCH_CHECK(classes > 0 || rows == 0, "logits must have classes");
    const int64_t* label = labels.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < rows; ++row)
        TORCH_CHECK(label[row] == ignore || (label[row] >= 0 && label[row] < classes), "label ", label[row],
                    " is outside the ", classes, " classes");
    auto dtype = dtype_of(logits);
    Tensor loss = at::empty({rows}, logits.options().dtype(precise(logits)));
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        chosen->cross_entropy(dtype, logits.mutable_data_ptr(), classes, label, ignore, grad_scale,
                              loss.mutable_data_ptr(), begin, end);
    });
    return loss;
}

// What both softmax kernels take: [batch, rows, keys], the rows of a batch a multiple of `block`.
void check_scores(const Tensor& scores, int64_t block, const char* name) {
    TORCH_CHECK(scores.device().is_cpu() && scores.dim() == 3 && scores.is_contiguous(), name,
                " must be contiguous [batch, rows, keys] on the CPU");
    TORCH_CHECK(block > 0 && scores.size(1) % block == 0 && block <= scores.size(2), "block ", block,
                " must divide the rows and not exceed the keys of ", name, " ", scores.sizes());
}

// scores become probabilities; returns the logarithms of the sums, or takes them.
Tensor causal_softmax_(Tensor scores, int64_t block, double scale, const std::optional<Tensor>& log_sums) {
    check_scores(scores, block, "scores");
    auto dtype = dtype_of(scores);
    int64_t rows = scores.size(0) * scores.size(1), keys = scores.size(2);
    Tensor sums = log_sums ? *log_sums
                           : at::empty({scores.size(0), scores.size(1)}, scores.options().dtype(precise(scores)));
    TORCH_CHECK(sums.is_contiguous() && sums.numel() == rows && sums.scalar_type() == precise(scores),
                "log_sums must be contiguous, ", rows, " of ", precise(scores));
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / 8 / std::max<int64_t>(keys, 1)),
                     [&](int64_t begin, int64_t end) {
                         chosen->causal_softmax(dtype, scores.mutable_data_ptr(), keys, keys, block, scale,
                                                sums.mutable_data_ptr(), log_sums.has_value(), begin, end);
                     });
    return sums;
}

void softmax_gradient_(Tensor dp, const Tensor& p, int64_t block, double scale) {
    check_scores(dp, block, "dp");
    TORCH_CHECK(p.device().is_cpu() && p.is_contiguous() && p.sizes() == dp.sizes() &&
                    p.scalar_type() == dp.scalar_type(),
                "p must be as dp");
    auto dtype = dtype_of(dp);
    int64_t rows = dp.size(0) * dp.size(1), keys = dp.size(2);
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / 4 / std::max<int64_t>(keys, 1)),
                     [&](int64_t begin, int64_t end) {
                         chosen->softmax_gradient(dtype, dp.mutable_data_ptr(), p.const_data_ptr(), keys, keys, block,
                                                  scale, begin, end);
                     });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acip, m) {
    m.def("scale_ranks(Tensor z, Tensor s) -> Tensor");
    m.def("mask_gradient_(Tensor z, Tensor(a!) h, Tensor s) -> Tensor");
    m.def("dropout(Tensor x, int seed, int threshold, float scale) -> Tensor");
    m.def("dropout_add_(Tensor(a!) out, Tensor x, int seed, int threshold, float scale) -> ()");
    m.def("cross_entropy_(Tensor(a!) logits, Tensor labels, int ignore, float grad_scale) -> Tensor");
    m.def("causal_softmax_(Tensor(a!) scores, int block, float scale, Tensor? log_sums) -> Tensor");
    m.def("softmax_gradient_(Tensor(a!) dp, Tensor p, int block, float scale) -> ()");
}

TORCH_LIBRARY_IMPL(acip, CPU, m) {
    m.impl("scale_ranks", scale_ranks);
    m.impl("mask_gradient_", mask_gradient_);
    m.impl("dropout", dropout);
    m.impl("dropout_add_", dropout_add_);
    m.impl("cross_entropy_", cross_entropy_);
    m.impl("causal_softmax_", causal_softmax_);
    m.impl("softmax_gradient_", softmax_gradient_);
}

PYBIND11_MODULE(_native, m) {
    m.doc() = "acip_kernels' native kernels; importing it registers them with torch.";
    m.def("isa", [] { return std::string(chosen->name); }, "The instruction set in use.");
    m.def(
        "use_isa",
        [](const std::string& name) {
            const acip::Training* wanted = acip::training(name.empty() ? nullptr : name.c_str());
            if (!wanted) throw pybind11::value_error("this processor or this build has no kernels for " + name);
            chosen = wanted;
        },
        pybind11::arg("name") = "", "Run the kernels of this instruction set; nothing for the best one (for tests).");
}
