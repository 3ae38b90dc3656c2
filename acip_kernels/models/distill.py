"""The loss that a dense model teaches a smaller one with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import extension
from .loss import IGNORE, CausalLoss

# Logits made at a time, the teacher's and as many of the student, which its gradient takes the place of.
_CHUNK_ELEMENTS = 2**25
# Of those, what torch turns into probabilities at a time on a CPU: a few passes over what its caches hold.
_ROW_ELEMENTS = 2**18


class DistillationLoss:
    """`(1 - w) · cross-entropy + w · KL(teacher ‖ student)`, the mean over the labelled tokens, with a graph.

    The student is `model`; so is the teacher, unless another one is given. Where both are a base model and a frozen
    linear head, logits are made and turned into gradients a block at a time (see `soft_cross_entropy`); otherwise all
    at once.

    Args:
        teaching: a context manager, within which the teacher computes what it teaches: `model` with its dense weights.
        weight: `w`, in [0, 1]; 0 is the model's ordinary loss, and nothing is taught.
        teacher: another model of the same tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        teaching: Callable = contextlib.nullcontext,
        weight: float = 0.0,
        teacher: nn.Module | None = None,
    ):
        self.model, self.teaching, self.weight, self.teacher = model, teaching, weight, teacher or model
        self.plain = CausalLoss(model)
        self.of_teacher = self.plain if teacher is None else CausalLoss(teacher)

    def __call__(self, inputs: dict, counted: Tensor | None = None) -> Tensor:
        """counted: `counted_tokens` of the labels, for who knows them: to find them out waits for a GPU."""
        if self.weight == 0:
            return self.plain(inputs)
        others = {key: value for key, value in inputs.items() if key != "labels"}
        counted = counted_tokens(inputs["labels"]) if counted is None else counted
        labels = next_tokens(inputs["labels"])
        lean = self.plain.is_lean(inputs) and self.of_teacher.is_lean(inputs)
        of = _hidden if lean else _logits
        with torch.no_grad(), self.teaching():
            taught = of(self.teacher, others)[counted]
        learnt = of(self.model, others)[counted]
        weight, bias = _head(self.model) if lean else (None, None)
        teachers = _head(self.teacher) if lean and self.teacher is not self.model else None
        total = soft_cross_entropy(learnt, taught, labels[counted], weight, bias, self.weight, teachers)
        return total / len(counted)


def _hidden(model: nn.Module, inputs: dict) -> Tensor:
    return model.base_model(**inputs, use_cache=False)[0].flatten(0, 1)


def _logits(model: nn.Module, inputs: dict) -> Tensor:
    return model(**inputs).logits.flatten(0, 1)


def _head(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    return head.weight, head.bias


def next_tokens(labels: Tensor) -> Tensor:
    """The label of every position, `[tokens]`: the next token of `labels [batch, length]`; none of the last one."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE)[..., 1:].reshape(-1)


def counted_tokens(labels: Tensor) -> Tensor:
    """Which positions have a label, their numbers among all tokens."""
    return (next_tokens(labels) != IGNORE).nonzero()[:, 0]


def soft_cross_entropy(
    x: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    w: float,
    teachers_head: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """`Σ_tokens (1 - w) · -log q[label] + w · Σ_classes p log(p / q)`, `q` and `p` the softmax of either's logits.

    Args:
        x, teacher: `[tokens, in]`, of which `weight [classes, in]` and `bias` make logits; `[tokens, classes]` where
            `weight` is None. labels: int64 `[tokens]`.

    Returns:
        A float32 scalar (float64 for float64 `x`), with a gradient for `x` alone: of the logits it is
        `q - (1 - w) onehot(label) - w p`.
    """
    classes = x.shape[1] if weight is None else len(weight)
    taught = teacher.shape[1] if weight is None else classes if teachers_head is None else len(teachers_head[0])
    if taught != classes:
        raise ValueError(f"the teacher has a vocabulary of {taught} tokens, and the model that it teaches {classes}")
    return _SoftCrossEntropy.apply(x, teacher, labels, weight, bias, w, teachers_head)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, teacher, labels, weight, bias, w, teachers_head):
        precise = torch.promote_types(x.dtype, torch.float32)
        classes = x.shape[1] if weight is None else weight.shape[0]
        # As few chunks as there have to be, all about as long: each reads all of the weight.
        chunks = -(-len(x) // max(32, _CHUNK_ELEMENTS // classes))
        chunk = -(-len(x) // max(1, chunks))
        dx, losses = torch.empty_like(x), []

        def logits(states, head):
            return states if weight is None else nn.functional.linear(states, *head)

        own = weight, bias

        for start in range(0, len(x), max(1, chunk)):
            part = slice(start, start + chunk)
            student, taught = logits(x[part], own), logits(teacher[part], teachers_head or own)
            # The gradient takes the place of the student's logits, but for the caller's own, where there is no head.
            student = student.clone(memory_format=torch.contiguous_format) if weight is None else student
            losses.append(_soft_cross_entropy_(student, taught.to(student.dtype), labels[part], w))
            dx[part] = student if weight is None else student @ weight
        ctx.save_for_backward(dx)
        return torch.cat(losses).sum() if losses else x.new_zeros((), dtype=precise)

    @staticmethod
    def backward(ctx, g):
        (dx,) = ctx.saved_tensors
        return (dx * g).to(dx.dtype), *[None] * 6


def _soft_cross_entropy_(logits: Tensor, teacher: Tensor, labels: Tensor, w: float) -> Tensor:
    """The loss of every row, float32 or better; `logits [tokens, classes]` become their gradient."""
    if extension.takes(logits):
        return torch.ops.acip.soft_cross_entropy_(logits, teacher.contiguous(), labels.contiguous(), w)
    precise = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, _ROW_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    losses = [logits.new_empty(0, dtype=precise)]
    for few, taught, label in zip(logits.split(rows), teacher.split(rows), labels[:, None].split(rows), strict=True):
        log_q, log_p = (t.to(precise).log_softmax(1) for t in (few, taught))
        hard = -log_q.gather(1, label)[:, 0]
        p = log_p.exp()
        soft = torch.linalg.vecdot(p, log_p.sub_(log_q))
        losses.append((1 - w) * hard + w * soft)
        d = log_q.exp_().sub_(p, alpha=w)
        few.copy_(d.scatter_add_(1, label, d.new_full((1, 1), w - 1.0).expand(len(d), 1)))
    return torch.cat(losses)
