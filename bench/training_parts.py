"""The measurements behind single choices of the training step: `python -m bench.training_parts`

Each line is one choice: what was taken, and what was not, timed in turns on a CPU. The comments in the code that speak
of a measurement mean these.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from acip_kernels import SVDLinear, files, report
from acip_kernels.ops import common, dropout, extension, linear_cross_entropy
from acip_kernels.ops.causal_attention.op import causal_attention

from .training_step import markdown, result_path

TOKENS, WIDTH, WIDER, CLASSES = 1024, 576, 1536, 49152  # SmolLM2-135M's
BLOCK = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # [out, in]


def in_turns(functions: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if number:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def four_products(rank: int) -> Callable:
    x, g = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDER)
    Vh, U = torch.randn(rank, WIDTH), torch.randn(WIDER, rank)

    def run():
        (x @ Vh.t()) @ U.t()
        (g @ U) @ Vh

    return run


def loss(chunk: int | None) -> Callable:
    weight, labels = torch.randn(CLASSES, WIDTH) / WIDTH**0.5, torch.randint(CLASSES, (TOKENS,))
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)

    def run():
        if chunk is None:
            F.cross_entropy(F.linear(x, weight), labels, reduction="sum").backward()
        else:
            linear_cross_entropy(x, weight, labels, chunk_tokens=chunk).backward()

    return run


def at_new_ranks(new: bool) -> Callable:
    """A product in bfloat16 at a rank that no product had before, or at one that had one."""
    x, ranks = torch.randn(TOKENS, WIDTH).bfloat16(), iter(range(8, WIDTH))

    def run():
        x @ torch.empty(next(ranks) if new else 7, WIDTH, dtype=torch.bfloat16).t()

    run()
    return run


def attention(function: Callable, dtype: torch.dtype) -> Callable:
    """Forward and backward pass of one of SmolLM2-135M's attentions, 2 × 512 tokens."""
    q, k, v = (torch.randn(2, 512, heads, 64, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (9, 3, 3))
    g = torch.randn(2, 9, 512, 64, dtype=dtype)
    return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), g)


def torchs_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attentions(dtype: torch.dtype) -> dict[str, Callable]:
    ours = {
        f"ours, {block} queries at a time": attention(
            lambda q, k, v, b=block: causal_attention(q, k, v, block=b), dtype
        )
        for block in (128, 64, 256, 512)
    }
    return ours | {"torch's": attention(torchs_attention, dtype)}


def compaction() -> Callable:
    layers = []
    for out, in_ in BLOCK:
        k = min(out, in_)
        layer = SVDLinear(torch.randn(out, k), torch.rand(k), torch.randn(k, in_), adapter_rank=32)
        layers.append((layer, torch.arange(k) < 0.9 * k))

    def run():
        for layer, keep in layers:
            layer.compact(keep, join=True)

    return run


def step_of_block() -> Callable:
    """Forward and backward of a block's seven layers, at the ranks that the compaction leaves."""
    layers = []
    for out, in_ in BLOCK:
        k = min(out, in_)
        layer = SVDLinear(torch.randn(out, k), torch.rand(k), torch.randn(k, in_), adapter_rank=32)
        layer.compact(torch.arange(k) < 0.9 * k, join=True)
        layers.append((layer, torch.randn(TOKENS, in_, requires_grad=True), torch.randn(TOKENS, out)))

    def run():
        for layer, x, g in layers:
            layer(x).backward(g)

    return run


def measure(rounds: int) -> list[dict]:
    """One dict a choice: `choice`, `taken` (a name of `milliseconds`), `milliseconds` by name."""
    x, seed = torch.randn(TOKENS, WIDER), torch.tensor([7])
    a, b = torch.randn(TOKENS, WIDTH).bfloat16(), torch.randn(WIDTH, WIDTH).bfloat16()
    z, h, s = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH), torch.rand(WIDTH)

    def in_torch():
        sums = (z * h).sum(0)
        return sums, h * s

    choices = [
        ("dropout of 1024 × 1536", "from a seed", {
            "from a seed": lambda: dropout.drop(x, 0.05, seed), "torch's": lambda: F.dropout(x, 0.05)}),
        ("four products, 576 → rank → 1536", "rank 304", {
            f"rank {rank}": four_products(rank) for rank in (304, 301, 302, 303, 305)}),
        ("head and loss, forward and backward, 49152 classes", "512 tokens a chunk", {
            **{f"{chunk} tokens a chunk": loss(chunk) for chunk in (512, 256, 85)},
            "torch's, all at once": loss(None)}),
        ("compacting a block, against its forward and backward pass", "compaction", {
            "compaction": compaction(), "both passes": step_of_block()}),
        ("bfloat16 product 1024 × 576 × 576", "ours", {
            "ours": lambda: common.product(a, b), "torch's": lambda: a @ b}),
    ]  # fmt: skip
    if common.multiplies_natively(torch.bfloat16):
        choices.append(("a bfloat16 product of 1024 × 576 at a small rank", "seen before", {
            "seen before": at_new_ranks(False), "new": at_new_ranks(True)}))  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        if common.multiplies_natively(dtype):
            name = f"attention of 2 × 512 tokens, 9 heads, {str(dtype).removeprefix('torch.')}"
            choices.append((name, f"ours, {128 if dtype.itemsize == 2 else 64} queries at a time", attentions(dtype)))
    if extension.available():
        choices.append(("mask gradient and h ⊙ s, 1024 × 576", "native", {
            "native": lambda: torch.ops.acip.mask_gradient_(z, h, s), "torch's": in_torch}))  # fmt: skip
    return [
        {"choice": name, "taken": taken, "milliseconds": in_turns(functions, rounds)}
        for name, taken, functions in choices
    ]


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        best = row["milliseconds"][row["taken"]]
        for name, taken in row["milliseconds"].items():
            lines.append([row["choice"], name, f"{taken:,.2f}", f"{taken / best:.2f}"])
    return markdown(["choice", "", "ms", "to the first"], lines, left=2)


def main(rounds: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = 7):
    """Time what the training step's single choices are between."""
    rows = measure(rounds)
    print(table(rows))
    about = report.device_description("cpu")
    step_path = result_path(about["device"], torch.float32)
    path = step_path.with_name(step_path.name.replace("training_step", "training_parts"))
    files.write_text(path, json.dumps({"device": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
