"""What `acip tune` has measured on a GPU: where it is kept, and what follows from it.

One file for each GPU, driver, and version of torch, Triton and this package, under the package's cache directory. It is
read when a layer is first computed on that GPU, never at import. A file of other versions is not used: its kernels are
others.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re

import torch
from torch import Tensor

from ... import files
from ...plan import CudaConfig, DecodeConfig, Device, Launch, Problem, Table, Times, device_of
from ...version import __version__
from . import cuda, op


@functools.cache
def table(device: torch.device) -> Table | None:
    """Of a GPU, or None where it has not been measured.

    Raises `ValueError`, which names the file, for one that cannot be used.
    """
    return load(device) if device.type == "cuda" and op.triton is not None else None


# Constants to torch.compile, which does not trace how a file is read.


@torch.compiler.assume_constant_result
def token_counts(device: torch.device, graph: bool) -> tuple[int, ...]:
    """At how many tokens anything was measured, rising; empty without a table, or if ours was never faster."""
    found = table(device)
    return found.tokens if found is not None and found.pays(graph) else ()


@torch.compiler.assume_constant_result
def is_faster(device: torch.device, problem: tuple, graph: bool) -> bool:
    """Whether our kernels were measured to be faster for `problem`, the fields of a `plan.Problem`."""
    found = table(device)
    return found is not None and found.is_faster(Problem(*problem), graph)


def problem_of(tokens: int, tensors: list[Tensor], spec, mode: int, itemsize: int) -> tuple:
    """The fields of `plan.Problem`, from the arguments of `fused_linear`."""
    rows = tuple([n for some in op.matrix_rows(tensors, spec) for n in some])
    return tokens, mode, tuple(spec), rows, itemsize


def forward(x: Tensor, tensors: list[Tensor], spec: list[int], mode: int) -> Tensor:
    """`fused_linear` on a GPU: by the CUDA C++ kernels where they were measured to be faster, else by `prefill`."""
    from . import prefill  # which is made of what `op` has, and needs Triton

    found = table(x.device)
    if found is not None and found.cuda and cuda.takes(x):
        problem = Problem(*problem_of(x.numel() // max(x.shape[-1], 1), tensors, spec, mode, x.element_size()))
        if (config := found.cuda_config(problem)) is not None:
            return cuda.forward(x, tensors, spec, mode, **config._asdict())
    return prefill.forward(x, tensors, spec, mode)


# ---- the file


def identity(device: torch.device) -> dict[str, str]:
    """What a measurement on the GPU `device` holds for."""
    import triton

    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "driver": _driver(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "acip_kernels": __version__,
    }


def _driver() -> str:
    """The version of the kernel module where it tells it, else of the interface that the driver has."""
    file = "/sys/module/amdgpu/version" if torch.version.hip else "/proc/driver/nvidia/version"
    try:
        found = re.search(r"\d+(\.\d+)+", pathlib.Path(file).read_text())
    except OSError:
        found = None
    return found[0] if found else str(torch._C._cuda_getDriverVersion())


def path_of(identity: dict[str, str]) -> pathlib.Path:
    name, capability, *versions = identity.values()
    parts = [name, f"cc{capability}", *(f"{key}{value}" for key, value in zip(list(identity)[2:], versions))]
    slug = re.sub(r"[^a-z0-9.+]+", "-", " ".join(parts).lower().replace("_", " "))
    return files.cache_dir() / "tuned" / f"{slug}.json"


def load(device: torch.device) -> Table | None:
    """The table of a GPU as it is stored now, or None. Raises as `table`."""
    about = identity(device)
    path = path_of(about)
    if not path.exists():
        return None
    try:
        fields = files.read_json(path)
        if fields.get("measured_on") != about:
            return None
        return from_json(fields, device_of(device), str(path))
    except ValueError as error:
        raise ValueError(f"{error}; `acip tune` measures anew, or delete the file to do without") from None


def store(device: torch.device, found: Table) -> pathlib.Path:
    """Write the table of a GPU, in one step; what is computed from now on follows it."""
    about = identity(device)
    path = path_of(about)
    files.write_json(path, {"measured_on": about} | to_json(found))
    table.cache_clear()
    return path


def to_json(found: Table) -> dict:
    return {
        "launches": [
            launch._asdict() | {"config": dataclasses.asdict(config)} for launch, config in found.configs.items()
        ],
        "problems": [
            problem._asdict()
            | {"seconds": times._asdict()}
            | ({"cuda": found.cuda[problem]._asdict()} if problem in found.cuda else {})
            for problem, times in found.times.items()
        ],
    }


def from_json(fields: dict, device: Device, source: str) -> Table:
    """The reverse of `to_json`. Raises `ValueError`, naming `source`, for what is not of its form or not legal.

    What was measured of CUDA C++ kernels that are not there now counts as not measured.
    """
    try:
        configs, times, of_cuda = {}, {}, {}
        for entry in fields["launches"]:
            entry = dict(entry)
            config = DecodeConfig(**entry.pop("config"))
            weights = tuple(tuple(weight) for weight in entry.pop("weights"))
            if not weights:
                raise ValueError("a launch without weights")
            launch = Launch(weights=weights, **entry)
            shapes = [n for rows, cols, kind, group in weights for n in (rows, cols, kind, group)]
            _check_ints(*shapes, launch.tokens, launch.itemsize, config.rows, config.k, config.splits, config.warps)
            configs[launch] = config
        for entry in fields["problems"]:
            entry = dict(entry)
            seconds = Times(**{key: float(value) for key, value in entry.pop("seconds").items()})
            fields_of_cuda = entry.pop("cuda", None)
            problem = Problem(spec=tuple(entry.pop("spec")), rows=tuple(entry.pop("rows")), **entry)
            _check_ints(problem.tokens, problem.mode, problem.itemsize, *problem.spec, *problem.rows)
            if fields_of_cuda is not None:
                chosen = CudaConfig(**fields_of_cuda)
                _check_ints(chosen.splits)
                if chosen.launch not in cuda.LAUNCHES or type(chosen.bulk) is not bool:
                    raise ValueError(f"{chosen} is nothing that the CUDA kernels know")
                if cuda.missing is not None:
                    continue
                of_cuda[problem] = chosen
            times[problem] = seconds
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source} does not hold what `acip tune` writes: {type(error).__name__} {error}") from None
    return Table(device, source, configs, times, of_cuda)


def _check_ints(*numbers) -> None:
    for number in numbers:
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no count")
