"""Any size from one result: which singular values stay, what is stored, and what the model then computes."""

import copy
import itertools
import logging
import math

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from toys import assert_close, logits
from transformers.pytorch_utils import Conv1D

import acip_kernels
from acip_kernels import (
    LowRankLinear,
    PivotLinear,
    RankingConfig,
    Sizing,
    SVDLinear,
    compress,
    data,
    evaluate,
    load,
    materialize,
    save,
)
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.compress.materialize import layer_tensors
from acip_kernels.compress.pivot import BOUND
from acip_kernels.compress.sizing import COUNTS, FORMS
from acip_kernels.nn.pivot_linear import unpack_bits

SIZES = (1.0, 0.8, 0.5, 0.25)


@pytest.fixture(scope="module", params=toys.MODELS)
def result(request):
    return toys.toy_result(toys.MODELS[request.param]())


@pytest.fixture(scope="module")
def llama_result():
    return toys.toy_result(toys.llama())


# ---- the same function


@pytest.mark.parametrize("size_ratio", SIZES)
def test_a_model_computes_what_the_result_does(result, size_ratio):
    model = materialize(result, size_ratio, adapters="merge")
    assert_close(logits(model), logits(result.at(size_ratio)))


@pytest.mark.parametrize("name", toys.MODELS)
def test_in_double_precision_nothing_but_rounding_is_left(name):
    result = toys.toy_result(toys.MODELS[name]().double())
    for size_ratio in SIZES:
        model = materialize(result, size_ratio, adapters="merge")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        # Some hundreds of roundings of 1e-16, of logits up to some tens, through norms that divide.
        torch.testing.assert_close(logits(model), logits(result.at(size_ratio)), rtol=0, atol=1e-10)


def test_sizes_follow_each_other_in_any_order(llama_result):
    alone = {size_ratio: logits(copy.deepcopy(llama_result).at(size_ratio)) for size_ratio in (0.4, 0.6, 0.9, 1.0)}
    for size_ratio in (0.6, 0.9, 0.4, 1.0, 0.4, 0.6):
        assert torch.equal(logits(llama_result.at(size_ratio)), alone[size_ratio])


@pytest.mark.parametrize("name", toys.MODELS)
def test_full_size_without_trained_adapters_is_the_dense_model(name):
    model, text = toys.MODELS[name](), toys.token_ids(1, 60)[0]
    expected, perplexity = logits(model), evaluate.perplexity(model, text, context=20)
    acip_kernels.factorize(model, adapter_rank=2)
    result = acip_kernels.CompressionResult(model)
    for same in (result.at(1.0), materialize(result, 1.0)):
        assert_close(logits(same), expected)
        assert evaluate.perplexity(same, text, context=20).value == pytest.approx(perplexity.value, rel=1e-4)


# ---- an ordinary, independent model


def test_nothing_of_the_training_is_left(result):
    model = materialize(result, 0.6)
    assert not any(isinstance(module, SVDLinear) for module in model.modules())
    ends = {name.rsplit(".", 1)[-1] for name in model.state_dict()}
    assert not ends & {"mask", "scores", "S", "U", "Vh", "lora_A", "lora_B"}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_model_and_result_are_independent(result):
    before, cut_before = logits(result.at(0.7)), logits(materialize(result, 0.7))
    state = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    model = materialize(result, 0.7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(0.5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in result.model.state_dict().items())
    assert torch.equal(logits(result.at(0.7)), before)

    other = copy.deepcopy(result)
    model = materialize(other, 0.7)
    with torch.no_grad():
        for tensor in other.model.state_dict().values():
            tensor.zero_()
    assert torch.equal(logits(model), cut_before)
    assert torch.equal(logits(materialize(result, 0.7)), cut_before)  # and cut again


def test_a_model_and_its_result_give_the_same(llama_result):
    assert torch.equal(logits(materialize(llama_result.model, 0.5)), logits(materialize(llama_result, 0.5)))


def test_any_module_can_be_cut():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6, bias=False))
    acip_kernels.factorize(model, adapter_rank=0)
    acip_kernels.score_by_singular_values(model)
    new = materialize(model, 0.6)
    assert [type(module) for module in new] == [PivotLinear, nn.Tanh, PivotLinear]
    plain = materialize(model, 0.6, forms=("factors",))
    assert [type(module) for module in plain] == [LowRankLinear, nn.Tanh, LowRankLinear]
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert_close(new(x), acip_kernels.CompressionResult(model).at(0.6)(x))


def test_the_training_state_is_kept():
    result = toys.toy_result(toys.llama())
    result.model.train()
    assert all(module.training for module in materialize(result, 0.5).modules())


# ---- forms


@pytest.mark.parametrize("forms", [("dense", "factors", "pivoted"), ("pivoted",), ("dense", "factors"), ("dense",)])
def test_every_layer_takes_its_cheapest_form(result, forms):
    kinds = set()
    for size_ratio in (1.0, 0.9, 0.8, 0.3):
        if forms == ("dense",) and size_ratio < 1:
            continue  # nothing can be saved
        cut, model = result.cut(size_ratio, forms=forms), materialize(result, size_ratio, forms=forms)
        for (name, layer), rank in zip(svd_layers(result.model).items(), cut.ranks.tolist()):
            new, rank = model.get_submodule(name), rank + layer.adapter_rank
            out, in_ = layer.out_features, layer.in_features
            sizes = {nn.Linear: out * in_}
            if "factors" in forms:
                sizes[LowRankLinear] = rank * (out + in_)
            if "pivoted" in forms and rank < min(out, in_):
                sizes[PivotLinear] = rank * (out + in_ - rank) + math.ceil(out / 8)
            smallest = min(sizes, key=sizes.get)
            assert type(new) is (Conv1D if smallest is nn.Linear and layer.source_type == "Conv1D" else smallest)
            if smallest is LowRankLinear:
                assert new.rank == rank
                assert new.Vh.weight.numel() + new.U.weight.numel() == sizes[smallest]
            elif smallest is PivotLinear:
                assert new.rank == rank
                assert new.P.weight.numel() + new.C.weight.numel() + new.is_pivot.numel() == sizes[smallest]
            else:
                assert new.weight.numel() == out * in_
            kinds.add(type(new))
    assert len(kinds) > 1 or forms == ("dense",)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_rank_zero_is_the_bias_alone(name):
    result = toys.toy_result(toys.MODELS[name](), adapters=0)
    layers = svd_layers(result.model)
    first = next(iter(layers))
    layers[first].scores.sub_(100)
    model = materialize(result, 0.4)
    new = model.get_submodule(first)
    assert (type(new), new.rank) == (LowRankLinear, 0)
    x = torch.randn(3, 32)
    assert torch.equal(new(x), layers[first].bias.expand(3, -1))
    assert_close(logits(model), logits(result.at(0.4)))


def test_every_layer_of_rank_zero():
    result = toys.toy_result(toys.llama(), adapters=0)
    model = materialize(result, 1e-6)
    assert set(result.cut(1e-6).ranks.tolist()) == {0}
    assert_close(logits(model), logits(result.at(1e-6)))


# ---- adapters


@pytest.mark.parametrize("size_ratio", [0.7, 0.3, 0.05])
def test_truncated_adapters_are_the_best_approximation(result, size_ratio):
    """Eckart-Young: no matrix of that rank is nearer to the effective weight than its largest singular values."""
    cut, model = result.cut(size_ratio, adapters="truncate"), materialize(result, size_ratio, adapters="truncate")
    assert cut.ratios["factorized"] <= size_ratio
    for name, layer in svd_layers(copy.deepcopy(result).model).items():
        layer.set_live(cut.live[name])
        weight = layer.effective_weight().double()
        new, rank = model.get_submodule(name), int(cut.live[name].sum())
        if type(new) not in (LowRankLinear, PivotLinear):
            new = (new.weight.t() if type(new) is Conv1D else new.weight).detach()
            best = weight  # a dense matrix has room for all of it
        else:
            assert new.rank == rank
            new = new.effective_weight().detach()
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            # The distance cannot be smaller, and differs from the least one by rounding alone.
            assert float((weight - new.double()).norm()) == pytest.approx(float(S[rank:].norm()), rel=1e-4)
        scale = float(weight.norm())
        # Where the gap between the kept and the cut singular value is small, the best one itself is ill-conditioned.
        gap = 1.0 if best is weight or not 0 < rank < len(S) else float((S[rank - 1] - S[rank]) / S[0])
        assert float((new.double() - best).norm()) <= 200 * torch.finfo(torch.float32).eps * scale / gap


def test_dropped_adapters_are_left_out(result):
    model = materialize(result, 0.6, adapters="drop")
    without = copy.deepcopy(result)
    for layer in svd_layers(without.model).values():
        layer.lora_B.data.zero_()
    assert_close(logits(model), logits(without.at(0.6)))  # "auto" drops what is not trained: the same cut
    assert result.cut(0.6, adapters="drop").ranks.sum() > result.cut(0.6, adapters="merge").ranks.sum()


def test_auto_merges_truncates_or_drops(result, caplog):
    smallest = Sizing.of(result.model).smallest()
    with caplog.at_level(logging.WARNING, "acip_kernels"):
        assert result.cut(smallest).adapters == "merge"
        assert "too large to keep" not in caplog.text
        assert result.cut(smallest - 1e-9).adapters == "truncate"
    assert "too large to keep: they are merged and truncated" in caplog.text
    caplog.clear()
    untrained = copy.deepcopy(result)
    for layer in svd_layers(untrained.model).values():
        layer.lora_B.data.zero_()
    assert untrained.cut(smallest - 1e-9).adapters == untrained.cut(0.9).adapters == "drop"
    assert "too large to keep" not in caplog.text
    with pytest.raises(ValueError, match=f"cannot be reached: .*{smallest:.4f}"):
        result.cut(smallest - 1e-9, adapters="merge")


def test_a_size_below_the_runs_end_is_a_warning(caplog):
    result = toys.toy_result(toys.llama(), adapters=0)
    sizing = Sizing.of(result.model)
    end = sizing.ratio(torch.tensor([int((scores > 0).sum()) for scores in result.scores.values()]))
    with caplog.at_level(logging.WARNING, "acip_kernels"):
        result.cut(end)
        assert not caplog.records
        result.cut(end - 0.01)
    assert "below the size at which the run stopped" in caplog.text


# ---- options


def test_dtype_is_that_of_every_weight(result):
    model = materialize(result, 0.6, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert result.model.dtype == torch.float32
    exact = materialize(result, 0.6)
    # Every weight is rounded once, from the exact product.
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].to(torch.bfloat16)), name
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("adapters", ["merge", "truncate", "drop"])
@pytest.mark.parametrize("rank_multiple", [3, 8])
def test_rank_multiple_rounds_stored_ranks_within_the_target(llama_result, adapters, rank_multiple):
    for size_ratio in (0.9, 0.6, 0.5):
        options = {"adapters": adapters, "rank_multiple": rank_multiple}
        model, cut = materialize(llama_result, size_ratio, **options), llama_result.cut(size_ratio, **options)
        assert size_ratio - 0.2 < stored_ratio(model, cut) <= size_ratio
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear | PivotLinear):
                assert module.rank % rank_multiple == 0
                # Rounding up is not padding: what is stored is live.
                assert module.rank == int(cut.live[name].sum()) + 2 * (adapters == "merge")


def stored_ratio(model, cut):
    """The size ratio of the factorized layers, counted in the model itself."""
    stored = 0
    for name in cut.live:
        module = model.get_submodule(name)
        bias = (module.U if isinstance(module, LowRankLinear) else module).bias
        stored += sum(tensor.numel() for tensor in module.state_dict().values())
        stored -= 0 if bias is None else bias.numel()
    return stored / int(cut.sizing.dense.sum())


# ---- sizes


@pytest.fixture(scope="module")
def results():
    return {name: toys.toy_result(make()) for name, make in toys.MODELS.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(toys.MODELS)),
    count=st.sampled_from(COUNTS),
    adapters=st.sampled_from(["merge", "truncate", "drop"]),
    target=st.floats(0, 1, exclude_min=True)
    | st.integers(1, 1000).map(lambda n: n / 1000)
    # Just beside what can be met exactly, where a rounded budget goes wrong.
    | st.integers(1, 9600).flatmap(lambda n: st.sampled_from([math.nextafter(n / 9600, to) for to in (0, 1)])),
)
def test_a_target_is_met_from_below_within_one_rank(results, name, count, adapters, target):
    model = results[name].model
    sizing = Sizing.of(model, adapters=adapters == "merge")
    if target < sizing.smallest(count):
        with pytest.raises(ValueError, match="cannot be reached"):
            results[name].cut(target, count=count, adapters=adapters)
        return
    cut = results[name].cut(target, count=count, adapters=adapters)
    assert cut.ratios[count] <= target
    # The last one pruned is the best of the pruned; with it back, the target is exceeded.
    pruned = [
        (float(scores[~cut.live[layer]].max()), number)
        for number, (layer, scores) in enumerate(results[name].scores.items())
        if not cut.live[layer].all()
    ]
    if pruned:
        back = cut.ranks.clone()
        back[max(pruned)[1]] += 1
        assert sizing.ratio(back, count) > target
    # Nothing that stays has a lower score than anything pruned.
    scores = results[name].scores
    kept = [float(scores[layer][live].min()) for layer, live in cut.live.items() if live.any()]
    if pruned and kept:
        assert min(kept) > max(pruned)[0]


@pytest.mark.parametrize("adapters", ["merge", "truncate", "drop"])
@pytest.mark.parametrize(("size_ratio", "rank_multiple"), [(1.0, 1), (0.75, 1), (0.4, 1), (0.6, 8)])
def test_counts_are_what_the_file_holds(result, adapters, size_ratio, rank_multiple, tmp_path):
    options = {"adapters": adapters, "rank_multiple": rank_multiple}
    cut, model = result.cut(size_ratio, **options), materialize(result, size_ratio, **options)
    acip_kernels.save(model, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        numbers = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert sum(numbers.values()) == cut.parameters
    assert cut.ratios["factorized"] == stored_ratio(model, cut)
    dense = cut.sizing.rest + int(cut.sizing.dense.sum())
    assert cut.ratios["stored"] == sum(numbers.values()) / dense
    assert evaluate.parameter_counts(model)["stored"] == cut.parameters
    for dtype in (torch.float32, torch.bfloat16):
        file = tmp_path / str(dtype)
        acip_kernels.save(model.to(dtype), file)
        file = file / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size - header == cut.bytes(dtype)


def test_the_dense_count_is_the_dense_models():
    for make in toys.MODELS.values():
        dense = evaluate.parameter_counts(make())["stored"]
        sizing = Sizing.of(toys.toy_result(make()).model)
        assert sizing.rest + int(sizing.dense.sum()) == dense


def test_equal_scores_are_cut_in_the_same_order_everywhere(tmp_path):
    result = toys.toy_result(toys.llama())
    pick = torch.Generator().manual_seed(4)
    for scores in result.scores.values():
        scores.copy_(torch.randint(-2, 3, scores.shape, generator=pick))
    acip_kernels.save(result, tmp_path / "elastic")
    again = acip_kernels.CompressionResult.load(tmp_path / "elastic")
    for size_ratio in torch.linspace(0.15, 1, 9).tolist():
        cut, same = result.cut(size_ratio), again.cut(size_ratio)
        assert torch.equal(cut.ranks, result.cut(size_ratio).ranks)
        assert torch.equal(cut.ranks, same.ranks)
        assert_close(
            logits(acip_kernels.load(tmp_path / "elastic", size_ratio)), logits(materialize(result, size_ratio))
        )
    # Of equal scores, the smallest singular value of a layer goes first.
    for scores in result.scores.values():
        scores.zero_()
    for live in result.cut(0.5).live.values():
        assert live.tolist() == sorted(live.tolist(), reverse=True)


def test_scores_by_singular_values_keep_the_largest():
    model = toys.llama()
    acip_kernels.factorize(model, adapter_rank=0)
    acip_kernels.score_by_singular_values(model)
    cut = acip_kernels.CompressionResult(model).cut(0.5)
    layers = svd_layers(model)
    kept = torch.cat([layers[name].S[live] for name, live in cut.live.items()])
    pruned = torch.cat([layers[name].S[~live] for name, live in cut.live.items()])
    assert kept.min() > pruned.max()


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_ratio": 0}, r"in \(0, 1\]; got 0"),
        ({"size_ratio": -0.5}, "got -0.5"),
        ({"size_ratio": 1.001}, "got 1.001"),
        ({"size_ratio": math.nan}, "got nan"),
        ({"size_ratio": "0.5"}, "got '0.5'"),
        ({"count": "bytes"}, "count must be one of factorized, stored"),
        ({"adapters": "fold"}, "adapters must be one of auto, merge, truncate, drop"),
        ({"rank_multiple": 0}, "rank_multiple"),
        ({"rank_multiple": 2.0}, "rank_multiple"),
        ({"size_ratio": 0.2, "count": "stored"}, r"0.2 \(stored\) cannot be reached"),
    ],
)
def test_a_bad_argument_is_named(llama_result, options, message):
    with pytest.raises(ValueError, match=message):
        materialize(llama_result, **{"size_ratio": 0.5} | options)


def test_scores_that_are_no_numbers_are_named():
    result = toys.toy_result(toys.llama())
    result.scores["model.layers.1.mlp.up_proj"][3] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN"):
        materialize(result, 0.5)


def test_a_dense_model_is_no_result():
    with pytest.raises(ValueError, match="factorize it first"):
        materialize(toys.llama(), 0.5)


@pytest.mark.parametrize("forms", [("dense", "factors"), ("dense", "factors", "pivoted")])
@pytest.mark.parametrize("count", COUNTS)
def test_ranks_at_are_those_of_the_cut(results, forms, count):
    for result in results.values():
        sizing = Sizing.of(result.model, forms=forms)
        removal = sizing.removal(result.scores)
        for size_ratio in (1.0, 0.9, 0.7, 0.55):
            live = sizing.cut(result.scores, size_ratio, count)
            assert sizing.ranks_at(removal, size_ratio, count).tolist() == [int(kept.sum()) for kept in live.values()]


def test_a_run_stops_by_the_forms_that_it_is_told():
    """By default the paper's two; each run has stopped as soon as its own count allows."""
    batches = [{"input_ids": toys.token_ids()}]
    for forms in (("dense", "factors"), ("dense", "factors", "pivoted")):
        options = {} if len(forms) == 2 else {"forms": forms}
        config = acip_kernels.CompressionConfig.short(6, 0.5, adapter_rank=0, dtype="float32", **options)
        assert config.forms == forms
        result = acip_kernels.compress(toys.llama(), batches, config, progress=False)
        ranks = torch.stack([layer.live.sum() for layer in svd_layers(result.model).values()])
        sizing = Sizing.of(result.model, adapters=False, forms=forms)
        assert result.size_ratio == sizing.ratio(ranks) <= 0.5 < sizing.ratio(ranks + 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_in_a_narrow_dtype_is_what_is_loaded_again(family, tmp_path):
    """Constants that no file holds, as the frequencies of rotary embeddings, are not rounded."""
    model = toys.MODELS[family]()
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    assert any("inv_freq" in name for name in exact)
    config = RankingConfig(calibration_batches=2, dtype="bfloat16")
    result = compress(model, [{"input_ids": toys.token_ids(seed=seed)} for seed in range(2)], config, progress=False)
    for source in (result, toys.toy_result(toys.MODELS[family]())):
        small = materialize(source, 0.6, dtype=torch.bfloat16)
        buffers = dict(small.named_buffers())
        assert all(torch.equal(buffers[name], values) for name, values in exact.items())
        save(small, tmp_path, overwrite=True)
        assert torch.equal(load(tmp_path)(toys.token_ids()).logits, small(toys.token_ids()).logits)


@pytest.mark.network
def test_every_layer_of_the_real_model_is_the_same_in_all_forms():
    """Cut to half its ranks, as it is stored: what a form may differ by is the rounding of its own numbers."""
    weights = load_file(data.demo_model() / "model.safetensors")
    layers = {name: weight for name, weight in weights.items() if weight.dim() == 2 and ".layers." in name}
    assert len(layers) == 7 * 30
    for name, weight in layers.items():
        U, S, Vh = (part.double() for part in torch.linalg.svd(weight.float(), full_matrices=False))
        rank = len(S) // 2
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        x = torch.randn(weight.shape[1], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        expected = U @ (S[:, None] * (Vh @ x))
        for dtype, form in itertools.product((torch.float32, torch.bfloat16), FORMS):
            parts = layer_tensors(U, S, Vh, None, None, 1.0, form=form, truncate=False, dtype=dtype)
            found, largest = output_of(parts, x)
            # Each of at most two numbers in a term is rounded by half an eps; what float64 rounds is far below.
            eps = torch.finfo(dtype).eps
            bound = eps * (1 + 2 * eps) * largest
            assert bool(((found - expected).abs() <= bound).all()), (name, form, dtype)
            if form == "pivoted":
                assert float(parts["C.weight"].abs().max()) <= BOUND * (1 + eps)


def output_of(parts, x):
    """What a layer of the tensors `parts` makes of `x [in, tokens]` in float64, and the same of all magnitudes."""

    def product(x, of):
        if "weight" in parts:
            return of(parts["weight"].double()) @ x
        if "U.weight" in parts:
            return of(parts["U.weight"].double()) @ (of(parts["Vh.weight"].double()) @ x)
        P, C = of(parts["P.weight"].double()), of(parts["C.weight"].double())
        pivots = unpack_bits(parts["is_pivot"], len(P) + len(C))
        y = torch.empty(len(pivots), x.shape[1], dtype=x.dtype)
        y[pivots], y[~pivots] = P @ x, C @ (P @ x)
        return y

    return product(x, torch.clone), product(x.abs(), torch.abs)
