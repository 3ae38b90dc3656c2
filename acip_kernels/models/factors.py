"""Models of which others have factorized layers: two projections where there was one."""

from __future__ import annotations

import contextlib
import copy
import os
import pathlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from . import quantizer, saving
from .foreign import _Base, _dtype, _open, _Reader, _rest
from .targets import linear_layers, weight_of

# What the factors of a layer are called, and the layer; `*` stands for what the three have in common.
NAMES = {
    "svd-llm": {"U": "*_u_proj", "Vh": "*_v_proj", "layer": "*_proj"},
    "asvd": {"U": "*.ALinear", "Vh": "*.BLinear", "layer": "*"},
    "sequential": {"U": "*.1", "Vh": "*.0", "layer": "*"},
    "children": {"U": "*.U", "Vh": "*.Vh", "layer": "*"},
}


@torch.no_grad()
def import_factors(
    source: str | os.PathLike | dict[str, Tensor],
    base_model: Any,
    names: str | dict[str, str] = "auto",
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
) -> nn.Module:
    """A model whose layers somebody has replaced by two projections, `y = U (Vh x) + b`, with `LowRankLinear` there.

    It computes what it did, and saves and loads as a materialized model.

    Args:
        source: a state dict; a .safetensors file; or a directory with model.safetensors, or its shards and their index.
        base_model: the model that was factorized: name on the hub, directory, model or config. Only its config is
            needed, unless tensors are missing in `source`.
        names: what the factors are called. A dict of patterns with one `*` each: `{"U": "*_u_proj", "Vh": "*_v_proj",
            "layer": "*_proj"}` (SVD-LLM's) says that `q_u_proj.weight [out, rank]` and `q_v_proj.weight [rank, in]`
            are `q_proj`; without "layer" that is "*". "S", optional, are singular values between the two. Patterns are
            names of modules, or of tensors. A key of NAMES; or "auto", the one of those that fits.
        dtype: of the weights; "auto" for the factors' own.
        device_map: as for `from_pretrained`.

    Factors that are stored transposed, for `x A B`, are recognized where their shapes say so. A bias may be the
    layer's, `U`'s or `Vh`'s. A layer of more ranks than its weight has becomes that weight.

    Raises:
        ValueError: patterns that fit nothing, one factor without the other, shapes that do not fit the base model,
            tensors that are missing or left over, or a base model that cannot be had.
    """
    base = _Base.of(base_model, {}, "base_model")
    with contextlib.ExitStack() as stack:
        where, path = _tensors(source, stack)
        reader = _Reader(path, where, base)
        empty = saving._empty_model(pathlib.Path(base.name or "base_model"), base.config)
        linear = linear_layers(empty)[0]
        pairs = _pairs(where, names, linear, path)
        own = reader.get(next(iter(pairs.values()))["U"]).dtype
        dtype = _dtype(dtype) or own
        state, ranks = {}, {}
        for name, parts in pairs.items():
            out, in_ = weight_of(linear[name]).shape
            Vh, U, bias = _factors(reader, name, parts, out, in_)
            if linear[name].bias is None and bias is not None and bool(bias.any()):
                raise ValueError(f"{path}: {name} has a bias, and in the base model {base.name} it has none")
            if linear[name].bias is not None and bias is None:
                bias = reader.get_or_base(None, f"{name}.bias", (out,))
            if len(Vh) > min(out, in_):
                weight = U.float() @ Vh.float()
                state[f"{name}.weight"] = weight if type(linear[name]) is nn.Linear else weight.t().contiguous()
                if bias is not None:
                    state[f"{name}.bias"] = bias
                continue
            ranks[name] = len(Vh)
            state |= {f"{name}.Vh.weight": Vh, f"{name}.U.weight": U, f"{name}.weight": U.new_empty(0)}
            if bias is not None and linear[name].bias is not None:
                state[f"{name}.U.bias"] = bias
        used = {full for parts in pairs.values() for full in parts.values()}
        state |= _rest(reader, empty, {*pairs}, {name: name for name in where if name not in used})
        reader.check_all_read()
    config = copy.deepcopy(base.config)
    config.dtype = dtype
    if ranks:
        sizes = {name: weight_of(linear[name]).numel() for name in pairs}
        left = sum(ranks[n] * sum(weight_of(linear[n]).shape) if n in ranks else sizes[n] for n in pairs)
        tied = {id(tensor): tensor.numel() for tensor in empty.state_dict(keep_vars=True).values()}
        factorized, whole = sum(sizes.values()), sum(tied.values())
        about = {"factorized": left / factorized, "stored": (whole - factorized + left) / whole}
        about |= {"size_ratio": left / factorized, "count": "factorized", "imported": "factors"}
        config.quantization_config = quantizer.AcipConfig("materialized", ranks, **about).to_dict()
    model = saving._from_pretrained(None, config, state_dict=state, dtype=dtype, device_map=device_map)
    model.config._name_or_path = base.name or ""
    model.generation_config = base.generation or model.generation_config
    return model.eval()


class _Memory:
    """A state dict, read as an open weight file is."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def get_tensor(self, name: str) -> Tensor:
        return self.state[name].detach()


def _tensors(source, stack: contextlib.ExitStack) -> tuple[dict[str, tuple], str | pathlib.Path]:
    """`{tensor: (open file, its path)}`, and what to call the whole."""
    if isinstance(source, dict):
        if not all(isinstance(tensor, Tensor) for tensor in source.values()):
            raise TypeError("source must be a state dict, {name: tensor}, a .safetensors file or a directory")
        return dict.fromkeys(source, (_Memory(source), "source")), "source"
    path = pathlib.Path(source)
    if path.is_dir():
        return _open(path, stack), path
    if path.exists() and path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no .safetensors file. Pickles are never read, as they may run code: load it where you trust "
            "it, and save its state_dict with safetensors.torch.save_file"
        )
    file = stack.enter_context(files.open_tensors(path))
    return dict.fromkeys(file.keys(), (file, path)), path


def _pairs(where: dict, names, linear: dict[str, nn.Module], path) -> dict[str, dict[str, str]]:
    """`{layer: {"U", "Vh" and perhaps "S", "U.bias", "Vh.bias", "bias": tensor name}}`."""
    if isinstance(names, str) and names != "auto" and names not in NAMES:
        raise ValueError(f"names must be auto, {', '.join(NAMES)} or patterns by factor, got {names!r}")
    if names == "auto":
        found = {key: _matched(where, patterns, linear) for key, patterns in NAMES.items()}
        pairs = max(found.values(), key=len)
    else:
        pairs = _matched(where, NAMES[names] if isinstance(names, str) else _checked(names), linear)
    if not pairs:
        strange = [name for name in where if name.removesuffix(".weight") not in linear][:4]
        raise ValueError(
            f"{path}: no pairs of factors of the base model's linear layers under the names {names!r}. Say what they "
            'are called, as in names={"U": "*_u_proj", "Vh": "*_v_proj", "layer": "*_proj"} (acip import … --names '
            f"'U=*_u_proj,Vh=*_v_proj,layer=*_proj'); there are {', '.join(strange) or 'no tensors'}"
        )
    for name, parts in pairs.items():
        lacking = {"U", "Vh"} - set(parts)
        if lacking:
            raise ValueError(f"{path}: {name} has {', '.join(parts.values())}, and no {lacking.pop()}")
    return pairs


def _checked(names: dict[str, str]) -> dict[str, str]:
    patterns = {"layer": "*", **names} if isinstance(names, dict) else {}
    if not {"U", "Vh"} <= set(patterns) <= {"U", "Vh", "S", "layer"}:
        raise ValueError(f"names must be patterns for U, Vh and perhaps S and layer, got {names!r}")
    for key, pattern in patterns.items():
        if not isinstance(pattern, str) or pattern.count("*") != 1:
            raise ValueError(f"names: the pattern of {key} must have one *, as *_u_proj, got {pattern!r}")
    return patterns


def _matched(where: dict, patterns: dict[str, str], linear: dict[str, nn.Module]) -> dict[str, dict[str, str]]:
    pairs: dict[str, dict[str, str]] = {}
    for part, pattern in patterns.items():
        if part == "layer":
            continue
        regex = re.compile(re.escape(pattern).replace(r"\*", "(.+)") + r"(\.weight|\.bias|)")
        for full in where:
            match = regex.fullmatch(full)
            layer = match and patterns["layer"].replace("*", match[1])
            if match and layer in linear:
                pairs.setdefault(layer, {})[part + (".bias" if match[2] == ".bias" else "")] = full
    for layer, parts in pairs.items():
        if f"{layer}.bias" in where:
            parts["bias"] = f"{layer}.bias"
    return {layer: pairs[layer] for layer in linear if layer in pairs}


def _factors(reader: _Reader, name: str, parts: dict, out: int, in_: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(Vh [rank, in], U [out, rank], bias [out] or None)`."""
    U, Vh = reader.get(parts["U"], (None, None)), reader.get(parts["Vh"], (None, None))
    shapes = list(U.shape), list(Vh.shape)
    if not (len(U) == out and Vh.shape[1] == in_ and U.shape[1] == len(Vh)):
        U, Vh = U.t(), Vh.t()  # for x A B
    if not (len(U) == out and Vh.shape[1] == in_ and U.shape[1] == len(Vh)):
        raise ValueError(
            f"{reader.path}: {parts['U']} is {shapes[0]} and {parts['Vh']} {shapes[1]}, where {name} needs "
            f"[{out}, rank] and [rank, {in_}]: the wrong base_model, or U and Vh are exchanged"
        )
    if "S" in parts:
        S = reader.get(parts["S"])
        if S.shape not in ((len(Vh),), (len(Vh), len(Vh))):
            raise ValueError(f"{reader.path}: {parts['S']} is {list(S.shape)}, but must be [{len(Vh)}]")
        dtype, S = U.dtype, S.float()
        U = (U.float() * S if S.dim() == 1 else U.float() @ S).to(dtype)
    biases = [reader.get(parts[key], (out,)).float() for key in ("bias", "U.bias") if key in parts]
    if "Vh.bias" in parts:
        biases.append(U.float() @ reader.get(parts["Vh.bias"], (len(Vh),)).float())
    bias = sum(biases[1:], biases[0]).to(U.dtype) if biases else None
    return Vh.contiguous(), U.contiguous(), bias
