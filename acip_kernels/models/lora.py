"""LoRA on low-rank layers, through PEFT as it is: importing this module teaches PEFT's LoRA the layers of `nn`.

PEFT meets a `LowRankLinear` in two ways. `target_modules="all-linear"` finds its two children, which are ordinary
`nn.Linear`s: nothing of this module is needed. A target by the layer's name (`["q_proj"]`) gets one adapter around the
whole layer, `U Vh x + s B A x`, and that adapter merges without loss: its `A` becomes further rows of `Vh`, its `s B`
further columns of `U`.

PEFT looks up what wraps a layer in a table of each configuration, which no file keeps. So the class that reads this
table, `LoraModel`, is replaced in PEFT's list of methods by one that fills it in first; for every other layer it does
what it always did. Whoever loads or cuts a compressed model has this module imported (`models.quantizer`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import PeftType
from torch import Tensor, nn

from ..nn import LowRankLinear, PivotLinear, QuantizedLinear, fused

# Ways to start an adapter that read the dense weight, which is not there.
_FROM_WEIGHT = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")


class LowRankLoraLinear(Linear):
    """PEFT's LoRA around a `LowRankLinear`, `PivotLinear` or `QuantizedLinear`.

    `merge` makes a layer of rank `ρ + r` of one of rank `ρ`: `Vh ← [Vh; A]`, `U ← [U, s B]`, in the dtype of the layer.
    That is exact but for rounding `A` and `s B` to this dtype. A `PivotLinear` becomes a `LowRankLinear`. `unmerge`
    puts back what was there, to the bit; until then, or `unload`, it is kept.

    Raises `ValueError` for what needs the dense weight: DoRA and the other variants, starts such as PiSSA's, and
    merging into quantized factors; and for merging into a layer whose children carry anything (hooks, offloading,
    adapters, tensors of another kind).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs):
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # also where a Conv1D was before
        # What `unmerge` puts back; in a tuple, so that it is no submodule.
        self._unmerged: tuple = ()

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return cast(int, module.in_features), cast(int, module.out_features)

    @property
    def lora_variants(self):
        return {(): None}

    def resolve_lora_variant(self, *, config, **kwargs):
        try:
            return super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"a {type(self.get_base_layer()).__name__} takes plain LoRA alone, as variants need a dense weight "
                f'({error}); target_modules="all-linear" puts them on its factors'
            ) from None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config, **kwargs) -> None:
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(_FROM_WEIGHT):
            raise ValueError(
                f"init_lora_weights={start!r} decomposes a dense weight, which a "
                f"{type(self.get_base_layer()).__name__} has not: use True or 'gaussian'"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        _check_mergeable(self.base_layer)
        layer = self.base_layer
        (Vh, U), bias = (
            ((layer.Vh.weight, layer.U.weight), layer.U.bias)
            if isinstance(layer, LowRankLinear)
            else (layer.factors(), layer.bias)
        )
        rows, columns = [Vh.detach()], [U.detach()]
        for name in names:
            A, B = self.lora_A[name], self.lora_B[name]
            rows.append(A.weight.detach().to(Vh))
            columns.append((B.weight.detach() * self.scaling[name]).to(U))
            if B.bias is not None:
                if bias is None:
                    raise ValueError(f"adapter {name!r} has a bias (lora_bias), and the layer has none to add it to")
                bias = bias.detach() + (B.bias.detach() * self.scaling[name]).to(bias)
        if safe_merge and not all(bool(torch.isfinite(part).all()) for part in (*rows, *columns)):
            raise ValueError(f"adapter {', '.join(names)} holds NaN or infinite values: it is not merged")
        merged = LowRankLinear.from_factors(torch.cat(rows), torch.cat(columns, dim=1), bias).train(layer.training)
        merged.requires_grad_(next(layer.parameters()).requires_grad)
        if isinstance(layer, LowRankLinear):
            # The module stays, with what hangs on it.
            before: tuple = (layer.rank, layer.Vh, layer.U)
            layer.rank, layer.Vh, layer.U = merged.rank, merged.Vh, merged.U
        else:
            before = (layer,)
            self.base_layer = merged
        self._unmerged = self._unmerged or before
        self.merged_adapters += names

    def unmerge(self) -> None:
        if not self.merged:
            return
        layer = self.base_layer
        # Moved or cast as the layer was in the meantime.
        before = [part.to(layer.U.weight) if isinstance(part, nn.Module) else part for part in self._unmerged]
        if len(before) == 1:
            (self.base_layer,) = before
        else:
            layer.rank, layer.Vh, layer.U = before
        self._unmerged = ()
        self.merged_adapters.clear()


def _check_mergeable(layer: nn.Module) -> None:
    name = type(layer).__name__
    children = list(layer.children())
    if any(isinstance(module, QuantizedLinear) for module in (layer, *children)):
        raise ValueError(
            f"{name}: an adapter is not merged into quantized weights, which would round it: keep it beside them, or "
            "train it before quantizing, as materialize(finetune(model, …), 1.0, quantize=…) does"
        )
    if not isinstance(layer, LowRankLinear | PivotLinear):
        raise ValueError(f"an adapter of low-rank layers cannot be merged into a {name}")
    if isinstance(layer, PivotLinear) and (fused.has_hooks(layer) or hasattr(layer, "_hf_hook")):
        raise ValueError(f"{name}: merging makes another layer of it, without the hooks on this one: remove them first")
    for child in children:
        tensors: list[Tensor] = []
        weight = getattr(child, "weight", None)
        if weight is None or weight.device.type == "meta" or not fused.add_matrix(child, weight, tensors):
            raise ValueError(
                f"{name}: an adapter merges into two plain nn.Linear, and this {type(child).__name__} is of another "
                "class, is offloaded, or has hooks, a parametrization or a weight of a special kind: take that off, or "
                "load the model without"
            )


LAYERS = dict.fromkeys((LowRankLinear, PivotLinear, QuantizedLinear), LowRankLoraLinear)
"""What `peft.LoraConfig._register_custom_module` takes, for who makes a `LoraModel` directly."""


class LowRankLoraModel(peft.LoraModel):
    """`peft.LoraModel` that knows the layers of this package."""

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        lora_config._register_custom_module(LAYERS)
        return peft.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _check_merge_allowed(self):
        # Before the first layer is merged: what is refused half-way is neither the one model nor the other.
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, LowRankLoraLinear) and any(name in module.lora_A for name in module.active_adapters):
                _check_mergeable(module.base_layer)


# Whatever else took the place already stays.
if PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is peft.LoraModel:
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LowRankLoraModel


def merge_lora(
    model: peft.PeftModel, *, truncate: bool = False, batches: Iterable[dict] | None = None, safe_merge: bool = False
) -> nn.Module:
    """The model under a `PeftModel` with its active LoRA adapters merged; in place.

    Without `truncate`, this is `model.merge_and_unload()`: a low-rank layer's rank grows by the adapter's, exactly.

    Args:
        truncate: go back to the rank that each low-rank layer had. The merged product is replaced by its best
            approximation of that rank in the Frobenius norm of the weight (Eckart-Young).
        batches: dicts of the model's arguments. If given, what is best is the mean squared error of the layer's
            outputs, over the inputs that it has in the merged model on these batches (as SVD-LLM, arXiv 2403.07378).
        safe_merge: refuse adapters that hold NaN or infinite values.

    Raises `ValueError` for layers that cannot be merged into, see `LowRankLoraLinear`; `TypeError` for another model.
    """
    if not isinstance(model, peft.PeftModel):
        raise TypeError(f"merge_lora takes a peft.PeftModel, got {type(model).__name__}")
    if batches is not None and not truncate:
        raise ValueError("batches: only what is truncated depends on them; say truncate=True")
    before = {
        name: (type(module.base_layer), module.base_layer.rank)
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LowRankLoraLinear) and isinstance(module.base_layer, LowRankLinear | PivotLinear)
    }
    merged = model.merge_and_unload(safe_merge=safe_merge)
    if not truncate:
        return merged
    from ..compress.basis import input_covariances

    names = [name for name, (_, rank) in before.items() if merged.get_submodule(name).rank > rank]
    covariances = {} if batches is None else input_covariances(merged, names, batches)
    for name in names:
        merged.set_submodule(name, _truncated(merged.get_submodule(name), *before[name], covariances.get(name)))
    return merged


@torch.no_grad()
def _truncated(layer: LowRankLinear, kind: type, rank: int, covariance: Tensor | None) -> nn.Module:
    """`layer` cut to `rank`, as a module of class `kind`."""
    from ..compress.materialize import layer_tensors
    from ..nn.pivot_linear import unpack_bits

    Vh, U, bias = layer.Vh.weight, layer.U.weight, layer.U.bias
    tensors = layer_tensors(
        U[:, :rank],
        torch.ones(rank, device=U.device, dtype=torch.promote_types(U.dtype, torch.float32)),
        Vh[:rank],
        Vh[rank:],
        U[:, rank:],
        1.0,
        form="pivoted" if kind is PivotLinear else "factors",
        truncate=True,
        covariance=covariance,
        dtype=U.dtype,
    )
    new: nn.Module
    if kind is PivotLinear:
        pivots = unpack_bits(tensors["is_pivot"], layer.out_features)
        new = PivotLinear.from_parts(tensors["P.weight"], tensors["C.weight"], pivots, bias)
    else:
        new = LowRankLinear.from_factors(tensors["Vh.weight"], tensors["U.weight"], bias)
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    return new.requires_grad_(trained).train(layer.training)
