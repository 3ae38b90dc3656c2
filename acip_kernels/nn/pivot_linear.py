"""`PivotLinear`: a deployed low-rank layer in pivoted form, two real `nn.Linear` children and a permuted store."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..ops.pivot_linear.reference import place
from . import fused
from .quantized_linear import dense_weight


class PivotLinear(nn.Module):
    """`y[pivots] = P x`, `y[others] = C y[pivots]`, `+ bias`: a layer of rank ρ as `ρ (out + in - ρ)` numbers.

    A matrix of rank ρ has ρ linearly independent rows, the pivots; every other row is a combination of them
    (Pivoting Factorization, arXiv 2501.19090). The same function as two factors compute, in ρ² fewer numbers and as
    many fewer multiplications.

    Its state is `P.weight [rank, in_features]`, `C.weight [out_features - rank, rank]`, `bias [out_features]`,
    `is_pivot`, uint8 `[ceil(out_features / 8)]`, a bit for every output, the lowest first, and `weight [0]`,
    which holds nothing: a loader that takes this layer for a dense one finds a tensor of the wrong size under the dense
    layer's name, where it would otherwise start from random weights.

    Args:
        in_features, out_features, rank, bias, device, dtype: as for `nn.Linear`; `1 <= rank <= out_features`.
    """

    weight: Tensor
    is_pivot: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(rank, int) or not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"PivotLinear: rank must be an int from 1 to {min(in_features, out_features)} in a layer "
                f"[{out_features}, {in_features}], got {rank!r}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        options = {"device": device or torch.get_default_device(), "dtype": dtype}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # every output a pivot
            self.P = skip_init(nn.Linear, in_features, rank, bias=False, **options)
            self.C = skip_init(nn.Linear, rank, out_features - rank, bias=False, **options)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **options)) if bias else None)
        self.register_buffer("weight", torch.empty(0, **options))
        self.register_buffer("is_pivot", pack_bits(torch.arange(out_features, device=device) < rank))
        # What follows from `is_pivot`: that buffer itself, `inverse` and `place`.
        self._orders: tuple[Tensor, Tensor, Tensor] | None = None
        if rank:
            nn.init.normal_(self.P.weight, std=(3 * in_features) ** -0.5)
            nn.init.normal_(self.C.weight, std=rank**-0.5)

    @classmethod
    def from_parts(cls, P: Tensor, C: Tensor, pivots: Tensor, bias: Tensor | None = None) -> PivotLinear:
        """A layer that holds `P [rank, in]`, `C [out - rank, rank]` and `bias [out]` themselves.

        pivots: bool `[out]`, which outputs `P`'s rows are, in their order.
        """
        if P.dim() != 2 or C.dim() != 2 or C.shape[1] != P.shape[0] or pivots.shape != (len(P) + len(C),):
            raise ValueError(
                f"PivotLinear: P must be [rank, in_features], C [out_features - rank, rank] and pivots [out_features], "
                f"got {list(P.shape)}, {list(C.shape)} and {list(pivots.shape)}"
            )
        if int(pivots.sum()) != len(P):
            raise ValueError(f"PivotLinear: pivots must name {len(P)} outputs, one for each row of P")
        layer = cls(P.shape[1], len(pivots), len(P), bias is not None, device="meta", dtype=P.dtype)
        layer.P.weight, layer.C.weight = nn.Parameter(P.detach()), nn.Parameter(C.detach())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        layer.weight = torch.empty(0, device=P.device, dtype=P.dtype)
        layer.is_pivot = pack_bits(pivots).to(P.device)
        return layer

    @property
    def pivots(self) -> Tensor:
        """Which outputs are pivots, bool `[out_features]`."""
        return unpack_bits(self.is_pivot, self.out_features)

    def orders(self) -> tuple[Tensor, Tensor]:
        """`inverse` int64 and `place` int32, both `[out_features]`.

        The list of the pivots followed by the others has output `i` at `inverse[i]`, and its entry `j` is output
        `place[j]`.
        """
        if self._orders is not None and self._orders[0] is self.is_pivot:
            return self._orders[1:]
        # The first time, or the bits were moved, or replaced by what was loaded. In inference mode too as ordinary
        # tensors, which a later training step can use.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            pivots = self.pivots
            inverse = torch.where(pivots, pivots.long().cumsum(0) - 1, self.rank + (~pivots).long().cumsum(0) - 1)
            place = inverse.argsort().to(torch.int32)
        if not torch.compiler.is_exporting():
            self._orders = self.is_pivot, inverse, place
        return inverse, place

    # ---- see `nn.fused.Fused`

    prepared = None

    def spec(self) -> tuple[int, ...]:
        return fused.pivoted_spec(self._modules["P"], self._modules["C"], self.bias is not None)

    def add_tensors(self, x: Tensor, tensors: list[Tensor]) -> bool:
        if not (
            fused.add_matrix(self._modules["P"], x, tensors)
            and fused.add_matrix(self._modules["C"], x, tensors)
            and self.is_pivot.device == x.device
        ):
            return False
        tensors.append(self.orders()[1])
        return fused.add_bias(self, x, tensors)

    def watched(self) -> list[tuple[nn.Module, bool]]:
        return fused.watched(self, own_hooks=False)

    # ----

    def forward(self, x: Tensor) -> Tensor:
        y = fused.call(self, x)
        if y is not None:
            return y
        z = self.P(x)
        return place(z, self.C(z), self.orders()[0], self.bias)

    @torch.no_grad()
    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """`(Vh [rank, in], U [out, rank])`: the same function as two factors; `U`'s pivot rows are those of one."""
        P, C = dense_weight(self.P, dtype), dense_weight(self.C, dtype)
        identity = torch.eye(self.rank, device=C.device, dtype=C.dtype)
        return P, torch.cat([identity, C]).index_select(0, self.orders()[0])

    def effective_weight(self) -> Tensor:
        """The dense weight `[out_features, in_features]` that this layer stands for, in float32 or better."""
        dtype = torch.promote_types(self.P.weight.dtype, torch.float32)
        Vh, U = self.factors(dtype)
        return U @ Vh

    def _load_from_state_dict(self, *args, **kwargs):
        self._orders, self.prepared = None, None  # is_pivot is written into
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def pack_bits(bits: Tensor) -> Tensor:
    """bool `[n]` as uint8 `[ceil(n / 8)]`, the lowest bit first."""
    padded = torch.nn.functional.pad(bits.to(torch.int32), (0, -len(bits) % 8))
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=bits.device)
    return (padded.view(-1, 8) * weights).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The first `n` bits of `pack_bits`' result, bool `[n]`."""
    shifts = torch.arange(8, dtype=torch.int32, device=packed.device)
    return ((packed.to(torch.int32)[:, None] >> shifts) & 1).bool().flatten()[:n]
