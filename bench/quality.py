"""What is lost at which size, by every method: `python -m bench.quality [--method nested --seed 0 ...]`.

SmolLM2-135M, calibrated (and trained) on Wikipedia articles, all but the last 40; perplexity on the last 20 (`quick`:
their first 8 windows, for a look), and on newswire, which no method sees. The 20 between them are what
`bench.quality_search` chose the recipe on. Every method gets the same calibration tokens. A result is written after
every size that has been evaluated, and an interrupted call goes on where it was.

Methods: `nested` (the default of `acip compress`); `importance`, its ranking without training; `acip`, the paper's run
on a schedule of as many tokens; `svd_llm` (uniform), `svd_llm_v2`, `asvd`, `svd`, in two factors as they are published;
the first two again in pivoted form; `dense_tuned`, the dense model trained on the tokens of `nested`. And what one size
can still be given: `importance_recalibrated` refits it on the calibration tokens, `nested_tuned` trains it for
another quarter of the steps.
Against: each other, at the same stored size (`factorized`: the weights of the factorized layers, everything in them
counted) and at the same bytes of the file in bfloat16.
"""

from __future__ import annotations

import copy
import itertools
import json
import pathlib
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
    finetune,
    materialize,
    recalibrate,
    report,
)
from acip_kernels import data as texts
from acip_kernels.compress.config import compute_dtype
from acip_kernels.compress.methods import decompose, score
from acip_kernels.compress.nested import put_factors, ranking_tensors
from acip_kernels.compress.result import CompressionResult
from acip_kernels.compress.step import with_labels

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "quality"
RECIPES = RESULTS.with_name("quality_recipes.json")
SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
TEXTS = ("wikipedia", "quick", "news")
QUICK = 8
HELD_OUT = 20
CONTEXT, LENGTH = 1024, 1024
CALIBRATION_BATCHES = 32
STEPS = 400
FACTORS = ("dense", "factors")

METHODS = {
    "nested": lambda seed, steps: NestedConfig(steps=steps, calibration_batches=CALIBRATION_BATCHES, seed=seed),
    "importance": lambda seed, steps: RankingConfig(method="importance", calibration_batches=CALIBRATION_BATCHES),
    "acip": lambda seed, steps: CompressionConfig.short(steps * 4 // 5, stop_ratio=0.4, seed=seed),
    "svd_llm": lambda seed, steps: _baseline("svd_llm", "uniform", FACTORS),
    "svd_llm_v2": lambda seed, steps: _baseline("svd_llm", "loss", FACTORS),
    "svd_llm_pivoted": lambda seed, steps: _baseline("svd_llm", "uniform", (*FACTORS, "pivoted")),
    "svd_llm_v2_pivoted": lambda seed, steps: _baseline("svd_llm", "loss", (*FACTORS, "pivoted")),
    "asvd": lambda seed, steps: _baseline("asvd", "sensitivity", FACTORS),
    "svd": lambda seed, steps: _baseline("svd", "global", FACTORS),
    "dense_tuned": lambda seed, steps: NestedConfig(
        steps=steps, calibration_batches=CALIBRATION_BATCHES, smallest_ratio=1.0, largest_ratio=1.0, seed=seed
    ),
}

# What is done at one size, for that size alone: to which method's checkpoint, and what.
AFTERWARDS = {
    "importance_recalibrated": (
        "importance",
        lambda result, size, batches, steps: recalibrate(
            result, size, itertools.islice(batches, CALIBRATION_BATCHES), forms=result.config.forms
        ),
    ),
    "nested_tuned": (
        "nested",
        lambda result, size, batches, steps: finetune(result, batches, steps // 4, size_ratio=size),
    ),
}
METHODS |= {name: METHODS[of] for name, (of, _) in AFTERWARDS.items()}

console = Console(stderr=True)


def _baseline(method, allocation, forms):
    return RankingConfig(
        method=method,
        allocation=allocation,
        forms=forms,
        calibration_batches=CALIBRATION_BATCHES,
        sensitivity_batches=1,
    )


def run_method(
    method: str,
    seed: int,
    steps: int,
    sizes,
    windows: int,
    work: pathlib.Path,
    target: pathlib.Path,
    on=TEXTS,
    device: str = "cpu",
) -> None:
    """Compress by `method`, and evaluate what is missing of `sizes` on the texts `on` in the result file `target`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(texts.demo_model(log=console.print))
    tokenizer = AutoTokenizer.from_pretrained(source)
    articles = texts.demo_texts(log=console.print)
    training = texts.tokenize(tokenizer, articles[: -2 * HELD_OUT])
    tests = {
        "wikipedia": texts.tokenize(tokenizer, articles[-HELD_OUT:]),
        "news": texts.tokenize(tokenizer, texts.demo_news(log=console.print)),
    }
    tests["quick"] = tests["wikipedia"].flatten()[: QUICK * CONTEXT]
    config = None if method == "dense" else METHODS[method](seed, steps)
    batches = texts.Batches(training, batch_size=1, length=LENGTH, seed=seed)
    # The seed is of what is trained; all rank on the same tokens.
    calibration = texts.Batches(training, batch_size=1, length=LENGTH, seed=0)
    result = files.read_json(target) if target.exists() else {"method": method, "seed": seed, "rows": []}
    trained = config.max_prune_steps + config.tune_steps if method == "acip" else getattr(config, "steps", 0)
    if method == "nested_tuned":
        trained += steps // 4
    setting = {
        "config": config and config.to_dict(),
        "perplexity_on": {name: tokens.numel() for name, tokens in tests.items()},
        "context": CONTEXT,
        "windows": windows,
        "calibration_tokens": CALIBRATION_BATCHES * LENGTH,
        "training_tokens": trained * LENGTH,
    }
    before = result.get("setting", setting)
    # What is new changes nothing about what was measured: a text, or a field of the configuration, by its default.
    before = before | {"perplexity_on": setting["perplexity_on"] | before["perplexity_on"]}
    if config is not None:
        before["config"] = type(config)().to_dict() | before["config"]
    before, setting = (json.loads(json.dumps(some)) for some in (before, setting))  # as read back: without tuples
    if before != setting and result["rows"]:
        raise ValueError(f"{target} was measured with another setting: remove it to measure anew")
    result["setting"], result["device"] = setting, report.device_description(device)
    rows = {row["size_ratio"]: row for row in result["rows"]}
    if config is None:
        sizes = (1.0,)
    missing = [size for size in sizes if not set(on) <= set(rows.get(size, ()))]
    if not missing:
        return
    # As every method computes: in bfloat16 where the device multiplies it natively.
    dtype = compute_dtype("auto", torch.device(device))
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval().to(device)
    result["device"]["dtype"] = str(dtype).removeprefix("torch.")
    compressed = None
    if config is not None:
        output = work / f"{AFTERWARDS.get(method, (method,))[0]}-{seed}"
        elastic = output / "elastic"
        if elastic.exists():
            compressed = CompressionResult.load(elastic)
        else:
            started = time.monotonic()
            resume = (output / "checkpoint.safetensors").exists()
            if not isinstance(config, CompressionConfig):
                shared_ranking(dense, calibration, config, work)
            compressed = compress(
                dense, batches, config, output=output, resume=resume, svd_cache=texts.svd_cache(source)
            )
            result["seconds"] = round(time.monotonic() - started, 1)
            result["history"] = compressed.history
            compressed.save(elastic, tokenizer=tokenizer, base_model=source, overwrite=True)
    for size in missing:
        forms = getattr(config, "forms", ("dense", "factors"))
        of_size = compressed
        if method in AFTERWARDS:  # a copy: other sizes begin where this one began
            of_size = copy.deepcopy(compressed)
            of_size.model.to(device)
            of_size = AFTERWARDS[method][1](of_size, size, calibration, steps)
        # Cut on the host: pivots are exchanged one by one.
        model = dense if compressed is None else materialize(_on_host(of_size), size, forms=forms).to(device)
        cut = None if compressed is None else compressed.cut(size, forms=forms)
        row = {
            "method": method,
            "seed": seed,
            "size_ratio": size,
            "factorized": 1.0 if cut is None else cut.ratios["factorized"],
            "stored": 1.0 if cut is None else cut.ratios["stored"],
            "file_bytes": sum(p.numel() for p in model.parameters()) * 2 if cut is None else cut.bytes(torch.bfloat16),
        }
        row |= {name: rows[size][name] for name in tests if name in rows.get(size, ())}
        for name in on:
            if name not in row:
                row[name] = evaluate.perplexity(model, tests[name], context=CONTEXT, max_windows=windows).value
        if "wikipedia" in row:
            row["perplexity"] = row["wikipedia"]
        rows[size] = row
        result["rows"] = sorted(rows.values(), key=lambda row: -row["size_ratio"])
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(target, result)
        console.print(f"{method} {seed} at {size:g}:", {name: round(row[name], 2) for name in TEXTS if name in row})


def _on_host(result: CompressionResult) -> CompressionResult:
    result.model.cpu()
    return result


def shared_ranking(model, calibration, config: RankingConfig, work: pathlib.Path) -> None:
    """Rank `model`'s singular values; methods of one basis, and seeds, decompose it once."""
    first = list(itertools.islice(calibration, config.calibration_batches))
    first = [with_labels(batch, next(model.parameters()).device) for batch in first]
    path = work / "rankings" / f"{config.method}-{config.calibration_batches}.safetensors"
    if path.exists():
        put_factors(model, files.read_tensors(path))
    else:
        decompose(model, first, config, svd_cache=texts.svd_cache(texts.demo_model()))
        files.write_tensors(path, dict(ranking_tensors(model)))
    score(model, first, config)


def read_results(directory: pathlib.Path = RESULTS) -> list[dict]:
    """Every stored result, sorted by method and seed."""
    return [files.read_json(path) for path in sorted(directory.glob("*.json"))]


def table(results: list[dict], text: str = "wikipedia") -> str:
    """Markdown: a row a method, a column a size, the median over the seeds and their range if there are several."""
    found: dict[str, dict] = {}
    for result in results:
        for row in result["rows"]:
            if text in row:
                mine = found.setdefault(result["method"], {"seeds": set(), "setting": result["setting"]})
                mine["seeds"].add(result["seed"])
                mine.setdefault(row["size_ratio"], []).append(row[text])
    sizes = [size for size in SIZES if any(size in mine for mine in found.values())]
    lines = ["| method | tokens trained | seeds | " + " | ".join(f"{size:g}" for size in sizes) + " |"]
    lines.append("| --- | ---: | ---: |" + " ---: |" * len(sizes))
    for method in ["dense", *METHODS]:
        if method not in found:
            continue
        mine, cells = found[method], []
        for size in sizes:
            values = sorted(mine.get(size, []))
            cell = "–" if not values else _number(values[len(values) // 2])
            cells.append(cell if len(values) < 2 else f"{cell} ({_number(values[0])}–{_number(values[-1])})")
        trained = mine["setting"]["training_tokens"]
        lines.append(f"| {method} | {trained / 1000:.0f} k | {len(mine['seeds'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def recipes_table(earlier: list[dict], results: list[dict], text: str = "wikipedia") -> str:
    """Markdown: earlier defaults of `nested`, and the present one, by the median over their seeds and the range."""
    runs = {recipe["about"]: [run[text] for run in recipe["runs"] if text in run] for recipe in earlier}
    runs["the default: inputs weighed by their gradients besides"] = [
        {f"{row['size_ratio']:g}": row[text] for row in result["rows"] if text in row}
        for result in results
        if result["method"] == "nested"
    ]
    sizes = [f"{size:g}" for size in SIZES if any(f"{size:g}" in run for seeds in runs.values() for run in seeds)]
    lines = ["| recipe | seeds | " + " | ".join(sizes) + " |", "| --- | ---: |" + " ---: |" * len(sizes)]
    for about, seeds in runs.items():
        seeds, cells = [run for run in seeds if run], []
        if not seeds:
            continue
        for size in sizes:
            values = sorted(run[size] for run in seeds if size in run)
            one = "–" if not values else f"{values[len(values) // 2]:.2f}"
            cells.append(one if len(values) < 2 else f"{one} ({values[0]:.2f}–{values[-1]:.2f})")
        lines.append(f"| {about} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


def main(
    method: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: dense, {', '.join(METHODS)}. Default: all.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable. Default: 0.")] = None,
    steps: Annotated[int, typer.Option(help="Of 1024 tokens, of the methods that train.")] = STEPS,
    size_ratio: Annotated[
        list[float] | None, typer.Option("--size-ratio", "-s", help="Repeatable. Default: all.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(TEXTS)}. Default: all.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of the perplexity, spread over each text.")] = 64,
    work: Annotated[pathlib.Path, typer.Option(help="Where runs and elastic checkpoints are kept.")] = ROOT
    / "runs"
    / "quality",
    results: Annotated[pathlib.Path, typer.Option(help="Where the results are written.")] = RESULTS,
    device: Annotated[str, typer.Option(help="cpu, or cuda; results say which.")] = "cpu",
):
    """Perplexity of SmolLM2-135M at every size, by every method. Interrupt it at will: it goes on where it was.

    Example: python -m bench.quality --method nested --seed 0 --windows 8
    """
    for one in method or ["dense", *METHODS]:
        if one != "dense" and one not in METHODS:
            raise typer.BadParameter(f"--method must be dense or one of {', '.join(METHODS)}, got {one}")
        for number in seed or [0]:
            target = results / f"{one}-{number}.json"
            run_method(one, number, steps, size_ratio or SIZES, windows, work, target, text or TEXTS, device)
    stored = read_results(results)
    typer.echo(table(stored))
    rows = [row for result in stored for row in result["rows"] if result["seed"] == 0 and "perplexity" in row]
    for x in ("factorized", "file_bytes"):
        report.plot_perplexity(rows, work / "plots" / f"quality-{x}", x=x)


if __name__ == "__main__":
    typer.run(main)
