"""How transformers saves and loads a compressed model: the weight format "acip", registered as a quantization method.

A materialized model keeps its `model_type`; `config.quantization_config` names the rank of every low-rank layer, and
`from_pretrained` puts a `LowRankLinear` or `PivotLinear` there before it loads the weights. Importing this module
registers the format, once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..nn import LowRankLinear, PivotLinear, SVDLinear
from .targets import linear_layers, weight_of

log = logging.getLogger("acip_kernels")

# 2: with the pivoted form. A file of version 1 has none, and is read as before.
FORMAT_VERSION = 2

LAYER_OPTIONS = ("mask_scale", "adapter_rank", "adapter_alpha", "adapter_dropout", "source_type")


class AcipConfig(QuantizationConfigMixin):
    """`config.json`'s `quantization_config` of a compressed model.

    kind: "materialized": ordinary layers, low-rank where `ranks` names them; "elastic": factors, scores and
        adapters, from which any size is cut by `acip_kernels.load`.
    ranks: `{module name: rank}` of every `LowRankLinear` and `PivotLinear`; pivoted: names of the latter.
    size_ratio, count: the target that the model was cut for; factorized, stored: what it came to, in either count.
    layers: of an elastic checkpoint, `{module name: {the SVDLinear's options}}`. Other fields are kept.
    """

    def __init__(
        self, kind="materialized", ranks=None, layers=None, pivoted=(), format_version=FORMAT_VERSION, **fields
    ):
        self.quant_method = "acip"
        fields.pop("quant_method", None)
        if format_version not in range(1, FORMAT_VERSION + 1) or isinstance(format_version, bool):
            raise ValueError(
                f"quantization_config: format_version is {format_version!r}, and this version of acip_kernels reads "
                f"1 to {FORMAT_VERSION}: a newer acip_kernels may read it"
            )
        if kind not in ("materialized", "elastic", "factorized"):
            raise ValueError(f"quantization_config: kind is {kind!r}; it must be materialized or elastic")
        for field, value in (("ranks", ranks), ("layers", layers)):
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"quantization_config: {field} must be an object by layer, got {value!r}")
        self.format_version, self.kind = FORMAT_VERSION, kind
        self.ranks, self.layers = dict(ranks or {}), dict(layers or {})
        for name, options in self.layers.items():
            _check_layer_options(name, options)
        for name, rank in self.ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
                raise ValueError(f"quantization_config: ranks[{name!r}] must be a rank, got {rank!r}")
        if not isinstance(pivoted, list | tuple) or any(name not in self.ranks for name in pivoted):
            raise ValueError(f"quantization_config: pivoted must be a list of names in ranks, got {pivoted!r}")
        self.pivoted = list(pivoted)
        for key, value in fields.items():
            setattr(self, key, value)

    def to_dict(self) -> dict[str, Any]:
        return {
            key: value for key, value in super().to_dict().items() if key not in ("ranks", "layers", "pivoted") or value
        }


def _check_layer_options(name: str, options) -> None:
    if not isinstance(options, dict):
        raise ValueError(f"quantization_config: layers[{name!r}] must be an object, got {options!r}")
    for key, value in options.items():
        if key == "source_type":
            fits = value in ("Linear", "Conv1D")
        elif key == "adapter_rank":
            fits = type(value) is int and value >= 0
        else:
            fits = key in LAYER_OPTIONS and type(value) in (int, float) and math.isfinite(value)
        if not fits:
            raise ValueError(f"quantization_config: layers[{name!r}]: {key} cannot be {value!r}")


class AcipQuantizer(HfQuantizer):
    """Puts the layers of `AcipConfig` into a model before its weights are loaded."""

    def validate_environment(self, *args, **kwargs):
        # Before transformers looks for weight files, which it would not find.
        if self.quantization_config.kind == "elastic":
            raise ValueError(
                "this is an elastic checkpoint, which holds every size: "
                "load it with acip_kernels.load(directory, size_ratio=0.6)"
            )

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        if config.kind == "factorized":
            put_svd_layers(model, config.layers)
            # A model that starts its random weights may look for a layer's `weight` (GPT-2 does).
            for layer in _svd_layers(model):
                layer.weight = torch.empty(0)
            return
        put_lowrank_layers(model, config.ranks, config.pivoted)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for layer in _svd_layers(model):
            layer.__dict__.pop("weight", None)
        _be_ordinary(model)

    def is_serializable(self):
        if self.quantization_config.kind == "factorized":
            log.warning(
                "a factorized model is not a checkpoint that from_pretrained can load: "
                "materialize() it at a size first, or save the CompressionResult"
            )
            return False
        return True

    @property
    def is_trainable(self):
        return True

    @property
    def is_compileable(self):
        return True


if "acip" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config("acip")(AcipConfig)
    register_quantizer("acip")(AcipQuantizer)


def is_transformers(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel)


def layers_to_replace(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers of these names. Raises `ValueError` for one that is not there, or no linear layer."""
    layers, found = linear_layers(model)[0], {}
    for name in names:
        if name not in layers:
            raise ValueError(f"quantization_config: the model has no linear layer {name!r} (the output head is none)")
        found[name] = layers[name]
    return found


def put_lowrank_layers(model: nn.Module, ranks: dict[str, int], pivoted: Iterable[str] = ()) -> None:
    """Replace linear layers by `LowRankLinear`s of these ranks on the same device, to load a state into.

    `pivoted` are those that become `PivotLinear`s instead.
    """
    pivoted = set(pivoted)
    for name, layer in layers_to_replace(model, ranks).items():
        rank, (out_features, in_features) = ranks[name], weight_of(layer).shape
        if rank > min(in_features, out_features):
            raise ValueError(
                f"quantization_config: ranks[{name!r}] is {rank}, but the layer is [{out_features}, {in_features}]"
            )
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        kind = PivotLinear if name in pivoted else LowRankLinear
        model.set_submodule(name, kind(in_features, out_features, rank, layer.bias is not None, **like))


def put_svd_layers(model: nn.Module, layers: dict[str, dict]) -> None:
    """Replace linear layers by empty `SVDLinear`s on the same device, to load a state into."""
    for name, layer in layers_to_replace(model, layers).items():
        out_features, in_features = weight_of(layer).shape
        k = min(in_features, out_features)
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        new = SVDLinear(
            torch.empty(out_features, k, **like),
            torch.empty(k, **like),
            torch.empty(k, in_features, **like),
            None if layer.bias is None else torch.empty(out_features, **like),
            **layers[name],
        )
        model.set_submodule(name, new)


def _svd_layers(model: nn.Module) -> list[SVDLinear]:
    return [module for module in model.modules() if isinstance(module, SVDLinear)]


def svd_layer_options(layer: SVDLinear) -> dict:
    """What `put_svd_layers` needs to make `layer` again, apart from its tensors; JSON."""
    return {name: getattr(layer, name) for name in LAYER_OPTIONS}


def attach_factorized(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` refuse: its layers are `SVDLinear`s, which `from_pretrained` would not find."""
    model.hf_quantizer = AcipQuantizer(AcipConfig("factorized"))
    _be_ordinary(model)


def attach_materialized(model: PreTrainedModel, **about) -> None:
    """Put the ranks of `model`'s low-rank layers into its config, so that `save_pretrained` and loading work."""
    lowrank = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear | PivotLinear)}
    ranks = {name: module.rank for name, module in lowrank.items()}
    pivoted = [name for name, module in lowrank.items() if isinstance(module, PivotLinear)]
    describe(model.config, ranks, pivoted, **about)
    model.hf_quantizer = AcipQuantizer(AcipConfig(**model.config.quantization_config)) if ranks else None
    _be_ordinary(model)


def describe(config, ranks: dict[str, int], pivoted: list[str], *, size_ratio: float, count: str, cut) -> None:
    """Write into a model's `config` what a materialized model is; nothing if plain transformers can load it."""
    if ranks:
        about = {"size_ratio": size_ratio, "count": count, "adapters": cut.adapters, **cut.ratios}
        config.quantization_config = AcipConfig("materialized", ranks, pivoted=pivoted, **about).to_dict()
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def _be_ordinary(model: PreTrainedModel) -> None:
    # transformers bars a quantized model from .half(), .float() and Trainer; its weights here are plain floats.
    model.is_quantized = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized
