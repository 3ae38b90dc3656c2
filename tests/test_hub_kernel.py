"""The package's operators and layers in the layout of Hugging Face's `kernels`: structure, and that they run."""

import ast
import base64
import hashlib
import importlib.util
import pathlib
import re
import runpy
import sys

import pytest
import torch
import toys
from torch import nn

import acip_kernels
from acip_kernels import LowRankLinear, PivotLinear, files, hub_kernel, materialize


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel") / "acip-kernels"
    hub_kernel.write_kernel(path)
    return path


@pytest.fixture(scope="module")
def kernel(repository):
    """As `kernels` imports a build variant, whether that is installed or not."""
    folder = repository / "build" / "torch-cpu"
    identity = files.read_json(folder / "metadata.json")["id"]
    spec = importlib.util.spec_from_file_location(identity, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[identity] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backend", hub_kernel.BACKENDS)
def test_a_variant_is_as_the_requirements_say(repository, backend):
    folder = repository / "build" / f"torch-{backend}"
    metadata = files.read_json(folder / "metadata.json")
    assert metadata["name"] == "acip-kernels" and metadata["backend"] == {"type": backend}
    assert isinstance(metadata["version"], int) and metadata["license"] == "Apache-2.0"
    identity = metadata["id"]
    assert identity.isidentifier() and backend in identity
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    del found["metadata.json"]
    assert "__init__.py" in found and all(name.endswith(".py") for name in found)
    assert metadata["digest"] == {
        "algorithm": "sha256",
        "files": {n: base64.b64encode(hashlib.sha256(f.read_bytes()).digest()).decode() for n, f in found.items()},
    }
    for name, file in found.items():
        text = file.read_text("utf-8")
        # Operators in the kernel's own namespace, and no other name of the package.
        assert not re.search(r"acip::|ops\.acip\b|import acip_kernels|from acip_kernels", text), name
        depth = name.count("/")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level <= depth + 1, f"{name} imports from outside the kernel"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                # Functions of files.py that kernels do not call import it when they are called.
                lazy = {"safetensors"} if name == "files.py" and node.col_offset else set()
                roots = {one.partition(".")[0] for one in names} - lazy
                assert roots <= {"torch", "triton", *sys.stdlib_module_names}, f"{name} imports {roots}"


def test_the_same_sources_are_the_same_kernel_and_others_another(repository, tmp_path, monkeypatch):
    hub_kernel.write_kernel(tmp_path / "again")
    contents = [
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (repository, tmp_path / "again")
    ]
    assert contents[0] == contents[1]
    changed = hub_kernel.sources() | {"plan.py": "# another"}
    monkeypatch.setattr(hub_kernel, "sources", lambda: changed)
    hub_kernel.write_kernel(tmp_path / "other")
    one, other = (files.read_json(root / "build/torch-cpu/metadata.json") for root in (repository, tmp_path / "other"))
    assert one["id"] != other["id"]


def test_its_operators_are_those_of_the_package(kernel):
    torch.manual_seed(0)
    x, Vh, U = (torch.randn(shape, requires_grad=True) for shape in ((3, 20), (5, 20), (12, 5)))
    s, bias = torch.rand(5, requires_grad=True), torch.randn(12, requires_grad=True)
    results = []
    for package in (kernel, acip_kernels):
        y = package.lowrank_linear(x, Vh, U, s, bias, backend="reference")
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, Vh, U, s, bias))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    namespace = getattr(torch.ops, kernel.__name__)
    assert torch.equal(namespace.lowrank_linear(x, Vh, U, s, bias, "reference"), results[0][0])
    assert set(kernel.__all__) <= set(dir(kernel))
    with pytest.raises(RuntimeError, match="'native' is not available.*not built"):
        kernel.lowrank_linear(x, Vh, U, backend="native")


def test_its_triton_kernels_run(kernel):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    x, Vh, U = torch.randn(2, 20), torch.randn(5, 20), torch.randn(12, 5)
    y = kernel.lowrank_linear(x, Vh, U, backend="triton")
    torch.testing.assert_close(y, acip_kernels.lowrank_linear(x, Vh, U, backend="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["LowRankLinear", "PivotLinear"])
def test_its_modules_and_layers_are_those_of_the_package(kernel, kind):
    torch.manual_seed(0)
    ours = getattr(acip_kernels, kind)(20, 12, 5)
    theirs = getattr(kernel, kind)(20, 12, 5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 20)
    with torch.enable_grad():
        expected = ours(x).detach()
    forward = getattr(kernel.layers, kind).forward
    with torch.no_grad():
        for y in (theirs(x), forward(ours, x), forward(theirs, x)):
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        # What hangs on a child is honoured.
        child = next(ours.children())
        child.register_forward_hook(lambda module, args, output: 2 * output)
        torch.testing.assert_close(forward(ours, x), ours(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(forward(ours, x), expected, atol=1e-2)


def test_a_layer_without_state_as_kernelize_asks(kernel):
    for layer in (kernel.layers.LowRankLinear, kernel.layers.PivotLinear):
        assert layer.__init__ is nn.Module.__init__
        assert set(dir(layer)) - set(dir(nn.Module)) <= {"can_torch_compile", "has_backward"}


def test_kernels_loads_it(repository):
    kernels = pytest.importorskip("kernels")
    kernel = kernels.get_local_kernel(repository)
    x, Vh, U = torch.randn(2, 20), torch.randn(5, 20), torch.randn(12, 5)
    assert torch.equal(kernel.lowrank_linear(x, Vh, U), acip_kernels.lowrank_linear(x, Vh, U, backend="reference"))
    (loaded,) = [one for one in kernels.get_loaded_kernels() if one.module is kernel]
    assert str(loaded.metadata.name) == "acip-kernels"
    from kernels._rust import Digest, DigestAlgorithm

    folder = pathlib.Path(kernel.__file__).parent
    loaded.metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))


def test_kernelize_puts_its_layers_on_a_model(repository, monkeypatch):
    kernels = pytest.importorskip("kernels")
    model = materialize(toys.toy_result(toys.llama()), 0.6).eval()
    expected = toys.logits(model)
    classes = {LowRankLinear, PivotLinear}
    repositories = {}
    for kind in classes:
        for name in ("kernel_layer_name", "can_torch_compile"):  # what is put on the class goes off again
            monkeypatch.setattr(kind, name, None, raising=False)
        kernels.replace_kernel_forward_from_hub(kind, kind.__name__)
        repositories[kind.__name__] = {"cpu": kernels.LocalLayerRepository(repository, layer_name=kind.__name__)}
    with kernels.use_kernel_mapping(repositories, inherit_mapping=False):
        kernels.kernelize(model, device="cpu", mode=kernels.Mode.INFERENCE)
    layers = [module for module in model.modules() if type(module) in classes]
    assert layers and all("torch-cpu" in module.forward.__func__.__code__.co_filename for module in layers)
    toys.assert_close(toys.logits(model), expected)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hub_kernel", str(tmp_path / "out")])
    monkeypatch.delitem(sys.modules, "acip_kernels.hub_kernel")
    for code in (0, f"error: {tmp_path / 'out'} exists and is not empty; give another directory or allow overwriting"):
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("acip_kernels.hub_kernel", run_name="__main__")
        assert stop.value.code == code
    assert "get_local_kernel" in capsys.readouterr().out
    assert (tmp_path / "out" / "build" / "torch-cpu" / "metadata.json").exists()
