"""Fit what a cut has left to what the whole model computes, layer after layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .factorize import replace_modules, svd_layers
from .result import CompressionResult
from .step import with_labels

# Of the mean of the inner dimensions' second moments, added to each of them.
DAMPING = 1e-5


@torch.no_grad()
def recalibrate(
    result: CompressionResult,
    size_ratio: float,
    batches: Iterable[dict],
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> CompressionResult:
    """Fit the factors of one size to the model at its full size, on the inputs that the cut layers before them make.

    Layer by layer, in the order in which they compute: with `Ẑ = X̂ (S Vh)ᵀ` of the ranks that stay, `X̂` the layer's
    inputs in the model that is cut and refitted up to there, and `Y` the outputs that it has in the whole model, `U` is
    the minimum of `‖Y - Ẑ Uᵀ‖²` over all tokens, so that it makes good for what was lost before it too (sequential
    updates as of SVD-LLM, arXiv 2403.07378, there of single layers' inputs). It costs no bytes, and six passes through
    the model. It need not help: SmolLM2-135M's `importance` ranking it made worse (docs/quality.md), so compare before
    you keep it.

    Args:
        result: without adapters. It is changed in place; sizes other than this one have changed with it, unmeasured.
        size_ratio, options: as for `result.cut`.
        batches: dicts with `input_ids [batch, length]`, a finite number; all are held, with two hidden states each.
        progress: called with `(done, total)` blocks.

    Returns:
        `result`, for `materialize(result, size_ratio)`.

    Raises:
        ValueError: a model with adapters, or whose layers are in no list of blocks; no batches.
    """
    model = result.model
    layers = svd_layers(model)
    if any(layer.adapter_rank for layer in layers.values()):
        raise ValueError("recalibrate: the model has adapters, whose part this does not fit; use finetune instead")
    device = next(model.parameters()).device
    batches = [with_labels(batch, device) for batch in batches]
    if not batches:
        raise ValueError("recalibrate: there are no batches")
    batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    blocks = _blocks(model, layers)
    live = result.cut(size_ratio, **options).live
    fitted = {name: _Fitted(layer, live[name].to(device)) for name, layer in layers.items()}
    model.eval()
    replace_modules(model, {layers[name]: fitted[name] for name in layers})
    try:
        states, keywords = _first_inputs(model, blocks, batches)
        both = {True: states, False: states}
        for number, block in enumerate(blocks):
            passes = {whole: list(zip(both[whole], keywords[number], strict=True)) for whole in both}
            for group in _groups(block, *passes[True][0]):
                _fit(block, group, passes)
            both = {whole: [_run(block, whole, *inputs) for inputs in passes[whole]] for whole in both}
            if progress is not None:
                progress(number + 1, len(blocks))
    finally:
        replace_modules(model, {fitted[name]: layers[name] for name in layers})
    for name, layer in layers.items():
        stays = live[name].to(device)
        layer.U[:, stays] = fitted[name].left.to(layer.U.dtype)
        layer.compact()
    return result


class _Fitted(nn.Module):
    """A layer in two: `whole`, as a dense one, or cut to its live ranks. `seen(x, y)` is told what it computes."""

    def __init__(self, layer, live: Tensor):
        super().__init__()
        self.dtype, self.bias = layer.U.dtype, layer.bias
        self.dense = layer.effective_weight().to(self.dtype)
        self.left = layer.U[:, live].float()
        self.right = (layer.S[live, None] * layer.Vh[live].float()).to(self.dtype)
        self.whole, self.seen = False, None

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            y = nn.functional.linear(x, self.dense, self.bias)
        else:
            y = nn.functional.linear(x @ self.right.t(), self.left.to(self.dtype), self.bias)
        if self.seen is not None:
            self.seen(x, y)
        return y


class _Stop(Exception):
    """What was wanted is known."""


def _blocks(model: nn.Module, layers: dict) -> list[nn.Module]:
    """The model's blocks: the entries of the list of modules that has the most of `layers`."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            found[name] = sum(layer.startswith(f"{name}.") for layer in layers)
    best = max(found, key=lambda name: (found[name], -len(name)), default=None)
    if best is None or not found[best]:
        raise ValueError("recalibrate: the model's layers are in no nn.ModuleList, so there is no order to follow")
    return list(model.get_submodule(best).children())


def _first_inputs(model, blocks, batches) -> tuple[list[Tensor], list[list[dict]]]:
    """What enters the first block, for every batch; and every block's other arguments, for every batch."""
    states: list[Tensor] = []
    keywords: list[list[dict]] = [[] for _ in blocks]

    def hook(number):
        def see(module, args, kwargs):
            kwargs = dict(kwargs)
            state = args[0] if args else kwargs.pop("hidden_states")
            if number == 0:
                states.append(state)
            keywords[number].append(kwargs)

        return see

    hooks = [block.register_forward_pre_hook(hook(n), with_kwargs=True) for n, block in enumerate(blocks)]
    try:
        for batch in batches:
            model(**batch, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return states, keywords


def _run(block: nn.Module, whole: bool, state: Tensor, keywords: dict) -> Tensor:
    for module in block.modules():
        if isinstance(module, _Fitted):
            module.whole = whole
    output = block(state, **keywords)
    return output if isinstance(output, Tensor) else output[0]


def _groups(block: nn.Module, state: Tensor, keywords: dict) -> list[list[_Fitted]]:
    """The block's layers in the order in which they compute, those of the same input together."""
    groups: list[list[_Fitted]] = []
    last = None

    def see(layer):
        def seen(x, y):
            nonlocal last
            if x is last:
                groups[-1].append(layer)
            else:
                groups.append([layer])
            last = x

        return seen

    with _watching({layer: see(layer) for layer in block.modules() if isinstance(layer, _Fitted)}):
        _run(block, True, state, keywords)
    return groups


@contextlib.contextmanager
def _watching(seen: dict):
    for layer, callback in seen.items():
        layer.seen = callback
    try:
        yield
    finally:
        for layer in seen:
            layer.seen = None


def _fit(block: nn.Module, group: list[_Fitted], passes: dict) -> None:
    """New `left`s of a group: least squares, over all batches, of what they miss."""
    sums: dict[_Fitted, list[Tensor]] = {}
    for whole, cut in zip(passes[True], passes[False], strict=True):
        wanted: dict[_Fitted, Tensor] = {}

        def keep(layer, wanted=wanted):
            def seen(x, y):
                wanted[layer] = y.flatten(0, -2)
                if len(wanted) == len(group):
                    raise _Stop

            return seen

        with _watching({layer: keep(layer) for layer in group}), contextlib.suppress(_Stop):
            _run(block, True, *whole)
        inputs: list[Tensor] = []

        def first(x, y, inputs=inputs):
            inputs.append(x.flatten(0, -2))
            raise _Stop

        with _watching({group[0]: first}), contextlib.suppress(_Stop):
            _run(block, False, *cut)
        for layer in group:
            z = (inputs[0] @ layer.right.t()).float()
            missing = wanted[layer].float() - z @ layer.left.t()
            if layer.bias is not None:
                missing -= layer.bias.float()
            made = [(z.t() @ z).double(), (z.t() @ missing).double()]
            sums[layer] = [a.add_(b) for a, b in zip(sums[layer], made, strict=True)] if layer in sums else made
    for layer, (gram, cross) in sums.items():
        if not len(gram):
            continue
        damping = DAMPING * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        while True:
            L, failed = torch.linalg.cholesky_ex(gram + damping * torch.eye(len(gram), dtype=gram.dtype).to(gram))
            if not failed:
                break
            damping *= 10
        layer.left += torch.cholesky_solve(cross, L).t().float()
