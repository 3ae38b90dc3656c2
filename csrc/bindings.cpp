// The kernels as torch operators: checks, outputs, torch's threads.
#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <torch/version.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "acip/decode.h"
#include "acip/operators.h"
#include "acip/prepared.h"
#include "acip/training.h"

namespace {

using at::Tensor;

const acip::Training* chosen = acip::training(nullptr);
const acip::Decode* decode = acip::decode(nullptr);

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
    TORCH_CHECK(threshold >= 0 && threshold < (int64_t(1) << 16), "dropout: threshold must fit in 16 bits");
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

// Of contiguous logits [rows, classes]: the labels of their rows. Those of `ignore`, if there is one, may be anything.
const int64_t* check_labels(const Tensor& logits, const Tensor& labels, std::optional<int64_t> ignore) {
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
    return label;
}

Tensor cross_entropy_(Tensor logits, const Tensor& labels, int64_t ignore, double grad_scale) {
    const int64_t* label = check_labels(logits, labels, ignore);
    int64_t rows = logits.size(0), classes = logits.size(1);
    auto dtype = dtype_of(logits);
    Tensor loss = at::empty({rows}, logits.options().dtype(precise(logits)));
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        chosen->cross_entropy(dtype, logits.mutable_data_ptr(), classes, label, ignore, grad_scale,
                              loss.mutable_data_ptr(), begin, end);
    });
    return loss;
}

Tensor soft_cross_entropy_(Tensor logits, const Tensor& teacher, const Tensor& labels, double weight) {
    const int64_t* label = check_labels(logits, labels, std::nullopt);
    TORCH_CHECK(teacher.device().is_cpu() && teacher.scalar_type() == logits.scalar_type() && teacher.is_contiguous() &&
                    teacher.sizes() == logits.sizes(),
                "teacher must be contiguous ", logits.scalar_type(), " ", logits.sizes(), " on the CPU, got ",
                teacher.scalar_type(), " ", teacher.sizes());
    // Its rows are read after the logits' have been written.
    at::assert_no_overlap(logits, teacher);
    int64_t rows = logits.size(0), classes = logits.size(1);
    auto dtype = dtype_of(logits);
    Tensor loss = at::empty({rows}, logits.options().dtype(precise(logits)));
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        chosen->soft_cross_entropy(dtype, logits.mutable_data_ptr(), teacher.const_data_ptr(), classes, label, weight,
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

// ---- norms and gated activations: composite operators, whose gradient is a node of torch's own engine

using torch::autograd::AutogradContext;

// A node whose backward pass torch cannot differentiate again must not be asked for that in silence.
void refuse_second_derivative(const char* name) {
    TORCH_CHECK(!at::GradMode::is_enabled(), name, " has no second derivative: create_graph must be False");
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
    static constexpr const char* name = "acip::rms_norm";

    static int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / 2 / std::max<int64_t>(width, 1)); }

    static Tensor forward(AutogradContext* context, const Tensor& given, const Tensor& weight, double eps) {
        auto dtype = dtype_of(given);
        Tensor x = given.contiguous(), scales = weight.contiguous(), y = at::empty(x.sizes(), x.options());
        int64_t width = x.size(-1), rows = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
        Tensor rstd = at::empty({rows}, x.options().dtype(precise(x)));
        at::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
            chosen->rms_norm(dtype, x.const_data_ptr(), width, scales.const_data_ptr(), eps, y.mutable_data_ptr(),
                             rstd.mutable_data_ptr(), begin, end);
        });
        context->save_for_backward({x, scales, rstd});
        return y;
    }

    static std::vector<Tensor> backward(AutogradContext* context, std::vector<Tensor> gradients) {
        refuse_second_derivative(name);
        auto saved = context->get_saved_variables();
        const Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
        Tensor g = gradients[0].contiguous(), dx = at::empty(x.sizes(), x.options());
        int64_t width = x.size(-1);
        at::parallel_for(0, rstd.numel(), grain(width), [&](int64_t begin, int64_t end) {
            chosen->rms_norm_gradient(dtype_of(x), g.const_data_ptr(), x.const_data_ptr(), width,
                                      weight.const_data_ptr(), rstd.const_data_ptr(), dx.mutable_data_ptr(), begin, end);
        });
        return {dx, Tensor(), Tensor()};
    }
};

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    TORCH_CHECK(x.device().is_cpu() && weight.device().is_cpu(), "rms_norm: tensors must be on the CPU");
    TORCH_CHECK(weight.dim() == 1 && x.dim() >= 1 && x.size(-1) == weight.size(0) &&
                    x.scalar_type() == weight.scalar_type(),
                "rms_norm: weight must be [width] in x's dtype and x [..., width], got ", weight.toString(), " ",
                weight.sizes(), " and ", x.toString(), " ", x.sizes());
    TORCH_CHECK(!(weight.requires_grad() && at::GradMode::is_enabled()), "rms_norm: there is no gradient for weight");
    return RmsNorm::apply(x, weight, eps);
}

struct Rotary : torch::autograd::Function<Rotary> {
    static constexpr const char* name = "acip::rotary";

    static Tensor run(const Tensor& given, const Tensor& cos, const Tensor& sin, bool back) {
        Tensor x = given.stride(-1) == 1 ? given : given.contiguous();
        int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), width = x.size(3);
        // By tokens, as a projection makes it: then the way back to its output is a view.
        Tensor y = at::empty({batch, tokens, heads, width}, x.options());
        auto batch_stride = [](const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : 0; };
        at::parallel_for(0, batch * tokens, std::max<int64_t>(1, kGrain / 2 / std::max<int64_t>(heads * width, 1)),
                         [&](int64_t begin, int64_t end) {
                             chosen->rotary(dtype_of(x), x.const_data_ptr(), x.strides().data(), cos.const_data_ptr(),
                                            batch_stride(cos), sin.const_data_ptr(), batch_stride(sin),
                                            y.mutable_data_ptr(), heads, tokens, width / 2, back, begin, end);
                         });
        return y.transpose(1, 2);
    }

    static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& given_cos, const Tensor& given_sin) {
        Tensor cos = given_cos.contiguous(), sin = given_sin.contiguous();
        context->save_for_backward({cos, sin});
        return run(x, cos, sin, false);
    }

    static std::vector<Tensor> backward(AutogradContext* context, std::vector<Tensor> gradients) {
        refuse_second_derivative(name);
        auto saved = context->get_saved_variables();
        return {run(gradients[0], saved[0], saved[1], true), Tensor(), Tensor()};
    }
};

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin) {
    TORCH_CHECK(x.device().is_cpu() && cos.device().is_cpu() && sin.device().is_cpu(),
                "rotary: tensors must be on the CPU");
    TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, "rotary: x must be [batch, heads, tokens, width], width even, got ",
                x.sizes());
    for (const Tensor* t : {&cos, &sin}) {
        TORCH_CHECK(t->dim() == 3 && (t->size(0) == 1 || t->size(0) == x.size(0)) && t->size(1) == x.size(2) &&
                        t->size(2) == x.size(3) && t->scalar_type() == x.scalar_type(),
                    "rotary: cos and sin must be [batch or 1, tokens, width] in x's dtype, got ", t->toString(), " ",
                    t->sizes(), " for x ", x.toString(), " ", x.sizes());
        TORCH_CHECK(!(t->requires_grad() && at::GradMode::is_enabled()), "rotary: there is no gradient for cos and sin");
    }
    dtype_of(x);  // refuses what the kernels do not take
    return Rotary::apply(x, cos, sin);
}

struct GatedSilu : torch::autograd::Function<GatedSilu> {
    static constexpr const char* name = "acip::gated_silu";

    static Tensor forward(AutogradContext* context, const Tensor& given_gate, const Tensor& given_up) {
        auto dtype = dtype_of(given_gate);
        Tensor gate = given_gate.contiguous(), up = given_up.contiguous(), y = at::empty(gate.sizes(), gate.options());
        at::parallel_for(0, gate.numel(), kGrain / 4, [&](int64_t begin, int64_t end) {
            chosen->gated_silu(dtype, gate.const_data_ptr(), up.const_data_ptr(), y.mutable_data_ptr(), begin, end);
        });
        context->save_for_backward({gate, up});
        return y;
    }

    static std::vector<Tensor> backward(AutogradContext* context, std::vector<Tensor> gradients) {
        refuse_second_derivative(name);
        auto saved = context->get_saved_variables();
        const Tensor &gate = saved[0], &up = saved[1];
        Tensor g = gradients[0].contiguous();
        Tensor dgate = at::empty(gate.sizes(), gate.options()), dup = at::empty(gate.sizes(), gate.options());
        at::parallel_for(0, gate.numel(), kGrain / 4, [&](int64_t begin, int64_t end) {
            chosen->gated_silu_gradient(dtype_of(gate), g.const_data_ptr(), gate.const_data_ptr(), up.const_data_ptr(),
                                        dgate.mutable_data_ptr(), dup.mutable_data_ptr(), begin, end);
        });
        return {dgate, dup};
    }
};

Tensor gated_silu(const Tensor& gate, const Tensor& up) {
    TORCH_CHECK(gate.device().is_cpu() && up.device().is_cpu(), "gated_silu: tensors must be on the CPU");
    TORCH_CHECK(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(),
                "gated_silu: gate and up must be alike, got ", gate.toString(), " ", gate.sizes(), " and ",
                up.toString(), " ", up.sizes());
    return GatedSilu::apply(gate, up);
}

// ---- layers of few tokens

using acip::Matrix;
using acip::Number;
using acip::Product;

// What a layer is, in `spec`: its form, whether it has an `s` and a bias, and of each of its matrices what kind it is,
// its columns and the columns of a group (of plain and 8-bit matrices 0).
enum Form : int64_t { kDense, kFactors, kPivoted };
enum Kind : int64_t { kPlain, kInt8, kInt4, kInt4WithZeros };
// What is done with the layers' outputs: laid side by side; or two layers' `silu(first) * second`; and a third's of that.
enum Mode : int64_t { kConcatenate, kSwiglu, kGatedMlp };

struct Layer {
    int64_t form, in, out, rank;  // rank: what the first matrix has as rows, where there are two
    Matrix first, second;
    // What is read, for torch's products; of quantized weights, their codes.
    const Tensor *first_tensor = nullptr, *second_tensor = nullptr, *bias_tensor = nullptr;
    const float* s;
    const void* bias;
    const int32_t* place;
};

// Reads `spec` and `tensors` one after the other, and checks all that is read: the kernels trust it.
struct Reader {
    at::IntArrayRef spec;
    at::TensorList tensors;
    at::ScalarType dtype;
    size_t number = 0, tensor = 0;
    const Tensor* weight = nullptr;  // of the last matrix

    int64_t next_number() {
        TORCH_CHECK(number < spec.size(), "fused_linear: spec ends too early, after ", spec.size(), " numbers");
        return spec[number++];
    }

    const Tensor& next_tensor(const char* what, at::ScalarType type, int64_t dimensions) {
        TORCH_CHECK(tensor < tensors.size(), "fused_linear: there are ", tensors.size(), " tensors, and no ", what);
        const Tensor& t = tensors[tensor++];
        TORCH_CHECK(t.defined() && t.device().is_cpu() && t.layout() == at::kStrided && t.scalar_type() == type &&
                        t.dim() == dimensions,
                    "fused_linear: ", what, " must be a CPU tensor of ", type, " with ", dimensions,
                    " dimensions, got ", t.defined() ? t.toString() : "none", " ", t.defined() ? t.sizes() : at::IntArrayRef());
        bool whole_rows = dimensions == 2 && t.size(1) <= 1 ? true : t.stride(dimensions - 1) == 1 || t.numel() == 0;
        TORCH_CHECK(whole_rows, "fused_linear: ", what, " must have contiguous rows, got strides ", t.strides());
        return t;
    }

    const void* next_contiguous(const char* what, at::ScalarType type, at::IntArrayRef sizes) {
        const Tensor& t = next_tensor(what, type, int64_t(sizes.size()));
        TORCH_CHECK(t.sizes() == sizes && t.is_contiguous(), "fused_linear: ", what, " must be contiguous ", sizes,
                    ", got ", t.sizes());
        return t.const_data_ptr();
    }

    Matrix next_matrix() {
        int64_t kind = next_number(), cols = next_number(), group = next_number();
        TORCH_CHECK(kind >= kPlain && kind <= kInt4WithZeros && cols >= 0, "fused_linear: no matrix is of kind ", kind,
                    " with ", cols, " columns");
        Matrix m{};
        m.cols = cols;
        int64_t width = cols;
        at::ScalarType type = dtype;
        if (kind == kPlain) {
            m.type = dtype == at::kFloat ? Number::f32 : dtype == at::kBFloat16 ? Number::bf16 : Number::f16;
        } else if (kind == kInt8) {
            m.type = Number::i8, type = at::kChar;
        } else {
            TORCH_CHECK(group == 32 || group == 64 || group == 128, "fused_linear: a group must be 32, 64 or 128, got ",
                        group);
            TORCH_CHECK(cols < (int64_t(1) << 40), "fused_linear: ", cols, " columns");
            m.type = Number::i4, type = at::kByte, width = (cols + 63) / 64 * 32;
        }
        const Tensor& data = next_tensor("a weight", type, 2);
        weight = &data;
        m.rows = data.size(0);
        TORCH_CHECK(data.size(1) == width, "fused_linear: a weight must have ", width, " columns, got ", data.sizes());
        TORCH_CHECK(m.rows <= 1 || data.stride(0) >= width, "fused_linear: rows of a weight must not overlap");
        m.data = data.const_data_ptr();
        m.stride = data.stride(0) * int64_t(data.element_size());
        m.group = group;
        if (kind == kInt8) m.scales = next_contiguous("scales", at::kFloat, {m.rows});
        if (kind >= kInt4) {
            int64_t groups = (cols + group - 1) / group;
            m.scales = next_contiguous("scales", at::kBFloat16, {m.rows, groups});
            if (kind == kInt4WithZeros)
                m.zeros = static_cast<const uint8_t*>(next_contiguous("zeros", at::kByte, {m.rows, groups}));
        }
        return m;
    }

    Layer next_layer() {
        Layer layer{};
        layer.form = next_number();
        int64_t flags = next_number();
        TORCH_CHECK(layer.form >= kDense && layer.form <= kPivoted && flags >= 0 && flags < 4,
                    "fused_linear: no layer is of form ", layer.form, " with flags ", flags);
        layer.first = next_matrix();
        layer.first_tensor = weight;
        layer.in = layer.first.cols;
        layer.out = layer.first.rows;
        if (layer.form != kDense) {
            layer.rank = layer.first.rows;
            layer.second = next_matrix();
            layer.second_tensor = weight;
            TORCH_CHECK(layer.second.cols == layer.rank, "fused_linear: the second weight must have ", layer.rank,
                        " columns, as the first has rows, got ", layer.second.cols);
            layer.out = layer.second.rows + (layer.form == kPivoted ? layer.rank : 0);
        }
        if (layer.form == kPivoted) {
            layer.place = static_cast<const int32_t*>(next_contiguous("places", at::kInt, {layer.out}));
            int32_t least = 0, most = -1;
            for (int64_t i = 0; i < layer.out; ++i) {
                least = std::min(least, layer.place[i]);
                most = std::max(most, layer.place[i]);
            }
            TORCH_CHECK(least >= 0 && most < layer.out, "fused_linear: places must be of the ", layer.out, " outputs");
        }
        if (flags & 1) {
            TORCH_CHECK(layer.form == kFactors, "fused_linear: only two factors have an s");
            layer.s = static_cast<const float*>(next_contiguous("s", at::kFloat, {layer.rank}));
        }
        if (flags & 2) {
            layer.bias = next_contiguous("a bias", dtype, {layer.out});
            layer.bias_tensor = &tensors[tensor - 1];
        }
        return layer;
    }
};

char* at_cache_line(void* memory) {
    return static_cast<char*>(memory) + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
}

// Memory between the stages: the calling thread's, kept for its next call, up to so many bytes.
constexpr int64_t kScratchKept = 4 << 20;
char* scratch(size_t bytes) {
    thread_local std::vector<char> memory;
    if (memory.size() < bytes + 64) memory.resize(bytes + 64);
    return at_cache_line(memory.data());
}

struct Stage {
    std::vector<Product> products;
    // Or, elementwise over tokens · width: the stage after gate and up.
    const void *gate = nullptr, *up = nullptr;
    void* out = nullptr;
    int64_t elements = 0;
    // Or, token by token: the stage after a pivoted layer's products.
    struct Put {
        acip::Parts parts;
        void* y;
        int64_t y_stride;
    };
    std::vector<Put> puts;

    bool is_empty() const { return products.empty() && puts.empty() && !elements; }
};

// From so many tokens on a pivoted layer's outputs are put in order together, instead of each where it belongs.
constexpr int64_t kTokensToPut = 16;

// The products of `layer` for `x`, into y (at its column 0): one in stage `at`, and more in the next two. `others`: for
// the outputs of a pivoted layer that are no pivots, contiguous; null for one by one.
void add_layer(std::vector<Stage>& stages, size_t at, const Layer& layer, const void* x, int64_t x_stride, void* y,
               int64_t y_stride, void* z, int64_t z_stride, void* others) {
    Product first{}, second{};
    first.weight = layer.first, first.x = x, first.x_stride = x_stride;
    if (layer.form == kDense) {
        first.bias = layer.bias, first.y = y, first.y_stride = y_stride;
        stages[at].products.push_back(first);
        return;
    }
    first.s = layer.s, first.z = z, first.z_stride = z_stride;
    second.weight = layer.second, second.x = z, second.x_stride = z_stride;
    second.bias = layer.bias, second.y = y, second.y_stride = y_stride;
    if (layer.form == kPivoted && others) {
        const int64_t width = layer.out - layer.rank;
        second.bias = nullptr, second.y = others, second.y_stride = width;
        acip::Parts parts{z, others, z_stride, width, layer.rank, layer.out, layer.place, layer.bias};
        stages[at + 2].puts.push_back({parts, y, y_stride});
    } else if (layer.form == kPivoted) {
        first.bias = layer.bias, first.y = y, first.y_stride = y_stride, first.place = layer.place;
        second.place = layer.place + layer.rank;
    }
    stages[at].products.push_back(first);
    stages[at + 1].products.push_back(second);
}

// The first row of a product that belongs to whoever starts at `position` bytes of its stage; in fours, as kernels read.
int64_t row_at(int64_t position, int64_t start, const Product& product, int64_t row_bytes) {
    if (position <= start) return 0;
    int64_t row = (position - start + row_bytes - 1) / row_bytes;
    return std::min((row + 3) / 4 * 4, product.weight.rows);
}

int64_t bytes_of_row(const Product& product) {
    int64_t cols = product.weight.cols;
    int64_t bytes = product.weight.type == Number::i4 ? cols / 2 : product.weight.type == Number::i8 ? cols
                    : product.weight.type == Number::f32 ? cols * 4 : cols * 2;
    return bytes + 32;  // what a row takes besides its weights
}

void run_stage(const Stage& stage, Number number, int64_t tokens, int64_t member, int64_t members) {
    if (stage.elements) {
        int64_t part = (stage.elements + members - 1) / members;
        int64_t begin = std::min(member * part, stage.elements), end = std::min(begin + part, stage.elements);
        decode->swiglu(number, stage.gate, stage.up, stage.out, begin, end);
        return;
    }
    for (const Stage::Put& put : stage.puts)
        decode->put(number, put.parts, put.y, put.y_stride, tokens * member / members, tokens * (member + 1) / members);
    int64_t total = 0;
    for (const Product& product : stage.products) total += product.weight.rows * bytes_of_row(product);
    int64_t low = total * member / members, high = total * (member + 1) / members, start = 0;
    for (const Product& product : stage.products) {
        int64_t row_bytes = bytes_of_row(product);
        int64_t begin = member == 0 ? 0 : row_at(low, start, product, row_bytes);
        int64_t end = member + 1 == members ? product.weight.rows : row_at(high, start, product, row_bytes);
        if (begin < end) decode->product(number, product, tokens, begin, end);
        start += product.weight.rows * row_bytes;
    }
}

// What a member reads first of a stage is asked for while it waits for the others: memory takes longer than a barrier.
void fetch_stage(const Stage& stage, int64_t member, int64_t members) {
    constexpr int64_t kFetched = 32768;
    if (stage.products.empty()) return;
    const Matrix& weight = stage.products[0].weight;
    const int64_t begin = weight.rows * member / members * weight.stride, end = weight.rows * (member + 1) / members * weight.stride;
    const char* from = static_cast<const char*>(weight.data) + begin;
    for (int64_t at = 0; at < std::min(end - begin, kFetched); at += 64) __builtin_prefetch(from + at, 0, 2);
}

// A thread that is woken for less than this takes longer than it saves: bytes of weights, up to eight tokens.
constexpr int64_t kBytesPerThread = 32768;
// More are computed in turns, so that what lies between the stages stays small.
constexpr int64_t kTokensTogether = 128;

void run_stages(const std::vector<Stage>& stages, Number number, int64_t tokens) {
    int64_t bytes = 0;
    for (const Stage& stage : stages)
        for (const Product& product : stage.products) bytes += product.weight.rows * bytes_of_row(product);
    int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    threads = std::max<int64_t>(1, std::min(threads, bytes * ((tokens + 7) / 8) / kBytesPerThread));
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
        {
            int64_t member = omp_get_thread_num(), members = omp_get_num_threads();
            for (size_t i = 0; i < stages.size(); ++i) {
                if (i) {
#pragma omp barrier
                }
                run_stage(stages[i], number, tokens, member, members);
                if (i + 1 < stages.size()) fetch_stage(stages[i + 1], member, members);
            }
        }
        return;
    }
#endif
    for (const Stage& stage : stages) run_stage(stage, number, tokens, 0, 1);
}

// ---- layers of many tokens

// For tests and measuring: in place of what `few_tokens` says; negative for that.
int64_t few_tokens_set = -1;

// Whether torch multiplies float16 by instructions for it.
bool has_half_products() {
#if defined(__x86_64__)
    static const bool has = [] {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
    }();
    return has;
#else
    return true;
#endif
}

// Up to how many tokens the kernels above are faster than torch's products for a weight of `type`: as measured with
// AVX-512 and its bfloat16 (bench.decode_cpu), and less where nothing was measured.
int64_t few_tokens(Number number, Number type) {
    if (few_tokens_set >= 0) return few_tokens_set;
    if (std::strcmp(decode->name, "avx512_bf16")) return 32;
    // torch makes floats of halves one by one.
    if (number == Number::f16 && !has_half_products()) return std::numeric_limits<int64_t>::max();
    // Codes are made numbers anew for every few tokens, or once for a product of torch's.
    if (type == Number::i4 || number == Number::f16) return 32;
    if (type == Number::i8) return number == Number::f32 ? 128 : 64;
    return number == Number::f32 ? 512 : 192;
}

// x weightᵀ + bias, into y where that is given. What a matrix library does not know as a weight is made of its codes.
Tensor multiply(const Tensor& x, const Matrix& m, const Tensor& held, const Tensor* bias, Number number,
                std::optional<Tensor> y = std::nullopt) {
    Tensor weight = held;
    if (m.type != number) {
        weight = at::empty({m.rows, m.cols}, x.options());
        at::parallel_for(0, m.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(m.cols, 1)),
                         [&](int64_t begin, int64_t end) {
                             decode->plain(number, m, weight.mutable_data_ptr(), begin, end);
                         });
    }
    if (!y) return at::linear(x, weight, bias ? std::optional<Tensor>(*bias) : std::nullopt);
    return bias ? at::addmm_out(*y, *bias, x, weight.t()) : at::mm_out(*y, x, weight.t());
}

// [tokens, out] of x [tokens, in]: y, whose rows may lie apart, where that is given.
Tensor many_tokens(const Layer& layer, Number number, const Tensor& x, std::optional<Tensor> y = std::nullopt) {
    if (layer.form == kDense) return multiply(x, layer.first, *layer.first_tensor, layer.bias_tensor, number, y);
    if (layer.form == kFactors) {
        Tensor z = multiply(x, layer.first, *layer.first_tensor, nullptr, number);
        if (layer.s) z.mul_(at::from_blob(const_cast<float*>(layer.s), {layer.rank}, at::kFloat));
        return multiply(z, layer.second, *layer.second_tensor, layer.bias_tensor, number, y);
    }
    int64_t tokens = x.size(0);
    Tensor pivots = multiply(x, layer.first, *layer.first_tensor, nullptr, number);
    Tensor others = multiply(pivots, layer.second, *layer.second_tensor, nullptr, number);
    if (!y) y = at::empty({tokens, layer.out}, x.options());
    const int64_t width = layer.out - layer.rank;
    const acip::Parts parts{pivots.const_data_ptr(), others.const_data_ptr(), layer.rank,  width,
                            layer.rank,              layer.out,               layer.place, layer.bias};
    at::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / std::max<int64_t>(layer.out, 1)),
                     [&](int64_t begin, int64_t end) {
                         decode->put(number, parts, y->mutable_data_ptr(), y->stride(0), begin, end);
                     });
    return *y;
}

Tensor many_tokens(const std::vector<Layer>& layers, int64_t mode, Number number, const Tensor& x, int64_t width) {
    if (mode == kConcatenate) {
        if (layers.size() == 1) return many_tokens(layers[0], number, x);
        Tensor y = at::empty({x.size(0), width}, x.options());
        int64_t column = 0;
        for (const Layer& layer : layers) {
            many_tokens(layer, number, x, y.narrow(1, column, layer.out));
            column += layer.out;
        }
        return y;
    }
    Tensor gate = many_tokens(layers[0], number, x), up = many_tokens(layers[1], number, x);
    at::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
        decode->swiglu(number, gate.const_data_ptr(), up.const_data_ptr(), gate.mutable_data_ptr(), begin, end);
    });
    return mode == kSwiglu ? gate : many_tokens(layers[2], number, gate);
}

// ----

// y [tokens, width] of x [tokens, in], both contiguous, in one parallel region; of the layers `siblings` share x.
void by_kernels(const std::vector<Layer>& layers, size_t siblings, int64_t mode, Number number, int64_t itemsize,
                int64_t tokens, const char* x, char* to, int64_t width) {
    const int64_t in = layers[0].in;
    // Every z starts at a cache line, and what is still to be put in order; then gate's and up's outputs and their product.
    std::vector<int64_t> z_strides, z_at, others_at;
    int64_t bytes = 0;
    auto take = [&](int64_t elements) {
        int64_t at = bytes;
        bytes += (elements * itemsize + 63) / 64 * 64;
        return at;
    };
    auto is_put = [&](const Layer& layer) { return layer.form == kPivoted && tokens >= kTokensToPut; };
    for (const Layer& layer : layers) {
        z_strides.push_back((layer.rank + 31) / 32 * 32);
        z_at.push_back(take(tokens * z_strides.back()));
        others_at.push_back(take(is_put(layer) ? tokens * (layer.out - layer.rank) : 0));
    }
    int64_t middle = mode == kConcatenate ? 0 : tokens * layers[0].out;
    int64_t gate_at = take(middle), up_at = take(middle), act_at = take(mode == kGatedMlp ? middle : 0);
    Tensor large;  // which is not kept
    if (bytes > kScratchKept) large = at::empty({bytes + 64}, at::kByte);
    char* memory = large.defined() ? at_cache_line(large.mutable_data_ptr<uint8_t>()) : scratch(size_t(bytes));

    // Two products, putting in order, SwiGLU, and the same of down; what there is none of is left out.
    std::vector<Stage> stages(7);
    auto add = [&](size_t at, size_t i, const void* from, int64_t from_stride, void* target, int64_t stride) {
        add_layer(stages, at, layers[i], from, from_stride, target, stride, memory + z_at[i], z_strides[i],
                  is_put(layers[i]) ? memory + others_at[i] : nullptr);
    };
    int64_t column = 0;
    for (size_t i = 0; i < siblings; ++i) {
        void* target = mode == kConcatenate ? to + column * itemsize : memory + (i ? up_at : gate_at);
        add(0, i, x, in, target, mode == kConcatenate ? width : layers[i].out);
        column += layers[i].out;
    }
    if (mode != kConcatenate) {
        stages[3].gate = memory + gate_at, stages[3].up = memory + up_at, stages[3].elements = middle;
        stages[3].out = mode == kSwiglu ? to : memory + act_at;
    }
    if (mode == kGatedMlp) add(4, 2, memory + act_at, layers[0].out, to, width);
    stages.erase(std::remove_if(stages.begin(), stages.end(), [](const Stage& s) { return s.is_empty(); }), stages.end());
    run_stages(stages, number, tokens);
}

Tensor fused_linear(const Tensor& x, at::TensorList tensors, at::IntArrayRef spec, int64_t mode) {
    TORCH_CHECK(x.device().is_cpu() && x.dim() >= 1, "fused_linear: x must be a CPU tensor [..., in_features]");
    auto dtype = x.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                "fused_linear: x must be float32, bfloat16 or float16, got ", dtype);
    TORCH_CHECK(mode >= kConcatenate && mode <= kGatedMlp, "fused_linear: there is no mode ", mode);
    Number number = dtype == at::kFloat ? Number::f32 : dtype == at::kBFloat16 ? Number::bf16 : Number::f16;
    int64_t itemsize = int64_t(x.element_size());

    Reader reader{spec, tensors, dtype};
    std::vector<Layer> layers;
    while (reader.number < spec.size()) layers.push_back(reader.next_layer());
    TORCH_CHECK(reader.tensor == tensors.size(), "fused_linear: ", tensors.size() - reader.tensor,
                " tensors more than spec speaks of");
    size_t wanted = mode == kSwiglu ? 2 : mode == kGatedMlp ? 3 : std::max<size_t>(layers.size(), 1);
    TORCH_CHECK(layers.size() == wanted, "fused_linear: mode ", mode, " takes ", wanted, " layers, got ", layers.size());
    size_t siblings = mode == kGatedMlp ? 2 : layers.size();
    int64_t in = layers[0].in, outputs = 0;
    for (size_t i = 0; i < siblings; ++i) {
        TORCH_CHECK(layers[i].in == in, "fused_linear: siblings take inputs of ", in, " and ", layers[i].in);
        outputs += layers[i].out;
    }
    if (mode != kConcatenate)
        TORCH_CHECK(layers[0].out == layers[1].out, "fused_linear: gate and up must have as many outputs, got ",
                    layers[0].out, " and ", layers[1].out);
    if (mode == kGatedMlp)
        TORCH_CHECK(layers[2].in == layers[0].out, "fused_linear: down must take ", layers[0].out, " inputs, got ",
                    layers[2].in);
    TORCH_CHECK(x.size(-1) == in, "fused_linear: x must be [..., ", in, "], got ", x.sizes());

    int64_t width = mode == kConcatenate ? outputs : mode == kSwiglu ? layers[0].out : layers[2].out;
    at::DimVector sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = width;
    int64_t tokens = in ? x.numel() / in : c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
    Tensor rows = x.is_contiguous() ? x : x.contiguous();
    for (const Layer& layer : layers)
        if (tokens > few_tokens(number, layer.first.type)) {
            at::AutoDispatchBelowADInplaceOrView below;  // as all kernels
            return many_tokens(layers, mode, number, rows.view({tokens, in}), width).view(sizes);
        }
    Tensor y = at::empty(sizes, x.options());
    if (tokens == 0 || width == 0) return y;
    char* to = static_cast<char*>(y.mutable_data_ptr());

    const auto* from = static_cast<const char*>(rows.const_data_ptr());
    for (int64_t first = 0; first < tokens; first += kTokensTogether)
        by_kernels(layers, siblings, mode, number, itemsize, std::min(kTokensTogether, tokens - first),
                   from + first * in * itemsize, to + first * width * itemsize, width);
    return y;
}

}  // namespace

bool acip::widens_bfloat16 = false;

// Called without torch's dispatcher, and all the same in a profile by the names that it would give them.
#define ACIP_PROFILED(name) RECORD_FUNCTION("acip::" name, c10::ArrayRef<const c10::IValue>())

Tensor acip::scale_ranks(const Tensor& z, const Tensor& s) {
    ACIP_PROFILED("scale_ranks");
    return ::scale_ranks(z, s);
}
Tensor acip::mask_gradient_(const Tensor& z, Tensor h, const Tensor& s) {
    ACIP_PROFILED("mask_gradient_");
    return ::mask_gradient_(z, h, s);
}
Tensor acip::dropout(const Tensor& x, int64_t seed, int64_t threshold, double scale) {
    ACIP_PROFILED("dropout");
    return ::dropout(x, seed, threshold, scale);
}
void acip::dropout_add_(Tensor out, const Tensor& x, int64_t seed, int64_t threshold, double scale) {
    ACIP_PROFILED("dropout_add_");
    ::dropout_add_(out, x, seed, threshold, scale);
}
Tensor acip::causal_softmax_(Tensor scores, int64_t block, double scale, const std::optional<Tensor>& log_sums) {
    ACIP_PROFILED("causal_softmax_");
    return ::causal_softmax_(scores, block, scale, log_sums);
}
void acip::softmax_gradient_(Tensor dp, const Tensor& p, int64_t block, double scale) {
    ACIP_PROFILED("softmax_gradient_");
    ::softmax_gradient_(dp, p, block, scale);
}

TORCH_LIBRARY_FRAGMENT(acip, m) {
    m.def("scale_ranks(Tensor z, Tensor s) -> Tensor");
    m.def("mask_gradient_(Tensor z, Tensor(a!) h, Tensor s) -> Tensor");
    m.def("dropout(Tensor x, int seed, int threshold, float scale) -> Tensor");
    m.def("dropout_add_(Tensor(a!) out, Tensor x, int seed, int threshold, float scale) -> ()");
    m.def("cross_entropy_(Tensor(a!) logits, Tensor labels, int ignore, float grad_scale) -> Tensor");
    m.def("soft_cross_entropy_(Tensor(a!) logits, Tensor teacher, Tensor labels, float weight) -> Tensor");
    m.def("causal_softmax_(Tensor(a!) scores, int block, float scale, Tensor? log_sums) -> Tensor");
    m.def("softmax_gradient_(Tensor(a!) dp, Tensor p, int block, float scale) -> ()");
    m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm);
    m.def("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", rotary);
    m.def("gated_silu(Tensor gate, Tensor up) -> Tensor", gated_silu);
    m.def("fused_linear(Tensor x, Tensor[] tensors, int[] spec, int mode) -> Tensor");
}

TORCH_LIBRARY_IMPL(acip, CPU, m) {
    m.impl("scale_ranks", scale_ranks);
    m.impl("mask_gradient_", mask_gradient_);
    m.impl("dropout", dropout);
    m.impl("dropout_add_", dropout_add_);
    m.impl("cross_entropy_", cross_entropy_);
    m.impl("soft_cross_entropy_", soft_cross_entropy_);
    m.impl("causal_softmax_", causal_softmax_);
    m.impl("softmax_gradient_", softmax_gradient_);
    m.impl("fused_linear", fused_linear);
}

// Read in the file before it is loaded, as loading registers operators, whatever torch that is.
extern "C" __attribute__((used, visibility("default"))) const char acip_torch[] = "acip_kernels for torch " TORCH_VERSION;

PYBIND11_MODULE(_native, m) {
    m.doc() = "acip_kernels' native kernels; importing it registers them with torch.";
    m.def("isa", [] { return std::string(decode->name); }, "The instruction set in use.");
    m.def(
        "use_isa",
        [](const std::string& name) {
            const acip::Training* wanted = acip::training(name.empty() ? nullptr : name.c_str());
            if (!wanted) throw pybind11::value_error("this processor or this build has no kernels for " + name);
            chosen = wanted;
            decode = acip::decode(name.empty() ? nullptr : name.c_str());
        },
        pybind11::arg("name") = "", "Run the kernels of this instruction set; nothing for the best one (for tests).");
    m.def(
        "few_tokens",
        [](const std::string& dtype, const std::string& weights) {
            Number number = dtype == "float32" ? Number::f32 : dtype == "bfloat16" ? Number::bf16 : Number::f16;
            return few_tokens(number, weights == "int8" ? Number::i8 : weights == "int4" ? Number::i4 : number);
        },
        "Up to how many tokens the kernels compute a layer (see acip_kernels.plan.few_tokens).");
    m.def(
        "use_few_tokens", [](int64_t tokens) { few_tokens_set = tokens; }, pybind11::arg("tokens") = -1,
        "Take torch's products for more than so many tokens; -1 for what was measured (for tests and measuring).");
    m.def(
        "widen_bfloat16", [](bool widen) { acip::widens_bfloat16 = widen; },
        "Make products in bfloat16 in float32 (acip_kernels.ops.common.multiplies_natively).");
    acip::bind_prepared(m);
}
