"""The CUDA kernels through their torch binding against float64: on the CPU, both compiled for it, under the execution
shim; and the same cases on a GPU, where there is one and the kernels are built for it."""

import pathlib
import subprocess
import sys

import pytest
import torch
from deployed import KINDS, MLP_FORMS, Layer, arguments, bounds, check_gated_mlp, exact, inputs
from operators import assert_within
from test_gpu_shim import COMPILER, FLAGS, ROOT

from acip_kernels.ops import lowrank_linear
from acip_kernels.ops.fused_linear import cuda, op
from acip_kernels.ops.pivot_linear.op import pivot_linear

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (33, 65, 17), (130, 37, 33), (200, 150, 97), (96, 64, 32)]
HAS_GPU = torch.cuda.is_available() and cuda.missing is None


def load_shim(folder):
    """What `_cuda.so` has, of the same sources, as an operator for the CPU."""
    torch_folder = pathlib.Path(torch.__file__).parent
    jobs = {
        "kernels": ["-std=c++17", "-Wno-unknown-pragmas", "-x", "c++", str(ROOT / "csrc/cuda/decode.cu")],
        "bindings": ["-std=c++20", "-DACIP_SHIM", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_folder / "include"),
                     str(ROOT / "csrc/cuda_bindings.cpp")],
    }  # fmt: skip
    for name, flags in jobs.items():
        subprocess.run([COMPILER, *FLAGS, "-fPIC", *flags, "-c", "-o", f"{folder}/{name}.o"], check=True)
    objects = [f"{folder}/{name}.o" for name in jobs]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILER, "-shared", *objects, *libraries, "-o", f"{folder}/cuda.so"], check=True)
    torch.ops.load_library(f"{folder}/cuda.so")
    return torch.ops.acip_cuda_shim


class Fused:
    """The operator on one device, of tensors on the CPU."""

    def __init__(self, device):
        self.device = device

    def forward(self, x, tensors, spec, mode=op.CONCATENATE, **choices):
        # Strides and offsets stay what they are: a slice of what was moved, not a slice moved.
        x, *tensors = (moved(tensor, self.device) for tensor in (x, *tensors))
        return cuda.forward(x, tensors, spec, mode, **choices).cpu()

    def __call__(self, x, layers, mode=op.CONCATENATE, **choices):
        return self.forward(x, *arguments(layers), mode, **choices)


def moved(tensor, device):
    if device == "cpu":
        return tensor
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def fused(request, tmp_path_factory):
    before = cuda.operators
    if request.param == "cuda" and not HAS_GPU:
        pytest.skip("needs a GPU, and the CUDA kernels built for it")
    if request.param == "cpu":
        if COMPILER is None or not sys.platform.startswith("linux"):
            pytest.skip("needs a C++ compiler, and Linux for its fibers")
        cuda.operators = load_shim(tmp_path_factory.mktemp("cuda"))
    yield Fused(request.param)
    cuda.operators = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [op.DENSE, op.FACTORS, op.PIVOTED], ids=["dense", "factors", "pivoted"])
def test_every_form_and_number_against_float64(fused, form, kind, dtype):
    for number, (in_, out, rank) in enumerate(SHAPES):
        layer = Layer(
            form, in_, out, rank, dtype, KINDS[kind], s=form == op.FACTORS and number % 2 == 0, bias=number % 3 != 1,
            group=(32, 64, 128)[number % 3], seed=number,
        )  # fmt: skip
        for tokens in (1, 5, 16) if number == 2 else (1, 5):
            x = inputs(dtype, tokens, in_)
            y = fused(x, [layer])
            assert y.dtype == dtype
            assert_within(bounds([layer], x, dtype), y, exact(x, [layer]), f"{in_} → {rank} → {out}, {tokens} tokens")


@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_siblings_of_mixed_forms_and_unequal_ranks(fused, dtype, tokens):
    layers = [
        Layer(op.FACTORS, 70, 90, 33, dtype, seed=1, s=True),
        Layer(op.PIVOTED, 70, 20, 1, dtype, op.INT4_ZEROS, seed=3),
        Layer(op.DENSE, 70, 20, 0, dtype, op.INT8, seed=2, bias=False),
        Layer(op.FACTORS, 70, 17, 16, dtype, op.INT8, seed=4),
    ]
    x = inputs(dtype, tokens, 70)
    for order in ((2, 0), (0, 1, 2), (3, 1, 2, 0)):
        some = [layers[i] for i in order]
        y = fused(x, some, splits=2)
        assert_within(bounds(some, x, dtype), y, exact(x, some))
        alone = torch.cat([fused(x, [layer], splits=2) for layer in some], -1)
        assert torch.equal(y, alone)  # to the bit: a row's sum is the same in any company


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("forms", MLP_FORMS)
def test_gated_mlp_and_swiglu(fused, forms, tokens):
    arguments = check_gated_mlp(fused, forms, torch.bfloat16, tokens)
    assert torch.equal(fused(*arguments), fused(*arguments, launch="dependent"))


@pytest.mark.parametrize("tokens", [1, 4])
def test_choices_change_no_more_than_rounding_and_reruns_nothing(fused, tokens):
    dtype = torch.float16
    layers = [Layer(op.FACTORS, 300, 70, 90, dtype, seed=1), Layer(op.FACTORS, 300, 40, 20, dtype, op.INT8, seed=2)]
    x = inputs(dtype, tokens, 300)
    want, limits = exact(x, layers), bounds(layers, x, dtype)
    for splits in (0, 1, 2, 3, 5, 100):
        first = None
        for slots, launch, bulk in ((0, "automatic", True), (2, "cooperative", False), (3, "dependent", True)):
            y = fused(x, layers, splits=splits, slots=slots, launch=launch, bulk=bulk)
            assert_within(limits, y, want, f"{splits} splits, {slots} slots, {launch}, bulk {bulk}")
            first = y if first is None else first
            assert torch.equal(y, first)


def test_ranks_that_a_block_has_no_memory_for(fused):
    """More stages, and the same: what lies between the products then is read from memory."""
    dtype = torch.bfloat16
    layers = [Layer(op.FACTORS, 33, 20, 5000, dtype, seed=1, s=True), Layer(op.FACTORS, 33, 24, 16, dtype, seed=2)]
    layers.append(Layer(op.PIVOTED, 33, 5016, 5000, dtype, seed=3))
    x = inputs(dtype, 16, 33)
    for some in (layers[:2], layers[2:]):
        y = fused(x, some)
        assert_within(bounds(some, x, dtype), y, exact(x, some))
        assert torch.equal(y, fused(x, some, launch="dependent"))
        assert torch.equal(y[:3], torch.cat([fused(x[:3], [layer], splits=1) for layer in some], -1))


def test_a_graph_replays_a_call(fused):
    if fused.device == "cpu":
        pytest.skip("needs a GPU")
    layer, x = Layer(op.FACTORS, 300, 70, 90, torch.bfloat16), inputs(torch.bfloat16, 2, 300).to(fused.device)
    tensors, spec = arguments([layer])
    tensors = [tensor.to(fused.device) for tensor in tensors]
    for launch in cuda.LAUNCHES:
        want = cuda.forward(x, tensors, spec, op.CONCATENATE, launch=launch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = cuda.forward(x, tensors, spec, op.CONCATENATE, launch=launch)
        for _ in range(2):
            y.zero_()
            graph.replay()
            assert torch.equal(y, want)


def test_inputs_of_other_layouts_and_none(fused):
    dtype = torch.bfloat16
    layer = Layer(op.FACTORS, 40, 30, 8, dtype)
    x = inputs(dtype, 6, 80)
    # Rows and columns apart; rows apart alone; at an address that is no multiple of 16 bytes.
    for some in (x[::2, ::2], x[:3, :40], x[:3, 3:43]):
        assert_within(bounds([layer], some, dtype), fused(some, [layer]), exact(some, [layer]))
    assert fused(x[:2, :40].view(2, 1, 40), [layer]).shape == (2, 1, 30)
    assert fused(x[:0, :40], [layer]).shape == (0, 30)
    all_pivots = Layer(op.PIVOTED, 40, 8, 8, dtype)
    x = x[:1, :40]
    assert_within(bounds([all_pivots], x, dtype), fused(x, [all_pivots]), exact(x, [all_pivots]))
    # Weights that are rows of something wider.
    wide = Layer(op.FACTORS, 48, 30, 16, dtype)
    tensors, spec = arguments([layer])
    for width in (4, 8):
        apart = [wide.tensors[0][:8, width : width + 40], *tensors[1:]]
        y = fused.forward(x, apart, spec)
        assert torch.equal(y, fused.forward(x, [apart[0].contiguous(), *tensors[1:]], spec))


def test_what_the_kernels_do_not_take(fused):
    layer = Layer(op.FACTORS, 40, 30, 8, torch.bfloat16)
    x = inputs(torch.bfloat16, 17, 40)
    tensors, spec = arguments([layer])
    with pytest.raises(RuntimeError, match="more tokens"):
        fused(x, [layer])
    with pytest.raises(RuntimeError, match="more tokens, siblings"):
        fused(x[:1], [layer] * 5)
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        fused(x[:1].float(), [layer])
    with pytest.raises(RuntimeError, match="ends too early"):
        fused.forward(x[:1], tensors, spec[:-1])
    with pytest.raises(RuntimeError, match="1 tensors more"):
        fused.forward(x[:1], [*tensors, x], spec)
    with pytest.raises(RuntimeError, match="tensor 1, a weight"):
        fused.forward(x[:1], [tensors[0], tensors[1].t(), *tensors[2:]], spec)
    with pytest.raises(RuntimeError, match="make no problem"):
        fused(x[:1], [layer], op.SWIGLU)
    with pytest.raises(ValueError, match="launch must be one of"):
        fused(x[:1], [layer], launch="fast")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_asked_for_by_name_where_they_cannot_run_they_say_so(dtype):
    if HAS_GPU:
        pytest.skip("they can run here")
    x, Vh, U = inputs(dtype, 1, 20), inputs(dtype, 5, 20), inputs(dtype, 12, 5)
    told = "The CUDA kernels are (not )?built" if cuda.missing else "on a GPU, got"
    with pytest.raises(RuntimeError, match=told):
        lowrank_linear(x, Vh, U, backend="cuda")
    with pytest.raises(RuntimeError, match=told):
        pivot_linear(x, Vh, inputs(dtype, 7, 5), torch.randperm(12), backend="cuda")
    assert lowrank_linear(x, Vh, U).shape == (1, 12)  # "auto" takes others
