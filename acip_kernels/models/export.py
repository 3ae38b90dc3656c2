"""Compressed models for where this package is not: plain PyTorch modules, a state of two factors a layer, ONNX."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import checksums, files
from ..nn import LowRankLinear, PivotLinear, QuantizedEmbedding, QuantizedHead, QuantizedLinear
from ..nn.quantized_linear import dense_weight
from . import quantizer, saving
from .fuse import unfuse

FORMS = ("dense", "factors", "onnx")

_LOADER = """\
import torch
from safetensors import safe_open
from safetensors.torch import load_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

directory = "."  # this one
config = AutoConfig.from_pretrained(directory)
model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
with safe_open(f"{directory}/factors.safetensors", "pt") as file:
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
for name, layer in list(model.named_modules()):
    if f"{name}.0.weight" in shapes and hasattr(layer, "weight"):
        (rank, inputs), (outputs, _) = shapes[f"{name}.0.weight"], shapes[f"{name}.1.weight"]
        first = nn.Linear(inputs, rank, bias=False, dtype=config.dtype)
        second = nn.Linear(rank, outputs, bias=f"{name}.1.bias" in shapes, dtype=config.dtype)
        model.set_submodule(name, nn.Sequential(first, second))
load_model(model, f"{directory}/factors.safetensors")
model.eval()
"""

_CARD = """\
# Linear layers as pairs of factors

`factors.safetensors` holds a language model of which a layer `NAME` that was compressed is two linear layers, one after
the other: `NAME.0.weight [rank, in]` and `NAME.1.weight [out, rank]`, with the bias `NAME.1.bias`. Everything else has
its usual name. `from_pretrained` does not know such layers and finds no weights here; PyTorch, safetensors and
transformers load them so:

```python
{loader}```
"""


class PivotedPair(nn.Module):
    """`PivotLinear`'s function from operations that every exporter knows: `[P x, C P x]` in the outputs' order."""

    def __init__(self, layer: PivotLinear):
        super().__init__()
        self.P, self.C = _linear(dense_weight(layer.P)), _linear(dense_weight(layer.C))
        self.register_buffer("order", layer.orders()[0].clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        z = self.P(x)
        y = torch.cat([z, self.C(z)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def to_plain(model: nn.Module, form: str = "factors") -> nn.Module:
    """A copy of a materialized `model` whose modules are all PyTorch's (and transformers'): nothing of ours is needed.

    form:
        "factors": a low-rank layer becomes `nn.Sequential` of two `nn.Linear`: `Vh [rank, in]`, then `U [out, rank]`
            with the bias. So does one in pivoted form, whose factors are its pivot rows and, for `U`, its combinations
            with rows of the identity: the same numbers, and rank² more of them; where that is as large as a dense
            matrix, it becomes an `nn.Linear`.
        "dense": every layer becomes the class that it was before the compression, of as many numbers as before: a
            transformers model that saves and loads anywhere. The product of the factors is rounded once.

    Quantized weights become floating-point ones in either.

    Raises:
        ValueError: a form that is unknown, or a model of all sizes, which has to be cut first.
    """
    if form not in ("dense", "factors"):
        raise ValueError(f"form must be dense or factors, got {form!r}")
    dense = saving.plain_class(model)

    def replace(name: str, layer: nn.Module) -> nn.Module:
        if isinstance(layer, QuantizedLinear) or form == "dense":
            weight = layer.dequantize() if isinstance(layer, QuantizedLinear) else layer.effective_weight()
            return _dense(weight.to(layer.weight.dtype), _bias(layer), dense(name))
        if isinstance(layer, PivotLinear):
            out, in_, rank = layer.out_features, layer.in_features, layer.rank
            if rank * (out + in_) >= out * in_:
                return _dense(layer.effective_weight().to(layer.weight.dtype), layer.bias, dense(name))
            Vh, U = layer.factors()
        else:
            Vh, U = dense_weight(layer.Vh), dense_weight(layer.U)
        return nn.Sequential(_linear(Vh), _linear(U, _bias(layer)))

    return _replaced(model, replace)


def save_factors(model: nn.Module, path: str | os.PathLike, *, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write `to_plain(model, "factors")` to a directory that stock PyTorch, safetensors and transformers load.

    The weights are in factors.safetensors, where `from_pretrained` does not look: it has no layers for them, and would
    fill up with random ones. README.md has the dozen lines that load them.

    Raises `FileExistsError` for a directory that is not empty, without `overwrite`.
    """
    from safetensors.torch import save_model

    plain = to_plain(model, "factors")
    with files.new_directory(path, overwrite=overwrite) as directory:
        try:
            save_model(plain, str(directory / "factors.safetensors"), metadata={"format": "pt"})
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                raise OSError(f"cannot write {path}: {error}") from error
            raise
        plain.config.dtype = plain.dtype
        plain.config.save_pretrained(directory)
        if getattr(plain, "generation_config", None) is not None:
            plain.generation_config.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        files.write_text(directory / "README.md", _CARD.format(loader=_LOADER))
        checksums.write(directory)


_FREE = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}


class _Logits(nn.Module):
    """What is exported: logits of tokens, without a cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def export_program(model: nn.Module) -> torch.export.ExportedProgram:
    """`torch.export`'s program of a language model: logits of `(input_ids, attention_mask)`, int64 `[batch, sequence]`.

    Both sizes are free. Low-rank layers are two products, pivoted ones keep their form; there is no cache, so that a
    text is a call. `torch.export.save` writes it for PyTorch alone, without transformers.

    Raises `ValueError` for a model of all sizes.
    """
    dense = saving.plain_class(model)

    def replace(name: str, layer: nn.Module) -> nn.Module:
        if isinstance(layer, QuantizedLinear):
            return _dense(layer.dequantize(), layer.bias, dense(name))
        if isinstance(layer, PivotLinear):
            return PivotedPair(layer)
        return nn.Sequential(_linear(dense_weight(layer.Vh)), _linear(dense_weight(layer.U), _bias(layer)))

    with torch.no_grad():
        plain = _Logits(_replaced(model, replace)).eval()
        device = next(plain.parameters()).device
        # Sizes other than 1, which an exporter takes for fixed.
        tokens = torch.zeros(2, 3, dtype=torch.int64, device=device)
        shapes = {"input_ids": _FREE, "attention_mask": _FREE}
        return torch.export.export(plain, (tokens, torch.ones_like(tokens)), dynamic_shapes=shapes)


def export_onnx(model: nn.Module, path: str | os.PathLike, *, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write `export_program(model)` as ONNX to a directory: model.onnx, and its weights in model.onnx.data.

    Inputs `input_ids` and `attention_mask`, int64 `[batch, sequence]`; output `logits`. Weights and logits keep the
    model's dtype: cast a bfloat16 model to float32 first where the runtime has no bfloat16.

    Raises:
        RuntimeError: onnx and onnxscript are not installed.
        FileExistsError: a directory that is not empty, without `overwrite`.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"ONNX export needs the package {error.name}: pip install 'acip-kernels[onnx]'") from None
    program = export_program(model)
    inputs = ["input_ids", "attention_mask"]
    shapes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    names: dict[str, Any] = {"input_names": inputs, "output_names": ["logits"], "dynamic_shapes": shapes}
    with files.new_directory(path, overwrite=overwrite) as directory:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own parts, to each other
            onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        onnx_program.save(directory / "model.onnx", external_data=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        saving.plain_config(model).save_pretrained(directory)
        checksums.write(directory)


def _replaced(model: nn.Module, replace) -> nn.Module:
    """A copy of `model` with `replace(name, layer)` in the place of this package's layers."""
    if any(hasattr(module, "set_live") for module in model.modules()):
        raise ValueError("the model is of all sizes: cut one first, by materialize(model, size_ratio)")
    memo: dict[int, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedHead):
            continue
        if isinstance(layer, LowRankLinear | PivotLinear | QuantizedLinear) and layer not in inside:
            inside.update(layer.children())
            memo[id(layer)] = replace(name, layer).train(layer.training)
    _plain_embeddings(model, memo)
    new = quantizer.copied(model, memo)
    unfuse(new)
    if quantizer.is_transformers(new):
        new.config = saving.plain_config(model)
    for parameter in new.parameters():
        parameter.requires_grad_(True)
    return new


def _plain_embeddings(model: nn.Module, memo: dict[int, nn.Module]) -> None:
    """Into `memo`, what becomes of a quantized embedding, and of the head that shares it."""
    dense = saving.plain_class(model)
    new: nn.Module
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedEmbedding):
            sizes = layer.num_embeddings, layer.embedding_dim
            with torch.device("meta"):
                new = nn.Embedding(*sizes) if layer.scale == 1.0 else dense(name)(*sizes, None, layer.scale)
            new.weight = nn.Parameter(layer.dequantize())
            if layer.scale != 1.0:
                new.embed_scale = torch.tensor(layer.scale, device=new.weight.device)
            memo[id(layer)] = new.train(layer.training)
    for layer in model.modules():
        if isinstance(layer, QuantizedHead):
            (source,) = layer._source
            new = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
            new.register_parameter("weight", memo[id(source)].get_parameter("weight"))
            if layer.bias is not None:
                new.register_parameter("bias", nn.Parameter(layer.bias.detach().clone()))
            memo[id(layer)] = new.train(layer.training)


def _bias(layer: LowRankLinear | PivotLinear) -> Tensor | None:
    return layer.U.bias if isinstance(layer, LowRankLinear) else layer.bias


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    new.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone())
    return new


def _dense(weight: Tensor, bias: Tensor | None, kind: type) -> nn.Module:
    """An `nn.Linear`, or transformers' `Conv1D` if `kind` is that."""
    if kind.__name__ != "Conv1D":
        return _linear(weight, bias)
    with torch.device("meta"):
        new = kind(*weight.shape)
    new.weight = nn.Parameter(weight.detach().t().clone())
    new.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias.detach().clone())
    return new
