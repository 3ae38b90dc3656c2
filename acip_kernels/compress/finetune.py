"""Train at one size, by the same steps as a run's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ..nn import LowRankLinear, PivotLinear, SVDLinear
from ..nn.quantized_linear import QuantizedLinear
from .config import DTYPES, CompressionConfig
from .factorize import svd_layers
from .nested import NestedConfig
from .processes import Processes
from .progress import RunProgress
from .result import CompressionResult
from .run import compress
from .scales import ScaleTraining
from .sizing import FORMS
from .step import TrainingStep, endless


def finetune(
    model: nn.Module | CompressionResult,
    batches: Iterable[dict],
    steps: int,
    *,
    size_ratio: float | None = None,
    learning_rate: float | None = None,
    distillation: float = 0.5,
    teacher: nn.Module | None = None,
    adapter_rank: int = 32,
    adapter_alpha: float = 16.0,
    adapter_dropout: float = 0.05,
    gradient_accumulation: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> CompressionResult:
    """Train a model at one size. It is changed in place.

    Given `size_ratio` and a `CompressionResult` without adapters (of a nested run or of a ranking), the factors that
    this size has are trained themselves, by updates of rank `adapter_rank` that become a part of them, and taught by
    the result at its full size; afterwards `materialize(result, size_ratio)` is the tuned model, of as many bytes as
    before. Other sizes of the result have changed with it, unmeasured: keep the checkpoint that it came from.

    Of a quantized model the scales are trained (`ScaledLinear`): codes and bytes stay, and a part of what rounding has
    lost is won back. A `teacher` tells it best what was lost: the model before it was quantized, or the dense one.

    Without either, LoRA adapters are trained, and everything else is frozen.

    Args:
        model: a `CompressionResult` and a `size_ratio`, as above; or a materialized model, whose quantized weights'
            scales are trained if it has any, or whose every low-rank layer else gets a new adapter (layers that it
            stores dense have none); or a `CompressionResult`, or its model, after `at(size_ratio)`, whose own adapters
            are trained.
        batches: as for `compress`. steps: optimizer steps, of `gradient_accumulation` batches each.
        learning_rate: AdamW's, without weight decay; None for the reference implementation's default of 2e-4 for
            adapters, and at its highest 3e-4 for factors, 1e-3 for scales (relative to them).
        distillation: the teacher's weight in the loss of factors or scales, see `NestedConfig`.
        teacher: of a quantized model, a model of the same vocabulary; None to learn from the text alone. Factors are
            always taught by the result that they are of, and adapters by none.
        adapter_rank: of new adapters, or of updates. adapter_alpha, adapter_dropout: of new adapters.
        seed: of the start of what is trained, and of dropout.

    Returns:
        A `CompressionResult`: `materialize(result, size_ratio=1.0)` merges the adapters of a materialized model. A
        quantized model is its `model`, to be saved as before.

    Raises:
        ValueError: a model without low-rank or quantized layers; a `size_ratio` for what has one size or has adapters;
            a teacher for what is not quantized, or of another vocabulary; batches that are used up and cannot be
            started again.
        FloatingPointError: a loss or gradient that is not finite; the parameters are those before that step.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, got {steps!r}")
    quantized = any(isinstance(module, QuantizedLinear) for module in _module(model).modules())
    if teacher is not None and not quantized:
        raise ValueError("teacher is for the scales of a quantized model; factors have their own, and adapters none")
    if teacher is not None and teacher is _module(model):
        raise ValueError("the teacher is the model itself: give the model before it was quantized, or the dense one")
    if not 0 <= distillation <= 1:
        raise ValueError(f"distillation must be from 0 to 1, got {distillation}")
    if size_ratio is not None:
        if not isinstance(model, CompressionResult) or has_adapters(model.model):
            raise ValueError(
                "size_ratio is for a CompressionResult without adapters; of others give the model at that size: "
                "result.at(size_ratio), or materialize(result, size_ratio)"
            )
        config = NestedConfig(
            steps=steps,
            smallest_ratio=size_ratio,
            largest_ratio=size_ratio,
            learning_rate=3e-4 if learning_rate is None else learning_rate,
            distillation=distillation,
            update_rank=adapter_rank,
            gradient_accumulation=gradient_accumulation,
            seed=seed,
            dtype=_dtype_name(model.model),
            forms=FORMS if model.config is None else model.config.forms,
        )
        return compress(model.model, batches, config, progress=progress)
    size_ratio = model.size_ratio if isinstance(model, CompressionResult) else 1.0
    model = _module(model)
    device = next(model.parameters()).device
    if Processes.current(device).size > 1:
        what = "scales" if quantized else "adapters"
        raise ValueError(f"{what} are tuned in one process; compress, and finetune at a size_ratio, take several")
    if teacher is not None and next(teacher.parameters()).device != device:
        raise ValueError(f"the teacher is on {next(teacher.parameters()).device}, and the model on {device}")
    step: TrainingStep | ScaleTraining
    feed = _rounds(batches, gradient_accumulation)
    if quantized:
        step = ScaleTraining(model, teacher, distillation, steps, 1e-3 if learning_rate is None else learning_rate)
        try:
            history = _take_steps(step, feed, steps, progress)
        finally:
            step.finish()
        return CompressionResult(model, None, history, size_ratio)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if not any(isinstance(module, SVDLinear) for module in model.modules()):
            _put_adapters(model, adapter_rank, adapter_alpha, adapter_dropout)
        settings = CompressionConfig(
            adapter_learning_rate=2e-4 if learning_rate is None else learning_rate,
            gradient_accumulation=gradient_accumulation,
        )
        step = TrainingStep(model, settings)
        if not step.adapters:
            raise ValueError("the model's low-rank layers have no adapter to train")
        step.compact(everything=True)
        step.freeze_masks()
        history = _take_steps(step, feed, steps, progress)
    step.finish()
    return CompressionResult(model, None, history, size_ratio)


def _module(model: nn.Module | CompressionResult) -> nn.Module:
    return model.model if isinstance(model, CompressionResult) else model


def _rounds(batches: Iterable[dict], number: int) -> Iterator[list[dict]]:
    """`batches`, again and again, so many at a time."""
    feed = endless(batches)
    while True:
        yield list(itertools.islice(feed, number))


def _take_steps(step: Callable, feed: Iterator[list[dict]], steps: int, progress: bool) -> list[dict]:
    """The history of `steps` steps."""
    history = []
    with RunProgress(enabled=progress) as bar, bar.counting("tune", "steps") as advance:
        for number in range(steps):
            outcome = step(next(feed))
            if not outcome.finite:
                raise FloatingPointError(
                    f"step {number}: loss {outcome.loss}, gradient norm {outcome.gradient_norm}; "
                    "lower the learning rate, or compute in float32"
                )
            history.append({"step": number, "phase": "tune", "loss": outcome.loss})
            advance(number + 1, steps)
    return history


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of a factorized model have adapters beside their factors."""
    return any(layer.adapter_rank for layer in svd_layers(model).values())


def _dtype_name(model: nn.Module) -> str:
    of = next(iter(svd_layers(model).values())).U.dtype
    return next(name for name, dtype in DTYPES.items() if dtype == of)


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
