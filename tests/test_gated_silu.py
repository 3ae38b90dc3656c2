"""gated_silu against the formula in float64, and what only its native operator has to mind."""

import operators
import pytest
import torch
from operators import EXPANDED, LAYOUTS, assert_within, error_bound

from acip_kernels.ops import extension
from acip_kernels.ops.gated_silu import reference
from acip_kernels.ops.gated_silu.op import gated_silu

one_thread = operators.one_thread  # a fixture of every test here
isa = operators.isa  # a fixture
needs_native = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")

SHAPES = [(), (1,), (7,), (0, 5), (1, 576), (3, 7), (2, 5, 1000)]


def problem(*shape, dtype, seed=0):
    """gate, up and the gradient that comes in; gates are from where silu is zero to where it is the identity."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, g = (operators.numbers(generator, *shape, dtype=torch.float64) for _ in range(3))
    gate *= 10 ** (2.3 * torch.rand(shape, generator=generator, dtype=torch.float64))
    return gate.to(dtype), up.to(dtype), g.to(dtype)


def check(gate, up, g):
    dtype = gate.dtype
    y, dgate, dup = operators.run(gated_silu, (gate, up), g)
    exact = operators.run(reference.forward, (gate.double(), up.double()), g.double())
    assert y.dtype == dgate.dtype == dup.dtype == dtype
    x, scale, upstream = (tensor.double().abs() for tensor in (gate, up, g))
    # An exponential is off by four units (two in the last place), the logistic function by six with its sum and
    # quotient, and that of -x by eleven. Where they would be below the smallest normal number they are zero.
    flushed = 2 * torch.finfo(operators.precise(dtype)).tiny
    rest = torch.finfo(dtype).tiny
    large, small = gate.double().sigmoid(), (-gate.double()).sigmoid()
    assert_within(
        error_bound(dtype, exact[0].abs(), roundings=1, sums=9) + flushed * x * scale + rest, y, exact[0], "y"
    )
    slope = large * (1 + x * small)
    # torch has 1 - σ(x), which cancels, in float64 too.
    cancelled = torch.finfo(torch.float64).eps * (1 + x)
    bound = error_bound(dtype, slope, roundings=1, sums=25) + cancelled + flushed * (1 + x)
    assert_within(bound * upstream * scale + rest, dgate, exact[1], "dgate")
    bound = error_bound(dtype, exact[2].abs(), roundings=1, sums=9) + flushed * x * upstream + rest
    assert_within(bound, dup, exact[2], "dup")


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_against_float64(isa, shape, dtype):
    check(*problem(*shape, dtype=dtype))


@needs_native
@pytest.mark.parametrize("layout", EXPANDED)
def test_any_layout(layout):
    gate, up, g = problem(3, 5, 40, dtype=torch.bfloat16)
    own = LAYOUTS.get(layout, LAYOUTS["contiguous"])
    check(own(gate), up, EXPANDED[layout](g))
    check(gate, own(up), EXPANDED[layout](g))


@pytest.mark.parametrize("dtype", operators.DTYPES, ids=str)
def test_the_reference_where_there_are_no_kernels(monkeypatch, dtype):
    monkeypatch.setattr(extension, "takes", lambda x: False)
    gate, up, _ = problem(3, 7, dtype=dtype)
    exact = reference.forward(gate.double(), up.double())
    bound = error_bound(dtype, exact.abs(), roundings=2, sums=9) + torch.finfo(dtype).tiny
    assert_within(bound, gated_silu(gate, up), exact)


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
def test_two_threads_give_the_bits_of_one(isa, dtype):
    gate, up, g = problem(300, 331, dtype=dtype)
    one = operators.run(gated_silu, (gate, up), g)
    with operators.threads(2):
        operators.assert_identical(operators.run(gated_silu, (gate, up), g), one)
    # And an element is the same wherever it lies, in a vector or behind the last whole one.
    gate, up, g = (tensor.flatten()[7:-5] for tensor in (gate, up, g))
    shifted = tuple(tensor.flatten()[7:-5] for tensor in one)
    operators.assert_identical(operators.run(gated_silu, (gate, up), g), shifted)


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
def test_what_is_no_number_and_what_is_large(isa, dtype):
    special = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e4, -1e4, 0.0, -0.0]
    gate = torch.tensor(special * 5, dtype=dtype)
    ones = torch.ones_like(gate)
    actual = operators.run(gated_silu, (gate, ones), ones)
    for one, other in zip(actual, operators.run(reference.forward, (gate, ones), ones), strict=True):
        assert torch.equal(one.nan_to_num(7, 8, 9), other.nan_to_num(7, 8, 9))
    up = torch.full_like(gate, torch.nan)
    y, dgate, dup = operators.run(gated_silu, (torch.ones_like(gate), up), ones)
    assert y.isnan().all() and dgate.isnan().all() and dup.isfinite().all()


@needs_native
def test_only_one_of_both_may_want_a_gradient():
    gate, up, g = problem(3, 7, dtype=torch.float32)
    _, dgate, dup = operators.run(gated_silu, (gate, up), g)
    for number, expected in ((0, dgate), (1, dup)):
        leaves = [gate.clone(), up.clone()]
        leaves[number].requires_grad_()
        gated_silu(*leaves).backward(g)
        assert torch.equal(leaves[number].grad, expected) and leaves[1 - number].grad is None


@needs_native
def test_a_second_derivative_is_refused():
    gate, up, g = problem(3, 8, dtype=torch.float64)
    y = gated_silu(gate.requires_grad_(), up)
    with pytest.raises(RuntimeError, match=r"gated_silu has no second derivative"):
        torch.autograd.grad(y, gate, g, create_graph=True)


def test_what_does_not_fit_is_refused():
    gate = torch.ones(3, 4)
    for up in (torch.ones(4), torch.ones(3, 4).bfloat16(), torch.ones(3, 4, device="meta")):
        with pytest.raises(ValueError, match="one shape, dtype and device"):
            gated_silu(gate, up)
    if extension.available():
        for arguments in ((gate, torch.ones(4)), (gate, gate.double()), (gate.half(), gate.half()), (gate, up)):
            with pytest.raises(RuntimeError, match="gated_silu|native kernels take"):
                torch.ops.acip.gated_silu(*arguments)
