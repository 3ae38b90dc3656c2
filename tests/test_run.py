"""The run: its steps by hand, its schedule, interruption and resumption, what stops it."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
import toys
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from acip_kernels import CompressionConfig, SVDLinear, compress, factorize, files
from acip_kernels.compress.config import compute_dtype
from acip_kernels.compress.loop import CHECKPOINT, HISTORY
from acip_kernels.compress.scores import ScoreMap, updated_scores
from acip_kernels.compress.step import TrainingStep


def make_batches(count=6, batch=2, length=12, seed=3):
    pick = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(toys.VOCABULARY, (batch, length), generator=pick)} for _ in range(count)]


def short(steps=12, stop_ratio=0.5, **changes):
    return CompressionConfig.short(steps, stop_ratio, **{"adapter_rank": 2, "tune_steps": 4} | changes)


def run(model=None, batches=None, config=None, **options):
    return compress(model or toys.llama(), batches or make_batches(), config or short(), progress=False, **options)


def flat(result):
    return torch.cat(list(result.scores.values()))


# ---- the algorithm, step by step


def test_the_score_map_follows_its_definition():
    scores = torch.tensor([0.02, 0.02, -1.0, -7.0, 0.01])
    masks = torch.tensor([0.015, -0.001, -0.3, -0.2, 0.0])
    # Live: the mask. Pruned just now (zero is pruned): -1. Pruned before: one less.
    assert updated_scores(scores, masks).tolist() == pytest.approx([0.015, -1, -2, -8, -1])


class ByHand(nn.Module):
    """One layer `diag(3, 2, 1)` and the loss `mean(g · y)`, whose gradients are known in closed form."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        self.g = torch.tensor([1.0, -2.0, 0.5])

    def forward(self, input_ids, labels):
        y = self.layer(input_ids)
        return types.SimpleNamespace(loss=(self.g * y).sum() / len(y))


def test_a_run_worked_out_by_hand():
    """ACIP.md sections 1 and 2 in plain arithmetic: gradient, penalty, AdamW, scores, stop."""
    x = torch.tensor([[1.0, 1.0, 2.0], [3.0, 1.0, -1.0]])
    config = CompressionConfig(
        adapter_rank=0,
        mask_learning_rate=0.011,
        lambda_start=0.5,
        lambda_growth=8.0,
        lambda_every=1,
        stop_ratio=0.5,
        tune_steps=0,
        dtype="float32",
        compact_every=0,
    )
    rows = []
    result = compress(ByHand(), [{"input_ids": x, "labels": x}], config, on_step=rows.append, progress=False)

    # y = diag(S β) x, up to signs of U and V that cancel, so that with c = 0.02
    # ∂L/∂m_i = 1/c · S_i · g_i · mean(x_i) = 50 · (3·1·2, 2·(-2)·1, 1·0.5·0.5) = (300, -200, 12.5).
    means, S, g, c = [2.0, 1.0, 0.5], [3.0, 2.0, 1.0], [1.0, -2.0, 0.5], 0.02
    m, first, second, scores, history = [c] * 3, [0.0] * 3, [0.0] * 3, [c] * 3, []
    for step in range(1, 30):
        penalty = 0.5 * 8 ** (step - 1)
        for i in range(3):
            live = m[i] > 0
            gradient = (S[i] * g[i] * means[i] / c + penalty) if live else 0.0
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            m[i] -= 0.011 * (first[i] / (1 - 0.9**step)) / (math.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
            scores[i] = m[i] if m[i] > 0 else -1.0 if scores[i] > 0 else scores[i] - 1
        rank = sum(value > 0 for value in m)
        # Two factors of rank 1 store 6 of 9 numbers; of rank 2 they would store more than the matrix.
        history.append((penalty, min(6 * rank, 9) / 9))
        if history[-1][1] <= 0.5:
            break
    assert [row["lambda"] for row in rows] == pytest.approx([penalty for penalty, _ in history])
    assert [row["size_ratio"] for row in rows] == pytest.approx([ratio for _, ratio in history])
    # A rank of 1 still stores 6 of 9 numbers: the run goes on until λ has overcome the last entry's wish to grow.
    assert [ratio for _, ratio in history[:2]] == [1.0, pytest.approx(6 / 9)]
    assert history[-1][1] == 0
    assert result.scores["layer"].tolist() == pytest.approx(scores, rel=1e-5)
    assert scores == [-len(history) + 1, -1, -len(history) + 1]


def test_a_penalty_by_numbers_pushes_what_costs_more():
    """Against one λ for all: the masks' gradients differ by λ (w - 1), w being what an entry holds over the mean."""
    gradients, λ = {}, 0.25
    for penalty in ("entries", "numbers"):
        model = toys.llama()
        factorize(model, adapter_rank=0)
        step = TrainingStep(model, CompressionConfig(adapter_rank=0, penalty=penalty, dtype="float32"))
        with torch.no_grad():
            step.map.masks[::3] = 0.0
            step.map.masks[1::3] = -1.0
        live = step.map.masks.detach() > 0
        step(make_batches(1), λ)
        gradients[penalty] = step.map.masks.grad.clone()
    held = torch.cat(
        [torch.full((m.full_rank,), m.in_features + m.out_features) for m in step.layers.values()]
    ).double()
    weights = held / held.mean()
    assert len(weights.unique()) > 1
    expected = gradients["entries"].double() + λ * (weights - 1) * live
    torch.testing.assert_close(gradients["numbers"].double(), expected, rtol=1e-6, atol=1e-6)
    assert not gradients["numbers"][~live].any()


def test_a_pruned_entry_never_comes_back():
    """AdamW moves against a running mean of gradients. At its death an entry's last move was downward, so that mean was
    positive; afterwards its gradients are zero, and the mean shrinks without a change of sign: it only moves down."""
    before, revived = {}, []

    def watch(row):
        for name, layer in layers.items():
            live = layer.live
            revived.append(bool((live & ~before.get(name, live)).any()))
            before[name] = live

    model = toys.llama()
    factorize(model, adapter_rank=2)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    result = run(model, config=short(40, 0.3), on_step=watch)
    assert not any(revived)
    assert float((flat(result) < 0).float().mean()) > 0.3


def test_scores_count_the_steps_since_an_entry_died():
    died = {}

    def watch(row):
        if row["phase"] == "prune":
            for name, layer in layers.items():
                for index in (~layer.live).nonzero()[:, 0].tolist():
                    died.setdefault((name, index), row["step"])

    model = toys.llama()
    factorize(model, adapter_rank=2)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    result = run(model, config=short(30, 0.4), on_step=watch)
    last = max(row["step"] for row in result.history if row["phase"] == "prune")
    assert died
    for name, scores in result.scores.items():
        for index, score in enumerate(scores.tolist()):
            if (name, index) in died:
                assert score == -1 - (last - died[name, index])
            else:
                assert score == layers[name].mask[index].item() > 0


def test_tuning_leaves_masks_alone_and_trains_adapters():
    seen = []

    def watch(row):
        masks = torch.cat([layer.mask.detach() for layer in layers.values()])
        adapters = torch.cat([layer.lora_B.detach().flatten() for layer in layers.values()])
        seen.append((row["phase"], masks.clone(), adapters.clone()))

    model = toys.llama()
    factorize(model, adapter_rank=2)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    result = run(model, config=short(10, 0.5, tune_steps=3), on_step=watch)
    border = next(i for i, (phase, _, _) in enumerate(seen) if phase == "tune")
    assert len(seen) - border == 3
    for _, masks, adapters in seen[border:]:
        assert torch.equal(masks, seen[border - 1][1])
        assert not torch.equal(adapters, seen[border - 1][2])
    assert [row["lambda"] for row in result.history[border:]] == [None] * 3
    assert all(row["size_ratio"] <= 0.5 for row in result.history[border:])


def test_everything_but_masks_and_adapters_is_frozen():
    model = toys.qwen2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "proj" not in name}
    run(model, config=short(dtype="float32"))  # "auto" may convert all of it
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("make", [toys.llama, toys.qwen2, toys.gpt2, toys.gemma3])
def test_every_architecture_runs_and_reaches_its_ratio(make):
    result = run(make(), config=short(8, 0.6))
    assert result.size_ratio <= 0.6
    assert all(math.isfinite(row["loss"]) for row in result.history)
    assert result.at(0.7).generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False).shape == (
        1,
        5,
    )


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("stop_ratio", [0.9, 0.4, 0.05])
def test_a_short_run_always_reaches_its_ratio_in_its_steps(steps, stop_ratio):
    result = run(config=short(steps, stop_ratio, tune_steps=0))
    prune = [row for row in result.history if row["phase"] == "prune"]
    assert len(prune) <= steps
    assert result.size_ratio <= stop_ratio
    # Only the last step may cut what the penalty has not done, and what it cuts counts as pruned by that step.
    assert all("cut_at_once" not in row for row in prune[: steps - 1])
    assert int((flat(result) == -1).sum()) >= prune[-1].get("cut_at_once", 0)


# ---- the configuration


def test_defaults_are_the_reference_implementations():
    config = CompressionConfig()
    assert (config.mask_scale, config.adapter_rank, config.adapter_alpha, config.adapter_dropout) == (
        0.02,
        32,
        16,
        0.05,
    )
    assert (config.mask_learning_rate, config.adapter_learning_rate) == (5e-5, 5e-5)
    assert (config.lambda_start, config.lambda_growth, config.lambda_every) == (1e-3, 1.01, 4)
    assert (config.stop_ratio, config.tune_steps) == (0.4, 1000)
    assert [config.lambda_at(step) for step in (0, 3, 4, 8)] == pytest.approx([1e-3, 1e-3, 1.01e-3, 1.0201e-3])
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("steps", [1, 30, 1000])
def test_a_short_run_is_scaled_to_its_steps(steps):
    config = CompressionConfig.short(steps, mask_scale=0.05)
    assert config.lambda_at(steps) == pytest.approx(20 * config.lambda_at(0))
    # A mask that is pushed at full speed gets from its start to zero in 70 % of the steps, or sooner.
    assert config.mask_learning_rate * 0.7 * steps >= 0.05 * (1 - 1e-9)
    assert CompressionConfig.short(steps, tune_steps=7).tune_steps == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_ratio": 0}, "stop_ratio"),
        ({"stop_ratio": 1.2}, "stop_ratio"),
        ({"mask_scale": -1}, "mask_scale"),
        ({"mask_scale": math.nan}, "mask_scale"),
        ({"adapter_rank": -1}, "adapter_rank"),
        ({"adapter_dropout": 1.0}, "adapter_dropout"),
        ({"lambda_growth": 0.9}, "lambda_growth"),
        ({"lambda_growth": 1}, "max_prune_steps"),
        ({"tune_steps": 2.5}, "tune_steps"),
        ({"dtype": "int8"}, "dtype"),
        ({"max_prune_steps": 0}, "max_prune_steps"),
        ({"penalty": "bytes"}, "penalty must be 'entries' or 'numbers'"),
    ],
)
def test_a_constant_out_of_range_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**changes)


def test_unknown_fields_and_steps_are_refused():
    with pytest.raises(ValueError, match="learning_rat"):
        CompressionConfig.from_dict({"learning_rat": 1})
    with pytest.raises(ValueError, match="steps"):
        CompressionConfig.short(0)


def test_the_fast_dtype_is_float32_where_bfloat16_is_emulated(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert compute_dtype("auto", torch.device("cpu")) == dtype
    assert compute_dtype("float16", torch.device("cpu")) == torch.float16


# ---- the same result, whatever happens on the way


def test_same_seed_same_result_and_another_seed_another():
    config = short(adapter_dropout=0.2)
    first, second = run(config=config), run(config=config)
    assert torch.equal(flat(first), flat(second))
    other = run(config=short(adapter_dropout=0.2, seed=1))
    assert not torch.equal(flat(first), flat(other))


def test_the_callers_random_state_is_left_alone():
    model = toys.llama()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    run(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_compaction_changes_nothing_but_the_order_of_sums():
    results = {}
    for every in (0, 1, 3):
        config = short(16, 0.4, compact_every=every, dtype="float64", tune_steps=3)
        results[every] = run(toys.llama().double(), config=config)
    for every in (1, 3):
        torch.testing.assert_close(flat(results[every]), flat(results[0]), rtol=1e-6, atol=1e-9)
        assert [row["pruned"] for row in results[every].history] == [row["pruned"] for row in results[0].history]


def test_accumulation_is_the_joint_batch():
    joint = [{"input_ids": torch.cat([a["input_ids"], b["input_ids"]])} for a, b in zip(*[iter(make_batches())] * 2)]
    config = {"dtype": "float64", "adapter_dropout": 0.0}
    one = run(toys.llama().double(), joint, short(6, **config))
    two = run(toys.llama().double(), make_batches(), short(6, gradient_accumulation=2, **config))
    torch.testing.assert_close(flat(two), flat(one), rtol=1e-6, atol=1e-9)


def test_gradient_checkpointing_is_the_same_run():
    config = {"dtype": "float64", "adapter_dropout": 0.0}
    plain = run(toys.llama().double(), config=short(6, **config))
    checkpointed = run(toys.llama().double(), config=short(6, gradient_checkpointing=True, **config))
    torch.testing.assert_close(flat(checkpointed), flat(plain), rtol=1e-12, atol=1e-12)


def test_bfloat16_keeps_masks_and_scores_in_float32():
    model = toys.llama()
    result = run(model, config=short(6, dtype="bfloat16"))
    layer = next(module for module in model.modules() if isinstance(module, SVDLinear))
    assert (layer.U.dtype, layer.Vh.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {layer.mask.dtype, layer.scores.dtype, layer.S.dtype, layer.lora_A.dtype} == {torch.float32}
    # Around 0.02 the steps of bfloat16 are 6e-5: live masks lie between them.
    live = flat(result)[flat(result) > 0]
    assert not torch.equal(live.bfloat16().float(), live)


class Stop(Exception):
    pass


def stop_at(step):
    def on_step(row):
        if row["step"] == step:
            raise Stop

    return on_step


@pytest.mark.parametrize("every_step", [True, False])
@pytest.mark.parametrize("at", [0, 4, 11, 13])
def test_a_resumed_run_is_bit_identical(tmp_path, at, every_step):
    # Dropout and compaction are on: random state and the order of sums have to come back too.
    changes = {"adapter_dropout": 0.2, "compact_every": 2}
    whole = run(config=short(**changes))
    # A checkpoint after every step, or none but the first one: then the steps after it are made again.
    config = short(**changes, checkpoint_seconds=0.0 if every_step else 1e9)
    with pytest.raises(Stop):
        run(config=config, output=tmp_path, on_step=stop_at(at))
    resumed = run(config=config, output=tmp_path, resume=True)
    assert torch.equal(flat(resumed), flat(whole))
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), whole.model.named_parameters()):
        assert torch.equal(a, b), name
    without_time = [{key: value for key, value in row.items() if key != "seconds"} for row in whole.history]
    lines = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    for history in (resumed.history, lines):
        assert [{key: value for key, value in row.items() if key != "seconds"} for row in history] == without_time


SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from test_run import make_batches, short, run
run(config=short(40, adapter_dropout=0.2, checkpoint_seconds=float(sys.argv[2])), output=sys.argv[1],
    on_step=lambda row: (print(row["step"], flush=True), time.sleep(0.05)))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on_bit_identically(tmp_path, number):
    seconds = "0" if number == signal.SIGKILL else "1e9"  # a gentle end writes its own checkpoint
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), seconds], stdout=subprocess.PIPE, text=True, env=environment
    )
    for line in process.stdout:
        if int(line) == 7:
            process.send_signal(number)
            break
    process.stdout.read()
    assert process.wait(60) != 0
    steps = len((tmp_path / HISTORY).read_text().splitlines())
    assert 8 <= steps < 40
    config = short(40, adapter_dropout=0.2)
    resumed = run(config=config, output=tmp_path, resume=True)
    assert len(resumed.history) > steps
    assert torch.equal(flat(resumed), flat(run(config=config)))


def test_a_finished_run_resumes_at_once(tmp_path):
    first = run(output=tmp_path)
    again = run(output=tmp_path, resume=True, on_step=lambda row: pytest.fail("a step was made again"))
    assert torch.equal(flat(again), flat(first))
    assert again.size_ratio == first.size_ratio


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert torch.equal(flat(run(output=tmp_path / "new", resume=True)), flat(run()))


def test_a_second_run_does_not_overwrite_the_first(tmp_path):
    run(output=tmp_path)
    with pytest.raises(ValueError, match="resume it, or give another output"):
        run(output=tmp_path)
    with pytest.raises(ValueError, match="resume needs the output"):
        run(resume=True)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (lambda: toys.llama(), short(13), "max_prune_steps was 12, is 13"),
        (lambda: toys.llama(seed=5), short(), "another model: the singular values of"),
        (lambda: toys.qwen2(), short(), "another model"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, model, config, message):
    with pytest.raises(Stop):
        run(config=short(checkpoint_seconds=0.0), output=tmp_path, on_step=stop_at(3))
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=message):
        run(model(), config=config, output=tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_checkpoint_from_before_a_field_is_resumed(tmp_path):
    with pytest.raises(Stop):
        run(config=short(checkpoint_seconds=0.0), output=tmp_path, on_step=stop_at(3))
    path = tmp_path / CHECKPOINT
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    key = next(key for key, value in about.items() if '"penalty"' in value)
    fields = json.loads(about[key])
    del fields["config"]["penalty"]
    files.write_tensors(path, load_file(path), about | {key: json.dumps(fields)})
    assert torch.equal(flat(run(output=tmp_path, resume=True)), flat(run()))
    with pytest.raises(ValueError, match="penalty was 'entries', is 'numbers'"):
        files.write_tensors(path, load_file(path), about)
        run(config=short(penalty="numbers"), output=tmp_path, resume=True)


def test_a_broken_checkpoint_is_named(tmp_path):
    run(output=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=CHECKPOINT):
        run(output=tmp_path, resume=True)


# ---- what stops a run


class Spoiled(nn.Module):
    """A model whose loss or gradient is not finite from one call on."""

    def __init__(self, call, what):
        super().__init__()
        self.inner, self.calls, self.call, self.what = toys.llama(), 0, call, what

    def forward(self, **batch):
        output = self.inner(**batch)
        self.calls += 1
        if self.calls > self.call:
            # The square root at zero: a finite loss with an infinite gradient.
            zero = (output.loss - output.loss.detach()).clamp_min(0)
            output.loss = (
                output.loss * math.nan if self.what == "loss" else output.loss + (zero + output.loss * 0).sqrt()
            )
        return output


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_with_the_state_before(tmp_path, what):
    config = short(12, adapter_dropout=0.2)
    with pytest.raises(FloatingPointError, match=rf"step 5: the .*{what}.*{CHECKPOINT}"):
        run(Spoiled(5, what), config=config, output=tmp_path)
    assert len((tmp_path / HISTORY).read_text().splitlines()) == 5
    # Good again, it goes on from the state before, bit for bit.
    resumed = run(Spoiled(1000, what), config=config, output=tmp_path, resume=True)
    assert torch.equal(flat(resumed), flat(run(Spoiled(1000, what), config=config)))
    with pytest.raises(FloatingPointError, match="step 5"):
        run(Spoiled(5, what), config=config)


def test_batches_that_run_out(tmp_path):
    with pytest.raises(ValueError, match="ran out after 3 batches"):
        run(batches=iter(make_batches(3)))
    with pytest.raises(ValueError, match="at the start"):
        run(batches=iter([]))
    # A list starts again.
    assert len(run(batches=make_batches(2)).history) > 2


def test_labels_default_to_the_tokens_without_padding():
    ids = make_batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    losses = [
        run(batches=[batch], config=short(1, 0.9)).history[0]["loss"]
        for batch in (
            {"input_ids": ids, "attention_mask": mask},
            {"input_ids": ids, "attention_mask": mask, "labels": labels},
            {"input_ids": ids, "attention_mask": mask, "labels": ids},
        )
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_run_in_a_thread_works_without_signals(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(output=tmp_path)))
    thread.start()
    thread.join(60)
    assert results[0].size_ratio <= 0.5


def test_the_progress_bar_shows_step_loss_lambda_size_and_time(monkeypatch):
    import io

    import rich.progress
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    original = rich.progress.Progress.__init__
    monkeypatch.setattr(
        rich.progress.Progress, "__init__", lambda self, *a, **k: original(self, *a, **k | {"console": console})
    )
    compress(toys.llama(), make_batches(), short(), on_step=lambda row: time.sleep(0.12))
    shown = screen.getvalue()
    for part in ("SVD", "14/14 layers", "prune", "step 5", "loss ", "λ ", "size ", "tune", "left"):
        assert part in shown, part


def test_the_score_map_has_a_flat_buffer_over_all_layers():
    model = toys.llama()
    factorize(model, adapter_rank=0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    scores = ScoreMap(layers)
    assert scores.ranks().tolist() == [layer.full_rank for layer in layers.values()]
    first = next(iter(layers.values()))
    with torch.no_grad():
        first.mask[:3] = -0.5
    scores.update()
    assert scores.ranks()[0] == first.full_rank - 3
    before = copy.deepcopy(first.scores)
    scores.write_back()
    assert first.scores[:3].tolist() == [-1, -1, -1]
    assert torch.equal(first.scores[3:], before[3:])


# ---- routes, adapters in the products, the native kernels: one run


def of_float64(**changes):
    return run(toys.llama().double(), config=short(16, 0.4, dtype="float64", tune_steps=3, **changes))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_way_to_compute_gives_the_same_scores(dropout):
    """Scores are float32: computed in float64, sums in another order are the same to the last of their bits."""
    plain = of_float64(adapter_dropout=dropout, compact_every=0, route="factored")
    ways = [
        {"route": "factored", "compact_every": 1},
        {"route": "effective", "compact_every": 0},
        {"route": "effective", "compact_every": 1},
        {"route": "auto", "save_z": False},
        {"route": "auto", "gradient_checkpointing": True, "compact_every": 3},
    ]
    for way in ways:
        other = of_float64(adapter_dropout=dropout, **way)
        assert torch.equal(flat(other), flat(plain)), way
        assert [row["pruned"] for row in other.history] == [row["pruned"] for row in plain.history]


def test_every_way_to_compute_gives_the_same_ranks_in_float32():
    def ranks(**way):
        result = run(config=short(16, 0.4, dtype="float32", tune_steps=0, **way))
        return {name: int((scores > 0).sum()) for name, scores in result.scores.items()}

    plain = ranks(compact_every=0, route="factored", lean_loss=False)
    for way in ({"route": "factored"}, {"route": "effective"}, {"route": "auto", "compact_every": 2}):
        assert ranks(**way) == plain


def test_accumulation_on_the_effective_route_is_the_joint_batch():
    joint = [{"input_ids": torch.cat([a["input_ids"], b["input_ids"]])} for a, b in zip(*[iter(make_batches())] * 2)]
    config = {"dtype": "float64", "adapter_dropout": 0.0, "route": "effective"}
    one = run(toys.llama().double(), joint, short(6, **config))
    two = run(toys.llama().double(), make_batches(), short(6, gradient_accumulation=2, **config))
    torch.testing.assert_close(flat(two), flat(one), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("route", ["auto", "factored", "effective"])
def test_a_run_resumed_while_compacted_is_bit_identical_on_every_route(tmp_path, route, monkeypatch):
    # A toy's layers have no more ranks than the multiple that two bytes like.
    monkeypatch.setattr(sys.modules[TrainingStep.__module__], "RANK_MULTIPLE_OF_TWO_BYTES", 8)
    changes = {"adapter_dropout": 0.2, "route": route, "gradient_accumulation": 2}
    whole = run(config=short(16, 0.4, **changes))
    config = short(16, 0.4, **changes, checkpoint_seconds=0.0)
    with pytest.raises(Stop):
        run(config=config, output=tmp_path, on_step=stop_at(11))
    model = toys.llama()
    resumed = run(model, config=config, output=tmp_path, resume=True)
    assert any(layer.computed_rank < layer.full_rank for layer in model.modules() if isinstance(layer, SVDLinear))
    assert torch.equal(flat(resumed), flat(whole))


def test_a_run_leaves_layers_that_anything_may_be_done_with():
    model = toys.llama()
    result = run(model)
    for layer in model.modules():
        if isinstance(layer, SVDLinear):
            assert layer.route == "factored" and layer.mask.grad is None and not layer.mask.requires_grad
            assert layer.mask.untyped_storage().nbytes() == layer.mask.numel() * layer.mask.element_size()
    layer = model.model.layers[-1].mlp.down_proj
    before = model(toys.token_ids()).logits
    with torch.no_grad():
        layer.lora_B.add_(1.0)  # nothing holds an older copy of the adapter
    assert not torch.equal(model(toys.token_ids()).logits, before)
    result.at(0.6)


def test_masks_on_two_devices_are_refused():
    model = toys.llama()
    factorize(model, adapter_rank=0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    next(iter(layers.values())).to("meta")
    with pytest.raises(ValueError, match="needs the model on one device"):
        ScoreMap(layers)


@pytest.mark.parametrize("dropout, route", [(0.0, "factored"), (0.3, "effective")])
def test_a_step_compiles_and_is_the_same_step(dropout, route):
    """In float64: ranks die at the same steps, so that every loss is the same but for the order of sums."""

    def history(compiled):
        torch.compiler.reset()
        model = toys.llama().double()
        factorize(model, adapter_rank=2, adapter_dropout=dropout)
        if compiled:
            model.model.forward = torch.compile(model.model.forward, backend="aot_eager")
        config = short(8, 0.5, dtype="float64", adapter_dropout=dropout, tune_steps=2, route=route)
        return run(model, config=config).history

    compiled, eager = history(True), history(False)
    assert [row["pruned"] for row in compiled] == [row["pruned"] for row in eager]
    # A few thousand sums lie behind each other in the 10 steps.
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in eager], rel=1e4 * 2**-52)
    torch.compiler.reset()


def test_a_run_without_native_kernels_says_so(monkeypatch, caplog):
    monkeypatch.setattr("acip_kernels.ops.extension.missing", "not built: for a test")
    run(config=short(2, 0.9, tune_steps=0))
    (line,) = [record.message for record in caplog.records if "native kernels" in record.message]
    assert line == "plain PyTorch runs instead of the native kernels, which are not built: for a test"


@pytest.mark.parametrize("changes", [{"route": "fast"}, {"route": None}])
def test_a_wrong_route_is_named(changes):
    with pytest.raises(ValueError, match="route must be"):
        CompressionConfig(**changes)
