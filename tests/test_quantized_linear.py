"""`quantized_linear`, and `masked_svd_linear` of quantized factors, against float64; Triton's in its interpreter."""

import operators
import pytest
import torch
from operators import assert_identical, assert_within, error_bound, make_problem

from acip_kernels.ops import extension, masked_svd_linear
from acip_kernels.ops import quantize as q
from acip_kernels.ops.quantized_linear import op
from acip_kernels.ops.quantized_linear.op import quantized_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCHEMES = [q.Scheme("int8"), q.Scheme("fp8"), q.Scheme("int4", 32), q.Scheme("int4", 64, True)]
BACKENDS = [name for name in ("reference", "triton") if name in op.BACKENDS]
HALVES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True, params=["ours"])
def way(request, monkeypatch):
    """Whether Triton's products or torch's are taken, whatever the plan would choose for problems this small."""
    if "triton" in op.BACKENDS:
        from acip_kernels.ops import triton_products
        from acip_kernels.ops.fused_linear import prefill
        from acip_kernels.ops.quantized_linear import triton

        for module in (triton_products, prefill, triton):
            monkeypatch.setattr(module, "pays", lambda *_: request.param == "ours")
    return request.param


both_ways = pytest.mark.parametrize("way", ["ours", "vendor"], indirect=True)


def weight_of(scheme, rows, cols, seed=0):
    """A quantized weight on the device, and its values in float64."""
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) / cols**0.5
    found = q.quantize(matrix, **scheme.options)
    values = q.dequantize(*found, cols=cols, group=scheme.group, dtype=torch.float64)
    return q.Quantized(*(t if t is None else t.to(DEVICE) for t in found)), values


def roundings(dtype, backend):
    # The weight and the result; the interpreter cuts bfloat16 off where a GPU rounds it: twice as far.
    return 4 if dtype == torch.bfloat16 and backend == "triton" and DEVICE.type == "cpu" else 2


@both_ways
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_output_and_gradients_against_float64(scheme, dtype, backend, way):
    if backend != "triton" and way == "vendor":
        pytest.skip("of Triton's backend alone")
    group = scheme.group or 64
    for tokens, rows, cols in ((3, 17, 65), (40, 70, 100), (33, 130, 31)):
        weight, values = weight_of(scheme, rows, cols, tokens)
        generator = torch.Generator().manual_seed(1)
        x, g = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (cols, rows))
        bias = torch.randn(rows, generator=generator).to(dtype)
        leaves = x.to(DEVICE).requires_grad_(), bias.to(DEVICE).requires_grad_()
        y = quantized_linear(leaves[0], weight, leaves[1], group=group, backend=backend)
        dx, dbias = torch.autograd.grad(y, leaves, g.to(DEVICE))
        assert y.dtype == dx.dtype == dtype
        x, g, bias, w = x.double(), g.double(), bias.double(), values.abs()
        n = roundings(dtype, backend)
        limit = error_bound(dtype, x.abs() @ w.t() + bias.abs(), roundings=n + 1, sums=cols + 2)
        assert_within(limit, y.detach().cpu(), x @ values.t() + bias, f"y {tokens} {rows} {cols}")
        limit = error_bound(dtype, g.abs() @ w, roundings=n, sums=rows + 2)
        assert_within(limit, dx.cpu(), g @ values, f"x {tokens} {rows} {cols}")
        assert_within(error_bound(dtype, g.abs().sum(0), roundings=1, sums=tokens), dbias.cpu(), g.sum(0), "bias")


@both_ways
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_masked_product_of_quantized_factors(scheme, dtype, backend, way):
    if backend != "triton" and way == "vendor":
        pytest.skip("of Triton's backend alone")
    in_, out, rank, tokens, c = 66, 41, 35, 30, 0.1
    problem = make_problem((2, tokens // 2), in_, out, rank, dtype, bias=True)
    (Vh, exact_Vh), (U, exact_U) = weight_of(scheme, rank, in_, 1), weight_of(scheme, out, rank, 2)
    on = {name: getattr(problem, name).to(DEVICE) for name in ("x", "s", "mask", "bias", "g")}
    group = scheme.group or 64

    def run():
        x, mask = on["x"].clone().requires_grad_(), on["mask"].clone().requires_grad_()
        y = masked_svd_linear(x, Vh, U, on["s"], mask, on["bias"], mask_scale=c, group=group, backend=backend)
        return tuple(t.cpu() for t in (y.detach(), *torch.autograd.grad(y, (x, mask), on["g"])))

    found = run()
    assert_identical(run(), found)
    problem.Vh, problem.U = exact_Vh, exact_U  # for the bounds, which take magnitudes
    live = torch.where(problem.mask > 0, problem.s, 0)
    x, g, s = problem.x.double().flatten(0, 1), problem.g.double().flatten(0, 1), live.double()
    z, h = x @ exact_Vh.t(), g @ exact_U
    exact = ((z * s) @ exact_U.t() + problem.bias.double(), (h * s) @ exact_Vh, (z * h).sum(0) * s / c)
    X, G, V, W, s = x.abs(), g.abs(), exact_Vh.abs(), exact_U.abs(), s.abs()
    # Beside the plain operator's: both weights are rounded once each.
    n = roundings(dtype, backend) // 2
    y_limit = error_bound(
        dtype, (X @ V.t() * s) @ W.t() + problem.bias.double().abs(), roundings=6 * n, sums=in_ + rank + 8
    )
    x_limit = error_bound(dtype, (G @ W * s) @ V, roundings=5 * n, sums=out + rank + 8)
    m_limit = error_bound(dtype, ((X @ V.t()) * (G @ W)).sum(0) * s / c, roundings=4 * n, sums=in_ + out + tokens + 9)
    for name, actual, wanted, limit in zip("yxm", found, exact, (y_limit, x_limit, m_limit)):
        assert_within(limit.view(actual.shape), actual, wanted.view(actual.shape), name)
    assert not found[2][problem.mask <= 0].any()


def test_rows_of_a_longer_mask():
    problem = make_problem((5,), 20, 12, 8, torch.float32)
    (Vh, _), (U, _) = weight_of(SCHEMES[0], 8, 20), weight_of(SCHEMES[0], 12, 8)
    x, s, rows = problem.x.to(DEVICE), problem.s.to(DEVICE), torch.tensor([1, 3, 4, 7, 9, 10, 14, 15], device=DEVICE)
    mask = torch.full((16,), 0.02, device=DEVICE, requires_grad=True)
    y = masked_svd_linear(x, Vh, U, s, mask, rows=rows, backend=BACKENDS[-1])
    (gradient,) = torch.autograd.grad(y.sum(), mask)
    short = torch.full((8,), 0.02, device=DEVICE, requires_grad=True)
    y = masked_svd_linear(x, Vh, U, s, short, backend=BACKENDS[-1])
    (expected,) = torch.autograd.grad(y.sum(), short)
    assert torch.equal(gradient[rows], expected) and int((gradient != 0).sum()) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_checks_and_compiler(backend):
    (Vh, _), (U, _) = weight_of(SCHEMES[2], 9, 40), weight_of(SCHEMES[2], 12, 9)
    x = torch.randn(20, 40, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.acip.quantized_linear.default, (x, *Vh, None, 32, backend))
    z, S = torch.randn(20, 9, device=DEVICE, requires_grad=True), torch.rand(9, device=DEVICE)
    mask = torch.full((9,), 0.02, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.acip.masked_quantized_expand.default, (z, *U, S, mask, None, 0.02, 32, backend))

    def function(x, mask):
        return masked_svd_linear(x, Vh, U, S, mask, group=32, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(x, mask).sum(), (x, mask))
    assert_identical(torch.autograd.grad(compiled(x, mask).sum(), (x, mask)), expected)
    torch.compiler.reset()


def test_automatic_takes_native_kernels_for_integers_alone():
    if not extension.available() or DEVICE.type != "cpu":
        pytest.skip("of CPUs with the native extension")
    x = torch.randn(3, 40)
    for scheme in SCHEMES:
        weight, _ = weight_of(scheme, 12, 40)
        group = scheme.group or 64
        y = quantized_linear(x, weight, group=group)
        named = "reference" if scheme.kind == "fp8" else "native"
        assert torch.equal(y, quantized_linear(x, weight, group=group, backend=named))
        if scheme.kind == "fp8":
            with pytest.raises(RuntimeError, match="native kernels take int8 and int4, and this weight is fp8"):
                quantized_linear(x, weight, backend="native")


def test_what_does_not_fit_is_named():
    weight, _ = weight_of(q.Scheme("int4"), 12, 70)
    x = torch.randn(3, 70, device=DEVICE)
    for arguments, options, error, message in (
        ((x, x), {}, TypeError, "weight must be what ops.quantize.quantize makes, got Tensor"),
        ((x[:, :60], weight), {}, ValueError, r"qweight must be torch.uint8 \[12, 32\] for 60 columns"),
        ((x, weight), {"group": 32}, ValueError, r"scales must be torch.bfloat16 \[12, 3\]"),
        ((x, weight), {"group": 7}, ValueError, "one of 32, 64, 128, got 7"),
        ((x.int(), weight), {}, TypeError, "x must be floating point"),
        ((x, weight, x[0, :5]), {}, ValueError, r"bias must be torch.float32 \[12\], got torch.float32 \[5\]"),
        ((x, weight), {"backend": "cuda"}, RuntimeError, "'cuda' is not available"),
    ):
        with pytest.raises(error, match=message):
            quantized_linear(*arguments, **options)
    (Vh, _), (U, _) = weight_of(SCHEMES[0], 9, 70), weight_of(SCHEMES[0], 12, 9)
    S = mask = torch.ones(9, device=DEVICE)
    adapter = op.common  # anything
    for change, message in (
        ({"adapter": adapter}, "neither an adapter"),
        ({"save_z": False}, "nor save_z=False"),
        ({"mask_scale": 0.0}, "mask_scale must be positive"),
        ({"S": S[:5]}, r"S must be torch.float32 \[9\], got torch.float32 \[5\]"),
        ({"S": S.clone().requires_grad_()}, "S and bias are frozen"),
        ({"bias": S}, r"bias must be torch.float32 \[12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_svd_linear(**({"x": x, "Vh": Vh, "U": U, "S": S, "mask": mask} | change))
    with pytest.raises(TypeError, match="U must be what ops.quantize"):
        masked_svd_linear(x, Vh, torch.ones(12, 9), S, mask)


one_thread = operators.one_thread  # a fixture of every test here
