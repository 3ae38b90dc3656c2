"""`bench.kernels_gpu` without a GPU: what it would time computes what it should, and its tables say what they hold."""

import itertools

import pytest
import torch
from operators import error_bound

from acip_kernels.ops.fused_linear import op, reference
from acip_kernels.ops.timing import Timer
from bench import kernels_gpu

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where there is none, in Triton's interpreter


@pytest.mark.parametrize(
    ("members", "activation"), [(((48, 64),), ""), (((64, 64), (16, 64), (16, 64)), ""), (((96, 64), (96, 64)), "silu")]
)
def test_every_variant_of_a_problem_computes_it(members, activation):
    problem = kernels_gpu.Problem("toy", "toy", members, activation, 0.5, 3)
    found = kernels_gpu.variants(problem, DEVICE, torch.float32, cache=1)
    found = [v for v in found if "CUDA" not in v.name]  # which are there where they were built
    assert [v.name for v in found] == ["dense", "two F.linear", *kernels_gpu.FORMATS]
    assert not any(v.error for v in found)
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
    tensors, spec = kernels_gpu.deployed(80, 64, 0.5, kind, DEVICE, torch.float32)
    x = torch.randn(2, 64, device=DEVICE)
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
    composition, *others = kernels_gpu.training_variants(24, 32, 0.5, 20, DEVICE, torch.float32)
    assert [variant.name for variant in others] == ["Triton", "Triton, ours", "Triton, vendor"]
    for variant in others:
        for plain, ours in zip(composition.calls[0](), variant.calls[0](), strict=True):
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
    assert len(unmeasured) == len(reached) - 3 and "not measured" in kernels_gpu.targets_table(unmeasured)
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


def test_every_problem_and_the_most_important_first():
    found = kernels_gpu.problems()
    plain = [p for p in found if not p.what]
    groups = {"q/k/v", "o", "gate/up", "MLP", "block", "down", "k"}
    for model, group, ratio, tokens in itertools.product(
        kernels_gpu.MODELS, groups, kernels_gpu.RATIOS, (1, 4, 16, 64, 512, 4096)
    ):
        about = (model, group, ratio, tokens)
        assert sum((p.model, p.group, p.ratio, p.tokens) == about and p.activation != "masked" for p in plain) == 1
    first = [p for p in found if p.model == "Llama-3.1-8B"][:9]
    assert {p.group for p in first[:7]} == groups and all((p.ratio, p.tokens) == (0.5, 1) for p in first[:7])
    assert all((p.activation, p.tokens) == ("masked", 4096) for p in first[7:])
    assert {p.what for p in found} == {"", "compiled", "forms"}
    assert len({tuple(p.about.values()) for p in found}) == len(found)


def rehearse(path, monkeypatch, cases, **options):
    torch.manual_seed(0)
    cases = [kernels_gpu.toy(case) for case in cases]
    arguments = {"rounds": 1, "eager_rounds": 1, "minutes": float("inf"), "resume": False} | options
    return kernels_gpu.bench(cases, DEVICE, path, **arguments)


def of(group, tokens, what="", ratio=0.5, kind="deployed"):
    wanted = {"kind": kind, "model": "Llama-3.1-8B", "group": group, "ratio": ratio, "tokens": tokens, "what": what}
    return next(problem for problem in kernels_gpu.problems() if problem.about == wanted)


def test_a_rehearsal_of_every_kind_of_case(tmp_path, monkeypatch):
    """All of it but the GPU: toy sizes, in Triton's interpreter; and torch's compiler only as far as it is called."""
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    cases = [
        of("block", 1), of("block", 512), of("o", 1, "forms"), of("o", 512, "forms"), of("q/k/v", 1, "compiled"),
        of("block", 512, "compiled"), of("o", 512, kind="training"),
    ]  # fmt: skip
    result = rehearse(tmp_path / "result.json", monkeypatch, cases)
    assert not [row for row in result["rows"] if "error" in row]
    assert len(result["done"]) == len(cases) and result["left"] == 0
    names = {(row["group"], row["tokens"], row["what"], row["variant"]) for row in result["rows"]}
    for name in ("dense", "two F.linear", *kernels_gpu.FORMATS):
        assert ("block", 1, "", name) in names
    for name in ("factors", "pivoted, ours", "pivoted, vendor", "int4, ours", "fp8, vendor"):
        assert ("block", 20, "", name) in names
    assert ("o", 1, "forms", "dense int4") in names and ("o", 20, "forms", "pivoted fp8, ours") in names
    assert ("block", 20, "compiled", "two F.linear, compiled") in names
    assert all("eager" in row for row in result["rows"] if row["tokens"] == 1 and not row["what"])
    met = {target["about"]: target["found"] for target in result["targets"]}
    assert met["… whole decoder block: over the dense one"] is not None and met["… with int4"] is not None
    assert "failed" not in kernels_gpu.table(result["rows"])


def test_all_ways_to_compute_a_block_are_the_same_function():
    """Factors of full rank against the dense weight that they make."""
    torch.manual_seed(0)
    norm, kv = torch.ones(256), 128
    weights = [torch.randn(out, 256) / 16 for out in (256, 128, 128, 256, 384, 384)] + [torch.randn(256, 384) / 20]
    pairs = [(torch.eye(w.shape[1]), w) for w in weights]

    def apart(some, activation):
        return lambda x: kernels_gpu.apart(x, pairs[some], activation)

    def dense(some, activation):
        joined = torch.cat(weights[some][:2] if activation else weights[some])
        return lambda x: kernels_gpu.dense(x, joined, weights[6] if activation else None, activation)

    for tokens, cached in ((2, True), (5, False)):
        x = torch.randn(tokens, 256)
        made = []
        for which in (apart, dense):
            torch.manual_seed(1)
            cache = tuple(torch.randn(tokens, 1, 8, 128) for _ in range(2)) if cached else None
            parts = (which(slice(0, 3), ""), which(slice(3, 4), ""), which(slice(4, 7), "mlp"))
            made.append(kernels_gpu.block(x, norm, cache, kv, *parts))
        torch.testing.assert_close(*made)
        assert made[0].shape == (tokens, 256)


def test_what_fails_is_written_down_and_the_rest_goes_on(tmp_path, monkeypatch):
    original = kernels_gpu.kernels

    def breaks(x, tensors, spec, *rest):
        if spec[2] == op.INT4_ZEROS:
            raise RuntimeError("out of registers\nand more")
        return original(x, tensors, spec, *rest)

    monkeypatch.setattr(kernels_gpu, "kernels", breaks)
    path = tmp_path / "result.json"
    result = rehearse(path, monkeypatch, [of("down", 1), of("o", 1)])
    result["rows"] = [row for row in result["rows"] if "CUDA" not in row["variant"]]
    errors = [row for row in result["rows"] if "error" in row]
    assert [(row["variant"], row["error"]) for row in errors] == [("int4", "RuntimeError: out of registers")] * 2
    assert len([row for row in result["rows"] if "seconds" in row]) == 12
    assert "failed" in kernels_gpu.table(result["rows"]) and kernels_gpu.targets_table(result["targets"])
    # What is done is not done again; what is not begun in time is left.
    monkeypatch.setattr(kernels_gpu, "kernels", original)
    more = [of("down", 1), of("o", 1), of("k", 1)]
    again = rehearse(path, monkeypatch, more, resume=True, minutes=0.0)
    assert again["done"] == result["done"]
    again = rehearse(path, monkeypatch, more, resume=True)
    assert [about["group"] for about in again["done"]] == ["down", "o", "k"]
    assert kernels_gpu.files.read_json(path)["rows"] == again["rows"]


def test_a_lost_context_goes_on_in_a_new_process(tmp_path, monkeypatch):
    began = []

    def execv(program, arguments):
        began.append(arguments)
        raise SystemExit

    monkeypatch.setattr(kernels_gpu, "lost", lambda device: True)
    monkeypatch.setattr(kernels_gpu.os, "execv", execv)
    monkeypatch.setattr(kernels_gpu.sys, "argv", ["kernels_gpu.py", "--minutes", "3"])
    monkeypatch.setattr(kernels_gpu, "apart", lambda *_: 1 / 0)
    path = tmp_path / "result.json"
    with pytest.raises(SystemExit):
        rehearse(path, monkeypatch, [of("o", 1), of("k", 1)])
    assert began[0][1:] == ["-m", "bench.kernels_gpu", "--minutes", "3", "--resume"]
    stored = kernels_gpu.files.read_json(path)
    assert [about["group"] for about in stored["done"]] == ["o"]
    errors = {row["variant"]: row["error"] for row in stored["rows"]}
    assert errors["two F.linear"].startswith("ZeroDivisionError") and errors["factors"] == "not measured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so():
    import typer.testing

    app = typer.Typer()
    app.command()(kernels_gpu.main)
    result = typer.testing.CliRunner().invoke(app, [])
    assert result.exit_code != 0 and "there is no GPU" in result.output
