"""RMS norm, SwiGLU and rotations on a GPU, or in Triton's interpreter where there is none, against float64."""

import operators
import pytest
import test_rotary
import torch
from operators import assert_within, error_bound
from toys import VOCABULARY, llama

pytest.importorskip("triton")

from acip_kernels.models import training
from acip_kernels.ops.gated_silu import op as silu_op
from acip_kernels.ops.gated_silu import reference as silu_reference
from acip_kernels.ops.gated_silu.triton import GatedSilu
from acip_kernels.ops.rms_norm import op as norm_op
from acip_kernels.ops.rms_norm import reference as norm_reference
from acip_kernels.ops.rms_norm.triton import RmsNorm
from acip_kernels.ops.rotary.triton import Rotary

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter cuts bfloat16 off where a GPU rounds it: twice the error.
ROUNDINGS = 1 if GPU else 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def numbers(*shape, dtype, seed):
    return operators.numbers(torch.Generator().manual_seed(seed), *shape, dtype=dtype).to(DEVICE)


def gradients(function, leaves, g, *rest):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves, *rest)
    return y.detach(), *torch.autograd.grad(y, leaves, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 576), (2, 3, 1000), (1, 2048), (0, 7), (130,)], ids=str)
def test_rms_norm(shape, dtype):
    x, g = (numbers(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    if x.dim() > 1 and x.shape[0] > 1:
        x[1] *= EPS**0.5  # where it counts what eps is added to
    weight, width = numbers(shape[-1], dtype=dtype, seed=2), shape[-1]
    y, dx = gradients(RmsNorm.apply, [x], g, weight, EPS)
    exact = [t.double() for t in (x, weight, g)]
    exact_y, exact_dx = gradients(norm_reference.forward, [exact[0]], exact[2], exact[1], EPS)
    assert y.dtype == dx.dtype == dtype and y.shape == dx.shape == x.shape
    bound = error_bound(dtype, exact_y.abs(), roundings=2 * ROUNDINGS, sums=width + 8)
    assert_within(bound, y, exact_y, "y")
    root = (exact[0].square().mean(-1, keepdim=True) + EPS).rsqrt()
    h, n = (exact[1] * exact[2]).abs(), (exact[0] * root).abs()
    magnitude = root * (h + n * (n * h).mean(-1, keepdim=True))
    assert_within(error_bound(dtype, magnitude, roundings=ROUNDINGS, sums=4 * width + 30), dx, exact_dx, "dx")
    again = gradients(RmsNorm.apply, [x], g, weight, EPS)
    assert torch.equal(y, again[0]) and torch.equal(dx, again[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 5), (3, 576), (2, 5, 1000)], ids=str)
def test_gated_silu(shape, dtype):
    gate, up, g = (numbers(*shape, dtype=dtype, seed=seed) for seed in range(3))
    gate = gate * 5  # to where silu is the identity, and to where it is zero
    y, dgate, dup = gradients(GatedSilu.apply, [gate, up], g)
    exact = [t.double() for t in (gate, up, g)]
    exact_y, exact_dgate, exact_dup = gradients(silu_reference.forward, exact[:2], exact[2])
    x, scale, upstream = (t.abs() for t in exact)
    # The logistic function is within a few units, and 1 - it of one's.
    s, rest = exact[0].sigmoid(), torch.finfo(dtype).tiny
    assert_within(error_bound(dtype, exact_y.abs(), roundings=ROUNDINGS, sums=12) + rest, y, exact_y, "y")
    magnitude = upstream * scale * s * (1 + x)
    assert_within(error_bound(dtype, magnitude, roundings=ROUNDINGS, sums=16) + rest, dgate, exact_dgate, "dgate")
    magnitude = upstream * x * s
    assert_within(error_bound(dtype, magnitude, roundings=ROUNDINGS, sums=12) + rest, dup, exact_dup, "dup")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*test_rotary.SHAPES, (2, 40, 3, 200)], ids=str)
def test_rotations(shape, dtype, shared):
    arguments = [tensor.to(DEVICE) for tensor in test_rotary.problem(*shape, dtype, shared=shared)]
    test_rotary.check(Rotary.apply, *arguments, roundings=ROUNDINGS)
    x, cos, sin, g = arguments
    other = x.transpose(1, 2).contiguous().transpose(1, 2), cos, sin, g.mT.contiguous().mT
    one, two = (test_rotary.run(Rotary.apply, *some) for some in (arguments, other))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert one[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_other_strides(dtype):
    wide = numbers(6, 40, dtype=dtype, seed=0)
    x, g = wide[::2, ::2], numbers(20, 3, dtype=dtype, seed=1).t()
    weight = numbers(40, dtype=dtype, seed=2)[::2]
    for function, leaves, rest in ((RmsNorm.apply, [x], (weight, EPS)), (GatedSilu.apply, [x, x], ())):
        strided = gradients(function, leaves, g, *rest)
        plain = gradients(
            function, [t.contiguous() for t in leaves], g.contiguous(),
            *(t.contiguous() if isinstance(t, torch.Tensor) else t for t in rest),
        )  # fmt: skip
        assert all(map(torch.equal, strided, plain))


def test_a_second_derivative_is_refused():
    x = numbers(3, 8, dtype=torch.float32, seed=0).requires_grad_()
    weight = numbers(8, dtype=torch.float32, seed=1)
    cos = numbers(1, 3, 8, dtype=torch.float32, seed=2)
    for y in (RmsNorm.apply(x, weight, EPS), GatedSilu.apply(x, x), Rotary.apply(x[None, None], cos, cos)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.skipif(GPU, reason="there is a GPU, which takes them by itself: below")
def test_a_model_trains_with_them(monkeypatch):
    """As on a GPU: norms and MLPs of a model take the kernels, interpreted, and give back their own."""
    calls = []
    for op, function in ((norm_op, RmsNorm), (silu_op, GatedSilu)):
        monkeypatch.setattr(op.extension, "takes", lambda x: False)
        monkeypatch.setattr(op.common, "on_gpu", lambda x: x.is_floating_point())
        name = op.OPERATOR

        def call(*arguments, function=function, name=name):
            calls.append(name)
            return function.apply(*arguments)

        monkeypatch.setattr(training, name, call)
    model = llama().requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))

    def loss():
        model.lm_head.weight.grad = None
        out = model(input_ids=ids, labels=ids).loss
        out.backward()
        return out.item(), model.lm_head.weight.grad.clone()

    expected = loss()
    own = training.use(model)
    calls.clear()
    actual = loss()
    assert calls.count("rms_norm") == 5 and calls.count("gated_silu") == 2
    # Sums in float32 one behind the other: of two layers' products (q, k, v, o, gate, up: 32 terms; down: 48), five
    # norms and the head of 32; the gradient adds 18 tokens besides, of either sign: hence of its largest number.
    bound = (2 * (6 * 32 + 48) + 6 * 32 + 18) * torch.finfo(torch.float32).eps
    assert actual[0] == pytest.approx(expected[0], rel=bound)
    assert (actual[1] - expected[1]).abs().max() <= bound * expected[1].abs().max()
    training.restore(model, own)
    calls.clear()
    assert loss()[0] == expected[0] and not calls


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_a_model_takes_them(dtype):
    model = llama().to(DEVICE, dtype).requires_grad_(False)
    own = training.use(model)
    replaced = [m for m in model.modules() if "forward" in m.__dict__]
    assert len(replaced) == 5 + 2
    training.restore(model, own)
    assert not any("forward" in m.__dict__ for m in model.modules())
