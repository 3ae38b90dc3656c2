"""lowrank_linear against the formula in float64, and at home in every part of PyTorch that a layer meets."""

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

from acip_kernels.ops import extension, lowrank_linear
from acip_kernels.ops.fused_linear.op import DTYPES as FUSED_DTYPES
from acip_kernels.ops.lowrank_linear import op

NAMES = ("x", "Vh", "U", "s", "bias")
OPERATOR = torch.ops.acip.lowrank_linear.default
one_thread = operators.one_thread  # a fixture of every test here


def arguments(problem):
    return tuple(getattr(problem, name) for name in NAMES)


def formula(x, Vh, U, s=None, bias=None):
    z = torch.einsum("...i,ri->...r", x, Vh)
    y = torch.einsum("...r,or->...o", z if s is None else z * s, U)
    return y if bias is None else y + bias


def oracle(problem):
    """The output and the gradient of every tensor there is, by name: autograd in float64."""
    given = {name: getattr(problem, name) for name in NAMES if getattr(problem, name) is not None}
    results = run(
        lambda *tensors: formula(**dict(zip(given, tensors))),
        [tensor.double() for tensor in given.values()],
        problem.g.double(),
    )
    return dict(zip(("y", *given), results))


def check(problem, needed=NAMES):
    """The output and the gradients that are `needed`, element by element; the others must not exist."""
    exact, bounds = oracle(problem), operators.bounds(problem, problem.s)
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name in needed)
        for name, tensor in zip(NAMES, arguments(problem))
    }
    y = lowrank_linear(**leaves)
    assert y.dtype == problem.x.dtype
    assert_within(bounds["y"], y, exact["y"], "y")
    needed = [name for name in needed if leaves[name] is not None]
    assert y.requires_grad == bool(needed)
    if needed:
        y.backward(problem.g)
    for name, leaf in leaves.items():
        if name not in needed:
            assert leaf is None or leaf.grad is None
        else:
            assert leaf.grad.dtype == leaf.dtype
            assert_within(bounds[name], leaf.grad, exact[name], name)


# ---- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@operators.examples
@given(data=st.data())
def test_output_and_gradients_against_float64(dtype, data):
    problem = data.draw(operators.problems(dtype))
    scale = data.draw(st.sampled_from((None, operators.precise(dtype), dtype)))
    problem.s = None if scale is None else problem.s.to(scale)
    check(problem, data.draw(st.sets(st.sampled_from(NAMES)).map(sorted)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_any_leading_dimensions_at_rank_one_and_full_rank(leading, dtype):
    for rank in (1, 5):
        check(make_problem(leading, in_features=9, out_features=5, rank=rank, dtype=dtype))
        check(make_problem(leading, in_features=5, out_features=9, rank=rank, dtype=dtype, s_dtype=dtype))


@pytest.mark.parametrize("leading", [leading for leading in LEADING if 0 in leading], ids=str)
def test_no_tokens_give_no_output_and_zero_gradients(leading):
    problem = make_problem(leading)
    y, dx, *others = run(lowrank_linear, arguments(problem), problem.g)
    assert y.shape == (*leading, 6) and dx.shape == problem.x.shape
    assert all(torch.count_nonzero(gradient) == 0 for gradient in others)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_sums_are_in_float32(dtype, threads):
    with operators.threads(threads):
        check(operators.make_long_sums(dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_the_bounds_would_notice_a_sum_in_half_precision(dtype):
    problem = operators.make_long_sums(dtype)
    z = torch.zeros(2048, 2, dtype=dtype)
    for x, Vh in zip(problem.x.t(), problem.Vh.t()):
        z += x[:, None] * Vh
    _, _, *others = (tensor.double() for tensor in arguments(problem))
    y = formula(z.double(), torch.eye(2).double(), *others)
    with pytest.raises(AssertionError, match="bounds off"):
        assert_within(operators.bounds(problem, problem.s)["y"], y, oracle(problem)["y"])


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_float32_s_and_its_gradient_are_as_precise(dtype):
    problem = operators.make_exact(dtype)
    x, Vh, U, s, _ = arguments(problem)
    y, _, _, _, ds = run(lowrank_linear, (x, Vh, U, s), problem.g)
    assert_identical((y,), ((x.float() * s).to(dtype),))
    products = problem.x.double() * problem.g.double()
    bound = operators.error_bound(dtype, products.abs().sum(0), roundings=0, sums=len(x))
    assert_within(bound, ds, products.sum(0), "s")


def test_gradients_by_finite_differences():
    full = [tensor.requires_grad_() for tensor in arguments(make_problem((2, 3), dtype=torch.float64))]
    assert torch.autograd.gradcheck(lowrank_linear, full)
    x, Vh, U, _, bias = full
    assert torch.autograd.gradcheck(lowrank_linear, (x[0, 0].detach().requires_grad_(), Vh, U))
    assert torch.autograd.gradcheck(lowrank_linear, (x, Vh, U, None, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_plain_sum(dtype):
    problem = make_problem((2, 3), dtype=dtype)
    problem.g = torch.ones(()).to(dtype).expand(problem.g.shape)
    leaves = [tensor.requires_grad_() for tensor in arguments(problem)]
    lowrank_linear(*leaves).sum().backward()  # sends back exactly this g, at stride 0
    exact, bounds = oracle(problem), operators.bounds(problem, problem.s)
    for name, leaf in zip(NAMES, leaves):
        assert_within(bounds[name], leaf.grad, exact[name], name)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_run_gives_the_same_bits(dtype, threads):
    problem = make_problem((30, 40), in_features=65, out_features=33, rank=17, dtype=dtype)
    with operators.threads(threads):
        first = run(lowrank_linear, arguments(problem), problem.g)
        assert_identical(run(lowrank_linear, arguments(problem), problem.g), first)


# ---- PyTorch around it


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, leading):
    problem = make_problem(leading, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in arguments(problem)]
    torch.library.opcheck(OPERATOR, (*leaves, "auto"))
    x, Vh, U, *_ = leaves
    torch.library.opcheck(OPERATOR, (x, Vh.detach(), U.detach(), None, None, "reference"))


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_the_meta_device_gives_the_shape(leading):
    problem = make_problem(leading, dtype=torch.bfloat16)
    y = lowrank_linear(*(tensor.to("meta") for tensor in arguments(problem)))
    assert (y.shape, y.dtype, y.device.type) == ((*leading, 6), torch.bfloat16, "meta")


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("leading", "layout"), operators.COMPILED, ids=str)
def test_compiled_forward_and_backward(fresh_compiler, leading, layout):
    problem = make_problem(leading)
    tensors = [operators.LAYOUTS[layout](tensor) for tensor in arguments(problem)]
    compiled = torch.compile(lowrank_linear, fullgraph=True, backend="aot_eager")
    # Within the bounds, not to the bit: the compiler may change strides, and a product of other strides may sum in
    # another order.
    exact, bounds = oracle(problem), operators.bounds(problem, problem.s)
    for name, result in zip(("y", *NAMES), run(compiled, tensors, problem.g)):
        assert_within(bounds[name], result, exact[name], name)


def test_compiled_by_inductor(fresh_compiler):
    problem = make_problem((2, 3))
    exact, bounds = oracle(problem), operators.bounds(problem, problem.s)
    compiled = torch.compile(lowrank_linear, fullgraph=True)
    # Its sums may be in another order.
    for name, result in zip(("y", *NAMES), run(compiled, arguments(problem), problem.g)):
        assert_within(bounds[name], result, exact[name], name)


def test_compiled_once_for_all_sizes(fresh_compiler):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowrank_linear, fullgraph=True, dynamic=True, backend=counter)
    for problem in operators.make_sizes():
        assert_identical(
            run(compiled, arguments(problem), problem.g), run(lowrank_linear, arguments(problem), problem.g)
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_is_the_explicit_cast(fresh_compiler, dtype):
    problem = make_problem((2, 3), dtype=dtype)

    def automatic(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return lowrank_linear(*tensors)

    def explicit(x, Vh, U, s, bias):
        return lowrank_linear(x.bfloat16(), Vh.bfloat16(), U.bfloat16(), s, bias.bfloat16())

    expected = run(explicit, arguments(problem), problem.g.bfloat16())
    assert expected[0].dtype == torch.bfloat16 and expected[1].dtype == dtype
    assert_identical(run(automatic, arguments(problem), problem.g.bfloat16()), expected)
    compiled = torch.compile(automatic, fullgraph=True, backend="aot_eager")
    assert_identical(run(compiled, arguments(problem), problem.g.bfloat16()), expected)


def test_autocast_leaves_float64_alone():
    problem = make_problem(dtype=torch.float64)
    expected = run(lowrank_linear, arguments(problem), problem.g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_identical(run(lowrank_linear, arguments(problem), problem.g), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    problem = make_problem((2, 3), dtype=torch.bfloat16)

    def checkpointed(*tensors):
        return checkpoint(lowrank_linear, *tensors, use_reentrant=use_reentrant)

    expected = run(lowrank_linear, arguments(problem), problem.g)
    leaves = [tensor.requires_grad_() for tensor in arguments(problem)]
    y = checkpointed(*leaves)
    y.backward(problem.g)  # autograd.grad is not for the reentrant kind
    assert_identical((y, *(leaf.grad for leaf in leaves)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_mode(dtype):
    problem = make_problem((2, 3), dtype=dtype)
    expected = lowrank_linear(*arguments(problem))
    with torch.inference_mode():
        y = lowrank_linear(*arguments(problem))
    assert y.is_inference()
    assert_identical((y,), (expected,))


@pytest.mark.parametrize("leading", [(), (0,), (3, 5)], ids=str)
def test_flops_of_both_passes(leading):
    problem = make_problem(leading)
    x = problem.x.requires_grad_()
    tokens = problem.g[..., 0].numel()
    with FlopCounterMode(display=False) as forward:
        y = lowrank_linear(x, problem.Vh, problem.U, problem.s, problem.bias)
    with FlopCounterMode(display=False) as backward:
        y.backward(problem.g)
    assert forward.get_total_flops() == backward.get_total_flops() == 2 * tokens * 4 * (7 + 6)


# ---- backends and mistakes


def test_auto_takes_the_native_kernels_where_they_are_and_run():
    for dtype in DTYPES:
        problem = make_problem(dtype=dtype)
        takes = extension.available() and dtype in FUSED_DTYPES
        expected = lowrank_linear(*arguments(problem), backend="native" if takes else "reference")
        assert_identical((lowrank_linear(*arguments(problem)),), (expected,))


def test_a_missing_backend():
    message = f"backend 'cuda' is not available in this installation; available: {sorted(op.BACKENDS)}"
    with pytest.raises(RuntimeError, match=re.escape(f"lowrank_linear: {message}")):
        lowrank_linear(*arguments(make_problem()), backend="cuda")


@pytest.mark.parametrize("backend", ["foo", "", "Reference"])
def test_an_unknown_backend(backend):
    message = f"lowrank_linear: backend must be 'auto' or one of .*, got '{backend}'"
    with pytest.raises(ValueError, match=message):
        lowrank_linear(*arguments(make_problem()), backend=backend)


# Of `make_problem(dtype=torch.bfloat16)`, whose s is float32 [4]; the rest is the same for both operators.
S_DTYPE = "s must be torch.float32 or x's dtype torch.bfloat16, got "
MISTAKES = operators.MISTAKES | {
    "s of another rank": ("s", torch.ones(5), ValueError, "s must be [4], got shape [5]"),
    "s a scalar": ("s", torch.ones(()), ValueError, "s must be [4], got shape []"),
    "s too precise": ("s", torch.ones(4).double(), TypeError, S_DTYPE + "torch.float64"),
    "s in the other half": ("s", torch.ones(4).half(), TypeError, S_DTYPE + "torch.float16"),
    "s of integers": ("s", torch.ones(4).int(), TypeError, "s must be floating point, got torch.int32"),
    "s elsewhere": ("s", torch.ones(4, device="meta"), ValueError, "s is on meta but x is on cpu"),
    "s no tensor": ("s", 2.0, TypeError, "s must be a tensor, got float"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    name, value, error, message = MISTAKES[mistake]
    problem = make_problem(dtype=torch.bfloat16)
    setattr(problem, name, value)
    with pytest.raises(error, match=re.escape(f"lowrank_linear: {message}")):
        lowrank_linear(*arguments(problem))


@pytest.mark.parametrize("name", ["x", "Vh", "U", "bias"])
def test_what_is_no_tensor_is_named_under_autocast_too(name):
    problem = make_problem()
    setattr(problem, name, [1.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=f"lowrank_linear: {name} must be a tensor, got list"):
            lowrank_linear(*arguments(problem))


def test_rank_zero():
    with pytest.raises(ValueError, match=re.escape("lowrank_linear: rank is 0 (Vh is [0, 7])")):
        lowrank_linear(torch.ones(5, 7), torch.ones(0, 7), torch.ones(6, 0))


def test_float64_wants_a_float64_s():
    problem = make_problem(dtype=torch.float64)
    problem.s = problem.s.float()
    with pytest.raises(TypeError, match="s must be torch.float64 or .* torch.float64, got torch.float32"):
        lowrank_linear(*arguments(problem))
