"""Deployed layers of more tokens than `triton.py` takes on a GPU: matrix products, one after the other.

Products are torch's. What has company is a pass of its own beside them (`ops.triton_products`): a quantized weight is
made a plain one; of a pivoted layer both products are stored side by side, then moved to their places. Where
`plan.product_plan` expects it to be faster, for few tokens, a product of ours does it by itself: codes become numbers
in registers, outputs are stored at their places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Product
from ..triton_products import Matrix, dequantize, forward_product, gather, invert, pays
from . import triton
from .op import CONCATENATE, DENSE, GATED_MLP, PIVOTED, PLAIN


def forward(x: Tensor, tensors: list[Tensor], spec: list[int], mode: int, way: str | None = None) -> Tensor:
    """As the reference, for float32, bfloat16 or float16 `x [..., in]` of any number of tokens.

    way: of more than 16 tokens, "ours" or "vendor" for all products with company; None lets `plan` choose.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= triton.MOST_TOKENS:
        return triton.forward(x, tensors, spec, mode)
    layers = triton.read_layers(tensors, spec)
    siblings = layers[:2] if mode == GATED_MLP else layers
    y = _side_by_side(rows, siblings, way)
    if mode != CONCATENATE:
        y = triton.swiglu(y)
    if mode == GATED_MLP:
        y = _side_by_side(y, layers[2:], way)
    return y.view(*x.shape[:-1], y.shape[-1])


def _side_by_side(x: Tensor, layers: list[triton.Layer], way: str | None) -> Tensor:
    y = x.new_empty(len(x), sum(layer.out for layer in layers))
    for layer, part in zip(layers, y.split([layer.out for layer in layers], 1), strict=True):
        (pivoted if layer.form == PIVOTED else _plain)(x, layer, part, way)
    return y


def _plain(x: Tensor, layer: triton.Layer, y: Tensor, way: str | None) -> None:
    if layer.form == DENSE:
        product(x, layer.first, layer.bias, y, way)
        return
    z = product(x, layer.first, None, x.new_empty(len(x), layer.rank), way)
    if layer.s is not None:
        z = (z * layer.s).to(z.dtype)
    product(z, layer.second, layer.bias, y, way)


def product(x: Tensor, weight: Matrix, bias: Tensor | None, y: Tensor, way: str | None = None) -> Tensor:
    """`y [tokens, rows] = x weightᵀ + bias`."""
    if weight.kind != PLAIN and _is_ours(x, [weight], 0, way):
        return forward_product(x, weight, bias=bias, y=y)
    plain = _numbers(weight, x.dtype).t()
    return torch.mm(x, plain, out=y) if bias is None else torch.addmm(bias, x, plain, out=y)


def pivoted(x: Tensor, layer: triton.Layer, y: Tensor, way: str | None = None) -> Tensor:
    """Both products of a pivoted layer into `y [tokens, out]`; each output is stored at its place."""
    assert layer.second is not None and layer.place is not None
    # Torch's products are read again and written to their places: one pass, beside which the places' order is nothing.
    if _is_ours(x, [layer.first, layer.second], 2 * y.numel() * y.element_size(), way):
        z = x.new_empty(len(x), layer.rank)
        forward_product(x, layer.first, bias=layer.bias, place=layer.place[: layer.rank], y=y, kept=z)
        forward_product(z, layer.second, bias=layer.bias, place=layer.place[layer.rank :], y=y)
        return y
    # Side by side in the order that they are made in, then each row in that of the outputs.
    both = x.new_empty(y.shape)
    z, others = both[:, : layer.rank], both[:, layer.rank :]
    torch.mm(x, _numbers(layer.first, x.dtype).t(), out=z)
    torch.mm(z, _numbers(layer.second, x.dtype).t(), out=others)
    return gather(both, invert(layer.place), layer.bias, y)


def _numbers(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """A plain weight, of a quantized one made in one pass over its codes."""
    if weight.kind == PLAIN:
        return weight.data
    return dequantize(weight, dtype)


def _is_ours(x: Tensor, weights: list[Matrix], beside: int, way: str | None) -> bool:
    if way is not None:
        return way == "ours"
    products = [Product(len(x), w.rows, w.cols, x.element_size(), w.kind, w.group) for w in weights]
    return pays(products, x, beside)
