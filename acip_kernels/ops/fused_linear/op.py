"""`fused_linear`: what deployed linear layers compute, on the CPU in one call for a few tokens.

On the CPU the operator is the native extension's (`csrc/bindings.cpp`), because a call has to cost microseconds; of
more tokens than `plan.few_tokens` says it makes torch's matrix products, for which quantized weights are made plain in
that call. On a GPU it is `triton.py`'s, or `cuda.py`'s where that was measured to be faster, and for more tokens than
they take `prefill.py`'s. Here are the names of its arguments' values, what it is to torch's compiler, where it pays.

    fused_linear(x, tensors, spec, mode) -> y

x: `[..., in_features]`, float32, bfloat16 or float16. mode: `CONCATENATE`, the outputs of all layers side by side, of
siblings that share their input; `SWIGLU`, `silu(first) ⊙ second` of two layers; `GATED_MLP`, a third layer of that.
spec: for each layer its form, a bit 1 if it has an `s` and 2 if it has a bias, and for each of its matrices (one if
`DENSE`, else two) kind, columns and group. tensors: for each layer its matrices' (weight, then scales and zeros of
quantized ones, see `ops.quantize`), then of a pivoted one `place` int32 `[out]`, at which output each pivot and then
each other row is; then `s` float32 `[rank]`, then the bias.

Of few tokens both products of a layer run in one parallel region of torch's threads with a barrier between them, as do
all siblings. Sums are in float32, there in one order for each instruction set, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import extension

DENSE, FACTORS, PIVOTED = range(3)
PLAIN, INT8, INT4, INT4_ZEROS, FP8 = range(5)
CONCATENATE, SWIGLU, GATED_MLP = range(3)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor) -> bool:
    """Whether the operator is there and runs on `x`."""
    return extension.module is not None and x.device.type == "cpu" and x.dtype in DTYPES


def matrix_rows(tensors: Sequence[Any], spec: list[int]) -> list[list[int]]:
    """The rows of each layer's matrices, which `spec` does not tell."""
    found, i, t = [], 0, 0
    while i < len(spec):
        form, flags = spec[i], spec[i + 1]
        i += 2
        rows = []
        for _ in range(1 if form == DENSE else 2):
            rows.append(tensors[t].shape[0])
            i, t = i + 3, t + (1, 2, 2, 3, 2)[spec[i]]
        t += (form == PIVOTED) + (flags & 1) + (flags >> 1)
        found.append(rows)
    return found


def _outputs(tensors: Sequence[Any], spec: list[int]) -> tuple[list[int], int]:
    """The output widths of all layers, and a token's number of multiplications. Of tensors, the shapes suffice."""
    outputs, multiplications, i = [], 0, 0
    for rows in matrix_rows(tensors, spec):
        outputs.append(sum(rows) if spec[i] == PIVOTED else rows[-1])
        i += 2
        for n in rows:
            multiplications += n * spec[i + 1]
            i += 3
    return outputs, multiplications


def _fake(x, tensors, spec, mode):
    outputs, _ = _outputs(tensors, spec)
    width = sum(outputs) if mode == CONCATENATE else outputs[0] if mode == SWIGLU else outputs[2]
    return x.new_empty((*x.shape[:-1], width))


class _Shape:
    def __init__(self, shape):
        self.shape = shape


def _flops(x_shape, tensor_shapes, spec, mode, *_, out_shape=None, **__) -> int:
    tokens = 1
    for size in x_shape[:-1]:
        tokens *= size
    return 2 * tokens * _outputs([_Shape(shape) for shape in tensor_shapes], spec)[1]


try:
    from . import triton
except ImportError:  # a machine without Triton
    triton = None  # type: ignore[assignment]  # a module, as far as annotations can say

if extension.module is not None or triton is not None:
    if extension.module is None:
        torch.library.define("acip::fused_linear", "(Tensor x, Tensor[] tensors, int[] spec, int mode) -> Tensor")
    if triton is not None:
        from . import measured

        torch.library.impl("acip::fused_linear", "CUDA", measured.forward)
    torch.library.register_fake("acip::fused_linear", _fake)
    register_flop_formula(torch.ops.acip.fused_linear)(_flops)
