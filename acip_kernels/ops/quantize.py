"""Weights as integers of 8 or 4 bits with scales: the format, its plain PyTorch reference, and how codes are chosen.

The format is the one that the native kernels read (`csrc/include/acip/decode.h`). For a weight `[rows, cols]`:

- "int8": `qweight` int8 `[rows, cols]`, `scales` float32 `[rows]`; the weight is `q · scale`, `q` from -127 to 127.
- "int4": `qweight` uint8 `[rows, 32 ceil(cols / 64)]`, two codes to a byte, see `pack`; `scales` bfloat16
  `[rows, ceil(cols / group)]`, and unless symmetric `zeros` uint8 like them. The weight is `(code - zero) · scale`,
  codes from 0 to 15; of a symmetric one every zero is 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("int8", "int4")
GROUPS = (32, 64, 128)
SYMMETRIC_ZERO = 8
BLOCK = 64  # columns whose codes are packed together


class Quantized(NamedTuple):
    """A quantized weight: the tensors of the format; `zeros` is None for int8 and for symmetric int4."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None


def check_options(kind: str, group: int = 64, symmetric: bool = False) -> None:
    """Raises `ValueError` for what is no kind or group."""
    if kind not in KINDS:
        raise ValueError(f"quantize must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "int4" and (isinstance(group, bool) or group not in GROUPS):
        raise ValueError(f"the group of int4 must be one of {', '.join(map(str, GROUPS))}, got {group!r}")
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric must be True or False, got {symmetric!r}")


def shapes(rows: int, cols: int, kind: str, group: int = 64, symmetric: bool = False) -> dict:
    """`{name: (shape, dtype)}` of the tensors of a weight `[rows, cols]`."""
    if kind == "int8":
        return {"qweight": ((rows, cols), torch.int8), "scales": ((rows,), torch.float32)}
    groups = -(-cols // group)
    tensors = {
        "qweight": ((rows, -(-cols // BLOCK) * BLOCK // 2), torch.uint8),
        "scales": ((rows, groups), torch.bfloat16),
    }
    return tensors if symmetric else tensors | {"zeros": ((rows, groups), torch.uint8)}


def stored_bytes(rows, cols, kind: str, group: int = 64, symmetric: bool = False):
    """Bytes of the tensors of a weight `[rows, cols]`; ints, or integer tensors of any one shape."""
    if kind == "int8":
        return rows * cols + 4 * rows
    return rows * (-(-cols // BLOCK) * (BLOCK // 2) + -(-cols // group) * (2 if symmetric else 3))


@torch.no_grad()
def quantize(weight: Tensor, kind: str, group: int = 64, symmetric: bool = False) -> Quantized:
    """`weight [rows, cols]` in the format, each number rounded to the nearest code.

    The scales are the smallest of their dtype at which no number is cut off, so that every error is at most half a
    scale. Int4's range always includes zero, which it represents exactly; a symmetric scale may be negative, where
    that makes it smaller: codes reach -8 and 7.

    Args:
        weight: float, `[rows, cols]`; either may be zero.
        kind: "int8" or "int4". group: 32, 64 or 128 columns to a scale (int4). symmetric: without `zeros` (int4).

    Raises:
        ValueError: another shape or option; a weight that is not finite, or too large for its scales' dtype.
        TypeError: a weight that is not floating.
    """
    check_options(kind, group, symmetric)
    _check_weight(weight)
    rows, cols = weight.shape
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if kind == "int8":
        largest = exact.abs().amax(1) if cols else exact.new_zeros(rows)
        scales = _rounded_up(largest.double() / 127, torch.float32)
        codes = _over(exact, scales[:, None]).round_().clamp_(-127, 127)
        return Quantized(codes.to(torch.int8), scales, None)
    values = _grouped(exact, group)
    scales, zeros = _int4_range(values.amin(2).double(), values.amax(2).double(), symmetric)
    codes = _over(values, scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, 15).to(torch.uint8)
    codes = codes.flatten(1)[:, :cols]
    return Quantized(pack(codes, _padding(zeros)), scales, None if symmetric else zeros)


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    cols: int | None = None,
    group: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight `[rows, cols]` that `qweight`, `scales` and `zeros` stand for.

    Args:
        qweight: int8, or uint8 for int4; scales, zeros: as `quantize` makes them.
        cols: of the weight; needed for int4. group: of int4.
        dtype: of the result, computed in float32 or better and rounded once. In float64 it is exact; in float32 it is
            exact for int4.
    """
    if qweight.dtype == torch.int8:
        return dequantize_int8(qweight, scales, dtype)
    if cols is None:
        raise ValueError("dequantize: int4 needs cols, the columns of the weight")
    return dequantize_int4(qweight, scales, zeros, cols, group, dtype)


def dequantize_int8(qweight: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dequantize` of int8."""
    precise = torch.promote_types(dtype, torch.float32)
    return (qweight.to(precise) * scales.to(precise)[:, None]).to(dtype)


def dequantize_int4(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, cols: int, group: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dequantize` of int4."""
    precise = torch.promote_types(dtype, torch.float32)
    codes = unpack(qweight, cols).to(precise)
    codes = codes - (SYMMETRIC_ZERO if zeros is None else _per_column(zeros, cols, group).to(precise))
    return (codes * _per_column(scales, cols, group).to(precise)).to(dtype)


def pack(codes: Tensor, padding: Tensor | int = SYMMETRIC_ZERO) -> Tensor:
    """Codes, uint8 0 to 15 `[rows, cols]`, as uint8 `[rows, 32 ceil(cols / 64)]`.

    A row goes in blocks of 64 columns and 32 bytes: byte `j` of block `b` has the code of column `64 b + j` in its low
    half and that of column `64 b + 32 + j` in its high half. Columns past the end have the code `padding`, of all rows
    or uint8 `[rows]`.
    """
    rows, cols = codes.shape
    blocks = -(-cols // BLOCK)
    whole = codes.new_empty(rows, blocks * BLOCK)
    whole[:, :cols] = codes
    whole[:, cols:] = padding[:, None] if isinstance(padding, Tensor) else padding
    low, high = whole.view(rows, blocks, 2, BLOCK // 2).unbind(2)
    return (low | high << 4).flatten(1)


def unpack(packed: Tensor, cols: int) -> Tensor:
    """The codes uint8 `[rows, cols]` of `pack`."""
    blocks = packed.view(packed.shape[0], -(-cols // BLOCK), 1, BLOCK // 2)
    return torch.cat([blocks & 15, blocks >> 4], dim=2).flatten(1)[:, :cols]


def _check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"quantize: weight must be floating, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"quantize: weight must be [rows, cols], got {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("quantize: weight holds NaN or infinite values")


def _grouped(weight: Tensor, group: int) -> Tensor:
    """`[rows, groups, group]`, the last group filled up with zeros."""
    rows, cols = weight.shape
    groups = -(-cols // group)
    return F.pad(weight, (0, groups * group - cols)).view(rows, groups, group)


def _per_column(per_group: Tensor, cols: int, group: int) -> Tensor:
    return per_group.repeat_interleave(group, dim=1)[:, :cols]


def _padding(zeros: Tensor) -> Tensor | int:
    return zeros[:, -1] if zeros.shape[1] else SYMMETRIC_ZERO


def _int4_range(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """`(scales bfloat16, zeros uint8)` for groups of numbers from `low` to `high`, float64 of any one shape."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    if symmetric:
        # Codes reach -8 and 7: of the two signs, the one that needs the smaller scale.
        upright, flipped = torch.maximum(high / 7, -low / 8), torch.maximum(high / 8, -low / 7)
        scales = _rounded_up(torch.minimum(upright, flipped), torch.bfloat16)
        scales = torch.where(flipped < upright, -scales, scales)
        return scales, torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8)
    scales = _rounded_up((high - low) / 15, torch.bfloat16)
    zeros = _over(-low, scales).round_().clamp_(0, 15).to(torch.uint8)
    return scales, zeros


def _rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of `dtype` that are not below `values`, float64 and not negative."""
    rounded = values.to(dtype)
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    rounded = torch.where(rounded.double() < values, up, rounded)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"quantize: weight has values up to {float(values.max()):.3g} scales, too large for {dtype}")
    return rounded


def _over(values: Tensor, scales: Tensor) -> Tensor:
    """`values / scales`, and 0 where the scale is."""
    scales = scales.to(values.dtype)
    return torch.where(scales == 0, 0, values / scales)
