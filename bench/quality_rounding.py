"""What int4 costs by what rounding is told: `python -m bench.quality_rounding`, after `bench.quality`'s importance.

SmolLM2-135M's own layers (no rank is cut) in int4, all of them and those with more inputs than outputs alone, judged on
the validation articles of `bench.quality_search`. Against: each other, in one call, by the rise of the loss per token
over the same model in bfloat16.
"""

from __future__ import annotations

import copy
import itertools
import math
import pathlib
import time
from typing import Annotated

import torch
import typer
from rich.console import Console

from acip_kernels import data as texts
from acip_kernels import evaluate, files, report
from acip_kernels.compress.basis import input_covariances, layer_covariances
from acip_kernels.compress.config import compute_dtype
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.compress.quantized import remembered_covariance
from acip_kernels.compress.result import CompressionResult
from acip_kernels.compress.step import with_labels
from acip_kernels.ops.quantize import dequantize, quantize

from .quality import CALIBRATION_BATCHES, CONTEXT, HELD_OUT, LENGTH, ROOT
from .quality_search import WINDOWS
from .training_step import markdown

RESULTS = ROOT / "bench" / "results" / "quality_rounding.json"
TOLD = {
    "nothing: to the nearest": lambda layer, plain, weighed: None,
    "the factors": lambda layer, plain, weighed: remembered_covariance(layer.Vh),
    "the factors, and variances where inputs are more than outputs": lambda layer, plain, weighed: (
        remembered_covariance(layer.Vh, layer.input_variances)
    ),
    "the inputs themselves, all alike": lambda layer, plain, weighed: plain,
    "the inputs themselves, weighed by their gradients": lambda layer, plain, weighed: weighed,
}

console = Console(stderr=True)


def table(result: dict) -> str:
    """Markdown: a row for what rounding was told."""
    lines = [[row["told"], f"{row['wide']:.3f}", f"{row['all']:.3f}"] for row in result["rows"]]
    return markdown(["rounding is told of", "layers with more inputs than outputs", "all layers"], lines)


def main(
    work: Annotated[pathlib.Path, typer.Option(help="Where `bench.quality` keeps elastic checkpoints.")] = ROOT
    / "runs"
    / "quality",
    results: Annotated[pathlib.Path, typer.Option(help="Where the results are written.")] = RESULTS,
):
    """The rise of the loss that int4 brings, by what rounding knows of the inputs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(texts.demo_model(log=console.print))
    tokenizer = AutoTokenizer.from_pretrained(source)
    articles = texts.demo_texts(log=console.print)
    judged = texts.tokenize(tokenizer, articles[-2 * HELD_OUT : -HELD_OUT])
    training = texts.tokenize(tokenizer, articles[: -2 * HELD_OUT])
    calibration = texts.Batches(training, batch_size=1, length=LENGTH, seed=0)
    device = torch.device("cpu")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=compute_dtype("auto", device)).eval()
    layers = svd_layers(CompressionResult.load(work / "importance-0" / "elastic").model)
    first = list(itertools.islice(calibration, CALIBRATION_BATCHES))
    plain = input_covariances(dense, list(layers), first)
    weighed, _ = layer_covariances(dense, list(layers), [with_labels(batch, device) for batch in first])

    def loss(model) -> float:
        return math.log(evaluate.perplexity(model, judged, context=CONTEXT, max_windows=WINDOWS).value)

    before = loss(dense)
    described = report.device_description(device)
    result = {"device": described, "windows": WINDOWS, "context": CONTEXT, "perplexity": math.exp(before), "rows": []}
    for told, metric in TOLD.items():
        started = time.monotonic()
        row: dict = {"told": told}
        rounded = copy.deepcopy(dense)
        wide = {name for name, layer in layers.items() if layer.in_features > layer.out_features}
        for part, names in (("wide", wide), ("all", set(layers) - wide)):
            for name in names:
                weight = rounded.get_submodule(name).weight
                # The weight that the model has, not the factors' product.
                codes = quantize(
                    weight.detach().float(), "int4", covariance=metric(layers[name], plain[name], weighed[name])
                )
                weight.data = dequantize(*codes, cols=weight.shape[1], dtype=weight.dtype)
            row[part] = loss(rounded) - before
        result["rows"].append(row)
        files.write_json(results, result)
        console.print(row, f"{time.monotonic() - started:.0f} s")
    typer.echo(table(result))


if __name__ == "__main__":
    typer.run(main)
