"""The score map: one float32 score for every singular value of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .factorize import svd_layers


class ScoreMap:
    """The scores of a running compression, in one flat buffer over all layers.

    `scores` float32 [entries], `layer` int64 [entries] the number of the layer each belongs to, `sizes` the
    entries of each layer. A live entry's score is its mask parameter; an entry pruned at this step has -1, one pruned
    `n` steps earlier -1 - n (ACIP.md section 2).
    """

    def __init__(self, layers: dict):
        self.layers = layers
        masks = [module.mask for module in layers.values()]
        self.sizes = [mask.numel() for mask in masks]
        devices = {mask.device for mask in masks}
        if len(devices) > 1:
            raise ValueError(f"the masks are on {', '.join(map(str, devices))}: a run needs the model on one device")
        # From here on every layer's mask is a part of this one parameter.
        self.masks = nn.Parameter(torch.cat([mask.detach() for mask in masks]))
        for mask, part in zip(masks, self.masks.detach().split(self.sizes), strict=True):
            mask.data = part
        self.bind_gradients()
        device = self.masks.device
        self.layer = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes)).to(device)
        self.scores = self.flat_masks()

    def numbers(self) -> Tensor:
        """What each entry's two vectors hold, `in + out`, float32 [entries]."""
        held = [float(module.in_features + module.out_features) for module in self.layers.values()]
        return torch.tensor(held, device=self.layer.device)[self.layer]

    def bind_gradients(self) -> None:
        """Make every mask's gradient a part of one buffer: a backward pass adds to a gradient that is there."""
        self.masks.grad = torch.zeros_like(self.masks)
        for module, part in zip(self.layers.values(), self.masks.grad.split(self.sizes), strict=True):
            module.mask.grad = part

    def release(self) -> None:
        """Give every layer a mask of its own again."""
        for module in self.layers.values():
            module.mask.grad = None
            module.mask.data = module.mask.detach().clone()

    def flat_masks(self) -> Tensor:
        """All mask parameters, float32 [entries]."""
        return self.masks.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: the scores of the new masks."""
        self.scores = updated_scores(self.scores, self.masks.detach())

    def ranks(self, scores: Tensor | None = None) -> Tensor:
        """Live ranks, int64 [layers], by `scores` or the present ones."""
        live = ((self.scores if scores is None else scores) > 0).to(torch.int64)
        return torch.zeros(len(self.sizes), dtype=torch.int64, device=live.device).index_add_(0, self.layer, live)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat buffer by layer."""
        return dict(zip(self.layers, flat.split(self.sizes), strict=True))

    def write_back(self) -> None:
        """Put the scores into the layers."""
        for name, scores in self.split(self.scores).items():
            self.layers[name].scores.copy_(scores)


def updated_scores(scores: Tensor, masks: Tensor) -> Tensor:
    """One step of the score map: the new mask where it is live, -1 for what has just been pruned, else one less."""
    masks = masks.to(scores.dtype)
    return torch.where(masks > 0, masks, torch.where(scores > 0, -torch.ones_like(scores), scores - 1))


@torch.no_grad()
def score_by_singular_values(model: nn.Module) -> None:
    """Score every singular value by itself: plain SVD truncation over the whole model, the floor for every run."""
    for layer in svd_layers(model).values():
        layer.scores.copy_(layer.S)
