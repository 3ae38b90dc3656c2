"""LoRA on low-rank layers through stock PEFT: training, files, and merging by concatenation of ranks."""

import copy
import subprocess
import sys

import pytest
import torch
import toys
from torch import nn
from transformers import AutoModelForCausalLM

from acip_kernels import LowRankLinear, PivotLinear, QuantizedLinear, fuse, load, materialize, save, unfuse
from acip_kernels.ops import extension

peft = pytest.importorskip("peft")

from acip_kernels.models.lora import LowRankLoraLinear, LowRankLoraModel, merge_lora  # noqa: E402

NAMED = ["q_proj", "v_proj", "up_proj", "down_proj"]
BATCH = {"input_ids": toys.token_ids(), "labels": toys.token_ids()}


def materialized(forms=("dense", "factors", "pivoted"), make=toys.llama, size_ratio=0.6, **options):
    return materialize(toys.toy_result(make()), size_ratio, forms=forms, **options).eval()


def adapted(model, targets=None, r=3, alpha=5, trained=True, **options):
    """`model` with an adapter that computes something."""
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets or [*NAMED, "proj"], **options)
    model = peft.get_peft_model(model, config).eval()
    if trained:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def wrapped(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLoraLinear)}


def layer(kind, dtype=torch.float64):
    torch.manual_seed(0)
    made = kind(20, 12, 5, dtype=dtype)
    nn.init.normal_(made.U.bias if kind is LowRankLinear else made.bias)
    return made


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.proj = layer

    def forward(self, x):
        return self.proj(x)


# ---- what the adapted layer computes


@pytest.mark.parametrize("kind", [LowRankLinear, PivotLinear])
@pytest.mark.parametrize("targets", [["proj"], "all-linear"])
def test_outputs_and_gradients_are_those_of_the_effective_weight(kind, targets):
    base = layer(kind)
    model = adapted(One(copy.deepcopy(base)), targets).train()
    x = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == (2 if targets == ["proj"] else 4) and all("lora_" in name for name in adapters)
    y = model(x)
    found = torch.autograd.grad(y.square().sum(), [x, *adapters.values()])

    def product(name):
        A, B = (next(p for n, p in adapters.items() if f"{name}.lora_{which}" in n) for which in "AB")
        return 5 / 3 * B @ A

    Vh, U = base.factors() if kind is PivotLinear else (base.Vh.weight, base.U.weight)
    if targets == ["proj"]:
        weight = U @ Vh + product("proj")
    elif kind is LowRankLinear:
        weight = (U + product("U")) @ (Vh + product("Vh"))
    else:
        P, C = base.P.weight + product("P"), base.C.weight + product("C")
        weight = torch.cat([P, C @ P])[base.orders()[0]]
    bias = base.bias if kind is PivotLinear else base.U.bias
    expected = x @ weight.t() + bias
    exact = torch.autograd.grad(expected.square().sum(), [x, *adapters.values()])
    for one, other in zip((y, *found), (expected, *exact), strict=True):
        # Sums of at most 20 + 12 + 5 + 3 + 7 terms behind each other, and the values are below 1e3.
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("kind", [LowRankLinear, PivotLinear])
def test_merging_concatenates_ranks_and_unmerging_is_exact(kind):
    base = layer(kind)
    model = adapted(One(base))
    x = torch.randn(2, 3, 20, dtype=torch.float64)
    expected, plain = model(x), base(x)
    lora, state = model.base_model.model.proj, {n: t.clone() for n, t in base.state_dict().items()}
    model.merge_adapter()
    assert lora.merged and isinstance(lora.base_layer, LowRankLinear) and lora.base_layer.rank == 8
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)
    Vh, U = base.factors() if kind is PivotLinear else (state["Vh.weight"], state["U.weight"])
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    assert torch.equal(lora.base_layer.Vh.weight, torch.cat([Vh, A]))
    assert torch.equal(lora.base_layer.U.weight, torch.cat([U, B * (5 / 3)], dim=1))
    # Disabled adapters unmerge by themselves, as in PEFT.
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert not lora.merged and lora.base_layer is base and base.rank == 5
    assert {n: torch.equal(t, state[n]) for n, t in base.state_dict().items()} == dict.fromkeys(state, True)
    model.merge_adapter(safe_merge=True)
    merged = model.merge_and_unload()
    assert type(merged.proj) is LowRankLinear
    torch.testing.assert_close(merged(x), expected, rtol=1e-13, atol=1e-13)
    # As PEFT leaves every layer.
    assert not any(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("kind", [LowRankLinear, PivotLinear])
def test_several_adapters_merge_one_after_the_other(kind):
    base = layer(kind)
    model = adapted(One(base))
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules=["proj"]))
    nn.init.normal_(model.base_model.model.proj.lora_B["other"].weight)
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(4, 20, dtype=torch.float64)
    expected, plain = model(x), base(x)
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])
    assert model.base_model.model.proj.base_layer.rank == 10
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)
    model.half()
    model.double()
    model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model.proj.base_layer(x), plain, rtol=1e-2, atol=1e-2)
    assert type(model.unload().proj) is kind


def test_bfloat16_merges_within_its_rounding():
    base = layer(LowRankLinear, torch.bfloat16)
    model = adapted(One(base))  # whose adapters PEFT keeps in float32
    x = torch.randn(6, 20)
    expected = model.double()(x.double())
    bfloat16 = model.bfloat16().merge_and_unload()
    assert {t.dtype for t in bfloat16.state_dict().values()} == {torch.bfloat16}
    y = bfloat16(x.bfloat16()).double()
    # Inputs, weights, the ranks' sums and the output are rounded once each, by 2^-9.
    Vh, U = bfloat16.proj.Vh.weight.double().abs(), bfloat16.proj.U.weight.double().abs()
    bound = 5 * 2**-9 * (x.double().abs() @ Vh.t() @ U.t() + bfloat16.proj.U.bias.double().abs())
    assert bool(((y - expected).abs() <= bound).all())


# ---- models


@pytest.mark.parametrize("make", [toys.llama, toys.gpt2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("targets", ["named", "all-linear"])
def test_a_model_trains_saves_loads_and_merges(make, targets, tmp_path):
    names = {"named": NAMED if make is toys.llama else ["c_attn", "c_fc", "c_proj"]}.get(targets, targets)
    save(materialized(make=make), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = toys.logits(base)
    options = {"fan_in_fan_out": True} if make is toys.gpt2 and targets == "named" else {}
    model = adapted(base, names, trained=False, **options)
    toys.assert_close(toys.logits(model), plain)
    assert bool(wrapped(model)) == (targets == "named")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    trained = toys.logits(model)

    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(toys.logits(again), trained)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(toys.logits(by_transformers.eval()), trained)
    by_auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(toys.logits(by_auto.eval()), trained)

    merged = model.merge_and_unload()
    toys.assert_close(toys.logits(merged), trained)
    save(merged, tmp_path / "merged")
    toys.assert_close(toys.logits(load(tmp_path / "merged")), trained)
    toys.assert_close(toys.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), trained)


def test_a_merged_models_config_says_what_it_is(tmp_path):
    base = materialized()
    old = copy.deepcopy(base.config.quantization_config)
    stored = sum(t.numel() for t in base.state_dict().values())
    weights = sum(t.numel() for n, t in base.state_dict().items() if "proj" in n)
    dense = sum(t.numel() for n, t in toys.llama().state_dict().items() if "proj" in n)
    assert old["factorized"] == pytest.approx(weights / dense)
    merged = adapted(base).merge_and_unload()
    merged.save_pretrained(tmp_path)
    new = merged.config.quantization_config
    ranks = {n: m.rank for n, m in merged.named_modules() if isinstance(m, LowRankLinear | PivotLinear)}
    assert new["ranks"] == ranks != old["ranks"]
    assert all(isinstance(merged.get_submodule(name), PivotLinear) for name in new["pivoted"])
    now = sum(t.numel() for n, t in merged.state_dict().items() if "proj" in n)
    assert new["factorized"] == pytest.approx(now / dense)
    assert new["stored"] / old["stored"] == pytest.approx((stored + now - weights) / stored)
    assert load(tmp_path).config.quantization_config.ranks == ranks
    # Adapters that are on the layers are saved by themselves: the config stays as it is.
    again = materialized()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=NAMED), again)
    again.hf_quantizer.get_state_dict_and_metadata(again)
    assert again.config.quantization_config == old


def test_ranks_beyond_full_rank_load_again(tmp_path):
    merged = adapted(materialized(size_ratio=0.9), r=24).merge_and_unload()
    assert any(m.rank > min(m.in_features, m.out_features) for m in merged.modules() if isinstance(m, LowRankLinear))
    save(merged, tmp_path / "merged")
    assert torch.equal(toys.logits(load(tmp_path / "merged")), toys.logits(merged))


@pytest.mark.parametrize("forms", [("dense", "factors"), ("dense", "pivoted")], ids=str)
@pytest.mark.parametrize("batches", [None, [BATCH]], ids=["weights", "outputs"])
def test_truncation_goes_back_to_the_ranks_with_the_least_error(forms, batches):
    base = materialized(forms).double()
    ranks = {n: (type(m), m.rank) for n, m in base.named_modules() if isinstance(m, LowRankLinear | PivotLinear)}
    model = adapted(base)
    names = [name for name, module in base.named_modules() if isinstance(module, LowRankLoraLinear)]
    whole = copy.deepcopy(model).merge_and_unload()
    small = merge_lora(model, truncate=True, batches=batches)
    found = {n: (type(m), m.rank) for n, m in small.named_modules() if isinstance(m, LowRankLinear | PivotLinear)}
    assert found == ranks and names
    inputs = {}
    for name in names:
        whole.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0].detach().flatten(0, -2)})
        )
    whole(**BATCH)
    for name in names:
        W, rank = whole.get_submodule(name).effective_weight(), ranks[name][1]
        metric = torch.eye(W.shape[1], dtype=W.dtype) if batches is None else inputs[name].t()
        best = torch.linalg.svdvals(W @ metric)[rank:].square().sum().sqrt()
        error = (W - small.get_submodule(name).effective_weight()) @ metric
        # What the covariance is damped by is a hundred-thousandth; it is summed in float32.
        assert float(error.norm()) <= float(best) * (1 + (1e-10 if batches is None else 1e-2)) + 1e-10


def test_quantized_layers_take_adapters_and_refuse_to_merge():
    base = materialized(("dense", "factors"), size_ratio=0.95, quantize="int8")
    plain = toys.logits(base)
    names = [n for n, m in base.named_modules() if isinstance(m, LowRankLinear | PivotLinear)]
    dense = [n for n, m in base.named_modules() if isinstance(m, QuantizedLinear) and n.rpartition(".")[0] not in names]
    assert names and dense
    model = adapted(base, names + dense, trained=False)
    assert len(wrapped(model)) == len(names + dense)
    toys.assert_close(toys.logits(model), plain)
    first = float(model(**BATCH).loss.detach())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(8):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(model(**BATCH).loss) < first
    before = toys.logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: merge_lora(model)):
        with pytest.raises(ValueError, match="not merged into quantized weights"):
            merge()
    assert torch.equal(toys.logits(model), before)
    assert torch.equal(toys.logits(model.unload()), plain)


@pytest.mark.skipif(not extension.available(), reason="the native extension is not built")
@pytest.mark.parametrize("forms", [("dense", "factors"), ("dense", "pivoted")], ids=str)
def test_a_fused_model_sees_adapters_come_and_go(forms):
    base = fuse(materialized(forms))
    plain = toys.logits(base)
    model = adapted(base)
    changed = toys.logits(model)
    with torch.enable_grad():
        toys.assert_close(model(toys.token_ids()).logits.detach(), changed)
    assert not torch.allclose(changed, plain, atol=1e-2)
    model.merge_adapter()
    toys.assert_close(toys.logits(model), changed)
    model.unmerge_adapter()
    toys.assert_close(toys.logits(model), changed)
    with model.disable_adapter():
        toys.assert_close(toys.logits(model), plain)
    merged = model.merge_and_unload()
    toys.assert_close(toys.logits(merged), changed)
    toys.assert_close(toys.logits(fuse(unfuse(merged))), changed)


# ---- how PEFT comes to know the layers


def test_peft_may_be_imported_last(tmp_path):
    save(materialized(), tmp_path / "base")
    program = """if True:
        import sys
        import acip_kernels
        from transformers import AutoModelForCausalLM
        assert "peft" not in sys.modules
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "LowRankLoraLinear"
    """
    subprocess.run([sys.executable, "-c", program, tmp_path / "base"], check=True, timeout=120)


def test_importing_again_changes_nothing():
    import importlib

    from acip_kernels.models import lora

    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] is LowRankLoraModel
    assert importlib.import_module(lora.__name__) is lora
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA] is LowRankLoraModel
    # For every other layer it is PEFT's own.
    model = adapted(One(nn.Linear(4, 4)), ["proj"])
    assert type(model.base_model.model.proj) is peft.tuners.lora.Linear
    assert isinstance(model.base_model, peft.LoraModel)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "LowRankLinear takes plain LoRA alone"),
        ({"init_lora_weights": "pissa"}, "'pissa' decomposes a dense weight"),
        ({"init_lora_weights": "olora"}, "'olora' decomposes a dense weight"),
        ({"r": 0}, "positive integer"),
    ],
)
def test_what_a_low_rank_layer_cannot_take_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        adapted(One(layer(LowRankLinear)), ["proj"], **options)


@pytest.mark.parametrize("kind", [LowRankLinear, PivotLinear])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_needs_a_dense_weight_works_on_the_factors(kind, options):
    base = layer(kind, torch.float32)
    x = torch.randn(4, 20)
    with torch.no_grad():
        plain = base(x)
    model = adapted(One(base), "all-linear", trained=False, **options)
    torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    changed = model(x)
    assert not torch.allclose(changed, plain, atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload()(x), changed, rtol=1e-4, atol=1e-4)


def hook_a_child(base):
    next(base.children()).register_forward_hook(lambda *_: None)


def parametrize_a_child(base):
    nn.utils.parametrizations.weight_norm(next(base.children()))


def offload(base):
    from accelerate import cpu_offload

    cpu_offload(base, execution_device="cpu")


@pytest.mark.parametrize("hang", [hook_a_child, parametrize_a_child, offload])
@pytest.mark.parametrize("kind", [LowRankLinear, PivotLinear])
def test_merging_refuses_layers_that_carry_something(kind, hang):
    base = layer(kind)
    model = adapted(One(base))
    hang(base)
    x = torch.randn(3, 20, dtype=torch.float64)
    before = model(x)
    with pytest.raises(ValueError, match="merges into two plain nn.Linear|merging makes another layer"):
        model.merge_and_unload()
    assert torch.equal(model(x), before)


def test_safe_merging_refuses_what_is_not_finite():
    base = layer(LowRankLinear)
    model = adapted(One(base))
    nn.init.constant_(model.base_model.model.proj.lora_A["default"].weight, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_and_unload(safe_merge=True)
    assert base.rank == 5
    with pytest.raises(ValueError, match="holds NaN"):
        merge_lora(model, safe_merge=True)


def test_mistakes_are_named():
    with pytest.raises(TypeError, match="takes a peft.PeftModel, got One"):
        merge_lora(One(layer(LowRankLinear)))
    with pytest.raises(ValueError, match="say truncate=True"):
        merge_lora(adapted(One(layer(LowRankLinear))), batches=[BATCH])


@pytest.mark.parametrize("targets", [["proj"], "all-linear"])
def test_layers_of_rank_zero_take_adapters(targets):
    base = LowRankLinear(20, 12, 0, dtype=torch.float64)
    model = adapted(One(base), targets)
    x = torch.randn(3, 20, dtype=torch.float64)
    expected = model(x)
    assert bool(expected.any()) == (targets == ["proj"])
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-13, atol=1e-13)
