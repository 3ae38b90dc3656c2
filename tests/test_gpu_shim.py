"""The execution shim for CUDA kernels: right kernels pass, and every planted bug is caught."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", f"-I{ROOT / 'csrc/include'}"]

pytestmark = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler, and fibers as Linux has them",
)

RACE = "with no barrier in between"
# What each planted bug has to be told as.
FAULTS = {
    "no __syncthreads": RACE,
    "no __syncwarp": RACE,
    "a shuffle for a barrier": RACE,
    "no grid barrier": RACE,
    "bulk copy over what is read": RACE,
    "async copy over what is read": RACE,
    "bulk copy not awaited": "is on its way and was not waited for",
    "async copy not awaited": "is on its way and was not waited for",
    "mbarriers made with no proxy fence": "no proxy fence",
    "bulk copy over what is read, with no proxy fence": "no proxy fence",
    "too few bytes expected": "more bytes came than were expected",
    "too many bytes expected": "waits for ever",
    "grid barrier in an ordinary launch": "not launched for one",
    "write past shared memory": "outside of the 256 bytes of shared memory",
    "write past shared memory, past the accessors": "heap-buffer-overflow",
    "unaligned write": "not aligned",
    "unaligned load": "not aligned",
    "load past an array": "in no array",
    "store into an input": "only to be read",
    "a thread misses a barrier": "waits for ever",
    "lanes at different collectives": "should be together",
    "wrong fragment": " instead of ",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    target = tmp_path_factory.mktemp("shim") / "shim_faults"
    source = ROOT / "csrc/testing/shim_faults.cpp"
    subprocess.run([COMPILER, *FLAGS, *SANITIZED, str(source), "-o", str(target)], check=True)
    return str(target)


def test_right_kernels_pass(program):
    done = subprocess.run([program, "right"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_every_planted_bug_is_caught(program):
    names = subprocess.run([program, "names"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert set(names) == {"right", *FAULTS}
    for name, told in FAULTS.items():
        done = subprocess.run([program, name], capture_output=True, text=True)
        assert done.returncode != 0 and told in done.stdout + done.stderr, (name, done.stdout + done.stderr)
