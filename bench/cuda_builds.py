"""What the CUDA C++ kernels become: `python -m bench.cuda_builds`, on a machine with nvcc and without a GPU.

They are compiled for sm_80 and sm_90a with warnings as errors; registers, spills and the machine instructions that
matter are written down, and how the kernels lay out the layers of Llama-3.1-8B. No time is measured here.
"""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import Annotated

import typer

from acip_kernels import files, report
from acip_kernels.ops import aot
from acip_kernels.ops.fused_linear import op
from acip_kernels.plan import DEVICES, one_launch_seconds

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cuda_builds.json"
TARGETS = ("sm_80", "sm_90a")
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage"]
FLAGS += ["-Xcompiler", "-Wall,-Wextra", f"-I{ROOT / 'csrc/include'}"]
# Machine instructions by what they are for.
INSTRUCTIONS = {
    "tensor cores": r"HMMA\.16816\.F32.*",
    "bulk copies": r"UBLKCP.*",
    "async copies of 16 bytes": r"LDGSTS\..*128.*",
    "16 bytes from global memory": r"LDG\.(.*\.)?128(\..*)?",
    "16 bytes from shared memory": r"LDS\.(.*\.)?128(\..*)?",
    "integers to floats": r"I2F.*",
    "local memory": r"(LDL|STL).*",
}
# Of every multiprocessor that the kernels run on: 64 Ki registers, given out by 256, to 2,048 threads (CUDA C++
# programming guide, compute capabilities 8.0 and 9.0); a block takes 1 KiB of shared memory besides its own.
REGISTERS, THREADS, BLOCK, RESERVED = 64 << 10, 2048, 256, 1 << 10
SHARED = {"A100": 164 << 10, "H100": 228 << 10}
FORMS = {"dense": op.DENSE, "factors": op.FACTORS, "pivoted": op.PIVOTED}
KINDS = {"bfloat16": (op.PLAIN, 0), "int8": (op.INT8, 0), "int4": (op.INT4_ZEROS, 64)}


def nvcc() -> str | None:
    """nvcc of CUDA_HOME, or in the PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


def cuobjdump() -> str | None:
    """CUDA's, or the one that comes with Triton; None if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.nvidia.cuobjdump.path


def version() -> str:
    """Of nvcc."""
    return re.search(r"V(\d+\.\d+\.\d+)", subprocess.check_output([nvcc(), "--version"], text=True))[1]


def compile_kernels(path: str | pathlib.Path) -> None:
    """The kernels as the object `path`, with machine code for every target."""
    targets = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in TARGETS]
    source = str(ROOT / "csrc/cuda/decode.cu")
    command = [nvcc(), *FLAGS, "-Xcompiler", "-fPIC", *targets, "-c", source, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stdout}{done.stderr}")


def builds(path: str | pathlib.Path) -> list[dict]:
    """Every kernel for every target, in numbers, of what `compile_kernels` made."""
    rows = []
    for target in TARGETS:
        dump = [cuobjdump(), "--gpu-architecture", target, str(path)]
        usage, sass = (
            subprocess.check_output([*dump, flag], text=True) for flag in ("--dump-resource-usage", "--dump-sass")
        )
        used = {
            name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", numbers)}
            for name, numbers in re.findall(r"Function (\S+):\s*\n(.*)", usage)
        }
        for part in sass.split("Function : ")[1:]:
            name = part.split(maxsplit=1)[0]
            listed = aot.SASS.findall(part)
            opcodes = collections.Counter(listed)
            kernel = re.search(r"decode_kernel.*?(Bf16|F16)ELi(\d+)E", name)
            row = {
                "target": target,
                "activation": {"Bf16": "bfloat16", "F16": "float16"}[kernel[1]],
                "tokens": int(kernel[2]),
                "registers": used[name]["REG"],
                "spills": used[name]["STACK"] + used[name]["LOCAL"],
                "blocks": REGISTERS // (-(-used[name]["REG"] * 32 // 256) * 256 * BLOCK // 32),
                "instructions": sum(opcodes.values()),
            }
            for what, pattern in INSTRUCTIONS.items():
                row[what] = sum(count for opcode, count in opcodes.items() if re.fullmatch(pattern, opcode))
            # Where the compiler does not know that one lane copies, it makes a loop over lanes of every bulk copy.
            row["bulk copies in loops"] = sum(
                one.startswith("UBLKCP") and after.startswith("BRA.U.ANY") for one, after in itertools.pairwise(listed)
            )
            rows.append(row)
    return sorted(rows, key=lambda row: (row["target"], row["tokens"], row["activation"]))


def rank_of(form: int, out: int, in_: int, ratio: float) -> int:
    """Of a layer of `ratio` of the size, a multiple of 64."""
    both, budget = out + in_, ratio * out * in_
    if form == op.DENSE:
        return 0
    rank = budget / both if form == op.FACTORS else (both - (both * both - 4 * budget) ** 0.5) / 2
    return max(64, int(min(rank, min(out, in_) - 64)) // 64 * 64)


def problems() -> list[dict]:
    """Groups of Llama-3.1-8B's layers at half their size, as `csrc/testing/cuda_schedule.cpp` reads them."""
    groups = {
        "o": (op.CONCATENATE, [(4096, 4096)]),
        "q/k/v": (op.CONCATENATE, [(4096, 4096), (1024, 4096), (1024, 4096)]),
        "gate/up": (op.SWIGLU, [(14336, 4096), (14336, 4096)]),
        "MLP": (op.GATED_MLP, [(14336, 4096), (14336, 4096), (4096, 14336)]),
    }
    found = []
    for device in ("A100", "H100"):
        for group, (mode, shapes) in groups.items():
            for form, kind, tokens in [
                ("factors", "bfloat16", 1),
                ("factors", "bfloat16", 16),
                ("pivoted", "bfloat16", 1),
                ("factors", "int8", 1),
                ("factors", "int4", 1),
            ]:
                layers = [(FORMS[form], out, in_, rank_of(FORMS[form], out, in_, 0.5), *KINDS[kind])
                          for out, in_ in shapes]  # fmt: skip
                found.append({"device": device, "group": group, "form": form, "weights": kind, "tokens": tokens,
                              "mode": mode, "layers": layers})  # fmt: skip
    return found


def schedules(compiler: str = "c++") -> list[dict]:
    """How the kernels lay out each of `problems`, by their own code, compiled for the CPU."""
    found = problems()
    lines = []
    for one in found:
        device = DEVICES[one["device"]]
        numbers = [device.multiprocessors, device.shared_bytes, one["tokens"], one["mode"], len(one["layers"])]
        lines.append(" ".join(map(str, [*numbers, *(number for layer in one["layers"] for number in layer)])))
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/schedule"
        sources = ["-x", "c++", str(ROOT / "csrc/testing/cuda_schedule.cpp")]
        flags = ["-std=c++17", "-O0", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc/include'}"]
        subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
        answers = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    names = ("stages", "blocks", "slots", "splits", "shared", "workspace")
    rows = []
    for one, answer in zip(found, answers.splitlines(), strict=True):
        if not answer[0].isdigit():
            raise RuntimeError(f"{one}: {answer}")
        row = {key: one[key] for key in ("device", "group", "form", "weights", "tokens")}
        *numbers, uneven = answer.split()
        row |= dict(zip(names, map(int, numbers), strict=True)) | {"uneven": float(uneven)}
        device = DEVICES[one["device"]]
        resident = min(THREADS // BLOCK, SHARED[device.name] // (row["shared"] + RESERVED))
        row["warps"] = resident * BLOCK // 32
        # Bytes of weights that a multiprocessor has on their way at most: slots of 16 rows of 256 (int4: 128) bytes.
        blocks = -(-row["blocks"] // device.multiprocessors)
        row["ahead"] = blocks * 8 * row["slots"] * 16 * (128 if one["weights"] == "int4" else 256)
        seconds = one_launch_seconds(device, weights_of(one), ahead=row["ahead"])
        row["floor"], row["model"] = (round(1e6 * value, 2) for value in seconds)
        rows.append(row)
    return rows


def weights_of(one: dict) -> list[list[tuple[int, int, int, int]]]:
    """The weights of each stage, as `plan` takes them."""

    def stages(layers):
        first = [(rank, in_, kind, group) for form, _, in_, rank, kind, group in layers if form != op.DENSE]
        second = [(out - rank if form == op.PIVOTED else out, rank or in_, kind, group)
                  for form, out, in_, rank, kind, group in layers]  # fmt: skip
        return [stage for stage in (first, second) if stage]

    if one["mode"] != op.GATED_MLP:
        return stages(one["layers"])
    return stages(one["layers"][:2]) + stages(one["layers"][2:])


def builds_table(rows: list[dict]) -> str:
    """Markdown: the kernels of bfloat16, which those of float16 equal."""
    what = list(INSTRUCTIONS)
    lines = [
        "| kernel of | machine code | registers | spilled bytes | blocks by registers | " + " | ".join(what) + " |",
        "| --- | --- | ---: | ---: | ---: |" + " ---: |" * len(what),
    ]
    for row in rows:
        if row["activation"] == "bfloat16":
            tokens = {1: "one token", 8: "2–8 tokens", 16: "9–16 tokens"}[row["tokens"]]
            cells = [row[key] for key in ("registers", "spills", "blocks", *what)]
            lines.append(f"| {tokens} | {row['target']} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def schedules_table(rows: list[dict]) -> str:
    """Markdown: how layers are laid out."""
    lines = [
        "| layers | weights | tokens | device | stages | splits | blocks | uneven | shared KiB of a block | "
        "warps of 64 | read ahead KiB | floor µs | model µs | measured µs |",
        "| --- | --- | ---: | --- |" + " ---: |" * 10,
    ]
    for row in rows:
        cells = [row["stages"], row["splits"], row["blocks"], f"{row['uneven']:.2f}", round(row["shared"] / 1024),
                 row["warps"], round(row["ahead"] / 1024), f"{row['floor']:.1f}", f"{row['model']:.1f}",
                 "not measured"]  # fmt: skip
        name = row["group"] + (", pivoted" if row["form"] == "pivoted" else "")
        lines.append(
            f"| {name} | {row['weights']} | {row['tokens']} | {row['device']} | " + " | ".join(map(str, cells)) + " |"
        )
    return "\n".join(lines) + "\n"


def main(store: Annotated[bool, typer.Option(help="Write the result under bench/results.")] = True):
    """Compile the CUDA kernels for both targets and lay out a model's layers; about half a minute."""
    if nvcc() is None or cuobjdump() is None:
        raise typer.BadParameter("needs nvcc, in the PATH or under CUDA_HOME, and cuobjdump, which Triton has too")
    with tempfile.TemporaryDirectory() as folder:
        compile_kernels(f"{folder}/decode.o")
        rows = builds(f"{folder}/decode.o")
    result = {
        "nvcc": version(),
        "date": report.device_description()["date"],
        "builds": rows,
        "schedules": schedules(),
    }
    if store:
        files.write_json(RESULTS, result)
    typer.echo(builds_table(result["builds"]) + "\n" + schedules_table(result["schedules"]))


if __name__ == "__main__":
    typer.run(main)
