"""What a compression yields: a model from which any size can be cut."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import Tensor, nn

from .config import CompressionConfig
from .factorize import svd_layers
from .materialize import Cut, model_cut
from .methods import RankingConfig


@dataclasses.dataclass
class CompressionResult:
    """A run's model, from which any size can be cut.

    model: with `SVDLinear` layers, which hold the factors, scores and adapters. config: what it was made with (a
    `CompressionConfig`, `NestedConfig` or `RankingConfig`), or None if that is not known. history: a dict for every
    step (`step`, `phase`, `loss`, `size_ratio`, `seconds` and what else the method has). size_ratio: the size that
    pruning ended at, factorized layers without adapters; 1 for a method that prunes nothing.
    """

    model: nn.Module
    config: CompressionConfig | RankingConfig | None = None
    history: list[dict] = dataclasses.field(default_factory=list)
    size_ratio: float = 1.0

    @property
    def scores(self) -> dict[str, Tensor]:
        """One float32 score for every singular value, `{layer: [k]}`; the lowest is pruned first."""
        return {name: layer.get_buffer("scores") for name, layer in svd_layers(self.model).items()}

    def cut(self, size_ratio: float, **options: Any) -> Cut:
        """Which singular values stay at `size_ratio`, and what that comes to in either count; see `plan_cut`."""
        return model_cut(self.model, size_ratio, **options)

    def at(self, size_ratio: float, *, count: str = "factorized") -> nn.Module:
        """The model itself, pruned to `size_ratio` in place, for evaluation.

        Any size can follow any other, at once. The adapters stay beside the factors, as they were trained. For a model
        of its own, faster and smaller, `materialize`.
        """
        cut = self.cut(size_ratio, count=count)
        for name, layer in svd_layers(self.model).items():
            layer.set_live(cut.live[name])
        return self.model.eval()

    def save(
        self,
        path: str | os.PathLike,
        *,
        compact: bool = False,
        tokenizer: Any = None,
        base_model: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write an elastic checkpoint: see `acip_kernels.save`."""
        from ..models.saving import save

        save(self, path, compact=compact, tokenizer=tokenizer, base_model=base_model, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike, **options: Any) -> CompressionResult:
        """Read an elastic checkpoint, to cut or to save it again; `options` as for `acip_kernels.load`."""
        from ..models.saving import load_result

        return load_result(path, **options)
