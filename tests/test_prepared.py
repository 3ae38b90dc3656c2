"""What a fused layer remembers of itself between two calls (`csrc/prepared.cpp`): used while it is true, not after."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from acip_kernels import LowRankLinear, PivotLinear
from acip_kernels.nn.quantized_linear import QuantizedLinear
from acip_kernels.ops import extension
from acip_kernels.plan import few_tokens

pytestmark = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")

OUT, IN, RANK = 24, 40, 8


def lowrank():
    return LowRankLinear(IN, OUT, RANK)


def pivoted():
    return PivotLinear(IN, OUT, RANK)


def quantized():
    return QuantizedLinear.from_linear(nn.Linear(IN, OUT), "int8")


LAYERS = {"lowrank": lowrank, "pivoted": pivoted, "quantized": quantized}


def made(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for key, parameter in layer.named_parameters():
        if key.endswith("bias"):  # which is zero in a new layer
            nn.init.normal_(parameter)
    return layer


@pytest.fixture(params=LAYERS)
def layer(request):
    return made(request.param)


@pytest.fixture
def x():
    return torch.randn(3, IN, generator=torch.Generator().manual_seed(1))


def plain(layer, x):
    """What the layer computes where the operator is not taken."""
    with torch.enable_grad():
        return layer(x).detach()


def assert_right(layer, x):
    with torch.no_grad():
        y = layer(x)
    eps = torch.finfo(x.dtype).eps
    expected = plain(layer, x)
    assert float((y - expected).abs().max()) <= (IN + RANK) * eps * max(1.0, float(expected.abs().max()))
    return y


def is_used(layer, x) -> bool:
    """Whether what was prepared answers for `x` as the layer is now."""
    with torch.no_grad():
        return layer.prepared is not None and layer.prepared(x) is not None


def test_it_is_made_by_the_first_call_and_used_by_the_next(layer, x):
    assert layer.prepared is None
    first = assert_right(layer, x)
    made = layer.prepared
    assert is_used(layer, x)
    assert torch.equal(assert_right(layer, x), first)
    assert layer.prepared is made


def replace_weight(layer):
    if isinstance(layer, QuantizedLinear):
        layer.qweight = torch.zeros_like(layer.qweight)
    else:
        child = next(layer.children())
        child.weight = nn.Parameter(torch.randn_like(child.weight))


def replace_child(layer):
    if isinstance(layer, LowRankLinear):  # of another rank, which two calls in between would not see
        layer.rank, layer.Vh, layer.U = 4, nn.Linear(IN, 4, bias=False), nn.Linear(4, OUT)
    elif isinstance(layer, PivotLinear):
        layer.C = nn.Linear(RANK, OUT - RANK, bias=False)
    else:
        layer.scales = layer.scales * 2


def other_bias(layer):
    holder = layer.U if isinstance(layer, LowRankLinear) else layer
    holder.bias = nn.Parameter(torch.randn(OUT))


def no_bias(layer):
    (layer.U if isinstance(layer, LowRankLinear) else layer).bias = None


def hook_on_a_child(layer):
    target = next(iter(layer.children()), layer)
    target.register_forward_hook(lambda module, args, output: output * 2)


def hook_before_a_child(layer):
    target = next(iter(layer.children()), layer)
    target.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def forward_on_a_child(layer):
    target = next(iter(layer.children()), layer)
    original = target.forward
    target.forward = lambda x: original(x) * 3


def parametrized_child(layer):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    if isinstance(layer, QuantizedLinear):
        pytest.skip("a buffer of integers is not parametrized")
    parametrize.register_parametrization(next(layer.children()), "weight", Twice())


def other_pivots(layer):
    if not isinstance(layer, PivotLinear):
        pytest.skip("only a pivoted layer has pivots")
    state = layer.state_dict()
    state["is_pivot"] = state["is_pivot"].flip(0)
    layer.load_state_dict(state)


CHANGES = (
    replace_weight,
    replace_child,
    other_bias,
    no_bias,
    hook_on_a_child,
    hook_before_a_child,
    forward_on_a_child,
    parametrized_child,
    other_pivots,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_after_a_change_it_is_not_used(layer, x, change):
    before = assert_right(layer, x)
    change(layer)
    hooked = isinstance(layer, QuantizedLinear) and change in (hook_on_a_child, hook_before_a_child, forward_on_a_child)
    if not hooked:  # what is on the layer itself, torch calls
        assert not is_used(layer, x)
    after = assert_right(layer, x)
    assert not torch.equal(before, after)
    assert_right(layer, x)


def test_values_written_in_place_are_seen(layer, x):
    before = assert_right(layer, x)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point() and tensor.numel():
                tensor.mul_(2)
    after = assert_right(layer, x)
    assert is_used(layer, x) and not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(layer, x, dtype):
    assert_right(layer, x)
    layer.to(dtype)
    assert not is_used(layer, x.to(dtype))
    assert assert_right(layer, x.to(dtype)).dtype == dtype
    layer.to(torch.float32)
    assert_right(layer, x)


def test_inputs_that_it_is_not_for(layer, x):
    assert_right(layer, x)
    prepared = layer.prepared
    with torch.no_grad():
        assert prepared(x) is not None
        assert prepared(x.double()) is None
        assert prepared(x.to("meta")) is None
        assert prepared("x") is None
        assert prepared(torch.tensor(1.0)) is None

        class Subclass(torch.Tensor):
            pass

        assert prepared(x.as_subclass(Subclass)) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert prepared(x) is None
        with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 40\]"):
            prepared(x[:, 1:])
    assert prepared(x) is None  # gradients are wanted
    with torch.inference_mode():
        assert prepared(x) is not None


def test_a_hook_on_every_module(layer, x):
    assert_right(layer, x)
    handle = torch_modules.register_module_forward_hook(lambda module, args, output: output * 2)
    try:
        assert not is_used(layer, x)
        assert_right(layer, x)
    finally:
        handle.remove()
    assert_right(layer, x)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_kept_alive(name, x):
    layer = made(name)
    assert_right(layer, x)
    tensors = [weakref.ref(t) for t in (*layer.parameters(), *layer.buffers())]
    modules = [weakref.ref(module) for module in layer.modules()]
    prepared = layer.prepared
    del layer
    gc.collect()
    assert not [ref for ref in (*tensors, *modules) if ref() is not None]
    with torch.no_grad():
        assert prepared(x) is None


def test_copies_and_pickles_prepare_their_own(layer, x):
    y = assert_right(layer, x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    others = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)
    for other in others:
        assert other.prepared is None
        assert torch.equal(assert_right(other, x), y)
        assert is_used(other, x)
    replace_weight(others[0])
    assert is_used(layer, x) and torch.equal(assert_right(layer, x), y)


def test_torch_sees_the_operator(x):
    layer = lowrank()
    assert_right(layer, x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * len(x) * RANK * (IN + OUT)


def test_a_compiled_layer_is_one_graph(layer, x):
    y = assert_right(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), y)


def test_only_modules_and_tensors_are_taken(x):
    prepare = extension.module.Prepared
    with pytest.raises(TypeError):
        prepare([(object(), True)], [], (), 0, x, [])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        prepare([(type("Empty", (), {})(), True)], [], (), 0, x, [])
    with pytest.raises(TypeError, match="an input"):
        prepare([], [], (), 0, 1, [])
    with pytest.raises(TypeError, match="tensors"):
        prepare([], [1], (), 0, x, [])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_are_two_of_torchs_products(dtype, bias):
    layer = LowRankLinear(IN, OUT, RANK, bias, dtype=dtype)
    tokens = few_tokens(dtype)
    x = torch.randn(2, tokens, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected = layer.U(layer.Vh(x))
        assert torch.equal(layer(x), expected) and is_used(layer, x)
        assert torch.equal(layer(x), expected)
        assert layer(x[:1, :3]).shape == (1, 3, OUT)  # and few tokens by the same
        layer.Vh.register_forward_hook(lambda module, args, output: output * 2)
        assert not is_used(layer, x)
        torch.testing.assert_close(layer(x), layer.U(2 * torch.nn.functional.linear(x, layer.Vh.weight)))


def test_many_tokens_of_other_layers(layer):
    x = torch.randn(200, IN, generator=torch.Generator().manual_seed(1))
    assert_right(layer, x)
    assert is_used(layer, x)
