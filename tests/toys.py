"""Tiny random models of every kind, and results as a run leaves them, without a run."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from acip_kernels import CompressionResult, factorize
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.models.quantizer import attach_factorized

VOCABULARY = 64

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # enough for confident, distinct predictions
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


def qwen2(seed=0, **changes):
    """Biases in q, k and v, and one matrix for embedding and head."""
    torch.manual_seed(seed)
    return _with_biases(Qwen2ForCausalLM(Qwen2Config(**SIZES | {"tie_word_embeddings": True} | changes)))


def qwen3(seed=0, **changes):
    """Norms of every head's query and key."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | changes)).eval()


def gpt2(seed=0, **changes):
    """`Conv1D` layers, biases, and one matrix for embedding and head."""
    torch.manual_seed(seed)
    settings = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 48,
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _with_biases(GPT2LMHeadModel(GPT2Config(**settings | changes)))


def gemma3(seed=0, **changes):
    """Sliding and full attention in turns, scaled and tied embeddings."""
    torch.manual_seed(seed)
    settings = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | settings | changes)).eval()


MODELS = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "gemma3": gemma3}


def _with_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokenizer():
    """A word for every token of the models' vocabulary, `w2`, `w3` …, and a chat template."""
    words = {"<s>": 0, "</s>": 1} | {f"w{number}": number for number in range(2, VOCABULARY)}
    words = Tokenizer(models.WordLevel(words, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}w3"
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", chat_template=template)


def text(words=3000):
    tokens = torch.randint(2, VOCABULARY, (words,), generator=torch.Generator().manual_seed(0)).tolist()
    return " ".join(f"w{token}" for token in tokens)


def token_ids(batch=2, length=12, seed=7):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def toy_result(model, adapters=2, seed=0):
    """`model`, factorized in place, as a `CompressionResult` with distinct random scores, a third of them negative.

    adapters: their rank; they are random and not zero.
    """
    factorize(model, adapter_rank=adapters, adapter_dropout=0.0, seed=seed)
    pick = torch.Generator().manual_seed(seed)
    layers = svd_layers(model)
    entries = sum(layer.full_rank for layer in layers.values())
    scores = (torch.randperm(entries, generator=pick) - entries // 3).float() / entries
    for layer, own in zip(layers.values(), scores.split([layer.full_rank for layer in layers.values()])):
        layer.scores.copy_(own)
        layer.mask.copy_(own.clamp_min(0))
        if adapters:
            layer.lora_A.normal_(std=layer.in_features**-0.5, generator=pick)
            layer.lora_B.normal_(std=0.3, generator=pick)
    attach_factorized(model)
    return CompressionResult(model.eval(), size_ratio=0.5)


# How many terms the sums have that lie one behind the other on the longest way to a logit: in each of two layers two
# norms, the two factors each of v, o, up and down with their adapters' ranks, and the attention's 12 positions; then
# the last norm and the head.
TERMS = 2 * (2 * 32 + (32 + 34) + (32 + 34) + (32 + 34) + (48 + 34) + 12) + 2 * 32


@torch.no_grad()
def logits(model):
    return model(input_ids=token_ids()).logits


def assert_close(actual, expected):
    """Equal but for the order of sums in float32: an error of half an ulp for every term."""
    assert actual.dtype == expected.dtype == torch.float32
    bound = TERMS * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= bound
