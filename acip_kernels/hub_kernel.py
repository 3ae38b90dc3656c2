"""This package's operators and layers as a kernel of Hugging Face's `kernels`: `python -m acip_kernels.hub_kernel DIR`.

What `kernels.get_local_kernel(DIR)` loads, and what may be uploaded as a repository of kind "kernel". The Triton and
PyTorch sources of `ops` and `nn` are copied into a build variant for each kind of device; they need torch (and Triton)
alone, not this package. The native CPU extension, which is of one version of torch and of Python, stays behind.

The layout is that of `kernels`' documentation ("Kernel requirements"): `build/torch-<device>/__init__.py` and
`metadata.json`, relative imports, and operators in a namespace of their own, as several versions of a kernel may be
loaded beside each other and beside the installed package.
"""

from __future__ import annotations

import base64
import hashlib
import os
import pathlib
from typing import Annotated

import typer

from . import files

NAME = "acip-kernels"
LICENSE = "Apache-2.0"
VERSION = 0
"""The version of the kernel's interface, counted apart from the package's; 0 is one that may still change."""

BACKENDS = ("cpu", "cuda", "rocm")

_ROOT = pathlib.Path(__file__).parent
_BESIDE = ("files.py", "plan.py", "version.py")  # what `ops` and `nn` need of the rest
_LEFT_OUT = ("ops/aot.py",)  # compiles ahead of time, for tests

_INIT = '''"""Low-rank linear layers: fused products, masked singular-value gradients, and their modules."""

from . import nn, ops
from .nn import LowRankLinear, PivotLinear, QuantizedLinear, SVDLinear
from .nn import kernel_layers as layers
from .ops import linear_cross_entropy, lowrank_linear, masked_svd_linear
from .ops.pivot_linear.op import pivot_linear

__all__ = [
    "LowRankLinear",
    "PivotLinear",
    "QuantizedLinear",
    "SVDLinear",
    "layers",
    "linear_cross_entropy",
    "lowrank_linear",
    "masked_svd_linear",
    "nn",
    "ops",
    "pivot_linear",
]
'''

_README = """---
license: apache-2.0
library_name: kernels
tags:
- kernels
---

# acip-kernels

Low-rank linear layers: `lowrank_linear(x, Vh, U, s, bias)` and `pivot_linear` for deployed ones, `masked_svd_linear`
and `linear_cross_entropy` for training, the modules `LowRankLinear`, `PivotLinear`, `QuantizedLinear` and `SVDLinear`,
and `layers` for `kernelize`. In Triton and PyTorch; needs torch 2.13, Python 3.10 and, for `backend="triton"`, Triton.

    from kernels import get_kernel

    kernel = get_kernel("<owner>/acip-kernels", version={version}, trust_remote_code=True)
    y = kernel.lowrank_linear(x, Vh, U, backend="triton")
"""


def sources() -> dict[str, str]:
    """`{path in a build variant: text}` of every Python file, its operators still in the package's namespace."""
    found = {"__init__.py": _INIT} | {name: (_ROOT / name).read_text("utf-8") for name in _BESIDE}
    for folder in ("ops", "nn"):
        for file in sorted((_ROOT / folder).rglob("*.py")):
            name = file.relative_to(_ROOT).as_posix()
            if name not in _LEFT_OUT:
                found[name] = file.read_text("utf-8")
    return found


def write_kernel(path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write the kernel's repository to the directory `path`, in one step.

    Deterministic: the same sources give the same files, and every change of them another `id`.

    Raises `FileExistsError` for a directory that is not empty, without `overwrite`.
    """
    texts = sources()
    digest = hashlib.sha256("\0".join(part for item in sorted(texts.items()) for part in item).encode()).hexdigest()
    with files.new_directory(path, overwrite=overwrite) as directory:
        for backend in BACKENDS:
            folder = directory / "build" / f"torch-{backend}"
            identity = f"_{NAME.replace('-', '_')}_{backend}_{digest[:12]}"
            hashes = {}
            for name, text in sorted(texts.items()):
                text = text.replace('"acip::', f'"{identity}::').replace("torch.ops.acip.", f"torch.ops.{identity}.")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                files.write_text(folder / name, text)
                hashes[name] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            metadata = {"name": NAME, "id": identity, "version": VERSION, "license": LICENSE, "python-depends": []}
            metadata |= {"backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": hashes}}
            files.write_json(folder / "metadata.json", metadata)
        files.write_text(directory / "README.md", _README.replace("{version}", str(VERSION)))


def main(
    output: Annotated[pathlib.Path, typer.Argument(help="Directory for the kernel's repository.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there already.")] = False,
):
    """Assemble the Triton and PyTorch operators and layers as a kernel of Hugging Face's `kernels`.

    Example: python -m acip_kernels.hub_kernel build-of-kernel
    """
    try:
        write_kernel(output, overwrite=overwrite)
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
    typer.echo(f'{output}: kernels.get_local_kernel(pathlib.Path("{output}")) loads it')


if __name__ == "__main__":
    typer.run(main)
