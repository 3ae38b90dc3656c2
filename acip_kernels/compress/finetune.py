"""Train adapters at one size, by the same step as a run's."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn

from ..nn import LowRankLinear, PivotLinear, SVDLinear
from ..nn.quantized_linear import QuantizedLinear
from .config import CompressionConfig
from .progress import RunProgress
from .result import CompressionResult
from .step import TrainingStep, endless


def finetune(
    model: nn.Module | CompressionResult,
    batches: Iterable[dict],
    steps: int,
    *,
    learning_rate: float = 2e-4,
    adapter_rank: int = 32,
    adapter_alpha: float = 16.0,
    adapter_dropout: float = 0.05,
    gradient_accumulation: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> CompressionResult:
    """Train LoRA adapters of a model at the size that it has; everything else is frozen.

    Args:
        model: a materialized model, whose every low-rank layer gets a new adapter (layers that it stores dense have
            none); or a `CompressionResult`, or its model, after `at(size_ratio)`, whose own adapters are trained. It is
            changed in place.
        batches: as for `compress`. steps: optimizer steps, of `gradient_accumulation` batches each.
        learning_rate: AdamW's, without weight decay; the reference implementation's default.
        adapter_rank, adapter_alpha, adapter_dropout: of new adapters. seed: of their start and of dropout.

    Returns:
        A `CompressionResult`: `materialize(result, size_ratio=1.0)` merges the adapters of a materialized model.

    Raises:
        ValueError: a model without low-rank layers, or with quantized ones; batches that are used up and cannot be
            started again.
        FloatingPointError: a loss or gradient that is not finite; the parameters are those before that step.
    """
    size_ratio = model.size_ratio if isinstance(model, CompressionResult) else 1.0
    model = model.model if isinstance(model, CompressionResult) else model
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, got {steps!r}")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("the model's weights are quantized: finetune it before that, and quantize what comes of it")
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if not any(isinstance(module, SVDLinear) for module in model.modules()):
            _put_adapters(model, adapter_rank, adapter_alpha, adapter_dropout)
        config = CompressionConfig(adapter_learning_rate=learning_rate, gradient_accumulation=gradient_accumulation)
        step = TrainingStep(model, config)
        if not step.adapters:
            raise ValueError("the model's low-rank layers have no adapter to train")
        step.compact(everything=True)
        step.freeze_masks()
        feed = endless(batches)
        history = []
        with RunProgress(enabled=progress) as bar, bar.counting("tune", "steps") as advance:
            for number in range(steps):
                outcome = step(list(itertools.islice(feed, gradient_accumulation)))
                if not outcome.finite:
                    raise FloatingPointError(
                        f"step {number}: loss {outcome.loss}, gradient norm {outcome.gradient_norm}; "
                        "lower the learning rate, or compute in float32"
                    )
                history.append({"step": number, "phase": "tune", "loss": outcome.loss})
                advance(number + 1, steps)
    step.finish()
    return CompressionResult(model, None, history, size_ratio)


def _put_adapters(model: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Every `LowRankLinear` and `PivotLinear` becomes an `SVDLinear` of its factors, with singular values of one."""
    if rank < 1:
        raise ValueError(f"adapter_rank must be at least 1, got {rank}")
    replaced: dict[int, SVDLinear] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, LowRankLinear | PivotLinear) and child.rank:
                if id(child) not in replaced:
                    if isinstance(child, PivotLinear):
                        (Vh, U), bias = child.factors(), child.bias
                    else:
                        Vh, U, bias = child.Vh.weight, child.U.weight, child.U.bias
                    ones = torch.ones(child.rank, device=U.device)
                    replaced[id(child)] = SVDLinear(
                        U, ones, Vh, bias, adapter_rank=rank, adapter_alpha=alpha, adapter_dropout=dropout
                    )
                setattr(parent, name, replaced[id(child)])
    if not replaced:
        raise ValueError("the model has no low-rank layer to put an adapter on")
