"""Scales of a quantized model that learn."""

import copy

import pytest
import torch
import toys

from acip_kernels import PivotLinear, finetune, fuse, load, materialize, save
from acip_kernels.models.fuse import is_fused
from acip_kernels.nn.quantized_linear import QuantizedLinear
from acip_kernels.nn.scaled_linear import ScaledLinear
from acip_kernels.ops import extension
from acip_kernels.ops.quantize import dequantize, quantize

BATCHES = [{"input_ids": toys.token_ids(seed=seed)} for seed in range(2)]
KINDS = [("int8", 64, True), ("fp8", 64, True), ("int4", 64, False), ("int4", 32, True), ("int4", 128, False)]


def quantized_layer(rows, cols, kind, group=64, symmetric=False, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + cols)
    weight = torch.randn(rows, cols, generator=generator)
    numbers = torch.linspace(-1, 1, rows, dtype=dtype) if bias else None
    return QuantizedLinear.from_quantized(
        quantize(weight, kind, group, symmetric), cols, numbers, group=group, dtype=dtype
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "group", "symmetric"), KINDS)
@pytest.mark.parametrize("shape", [(3, 7), (65, 130), (16, 64), (1, 1)], ids=str)
def test_the_layer_and_every_gradient(shape, kind, group, symmetric, dtype):
    rows, cols = shape
    scaled = ScaledLinear(quantized_layer(rows, cols, kind, group, symmetric, dtype=dtype))
    with torch.no_grad():
        scaled.change += torch.linspace(-0.2, 0.3, scaled.change.numel()).view_as(scaled.change)
    x = torch.randn(2, 5, cols, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    g = torch.randn(2, 5, rows, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = scaled(x)
    y.backward(g)

    layer = scaled.quantized()
    codes = scaled.codes.double()
    W = dequantize(layer.qweight, layer.scales, layer.zeros, cols=cols, group=group, dtype=torch.float64)
    X, G = x.detach().double(), g.double()
    eps = torch.finfo(dtype).eps
    # Of each sum of n rounded products the errors are n eps times the sum of their magnitudes at most, and the dense
    # weight is rounded before that.
    torch.testing.assert_close(
        y.double(),
        X @ W.t() + layer.bias.double(),
        rtol=0,
        atol=(cols + 3) * eps * float((X.abs() @ W.abs().t()).max() + 1),
    )
    torch.testing.assert_close(x.grad.double(), G @ W, rtol=0, atol=(rows + 3) * eps * float((G.abs() @ W.abs()).max()))
    dW, bound = (G.flatten(0, 1).t() @ X.flatten(0, 1)), G.abs().flatten(0, 1).t() @ X.abs().flatten(0, 1)
    columns = cols if kind != "int4" else group
    parts, bounds = (torch.nn.functional.pad(t, (0, -cols % columns)) for t in (dW * codes, bound * codes.abs()))
    base = scaled.scales.double()
    expected = parts.view(rows, -1, columns).sum(2) * base
    single = torch.finfo(torch.float32).eps  # of the parameter, whatever the layer is in
    allowed = (bounds.view(rows, -1, columns).sum(2) * base.abs()).max() * (12 * eps + (columns + 3) * single)
    torch.testing.assert_close(scaled.change.grad.double(), expected, rtol=0, atol=float(allowed))


@pytest.mark.parametrize(("kind", "group", "symmetric"), KINDS)
def test_nothing_has_changed_at_first(kind, group, symmetric):
    layer = quantized_layer(9, 70, kind, group, symmetric)
    before = copy.deepcopy(layer.state_dict())
    scaled = ScaledLinear(layer)
    x = torch.randn(4, 70)
    toys.assert_close(scaled(x), layer(x))
    after = scaled.quantized()
    assert after is layer and all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_layers_without_inputs_or_outputs(shape, kind):
    scaled = ScaledLinear(quantized_layer(*shape, kind))
    y = scaled(torch.randn(3, shape[1]))
    y.sum().backward()
    assert y.shape == (3, shape[0]) and scaled.quantized().scales.numel() == scaled.change.numel()


def wide(make=toys.llama):
    """A teacher, and the result that its layers are cut from; large enough that int4 is a loss."""
    model = make()
    return copy.deepcopy(model), toys.toy_result(model, adapters=0)


def divergence(student, teacher):
    with torch.no_grad():
        log_p, log_q = (
            torch.cat([model(b["input_ids"]).logits for b in BATCHES]).log_softmax(-1) for model in (teacher, student)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("make", [toys.llama, toys.qwen2, toys.gpt2, toys.gemma3])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_scales_alone_learn_from_a_teacher(make, kind, tmp_path):
    _, result = wide(make)
    teacher = materialize(result, 0.7)
    taught = copy.deepcopy(teacher.state_dict())
    model = materialize(result, 0.7, quantize=kind, quantize_rounding="nearest")
    state, before = copy.deepcopy(model.state_dict()), divergence(model, teacher)
    teacher.train(make is toys.llama)
    tuned = finetune(model, BATCHES, 30, teacher=teacher, distillation=1.0, learning_rate=5e-3, progress=False)
    assert tuned.model is model and not any(isinstance(m, ScaledLinear) for m in model.modules())
    assert teacher.training == (make is toys.llama) and not model.training
    teacher.eval()
    assert len(tuned.history) == 30 and divergence(model, teacher) < 0.8 * before
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert name.endswith("scales") or torch.equal(tensor, state[name]), name
    assert all(torch.equal(t, taught[name]) for name, t in teacher.state_dict().items())
    save(model, tmp_path / "tuned")
    assert torch.equal(toys.logits(load(tmp_path / "tuned")), toys.logits(model))


def test_the_text_teaches_where_nobody_else_does():
    _, result = wide()
    model = materialize(result, 0.7, quantize="int4")
    tuned = finetune(model, BATCHES, 40, learning_rate=2e-2, progress=False)
    losses = [row["loss"] for row in tuned.history]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    labels = BATCHES[0]["input_ids"]
    again = materialize(result, 0.7, quantize="int4")
    assert losses[0] == pytest.approx(float(again(labels, labels=labels).loss.detach()), rel=1e-4)


def test_training_is_deterministic_and_accumulates():
    def tuned(batches, **options):
        model = materialize(wide()[1], 0.6, quantize="int4")
        history = finetune(model, batches, 4, learning_rate=2e-2, progress=False, **options).history
        return model.state_dict(), [row["loss"] for row in history]

    (one, _), (two, _) = tuned(BATCHES), tuned(BATCHES)
    assert all(torch.equal(t, two[name]) for name, t in one.items())
    together = [{"input_ids": torch.cat([b["input_ids"] for b in BATCHES])}]
    (_, one), (_, two) = tuned(together), tuned(BATCHES, gradient_accumulation=2)
    # The mean over both is the same to rounding, and training moves it by far more.
    assert one == pytest.approx(two, rel=1e-3) and abs(one[-1] / one[0] - 1) > 1e-2


@pytest.mark.parametrize("embeddings", [None, "int8"])
def test_the_loss_is_the_divergence_from_a_teacher_with_a_head_of_its_own(embeddings):
    teacher, (_, result) = toys.llama(seed=1), wide()
    model = materialize(result, 0.7, quantize="int4", quantize_embeddings=embeddings)
    ids = BATCHES[0]["input_ids"]
    with torch.no_grad():
        log_p, log_q = (one(ids).logits[:, :-1].log_softmax(-1) for one in (teacher, model))
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    tuned = finetune(model, BATCHES, 1, teacher=teacher, distillation=1.0, progress=False)
    assert tuned.history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_of_other_dtype_and_head_teaches():
    teacher, result = wide()
    model = materialize(result, 0.7, quantize="int4", quantize_embeddings="int8")
    tuned = finetune(model, BATCHES, 4, teacher=teacher.to(torch.bfloat16), progress=False)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in tuned.history)


@pytest.mark.skipif(not extension.available(), reason="native kernels were not built")
def test_a_fused_model_stays_so():
    _, result = wide()
    model = fuse(materialize(result, 0.6, quantize="int8"))
    assert any(isinstance(m, PivotLinear) for m in model.modules())
    before = toys.logits(model)
    finetune(model, BATCHES, 3, learning_rate=2e-2, progress=False)
    after = toys.logits(model)
    assert is_fused(model) and not torch.equal(before, after)
    toys.assert_close(after, toys.logits(copy.deepcopy(model)))


def test_mistakes_are_named_and_leave_the_model_as_it_was():
    teacher, result = wide()
    with pytest.raises(ValueError, match="teacher is for the scales of a quantized model"):
        finetune(materialize(result, 0.5), BATCHES, 1, teacher=teacher, progress=False)
    model = materialize(result, 0.5, quantize="int4")
    state = copy.deepcopy(model.state_dict())
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    other = toys.llama(vocab_size=80)
    with pytest.raises(ValueError, match="the teacher has a vocabulary of 80 tokens, and the model that it teaches 64"):
        finetune(model, BATCHES, 1, teacher=other, progress=False)
    with pytest.raises(ValueError, match="the teacher is the model itself"):
        finetune(model, BATCHES, 1, teacher=model, progress=False)
    with pytest.raises(ValueError, match="the teacher is on meta, and the model on cpu"):
        finetune(model, BATCHES, 1, teacher=copy.deepcopy(teacher).to("meta"), progress=False)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        finetune(model, BATCHES, 1, learning_rate=-1.0, progress=False)
    with pytest.raises(ValueError, match="distillation must be from 0 to 1"):
        finetune(model, BATCHES, 1, teacher=teacher, distillation=2, progress=False)
    with pytest.raises(ValueError, match="batches ran out after 2 batches"):
        finetune(model, iter(BATCHES), 5, learning_rate=1e-9, progress=False)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0: loss nan"):
        finetune(model, BATCHES, 1, progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) or name == "model.norm.weight", name
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
