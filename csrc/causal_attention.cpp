// Attention of a training step on a CPU (acip_kernels.ops.causal_attention), a block of queries at a time: torch's batched
// products, and our softmax in between. In C++ because a block is a dozen calls: what they cost in Python would make
// larger blocks worth their while, which compute more of what is hidden.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "acip/operators.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Sizes {
    int64_t batch, heads, length, width, key_heads, groups;
    explicit Sizes(const Tensor& q, const Tensor& k)
        : batch(q.size(0)), heads(q.size(1)), length(q.size(2)), width(q.size(3)), key_heads(k.size(1)),
          groups(heads / key_heads) {}
};

void check(const Tensor& q, const Tensor& k, const Tensor& v, int64_t block) {
    TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && k.size(0) == q.size(0) &&
                    k.size(2) == q.size(2) && k.size(3) == q.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0 &&
                    block > 0,
                "causal_attention: q, k and v do not fit: ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
    TORCH_CHECK(q.device().is_cpu() && k.device().is_cpu() && v.device().is_cpu() &&
                    q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                "causal_attention: q, k and v must be on the CPU and of one dtype");
}

// Queries [start, stop) of x [batch, heads, length, width] as [batch · key_heads, groups · queries, width].
Tensor grouped(const Tensor& x, const Sizes& s, int64_t start, int64_t stop) {
    return x.narrow(2, start, stop - start)
        .reshape({s.batch, s.key_heads, s.groups, stop - start, s.width})
        .reshape({s.batch * s.key_heads, s.groups * (stop - start), s.width});
}

// Positions [0, stop) of keys or values [rows, length, width], contiguous: torch's products take that, and its transpose,
// as they are, and would copy a narrowed tensor's transpose number by number.
Tensor seen(const Tensor& x, int64_t stop) { return x.narrow(1, 0, stop).contiguous(); }

// The inverse, into `to` [batch, length, heads, width].
void put(const Tensor& to, const Tensor& part, const Sizes& s, int64_t start, int64_t stop) {
    to.narrow(1, start, stop - start)
        .view({s.batch, stop - start, s.key_heads, s.groups, s.width})
        .copy_(part.view({s.batch, s.key_heads, s.groups, stop - start, s.width}).permute({0, 3, 1, 2, 4}));
}

at::ScalarType precise(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t block) {
    check(q, k, v, block);
    Sizes s(q, k);
    Tensor keys = k.reshape({-1, s.length, s.width}), values = v.reshape({-1, s.length, s.width});
    Tensor out = at::empty({s.batch, s.length, s.heads, s.width}, q.options());
    Tensor log_sums = at::empty({s.batch * s.key_heads, s.groups * s.length}, q.options().dtype(precise(q)));
    for (int64_t start = 0; start < s.length; start += block) {
        int64_t stop = std::min(start + block, s.length);
        Tensor scores = at::bmm(grouped(q, s, start, stop), seen(keys, stop).transpose(1, 2));
        Tensor sums = acip::causal_softmax_(scores, stop - start, scale, std::nullopt);
        log_sums.narrow(1, s.groups * start, s.groups * (stop - start)).copy_(sums);
        put(out, at::bmm(scores, seen(values, stop)), s, start, stop);
    }
    return {out.transpose(1, 2), log_sums};
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& log_sums, double scale, int64_t block) {
    check(q, k, v, block);
    TORCH_CHECK(g.sizes() == q.sizes() && g.scalar_type() == q.scalar_type() && g.device().is_cpu(),
                "causal_attention: the gradient must be as q, got ", g.sizes());
    Sizes s(q, k);
    TORCH_CHECK(log_sums.sizes() == at::IntArrayRef({s.batch * s.key_heads, s.groups * s.length}),
                "causal_attention: log_sums must be those of the forward pass");
    Tensor keys = k.reshape({-1, s.length, s.width}), values = v.reshape({-1, s.length, s.width});
    Tensor dq = at::empty({s.batch, s.length, s.heads, s.width}, q.options());
    // Sums over blocks, not rounded in between.
    Tensor dk = at::zeros(keys.sizes(), log_sums.options()), dv = at::zeros(keys.sizes(), log_sums.options());
    for (int64_t start = 0; start < s.length; start += block) {
        int64_t stop = std::min(start + block, s.length);
        Tensor queries = grouped(q, s, start, stop), upstream = grouped(g, s, start, stop);
        Tensor seen_keys = seen(keys, stop), seen_values = seen(values, stop);
        Tensor p = at::bmm(queries, seen_keys.transpose(1, 2));
        Tensor sums = log_sums.narrow(1, s.groups * start, s.groups * (stop - start)).contiguous();
        acip::causal_softmax_(p, stop - start, scale, sums);
        dv.narrow(1, 0, stop).add_(at::bmm(p.transpose(1, 2), upstream));
        Tensor ds = at::bmm(upstream, seen_values.transpose(1, 2));
        acip::softmax_gradient_(ds, p, stop - start, scale);
        put(dq, at::bmm(ds, seen_keys), s, start, stop);
        dk.narrow(1, 0, stop).add_(at::bmm(ds.transpose(1, 2), queries));
    }
    return {dq.transpose(1, 2), dk.to(k.scalar_type()).view(k.sizes()), dv.to(v.scalar_type()).view(v.sizes())};
}

struct CausalAttention : torch::autograd::Function<CausalAttention> {
    static Tensor forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                          int64_t block) {
        at::AutoDispatchBelowADInplaceOrView guard;
        auto [out, log_sums] = ::forward(q, k, v, scale, block);
        context->save_for_backward({q, k, v, log_sums});
        context->saved_data["scale"] = scale;
        context->saved_data["block"] = block;
        return out;
    }

    static variable_list backward(AutogradContext* context, const variable_list& upstream) {
        TORCH_CHECK(!at::GradMode::is_enabled(),
                    "causal_attention has no second derivative: create_graph must be False");
        at::AutoDispatchBelowADInplaceOrView guard;
        auto saved = context->get_saved_variables();
        auto [dq, dk, dv] = gradients(upstream[0], saved[0], saved[1], saved[2], saved[3],
                                      context->saved_data["scale"].toDouble(), context->saved_data["block"].toInt());
        return {dq, dk, dv, Tensor(), Tensor()};
    }
};

Tensor causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t block) {
    return CausalAttention::apply(q, k, v, scale, block);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acip, m) {
    m.def("causal_attention_outputs(Tensor q, Tensor k, Tensor v, float scale, int block) -> (Tensor, Tensor)");
    m.def("causal_attention_gradients(Tensor g, Tensor q, Tensor k, Tensor v, Tensor log_sums, float scale, int block) "
          "-> (Tensor, Tensor, Tensor)");
    // Made of torch's own operators, so that what counts those sees them.
    m.def("causal_attention_differentiable(Tensor q, Tensor k, Tensor v, float scale, int block) -> Tensor",
          causal_attention);
}

TORCH_LIBRARY_IMPL(acip, CPU, m) {
    m.impl("causal_attention_outputs", forward);
    m.impl("causal_attention_gradients", gradients);
}
