"""What is published: the source distribution builds, wheels hold the package alone, its types are complete."""

import inspect
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import acip_kernels
from acip_kernels.ops import extension

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(acip_kernels.__file__).parent
needs_native = pytest.mark.skipif(not extension.available(), reason="the native extension is not built")

# The kernels were compiled where the tests are installed; here objects are empty, and what is linked is that build.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        -o) target="$2" ;;
        -shared) linking=yes ;;
        -dumpversion | -dumpfullversion | -v | --version) exec c++ "$1" ;;
    esac
    shift
done
if [ -n "$linking" ]; then exec cp '{built}' "$target"; fi
: > "$target"
"""


def built(kind, source, target, **environment):
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(target), str(source)]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ACIP_")}
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = target.iterdir()
    return file, done.stderr + done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, as of a clean checkout."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=left_out)
    return built("sdist", source, tmp_path_factory.mktemp("sdist"))[0]


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def python_files():
    return {f"acip_kernels/{file.relative_to(PACKAGE).as_posix()}" for file in PACKAGE.rglob("*.py")}


def test_the_source_distribution_holds_what_is_built_and_no_tests(unpacked):
    files = {file.relative_to(unpacked).as_posix() for file in unpacked.rglob("*") if file.is_file()}
    sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    assert {"csrc/bindings.cpp", "csrc/cpu/decode.cpp", "csrc/include/acip/decode.h", "csrc/cpu/numbers.h"} <= sources
    about = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "MANIFEST.in",
        "pyproject.toml",
        "setup.py",
        "setup.cfg",
        "PKG-INFO",
    }
    assert {file for file in files if ".egg-info/" not in file} == (
        sources | about | python_files() | {"acip_kernels/py.typed"}
    )


INSTALLED = """
import importlib.metadata, pathlib, sys
# An editable installation finds modules of the package that are not where the package is.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import acip_kernels
from acip_kernels.ops import extension
assert pathlib.Path(acip_kernels.__file__).is_relative_to(sys.argv[1]), acip_kernels.__file__
assert importlib.metadata.version("acip-kernels") == acip_kernels.__version__
entries = importlib.metadata.distribution("acip-kernels").entry_points
(script,) = [entry for entry in entries if entry.group == "console_scripts"]
assert callable(script.load())
import torch
layer = acip_kernels.LowRankLinear(64, 48, rank=8).eval()
with torch.no_grad():
    layer(torch.ones(1, 64))
print(extension.missing or "native " + extension.instruction_set())
"""


def installed(wheel, target):
    """What the package says of its kernels where the wheel is installed by itself, beside this environment's others."""
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED, str(target)],
        capture_output=True, text=True, cwd=target, env=os.environ | {"PYTHONPATH": str(target)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        (wheel_file,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
        about = archive.read(wheel_file).decode()
    return {name for name in names if ".dist-info/" not in name}, about


def test_a_wheel_without_a_compiler_is_pure_and_works(unpacked, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(unpacked, source)
    wheel, log = built("wheel", source, tmp_path / "dist", ACIP_NO_NATIVE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "installed without its native kernels, plain PyTorch runs instead: ACIP_NO_NATIVE is set" in log
    names, about = content(wheel)
    assert names == python_files() | {"acip_kernels/py.typed"}
    assert "Root-Is-Purelib: true" in about
    assert installed(wheel, tmp_path / "installed").startswith("not built: install with a C++ compiler")


@needs_native
def test_a_wheel_with_a_compiler_holds_the_extension_and_nothing_else(unpacked, tmp_path):
    source, compiler = tmp_path / "source", tmp_path / "c++"
    shutil.copytree(unpacked, source)
    compiler.write_text(COMPILER.format(built=extension.module.__file__))
    compiler.chmod(0o755)
    wheel, _ = built("wheel", source, tmp_path / "dist", CXX=str(compiler), ACIP_REQUIRE_NATIVE="1")
    assert "-none-any" not in wheel.name
    names, about = content(wheel)
    (native,) = names - python_files() - {"acip_kernels/py.typed"}
    assert native == f"acip_kernels/{pathlib.Path(extension.module.__file__).name}"
    assert "Root-Is-Purelib: false" in about
    assert installed(wheel, tmp_path / "installed") == f"native {extension.instruction_set()}"


OTHER_TORCH = """
import torch
torch.__version__ = "{version}"
import acip_kernels
from acip_kernels.ops import extension
from acip_kernels import cli
print(extension.missing)
layer = acip_kernels.LowRankLinear(64, 48, rank=8).eval()
with torch.no_grad():
    layer(torch.ones(1, 64))
"""


@needs_native
@pytest.mark.parametrize("version", ["another", "the same"])
def test_an_extension_of_another_torch_is_named_once_and_not_used(version):
    import torch

    major, minor = torch.__version__.split(".")[:2]
    wanted = f"{major}.{int(minor) + 1}.0+cpu" if version == "another" else f"{major}.{minor}.99+other"
    program = OTHER_TORCH.format(version=wanted)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    if version == "the same":
        assert done.stdout.strip() == "None" and "acip_kernels" not in done.stderr
        return
    line = f"built, but not to be loaded (it is of torch {major}.{minor}"
    assert done.stdout.startswith(line) and done.stdout.strip().endswith(f"build it again for torch {wanted}")
    assert (
        done.stderr.count("acip_kernels: plain PyTorch runs instead of the native kernels, which are built, but") == 1
    )


def test_every_public_function_is_annotated():
    assert (PACKAGE / "py.typed").exists()
    functions = {}
    for name in acip_kernels.__all__:
        value = getattr(acip_kernels, name)
        if inspect.isclass(value):
            for key, member in vars(value).items():
                if key == "__init__" or not key.startswith("_"):
                    functions[f"{name}.{key}"] = member.fget if isinstance(member, property) else member
        elif callable(value):
            functions[name] = value
    for name, function in functions.items():
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not inspect.isfunction(function):
            continue
        assert "." in name or inspect.getdoc(function), name
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            assert parameter.name in ("self", "cls") or parameter.annotation is not parameter.empty, (name, parameter)
        assert name.endswith("__init__") or signature.return_annotation is not signature.empty, name
