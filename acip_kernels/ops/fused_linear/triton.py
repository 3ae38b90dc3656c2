"""Deployed layers of few tokens on a GPU: two launches for both products of a layer, or of up to three siblings.

`shrink` multiplies the input with every first factor, split along its columns so that all multiprocessors read;
`expand` adds the splits up in their order, scales by `s`, rounds, multiplies with the second factors and stores, the
permuted store of a pivoted layer and SwiGLU included. A dense layer among siblings is rows of `expand` that read the
input itself. Deterministic: no atomics, partial sums are added in one order; and every element of the scratch that is
read has been written, so that it needs no clearing.

Weights are read once (evict first); inputs and partial sums stay in the caches. Sums are float32. One token is
multiplied and added, more go through tensor cores, with the weights as their rows and tokens as columns. Integers and
eight-bit floats become numbers in registers; a scale is applied to sums: of a row (int8, fp8), or of a group's part of
a row (int4).

With `pdl` (programmatic dependent launch, from sm_90 on) every launch starts while the one before it still runs, asks
for its first weights, and waits only before it reads inputs or writes anything. (So whoever changes weights on the
stream has to do it by a launch that does not let the next one start early: nothing but these kernels does.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...plan import DecodeConfig, Device, Launch, decode_config, device_of
from .. import triton_products
from ..triton_products import Matrix, fp8_numbers
from . import measured
from .op import CONCATENATE, DENSE, FACTORS, FP8, GATED_MLP, INT4, INT4_ZEROS, INT8, PIVOTED, PLAIN, SWIGLU

SIBLINGS = 3
MOST_TOKENS = 16


# The interpreter multiplies bfloat16 by their bits; numbers of two bytes are exact as float32.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# ---- a tile of rows times all tokens


@triton.jit
def _floats(values, KIND: tl.constexpr):
    """Codes of KIND as float32, but for their scale; numbers as they are."""
    if KIND >= 4:
        return fp8_numbers(values, KIND == 4)
    else:
        return values.to(tl.float32)


@triton.jit
def _numbers(values, KIND: tl.constexpr, TYPE: tl.constexpr):
    """`values`, of TYPE or codes that TYPE holds exactly, in TYPE."""
    return _floats(values, KIND).to(TYPE) if values.dtype.is_int() else values


@triton.jit
def _dot(a, b):
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _inputs(
    x, x_stride, s, splits, split_stride, t, tokens, k, cols,
    PARTIAL: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """`[len(t), len(k)]` of the input: as it is, or what a first product's splits add up to, scaled and rounded."""
    mask = (t[:, None] < tokens) & (k[None, :] < cols)
    at = x + t[:, None] * x_stride + k[None, :]
    values = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last")
    if PARTIAL:
        for split in range(1, splits):
            values += tl.load(at + split * split_stride, mask=mask, other=0.0, eviction_policy="evict_last")
        if SCALED:
            values *= tl.load(s + k, mask=k < cols, other=0.0)[None, :]
    return values.to(TYPE)


@triton.jit
def _input(
    x, s, splits, split_stride, k, cols, PARTIAL: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """As `_inputs`, of one token, in the shape of k."""
    mask = k < cols
    values = tl.load(x + k, mask=mask, other=0.0, eviction_policy="evict_last")
    if PARTIAL:
        for split in range(1, splits):
            values += tl.load(x + k + split * split_stride, mask=mask, other=0.0, eviction_policy="evict_last")
        if SCALED:
            values *= tl.load(s + k, mask=mask, other=0.0)
    return values.to(TYPE)


@triton.jit
def _multiply(
    w, w_stride, scales, zeros, groups, row, rows,
    x, x_stride, s, splits, split_stride, tokens, cols, begin, end,
    KIND: tl.constexpr, GROUP: tl.constexpr, PARTIAL: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr,
    WAIT: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """float32 `[ROWS, T]`: `Σ_k weight[row, k] input[token, k]` for k in [begin, end), which is in steps of 64 or K."""
    t = tl.arange(0, T)
    live = row < rows
    if KIND != 2 and KIND != 3:  # plain numbers, int8 or fp8
        offsets = tl.arange(0, K)
        at = w + row[:, None].to(tl.int64) * w_stride + offsets[None, :]
        # The first weights are on their way before the first product is awaited.
        mask = live[:, None] & (begin + offsets < end)[None, :]
        weights = tl.load(at + begin, mask=mask, other=0, eviction_policy="evict_first")
        if WAIT:
            gdc_wait()
        if DOT:
            sums = tl.zeros([ROWS, T], tl.float32)
            for k in range(begin, end, K):
                inputs = _inputs(
                    x, x_stride, s, splits, split_stride, t, tokens, k + offsets, cols, PARTIAL, SCALED, TYPE
                )
                sums += _dot(_numbers(weights, KIND, TYPE), inputs.T)
                mask = live[:, None] & (k + K + offsets < end)[None, :]
                weights = tl.load(at + k + K, mask=mask, other=0, eviction_policy="evict_first")
            result = sums
        else:
            # Lanes are added once, at the end.
            lanes = tl.zeros([ROWS, K], tl.float32)
            for k in range(begin, end, K):
                inputs = _inputs(
                    x, x_stride, s, splits, split_stride, t, tokens, k + offsets, cols, PARTIAL, SCALED, TYPE
                )
                lanes += _floats(weights, KIND) * inputs.to(tl.float32)
                mask = live[:, None] & (k + K + offsets < end)[None, :]
                weights = tl.load(at + k + K, mask=mask, other=0, eviction_policy="evict_first")
            result = tl.sum(lanes, axis=1)[:, None]
        if KIND != 0:
            result *= tl.load(scales + row, mask=live, other=0.0)[:, None]
        return result
    elif DOT:  # int4: blocks of 64 columns, column j of a block in the low half of byte j and j + 32 in its high half
        offsets = tl.arange(0, 32)
        at = w + row[:, None].to(tl.int64) * w_stride + offsets[None, :]
        codes = tl.load(at + begin // 2, mask=live[:, None], other=0, eviction_policy="evict_first")
        if WAIT:
            gdc_wait()
        result = tl.zeros([ROWS, T], tl.float32)
        for k in range(begin, end, 64):
            for half in tl.static_range(2):
                column = k + 32 * half + offsets
                group = tl.minimum((k + 32 * half) // GROUP, groups - 1)  # beyond the last column inputs are zero
                index = row.to(tl.int64) * groups + group
                scale = tl.load(scales + index, mask=live, other=0.0).to(tl.float32)
                numbers = ((codes >> 4) if half else (codes & 15)).to(tl.int32)
                if KIND == 3:
                    numbers -= (tl.load(zeros + index, mask=live, other=0).to(tl.int32) & 15)[:, None]
                else:
                    numbers -= 8
                inputs = _inputs(x, x_stride, s, splits, split_stride, t, tokens, column, cols, PARTIAL, SCALED, TYPE)
                result += _dot(_numbers(numbers, KIND, TYPE), inputs.T) * scale[:, None]
            mask = live[:, None] & (k + 64 < end)
            codes = tl.load(at + (k + 64) // 2, mask=mask, other=0, eviction_policy="evict_first")
        return result
    else:  # the same for one token, of many blocks at a time
        block, byte = tl.arange(0, K // 64), tl.arange(0, 32)
        column = 64 * block[:, None] + byte[None, :]
        first = row.to(tl.int64)
        at = w + first[:, None, None] * w_stride + 32 * block[None, :, None] + byte[None, None, :]
        mask = live[:, None, None] & (begin + 64 * block < end)[None, :, None]
        codes = tl.load(at + begin // 2, mask=mask, other=0, eviction_policy="evict_first")
        if WAIT:
            gdc_wait()
        sums = tl.zeros([ROWS, K // 64], tl.float32)
        for k in range(begin, end, K):
            inside = live[:, None] & (k + 64 * block < end)[None, :]
            part = tl.zeros([ROWS, K // 64, 32], tl.float32)
            for half in tl.static_range(2):
                numbers = ((codes >> 4) if half else (codes & 15)).to(tl.int32)
                group = tl.minimum((k + 64 * block + 32 * half) // GROUP, groups - 1)
                index = first[:, None] * groups + group[None, :]
                if KIND == 3:
                    numbers -= (tl.load(zeros + index, mask=inside, other=8).to(tl.int32) & 15)[:, :, None]
                else:
                    numbers -= 8
                inputs = _input(x, s, splits, split_stride, k + 32 * half + column, cols, PARTIAL, SCALED, TYPE)
                part += numbers.to(tl.float32) * inputs.to(tl.float32)[None, :, :]
                if GROUP == 32 or half == 1:
                    sums += tl.sum(part, axis=2) * tl.load(scales + index, mask=inside, other=0.0).to(tl.float32)
                    part = tl.zeros([ROWS, K // 64, 32], tl.float32)
            mask = live[:, None, None] & (k + K + 64 * block < end)[None, :, None]
            codes = tl.load(at + (k + K) // 2, mask=mask, other=0, eviction_policy="evict_first")
        return tl.sum(sums, axis=1)[:, None]


# ---- the launches


@triton.jit
def shrink_kernel(
    x, x_stride, tokens, cols, partial, ranks, span,
    w0, stride0, scales0, zeros0, rows0,
    w1, stride1, scales1, zeros1, rows1,
    w2, stride2, scales2, zeros2, rows2,
    groups0, groups1, groups2,
    KIND0: tl.constexpr, GROUP0: tl.constexpr,
    KIND1: tl.constexpr, GROUP1: tl.constexpr,
    KIND2: tl.constexpr, GROUP2: tl.constexpr,
    COUNT: tl.constexpr, TYPE: tl.constexpr, PDL: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """partial `[splits, tokens, ranks]`, the siblings' ranks side by side; program (tile of ranks, split)."""
    if PDL:
        gdc_launch_dependents()
    tile, split = tl.program_id(0), tl.program_id(1)
    begin = tl.multiple_of(split * span, 64)  # so the loads know how their addresses are aligned
    end = tl.minimum(begin + span, cols)
    t = tl.arange(0, T)
    tiles0, tiles1 = tl.cdiv(rows0, ROWS), tl.cdiv(rows1, ROWS)
    first = 0
    row = tile * ROWS + tl.arange(0, ROWS)
    rows = rows0
    if COUNT == 1 or tile < tiles0:
        sums = _multiply(
            w0, stride0, scales0, zeros0, groups0, row, rows0, x, x_stride, x, 1, 0, tokens, cols, begin, end,
            KIND0, GROUP0, False, False, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
    elif COUNT == 2 or tile < tiles0 + tiles1:
        row -= tiles0 * ROWS
        first, rows = rows0, rows1
        sums = _multiply(
            w1, stride1, scales1, zeros1, groups1, row, rows1, x, x_stride, x, 1, 0, tokens, cols, begin, end,
            KIND1, GROUP1, False, False, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
    else:
        row -= (tiles0 + tiles1) * ROWS
        first, rows = rows0 + rows1, rows2
        sums = _multiply(
            w2, stride2, scales2, zeros2, groups2, row, rows2, x, x_stride, x, 1, 0, tokens, cols, begin, end,
            KIND2, GROUP2, False, False, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
    to = partial + (split * tokens + t[None, :]) * ranks + first + row[:, None]
    tl.store(to, sums, mask=(row < rows)[:, None] & (t < tokens)[None, :])


@triton.jit
def _expand(
    tile, w, w_stride, scales, zeros, groups, rows, rank, s, bias, place,
    x, x_stride, tokens, partial, ranks, first, splits, y, y_stride,
    FORM: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    TYPE: tl.constexpr, PDL: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One tile of a layer's outputs; of a pivoted layer the tiles behind those of `C` are the pivots themselves."""
    t = tl.arange(0, T)
    row = tile * ROWS + tl.arange(0, ROWS)
    z = partial + first
    if FORM == 0:
        sums = _multiply(
            w, w_stride, scales, zeros, groups, row, rows, x, x_stride, x, 1, 0, tokens, rank, 0, rank,
            KIND, GROUP, False, False, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
        to = row
    elif FORM == 1:
        sums = _multiply(
            w, w_stride, scales, zeros, groups, row, rows, z, ranks, s, splits, tokens * ranks, tokens, rank, 0, rank,
            KIND, GROUP, True, SCALED, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
        to = row
    else:
        tiles = tl.cdiv(rows, ROWS)
        if tile < tiles:
            sums = _multiply(
                w, w_stride, scales, zeros, groups, row, rows, z, ranks, s, splits, tokens * ranks, tokens, rank, 0,
                rank, KIND, GROUP, True, False, TYPE, PDL, DOT, ROWS, K, T,
            )  # fmt: skip
            to = tl.load(place + rank + row, mask=row < rows, other=0)
        else:
            if PDL:
                gdc_wait()
            row -= tiles * ROWS
            rows = rank
            pivots = _inputs(z, ranks, s, splits, tokens * ranks, t, tokens, row, rank, True, False, TYPE)
            sums = pivots.to(tl.float32).T
            to = tl.load(place + row, mask=row < rank, other=0)
    live = row < rows
    if BIASED:
        sums += tl.load(bias + to, mask=live, other=0.0).to(tl.float32)[:, None]
    at = y + t[None, :] * y_stride + to[:, None]
    tl.store(at, sums.to(TYPE), mask=live[:, None] & (t < tokens)[None, :])


@triton.jit
def expand_kernel(
    x, x_stride, tokens, partial, ranks, splits, y, y_stride,
    w0, stride0, scales0, zeros0, rows0, rank0, s0, bias0, place0, groups0,
    w1, stride1, scales1, zeros1, rows1, rank1, s1, bias1, place1, groups1,
    w2, stride2, scales2, zeros2, rows2, rank2, s2, bias2, place2, groups2,
    FORM0: tl.constexpr, KIND0: tl.constexpr, GROUP0: tl.constexpr, SCALED0: tl.constexpr, BIASED0: tl.constexpr,
    FORM1: tl.constexpr, KIND1: tl.constexpr, GROUP1: tl.constexpr, SCALED1: tl.constexpr, BIASED1: tl.constexpr,
    FORM2: tl.constexpr, KIND2: tl.constexpr, GROUP2: tl.constexpr, SCALED2: tl.constexpr, BIASED2: tl.constexpr,
    COUNT: tl.constexpr, TYPE: tl.constexpr, PDL: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """y `[tokens, outputs]`, the siblings' outputs side by side, from `shrink_kernel`'s partial sums and from x.

    rank: columns of the weight: of a dense layer (form 0) the input's, else the layer's rank.
    """
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(rows0, ROWS) + (tl.cdiv(rank0, ROWS) if FORM0 == 2 else 0)
    tiles1 = tl.cdiv(rows1, ROWS) + (tl.cdiv(rank1, ROWS) if FORM1 == 2 else 0)
    in0 = 0 if FORM0 == 0 else rank0
    in1 = 0 if FORM1 == 0 else rank1
    out0 = rows0 + (rank0 if FORM0 == 2 else 0)
    out1 = rows1 + (rank1 if FORM1 == 2 else 0)
    if COUNT == 1 or tile < tiles0:
        _expand(
            tile, w0, stride0, scales0, zeros0, groups0, rows0, rank0, s0, bias0, place0,
            x, x_stride, tokens, partial, ranks, 0, splits, y, y_stride,
            FORM0, KIND0, GROUP0, SCALED0, BIASED0, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
    elif COUNT == 2 or tile < tiles0 + tiles1:
        _expand(
            tile - tiles0, w1, stride1, scales1, zeros1, groups1, rows1, rank1, s1, bias1, place1,
            x, x_stride, tokens, partial, ranks, in0, splits, y + out0, y_stride,
            FORM1, KIND1, GROUP1, SCALED1, BIASED1, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
    else:
        _expand(
            tile - tiles0 - tiles1, w2, stride2, scales2, zeros2, groups2, rows2, rank2, s2, bias2, place2,
            x, x_stride, tokens, partial, ranks, in0 + in1, splits, y + out0 + out1, y_stride,
            FORM2, KIND2, GROUP2, SCALED2, BIASED2, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip


@triton.jit
def _silu_times(gate, up, TYPE: tl.constexpr):
    gate, up = gate.to(TYPE).to(tl.float32), up.to(TYPE).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))) * up


@triton.jit
def swiglu_expand_kernel(
    x, x_stride, tokens, partial, ranks, splits, y, y_stride, rows,
    w0, stride0, scales0, zeros0, rank0, s0, bias0, groups0,
    w1, stride1, scales1, zeros1, rank1, s1, bias1, groups1,
    FORM0: tl.constexpr, KIND0: tl.constexpr, GROUP0: tl.constexpr, SCALED0: tl.constexpr, BIASED0: tl.constexpr,
    FORM1: tl.constexpr, KIND1: tl.constexpr, GROUP1: tl.constexpr, SCALED1: tl.constexpr, BIASED1: tl.constexpr,
    TYPE: tl.constexpr, PDL: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """y `[tokens, rows]` = `silu(gate) ⊙ up`: a program makes the same outputs of both layers, neither pivoted."""
    if PDL:
        gdc_launch_dependents()
    t = tl.arange(0, T)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    size = tokens * ranks
    if FORM0 == 0:
        gate = _multiply(
            w0, stride0, scales0, zeros0, groups0, row, rows, x, x_stride, x, 1, 0, tokens, rank0, 0, rank0,
            KIND0, GROUP0, False, False, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
    else:
        gate = _multiply(
            w0, stride0, scales0, zeros0, groups0, row, rows, partial, ranks, s0, splits, size, tokens, rank0, 0, rank0,
            KIND0, GROUP0, True, SCALED0, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
    if FORM1 == 0:
        up = _multiply(
            w1, stride1, scales1, zeros1, groups1, row, rows, x, x_stride, x, 1, 0, tokens, rank1, 0, rank1,
            KIND1, GROUP1, False, False, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
    else:
        z = partial + (0 if FORM0 == 0 else rank0)
        up = _multiply(
            w1, stride1, scales1, zeros1, groups1, row, rows, z, ranks, s1, splits, size, tokens, rank1, 0, rank1,
            KIND1, GROUP1, True, SCALED1, TYPE, PDL, DOT, ROWS, K, T,
        )  # fmt: skip
    live = row < rows
    if BIASED0:
        gate += tl.load(bias0 + row, mask=live, other=0.0).to(tl.float32)[:, None]
    if BIASED1:
        up += tl.load(bias1 + row, mask=live, other=0.0).to(tl.float32)[:, None]
    at = y + t[None, :] * y_stride + row[:, None]
    tl.store(at, _silu_times(gate, up, TYPE).to(TYPE), mask=live[:, None] & (t < tokens)[None, :])


@triton.jit
def swiglu_kernel(both, y, width, elements, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """y `[tokens, width]` = `silu(both[:, :width]) ⊙ both[:, width:]`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = both + (i // width).to(tl.int64) * 2 * width + i % width
    gate = tl.load(at, mask=i < elements, other=0.0)
    up = tl.load(at + width, mask=i < elements, other=0.0)
    tl.store(y + i, _silu_times(gate, up, TYPE).to(TYPE), mask=i < elements)


# ---- what is launched


@dataclasses.dataclass
class Layer:
    form: int
    first: Matrix
    second: Matrix | None
    place: Tensor | None
    s: Tensor | None
    bias: Tensor | None

    @property
    def last(self) -> Matrix:
        """The weight whose rows are outputs."""
        return self.first if self.form == DENSE or self.second is None else self.second

    @property
    def rank(self) -> int:
        """Inner dimensions; none of a dense layer."""
        return 0 if self.form == DENSE else self.first.rows

    @property
    def out(self) -> int:
        return self.last.rows + (self.rank if self.form == PIVOTED else 0)


def read_layers(tensors: list[Tensor], spec: list[int]) -> list[Layer]:
    """The layers that `fused_linear`'s arguments speak of."""
    numbers, rest, layers = iter(spec), iter(tensors), []

    def matrix() -> Matrix:
        kind, cols, group = next(numbers), next(numbers), next(numbers)
        data = next(rest)
        scales = None if kind == PLAIN else next(rest)
        return Matrix(kind, cols, group, data, scales, next(rest) if kind == INT4_ZEROS else None)

    for form in numbers:
        flags = next(numbers)
        first = matrix()
        second = None if form == DENSE else matrix()
        place = next(rest) if form == PIVOTED else None
        s = next(rest) if flags & 1 else None
        layers.append(Layer(form, first, second, place, s, next(rest) if flags & 2 else None))
    return layers


# As many as there are: otherwise ptxas spills a few, to put one more block on a multiprocessor.
MOST_REGISTERS = 255


def _launch(kernel, grid: tuple[int, ...], x: Tensor, *arguments, **options) -> None:
    if torch.version.hip is None:
        options["maxnreg"] = MOST_REGISTERS
    triton_products.launch(kernel, grid, x, *arguments, **options)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(
    x: Tensor,
    tensors: list[Tensor],
    spec: list[int],
    mode: int,
    config: DecodeConfig | Callable[[Launch], DecodeConfig] | None = None,
    device: Device | None = None,
) -> Tensor:
    """As the reference, for float32, bfloat16 or float16 `x [..., in]` of up to `MOST_TOKENS` tokens.

    config: of every launch, or what tells it for each; None to let `plan` choose, for `device`, or for the one that `x`
    is on and by what `acip tune` has measured there.

    Raises `ValueError` for more tokens, more than three siblings, or a dtype that is not of these.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > MOST_TOKENS:
        raise ValueError(f"fused_linear: the Triton kernels take up to {MOST_TOKENS} tokens, got {len(rows)}")
    if x.dtype not in _TYPES:
        raise ValueError(f"fused_linear: the Triton kernels take float32, bfloat16 and float16, got {x.dtype}")
    rows = rows if rows.stride(-1) == 1 or rows.shape[1] <= 1 else rows.contiguous()
    layers = read_layers(tensors, spec)
    siblings = layers[:2] if mode == GATED_MLP else layers
    if len(siblings) > SIBLINGS:
        raise ValueError(f"fused_linear: the Triton kernels take up to {SIBLINGS} siblings, got {len(siblings)}")
    wrong = [layer.first.cols for layer in siblings if layer.first.cols != x.shape[-1]]
    if wrong:
        raise ValueError(f"fused_linear: x must be [..., {wrong[0]}], got {list(x.shape)}")
    table = measured.table(x.device) if config is None and device is None else None
    device = device or device_of(x.device)

    def choose(weights: list[Matrix], **how) -> DecodeConfig:
        shapes = tuple((m.rows, m.cols, m.kind, m.group) for m in weights)
        if callable(config):
            chosen = config(Launch(len(rows), shapes, itemsize=x.element_size(), **how))
        else:
            chosen = config or decode_config(device, len(rows), shapes, itemsize=x.element_size(), table=table, **how)
        # The interpreter runs one launch after the other.
        return chosen if rows.device.type != "cpu" else dataclasses.replace(chosen, pdl=False)

    if mode == CONCATENATE:
        y = _concatenate(rows, siblings, choose, device)
    else:
        y = _swiglu(rows, siblings, choose, device)
        if mode == GATED_MLP:
            y = _concatenate(y, layers[2:], choose, device)
    return y.view(*x.shape[:-1], y.shape[-1])


def _concatenate(x: Tensor, layers: list[Layer], choose: Callable, device: Device) -> Tensor:
    tokens, width = len(x), sum(layer.out for layer in layers)
    y = x.new_empty(tokens, width)
    if not tokens or not width:
        return y
    partial, splits, ranks = _shrink(x, layers, choose, device)
    chosen = choose([layer.last for layer in layers])
    tiles = 0
    arguments: list = []
    constants: dict[str, Any] = {}
    for number in range(SIBLINGS):
        layer = layers[number] if number < len(layers) else None
        arguments += _expand_arguments(x, layer)
        constants |= _expand_constants(layer, number, device)
        if layer is not None:
            tiles += triton.cdiv(layer.last.rows, chosen.rows)
            tiles += triton.cdiv(layer.rank, chosen.rows) if layer.form == PIVOTED else 0
    _launch(
        expand_kernel, (tiles,), x, x, x.stride(0), tokens, partial, ranks, splits, y, width, *arguments, **constants,
        COUNT=len(layers), TYPE=_TYPES[x.dtype], PDL=chosen.pdl, **chosen.constants(tokens), **chosen.options(),
    )  # fmt: skip
    return y


def _swiglu(x: Tensor, layers: list[Layer], choose: Callable, device: Device) -> Tensor:
    gate, up = layers
    tokens, width = len(x), gate.out
    y = x.new_empty(tokens, width)
    if not tokens or not width:
        return y
    if PIVOTED in (gate.form, up.form):  # whose outputs lie apart
        return swiglu(_concatenate(x, layers, choose, device))
    partial, splits, ranks = _shrink(x, layers, choose, device)
    chosen = choose([gate.last, up.last], together=True)
    arguments: list = []
    constants: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        w, stride, scales, zeros, _, rank, s, bias, _, groups = _expand_arguments(x, layer)
        arguments += [w, stride, scales, zeros, rank, s, bias, groups]
        constants |= _expand_constants(layer, number, device)
    _launch(
        swiglu_expand_kernel, (triton.cdiv(width, chosen.rows),), x,
        x, x.stride(0), tokens, partial, ranks, splits, y, width, width, *arguments, **constants,
        TYPE=_TYPES[x.dtype], PDL=chosen.pdl, **chosen.constants(tokens), **chosen.options(),
    )  # fmt: skip
    return y


def swiglu(both: Tensor) -> Tensor:
    """`silu(gate) ⊙ up [tokens, width]` of both side by side."""
    y, block = both.new_empty(len(both), both.shape[1] // 2), 1024
    if y.numel():
        _launch(
            swiglu_kernel, (triton.cdiv(y.numel(), block),), both, both, y, y.shape[1], y.numel(),
            TYPE=_TYPES[both.dtype], BLOCK=block, num_warps=4,
        )  # fmt: skip
    return y


def _shrink(x: Tensor, layers: list[Layer], choose: Callable, device: Device) -> tuple[Tensor, int, int]:
    """Partial sums `[splits, tokens, ranks]` of every first factor, and both numbers."""
    firsts = [layer.first for layer in layers if layer.form != DENSE]
    tokens, cols = x.shape
    ranks = sum(m.rows for m in firsts)
    if not ranks:
        return x, 1, 0
    chosen = choose(firsts, split=True)
    splits, span = chosen.split(cols)
    partial = torch.empty(splits, tokens, ranks, dtype=torch.float32, device=x.device)
    tiles = 0
    arguments: list = []
    groups: list[int] = []
    constants: dict[str, Any] = {}
    for number in range(SIBLINGS):
        m = firsts[number] if number < len(firsts) else None
        arguments += [x, 0, x, x, 0] if m is None else [*_weight_arguments(x, m), m.rows]
        groups.append(1 if m is None else m.groups)
        constants |= {
            f"KIND{number}": m.kernel_kind(device) if m else PLAIN,
            f"GROUP{number}": (m.group if m else 0) or 64,
        }
        tiles += triton.cdiv(m.rows, chosen.rows) if m else 0
    _launch(
        shrink_kernel, (tiles, splits), x, x, x.stride(0), tokens, cols, partial, ranks, span, *arguments, *groups,
        **constants,
        COUNT=len(firsts), TYPE=_TYPES[x.dtype], PDL=chosen.pdl, **chosen.constants(tokens), **chosen.options(),
    )  # fmt: skip
    return partial, splits, ranks


def _weight_arguments(x: Tensor, m: Matrix) -> list:
    # What there is not is never read; a pointer it has to be.
    return [m.kernel_data, m.data.stride(0), *(x if t is None else t for t in (m.scales, m.zeros))]


def _expand_arguments(x: Tensor, layer: Layer | None) -> list:
    if layer is None:
        return [x, 0, x, x, 0, 0, x, x, x, 1]
    m = layer.last
    vectors = [x if t is None else t for t in (layer.s, layer.bias, layer.place)]
    return [*_weight_arguments(x, m), m.rows, m.cols, *vectors, m.groups]


def _expand_constants(layer: Layer | None, number: int, device: Device) -> dict:
    values = {"FORM": DENSE, "KIND": PLAIN, "GROUP": 64, "SCALED": False, "BIASED": False}
    if layer is not None:
        m = layer.last
        values = {
            "FORM": layer.form,
            "KIND": m.kernel_kind(device),
            "GROUP": m.group or 64,
            "SCALED": layer.s is not None,
            "BIASED": layer.bias is not None,
        }
    return {f"{name}{number}": value for name, value in values.items()}


# The kernels are written with the numbers that `spec` has.
assert (DENSE, FACTORS, PIVOTED, PLAIN, INT8, INT4, INT4_ZEROS) == (0, 1, 2, 0, 1, 2, 3)
assert FP8 == triton_products.FP8
assert (CONCATENATE, SWIGLU, GATED_MLP) == (0, 1, 2)
