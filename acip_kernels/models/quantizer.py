"""How transformers saves and loads a compressed model: the weight format "acip", registered as a quantization method.

A materialized model keeps its `model_type`; `config.quantization_config` names the rank of every low-rank layer, and
`from_pretrained` puts a `LowRankLinear` or `PivotLinear` there before it loads the weights. Importing this module
registers the format, once.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
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

from ..nn import LowRankLinear, PivotLinear, QuantizedEmbedding, QuantizedHead, SVDLinear
from ..nn.quantized_linear import QuantizedLinear
from ..ops.quantize import Scheme
from .targets import linear_layers, weight_of

log = logging.getLogger("acip_kernels")

# 2: with the pivoted form; 3: with quantized weights; 4: with elastic layers that never had all ranks; 5: with
# quantized embeddings; 6: with fp8. A file is of the lowest version that knows what it has.
FORMAT_VERSION = 6

# The largest number of float32, which options are computed in.
_LARGEST = torch.finfo(torch.float32).max
# Of the styles in which `models.parallel` divides layers of which some are factorized.
PARALLEL_PREFIX = "acip_"


class AcipConfig(QuantizationConfigMixin):
    """`config.json`'s `quantization_config` of a compressed model.

    kind: "materialized": ordinary layers, low-rank where `ranks` names them; "elastic": factors, scores and
        adapters, from which any size is cut by `acip_kernels.load`.
    ranks: `{module name: rank}` of every `LowRankLinear` and `PivotLinear`; pivoted: names of the latter.
    quantized: `{"bits", "group", "symmetric", "dense"}`, of fp8 with "format", if the weights of all these are
        quantized, and those of the layers named in "dense", which are `QuantizedLinear`s; see `ops.quantize`.
    embeddings: `{"bits", "group", "symmetric"}` if the embedding and the output head are quantized.
    size_ratio, count: the target that the model was cut for; factorized, stored: what it came to, in either count.
    layers: of an elastic checkpoint, `{module name: {the SVDLinear's options}}`, with its `full_rank` where that is
        less than the weight's. Other fields are kept.
    """

    def __init__(
        self,
        /,
        kind="materialized",
        ranks=None,
        layers=None,
        pivoted=(),
        quantized=None,
        embeddings=None,
        format_version=FORMAT_VERSION,
        **fields,
    ):
        self.quant_method = "acip"  # type: ignore[assignment]  # an enum of transformers' own methods
        fields.pop("quant_method", None)
        if type(format_version) is not int or format_version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"quantization_config: format_version is {format_version!r}, and this version of acip_kernels reads "
                f"1 to {FORMAT_VERSION}: a newer acip_kernels may read it"
            )
        if kind not in ("materialized", "elastic", "factorized"):
            raise ValueError(f"quantization_config: kind is {kind!r}; it must be materialized or elastic")
        for field, value in (("ranks", ranks), ("layers", layers)):
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"quantization_config: {field} must be an object by layer, got {value!r}")
        self.kind = kind
        self.ranks, self.layers = dict(ranks or {}), dict(layers or {})
        for name, options in self.layers.items():
            _check_layer_options(name, options)
        for name, rank in self.ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
                raise ValueError(f"quantization_config: ranks[{name!r}] must be a rank, got {rank!r}")
        if not _are_names(pivoted) or any(name not in self.ranks for name in pivoted):
            raise ValueError(f"quantization_config: pivoted must be a list of names in ranks, got {pivoted!r}")
        self.pivoted = list(pivoted)
        self.quantized = _checked_quantized(quantized, self.ranks)
        short = any("full_rank" in options for options in self.layers.values())
        self.embeddings = _checked_embeddings(embeddings)
        version = 5 if self.embeddings else 4 if short else 3 if self.quantized else 2
        self.format_version = 6 if "format" in self.quantized else version
        for key, value in fields.items():
            if hasattr(type(self), key) or not _FIELDS.get(key, _anything)(value):
                raise ValueError(f"quantization_config: {key} cannot be {value!r}")
            setattr(self, key, value)

    def to_dict(self) -> dict[str, Any]:
        optional = ("ranks", "layers", "pivoted", "quantized", "embeddings")
        return {key: value for key, value in super().to_dict().items() if key not in optional or value}

    @property
    def scheme(self) -> Scheme | None:
        """How the weights are quantized, or None."""
        fields = {key: value for key, value in self.quantized.items() if key != "dense"}
        return Scheme.from_dict(fields) if fields else None


def _are_names(value) -> bool:
    """Whether it is a list of different strings."""
    return (
        isinstance(value, list | tuple) and all(type(name) is str for name in value) and len(set(value)) == len(value)
    )


def _is_number(value, least: float = -_LARGEST, below: float = math.inf) -> bool:
    """Whether it is an int or a float, from `least` to below `below`, that float32 can hold."""
    return type(value) in (int, float) and least <= value <= _LARGEST and value < below


def _is_text(value) -> bool:
    return value is None or isinstance(value, str)


def _anything(value) -> bool:
    return True


# What the fields may be that are read again; others are kept as they are.
_FIELDS = {
    **dict.fromkeys(("size_ratio", "factorized", "stored", "final_size_ratio"), lambda value: _is_number(value, 0)),
    **dict.fromkeys(("count", "adapters", "base_model", "base_name"), _is_text),
    "compact": lambda value: isinstance(value, bool),
    "compression": lambda value: value is None or isinstance(value, dict),
}
_LAYER_FIELDS = {
    "source_type": lambda value: value in ("Linear", "Conv1D"),
    "mask_scale": lambda value: _is_number(value, torch.finfo(torch.float32).tiny),
    "adapter_rank": lambda value: type(value) is int and value >= 0,
    "full_rank": lambda value: type(value) is int and value >= 1,
    "adapter_alpha": _is_number,
    "adapter_dropout": lambda value: _is_number(value, 0, 1),
    "input_variances": lambda value: isinstance(value, bool),
}


def _checked_quantized(quantized, ranks: dict[str, int]) -> dict:
    if quantized is None:
        return {}
    if not isinstance(quantized, dict) or "dense" not in quantized:
        raise ValueError(f"quantization_config: quantized must be an object with bits and dense, got {quantized!r}")
    dense = quantized["dense"]
    if not _are_names(dense) or any(name in ranks for name in dense):
        raise ValueError(f"quantization_config: quantized: dense must be a list of names not in ranks, got {dense!r}")
    try:
        Scheme.from_dict({key: value for key, value in quantized.items() if key != "dense"})
    except ValueError as error:
        raise ValueError(f"quantization_config: {error}") from None
    return {**quantized, "dense": list(dense)}


def _checked_embeddings(embeddings) -> dict:
    if embeddings is None:
        return {}
    if not isinstance(embeddings, dict):
        raise ValueError(f"quantization_config: embeddings must be an object with bits, got {embeddings!r}")
    try:
        scheme = Scheme.from_dict(embeddings)
        _check_embeddings_scheme(scheme)
        return scheme.to_dict()
    except ValueError as error:
        raise ValueError(f"quantization_config: embeddings: {error}") from None


def _check_embeddings_scheme(scheme: Scheme) -> None:
    if scheme.kind == "fp8":
        raise ValueError("quantize_embeddings must be int8 or int4, got 'fp8', which is for layers alone")


def _check_layer_options(name: str, options) -> None:
    if not isinstance(options, dict):
        raise ValueError(f"quantization_config: layers[{name!r}] must be an object, got {options!r}")
    for key, value in options.items():
        if key not in _LAYER_FIELDS or not _LAYER_FIELDS[key](value):
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
        put_layers(model, config)

    def update_parallel_plan(self, model, plan):
        from .parallel import divide_factors

        super().update_parallel_plan(model, plan)
        divide_factors(model, plan)

    def _process_model_after_weight_loading(self, model, **kwargs):
        # Once the plan has been applied it has the styles' own names again: transformers asks it what is divided.
        plan = getattr(model, "tp_plan", None) or {}
        plan.update({name: style.removeprefix(PARALLEL_PREFIX) for name, style in plan.items()})
        for layer in _svd_layers(model):
            layer.__dict__.pop("weight", None)
        for module in model.modules():
            if isinstance(module, QuantizedHead):
                module.share()
        _be_ordinary(model)

    def is_serializable(self):
        if self.quantization_config.kind == "factorized":
            log.warning(
                "a factorized model is not a checkpoint that from_pretrained can load: "
                "materialize() it at a size first, or save the CompressionResult"
            )
            return False
        return True

    def get_state_dict_and_metadata(self, model, **kwargs):
        # Called as a model is saved, whose layers may be others by now: those that an adapter was merged into.
        if self.quantization_config.kind == "materialized":
            _describe_ranks(model)
        return super().get_state_dict_and_metadata(model, **kwargs)

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


def put_layers(model: nn.Module, config: AcipConfig) -> None:
    """Replace linear layers by those that `config` names, on the same device, to load a state into."""
    _teach_peft()
    scheme, dense = config.scheme, set(config.quantized.get("dense", ()))
    for name, layer in layers_to_replace(model, [*config.ranks, *sorted(dense)]).items():
        out_features, in_features = weight_of(layer).shape
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        new: nn.Module
        if name in dense:
            new = QuantizedLinear(in_features, out_features, layer.bias is not None, **scheme.options, **like)
        else:
            rank = config.ranks[name]
            # Beyond full rank are layers that adapters were merged into; but no file needs to hold whatever it likes.
            if rank > (min(in_features, out_features) if name in config.pivoted else in_features + out_features):
                raise ValueError(
                    f"quantization_config: ranks[{name!r}] is {rank}, but the layer is [{out_features}, {in_features}]"
                )
            kind = PivotLinear if name in config.pivoted else LowRankLinear
            new = kind(in_features, out_features, rank, layer.bias is not None, **like)
            if scheme is not None:
                for child_name, child in list(new.named_children()):
                    options = {"bias": child.bias is not None, **scheme.options, **like}
                    setattr(new, child_name, QuantizedLinear(child.in_features, child.out_features, **options))
        model.set_submodule(name, new)
    if config.embeddings:
        put_embeddings(model, Scheme.from_dict(config.embeddings), empty=True)


def put_embeddings(model: nn.Module, scheme: Scheme, empty: bool = False) -> None:
    """Replace the embedding of `model` and its output head, if it has one, by quantized ones.

    One matrix for both stays one. empty: to load a state into. Raises `ValueError` for a model whose embedding or head
    is of a class of its own, and computes something else.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and type(head) is not nn.Linear:
        raise ValueError(
            f"quantize_embeddings takes an output head of nn.Linear, and the model has {type(head).__name__}"
        )
    new = QuantizedEmbedding.from_embedding(embedding, scheme, empty=empty)
    names = {id(module): name for name, module in model.named_modules()}
    model.set_submodule(names[id(embedding)], new)
    if head is None:
        return
    name = names[id(head)]
    new_head: QuantizedLinear
    if f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}):
        new_head = QuantizedHead(new, head.bias)
    elif empty:
        options = {**scheme.options, "device": head.weight.device, "dtype": head.weight.dtype}
        new_head = QuantizedLinear(head.in_features, head.out_features, head.bias is not None, **options)
    else:
        new_head = QuantizedLinear.from_linear(head, scheme.kind, group=scheme.group, symmetric=scheme.symmetric)
    model.set_submodule(name, new_head.train(head.training))


def quantize_embeddings(model: PreTrainedModel, scheme: Scheme) -> None:
    """Quantize the embedding and the output head of a materialized `model`, in place; its config says so."""
    _check_embeddings_scheme(scheme)
    put_embeddings(model, scheme)
    fields = getattr(model.config, "quantization_config", None) or {"kind": "materialized"}
    config = AcipConfig(**(fields if isinstance(fields, dict) else fields.to_dict()) | {"embeddings": scheme.to_dict()})
    model.config.quantization_config = config.to_dict()
    model.hf_quantizer = AcipQuantizer(config)  # type: ignore[assignment]  # declared nowhere
    _be_ordinary(model)


def put_svd_layers(model: nn.Module, layers: dict[str, dict]) -> None:
    """Replace linear layers by empty `SVDLinear`s on the same device, to load a state into."""
    for name, layer in layers_to_replace(model, layers).items():
        out_features, in_features = weight_of(layer).shape
        options = dict(layers[name])
        k = options.pop("full_rank", min(in_features, out_features))
        variances = torch.empty(in_features, device=layer.weight.device) if options.pop("input_variances", 0) else None
        if k > min(in_features, out_features):
            raise ValueError(
                f"quantization_config: layers[{name!r}]: full_rank is {k}, but the layer is "
                f"[{out_features}, {in_features}]"
            )
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        new = SVDLinear(
            torch.empty(out_features, k, **like),
            torch.empty(k, **like),
            torch.empty(k, in_features, **like),
            None if layer.bias is None else torch.empty(out_features, **like),
            input_variances=variances,
            **options,
        )
        model.set_submodule(name, new)


def _svd_layers(model: nn.Module) -> list[SVDLinear]:
    return [module for module in model.modules() if isinstance(module, SVDLinear)]


def quantized_layers(model: nn.Module) -> list[str]:
    """The names of all `QuantizedLinear`s."""
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def svd_layer_options(layer: SVDLinear) -> dict:
    """What `put_svd_layers` needs to make `layer` again, apart from its tensors; JSON."""
    some: dict[str, Any] = {}
    if layer.full_rank < min(layer.out_features, layer.in_features):
        some["full_rank"] = layer.full_rank
    if layer.input_variances is not None:
        some["input_variances"] = True
    rest = _LAYER_FIELDS.keys() - {"full_rank", "input_variances"}
    return {name: getattr(layer, name) for name in _LAYER_FIELDS if name in rest} | some


def attach_factorized(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` refuse: its layers are `SVDLinear`s, which `from_pretrained` would not find."""
    model.hf_quantizer = AcipQuantizer(AcipConfig("factorized"))  # type: ignore[assignment]  # declared nowhere
    _be_ordinary(model)


def attach_materialized(model: PreTrainedModel, **about) -> None:
    """Put what `model`'s layers are into its config, so that `save_pretrained` and loading work."""
    _teach_peft()
    ranks, pivoted = _ranks(model)
    fields = describe(model.config, ranks, pivoted, **about)
    known = (fields or {}).get("quantized", {}).get("dense", ())
    strange = [name for name in quantized_layers(model) if name not in known and name.rpartition(".")[0] not in ranks]
    if strange:
        raise ValueError(f"{strange[0]} was quantized before, and the model's config cannot say so")
    made = None if fields is None else AcipQuantizer(AcipConfig(**fields))
    model.hf_quantizer = made  # type: ignore[assignment]  # declared nowhere
    _be_ordinary(model)


def describe(config, ranks: dict[str, int], pivoted: list[str], *, size_ratio: float, count: str, cut) -> dict | None:
    """Write into a model's `config` what a materialized model is; nothing if plain transformers can load it.

    Returns the fields written, or None.
    """
    scheme, quantized = cut.sizing.scheme, None
    if scheme is not None:
        quantized = scheme.to_dict() | {"dense": [name for name, form in cut.forms.items() if form == "dense"]}
    if ranks or quantized:
        about = {"size_ratio": size_ratio, "count": count, "adapters": cut.adapters, **cut.ratios}
        config.quantization_config = AcipConfig(
            "materialized", ranks, pivoted=pivoted, quantized=quantized, **about
        ).to_dict()
        return config.quantization_config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return None


def copied(model: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """A deep copy with what `memo` has for layers, by their `id`, and without a quantizer, which speaks of `model`."""
    attached = model.__dict__.pop("hf_quantizer", None)
    try:
        return copy.deepcopy(model, memo)
    finally:
        if attached is not None:
            model.hf_quantizer = attached


def _ranks(model: nn.Module) -> tuple[dict[str, int], list[str]]:
    """The ranks of all low-rank layers by name, and the names of the pivoted ones."""
    lowrank = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear | PivotLinear)}
    return {n: m.rank for n, m in lowrank.items()}, [n for n, m in lowrank.items() if isinstance(m, PivotLinear)]


def _describe_ranks(model: PreTrainedModel) -> None:
    """Bring `model`'s config up to date with the ranks of its layers; `factorized` and `stored` follow."""
    fields = model.config.quantization_config
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    old, old_pivoted = fields.get("ranks", {}), fields.get("pivoted", [])
    ranks, pivoted = _ranks(model)
    if ranks.keys() != old.keys() or (ranks == old and pivoted == old_pivoted):
        return  # adapters are on them, which are saved by themselves; or nothing has changed
    dense = was = now = 0
    for name in ranks:
        layer: Any = model.get_submodule(name)
        sizes = layer.out_features, layer.in_features
        dense += sizes[0] * sizes[1]
        was += _numbers(old[name], *sizes, name in old_pivoted)
        now += _numbers(ranks[name], *sizes, name in pivoted)
    new = fields | {"ranks": ranks, "pivoted": pivoted}
    ratio = fields.get("factorized")
    if ratio is not None and ratio != 1:
        # Layers kept dense count as well. How much they hold follows from what the ratio was.
        kept = (ratio * dense - was) / (1 - ratio)
        new["factorized"] = (kept + now) / (kept + dense)
    if "stored" in fields:
        held = sum({id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}.values())
        new["stored"] = fields["stored"] * held / (held - now + was)
    model.config.quantization_config = new
    model.hf_quantizer.quantization_config = AcipConfig(**new)


def _numbers(rank: int, out_features: int, in_features: int, pivoted: bool) -> int:
    """How many numbers a layer of this rank stores."""
    bits = -(-out_features // 8) if pivoted else 0
    return rank * (out_features + in_features - (rank if pivoted else 0)) + bits


def _teach_peft() -> None:
    """Where PEFT is installed, its LoRA learns our layers, before anybody puts an adapter on them."""
    if importlib.util.find_spec("peft") is not None:
        try:
            importlib.import_module(".lora", __package__)
        except ImportError as error:
            log.warning("the installed PEFT cannot put adapters on low-rank layers by their names: %s", error)


def _be_ordinary(model: PreTrainedModel) -> None:
    # transformers bars a quantized model from .half(), .float() and Trainer; its weights here are plain floats.
    model.is_quantized = False  # type: ignore[assignment]  # declared nowhere
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized
