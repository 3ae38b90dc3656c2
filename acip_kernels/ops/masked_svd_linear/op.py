"""`masked_svd_linear`: the operator of a layer while ACIP prunes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import common, extension
from ..quantize import Quantized
from . import native, quantized, reference
from .problem import Adapter

OPERATOR = "masked_svd_linear"
# In what the Triton backend was measured to be the faster one on a GPU.
MEASURED = (torch.bfloat16,)
BACKENDS = {"reference": reference} | ({"native": native} if extension.available() else {})
try:
    from . import triton
except ImportError:  # a machine without Triton
    pass
else:
    BACKENDS["triton"] = triton


def masked_svd_linear(
    x: Tensor,
    Vh: Tensor | Quantized,
    U: Tensor | Quantized,
    S: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    mask_scale: float = 0.02,
    rows: Tensor | None = None,
    adapter: Adapter | None = None,
    save_z: bool = True,
    group: int = 64,
    backend: str = "auto",
) -> Tensor:
    """`((x Vhᵀ) ⊙ S ⊙ β) Uᵀ + bias` with `β_i = 1` where `mask_i > 0`, and ACIP's straight-through gradient for `mask`.

    Args:
        x: `[..., in_features]`, any number of leading dimensions.
        Vh: `[rank, in_features]`, in x's dtype; frozen.
        U: `[out_features, rank]`, in x's dtype; frozen. Both may be quantized instead (`ops.quantize.quantize`); then
            there is no adapter here, which is a sum of its own, and z is kept.
        S: `[rank]` singular values, float32 (float64 for float64 `x`); frozen.
        mask: `[rank]` mask parameters, dtype as `S`.
        bias: `[out_features]` or None, in x's dtype; frozen.
        mask_scale: `c`, the value that mask parameters start at; their gradient is `1/c` times that of `β`.
        rows: int64 `[rank]` or None. The factors may be those of a few entries of a longer mask: `mask` is then
            `[full_rank]`, `rows` says which, and its gradient is zero elsewhere.
        adapter: a LoRA adapter whose product is added, see `Adapter`; its `A` and `B`, in `S`'s dtype, are trained.
            When it is joined, `Vh` is `[r + rank, in_features]` and `U` `[out_features, r + rank]`.
        save_z: keep `x Vhᵀ` (as many numbers as tokens · rank) for the backward pass; otherwise it is computed again
            there, `2 · tokens · in_features · rank` operations.
        group: of int4 factors, columns to a scale.
        backend: "auto" chooses; a name runs that one or raises.

    Returns:
        `[..., out_features]` in x's dtype. Gradients exist for `x`, `mask`, `A` and `B` alone; asking for one of a
        frozen argument raises.

    Raises:
        ValueError: a shape, device, `mask_scale` or backend name that does not fit; rank 0; a frozen argument that
            requires a gradient.
        TypeError: a dtype that does not fit.
        RuntimeError: a backend that is not available here.

    Source: "Choose Your Model Size" (arXiv 2502.01717), straight-through estimator of its section on score maps.
    """
    if isinstance(Vh, Quantized) or isinstance(U, Quantized):
        if adapter is not None or not save_z:
            raise ValueError(
                f"{OPERATOR}: quantized factors take neither an adapter, whose product is to be added to this one, nor "
                "save_z=False"
            )
        x, bias = common.autocast(x, bias)
        live = mask if rows is None else mask[rows]
        return quantized.forward(x, Vh, U, S, live, bias, mask_scale, group, backend)
    x, Vh, U, bias = common.autocast(x, Vh, U, bias)
    _check(x, Vh, U, S, mask, bias, mask_scale, rows, adapter)
    chosen = common.choose_backend(OPERATOR, backend, BACKENDS, x, gpu=MEASURED)
    if chosen is native and not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter):
        # The same without an operator of Python's, which costs as much as a small layer's products.
        return native.linear(x, Vh, U, S, mask, bias, rows, adapter, mask_scale, save_z)
    arguments = (*Adapter.arguments(adapter), mask_scale, save_z, backend)
    return torch.ops.acip.masked_svd_linear(x, Vh, U, S, mask, bias, rows, *arguments)[0]


def _check(x, Vh, U, S, mask, bias, mask_scale, rows, adapter) -> None:
    r = 0
    if adapter is not None:
        for name, tensor in (("A", adapter.A), ("B", adapter.B)):
            if not isinstance(tensor, Tensor) or tensor.dim() != 2:
                raise ValueError(f"{OPERATOR}: the adapter's {name} must be a matrix")
        r = adapter.rank
        if r < 1 or adapter.B.shape[1] != r:
            raise ValueError(
                f"{OPERATOR}: the adapter must be A [r, in_features] and B [out_features, r] with r >= 1, "
                f"got {list(adapter.A.shape)} and {list(adapter.B.shape)}"
            )
        if not 0 <= adapter.dropout < 1 or (adapter.dropout and adapter.seed is None):
            raise ValueError(f"{OPERATOR}: the adapter's dropout must be in [0, 1), and needs a seed above 0")
    joined = r if adapter is not None and adapter.joined else 0
    if joined and isinstance(Vh, Tensor) and isinstance(U, Tensor) and Vh.dim() == U.dim() == 2:
        common.check_factors(OPERATOR, x, Vh[r:], U[:, r:], bias, S=S, **({} if rows is not None else {"mask": mask}))
    else:
        common.check_factors(OPERATOR, x, Vh, U, bias, S=S, **({} if rows is not None else {"mask": mask}))
    precise = torch.promote_types(x.dtype, torch.float32)
    trained = {"S": S, "mask": mask}
    if adapter is not None:
        trained |= {"A": adapter.A, "B": adapter.B}
        if adapter.A.shape[1] != x.shape[-1] or adapter.B.shape[0] != U.shape[0]:
            raise ValueError(
                f"{OPERATOR}: the adapter must be A [r, {x.shape[-1]}] and B [{U.shape[0]}, r], "
                f"got {list(adapter.A.shape)} and {list(adapter.B.shape)}"
            )
    for name, tensor in trained.items():
        # In bfloat16 the mask's steps would be lost without a word.
        if tensor.dtype != precise:
            raise TypeError(f"{OPERATOR}: {name} must be {precise} as x is {x.dtype}, got {tensor.dtype}")
    if rows is not None and (rows.dtype != torch.int64 or rows.shape != S.shape or mask.dim() != 1):
        raise ValueError(f"{OPERATOR}: rows must be int64 {list(S.shape)} and mask a vector")
    if not 0 < mask_scale < math.inf:
        raise ValueError(f"{OPERATOR}: mask_scale must be positive and finite, got {mask_scale}")
    if torch.is_grad_enabled():
        for name, tensor in (("Vh", Vh), ("U", U), ("S", S), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{OPERATOR}: {name} requires a gradient, but it is frozen; detach it")


def _of_rows(backend, mask: Tensor, rows: Tensor | None) -> tuple[Tensor, dict]:
    """The mask that `backend` takes, and what else: a kernel looks up a longer mask's rows by itself."""
    if rows is None:
        return mask, {}
    return (mask, {"rows": rows}) if backend is BACKENDS.get("triton") else (mask.index_select(0, rows), {})


def _adapter(A, B, seed, scaling, joined, dropout) -> Adapter | None:
    return None if A is None else Adapter(A, B, scaling, joined, dropout, seed)


@torch.library.custom_op("acip::masked_svd_linear", mutates_args=())
def _operator(
    x: Tensor,
    Vh: Tensor,
    U: Tensor,
    S: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    joined: bool,
    dropout: float,
    mask_scale: float,
    save_z: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = common.choose_backend(OPERATOR, backend, BACKENDS, x, gpu=MEASURED)
    adapter = _adapter(A, B, seed, scaling, joined, dropout)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    live, of_rows = _of_rows(chosen, mask, rows)
    z = chosen.products(tokens, Vh, adapter)
    y = chosen.forward(z, U, S, live, bias, adapter, **of_rows).view(*x.shape[:-1], U.shape[0])
    return y, (z if save_z else z.new_empty(0, z.shape[1]))


@_operator.register_fake
def _(x, Vh, U, S, mask, bias, rows, A, B, seed, scaling, joined, dropout, mask_scale, save_z, backend):
    r = 0 if A is None or joined else A.shape[0]
    tokens = math.prod(x.shape[:-1]) if save_z else 0
    return x.new_empty((*x.shape[:-1], U.shape[0])), x.new_empty((tokens, Vh.shape[0] + r))


@torch.library.custom_op("acip::masked_svd_linear_backward", mutates_args=())
def _backward_operator(
    g: Tensor,
    x: Tensor | None,
    z: Tensor,
    Vh: Tensor,
    U: Tensor,
    S: Tensor,
    mask: Tensor,
    rows: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    joined: bool,
    dropout: float,
    mask_scale: float,
    save_z: bool,
    need_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = common.choose_backend(OPERATOR, backend, BACKENDS, g, gpu=MEASURED)
    adapter = _adapter(A, B, seed, scaling, joined, dropout)
    gradients = g.reshape(-1, g.shape[-1])
    tokens = None if x is None else x.reshape(-1, x.shape[-1]).contiguous()
    live, of_rows = _of_rows(chosen, mask, rows)
    if not save_z:
        z = chosen.products(tokens, Vh, adapter)
    dx, dmask, dA, dB = chosen.backward(gradients, tokens, z, Vh, U, S, live, mask_scale, adapter, need_x, **of_rows)
    if rows is not None and not of_rows:
        dmask = torch.zeros_like(mask).index_copy_(0, rows, dmask)
    if dA is None:
        dA, dB = g.new_empty(0), g.new_empty(0)
    else:  # the adapters are float32 whatever the products are
        dA, dB = dA.to(A.dtype), dB.to(B.dtype).contiguous()
    dx = g.new_empty(0) if dx is None else dx.view(*g.shape[:-1], dx.shape[1])
    return dx, dmask, dA, dB


@_backward_operator.register_fake
def _(g, x, z, Vh, U, S, mask, rows, A, B, seed, scaling, joined, dropout, mask_scale, save_z, need_x, backend):
    dx = g.new_empty((*g.shape[:-1], Vh.shape[1]) if need_x else 0)
    dA, dB = (g.new_empty(0), g.new_empty(0)) if A is None else (torch.empty_like(A), torch.empty_like(B))
    return dx, torch.empty_like(mask), dA, dB


def _setup_context(ctx, inputs, output):
    x, Vh, U, S, mask, _, rows, A, B, seed, *options = inputs
    ctx.options = options
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)  # zeros for z
    # The input is needed for the adapter's gradient, and where z has to be made again.
    save_x = A is not None or not options[-2]
    ctx.save_for_backward(x if save_x else None, z, Vh, U, S, mask, rows, A, B, seed)


def _backward(ctx, g, _):
    *options, backend = ctx.options
    need_x = ctx.needs_input_grad[0]
    dx, dmask, dA, dB = torch.ops.acip.masked_svd_linear_backward(g, *ctx.saved_tensors, *options, need_x, backend)
    needs = ctx.needs_input_grad
    gradients = [None] * 16
    gradients[0] = dx if need_x else None
    gradients[4] = dmask if needs[4] else None
    gradients[7], gradients[8] = (dA if needs[7] else None), (dB if needs[8] else None)
    return tuple(gradients)


_operator.register_autograd(_backward, setup_context=_setup_context)


def _product_flops(tokens_shape, Vh_shape, U_shape) -> int:
    return 2 * math.prod(tokens_shape[:-1]) * Vh_shape[0] * (Vh_shape[1] + U_shape[0])


def _adapter_flops(tokens_shape, Vh_shape, U_shape, A_shape, joined) -> int:
    """Of the adapter's two products, if they are not counted with the factors'."""
    if A_shape is None or joined:
        return 0
    return 2 * math.prod(tokens_shape[:-1]) * A_shape[0] * (Vh_shape[1] + U_shape[0])


@register_flop_formula(torch.ops.acip.masked_svd_linear)
def _flops(x_shape, Vh_shape, U_shape, S, mask, bias, rows, A, B, seed, scaling, joined, *_, out_shape=None, **__):
    return _product_flops(x_shape, Vh_shape, U_shape) + _adapter_flops(x_shape, Vh_shape, U_shape, A, joined)


@register_flop_formula(torch.ops.acip.masked_svd_linear_backward)
def _backward_flops(
    g_shape, x, z, Vh_shape, U_shape, S, mask, rows, A, B, seed, scaling, joined, dropout, c, save_z, need_x, *_,
    out_shape=None, **__,
):  # fmt: skip
    tokens, rank, in_features, out = math.prod(g_shape[:-1]), Vh_shape[0], Vh_shape[1], U_shape[0]
    r = 0 if A is None else A[0]
    computed = rank if joined else rank + r
    again = 0 if save_z else in_features
    # h, dx, z again; the adapter's two weight gradients.
    flops = 2 * tokens * computed * (out + (in_features if need_x else 0) + again)
    return flops + 2 * tokens * r * (in_features + out)
