"""The passes of a batch as a CUDA graph: on a GPU the graph itself, elsewhere with a stand-in for CUDA's capture."""

import contextlib
import logging

import pytest
import torch
import torch.nn.attention
from toys import VOCABULARY, llama

from acip_kernels import CompressionConfig, NestedConfig, compress, factorize
from acip_kernels.compress.captured import Passes
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.compress.nested import NestedTraining
from acip_kernels.compress.sizing import Sizing
from acip_kernels.compress.step import TrainingStep, with_labels
from acip_kernels.models import training
from acip_kernels.ops import dropout

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class StandIn:
    """Calls what it has captured, with the seeds that were handed out then; counts captures and replays."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, function, pool):
        self.captures += 1
        seeds = dropout.StaticSeeds._current
        # CUDA launches nothing while it captures: what is added to gradients here is taken back.
        held = [(p.grad, p.grad.clone()) for p in self.parameters if p.grad is not None]
        function()
        for gradient, before in held:
            gradient.copy_(before)

        def replay():
            self.replays += 1
            seeds.used = 0
            with seeds:
                function()

        return replay


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    found = StandIn()
    # What torch's attention kernels for a GPU add up backwards depends on which block comes first.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if GPU else contextlib.nullcontext():
        yield _installed(found, monkeypatch)


def _installed(found, monkeypatch):
    if GPU:
        from acip_kernels.compress import captured

        def counted(function, pool):
            found.captures += 1
            replay = captured.capture(function, pool)

            def counted_replay():
                found.replays += 1
                replay()

            return counted_replay

        monkeypatch.setattr(Passes, "capture", staticmethod(counted))
    else:
        monkeypatch.setattr(Passes, "capture", staticmethod(found))
    return found


def batches(count, length=16, rows=2, padded=False):
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}
        if padded:
            mask = torch.ones(rows, length, dtype=torch.int64)
            mask[0, : length // 4] = 0
            batch["attention_mask"] = mask
        made.append(batch)
    return made


def model(dtype=torch.float32):
    return llama().to(DEVICE, dtype)


def l1_steps(stand_in, graphs, route="auto", accumulated=1, adapter_dropout=0.1, padded=False, dtype=torch.float32):
    """Losses, masks and adapters of a few steps, in which a third of the entries die and are left out."""
    torch.manual_seed(3)
    config = CompressionConfig(
        adapter_rank=4, adapter_dropout=adapter_dropout, mask_learning_rate=0.005, route=route, dtype="float32",
        gradient_accumulation=accumulated,
    )  # fmt: skip
    made = model(dtype)
    factorize(made, adapter_rank=4, adapter_dropout=adapter_dropout)
    for layer in svd_layers(made).values():
        # So that some die in the third step and the others do not.
        layer.mask.data[layer.full_rank * 2 // 3 :] = 0.012
    step = TrainingStep(made, config)
    step.passes.enabled = graphs
    stand_in.parameters = [step.map.masks, *step.adapters.values()]
    torch.manual_seed(5)
    losses, feed = [], batches(12 * accumulated, padded=padded)
    for number in range(12):
        outcome = step(feed[number * accumulated : (number + 1) * accumulated], penalty=1.0 if number < 5 else 1e-3)
        assert outcome.finite
        losses.append(outcome.loss)
        if number == 4:
            step.compact(everything=True, ranks=outcome.ranks)
    ranks = sum(layer.computed_rank for layer in step.layers.values())
    assert ranks < sum(layer.full_rank for layer in step.layers.values())
    return losses, step.map.masks.detach().clone(), [p.detach().clone() for p in step.adapters.values()]


@pytest.mark.parametrize("adapter_dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("route", "accumulated"), [("factored", 1), ("effective", 1), ("factored", 3), ("effective", 3)]
)
def test_a_captured_step_is_the_step(stand_in, route, accumulated, adapter_dropout):
    """To the bit: losses, masks and adapters, dropout's choices among them, before and after a compaction."""
    apart = route == "effective" and accumulated > 1
    dtype = torch.float64 if apart else torch.float32
    plain = l1_steps(stand_in, False, route, accumulated, adapter_dropout, dtype=dtype)
    assert stand_in.captures == 0
    captured = l1_steps(stand_in, True, route, accumulated, adapter_dropout, dtype=dtype)
    # Once before the compaction and once after it.
    assert stand_in.captures == 2
    assert stand_in.replays == 12 * accumulated - 2
    if apart:
        # M of each batch by itself, not their sum, so sums round otherwise: by 2e-16 of each of at most 48 terms in
        # float64. AdamW divides gradients by their size, so twelve steps of 0.005 differ by no more than that in 1.
        bound = 12 * 48 * torch.finfo(torch.float64).eps
        torch.testing.assert_close(plain[0], captured[0], rtol=bound, atol=0)
        torch.testing.assert_close(plain[1], captured[1], rtol=0, atol=bound)
        return
    assert plain[0] == captured[0]
    assert torch.equal(plain[1], captured[1])
    assert all(map(torch.equal, plain[2], captured[2]))


def test_padding_is_read_anew(stand_in):
    plain, captured = (l1_steps(stand_in, graphs, padded=True) for graphs in (False, True))
    assert plain[0] == captured[0] and torch.equal(plain[1], captured[1]) and stand_in.replays


def test_little_that_died_is_left_in_while_a_graph_holds_it(stand_in):
    made = model()
    factorize(made, adapter_rank=4)
    step = TrainingStep(made, CompressionConfig(adapter_rank=4, dtype="float32"))
    step.passes.enabled = True
    stand_in.parameters = [step.map.masks, *step.adapters.values()]
    feed = batches(3)
    for batch in feed:
        step([batch], penalty=1e-3)
    assert stand_in.captures == 1
    full = [layer.full_rank for layer in step.layers.values()]
    with torch.no_grad():
        first = next(iter(step.layers.values()))
        first.mask[8:] = -1.0  # one layer of fourteen
    step.compact(ranks=step.map.ranks(step.map.masks).tolist())
    assert [layer.computed_rank for layer in step.layers.values()] == full and step.passes.captured
    with torch.no_grad():
        for layer in step.layers.values():
            layer.mask[8:] = -1.0
    step.compact(ranks=step.map.ranks(step.map.masks).tolist())
    assert all(layer.computed_rank == 8 for layer in step.layers.values()) and not step.passes.captured


def nested_steps(stand_in, graphs, distillation):
    torch.manual_seed(3)
    made = model()
    factorize(made, adapter_rank=0)
    for layer in svd_layers(made).values():
        layer.scores.copy_(layer.S)
    config = NestedConfig(steps=12, update_rank=4, distillation=distillation, dtype="float32", smallest_ratio=0.4)
    step = NestedTraining(made, Sizing.of(made, adapters=False), config)
    step.passes.enabled = graphs
    stand_in.parameters = list(step.parameters.values())
    torch.manual_seed(5)
    losses = [
        step([batch], [ratio], 1e-2)
        for batch, ratio in zip(batches(12), [0.5, 0.9, 0.7, 0.9, 0.5, 0.5, 0.9, 0.7, 0.7, 0.5, 0.9, 0.7])
    ]
    return losses, [p.detach().clone() for p in step.parameters.values()]


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_a_captured_nested_step_is_the_step(stand_in, distillation):
    """To the bit, of sizes in turns, each with a graph of its own."""
    plain = nested_steps(stand_in, False, distillation)
    assert stand_in.captures == 0
    captured = nested_steps(stand_in, True, distillation)
    assert stand_in.captures == 3 and stand_in.replays == 12 - 3
    assert plain[0] == captured[0]
    assert all(map(torch.equal, plain[1], captured[1]))


def test_sizes_are_drawn_in_steps_where_each_is_captured():
    made = model()
    factorize(made, adapter_rank=0)
    config = NestedConfig(steps=2, update_rank=4, dtype="float32", smallest_ratio=0.33)
    step = NestedTraining(made, Sizing.of(made, adapters=False), config)
    step.passes.enabled = False
    assert step.nearest(0.7654) == 0.7654
    step.passes.enabled = True
    assert step.nearest(0.7654) == 0.775 and step.nearest(0.331) == 0.33 and step.nearest(0.999) == 1.0


def test_what_cannot_be_captured_is_said_once_and_run(stand_in, monkeypatch, caplog):
    def fails(function, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = l1_steps(stand_in, False, "effective")
    monkeypatch.setattr(Passes, "capture", staticmethod(fails))
    with caplog.at_level(logging.WARNING, "acip_kernels"):
        failed = l1_steps(stand_in, True, "effective")
    assert plain[0] == failed[0] and torch.equal(plain[1], failed[1])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no CUDA graph can hold them: operation not permitted" in line


def test_other_shapes_and_other_inputs(stand_in):
    """A batch of another shape is computed as it is; one of inputs that could decide anything is never captured."""
    calls = []
    passes = Passes(lambda inputs: calls.append(inputs) or inputs["input_ids"].sum(), enabled=True)
    stand_in.parameters = []
    one, other = ({"input_ids": torch.arange(n, device=DEVICE)} for n in (4, 5))
    assert [int(passes(one)) for _ in range(3)] == [6, 6, 6] and stand_in.captures == 1
    assert int(passes(other)) == 10 and stand_in.captures == 1
    one["input_ids"] += 1
    assert int(passes(one)) == 10 and stand_in.captures == 1
    packed = one | {"position_ids": torch.arange(4, device=DEVICE)}
    for _ in range(3):
        passes(packed)
    assert stand_in.captures == 1
    passes.forget()
    passes(one)
    assert not passes.captured


def test_seeds_at_once_are_those_one_by_one():
    torch.manual_seed(11)
    want = [int(dropout.new_seed(DEVICE)) for _ in range(5)]
    torch.manual_seed(11)
    seeds = dropout.StaticSeeds(DEVICE, 5)
    with seeds:
        places = [dropout.new_seed(DEVICE) for _ in range(5)]
        with pytest.raises(RuntimeError, match="more than 5"):
            dropout.new_seed(DEVICE)
    seeds.draw()
    assert [int(place) for place in places] == want
    assert all(place.data_ptr() % 16 == 0 for place in places)


def test_a_mask_that_masks_nothing_is_left_out():
    (batch,) = batches(1)
    mask = torch.ones_like(batch["input_ids"])
    assert set(with_labels(batch | {"attention_mask": mask}, DEVICE)) == {"input_ids", "labels"}
    mask = mask.clone()
    mask[0, 0] = 0
    kept = with_labels(batch | {"attention_mask": mask}, DEVICE)
    assert torch.equal(kept["attention_mask"].cpu(), mask) and int(kept["labels"][0, 0]) == -100


def test_transformers_does_not_look_for_packed_sequences(monkeypatch):
    from transformers import masking_utils

    made, asked = model(), []
    real = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(1) or real(ids))
    ids = batches(1)[0]["input_ids"].to(DEVICE)
    want = made(input_ids=ids, use_cache=False).logits
    assert asked
    asked.clear()
    with training.functions({"input_ids": ids}):
        assert torch.equal(made(input_ids=ids, use_cache=False).logits, want)
    assert not asked
    positions = torch.arange(16, device=DEVICE)[None]
    with training.functions({"input_ids": ids, "position_ids": positions}):
        made(input_ids=ids, position_ids=positions, use_cache=False)
    assert asked
    assert masking_utils.find_packed_sequence_indices is not real  # what was there before


@pytest.mark.parametrize("config", [
    CompressionConfig.short(10, 0.5, adapter_rank=4, dtype="float32"),
    NestedConfig(steps=10, update_rank=4, calibration_batches=2, dtype="float32"),
])  # fmt: skip
def test_a_whole_run(config, stand_in):
    """By graphs where there is a GPU: it arrives, and its history is finite."""
    made = model()
    result = compress(made, batches(6), config, progress=False)
    assert len(result.history) >= 10 and all(torch.tensor(row["loss"]).isfinite() for row in result.history)
    assert (stand_in.replays > 0) == GPU
