"""What a transformers model computes by our kernels while it is trained: norms, SwiGLU, rotations, on a CPU attention.

Modules, parameters and the state stay as they are. Attention is a function that transformers looks up by name; norms
and gated MLPs get a `forward` of the instance, where trying has shown that the module's own computes the same; so it is
with rotations, a function of the module that defines a model, which is ours during its passes alone. Where the kernels
do not apply (under `torch.compile`, a norm whose weight learns), modules compute what they always did.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..nn.fused import is_plain
from ..ops.causal_attention.op import causal_attention
from ..ops.common import multiplies_natively
from ..ops.gated_silu.op import gated_silu
from ..ops.gated_silu.op import takes as takes_gates
from ..ops.rms_norm.op import rms_norm
from ..ops.rms_norm.op import takes as takes_norms
from ..ops.rotary import reference as rotary_reference
from ..ops.rotary.op import rotary
from ..ops.rotary.op import takes as takes_rotations
from .fuse import MLP, is_silu

NAME = "acip_training"
# As transformers calls it in the modules of its models.
ROTATE = "apply_rotary_pos_emb"


def use(model: nn.Module) -> str | None:
    """Have `model` compute by our kernels and return the name of its own attention, for `restore`; None if it does not.

    Only a transformers model: on a GPU, where attention stays torch's, or on a CPU that multiplies its dtype natively,
    if it uses torch's fused attention. What is frozen has to be so already: a norm whose weight learns stays as it is.
    """
    parameter = next(model.parameters(), None)
    if not isinstance(model, PreTrainedModel) or parameter is None:
        return None
    own = model.config._attn_implementation
    if parameter.device.type == "cpu":
        if not multiplies_natively(parameter.dtype) or own != "sdpa" or not model._can_set_attn_implementation():
            return None
        model.set_attn_implementation(NAME)
    elif not takes_norms(parameter.new_empty(1)):
        return None
    for module in model.modules():
        if is_norm(module):
            module.forward = _NormForward(module)
        elif is_gated_mlp(module):
            module.forward = _MlpForward(module)
    return own


def restore(model: nn.Module, name: str | None) -> None:
    """Undo `use`."""
    if name is None:
        return
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(name)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _NormForward | _MlpForward):
            del module.forward


@contextlib.contextmanager
def functions(inputs: dict, modules: tuple[types.ModuleType, ...] = ()) -> Iterator[None]:
    """Within it transformers computes by other functions; it is for the forward and backward pass of `inputs`.

    The rotations of `modules` (see `rotations`) are ours. And it does not look whether sequences are packed into the
    rows of `inputs`, by positions alone, which they are not if no positions are given: it would wait for a GPU to say
    so; and while a CUDA graph is captured, where it cannot, it makes a mask, with which attention is slower.
    """
    own = [(module, ROTATE, _rotation(getattr(module, ROTATE))) for module in modules]
    packed = "find_packed_sequence_indices"
    if "position_ids" not in inputs and hasattr(masking_utils, packed):
        own.append((masking_utils, packed, _no_sequences))
    held = [(module, name, getattr(module, name)) for module, name, _ in own]
    try:
        for where in own:
            setattr(*where)
        yield
    finally:
        for where in held:
            setattr(*where)


def _no_sequences(position_ids: Tensor) -> None:
    """None are packed. One function for ever: another one each time would be compiled anew by torch.compile."""


# ---- rotations


def rotations(model: nn.Module) -> tuple[types.ModuleType, ...]:
    """The modules with `model`'s code whose function for rotations computes what `rotary` does; it is tried."""
    parameter = next(model.parameters(), None)
    if not isinstance(model, PreTrainedModel) or parameter is None or not takes_rotations(parameter.new_empty(1)):
        return ()
    if parameter.device.type == "cpu" and not multiplies_natively(parameter.dtype):
        return ()
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    found = (sys.modules[name] for name in names if name in sys.modules)
    return tuple(module for module in found if is_rotation(getattr(module, ROTATE, None)))


@torch.no_grad()
def is_rotation(function: Callable | None) -> bool:
    """Whether `function(q, k, cos, sin)` is `rotary` of both."""
    if function is None:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(2, 1, 5, 8, generator=generator)
    cos, sin = torch.randn(2, 2, 5, 8, generator=generator)
    try:
        rotated = function(q, k, cos, sin)
        expected = [rotary_reference.forward(x, cos, sin) for x in (q, k)]
        return len(rotated) == 2 and all(map(torch.allclose, rotated, expected))
    except Exception:  # a function of another kind, whatever it is
        return False


@functools.cache
def _rotation(own: Callable) -> Callable:
    """What stands in for a model's function `own`, which has what is not for the kernels. One for ever, as above."""

    def rotate(q, k, cos, sin, *others, **options):
        if (
            others
            or options
            or torch.compiler.is_compiling()
            or not all(type(x) is Tensor and x.dim() == 4 and takes_rotations(x) for x in (q, k))
            or not (cos.dim() == sin.dim() == 3 and q.dtype == k.dtype == cos.dtype == sin.dtype)
        ):
            return own(q, k, cos, sin, *others, **options)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return rotate


# ---- attention


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
    """transformers' attention function: `causal_attention` where no mask is given and it applies, else torch's."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if (
        attention_mask is None
        and causal
        and not dropout
        and (query.requires_grad or module.training)  # a teacher's too
        and key.shape[2] == query.shape[2] > 1
        and key.shape == value.shape
        and key.shape[-1] == query.shape[-1]
        and options.get("softcap") is None
        and options.get("position_bias") is None
    ):
        return causal_attention(query, key, value, scaling).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


# ---- norms and gated MLPs


def _takes(inputs: tuple, options: dict, takes: Callable[[Tensor], bool]) -> bool:
    """Whether a module is called with one plain tensor, and its kernel is for that."""
    return (
        len(inputs) == 1
        and not options
        and type(inputs[0]) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(inputs[0].device.type)
        and takes(inputs[0])
    )


class _NormForward:
    """The `forward` of an RMS norm. An object, so that a deep copy of the model refers to the copy's module."""

    def __init__(self, norm: nn.Module):
        self.norm = norm

    def __call__(self, *inputs, **options) -> Tensor:
        norm = self.norm
        weight = norm.weight
        learns = weight.requires_grad and torch.is_grad_enabled()
        if learns or not _takes(inputs, options, takes_norms) or inputs[0].dtype != weight.dtype:
            return type(norm).forward(norm, *inputs, **options)
        return rms_norm(inputs[0], weight, _epsilon(norm))


class _MlpForward:
    """The `forward` of a gated MLP. Its layers are called as modules, whatever they are at the time."""

    def __init__(self, mlp: nn.Module):
        self.mlp = mlp

    def __call__(self, *inputs, **options) -> Tensor:
        mlp = self.mlp
        if not _takes(inputs, options, takes_gates) or not is_silu(mlp._modules.get("act_fn")):
            return type(mlp).forward(mlp, *inputs, **options)
        return mlp.down_proj(gated_silu(mlp.gate_proj(inputs[0]), mlp.up_proj(inputs[0])))


def _epsilon(norm: nn.Module) -> float | None:
    """llama's name for it, or gemma's and torch's."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def is_norm(module: nn.Module) -> bool:
    """Whether calling `module` is `rms_norm` with its weight, which is frozen; it is tried, as names tell little."""
    weight, eps = module._parameters.get("weight"), _epsilon(module)
    if (
        not type(module).__name__.endswith("RMSNorm")
        or type(weight) is not nn.Parameter
        or weight.dim() != 1
        or weight.requires_grad
        or not takes_norms(weight)
        or not isinstance(eps, float)
        or not is_plain(module)
    ):
        return False
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    x[1] *= eps**0.5  # where it counts what eps is added to
    expected = rms_norm(x, weight, eps)
    # Three roundings to the dtype, in whatever order, and those of the mean.
    bound = 2 * torch.finfo(x.dtype).eps + len(weight) * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    try:
        return torch.allclose(module.forward(x), expected, rtol=bound, atol=0)
    except Exception:  # a module of another kind, whatever it is
        return False


@torch.no_grad()
def is_gated_mlp(module: nn.Module) -> bool:
    """Whether `module` computes `down_proj(silu(gate_proj(x)) ⊙ up_proj(x))`; tried on a copy with other layers.

    So nothing is computed that would take time or leave a trace in the layers. The copy is in training mode: dropout,
    wherever it is, would show.
    """
    children = module._modules
    if set(children) != {*MLP, "act_fn"} or not is_silu(children["act_fn"]) or not is_plain(module):
        return False
    generator = torch.Generator().manual_seed(0)
    x, gate, up, y = (torch.randn(2, 16, generator=generator) for _ in range(4))
    probe = copy.copy(module)
    layers = {name: _StandIn(answer) for name, answer in zip(MLP, (gate, up, y), strict=True)}
    probe._modules = {**layers, "act_fn": children["act_fn"]}
    probe.training = True
    try:
        with torch.random.fork_rng(devices=[]):
            out = probe.forward(x)
    except Exception:  # a module of another kind, whatever it is
        return False
    expected = (x, x, gated_silu(gate, up), y)
    actual = (*(layer.asked for layer in layers.values()), out)
    return all(
        isinstance(one, Tensor) and one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=0)
        for one, other in zip(actual, expected, strict=True)
    )


class _StandIn(nn.Module):
    """A layer that gives a prepared answer and remembers what it was asked; `None` if more than once."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer, self.calls = answer, 0
        self.asked: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.asked = x if self.calls == 1 else None
        return self.answer
