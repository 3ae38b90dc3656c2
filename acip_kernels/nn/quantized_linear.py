"""`QuantizedLinear`: a linear layer whose weight is kept in 8 or 4 bits a number, with scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import quantize as q
from ..ops.plain_weight import plain_weight
from . import fused  # which knows this class in turn


class QuantizedLinear(nn.Module):
    """`y = x Wᵀ + bias` for a `W [out_features, in_features]` in one of the formats of `ops.quantize`.

    A drop-in for a frozen `nn.Linear`, alone or as a child of `LowRankLinear` and `PivotLinear`. Gradients flow to the
    input and the bias; the weight is no parameter.

    Its state is `qweight`, `scales` and (int4, unless symmetric) `zeros`, buffers as `ops.quantize` describes them,
    `bias [out_features]`, and `weight [0]`, which holds nothing: a loader that takes this layer for a dense one finds a
    tensor of the wrong size under the dense layer's name and says so, where it would otherwise start from random
    weights. Its dtype is the layer's: that of the bias and of what `nn.Module.to` was told. Codes and scales keep
    theirs.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`; features may be 0.
        kind: "int8", "int4" or "fp8". group: 32, 64 or 128 input features to a scale (int4). symmetric: no `zeros`
            (int4).

    A new layer's weight is zero.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    weight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: str,
        group: int = 64,
        symmetric: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        q.check_options(kind, group, symmetric)
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"QuantizedLinear: {name} must be an int of at least 0, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.group = kind, 0 if kind in q.PER_ROW else group
        self.symmetric = kind in q.PER_ROW or symmetric
        for name, (shape, dtype_) in q.shapes(out_features, in_features, kind, group, symmetric).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype_, device=device))
        if self.symmetric:
            self.register_buffer("zeros", None)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_quantized(
        cls,
        quantized: q.Quantized,
        in_features: int,
        bias: Tensor | None = None,
        *,
        group: int = 64,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A layer that holds the tensors of `quantized`, a weight `[out_features, in_features]`, and `bias` themselves.

        group: of int4. dtype: of the layer; None for the bias's, or the default dtype.
        """
        kind = next((kind for kind, dtype in q.PER_ROW.items() if quantized.qweight.dtype == dtype), "int4")
        dtype = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        out_features, symmetric = len(quantized.qweight), kind == "int4" and quantized.zeros is None
        options = {"kind": kind, "group": group, "symmetric": symmetric}
        layer = cls(in_features, out_features, bias is not None, **options, device="meta", dtype=dtype)
        for name, tensor in quantized._asdict().items():
            wanted = getattr(layer, name)
            if tensor is None and wanted is None:
                continue
            if tensor is None or wanted is None or (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"QuantizedLinear: {name} of an {kind} weight [{out_features}, {in_features}] must be "
                    f"{_described(wanted)}, got {_described(tensor)}"
                )
            setattr(layer, name, tensor.detach())
        if bias is not None:
            if bias.shape != (out_features,):
                raise ValueError(f"QuantizedLinear: bias must be [{out_features}], got {list(bias.shape)}")
            layer.bias = nn.Parameter(bias.detach())
        layer.weight = torch.empty(0, device=quantized.qweight.device, dtype=dtype)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, kind: str, *, group: int = 64, symmetric: bool = False) -> QuantizedLinear:
        """`linear`, its weight rounded to nearest (`ops.quantize.quantize`, which says what is refused)."""
        quantized = q.quantize(linear.weight, kind, group, symmetric)
        return cls.from_quantized(
            quantized, linear.in_features, linear.bias, group=group, dtype=linear.weight.dtype
        ).train(linear.training)

    @property
    def bits(self) -> int:
        """Of each number."""
        return 4 if self.kind == "int4" else 8

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[out_features, in_features]` that this layer stands for, in `dtype` or the layer's own."""
        dtype = self.weight.dtype if dtype is None else dtype
        return plain_weight(self.qweight, self.scales, self.zeros, cols=self.in_features, group=self.group, dtype=dtype)

    # ---- see `nn.fused.Fused`

    prepared = None

    def spec(self) -> tuple[int, ...]:
        return fused.dense_spec(self)

    def add_tensors(self, x: Tensor, tensors: list[Tensor]) -> bool:
        return fused.add_dense(self, x, tensors, forward=True)

    def watched(self) -> list[tuple[nn.Module, bool]]:
        return fused.watched(self)

    # ----

    def forward(self, x: Tensor) -> Tensor:
        y = fused.call(self, x)
        return F.linear(x, self.dequantize(x.dtype), self.bias) if y is None else y

    def _apply(self, fn, recurse=True):
        """What `to`, `half`, `cuda` and the like do to tensors; codes and scales go along, but keep their dtype."""
        before = {name: getattr(self, name) for name in ("qweight", "scales")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.dtype != tensor.dtype:
                # Not cast back: what was rounded stays rounded.
                setattr(self, name, tensor.to(after.device))
        return self

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
        group = f", group={self.group}, symmetric={self.symmetric}" if self.bits == 4 else ""
        return text + self.kind + group


def dense_weight(linear: nn.Linear | QuantizedLinear, dtype: torch.dtype | None = None) -> Tensor:
    """The weight `[out_features, in_features]` of an `nn.Linear` or `QuantizedLinear`, in `dtype` or its own."""
    if isinstance(linear, QuantizedLinear):
        return linear.dequantize(dtype)
    return linear.weight if dtype is None else linear.weight.to(dtype)


def _described(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
