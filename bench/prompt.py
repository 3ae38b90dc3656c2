"""How long a model takes to read a prompt: `python -m bench.prompt`, with `--help` for its parts.

One forward pass over prompts of several lengths, of which the last token's logits are made, as `generate` begins: of
the models and variants of `bench.generate` (see there), at one size. A prompt is where products of many tokens decide,
so this is about what layers do between a token, which memory bounds, and a matrix, which is a library's.

Against: the dense model, and factors as two `F.linear`, in the same rounds.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from typing import Annotated

import torch
import typer
from torch import nn

import acip_kernels
from acip_kernels import files, report
from acip_kernels.ops import extension

from . import decode_cpu, generate
from .generate import DENSE, DENSE_FUSED, LLAMA, MODELS, SMOL, TWO
from .training_step import ROOT, markdown

TOKENS = (16, 48, 128, 256, 1024)
# Of the larger model a prompt of a thousand tokens takes as long as all else together.
MOST = {SMOL: 1024, LLAMA: 256}


@torch.inference_mode()
def bench(model: nn.Module, name: str, ratio: float, lengths, rounds: int, say) -> list[dict]:
    """A row for each variant and length, in turns."""
    variants = {DENSE: model, DENSE_FUSED: acip_kernels.fuse(generate.shared_copy(model))}
    variants |= generate.variants_at(model, ratio)
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in itertools.product(variants, lengths)}
    for length in lengths:
        say(f"{name}: {length} tokens")
        ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        for number in range(-1, rounds):  # the first one finds what has to be found once
            for variant, compressed in variants.items():
                started = time.perf_counter()
                compressed.eval()(input_ids=ids, logits_to_keep=1, use_cache=True)
                if number >= 0:
                    seconds[variant, length].append(time.perf_counter() - started)

    def times(variant: str, length: int, base: str) -> float:
        pairs = zip(seconds[variant, length], seconds[base, length], strict=True)
        return statistics.median(other / own for own, other in pairs)

    return [
        {
            "model": name,
            "variant": variant,
            "ratio": None if variant in (DENSE, DENSE_FUSED) else ratio,
            "tokens": length,
            "seconds": statistics.median(taken),
            "times_dense": times(variant, length, DENSE),
            "times_two": times(variant, length, TWO),
        }
        for (variant, length), taken in seconds.items()
    ]


def table(rows: list[dict]) -> str:
    """A line for each variant: milliseconds by length, and over two `F.linear`."""
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    found = {(row["variant"], row["tokens"]): row for row in rows}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = [found[variant, length] for length in lengths]
        size = "–" if cells[0]["ratio"] is None else f"{100 * cells[0]['ratio']:.0f} %"
        shown = [f"{1e3 * cell['seconds']:,.0f} ({cell['times_two']:.2f})" for cell in cells]
        lines.append([variant, size, *shown])
    return markdown(["variant", "size", *(f"{length} tokens" for length in lengths)], lines)


def main(
    model: Annotated[list[str] | None, typer.Option(help="smol or llama (repeatable); both if not given.")] = None,
    ratio: Annotated[float, typer.Option(min=0.05, max=1.0, help="The size of the factorized variants.")] = 0.6,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 5,
    store: Annotated[bool, typer.Option(help="Write the result under bench/results.")] = True,
):
    """Time one forward pass over a prompt, by variant and length."""
    names = [MODELS[key] for key in model or ("smol", "llama")]

    def say(text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    rows: list[dict] = []
    for name in names:
        lengths = [length for length in TOKENS if length <= MOST[name]]
        rows += bench(generate.BUILDERS[name]().eval(), name, ratio, lengths, rounds, say)
        print(table([row for row in rows if row["model"] == name]))
        gc.collect()
    device = report.device_description("cpu") | {"instruction_set": extension.instruction_set()}
    summary = {"device": device, "setting": {"rounds": rounds}, "rows": rows}
    if store:
        path = decode_cpu.result_path(device["device"], "prompt")
        files.write_json(path, summary)
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
