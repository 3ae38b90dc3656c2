"""`ops.dropout` on a GPU: one pass over memory, with the same choice of what is kept, to the bit.

And an adapter's products with a dropped input, of numbers of two bytes. Its rank is so small that reading the input is
all they cost: dropped while it is read, or while the result is written, it is neither written nor read once more.

A seed is in the GPU's memory, where a CUDA graph finds another one whenever it is replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_products

BLOCK = 2048
# Of a gradient's product: about four for each multiprocessor of a large GPU; 256 to 1024 were as fast on an H100.
PROGRAMS = 512
# Of adding up its parts: 16 bytes a thread, and as many programs as there are.
SUM_BLOCK = 512


@triton.jit
def _bits(pair, seed):
    """The hash that decides for a pair of elements. pair, seed: int64."""
    low, high = pair.to(tl.uint32), (pair >> 32).to(tl.uint32)
    key = (seed >> 32).to(tl.uint32) ^ (high * 0x9E3779B9)
    v = low * 0x9E3779B1 + seed.to(tl.uint32)
    v = v ^ (v >> 16)
    v = v * 0x7FEB352D ^ key
    v = v ^ (v >> 15)
    v = v * 0x846CA68B
    return v ^ (v >> 16)


@triton.jit
def _kept(start, seed, threshold, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """Whether elements `start` (int64, any shape but one more dimension of 1) + `[0, COUNT)` are kept.

    EVEN: all starts are, so that a pair is hashed once.
    """
    if EVEN:
        bits = _bits((start >> 1) + tl.arange(0, COUNT // 2), seed)
        decides = tl.interleave(bits & 0xFFFF, bits >> 16)
    else:
        number = start + tl.arange(0, COUNT)
        bits = _bits(number >> 1, seed)
        decides = tl.where((number & 1) == 0, bits & 0xFFFF, bits >> 16)
    return decides >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["threshold"])
def drop_kernel(x, to, elements, seed_at, threshold, factor, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """to `[elements]` = x · factor where it is kept, else 0; with ADD that is added to what is there."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    number = start + tl.arange(0, BLOCK)
    inside = number < elements
    kept = _kept(start, tl.load(seed_at), threshold, BLOCK, True)
    values = tl.load(x + number, mask=inside, other=0.0).to(tl.float32) * factor
    dropped = tl.where(kept, values, 0.0).to(to.dtype.element_ty)
    if ADD:
        dropped = dropped.to(tl.float32) + tl.load(to + number, mask=inside, other=0.0).to(tl.float32)
    tl.store(to + number, dropped.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _dropped(
    x, token, start, tokens, columns, seed, threshold, factor, BLOCK_COLUMNS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """A tile of the dropped input, rounded: columns from `start` on, which is even."""
    column, row = start + tl.arange(0, BLOCK_COLUMNS), token.to(tl.int64)[:, None] * columns
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row + column[None, :], mask=inside, other=0.0)
    kept = _kept(row + start, seed, threshold, BLOCK_COLUMNS, EVEN)
    return tl.where(kept, values.to(tl.float32) * factor, 0.0).to(values.dtype)


@triton.jit(do_not_specialize=["threshold"])
def product_kernel(
    x, A, z, tokens, columns, rank, A_row, z_row, seed_at, threshold, factor,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, RANK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """z `[tokens, rank]` = drop(x) Aᵀ, for contiguous x `[tokens, columns]` and A `[rank, columns]`."""
    seed = tl.load(seed_at)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    r = tl.arange(0, RANK)
    sums = tl.zeros((BLOCK_TOKENS, RANK), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        values = _dropped(x, token, start, tokens, columns, seed, threshold, factor, BLOCK_COLUMNS, EVEN)
        inside = (column < columns)[:, None] & (r < rank)[None, :]
        weights = tl.load(A + r[None, :] * A_row + column[:, None], mask=inside, other=0.0)
        sums = triton_products._add_product(values, weights, sums)
    to = z + token[:, None].to(tl.int64) * z_row + r[None, :]
    tl.store(to, sums.to(z.dtype.element_ty), mask=(token < tokens)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def gradient_kernel(
    h, x, partials, tokens, columns, rank, h_row, span, seed_at, threshold, factor,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, RANK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """partials `[splits, rank, columns]`, float32: hᵀ drop(x) of `span` tokens each, for h `[tokens, rank]`."""
    seed = tl.load(seed_at)
    first_column = tl.program_id(0) * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    r, begin = tl.arange(0, RANK), tl.program_id(1) * span
    sums = tl.zeros((RANK, BLOCK_COLUMNS), tl.float32)
    for start in range(begin, tl.minimum(begin + span, tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        values = _dropped(x, token, first_column, tokens, columns, seed, threshold, factor, BLOCK_COLUMNS, EVEN)
        inside = (token < tokens)[None, :] & (r < rank)[:, None]
        gradient = tl.load(h + token[None, :].to(tl.int64) * h_row + r[:, None], mask=inside, other=0.0)
        sums = triton_products._add_product(gradient, values, sums)
    to = partials + (tl.program_id(1) * rank + r[:, None]) * columns + column[None, :]
    tl.store(to, sums, mask=(r < rank)[:, None] & (column < columns)[None, :])


@triton.jit
def sum_kernel(partials, to, splits, elements, BLOCK: tl.constexpr):
    """to `[elements]` = the sum of partials `[splits, elements]`, one after the other."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total, at = tl.zeros((BLOCK,), tl.float32), partials + number
    for _ in range(splits):
        total += tl.load(at, mask=number < elements, other=0.0)
        at += elements
    tl.store(to + number, total, mask=number < elements)


@triton.jit(do_not_specialize=["threshold"])
def add_product_kernel(
    to, h, A, tokens, columns, rank, h_row, A_row, seed_at, threshold, factor,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, RANK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """to `[tokens, columns]`, contiguous, += drop(h A), where h A and what is dropped are rounded as by themselves."""
    seed = tl.load(seed_at)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    r = tl.arange(0, RANK)
    there = (token < tokens)[:, None] & (column < columns)[None, :]
    row = token.to(tl.int64)[:, None] * columns
    number = row + column[None, :]
    old = tl.load(to + number, mask=there, other=0.0)
    gradient = tl.load(
        h + token[:, None].to(tl.int64) * h_row + r[None, :], mask=(token < tokens)[:, None] & (r < rank)[None, :],
        other=0.0,
    )  # fmt: skip
    inside = (r < rank)[:, None] & (column < columns)[None, :]
    weights = tl.load(A + r[:, None] * A_row + column[None, :], mask=inside, other=0.0)
    part = triton_products._add_product(gradient, weights, tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32))
    part = part.to(old.dtype).to(tl.float32) * factor
    kept = _kept(row + first_column, seed, threshold, BLOCK_COLUMNS, EVEN)
    part = tl.where(kept, part, 0.0).to(old.dtype)
    tl.store(to + number, (old.to(tl.float32) + part.to(tl.float32)).to(old.dtype), mask=there)


def takes(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def takes_products(x: Tensor, other: Tensor) -> bool:
    """Whether an adapter's products are computed here: float32's are not exact on tensor cores, and slow without."""
    return takes(x) and x.element_size() == 2 and x.is_contiguous() and x.dtype == other.dtype and other.stride(1) == 1


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def run(x: Tensor, to: Tensor, seed: Tensor, threshold: int, factor: float, *, add: bool) -> Tensor:
    """`to`, both contiguous and of one size and dtype."""
    if x.numel():
        triton_products.launch(
            drop_kernel, (triton.cdiv(x.numel(), BLOCK),), x, x, to, x.numel(), seed, threshold, factor,
            ADD=add, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return to


def product(x: Tensor, A: Tensor, z: Tensor, seed: Tensor, threshold: int, factor: float) -> Tensor:
    """`z [tokens, r] = drop(x) Aᵀ`, for x `[tokens, in]` contiguous and A `[r, in]`, whose rows and z's are too."""
    (tokens, columns), rank = x.shape, len(A)
    if tokens:
        triton_products.launch(
            product_kernel, (triton.cdiv(tokens, 16),), x,
            x, A, z, tokens, columns, rank, A.stride(0), z.stride(0), seed, threshold, factor,
            BLOCK_TOKENS=16, BLOCK_COLUMNS=256, RANK=_padded(rank), EVEN=columns % 2 == 0, num_warps=4, num_stages=3,
        )  # fmt: skip
    return z


def gradient(h: Tensor, x: Tensor, seed: Tensor, threshold: int, factor: float) -> Tensor:
    """`hᵀ drop(x) [r, in]`, float32, for h `[tokens, r]` with contiguous rows and x `[tokens, in]` contiguous."""
    (tokens, columns), rank = x.shape, h.shape[1]
    blocks = triton.cdiv(columns, 64)
    # Splits are added in one order.
    splits = max(1, min(PROGRAMS // blocks, tokens // 256))
    span = triton.cdiv(triton.cdiv(tokens, splits), 64) * 64 or 64
    splits = max(1, triton.cdiv(tokens, span))
    partials = torch.empty(splits, rank, columns, dtype=torch.float32, device=x.device)
    triton_products.launch(
        gradient_kernel, (blocks, splits), x,
        h, x, partials, tokens, columns, rank, h.stride(0), span, seed, threshold, factor,
        BLOCK_TOKENS=64, BLOCK_COLUMNS=64, RANK=_padded(rank), EVEN=columns % 2 == 0, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits == 1:
        return partials[0]
    total = torch.empty_like(partials[0])
    triton_products.launch(
        sum_kernel, (triton.cdiv(total.numel(), SUM_BLOCK),), x, partials, total, splits, total.numel(),
        BLOCK=SUM_BLOCK, num_warps=4,
    )  # fmt: skip
    return total


def add_product(to: Tensor, h: Tensor, A: Tensor, seed: Tensor, threshold: int, factor: float) -> Tensor:
    """`to [tokens, in] += drop(h A)`, for h `[tokens, r]` and A `[r, in]` with contiguous rows, `to` contiguous."""
    (tokens, columns), rank = to.shape, len(A)
    if tokens:
        triton_products.launch(
            add_product_kernel, (triton.cdiv(tokens, 64), triton.cdiv(columns, 128)), to,
            to, h, A, tokens, columns, rank, h.stride(0), A.stride(0), seed, threshold, factor,
            BLOCK_TOKENS=64, BLOCK_COLUMNS=128, RANK=_padded(rank), EVEN=columns % 2 == 0, num_warps=8,
        )  # fmt: skip
    return to
