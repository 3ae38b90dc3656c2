"""The ACIP run: prune in one gradient descent, then tune the adapters."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..models import quantizer
from ..models.targets import choose_targets, linear_layers
from .basis import Division, input_covariances
from .config import CompressionConfig, cast, compute_dtype
from .factorize import factorize, svd_layers
from .loop import TrainingLoop, random_state_of
from .methods import RankingConfig
from .nested import NestedConfig, NestedRun, RankingRun
from .result import CompressionResult
from .sizing import Sizing
from .step import TrainingStep, endless, with_labels


def compress(
    model: nn.Module,
    batches: Iterable[dict],
    config: CompressionConfig | RankingConfig | None = None,
    *,
    output: str | os.PathLike | None = None,
    resume: bool = False,
    svd_cache: str | os.PathLike | None = None,
    progress: bool = True,
    on_step: Callable[[dict], None] | None = None,
) -> CompressionResult:
    """Compress `model` in one run, by the method whose configuration is given; afterwards it can be cut to any size.

    The model is changed in place: its linear layers become `SVDLinear`s (unless they are already), all other
    parameters are frozen.

    Args:
        model: a causal language model whose forward takes `input_ids` and `labels` and returns a `loss`.
        batches: any iterable of dicts with `input_ids [batch, length]`, and what else the model takes. `labels`
            default to them, padding (where `attention_mask` is 0) left out. It starts again when it is used up.
        config: a `NestedConfig` (its defaults for None); a `CompressionConfig` for the run of the ACIP paper, whose
            defaults are the reference's constants; or a `RankingConfig` for a ranking without training.
        output: directory for `history.jsonl` (a line a step) and the run's checkpoint. None keeps nothing.
        resume: go on from the checkpoint in `output`, with the same model, batches and config; the scores at the end
            are those of an uninterrupted run, to the last bit. Without a checkpoint the run starts at its beginning.
        svd_cache: directory that keeps the decompositions, see `factorize`.
        progress: show a live progress bar.
        on_step: called with the history's row after every step.

    Ctrl-C, or a termination signal, ends the run after the step it is in, with a checkpoint.

    In a process group of torch's (`torch.distributed.init_process_group`) its processes make one run together: all call
    this with the same model, each on its own device, and the same batches and config. A step takes
    `gradient_accumulation` batches for each process, what is trained and the scores are the same in all, and the first
    process alone writes to `output`, which the others need not see. See `docs/many-devices.md`.

    Raises:
        FloatingPointError: loss or gradient is not finite. The checkpoint is from before that step.
        ValueError: batches that are empty or used up and cannot be started again; a checkpoint of another run; an
            `output` that holds a run while `resume` is False; processes of one group that were given different things,
            or one of several that has joined no group.
    """
    config = config or NestedConfig()
    kind = next(kind for kind in (NestedRun, RankingRun, ACIPRun) if isinstance(config, kind.config_class))
    run = kind(model, batches, config, output, resume, svd_cache, progress, on_step)
    run.go()
    return CompressionResult(run.model, run.config, run.history, run.ratio())


class ACIPRun(TrainingLoop):
    """The state of an ACIP run, and the loop over it."""

    config_class = CompressionConfig
    format_version = 3
    first_phase = "prune"
    phases = ("prune", "tune", "done")
    tune_start: int | None = None

    # ---- before the first step

    def prepare(self) -> None:
        config = self.config
        cast(self.model, compute_dtype(config.dtype, self.device))
        if not any(hasattr(module, "set_live") for module in self.model.modules()):
            covariances = None
            names = choose_targets(linear_layers(self.model)[0], config.targets, config.exclude)
            division = Division.of(self.processes, self.model, names)
            if config.basis == "activations":
                first = [
                    with_labels(b, self.device)
                    for b in itertools.islice(endless(self.batches), config.calibration_batches)
                ]
                self.processes.agree_on_batches(first)
                with self.bar.counting("inputs", "batches") as advance:
                    covariances = input_covariances(
                        self.model, names, first, advance, config.calibration_batches, division
                    )
            with self.bar.counting("SVD", "layers") as advance:
                factorize(
                    self.model,
                    config.targets,
                    exclude=config.exclude,
                    covariances=covariances,
                    release=True,
                    mask_scale=config.mask_scale,
                    adapter_rank=config.adapter_rank,
                    adapter_alpha=config.adapter_alpha,
                    adapter_dropout=config.adapter_dropout,
                    svd_cache=self.svd_cache,
                    seed=config.seed,
                    progress=advance,
                    division=division,
                    # At once, so that no process ever holds all factors.
                    each=(lambda layer: layer.shard(self.processes.mesh)) if config.shard else None,
                )
        if quantizer.is_transformers(self.model):
            quantizer.attach_factorized(self.model)
        self.layers = svd_layers(self.model)
        self.sizing = Sizing.of(self.model, adapters=False, forms=config.forms)
        self.training = TrainingStep(self.model, config, self.processes)
        self.map, self.optimizer = self.training.map, self.training.optimizer
        if config.gradient_checkpointing:
            _checkpointing(self.model, "enable")({"use_reentrant": False})

    def finish(self) -> None:
        self.training.finish()
        if self.config.gradient_checkpointing:
            _checkpointing(self.model, "disable")()

    def ratio(self) -> float:
        return self.sizing.ratio(self.map.ranks())

    # ---- one step

    def one_step(self) -> None:
        started = time.monotonic()
        config, pruning = self.config, self.phase == "prune"
        random_state, consumed = random_state_of(self.device), self.consumed
        batches, seeds = self.next_batches()
        penalty = config.lambda_at(self.step) if pruning else None
        outcome = self.training(batches, penalty, seeds)
        if not outcome.finite:
            self.consumed = consumed
            self.fail_not_finite(outcome.loss, outcome.gradient_norm, random_state)

        cut_at_once = 0
        ranks = torch.tensor(outcome.ranks)
        if pruning:
            ratio = self.sizing.ratio(ranks)
            if ratio > config.stop_ratio and self.step + 1 == config.max_prune_steps:
                cut_at_once = self.cut_the_rest()
                ranks = self.map.ranks().cpu()
                ratio = self.sizing.ratio(ranks)
            if config.compact_every and (self.step + 1) % config.compact_every == 0:
                self.training.compact(ranks=ranks.tolist())
        else:
            ratio = self.history[-1]["size_ratio"]
        self.seconds += time.monotonic() - started
        row = {
            "step": self.step,
            "phase": self.phase,
            "loss": outcome.loss,
            "lambda": penalty,
            "size_ratio": ratio,
            "pruned": self.map.scores.numel() - int(ranks.sum()),
            "gradient_norm": outcome.gradient_norm,
            "seconds": round(self.seconds, 3),
        }
        if cut_at_once:
            row["cut_at_once"] = cut_at_once
        self.step += 1
        if pruning and ratio <= config.stop_ratio:
            self.start_tuning()
        if self.phase == "tune" and self.step - self.tune_start >= config.tune_steps:
            self.phase = "done"
        self.record(row)

    def start_tuning(self) -> None:
        self.phase, self.tune_start = "tune", self.step
        self.training.compact(everything=True)
        self.freeze_masks()

    def freeze_masks(self) -> None:
        self.training.freeze_masks()
        if not self.training.adapters:
            self.phase = "done"  # nothing is left to train

    def cut_the_rest(self) -> int:
        """Prune the lowest masks that the penalty has not yet driven to zero, down to `stop_ratio`; how many."""
        masks = self.map.split(self.map.flat_masks().cpu())
        live = self.sizing.cut(masks, self.config.stop_ratio)
        before = int(self.map.ranks().sum())
        with torch.no_grad():
            flat = torch.cat([live[name] for name in self.layers]).to(self.device)
            self.map.masks.masked_fill_(~flat & (self.map.masks > 0), 0.0)
        self.training.update_weights(self.map.ranks(self.map.masks).tolist())
        # As if the step itself had pruned them: first time, hence -1.
        scores, after = self.map.scores, self.map.flat_masks()
        self.map.scores = torch.where((scores > 0) & (after <= 0), -torch.ones_like(scores), scores)
        return before - int(self.map.ranks().sum())

    # ---- what is kept

    def progress(self) -> list[tuple]:
        config, row = self.config, self.history[-1] if self.history else None
        # Steps where their number is known, else the way to the size at which the run stops.
        total = config.max_prune_steps or 1 - config.stop_ratio
        done, tuned, about = 0, None, ""
        if row is not None:
            done = row["step"] + 1 if config.max_prune_steps else 1 - row["size_ratio"]
            about = f"step {row['step'] + 1}  loss {row['loss']:.3f}  size {100 * row['size_ratio']:.1f} %"
            if row["phase"] == "prune":
                about += f"  λ {row['lambda']:.2g}"
            else:
                tuned = row["step"] + 1 - self.tune_start
            if self.phase != "prune":
                done = total
        bars = [("prune", min(done, total), total, about)]
        return bars if tuned is None else [*bars, ("tune", tuned, config.tune_steps, about)]

    def named_parameters(self) -> dict[str, Tensor]:
        return {"masks": self.map.masks, **self.training.adapters}

    def fields(self) -> dict:
        return {"tune_start": self.tune_start}

    def tensors(self) -> dict[str, Tensor]:
        computed = torch.cat([self.training.computed(layer) for layer in self.layers.values()])
        return {"scores": self.map.scores, "computed": computed}

    def take_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.map.scores = tensors["scores"].to(self.map.scores).view_as(self.map.scores)
        if not self.config.shard:
            for name, keep in self.map.split(tensors["computed"]).items():
                self.layers[name].compact(keep, join=True)
        if self.phase != "prune":
            phase = self.phase
            self.freeze_masks()
            self.phase = phase


def _checkpointing(model, what: str):
    """transformers' switch for recomputing activations, under its newer or its older name."""
    new, old = f"activation_checkpointing_{what}", f"gradient_checkpointing_{what}"
    return getattr(model, new) if hasattr(model, new) else getattr(model, old)
