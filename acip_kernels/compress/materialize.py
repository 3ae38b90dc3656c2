"""From a factorized model and a size to an ordinary model."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models import quantizer
from ..nn import LowRankLinear, PivotLinear, SVDLinear
from ..nn.nested_linear import balanced
from ..nn.pivot_linear import pack_bits, unpack_bits
from ..nn.quantized_linear import QuantizedLinear
from ..nn.svd_linear import svd
from ..ops.quantize import Quantized, Scheme
from .basis import damped_cholesky
from .config import cast
from .factorize import svd_layers
from .pivot import pivot_form
from .quantized import quantized_tensors, rounding_metric
from .sizing import Sizing, check_size_ratio, forms_for, knows_inputs

if TYPE_CHECKING:
    from .result import CompressionResult

log = logging.getLogger("acip_kernels")

ADAPTERS = ("auto", "merge", "truncate", "drop")


@dataclasses.dataclass(frozen=True)
class Cut:
    """One size of a factorized model: which singular values stay, and what becomes of the adapters.

    `live` is `{layer: bool [k]}`, `adapters` one of "merge", "truncate" and "drop", and `sizing` counts what is stored
    accordingly.
    """

    live: dict[str, Tensor]
    adapters: str
    sizing: Sizing

    @property
    def ranks(self) -> Tensor:
        """Live ranks, int64 `[layers]`."""
        return torch.stack([live.sum() for live in self.live.values()])

    @property
    def ratios(self) -> dict[str, float]:
        """The size ratio in both counts, by name."""
        return self.sizing.ratios(self.ranks)

    @property
    def parameters(self) -> int:
        """Elements of the tensors of the whole file; where layers are quantized, a byte of two codes is one."""
        return self.sizing.elements(self.ranks)

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the file's tensors, with what is not quantized in `dtype`."""
        return self.sizing.bytes(self.ranks, dtype.itemsize)

    @property
    def forms(self) -> dict[str, str]:
        """How each layer is stored: "dense", "factors" or "pivoted"."""
        return self.sizing.forms_of(self.ranks)


def plan_cut(
    scores: dict[str, Tensor],
    with_adapters: Sizing,
    without_adapters: Sizing,
    size_ratio: float,
    *,
    count: str = "factorized",
    adapters: str = "auto",
    trained: bool = True,
) -> Cut:
    """The cut of `scores` at `size_ratio`, counted in the way in which `adapters` will be stored.

    adapters: "merge" keeps the adapter exactly, as `r` further ranks that count; "truncate" merges it and goes back to
        the layer's own rank by a truncated SVD of the product, so that it costs nothing; "drop" leaves it out. "auto"
        merges, unless the adapters alone are larger than the target, when it truncates and says so; adapters that
        are not trained it drops.
    """
    check_size_ratio(size_ratio)
    if adapters not in ADAPTERS:
        raise ValueError(f"adapters must be one of {', '.join(ADAPTERS)}, got {adapters!r}")
    if adapters == "auto":
        adapters = "merge" if trained else "drop"
        if trained and size_ratio < with_adapters.smallest(count):
            log.warning(
                "at size ratio %s the adapters' own ranks (%.3f) are too large to keep: "
                "they are merged and truncated to the layers' ranks",
                size_ratio,
                with_adapters.smallest(count),
            )
            adapters = "truncate"
    sizing = with_adapters if adapters == "merge" else without_adapters
    live = sizing.cut(scores, size_ratio, count)
    ran = any(bool((score < 0).any()) for score in scores.values())
    if ran and any(bool((scores[name].cpu()[~live[name]] > 0).any()) for name in live):
        log.warning(
            "size ratio %s (%s) is below the size at which the run stopped: the ranking there is less certain",
            size_ratio,
            count,
        )
    return Cut(live, adapters, sizing)


def model_cut(
    model: nn.Module,
    size_ratio: float,
    *,
    rank_multiple: int = 1,
    forms: tuple[str, ...] | None = None,
    scheme: Scheme | None = None,
    **options,
) -> Cut:
    """`plan_cut` of a model with `SVDLinear` layers, by the scores that they hold.

    scheme: how the weights will be quantized; it decides the forms and the bytes, not what stays.
    """
    layers = svd_layers(model)
    trained = any(layer.adapter_rank and bool(layer.lora_B.any()) for layer in layers.values())
    storage = {"rank_multiple": rank_multiple, "forms": forms, "scheme": scheme}
    return plan_cut(
        {name: layer.scores for name, layer in layers.items()},
        Sizing.of(model, **storage),
        Sizing.of(model, adapters=False, **storage),
        size_ratio,
        trained=trained,
        **options,
    )


@torch.no_grad()
def materialize(
    model_or_result: nn.Module | CompressionResult,
    size_ratio: float,
    *,
    count: str = "factorized",
    adapters: str = "auto",
    rank_multiple: int = 1,
    forms: tuple[str, ...] | None = None,
    covariances: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    quantize_group: int = 64,
    quantize_symmetric: bool = False,
    quantize_rounding: str = "feedback",
    quantize_embeddings: str | None = None,
) -> nn.Module:
    """An ordinary, independent model of size `size_ratio`; what it is made from stays as it is and can be cut again.

    Every `SVDLinear` becomes the cheapest form for its rank: the class that it came from where a dense matrix is
    smallest, else a `PivotLinear`, or a `LowRankLinear` where `forms` leaves the pivoted form out. Singular values are
    folded into the factors. In a transformers model the
    ranks are put into `config.quantization_config`, so that its `save_pretrained` writes a directory that
    `from_pretrained` loads.

    Args:
        model_or_result: a model with `SVDLinear` layers, or a `CompressionResult`.
        size_ratio: what is left, in (0, 1], met from below.
        count: what the ratio counts: "factorized", the weights of the factorized layers as stored; "stored", every
            parameter in the file; or "paper", to cut the ranks that the reference does (see `Sizing.cut`).
        adapters: "auto", "merge", "truncate" or "drop"; see `plan_cut`.
        rank_multiple: stored ranks are rounded up to a multiple of this, where there are that many.
        forms: what layers may be stored as, some of "dense", "factors" and "pivoted"; the ranks that a size allows
            depend on it. None for all of them; but in int4 without the last one, where nothing is known of the layers'
            inputs (factors that were not whitened, nor any covariances), or rounding is to the nearest: there an error
            of four bits in the pivot rows, which passes through the second matrix as well, may ruin it, while with
            that knowledge it is the better one (docs/quality.md).
        covariances: `{layer: [in, in]}` of the layers' inputs (`basis.input_covariances`), for adapters="truncate" and
            for quantize: so that the error of the outputs is the least, instead of that of the weights.
        dtype: of the new weights; None for the factors' own.
        quantize: "int8", "int4" or "fp8" for the weights of all layers that were factorized, whatever their form (see
            `ops.quantize`); None for none. With the same `forms` the same singular values stay, and each layer takes
            the form that then has the fewest bytes. Biases and everything else keep `dtype`.
        quantize_group: numbers of a row with one scale, 32, 64 or 128 (int4). quantize_symmetric: without zero points
            (int4): fewer bytes, larger errors. quantize_rounding: "feedback" rounds by what errors do to the outputs
            (see `quantized.quantized_tensors`), for inputs of `covariances` or, without, of the covariance that the
            factors remember (`quantized.remembered_covariance`): seconds for a layer of 4096 inputs; "nearest" is
            quick.
        quantize_embeddings: "int8" or "int4" for the embedding and the output head of a transformers model, to the
            nearest; None for neither. They are no part of any size ratio, and in a small model, or where layers are
            quantized, most of the file, and of what decoding a token reads.

    Raises:
        ValueError: a target that is out of range or cannot be reached, a model that is not factorized, or options of
            `quantize` that do not exist.
    """
    scheme = None if quantize is None else Scheme(quantize, quantize_group, quantize_symmetric)
    model = model_or_result if isinstance(model_or_result, nn.Module) else model_or_result.model
    layers = svd_layers(model)
    informed = quantize_rounding == "feedback" and (bool(covariances) or knows_inputs(layers))
    forms = forms_for(forms, scheme, informed)
    storage = {"rank_multiple": rank_multiple, "forms": forms, "scheme": scheme}
    cut = model_cut(model, size_ratio, count=count, adapters=adapters, **storage)
    form, memo = cut.forms, {}
    for name, layer in layers.items():
        A, B = (layer.lora_A, layer.lora_B) if layer.adapter_rank and cut.adapters != "drop" else (None, None)
        live = cut.live[name].to(layer.S.device)
        covariance = (covariances or {}).get(name)
        tensors = layer_tensors(
            layer.U[:, live],
            layer.S[live],
            layer.Vh[live],
            A,
            B,
            layer.adapter_scaling,
            form=form[name],
            truncate=cut.adapters == "truncate",
            covariance=covariance,
            dtype=dtype or layer.U.dtype,
            scheme=scheme,
            metric=None
            if scheme is None
            else rounding_metric(layer.Vh, layer.S, layer.input_variances, covariance, quantize_rounding),
        )
        # A deep copy that meets a layer finds its replacement, wherever the layer is referred to.
        memo[id(layer)] = _module(tensors, layer, scheme, dtype or layer.U.dtype).train(layer.training)
    # The quantizer of a factorized model says that it cannot be saved; the new model gets its own.
    new = quantizer.copied(model, memo)
    if dtype is not None:
        cast(new, dtype)
    for parameter in new.parameters():
        parameter.requires_grad_(True)
    if quantizer.is_transformers(new):
        quantizer.attach_materialized(new, size_ratio=size_ratio, count=count, cut=cut)
    if quantize_embeddings is not None:
        quantizer.quantize_embeddings(new, Scheme(quantize_embeddings, quantize_group, quantize_symmetric))
    return new


def layer_tensors(
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    *,
    form: str,
    truncate: bool,
    covariance: Tensor | None = None,
    dtype: torch.dtype,
    scheme: Scheme | None = None,
    metric: Tensor | None = None,
) -> dict[str, Tensor]:
    """A layer's weights, from its live `U [out, ρ]`, `S [ρ]`, `Vh [ρ, in]` and its adapter `A [r, in]`, `B [out, r]`.

    The rank is `ρ + r`, the adapter concatenated, or `ρ` if `truncate`: the product's best approximation of that rank
    (Eckart-Young), of the weights or, given the `covariance [in, in]` of the inputs, of the outputs; from QR
    decompositions of its two factors.

    Returns, by `form`:
        "dense": `weight [out, in]`;
        "factors": `Vh.weight [rank, in]` and `U.weight [out, rank]`, each rank's two parts of equal norm, so that
            both have the same scale in a narrow dtype;
        "pivoted": `P.weight [rank, in]`, `C.weight [out - rank, rank]` and `is_pivot`, see `PivotLinear`.
        With a `scheme`, each weight's place is taken by `qweight`, `scales` and, if it has them, `zeros`, rounded in
        the `metric [in, in]` of the inputs (see `quantized_tensors`).
    """
    rank = S.shape[0]
    precise = S.dtype
    left, right = balanced(U.to(precise), S, Vh.to(precise))
    if A is not None:
        left = torch.cat([left, B.to(precise) * scaling], dim=1)
        right = torch.cat([right, A.to(precise)])
    if form != "dense" and truncate and A is not None:
        L = None if covariance is None else damped_cholesky(covariance, right.device)
        weighted = right if L is None else right.double() @ L
        Q_left, R_left = torch.linalg.qr(left.to(weighted.dtype))
        Q_right, R_right = torch.linalg.qr(weighted.t())
        inner_U, inner_S, inner_Vh = svd(R_left @ R_right.t())
        left, right = Q_left @ inner_U[:, :rank], inner_Vh[:rank] @ Q_right.t()
        if L is not None:
            right = torch.linalg.solve_triangular(L, right, upper=False, left=False)
        left, right = balanced(left, inner_S[:rank], right)
    if scheme is not None:
        return quantized_tensors(left, right, form, scheme, metric)
    if form == "dense":
        return {"weight": (left @ right).to(dtype)}
    if form == "factors":
        return {"Vh.weight": right.to(dtype).contiguous(), "U.weight": left.to(dtype).contiguous()}
    P, C, pivots = pivot_form(left, right)
    return {
        "P.weight": P.to(dtype).contiguous(),
        "C.weight": C.to(dtype).contiguous(),
        "is_pivot": pack_bits(pivots),
    }


def _module(tensors: dict[str, Tensor], layer: SVDLinear, scheme: Scheme | None, dtype: torch.dtype) -> nn.Module:
    """The module whose weights are `tensors`, with a copy of `layer`'s bias.

    An `nn.Linear`, `Conv1D`, `LowRankLinear` or `PivotLinear`; or, of a `scheme`, a `QuantizedLinear` or one of the
    latter two with such children.
    """
    bias = None if layer.bias is None else layer.bias.to(dtype, copy=True)
    if scheme is not None:
        return _quantized_module(tensors, layer, bias, scheme, dtype)
    if "U.weight" in tensors:
        return LowRankLinear.from_factors(tensors["Vh.weight"], tensors["U.weight"], bias)
    if "P.weight" in tensors:
        pivots = unpack_bits(tensors["is_pivot"], layer.out_features)
        return PivotLinear.from_parts(tensors["P.weight"], tensors["C.weight"], pivots, bias)
    weight = tensors["weight"]
    module: nn.Module
    if layer.source_type == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            module = Conv1D(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
        if bias is None:
            bias = weight.new_zeros(layer.out_features)
    else:
        module = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(weight.dtype))
    return module


def _quantized_module(tensors, layer: SVDLinear, bias: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> nn.Module:
    out, in_ = layer.out_features, layer.in_features

    def linear(name: str, cols: int, bias: Tensor | None = None) -> QuantizedLinear:
        parts = (tensors.get(name + part) for part in Quantized._fields)
        return QuantizedLinear.from_quantized(Quantized(*parts), cols, bias, group=scheme.group, dtype=dtype)

    if "qweight" in tensors:
        return linear("", in_, bias)
    options: dict = {"bias": bias is not None, "device": "meta", "dtype": dtype}
    module: LowRankLinear | PivotLinear
    if "U.qweight" in tensors:
        rank = len(tensors["Vh.qweight"])
        module = LowRankLinear(in_, out, rank, **options)
        module.Vh, module.U = linear("Vh.", in_), linear("U.", rank, bias)
    else:
        rank = len(tensors["P.qweight"])
        module = PivotLinear(in_, out, rank, **options)
        module.P, module.C = linear("P.", in_), linear("C.", rank)
        module.is_pivot = tensors["is_pivot"]
        if bias is not None:
            module.bias = nn.Parameter(bias)
    module.weight = torch.empty(0, device=layer.U.device, dtype=dtype)
    return module
