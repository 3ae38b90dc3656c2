"""rotary against the formula in float64, what only its native operator has to mind, and models that take it."""

import operators
import pytest
import torch
import toys
from operators import EXPANDED, LAYOUTS, assert_within, error_bound
from transformers.models.llama import modeling_llama

from acip_kernels import CompressionConfig, compress
from acip_kernels.models import training
from acip_kernels.ops import extension
from acip_kernels.ops.rotary import reference
from acip_kernels.ops.rotary.op import rotary

one_thread = operators.one_thread  # a fixture of every test here
isa = operators.isa  # a fixture
needs_native = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")

# batch, heads, tokens, width
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 6), (3, 1, 7, 64), (1, 9, 33, 130), (0, 2, 3, 4), (2, 3, 0, 4)]


def problem(batch, heads, tokens, width, dtype, *, shared=False, seed=0):
    """x, cos, sin and the gradient that comes in. cos and sin are any numbers, other ones in either half."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (operators.numbers(generator, batch, heads, tokens, width, dtype=dtype) for _ in range(2))
    cos, sin = (operators.numbers(generator, 1 if shared else batch, tokens, width, dtype=dtype) for _ in range(2))
    return x, cos, sin, g


def run(function, x, cos, sin, g):
    leaf = x.detach().requires_grad_()
    y = function(leaf, cos, sin)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


def check(function, x, cos, sin, g, roundings=1):
    y, dx = run(function, x, cos, sin, g)
    exact = [tensor.double() for tensor in (x, cos, sin, g)]
    exact_y, exact_dx = run(reference.forward, *exact)
    assert y.dtype == dx.dtype == x.dtype and y.shape == dx.shape == x.shape
    # Two products and their sum; of absolute values the half that is subtracted has to be added.
    first, second = exact[0].abs().chunk(2, -1)
    magnitude = exact[0].abs() * exact[1][:, None].abs() + torch.cat((second, first), -1) * exact[2][:, None].abs()
    upstream = (exact[3] * exact[2][:, None]).abs()
    back = (exact[3] * exact[1][:, None]).abs() + torch.cat(upstream.chunk(2, -1)[::-1], -1)
    assert_within(error_bound(x.dtype, magnitude, roundings=roundings, sums=2), y, exact_y, "y")
    assert_within(error_bound(x.dtype, back, roundings=roundings, sums=2), dx, exact_dx, "dx")


@pytest.mark.parametrize("dtype", operators.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_where_there_are_no_kernels(monkeypatch, shape, dtype):
    monkeypatch.setattr(extension, "takes", lambda x: False)
    check(rotary, *problem(*shape, dtype), roundings=3)


def test_it_is_the_rotation_by_an_angle():
    """Pairs (i, i + half) of a head are turned by their angle, as Su et al. have it with another order of pairs."""
    angle = torch.rand(5, 3, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.polar(torch.ones_like(angle), angle)
    cos, sin = (torch.cat((part, part), -1)[None] for part in (angle.cos(), angle.sin()))
    assert torch.allclose(rotary(x, cos, sin), torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-14)


@needs_native
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient_against_float64(isa, shape, dtype, shared):
    check(rotary, *problem(*shape, dtype, shared=shared))


@needs_native
@pytest.mark.parametrize("layout", EXPANDED)
def test_any_layout(layout):
    x, cos, sin, g = problem(3, 5, 7, 40, torch.bfloat16)
    own = LAYOUTS.get(layout, LAYOUTS["contiguous"])
    check(rotary, own(x), own(cos), own(sin), EXPANDED[layout](g))
    # As a projection makes it, and as it comes out.
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert rotary(x, cos, sin).transpose(1, 2).is_contiguous()
    check(rotary, x[..., 4:12], cos[..., :8], sin[..., :8], g[..., :8])


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
def test_two_threads_give_the_bits_of_one(isa, dtype):
    arguments = problem(2, 9, 300, 64, dtype)
    one = run(rotary, *arguments)
    with operators.threads(2):
        operators.assert_identical(run(rotary, *arguments), one)


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
def test_what_is_no_number_stays_in_its_pair(isa, dtype):
    x, cos, sin, g = problem(1, 2, 3, 40, dtype)
    x[0, 1, 1, 7] = torch.nan
    y, dx = run(rotary, x, cos, sin, g)
    assert y.isnan().nonzero().tolist() == [[0, 1, 1, 7], [0, 1, 1, 27]] and dx.isfinite().all()


@needs_native
def test_a_second_derivative_is_refused():
    x, cos, sin, g = problem(1, 2, 3, 4, torch.float64)
    y = rotary(x.requires_grad_(), cos, sin)
    with pytest.raises(RuntimeError, match="rotary has no second derivative"):
        torch.autograd.grad(y, x, g, create_graph=True)


def test_angles_that_learn_get_their_gradient():
    x, cos, sin, _ = problem(2, 2, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(rotary, tuple(tensor.requires_grad_() for tensor in (x, cos, sin)))
    if extension.available():
        with pytest.raises(RuntimeError, match="no gradient for cos and sin"):
            torch.ops.acip.rotary(x, cos, sin)


def test_what_does_not_fit_is_refused():
    x, cos, sin, _ = problem(2, 3, 4, 6, torch.float32)
    for arguments in (
        (x[0], cos, sin),
        (x[..., :5], cos[..., :5], sin[..., :5]),
        (x, cos[0], sin),
        (x, cos, sin[..., :4]),
        (x, cos[:, :2], sin),
        (x, cos.repeat(2, 1, 1), sin),
    ):
        with pytest.raises(ValueError, match=r"x must be \[batch, heads, tokens, width\]"):
            rotary(*arguments)
        if extension.available():
            with pytest.raises(RuntimeError, match="rotary"):
                torch.ops.acip.rotary(*arguments)
    with pytest.raises(ValueError, match="one dtype and device"):
        rotary(x, cos.double(), sin)
    with pytest.raises(ValueError, match="one dtype and device"):
        rotary(x, cos, sin.to("meta"))
    if extension.available():
        for arguments in ((x, cos.double(), sin), (x.half(), cos.half(), sin.half()), (x, cos, sin.to("meta"))):
            with pytest.raises(RuntimeError, match="rotary|native kernels take"):
                torch.ops.acip.rotary(*arguments)


# ---- models


@needs_native
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_a_models_rotations_are_ours_during_its_passes_alone(monkeypatch, name):
    model = getattr(toys, name)()
    modules = training.rotations(model)
    assert [module.__name__.rpartition("_")[2] for module in modules] == ([] if name == "gpt2" else [name])
    ids, calls = toys.token_ids(), []
    monkeypatch.setattr(training, "rotary", lambda *a: calls.append(a) or rotary(*a))

    def loss_and_gradients():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach()), [p.grad.clone() for p in model.parameters()]

    expected, held = loss_and_gradients(), [getattr(module, training.ROTATE) for module in modules]
    assert not calls
    with training.functions({}, modules):
        actual = loss_and_gradients()
    assert len(calls) == (0 if name == "gpt2" else 2 * model.config.num_hidden_layers)
    assert [getattr(module, training.ROTATE) for module in modules] == held
    bound = toys.TERMS * torch.finfo(torch.float32).eps
    assert actual[0] == pytest.approx(expected[0], rel=bound)
    largest = max(float(gradient.abs().max()) for gradient in expected[1])
    assert all(float((a - b).abs().max()) <= 4 * bound * largest for a, b in zip(actual[1], expected[1], strict=True))


@needs_native
def test_what_the_kernels_do_not_take_is_left_to_the_model(monkeypatch):
    own = modeling_llama.apply_rotary_pos_emb
    rotate = training._rotation(own)
    monkeypatch.setattr(training, "rotary", None)  # a call would fail
    q, cos, sin, _ = problem(2, 3, 4, 6, torch.float32)
    k = q[:, :1]
    for arguments, options in (
        ((q.half(), k.half(), cos.half(), sin.half()), {}),
        ((q, k, cos.double(), sin.double()), {}),
        ((q.transpose(1, 2), k.transpose(1, 2), cos, sin), {"unsqueeze_dim": 2}),
        ((q, k, cos, sin, 1), {}),
    ):
        for actual, expected in zip(rotate(*arguments, **options), own(*arguments, **options), strict=True):
            assert torch.equal(actual, expected)
    assert not training.is_rotation(None) and not training.is_rotation(lambda q, k, cos, sin: (q, k))
    assert not training.is_rotation(lambda q: q)


@needs_native
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_takes_them_and_gives_them_back(monkeypatch, checkpointing):
    calls = []
    monkeypatch.setattr(training, "rotary", lambda *a: calls.append(a) or rotary(*a))
    own, model = modeling_llama.apply_rotary_pos_emb, toys.llama()
    config = CompressionConfig.short(2, 0.9, adapter_rank=2, tune_steps=0, gradient_checkpointing=checkpointing)
    compress(model, [{"input_ids": toys.token_ids()}], config, progress=False)
    layers = model.config.num_hidden_layers
    assert len(calls) >= 2 * 2 * layers * (2 if checkpointing else 1)
    assert modeling_llama.apply_rotary_pos_emb is own
