"""Several processes, each with a device of its own, that make one run together."""

from __future__ import annotations

import builtins
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

# How long a process waits for the others before it gives up, in a group that `joined` makes. The longest wait is for
# decompositions, which are divided by their cost, and for the writing of a checkpoint.
TIMEOUT = datetime.timedelta(minutes=30)
# Bytes that are sent at a time.
_BUCKET = 2**26


class Processes:
    """Who this process is among those of a run, and what they tell each other.

    A run of one process is a group of one, in which every exchange is the identity. In a larger one, all processes
    have to call the same methods in the same order. What they send is tensors and JSON.

    rank, size: this process's number, and how many there are. main: whether it is the first, which alone writes files
    and talks to people. device: where what they send has to be.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1):
        self.device, self.rank, self.size = device, rank, size

    @classmethod
    def current(cls, device: torch.device) -> Processes:
        """All processes of torch's process group, or this one alone where there is none.

        Raises `ValueError` if this process was started as one of several (`WORLD_SIZE`) but has not joined the others:
        each would make the whole run, and all would write the same files.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(device, dist.get_rank(), dist.get_world_size())
        started = started_as_one_of()
        if started > 1:
            raise ValueError(
                f"WORLD_SIZE is {started}, but there is no process group: call torch.distributed.init_process_group() "
                "first, as `acip compress` does, or unset WORLD_SIZE for a run of this process alone"
            )
        return cls(device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @functools.cached_property
    def mesh(self):
        """All processes as a mesh of one dimension, for tensors that are divided among them."""
        return dist.init_device_mesh(self.device.type, (self.size,))

    def rounds(self, batches: Iterable[dict]) -> Iterator[tuple[dict, list[dict]]]:
        """The batches, as many at a time as there are processes: this one's, and all of them.

        Who has none left at the end gets the first of them again, so that all make the same steps.
        """
        batches = iter(batches)
        while some := list(itertools.islice(batches, self.size)):
            yield some[self.rank if self.rank < len(some) else 0], some

    # ---- sums

    @torch.no_grad()
    def sum_(self, tensors: list[Tensor]) -> None:
        """Put into each of `tensors` its sum over the processes: the same bits in all of them."""
        if self.size == 1:
            return
        bucket, filled = [], 0
        for number, tensor in enumerate(tensors):
            bucket.append(tensor)
            filled += tensor.numel() * tensor.element_size()
            last = number + 1 == len(tensors)
            if last or filled >= _BUCKET or tensors[number + 1].dtype != tensor.dtype:
                flat = torch.cat([each.reshape(-1) for each in bucket])
                dist.all_reduce(flat)
                for each, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                    each.copy_(part.view_as(each))
                bucket, filled = [], 0

    def all_tensors(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor of this shape, in the order of their ranks."""
        if self.size == 1:
            return [tensor]
        everybody = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(everybody, tensor)
        return everybody

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is set in any process."""
        if self.size == 1:
            return flags
        numbers = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return tuple(bool(number) for number in numbers.tolist())

    # ---- what one process has

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """`tensor` of process `source`, in all of them; the others give one to write into."""
        if self.size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
        """The tensors of process `source`, by name, on `device` in the others, which may give None."""
        tensors = tensors or {}
        if self.size == 1:
            return tensors
        mine = self.rank == source
        about = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
        received = {}
        for name, (dtype, shape) in self.broadcast_json(about, source).items():
            if mine:
                tensor = tensors[name].detach().to(self.device).contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            received[name] = self.broadcast(tensor, source)
        return received

    def broadcast_json(self, value, source: int = 0):
        """What process `source` has as `value`, by way of JSON."""
        if self.size == 1:
            return value
        data = _encoded(value) if self.rank == source else b""
        length = self.broadcast(torch.tensor([len(data)], device=self.device), source)
        message = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            message.copy_(_bytes(data))
        return json.loads(self.broadcast(message, source).cpu().numpy().tobytes())

    def on_main(self, function: Callable):
        """What `function()`, called in the first process alone, returns (as JSON can say it) or raises, in all."""
        if self.size == 1:
            return function()
        answer, error = {}, None
        if self.main:
            try:
                answer = {"value": function()}
            except Exception as raised:
                error = raised
                _in_all(error)
                answer = {"error": type(raised).__name__, "message": str(raised)}
        answer = self.broadcast_json(answer)
        if "error" not in answer:
            return answer["value"]
        if error is not None:
            raise error
        raise _in_all(getattr(builtins, answer["error"], RuntimeError)(answer["message"]))

    def all_json(self, value) -> list:
        """What each process has as `value`, in the order of their ranks."""
        if self.size == 1:
            return [value]
        data = _encoded(value)
        lengths = [int(length) for length in self.all_tensors(torch.tensor([len(data)], device=self.device))]
        message = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        message[: len(data)] = _bytes(data)
        return [
            json.loads(message[:length].cpu().numpy().tobytes())
            for message, length in zip(self.all_tensors(message), lengths, strict=True)
        ]

    def gather_rows(self, owner: int, tensor: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Blocks of rows of `tensor`, a matrix: for process `owner` those of all, by rank; for the others none."""
        step = max(1, _BUCKET // (self.size * tensor.element_size() * max(1, tensor.shape[1])))
        for start in range(0, len(tensor), step):
            rows = slice(start, start + step)
            block = tensor[rows].contiguous()
            blocks = [torch.empty_like(block) for _ in range(self.size)] if self.rank == owner else None
            dist.gather(block, blocks, owner)
            if blocks is not None:
                yield rows, blocks

    # ---- what all must have

    def agree(self, values: dict, advice: str) -> None:
        """Raise `ValueError` in all processes if `values`, which may hold dicts, are not the same in all."""
        everybody = self.all_json(values)
        differences = [
            f"{path} is {one} for rank 0 and {other} for rank {rank}"
            for rank, theirs in enumerate(everybody)
            for path, one, other in _differences(everybody[0], theirs)
        ]
        if differences:
            more = f" (and {len(differences) - 2} differences more)" if len(differences) > 2 else ""
            raise _in_all(ValueError(f"the {self.size} processes differ: {'; '.join(differences[:2])}{more}; {advice}"))

    def agree_on_batches(self, batches: list[dict]) -> None:
        """`agree` on the tokens of `batches`, all of which every process has."""
        if self.size > 1:
            self.agree(
                {"batches": digest(*(batch["input_ids"] for batch in batches))},
                "give all of them the same batches, which are divided here",
            )

    def owners(self, costs: dict[str, float]) -> dict[str, int]:
        """Which process does which of some tasks: the dearest first, each to whoever has least so far."""
        load, owners = [0.0] * self.size, {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owners[name] = min(range(self.size), key=load.__getitem__)
            load[owners[name]] += costs[name]
        return owners


def started_as_one_of() -> int:
    """How many processes a launcher says that it has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@contextlib.contextmanager
def joined(device: str):
    """Within it, processes that torchrun or the like has started are one group; yields the device of this one.

    One that was started by itself, or is in a group already, is left alone. The group is gloo's for processors and
    NCCL's for GPUs; each process takes the GPU of its number on its machine. Who waits for another longer than
    `TIMEOUT` gives up with an error.
    """
    if started_as_one_of() == 1 or dist.is_initialized():
        yield device
        return
    if device.startswith("cuda"):
        if device != "cuda":
            raise ValueError(f"device must be cuda for several processes, which take one GPU each, got {device}")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    yield device
    # After an error there may be nobody left to say goodbye to; the end of the process closes what is open.
    dist.destroy_process_group()


@contextlib.contextmanager
def same_randomness(device: torch.device):
    """Yields `torch.manual_seed`; afterwards torch's generators are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield torch.manual_seed


def fingerprint(model: nn.Module) -> dict[str, str]:
    """For every parameter and buffer its dtype, shape, and a digest of some of its numbers."""
    prints = {}
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        few = flat[:: max(1, flat.numel() // 1024)].cpu().contiguous()
        prints[name] = f"{tensor.dtype} {list(tensor.shape)} {digest(few)}"
    return prints


def digest(*tensors: Tensor) -> str:
    """A digest of the tensors' content."""
    hasher = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def _in_all(error: Exception) -> Exception:
    """Mark an error that every process raises, so that it need not be told by each."""
    error.in_all_processes = True
    return error


def _differences(one, other, path: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield path, one, other


def _encoded(value) -> bytes:
    return json.dumps(value).encode()


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
