"""Attention while a transformers model is trained on a CPU: ours where it does the same as the model's own."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops.causal_attention.op import causal_attention
from ..ops.common import multiplies_natively

NAME = "acip_training"


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
    """transformers' attention function: `causal_attention` where no mask is given and it applies, else torch's."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if (
        attention_mask is None
        and causal
        and not dropout
        and (query.requires_grad or module.training)  # a teacher's too
        and key.shape[2] == query.shape[2] > 1
        and key.shape == value.shape
        and key.shape[-1] == query.shape[-1]
        and options.get("softcap") is None
        and options.get("position_bias") is None
    ):
        return causal_attention(query, key, value, scaling).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def use(model: nn.Module) -> str | None:
    """Give `model` our attention and return the name of its own for `restore`; None if it keeps its own.

    Only a transformers model on a CPU that multiplies its dtype natively, and that uses torch's fused attention.
    """
    parameter = next(model.parameters(), None)
    if (
        not isinstance(model, PreTrainedModel)
        or parameter is None
        or parameter.device.type != "cpu"
        or not multiplies_natively(parameter.dtype)
        or model.config._attn_implementation != "sdpa"
        or not model._can_set_attn_implementation()
    ):
        return None
    model.set_attn_implementation(NAME)
    return "sdpa"


def restore(model: nn.Module, name: str | None) -> None:
    """Undo `use`."""
    if name is not None:
        model.set_attn_implementation(name)
