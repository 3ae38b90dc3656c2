"""A linear layer of two trainable factors, of which every prefix is a smaller layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NestedLinear(nn.Module):
    """`y = (x right[:ρ]ᵀ) left[:, :ρ]ᵀ + bias`, at whatever rank `ρ` the attribute `rank` says.

    The ranks are in the order of their importance, so that a smaller layer is a part of a larger one, and training at
    many ranks trains one set of factors for all of them (as nested dropout does, arXiv 1402.0915).

    Parameters: `left [out, k]`, `right [k, in]`, float32 whatever the model computes in. `bias` is frozen. A rank's
    column in `left` and row in `right` have the same norm, so that one learning rate suits both.

    The gradients are added into `left.grad` and `right.grad`, which exist from the start: at rank ρ only ρ columns and
    rows of them are touched.

    Args:
        U, S, Vh, bias: factors as `SVDLinear` holds them, the most important rank first.
    """

    def __init__(self, U: Tensor, S: Tensor, Vh: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features, self.full_rank = U.shape[0], Vh.shape[1], S.shape[0]
        self.rank = self.full_rank
        self.dtype = U.dtype
        left, right = balanced(U.double(), S.double(), Vh.double())
        self.left = nn.Parameter(left.float().contiguous())
        self.right = nn.Parameter(right.float().contiguous())
        self.left.grad, self.right.grad = torch.zeros_like(self.left), torch.zeros_like(self.right)
        self.register_buffer("bias", None if bias is None else bias.detach())
        # Where the layer was before it was trained, to teach it; `teaching` says that it computes with that.
        self.dense: Tensor | None = None
        self.teaching = False

    def forward(self, x: Tensor) -> Tensor:
        if self.teaching:
            return nn.functional.linear(x, self.dense, self.bias)
        if torch.is_grad_enabled():
            return _NestedLinear.apply(x, self.left, self.right, self.bias, self.rank, self.dtype)
        left, right = self.left[:, : self.rank].to(self.dtype), self.right[: self.rank].to(self.dtype)
        return nn.functional.linear(nn.functional.linear(x, right), left, self.bias)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(Uᵀ [k, out], S [k], Vh [k, in])`, float32, with rows of norm one."""
        S = self.left.norm(dim=0) * self.right.norm(dim=1)
        U = torch.nn.functional.normalize(self.left, dim=0).t()
        Vh = torch.nn.functional.normalize(self.right, dim=1)
        return U, S, Vh

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}/{self.full_rank}"


def balanced(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """`left [out, k]` and `right [k, in]` with `left right = U diag(S) Vh` and equal norms of each rank's two parts."""
    norm_U, norm_Vh = U.norm(dim=0), Vh.norm(dim=1)
    root = (S * norm_U * norm_Vh).clamp_min(0).sqrt()
    # A singular value of zero has parts of zero.
    left = U * (root / norm_U.clamp_min(torch.finfo(U.dtype).tiny))
    right = (root / norm_Vh.clamp_min(torch.finfo(U.dtype).tiny))[:, None] * Vh
    return left, right


def takes_effective_weight(tokens: int, in_features: int, out_features: int, rank: int) -> bool:
    """Whether a step is cheaper through the dense product of the factors.

    Operations of forward and backward pass: through the factors `6 tokens rank (in + out)`; through the dense weight
    `6 in out (tokens + rank)`: two products for `y` and `∂x`, one for the weight's gradient, one to make the weight
    and two to take its gradient to the factors.
    """
    return in_features * out_features * (tokens + rank) < tokens * rank * (in_features + out_features)


class _NestedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, left, right, bias, rank, dtype):
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        L, R = left[:, :rank].to(dtype), right[:rank].to(dtype)
        ctx.effective = takes_effective_weight(len(flat), R.shape[1], L.shape[0], rank)
        weight = L @ R if ctx.effective else None
        z = None if ctx.effective else flat @ R.t()
        y = flat @ weight.t() if ctx.effective else z @ L.t()
        if bias is not None:
            y += bias
        ctx.save_for_backward(flat, z, weight)
        ctx.left, ctx.right, ctx.rank, ctx.dtype = left, right, rank, dtype
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        flat, z, weight = ctx.saved_tensors
        left, right, rank = ctx.left, ctx.right, ctx.rank
        L, R = left.detach()[:, :rank].to(ctx.dtype), right.detach()[:rank].to(ctx.dtype)
        g = gradient.reshape(-1, gradient.shape[-1]).to(ctx.dtype)
        if ctx.effective:
            dx = g @ weight if ctx.needs_input_grad[0] else None
            dW = g.t() @ flat
            _add_product(left.grad[:, :rank], dW, R.t())
            _add_product(right.grad[:rank], L.t(), dW)
        else:
            h = g @ L
            dx = h @ R if ctx.needs_input_grad[0] else None
            _add_product(left.grad[:, :rank], g.t(), z)
            _add_product(right.grad[:rank], h.t(), flat)
        if dx is not None:
            dx = dx.to(gradient.dtype).reshape(*gradient.shape[:-1], -1)
        return dx, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
