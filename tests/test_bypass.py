"""What hangs on the children of a fused layer is honoured: with it, every output is that of `U(Vh(x))`.

The native operator reads weights instead of calling the modules that hold them. Whatever would be bypassed by that
turns it off; whatever would not leaves it on. Hooks, forwards and exchanged weights are in `test_prepared` too.
"""

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from acip_kernels import LowRankLinear, PivotLinear, fuse, materialize, save
from acip_kernels.nn import fused
from acip_kernels.ops import extension

accelerate = pytest.importorskip("accelerate")

OUT, IN, RANK = 24, 40, 8


def made(kind, dtype=torch.float32):
    torch.manual_seed(0)
    layer = kind(IN, OUT, RANK, dtype=dtype)
    nn.init.normal_(layer.U.bias if kind is LowRankLinear else layer.bias)
    return layer


@pytest.fixture(params=[LowRankLinear, PivotLinear])
def layer(request):
    return made(request.param)


@pytest.fixture
def x():
    return torch.randn(3, IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """How often the native operator ran."""
    seen = []
    original = fused.call

    def counted(layer, x, mode=0):
        y = original(layer, x, mode)
        if y is not None:
            seen.append(type(layer).__name__)
        return y

    monkeypatch.setattr(fused, "call", counted)
    return seen


def children_after_each_other(layer, x):
    """`U(Vh(x))`, or what it is in the pivoted form, by calling modules alone."""
    if isinstance(layer, LowRankLinear):
        return layer.U(layer.Vh(x))
    z = layer.P(x)
    return torch.cat([z, layer.C(z)], -1)[..., layer.orders()[0]] + layer.bias


@torch.no_grad()
def assert_same(layer, x, used, calls, expected=None):
    """`layer` computes what its children do, or `expected`; `used`: and by the native operator, where there is one."""
    expected = children_after_each_other(layer, x) if expected is None else expected
    for _ in range(2):  # the second call could go by what the first has found
        calls.clear()
        y = layer(x)
        bound = (IN + RANK) * torch.finfo(x.dtype).eps * max(1.0, float(expected.abs().max()))
        assert y.dtype == x.dtype and float((y - expected).abs().max()) <= bound
        assert bool(calls) == (used and extension.available())


# ---- other kinds of weights


class Scaled(torch.Tensor):
    """As quantized tensors of torchao are: a linear layer by it is computed by its own rule, from what it holds.

    Its own storage, which only who ignores the rule reads, is NaN.
    """

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes.float() * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize(), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{function} reads a Scaled as if it were a plain tensor")


def scaled(weight):
    scale = weight.detach().abs().max() / 127
    return nn.Parameter(Scaled((weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)


def test_a_tensor_subclass_computes_by_its_own_rule(layer, x, calls):
    assert_same(layer, x, True, calls)
    for child in layer.children():
        child.weight = scaled(child.weight)
        assert_same(layer, x, False, calls)


def test_weights_of_torchao(layer, x, calls):
    torchao = pytest.importorskip("torchao.quantization")
    assert_same(layer, x, True, calls)
    before = children_after_each_other(layer, x)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    assert all(type(child.weight) is not nn.Parameter for child in layer.children())
    assert_same(layer, x, False, calls)
    # A weight of about 0.2 is off by at most half of 1/127 of its row's largest.
    assert torch.allclose(layer(x), before, atol=0.3) and not torch.equal(layer(x), before)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    from torch import distributed

    if not distributed.is_available():
        pytest.skip("torch is built without distributed")
    store = distributed.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("which", ["first", "both"])
def test_dtensor_weights(layer, x, calls, mesh, which):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    assert_same(layer, x, True, calls)
    plain = layer(x).detach()
    distributed = distribute_tensor(x, mesh, [Replicate()])
    for child in list(layer.children())[: 1 if which == "first" else 2]:
        child.weight = nn.Parameter(distribute_tensor(child.weight.detach(), mesh, [Shard(0)]))
    if which == "first":  # DTensor refuses to be mixed with plain tensors: that is to be seen, not bypassed
        with torch.no_grad(), pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            layer(x)
        return
    holder = layer.U if isinstance(layer, LowRankLinear) else layer
    holder.bias = nn.Parameter(distribute_tensor(holder.bias.detach(), mesh, [Replicate()]))
    calls.clear()
    if isinstance(layer, PivotLinear):  # its order of outputs is a plain tensor
        with torch.no_grad(), pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            layer(distributed)
        return
    with torch.no_grad():
        y = layer(distributed)
    assert isinstance(y, DTensor) and not calls
    torch.testing.assert_close(y.full_tensor(), plain, rtol=0, atol=(IN + RANK) * 2**-23 * float(plain.abs().max()))


def test_fully_sharded_layers(x, mesh):
    from torch.distributed.fsdp import fully_shard

    for kind in (LowRankLinear, PivotLinear):
        layer = made(kind)
        expected = layer(x).detach()
        fully_shard(layer, mesh=mesh)
        for _ in range(2):
            with torch.no_grad():
                y = layer(x)
            torch.testing.assert_close(y, expected, rtol=0, atol=(IN + RANK) * 2**-23 * float(expected.abs().max()))


# ---- what is put on the modules


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrizations(layer, x, calls):
    assert_same(layer, x, True, calls)
    before = layer(x).detach()
    for child in layer.children():
        parametrize.register_parametrization(child, "weight", Doubled())
        assert_same(layer, x, False, calls)
    assert not torch.equal(layer(x), before)
    for child in layer.children():
        parametrize.remove_parametrizations(child, "weight", leave_parametrized=False)
    assert_same(layer, x, True, calls)


@pytest.mark.parametrize("merged", [False, True])
def test_lora_on_the_children(layer, x, calls, merged):
    peft = pytest.importorskip("peft")
    assert_same(layer, x, True, calls)
    before = layer(x).detach()
    model = peft.get_peft_model(nn.ModuleDict({"proj": layer}), peft.LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert_same(layer, x, False, calls)
    changed = layer(x).detach()
    # The adapter is no small thing: what was computed without it would not pass below.
    assert not torch.allclose(changed, before, atol=1e-2)
    layer = model.merge_and_unload()["proj"]
    assert_same(layer, x, True, calls)
    with torch.no_grad():
        # The same sums of float32 in another order: the adapters' products, once apart, are in the merged weights.
        torch.testing.assert_close(layer(x), changed, rtol=1e-4, atol=1e-4)


def test_hooks_of_every_kind_on_the_children(layer, x, calls):
    assert_same(layer, x, True, calls)
    for child in layer.children():
        for put_on in (
            lambda child: child.register_forward_hook(lambda module, args, output: 3 * output),
            lambda child: child.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
            lambda child: child.register_full_backward_hook(lambda module, given, made: None),
            lambda child: child.register_full_backward_pre_hook(lambda module, made: None),
        ):
            handle = put_on(child)
            assert_same(layer, x, False, calls)
            handle.remove()
            assert_same(layer, x, True, calls)


def test_weights_exchanged_in_every_way(layer, x, calls):
    assert_same(layer, x, True, calls)
    child = next(layer.children())
    other = torch.randn_like(child.weight)

    def by_data():
        child.weight.data = other.clone()

    def by_parameter():
        child.weight = nn.Parameter(2 * other)

    def by_state():
        layer.load_state_dict({n: 3 * t if t.is_floating_point() else t for n, t in layer.state_dict().items()})

    def by_assigned_state():
        state = {n: t.clone() / 2 if t.is_floating_point() else t for n, t in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)

    def by_swap():
        torch.utils.swap_tensors(child.weight, nn.Parameter(5 * other))

    def in_place():
        with torch.no_grad():
            child.weight.mul_(-1)

    for exchange in (by_data, by_parameter, by_state, by_assigned_state, by_swap, in_place):
        before = layer(x).detach()
        if exchange is by_swap:
            layer.prepared = None  # which refers to the weight weakly, and such tensors torch does not swap
        exchange()
        assert_same(layer, x, True, calls)
        assert not torch.equal(layer(x).detach(), before), exchange.__name__


# ---- accelerate


def test_offloaded_to_the_cpu(layer, x, calls):
    with torch.no_grad():
        expected = layer(x)  # which remembers its weights; and now they go
    accelerate.cpu_offload(layer, execution_device="cpu")
    assert all(child.weight.device.type == "meta" for child in layer.children())
    assert_same(layer, x, False, calls, expected)
    accelerate.hooks.remove_hook_from_submodules(layer)
    assert_same(layer, x, True, calls, expected)


def test_offloaded_to_the_disk(layer, x, calls, tmp_path):
    with torch.no_grad():
        expected = layer(x)
    accelerate.disk_offload(layer, tmp_path, execution_device="cpu")
    assert_same(layer, x, False, calls, expected)


def test_a_layer_whose_weights_come_and_go_with_it_is_fused(layer, x, calls):
    """As `preload_module_classes` has it: while the layer runs its weights are there, other tensors each time."""
    with torch.no_grad():
        expected = layer(x)
    accelerate.cpu_offload(layer, execution_device="cpu", preload_module_classes=[type(layer).__name__])
    assert_same(layer, x, True, calls, expected)
    assert all(child.weight.device.type == "meta" for child in layer.children())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("offload") / "model"
    save(materialize(toys.toy_result(toys.llama()), 0.6).eval(), path)
    return path


@pytest.mark.parametrize("fused_model", [False, True])
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_a_model_by_device_map(directory, tmp_path, place, fused_model):
    """Stock `from_pretrained`: parts of the model are on the disk, or loaded from the CPU when they are called."""
    expected = toys.logits(AutoModelForCausalLM.from_pretrained(directory))
    if place == "disk":
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
        placed = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
        model = AutoModelForCausalLM.from_pretrained(directory, device_map=placed, offload_folder=tmp_path / "off")
    else:
        model = accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(directory), execution_device="cpu")
    if fused_model and extension.available():
        fuse(model)
    for _ in range(2):
        toys.assert_close(toys.logits(model), expected)


def test_offloading_a_fused_model(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    if extension.available():
        fuse(model)
    expected = toys.logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    for _ in range(2):
        toys.assert_close(toys.logits(model), expected)
