"""The same function and gradients as `masked_svd_linear`, by way of the dense weight that the live entries make.

With `W = U diag(S ⊙ β) Vh` at hand, `y = x Wᵀ` and `∂L/∂x = g W` are dense products, and with `M = gᵀ x [out, in]`

    ∂L/∂mask_i = 1[mask_i > 0] · (1/c) · S_i · (Uᵀ M Vhᵀ)_ii,    ∂L/∂A = (α/r) Bᵀ M,    ∂L/∂B = (α/r) M Aᵀ

which is `Σ_tokens z_i h_i` and LoRA's gradients with the sums over tokens taken first. All that follows `M` costs the
same for any number of tokens, so under gradient accumulation it is done once a step. See `plan.training_plan` for
when this is the cheaper way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dropout
from ..common import add_product, product
from .problem import Adapter


def effective_linear(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, adapter: Adapter | None, collector: Collector
) -> Tensor:
    """`x weightᵀ + bias`, and the adapter's part: `[..., out]` for `x [..., in]`.

    weight: `U diag(S ⊙ β) Vh [out, in]` of `mask`, in x's dtype, frozen. The gradient for `x` comes with the backward
    pass; `M` is added to `collector`, whose `gradients` are those for `mask`, `A` and `B` (with dropout, the adapter's
    gradients come with the backward pass, as its input is another for every token).
    """
    A, B = (None, None) if adapter is None else (adapter.A, adapter.B)
    return _Effective.apply(x, mask, A, B, weight, bias, adapter, collector)


class Collector:
    """`M = Σ gᵀ x [out, in]` over the backward passes since the last `gradients`.

    As one product makes it where there was one pass, in float32 (float64) where there were more.
    """

    def __init__(self):
        self.total: Tensor | None = None

    def add(self, g: Tensor, x: Tensor) -> None:
        M = product(g.t(), x)
        if self.total is None:
            self.total = M
        else:
            self.total = self.total.to(torch.promote_types(M.dtype, torch.float32)).add_(M)

    def gradients(self, Vh: Tensor, U: Tensor, S: Tensor, mask: Tensor, mask_scale: float, adapter: Adapter | None):
        """`(dmask, dA, dB)` for the entries of `Vh [rank, in]`, `U [out, rank]`, `S`, `mask [rank]`; empties `M`.

        `dA` and `dB` are None where there is no adapter or its gradients came with the backward pass.
        """
        M, self.total = self.total, None
        # In the factors' dtype, in which z and h would be rounded on the other route; the sum in float32.
        M = M.to(U.dtype)
        diagonal = (product(U.t(), M).to(S.dtype) * Vh).sum(1)
        dmask = (diagonal * S / mask_scale).masked_fill_(mask <= 0, 0)
        if adapter is None or adapter.dropout:
            return dmask, None, None
        A, B = adapter.A.detach(), adapter.B.detach()
        M = M.to(A.dtype)
        return dmask, (B.t() @ M).mul_(adapter.scaling), (M @ A.t()).mul_(adapter.scaling)


class _Effective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, A, B, weight, bias, adapter, collector):
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        if adapter is not None and not adapter.dropout:
            # A dense product of rank r, once, is cheaper than r more columns for every token.
            y = product(tokens, _with_adapter(weight, adapter).t())
        else:
            y = product(tokens, weight.t())
        a = None
        if adapter is not None and adapter.dropout:
            dropped = dropout.drop(tokens, adapter.dropout, adapter.seed)
            a = product(dropped, adapter.A.to(x.dtype).t()).mul_(adapter.scaling)
            add_product(y, a, adapter.B.to(x.dtype).t())
        if bias is not None:
            y += bias
        ctx.save_for_backward(tokens, weight, a, A, B)
        ctx.adapter, ctx.collector, ctx.shape = adapter, collector, x.shape
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, g):
        tokens, weight, a, A, B = ctx.saved_tensors
        adapter = ctx.adapter
        g = g.reshape(-1, g.shape[-1])
        ctx.collector.add(g, tokens)
        dx = dA = dB = None
        need_x = ctx.needs_input_grad[0]
        if adapter is None or not adapter.dropout:
            if need_x:
                dx = product(g, weight if adapter is None else _with_adapter(weight, adapter))
        else:
            ha = product(g, B.detach().to(g.dtype)).mul_(adapter.scaling)
            dropped = dropout.drop(tokens, adapter.dropout, adapter.seed)
            dA = product(ha.t(), dropped).to(A.dtype)
            dB = product(g.t(), a).to(B.dtype)
            if need_x:
                dx = product(g, weight)
                part = product(ha, A.detach().to(g.dtype))
                dropout.add_dropped(dx, part, adapter.dropout, adapter.seed)
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, dA, dB, None, None, None, None


def _with_adapter(weight: Tensor, adapter: Adapter) -> Tensor:
    """`weight + (α/r) B A`, in weight's dtype."""
    A, B = adapter.A.detach(), adapter.B.detach()
    return torch.addmm(weight.to(B.dtype), B, A, alpha=adapter.scaling).to(weight.dtype)
