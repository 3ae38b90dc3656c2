"""A linear layer of two factors, of which every prefix is a smaller layer, trained by updates of low rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .sharded import Sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class NestedLinear(nn.Module):
    """`y = (x right'[:ρ]ᵀ) left'[:, :ρ]ᵀ + bias`, at whatever rank `ρ` the attribute `rank` says.

    The ranks are in the order of their importance, so that a smaller layer is a part of a larger one, and training at
    many ranks trains one set of factors for all of them (as nested dropout does, arXiv 1402.0915).

    What is trained are updates of rank `r` (LoRA's form, arXiv 2106.09685) of both factors, `left' = left + left_B
    left_A` and `right' = right + right_B right_A`. They are part of the factors, so that they cost nothing to store,
    and a smaller layer's updates are those columns of `left_A` and rows of `right_B` that its ranks have. The first
    changes what the outputs do with the kept inner dimensions, the second which those are.

    Frozen: `left_t [k, out]` (`left` transposed, so that the first ranks lie side by side), `right [k, in]`, float32
    whatever the model computes in; a rank's row in either has the same norm. `bias`.
    Parameters, float32: `left_B [out, r]`, `left_A [r, k]`, `right_B [k, r]`, `right_A [r, in]`; B starts at zero.

    The gradients are added into the parameters' `grad`, which exist from the start. The updated factors are made when
    they are first needed, in the compute dtype, and kept until `forget_updates`, to be called when parameters change.

    Args:
        U, S, Vh, bias: factors as `SVDLinear` holds them, the most important rank first.
        update_rank: `r`.
        generator: of the start of `left_A` and `right_A`.
    """

    left_t: Tensor
    right: Tensor
    bias: Tensor | None

    def __init__(
        self,
        U: Tensor,
        S: Tensor,
        Vh: Tensor,
        bias: Tensor | None = None,
        *,
        update_rank: int = 32,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.full_rank = U.shape[0], Vh.shape[1], S.shape[0]
        self.rank = self.full_rank
        self.dtype = U.dtype
        left, right = balanced(U.double(), S.double(), Vh.double())
        self.register_buffer("left_t", left.t().float().contiguous())
        self.register_buffer("right", right.float().contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())

        def start(width: int) -> nn.Parameter:
            # As PEFT's: uniform with variance 1 / (3 width).
            values = torch.empty(update_rank, width, device=U.device)
            return nn.Parameter(values.uniform_(-(width**-0.5), width**-0.5, generator=generator))

        self.left_A, self.right_A = start(self.full_rank), start(self.in_features)
        self.left_B = nn.Parameter(self.right.new_zeros(self.out_features, update_rank))
        self.right_B = nn.Parameter(self.right.new_zeros(self.full_rank, update_rank))
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._updated: tuple[Tensor, Tensor] | None = None
        # Where the layer was before it was trained, to teach it; `teaching` says that it computes with that.
        self.dense: Tensor | None = None
        self.teaching = False
        # After shard(): the updated factors in the compute dtype, and `dense`.
        self.sharded: Sharded | None = None
        self.sharded_dense: Sharded | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.teaching:
            return self._taught(x, self.dense) if self.sharded_dense is None else self.sharded_dense(x, self._taught)
        updated = self.updated()
        return self._nested(x, *updated) if self.sharded is None else self.sharded(x, self._nested)

    def _taught(self, x: Tensor, dense: Tensor) -> Tensor:
        return nn.functional.linear(x, dense, self.bias)

    def _nested(self, x: Tensor, left_t: Tensor, right: Tensor) -> Tensor:
        return _NestedLinear.apply(x, self.right_A, self, left_t, right)

    @torch.no_grad()
    def updated(self) -> tuple[Tensor, Tensor]:
        """`(left'ᵀ [k, out], right' [k, in])` in the compute dtype; of a sharded layer, this process's rows."""
        if self._updated is None:
            exact = self._exact()
            if self.sharded is None:
                self._updated = exact[0].to(self.dtype), exact[1].to(self.dtype)
            else:
                self._updated = self.sharded.local("left_t"), self.sharded.local("right")
                for rows, factor in zip(self._updated, exact, strict=True):
                    rows.copy_(factor)
        return self._updated

    def forget_updates(self) -> None:
        """The parameters have changed."""
        self._updated = None

    def _exact(self) -> tuple[Tensor, Tensor]:
        left_A: Tensor = self.left_A
        right_B: Tensor = self.right_B
        if self.sharded is not None:
            rows = self.sharded.rows("right")
            left_A, right_B = left_A[:, rows], right_B[rows]
        left_t = torch.addmm(self.left_t, left_A.t(), self.left_B.t())
        return left_t, torch.addmm(self.right, right_B, self.right_A)

    @torch.no_grad()
    def shard(self, mesh: DeviceMesh) -> None:
        """Keep some ranks of the factors, and some rows of `dense`, in each process of a device mesh.

        They are put together while they are computed with. What is trained stays whole in every process.
        """
        left_t, right = self.updated()
        self.sharded, self._updated = Sharded(mesh, left_t=left_t, right=right), None
        rows = self.sharded.rows("right")
        self.left_t, self.right = self.left_t[rows].clone(), self.right[rows].clone()
        if self.dense is not None:
            self.sharded_dense, self.dense = Sharded(mesh, dense=self.dense), None

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(Uᵀ [k, out], S [k], Vh [k, in])`, float32, with rows of norm one."""
        left_t, right = self._exact()
        if self.sharded is not None:
            left_t, right = self.sharded.whole("left_t", left_t), self.sharded.whole("right", right)
        S = left_t.norm(dim=1) * right.norm(dim=1)
        return nn.functional.normalize(left_t), S, nn.functional.normalize(right)

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}/{self.full_rank}, "
            f"update_rank={self.left_A.shape[0]}"
        )


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

    Operations of forward and backward pass that differ: through the factors `4 tokens rank (in + out)`; through the
    dense weight `2 in out (2 tokens + rank)`: a product each for `y` and `∂x`, and one to make the weight.
    """
    return in_features * out_features * (2 * tokens + rank) < 2 * tokens * rank * (in_features + out_features)


class _NestedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parameter, layer, left_t, right):
        rank = layer.rank
        left_t, right = left_t[:rank], right[:rank]
        flat = x.reshape(-1, x.shape[-1]).to(layer.dtype)
        weight = None
        if takes_effective_weight(len(flat), layer.in_features, layer.out_features, rank):
            weight = left_t.t() @ right
            y = flat @ weight.t()
        else:
            y = (flat @ right.t()) @ left_t
        if layer.bias is not None:
            y += layer.bias
        # Where factors are divided among processes, a whole weight of every layer has no place between the passes.
        ctx.again = weight is not None and layer.sharded is not None
        ctx.save_for_backward(flat, None if ctx.again else weight)
        ctx.layer, ctx.left_t, ctx.right = layer, left_t, right
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), layer, left_t, right = ctx.saved_tensors, ctx.layer, ctx.left_t, ctx.right
        rank = len(right)
        g = gradient.reshape(-1, gradient.shape[-1]).to(layer.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            weight = left_t.t() @ right if ctx.again else weight
            dx = g @ weight if weight is not None else (g @ left_t.t()) @ right
            dx = dx.to(gradient.dtype).reshape(*gradient.shape[:-1], -1)
        # Neither gᵀx nor a factor's whole gradient is ever made: the updates' pass through r dimensions each. What
        # they multiply on the other side, `left_A right'` and `left' right_B`, is no larger than they are.
        left_A, left_B = layer.left_A[:, :rank].to(layer.dtype), layer.left_B.to(layer.dtype)
        right_A, right_B = layer.right_A.to(layer.dtype), layer.right_B[:rank].to(layer.dtype)
        r = len(left_A)
        u = x @ torch.cat([left_A @ right, right_A]).t()
        v = g @ torch.cat([left_B.t(), right_B.t() @ left_t]).t()
        gu, vx = g.t() @ u, v.t() @ x
        layer.left_B.grad += gu[:, :r]
        layer.right_A.grad += vx[r:]
        layer.left_A.grad[:, :rank] += vx[:r] @ right.t()
        layer.right_B.grad[:rank] += left_t @ gu[:, r:]
        return dx, None, None, None, None
