"""Dropout that keeps no mask: what is dropped follows from a seed, so the backward pass makes the choice again."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension
from .common import product

try:
    from . import triton_dropout
except ImportError:  # a machine without Triton
    triton_dropout = None  # type: ignore[assignment]

_WORD = 0xFFFFFFFF


def keeps(seed: int | Tensor, elements: int, p: float, device: torch.device | str = "cpu") -> Tensor:
    """Which of `elements` are kept, bool `[elements]`: a hash of the element's number and the 64-bit `seed`.

    Every element is kept with probability `1 - p`, rounded to a multiple of 2^-16. The hash is "lowbias32" of
    C. Wellons's Hash Function Prospector, over multiples of an odd number, with a half of the seed added to them and
    the other one between its multiplications: seeds have to be random numbers, in both halves, for choices to be
    independent. It is one of pairs of elements: its lower 16 bits decide for the first of a pair, the others for the
    second. A seed may be an int64 `[1]` on `device`, of which nobody then waits for the number.
    """
    number = torch.arange(elements, dtype=torch.int64, device=device)
    pair = number >> 1
    key = (seed >> 32 & _WORD) ^ (pair >> 32) * 0x9E3779B9 & _WORD
    bits = (pair & _WORD) * 0x9E3779B1 + seed & _WORD
    bits = bits ^ bits >> 16
    bits = bits * 0x7FEB352D & _WORD ^ key
    bits = bits ^ bits >> 15
    bits = bits * 0x846CA68B & _WORD
    bits = bits ^ bits >> 16
    return torch.where(number % 2 == 0, bits & 0xFFFF, bits >> 16) >= threshold(p)


def threshold(p: float) -> int:
    """Numbers of 16 bits below it are dropped."""
    return min(round(p * 2**16), 0xFFFF)


class StaticSeeds:
    """Seeds that are drawn anew, all at once, for what has been captured: `new_seed` hands them out within `with`.

    A call at least as often as there are seeds raises `RuntimeError`.
    """

    _current: StaticSeeds | None = None

    def __init__(self, device: torch.device, count: int):
        # 16 bytes apart: kernels are compiled for how far an address is from that.
        self.places, self.used = torch.zeros(count, 2, dtype=torch.int64, device=device), 0

    def __enter__(self) -> StaticSeeds:
        StaticSeeds._current = self
        return self

    def __exit__(self, *_) -> None:
        StaticSeeds._current = None

    def next(self) -> Tensor:
        if self.used == len(self.places):
            raise RuntimeError(f"more than {self.used} seeds are drawn")
        self.used += 1
        return self.places[self.used - 1, :1]

    def draw(self) -> None:
        """New numbers for those that have been handed out, from torch's generator, in that order."""
        if self.used:
            self.places[: self.used, 0].copy_(_random_seeds(self.used))


def new_seed(device: torch.device) -> Tensor:
    """A seed for `drop`, int64 `[1]` on `device`.

    From torch's generator on the CPU: whoever restores its state gets the same dropout again.
    """
    if StaticSeeds._current is not None:
        return StaticSeeds._current.next()
    return _random_seeds(1).to(device, non_blocking=True)


def _random_seeds(count: int) -> Tensor:
    return torch.randint(2**63 - 1, (count,))


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`x / (1 - p)` where it is kept, else 0, for contiguous `x` of any shape.

    seed: int64 `[1]`. On a GPU best there already, see `new_seed`.
    """
    if extension.takes(x):
        return torch.ops.acip.dropout(x, int(seed), threshold(p), 1 / (1 - p))
    if triton_dropout is not None and triton_dropout.takes(x):
        return triton_dropout.run(x, torch.empty_like(x), seed.to(x.device), threshold(p), 1 / (1 - p), add=False)
    kept = keeps(seed.to(x.device), x.numel(), p, x.device).view(x.shape)
    return torch.where(kept, x * (1 / (1 - p)), 0).to(x.dtype)


def add_dropped(to: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`to += drop(x, p, seed)`, in place: the gradient of `drop` at `x`."""
    if extension.takes(x):
        torch.ops.acip.dropout_add_(to, x, int(seed), threshold(p), 1 / (1 - p))
        return to
    if triton_dropout is not None and triton_dropout.takes(x) and to.is_contiguous() and x.is_contiguous():
        return triton_dropout.run(x, to, seed.to(x.device), threshold(p), 1 / (1 - p), add=True)
    return to.add_(drop(x, p, seed))


# ---- an adapter's products with a dropped input


def dropped_product(x: Tensor, A: Tensor, p: float, seed: Tensor, out: Tensor) -> Tensor:
    """`out [tokens, r] = drop(x) Aᵀ`, for x `[tokens, in]` and A `[r, in]`."""
    if triton_dropout is not None and triton_dropout.takes_products(x, A):
        return triton_dropout.product(x, A, out, seed.to(x.device), threshold(p), 1 / (1 - p))
    return product(drop(x, p, seed), A.t(), out=out)


def dropped_gradient(h: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """`hᵀ drop(x) [r, in]`, for h `[tokens, r]` and x `[tokens, in]`; in x's dtype, or more exact."""
    if triton_dropout is not None and triton_dropout.takes_products(x, h):
        return triton_dropout.gradient(h, x, seed.to(x.device), threshold(p), 1 / (1 - p))
    return product(h.t(), drop(x, p, seed))


def add_dropped_product(to: Tensor, h: Tensor, A: Tensor, p: float, seed: Tensor) -> Tensor:
    """`to [tokens, in] += drop(h A)`, in place, for h `[tokens, r]` and A `[r, in]`."""
    if triton_dropout is not None and triton_dropout.takes_products(to, A) and h.stride(1) == 1:
        return triton_dropout.add_product(to, h, A, seed.to(to.device), threshold(p), 1 / (1 - p))
    return add_dropped(to, product(h, A), p, seed)
