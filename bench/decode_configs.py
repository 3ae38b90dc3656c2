"""How long the Triton kernels' launches take by their configs: `python -m bench.decode_configs`, on a GPU.

What `plan.decode_seconds` is fitted to. Of each launch of Llama-3.1-8B's layers at half their size, for one token, up
to `--configs` legal configs are timed, drawn at random from those that read their columns in few tiles; the other
launch of the layer stays as `plan` has it. Times are of the whole layer, as CUDA graphs whose weights come from memory.
Kernels are compiled by several processes first, which is what takes the time. The table says how much slower than the
fastest measured config the one is that the model takes to be fastest.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import random
import statistics
from typing import Annotated

import torch
import typer

from acip_kernels import files, report
from acip_kernels.ops.fused_linear import op, tune
from acip_kernels.ops.timing import CACHES, Timer
from acip_kernels.plan import (
    DEVICES,
    DecodeConfig,
    Device,
    Launch,
    decode_candidates,
    decode_seconds,
    device_of,
)

from .kernel_builds import MODELS
from .kernels_gpu import deployed
from .training_step import ROOT, markdown

HIDDEN, _, KV, MIDDLE, _ = MODELS["Llama-3.1-8B"]
GROUPS = {
    "o": (((HIDDEN, HIDDEN),), op.CONCATENATE),
    "q/k/v": (((HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN)), op.CONCATENATE),
    "gate/up": (((MIDDLE, HIDDEN), (MIDDLE, HIDDEN)), op.SWIGLU),
    "down": (((HIDDEN, MIDDLE),), op.CONCATENATE),
}
CASES = [
    *((group, "factors") for group in ("o", "gate/up", "down", "q/k/v")),
    *((group, "int4") for group in ("o", "gate/up", "down")),
    *((group, "int8") for group in ("o", "gate/up")),
]
MOST_TILES = 4  # of the columns, one after the other
RESULTS = ROOT / "bench" / "results"


def case_of(group: str, form: str, device: torch.device) -> tune.Case:
    members, mode = GROUPS[group]
    made = [deployed(out, in_, 0.5, form, device, torch.bfloat16) for out, in_ in members]
    x = torch.randn(1, members[0][1], device=device).bfloat16()
    tensors = [tensor for some, _ in made for tensor in some]
    return tune.Case(f"{group} {form}", x, [tensors], tuple(n for _, spec in made for n in spec), mode)


def tried(launch: Launch, device: Device, count: int) -> list[DecodeConfig]:
    """Up to `count` legal configs, the same at every call."""
    cols = min(cols for _, cols, _, _ in launch.weights)
    found = [
        config
        for config in decode_candidates(device, launch)
        if config.k >= 256 and config.k < 2 * cols and -(-cols // (config.splits * config.k)) <= MOST_TILES
    ]
    random.Random(0).shuffle(found)
    return found[:count]


def jobs(case: tune.Case, device: Device, count: int) -> list[tuple[Launch, DecodeConfig]]:
    return [(launch, config) for launch in tune.launches(case, device) for config in tried(launch, device, count)]


def calls(case: tune.Case, device: Device, launch: Launch, config: DecodeConfig):
    """Those of every copy, with `config` for `launch` and the planned ones for the others."""
    planned = {one: decode_candidates(device, one)[0] for one in tune.launches(case, device)}
    return case.calls((planned | {launch: config}).__getitem__)


def compile_some(part: int, parts: int, count: int) -> None:
    """Every `parts`-th config, once, in a process of its own: Triton keeps what it has compiled on disk."""
    where = torch.device("cuda", 0)
    device = device_of(where)
    for group, form in CASES:
        case = case_of(group, form, where)
        for launch, config in jobs(case, device, count)[part::parts]:
            calls(case, device, launch, config)[0]()
    torch.cuda.synchronize()


def table(rows: list[dict], device: Device) -> str:
    """Markdown: of each launch the fastest config measured, and the one of them that the model picks."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["case"], str(row["launch"])), []).append(row)
    lines = []
    for (name, _), some in groups.items():
        launch = launch_of(some[0])
        best = min(some, key=lambda row: row["seconds"])
        picked = min(some, key=lambda row: predicted(row, launch, device))
        config = picked["config"]
        lines.append(
            [
                name,
                "first factors" if launch.split else "SwiGLU" if launch.together else "second factors",
                str(len(some)),
                f"{best['seconds'] * 1e6:.1f}",
                f"{picked['seconds'] * 1e6:.1f}",
                f"{picked['seconds'] / best['seconds']:.2f}",
                f"{config['rows']} × {config['k']}, {config['splits']} splits, {config['warps']} warps",
            ]
        )
    head = ["layers", "launch", "configs", "fastest µs", "picked µs", "over the fastest", "picked"]
    return markdown(head, lines, left=2)


def launch_of(row: dict) -> Launch:
    tokens, weights, *rest = row["launch"]
    return Launch(tokens, tuple(tuple(weight) for weight in weights), *rest)


def predicted(row: dict, launch: Launch, device: Device) -> float:
    tokens, weights, split, together, itemsize = launch
    return decode_seconds(DecodeConfig(**row["config"]), device, tokens, weights, itemsize, together, split)


def known(name: str) -> Device:
    """The entry of `plan.DEVICES` for a GPU of this name."""
    return next(device for key, device in DEVICES.items() if key in name)


def main(
    configs: Annotated[int, typer.Option(min=1, help="Configs of each launch.")] = 36,
    rounds: Annotated[int, typer.Option(min=1, help="Replays of each; medians are kept.")] = 8,
    store: Annotated[bool, typer.Option(help="Write the result under bench/results.")] = True,
):
    """Time of launches by their configs, on this GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU: this benchmark measures one and nothing else")
    where = torch.device("cuda", 0)
    device, timer, rows = device_of(where), Timer(where, eager=False), []
    parts = max(1, min(12, os.cpu_count() or 1))
    with concurrent.futures.ProcessPoolExecutor(parts, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_some, range(parts), [parts] * parts, [configs] * parts))
    size = CACHES * torch.cuda.get_device_properties(where).L2_cache_size
    for group, form in CASES:
        case = case_of(group, form, where)
        case = dataclasses.replace(case, copies=tune.copied(case.copies, size))
        for launch, config in jobs(case, device, configs):
            run = timer.prepare(calls(case, device, launch, config))
            times = [timer.seconds(run) / len(case.copies) for _ in range(rounds + 1)][1:]
            config_ = dataclasses.asdict(config)
            rows.append(
                {"case": case.name, "launch": list(launch), "config": config_, "seconds": statistics.median(times)}
            )
    about = report.device_description(where)
    typer.echo(table(rows, device))
    if store:
        write(result_path(about["device"]), about, rows)


def result_path(name: str) -> pathlib.Path:
    return RESULTS / f"decode_configs-{'-'.join(name.lower().split())}.json"


def write(path: pathlib.Path, about: dict, rows: list[dict]) -> None:
    files.write_json(path, {"device": about, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
