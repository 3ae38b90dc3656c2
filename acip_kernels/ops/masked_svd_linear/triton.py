"""The masked SVD product of an ACIP run on a GPU, for 64 tokens and more: Triton kernels where a product has company.

A layer's two products are not fused: at prefill's sizes `z` and `h` are a small part of what is moved, and each tile of
the second product would need a whole row of them. What is fused is what stands beside a product, which in plain PyTorch
is a pass over `[tokens, rank]` each time:

- forward, `y = (z ⊙ s) Uᵀ + bias`: `z` is scaled on its way from shared memory to the product.
- backward, `h = g U`: `h` stays in registers. From there `h ⊙ s` is written, and `Σ_tokens z ⊙ h` of the tile.

`z = x Vhᵀ`, `∂L/∂x = (h ⊙ s) Vh` and the adapter's narrow products have no such company and are torch's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Device, device_of
from ..common import add_product, product
from . import native
from .problem import Adapter, Gradients, after_ranks

products = native.products  # torch's products on either device


# ---- configurations


@dataclasses.dataclass(frozen=True)
class Shape:
    """A product `[tokens, depth] × [depth, columns]` of numbers of `itemsize` bytes.

    forward: columns are out_features and depth the rank; backward: the other way round.
    """

    tokens: int
    columns: int
    depth: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is cut: each block makes `[block_tokens, block_columns]`, `block_k` of the depth at a time.

    num_warps of them make a block; num_stages tiles of each factor are on their way to it, or there.
    """

    block_tokens: int
    block_columns: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory that a block takes at most, on any target."""
        # Hopper's product reads a stage that the older ones have copied to registers: they need one less.
        factors = self.num_stages * (self.block_tokens + self.block_columns) * self.block_k * itemsize
        # Singular values and masks travel with the factors' tiles.
        scales = self.num_stages * 2 * self.block_k * 4
        # The results change their layout between threads on their way out, when the factors' tiles are used up;
        # rows are padded against bank conflicts.
        results = self.block_tokens * (self.block_columns + 8) * 4
        return max(factors + scales, results)

    def why_not(self, shape: Shape, device: Device) -> str | None:
        """What keeps the kernels from running this for `shape`, or None: the one rule of launch, choice and tests."""
        sizes = dataclasses.astuple(self)[:4]
        if any(size < 1 or size & (size - 1) for size in sizes):
            return "blocks and warps must be powers of two"
        if self.num_warps > 16 or self.num_stages < 1:
            return "a block has up to 16 warps, and a stage at least"
        for block, size in zip(sizes, (shape.tokens, shape.columns, shape.depth)):
            if block < 16:
                return "tensor cores take blocks of 16 and more"
            if block > max(16, triton.next_power_of_2(size)):
                return "a block would be padding for more than half"
        # A thread has 255 registers. With 128 sums in them the backward pass, that needs z beside h, spills 64 to 184
        # bytes on sm_80 and sm_90; in float32, where the threads multiply by themselves, both passes do with 64.
        threads = 32 * self.num_warps
        sums, most = self.block_tokens * self.block_columns // threads, 128 // shape.itemsize
        if not 4 <= sums <= most:
            return f"a thread adds up 4 to {most} sums, not {sums}"
        # A step's z passes through registers to be scaled, and without stages, or on AMD, all that is loaded does.
        loaded = (self.block_tokens + self.block_columns) * self.block_k // threads
        if loaded > 64:
            return f"a thread loads up to 64 numbers a step, not {loaded}"
        if (needed := self.shared(shape.itemsize)) > device.shared_bytes:
            return f"a block needs {needed} bytes of shared memory and {device.name} has {device.shared_bytes}"
        return None


def configs(shape: Shape, device: Device) -> Iterator[Config]:
    """Every legal configuration for `shape` out of those that can be of use."""
    blocks = (16, 32, 64, 128, 256)
    for sizes in itertools.product(blocks, blocks, (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4)):
        config = Config(*sizes)
        if config.why_not(shape, device) is None:
            yield config


# A block's start, the first tiles' way from memory and the last results' way back, about.
_BLOCK_SECONDS = 1e-6


def seconds(config: Config, shape: Shape, device: Device) -> float:
    """How long a roofline model lets `shape` take: rounds of blocks, each bound by arithmetic or by what it loads.

    Tiles come from the L2 cache, which is taken for twice as fast as memory; a multiprocessor holds one block.
    """
    blocks = triton.cdiv(shape.tokens, config.block_tokens) * triton.cdiv(shape.columns, config.block_columns)
    steps = triton.cdiv(shape.depth, config.block_k)
    # A multiprocessor has four schedulers with a tensor core each, and a warp belongs to one of them.
    rate = (device.matrix_rate if shape.itemsize == 2 else device.vector_rate) * min(config.num_warps, 4) / 4
    operations = 2 * config.block_tokens * config.block_columns * config.block_k
    # Part of a cache line takes as long as all of it.
    loads = (config.block_tokens + config.block_columns) * max(config.block_k * shape.itemsize, 128)
    step = max(operations / rate, loads / (2 * device.bandwidth)) * device.multiprocessors
    return triton.cdiv(blocks, device.multiprocessors) * (_BLOCK_SECONDS + steps * step)


@functools.lru_cache(maxsize=4096)
def default_config(shape: Shape, device: Device) -> Config:
    """The legal configuration that `seconds` takes for the fastest; of equals one with work for every scheduler."""

    def cost(config: Config) -> tuple[float, ...]:
        sums = config.block_tokens * config.block_columns // (32 * config.num_warps)
        # Steps of 64 are whole cache lines of two-byte numbers. None of this order has been measured yet.
        return (
            seconds(config, shape, device),
            config.num_warps < 4,
            -sums,
            abs(math.log2(config.block_k / 64)),
            -config.num_stages,
        )

    return min(configs(shape, device), key=cost)


_device = functools.cache(device_of)


def _configure(shape: Shape, config: Config | None, x: Tensor) -> Config:
    device = _device(x.device)
    if config is None:
        return default_config(shape, device)
    if reason := config.why_not(shape, device):
        raise ValueError(f"{config} cannot run {shape}: {reason}")
    return config


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
def _scales(S, mask, column, columns, ADAPTER_RANK: tl.constexpr):
    """`S ⊙ β` at `column` (of an adapter's it is 0, as it is past the last), float32."""
    own = (column >= ADAPTER_RANK) & (column < columns)
    live = tl.load(mask + column - ADAPTER_RANK, mask=own, other=0.0) > 0
    return tl.where(live, tl.load(S + column - ADAPTER_RANK, mask=own, other=0.0), 0.0)


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


# Where z is scaled, by the bytes that this moves for T tokens, rank R and n outputs in b bytes each. A pass of its own:
# 2 T R b. The first product's epilogue, which would write z ⊙ s beside the z that the operator keeps: T R b. Here, when
# z's tile is loaded for the product: none but the 8 R of S and mask in each block, from the L2 cache. Each of the
# n / block_columns blocks that load a tile scales it again, one multiplication for 2 block_columns operations of the
# tensor cores. Scaled columns of U would be 2 n R b, and rounded once more.
@triton.jit
def forward_kernel(
    z,
    U,
    S,
    mask,
    bias,
    y,
    tokens,
    columns,
    depth,
    z_row,
    z_column,
    U_row,
    U_column,
    scaling,
    ADAPTER_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`y [tokens, columns] = (z ⊙ s) Uᵀ + bias`, for `z [tokens, depth]`, `U [columns, depth]`, contiguous `y`.

    The first ADAPTER_RANK of the depth are an adapter's, scaled by `scaling`; the others by `S ⊙ β`. `bias` may be
    None.
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
        scales = _scales(S, mask, rank, depth, ADAPTER_RANK)
        values = tl.load(z_tile, mask=(token[:, None] < tokens) & (rank[None, :] < depth), other=0.0)
        values = _scale(values, scales, rank, scaling, ADAPTER_RANK).to(values.dtype)
        factor = tl.load(U_tile, mask=(rank[:, None] < depth) & (column[None, :] < columns), other=0.0)
        sums = _add_product(values, factor, sums)
        z_tile += BLOCK_K * z_column
        U_tile += BLOCK_K * U_column
    if bias is not None:
        sums += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    to = _at(y, at_token, BLOCK_TOKENS, columns) + at_column * BLOCK_COLUMNS
    to += _inside(BLOCK_TOKENS, columns, BLOCK_COLUMNS, 1)
    tl.store(to, sums.to(y.dtype.element_ty), mask=(token[:, None] < tokens) & (column[None, :] < columns))


@triton.jit
def backward_kernel(
    g,
    U,
    z,
    S,
    mask,
    hs,
    partials,
    tokens,
    columns,
    depth,
    g_row,
    g_column,
    U_row,
    U_column,
    z_row,
    z_column,
    scaling,
    ADAPTER_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With `h = g U`, for `g [tokens, depth]`, `U [depth, columns]`: `hs = h ⊙ s`, and sums of `z ⊙ h` over tokens.

    `z` and contiguous `hs` are `[tokens, columns]`; `partials [blocks of tokens, columns - ADAPTER_RANK]`, float32, has
    a row of sums for each block of tokens, of no meaning where an entry is pruned. Columns of an adapter as
    `forward_kernel`'s. `hs` may be None: it is not wanted.
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
        factor = tl.load(U_tile, mask=(out[:, None] < depth) & (column[None, :] < columns), other=0.0)
        h = _add_product(gradient, factor, h)
        g_tile += BLOCK_K * g_column
        U_tile += BLOCK_K * U_row
    scales = _scales(S, mask, column, columns, ADAPTER_RANK)
    inside = (token[:, None] < tokens) & (column[None, :] < columns)
    if hs is not None:
        scaled = _scale(h, scales, column, scaling, ADAPTER_RANK)
        to = _at(hs, at_token, BLOCK_TOKENS, columns) + at_column * BLOCK_COLUMNS
        to += _inside(BLOCK_TOKENS, columns, BLOCK_COLUMNS, 1)
        tl.store(to, scaled.to(hs.dtype.element_ty), mask=inside)
    # The columns of an adapter have the scale 0 here, and neither z nor a sum.
    live = scales != 0
    z_tile = _at(z, at_token, BLOCK_TOKENS, z_row) + at_column.to(tl.int64) * BLOCK_COLUMNS * z_column
    z_tile += _inside(BLOCK_TOKENS, z_row, BLOCK_COLUMNS, z_column)
    values = tl.load(z_tile, mask=inside & live[None, :], other=0.0).to(tl.float32)
    to_sum = partials + at_token.to(tl.int64) * (columns - ADAPTER_RANK) + column - ADAPTER_RANK
    tl.store(to_sum, tl.sum(values * h, 0), mask=(column >= ADAPTER_RANK) & (column < columns))


# Not `partials.sum(0)`: with the product, the quotient and the choice after it that is five launches of some
# microseconds for a few kilobytes; and torch's order of adding may change with its version.
@triton.jit
def mask_gradient_kernel(
    partials, S, mask, dmask, blocks, ranks, mask_scale, BLOCK_ROWS: tl.constexpr, BLOCK_RANKS: tl.constexpr
):
    """`∂L/∂mask [ranks] = 1[mask > 0] · S · Σ_blocks partials / mask_scale`, for `partials [blocks, ranks]`."""
    rank = tl.program_id(0) * BLOCK_RANKS + tl.arange(0, BLOCK_RANKS)
    row = tl.arange(0, BLOCK_ROWS)
    inside = rank < ranks
    sums = tl.zeros((BLOCK_ROWS, BLOCK_RANKS), tl.float32)
    for start in range(0, blocks, BLOCK_ROWS):
        at = (start + row).to(tl.int64)[:, None] * ranks + rank[None, :]
        sums += tl.load(partials + at, mask=(start + row < blocks)[:, None] & inside[None, :], other=0.0)
    live = tl.load(mask + rank, mask=inside, other=0.0) > 0
    total = tl.sum(sums, 0) * tl.load(S + rank, mask=inside, other=0.0) / mask_scale
    tl.store(dmask + rank, tl.where(live, total, 0.0), mask=inside)


# ---- launches

MASK_GRADIENT_BLOCKS = {"BLOCK_ROWS": 16, "BLOCK_RANKS": 64}


def options(config: Config) -> dict[str, int]:
    """A kernel's constants and the launch's options."""
    return {
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_COLUMNS": config.block_columns,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def forward_product(
    z: Tensor,
    U: Tensor,
    S: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    adapter_rank: int = 0,
    scaling: float = 1.0,
    config: Config | None = None,
) -> Tensor:
    """`y [tokens, out] = (z ⊙ s) Uᵀ + bias`, for `z [tokens, depth]` and `U [out, depth]` of any strides.

    `S` and `mask` `[depth - adapter_rank]`, float32; `s` is `scaling` for an adapter's, `S ⊙ β` for the rest.
    """
    (tokens, depth), columns = z.shape, U.shape[0]
    y = z.new_empty(tokens, columns)
    if not y.numel():  # nor is there a grid without a block
        return y
    config = _configure(Shape(tokens, columns, depth, z.element_size()), config, z)
    grid = (triton.cdiv(tokens, config.block_tokens) * triton.cdiv(columns, config.block_columns),)
    with torch.cuda.device_of(z):  # Triton launches on the current device
        forward_kernel[grid](
            z, U, S.contiguous(), mask.contiguous(), bias if bias is None else bias.contiguous(), y,
            tokens, columns, depth, *z.stride(), *U.stride(), scaling, adapter_rank, **options(config),
        )  # fmt: skip
    return y


def backward_product(
    g: Tensor,
    U: Tensor,
    z: Tensor,
    S: Tensor,
    mask: Tensor,
    mask_scale: float,
    adapter_rank: int = 0,
    scaling: float = 1.0,
    need_hs: bool = True,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor]:
    """With `h = g U`: `h ⊙ s [tokens, columns]`, or None, and the mask's gradient `[columns - adapter_rank]`.

    `g [tokens, out]`, `U [out, columns]` and `z [tokens, columns]` of any strides; the others as `forward_product`'s.
    """
    (tokens, depth), columns = g.shape, U.shape[1]
    ranks = columns - adapter_rank
    hs = torch.empty_like(z, memory_format=torch.contiguous_format) if need_hs else None
    dmask = torch.empty_like(S, memory_format=torch.contiguous_format)
    S, mask = S.contiguous(), mask.contiguous()
    config = _configure(Shape(tokens, columns, depth, g.element_size()), config, g)
    blocks = triton.cdiv(tokens, config.block_tokens)
    partials = S.new_empty(blocks, ranks)
    # A tile of g is loaded by whole lines along its rows, or its columns. Where neither are neighbours in memory
    # (`y.sum()` sends back one number at stride 0) every number would be a load, once for each block of columns. Rows
    # at stride 0 are as good as others.
    if 1 not in g.stride():
        g = g.contiguous()
    with torch.cuda.device_of(g):
        if tokens:
            backward_kernel[(blocks * triton.cdiv(columns, config.block_columns),)](
                g, U, z, S, mask, hs, partials,
                tokens, columns, depth, *g.stride(), *U.stride(), *z.stride(), scaling, adapter_rank, **options(config),
            )  # fmt: skip
        mask_gradient_kernel[(triton.cdiv(ranks, MASK_GRADIENT_BLOCKS["BLOCK_RANKS"]),)](
            partials, S, mask, dmask, blocks, ranks, mask_scale, **MASK_GRADIENT_BLOCKS, num_warps=4
        )
    return hs, dmask


def forward(z: Tensor, U: Tensor, S: Tensor, mask: Tensor, bias: Tensor | None, adapter: Adapter | None) -> Tensor:
    """As the reference."""
    if adapter is None:
        return forward_product(z, U, S, mask, bias)
    if adapter.joined:
        return forward_product(z, U, S, mask, bias, adapter.rank, adapter.scaling)
    B, U = adapter.outer(U)
    y = forward_product(z[:, adapter.rank :], U, S, mask, bias)
    return add_product(y, z[:, : adapter.rank] * adapter.scaling, B.t())


def backward(
    g: Tensor,
    x: Tensor,
    z: Tensor,
    Vh: Tensor,
    U: Tensor,
    S: Tensor,
    mask: Tensor,
    mask_scale: float,
    adapter: Adapter | None,
    need_x: bool = True,
) -> Gradients:
    """As the reference."""
    ha = None
    if adapter is None:
        hs, dmask = backward_product(g, U, z, S, mask, mask_scale, need_hs=need_x)
    elif adapter.joined:
        hs, dmask = backward_product(g, U, z, S, mask, mask_scale, adapter.rank, adapter.scaling)
    else:
        B, U = adapter.outer(U)
        hs, dmask = backward_product(g, U, z[:, adapter.rank :], S, mask, mask_scale, need_hs=need_x)
        ha = product(g, B).mul_(adapter.scaling)
    dx, dA, dB = after_ranks(g, x, z, hs, Vh, adapter, need_x, ha)
    return dx, dmask, dA, dB
