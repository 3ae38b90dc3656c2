"""The native operator of deployed layers against float64: every instruction set, form, number and way of storing it."""

import operators
import pytest
import torch
from deployed import KINDS, Layer, arguments, bound, exact, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import assert_within, error_bound
from torch.utils.flop_counter import FlopCounterMode

from acip_kernels import plan
from acip_kernels.ops import extension, lowrank_linear
from acip_kernels.ops.fused_linear import op, reference
from acip_kernels.ops.pivot_linear.op import pivot_linear

pytestmark = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")

TOKENS = (1, 2, 5, 7, 13, 32, 49)


isa = operators.isa  # a fixture


@pytest.fixture(autouse=True)
def few_tokens_as_measured():
    """Whatever a test has set, and however it ends."""
    yield
    extension.module.use_few_tokens()


@pytest.fixture(params=["few", "many"])
def way(request):
    """By the kernels alone, or by torch's products with what they need around them, whatever the number of tokens."""
    extension.module.use_few_tokens(2**40 if request.param == "few" else 0)
    return request.param


# A weight of codes is rounded as it is made, both of a layer's are; and z before `s`.
ROUNDINGS = {"few": 3, "many": 6}


def fused(x, layers, mode=op.CONCATENATE):
    return torch.ops.acip.fused_linear(x, *arguments(layers), mode)


SHAPES = [(1, 1, 1), (7, 6, 4), (33, 65, 17), (64, 64, 32), (130, 37, 33), (200, 300, 97)]


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [op.DENSE, op.FACTORS, op.PIVOTED], ids=["dense", "factors", "pivoted"])
def test_every_form_and_number_against_float64(isa, way, form, kind, dtype):
    for number, (in_, out, rank) in enumerate(SHAPES):
        group = (32, 64, 128)[number % 3]
        layer = Layer(
            form, in_, out, rank, dtype, KINDS[kind], s=form == op.FACTORS and number % 2 == 0, bias=number % 3 != 1,
            group=group, seed=number, ordered=number > 2,
        )  # fmt: skip
        for tokens in TOKENS:
            x = inputs(dtype, tokens, in_)
            y, want = fused(x, [layer]), exact(x, [layer])
            assert y.dtype == dtype
            assert_within(bound(layer, x, dtype, ROUNDINGS[way]), y, want, f"{in_} → {rank} → {out}, {tokens} tokens")


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("cols", [2600, 5001])
def test_more_inputs_and_tokens_than_are_computed_together(isa, cols, dtype):
    extension.module.use_few_tokens(2**40)
    try:
        layer = Layer(op.DENSE, cols, 21, 0, dtype)
        for tokens in (16, 70, 261):
            x = inputs(dtype, tokens, cols)
            assert_within(bound(layer, x, dtype), fused(x, [layer]), exact(x, [layer]), f"{tokens} tokens")
    finally:
        extension.module.use_few_tokens()


@pytest.mark.parametrize("kind", [op.INT4, op.INT4_ZEROS])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_of_inputs_of_very_different_sizes(isa, group, kind):
    cols = 1300  # more than kernels take the scales of at a time
    layer = Layer(op.DENSE, cols, 9, 0, torch.bfloat16, kind, bias=False, group=group)
    generator = torch.Generator().manual_seed(2)
    for tokens in (1, 3):
        sizes = torch.randint(-12, 13, (tokens, cols), generator=generator)
        x = (inputs(torch.bfloat16, tokens, cols) * 2.0**sizes).bfloat16()
        assert_within(bound(layer, x, torch.bfloat16), fused(x, [layer]), exact(x, [layer]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [op.INT8, op.INT4, op.INT4_ZEROS])
def test_codes_of_the_largest_the_smallest_and_missing_inputs(isa, kind, dtype):
    """What a group's inputs share is chosen by their largest: of all bits, none, next to nothing, or no number."""
    cols = 300
    layer = Layer(op.DENSE, cols, 9, 0, dtype, kind, bias=False, group=64)
    most = 2 - torch.finfo(dtype).eps
    signs = inputs(dtype, 1, cols).sign()
    for size in (most, most * 2.0**70, most * 2.0**-70, 0.0):
        x = signs * size
        assert x.dtype == dtype
        assert_within(bound(layer, x, dtype), fused(x, [layer]), exact(x, [layer]), f"{size}")
    tiny = torch.finfo(dtype).tiny  # products of it may be none
    assert fused(signs * tiny, [layer]).abs().max() <= 2 * tiny * layer.magnitude(torch.ones(1, cols)).max()
    for missing in (float("nan"), float("inf")):
        for tokens in (1, 3):
            x = inputs(dtype, tokens, cols)
            want = fused(x, [layer])
            x[-1, 100] = missing
            y = fused(x, [layer])
            assert not y[-1].isfinite().any()
            assert torch.equal(y[:-1], want[:-1])  # of its own token alone


@pytest.mark.parametrize("kind", [op.INT8, op.INT4])
def test_bfloat16_inputs_of_like_sizes_lose_nothing_by_a_shared_unit(isa, kind):
    """Of up to 2^-7 of the largest they are whole numbers of the unit: outputs are as far off as float32 sums are."""
    cols = 500  # no whole cache lines, which int8 is looked up in
    layer = Layer(op.DENSE, cols, 40, 0, torch.bfloat16, kind, bias=False, group=128)
    generator = torch.Generator().manual_seed(5)
    x = inputs(torch.bfloat16, 1, cols) * 2.0 ** -torch.randint(0, 5, (1, cols), generator=generator)
    layer.matrices[0].share = 0.0
    sums = error_bound(torch.float32, layer.magnitude(x), roundings=0, sums=cols + 40) + layer.shared(x)
    want = exact(x, [layer])
    assert_within(sums + (want.abs() + sums) * torch.finfo(x.dtype).eps / 2, fused(x, [layer]), want)


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
def test_siblings_of_mixed_forms_and_kinds(isa, way, dtype):
    layers = [
        Layer(op.FACTORS, 70, 90, 33, dtype, seed=1, s=True),
        Layer(op.DENSE, 70, 20, 0, dtype, op.INT8, seed=2, bias=False),
        Layer(op.PIVOTED, 70, 20, 9, dtype, op.INT4_ZEROS, seed=3),
        Layer(op.PIVOTED, 70, 5, 5, dtype, seed=4),
    ]
    for tokens in TOKENS:
        x = inputs(dtype, tokens, 70)
        y, want = fused(x, layers), exact(x, layers)
        bounds = torch.cat([bound(layer, x, dtype, ROUNDINGS[way]) for layer in layers], -1)
        assert_within(bounds, y, want, f"{tokens} tokens")
        alone = torch.cat([fused(x, [layer]) for layer in layers], -1)
        if way == "few":
            assert torch.equal(y, alone)  # to the bit: a row's sum is the same in any company


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize(
    "forms", [(op.FACTORS,) * 3, (op.DENSE, op.PIVOTED, op.DENSE), (op.PIVOTED, op.FACTORS, op.PIVOTED)]
)
def test_gated_mlp_and_swiglu(isa, way, forms, dtype):
    gate, up, down = (
        Layer(forms[0], 40, 66, 21, dtype, seed=1),
        Layer(forms[1], 40, 66, 35, dtype, op.INT8, seed=2),
        Layer(forms[2], 66, 40, 18, dtype, op.INT4, seed=3),
    )
    for tokens in TOKENS:
        x = inputs(dtype, tokens, 40) / 8
        g, u = exact(x, [gate]), exact(x, [up])
        dg, du = bound(gate, x, dtype, ROUNDINGS[way]), bound(up, x, dtype, ROUNDINGS[way])
        # silu's slope is at most 1.1 and |silu(g)| at most |g|; the exponential is good to some 10 units.
        eps, small = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        act = torch.nn.functional.silu(g) * u
        act_bound = 1.1 * dg * (u.abs() + du) + g.abs() * du + (eps + 20 * small) * (g.abs() + dg) * (u.abs() + du)
        assert_within(act_bound, fused(x, [gate, up], op.SWIGLU), exact(x, [gate, up], op.SWIGLU), "swiglu")
        y, want = fused(x, [gate, up, down], op.GATED_MLP), exact(x, [gate, up, down], op.GATED_MLP)
        through = Layer(forms[2], 66, 40, 18, dtype, op.INT4, seed=3, bias=False).magnitude(act_bound)
        assert_within(through + bound(down, act.abs() + act_bound, dtype, ROUNDINGS[way]), y, want, "mlp")


def test_silu_of_large_and_missing_numbers(isa):
    identity = torch.eye(4)
    tensors, spec = [identity, identity], [op.DENSE, 0, op.PLAIN, 4, 0] * 2
    x = torch.tensor([[200.0, -200.0, float("nan"), float("inf")]])
    y = torch.ops.acip.fused_linear(x, tensors, spec, op.SWIGLU)
    # An infinity meets the zeros of the other rows.
    assert y.isnan().all()
    x = torch.tensor([[200.0, -200.0, -1e30, 90.0]])
    y = torch.ops.acip.fused_linear(x, tensors, spec, op.SWIGLU)
    exact = torch.nn.functional.silu(x.double()) * x.double()
    # The exponential is good to 2 units in the last place, and four roundings follow; e^-87 (1.65e-38) stands for all
    # that is smaller, so what has a smaller one is not zero: element by element, as they are of all sizes.
    bound = exact.abs() * 8 * torch.finfo(torch.float32).eps + 1.7e-38 * x.double() ** 2
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads_and_stay_the_same(isa, kind):
    for dtype in op.DTYPES:
        layers = [Layer(form, 320, 500, 130, dtype, KINDS[kind], seed=form) for form in (op.FACTORS, op.PIVOTED)]
        x = inputs(dtype, 3, 320)
        results = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 1, 2):
                torch.set_num_threads(threads)
                results.append(fused(x, layers))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_uninitialized_is_read(isa, way, kind):
    for dtype in op.DTYPES:
        layer = Layer(op.FACTORS, 33, 41, 19, dtype, KINDS[kind])
        other = Layer(op.FACTORS, 100, 100, 90, dtype)
        x = inputs(dtype, 5, 33)
        want = fused(x, [layer])
        fused(torch.full((32, 100), float("nan"), dtype=dtype), [other])  # what is left of the stages' memory
        torch.use_deterministic_algorithms(True)  # fresh memory is filled with NaN
        try:
            assert torch.equal(fused(x, [layer]), want)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
def test_rows_far_apart_and_misaligned(isa, way, dtype):
    layer = Layer(op.FACTORS, 37, 29, 11, dtype)
    x = inputs(dtype, 4, 37)
    want = fused(x, [layer])

    def apart(weight, offset):
        wide = torch.full((weight.shape[0], weight.shape[1] + 5), float("nan"), dtype=dtype)
        wide[:, offset : offset + weight.shape[1]] = weight
        return wide[:, offset : offset + weight.shape[1]]

    for offset in (0, 1, 3):
        layer.tensors[:2] = [apart(matrix.tensors[0], offset) for matrix in layer.matrices]
        assert torch.equal(fused(x, [layer]), want)
    strided = torch.empty(4, 74, dtype=dtype)
    strided[:, ::2] = x
    assert torch.equal(fused(strided[:, ::2], [layer]), want)
    assert torch.equal(fused(x.view(2, 2, 37), [layer]), want.view(2, 2, 29))


def test_no_tokens_no_rank_no_outputs(isa, way):
    layer = Layer(op.FACTORS, 5, 6, 3, torch.float32)
    assert fused(torch.empty(0, 5), [layer]).shape == (0, 6)
    assert fused(torch.empty(2, 0, 5), [layer]).shape == (2, 0, 6)
    bias = torch.arange(6.0)
    tensors = [torch.empty(0, 5), torch.empty(6, 0), bias]
    y = torch.ops.acip.fused_linear(torch.ones(2, 5), tensors, [op.FACTORS, 2, op.PLAIN, 5, 0, op.PLAIN, 0, 0], 0)
    assert torch.equal(y, bias.expand(2, 6))
    y = torch.ops.acip.fused_linear(torch.ones(5), layer.tensors, layer.spec, 0)
    assert y.shape == (6,)


def test_few_tokens_are_what_the_plan_says(isa):
    for dtype in op.DTYPES:
        in_, out = 30, 50
        for name, kind in KINDS.items():
            most = plan.few_tokens(dtype, name.split()[0])
            if most > 1000:  # float16 without instructions for it
                continue
            layer = Layer(op.FACTORS, in_, out, 9, dtype, kind)
            x = inputs(dtype, most + 1, in_)
            by_kernels, by_products = fused(x[:most], [layer]), fused(x, [layer])
            extension.module.use_few_tokens(most + 1)
            assert torch.equal(fused(x[:most], [layer]), by_kernels)
            extension.module.use_few_tokens(0)
            assert torch.equal(fused(x, [layer]), by_products)
            extension.module.use_few_tokens()
    assert plan.few_tokens(torch.float32) >= 32
    with pytest.raises(ValueError, match="float64"):
        plan.few_tokens(torch.float64)


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int4 with zeros"])
def test_a_weight_made_of_its_codes_is_that_of_the_reference_to_the_bit(isa, kind, dtype):
    extension.module.use_few_tokens(0)
    try:
        for rows, cols, group in ((1, 1, 32), (9, 31, 64), (5, 65, 32), (70, 200, 128), (3, 320, 64), (3, 96, 32)):
            layer = Layer(op.DENSE, cols, rows, 0, dtype, KINDS[kind], bias=False, group=group)
            made = fused(torch.eye(cols, dtype=dtype), [layer]).t()
            assert torch.equal(made, reference.forward(torch.eye(cols, dtype=dtype), *arguments([layer]), 0).t())
    finally:
        extension.module.use_few_tokens()


def test_what_does_not_fit_is_refused(way):
    layer = Layer(op.PIVOTED, 40, 20, 7, torch.float32, op.INT4_ZEROS)
    x = inputs(torch.float32, 2, 40)
    fused(x, [layer])
    P, P_scales, P_zeros, C, C_scales, C_zeros, place, bias = layer.tensors

    def refused(message, tensors=layer.tensors, spec=layer.spec, mode=0, x=x):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.acip.fused_linear(x, list(tensors), list(spec), mode)

    refused("ends too early", spec=layer.spec[:-1])
    refused("no mode", mode=3)
    refused("takes 3 layers", mode=2)
    refused("x must be", x=x[:, :-1])
    refused("x must be float32", x=x.double())
    refused("no layer is of form", spec=[9, *layer.spec[1:]])
    refused("no matrix is of kind", spec=[*layer.spec[:2], 7, *layer.spec[3:]])
    refused("a group must be", spec=[*layer.spec[:4], 48, *layer.spec[5:]])
    refused("only two factors have an s", spec=[2, 3, *layer.spec[2:]])
    refused("more than spec", tensors=[*layer.tensors, bias])
    refused("and no a bias", tensors=layer.tensors[:-1])
    refused("must be contiguous", tensors=[P, P_scales[:-1], P_zeros, C, C_scales, C_zeros, place, bias])
    refused("must be a CPU tensor", tensors=[P, P_scales.float(), P_zeros, C, C_scales, C_zeros, place, bias])
    refused("columns", tensors=[P[:, :-1], P_scales, P_zeros, C, C_scales, C_zeros, place, bias])
    refused("places must be of", tensors=[P, P_scales, P_zeros, C, C_scales, C_zeros, place + 1, bias])
    refused("contiguous rows", tensors=[P.t().contiguous().t(), P_scales, P_zeros, C, C_scales, C_zeros, place, bias])
    refused(
        "a bias must be a CPU tensor of Float",
        tensors=[P, P_scales, P_zeros, C, C_scales, C_zeros, place, bias.double()],
    )
    plain = Layer(op.FACTORS, 40, 20, 7, torch.float32, bias=False)
    refused("second weight", tensors=[plain.tensors[0], plain.tensors[1][:, :-1]],
            spec=[op.FACTORS, 0, op.PLAIN, 40, 0, op.PLAIN, 6, 0])  # fmt: skip
    refused("siblings", tensors=[torch.ones(3, 40), torch.ones(3, 41)],
            spec=[op.DENSE, 0, op.PLAIN, 40, 0, op.DENSE, 0, op.PLAIN, 41, 0])  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_wrong_arguments_raise_and_never_crash(data):
    """A valid call, of which something is changed at random: it is refused, or it computes something."""
    extension.module.use_few_tokens(data.draw(st.sampled_from((0, -1))))
    form, kind = data.draw(st.sampled_from((0, 1, 2))), data.draw(st.sampled_from((0, 1, 2, 3)))
    dtype = data.draw(st.sampled_from(op.DTYPES))
    layer = Layer(form, 9, 12, 5, dtype, kind, s=form == 1, seed=data.draw(st.integers(0, 9)))
    tensors, spec = list(layer.tensors), list(layer.spec)
    x = inputs(dtype, 2, 9)
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.sampled_from(("number", "drop number", "add number", "drop", "swap", "slice", "cast", "x")))
        at = data.draw(st.integers(0, len(tensors) - 1)) if tensors else 0
        place = data.draw(st.integers(0, len(spec) - 1)) if spec else 0
        if what == "number" and spec:
            spec[place] = data.draw(st.one_of(st.integers(-2, 130), st.sampled_from((2**62, -(2**62), 2**40 + 1))))
        elif what == "drop number" and spec:
            del spec[place]
        elif what == "add number":
            spec.insert(place, data.draw(st.integers(-1, 64)))
        elif what == "drop" and tensors:
            del tensors[at]
        elif what == "swap" and tensors:
            other = data.draw(st.integers(0, len(tensors) - 1))
            tensors[at], tensors[other] = tensors[other], tensors[at]
        elif what == "slice" and tensors and tensors[at].numel():
            tensors[at] = tensors[at][data.draw(st.integers(0, 1)) :].t()[data.draw(st.integers(0, 1)) :].t() \
                if tensors[at].dim() == 2 else tensors[at][1:]  # fmt: skip
        elif what == "cast" and tensors:
            to = data.draw(st.sampled_from((torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16)))
            tensors[at] = tensors[at].to(to)
        elif what == "x":
            x = inputs(dtype, 2, 9)
            x = data.draw(st.sampled_from((x[:, :-1], x[0, 0], x[:0], x.t(), x.to(torch.int64), x.double())))
    try:
        y = torch.ops.acip.fused_linear(x, tensors, spec, data.draw(st.integers(-1, 3)))
    except RuntimeError:
        return
    finally:
        extension.module.use_few_tokens()
    assert y.shape[:-1] == x.shape[:-1]


# ---- as the backend of the public operators, and to the compiler


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
def test_the_public_operators_take_it(isa, dtype):
    for tokens in (1, 4, 150):  # 150: torch's products
        problem = operators.make_problem((tokens,), 30, 20, 9, dtype)
        y = lowrank_linear(problem.x, problem.Vh, problem.U, problem.s, problem.bias, backend="native")
        wide = [t.double() for t in (problem.x, problem.Vh, problem.U, problem.s, problem.bias)]
        assert_within(operators.bounds(problem, problem.s)["y"], y, lowrank_linear(*wide), "y")
        layer = Layer(op.PIVOTED, 30, 20, 9, dtype)
        P, C, place, bias = layer.tensors
        inverse = place.long().argsort()
        y = pivot_linear(problem.x, P, C, inverse, bias, backend="native")
        want = pivot_linear(*(t.double() for t in (problem.x, P, C)), inverse, bias.double())
        assert_within(bound(layer, problem.x, dtype), y, want, "pivoted")
    with pytest.raises(RuntimeError, match="float32, torch.bfloat16, torch.float16"):
        lowrank_linear(*wide, backend="native")


def test_compiler_flops_and_fake_tensors():
    layers = [Layer(op.FACTORS, 12, 20, 5, torch.float32), Layer(op.PIVOTED, 12, 9, 4, torch.float32, op.INT4)]
    x = inputs(torch.float32, 3, 12)
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    spec = [number for layer in layers for number in layer.spec]
    want = fused(x, layers)
    compiled = torch.compile(lambda x: torch.ops.acip.fused_linear(x, tensors, spec, 0) * 2, fullgraph=True)
    assert torch.equal(compiled(x), want * 2)
    torch.library.opcheck(
        torch.ops.acip.fused_linear.default, (x, tensors, spec, 0), test_utils=("test_schema", "test_faketensor")
    )
    with FlopCounterMode(display=False) as counter:
        fused(x, layers)
    assert counter.get_total_flops() == 2 * 3 * (5 * 12 + 20 * 5 + 4 * 12 + 5 * 4)
    mlp = [
        Layer(op.DENSE, 8, 10, 0, torch.float32),
        Layer(op.DENSE, 8, 10, 0, torch.float32),
        Layer(op.DENSE, 10, 8, 0, torch.float32),
    ]
    meta = [tensor.to("meta") for layer in mlp for tensor in layer.tensors]
    shape = op._fake(torch.empty(2, 8, device="meta"), meta, [n for layer in mlp for n in layer.spec], op.GATED_MLP)
    assert shape.shape == (2, 8)
