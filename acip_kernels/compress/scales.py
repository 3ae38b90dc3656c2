"""Training of what a quantized model keeps in floating point: the scales of its weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..models import training
from ..models.distill import DistillationLoss
from ..models.fuse import fuse, is_fused, unfuse
from ..nn.quantized_linear import QuantizedLinear
from ..nn.scaled_linear import ScaledLinear
from .factorize import replace_modules
from .step import StepOutcome, with_labels


class ScaleTraining:
    """`step([batch, ...])`: forward, backward and AdamW for the scales of a model's `QuantizedLinear`s.

    Puts `ScaledLinear`s in their place, until `finish`, and freezes everything else.

    Args:
        model: with `QuantizedLinear`s. teacher: a model that the loss is to a part learnt from; None for none.
        distillation: the teacher's part `w`, see `DistillationLoss`.
        steps: of the whole training; over them the learning rate falls to zero by half a cosine, after it has risen
            for the first few.
        learning_rate: AdamW's, of the changes relative to a scale.
    """

    warmup_steps = 5

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, distillation: float, steps: int, learning_rate: float
    ):
        self.model, self.steps, self.learning_rate, self.done = model, steps, learning_rate, 0
        self.device = next(model.parameters()).device
        self.layers = {m: ScaledLinear(m) for m in model.modules() if isinstance(m, QuantizedLinear)}
        self.changes = [layer.change for layer in self.layers.values()]
        self.optimizer = torch.optim.AdamW(
            self.changes, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        # Nothing can be refused from here on: the model is changed.
        self.learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in self.learns:
            parameter.requires_grad_(False)
        self.was_fused = is_fused(model)
        unfuse(model)
        replace_modules(model, self.layers)
        self.loss = DistillationLoss(model, weight=0.0 if teacher is None else distillation, teacher=teacher)
        models = [model] if teacher is None else [model, teacher]
        self._attention = [(one, one.training, training.use(one)) for one in models]
        self._rotations = tuple({module: None for one in models for module in training.rotations(one)})
        for one in models:
            one.eval()  # without dropout: its noise is more than the errors that scales can take back

    def __call__(self, batches: list[dict]) -> StepOutcome:
        total = torch.zeros((), device=self.device)
        for batch in batches:
            inputs = with_labels(batch, self.device)
            with training.functions(inputs, self._rotations):
                loss = self.loss(inputs) / len(batches)
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.get_total_norm([change.grad for change in self.changes if change.grad is not None])
        # AdamW looks at this flag itself and changes nothing where it is set.
        self.optimizer.found_inf = (~(total.isfinite() & norm.isfinite())).float()
        fraction = self.done / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (self.done + 1) / self.warmup_steps)
            group["lr"] *= 0.5 * (1 + math.cos(math.pi * fraction))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        numbers = float(total), float(norm)
        return StepOutcome(*numbers, ranks=[], finite=all(map(math.isfinite, numbers)))

    def finish(self) -> None:
        """`QuantizedLinear`s again, with the scales as they are now; everything else as it was."""
        for model, was_training, name in self._attention:
            training.restore(model, name)
            model.train(was_training)
        replace_modules(self.model, {scaled: scaled.quantized() for scaled in self.layers.values()})
        for parameter, learns in self.learns:
            parameter.requires_grad_(learns)
        if self.was_fused:
            fuse(self.model)
