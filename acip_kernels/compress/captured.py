"""The passes of a batch as one CUDA graph: a GPU is kept busy by one launch, and not call by call from Python."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import dropout

log = logging.getLogger("acip_kernels")

# What is captured reads these from memory of its own; whatever else a batch holds could decide what is computed.
INPUTS = frozenset({"input_ids", "labels", "attention_mask", "counted"})


class Passes:
    """`run(inputs, *about)`, a batch's forward and backward pass, which returns the loss, without a graph.

    A call that is like an earlier one (inputs of the same shapes, the same `about`) is captured as a CUDA graph, and
    those after it are replays. So everything has been compiled before, and whatever `run` looks at in Python besides
    (which layers there are, of which rank) must stay as it is until `forget`. It must add to gradients where they are,
    and wait for nothing; if it cannot be captured, it is called from there on, and one log line says so.

    Args:
        run: as above.
        enabled: False to call it always.
        seeds: at least as many as it draws of `dropout.new_seed`. Every replay draws as many from torch's generator.
        whole: what is captured, if that is more than `run`.
        prepare: called before a capture. failed: called after one that failed.
    """

    # Stands in for CUDA's capture in tests.
    capture: Callable[[Callable[[], None], object], Callable[[], object]]

    def __init__(
        self,
        run: Callable[..., Tensor],
        *,
        enabled: bool,
        seeds: int = 0,
        whole: Callable[..., Tensor] | None = None,
        prepare: Callable[[], None] = lambda: None,
        failed: Callable[[], None] = lambda: None,
    ):
        self.run, self.whole, self.enabled, self.seeds = run, whole or run, enabled, seeds
        self.prepare, self.failed = prepare, failed
        self.captured: dict[tuple, CapturedPasses] = {}
        self._seen: set[tuple] = set()
        self._pool: object = None

    def forget(self) -> None:
        """What `run` looks at is about to change."""
        self._seen.clear()
        if self.captured:
            self.captured.clear()
            self._pool = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the next capture has memory of its own

    def __call__(self, inputs: dict, *about) -> Tensor:
        """In memory that the next call may write to."""
        kind = self._kind(inputs, about) if self.enabled else None
        if kind is None:
            return self.run(inputs, *about)
        if kind not in self.captured:
            if kind not in self._seen:
                self._seen.add(kind)
                return self.run(inputs, *about)
            self.prepare()
            try:
                if self._pool is None and torch.cuda.is_available():
                    self._pool = torch.cuda.graph_pool_handle()
                self.captured[kind] = CapturedPasses(self, inputs, about)
            except Exception as error:  # whatever a model does that no graph can hold
                log.warning("training steps are launched kernel by kernel: no CUDA graph can hold them: %s", error)
                self.enabled = False
                self.forget()
                self.failed()
                return self.run(inputs, *about)
        return self.captured[kind](inputs)

    @staticmethod
    def _kind(inputs: dict, about: tuple) -> tuple | None:
        if not INPUTS.issuperset(inputs) or not all(isinstance(value, Tensor) for value in inputs.values()):
            return None
        return about, *((name, value.shape, value.dtype) for name, value in sorted(inputs.items()))


class CapturedPasses:
    """One graph, and the memory that it reads inputs and seeds from.

    Graphs share their memory for all else, as none is replayed while another one's results are needed.
    """

    def __init__(self, passes: Passes, inputs: dict, about: tuple):
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.seeds = dropout.StaticSeeds(next(iter(inputs.values())).device, passes.seeds)

        def whole() -> None:
            self.loss = passes.whole(self.inputs, *about)

        with self.seeds:
            self.replay = passes.capture(whole, passes._pool)

    def __call__(self, inputs: dict) -> Tensor:
        for name, value in self.inputs.items():
            value.copy_(inputs[name])
        self.seeds.draw()
        self.replay()
        return self.loss


def capture(function: Callable[[], None], pool: object) -> Callable[[], object]:
    """A CUDA graph of what `function` launches, which is not run by this: what replays it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on with what no graph holds: a loader that pins memory, NCCL's watchdog.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay


Passes.capture = staticmethod(capture)
