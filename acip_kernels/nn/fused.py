"""Where linear layers may be computed by `ops.fused_linear`, and what it is then told.

On the CPU that is the native operator, wherever it is built. On a GPU it is the Triton kernels, where `acip tune` has
measured on this very GPU that they are faster than torch's products for this problem.

The rule (see `LowRankLinear`): reading a module's weights must be the same as calling it. So a layer is taken only if
it, and each of its children, is exactly of a class that is known here, has no hook and no forward of its own, and holds
plain tensors on the input's device. Looking that up takes longer than a small layer's products, so what was found is
kept (`csrc/prepared.cpp`, on the CPU) and at each call compared with what is there, which takes a microsecond: no stale
answer.
"""

from __future__ import annotations

from types import MethodType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.modules.module import _has_any_global_hook

from ..ops import extension
from ..ops.fused_linear import measured
from ..ops.fused_linear.op import CONCATENATE, DENSE, DTYPES, FACTORS, FP8, INT4, INT4_ZEROS, INT8, PIVOTED, PLAIN
from ..plan import stands_for
from .quantized_linear import QuantizedLinear

_PLAIN_TENSORS = (Tensor, nn.Parameter)


def takes(x: Tensor) -> bool:
    """Whether it is the native operator's kind of input: on the CPU, and nobody wants gradients or autocast."""
    return extension.module is not None and x.device.type == "cpu" and _is_alone(x)


def _is_alone(x: Tensor) -> bool:
    """Whether nothing is wanted of the layers but their outputs, in a dtype that the operator has."""
    return (
        x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_exporting()
        and not _has_any_global_hook()
    )


def is_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_forward(module: nn.Module) -> bool:
    """Whether `module` has a forward of its own."""
    forward = module.__dict__.get("forward")
    if type(forward) is MethodType and forward.__self__ is module:
        # Its class's is none; accelerate leaves it there as it takes its hooks off.
        return forward.__func__ is not type(module).forward
    return forward is not None


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` is calling its class's forward and nothing else."""
    return not (has_hooks(module) or has_forward(module))


def matrix_spec(linear: nn.Linear | QuantizedLinear) -> tuple[int, int, int]:
    """Kind, columns and group of an `nn.Linear` or `QuantizedLinear`, as `fused_linear` takes them."""
    if isinstance(linear, QuantizedLinear):
        if linear.kind == "int4":
            return INT4 if linear.symmetric else INT4_ZEROS, linear.in_features, linear.group
        return INT8 if linear.kind == "int8" else FP8, linear.in_features, 0
    return PLAIN, linear.in_features, 0


def add_matrix(linear: nn.Module, x: Tensor, tensors: list[Tensor], *, forward: bool = False) -> bool:
    """Appends the weight's tensors to `tensors`; False where they may not be read.

    forward: the layer may have a forward of its own, as it is the caller's.
    """
    kind = type(linear)
    if has_hooks(linear) or (has_forward(linear) and not forward):
        return False
    if kind is nn.Linear:
        weight = linear._parameters.get("weight")  # a parametrized weight is no parameter any more
        if weight is None or type(weight) not in _PLAIN_TENSORS or weight.dtype != x.dtype or weight.device != x.device:
            return False
        tensors.append(weight)
        return True
    if isinstance(linear, QuantizedLinear) and kind.forward is QuantizedLinear.forward:
        if linear.kind == "fp8" and not is_gpu(x):  # which the native operator does not know
            return False
        for name in ("qweight", "scales", "zeros"):
            tensor = linear._buffers.get(name)
            if tensor is None:
                continue
            if type(tensor) is not Tensor or tensor.device != x.device:
                return False
            tensors.append(tensor)
        return True
    return False


def add_bias(module: nn.Module, x: Tensor, tensors: list[Tensor]) -> bool:
    """Appends the bias of `module`, if it has one; False where it may not be read."""
    bias = module.bias
    if bias is None:
        return True
    if type(bias) not in _PLAIN_TENSORS or bias.dtype != x.dtype or bias.device != x.device:
        return False
    tensors.append(bias)
    return True


def dense_spec(linear: nn.Module) -> tuple[int, ...]:
    """The spec of a dense layer, `nn.Linear` or `QuantizedLinear`."""
    return DENSE, 2 * (linear.bias is not None), *matrix_spec(linear)


def add_dense(linear: nn.Module, x: Tensor, tensors: list[Tensor], *, forward: bool = False) -> bool:
    return add_matrix(linear, x, tensors, forward=forward) and add_bias(linear, x, tensors)


def factors_spec(Vh: nn.Module, U: nn.Module) -> tuple[int, ...]:
    return FACTORS, 2 * (U.bias is not None), *matrix_spec(Vh), *matrix_spec(U)


def add_factors(Vh: nn.Module, U: nn.Module, x: Tensor, tensors: list[Tensor]) -> bool:
    return add_matrix(Vh, x, tensors) and add_matrix(U, x, tensors) and add_bias(U, x, tensors)


def pivoted_spec(P: nn.Module, C: nn.Module, bias: bool) -> tuple[int, ...]:
    return PIVOTED, 2 * bias, *matrix_spec(P), *matrix_spec(C)


class Fused(Protocol):
    """What one call of the operator computes: a layer, or a group of them.

    prepared: None to begin with, or what `call` has looked up.
    """

    prepared: object | None

    def spec(self) -> tuple[int, ...]:
        """What it is, as `ops.fused_linear` takes it."""

    def add_tensors(self, x: Tensor, tensors: list[Tensor]) -> bool:
        """Appends the tensors of `spec`; False where they may not be read for `x`."""

    def watched(self) -> list[tuple[nn.Module, bool]]:
        """The modules that both depend on; for each, whether it must have no hooks."""


# Everything that is called before or after every module's forward.
_GLOBAL_HOOKS = [
    value for name, value in vars(torch_modules).items() if name.startswith(("_global_forward", "_global_backward"))
]


def call(fused: Fused, x: Tensor, mode: int = CONCATENATE) -> Tensor | None:
    """The output for `x`, or None where this is not to make it."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        prepared = fused.prepared
        if prepared is not None:
            y = prepared(x)
            if y is not None:
                return y
    if is_gpu(x):
        return _call_measured(fused, x, mode, compiling)
    if not takes(x):
        return None
    spec = fused.spec()
    tensors: list[Tensor] = []
    if not fused.add_tensors(x, tensors):
        return None
    if compiling:
        return torch.ops.acip.fused_linear(x, tensors, spec, mode)
    fused.prepared = extension.module.Prepared(fused.watched(), tensors, spec, mode, x, _GLOBAL_HOOKS)
    return fused.prepared(x)


def _call_measured(fused: Fused, x: Tensor, mode: int, compiling: bool) -> Tensor | None:
    """The output on a GPU, where it was measured to be faster than torch's products.

    Compiled code is taken to be replayed as a CUDA graph. All else goes by the time of a call from Python, capturing by
    hand included: the calls that warm up have to load the very kernels that are captured, as none can be loaded then.
    """
    counts = measured.token_counts(x.device, compiling) if _is_alone(x) else ()
    if not counts:
        return None
    spec = fused.spec()
    width = spec[3]  # after form, flags and kind
    if x.shape[-1] != width or x.numel() > counts[-1] * width:
        return None
    # The nearest number that was measured: one number even where torch's compiler keeps that of `x` open.
    nearest = next((count for count in counts if stands_for(count, x.numel() // width)), None)
    tensors = None if nearest is None else gpu_tensors(fused, x)
    if tensors is None:
        return None
    problem = measured.problem_of(nearest, tensors, spec, mode, x.element_size())
    if not measured.is_faster(x.device, problem, compiling):
        return None
    return torch.ops.acip.fused_linear(x, tensors, spec, mode)


def gpu_tensors(fused: Fused, x: Tensor) -> list[Tensor] | None:
    """What the Triton kernels are to read for `x`; None where they may not, or cannot."""
    tensors: list[Tensor] = []
    if not fused.add_tensors(x, tensors) or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    return tensors


def watched(layer: nn.Module, own_hooks: bool = True) -> list[tuple[nn.Module, bool]]:
    """`layer` and its children, for `Fused.watched`; its own hooks matter unless torch has called them already."""
    return [(layer, own_hooks), *((child, True) for child in layer.children())]
