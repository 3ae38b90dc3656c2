"""A layer's factors as quantized weights: each rounded with what the others make of its errors in mind."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.pivot_linear import pack_bits
from ..ops.quantize import Scheme, dequantize, quantize
from .basis import damped_cholesky
from .pivot import pivot_form


def quantized_tensors(
    left: Tensor, right: Tensor, form: str, scheme: Scheme, covariance: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of the matrix `left [out, ρ] right [ρ, in]` in `form`, quantized.

    Scales are searched by the squared error. Given the `covariance [in, in]` of the inputs, errors are those of the
    outputs, and rounding takes them back where it can (see `ops.quantize.quantize`): first `Vh`, or `P`, in the metric
    of the inputs; then `U`, or `C`, which is fitted anew by least squares to what the rounded first one makes of them,
    is rounded in the metric of that.

    Two factors are free up to a scale of each rank: `U` gets columns of equal largest magnitude, as a scale that many
    columns share is then wasted on none; `Vh`, whose rows have scales of their own, the rest.

    Returns `{"Vh.qweight": …, "Vh.scales": …, …}` by the names of the form's parts (none for "dense"), with `is_pivot`
    for "pivoted", as `materialize.layer_tensors`.
    """
    if form == "dense":
        return _named("", _rounded(left @ right, scheme, covariance))
    if form == "factors":
        largest = left.abs().amax(0) if len(left) else left.new_ones(left.shape[1])
        largest = torch.where(largest > 0, largest, 1)
        first, second, rows, names = right * largest[:, None], left / largest, slice(None), ("Vh.", "U.")
    else:
        first, second, pivots = pivot_form(left, right)
        rows, names = ~pivots, ("P.", "C.")
    first = _rounded(first, scheme, covariance)
    metric = None
    if covariance is not None and bool(covariance.any()) and len(right):
        made = dequantize(*first, cols=right.shape[1], group=scheme.group, dtype=torch.float64)
        moved = made @ covariance.to(made)
        metric = moved @ made.t()
        L = damped_cholesky(metric, metric.device)
        if L is not None:
            wanted = left[rows].double() @ (right.double() @ moved.t())
            second = torch.cholesky_solve(wanted.t(), L).t()
    tensors = _named(names[0], first) | _named(names[1], _rounded(second, scheme, metric))
    return tensors if form == "factors" else tensors | {"is_pivot": pack_bits(pivots)}


def _rounded(weight: Tensor, scheme: Scheme, covariance: Tensor | None):
    return quantize(weight, **scheme.options, search=True, covariance=covariance)


def _named(prefix: str, quantized) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in quantized._asdict().items() if tensor is not None}
