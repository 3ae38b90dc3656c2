"""rms_norm against the formula in float64, and what only its native operator has to mind."""

import operators
import pytest
import torch
from operators import EXPANDED, LAYOUTS, assert_within, error_bound

from acip_kernels.ops import extension
from acip_kernels.ops.rms_norm import reference
from acip_kernels.ops.rms_norm.op import rms_norm

one_thread = operators.one_thread  # a fixture of every test here
isa = operators.isa  # a fixture
needs_native = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")

SHAPES = [(1, 1), (5, 1), (1, 7), (33, 7), (2, 3, 576), (1, 1000), (0, 7), (1000,)]
EPS = 1e-5


def problem(*shape, dtype, seed=0):
    """x, weight and the gradient that comes in; one row is so small that eps counts."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (operators.numbers(generator, *shape, dtype=dtype) for _ in range(2))
    if x.dim() > 1 and x.shape[0] > 1:
        x[1] *= EPS**0.5
    return x, operators.numbers(generator, shape[-1], dtype=dtype), g


def run(function, x, weight, g):
    leaf = x.detach().requires_grad_()
    y = function(leaf, weight, EPS)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


def check(x, weight, g):
    dtype, width = x.dtype, x.shape[-1]
    y, dx = run(rms_norm, x, weight, g)
    exact = x.double(), weight.double(), g.double()
    exact_y, exact_dx = run(reference.forward, *exact)
    assert y.dtype == dx.dtype == dtype
    # The mean is a sum of squares; then eps, the root and its inverse; then x · rstd, which is rounded to the dtype,
    # and the product with the weight.
    assert_within(error_bound(dtype, exact_y.abs(), roundings=2, sums=width + 8), y, exact_y, "y")
    # rstd · (h - n · mean(n h)) with n = x · rstd, h = weight · g: rstd in every factor, and a sum of its own.
    rstd = (exact[0].square().mean(-1, keepdim=True) + EPS).rsqrt()
    h, n = (exact[1] * exact[2]).abs(), (exact[0] * rstd).abs()
    magnitude = rstd * (h + n * (n * h).mean(-1, keepdim=True))
    assert_within(error_bound(dtype, magnitude, roundings=1, sums=4 * width + 30), dx, exact_dx, "dx")


@pytest.mark.parametrize("dtype", operators.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_where_there_are_no_kernels(monkeypatch, shape, dtype):
    monkeypatch.setattr(extension, "takes", lambda x: False)
    x, weight, _ = problem(*shape, dtype=dtype)
    y, exact = rms_norm(x, weight, EPS), reference.forward(x.double(), weight.double(), EPS)
    assert_within(error_bound(dtype, exact.abs(), roundings=2, sums=shape[-1] + 8), y, exact)


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient_against_float64(isa, shape, dtype):
    check(*problem(*shape, dtype=dtype))


@needs_native
@pytest.mark.parametrize("layout", EXPANDED)
def test_any_layout(layout):
    x, weight, g = problem(3, 5, 40, dtype=torch.bfloat16)
    own = LAYOUTS.get(layout, LAYOUTS["contiguous"])
    check(own(x), own(weight), EXPANDED[layout](g))


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
def test_two_threads_give_the_bits_of_one(isa, dtype):
    arguments = problem(900, 131, dtype=dtype)
    one = run(rms_norm, *arguments)
    with operators.threads(2):
        operators.assert_identical(run(rms_norm, *arguments), one)
    # And a row is the same wherever it lies.
    x, weight, g = arguments
    operators.assert_identical(run(rms_norm, x[7:], weight, g[7:]), tuple(tensor[7:] for tensor in one))


@needs_native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
def test_what_is_no_number_stays_in_its_row(isa, dtype, bad):
    x, weight, g = problem(3, 70, dtype=dtype)
    x[1, 66] = bad
    y, dx = run(rms_norm, x, weight, g)
    expected, expected_dx = run(reference.forward, x, weight, g)
    for actual, other in ((y, expected), (dx, expected_dx)):
        assert torch.equal(actual.isnan(), other.isnan()) and actual[1, 66].isnan()
        assert actual[0].isfinite().all() and actual[2].isfinite().all()


@needs_native
def test_a_second_derivative_is_refused():
    x, weight, g = problem(3, 8, dtype=torch.float64)
    y = rms_norm(x.requires_grad_(), weight, EPS)
    with pytest.raises(RuntimeError, match=r"rms_norm has no second derivative"):
        torch.autograd.grad(y, x, g, create_graph=True)
    with pytest.raises(RuntimeError, match="jvp is not implemented"), torch.autograd.forward_ad.dual_level():
        rms_norm(torch.autograd.forward_ad.make_dual(x.detach(), g), weight, EPS)


def test_a_weight_that_learns_gets_its_gradient():
    x, weight, _ = problem(3, 8, dtype=torch.float64)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: rms_norm(*leaves, EPS), (x.requires_grad_(), weight))
    if extension.available():
        with pytest.raises(RuntimeError, match="no gradient for weight"):
            torch.ops.acip.rms_norm(x, weight, EPS)
        with torch.no_grad():
            assert torch.equal(rms_norm(x, weight, EPS), torch.ops.acip.rms_norm(x, weight, EPS))


def test_what_does_not_fit_is_refused():
    x = torch.ones(3, 4)
    for weight in (torch.ones(3), torch.ones(1, 4), torch.ones(())):
        with pytest.raises(ValueError, match=r"x must be \[..., width\] and weight \[width\]"):
            rms_norm(x, weight, EPS)
    with pytest.raises(ValueError, match="one dtype and device"):
        rms_norm(x, torch.ones(4).bfloat16(), EPS)
    with pytest.raises(ValueError, match="one dtype and device"):
        rms_norm(x, torch.ones(4, device="meta"), EPS)
    if extension.available():
        for arguments in (
            (x, torch.ones(3)),
            (x, torch.ones(4).double()),
            (x.half(), torch.ones(4).half()),
            (x, torch.ones(4, device="meta")),
            (torch.ones(()), torch.ones(1)),
        ):
            with pytest.raises(RuntimeError, match="rms_norm|native kernels take"):
                torch.ops.acip.rms_norm(*arguments, EPS)
