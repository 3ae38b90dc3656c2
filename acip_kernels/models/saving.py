"""Checkpoints: elastic ones, from which any size loads, and materialized ones, plain transformers directories."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import pathlib
import re
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checksums, files
from ..compress.config import CompressionConfig
from ..compress.factorize import cached_svd, svd_layers
from ..compress.materialize import Cut, layer_tensors, materialize, plan_cut
from ..compress.nested import NestedConfig, RankingConfig
from ..compress.quantized import rounding_metric
from ..compress.result import CompressionResult
from ..compress.sizing import Sizing, forms_for
from ..nn import QuantizedEmbedding, SVDLinear
from ..nn.pivot_linear import unpack_bits
from ..nn.quantized_linear import QuantizedLinear
from ..ops.quantize import Scheme
from ..report import read_history
from . import fuse as fusing
from . import quantizer
from .card import model_card
from .targets import weight_of

# A name of its own: a loader that looks for model.safetensors stops with an error instead of random weights.
_ELASTIC = "elastic{suffix}.safetensors"
_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
# How the names of the tensors end that only this package's layers have.
_MATERIALIZED = (
    *(".Vh.weight", ".U.weight", ".U.bias", ".P.weight", ".C.weight", ".is_pivot"),
    *(".qweight", ".scales", ".zeros"),
)
_FLOATING = ("BF16", "F16", "F32", "F64")
# Keys of config.json whose number something is made for each of, before any weight file is looked at.
_NUMBER_OF = re.compile(r"(layers?|labels|experts|blocks|depth)$")
_MOST = 100_000
# `{tensor: (open file, its path)}`.
Shards = dict[str, tuple[Any, pathlib.Path]]
_LAYER_TENSORS = ("U", "S", "Vh", "scores", "mask", "bias", "lora_A", "lora_B", "input_variances")


def save(
    model_or_result: nn.Module | CompressionResult,
    path: str | os.PathLike,
    *,
    tokenizer: Any = None,
    compact: bool = False,
    base_model: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write a model to the directory `path`, in one step: an interruption or a full disk leaves what was there.

    A `CompressionResult`, or a model with `SVDLinear` layers, becomes an *elastic* checkpoint: factors in the order of
    their scores, scores, adapters and everything else, so that `load(path, size_ratio=…)` reads just what that size
    needs. Any other transformers model is written by its own `save_pretrained`, with a model card. `verify` tells later
    whether all of it is as it was written.

    Args:
        tokenizer: written along if given.
        compact: of an elastic checkpoint, only scores and adapters; loading it needs the base model again.
        base_model: name or directory of the model that was compressed; None for where it was loaded from.
        overwrite: replace a directory that is not empty.
        max_shard_size: of one weight file.

    Raises:
        FileExistsError: `path` is a file, or a directory that is not empty, without `overwrite`.
        TypeError: not a transformers model.
        OSError: the disk is full, or cannot be written to.
    """
    result = model_or_result if isinstance(model_or_result, CompressionResult) else CompressionResult(model_or_result)
    model = result.model
    if not quantizer.is_transformers(model):
        raise TypeError(f"save takes a transformers model or a CompressionResult, got {type(model).__name__}")
    elastic = any(hasattr(module, "set_live") for module in model.modules())
    if compact and not elastic:
        raise ValueError("compact: a materialized model has no scores to save by themselves")
    base_model = base_model or _base_model(model)
    with files.new_directory(path, overwrite=overwrite) as directory:
        try:
            if elastic:
                _write_elastic(result, directory, compact, base_model, max_shard_size)
            else:
                model.save_pretrained(directory, max_shard_size=max_shard_size)
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                raise OSError(f"cannot write {path}: {error}") from error
            raise
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        files.write_text(directory / "README.md", model_card(model, result, base_model))
        checksums.write(directory)


def load(
    path: str | os.PathLike,
    size_ratio: float | None = None,
    *,
    count: str = "factorized",
    adapters: str = "auto",
    rank_multiple: int = 1,
    forms: tuple[str, ...] | None = None,
    base_model: str | None = None,
    svd_cache: str | os.PathLike | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    quantize_group: int = 64,
    quantize_symmetric: bool = False,
    quantize_rounding: str = "feedback",
    quantize_embeddings: str | None = None,
    fuse: bool = False,
) -> nn.Module:
    """A model from a directory that this package wrote, in evaluation mode; or from a published ACIP checkpoint.

    Args:
        path: an elastic or a materialized checkpoint, a published one (see `import_checkpoint`), or any other
            transformers directory.
        size_ratio: of an elastic or published checkpoint, the size to load, in (0, 1]: an ordinary model, as
            `materialize` makes it; of an elastic one, only the ranks that stay are read. None: the factorized model
            itself, with `SVDLinear` layers, which `materialize` cuts. A materialized checkpoint has one size, and takes
            None alone.
        count, adapters, rank_multiple, forms: as for `materialize`.
        base_model, svd_cache: for a compact elastic checkpoint, or a published one, where the base model is now, and a
            directory that keeps its decompositions.
        dtype, device_map: as for `from_pretrained`.
        quantize, quantize_group, quantize_symmetric, quantize_rounding, quantize_embeddings: with a size_ratio, as for
            `materialize`. A materialized checkpoint loads as it is, quantized or not.
        fuse: of an ordinary model, let sibling layers be computed in one call, see `acip_kernels.fuse`.

    Raises:
        ValueError: a file that is missing, corrupt or of another kind (file and tensor are named), or arguments
            that do not fit.
    """
    path = pathlib.Path(path)
    cutting = {"count": count, "adapters": adapters, "rank_multiple": rank_multiple, "forms": forms}
    rounding = {"quantize": quantize, "quantize_group": quantize_group, "quantize_symmetric": quantize_symmetric}
    rounding |= {"quantize_rounding": quantize_rounding, "quantize_embeddings": quantize_embeddings}
    if _is_published(path):
        from .foreign import import_checkpoint

        source = {"base_model": base_model, "dtype": dtype, "device_map": device_map, "svd_cache": svd_cache}
        return _cut(import_checkpoint(path, **source).model, size_ratio, fuse, cutting | rounding)
    config, generation = _config(path), _generation_config(path)
    fields = _acip_fields(config)
    acip = quantizer.AcipConfig(**fields) if fields else None
    if acip is not None and acip.kind == "factorized":
        raise ValueError(f"{path / 'config.json'}: kind is 'factorized'; a file is materialized or elastic")
    scheme = None if quantize is None else Scheme(quantize, quantize_group, quantize_symmetric)
    _check_cut(size_ratio, False, quantize or quantize_embeddings)
    if acip is None or acip.kind != "elastic":
        if size_ratio is not None:
            about = f" at {fields['size_ratio']}" if "size_ratio" in fields else ""
            raise ValueError(
                f"{path} is not an elastic checkpoint but has one size{about}: "
                "load it without size_ratio, or cut the elastic checkpoint that it was made from"
            )
        if acip is not None:
            _check_materialized(path, config, acip)
        try:
            model = _from_pretrained(path, config, dtype=dtype, device_map=device_map)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(f"{path}: its weights have other shapes than config.json describes: {error}") from error
        return _fused_if(fuse, model)
    if getattr(acip, "compact", False):
        model = _rebuild(path, config, acip, base_model, svd_cache, dtype, device_map)
        model.generation_config = generation or model.generation_config
        return _cut(model, size_ratio, fuse, cutting | rounding)
    _check_cut(size_ratio, fuse)
    with _Elastic(path, acip) as elastic:
        elastic.check_model(config)
        if size_ratio is None:
            state = {f"{name}.{key}": tensor for name in acip.layers for key, tensor in elastic.layer(name).items()}
            config.quantization_config = _factorized(acip).to_dict()
        else:
            cut = elastic.cut(size_ratio, scheme=scheme, rounding=quantize_rounding, **cutting)
            state = elastic.materialized(cut, quantize_rounding)
            quantizer.describe(config, *_ranks(state), size_ratio=size_ratio, count=count, cut=cut)
        state |= elastic.rest()
    model = _from_pretrained(None, config, state_dict=state, dtype=dtype, device_map=device_map)
    model.config._name_or_path = str(path)
    model.generation_config = generation or model.generation_config
    if quantize_embeddings is not None:
        quantizer.quantize_embeddings(model, Scheme(quantize_embeddings, quantize_group, quantize_symmetric))
    return _fused_if(fuse, model)


def _cut(model: nn.Module, size_ratio: float | None, fuse: bool, options: dict) -> nn.Module:
    """A factorized model itself, or the size that is asked for."""
    _check_cut(size_ratio, fuse, options["quantize"] or options["quantize_embeddings"])
    return model if size_ratio is None else _fused_if(fuse, materialize(model, size_ratio, **options))


def _check_cut(size_ratio: float | None, fuse: bool, quantize: str | None = None) -> None:
    if quantize is not None and size_ratio is None:
        raise ValueError("quantize: weights are quantized as a size is cut from an elastic checkpoint; give size_ratio")
    if fuse and size_ratio is None:
        raise ValueError("fuse: a factorized model, of every size, is not deployed; give size_ratio")


def _fused_if(wanted: bool, model: nn.Module) -> nn.Module:
    return fusing.fuse(model) if wanted else model


def _is_published(path: pathlib.Path) -> bool:
    from .foreign import is_published

    return (path / "config.json").exists() and is_published(files.read_json(path / "config.json"))


def load_result(path: str | os.PathLike, **options: Any) -> CompressionResult:
    """A `CompressionResult` from an elastic or published checkpoint; `options` as for `load`, without a size."""
    if _is_published(pathlib.Path(path)):
        from .foreign import import_checkpoint

        return import_checkpoint(path, **options)
    model = load(path, **options)
    if not any(hasattr(module, "set_live") for module in model.modules()):
        raise ValueError(f"{path} is not an elastic checkpoint")
    fields = files.read_json(pathlib.Path(path) / "config.json")["quantization_config"]
    history = pathlib.Path(path) / "history.jsonl"
    return CompressionResult(
        model,
        stored_config(path),
        read_history(history) if history.exists() else [],
        fields.get("final_size_ratio", 1.0),
    )


def stored_config(path: str | os.PathLike) -> CompressionConfig | RankingConfig | None:
    """What the elastic checkpoint `path` was made with, or None if it does not say."""
    fields = files.read_json(pathlib.Path(path) / "config.json")["quantization_config"]
    config = fields.get("compression")
    try:
        return None if config is None else config_from_dict(config)
    except ValueError as error:
        raise ValueError(f"{pathlib.Path(path) / 'config.json'}: compression: {error}") from None


def config_from_dict(fields: dict) -> CompressionConfig | RankingConfig:
    """The configuration of which `fields` is the `to_dict`. Raises `ValueError` for what this version does not know."""
    kinds = {kind.__name__: kind for kind in (CompressionConfig, NestedConfig, RankingConfig)}
    name = fields.get("config", "CompressionConfig")
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"config is {name!r}: a newer acip_kernels may know it")
    try:
        return kinds[name].from_dict(fields)
    except (TypeError, AttributeError, OverflowError) as error:  # what comparing or calculating with a text says
        raise ValueError(f"no {name} has such fields: {error}") from None


# ---- elastic checkpoints


def _write_elastic(result: CompressionResult, directory, compact: bool, base_model, max_shard_size: str) -> None:
    from huggingface_hub import save_torch_state_dict

    model, layers = result.model, svd_layers(result.model)
    if quantizer.quantized_layers(model):
        raise ValueError(f"an elastic checkpoint holds no quantized layers, as {quantizer.quantized_layers(model)[0]}")
    imported = _acip_fields(model.config).get("imported")
    if compact and imported:
        raise ValueError("compact: factors that were imported are not quite those of the base model; save them whole")
    # For people to read: of a directory, only its name.
    base_name = base_model and (pathlib.Path(base_model).resolve().name if os.path.exists(base_model) else base_model)
    if not compact and base_model is not None and pathlib.Path(base_model).exists():
        base_model = None  # a path of this machine, which nothing here needs
    if compact and base_model is None:
        raise ValueError("compact: say which base_model the factors are rebuilt from")
    if compact and result.config is not None and not result.config.rebuilds:
        raise ValueError(
            "compact: factors that were trained, or decomposed by what the activations make of them, cannot be rebuilt "
            "from the base model alone"
        )
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, layer in layers.items():
        seen |= {id(tensor) for tensor in layer.state_dict(keep_vars=True).values()}
        # What is rebuilt is in the order of the singular values; a loaded layer is in that of the scores.
        order = layer.S.sort(descending=True, stable=True).indices
        kept = {"scores": layer.scores[order], "S": layer.S[order]}
        if layer.adapter_rank:
            kept |= {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
        if not compact:
            # Stable, so that equal scores stay in the order of their singular values.
            order = layer.scores.sort(descending=True, stable=True).indices
            kept |= {"scores": layer.scores[order], "S": layer.S[order]}
            kept |= {"U": layer.U[:, order], "Vh": layer.Vh[order]}
            if imported:  # others prune to any size without a word to the scores
                kept["mask"] = layer.mask[order]
            if layer.input_variances is not None:
                kept["input_variances"] = layer.input_variances
            if layer.bias is not None:
                kept["bias"] = layer.bias
        tensors |= {f"{name}.{key}": tensor for key, tensor in kept.items()}
    if not compact:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:  # a tied matrix is written once, under its first name
                seen.add(id(tensor))
                tensors[name] = tensor
    save_torch_state_dict(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        directory,
        filename_pattern=_ELASTIC,
        max_shard_size=max_shard_size,
        metadata={"format": "pt"},
    )
    acip = quantizer.AcipConfig(
        "elastic",
        layers={name: quantizer.svd_layer_options(layer) for name, layer in layers.items()},
        compact=compact,
        base_model=base_model,
        base_name=base_name,
        final_size_ratio=result.size_ratio,
        compression=None if result.config is None else result.config.to_dict(),
        **({"imported": imported} if imported else {}),
    )
    fields = model.config.to_dict()
    fields.pop("_name_or_path", None)  # as save_pretrained does
    fields |= {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": acip.to_dict(),
    }
    files.write_json(directory / "config.json", fields)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
    if result.history:
        lines = (json.dumps(row) + "\n" for row in result.history)
        files.write_text(directory / "history.jsonl", "".join(lines))


class _Elastic:
    """The tensors of an elastic checkpoint, read as they are asked for."""

    def __init__(self, path: pathlib.Path, acip: quantizer.AcipConfig):
        self.path, self.layers = path, acip.layers
        self.where: Shards = {}

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.where = _open_shards(self.path, _ELASTIC.format(suffix=""), stack)
            self.check()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self.stack.close()

    def check(self) -> None:
        """Every layer's tensors are there, with shapes that fit each other, and scores that are numbers in order."""
        for name, options in self.layers.items():
            r = options.get("adapter_rank", 0)
            needed = ("scores", "S", "U", "Vh", *(("lora_A", "lora_B") if r else ()))
            needed += ("mask",) if f"{name}.mask" in self.where else ()
            variances = options.get("input_variances") or f"{name}.input_variances" in self.where
            needed += ("input_variances",) if variances else ()
            shapes = {key: self.shape(f"{name}.{key}") for key in needed}
            k, out, in_ = shapes["scores"], shapes["U"][:1], shapes["Vh"][1:]
            expected = {
                "scores": k,
                "S": k,
                "mask": k,
                "U": out + k,
                "Vh": k + in_,
                "lora_A": [r, *in_],
                "lora_B": [*out, r],
                "input_variances": in_,
            }
            for key, shape in shapes.items():
                if shape != expected[key]:
                    file = self.where[f"{name}.{key}"][1]
                    raise ValueError(f"{file}: tensor {name}.{key} is {shape}, where {expected[key]} fits the others")
        for name, (file, shard) in self.where.items():
            _check_floating(file, shard, name)
        self.scores = {name: self.get(f"{name}.scores") for name in self.layers}
        for name, scores in self.scores.items():
            for key in ("scores", "S", "mask", "input_variances"):
                if f"{name}.{key}" in self.where and not bool(self.get(f"{name}.{key}").isfinite().all()):
                    raise ValueError(f"{self.where[f'{name}.{key}'][1]}: tensor {name}.{key} is not finite")
            if bool((scores[1:] > scores[:-1]).any()):
                raise ValueError(f"{self.where[f'{name}.scores'][1]}: tensor {name}.scores is not in falling order")

    def check_model(self, config) -> None:
        """Every tensor of the model is there, in the shape that the model has for it; nothing is allocated."""
        model = _empty_model(self.path, config, self.where)
        quantizer.put_svd_layers(model, self.layers)
        masks = {f"{name}.mask" for name in self.layers}
        state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in masks}
        here = {id(tensor) for name, tensor in state.items() if name in self.where}
        for name in self.layers:
            if f"{name}.bias" in self.where and f"{name}.bias" not in state:
                raise ValueError(f"{self.where[f'{name}.bias'][1]}: tensor {name}.bias is there, the layer has no bias")
        for name, tensor in state.items():
            if name not in self.where and id(tensor) in here:
                continue  # tied to one that is there
            if self.shape(name) != list(tensor.shape):
                raise ValueError(
                    f"{self.where[name][1]}: tensor {name} is {self.shape(name)}, but must be {list(tensor.shape)}"
                )

    def shape(self, name: str) -> list[int]:
        if name not in self.where:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        return list(self.where[name][0].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        self.shape(name)
        return files.read_tensor(*self.where[name], name)

    def layer(self, name: str) -> dict[str, Tensor]:
        """The state of a layer's `SVDLinear`."""
        state = {key: self.get(f"{name}.{key}") for key in _LAYER_TENSORS if f"{name}.{key}" in self.where}
        # Of a run, a live entry's score is its mask parameter; a pruned one's mask is whatever is not above zero.
        return {"mask": state["scores"].clamp_min(0)} | state

    def rest(self) -> dict[str, Tensor]:
        """Everything but the factorized layers."""
        inside = {f"{name}.{key}" for name in self.layers for key in _LAYER_TENSORS}
        return {name: self.get(name) for name in self.where if name not in inside}

    def cut(
        self,
        size_ratio: float,
        *,
        rank_multiple: int,
        forms: tuple[str, ...] | None,
        scheme: Scheme | None,
        rounding: str,
        **options,
    ) -> Cut:
        inside = {f"{name}.{key}" for name in self.layers for key in _LAYER_TENSORS if key != "bias"}
        out = torch.tensor([self.shape(f"{name}.U")[0] for name in self.layers])
        in_ = torch.tensor([self.shape(f"{name}.Vh")[1] for name in self.layers])
        rest = sum(torch.Size(self.shape(name)).numel() for name in self.where if name not in inside)
        ranks = torch.tensor([layer.get("adapter_rank", 0) for layer in self.layers.values()])
        full = torch.tensor([scores.numel() for scores in self.scores.values()])
        trained = any(r and bool(self.get(f"{name}.lora_B").any()) for name, r in zip(self.layers, ranks.tolist()))
        biases = sum(self.shape(name)[0] for name in (f"{name}.bias" for name in self.layers) if name in self.where)
        informed = rounding == "feedback" and any(f"{name}.input_variances" in self.where for name in self.layers)
        storage = rest, rank_multiple, forms_for(forms, scheme, informed), scheme, biases
        with_adapters = Sizing(tuple(self.layers), out, in_, full, ranks, *storage)
        without = dataclasses.replace(with_adapters, adapter_rank=torch.zeros_like(ranks))
        return plan_cut(self.scores, with_adapters, without, size_ratio, trained=trained, **options)

    def metric(self, name: str, Vh: Tensor, rounding: str) -> Tensor | None:
        """What the layer's weights are rounded by."""
        variances = self.get(f"{name}.input_variances") if f"{name}.input_variances" in self.where else None
        return rounding_metric(Vh, self.get(f"{name}.S"), variances, None, rounding)

    @torch.no_grad()
    def materialized(self, cut: Cut, rounding: str) -> dict[str, Tensor]:
        """The state of the factorized layers' ordinary forms; what was pruned is not read, but for rounding's sake."""
        state: dict[str, Tensor] = {}
        form, scheme = cut.forms, cut.sizing.scheme
        for (name, options), rank in zip(self.layers.items(), cut.ranks.tolist(), strict=True):
            U, Vh = (self.where[f"{name}.{key}"][0].get_slice(f"{name}.{key}") for key in ("U", "Vh"))
            metric = None if scheme is None else self.metric(name, Vh[:], rounding)
            U, Vh = U[:, :rank], Vh[:rank]
            r = options.get("adapter_rank", 0) if cut.adapters != "drop" else 0
            tensors = layer_tensors(
                U,
                self.get(f"{name}.S")[:rank],
                Vh,
                self.get(f"{name}.lora_A") if r else None,
                self.get(f"{name}.lora_B") if r else None,
                options.get("adapter_alpha", 16.0) / r if r else 0.0,
                form=form[name],
                truncate=cut.adapters == "truncate",
                dtype=U.dtype,
                scheme=scheme,
                metric=metric,
            )
            if "weight" in tensors:
                if options.get("source_type") == "Conv1D":
                    tensors["weight"] = tensors["weight"].t().contiguous()
            else:
                # As LowRankLinear, PivotLinear and QuantizedLinear have it.
                holders = {key.removesuffix("qweight") for key in tensors if key.endswith("qweight")}
                tensors |= {f"{holder}weight": U.new_empty(0) for holder in {"", *holders}}
            bias = "U.bias" if form[name] == "factors" else "bias"
            if f"{name}.bias" in self.where:
                tensors[bias] = self.get(f"{name}.bias")
            state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        return state


def _ranks(state: dict[str, Tensor]) -> tuple[dict[str, int], list[str]]:
    """The ranks of all low-rank layers, and the names of the pivoted ones."""
    ranks = {
        key.removesuffix(end): tensor.shape[0]
        for key, tensor in state.items()
        for end in (".Vh.weight", ".P.weight", ".Vh.qweight", ".P.qweight")
        if key.endswith(end) and tensor.dim() == 2  # a quantized factor's `weight` is one of zero elements
    }
    return ranks, [name for name in ranks if f"{name}.P.weight" in state]


@torch.no_grad()
def _rebuild(path, config, acip: quantizer.AcipConfig, base_model, svd_cache, dtype, device_map) -> nn.Module:
    """The factorized model of a compact elastic checkpoint, its factors made anew from the base model."""
    base_model = base_model or getattr(acip, "base_model", None)
    if not base_model:
        raise ValueError(f"{path} is compact: give base_model, the model that it was made from")
    if dtype == "auto":
        dtype = config.dtype or dtype  # that of the factors, which the base model's need not be
    try:
        model = _from_pretrained(base_model, None, dtype=dtype, device_map=device_map)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is compact, and its base model cannot be loaded; give base_model: {reason}") from None
    layers = quantizer.layers_to_replace(model, acip.layers)
    with contextlib.ExitStack() as stack:
        where = _open_shards(path, _ELASTIC.format(suffix=""), stack)
        for name, layer in layers.items():
            (out, in_), r = weight_of(layer).shape, acip.layers[name].get("adapter_rank", 0)
            k = min(out, in_)
            shapes = {"scores": (k,), "S": (k,)} | ({"lora_A": (r, in_), "lora_B": (out, r)} if r else {})
            kept = {key: _stored(path, where, f"{name}.{key}", shape) for key, shape in shapes.items()}
            if "full_rank" in acip.layers[name]:
                raise ValueError(f"{path / 'config.json'}: a compact checkpoint has all ranks, and {name} a full_rank")
            bias = None if layer.bias is None else layer.bias.detach()
            new = SVDLinear(*cached_svd(weight_of(layer).detach(), svd_cache), bias, **acip.layers[name])
            S = kept.pop("S").to(new.S)
            # A different dtype of the weights moves the singular values by about its rounding, relative to the largest.
            near = 1e-4 if model.dtype == config.dtype else 0.01
            if not torch.allclose(new.S, S, rtol=0, atol=near * float(S.max())):
                raise ValueError(f"{path} was made from another model than {base_model}: {name} differs")
            for key, tensor in kept.items():
                getattr(new, key).copy_(tensor)
            new.mask.copy_(new.scores.clamp_min(0))
            model.set_submodule(name, new)
    model.config.quantization_config = _factorized(acip, base_model=str(base_model)).to_dict()
    model.config._name_or_path = str(path)
    quantizer.attach_factorized(model)
    return model.eval()


def _factorized(acip: quantizer.AcipConfig, **changes) -> quantizer.AcipConfig:
    """What the factorized model of an elastic checkpoint keeps of it, for being saved again."""
    about = {"base_model": getattr(acip, "base_model", None)} | changes
    if hasattr(acip, "imported"):
        about["imported"] = acip.imported
    return quantizer.AcipConfig("factorized", layers=acip.layers, **about)


def _base_model(model: nn.Module) -> str | None:
    """Where the model came from that `model` was made from, as far as that is known."""
    fields = _acip_fields(model.config)
    return fields.get("base_model", model.config._name_or_path or None)


def _stored(path, where: Shards, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a compact checkpoint, which must have this shape and hold numbers."""
    if name not in where:
        raise ValueError(f"{path}: tensor {name!r} is missing")
    file, shard = where[name]
    found = tuple(file.get_slice(name).get_shape())
    if found != shape:
        raise ValueError(f"{shard}: tensor {name!r} is {list(found)}, but must be {list(shape)}")
    _check_floating(file, shard, name)
    tensor = files.read_tensor(file, shard, name)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{shard}: tensor {name!r} is not finite")
    return tensor


# ---- files of weights


def _open_shards(path: pathlib.Path, name: str, stack: contextlib.ExitStack) -> Shards:
    """`{tensor: (open file, its path)}` of the weight file `name`, or of the shards that its index lists."""
    index, shards = path / f"{name}.index.json", [name]
    listed: Any = {}
    if not (path / name).exists() and index.exists():
        listed = files.read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(map(_is_shard, listed.values())):
            raise ValueError(
                f"{index} is no index of weight files: weight_map must be {{tensor: name of a .safetensors file}}"
            )
        shards = sorted(set(listed.values()))
    where: Shards = {}
    for shard in shards:
        file = stack.enter_context(files.open_tensors(path / shard))
        for tensor in file.keys():  # noqa: SIM118, as it is no dict
            if tensor in where:
                raise ValueError(f"{path / shard}: tensor {tensor!r} is in {where[tensor][1].name} too")
            where[tensor] = file, path / shard
    for tensor in listed:
        if tensor not in where:
            raise ValueError(f"{path / listed[tensor]}: tensor {tensor!r} is missing")
    return where


def _is_shard(name) -> bool:
    """Whether a weight file may have this name: beside its index, nowhere else."""
    return isinstance(name, str) and name.endswith(".safetensors") and not re.search(r"[/\\\0]", name)


def _check_floating(file, shard, name: str) -> None:
    """A tensor is of one of the dtypes that weights are computed in; any other would be cast as it is loaded."""
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _FLOATING:
        raise ValueError(f"{shard}: tensor {name} is {dtype}, but must be one of {', '.join(_FLOATING)}")


def _check_materialized(path: pathlib.Path, config, acip: quantizer.AcipConfig) -> None:
    """The files are whole and hold what `config` says: from_pretrained would take random weights for the rest."""
    if (path / "adapter_config.json").exists():
        # transformers would load the model that this file names, which may be any, instead of this one.
        raise ValueError(
            f"{path / 'adapter_config.json'}: load the model from a directory without adapters, and then these with "
            "peft.PeftModel.from_pretrained"
        )
    with contextlib.ExitStack() as stack:
        where = _open_shards(path, "model.safetensors", stack)
        model = _empty_model(path, config, where)
        quantizer.put_layers(model, acip)
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            # Of codes `_check_quantized` asks more.
            if name in where and tensor.dtype.is_floating_point and tensor.dtype != torch.float8_e4m3fn:
                _check_floating(*where[name], name)
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, (file, _) in where.items()}
        for name in acip.pivoted:
            _check_pivots(path, where, f"{name}.is_pivot", model.get_submodule(name))
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
                _check_quantized(path, where, name, layer)
    here = {id(tensor) for name, tensor in state.items() if name in shapes}
    # What transformers renames or fuses as it loads (mixtures of experts) has other names here.
    renamed = _is_renamed(model)
    for name, tensor in state.items():
        ours = name.endswith(_MATERIALIZED)
        if name in shapes and shapes[name] != tuple(tensor.shape) and (ours or not renamed):
            raise ValueError(
                f"{where[name][1]}: tensor {name} is {list(shapes[name])}, but must be {list(tensor.shape)}"
            )
        if name not in shapes and id(tensor) not in here and (ours or not renamed):
            raise ValueError(f"{path}: tensor {name!r} is missing")
    needed = sum({id(tensor): tensor.numel() for tensor in state.values()}.values())
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    if held < needed:
        raise ValueError(f"{path}: its files hold {held} numbers, fewer than the {needed} of the model in config.json")


def _check_pivots(path, where: Shards, name: str, layer: nn.Module) -> None:
    """The bits of `is_pivot` name as many outputs as the layer has pivots: others would store outputs elsewhere."""
    if name not in where:
        raise ValueError(f"{path}: tensor {name!r} is missing")
    bits = files.read_tensor(*where[name], name)
    if bits.dtype != torch.uint8 or bits.shape != layer.is_pivot.shape:
        raise ValueError(
            f"{where[name][1]}: tensor {name} is {bits.dtype} {list(bits.shape)}, "
            f"but must be torch.uint8 {list(layer.is_pivot.shape)}"
        )
    bits = unpack_bits(bits, 8 * len(bits))
    if int(bits.sum()) != layer.rank or bool(bits[layer.out_features :].any()):
        raise ValueError(f"{where[name][1]}: tensor {name} does not name {layer.rank} of {layer.out_features} outputs")


def _check_quantized(path, where: Shards, name: str, layer: QuantizedLinear | QuantizedEmbedding) -> None:
    """Codes, scales and zeros are there, of their dtypes (which loading would cast) and of values that are possible."""
    if layer.zeros is None and f"{name}.zeros" in where:
        raise ValueError(f"{where[f'{name}.zeros'][1]}: tensor {name}.zeros is there, where config.json knows of none")
    for key, wanted in layer.state_dict().items():
        if key in ("weight", "bias"):
            continue
        if f"{name}.{key}" not in where:
            raise ValueError(f"{path}: tensor '{name}.{key}' is missing")
        file, shard = where[f"{name}.{key}"]
        found = file.get_slice(f"{name}.{key}")
        dtype = _DTYPES.get(found.get_dtype(), found.get_dtype())
        if dtype != wanted.dtype or list(found.get_shape()) != list(wanted.shape):
            raise ValueError(
                f"{shard}: tensor {name}.{key} is {dtype} {found.get_shape()}, "
                f"but must be {wanted.dtype} {list(wanted.shape)}"
            )
        if key != "qweight" or wanted.is_floating_point():  # of integers every value is a code
            tensor = files.read_tensor(file, shard, f"{name}.{key}")
            finite = torch.isfinite(tensor.float() if key == "qweight" else tensor)
            if not bool((tensor <= 15).all() if key == "zeros" else finite.all()):
                raise ValueError(f"{shard}: tensor {name}.{key} holds values that no {key} have")


def _is_renamed(model: nn.Module) -> bool:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return True
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def described_model(path: str | os.PathLike) -> nn.Module:
    """The model that a directory's config.json describes, dense and without weights (on the meta device)."""
    path = pathlib.Path(path)
    with contextlib.ExitStack() as stack:
        return _empty_model(path, _config(path), _open_shards(path, "model.safetensors", stack))


def _empty_model(path: pathlib.Path, config, where: Shards | None = None) -> nn.Module:
    """The model of `config`, without weights, no larger than the tensors of `where` (see `_open_shards`) can justify.

    Without `where`, any: of a base model, which the user has named.
    """
    # A layer that is cut has more tensors than the dense one; a tied matrix has fewer.
    held, made, thread = len(where or ()), 0, threading.get_ident()
    most = 2 * held + 64 if where is not None else math.inf

    def count(module, name, parameter):
        nonlocal made
        made += threading.get_ident() == thread
        if made > most:
            raise ValueError(f"it has over {most} weights, and the files hold {held} tensors")

    counting = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            model = _model_class(config)(copy.deepcopy(config))
        model.tie_weights()
    except Exception as error:
        raise ValueError(f"{path / 'config.json'} describes no model: {error}") from error
    finally:
        counting.remove()
    # Tables of positions and masks, which are made and not read.
    made = sum(buffer.nbytes for buffer in model.buffers())
    if where is not None and made > 2**28 + 4 * sum(
        shard.stat().st_size for shard in {shard for _, shard in where.values()}
    ):
        raise ValueError(f"{path / 'config.json'} describes a model with tables of {made} bytes")
    return model


# ---- transformers


def plain_config(model: nn.Module):
    """A copy of a model's config that knows nothing of how its layers are stored."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def plain_class(model: nn.Module) -> Callable[[str], type]:
    """What tells of a layer's name the class that it has in the dense model: `nn.Linear`, where that is not known."""
    try:
        empty = _empty_model(pathlib.Path(), plain_config(model)) if quantizer.is_transformers(model) else None
    except ValueError:
        empty = None
    return lambda name: nn.Linear if empty is None else type(empty.get_submodule(name))


def checkpoint_dtype(source) -> torch.dtype | None:
    """The dtype that the weights of a hub name or directory are stored in, as far as its config says."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source, trust_remote_code=False).dtype


def _config(path: pathlib.Path):
    from transformers import AutoConfig

    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    fields = files.read_json(path / "config.json")
    quantization = fields.get("quantization_config") or {}
    if not isinstance(quantization, dict) or not isinstance(quantization.get("quant_method", ""), str):
        raise ValueError(f"{path / 'config.json'}: quantization_config is no object with a quant_method")
    if "model_type" not in fields:
        raise ValueError(f"{path / 'config.json'} names no model_type: it is no transformers model")
    _check_numbers_and_code(path / "config.json", fields)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers has many kinds for a value that does not fit
        raise ValueError(f"{path / 'config.json'} describes no model: {error}") from error
    if not isinstance(config.dtype, torch.dtype | None):
        raise ValueError(f"{path / 'config.json'}: dtype cannot be {fields.get('dtype')!r}")
    return config


def _generation_config(path: pathlib.Path):
    """How the model generates, what ends its texts say; from_pretrained does not read it where it is given a state."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    if not file.exists():
        return None
    fields = files.read_json(file)
    try:
        return GenerationConfig.from_dict(fields)
    except Exception as error:  # whatever comparing a value of another type says
        raise ValueError(f"{file} is no generation config: {error}") from error


def _check_numbers_and_code(file: pathlib.Path, fields: dict) -> None:
    """No number of things that are made one by one is beyond any model, and nothing is to be fetched and run."""
    for key, value in fields.items():
        if isinstance(value, dict):
            _check_numbers_and_code(file, value)
        if _NUMBER_OF.search(key) and isinstance(value, int | float) and not value <= _MOST:
            raise ValueError(f"{file} describes no model: {key} is {value}, over {_MOST}")
        # "owner/name" means kernels on the hub.
        if "_implementation" in key and "/" in str(value):
            raise ValueError(f"{file}: {key} is {value!r}, code from elsewhere, which is never run")


def _acip_fields(config) -> dict:
    """The `quantization_config` of a model's config if it is ours, else nothing."""
    fields = getattr(config, "quantization_config", None) or {}
    if hasattr(fields, "to_dict"):
        fields = fields.to_dict()
    return fields if fields.get("quant_method") == "acip" else {}


def _model_class(config):
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{type(config).__name__} is no causal language model's")
    return AutoModelForCausalLM._model_mapping[type(config)]


def _from_pretrained(path, config, **options) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if path is None:
        # The auto class wants a path; the class that it would choose does not.
        return _model_class(config).from_pretrained(None, config=config, **options)
    if config is not None:
        options["config"] = config
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)
