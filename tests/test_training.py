"""Norms and gated MLPs of a model that is trained: what gets our kernels, what stays, and that it trains as before."""

import copy
import pickle

import operators
import pytest
import torch
import toys
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from acip_kernels import CompressionConfig, NestedConfig, compress
from acip_kernels.models import training
from acip_kernels.ops import common, extension

one_thread = operators.one_thread  # a fixture of every test here
pytestmark = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")

# Norms and MLPs that get our kernels.
EXPECTED = {"llama": (5, 2), "qwen2": (5, 2), "qwen3": (9, 2), "gemma3": (0, 0), "gpt2": (0, 0)}
BOUND = toys.TERMS * torch.finfo(torch.float32).eps


def frozen(name):
    """A toy whose norms are frozen, with weights that are not one; everything else learns, and nothing drops out."""
    model = getattr(toys, name)()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in key)
        if "norm" in key:
            parameter.data += operators.numbers(generator, *parameter.shape, dtype=parameter.dtype) / 4
    return model


def installed(model):
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    return tuple(sum(isinstance(f, kind) for f in forwards) for kind in (training._NormForward, training._MlpForward))


def loss_and_gradients(model, ids=None, call=None):
    ids = toys.token_ids() if ids is None else ids
    model.zero_grad()
    loss = (model if call is None else call)(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_alike(actual, expected):
    """As in test_causal_attention."""
    assert actual[0] == pytest.approx(expected[0], rel=BOUND)
    largest = max(float(gradient.abs().max()) for gradient in expected[1])
    assert all(float((a - b).abs().max()) <= 4 * BOUND * largest for a, b in zip(actual[1], expected[1], strict=True))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_trains_with_them_as_with_its_own_and_gets_these_back(name):
    model = frozen(name)
    expected = loss_and_gradients(model)
    own = training.use(model)
    assert own == "sdpa" and installed(model) == EXPECTED[name]
    assert_alike(loss_and_gradients(model), expected)
    training.restore(model, own)
    assert not any("forward" in module.__dict__ for module in model.modules())
    after = loss_and_gradients(model)
    assert after[0] == expected[0] and all(map(torch.equal, after[1], expected[1]))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_in_bfloat16_too(monkeypatch, name):
    monkeypatch.setattr(training, "multiplies_natively", lambda dtype: True)
    model = frozen(name).bfloat16()
    training.use(model)
    assert installed(model) == EXPECTED[name]
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), training._NormForward):
            x = operators.numbers(generator, 3, 5, len(module.weight), dtype=torch.bfloat16)
            own = type(module).forward(module, x)
            # The normalised x may be rounded to a neighbour, and then the product.
            bound = 2 * torch.finfo(torch.bfloat16).eps * own.abs()
            assert ((module(x) - own).abs() <= bound).all()
    assert torch.isfinite(torch.tensor(loss_and_gradients(model)[0]))


def test_some_steps_of_training_have_the_losses_of_the_models_own():
    def losses(use):
        model = frozen("llama")
        if use:
            training.use(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for seed in range(4):
            found.append(loss_and_gradients(model, toys.token_ids(seed=seed))[0])
            optimizer.step()
        return found

    own, ours = losses(False), losses(True)
    assert own[-1] != own[0]
    # The rounding of every step before is in the weights.
    for step, (one, other) in enumerate(zip(ours, own, strict=True)):
        assert one == pytest.approx(other, rel=(1 + step) * BOUND)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_same(reentrant):
    model = frozen("llama")
    training.use(model)
    expected = loss_and_gradients(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = loss_and_gradients(model)
    assert actual[0] == expected[0] and all(map(torch.equal, actual[1], expected[1]))


def test_a_compiled_step_is_torchs_own(monkeypatch):
    model = frozen("llama")
    expected = loss_and_gradients(model)
    training.use(model)
    torch._dynamo.reset()
    calls = []
    for name in ("rms_norm", "gated_silu"):
        monkeypatch.setattr(training, name, lambda *a, **k: calls.append(a))
    assert_alike(loss_and_gradients(model, call=torch.compile(model, backend="aot_eager")), expected)
    assert not calls
    torch._dynamo.reset()


def test_copies_compute_by_their_own_modules_and_files_hold_nothing_of_it(tmp_path):
    model = frozen("llama")
    keys = list(model.state_dict())
    own = training.use(model)
    assert list(model.state_dict()) == keys
    expected = loss_and_gradients(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert installed(other) == EXPECTED["llama"]
        actual = loss_and_gradients(other)
        assert actual[0] == expected[0]
        with torch.no_grad():
            other.model.norm.weight.zero_()
        assert loss_and_gradients(other)[0] != expected[0] == loss_and_gradients(model)[0]
        training.restore(other, own)
        assert installed(other) == (0, 0) and installed(model) == EXPECTED["llama"]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert installed(loaded) == (0, 0) and list(loaded.state_dict()) == keys


@pytest.mark.parametrize(
    "config",
    [
        CompressionConfig.short(4, 0.6, adapter_rank=2, tune_steps=1),
        NestedConfig(steps=2, update_rank=2, warmup_steps=1),
        NestedConfig(steps=2, update_rank=2, warmup_steps=1, gradient_checkpointing=True),
    ],
    ids=["acip", "nested", "nested, checkpointed"],
)
def test_a_run_has_them_while_it_trains(config):
    model, seen = toys.llama(), []
    batches = [{"input_ids": toys.token_ids(seed=seed)} for seed in range(3)]
    compress(model, batches, config, progress=False, on_step=lambda row: seen.append(installed(model)))
    natively = common.multiplies_natively(next(model.parameters()).dtype)
    assert set(seen) == {EXPECTED["llama"] if natively else (0, 0)}
    assert installed(model) == (0, 0)


# ---- what stays as it is


class MeanRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class OutsideRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class OffsetRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * (1 + self.weight)


class FailingRMSNorm(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class LlamaNorm(LlamaRMSNorm):
    pass


def norm(kind=LlamaRMSNorm, width=16, dtype=torch.float32):
    module = kind(width).to(dtype).requires_grad_(False)
    module.weight.copy_(operators.numbers(torch.Generator().manual_seed(0), width, dtype=dtype))
    return module


def test_norms_of_other_formulas_stay_as_they_are():
    assert training.is_norm(norm()) and training.is_norm(norm(dtype=torch.bfloat16))
    assert training.is_norm(norm(lambda width: nn.RMSNorm(width, eps=1e-6)))
    for kind in (MeanRMSNorm, OutsideRMSNorm, OffsetRMSNorm, FailingRMSNorm, LlamaNorm):
        assert not training.is_norm(norm(kind)), kind
    # transformers' computes in float32 whatever comes in, and that is not what the kernel does with float64.
    assert not training.is_norm(norm(dtype=torch.float64))
    assert not training.is_norm(norm().half())
    hooked, own, learns = norm(), norm(), norm().requires_grad_()
    hooked.register_forward_hook(lambda *_: None)
    own.forward = lambda x: x
    assert not any(map(training.is_norm, (hooked, own, learns, nn.RMSNorm(16), norm().to("meta"))))


class ScaledMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0.5


class DroppingMLP(LlamaMLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(h, 0.5, self.training))


class LookingMLP(LlamaMLP):
    def forward(self, x):
        return nn.functional.linear(x, self.down_proj.weight @ self.up_proj.weight)


class SwappedMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def test_mlps_of_other_formulas_stay_as_they_are():
    config = toys.llama().config
    state = torch.get_rng_state()
    assert training.is_gated_mlp(LlamaMLP(config).eval())
    for kind in (ScaledMLP, DroppingMLP, LookingMLP, SwappedMLP):
        assert not training.is_gated_mlp(kind(config).eval()), kind
    gelu, more, hooked = (LlamaMLP(config) for _ in range(3))
    gelu.act_fn = ACT2FN["gelu"]
    more.dropout = nn.Dropout(0.5)
    hooked.act_fn.register_forward_hook(lambda *_: None)
    assert not any(map(training.is_gated_mlp, (gelu, more, hooked)))
    torch.set_rng_state(state)
    mlp = DroppingMLP(config)
    state = torch.get_rng_state()
    training.is_gated_mlp(mlp)
    assert torch.equal(torch.get_rng_state(), state)  # a run that is resumed draws the same


def test_what_is_called_otherwise_computes_as_before(monkeypatch):
    model = frozen("llama")
    training.use(model)
    calls = []
    for name in ("rms_norm", "gated_silu"):
        own = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *a, own=own: calls.append(a) or own(*a))
    module, mlp = model.model.norm, model.model.layers[0].mlp
    x = operators.numbers(torch.Generator().manual_seed(0), 2, 32, dtype=torch.float32)
    own, own_mlp = type(module).forward(module, x), type(mlp).forward(mlp, x)
    assert torch.equal(module(hidden_states=x), own) and torch.equal(mlp(x=x), own_mlp)
    module.weight.requires_grad_()
    assert torch.equal(module(x), own)
    module.weight.requires_grad_(False)
    assert torch.equal(module(x.double()), type(module).forward(module, x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16 and module(x).dtype == own.dtype
    mlp.act_fn.register_forward_hook(lambda *_: torch.zeros(()))
    assert torch.count_nonzero(mlp(x)) == 0
    assert not calls
    with torch.inference_mode():
        assert torch.allclose(module(x), own, rtol=BOUND)
    assert len(calls) == 1


def test_a_model_that_keeps_its_attention_keeps_the_rest():
    model = frozen("llama")
    model.set_attn_implementation("eager")
    assert training.use(model) is None and installed(model) == (0, 0)
    training.restore(model, None)
    assert model.config._attn_implementation == "eager"
