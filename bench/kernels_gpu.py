"""What a deployed layer costs on a GPU: `python -m bench.kernels_gpu`, a part of `make gpu`.

The layers of Llama-3.1-8B and Qwen2.5-7B, alone, in the groups that they are computed in, and as a whole decoder block
(norms, residuals, and attention by torch's SDPA over a cache of 1,024 tokens; without rotations, which are alike):

- "dense": `F.linear`, siblings as one matrix (the best that cuBLAS has);
- "two F.linear": the factors as one writes them in PyTorch, siblings one after the other;
- "factors", "pivoted", "int8", "int4", "fp8": our Triton kernels, of the same stored size ratio in two, one or half a
  byte; "dense int8" and the like: other forms; "…, CUDA" and "…, CUDA, dependent": the CUDA C++ kernels in one launch,
  and in one for each stage, where they are built;
- "dense, compiled", "two F.linear, compiled": under `torch.compile(mode="max-autotune-no-cudagraphs")`, cases of their
  own at the end, as that takes long.

From 64 tokens on, where plain factors are torch's two products: quantized and pivoted layers by our products ("ours")
and by torch's with what that needs beside them ("vendor"); and the training step of a masked layer, forward and
backward of `masked_svd_linear`, by either way, against plain PyTorch ("composition").

Every variant is captured into a CUDA graph that runs through copies of its weights, together many times the L2, so that
weights come from memory; graphs are replayed in turns, and each variant's time is that of its graph by the number of
copies: medians, 20th and 80th percentiles. At one token and half the size calls from Python are timed too. The floor is
bytes over the rate at which a large tensor is read in the same run.

Cases go by importance, and results are written after each. What fails is written down with its error, and the rest
goes on, in a new process if the GPU's context is lost. After `--minutes` no case is begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from acip_kernels import files, report
from acip_kernels.ops.fused_linear import cuda, measured, op
from acip_kernels.ops.masked_svd_linear.op import masked_svd_linear
from acip_kernels.ops.quantize import shapes
from acip_kernels.ops.timing import CACHES, MOST_COPIES, Timer

from .decode_cpu import bytes_of
from .kernel_builds import FEW, GROUP, MANY, MODELS, RATIOS, rank_at
from .training_step import ROOT, markdown

# A form and a kind of numbers. Those of MORE are cases of their own, at half the size.
FORMATS = {
    "factors": (op.FACTORS, op.PLAIN),
    "pivoted": (op.PIVOTED, op.PLAIN),
    "int8": (op.FACTORS, op.INT8),
    "int4": (op.FACTORS, op.INT4_ZEROS),
    "fp8": (op.FACTORS, op.FP8),
}
MORE = {
    f"{form} {kind}": (number, FORMATS[kind][1])
    for form, number in (("dense", op.DENSE), ("pivoted", op.PIVOTED))
    for kind in ("int8", "int4", "fp8")
}
CUDA_LAUNCHES = {"CUDA": "cooperative", "CUDA, dependent": "dependent"}
MODES = {"silu": op.SWIGLU, "mlp": op.GATED_MLP, "": op.CONCATENATE}
CACHED, HEAD = 1024, 128  # tokens in a block's cache; size of a head
COMPILED = "max-autotune-no-cudagraphs"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A group of layers: `members` are (out, in), `activation` "" for siblings, "silu" for gate/up, "mlp" for all,
    "block" for a decoder block of q, k, v, o, gate, up and down, "masked" for a training step.

    what: "", or "compiled" or "forms" for the variants that are cases of their own.
    """

    model: str
    group: str
    members: tuple[tuple[int, int], ...]
    activation: str
    ratio: float
    tokens: int
    what: str = ""

    @property
    def about(self) -> dict:
        kind = "training" if self.activation == "masked" else "deployed"
        return {"kind": kind} | {key: getattr(self, key) for key in ("model", "group", "ratio", "tokens", "what")}

    @property
    def importance(self) -> tuple:
        """What comes first: one token at half the size, then training, prefill, other numbers of tokens and sizes."""
        training, half = self.activation == "masked", self.ratio == 0.5
        if self.what:
            place = 5
        elif not half:
            place = 6 if self.tokens == 1 else 8
        elif self.tokens == 1:
            place = 0
        elif training:
            place = 1 if self.tokens == 4096 else 2
        else:
            place = 3 if self.tokens == 512 else 4
        return place + 2 * (self.model != next(iter(MODELS))), self.tokens


@dataclasses.dataclass
class Variant:
    """calls: one for each copy of the weights. bytes: that one call reads of them. error: why there are no times."""

    name: str
    bytes: int
    calls: list[Callable[[], object]]
    seconds: list[float] = dataclasses.field(default_factory=list)
    eager: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None


def problems(models=tuple(MODELS), tokens=FEW + MANY, ratios=RATIOS) -> list[Problem]:
    """Every group at every size and number of tokens, the most important first."""
    found = []
    for model in models:
        hidden, q, kv, middle, _ = MODELS[model]
        siblings, mlp = (
            ((q, hidden), (kv, hidden), (kv, hidden)),
            ((middle, hidden), (middle, hidden), (hidden, middle)),
        )
        groups = {
            "q/k/v": (siblings, ""),
            "o": (((hidden, q),), ""),
            "gate/up": (mlp[:2], "silu"),
            "MLP": (mlp, "mlp"),
            "block": ((*siblings, (hidden, q), *mlp), "block"),
            "down": (mlp[2:], ""),
            "k": (siblings[1:2], ""),
        }
        found += [
            Problem(model, group, *about, ratio, count)
            for (group, about), ratio, count in itertools.product(groups.items(), ratios, tokens)
        ]
        for what, count in itertools.product(("compiled", "forms"), (1, 512)):
            if count in tokens and 0.5 in ratios:
                found += [Problem(model, g, *groups[g], 0.5, count, what) for g in ("q/k/v", "o", "MLP", "block")]
        found += [
            Problem(model, group, (shape,), "masked", ratio, count)
            for (group, shape), ratio, count in itertools.product(
                (("o", (hidden, q)), ("up", (middle, hidden))), ratios, (4096, 512, 64)
            )
            if count in tokens
        ]
    return sorted(found, key=lambda problem: problem.importance)


# ---- variants


def weight(rows: int, cols: int, device, dtype) -> Tensor:
    return (torch.randn(rows, cols, device=device) / math.sqrt(cols)).to(dtype)


def stored(rows: int, cols: int, kind: int, device, dtype) -> tuple[list[Tensor], list[int]]:
    """`(tensors, spec)` of a random weight as `fused_linear` takes it: about as large as `weight`'s."""
    if kind == op.PLAIN:
        return [weight(rows, cols, device, dtype)], [kind, cols, 0]
    name = {op.INT8: "int8", op.FP8: "fp8"}.get(kind, "int4")
    group = GROUP if name == "int4" else 0
    largest = {"int8": 127, "fp8": 448, "int4": 8}[name]
    (shape, codes), (scales_shape, scales_dtype), *zeros = shapes(rows, cols, name, GROUP).values()
    if name == "fp8":
        values = (torch.randn(shape, device=device) * largest / 4).clamp(-largest, largest).to(codes)
    else:
        values = torch.randint(*((-127, 128) if name == "int8" else (0, 256)), shape, device=device).to(codes)
    scales = torch.full(scales_shape, 2 / largest / math.sqrt(cols), device=device).to(scales_dtype)
    tensors = [values, scales, *(torch.full(shape, 8, device=device).to(dtype_) for shape, dtype_ in zeros)]
    return tensors, [kind, cols, group]


def deployed(out: int, in_: int, ratio: float, form: str, device, dtype) -> tuple[list[Tensor], list[int]]:
    """A random layer of a format."""
    number, kind = (FORMATS | MORE)[form]
    if number == op.DENSE:
        tensors, spec = stored(out, in_, kind, device, dtype)
        return tensors, [number, 0, *spec]
    pivoted = number == op.PIVOTED
    rank = rank_at(ratio, out, in_, pivoted)
    first, of_first = stored(rank, in_, kind, device, dtype)
    second, of_second = stored(out - rank if pivoted else out, rank, kind, device, dtype)
    tensors, spec = first + second, [number, 0, *of_first, *of_second]
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


def kernels(
    x: Tensor, tensors: list[Tensor], spec: list[int], mode: int, launch: str | None = None, way: str | None = None
) -> Tensor:
    """Our Triton kernels, wherever `x` is: on a CPU in Triton's interpreter. With `launch`, the CUDA C++ ones."""
    from acip_kernels.ops.fused_linear import prefill

    if launch:
        return cuda.forward(x, tensors, spec, mode, launch=launch)
    return prefill.forward(x, tensors, spec, mode, way)


def block(
    x: Tensor, norm: Tensor, cache: tuple[Tensor, Tensor] | None, kv: int, qkv: Callable, o: Callable, mlp: Callable
) -> Tensor:
    """A decoder block: `x [tokens, hidden]` of as many sequences with a cache each, or of one that begins here.

    qkv, o and mlp return one tensor, or a list of each layer's.
    """

    def only(y: Tensor | list[Tensor]) -> Tensor:
        return y[0] if isinstance(y, list) else y

    tokens, head, made = len(x), min(HEAD, kv), qkv(F.rms_norm(x, norm.shape, norm))
    q, k, v = made if isinstance(made, list) else made.split([x.shape[1], kv, kv], 1)
    if cache is None:
        heads = [t.view(tokens, -1, head).transpose(0, 1)[None] for t in (q, k, v)]
    else:
        for held, new in zip(cache, (k, v)):
            held[:, :, -1] = new.view(tokens, -1, head)
        heads = [q.view(tokens, -1, 1, head), *cache]
    y = F.scaled_dot_product_attention(*heads, is_causal=cache is None, enable_gqa=True)
    x = x + only(o(y.transpose(1, 2).reshape(tokens, -1)))
    return x + only(mlp(F.rms_norm(x, norm.shape, norm)))


def variants(problem: Problem, device, dtype, cache: int) -> list[Variant]:
    """Every way to compute `problem`, each with its copies; what cannot be made has an error."""
    if problem.activation == "masked":
        return training_variants(*problem.members[0], problem.ratio, problem.tokens, device, dtype)
    members, tokens = problem.members, problem.tokens
    few = tokens <= max(FEW)
    x = torch.randn(tokens, members[0][1], device=device).to(dtype)
    found = []
    is_block = problem.activation == "block"
    # Of a block: which of its layers are computed together, and how.
    parts = (
        [(slice(0, 3), ""), (slice(3, 4), ""), (slice(4, 7), "mlp")]
        if is_block
        else [(slice(None), problem.activation)]
    )

    def add(name: str, make: Callable[[slice, str], tuple[Callable, list[Tensor]]]) -> None:
        """make: what computes a part, and its tensors."""

        def whole() -> tuple[Callable, list[Tensor]]:
            made = [make(*part) for part in parts]
            tensors = [tensor for _, some in made for tensor in some]
            if not is_block:
                return functools.partial(made[0][0], x), tensors
            kv = members[1][0]
            norm, held = torch.ones(x.shape[1], device=device, dtype=dtype), None
            if few:
                shape = tokens, max(1, kv // HEAD), CACHED, min(HEAD, kv)
                held = tuple(torch.randn(shape, device=device).to(dtype) for _ in range(2))
            call = functools.partial(block, x, norm, held, kv, *(call for call, _ in made))
            return call, [*tensors, *(held or ())]

        try:
            call, tensors = whole()
            size = bytes_of(*tensors)
            copies = min(MOST_COPIES, math.ceil(CACHES * cache / size) + 1) if few else 1
            found.append(Variant(name, size, [call, *(whole()[0] for _ in range(copies - 1))]))
        except Exception as error:
            found.append(Variant(name, 0, [], error=described(error)))

    def make_dense(which: slice, activation: str, function=dense):
        weights = [weight(out, in_, device, dtype) for out, in_ in members[which]]
        last = weights.pop() if activation == "mlp" else None
        joined = torch.cat(weights)
        tensors = [joined] if last is None else [joined, last]
        return (lambda x: function(x, joined, last, activation)), tensors

    def make_apart(which: slice, activation: str, function=apart):
        weights = []
        for out, in_ in members[which]:
            rank = rank_at(problem.ratio, out, in_, False)
            weights.append((weight(rank, in_, device, dtype), weight(out, rank, device, dtype)))
        return (lambda x: function(x, weights, activation)), [t for pair in weights for t in pair]

    def make_ours(form: str, which: slice, activation: str, launch: str | None = None, way: str | None = None):
        made = [deployed(out, in_, problem.ratio, form, device, dtype) for out, in_ in members[which]]
        tensors, spec = [t for some, _ in made for t in some], [n for _, some in made for n in some]
        return (lambda x: kernels(x, tensors, spec, MODES[activation], launch, way)), tensors

    def compiled(function):
        return torch.compile(function, mode=COMPILED)

    add("dense", make_dense)
    add("two F.linear", make_apart)
    if problem.what == "compiled":
        add("dense, compiled", lambda *part: make_dense(*part, compiled(dense)))
        add("two F.linear, compiled", lambda *part: make_apart(*part, compiled(apart)))
        add("factors", lambda *part: make_ours("factors", *part))
        return found
    for form, (number, kind) in (MORE if problem.what == "forms" else FORMATS).items():
        if few or (number != op.PIVOTED and kind == op.PLAIN):
            add(form, lambda *part, form=form: make_ours(form, *part))
        else:
            for way in ("ours", "vendor"):
                add(f"{form}, {way}", lambda *part, form=form, way=way: make_ours(form, *part, way=way))
        if cuda.missing is None and x.is_cuda and few and kind != op.FP8:
            for name, launch in CUDA_LAUNCHES.items():
                add(f"{form}, {name}", lambda *part, form=form, launch=launch: make_ours(form, *part, launch))
    return found


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


@contextlib.contextmanager
def by_way(way: str | None) -> Iterator[None]:
    """Triton's backend of masked products takes this way, or what `plan` chooses."""
    from acip_kernels.ops import triton_products

    chosen = triton_products.pays
    if way is not None:
        triton_products.pays = lambda *_: way == "ours"
    try:
        yield
    finally:
        triton_products.pays = chosen


def training_variants(out: int, in_: int, ratio: float, tokens: int, device, dtype) -> list[Variant]:
    """Forward and backward of a masked layer at a live size ratio, by backend."""
    rank = rank_at(ratio, out, in_, False)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, in_, device=device, generator=generator).to(dtype).requires_grad_()
    g = torch.randn(tokens, out, device=device, generator=generator).to(dtype)
    Vh, U = weight(rank, in_, device, dtype), weight(out, rank, device, dtype)
    S, mask = torch.rand(rank, device=device), torch.full((rank,), 0.02, device=device, requires_grad=True)

    def step(way: str | None):
        with by_way(way):
            y = masked_svd_linear(x, Vh, U, S, mask, backend="triton")
            return torch.autograd.grad(y, (x, mask), g)

    def composition():
        z = F.linear(x, Vh)
        gates = torch.where(mask > 0, S, 0.0)
        return torch.autograd.grad(_straight_through(z, gates, mask, U), (x, mask), g)

    size = bytes_of(Vh, U)
    ways = {"Triton": None, "Triton, ours": "ours", "Triton, vendor": "vendor"}
    return [
        Variant("composition", size, [composition]),
        *(Variant(name, size, [lambda way=way: step(way)]) for name, way in ways.items()),
    ]


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


class ContextLost(RuntimeError):
    """The GPU refuses everything after an error of a kernel: only a new process goes on."""


def measure(found: list[Variant], timer: Timer, rounds: int, eager_rounds: int = 0) -> None:
    """Times of all variants, in turns; one that fails keeps its error. Raises `ContextLost`."""
    for kind, some_rounds in (("seconds", rounds), ("eager", eager_rounds)):
        if not some_rounds:
            continue
        turns = timer if kind == "seconds" else Timer(timer.device, eager=True)
        runs = []
        for variant in found:
            if variant.error is None:
                try:
                    runs.append((variant, turns.prepare(variant.calls)))
                    turns.seconds(runs[-1][1])
                except Exception as error:
                    variant.error = described(error)
                    runs = [run for run in runs if run[0] is not variant]
                    if lost(timer.device):
                        raise ContextLost(f"{variant.name}: {variant.error}") from error
        times = turns.in_turns([run for _, run in runs], [len(variant.calls) for variant, _ in runs], some_rounds)
        for (variant, _), seconds in zip(runs, times, strict=True):
            getattr(variant, kind).extend(seconds)


def lost(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def rows_of(found: list[Variant], about: dict, rate: float) -> list[dict]:
    """One row a variant, compared with "dense", "two F.linear" and others in the same rounds."""
    by_name = {variant.name: variant for variant in found}

    def times(variant: Variant, base: str) -> float | None:
        if base not in by_name or not by_name[base].seconds:
            return None
        return statistics.median(b / own for b, own in zip(by_name[base].seconds, variant.seconds, strict=True))

    rows = []
    for variant in found:
        row = about | {"variant": variant.name}
        if not variant.seconds:
            rows.append(row | {"error": variant.error or "not measured"})
            continue
        row |= {"seconds": percentiles(variant.seconds), "bytes": variant.bytes}
        if variant.eager:
            row["eager"] = percentiles(variant.eager)
        row["to_floor"] = statistics.median(variant.seconds) / (variant.bytes / rate)
        for key, base in BASES.items():
            row[key] = times(variant, base)
        rows.append(row)
    return rows


BASES = {
    "to_dense": "dense",
    "to_two_linear": "two F.linear",
    "to_compiled": "dense, compiled",
    "to_composition": "composition",
}


# ---- what it must show


def targets(rows: list[dict]) -> list[dict]:
    """Each target with its worst row: `{"about", "least" or "most", "found", "met"}`; found is None if not measured."""
    rows = [row for row in rows if "error" not in row and not row.get("what")]
    half = [row for row in rows if row["kind"] == "deployed" and row["ratio"] == 0.5]
    few = [row for row in half if row["tokens"] == 1]
    wide = [row for row in few if row["variant"] == "factors" and row["group"] in ("q/k/v", "o", "gate/up", "down")]
    blocks = {kind: [row for row in few if (row["group"], row["variant"]) == ("block", kind)] for kind in FORMATS}
    many = [row for row in half if row["tokens"] >= 512 and row["variant"] == "factors"]
    training = [row for row in rows if row["kind"] == "training" and row["variant"] == "Triton" and row["ratio"] == 0.5]

    def in_cuda(kind: str, group: str, key: str) -> list[float]:
        # The best of its two ways, as a plan by measurement would take it.
        groups: dict[str, list[float]] = {}
        for row in few:
            if row["group"] == group and row["variant"] in [f"{kind}, {name}" for name in CUDA_LAUNCHES]:
                groups.setdefault(row["model"], []).append(row[key] or (math.inf if key == "to_floor" else 0.0))
        return [(min if key == "to_floor" else max)(values) for values in groups.values()]

    def one(about: str, values: list[float | None], least: float | None = None, most: float | None = None) -> dict:
        values = [value for value in values if value is not None]  # what it is compared with may have failed
        found = None if not values else min(values) if least is not None else max(values)
        met = None if found is None else found >= least if least is not None else found <= most
        return {"about": about, "least": least, "most": most, "found": found, "met": met}

    return [
        one("one token, half the size: time over the floor", [row["to_floor"] for row in wide], most=1.3),
        one("… speed over dense", [row["to_dense"] for row in wide], least=1.6),
        one("… over two F.linear under the same graph", [row["to_two_linear"] for row in wide], least=1.25),
        one("… whole decoder block: over the dense one", [row["to_dense"] for row in blocks["factors"]], least=1.7),
        one("… with int4", [row["to_dense"] for row in blocks["int4"]], least=3.0),
        one("512 tokens and more: over two F.linear", [row["to_two_linear"] for row in many], least=0.97),
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
    """Markdown: a row a problem, a column a variant: microseconds, and × dense, or what there is instead of it."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["group"], row["ratio"], row["tokens"]), {})[row["variant"]] = row
    lines = []
    for (model, group, ratio, tokens), some in groups.items():
        lines.append([f"{model} {group}", f"{ratio:g}", str(tokens), *(_cell(some.get(name)) for name in names)])
    return markdown(["layers", "size", "tokens", *names], lines)


def _cell(row: dict | None) -> str:
    if row is None or "error" in row:
        return "–" if row is None else "failed"
    against = row["to_dense"] or row["to_composition"]
    return f"{row['seconds'][1] * 1e6:.1f}" + ("" if against is None else f" ({against:.2f}x)")


def targets_table(found: list[dict]) -> str:
    lines = []
    for target in found:
        wanted = f"≥ {target['least']:g}" if target["least"] is not None else f"≤ {target['most']:g}"
        got = "not measured" if target["found"] is None else f"{target['found']:.2f}"
        lines.append([target["about"], wanted, got, "" if target["met"] is None else "yes" if target["met"] else "no"])
    return markdown(["target", "wanted", "worst case", "met"], lines)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(MODELS)}. Default: all.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Only these numbers; repeatable.")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Only these sizes; repeatable.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="Only these groups (q/k/v, o, MLP, block, …).")] = None,
    rounds: Annotated[int, typer.Option(help="Replays of every variant, in turns.")] = 40,
    eager_rounds: Annotated[int, typer.Option(help="Calls from Python of every variant, where they are timed.")] = 10,
    minutes: Annotated[float, typer.Option(help="Begin no case after so long.")] = math.inf,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the result's file holds.")] = False,
    device: Annotated[
        str, typer.Option(help="cpu: a rehearsal in Triton's interpreter, of toy sizes, not kept.")
    ] = "cuda",
    output: Annotated[
        pathlib.Path | None, typer.Option(help="Instead of bench/results/kernels_gpu-<device>.json.")
    ] = None,
):
    """Time of deployed and of masked layers on this GPU; writes bench/results/kernels_gpu-<device>.json."""
    on = torch.device(device)
    if on.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU: this benchmark measures one and nothing else")
    if on.type != "cuda" and output is None:
        raise typer.BadParameter("a rehearsal without a GPU needs --output: its times are no result")
    todo = problems(tuple(model or MODELS), tuple(tokens or FEW + MANY), tuple(ratio or RATIOS))
    todo = [problem for problem in todo if not group or problem.group in group]
    if on.type != "cuda":
        todo = [toy(problem) for problem in todo]
    path = output or result_path(torch.cuda.get_device_name())
    bench(todo, on, path, rounds, eager_rounds, minutes, resume)


def toy(problem: Problem) -> Problem:
    """The same with as few numbers as there may be, for Triton's interpreter."""
    hidden, q, kv, middle, _ = MODELS[problem.model]
    sizes = {hidden: 64, q: 64, kv: 32, middle: 96}
    members = tuple((sizes[out], sizes[in_]) for out, in_ in problem.members)
    return dataclasses.replace(problem, members=members, tokens=min(problem.tokens, 20))


def bench(todo: list[Problem], device, path: pathlib.Path, rounds, eager_rounds, minutes, resume) -> dict:
    """Measures `todo`, and writes what there is after each case. Begins a new process where the context is lost."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    result = files.read_json(path) if resume and path.exists() else None
    timer, cache = Timer(device, eager=False), torch.cuda.get_device_properties(device).L2_cache_size if gpu else 0
    if result is None:
        rate = streaming_rate(device, *(() if gpu else (1 << 20, 3)))
        table_ = measured.table(torch.device("cuda", torch.cuda.current_device())) if gpu else None
        result = {
            "device": report.device_description(device) | {"triton": _version("triton")},
            "streaming_bytes_per_s": rate,
            "tuned": None if table_ is None else table_.source,
            "rounds": rounds,
            "began": time.time(),
            "rows": [],
            "done": [],
        }
    rate, rows, done = result["streaming_bytes_per_s"], result["rows"], result["done"]
    typer.echo(f"{result['device']['device']}: reads {rate / 1e12:.2f} TB/s, L2 {cache >> 20} MiB")
    if result["tuned"]:
        typer.echo(f"configs of {result['tuned']}, where it holds them")
    left = [problem for problem in todo if problem.about not in done]
    typer.echo(f"{len(left)} cases, by importance" + (f", for {minutes:g} minutes" if minutes < math.inf else ""))

    def keep(problem: Problem, found: list[Variant]) -> None:
        made = rows_of(found, problem.about, rate)
        rows.extend(made)
        done.append(problem.about)
        result["targets"], result["left"] = targets(rows), len(left) - number - 1
        result["seconds"] = time.time() - result["began"]
        files.write_json(path, result)
        took = result["seconds"]
        rest = took / len(done) * result["left"]
        typer.echo(f"[{took / 60:.1f} min; {result['left']} cases left, about {rest / 60:.0f} min]\n{table(made)}")
        for row in made:
            if "error" in row:
                typer.echo(f"  {row['variant']} failed: {row['error']}")

    for number, problem in enumerate(left):
        if time.time() - result["began"] > 60 * minutes:
            typer.echo(f"time is up: {len(left) - number} cases are left, which --resume measures")
            break
        half = problem.ratio == 0.5 and problem.tokens == 1 and not problem.what
        found = []
        try:
            found = variants(problem, device, dtype, cache)
            measure(found, timer, rounds, eager_rounds if half else 0)
        except ContextLost as error:
            typer.echo(f"the GPU's context is lost ({error}): going on in a new process")
            keep(problem, found)
            sys.stdout.flush()
            again = [argument for argument in sys.argv[1:] if argument != "--resume"]
            os.execv(sys.executable, [sys.executable, "-m", "bench.kernels_gpu", *again, "--resume"])
        except Exception as error:  # of what is no variant's: memory, say
            found = [Variant("all", 0, [], error=described(error))]
        keep(problem, found)
        del found
        if gpu:
            torch.cuda.empty_cache()
            torch.compiler.reset()
    result["targets"] = targets(rows)
    files.write_json(path, result)
    typer.echo(targets_table(result["targets"]))
    return result


def result_path(device_name: str) -> pathlib.Path:
    name = "-".join(device_name.lower().split())
    return ROOT / "bench" / "results" / f"kernels_gpu-{name}.json"


def _version(package: str) -> str | None:
    from .decode_cpu import version_of

    return version_of(package)


if __name__ == "__main__":
    typer.run(main)
