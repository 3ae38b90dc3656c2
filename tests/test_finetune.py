"""Adapters of a materialized model, trained by the step of a run."""

import copy

import pytest
import torch
import toys

from acip_kernels import LowRankLinear, PivotLinear, SVDLinear, finetune, materialize

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


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no low-rank layer"):
        finetune(toys.llama(), BATCHES, 2, progress=False)
    with pytest.raises(ValueError, match="steps must be"):
        finetune(materialized(), BATCHES, 0, progress=False)
    with pytest.raises(ValueError, match="batches ran out after 2 batches"):
        finetune(materialized(), iter(BATCHES), 5, progress=False)
    with pytest.raises(ValueError, match="batches ran out at the start"):
        finetune(materialized(), [], 5, progress=False)
