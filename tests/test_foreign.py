"""Published ACIP checkpoints: every variant computes what it did, is cut as it was, or is refused."""

import json
import pathlib
import re

import pytest
import torch
import toys
from published import Published
from safetensors.torch import load_file
from toys import assert_close

import acip_kernels
from acip_kernels import CompressionResult, import_checkpoint, load, materialize
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.compress.sizing import Sizing

GOLDEN = pathlib.Path(__file__).parent / "golden" / "acip_llama"
IDS = toys.token_ids()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def assert_computes(model, published):
    assert_close(logits(model), published.logits(IDS).float())


# ---- one such checkpoint, with the logits of the published code


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "expected.safetensors")


def assert_within_bfloat16(model, golden, name):
    """Both sides round to bfloat16, and independent roundings, of 2**-9 at most, add up as the root of their number.

    On the way to a logit lie four linear layers in each of two blocks (v, o, up, down), with seven roundings each (two
    products of factors, two of the adapter, the mask, the scaling, the sum), and eight more a block (two norms,
    softmax, its product, activation, gate, two sums); here as there.
    """
    expected = golden[name]
    error = (logits(model, golden["input_ids"]).float() - expected).square().mean().sqrt()
    assert error <= (2 * 2 * (4 * 7 + 8)) ** 0.5 * 2**-9 * expected.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_golden_checkpoint_computes_what_it_did(golden, dtype):
    result = import_checkpoint(GOLDEN / "checkpoint", GOLDEN / "base", dtype=dtype)
    assert result.model.dtype == dtype
    assert_within_bfloat16(result.model, golden, "logits_full")
    assert_within_bfloat16(materialize(result, 1.0), golden, "logits_full")
    assert_within_bfloat16(result.at(0.5, count="paper"), golden, "logits_pruned_50")
    assert_within_bfloat16(materialize(result, 0.5, count="paper"), golden, "logits_pruned_50")
    compressed = import_checkpoint(GOLDEN / "checkpoint_compressed_50", GOLDEN / "base", dtype=dtype)
    assert_within_bfloat16(compressed.model, golden, "logits_compressed_50")
    assert_within_bfloat16(materialize(compressed, 1.0), golden, "logits_compressed_50")


def test_the_golden_checkpoint_is_cut_to_the_published_ranks(golden):
    result = import_checkpoint(GOLDEN / "checkpoint", GOLDEN / "base")
    cut = result.cut(0.5, count="paper")
    assert torch.tensor(cut.sizing.ratio(cut.ranks, "paper")) == golden["size_ratio_at_50"]
    compressed = load_file(GOLDEN / "checkpoint_compressed_50" / "model.safetensors")
    ranks = [compressed[f"model.{name}.base_layer.parametrization.mask"].numel() for name in result.scores]
    assert cut.ranks.tolist() == ranks
    # The pruned file's scores are those of the ranks that stayed.
    again = import_checkpoint(GOLDEN / "checkpoint_compressed_50", GOLDEN / "base")
    for name, live in cut.live.items():
        assert torch.equal(again.scores[name], result.scores[name][live])


@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint_compressed_50"])
def test_the_golden_checkpoint_becomes_an_elastic_one(golden, kind, tmp_path):
    result = import_checkpoint(GOLDEN / kind, GOLDEN / "base")
    result.save(tmp_path / "elastic")
    again = CompressionResult.load(tmp_path / "elastic")
    for name, layer in svd_layers(result.model).items():
        order = layer.scores.sort(descending=True, stable=True).indices
        assert torch.equal(again.scores[name], layer.scores[order])
        assert torch.equal(svd_layers(again.model)[name].U, layer.U[:, order])
    name = "logits_full" if kind == "checkpoint" else "logits_compressed_50"
    # Without a size as the file's masks have it, with all sizes to be cut.
    assert_within_bfloat16(load(tmp_path / "elastic"), golden, name)
    assert_within_bfloat16(load(tmp_path / "elastic", 1.0), golden, name)
    assert_within_bfloat16(load(tmp_path / "elastic", 0.51, count="paper"), golden, "logits_pruned_50")
    again.at(0.5, count="paper")
    again.save(tmp_path / "again")
    if kind == "checkpoint":
        assert_within_bfloat16(load(tmp_path / "again"), golden, "logits_pruned_50")
        assert_within_bfloat16(load(tmp_path / "again", 1.0), golden, "logits_full")
    with pytest.raises(ValueError, match="save them whole"):
        again.save(tmp_path / "compact", compact=True, base_model="base")


# ---- every variant


LORA = {"default": {}}
VARIANTS = {
    "llama": (toys.llama, {"adapters": LORA}),
    "llama in bfloat16": (toys.llama, {"adapters": LORA, "dtype": torch.bfloat16}),
    "without adapters": (toys.llama, {}),
    "a mask of norm one": (toys.llama, {"scaling": "norm", "adapters": LORA}),
    "biases and tied embeddings": (toys.qwen2, {"adapters": LORA}),
    "biases and tied embeddings in bfloat16": (toys.qwen2, {"adapters": LORA, "dtype": torch.bfloat16}),
    "biases in float16": (toys.qwen2, {"adapters": LORA, "dtype": torch.float16, "threshold": 0.1, "compressed": True}),
    "biases, norm one, without adapters": (toys.qwen2, {"scaling": "norm"}),
    "rank-stabilized": (toys.qwen2, {"adapters": {"default": {"r": 3, "use_rslora": True}}}),
    "patterns of alpha": (toys.llama, {"adapters": {"default": {"alpha_pattern": {"q_proj": 3, "mlp.up_proj": 5}}}}),
    "two adapters": (toys.llama, {"adapters": {"default": {"r": 2}, "more": {"r": 3, "lora_alpha": 5}}}),
    "pruned": (toys.llama, {"adapters": LORA, "threshold": 0.2}),
    "pruned relu": (toys.llama, {"mask_func": "relu", "threshold": 0.2}),
    "pruned none": (toys.qwen2, {"mask_func": "none", "threshold": 0.2, "scaling": "norm"}),
    "compressed": (toys.llama, {"adapters": LORA, "threshold": 0.0, "compressed": True}),
    "compressed, without adapters": (toys.qwen2, {"threshold": 0.0, "compressed": True}),
    "compressed, norm one": (toys.qwen2, {"adapters": LORA, "threshold": 0.4, "compressed": True, "scaling": "norm"}),
    "compressed to almost nothing": (toys.qwen2, {"adapters": LORA, "threshold": 1.9, "compressed": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_computes_what_it_did(variant, tmp_path):
    make, options = VARIANTS[variant]
    published = Published(make(), **options)
    path = published.write(tmp_path / "published")
    result = import_checkpoint(path, published.model.config, dtype=torch.float32)
    assert_computes(result.model, published)
    layers = svd_layers(result.model)
    assert set(layers) == set(published.scores) - set(published.kept_dense)
    for name, layer in layers.items():
        scores = published.scores[name]
        if options.get("compressed"):
            scores = scores[scores > options["threshold"]]
        if len(scores):
            assert torch.equal(layer.scores, scores)
        assert layer.adapter_rank == sum(one.get("r", 4) for one in options.get("adapters", {}).values())
        # Decompositions as they are everywhere here: of norm one, and the singular values apart.
        live = layer.S > 0
        assert torch.allclose(layer.U.norm(dim=0)[live], torch.tensor(1.0), atol=1e-5)
        assert torch.allclose(layer.Vh.norm(dim=1)[live], torch.tensor(1.0), atol=1e-5)
    if options.get("threshold") is None or options.get("compressed"):
        result.save(tmp_path / "elastic")
        assert_computes(load(tmp_path / "elastic", 1.0, dtype=torch.float32), published)
        assert_computes(load(path, 1.0, base_model=published.model.config, dtype=torch.float32), published)


def test_variants_hold_what_they_are_named_for():
    kept = {name: Published(make(), **options).kept_dense for name, (make, options) in VARIANTS.items()}
    assert kept["compressed"] and kept["compressed, without adapters"]
    make, options = VARIANTS["compressed to almost nothing"]
    ranks = [int((scores > options["threshold"]).sum()) for scores in Published(make(), **options).scores.values()]
    assert 0 in ranks and max(ranks) > 0


def test_a_checkpoint_without_a_factorized_layer_is_an_ordinary_model(tmp_path):
    published = Published(toys.llama(), adapters=LORA, threshold=-10.0, compressed=True)
    model = load(published.write(tmp_path / "published"), base_model=published.model.config)
    assert len(published.kept_dense) == 14 and model.config.to_dict().get("quantization_config") is None
    assert_computes(model, published)


QWEN2_OF_4_46 = """{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.3, "intermediate_size": 48,
  "max_position_embeddings": 64, "max_window_layers": 2, "model_type": "qwen2", "num_attention_heads": 4,
  "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": null,
  "rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.46.3", "use_cache": true, "use_sliding_window": false, "vocab_size": 64
}"""


def test_the_base_models_config_may_be_of_the_transformers_that_published_ones_need(tmp_path):
    """Qwen2's as 4.46.3 writes it: other names than today's, and no list of layer types."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(QWEN2_OF_4_46)
    published = Published(toys.qwen2(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), adapters=LORA)
    result = import_checkpoint(published.write(tmp_path / "published"), base, dtype=torch.float32)
    assert_computes(result.model, published)
    # And what ends its texts, of which config.json has the half.
    (base / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 5]}')
    result = import_checkpoint(tmp_path / "published", base)
    assert result.model.generation_config.eos_token_id == [2, 5]
    result.save(tmp_path / "elastic")
    assert load(tmp_path / "elastic", 0.5).generation_config.eos_token_id == [2, 5]


@pytest.mark.parametrize("name", ["model.lm_head.weight", "model.model.embed_tokens.weight"])
def test_a_tied_matrix_may_have_either_name_or_both(name, tmp_path):
    published = Published(toys.qwen2())
    embedding = published.tensors.pop("model.model.embed_tokens.weight")
    published.tensors[name] = embedding
    path = published.write(tmp_path / "one")
    assert_computes(load(path, base_model=published.model.config), published)
    published.tensors |= {"model.lm_head.weight": embedding, "model.model.embed_tokens.weight": embedding.clone()}
    model = load(published.write(tmp_path / "both"), base_model=published.model.config)
    assert_computes(model, published)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    published.tensors["model.lm_head.weight"] = embedding + 1
    with pytest.raises(ValueError, match="embed_tokens.weight differs from|lm_head.weight differs from"):
        load(published.write(tmp_path / "torn"), base_model=published.model.config)


def test_a_checkpoint_in_shards(tmp_path):
    published = Published(toys.llama(), adapters=LORA)
    path = published.write(tmp_path / "shards", shards=3)
    assert_computes(load(path, base_model=published.model.config), published)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is missing"):
        load(path, base_model=published.model.config)


@pytest.mark.parametrize("make", [toys.llama, toys.qwen2])
def test_scores_and_adapters_alone_are_completed_from_the_base_model(make, tmp_path):
    published = Published(make(), adapters=LORA)
    published.model.save_pretrained(tmp_path / "base")
    whole = import_checkpoint(published.write(tmp_path / "whole"), tmp_path / "base")
    published.tensors = {
        name: tensor for name, tensor in published.tensors.items() if "_score" in name or ".lora_" in name
    }
    path = published.write(tmp_path / "compact")
    for base in (tmp_path / "base", published.model):
        result = import_checkpoint(path, base)
        assert_computes(result.model, published)
        for ratio in (0.8, 0.4):
            assert_close(logits(result.at(ratio, count="paper")), logits(whole.at(ratio, count="paper")))
    with pytest.raises(ValueError, match="only its config was given"):
        import_checkpoint(path, published.model.config)


def test_the_base_model_is_found_where_the_config_says(tmp_path):
    published = Published(toys.llama())
    (tmp_path / "base").mkdir()
    published.model.config.save_pretrained(tmp_path / "base")
    path = published.write(tmp_path / "published")
    for base in (str(tmp_path / "base"), tmp_path / "base", published.model.config, published.model):
        assert_computes(load(path, base_model=base), published)
    published.config["base_model_config"]["pretrained_model_kwargs"]["pretrained_model_name_or_path"] = str(
        tmp_path / "base"
    )
    assert_computes(load(published.write(tmp_path / "named")), published)
    published.config["base_model_config"] |= {
        "pretrained_config": published.model.config.to_dict(),
        "pretrained_model_kwargs": {},
    }
    assert_computes(load(published.write(tmp_path / "inside")), published)


# ---- sizes


@pytest.mark.parametrize("make", [toys.llama, toys.qwen2])
@pytest.mark.parametrize("ties", [False, True])
def test_papers_count_prunes_as_the_paper_does(make, ties):
    """Against the rule, taken literally: of every k, what is above the k-th smallest score, and its ratio."""
    result = toys.toy_result(make())
    layers = svd_layers(result.model)
    if ties:
        for layer in layers.values():
            layer.scores.copy_((layer.scores * 8).round() / 8)
    scores = {name: layer.scores for name, layer in layers.items()}
    flat = torch.cat(list(scores.values()))
    whole = sum(layer.out_features * (layer.in_features + (layer.bias is not None)) for layer in layers.values())

    def ratio(live):
        total = 0
        for name, layer in layers.items():
            bias = layer.out_features if layer.bias is not None else 0
            factors = int(live[name].sum()) * (layer.out_features + layer.in_features)
            total += min(factors, layer.out_features * layer.in_features) + bias
        return total / whole

    choices = []
    for k in range(1, len(flat) + 1):
        live = {name: score > flat.kthvalue(k).values for name, score in scores.items()}
        choices.append((ratio(live), live))
    for target in (0.999, 0.9, 0.6, 0.5, 0.31, 0.05, 0.001):
        above = [live for ratio, live in choices if ratio > target]
        expected = above[-1] if above else choices[0][1]
        cut = result.cut(target, count="paper")
        assert all(torch.equal(cut.live[name], expected[name]) for name in scores)
        assert cut.sizing.ratio(cut.ranks, "paper") == ratio(expected)
    assert all(live.all() for live in result.cut(1.0, count="paper").live.values())
    with pytest.raises(ValueError, match="cut takes paper"):
        sizing = Sizing.of(result.model)
        sizing.ranks_at(sizing.removal(scores), 0.5, "paper")


def test_papers_count_leaves_adapters_out_and_the_own_counts_tell_the_truth(tmp_path):
    result = toys.toy_result(toys.llama())
    cut, model = result.cut(0.5, count="paper"), materialize(result, 0.5, count="paper")
    about = model.config.quantization_config
    assert about["count"] == "paper" and about["factorized"] == cut.ratios["factorized"]
    assert cut.sizing.ratio(cut.ranks, "paper") > 0.5
    assert cut.adapters == "merge" and cut.ranks.sum() == Sizing.of(result.model).full_rank.sum() - sum(
        int((~live).sum()) for live in cut.live.values()
    )
    # Ours takes one entry more, until the ratio is met.
    without = result.cut(0.5, adapters="drop", forms=("dense", "factors"))
    assert without.ratios["factorized"] <= 0.5 and int(without.ranks.sum()) == int(cut.ranks.sum()) - 1
    result.save(tmp_path / "elastic")
    again = load(tmp_path / "elastic", 0.5, count="paper")
    assert again.config.quantization_config.to_dict()["ranks"] == about["ranks"]


# ---- refused


def spoil(**tensors):
    """Replace tensors, by the end of their names; None takes them out."""

    def change(published):
        for end, new in tensors.items():
            names = [name for name in published.tensors if name.endswith(end.replace("__", "."))]
            assert names
            if new is None:
                del published.tensors[names[0]]
            else:
                published.tensors[names[0]] = new(published.tensors[names[0]])

    return change


def configure(*path, value):
    def change(published):
        fields = published.config
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    return change


def extra(name, tensor=None):
    return lambda published: published.tensors.update({name: torch.zeros(2) if tensor is None else tensor})


KWARGS = ("parametrization_config", "module_factory_kwargs")
DEFAULT = ("adapter_config", "peft_config", "default")
REFUSED = {
    "another kind": (configure("model_type", value="parametrized_model"), "only 'acip_model' has scores"),
    "a version": (configure("acip_version", value=2), "acip_version is 2.*a newer acip_kernels may read it"),
    "a version further in": (configure("parametrization_config", "version", value=2), "version is 2.*a newer"),
    "another parametrization": (
        configure("parametrization_config", "module_factory_cls", value="qr"),
        "module_factory_cls is 'qr'",
    ),
    "another mask function": (configure(*KWARGS, "mask_func", value="sigmoid"), "mask_func is 'sigmoid'"),
    "an unknown option": (configure(*KWARGS, "temperature", value=2.0), "'temperature', which is not known"),
    "a scale of zero": (configure(*KWARGS, "mask_scaling_factor", value=0), "mask_scaling_factor must be 'norm' or a"),
    "a scale that is no number": (configure(*KWARGS, "mask_scaling_factor", value="L1"), "got 'L1'"),
    "masks of their own": (configure(*KWARGS, "mask_func", value="relu"), "which another size would lose"),
    "no parametrization": (configure("parametrization_config", value=[]), "module_factory_cls is None"),
    "a parametrization of text": (configure("parametrization_config", value="svd"), "must be an object, got 'svd'"),
    "an adapter of text": (configure(*DEFAULT, value="lora"), "default must be an object, got 'lora'"),
    "DoRA": (configure(*DEFAULT, "use_dora", value=True), "DoRA adapter, and only LoRA is known"),
    "IA3": (configure(*DEFAULT, "peft_type", value="IA3"), "IA3 adapter"),
    "an adapter's bias": (configure(*DEFAULT, "lora_bias", value=True), "lora_bias True, and only products of two"),
    "whole modules": (configure(*DEFAULT, "modules_to_save", value=["lm_head"]), r"modules_to_save \['lm_head'\]"),
    "another r": (configure(*DEFAULT, "r", value=5), "where config.json has r 5"),
    "alpha": (configure(*DEFAULT, "lora_alpha", value=None), "lora_alpha must be a number, got None"),
    "a regular expression": (configure(*DEFAULT, "alpha_pattern", value={".*q": 1}), "only names are read"),
    "no adapter config": (configure("adapter_config", value=None), "does not know the adapter 'default'"),
    "quantized": (extra("model.model.layers.0.mlp.up_proj.weight.absmax"), "bitsandbytes'.*save it before quantizing"),
    "quantized by its config": (
        configure("quantization_config", value={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "config.json: quantized by bitsandbytes: .*save it before quantizing",
    ),
    "eight bits": (
        spoil(q_proj__base_layer__parametrization__ortho__weight=lambda t: t.to(torch.float8_e4m3fn)),
        "torch.float8_e4m3fn: quantized checkpoints are not read",
    ),
    "integers": (spoil(q_proj__base_layer__parametrization__ortho__weight=lambda t: t.to(torch.uint8)), "torch.uint8"),
    "no lora_B": (spoil(lora_B__default__weight=None), "lora_B.default.weight' is missing"),
    "no mask": (spoil(parametrization__mask=None), "has no tensor 'mask'"),
    "no base": (spoil(parametrization__base__weight=None), "has no tensor 'base.weight'"),
    "no scores": (spoil(mask_score=None), "there are no scores to cut it by"),
    "no norm": (spoil(model__norm__weight=None), "no tensor for 'model.norm.weight'.*weights cannot be had"),
    "no head": (spoil(lm_head__weight=None), "no tensor for 'lm_head.weight'"),
    "too few scores": (spoil(mask_score=lambda t: t[:5]), "5 scores"),
    "NaN scores": (spoil(mask_score=lambda t: t * torch.nan), "mask_score' holds NaN"),
    "NaN factors": (spoil(parametrization__base__weight=lambda t: t * torch.nan), "base.weight' holds NaN"),
    "a wider layer": (
        spoil(parametrization__ortho__weight=lambda t: t.repeat(2, 1)),
        "needs \\[48, any\\]|needs \\[32",
    ),
    "a strange tensor": (extra("model.model.layers.7.mlp.up_proj.weight"), "no place in the base model"),
    "one outside": (extra("lm_head.weight"), "no place in the base model .* for tensor 'lm_head.weight'"),
    "a layer too many": (
        extra("model.model.layers.9.up_proj.parametrization.mask_score"),
        "has no linear layer 'model.layers.9.up_proj'",
    ),
    "no base model": (configure("base_model_config", value=None), "names no base model: give base_model"),
    "a base model that is nowhere": (
        configure("base_model_config", "pretrained_model_kwargs", "pretrained_model_name_or_path", value="/no/where"),
        "'/no/where', which the checkpoint names, cannot be had: give base_model.*acip import",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_is_refused_says_why(mistake, tmp_path):
    change, message = REFUSED[mistake]
    published = Published(toys.llama(), adapters=LORA)
    if mistake == "masks of their own":
        spoil(parametrization__mask=lambda t: t * 0.7)(published)
    change(published)
    path = published.write(tmp_path / "published")
    named = "base model" not in mistake
    with pytest.raises(ValueError, match=message):
        load(path, base_model=published.model.config if named else None)


def test_pickles_are_never_read(tmp_path):
    published = Published(toys.llama())
    path = published.write(tmp_path / "published")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle, which is never read"):
        load(path, base_model=published.model.config)


def test_ranks_that_do_not_fit_their_scores_are_named(tmp_path, caplog):
    published = Published(toys.llama(), threshold=1.0, compressed=True)
    for name, tensor in published.tensors.items():
        if name.endswith("mask_score"):
            published.tensors[name] = -tensor
    load(published.write(tmp_path / "published"), base_model=published.model.config)
    assert "are not those of the highest scores" in caplog.text


def test_what_an_imported_model_can_do_afterwards(tmp_path):
    """All that a result of a run can: quantize, fuse, tune, plot; the other options of load are honoured."""
    published = Published(toys.llama(), adapters=LORA)
    path, base = published.write(tmp_path / "published"), published.model.config
    with pytest.raises(ValueError, match="give size_ratio"):
        load(path, base_model=base, quantize="int8")
    small = load(path, 0.6, base_model=base, quantize="int8", adapters="truncate")
    assert small.config.quantization_config["quantized"]["bits"] == 8
    tuned = acip_kernels.finetune(load(path, 0.5, base_model=base), [{"input_ids": IDS}], 2, progress=False)
    tuned.save(tmp_path / "tuned")  # of layers that never had all ranks
    assert_close(logits(load(tmp_path / "tuned", 1.0)), logits(materialize(tuned, 1.0)))
    fields = json.loads((tmp_path / "tuned" / "config.json").read_text())["quantization_config"]
    assert fields["format_version"] == 4
    fields["layers"] = {name: options | {"full_rank": 10**9} for name, options in fields["layers"].items()}
    whole = json.loads((tmp_path / "tuned" / "config.json").read_text()) | {"quantization_config": fields}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="full_rank is 1000000000, but the layer is"):
        load(tmp_path / "tuned")


def test_the_pages_code_runs():
    """That of docs/checkpoints.md, with the golden checkpoint and a toy in the place of large models."""
    page = (pathlib.Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text("utf-8")
    first, second = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    first = first.replace('"ACIP-llama2-7b"', repr(str(GOLDEN / "checkpoint")))
    names = {}
    exec(first.replace('"meta-llama/Llama-2-7b-hf"', repr(str(GOLDEN / "base"))), names)
    assert names["result"].scores and names["model"].config.quantization_config["count"] == "paper"

    base = toys.llama()
    state = {}
    for name, tensor in base.state_dict().items():
        if name.endswith("_proj.weight"):
            U, S, Vh = torch.linalg.svd(tensor, full_matrices=False)
            stem = name.removesuffix("proj.weight")
            state |= {f"{stem}u_proj.weight": (U * S).contiguous(), f"{stem}v_proj.weight": Vh}
        else:
            state[name] = tensor
    names |= {"base": base, "state_dict": state}
    exec(second, names)
    assert_close(logits(names["model"]), logits(base))
