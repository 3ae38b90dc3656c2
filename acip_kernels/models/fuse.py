"""Siblings in one call: `fuse(model)` for a model that is deployed, and `unfuse(model)`.

What has one input is computed by one call of an operator (see `nn.fused`): the q, k and v projections; gate, up,
SwiGLU and down; and the output head, a dense layer, takes the same operator. Modules, parameters and the state stay as
they are: what is put on is a `forward` of the instance, which `unfuse` takes off again. Where the operator does not
apply (gradients, a hook on a layer, a GPU that was not measured), the modules compute what they always did.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import LowRankLinear, PivotLinear, QuantizedHead, fused
from ..nn.quantized_linear import QuantizedLinear
from ..ops.fused_linear.op import CONCATENATE, GATED_MLP

# What llama-like models call them; a module needs all of a row to be fused.
_ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def fuse(model: nn.Module) -> nn.Module:
    """Let sibling layers of `model` be computed in one call; changes it in place and returns it.

    Outputs change by rounding alone. Works for modules whose children have llama's names (`q_proj`, `k_proj`, `v_proj`;
    `gate_proj`, `up_proj`, `down_proj` with SiLU) and are `nn.Linear`, `LowRankLinear`, `PivotLinear` or
    `QuantizedLinear`; the others stay as they are. Generating, caches, `torch.compile` and saving work as before.

    Raises `RuntimeError` for a model on the CPU without the native extension.
    """
    from ..ops import extension

    if not extension.available() and not any(parameter.is_cuda for parameter in model.parameters()):
        raise RuntimeError(f"fuse: the native kernels are {extension.missing}")
    unfuse(model)
    for module in model.modules():
        children = module._modules
        if all(_fusible(children.get(name)) for name in _ATTENTION):
            group = _Siblings([module.get_submodule(name) for name in _ATTENTION])
            for number, layer in enumerate(group.layers):
                layer.forward = _SiblingForward(group, number)
        if all(_fusible(children.get(name)) for name in MLP) and is_silu(children.get("act_fn")):
            module.forward = _MlpForward(module)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) in (nn.Linear, QuantizedLinear, QuantizedHead) and fused.is_plain(head):
        head.forward = _HeadForward(head)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`; what was not fused stays as it is."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _SiblingForward | _MlpForward | _HeadForward):
            del module.forward
    return model


def is_fused(model: nn.Module) -> bool:
    return any(
        isinstance(m.__dict__.get("forward"), _SiblingForward | _MlpForward | _HeadForward) for m in model.modules()
    )


def fused_calls(model: nn.Module) -> list[tuple[str, fused.Fused, int]]:
    """`(name, what is computed, mode)` of all that may be one call: groups of a fused model, and every layer."""
    found: list[tuple[str, fused.Fused, int]] = []
    groups: set[int] = set()
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, _SiblingForward) and id(forward.group) not in groups:
            groups.add(id(forward.group))
            found.append((f"{name.rpartition('.')[0]} q/k/v", forward.group, CONCATENATE))
        elif isinstance(forward, _MlpForward):
            found.append((name, forward, GATED_MLP))
        elif isinstance(forward, _HeadForward):
            found.append((name, forward, CONCATENATE))
            continue
        whole = isinstance(module, QuantizedLinear) and _is_whole(model, name)
        if type(module) in (LowRankLinear, PivotLinear) or whole:
            found.append((name, module, CONCATENATE))
    return found


def _is_whole(model: nn.Module, name: str) -> bool:
    """Whether a layer is none of another layer's factors."""
    return not isinstance(model.get_submodule(name.rpartition(".")[0]), LowRankLinear | PivotLinear)


def _fusible(layer: nn.Module | None) -> bool:
    return type(layer) in (nn.Linear, QuantizedLinear, LowRankLinear, PivotLinear) and fused.is_plain(layer)


def is_silu(activation: nn.Module | None) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation") and fused.is_plain(activation)


def _spec(layer: nn.Module) -> tuple[int, ...]:
    return fused.dense_spec(layer) if type(layer) is nn.Linear else layer.spec()


def _add(layer: nn.Module, x: Tensor, tensors: list[Tensor]) -> bool:
    """Appends what the operator takes of `layer`, whose forward may be one of those below; False where it may not."""
    if isinstance(layer, LowRankLinear | PivotLinear):
        return not fused.has_hooks(layer) and layer.add_tensors(x, tensors)
    return fused.add_dense(layer, x, tensors, forward=True)


class _Group:
    """Layers that one call computes (`nn.fused.Fused`)."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.prepared = None

    def spec(self) -> tuple[int, ...]:
        return tuple(number for layer in self.layers for number in _spec(layer))

    def add_tensors(self, x: Tensor, tensors: list[Tensor]) -> bool:
        return all(_add(layer, x, tensors) for layer in self.layers)

    def watched(self) -> list[tuple[nn.Module, bool]]:
        return [entry for layer in self.layers for entry in fused.watched(layer)]


class _Siblings(_Group):
    """Layers that are called one after the other with one input: the first call computes all of them."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__(layers)
        self.widths = [layer.out_features for layer in layers]
        self.x: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        y = fused.call(self, x)
        return () if y is None else y.split(self.widths, -1)


class _SiblingForward:
    """The `forward` of one of the siblings. An object, so that a deep copy of the model refers to the copy's layers."""

    def __init__(self, group: _Siblings, number: int):
        self.group, self.number = group, number

    def __call__(self, x: Tensor) -> Tensor:
        group, number = self.group, self.number
        if number == 0:
            group.outputs = group.compute(x)
            group.x = x if group.outputs else None
        if group.x is x and group.outputs:
            output = group.outputs[number]
            if number + 1 == len(group.layers):
                group.x, group.outputs = None, ()
            return output
        layer = group.layers[number]
        return type(layer).forward(layer, x)


class _MlpForward(_Group):
    """The `forward` of a gated MLP."""

    def __init__(self, mlp: nn.Module):
        super().__init__([mlp.get_submodule(name) for name in MLP])
        self.mlp = mlp

    def add_tensors(self, x: Tensor, tensors: list[Tensor]) -> bool:
        # The MLP's own forward would call what is in the places of the layers now.
        children = self.mlp._modules
        if not is_silu(children.get("act_fn")):
            return False
        if any(children.get(name) is not layer for name, layer in zip(MLP, self.layers, strict=True)):
            return False
        return super().add_tensors(x, tensors)

    def watched(self) -> list[tuple[nn.Module, bool]]:
        activation = self.mlp.get_submodule("act_fn")
        return [(self.mlp, False), (activation, True), *super().watched()]

    def __call__(self, x: Tensor) -> Tensor:
        y = fused.call(self, x, GATED_MLP)
        return type(self.mlp).forward(self.mlp, x) if y is None else y


class _HeadForward(_Group):
    """The `forward` of the output head."""

    def __init__(self, head: nn.Module):
        super().__init__([head])

    def __call__(self, x: Tensor) -> Tensor:
        (head,) = self.layers
        y = fused.call(self, x)
        return type(head).forward(head, x) if y is None else y
