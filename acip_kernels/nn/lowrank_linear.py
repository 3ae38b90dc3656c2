"""`LowRankLinear`: a deployed low-rank layer, two real `nn.Linear` children with one fused forward."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import skip_init

from ..ops import lowrank_linear
from . import fused
from .quantized_linear import dense_weight


class LowRankLinear(nn.Module):
    """`y = U(Vh(x))`: a linear layer `[out_features, in_features]` of rank `rank`, as two factors.

    Its state is `Vh.weight [rank, in_features]`, `U.weight [out_features, rank]`, `U.bias [out_features]`, and
    `weight [0]`, which holds nothing: a loader that takes this layer for a dense one finds a tensor of the
    wrong size under the dense layer's name and says so, where it would otherwise start from random weights.

    The children are ordinary `nn.Linear`, so that hooks, adapters, quantizers, offloading and sharding work on
    them. Whatever hangs on a child is honoured: the fused operator runs only where both are plain (see
    `can_fuse`); otherwise the forward is the two children, one after the other.

    Rank 0 is allowed: such a layer is its bias.

    Args:
        in_features, out_features, rank, bias, device, dtype: as for `nn.Linear`.
        backend: "auto" takes the native operator where `nn.fused.takes` the input, on a GPU the Triton kernels where
            `acip tune` has measured them to be faster, and the two children elsewhere; a name runs that backend of
            `lowrank_linear` and raises where it cannot.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 1),
            ("out_features", out_features, 1),
            ("rank", rank, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"LowRankLinear: {name} must be an int of at least {least}, got {value!r}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.backend = backend
        options = {"device": device or torch.get_default_device(), "dtype": dtype}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # rank 0
            self.Vh = skip_init(nn.Linear, in_features, rank, bias=False, **options)
            self.U = skip_init(nn.Linear, rank, out_features, bias=bias, **options)
        self.register_buffer("weight", torch.empty(0, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose product is distributed about as a new `nn.Linear`'s weight; a bias of zeros."""
        if self.rank:
            nn.init.normal_(self.Vh.weight, std=self.in_features**-0.5)
            nn.init.normal_(self.U.weight, std=(3 * self.rank) ** -0.5)
        if self.U.bias is not None:
            nn.init.zeros_(self.U.bias)

    @classmethod
    def from_factors(cls, Vh: Tensor, U: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> LowRankLinear:
        """A layer that holds `Vh [rank, in_features]`, `U [out_features, rank]`, `bias [out_features]` themselves."""
        if Vh.dim() != 2 or U.dim() != 2 or U.shape[1] != Vh.shape[0]:
            raise ValueError(
                f"LowRankLinear: Vh must be [rank, in_features] and U [out_features, rank], "
                f"got {list(Vh.shape)} and {list(U.shape)}"
            )
        if bias is not None and bias.shape != U.shape[:1]:
            raise ValueError(f"LowRankLinear: bias must be [{U.shape[0]}], got {list(bias.shape)}")
        rank, in_features = Vh.shape
        layer = cls(in_features, U.shape[0], rank, bias is not None, device="meta", dtype=Vh.dtype, backend=backend)
        layer.Vh.weight = nn.Parameter(Vh.detach())
        layer.U.weight = nn.Parameter(U.detach())
        if bias is not None:
            layer.U.bias = nn.Parameter(bias.detach())
        layer.weight = torch.empty(0, device=Vh.device, dtype=Vh.dtype)
        return layer

    def can_fuse(self, x: Tensor) -> bool:
        """Whether reading the children's weights is the same as calling them (see `nn.fused`)."""
        return fused.add_factors(self.Vh, self.U, x, []) and not _has_any_global_hook()

    # ---- see `nn.fused.Fused`

    prepared = None

    def spec(self) -> tuple[int, ...]:
        """What a prepared call's kernel is chosen by; see `nn.fused`."""
        return fused.factors_spec(self._modules["Vh"], self._modules["U"])

    def add_tensors(self, x: Tensor, tensors: list[Tensor]) -> bool:
        return fused.add_factors(self._modules["Vh"], self._modules["U"], x, tensors)

    def watched(self) -> list[tuple[nn.Module, bool]]:
        return fused.watched(self, own_hooks=False)

    # ----

    def forward(self, x: Tensor) -> Tensor:
        if self.backend == "auto":
            y = fused.call(self, x)
            if y is not None:
                return y
        elif self.rank and not torch.compiler.is_exporting() and self.can_fuse(x):
            return lowrank_linear(x, self.Vh.weight, self.U.weight, None, self.U.bias, backend=self.backend)
        return self.U(self.Vh(x))

    def effective_weight(self) -> Tensor:
        """`U Vh [out_features, in_features]`, the dense weight that this layer stands for, in float32 or better."""
        dtype = torch.promote_types(self.U.weight.dtype, torch.float32)
        return F.linear(dense_weight(self.U, dtype), dense_weight(self.Vh, dtype).t())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
