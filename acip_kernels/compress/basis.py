"""The basis in which a weight is decomposed: its own, or one that knows the layer's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..models.loss import IGNORE
from ..models.targets import weight_of
from ..nn.svd_linear import svd
from .processes import Processes

# What `layer_covariances` weighs inputs by their gradients with. The more it is, the fewer tokens decide: for
# SmolLM2-135M 0.1 to 0.5 are better than none, and 1 is far worse (docs/quality.md).
GRADIENT_SHARE = 0.1


@dataclasses.dataclass
class Division:
    """How what is taken from the data, and decomposed, is divided among processes.

    Each computes with a batch in turn; `owners` says which has a layer's sums over all batches, and decomposes it. The
    sums are made in the order of the batches, so that they are the same bits for any number of processes.
    """

    processes: Processes
    owners: dict[str, int]
    # How many processes have a batch of their own at present; what the others compute does not count.
    busy: int = 1

    @classmethod
    def of(cls, processes: Processes, model: nn.Module, names: Iterable[str]) -> Division:
        """By what decompositions cost."""
        shapes = {name: weight_of(model.get_submodule(name)).shape for name in names}
        return cls(
            processes, processes.owners({n: float(out * in_ * min(out, in_)) for n, (out, in_) in shapes.items()})
        )

    @classmethod
    def none(cls, names: Iterable[str]) -> Division:
        """This process has all."""
        return cls(Processes(torch.device("cpu")), dict.fromkeys(names, 0))

    def has(self, name: str) -> bool:
        return self.owners[name] == self.processes.rank


@torch.no_grad()
def input_covariances(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[dict],
    progress: Callable[[int, int], None] | None = None,
    total: int | None = None,
    division: Division | None = None,
) -> dict[str, Tensor]:
    """`XᵀX / tokens`, float64 `[in, in]`, of the inputs of the layers `names` over `batches`.

    Every batch is a dict of the model's arguments. A layer that no batch reaches (an expert, say) gets zeros, which
    `whitened_svd` takes for an unknown input. With a `division` among processes, which all give the same batches, the
    result has the layers that this one owns.
    """
    names = list(names)
    division = division or Division.none(names)
    inputs = _Moments(dict.fromkeys(names, "in"), division)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: inputs.add(name, args[0]))
        for name in names
    ]
    _over(model, batches, hooks, lambda batch: model(**batch), progress, total, division)
    return inputs.means(model)


def input_magnitudes(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[dict],
    progress: Callable[[int, int], None] | None = None,
    total: int | None = None,
    division: Division | None = None,
) -> dict[str, Tensor]:
    """The mean magnitude of each input feature of the layers `names` over `batches`, float64 `[in]`.

    `division` as for `input_covariances`.
    """
    names = list(names)
    division = division or Division.none(names)
    sums = _Sums(names, division)

    def hook(name: str):
        def add(module, args):
            flat = args[0].detach().reshape(-1, args[0].shape[-1])
            sums.put(name, flat.abs().sum(0, keepdim=True, dtype=torch.float64), len(flat))

        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    _over(model, batches, hooks, lambda batch: model(**batch), progress, total, division)
    means = {}
    for name in filter(division.has, names):
        if name in sums.sums:
            means[name] = sums.sums[name][0] / sums.tokens[name]
        else:  # no batch reached it
            means[name] = torch.zeros(weight_of(model.get_submodule(name)).shape[1], dtype=torch.float64)
    return means


@torch.no_grad()
def layer_covariances(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[dict],
    progress: Callable[[int, int], None] | None = None,
    total: int | None = None,
    division: Division | None = None,
    gradient_share: float = GRADIENT_SHARE,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments of the inputs, weighed, and of the gradients at the outputs: what a change of the weights costs.

    The curvature of the loss in a layer's weight is `E[x xᵀ ⊗ g gᵀ]`, with the empirical Fisher matrix: `x [in]` the
    input of a token, `g [out]` the gradient of the *sum* over tokens of the next-token loss at its output. K-FAC (arXiv
    1503.05671) takes it for `E[x xᵀ] ⊗ E[g gᵀ]`, as if inputs told nothing of gradients; but a token to which all
    others attend is one input of a thousand, and has nearly all of the gradient at keys and values. So the first of the
    two is `E[w x xᵀ]` here, `w = 1 - gradient_share + gradient_share ‖g‖² / mean ‖g‖²`, the mean over a batch.

    Returns both by layer, float64 `[in, in]` and `[out, out]`. Batches need `labels`. `division` as for
    `input_covariances`.
    """
    names = list(names)
    division = division or Division.none(names)
    inputs, gradients = (_Moments(dict.fromkeys(names, side), division) for side in ("in", "out"))

    def hook(name: str):
        def add(module, args, output):
            x = args[0].detach()
            # The first layers see no trainable parameter: the graph begins at their output.
            if not output.requires_grad:
                output.requires_grad_(True)

            def both(gradient):
                squares = gradient.float().square().sum(-1, keepdim=True)
                mean = squares.mean()
                relative = torch.where(mean > 0, squares / mean, 1.0)
                inputs.add(name, x * (1 + gradient_share * (relative - 1)).sqrt())
                gradients.add(name, gradient)

            output.register_hook(both)

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
        _over(model, batches, hooks, step, progress, total, division)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return inputs.means(model), gradients.means(model)


# Rows of a second moment that are made at a time, each from its diagonal on.
_MOMENT_ROWS = 192


class _Sums:
    """Sums of matrices over batches, in float64, by layer, and over how many tokens; each at its layer's owner."""

    def __init__(self, names: Iterable[str], division: Division):
        self.division = division
        self.numbers = {name: number for number, name in enumerate(names)}
        self.sums: dict[str, Tensor] = {}
        self.tokens = dict.fromkeys(self.numbers, 0)

    def put(self, name: str, matrix: Tensor, tokens: int) -> None:
        division, processes = self.division, self.division.processes
        if processes.size == 1:
            self.sums[name] = matrix.double() if name not in self.sums else self.sums[name].add_(matrix)
            self.tokens[name] += tokens
            return
        self.tokens[name] += sum(_meet(division, self.numbers[name], tokens)[: division.busy])
        for rows, blocks in processes.gather_rows(division.owners[name], matrix):
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(matrix, dtype=torch.float64)
            for block in blocks[: division.busy]:
                self.sums[name][rows].add_(block)


class _Moments(_Sums):
    """Second moments `Σ tᵀt` of what flows through layers.

    They are symmetric, and take longer than the passes through the model: only blocks from the diagonal on are made.
    """

    def __init__(self, sides: dict[str, str], division: Division):
        super().__init__(sides, division)
        self.sides = sides
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
        self.put(name, self.latest[1], tensor.numel() // tensor.shape[-1])

    def means(self, model: nn.Module) -> dict[str, Tensor]:
        self.latest = None, None
        means = {}
        for name, side in self.sides.items():
            if not self.division.has(name):
                continue
            if self.tokens[name]:
                # Taken out, so that a wide model's moments are not held twice.
                upper = self.sums.pop(name).triu_().div_(self.tokens[name])
                means[name] = upper + upper.triu(1).t()
            else:
                width = _widths(model.get_submodule(name))[side == "in"]
                means[name] = torch.zeros(width, width, dtype=torch.float64)
        return means


def _widths(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` features of a linear layer, dense or not."""
    if hasattr(module, "in_features"):
        return module.out_features, module.in_features  # type: ignore[return-value]
    out, in_ = weight_of(module).shape
    return out, in_


def _meet(division: Division, number: int, tokens: int = 0) -> list[int]:
    """Every process's tokens at the layer of that number, which all must have come to; -1 for the end of a batch."""
    processes = division.processes
    everybody = processes.all_tensors(torch.tensor([number, tokens], device=processes.device))
    numbers, counts = torch.stack(everybody).t().tolist()
    if any(other != number for other in numbers):
        names = [*division.owners, "the end"]
        raise ValueError(
            "the batches of different processes take different ways through the model, as between experts: rank 0 is "
            f"at {names[numbers[0]]} while another is at {names[next(n for n in numbers if n != numbers[0])]}; "
            "rank the singular values in one process"
        )
    return counts


def _over(model, batches, hooks, step, progress, total, division) -> None:
    """`step` for every batch, the model in evaluation mode; removes the hooks."""
    training, done = model.training, 0
    model.eval()
    try:
        for batch, some in division.processes.rounds(batches):
            division.busy, done = len(some), done + len(some)
            step(batch)
            if division.processes.size > 1:
                _meet(division, -1)
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
