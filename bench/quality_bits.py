"""Rank or bits: `python -m bench.quality_bits`, after `bench.quality --method nested` and `--method importance`.

Perplexity on the held-out articles at every size of the one elastic checkpoint, with its weights in bfloat16, int8 and
int4, against the bytes of the whole file. `importance` at size 1 is the dense model, decomposed and put together again:
its quantized rows are plain weight-only quantization of the dense model, which a mix of both has to beat. Rounding is
told what the checkpoint remembers of its inputs; "by a text's inputs", those that the cut model has on the calibration
tokens, as by `acip materialize --quantize int4 -d TEXT`; "scales tuned" trains the scales besides, on 102 k tokens,
taught by the checkpoint at its full size, as by `acip finetune --teacher`.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import Annotated

import torch
import typer
from rich.console import Console

from acip_kernels import data as texts
from acip_kernels import evaluate, files, finetune, materialize, report
from acip_kernels.compress.basis import layer_covariances
from acip_kernels.compress.config import FORMS, compute_dtype
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.compress.result import CompressionResult
from acip_kernels.compress.step import with_labels

from .quality import CALIBRATION_BATCHES, CONTEXT, HELD_OUT, LENGTH, ROOT
from .training_step import markdown

RESULTS = ROOT / "bench" / "results" / "quality_bits.json"
# Of which checkpoint, at which sizes.
MODELS = {"importance": (1.0,), "nested": (1.0, 0.8, 0.6, 0.4)}
BY_TEXT, TUNED = "int4, by a text's inputs", "int4, scales tuned"
TUNING_STEPS = 100  # of 1024 tokens
# What weights become: a name, and `materialize`'s options.
WEIGHTS = {
    "bfloat16": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int8, embeddings too": {"quantize": "int8", "quantize_embeddings": "int8"},
    "int4, embeddings int8": {"quantize": "int4", "quantize_embeddings": "int8"},
    BY_TEXT: {"quantize": "int4"},
    TUNED: {"quantize": "int4"},
    "int4, in two factors": {"quantize": "int4", "forms": ("dense", "factors")},
    "… and to the nearest": {"quantize": "int4", "quantize_rounding": "nearest"},
    "int4, pivoted, to the nearest": {"quantize": "int4", "forms": FORMS, "quantize_rounding": "nearest"},
}
# What is measured beside the others at these sizes alone.
BESIDE = {
    BY_TEXT: (("importance", 1.0), ("nested", 0.6)),
    TUNED: (("nested", 0.8), ("nested", 0.6), ("nested", 0.4)),
    "int4, in two factors": (("nested", 0.8), ("nested", 0.6), ("nested", 0.4)),
    "… and to the nearest": (("importance", 1.0), ("nested", 0.6)),
    "int4, pivoted, to the nearest": (("nested", 0.6),),
}

console = Console(stderr=True)


def frontier(rows: list[dict]) -> list[dict]:
    """The rows that no other one beats in both bytes and perplexity, by their bytes."""
    best = []
    for row in sorted(rows, key=lambda row: (row["file_bytes"], row["perplexity"])):
        if not best or row["perplexity"] < best[-1]["perplexity"]:
            best.append(row)
    return best


def table(result: dict) -> str:
    """Markdown: a row a checkpoint and size, a column a way to store weights, what is on the frontier in bold."""
    rows = {(row["method"], row["size_ratio"], row["weights"]): row for row in result["rows"]}
    best = {id(row) for row in frontier(result["rows"])}
    lines = []
    for method, size in dict.fromkeys(key[:2] for key in rows):
        cells = []
        for weights in WEIGHTS:
            row = rows.get((method, size, weights))
            text = "–" if row is None else f"{row['perplexity']:.1f} ({row['file_bytes'] / 1e6:.0f} MB)"
            cells.append(f"**{text}**" if row is not None and id(row) in best else text)
        lines.append([method, f"{size:g}", *cells])
    return markdown(["checkpoint", "size", *WEIGHTS], lines, left=2)


def main(
    work: Annotated[pathlib.Path, typer.Option(help="Where `bench.quality` keeps elastic checkpoints.")] = ROOT
    / "runs"
    / "quality",
    windows: Annotated[int, typer.Option(help="Windows of the perplexity, spread over the text.")] = 64,
    results: Annotated[pathlib.Path, typer.Option(help="Where the results are written.")] = RESULTS,
    device: Annotated[str, typer.Option(help="cpu, or cuda; the results say which.")] = "cpu",
):
    """Perplexity and bytes of every size and way to store weights; an interrupted call goes on where it was."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(texts.demo_model(log=console.print)))
    articles = texts.demo_texts(log=console.print)
    tokens = texts.tokenize(tokenizer, articles[-HELD_OUT:])
    training = texts.tokenize(tokenizer, articles[: -2 * HELD_OUT])
    calibration = texts.Batches(training, batch_size=1, length=LENGTH, seed=0)
    dtype = compute_dtype("auto", torch.device(device))
    described = report.device_description(device) | {"dtype": str(dtype).removeprefix("torch.")}
    result = {"device": described, "windows": windows, "context": CONTEXT, "rows": []}
    if results.exists():
        stored = files.read_json(results)
        if stored["windows"] != windows:
            raise ValueError(f"{results} was measured on {stored['windows']} windows: remove it to measure anew")
        result["rows"] = stored["rows"]
    done = {(row["method"], row["size_ratio"], row["weights"]) for row in result["rows"]}
    for method, sizes in MODELS.items():
        compressed = None
        for size in sizes:
            for weights, options in WEIGHTS.items():
                if (method, size, weights) in done or (method, size) not in BESIDE.get(weights, [(method, size)]):
                    continue
                if compressed is None:
                    compressed = CompressionResult.load(work / f"{method}-0" / "elastic")
                    compressed.model.to(device)
                covariances = None
                if weights == BY_TEXT:
                    plain = materialize(compressed, size, dtype=dtype).eval()
                    first = itertools.islice(calibration, CALIBRATION_BATCHES)
                    names = list(svd_layers(compressed.model))
                    covariances, _ = layer_covariances(plain, names, [with_labels(b, plain.device) for b in first])
                model = materialize(compressed, size, dtype=dtype, covariances=covariances, **options).eval()
                if weights == TUNED:
                    teacher = materialize(compressed, 1.0, dtype=dtype)
                    batches = texts.Batches(training, batch_size=1, length=LENGTH, seed=1)
                    finetune(model, batches, TUNING_STEPS, teacher=teacher)
                row = {
                    "method": method,
                    "size_ratio": size,
                    "weights": weights,
                    "file_bytes": sum(t.numel() * t.element_size() for t in _stored(model)),
                    "perplexity": evaluate.perplexity(model, tokens, context=CONTEXT, max_windows=windows).value,
                }
                result["rows"].append(row)
                files.write_json(results, result)
                console.print(row)
    typer.echo(table(result))


def _stored(model):
    """The tensors that a file of the model has, each once, though a head may be the embedding's."""
    return {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()


if __name__ == "__main__":
    typer.run(main)
