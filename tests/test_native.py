"""The native kernels by themselves, under every instruction set that this processor has; and life without them."""

import itertools
import os
import pathlib
import subprocess
import sys

import operators
import pytest
import torch
from operators import error_bound, precise

from acip_kernels.ops import dropout, extension

ROOT = pathlib.Path(__file__).parent.parent
needs_native = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")
one_thread = operators.one_thread  # a fixture of every test here


isa = operators.isa  # a fixture


def numbers(*shape, dtype, seed=0):
    return operators.numbers(torch.Generator().manual_seed(seed), *shape, dtype=dtype)


def strided(tensor):
    """The same values in rows that lie in a wider matrix full of NaN."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), float("nan"), dtype=tensor.dtype)
    wide[:, 3 : 3 + tensor.shape[1]] = tensor
    return wide[:, 3 : 3 + tensor.shape[1]]


SHAPES = [(1, 1), (3, 7), (65, 64), (31, 65), (100, 33), (0, 5), (4, 200)]


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaling_and_the_mask_gradient(isa, shape, dtype):
    z, h = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    s = numbers(shape[1], dtype=precise(dtype), seed=2)
    s[::3] = 0
    bad = s == 0
    z[:, bad] = float("nan")  # of a pruned entry nothing counts
    h[:, bad] = float("inf")
    exact = torch.where(bad, 0, z.double() * s.double())
    scaled = torch.ops.acip.scale_ranks(strided(z), s)
    assert scaled.dtype == dtype and torch.equal(scaled, exact.to(precise(dtype)).to(dtype))

    target, kept = strided(h), h.clone()
    sums = torch.ops.acip.mask_gradient_(strided(z), target, s)
    assert torch.equal(target, torch.where(bad, 0, kept.double() * s.double()).to(precise(dtype)).to(dtype))
    products = torch.where(bad, 0, z.double() * kept.double())
    bound = error_bound(precise(dtype), products.abs().sum(0), roundings=0, sums=shape[0] + 2)
    operators.assert_within(bound, sums, products.sum(0))
    assert torch.count_nonzero(sums[bad]) == 0


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
def test_dropout_is_the_same_everywhere(isa, p, dtype):
    for elements in (0, 1, 7, 1000, 100_003):
        x, seed = numbers(elements, dtype=dtype), torch.tensor([2**61 + 77])
        kept = dropout.keeps(int(seed), elements, p)
        expected = torch.where(kept, x.to(precise(dtype)) * (1 / (1 - p)), 0).to(dtype)
        assert torch.equal(dropout.drop(x, p, seed), expected)
        to = numbers(elements, dtype=dtype, seed=3)
        scaled = torch.where(kept, x.to(precise(dtype)) * (1 / (1 - p)), 0)
        # One multiplication and one addition, which may be fused.
        exact = to.double() + torch.where(kept, x.double() * (1 / (1 - p)), 0)
        magnitude = to.double().abs() + scaled.double().abs()
        operators.assert_within(
            error_bound(dtype, magnitude, roundings=1, sums=3), dropout.add_dropped(to, x, p, seed), exact
        )


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 1023, 1025, 5000])
def test_cross_entropy(isa, classes, dtype):
    logits = numbers(5, classes, dtype=dtype) * 30
    labels = torch.tensor([0, classes - 1, -100, classes // 2, 0])
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum() * 0.5, exact)
    loss = torch.ops.acip.cross_entropy_(logits, labels, -100, 0.5)
    eps = torch.finfo(precise(dtype)).eps
    # An argument of up to 60 is rounded to half an ulp before it is exponentiated; sums of 64 lie behind each other.
    relative = eps * (60 + 64 + 8)
    span = exact.detach().amax(1) - exact.detach().amin(1) + 1
    assert ((loss.double() - losses.detach()).abs() <= relative * span).all()
    bound = (relative + torch.finfo(dtype).eps / 2) * gradient.abs() + 2 * relative * 0.5 * (labels != -100)[:, None]
    operators.assert_within(bound, logits, gradient)
    assert torch.count_nonzero(logits[2]) == 0 and loss[2] == 0


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 1023, 1025, 5000])
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_soft_cross_entropy(isa, classes, dtype, w):
    logits, teacher = numbers(4, classes, dtype=dtype) * 30, numbers(4, classes, dtype=dtype, seed=1) * 20
    labels = torch.tensor([0, classes - 1, classes // 2, 0])
    exact, log_p = logits.double().requires_grad_(), teacher.double().log_softmax(1)
    log_q = exact.log_softmax(1)
    hard = torch.nn.functional.nll_loss(log_q, labels, reduction="none")
    losses = (1 - w) * hard + w * (log_p.exp() * (log_p - log_q)).sum(1)
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    loss = torch.ops.acip.soft_cross_entropy_(logits, teacher, labels, w)
    # As above; the divergence is a sum of differences of both logits, whose weights are exponentials and a sum's.
    relative = torch.finfo(precise(dtype)).eps * (60 + 64 + 8)
    spans = [t.detach().double().amax(1) - t.detach().double().amin(1) + 1 for t in (exact, teacher)]
    assert ((loss.double() - losses.detach()).abs() <= 2 * relative * (spans[0] + w * spans[1])).all()
    magnitude = log_q.detach().exp() + w * log_p.exp() + (1 - w) * torch.nn.functional.one_hot(labels, classes)
    bound = relative * magnitude + torch.finfo(dtype).eps / 2 * gradient.abs() + relative**2
    operators.assert_within(bound, logits, gradient)


@needs_native
def test_a_logit_that_is_no_number_is_no_finite_loss(isa):
    for bad, at in itertools.product((float("nan"), float("inf")), (0, 7)):
        logits, label = numbers(1, 40, dtype=torch.float32), torch.tensor([3])
        of_student, of_teacher, bad_logits = logits.clone(), logits.clone(), logits.clone()
        bad_logits[0, at] = bad
        assert not torch.isfinite(torch.ops.acip.soft_cross_entropy_(of_student, bad_logits, label, 0.5)).any()
        bad_student = bad_logits.clone()
        assert not torch.isfinite(torch.ops.acip.soft_cross_entropy_(bad_student, of_teacher, label, 0.5)).any()
        assert not torch.isfinite(torch.ops.acip.cross_entropy_(bad_logits, label, -100, 1.0)).any()


@needs_native
@pytest.mark.parametrize("dtype", extension.DTYPES, ids=str)
def test_two_threads_give_the_bits_of_one(isa, dtype):
    def everything():
        z, h, s = (numbers(*shape, dtype=kind, seed=5) for shape, kind in
                   (((300, 700), dtype), ((300, 700), dtype), ((700,), precise(dtype))))  # fmt: skip
        logits = numbers(300, 700, dtype=dtype)
        loss = torch.ops.acip.cross_entropy_(logits, torch.arange(300), -100, 1.0)
        student, teacher = numbers(300, 700, dtype=dtype, seed=6), numbers(300, 700, dtype=dtype, seed=7)
        soft = torch.ops.acip.soft_cross_entropy_(student, teacher, torch.arange(300), 0.5), student
        scaled = torch.ops.acip.scale_ranks(z, s)
        dropped = dropout.drop(z, 0.3, torch.tensor([5]))
        return scaled, torch.ops.acip.mask_gradient_(z, h, s), h, dropped, loss, logits, *soft

    one = everything()
    with operators.threads(2):
        two = everything()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_native
@pytest.mark.parametrize(
    "call",
    [
        lambda ops: ops.scale_ranks(torch.ones(3), torch.ones(3)),
        lambda ops: ops.scale_ranks(torch.ones(3, 4), torch.ones(3)),
        lambda ops: ops.scale_ranks(torch.ones(3, 4), torch.ones(4).double()),
        lambda ops: ops.scale_ranks(torch.ones(4, 3).t(), torch.ones(4)),
        lambda ops: ops.scale_ranks(torch.ones(3, 4).half(), torch.ones(4)),
        lambda ops: ops.mask_gradient_(torch.ones(3, 4), torch.ones(2, 4), torch.ones(4)),
        lambda ops: ops.mask_gradient_(torch.ones(3, 4), torch.ones(3, 4).double(), torch.ones(4)),
        lambda ops: ops.dropout(torch.ones(4, 3).t(), 1, 5, 1.0),
        lambda ops: ops.dropout(torch.ones(4), 1, -5, 1.0),
        lambda ops: ops.dropout_add_(torch.ones(4), torch.ones(5), 1, 5, 1.0),
        lambda ops: ops.cross_entropy_(torch.ones(2, 4), torch.tensor([0, 4]), -100, 1.0),
        lambda ops: ops.cross_entropy_(torch.ones(2, 4), torch.tensor([0, -1]), -100, 1.0),
        lambda ops: ops.cross_entropy_(torch.ones(2, 4), torch.tensor([0]), -100, 1.0),
        lambda ops: ops.cross_entropy_(torch.ones(2, 4), torch.tensor([0.0, 1.0]), -100, 1.0),
        lambda ops: ops.cross_entropy_(torch.ones(2, 0), torch.tensor([-100, -100]), -100, 1.0),
        lambda ops: ops.soft_cross_entropy_(torch.ones(2, 4), torch.ones(2, 4), torch.tensor([0, -100]), 0.5),
        lambda ops: ops.soft_cross_entropy_(torch.ones(2, 4), torch.ones(2, 5), torch.tensor([0, 1]), 0.5),
        lambda ops: ops.soft_cross_entropy_(torch.ones(2, 4), torch.ones(2, 4).double(), torch.tensor([0, 1]), 0.5),
        lambda ops: ops.soft_cross_entropy_(torch.ones(2, 4), torch.ones(4, 2).t(), torch.tensor([0, 1]), 0.5),
        lambda ops: ops.soft_cross_entropy_(*[torch.ones(2, 4)] * 2, torch.tensor([0, 1]), 0.5),
    ],
)
def test_wrong_arguments_raise(call):
    with pytest.raises(RuntimeError):
        call(torch.ops.acip)


@needs_native
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no kernels for sse9"):
        extension.module.use_isa("sse9")


BROKEN = """
import sys
class Finder:  # an extension that was built for another torch
    def find_spec(self, name, path=None, target=None):
        if name == "acip_kernels._native":
            raise ImportError("undefined symbol: of_another_torch")
sys.meta_path.insert(0, Finder())
import acip_kernels
from acip_kernels.ops import extension
assert not extension.available()
assert "undefined symbol: of_another_torch" in extension.missing and "build it again for torch" in extension.missing
"""


def test_an_extension_that_cannot_be_loaded_is_not_called_not_built():
    subprocess.run([sys.executable, "-c", BROKEN], check=True, cwd=ROOT)


WITHOUT = """
import sys
sys.modules["acip_kernels._native"] = None
import torch, acip_kernels
from acip_kernels.ops import extension
assert not extension.available() and extension.instruction_set() is None
assert extension.missing.startswith("not built")
layer = acip_kernels.SVDLinear.from_linear(torch.nn.Linear(8, 6), adapter_rank=2, adapter_dropout=0.5)
layer(torch.ones(3, 8)).sum().backward()
assert layer.mask.grad.abs().sum() > 0
layer.backend = "native"
try:
    layer(torch.ones(3, 8))
except RuntimeError as error:
    assert "'native' is not available in this installation" in str(error)
    assert "The native kernels are not built: install with a C++ compiler" in str(error)
else:
    raise SystemExit("a backend that is not there ran")
"""


def test_without_the_extension_the_reference_runs_and_its_name_raises():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, cwd=ROOT)


@pytest.mark.parametrize("fault", ["no compiler", "switched off"])
def test_a_failed_build_is_one_line_and_no_failed_installation(tmp_path, fault):
    change = {"CXX": "/nonexistent/c++"} if fault == "no compiler" else {"ACIP_NO_NATIVE": "1"}
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}/lib"]
    environment = {name: value for name, value in os.environ.items() if name != "ACIP_REQUIRE_NATIVE"}
    done = subprocess.run(command, cwd=ROOT, env=environment | change, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("acip_kernels: ")]
    assert len(lines) == 1 and "plain PyTorch runs instead" in lines[0]


def test_who_requires_the_extension_gets_a_failure(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}/lib"]
    environment = os.environ | {"CXX": "/nonexistent/c++", "ACIP_REQUIRE_NATIVE": "1"}
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode != 0
