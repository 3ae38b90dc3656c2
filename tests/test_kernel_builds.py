"""What the Triton kernels are compiled to for GPUs that are not here: the stored table, and a sample compiled again."""

import json
import os
import subprocess
import sys

import pytest

from acip_kernels.ops.aot import SHARED_MEMORY
from bench import kernel_builds

pytest.importorskip("triton")

SAMPLE = """
import json
from acip_kernels.ops import aot
from bench import kernel_builds
found = kernel_builds.every_launch()
sample = {}
for launch in found:  # the last of each kind, which is of the largest layers
    constants = dict(launch.constants)
    kind = constants.get("KIND0", constants.get("KIND"))
    sample[launch.kernel, launch.target, constants.get("DOT"), kind] = launch
builds = [launch.row() | vars(launch.build()) for launch in list(sample.values())[::6]]
for row in builds:
    del row["assembly"], row["opcodes"]

def instructions(kernel, **wanted):
    # Of a launch on an H100, in their order.
    for launch in found:
        constants = dict(launch.constants)
        if (launch.kernel, launch.target) == (kernel, "sm_90") and wanted.items() <= constants.items():
            return aot.SASS.findall(launch.build().assembly)

dependent = {
    "shrink": instructions("shrink_kernel", PDL=True, COUNT=1, KIND0=0, DOT=False),
    "expand": instructions("expand_kernel", PDL=True, COUNT=1, FORM0=1, KIND0=0, DOT=False),
}
keys = [launch.row() for launch in found]
print(json.dumps({"rows": keys, "builds": builds, "sources": kernel_builds.sources(), "dependent": dependent}))
"""


@pytest.fixture(scope="module")
def compiled():
    """Every launch that plan chooses now, and some builds, from a process whose Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE], capture_output=True, text=True, env=environment, cwd=kernel_builds.ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def stored():
    return kernel_builds.read_result()["rows"]


key = kernel_builds.key


def test_the_stored_table_is_of_these_kernels_and_of_what_plan_chooses_now(compiled, stored):
    assert kernel_builds.read_result()["sources"] == compiled["sources"]
    assert {key(row) for row in compiled["rows"]} == {key(row) for row in stored}


def spills_at_most(row) -> int:
    """Nothing, but two registers of one product: a gradient's of e4m3 that is made by bits, on sm_80."""
    by_bits = " KIND=5 " in f" {row['constants']} "
    return 8 if (row["kernel"], row["target"]) == ("backward_kernel", "sm_80") and by_bits else 0


def test_nothing_spills_and_shared_memory_suffices(stored):
    for row in stored:
        assert row["spills"] <= spills_at_most(row), row
        assert row["shared"] <= SHARED_MEMORY[row["target"]], row


def test_tensor_cores_and_wide_loads(stored):
    """More than one token goes through tensor cores; first factors and products are read 16 bytes at a time."""
    for row in stored:
        constants = f" {row['constants']} "
        many = " KIND=" in constants and row["kernel"] in ("forward_kernel", "backward_kernel")
        exact = kernel_builds.is_float32(row)
        if (" DOT=True " in constants or many) and not exact:
            assert row["matrix"] > 0, row
        if many or (row["kernel"] == "shrink_kernel" and " KIND0=0 " in constants):
            assert row["loads_128"] + row["async_loads_128"] > 0, row
        # Hopper's instructions take 64 tokens and more, and a program of four warps.
        if many and not exact and row["target"] == "sm_90" and row["warps"] >= 4 and " BLOCK_TOKENS=128 " in constants:
            assert row["wgmma"] > 0, row
        # Passes over whole weights and outputs; on AMD a thread reads eight bytes of int4.
        if row["kernel"] in ("dequantize_kernel", "gather_kernel"):
            assert row["stores_128"] > 0 and (row["loads_128"] > 0 or row["target"] == "gfx942"), row


def test_a_sample_compiled_again_is_as_stored(compiled, stored):
    by_key = {key(row): row for row in stored}
    assert len(compiled["builds"]) >= 8
    for row in compiled["builds"]:
        assert row["spills"] <= spills_at_most(row) and row["shared"] <= SHARED_MEMORY[row["target"]]
        # Registers are the compiler's business; another version may take a few more.
        assert abs(row["registers"] - by_key[key(row)]["registers"]) <= 16, row


def test_a_dependent_launch_starts_early_reads_weights_and_then_waits(compiled):
    """In Hopper's machine code: PREEXIT lets the next launch start, ACQBULK waits for the one before, EF streams."""
    shrink, expand = compiled["dependent"]["shrink"], compiled["dependent"]["expand"]

    def first(names, *parts):
        return next(i for i, name in enumerate(names) if all(part in name.split(".") for part in parts))

    for names in (shrink, expand):
        assert first(names, "PREEXIT") < first(names, "LDG")
        assert first(names, "LDG", "EF", "128") < first(names, "ACQBULK") < first(names, "STG")
    for names in (shrink, expand):  # no atomics: sums are added in one order
        assert not [name for name in names if name.startswith(("RED", "ATOM"))]
