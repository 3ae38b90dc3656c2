"""One training run for every size: factors in the order of their worth, updated at every size in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .. import files
from ..models import quantizer, training
from ..models.distill import DistillationLoss, counted_tokens
from ..models.targets import is_conv1d, linear_layers, weight_of
from ..nn import SVDLinear
from ..nn.nested_linear import NestedLinear
from .captured import Passes
from .config import cast, compute_dtype
from .factorize import check_factors, replace_modules, svd_layers
from .loop import TrainingLoop, random_state_of
from .methods import RankingConfig, rank_singular_values
from .processes import Processes
from .sizing import Sizing
from .step import rank_multiple, seeded, with_labels

log = logging.getLogger("acip_kernels")

RANKING = "ranking.safetensors"
# What it holds of a layer; the last one where it is known.
_RANKED = ("U", "S", "Vh", "scores", "input_variances")
# Sizes are drawn in steps of one part in this many where each has a CUDA graph of its own.
CAPTURED_SIZES = 40
# Its multiples modulo one leave the smallest gaps.
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedConfig(RankingConfig):
    """The default way to compress: rank once, by `method`, then train the factors at all sizes in turn.

    Every step has a size ratio of its own, from `smallest_ratio` to `largest_ratio`, evenly spread (`size_of_batch`),
    and takes a gradient step with the best-scored ranks that this size has: so a smaller model is a part of each larger
    one, and one set of factors serves every size. What is trained are updates of low rank of both factors
    (`NestedLinear`): as few parameters as adapters have, for a run of few tokens, but part of the factors, hence
    nothing to count or to merge afterwards. The dense model teaches: its probabilities are part of the target (Hinton
    et al., arXiv 1503.02531), which says more about each token than the next one alone.

    steps: optimizer steps, of `gradient_accumulation` batches each (and in each process), which all have their own
        size.
    update_rank: the rank of each factor's update.
    distillation: the weight `w` of the teacher in the loss `(1 - w) cross-entropy + w KL(teacher ‖ student)`; 0 for
        none, which saves the teacher's forward pass and its dense weights.
    learning_rate: AdamW's, without weight decay, at its highest: it rises over `warmup_steps` and then falls to zero by
        half a cosine. betas, eps: AdamW's.
    gradient_checkpointing: recompute activations to save memory. checkpoint_seconds: between two checkpoints, which
        hold the updates and both their moments.
    cuda_graph: on a GPU, launch a batch's forward and backward pass as one CUDA graph, of which there is one for each
        size, so that sizes are drawn in steps of 2.5 %; not with gradient_checkpointing, `shard`, or batches of
        changing shapes.
    shard: of several processes, each holds a part of the factors and of the teacher's weights, put together layer by
        layer as they are computed with (FSDP); otherwise each holds all.
    seed: of the first size and of the updates' start.
    """

    steps: int = 400
    update_rank: int = 32
    distillation: float = 0.25
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    smallest_ratio: float = 0.3
    largest_ratio: float = 1.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    cuda_graph: bool = True
    shard: bool = False

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "betas", tuple(self.betas))
        if not 0 < self.smallest_ratio <= self.largest_ratio <= 1:
            raise ValueError(
                "smallest_ratio and largest_ratio must be in (0, 1], the first not above the second, "
                f"got {self.smallest_ratio} and {self.largest_ratio}"
            )
        for name, low in (("steps", 1), ("update_rank", 1), ("warmup_steps", 0), ("gradient_accumulation", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low:
                raise ValueError(f"{name} must be an int of at least {low}, got {getattr(self, name)!r}")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must be from 0 to 1, got {self.distillation}")
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def stop_ratio(self) -> float:
        """The smallest size that is trained."""
        return self.smallest_ratio

    @property
    def rebuilds(self) -> bool:
        return False

    def rate_at(self, step: int) -> float:
        """The learning rate of step number `step`, from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        fraction = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * fraction))


def size_of_batch(config: NestedConfig, number: int) -> float:
    """The size ratio that batch `number` of a run is trained at.

    The multiples of the golden ratio modulo one, from a start that the seed draws: any stretch of them covers the sizes
    more evenly than independent draws do (Weyl's sequence), so that no size is left out for long, nor at the end.
    """
    start = float(torch.rand((), generator=torch.Generator().manual_seed(config.seed)))
    place = (start + number * GOLDEN_RATIO) % 1
    return config.smallest_ratio + (config.largest_ratio - config.smallest_ratio) * place


class RankingRun(TrainingLoop):
    """A ranking, and no step after it."""

    config_class = RankingConfig
    format_version = 1
    first_phase = "done"
    phases: tuple[str, ...] = ("done",)
    kept = (*TrainingLoop.kept, RANKING)
    optimizer: torch.optim.Optimizer | None = None

    def prepare(self) -> None:
        cast(self.model, compute_dtype(self.config.dtype, self.device))
        if not any(hasattr(module, "set_live") for module in self.model.modules()):
            self.rank()
        if quantizer.is_transformers(self.model):
            quantizer.attach_factorized(self.model)
        self.layers = svd_layers(self.model)

    def rank(self) -> None:
        """Rank, or take the ranking of the run that is resumed: it may take as long as some of the training."""
        path, processes = None if self.output is None else self.output / RANKING, self.processes
        # At once, so that no process ever holds all factors; ASVD cuts whole layers to see what they are worth.
        shard = getattr(self.config, "shard", False) and self.config.allocation != "sensitivity"
        each = (lambda layer: layer.shard(processes.mesh)) if shard else None
        if self.resuming and processes.on_main(path.exists):
            tensors = {}

            def read() -> bool:
                try:
                    tensors.update(files.read_tensors(path))
                    check_ranking(self.model, tensors)
                except ValueError as error:
                    log.warning("ranking anew: %s", error)
                    return False
                return True

            if processes.on_main(read):
                put_factors(self.model, tensors, processes, each)
                return
        rank_singular_values(
            self.model,
            self.batches,
            self.config,
            svd_cache=self.svd_cache,
            counting=self.bar.counting,
            processes=processes,
            each=each,
        )
        if path is not None and self.first_phase != "done":
            tensors = {name: tensor for name, tensor in ranking_tensors(self.model) if processes.main}
            processes.on_main(lambda: files.write_tensors(path, tensors))

    def ratio(self) -> float:
        return 1.0

    def finish(self) -> None:
        self.model.eval()

    def progress(self) -> list[tuple]:
        return []

    def named_parameters(self) -> dict[str, Tensor]:
        return {}

    def fields(self) -> dict:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def take_tensors(self, tensors: dict[str, Tensor]) -> None:
        pass


class NestedRun(RankingRun):
    """The state of a nested run, and the loop over it."""

    config_class = NestedConfig
    first_phase = "train"
    phases = ("train", "done")

    def prepare(self) -> None:
        config = self.config
        super().prepare()
        self.sizing = Sizing.of(self.model, adapters=False, forms=config.forms)
        self.training = NestedTraining(self.model, self.sizing, config, self.processes)
        self.optimizer = self.training.optimizer

    def one_step(self) -> None:
        started = time.monotonic()
        config = self.config
        random_state, consumed = random_state_of(self.device), self.consumed
        batches, seeds = self.next_batches()
        # A size for each batch of every process.
        first = self.step * self.batches_a_step
        drawn = [size_of_batch(config, number) for number in range(first, first + self.batches_a_step)]
        ratios = [self.training.nearest(ratio) for ratio in drawn]
        rate = config.rate_at(self.step)
        own = ratios[self.processes.rank :: self.processes.size]
        loss, norm = self.training(batches, own, rate, seeds)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.consumed = consumed
            self.fail_not_finite(loss, norm, random_state)
        self.seconds += time.monotonic() - started
        row = {
            "step": self.step,
            "phase": self.phase,
            "loss": loss,
            "learning_rate": rate,
            "size_ratio": sum(ratios) / len(ratios),
            "gradient_norm": norm,
            "seconds": round(self.seconds, 3),
        }
        self.step += 1
        if self.step == config.steps:
            self.phase = "done"
        self.record(row)

    def finish(self) -> None:
        self.training.finish()

    def progress(self) -> list[tuple]:
        row, about = self.history[-1] if self.history else None, ""
        if row is not None:
            about = f"step {self.step}  loss {row['loss']:.3f}  at size {100 * row['size_ratio']:.0f} %"
        return [("train", self.step, self.config.steps, about)]

    def named_parameters(self) -> dict[str, Tensor]:
        return {**self.training.parameters}


def ranking_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What `put_factors` takes of a model's `SVDLinear`s: `layer.U` and the like, by name."""
    for name, layer in svd_layers(model).items():
        U, Vh = layer.factors()
        for key, tensor in zip(_RANKED, (U, layer.S, Vh, layer.scores, layer.input_variances), strict=True):
            if tensor is not None:
                yield f"{name}.{key}", tensor.contiguous()


def check_ranking(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raises `ValueError` where `ranking_tensors` do not fit the model's layers."""
    layers = linear_layers(model)[0]
    for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        if name not in layers:
            raise ValueError(f"a ranking has factors of {name!r}, which is no linear layer of this model")
        factors = {key: tensors.get(f"{name}.{key}", torch.empty(0)) for key in _RANKED[:-1]}
        variances = tensors.get(f"{name}.{_RANKED[-1]}")
        check_factors(weight_of(layers[name]), **factors, input_variances=variances)


def put_factors(
    model: nn.Module,
    tensors: dict[str, Tensor],
    processes: Processes | None = None,
    each: Callable[[SVDLinear], None] | None = None,
) -> None:
    """`SVDLinear`s of `ranking_tensors`, which the first of `processes` has, in the place of the model's layers.

    each: called with every new layer.
    """
    layers = linear_layers(model)[0]
    processes = processes or Processes(next(model.parameters()).device)
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    for name in processes.broadcast_json(names):
        old = layers[name]
        own = None
        if processes.main:
            own = {key: tensors[f"{name}.{key}"] for key in _RANKED if f"{name}.{key}" in tensors}
        factors = {key: t.to(old.weight.device) for key, t in processes.broadcast_tensors(own).items()}
        scores = factors.pop("scores")
        bias = None if old.bias is None else old.bias.to(scores.device, factors["U"].dtype)
        new = SVDLinear(**factors, bias=bias, source_type="Conv1D" if is_conv1d(old) else "Linear")
        new.scores.copy_(scores)
        replace_modules(model, {old: new})
        if each is not None:
            each(new)


class NestedTraining:
    """`training([batch, ...], [ratio, ...], rate)`: forward, backward and AdamW for the updates at these sizes.

    Replaces the model's `SVDLinear`s by `NestedLinear`s, until `finish`, and freezes everything else.

    processes: those that make the steps together, each with as many batches of its own; None for this one alone.
    """

    def __init__(self, model: nn.Module, sizing: Sizing, config: NestedConfig, processes: Processes | None = None):
        self.model, self.sizing, self.config = model, sizing, config
        self.one_size = config.smallest_ratio == config.largest_ratio
        self.svd = svd_layers(model)
        self.device = next(iter(self.svd.values())).S.device
        self.processes, self.sharded = processes or Processes(self.device), config.shard
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.orders, self.norms, self.layers = {}, {}, {}
        generator = torch.Generator(self.device).manual_seed(config.seed)
        self.removal = sizing.removal({name: layer.scores for name, layer in self.svd.items()})
        for name, layer in self.svd.items():
            layer.unshard(self.device)
            order = layer.scores.sort(descending=True, stable=True).indices
            self.orders[name] = order
            self.norms[name] = layer.U[:, order].float().norm(dim=0), layer.Vh[order].float().norm(dim=1)
            nested = NestedLinear(
                layer.U[:, order],
                layer.S[order],
                layer.Vh[order],
                layer.bias,
                update_rank=config.update_rank,
                generator=generator,
            )
            if config.distillation:
                nested.dense = layer.effective_weight(adapter=False).to(layer.U.dtype)
            if config.shard:
                nested.shard(self.processes.mesh)
            self.layers[name] = nested
            # Half of what the factors take, until `finish` makes them anew.
            layer.uncompact()
            layer.U = layer.Vh = None  # type: ignore[assignment]  # until then
        replace_modules(model, dict(zip(self.svd.values(), self.layers.values(), strict=True)))
        self.parameters = {
            f"{name}.{key}": parameter
            for name, layer in self.layers.items()
            for key, parameter in layer.named_parameters(recurse=False)
        }
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=0.0,
            fused=True,
        )
        self.loss = DistillationLoss(model, self.teaching, config.distillation)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.checkpointing = config.gradient_checkpointing
        # Checkpointing looks at the state of the GPU's generator, which waits for it.
        graphs = config.cuda_graph and self.device.type == "cuda" and not config.gradient_checkpointing
        self.passes = Passes(
            self._run, enabled=graphs and not config.shard, whole=self._run_anew, failed=self._forget_updates
        )
        self._attention, self._rotations = training.use(model), training.rotations(model)
        model.train()

    @contextlib.contextmanager
    def teaching(self):
        """Within it, the model computes with the dense weights that it began with."""
        for layer in self.layers.values():
            layer.teaching = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.teaching = False

    def nearest(self, ratio: float) -> float:
        """The size to train at: `ratio`, or one of few beside it, if every size is captured."""
        if not self.passes.enabled or self.one_size:
            return ratio
        ratio = round(ratio * CAPTURED_SIZES) / CAPTURED_SIZES
        return min(max(ratio, self.config.smallest_ratio), self.config.largest_ratio)

    def set_size(self, ratio: float) -> None:
        """The ranks of the model of size `ratio`, each to the nearest multiple that products like, and at least that.

        Any ranks train the same factors, and those of a size that is trained need not be exact; but every new shape of
        a product may cost a compilation, a fifth of a step in bfloat16 on a CPU. Where all steps have one size, its own
        ranks are taken.
        """
        ranks = self.sizing.ranks_at(self.removal, ratio).tolist()
        for layer, rank in zip(self.layers.values(), ranks, strict=True):
            multiple = 1 if self.one_size else rank_multiple(layer.dtype)
            layer.rank = min(layer.full_rank, max(1, round(rank / multiple)) * multiple)

    def __call__(
        self, batches: list[dict], ratios: list[float], rate: float, seeds: list[int] | None = None
    ) -> tuple[float, float]:
        """The loss, averaged over the batches, and the norm of the gradient; not finite if nothing was changed.

        seeds: of what is random in each batch; None to go on with torch's generators as they are.
        """
        total = torch.zeros((), device=self.device)
        for batch, ratio in zip(seeded(batches, seeds, self.device), ratios, strict=True):
            inputs = with_labels(batch, self.device)
            if self.passes.enabled and self.config.distillation:
                inputs["counted"] = counted_tokens(inputs["labels"])
            total += self.passes(inputs, len(batches) * self.processes.size, ratio)
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        self.processes.sum_([total, *gradients])
        norm = torch.nn.utils.get_total_norm(gradients)
        # AdamW looks at this flag itself and changes nothing where it is set: no need to wait for the answer here.
        self.optimizer.found_inf = (~(total.isfinite() & norm.isfinite())).float()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        torch._foreach_zero_(gradients)
        self._forget_updates()
        return float(total), float(norm)

    def _run(self, inputs: dict, parts: int, ratio: float) -> Tensor:
        """Forward and backward pass of one batch of `parts`; its part of the mean loss, without a graph."""
        self.set_size(ratio)
        tokens = {key: value for key, value in inputs.items() if key != "counted"}
        with training.functions(tokens, self._rotations):
            loss = self.loss(tokens, inputs.get("counted")) / parts
            loss.backward()
        return loss.detach()

    def _run_anew(self, inputs: dict, parts: int, ratio: float) -> Tensor:
        """The updated factors made in it, whenever it is replayed."""
        self._forget_updates()
        loss = self._run(inputs, parts, ratio)
        self._forget_updates()
        return loss

    def _forget_updates(self) -> None:
        for layer in self.layers.values():
            layer.forget_updates()

    @torch.no_grad()
    def finish(self) -> None:
        """`SVDLinear`s again, which hold the trained factors, and the scores that the run began with.

        After a run with divided factors the model is in the host's memory, as it may be too large for the device.
        """
        if self.sharded:
            for layer in self.svd.values():
                layer.cpu()
        for name, layer in self.svd.items():
            order, dtype = self.orders[name], self.layers[name].dtype
            Ut, S, Vh = self.layers[name].factors()
            # Scaled as they were: what a basis is whitened by can be told from its vectors' lengths
            # (`quantized.remembered_covariance`), and the scales of a training are arbitrary.
            of_U, of_Vh = (torch.where(norms > 0, norms, 1.0) for norms in self.norms[name])
            Ut, S, Vh = Ut * of_U[:, None], S / (of_U * of_Vh), Vh * of_Vh[:, None]
            if self.sharded:
                order, Ut, S, Vh = order.cpu(), Ut.cpu(), S.cpu(), Vh.cpu()
            layer.U, layer.Vh = torch.empty_like(Ut.t(), dtype=dtype), torch.empty_like(Vh, dtype=dtype)
            layer.U[:, order], layer.S[order], layer.Vh[order] = Ut.t().to(dtype), S.to(layer.S.dtype), Vh.to(dtype)
            layer.U = layer.U.contiguous()
        replace_modules(self.model, dict(zip(self.layers.values(), self.svd.values(), strict=True)))
        if self.sharded:
            self.model.cpu()
        if self.checkpointing:
            self.model.gradient_checkpointing_disable()
        training.restore(self.model, self._attention)
        self.model.eval()
        # They know this object and it them: without this, all of it would stay until Python looks for cycles.
        self.passes.forget()
        self.loss = self.passes = None  # type: ignore[assignment]  # no step comes after this
        self.optimizer.state.clear()
        self.layers, self.parameters = {}, {}
        self.optimizer.param_groups.clear()
