"""What a layer of few tokens costs on a CPU: `python -m bench.decode_cpu`, with `--help` for its parts.

A linear layer at one token is bound by reading its weights, so a layer of half the size should take half the time. Here
that is measured, layer by layer and in turns, on weights that come from memory and not from a cache:

- "dense": `F.linear`; "two F.linear": a layer of two factors as one writes it in PyTorch, of many tokens "again", as
  ours are the same products there and what two equals differ by is to be known;
- "ours": `LowRankLinear`, its own choice of a way and its Python included, and the bare operator; "pivoted": the
  pivoted form at the same stored size; "int8" and "int4": the factors quantized;
- torch's own and torchao's weight-only int8 and int4 on the *dense* layer, where they can be had.

The floor is the rate at which the machine reads memory in one stream, measured in the same rounds.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from acip_kernels import LowRankLinear, PivotLinear, files, report
from acip_kernels.nn.quantized_linear import QuantizedLinear
from acip_kernels.ops import extension

from .training_step import ROOT, markdown

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1536, 576), (576, 576))  # [out, in]
WIDE = 4096  # layers with no side below this are those that memory alone should bound
RATIOS = (0.5, 0.25)
TOKENS = (1, 4, 8, 16)
MANY_TOKENS = (64, 256, 1024, 4096)
DTYPES = ("bfloat16", "float32")
GROUP = 64
# Between two uses of a copy of a layer this many times the last-level cache is read.
CACHES = 4
SECONDS_A_TURN = 0.015
SECONDS_A_CASE = 3.0
# Two runs of the same code differ by this much here: "no slower" means by no more.
NOISE = 0.03


# ---- shapes and copies


def rank_at(ratio: float, out: int, in_: int) -> int:
    """The rank, a multiple of 8, at which two factors hold `ratio` of a layer's weights."""
    return max(8, math.floor(ratio * out * in_ / (out + in_)) // 8 * 8)


def pivoted_rank_at(ratio: float, out: int, in_: int) -> int:
    """The largest ρ, a multiple of 8, with `ρ (out + in - ρ)` no more than two factors hold at `ratio`."""
    sides, stored = out + in_, rank_at(ratio, out, in_) * (out + in_)
    return max(8, math.floor((sides - math.sqrt(sides * sides - 4 * stored)) / 2) // 8 * 8)


def cache_bytes() -> int:
    """The last-level cache's size; 32 MiB where the system does not tell."""
    path = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    found = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()) if path.exists() else None
    return int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]] if found else 32 << 20


@dataclasses.dataclass
class Ring:
    """Copies of one layer, used one after the other by all variants that share them, so that none is in a cache."""

    items: list
    bytes: int
    at: int = 0

    @classmethod
    def of(cls, item, size: int, cache: int) -> Ring:
        """`item` and as many copies of it as it takes. size: the bytes that a call reads of it."""
        copies = math.ceil(CACHES * cache / size) + 1
        return cls([item, *(copy.deepcopy(item) for _ in range(copies - 1))], size)

    def take(self, count: int) -> list[int]:
        start, self.at = self.at, (self.at + count) % len(self.items)
        return [(start + i) % len(self.items) for i in range(count)]


@dataclasses.dataclass
class Variant:
    """One way to compute a layer. calls: for each item of `ring` what computes it."""

    name: str
    ratio: float | None
    rank: int | None
    ring: Ring
    calls: list[Callable[[], object]]
    count: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)

    def turn(self) -> float:
        """Seconds of one call, over as many as fill a turn."""
        sequence = [self.calls[i] for i in self.ring.take(self.count)]
        started = time.perf_counter()
        for call in sequence:
            call()
        return (time.perf_counter() - started) / len(sequence)

    def warm_up(self) -> None:
        """Lets every copy prepare what it prepares once, and finds out how many calls fill a turn."""
        for call in self.calls:
            call()
        taken = min(self.turn() for _ in range(3))
        self.count = max(1, min(len(self.calls), math.ceil(SECONDS_A_TURN / taken)))


# ---- the variants


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def module_bytes(module: nn.Module) -> int:
    return bytes_of(*module.parameters(), *module.buffers())


AGAIN = "two F.linear, again"


def two_linear(x: Tensor, Vh: Tensor, U: Tensor) -> Tensor:
    return F.linear(F.linear(x, Vh), U)


def weight(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, cols) * cols**-0.5).to(dtype)


def quantized(layer: LowRankLinear, kind: str) -> LowRankLinear:
    """`layer` with its factors rounded to integers, in place."""
    layer.Vh = QuantizedLinear.from_linear(layer.Vh, kind, group=GROUP)
    layer.U = QuantizedLinear.from_linear(layer.U, kind, group=GROUP)
    return layer


def dense_variants(out: int, in_: int, tokens: int, dtype: torch.dtype, cache: int, peers: bool) -> Iterator[Variant]:
    x = weight(tokens, in_, dtype)
    dense = weight(out, in_, dtype)
    ring = Ring.of(dense, bytes_of(dense), cache)
    yield Variant("dense", None, None, ring, [functools.partial(F.linear, x, w) for w in ring.items])
    if not peers or dtype != torch.bfloat16:
        return
    int8 = torch.randint(-127, 128, (out, in_), dtype=torch.int8), torch.rand(out, dtype=dtype) / 127
    ring = Ring.of(int8, bytes_of(*int8), cache)
    operator = torch.ops.aten._weight_int8pack_mm
    yield Variant("torch int8, dense", None, None, ring, [functools.partial(operator, x, *w) for w in ring.items])
    codes = torch.randint(0, 16, (out, in_), dtype=torch.int32)
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), torch.rand(in_ // GROUP, out, 2).to(dtype)
    ring = Ring.of(int4, bytes_of(*int4), cache)
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    calls = [functools.partial(operator, x, w, GROUP, scales) for w, scales in ring.items]
    yield Variant("torch int4, dense", None, None, ring, calls)
    if importlib.util.find_spec("torchao"):
        yield from torchao_variants(x, dense, cache)


def torchao_variants(x: Tensor, dense: Tensor, cache: int) -> Iterator[Variant]:
    """torchao's, compiled as it wants to be. Its int4 for a CPU is a prototype of it, on torch's own operator."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for name, bits, config in (
        ("torchao int8, dense", 8, Int8WeightOnlyConfig(set_inductor_config=False)),
        ("torchao int4, dense", 4, PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)),
    ):
        linear = nn.Linear(*reversed(dense.shape), bias=False, device="meta")
        linear.weight = nn.Parameter(dense, requires_grad=False)
        quantize_(linear, config)
        ring = Ring.of(linear.weight, dense.numel() * bits // 8, cache)
        compiled = torch.compile(lambda x, w: F.linear(x, w), dynamic=False)
        yield Variant(name, None, None, ring, [functools.partial(compiled, x, w) for w in ring.items])


def factor_variants(
    out: int, in_: int, ratio: float, tokens: int, dtype: torch.dtype, cache: int, few: bool
) -> Iterator[Variant]:
    """few: everything; else without the bare operator, which a module's call differs from by microseconds."""
    x, rank = weight(tokens, in_, dtype), rank_at(ratio, out, in_)

    def layer() -> LowRankLinear:
        return LowRankLinear.from_factors(weight(rank, in_, dtype), weight(out, rank, dtype)).requires_grad_(False)

    item = layer()
    ring = Ring.of(item, module_bytes(item), cache)
    factors = [(item.Vh.weight, item.U.weight) for item in ring.items]
    calls = [functools.partial(two_linear, x, *pair) for pair in factors]
    yield Variant("two F.linear", ratio, rank, ring, calls)
    if not few:  # where ours are the same products: what two equals differ by
        yield Variant(AGAIN, ratio, rank, ring, calls)
    yield Variant("ours", ratio, rank, ring, [functools.partial(item, x) for item in ring.items])
    if few and extension.available():
        operator, spec = torch.ops.acip.fused_linear, list(ring.items[0].spec())
        calls = [functools.partial(operator, x, list(pair), spec, 0) for pair in factors]
        yield Variant("ours, bare operator", ratio, rank, ring, calls)
    pivots = pivoted_rank_at(ratio, out, in_)
    is_pivot = torch.zeros(out, dtype=torch.bool)
    is_pivot[torch.randperm(out)[:pivots]] = True
    pivoted = PivotLinear.from_parts(weight(pivots, in_, dtype), weight(out - pivots, pivots, dtype), is_pivot)
    copies = Ring.of(pivoted.requires_grad_(False), module_bytes(pivoted), cache)
    yield Variant("ours, pivoted", ratio, pivots, copies, [functools.partial(item, x) for item in copies.items])
    for kind in ("int8", "int4") if dtype == torch.bfloat16 else ():
        item = quantized(layer(), kind)
        copies = Ring.of(item, module_bytes(item), cache)
        yield Variant(f"ours, {kind}", ratio, rank, copies, [functools.partial(item, x) for item in copies.items])


# ---- the machine's rate


class Stream:
    """How fast the machine reads memory in one stream: several ways are tried, and the fastest is the machine's."""

    def __init__(self, bytes_: int):
        self.buffer = torch.ones(bytes_ // 4)
        half = self.buffer.numel() // 2
        as_matrix = self.buffer.view(torch.bfloat16)[: bytes_ // 2 // 8192 * 8192].view(-1, 8192)
        x = torch.ones(1, 8192, dtype=torch.bfloat16)
        self.readers = {
            "sum of float32": lambda: self.buffer.sum(),
            "matrix × vector in float32": lambda: self.buffer.view(-1, 4096).mv(self.buffer[:4096]),
            "copy, bytes read and written": lambda: self.buffer[:half].copy_(self.buffer[half : 2 * half]),
        }
        if extension.available():
            spec = [0, 0, 0, 8192, 0]
            self.readers["fused_linear of one dense bfloat16 matrix"] = lambda: torch.ops.acip.fused_linear(
                x, [as_matrix], spec, 0
            )
        for reader in self.readers.values():
            reader()
        self.rates = {name: statistics.median(self.rate(name) for _ in range(7)) for name in self.readers}
        self.fastest = max(self.rates, key=self.rates.get)
        self.seen = [self.rates[self.fastest]]

    def rate(self, name: str) -> float:
        """Bytes a second."""
        started = time.perf_counter()
        self.readers[name]()
        return self.buffer.numel() * 4 / (time.perf_counter() - started)

    def measure(self) -> float:
        self.seen.append(self.rate(self.fastest))
        return self.seen[-1]


def instruction_rates() -> dict[str, dict[str, float]]:
    """How many 512-bit instructions of a kind start a second: on "one" thread, on "all" together.

    Empty where there are none, or no compiler.
    """
    compiler = shutil.which("c++")
    if extension.instruction_set() != "avx512_bf16" or compiler is None:
        return {}
    source = ROOT / "csrc" / "testing" / "instruction_rates.cpp"
    flags = ["-O2", "-std=c++17", "-mavx512f", "-mavx512bf16", "-pthread"]
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "rates"
        subprocess.run([compiler, *flags, source, "-o", program], check=True)
        done = subprocess.run([program, str(torch.get_num_threads())], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


# ---- measuring


def measure(variants: list[Variant], stream: Stream, rounds: tuple[int, int], place: dict) -> list[dict]:
    """All variants in turns: a row for each. rounds: at least so many; up to so many within `SECONDS_A_CASE`."""
    for variant in variants:
        variant.warm_up()
    (least, most), started, rates = rounds, time.perf_counter(), []
    for number in range(most):
        if number >= least and time.perf_counter() - started > SECONDS_A_CASE:
            break
        rates.append(stream.measure())
        # In another order each time, so that none always follows the same.
        for variant in random.Random(number).sample(variants, len(variants)):
            variant.seconds.append(variant.turn())
    by_case = {(variant.name, variant.ratio): variant.seconds for variant in variants}
    dense, rate = by_case.get(("dense", None)), statistics.median(rates)
    rows = []
    for variant in variants:
        median = statistics.median(variant.seconds)
        two = by_case.get(("two F.linear", variant.ratio))
        ours = by_case.get(("ours", variant.ratio))
        rows.append(
            {
                **place,
                "variant": variant.name,
                "ratio": variant.ratio,
                "rank": variant.rank,
                "bytes": variant.ring.bytes,
                "seconds": {"median": median, "min": min(variant.seconds), "max": max(variant.seconds)},
                "bytes_per_s": variant.ring.bytes / median,
                "stream_bytes_per_s": rate,
                "share_of_stream": statistics.median(
                    variant.ring.bytes / own / streamed for own, streamed in zip(variant.seconds, rates)
                ),
                "times_dense": speedup(variant.seconds, dense),
                "times_two": speedup(variant.seconds, two),
                "times_ours": speedup(variant.seconds, ours),
            }
        )
    return rows


def speedup(seconds: list[float], base: list[float] | None) -> float | None:
    """How many times as fast as `base`: the median over rounds, each of which saw the same machine."""
    return None if base is None else statistics.median(other / own for own, other in zip(seconds, base))


@torch.no_grad()
def bench(shapes, ratios, tokens, many_tokens, dtypes, rounds: int, peers: bool, stream: Stream, say) -> list[dict]:
    cache, rows = cache_bytes(), []
    for name, (out, in_), count in itertools.product(dtypes, shapes, (*tokens, *many_tokens)):
        say(f"{name}, {out} × {in_}, {count} tokens")
        torch.manual_seed(0)
        dtype, few = getattr(torch, name), count in tokens
        variants = list(dense_variants(out, in_, count, dtype, cache, peers)) if few else []
        for ratio in ratios:
            variants += factor_variants(out, in_, ratio, count, dtype, cache, few)
        place = {"out": out, "in": in_, "dtype": name, "tokens": count}
        rows += measure(variants, stream, (rounds, rounds) if few else (max(5, rounds // 3), 4 * rounds), place)
        torch.compiler.reset()  # torchao's, compiled for this shape
    return rows


# ---- the targets


def targets(rows: list[dict]) -> list[dict]:
    """Each target of what this should show, `{"target", "least", "worst", "where", "met"}`, over what was measured."""

    def of(variant, key, least, what, **wanted) -> dict | None:
        found = [
            (row[key], row)
            for row in rows
            if row["variant"] == variant
            and row[key] is not None
            and all(test(row[field]) if callable(test) else row[field] == test for field, test in wanted.items())
        ]
        if not found:
            return None
        worst, row = min(found, key=lambda pair: pair[0])
        size = "" if row["ratio"] is None else f", {100 * row['ratio']:.0f} %"
        where = f"{row['out']} × {row['in']}, {row['dtype']}, {row['tokens']} tokens{size}"
        return {"target": what, "least": least, "worst": worst, "where": where, "met": worst >= least}

    # What is noise they say themselves, in the same rounds.
    nowhere, noise = 1 - NOISE, f"{100 * NOISE:.0f} % is noise"
    if same := [row["times_two"] for row in rows if row["variant"] == AGAIN]:
        nowhere = min(nowhere, *same)
        noise += f", or more where they are slower than themselves by more: {min(same):.2f} to {max(same):.2f}"
    few, one = (lambda tokens: tokens in (4, 8, 16)), {"tokens": 1, "dtype": "bfloat16"}
    wide = {"out": lambda out: out >= WIDE, "in": lambda in_: in_ >= WIDE}
    narrow = {"in": 576}
    listed = [
        of("ours", "share_of_stream", 0.9, "one token, 4096 and wider: share of the streaming rate", **one, **wide),
        of("ours", "times_dense", 3, "one token, 4096 and wider, 50 %: × dense", **one, **wide, ratio=0.5),
        of("ours", "times_dense", 6, "one token, 4096 and wider, 25 %: × dense", **one, **wide, ratio=0.25),
        of("ours", "times_two", 1.8, "one token, 4096 and wider: × two F.linear", **one, **wide),
        of("ours", "times_two", 3, "one token, 576 wide: × two F.linear", **one, **narrow),
        of("ours", "times_two", 1.3, "4, 8 and 16 tokens: × two F.linear", tokens=few, dtype="bfloat16"),
        of("ours", "times_dense", 2, "4, 8 and 16 tokens, 50 %: × dense", tokens=few, dtype="bfloat16", ratio=0.5),
        of("ours", "times_two", 2, "float32, 4, 8 and 16 tokens: × two F.linear", tokens=few, dtype="float32"),
        of("ours, int8", "times_ours", 1.7, "int8, one token, 4096 and wider: × ours in bfloat16", **one, **wide),
        of("ours, int4", "times_ours", 2.8, "int4, one token, 4096 and wider: × ours in bfloat16", **one, **wide),
        of("ours", "times_two", nowhere, f"slower than two F.linear nowhere ({noise})"),
    ]
    return [target for target in listed if target]


# ---- what people read


def table(rows: list[dict]) -> str:
    def times(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    lines = [
        [
            f"{row['out']} × {row['in']}",
            row["variant"],
            "–" if row["ratio"] is None else f"{100 * row['ratio']:.0f} %",
            f"{row['tokens']}",
            f"{1e6 * row['seconds']['median']:,.1f}",
            f"{row['bytes_per_s'] / 1e9:.1f}",
            f"{100 * row['share_of_stream']:.0f} %",
            times(row["times_dense"]),
            times(row["times_two"]),
        ]
        for row in rows
    ]
    head = ["layer", "variant", "size", "tokens", "µs", "GB/s", "of the stream", "× dense", "× two F.linear"]
    return markdown(head, lines, left=2)


def short_table(rows: list[dict]) -> str:
    """A line for each layer, size and number of tokens: what matters of `table`."""
    cases = {}
    for row in rows:
        cases.setdefault((row["out"], row["in"], row["ratio"], row["tokens"]), {})[row["variant"]] = row
    lines = []
    for (out, in_, ratio, tokens), found in cases.items():
        if ratio is None:
            continue
        ours, dense = found["ours"], cases.get((out, in_, None, tokens), {}).get("dense")
        shown = (
            dense,
            *(found.get(name) for name in ("two F.linear", "ours", "ours, pivoted", "ours, int8", "ours, int4")),
        )
        lines.append(
            [
                f"{out} × {in_}",
                f"{100 * ratio:.0f} %",
                f"{tokens}",
                *(microseconds(row) for row in shown),
                f"{100 * ours['share_of_stream']:.0f} %",
                "–" if ours["times_dense"] is None else f"{ours['times_dense']:.2f}",
                f"{ours['times_two']:.2f}",
            ]
        )
    head = ["layer", "size", "tokens", "dense µs", "two F.linear", "ours", "pivoted", "int8", "int4"]
    return markdown([*head, "ours of the stream", "ours × dense", "ours × two F.linear"], lines)


def peers_table(rows: list[dict]) -> str:
    """Weight-only quantization of the dense layer by others: a line for each layer and number of tokens."""
    names = list(dict.fromkeys(row["variant"] for row in rows if row["ratio"] is None))
    cases = {}
    for row in rows:
        if row["ratio"] is None:
            cases.setdefault((row["out"], row["in"], row["tokens"]), {})[row["variant"]] = row
    lines = [
        [f"{out} × {in_}", f"{tokens}", *(microseconds(found.get(name)) for name in names)]
        for (out, in_, tokens), found in cases.items()
    ]
    return markdown(["layer", "tokens", *(f"{name}, µs" for name in names)], lines)


def microseconds(row: dict | None) -> str:
    return "–" if row is None else f"{1e6 * row['seconds']['median']:,.1f}"


def targets_table(found: list[dict]) -> str:
    lines = [
        [
            target["target"],
            f"{target['least']:g}",
            f"{target['worst']:.2f}",
            target["where"],
            "met" if target["met"] else "not met",
        ]
        for target in found
    ]
    return markdown(["target", "at least", "worst measured", "where", ""], lines)


def stream_line(stream: dict) -> str:
    tried = "; ".join(f"{name} {rate / 1e9:.1f}" for name, rate in stream["rates"].items())
    return (
        f"The machine streams {stream['median'] / 1e9:.1f} GB/s ({stream['fastest']}, median over the run; in GB/s "
        f"at its start: {tried}).\n"
    )


def instructions_line(rates: dict[str, dict[str, float]]) -> str:
    """Empty where nothing was measured."""
    if not rates:
        return ""
    each = ", ".join(f"{kind} {rate['one'] / 1e9:.2f} and {rate['all'] / 1e9:.2f}" for kind, rate in rates.items())
    return f"512-bit instructions, in 10⁹ a second, on one thread and on all together: {each}."


def result_path(device_name: str, kind: str = "decode_cpu") -> pathlib.Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{kind}-{slug}.json"


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def shape_of(text: str) -> tuple[int, int]:
    out, _, in_ = text.partition("x")
    return int(out), int(in_)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="Only this one, OUTxIN (repeatable).")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Only this size (repeatable).")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Only this many tokens (repeatable).")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float32; both if not given.")] = None,
    many: Annotated[
        bool, typer.Option("--many", help=f"At {', '.join(map(str, MANY_TOKENS))} tokens too, against two F.linear.")
    ] = False,
    peers: Annotated[bool, typer.Option(help="torch's and torchao's int8 and int4 on the dense layer.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 15,
    stream_mib: Annotated[int, typer.Option(help="What is read for the machine's rate.")] = 1024,
    store: Annotated[bool, typer.Option(help="Write the result under bench/results.")] = True,
):
    """Time low-rank layers of few tokens on this CPU, against dense ones and against the machine's memory."""

    def say(text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    if not extension.available():
        say(f"there are no native kernels here, so “ours” is two F.linear: {extension.missing}")
    if peers and not importlib.util.find_spec("torchao"):
        say("torchao is not installed: its int8 and int4 are not measured")
    instructions = instruction_rates()
    stream = Stream(stream_mib << 20)
    shapes = [shape_of(text) for text in shape] if shape else SHAPES
    settings = (tuple(ratio or RATIOS), tuple(tokens or TOKENS), MANY_TOKENS if many else (), tuple(dtype or DTYPES))
    rows = bench(shapes, *settings, rounds, peers, stream, say)
    summary = {
        "device": report.device_description("cpu")
        | {"instruction_set": extension.instruction_set(), "torchao": version_of("torchao")},
        "setting": {"rounds": rounds, "cache_bytes": cache_bytes(), "caches": CACHES, "group": GROUP},
        "stream": {"rates": stream.rates, "fastest": stream.fastest, "median": statistics.median(stream.seen)},
        "instructions": instructions,
        "rows": rows,
        "targets": targets(rows),
    }
    for name in dict.fromkeys(row["dtype"] for row in rows):
        print(f"\n{name}\n")
        print(table([row for row in rows if row["dtype"] == name]))
    print(stream_line(summary["stream"]))
    print(instructions_line(instructions))
    print(targets_table(summary["targets"]))
    if store:
        path = result_path(summary["device"]["device"])
        files.write_json(path, summary)
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
