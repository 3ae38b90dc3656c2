"""Matrix products of many tokens on a GPU, for prefill and training: Triton kernels where a product has company.

A layer's two products are not fused: at these sizes what lies between them, `[tokens, rank]`, is a small part of what
is moved, and each tile of the second product would need a whole row of it. What is fused is what stands beside a
product, which in plain PyTorch is a pass over `[tokens, rank]` or over the weight each time:

- forward, `y = (z ⊙ s) Uᵀ + bias`: `z` is scaled on its way from shared memory to the product; outputs may have their
  places (a pivoted layer), and be written a second time for the product that follows.
- backward, `h = g U`: `h` stays in registers. From there `h ⊙ s` is written, and `Σ_tokens z ⊙ h` of the tile.
- quantized weights, in either: codes are read, and become numbers of the inputs' dtype in registers, rounded once as
  `ops.quantize.dequantize` does.

The same passes by themselves (`scale`, `scale_and_reduce`; `dequantize`, `gather`) stand beside the vendor's products
where `plan.product_plan` expects those to be faster. Products without company are torch's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import Device, Product, ProductConfig, device_of, product_config, product_plan
from .quantize import Quantized

# ---- kernels


@triton.jit
def _tile(blocks_of_tokens, blocks_of_columns):
    """Which tile this block makes, two numbers: eight blocks of tokens share the columns' factor in the L2 cache."""
    number = tl.program_id(0)
    return tl.swizzle2d(number // blocks_of_columns, number % blocks_of_columns, blocks_of_tokens, blocks_of_columns, 8)


@triton.jit
def _at(pointer, number, BLOCK: tl.constexpr, stride):
    """Where block `number` of a dimension begins."""
    return pointer + number.to(tl.int64) * BLOCK * stride


@triton.jit
def _inside(ROWS: tl.constexpr, row_stride, COLUMNS: tl.constexpr, column_stride):
    """Where a tile's numbers are from its first one."""
    return tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :] * column_stride


@triton.jit
def _scales(S, mask, rows, column, columns, ADAPTER_RANK: tl.constexpr):
    """`S ⊙ β` at `column` (of an adapter's it is 0, as it is past the last), float32; of a mask's `rows`, if given."""
    own = (column >= ADAPTER_RANK) & (column < columns)
    at = column - ADAPTER_RANK
    values = tl.load(S + at, mask=own, other=0.0)
    if rows is not None:
        at = tl.load(rows + at, mask=own, other=0)
    return tl.where(tl.load(mask + at, mask=own, other=0.0) > 0, values, 0.0)


@triton.jit
def _scale(values, scales, column, scaling, ADAPTER_RANK: tl.constexpr):
    """`values ⊙ scales` in float32, a choice where the scale is 0: what was pruned may be infinite, or no number."""
    if ADAPTER_RANK > 0:
        scales = tl.where(column < ADAPTER_RANK, scaling, scales)
    return tl.where(scales[None, :] != 0, values.to(tl.float32) * scales[None, :], 0.0)


# Triton's interpreter (3.7.1) multiplies the bit patterns of bfloat16 numbers: there they are widened, without loss.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _add_product(a, b, sums):
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


# A weight's kinds as the kernels have them: those of `ops.fused_linear`, and e4m3 by bits.
INT8, INT4, INT4_ZEROS, FP8, FP8_BY_BITS = 1, 2, 3, 4, 5


@triton.jit
def fp8_numbers(codes, HARDWARE: tl.constexpr):
    """uint8 codes of e4m3 numbers (without NaN) as float32; where there is no instruction for it, by the bits.

    A half has the same bits, one more for the exponent, whose bias is larger by 8; subnormal numbers are as they are.
    """
    if HARDWARE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        wide = codes.to(tl.uint16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return half.to(tl.float32) * 256.0


@triton.jit
def _dequantized(
    weight, stride, scales, zeros, groups, row, column, group, rows_inside, columns_inside, KIND: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Numbers of a quantized weight, rounded to TYPE; row and column, with their masks and group, make up the tile."""
    at = weight + row.to(tl.int64) * stride
    if KIND == 2 or KIND == 3:  # int4: column j of a block of 64 in the low half of byte j and j + 32 in its high half
        bytes = tl.load(at + column // 64 * 32 + column % 32, mask=rows_inside & columns_inside, other=0)
        codes = (bytes.to(tl.int32) >> (column // 32 % 2 * 4)) & 15
        index = row.to(tl.int64) * groups + tl.minimum(group, groups - 1)
        if KIND == 3:
            codes -= tl.load(zeros + index, mask=rows_inside, other=0).to(tl.int32)
        else:
            codes -= 8
        values = codes.to(tl.float32) * tl.load(scales + index, mask=rows_inside, other=0.0).to(tl.float32)
    else:
        codes = tl.load(at + column, mask=rows_inside & columns_inside, other=0)
        values = codes.to(tl.float32) if KIND == 1 else fp8_numbers(codes, KIND == 4)
        values *= tl.load(scales + row, mask=rows_inside, other=0.0)
    return values.to(TYPE)


# Where z is scaled, by the bytes that this moves for T tokens, rank R and n outputs in b bytes each. A pass of its own:
# 2 T R b. The first product's epilogue, which would write z ⊙ s beside the z that the operator keeps: T R b. Here, when
# z's tile is loaded for the product: none but the 8 R of S and mask in each block, from the L2 cache. Each of the
# n / block_columns blocks that load a tile scales it again, one multiplication for 2 block_columns operations of the
# tensor cores. Scaled columns of U would be 2 n R b, and rounded once more.
@triton.jit
def forward_kernel(
    z, U, U_scales, U_zeros, groups, S, mask, rows, bias, place, y, kept,
    tokens, columns, depth, z_row, z_column, U_row, U_column, y_row, scaling,
    KIND: tl.constexpr, GROUP: tl.constexpr, ADAPTER_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`y [tokens, columns] = (z ⊙ s) Uᵀ + bias`, for `z [tokens, depth]` and `U [columns, depth]`.

    The first ADAPTER_RANK of the depth are an adapter's, scaled by `scaling`; the others by `S ⊙ β`; without S, by one.
    `U` is plain, or of KIND with contiguous rows. place: at which column of `y`, whose rows are `y_row` apart, each
    output goes, of which `bias` has one for every column. kept: `[tokens, columns]`, all of it once more, in order and
    without a bias. bias, place and kept may be None.
    """
    at_token, at_column = _tile(tl.cdiv(tokens, BLOCK_TOKENS), tl.cdiv(columns, BLOCK_COLUMNS))
    token = at_token * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = at_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    step = tl.arange(0, BLOCK_K)
    # A long batch has more than 2^31 elements: tiles are found in 64 bits, and in 32 what is in them.
    z_tile = _at(z, at_token, BLOCK_TOKENS, z_row) + _inside(BLOCK_TOKENS, z_row, BLOCK_K, z_column)
    U_tile = _at(U, at_column, BLOCK_COLUMNS, U_row) + _inside(BLOCK_K, U_column, BLOCK_COLUMNS, U_row)
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, depth, BLOCK_K):
        rank = start + step
        values = tl.load(z_tile, mask=(token[:, None] < tokens) & (rank[None, :] < depth), other=0.0)
        if S is not None:
            scales = _scales(S, mask, rows, rank, depth, ADAPTER_RANK)
            values = _scale(values, scales, rank, scaling, ADAPTER_RANK).to(values.dtype)
        ranks_inside, columns_inside = rank[:, None] < depth, column[None, :] < columns
        if KIND == 0:
            factor = tl.load(U_tile, mask=ranks_inside & columns_inside, other=0.0)
        elif BLOCK_K <= GROUP:  # one scale for each row of the tile
            factor = _dequantized(
                U, U_row, U_scales, U_zeros, groups, column[None, :], rank[:, None], start // GROUP,
                columns_inside, ranks_inside, KIND, values.dtype,
            )  # fmt: skip
        else:
            factor = _dequantized(
                U, U_row, U_scales, U_zeros, groups, column[None, :], rank[:, None], rank[:, None] // GROUP,
                columns_inside, ranks_inside, KIND, values.dtype,
            )  # fmt: skip
        sums = _add_product(values, factor, sums)
        z_tile += BLOCK_K * z_column
        U_tile += BLOCK_K * U_column
    inside = (token[:, None] < tokens) & (column[None, :] < columns)
    if kept is not None:
        to = _at(kept, at_token, BLOCK_TOKENS, columns) + at_column * BLOCK_COLUMNS
        tl.store(to + _inside(BLOCK_TOKENS, columns, BLOCK_COLUMNS, 1), sums.to(kept.dtype.element_ty), mask=inside)
    at = column
    if place is not None:
        # What is kept is rounded, and what is written beside it is the same number.
        if kept is not None:
            sums = sums.to(kept.dtype.element_ty).to(tl.float32)
        at = tl.load(place + column, mask=column < columns, other=0)
    if bias is not None:
        sums += tl.load(bias + at, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    to = _at(y, at_token, BLOCK_TOKENS, y_row) + tl.arange(0, BLOCK_TOKENS)[:, None] * y_row + at[None, :]
    tl.store(to, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    h, z, S, mask, rows, hs, partials, at_token, at_column, column, inside, columns, z_row, z_column, scaling,
    ADAPTER_RANK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """What `backward_kernel` makes of a tile of `h`, float32."""
    scaled = h
    if S is not None:
        scales = _scales(S, mask, rows, column, columns, ADAPTER_RANK)
        scaled = _scale(h, scales, column, scaling, ADAPTER_RANK)
    if hs is not None:
        to = _at(hs, at_token, BLOCK_TOKENS, columns) + at_column * BLOCK_COLUMNS
        to += _inside(BLOCK_TOKENS, columns, BLOCK_COLUMNS, 1)
        tl.store(to, scaled.to(hs.dtype.element_ty), mask=inside)
    if S is not None:
        # The columns of an adapter have the scale 0 here, and neither z nor a sum.
        live = scales != 0
        z_tile = _at(z, at_token, BLOCK_TOKENS, z_row) + at_column.to(tl.int64) * BLOCK_COLUMNS * z_column
        z_tile += _inside(BLOCK_TOKENS, z_row, BLOCK_COLUMNS, z_column)
        values = tl.load(z_tile, mask=inside & live[None, :], other=0.0).to(tl.float32)
        to_sum = partials + at_token.to(tl.int64) * (columns - ADAPTER_RANK) + column - ADAPTER_RANK
        tl.store(to_sum, tl.sum(values * h, 0), mask=(column >= ADAPTER_RANK) & (column < columns))


@triton.jit
def backward_kernel(
    g, U, U_scales, U_zeros, groups, z, S, mask, rows, hs, partials,
    tokens, columns, depth, g_row, g_column, U_row, U_column, z_row, z_column, scaling,
    KIND: tl.constexpr, GROUP: tl.constexpr, ADAPTER_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With `h = g U`, for `g [tokens, depth]`, `U [depth, columns]`: `hs = h ⊙ s`, and sums of `z ⊙ h` over tokens.

    `z` and contiguous `hs` are `[tokens, columns]`; `partials [blocks of tokens, columns - ADAPTER_RANK]`, float32, has
    a row of sums for each block of tokens, of no meaning where an entry is pruned. Columns of an adapter and U as
    `forward_kernel`'s. `hs` may be None: it is not wanted. S may be None: `hs` is `h`, and there are no sums.
    """
    at_token, at_column = _tile(tl.cdiv(tokens, BLOCK_TOKENS), tl.cdiv(columns, BLOCK_COLUMNS))
    token = at_token * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = at_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    step = tl.arange(0, BLOCK_K)
    g_tile = _at(g, at_token, BLOCK_TOKENS, g_row) + _inside(BLOCK_TOKENS, g_row, BLOCK_K, g_column)
    U_tile = _at(U, at_column, BLOCK_COLUMNS, U_column) + _inside(BLOCK_K, U_row, BLOCK_COLUMNS, U_column)
    h = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, depth, BLOCK_K):
        out = start + step
        gradient = tl.load(g_tile, mask=(token[:, None] < tokens) & (out[None, :] < depth), other=0.0)
        outs_inside, columns_inside = out[:, None] < depth, column[None, :] < columns
        if KIND == 0:
            factor = tl.load(U_tile, mask=outs_inside & columns_inside, other=0.0)
        else:
            factor = _dequantized(
                U, U_row, U_scales, U_zeros, groups, out[:, None], column[None, :], column[None, :] // GROUP,
                outs_inside, columns_inside, KIND, gradient.dtype,
            )  # fmt: skip
        h = _add_product(gradient, factor, h)
        g_tile += BLOCK_K * g_column
        U_tile += BLOCK_K * U_row
    inside = (token[:, None] < tokens) & (column[None, :] < columns)
    _finish(
        h, z, S, mask, rows, hs, partials, at_token, at_column, column, inside, columns, z_row, z_column, scaling,
        ADAPTER_RANK, BLOCK_TOKENS, BLOCK_COLUMNS,
    )  # fmt: skip


@triton.jit
def scale_kernel(
    z, S, mask, rows, zs, tokens, columns, z_row, z_column, scaling,
    ADAPTER_RANK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`zs [tokens, columns] = z ⊙ s`, contiguous: the pass of `forward_kernel` by itself."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (token[:, None] < tokens) & (column[None, :] < columns)
    scales = _scales(S, mask, rows, column, columns, ADAPTER_RANK)
    row = token[:, None].to(tl.int64)
    values = tl.load(z + row * z_row + column[None, :] * z_column, mask=inside, other=0.0)
    scaled = _scale(values, scales, column, scaling, ADAPTER_RANK)
    tl.store(zs + row * columns + column[None, :], scaled.to(zs.dtype.element_ty), mask=inside)


@triton.jit
def scale_and_reduce_kernel(
    h, z, S, mask, rows, hs, partials, tokens, columns, h_row, h_column, z_row, z_column, scaling,
    ADAPTER_RANK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """What `backward_kernel` does beside its product, for an `h [tokens, columns]` that is there already."""
    at_token, at_column = tl.program_id(0), tl.program_id(1)
    token = at_token * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = at_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (token[:, None] < tokens) & (column[None, :] < columns)
    at = token[:, None].to(tl.int64) * h_row + column[None, :] * h_column
    tile = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    _finish(
        tile, z, S, mask, rows, hs, partials, at_token, at_column, column, inside, columns, z_row, z_column, scaling,
        ADAPTER_RANK, BLOCK_TOKENS, BLOCK_COLUMNS,
    )  # fmt: skip


@triton.jit
def _rounded(values, TYPE: tl.constexpr):
    """float32 `values` in TYPE, to nearest even; the interpreter cuts bfloat16 off, so there it is done by the bits."""
    if _INTERPRETED and TYPE.is_bf16():
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(TYPE)


# A whole weight as numbers, for the vendor's products: codes are read once and not kept in a cache; what is written is
# read by the next launch, and small enough to be in the L2 cache still (of Llama-3.1-8B's o at half the size 16 MiB).
# A thread reads 16 bytes and writes 16 at a time; nothing is computed for each number but the number, as a row of the
# tile has one scale, and a block of 64 int4 columns one or two.
@triton.jit
def dequantize_kernel(
    weight, scales, zeros, to, rows, cols, stride, groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`to [rows, cols]`, contiguous, of a weight of KIND whose rows are `stride` apart, rounded once.

    As `ops.quantize.dequantize` to the bit. scales and zeros, contiguous, are `[rows]`, or of int4 `[rows, groups]`.
    """
    TYPE: tl.constexpr = to.dtype.element_ty
    blocks = tl.cdiv(cols, BLOCK_COLUMNS)
    number = tl.program_id(0)
    row = number // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    begin = number % blocks * BLOCK_COLUMNS
    live = row < rows
    wide = row.to(tl.int64)
    if KIND == 2 or KIND == 3:  # byte j of a block: column j in the low half and j + 32 in the high half
        block = begin // 64 + tl.arange(0, BLOCK_COLUMNS // 64)
        byte = tl.arange(0, 32)
        at = weight + (wide * stride)[:, None, None] + block[None, :, None] * 32 + byte[None, None, :]
        inside = live[:, None] & (64 * block < cols)[None, :]
        codes = tl.load(at, mask=inside[:, :, None], other=0, eviction_policy="evict_first")
        column = block[:, None] * 64 + byte[None, :]
        for half in tl.static_range(2):
            index = (wide * groups)[:, None] + tl.minimum((64 * block + 32 * half) // GROUP, groups - 1)[None, :]
            values = ((codes >> 4) if half else (codes & 15)).to(tl.int32)
            if KIND == 3:
                values -= tl.load(zeros + index, mask=inside, other=0).to(tl.int32)[:, :, None]
            else:
                values -= 8
            scale = tl.load(scales + index, mask=inside, other=0.0).to(tl.float32)
            numbers = _rounded(values.to(tl.float32) * scale[:, :, None], TYPE)
            there = to + (wide * cols)[:, None, None] + (column + 32 * half)[None, :, :]
            tl.store(there, numbers, mask=live[:, None, None] & (column + 32 * half < cols)[None, :, :])
    else:
        column = begin + tl.arange(0, BLOCK_COLUMNS)
        inside = live[:, None] & (column < cols)[None, :]
        at = weight + (wide * stride)[:, None] + column[None, :]
        codes = tl.load(at, mask=inside, other=0, eviction_policy="evict_first")
        values = codes.to(tl.float32) if KIND == 1 else fp8_numbers(codes, KIND == 4)
        values *= tl.load(scales + row, mask=live, other=0.0)[:, None]
        tl.store(to + (wide * cols)[:, None] + column[None, :], _rounded(values, TYPE), mask=inside)


@triton.jit
def invert_kernel(place, inverse, size, BLOCK: tl.constexpr):
    """`inverse[place[j]] = j` for the `size` numbers of a permutation."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(inverse + tl.load(place + j, mask=j < size, other=0), j.to(inverse.dtype.element_ty), mask=j < size)


# Not a store of each output at its place: threads that write numbers next to each other write whole lines, and those
# that read have the row, some KB, in the L1 cache after its first lines were read. A pivoted layer's outputs are two
# rising sequences, so that neighbours in `y` are of two or three lines of `z`.
@triton.jit
def gather_kernel(
    z, inverse, bias, y, tokens, columns, z_row, y_row, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """`y[t, c] = z[t, inverse[c]] + bias[c]`, both `[tokens, columns]` with rows that far apart; bias may be None."""
    TYPE: tl.constexpr = y.dtype.element_ty
    # Blocks of one row's columns are next to each other in time: what they read is the same row.
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    token = (tl.program_id(0) // blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    from_ = tl.load(inverse + column, mask=column < columns, other=0)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    values = tl.load(z + (token * z_row)[:, None] + from_[None, :], mask=inside, other=0.0)
    if bias is not None:
        sums = values.to(tl.float32)
        sums += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        values = _rounded(sums, TYPE)
    tl.store(y + (token * y_row)[:, None] + column[None, :], values, mask=inside)


# Not `partials.sum(0)`: with the product, the quotient and the choice after it that is five launches of some
# microseconds for a few kilobytes; and torch's order of adding may change with its version.
@triton.jit
def mask_gradient_kernel(
    partials, S, mask, rows, dmask, blocks, ranks, mask_scale, BLOCK_ROWS: tl.constexpr, BLOCK_RANKS: tl.constexpr
):
    """`∂L/∂mask [ranks] = 1[mask > 0] · S · Σ_blocks partials / mask_scale`, for `partials [blocks, ranks]`.

    Of a longer mask, at `rows [ranks]` of it, if they are not None.
    """
    rank = tl.program_id(0) * BLOCK_RANKS + tl.arange(0, BLOCK_RANKS)
    row = tl.arange(0, BLOCK_ROWS)
    inside = rank < ranks
    sums = tl.zeros((BLOCK_ROWS, BLOCK_RANKS), tl.float32)
    for start in range(0, blocks, BLOCK_ROWS):
        at = (start + row).to(tl.int64)[:, None] * ranks + rank[None, :]
        sums += tl.load(partials + at, mask=(start + row < blocks)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(sums, 0) * tl.load(S + rank, mask=inside, other=0.0) / mask_scale
    if rows is not None:
        rank = tl.load(rows + rank, mask=inside, other=0)
    live = tl.load(mask + rank, mask=inside, other=0.0) > 0
    tl.store(dmask + rank, tl.where(live, total, 0.0), mask=inside)


# ---- launches

MASK_GRADIENT_BLOCKS = {"BLOCK_ROWS": 16, "BLOCK_RANKS": 64}


def options(config: ProductConfig) -> dict[str, int]:
    """A kernel's constants and the launch's options."""
    return {
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


@dataclasses.dataclass
class Matrix:
    """A weight `[rows, cols]` of one of the formats; of plain ones scales are None, of symmetric ones zeros."""

    kind: int
    cols: int
    group: int
    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def groups(self) -> int:
        return -(-self.cols // self.group) if self.group else 1

    def kernel_kind(self, device: Device) -> int:
        """Its kind as the kernels have it: e4m3 by bits where `device` has no instruction for it."""
        return FP8_BY_BITS if self.kind == FP8 and not device.fp8 else self.kind

    @property
    def kernel_data(self) -> Tensor:
        """Codes as the kernels take them: of e4m3 the bytes, as not every device has the type."""
        return self.data.view(torch.uint8) if self.kind == FP8 else self.data


def matrix(weight: Quantized, cols: int, group: int) -> Matrix:
    """`weight [rows, cols]` as the kernels take it."""
    kinds = {torch.int8: INT8, torch.float8_e4m3fn: FP8, torch.uint8: INT4 if weight.zeros is None else INT4_ZEROS}
    kind = kinds[weight.qweight.dtype]
    return Matrix(kind, cols, group if kind in (INT4, INT4_ZEROS) else 0, *(t for t in weight))


_device = functools.cache(device_of)


def _configure(product: Product, config: ProductConfig | None, x: Tensor) -> ProductConfig:
    device = _device(x.device)
    if config is None:
        return product_config(product, device)
    if reason := config.why_not(product, device):
        raise ValueError(f"{config} cannot run {product}: {reason}")
    return config


def pays(products: list[Product], x: Tensor, beside: int) -> bool:
    """Whether ours are expected to be faster than the vendor's with their company apart, by `plan.product_plan`."""
    return product_plan(products, _device(x.device), beside).way == "ours"


def _weight(U: Tensor | Matrix, x: Tensor) -> tuple[Matrix, list, dict]:
    """The weight, and what a kernel takes of it: pointers and groups; kind and group."""
    if isinstance(U, Tensor):
        U = Matrix(0, U.shape[1], 0, U)
    # What there is not is never read; a pointer it has to be.
    arguments = [U.kernel_data, *(x if t is None else t for t in (U.scales, U.zeros)), U.groups]
    return U, arguments, {"KIND": U.kernel_kind(_device(x.device)), "GROUP": U.group or 64}


# What was compiled, by all that Triton specializes a kernel for.
_compiled: dict[tuple, Any] = {}


def launch(kernel, grid: tuple[int, ...], x: Tensor, *arguments, **options) -> None:
    """`kernel[grid](…)` on the device of x; one place, where `bench.kernel_builds` hears what would be launched.

    Triton takes 40 to 60 µs of Python to find which of its compiled kernels a call is for, as much as all layers of a
    decoder's block take on a GPU. So it is asked once for arguments of a kind: dtypes, whether addresses are multiples
    of 16, and which numbers are one, or multiples of 16.
    """
    if not x.is_cuda:
        kernel[grid](*arguments, **options)  # interpreted
        return
    kinds = [
        (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor)
        else (a == 1, a % 16 == 0, -(1 << 31) <= a < 1 << 31, a < 1 << 63) if type(a) is int
        else type(a)
        for a in arguments
    ]  # fmt: skip
    key = (kernel, x.device, *kinds, *options.items())
    found = _compiled.get(key)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if found is None:
            constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
            _compiled[key] = kernel[grid](*arguments, **options), constants
        else:
            found[0][grid + (1,) * (3 - len(grid))](*arguments, *found[1])


def forward_product(
    z: Tensor,
    U: Tensor | Matrix,
    S: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    adapter_rank: int = 0,
    scaling: float = 1.0,
    config: ProductConfig | None = None,
    *,
    rows: Tensor | None = None,
    place: Tensor | None = None,
    y: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """`y [tokens, out] = (z ⊙ s) Uᵀ + bias`, for `z [tokens, depth]` and `U [out, depth]` of any strides, or quantized.

    `S` and `mask` `[depth - adapter_rank]`, float32; `s` is `scaling` for an adapter's, `S ⊙ β` for the rest; without
    `S` it is one. rows, int64 like `S`: `mask` is a longer one, of which these are meant. place, int32 `[out]`: at
    which column of `y`, then given, each output goes; kept: see the kernel.
    """
    U, weight, constants = _weight(U, z)
    (tokens, depth), columns = z.shape, U.rows
    y = z.new_empty(tokens, columns) if y is None else y
    if not tokens or not columns:  # nor is there a grid without a block
        return y
    product = Product(tokens, columns, depth, z.element_size(), U.kind, U.group)
    config = _configure(product, config, z)
    grid = (triton.cdiv(tokens, config.block_tokens) * triton.cdiv(columns, config.block_columns),)
    S, mask, bias = (None if t is None else t.contiguous() for t in (S, mask, bias))
    launch(
        forward_kernel, grid, z, z, *weight, S, mask, rows, bias, place, y, kept,
        tokens, columns, depth, *z.stride(), *weight[0].stride(), y.stride(0), scaling,
        **constants, ADAPTER_RANK=adapter_rank, **options(config),
    )  # fmt: skip
    return y


def backward_product(
    g: Tensor,
    U: Tensor | Matrix,
    z: Tensor | None = None,
    S: Tensor | None = None,
    mask: Tensor | None = None,
    mask_scale: float = 1.0,
    adapter_rank: int = 0,
    scaling: float = 1.0,
    need_hs: bool = True,
    config: ProductConfig | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """With `h = g U`: `h ⊙ s [tokens, columns]`, or None, and the mask's gradient, of its own size.

    `g [tokens, out]`, `U [out, columns]` and `z [tokens, columns]` of any strides; the others as `forward_product`'s.
    Without `S`, `h` and no gradient.
    """
    U, weight, constants = _weight(U, g)
    (tokens, depth), columns = g.shape, U.cols
    hs = g.new_empty(tokens, columns) if need_hs else None
    if not columns:
        return hs, None
    config = _configure(Product(tokens, columns, depth, g.element_size(), U.kind, U.group), config, g)
    blocks = triton.cdiv(tokens, config.block_tokens)
    S, mask, partials = _for_sums(S, mask, blocks)
    z_strides = (0, 0) if z is None else z.stride()
    # A tile of g is loaded by whole lines along its rows, or its columns. Where neither are neighbours in memory
    # (`y.sum()` sends back one number at stride 0) every number would be a load, once for each block of columns. Rows
    # at stride 0 are as good as others.
    if 1 not in g.stride():
        g = g.contiguous()
    if tokens:
        launch(
            backward_kernel, (blocks * triton.cdiv(columns, config.block_columns),), g,
            g, *weight, z, S, mask, rows, hs, partials,
            tokens, columns, depth, *g.stride(), *weight[0].stride(), *z_strides, scaling,
            **constants, ADAPTER_RANK=adapter_rank, **options(config),
        )  # fmt: skip
    return hs, None if S is None else _mask_gradient(partials, S, mask, rows, mask_scale)


# Of a pass by itself.
PASS_BLOCKS = {"BLOCK_TOKENS": 64, "BLOCK_COLUMNS": 64}


def scale(
    z: Tensor, S: Tensor, mask: Tensor, adapter_rank: int = 0, scaling: float = 1.0, rows: Tensor | None = None
) -> Tensor:
    """`z ⊙ s`, contiguous; arguments as `forward_product`'s."""
    zs = torch.empty_like(z, memory_format=torch.contiguous_format)
    if zs.numel():
        grid = tuple(triton.cdiv(size, block) for size, block in zip(z.shape, PASS_BLOCKS.values()))
        launch(
            scale_kernel, grid, z, z, S.contiguous(), mask.contiguous(), rows, zs, *z.shape, *z.stride(), scaling,
            ADAPTER_RANK=adapter_rank, **PASS_BLOCKS, num_warps=4,
        )  # fmt: skip
    return zs


# Of a whole weight: a warp reads 512 bytes of a row at once. Int4's blocks have twice the columns for that.
DEQUANTIZE_BLOCKS = {"BLOCK_ROWS": 8, "BLOCK_COLUMNS": 512}
DEQUANTIZE_INT4_BLOCKS = {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 1024}
GATHER_BLOCKS = {"BLOCK_TOKENS": 8, "BLOCK_COLUMNS": 512}
INVERT_BLOCK = 256


def dequantize(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """The plain weight `[rows, cols]`: in one pass what `ops.quantize.dequantize` makes, to the bit."""
    assert weight.scales is not None
    data, cols = weight.kernel_data, weight.cols
    data = data if data.stride(1) == 1 or data.shape[1] <= 1 else data.contiguous()
    scales = weight.scales.contiguous()
    to = torch.empty(weight.rows, cols, dtype=dtype, device=data.device)
    if to.numel():
        blocks = DEQUANTIZE_INT4_BLOCKS if weight.group else DEQUANTIZE_BLOCKS
        rows_, columns_ = blocks.values()
        launch(
            dequantize_kernel, (triton.cdiv(weight.rows, rows_) * triton.cdiv(cols, columns_),), data,
            data, scales, scales if weight.zeros is None else weight.zeros.contiguous(), to,
            weight.rows, cols, data.stride(0), weight.groups,
            KIND=weight.kernel_kind(_device(data.device)), GROUP=weight.group or 64, **blocks, num_warps=4,
        )  # fmt: skip
    return to


def invert(permutation: Tensor) -> Tensor:
    """int32 `[size]`: where each number of the permutation, of any integer type, is in it."""
    permutation = permutation.contiguous()
    inverse = torch.empty_like(permutation, dtype=torch.int32)
    if size := len(permutation):
        launch(
            invert_kernel, (triton.cdiv(size, INVERT_BLOCK),), permutation, permutation, inverse, size,
            BLOCK=INVERT_BLOCK, num_warps=4,
        )  # fmt: skip
    return inverse


def gather(z: Tensor, inverse: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """`y[t, c] = z[t, inverse[c]]`, and `bias[c]` added to that and rounded, of `[tokens, columns]` each."""
    tokens, columns = y.shape
    if y.numel():
        tokens_, columns_ = GATHER_BLOCKS.values()
        launch(
            gather_kernel, (triton.cdiv(tokens, tokens_) * triton.cdiv(columns, columns_),), y,
            z, inverse, None if bias is None else bias.contiguous(), y, tokens, columns, z.stride(0), y.stride(0),
            **GATHER_BLOCKS, num_warps=4,
        )  # fmt: skip
    return y


def scale_and_reduce(
    h: Tensor,
    z: Tensor,
    S: Tensor,
    mask: Tensor,
    mask_scale: float,
    adapter_rank: int = 0,
    scaling: float = 1.0,
    need_hs: bool = True,
    rows: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """As `backward_product`, of the `h [tokens, columns]` that another product has made."""
    tokens, columns = h.shape
    hs = torch.empty_like(h, memory_format=torch.contiguous_format) if need_hs else None
    blocks = triton.cdiv(tokens, PASS_BLOCKS["BLOCK_TOKENS"])
    S, mask, partials = S.contiguous(), mask.contiguous(), S.new_empty(blocks, len(S))
    if tokens:
        launch(
            scale_and_reduce_kernel, (blocks, triton.cdiv(columns, PASS_BLOCKS["BLOCK_COLUMNS"])), h,
            h, z, S, mask, rows, hs, partials, tokens, columns, *h.stride(), *z.stride(), scaling,
            ADAPTER_RANK=adapter_rank, **PASS_BLOCKS, num_warps=4,
        )  # fmt: skip
    return hs, _mask_gradient(partials, S, mask, rows, mask_scale)


def _for_sums(S: Tensor | None, mask: Tensor | None, blocks: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """S and mask, contiguous, and room for the sums of every block of tokens."""
    if S is None:
        return None, None, None
    return S.contiguous(), mask.contiguous(), S.new_empty(blocks, len(S))


def _mask_gradient(partials: Tensor, S: Tensor, mask: Tensor, rows: Tensor | None, mask_scale: float) -> Tensor:
    (blocks, ranks), dmask = partials.shape, torch.empty_like(S) if rows is None else torch.zeros_like(mask)
    if ranks:
        grid = (triton.cdiv(ranks, MASK_GRADIENT_BLOCKS["BLOCK_RANKS"]),)
        launch(
            mask_gradient_kernel, grid, S, partials, S, mask, rows, dmask, blocks, ranks, mask_scale,
            **MASK_GRADIENT_BLOCKS, num_warps=4,
        )  # fmt: skip
    return dmask
