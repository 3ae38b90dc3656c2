"""What a size costs beside perplexity: `python -m bench.quality_tasks`, after `bench.quality --method nested`.

Two tasks of LM-Eval made of the held-out articles (`evaluate.write_text_tasks`: the last word of a passage, the order
of two sentences), and greedy continuations, of the dense model and of every size of the one elastic checkpoint.
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import Annotated

import torch
import typer
from rich.console import Console

from acip_kernels import data as texts
from acip_kernels import evaluate, files, materialize, report
from acip_kernels.compress.config import compute_dtype
from acip_kernels.compress.result import CompressionResult

from .quality import HELD_OUT, ROOT
from .training_step import markdown

RESULTS = ROOT / "bench" / "results" / "quality_tasks.json"
SIZES = (1.0, 0.8, 0.6, 0.4)
PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "During the Second World War, the city",
)
NEW_TOKENS = 32

console = Console(stderr=True)


def table(result: dict) -> str:
    """Markdown: a row a model."""
    lines = []
    for row in result["rows"]:
        last, order = row["tasks"]["last_word"], row["tasks"]["sentence_order"]
        lines.append(
            [
                row["model"],
                f"{100 * last['acc']:.1f} ± {100 * last['acc_stderr']:.1f} %",
                f"{last['perplexity']:.3g}",
                f"{100 * order['acc']:.1f} ± {100 * order['acc_stderr']:.1f} %",
            ]
        )
    return markdown(["model", "last word right", "its perplexity", "order of two sentences right"], lines)


def samples(result: dict) -> str:
    """Markdown: a table for each prompt."""
    parts = []
    for number, prompt in enumerate(result["prompts"]):
        lines = [[row["model"], " ".join(row["samples"][number].replace("|", "\\|").split())] for row in result["rows"]]
        parts.append(f"“{prompt}”\n\n" + markdown(["model", "continues"], lines, left=2))
    return "\n".join(parts)


def main(
    elastic: Annotated[pathlib.Path, typer.Option(help="The checkpoint.")] = ROOT / "runs/quality/nested-0/elastic",
    limit: Annotated[int, typer.Option(help="Examples a task.")] = 200,
):
    """Accuracies and continuations at every size; an interrupted call goes on where it was."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(texts.demo_model(log=console.print))
    tokenizer = AutoTokenizer.from_pretrained(source)
    articles = texts.demo_texts(log=console.print)[-HELD_OUT:]
    dtype = compute_dtype("auto", torch.device("cpu"))
    device = report.device_description() | {"dtype": str(dtype).removeprefix("torch.")}
    result = {"device": device, "examples": limit, "prompts": list(PROMPTS), "rows": []}
    if RESULTS.exists():
        stored = files.read_json(RESULTS)
        if (stored["examples"], stored["prompts"]) != (limit, list(PROMPTS)):
            raise ValueError(f"{RESULTS} was measured with another setting: remove it to measure anew")
        result["rows"] = stored["rows"]
    compressed, done = CompressionResult.load(elastic), {row["model"] for row in result["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        evaluate.write_text_tasks(folder, articles, limit)
        for size in (None, *SIZES):
            name = "dense" if size is None else f"{size:g}"
            if name in done:
                continue
            if size is None:
                model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
            else:
                model = materialize(compressed, size, dtype=dtype).eval()
            found = evaluate.tasks(model, tokenizer, evaluate.TEXT_TASKS, include_path=folder)
            samples = evaluate.generate_samples(model, tokenizer, PROMPTS, NEW_TOKENS)
            result["rows"].append({"model": name, "tasks": found, "samples": samples})
            files.write_json(RESULTS, result)
            console.print(name, found)
    typer.echo(table(result))


if __name__ == "__main__":
    typer.run(main)
