"""The vLLM plugin, on a stand-in of vLLM's interfaces: what is loaded, what is computed, what is refused."""

import importlib
import itertools
import json
import logging
import re
import sys

import operators
import pytest
import torch
import toys
import vllm_stand_in
from operators import error_bound
from safetensors.torch import load_file
from torch import nn
from vllm_stand_in import PACKED, PARALLEL

import acip_kernels
from acip_kernels import LowRankLinear, PivotLinear
from acip_kernels.ops.quantize import Scheme
from bench.readme import ROOT

IN = 14
# Form, outputs and rank of a layer's parts.
PARTS = {
    "factors": [("factors", 9, 4)],
    "pivoted": [("pivoted", 10, 3)],
    "pivots alone": [("pivoted", 5, 5)],
    "rank 0": [("factors", 6, 0)],
    "unequal ranks": [("factors", 12, 7), ("factors", 6, 1), ("factors", 6, 3)],
    "all forms": [("dense", 8, None), ("pivoted", 6, 4), ("factors", 6, 2)],
    "gate and up": [("pivoted", 11, 5), ("dense", 11, None)],
    "rank 0 beside dense": [("factors", 8, 0), ("dense", 4, None), ("pivoted", 4, 1)],
}
ROWS = ((0,), (1,), (5,), (2, 3))


@pytest.fixture
def vllm():
    with vllm_stand_in.installed() as stand_in:
        yield stand_in


def module(form, out, rank, bias, dtype, seed, in_=IN):
    """A layer as it is in a checkpoint, random."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return operators.numbers(generator, *shape, dtype=dtype)

    own = numbers(out) if bias else None
    if form == "dense":
        layer = nn.Linear(in_, out, bias, dtype=dtype)
        layer.weight.data.copy_(numbers(out, in_))
        if bias:
            layer.bias.data.copy_(own)
        return layer
    if form == "factors":
        return LowRankLinear.from_factors(numbers(rank, in_), numbers(out, rank), own)
    pivots = torch.zeros(out, dtype=torch.bool)
    pivots[torch.randperm(out, generator=generator)[:rank]] = True
    return PivotLinear.from_parts(numbers(rank, in_), numbers(out - rank, rank), pivots, own)


@torch.no_grad()
def exact(layer, x, magnitude=False):
    """What a layer computes in float64; magnitude: of the absolute values of everything."""
    value = (lambda tensor: tensor.double().abs()) if magnitude else (lambda tensor: tensor.double())
    if isinstance(layer, nn.Linear):
        y, bias = value(x) @ value(layer.weight).t(), layer.bias
    elif isinstance(layer, LowRankLinear):
        y, bias = value(x) @ value(layer.Vh.weight).t() @ value(layer.U.weight).t(), layer.U.bias
    else:
        Vh, U = layer.factors(torch.float64)
        y, bias = value(x) @ value(Vh).t() @ value(U).t(), layer.bias
    return y if bias is None else y + value(bias)


def assert_near(y, layers, x, dtype):
    expected = torch.cat([exact(layer, x) for layer in layers], -1)
    magnitude = torch.cat([exact(layer, x, magnitude=True) for layer in layers], -1)
    assert y.dtype == dtype and y.shape == expected.shape
    # z, its product and the bias's sum are rounded.
    bound = error_bound(dtype, magnitude, roundings=3, sums=2 * x.shape[-1])
    assert bool(((y.double() - expected).abs() <= bound).all())


def modules(parts, *, bias=False, dtype=torch.float32, in_=IN):
    return [module(*part, bias, dtype, seed, in_) for seed, part in enumerate(parts)]


def config_of(vllm, layers, prefix, merged):
    """The plugin's configuration for one layer of vLLM, and the names of its parts in the checkpoint."""
    from acip_kernels.serving import vllm as plugin

    names = [f"{prefix}.{name}" for name in merged] if merged else [prefix]
    ranks = {name: layer.rank for name, layer in zip(names, layers) if not isinstance(layer, nn.Linear)}
    pivoted = [name for name, layer in zip(names, layers) if isinstance(layer, PivotLinear)]
    config = plugin.AcipVllmConfig.from_config({"quant_method": "acip", "ranks": ranks, "pivoted": pivoted})
    config.packed_modules_mapping = PACKED
    return config, names


def tensors(names, layers):
    for name, layer in zip(names, layers):
        for key, tensor in sorted(layer.state_dict().items()):
            yield f"{name}.{key}", tensor.clone()


class Tree(nn.Module):
    """A model with one layer, under its name in vLLM."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in layers.items():
            *parents, last = name.split(".")
            here = self
            for parent in parents:
                if parent not in here._modules:
                    here.add_module(parent, nn.Module())
                here = here._modules[parent]
            here.add_module(last, layer)


def merged_layer(vllm, layers, *, bias=False, dtype=torch.float32, load="load_by_parameters", kv_heads=None, head=1):
    """vLLM's layer of these parts, loaded."""
    if len(layers) == 3:
        prefix, last = "layers.0.self_attn", "qkv_proj"
    else:
        prefix, last = "layers.0.mlp", "gate_up_proj"
    config, names = config_of(vllm, layers, prefix, PACKED[last])
    in_, outs = layers[0].in_features, [layer.out_features for layer in layers]
    options = (bias, dtype, config, f"{prefix}.{last}")
    if kv_heads is None:
        layer = vllm.MergedColumnParallelLinear(in_, outs, *options)
        if len(layers) == 3:
            layer = vllm.QKVParallelLinear(in_, 2, outs[0] // 2, outs[1] // 2, *options)
    else:
        layer = vllm.QKVParallelLinear(in_, head, outs[0] // head, kv_heads, *options)
    tree = Tree({f"{prefix}.{last}": layer})
    getattr(vllm, load)(tree, tensors(names, layers))
    vllm.finish(tree)
    return layer


def single_layer(vllm, layer, kind, *, bias=False, dtype=torch.float32, load="load_by_parameters"):
    prefix = "layers.0.mlp.down_proj"
    config, names = config_of(vllm, [layer], prefix, ())
    if kind == "row":
        made = vllm.RowParallelLinear(layer.in_features, layer.out_features, bias, dtype, config, prefix)
    else:
        made = vllm.ColumnParallelLinear(layer.in_features, [layer.out_features], bias, dtype, config, prefix)
    tree = Tree({prefix: made})
    getattr(vllm, load)(tree, tensors(names, [layer]))
    vllm.finish(tree)
    return made


def inputs(rows, dtype, in_=IN):
    return operators.numbers(torch.Generator().manual_seed(9), *rows, in_, dtype=dtype)


@pytest.mark.parametrize("load", ("load_by_parameters", "load_by_modules"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("parts", PARTS)
def test_a_layer_computes_what_the_checkpoint_says(vllm, parts, bias, dtype, load):
    layers = modules(PARTS[parts], bias=bias, dtype=dtype)
    options = {"bias": bias, "dtype": dtype, "load": load}
    if len(layers) > 1:
        made = [merged_layer(vllm, layers, **options)]
    else:
        made = [single_layer(vllm, layers[0], kind, **options) for kind in ("row", "column")]
    for layer, rows in itertools.product(made, ROWS):
        x = inputs(rows, dtype)
        assert_near(layer(x)[0], layers, x, dtype)
        # What the checkpoint's names were for is gone; what is left is what is multiplied by.
        left = dict(layer.named_parameters())
        assert set(left) - {"bias"} == {
            "first",
            *(f"second_{n}" for n, part in enumerate(layers) if type(part) is not nn.Linear),
        }


def test_torchs_compiler_traces_a_layer_without_a_break(vllm):
    layers = modules(PARTS["all forms"], bias=True)
    layer = merged_layer(vllm, layers, bias=True)
    compiled = torch.compile(lambda x: layer(x)[0], backend="eager", fullgraph=True, dynamic=True)
    for rows in ((5,), (3,)):
        x = inputs(rows, torch.float32)
        assert torch.equal(compiled(x), layer(x)[0])


# ---- tensor parallelism


@pytest.fixture(params=(2, 4))
def ranks(request):
    """Every process in turn."""

    def each():
        for rank in range(request.param):
            PARALLEL.update(rank=rank, size=request.param)
            yield rank

    return each


SHARDED = {
    "qkv": [("factors", 16, 5), ("pivoted", 8, 3), ("dense", 8, None)],
    "pivoted": [("pivoted", 16, 7), ("pivoted", 8, 6), ("pivoted", 8, 1)],
}


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("parts", SHARDED)
@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_the_rows_of_all_processes_are_the_layers(vllm, ranks, parts, kv_heads, bias):
    """Heads of keys and values are divided, or where there are fewer than processes, held more than once."""
    layers, x = modules(SHARDED[parts], bias=bias, dtype=torch.float64), inputs((3,), torch.float64)
    found, size = [[], [], []], 0
    for rank in ranks():
        made = merged_layer(vllm, layers, bias=bias, dtype=torch.float64, kv_heads=kv_heads, head=8 // kv_heads)
        size = PARALLEL["size"]
        copies = max(1, size // kv_heads)
        for number, y in enumerate(made(x)[0].split(made.outputs, -1)):
            if not number or rank % copies == 0:
                found[number].append(y)
    assert_near(torch.cat([y for ys in found for y in ys], -1), layers, x, torch.float64)


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("part", (("factors", 9, 4), ("pivoted", 9, 4)))
def test_the_sum_of_all_processes_is_a_row_parallel_layer(vllm, ranks, part, bias):
    (layer,) = modules([part], bias=bias, dtype=torch.float64, in_=16)
    x, total = inputs((3,), torch.float64, 16), 0
    for rank in ranks():
        made = single_layer(vllm, layer, "row", bias=bias, dtype=torch.float64)
        total = total + made(x.chunk(PARALLEL["size"], -1)[rank])[0]
    assert_near(total, [layer], x, torch.float64)


# ---- a checkpoint


@pytest.mark.parametrize("load", ("load_by_parameters", "load_by_modules"))
@pytest.mark.parametrize("forms", (("dense", "factors", "pivoted"), ("dense", "factors")))
@pytest.mark.parametrize("kind", ("llama", "qwen2"))
def test_a_materialized_directory_gives_the_models_logits(vllm, tmp_path, kind, forms, load):
    from acip_kernels.serving import vllm as plugin

    result = toys.toy_result(toys.MODELS[kind]())
    acip_kernels.save(acip_kernels.materialize(result, 0.7, forms=forms), tmp_path / "small")
    model = acip_kernels.load(tmp_path / "small", dtype=torch.float32)
    expected = toys.logits(model)

    plugin.register()
    plugin.register()  # vLLM may call it again
    settings = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    config = vllm.CONFIGS[settings["quant_method"]].from_config(settings)
    config.packed_modules_mapping = PACKED
    made, sizes = {}, toys.SIZES
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}"
        attention, mlp, dtype = layer.self_attn, layer.mlp, torch.float32
        bias = kind == "qwen2"
        heads = sizes["head_dim"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
        name = f"{prefix}.self_attn.qkv_proj"
        made[name] = qkv = vllm.QKVParallelLinear(sizes["hidden_size"], *heads, bias, dtype, config, name)
        name = f"{prefix}.self_attn.o_proj"
        made[name] = o = vllm.RowParallelLinear(heads[0] * heads[1], sizes["hidden_size"], False, dtype, config, name)
        name, widths = f"{prefix}.mlp.gate_up_proj", [sizes["intermediate_size"]] * 2
        made[name] = gate_up = vllm.MergedColumnParallelLinear(sizes["hidden_size"], widths, False, dtype, config, name)
        name = f"{prefix}.mlp.down_proj"
        made[name] = down = vllm.RowParallelLinear(widths[0], sizes["hidden_size"], False, dtype, config, name)
        for parent, names, by in ((attention, PACKED["qkv_proj"], qkv), (mlp, PACKED["gate_up_proj"], gate_up)):
            for part, child in enumerate(names):
                getattr(parent, child).forward = lambda x, by=by, part=part: by(x)[0].split(by.outputs, -1)[part]
        attention.o_proj.forward = lambda x, by=o: by(x)[0]
        mlp.down_proj.forward = lambda x, by=down: by(x)[0]
    tree = Tree(made)
    state = load_file(tmp_path / "small" / "model.safetensors")
    getattr(vllm, load)(tree, ((name, tensor) for name, tensor in state.items() if "_proj." in name))
    vllm.finish(tree)
    methods = {type(layer.quant_method).__name__ for layer in made.values()}
    assert "AcipLinearMethod" in methods
    toys.assert_close(toys.logits(model), expected)


def test_layers_that_are_no_linear_ones_are_vllms(vllm):
    config, _ = config_of(vllm, modules(PARTS["factors"]), "layers.0.mlp.down_proj", ())
    assert config.get_quant_method(nn.Embedding(3, 4), "embed_tokens") is None
    dense = vllm.ColumnParallelLinear(IN, [4], False, torch.float32, config, "layers.1.mlp.down_proj")
    assert type(dense.quant_method) is vllm.UnquantizedLinearMethod


def test_names_follow_vllms_mapper(vllm):
    class Mapper:
        def apply_list(self, names):
            return [f"language_model.{name}" for name in names]

        def apply_dict(self, values):
            return dict(zip(self.apply_list(values), values.values()))

    config, _ = config_of(vllm, modules(PARTS["pivoted"]), "layers.0.mlp.down_proj", ())
    config.apply_vllm_mapper(Mapper())
    assert config.ranks == {"language_model.layers.0.mlp.down_proj": 3} and config.pivoted == set(config.ranks)


# ---- what is refused


def changed(names, layers, **changes):
    """The stream of tensors with some replaced, or left out (None)."""
    for name, tensor in tensors(names, layers):
        key = name.removeprefix(names[0] + ".").replace(".", "_")
        tensor = changes.get(key, tensor)
        if tensor is not None:
            yield name, tensor


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("factors", {"U_weight": None}, "lacks layers.0.mlp.down_proj.U.weight"),
        ("factors", {"weight": None}, "lacks layers.0.mlp.down_proj.weight"),
        ("factors", {"U_bias": None}, "lacks layers.0.mlp.down_proj.U.bias"),
        ("factors", {"Vh_weight": torch.zeros(5, IN)}, r"Vh.weight is \[5, 14\], but must be \[4, 14\]"),
        ("factors", {"weight": torch.zeros(9, IN)}, r"down_proj.weight is \[9, 14\], but must be \[0\]"),
        ("pivoted", {"is_pivot": None}, "lacks layers.0.mlp.down_proj.is_pivot"),
        ("pivoted", {"is_pivot": torch.tensor([15, 0], dtype=torch.uint8)}, "does not name 3 of 10 outputs"),
    ],
)
def test_what_does_not_fit_the_config_is_named(vllm, part, changes, message):
    layers, prefix = modules(PARTS[part], bias=True), "layers.0.mlp.down_proj"
    config, names = config_of(vllm, layers, prefix, ())
    out = layers[0].out_features
    tree = Tree({prefix: vllm.RowParallelLinear(IN, out, True, torch.float32, config, prefix)})
    with pytest.raises(ValueError, match=message):
        vllm.load_by_parameters(tree, changed(names, layers, **changes))
        vllm.finish(tree)


def test_another_part_than_the_config_says(vllm):
    layers = modules(PARTS["gate and up"])
    config, names = config_of(vllm, layers, "layers.0.mlp", PACKED["gate_up_proj"])
    prefix = "layers.0.mlp.gate_up_proj"
    tree = Tree({prefix: vllm.MergedColumnParallelLinear(IN, [11, 11], False, torch.float32, config, prefix)})
    with pytest.raises(ValueError, match="up_proj.P.weight is in the checkpoint, but .* says that it is dense"):
        vllm.load_by_parameters(tree, [(f"{names[1]}.P.weight", layers[0].P.weight)])
    with pytest.raises(ValueError, match="not told which of"):
        tree.layers._modules["0"].mlp.gate_up_proj.P.weight.weight_loader(None, layers[0].P.weight)


def test_a_rank_that_the_layer_cannot_have(vllm):
    from acip_kernels.serving import vllm as plugin

    config = plugin.AcipVllmConfig({"o_proj": 30}, set())
    with pytest.raises(ValueError, match=r"the rank of o_proj is 30, but the layer is \[9, 14\]"):
        vllm.RowParallelLinear(IN, 9, False, torch.float32, config, "o_proj")


def test_layers_whose_factors_vllm_would_transpose(vllm):
    config, _ = config_of(vllm, modules(PARTS["pivoted"]), "h.0.attn.c_attn", ())
    with pytest.raises(ValueError, match=r"vLLM would transpose the factors of h.0.attn.c_attn"):
        vllm.ColumnParallelLinear(IN, [10], False, torch.float32, config, "h.0.attn.c_attn")


def test_one_layer_of_the_checkpoint_that_vllm_splits(vllm):
    """As Phi-3 has them: whole it is served, divided among processes it is refused."""
    (layer,) = modules([("factors", 16, 4)])
    config, names = config_of(vllm, [layer], "qkv_proj", ())
    config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    made = vllm.QKVParallelLinear(IN, 2, 4, 2, False, torch.float32, config, "qkv_proj")
    for name, tensor in tensors(names, [layer]):
        param = made.get_parameter(name.removeprefix("qkv_proj."))
        param.weight_loader(param, tensor)
    vllm.finish(made)
    x = inputs((3,), torch.float32)
    assert_near(made(x)[0], [layer], x, torch.float32)
    PARALLEL["size"] = 2
    with pytest.raises(ValueError, match="serve it without tensor parallelism"):
        vllm.QKVParallelLinear(IN, 2, 4, 2, False, torch.float32, config, "qkv_proj")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "elastic", "layers": {}}, "cut a size with `acip materialize"),
        ({"ranks": {"a": 2}, "quantized": {**Scheme("int4").to_dict(), "dense": []}}, "integer weights"),
        ({"ranks": {"a": -1}}, r"ranks\['a'\] must be a rank"),
        ({"format_version": 99}, "a newer acip_kernels may read it"),
    ],
)
def test_checkpoints_that_vllm_cannot_serve(vllm, fields, message):
    from acip_kernels.serving import vllm as plugin

    with pytest.raises(ValueError, match=message):
        plugin.AcipVllmConfig.from_config({"quant_method": "acip", **fields})


def test_it_says_that_it_is_experimental(vllm, caplog):
    from acip_kernels.serving import vllm as plugin

    with caplog.at_level(logging.WARNING, "acip_kernels"):
        plugin.AcipVllmConfig.from_config({"quant_method": "acip", "ranks": {"a": 2}})
    assert "experimental" in caplog.text and "has not run on a GPU" in caplog.text


def test_vllm_finds_it_and_nothing_else_imports_it(vllm):
    project = (ROOT / "pyproject.toml").read_text()
    module, function = re.search(r'"vllm.general_plugins"\]\nacip = "([\w.]+):(\w+)"', project).groups()
    assert module not in sys.modules  # acip_kernels was imported long ago
    getattr(importlib.import_module(module), function)()
    assert "acip" in vllm.QUANTIZATION_METHODS
