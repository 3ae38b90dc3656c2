"""The plan: counted operations against a counter's, and which way they choose."""

import pytest
import torch
import toys
from torch.utils.flop_counter import FlopCounterMode

from acip_kernels import CompressionConfig, SVDLinear, factorize
from acip_kernels.compress.step import TrainingStep
from acip_kernels.plan import ROUTES, TrainingPlan, training_memory, training_operations, training_plan


def in_place_product(to, a, b, *, out_shape=None, **_):
    """The counter knows `addmm`, but not in place."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("out", "in_", "live", "r"), [(24, 16, 16, 3), (16, 24, 5, 2), (20, 20, 20, 0)])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("route", ROUTES)
def test_counted_operations_are_what_runs(route, out, in_, live, r, batches, dropout):
    generator = torch.Generator().manual_seed(0)
    k = min(out, in_)
    layer = SVDLinear(
        torch.randn(out, k), torch.rand(k), torch.randn(k, in_), adapter_rank=r, adapter_dropout=dropout,
        generator=generator, backend="reference",
    )  # fmt: skip
    layer.set_live(torch.arange(k) < live)
    layer.take_route(route)
    tokens = 10
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter:
        for _ in range(batches):
            layer(torch.randn(tokens, in_, requires_grad=True)).sum().backward()
        layer.collect_gradients()
    expected = training_operations(tokens, in_, out, live, r, batches=batches, dropout=dropout > 0 or r == 0)
    assert counter.get_total_flops() == expected[route]


def test_the_cheaper_route_is_chosen():
    # A square layer at full rank: three dense products and n³ against four.
    assert training_plan(4096, 576, 576, 576).route == "effective"
    assert training_plan(1024, 576, 576, 576, 32).route == "effective"
    # Few tokens do not pay for n³; half the rank does not need it; a wide layer's factors are cheaper.
    assert training_plan(256, 576, 576, 576).route == "factored"
    assert training_plan(4096, 576, 576, 288).route == "factored"
    assert training_plan(4096, 576, 1536, 576).route == "factored"
    # But what is done once a step is shared by the batches of the step.
    assert training_plan(256, 576, 576, 576, batches=16).route == "effective"


def test_a_route_may_be_named_and_a_wrong_name_raises():
    for route in ROUTES:
        assert training_plan(10, 8, 8, 8, route=route).route == route
    with pytest.raises(ValueError, match="route must be"):
        training_plan(10, 8, 8, 8, route="fast")


def test_a_plan_prints_its_reasons():
    text = str(training_plan(1024, 576, 576, 576))
    assert text == "effective (factored 2.72 GFLOP, effective 2.42 GFLOP a step)"
    assert isinstance(training_plan(1, 1, 1, 1), TrainingPlan)


def storage_bytes(tensors) -> int:
    """Of all storages, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("save_z", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("route", ROUTES)
def test_the_memory_formula_is_what_is_held(route, share, dropout, save_z):
    model = toys.llama()
    factorize(model, adapter_rank=4, adapter_dropout=dropout)
    config = CompressionConfig(route=route, save_z=save_z, adapter_dropout=dropout)
    step = TrainingStep(model, config)
    ids = toys.token_ids()
    step([{"input_ids": ids}], 1e-3)
    if share < 1:
        with torch.no_grad():
            for layer in step.layers.values():
                layer.mask[int(share * layer.full_rank) // 8 * 8 :] = 0
        step.compact(everything=True)
        step([{"input_ids": ids}], 1e-3)
    expected = [
        training_memory(
            ids.numel(), layer.in_features, layer.out_features, layer.full_rank, layer.computed_rank, 4,
            route=layer.route, dropout=dropout > 0, save_z=save_z,
        )
        for layer in step.layers.values()
    ]  # fmt: skip
    assert {layer.route for layer in step.layers.values()} == {route}
    assert all((layer.computed_rank < layer.full_rank) == (share < 1) for layer in step.layers.values())

    frozen = []
    for layer in step.layers.values():
        frozen += [layer.Vh, layer.U, *(layer._factors or ())[:2]]
        frozen += [layer._weight] if layer._weight is not None else []
    assert storage_bytes(frozen) == sum(memory.frozen for memory in expected)

    trained = [step.map.masks, step.map.masks.grad, *step.adapters.values()]
    gradients = sum(parameter.numel() * 4 for parameter in step.adapters.values())  # given back after each step
    moments = [state[key] for state in step.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert storage_bytes([*trained, *moments]) + gradients == sum(memory.trained for memory in expected)

    # One layer by itself: what its forward pass saves that is not a parameter or a factor of it.
    layer, memory = next(iter(step.layers.values())), expected[0]
    saved = []
    x = torch.randn(ids.numel(), layer.in_features, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (*frozen, layer.mask, layer.lora_A, layer.lora_B, layer.S)}
    own |= {t.untyped_storage().data_ptr() for t in (layer._rows, (layer._factors or (layer.S,))[-1]) if t is not None}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    seeds = 8 if dropout and route == "factored" else 0
    kept = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert storage_bytes(kept) - seeds == memory.kept
