"""causal_attention against the formula in float64, and in whole models where it stands in for torch's."""

import operators
import pytest
import torch
import toys
from operators import DTYPES, assert_within, error_bound, precise

from acip_kernels import CompressionConfig, compress
from acip_kernels.models import training
from acip_kernels.ops import common, extension
from acip_kernels.ops.causal_attention import reference
from acip_kernels.ops.causal_attention.op import causal_attention

one_thread = operators.one_thread  # a fixture of every test here

# batch, heads, key heads, length, width, block
SHAPES = [(1, 1, 1, 1, 1, 128), (2, 6, 2, 13, 5, 4), (1, 4, 4, 17, 16, 8), (2, 3, 1, 40, 8, 64), (1, 2, 1, 33, 32, 1)]


def problem(batch, heads, key_heads, length, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # The layout of a model's projections: heads side by side.
    q, k, v, g = (
        operators.numbers(generator, batch, length, n, width, dtype=dtype).transpose(1, 2)
        for n in (heads, key_heads, key_heads, heads)
    )
    return q, k, v, g


def run(function, q, k, v, g):
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_against_float64(monkeypatch, shape, dtype, native):
    if not native:
        monkeypatch.setattr(extension, "takes", lambda x: False)
    elif not extension.available():
        pytest.skip("the native extension is not built")  # .ci/run requires it, so there nothing is skipped
    *sizes, block = shape
    q, k, v, g = problem(*sizes, dtype)
    _, heads, key_heads, length, width = sizes
    scale = width**-0.5
    actual = run(lambda *t: causal_attention(*t, block=block), q, k, v, g)
    exact = run(lambda *t: reference.forward(*t, scale), *(t.double() for t in (q, k, v, g)))
    # A score is off by at most δ, of `width` products of at most one, rounded twice; that changes a probability by a
    # factor of at most e^2δ, and its own rounding and the softmax's sum by as much as `error_bound` says.
    delta = float(error_bound(dtype, torch.tensor(scale * width), roundings=2, sums=width + 2))
    eps = torch.finfo(dtype).eps

    def relative(roundings, sums):
        return float(error_bound(dtype, torch.tensor(1.0), roundings=roundings, sums=sums + 80)) + 2.1 * delta

    # Magnitudes: probabilities sum to one and all entries are at most one; a gradient of a score is the difference of
    # two numbers of at most `width`, and the gradients of a key gather every query of its group.
    groups = heads // key_heads
    bounds = (
        1.0 * relative(3, length),
        3 * scale * 2 * width * relative(6, length + width) + eps,
        3 * scale * 2 * width * groups * length * relative(6, length * groups + width) + eps,
        groups * length * relative(4, length * groups) + eps,
    )
    for name, one, other, bound in zip(("out", "dq", "dk", "dv"), actual, exact, bounds):
        assert one.dtype == dtype and one.shape == other.shape
        assert_within(torch.full_like(other, bound), one, other, name)


@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
def test_the_native_softmax_is_the_reference_one(dtype):
    if not extension.available():
        pytest.skip("the native extension is not built")  # .ci/run requires it, so there nothing is skipped
    generator = torch.Generator().manual_seed(0)
    for batch, groups, block, keys in ((1, 1, 1, 1), (2, 3, 5, 21), (1, 2, 16, 64)):
        scores = operators.numbers(generator, batch, groups * block, keys, dtype=dtype)
        own, other = scores.clone(), scores.clone()
        sums = torch.ops.acip.causal_softmax_(own, block, 0.7, None)
        expected = reference.causal_softmax_(other, block, 0.7, None)
        # Powers of at most 1 below the largest: sums of at most `keys` terms, each to 60 units in the last place.
        bound = 70 * torch.finfo(precise(dtype)).eps * keys
        assert float((sums - expected).abs().max()) <= bound
        rounding = bound + torch.finfo(dtype).eps
        assert float((own - other).abs().max()) <= rounding
        hidden = torch.arange(keys) > (keys - block + torch.arange(groups * block) % block)[:, None]
        assert torch.count_nonzero(own[:, hidden]) == 0
        again = scores.clone()
        torch.ops.acip.causal_softmax_(again, block, 0.7, sums)
        assert float((again - own).abs().max()) <= rounding
        dp, want = scores.clone(), scores.clone()
        torch.ops.acip.softmax_gradient_(dp, own, block, 0.7)
        reference.softmax_gradient_(want, own, block, 0.7)
        assert float((dp - want).abs().max()) <= rounding


@pytest.mark.skipif(not extension.available(), reason="the native extension is not built")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_compiled_is_what_is_called(shape, dtype, monkeypatch):
    """The operator that a compiler traces, and the one call otherwise: the same bits."""
    *sizes, block = shape
    tensors = problem(*sizes, dtype)
    called = run(lambda *t: causal_attention(*t, block=block), *tensors)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    operators.assert_identical(run(lambda *t: causal_attention(*t, block=block), *tensors), called)


def test_a_second_derivative_is_refused():
    q, k, v, _ = problem(1, 4, 2, 5, 8, torch.float32)
    y = causal_attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError):
        (dq,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.skipif(not extension.available(), reason="the native extension is not built")
def test_the_calls_themselves_refuse_what_does_not_fit():
    """Without the checks in Python before them: no memory is read that is not there."""
    ones, ops = torch.ones, torch.ops.acip
    q, k, g = ones(1, 4, 5, 8), ones(1, 2, 5, 8), ones(1, 4, 5, 8)
    _, sums = ops.causal_attention_outputs(q, k, k, 1.0, 4)
    for wrong in (
        (ones(4, 5, 8), k, k, 1.0, 4),
        (q, ones(1, 3, 5, 8), ones(1, 3, 5, 8), 1.0, 4),
        (q, ones(1, 2, 6, 8), ones(1, 2, 6, 8), 1.0, 4),
        (q, k, ones(1, 2, 5, 7), 1.0, 4),
        (q, k.double(), k, 1.0, 4),
        (q, k, k, 1.0, 0),
    ):
        with pytest.raises(RuntimeError, match="causal_attention"):
            ops.causal_attention_outputs(*wrong)
        with pytest.raises(RuntimeError, match="causal_attention"):
            ops.causal_attention_differentiable(*wrong)
    for wrong_g, wrong_sums in ((ones(1, 4, 5, 7), sums), (g.double(), sums), (g, sums[:, :-1])):
        with pytest.raises(RuntimeError, match="causal_attention"):
            ops.causal_attention_gradients(wrong_g, q, k, k, wrong_sums, 1.0, 4)


def test_what_does_not_fit_is_refused():
    q, k, v, _ = problem(1, 4, 2, 5, 8, torch.float32)
    with pytest.raises(ValueError, match="multiple of key_heads"):
        causal_attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="one dtype"):
        causal_attention(q, k, v.double())
    with pytest.raises(ValueError, match="block"):
        causal_attention(q, k, v, block=0)
    if extension.available():
        with pytest.raises(RuntimeError, match="block"):
            torch.ops.acip.causal_softmax_(torch.zeros(1, 3, 4), 2, 1.0, None)
        with pytest.raises(RuntimeError, match="log_sums"):
            torch.ops.acip.causal_softmax_(torch.zeros(1, 2, 4), 2, 1.0, torch.zeros(3))


def test_a_score_that_is_no_number_stays_none():
    q, k, v, _ = problem(1, 2, 1, 9, 4, torch.float32)
    q[0, 1, 3, 2] = torch.nan
    out = causal_attention(q, k, v)
    assert out[0, 1, 3].isnan().any() and out[0, 0].isfinite().all() and out[0, 1, :3].isfinite().all()


@pytest.mark.parametrize("make", [toys.llama, toys.qwen2, toys.gemma3, toys.gpt2])
def test_a_model_trains_with_it_as_with_its_own(make):
    model = make().float()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    ids = toys.token_ids()

    def loss_and_gradients():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach()), [p.grad.clone() for p in model.parameters()]

    loss, gradients = loss_and_gradients()
    name = training.use(model)
    assert name == "sdpa" and model.config._attn_implementation == training.NAME
    other_loss, others = loss_and_gradients()
    bound = toys.TERMS * torch.finfo(torch.float32).eps
    assert other_loss == pytest.approx(loss, rel=bound)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert all(float((a - b).abs().max()) <= 4 * bound * largest for a, b in zip(gradients, others))
    training.restore(model, name)
    assert model.config._attn_implementation == "sdpa"


def test_padding_sliding_windows_and_generation_take_torchs_attention(monkeypatch):
    calls = []
    monkeypatch.setattr(training, "causal_attention", lambda *a: calls.append(a) or causal_attention(*a))
    model = toys.llama()
    training.use(model)
    ids = toys.token_ids()
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    model(input_ids=ids, attention_mask=padded, labels=ids).loss.backward()
    model.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert not calls
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == model.config.num_hidden_layers


def test_a_run_gives_the_model_its_own_attention_back():
    model = toys.llama()
    seen = []
    batches = [{"input_ids": toys.token_ids(seed=seed)} for seed in range(3)]
    compress(
        model,
        batches,
        CompressionConfig.short(4, 0.6, adapter_rank=2, tune_steps=0),
        progress=False,
        on_step=lambda row: seen.append(model.config._attn_implementation),
    )
    assert set(seen) == {training.NAME if common.multiplies_natively(model.dtype) else "sdpa"}
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict().get("_attn_implementation") != training.NAME
