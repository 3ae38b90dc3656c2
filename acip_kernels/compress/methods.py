"""Rankings of singular values without a gradient run: the baselines, and ours to start from.

Every method decomposes the layers in its basis and gives every singular value a score; from there on all go the same
way: any size, `materialize`, evaluate.

- `svd`: the plain decomposition; the singular values of the whole model, as they are, are the scores.
- `asvd` (arXiv 2312.05821): decomposes `W diag(a)^α`, `a` the mean magnitude of each input feature, `α = 0.5`.
  Allocation by sensitivity (its truncation rank search): how much the loss on calibration data rises when one layer
  alone is cut.
- `svd_llm` (arXiv 2403.07378; v2: 2503.12340): whitened by the inputs' covariance. Allocation `uniform`, the same size
  ratio for every layer, or `loss`, v2's: within each type of layer, in proportion to `1 / log` of the error that
  truncation leaves in theory.
- `importance`: whitened by the covariance of the inputs, weighed by their gradients, and of the gradients at the
  outputs, so that a squared singular value is what the loss rises by without it, to second order and by a
  Kronecker-factored curvature. Allocation `worth`: that, per number stored (`importance.py`); `measured`: the mean
  square of the masked singular-value gradient instead, a pass over the data more.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..models.loss import CausalLoss
from ..models.targets import choose_targets, linear_layers
from .basis import GRADIENT_SHARE, Division, input_covariances, input_magnitudes, layer_covariances
from .config import DTYPES, known_fields
from .factorize import factorize, svd_layers
from .importance import gradient_importance, scores_by_worth
from .processes import Processes
from .scores import score_by_singular_values
from .sizing import FORMS, Sizing, check_forms
from .step import endless, with_labels

# What each method may allocate by; the first is its default.
ALLOCATIONS = {
    "importance": ("worth", "measured"),
    "svd": ("global",),
    "asvd": ("sensitivity", "uniform"),
    "svd_llm": ("loss", "uniform"),
}
# Size ratios at which a layer's sensitivity is measured.
SENSITIVITY_RATIOS = (0.8, 0.6, 0.4, 0.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingConfig:
    """How singular values are ranked without a run.

    method: "importance", "svd", "asvd" or "svd_llm". allocation: how sizes are divided among layers, see `ALLOCATIONS`;
        None for the method's default.
    targets, exclude: which linear layers, see `factorize`. dtype: of the model and its factors, as for
        `CompressionConfig`.
    calibration_batches: batches, the first ones, that inputs and gradients are taken from. sensitivity_batches: of
        those, how many the sensitivity of a layer is measured on.
    forms: how layers will be stored, which decides what a singular value saves. magnitude_power: ASVD's `α`.
    gradient_share: of "importance", how much of an input's weight in its covariance is its gradient's, from 0 (inputs
        count alike, as in K-FAC) to 1; see `basis.layer_covariances`.
    checkpoint_seconds, seed: of what is trained afterwards; a ranking itself has nothing random.
    """

    method: str = "importance"
    allocation: str | None = None
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    dtype: str = "auto"
    calibration_batches: int = 16
    sensitivity_batches: int = 1
    forms: tuple[str, ...] = FORMS
    magnitude_power: float = 0.5
    gradient_share: float = GRADIENT_SHARE
    checkpoint_seconds: float = 300.0
    seed: int = 0

    @property
    def stop_ratio(self) -> float:
        """The smallest size that the ranking is meant for."""
        return 0.4

    @property
    def rebuilds(self) -> bool:
        """Whether the base model alone gives the factors again."""
        return self.method == "svd"

    @classmethod
    def from_dict(cls, fields: dict) -> RankingConfig:
        """The configuration of `to_dict`. Raises `ValueError` for a field that does not exist."""
        return cls(**known_fields(cls, fields))

    def to_dict(self) -> dict:
        """The fields, for JSON, and which class they are of."""
        return {"config": type(self).__name__} | dataclasses.asdict(self)

    def __post_init__(self):
        for name in ("targets", "exclude", "forms"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "forms", check_forms(self.forms))
        if self.method not in ALLOCATIONS:
            raise ValueError(f"method must be one of {', '.join(ALLOCATIONS)}, got {self.method!r}")
        if self.allocation is None:
            object.__setattr__(self, "allocation", ALLOCATIONS[self.method][0])
        if self.allocation not in ALLOCATIONS[self.method]:
            raise ValueError(
                f"allocation of {self.method} must be one of {', '.join(ALLOCATIONS[self.method])}, "
                f"got {self.allocation!r}"
            )
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be 'auto' or one of {sorted(DTYPES)}, got {self.dtype!r}")
        for name in ("calibration_batches", "sensitivity_batches"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {getattr(self, name)!r}")
        if not 0 <= self.magnitude_power <= 1:
            raise ValueError(f"magnitude_power must be from 0 to 1, got {self.magnitude_power}")
        if not 0 <= self.gradient_share <= 1:
            raise ValueError(f"gradient_share must be from 0 to 1, got {self.gradient_share}")


def rank_singular_values(
    model: nn.Module,
    batches: Iterable[dict],
    config: RankingConfig,
    *,
    svd_cache=None,
    counting: Callable | None = None,
    processes: Processes | None = None,
    each: Callable[[nn.Module], None] | None = None,
) -> None:
    """Factorize `model`, in place, and put the method's scores into its layers.

    counting: a context manager `counting(what, units)` that yields `progress(done, total)`, for each phase. processes:
    those that do it together, all with the same model and batches; the scores are the same bits for any number of them.
    each: called with every new layer.
    """
    device = next(model.parameters()).device
    first = [with_labels(b, device) for b in itertools.islice(endless(batches), config.calibration_batches)]
    if processes is not None:
        processes.agree_on_batches(first)
    decompose(model, first, config, svd_cache=svd_cache, counting=counting, processes=processes, each=each)
    score(model, first, config, counting=counting, processes=processes)


def decompose(
    model: nn.Module,
    batches: list[dict],
    config: RankingConfig,
    *,
    svd_cache=None,
    counting: Callable | None = None,
    processes: Processes | None = None,
    each: Callable[[nn.Module], None] | None = None,
) -> None:
    """Factorize `model`, in place, in the basis of the method, which `batches`, with labels, calibrate."""
    counting = counting or _silent
    names = choose_targets(linear_layers(model)[0], config.targets, config.exclude)
    division = Division.none(names) if processes is None else Division.of(processes, model, names)
    covariances = gradients = None
    if config.method != "svd":
        with counting("inputs", "batches") as advance:
            arguments = model, names, batches, advance, len(batches), division
            if config.method == "importance":
                covariances, gradients = layer_covariances(*arguments, gradient_share=config.gradient_share)
            elif config.method == "svd_llm":
                covariances = input_covariances(*arguments)
            else:
                magnitudes = input_magnitudes(*arguments)
                # A diagonal covariance: its Cholesky factor is diag(a)^α.
                covariances = {
                    n: torch.diag(a.clamp_min(1e-6) ** (2 * config.magnitude_power)) for n, a in magnitudes.items()
                }
    with counting("SVD", "layers") as advance:
        factorize(
            model,
            config.targets,
            exclude=config.exclude,
            adapter_rank=0,
            covariances=covariances,
            gradient_covariances=gradients,
            svd_cache=svd_cache,
            progress=advance,
            division=division,
            each=each,
            release=True,
        )


def score(
    model: nn.Module,
    batches: list[dict],
    config: RankingConfig,
    *,
    counting: Callable | None = None,
    processes: Processes | None = None,
) -> None:
    """Put the scores of the method's allocation into the layers of a model that `decompose` has factorized."""
    counting = counting or _silent
    if config.allocation == "global":
        score_by_singular_values(model)
        return
    sizing = Sizing.of(model, forms=config.forms)
    layers = svd_layers(model)
    if config.allocation == "worth":
        # In this basis the squared singular values are the increase of the loss, in one unit for all layers.
        scores = scores_by_worth({name: layer.S.double() ** 2 for name, layer in layers.items()}, sizing)
    elif config.allocation == "measured":
        with counting("importance", "batches") as advance:
            scores = scores_by_worth(gradient_importance(model, batches, advance, len(batches), processes), sizing)
    elif config.allocation == "uniform":
        scores = uniform_scores(sizing)
    elif config.allocation == "loss":
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        scores = theoretical_loss_scores({name: layer.S for name, layer in layers.items()}, sizing, tokens)
    else:
        with counting("sensitivity", "cuts") as advance:
            few = batches[: config.sensitivity_batches]
            scores = sensitivity_scores(model, sizing, few, advance, processes)
    for name, layer in layers.items():
        layer.scores.copy_(scores[name])


def uniform_scores(sizing: Sizing) -> dict[str, Tensor]:
    """Scores by which every layer is cut to the same size ratio: one minus the ratio that keeps an entry, plus one."""
    return {name: 2 - share for name, share in _shares(sizing).items()}


def _shares(sizing: Sizing) -> dict[str, Tensor]:
    """For every entry, the largest first, the layer's size ratio at the rank that it completes, float64 `[k]`."""
    shares = {}
    for number, (name, k) in enumerate(zip(sizing.names, sizing.full_rank.tolist(), strict=True)):
        sizes = sizing.parameters(torch.arange(1, k + 1), torch.full((k,), number)).double()
        # Where two factors are larger than the matrix, entries cost nothing; they stay in the order of their values.
        shares[name] = sizes / float(sizing.dense[number]) + torch.arange(k) * 1e-9
    return shares


def theoretical_loss_scores(values: dict[str, Tensor], sizing: Sizing, tokens: int) -> dict[str, Tensor]:
    """SVD-LLM v2's allocation, as scores.

    For a target that removes the share R of a layer, the error that truncation leaves is `E = √(tokens Σ S_i²)` over
    what it cuts (`S` from inputs of covariance `XᵀX / tokens`, so that `E` is the Frobenius norm over all of them).
    Within a group of like layers (q projections, say) each is then cut by `R_d = n R w_d / Σ w`, `w = 1 / log E`. That
    depends on the target, so the scores say at which target, from 1 down to nothing, an entry goes: what a larger
    target cuts, a smaller one cuts too.
    """
    shares = _shares(sizing)
    groups: dict[str, list[str]] = {}
    for name in sizing.names:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    scores = {name: torch.full((len(shares[name]),), 2.0, dtype=torch.float64) for name in sizing.names}
    tail = {
        name: (tokens * values[name].double().cpu().square().flip(0).cumsum(0).flip(0)).sqrt() for name in sizing.names
    }
    for percent in range(99, 0, -1):
        kept = percent / 100
        for members in groups.values():
            weights = {}
            for name in members:
                first_cut = int((shares[name] <= kept).sum())
                error = float(tail[name][min(first_cut, len(tail[name]) - 1)])
                weights[name] = 1 / math.log(max(error, 1.0) + math.e)
            mean = sum(weights.values()) / len(members)
            for name in members:
                left = 1 - min(1.0, (1 - kept) * weights[name] / mean)
                gone = shares[name] > left
                # What goes at a large target goes first: it has the lowest score.
                scores[name][gone & (scores[name] == 2.0)] = 2 - kept
    # Within one target the order of the values.
    return {name: (score - torch.arange(len(score)) * 1e-6).float() for name, score in scores.items()}


@torch.no_grad()
def sensitivity_scores(
    model: nn.Module,
    sizing: Sizing,
    batches: list[dict],
    progress: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
) -> dict[str, Tensor]:
    """ASVD's truncation rank search, as scores.

    Every layer alone is cut to each of `SENSITIVITY_RATIOS`, the mean loss over `batches` taken, and made to rise from
    one cut to the next. An entry's score is the loss at the rank that is left without it, interpolated over the layer's
    size: by a threshold on the loss, each layer is cut to where its own reaches it.

    Several processes measure some of the layers each.
    """
    layers, shares = svd_layers(model), _shares(sizing)
    processes = processes or Processes(torch.device("cpu"))
    model.eval()
    loss_of = CausalLoss(model)

    def loss() -> float:
        return float(sum(loss_of(batch) for batch in batches)) / len(batches)

    whole, measured, scores = loss(), {}, {}
    own = list(layers.items())[processes.rank :: processes.size]
    done, total = 0, len(own) * len(SENSITIVITY_RATIOS)
    for name, layer in own:
        points = measured[name] = [(1.0, whole)]
        for ratio in SENSITIVITY_RATIOS:
            layer.set_live(shares[name].to(layer.S.device) <= ratio)
            points.append((ratio, max(points[-1][1], loss())))
            done += 1
            if progress is not None:
                progress(done, total)
        layer.set_live(torch.ones_like(layer.live))
    measured = {name: points for some in processes.all_json(measured) for name, points in some.items()}
    for name in layers:
        points = measured[name]
        # Below the last cut as steeply as before it.
        (r1, l1), (r2, l2) = points[-2:]
        points.append((0.0, l2 + (l2 - l1) / (r1 - r2) * r2 + 1e-6))
        without = torch.cat([shares[name].new_zeros(1), shares[name][:-1]])
        scores[name] = _interpolate(without, points) - torch.arange(len(without)) * 1e-9
    return {name: score.float() for name, score in scores.items()}


def _interpolate(at: Tensor, points: list[tuple[float, float]]) -> Tensor:
    """Linear between `points`, which fall in their first value."""
    x = torch.tensor([p[0] for p in points[::-1]], dtype=at.dtype)
    y = torch.tensor([p[1] for p in points[::-1]], dtype=at.dtype)
    i = torch.searchsorted(x, at.clamp(0, 1), right=True).clamp(1, len(x) - 1)
    t = ((at - x[i - 1]) / (x[i] - x[i - 1])).clamp(0, 1)
    return y[i - 1] + t * (y[i] - y[i - 1])


class _silent:
    def __init__(self, what, units):
        pass

    def __enter__(self):
        return None

    def __exit__(self, *exception):
        pass
