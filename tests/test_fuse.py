"""fuse(model): the same outputs, everything else as before, and undone by unfuse."""

import copy

import pytest
import torch
import toys
from torch import nn
from transformers import AutoModelForCausalLM

import acip_kernels
from acip_kernels import LowRankLinear, PivotLinear, fuse, materialize, unfuse
from acip_kernels.models.fuse import is_fused
from acip_kernels.nn import fused
from acip_kernels.ops import extension

pytestmark = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")


def small(make=toys.llama, **options):
    """A materialized toy model with layers of several forms, float32."""
    return materialize(toys.toy_result(make()), 0.7, **options).eval()


@pytest.fixture
def calls(monkeypatch):
    """How often the native operator runs, by mode."""
    seen = []
    original = fused.call

    def counted(layer, x, mode=0):
        y = original(layer, x, mode)
        if y is not None:
            seen.append(mode)
        return y

    monkeypatch.setattr(fused, "call", counted)
    return seen


@pytest.mark.parametrize("make", [toys.llama, toys.qwen2, toys.gemma3])
@pytest.mark.parametrize("forms", [("dense", "factors"), ("dense", "pivoted")], ids=str)
def test_outputs_are_those_of_the_unfused_model(calls, make, forms):
    model = small(make, forms=forms)
    with torch.enable_grad():  # nothing is fused, not even within a layer
        expected = model(toys.token_ids()).logits.detach()
    assert not calls
    with torch.no_grad():
        toys.assert_close(model(toys.token_ids()).logits, expected)
        within = len(calls)
        assert within > 0 and set(calls) == {0}
        assert fuse(model) is model and is_fused(model)
        calls.clear()
        toys.assert_close(model(toys.token_ids()).logits, expected)
    layers = model.config.num_hidden_layers
    gated = make is not toys.gemma3  # whose MLP has another activation
    # The siblings, o (if it is no dense layer), and the MLP or its layers; and the head.
    assert calls.count(2) == (layers if gated else 0)
    assert len(calls) < within + 1


def test_training_and_hooks_take_the_ordinary_path(calls):
    model = fuse(small())
    ids = toys.token_ids()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert not calls
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        seen = []
        handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *a: seen.append("k"))
        model(ids)
        assert seen == ["k"]  # and its siblings computed their own
        handle.remove()
        mlp = model.model.layers[0].mlp
        child = next(module for module in mlp.modules() if type(module) is nn.Linear)
        handle = child.register_forward_hook(lambda *a: seen.append("mlp"))
        model(ids)
        assert "mlp" in seen
        handle.remove()


def test_many_tokens_are_computed_in_groups_too(calls):
    ids = toys.token_ids(4, 60)  # more than the kernels are for
    model = small(forms=("dense", "pivoted"))
    with torch.enable_grad():
        expected = model(ids).logits.detach()
    with torch.no_grad():
        assert not calls
        toys.assert_close(fuse(model)(ids).logits, expected)
        assert calls.count(2) == model.config.num_hidden_layers


def test_generation_caches_copies_and_saving(tmp_path):
    model = small()
    prompt = toys.token_ids(1, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **options)
    keys = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model.generate(prompt, **options), before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(prompt).logits.any()  # its own layers, not the original's
        assert model(prompt).logits.any()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not is_fused(loaded)
    assert torch.equal(loaded.generate(prompt, **options), before)
    acip_kernels.save(small(), tmp_path / "again")
    assert is_fused(acip_kernels.load(tmp_path / "again", fuse=True))
    unfuse(model)
    assert not is_fused(model)
    assert torch.equal(model.generate(prompt, **options), before)


def test_a_compiled_model_is_the_same(calls):
    torch.compiler.reset()
    model = fuse(small())
    with torch.no_grad():
        expected = model(toys.token_ids(1, 6)).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        toys.assert_close(compiled(toys.token_ids(1, 6)).logits, expected)
    torch.compiler.reset()


def test_new_weights_are_used_at_once():
    model = fuse(small())
    ids = toys.token_ids(1, 4)
    with torch.no_grad():
        before = model(ids).logits
        layer = next(m for m in model.modules() if isinstance(m, LowRankLinear | PivotLinear))
        first = layer.Vh if isinstance(layer, LowRankLinear) else layer.P
        first.weight = nn.Parameter(first.weight * 2)
        assert not torch.equal(model(ids).logits, before)
        model.bfloat16()
        assert model(ids).logits.dtype == torch.bfloat16


def test_siblings_called_alone_or_with_other_inputs_compute_their_own():
    model = fuse(small())
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(1, 2, 32), torch.randn(1, 2, 32)
    with torch.no_grad():
        alone = attention.k_proj(x)
        attention.q_proj(other)
        assert torch.equal(attention.k_proj(x), alone)
        assert torch.equal(attention.v_proj(other), attention.v_proj(other))


def test_without_the_extension_it_says_so(monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "missing", "not built: why")
    with pytest.raises(RuntimeError, match="not built: why"):
        fuse(small())


def test_what_is_put_in_the_place_of_a_fused_layer_is_called(calls):
    """As adapters are: in the attention, in the MLP, and another activation."""
    ids = toys.token_ids()
    model = fuse(small())
    with torch.no_grad():
        model(ids)
    block = model.model.layers[0]

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    for change in (
        lambda: setattr(block.mlp, "up_proj", Doubled(block.mlp.up_proj)),
        lambda: setattr(block.self_attn, "k_proj", Doubled(block.self_attn.k_proj)),
        lambda: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.Tanh()),
    ):
        with torch.no_grad():
            before = model(ids).logits
        change()
        with torch.enable_grad():
            expected = model(ids).logits.detach()
        with torch.no_grad():
            after = model(ids).logits
        toys.assert_close(after, expected)
        # The change is seen: far above rounding, which is 1e-6 here.
        assert not torch.allclose(after, before, atol=1e-3)
