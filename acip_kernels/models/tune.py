"""`tune(model)`: measure, for the layers of a model on a GPU, which of our kernels are best, and where they pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..nn import fused
from ..ops.fused_linear import measured
from ..ops.fused_linear import tune as kernels
from ..ops.fused_linear.op import DTYPES
from ..ops.timing import CACHES
from ..plan import Table, device_of
from .fuse import fuse, fused_calls

TOKENS = (1, 16)


@torch.no_grad()
def cases(model: nn.Module, tokens: Iterable[int] = TOKENS) -> list[kernels.Case]:
    """Every different problem of `model`, which `fuse` has changed, at these numbers of tokens.

    A case has the tensors of all layers that are the same problem, and the name of the first. Raises `ValueError` for
    numbers of tokens, or a dtype of the model, that the kernels do not take.
    """
    counts = sorted(set(tokens))
    if not counts or counts[0] < 1 or counts[-1] > kernels.triton.MOST_TOKENS:
        raise ValueError(
            f"tokens: the kernels are for 1 to {kernels.triton.MOST_TOKENS} of them, got {', '.join(map(str, counts))}"
        )
    if model.dtype not in DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ValueError(f"the kernels take {names}, and the model is {model.dtype}")
    found: dict[tuple, kernels.Case] = {}
    for name, layer, mode in fused_calls(model):
        spec = tuple(layer.spec())
        device = next(model.parameters()).device
        x = torch.randn(counts[-1], spec[3], device=device).to(model.dtype)
        tensors = fused.gpu_tensors(layer, x)
        if tensors is None:
            continue
        for count in counts:
            case = kernels.Case(name, x[:count], [tensors], spec, mode)
            known = found.setdefault(case.problem, case)
            if known is not case:
                known.copies.append(tensors)
    return list(found.values())


def tune(
    model: nn.Module,
    tokens: Iterable[int] = TOKENS,
    *,
    candidates: int = kernels.CANDIDATES,
    again: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """Measure the layers of a deployed `model` on its GPU, and keep what is found for every model on this GPU.

    Fuses the model (see `acip_kernels.fuse`). For each different problem of it, the config of every launch is chosen
    among `candidates` (see `ops.fused_linear.tune`), and the result, or the CUDA C++ kernels where they are built and
    faster, is timed against torch's products. Every problem is
    written to the GPU's table as soon as it is measured; what the table holds already is measured again only with
    `again`, so that an interrupted run goes on.

    Args:
        tokens: numbers of tokens to measure, 1 to 16. What is measured at 16 stands for 2 to 16.
        candidates: configs that are tried for each launch.
        progress: called with the problems that are done and all of them.

    Returns:
        A row for each problem: `name` of its first layer, `layers` that are such a problem, `tokens`, and seconds of
        one call: `predicted` (Triton's kernels with the configs that `plan` predicts to be fastest; None if it was
        known before), `kernels` (the faster ones: "Triton", or how the CUDA C++ ones are launched),
        `graph` and `graph_torch` (these with the measured configs, and torch's products, as CUDA graphs), `eager` and
        `eager_torch` (called from Python).

    Raises:
        ValueError: a model that is not on a GPU, or that has no layers of this package; tokens out of range.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"tune measures a GPU, and the model is on {device}")
    with torch.cuda.device(device):
        return _tune(model, device, tokens, candidates, again, progress)


def _tune(model, device, tokens, candidates, again, progress, measure=None, bytes_read=None) -> list[dict]:
    found = cases(fuse(model), tokens)
    if not found:
        raise ValueError("the model has no layers that the kernels take: tune a materialized model")
    try:
        held = measured.load(device)
    except ValueError:  # what cannot be used is replaced
        held = None
    known = device_of(device)
    empty = Table(known, str(measured.path_of(measured.identity(device))), {}, {})
    held = held or empty
    todo = [case for case in found if again or case.problem not in held.times]
    configs, times, cuda = dict(held.configs), dict(held.times), dict(held.cuda)
    rows, done = {}, len(found) - len(todo)
    progress(done, len(found))
    if bytes_read is None:
        bytes_read = CACHES * torch.cuda.get_device_properties(device).L2_cache_size
    for tuned in kernels.tune(
        todo,
        measure or kernels.timing(device),
        known,
        candidates=candidates,
        known={} if again else held.configs,
        bytes_read=bytes_read,
    ):
        configs |= tuned.configs
        times[tuned.case.problem] = tuned.times
        cuda.pop(tuned.case.problem, None)
        if tuned.cuda is not None:
            cuda[tuned.case.problem] = tuned.cuda
        measured.store(device, dataclasses.replace(empty, configs=dict(configs), times=dict(times), cuda=dict(cuda)))
        rows[tuned.case.problem] = tuned.predicted
        done += 1
        progress(done, len(found))
    return [
        {
            "name": case.name,
            "layers": len(case.copies),
            "tokens": len(case.x),
            "predicted": rows.get(case.problem),
            "kernels": f"CUDA, {cuda[case.problem].launch}" if case.problem in cuda else "Triton",
            **times[case.problem]._asdict(),
        }
        for case in found
    ]


def rich_table(rows: list[dict]):
    """Rows of `tune` for a terminal: microseconds of one call in a CUDA graph, and how many times torch's products."""
    from rich.table import Table as RichTable

    table = RichTable(
        caption="µs of a call in a CUDA graph, by Triton's or the CUDA C++ kernels; times torch's products"
    )
    for head in ("first layer", "layers", "tokens", "predicted", "measured", "× graph", "× Python"):
        table.add_column(head, justify="left" if head == "first layer" else "right", no_wrap=head != "first layer")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["layers"]),
            str(row["tokens"]),
            "known" if row["predicted"] is None else f"{row['predicted'] * 1e6:.1f}",
            f"{row['graph'] * 1e6:.1f}" + (" CUDA" if row["kernels"] != "Triton" else ""),
            *(_ratio(row[f"{way}_torch"] / row[way]) for way in ("graph", "eager")),
        )
    return table


def _ratio(speed: float) -> str:
    """Of our speed to torch's; what is not taken is dimmed."""
    return f"{speed:.2f}" if speed > 1 else f"[dim]{speed:.2f}[/]"
