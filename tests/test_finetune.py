"""A model trained at one size: adapters, or the factors themselves."""

import copy

import pytest
import torch
import toys

from acip_kernels import LowRankLinear, PivotLinear, RankingConfig, SVDLinear, compress, finetune, materialize
from acip_kernels.compress.factorize import svd_layers

BATCHES = [{"input_ids": toys.token_ids(seed=seed)} for seed in range(2)]


def materialized(**options):
    return materialize(toys.toy_result(toys.llama()), size_ratio=0.5, **options)


@pytest.mark.parametrize("form", ["factors", "pivoted"])
def test_only_new_adapters_are_trained_and_the_loss_falls(form):
    model, kind = materialized(forms=(form,)), LowRankLinear if form == "factors" else PivotLinear
    lowrank = {name for name, module in model.named_modules() if isinstance(module, kind) and module.rank}
    before = copy.deepcopy(model)
    result = finetune(model, BATCHES, 30, learning_rate=5e-3, adapter_rank=2, adapter_dropout=0.0, progress=False)
    layers = {name: module for name, module in result.model.named_modules() if isinstance(module, SVDLinear)}
    assert layers.keys() == lowrank
    losses = [row["loss"] for row in result.history]
    assert len(losses) == 30 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    for name, layer in layers.items():
        old = before.get_submodule(name)
        Vh, U = (old.Vh.weight, old.U.weight) if form == "factors" else old.factors()
        assert torch.equal(layer.U, U) and torch.equal(layer.Vh, Vh)
        assert layer.lora_B.abs().max() > 0
    # Before the first step the adapters change nothing.
    labels = BATCHES[0]["input_ids"]
    assert losses[0] == pytest.approx(float(before(labels, labels=labels).loss), rel=1e-4)


def test_the_merged_result_is_the_trained_model():
    result = finetune(materialized(), BATCHES, 5, adapter_rank=2, progress=False)
    expected = toys.logits(result.model)
    merged = materialize(result, size_ratio=1.0)
    assert not any(isinstance(module, SVDLinear) for module in merged.modules())
    toys.assert_close(toys.logits(merged), expected)


def test_a_result_at_a_size_trains_its_own_adapters_at_that_size():
    result = toys.toy_result(toys.llama())
    model = result.at(0.5)
    ranks = {name: int(module.live.sum()) for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    masks = {name: module.mask.clone() for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    tuned = finetune(result, iter(BATCHES * 4), 8, progress=False)
    for name, module in tuned.model.named_modules():
        if isinstance(module, SVDLinear):
            assert int(module.live.sum()) == ranks[name] and torch.equal(module.mask, masks[name])


def ranked():
    config = RankingConfig(method="importance", calibration_batches=2, dtype="float32")
    return compress(toys.llama(), BATCHES, config, progress=False)


def test_factors_of_one_size_are_trained_and_take_no_more_bytes():
    result, size = ranked(), 0.6
    before = materialize(result, size)
    scores = {name: score.clone() for name, score in result.scores.items()}
    tuned = finetune(result, BATCHES, 30, size_ratio=size, learning_rate=5e-3, adapter_rank=4, progress=False)
    after = materialize(tuned, size)
    assert {name: t.shape for name, t in after.state_dict().items()} == {
        name: t.shape for name, t in before.state_dict().items()
    }
    for name, score in tuned.scores.items():
        assert torch.equal(score, scores[name])

    def loss(model):
        return sum(float(model(b["input_ids"], labels=b["input_ids"]).loss.detach()) for b in BATCHES)

    assert loss(after) < 0.95 * loss(before)
    # Every step trained the ranks that this size has: what it left out is as it was.
    assert [row["size_ratio"] for row in tuned.history] == [size] * 30


def test_ranks_that_the_size_leaves_out_are_not_trained():
    result = ranked()
    kept = result.cut(0.5).live
    old = {name: layer.Vh.clone() for name, layer in svd_layers(result.model).items()}
    finetune(result, BATCHES, 10, size_ratio=0.5, learning_rate=1e-2, adapter_rank=4, progress=False)
    for name, layer in svd_layers(result.model).items():
        cosine = torch.nn.functional.cosine_similarity(layer.Vh, old[name], dim=1)
        left = ~kept[name]
        # As they were, but for their length, which is one afterwards.
        assert bool(((cosine[left] - 1).abs() < 1e-6).all())
        assert (cosine[kept[name]] - 1).abs().max() > 1e-5


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="size_ratio is for a CompressionResult without adapters"):
        finetune(materialized(), BATCHES, 2, size_ratio=0.5, progress=False)
    with pytest.raises(ValueError, match="size_ratio is for a CompressionResult without adapters"):
        finetune(toys.toy_result(toys.llama()), BATCHES, 2, size_ratio=0.5, progress=False)
    with pytest.raises(ValueError, match="smallest_ratio and largest_ratio must be in"):
        finetune(ranked(), BATCHES, 2, size_ratio=1.5, progress=False)
    with pytest.raises(ValueError, match="no low-rank layer"):
        finetune(toys.llama(), BATCHES, 2, progress=False)
    with pytest.raises(ValueError, match="steps must be"):
        finetune(materialized(), BATCHES, 0, progress=False)
    with pytest.raises(ValueError, match="batches ran out after 2 batches"):
        finetune(materialized(), iter(BATCHES), 5, progress=False)
    with pytest.raises(ValueError, match="batches ran out at the start"):
        finetune(materialized(), [], 5, progress=False)
