"""The next-token loss of a causal language model, without its logits in memory where that is the same."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ..ops.linear_cross_entropy.op import linear_cross_entropy

log = logging.getLogger("acip_kernels")

IGNORE = -100
# What a model does to its logits, or adds to its loss, after the head: then the head's product alone is not the loss.
_CHANGES_LOSS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_router_logits")


class CausalLoss:
    """`loss(inputs)` is `model(**inputs).loss`, the mean cross-entropy of the labelled tokens, with a graph.

    Where the model is transformers' usual one, a base model and a frozen linear head, the head's product and the
    cross-entropy are `linear_cross_entropy`, which never stores all logits. Whether that gives the same number is tried
    on the beginning of the first batch; if not, the model's own loss is used, and one log line says so.

    Args:
        lean: None to try, False for the model's own loss.
    """

    def __init__(self, model: nn.Module, lean: bool | None = None):
        self.model, self.lean = model, lean
        if lean is None and not self._is_usual():
            self.lean = False

    def __call__(self, inputs: dict) -> Tensor:
        return self._lean(inputs) if self.is_lean(inputs) else self.model(**inputs).loss

    def is_lean(self, inputs: dict) -> bool:
        """Whether the loss is the cross-entropy of base model and head; tried on `inputs` if it is not known."""
        if self.lean is None:
            self.lean = self._agrees(inputs)
        return self.lean

    def _is_usual(self) -> bool:
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        base = getattr(self.model, "base_model", self.model)
        if type(head) is not nn.Linear or base is self.model or head.weight.requires_grad:
            return False
        config = self.model.config
        return not any(getattr(config, name, None) not in (None, False, 1, 1.0) for name in _CHANGES_LOSS)

    def _lean(self, inputs: dict) -> Tensor:
        head = self.model.get_output_embeddings()
        others = {key: value for key, value in inputs.items() if key != "labels"}
        hidden = self.model.base_model(**others, use_cache=False)[0]
        # The label of a position is the next token.
        labels = nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE)[..., 1:]
        total = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), head.weight, labels.reshape(-1), head.bias, ignore_index=IGNORE
        )
        return total / (labels != IGNORE).sum()

    @torch.no_grad()
    def _agrees(self, inputs: dict) -> bool:
        few = {
            key: value[:1, :16] if isinstance(value, Tensor) and value.dim() == 2 else value
            for key, value in inputs.items()
        }
        training = self.model.training
        self.model.eval()
        try:
            own, lean = float(self.model(**few).loss), float(self._lean(few))
        except Exception as error:  # a model of another kind, whatever it is
            log.info("the model's own loss is used: the lean one fails with %s", error)
            return False
        finally:
            self.model.train(training)
        # Both sum the same logits, rounded to the head's dtype; the loss is a difference of them, and transformers' is
        # in float32 whatever the model is in.
        eps = max(torch.finfo(dtype).eps for dtype in (self.model.get_output_embeddings().weight.dtype, torch.float32))
        if abs(own - lean) <= 32 * eps * max(1.0, abs(own)):
            return True
        log.info("the model's own loss is used: it is %.6g where cross-entropy of the head is %.6g", own, lean)
        return False
