"""Scores without a run: what every singular value is worth to the loss, and what it costs to store."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..models.loss import CausalLoss
from .factorize import svd_layers
from .processes import Processes
from .sizing import Sizing
from .step import with_labels


def gradient_importance(
    model: nn.Module,
    batches: Iterable[dict],
    progress: Callable[[int, int], None] | None = None,
    total: int | None = None,
    processes: Processes | None = None,
) -> dict[str, Tensor]:
    """`{layer: [k]}`: the mean over sequences of the squared masked singular-value gradient, `(S_i Σ_tokens z_i h_i)²`.

    That is the diagonal of the empirical Fisher matrix for the switches `β` (ACIP.md section 1), with the summed
    next-token loss of a sequence: half of it is what the loss of a sequence rises by when entry `i` alone is
    pruned, to second order. For a model with `SVDLinear` layers, of which nothing is pruned.
    """
    layers = svd_layers(model)
    wanted = {id(layer.mask) for layer in layers.values()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    model.eval()
    loss_of = CausalLoss(model)
    processes = processes or Processes(torch.device("cpu"))
    device = next(iter(layers.values())).mask.device
    sizes = [layer.full_rank for layer in layers.values()]
    total_sum = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    sequences = done = 0
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        for batch, some in processes.rounds(batches):
            batch = with_labels(batch, device)
            own = torch.zeros_like(total_sum)
            for row in range(len(batch["input_ids"])):
                one = {key: value[row : row + 1] for key, value in batch.items()}
                tokens = int((one["labels"][:, 1:] >= 0).sum())
                (loss_of(one) * tokens).backward()
                for part, layer in zip(own.split(sizes), layers.values(), strict=True):
                    # The mask's gradient is 1/c times that of β.
                    part += (layer.mask.grad.double() * layer.mask_scale) ** 2
                    layer.mask.grad = None
            # In the order of the batches, so that any number of processes gives the same bits.
            for of_a_batch in processes.all_tensors(own)[: len(some)]:
                total_sum += of_a_batch
            sequences += sum(len(each["input_ids"]) for each in some)
            done += len(some)
            if progress is not None:
                progress(done, total or done)
    finally:
        model.train(training)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
    if not sequences:
        raise ValueError("batches are empty: the importance is a mean over sequences")
    return dict(zip(layers, (total_sum / sequences).split(sizes), strict=True))


def scores_by_worth(importance: dict[str, Tensor], sizing: Sizing) -> dict[str, Tensor]:
    """Scores that rank every singular value by importance per number stored, float32, positive.

    Within a layer the least important entry goes first, and what it saves depends on how many are left: in pivoted form
    an entry of rank ρ saves `out + in - 2ρ + 1` numbers. A score is importance over that; where a later entry of
    a layer is worth less than one that has to go before it, both get their common worth (the slope of the convex hull,
    by pooling adjacent violators), so that the order within a layer stays that of the importance. Cutting by these
    scores loses the least sum of importance for the numbers saved, up to one entry.
    """
    scores = {}
    for number, name in enumerate(sizing.names):
        values = importance[name].double().cpu()
        order = values.sort(descending=True, stable=True).indices
        k = len(values)
        layers = torch.full((k,), number)
        ranks = torch.arange(1, k + 1)
        saved = (sizing.parameters(ranks, layers) - sizing.parameters(ranks - 1, layers)).double()
        slopes = _pooled(values[order].tolist(), saved.tolist())
        scores[name] = torch.empty(k, dtype=torch.float32)
        scores[name][order] = torch.tensor(slopes, dtype=torch.float64).float()
    # Relative to the largest, so that they are numbers of a usual size; strictly positive, as nothing is pruned yet.
    largest = max(float(score.max()) for score in scores.values()) or 1.0
    return {name: (score / largest).clamp_min(torch.finfo(torch.float32).tiny) for name, score in scores.items()}


def _pooled(gains: list[float], costs: list[float]) -> list[float]:
    """The slopes `gain / cost`, made to fall from each entry to the next by pooling neighbours."""
    blocks: list[list[float]] = []  # gain, cost, entries
    for gain, cost in zip(gains, costs, strict=True):
        blocks.append([gain, cost, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] <= blocks[-1][0] * blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    slopes = []
    for gain, cost, entries in blocks:
        slopes += [gain / cost if cost > 0 else gain] * int(entries)
    return slopes
