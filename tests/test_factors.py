"""Pairs of factors under other people's names: imported as they computed, saved, and refused where they do not fit."""

import copy

import pytest
import torch
import toys
from safetensors.torch import save_file
from toys import assert_close, logits
from transformers import AutoModelForCausalLM

from acip_kernels import LowRankLinear, import_factors, load, save
from acip_kernels.models.factors import NAMES
from acip_kernels.models.targets import linear_layers, weight_of

ARCHITECTURES = {"llama": toys.llama, "qwen2": toys.qwen2, "gpt2": toys.gpt2}


def factorized(model, names, *, rank=9, transposed=False, singular_values=False, exclude=("k_proj",)):
    """`(state, dense)`: a state dict as somebody's two projections have it, and a dense model of the same function."""
    dense, state = copy.deepcopy(model), dict(model.state_dict())
    for name, layer in linear_layers(dense)[0].items():
        prefix, suffix = names["layer"].split("*")
        if name.endswith(exclude) or not name.endswith(suffix):
            continue
        stem = name.removeprefix(prefix).removesuffix(suffix)
        U, S, Vh = torch.linalg.svd(weight_of(layer).detach(), full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        if not singular_values:
            U, S = U * S, None
        weight_of(layer).data.copy_((U if S is None else U * S) @ Vh)
        del state[f"{name}.weight"]
        bias = state.pop(f"{name}.bias", None)
        where = {part: pattern.replace("*", stem) for part, pattern in names.items()}
        end = "" if transposed else ".weight"
        state[f"{where['U']}{end}"], state[f"{where['Vh']}{end}"] = (U.t(), Vh.t()) if transposed else (U, Vh)
        if S is not None:
            state[where["S"]] = S
        if bias is not None:
            state[f"{name if transposed else where['U']}.bias"] = bias
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}, dense


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("names", NAMES)
def test_known_names_are_found(architecture, names, tmp_path):
    if architecture == "gpt2" and names == "svd-llm":
        pytest.skip("these names are for layers that are called *_proj")
    base = ARCHITECTURES[architecture]()
    state, dense = factorized(base, NAMES[names])
    for given in (names, "auto"):
        model = import_factors(state, base.config, given)
        assert_close(logits(model), logits(dense))
    low_rank = {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert low_rank and set(low_rank.values()) == {9}
    save(model, tmp_path / "saved")
    for again in (load(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert torch.equal(logits(again), logits(model))
    fields = model.config.quantization_config.to_dict()
    assert fields["ranks"] == low_rank
    numbers = sum({id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}.values())
    whole = sum({id(t): t.numel() for t in base.state_dict(keep_vars=True).values()}.values())
    assert fields["stored"] == pytest.approx(numbers / whole)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ({"U": "factors.*.left", "Vh": "factors.*.right"}, {"transposed": True}),
        ({"U": "*.u", "Vh": "*.v", "S": "*.sigma"}, {"singular_values": True}),
        ({"U": "*.u", "Vh": "*.v", "S": "*.sigma"}, {"singular_values": True, "transposed": True}),
    ],
)
def test_any_names_are_read(names, options, tmp_path):
    base = toys.qwen2()
    state, dense = factorized(base, {"layer": "*", **names}, **options)
    assert_close(logits(import_factors(state, base, names)), logits(dense))
    with pytest.raises(ValueError, match="no pairs of factors .* under the names 'auto'.*there are "):
        import_factors(state, base)


def test_files_and_directories_are_read_and_what_is_missing_comes_from_the_base_model(tmp_path):
    base = toys.qwen2()
    base.save_pretrained(tmp_path / "base")
    state, dense = factorized(base, NAMES["svd-llm"])
    del state["lm_head.weight"]  # tied
    save_file(state, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert_close(logits(import_factors(source, tmp_path / "base")), logits(dense))
    pairs = {name: tensor for name, tensor in state.items() if "_u_proj" in name or "_v_proj" in name}
    model = import_factors(pairs, tmp_path / "base", dtype=torch.float32)
    assert_close(logits(model), logits(dense))
    with pytest.raises(ValueError, match="weights cannot be had"):
        import_factors(pairs, base.config)
    (tmp_path / "model.pt").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="Pickles are never read"):
        import_factors(tmp_path / "model.pt", base)


def test_biases_of_both_projections_are_one(tmp_path):
    base = toys.qwen2()
    state, dense = factorized(base, NAMES["children"])
    name = "model.layers.0.self_attn.q_proj"
    extra = torch.linspace(-1, 1, 9)
    state[f"{name}.Vh.bias"] = extra
    dense.get_submodule(name).bias.data += state[f"{name}.U.weight"] @ extra
    assert_close(logits(import_factors(state, base)), logits(dense))
    up = "model.layers.0.mlp.up_proj"
    state[f"{up}.U.bias"] = torch.zeros(48)
    assert_close(logits(import_factors(state, base)), logits(dense))
    state[f"{up}.U.bias"] += 1
    with pytest.raises(ValueError, match="up_proj has a bias, and in the base model .* it has none"):
        import_factors(state, base)


def test_more_ranks_than_a_weight_has_are_a_weight():
    base = toys.llama()
    state, dense = factorized(base, NAMES["children"], rank=40)
    name = "model.layers.1.mlp.down_proj"
    state[f"{name}.Vh.weight"] = torch.cat([state[f"{name}.Vh.weight"], torch.randn(12, 48)])
    state[f"{name}.U.weight"] = torch.cat([state[f"{name}.U.weight"], torch.zeros(32, 12)], dim=1)
    model = import_factors(state, base)
    assert type(model.get_submodule(name)) is torch.nn.Linear
    assert_close(logits(model), logits(dense))


U, V = "model.layers.0.mlp.up_u_proj.weight", "model.layers.0.mlp.up_v_proj.weight"
MISTAKES = {
    "one factor": (lambda state: state.pop(U), {}, "up_proj has .*up_v_proj.weight, and no U"),
    "exchanged": (
        lambda state: state.update({U: state[V], V: state[U]}),
        {},
        r"up_u_proj.weight is \[9, 32\] and .*\[48, 9\].*U and Vh are exchanged",
    ),
    "a strange tensor": (lambda state: state.update(strange=torch.zeros(2)), {}, "no place .* for tensor 'strange'"),
    "NaN": (lambda state: state[U].fill_(torch.nan), {}, "holds NaN"),
    "integers": (lambda state: state.update({U: state[U].to(torch.int8)}), {}, "torch.int8"),
    "an unknown set": (None, {"names": "svdllm"}, "names must be auto, svd-llm, .*got 'svdllm'"),
    "no star": (None, {"names": {"U": "u_proj", "Vh": "*_v_proj"}}, "pattern of U must have one"),
    "no Vh": (None, {"names": {"U": "*_u_proj"}}, "patterns for U, Vh and perhaps S and layer"),
    "another dtype": (None, {"dtype": "int8"}, "dtype must be auto, bfloat16"),
    "another model": (None, {"base_model": toys.llama(num_hidden_layers=1).config}, "no place in the base model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    change, options, message = MISTAKES[mistake]
    base = toys.llama()
    state, _ = factorized(base, NAMES["svd-llm"])
    if change is not None:
        change(state)
    with pytest.raises(ValueError, match=message):
        import_factors(state, **{"base_model": base.config} | options)
