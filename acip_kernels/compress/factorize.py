"""Swap a model's linear layers for their singular value decompositions."""

from __future__ import annotations

import hashlib
import logging
import pathlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import files
from ..models.targets import choose_targets, is_conv1d, linear_layers, weight_of
from ..nn import SVDLinear
from ..nn.svd_linear import svd
from .basis import Division, whitened_svd

log = logging.getLogger("acip_kernels")


def factorize(
    model: nn.Module,
    targets: str | Iterable[str] = "all-linear",
    *,
    exclude: Iterable[str] = (),
    mask_scale: float = 0.02,
    adapter_rank: int = 32,
    adapter_alpha: float = 16.0,
    adapter_dropout: float = 0.05,
    dtype: torch.dtype | None = None,
    covariances: dict[str, Tensor] | None = None,
    gradient_covariances: dict[str, Tensor] | None = None,
    svd_cache: str | pathlib.Path | None = None,
    seed: int = 0,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    division: Division | None = None,
    each: Callable[[SVDLinear], None] | None = None,
    release: bool = False,
) -> list[str]:
    """Replace `model`'s linear layers by `SVDLinear`, in place, and return their names.

    `nn.Linear` and GPT-2's `Conv1D` are replaced; the output head never is, and what else cannot be is named in one
    log line. Nothing is changed if any weight is not finite.

    Args:
        targets, exclude: "all-linear", a regular expression, or names or last parts of names; see
            `models.targets.choose_targets`.
        mask_scale, adapter_rank, adapter_alpha, adapter_dropout, backend: of every `SVDLinear`.
        dtype: of the factors; None for the layer's own.
        covariances: `{layer: [in, in]}` of the layers' inputs, see `basis.input_covariances`: those layers are
            decomposed so that truncation loses least of their output. None for plain decompositions.
        gradient_covariances: `{layer: [out, out]}` as well, of the gradients at their outputs (see
            `basis.layer_covariances`): so that truncation costs the loss least.
        svd_cache: directory that keeps every decomposition, under a name made from the weight's content: a second
            run starts at once, and an interrupted one goes on where it was. None keeps nothing.
        seed: of the adapters' start.
        progress: called as `progress(done, total)` after every layer.
        division: among several processes, which all call this with the same model: each decomposes the layers that it
            owns (`progress` counts those) and sends them to the others; covariances are needed for those alone.
        each: called with every new layer.
        release: take each layer's covariances out of both dicts when it is decomposed: together they may be larger than
            the model.

    Raises:
        ValueError: targets that mean no layer, a weight that is not finite (its layer is named), or a model that
            is factorized already.
    """
    if any(isinstance(module, SVDLinear) for module in model.modules()):
        raise ValueError("the model is factorized already")
    layers, left_out = linear_layers(model)
    if "" in layers:
        raise ValueError("the model is itself a linear layer: use SVDLinear.from_linear")
    names = choose_targets(layers, targets, exclude)
    if left_out:
        log.warning("left as they are, as they cannot be factorized: %s", "; ".join(left_out))
    for name in names:
        if not bool(torch.isfinite(weight_of(layers[name])).all()):
            raise ValueError(f"{name}.weight holds NaN or infinite values; the model cannot be factorized")

    def decomposition(name: str) -> dict[str, Tensor]:
        weight = weight_of(layers[name]).detach()
        weight = weight if dtype is None else weight.to(dtype)
        take = dict.pop if release else dict.get
        covariance, gradient_covariance = (take(d or {}, name, None) for d in (covariances, gradient_covariances))
        U, S, Vh = cached_svd(weight, svd_cache, covariance, gradient_covariance)
        factors = {"U": U, "S": S, "Vh": Vh}
        if covariance is not None and weight.shape[1] > weight.shape[0]:
            factors["input_variances"] = covariance.diagonal().float()
        return factors

    places = _places(model)
    generator = {}
    for name, factors in _decompositions(names, decomposition, division, progress):
        layer = layers[name]
        where = weight_of(layer).device
        if where not in generator:
            generator[where] = torch.Generator(where).manual_seed(seed)
        bias = layer.bias if layer.bias is None or dtype is None else layer.bias.to(dtype)
        new = SVDLinear(
            **factors,
            bias=bias,
            mask_scale=mask_scale,
            adapter_rank=adapter_rank,
            adapter_alpha=adapter_alpha,
            adapter_dropout=adapter_dropout,
            source_type="Conv1D" if is_conv1d(layer) else "Linear",
            generator=generator[where],
            backend=backend,
        )
        new.train(layer.training)
        for parent, child_name in places[id(layer)]:
            setattr(parent, child_name, new)
        if each is not None:
            each(new)
    return names


def _decompositions(names: list[str], decomposition: Callable, division: Division | None, progress: Callable | None):
    """`(name, factors)` of every layer, decomposed as they are asked for, or by the process that owns each."""
    progress = progress or (lambda done, total: None)
    if division is None or division.processes.size == 1:
        for done, name in enumerate(names, 1):
            yield name, decomposition(name)
            progress(done, len(names))
        return
    mine, own = {}, [name for name in names if division.has(name)]
    for done, name in enumerate(own, 1):
        mine[name] = decomposition(name)
        progress(done, len(own))
    for name in names:
        yield name, division.processes.broadcast_tensors(mine.pop(name, None), division.owners[name])


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each module's replacement wherever `model` uses it."""
    places = _places(model)
    for old, new in replacements.items():
        for parent, name in places[id(old)]:
            setattr(parent, name, new)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module is used, by its id: a module may be in several places."""
    places: dict[int, list] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, name))
    return places


def cached_svd(
    weight: Tensor,
    directory: str | pathlib.Path | None,
    covariance: Tensor | None = None,
    gradient_covariance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of `weight`, whitened if a covariance is given; read from `directory`, or computed and kept there."""

    def compute():
        return svd(weight) if covariance is None else whitened_svd(weight, covariance, gradient_covariance)

    if directory is None:
        return compute()
    hasher = hashlib.blake2b(digest_size=16)
    for tensor in (weight, covariance, gradient_covariance):
        if tensor is not None:
            hasher.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            hasher.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    digest = hasher.hexdigest()
    path = pathlib.Path(directory) / f"{digest}.safetensors"
    if path.exists():
        try:
            factors = files.read_tensors(path, ("U", "S", "Vh"))
            check_factors(weight, *factors.values())
        except ValueError as error:
            log.warning("decomposing anew: %s", error)
        else:
            return tuple(factors[name].to(weight.device) for name in ("U", "S", "Vh"))
    U, S, Vh = compute()
    try:
        files.write_tensors(path, {"U": U, "S": S, "Vh": Vh})
    except OSError as error:
        # The cache only saves time; the run does not need it.
        log.warning("the decomposition is not kept: %s", error)
    return U, S, Vh


def check_factors(
    weight: Tensor,
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    scores: Tensor | None = None,
    input_variances: Tensor | None = None,
) -> None:
    """Raises `ValueError` unless these can be the factors of `weight [out, in]`, as far as a look can tell."""
    out, in_ = weight.shape
    k = min(out, in_)
    for name, tensor, shape in (
        ("U", U, (out, k)),
        ("S", S, (k,)),
        ("Vh", Vh, (k, in_)),
        ("scores", scores, (k,)),
        ("input_variances", input_variances, (in_,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, where the layer needs {list(shape)}")
        if tensor.dim() == 1 and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is not finite")


def svd_layers(model: nn.Module) -> dict[str, SVDLinear]:
    """The `SVDLinear` layers of `model` by name, in its order. Raises `ValueError` if there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    if not layers:
        raise ValueError("the model has no SVDLinear layer: factorize it first")
    return layers
