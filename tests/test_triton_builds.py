"""What the Triton kernels of training and prefill become on GPUs that are not here: compiled, and read."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from acip_kernels.ops import aot
from acip_kernels.ops.fused_linear import op
from acip_kernels.plan import DEVICES

# Of a device each: the first that Triton compiles for with this target.
TARGETS = {target: next(d for d in DEVICES.values() if d.target == target) for target in ("sm_80", "sm_90", "gfx942")}
# tokens, out_features, rank: a long prompt, a short one, and one of odd sizes.
LAYERS = [[4096, 4096, 1024], [64, 4096, 512], [130, 1001, 33]]
QUANTIZED = {"int4": op.INT4_ZEROS, "fp8": op.FP8}


def compile_all():
    """`[(kernel, target, layer, numbers, what a launch may take at most, build)]`, in a process that can compile."""
    from acip_kernels.ops import triton_products as kernels
    from acip_kernels.ops.triton_products import Matrix
    from acip_kernels.plan import Product, product_config
    from bench import kernel_builds

    meta, builds = kernel_builds.meta, []

    def add(target, layer, numbers, itemsize, call, *products):
        """The launches of `call` with the products that they make; a mask's gradient is none of them."""
        device = TARGETS[target]
        launches = kernel_builds.launches(device, call)
        products = iter(products)
        for launch in launches:
            if launch.kernel == "mask_gradient_kernel":
                if layer == LAYERS[0] and numbers == "bfloat16":
                    builds.append((launch.kernel, target, None, numbers, 1024, launch.build()))
                continue
            tokens, columns, depth, kind = next(products)
            product = Product(tokens, columns, depth, itemsize, kind, 64 if kind == op.INT4_ZEROS else 0)
            most = product_config(product, device).shared(product)
            builds.append((launch.kernel, target, layer, numbers, most, launch.build()))

    for target, layer in itertools.product(TARGETS, LAYERS):
        tokens, out, rank = layer
        formats = {"bfloat16": torch.bfloat16}
        if layer == LAYERS[0] and target == "sm_80":
            formats["float32"] = torch.float32
        for numbers, dtype in formats.items():
            adapter = 32 if layer == LAYERS[1] else 0  # of the depth or the columns that there are

            def both(_, dtype=dtype, adapter=adapter, tokens=tokens, out=out, rank=rank):
                z, U, g = (meta(shape, dtype) for shape in ((tokens, rank), (out, rank), (tokens, out)))
                S = meta((rank - adapter,), torch.float32)
                kernels.forward_product(z, U, S, S, meta((out,), dtype), adapter, 0.5)
                kernels.backward_product(g, U, z, S, S, 1.0, adapter, 0.5)

            add(target, layer, numbers, dtype.itemsize, both, (tokens, out, rank, 0), (tokens, rank, out, 0))
        if layer == LAYERS[0]:
            for numbers, kind in QUANTIZED.items():
                parts, (_, cols, group) = kernel_builds.weight(out, rank, kind)
                weight = Matrix(kind, cols, group, *parts)

                def quantized(_, weight=weight, tokens=tokens, out=out, rank=rank):
                    kernels.forward_product(meta((tokens, rank), torch.bfloat16), weight)
                    kernels.backward_product(meta((tokens, out), torch.bfloat16), weight)

                add(target, layer, numbers, 2, quantized, (tokens, out, rank, kind), (tokens, rank, out, kind))
    return builds


def compile_elementwise():
    """`[(kernel, target, build)]` of what a training step does between products: norm, SwiGLU, rotation, dropout."""
    from acip_kernels.ops import triton_dropout
    from acip_kernels.ops.gated_silu.triton import GatedSilu
    from acip_kernels.ops.rms_norm.triton import RmsNorm
    from acip_kernels.ops.rotary.triton import Rotary
    from bench import kernel_builds

    def numbers(*shape):
        return kernel_builds.meta(shape, torch.bfloat16).requires_grad_()

    def step(_):
        norm = RmsNorm.apply(numbers(4096, 2048), numbers(2048).detach(), 1e-5)
        norm.backward(torch.empty_like(norm))
        gated = GatedSilu.apply(numbers(4096, 5632), numbers(4096, 5632))
        gated.backward(torch.empty_like(gated))
        cos = numbers(1, 1024, 64).detach()
        turned = Rotary.apply(numbers(4, 1024, 32, 64).transpose(1, 2), cos, cos)
        turned.backward(torch.empty_like(turned))
        x, seed = numbers(4096, 2048).detach(), kernel_builds.meta((1,), torch.int64)
        triton_dropout.run(x, x, seed, 1 << 15, 2.0, add=True)

    return [
        (launch.kernel, target, launch.build())
        for target, device in TARGETS.items()
        for launch in kernel_builds.launches(device, step)
    ]


@pytest.fixture(scope="module")
def all_builds():
    # The tests' own process interprets the kernels, where there is no GPU.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [[(*what, aot.Build(**build)) for *what, build in some] for some in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture(scope="module")
def builds(all_builds):
    return all_builds[0]


def test_what_lies_between_products_reads_and_writes_16_bytes_at_a_time(all_builds):
    assert len(all_builds[1]) == 7 * len(TARGETS)
    for kernel, target, build in all_builds[1]:
        where = f"{kernel}: {build}"
        assert build.spills == 0 and build.registers <= (512 if target == "gfx942" else 255), where
        assert build.loads_128 > 0 and build.stores_128 > 0, where


def test_nothing_spills_and_shared_memory_suffices(builds):
    assert len(builds) == 3 * (2 * len(LAYERS) + 1 + 2 * len(QUANTIZED)) + 2
    for kernel, target, layer, numbers, most, build in builds:
        where = f"{kernel} {layer} {numbers}: {build}"
        assert build.spills == 0, where
        assert build.shared <= min(most, aot.SHARED_MEMORY[target], TARGETS[target].shared_bytes), where
        assert build.registers <= (512 if target == "gfx942" else 255), where


def test_products_are_made_by_tensor_cores(builds):
    for kernel, target, layer, numbers, _, build in builds:
        where = f"{kernel} {layer} {numbers}: {build}"
        if kernel == "mask_gradient_kernel" or (numbers == "float32" and target != "gfx942"):
            assert build.matrix == 0, where  # float32 is float32, not tf32
        else:
            assert build.matrix > 0, where
            if target == "sm_90" and layer == LAYERS[0]:
                assert build.count(r"HGMMA\..*") > 0, where


def test_factors_are_loaded_16_bytes_at_a_time(builds):
    for kernel, target, layer, numbers, _, build in builds:
        if layer in LAYERS[:2]:
            where = f"{kernel} {layer} {numbers}: {build}"
            assert (build.loads_128 if target == "gfx942" else build.async_loads_128) > 0, where


def test_an_interpreted_kernel_cannot_be_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from acip_kernels.ops import triton_products as triton

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
    made = compile_all(), compile_elementwise()
    print(json.dumps([[(*what, as_json(build)) for *what, build in some] for some in made]))
