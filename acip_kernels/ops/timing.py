"""Time of calls on a device: in turns, and on a GPU as CUDA graphs that run through copies of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Calls = list[Callable[[], object]]

# Weights and their copies together take this many times the L2, so that none is found there.
CACHES = 3
MOST_COPIES = 64


class Timer:
    """Times variants in turns: replays of CUDA graphs, or with `eager` the calls themselves.

    A variant is a list of calls, one for each copy of what it reads.
    """

    def __init__(self, device: torch.device, eager: bool):
        self.device, self.eager = device, eager or device.type != "cuda"

    def prepare(self, calls: Calls) -> Callable[[], object]:
        def every():
            for call in calls:
                call()

        if self.device.type != "cuda":
            return every
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles what has to be
            every()
        torch.cuda.current_stream().wait_stream(side)
        if self.eager:
            return every
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every()
        return graph.replay

    def seconds(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def measure(self, variants: list[Calls], rounds: int) -> list[list[float]]:
        """Seconds of one call of each variant, in every round."""
        return self.in_turns([self.prepare(calls) for calls in variants], [len(calls) for calls in variants], rounds)

    def in_turns(self, runs: list[Callable[[], object]], calls: list[int], rounds: int) -> list[list[float]]:
        """As `measure`, of what `prepare` has made, with the calls in each."""
        found: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, count, seconds in zip(runs, calls, found, strict=True):
                seconds.append(self.seconds(run) / count)
        return found
