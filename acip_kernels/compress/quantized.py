"""A layer's factors as quantized weights: each rounded with what the others make of its errors in mind."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.nested_linear import balanced
from ..nn.pivot_linear import pack_bits
from ..ops.quantize import Scheme, dequantize, quantize
from .basis import damped_cholesky
from .pivot import pivot_form

ROUNDINGS = ("feedback", "nearest")
# Of a dimension, in mean variances.
_LEAST_VARIANCE = 1e-5


def quantized_tensors(
    left: Tensor, right: Tensor, form: str, scheme: Scheme, covariance: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of the matrix `left [out, ρ] right [ρ, in]` in `form`, quantized.

    Without a covariance, every number is rounded to the nearest code. Given the `covariance [in, in]` of the inputs,
    errors are those of the outputs, and rounding takes them back where it can (see `ops.quantize.quantize`): first
    `Vh`, or `P`, in the metric of the inputs; then `U`, or `C`, which is fitted anew by least squares to what the
    rounded first one makes of them, is rounded in the metric of that. That matters most for the pivoted form: errors
    of `P` pass through `C`, and its inputs, the pivot rows' outputs, are far from uncorrelated.

    Returns `{"Vh.qweight": …, "Vh.scales": …, …}` by the names of the form's parts (none for "dense"), with `is_pivot`
    for "pivoted", as `materialize.layer_tensors`.
    """
    if form == "dense":
        return _named("", quantize(left @ right, **scheme.options, covariance=covariance))
    rows: slice | Tensor
    if form == "factors":
        # An adapter's parts, merged exactly, have whatever norms training gave them; one large column of U would
        # cost all that share its scale.
        second, first = balanced(left, torch.ones_like(left[0]), right)
        rows, names = slice(None), ("Vh.", "U.")
    else:
        first, second, pivots = pivot_form(left, right)
        rows, names = ~pivots, ("P.", "C.")
    rounded = quantize(first, **scheme.options, covariance=covariance)
    metric = None
    if covariance is not None and len(right):
        made = dequantize(*rounded, cols=right.shape[1], group=scheme.group, dtype=torch.float64)
        moved = made @ covariance.to(made)
        metric = moved @ made.t()
        L = damped_cholesky(metric, metric.device)
        if L is not None:
            wanted = left[rows].double() @ (right.double() @ moved.t())
            second = torch.cholesky_solve(wanted.t(), L).t()
    tensors = _named(names[0], rounded) | _named(names[1], quantize(second, **scheme.options, covariance=metric))
    return tensors if form == "factors" else tensors | {"is_pivot": pack_bits(pivots)}


def remembered_covariance(Vh: Tensor, variances: Tensor | None = None) -> Tensor:
    """The covariance `[in, in]` in which the rows of `Vh [k, in]`, all that there are, are orthonormal; float64.

    A decomposition that was whitened by the inputs' covariance (`basis.whitened_svd`) has such rows: of a layer with no
    more inputs than outputs, this is that covariance again. In the directions that a wider layer's `Vh` does not see,
    inputs scaled to unit variance by `variances [in]` are taken to be uncorrelated, of the variance that all then have
    in the mean; without `variances`, inputs as they are, of the mean variance of the directions that are seen. For a
    plain decomposition it is the identity. Training and narrow dtypes change the rows a little, and scaling them to
    unit norm weighs directions otherwise; it stays far nearer to the truth than the identity.
    """
    Vh = Vh.double()
    if not bool(torch.isfinite(Vh).all()):
        raise ValueError("a layer's Vh holds NaN or infinite values")
    if not bool(Vh.any()):
        return torch.eye(Vh.shape[1], dtype=Vh.dtype, device=Vh.device)
    k, cols = Vh.shape
    scale = None
    if variances is not None and k < cols and bool(variances.any()):
        variances = variances.to(Vh)
        # An input that never came has some variance, as a damped covariance has.
        scale = variances.clamp_min(_LEAST_VARIANCE * float(variances.mean())).sqrt()
        Vh = Vh * scale
    gram = Vh @ Vh.t()
    damping = 0.0
    while True:
        L, failed = torch.linalg.cholesky_ex(gram + damping * torch.diag(gram.diagonal().mean().expand(k)))
        if not failed:
            break
        damping = max(10 * damping, 1e-12)
    pseudo_inverse = torch.cholesky_solve(Vh, L).t()  # Vhᵀ (Vh Vhᵀ)⁻¹
    covariance = pseudo_inverse @ pseudo_inverse.t()
    if k < cols:
        unseen = torch.eye(cols, dtype=Vh.dtype, device=Vh.device) - pseudo_inverse @ Vh
        seen = float(covariance.diagonal().sum())
        each = seen / k if scale is None else max((cols - seen) / (cols - k), _LEAST_VARIANCE)
        covariance += each * (unseen + unseen.t()) / 2
    return covariance if scale is None else scale[:, None] * covariance * scale


def rounding_metric(
    Vh: Tensor, S: Tensor, variances: Tensor | None, covariance: Tensor | None, rounding: str
) -> Tensor | None:
    """What `quantized_tensors` takes as covariance: the one that is known, else the remembered one; by `rounding`."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"quantize_rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if rounding == "nearest":
        return None
    if covariance is not None:
        return covariance
    # Without singular values (a model that was tuned at one size), rows have the scales that those would have.
    apart = bool(S.max() > S.min())
    return remembered_covariance(Vh if apart else torch.nn.functional.normalize(Vh.double()), variances)


def _named(prefix: str, quantized) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in quantized._asdict().items() if tensor is not None}
