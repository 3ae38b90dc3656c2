"""What the Triton kernels become on each GPU: `python -m bench.kernel_builds`, on a machine without one.

Every launch that `plan` chooses for what `bench.kernels_gpu` measures, on every device of its table, is compiled ahead
of time for that device's machine code, and registers, spills, shared memory and the instructions that matter are
written down: the layers of Llama-3.1-8B and Qwen2.5-7B, alone and in their groups, and their training steps; at three
sizes, 1 to 4096 tokens, in every form and format. No time is measured here: there is nothing to run it on. What is
stored of the same kernels by the same Triton is not compiled again, so that an interrupted run goes on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import pathlib
import re
import time
from collections.abc import Callable, Iterator
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
FEW, MANY = (1, 4, 16), (64, 512, 4096)
RANK_MULTIPLE = 64
# What weights are, and what is multiplied with them.
KINDS = {
    "bfloat16": (op.PLAIN, torch.bfloat16),
    "float32": (op.PLAIN, torch.float32),
    "int8": (op.INT8, torch.bfloat16),
    "int4": (op.INT4_ZEROS, torch.bfloat16),
    "fp8": (op.FP8, torch.bfloat16),
}
FORMS = {"dense": op.DENSE, "factors": op.FACTORS, "pivoted": op.PIVOTED}
GROUP = 64
# What machine code is made for which device: what Triton compiles for sm_89 is sm_80's, but for fp8's instructions.
TARGETS = {"sm_89": "sm_80"}
_POINTERS = {
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
}


def meta(shape, dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(
    rows: int, cols: int, kind: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[torch.Tensor], tuple[int, int, int]]:
    if kind == op.PLAIN:
        return [meta((rows, cols), dtype)], (kind, cols, 0)
    name = {op.INT8: "int8", op.FP8: "fp8"}.get(kind, "int4")
    tensors = [meta(*spec) for spec in shapes(rows, cols, name, GROUP, kind == op.INT4).values()]
    return tensors, (kind, cols, GROUP if name == "int4" else 0)


def rank_at(ratio: float, out: int, in_: int, pivoted: bool) -> int:
    """The largest rank, a multiple of 64 where there are that many, of no more than `ratio` of the weights."""
    sides, budget = out + in_, ratio * out * in_
    rank = (sides - math.sqrt(max(0.0, sides * sides - 4 * budget))) / 2 if pivoted else budget / sides
    rank = min(int(rank), min(out, in_))
    return rank // RANK_MULTIPLE * RANK_MULTIPLE or max(1, rank)


def layer(
    form: int, out: int, in_: int, ratio: float, kind: int, dtype: torch.dtype, bias: bool
) -> tuple[list[torch.Tensor], list[int]]:
    """A layer of `ratio` of the size as `fused_linear` takes it."""
    if form == op.DENSE:
        tensors, spec = weight(out, in_, kind, dtype)
        spec = [form, 2 * bias, *spec]
    else:
        rank = rank_at(ratio, out, in_, form == op.PIVOTED)
        first, of_first = weight(rank, in_, kind, dtype)
        second, of_second = weight(out if form == op.FACTORS else out - rank, rank, kind, dtype)
        tensors, spec = first + second, [form, 2 * bias, *of_first, *of_second]
        if form == op.PIVOTED:
            tensors.append(meta((out,), torch.int32))
    return tensors + ([meta((out,), dtype)] if bias else []), spec


def problems() -> Iterator[tuple[str, Callable[[Device], object]]]:
    """`(name, what launches it for a device)` of every group of layers at every size, form and number."""
    yield from deployed()
    yield from training()


def deployed() -> Iterator[tuple[str, Callable[[Device], object]]]:
    """Forward passes; of many tokens, all that our kernels can do, as `plan` would have them where they pay."""
    from acip_kernels.ops.fused_linear import prefill, triton

    every = itertools.product(MODELS.items(), FORMS.items(), KINDS.items(), RATIOS)
    for (model, (hidden, q, kv, middle, bias)), (form_name, form), (kind_name, (kind, dtype)), ratio in every:
        if form == op.DENSE and ratio != RATIOS[0]:
            continue
        siblings = [(q, hidden, bias), (kv, hidden, bias), (kv, hidden, bias)]
        mlp = [(middle, hidden, False), (middle, hidden, False), (hidden, middle, False)]
        groups = {
            "q/k/v": (siblings, op.CONCATENATE),
            "q": (siblings[:1], op.CONCATENATE),
            "k": (siblings[1:2], op.CONCATENATE),
            "o": ([(hidden, q, False)], op.CONCATENATE),
            "gate/up": (mlp[:2], op.SWIGLU),
            "MLP": (mlp, op.GATED_MLP),
            "down": (mlp[2:], op.CONCATENATE),
        }
        for group, (members, mode) in groups.items():
            made = [layer(form, out, in_, ratio, kind, dtype, biased) for out, in_, biased in members]
            tensors = [tensor for some, _ in made for tensor in some]
            spec = [number for _, some in made for number in some]
            for tokens in FEW + MANY:
                x = meta((tokens, members[0][1]), dtype)

                def call(device, x=x, tensors=tensors, spec=spec, mode=mode):
                    if len(x) <= triton.MOST_TOKENS:
                        return triton.forward(x, tensors, spec, mode, device=device)
                    # The passes beside torch's products; of plain factors there are none.
                    prefill.forward(x, tensors, spec, mode, "vendor")
                    return prefill.forward(x, tensors, spec, mode, "ours")

                yield f"{model} {group} {form_name} {kind_name} {ratio:g} {tokens}", call


def training() -> Iterator[tuple[str, Callable[[Device], object]]]:
    """Masked products by either way, with an adapter too; and a gradient's way through quantized factors."""
    from acip_kernels.ops import triton_products as kernels
    from acip_kernels.ops.fused_linear import triton

    for (model, (hidden, q, kv, middle, bias)), (kind_name, (kind, dtype)), ratio, tokens in itertools.product(
        MODELS.items(), KINDS.items(), RATIOS, MANY
    ):

        def numbers(*shape, dtype=dtype):
            return meta(shape, dtype)

        layers = {
            "q": (q, hidden, bias),
            "k": (kv, hidden, bias),
            "o": (hidden, q, False),
            "up": (middle, hidden, False),
            "down": (hidden, middle, False),
        }
        for name, (out, in_, biased) in layers.items():
            tensors, spec = layer(op.FACTORS, out, in_, ratio, kind, dtype, False)
            (factors,), rank = triton.read_layers(tensors, spec), tensors[0].shape[0]
            S, b = meta((rank,), torch.float32), numbers(out) if biased else None

            def masked(_, numbers=numbers, tokens=tokens, out=out, rank=rank, S=S, b=b, factors=factors, kind=kind):
                kernels.forward_product(numbers(tokens, rank), factors.second, S, S, b)
                kernels.backward_product(numbers(tokens, out), factors.second, numbers(tokens, rank), S, S)
                if kind == op.PLAIN:
                    kernels.scale(numbers(tokens, rank), S, S)
                    kernels.scale_and_reduce(*[numbers(tokens, rank)] * 2, S, S, 1.0)

            def joined(_, numbers=numbers, tokens=tokens, out=out, rank=rank, S=S, b=b):  # an adapter of rank 32
                U, z = numbers(out, rank + 32), numbers(tokens, rank + 32)
                kernels.forward_product(z, U, S, S, b, 32)
                kernels.backward_product(numbers(tokens, out), U, z, S, S, 1.0, 32)

            def linear(_, numbers=numbers, tokens=tokens, out=out, rank=rank, factors=factors):
                kernels.backward_product(numbers(tokens, rank), factors.first)
                kernels.backward_product(numbers(tokens, out), factors.second)

            about = f"{model} {name} {kind_name} {ratio:g} {tokens}"
            yield f"masked {about}", masked
            if kind == op.PLAIN:
                yield f"adapter {about}", joined
            else:
                yield f"linear {about}", linear


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one launch is compiled from."""

    target: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int
    registers: int | None

    def build(self) -> aot.Build:
        from acip_kernels.ops import gated_silu, rms_norm, rotary, triton_dropout, triton_products
        from acip_kernels.ops.fused_linear import triton

        modules = triton, triton_products, triton_dropout, gated_silu.triton, rms_norm.triton, rotary.triton
        kernel = next(kernel for module in modules if (kernel := getattr(module, self.kernel, None)) is not None)
        options = {} if self.registers is None else {"maxnreg": self.registers}
        return aot.build(
            kernel, dict(self.signature), dict(self.constants), self.target, self.warps, self.stages, **options
        )

    def row(self) -> dict:
        """What tells it from others, for JSON."""
        constants = {name: str(value) for name, value in self.constants}
        return {
            "target": self.target,
            "kernel": self.kernel,
            "warps": self.warps,
            "stages": self.stages,
            "constants": " ".join(f"{name}={value}" for name, value in sorted(constants.items())),
            "arguments": " ".join(kind for _, kind in self.signature),
        }


NUMBERS = ("registers", "spills", "shared", "matrix", "loads_128", "async_loads_128", "stores_128", "instructions")


def measured(launch: Launch) -> dict:
    """What `launch` becomes, in numbers; wgmma: of the matrix instructions, those of Hopper."""
    build = launch.build()
    return {name: getattr(build, name) for name in NUMBERS} | {"wgmma": build.count(r"[A-Z]GMMA(\..*)?")}


def type_of(argument) -> str:
    """As Triton would specialize it: pointers are taken to be aligned, as torch's allocators make them."""
    if isinstance(argument, torch.Tensor):
        return f"{_POINTERS[argument.dtype]}:16"
    if isinstance(argument, float):
        return "fp32"
    return "i32:1" if argument == 1 else "i32:16" if argument % 16 == 0 else "i32"


def launches(device: Device, call: Callable[[Device], object]) -> list[Launch]:
    """What `call` would launch on `device`."""
    from acip_kernels.ops import triton_products

    seen = []

    def record(
        kernel, grid, x, *arguments, num_warps, num_stages=1, launch_pdl=False, maxnreg=None, **constants
    ):  # fmt: skip
        names = [name for name in kernel.arg_names if name not in constants]
        values = dict(zip(names, arguments, strict=True))
        constants |= {name: None for name, value in values.items() if value is None}
        signature = tuple((name, type_of(value)) for name, value in values.items() if value is not None)
        fp8 = any(name.startswith("KIND") and value == triton_products.FP8 for name, value in constants.items())
        target = device.target if fp8 else TARGETS.get(device.target, device.target)
        registers = maxnreg if target.startswith("sm_") else None
        seen.append(
            Launch(target, kernel.__name__, signature, tuple(constants.items()), num_warps, num_stages, registers)
        )

    kept = triton_products.launch, triton_products._device
    triton_products.launch, triton_products._device = record, lambda _: device
    try:
        call(device)
    finally:
        triton_products.launch, triton_products._device = kept
    return seen


def every_launch() -> dict[Launch, list[str]]:
    """Each different launch, with the problems that need it."""
    found: dict[Launch, list[str]] = {}
    for name, call in problems():
        for device in DEVICES.values():
            for launch in launches(device, call):
                found.setdefault(launch, []).append(f"{device.name}: {name}")
    return found


def is_float32(row: dict) -> bool:
    """Whether what is multiplied is float32, for which there are no tensor cores that would not round it."""
    return "*bf16" not in row["arguments"]


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
        constants = f" {row['constants']} "
        what = "2–16 tokens" if "DOT=True" in constants else "one token" if "DOT=" in constants else ""
        if " KIND=" in constants:
            what = "many tokens" if " KIND=0 " in constants else "many tokens, quantized"
        if is_float32(row):
            what = f"{what}, float32" if what else "float32"
        groups.setdefault((row["kernel"].removesuffix("_kernel"), what, row["target"]), []).append(row)
    for (kernel, what, target), some in sorted(groups.items()):
        cells = [
            span([row["registers"] for row in some]),
            span([row["spills"] for row in some]),
            span([round(row["shared"] / 1024, 1) for row in some]),
            f"{sum(row['matrix'] > 0 for row in some)} of {len(some)}",
            f"{sum(row['loads_128'] + row['async_loads_128'] > 0 for row in some)} of {len(some)}",
        ]
        name = ", ".join(part for part in (kernel, what) if part)
        lines.append(f"| {name} | {target} | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sources() -> dict[str, str]:
    """Of each kernel, a hash of its text and of all functions in it: what is stored for another text is of no use."""
    import triton

    from acip_kernels.ops import triton_products
    from acip_kernels.ops.fused_linear import triton as decode

    functions = {
        f.__name__: f.src
        for m in (triton_products, decode)
        for f in vars(m).values()
        if isinstance(f, triton.JITFunction)
    }

    def hashed(name: str) -> str:
        found, new = {}, {name}
        while new:
            found |= {one: functions[one] for one in new}
            words = {word for one in new for word in re.findall(r"\w+", functions[one])}
            new = (words & functions.keys()) - found.keys()
        return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]

    return {name: hashed(name) for name in sorted(functions) if name.endswith("_kernel")}


# In the file every text stands once, and a row is their numbers and its own: a fifth of the bytes.
_TEXTS = ("target", "kernel", "constants", "arguments")
_COLUMNS = (*_TEXTS, "warps", "stages", *NUMBERS, "wgmma", "problems")


def write_result(path: pathlib.Path, header: dict, rows: list[dict]) -> None:
    texts = list(dict.fromkeys(row[name] for name in _TEXTS for row in rows))
    number = {text: i for i, text in enumerate(texts)}
    packed = [[number[row[name]] if name in _TEXTS else row[name] for name in _COLUMNS] for row in rows]
    result = header | {"columns": _COLUMNS, "texts": texts, "rows": []}
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in packed)
    files.write_text(path, json.dumps(result, indent=1).replace('"rows": []', f'"rows": [\n{lines}\n]') + "\n")


def read_result(path: pathlib.Path = RESULTS) -> dict:
    """The header, and `rows`, a dictionary each."""
    found = files.read_json(path)
    texts, columns = found.pop("texts"), found.pop("columns")
    rows = [dict(zip(columns, row, strict=True)) for row in found["rows"]]
    return found | {"rows": [row | {name: texts[row[name]] for name in _TEXTS} for row in rows]}


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("target", "kernel", "warps", "stages", "constants", "arguments"))


def main(
    store: Annotated[bool, typer.Option(help="Write the result under bench/results.")] = True,
    minutes: Annotated[float, typer.Option(help="Stop after so long; run again to go on.")] = math.inf,
    again: Annotated[bool, typer.Option("--again", help="Compile what is stored as well.")] = False,
):
    """Compile every kernel for every configuration that `plan` chooses on its devices; a second each."""
    import triton as compiler
    from rich.progress import track

    deadline, about = time.monotonic() + 60 * minutes, report.device_description()  # of the machine that compiles
    header = {"triton": compiler.__version__, "torch": about["torch"], "date": about["date"], "sources": sources()}
    stored = read_result() if RESULTS.exists() and not again else {}
    of = stored["sources"] if stored.get("triton") == header["triton"] else {}
    known = {key(r): r for r in stored.get("rows", ()) if of.get(r["kernel"]) == header["sources"].get(r["kernel"], "")}
    found = every_launch()
    rows = {launch: known.get(key(launch.row())) for launch in found}
    todo = [launch for launch, row in rows.items() if row is None]
    typer.echo(f"{len(found)} launches, {len(found) - len(todo)} of them known")
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        # A few at a time, so that little is lost when time is up.
        batches = [todo[i : i + 16] for i in range(0, len(todo), 16)]
        for batch in track(batches, "compiling", total=len(batches)):
            if time.monotonic() > deadline:
                break
            for launch, numbers in zip(batch, pool.map(measured, batch)):
                rows[launch] = launch.row() | numbers
    made = [row | {"problems": len(found[launch])} for launch, row in rows.items() if row is not None]
    if store:
        write_result(RESULTS, header, made)
    if len(made) < len(found):
        typer.echo(f"{len(found) - len(made)} launches are left: run it again")
    typer.echo(table(made))


if __name__ == "__main__":
    typer.run(main)
