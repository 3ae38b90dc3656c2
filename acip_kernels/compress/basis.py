"""The basis in which a weight is decomposed: its own, or one that knows the layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..nn.svd_linear import svd


@torch.no_grad()
def input_covariances(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[dict],
    progress: Callable[[int, int], None] | None = None,
    total: int | None = None,
) -> dict[str, Tensor]:
    """`XᵀX / tokens`, float64 `[in, in]`, of the inputs of the layers `names` over `batches`.

    Every batch is a dict of the model's arguments. A layer that no batch reaches (an expert, say) gets zeros, which
    `whitened_svd` takes for an unknown input.
    """
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(names, 0)
    latest: dict[str, tuple] = {}

    def hook(name: str):
        def add(module, args):
            x = args[0].detach()
            # Siblings (q, k and v) have the same input: one product serves all of them.
            if latest.get("x") is not x:
                flat = x.reshape(-1, x.shape[-1]).float()
                latest.update(x=x, product=flat.t() @ flat)
            product = latest["product"].double()
            sums[name] = product if name not in sums else sums[name].add_(product)
            tokens[name] += x.numel() // x.shape[-1]

        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in tokens]
    training = model.training
    model.eval()
    try:
        for done, batch in enumerate(batches, 1):
            model(**batch)
            if progress is not None:
                progress(done, total or done)
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    return {name: total_sum / tokens[name] for name, total_sum in sums.items()}


def whitened_svd(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(U, S, Vh)` of `weight [out, in]` whose truncation loses least of the *output*, for inputs of `covariance`.

    With `covariance = L Lᵀ`: `W L = U diag(S) V'ᵀ`, and `Vh = V'ᵀ L⁻¹`, so that `U diag(S) Vh = W` still, `U` is
    orthonormal, and dropping entry `i` adds `S_i²` to the mean squared output error (SVD-LLM, arXiv 2403.07378). `Vh`'s
    rows are no unit vectors, but orthonormal with respect to `covariance`.

    The Cholesky factor is taken in float64, with as much damping as it needs: a thousandth of a per cent of the mean
    variance to begin with, ten times more while it fails. So a covariance of any rank works.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    covariance = covariance.to(weight.device, torch.float64)
    mean = covariance.diagonal().mean()
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("whitened_svd: the covariance of the layer's inputs holds NaN or infinite values")
    if mean <= 0:
        return svd(weight)
    damping = 1e-5
    while True:
        damped = covariance + damping * mean * torch.eye(len(covariance), dtype=torch.float64, device=weight.device)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damping *= 10
    U, S, V = svd((weight.double() @ L).to(exact))
    Vh = torch.linalg.solve_triangular(L, V.double(), upper=False, left=False)
    return U.to(weight.dtype), S, Vh.to(weight.dtype).contiguous()
