// A layer of an ACIP run on a CPU (acip_kernels.ops.masked_svd_linear): torch's matrix products, and our kernels for what
// is between them. One call a pass, because Python around ten of them is as long as a small layer's products.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "acip/operators.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// ---- products, as acip_kernels.ops.common has them: widened on a CPU without instructions for their dtype

bool widened(const Tensor& a) { return a.scalar_type() == at::kBFloat16 && acip::widens_bfloat16; }

Tensor product(const Tensor& a, const Tensor& b) {
    if (!widened(a)) return at::mm(a, b);
    return at::mm(a.to(at::kFloat), b.to(at::kFloat)).to(a.scalar_type());
}

void product_into(Tensor out, const Tensor& a, const Tensor& b) {
    if (widened(a))
        out.copy_(at::mm(a.to(at::kFloat), b.to(at::kFloat)));
    else
        at::mm_out(out, a, b);
}

void add_product(Tensor to, const Tensor& a, const Tensor& b) {
    if (widened(a))
        to.copy_(at::addmm(to.to(at::kFloat), a.to(at::kFloat), b.to(at::kFloat)));
    else
        to.addmm_(a, b);
}

// ---- the adapter beside it (`Adapter` in acip_kernels/ops/masked_svd_linear/problem.py)

struct Adapter {
    Tensor A, B;  // [r, in] and [out, r]; undefined without an adapter
    double scaling = 0, dropout = 0;
    bool joined = false;
    int64_t seed = 0;

    int64_t rank() const { return A.defined() ? A.size(0) : 0; }
    // Whether its products are to be made beside those of the factors, which do not hold it.
    bool apart() const { return A.defined() && !joined; }
    int64_t threshold() const { return std::min<int64_t>(std::llrint(std::ldexp(dropout, 16)), 0xFFFF); }
    double kept() const { return 1 / (1 - dropout); }

    // Its own matrix and the factors', however they are stored.
    std::pair<Tensor, Tensor> inner(const Tensor& Vh) const {
        if (!joined) return {A.to(Vh.scalar_type()), Vh};
        return {Vh.narrow(0, 0, rank()), Vh.narrow(0, rank(), Vh.size(0) - rank())};
    }
    std::pair<Tensor, Tensor> outer(const Tensor& U) const {
        if (!joined) return {B.to(U.scalar_type()), U};
        return {U.narrow(1, 0, rank()), U.narrow(1, rank(), U.size(1) - rank())};
    }
};

Adapter adapter_of(const Optional& A, const Optional& B, const Optional& seed, double scaling, bool joined,
                   double dropout) {
    Adapter a;
    if (!A || !A->defined()) return a;
    TORCH_CHECK(B && B->defined() && A->dim() == 2 && B->dim() == 2 && A->size(0) == B->size(1) && A->size(0) > 0,
                "masked_svd: the adapter must be A [r, in_features] and B [out_features, r]");
    a = {A->detach(), B->detach(), scaling, dropout, joined, 0};
    if (dropout > 0) {
        TORCH_CHECK(dropout < 1 && seed && seed->numel() == 1, "masked_svd: dropout must be in [0, 1), with a seed");
        a.seed = seed->item<int64_t>();
    }
    return a;
}

// ---- what is not left to the products and kernels to check

void check_per_rank(const Tensor& S, const Tensor& live) {
    TORCH_CHECK(S.device().is_cpu() && live.device().is_cpu() && S.dim() == 1 && live.sizes() == S.sizes() &&
                    live.scalar_type() == S.scalar_type(),
                "masked_svd: S and mask must be vectors alike on the CPU, got ", S.scalar_type(), " ", S.sizes(), " and ",
                live.scalar_type(), " ", live.sizes());
}

void check(const Tensor& x, const Tensor& Vh, const Tensor& U, const Tensor& S, const Tensor& live, const Adapter& a) {
    auto type = x.scalar_type(), precise = type == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK(x.device().is_cpu() && Vh.device().is_cpu() && U.device().is_cpu(),
                "masked_svd: tensors must be on the CPU");
    check_per_rank(S, live);
    TORCH_CHECK(x.dim() == 2 && Vh.dim() == 2 && U.dim() == 2 && x.size(1) == Vh.size(1) && U.size(1) == Vh.size(0) &&
                    Vh.scalar_type() == type && U.scalar_type() == type,
                "masked_svd: x, Vh and U do not fit: ", x.sizes(), ", ", Vh.sizes(), ", ", U.sizes());
    int64_t joined = a.joined ? a.rank() : 0;
    TORCH_CHECK(S.size(0) + joined == Vh.size(0) && S.scalar_type() == precise, "masked_svd: S must be ", precise, " [",
                Vh.size(0) - joined, "], got ", S.scalar_type(), " ", S.sizes());
    if (a.rank())
        TORCH_CHECK(a.A.size(1) == x.size(1) && a.B.size(0) == U.size(0) && a.A.scalar_type() == precise &&
                        a.B.scalar_type() == precise,
                    "masked_svd: the adapter must be ", precise, " [r, ", x.size(1), "] and [", U.size(0), ", r]");
}

// What multiplies each column of z: α/r for the adapter's, S ⊙ β for the rest.
Tensor scales_of(const Tensor& S, const Tensor& live, const Adapter& a) {
    check_per_rank(S, live);
    int64_t r = a.rank(), rank = S.size(0);
    Tensor singular = S.contiguous(), mask = live.contiguous(), scales = at::empty({r + rank}, S.options());
    AT_DISPATCH_FLOATING_TYPES(S.scalar_type(), "masked_svd", [&] {
        auto *to = scales.mutable_data_ptr<scalar_t>();
        const auto *s = singular.const_data_ptr<scalar_t>(), *m = mask.const_data_ptr<scalar_t>();
        std::fill_n(to, r, scalar_t(a.scaling));
        for (int64_t i = 0; i < rank; ++i) to[r + i] = m[i] > 0 ? s[i] : scalar_t(0);
    });
    return scales;
}

// From the sums of all columns of z: 1[mask > 0] (1/c) S Σ z h.
Tensor mask_gradient(const Tensor& sums, const Tensor& S, const Tensor& live, const Adapter& a, double mask_scale) {
    int64_t r = a.rank(), rank = S.size(0);
    Tensor singular = S.contiguous(), mask = live.contiguous(), gradient = at::empty({rank}, S.options());
    AT_DISPATCH_FLOATING_TYPES(S.scalar_type(), "masked_svd", [&] {
        auto *to = gradient.mutable_data_ptr<scalar_t>();
        const auto *s = singular.const_data_ptr<scalar_t>(), *m = mask.const_data_ptr<scalar_t>();
        const auto *sum = sums.const_data_ptr<scalar_t>() + r;
        auto scale = scalar_t(mask_scale);
        // The kernel's sum is zero where the scale is; a live singular value of zero has no gradient either.
        for (int64_t i = 0; i < rank; ++i) to[i] = m[i] > 0 ? sum[i] * s[i] / scale : scalar_t(0);
    });
    return gradient;
}

// ---- the three parts, as the reference has them

// z [tokens, r + rank]: x̃ Aᵀ, with x̃ the input after dropout, and then x Vhᵀ.
Tensor products(const Tensor& x, const Tensor& Vh, const Adapter& a) {
    if (!a.rank() || (a.joined && a.dropout == 0)) return product(x, Vh.t());
    auto [A, inner] = a.inner(Vh);
    Tensor z = at::empty({x.size(0), a.rank() + inner.size(0)}, x.options());
    product_into(z.narrow(1, a.rank(), inner.size(0)), x, inner.t());
    Tensor dropped = a.dropout > 0 ? acip::dropout(x, a.seed, a.threshold(), a.kept()) : x;
    product_into(z.narrow(1, 0, a.rank()), dropped, A.t());
    return z;
}

// y [tokens, out] = (z ⊙ S ⊙ β) Uᵀ + bias, and the adapter's part.
Tensor outputs(const Tensor& z, const Tensor& U, const Tensor& S, const Tensor& live, const Optional& bias,
               const Adapter& a) {
    Tensor zs = acip::scale_ranks(z, scales_of(S, live, a)), y;
    if (a.apart()) {
        int64_t r = a.rank();
        auto [B, outer] = a.outer(U);
        y = product(zs.narrow(1, r, z.size(1) - r), outer.t());
        add_product(y, zs.narrow(1, 0, r), B.t());
    } else {
        y = product(zs, U.t());
    }
    if (bias && bias->defined()) y.add_(*bias);
    return y;
}

struct Gradients {
    Tensor x, mask, A, B;
};

// `need_adapter`: of an adapter that is trained. x is looked at for an adapter's gradient alone.
Gradients gradients(const Tensor& g, const Tensor& x, const Tensor& z, const Tensor& Vh, const Tensor& U,
                    const Tensor& S, const Tensor& live, double mask_scale, const Adapter& a, bool need_x,
                    bool need_adapter) {
    int64_t r = a.rank();
    Gradients out;
    Tensor h;
    if (a.apart()) {
        auto [B, outer] = a.outer(U);
        h = at::empty(z.sizes(), z.options());
        product_into(h.narrow(1, r, z.size(1) - r), g, outer);
        product_into(h.narrow(1, 0, r), g, B);
    } else {
        h = product(g, U);
    }
    Tensor sums = acip::mask_gradient_(z, h, scales_of(S, live, a));
    out.mask = mask_gradient(sums, S, live, a, mask_scale);
    Tensor ha = r ? h.narrow(1, 0, r) : Tensor();
    if (r && need_adapter) {
        Tensor dropped = a.dropout > 0 ? acip::dropout(x, a.seed, a.threshold(), a.kept()) : x;
        // An adapter is float32 whatever the products are.
        out.A = product(ha.t(), dropped).to(a.A.scalar_type());
        out.B = product(g.t(), z.narrow(1, 0, r)).mul_(a.scaling).to(a.B.scalar_type());
    }
    if (!need_x) return out;
    if (!r || (a.joined && a.dropout == 0)) {
        out.x = product(h, Vh);
        return out;
    }
    auto [A, inner] = a.inner(Vh);
    out.x = product(h.narrow(1, r, h.size(1) - r), inner);
    if (a.dropout > 0)
        acip::dropout_add_(out.x, product(ha, A), a.seed, a.threshold(), a.kept());
    else
        add_product(out.x, ha, A);
    return out;
}

// ---- as operators: each part by itself, for what torch.compile traces, and the whole with its gradients

Tensor products_operator(const Tensor& x, const Tensor& Vh, const Optional& A, const Optional& B, const Optional& seed,
                         double scaling, bool joined, double dropout) {
    return products(x, Vh, adapter_of(A, B, seed, scaling, joined, dropout));
}

Tensor outputs_operator(const Tensor& z, const Tensor& U, const Tensor& S, const Tensor& mask, const Optional& bias,
                        const Optional& A, const Optional& B, double scaling, bool joined) {
    return outputs(z, U, S, mask, bias, adapter_of(A, B, std::nullopt, scaling, joined, 0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradients_operator(
    const Tensor& g, const Optional& x, const Tensor& z, const Tensor& Vh, const Tensor& U, const Tensor& S,
    const Tensor& mask, const Optional& A, const Optional& B, const Optional& seed, double scaling, bool joined,
    double dropout, double mask_scale, bool need_x) {
    Adapter a = adapter_of(A, B, seed, scaling, joined, dropout);
    Gradients out = gradients(g, x.value_or(Tensor()), z, Vh, U, S, mask, mask_scale, a, need_x, a.rank() > 0);
    for (Tensor* one : {&out.x, &out.A, &out.B})
        if (!one->defined()) *one = at::empty({0}, g.options());
    return {out.x, out.mask, out.A, out.B};
}

struct Masked : torch::autograd::Function<Masked> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& Vh, const Tensor& U,
                          const Tensor& S, const Tensor& mask, const Optional& bias, const Optional& rows,
                          const Optional& A, const Optional& B, const Optional& seed, double scaling, bool joined,
                          double dropout, double mask_scale, bool save_z) {
        at::AutoDispatchBelowADInplaceOrView guard;
        Adapter a = adapter_of(A, B, seed, scaling, joined, dropout);
        TORCH_CHECK(x.dim() > 0, "masked_svd: x must have a dimension");
        Tensor tokens = x.reshape({-1, x.size(-1)}).contiguous();
        Tensor live = rows ? mask.index_select(0, *rows) : mask;
        check(tokens, Vh, U, S, live, a);
        Tensor z = products(tokens, Vh, a);
        Tensor y = outputs(z, U, S, live, bias, a);
        // The input is needed for the adapter's gradient, and where z has to be made again.
        bool trained = a.rank() && (A->requires_grad() || B->requires_grad()), save_x = trained || !save_z;
        ctx->save_for_backward({save_x ? x : Tensor(), save_z ? z : Tensor(), Vh, U, S, mask, rows.value_or(Tensor()),
                                A.value_or(Tensor()), B.value_or(Tensor()), seed.value_or(Tensor())});
        ctx->saved_data["options"] = c10::List<double>({scaling, dropout, mask_scale});
        ctx->saved_data["flags"] = c10::List<bool>({joined, x.requires_grad(), mask.requires_grad(),
                                                    a.rank() && A->requires_grad(), a.rank() && B->requires_grad()});
        auto sizes = x.sizes().vec();
        sizes.back() = U.size(0);
        return y.view(sizes);
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                   const torch::autograd::variable_list& upstream) {
        TORCH_CHECK(!at::GradMode::is_enabled(),
                    "masked_svd_linear has no second derivatives: leave out create_graph=True");
        torch::autograd::variable_list out(15);
        auto saved = ctx->get_saved_variables();
        if (!upstream[0].defined()) return out;
        at::AutoDispatchBelowADInplaceOrView guard;
        const Tensor &x = saved[0], &Vh = saved[2], &U = saved[3], &S = saved[4], &mask = saved[5], &rows = saved[6];
        auto options = ctx->saved_data["options"].toDoubleList();
        auto flags = ctx->saved_data["flags"].toBoolList();
        Adapter a = adapter_of(saved[7], saved[8], saved[9], options[0], flags[0], options[1]);
        Tensor g = upstream[0].reshape({-1, U.size(0)});
        Tensor live = rows.defined() ? mask.index_select(0, rows) : mask;
        Tensor tokens = x.defined() ? x.reshape({-1, x.size(-1)}).contiguous() : x;
        Tensor z = saved[1].defined() ? saved[1] : products(tokens, Vh, a);
        Gradients made = gradients(g, tokens, z, Vh, U, S, live, options[2], a, flags[1], flags[3] || flags[4]);
        if (flags[1]) {
            auto sizes = upstream[0].sizes().vec();
            sizes.back() = Vh.size(1);
            out[0] = made.x.view(sizes);
        }
        if (flags[2])
            out[4] = rows.defined() ? at::zeros_like(mask).index_copy_(0, rows, made.mask) : made.mask;
        if (flags[3]) out[7] = made.A;
        if (flags[4]) out[8] = made.B;
        return out;
    }
};

Tensor masked_svd(const Tensor& x, const Tensor& Vh, const Tensor& U, const Tensor& S, const Tensor& mask,
                  const Optional& bias, const Optional& rows, const Optional& A, const Optional& B,
                  const Optional& seed, double scaling, bool joined, double dropout, double mask_scale, bool save_z) {
    return Masked::apply(x, Vh, U, S, mask, bias, rows, A, B, seed, scaling, joined, dropout, mask_scale, save_z);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acip, m) {
    m.def("masked_svd_products(Tensor x, Tensor Vh, Tensor? A, Tensor? B, Tensor? seed, float scaling, bool joined, "
          "float dropout) -> Tensor");
    m.def("masked_svd_outputs(Tensor z, Tensor U, Tensor S, Tensor mask, Tensor? bias, Tensor? A, Tensor? B, "
          "float scaling, bool joined) -> Tensor");
    m.def("masked_svd_gradients(Tensor g, Tensor? x, Tensor z, Tensor Vh, Tensor U, Tensor S, Tensor mask, Tensor? A, "
          "Tensor? B, Tensor? seed, float scaling, bool joined, float dropout, float mask_scale, bool need_x) -> "
          "(Tensor, Tensor, Tensor, Tensor)");
    // Made of torch's own operators and ours, so that what counts or traces those sees them.
    m.def("masked_svd(Tensor x, Tensor Vh, Tensor U, Tensor S, Tensor mask, Tensor? bias, Tensor? rows, Tensor? A, "
          "Tensor? B, Tensor? seed, float scaling, bool joined, float dropout, float mask_scale, bool save_z) -> Tensor",
          masked_svd);
}

TORCH_LIBRARY_IMPL(acip, CPU, m) {
    m.impl("masked_svd_products", products_operator);
    m.impl("masked_svd_outputs", outputs_operator);
    m.impl("masked_svd_gradients", gradients_operator);
}
