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

from acip_kernels.ops import dropout, extension, masked_svd_linear
from acip_kernels.ops.masked_svd_linear import op
from acip_kernels.ops.masked_svd_linear.effective import Collector, effective_linear
from acip_kernels.ops.masked_svd_linear.problem import Adapter

OPERATOR = torch.ops.acip.masked_svd_linear.default
BACKWARD_OPERATOR = torch.ops.acip.masked_svd_linear_backward.default
SCALE = 0.02
BACKENDS = ["reference"] + ["native"] * extension.available()
NO_ADAPTER = (None, None, None, None, 0.0, False, 0.0)  # rows, A, B, seed, scaling, joined, dropout
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


def check(problem, needed=("x", "mask"), mask_scale=SCALE, **options):
    """The output and the gradients that are `needed`, element by element; a pruned entry's is zero."""
    live = problem.mask > 0
    y_exact, *gradients_exact = oracle(problem, mask_scale)
    bounds = operators.bounds(problem, torch.where(live, problem.s, 0), mask_scale)
    x, mask = (getattr(problem, name).detach().requires_grad_(name in needed) for name in ("x", "mask"))
    y = of_x_and_mask(problem, mask_scale=mask_scale, **options)(x, mask)
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
    backend = data.draw(st.sampled_from(["auto", *BACKENDS] if dtype != torch.float16 else ["auto", "reference"]))
    options = {"backend": backend, "save_z": data.draw(st.booleans())}
    check(problem, needed, mask_scale=data.draw(st.sampled_from((SCALE, 1.0, 0.3))), **options)


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
    z = torch.nn.functional.linear(problem.x.reshape(-1, 7), Vh)
    options = (*NO_ADAPTER, SCALE, True)
    torch.library.opcheck(BACKWARD_OPERATOR, (problem.g, None, z, Vh, U, S, mask, *options, True, "auto"))
    x, mask = problem.x.requires_grad_(), mask.requires_grad_()
    torch.library.opcheck(OPERATOR, (x, Vh, U, S, mask, bias, *options, "auto"))
    torch.library.opcheck(OPERATOR, (x.detach(), Vh, U, S, mask, None, *options, "reference"))
    A = operators.numbers(torch.Generator().manual_seed(0), 2, 7, dtype=torch.float32).requires_grad_()
    B = operators.numbers(torch.Generator().manual_seed(1), 6, 2, dtype=torch.float32).requires_grad_()
    longer = torch.cat([mask.detach(), mask.detach()]).requires_grad_()
    adapted = (torch.tensor([1, 3, 4, 6]), A, B, torch.tensor([77]), 0.5, False, 0.25, SCALE)
    for save_z in (True, False):
        torch.library.opcheck(OPERATOR, (x, Vh, U, S, longer, bias, *adapted, save_z, "auto"))


def test_z_that_the_operator_keeps_for_itself_has_no_gradient():
    problem = make_problem()
    problem.x.requires_grad_()
    y, z = OPERATOR(*arguments(problem), *NO_ADAPTER, SCALE, True, "auto")
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_is_the_native_backend_where_it_runs(dtype):
    problem = make_problem(dtype=dtype)
    chosen = "native" if extension.takes(problem.x) else "reference"
    assert_identical(run_both(problem), run_both(problem, of_x_and_mask(problem, backend=chosen)))


def test_a_missing_backend():
    message = f"backend 'cuda' is not available in this installation; available: {sorted(op.BACKENDS)}"
    with pytest.raises(RuntimeError, match=re.escape(f"masked_svd_linear: {message}")):
        masked_svd_linear(*arguments(make_problem()), backend="cuda")


@pytest.mark.skipif(not extension.available(), reason="the native extension is not built")
def test_the_native_backend_asked_for_in_a_dtype_that_it_lacks():
    with pytest.raises(RuntimeError, match="native kernels take .*float32.* got torch.float16"):
        masked_svd_linear(*arguments(make_problem(dtype=torch.float16)), backend="native")


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


@pytest.mark.parametrize("scale", [0, 0.0, -0.02, -math.inf, math.inf, math.nan])
def test_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match=f"masked_svd_linear: mask_scale must be positive and finite, got {scale}"):
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


# ---- with an adapter, and of a part of the mask


class Adapted:
    """A problem with an adapter of rank `r`, for some `rows` of a longer mask; and its oracle in float64."""

    def __init__(self, dtype, leading=(3, 5), sizes=(13, 9, 6), r=3, dropout=0.0, seed=0):
        self.base = make_problem(leading, *sizes, dtype=dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.precise = operators.precise(dtype)
        self.A = operators.numbers(generator, r, sizes[0], dtype=self.precise)
        self.B = operators.numbers(generator, sizes[1], r, dtype=self.precise)
        self.rows = torch.randperm(sizes[2] + 4, generator=generator)[: sizes[2]]
        self.mask = torch.ones(sizes[2] + 4, dtype=self.precise).index_copy_(0, self.rows, self.base.mask)
        self.seed, self.dropout, self.scaling, self.r = torch.tensor([2**40 + 12345]), dropout, 0.5, r

    def run(self, joined, **options):
        p, dtype = self.base, self.base.x.dtype
        Vh, U = p.Vh, p.U
        if joined:
            Vh, U = torch.cat([self.A.to(dtype), Vh]), torch.cat([self.B.to(dtype), U], 1)

        def function(x, mask, A, B):
            adapter = Adapter(A, B, self.scaling, joined, self.dropout, self.seed)
            return masked_svd_linear(
                x, Vh, U, p.s, mask, p.bias, mask_scale=SCALE, rows=self.rows, adapter=adapter, **options
            )

        return run(function, (p.x, self.mask, self.A, self.B), p.g)

    def oracle(self, absolute=False):
        """In float64; of the absolute values of everything it gives what rounding errors are measured by."""
        kept = dropout.keeps(int(self.seed), self.base.x.numel(), self.dropout).view(self.base.x.shape)
        kept = kept.double() / (1 - self.dropout)

        def exact(tensor):
            return tensor.double().abs() if absolute else tensor.double()

        Vh, U, s, bias = (exact(getattr(self.base, name)) for name in ("Vh", "U", "s", "bias"))
        live = (self.mask[self.rows] > 0).double()
        A, B = exact(self.A), exact(self.B)

        def function(x, mask, A, B):
            change = (mask - mask.detach())[self.rows] / SCALE
            y = formula(x, Vh, U, s, live * (1 + change), bias)
            return y + self.scaling * torch.einsum("...i,ri,or->...o", x * kept, A, B)

        return run(function, (exact(self.base.x), exact(self.mask), A, B), exact(self.base.g))

    def check(self, results):
        tokens, (rank, in_features), out = self.base.g[..., 0].numel(), self.base.Vh.shape, self.base.U.shape[0]
        names = ("y", "x", "mask", "A", "B")
        for name, result, exact, magnitude in zip(names, results, self.oracle(), self.oracle(absolute=True)):
            # On the longest way: an adapter's factor to the factors' dtype, x̃, a product, its scaling, the next
            # product, its addition, the bias; and every sum.
            bound = operators.error_bound(
                self.base.x.dtype, magnitude, roundings=8, sums=in_features + rank + self.r + out + tokens + 8
            )
            assert_within(bound, result, exact, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("joined", [False, True])
def test_the_adapters_output_and_gradients(joined, drop, dtype, backend):
    if backend == "native" and dtype == torch.float16:
        pytest.skip("no native float16")  # asked for by name it raises: tested above
    for leading, sizes, r in (
        ((3, 5), (13, 9, 6), 3),
        ((), (4, 7, 4), 1),
        ((0,), (5, 5, 2), 2),
        ((70,), (8, 40, 8), 5),
    ):
        problem = Adapted(dtype, leading, sizes, r, drop)
        saved = problem.run(joined, backend=backend)
        problem.check(saved)
        # z made again is z, to the last bit.
        assert_identical(problem.run(joined, backend=backend, save_z=False), saved)


needs_native = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("save_z", [False, True])
def test_what_is_compiled_is_what_is_called(joined, drop, dtype, save_z, monkeypatch):
    """The operator that a compiler traces, of the native kernels' parts, and the one call otherwise: the same bits."""
    problem = Adapted(dtype, (70,), (8, 40, 8), 5, drop)
    called = problem.run(joined, save_z=save_z)
    monkeypatch.delattr(op.native, "linear")  # whoever would call it fails
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_identical(problem.run(joined, save_z=save_z), called)


@needs_native
@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("joined", [False, True])
def test_products_widened_where_the_processor_has_none(joined, drop):
    problem = Adapted(torch.bfloat16, (70,), (8, 40, 8), 5, drop)
    try:
        extension.module.widen_bfloat16(True)
        problem.check(problem.run(joined, backend="native"))
    finally:
        extension.module.widen_bfloat16(not op.common.multiplies_natively(torch.bfloat16))


@pytest.mark.parametrize("needed", ["x", "mask", "A", "B"])
def test_only_what_is_trained_gets_a_gradient(needed):
    problem = Adapted(torch.float32)
    names, p = ("x", "mask", "A", "B"), problem.base
    tensors = {"x": p.x, "mask": problem.mask, "A": problem.A, "B": problem.B}
    given = {name: tensor.detach().requires_grad_(name == needed) for name, tensor in tensors.items()}
    adapter = Adapter(given["A"], given["B"], problem.scaling, False, 0.0, None)
    y = masked_svd_linear(
        given["x"], p.Vh, p.U, p.s, given["mask"], p.bias, mask_scale=SCALE, rows=problem.rows, adapter=adapter
    )
    y.backward(p.g)
    for name, expected in zip(names, problem.run(False)[1:], strict=True):
        if name == needed:
            assert_identical((given[name].grad,), (expected,))
        else:
            assert given[name].grad is None


def test_a_second_derivative_is_refused():
    problem = make_problem()
    x = problem.x.requires_grad_()
    y = masked_svd_linear(x, *arguments(problem)[1:])
    with pytest.raises(RuntimeError):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(dx.sum(), x)


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.ones(5, 6)},
        {"x": torch.ones(())},
        {"Vh": torch.ones(3, 7)},
        {"U": torch.ones(6, 5)},
        {"U": torch.ones(6, 4, dtype=torch.float64)},
        {"S": torch.ones(3)},
        {"S": torch.ones(4, dtype=torch.float64)},
        {"mask": torch.ones(5)},
        {"mask": torch.ones(4, dtype=torch.float64)},
        {"rows": torch.tensor([0, 1, 2, 4])},
        {"rows": torch.tensor([0, 1, 2])},
        {"bias": torch.ones(5)},
        {"A": torch.ones(2, 7)},
        {"A": torch.ones(2, 6), "B": torch.ones(6, 2)},
        {"A": torch.ones(2, 7), "B": torch.ones(6, 3)},
        {"A": torch.ones(2, 7).double(), "B": torch.ones(6, 2).double()},
        {"A": torch.ones(2, 7), "B": torch.ones(6, 2), "dropout": 0.5},
        {"A": torch.ones(2, 7), "B": torch.ones(6, 2), "joined": True},
    ],
    ids=str,
)
def test_the_call_itself_refuses_what_does_not_fit(change):
    """Without the checks in Python before it: no memory is read that is not there."""
    given = {
        "x": torch.ones(5, 7), "Vh": torch.ones(4, 7), "U": torch.ones(6, 4), "S": torch.ones(4),
        "mask": torch.ones(4), "bias": None, "rows": None, "A": None, "B": None, "seed": None, "scaling": 1.0,
        "joined": False, "dropout": 0.0, "mask_scale": 1.0, "save_z": True,
    }  # fmt: skip
    torch.ops.acip.masked_svd(*given.values())
    with pytest.raises((RuntimeError, IndexError)):
        torch.ops.acip.masked_svd(*(given | change).values())


@needs_native
def test_its_parts_refuse_what_does_not_fit():
    ones, no_adapter = torch.ones, (None, None, None, 0.0, False, 0.0)
    with pytest.raises(RuntimeError, match="S and mask must be vectors alike"):
        torch.ops.acip.masked_svd_outputs(ones(5, 4), ones(6, 4), ones(4), ones(3), None, None, None, 0.0, False)
    with pytest.raises(RuntimeError, match="s must be contiguous"):
        torch.ops.acip.masked_svd_outputs(ones(5, 4), ones(6, 4), ones(3), ones(3), None, None, None, 0.0, False)
    for g, z, S in (
        (ones(5, 7), ones(5, 4), ones(4)),
        (ones(5, 6), ones(5, 3), ones(4)),
        (ones(5, 6), ones(5, 4), ones(5)),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.acip.masked_svd_gradients(
                g, None, z, ones(4, 7), ones(6, 4), S, torch.ones_like(S), *no_adapter, 1.0, True
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_the_effective_route(drop, dtype):
    """One dense product for y, one for x's gradient, one for all the others'."""
    problem = Adapted(dtype, dropout=drop)
    p = problem.base
    masks = problem.mask[problem.rows]
    weight = ((p.U.double() * torch.where(masks > 0, p.s, 0)) @ p.Vh.double()).to(dtype)
    x, mask, A, B = (t.detach().requires_grad_() for t in (p.x, problem.mask, problem.A, problem.B))
    collector = Collector()
    adapter = Adapter(A, B, problem.scaling, False, drop, problem.seed)
    outputs = []
    # Two backward passes, the gradients of one step; dropout counts elements from the start of a call: one pass only.
    for part in [slice(None)] if drop else [slice(0, 1), slice(1, None)]:
        outputs.append(effective_linear(x[part], weight, mask, p.bias, adapter, collector))
        outputs[-1].backward(p.g[part])
    y = torch.cat([out.detach() for out in outputs])
    dmask, dA, dB = collector.gradients(p.Vh, p.U, p.s, masks, SCALE, adapter)
    assert collector.total is None
    full = torch.zeros_like(problem.mask).index_copy_(0, problem.rows, dmask)
    assert (dA is None) == bool(drop)
    if drop:
        dA, dB = A.grad, B.grad
    problem.check((y, x.grad, full, dA, dB))


def test_dropout_is_a_coin_for_every_element():
    """Of random seeds: how many are dropped, of two at a distance of each other, of rows, and by two seeds."""
    elements, share = 1 << 20, dropout.threshold(0.3) / 2**16
    generator = torch.Generator().manual_seed(0)
    seeds = [int(torch.randint(2**63 - 1, (1,), generator=generator)) for _ in range(6)]
    dropped = [(~dropout.keeps(seed, elements, 0.3)).float() - share for seed in seeds]
    variance, deviations = share * (1 - share), []
    for number, one in enumerate(dropped):
        deviations.append(float(one.mean()) * math.sqrt(elements / variance))
        others = [(one[:-lag], one[lag:]) for lag in (1, 2, 3, 4, 64, 576, 1024, 1536, 4096)]
        others += [(one, other) for other in dropped[:number]]
        deviations += [float((a * b).mean()) / variance * math.sqrt(len(a)) for a, b in others]
        for sums in (one.view(1024, -1).sum(0), one.view(1024, -1).sum(1)):
            # A sample of 1024 has a variance that is itself within sqrt(2 / 1024) of what it should be.
            deviations.append((float(sums.square().mean()) / (1024 * variance) - 1) / math.sqrt(2 / 1024))
    # Some 90 of them: one beyond 4.5 is a chance of 1 in 1600.
    assert max(map(abs, deviations)) < 4.5
    for seed in seeds:  # one that stays on a device, where nobody may ask for its number
        assert torch.equal(dropout.keeps(torch.tensor([seed]), 999, 0.3), dropout.keeps(seed, 999, 0.3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(3, 8)}, "A [r, 7] and B [6, r]"),
        ({"B": torch.ones(5, 3)}, "A [r, 7] and B [6, r]"),
        ({"B": torch.ones(6, 2)}, "with r >= 1"),
        ({"A": torch.ones(3)}, "A must be a matrix"),
        ({"dropout": 0.5}, "needs a seed"),
        ({"dropout": 1.0, "seed": torch.tensor([1])}, "dropout must be in [0, 1)"),
    ],
)
def test_a_wrong_adapter_is_named(change, message):
    adapter = Adapter(**{"A": torch.ones(3, 7), "B": torch.ones(6, 3), "scaling": 1.0} | change)
    with pytest.raises(ValueError, match=re.escape(message)):
        masked_svd_linear(*arguments(make_problem()), adapter=adapter)
