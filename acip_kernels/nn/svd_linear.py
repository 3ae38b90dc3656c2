"""`SVDLinear`: a linear layer as its singular value decomposition, with a trainable mask over the singular values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import masked_svd_linear

# Held in float32 whatever the model's dtype: a mask step of 5e-5 around 0.02 is lost in bfloat16.
_PRECISE = ("S", "scores", "mask", "lora_A", "lora_B")


class SVDLinear(nn.Module):
    """`y = ((x Vhᵀ) ⊙ S ⊙ β) Uᵀ + b + (α/r) (x Aᵀ) Bᵀ`, with `β_i = 1` where `mask_i > 0` (ACIP's masked layer).

    Trainable: `mask [k]`, and of the adapter `lora_A [r, in_features]` and `lora_B [out_features, r]`, all
    float32. Frozen: `U [out_features, k]`, `Vh [k, in_features]`, `bias [out_features]` in the model's dtype,
    `S [k]` in float32. `scores [k]` (float32) is where a run keeps the score of each singular value; a new
    layer's scores are its mask.

    Args:
        U, S, Vh, bias: the factors, as `torch.linalg.svd` names them; `bias` may be None.
        mask_scale: `c`, what every mask parameter starts at; the mask's gradient is `1/c` times that of `β`.
        adapter_rank: `r`, 0 for no adapter. adapter_alpha: `α`. adapter_dropout: on the adapter's input.
        source_type: the class of the layer that this one replaces, "Linear" or "Conv1D" (GPT-2's, with a
            transposed weight): what a dense copy of this layer becomes.
        backend: of `masked_svd_linear`.
    """

    def __init__(
        self,
        U: Tensor,
        S: Tensor,
        Vh: Tensor,
        bias: Tensor | None = None,
        *,
        mask_scale: float = 0.02,
        adapter_rank: int = 0,
        adapter_alpha: float = 16.0,
        adapter_dropout: float = 0.0,
        source_type: str = "Linear",
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        k = S.shape[0] if S.dim() == 1 else -1
        if U.dim() != 2 or Vh.dim() != 2 or U.shape[1] != k or Vh.shape[0] != k or k < 1:
            raise ValueError(
                f"SVDLinear: U must be [out_features, k], S [k] and Vh [k, in_features] with k >= 1, "
                f"got {list(U.shape)}, {list(S.shape)} and {list(Vh.shape)}"
            )
        if bias is not None and bias.shape != U.shape[:1]:
            raise ValueError(f"SVDLinear: bias must be [{U.shape[0]}], got {list(bias.shape)}")
        if not mask_scale > 0:
            raise ValueError(f"SVDLinear: mask_scale must be positive, got {mask_scale}")
        if adapter_rank < 0 or not 0 <= adapter_dropout < 1:
            raise ValueError(
                f"SVDLinear: adapter_rank must be at least 0 and adapter_dropout in [0, 1), "
                f"got {adapter_rank} and {adapter_dropout}"
            )
        self.out_features, self.in_features, self.full_rank = U.shape[0], Vh.shape[1], k
        self.mask_scale, self.backend, self.source_type = mask_scale, backend, source_type
        self.adapter_rank, self.adapter_alpha, self.adapter_dropout = adapter_rank, adapter_alpha, adapter_dropout

        precise = torch.promote_types(U.dtype, torch.float32)
        for name, tensor in (("U", U), ("S", S.to(precise)), ("Vh", Vh), ("bias", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())
        start = torch.full((k,), mask_scale, dtype=precise, device=U.device)
        self.mask = nn.Parameter(start)
        self.register_buffer("scores", start.clone())
        if adapter_rank:
            # As PEFT starts a LoRA adapter: A uniform, B zero, so that the layer's function is unchanged.
            bound = self.in_features**-0.5
            A = torch.empty(adapter_rank, self.in_features, dtype=precise, device=U.device)
            A.uniform_(-bound, bound, generator=generator)
            self.lora_A = nn.Parameter(A)
            self.lora_B = nn.Parameter(torch.zeros(self.out_features, adapter_rank, dtype=precise, device=U.device))
        # The live part of the factors after compact(): never saved, as it follows from the rest.
        self._live: Tensor | None = None
        self._compacted: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> SVDLinear:
        """The decomposition of `linear`'s weight, in its dtype and on its device; `options` as for the class.

        The SVD is computed in float32 (float64 for a float64 layer). Raises `ValueError` for a weight that is
        not finite, `TypeError` for anything but an `nn.Linear`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"SVDLinear.from_linear takes an nn.Linear, got {type(linear).__name__}")
        return cls(*svd(linear.weight), linear.bias, **options)

    @property
    def adapter_scaling(self) -> float:
        """`α/r`."""
        return self.adapter_alpha / self.adapter_rank if self.adapter_rank else 0.0

    @property
    def live(self) -> Tensor:
        """Which singular values are not pruned, bool `[k]`."""
        return self.mask.detach() > 0

    def forward(self, x: Tensor) -> Tensor:
        if self._live is None:
            U, S, Vh, mask = self.U, self.S, self.Vh, self.mask
        else:
            (U, S, Vh), mask = self._compacted, self.mask[self._live]
        y = masked_svd_linear(x, Vh, U, S, mask, self.bias, mask_scale=self.mask_scale, backend=self.backend)
        if self.adapter_rank:
            adapted = F.dropout(x, self.adapter_dropout) if self.training and self.adapter_dropout else x
            z = F.linear(adapted, self.lora_A.to(x.dtype))
            y = y + F.linear(z * self.adapter_scaling, self.lora_B.to(x.dtype))
        return y

    @property
    def computed_rank(self) -> int:
        """How many ranks the forward pass computes: all of them before `compact`."""
        return self.full_rank if self._live is None else self._live.numel()

    def compact(self, keep: Tensor | None = None) -> int:
        """Leave the pruned ranks out of the computation from here on, and return how many are computed.

        keep: bool `[k]`, the ranks to compute; None for those that are live. It must hold all of those.

        Results do not change beyond the order of sums: a pruned rank adds nothing to the output, and its
        gradient is zero. `mask` and `scores` keep their size and order. Ranks pruned later are masked, until the next
        call leaves them out too. After setting a mask by hand so that a pruned rank comes back, call `compact`
        or `uncompact` again; `set_live` and loading a state do so by themselves.
        """
        live = (self.live if keep is None else keep.to(self.mask.device)).nonzero()[:, 0]
        if live.numel() == self.full_rank:
            self.uncompact()
            return self.full_rank
        if live.numel() == 0:
            live = live.new_zeros(1)  # one masked rank instead of a special case of none
        self._live = live
        self._compacted = self.U[:, live].contiguous(), self.S[live], self.Vh[live]
        return live.numel()

    def uncompact(self) -> None:
        """Compute with the full factors again."""
        self._live = self._compacted = None

    @torch.no_grad()
    def set_live(self, live: Tensor) -> None:
        """Prune to `live`, bool `[k]`. Scores are untouched, so any choice can follow any other."""
        if live.dtype != torch.bool or live.shape != self.mask.shape:
            raise ValueError(f"SVDLinear: live must be bool [{self.full_rank}], got {live.dtype} {list(live.shape)}")
        self.mask.copy_(torch.where(live.to(self.mask.device), self.mask_scale, 0.0))
        self.compact()

    def effective_weight(self, *, adapter: bool = True) -> Tensor:
        """`U diag(S β) Vh (+ (α/r) B A)  [out_features, in_features]`, in float32 or better."""
        dtype = self.S.dtype
        live = self.live
        weight = (self.U[:, live].to(dtype) * self.S[live]) @ self.Vh[live].to(dtype)
        if adapter and self.adapter_rank:
            weight += self.adapter_scaling * (self.lora_B.detach() @ self.lora_A.detach()).to(dtype)
        return weight

    def _load_from_state_dict(self, *args, **kwargs):
        self.uncompact()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name).detach() for name in _PRECISE if hasattr(self, name)}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.is_floating_point() and torch.finfo(after.dtype).bits < 32:
                after.data = tensor.to(after.device)
        if self._live is not None:
            live, self._live = self._live, self._live.to(self.U.device)
            self._compacted = self.U[:, live].contiguous(), self.S[live], self.Vh[live]
        return self

    def extra_repr(self):
        text = f"in_features={self.in_features}, out_features={self.out_features}, full_rank={self.full_rank}"
        return text + (f", adapter_rank={self.adapter_rank}" if self.adapter_rank else "")


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(U, S, Vh)` of `weight [out, in]`: `U` and `Vh` in its dtype, `S` in float32 (float64 for float64).

    Raises `ValueError` for a weight that is not a finite matrix.
    """
    if weight.dim() != 2:
        raise ValueError(f"svd: weight must be [out, in], got shape {list(weight.shape)}")
    weight = weight.detach()
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not math.isfinite(exact.abs().sum()) and not torch.isfinite(exact).all():
        raise ValueError(
            f"svd: weight {list(weight.shape)} holds {int((~exact.isfinite()).sum())} NaN or infinite values"
        )
    try:
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    except torch.linalg.LinAlgError:
        # Divide and conquer fails on rare matrices in float32; twice the digits have always been enough.
        U, S, Vh = (factor.to(exact.dtype) for factor in torch.linalg.svd(exact.double(), full_matrices=False))
    return U.to(weight.dtype).contiguous(), S, Vh.to(weight.dtype).contiguous()
