"""What a deployed layer costs on a GPU: `python -m bench.kernels_gpu`, a part of `make gpu`.

The layers of Llama-3.1-8B and Qwen2.5-7B, alone and in the groups that they are computed in, for few tokens:

- "dense": `F.linear`, siblings as one matrix (the best that cuBLAS has); "dense, compiled": the same under
  `torch.compile(mode="max-autotune-no-cudagraphs")`, where `--compiled` asks for it;
- "two F.linear": the factors as one writes them in PyTorch, siblings one after the other;
- "factors", "pivoted", "int8", "int4": our Triton kernels, of the same stored size ratio in two or four, one or half a
  byte; "…, CUDA" and "…, CUDA, dependent": the CUDA C++ kernels in one launch, and in one for each stage, where they
  are built.

For many tokens, where torch's products are taken, the training step of a masked layer: forward and backward of
`masked_svd_linear`, Triton's backend against torch's products with fused passes between them ("composition").

Every variant is captured into a CUDA graph that runs through copies of its weights, together many times the L2, so that
weights come from memory; graphs are replayed in turns, and each variant's time is that of its graph by the number of
copies: medians, 20th and 80th percentiles. `--eager` times the calls themselves, Python included. The floor is bytes
over the rate at which a large tensor is read in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from acip_kernels import files, report
from acip_kernels.ops.fused_linear import cuda, measured, op
from acip_kernels.ops.masked_svd_linear.op import masked_svd_linear
from acip_kernels.ops.quantize import Quantized, quantize
from acip_kernels.ops.timing import CACHES, MOST_COPIES, Timer

from .decode_cpu import bytes_of
from .kernel_builds import GROUP, MODELS
from .training_step import ROOT, markdown

FEW, MANY = (1, 4, 16), (512, 4096)
RATIOS = (0.8, 0.5, 0.25)
FORMATS = ("factors", "pivoted", "int8", "int4")
CUDA_LAUNCHES = {"CUDA": "cooperative", "CUDA, dependent": "dependent"}
RANK_MULTIPLE = 64
MODES = {"silu": op.SWIGLU, "mlp": op.GATED_MLP, "": op.CONCATENATE}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A group of layers: `members` are (out, in), `activation` "" for siblings, "silu" for gate/up, "mlp" for all."""

    model: str
    group: str
    members: tuple[tuple[int, int], ...]
    activation: str
    ratio: float
    tokens: int


@dataclasses.dataclass
class Variant:
    """calls: one for each copy of the weights. bytes: that one call reads of them."""

    name: str
    bytes: int
    calls: list[Callable[[], object]]
    seconds: list[float] = dataclasses.field(default_factory=list)


def problems(models=tuple(MODELS), tokens=FEW, ratios=RATIOS) -> list[Problem]:
    """Every group at every size and number of tokens; of sizes but 0.5, at one token alone."""
    found = []
    for model in models:
        hidden, q, kv, middle, _ = MODELS[model]
        groups = {
            "o": (((hidden, q),), ""),
            "down": (((hidden, middle),), ""),
            "q/k/v": (((q, hidden), (kv, hidden), (kv, hidden)), ""),
            "gate/up": (((middle, hidden), (middle, hidden)), "silu"),
            "MLP": (((middle, hidden), (middle, hidden), (hidden, middle)), "mlp"),
        }
        found += [
            Problem(model, group, *about, ratio, count)
            for group, about in groups.items()
            for ratio in ratios
            for count in tokens
            if ratio == 0.5 or count == 1
        ]
    return found


def rank_at(ratio: float, out: int, in_: int, pivoted: bool) -> int:
    """The largest rank, a multiple of 64 where there are that many, of no more than `ratio` of the weights."""
    sides, budget = out + in_, ratio * out * in_
    rank = (sides - math.sqrt(max(0.0, sides * sides - 4 * budget))) / 2 if pivoted else budget / sides
    rank = min(int(rank), min(out, in_))
    return rank // RANK_MULTIPLE * RANK_MULTIPLE or max(1, rank)


# ---- variants


def weight(rows: int, cols: int, device, dtype) -> Tensor:
    return (torch.randn(rows, cols, device=device) / math.sqrt(cols)).to(dtype)


def stored(matrix: Tensor, kind: str) -> tuple[list[Tensor], list[int]]:
    """`(tensors, spec)` of a weight as `fused_linear` takes it."""
    cols = matrix.shape[1]
    if kind not in ("int8", "int4"):
        return [matrix], [op.PLAIN, cols, 0]
    made: Quantized = quantize(matrix, kind, GROUP, False)
    tensors = [tensor for tensor in made if tensor is not None]
    return tensors, [op.INT8 if kind == "int8" else op.INT4_ZEROS, cols, 0 if kind == "int8" else GROUP]


def deployed(out: int, in_: int, ratio: float, kind: str, device, dtype) -> tuple[list[Tensor], list[int]]:
    """A random layer of a format."""
    pivoted = kind == "pivoted"
    rank = rank_at(ratio, out, in_, pivoted)
    first, of_first = stored(weight(rank, in_, device, dtype), kind)
    second, of_second = stored(weight(out - rank if pivoted else out, rank, device, dtype), kind)
    tensors, spec = first + second, [op.PIVOTED if pivoted else op.FACTORS, 0, *of_first, *of_second]
    if pivoted:
        tensors.append(torch.randperm(out, device=device, dtype=torch.int32))
    return tensors, spec


def apart(x: Tensor, factors: list[tuple[Tensor, Tensor]], activation: str) -> list[Tensor]:
    """Two products a layer, one after the other: the outputs of all siblings, or of SwiGLU, or of a gated MLP."""

    def linear(x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return functools.reduce(F.linear, pair, x)

    if not activation:
        return [linear(x, pair) for pair in factors]
    made = F.silu(linear(x, factors[0])) * linear(x, factors[1])
    return [made if activation == "silu" else linear(made, factors[2])]


def dense(x: Tensor, joined: Tensor, last: Tensor | None, activation: str) -> Tensor:
    """Siblings as one matrix, as serving engines keep them."""
    y = F.linear(x, joined)
    if activation:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if last is None else F.linear(y, last)


def kernels(x: Tensor, tensors: list[Tensor], spec: list[int], mode: int, launch: str | None = None) -> Tensor:
    """Our Triton kernels, wherever `x` is: on a CPU in Triton's interpreter. With `launch`, the CUDA C++ ones."""
    from acip_kernels.ops.fused_linear import triton

    return cuda.forward(x, tensors, spec, mode, launch=launch) if launch else triton.forward(x, tensors, spec, mode)


def variants(problem: Problem, device, dtype, cache: int, compiled: bool) -> list[Variant]:
    """Every way to compute `problem`, each with its copies."""
    x = torch.randn(problem.tokens, problem.members[0][1], device=device).to(dtype)
    found = []

    def add(name: str, make: Callable[[], tuple[Callable, list[Tensor]]]) -> None:
        call, tensors = make()
        size = bytes_of(*tensors)
        copies = min(MOST_COPIES, math.ceil(CACHES * cache / size) + 1)
        found.append(Variant(name, size, [call, *(make()[0] for _ in range(copies - 1))]))

    def make_dense(function=dense):
        members = [weight(out, in_, device, dtype) for out, in_ in problem.members]
        last = members.pop() if problem.activation == "mlp" else None
        joined = torch.cat(members)
        tensors = [joined] if last is None else [joined, last]
        return (lambda: function(x, joined, last, problem.activation)), tensors

    def make_apart():
        weights = []
        for out, in_ in problem.members:
            rank = rank_at(problem.ratio, out, in_, False)
            weights.append((weight(rank, in_, device, dtype), weight(out, rank, device, dtype)))
        return (lambda: apart(x, weights, problem.activation)), [t for pair in weights for t in pair]

    def make_ours(kind: str, launch: str | None = None):
        made = [deployed(out, in_, problem.ratio, kind, device, dtype) for out, in_ in problem.members]
        tensors, spec = [t for some, _ in made for t in some], [n for _, some in made for n in some]
        return (lambda: kernels(x, tensors, spec, MODES[problem.activation], launch)), tensors

    add("dense", make_dense)
    if compiled:
        add("dense, compiled", lambda: make_dense(torch.compile(dense, mode="max-autotune-no-cudagraphs")))
    add("two F.linear", make_apart)
    for kind in FORMATS:
        add(kind, lambda kind=kind: make_ours(kind))
        if cuda.missing is None and x.is_cuda:
            for name, launch in CUDA_LAUNCHES.items():
                add(f"{kind}, {name}", lambda kind=kind, launch=launch: make_ours(kind, launch))
    return found


def training_variants(out: int, in_: int, ratio: float, tokens: int, device, dtype) -> list[Variant]:
    """Forward and backward of a masked layer at a live size ratio, by backend."""
    rank = rank_at(ratio, out, in_, False)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, in_, device=device, generator=generator).to(dtype).requires_grad_()
    g = torch.randn(tokens, out, device=device, generator=generator).to(dtype)
    Vh, U = weight(rank, in_, device, dtype), weight(out, rank, device, dtype)
    S, mask = torch.rand(rank, device=device), torch.full((rank,), 0.02, device=device, requires_grad=True)

    def step(backend: str):
        y = masked_svd_linear(x, Vh, U, S, mask, backend=backend)
        return torch.autograd.grad(y, (x, mask), g)

    def composition():
        z = F.linear(x, Vh)
        gates = torch.where(mask > 0, S, 0.0)
        return torch.autograd.grad(_straight_through(z, gates, mask, U), (x, mask), g)

    size = bytes_of(Vh, U)
    return [Variant("composition", size, [composition]), Variant("Triton", size, [lambda: step("triton")])]


def _straight_through(z: Tensor, gates: Tensor, mask: Tensor, U: Tensor) -> Tensor:
    """The plain composition: the mask's gradient is that of a factor of one."""
    scale = gates * (1 + (mask - mask.detach()) / 0.02)
    return F.linear(z * scale.to(z.dtype), U)


# ---- timing


def streaming_rate(device: torch.device, size: int = 1 << 31, rounds: int = 20) -> float:
    """Bytes a second at which a tensor larger than any cache is read (a sum)."""
    data = torch.zeros(size // 4, device=device)
    timer = Timer(device, eager=True)
    times = [timer.seconds(lambda: data.sum()) for _ in range(rounds)][2:]
    return size / statistics.median(times)


def percentiles(seconds: list[float]) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(seconds)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)]


def rows_of(found: list[Variant], about: dict, rate: float) -> list[dict]:
    """One row a variant, compared with "dense" and "two F.linear" in the same rounds."""
    by_name = {variant.name: variant for variant in found}

    def times(variant: Variant, base: str) -> float | None:
        if base not in by_name:
            return None
        return statistics.median(b / own for b, own in zip(by_name[base].seconds, variant.seconds, strict=True))

    return [
        about
        | {
            "variant": variant.name,
            "seconds": percentiles(variant.seconds),
            "bytes": variant.bytes,
            "to_floor": statistics.median(variant.seconds) / (variant.bytes / rate),
            "to_dense": times(variant, "dense"),
            "to_two_linear": times(variant, "two F.linear"),
            "to_composition": times(variant, "composition"),
        }
        for variant in found
    ]


# ---- what it must show


def targets(rows: list[dict]) -> list[dict]:
    """Each target with its worst row: `{"about", "least" or "most", "found", "met"}`; found is None if not measured."""
    few = [row for row in rows if row["kind"] == "deployed" and row["tokens"] == 1 and row["ratio"] == 0.5]
    wide = [row for row in few if row["variant"] == "factors" and row["group"] != "MLP"]
    training = [row for row in rows if row["kind"] == "training" and row["variant"] == "Triton"]

    def in_cuda(kind: str, group: str, key: str) -> list[float]:
        # The best of its two ways, as a plan by measurement would take it.
        groups: dict[str, list[float]] = {}
        for row in few:
            if row["group"] == group and row["variant"] in [f"{kind}, {name}" for name in CUDA_LAUNCHES]:
                groups.setdefault(row["model"], []).append(row[key])
        return [(min if key == "to_floor" else max)(values) for values in groups.values()]

    def one(about: str, values: list[float], least: float | None = None, most: float | None = None) -> dict:
        found = None if not values else min(values) if least is not None else max(values)
        met = None if found is None else found >= least if least is not None else found <= most
        return {"about": about, "least": least, "most": most, "found": found, "met": met}

    return [
        one("one token, half the size: time over the floor", [row["to_floor"] for row in wide], most=1.3),
        one("… speed over dense", [row["to_dense"] for row in wide], least=1.6),
        one("… over two F.linear under the same graph", [row["to_two_linear"] for row in wide], least=1.25),
        one(
            "int4 MLP, one token, half the size: over dense in bfloat16",
            [row["to_dense"] for row in few if row["variant"] == "int4" and row["group"] == "MLP"],
            least=3.0,
        ),
        one(
            "CUDA C++, one token, half the size: gate/up, time over the floor",
            in_cuda("factors", "gate/up", "to_floor"),
            most=1.15,
        ),
        one("… o, time over the floor", in_cuda("factors", "o", "to_floor"), most=1.3),
        one("… whole MLP, speed over dense", in_cuda("factors", "MLP", "to_dense"), least=1.8),
        one("… int4 MLP, speed over dense in bfloat16", in_cuda("int4", "MLP", "to_dense"), least=5.0),
        one(
            "masked step, 4096 tokens: over the plain composition",
            [row["to_composition"] for row in training if row["tokens"] == 4096],
            least=1.15,
        ),
    ]


def table(rows: list[dict]) -> str:
    """Markdown: a row a problem, a column a variant: microseconds, × the floor, × dense."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["group"], row["ratio"], row["tokens"]), {})[row["variant"]] = row
    lines = []
    for (model, group, ratio, tokens), some in groups.items():
        cells = []
        for name in names:
            row = some.get(name)
            against = row and (row["to_dense"] or row["to_composition"])
            cells.append("–" if row is None else f"{row['seconds'][1] * 1e6:.1f} ({against:.2f}x)")
        lines.append([f"{model} {group}", f"{ratio:g}", str(tokens), *cells])
    return markdown(["layers", "size", "tokens", *names], lines)


def targets_table(found: list[dict]) -> str:
    lines = []
    for target in found:
        wanted = f"≥ {target['least']:g}" if target["least"] is not None else f"≤ {target['most']:g}"
        got = "not measured" if target["found"] is None else f"{target['found']:.2f}"
        lines.append([target["about"], wanted, got, "" if target["met"] is None else "yes" if target["met"] else "no"])
    return markdown(["target", "wanted", "worst case", "met"], lines)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(MODELS)}. Default: all.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Of deployed layers, up to 16; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Replays of every variant, in turns.")] = 40,
    compiled: Annotated[bool, typer.Option(help="The dense layers under torch.compile as well (slow).")] = False,
    eager: Annotated[bool, typer.Option(help="Time calls instead of graphs.")] = False,
    training: Annotated[bool, typer.Option(help="The masked layer's step as well.")] = True,
):
    """Time of deployed and of masked layers on this GPU; writes bench/results/kernels_gpu-<device>.json."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU: this benchmark measures one and nothing else")
    device, dtype = torch.device("cuda"), torch.bfloat16
    rate, cache = streaming_rate(device), torch.cuda.get_device_properties(device).L2_cache_size
    timer, rows = Timer(device, eager), []
    typer.echo(f"{torch.cuda.get_device_name()}: reads {rate / 1e12:.2f} TB/s, L2 {cache >> 20} MiB")
    tuned = measured.table(torch.device("cuda", torch.cuda.current_device()))
    if tuned is not None:
        typer.echo(f"configs of {tuned.source}, where it holds them")

    def keep(found: list[Variant], about: dict) -> None:
        for variant, seconds in zip(found, timer.measure([v.calls for v in found], rounds), strict=True):
            variant.seconds += seconds
        made = rows_of(found, about, rate)
        rows.extend(made)
        typer.echo(table(made).splitlines()[-1])

    for problem in problems(tuple(model or MODELS), tuple(tokens or FEW)):
        about = {key: getattr(problem, key) for key in ("model", "group", "ratio", "tokens")}
        keep(variants(problem, device, dtype, cache, compiled), about | {"kind": "deployed"})
    if training:
        for name in model or MODELS:
            hidden, _, _, middle, _ = MODELS[name]
            for group, out, in_ in (("o", hidden, hidden), ("up", middle, hidden)):
                for count in MANY:
                    about = {"model": name, "group": group, "ratio": 0.5, "tokens": count, "kind": "training"}
                    keep(training_variants(out, in_, 0.5, count, device, dtype), about)
    found = targets(rows)
    result = {
        "device": report.device_description(device) | {"triton": _version("triton")},
        "streaming_bytes_per_s": rate,
        "tuned": tuned is not None,
        "eager": timer.eager,
        "rounds": rounds,
        "rows": rows,
        "targets": found,
    }
    files.write_json(result_path(torch.cuda.get_device_name()), result)
    typer.echo(targets_table(found))


def result_path(device_name: str) -> pathlib.Path:
    name = "-".join(device_name.lower().split())
    return ROOT / "bench" / "results" / f"kernels_gpu-{name}.json"


def _version(package: str) -> str | None:
    from .decode_cpu import version_of

    return version_of(package)


if __name__ == "__main__":
    typer.run(main)
