"""What others have written: published ACIP checkpoints, and models of which some layers are pairs of factors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import os
import pathlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..compress.factorize import cached_svd
from ..compress.result import CompressionResult
from ..compress.sizing import PAPER, Sizing
from . import quantizer, saving
from .targets import linear_layers, weight_of

log = logging.getLogger("acip_kernels")

# What a published checkpoint calls the parts of a layer. The level `base_layer` is there where PEFT put an adapter.
_PART = re.compile(
    r"(.+?)(?:\.base_layer)?\.parametrization\.(ortho\.weight|ortho\.bias|base\.weight|mask|mask_score|S)"
)
_ADAPTER = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.weight")
_PLAIN = re.compile(r"(.+)\.base_layer\.(weight|bias)")
# bitsandbytes keeps these beside a quantized weight.
_QUANTIZED = re.compile(r".+\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|quant_state\..+)")
# Buffers that models once saved, and now make themselves.
_OBSOLETE = re.compile(r".+\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)")


def is_published(fields: dict) -> bool:
    """Whether `fields`, a config.json, is that of an ACIP checkpoint as the paper's authors publish them."""
    return fields.get("model_type") in ("acip_model", "parametrized_model") or "parametrization_config" in fields


def base_name(fields: dict) -> str | None:
    """The base model's name, or its directory, in a published checkpoint's config.json."""
    name = _object(fields, "base_model_config", "pretrained_model_kwargs").get("pretrained_model_name_or_path")
    return name if isinstance(name, str) else None


def _object(fields: dict, *path: str) -> dict:
    """The object at `path` in config.json; an empty one where there is none. Raises `ValueError` for another value."""
    for key in path:
        fields = fields.get(key) or {}
        if not isinstance(fields, dict):
            raise ValueError(f"config.json: {'.'.join(path)} must be an object, got {fields!r}")
    return fields


@torch.no_grad()
def import_checkpoint(
    path: str | os.PathLike,
    base_model: Any = None,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    svd_cache: str | os.PathLike | None = None,
) -> CompressionResult:
    """A published ACIP checkpoint, with its scores and adapters, as if this package had made it.

    The directory's `model` computes what the checkpoint computes, at the size that its masks say; from the result any
    size is cut. With `count="paper"` a size is what the authors' `prune_model_by_score` makes of it.

    A layer there is `ortho diag(1[mask > 0] c) base + s B A` (ACIP.md, section 5). Its columns and rows are scaled to
    norm one, and what they had goes into the singular values; adapters stay as they are. Of a layer that lost ranks
    for good (after `compress()`), the scores of the ranks that stayed are taken: the highest. A layer that was kept
    dense stays dense, with its adapter merged into it. A checkpoint of scores and adapters alone is decomposed anew
    from the base model's weights.

    Args:
        path: the directory, with config.json and model.safetensors, or its shards and their index.
        base_model: the model that was compressed: name on the hub, directory, model, or config. Only its config is
            needed, unless tensors are missing in `path`. None: what the checkpoint's own config names.
        dtype: of the factors; "auto" for the checkpoint's own.
        device_map: as for `from_pretrained`.
        svd_cache: directory that keeps decompositions.

    Raises:
        ValueError: no such checkpoint, one that is quantized or of a kind that is not known, tensors that are
            missing, left over or of shapes that do not fit the base model, or a base model that cannot be had.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a directory: fetch what is on the hub first (hf download {path} --local-dir …)"
        )
    file = path / "config.json"
    fields = files.read_json(file)
    kind = _Kind.of(fields, file)
    base = _Base.of(base_model, fields, file)
    with contextlib.ExitStack() as stack:
        where = _open(path, stack)
        layers, rest = _sorted_names(where, path)
        reader = _Reader(path, where, base)
        factors = [parts["ortho.weight"] for parts, _ in layers.values() if "ortho.weight" in parts]
        own = reader.get(factors[0]).dtype if factors else base.dtype
        dtype = _dtype(dtype) or own or torch.float32
        config = copy.deepcopy(base.config)
        config.dtype = dtype
        empty = saving._empty_model(pathlib.Path(base.name or "base_model"), config)
        linear = linear_layers(empty)[0]
        state, options = {}, {}
        for name, (parts, adapters) in layers.items():
            if name not in linear:
                raise ValueError(
                    f"{path}: the base model {base.name} has no linear layer {name!r}: give the base_model that this "
                    "checkpoint was made from"
                )
            out, in_ = weight_of(linear[name]).shape
            adapter = _adapter(reader, kind, name, adapters, out, in_)
            if "weight" in parts:
                weight = reader.get(parts["weight"], (out, in_)).float()
                if adapter is not None:
                    A, B, scaling, _ = adapter
                    weight += scaling * B @ A
                state[f"{name}.weight"] = weight.to(dtype)
                if linear[name].bias is not None:
                    state[f"{name}.bias"] = reader.get_or_base(parts.get("bias"), f"{name}.bias", (out,))
                continue
            tensors = _factors(reader, kind, name, parts, out, in_, dtype, svd_cache)
            options[name] = {"mask_scale": kind.scale(min(out, in_))}
            if tensors["S"].numel() < min(out, in_):
                options[name]["full_rank"] = tensors["S"].numel()
            if linear[name].bias is not None:
                tensors["bias"] = reader.get_or_base(parts.get("ortho.bias"), f"{name}.bias", (out,))
            if adapter is not None:
                A, B, scaling, dropout = adapter
                tensors |= {"lora_A": A, "lora_B": B}
                r = A.shape[0]
                options[name] |= {"adapter_rank": r, "adapter_alpha": scaling * r, "adapter_dropout": dropout}
            state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        state |= _rest(reader, empty, {*layers}, {f"model.{name}": name for name in rest})
        reader.check_all_read()
    if options:
        about = {"base_model": base.name, "imported": "acip_model"}
        config.quantization_config = quantizer.AcipConfig("factorized", layers=options, **about).to_dict()
    model = saving._from_pretrained(None, config, state_dict=state, dtype=dtype, device_map=device_map)
    model.config._name_or_path = str(path)
    model.generation_config = base.generation or model.generation_config
    result = CompressionResult(model.eval())
    if options:
        ranks = torch.stack([(scores > 0).sum() for scores in result.scores.values()]).cpu()
        result.size_ratio = Sizing.of(model, adapters=False).ratio(ranks, PAPER)
    return result


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a published checkpoint's config says of its layers. `adapters` is PEFT's config of each adapter."""

    mask_func: str
    mask_scaling: float | None  # None: the mask has norm one
    adapters: dict[str, dict]

    @classmethod
    def of(cls, fields: dict, file) -> _Kind:
        """Raises `ValueError`, naming `file`, for whatever would be computed in another way than is known here."""

        def refuse(what: str):
            raise ValueError(f"{file}: {what}; a newer acip_kernels may read it")

        if fields.get("model_type") != "acip_model":
            refuse(f"model_type is {fields.get('model_type')!r}, where only 'acip_model' has scores to cut by")
        about = _object(fields, "parametrization_config")
        for where in (fields, about):
            for key in where:
                if key.endswith("version") and key != "transformers_version":
                    refuse(f"{key} is {where[key]!r}, and published checkpoints that are known have none")
        if fields.get("quantization_config"):
            method = _object(fields, "quantization_config").get("quant_method")
            raise ValueError(f"{file}: quantized by {method}: such checkpoints are not read; save it before quantizing")
        if str(about.get("module_factory_cls")).rpartition(".")[2] not in ("svd", "SVDLinearParametrization"):
            refuse(f"module_factory_cls is {about.get('module_factory_cls')!r}, and only 'svd' is known")
        options = dict(_object(fields, "parametrization_config", "module_factory_kwargs"))
        mask_func, scaling = options.pop("mask_func", "ste"), options.pop("mask_scaling_factor", "norm")
        if options:
            refuse(f"module_factory_kwargs has {', '.join(map(repr, options))}, which is not known")
        if mask_func not in ("ste", "relu", "none"):
            refuse(f"mask_func is {mask_func!r}, and only 'ste', 'relu' and 'none' are known")
        if scaling != "norm" and (type(scaling) not in (int, float) or not 0 < scaling < math.inf):
            raise ValueError(f"{file}: mask_scaling_factor must be 'norm' or a positive number, got {scaling!r}")
        adapters = _object(fields, "adapter_config", "peft_config")
        for name in adapters:
            one = _object(adapters, name)
            if one.get("peft_type", "LORA") != "LORA" or one.get("use_dora"):
                what = "DoRA" if one.get("use_dora") else one.get("peft_type")
                refuse(f"adapter {name!r} is a {what} adapter, and only LoRA is known")
            for key in ("lora_bias", "modules_to_save"):
                if one.get(key):
                    refuse(f"adapter {name!r} has {key} {one[key]!r}, and only products of two matrices are known")
            if type(one.get("lora_alpha")) not in (int, float) or not math.isfinite(one["lora_alpha"]):
                raise ValueError(
                    f"{file}: adapter {name!r}: lora_alpha must be a number, got {one.get('lora_alpha')!r}"
                )
        return cls(mask_func, None if scaling == "norm" else float(scaling), adapters)

    def scale(self, full_rank: int) -> float:
        """`c`, what every mask parameter of a layer starts at."""
        return full_rank**-0.5 if self.mask_scaling is None else self.mask_scaling

    def adapter_scaling(self, adapter: str, layer: str, r: int) -> float:
        """`α/r`, or `α/√r` of a rank-stabilized adapter (arXiv 2312.03732), as PEFT finds it for a layer."""
        settings = self.adapters[adapter]
        alpha = _by_pattern(settings.get("alpha_pattern"), layer, settings["lora_alpha"])
        return alpha / math.sqrt(r) if settings.get("use_rslora") else alpha / r


def _by_pattern(patterns, layer: str, default):
    """What PEFT's rank_pattern or alpha_pattern says of a layer: by its name, or the last parts of it."""
    for pattern, value in (patterns or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise ValueError(f"an adapter's pattern {pattern!r} is a regular expression; only names are read")
        if layer == pattern or layer.endswith(f".{pattern}"):
            return value
    return default


@dataclasses.dataclass
class _Base:
    """The model that was compressed: its config, and its weights, loaded when they are first needed."""

    name: str | None
    config: Any
    dtype: torch.dtype | None
    state: dict[str, Tensor] | None = None
    generation: Any = None  # what ends its texts, say, where that is known

    @classmethod
    def of(cls, base_model, fields: dict, file) -> _Base:
        from transformers import AutoConfig, GenerationConfig, PretrainedConfig

        about = _object(fields, "base_model_config")
        options = _object(fields, "base_model_config", "pretrained_model_kwargs")
        dtype: Any = _dtype(options.get("torch_dtype") or options.get("dtype") or "auto")
        name: Any = base_model
        config: Any = None
        state: dict[str, Tensor] | None = None
        generation: Any = None
        if isinstance(base_model, nn.Module):
            name, config = base_model.config._name_or_path or None, base_model.config
            dtype, state = base_model.dtype, base_model.state_dict()
            generation = copy.deepcopy(getattr(base_model, "generation_config", None))
        elif isinstance(base_model, PretrainedConfig):
            name, config = base_model._name_or_path or None, base_model
        elif base_model is None:
            name, own = base_name(fields), about.get("pretrained_config")
            if isinstance(own, dict):
                try:
                    config = AutoConfig.for_model(**own)
                except Exception as error:
                    raise ValueError(f"{file}: pretrained_config describes no model: {error}") from error
        if config is None:
            if name is None:
                raise ValueError(f"{file} names no base model: give base_model (acip import … --base MODEL)")
            try:
                config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            except Exception as error:  # transformers has many kinds for what cannot be had
                named = "" if base_model is not None else ", which the checkpoint names,"
                raise ValueError(
                    f"the config of the base model {str(name)!r}{named} cannot be had: give base_model, its directory "
                    f"or its name on the hub (acip import … --base MODEL): {str(error).strip().splitlines()[0]}"
                ) from None
            with contextlib.suppress(OSError, ValueError):  # it need not have one
                generation = GenerationConfig.from_pretrained(name)
        if getattr(config, "quantization_config", None):
            raise ValueError(f"the base model {name} is compressed or quantized itself: give the one of plain weights")
        dtype = dtype or getattr(config, "dtype", None)
        return cls(None if name is None else str(name), config, dtype, state, generation)

    def get(self, name: str, why: str) -> Tensor:
        """A weight of the base model, which `why` says the need of."""
        if self.state is None:
            try:
                if self.name is None:
                    raise ValueError("only its config was given")
                config = copy.deepcopy(self.config)
                self.state = saving._from_pretrained(self.name, config, dtype=self.dtype or "auto").state_dict()
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"{why}, and the base model's weights cannot be had; give base_model: {reason}"
                ) from None
        if name not in self.state:
            raise ValueError(f"{why}, and the base model {self.name} has none")
        return self.state[name]


class _Reader:
    """The tensors of open weight files, of which none may be left over."""

    def __init__(self, path, where: dict, base: _Base):
        self.path, self.where, self.base = path, where, base
        self.left = set(where)

    def get(self, name: str, shape: tuple | None = None) -> Tensor:
        """A tensor of finite numbers, which must have `shape` (None in it for any length)."""
        if name not in self.where:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        self.left.discard(name)
        file, shard = self.where[name]
        tensor = files.read_tensor(file, shard, name)
        dims = list(tensor.shape)
        if shape is not None and (len(dims) != len(shape) or any(b not in (a, None) for a, b in zip(dims, shape))):
            wanted = ", ".join("any" if one is None else str(one) for one in shape)
            raise ValueError(
                f"{shard}: tensor {name!r} is {dims}, but the base model {self.base.name} needs [{wanted}]"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(
                f"{shard}: tensor {name!r} is {tensor.dtype}: quantized checkpoints are not read; save it before "
                "quantizing"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{shard}: tensor {name!r} holds NaN or infinite values")
        return tensor

    def get_or_base(self, name: str | None, base_name: str, shape: tuple) -> Tensor:
        """The tensor, or the base model's where it was not saved."""
        if name is not None and name in self.where:
            return self.get(name, shape)
        tensor = self.base.get(base_name, f"{self.path} has no tensor for {base_name!r}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"the base model's {base_name} is {list(tensor.shape)}, but must be {list(shape)}")
        return tensor

    def check_all_read(self) -> None:
        left = sorted(name for name in self.left if not _OBSOLETE.fullmatch(name))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ValueError(
                f"{self.path}: no place in the base model {self.base.name} for tensor "
                f"{', '.join(map(repr, left[:3]))}{more}: give the base_model that this was made from"
            )


def _open(path: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, tuple]:
    """`{tensor: (open file, its path)}` of a directory's safetensors."""
    single = path / "model.safetensors"
    if not single.exists() and not (path / "model.safetensors.index.json").exists():
        pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        if pickles:
            raise ValueError(
                f"{pickles[0]} is a pickle, which is never read, as it may run code: load it where you trust it, and "
                "save its state_dict with safetensors.torch.save_file as model.safetensors"
            )
    return saving._open_shards(path, "model.safetensors", stack)


def _sorted_names(where: dict, path) -> tuple[dict[str, tuple[dict, dict]], list[str]]:
    """`{layer: ({part: tensor name}, {adapter: {"A" or "B": tensor name}})}`, and the names of all other tensors.

    Parts are those of `_PART`, or "weight" and "bias" of a layer that was kept dense beside an adapter.
    """
    layers: dict[str, tuple[dict, dict]] = {}
    rest, nested = [], set()
    for full in where:
        if _QUANTIZED.fullmatch(full):
            raise ValueError(
                f"{path}: tensor {full!r} is bitsandbytes': quantized checkpoints are not read; save it before "
                "quantizing"
            )
        name = full.removeprefix("model.")
        if name == full:
            continue  # left over
        if match := _PART.fullmatch(name) or _PLAIN.fullmatch(name):
            layers.setdefault(match[1], ({}, {}))[0][match[2]] = full
            if name.startswith(f"{match[1]}.base_layer."):
                nested.add(match[1])
        elif match := _ADAPTER.fullmatch(name):
            layers.setdefault(match[1], ({}, {}))[1].setdefault(match[3], {})[match[2]] = full
        else:
            rest.append(name)
    for name, (parts, adapters) in layers.items():
        if "mask_score" not in parts and "weight" not in parts:
            wanted = "mask_score" if parts else "base_layer.parametrization.mask_score"
            raise ValueError(f"{path}: {name} has no tensor {wanted!r}: there are no scores to cut it by")
        if name in nested and not adapters:
            raise ValueError(f"{path}: tensor 'model.{name}.lora_A.default.weight' is missing")
    return layers, rest


def _adapter(reader: _Reader, kind: _Kind, name: str, adapters: dict, out: int, in_: int):
    """`(A [r, in], B [out, r], scaling, dropout)` of all of a layer's adapters together, float32; None without any."""
    if not adapters:
        return None
    parts = []
    for adapter, names in adapters.items():
        if adapter not in kind.adapters:
            raise ValueError(f"{reader.path / 'config.json'}: adapter_config does not know the adapter {adapter!r}")
        for which in "AB":
            if which not in names:
                raise ValueError(f"{reader.path}: tensor 'model.{name}.lora_{which}.{adapter}.weight' is missing")
        A = reader.get(names["A"], (None, in_)).float()
        r = A.shape[0]
        settings = kind.adapters[adapter]
        said = _by_pattern(settings.get("rank_pattern"), name, settings.get("r", r))
        if r < 1 or said != r:
            raise ValueError(f"{reader.path}: tensor {names['A']!r} is {list(A.shape)}, where config.json has r {said}")
        B = reader.get(names["B"], (out, r)).float()
        parts.append((A, B, kind.adapter_scaling(adapter, name, r), settings.get("lora_dropout") or 0.0))
    if len(parts) == 1:
        return parts[0]
    # Active together, their products add up.
    A, B = torch.cat([A for A, *_ in parts]), torch.cat([scaling * B for _, B, scaling, _ in parts], dim=1)
    return A, B, 1.0, parts[0][3]


def _factors(reader: _Reader, kind: _Kind, name: str, parts: dict, out: int, in_: int, dtype, svd_cache) -> dict:
    """The state of a layer's `SVDLinear` but for bias and adapter."""
    full = min(out, in_)
    scale = kind.scale(full)
    scores = reader.get(parts["mask_score"], (None,)).float()
    if "S" in parts:
        stored_S = reader.get(parts["S"], (None,)).float()
    if "ortho.weight" not in parts:
        # Scores and adapters alone: the factors are those of the base model's weight.
        if len(scores) != full:
            raise ValueError(f"{reader.path}: {name} has {len(scores)} scores, where the base model has {full} ranks")
        weight = reader.get_or_base(None, f"{name}.weight", (out, in_)).to(dtype)
        U, S, Vh = cached_svd(weight, svd_cache)
        mask = reader.get(parts["mask"], (full,)) if "mask" in parts else torch.full((full,), scale)
    else:
        for part in ("base.weight", "mask"):
            if part not in parts:
                raise ValueError(f"{reader.path}: {name} has no tensor {part!r}")
        ortho = reader.get(parts["ortho.weight"], (out, None))
        rank = ortho.shape[1]
        if rank > full or len(scores) < rank:
            raise ValueError(
                f"{reader.path}: {name} is of rank {rank}, where the base model {reader.base.name} has {full} ranks "
                f"and the checkpoint {len(scores)} scores"
            )
        base = reader.get(parts["base.weight"], (rank, in_))
        mask = reader.get(parts["mask"], (rank,))
        # As the mask's own dtype rounds it.
        scale = float(torch.tensor(scale, dtype=mask.dtype))
        if kind.mask_func != "ste":
            odd = (mask > 0) & ((mask.float() - scale).abs() > torch.finfo(mask.dtype).eps * scale)
            if kind.mask_func == "none":
                odd |= mask < 0
            if bool(odd.any()):
                raise ValueError(
                    f"{reader.path}: mask_func is {kind.mask_func!r}, and the mask of {name} has other values than 0 "
                    f"and {scale:g}, which another size would lose: prune it with its own code, and save again"
                )
        precise = torch.promote_types(ortho.dtype, torch.float32)
        ortho, base = ortho.to(precise), base.to(precise)
        norm_U, norm_Vh = ortho.norm(dim=0), base.norm(dim=1)
        tiny = torch.finfo(precise).tiny
        U, Vh = ortho / norm_U.clamp_min(tiny), base / norm_Vh.clamp_min(tiny)[:, None]
        S = scale * norm_U * norm_Vh
        if len(scores) > rank:
            # Ranks that went for good have left their scores behind; those of the highest stayed, in their order.
            kept = scores.sort(descending=True, stable=True).indices[: max(rank, 1)].sort().values
            if rank == 0:
                # A layer that lost all: one rank that adds nothing, and is the first to go.
                U, S, Vh = U.new_zeros(out, 1), S.new_zeros(1), Vh.new_zeros(1, in_)
                scores, mask = scores.new_full((1,), torch.finfo(scores.dtype).min), mask.new_zeros(1)
            else:
                scores = scores[kept]
                if "S" in parts and len(stored_S) > int(kept[-1]):
                    apart = (stored_S[kept] - S.float()).abs() > 0.02 * (stored_S.max() + stored_S[kept])
                    if bool(apart.any()):
                        log.warning(
                            "%s: the ranks that are left are not those of the highest scores; "
                            "smaller sizes are cut by scores that may be others'",
                            name,
                        )
    return {
        "U": U.to(dtype).contiguous(),
        "S": S.to(torch.promote_types(dtype, torch.float32)),
        "Vh": Vh.to(dtype).contiguous(),
        "mask": mask.float().clamp_min(0),
        "scores": scores,
    }


def _rest(reader: _Reader, model: nn.Module, layers: set[str], names: dict[str, str]) -> dict[str, Tensor]:
    """The state of everything but `layers`, by `model`'s own names.

    names: `{name in the file: model's name}`. A matrix that is tied may be there under any of its names.
    """
    stored = {name: full for full, name in names.items()}
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if name.rpartition(".")[0] not in layers}
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    found = {}
    for aliases in tied.values():
        shape = tuple(state[aliases[0]].shape)
        here = [name for name in aliases if name in stored]
        tensors = [reader.get(stored[name], shape) for name in here]
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            raise ValueError(f"{reader.path}: {here[1]} differs from {here[0]}, which the base model ties it to")
        found[aliases[0]] = tensors[0] if tensors else reader.get_or_base(None, aliases[0], shape)
    return found


def _dtype(value) -> torch.dtype | None:
    """A dtype or its name, with or without "torch."; None for "auto"."""
    if value is None or value == "auto" or isinstance(value, torch.dtype):
        return None if value == "auto" else value
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be auto, bfloat16, float16, float32 or float64, got {value!r}")
    return dtype
