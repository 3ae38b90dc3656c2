"""Quantized weights: the format, how codes are chosen, the layer, and models of such layers from cut to file."""

import copy
import io
import itertools
import json

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toys import logits
from transformers import AutoModelForCausalLM

import acip_kernels
from acip_kernels import CompressionResult, LowRankLinear, PivotLinear, evaluate, load, materialize, save
from acip_kernels.compress.basis import whitened_svd
from acip_kernels.compress.config import FORMS
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.compress.quantized import quantized_tensors, remembered_covariance, rounding_metric
from acip_kernels.compress.sizing import Sizing
from acip_kernels.models.targets import linear_layers, weight_of
from acip_kernels.nn.quantized_linear import QuantizedLinear
from acip_kernels.ops import quantize as q
from acip_kernels.ops.quantize import Scheme

SCHEMES = [
    Scheme("int8"),
    Scheme("fp8"),
    *(Scheme("int4", group, symmetric) for group in q.GROUPS for symmetric in (False, True)),
]
COLUMNS = (0, 1, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200)


def weight_of_shape(rows, cols, seed=0, dtype=torch.float32):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decoded(quantized, cols, scheme, dtype=torch.float64):
    return q.dequantize(*quantized, cols=cols, group=scheme.group, dtype=dtype)


def steps_of(quantized, cols, scheme):
    """The scale of every number, float64 `[rows, cols]`."""
    if scheme.kind == "int8":
        return quantized.scales.double()[:, None].expand(-1, cols)
    if scheme.kind == "fp8":  # three bits after the point; from 2^-6 down as far apart as there
        exponents = torch.frexp(quantized.qweight.double().abs()).exponent - 1
        return torch.exp2(exponents.clamp_min(-6) - 3.0) * quantized.scales.double()[:, None]
    return quantized.scales.double().abs().repeat_interleave(scheme.group, 1)[:, :cols]


# ---- the format


@given(st.integers(0, 4), st.integers(0, 200), st.integers(0, 2**31 - 1), st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_codes_come_back(rows, cols, seed, padding):
    codes = torch.randint(0, 16, (rows, cols), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = q.pack(codes, padding)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-cols // 64) * 32)
    assert torch.equal(q.unpack(packed, cols), codes)
    whole = q.unpack(packed, -(-cols // 64) * 64)
    assert bool((whole[:, cols:] == padding).all())


def test_the_place_of_every_code():
    codes = torch.randint(0, 16, (3, 150), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = q.pack(codes, torch.tensor([1, 2, 3], dtype=torch.uint8))
    for row, block, j in itertools.product(range(3), range(3), range(32)):
        byte = int(packed[row, 32 * block + j])
        for column, code in ((64 * block + j, byte & 15), (64 * block + 32 + j, byte >> 4)):
            assert code == (int(codes[row, column]) if column < 150 else row + 1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
def test_shapes_bytes_and_elements(scheme, cols):
    for rows in (0, 1, 5):
        quantized = q.quantize(weight_of_shape(rows, cols), **scheme.options)
        tensors = {name: tensor for name, tensor in quantized._asdict().items() if tensor is not None}
        described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        assert described == q.shapes(rows, cols, **scheme.options)
        assert q.stored_bytes(rows, cols, **scheme.options) == sum(tensor.nbytes for tensor in tensors.values())
        assert q.stored_elements(rows, cols, **scheme.options) == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantize_against_a_loop(scheme):
    rows, cols = 3, 150
    quantized = q.quantize(weight_of_shape(rows, cols), **scheme.options)
    weight = decoded(quantized, cols, scheme)
    for row, column in itertools.product(range(rows), range(cols)):
        if scheme.kind in q.PER_ROW:
            expected = float(quantized.qweight[row, column]) * float(quantized.scales[row])
        else:
            byte = int(quantized.qweight[row, column // 64 * 32 + column % 32])
            code = byte >> 4 if column % 64 >= 32 else byte & 15
            zero = 8 if scheme.symmetric else int(quantized.zeros[row, column // scheme.group])
            expected = (code - zero) * float(quantized.scales[row, column // scheme.group])
        assert float(weight[row, column]) == expected  # in float64, exact
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = decoded(quantized, cols, scheme, dtype)
        # Rounded once; of one scale a row the product in float32 before that.
        once = weight.to(dtype) if scheme.kind == "int4" or dtype == torch.float32 else weight.float().to(dtype)
        assert narrow.dtype == dtype and torch.equal(narrow, once)


# ---- rounding


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_no_error_is_above_half_a_step(scheme, dtype, shift):
    for cols in COLUMNS[1:]:
        weight = (weight_of_shape(7, cols, seed=cols) + shift).to(dtype)
        weight[1], weight[2], weight[3] = 0, 1e-38, weight[3] * 1e30
        quantized = q.quantize(weight, **scheme.options)
        error = (decoded(quantized, cols, scheme) - weight.double()).abs()
        # A quotient just below a tie may be rounded to it.
        assert bool((error <= (0.5 + 2**-17) * steps_of(quantized, cols, scheme)).all())
        assert not decoded(quantized, cols, scheme)[1].any()
        # The least scale that reaches both ends: no finer one of the dtype would.
        ends = weight.double().abs().amax(1)
        reach = {"int8": 127, "fp8": 448, "int4": 7 if scheme.symmetric else 7.5}[scheme.kind]
        scales = quantized.scales[:, None] if scheme.kind == "fp8" else steps_of(quantized, cols, scheme)
        assert bool((scales <= (ends / reach * (1 + 2**-7))[:, None] * 2 + 1e-40).all())


def test_a_symmetric_scale_takes_the_sign_that_is_cheaper():
    weight = torch.zeros(2, 32)
    weight[0, :2], weight[1, :2] = torch.tensor([8.0, -7.0]), torch.tensor([7.0, -8.0])
    quantized = q.quantize(weight, "int4", 32, True)
    assert quantized.scales.flatten().tolist() == [-1, 1] and quantized.zeros is None
    assert torch.equal(q.dequantize(*quantized, cols=32, group=32), weight)


def test_zero_is_exact():
    weight = weight_of_shape(20, 96) + 5
    weight[:, 3] = 0
    for scheme in SCHEMES:
        assert not decoded(q.quantize(weight, **scheme.options), 96, scheme)[:, 3].any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_searched_scale_is_never_worse(scheme):
    weight = weight_of_shape(16, 200)
    plain, searched = (q.quantize(weight, **scheme.options, search=search) for search in (False, True))
    errors = [(decoded(one, 200, scheme) - weight.double()).square() for one in (plain, searched)]
    group = scheme.group or 200
    for begin in range(0, 200, group):
        before, after = (error[:, begin : begin + group].sum(1) for error in errors)
        assert bool((after <= before * (1 + 1e-5)).all())
    if scheme.kind == "int4":
        assert float(errors[1].sum()) < 0.97 * float(errors[0].sum())


def correlated(cols, seed=0):
    """Inputs' second moment as those of real layers are: a spectrum over two decades, in a basis of its own."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(cols, cols, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(0, -2, cols, dtype=torch.float64)) @ basis.t()


def output_error(error, covariance):
    return float(((error @ covariance) * error).sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("cols", [100, 160, 300])
def test_feedback_beats_rounding_to_nearest_in_the_outputs(scheme, cols):
    weight, covariance = weight_of_shape(48, cols), correlated(cols)
    plain = decoded(q.quantize(weight, **scheme.options), cols, scheme) - weight.double()
    fed = decoded(q.quantize(weight, **scheme.options, covariance=covariance), cols, scheme) - weight.double()
    assert output_error(fed, covariance) < 0.6 * output_error(plain, covariance)


def test_a_covariance_of_any_rank_and_scale():
    weight = weight_of_shape(8, 96)
    expected = q.quantize(weight, "int4", search=True)
    for one, other in zip(q.quantize(weight, "int4", covariance=torch.zeros(96, 96)), expected):
        assert torch.equal(one, other)  # nothing is known of the inputs
    x = weight_of_shape(5, 96, seed=1).double()
    errors = []
    for scale in (1.0, 1e-12, 1e12):
        quantized = q.quantize(weight, "int4", covariance=scale * x.t() @ x)
        errors.append(output_error(q.dequantize(*quantized, cols=96) - weight, x.float().t() @ x.float()))
    assert errors[1:] == pytest.approx(errors[:1] * 2, rel=0.2)  # the same, but for the last bits


@pytest.mark.parametrize("form", ["factors", "pivoted"])
@pytest.mark.parametrize("kind", q.KINDS)
def test_factors_know_of_each_others_errors(form, kind):
    """The second factor is fitted to the first as it is rounded: less error in the outputs than each by itself."""
    left, right = weight_of_shape(96, 40).double(), weight_of_shape(40, 120, seed=1).double()
    covariance, scheme = correlated(120), Scheme(kind)
    errors = []
    for metric in (None, covariance):
        tensors = quantized_tensors(left, right, form, scheme, metric)
        names, columns = {"factors": ("Vh.", "U."), "pivoted": ("P.", "C.")}[form], (120, 40)
        first, second = (
            decoded(q.Quantized(*(tensors.get(name + key) for key in q.Quantized._fields)), cols, scheme)
            for name, cols in zip(names, columns, strict=True)
        )
        product = second @ first
        if form == "pivoted":
            pivots = acip_kernels.nn.pivot_linear.unpack_bits(tensors["is_pivot"], 96)
            whole = torch.empty(96, 120, dtype=torch.float64)
            whole[pivots], whole[~pivots] = first, product
            product = whole
        errors.append(output_error(product - left @ right, covariance) / output_error(left @ right, covariance))
    assert errors[1] < 0.6 * errors[0]


def test_bad_arguments_are_named():
    good = torch.ones(2, 3)
    for arguments, error, message in (
        ((good, "int2"), ValueError, "one of int8, int4, fp8, got 'int2'"),
        ((good, "int4", 16), ValueError, "one of 32, 64, 128, got 16"),
        ((good, "int4", 64.0), ValueError, "got 64.0"),
        ((good, "int4", 64, 1), ValueError, "symmetric must be True or False, got 1"),
        ((good[0], "int8"), ValueError, r"must be \[rows, cols\], got \[3\]"),
        ((good.int(), "int8"), TypeError, "must be floating, got torch.int32"),
        ((good * float("nan"), "int8"), ValueError, "holds NaN"),
        ((good / 0, "int4"), ValueError, "holds NaN or infinite"),
        ((good.double() * 1e300, "int4"), ValueError, "too large for torch.bfloat16"),
        ((good.double() * 1e300, "int8"), ValueError, "too large for torch.float32"),
    ):
        with pytest.raises(error, match=message):
            q.quantize(*arguments)
    with pytest.raises(ValueError, match=r"covariance must be \[3, 3\], got \[2, 2\]"):
        q.quantize(good, "int8", covariance=torch.eye(2))
    with pytest.raises(ValueError, match="covariance holds NaN"):
        q.quantize(good, "int8", covariance=torch.eye(3) * float("nan"))
    with pytest.raises(ValueError, match="needs cols"):
        q.dequantize(*q.quantize(good, "int4"))


# ---- the layer


def layer_of(scheme, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear = torch.nn.Linear(100, 24, bias).to(dtype)
    options = {} if scheme.kind in q.PER_ROW else {"group": scheme.group, "symmetric": scheme.symmetric}
    return QuantizedLinear.from_linear(linear, scheme.kind, **options), linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_layer_is_the_linear_one_of_its_weight(scheme, bias):
    layer, linear = layer_of(scheme, bias)
    x = torch.randn(2, 3, 100, requires_grad=True)
    weight = layer.dequantize()
    assert weight.shape == (24, 100) and weight.dtype == torch.float32
    y = layer(x)
    # Another order of sums at the most.
    bound = 100 * torch.finfo(torch.float32).eps * float((x.detach().abs() @ weight.abs().t()).max())
    expected = torch.nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=bound)
    g = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(gradient, g @ weight, rtol=0, atol=bound)
    assert {name for name, _ in layer.named_parameters()} == ({"bias"} if bias else set())
    assert (layer.in_features, layer.out_features, layer.bits) == (100, 24, scheme.to_dict()["bits"])
    assert (layer.group, layer.symmetric, layer.kind) == (scheme.group, scheme.symmetric, scheme.kind)
    assert scheme.kind in repr(layer)


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=str)
def test_codes_and_scales_keep_their_dtypes(scheme):
    layer, _ = layer_of(scheme)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for cast in (torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to(torch.bfloat16), torch.nn.Module.float):
        other = cast(copy.deepcopy(layer))
        for name in {"qweight", "scales", "zeros"} & before.keys():
            assert other.state_dict()[name].dtype == before[name].dtype
            assert torch.equal(other.state_dict()[name], before[name])
        assert other.bias.dtype == other.weight.dtype
        x = torch.randn(4, 100).to(other.weight.dtype)
        assert other(x).dtype == x.dtype
    assert all(tensor.is_meta for tensor in copy.deepcopy(layer).to("meta").state_dict().values())


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=str)
def test_copies_pickles_states_and_exports(scheme):
    layer, _ = layer_of(scheme)
    x = torch.randn(4, 100)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    empty = QuantizedLinear(100, 24, **scheme.options)
    assert not empty(x).any()
    empty.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), empty):
        assert torch.equal(same(x), expected)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


def test_a_layer_refuses_what_does_not_fit():
    quantized = q.quantize(weight_of_shape(6, 100), "int4")
    QuantizedLinear.from_quantized(quantized, 100)
    for tensors, options, message in (
        (quantized, {"in_features": 200}, r"qweight of an int4 weight \[6, 200\] must be torch.uint8 \[6, 128\]"),
        (quantized, {"in_features": 100, "group": 32}, r"scales .* must be torch.bfloat16 \[6, 4\]"),
        (quantized._replace(scales=quantized.scales.float()), {"in_features": 100}, "scales .* got torch.float32"),
        (quantized._replace(zeros=quantized.zeros[:5]), {"in_features": 100}, r"zeros .* got torch.uint8 \[5, 2\]"),
        (quantized, {"in_features": 100, "bias": torch.ones(5)}, r"bias must be \[6\], got \[5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizedLinear.from_quantized(tensors, **options)
    for options in ({"kind": "int3"}, {"kind": "int4", "group": 48}):
        with pytest.raises(ValueError, match="must be one of"):
            QuantizedLinear(4, 4, **options)
    with pytest.raises(ValueError, match="in_features must be an int of at least 0, got -1"):
        QuantizedLinear(-1, 4, kind="int8")


# ---- models


def wide(name, **changes):
    """Wide enough for every form to be the one of the fewest bytes somewhere."""
    sizes = {"n_embd": 160, "n_inner": 224} if name == "gpt2" else {"hidden_size": 160, "intermediate_size": 224}
    sizes |= {} if name == "gpt2" else {"head_dim": 40}
    return toys.MODELS[name](**sizes | {"initializer_range": 0.1} | changes)


@pytest.fixture(scope="module", params=toys.MODELS)
def result(request):
    return toys.toy_result(wide(request.param))


@pytest.fixture(scope="module")
def llama():
    return toys.toy_result(wide("llama"))


CASES = [("int8", 64, False), ("int4", 64, False), ("int4", 32, True), ("fp8", 64, False)]
KEYS = ("quantize", "quantize_group", "quantize_symmetric")


def options_of(case):
    return dict(zip(KEYS, case, strict=True))


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def assert_same_state(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size_ratio", [1.0, 0.8, 0.3])
def test_a_model_from_cut_to_file(result, case, size_ratio, tmp_path):
    options = options_of(case) | {"forms": FORMS}
    model = materialize(result, size_ratio, **options)
    cut = result.cut(size_ratio, scheme=Scheme(*case), forms=FORMS)
    plain = result.cut(size_ratio)
    assert all(torch.equal(live, plain.live[name]) for name, live in cut.live.items())
    assert cut.ratios == plain.ratios
    # Every layer that was factorized, in the form that the cut says, and no other.
    kinds = {"dense": QuantizedLinear, "factors": LowRankLinear, "pivoted": PivotLinear}
    for name, form in cut.forms.items():
        assert type(model.get_submodule(name)) is kinds[form]
    outside = {name for name in layers_of(model) if not any(f"{name}.".startswith(f"{known}.") for known in cut.live)}
    assert not outside
    children = sum(1 if form == "dense" else 2 for form in cut.forms.values())
    assert len(layers_of(model)) == children

    save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == cut.bytes(torch.float32)
    assert sum(tensor.numel() for tensor in load_file(file).values()) == cut.parameters
    assert evaluate.parameter_counts(model)["stored"] == cut.parameters
    assert cut.bytes(torch.float32) < plain.bytes(torch.float32)

    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "model"), load(tmp_path / "model")):
        assert_same_state(loaded, model)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.is_quantized is False
    loaded.save_pretrained(tmp_path / "again")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)
    fields = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert fields["format_version"] == (6 if case[0] == "fp8" else 3)
    assert fields["quantized"]["dense"] == [name for name, form in cut.forms.items() if form == "dense"]
    assert f"{fields['quantized']['bits']} bits" in (tmp_path / "model" / "README.md").read_text()


def test_every_form_occurs(llama):
    """And is the one of the fewest bytes, counted in its tensors."""
    seen = set()
    for case, size_ratio, forms in itertools.product(CASES, (1.0, 0.8, 0.3), (("factors",), ("pivoted", "factors"))):
        cut = llama.cut(size_ratio, scheme=Scheme(*case), forms=forms)
        model = materialize(llama, size_ratio, forms=forms, **options_of(case))
        seen |= {(case[0], form) for form in cut.forms.values()}
        for name, form in cut.forms.items():
            module = model.get_submodule(name)
            stored = sum(tensor.nbytes for tensor in module.state_dict().values())
            rank = int(cut.live[name].sum()) + 2
            out, in_ = module.out_features, module.in_features
            sizes = {"dense": q.stored_bytes(out, in_, *case)}
            sizes["factors"] = q.stored_bytes(rank, in_, *case) + q.stored_bytes(out, rank, *case)
            if "pivoted" in forms and rank < min(out, in_):
                sizes["pivoted"] = q.stored_bytes(rank, in_, *case) + q.stored_bytes(out - rank, rank, *case)
                sizes["pivoted"] += -(-out // 8)
            assert stored == min(sizes.values()) == sizes[form]
    assert seen == set(itertools.product(q.KINDS, ("dense", "factors", "pivoted")))


# Of the weights' norm. Errors of the pivot rows pass through C, and C's own meet rows that are no unit vectors.
@pytest.mark.parametrize(
    ("forms", "bounds"), [(("factors",), (0.02, 0.25, 0.06)), (("pivoted", "factors"), (0.05, 0.5, 0.15))]
)
def test_every_layer_is_near_the_plain_one(result, forms, bounds):
    for size_ratio, (kind, bound) in itertools.product((1.0, 0.5), zip(q.KINDS, bounds, strict=True)):
        plain = materialize(result, size_ratio, forms=forms)
        model = materialize(result, size_ratio, forms=forms, quantize=kind)
        for name in result.scores:
            weight = effective(plain.get_submodule(name))
            assert float((effective(model.get_submodule(name)) - weight).norm()) < bound * float(weight.norm()), name


def test_covariances_lower_the_error(llama):
    """Of the outputs of every layer, whatever its form, for inputs of that covariance."""
    covariances = {name: correlated(layer.in_features) for name, layer in svd_layers(llama.model).items()}
    for forms, size_ratio in ((("factors",), 0.5), (("pivoted",), 0.5), (("dense",), 1.0)):
        plain = materialize(llama, size_ratio, forms=forms)
        options = {"forms": forms, "quantize": "int4"}
        models = [
            materialize(llama, size_ratio, **options, quantize_rounding="nearest"),
            materialize(llama, size_ratio, **options, covariances=covariances),
        ]
        for name, covariance in covariances.items():
            weight = effective(plain.get_submodule(name))
            errors = [output_error(effective(model.get_submodule(name)) - weight, covariance) for model in models]
            assert errors[1] < 0.75 * errors[0], (forms, name)


def test_factors_remember_the_covariance_that_they_were_whitened_by():
    for out, in_ in ((96, 64), (64, 64), (48, 80)):
        weight, covariance = weight_of_shape(out, in_), correlated(in_)
        _, _, Vh = whitened_svd(weight, covariance)
        found = remembered_covariance(Vh)
        torch.testing.assert_close(
            Vh.double() @ found @ Vh.double().t(), torch.eye(len(Vh)).double(), rtol=0, atol=1e-4
        )
        assert float(torch.linalg.eigvalsh(found)[0]) > 0
        if in_ <= out:
            # Damped by 1e-5 of the mean variance when it was made.
            assert float((found - covariance).norm()) < 1e-3 * float(covariance.norm())
            narrow = remembered_covariance(Vh.bfloat16())
            assert float((narrow - covariance).norm()) < 0.05 * float(covariance.norm())
    for shape in ((40, 40), (30, 50)):
        found = remembered_covariance(torch.linalg.qr(weight_of_shape(*shape).t()).Q.t())
        torch.testing.assert_close(found, torch.eye(shape[1]).double(), rtol=0, atol=1e-5)
    dead = torch.eye(4)
    dead[2] = 0
    assert bool(torch.isfinite(remembered_covariance(dead)).all())
    assert torch.equal(remembered_covariance(torch.zeros(3, 4)), torch.eye(4).double())
    with pytest.raises(ValueError, match="Vh holds NaN"):
        remembered_covariance(dead / dead)
    # Without singular values, the rows' scales are those.
    basis = torch.linalg.qr(weight_of_shape(6, 6)).Q
    scaled = torch.arange(1.0, 7)[:, None] * basis
    found = rounding_metric(scaled, torch.ones(6), None, None, "feedback")
    torch.testing.assert_close(found, torch.eye(6).double(), rtol=0, atol=1e-5)


def test_variances_tell_of_inputs_that_a_wide_layer_does_not_see():
    out, in_ = 48, 120
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -1.5, in_, dtype=torch.float64)[torch.randperm(in_, generator=generator)]
    covariance = sizes[:, None] * correlated(in_) * sizes
    weight = weight_of_shape(out, in_)
    _, _, Vh = whitened_svd(weight, covariance)
    without, known = remembered_covariance(Vh), remembered_covariance(Vh, covariance.diagonal())
    torch.testing.assert_close(Vh.double() @ known @ Vh.double().t(), torch.eye(out).double(), rtol=0, atol=1e-4)
    assert float(torch.linalg.eigvalsh(known)[0]) > 0
    assert float((known - covariance).norm()) < 0.5 * float((without - covariance).norm())
    errors = []
    for metric in (without, known, covariance):
        error = decoded(q.quantize(weight, "int4", covariance=metric), in_, Scheme("int4")) - weight.double()
        errors.append(output_error(error, covariance))
    assert errors[2] < errors[1] < 0.8 * errors[0]
    # Of a layer that sees all inputs there is nothing to tell; inputs that never came are as good as any.
    square = whitened_svd(weight_of_shape(60, 60), correlated(60))[2]
    assert torch.equal(remembered_covariance(square, torch.rand(60)), remembered_covariance(square))
    assert torch.equal(remembered_covariance(Vh, torch.zeros(in_)), without)
    some = covariance.diagonal() * (torch.arange(in_) % 2)
    assert bool(torch.isfinite(remembered_covariance(Vh, some)).all())


def test_columns_of_the_largest_variance_are_rounded_first_group_by_group():
    variances = torch.tensor([1.0, 5, 2, 9, 9, 1, 3.0])
    order = q._order(variances, 3)
    assert {number: columns.tolist() for number, columns in order.items()} == {1: [3, 4, 5], 0: [1, 2, 0], 2: [6]}
    assert list(order) == [1, 0, 2]


def test_what_is_remembered_lowers_the_error():
    """As much as the covariance itself does."""
    model, layers = wide("llama"), {}
    for name, layer in linear_layers(model)[0].items():
        layers[name] = correlated(layer.in_features, seed=len(layers))
    acip_kernels.factorize(model, adapter_rank=0, covariances=layers)
    acip_kernels.score_by_singular_values(model)
    plain = materialize(model, 0.6, forms=FORMS)
    known = {"nearest": {"quantize_rounding": "nearest"}, "remembered": {}, "given": {"covariances": layers}}
    errors = dict.fromkeys(known, 0.0)
    for label, options in known.items():
        quantized = materialize(model, 0.6, forms=FORMS, quantize="int4", **options)
        for name, covariance in layers.items():
            weight = effective(plain.get_submodule(name))
            error = output_error(effective(quantized.get_submodule(name)) - weight, covariance)
            errors[label] += error / output_error(weight, covariance)
    assert errors["remembered"] < 0.6 * errors["nearest"]
    assert errors["given"] < 1.05 * errors["remembered"]


def test_int4_is_pivoted_where_rounding_knows_the_inputs(llama, tmp_path):
    def forms(made):
        return {type(module) for module in made.modules()} & {LowRankLinear, PivotLinear}

    assert PivotLinear in forms(materialize(llama, 0.6))
    assert PivotLinear in forms(materialize(llama, 0.6, quantize="int8"))
    assert forms(materialize(llama, 0.6, quantize="int4")) == {LowRankLinear}
    assert PivotLinear in forms(materialize(llama, 0.6, quantize="int4", forms=FORMS))
    model = wide("llama")
    covariances = {name: correlated(layer.in_features) for name, layer in linear_layers(model)[0].items()}
    assert PivotLinear in forms(materialize(llama, 0.6, quantize="int4", covariances=covariances))
    acip_kernels.factorize(model, adapter_rank=0, covariances=covariances)
    acip_kernels.score_by_singular_values(model)
    knowing = CompressionResult(model)
    assert "pivoted" in knowing.cut(0.6, scheme=Scheme("int4")).forms.values()
    assert forms(materialize(model, 0.6, quantize="int4", forms=("dense", "factors"))) == {LowRankLinear}
    knowing.save(tmp_path / "elastic")
    for rounding, expected in (("feedback", {PivotLinear}), ("nearest", {LowRankLinear})):
        options = {"quantize": "int4", "quantize_rounding": rounding}
        assert forms(materialize(model, 0.6, **options)) == expected
        assert forms(load(tmp_path / "elastic", 0.6, **options)) == expected


def effective(module):
    if isinstance(module, QuantizedLinear):
        return module.dequantize(torch.float64)
    weight = module.effective_weight() if hasattr(module, "effective_weight") else weight_of(module)
    return weight.detach().double()


def test_a_rank_of_zero_is_the_bias_alone(tmp_path):
    result = toys.toy_result(wide("qwen2"), adapters=0)
    layers = svd_layers(result.model)
    first = next(iter(layers))
    layers[first].scores.sub_(100)
    for kind in q.KINDS:
        model = materialize(result, 0.4, quantize=kind)
        assert model.get_submodule(first).rank == 0
        x = torch.randn(3, 160)
        assert torch.equal(model.get_submodule(first)(x), layers[first].bias.expand(3, -1))
        save(model, tmp_path / kind)
        assert torch.equal(logits(load(tmp_path / kind)), logits(model))
        cut = result.cut(0.4, scheme=Scheme(kind))
        assert cut.bytes(torch.float32) == sum(
            t.nbytes for t in load_file(tmp_path / kind / "model.safetensors").values()
        )


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_an_elastic_checkpoint_loads_quantized(result, case, tmp_path):
    result.save(tmp_path / "elastic")
    for size_ratio in (1.0, 0.4):
        model = load(tmp_path / "elastic", size_ratio, **options_of(case))
        # In memory from the same order of ranks: another order has other groups.
        expected = materialize(CompressionResult.load(tmp_path / "elastic"), size_ratio, **options_of(case))
        assert_same_state(model, expected)
        assert model.config.quantization_config.to_dict() == expected.config.quantization_config
        save(model, tmp_path / f"model-{size_ratio}")
        assert_same_state(load(tmp_path / f"model-{size_ratio}"), model)
    with pytest.raises(ValueError, match="give size_ratio"):
        load(tmp_path / "elastic", quantize="int8")
    with pytest.raises(ValueError, match="one of int8, int4, fp8"):
        load(tmp_path / "elastic", 0.5, quantize="fp4")
    with pytest.raises(ValueError, match="give size_ratio"):
        load(tmp_path / "model-0.4", quantize="int8")


@pytest.mark.parametrize("kind", q.KINDS)
def test_a_loaded_model_in_other_dtypes(llama, kind, tmp_path):
    model = materialize(llama, 0.5, quantize=kind)
    save(model, tmp_path / "model")
    for dtype in (torch.bfloat16, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
        cast = copy.deepcopy(model).to(dtype)
        made = materialize(llama, 0.5, quantize=kind, dtype=dtype)
        # What is quantized was never rounded to the narrow dtype before.
        for same in (cast, made):
            assert_same_state(loaded, same)
        assert torch.isfinite(logits(loaded)).all()
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    generated = model.generate(toys.token_ids(1, 5), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (1, 9)


def test_a_loaded_model_trains_what_is_not_quantized(llama):
    model = materialize(llama, 0.5, quantize="int8")
    model(input_ids=toys.token_ids(), labels=toys.token_ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_what_a_quantized_model_cannot_do_is_said(llama, tmp_path):
    with pytest.raises(ValueError, match="one of int8, int4, fp8"):
        materialize(llama, 0.5, quantize="int5")
    with pytest.raises(ValueError, match="quantize_embeddings must be int8 or int4, got 'fp8'"):
        materialize(llama, 0.5, quantize_embeddings="fp8")
    with pytest.raises(ValueError, match="one of 32, 64, 128"):
        materialize(llama, 0.5, quantize="int4", quantize_group=8)
    with pytest.raises(ValueError, match="quantize_rounding must be one of feedback, nearest"):
        materialize(llama, 0.5, quantize="int4", quantize_rounding="up")
    mixed = copy.deepcopy(llama)
    norm = mixed.model.model.norm
    mixed.model.model.norm = torch.nn.Sequential(norm, QuantizedLinear(160, 160, kind="int8"))
    with pytest.raises(ValueError, match=r"model\.norm\.1 was quantized before"):
        materialize(mixed, 0.5)
    with pytest.raises(ValueError, match=r"holds no quantized layers, as model\.norm\.1"):
        mixed.save(tmp_path / "elastic")


def test_plain_files_are_of_the_version_that_older_readers_know(llama, tmp_path):
    save(materialize(llama, 0.5), tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert fields["format_version"] == 2 and "quantized" not in fields


# ---- files that are not what they should be


@pytest.fixture(scope="module")
def stored(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    save(materialize(llama, 0.6, forms=FORMS, quantize="int4"), path / "low")
    save(materialize(llama, 1.0, quantize="int4"), path / "dense")
    save(materialize(llama, 0.6, quantize="fp8"), path / "fp8")
    return path


UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


def _quantized(change):
    def apply(tensors, ours):
        change(ours["quantized"])

    return apply


WRONG = {
    "no codes": ("low", lambda t, _: t.pop(f"{UP}.P.qweight"), f"{UP}.P.qweight' is missing"),
    "no scales": ("low", lambda t, _: t.pop(f"{UP}.C.scales"), f"{UP}.C.scales' is missing"),
    "no zeros": ("dense", lambda t, _: t.pop(f"{UP}.zeros"), f"{UP}.zeros' is missing"),
    "signed codes": (
        "low",
        lambda t, _: t.update({f"{UP}.P.qweight": t[f"{UP}.P.qweight"].view(torch.int8)}),
        rf"{UP}.P.qweight is torch.int8 .*, but must be torch.uint8",
    ),
    "wide scales": (
        "dense",
        lambda t, _: t.update({f"{UP}.scales": t[f"{UP}.scales"].float()}),
        f"{UP}.scales is torch.float32 .*, but must be torch.bfloat16",
    ),
    "too few codes": (
        "dense",
        lambda t, _: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:, :32].contiguous()}),
        rf"{UP}.qweight is torch.uint8 \[224, 32\], but must be torch.uint8 \[224, 96\]",
    ),
    "an infinite scale": (
        "dense",
        lambda t, _: t[f"{UP}.scales"].view(-1)[3:4].fill_(float("inf")),
        f"{UP}.scales holds values",
    ),
    "a zero point of 16": ("low", lambda t, _: t[f"{UP}.P.zeros"].view(-1)[:1].fill_(16), f"{UP}.P.zeros holds values"),
    "a code that is no number": (
        "fp8",
        lambda t, _: t[f"{UP}.P.qweight"].view(torch.uint8).view(-1)[:1].fill_(127),
        f"{UP}.P.qweight holds values",
    ),
    "integers as floats": (
        "fp8",
        lambda t, _: t.update({f"{UP}.P.qweight": t[f"{UP}.P.qweight"].view(torch.int8)}),
        "P.qweight is torch.int8 .*, but must be torch.float8_e4m3fn",
    ),
    "a layer forgotten": ("dense", _quantized(lambda ours: ours["dense"].remove(DOWN)), DOWN),
    "a layer that is not there": ("low", _quantized(lambda ours: ours["dense"].append("a.b")), "no linear layer 'a.b'"),
    "a low-rank layer as a dense one": ("low", _quantized(lambda ours: ours["dense"].append(UP)), "not in ranks"),
    "5 bits": ("low", _quantized(lambda ours: ours.update(bits=5)), "quantization_config: .*got 'int5'"),
    "8 bits": ("low", _quantized(lambda ours: ours.update(bits=8)), "quantized cannot be"),
    "bits of text": ("low", _quantized(lambda ours: ours.update(bits="4")), "quantized cannot be"),
    "another group": ("low", _quantized(lambda ours: ours.update(group=32)), ".scales is torch.bfloat16"),
    "a group of 7": ("low", _quantized(lambda ours: ours.update(group=7)), "one of 32, 64, 128, got 7"),
    "symmetric": ("low", _quantized(lambda ours: ours.update(symmetric=True)), "zeros is there"),
    "symmetric as a number": ("low", _quantized(lambda ours: ours.update(symmetric=0)), "symmetric must be True"),
    "another format": ("low", _quantized(lambda ours: ours.update(format="e5m2")), "quantized cannot be"),
    "no group": ("low", _quantized(lambda ours: ours.pop("group")), "must have bits, group and symmetric"),
    "one field too many": (
        "low",
        _quantized(lambda ours: ours.update(colour=3)),
        "must have bits, group and symmetric",
    ),
    "no dense": ("low", _quantized(lambda ours: ours.pop("dense")), "an object with bits and dense"),
    "dense is text": ("low", _quantized(lambda ours: ours.update(dense="x")), "dense must be a list"),
    "quantized is a list": ("low", lambda _, ours: ours.update(quantized=[4]), "an object with bits and dense"),
    "quantized forgotten": ("low", lambda _, ours: ours.pop("quantized"), r"P.weight is \[0\]"),
    "a version too high": ("low", lambda _, ours: ours.update(format_version=7), "format_version is 7"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_an_error_that_names_it(stored, wrong, tmp_path):
    kind, spoil, message = WRONG[wrong]
    fields = json.loads((stored / kind / "config.json").read_text())
    tensors = load_file(stored / kind / "model.safetensors")
    spoil(tensors, fields["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_sizing_of_schemes_agrees_with_itself():
    model = toys.toy_result(wide("llama")).model
    for scheme in SCHEMES:
        sizing = Sizing.of(model, scheme=scheme)
        sizes = [sizing.bytes(sizing.full_rank * part // 8, 2) for part in range(9)]
        assert sizes == sorted(sizes) and len(set(sizes)) > 4
