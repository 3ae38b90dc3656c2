"""Training at sizes drawn at random: gradients, determinism, resuming, and what the result then is."""

import json
import math
import sys

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from acip_kernels import (
    CompressionResult,
    NestedConfig,
    RankingConfig,
    Sizing,
    compress,
    files,
    load,
    materialize,
)
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.compress.loop import CHECKPOINT, HISTORY
from acip_kernels.compress.nested import RANKING, NestedTraining, size_of_batch
from acip_kernels.models import distill
from acip_kernels.nn.nested_linear import NestedLinear, balanced, takes_effective_weight
from acip_kernels.ops import extension

BATCHES = [{"input_ids": toys.token_ids(seed=seed)} for seed in range(4)]
SHORT = {"steps": 6, "warmup_steps": 2, "learning_rate": 1e-3, "calibration_batches": 4, "dtype": "float32"}


def run(model=None, batches=BATCHES, **options):
    fields = {key: options.pop(key) for key in list(options) if key in NestedConfig.__dataclass_fields__}
    return compress(model or toys.llama(), batches, NestedConfig(**SHORT | fields), progress=False, **options)


# ---- the layer


@pytest.mark.parametrize("tokens", [1, 5, 60])
@pytest.mark.parametrize("shape", [(7, 5, 9), (8, 8, 8), (20, 12, 12)])
def test_value_and_gradients_by_either_way(shape, tokens):
    """Against autograd through the plain formula, in float64 and at every rank."""
    out, k, in_ = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    layer = NestedLinear(random(out, k), random(k).abs(), random(k, in_), random(out), update_rank=3).double()
    names = ("left_A", "left_B", "right_A", "right_B")
    with torch.no_grad():
        for name in names:
            getattr(layer, name).copy_(random(*getattr(layer, name).shape))
    ways = set()
    for rank in range(1, k + 1):
        layer.rank = rank
        ways.add(takes_effective_weight(tokens, in_, out, rank))
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x, g = random(1, tokens, in_).requires_grad_(), random(1, tokens, out)
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, g)
        px, left_A, left_B, right_A, right_B = plain = [
            tensor.detach().clone().requires_grad_() for tensor in (x, *(getattr(layer, name) for name in names))
        ]
        left, right = layer.left_t.t() + left_B @ left_A, layer.right + right_B @ right_A
        expected = (px @ right[:rank].t()) @ left[:, :rank].t() + layer.bias
        gradients = torch.autograd.grad(expected, plain, g)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dx, gradients[0])
        for name, gradient in zip(names, gradients[1:], strict=True):
            torch.testing.assert_close(getattr(layer, name).grad, gradient)
        # A second pass adds to what is there, as autograd does; without a gradient, the same value.
        layer(x).backward(g)
        for name, gradient in zip(names, gradients[1:], strict=True):
            torch.testing.assert_close(getattr(layer, name).grad, 2 * gradient)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
    if tokens == 60:
        assert ways == {True, False}


def test_the_cheaper_way_is_the_one_with_fewer_operations():
    for tokens in (1, 64, 1024):
        for out, in_ in ((576, 576), (192, 576), (576, 1536)):
            for rank in (1, 100, min(out, in_)):
                factored = 4 * tokens * rank * (in_ + out)
                effective = 2 * in_ * out * (2 * tokens + rank)
                assert takes_effective_weight(tokens, in_, out, rank) == (effective < factored)


def test_balanced_factors_are_the_same_product():
    generator = torch.Generator().manual_seed(0)
    U, Vh = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((6, 4), (4, 9)))
    S = torch.tensor([3.0, 1.0, 1e-9, 0.0], dtype=torch.float64)
    left, right = balanced(U, S, Vh)
    torch.testing.assert_close(left @ right, (U * S) @ Vh)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_updates_start_at_nothing_and_are_part_of_the_factors():
    generator = torch.Generator().manual_seed(0)
    U, Vh = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((6, 4), (4, 9)))
    S = torch.tensor([3.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    layer = NestedLinear(U, S, Vh, update_rank=2, generator=generator).double()
    x = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    # The factors are held in float32.
    torch.testing.assert_close(layer(x), x @ Vh.t() @ (U * S).t(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.left_B.normal_(generator=generator)
        layer.right_B.normal_(generator=generator)
    layer.forget_updates()
    Ut, S, Vh = layer.factors()
    for rank in (1, 3, 4):
        layer.rank = rank
        torch.testing.assert_close(layer(x), x @ Vh[:rank].t() @ (Ut[:rank].t() * S[:rank]).t())


# ---- the run


@pytest.mark.parametrize("name", toys.MODELS)
def test_every_kind_of_model(name):
    ranked = RankingConfig(calibration_batches=4, dtype="float32")
    before = svd_layers(compress(toys.MODELS[name](), BATCHES, ranked, progress=False).model)
    result = run(toys.MODELS[name](), learning_rate=1e-9, steps=2)
    # With next to no learning rate the factors are the ranking's, rounded on the way to two equal norms and back.
    for layer_name, layer in svd_layers(result.model).items():
        old = before[layer_name]
        assert torch.equal(layer.scores, old.scores) and bool((layer.scores > 0).all())
        sums = (old.U.abs() * old.S) @ old.Vh.abs()
        # Some six roundings of every factor, and the sum of k terms; two steps of 1e-9 on either factor.
        atol = (6 + layer.full_rank) * torch.finfo(torch.float32).eps * float(sums.max()) + 1e-6
        torch.testing.assert_close(layer.effective_weight(), old.effective_weight(), rtol=0, atol=atol)
    # What is small is close at size one, and every size is a model.
    for size in (1.0, 0.7, 0.3):
        small = materialize(result, size)
        assert torch.isfinite(toys.logits(small)).all()


def test_training_lowers_the_loss_at_every_size():
    batches = [{"input_ids": toys.token_ids(4, 16, seed=seed)} for seed in range(2)]
    before = run(batches=batches, learning_rate=1e-9, steps=1)
    after = run(batches=batches, learning_rate=5e-3, steps=60)
    for size in (0.9, 0.6, 0.4):
        losses = []
        for result in (before, after):
            model = materialize(result, size)
            ids = batches[0]["input_ids"]
            losses.append(float(model(ids, labels=ids).loss))
        assert losses[1] < losses[0]


def test_a_smaller_model_is_a_part_of_a_larger_one():
    result = run()
    larger = result.cut(0.8)
    for size in (0.6, 0.4):
        smaller = result.cut(size)
        assert all(bool((larger.live[name] | ~smaller.live[name]).all()) for name in larger.live)
        larger = smaller


def test_the_run_is_deterministic_and_its_history_complete(tmp_path):
    first, second = run(output=tmp_path / "a"), run()
    for name, layer in svd_layers(first.model).items():
        assert torch.equal(layer.U, svd_layers(second.model)[name].U)
    rows = [json.loads(line) for line in (tmp_path / "a" / HISTORY).read_text().splitlines()]
    assert rows == first.history and [row["step"] for row in rows] == list(range(6))
    for row, config in zip(rows, [first.config] * 6):
        assert config.smallest_ratio <= row["size_ratio"] <= config.largest_ratio
        assert row["learning_rate"] == config.rate_at(row["step"])
        assert math.isfinite(row["loss"]) and row["gradient_norm"] > 0
    assert not torch.equal(svd_layers(run(seed=1).model)[name].U, layer.U)


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    expected = run()

    def stop(row):
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(output=tmp_path / "run", checkpoint_seconds=0, on_step=stop)
    assert (tmp_path / "run" / RANKING).exists()

    def forbidden(*args, **kwargs):
        raise AssertionError("ranked anew")

    # By the module: the package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules[NestedTraining.__module__], "rank_singular_values", forbidden)
    result = run(output=tmp_path / "run", resume=True, checkpoint_seconds=0)
    layers = svd_layers(result.model)
    for name, layer in svd_layers(expected.model).items():
        for key in ("U", "S", "Vh", "scores"):
            assert torch.equal(getattr(layer, key), getattr(layers[name], key)), (name, key)
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in result.history] == [
        {k: v for k, v in row.items() if k not in drop} for row in expected.history
    ]


def test_an_acip_runs_checkpoint_is_not_a_nested_runs(tmp_path):
    run(output=tmp_path / "run")
    with pytest.raises(ValueError, match="holds the checkpoint of a run"):
        run(output=tmp_path / "run")
    from acip_kernels import CompressionConfig

    with pytest.raises(ValueError, match="another method"):
        compress(
            toys.llama(), BATCHES, CompressionConfig.short(4), output=tmp_path / "run", resume=True, progress=False
        )
    with pytest.raises(ValueError, match="learning_rate was 0.001, is 0.5"):
        run(output=tmp_path / "run", resume=True, learning_rate=0.5)
    assert (tmp_path / "run" / CHECKPOINT).exists()


def test_a_step_that_is_not_finite_changes_nothing():
    model = toys.llama()
    compress(model, BATCHES, RankingConfig(calibration_batches=2), progress=False)
    training = NestedTraining(model, Sizing.of(model, adapters=False), NestedConfig(**SHORT))
    before = {name: tensor.detach().clone() for name, tensor in training.parameters.items()}
    broken = {"input_ids": toys.token_ids()}
    training.loss = lambda batch, counted: model(**batch).loss * math.inf
    loss, norm = training([broken], [0.5], 1e-3)
    assert not (math.isfinite(loss) and math.isfinite(norm))
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.parameters.items())


def test_saved_and_loaded_it_is_the_same(tmp_path):
    result = run()
    result.save(tmp_path / "elastic")
    again = CompressionResult.load(tmp_path / "elastic")
    assert again.config == result.config and again.history == result.history
    for size in (1.0, 0.6, 0.35):
        toys.assert_close(toys.logits(load(tmp_path / "elastic", size)), toys.logits(materialize(result, size)))
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        result.save(tmp_path / "compact", compact=True, base_model="x")


def test_factors_keep_what_rounding_is_to_know(tmp_path):
    """The lengths of their basis, and of a wide layer the variances of its inputs; in every way to a model."""
    config = RankingConfig(method="importance", calibration_batches=4, dtype="float32")
    ranked = svd_layers(compress(toys.llama(), BATCHES, config, progress=False).model)
    result = run(output=tmp_path / "run")
    trained = svd_layers(result.model)
    for name, layer in trained.items():
        for one, other in ((layer.U.t(), ranked[name].U.t()), (layer.Vh, ranked[name].Vh)):
            torch.testing.assert_close(one.norm(dim=1), other.norm(dim=1), rtol=1e-5, atol=0)
        assert (layer.input_variances is not None) == (layer.in_features > layer.out_features)
        if layer.input_variances is not None:
            assert torch.equal(layer.input_variances, ranked[name].input_variances)
    wide = next(name for name, layer in trained.items() if layer.input_variances is not None)
    # A finished run, and one that was stopped after its ranking, have it from the ranking's file.
    resumed = run(output=tmp_path / "run", resume=True)
    assert torch.equal(svd_layers(resumed.model)[wide].input_variances, trained[wide].input_variances)
    result.save(tmp_path / "elastic")
    again = CompressionResult.load(tmp_path / "elastic", dtype=torch.bfloat16)
    assert torch.equal(svd_layers(again.model)[wide].input_variances, trained[wide].input_variances)
    again.save(tmp_path / "again")
    cut, read = materialize(result, 0.6, quantize="int4"), load(tmp_path / "elastic", 0.6, quantize="int4")
    state = cut.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.state_dict().items())
    for change, message in ((lambda t: t[:-1], "fits the others"), (lambda t: t / 0, "not finite")):
        path = tmp_path / "again" / "elastic.safetensors"
        tensors = files.read_tensors(path)
        files.write_tensors(path, tensors | {f"{wide}.input_variances": change(tensors[f"{wide}.input_variances"])})
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "again")
        files.write_tensors(path, tensors)


def test_gradient_accumulation_takes_a_size_for_each_batch():
    result = run(gradient_accumulation=2, steps=3)
    assert len(result.history) == 3


@given(st.integers(0, 500), st.integers(1, 400), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_the_rate_rises_then_falls(step, steps, warmup):
    config = NestedConfig(steps=steps, warmup_steps=warmup)
    step = min(step, steps - 1)
    assert 0 <= config.rate_at(step) <= config.learning_rate * (1 + 1e-12)
    if step + 1 < warmup:
        assert config.rate_at(step) < config.rate_at(step + 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"smallest_ratio": 0.0}, "smallest_ratio"),
        ({"smallest_ratio": 0.9, "largest_ratio": 0.8}, "largest_ratio"),
        ({"steps": 0}, "steps"),
        ({"update_rank": 0}, "update_rank"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"method": "guess"}, "method must be one of"),
        ({"allocation": "uniform"}, "allocation of importance must be one of"),
        ({"gradient_share": 1.5}, "gradient_share must be from 0 to 1, got 1.5"),
        ({"forms": ("round",)}, "forms must be some of"),
        ({"calibration_batches": 0}, "calibration_batches"),
        ({"dtype": "int8"}, "dtype"),
        ({"distillation": 1.5}, "distillation"),
    ],
)
def test_bad_constants_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NestedConfig(**fields)


def test_a_configuration_comes_back():
    config = NestedConfig(steps=7, forms=("dense", "factors"), exclude=("o_proj",))
    assert NestedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="no field colour"):
        NestedConfig.from_dict(config.to_dict() | {"colour": 1})


# ---- what the dense model teaches


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_the_soft_loss_and_its_gradient(w, head, native, monkeypatch):
    """Against autograd through the formula in float64; in blocks of rows, the last one smaller."""
    monkeypatch.setattr(distill, "_CHUNK_ELEMENTS", 1)  # 24 rows at a time
    monkeypatch.setattr(distill, "_ROW_ELEMENTS", 55)  # 5 of them
    if not native:
        monkeypatch.setattr(extension, "takes", lambda x: False)
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tokens, in_, classes = 70, 6, 11
    x, teacher = random(tokens, in_ if head else classes).requires_grad_(), random(tokens, in_ if head else classes)
    weight, bias = (random(classes, in_), random(classes)) if head else (None, None)
    labels = torch.randint(classes, (tokens,), generator=generator)
    loss = distill.soft_cross_entropy(x, teacher, labels, weight, bias, w)
    log_q, log_p = ((s @ weight.t() + bias if head else s).log_softmax(1) for s in (x, teacher))
    hard = torch.nn.functional.nll_loss(log_q, labels, reduction="sum")
    soft = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    expected = (1 - w) * hard + w * soft
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, x)[0], 3 * torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("lean", [True, False])
def test_the_teacher_is_the_dense_model(lean):
    dense, model = toys.llama(), toys.llama()
    compress(model, BATCHES, RankingConfig(calibration_batches=2, dtype="float32"), progress=False)
    training = NestedTraining(model, Sizing.of(model, adapters=False), NestedConfig(**SHORT | {"distillation": 1.0}))
    training.set_size(0.4)
    model.eval()
    with training.teaching():
        taught = toys.logits(model)
    expected = toys.logits(dense)
    # The factors' product instead of the weight: through a damped factor and its inverse.
    assert float((taught - expected).abs().max()) <= 2e-2 * float(expected.abs().max())
    assert float((toys.logits(model) - expected).abs().max()) > 0.1 * float(expected.abs().max())
    training.loss.plain.lean = lean
    batch = {"input_ids": toys.token_ids(), "labels": toys.token_ids()}
    student, labels = model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    assert len(labels) == len(student)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(1), taught[:, :-1].flatten(0, 1).log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert float(training.loss(batch)) == pytest.approx(float(expected), rel=1e-4)


def test_without_a_teacher_the_loss_is_the_models_own():
    model = toys.llama()
    compress(model, BATCHES, RankingConfig(calibration_batches=2, dtype="float32"), progress=False)
    training = NestedTraining(model, Sizing.of(model, adapters=False), NestedConfig(**SHORT | {"distillation": 0.0}))
    assert all(layer.dense is None for layer in training.layers.values())
    batch = {"input_ids": toys.token_ids(), "labels": toys.token_ids()}
    assert float(training.loss(batch)) == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_sizes_are_spread_evenly_over_any_stretch_of_a_run():
    config = NestedConfig(smallest_ratio=0.3, largest_ratio=0.9, seed=5)
    assert [size_of_batch(config, number) for number in (7, 8)] == [size_of_batch(config, n) for n in (7, 8)]
    assert size_of_batch(config, 0) != size_of_batch(NestedConfig(smallest_ratio=0.3, largest_ratio=0.9, seed=6), 0)
    for first in (0, 13, 400):
        places = sorted((size_of_batch(config, first + n) - 0.3) / 0.6 for n in range(21))
        gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + 1], strict=True)]
        # By the three-gap theorem a Fibonacci number of points leaves gaps of two lengths.
        assert places[0] >= 0 and places[-1] <= 1 and max(gaps) < 2 / 21, max(gaps)
