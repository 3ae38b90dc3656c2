"""Which layers are factorized, how decompositions are kept, and the basis that knows the inputs."""

import logging
import sys

import pytest
import torch
import toys
from torch import nn

from acip_kernels import SVDLinear, compress, factorize, materialize, score_by_singular_values
from acip_kernels.compress import basis
from acip_kernels.compress.basis import input_covariances, whitened_svd
from acip_kernels.compress.config import CompressionConfig
from acip_kernels.compress.factorize import cached_svd
from acip_kernels.models.targets import choose_targets, linear_layers
from acip_kernels.nn.svd_linear import svd, svd_by_square


def test_all_linear_layers_but_the_head():
    for make, count in ((toys.llama, 14), (toys.qwen2, 14), (toys.gpt2, 8), (toys.gemma3, 14)):
        model = make()
        ids = toys.token_ids()
        before = model(ids).logits
        names = factorize(model)
        assert len(names) == count
        assert "lm_head" not in names
        assert {name for name, module in model.named_modules() if isinstance(module, SVDLinear)} == set(names)
        # Every product is rounded anew in float32, in all layers one after another.
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="factorized already"):
            factorize(model)


def test_a_layer_used_in_two_places_is_replaced_in_both():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared))
    assert factorize(model) == ["0"]
    assert isinstance(model[0], SVDLinear) and model[0] is model[1][1]
    with pytest.raises(ValueError, match="SVDLinear.from_linear"):
        factorize(shared)


def test_targets_by_name_by_end_by_expression_and_without_some():
    names = list(linear_layers(toys.llama())[0])
    assert choose_targets(names) == names
    assert choose_targets(names, ["q_proj"]) == [name for name in names if name.endswith("q_proj")]
    assert choose_targets(names, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert choose_targets(names, r".*layers\.0\..*") == names[:7]
    assert choose_targets(names, exclude=["q_proj", "k_proj"]) == [
        name for name in names if name[-6] not in "qk" or "proj" not in name
    ]
    with pytest.raises(ValueError, match="no linear layer is named 'w_proj'; there are q_proj"):
        choose_targets(names, ["w_proj"])
    with pytest.raises(ValueError, match="means no linear layer"):
        choose_targets(names, "nothing")


def test_what_cannot_be_factorized_is_named_in_one_line(caplog):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(2, 4, 4))

    class Quantized(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Quantized(4, 4), Experts())
    with caplog.at_level(logging.WARNING, "acip_kernels"):
        assert factorize(model) == ["0"]
    (record,) = caplog.records
    assert "1 (Quantized)" in record.message
    assert "2.gate_up (Experts, packed experts)" in record.message


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed():
    model = toys.llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        factorize(model)
    assert not any(isinstance(module, SVDLinear) for module in model.modules())


def test_decompositions_are_kept_and_read_back(tmp_path, monkeypatch):
    first = toys.llama()
    factorize(first, svd_cache=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 14
    monkeypatch.setattr(sys.modules[cached_svd.__module__], "svd", lambda weight: pytest.fail("decomposed again"))
    second = toys.llama()
    done = []
    factorize(second, svd_cache=tmp_path, progress=lambda *counts: done.append(counts))
    assert done == [(number, 14) for number in range(1, 15)]
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items()):
        assert torch.equal(a, b), name
    # Other dtypes and other weights are other decompositions.
    weight = torch.randn(4, 6)
    monkeypatch.undo()
    cached_svd(weight, tmp_path)
    cached_svd(weight.bfloat16(), tmp_path)
    cached_svd(weight.reshape(6, 4), tmp_path)
    cached_svd(weight, tmp_path, torch.eye(6, dtype=torch.float64))
    assert len(list(tmp_path.iterdir())) == 18


def test_a_broken_or_unwritable_cache_costs_only_time(tmp_path, monkeypatch, caplog):
    weight = torch.randn(4, 6)
    expected = cached_svd(weight, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    for one, other in zip(cached_svd(weight, tmp_path), expected):
        assert torch.equal(one, other)
    assert "decomposing anew" in caplog.text
    monkeypatch.setattr("acip_kernels.files.write_tensors", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    cached_svd(torch.randn(3, 3), tmp_path)
    assert "not kept: disk full" in caplog.text


def test_adapters_depend_on_the_seed_alone():
    models = [toys.llama() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2)):
        factorize(model, seed=seed)
    a, b, c = (model.model.layers[0].mlp.up_proj.lora_A for model in models)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_plain_svd_keeps_the_largest_singular_values():
    model = toys.llama()
    factorize(model, adapter_rank=0)
    score_by_singular_values(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    cut = materialize(model, 0.5)
    kept = [
        layer.S[: cut.get_submodule(name).rank]
        for name, layer in layers.items()
        if hasattr(cut.get_submodule(name), "rank")
    ]
    gone = [layer.S[len(part) :] for layer, part in zip(layers.values(), kept)]
    assert len(kept) == len(layers)
    assert torch.cat(kept).min() >= torch.cat(gone).max()


# ---- the basis of the activations


def make_inputs(tokens=400, in_=24, rank=24):
    torch.manual_seed(5)
    return torch.randn(tokens, rank, dtype=torch.float64) @ torch.randn(rank, in_, dtype=torch.float64)


@pytest.mark.parametrize("out", [10, 24, 40])
def test_whitening_leaves_the_weight_and_makes_truncation_optimal(out):
    x = make_inputs()
    weight = torch.randn(out, 24, dtype=torch.float64)
    covariance = x.t() @ x / len(x)
    U, S, Vh = whitened_svd(weight, covariance)
    # In float64, times the condition of the covariance's root, some thousands.
    torch.testing.assert_close((U * S) @ Vh, weight, rtol=1e-10, atol=1e-10)
    exact, plain = x @ weight.t(), torch.linalg.svd(weight, full_matrices=False)
    # Eckart-Young on the outputs themselves: no matrix of this rank comes closer.
    best = torch.linalg.svdvals(exact)
    for rank in (1, 4, 9):
        error = float((x @ (((U * S)[:, :rank] @ Vh[:rank]) - weight).t()).square().sum())
        assert error == pytest.approx(float(best[rank:].square().sum()), rel=1e-3)
        assert error == pytest.approx(float(len(x) * S[rank:].square().sum()), rel=1e-3)
        of_plain = (plain.U * plain.S)[:, :rank] @ plain.Vh[:rank]
        assert error < (x @ (of_plain - weight).t()).square().sum()


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_covariances_of_any_rank_work(rank):
    x = make_inputs(rank=rank) if rank else torch.zeros(3, 24, dtype=torch.float64)
    weight = torch.randn(10, 24, dtype=torch.float64)
    U, S, Vh = whitened_svd(weight, x.t() @ x / len(x))
    # In float64, but times the condition of the damped covariance, which a low rank makes large.
    torch.testing.assert_close((U * S) @ Vh, weight, rtol=1e-6, atol=1e-6)


def test_a_covariance_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="covariance of a layer's inputs"):
        whitened_svd(torch.randn(3, 4), torch.full((4, 4), torch.nan))


@pytest.mark.parametrize("rows", [192, 5])
def test_covariances_are_those_of_the_layers_inputs(rows, monkeypatch):
    monkeypatch.setattr(basis, "_MOMENT_ROWS", rows)
    model = toys.llama().double()
    names = list(linear_layers(model)[0])
    batches = [{"input_ids": toys.token_ids(seed=seed)} for seed in (1, 2)]
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0]))
        for name in names
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    covariances = input_covariances(model, names, batches)
    assert list(covariances) == names
    for name in names:
        x = torch.cat([one.flatten(0, -2) for one in seen[name]])
        # The products are taken in float32.
        torch.testing.assert_close(covariances[name], x.t() @ x / len(x), rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_run_in_the_basis_of_the_activations(tmp_path):
    batches = [{"input_ids": toys.token_ids(seed=seed)} for seed in range(4)]
    config = CompressionConfig.short(4, 0.5, adapter_rank=2, basis="activations", calibration_batches=6, tune_steps=0)
    result = compress(toys.llama(), batches, config, progress=False)
    assert result.size_ratio <= 0.5
    with pytest.raises(ValueError, match="compact: factors that were trained, or decomposed by what the activations"):
        result.save(tmp_path / "x", compact=True, base_model="base")


MATRICES = {
    "tall": lambda: torch.randn(30, 20),
    "wide": lambda: torch.randn(20, 30),
    "of a low rank": lambda: torch.randn(20, 3) @ torch.randn(3, 25),
    "graded": lambda: _orthonormal(20) * torch.logspace(0, -12, 20) @ _orthonormal(20),
    "of zeros": lambda: torch.zeros(4, 6),
    "a column": lambda: torch.randn(5, 1),
    "tiny": lambda: 1e-25 * torch.randn(6, 8),
    "large": lambda: 1e25 * torch.randn(6, 8),
}


def _orthonormal(n):
    return torch.linalg.qr(torch.randn(n, n))[0]


@pytest.mark.parametrize("kind", MATRICES)
def test_the_svd_by_the_square_is_one_to_float32s_precision(kind):
    torch.manual_seed(0)
    weight = MATRICES[kind]()
    U, S, Vh = svd_by_square(weight)
    k, norm, eps = min(weight.shape), torch.linalg.matrix_norm(weight.double(), 2), torch.finfo(torch.float32).eps
    # What is dropped and three roundings, and the rounding to float32 of an orthonormal factor's k columns or rows.
    assert torch.linalg.matrix_norm(U.double() * S.double() @ Vh.double() - weight.double(), 2) <= 4 * eps * norm
    for gram in (U.double().t() @ U.double(), Vh.double() @ Vh.double().t()):
        assert torch.linalg.matrix_norm(gram - torch.eye(k, dtype=torch.float64), 2) <= 2 * eps * k**0.5
    assert (S - torch.linalg.svdvals(weight.double())).abs().max() <= 2 * eps * norm
    assert bool((S >= 0).all()) and bool((S[:-1] >= S[1:]).all())
    assert [factor.dtype for factor in (U, S, Vh)] == [torch.float32] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_gpus_svd_is_as_exact(dtype):
    weight = torch.randn(200, 300, dtype=torch.float64).to("cuda", dtype)
    U, S, Vh = (factor.double() for factor in svd(weight))
    error = torch.linalg.matrix_norm(U * S @ Vh - weight.double(), 2)
    assert error <= 4 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(weight.double(), 2)
