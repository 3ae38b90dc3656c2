"""The demo: a real model, compressed, measured at every size, and drawn."""

from __future__ import annotations

import contextlib
import pathlib
import time

import torch

from . import data as texts
from . import evaluate, files, report
from .compress import NestedConfig, compress, materialize
from .compress.basis import layer_covariances, whitened_svd
from .compress.config import cast, compute_dtype
from .compress.step import with_labels
from .models.fuse import fuse
from .models.saving import checkpoint_dtype, save
from .models.targets import choose_targets, linear_layers, weight_of
from .ops import extension

SIZES = (1.0, 0.8, 0.6, 0.4)
PROMPTS = ("The capital of France is", "Photosynthesis is the process by which")
SAMPLE_TOKENS = 24
# Articles of the demo's text that are held out for the perplexity.
HELD_OUT = 20
# With these windows the dense SmolLM2-135M has 16.8.
CONTEXT, WINDOWS = 1024, 16
BATCH, LENGTH = 1, 1024
CALIBRATION_BATCHES = 12


def run_demo(
    *, model=None, data=None, output, steps=None, minutes=10.0, cache=None, device="cpu", dtype="auto", console
) -> dict:
    """Compress a model by the default method, write it at every size of `SIZES`, and compare the sizes.

    model: hub name or directory; None for SmolLM2-135M. data: what `data.read_texts` takes; None for Wikipedia
    articles. steps: of training; None for as many as fit into `minutes`, going by what a few things take here.

    An interrupted demo goes on where it was. Returns the summary that it also writes to `output/summary.json`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    output = pathlib.Path(output)
    with _phase(console, "Model and text"):
        source = model or str(texts.demo_model(cache, log=console.print))
        articles = texts.demo_texts(cache, log=console.print) if data is None else texts.read_texts(data)
        where = torch.device(device)
        wanted = compute_dtype(dtype, where)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        dense = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, dtype=wanted).to(where).eval()
        # The file is written in the dtype that the model came in, whatever is fast to compute with here.
        stored_dtype = checkpoint_dtype(source) or wanted
        training, test = _split(tokenizer, articles)
    about_model = model or "SmolLM2-135M-Instruct"
    console.print(
        f"{about_model}: {sum(p.numel() for p in dense.parameters()) / 1e6:.1f} M parameters, {wanted} on {where}"
    )

    context = min(CONTEXT, getattr(dense.config.get_text_config(), "max_position_embeddings", CONTEXT))
    windows = {"context": context, "max_windows": WINDOWS}
    rows = []
    with _counting(console, "Perplexity of the dense model") as progress:
        window_seconds = time.monotonic()
        rows.append(evaluate.table_row(dense, "dense", tokens=test, progress=progress, **windows))
        window_seconds = (time.monotonic() - window_seconds) / WINDOWS
    with _phase(console, "Size of the dense model"):
        rows[0]["file_bytes"] = _bytes_of(dense, stored_dtype)
    samples = {"dense": evaluate.generate_samples(dense, tokenizer, PROMPTS, SAMPLE_TOKENS)}

    batches = texts.Batches(training, batch_size=BATCH, length=min(LENGTH, context))
    resume = (output / "run.json").exists()
    if resume:
        steps = files.read_json(output / "run.json")["steps"]
    elif steps is None:
        with _phase(console, "Timing a step"):
            left = 60 * minutes - (time.monotonic() - started) - _seconds_afterwards(window_seconds)
            steps = _fitting_steps(dense, batches, left)
    config = NestedConfig(
        steps=steps,
        calibration_batches=CALIBRATION_BATCHES,
        smallest_ratio=min(SIZES) - 0.05,
        dtype=str(wanted).removeprefix("torch."),
    )
    files.write_json(output / "run.json", {"steps": steps, "model": about_model, "config": config.to_dict()})
    console.print(
        f"Ranking on {CALIBRATION_BATCHES * batches.tokens_per_batch} tokens, then {steps} steps of "
        f"{batches.tokens_per_batch}"
    )
    result = compress(dense, batches, config, output=output, resume=resume, svd_cache=texts.svd_cache(source, cache))

    models = {}
    for size in SIZES:
        name = f"size-{size:g}"
        with _counting(console, f"Size {size:g}") as progress:
            cut = materialize(result, size)
            save(cast(cut, stored_dtype), output / name, tokenizer=tokenizer, base_model=source, overwrite=True)
            cast(cut, wanted)
            rows.append(
                evaluate.table_row(cut, "nested", tokens=test, directory=output / name, progress=progress, **windows)
            )
            # As it is deployed, see `load(..., fuse=True)`.
            models[len(rows) - 1] = fuse(cut) if extension.available() else cut
            samples[name] = evaluate.generate_samples(cut, tokenizer, PROMPTS, SAMPLE_TOKENS)
    cuts = {size: result.cut(size) for size in SIZES[1:]}
    cast(result.model, stored_dtype)
    result.save(output / "elastic", tokenizer=tokenizer, base_model=source, overwrite=True)
    del result, dense, cut
    with _phase(console, "Speed of all sizes side by side"):
        models = {
            0: AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, dtype=wanted).to(where).eval(),
            **models,
        }
        options = {"new_tokens": 24, "prefill_tokens": min(512, context), "rounds": 2, "input_ids": test}
        rows = evaluate.with_speed(rows, models, **options)

    for row in rows:
        if row["method"] == "dense":
            row["stored"] = row["factorized"] = 1.0
    plots = [
        *report.plot_perplexity(rows, output / "plots" / "perplexity", x="stored"),
        *report.plot_history(report.read_history(output / "history.jsonl"), output / "plots" / "history"),
    ]
    for size, at_size in cuts.items():
        ranks = {name: (int(live.sum()), live.numel()) for name, live in at_size.live.items()}
        plots += report.plot_ranks(ranks, output / "plots" / f"ranks-{size:g}")
    summary = {
        "model": about_model,
        "data": data or "wikipedia-demo",
        "device": report.device_description(where) | {"dtype": str(wanted).removeprefix("torch.")},
        "run": {
            "steps": steps,
            "tokens": steps * batches.tokens_per_batch,
            "calibration_tokens": CALIBRATION_BATCHES * batches.tokens_per_batch,
        },
        "perplexity_on": {"tokens": test.numel(), "context": context, "windows": WINDOWS},
        "rows": rows,
        "prompts": list(PROMPTS),
        "samples": samples,
        "plots": [str(path) for path in plots],
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": evaluate.peak_memory_bytes(where),
    }
    files.write_json(output / "summary.json", summary)
    console.print(report.rich_table(rows))
    console.print(
        f"{summary['seconds'] / 60:.1f} minutes, peak memory {summary['peak_memory_bytes'] / 1e9:.1f} GB. "
        f"Models, log and plots are in {output}"
    )
    return summary


def _split(tokenizer, articles) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to train on, and held-out ones: the last articles, or the last tenth of a single text."""
    held_out = min(HELD_OUT, len(articles) // 5)
    if held_out:
        return texts.tokenize(tokenizer, articles[:-held_out]), texts.tokenize(tokenizer, articles[-held_out:])
    tokens = texts.tokenize(tokenizer, articles)
    return tokens[: -tokens.numel() // 10], tokens[-tokens.numel() // 10 :]


def _seconds_afterwards(window_seconds: float) -> float:
    """About how long all else takes: evaluating four models, the speeds of five, files."""
    return 4 * WINDOWS * window_seconds + 25 * window_seconds + 40


def _fitting_steps(model, batches, seconds: float) -> int:
    """How many steps fit into `seconds` beside the ranking, going by small parts of both on the dense model."""
    batch = with_labels(next(iter(batches)), model.device)
    times = []
    for _ in range(3):
        start = time.monotonic()
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
        times.append(time.monotonic() - start)
    # The teacher's pass besides, and products of the updates; smaller sizes cost less.
    step = 1.25 * min(times)
    return max(16, min(400, int((seconds - _ranking_seconds(model, batch)) / step)))


def _ranking_seconds(model, batch: dict) -> float:
    """About how long the ranking takes: one batch's statistics, and one decomposition of every shape, extrapolated."""
    layers, _ = linear_layers(model)
    names = choose_targets(layers, "all-linear")
    start = time.monotonic()
    inputs, gradients = layer_covariances(model, names, [batch])
    total = CALIBRATION_BATCHES * (time.monotonic() - start)
    by_shape: dict[tuple, list[str]] = {}
    for name in names:
        by_shape.setdefault(tuple(weight_of(layers[name]).shape), []).append(name)
    for alike in by_shape.values():
        start = time.monotonic()
        whitened_svd(weight_of(layers[alike[0]]).detach(), inputs[alike[0]], gradients[alike[0]])
        total += len(alike) * (time.monotonic() - start)
    return total


def _bytes_of(model, dtype) -> int:
    """Bytes of the safetensors file of `model` in `dtype`: its tensors, as a tied one is stored once."""
    state = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in state.values())


@contextlib.contextmanager
def _phase(console, name: str):
    with console.status(f"{name} …"):
        yield


@contextlib.contextmanager
def _counting(console, name: str):
    """A bar over the windows of one evaluation; yields `progress(done, total)`."""
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
