"""What a run of a larger model takes, by count: `python -m bench.many_devices` prints the tables of its page.

Bytes are those of `acip_kernels.plan.run_memory`. Operations are `plan.training_operations`, over the layers, with
those of the head; the time that they take is that of this package's measured step (`bench.training_step`), in
proportion to its counted operations.
"""

from __future__ import annotations

import pathlib

from acip_kernels import files
from acip_kernels.plan import run_memory, training_operations

RESULTS = pathlib.Path(__file__).resolve().parent / "results"

# hidden, intermediate, key and value width, blocks, vocabulary; of untied llamas.
MODELS = {
    "Llama-2-7B": (4096, 11008, 4096, 32, 32000),
    "Llama-3.1-8B": (4096, 14336, 1024, 32, 128256),
    "Llama-2-70B": (8192, 28672, 1024, 80, 32000),
}
# Model, method, processes, shard.
SETTINGS = [
    ("Llama-2-7B", "acip", 1, False),
    ("Llama-2-7B", "acip", 8, True),
    ("Llama-2-7B", "nested", 1, False),
    ("Llama-2-7B", "nested", 8, True),
    ("Llama-3.1-8B", "nested", 8, True),
    ("Llama-2-70B", "acip", 8, True),
    ("Llama-2-70B", "nested", 8, True),
    ("Llama-2-70B", "nested", 32, True),
]
TOKENS = 4 * 1024  # of a batch


def shapes(model: str) -> tuple[list[tuple[int, int]], int]:
    """`(out, in)` of every linear layer of the model but its head, and the numbers in the rest of it."""
    hidden, inner, narrow, blocks, words = MODELS[model]
    block = [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]
    block += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return block * blocks, 2 * words * hidden + (2 * blocks + 1) * hidden


def operations(model: str) -> int:
    """Of an ACIP step of one batch at full rank by the routes it would take, and of the head: twice forward."""
    layers, _ = shapes(model)
    hidden, words = MODELS[model][0], MODELS[model][4]
    counted = (training_operations(TOKENS, in_, out, min(out, in_), 32, dropout=True) for out, in_ in layers)
    return sum(min(each.values()) for each in counted) + 4 * TOKENS * hidden * words


def measured() -> tuple[str, float]:
    """The machine, and the operations a second of this package's step on it, with all ranks live."""
    stored = files.read_json(RESULTS / "training_step-amd-epyc-bfloat16.json")
    (row,) = (row for row in stored["rows"] if row["variant"] == "ours" and row["ratio"] == 1.0)
    device = stored["device"]
    name = f"{device['device']}, {device['cores']} cores, {device['dtype']}, {device['date'][:10]}"
    return name, row["flops"] / row["seconds"]["median"]


def block() -> str:
    """The page's tables."""
    lines = [
        "| model | method | processes | calibration | rest | factors | teacher | trained | gathered | training |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, method, processes, shard in SETTINGS:
        terms = run_memory(*shapes(model), method=method, processes=processes, shard=shard)
        training = sum(terms.values()) - terms["calibration"]
        cells = [f"{value / 2**30:.1f}" for value in (*terms.values(), training)]
        lines.append(f"| {model} | {method} | {processes}{', `--shard`' if shard else ''} | {' | '.join(cells)} |")
    where, rate = measured()
    lines += [
        "",
        "GiB for each process, bfloat16, updates and adapters of rank 32. Training is the sum of what is right of "
        "calibration, which is over by then.",
        "",
        "| model | operations of a batch | on the measured machine | on a GPU |",
        "| --- | ---: | ---: | ---: |",
    ]
    for model in MODELS:
        count = operations(model)
        lines.append(f"| {model} | {count / 1e12:.0f} T | {count / rate / 60:.0f} min | not measured |")
    lines += [
        "",
        f"A batch of {TOKENS} tokens in a step of the paper's run with all ranks live, attention not counted. The "
        f"measured machine ({where}) did {rate / 1e9:.0f} GFLOP/s in such a step of a model of 135 M parameters; the "
        "minutes are that rate's, not a measurement of these models.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(block())
