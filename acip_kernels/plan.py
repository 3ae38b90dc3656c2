"""Which way to compute a layer: from counted operations, and the rates that a machine was measured to have."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

ROUTES = ("factored", "effective")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """How a masked SVD layer is computed in a training step.

    route: "factored", products through the live rank; or "effective", dense products with `W = U diag(S β) Vh` (see
    `ops.masked_svd_linear.effective`). operations: of each route in one optimizer step, multiplications and additions
    counted separately, `{route: number}`.
    """

    route: str
    operations: dict[str, int]

    def __str__(self) -> str:
        costs = ", ".join(f"{name} {count / 1e9:.2f} GFLOP" for name, count in self.operations.items())
        return f"{self.route} ({costs} a step)"


def training_operations(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    adapter_rank: int = 0,
    *,
    batches: int = 1,
    dropout: bool = False,
) -> dict[str, int]:
    """Operations of a layer's forward and backward pass in one optimizer step, by route.

    tokens: of one batch; batches: how many are accumulated before a step. rank: live ranks. With `T = tokens`,
    `n + m = in_features + out_features`, `ρ = rank` and `r = adapter_rank`:

    - factored: `z`, `y`, `h` and `∂x` are `2 T (ρ + r) (n + m)` each two, `∂A` and `∂B` `2 T r (n + m)` together:
      `T (4 ρ + 6 r) (n + m)` for every batch.
    - effective: `y`, `∂x` and `M = gᵀ x` are `6 T n m` for every batch; then `Uᵀ M` is `2 n m ρ` for a step. Without
      dropout, the adapter is added to `W` in each pass (`4 n m r` a batch) and `∂A`, `∂B` follow from `M`
      (`4 n m r` a step); with dropout it is computed beside it, `6 T r (n + m)`.

    What updates `W` when an entry dies (`2 n m` for each) is left out: deaths are few in a step.
    """
    both, area = in_features + out_features, in_features * out_features
    if dropout:
        adapter_batch, adapter_step = 6 * tokens * adapter_rank * both, 0
    else:
        adapter_batch, adapter_step = 4 * area * adapter_rank, 4 * area * adapter_rank
    return {
        "factored": batches * tokens * (4 * rank + 6 * adapter_rank) * both,
        "effective": batches * (6 * tokens * area + adapter_batch) + 2 * area * rank + adapter_step,
    }


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a layer holds while it is trained.

    frozen: factors, their live copies, the dense weight. trained: masks and adapters with gradients and AdamW's two
    moments. kept: for the backward pass of one batch.
    """

    frozen: int
    trained: int
    kept: int


def training_memory(
    tokens: int,
    in_features: int,
    out_features: int,
    full_rank: int,
    rank: int,
    adapter_rank: int = 0,
    *,
    route: str = "factored",
    dropout: bool = False,
    save_z: bool = True,
    itemsize: int = 4,
) -> TrainingMemory:
    """What `TrainingStep` holds of one layer, in bytes, with `itemsize` bytes a number of the model's dtype.

    rank: computed ranks `ρ`; `k = full_rank`, the rest as in `training_operations`. With everything computed the
    factors lie once, beside the adapter's copy: `(k + r)(n + m)`; once compacted, the live ones are copied,
    `(ρ + r)(n + m)` more; the effective route adds `n m`. Trained, in float32: four times `k + r (n + m)`. Kept: `T n`
    for the layer's input (once for all layers that share it), and `T (ρ + r)` for `z` unless it is computed again; on
    the effective route `T r` with dropout instead. Singular values and scores, `k` numbers each, are left out.
    """
    both = in_features + out_features
    frozen = (full_rank + adapter_rank) * both
    if rank < full_rank:
        frozen += (rank + adapter_rank) * both
    if route == "effective":
        frozen += in_features * out_features
        kept = adapter_rank if dropout else 0
    else:
        kept = rank + adapter_rank if save_z else 0
    return TrainingMemory(
        frozen * itemsize, 4 * 4 * (full_rank + adapter_rank * both), tokens * (in_features + kept) * itemsize
    )


def run_memory(
    shapes: Iterable[tuple[int, int]],
    rest: int,
    *,
    method: str = "nested",
    processes: int = 1,
    shard: bool = False,
    rank: int = 32,
    teacher: bool = True,
    itemsize: int = 2,
) -> dict[str, int]:
    """What each process of a run holds on its device, in bytes, without activations; see `docs/many-devices.md`.

    shapes: `(out, in)` of every factorized layer, with `k` the smaller of the two. rest: numbers in the rest of the
    model. method: "nested" or "acip". rank: of the updates, or of the adapters. teacher: whether the dense model
    teaches (nested). itemsize: bytes a number of the model's dtype. The terms, `N` being 1 without `shard`:

    - calibration: the dense model, and in float64 second moments of every layer's inputs and gradients, which are
      always divided: `itemsize (Σ out in + rest) + 8 Σ (in² + out²) / processes`; acip's plain basis needs none.
    - rest: `itemsize rest`, in every process.
    - factors: `itemsize Σ k (out + in) / N`; of nested `4 Σ k (out + in) / N` more, what the updates are added to.
    - teacher: `itemsize Σ out in / N`.
    - trained: parameter, gradient and AdamW's moments in float32, in every process: `16 Σ r (out + in + 2 k)` of
      nested, `16 Σ (k + r (out + in))` of acip.
    - gathered: of sharded factors, the layer that is computed with: twice `itemsize k (out + in)` of the largest, as it
      arrives and as it is used.
    """
    if method not in ("nested", "acip"):
        raise ValueError(f"method must be nested or acip, got {method!r}")
    shapes, nested, parts = list(shapes), method == "nested", processes if shard else 1

    def total(of: Callable[[int, int, int], int]) -> int:
        return sum(of(out, in_, min(out, in_)) for out, in_ in shapes)

    numbers, weights = total(lambda out, in_, k: k * (out + in_)), total(lambda out, in_, k: out * in_)
    moments = 8 * total(lambda out, in_, k: out * out + in_ * in_) if nested else 0
    adapters = 0 if nested else rank
    if nested:
        trained = total(lambda out, in_, k: rank * (out + in_ + 2 * k))
    else:
        trained = total(lambda out, in_, k: k + rank * (out + in_))
    # A run of whole factors has copies of the adapters among them.
    joined = 0 if shard else total(lambda out, in_, k: adapters * (out + in_))
    largest = max(min(shape) * sum(shape) for shape in shapes)
    return {
        "calibration": itemsize * (weights + rest) + -(-moments // processes),
        "rest": itemsize * rest,
        "factors": -(-(itemsize + 4 * nested) * numbers // parts) + itemsize * joined,
        "teacher": -(-itemsize * weights // parts) if nested and teacher else 0,
        "trained": 16 * trained,
        "gathered": 2 * itemsize * largest if shard else 0,
    }


# The share of the operations that the effective route has to save to be worth it: it holds a dense W beside the
# factors, its adapter's products are apart, and the masks' gradients are passes over matrices of W's size. Where
# products are in two bytes, and fast, these weigh more (`bench.training_routes`).
MARGIN, MARGIN_OF_TWO_BYTES = 0.05, 0.2


def training_plan(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    adapter_rank: int = 0,
    *,
    batches: int = 1,
    dropout: bool = False,
    itemsize: int = 4,
    route: str = "auto",
) -> TrainingPlan:
    """The cheaper route for a layer, see `training_operations`; or the one that `route` names.

    Matrix products dominate either route at training's token counts, so the operations decide, with a margin for what
    is beside them that depends on `itemsize`, the bytes of a number; `bench/training_routes.py` checks that against
    measured time.
    """
    if route not in ("auto", *ROUTES):
        raise ValueError(f"route must be 'auto' or one of {', '.join(ROUTES)}, got {route!r}")
    operations = training_operations(
        tokens, in_features, out_features, rank, adapter_rank, batches=batches, dropout=dropout
    )
    if route == "auto":
        margin = MARGIN_OF_TWO_BYTES if itemsize <= 2 else MARGIN
        cheap = operations["effective"] < (1 - margin) * operations["factored"]
        route = "effective" if cheap else "factored"
    return TrainingPlan(route, operations)


# ---- deployed layers


def few_tokens(dtype: torch.dtype, weights: str = "plain") -> int:
    """Up to how many tokens the native CPU kernels compute a deployed layer; of more, torch's products are faster.

    Measured with AVX-512 and its bfloat16 instructions (`bench.decode_cpu`), over layers of all sizes; 32 with others.
    Above it quantized weights are made plain once a call, by the native extension, which also brings a pivoted layer's
    outputs into order.

    Args:
        dtype: of the activations: float32, bfloat16 or float16.
        weights: "plain", "int8" or "int4".

    Returns:
        A number of tokens; 0 where the native extension is not built.
    """
    from .ops import extension  # which imports this module

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    if dtype not in names or weights not in ("plain", "int8", "int4"):
        raise ValueError(
            f"few_tokens: dtype must be float32, bfloat16 or float16, and weights 'plain', 'int8' or 'int4'; "
            f"got {dtype}, {weights!r}"
        )
    if not extension.available():
        return 0
    return extension.module.few_tokens(names[dtype], weights)


# ---- deployed layers on a GPU


@dataclasses.dataclass(frozen=True)
class Device:
    """What a GPU was built for, from its vendor's datasheet.

    multiprocessors. bandwidth: of its memory, bytes a second. matrix_rate, vector_rate: dense bfloat16 products with
    float32 sums, and float32 multiply-adds, operations a second (two for a multiply-add). shared_bytes: that a block
    may have. threads: that a multiprocessor holds. gap: seconds between two launches of which one waits for the other,
    in a graph; pdl_gap: with programmatic dependent launch, None where there is none. target: what Triton compiles for.
    fp8: whether it has instructions that make halves of two e4m3 numbers (`ops.quantize`); others do it bit by bit.
    """

    name: str
    multiprocessors: int
    bandwidth: float
    matrix_rate: float
    vector_rate: float
    shared_bytes: int
    threads: int
    gap: float
    pdl_gap: float | None
    target: str
    fp8: bool = False

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 64 if self.target.startswith("gfx") else 32


# NVIDIA: "A100 Tensor Core GPU Architecture" and "H100 Tensor Core GPU Architecture" (SXM parts), the datasheets of
# H200 and L40S, and the "Ada GPU Architecture" paper (RTX 4090; tensor rates with float32 sums); shared memory and
# threads from the CUDA C++ programming guide's table of compute capabilities; e4m3 from sm_89 on by the PTX manual's
# `cvt.f16x2.e4m3x2`. AMD: the MI300X datasheet and the CDNA 3 paper; its e4m3 is another one (e4m3fnuz: another bias,
# no negative zero). The gaps are assumed, not published and not measured yet.
DEVICES = {
    device.name: device
    for device in (
        Device("A100", 108, 2.039e12, 312e12, 19.5e12, 163 << 10, 2048, 2e-6, None, "sm_80"),
        Device("H100", 132, 3.35e12, 989e12, 66.9e12, 227 << 10, 2048, 2e-6, 0.7e-6, "sm_90", True),
        Device("H200", 132, 4.8e12, 989e12, 66.9e12, 227 << 10, 2048, 2e-6, 0.7e-6, "sm_90", True),
        Device("L40S", 142, 0.864e12, 362e12, 91.6e12, 99 << 10, 1536, 2e-6, None, "sm_89", True),
        Device("RTX 4090", 128, 1.008e12, 165e12, 82.6e12, 99 << 10, 1536, 2e-6, None, "sm_89", True),
        Device("MI300X", 304, 5.3e12, 1307e12, 163.4e12, 64 << 10, 2048, 4e-6, None, "gfx942"),
    )
}


@functools.cache
def device_of(device: torch.device) -> Device:
    """The entry of `DEVICES` for a GPU, or one made of what its driver says; where kernels are interpreted, H100."""
    if device.type != "cuda":
        return DEVICES["H100"]
    found = torch.cuda.get_device_properties(device)
    for name, known in DEVICES.items():
        if name in found.name:
            return dataclasses.replace(known, multiprocessors=found.multi_processor_count)
    # Two transfers a clock of a bus that is as wide as it says; and rates of the A100 for each multiprocessor.
    like, share = DEVICES["A100"], found.multi_processor_count / DEVICES["A100"].multiprocessors
    bandwidth = 2e3 * getattr(found, "memory_clock_rate", 0) * getattr(found, "memory_bus_width", 0) / 8
    return dataclasses.replace(
        like,
        name=found.name,
        multiprocessors=found.multi_processor_count,
        bandwidth=bandwidth or like.bandwidth * share,
        matrix_rate=like.matrix_rate * share,
        vector_rate=like.vector_rate * share,
        shared_bytes=getattr(found, "shared_memory_per_block_optin", 48 << 10),
        threads=found.max_threads_per_multi_processor,
        pdl_gap=DEVICES["H100"].pdl_gap if torch.version.cuda and found.major >= 9 else None,
        fp8=bool(torch.version.cuda) and (found.major, found.minor) >= (8, 9),
    )


# Of a weight: (rows, columns, kind, group), the kind as `ops.fused_linear` numbers them.
Weight = tuple[int, int, int, int]
_BITS = {1: 8, 2: 4, 3: 4, 4: 8}  # of a kind; plain ones are as wide as the activations
_INT4 = (2, 3)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How `ops.fused_linear.triton` reads the weights of one launch.

    rows, k: of a weight's tile that a program reads at a time. splits: parts of the columns, a program each (of first
    factors alone). warps: of a program. pdl: whether a second launch may start before the first has ended.
    """

    rows: int = 16
    k: int = 64
    splits: int = 1
    warps: int = 4
    pdl: bool = False

    def split(self, cols: int) -> tuple[int, int]:
        """How many splits there are of `cols` columns, none of them empty, and the columns of each but the last."""
        step = max(self.k, 64)
        span = -(-cols // (self.splits * step)) * step
        return -(-cols // span) if cols else 1, max(span, step)

    def constants(self, tokens: int) -> dict:
        """The kernels' constants that follow from this."""
        return {"DOT": tokens > 1, "ROWS": self.rows, "K": self.k, "T": 16 if tokens > 1 else 1}

    def options(self) -> dict:
        """Triton's launch options."""
        # Loads run ahead by one tile in the source; Triton's own pipelining would hold them in shared memory.
        return {"num_warps": self.warps, "num_stages": 1} | ({"launch_pdl": True} if self.pdl else {})


def why_not(config: DecodeConfig, device: Device, tokens: int, weights: tuple[Weight, ...], split: bool) -> str | None:
    """What makes `config` illegal, or None: the one rule of the choice, the tests and whoever tunes."""
    powers = (config.rows, config.k, config.warps)
    if any(n < 1 or n & (n - 1) for n in powers):
        return "tiles and warps must be powers of two"
    if tokens > 1 and (config.rows < 16 or config.k < 32):
        return "tensor cores take tiles of at least 16 rows and 32 columns"
    packed = any(kind in _INT4 for _, _, kind, _ in weights)
    if packed and tokens > 1 and config.k != 64:
        return "of several tokens int4 is read 64 columns at a time"
    threads = device.lanes * config.warps
    if threads > 1024:
        return "a program has up to 1024 threads"
    elements = config.rows * config.k / (2 if packed else 1) / threads
    # More than this was seen to spill, ahead of time; on AMD a thread of eight warps has half as many registers.
    amd = device.lanes == 64
    if elements > (32 if amd else 64):
        return "a tile of so many elements a thread does not stay in registers"
    # Split sums are float32, and all of a tile's inputs are there at once.
    inputs = 16 * config.k / threads
    if tokens > 1 and not packed and (elements + inputs > 80 or (amd and inputs > 8)):
        return "a tile and its inputs of several tokens do not stay in registers"
    # Of two bytes, or of one: what float32 is has twice as much.
    if elements * (2 if any(kind == 0 for _, _, kind, _ in weights) else 1) < (1 if packed else 16):
        return "a thread would read less than 16 bytes at a time"
    if config.splits > 1 and not split:
        return "only first factors are split"
    if config.splits > 1 and min(cols for _, cols, _, _ in weights) < config.splits * max(config.k, 64):
        return "a split would be less than a tile"
    if config.pdl and device.pdl_gap is None:
        return f"{device.name} has no programmatic dependent launch"
    return None


def decode_configs(
    device: Device, tokens: int, weights: tuple[Weight, ...], split: bool = False
) -> Iterator[tuple[DecodeConfig, str | None]]:
    """Every config that is thought of, with what makes it illegal."""
    for rows, k, warps, splits in itertools.product(
        (1, 2, 4, 8, 16, 32, 64, 128), (64, 128, 256, 512, 1024, 2048), (2, 4, 8), (1, 2, 4, 8, 16) if split else (1,)
    ):
        config = DecodeConfig(rows, k, splits, warps, device.pdl_gap is not None)
        yield config, why_not(config, device, tokens, weights, split)


# From asking for a cache line of memory to having it, about, on all of these devices.
_LATENCY = 7e-7


def decode_seconds(
    config: DecodeConfig,
    device: Device,
    tokens: int,
    weights: tuple[Weight, ...],
    itemsize: int = 2,
    together: bool = False,
    split: bool = False,
) -> float:
    """The model of one launch: its weights at memory's rate, and what was measured to come on top of that.

    Fitted to 608 configs of Triton's launches for Llama-3.1-8B's layers on an H100, one token, in bfloat16, int8 and
    int4 (`bench.decode_configs`): of 18 launches, what it takes to be fastest is within 8 % of the fastest one measured
    in 16, and within 23 % in all. Terms:

    - a round of programs, as many as fit at once, waits for memory with each tile of its columns;
    - arithmetic, slower where fewer than 24 warps on a multiprocessor hide each other's latencies;
    - starting a program;
    - sums that were split, which every program of the next launch reads again.
    """
    total = sum(rows * cols * _BITS.get(kind, 8 * itemsize) / 8 for rows, cols, kind, _ in weights)
    packed = any(kind in _INT4 for _, _, kind, _ in weights)
    threads = device.lanes * config.warps
    elements = config.rows * config.k / (2 if packed else 1) / threads
    # As ptxas gives them out; a thread holds a tile's weights, inputs and sums.
    registers = min(255, (28 if split else 44) + 2.4 * elements * (1.2 if packed else 1) * max(1, itemsize / 2))
    resident = max(1, min(int(65536 / (registers * threads)), device.threads // threads, 32))
    counts = [-(-rows // config.rows) for rows, _, _, _ in weights]
    programs = max(1, max(counts) if together else sum(counts)) * config.splits
    columns = max(cols for _, cols, _, _ in weights)
    tiles = -(-columns // (config.splits * config.k))
    on_each = programs / device.multiprocessors
    rounds = max(1.0, on_each / resident)
    waits = (rounds + math.ceil(rounds)) / 2 * (0.56e-6 + 0.39e-6 * tiles * (2 if together else 1))
    # Masked lanes of a last tile work too. Of several tokens, tensor cores work on 16.
    work = sum(rows * cols for rows, cols, _, _ in weights) * tiles * config.splits * config.k / columns
    rate = device.vector_rate / 5.5 if tokens == 1 else device.matrix_rate / 32
    arithmetic = work / rate / min(1.0, min(on_each, resident) * config.warps / 24)
    sums = 4 * tokens * config.splits * sum(rows for rows, _, _, _ in weights) if split else 0
    gap = device.pdl_gap if config.pdl else device.gap
    return total / device.bandwidth + waits + arithmetic + 2e-10 * programs + 1.45e-10 * sums + gap


def one_launch_seconds(
    device: Device, stages: list[list[Weight]], itemsize: int = 2, ahead: int = 160 << 10
) -> tuple[float, float]:
    """Memory's time for all weights of `stages`, and the model of the CUDA kernels' one cooperative launch over them.

    At a barrier between two stages sums are written, every block is heard of, and the sums are read: three times
    memory's latency, assumed as that is, and not measured. Meanwhile weights keep coming, up to `ahead` bytes for each
    multiprocessor and no more than the next stage has; what is left of the barrier then is waited for.
    """
    sizes = [sum(r * c * _BITS.get(kind, 8 * itemsize) / 8 for r, c, kind, _ in stage) for stage in stages]
    floor = sum(sizes) / device.bandwidth
    covered = [min(ahead * device.multiprocessors, size) / device.bandwidth for size in sizes[1:]]
    return floor, floor + _LATENCY + sum(max(0.0, 3 * _LATENCY - time) for time in covered)


class Launch(NamedTuple):
    """What a config is chosen for: the weights of one launch, and how it reads them.

    split: of first factors. together: a program makes the same rows of two weights (SwiGLU). itemsize: of activations.
    """

    tokens: int
    weights: tuple[Weight, ...]
    split: bool = False
    together: bool = False
    itemsize: int = 2


@functools.lru_cache(maxsize=4096)
def _legal_configs(
    device: Device, tokens: int, kinds: tuple[int, ...], columns: int, split: bool
) -> tuple[DecodeConfig, ...]:
    """Of weights of these kinds, the narrowest of `columns`: the rule asks for no more, and models have few of them."""
    weights = tuple((1, columns, kind, 0) for kind in kinds)
    return tuple(config for config, reason in decode_configs(device, tokens, weights, split) if reason is None)


@functools.lru_cache(maxsize=4096)
def decode_candidates(device: Device, launch: Launch) -> tuple[DecodeConfig, ...]:
    """All legal configs of a launch, the one first that the model takes to be the fastest."""
    tokens, weights, split, together, itemsize = launch
    kinds, columns = tuple(sorted({kind for _, _, kind, _ in weights})), min(cols for _, cols, _, _ in weights)
    legal = _legal_configs(device, min(tokens, 2), kinds, columns, split)

    # The fewest splits and the smallest tile of those that are equally fast, so that the order is one.
    def cost(c: DecodeConfig) -> tuple:
        seconds = decode_seconds(c, device, tokens, weights, itemsize, together, split)
        return seconds, c.splits, c.rows * c.k, c.warps, c.k

    return tuple(sorted(legal, key=cost))


def decode_config(
    device: Device,
    tokens: int,
    weights,
    *,
    split: bool = False,
    together: bool = False,
    itemsize: int = 2,
    table: Table | None = None,
) -> DecodeConfig:
    """The config for one launch over `weights`, a list of `Weight` (see `Launch`).

    That of `table`, if it holds one for this launch; else the one that the model takes to be the fastest.
    """
    launch = Launch(tokens, tuple(weights), split, together, itemsize)
    measured = None if table is None else table.config(launch)
    return measured or decode_candidates(device, launch)[0]


# ---- what was measured on a GPU


class Problem(NamedTuple):
    """A whole call of `ops.fused_linear` but for its tensors: mode, spec, and the rows of every matrix."""

    tokens: int
    mode: int
    spec: tuple[int, ...]
    rows: tuple[int, ...]
    itemsize: int = 2


class Times(NamedTuple):
    """Seconds of a problem: of our kernels and of torch's products, replayed as a CUDA graph and called from Python."""

    graph: float
    graph_torch: float
    eager: float
    eager_torch: float

    def ours_is_faster(self, graph: bool) -> bool:
        return self.graph < self.graph_torch if graph else self.eager < self.eager_torch


class CudaConfig(NamedTuple):
    """How `ops.fused_linear.cuda` computes a problem, see its `forward`."""

    launch: str = "automatic"
    splits: int = 0
    bulk: bool = True


def stands_for(measured: int, tokens: int) -> bool:
    """Whether what was measured at `measured` tokens is taken for `tokens`, if nothing nearer was measured.

    One token has kernels of its own. Of more, the time grows with their number, if little: up to those measured.
    """
    return measured == tokens == 1 or measured >= tokens > 1


@dataclasses.dataclass(frozen=True)
class Table:
    """What `acip tune` has measured on one GPU.

    source: where it comes from, for messages. cuda: of the problems of which `times` are those of the CUDA C++ kernels,
    how these compute them; Triton's have the others. Raises `ValueError`, which names the source, for a config that is
    not legal on `device` (see `why_not`).
    """

    device: Device
    source: str
    configs: Mapping[Launch, DecodeConfig]
    times: Mapping[Problem, Times]
    cuda: Mapping[Problem, CudaConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for launch, config in self.configs.items():
            reason = why_not(config, self.device, launch.tokens, launch.weights, launch.split)
            if reason is not None:
                raise ValueError(f"{self.source}: {config} of {launch} cannot be taken: {reason}")
        for problem, times in self.times.items():
            if not all(math.isfinite(seconds) and seconds > 0 for seconds in times):
                raise ValueError(f"{self.source}: seconds of {problem} must be positive, got {tuple(times)}")

    @functools.cached_property
    def tokens(self) -> tuple[int, ...]:
        """At how many tokens anything was measured, rising."""
        return tuple(sorted({key.tokens for key in (*self.configs, *self.times)}))

    def config(self, launch: Launch) -> DecodeConfig | None:
        return self._nearest(self.configs, launch)

    def cuda_config(self, problem: Problem) -> CudaConfig | None:
        """How the CUDA C++ kernels are to compute `problem`; None if Triton's are."""
        count = self._nearest_count(self.times, problem)
        return None if count is None else self.cuda.get(problem._replace(tokens=count))

    def is_faster(self, problem: Problem, graph: bool) -> bool:
        """Whether our kernels were measured to be faster than torch's products, in a CUDA graph or from Python."""
        times = self._nearest(self.times, problem)
        return times is not None and times.ours_is_faster(graph)

    def pays(self, graph: bool) -> bool:
        """Whether `is_faster` is true of any problem."""
        return self._pays[graph]

    @functools.cached_property
    def _pays(self) -> tuple[bool, bool]:
        def any_pays(graph: bool) -> bool:
            return any(times.ours_is_faster(graph) for times in self.times.values())

        return any_pays(False), any_pays(True)

    def _nearest(self, held: Mapping, key):
        count = self._nearest_count(held, key)
        return None if count is None else held[key._replace(tokens=count)]

    def _nearest_count(self, held: Mapping, key) -> int | None:
        counts = (n for n in self.tokens if stands_for(n, key.tokens) and key._replace(tokens=n) in held)
        return next(counts, None)


def explain_decode(device: Device, tokens: int, weights, *, split: bool = False, itemsize: int = 2) -> str:
    """Every config with its predicted microseconds, or why it is not taken: a table for a person."""
    weights = tuple(weights)
    lines = [f"{device.name}, {tokens} tokens, weights {', '.join(f'{r}×{c}' for r, c, _, _ in weights)}"]
    chosen, rows = decode_config(device, tokens, weights, split=split, itemsize=itemsize), []
    for config, reason in decode_configs(device, tokens, weights, split):
        seconds = None if reason else decode_seconds(config, device, tokens, weights, itemsize)
        rows.append((seconds is None, seconds or 0.0, config, reason))
    for _, seconds, config, reason in sorted(rows, key=lambda row: row[:2]):
        text = reason or f"{seconds * 1e6:.2f} µs{'  <- chosen' if config == chosen else ''}"
        lines.append(f"rows {config.rows:3d}  k {config.k:3d}  splits {config.splits:2d}  warps {config.warps}  {text}")
    return "\n".join(lines)


# ---- products of many tokens on a GPU


@dataclasses.dataclass(frozen=True)
class Product:
    """A product `[tokens, depth] × [depth, columns]` of numbers of `itemsize` bytes.

    kind, group: of the second factor, as `Weight` has them. Of a weight that its input meets, columns are its rows and
    depth its columns; of one that a gradient meets, the other way round.
    """

    tokens: int
    columns: int
    depth: int
    itemsize: int
    kind: int = 0
    group: int = 0


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """How `ops.triton_products` cuts a product: a block makes `[block_tokens, block_columns]` in steps of `block_k`.

    num_warps of them make a block; num_stages tiles of each factor are on their way to it, or there.
    """

    block_tokens: int
    block_columns: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared(self, product: Product) -> int:
        """Bytes of shared memory that a block takes at most, on any target."""
        # Hopper's product reads a stage that the older ones have copied to registers: they need one less.
        tile = self.block_columns * self.block_k
        factors = self.num_stages * (self.block_tokens * self.block_k + tile) * product.itemsize
        if product.kind:
            # Once more, as numbers; and int4's scales and zeros travel beside the codes.
            factors += tile * product.itemsize + (self.num_stages * 3 * tile if product.kind in _INT4 else 0)
        # Singular values and masks travel with the factors' tiles, or a row's scales.
        scales = self.num_stages * 3 * self.block_k * 4
        # The results change their layout between threads on their way out, when the factors' tiles are used up;
        # rows are padded against bank conflicts.
        results = self.block_tokens * (self.block_columns + 8) * 4
        return max(factors + scales, results)

    def why_not(self, product: Product, device: Device) -> str | None:
        """What keeps the kernels from running this, or None: the one rule of launch, choice and tests."""
        sizes = self.block_tokens, self.block_columns, self.block_k, self.num_warps
        if any(size < 1 or size & (size - 1) for size in sizes):
            return "blocks and warps must be powers of two"
        if self.num_warps > 16 or self.num_stages < 1:
            return "a block has up to 16 warps, and a stage at least"
        leasts = 16, 16, 32 if product.kind else 16
        for block, least, size in zip(sizes, leasts, (product.tokens, product.columns, product.depth)):
            if block < least:
                return f"tensor cores take blocks of 16 and more, and quantized weights go {leasts[2]} deep at least"
            if block > least and block >= 2 * size:
                return "a block would be padding for more than half"
        # A thread has 255 registers. With 128 sums in them the backward pass, that needs z beside h, spills 64 to 184
        # bytes on sm_80 and sm_90; in float32, where the threads multiply by themselves, both passes do with 32. AMD's
        # waves multiply 32 × 32 at a time: of more than two, those without such a tile of their own hold others' again.
        amd = device.target.startswith("gfx")
        threads, fewest = device.lanes * self.num_warps, 4 if not amd else 8 if self.num_warps > 2 else 2
        sums, most = self.block_tokens * self.block_columns // threads, 64 if product.itemsize == 2 else 16
        if not fewest <= sums <= most:
            return f"a thread adds up {fewest} to {most} sums, not {sums}"
        # A step's z passes through registers to be scaled, and without stages, or on AMD, all that is loaded does; and
        # what float32 threads multiply.
        loaded, most = (self.block_tokens + self.block_columns) * self.block_k // threads, 128 // product.itemsize
        if loaded > most:
            return f"a thread loads up to {most} numbers a step, not {loaded}"
        # Codes are there as codes, in float32 and rounded before they are multiplied: with 32 of them a thread spills
        # up to 16 bytes on sm_80 to sm_90, and 140 on gfx942.
        if product.kind and (codes := self.block_columns * self.block_k // threads) > 16:
            return f"a thread makes up to 16 codes into numbers, not {codes}"
        if (needed := self.shared(product)) > device.shared_bytes:
            return f"a block needs {needed} bytes of shared memory and {device.name} has {device.shared_bytes}"
        return None


# What is thought of: block_tokens, block_columns, block_k, num_warps, num_stages.
_PRODUCT_CONFIGS = ((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4))
_LARGEST_BLOCK = max(block for some in _PRODUCT_CONFIGS[:3] for block in some)


def product_configs(product: Product, device: Device) -> tuple[ProductConfig, ...]:
    """Every legal configuration out of those that can be of use."""
    # No block is larger than this: products that are larger in every way have the same ones.
    tokens, columns, depth = (min(size, _LARGEST_BLOCK) for size in (product.tokens, product.columns, product.depth))
    return _small_product_configs(
        dataclasses.replace(product, tokens=tokens, columns=columns, depth=depth, group=0), device
    )


@functools.lru_cache(maxsize=4096)
def _small_product_configs(product: Product, device: Device) -> tuple[ProductConfig, ...]:
    sizes = product.tokens, product.columns, product.depth
    # The rule would find those that are mostly padding as well, but they are many.
    blocks = [[b for b in some if b < max(2 * size, 33)] for some, size in zip(_PRODUCT_CONFIGS, sizes)]
    every = (ProductConfig(*chosen) for chosen in itertools.product(*blocks, *_PRODUCT_CONFIGS[3:]))
    return tuple(config for config in every if config.why_not(product, device) is None)


# A block's start, the first tiles' way from memory and the last results' way back, about.
_BLOCK_SECONDS = 1e-6


def product_seconds(config: ProductConfig, product: Product, device: Device) -> float:
    """How long a roofline model lets it take: rounds of blocks, each bound by arithmetic or by what it loads.

    Tiles come from the L2 cache, which is taken for twice as fast as memory; a multiprocessor holds one block.
    """
    blocks = -(-product.tokens // config.block_tokens) * -(-product.columns // config.block_columns)
    steps = -(-product.depth // config.block_k)
    # A multiprocessor has four schedulers with a tensor core each, and a warp belongs to one of them.
    rate = (device.matrix_rate if product.itemsize == 2 else device.vector_rate) * min(config.num_warps, 4) / 4
    operations = 2 * config.block_tokens * config.block_columns * config.block_k
    # Part of a cache line takes as long as all of it.
    loads: float = config.block_tokens * max(config.block_k * product.itemsize, 128)
    loads += config.block_columns * max(config.block_k * _BITS.get(product.kind, 8 * product.itemsize) / 8, 128)
    step = max(operations / rate, loads / (2 * device.bandwidth)) * device.multiprocessors
    return -(-blocks // device.multiprocessors) * (_BLOCK_SECONDS + steps * step)


@functools.lru_cache(maxsize=4096)
def product_config(product: Product, device: Device) -> ProductConfig:
    """The legal configuration that `product_seconds` takes for the fastest; of equals one for every scheduler."""

    def cost(config: ProductConfig) -> tuple[float, ...]:
        sums = config.block_tokens * config.block_columns // (32 * config.num_warps)
        # Steps of 64 are whole cache lines of two-byte numbers. None of this order has been measured yet.
        return (
            product_seconds(config, product, device),
            config.num_warps < 4,
            -sums,
            abs(math.log2(config.block_k / 64)),
            -config.num_stages,
        )

    return min(product_configs(product, device), key=cost)


@dataclasses.dataclass(frozen=True)
class ProductPlan:
    """Who multiplies: "ours", with what stands beside the product fused into it, or "vendor", a pass beside cuBLAS's.

    seconds: what the model gives either.
    """

    way: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        return f"{self.way} ({', '.join(f'{way} {1e6 * time:.1f} µs' for way, time in self.seconds.items())})"


# What the vendor's product reaches of its datasheet's rate, about: measured on an H100 with 4,096 tokens, 0.6 to 0.8.
_PRODUCT_SHARE = 0.75
# How much longer than `product_seconds` says our product's tiles take, by kind, beside those of weights of eight bits.
# Measured on an H100 at 64 to 4,096 tokens: int4 1.2 to 1.7 times as long as int8, with half as much to read, because
# the model counts no instructions; plain weights, of pivoted layers, 1.1 to 3.5 times as long as predicted.
_TILES = {0: 2.0, 1: 1.0, 2: 1.5, 3: 1.5, 4: 1.0}


def product_plan(products: Iterable[Product], device: Device, beside: int) -> ProductPlan:
    """Whether products with company pay as kernels of ours.

    beside: bytes that passes beside the vendor's products read and write, of what ours have fused. A quantized weight
    is made a plain one before the vendor's, in one pass over its codes and numbers. A product takes the larger of its
    bytes over bandwidth and its operations over 0.75 of the rate; ours at least `product_seconds`, as its tiles come
    from the L2; and a launch each.

    It is the choice that was compared with measurements, of Llama-3.1-8B's layers at half the size on an H100: it is
    "vendor" for plain, pivoted and masked products of 64 to 4,096 tokens and for quantized ones of 512 and more, and
    "ours" for most of 64 with weights of eight bits. The vendor's passes over quantized weights were not measured as
    they are here: their time is the model's. Seconds of small products are too few for either: both take some 6 µs
    where this has 2 to 4.
    """
    ours, vendor = 0.0, beside / device.bandwidth + device.gap * (beside > 0)
    for p in products:
        rate = device.matrix_rate if p.itemsize == 2 else device.vector_rate
        arithmetic = 2 * p.tokens * p.depth * p.columns / (_PRODUCT_SHARE * rate)
        activations, weight = p.itemsize * p.tokens * (p.depth + p.columns), p.depth * p.columns
        plain, stored = weight * p.itemsize, weight * _BITS.get(p.kind, 8 * p.itemsize) / 8
        tiles = product_seconds(product_config(p, device), p, device) * _TILES[p.kind]
        ours += max(arithmetic, (activations + stored) / device.bandwidth, tiles) + device.gap
        vendor += max(arithmetic, (activations + plain) / device.bandwidth) + device.gap
        if p.kind:
            vendor += (stored + plain) / device.bandwidth + device.gap
    return ProductPlan("ours" if ours < vendor else "vendor", {"ours": ours, "vendor": vendor})


def explain_product(device: Device, product: Product) -> str:
    """Every configuration with its predicted microseconds, or why it is not taken: a table for a person."""
    p, chosen, rows = product, product_config(product, device), []
    for sizes in itertools.product(*_PRODUCT_CONFIGS):
        config = ProductConfig(*sizes)
        reason = config.why_not(p, device)
        rows.append((0.0 if reason else product_seconds(config, p, device), config, reason))
    lines = [f"{device.name}, {p.tokens} tokens, {p.depth} deep, {p.columns} columns"]
    for seconds, config, reason in sorted(rows, key=lambda row: (row[2] is not None, row[0])):
        text = reason or f"{seconds * 1e6:.2f} µs{'  <- chosen' if config == chosen else ''}"
        block = f"{config.block_tokens}×{config.block_columns}×{config.block_k}"
        lines.append(f"{block:>11}  warps {config.num_warps}  stages {config.num_stages}  {text}")
    return "\n".join(lines)
