"""A minimal stand-in of what `acip_kernels.serving.vllm` uses of vLLM, as vLLM 0.33 documents it; not its code.

Linear layers create their weights through a `quant_method` and load them through parameters' `weight_loader`s; merged
ones are told which part a tensor is of. Both ways of loading a model are here: `load_by_parameters` finds parameters by
their full names, `load_by_modules` hands tensors down the tree of modules. Tensor parallelism is `PARALLEL`: this
process's rank and how many there are; nothing communicates, a test adds up or concatenates what ranks compute.
"""

import contextlib
import sys
import types
from abc import ABC, abstractmethod

import pytest
import torch
import torch.nn.functional as F
from torch import nn

PARALLEL = {"rank": 0, "size": 1}
QUANTIZATION_METHODS = ["fp8"]
CONFIGS = {}
# What llama-like models of vLLM merge: `{name in the checkpoint: (name of the merged layer, part)}`.
STACKED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def register_quantization_config(name):
    def register(config):
        assert name not in QUANTIZATION_METHODS and issubclass(config, QuantizationConfig)
        QUANTIZATION_METHODS.append(name)
        CONFIGS[name] = config
        return config

    return register


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return


class LinearMethodBase(QuantizeMethodBase):
    pass


class QuantizationConfig(ABC):
    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    def apply_vllm_mapper(self, hf_to_vllm_mapper):
        return


def set_weight_attrs(weight, attributes):
    for key, value in (attributes or {}).items():
        assert not hasattr(weight, key), f"overwriting {key}"
        setattr(weight, key, value)


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        weight_loader,
    ):
        shape = sum(output_partition_sizes), input_size_per_partition
        weight = nn.Parameter(torch.empty(*shape, dtype=params_dtype), requires_grad=False)
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, "weight_loader": weight_loader})

    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    def __init__(self, input_size, output_size, inputs, outputs, bias, dtype, quant_config, prefix):
        super().__init__()
        self.input_size, self.output_size, self.prefix = input_size, output_size, prefix
        self.tp_rank, self.tp_size = PARALLEL["rank"], PARALLEL["size"]
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=inputs,
            output_partition_sizes=outputs,
            input_size=input_size,
            output_size=output_size,
            params_dtype=dtype,
            weight_loader=self.weight_loader,
        )
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.full((sum(outputs),), torch.nan, dtype=dtype), requires_grad=False)
            set_weight_attrs(self.bias, {"output_dim": 0, "weight_loader": self.weight_loader})

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias), None


class ColumnParallelLinear(LinearBase):
    """Each process has some rows of the weight; of a merged layer, of every part."""

    def __init__(self, input_size, output_sizes, bias, dtype, quant_config, prefix):
        self.outputs = [size // PARALLEL["size"] for size in output_sizes]
        super().__init__(input_size, sum(output_sizes), input_size, self.outputs, bias, dtype, quant_config, prefix)

    def weight_loader(self, param, loaded, part=None):
        number = 0 if part is None else "qkv".index(part) if isinstance(part, str) else part
        size = self.outputs[number]
        copies = getattr(self, "num_kv_head_replicas", 1) if number else 1
        loaded = loaded.narrow(param.output_dim, self.tp_rank // copies * size, size)
        param.data.narrow(param.output_dim, sum(self.outputs[:number]), size).copy_(loaded)


class _Merged(ColumnParallelLinear):
    def load_weights(self, weights):
        for name, loaded in weights:
            module, _, attribute = name.rpartition(".")
            param = getattr(self.get_submodule(module), attribute)
            if param is None and name == "bias":
                continue
            param.weight_loader(param, loaded, loaded.shard_id)
            yield name


class MergedColumnParallelLinear(_Merged):
    pass


class QKVParallelLinear(_Merged):
    def __init__(self, input_size, head_size, heads, kv_heads, bias, dtype, quant_config, prefix):
        size = PARALLEL["size"]
        self.num_kv_head_replicas = max(1, size // kv_heads)
        kv = max(kv_heads, size) * head_size
        super().__init__(input_size, [heads * head_size, kv, kv], bias, dtype, quant_config, prefix)


class RowParallelLinear(LinearBase):
    """Each process has some columns of the weight; the outputs are to be added up."""

    def __init__(self, input_size, output_size, bias, dtype, quant_config, prefix):
        inputs = input_size // PARALLEL["size"]
        super().__init__(input_size, output_size, inputs, [output_size], bias, dtype, quant_config, prefix)

    def weight_loader(self, param, loaded):
        dim = getattr(param, "input_dim", None)
        if dim is not None:
            loaded = loaded.narrow(dim, self.tp_rank * param.shape[dim], param.shape[dim])
        assert param.shape == loaded.shape
        param.data.copy_(loaded)

    def forward(self, x):
        return self.quant_method.apply(self, x, None if self.tp_rank else self.bias), None


def load_by_parameters(model, weights):
    """As models of vLLM do that list what they merge in `load_weights`."""
    parameters = dict(model.named_parameters())
    for name, loaded in weights:
        for part_name, (merged, part) in STACKED.items():
            if f".{part_name}." in name:
                param = parameters.get(name.replace(part_name, merged))
                if param is None and name.endswith(".bias"):
                    break
                param.weight_loader(param, loaded, part)
                break
        else:
            parameters[name].weight_loader(parameters[name], loaded)


def load_by_modules(model, weights):
    """As `AutoWeightsLoader` does after a mapper, which puts the part's name on the tensor."""
    for name, loaded in weights:
        for part_name, (merged, part) in STACKED.items():
            if f".{part_name}." in name:
                name, loaded.shard_id = name.replace(part_name, merged), part
        module, rest = model, name
        while rest:
            if module is not model and hasattr(module, "load_weights"):
                list(module.load_weights([(rest, loaded)]))
                break
            first, _, rest = rest.partition(".")
            if not rest:
                param = module._parameters[first]
                param.weight_loader(param, loaded)
            module = module._modules.get(first)


def finish(model):
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)


@contextlib.contextmanager
def installed():
    """This module under vLLM's names, for `acip_kernels.serving.vllm` to import; afterwards nothing of it is left."""
    here, layers = sys.modules[__name__], "vllm.model_executor.layers"
    names = ["vllm", "vllm.model_executor", "vllm.model_executor.utils", layers, f"{layers}.linear"]
    names += [f"{layers}.quantization", f"{layers}.quantization.base_config"]
    parallel, methods = dict(PARALLEL), list(QUANTIZATION_METHODS)
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            module = types.ModuleType(name)
            module.__dict__.update({key: value for key, value in vars(here).items() if not key.startswith("_")})
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "acip_kernels.serving.vllm", raising=False)
        try:
            yield here
        finally:
            sys.modules.pop("acip_kernels.serving.vllm", None)
            PARALLEL.update(parallel)
            QUANTIZATION_METHODS[:] = methods
            CONFIGS.clear()
