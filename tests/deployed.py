"""Random deployed layers, as `fused_linear` takes them, with what they are in float64 and how far rounding may go."""

import itertools

import operators
import torch
from operators import assert_within, error_bound

from acip_kernels.ops.fused_linear import op, reference

KINDS = {"plain": op.PLAIN, "int8": op.INT8, "int4": op.INT4, "int4 with zeros": op.INT4_ZEROS}
TRITON_KINDS = KINDS | {"fp8": op.FP8}


def arguments(layers):
    """The operator's tensors and spec of `layers`."""
    tensors, spec = [], []
    for layer in layers:
        tensors += layer.tensors
        spec += layer.spec
    return tensors, spec


def exact(x, layers, mode=op.CONCATENATE):
    return reference.forward(x.double(), *arguments(layers), mode)


class Matrix:
    """A random weight, its tensors and spec, and its values in float64."""

    def __init__(self, generator, rows, cols, kind, dtype, group=32):
        self.rows, self.cols = rows, cols
        four = kind in (op.INT4, op.INT4_ZEROS)
        self.spec = [kind, cols, group if four else 0]
        # The CPU's kernels of codes may round the inputs of a group to a power of two that makes the largest a whole
        # number of 15 bits, at most one off (128 / 255 of a unit, as a bfloat16 of all 8 bits is), or of 22.
        self.group = group if four else 128
        self.share, self.offset = 0.0, None
        if four or (kind == op.INT8 and dtype == torch.bfloat16):
            self.share = 2.0**-14 * 128 / 255 if dtype == torch.bfloat16 else 2.0**-22
        if kind == op.PLAIN:
            self.tensors = [operators.numbers(generator, rows, cols, dtype=dtype)]
            self.values = self.tensors[0].double()
            return
        if kind == op.INT8:
            codes = torch.randint(-127, 128, (rows, cols), generator=generator, dtype=torch.int8)
            scales = torch.rand(rows, generator=generator) / 127 + 1e-3
            self.tensors, self.values = [codes, scales], codes.double() * scales.double()[:, None]
            return
        if kind == op.FP8:
            # Every code but the two NaNs, each as likely.
            codes = torch.randint(0, 254, (rows, cols), generator=generator)
            codes = (codes + (codes >= 127)).to(torch.uint8).view(torch.float8_e4m3fn)
            scales = torch.rand(rows, generator=generator) / 448 + 1e-3
            self.tensors, self.values = [codes, scales], codes.double() * scales.double()[:, None]
            return
        groups, blocks = -(-cols // group), -(-cols // 64)
        codes = torch.randint(0, 16, (rows, blocks * 64), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(rows, groups, generator=generator) / 8 + 1e-2).bfloat16()
        zeros = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8)
        halves = codes.view(rows, blocks, 2, 32)
        packed = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, blocks * 32)
        self.tensors = [packed, scales] + ([zeros] if kind == op.INT4_ZEROS else [])
        zero = zeros.double() if kind == op.INT4_ZEROS else torch.full((rows, groups), 8.0, dtype=torch.float64)
        of = torch.arange(cols) // group
        # A code is multiplied as it is, and its zero: both in sums of float32, those of bfloat16 also with 16 more.
        self.offset = (62 if dtype == torch.bfloat16 else 30) * scales.double()[:, of]
        self.values = (codes[:, :cols].double() - zero[:, of]) * scales.double()[:, of]

    def shared(self, x):
        """How far outputs may be off by what codes of a group share, a unit of the inputs and a zero.

        x: float64, at most so large.
        """
        x, off = x.abs(), torch.zeros(*x.shape[:-1], self.rows, dtype=torch.float64)
        if self.share:
            parts = zip(x.split(self.group, -1), self.values.abs().split(self.group, -1), strict=True)
            off += self.share * sum(part.amax(-1, keepdim=True) * values.sum(-1) for part, values in parts)
        if self.offset is not None:
            off += error_bound(torch.float32, x @ self.offset.t(), roundings=0, sums=self.cols + 40)
        return off


class Layer:
    """ordered: pivots' outputs are in order, and the others' too, as `PivotLinear` has them; else anywhere."""

    def __init__(
        self, form, in_, out, rank, dtype, kind=op.PLAIN, *, s=False, bias=True, group=32, seed=0, ordered=False
    ):
        generator = torch.Generator().manual_seed(seed)
        self.out = out
        shapes = {
            op.DENSE: [(out, in_)],
            op.FACTORS: [(rank, in_), (out, rank)],
            op.PIVOTED: [(rank, in_), (out - rank, rank)],
        }[form]
        self.matrices = [Matrix(generator, *shape, kind, dtype, group) for shape in shapes]
        self.spec = [form, s + 2 * bias, *itertools.chain(*(m.spec for m in self.matrices))]
        self.tensors = [tensor for matrix in self.matrices for tensor in matrix.tensors]
        self.place = torch.randperm(out, generator=generator)
        if ordered:
            self.place = torch.cat([self.place[:rank].sort().values, self.place[rank:].sort().values])
        if form == op.PIVOTED:
            self.tensors.append(self.place.to(torch.int32))
        self.s = operators.numbers(generator, rank, dtype=torch.float32) if s else None
        self.bias = operators.numbers(generator, out, dtype=dtype) if bias else None
        self.tensors += [tensor for tensor in (self.s, self.bias) if tensor is not None]
        self.form = form

    def magnitude(self, x):
        """The sums of absolute values behind each output, float64."""
        z = self._first(x)
        y = z if self.form == op.DENSE else self._outputs(z, z @ self.matrices[1].values.abs().t())
        return y if self.bias is None else y + self.bias.double().abs()

    def shared(self, x):
        """How far each output may be off by what codes share."""
        x = x.double()
        z = self.matrices[0].shared(x)
        if self.s is not None:
            z = z * self.s.double().abs()
        if self.form == op.DENSE:
            return z
        through = z @ self.matrices[1].values.abs().t()
        return self._outputs(z, through + self.matrices[1].shared(self._first(x) + z))

    def _first(self, x):
        z = x.double().abs() @ self.matrices[0].values.abs().t()
        return z if self.s is None else z * self.s.double().abs()

    def _outputs(self, z, second):
        if self.form != op.PIVOTED:
            return second
        whole = torch.empty(*z.shape[:-1], self.out, dtype=torch.float64)
        whole[..., self.place] = torch.cat([z, second], -1)
        return whole

    @property
    def terms(self):
        return sum(matrix.cols for matrix in self.matrices)


def inputs(dtype, tokens, in_, seed=1):
    return operators.numbers(torch.Generator().manual_seed(seed), tokens, in_, dtype=dtype)


def bound(layer, x, dtype, roundings=3):
    # z, its product with the bias's sum and the output are rounded; scales, s and the lanes' sums besides the terms.
    return error_bound(dtype, layer.magnitude(x), roundings=roundings, sums=layer.terms + 40) + layer.shared(x)


def bounds(layers, x, dtype, roundings=3):
    return torch.cat([bound(layer, x, dtype, roundings) for layer in layers], -1)


MLP_FORMS = [(op.FACTORS,) * 3, (op.DENSE, op.FACTORS, op.DENSE), (op.PIVOTED, op.FACTORS, op.PIVOTED)]


def check_gated_mlp(fused, forms, dtype, tokens, roundings=3):
    """SwiGLU and a whole gated MLP by `fused(x, layers, mode)` against float64; returns the last call's arguments."""
    gate, up, down = (
        Layer(forms[0], 40, 66, 21, dtype, seed=1),
        Layer(forms[1], 40, 66, 35, dtype, op.INT8, seed=2),
        Layer(forms[2], 66, 40, 18, dtype, op.INT4, seed=3),
    )
    x = inputs(dtype, tokens, 40) / 8
    g, u = exact(x, [gate]), exact(x, [up])
    dg, du = bounds([gate], x, dtype, roundings), bounds([up], x, dtype, roundings)
    # silu's slope is at most 1.1 and |silu(g)| at most |g|.
    eps, small = 2 * torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    act = torch.nn.functional.silu(g) * u
    act_bound = 1.1 * dg * (u.abs() + du) + g.abs() * du + (eps + 20 * small) * (g.abs() + dg) * (u.abs() + du)
    assert_within(act_bound, fused(x, [gate, up], op.SWIGLU), exact(x, [gate, up], op.SWIGLU))
    arguments = x, [gate, up, down], op.GATED_MLP
    through = Layer(forms[2], 66, 40, 18, dtype, op.INT4, seed=3, bias=False).magnitude(act_bound)
    last = bound(down, act.abs() + act_bound, dtype, roundings)
    assert_within(through + last, fused(*arguments), exact(*arguments))
    return arguments
