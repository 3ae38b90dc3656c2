"""`SVDLinear`: a linear layer as its singular value decomposition, with a trainable mask over the singular values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.dropout import new_seed
from ..ops.masked_svd_linear.effective import Collector, effective_linear
from ..ops.masked_svd_linear.op import masked_svd_linear
from ..ops.masked_svd_linear.problem import Adapter
from .sharded import Sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Held in float32 whatever the model's dtype: a mask step of 5e-5 around 0.02 is lost in bfloat16.
_PRECISE = ("S", "scores", "mask", "lora_A", "lora_B", "input_variances")


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
        input_variances: float `[in_features]`, the mean squares of the inputs that `Vh` was whitened by, which then
            tell what its rows cannot of a layer with more inputs than outputs (`quantized.remembered_covariance`).
            Kept as a buffer, float32; None where they are not known.
        backend: of `masked_svd_linear`.

    `save_z` (an attribute, True) keeps `x Vhᵀ` between the passes; False saves that memory and computes it again.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    bias: Tensor | None
    scores: Tensor
    input_variances: Tensor | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter

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
        input_variances: Tensor | None = None,
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
        if input_variances is not None and input_variances.shape != Vh.shape[1:]:
            raise ValueError(f"SVDLinear: input_variances must be [{Vh.shape[1]}], got {list(input_variances.shape)}")
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
        variances = None if input_variances is None else input_variances.detach().to(U.device, precise)
        self.register_buffer("input_variances", variances)
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
        self.save_z = True
        # What follows from the rest, and is never saved. After compact(): which entries are computed, and their Vh, U
        # and S, after the adapter's if `_joined`. On the effective route: the dense weight, and its rank.
        self._rows: Tensor | None = None
        self._factors: tuple[Tensor, Tensor, Tensor] | None = None
        self._joined = False
        self._weight: Tensor | None = None
        self._weight_rank = 0
        self._collector = Collector()
        # After shard(): where U and Vh are.
        self.sharded: Sharded | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> SVDLinear:
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
        if self.sharded is not None:
            return self.sharded(x, self._masked)
        # A compiler cannot follow gradients that come later, by `collect_gradients`; the other route is as exact.
        if self._weight is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return effective_linear(x, self._weight, self.mask, self.bias, self._adapter(), self._collector)
        Vh, U, _ = self._factors or (self.Vh, self.U, None)
        return self._masked(x, U, Vh)

    def _masked(self, x: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
        return masked_svd_linear(
            x,
            Vh,
            U,
            self.S if self._factors is None else self._factors[2],
            self.mask,
            self.bias,
            mask_scale=self.mask_scale,
            rows=self._rows,
            adapter=self._adapter(),
            save_z=self.save_z,
            backend=self.backend,
        )

    def _adapter(self) -> Adapter | None:
        if not self.adapter_rank:
            return None
        dropout = self.adapter_dropout if self.training else 0.0
        seed = new_seed(self.mask.device) if dropout else None
        return Adapter(self.lora_A, self.lora_B, self.adapter_scaling, self._joined, dropout, seed)

    # ---- what is computed

    @property
    def computed_rank(self) -> int:
        """How many ranks the forward pass computes: all of them before `compact`."""
        return self.full_rank if self._rows is None else self._rows.numel()

    def compact(self, keep: Tensor | None = None, *, join: bool = False) -> int:
        """Leave the pruned ranks out of the computation from here on, and return how many are computed.

        keep: bool `[k]`, the ranks to compute; None for those that are live. It must hold all of those.
        join: keep the adapter in the same matrices as the factors, so that one product makes both. They then hold a
            copy of it: whoever changes `lora_A` or `lora_B` has to call `write_adapter`.

        Results do not change beyond the order of sums: a pruned rank adds nothing to the output, and its
        gradient is zero. `mask` and `scores` keep their size and order. Ranks pruned later are masked, until the next
        call leaves them out too. After setting a mask by hand so that a pruned rank comes back, call `compact`
        or `uncompact` again; `set_live` and loading a state do so by themselves.
        """
        rows = (self.live if keep is None else keep.to(self.mask.device)).nonzero()[:, 0]
        join = join and self.adapter_rank > 0
        if rows.numel() == 0:
            rows = rows.new_zeros(1)  # one masked rank instead of a special case of none
        whole = rows.numel() == self.full_rank
        self.uncompact()
        if not join and not self.U.is_contiguous():  # a part of joined factors so far
            self.U, self.Vh = self.U.contiguous(), self.Vh.clone()
        if whole and not join:
            return self.full_rank
        r = self.adapter_rank if join else 0
        Vh = self.Vh.new_empty(r + rows.numel(), self.in_features)
        U = self.U.new_empty(self.out_features, r + rows.numel())
        if whole:
            Vh[r:], U[:, r:] = self.Vh, self.U
            # The frozen factors are held once: from here on they are a part of the joined ones.
            self.Vh, self.U = Vh[r:], U[:, r:]
        else:
            torch.index_select(self.Vh, 0, rows, out=Vh[r:])
            U[:, r:] = self.U.index_select(1, rows)
        self._rows = None if whole else rows
        self._factors = Vh, U, self.S if whole else self.S[rows]
        self._joined = join
        if join:
            self.write_adapter()
        return rows.numel()

    def uncompact(self) -> None:
        """Compute with the full factors again."""
        self._rows = self._factors = None
        self._joined = False

    def adapter_copies(self) -> list[tuple[Tensor, nn.Parameter]]:
        """What `compact(join=True)` has copied of `lora_A` and `lora_B`: pairs of a copy and its original."""
        if not self._joined:
            return []
        assert self._factors is not None
        Vh, U, _ = self._factors
        return [(Vh[: self.adapter_rank], self.lora_A), (U[:, : self.adapter_rank], self.lora_B)]

    @torch.no_grad()
    def write_adapter(self) -> None:
        """Bring those copies up to date."""
        for copy, original in self.adapter_copies():
            copy.copy_(original)

    @torch.no_grad()
    def take_route(self, route: str) -> None:
        """Compute by `route` when gradients are wanted, "factored" or "effective" (see `acip_kernels.plan`).

        "effective" holds a dense weight `[out_features, in_features]` beside the factors. Its gradients for the mask,
        and without dropout for the adapter, come with `collect_gradients`, which has to be called before the
        optimizer's step; and `update_weight` after it.
        """
        if route == "factored":
            self._weight = None
        elif self._weight is None:
            self._make_weight(self.live)

    @property
    def route(self) -> str:
        return "factored" if self._weight is None else "effective"

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """On the effective route: add the gradients of all backward passes since the last call to `mask.grad` etc."""
        if self._collector.total is None:
            return
        Vh, U, S = self._factors or (self.Vh, self.U, self.S)
        r = self.adapter_rank if self._joined else 0
        live = self.mask if self._rows is None else self.mask[self._rows]
        adapter = None
        if self.adapter_rank:
            dropout = self.adapter_dropout if self.training else 0.0
            adapter = Adapter(self.lora_A, self.lora_B, self.adapter_scaling, dropout=dropout)
        dmask, dA, dB = self._collector.gradients(Vh[r:], U[:, r:], S, live, self.mask_scale, adapter)
        if self._rows is not None:
            dmask = torch.zeros_like(self.mask).index_copy_(0, self._rows, dmask)
        for parameter, gradient in (
            (self.mask, dmask),
            (getattr(self, "lora_A", None), dA),
            (getattr(self, "lora_B", None), dB),
        ):
            if gradient is not None and parameter.requires_grad:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def forget_gradients(self) -> None:
        """On the effective route: what the backward passes since the last `collect_gradients` have left."""
        self._collector.total = None

    @torch.no_grad()
    def update_weight(self, rank: int | None = None) -> None:
        """On the effective route: make the dense weight anew after masks have changed.

        rank: how many entries are live, for who knows that some may have died but none come back: with as many as
        before there is nothing to do. What died is not subtracted instead: that would be cheaper, but would add up
        rounding errors, and a run that was interrupted would go on with other bits.
        """
        if self._weight is not None and rank != self._weight_rank:
            self._make_weight(self.live)

    def _make_weight(self, live: Tensor) -> None:
        dtype = self.S.dtype
        weight = (self.U[:, live].to(dtype) * self.S[live]) @ self.Vh[live].to(dtype)
        if self._weight is None:
            self._weight = weight.to(self.U.dtype)
        else:
            self._weight.copy_(weight)  # where it was, as a CUDA graph reads it there
        self._weight_rank = int(live.sum())

    @torch.no_grad()
    def set_live(self, live: Tensor) -> None:
        """Prune to `live`, bool `[k]`. Scores are untouched, so any choice can follow any other."""
        if live.dtype != torch.bool or live.shape != self.mask.shape:
            raise ValueError(f"SVDLinear: live must be bool [{self.full_rank}], got {live.dtype} {list(live.shape)}")
        self.mask.copy_(torch.where(live.to(self.mask.device), self.mask_scale, 0.0))
        self.take_route("factored")
        self.compact()

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep a part of `U` and `Vh` in each process of a device mesh, put together while they are computed with.

        Until `unshard` the layer can do forward and backward passes, and masks may change; all else needs the factors.
        """
        if self.sharded is None:
            self.uncompact()
            self.sharded = Sharded(mesh, U=self.U, Vh=self.Vh)
            self.U = self.Vh = None  # type: ignore[assignment]  # until unshard()

    def unshard(self, device: torch.device | str = "cpu") -> None:
        """Have both whole again, on `device`."""
        if self.sharded is not None:
            self.U, self.Vh = self.factors(device)
            self.sharded = None

    def factors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """`U` and `Vh`; of a sharded layer copies on `device`, which all processes have to ask for together."""
        if self.sharded is None:
            return self.U, self.Vh
        return self.sharded.whole("U").to(device), self.sharded.whole("Vh").to(device)

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
        self.take_route("factored")
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name).detach() for name in _PRECISE if getattr(self, name, None) is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.is_floating_point() and torch.finfo(after.dtype).bits < 32:
                after.data = tensor.to(after.device)
        if self._rows is not None:
            self.compact(
                torch.zeros_like(self.mask, dtype=torch.bool).index_fill_(0, self._rows.to(self.mask.device), True)
            )
        else:
            self.uncompact()
        self.take_route("factored")
        return self

    def extra_repr(self) -> str:
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
        if exact.device.type != "cuda":
            U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        elif exact.dtype == torch.float32:
            U, S, Vh = svd_by_square(exact)
        else:
            U, S, Vh = torch.linalg.svd(exact, full_matrices=False, driver="gesvd")
    except torch.linalg.LinAlgError:
        # Divide and conquer fails on rare matrices in float32; twice the digits have always been enough.
        U, S, Vh = (factor.to(exact.dtype) for factor in torch.linalg.svd(exact.double(), full_matrices=False))
    return U.to(weight.dtype).contiguous(), S, Vh.to(weight.dtype).contiguous()


def svd_by_square(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(U, S, Vh)` of a float32 matrix by the eigenvectors of its square, which a GPU is quick and precise with.

    cuSOLVER's own decomposition in float32 (Jacobi's method, torch's default) left an error of 5e-4 of the norm for a
    matrix of 4096 × 4096 on an H100, and took nine times as long as the eigenvectors.

    With `W Wᵀ = Q Λ Qᵀ` in float64, the rows of `Qᵀ W = R' V'ᵀ`, a QR decomposition, are orthogonal but for
    `eps64 S_max² / S_i`, which is what `R'` has beside its diagonal. It is dropped: no more than `eps32 S_max` where
    `S_i` is above `2e-9 S_max`, and below that the rows are as small. So the factors are orthonormal to float64's
    precision, and their product is the weight to float32's, whatever its rank.
    """
    exact = weight.double()
    tall = weight.shape[0] > weight.shape[1]
    exact = exact.t() if tall else exact
    vectors = torch.linalg.eigh(exact @ exact.t()).eigenvectors.flip(1)
    Q, R = torch.linalg.qr((vectors.t() @ exact).t())
    diagonal = R.diagonal()
    S, order = diagonal.abs().sort(descending=True, stable=True)
    # A singular value of zero has a sign too.
    V = (Q * torch.where(diagonal < 0, -1.0, 1.0))[:, order]
    U = vectors[:, order]
    U, V = (V, U) if tall else (U, V)
    return U.to(weight.dtype), S.to(weight.dtype), V.t().to(weight.dtype)
