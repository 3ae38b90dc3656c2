"""`QuantizedEmbedding`, and the output head that shares its codes: what is large in a small model beside its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import quantize as q
from .quantized_linear import QuantizedLinear

_ROWS = 8192  # that are rounded at once


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` of a weight `[num_embeddings, embedding_dim]` in one of the formats of `ops.quantize`.

    A token's row becomes numbers as it is looked up. Its state is that of a `QuantizedLinear`: `qweight`, `scales`,
    `zeros`, and `weight [0]`, which carries the dtype of the result. No gradients.

    Args:
        num_embeddings, embedding_dim, device, dtype: as for `nn.Embedding`. kind, group, symmetric: as for
            `QuantizedLinear`. scale: what a row is multiplied by, rounded to the dtype, as Gemma does.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        kind: str,
        group: int = 64,
        symmetric: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        q.check_options(kind, group, symmetric)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.scheme, self.scale = q.Scheme(kind, group, symmetric), scale
        for name in ("qweight", "scales", "zeros"):
            self.register_buffer(name, None)
        for name, (shape, dtype_) in q.shapes(num_embeddings, embedding_dim, **self.scheme.options).items():
            setattr(self, name, torch.zeros(shape, dtype=dtype_, device=device))
        # A parameter, as transformers ties parameters: it may tie this one as it would the dense one.
        self.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, scheme: q.Scheme, *, empty: bool = False) -> QuantizedEmbedding:
        """`embedding`, its rows rounded to nearest; empty: to load a state into.

        Takes an `nn.Embedding`, or transformers' kind that multiplies its rows by a number. Raises `ValueError` for any
        other class, which may compute something else, and for a weight that is not finite.
        """
        kind, weight = type(embedding), embedding.weight.detach()
        if kind is not nn.Embedding and not hasattr(embedding, "scalar_embed_scale"):
            raise ValueError(f"quantize_embeddings takes an Embedding, and the model has {kind.__name__}")
        scale = 1.0 if kind is nn.Embedding else embedding.scalar_embed_scale
        options = {**scheme.options, "scale": float(scale), "device": weight.device, "dtype": weight.dtype}
        new = cls(embedding.num_embeddings, embedding.embedding_dim, **options)
        if not empty:
            # Some rows at a time: what rounding makes on its way is several times the weight.
            parts = [q.quantize(rows, **scheme.options)._asdict() for rows in weight.split(_ROWS)]
            for name in parts[0]:
                if parts[0][name] is not None:
                    setattr(new, name, torch.cat([part[name] for part in parts]))
        return new.train(embedding.training)

    @property
    def kind(self) -> str:
        """As a `QuantizedLinear`'s."""
        return self.scheme.kind

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that this stands for, in `dtype` or the layer's own."""
        return self._numbers(self.qweight, self.scales, self.zeros, dtype or self.weight.dtype)

    def _numbers(self, qweight: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
        return q.dequantize(qweight, scales, zeros, cols=self.embedding_dim, group=self.scheme.group, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        zeros = None if self.zeros is None else self.zeros.index_select(0, flat)
        rows = self.qweight.index_select(0, flat), self.scales.index_select(0, flat), zeros
        y = self._numbers(*rows, self.weight.dtype).view(*ids.shape, self.embedding_dim)
        return y if self.scale == 1.0 else y * self.weight.new_tensor(self.scale)

    def _apply(self, fn, recurse=True):
        """As `QuantizedLinear._apply`: codes and scales go along to a device, but keep their dtypes."""
        before = {name: getattr(self, name) for name in ("qweight", "scales")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            device = getattr(self, name).device
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(device))
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"


class QuantizedHead(QuantizedLinear):
    """The output head of a model that has one matrix for it and for its embedding: the embedding's codes are its own.

    They are in the embedding's state alone, and go along when it is moved with the head, or before it.
    """

    def __init__(self, embedding: QuantizedEmbedding, bias: Tensor | None = None):
        options = {**embedding.scheme.options, "device": "meta", "dtype": embedding.weight.dtype}
        super().__init__(embedding.embedding_dim, embedding.num_embeddings, bias is not None, **options)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach())
        self._source = (embedding,)  # in a tuple: it is no child
        del self.weight  # a buffer; here, as there, a parameter
        self.weight = nn.Parameter(torch.empty_like(embedding.weight), requires_grad=False)
        for name in ("qweight", "scales", "zeros"):
            self.register_buffer(name, None, persistent=False)
        self.share()

    def share(self) -> None:
        """Take the embedding's tensors as they are now."""
        (embedding,) = self._source
        for name in ("qweight", "scales", "zeros"):
            self._buffers[name] = getattr(embedding, name)

    def _apply(self, fn, recurse=True):
        for name in ("qweight", "scales", "zeros"):
            self._buffers[name] = None
        nn.Module._apply(self, fn, recurse)
        self.share()
        return self
