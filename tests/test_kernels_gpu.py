"""`bench.kernels_gpu` without a GPU: what it would time computes what it should, and its tables say what they hold."""

import itertools

import pytest
import torch
from operators import error_bound

from acip_kernels.ops.fused_linear import op, reference
from acip_kernels.ops.timing import Timer
from bench import kernels_gpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("members", "activation"), [(((48, 64),), ""), (((64, 64), (16, 64), (16, 64)), ""), (((96, 64), (96, 64)), "silu")]
)
def test_every_variant_of_a_problem_computes_it(members, activation):
    problem = kernels_gpu.Problem("toy", "toy", members, activation, 0.5, 3)
    found = kernels_gpu.variants(problem, CPU, torch.float32, cache=1, compiled=False)
    assert [v.name for v in found] == ["dense", "two F.linear", *kernels_gpu.FORMATS]
    wide = members[0][0] if activation else sum(out for out, _ in members)
    for variant in found:
        made = [call() for call in variant.calls]
        assert len(made) == 2  # one byte of cache: a copy and another one
        for y in made:
            y = torch.cat(y, -1) if isinstance(y, list) else y
            assert y.shape == (3, wide) and y.isfinite().all()
    # Quantized ones read less, and all factors no more than half of the dense weights but for scales and order.
    sizes = {v.name: v.bytes for v in found}
    assert sizes["two F.linear"] <= sizes["dense"] / 2 and max(sizes["int4"], sizes["int8"]) < sizes["factors"]


@pytest.mark.parametrize("kind", kernels_gpu.FORMATS)
def test_deployed_layers_are_read_as_they_are_meant(kind):
    torch.manual_seed(0)
    tensors, spec = kernels_gpu.deployed(80, 64, 0.5, kind, CPU, torch.float32)
    x = torch.randn(2, 64)
    expected = reference.forward(x.double(), tensors, spec, op.CONCATENATE)
    # Of numbers of order one: sums of 64 and of rank terms, one after the other.
    magnitude = torch.full_like(expected, 64.0)
    y = kernels_gpu.kernels(x, tensors, spec, op.CONCATENATE)
    assert ((y.double() - expected).abs() <= error_bound(torch.float32, magnitude, roundings=3, sums=256)).all()


def test_torchs_products_are_those_of_the_group():
    torch.manual_seed(0)
    x = torch.randn(2, 8, dtype=torch.float64)
    pairs = [tuple(torch.randn(*shape, dtype=torch.float64) for shape in ((3, 8), (6, 3))) for _ in range(2)]
    pairs.append((torch.randn(3, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)))
    full = [U @ Vh for Vh, U in pairs]
    gated = torch.nn.functional.silu(x @ full[0].t()) * (x @ full[1].t())
    for activation, expected in (("silu", gated), ("mlp", gated @ full[2].t())):
        (made,) = kernels_gpu.apart(x, pairs, activation)
        torch.testing.assert_close(made, expected)
        last = full[2] if activation == "mlp" else None
        torch.testing.assert_close(kernels_gpu.dense(x, torch.cat(full[:2]), last, activation), expected)


def test_the_compositions_gradients_are_those_of_the_operator():
    composition, triton = kernels_gpu.training_variants(24, 32, 0.5, 20, CPU, torch.float32)
    for plain, ours in zip(composition.calls[0](), triton.calls[0](), strict=True):
        # Sums of 24 (∂x: 24 and then the rank) and of 20 tokens, of numbers of order one, over the mask's start.
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4 * float(plain.abs().max()))


def test_timing_goes_in_turns_and_rows_compare_like_with_like():
    order = []
    names = ("dense", "two F.linear", "factors")
    found = [kernels_gpu.Variant(n, 100 * (i + 1), [lambda n=n: order.append(n)] * 2) for i, n in enumerate(names)]
    times = Timer(CPU, eager=True).measure([variant.calls for variant in found], 3)
    assert [len(some) for some in times] == [3, 3, 3]
    assert order == list(itertools.chain(*([n, n] for n in names))) * 3
    for variant, seconds in zip(found, ([4.0, 8.0, 4.0], [2.0, 4.0, 2.0], [1.0, 1.0, 1.0]), strict=True):
        variant.seconds = seconds
    about = {"kind": "deployed", "model": "toy", "group": "o", "ratio": 0.5, "tokens": 1}
    rows = kernels_gpu.rows_of(found, about, rate=200.0)
    assert rows[2]["to_dense"] == 4.0 and rows[2]["to_two_linear"] == 2.0 and rows[2]["to_composition"] is None
    assert rows[2]["seconds"] == [1.0, 1.0, 1.0] and rows[2]["to_floor"] == pytest.approx(1 / 1.5)
    reached = {target["about"]: target for target in kernels_gpu.targets(rows)}
    assert reached["… speed over dense"]["met"] and reached["… speed over dense"]["found"] == 4.0
    unmeasured = [target for target in reached.values() if target["found"] is None]
    assert len(unmeasured) == 6 and "not measured" in kernels_gpu.targets_table(unmeasured)
    assert "1000000.0 (4.00x)" in kernels_gpu.table(rows)


def test_problems_are_those_of_real_models():
    found = kernels_gpu.problems()
    assert {p.model for p in found} == set(kernels_gpu.MODELS)
    qkv = next(p for p in found if p.group == "q/k/v" and p.model == "Llama-3.1-8B")
    assert qkv.members == ((4096, 4096), (1024, 4096), (1024, 4096))
    for ratio, pivoted in itertools.product(kernels_gpu.RATIOS, (False, True)):
        rank = kernels_gpu.rank_at(ratio, 14336, 4096, pivoted)
        stored = rank * (14336 + 4096 - (rank if pivoted else 0))
        assert rank % 64 == 0 and 0.95 * ratio < stored / (14336 * 4096) <= ratio


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so():
    import typer.testing

    app = typer.Typer()
    app.command()(kernels_gpu.main)
    result = typer.testing.CliRunner().invoke(app, [])
    assert result.exit_code != 0 and "there is no GPU" in result.output
