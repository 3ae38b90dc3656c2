"""Refitting what a cut has left, on toy models."""

import pytest
import torch
import toys

from acip_kernels import RankingConfig, compress, materialize, recalibrate
from acip_kernels.compress.factorize import svd_layers

BATCHES = [{"input_ids": toys.token_ids(4, 24, seed=seed)} for seed in range(6)]


def ranked(model, dtype="float32"):
    return compress(model, BATCHES, RankingConfig(calibration_batches=6, dtype=dtype), progress=False)


def error(model, wanted):
    """The mean squared error of the last hidden states, over all batches."""
    with torch.no_grad():
        made = [model(**b, output_hidden_states=True).hidden_states[-1] for b in BATCHES]
    return float(sum((a - b).square().mean() for a, b in zip(made, wanted, strict=True)))


@pytest.mark.parametrize("family", toys.MODELS)
def test_the_model_comes_nearer_to_the_whole_one(family):
    model = toys.MODELS[family]()
    with torch.no_grad():
        wanted = [model.eval()(**b, output_hidden_states=True).hidden_states[-1] for b in BATCHES]
    result = ranked(model)
    before = error(materialize(result, 0.5), wanted)
    done = []
    again = recalibrate(result, 0.5, BATCHES, progress=lambda *numbers: done.append(numbers))
    assert again is result and done[-1][0] == done[-1][1] == len(done)
    after = materialize(result, 0.5)
    assert error(after, wanted) < before
    assert not result.model.training


def test_at_full_size_there_is_nothing_to_fit():
    result = ranked(toys.llama())
    before = {name: layer.U.clone() for name, layer in svd_layers(result.model).items()}
    recalibrate(result, 1.0, BATCHES)
    for name, layer in svd_layers(result.model).items():
        # What was missing was rounding, of sums of at most 48 terms, in units of the columns' length.
        assert (layer.U * layer.S - before[name] * layer.S).abs().max() < 1e-3 * float(layer.S.max())


def test_one_layer_is_least_squares():
    """A block whose only layer is this one: the closed form, in float64."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(10, 8)

        def forward(self, hidden_states, **kwargs):
            return self.linear(hidden_states)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(20, 10)
            self.layers = torch.nn.ModuleList([Block()])

        def forward(self, input_ids, use_cache=False):
            return self.layers[0](self.embedding(input_ids))

    from acip_kernels import factorize
    from acip_kernels.compress.result import CompressionResult

    torch.manual_seed(0)
    model = Model()
    W = model.layers[0].linear.weight.double()
    X = torch.cat([model.embedding(batch["input_ids"] % 20).flatten(0, 1) for batch in BATCHES]).double()
    factorize(model, adapter_rank=0)
    result = CompressionResult(model)
    layer = model.layers[0].linear
    layer.scores.copy_(torch.arange(8, 0, -1).float())
    recalibrate(result, 0.6, [{"input_ids": batch["input_ids"] % 20} for batch in BATCHES])
    live = result.cut(0.6).live["layers.0.linear"]
    Z = X @ layer.Vh[live].double().t()
    expected = torch.linalg.lstsq(Z, X @ W.t()).solution.t()
    made = (layer.U * layer.S)[:, live]
    assert 0 < int(live.sum()) < 8
    # The damping, a hundred thousandth of the mean moment, moves the solution by about its share.
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="has adapters"):
        recalibrate(toys.toy_result(toys.llama()), 0.5, BATCHES)
    with pytest.raises(ValueError, match="no batches"):
        recalibrate(ranked(toys.llama()), 0.5, [])
