"""The Triton kernels of deployed layers against float64, in Triton's interpreter where there is no GPU."""

import dataclasses
import functools
import itertools

import deployed
import pytest
import torch
from deployed import MLP_FORMS, TRITON_KINDS, Layer, arguments, check_gated_mlp, exact, inputs
from operators import assert_within
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from acip_kernels.nn import QuantizedLinear
from acip_kernels.ops import lowrank_linear, plain_weight, triton_products
from acip_kernels.ops import quantize as q
from acip_kernels.ops.fused_linear import op, prefill, triton
from acip_kernels.ops.pivot_linear.op import pivot_linear
from acip_kernels.plan import DEVICES, DecodeConfig, decode_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter cuts bfloat16 off where a GPU rounds it: twice the error.
ROUNDINGS = 3 if DEVICE.type == "cuda" else 6
bounds = functools.partial(deployed.bounds, roundings=ROUNDINGS)
SMALL = DecodeConfig(rows=16, k=64, splits=2, warps=4)
SHAPES = [(1, 1, 1), (33, 65, 17), (130, 37, 33), (200, 150, 97)]


def fused(x, layers, mode=op.CONCATENATE, config=None):
    tensors, spec = arguments(layers)
    return triton.forward(x.to(DEVICE), [t.to(DEVICE) for t in tensors], spec, mode, config).cpu()


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("kind", TRITON_KINDS)
@pytest.mark.parametrize("form", [op.DENSE, op.FACTORS, op.PIVOTED], ids=["dense", "factors", "pivoted"])
def test_every_form_and_number_against_float64(form, kind, dtype):
    for number, (in_, out, rank) in enumerate(SHAPES):
        layer = Layer(
            form, in_, out, rank, dtype, TRITON_KINDS[kind], s=form == op.FACTORS and number % 2 == 0,
            bias=number % 3 != 1, group=(32, 64, 128)[number % 3], seed=number,
        )  # fmt: skip
        for tokens in (1, 5):
            x = inputs(dtype, tokens, in_)
            y = fused(x, [layer], config=SMALL)
            assert y.dtype == dtype
            assert_within(bounds([layer], x, dtype), y, exact(x, [layer]), f"{in_} → {rank} → {out}, {tokens} tokens")


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", [op.INT4, op.INT4_ZEROS], ids=["int4", "int4 with zeros"])
def test_four_bits_of_one_token_in_tiles_of_many_blocks(kind, group):
    """330 and 97 columns: the last tile, and its last block, are not full."""
    for form, (rows, k, splits) in itertools.product(
        (op.DENSE, op.FACTORS, op.PIVOTED), ((32, 128, 2), (16, 256, 1), (16, 512, 1))
    ):
        layer = Layer(form, 330, 190, 97, torch.bfloat16, kind, group=group, s=form == op.FACTORS)
        x = inputs(torch.bfloat16, 1, 330)
        y = fused(x, [layer], config=DecodeConfig(rows, k, splits, warps=2))
        assert_within(bounds([layer], x, torch.bfloat16), y, exact(x, [layer]))


@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
def test_siblings_of_mixed_forms_and_unequal_ranks(dtype, tokens):
    layers = [
        Layer(op.FACTORS, 70, 90, 33, dtype, seed=1, s=True),
        Layer(op.PIVOTED, 70, 20, 1, dtype, op.INT4_ZEROS, seed=3),
        Layer(op.DENSE, 70, 20, 0, dtype, op.INT8 if tokens > 1 else op.FP8, seed=2, bias=False),
    ]
    x = inputs(dtype, tokens, 70)
    for count, order in ((2, (2, 0, 1)), (3, (0, 1, 2)), (3, (1, 2, 0))):
        some = [layers[i] for i in order[:count]]
        y = fused(x, some, config=SMALL)
        assert_within(bounds(some, x, dtype), y, exact(x, some))
        alone = torch.cat([fused(x, [layer], config=SMALL) for layer in some], -1)
        assert torch.equal(y, alone)  # to the bit: a row's sum is the same in any company


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forms", MLP_FORMS)
def test_gated_mlp_and_swiglu(forms, dtype, tokens):
    check_gated_mlp(lambda *arguments: fused(*arguments, SMALL), forms, dtype, tokens, ROUNDINGS)


@pytest.mark.parametrize("tokens", [1, 3])
def test_eight_bit_floats_are_the_same_with_and_without_instructions_for_them(tokens):
    layers = [Layer(form, 130, 90, 40, torch.bfloat16, op.FP8) for form in (op.DENSE, op.FACTORS)]
    tensors, spec = arguments(layers)
    x = inputs(torch.bfloat16, tokens, 130)
    arguments_ = x.to(DEVICE), [t.to(DEVICE) for t in tensors], spec, op.CONCATENATE, SMALL
    by_bits = triton.forward(*arguments_, device=DEVICES["A100"])
    assert not DEVICES["A100"].fp8 and not DEVICES["MI300X"].fp8 and DEVICES["H100"].fp8 and DEVICES["L40S"].fp8
    if DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9):
        assert torch.equal(triton.forward(*arguments_, device=DEVICES["H100"]), by_bits)
    assert_within(bounds(layers, x, torch.bfloat16), by_bits.cpu(), exact(x, layers))


@pytest.mark.parametrize("device", ["H100", "A100"])
def test_every_eight_bit_float(device):
    """One weight a column, and inputs that pick it: all codes, exactly."""
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn)
    if DEVICE.type == "cuda" and DEVICES[device].fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no instructions for them")
    tensors = [values[None].to(DEVICE), torch.ones(1, device=DEVICE)]
    rows = [
        triton.forward(
            torch.eye(254)[i : i + 16].to(DEVICE), tensors, [op.DENSE, 0, op.FP8, 254, 0], 0, device=DEVICES[device]
        )
        for i in range(0, 254, 16)
    ]
    assert torch.equal(torch.cat(rows)[:, 0].cpu(), values.float())


# ---- more tokens


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("kind", TRITON_KINDS)
@pytest.mark.parametrize("form", [op.DENSE, op.FACTORS, op.PIVOTED], ids=["dense", "factors", "pivoted"])
def test_many_tokens_by_either_way_against_float64(form, kind, dtype):
    for number, (in_, out, rank) in enumerate(((33, 65, 17), (130, 90, 70))):
        layer = Layer(
            form, in_, out, rank, dtype, TRITON_KINDS[kind], s=form == op.FACTORS and number == 0, bias=number == 0,
            group=(32, 64)[number], seed=number,
        )  # fmt: skip
        x = inputs(dtype, 17 + 30 * number, in_)
        tensors, spec = arguments([layer])
        for way in ("ours", "vendor"):
            y = prefill.forward(x.to(DEVICE), [t.to(DEVICE) for t in tensors], spec, op.CONCATENATE, way)
            # Both weights are rounded too, and where the interpreter cuts off, twice as far.
            limits = deployed.bounds([layer], x, dtype, roundings=ROUNDINGS + 2 * (ROUNDINGS // 3))
            assert_within(limits, y.cpu(), exact(x, [layer]), f"{in_} → {rank} → {out}, {way}")


@pytest.mark.parametrize("forms", MLP_FORMS)
def test_many_tokens_of_siblings_and_a_gated_mlp(forms):
    dtype = torch.float32
    for way in ("ours", "vendor"):

        def many(x, layers, mode, way=way):
            tensors, spec = arguments(layers)
            return prefill.forward(x.to(DEVICE), [t.to(DEVICE) for t in tensors], spec, mode, way).cpu()

        check_gated_mlp(many, forms, dtype, 20, ROUNDINGS + 2)
        layers = [Layer(form, 70, 40, 20, dtype, seed=form, bias=form > 0) for form in forms]
        x = inputs(dtype, 18, 70)
        y = many(x.view(2, 9, 70), layers, op.CONCATENATE).view(18, -1)
        assert_within(bounds(layers, x, dtype), y, exact(x, layers), way)


@pytest.mark.parametrize("way", ["ours", "vendor"])
def test_many_tokens_need_no_clearing_and_reruns_are_identical(way):
    layer = Layer(op.PIVOTED, 100, 70, 30, torch.bfloat16, op.INT4_ZEROS)
    tensors, spec = arguments([layer])
    x, tensors = inputs(torch.bfloat16, 40, 100).to(DEVICE), [t.to(DEVICE) for t in tensors]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (prefill.forward(x, tensors, spec, op.CONCATENATE, way) for _ in range(2))
        assert torch.isfinite(first).all() and torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- passes beside torch's products


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("kind", [name for name in TRITON_KINDS if name != "plain"])
def test_a_whole_weight_becomes_plain_in_one_pass_to_the_bit(kind, dtype, monkeypatch):
    """Of every code, of scales down to where results are subnormal; of shapes of less than a tile, and of several."""
    for number, (rows, cols) in enumerate(((1, 1), (9, 64), (33, 65), (3, 31), (2, 1030), (5, 1536), (13, 96))):
        generator, group = torch.Generator().manual_seed(number), (32, 64, 128)[number % 3]
        codes, scales, *zeros = deployed.Matrix(generator, rows, cols, TRITON_KINDS[kind], dtype, group).tensors
        # Powers of two that keep the largest finite in float16, and make some of every dtype's results subnormal; but
        # for bfloat16's, of which the interpreter makes other numbers, as it does of scales that are.
        least = -24 if dtype == torch.float16 else -130 if DEVICE.type == "cuda" else -100
        exponents = torch.randint(least, 8, scales.shape, generator=generator)
        signs = torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
        scales = (scales * signs * 2.0**exponents).to(scales.dtype)
        quantized = q.Quantized(codes, scales, *(zeros or [None]))
        want = q.dequantize(*quantized, cols=cols, group=group, dtype=dtype)
        on = q.Quantized(*(t if t is None else t.to(DEVICE) for t in quantized))
        weight = triton_products.matrix(on, cols, group)
        made = triton_products.dequantize(weight, dtype)
        assert made.dtype == dtype and made.is_contiguous() and torch.equal(bits(made.cpu()), bits(want))
        # Rows that are part of longer ones.
        wide = torch.cat([weight.data.view(torch.uint8)] * 2, 1).view(codes.dtype)
        weight.data = wide[:, : codes.shape[1]]
        assert torch.equal(bits(triton_products.dequantize(weight, dtype).cpu()), bits(want))
        if weight.kind == op.FP8:
            monkeypatch.setattr(triton_products, "_device", lambda _: DEVICES["A100"])
            assert torch.equal(bits(triton_products.dequantize(weight, dtype).cpu()), bits(want))
            monkeypatch.undo()


def bits(values):
    """As integers: a zero's sign counts, and nothing is equal that is not the same."""
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def test_weights_without_rows_or_columns():
    for rows, cols, scheme in itertools.product((0, 3), (0, 5), (q.Scheme("int8"), q.Scheme("int4"))):
        if not rows * cols:
            tensors = {
                name: torch.zeros(shape, dtype=dtype, device=DEVICE)
                for name, (shape, dtype) in q.shapes(rows, cols, **scheme.options).items()
            }
            weight = q.Quantized(tensors["qweight"], tensors["scales"], tensors.get("zeros"))
            made = triton_products.dequantize(triton_products.matrix(weight, cols, scheme.group), torch.bfloat16)
            assert made.shape == (rows, cols)


@pytest.mark.parametrize("scheme", [q.Scheme("int8"), q.Scheme("fp8"), q.Scheme("int4"), q.Scheme("int4", 32, True)])
def test_a_quantized_layer_makes_its_weight_in_one_pass(scheme, monkeypatch):
    """As on a GPU; not of a tensor without memory, nor where torch's compiler traces."""
    layer = QuantizedLinear.from_linear(torch.nn.Linear(70, 30), **scheme.options).to(DEVICE)
    want, made = q.dequantize(*tensors_of(layer), cols=70, group=scheme.group), []

    def dequantize(*arguments):
        made.append(arguments)
        return original(*arguments)

    original = triton_products.dequantize
    monkeypatch.setattr(triton_products, "dequantize", dequantize)
    assert torch.equal(layer.dequantize(), want) and len(made) == (DEVICE.type == "cuda")
    made.clear()
    if DEVICE.type == "cpu":
        monkeypatch.setattr(plain_weight, "_is_gpu", lambda tensor: True)
    assert torch.equal(layer.dequantize(), want) and len(made) == 1
    assert layer.dequantize(torch.float64).dtype == torch.float64 and len(made) == 1
    compiled = torch.compile(lambda: layer.dequantize(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(), want) and len(made) == 1
    with FakeTensorMode() as mode:
        fake = [tensor if tensor is None else mode.from_tensor(tensor) for tensor in tensors_of(layer)]
        weight = plain_weight.plain_weight(*fake, cols=70, group=scheme.group or 64, dtype=torch.float32)
    assert weight.shape == (30, 70) and len(made) == 1


def tensors_of(layer):
    return layer.qweight, layer.scales, layer.zeros


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_are_gathered_and_their_bias_is_added_to_the_bit(bias, dtype):
    for tokens, columns in ((1, 1), (8, 512), (9, 700), (17, 1030)):
        generator = torch.Generator().manual_seed(tokens)
        z = torch.randn(tokens, columns, generator=generator).to(dtype)
        b = torch.randn(columns, generator=generator).to(dtype) if bias else None
        for place in (torch.randperm(columns, generator=generator), torch.arange(columns)):
            inverse = triton_products.invert(place.to(DEVICE, torch.int32))
            assert inverse.dtype == torch.int32 and torch.equal(inverse.long().cpu(), place.argsort())
            assert torch.equal(triton_products.invert(place.to(DEVICE)), inverse)
            want = torch.empty_like(z)
            want[:, place] = z
            want = want if b is None else want + b
            # A part of longer rows, as of siblings side by side.
            whole = torch.full((tokens, columns + 6), 7.0, dtype=dtype, device=DEVICE)
            y = whole[:, 3 : columns + 3]
            triton_products.gather(z.to(DEVICE), inverse, None if b is None else b.to(DEVICE), y)
            assert torch.equal(y.cpu(), want)
            assert (whole[:, :3] == 7).all() and (whole[:, columns + 3 :] == 7).all()


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_config_changes_no_more_than_rounding(tokens):
    dtype = torch.float32
    layers = [Layer(op.FACTORS, 300, 70, 90, dtype, seed=1), Layer(op.FACTORS, 300, 40, 20, dtype, op.INT8, seed=2)]
    x = inputs(dtype, tokens, 300)
    want, limits = exact(x, layers), bounds(layers, x, dtype)
    rows = (16, 32) if tokens > 1 else (4, 16)
    for r, k, splits in itertools.product(rows, (64, 128), (1, 2, 4)):
        config = DecodeConfig(rows=r, k=k, splits=splits, warps=2)
        assert_within(limits, fused(x, layers, config=config), want, str(config))
    assert_within(limits, fused(x, layers), want, "what plan chooses")


def test_scratch_need_not_be_cleared_and_reruns_are_identical():
    layers = [Layer(op.FACTORS, 200, 50, 33, torch.bfloat16), Layer(op.PIVOTED, 200, 50, 20, torch.bfloat16, seed=5)]
    x = inputs(torch.bfloat16, 3, 200)
    y = fused(x, layers, config=SMALL)
    # Fills what `torch.empty` makes with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        for config in (SMALL, dataclasses.replace(SMALL, splits=4)):
            assert torch.isfinite(fused(x, layers, config=config)).all()
        assert torch.equal(fused(x, layers, config=SMALL), y)
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_of_other_layouts_and_none():
    layer = Layer(op.FACTORS, 40, 30, 8, torch.float32)
    x = inputs(torch.float32, 6, 80)
    y = fused(x[::2, ::2], [layer], config=SMALL)
    assert_within(bounds([layer], x[::2, ::2], torch.float32), y, exact(x[::2, ::2], [layer]))
    assert fused(x[:2, :40].view(2, 1, 40), [layer], config=SMALL).shape == (2, 1, 30)
    assert fused(x[:0, :40], [layer], config=SMALL).shape == (0, 30)
    all_pivots = Layer(op.PIVOTED, 40, 8, 8, torch.float32)
    assert_within(
        bounds([all_pivots], x[:1, :40], torch.float32),
        fused(x[:1, :40], [all_pivots]),
        exact(x[:1, :40], [all_pivots]),
    )


def test_what_the_kernels_do_not_take():
    layer = Layer(op.FACTORS, 40, 30, 8, torch.float32)
    with pytest.raises(ValueError, match="up to 16 tokens, got 17"):
        fused(inputs(torch.float32, 17, 40), [layer])
    with pytest.raises(ValueError, match="float32, bfloat16 and float16"):
        fused(inputs(torch.float64, 1, 40), [layer])
    with pytest.raises(ValueError, match="up to 3 siblings"):
        fused(inputs(torch.float32, 1, 40), [layer] * 4)


def test_plan_chooses_for_every_device():
    """A legal config for every shape, that differs where it should."""
    llama = [(1024, 4096, op.PLAIN, 0)], [(4096, 1024, op.PLAIN, 0)], [(128, 4096, op.INT8, 0)] * 3
    for device, weights, tokens in itertools.product(DEVICES.values(), llama, (1, 16)):
        for split in (False, True):
            config = decode_config(device, tokens, weights, split=split)
            assert config.pdl == (device.pdl_gap is not None)
            assert split or config.splits == 1


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_the_operators_take_it_by_name(tokens):
    """`backend="triton"`: forward here, every gradient by the reference, torch's products for many tokens."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()

    x, Vh, U, s, bias = numbers(tokens, 40), numbers(9, 40), numbers(30, 9), numbers(9), numbers(30)
    outputs = [lowrank_linear(x, Vh, U, s, bias, backend=name) for name in ("triton", "reference")]
    torch.testing.assert_close(*outputs)
    g = torch.randn(tokens, 30, generator=generator).to(DEVICE)
    gradients = [torch.autograd.grad(y, (x, Vh, U, s, bias), g) for y in outputs]
    # To the bit: whoever made the output, the gradients are the reference's.
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(*gradients))
    inverse = torch.randperm(30, generator=generator).to(DEVICE)
    C = numbers(21, 9)
    with torch.no_grad():
        outputs = [pivot_linear(x, Vh, C, inverse, bias, backend=name) for name in ("triton", "reference")]
        torch.testing.assert_close(*outputs)
    y = pivot_linear(x, Vh, C, inverse, bias, backend="triton")
    assert all(g is not None for g in torch.autograd.grad(y.sum(), (x, Vh, C, bias)))


def test_torchs_checks_of_the_operator():
    generator = torch.Generator().manual_seed(0)
    x, Vh, U = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((2, 20), (5, 20), (12, 5)))
    torch.library.opcheck(
        torch.ops.acip.lowrank_linear, (x.requires_grad_(), Vh, U, None, None, "triton"), raise_exception=True
    )


def test_torchs_compiler_traces_it():
    x, Vh, U = (torch.randn(*shape).to(DEVICE) for shape in ((2, 20), (5, 20), (12, 5)))
    compiled = torch.compile(
        lambda x: lowrank_linear(x, Vh, U, backend="triton") * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), lowrank_linear(x, Vh, U, backend="reference") * 2)


def test_without_a_gpu_it_runs_in_the_interpreter_alone(monkeypatch):
    if DEVICE.type == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x = torch.randn(1, 20)
    with pytest.raises(RuntimeError, match="on a GPU"):
        lowrank_linear(x, torch.randn(5, 20), torch.randn(12, 5), backend="triton")
    assert lowrank_linear(x, torch.randn(5, 20), torch.randn(12, 5)).shape == (1, 12)
