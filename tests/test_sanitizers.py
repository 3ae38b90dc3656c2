"""The CPU kernels under the address and undefined-behaviour sanitizers, compiled from the same sources."""

import concurrent.futures
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def flags():
    """The flags of setup.py, by instruction set, without running it."""
    sys.path.insert(0, str(ROOT))
    namespace = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    source = (ROOT / "setup.py").read_text().split("def without")[0]
    exec(compile(source, "setup.py", "exec"), namespace)
    return namespace["ISAS"], namespace["FLAGS"]


@pytest.mark.skipif(
    COMPILER is None or platform.machine() != "x86_64", reason="needs a C++ compiler on the processor that it is for"
)
def test_no_kernel_touches_what_is_not_its_own(tmp_path):
    isas, common = flags()
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]
    # Not optimized, which takes longer than running them; but for the references. Warnings are the ordinary build's.
    common = [flag for flag in common if flag not in ("-O3", "-Werror")] + sanitizers
    jobs = [("dispatch", "dispatch.cpp", ["-DACIP_X86"]), ("main", "../testing/sanitized.cpp", ["-O1"])]
    for isa, own in isas.items():
        jobs += [(f"{name}-{isa}", f"{name}.cpp", [*own, f"-DACIP_ISA={isa}"]) for name in ("training", "decode")]

    def build(job):
        name, source, own = job
        target = tmp_path / f"{name}.o"
        subprocess.run([COMPILER, *common, *own, "-c", str(ROOT / "csrc/cpu" / source), "-o", str(target)], check=True)
        return str(target)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, jobs))
    program = tmp_path / "sanitized"
    subprocess.run([COMPILER, *sanitizers, *objects, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "portable: 0 mistakes" in done.stdout
