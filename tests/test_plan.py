"""The plan: counted operations against a counter's, and which way they choose."""

import itertools

import pytest
import torch
import toys
from torch.utils.flop_counter import FlopCounterMode

from acip_kernels import CompressionConfig, SVDLinear, factorize, files
from acip_kernels.compress.step import TrainingStep
from acip_kernels.plan import (
    DEVICES,
    ROUTES,
    DecodeConfig,
    Launch,
    Product,
    TrainingPlan,
    decode_candidates,
    decode_config,
    decode_configs,
    decode_seconds,
    device_of,
    explain_decode,
    explain_product,
    one_launch_seconds,
    product_config,
    product_plan,
    product_seconds,
    training_memory,
    training_operations,
    training_plan,
    why_not,
)
from bench import decode_configs as timed_configs


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
    # In two bytes products are faster, and what is beside them decides sooner.
    assert training_plan(1024, 576, 576, 576, 32, itemsize=2).route == "factored"
    assert training_plan(1024, 576, 576, 576, 32, itemsize=2, batches=4).route == "effective"
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


# ---- deployed layers on a GPU

LLAMA = ((1024, 4096, 0, 0), (4096, 1024, 0, 0))  # both factors of a 4096 × 4096 layer at half its size


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
@pytest.mark.parametrize("kind", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 16])
def test_the_chosen_config_is_legal_and_the_fastest_of_the_model(device, kind, tokens):
    for rows, cols, split in ((1024, 4096, True), (4096, 1024, False), (8, 64, True), (0, 3, False)):
        weights = ((rows, cols, kind, 64 if kind >= 2 else 0),)
        chosen = decode_config(device, tokens, list(weights), split=split)
        legal = [config for config, reason in decode_configs(device, tokens, weights, split) if reason is None]
        assert chosen in legal and why_not(chosen, device, tokens, weights, split) is None
        times = [decode_seconds(config, device, tokens, weights, split=split) for config in legal]
        assert decode_seconds(chosen, device, tokens, weights, split=split) == min(times)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("split", [False, True])
def test_candidates_are_all_that_is_legal_for_these_very_weights(device, tokens, split):
    """They are found once for all weights of the same kinds and least width, in whatever order and of how many rows."""
    for kinds in ((0,), (1, 0), (0, 2), (3, 1), (2, 3), (4,)):
        for widths in ((64, 4096), (1024, 200), (4096, 14336)):
            weights = tuple((100 + 7 * i, cols, kind, 0) for i, (cols, kind) in enumerate(zip(widths, kinds * 2)))
            legal = {config for config, reason in decode_configs(device, tokens, weights, split) if reason is None}
            candidates = decode_candidates(device, Launch(tokens, weights, split))
            assert len(candidates) == len(legal) and set(candidates) == legal


def test_the_model_picks_what_an_h100_was_fast_with():
    """Of the configs that `bench.decode_configs` has timed, launch by launch: as `decode_seconds` says of itself."""
    rows = files.read_json(timed_configs.result_path("NVIDIA H100 80GB HBM3"))["rows"]
    groups = {}
    for row in rows:
        groups.setdefault((row["case"], str(row["launch"])), []).append(row)
    over = []
    for some in groups.values():
        launch = timed_configs.launch_of(some[0])
        picked = min(some, key=lambda row: timed_configs.predicted(row, launch, DEVICES["H100"]))
        over.append(picked["seconds"] / min(row["seconds"] for row in some))
    assert len(rows) == 608 and len(over) == 18
    assert sum(one <= 1.085 for one in over) >= 16 and max(over) < 1.235


def test_the_model_is_no_faster_than_memory_and_launches():
    """Predicted for both launches of a layer, against its bytes over the bandwidth: not below it, not far above."""
    for device in DEVICES.values():
        first, second = (
            decode_seconds(
                decode_config(device, 1, [weight], split=split), device, 1, (weight,), split=split
            )
            for weight, split in zip(LLAMA, (True, False))
        )  # fmt: skip
        gap = device.gap if device.pdl_gap is None else device.pdl_gap
        assert first + second >= 2 * 1024 * 4096 * 2 / device.bandwidth + 2 * gap
        assert first + second < 3 * 2 * 1024 * 4096 * 2 / device.bandwidth + 2 * gap


@pytest.mark.parametrize(
    ("config", "tokens", "kind", "split", "reason"),
    [
        (DecodeConfig(rows=12), 1, 0, False, "powers of two"),
        (DecodeConfig(rows=8), 4, 0, False, "tensor cores"),
        (DecodeConfig(k=128), 4, 3, False, "int4 is read 64 columns"),
        (DecodeConfig(warps=64), 1, 0, False, "up to 1024 threads"),
        (DecodeConfig(rows=128, k=512), 1, 0, False, "does not stay in registers"),
        (DecodeConfig(rows=4, warps=8), 1, 0, False, "less than 16 bytes"),
        (DecodeConfig(splits=2), 1, 0, False, "only first factors"),
        (DecodeConfig(splits=16, k=512), 1, 0, True, "less than a tile"),
        (DecodeConfig(pdl=True), 1, 0, False, "A100 has no programmatic dependent launch"),
        (DecodeConfig(), 1, 0, False, None),
    ],
)
def test_every_reason_against_a_config(config, tokens, kind, split, reason):
    found = why_not(config, DEVICES["A100"], tokens, ((1024, 4096, kind, 64),), split)
    assert found is None if reason is None else reason in found


def test_splits_cover_all_columns_and_none_is_empty():
    for cols, k, splits in itertools.product((1, 63, 64, 65, 1000, 4096), (64, 256), (1, 2, 4, 16)):
        count, span = DecodeConfig(k=k, splits=splits).split(cols)
        assert span % max(k, 64) == 0 and (count - 1) * span < cols <= count * span and count <= splits


def test_every_choice_is_printed_with_its_reason():
    text = explain_decode(DEVICES["H100"], 1, LLAMA[:1], split=True)
    assert text.startswith("H100, 1 tokens, weights 1024×4096")
    assert text.count("<- chosen") == 1 and "less than 16 bytes" in text
    times = [float(line.split(" µs")[0].split()[-1]) for line in text.splitlines() if "µs" in line]
    assert times == sorted(times) and len(times) > 20
    assert device_of(torch.device("cpu")) is DEVICES["H100"]


def test_every_choice_for_a_product_is_printed_with_its_reason():
    product = Product(4096, 4096, 1024, 2, 3, 64)
    text = explain_product(DEVICES["L40S"], product)
    assert text.startswith("L40S, 4096 tokens, 1024 deep, 4096 columns\n")
    assert text.count("<- chosen") == 1 and "bytes of shared memory and L40S has" in text
    assert "quantized weights go 32 deep at least" in text and "a thread adds up 4 to 64 sums" in text
    assert len(text.splitlines()) == 1 + 5 * 5 * 4 * 3 * 4
    times = [float(line.split(" µs")[0].split()[-1]) for line in text.splitlines() if "µs" in line]
    assert times == sorted(times) and len(times) > 20


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_ours_or_the_vendors_product_by_what_either_is_expected_to_take(device):
    product = Product(4096, 4096, 1024, 2)
    plain = product_plan([product], device, 0)
    assert plain.way == "vendor"  # without company there is nothing to gain
    assert plain.seconds["ours"] >= product_seconds(product_config(product, device), product, device)
    # The floor of either: operations over the rate.
    assert min(plain.seconds.values()) > 2 * 4096 * 4096 * 1024 / device.matrix_rate
    beside = product_plan([product], device, 1 << 40)
    assert beside.way == "ours" and beside.seconds["ours"] == plain.seconds["ours"]
    assert beside.seconds["vendor"] > plain.seconds["vendor"] + (1 << 40) / device.bandwidth
    text = str(beside)
    assert text.startswith("ours (ours ") and "vendor" in text and "µs" in text
    # A quantized weight costs the vendor a pass over it, and its own launch.
    int4 = product_plan([Product(64, 4096, 4096, 2, 3, 64)], device, 0)
    assert int4.seconds["vendor"] > product_plan([Product(64, 4096, 4096, 2)], device, 0).seconds["vendor"]


def test_the_choice_on_an_h100_is_that_of_the_measurements():
    """Llama-3.1-8B's o, gate and down at half the size: factors, and a pivoted layer's parts; see `product_plan`."""
    h100 = DEVICES["H100"]
    for out, in_, rank, pivots in ((4096, 4096, 1024, 1152), (14336, 4096, 1536, 1792), (4096, 14336, 1536, 1792)):
        for tokens in (64, 512, 4096):
            second = Product(tokens, out, rank, 2)
            assert product_plan([second], h100, 2 * tokens * rank * 2).way == "vendor"  # beside a pass over z
            parts = [Product(tokens, pivots, in_, 2), Product(tokens, out - pivots, pivots, 2)]
            assert product_plan(parts, h100, 2 * tokens * out * 2).way == "vendor"
            for kind, group in ((1, 0), (3, 64), (4, 0)):
                for columns, depth in ((rank, in_), (out, rank)):
                    chosen = product_plan([Product(tokens, columns, depth, 2, kind, group)], h100, 0).way
                    if tokens > 64:
                        assert chosen == "vendor"
                    elif kind != 3:
                        assert chosen == "ours"  # codes are read once; of int4 making numbers of them takes too long


def test_a_barrier_costs_what_the_next_weights_do_not_cover():
    device = DEVICES["H100"]
    large, small = (4096, 1024, 0, 0), (1024, 400, 0, 0)
    floor, model = one_launch_seconds(device, [[large], [large]])
    assert floor == 2 * 4096 * 1024 * 2 / device.bandwidth
    launch = model - floor
    # 8 MiB take longer than a barrier, 0.8 MB do not, nor does what a multiprocessor may have on its way.
    assert 0 < launch < 1e-6
    few_floor, few = one_launch_seconds(device, [[large], [small]])
    assert few - few_floor > launch
    _, short = one_launch_seconds(device, [[large], [large]], ahead=1 << 10)
    assert short > model
    assert one_launch_seconds(device, [[large]])[1] < few
