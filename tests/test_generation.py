"""The compiled decoding loop: the same tokens as transformers' `generate`, whatever the layers are."""

import pytest
import torch
import toys

import acip_kernels
from acip_kernels import generation
from acip_kernels.ops import extension

PROMPT, NEW = 5, 20


def stock(model, ids, new=NEW, **options):
    options = {"do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)


def without_end(model):
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", toys.MODELS)
def test_the_tokens_are_those_of_generate(name):
    """Biases, one matrix for embedding and head, windows shorter than what is decoded, GPT-2's positions."""
    model = without_end(toys.MODELS[name]())
    decoder = generation.Decoder(model, PROMPT + NEW, batch_size=2)
    for length, new in ((PROMPT, NEW), (3, 7), (1, 1)):
        ids = toys.token_ids(2, length)
        assert torch.equal(decoder(ids, new), stock(model, ids, new))
    assert model.config._attn_implementation == "sdpa"


def factorized():
    result = toys.toy_result(toys.llama())
    return without_end(acip_kernels.materialize(result, 0.6).eval())


def test_low_rank_layers_decode_the_same():
    model, ids = factorized(), toys.token_ids(1, PROMPT)
    assert torch.equal(generation.generate(model, ids, NEW), stock(model, ids))


@pytest.mark.skipif(not extension.available(), reason=f"no native kernels: {extension.missing}")
@pytest.mark.parametrize("make", [factorized, lambda: without_end(toys.llama())], ids=["factors", "dense"])
def test_fused_layers_decode_the_same(make):
    model, ids = make(), toys.token_ids(1, PROMPT)
    expected = stock(model, ids)
    acip_kernels.fuse(model)
    assert torch.equal(generation.generate(model, ids, NEW), expected)


def test_two_models_do_not_share_what_is_compiled():
    ids = toys.token_ids(1, PROMPT)
    first, second = (without_end(toys.llama(seed)) for seed in (0, 1))
    decoders = [generation.Decoder(model, PROMPT + NEW) for model in (first, second)]
    found = [decoder(ids, NEW) for decoder in decoders]
    assert torch.equal(found[0], stock(first, ids)) and torch.equal(found[1], stock(second, ids))
    assert not torch.equal(found[0], found[1])
    assert torch.equal(decoders[0](ids, NEW), found[0])


def test_it_is_compiled_once():
    """Whatever the lengths of prompts and answers."""
    model = without_end(toys.llama())
    decoder = generation.Decoder(model, 40)
    torch._dynamo.utils.counters.clear()
    for length in (1, PROMPT, 12):
        ids = toys.token_ids(1, length)
        assert torch.equal(decoder(ids, 40 - length), stock(model, ids, 40 - length))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_answers_end_where_those_of_generate_do():
    model = toys.llama()
    ids = toys.token_ids(3, PROMPT)
    model.generation_config.eos_token_id = None
    free = stock(model, ids)
    # A token that one answer reaches early, another late or never.
    ends = [int(free[0, PROMPT + 2]), int(free[1, PROMPT + 6])]
    decoder = generation.Decoder(model, PROMPT + NEW, batch_size=3)
    for chosen in (ends[:1], ends):
        found = decoder(ids, NEW, eos_token_id=chosen)
        assert torch.equal(found, stock(model, ids, eos_token_id=chosen))
    model.generation_config.eos_token_id = ends
    assert torch.equal(decoder(ids, NEW), found)
    assert torch.equal(decoder(ids, NEW, eos_token_id=()), free)
    # Nothing is decoded after the last one's end.
    assert decoder(ids, NEW, eos_token_id=free[:, PROMPT + 2].tolist()).shape[1] <= PROMPT + 3


DRAWING = [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 7, "top_p": 0.6, "temperature": 1.3}]


@pytest.fixture(scope="module")
def drawing():
    model = without_end(toys.llama())
    return model, generation.Decoder(model, PROMPT + NEW, batch_size=2)


@pytest.mark.parametrize("options", DRAWING)
def test_it_draws_what_generate_draws(drawing, options):
    (model, decoder), ids = drawing, toys.token_ids(2, PROMPT)
    torch.manual_seed(3)
    found = decoder(ids, NEW, do_sample=True, **options)
    torch.manual_seed(3)
    expected = stock(model, ids, do_sample=True, **{"top_k": 0, "top_p": 1.0, "temperature": 1.0} | options)
    assert torch.equal(found, expected)
    draws = [decoder(ids, NEW, do_sample=True, generator=torch.Generator().manual_seed(5), **options) for _ in range(2)]
    assert torch.equal(*draws)


def test_what_it_refuses():
    model = toys.llama()
    with pytest.raises(TypeError, match="transformers model, got Linear"):
        generation.Decoder(torch.nn.Linear(2, 2), 8)
    for options, message in (({"max_length": 0}, "max_length"), ({"max_length": 8, "batch_size": 0}, "batch_size")):
        with pytest.raises(ValueError, match=message):
            generation.Decoder(model, **options)
    chunked = toys.llama()
    chunked.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        generation.Decoder(chunked, 8)

    decoder = generation.Decoder(model, 8, batch_size=2)
    for ids, new, message in (
        (toys.token_ids(1, 4), 2, "input_ids must be"),
        (toys.token_ids(2, 4)[0], 2, "input_ids must be"),
        (toys.token_ids(2, 4)[:, :0], 2, "input_ids must be"),
        (toys.token_ids(2, 4), 5, "max_length=8"),
        (toys.token_ids(2, 4), 0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(ids, new)
    ids = toys.token_ids(2, 4)
    with pytest.raises(ValueError, match="do_sample"):
        decoder(ids, 2, top_k=3)
    for options in ({"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            decoder(ids, 2, do_sample=True, **options)
    with pytest.raises(ValueError, match="eval"):
        decoder.model.train()
        decoder(ids, 2)
