"""What the Triton kernels are compiled to for GPUs that are not here: the stored table, and a sample compiled again."""

import json
import os
import subprocess
import sys

import pytest

from acip_kernels import files
from acip_kernels.ops.aot import SHARED_MEMORY
from bench import kernel_builds

pytest.importorskip("triton")

SAMPLE = """
import json
from bench import kernel_builds
found = kernel_builds.every_launch()
sample = {}
for launch in found:  # the last of each kind, which is of the largest layers
    constants = dict(launch.constants)
    sample[launch.kernel, launch.target, constants.get("DOT"), constants.get("KIND0")] = launch
builds = [launch.row() | vars(launch.build()) for launch in list(sample.values())[::4]]
for row in builds:
    del row["assembly"], row["opcodes"]
print(json.dumps({"rows": [launch.row() for launch in found], "builds": builds}))
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
    return files.read_json(kernel_builds.RESULTS)["rows"]


def key(row):
    return row["target"], row["kernel"], row["warps"], row["constants"], row["arguments"]


def test_the_stored_table_is_of_what_plan_chooses_now(compiled, stored):
    assert {key(row) for row in compiled["rows"]} == {key(row) for row in stored}


def test_nothing_spills_and_shared_memory_suffices(stored):
    for row in stored:
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[row["target"]], row


def test_tensor_cores_and_wide_loads(stored):
    """More than one token goes through tensor cores; plain weights are read 16 bytes at a time."""
    for row in stored:
        if "DOT=True" in row["constants"]:
            assert row["matrix"] > 0, row
        if "KIND0=0" in row["constants"] and "stride0" not in row and row["kernel"] == "shrink_kernel":
            assert row["loads_128"] > 0, row


def test_a_sample_compiled_again_is_as_stored(compiled, stored):
    by_key = {key(row): row for row in stored}
    assert len(compiled["builds"]) >= 5
    for row in compiled["builds"]:
        assert row["spills"] == 0 and row["shared"] <= SHARED_MEMORY[row["target"]]
        # Registers are the compiler's business; another version may take a few more.
        assert abs(row["registers"] - by_key[key(row)]["registers"]) <= 16, row
