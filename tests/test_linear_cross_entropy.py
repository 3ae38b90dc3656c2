"""linear_cross_entropy against the ordinary loss in float64; and the loss of whole models."""

import math

import operators
import pytest
import torch
import toys
from operators import DTYPES, assert_identical, error_bound, precise
from transformers import Gemma2Config, Gemma2ForCausalLM

from acip_kernels.models.loss import CausalLoss
from acip_kernels.ops import common, extension
from acip_kernels.ops.linear_cross_entropy import reference
from acip_kernels.ops.linear_cross_entropy.op import linear_cross_entropy

one_thread = operators.one_thread  # a fixture of every test here


def problem(dtype, tokens=13, features=9, classes=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = operators.numbers(generator, tokens, features, dtype=dtype)
    weight = operators.numbers(generator, classes, features, dtype=dtype)
    bias = operators.numbers(generator, classes, dtype=dtype)
    labels = torch.randint(classes, (tokens,), generator=generator)
    labels[::5] = -100
    return x, weight, labels, bias


def run(x, weight, labels, bias, **options):
    x = x.detach().requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, bias, **options)
    (dx,) = torch.autograd.grad(loss * 0.5, x)
    return loss.detach(), dx


@pytest.mark.parametrize("chunk", [None, 1, 4, 13, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("native", [False, True])
def test_loss_and_gradient_against_float64(monkeypatch, dtype, chunk, native):
    if not native:
        monkeypatch.setattr(extension, "takes", lambda x: False)
    elif not extension.available():
        pytest.skip("the native extension is not built")  # .ci/run requires it, so there nothing is skipped
    for tokens in (13, 1):
        x, weight, labels, bias = problem(dtype, tokens)
        labels[0] = 3
        for b in (bias, None):
            wide = x.double().requires_grad_()
            exact = reference.forward(wide, weight.double(), None if b is None else b.double(), labels, -100)
            (dx_exact,) = torch.autograd.grad(exact * 0.5, wide)
            loss, dx = run(x, weight, labels, b, chunk_tokens=chunk)
            assert loss.dtype == precise(dtype) and dx.dtype == dtype
            # A logit, of 9 products of at most 1 and a bias, moves the loss of its token by at most its own error, and
            # the softmax's terms by that factor.
            logit = float(error_bound(dtype, torch.tensor(10.0), roundings=2, sums=11)[()])
            assert abs(float(loss.double() - exact.detach())) <= 2 * tokens * (
                logit + 60 * torch.finfo(precise(dtype)).eps
            )
            # Logits that are off by up to δ change a probability by a factor of at most e^2δ; so do 60 roundings in the
            # exponential and its sum. The logits' gradient is rounded, and the product with the weight, of 50 terms;
            # so is the factor of 0.5, and in half precision what it multiplies.
            wide = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            p = wide.softmax(1).masked_fill((labels == -100)[:, None], 0)
            factor = math.expm1(2 * logit + 60 * torch.finfo(precise(dtype)).eps)
            onehot = torch.nn.functional.one_hot(labels.clamp_min(0), 50).double() * (labels != -100)[:, None]
            magnitude = 0.5 * ((p + onehot) @ weight.double().abs())
            bound = 0.5 * factor * (p @ weight.double().abs()) + error_bound(dtype, magnitude, roundings=3, sums=52)
            operators.assert_within(bound, dx, dx_exact)


def test_ignored_tokens_have_neither_loss_nor_gradient():
    x, weight, labels, bias = problem(torch.float32)
    _, dx = run(x, weight, labels, bias)
    assert torch.count_nonzero(dx[labels == -100]) == 0 and torch.count_nonzero(dx[labels != -100]) > 0
    loss, dx = run(x, weight, torch.full_like(labels, -100), bias)
    assert loss == 0 and torch.count_nonzero(dx) == 0
    assert run(x[:0], weight, labels[:0], bias)[0] == 0


def test_opcheck_and_meta():
    x, weight, labels, bias = problem(torch.float32)
    torch.library.opcheck(torch.ops.acip.linear_cross_entropy.default, (x, weight, labels, bias, -100, 4, False))
    arguments = (x.requires_grad_(), weight, labels, None, -100, 4, True)
    torch.library.opcheck(torch.ops.acip.linear_cross_entropy.default, arguments)


def test_compiled_is_the_same():
    torch.compiler.reset()
    arguments = problem(torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    x = arguments[0].requires_grad_()
    assert_identical((compiled(x, *arguments[1:]).detach(),), (linear_cross_entropy(*arguments).detach(),))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.ones(13, 8), ValueError, "x must be"),
        (0, torch.ones(9), ValueError, "x must be"),
        (1, torch.ones(50, 9).double(), TypeError, "weight is torch.float64"),
        (2, torch.ones(12, dtype=torch.int64), ValueError, "labels must be int64"),
        (2, torch.ones(13), ValueError, "labels must be int64"),
        (3, torch.ones(49), ValueError, "bias must be"),
        (1, torch.ones(50, 9, requires_grad=True), ValueError, "weight requires a gradient"),
    ],
)
def test_a_mistake_is_named(position, value, error, message):
    arguments = list(problem(torch.float32))
    arguments[position] = value
    with pytest.raises(error, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(*arguments)


# ---- of whole models


def batch(padded=False):
    ids = toys.token_ids()
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, -4:] = 0
        inputs["labels"][0, -4:] = -100
    return inputs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", toys.MODELS.values(), ids=toys.MODELS.keys())
def test_the_lean_loss_is_the_models_own(make, padded):
    model = make().double().requires_grad_(False)
    loss = CausalLoss(model)
    value = loss(batch(padded))
    assert loss.lean is True
    # transformers' own loss is in float32: a softmax of 64 classes and a mean of 22 tokens, each rounded to 6e-8.
    torch.testing.assert_close(value.float(), model(**batch(padded)).loss.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("announced", [True, False])
def test_a_model_that_changes_its_logits_keeps_its_own_loss(monkeypatch, announced):
    model = Gemma2ForCausalLM(Gemma2Config(**toys.SIZES, final_logit_softcapping=1.0)).eval().requires_grad_(False)
    if not announced:  # then trying it shows
        monkeypatch.setattr("acip_kernels.models.loss._CHANGES_LOSS", ())
    loss = CausalLoss(model)
    assert float(loss(batch())) == float(model(**batch()).loss)
    assert loss.lean is False


def test_a_trained_head_keeps_the_ordinary_loss():
    model = toys.llama()
    assert CausalLoss(model).lean is False
    assert CausalLoss(model.requires_grad_(False)).lean is None
    assert CausalLoss(model, lean=False).lean is False


def test_products_in_emulated_dtypes_are_widened(monkeypatch):
    monkeypatch.setattr(common, "multiplies_natively", lambda dtype: dtype in (torch.float32, torch.float64))
    a, b = torch.randn(4, 6).bfloat16(), torch.randn(6, 5).bfloat16()
    exact = a.double() @ b.double()
    assert torch.equal(common.product(a, b), (a.float() @ b.float()).bfloat16())
    out = torch.full((4, 9), float("nan"), dtype=torch.bfloat16)
    common.product(a, b, out=out[:, 2:7])
    assert torch.equal(out[:, 2:7], common.product(a, b)) and out[:, :2].isnan().all()
    # Rounded once to bfloat16, whatever the sums of 6 products come to.
    magnitude = a.double().abs() @ b.double().abs()
    operators.assert_within(error_bound(torch.bfloat16, magnitude, roundings=1, sums=6), common.product(a, b), exact)
    to = torch.ones(4, 5, dtype=torch.bfloat16)
    bound = error_bound(torch.bfloat16, magnitude + 1, roundings=1, sums=7)
    operators.assert_within(bound, common.add_product(to, a, b), exact + 1)
