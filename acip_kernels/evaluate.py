"""What a language model is worth: perplexity, speed, size, FLOPs, samples and task accuracies.

Every function takes any transformers causal language model, dense or compressed, on the CPU or on a GPU, runs
it in inference mode, and leaves its train/eval state as it was.
"""

import contextlib
import copy
import dataclasses
import inspect
import itertools
import json
import math
import pathlib
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from . import files
from .generation import cache_name

PAPER_TASKS = ("piqa", "hellaswag", "winogrande", "arc_challenge", "arc_easy", "openbookqa", "mathqa")
"""The seven zero-shot tasks of the ACIP paper, by their lm_eval names."""

TEXT_TASKS = ("last_word", "sentence_order")
"""The tasks that `write_text_tasks` makes of a text, by their names."""

# Logits turned to float32 at a time: 64 MiB, however large the vocabulary is.
_CHUNK_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The exponential of the mean next-token cross-entropy, and what it was taken over.

    `tokens_scored` tokens were predicted in `windows` windows of at most `context` tokens, `stride` tokens
    apart.
    """

    value: float
    tokens_scored: int
    windows: int
    context: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Speed:
    """Batch-1 speed of one model: medians over `rounds`, with the slowest and the fastest round as the range.

    `decode_*` is one token at a time after a prompt of `prompt_tokens`, `prefill_*` one forward over
    `prefill_tokens`. A ratio is this model's median speed over the first model's: 2.0 is twice as fast.
    """

    decode_tokens_per_s: float
    decode_ms_per_token: float
    decode_range: tuple[float, float]
    decode_ratio: float
    prefill_tokens_per_s: float
    prefill_range: tuple[float, float]
    prefill_ratio: float
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int
    rounds: int


# ---- perplexity


def perplexity(model, tokens, *, context=1024, stride=None, max_windows=None, progress=None):
    """Perplexity of `model` on a text, in windows.

    tokens: integer tensor [n], n >= 2, the token ids of one text.
    context: tokens per window. stride: tokens between the starts of two windows, `None` for `context`. With
      `stride == context` windows do not overlap, each scores its last `context - 1` tokens, and a last
      partial window is dropped unless it is the only one. With `stride < context` each window scores only the
      tokens no earlier window scored, and the last one is cut at the end of the text: every token but the
      first is scored.
    max_windows: take this many windows, spread evenly over the text (of w windows, those numbered
      `(2i + 1) w // (2 max_windows)`), scoring the tokens they score anyhow. `None`, or more than w: all.
    progress: called as `progress(done, total)` after every window.

    The loss is computed in float32 from logits of any dtype, a few rows at a time, and summed in float64.

    Returns a `Perplexity`; its value is `inf` where the mean loss is beyond the range of a float64
    exponential. Raises TypeError if `tokens` is no integer tensor; ValueError if its shape or ids do not fit,
    if a count is out of range, or if a window is longer than the model's positions; FloatingPointError with
    the window's number if a logit is not finite.
    """
    _check_tokens(model, tokens)
    _check_count("context", context, 2)
    stride = context if stride is None else stride
    _check_count("stride", stride, 1)
    if stride > context:
        raise ValueError(f"stride ({stride}) must not exceed context ({context}): tokens would go unscored")
    windows = _windows(tokens.numel(), context, stride)
    _check_positions(model, "context", max(stop - start for start, stop, _ in windows))
    chosen: Sequence[int] = range(len(windows))
    if max_windows is not None:
        _check_count("max_windows", max_windows, 1)
        if max_windows < len(windows):
            chosen = [(2 * i + 1) * len(windows) // (2 * max_windows) for i in range(max_windows)]

    device = _input_device(model)
    loss, scored_tokens = 0.0, 0
    with _evaluating(model):
        for done, number in enumerate(chosen, 1):
            start, stop, scored = windows[number]
            try:
                loss += _window_loss(model, tokens[start:stop].to(device, torch.int64), scored)
            except FloatingPointError:
                raise FloatingPointError(
                    f"non-finite logits in window {number} (tokens {start} to {stop - 1})"
                ) from None
            scored_tokens += scored
            if progress is not None:
                progress(done, len(chosen))
    mean = loss / scored_tokens
    value = math.exp(mean) if mean < 709 else math.inf
    return Perplexity(value, scored_tokens, len(chosen), context, stride)


def _windows(n, context, stride):
    """The windows of a text of n tokens, as (start, stop, how many of its last tokens it scores)."""
    if stride == context:
        starts = range(0, n - context + 1, context) or [0]
        return [(start, min(start + context, n), min(context, n) - 1) for start in starts]
    windows, scored_to = [], 1
    for start in range(0, n, stride):
        stop = min(start + context, n)
        windows.append((start, stop, stop - scored_to))
        scored_to = stop
        if stop == n:
            return windows


def _window_loss(model, ids, scored):
    """Summed cross-entropy of the last `scored` of `ids` [n], a Python float. Raises FloatingPointError."""
    # The row of logits at a position predicts the token after it, so the last row predicts nothing known.
    logits = _logits(model, ids[None], scored + 1)[0, :-1]
    targets = ids[-scored:].to(logits.device)
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    loss = 0.0
    for some, some_targets in zip(logits.split(rows), targets.split(rows), strict=True):
        if not torch.isfinite(some).all():
            raise FloatingPointError
        losses = nn.functional.cross_entropy(some.float(), some_targets, reduction="none")
        loss += losses.double().sum().item()
    return loss


def _logits(model, ids, last):
    """The `last` rows of logits for `ids` [1, n]: [1, last, vocabulary], in the model's dtype."""
    if _keeps_logits(model):
        return model(input_ids=ids, use_cache=False, logits_to_keep=last).logits
    return model(input_ids=ids, use_cache=False).logits[:, -last:]


# ---- speed


def speed(models, *, prompt_tokens=16, new_tokens=32, prefill_tokens=512, rounds=3, input_ids=None):
    """Decode and prefill speed of several models at batch 1, measured side by side.

    models: dict of name -> model. The first is what the ratios compare with.
    input_ids: integer tensor [n] or [1, n] to take the prompt and the prefill text from (their first tokens);
      `None` for random ids, the same for every model.

    Decoding goes through the models' own greedy `generate`, past any end-of-text token; every token is
    stamped as it reaches the host, so the first one (the prefill) is left out, and a round's figure is the
    median of the others' times. Prefill is one forward over `prefill_tokens` that fills a cache and keeps one
    row of logits. After one warm-up each, the models take turns in every round, in reverse order in every
    other one, so that a machine that grows slower slows all of them.

    Returns a dict of name -> `Speed`. Raises TypeError for something that is no model or no integer tensor,
    ValueError for counts out of range or too few `input_ids`, RuntimeError if `generate` stops early.
    """
    if not isinstance(models, dict) or not models:
        raise TypeError("models must be a dict of name -> model, with at least one")
    for name, model in models.items():
        if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
            raise TypeError(f"models[{name!r}] must be a model with generate(), got {type(model).__name__}")
    _check_count("prompt_tokens", prompt_tokens, 1)
    _check_count("new_tokens", new_tokens, 2)
    _check_count("prefill_tokens", prefill_tokens, 1)
    _check_count("rounds", rounds, 1)
    longest = max(prompt_tokens, prefill_tokens)
    if input_ids is None:
        vocabulary = min(model.get_input_embeddings().num_embeddings for model in models.values())
        input_ids = torch.randint(vocabulary, (longest,), generator=torch.Generator().manual_seed(0))
    ids = input_ids[0] if isinstance(input_ids, torch.Tensor) and input_ids.shape[:-1] == (1,) else input_ids
    for model in models.values():
        _check_tokens(model, ids, "input_ids")
        _check_positions(model, "prefill_tokens", prefill_tokens)
        _check_positions(model, "prompt_tokens + new_tokens", prompt_tokens + new_tokens)
    if ids.numel() < longest:
        raise ValueError(f"input_ids holds {ids.numel()} tokens, fewer than the {longest} asked for")

    def measure(model):
        prompt, text = (ids[None, :n].to(_input_device(model)) for n in (prompt_tokens, prefill_tokens))
        with _evaluating(model):
            return _decode_seconds(model, prompt, new_tokens), _prefill_seconds(model, text) / prefill_tokens

    for model in models.values():
        measure(model)
    seconds: dict[Any, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(rounds):
        for name in list(models)[:: -1 if number % 2 else 1]:
            seconds[name].append(measure(models[name]))

    first = next(iter(models))
    decode = {name: [pair[0] for pair in pairs] for name, pairs in seconds.items()}
    prefill = {name: [pair[1] for pair in pairs] for name, pairs in seconds.items()}
    results = {}
    for name in models:
        decode_median, prefill_median = statistics.median(decode[name]), statistics.median(prefill[name])
        results[name] = Speed(
            decode_tokens_per_s=1 / decode_median,
            decode_ms_per_token=1e3 * decode_median,
            decode_range=(1 / max(decode[name]), 1 / min(decode[name])),
            decode_ratio=statistics.median(decode[first]) / decode_median,
            prefill_tokens_per_s=1 / prefill_median,
            prefill_range=(1 / max(prefill[name]), 1 / min(prefill[name])),
            prefill_ratio=statistics.median(prefill[first]) / prefill_median,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            prefill_tokens=prefill_tokens,
            rounds=rounds,
        )
    return results


class _Stopwatch:
    """A streamer that stamps the time at which the prompt, then each new token, reaches the host."""

    def __init__(self):
        self.stamps = []

    def put(self, value):
        self.stamps.append(time.perf_counter())

    def end(self):
        pass


def _decode_seconds(model, prompt, new_tokens):
    """Median seconds per decoded token after the first, over one generate."""
    watch = _Stopwatch()
    # No end-of-text token: every model must decode the same number of tokens.
    _greedy(model, prompt, new_tokens, eos_token_id=None, streamer=watch)
    if len(watch.stamps) != new_tokens + 1:
        raise RuntimeError(f"generate gave {len(watch.stamps) - 1} tokens where {new_tokens} were asked for")
    after_prefill = watch.stamps[1:]
    return statistics.median(b - a for a, b in itertools.pairwise(after_prefill))


def _prefill_seconds(model, ids):
    """Seconds of one forward over `ids` [1, n] that fills a cache."""
    options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    _synchronize(ids.device)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, **options)
    _synchronize(ids.device)
    return time.perf_counter() - start


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- size, work and memory


def parameter_counts(model):
    """Numbers of elements a checkpoint of `model` stores: its parameters and persistent buffers.

    Returns a dict of ints. `stored` is all of them, and the sum of the others: `embedding` (token and
    position embeddings), `head` (the output embedding; 0 when tied to the token embedding), `linear` (every
    other linear layer in whatever form: dense, low-rank, masked with its scores and adapters) and `other`
    (norms and the rest). What is shared is counted once, where it comes first in that order. Packed low-bit
    weights count as the elements they are stored in.
    """
    state = model.state_dict(keep_vars=True)
    left = {id(value): value.numel() for value in state.values() if isinstance(value, torch.Tensor)}
    counts = {"stored": sum(left.values())}

    def take(modules):
        tensors = (value for module in modules for value in module.state_dict(keep_vars=True).values())
        return sum(left.pop(id(value), 0) for value in tensors)

    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    counts["embedding"] = take(module for module in model.modules() if isinstance(module, nn.Embedding))
    counts["head"] = take([] if head is None else [head])
    counts["linear"] = take(module for module in model.modules() if _is_linear(module))
    counts["other"] = sum(left.values())
    return counts


def _is_linear(module):
    # By its sizes' names, not by class: every layer that stands in for nn.Linear has them, GPT-2's has not.
    has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
    return has_sizes or type(module).__name__ == "Conv1D"


def file_bytes(directory):
    """Bytes of the `*.safetensors` files in `directory`, not below it. Raises ValueError if it has none."""
    files = list(pathlib.Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"directory {directory} holds no *.safetensors file")
    return sum(file.stat().st_size for file in files)


def flops_per_token(model, context=128):
    """Floating-point operations of decoding one token with `context` tokens in the cache, an int.

    Multiplications and additions count separately; only matrix products and attention count. An operator from
    outside PyTorch without a registered formula counts 2 per element of every matrix it is given, which is
    what multiplying one token by its weights takes. Grouped products of mixture-of-experts layers are not
    counted.

    Runs the model for `context + 1` tokens. Raises ValueError if `context` is out of range.
    """
    _check_count("context", context, 1)
    _check_positions(model, "context + 1", context + 1)
    ids = torch.zeros(1, context, dtype=torch.int64, device=_input_device(model))
    options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    # PyTorch's own table lacks attention on the CPU, and its formula refuses grouped key-value heads.
    attention = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_efficient_attention,
        torch.ops.aten._scaled_dot_product_cudnn_attention,
    )
    formulas = dict.fromkeys(attention, _attention_flops)
    with _evaluating(model):
        name = cache_name(model)
        cache = {name: getattr(model(input_ids=ids, use_cache=True, **options), name)}
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter, _ForeignFlops() as foreign:
            model(input_ids=ids[:, :1], **cache, use_cache=True, **options)
    return counter.get_total_flops() + foreign.total


def _attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    batch, heads, queries, width = query_shape
    return 2 * batch * heads * queries * key_shape[2] * (width + value_shape[3])


class _ForeignFlops(TorchDispatchMode):
    """Counts what FlopCounterMode silently leaves out: other libraries' operators, such as our kernels."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace = getattr(func, "namespace", "aten")
        if namespace not in ("aten", "prim", "prims") and func._overloadpacket not in flop_registry:
            tensors = (value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
            for tensor in tensors:
                # One token's activations have a single row: what has several is a weight (or a cache).
                if tensor.is_floating_point() and tensor.ndim >= 2 and min(tensor.shape[-2:]) > 1:
                    self.total += 2 * tensor.numel()
        return func(*args, **kwargs)


def peak_memory_bytes(device):
    """Most memory held so far, in bytes: by torch on a CUDA `device`, else by this process (resident).

    The first can be reset with `torch.cuda.reset_peak_memory_stats`, the second only by a new process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# ---- text and tasks


def generate_samples(model, tokenizer, prompts, new_tokens=48):
    """Greedy continuations of `prompts` (a list of str), without the prompts: a list of str.

    A sample ends after `new_tokens` tokens or at the model's end-of-text token. Raises TypeError if `prompts`
    is no list of str, ValueError for an empty prompt or a count below 1.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts must be a list of str")
    _check_count("new_tokens", new_tokens, 1)
    samples = []
    with _evaluating(model):
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(_input_device(model), torch.int64)
            if ids.numel() == 0:
                raise ValueError(f"prompts: {prompt!r} holds no token")
            pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            output = _greedy(model, ids, new_tokens, pad_token_id=pad)
            samples.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return samples


def tasks(model, tokenizer, names, *, include_path=None, limit=None, batch_size=1):
    """Scores of `model` on lm_eval tasks.

    names: names of tasks (or of groups, which stand for their tasks), such as `PAPER_TASKS`. include_path: a
      folder of task YAML files of one's own; lm_eval's own tasks are looked up only for a name that is not
      there.
    limit: at most this many examples a task.

    Returns {task: {metric: value}}, such as `{"piqa": {"acc": 0.68, "acc_stderr": 0.01}}`, accuracies as
    fractions; a metric behind a filter is named `metric,filter`. Raises TypeError or ValueError for bad
    names, and RuntimeError if lm_eval is missing or a task's data cannot be fetched.
    """
    names = list(names) if not isinstance(names, str) else None
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError("names must be a list of task names")
    try:
        import lm_eval
        from huggingface_hub.errors import HfHubHTTPError
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeError(f"tasks need lm_eval ({error}): install acip-kernels[eval]") from None

    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        # Reading lm_eval's own 14 000 definitions takes ten seconds.
        manager = TaskManager(include_path=include_path, include_defaults=True)
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"names: lm_eval knows no task {', '.join(unknown)}")

    with _evaluating(model):
        # A copy, because HFLM gives its tokenizer a padding token.
        harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        try:
            results = lm_eval.simple_evaluate(
                harness,
                tasks=names,
                task_manager=manager,
                limit=limit,
                log_samples=False,
                # The caller's random states are not ours to seed; few-shot examples have a seed of their own.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )["results"]
        except (ConnectionError, HfHubHTTPError) as error:
            reason = str(error).split("\n")[0]
            message = f"the data of {', '.join(names)} cannot be fetched from the hub: {reason}"
            raise RuntimeError(message) from error
    return {task: _numbers(result) for task, result in results.items()}


def write_text_tasks(folder, articles, count=200, seed=0):
    """Two lm_eval tasks made of a text of one's own, which need no hub: their files in `folder`, for `tasks`.

    Of `articles`, a list of str, up to `count` places each, drawn by `seed`, the same for every model:

    - "last_word": three sentences without the last word, which is to be predicted; `acc` is how often every token of it
      is the most likely one, `perplexity` what the word costs (as LAMBADA is scored, arXiv 1606.06031).
    - "sentence_order": three sentences, and the next two in their order or in the other: which is more likely? Chance
      is 0.5.

    Raises ValueError if the text has no five sentences of 5 to 40 words in a row.
    """
    places = []
    for article in articles:
        for paragraph in article.split("\n"):
            sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph.strip())
            for start in range(0, len(sentences) - 4, 5):
                five = sentences[start : start + 5]
                # The last word of the third is predicted: a word, and not all of the sentence.
                if all(5 <= len(one.split()) <= 40 for one in five) and re.search(r" [A-Za-z]{3,}[.!?]$", five[2]):
                    places.append(five)
    if not places:
        raise ValueError("articles: there are no five sentences of 5 to 40 words in a row to make tasks of")
    draw = random.Random(seed)
    draw.shuffle(places)
    last, order = [], []
    for five in places[:count]:
        context, word = " ".join(five[:3]).rsplit(" ", 1)
        last.append({"context": context, "word": " " + word.rstrip(".!?")})
        pair, label = [f" {five[3]} {five[4]}", f" {five[4]} {five[3]}"], draw.randrange(2)
        order.append({"context": " ".join(five[:3]), "choices": pair[::-1] if label else pair, "label": label})
    folder = pathlib.Path(folder)
    for name, examples, rest in (
        (
            "last_word",
            last,
            'output_type: loglikelihood\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{word}}"\n'
            "metric_list:\n  - metric: acc\n  - metric: perplexity\n",
        ),
        (
            "sentence_order",
            order,
            'output_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{label}}"\n'
            'doc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc\n',
        ),
    ):
        data = folder / f"{name}.jsonl"
        files.write_text(data, "".join(json.dumps(example) + "\n" for example in examples))
        files.write_text(
            folder / f"{name}.yaml",
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {json.dumps(str(data.resolve()))}\n"
            f'test_split: train\ntarget_delimiter: ""\n{rest}',
        )


def _numbers(result):
    """lm_eval's `{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": …}` as `{"acc": 0.5}`."""
    metrics = {key.removesuffix(",none"): value for key, value in result.items() if "," in key}
    return {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}


# ---- shared


@contextlib.contextmanager
def _evaluating(model):
    """Evaluation and inference mode; every module gets back the state it had, also where children differ."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _greedy(model, ids, new_tokens, **options):
    """Stock greedy generate from `ids` [1, n]; a chat model's own sampling settings are put aside."""
    no_sampling = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, use_cache=True, **no_sampling, **options)


def _input_device(model):
    return model.get_input_embeddings().weight.device


def _keeps_logits(model):
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _check_count(name, value, least):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_tokens(model, tokens, name="tokens"):
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tokens).__name__}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {tokens.dtype}")
    if tokens.ndim != 1 or tokens.numel() < 2:
        raise ValueError(f"{name} must be a text [n] of at least 2 tokens, got shape {list(tokens.shape)}")
    # On a GPU an id out of range is an assertion that ends the process's use of the device.
    low, high, vocabulary = int(tokens.min()), int(tokens.max()), model.get_input_embeddings().num_embeddings
    if low < 0 or high >= vocabulary:
        raise ValueError(f"{name} holds ids {low} to {high}, outside the model's vocabulary of {vocabulary}")


def _check_positions(model, name, length):
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"{name} ({length}) exceeds the model's max_position_embeddings ({positions})")


# ---- one model in a table


def table_row(
    model, method, *, tokens=None, context=1024, stride=None, max_windows=None, directory=None, progress=None
):
    """What one model is worth without regard to speed, as a row of `report`'s tables.

    method: the row's name. tokens: a text to take the perplexity on, see `perplexity`; None for none.
    directory: where its files are, for their size; None for no size.

    Returns a dict: `method`, `size_ratio` (the target, 1.0 for a model that was not cut), `factorized` and `stored`
    (what it came to, in either count), `parameters`, `file_bytes`, `perplexity`, `flops_per_token`.
    """
    fields = getattr(model.config, "quantization_config", None) or {}
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 129
    row = {
        "method": method,
        **{key: fields.get(key, 1.0) for key in ("size_ratio", "factorized", "stored")},
        "parameters": parameter_counts(model)["stored"],
        "file_bytes": None if directory is None else file_bytes(directory),
        "perplexity": None,
        "flops_per_token": flops_per_token(model, min(128, positions - 1)),
    }
    if tokens is not None:
        options = {"context": context, "stride": stride, "max_windows": max_windows, "progress": progress}
        row["perplexity"] = perplexity(model, tokens, **options).value
    return row


def with_speed(rows, models, **options):
    """`rows` with the speeds of `models` (a dict by the rows' positions), measured side by side; see `speed`."""
    measured = speed(models, **options)
    rows = [dict(row) for row in rows]
    for position, one in measured.items():
        rows[position] |= {
            "decode_tokens_per_s": one.decode_tokens_per_s,
            "decode_ratio": one.decode_ratio,
            "prefill_tokens_per_s": one.prefill_tokens_per_s,
            "prefill_ratio": one.prefill_ratio,
        }
    return rows
