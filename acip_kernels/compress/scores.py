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
        self.masks = [module.mask for module in layers.values()]
        self.sizes = [mask.numel() for mask in self.masks]
        device = self.masks[0].device
        self.layer = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes)).to(device)
        self.scores = self.flat_masks()

    def flat_masks(self) -> Tensor:
        """All mask parameters, float32 [entries]."""
        return torch.cat([mask.detach().to(self.layer.device, torch.float32) for mask in self.masks])

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: the scores of the new masks."""
        self.scores = updated_scores(self.scores, self.flat_masks())

    def ranks(self) -> Tensor:
        """Live ranks, int64 [layers]."""
        live = (self.scores > 0).to(torch.int64)
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
    return torch.where(masks > 0, masks, torch.where(scores > 0, -torch.ones_like(scores), scores - 1))


@torch.no_grad()
def score_by_singular_values(model: nn.Module) -> None:
    """Score every singular value by itself: plain SVD truncation over the whole model, the floor for every run."""
    for layer in svd_layers(model).values():
        layer.scores.copy_(layer.S)
