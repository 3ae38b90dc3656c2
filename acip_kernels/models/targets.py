"""Which layers of a model can be factorized, and which of them are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D` (GPT-2): a linear layer whose weight is `[in, out]`."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def weight_of(module: nn.Module) -> Tensor:
    """A linear layer's weight as `[out_features, in_features]`."""
    weight = cast(Tensor, module.weight)
    return weight.t() if is_conv1d(module) else weight


def linear_layers(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """`({name: layer}, [what was left out, with the reason])`.

    Every `nn.Linear` and `Conv1D` but the output head, which is never factorized; a module that occurs twice is
    listed once. Left out and named are weights that multiply tokens but are no such layer: quantized linear
    layers, layers that share their weight with an embedding, and the three-dimensional parameters of mixtures of
    experts.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers, left_out = {}, []
    for name, module in model.named_modules():
        if module is head:
            continue
        if type(module) is nn.Linear or is_conv1d(module):
            if id(module.weight) in embeddings:
                left_out.append(f"{name} (shares its weight with an embedding)")
            elif module.weight.dim() != 2 or not module.weight.is_floating_point():
                left_out.append(f"{name} (weight is {module.weight.dtype} {list(module.weight.shape)})")
            else:
                layers[name] = module
        elif isinstance(module, nn.Linear) or hasattr(module, "in_features"):
            if not _is_ours(module):
                left_out.append(f"{name} ({type(module).__name__})")
        else:
            packed = [key for key, value in module.named_parameters(recurse=False) if value.dim() == 3]
            left_out += [f"{name}.{key} ({type(module).__name__}, packed experts)" for key in packed]
    return layers, left_out


def _is_ours(module: nn.Module) -> bool:
    from ..nn import LowRankLinear, PivotLinear, SVDLinear

    return isinstance(module, LowRankLinear | PivotLinear | SVDLinear)


def choose_targets(
    layers: Iterable[str], targets: str | Iterable[str] = "all-linear", exclude: Iterable[str] = ()
) -> list[str]:
    """The names among `layers` that `targets` means, in their order, without those that `exclude` means.

    targets: "all-linear"; or any other string, a regular expression that the whole name must match; or names
        or last parts of names (["q_proj", "model.layers.0.mlp.up_proj"]), as PEFT takes them. exclude: names or
        last parts. Raises `ValueError` where a target means no layer, or nothing is left.
    """
    layers = list(layers)
    if targets == "all-linear":
        chosen = set(layers)
    elif isinstance(targets, str):
        chosen = {name for name in layers if re.fullmatch(targets, name)}
    else:
        chosen = set()
        for target in targets:
            meant = _meant(layers, target)
            if not meant:
                raise ValueError(f"targets: no linear layer is named {target!r}; there are {_examples(layers)}")
            chosen |= meant
    for target in exclude:
        chosen -= _meant(layers, target)
    if not chosen:
        raise ValueError(f"targets: {targets!r} means no linear layer; there are {_examples(layers)}")
    return [name for name in layers if name in chosen]


def _meant(layers: list[str], target: str) -> set[str]:
    return {name for name in layers if name == target or name.endswith(f".{target}")}


def _examples(layers: list[str]) -> str:
    shown = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    return ", ".join(shown[:12]) or "none in this model"
