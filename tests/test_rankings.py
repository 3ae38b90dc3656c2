"""The rankings without training: bases, allocations, and that every method yields any size of any model."""

import copy
import itertools

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from acip_kernels import LowRankLinear, RankingConfig, Sizing, compress, materialize
from acip_kernels.compress.basis import damped_cholesky, input_covariances, layer_covariances, whitened_svd
from acip_kernels.compress.factorize import factorize, svd_layers
from acip_kernels.compress.importance import _pooled, gradient_importance, scores_by_worth
from acip_kernels.compress.methods import ALLOCATIONS, theoretical_loss_scores, uniform_scores
from acip_kernels.compress.step import with_labels

BATCHES = [{"input_ids": toys.token_ids(seed=seed)} for seed in range(4)]
CPU = torch.device("cpu")
ALL = [(method, allocation) for method, allocations in ALLOCATIONS.items() for allocation in allocations]


def ranked(model, **options):
    return compress(model, BATCHES, RankingConfig(calibration_batches=4, dtype="float32", **options), progress=False)


@pytest.mark.parametrize("name", toys.MODELS)
@pytest.mark.parametrize(("method", "allocation"), ALL)
def test_every_method_gives_any_size_of_any_model(name, method, allocation):
    result, again = (ranked(toys.MODELS[name](), method=method, allocation=allocation) for _ in range(2))
    for layer, scores in result.scores.items():
        assert torch.equal(scores, again.scores[layer])  # deterministic
        assert bool((scores > 0).all()) and torch.isfinite(scores).all()
    cut = None
    for size in (0.9, 0.5, 0.2):
        cut, model = result.cut(size), materialize(result, size)
        assert size - 0.05 < cut.ratios["factorized"] <= size
        assert torch.isfinite(toys.logits(model)).all()
    # Nothing is lost at full rank. In float64: through a factor of either covariance and its inverse, whose conditions
    # the damping bounds by √(48 / 1e-5), about 2e3 each, times a thousand roundings of 2e-16 behind each other.
    exact = RankingConfig(method=method, allocation=allocation, calibration_batches=4, dtype="float64")
    whole = toys.logits(compress(toys.MODELS[name](), BATCHES, exact, progress=False).at(1.0))
    dense = toys.logits(toys.MODELS[name]().double())
    assert float((whole - dense).abs().max()) <= 2e3 * 2e3 * 1e3 * 2e-16 * float(dense.abs().max())


@pytest.mark.parametrize("forms", [("dense", "factors"), ("dense", "factors", "pivoted")])
def test_uniform_cuts_every_layer_alike(forms):
    result = ranked(toys.llama(), method="svd_llm", allocation="uniform", forms=forms)
    for size in (0.8, 0.5, 0.3):
        cut = result.cut(size, forms=forms)
        shares = cut.sizing.parameters(cut.ranks).double() / cut.sizing.dense
        # A rank more or less of the largest step between two.
        steps = (cut.sizing.out + cut.sizing.in_).double() / cut.sizing.dense
        assert float((shares - size).abs().max()) <= float(steps.max())


def test_v2_takes_less_from_layers_that_lose_more():
    """In a group, a layer with larger singular values keeps more."""
    model = toys.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(100)
    result = ranked(model, method="svd_llm", allocation="loss", forms=("dense", "factors"))
    for size in (0.7, 0.5):
        ranks = dict(zip(result.scores, result.cut(size, forms=("dense", "factors")).ranks.tolist()))
        assert ranks["model.layers.0.mlp.up_proj"] > ranks["model.layers.1.mlp.up_proj"]


def test_sensitivity_keeps_the_layer_that_the_loss_needs():
    model = toys.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)  # hardly reaches the output
    result = ranked(model, method="asvd", allocation="sensitivity")
    ranks = dict(zip(result.scores, result.cut(0.5).ranks.tolist()))
    assert ranks["model.layers.1.mlp.down_proj"] < ranks["model.layers.0.mlp.down_proj"]


# ---- bases


def random_covariance(n, rank, seed):
    x = torch.randn(rank, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.t() @ x / rank


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_truncation_error_is_the_closed_form_and_the_least(shape, two_sided):
    """SVD-LLM's theorem, and its two-sided form: the loss of the quadratic form is the sum of what was cut, squared."""
    out, in_ = shape
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out, in_, dtype=torch.float64, generator=generator)
    X, G = random_covariance(in_, 50, 2), random_covariance(out, 50, 3) if two_sided else None
    U, S, Vh = whitened_svd(weight, X, G)
    torch.testing.assert_close((U * S) @ Vh, weight)
    # The same damping as the decomposition saw.
    L = damped_cholesky(X, CPU)
    M = damped_cholesky(G, CPU) if two_sided else torch.eye(out, dtype=torch.float64)

    def loss(difference):
        return float((M.t() @ difference @ L).square().sum())

    for rank in range(1, min(shape)):
        cut = weight - (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert loss(cut) == pytest.approx(float(S[rank:].square().sum()), rel=1e-9)
        for _ in range(5):
            other = torch.randn(out, rank, dtype=torch.float64, generator=generator)
            best = torch.linalg.lstsq(M.t() @ other, M.t() @ weight @ L).solution
            difference = M.t() @ other @ best - M.t() @ weight @ L
            assert float(difference.square().sum()) >= float(S[rank:].square().sum()) * (1 - 1e-9)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 12), st.integers(-30, 30))
@settings(max_examples=60, deadline=None)
def test_a_covariance_of_any_rank_and_scale_works(seed, n, rank, decade):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, n, dtype=torch.float64, generator=generator)
    covariance = random_covariance(n, rank, seed) * 10.0**decade if rank else torch.zeros(n, n, dtype=torch.float64)
    U, S, Vh = whitened_svd(weight, covariance)
    # Through a factor and its inverse, whose condition the damping bounds by √(n / 1e-5).
    torch.testing.assert_close((U * S) @ Vh, weight, rtol=0, atol=1e-9)


def test_covariances_that_are_not_finite_are_refused():
    covariance = torch.eye(4, dtype=torch.float64)
    covariance[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        whitened_svd(torch.randn(3, 4), covariance)


def test_covariances_are_those_of_inputs_and_gradients():
    model, name = toys.llama(), "model.layers.1.mlp.down_proj"
    batches = [with_labels(batch, CPU) for batch in BATCHES]
    inputs, gradients = layer_covariances(model, [name], batches, gradient_share=0.3)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    unweighed, _ = layer_covariances(model, [name], batches, gradient_share=0.0)
    torch.testing.assert_close(unweighed[name], input_covariances(model, [name], batches)[name])
    xs, gs = [], []
    layer = model.get_submodule(name)
    for batch in batches:
        kept = []
        handle = layer.register_forward_hook(lambda module, args, output, kept=kept: kept.extend((args[0], output)))
        loss = model(**batch).loss * batch["labels"][:, 1:].numel()
        handle.remove()
        xs.append(kept[0].detach().flatten(0, 1).double())
        gs.append(torch.autograd.grad(loss, kept[1])[0].flatten(0, 1).double())
        squares = gs[-1].square().sum(1, keepdim=True)
        xs[-1] *= (0.7 + 0.3 * squares / squares.mean()).sqrt()
    for values, found in ((torch.cat(xs), inputs[name]), (torch.cat(gs), gradients[name])):
        # Sums over 24 tokens in float32 a batch.
        torch.testing.assert_close(found, values.t() @ values / len(values), rtol=1e-4, atol=1e-6 * float(found.max()))


def test_a_ranking_weighs_inputs_by_the_share_that_it_is_given():
    name, batches = "model.layers.1.mlp.down_proj", [{"input_ids": toys.token_ids(2)}]
    for share in (0.0, 0.9):
        config = RankingConfig(method="importance", calibration_batches=1, dtype="float32", gradient_share=share)
        ranked = svd_layers(compress(toys.llama(), batches, config, progress=False).model)[name]
        labelled = [with_labels(batch, CPU) for batch in batches]
        inputs, _ = layer_covariances(toys.llama(), [name], labelled, gradient_share=share)
        torch.testing.assert_close(ranked.input_variances, inputs[name].diagonal().float())
        unweighed = input_covariances(toys.llama(), [name], labelled)[name].diagonal().float()
        assert torch.allclose(ranked.input_variances, unweighed) == (share == 0)


def test_a_layer_without_gradients_has_its_inputs_as_they_are():
    model = toys.llama()
    batch = with_labels(BATCHES[0], CPU)
    unread = batch | {"labels": torch.full_like(batch["labels"], -100)}  # no token is to be predicted
    name = "model.layers.0.self_attn.v_proj"
    inputs, gradients = layer_covariances(model, [name], [unread])
    torch.testing.assert_close(inputs[name], input_covariances(model, [name], [batch])[name])
    assert not gradients[name].any()


def test_a_layer_that_no_batch_reaches_has_zeros_whatever_its_form():
    model = toys.llama()
    for unused in (torch.nn.Linear(8, 6), LowRankLinear(8, 6, 2)):
        model.unused = unused
        inputs, gradients = layer_covariances(
            model, ["unused", "model.layers.0.mlp.up_proj"], [with_labels(BATCHES[0], CPU)]
        )
        assert torch.equal(inputs["unused"], torch.zeros(8, 8, dtype=torch.float64))
        assert torch.equal(gradients["unused"], torch.zeros(6, 6, dtype=torch.float64))


def test_the_curvature_predicts_what_the_loss_rises_by():
    """Across layers: in the order of ranks, prediction and measured gradient agree."""
    model = toys.llama()
    batches = [with_labels(batch, CPU) for batch in BATCHES]
    names = [name for name in dict(model.named_modules()) if name.endswith("_proj")]
    inputs, gradients = layer_covariances(model, names, batches)
    factorize(model, adapter_rank=0, covariances=inputs, gradient_covariances=gradients)
    predicted = torch.cat([layer.S.double() ** 2 for layer in svd_layers(model).values()])
    measured = torch.cat(list(gradient_importance(model, batches).values()))
    ranks = [values.argsort().argsort().double() for values in (predicted, measured)]
    # Of some 400 entries; orders that have nothing to do with each other would give 0 ± 0.05.
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.7


# ---- importance


def test_importance_is_the_square_of_the_masks_gradient():
    model = toys.llama()
    factorize(model, adapter_rank=0)
    layers, rows = svd_layers(model), toys.token_ids(2)
    found = gradient_importance(copy.deepcopy(model), [{"input_ids": rows}])
    expected = {name: torch.zeros(layer.full_rank, dtype=torch.float64) for name, layer in layers.items()}
    for row in rows:
        model.zero_grad()
        (model(row[None], labels=row[None]).loss * (len(row) - 1)).backward()
        for name, layer in layers.items():
            expected[name] += (layer.mask.grad.double() * layer.mask_scale) ** 2 / 2
    for name in layers:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].max()))
    with pytest.raises(ValueError, match="batches are empty"):
        gradient_importance(model, [])


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_pooled_slopes_fall_and_keep_the_sum(pairs):
    gains, costs = [gain for gain, _ in pairs], [float(cost) for _, cost in pairs]
    slopes = _pooled(gains, costs)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(slopes))
    assert sum(s * c for s, c in zip(slopes, costs)) == pytest.approx(sum(gains), abs=1e-9)


def test_worth_loses_the_least_importance_for_what_it_saves():
    """Against every way to cut two small layers to the same number of parameters."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 7, bias=False))
    factorize(model, adapter_rank=0)
    sizing = Sizing.of(model, forms=("pivoted",))
    generator = torch.Generator().manual_seed(0)
    importance = {
        name: torch.rand(k, generator=generator).sort(descending=True).values.double() ** 2
        for name, k in zip(sizing.names, sizing.full_rank.tolist())
    }
    scores = scores_by_worth(importance, sizing)
    for size in (0.9, 0.7, 0.5):
        live = sizing.cut(scores, size)
        ranks = torch.stack([kept.sum() for kept in live.values()])
        lost = sum(float(importance[name][~live[name]].sum()) for name in live)
        # The best of all pairs of ranks of this size or less; the greedy cut may stop one entry after it.
        best = min(
            sum(float(values[r:].sum()) for values, r in zip(importance.values(), pair))
            for pair in itertools.product(range(6), range(6))
            if int(sizing.parameters(torch.tensor(pair)).sum()) <= int(sizing.parameters(ranks).sum())
        )
        assert lost <= best + max(float(values.max()) for values in importance.values())
        assert sizing.ratio(ranks) <= size


def test_uniform_scores_fall_with_rank():
    model = toys.llama()
    factorize(model, adapter_rank=0)
    for scores in uniform_scores(Sizing.of(model)).values():
        assert bool((scores[1:] < scores[:-1]).all())


def test_theoretical_loss_allocates_by_the_error_of_each_layer_of_a_group():
    """SVD-LLM v2: the largest go last, and of like layers the one whose tail is larger is cut less."""
    model = torch.nn.ModuleDict(
        {str(i): torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 32, bias=False)}) for i in range(2)}
    )
    factorize(model, adapter_rank=0)
    sizing = Sizing.of(model, forms=("pivoted",))
    flat, steep = torch.full((32,), 100.0), 100.0 * 0.5 ** torch.arange(32)
    values = {"0.q_proj": steep, "1.q_proj": flat}
    scores = theoretical_loss_scores(values, sizing, tokens=1000)
    for score in scores.values():
        assert bool((score[1:] < score[:-1]).all())
    for size in (0.9, 0.7, 0.5):
        live = sizing.cut(scores, size)
        ranks = {name: int(kept.sum()) for name, kept in live.items()}
        assert 0 < ranks["0.q_proj"] < ranks["1.q_proj"]
        assert size - 0.1 < sizing.ratio(torch.tensor(list(ranks.values()))) <= size
        for kept in live.values():
            assert bool(kept[: int(kept.sum())].all())
    # Layers that lose as much are cut alike, as by the uniform allocation.
    alike = theoretical_loss_scores({"0.q_proj": flat, "1.q_proj": flat}, sizing, tokens=1000)
    for size in (0.8, 0.4):
        ranks = [int(kept.sum()) for kept in sizing.cut(alike, size).values()]
        uniform = [int(kept.sum()) for kept in sizing.cut(uniform_scores(sizing), size).values()]
        assert all(abs(a - b) <= 1 for a, b in zip(ranks, uniform))


def test_covariances_are_given_back_layer_by_layer_and_only_if_asked():
    model = toys.llama()
    names = [name for name, module in model.named_modules() if name.endswith("down_proj")]
    covariances = {name: torch.eye(48, dtype=torch.float64) for name in names}
    kept, left = [], dict(covariances)
    factorize(toys.llama(), names, covariances=covariances)
    factorize(model, names, covariances=left, release=True, each=lambda layer: kept.append(len(left)))
    assert list(covariances) == names and kept == [1, 0]
