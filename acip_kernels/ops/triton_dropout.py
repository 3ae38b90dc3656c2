"""`ops.dropout` on a GPU: one pass over memory, with the same choice of what is kept, to the bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_products

BLOCK = 2048


@triton.jit
def _mix(v):
    v = v ^ (v >> 16)
    v = v * 0x7FEB352D
    v = v ^ (v >> 15)
    v = v * 0x846CA68B
    return v ^ (v >> 16)


# Seeds are new numbers at every call: compiling for what they happen to be divisible by would never end.
@triton.jit(do_not_specialize=["low_seed", "high_seed", "threshold"])
def drop_kernel(x, to, elements, low_seed, high_seed, threshold, factor, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """to `[elements]` = x · factor where it is kept, else 0; with ADD that is added to what is there.

    Seeds and threshold are 32 bits each, as signed numbers.
    """
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = number < elements
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    key = high_seed.to(tl.uint32, bitcast=True) ^ (high * 0x9E3779B9)
    kept = _mix(_mix(low ^ low_seed.to(tl.uint32, bitcast=True)) ^ key) >= threshold.to(tl.uint32, bitcast=True)
    values = tl.load(x + number, mask=inside, other=0.0).to(tl.float32) * factor
    dropped = tl.where(kept, values, 0.0).to(to.dtype.element_ty)
    if ADD:
        dropped = dropped.to(tl.float32) + tl.load(to + number, mask=inside, other=0.0).to(tl.float32)
    tl.store(to + number, dropped.to(to.dtype.element_ty), mask=inside)


def takes(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def run(x: Tensor, to: Tensor, seed: int, threshold: int, factor: float, *, add: bool) -> Tensor:
    """`to`, both contiguous and of one size and dtype."""

    def signed(word: int) -> int:
        word &= 0xFFFFFFFF
        return word - (word >> 31 << 32)

    if x.numel():
        triton_products.launch(
            drop_kernel, (triton.cdiv(x.numel(), BLOCK),), x, x, to, x.numel(),
            signed(seed), signed(seed >> 32), signed(threshold), factor, ADD=add, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return to
