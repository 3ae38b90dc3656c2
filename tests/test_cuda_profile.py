"""`bench.cuda_profile` without a GPU: what it reads of its program and of ncu, and what it makes of it."""

import subprocess

import pytest
import typer.testing
from test_cuda_builds import needs_nvcc

from bench import cuda_profile

OUTPUT = """copy: 3e+12
barrier: cooperative 2.1e-06
barrier: dependent 9e-07
time: o bfloat16 1 cooperative bulk 3000000 2e-06
time: o bfloat16 1 cooperative threads 3000000 1.5e-06
time: o, pivoted int8 1 cooperative bulk 3000000 7e-06
time: o, pivoted int8 1 cooperative threads 3000000 7e-06
time: MLP int4 16 cooperative bulk 6000000 4e-06
time: MLP int4 16 cooperative threads 6000000 2e-06
"""
# As ncu's manual shows it: notes, a head, and a line for each launch and counter.
REPORT = """==PROF== Connected to process 7 (/tmp/profile)
==PROF== Profiling "decode_kernel" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Context","Stream","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","decode_kernel","1","7","Command line profiler metrics","dram__bytes_read.sum","byte","3,030,000"
"0","7","decode_kernel","1","7","Command line profiler metrics","gpu__time_duration.sum","ns","1,515"
"1","7","decode_kernel","1","7","Command line profiler metrics","dram__bytes_read.sum","byte","6000000"
"1","7","decode_kernel","1","7","Command line profiler metrics","gpu__time_duration.sum","ns","4000"
"""


def test_times_and_barriers_are_read_and_set_against_the_floor():
    found = cuda_profile.parse(OUTPUT)
    assert found["bytes_per_s"] == 3e12 and found["barriers"] == {"cooperative": 2.1e-6, "dependent": 9e-7}
    assert len(found["rows"]) == 6 and found["rows"][2]["group"] == "o, pivoted"
    table = cuda_profile.times_table(found)
    assert "7.0 (7.00)" in table
    assert "2.0 (2.00)" in table and "1.5 (1.50)" in table and "4.0 (2.00)" in table and "2.0 (1.00)" in table


def test_counters_are_read_by_launch():
    first, second = cuda_profile.counters(REPORT)
    assert first == pytest.approx({"read": 3.03e6, "seconds": 1.515e-6})
    rows = cuda_profile.parse("once: o bfloat16 1 3000000\nonce: MLP int4 16 6000000\n")["rows"]
    table = cuda_profile.counters_table([rows[0] | first, rows[1] | second])
    assert "1.010" in table and "2.00" in table and "1.50" in table


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None if name == "nvidia-smi" else f"/usr/bin/{name}")
    app = typer.Typer()
    app.command()(cuda_profile.main)
    result = typer.testing.CliRunner().invoke(app, [])
    assert result.exit_code != 0 and "there is no GPU" in result.output


@needs_nvcc
def test_the_programs_are_compiled_with_warnings_as_errors(tmp_path):
    """Their own code alone, not the kernels again: cuda_profile.cpp, and the shim's cases as a program for a GPU."""
    for name in ("cuda_profile", "cuda_decode"):
        source = str(cuda_profile.ROOT / f"csrc/testing/{name}.cpp")
        flags = [*cuda_profile.FLAGS, "-O0", "-gencode", "arch=compute_90a,code=sm_90a", "-x", "cu", "-c"]
        subprocess.run([cuda_profile.nvcc(), *flags, source, "-o", f"{tmp_path}/{name}.o"], check=True)
