"""What the operator tests share: problems of every shape and layout, and bounds on their rounding errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from acip_kernels.ops import extension

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)
# No, one and several tokens in zero to four leading dimensions.
LEADING = ((), (1,), (0,), (5,), (2, 3), (0, 4), (3, 0, 2), (1, 1, 1), (2, 1, 3, 2), (2, 3, 0, 1))
# The same examples at every run, and no database on the disk.
examples = settings(max_examples=100, deadline=None, derandomize=True)


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of singular values and masks, and of sums, beside `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def instruction_sets() -> list[str]:
    """Those of the native kernels that run here; none without them."""
    found = []
    for name in ("portable", "avx2", "avx512", "avx512_bf16") if extension.available() else ():
        try:
            extension.module.use_isa(name)
            found.append(name)
        except ValueError:  # not this processor's
            pass
    if found:
        extension.module.use_isa()
    return found


@pytest.fixture(params=instruction_sets())
def isa(request):
    """Each instruction set in turn; the best one afterwards."""
    extension.module.use_isa(request.param)
    assert extension.instruction_set() == request.param
    yield request.param
    extension.module.use_isa()


# ---- problems


@dataclass
class Problem:
    """The arguments of both operators, and `g`, the gradient that comes in at y. `s` is S to the masked one."""

    x: Tensor
    Vh: Tensor
    U: Tensor
    s: Tensor | None
    mask: Tensor
    bias: Tensor | None
    g: Tensor


def numbers(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Random signs and magnitudes of 1/4 to 1: float16's products stay in its normal range."""
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.5 - 0.75
    return (values + values.sign() / 4).to(dtype)


def make_problem(
    leading=(5,), in_features=7, out_features=6, rank=4, dtype=torch.float32, *, s_dtype=None, bias=True, seed=0
) -> Problem:
    """A random problem; `s_dtype` is float32 (float64 for float64) unless told. Some masks are zero: pruned."""
    generator = torch.Generator().manual_seed(seed)
    mask = numbers(generator, rank, dtype=precise(dtype)) * 0.02
    mask[1::4] = 0
    return Problem(
        x=numbers(generator, *leading, in_features, dtype=dtype),
        Vh=numbers(generator, rank, in_features, dtype=dtype),
        U=numbers(generator, out_features, rank, dtype=dtype),
        s=numbers(generator, rank, dtype=s_dtype or precise(dtype)),
        mask=mask,
        bias=numbers(generator, out_features, dtype=dtype) if bias else None,
        g=numbers(generator, *leading, out_features, dtype=dtype),
    )


def make_long_sums(dtype: torch.dtype) -> Problem:
    """Positive terms, 2048 of them in every sum over features or tokens."""
    problem = make_problem((2048,), in_features=2048, out_features=3, rank=2, dtype=dtype)
    for name, tensor in vars(problem).items():
        setattr(problem, name, tensor.abs())
    problem.g /= 64  # for float16's range
    return problem


def make_sizes() -> list[Problem]:
    """Equally many dimensions, every size another."""
    sizes = ((2, 3), 7, 6, 4), ((5, 4), 9, 8, 3), ((3, 10), 12, 20, 11)
    return [make_problem(*size) for size in sizes]


def make_exact(dtype: torch.dtype) -> Problem:
    """z = x and h = g, without a rounding."""
    problem = make_problem((7,), in_features=1, out_features=1, rank=1, dtype=dtype, bias=False)
    problem.Vh, problem.U = torch.ones_like(problem.Vh), torch.ones_like(problem.U)
    problem.mask = problem.mask.abs()
    return problem


def reversed_dimensions(tensor: Tensor) -> Tensor:
    return tensor.permute(*reversed(range(tensor.dim())))


# Equal values, other strides and addresses.
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "column major": lambda tensor: reversed_dimensions(reversed_dimensions(tensor).contiguous()),
    "every other element": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "unaligned": lambda tensor: torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape),
}
# And one number everywhere, at stride 0: what `.sum()` sends back and what broadcasting an input makes.
EXPANDED = LAYOUTS | {"expanded": lambda tensor: tensor.new_full((), 0.75).expand(tensor.shape)}
# Leading dimensions and layouts to compile for: one of them at a time.
COMPILED = [((2, 3), layout) for layout in LAYOUTS] + [(some, "contiguous") for some in ((), (0,), (1,))]


@st.composite
def problems(draw, dtype: torch.dtype) -> Problem:
    width = st.sampled_from((1, 2, 3, 5, 8, 13, 17, 31, 33, 64))
    in_features, out_features = draw(width), draw(width)
    full = min(in_features, out_features)
    problem = make_problem(
        draw(st.lists(st.sampled_from((0, 1, 2, 3, 3)), max_size=4)),
        in_features,
        out_features,
        draw(st.one_of(st.just(1), st.just(full), st.integers(1, full))),
        dtype,
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    for name, layouts in (("x", EXPANDED), ("Vh", LAYOUTS), ("U", LAYOUTS), ("g", EXPANDED)):
        layout = layouts[draw(st.sampled_from(sorted(layouts)))]
        setattr(problem, name, layout(getattr(problem, name)))
    return problem


# ---- bounds


def error_bound(dtype: torch.dtype, magnitude: Tensor, *, roundings: int, sums: int) -> Tensor:
    """How far a sum of products may be from the float64 oracle, if their absolute values sum to `magnitude`.

    On its way to the result a product is rounded to `dtype` at most `roundings` times, and at most `sums` times
    to the precision of sums. Each is a factor `1 + δ` with `|δ|` at most the unit roundoff, in whatever order
    is summed (Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1), and
    `(1 + δ)ⁿ - 1 ≤ exp(nδ) - 1`. The oracle takes the same path in float64.
    """

    def unit(dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps / 2

    computed = math.expm1(roundings * unit(dtype) + sums * unit(precise(dtype)))
    oracle = math.expm1((roundings + sums) * unit(torch.float64))
    return (computed + oracle) * magnitude


def bounds(problem: Problem, s: Tensor | None, mask_scale: float = 1.0) -> dict[str, Tensor]:
    """For `y = ((x Vhᵀ) ⊙ s) Uᵀ + bias` and its gradients, by the name of the tensor.

    To the masked operator `s` is `S ⊙ β`, and the bound of its mask's gradient is here too.
    """
    dtype, (rank, in_features), out_features = problem.x.dtype, problem.Vh.shape, problem.U.shape[0]

    def magnitude(tensor: Tensor) -> Tensor:
        return tensor.detach().double().abs()

    x, g = magnitude(problem.x).reshape(-1, in_features), magnitude(problem.g).reshape(-1, out_features)
    Vh, U, tokens = magnitude(problem.Vh), magnitude(problem.U), len(x)
    z, h = x @ Vh.t(), g @ U
    # A scaling is one product in the precision of s, and then one rounding.
    scaled, biased = int(s is not None), int(problem.bias is not None)
    zs, hs = (z, h) if s is None else (z * magnitude(s), h * magnitude(s))
    y = zs @ U.t() + (magnitude(problem.bias) if biased else 0)
    # In s's own half precision the products z h are rounded, and the sum.
    in_half = 2 * int(s is not None and s.dtype == dtype)

    def limit(magnitude: Tensor, roundings: int, sums: int) -> Tensor:
        return error_bound(dtype, magnitude, roundings=roundings, sums=sums)

    return {
        # z, z ⊙ s, the product with U and the bias added to it.
        "y": limit(y, 2 + scaled + biased, in_features + scaled + rank + biased).view(problem.g.shape),
        # h, h ⊙ s and the last product.
        "x": limit(hs @ Vh, 2 + scaled, out_features + scaled + rank).view(problem.x.shape),
        "Vh": limit(hs.t() @ x, 2 + scaled, out_features + scaled + tokens),
        "U": limit(g.t() @ zs, 2 + scaled, in_features + scaled + tokens),
        # z and h; their product and its sum over tokens are exact to the precision of s.
        "s": limit((z * h).sum(0), 2 + in_half, in_features + out_features + 1 + tokens),
        # The same, then times S and divided by c, which is rounded and may be inverted first.
        "mask": limit((zs * h).sum(0) / mask_scale, 2, in_features + out_features + 1 + tokens + 4),
        "bias": limit(g.sum(0), 1, tokens),
    }


def assert_within(bound: Tensor, actual: Tensor, exact: Tensor, name: str = "") -> None:
    assert actual.shape == exact.shape == bound.shape, name
    error = (actual.double() - exact).abs()
    # Written such that a NaN fails.
    assert (error <= bound).all(), f"{name}: {float((error / bound).nan_to_num(math.inf).max()):.3g} bounds off"


# ---- runs


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On busy cores more of them wait for each other for longer than a small problem takes."""
    with threads(1):
        yield


def run(function, tensors, g) -> tuple[Tensor, ...]:
    """`function(*tensors)` and its gradient for every tensor, at `g`; strides are kept."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, g)


def assert_identical(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bit for bit, but for the sign of zero; a NaN is never identical."""
    assert len(actual) == len(expected)
    for number, (one, other) in enumerate(zip(actual, expected)):
        assert one.dtype == other.dtype and torch.equal(one, other), f"tensor {number} differs"


# ---- mistakes


def _half(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


# The argument, a wrong value for it in `make_problem(dtype=torch.bfloat16)`, whose x is [5, 7], Vh [4, 7],
# U [6, 4], bias [6]; and the error with the beginning of its message.
MISTAKES = {
    "x too wide": ("x", _half(5, 8), ValueError, "x must be [..., 7] as Vh is [4, 7], got [5, 8]"),
    "x a scalar": ("x", _half(), ValueError, "x must be [..., 7] as Vh is [4, 7], got []"),
    "x more precise": ("x", torch.ones(5, 7), TypeError, "Vh is torch.bfloat16 but x is torch.float32"),
    "x of integers": ("x", torch.ones(5, 7).int(), TypeError, "x must be floating point, got torch.int32"),
    "x elsewhere": ("x", _half(5, 7).to("meta"), ValueError, "Vh is on cpu but x is on meta"),
    "x no tensor": ("x", [1.0], TypeError, "x must be a tensor, got list"),
    "Vh a vector": ("Vh", _half(7), ValueError, "Vh must be [rank, in_features], got shape [7]"),
    "Vh of another rank": ("Vh", _half(3, 7), ValueError, "U must be [out_features, 3] as Vh has rank 3, got"),
    "Vh transposed": ("Vh", _half(7, 4), ValueError, "U must be [out_features, 7] as Vh has rank 7, got"),
    "Vh more precise": ("Vh", torch.ones(4, 7), TypeError, "Vh is torch.float32 but x is torch.bfloat16"),
    "Vh in other half": ("Vh", _half(4, 7).half(), TypeError, "Vh is torch.float16 but x is torch.bfloat16"),
    "Vh complex": ("Vh", _half(4, 7).cfloat(), TypeError, "Vh must be floating point, got torch.complex64"),
    "Vh elsewhere": ("Vh", _half(4, 7).to("meta"), ValueError, "Vh is on meta but x is on cpu"),
    "Vh missing": ("Vh", None, TypeError, "Vh must be a tensor, got NoneType"),
    "U of 3 dimensions": ("U", _half(1, 6, 4), ValueError, "U must be [out_features, rank], got shape [1,"),
    "U transposed": ("U", _half(4, 6), ValueError, "U must be [out_features, 4] as Vh has rank 4, got [4, 6]"),
    "U more precise": ("U", torch.ones(6, 4), TypeError, "U is torch.float32 but x is torch.bfloat16"),
    "U elsewhere": ("U", _half(6, 4).to("meta"), ValueError, "U is on meta but x is on cpu"),
    "bias of another width": ("bias", _half(4), ValueError, "bias must be [6], got shape [4]"),
    "bias a matrix": ("bias", _half(1, 6), ValueError, "bias must be [6], got shape [1, 6]"),
    "bias more precise": ("bias", torch.ones(6), TypeError, "bias is torch.float32 but x is torch.bfloat16"),
    "bias elsewhere": ("bias", _half(6).to("meta"), ValueError, "bias is on meta but x is on cpu"),
    "bias a number": ("bias", 1.0, TypeError, "bias must be a tensor, got float"),
}
