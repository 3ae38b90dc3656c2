"""evaluate.py against hand computations, on tiny random models."""

import copy
import json
import math
import sys
import time

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from acip_kernels import evaluate

VOCABULARY = 64


def make_llama(seed=0, **changes):
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 160,
        "initializer_range": 0.3,  # enough for confident, distinct predictions
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.fixture(scope="module")
def llama():
    return make_llama()


@pytest.fixture(scope="module")
def text():
    return torch.randint(VOCABULARY, (75,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    words = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def token_loss(model, before, token):
    """-log p(token | before) in float64, from a forward of its own."""
    logits = model(input_ids=before[None]).logits[0, -1].double()
    return float(logits.logsumexp(0) - logits[token])


# ---- perplexity


def test_perplexity_of_separate_windows_is_the_mean_of_their_token_losses(llama, text):
    exact = copy.deepcopy(llama).double()
    losses = [
        token_loss(exact, text[start:at], text[at]) for start in (0, 16, 32, 48) for at in range(start + 1, start + 16)
    ]
    result = evaluate.perplexity(llama, text, context=16)
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result == evaluate.Perplexity(result.value, tokens_scored=60, windows=4, context=16, stride=16)


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_sliding_perplexity_scores_every_token_in_the_first_window_that_has_it(llama, text, stride):
    text = text[:42]
    losses = []
    for at in range(1, len(text)):
        # The first window (a multiple of the stride) that reaches the token.
        start = max(0, math.ceil((at + 1 - 16) / stride)) * stride
        losses.append(token_loss(llama, text[start:at], text[at]))
    result = evaluate.perplexity(llama, text, context=16, stride=stride)
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.tokens_scored, result.stride) == (41, stride)
    assert result.windows == math.ceil((42 - 16) / stride) + 1


def test_max_windows_spreads_over_the_text(llama, text):
    seen, calls = [], []
    hook = llama.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].clone()), with_kwargs=True
    )
    result = evaluate.perplexity(
        llama, text, context=8, max_windows=3, progress=lambda done, total: calls.append((done, total))
    )
    hook.remove()
    # Nine windows in three parts: the middle one of each.
    assert [ids.tolist() for ids in seen] == [text[at : at + 8].tolist() for at in (8, 32, 56)]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert (result.windows, result.tokens_scored) == (3, 21)
    parts = [evaluate.perplexity(llama, ids, context=8).value for ids in seen]
    assert result.value == pytest.approx(math.prod(parts) ** (1 / 3), rel=1e-6)
    assert evaluate.perplexity(llama, text, context=8, max_windows=9) == evaluate.perplexity(llama, text, context=8)


def test_a_partial_window_counts_only_when_alone(llama, text):
    alone = evaluate.perplexity(llama, text[:10], context=16)
    loss = sum(token_loss(llama, text[:at], text[at]) for at in range(1, 10)) / 9
    assert alone.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert (alone.windows, alone.tokens_scored) == (1, 9)
    assert evaluate.perplexity(llama, text[:10], context=16, stride=4) == evaluate.Perplexity(alone.value, 9, 1, 16, 4)
    changed = text[:20].clone()
    changed[16:] = 0
    dropped = evaluate.perplexity(llama, text[:20], context=16)
    assert dropped == evaluate.perplexity(llama, changed, context=16)
    assert dropped.tokens_scored == 15


def test_the_loss_is_float32_in_chunks_of_rows(llama, text, monkeypatch):
    model = copy.deepcopy(llama).bfloat16()
    shapes, dtypes = [], set()
    cross_entropy = nn.functional.cross_entropy

    def spy(logits, *args, **kwargs):
        shapes.append(tuple(logits.shape))
        dtypes.add(logits.dtype)
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "cross_entropy", spy)
    monkeypatch.setattr(evaluate, "_CHUNK_ELEMENTS", 4 * VOCABULARY)
    value = evaluate.perplexity(model, text[:12], context=12).value
    assert shapes == [(4, VOCABULARY), (4, VOCABULARY), (3, VOCABULARY)]
    assert dtypes == {torch.float32}
    with torch.no_grad():
        logits = model(input_ids=text[None, :12]).logits[0, :-1]
    exact = cross_entropy(logits.double(), text[1:12])
    assert logits.dtype == torch.bfloat16
    assert value == pytest.approx(math.exp(exact), rel=1e-6)


def test_a_model_that_cannot_keep_few_logits_gives_the_same(llama, text):
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids=None, use_cache=None):
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    plain = Plain(llama.config).eval()
    plain.load_state_dict(llama.state_dict())
    expected = evaluate.perplexity(llama, text, context=16, stride=4)
    result = evaluate.perplexity(plain, text, context=16, stride=4)
    assert result.value == pytest.approx(expected.value, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_raise_with_the_window(llama, text, bad):
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            output.logits[0, 1, 7] = bad
        return output

    model = copy.deepcopy(llama).train()
    model.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"window 2 \(tokens 32 to 47\)"):
        evaluate.perplexity(model, text, context=16)
    assert all(module.training for module in model.modules())


def test_a_loss_too_large_for_the_exponential_is_infinite(llama, text):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert evaluate.perplexity(model, text, context=16).value == math.inf


def test_training_states_come_back_module_by_module(text):
    model = make_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    first = evaluate.perplexity(model, text, context=16)
    assert first == evaluate.perplexity(model, text, context=16)  # no dropout
    assert {name: module.training for name, module in model.named_modules()} == before
    assert 0 < sum(before.values()) < len(before)
    model(input_ids=text[None], labels=text[None]).loss.backward()  # nothing left over from inference mode
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        ([1, 2, 3], {}, TypeError, "tokens must be a tensor"),
        (torch.rand(9), {}, TypeError, "tokens must hold integers"),
        (torch.zeros(3, 4, dtype=torch.long), {}, ValueError, r"tokens .*\[3, 4\]"),
        (torch.zeros(1, dtype=torch.long), {}, ValueError, r"tokens .*\[1\]"),
        (torch.tensor([1, VOCABULARY]), {}, ValueError, "tokens holds ids 1 to 64"),
        (torch.tensor([-1, 3]), {}, ValueError, "tokens holds ids -1 to 3"),
        (torch.arange(9), {"context": 1}, ValueError, "context"),
        (torch.arange(9), {"context": 8.0}, TypeError, "context"),
        (torch.arange(9), {"context": 8, "stride": 9}, ValueError, "stride"),
        (torch.arange(9), {"context": 8, "stride": 0}, ValueError, "stride"),
        (torch.arange(9), {"context": 8, "max_windows": 0}, ValueError, "max_windows"),
        (torch.zeros(300, dtype=torch.long), {"context": 200}, ValueError, r"context \(200\).*160"),
    ],
)
def test_perplexity_names_the_bad_argument(llama, tokens, options, error, message):
    with pytest.raises(error, match=message):
        evaluate.perplexity(llama, tokens, **options)


# ---- speed


def test_speed_takes_turns_and_decodes_past_the_end_of_text(monkeypatch):
    models = {"a": make_llama(), "b": make_llama(1)}
    order, lengths = [], []
    for name, model in models.items():
        model.generation_config.eos_token_id = list(range(VOCABULARY))  # every token ends the text
        generate = model.generate

        def logged(*args, name=name, generate=generate, **kwargs):
            order.append(name)
            output = generate(*args, **kwargs)
            lengths.append(output.shape[1])
            return output

        monkeypatch.setattr(model, "generate", logged)
    result = evaluate.speed(models, prompt_tokens=5, new_tokens=6, prefill_tokens=20, rounds=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert set(lengths) == {5 + 6}
    assert list(result) == ["a", "b"]
    assert (result["a"].decode_ratio, result["a"].prefill_ratio) == (1, 1)
    for one in result.values():
        low, high = one.decode_range
        assert 0 < low <= one.decode_tokens_per_s <= high
        low, high = one.prefill_range
        assert 0 < low <= one.prefill_tokens_per_s <= high
        assert one.decode_ms_per_token == pytest.approx(1000 / one.decode_tokens_per_s)
        assert (one.prompt_tokens, one.new_tokens, one.prefill_tokens, one.rounds) == (5, 6, 20, 3)
    ratio = result["b"].decode_tokens_per_s / result["a"].decode_tokens_per_s
    assert result["b"].decode_ratio == pytest.approx(ratio)
    assert all(model.training is False for model in models.values())


def test_speed_tells_prefill_from_decode():
    def slow_prefill(module, args, kwargs):
        seen.append(kwargs["input_ids"])
        if kwargs["input_ids"].shape[1] > 1:
            time.sleep(0.1)

    def slow_decode(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            time.sleep(0.1)

    seen, ids = [], torch.arange(30) % VOCABULARY
    models = {"prefill": make_llama(), "decode": make_llama()}
    models["prefill"].register_forward_pre_hook(slow_prefill, with_kwargs=True)
    models["decode"].register_forward_pre_hook(slow_decode, with_kwargs=True)
    result = evaluate.speed(models, prompt_tokens=4, new_tokens=2, prefill_tokens=30, rounds=1, input_ids=ids[None])
    assert result["decode"].decode_ms_per_token >= 100
    assert result["prefill"].decode_ms_per_token < 40  # half of a prefill would show
    assert result["decode"].decode_ratio < 1 < result["decode"].prefill_ratio
    assert result["prefill"].prefill_tokens_per_s <= 30 / 0.1
    prompts = [one[0].tolist() for one in seen if one.shape[1] > 1]
    assert prompts == 2 * [list(range(4)), list(range(30))]


def test_speed_notices_a_generate_that_stops_early(llama, monkeypatch):
    generate = llama.generate
    monkeypatch.setattr(llama, "generate", lambda *args, **kwargs: generate(*args, **kwargs | {"max_new_tokens": 3}))
    with pytest.raises(RuntimeError, match="3 tokens where 5"):
        evaluate.speed({"a": llama}, prompt_tokens=4, new_tokens=5, prefill_tokens=4, rounds=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"models": {}}, TypeError, "models"),
        ({"models": {"a": nn.Linear(2, 2)}}, TypeError, "'a'"),
        ({"new_tokens": 1}, ValueError, "new_tokens"),
        ({"rounds": 0}, ValueError, "rounds"),
        ({"prefill_tokens": 161}, ValueError, "prefill_tokens"),
        ({"prefill_tokens": 20, "input_ids": torch.arange(19)}, ValueError, "19 tokens, fewer than the 20"),
        ({"prefill_tokens": 20, "input_ids": torch.rand(20)}, TypeError, "input_ids"),
    ],
)
def test_speed_names_the_bad_argument(llama, options, error, message):
    with pytest.raises(error, match=message):
        evaluate.speed(**{"models": {"a": llama}, "prefill_tokens": 8} | options)


# ---- size, work and memory

# Per layer: q 32x32, k and v 16x32, o 32x32, three 48x32; norms of 32.
LINEAR = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
NORMS = 5 * 32
HEAD = VOCABULARY * 32


def test_parameter_counts(llama):
    expected = {"embedding": HEAD, "head": HEAD, "linear": LINEAR, "other": NORMS}
    assert evaluate.parameter_counts(llama) == {"stored": 2 * HEAD + LINEAR + NORMS} | expected
    tied = make_llama(tie_word_embeddings=True)
    assert evaluate.parameter_counts(tied) == {"stored": HEAD + LINEAR + NORMS} | expected | {"head": 0}


def test_parameter_counts_of_factors_and_buffers(llama):
    model = copy.deepcopy(llama)
    layer = model.model.layers[0].mlp
    layer.up_proj = nn.Sequential(nn.Linear(32, 5, bias=False), nn.Linear(5, 48))
    layer.down_proj.register_buffer("scores", torch.zeros(7))
    layer.down_proj.register_buffer("scratch", torch.zeros(9), persistent=False)
    model.register_buffer("extra", torch.zeros(3))
    counts = evaluate.parameter_counts(model)
    assert counts["linear"] == LINEAR - 48 * 32 + 5 * (48 + 32) + 48 + 7
    assert counts["other"] == NORMS + 3
    assert counts["stored"] == sum(value for name, value in counts.items() if name != "stored")
    assert counts["stored"] == sum(value.numel() for value in model.state_dict().values())


def test_parameter_counts_of_gpt2():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10, n_positions=6))
    linear = (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    assert evaluate.parameter_counts(model) == {
        "stored": 10 * 8 + 6 * 8 + linear + 3 * 16,
        "embedding": 10 * 8 + 6 * 8,
        "head": 0,
        "linear": linear,
        "other": 3 * 16,
    }


def test_file_bytes_counts_safetensors_only(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    total = evaluate.file_bytes(tmp_path)
    assert total == (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "model-2.safetensors").write_bytes(b"12345")
    (tmp_path / "notes.bin").write_bytes(b"1234567")
    assert evaluate.file_bytes(str(tmp_path)) == total + 5
    with pytest.raises(ValueError, match="directory"):
        evaluate.file_bytes(tmp_path / "nowhere")


def test_flops_are_those_of_the_linear_layers_and_attention(llama):
    # Attention: two products of 32 columns with 21 cached positions, in 2 layers.
    assert evaluate.flops_per_token(llama, context=20) == 2 * (LINEAR + HEAD) + 2 * 2 * 2 * 32 * 21
    model = copy.deepcopy(llama)
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(32, 5, bias=False), nn.Linear(5, 48))
    saved = evaluate.flops_per_token(llama) - evaluate.flops_per_token(model)
    assert saved == 2 * (32 * 48 - 5 * (32 + 48))
    with pytest.raises(ValueError, match=r"context \+ 1"):
        evaluate.flops_per_token(llama, context=160)


def test_flops_of_an_operator_unknown_to_pytorch(llama):
    @torch.library.custom_op("acip_kernels_test::low_rank", mutates_args=())
    def low_rank(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return x @ down.T @ up.T

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Parameter(torch.rand(5, 32)), nn.Parameter(torch.rand(48, 5))

        def forward(self, x):
            return low_rank(x, self.down, self.up)

    model = copy.deepcopy(llama)
    model.model.layers[0].mlp.up_proj = LowRank()
    saved = evaluate.flops_per_token(llama) - evaluate.flops_per_token(model)
    assert saved == 2 * (32 * 48 - 5 * (32 + 48))


def test_peak_memory_grows_with_what_is_held():
    held = torch.ones(32 * 2**20)
    peak = evaluate.peak_memory_bytes("cpu")
    assert held.sum() == 32 * 2**20
    assert 2**27 <= peak < 2**40
    del held
    assert evaluate.peak_memory_bytes(torch.device("cpu")) >= peak


# ---- text and tasks


def test_samples_are_greedy_continuations_alone(llama, tokenizer):
    model = copy.deepcopy(llama)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    prompts = ["w3 w4 w5", "w60"]
    samples = evaluate.generate_samples(model, tokenizer, prompts, new_tokens=6)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                best = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, best[None, None]], dim=1)
            if best == tokenizer.eos_token_id:
                break
        assert sample == tokenizer.decode(ids[0, length:], skip_special_tokens=True)
        assert sample
    with pytest.raises(TypeError, match="prompts"):
        evaluate.generate_samples(model, tokenizer, "w3")
    with pytest.raises(ValueError, match="prompts"):
        evaluate.generate_samples(model, tokenizer, [""])


def write_task(folder, name, **changes):
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "data.json")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task | changes))  # JSON is YAML


def test_tasks_score_a_local_task_as_by_hand(llama, tokenizer, tmp_path):
    pick = torch.Generator().manual_seed(2)
    examples, right = [], []
    for number in range(12):
        words = [f"w{word}" for word in torch.randint(3, VOCABULARY, (8,), generator=pick).tolist()]
        label = number % 3
        examples.append({"question": " ".join(words[:5]), "choices": words[5:], "label": label})
        ids = tokenizer(" ".join(words), return_tensors="pt").input_ids[0]
        losses = [token_loss(llama, ids[:5], choice) for choice in ids[5:]]
        right.append(losses.index(min(losses)) == label)
    (tmp_path / "data.json").write_text(json.dumps(examples))
    write_task(tmp_path, "toy")

    model = copy.deepcopy(llama).train()
    random_state = torch.get_rng_state()
    result = evaluate.tasks(model, tokenizer, ["toy"], include_path=tmp_path, batch_size=4)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert tokenizer.pad_token is None
    assert result == {
        "toy": {
            "acc": pytest.approx(sum(right) / 12),
            "acc_stderr": pytest.approx((sum(right) / 12 * (1 - sum(right) / 12) / 11) ** 0.5),
        }
    }
    assert 0 < sum(right) < 12
    limited = evaluate.tasks(model, tokenizer, ["toy"], include_path=tmp_path, limit=5)
    assert limited["toy"]["acc"] == pytest.approx(sum(right[:5]) / 5)


ARTICLE = (
    "The first sentence is about a river. It flows from the hills to the sea. Many people live beside its water. "
    "Some of them catch fish in spring. Others grow corn on the fields.\n"
    "Short one. No. It is not long enough. Not this one either. Nor is this.\n"
)


def test_tasks_of_a_text_are_made_of_five_sentences_in_a_row(llama, tokenizer, tmp_path):
    evaluate.write_text_tasks(tmp_path, [ARTICLE] * 7, count=5)
    last, order = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in evaluate.TEXT_TASKS
    )
    start = "The first sentence is about a river. It flows from the hills to the sea. Many people live beside its"
    assert last == [{"context": start, "word": " water"}] * 5
    ordered = [" Some of them catch fish in spring. Others grow corn on the fields."]
    ordered.append(" Others grow corn on the fields. Some of them catch fish in spring.")
    assert [one["context"] for one in order] == [start + " water."] * 5
    for one in order:
        assert one["choices"][one["label"]] == ordered[0] and sorted(one["choices"]) == sorted(ordered)
    assert {one["label"] for one in order} == {0, 1}

    result = evaluate.tasks(llama, tokenizer, evaluate.TEXT_TASKS, include_path=tmp_path)
    assert set(result) == set(evaluate.TEXT_TASKS)
    assert 0 <= result["last_word"]["acc"] <= 1 < result["last_word"]["perplexity"]
    assert 0 <= result["sentence_order"]["acc"] <= 1
    again = tmp_path / "again"
    evaluate.write_text_tasks(again, [ARTICLE] * 7, count=5)
    for name in evaluate.TEXT_TASKS:
        assert (again / f"{name}.jsonl").read_text() == (tmp_path / f"{name}.jsonl").read_text()
    with pytest.raises(ValueError, match="no five sentences"):
        evaluate.write_text_tasks(tmp_path, ["Short. Very."])


def test_tasks_say_in_one_line_that_the_hub_cannot_be_reached(llama, tokenizer, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write_task(tmp_path, "far", dataset_path="nobody/nothing", dataset_kwargs={"cache_dir": str(tmp_path)})
    with pytest.raises(RuntimeError, match="the data of far cannot be fetched from the hub") as caught:
        evaluate.tasks(llama, tokenizer, ["far"], include_path=tmp_path)
    assert "\n" not in str(caught.value)


def test_tasks_name_a_missing_lm_eval(llama, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match=r"install acip-kernels\[eval\]"):
        evaluate.tasks(llama, tokenizer, ["piqa"])


@pytest.mark.parametrize("names", ["piqa", [], [3]])
def test_tasks_want_a_list_of_names(llama, tokenizer, names):
    with pytest.raises(TypeError, match="names"):
        evaluate.tasks(llama, tokenizer, names)
