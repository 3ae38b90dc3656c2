"""What the Triton kernels of training and prefill become on GPUs that are not here: compiled, and read."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from acip_kernels.ops import aot
from acip_kernels.plan import DEVICES

# Of a device each: the first that Triton compiles for with this target.
TARGETS = {target: next(d for d in DEVICES.values() if d.target == target) for target in aot.TARGETS}
# tokens, out_features, rank: a long prompt, a short one, and one of odd sizes.
LAYERS = [[4096, 4096, 1024], [64, 4096, 512], [130, 1001, 33]]
SCALARS = {"scaling": "fp32", "mask_scale": "fp32"}


def compile_all():
    """`[(kernel, target, layer, itemsize, what a launch may take at most, build)]`, in a process that can compile."""
    from acip_kernels.ops.masked_svd_linear import triton

    def build(kernel, target, config, dtype, divisible, **constants):
        """As a launch would: what is divisible by 16, or 1, is told."""
        signature = {}
        for name in kernel.arg_names:
            if name in ("S", "mask", "partials", "dmask"):
                signature[name] = "*fp32:16"
            elif name in ("z", "g", "U", "bias", "y", "hs"):
                signature[name] = f"*{dtype}:16"
            elif name in SCALARS:
                signature[name] = SCALARS[name]
            elif name in ("z_column", "g_column", "U_column"):
                signature[name] = "i32:1"
            elif not name.isupper():
                signature[name] = "i32:16" if divisible else "i32"
        blocks = {"num_warps": 4} if config is None else triton.options(config)
        values = {name: blocks[name] for name in blocks if name.isupper()} | constants
        options = {name: blocks[name] for name in blocks if not name.isupper()}
        return aot.build(kernel, signature, values, target, **options)

    builds = []
    for target, device in TARGETS.items():
        for layer in LAYERS:
            tokens, out, rank = layer
            for itemsize, dtype in (
                ((2, "bf16"), (4, "fp32")) if tokens == 4096 and target == "sm_80" else ((2, "bf16"),)
            ):
                for kernel, columns, depth in (
                    (triton.forward_kernel, out, rank),
                    (triton.backward_kernel, rank, out),
                ):
                    config = triton.default_config(triton.Shape(tokens, columns, depth, itemsize), device)
                    adapter = 32 if layer == LAYERS[1] else 0  # of the depth or the columns that there are
                    found = build(kernel, target, config, dtype, rank % 16 == 0, ADAPTER_RANK=adapter)
                    builds.append((kernel.__name__, target, layer, itemsize, config.shared(itemsize), found))
        kernel = triton.mask_gradient_kernel
        found = build(kernel, target, None, "bf16", True, **triton.MASK_GRADIENT_BLOCKS)
        builds.append((kernel.__name__, target, None, 4, 1024, found))
    return builds


@pytest.fixture(scope="module")
def builds():
    # The tests' own process interprets the kernels, where there is no GPU.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [(*what, aot.Build(**build)) for *what, build in json.loads(done.stdout.splitlines()[-1])]


def test_nothing_spills_and_shared_memory_suffices(builds):
    assert len(builds) == 3 * (2 * len(LAYERS) + 1) + 2
    for kernel, target, layer, itemsize, most, build in builds:
        where = f"{kernel} {layer} {itemsize}: {build}"
        assert build.spills == 0, where
        assert build.shared <= min(most, aot.SHARED_MEMORY[target], TARGETS[target].shared_bytes), where
        assert build.registers <= (512 if target == "gfx942" else 255), where


def test_products_are_made_by_tensor_cores(builds):
    for kernel, target, layer, itemsize, _, build in builds:
        where = f"{kernel} {layer} {itemsize}: {build}"
        if kernel == "mask_gradient_kernel" or (itemsize == 4 and target != "gfx942"):
            assert build.matrix == 0, where  # float32 is float32, not tf32
        else:
            assert build.matrix > 0, where
            if target == "sm_90" and layer == LAYERS[0]:
                assert build.count(r"HGMMA\..*") > 0, where


def test_factors_are_loaded_16_bytes_at_a_time(builds):
    for kernel, target, layer, itemsize, _, build in builds:
        if layer in LAYERS[:2]:
            where = f"{kernel} {layer} {itemsize}: {build}"
            assert (build.loads_128 if target == "gfx942" else build.async_loads_128) > 0, where


def test_an_interpreted_kernel_cannot_be_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from acip_kernels.ops.masked_svd_linear import triton

    with pytest.raises(RuntimeError, match="compile in a process without TRITON_INTERPRET"):
        aot.build(triton.mask_gradient_kernel, {}, {}, "sm_80")


def test_a_target_that_is_unknown():
    with pytest.raises(ValueError, match="target must be one of .*'sm_90'.*, got 'sm_12'"):
        aot.build(None, {}, {}, "sm_12")


def test_counts_of_instructions():
    opcodes = {
        "LDG.E.128": 1, "LDG.E.128.CONSTANT": 2, "LDG.E.64": 4, "LDGSTS.E.BYPASS.128": 8, "LDGSTS.E": 16,
        "STG.E.128": 32, "HMMA.16816.F32.BF16": 64, "HGMMA.64x128x16.F32.BF16": 128, "FFMA": 256,
        "global_load_dwordx4": 512, "buffer_load_dwordx4": 1024, "v_mfma_f32_16x16x16_bf16": 2048,
        "s_load_dwordx4": 4096,
    }  # fmt: skip
    build = aot.Build("sm_90", 1, 0, 0, opcodes, "")
    assert (build.loads_128, build.async_loads_128, build.stores_128) == (1 + 2 + 512 + 1024, 8, 32)
    assert build.matrix == 64 + 128 + 2048 and build.instructions == 8191


def as_json(build):
    return dataclasses.asdict(dataclasses.replace(build, assembly=""))


if __name__ == "__main__":
    print(json.dumps([(*what, as_json(build)) for *what, build in compile_all()]))
