"""What `acip tune` finds, keeps and changes, without a GPU: times are made up, kernels run in Triton's interpreter."""

import collections
import dataclasses
import itertools
import json

import pytest
import torch
import toys
from deployed import KINDS, Layer, arguments, bound, exact, inputs
from operators import assert_within
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("triton")

import acip_kernels
from acip_kernels import LowRankLinear, PivotLinear, cli, fuse, materialize
from acip_kernels.models import tune as tuning
from acip_kernels.nn import fused
from acip_kernels.nn.quantized_linear import QuantizedLinear
from acip_kernels.ops.fused_linear import cuda, measured, op, reference, triton, tune
from acip_kernels.plan import (
    DEVICES,
    CudaConfig,
    DecodeConfig,
    Launch,
    Problem,
    Table,
    Times,
    decode_candidates,
    decode_config,
    stands_for,
    why_not,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H100 = DEVICES["H100"]
LAUNCH = Launch(1, ((1024, 4096, 0, 0),), split=True)
OURS, TORCHS = Times(1.0, 2.0, 1.0, 2.0), Times(2.0, 1.0, 2.0, 1.0)
ROUNDINGS = 6  # the interpreter cuts bfloat16 off where a GPU rounds it: twice the error


@pytest.fixture(autouse=True)
def interpreted(request):
    if torch.cuda.is_available() and request.node.name != "test_on_a_gpu":
        pytest.skip("kernels are compiled here, and do not read memory of the CPU")


def table(configs=(), times=(), device=H100):
    return Table(device, "the file", dict(configs), dict(times))


# ---- plan


def test_a_measured_config_overrides_the_model():
    predicted = decode_config(H100, 1, LAUNCH.weights, split=True)
    other = next(config for config in decode_candidates(H100, LAUNCH)[1:] if config.splits > 1)
    found = table({LAUNCH: other})
    assert decode_config(H100, 1, list(LAUNCH.weights), split=True, table=found) == other != predicted
    # Only for this launch: not of other weights, not as a second factor, not for other numbers of tokens.
    assert decode_config(H100, 1, LAUNCH.weights, table=found) == decode_config(H100, 1, LAUNCH.weights)
    for tokens, itemsize in ((2, 2), (1, 4)):
        options = {"split": True, "itemsize": itemsize}
        wanted = decode_config(H100, tokens, LAUNCH.weights, **options)
        assert decode_config(H100, tokens, LAUNCH.weights, **options, table=found) == wanted


def test_one_token_stands_for_itself_and_more_for_fewer():
    assert [stands_for(1, tokens) for tokens in (0, 1, 2)] == [False, True, False]
    assert [stands_for(4, tokens) for tokens in (0, 1, 2, 4, 5)] == [False, False, True, True, False]
    problem = Problem(16, 0, (0, 0, 0, 8, 0), (8,))
    found = table(times={problem: TORCHS, problem._replace(tokens=4): OURS})
    assert found.tokens == (4, 16)
    faster = {tokens: found.is_faster(problem._replace(tokens=tokens), graph=True) for tokens in (1, 2, 4, 5, 16, 17)}
    assert faster == {1: False, 2: True, 4: True, 5: False, 16: False, 17: False}
    mixed = table(times={problem: Times(1.0, 2.0, 2.0, 1.0)})
    assert mixed.is_faster(problem, graph=True) and not mixed.is_faster(problem, graph=False)
    assert mixed.pays(graph=True) and not mixed.pays(graph=False) and not table().pays(graph=True)


@pytest.mark.parametrize(
    ("device", "config", "reason"),
    [
        ("H100", DecodeConfig(rows=12), "powers of two"),
        ("H100", DecodeConfig(rows=128, k=512), "does not stay in registers"),
        ("A100", DecodeConfig(pdl=True), "no programmatic dependent launch"),
    ],
)
def test_an_illegal_entry_is_an_error_that_names_the_file(device, config, reason):
    assert reason in why_not(config, DEVICES[device], LAUNCH.tokens, LAUNCH.weights, LAUNCH.split)
    with pytest.raises(ValueError, match=f"the file: .*{reason}"):
        table({LAUNCH: config}, device=DEVICES[device])


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_none_are_an_error(seconds):
    with pytest.raises(ValueError, match="the file: seconds"):
        table(times={Problem(1, 0, (), ()): Times(1.0, seconds, 1.0, 1.0)})


# ---- the search


class Clock:
    """Made-up times: of each launch by its config and grid; runs everything once."""

    def __init__(self, monkeypatch):
        self.seen, self.measured = [], []
        original = triton._launch

        def launch(kernel, grid, *arguments, **options):
            if "ROWS" in options:  # there is nothing to choose for the SwiGLU of what lies apart
                self.seen.append((options["ROWS"], options["K"], options["num_warps"], grid))
            original(kernel, grid, *arguments, **options)

        monkeypatch.setattr(triton, "_launch", launch)

    @staticmethod
    def cost(launch) -> float:
        return 1.0 + torch.rand((), generator=torch.Generator().manual_seed(hash(launch) % 1000)).item()

    def __call__(self, variants, graph):
        seconds = []
        for calls in variants:
            self.seen.clear()
            made = [call() for call in calls]
            launches = self.seen[: len(self.seen) // len(calls)]
            # torch's products launch nothing of ours
            seconds.append(sum(map(self.cost, launches)) if launches else 100.0)
            self.measured.append((launches, made, seconds[-1]))
        return seconds


def case_of(layers, x, mode=op.CONCATENATE, copies=1):
    tensors, spec = arguments(layers)
    return tune.Case("toy", x, [tensors] * copies, tuple(spec), mode)


# One form of each kind of 4 bits, half a minute in the interpreter; both forms are in tests of the kernel itself.
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "form, kind",
    [
        pytest.param(form, kind, id=f"{name}-{kind}")
        for name, form in (("factors", op.FACTORS), ("pivoted", op.PIVOTED))
        for kind in KINDS
        if (name, kind) not in (("factors", "int4 with zeros"), ("pivoted", "int4"))
    ],
)
def test_every_config_that_is_tried_gives_the_same_but_for_rounding(monkeypatch, form, kind, tokens):
    dtype = torch.float32
    layers = [Layer(form, 150, 70, 40, dtype, KINDS[kind], seed=1), Layer(op.DENSE, 150, 20, 0, dtype, seed=2)]
    x = inputs(dtype, tokens, 150)
    clock = Clock(monkeypatch)
    (found,) = tune.tune([case_of(layers, x)], clock, H100, candidates=4)
    want = exact(x, layers)
    limits = torch.cat([bound(layer, x, dtype, ROUNDINGS) for layer in layers], -1)
    ours = [made for launches, made, _ in clock.measured if launches]
    assert len(ours) == 2 * 4 + 2 + 1  # two launches of four candidates; predicted and found, as a graph; found, eager
    assert len({tuple(launches) for launches, *_ in clock.measured if launches}) >= 7
    for made in ours:
        assert_within(limits, made[0], want)
    assert set(found.configs) == set(tune.launches(found.case, H100)) and len(found.configs) == 2
    for launch, config in found.configs.items():
        assert config in decode_candidates(H100, launch)[:4]


@pytest.mark.parametrize("mode", [op.CONCATENATE, op.GATED_MLP])
def test_each_launch_gets_the_fastest_of_its_candidates(monkeypatch, mode):
    layers = [Layer(op.FACTORS, 140, 20, 18, torch.float32, seed=seed, bias=False) for seed in (1, 2)]
    layers += [Layer(op.FACTORS, 20 if mode else 140, 30, 12, torch.float32, seed=3)]
    clock = Clock(monkeypatch)
    (found,) = tune.tune([case_of(layers, inputs(torch.float32, 1, 140) / 8, mode)], clock, H100, candidates=5)
    launches = list(found.configs)
    assert len(launches) == (4 if mode else 2)
    varied = [seconds for _, _, seconds in clock.measured[: 5 * len(launches)]]
    fastest = [min(varied[i : i + 5]) for i in range(0, len(varied), 5)]
    # The others stay as they are: none of the steps makes it slower, and the last is what is kept.
    assert fastest == sorted(fastest, reverse=True)
    assert found.times.graph == fastest[-1] <= found.predicted and found.times.graph_torch == 100.0
    for i, launch in enumerate(launches):
        tried = decode_candidates(H100, launch)[:5]
        step = varied[5 * i : 5 * i + 5]
        assert found.configs[launch] == tried[step.index(fastest[i])]
    assert {launch.split for launch in launches} == {True, False}
    assert any(launch.together for launch in launches) == bool(mode)


def test_a_launch_is_tuned_once_and_what_was_found_before_is_kept(monkeypatch):
    layer = Layer(op.FACTORS, 140, 30, 20, torch.float32)
    case = case_of([layer], inputs(torch.float32, 1, 140))
    clock = Clock(monkeypatch)
    first, second = tune.tune([case, case], clock, H100, candidates=3)
    assert second.configs == first.configs
    assert len(clock.measured) == 2 * 3 + 2 * 5
    known = {launch: decode_candidates(H100, launch)[2] for launch in first.configs}
    clock.measured.clear()
    (third,) = tune.tune([case], clock, H100, candidates=3, known=known)
    assert third.configs == known and len(clock.measured) == 5
    with pytest.raises(ValueError, match="candidates must be at least 1"):
        list(tune.tune([case], clock, H100, candidates=0))


class CudaKernels:
    """CUDA C++ kernels that are the reference, on this CPU, for what `takes`; their configs are noted."""

    def __init__(self, monkeypatch, takes=lambda x, tensors, spec, mode: True):
        self.calls = []

        def forward(x, tensors, spec, mode, **config):
            if not takes(x, tensors, spec, mode):
                raise RuntimeError("acip_cuda: not these")
            self.calls.append(CudaConfig(**config))
            return reference.forward(x, tensors, spec, mode)

        monkeypatch.setattr(cuda, "forward", forward)
        monkeypatch.setattr(cuda, "takes", lambda x: x.dtype in (torch.bfloat16, torch.float16))
        monkeypatch.setattr(cuda, "missing", None)

    def measure(self, cost):
        """Made-up times in a graph: by `cost`, 3 of Triton's, 4 of torch's products; half of that from Python."""

        def measure(variants, graph):
            seconds = []
            for calls in variants:
                self.calls.clear()
                before = len(self.launched)
                calls[0]()
                ours = 3.0 if len(self.launched) > before else 4.0
                seconds.append((cost(self.calls[-1]) if self.calls else ours) / (1 if graph else 2))
            return seconds

        return measure

    def count(self, monkeypatch):
        self.launched, original = [], triton._launch
        monkeypatch.setattr(triton, "_launch", lambda *a, **o: (self.launched.append(0), original(*a, **o))[1])
        return self


def test_the_cuda_kernels_are_taken_where_they_are_the_fastest(monkeypatch):
    best = CudaConfig("dependent", 3, False)

    def cost(config):
        # The launch and the copies are found first, then splits.
        return 2.0 - (config.launch == best.launch) * 0.3 - (config.bulk == best.bulk) * 0.3 - (config == best) * 0.2

    kernels = CudaKernels(monkeypatch).count(monkeypatch)
    case = case_of([Layer(op.FACTORS, 64, 40, 16, torch.bfloat16)], inputs(torch.bfloat16, 2, 64))
    (found,) = tune.tune([case], kernels.measure(cost), H100, candidates=2)
    assert found.cuda == best and found.times == pytest.approx(Times(1.2, 4.0, 0.6, 2.0)) and found.predicted == 3.0
    # Slower than Triton's they are not taken, nor of numbers that they do not have, nor what they refuse.
    (found,) = tune.tune([case], kernels.measure(lambda config: 3.5), H100, candidates=2)
    assert found.cuda is None and found.times == Times(3.0, 4.0, 1.5, 2.0)
    single = case_of([Layer(op.FACTORS, 64, 40, 16, torch.float32)], inputs(torch.float32, 2, 64))
    refusing = CudaKernels(monkeypatch, lambda *problem: False).count(monkeypatch)
    for one, of in ((single, kernels), (case, refusing)):
        (found,) = tune.tune([one], of.measure(lambda config: 1.0), H100, candidates=2)
        assert found.cuda is None and found.times.graph == 3.0


def test_a_gpu_follows_the_table_to_the_cuda_kernels(monkeypatch):
    kernels = CudaKernels(monkeypatch).count(monkeypatch)
    layer, x = Layer(op.FACTORS, 64, 40, 16, torch.bfloat16), inputs(torch.bfloat16, 3, 64)
    tensors, spec = arguments([layer])
    problem = Problem(*measured.problem_of(16, tensors, spec, op.CONCATENATE, 2))
    config = CudaConfig("cooperative", 2, False)
    of_one = problem._replace(tokens=1)
    held = dataclasses.replace(table(times={problem: OURS, of_one: OURS}), cuda={problem: config})
    monkeypatch.setattr(measured, "table", lambda device: held)
    y = measured.forward(x, tensors, spec, op.CONCATENATE)
    assert kernels.calls == [config] and not kernels.launched
    assert_within(bound(layer, x, torch.bfloat16, ROUNDINGS), y, exact(x, [layer]))
    # One token was measured too, and there Triton's were faster; and what was not measured is Triton's.
    measured.forward(x[:1], tensors, spec, op.CONCATENATE)
    held = table()
    measured.forward(x, tensors, spec, op.CONCATENATE)
    assert len(kernels.calls) == 1 and len(kernels.launched) == 4


def test_real_times_are_medians_of_one_call(monkeypatch):
    case = case_of([Layer(op.FACTORS, 64, 16, 8, torch.float32)], inputs(torch.float32, 1, 64), copies=2)
    (found,) = tune.tune([case], tune.timing(CPU, rounds=3), H100, candidates=2)
    assert all(0 < seconds < 60 for seconds in (found.predicted, *found.times))
    # Of three rounds of two calls: the middle one, by the number of calls.
    clock = iter([0.0, 6.0, 0.0, 2.0, 0.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert tune.timing(CPU, rounds=3)([[lambda: None] * 2], True) == [2.0]


def test_weights_are_copied_until_they_come_from_memory(monkeypatch):
    layer = Layer(op.FACTORS, 64, 64, 16, torch.float32, bias=False)
    size = 2 * 64 * 16 * 4
    case = case_of([layer], inputs(torch.float32, 1, 64), copies=2)
    for wanted, copies in ((0, 2), (3 * size, 3), (10 * size + 1, 11), (10**9, 64)):
        (found,) = tune.tune([case], lambda variants, graph: [1.0] * len(variants), H100, bytes_read=wanted)
        held = found.case.copies
        assert len(held) == copies
        assert len({tensors[0].data_ptr() for tensors in held}) == copies - 1  # the two of the case are one here
        assert all(torch.equal(a, b) for a, b in zip(held[-1], held[0]))


@pytest.mark.parametrize("mode", [op.CONCATENATE, op.SWIGLU, op.GATED_MLP])
def test_torchs_products_are_the_same_function(mode):
    forms = itertools.cycle([op.FACTORS, op.PIVOTED, op.DENSE])
    kinds = itertools.cycle(KINDS.values())
    for _ in range(4):
        layers = [Layer(next(forms), 48, 48, 20, torch.float32, next(kinds), seed=seed) for seed in (1, 2, 3)]
        layers[:] = layers[:2] if mode == op.SWIGLU else layers
        x = inputs(torch.float32, 2, 48) / 8
        made = torch.cat(case_of(layers, x, mode).calls_of_torch()[0](), -1)
        want = exact(x, layers, mode)
        # Sums of 48, 20 and 48 terms: far from any mistake in what is multiplied.
        assert float((made - want).abs().max()) <= 300 * torch.finfo(torch.float32).eps * float(want.abs().max())


# ---- the file

ABOUT = {
    "device": "NVIDIA H100 80GB HBM3",
    "compute_capability": "9.0",
    "driver": "550.54.15",
    "torch": "2.13.0+cu130",
    "triton": "3.7.1",
    "acip_kernels": "0.1.0",
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU whose identity is what this dict says, and an empty cache."""
    about = dict(ABOUT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "identity", lambda device: dict(about))
    monkeypatch.setattr(measured, "device_of", lambda device: H100)
    measured.table.cache_clear()
    yield about
    measured.table.cache_clear()


def test_what_is_stored_is_read_again_by_the_same_versions_alone(machine, tmp_path):
    assert measured.table(GPU) is None
    config = decode_candidates(H100, LAUNCH)[1]
    found = table({LAUNCH: config}, {Problem(1, 0, (1, 0, 0, 4096, 0, 0, 1024, 0), (1024, 4096)): OURS})
    path = measured.store(GPU, found)
    assert path.parent == tmp_path / "acip_kernels" / "tuned"
    assert path.name == (
        "nvidia-h100-80gb-hbm3-cc9.0-driver550.54.15-torch2.13.0+cu130-triton3.7.1-acip-kernels0.1.0.json"
    )
    assert list(path.parent.iterdir()) == [path]
    read = measured.table(GPU)
    assert (read.configs, read.times, read.source) == (found.configs, found.times, str(path))
    assert read is measured.table(GPU)
    assert measured.table(CPU) is None
    for key in ABOUT:
        machine[key] = "9.9"
        measured.table.cache_clear()
        assert measured.table(GPU) is None, key
        # Nor under another name.
        other = measured.path_of(dict(machine))
        other.write_bytes(path.read_bytes())
        assert measured.load(GPU) is None, key
        other.unlink()
        machine[key] = ABOUT[key]
    assert measured.load(GPU) is not None


def test_what_was_measured_of_the_cuda_kernels_is_kept_while_they_are_there(machine, monkeypatch):
    problem = Problem(1, 0, (1, 0, 0, 4096, 0, 0, 1024, 0), (1024, 4096))
    other, config = problem._replace(tokens=16), CudaConfig("dependent", 4, False)
    found = dataclasses.replace(table(times={problem: OURS, other: OURS}), cuda={problem: config})
    measured.store(GPU, found)
    monkeypatch.setattr(cuda, "missing", None)
    assert (measured.load(GPU).cuda, set(measured.load(GPU).times)) == ({problem: config}, {problem, other})
    monkeypatch.setattr(cuda, "missing", "not built")
    assert (measured.load(GPU).cuda, set(measured.load(GPU).times)) == ({}, {other})
    path = measured.path_of(machine)
    for change in ({"launch": "fast"}, {"splits": -1}, {"bulk": 1}, {"slots": 3}):
        fields = {"measured_on": machine} | measured.to_json(found)
        fields["problems"][0]["cuda"] |= change
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="`acip tune` measures anew"):
            measured.load(GPU)


def damaged(change):
    problem = Problem(1, 0, (1, 0, 0, 4096, 0, 0, 1024, 0), (1024, 4096))
    fields = {"measured_on": ABOUT} | measured.to_json(table({LAUNCH: DecodeConfig()}, {problem: OURS}))
    change(fields)
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        (damaged(lambda f: f.pop("launches")), "KeyError 'launches'"),
        (damaged(lambda f: f.update(problems=3)), "TypeError"),
        (damaged(lambda f: f["launches"][0].pop("config")), "KeyError 'config'"),
        (damaged(lambda f: f["launches"][0]["config"].update(stages=3)), "stages"),
        (damaged(lambda f: f["launches"][0]["config"].update(rows="16")), "'16' is no count"),
        (damaged(lambda f: f["launches"][0]["config"].update(rows=12)), "powers of two"),
        (damaged(lambda f: f["launches"][0].update(weights=[[1, 2, 3]])), "not enough values"),
        (damaged(lambda f: f["launches"][0].update(weights=[])), "a launch without weights"),
        (damaged(lambda f: f["problems"][0].update(tokens=-1)), "-1 is no count"),
        (damaged(lambda f: f["problems"][0]["seconds"].update(graph=0)), "seconds"),
        (damaged(lambda f: f["problems"][0]["seconds"].pop("eager")), "eager"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it_and_the_cure(machine, text, reason):
    path = measured.path_of(machine)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            measured.table(GPU)
        assert str(path) in str(error.value) and reason in str(error.value) and "`acip tune`" in str(error.value)
    # And that cure is one: a new table takes its place.
    measured.store(GPU, table({LAUNCH: DecodeConfig()}))
    assert measured.table(GPU).configs == {LAUNCH: DecodeConfig()}


def test_a_gpu_tells_what_a_measurement_holds_for(monkeypatch):
    import pathlib

    import triton as compiler

    properties = collections.namedtuple("Properties", "name major minor")("NVIDIA H100 80GB HBM3", 9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    text = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC version:  gcc 12.3.0\n"
    )
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: text)
    versions = {"torch": str(torch.__version__), "triton": compiler.__version__}
    versions |= {"acip_kernels": acip_kernels.__version__}
    assert measured.identity(GPU) == ABOUT | versions

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(pathlib.Path, "read_text", missing)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    assert measured.identity(GPU)["driver"] == "12040"


def test_nothing_is_read_at_import_or_for_the_cpu(monkeypatch):
    monkeypatch.setattr(measured, "identity", lambda device: pytest.fail("asked for a GPU"))
    measured.table.cache_clear()
    layer = LowRankLinear(16, 8, 4)
    with torch.no_grad():
        layer(torch.randn(1, 16))
        triton.forward(torch.randn(1, 16), *arguments([Layer(op.FACTORS, 16, 8, 4, torch.float32)]), op.CONCATENATE)


# ---- what modules compute with


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is this CPU: its kernels run in the interpreter, and are counted; `gpu.table` is what it measured."""
    seen = collections.namedtuple("Gpu", "calls held")([], [None])

    def forward(x, tensors, spec, mode):
        seen.calls.append((mode, len(x.reshape(-1, x.shape[-1]))))
        return triton.forward(x, tensors, spec, mode)

    library = torch.library.Library("acip", "IMPL")
    library.impl("fused_linear", forward, "CPU", allow_override=True)
    monkeypatch.setattr(fused, "is_gpu", lambda x: True)

    def held(device):
        return seen.held[0]

    held.cache_clear = lambda: None
    monkeypatch.setattr(measured, "table", held)
    torch.compiler.reset()
    yield seen
    torch.compiler.reset()
    library._destroy()


def everything(model, times, tokens=(1, 16), dtype=None):
    """A table in which every problem of `model` has these times."""
    modules = [("", model, op.CONCATENATE)] if hasattr(model, "spec") else tuning.fused_calls(model)
    found = {}
    for _, layer, mode in modules:
        spec = tuple(layer.spec())
        dtype = dtype or next(itertools.chain(model.parameters(), model.buffers())).dtype
        tensors = fused.gpu_tensors(layer, torch.empty(1, spec[3], dtype=dtype))
        for count in tokens:
            found[Problem(*measured.problem_of(count, tensors, spec, mode, dtype.itemsize))] = times
    return table(times=found)


LAYERS = {
    "factors": lambda: LowRankLinear(40, 24, 8),
    "pivoted": lambda: PivotLinear(40, 24, 8),
    "int8": lambda: QuantizedLinear.from_linear(nn.Linear(40, 24), "int8"),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    made = LAYERS[request.param]()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return made


def close(y, want):
    # Two sums of 40 and 8 terms in another order.
    torch.testing.assert_close(y, want, rtol=0, atol=100 * torch.finfo(torch.float32).eps * float(want.abs().max()))


def test_a_layer_follows_the_table(gpu, layer):
    x = torch.randn(3, 40)
    dtype = {"dtype": torch.float32}
    with torch.no_grad():
        want = layer(x)
        assert not gpu.calls  # without a table
        for times, taken in ((TORCHS, False), (OURS, True), (Times(1.0, 2.0, 2.0, 1.0), False)):
            gpu.held[0] = everything(layer, times, **dtype)
            close(layer(x), want)
            assert bool(gpu.calls) == taken
            if not taken:
                assert torch.equal(layer(x), want)
            gpu.calls.clear()
        # Only for as many tokens as were measured, of this dtype and these shapes.
        gpu.held[0] = everything(layer, OURS, (4,), **dtype)
        for shape, taken in (((1,), 0), ((2,), 1), ((2, 2), 1), ((5,), 0), ((17,), 0), ((0,), 0)):
            layer(torch.randn(*shape, 40))
            assert len(gpu.calls) == taken, shape
            gpu.calls.clear()
        gpu.held[0] = everything(LowRankLinear(40, 24, 9), OURS)
        layer(x)
        assert not gpu.calls


def test_what_hangs_on_a_layer_is_honoured(gpu, layer):
    gpu.held[0] = everything(layer, OURS, dtype=torch.float32)
    x = torch.randn(3, 40)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None and not gpu.calls
    x = x.detach()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert not gpu.calls
        handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
        layer(x)
        handle.remove()
        assert not gpu.calls
        child = next(iter(layer.children()), None)
        if child is not None:
            seen = []
            handle = child.register_forward_hook(lambda *arguments: seen.append(1))
            layer(x)
            handle.remove()
            assert seen and not gpu.calls
            child.weight = nn.Parameter(child.weight.t().contiguous().t())  # which the kernels do not read
            want = layer(x)
            assert not gpu.calls
            child.weight = nn.Parameter(child.weight.contiguous())
            close(layer(x), want)
        else:
            layer(x)
        assert len(gpu.calls) == 1
        with pytest.raises(RuntimeError, match="shape"):  # torch's own error
            layer(torch.randn(3, 41))


@pytest.mark.parametrize(("graph", "eager"), [(True, False), (False, True)])
def test_compiled_code_goes_by_the_time_of_graphs(gpu, layer, graph, eager):
    times = Times(1.0, 2.0 if graph else 0.5, 1.0, 2.0 if eager else 0.5)
    gpu.held[0] = everything(layer, times, dtype=torch.float32)
    x = torch.randn(3, 40)
    with torch.no_grad():
        want = layer(x)
        assert bool(gpu.calls) == eager
        gpu.calls.clear()
        compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True, backend="aot_eager")
        close(compiled(x), want * 2)
        assert bool(gpu.calls) == graph
        # With an open number of tokens too, and beyond those that were measured.
        gpu.calls.clear()
        for tokens in (5, 9, 16, 30):
            x = torch.randn(tokens, 40)
            gpu.calls.clear()
            y = compiled(x)
            assert bool(gpu.calls) == (graph and tokens <= 16)
            with torch.enable_grad():
                close(y, layer(x).detach() * 2)


@pytest.mark.parametrize("forms", [("factors",), ("pivoted",)], ids=str)
def test_a_fused_model_follows_the_table(gpu, forms):
    model = fuse(materialize(toys.toy_result(toys.llama()), 0.7, forms=("dense", *forms)).eval())
    ids = toys.token_ids(1, 6)
    with torch.no_grad():
        want = model(ids).logits
        assert not gpu.calls
        gpu.held[0] = everything(model, TORCHS)
        assert torch.equal(model(ids).logits, want) and not gpu.calls
        gpu.held[0] = everything(model, OURS)
        toys.assert_close(model(ids).logits, want)
        assert collections.Counter(mode for mode, _ in gpu.calls)[op.GATED_MLP] == 2
        # Groups that are slower, layers by themselves that are not: each by its own time.
        gpu.calls.clear()
        alone = {key: OURS if len(key.rows) <= 2 else TORCHS for key in gpu.held[0].times}
        gpu.held[0] = table(times=alone)
        toys.assert_close(model(ids).logits, want)
        assert gpu.calls and all(mode == op.CONCATENATE for mode, _ in gpu.calls)
        if forms == ("factors",):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            gpu.calls.clear()
            toys.assert_close(compiled(ids).logits, want)
            assert gpu.calls


def test_the_kernels_take_the_measured_configs(gpu, monkeypatch):
    layer = Layer(op.FACTORS, 200, 64, 40, torch.float32)
    x = inputs(torch.float32, 1, 200)
    launches = tune.launches(case_of([layer], x), H100)
    configs = {launch: decode_candidates(H100, launch)[5] for launch in launches}
    gpu.held[0] = table(configs)
    clock = Clock(monkeypatch)
    tensors, spec = arguments([layer])
    triton.forward(x, tensors, spec, op.CONCATENATE)
    assert [seen[:3] for seen in clock.seen] == [(c.rows, c.k, c.warps) for c in configs.values()]
    # Not where another device, or a config, is named.
    clock.seen.clear()
    triton.forward(x, tensors, spec, op.CONCATENATE, device=H100)
    predicted = [decode_candidates(H100, launch)[0] for launch in launches]
    assert [seen[:3] for seen in clock.seen] == [(c.rows, c.k, c.warps) for c in predicted]
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 200\]"):
        triton.forward(x[:, :100], tensors, spec, op.CONCATENATE)


# ---- a model


def toy_model(**options):
    return materialize(toys.toy_result(toys.llama()), 0.7, **options).eval()


class Dry:
    """Made-up times without running anything: the last candidate is the fastest, and ours four times torch's."""

    def __init__(self, left=10**9):
        self.measured, self.left = 0, left

    def __call__(self, variants, graph):
        self.measured, self.left = self.measured + 1, self.left - 1
        if self.left < 0:
            raise KeyboardInterrupt
        if not graph:
            return [1.0, 4.0]
        return [2.0, 1.0, 4.0] if len(variants) == 3 else [2.0] * (len(variants) - 1) + [1.0]


def tuned(model, clock, **options):
    done = []
    options = {"tokens": (1, 4), "candidates": 2, "again": False, "bytes_read": 0} | options
    rows = tuning._tune(model, CPU, **options, measure=clock, progress=lambda *counts: done.append(counts))
    return rows, done


def test_a_models_problems_are_measured_once_kept_and_followed(machine, gpu):
    model, clock = toy_model(forms=("dense", "factors")), Dry()
    rows, done = tuned(model, clock)
    names = [row["name"] for row in rows]
    assert "model.layers.0.self_attn q/k/v" in names and "model.layers.0.mlp" in names and "lm_head" in names
    single = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    # Every layer and group is one of the problems, at both numbers of tokens.
    assert sum(row["layers"] for row in rows) == 2 * (len(single) + 2 * 2 + 1)
    assert done[0] == (0, len(rows)) and done[-1] == (len(rows), len(rows)) and len(done) == len(rows) + 1
    for row in rows:
        assert (row["predicted"], row["graph"], row["graph_torch"]) == (2.0, 1.0, 4.0)
        assert (row["eager"], row["eager_torch"]) == (1.0, 4.0)
    read = measured.load(GPU)
    assert {(key.tokens) for key in read.times} == {1, 4} and len(read.times) == len(rows)
    # Again: nothing is left to do; of a model with other layers, only those.
    clock.measured = 0
    again, done = tuned(model, clock)
    assert done == [(len(rows), len(rows))] and not clock.measured
    assert [row | {"predicted": None} for row in rows] == again
    rows, _ = tuned(toy_model(forms=("dense", "factors"), rank_multiple=8), clock)
    assert clock.measured and any(row["predicted"] is None for row in rows) < len(rows)
    assert len(measured.load(GPU).times) > len(again)
    # Unless it is asked for.
    clock.measured = 0
    rows, done = tuned(model, clock, again=True)
    assert done[0] == (0, len(rows)) and clock.measured and all(row["predicted"] for row in rows)
    # And the model computes the same with what was found.
    ids = toys.token_ids(1, 4)
    with torch.no_grad():
        want = model(ids).logits
        gpu.held[0] = measured.load(GPU)
        toys.assert_close(model(ids).logits, want)
    assert gpu.calls


def test_an_interrupted_run_goes_on(machine, gpu):
    model, clock = toy_model(), Dry()
    with pytest.raises(KeyboardInterrupt):
        tuned(model, Dry(left=25))
    kept = len(measured.load(GPU).times)
    assert kept > 0
    rows, done = tuned(model, clock)
    assert done[0] == (kept, len(rows)) and len(measured.load(GPU).times) == len(rows) > kept
    # A file that cannot be used is replaced.
    path = measured.path_of(machine)
    path.write_text("{")
    rows, done = tuned(model, clock)
    assert done[0][0] == 0 and len(measured.load(GPU).times) == len(rows)


def test_quantized_models_have_problems_too(machine, gpu):
    model = toy_model(forms=("dense", "factors"), quantize="int4", quantize_group=32, quantize_rounding="nearest")
    cases = tuning.cases(fuse(model), (1,))
    kinds = {spec for case in cases for spec in case.spec[2:3]}
    assert op.INT4_ZEROS in kinds
    assert not any(case.name.endswith((".Vh", ".U")) for case in cases)


def test_what_there_is_not_to_tune(machine, gpu):
    with pytest.raises(ValueError, match="measures a GPU, and the model is on cpu"):
        tuning.tune(toy_model())
    with pytest.raises(ValueError, match="1 to 16 of them, got 1, 17"):
        tuning.cases(toy_model(), (17, 1))
    with pytest.raises(ValueError, match="no layers that the kernels take"):
        tuning._tune(toys.gpt2().transformer, CPU, (1,), 2, False, lambda *counts: None, measure=None, bytes_read=0)
    with pytest.raises(ValueError, match=r"float16, and the model is torch\.float64"):
        tuning.cases(toy_model().double())


# ---- the command


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, ["tune", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path):
    for options in ((), ("--device", "cuda"), ("--device", "cpu")):
        with pytest.raises(ValueError, match="there is none here"):
            invoke(tmp_path, *options)
    assert invoke(tmp_path, "--tokens", 17).exit_code == 2
    assert invoke(tmp_path, "--candidates", 0).exit_code == 2


def test_the_command_prints_what_it_found(machine, gpu, monkeypatch, tmp_path):
    model, clock = toy_model(), Dry()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ABOUT["device"])
    monkeypatch.setattr(acip_kernels, "load", lambda path, size_ratio, dtype: model)
    model.to = lambda where: model
    monkeypatch.setattr(tuning, "tune", lambda model, tokens, **options: tuned(model, clock, tokens=tokens)[0])
    made = json.loads(invoke(tmp_path, "--tokens", 2, "--dtype", "float32", "--json").stdout)
    assert made["device"] == ABOUT["device"] and made["table"] == str(measured.path_of(machine))
    assert {row["tokens"] for row in made["problems"]} == {2}
    result = invoke(tmp_path, "--tokens", 2, "--dtype", "float32")
    assert result.stdout == "" and "q/k/v" in " ".join(result.stderr.split()) and "known" in result.stderr
    with pytest.raises(ValueError, match="is not a directory"):
        invoke(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--device is cpu"):
        invoke(tmp_path, "--device", "cpu")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "acip", "kind": "elastic"}}')
    with pytest.raises(ValueError, match="say which with --size-ratio"):
        invoke(tmp_path)


# ---- with a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.table.cache_clear()
    model = toy_model(forms=("dense", "factors")).to(GPU)
    ids = toys.token_ids(1, 4).to(GPU)
    with torch.no_grad():
        want = model(ids).logits
        rows = tuning.tune(model, candidates=2)
        assert len(measured.table(GPU).times) == len(rows)
        toys.assert_close(model(ids).logits, want)
        # As if they were all faster.
        held = measured.table(GPU)
        faster = dataclasses.replace(held, times=dict.fromkeys(held.times, OURS))
        with monkeypatch.context() as patched:
            patched.setattr(measured, "table", lambda device: faster)
            toys.assert_close(model(ids).logits, want)
    measured.table.cache_clear()
