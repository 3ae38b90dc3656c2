"""Measures which configs of the Triton kernels are fastest on a GPU, whether the CUDA C++ ones are faster still, and
where they beat torch's products.

Only how the kernels read their weights is varied, never what they compute: outputs differ by the order of their sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...plan import CudaConfig, DecodeConfig, Device, Launch, Problem, Times, decode_candidates
from ..pivot_linear.reference import place
from ..plain_weight import plain_weight
from ..timing import MOST_COPIES, Calls, Timer
from . import cuda, triton
from .measured import problem_of
from .op import CONCATENATE, DENSE, GATED_MLP, PIVOTED, PLAIN

# `measure(variants, graph)`: the seconds of one call of each; replayed as a CUDA graph, or called from Python.
Measure = Callable[[list[Calls], bool], list[float]]

CANDIDATES = 12
# Of the CUDA C++ kernels: their two launches, by either kind of copies; then parts of first factors' columns.
CUDA_CONFIGS = [CudaConfig(launch, 0, bulk) for launch in ("cooperative", "dependent") for bulk in (True, False)]
CUDA_SPLITS = (1, 2, 3, 4, 6, 8)


@dataclasses.dataclass
class Case:
    """A problem with what it is measured on.

    name: for people. x: `[tokens, in]`. copies: the tensors of each layer that is such a problem, as `fused_linear`
    takes them.
    """

    name: str
    x: Tensor
    copies: list[list[Tensor]]
    spec: tuple[int, ...]
    mode: int

    @property
    def problem(self) -> Problem:
        return Problem(*problem_of(len(self.x), self.copies[0], self.spec, self.mode, self.x.element_size()))

    def calls(self, choose: Callable[[Launch], DecodeConfig]) -> Calls:
        """Our kernels with these configs, on every copy."""
        return [
            functools.partial(triton.forward, self.x, tensors, self.spec, self.mode, choose) for tensors in self.copies
        ]

    def calls_of_cuda(self, config: CudaConfig) -> Calls:
        """The CUDA C++ kernels with this config, on every copy."""
        return [
            functools.partial(cuda.forward, self.x, tensors, self.spec, self.mode, **config._asdict())
            for tensors in self.copies
        ]

    def calls_of_torch(self) -> Calls:
        """What the modules compute without our kernels, on every copy."""
        return [_products(self.x, triton.read_layers(tensors, self.spec), self.mode) for tensors in self.copies]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was found for a case: the config of each of Triton's launches; cuda, of the CUDA C++ kernels, if these are
    the faster ones; predicted, seconds with the launches that the model of `plan` chooses, replayed as a CUDA graph.
    """

    case: Case
    configs: dict[Launch, DecodeConfig]
    predicted: float
    times: Times
    cuda: CudaConfig | None = None


def timing(device: torch.device, rounds: int = 20) -> Measure:
    """Medians on a GPU, all variants in turns."""

    def measure(variants: list[Calls], graph: bool) -> list[float]:
        return [statistics.median(some) for some in Timer(device, eager=not graph).measure(variants, rounds)]

    return measure


@torch.no_grad()
def tune(
    cases: list[Case],
    measure: Measure,
    device: Device,
    *,
    candidates: int = CANDIDATES,
    known: Mapping[Launch, DecodeConfig] | None = None,
    bytes_read: int = 0,
) -> Iterator[Tuned]:
    """Yields, case by case, the fastest config of every launch, and the times with them.

    One launch is varied at a time, among the `candidates` legal configs that the model of `plan` takes to be fastest,
    while the others stay as they are; what has been found for a launch holds for all problems that have it. Where the
    CUDA C++ kernels are built and take the problem, the best of their configs is measured against that.

    Args:
        measure: see `timing`.
        device: what the model knows of the GPU.
        known: configs that were found before.
        bytes_read: copy a case's weights until all of its copies have as many bytes (see `ops.timing.CACHES`).

    Raises `ValueError` for fewer than one candidate.
    """
    if candidates < 1:
        raise ValueError(f"tune: candidates must be at least 1, got {candidates}")
    found = dict(known or {})
    for case in cases:
        case = dataclasses.replace(case, copies=copied(case.copies, bytes_read))
        predicted = {launch: decode_candidates(device, launch)[0] for launch in launches(case, device)}
        chosen = {launch: found.get(launch, config) for launch, config in predicted.items()}
        for launch in chosen:
            if launch not in found:
                tried = decode_candidates(device, launch)[:candidates]
                variants = [case.calls((chosen | {launch: config}).__getitem__) for config in tried]
                seconds = measure(variants, True)
                found[launch] = chosen[launch] = tried[seconds.index(min(seconds))]
        ours, torchs = case.calls(chosen.__getitem__), case.calls_of_torch()
        variants, of_cuda = [case.calls(predicted.__getitem__), ours, torchs], _fastest_of_cuda(case, measure)
        if of_cuda is not None:
            variants.append(case.calls_of_cuda(of_cuda))
        before, graph, graph_torch, *graph_cuda = measure(variants, True)
        if graph_cuda and graph_cuda[0] < graph:
            ours, graph = variants[-1], graph_cuda[0]
        else:
            of_cuda = None
        yield Tuned(case, chosen, before, Times(graph, graph_torch, *measure([ours, torchs], False)), of_cuda)


def _fastest_of_cuda(case: Case, measure: Measure) -> CudaConfig | None:
    """Of the CUDA C++ kernels; None where they are not there, or do not take the problem."""
    if not cuda.takes(case.x) or len(case.x) > cuda.MOST_TOKENS:
        return None
    best = None
    for number in range(2):
        tried = CUDA_CONFIGS if number == 0 else [best, *(best._replace(splits=splits) for splits in CUDA_SPLITS)]
        calls = [case.calls_of_cuda(config) for config in tried]
        if number == 0:
            try:
                calls[0][0]()
            except RuntimeError:  # numbers or siblings of which Triton's kernels alone know
                return None
        seconds = measure(calls, True)
        best = tried[seconds.index(min(seconds))]
    return best


def launches(case: Case, device: Device) -> list[Launch]:
    """Those of one call, each once, in their order; computes it."""
    seen: dict[Launch, None] = {}

    def note(launch: Launch) -> DecodeConfig:
        seen[launch] = None
        return decode_candidates(device, launch)[0]

    case.calls(note)[0]()
    return list(seen)


def copied(copies: list[list[Tensor]], bytes_read: int) -> list[list[Tensor]]:
    size = sum(tensor.numel() * tensor.element_size() for tensor in copies[0])
    wanted = min(MOST_COPIES, math.ceil(bytes_read / max(size, 1)))
    more = range(max(0, wanted - len(copies)))
    return [*copies, *([tensor.clone() for tensor in copies[i % len(copies)]] for i in more)]


def _products(x: Tensor, layers: list[triton.Layer], mode: int) -> Callable[[], object]:
    inverses = [layer.place.argsort() if layer.form == PIVOTED else None for layer in layers]

    def product(x: Tensor, m: triton.Matrix, bias: Tensor | None) -> Tensor:
        weight = m.data
        if m.kind != PLAIN:
            weight = plain_weight(m.data, m.scales, m.zeros, cols=m.cols, group=m.group, dtype=x.dtype)
        return F.linear(x, weight, bias)

    def output(x: Tensor, number: int) -> Tensor:
        layer = layers[number]
        if layer.form == DENSE:
            return product(x, layer.first, layer.bias)
        z = product(x, layer.first, None)
        if layer.s is not None:
            z = (z * layer.s).to(z.dtype)
        if layer.form == PIVOTED:
            return place(z, product(z, layer.second, None), inverses[number], layer.bias)
        return product(z, layer.second, layer.bias)

    def call() -> list[Tensor]:
        if mode == CONCATENATE:
            return [output(x, number) for number in range(len(layers))]
        made = F.silu(output(x, 0)) * output(x, 1)
        return [output(made, 2) if mode == GATED_MLP else made]

    return call
