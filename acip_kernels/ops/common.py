"""What the operators share: argument checks, the choice of a backend, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import extension

# Every name that may be asked for. An operator offers the subset that it implements; naming a backend that is
# known but absent and misspelling one are different mistakes and get different messages.
KNOWN_BACKENDS = ("reference", "native", "triton", "cuda")

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result  # what torch.compile cannot trace
def _interprets() -> bool:
    from triton import knobs

    return knobs.runtime.interpret


def takes_triton(x: Tensor) -> bool:
    """Whether Triton kernels run on `x`: on a GPU, or on the CPU in Triton's interpreter, which is for tests."""
    if x.dtype not in TRITON_DTYPES:
        return False
    return x.device.type == "cuda" or (x.device.type == "cpu" and _interprets())


def on_gpu(x: Tensor) -> bool:
    """Whether Triton kernels that nothing has to choose run on `x`."""
    return x.is_cuda and x.dtype in TRITON_DTYPES


def choose_backend(
    operator: str,
    backend: str,
    available: Mapping[str, Callable],
    x: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = extension.DTYPES,
    gpu: tuple[torch.dtype, ...] = (),
):
    """The implementation that `backend` names; only "auto" may choose.

    "auto" takes the native kernels where they are built and `x`, if given, is on the CPU in one of `dtypes`; Triton's
    for an `x` on a GPU in one of `gpu`; else the reference. gpu: in what a measurement has shown that those win
    whatever the shape (`docs/gpu.md`); where it depends on that, `acip tune` measures, and otherwise they are to be
    asked for.
    Raises `ValueError` for a name that does not exist and `RuntimeError` for one that cannot run here.
    """
    if backend == "auto":
        if x is not None and x.is_cuda and x.dtype in gpu and "triton" in available:
            return available["triton"]
        native = "native" in available and (x is None or extension.takes(x, dtypes))
        return available["native" if native else "reference"]
    if backend not in KNOWN_BACKENDS:
        raise ValueError(f"{operator}: backend must be 'auto' or one of {list(KNOWN_BACKENDS)}, got {backend!r}")
    if backend not in available:
        from .fused_linear import cuda

        why = {"native": ("native", extension.missing), "cuda": ("CUDA", cuda.missing)}.get(backend, ("", None))
        raise RuntimeError(
            f"{operator}: backend {backend!r} is not available in this installation; "
            f"available: {sorted(available)}. Use backend='auto' to let the package choose."
            + (f" The {why[0]} kernels are {why[1]}." if why[1] else "")
        )
    if backend == "native" and x is not None and not extension.takes(x, dtypes):
        raise RuntimeError(
            f"{operator}: the native kernels take {', '.join(str(d) for d in dtypes)} on the CPU, "
            f"got {x.dtype} on {x.device}. Use backend='auto' to let the package choose."
        )
    if backend == "triton" and x is not None and not takes_triton(x):
        raise RuntimeError(
            f"{operator}: the Triton kernels take {', '.join(str(d) for d in TRITON_DTYPES)} on a GPU, "
            f"got {x.dtype} on {x.device}. Move or convert x, or use backend='auto' to let the package choose. "
            "On the CPU they run in Triton's interpreter alone, for tests: TRITON_INTERPRET=1 before it is imported."
        )
    if backend == "cuda" and x is not None and (x.device.type != "cuda" or x.dtype not in CUDA_DTYPES):
        raise RuntimeError(
            f"{operator}: the CUDA kernels take {', '.join(str(d) for d in CUDA_DTYPES)} on a GPU, "
            f"got {x.dtype} on {x.device}. Move or convert x, or use backend='auto' to let the package choose."
        )
    return available[backend]


@functools.cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in `dtype`, so that torch's are not emulated."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype in (torch.float32, torch.float64)


if extension.module is not None:
    extension.module.widen_bfloat16(not multiplies_natively(torch.bfloat16))


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` of matrices, into `out` if given.

    On a CPU without instructions for their dtype both are widened to float32 for the product and it is rounded once:
    many times as fast as torch's own product in bfloat16 (`bench.training_parts`), and no less precise.
    """
    if a.device.type != "cpu" or multiplies_natively(a.dtype):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    wide = torch.mm(a.float(), b.float())
    return wide.to(a.dtype) if out is None else out.copy_(wide)


def add_product(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`to += a @ b`, in place; widened as `product`."""
    if a.device.type != "cpu" or multiplies_natively(a.dtype):
        return to.addmm_(a, b)
    return to.copy_(torch.addmm(to.float(), a.float(), b.float()))


def check_factors(
    operator: str,
    x: Tensor,
    Vh: Tensor,
    U: Tensor,
    bias: Tensor | None,
    names: tuple[str, str] = ("Vh", "U"),
    **per_rank: Tensor,
) -> None:
    """Shapes, dtypes and devices of `((x Vhᵀ) ⊙ s) Uᵀ + bias`.

    `per_rank` are the `[rank]` vectors, `names` what the caller calls `Vh` and `U`. Raises `TypeError` for a non-tensor
    or a wrong dtype and `ValueError` for a wrong shape or device; the message names the argument.
    """
    right, left = names
    tensors = {"x": x, right: Vh, left: U, **per_rank}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{operator}: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device} but x is on {x.device}")

    if Vh.dim() != 2:
        raise ValueError(f"{operator}: {right} must be [rank, in_features], got shape {list(Vh.shape)}")
    if U.dim() != 2:
        raise ValueError(f"{operator}: {left} must be [out_features, rank], got shape {list(U.shape)}")
    rank, in_features = Vh.shape
    out_features = U.shape[0]
    if U.shape[1] != rank:
        raise ValueError(
            f"{operator}: {left} must be [out_features, {rank}] as {right} has rank {rank}, got {list(U.shape)}"
        )
    if rank == 0:
        raise ValueError(f"{operator}: rank is 0 ({right} is {list(Vh.shape)}); a layer of rank 0 is its bias alone")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"{operator}: x must be [..., {in_features}] as {right} is {list(Vh.shape)}, got {list(x.shape)}"
        )
    for name, tensor in per_rank.items():
        if tensor.shape != (rank,):
            raise ValueError(f"{operator}: {name} must be [{rank}], got shape {list(tensor.shape)}")
        # Singular values and masks act after the rounding of z; a lower precision than float32 would lose mask steps.
        precise = torch.promote_types(x.dtype, torch.float32)
        if tensor.dtype not in (precise, x.dtype):
            raise TypeError(f"{operator}: {name} must be {precise} or x's dtype {x.dtype}, got {tensor.dtype}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{operator}: bias must be [{out_features}], got shape {list(bias.shape)}")
    for name in (right, left, "bias"):
        if name in tensors and tensors[name].dtype != x.dtype:
            raise TypeError(f"{operator}: {name} is {tensors[name].dtype} but x is {x.dtype}; convert one of them")


def autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """`x` and `tensors` in autocast's dtype where autocast is on, as `torch.nn.functional.linear` would take them."""
    # What is no tensor passes through: `check_factors` names it. The meta device knows no autocast and would raise.
    device = x.device.type if isinstance(x, Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        # Autocast leaves float64 alone, so that a gradient check under it stays exact.
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return tuple(cast(tensor) for tensor in (x, *tensors))
