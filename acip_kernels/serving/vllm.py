"""vLLM's linear layers for a materialized model: dense, low-rank and pivoted ones side by side. Experimental.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes; nothing else
imports this module. It is written against the interfaces of vLLM 0.33 (`QuantizationConfig`, `LinearMethodBase`,
`weight_loader`), and tested against a stand-in of them; it has not run in vLLM on a GPU yet.

vLLM merges layers that share their input (`qkv_proj`, `gate_up_proj`). What is merged here is the first product: the
first factors of all parts (of a dense part its weight) are the rows of one matrix, whatever their ranks; each part then
has its own second product, if any. Torch computes both.

Tensor parallelism is vLLM's: of column-parallel layers each process has the first factors whole and its rows of the
second; of row-parallel ones its columns of the first factors and the second whole, and vLLM adds the outputs up.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from ..models.quantizer import AcipConfig
from ..nn.pivot_linear import unpack_bits
from ..ops.pivot_linear.reference import place

log = logging.getLogger("acip_kernels")

# Whatever is called `weight` below these names vLLM's GPT-2 transposes as it loads; square factors would hide that.
_TRANSPOSED = ("c_attn", "c_proj", "c_fc")


def register() -> None:
    """Make vLLM load models whose `quant_method` is "acip". May be called more than once."""
    if "acip" not in QUANTIZATION_METHODS:
        register_quantization_config("acip")(AcipVllmConfig)


class AcipVllmConfig(QuantizationConfig):
    """What `config.json` says of a materialized model, for vLLM.

    ranks: `{module name: rank}` of the low-rank and pivoted layers; pivoted: the names of the latter.
    """

    def __init__(self, ranks: dict[str, int], pivoted: set[str]):
        super().__init__()
        self.ranks, self.pivoted = ranks, pivoted

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AcipVllmConfig:
        """Raises `ValueError` for what vLLM cannot be given: an elastic checkpoint, quantized weights."""
        acip = AcipConfig(**config)
        if acip.kind != "materialized":
            raise ValueError(
                f"vLLM serves a materialized model, and this checkpoint is {acip.kind}: "
                "cut a size with `acip materialize --size-ratio`, and serve that"
            )
        if acip.quantized or acip.embeddings:
            raise ValueError(
                "vLLM cannot be given this model's integer weights yet: materialize it without --quantize and "
                "--quantize-embeddings, "
                "or serve it with `acip serve`"
            )
        log.warning("acip_kernels in vLLM is experimental: it is tested against a stand-in, and has not run on a GPU")
        return cls(acip.ranks, set(acip.pivoted))

    def get_name(self) -> str:
        return "acip"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # torch's products run everywhere

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """The names that the model's layers have in vLLM."""
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)
        self.pivoted = set(hf_to_vllm_mapper.apply_list(sorted(self.pivoted)))

    def get_quant_method(self, layer: nn.Module, prefix: str):
        if not isinstance(layer, LinearBase):
            return None  # embeddings, the output head, attention, experts: as they are
        names = self.parts(prefix)
        if not any(name in self.ranks for name in names):
            return UnquantizedLinearMethod()
        if prefix.rpartition(".")[2] in _TRANSPOSED:
            raise ValueError(f"vLLM would transpose the factors of {prefix}, as of GPT-2: serve it with `acip serve`")
        return AcipLinearMethod(self, names)

    def parts(self, prefix: str) -> list[str]:
        """The names that the parts of vLLM's layer `prefix` have in the checkpoint."""
        parent, _, last = prefix.rpartition(".")
        merged = () if prefix in self.ranks else self.packed_modules_mapping.get(last, ())
        return [f"{parent}.{name}" if parent else name for name in merged] or [prefix]


@dataclasses.dataclass
class _Part:
    """One of a layer's parts: what it is in the checkpoint, and what of it is here.

    out: rows of the weight in the checkpoint; start, local: which of them are here. rows: its rows of the layer's
    first matrix. pivots: of a pivoted part, bool `[out]`, once they are loaded. loaded: what has come.
    """

    name: str
    form: str
    rank: int
    out: int
    start: int
    local: int
    rows: slice
    pivots: Tensor | None = None
    loaded: set[str] = dataclasses.field(default_factory=set)

    def shapes(self, in_features: int) -> dict[str, tuple[int, ...]]:
        """The tensors of the checkpoint, apart from a bias, and their shapes."""
        if self.form == "dense":
            return {"weight": (self.out, in_features)}
        marker = {"weight": (0,)}  # see LowRankLinear
        if self.form == "factors":
            return {"Vh.weight": (self.rank, in_features), "U.weight": (self.out, self.rank)} | marker
        pivots = {"is_pivot": (-(-self.out // 8),)}
        return {"P.weight": (self.rank, in_features), "C.weight": (self.out - self.rank, self.rank)} | pivots | marker


class AcipLinearMethod(LinearMethodBase):
    """The weights of a linear layer of vLLM's of which some part is low-rank or pivoted, and its product.

    While weights are loaded, the layer has a parameter for every name that the checkpoint has (`Vh.weight`,
    `U.weight`, …); each is a slot without elements whose `weight_loader` puts a part's tensor where it belongs:
    `first [rows of all parts, in]`, and for each part with a second factor `second_0`, `second_1`, ….
    """

    def __init__(self, config: AcipVllmConfig, names: list[str]):
        self.config, self.names = config, names

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        sizes = output_partition_sizes
        shards = output_size // sum(sizes)  # of which a column-parallel layer has one
        if len(self.names) == 1:  # merged in the checkpoint too, or not at all
            if len(sizes) > 1 and shards > 1:
                raise ValueError(f"{self.names[0]} is one layer in the checkpoint: serve it without tensor parallelism")
            sizes = [sum(sizes)]
        if len(self.names) != len(sizes):
            raise ValueError(f"vLLM merges {len(sizes)} layers here, and the checkpoint has {', '.join(self.names)}")
        self.in_features, self.in_start = input_size, 0
        if input_size_per_partition != input_size:
            self.in_start = cast(int, layer.tp_rank) * input_size_per_partition
        self.parts, rows = [], 0
        for number, (name, local) in enumerate(zip(self.names, sizes)):
            # Where there are fewer heads of keys and values than processes, some have the same.
            copies = getattr(layer, "num_kv_head_replicas", 1) if number else 1
            rank = self.config.ranks.get(name)
            form = "dense" if rank is None else "pivoted" if name in self.config.pivoted else "factors"
            out, start = local * shards // copies, layer.tp_rank // copies * local if shards > 1 else 0
            if rank is not None and rank > min(out, input_size):
                raise ValueError(f"config.json: the rank of {name} is {rank}, but the layer is [{out}, {input_size}]")
            height = local if form == "dense" else rank
            self.parts.append(_Part(name, form, rank, out, start, local, slice(rows, rows + height)))
            rows += height
        layer.first = _parameter(torch.empty(rows, input_size_per_partition, dtype=params_dtype))
        for number, part in enumerate(self.parts):
            if part.form != "dense":
                # Which rows of a pivoted part's C are here is in `is_pivot`, which comes after it.
                height = part.local if part.form == "factors" else part.out - part.rank
                layer.register_parameter(
                    f"second_{number}", _parameter(torch.empty(height, part.rank, dtype=params_dtype))
                )
        slots = {key for part in self.parts for key in part.shapes(input_size)} | {"U.bias"}
        for key in sorted(slots):
            self._add_slot(layer, key, params_dtype)

    def _add_slot(self, layer: nn.Module, key: str, dtype: torch.dtype) -> None:
        child, _, name = key.rpartition(".")
        if child and child not in layer._modules:
            layer.add_module(child, nn.Module())
        slot = _parameter(torch.empty(0, dtype=dtype))
        set_weight_attrs(slot, {"weight_loader": functools.partial(self._load, layer, key)})
        layer.get_submodule(child).register_parameter(name, slot)

    @torch.no_grad()
    def _load(self, layer: nn.Module, key: str, slot: nn.Parameter, loaded: Tensor, shard_id=None) -> None:
        """The `weight_loader` of the slot `key`; shard_id: of a merged layer, "q", "k", "v" or a number."""
        number = 0 if shard_id is None else "qkv".index(shard_id) if isinstance(shard_id, str) else shard_id
        if shard_id is None and len(self.parts) > 1:
            raise ValueError(f"{key} is not told which of {', '.join(self.names)} it is of")
        part = self.parts[number]
        if key == "U.bias" and part.form == "factors":
            if layer.bias is None:
                raise ValueError(f"{part.name}.U.bias is in the checkpoint, but this layer has no bias in vLLM")
            layer.bias.weight_loader(layer.bias, loaded, *(() if shard_id is None else (shard_id,)))
            part.loaded.add(key)
            return
        shapes = part.shapes(self.in_features)
        if key not in shapes:
            raise ValueError(f"{part.name}.{key} is in the checkpoint, but config.json says that it is {part.form}")
        if tuple(loaded.shape) != shapes[key]:
            raise ValueError(f"{part.name}.{key} is {list(loaded.shape)}, but must be {list(shapes[key])}")
        part.loaded.add(key)
        first, second = layer.first[part.rows], getattr(layer, f"second_{number}", None)
        own = slice(part.start, part.start + part.local)
        if key == "is_pivot":
            part.pivots = unpack_bits(loaded.to(first.device), part.out)
            if int(part.pivots.sum()) != part.rank:
                raise ValueError(f"{part.name}.is_pivot does not name {part.rank} of {part.out} outputs")
        elif key == "U.weight":
            second.copy_(loaded[own])
        elif key == "C.weight":
            second.copy_(loaded)
        elif len(loaded):  # a first matrix
            columns = loaded.narrow(1, self.in_start, first.shape[1])
            first.copy_(columns[own] if part.form == "dense" else columns)

    @torch.no_grad()
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Everything is loaded: takes the slots off, and of pivoted parts the rows of other processes.

        Raises `ValueError` naming what is missing: vLLM itself does not look.
        """
        for number, part in enumerate(self.parts):
            needed = set(part.shapes(self.in_features))
            if part.form == "factors" and getattr(layer, "bias", None) is not None:
                needed.add("U.bias")
            missing = sorted(needed - part.loaded)
            if missing:
                raise ValueError(f"the checkpoint lacks {', '.join(f'{part.name}.{key}' for key in missing)}")
            if part.form == "pivoted":
                before, here = part.pivots[: part.start], part.pivots[part.start : part.start + part.local]
                others = ~here
                # Where each output is in the list of all pivots, followed by the others that are here.
                inverse = torch.where(
                    here, int(before.sum()) + here.long().cumsum(0) - 1, part.rank + others.long().cumsum(0) - 1
                )
                layer.register_buffer(f"inverse_{number}", inverse, persistent=False)
                if part.local < part.out:
                    rows = slice(int((~before).sum()), int((~before).sum()) + int(others.sum()))
                    own = getattr(layer, f"second_{number}")[rows].clone()
                    setattr(layer, f"second_{number}", _parameter(own))
                part.pivots = None
        for child in ("Vh", "U", "P", "C"):
            layer._modules.pop(child, None)
        for name in ("weight", "is_pivot"):
            layer._parameters.pop(name, None)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., outputs of all parts that are here]` of x `[..., in_features]`."""
        biases = [None] * len(self.parts) if bias is None else bias.split([part.local for part in self.parts])
        z = F.linear(x, layer.first)
        outputs = []
        for number, part in enumerate(self.parts):
            own, bias = z[..., part.rows], biases[number]
            if part.form == "dense":
                outputs.append(own if bias is None else own + bias)
            elif part.form == "factors":
                outputs.append(F.linear(own, getattr(layer, f"second_{number}"), bias))
            else:
                others = F.linear(own, getattr(layer, f"second_{number}"))
                outputs.append(place(own, others, getattr(layer, f"inverse_{number}"), bias))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
