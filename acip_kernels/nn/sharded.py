"""Frozen tensors of which every process holds a part, put together while they are computed with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Sharded(nn.Module):
    """Frozen tensors of one dtype, their rows divided over the processes of `mesh` by torch's FSDP2 (`fully_shard`).

    `sharded(x, compute)` is `compute(x, **tensors)` with all rows of all tensors, which are gathered before and let go
    afterwards, and again for the backward pass; so what `compute` keeps for that should be these tensors, or views of
    them, and no copies.

    A module of its own, put into a layer, because there is no way back from `fully_shard`: a layer that is done with
    it takes the `whole` tensors out and drops it. What is trained stays outside, whole in every process.
    """

    def __init__(self, mesh, **tensors: Tensor):
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        fully_shard(self, mesh=mesh, reshard_after_forward=True)

    def forward(self, x: Tensor, compute: Callable) -> Tensor:
        y = compute(x, **dict(self.named_parameters(recurse=False)))
        # What gathers the tensors for the backward pass hangs on this output, and is lost if a view is written into.
        return y.clone() if y._is_view() else y

    def local(self, name: str) -> Tensor:
        """This process's rows, to read or to write into."""
        return getattr(self, name).to_local()

    def rows(self, name: str) -> slice:
        """Which rows those are."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        tensor = getattr(self, name)
        (length, *_), (start, *_) = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return slice(start, start + length)

    @torch.no_grad()
    def whole(self, name: str, local: Tensor | None = None) -> Tensor:
        """All rows of the tensor `name`, or of one like it (its dtype may differ) of which each process has `local`."""
        from torch.distributed.tensor import DTensor

        tensor = getattr(self, name)
        if local is not None:
            tensor = DTensor.from_local(
                local,
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=(tensor.shape[1], 1),
            )
        return tensor.full_tensor()
