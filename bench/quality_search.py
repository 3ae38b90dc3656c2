"""Trials of the recipes on validation text: `python -m bench.quality_search --name NAME learning_rate=3e-4`.

What `NestedConfig`'s defaults were chosen by; with `--recipe ranking` of its ranking without training, with `--recipe
paper` of the l1 run (`CompressionConfig.short`).
SmolLM2-135M, trained on all Wikipedia articles but the last 40, judged on the 20 before the test articles of
`bench.quality`, which no trial sees. A trial is stored under its name in `bench/results/quality_search.json`; one that
is there already is not made again.
"""

from __future__ import annotations

import ast
import math
import pathlib
import statistics
import time
from typing import Annotated

import torch
import typer
from rich.console import Console

from acip_kernels import (
    CompressionConfig,
    NestedConfig,
    RankingConfig,
    compress,
    evaluate,
    files,
    materialize,
    report,
)
from acip_kernels import data as texts
from acip_kernels.compress.config import compute_dtype

from .quality import CALIBRATION_BATCHES, CONTEXT, HELD_OUT, LENGTH, ROOT, shared_ranking

RESULTS = ROOT / "bench" / "results" / "quality_search.json"
SIZES = (1.0, 0.8, 0.6, 0.4)
WINDOWS = 8
RECIPES = {"best": NestedConfig, "ranking": RankingConfig, "paper": CompressionConfig.short}

console = Console(stderr=True)


def trial(changes: dict, recipe: str, work: pathlib.Path, device: torch.device) -> dict:
    """One run with `changes` to the configuration, and its perplexities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(texts.demo_model(log=console.print))
    tokenizer = AutoTokenizer.from_pretrained(source)
    articles = texts.demo_texts(log=console.print)
    training = texts.tokenize(tokenizer, articles[: -2 * HELD_OUT])
    judged = texts.tokenize(tokenizer, articles[-2 * HELD_OUT : -HELD_OUT])
    make = RECIPES[recipe]
    config = make(**{"calibration_batches": CALIBRATION_BATCHES, **changes})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=compute_dtype(config.dtype, device)).eval().to(device)
    batches = texts.Batches(training, batch_size=1, length=LENGTH, seed=config.seed)
    if recipe == "best" and "gradient_share" not in changes:
        shared_ranking(model, texts.Batches(training, batch_size=1, length=LENGTH, seed=0), config, work)
    started = time.monotonic()
    result = compress(model, batches, config, svd_cache=texts.svd_cache(source))
    seconds = time.monotonic() - started
    row = {
        "recipe": recipe,
        "changes": changes,
        "training_tokens": len(result.history) * getattr(config, "gradient_accumulation", 1) * LENGTH,
        "seconds": round(seconds, 1),
        "loss": statistics.mean(step["loss"] for step in result.history[-20:]) if result.history else None,
        "device": report.device_description(device),
        "perplexity": {},
    }
    result.model.cpu()  # pivots are exchanged one by one
    for size in SIZES:
        cut = materialize(result, size, forms=config.forms).to(device)
        value = evaluate.perplexity(cut, judged, context=CONTEXT, max_windows=WINDOWS).value
        row["perplexity"][f"{size:g}"] = round(value, 3)
    return row


def main(
    changes: Annotated[list[str] | None, typer.Argument(help="FIELD=VALUE of the configuration.")] = None,
    recipe: Annotated[
        str,
        typer.Option(help="best (NestedConfig), ranking (that without training) or paper (CompressionConfig.short)."),
    ] = "best",
    name: Annotated[str, typer.Option(help="Of the trial, in the results file.")] = "default",
    about: Annotated[str, typer.Option(help="What is tried, for the table.")] = "",
    work: Annotated[pathlib.Path, typer.Option(help="Where rankings are kept.")] = ROOT / "runs" / "quality",
    device: Annotated[str, typer.Option(help="cpu, or cuda; results say which.")] = "cpu",
    results: Annotated[pathlib.Path, typer.Option(help="Where the results are written.")] = RESULTS,
):
    """One trial of a recipe."""
    if recipe not in RECIPES:
        raise typer.BadParameter(f"--recipe must be one of {', '.join(RECIPES)}, got {recipe}")
    found = files.read_json(results) if results.exists() else {}
    if name not in found:
        fields = dict(change.split("=", 1) for change in changes or [])
        row = trial({key: _value(value) for key, value in fields.items()}, recipe, work, torch.device(device))
        found = files.read_json(results) if results.exists() else {}
        found[name] = {"about": about or name} | row
        files.write_json(results, found)
    perplexity = found[name]["perplexity"]
    mean = math.exp(statistics.mean(math.log(value) for size, value in perplexity.items() if float(size) < 1))
    console.print(name, perplexity, f"geometric mean below 1: {mean:.2f}", found[name]["seconds"], "s")


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    typer.run(main)
