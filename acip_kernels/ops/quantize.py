"""Weights of 8 or 4 bits a number, with scales: the formats, their plain PyTorch reference, and how codes are chosen.

The format is the one that the native kernels read (`csrc/include/acip/decode.h`; those know no fp8). For a weight
`[rows, cols]`:

- "int8": `qweight` int8 `[rows, cols]`, `scales` float32 `[rows]`; the weight is `q · scale`, `q` from -127 to 127.
- "int4": `qweight` uint8 `[rows, 32 ceil(cols / 64)]`, two codes to a byte, see `pack`; `scales` bfloat16
  `[rows, ceil(cols / group)]`, and unless symmetric `zeros` uint8 like them. The weight is `(code - zero) · scale`,
  codes from 0 to 15; of a symmetric one every zero is 8.
- "fp8": `qweight` float8_e4m3fn `[rows, cols]`, `scales` float32 `[rows]`; the weight is `q · scale`, `q` up to 448
  with four significant bits: E4M3 of "FP8 Formats for Deep Learning" (arXiv 2209.05433).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("int8", "int4", "fp8")
PER_ROW = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # kinds with one scale a row, and the dtype of their codes
LARGEST = {"int8": 127, "fp8": 448}  # of their codes
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
    if kind == "int4" and (type(group) is not int or group not in GROUPS):
        raise ValueError(f"the group of int4 must be one of {', '.join(map(str, GROUPS))}, got {group!r}")
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric must be True or False, got {symmetric!r}")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How weights are quantized: "int8", "fp8", or "int4" in groups of 32, 64 or 128 with or without zeros.

    Raises `ValueError` for anything else. Of int8 and fp8, group is 0 and symmetric True, whatever is given.
    """

    kind: str
    group: int = 64
    symmetric: bool = False

    def __post_init__(self):
        check_options(self.kind, self.group, self.symmetric)
        if self.kind in PER_ROW:
            object.__setattr__(self, "group", 0)
            object.__setattr__(self, "symmetric", True)

    @property
    def options(self) -> dict:
        """The arguments of this name that the functions here take."""
        return dataclasses.asdict(self)

    def to_dict(self) -> dict:
        """For JSON: `bits`, `group` and `symmetric`; of fp8 `"format": "e4m3"` too."""
        fields = {"bits": int(self.kind.lstrip("intfp")), "group": self.group, "symmetric": self.symmetric}
        return fields | ({"format": "e4m3"} if self.kind == "fp8" else {})

    @classmethod
    def from_dict(cls, fields: dict) -> Scheme:
        """Of what `to_dict` made. Raises `ValueError` for anything else."""
        if fields.keys() - {"format"} != {"bits", "group", "symmetric"}:
            raise ValueError(f"quantized must have bits, group and symmetric, got {fields!r}")
        kind = "fp8" if "format" in fields else f"int{fields['bits']}"
        scheme = cls(kind, fields["group"], fields["symmetric"])
        if scheme.to_dict() != fields:
            raise ValueError(f"quantized cannot be {fields!r}")
        return scheme

    def __str__(self) -> str:
        if self.kind in PER_ROW:
            return self.kind
        return f"int4, groups of {self.group}{', symmetric' if self.symmetric else ''}"


def shapes(rows: int, cols: int, kind: str, group: int = 64, symmetric: bool = False) -> dict:
    """`{name: (shape, dtype)}` of the tensors of a weight `[rows, cols]`."""
    if kind in PER_ROW:
        return {"qweight": ((rows, cols), PER_ROW[kind]), "scales": ((rows,), torch.float32)}
    groups = -(-cols // group)
    tensors = {
        "qweight": ((rows, -(-cols // BLOCK) * BLOCK // 2), torch.uint8),
        "scales": ((rows, groups), torch.bfloat16),
    }
    return tensors if symmetric else tensors | {"zeros": ((rows, groups), torch.uint8)}


def stored_bytes(rows, cols, kind: str, group: int = 64, symmetric: bool = False):
    """Bytes of the tensors of a weight `[rows, cols]`; ints, or integer tensors of any one shape."""
    if kind in PER_ROW:
        return rows * cols + 4 * rows
    return rows * (-(-cols // BLOCK) * (BLOCK // 2) + -(-cols // group) * (2 if symmetric else 3))


def stored_elements(rows, cols, kind: str, group: int = 64, symmetric: bool = False):
    """Elements of the tensors of a weight `[rows, cols]`, of which a byte with two codes is one."""
    if kind in PER_ROW:
        return rows * cols + rows
    return rows * (-(-cols // BLOCK) * (BLOCK // 2) + -(-cols // group) * (1 if symmetric else 2))


# How much smaller than the range of its numbers a scale may be made, for the sake of the many small ones.
SHRINKS = tuple(1 - step / 20 for step in range(13))
# Damping of a covariance, in mean variances: rounding errors are spread over columns only as far as it is certain that
# they cancel.
DAMPING = 0.01
_COLUMNS = 128  # that error feedback goes through one by one before it goes on to all others at once


@torch.no_grad()
def quantize(
    weight: Tensor,
    kind: str,
    group: int = 64,
    symmetric: bool = False,
    *,
    search: bool = False,
    covariance: Tensor | None = None,
) -> Quantized:
    """`weight [rows, cols]` in the format.

    By default each number is rounded to the nearest code, and the scales are the smallest of their dtype at which no
    number is cut off, so that every error is at most half a scale; of fp8, at most 1/16 of the number or a scale/1024.
    Int4's range always includes zero, which it represents exactly; a symmetric scale may be negative, where that makes
    it smaller: codes reach -8 and 7.

    Args:
        weight: float, `[rows, cols]`; either may be zero.
        kind: "int8", "int4" or "fp8". group: 32, 64 or 128 columns to a scale (int4). symmetric: without `zeros`
            (int4).
        search: choose each scale among some smaller ones too, by the squared error of its numbers.
        covariance: `[cols, cols]`, the second moment `E[xxᵀ]` of what the weight multiplies, of any scale. Columns are
            then rounded one after the other, those of the largest variance first, and what an error makes of the
            outputs is taken back by the columns still to come, as far as they are correlated: GPTQ (arXiv 2210.17323),
            which is least squares one column at a time. Includes `search`.

    Raises:
        ValueError: another shape or option; a weight or covariance that is not finite, or a weight too large for its
            scales' dtype.
        TypeError: a weight that is not floating.
    """
    check_options(kind, group, symmetric)
    _check_weight(weight)
    rows, cols = weight.shape
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if kind in PER_ROW:
        group = max(cols, 1)
    if covariance is not None:
        if covariance.shape != (cols, cols):
            raise ValueError(f"quantize: covariance must be [{cols}, {cols}], got {list(covariance.shape)}")
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError("quantize: covariance holds NaN or infinite values")
        search = True
    if covariance is not None and bool(covariance.any()):
        codes, scales, zeros = _round_with_feedback(exact, covariance.to(weight.device), kind, group, symmetric)
    else:
        values = _grouped(exact, group)
        scales, zeros = _ranges(values, kind, symmetric, SHRINKS if search else SHRINKS[:1])
        codes = _codes(values, scales[..., None], zeros[..., None], kind).flatten(1)[:, :cols]
    if kind in PER_ROW:
        return Quantized(codes.to(PER_ROW[kind]), scales[:, 0] if cols else scales.new_zeros(rows), None)
    packed = pack(codes.to(torch.uint8), zeros[:, -1] if zeros.shape[1] else SYMMETRIC_ZERO)
    return Quantized(packed, scales, None if symmetric else zeros)


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
        qweight: int8, float8_e4m3fn, or uint8 for int4; scales, zeros: as `quantize` makes them.
        cols: of the weight; needed for int4. group: of int4.
        dtype: of the result, computed in float32 or better and rounded once. In float64 it is exact; in float32 it is
            exact for int4.
    """
    if qweight.dtype in PER_ROW.values():
        return dequantize_rows(qweight, scales, dtype)
    if cols is None:
        raise ValueError("dequantize: int4 needs cols, the columns of the weight")
    return dequantize_int4(qweight, scales, zeros, cols, group, dtype)


def dequantize_rows(qweight: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dequantize` of int8 and fp8."""
    precise = torch.promote_types(dtype, torch.float32)
    return (qweight.to(precise) * scales.to(precise)[:, None]).to(dtype)


def dequantize_int4(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, cols: int, group: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dequantize` of int4."""
    precise = torch.promote_types(dtype, torch.float32)
    codes = unpack(qweight, cols).to(precise)
    codes = codes - (SYMMETRIC_ZERO if zeros is None else per_column(zeros, cols, group).to(precise))
    return (codes * per_column(scales, cols, group).to(precise)).to(dtype)


def without_scales(qweight: Tensor, zeros: Tensor | None = None, *, cols: int, group: int = 64) -> Tensor:
    """What the scales of a weight multiply, `[rows, cols]`: `qweight` itself, or of int4 `code - zero`, int8."""
    if qweight.dtype in PER_ROW.values():
        return qweight
    zero = SYMMETRIC_ZERO if zeros is None else per_column(zeros, cols, group).to(torch.int8)
    return unpack(qweight, cols).to(torch.int8) - zero


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


def per_column(per_group: Tensor, cols: int, group: int) -> Tensor:
    """`[rows, groups]` as `[rows, cols]`, each for the `group` columns that it is of."""
    return per_group.repeat_interleave(group, dim=1)[:, :cols]


def _ranges(
    values: Tensor, kind: str, symmetric: bool, shrinks: tuple[float, ...], weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`(scales, zeros)`, `[...]` each, for groups of numbers `values [..., group]`, in the dtypes of the format.

    The scale that its whole range needs times one of `shrinks`, the one of the least squared error, of which each
    place of a group counts `weights [group]`.
    """
    low, high = values.amin(-1).double().clamp_max(0), values.amax(-1).double().clamp_min(0)
    best: tuple[Tensor, ...] | None = None
    for shrink in shrinks:
        scales, zeros = _range(low * shrink, high * shrink, kind, symmetric)
        if len(shrinks) == 1:
            return scales, zeros
        codes = _codes(values, scales[..., None], zeros[..., None], kind)
        errors = (codes.sub_(zeros[..., None]).mul_(scales[..., None]) - values).square_()
        error = (errors if weights is None else errors.mul_(weights)).sum(-1)
        if best is None:
            best = error, scales, zeros
        else:
            best = tuple(torch.where(error < best[0], new, old) for new, old in zip((error, scales, zeros), best))
    assert best is not None
    _, scales, zeros = best
    return scales, zeros


def _range(low: Tensor, high: Tensor, kind: str, symmetric: bool) -> tuple[Tensor, Tensor]:
    """`(scales, zeros)` with which codes reach from `low` to `high`, float64 of any one shape, about zero."""
    if kind in PER_ROW:
        scales = _rounded_up(torch.maximum(high, -low) / LARGEST[kind], torch.float32)
        return scales, torch.zeros_like(scales, dtype=torch.uint8)
    if symmetric:
        # Codes reach -8 and 7: of the two signs, the one that needs the smaller scale.
        upright, flipped = torch.maximum(high / 7, -low / 8), torch.maximum(high / 8, -low / 7)
        scales = _rounded_up(torch.minimum(upright, flipped), torch.bfloat16)
        scales = torch.where(flipped < upright, -scales, scales)
        return scales, torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8)
    scales = _rounded_up((high - low) / 15, torch.bfloat16)
    return scales, _over(-low, scales).round_().clamp_(0, 15).to(torch.uint8)


def _codes(values: Tensor, scales: Tensor, zeros: Tensor, kind: str) -> Tensor:
    """The nearest codes, in the dtype of `values`."""
    codes = _over(values, scales)
    if kind in PER_ROW:
        codes.clamp_(-LARGEST[kind], LARGEST[kind])
        return codes.round_() if kind == "int8" else codes.to(torch.float8_e4m3fn).to(values.dtype)
    return codes.round_().add_(zeros).clamp_(0, 15)


def _order(variances: Tensor, group: int) -> dict[int, Tensor]:
    """`{group: its columns}`, in the order in which they are rounded: those of the largest variance first.

    While there are still others to take their errors back. A group is rounded as a whole, as it has one scale.
    """
    cols = len(variances)
    totals = F.pad(variances, (0, -cols % group)).view(-1, group).sum(1)
    return {
        number: number * group + variances[number * group :][:group].argsort(descending=True, stable=True)
        for number in totals.argsort(descending=True, stable=True).tolist()
    }


def _feedback(covariance: Tensor, dtype: torch.dtype) -> Tensor:
    """The upper triangular `R` with `Rᵀ R = covariance⁻¹`, damped, in `dtype`."""
    mean = covariance.diagonal().mean()
    damping = DAMPING
    while True:
        damped = covariance + torch.diag(torch.full_like(covariance[0], damping * float(mean)))
        # Of the columns in reverse order, L Lᵀ = covariance, so that L⁻¹, in reverse order again, is upper triangular.
        L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            identity = torch.eye(len(L), dtype=L.dtype, device=L.device)
            return torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1).to(dtype)
        damping *= 10


def _round_with_feedback(
    weight: Tensor, covariance: Tensor, kind: str, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(codes [rows, cols], scales, zeros [rows, groups])` by GPTQ; see `quantize`."""
    covariance = covariance.double()
    groups = _order(covariance.diagonal(), group)
    order = torch.cat(list(groups.values()))
    R = _feedback(covariance[order][:, order], weight.dtype)
    # How much an error in a column costs that the later ones cannot take back.
    costs = R.diagonal() ** -2
    weight = weight[:, order]
    codes = torch.empty_like(weight)
    ranges: dict[int, tuple[Tensor, Tensor]] = {}
    stop = 0
    for number, columns in groups.items():
        begin, stop = stop, stop + len(columns)
        scales, zeros = ranges[number] = _ranges(weight[:, begin:stop], kind, symmetric, SHRINKS, costs[begin:stop])
        for start in range(begin, stop, _COLUMNS):
            end = min(start + _COLUMNS, stop)
            errors = weight.new_empty(len(weight), end - start)
            for j in range(start, end):
                column = weight[:, j]
                codes[:, j] = _codes(column, scales, zeros, kind)
                errors[:, j - start] = (column - (codes[:, j] - zeros) * scales) / R[j, j]
                weight[:, j + 1 : end] -= torch.outer(errors[:, j - start], R[j, j + 1 : end])
            weight[:, end:] -= errors @ R[start:end, end:]
    scales, zeros = (torch.stack(parts, dim=1) for parts in zip(*(ranges[number] for number in range(len(ranges)))))
    return torch.empty_like(codes).index_copy_(1, order, codes), scales, zeros


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
