"""Dropout on a GPU, and an adapter's products with a dropped input, in Triton's interpreter where there is no GPU."""

import contextlib
import types

import pytest
import torch

pytest.importorskip("triton")

from acip_kernels.ops import dropout, triton_dropout, triton_products

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter cuts bfloat16 off where a GPU rounds it: twice the error.
ROUNDINGS = 1 if DEVICE.type == "cuda" else 2
SEED, P = 2**62 + 123456789, 0.1
RANDOM = torch.tensor([SEED], device=DEVICE), dropout.threshold(P), 1 / (1 - P)
# The last one's gradient is made in four parts.
SHAPES = [(1, 5, 1), (70, 130, 20), (300, 257, 32), (129, 64, 33), (1100, 48, 5)]
HALVES = [torch.bfloat16, torch.float16]


def random(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def kept(x):
    return dropout.keeps(SEED, x.numel(), P, x.device).view_as(x)


def dropped(x):
    """In float64, of what the rounded dropped input is."""
    return torch.where(kept(x), x.float() * (1 / (1 - P)), 0.0).to(x.dtype).double()


def epsilon(dtype):
    return torch.finfo(dtype).eps / 2 * ROUNDINGS


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("elements", [1, 7, 5000])
def test_it_drops_what_the_definition_drops(dtype, elements):
    x = random(elements, dtype=dtype)
    y = triton_dropout.run(x, torch.full_like(x, torch.nan), *RANDOM, add=False)
    assert torch.equal(y != 0, kept(x) & (x != 0))
    bound = dropped(x).abs() * epsilon(dtype) * 2
    assert ((y.double() - dropped(x)).abs() <= bound).all()
    to = random(elements, dtype=dtype)
    want = to.double() + dropped(x)
    triton_dropout.run(x, to, *RANDOM, add=True)
    assert ((to.double() - want).abs() <= (want.abs() + dropped(x).abs()) * epsilon(dtype) * 2).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("tokens", "columns", "rank"), SHAPES)
def test_products_against_float64(dtype, tokens, columns, rank):
    x, A = random(tokens, columns, dtype=dtype), random(rank, columns, dtype=dtype)
    h = random(tokens, rank + 7, dtype=dtype)[:, :rank]  # rows apart, as in a layer's joined matrices
    d, summed = dropped(x), torch.finfo(torch.float32).eps

    z = torch.full((tokens, rank + 9), torch.nan, dtype=dtype, device=DEVICE)
    triton_dropout.product(x, A, z[:, :rank], *RANDOM)
    sizes = d.abs() @ A.double().abs().t()
    # Where the interpreter cuts off, what was dropped is another number by a rounding.
    bound = sizes * (columns * summed + epsilon(dtype) * (2 + ROUNDINGS))
    assert ((z[:, :rank].double() - d @ A.double().t()).abs() <= bound).all() and z[:, rank:].isnan().all()

    gradient = triton_dropout.gradient(h, x, *RANDOM)
    assert gradient.dtype == torch.float32 and gradient.shape == (rank, columns)
    bound = h.double().abs().t() @ d.abs() * (tokens * summed + epsilon(dtype) * ROUNDINGS)
    assert ((gradient.double() - h.double().t() @ d).abs() <= bound).all()
    assert torch.equal(gradient, triton_dropout.gradient(h, x, *RANDOM))

    to = random(tokens, columns, dtype=dtype)
    before, part = to.double(), h.double() @ A.double()
    triton_dropout.add_product(to, h, A, *RANDOM)
    sizes = before.abs() + h.double().abs() @ A.double().abs() / (1 - P)
    bound = sizes * (rank * summed + 4 * epsilon(dtype))
    assert ((to.double() - before - torch.where(kept(x), part / (1 - P), 0.0)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compositions_are_the_same_function(dtype):
    """What is taken on a CPU, or in float32: the products of a dropped input."""
    x, A, h = random(70, 130, dtype=dtype), random(20, 130, dtype=dtype), random(70, 20, dtype=dtype)
    seed, z = torch.tensor([SEED]), torch.empty(70, 20, dtype=dtype, device=DEVICE)
    x, A, h, z = (t.cpu() for t in (x, A, h, z))
    d = dropout.drop(x, P, seed)
    assert torch.equal(dropout.dropped_product(x, A, P, seed, out=z), d @ A.t())
    assert torch.equal(dropout.dropped_gradient(h, x, P, seed), h.t() @ d)
    to = torch.ones_like(x)
    want = dropout.add_dropped(torch.ones_like(x), h @ A, P, seed)
    assert torch.equal(dropout.add_dropped_product(to, h, A, P, seed), want)


def test_a_launch_is_looked_up_once(monkeypatch):
    """Arguments of one kind go to what was compiled; another kind is asked for, and so is another option."""
    asked, run = [], []

    class Kernel:
        arg_names = ("x", "count", "scale", "BLOCK")

        def __getitem__(self, grid):
            def call(*arguments, **options):
                asked.append((grid, arguments, options))
                return {(3, 1, 1): lambda *values: run.append(values)}

            return call

    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(triton_products, "_compiled", {})
    x, kernel = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)), Kernel()

    def launch(count, memory, block=64, scale=1.5):
        triton_products.launch(kernel, (3,), x, memory, count, scale, BLOCK=block)

    memory = torch.zeros(64)
    assert memory.data_ptr() % 16 == 0
    launch(48, memory)
    launch(32, memory, scale=2.5)  # a multiple of 16 as well
    assert len(asked) == 1 and [values[1:] for values in run] == [(32, 2.5, 64)]
    for number, other in enumerate(
        ((33, memory), (1, memory), (2**31, memory), (48, memory[1:]), (48, memory.bool()), (48, memory, 128))
    ):
        launch(*other)
        assert len(asked) == 2 + number
        launch(*other)
        assert len(asked) == 2 + number and len(run) == 2 + number
