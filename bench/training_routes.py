"""Do counted operations choose the faster route? `python -m bench.training_routes`

Times one `SVDLinear`'s forward and backward pass both ways, "factored" and "effective" (see `acip_kernels.plan`), in
turns, and puts the ratio of the medians beside the ratio of the counted operations; with dropout on the adapter, as
runs have it by default, unless told.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import statistics
import sys
import time
from typing import Annotated

import torch
import typer

from acip_kernels import SVDLinear, files, report
from acip_kernels.compress.config import compute_dtype
from acip_kernels.plan import ROUTES, training_plan

from .training_step import markdown, name_of, result_path

# [out, in] of SmolLM2-135M's layers; a square one of an 8B model's.
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048))
SHARES = (1.0, 0.75, 0.5, 0.25)
ADAPTER_RANK = 32


def seconds(layer: SVDLinear, x: torch.Tensor, g: torch.Tensor, batches: int) -> float:
    started = time.perf_counter()
    for _ in range(batches):
        layer(x).backward(g)
    layer.collect_gradients()
    elapsed = time.perf_counter() - started
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    return elapsed


def compare(
    out: int, in_: int, share: float, tokens: int, batches: int, rounds: int, dtype: torch.dtype, dropout: float
) -> dict:
    k = min(out, in_)
    rank = max(1, int(share * k) // 8 * 8)
    layers = {}
    for route in ROUTES:
        torch.manual_seed(0)
        U, S, Vh = torch.randn(out, k, dtype=dtype) / out**0.5, torch.rand(k), torch.randn(k, in_, dtype=dtype) / k**0.5
        layers[route] = layer = SVDLinear(U, S, Vh, adapter_rank=ADAPTER_RANK, adapter_dropout=dropout)
        layer.set_live(torch.arange(k) < rank)
        layer.compact(join=True)
        layer.take_route(route)
    x = torch.randn(tokens, in_, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, out, dtype=dtype)
    times = {route: [] for route in ROUTES}
    for number in range(rounds + 1):
        for route in ROUTES:
            elapsed = seconds(layers[route], x, g, batches)
            if number:  # the first round warms up
                times[route].append(elapsed)
    medians = {route: statistics.median(values) for route, values in times.items()}
    plan = training_plan(
        tokens, in_, out, rank, ADAPTER_RANK, batches=batches, dropout=dropout > 0, itemsize=dtype.itemsize
    )
    return {
        "out": out, "in": in_, "rank": rank, "tokens": tokens, "batches": batches, "milliseconds":
        {route: 1e3 * median for route, median in medians.items()}, "operations": plan.operations, "plan": plan.route,
        "faster": min(medians, key=medians.get),
        "measured_ratio": medians["effective"] / medians["factored"],
        "counted_ratio": plan.operations["effective"] / plan.operations["factored"],
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """A line a case, and how often the plan was right."""
    lines = [
        [
            f"{row['out']} × {row['in']}", str(row["rank"]), str(row["batches"]),
            *(f"{row['milliseconds'][route]:.1f}" for route in ROUTES),
            f"{row['measured_ratio']:.2f}", f"{row['counted_ratio']:.2f}", row["plan"], row["faster"],
        ]
        for row in rows
    ]  # fmt: skip
    head = [
        "out × in",
        "rank",
        "batches a step",
        *(f"{route} ms" for route in ROUTES),
        "measured ratio",
        "counted ratio",
    ]
    wrong = [row for row in rows if row["plan"] != row["faster"]]
    lost = [row["milliseconds"][row["plan"]] / row["milliseconds"][row["faster"]] - 1 for row in wrong]
    text = f"\nThe plan took the faster route in {len(rows) - len(wrong)} of {len(rows)} cases"
    text += f"; where not, it lost {100 * max(lost):.0f} % at most.\n" if lost else ".\n"
    return markdown([*head, "plan", "faster"], lines) + text


def main(
    rounds: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = 7,
    tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 1024,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    dropout: Annotated[float, typer.Option(help="On the adapters' input.")] = 0.05,
    output: Annotated[
        pathlib.Path | None, typer.Option(help="JSON file. Default: by device, in bench/results.")
    ] = None,
):
    """Both routes of a masked layer, timed beside their counted operations."""
    kind = compute_dtype(dtype, torch.device("cpu"))
    rows = []
    cases = list(itertools.product(SHAPES, SHARES, (1, 4)))
    for number, ((out, in_), share, batches) in enumerate(cases, 1):
        rows.append(compare(out, in_, share, tokens, batches, rounds, kind, dropout))
        print(f"{number} of {len(cases)}", file=sys.stderr, flush=True)
    print(table(rows))
    about = report.device_description("cpu") | {"dtype": name_of(kind), "dropout": dropout, "rows": rows}
    step_path = result_path(about["device"], kind)
    path = output or step_path.with_name(step_path.name.replace("training_step", "training_routes"))
    files.write_text(path, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
