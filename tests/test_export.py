"""Compressed models where this package is not: the same logits from stock PyTorch, transformers and onnxruntime."""

import re
import subprocess
import sys

import pytest
import torch
import toys
from torch import nn
from toys import assert_close, logits
from transformers import AutoModelForCausalLM

from acip_kernels import (
    LowRankLinear,
    PivotLinear,
    export_onnx,
    export_program,
    fuse,
    load,
    materialize,
    save,
    save_factors,
    to_plain,
)
from acip_kernels.compress.config import FORMS
from acip_kernels.ops import extension

IDS = toys.token_ids(3, 7)


@pytest.fixture(scope="module", params=toys.MODELS)
def result(request):
    return toys.toy_result(toys.MODELS[request.param]())


def numbers(model):
    return sum({id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}.values())


def assert_needs_nothing_of_ours(model):
    kinds = {type(module).__module__.partition(".")[0] for module in model.modules()}
    assert kinds <= {"torch", "transformers"}
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize(
    "options", [{}, {"forms": ("dense", "factors")}, {"forms": FORMS, "quantize": "int4", "quantize_group": 32}]
)
@pytest.mark.parametrize("form", ["dense", "factors"])
def test_plain_modules_compute_the_same(result, form, options):
    model = materialize(result, 0.5, **options)
    assert any(isinstance(module, LowRankLinear | PivotLinear) for module in model.modules())
    plain = to_plain(model, form)
    assert_needs_nothing_of_ours(plain)
    assert_close(logits(plain), logits(model))
    assert hasattr(model.config, "quantization_config")  # which stays as it was
    if form == "dense":
        assert numbers(plain) == numbers(toys.MODELS[plain.config.model_type.removesuffix("_text")]())


def test_a_fused_model_is_exported_as_it_computes():
    if not extension.available():
        pytest.skip("fusing is the native extension's")  # .ci/run requires it, so there nothing is skipped
    model = materialize(toys.toy_result(toys.llama()), 0.5)
    expected = logits(model)
    fuse(model)
    for form in ("dense", "factors"):
        plain = to_plain(model, form)
        assert_needs_nothing_of_ours(plain)
        assert not any("forward" in module.__dict__ for module in plain.modules())
        assert_close(logits(plain), expected)
    assert any("forward" in module.__dict__ for module in model.modules())


def test_what_factors_cost():
    """rank² for a pivoted layer, without its bits; never more than the dense matrix."""
    result = toys.toy_result(toys.llama())
    model = materialize(result, 0.7)
    plain = to_plain(model)
    pivoted = {name: module for name, module in model.named_modules() if isinstance(module, PivotLinear)}
    kinds = set()
    for name, layer in pivoted.items():
        out, in_, rank = layer.out_features, layer.in_features, layer.rank
        new = plain.get_submodule(name)
        kinds.add(type(new))
        assert sum(parameter.numel() for parameter in new.parameters()) == min(rank * (out + in_), out * in_)
        if type(new) is nn.Sequential:
            # Not one rounding: the same numbers, and rows of the identity.
            assert torch.equal(new[0].weight, layer.P.weight)
            assert torch.equal(new[1].weight[layer.pivots], torch.eye(rank))
            assert torch.equal(new[1].weight[~layer.pivots], layer.C.weight)
    assert kinds == {nn.Sequential, nn.Linear}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A directory of directories, and the logits that a process in which this package cannot be imported got of each.

    `NAME-factors` is loaded by the lines of its README.md, `NAME-dense` by from_pretrained.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.save(IDS, folder / "ids.pt")
    code = ["import os, sys", "sys.modules['acip_kernels'] = None", "import torch", "torch.set_num_threads(1)"]
    for name, make in toys.MODELS.items():
        model = materialize(toys.toy_result(make()), 0.5)
        if name == "llama":
            model.bfloat16()
        save(model, folder / name)
        model = load(folder / name)
        save_factors(model, folder / f"{name}-factors")
        save(to_plain(model, "dense"), folder / f"{name}-dense")
        (lines,) = re.findall(r"```python\n(.*?)```", (folder / f"{name}-factors" / "README.md").read_text(), re.DOTALL)
        stock = (
            "from transformers import AutoModelForCausalLM\n"
            "model, about = AutoModelForCausalLM.from_pretrained('.', output_loading_info=True)\n"
            "assert not any(about.values()), about\n"
        )
        for kind, loader in (("factors", lines), ("dense", stock)):
            code += [
                f"os.chdir({str(folder / f'{name}-{kind}')!r})\n{loader}",
                "with torch.no_grad(): torch.save(model(input_ids=torch.load('../ids.pt')).logits, 'logits.pt')",
            ]
    run = [sys.executable, "-c", "\n".join(code)]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", toys.MODELS)
def test_stock_pytorch_and_transformers_compute_the_same_elsewhere(elsewhere, name):
    model = load(elsewhere / name)
    for kind in ("factors", "dense"):
        with torch.no_grad():
            expected = to_plain(model, kind)(input_ids=IDS).logits
        assert torch.equal(torch.load(elsewhere / f"{name}-{kind}" / "logits.pt"), expected)


def test_from_pretrained_makes_no_random_layers_of_factors(elsewhere):
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(elsewhere / "llama-factors")


def test_a_program_of_torch_export_has_free_sizes_and_plain_operators(tmp_path):
    model = materialize(toys.toy_result(toys.llama()), 0.5)
    torch.export.save(export_program(model), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith(("aten.", "<built-in", "<function")) for target in targets)
    for batch, length in ((3, 7), (1, 1), (2, 12)):
        ids = toys.token_ids(batch, length)
        with torch.no_grad():
            assert_close(program.module()(ids, torch.ones_like(ids)), model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_onnxruntime_computes_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is what runs the export (extra: test)")
    onnx = pytest.importorskip("onnx", reason="the exporter needs it (extra: onnx)")
    model = materialize(toys.toy_result(toys.MODELS[name]()), 0.5)
    export_onnx(model, tmp_path / "onnx")
    held = onnx.load(tmp_path / "onnx" / "model.onnx").graph.initializer
    floats = sum(torch.Size(one.dims).numel() for one in held if one.data_type == onnx.TensorProto.FLOAT)
    # Pivoted layers stay as small as they are; a tied matrix is there again, transposed.
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert floats < 1.02 * numbers(model) + tied * model.get_input_embeddings().weight.numel()
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [one.shape for one in session.get_inputs()] == [["batch", "sequence"]] * 2
    for batch, length in ((3, 7), (1, 1)):
        ids = toys.token_ids(batch, length)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        # What a padding token itself computes is nobody's business.
        assert_close(torch.from_numpy(found)[mask.bool()], expected[mask.bool()])


def test_mistakes_are_named(tmp_path, monkeypatch):
    result = toys.toy_result(toys.llama())
    for call in (to_plain, export_program, lambda model: save_factors(model, tmp_path / "a")):
        with pytest.raises(ValueError, match=r"cut one first, by materialize"):
            call(result.model)
    with pytest.raises(ValueError, match="form must be dense or factors, got 'onnx'"):
        to_plain(materialize(result, 0.5), "onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RuntimeError, match=r"needs the package onnxscript: pip install 'acip-kernels\[onnx\]'"):
        export_onnx(materialize(result, 0.5), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
