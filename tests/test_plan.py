"""The plan: counted operations against a counter's, and which way they choose."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acip_kernels import SVDLinear
from acip_kernels.plan import ROUTES, TrainingPlan, training_operations, training_plan


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
