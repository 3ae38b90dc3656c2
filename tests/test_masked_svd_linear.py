"""masked_svd_linear against ACIP's formulas in float64: gradients for x and mask, none of what is pruned."""

import copy
import math
import re

import operators
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import DTYPES, HALF_DTYPES, LEADING, assert_identical, assert_within, make_problem, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from acip_kernels.ops import masked_svd_linear

OPERATOR = torch.ops.acip.masked_svd_linear.default
BACKWARD_OPERATOR = torch.ops.acip.masked_svd_linear_backward.default
SCALE = 0.02
one_thread = operators.one_thread  # a fixture of every test here


def arguments(problem):
    return problem.x, problem.Vh, problem.U, problem.s, problem.mask, problem.bias


def of_x_and_mask(problem, **options):
    """The operator as a function of what may be trained."""
    return lambda x, mask: masked_svd_linear(x, problem.Vh, problem.U, problem.s, mask, problem.bias, **options)


def run_both(problem, function=None):
    """The output and the gradients for x and mask."""
    return run(function or of_x_and_mask(problem), (problem.x, problem.mask), problem.g)


def formula(x, Vh, U, S, β, bias):
    y = torch.einsum("...r,or->...o", torch.einsum("...i,ri->...r", x, Vh) * S * β, U)
    return y if bias is None else y + bias


def oracle(problem, mask_scale=SCALE):
    """The output and the gradients for x and mask: autograd in float64, straight through β."""
    _, Vh, U, S, _, bias = (None if tensor is None else tensor.double() for tensor in arguments(problem))

    def straight_through(x, mask):
        live = (mask > 0).double()
        # Of the value β, and of the slope β / c.
        return formula(x, Vh, U, S, live * (1 + (mask - mask.detach()) / mask_scale), bias)

    return run(straight_through, (problem.x.double(), problem.mask.double()), problem.g.double())


def check(problem, needed=("x", "mask"), mask_scale=SCALE):
    """The output and the gradients that are `needed`, element by element; a pruned entry's is zero."""
    live = problem.mask > 0
    y_exact, *gradients_exact = oracle(problem, mask_scale)
    bounds = operators.bounds(problem, torch.where(live, problem.s, 0), mask_scale)
    x, mask = (getattr(problem, name).detach().requires_grad_(name in needed) for name in ("x", "mask"))
    y = of_x_and_mask(problem, mask_scale=mask_scale)(x, mask)
    assert y.dtype == problem.x.dtype
    assert_within(bounds["y"], y, y_exact, "y")
    assert y.requires_grad == bool(needed)
    if needed:
        y.backward(problem.g)
    for name, leaf, exact in zip(("x", "mask"), (x, mask), gradients_exact):
        if name not in needed:
            assert leaf.grad is None
        else:
            assert leaf.grad.dtype == leaf.dtype
            assert_within(bounds[name], leaf.grad, exact, name)
    assert mask.grad is None or torch.count_nonzero(mask.grad[~live]) == 0


# ---- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@operators.examples
@given(data=st.data())
def test_output_and_gradients_against_float64(dtype, data):
    problem = data.draw(operators.problems(dtype))
    needed = data.draw(st.sets(st.sampled_from(("x", "mask"))))
    check(problem, needed, mask_scale=data.draw(st.sampled_from((SCALE, 1.0, 0.3))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_any_leading_dimensions_at_rank_one_and_full_rank(leading, dtype):
    for rank in (1, 5):
        check(make_problem(leading, in_features=9, out_features=5, rank=rank, dtype=dtype))
        check(make_problem(leading, in_features=5, out_features=9, rank=rank, dtype=dtype, bias=False))


@pytest.mark.parametrize("leading", [leading for leading in LEADING if 0 in leading], ids=str)
def test_no_tokens_give_no_output_and_a_zero_gradient(leading):
    problem = make_problem(leading)
    y, dx, dmask = run_both(problem)
    assert y.shape == (*leading, 6) and dx.shape == problem.x.shape
    assert torch.count_nonzero(dmask) == 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_sums_are_in_float32(dtype, threads):
    with operators.threads(threads):
        check(operators.make_long_sums(dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_float32_mask_gradient_is_as_precise(dtype):
    problem = operators.make_exact(dtype)
    y, _, dmask = run_both(problem)
    assert_identical((y,), ((problem.x.float() * problem.s).to(dtype),))
    products = problem.x.double() * problem.g.double() * problem.s.double() / SCALE
    # The sum, the product with S and the quotient (by a rounded c, that may be inverted).
    bound = operators.error_bound(dtype, products.abs().sum(0), roundings=0, sums=len(products) + 4)
    assert_within(bound, dmask, products.sum(0), "mask")


def test_the_default_scale():
    problem = make_problem()
    assert_identical(run_both(problem), run_both(problem, of_x_and_mask(problem, mask_scale=0.02)))


def test_the_gradient_of_x_by_finite_differences():
    problem = make_problem((2, 3), dtype=torch.float64)
    problem.x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: of_x_and_mask(problem)(x, problem.mask), problem.x)


def test_the_gradient_of_the_mask_by_finite_differences():
    problem = make_problem((2, 3), in_features=9, out_features=8, rank=7, dtype=torch.float64)
    x, Vh, U, S, mask, bias = arguments(problem)
    β = (mask > 0).double()

    def loss(β):
        return (formula(x, Vh, U, S, β, bias) * problem.g).sum()

    # The loss is linear in a continuous β: central differences have no error but float64's, whatever the step.
    by_β = torch.stack([(loss(β + step) - loss(β - step)) / 2 for step in torch.eye(7, dtype=torch.float64)])
    assert 0 < β.sum() < 7 and by_β.abs().min() > 0.01  # live and pruned ones, that all matter
    _, _, dmask = run_both(problem, of_x_and_mask(problem, mask_scale=0.05))
    torch.testing.assert_close(dmask, by_β / 0.05 * β, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_plain_sum(dtype):
    problem = make_problem((2, 3), dtype=dtype)
    problem.g = torch.ones(()).to(dtype).expand(problem.g.shape)
    x, mask = problem.x.requires_grad_(), problem.mask.requires_grad_()
    of_x_and_mask(problem)(x, mask).sum().backward()  # sends back exactly this g, at stride 0
    _, *exact = oracle(problem)
    bounds = operators.bounds(problem, torch.where(mask > 0, problem.s, 0), SCALE)
    assert_within(bounds["x"], x.grad, exact[0], "x")
    assert_within(bounds["mask"], mask.grad, exact[1], "mask")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_run_gives_the_same_bits(dtype, threads):
    problem = make_problem((30, 40), in_features=65, out_features=33, rank=17, dtype=dtype)
    with operators.threads(threads):
        first = run_both(problem)
        assert_identical(run_both(problem), first)


# ---- pruned entries


def garbage(problem, size):
    """The problem with factors and singular values of that size, of every sign, where entries are pruned."""
    changed, pruned = copy.copy(problem), problem.mask <= 0
    for name, where in (("Vh", pruned[:, None]), ("U", pruned), ("s", pruned)):
        tensor = getattr(problem, name)
        largest = min(size, torch.finfo(tensor.dtype).max)
        setattr(changed, name, torch.where(where, tensor.sign() * largest, tensor))
    return changed


# Up to where z, h and their products overflow: infinities and NaNs, that a product with zero would let through.
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4, 1e30, math.inf], ids="to {:g}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruned_entries_have_no_influence_and_no_gradient(dtype, size):
    problem = make_problem((3, 5), in_features=33, out_features=18, rank=17, dtype=dtype)
    pruned = problem.mask <= 0
    assert 0 < pruned.sum() < 17
    expected = run_both(problem)
    results = run_both(garbage(problem, size))
    assert_identical(results, expected)
    assert torch.count_nonzero(results[2][pruned]) == 0
    assert torch.count_nonzero(results[2][~pruned]) == len(pruned) - pruned.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_all_entries_pruned_the_bias_is_left(dtype):
    problem = make_problem((2, 3), dtype=dtype)
    problem.mask = -problem.mask.abs()
    y, dx, dmask = run_both(garbage(problem, math.inf))
    assert torch.equal(y, problem.bias.expand_as(y))
    assert torch.count_nonzero(dx) == torch.count_nonzero(dmask) == 0


def test_live_is_what_is_above_zero():
    tiny = torch.finfo(torch.float32).tiny
    values = torch.tensor([tiny, 1.0, math.inf, 0.0, -0.0, -tiny, -math.inf, math.nan])
    problem = make_problem(in_features=9, out_features=8, rank=8)
    problem.mask = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    expected = run_both(problem)
    problem.mask = values
    assert_identical(run_both(problem), expected)


# ---- PyTorch around it


def test_a_mask_used_twice_adds_its_gradients():
    first, second = make_problem((2, 3)), make_problem((4,), in_features=9, out_features=5, rank=4, seed=1)
    second.mask = first.mask
    _, _, by_first = run_both(first)
    _, _, by_second = run_both(second)
    mask = first.mask.clone().requires_grad_()
    outputs = of_x_and_mask(first)(first.x, mask), of_x_and_mask(second)(second.x, mask)
    torch.autograd.backward(outputs, (first.g, second.g))
    assert_identical((mask.grad,), (by_first + by_second,))


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, leading):
    problem = make_problem(leading, dtype=dtype)
    _, Vh, U, S, mask, bias = arguments(problem)
    z = torch.nn.functional.linear(problem.x, Vh)
    torch.library.opcheck(BACKWARD_OPERATOR, (problem.g, z, Vh, U, S, mask, SCALE, "auto"))
    x, mask = problem.x.requires_grad_(), mask.requires_grad_()
    torch.library.opcheck(OPERATOR, (x, Vh, U, S, mask, bias, SCALE, "auto"))
    torch.library.opcheck(OPERATOR, (x.detach(), Vh, U, S, mask, None, SCALE, "reference"))


def test_z_that_the_operator_keeps_for_itself_has_no_gradient():
    problem = make_problem()
    problem.x.requires_grad_()
    y, z = OPERATOR(*arguments(problem), SCALE, "auto")
    assert y.requires_grad and not z.requires_grad


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_the_meta_device_gives_the_shape(leading):
    problem = make_problem(leading, dtype=torch.bfloat16)
    y = masked_svd_linear(*(tensor.to("meta") for tensor in arguments(problem)))
    assert (y.shape, y.dtype, y.device.type) == ((*leading, 6), torch.bfloat16, "meta")


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("leading", "layout"), operators.COMPILED, ids=str)
def test_compiled_forward_and_backward(fresh_compiler, leading, layout):
    problem = make_problem(leading)
    # But for g: the compiler makes it contiguous, and a product of other strides may sum in another order.
    for name in ("x", "Vh", "U", "s", "mask", "bias"):
        setattr(problem, name, operators.LAYOUTS[layout](getattr(problem, name)))
    compiled = torch.compile(of_x_and_mask(problem), fullgraph=True, backend="aot_eager")
    assert_identical(run_both(problem, compiled), run_both(problem))


def test_compiled_by_inductor(fresh_compiler):
    problem = make_problem((2, 3))
    compiled = torch.compile(of_x_and_mask(problem), fullgraph=True)
    y, dx, dmask = run_both(problem, compiled)
    bounds = operators.bounds(problem, torch.where(problem.mask > 0, problem.s, 0), SCALE)
    for name, result, exact in zip(("y", "x", "mask"), (y, dx, dmask), oracle(problem)):
        assert_within(bounds[name], result, exact, name)
    assert torch.count_nonzero(dmask[problem.mask <= 0]) == 0


def test_compiled_once_for_all_sizes(fresh_compiler):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_svd_linear, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for problem in operators.make_sizes():
        _, Vh, U, S, _, bias = arguments(problem)
        x, mask = (tensor.detach().requires_grad_() for tensor in (problem.x, problem.mask))
        y = compiled(x, Vh, U, S, mask, bias)
        y.backward(problem.g)
        assert_identical((y, x.grad, mask.grad), run_both(problem))
        counts.append(counter.frame_count)
    # The first call goes to the backend twice: mask_scale is a symbol, and then the constant that it is.
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_is_the_explicit_cast(fresh_compiler, dtype):
    problem = make_problem((2, 3), dtype=dtype)
    problem.g = problem.g.bfloat16()

    def automatic(x, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return of_x_and_mask(problem)(x, mask)

    def explicit(x, mask):
        Vh, U, bias = (tensor.bfloat16() for tensor in (problem.Vh, problem.U, problem.bias))
        return masked_svd_linear(x.bfloat16(), Vh, U, problem.s, mask, bias)

    expected = run_both(problem, explicit)
    assert [tensor.dtype for tensor in expected] == [torch.bfloat16, dtype, torch.float32]
    assert_identical(run_both(problem, automatic), expected)
    compiled = torch.compile(automatic, fullgraph=True, backend="aot_eager")
    assert_identical(run_both(problem, compiled), expected)


def test_autocast_leaves_float64_alone():
    problem = make_problem(dtype=torch.float64)
    expected = run_both(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_identical(run_both(problem), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    problem = make_problem((2, 3), dtype=torch.bfloat16)
    expected = run_both(problem)
    x, mask = problem.x.requires_grad_(), problem.mask.requires_grad_()
    y = checkpoint(of_x_and_mask(problem), x, mask, use_reentrant=use_reentrant)
    y.backward(problem.g)  # autograd.grad is not for the reentrant kind
    assert_identical((y, x.grad, mask.grad), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_mode(dtype):
    problem = make_problem((2, 3), dtype=dtype)
    expected = masked_svd_linear(*arguments(problem))
    with torch.inference_mode():
        y = masked_svd_linear(*arguments(problem))
    assert y.is_inference()
    assert_identical((y,), (expected,))


@pytest.mark.parametrize("leading", [(), (0,), (3, 5)], ids=str)
def test_flops_of_both_passes(leading):
    problem = make_problem(leading)
    tokens = problem.g[..., 0].numel()
    with FlopCounterMode(display=False) as forward:
        y = of_x_and_mask(problem)(problem.x.requires_grad_(), problem.mask.requires_grad_())
    with FlopCounterMode(display=False) as backward:
        y.backward(problem.g)
    assert forward.get_total_flops() == backward.get_total_flops() == 2 * tokens * 4 * (7 + 6)


# ---- backends and mistakes


def test_auto_is_the_reference():
    problem = make_problem()
    for backend in ("auto", "reference"):
        assert_identical(run_both(problem, of_x_and_mask(problem, backend=backend)), run_both(problem))


@pytest.mark.parametrize("backend", ["native", "triton", "cuda"])
def test_a_missing_backend(backend):
    message = f"backend '{backend}' is not available in this installation; available: ['reference']"
    with pytest.raises(RuntimeError, match=re.escape(f"masked_svd_linear: {message}")):
        masked_svd_linear(*arguments(make_problem()), backend=backend)


@pytest.mark.parametrize("backend", ["foo", "", "Reference"])
def test_an_unknown_backend(backend):
    message = f"masked_svd_linear: backend must be 'auto' or one of .*, got '{backend}'"
    with pytest.raises(ValueError, match=message):
        masked_svd_linear(*arguments(make_problem()), backend=backend)


@pytest.mark.parametrize("name", ["Vh", "U", "s", "bias"])
def test_a_frozen_argument_that_requires_a_gradient(name):
    problem = make_problem()
    expected = masked_svd_linear(*arguments(problem))
    getattr(problem, name).requires_grad_()
    shown = {"s": "S"}.get(name, name)
    with pytest.raises(ValueError, match=f"masked_svd_linear: {shown} requires a gradient, but it is frozen"):
        masked_svd_linear(*arguments(problem))
    with torch.no_grad():  # where nobody asks for it
        assert_identical((masked_svd_linear(*arguments(problem)),), (expected,))


@pytest.mark.parametrize("scale", [0, 0.0, -0.02, -math.inf, math.nan])
def test_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match=f"masked_svd_linear: mask_scale must be positive, got {scale}"):
        masked_svd_linear(*arguments(make_problem()), mask_scale=scale)


# Of `make_problem(dtype=torch.bfloat16)`, whose S and mask are float32 [4]; the rest is of both operators.
def per_rank_mistakes(name, shown):
    of_dtype = f"{shown} must be torch.float32 "
    return {
        f"{shown} of another rank": (name, torch.ones(5), ValueError, f"{shown} must be [4], got shape [5]"),
        f"{shown} a scalar": (name, torch.ones(()), ValueError, f"{shown} must be [4], got shape []"),
        f"{shown} too precise": (name, torch.ones(4).double(), TypeError, of_dtype),
        f"{shown} in x's dtype": (name, torch.ones(4).bfloat16(), TypeError, of_dtype),
        f"{shown} in the other half": (name, torch.ones(4).half(), TypeError, of_dtype),
        f"{shown} boolean": (name, torch.ones(4).bool(), TypeError, f"{shown} must be floating point"),
        f"{shown} elsewhere": (name, torch.ones(4).to("meta"), ValueError, f"{shown} is on meta but x is on"),
        f"{shown} missing": (name, None, TypeError, f"{shown} must be a tensor, got NoneType"),
    }


MISTAKES = operators.MISTAKES | per_rank_mistakes("s", "S") | per_rank_mistakes("mask", "mask")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    name, value, error, message = MISTAKES[mistake]
    problem = make_problem(dtype=torch.bfloat16)
    setattr(problem, name, value)
    with pytest.raises(error, match=re.escape(f"masked_svd_linear: {message}")):
        masked_svd_linear(*arguments(problem))


@pytest.mark.parametrize("name", ["x", "Vh", "U", "s", "mask", "bias"])
def test_what_is_no_tensor_is_named_under_autocast_too(name):
    problem = make_problem()
    setattr(problem, name, [1.0])
    shown = {"s": "S"}.get(name, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=f"masked_svd_linear: {shown} must be a tensor, got list"):
            masked_svd_linear(*arguments(problem))


@pytest.mark.parametrize("name", ["s", "mask"])
def test_float64_wants_float64_per_rank(name):
    problem = make_problem(dtype=torch.float64)
    setattr(problem, name, getattr(problem, name).float())
    with pytest.raises(TypeError, match="must be torch.float64 .* torch.float64, got torch.float32"):
        masked_svd_linear(*arguments(problem))


def test_rank_zero():
    nothing = torch.ones(0)
    with pytest.raises(ValueError, match=re.escape("masked_svd_linear: rank is 0 (Vh is [0, 7])")):
        masked_svd_linear(torch.ones(5, 7), torch.ones(0, 7), torch.ones(6, 0), nothing, nothing)
