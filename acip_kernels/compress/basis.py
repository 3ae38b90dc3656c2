"""The basis in which a weight is decomposed: its own, or one that knows the layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..models.loss import IGNORE
from ..models.targets import weight_of
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
    names = list(names)
    inputs = _Moments(dict.fromkeys(names, "in"))
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: inputs.add(name, args[0]))
        for name in names
    ]
    _over(model, batches, hooks, lambda batch: model(**batch), progress, total)
    return inputs.means(model)


def input_magnitudes(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[dict],
    progress: Callable[[int, int], None] | None = None,
    total: int | None = None,
) -> dict[str, Tensor]:
    """The mean magnitude of each input feature of the layers `names` over `batches`, float64 `[in]`."""
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(names, 0)

    def hook(name: str):
        def add(module, args):
            magnitudes = args[0].detach().reshape(-1, args[0].shape[-1]).abs().sum(0, dtype=torch.float64)
            sums[name] = magnitudes if name not in sums else sums[name].add_(magnitudes)
            tokens[name] += args[0].numel() // args[0].shape[-1]

        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in tokens]
    _over(model, batches, hooks, lambda batch: model(**batch), progress, total)
    for name in tokens:
        if not tokens[name]:  # no batch reached it
            sums[name] = torch.zeros(weight_of(model.get_submodule(name)).shape[1], dtype=torch.float64)
    return {name: sums[name] / max(tokens[name], 1) for name in tokens}


@torch.no_grad()
def layer_covariances(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[dict],
    progress: Callable[[int, int], None] | None = None,
    total: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`XᵀX / tokens` of the inputs, as `input_covariances`, and `GᵀG / tokens` of the gradients at the outputs.

    `G [tokens, out]` is the gradient of the *sum* over tokens of the next-token loss; its second moment is float64
    `[out, out]`. Together they are the Kronecker-factored approximation of the loss's curvature in a layer's weight
    (K-FAC, arXiv 1503.05671, with the empirical Fisher matrix). Batches need `labels`.
    """
    names = list(names)
    inputs, gradients = _Moments(dict.fromkeys(names, "in")), _Moments(dict.fromkeys(names, "out"))

    def hook(name: str):
        def add(module, args, output):
            inputs.add(name, args[0])
            # The first layers see no trainable parameter: the graph begins at their output.
            if not output.requires_grad:
                output.requires_grad_(True)
            output.register_hook(lambda gradient: gradients.add(name, gradient))

        return add

    def step(batch):
        labels = batch["labels"][..., 1:]
        with torch.enable_grad():
            loss = model(**batch).loss
            (loss * (labels != IGNORE).sum()).backward()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        _over(model, batches, hooks, step, progress, total)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return inputs.means(model), gradients.means(model)


# Rows of a second moment that are made at a time, each from its diagonal on.
_MOMENT_ROWS = 192


class _Moments:
    """Second moments `Σ tᵀt` of what flows through layers, in float64, and over how many tokens.

    They are symmetric, and take longer than the passes through the model: only blocks from the diagonal on are made.
    """

    def __init__(self, sides: dict[str, str]):
        self.sides = sides
        self.sums: dict[str, Tensor] = {}
        self.tokens = dict.fromkeys(sides, 0)
        self.latest: tuple = (None, None)

    def add(self, name: str, tensor: Tensor) -> None:
        # Siblings (q, k and v) have the same input: one product serves all of them.
        if self.latest[0] is not tensor:
            flat = tensor.detach().reshape(-1, tensor.shape[-1]).float()
            product = flat.new_zeros(flat.shape[1], flat.shape[1])
            for start in range(0, len(product), _MOMENT_ROWS):
                rows = slice(start, start + _MOMENT_ROWS)
                torch.mm(flat[:, rows].t(), flat[:, start:], out=product[rows, start:])
            self.latest = tensor, product
        product = self.latest[1]
        self.sums[name] = product.double() if name not in self.sums else self.sums[name].add_(product)
        self.tokens[name] += tensor.numel() // tensor.shape[-1]

    def means(self, model: nn.Module) -> dict[str, Tensor]:
        self.latest = None, None
        means = {}
        for name, side in self.sides.items():
            if self.tokens[name]:
                # Taken out, so that a wide model's moments are not held twice.
                upper = self.sums.pop(name).triu_().div_(self.tokens[name])
                means[name] = upper + upper.triu(1).t()
            else:
                out_features, in_features = weight_of(model.get_submodule(name)).shape
                width = in_features if side == "in" else out_features
                means[name] = torch.zeros(width, width, dtype=torch.float64)
        return means


def _over(model, batches, hooks, step, progress, total) -> None:
    """`step` for every batch, the model in evaluation mode; removes the hooks."""
    training = model.training
    model.eval()
    try:
        for done, batch in enumerate(batches, 1):
            step(batch)
            if progress is not None:
                progress(done, total or done)
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()


def whitened_svd(
    weight: Tensor, covariance: Tensor, gradient_covariance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(U, S, Vh)` of `weight [out, in]` whose truncation loses least, for inputs of `covariance [in, in]`.

    With `covariance = L Lᵀ`: `W L = U diag(S) V'ᵀ`, and `Vh = V'ᵀ L⁻¹`, so that `U diag(S) Vh = W` still, `U` is
    orthonormal, and dropping entry `i` adds `S_i²` to the mean squared output error (SVD-LLM, arXiv 2403.07378). `Vh`'s
    rows are no unit vectors, but orthonormal with respect to `covariance`.

    With `gradient_covariance = M Mᵀ [out, out]` as well: `Mᵀ W L = U' diag(S) V'ᵀ` and `U = M⁻ᵀ U'`. Dropping entry `i`
    then adds `S_i²` to the quadratic form of the Kronecker-factored curvature (see `layer_covariances`), twice the
    increase of the loss per token that it predicts; so the `S_i` of different layers have one unit.

    The factors are taken in float64, with as much damping as they need; see `damped_cholesky`.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    L = damped_cholesky(covariance, weight.device)
    if L is None:
        return svd(weight)
    product = weight.double() @ L
    M = None if gradient_covariance is None else damped_cholesky(gradient_covariance, weight.device)
    if M is not None:
        product = M.t() @ product
    U, S, V = svd(product.to(exact))
    Vh = torch.linalg.solve_triangular(L, V.double(), upper=False, left=False)
    if M is not None:
        U = torch.linalg.solve_triangular(M.t(), U.double(), upper=True)
    return U.to(weight.dtype).contiguous(), S, Vh.to(weight.dtype).contiguous()


def damped_cholesky(covariance: Tensor, device: torch.device) -> Tensor | None:
    """The lower Cholesky factor, float64, of a covariance with some damping; None for one of zeros.

    Damped by a thousandth of a per cent of the mean variance to begin with, ten times more while the factorization
    fails. So a covariance of any rank works, and of any scale.
    """
    covariance = covariance.to(device, torch.float64)
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("whitened_svd: the covariance of a layer's inputs or gradients holds NaN or infinite values")
    mean = covariance.diagonal().mean()
    if mean <= 0:
        return None
    identity = torch.eye(len(covariance), dtype=torch.float64, device=device)
    damping = 1e-5
    while True:
        L, failed = torch.linalg.cholesky_ex(covariance + damping * mean * identity)
        if not failed:
            return L
        damping *= 10
