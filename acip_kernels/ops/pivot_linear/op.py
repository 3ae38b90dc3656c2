"""`pivot_linear`: the operator of a deployed layer in pivoted form (ACIP.md section 4, arXiv 2501.19090)."""

from __future__ import annotations

from torch import Tensor

from .. import common, extension
from ..fused_linear.cuda import missing
from ..fused_linear.op import DTYPES
from . import cuda, native, reference

OPERATOR = "pivot_linear"
BACKENDS = {"reference": reference.forward}
if extension.available():
    BACKENDS["native"] = native.forward
try:
    from . import triton
except ImportError:  # a machine without Triton
    pass
else:
    BACKENDS["triton"] = triton.forward
if missing is None:
    BACKENDS["cuda"] = cuda.forward


def pivot_linear(
    x: Tensor, P: Tensor, C: Tensor, inverse: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """A linear layer of rank ρ whose weight is kept as ρ of its rows and what combines them to the others.

    With `z = x Pᵀ`, the outputs of the pivot rows are `z` and those of the others `z Cᵀ`.

    Args:
        x: `[..., in_features]`, any number of leading dimensions.
        P: `[ρ, in_features]`, the pivot rows, in x's dtype.
        C: `[out_features - ρ, ρ]`, in x's dtype; no row of it where every output is a pivot.
        inverse: int64 `[out_features]`, for every output its place in the pivots followed by the others.
        bias: `[out_features]` or None, in x's dtype.
        backend: "auto" chooses; a name runs that one or raises.

    Returns:
        `[..., out_features]` in x's dtype; z is rounded to it. Differentiable in every floating tensor.

    Raises:
        ValueError: a shape, device or backend name that does not fit; rank 0.
        TypeError: a dtype that does not fit.
        RuntimeError: a backend that is not available here.
    """
    x, P, C, bias = common.autocast(x, P, C, bias)
    implementation = common.choose_backend(OPERATOR, backend, BACKENDS, x if isinstance(x, Tensor) else None, DTYPES)
    common.check_factors(OPERATOR, x, P, C, None, names=("P", "C"))
    out_features = P.shape[0] + C.shape[0]
    if inverse.shape != (out_features,) or inverse.is_floating_point():
        raise ValueError(
            f"{OPERATOR}: inverse must be int64 [{out_features}] as P is {list(P.shape)} and C {list(C.shape)}, "
            f"got {inverse.dtype} {list(inverse.shape)}"
        )
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"{OPERATOR}: bias must be {x.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}")
    return implementation(x, P, C, inverse, bias)
