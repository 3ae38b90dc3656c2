"""One optimizer step of an ACIP run: what is dead is left out, what is left goes the short way."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..models import training
from ..models.loss import IGNORE, CausalLoss
from ..nn import SVDLinear
from ..plan import training_plan
from .captured import Passes
from .config import CompressionConfig
from .factorize import svd_layers
from .processes import Processes, same_randomness
from .scores import ScoreMap, updated_scores

# Ranks that are computed are a multiple of this, while there are dead ones to fill up with: products of other widths
# take longer, and in two bytes every new shape costs a compilation in torch's library (`bench.training_parts`).
RANK_MULTIPLE = 8
RANK_MULTIPLE_OF_TWO_BYTES = 32
# What has to have died of a layer's computed ranks for a copy of the rest to be made. Copying all layers costs about
# this share of a step (`bench.training_parts`), so it has paid after one.
WORTH_COMPACTING = 1 / 32
# And of the whole model's, where its passes are captured as a CUDA graph: that holds ranks as they were, and capturing
# them anew takes about two steps launched call by call.
WORTH_CAPTURING = 1 / 16


def rank_multiple(dtype: torch.dtype) -> int:
    """What ranks that are computed in `dtype` are a multiple of."""
    return RANK_MULTIPLE_OF_TWO_BYTES if dtype.itemsize == 2 else RANK_MULTIPLE


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """loss: mean over the batches, without the penalty. gradient_norm: of everything trained, with it. ranks: live
    ones of each layer, after the step. finite: False if nothing was changed, because loss or gradient were not."""

    loss: float
    gradient_norm: float
    ranks: list[int]
    finite: bool


class TrainingStep:
    """`step([batch, ...], penalty)`: forward, backward and AdamW for the masks and adapters of a factorized model.

    Freezes everything but masks and adapters. All masks become parts of one flat parameter (`map.masks`), so that the
    penalty, AdamW and the scores are a call each. Numbers come to the host once, at a step's end.

    Args:
        model: with `SVDLinear` layers, all on one device.
        config: learning rates, `compact_every` (0 leaves dead ranks in), `route`, `save_z`, `lean_loss`, `cuda_graph`;
            with `shard` the layers' factors are divided among the processes, and dead ranks stay in.
        processes: those that make the step together, each with as many batches of its own; None for this one alone.
    """

    def __init__(self, model: nn.Module, config: CompressionConfig, processes: Processes | None = None):
        self.model, self.config = model, config
        self.layers = svd_layers(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.map = ScoreMap(self.layers)
        self.device = self.map.masks.device
        self.processes = processes or Processes(self.device)
        if config.shard:
            for layer in self.layers.values():
                layer.shard(self.processes.mesh)
        self.adapters: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            layer.mask.requires_grad_(True)
            layer.save_z = config.save_z
            if layer.adapter_rank:
                for key, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                    parameter.requires_grad_(True)
                    self.adapters[f"{name}.{key}"] = parameter
        groups = [{"params": [self.map.masks], "lr": config.mask_learning_rate}]
        if self.adapters:
            groups.append({"params": list(self.adapters.values()), "lr": config.adapter_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True)
        # Of λ, for each entry; None for one.
        self.weights: Tensor | None = None
        if config.penalty == "numbers":
            numbers = self.map.numbers().to(self.map.masks.dtype)
            self.weights = numbers / numbers.mean()
        self.loss = CausalLoss(model, None if config.lean_loss else False)
        self.tokens = 0
        # Layers on the effective route, and the adapters' copies among the factors: known until the next compaction.
        self.effective: list[SVDLinear] = []
        self._copies: list[tuple[Tensor, Tensor]] | None = None
        self._attention, self._rotations = training.use(model), training.rotations(model)
        # Checkpointing looks at the state of the GPU's generator, which waits for it.
        graphs = config.cuda_graph and self.device.type == "cuda" and not config.gradient_checkpointing
        self.passes = Passes(
            self._run,
            enabled=graphs and not config.shard,
            seeds=4 * len(self.layers),  # one each; more for a layer that is used several times
            whole=self._run_and_collect,
            prepare=self._before_capture,
            failed=self._after_failed_capture,
        )
        model.train()

    def __call__(
        self, batches: list[dict], penalty: float | None = None, seeds: list[int] | None = None
    ) -> StepOutcome:
        """One step over `batches`, whose losses are averaged, with those of the other processes.

        penalty: λ, None once the masks are frozen. seeds: of what is random (dropout) in each batch; None to go on with
        torch's generators as they are.
        """
        pruning = penalty is not None
        self._prepare(batches)
        if pruning:
            self.map.masks.grad.zero_()
        loss = torch.zeros((), device=self.device)
        for batch in seeded(batches, seeds, self.device):
            loss += self.passes(with_labels(batch, self.device), len(batches) * self.processes.size)
        self._collect_gradients()
        if self.processes.size > 1:
            for parameter in self.adapters.values():
                if parameter.grad is None:  # no batch of this process has reached it
                    parameter.grad = torch.zeros_like(parameter)
        trained = [p.grad for p in self.adapters.values() if p.grad is not None]
        masks = self.map.masks
        self.processes.sum_([loss, *trained, *([masks.grad] if pruning and masks.grad is not None else [])])
        if pruning:
            # The gradient of λ Σ w max(m, 0), without building a graph for it.
            live = masks.detach() > 0
            masks.grad.add_(live if self.weights is None else self.weights * live, alpha=penalty)
            trained.append(masks.grad)
        norm = torch.nn.utils.get_total_norm(trained) if trained else loss.new_zeros(())
        # AdamW looks at this flag itself and changes nothing where it is set: no need to wait for the answer here.
        self.optimizer.found_inf = (~(loss.isfinite() & norm.isfinite())).float()
        self.optimizer.step()
        self._clear_gradients()

        scores = updated_scores(self.map.scores, self.map.masks.detach()) if pruning else self.map.scores
        counted = self.map.ranks(scores).double()
        numbers = torch.cat([torch.stack([loss.double(), norm.double()]), counted]).tolist()
        finite = all(map(math.isfinite, numbers[:2]))
        ranks = [int(rank) for rank in numbers[2:]]
        if finite:
            self.map.scores = scores
            self._write_adapters()
            if pruning:
                self.update_weights(ranks)
        return StepOutcome(numbers[0], numbers[1], ranks, finite)

    def _run(self, inputs: dict, parts: int) -> Tensor:
        """Forward and backward pass of one batch of `parts`; its part of the mean loss, without a graph."""
        with training.functions(inputs, self._rotations):
            loss = self.loss(inputs) / parts
            loss.backward()
        return loss.detach()

    def _run_and_collect(self, inputs: dict, parts: int) -> Tensor:
        loss = self._run(inputs, parts)
        self._collect_gradients()
        return loss

    def _before_capture(self) -> None:
        self._collect_gradients()
        for parameter in self.adapters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _after_failed_capture(self) -> None:
        for layer in self.effective:
            layer.forget_gradients()

    def _collect_gradients(self) -> None:
        for layer in self.effective:
            layer.collect_gradients()

    def _clear_gradients(self) -> None:
        """The adapters': set to zero where they are if a graph adds to them there."""
        if not self.passes.captured:
            for parameter in self.adapters.values():
                parameter.grad = None
        elif self.adapters:
            torch._foreach_zero_([p.grad for p in self.adapters.values() if p.grad is not None])

    @torch.no_grad()
    def _write_adapters(self) -> None:
        """The new adapters into the joined factors, in one call."""
        if self._copies is None:
            self._copies = [pair for layer in self.layers.values() for pair in layer.adapter_copies()]
        if self._copies:
            torch._foreach_copy_(*map(list, zip(*self._copies, strict=True)))

    def update_weights(self, ranks: list[int]) -> None:
        """The dense weights of the effective route after masks have changed, given the live ranks of all layers."""
        for layer, rank in zip(self.layers.values(), ranks, strict=True):
            layer.update_weight(rank)

    def freeze_masks(self) -> None:
        """From here on the adapters alone are trained, at the tuning phase's rate."""
        for layer in self.layers.values():
            layer.mask.requires_grad_(False)
            layer.mask.grad = None
            layer.take_route("factored")
        self.effective = []
        self.passes.forget()
        self.map.masks.grad = None  # AdamW would go on by its momentum
        self.map.masks.requires_grad_(False)
        if self.adapters:
            rate = self.config.tune_learning_rate
            self.optimizer.param_groups[1]["lr"] = self.config.adapter_learning_rate if rate is None else rate

    # ---- what is computed, and how

    def compact(self, everything: bool = False, ranks: list[int] | None = None) -> None:
        """Leave out what has died where enough has (with `everything`, all of it), and choose each layer's route.

        ranks: live ones of each layer, as the last step's outcome has them; None to count the masks.
        """
        if self.config.compact_every and not self.config.shard:
            ranks = self.map.ranks(self.map.masks).tolist() if ranks is None else ranks
            ranks = [
                min(-(-rank // multiple) * multiple, layer.full_rank)
                for layer, rank in zip(self.layers.values(), ranks, strict=True)
                for multiple in (rank_multiple(layer.U.dtype),)
            ]
            if self.passes.enabled and not everything and not self._worth_capturing(ranks):
                return
            for layer, rank in zip(self.layers.values(), ranks, strict=True):
                if rank < layer.computed_rank * (1.0 if everything else 1 - WORTH_COMPACTING):
                    layer.compact(filled_up(layer.live, rank), join=True)
                    self._copies = None
                    self.passes.forget()
        self._choose_routes()

    def _worth_capturing(self, ranks: list[int]) -> bool:
        """Whether so much of the numbers that are computed with has died that the passes are worth changing."""
        sides = [layer.in_features + layer.out_features for layer in self.layers.values()]
        computed = sum(side * layer.computed_rank for side, layer in zip(sides, self.layers.values(), strict=True))
        return sum(map(operator.mul, sides, ranks)) <= computed * (1 - WORTH_CAPTURING)

    def _prepare(self, batches: list[dict]) -> None:
        """On the first step, and when the number of tokens changes."""
        tokens = max(batch["input_ids"].numel() for batch in batches)
        if tokens == self.tokens:
            return
        self.tokens = tokens
        if self.config.shard:
            return  # joined factors, and dense weights, would be whole in every process
        for layer in self.layers.values():
            if layer.adapter_rank and not layer._joined:
                layer.compact(self.computed(layer), join=True)
                self._copies = None
                self.passes.forget()
        self._choose_routes()

    def _choose_routes(self) -> None:
        if not self.tokens or not self.map.masks.requires_grad or self.config.shard:
            return
        for layer in self.layers.values():
            plan = training_plan(
                self.tokens,
                layer.in_features,
                layer.out_features,
                layer.computed_rank,
                layer.adapter_rank,
                batches=self.config.gradient_accumulation,
                dropout=layer.adapter_dropout > 0,
                itemsize=layer.U.dtype.itemsize,
                route=self.config.route,
            )
            if plan.route != layer.route:
                layer.take_route(plan.route)
                self.passes.forget()
        self.effective = [layer for layer in self.layers.values() if layer.route == "effective"]

    @staticmethod
    def computed(layer) -> Tensor:
        """Which entries of `layer` are computed, bool `[k]`."""
        if layer._rows is None:
            return torch.ones(layer.full_rank, dtype=torch.bool, device=layer.mask.device)
        return torch.zeros_like(layer.mask, dtype=torch.bool).index_fill_(0, layer._rows, True)

    def finish(self) -> None:
        """Put the scores into the layers, and leave a model that anything may be done with.

        After a run with divided factors it is in the host's memory, as it may be too large for the device.
        """
        self.passes.forget()
        # It knows this object, and this it: without this, all of it would stay until Python looks for cycles.
        self.passes = None  # type: ignore[assignment]  # no step comes after this
        self.map.write_back()
        for layer in self.layers.values():
            layer.unshard()
        if self.config.shard:
            self.map.release()
            self.model.cpu()
        for layer in self.layers.values():
            layer.take_route("factored")
            layer.compact(self.computed(layer))
        self.map.release()
        training.restore(self.model, self._attention)
        self.model.eval()


def seeded(batches: list[dict], seeds: list[int] | None, device: torch.device) -> Iterator[dict]:
    """`batches`, torch's generators seeded for each; afterwards they are as before. Without seeds, just `batches`."""
    if seeds is None:
        yield from batches
        return
    with same_randomness(device) as seed:
        for batch, number in zip(batches, seeds, strict=True):
            seed(number)
            yield batch


def with_labels(batch: dict, device: torch.device) -> dict:
    """`batch` on `device`, with labels: the tokens themselves, padding left out.

    A mask that masks nothing is left out, where looking at it does not wait for a GPU.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
        batch = {key: value for key, value in batch.items() if key != "attention_mask"}
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    if "labels" not in batch:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
        batch["labels"] = labels
    return batch


def endless(batches: Iterable[dict], consumed: int = 0) -> Iterator[dict]:
    """Batches for ever, the first `consumed` left out; raises `ValueError` for what cannot be started again."""
    position = 0
    while True:
        empty = True
        for batch in batches:
            empty = False
            position += 1
            if position > consumed:
                yield batch
        if empty:
            used = f"after {position} batches" if position else "at the start"
            raise ValueError(
                f"batches ran out {used} and cannot be started again: "
                "give a list, a DataLoader, or anything else that can be iterated anew"
            )


def filled_up(live: Tensor, rank: int) -> Tensor:
    """`live` and as many of the dead, the first ones, as make `rank`."""
    missing = rank - int(live.sum())
    keep = live.clone()
    if missing > 0:
        keep[(~live).nonzero()[:missing, 0]] = True
    return keep
