"""The loss that a dense model teaches a smaller one with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .loss import IGNORE, CausalLoss

# Logits made at a time; those of teacher and student, and their gradient, are three such blocks.
_CHUNK_ELEMENTS = 2**24
# Of those, what is turned into probabilities at a time: a few passes over what a processor's caches hold.
_ROW_ELEMENTS = 2**18


class DistillationLoss:
    """`(1 - w) · cross-entropy + w · KL(teacher ‖ student)`, the mean over the labelled tokens, with a graph.

    The student is `model`; the teacher is `model` too, while `teaching()`, a context manager, has it compute with its
    dense weights. Where the model is a base model and a frozen linear head, logits are made and turned into gradients
    a block at a time (see `soft_cross_entropy`); otherwise all at once.

    Args:
        weight: `w`, in [0, 1]; 0 is the model's ordinary loss, and nothing is taught.
    """

    def __init__(self, model: nn.Module, teaching: Callable, weight: float):
        self.model, self.teaching, self.weight = model, teaching, weight
        self.plain = CausalLoss(model)

    def __call__(self, inputs: dict) -> Tensor:
        if self.weight == 0:
            return self.plain(inputs)
        others = {key: value for key, value in inputs.items() if key != "labels"}
        labels = nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE)[..., 1:].reshape(-1)
        counted = labels != IGNORE
        lean = self.plain.is_lean(inputs)
        of = self._hidden if lean else self._logits
        with torch.no_grad(), self.teaching():
            taught = of(others)[counted]
        learnt = of(others)[counted]
        head = self.model.get_output_embeddings() if lean else None
        weight, bias = (head.weight, head.bias) if lean else (None, None)
        return soft_cross_entropy(learnt, taught, labels[counted], weight, bias, self.weight) / counted.sum()

    def _hidden(self, inputs: dict) -> Tensor:
        return self.model.base_model(**inputs, use_cache=False)[0].flatten(0, 1)

    def _logits(self, inputs: dict) -> Tensor:
        return self.model(**inputs).logits.flatten(0, 1)


def soft_cross_entropy(
    x: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor | None, bias: Tensor | None, w: float
) -> Tensor:
    """`Σ_tokens (1 - w) · -log q[label] + w · Σ_classes p log(p / q)`, `q` and `p` the softmax of either's logits.

    Args:
        x, teacher: `[tokens, in]`, of which `weight [classes, in]` and `bias` make logits; `[tokens, classes]` where
            `weight` is None. labels: int64 `[tokens]`.

    Returns:
        A float32 scalar (float64 for float64 `x`), with a gradient for `x` alone: of the logits it is
        `q - (1 - w) onehot(label) - w p`.
    """
    return _SoftCrossEntropy.apply(x, teacher, labels, weight, bias, w)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, teacher, labels, weight, bias, w):
        precise = torch.promote_types(x.dtype, torch.float32)
        classes = x.shape[1] if weight is None else weight.shape[0]
        chunk, rows = max(32, _CHUNK_ELEMENTS // classes), max(1, _ROW_ELEMENTS // classes)
        dx, losses = torch.empty_like(x), []

        def logits(states):
            return states if weight is None else nn.functional.linear(states, weight, bias)

        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            student, taught, label = logits(x[part]), logits(teacher[part]), labels[part, None]
            # The gradient takes the place of the student's logits, which may be the caller's where there is no head.
            gradient = student if weight is not None else torch.empty_like(student)
            for first in range(0, len(label), rows):
                few = slice(first, first + rows)
                log_q, log_p = (t[few].to(precise).log_softmax(1) for t in (student, taught))
                hard = -log_q.gather(1, label[few])[:, 0]
                p = log_p.exp()
                soft = torch.linalg.vecdot(p, log_p.sub_(log_q))
                losses.append((1 - w) * hard + w * soft)
                d = log_q.exp_().sub_(p, alpha=w)
                d.scatter_add_(1, label[few], d.new_full((1, 1), w - 1.0).expand(len(d), 1))
                gradient[few] = d
            dx[part] = gradient if weight is None else gradient @ weight
        ctx.save_for_backward(dx)
        return torch.cat(losses).sum() if losses else x.new_zeros((), dtype=precise)

    @staticmethod
    def backward(ctx, g):
        (dx,) = ctx.saved_tensors
        return (dx * g).to(dx.dtype), None, None, None, None, None
