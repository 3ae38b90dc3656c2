"""Triton kernels compiled ahead of time, on a machine without a GPU, and what the machine code is made of."""

from __future__ import annotations

import collections
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

# Bytes of shared memory that one block may have: the CUDA C++ programming guide's table of compute capabilities
# ("maximum amount of shared memory per thread block"), and the LDS of a CDNA 3 compute unit.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
TARGETS = tuple(SHARED_MEMORY)

SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_GCN = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Build:
    """A compiled kernel in numbers.

    registers: of each thread (AMD: vector registers, accumulation registers among them). spills: bytes of each
    thread's stack, which our kernels need for spilled registers alone. shared: bytes of each block. opcodes: how often
    each machine instruction is written down, by its full name (`"LDG.E.128"`, `"global_load_dwordx4"`); what a loop
    repeats counts once. assembly: the SASS or GCN text itself.
    """

    target: str
    registers: int
    spills: int
    shared: int
    opcodes: Mapping[str, int]
    assembly: str = dataclasses.field(repr=False, compare=False)

    def count(self, pattern: str) -> int:
        """Instructions whose whole name matches the regular expression `pattern`."""
        return sum(number for name, number in self.opcodes.items() if re.fullmatch(pattern, name))

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def loads_128(self) -> int:
        """Loads of 16 bytes a thread from global memory to registers."""
        return self.count(r"LDG\.(.*\.)?128(\..*)?|(buffer|global)_load_(dwordx4|b128)")

    @property
    def async_loads_128(self) -> int:
        """Copies of 16 bytes a thread from global to shared memory past the registers; none on gfx942."""
        return self.count(r"LDGSTS\.(.*\.)?128(\..*)?")

    @property
    def stores_128(self) -> int:
        """Stores of 16 bytes a thread to global memory."""
        return self.count(r"STG\.(.*\.)?128(\..*)?|(buffer|global)_store_(dwordx4|b128)")

    @property
    def matrix(self) -> int:
        """Tensor-core (matrix-core) instructions: `mma` (HMMA, IMMA, ...), Hopper's `wgmma` (HGMMA, ...), MFMA."""
        return self.count(r"[A-Z]?MMA(\..*)?|[A-Z]GMMA(\..*)?|v_mfma_.*")

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.registers} registers, {self.spills} B spilled, {self.shared} B shared, "
            f"{self.matrix} matrix instructions, 128-bit: {self.loads_128} loads, {self.async_loads_128} async, "
            f"{self.stores_128} stores; {self.instructions} instructions"
        )


def build(
    kernel,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    num_warps: int = 4,
    num_stages: int = 3,
    **options,
) -> Build:
    """Compiles a `@triton.jit` function for `target` without a GPU.

    Args:
        kernel: the decorated function.
        signature: a type by the name of each argument that is not a constexpr, as Triton writes them: "*bf16", "*fp32",
            "i32", "fp32". An ending ":16" says that the pointer (in bytes) or integer is divisible by 16, as Triton
            finds out by itself at a launch: without it no load is wider than an element.
            An ending ":1" says that the integer is 1, which a launch makes a constant too.
        constexprs: a value by the name of each constexpr.
        target: "sm_80", "sm_89", "sm_90", or "gfx942".
        num_warps, num_stages: as at a launch. options: others of the Triton backend, `maxnreg` or `waves_per_eu`.

    Raises:
        ValueError: an unknown target; an argument of the kernel that is nowhere, or a name that is no argument.
        RuntimeError: Triton is missing, or its interpreter is on: it makes functions that cannot be compiled.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {list(TARGETS)}, got {target!r}")
    try:
        import triton
        from triton.backends.compiler import GPUTarget
    except ImportError as error:
        raise RuntimeError("kernels are compiled by Triton, which is not installed") from error
    if triton.knobs.runtime.interpret or not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            "Triton's interpreter was on when the kernel was decorated, and what it makes of it cannot be compiled: "
            "compile in a process without TRITON_INTERPRET in its environment"
        )
    if unknown := (signature.keys() | constexprs.keys()) - set(kernel.arg_names):
        raise ValueError(f"{kernel.__name__} has no arguments {sorted(unknown)}")
    if absent := set(kernel.arg_names) - (signature.keys() | constexprs.keys()):
        raise ValueError(f"{kernel.__name__}: neither a type nor a value for {sorted(absent)}")

    constants, types, attrs = dict(constexprs), {}, {}
    for number, name in enumerate(kernel.arg_names):
        kind, _, hint = signature.get(name, "constexpr").partition(":")
        if hint == "1":
            constants[name] = 1
        elif hint == "16":
            attrs[(number,)] = [["tt.divisibility", 16]]
        elif hint:
            raise ValueError(f"{name}: {signature[name]!r} must end in ':16', ':1' or neither")
        types[name] = "constexpr" if name in constants else kind
    source = triton.compiler.ASTSource(kernel, types, constants, attrs)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    compiled = triton.compile(source, target=gpu, options={"num_warps": num_warps, "num_stages": num_stages, **options})
    read = _read_cubin if gpu.backend == "cuda" else _read_gcn
    registers, spills, assembly, opcodes = read(compiled)
    # A plain dictionary: `dataclasses.asdict` makes nonsense of a Counter.
    return Build(target, registers, spills, compiled.metadata.shared, dict(collections.Counter(opcodes)), assembly)


def _read_cubin(compiled) -> tuple[int, int, str, list[str]]:
    from triton import knobs

    def dump(*arguments: str) -> str:
        return subprocess.run(
            [knobs.nvidia.cuobjdump.path, *arguments, file.name], check=True, capture_output=True, text=True
        ).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = dump("--dump-resource-usage"), dump("--dump-sass")
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, sass, SASS.findall(sass)


def _read_gcn(compiled) -> tuple[int, int, str, list[str]]:
    text = compiled.asm["amdgcn"]
    registers, scratch = (
        int(re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)[1])
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch, text, _GCN.findall(text)
