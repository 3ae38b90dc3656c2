"""The CUDA kernels of deployed layers, run on the CPU under the execution shim and the address sanitizer."""

import os
import re
import subprocess

import pytest
from test_gpu_shim import COMPILER, FLAGS, RACE, ROOT, SANITIZED, pytestmark  # noqa: F401

KERNELS, PROGRAM = ROOT / "csrc/cuda/decode.cu", ROOT / "csrc/testing/cuda_decode.cpp"


def compiled(target, *sources_and_flags):
    # g++ knows no `#pragma unroll`.
    command = [COMPILER, *FLAGS, "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run([*command, *sources_and_flags, "-o", str(target)], check=True)
    return str(target)


def test_every_form_and_number_against_float64_and_bytes_against_their_floor(tmp_path):
    """Both dtypes, all forms, siblings, SwiGLU, MLPs, int8 and int4, odd sizes, 1 to 16 tokens; each in one launch and
    in several, with other splits and slots, by both kinds of copies, threads in either order; a workspace of NaN."""
    program = compiled(tmp_path / "cuda_decode", "-Og", *SANITIZED, "-x", "c++", KERNELS, PROGRAM)
    # The shim allocates much, and of each allocation the sanitizer keeps where it was made.
    environment = os.environ | {"ASAN_OPTIONS": "malloc_context_size=2"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=600)
    print(done.stdout)
    assert done.returncode == 0 and done.stdout.endswith("\n0 mistakes\n"), done.stdout[-2000:] + done.stderr[-4000:]
    pattern = (
        r"bytes: (\d+) weights, (\d+) read, \d+ others; (\d+) of first factors, (\d+) before a barrier; (\d) stages"
    )
    counted = [tuple(map(int, numbers)) for numbers in re.findall(pattern, done.stdout)]
    # Six groups of layers in bfloat16, int8 and int4 at 1 and 16 tokens, five in float16; and three of a large rank.
    assert len(counted) == 6 * 3 * 2 + 5 + 3
    for weights, read, first, early, stages in counted:
        assert weights <= read <= 1.02 * weights
        # The second factor is on its way before the first barrier: as much as there is memory for, here all of it.
        assert early > first or stages > 3
    assert [stages for *_, stages in counted[-3:]] == [3, 2, 2]
    weights, _, _, early, _ = counted[-1]
    assert early == weights


# Lines of the kernel without which it is wrong, what is put in their place, and what has to be told then.
BUGS = {
    "a slot is filled while it is read": (
        "__syncwarp();  // all lanes have read the slot",
        "",
        RACE,
    ),
    "a slot is filled with no proxy fence": (
        "if (job.bulk) fence_async();\n                        __syncwarp()",
        "__syncwarp()",
        "proxy fence",
    ),
    "mbarriers are made with no proxy fence": (
        "fence_async();\n    __syncwarp();\n    let_next_launch();",
        "__syncwarp();",
        "proxy fence",
    ),
    "weights are not waited for": ("barrier_wait(full, parity);", "", "was not waited for"),
    "blocks do not wait for each other": ("if (stage > job.begin) sync_grid();", "", RACE),
    "one buffer of sums": ("turn ^= 1;", "", RACE),
    "inputs are made while others are read": (
        "if (one) __syncthreads();  // all warps have read the inputs before",
        "",
        RACE,
    ),
    "inputs are read before all are made": ("__syncthreads();  // all inputs are made", "", RACE),
    "a wrong fragment": ("{low[0], high[0], low[1], high[1]}", "{low[0], low[1], high[0], high[1]}", ", not "),
    "rows behind the last": ("min(kRows, walk.rows - walk.run.row)", "kRows", "in no array"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What runs the kernels, without them."""
    return compiled(tmp_path_factory.mktemp("cases") / "cases.o", "-O0", "-c", PROGRAM)


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_the_kernel_is_caught(bug, cases, tmp_path):
    line, instead, told = BUGS[bug]
    source = KERNELS.read_text()
    assert source.count(line) == 1, line
    mutant = tmp_path / "decode.cu"
    mutant.write_text(source.replace(line, instead))
    program = compiled(tmp_path / "mutant", "-O0", "-Wno-error", cases, "-x", "c++", mutant)
    done = subprocess.run([program, "quick"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and told in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
