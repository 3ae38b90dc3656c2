"""What nvcc makes of the CUDA kernels for GPUs that are not here: the stored table, and all of it compiled again."""

import subprocess
import sys

import pytest
import torch
from test_gpu_shim import COMPILER

from acip_kernels import files
from bench import cuda_builds

ROOT = cuda_builds.ROOT
needs_nvcc = pytest.mark.skipif(cuda_builds.nvcc() is None, reason="needs nvcc, in the PATH or under CUDA_HOME")


@pytest.fixture(scope="module")
def stored():
    return files.read_json(cuda_builds.RESULTS)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Compiled once, with warnings as errors, for all that looks at them."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.o"
    cuda_builds.compile_kernels(path)
    return str(path)


def check(rows):
    """Nothing spills, and the instructions that matter are there, and those that must not be are not."""
    kernels = {(row["target"], row["activation"], row["tokens"]) for row in rows}
    assert kernels == {(t, a, n) for t in cuda_builds.TARGETS for a in ("bfloat16", "float16") for n in (1, 8, 16)}
    for row in rows:
        assert row["spills"] == 0 and row["local memory"] == 0, row
        # So that two blocks fit on a multiprocessor, where launches overlap.
        assert row["registers"] <= (128 if row["tokens"] <= 8 else 255), row
        assert row["blocks"] >= (2 if row["tokens"] <= 8 else 1), row
        assert row["tensor cores"] > 0, row  # of one token for integers alone
        assert (row["bulk copies"] > 0) == (row["target"] == "sm_90a") and row["bulk copies in loops"] == 0, row
        assert row["async copies of 16 bytes"] > 0, row
        assert row["16 bytes from global memory"] > 0 and row["16 bytes from shared memory"] > 0, row
        assert row["integers to floats"] == 0, row


def test_the_stored_table(stored):
    check(stored["builds"])
    for row in stored["schedules"]:
        device = cuda_builds.DEVICES[row["device"]]
        assert row["shared"] <= device.shared_bytes and row["slots"] >= 2, row
        # Little's law: as many bytes on their way as memory delivers in its latency, of about 0.7 µs.
        assert row["ahead"] * device.multiprocessors >= 0.7e-6 * device.bandwidth, row
        assert row["floor"] <= row["model"], row
        assert device.multiprocessors <= row["blocks"] <= 2 * device.multiprocessors, row
        # Every task is one block's, and no block has much more to read than the others.
        assert 1 <= row["uneven"] <= 1.5, row


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_stored_schedules_are_the_kernels_own(stored):
    assert cuda_builds.schedules(COMPILER) == stored["schedules"]


@needs_nvcc
@pytest.mark.skipif(cuda_builds.cuobjdump() is None, reason="needs cuobjdump")
def test_compiled_again_it_is_as_stored(stored, kernels):
    rows = cuda_builds.builds(kernels)
    check(rows)
    if cuda_builds.version() == stored["nvcc"]:
        assert rows == stored["builds"]


def check_symbols(kernels):
    """What the kernels' host code asks of others: of CUDA a device's attributes and launches, which do not wait and can
    be captured, and what nvcc registers kernels by; no memory, of CUDA or of the host, no stream, no torch."""
    listed = subprocess.check_output(["nm", "--undefined-only", kernels], text=True).split()
    asked = {name for name in listed if name not in "Uw"}
    of_cuda = {name for name in asked if name.startswith("cuda")}
    assert of_cuda <= {"cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetLastError", "cudaLaunchKernelExC"}, (
        asked
    )
    others = {name for name in asked - of_cuda if not name.startswith("__cuda")}
    assert others <= {"__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_", "atexit", "memcpy", "memset", "__gxx_personality_v0",
                      "_Unwind_Resume", "__cxa_guard_abort", "__cxa_guard_acquire", "__cxa_guard_release",
                      }, others  # fmt: skip


@needs_nvcc
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_example_and_the_torch_library_are_built_and_load_without_a_gpu(kernels, tmp_path):
    """A program without torch, and the library that torch loads."""
    check_symbols(kernels)
    program, source = f"{tmp_path}/decode", str(ROOT / "csrc/examples/decode.cpp")
    subprocess.run([cuda_builds.nvcc(), *cuda_builds.FLAGS, kernels, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    if not torch.cuda.is_available():
        assert done.returncode == 2 and "no CUDA device" in done.stderr
    elif torch.cuda.get_device_capability()[0] in (8, 9):  # what it was compiled for
        assert done.returncode == 0, done.stdout + done.stderr
    setup = (ROOT / "setup.py").read_text().split("def extension")[0]
    namespace = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile(setup, "setup.py", "exec"), namespace)
    library = f"{tmp_path}/_cuda.so"
    namespace["link_cuda"](cuda_builds.nvcc(), kernels, tmp_path, library)
    code = (
        "import torch, sys; torch.ops.load_library(sys.argv[1]); x = torch.ones(1, 8, dtype=torch.bfloat16)\n"
        "assert torch.ops.acip_cuda.fused_linear.default is not None\n"
        "try: torch.ops.acip_cuda.fused_linear(x, [x], [0, 0, 0, 8, 0], 0)\n"
        "except NotImplementedError as error: assert 'CPU' in str(error), error\n"
        "else: raise SystemExit('it ran on the CPU')"
    )
    subprocess.run([sys.executable, "-c", code, library], check=True)
