"""The Triton kernels of masked_svd_linear against float64, in Triton's interpreter where there is no GPU."""

import copy
import dataclasses
import math
import re
import subprocess
import sys

import operators
import pytest
import torch
from operators import HALF_DTYPES, assert_identical, assert_within, make_problem
from test_masked_svd_linear import NO_ADAPTER, SCALE, Adapted, arguments, garbage, of_x_and_mask, oracle, run_both

from acip_kernels.ops import common, extension, masked_svd_linear
from acip_kernels.ops.masked_svd_linear.problem import Adapter

pytest.importorskip("triton")

from acip_kernels.ops import triton_products as kernels
from acip_kernels.ops.masked_svd_linear import op, triton
from acip_kernels.plan import DEVICES, Product, ProductConfig, product_config, product_configs, product_seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
DTYPES = common.TRITON_DTYPES
one_thread = operators.one_thread  # a fixture of every test here
# Of what is garbage on purpose; and of products that CUDA would rather have told more before they are deterministic.
pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:.*deterministic:UserWarning"
)

# Of no use but to cut small problems into several blocks and steps; by hand, as a choice would take one of each.
CONFIGS = [
    ProductConfig(16, 16, 16, 2, 1),
    ProductConfig(16, 64, 32, 4, 3),
    ProductConfig(64, 16, 16, 4, 2),
    ProductConfig(32, 32, 64, 4, 4),
]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What a kernel reads before it has written it, or leaves unwritten, is found by every test."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, params=["ours"])
def way(request, monkeypatch):
    """Ours, whatever the plan would choose for problems as small as these; some tests take "vendor" as well."""
    monkeypatch.setattr(kernels, "pays", lambda *_: request.param == "ours")
    return request.param


both_ways = pytest.mark.parametrize("way", ["ours", "vendor"], indirect=True)


def on_device(problem):
    """A copy whose tensors are on the device that kernels run on."""
    moved = copy.copy(problem)
    for name, value in vars(problem).items():
        if isinstance(value, torch.Tensor):
            setattr(moved, name, value.to(DEVICE))
    return moved


def run_triton(problem, **options):
    """The output and the gradients for x and mask."""
    problem = on_device(problem)
    return tuple(tensor.cpu() for tensor in run_both(problem, of_x_and_mask(problem, backend="triton", **options)))


def bounds(problem, mask_scale=SCALE):
    live = torch.where(problem.mask > 0, problem.s, 0)
    found = operators.bounds(problem, live, mask_scale)
    # The interpreter cuts bfloat16 off where a GPU rounds it: twice the error, in those roundings that a kernel makes.
    # Of x's gradient that is one, and the product's own rounding of h, which is counted, is not made.
    if INTERPRETED and problem.x.dtype == torch.bfloat16:
        found["y"] = 2.01 * found["y"]
    return found


def check(problem, mask_scale=SCALE, **options):
    """The output and both gradients, element by element; a pruned entry's is zero."""
    results = run_triton(problem, mask_scale=mask_scale, **options)
    limits = bounds(problem, mask_scale)
    for name, result, exact in zip(("y", "x", "mask"), results, oracle(problem, mask_scale)):
        assert result.dtype == (torch.float32 if name == "mask" else problem.x.dtype)
        assert_within(limits[name], result, exact, name)
    assert torch.count_nonzero(results[2][problem.mask <= 0]) == 0


# ---- values


@pytest.mark.parametrize("tokens", [1, 5, 64, 130])
@pytest.mark.parametrize("rank", [1, 7, 33, 128])
def test_output_and_gradients_against_float64(rank, tokens):
    check(make_problem((tokens,), 65, 37, rank, bias=tokens != 5, seed=rank))


@both_ways
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rank"), [(1, 128), (5, 33), (64, 7), (130, 1), (130, 33)])
def test_output_and_gradients_in_half_precision(tokens, rank, dtype):
    check(make_problem((tokens,), 33, 99, rank, dtype, bias=tokens != 64, seed=rank), mask_scale=0.3)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_longer_mask_are_those_entries(dtype):
    """To the bit as with a mask of these alone; the gradient is zero everywhere else."""
    problem = make_problem((5, 14), 33, 99, 70, dtype, seed=1)
    expected = run_triton(problem)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:70]
    longer = copy.copy(problem)
    # What must not be looked at is live where the entries are pruned, and the other way round.
    longer.mask = torch.full((200,), 0.02).index_copy(0, rows, problem.mask)
    longer.mask[:70] = torch.where(torch.isin(torch.arange(70), rows), longer.mask[:70], -problem.mask)
    y, dx, dmask = run_triton(longer, rows=rows.to(DEVICE))
    assert_identical((y, dx, dmask[rows]), expected)
    elsewhere = torch.ones(200, dtype=torch.bool).index_fill(0, rows, False)
    assert elsewhere.sum() == 130 and torch.count_nonzero(dmask[elsewhere]) == 0


@pytest.mark.parametrize("save_z", [False, True])
def test_z_made_again_is_z(save_z):
    problem = make_problem((3, 9), 33, 18, 17, torch.bfloat16)
    assert_identical(run_triton(problem, save_z=save_z), run_triton(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", operators.EXPANDED)
def test_inputs_of_any_strides(layout, dtype):
    for name in ("x", "Vh", "U", "g"):
        if layout in operators.LAYOUTS or name in ("x", "g"):
            problem = make_problem((3, 7), 19, 21, 18, dtype)
            setattr(problem, name, operators.EXPANDED[layout](getattr(problem, name)))
            check(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_row_of_gradients_at_stride_zero(dtype):
    problem = make_problem((20,), 19, 21, 18, dtype)
    problem.g = problem.g[:1].expand(20, 21)
    check(problem)


@pytest.mark.parametrize("leading", [leading for leading in operators.LEADING if len(leading) != 1], ids=str)
def test_any_leading_dimensions(leading):
    problem = make_problem(leading, dtype=torch.float16)
    check(problem)
    if 0 in leading:
        assert torch.count_nonzero(run_triton(problem)[2]) == 0


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_sums_are_in_float32(dtype):
    """Positive terms, 320 in every sum over features or tokens: one alone would soon be lost in a bfloat16 sum."""
    problem = make_problem((320,), 320, 320, 18, dtype)
    for name, tensor in vars(problem).items():
        setattr(problem, name, tensor.abs())
    problem.g /= 64  # for float16's range
    check(problem)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("adapter_rank", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration(dtype, adapter_rank, config):
    """The launches alone: strided z and S, an adapter's columns, several blocks and steps with a rest."""
    tokens, out, columns = 40, 53, 37
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape, dtype=dtype):
        return operators.numbers(generator, *shape, dtype=dtype)

    z, g, U, bias = numbers(tokens, columns + 3)[:, 3:], numbers(tokens, out), numbers(out, columns), numbers(out)
    S, mask = numbers(2, columns - adapter_rank, dtype=torch.float32)
    S, mask = S.repeat_interleave(2)[::2], mask.repeat_interleave(2)[::2]
    s = torch.where(mask > 0, S, 0).double()
    scales = torch.cat([torch.full((adapter_rank,), 0.3, dtype=torch.float64), s])
    z64, g64, U64 = z.double(), g.double(), U.double()
    on = [tensor.to(DEVICE) for tensor in (z, U, S, mask, bias)]
    # Of what a GPU does: z ⊙ s is rounded and the sum of products; or h ⊙ s; or nothing.
    twice = 2 if INTERPRETED and dtype == torch.bfloat16 else 1

    y = kernels.forward_product(*on, adapter_rank, 0.3, config).cpu()
    magnitude = (z64 * scales).abs() @ U64.abs().t() + bias.double().abs()
    # The scaling of an adapter is rounded to float32 first.
    bound = operators.error_bound(dtype, magnitude, roundings=2 * twice, sums=columns + 3)
    assert_within(bound, y, (z64 * scales) @ U64.t() + bias.double(), "y")

    z, U, S, mask, _ = on
    hs, dmask = kernels.backward_product(g.to(DEVICE), U, z, S, mask, SCALE, adapter_rank, 0.3, True, config)
    magnitude = g64.abs() @ U64.abs()
    bound = operators.error_bound(dtype, magnitude * scales.abs(), roundings=twice, sums=out + 2)
    assert_within(bound, hs.cpu(), g64 @ U64 * scales, "h ⊙ s")
    sums, absolute = ((z64 * (g64 @ U64)).sum(0), (z64.abs() * magnitude).sum(0))
    of_mask = s / SCALE
    bound = operators.error_bound(dtype, absolute[adapter_rank:] * of_mask.abs(), roundings=0, sums=out + tokens + 5)
    assert_within(bound, dmask.cpu(), sums[adapter_rank:] * of_mask, "mask")

    nothing, again = kernels.backward_product(g.to(DEVICE), U, z, S, mask, SCALE, adapter_rank, 0.3, False, config)
    assert nothing is None
    assert_identical((again,), (dmask,))


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("joined", [False, True])
def test_the_adapters_output_and_gradients(joined, drop, dtype):
    for leading, sizes, r in (
        ((3, 5), (13, 9, 6), 3),
        ((), (4, 7, 4), 1),
        ((0,), (5, 5, 2), 2),
        ((70,), (8, 40, 8), 5),
    ):
        problem = Adapted(dtype, leading, sizes, r, drop)
        moved = on_device(problem)
        moved.base = on_device(problem.base)
        saved = moved.run(joined, backend="triton")
        # A kernel rounds fewer times than the bound allows for, also where the interpreter cuts off instead.
        problem.check(tuple(tensor.cpu() for tensor in saved))
        assert_identical(moved.run(joined, backend="triton", save_z=False), saved)


@pytest.mark.parametrize("joined", [False, True])
def test_an_adapter_where_x_needs_no_gradient(joined):
    problem = Adapted(torch.bfloat16)
    p, r = problem.base, problem.r
    Vh, U = (
        (torch.cat([problem.A.bfloat16(), p.Vh]), torch.cat([problem.B.bfloat16(), p.U], 1)) if joined else (p.Vh, p.U)
    )
    x, g, Vh, U, s, mask, A, B = (
        t.to(DEVICE) for t in (p.x.flatten(0, -2), p.g.flatten(0, -2), Vh, U, p.s, p.mask, problem.A, problem.B)
    )
    adapter = Adapter(A, B, 0.5, joined)
    z = triton.products(x, Vh, adapter)
    assert z.shape == (15, r + 6)
    dx, *others = triton.backward(g, x, z, Vh, U, s, mask, SCALE, adapter, need_x=False)
    assert dx is None
    assert_identical(tuple(others), triton.backward(g, x, z, Vh, U, s, mask, SCALE, adapter)[1:])


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_run_gives_the_same_bits(dtype):
    problem = make_problem((10, 13), in_features=65, out_features=33, rank=17, dtype=dtype)
    assert_identical(run_triton(problem), run_triton(problem))


# ---- pruned entries


# Up to where z, h and their products overflow: infinities and NaNs, that a product with zero would let through.
@both_ways
@pytest.mark.parametrize("size", [0.0, 1e30, math.inf], ids="to {:g}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruned_entries_have_no_influence_and_no_gradient(dtype, size):
    problem = make_problem((3, 5), in_features=33, out_features=18, rank=17, dtype=dtype)
    pruned = problem.mask <= 0
    results = run_triton(garbage(problem, size))
    assert_identical(results, run_triton(problem))
    assert torch.count_nonzero(results[2][pruned]) == 0
    assert torch.count_nonzero(results[2][~pruned]) == len(pruned) - pruned.sum()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_is_pruned_too(dtype, value):
    problem = on_device(make_problem((20,), 9, 18, 17, dtype))
    dead = problem.mask <= 0
    z, S, U = problem.x.new_ones(20, 17), problem.s, problem.U
    y = triton.forward(z, U, S, problem.mask, None, None)
    gradients = triton.backward(problem.g, problem.x, z, problem.Vh, U, S, problem.mask, SCALE, None)
    z, S, mask = (torch.where(dead, value, tensor).to(tensor.dtype) for tensor in (z, S, problem.mask))
    mask = torch.where(mask > 0, -1, mask) if value == math.inf else mask  # infinity itself is live
    mask = torch.where(dead, mask, problem.mask)
    assert_identical((triton.forward(z, U, S, mask, None, None),), (y,))
    results = triton.backward(problem.g, problem.x, z, problem.Vh, U, S, mask, SCALE, None)
    assert_identical(results[:2], gradients[:2])


def test_with_all_entries_pruned_the_bias_is_left():
    problem = make_problem((2, 3))
    problem.mask = -problem.mask.abs()
    y, dx, dmask = run_triton(garbage(problem, math.inf))
    assert torch.equal(y, problem.bias.expand_as(y))
    assert torch.count_nonzero(dx) == torch.count_nonzero(dmask) == 0


# ---- PyTorch around it


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
def test_opcheck(leading):
    problem = on_device(make_problem(leading, dtype=torch.bfloat16))
    _, Vh, U, S, mask, bias = arguments(problem)
    z = torch.nn.functional.linear(problem.x.reshape(-1, 7), Vh)
    options = (*NO_ADAPTER, SCALE, True)
    for need_x in (True, False):
        backward = (problem.g, None, z, Vh, U, S, mask, *options, need_x, "triton")
        torch.library.opcheck(torch.ops.acip.masked_svd_linear_backward.default, backward)
    x, mask = problem.x.requires_grad_(), mask.requires_grad_()
    operator = torch.ops.acip.masked_svd_linear.default
    torch.library.opcheck(operator, (x, Vh, U, S, mask, bias, *options, "triton"))
    A, B = torch.rand(2, 7, device=DEVICE).requires_grad_(), torch.rand(6, 2, device=DEVICE).requires_grad_()
    seed = torch.tensor([77], device=DEVICE)
    for save_z in (True, False):
        adapted = (None, A, B, seed, 0.5, False, 0.25, SCALE, save_z, "triton")
        torch.library.opcheck(operator, (x, Vh, U, S, mask, bias, *adapted))


def test_compiled_forward_and_backward():
    torch.compiler.reset()
    problem = on_device(make_problem((2, 3)))
    function = of_x_and_mask(problem, backend="triton")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_identical(run_both(problem, compiled), run_both(problem, function))
    torch.compiler.reset()


# ---- the choice of a backend


def test_auto_takes_the_kernels_on_a_gpu_alone():
    problem = on_device(make_problem())
    expected = triton if DEVICE.type == "cuda" else op.BACKENDS["native" if extension.available() else "reference"]
    x = problem.x.bfloat16()
    assert common.choose_backend("operator", "auto", op.BACKENDS, x, gpu=op.MEASURED) is expected
    assert common.choose_backend("operator", "auto", op.BACKENDS, problem.x) is not triton  # not measured to be faster
    assert common.choose_backend("operator", "triton", op.BACKENDS, problem.x) is triton
    wide = problem.x.double()
    assert common.choose_backend("operator", "auto", op.BACKENDS, wide, gpu=op.MEASURED) is not triton


def test_a_tensor_that_the_kernels_do_not_take(monkeypatch):
    with pytest.raises(
        RuntimeError, match="masked_svd_linear: the Triton kernels take .*float16 on a GPU, got .*64 on"
    ):
        masked_svd_linear(*arguments(make_problem(dtype=torch.float64)), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="got torch.float32 on cpu. Move or convert x, or use backend='auto'"):
        masked_svd_linear(*arguments(make_problem()), backend="triton")


def test_without_triton_the_package_imports_and_the_backend_is_missing():
    program = """
import sys, torch
sys.modules["triton"] = None
from acip_kernels.ops import masked_svd_linear
one = torch.ones(1)
try:
    masked_svd_linear(one, one[None], one[None], one, one, backend="triton")
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "backend 'triton' is not available in this installation" in result.stdout, result.stderr


# ---- configurations


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_tokens": 48}, "powers of two"),
        ({"num_warps": 3}, "powers of two"),
        ({"num_warps": 0}, "powers of two"),
        ({"num_warps": 32}, "up to 16 warps"),
        ({"num_stages": 0}, "a stage"),
        ({"block_k": 8}, "blocks of 16"),
        ({"block_columns": 256}, "padding"),
        ({"block_tokens": 256, "block_k": 128}, "4 to 64 sums, not 128"),
        ({"block_tokens": 16, "block_columns": 16}, "4 to 64 sums, not 1"),
        ({"block_k": 256}, "64 numbers a step, not 256"),
        ({"num_stages": 8}, "bytes of shared memory and H100 has"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_run(change, reason):
    config = ProductConfig(block_tokens=128, block_columns=128, block_k=64, num_warps=8, num_stages=3)
    shape = Product(200, 100, 300, 2)
    assert config.why_not(shape, DEVICES["H100"]) is None
    assert reason in dataclasses.replace(config, **change).why_not(shape, DEVICES["H100"])


def test_a_configuration_that_cannot_run_is_not_launched():
    z, s = torch.ones(20, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    config = ProductConfig(64, 16, 16, 4, 1)
    message = f"{config} cannot run {Product(20, 8, 8, 4)}: a block would be padding for more than half"
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.forward_product(z, torch.ones(8, 8, device=DEVICE), s, s, None, config=config)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("kind", "group"), [(0, 0), (1, 0), (3, 64), (4, 0)])
@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_a_choice_for_every_size(device, kind, group, itemsize):
    for tokens, columns, depth in ((1, 1, 1), (64, 33, 7), (64, 4096, 512), (130, 512, 4096), (8192, 14336, 2048)):
        shape = Product(tokens, columns, depth, itemsize, kind, group)
        legal = list(product_configs(shape, device))
        assert len(legal) == len(set(legal))
        assert all(config.why_not(shape, device) is None for config in legal)
        chosen = product_config(shape, device)
        assert chosen in legal
        assert product_seconds(chosen, shape, device) == min(product_seconds(config, shape, device) for config in legal)
