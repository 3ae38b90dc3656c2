"""Quantized embeddings and heads: rows as they are looked up, one matrix for both, and models from cut to file."""

import copy
import json

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from torch import nn
from toys import logits
from transformers import AutoModelForCausalLM

import acip_kernels
from acip_kernels import QuantizedLinear, evaluate, fuse, load, materialize, save, unfuse
from acip_kernels.generation import Decoder
from acip_kernels.models.export import to_plain
from acip_kernels.nn import QuantizedEmbedding, QuantizedHead
from acip_kernels.ops import extension
from acip_kernels.ops.quantize import KINDS, Scheme

SCHEMES = [Scheme("int8"), Scheme("int4", 32), Scheme("int4", 64, True)]
KINDS = tuple(kind for kind in KINDS if kind.startswith("int"))


@pytest.fixture(scope="module", params=toys.MODELS)
def result(request):
    return toys.toy_result(toys.MODELS[request.param]())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_are_those_of_the_quantized_weight(scheme, dtype):
    torch.manual_seed(0)
    dense = nn.Embedding(13, 100, dtype=dtype)
    layer = QuantizedEmbedding.from_embedding(dense, scheme)
    weight = layer.dequantize()
    assert weight.dtype == dtype
    # Half a step of the codes, of which the largest number is 127, 7.5 or 7 away; and what dtype rounds.
    steps = {"int8": 127, "int4": 7 if scheme.symmetric else 7.5}[scheme.kind]
    largest = dense.weight.abs().amax(1, keepdim=True).double()
    bound = largest * (0.5 / steps * 1.01 + torch.finfo(dtype).eps)
    assert bool(((weight.double() - dense.weight.double()).abs() <= bound).all())
    for ids in (torch.tensor([[0, 12, 3], [3, 3, 7]]), torch.tensor(5), torch.zeros(2, 0, dtype=torch.int64)):
        assert torch.equal(layer(ids), nn.functional.embedding(ids, weight))
    for outside in (13, -1):
        with pytest.raises((IndexError, RuntimeError), match="range"):
            layer(torch.tensor([outside]))


def test_a_model_from_cut_to_file(result, tmp_path):
    plain = materialize(result, 0.6)
    tied = "lm_head.weight" in plain.all_tied_weights_keys
    for kind in KINDS:
        for quantize in (None, "int8"):
            model = materialize(result, 0.6, quantize=quantize, quantize_embeddings=kind)
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            assert type(embedding) is QuantizedEmbedding and type(head) is (QuantizedHead if tied else QuantizedLinear)
            assert embedding.scheme.kind == head.kind == kind
            assert (head.qweight is embedding.qweight) == tied
            # What it computes is what a model of the numbers that the codes stand for computes.
            toys.assert_close(logits(model), logits(to_plain(model, "dense")))

            path = tmp_path / f"{kind}-{quantize}"
            save(model, path)
            for loaded in (AutoModelForCausalLM.from_pretrained(path), load(path)):
                assert torch.equal(logits(loaded), logits(model))
                head = loaded.get_output_embeddings()
                assert (head.qweight is loaded.get_input_embeddings().qweight) == tied
            loaded.save_pretrained(path / "again")
            assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path / "again")), logits(model))
            fields = json.loads((path / "again" / "config.json").read_text())["quantization_config"]
            assert fields["format_version"] == 5 and fields["embeddings"] == embedding.scheme.to_dict()
            assert f"embedding and output head | {embedding.scheme}" in (path / "README.md").read_text()
            stored = load_file(path / "model.safetensors")
            assert sum(tensor.numel() for tensor in stored.values()) == evaluate.parameter_counts(model)["stored"]
            # The codes of one matrix are there once.
            rows = len(embedding.qweight)
            codes = [name for name, one in stored.items() if name.endswith(".qweight") and len(one) == rows]
            assert len(codes) == 2 - tied, codes


def test_an_elastic_checkpoint_is_cut_to_the_same(result, tmp_path):
    result.save(tmp_path / "elastic")
    model = load(tmp_path / "elastic", 0.6, quantize_embeddings="int8")
    expected = load(tmp_path / "elastic", 0.6)
    reference = QuantizedEmbedding.from_embedding(expected.get_input_embeddings(), Scheme("int8"))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.get_input_embeddings().state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="give size_ratio"):
        load(tmp_path / "elastic", quantize_embeddings="int8")


def test_a_dense_model_at_full_size(tmp_path):
    """Nothing else about it is ours."""
    model = materialize(toys.toy_result(toys.qwen2(), adapters=0), 1.0, quantize_embeddings="int8")
    assert not any(isinstance(module, acip_kernels.LowRankLinear) for module in model.modules())
    save(model, tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model))


def test_copies_and_moves_keep_one_matrix():
    model = materialize(toys.toy_result(toys.qwen2()), 0.6, quantize_embeddings="int8")
    for moved in (copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).to("meta")):
        embedding, head = moved.get_input_embeddings(), moved.get_output_embeddings()
        assert head.qweight is embedding.qweight and head.scales is embedding.scales
        assert head.qweight is not model.get_input_embeddings().qweight
        assert (embedding.qweight.dtype, embedding.scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(narrow).dtype == narrow.dtype == torch.bfloat16
    narrow.tie_weights()  # as transformers does at times
    assert torch.equal(logits(narrow), logits(copy.deepcopy(model).to(torch.bfloat16)))


def test_fused_compiled_and_generated():
    if not extension.available():
        pytest.skip("fusing is the native extension's")  # .ci/run requires it, so there nothing is skipped
    for make in (toys.llama, toys.qwen2):
        model = materialize(toys.toy_result(make()), 0.6, quantize_embeddings="int8")
        ids = toys.token_ids(1, 5)
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)
        fuse(model)
        assert "forward" in model.get_output_embeddings().__dict__
        toys.assert_close(logits(model), logits(unfuse(copy.deepcopy(model))))
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
        assert torch.equal(Decoder(model, max_length=32)(ids, max_new_tokens=8), expected)


def test_gradients_reach_adapters_through_it():
    model = materialize(toys.toy_result(toys.qwen2()), 0.6, quantize_embeddings="int8")
    ids = toys.token_ids()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    layer = next(
        module
        for module in model.modules()
        if isinstance(module, acip_kernels.LowRankLinear | acip_kernels.PivotLinear)
    )
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in layer.parameters())


def _embeddings(fields, **changes):
    fields["embeddings"] |= changes


WRONG = {
    "no codes": (lambda t, f: t.pop("model.embed_tokens.qweight"), "embed_tokens.qweight' is missing"),
    "no scales": (lambda t, f: t.pop("model.embed_tokens.scales"), "embed_tokens.scales' is missing"),
    "an infinite scale": (lambda t, f: t["model.embed_tokens.scales"][:1].fill_(float("inf")), "scales holds values"),
    "too few rows": (
        lambda t, f: t.update({"model.embed_tokens.qweight": t["model.embed_tokens.qweight"][:8].contiguous()}),
        "embed_tokens.qweight is .* but must be",
    ),
    "forgotten": (lambda t, f: f.pop("embeddings"), r"embed_tokens.weight is \[0\]"),
    "4 bits": (lambda t, f: _embeddings(f, bits=4), "embeddings: "),
    "text": (lambda t, f: f.update(embeddings="int8"), "embeddings must be an object"),
    "a field too many": (lambda t, f: _embeddings(f, colour=1), "embeddings: .*must have bits"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_an_error_that_names_it(wrong, tmp_path):
    change, message = WRONG[wrong]
    path = tmp_path / "model"
    save(materialize(toys.toy_result(toys.qwen2()), 0.6, quantize_embeddings="int8"), path)
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_what_is_no_plain_embedding_is_refused():
    class Other(nn.Embedding):
        pass

    with pytest.raises(ValueError, match="takes an Embedding, and the model has Other"):
        QuantizedEmbedding.from_embedding(Other(3, 4), Scheme("int8"))
    with pytest.raises(ValueError, match="quantize must be one of"):
        materialize(toys.toy_result(toys.llama()), 0.6, quantize_embeddings="int2")
