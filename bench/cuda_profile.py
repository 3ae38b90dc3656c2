"""What the CUDA C++ kernels reach on a GPU, without torch: `python -m bench.cuda_profile`, a part of `make gpu`.

`csrc/testing/cuda_profile.cpp`, compiled by nvcc, times Llama-3.1-8B's layers at half their size as CUDA graphs whose
weights come from memory, by both launches and both kinds of copies, and the barrier between two stages; the floor is
their weights over the rate at which a large copy reads and writes. Where there is `ncu`, its counters say how many
bytes each launch read of the GPU's memory, and at which rate.
"""

from __future__ import annotations

import csv
import io
import pathlib
import shutil
import subprocess
import tempfile
from typing import Annotated

import typer

from acip_kernels import files

from .cuda_builds import FLAGS, ROOT, nvcc
from .training_step import markdown

# Elapsed time, and what came from memory; in base units: nanoseconds and bytes.
COUNTERS = {"seconds": ("gpu__time_duration.sum", 1e-9), "read": ("dram__bytes_read.sum", 1.0)}


def compiled(folder: str, architecture: str = "-arch=native") -> str:
    program, sources = f"{folder}/profile", ("csrc/cuda/decode.cu", "csrc/testing/cuda_profile.cpp")
    flags = [*FLAGS, *architecture.split(), "-x", "cu"]
    subprocess.run([nvcc(), *flags, *(str(ROOT / source) for source in sources), "-o", program], check=True)
    return program


def parse(output: str) -> dict:
    """What the program prints, as its head says."""
    found = {"bytes_per_s": None, "barriers": {}, "rows": []}
    for line in output.splitlines():
        what, _, rest = line.partition(": ")
        values = rest.split()
        if what == "copy":
            found["bytes_per_s"] = float(values[0])
        elif what == "barrier":
            found["barriers"][values[0]] = float(values[1])
        elif what == "time":
            *group, weights, tokens, launch, copies, size, seconds = values
            found["rows"].append(
                {"group": " ".join(group), "weights": weights, "tokens": int(tokens), "launch": launch,
                 "copies": copies, "bytes": int(size), "seconds": float(seconds)}
            )  # fmt: skip
        elif what == "once":
            *group, weights, tokens, size = values
            found["rows"].append(
                {"group": " ".join(group), "weights": weights, "tokens": int(tokens), "bytes": int(size)}
            )
    return found


def counters(report: str) -> list[dict[str, float]]:
    """`COUNTERS` of each launch, in their order, from what `ncu --csv` has written: a line a launch and counter."""
    start = report.index('"ID"')
    launches: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO(report[start:])):
        for name, (metric, unit) in COUNTERS.items():
            if row["Metric Name"] == metric:
                launches.setdefault(row["ID"], {})[name] = float(row["Metric Value"].replace(",", "")) * unit
    return list(launches.values())


def profiled(program: str, ncu: str, folder: str) -> list[dict]:
    """Each problem once under ncu, which clears the caches before it; the GPU's clocks are left alone."""
    report = pathlib.Path(folder, "counters.csv")
    metrics = ",".join(metric for metric, _ in COUNTERS.values())
    command = [ncu, "--csv", "--print-units", "base", "--clock-control", "none", "--metrics", metrics]
    command += ["--kernel-name", "regex:decode_kernel", "--log-file", str(report), program, "once"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = parse(output)["rows"]
    return [row | found for row, found in zip(rows, counters(report.read_text()), strict=True)]


def times_table(found: dict) -> str:
    """Markdown: of each problem its best way, over the floor and in all ways."""
    ways: dict[tuple, dict[str, float]] = {}
    for row in found["rows"]:
        of = ways.setdefault((row["group"], row["weights"], row["tokens"], row["bytes"]), {})
        of[f"{row['launch']}, {row['copies']}"] = row["seconds"]
    names = list(dict.fromkeys(name for some in ways.values() for name in some))
    lines = []
    for (group, weights, tokens, size), some in ways.items():
        floor = size / found["bytes_per_s"]
        cells = [f"{some[name] * 1e6:.1f} ({some[name] / floor:.2f})" for name in names]
        lines.append([group, weights, str(tokens), f"{floor * 1e6:.1f}", *cells])
    return markdown(["layers", "weights", "tokens", "floor µs", *(f"{name}: µs (× floor)" for name in names)], lines)


def counters_table(rows: list[dict]) -> str:
    """Markdown: bytes of memory over those of the weights, and the rate."""
    lines = [
        [row["group"], row["weights"], str(row["tokens"]), f"{row['bytes'] / 1e6:.1f}",
         f"{row['read'] / row['bytes']:.3f}", f"{row['read'] / row['seconds'] / 1e12:.2f}"]
        for row in rows
    ]  # fmt: skip
    return markdown(["layers", "weights", "tokens", "MB of weights", "× read of memory", "TB/s"], lines)


def main(store: Annotated[bool, typer.Option(help="Write the result under bench/results.")] = True):
    """Times, and ncu's counters where there is ncu, of the CUDA C++ kernels on this GPU; needs nvcc."""
    if nvcc() is None:
        raise typer.BadParameter("needs nvcc, in the PATH or under CUDA_HOME")
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if shutil.which(ask[0]) is None:
        raise typer.BadParameter("there is no GPU: this benchmark measures one and nothing else")
    device, driver = subprocess.check_output(ask, text=True).splitlines()[0].split(", ")
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(folder)
        found = {"device": device, "driver": driver}
        found |= parse(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
        typer.echo(times_table(found))
        for launch, seconds in found["barriers"].items():
            typer.echo(f"a second stage of next to no weights, {launch}: {seconds * 1e6:.2f} µs")
        path = ROOT / "bench" / "results" / f"cuda_profile-{'-'.join(device.lower().split())}.json"
        if store:
            files.write_json(path, found)
        if ncu := shutil.which("ncu"):
            found["counters"] = profiled(program, ncu, folder)
            typer.echo(counters_table(found["counters"]))
            if store:
                files.write_json(path, found)


if __name__ == "__main__":
    typer.run(main)
