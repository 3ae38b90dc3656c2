"""The pivoted form: the same function in fewer numbers, whatever the matrix, and a layer like any other."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acip_kernels import PivotLinear
from acip_kernels.compress.pivot import BOUND, pivot_form
from acip_kernels.nn.pivot_linear import pack_bits, unpack_bits
from acip_kernels.ops.pivot_linear.op import pivot_linear

SHAPES = [(7, 3, 5), (8, 8, 12), (12, 8, 8), (33, 1, 4), (40, 17, 64), (1, 1, 1), (96, 40, 24 + 40)]


def factors(out, rank, in_, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out, rank, generator=generator, dtype=dtype)
    return left, torch.randn(rank, in_, generator=generator, dtype=dtype)


def rounding(left, right):
    """Sums of ρ and of out terms in float64, through factors no larger than these: some ulps of the largest value."""
    terms = sum(left.shape) + right.shape[1]
    return terms * BOUND * left.shape[1] * torch.finfo(torch.float64).eps * float((left.abs() @ right.abs()).max())


@pytest.mark.parametrize("bound", (1.0, BOUND, 4.0))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_form_is_the_product(shape, bound):
    left, right = factors(*shape)
    P, C, pivots = pivot_form(left, right, bound)
    out, rank, in_ = shape
    assert P.shape == (rank, in_) and C.shape == (out - rank, rank) and int(pivots.sum()) == rank
    product = left @ right
    atol = rounding(left, right)
    torch.testing.assert_close(P, product[pivots], rtol=0, atol=atol)
    torch.testing.assert_close(C @ P, product[~pivots], rtol=0, atol=atol)
    if C.numel():
        # The exchange ends where no entry is larger; each of them was computed with some roundings.
        assert float(C.abs().max()) <= bound * (1 + 1e-9)


@given(st.integers(0, 2**31 - 1), st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.floats(0, 12))
@settings(max_examples=60, deadline=None)
def test_the_form_of_badly_conditioned_factors(seed, out, rank, in_, decades):
    """Singular values over many decades, down to a matrix of a lower rank than its factors."""
    rank = min(rank, out, in_)
    left, right = factors(out, rank, in_, seed)
    values = 10.0 ** -torch.linspace(0, decades, rank, dtype=torch.float64)
    values[rank // 2 + 1 :] *= float(seed % 3 > 0)
    P, C, pivots = pivot_form(left * values, right)
    product = (left * values) @ right
    atol = rounding(left * values, right)
    torch.testing.assert_close(P, product[pivots], rtol=0, atol=atol)
    torch.testing.assert_close(C @ P, product[~pivots], rtol=0, atol=atol)
    assert not C.numel() or float(C.abs().max()) <= BOUND * (1 + 1e-9)


def test_bad_factors_are_refused():
    left, right = factors(4, 3, 5)
    with pytest.raises(ValueError, match="bound must be at least 1"):
        pivot_form(left, right, 0.5)
    with pytest.raises(ValueError, match="rank <= out"):
        pivot_form(left.t(), right.t())


# ---- the layer


def layer_of(shape, bias=True, dtype=torch.float64, seed=0):
    left, right = factors(*shape, seed=seed)
    P, C, pivots = pivot_form(left, right)
    bias = torch.linspace(-1, 1, shape[0], dtype=dtype) if bias else None
    return PivotLinear.from_parts(P.to(dtype), C.to(dtype), pivots, bias), left @ right


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layer_and_every_gradient(shape, bias):
    layer, weight = layer_of(shape, bias)
    x = torch.randn(2, 3, shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = layer(x)
    expected = torch.nn.functional.linear(x, weight, layer.bias)
    # `in` products behind the sums that made P, times ρ of those for the others; inputs of size at most five or so.
    atol = shape[2] * shape[1] * BOUND * 5 * rounding(*factors(*shape))
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    torch.testing.assert_close(layer.effective_weight(), weight, rtol=0, atol=rounding(*factors(*shape)))
    Vh, U = layer.factors()
    torch.testing.assert_close(U @ Vh, weight, rtol=0, atol=rounding(*factors(*shape)))

    g = torch.randn_like(y)
    parameters = [x, layer.P.weight, layer.C.weight] + ([layer.bias] if bias else [])
    gradients = torch.autograd.grad(y, parameters, g)
    assert all(gradient.shape == tensor.shape for gradient, tensor in zip(gradients, parameters, strict=True))
    torch.testing.assert_close(gradients[0], g @ weight, rtol=0, atol=atol * shape[0])
    if bias:
        torch.testing.assert_close(gradients[3], g.sum((0, 1)))


def test_gradients_against_differences():
    layer, _ = layer_of((6, 2, 4))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def function(x, P, C, bias):
        return pivot_linear(x, P, C, layer.orders()[0], bias)

    assert torch.autograd.gradcheck(function, (x, layer.P.weight, layer.C.weight, layer.bias))
    assert torch.equal(function(x, layer.P.weight, layer.C.weight, layer.bias), layer(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_narrow_dtypes(dtype):
    shape = (40, 17, 64)
    layer, weight = layer_of(shape, dtype=dtype)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = x.double() @ weight.t() + layer.bias.double()
    eps = torch.finfo(dtype).eps
    # Each of P, C, z and y is rounded once, P's rounding is summed over `in` terms and C's over ρ of size BOUND; the
    # bound is on magnitudes.
    sums = x.double().abs() @ weight.abs().t()
    atol = eps * (3 + BOUND * shape[1]) * float(sums.max())
    assert float((layer(x).double() - expected).abs().max()) <= atol


def test_bits_come_back():
    for n in (1, 7, 8, 9, 576):
        bits = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
        packed = pack_bits(bits)
        assert packed.dtype == torch.uint8 and packed.shape == (-(-n // 8),)
        assert torch.equal(unpack_bits(packed, n), bits)


def test_a_copy_a_pickle_and_a_loaded_state_have_their_own_order():
    layer, weight = layer_of((12, 5, 9), seed=3)
    other, other_weight = layer_of((12, 5, 9), seed=4)
    x = torch.eye(9, dtype=torch.float64)
    layer(x), other(x)
    twin = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for again in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(again(x), layer(x))
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), other(x)) and not torch.equal(twin(x), layer(x))
    assert torch.equal(layer.to(torch.float32)(x.float()), copy.deepcopy(layer)(x.float()))
    del weight, other_weight


def test_hooks_of_the_children_run():
    layer, _ = layer_of((12, 5, 9))
    seen = []
    layer.P.register_forward_hook(lambda module, args, output: seen.append("P"))
    layer.C.register_forward_hook(lambda module, args, output: seen.append("C"))
    layer(torch.randn(2, 9, dtype=torch.float64))
    assert seen == ["P", "C"]


def test_it_trains_after_it_has_been_evaluated():
    layer, _ = layer_of((12, 5, 9))
    x = torch.randn(2, 9, dtype=torch.float64)
    with torch.inference_mode():
        before = layer(x).clone()
    after = layer(x)
    after.sum().backward()
    assert layer.P.weight.grad.any() and torch.allclose(before, after, rtol=1e-14)


def test_it_compiles_and_exports():
    layer, _ = layer_of((12, 5, 9), dtype=torch.float32)
    x = torch.randn(2, 9)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), expected)


def test_what_does_not_fit_is_named():
    P, C = torch.randn(2, 5), torch.randn(4, 2)
    six = torch.tensor([True, False, True, False, False, False])
    PivotLinear.from_parts(P, C, six)
    for parts, message in (
        ((P, torch.randn(4, 3), six), r"C \[out_features - rank, rank\]"),
        ((P, C, six[:5]), r"pivots \[out_features\]"),
        ((P, C, ~six), "pivots must name 2 outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            PivotLinear.from_parts(*parts)
    for rank in (0, 6, 1.5):
        with pytest.raises(ValueError, match="rank must be an int from 1 to 5"):
            PivotLinear(5, 6, rank)
    x, inverse = torch.randn(3, 5), torch.arange(6)
    for arguments, error, message in (
        ((x[:, :4], P, C, inverse), ValueError, r"x must be \[\.\.\., 5\] as P"),
        ((x, P, C[:, :1], inverse), ValueError, r"C must be \[out_features, 2\] as P has rank 2"),
        ((x, P, C.double(), inverse), TypeError, "C is torch.float64"),
        ((x, P, C, inverse[:5]), ValueError, r"inverse must be int64 \[6\]"),
        ((x, P, C, inverse, torch.randn(5)), ValueError, r"bias must be torch.float32 \[6\]"),
        ((x, P[:0], C[:, :0], inverse), ValueError, "rank is 0"),
    ):
        with pytest.raises(error, match=message):
            pivot_linear(*arguments)
    with pytest.raises(RuntimeError, match="'cuda' is not available"):
        pivot_linear(x, P, C, inverse, backend="cuda")


@pytest.mark.network
def test_every_layer_of_the_real_model():
    """Pivoted, two factors and the dense product of the same ranks, in float64, float32 and bfloat16."""
    from transformers import AutoModelForCausalLM

    from acip_kernels import data
    from acip_kernels.compress.factorize import cached_svd
    from acip_kernels.models.targets import linear_layers

    source = data.demo_model()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    x = torch.randn(4, 1536, generator=torch.Generator().manual_seed(0))
    layers = linear_layers(model)[0]
    assert len(layers) == 210
    for name, layer in layers.items():
        U, S, Vh = (factor.double() for factor in cached_svd(layer.weight.detach(), data.svd_cache(source)))
        rank = len(S) // 3  # about half the size
        left, right = U[:, :rank] * S[:rank], Vh[:rank]
        dense = left @ right
        P, C, pivots = pivot_form(left, right)
        # The condition of C is bounded through its entries.
        assert float(C.abs().max()) <= BOUND * (1 + 1e-9), name
        sums = torch.cat([P.abs(), C.abs() @ P.abs()])
        inputs = x[:, : layer.in_features].double()
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            pivoted = PivotLinear.from_parts(P.to(dtype), C.to(dtype), pivots)
            error = (pivoted.effective_weight().detach().double() - dense).norm()
            # P and C are rounded once each, by half a unit; in float64 what counts are the sums of ρ and out terms that
            # made them, in a narrower one the float32 product of ρ terms that this test takes.
            roundings = len(U) + rank if dtype == torch.float64 else 2 + rank * 2**-16
            assert float(error) <= roundings * torch.finfo(dtype).eps * float(sums.norm()), (name, dtype)
            if dtype == torch.float64:
                close = 1e-9 * float(sums.norm())  # far above the bound before, times inputs of size five
                torch.testing.assert_close(pivoted(inputs), (inputs @ right.t()) @ left.t(), rtol=0, atol=close)
                torch.testing.assert_close(pivoted(inputs), inputs @ dense.t(), rtol=0, atol=close)
