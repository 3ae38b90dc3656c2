"""SVDLinear and LowRankLinear: what they compute, what may hang on them, what stays in float32."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acip_kernels import LowRankLinear, SVDLinear
from acip_kernels.nn import lowrank_linear as lowrank_module
from acip_kernels.nn.svd_linear import svd


def make_linear(out=12, in_=20, bias=True, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Linear(in_, out, bias, dtype=dtype)


def make_svd(out=12, in_=20, adapter_rank=3, dtype=torch.float64, **options):
    layer = SVDLinear.from_linear(make_linear(out, in_, dtype=dtype), adapter_rank=adapter_rank, **options)
    if adapter_rank:
        nn.init.normal_(layer.lora_B)
    return layer


def prune(layer, count):
    """Prune `count` entries, spread over the spectrum."""
    live = torch.ones(layer.full_rank, dtype=torch.bool)
    live[torch.linspace(0, layer.full_rank - 1, count).long()] = False
    layer.set_live(live)
    return live


# ---- SVDLinear


@pytest.mark.parametrize(("out", "in_"), [(12, 20), (20, 12), (7, 7), (1, 9), (9, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_computes_what_the_linear_did(out, in_, bias):
    linear = make_linear(out, in_, bias)
    layer = SVDLinear.from_linear(linear, adapter_rank=2)
    x = torch.randn(3, 4, in_, dtype=torch.float64)
    # Sums of so many terms, and an SVD's own error, of 1e-16 times a modest factor each.
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=1e-13 * (in_ + out))
    assert layer.full_rank == min(out, in_)
    assert torch.equal(layer.mask.detach(), torch.full((layer.full_rank,), 0.02, dtype=torch.float64))


def test_forward_and_gradients_are_those_of_the_formula():
    """ACIP.md section 1 by autograd on a plain composition; the mask by hand, through a continuous β."""
    layer = make_svd(adapter_alpha=6.0).eval()
    live = prune(layer, 4)
    layer.uncompact()
    x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 12, dtype=torch.float64)
    layer(x).backward(g)

    beta = live.double().requires_grad_(True)
    A, B, x2 = (t.detach().clone().requires_grad_(True) for t in (layer.lora_A, layer.lora_B, x))
    y = ((x2 @ layer.Vh.t()) * layer.S * beta) @ layer.U.t() + layer.bias + 6.0 / 3 * (x2 @ A.t()) @ B.t()
    y.backward(g)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(layer(x), y, **close)
    torch.testing.assert_close(x.grad, x2.grad, **close)
    torch.testing.assert_close(layer.lora_A.grad, A.grad, **close)
    torch.testing.assert_close(layer.lora_B.grad, B.grad, **close)
    torch.testing.assert_close(layer.mask.grad, torch.where(live, beta.grad / 0.02, 0.0), **close)
    assert torch.count_nonzero(layer.mask.grad[~live]) == 0


@pytest.mark.parametrize("pruned", [0, 1, 7, 11, 12])
def test_compaction_leaves_output_and_gradients_as_they_are(pruned):
    results = []
    for compacted in (False, True):
        layer = make_svd().eval()
        if pruned:
            prune(layer, pruned)
        layer.compact() if compacted else layer.uncompact()
        x = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        y = layer(x)
        (y * y).sum().backward()
        assert layer.mask.grad.shape == (12,)
        results.append((y.detach(), x.grad, layer.mask.grad, layer.lora_A.grad, layer.lora_B.grad))
    assert layer.computed_rank == max(12 - pruned, 1)
    for plain, compact in zip(*results):
        torch.testing.assert_close(compact, plain, rtol=1e-12, atol=1e-11)


def test_an_entry_that_dies_after_compaction_is_masked():
    layer = make_svd(adapter_rank=0)
    prune(layer, 3)
    layer.compact()
    with torch.no_grad():
        dies = layer.live.nonzero()[1, 0]
        layer.mask[dies] = -0.1
    x = torch.randn(4, 20, dtype=torch.float64)
    before = layer(x)
    assert layer.compact() == 8
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    layer(x).sum().backward()
    assert layer.mask.grad[dies] == 0


def test_compacting_to_a_given_choice_keeps_it():
    layer = make_svd(adapter_rank=0)
    prune(layer, 5)
    keep = layer.live.clone()
    keep[0] = True  # dead, but still computed: as it was when a run was interrupted
    assert layer.compact(keep) == int(keep.sum()) == layer.computed_rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_and_scores_stay_in_float32(dtype):
    layer = make_svd(dtype=torch.float32)
    with torch.no_grad():
        layer.mask.add_(torch.rand(12) * 1e-6)
    expected = {name: getattr(layer, name).detach().clone() for name in ("mask", "scores", "S", "lora_A", "lora_B")}
    prune_after = copy.deepcopy(layer).to(dtype)
    for name, value in expected.items():
        assert torch.equal(getattr(prune_after, name), value), name
    assert prune_after.U.dtype == prune_after.Vh.dtype == prune_after.bias.dtype == dtype
    assert prune_after(torch.randn(3, 20, dtype=dtype)).dtype == dtype
    assert layer.double().mask.dtype == torch.float64


def test_state_survives_and_compaction_is_not_in_it():
    layer = make_svd()
    prune(layer, 6)
    assert set(layer.state_dict()) == {"U", "S", "Vh", "bias", "mask", "scores", "lora_A", "lora_B"}
    other = make_svd()
    prune(other, 2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 20, dtype=torch.float64)
    other.eval(), layer.eval()
    torch.testing.assert_close(other(x), layer(x), rtol=1e-12, atol=1e-12)
    assert other.computed_rank == 12
    moved = copy.deepcopy(layer).to("cpu", torch.float64)
    assert torch.equal(moved(x), layer(x))


def test_dropout_is_on_the_adapter_alone_and_only_in_training():
    layer = make_svd(adapter_dropout=0.5)
    x = torch.randn(4, 20, dtype=torch.float64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer(x), layer(x))


def test_effective_weight_is_the_layers_function():
    layer = make_svd().eval()
    prune(layer, 5)
    x = torch.randn(4, 20, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, layer.effective_weight(), layer.bias), layer(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("weight", [torch.zeros(6, 9), torch.ones(6, 9), torch.eye(9)[:6] * 1e-30])
def test_zero_and_rank_deficient_weights_decompose(weight):
    linear = nn.Linear(9, 6)
    linear.weight.data.copy_(weight)
    layer = SVDLinear.from_linear(linear)
    x = torch.randn(4, 9)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    assert all(bool(torch.isfinite(t).all()) for t in (layer.U, layer.S, layer.Vh))


def test_svd_has_the_dtypes_it_says_and_refuses_what_is_not_finite():
    U, S, Vh = svd(torch.randn(5, 8).bfloat16())
    assert (U.dtype, S.dtype, Vh.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    bad = torch.ones(3, 4)
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        svd(bad)
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        svd(torch.ones(3))
    # The sum of large finite numbers may overflow; that is no reason to refuse them.
    assert bool(torch.isfinite(svd(torch.full((3, 4), 2e38).tril())[1]).any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"U": torch.ones(4, 3)}, "SVDLinear: U must be"),
        ({"S": torch.ones(2, 2)}, "SVDLinear: U must be"),
        ({"bias": torch.ones(3)}, "bias must be"),
        ({"mask_scale": 0.0}, "mask_scale"),
        ({"adapter_rank": -1}, "adapter_rank"),
        ({"adapter_dropout": 1.5}, "adapter_dropout"),
    ],
)
def test_svd_linear_names_the_bad_argument(change, message):
    arguments = {"U": torch.ones(4, 2), "S": torch.ones(2), "Vh": torch.ones(2, 5)} | change
    with pytest.raises(ValueError, match=message):
        SVDLinear(**arguments)
    with pytest.raises(TypeError, match="nn.Linear"):
        SVDLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="live must be bool"):
        make_svd().set_live(torch.ones(12))


# ---- LowRankLinear


def make_lowrank(rank=5, bias=True, dtype=torch.float64, backend="auto"):
    torch.manual_seed(2)
    layer = LowRankLinear(20, 12, rank, bias, dtype=dtype, backend=backend)
    if bias:
        nn.init.normal_(layer.U.bias)
    return layer


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rank", [0, 1, 5, 12])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product_of_its_factors(rank, bias, backend):
    layer = make_lowrank(rank, bias, backend=backend)
    x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    expected = F.linear(x, layer.U.weight @ layer.Vh.weight, layer.U.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.effective_weight(), layer.U.weight @ layer.Vh.weight, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    exact = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    for one, other in zip(gradients, exact):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_its_state_is_two_linear_layers_and_an_empty_weight():
    state = make_lowrank().state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {
        "weight": [0],
        "Vh.weight": [5, 20],
        "U.weight": [12, 5],
        "U.bias": [12],
    }
    # What takes this layer for a dense one must stumble over the empty weight.
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(20, 12).load_state_dict(state, strict=False)


def fuses(layer, x):
    """Whether the forward ran the operator, which the module looks up by its name in its file."""
    calls = []
    original = lowrank_module.lowrank_linear
    lowrank_module.lowrank_linear = lambda *a, **k: calls.append(1) or original(*a, **k)
    try:
        layer(x)
    finally:
        lowrank_module.lowrank_linear = original
    return bool(calls)


class MyLinear(nn.Linear):
    pass


def hang_on_hook(layer):
    layer.U.register_forward_hook(lambda module, args, output: output + 1)


def hang_on_pre_hook(layer):
    layer.Vh.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hang_on_backward_hook(layer):
    layer.Vh.register_full_backward_hook(lambda module, grads, _: grads)


def hang_on_forward(layer):
    layer.U.forward = lambda z: F.linear(z, layer.U.weight) * 3


def hang_on_subclass(layer):
    layer.Vh.__class__ = MyLinear


def hang_on_adapter(layer):
    layer.Vh = nn.Sequential(layer.Vh, nn.Linear(5, 5, dtype=torch.float64))


def hang_on_parametrization(layer):
    nn.utils.parametrizations.weight_norm(layer.U)


def hang_on_tensor_subclass(layer):
    class Mine(torch.Tensor):
        pass

    layer.U.weight = nn.Parameter(layer.U.weight.detach().as_subclass(Mine))


@pytest.mark.parametrize(
    "hang",
    [
        hang_on_hook,
        hang_on_pre_hook,
        hang_on_backward_hook,
        hang_on_forward,
        hang_on_subclass,
        hang_on_adapter,
        hang_on_parametrization,
        hang_on_tensor_subclass,
    ],
)
def test_what_hangs_on_a_child_is_honoured(hang):
    layer, x = make_lowrank(backend="reference"), torch.randn(4, 20, dtype=torch.float64)
    assert fuses(layer, x)
    hang(layer)
    assert not fuses(layer, x)
    torch.testing.assert_close(layer(x), layer.U(layer.Vh(x)), rtol=0, atol=0)


def test_fusing_comes_back_when_the_hook_goes():
    layer, x = make_lowrank(backend="reference"), torch.randn(4, 20, dtype=torch.float64)
    handle = layer.U.register_forward_hook(lambda *_: None)
    assert not fuses(layer, x)
    handle.remove()
    assert fuses(layer, x)
    anywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not fuses(layer, x)
    anywhere.remove()
    assert fuses(layer, x)


def test_a_backend_asked_for_by_name_runs_or_raises():
    x = torch.randn(4, 20, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'cuda' is not available"):
        make_lowrank(backend="cuda")(x)
    assert not fuses(make_lowrank(backend="auto"), x)


def test_export_sees_two_linear_layers():
    layer = make_lowrank(backend="reference", dtype=torch.float32)
    program = torch.export.export(layer, (torch.randn(2, 20),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.linear.default", "aten.linear.default"]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_compiles_whole(backend):
    layer = make_lowrank(backend=backend)
    x = torch.randn(4, 20, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)


def test_svd_linear_compiles_whole_and_trains():
    layer = make_svd()
    prune(layer, 4)
    x = torch.randn(4, 20, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    gradient, layer.mask.grad = layer.mask.grad, None
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient, layer.mask.grad, rtol=1e-11, atol=1e-11)


def test_modules_copy_and_serialize():
    for layer in (make_lowrank(), make_svd()):
        x = torch.randn(3, 20, dtype=torch.float64)
        layer.eval()
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        fresh = make_lowrank() if isinstance(layer, LowRankLinear) else make_svd()
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(fresh.eval()(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4, 2), "in_features"), ((4, -1, 2), "out_features"), ((4, 4, -1), "rank"), ((4, 4, 1.5), "rank")],
)
def test_lowrank_linear_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        LowRankLinear(*arguments)
    with pytest.raises(ValueError, match="Vh must be"):
        LowRankLinear.from_factors(torch.ones(3, 4), torch.ones(5, 2))
    with pytest.raises(ValueError, match="bias must be"):
        LowRankLinear.from_factors(torch.ones(3, 4), torch.ones(5, 3), torch.ones(4))
