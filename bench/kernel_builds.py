"""What the Triton kernels become on each GPU: `python -m bench.kernel_builds`, on a machine without one.

Every launch that `plan` chooses for the layers of Llama-3.1-8B and Qwen2.5-7B, on every device of its table, is
compiled ahead of time for that device's machine code, and registers, spills, shared memory and the instructions that
matter are written down. No time is measured here: there is nothing to run it on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import pathlib
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from acip_kernels import files, report
from acip_kernels.ops import aot
from acip_kernels.ops.fused_linear import op
from acip_kernels.ops.quantize import shapes
from acip_kernels.plan import DEVICES, Device

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "kernel_builds.json"

# hidden, outputs of q and of k and v, intermediate, whether q, k and v have a bias
MODELS = {"Llama-3.1-8B": (4096, 4096, 1024, 14336, False), "Qwen2.5-7B": (3584, 3584, 512, 18944, True)}
RATIOS = (0.8, 0.5, 0.25)
TOKENS = (1, 16)
KINDS = {"bfloat16": op.PLAIN, "int8": op.INT8, "int4": op.INT4_ZEROS}
FORMS = {"dense": op.DENSE, "factors": op.FACTORS, "pivoted": op.PIVOTED}
GROUP = 64
# What machine code is made for which device: what Triton compiles for sm_89 is sm_80's here.
TARGETS = {"sm_89": "sm_80"}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


def meta(shape, dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(rows: int, cols: int, kind: int) -> tuple[list[torch.Tensor], tuple[int, int, int]]:
    if kind == op.PLAIN:
        return [meta((rows, cols), torch.bfloat16)], (kind, cols, 0)
    name = "int8" if kind == op.INT8 else "int4"
    tensors = [meta(*spec) for spec in shapes(rows, cols, name, GROUP, kind == op.INT4).values()]
    return tensors, (kind, cols, 0 if kind == op.INT8 else GROUP)


def layer(form: int, out: int, in_: int, ratio: float, kind: int, bias: bool) -> tuple[list[torch.Tensor], list[int]]:
    """A layer of `ratio` of the size, its rank a multiple of 64, as `fused_linear` takes it."""
    if form == op.DENSE:
        tensors, spec = weight(out, in_, kind)
        spec = [form, 2 * bias, *spec]
    else:
        both, budget = out + in_, ratio * out * in_
        rank = budget / both if form == op.FACTORS else (both - (both * both - 4 * budget) ** 0.5) / 2
        rank = max(64, int(min(rank, min(out, in_) - 64)) // 64 * 64)
        first, of_first = weight(rank, in_, kind)
        second, of_second = weight(out if form == op.FACTORS else out - rank, rank, kind)
        tensors, spec = first + second, [form, 2 * bias, *of_first, *of_second]
        if form == op.PIVOTED:
            tensors.append(meta((out,), torch.int32))
    return tensors + ([meta((out,), torch.bfloat16)] if bias else []), spec


def problems() -> Iterator[tuple[str, torch.Tensor, list, list, int]]:
    """`(name, x, tensors, spec, mode)` of every group of layers at every size, form and number."""
    for (model, (hidden, q, kv, middle, bias)), ratio, tokens, (kind_name, kind), (
        form_name,
        form,
    ) in itertools.product(MODELS.items(), RATIOS, TOKENS, KINDS.items(), FORMS.items()):
        if form == op.DENSE and ratio != RATIOS[0]:
            continue
        groups = {
            "o": ([(hidden, q, False)], op.CONCATENATE),
            "q/k/v": ([(q, hidden, bias), (kv, hidden, bias), (kv, hidden, bias)], op.CONCATENATE),
            "MLP": ([(middle, hidden, False), (middle, hidden, False), (hidden, middle, False)], op.GATED_MLP),
        }
        for group, (members, mode) in groups.items():
            made = [layer(form, out, in_, ratio, kind, biased) for out, in_, biased in members]
            tensors = [tensor for some, _ in made for tensor in some]
            spec = [number for _, some in made for number in some]
            name = f"{model} {group} {form_name} {kind_name} {ratio:g} {tokens}"
            yield name, meta((tokens, members[0][1]), torch.bfloat16), tensors, spec, mode


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one launch is compiled from."""

    target: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int

    def build(self) -> aot.Build:
        from acip_kernels.ops.fused_linear import triton

        return aot.build(
            getattr(triton, self.kernel),
            dict(self.signature),
            dict(self.constants),
            self.target,
            self.warps,
            1,
            **({"maxnreg": triton.MOST_REGISTERS} if self.target.startswith("sm_") else {}),
        )

    def row(self) -> dict:
        """What tells it from others, for JSON."""
        constants = {name: str(value) for name, value in self.constants}
        return {
            "target": self.target,
            "kernel": self.kernel,
            "warps": self.warps,
            "constants": " ".join(f"{name}={value}" for name, value in sorted(constants.items())),
            "arguments": " ".join(kind for _, kind in self.signature),
        }


def measured(launch: Launch) -> dict:
    """What `launch` becomes, in numbers."""
    build = launch.build()
    return {
        name: getattr(build, name) for name in ("registers", "spills", "shared", "matrix", "loads_128", "instructions")
    }


def type_of(argument) -> str:
    """As Triton would specialize it: pointers are taken to be aligned, as torch's allocators make them."""
    if isinstance(argument, torch.Tensor):
        return f"{_POINTERS[argument.dtype]}:16"
    return "i32:1" if argument == 1 else "i32:16" if argument % 16 == 0 else "i32"


def launches(device: Device, x, tensors, spec, mode) -> list[Launch]:
    """What `fused_linear` would launch on `device`."""
    from acip_kernels.ops.fused_linear import triton

    seen = []

    def record(kernel, grid, *arguments, num_warps, num_stages=1, launch_pdl=False, **constants):
        names = [name for name in kernel.arg_names if name not in constants]
        signature = tuple((name, type_of(value)) for name, value in zip(names, arguments, strict=True))
        target = TARGETS.get(device.target, device.target)
        seen.append(Launch(target, kernel.__name__, signature, tuple(constants.items()), num_warps))

    original, triton.launch = triton.launch, record
    try:
        triton.forward(x, tensors, spec, mode, device=device)
    finally:
        triton.launch = original
    return seen


def every_launch() -> dict[Launch, list[str]]:
    """Each different launch, with the problems that need it."""
    found: dict[Launch, list[str]] = {}
    for name, *problem in problems():
        for device in DEVICES.values():
            for launch in launches(device, *problem):
                found.setdefault(launch, []).append(f"{device.name}: {name}")
    return found


def table(rows: list[dict]) -> str:
    """Markdown: for each kernel and machine code the largest and the smallest of what its builds take."""
    lines = [
        "| kernel | machine code | builds | registers | spilled bytes | shared KiB | tensor cores | 128-bit loads |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def span(values) -> str:
        low, high = min(values), max(values)
        return f"{low:g}" if low == high else f"{low:g}–{high:g}"

    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        tokens = "2–16 tokens" if "DOT=True" in row["constants"] else "one token" if "DOT" in row["constants"] else ""
        groups.setdefault((row["kernel"].removesuffix("_kernel"), tokens, row["target"]), []).append(row)
    for (kernel, tokens, target), some in sorted(groups.items()):
        cells = [
            span([row["registers"] for row in some]),
            span([row["spills"] for row in some]),
            span([round(row["shared"] / 1024, 1) for row in some]),
            f"{sum(row['matrix'] > 0 for row in some)} of {len(some)}",
            f"{sum(row['loads_128'] > 0 for row in some)} of {len(some)}",
        ]
        name = f"{kernel}, {tokens}" if tokens else kernel
        lines.append(f"| {name} | {target} | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(store: Annotated[bool, typer.Option(help="Write the result under bench/results.")] = True):
    """Compile every kernel for every configuration that `plan` chooses on its devices; a second each."""
    from rich.progress import track

    rows, found = [], every_launch()
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        builds = pool.map(measured, found)
        for (launch, needed), numbers in track(zip(found.items(), builds), "compiling", total=len(found)):
            rows.append(launch.row() | numbers | {"problems": len(needed)})
    import triton as compiler

    about = report.device_description()  # of the machine that compiled; the code is of others
    result = {"triton": compiler.__version__, "torch": about["torch"], "date": about["date"], "rows": rows}
    if store:
        files.write_json(RESULTS, result)
    typer.echo(table(rows))


if __name__ == "__main__":
    typer.run(main)
