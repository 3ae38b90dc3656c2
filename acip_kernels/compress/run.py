"""The ACIP run: prune in one gradient descent, then tune the adapters."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import files
from ..models import quantizer
from ..models.targets import choose_targets, linear_layers
from ..ops import extension
from ..report import read_history
from .basis import input_covariances
from .config import CompressionConfig, compute_dtype
from .factorize import factorize, svd_layers
from .materialize import Cut, model_cut
from .progress import RunProgress
from .sizing import Sizing
from .step import TrainingStep, endless, with_labels

log = logging.getLogger("acip_kernels")

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"


@dataclasses.dataclass
class CompressionResult:
    """A run's model, from which any size can be cut.

    model: with `SVDLinear` layers, which hold the factors, scores and adapters. config: the run's constants, or
    None if there was no run. history: a dict for every step (`step`, `phase`, `loss`, `lambda`, `size_ratio`,
    `pruned`, `seconds`). size_ratio: where the run ended, factorized layers without adapters.
    """

    model: nn.Module
    config: CompressionConfig | None = None
    history: list[dict] = dataclasses.field(default_factory=list)
    size_ratio: float = 1.0

    @property
    def scores(self) -> dict[str, Tensor]:
        """One float32 score for every singular value, `{layer: [k]}`; the lowest is pruned first."""
        return {name: layer.scores for name, layer in svd_layers(self.model).items()}

    def cut(self, size_ratio: float, **options) -> Cut:
        """Which singular values stay at `size_ratio`, and what that comes to in either count; see `plan_cut`."""
        return model_cut(self.model, size_ratio, **options)

    def at(self, size_ratio: float, *, count: str = "factorized") -> nn.Module:
        """The model itself, pruned to `size_ratio` in place, for evaluation.

        Any size can follow any other, at once. The adapters stay beside the factors, as they were trained. For a model
        of its own, faster and smaller, `materialize`.
        """
        cut = self.cut(size_ratio, count=count)
        for name, layer in svd_layers(self.model).items():
            layer.set_live(cut.live[name])
        return self.model.eval()

    def save(self, path, *, compact: bool = False, tokenizer=None, base_model=None, overwrite: bool = False) -> None:
        """Write an elastic checkpoint: see `acip_kernels.save`."""
        from ..models.saving import save

        save(self, path, compact=compact, tokenizer=tokenizer, base_model=base_model, overwrite=overwrite)

    @classmethod
    def load(cls, path, **options) -> CompressionResult:
        """Read an elastic checkpoint, to cut or to save it again; `options` as for `acip_kernels.load`."""
        from ..models.saving import load_result

        return load_result(path, **options)


def compress(
    model: nn.Module,
    batches: Iterable[dict],
    config: CompressionConfig | None = None,
    *,
    output: str | os.PathLike | None = None,
    resume: bool = False,
    svd_cache: str | os.PathLike | None = None,
    progress: bool = True,
    on_step: Callable[[dict], None] | None = None,
) -> CompressionResult:
    """Compress `model` in one run; afterwards it can be cut to any size.

    The model is changed in place: its linear layers become `SVDLinear`s (unless they are already), all other
    parameters are frozen.

    Args:
        model: a causal language model whose forward takes `input_ids` and `labels` and returns a `loss`.
        batches: any iterable of dicts with `input_ids [batch, length]`, and what else the model takes. `labels`
            default to them, padding (where `attention_mask` is 0) left out. It starts again when it is used up.
        config: None for the reference's constants.
        output: directory for `history.jsonl` (a line a step) and the run's checkpoint. None keeps nothing.
        resume: go on from the checkpoint in `output`, with the same model, batches and config; the scores at the end
            are those of an uninterrupted run, to the last bit. Without a checkpoint the run starts at its beginning.
        svd_cache: directory that keeps the decompositions, see `factorize`.
        progress: show a live progress bar.
        on_step: called with the history's row after every step.

    Ctrl-C, or a termination signal, ends the run after the step it is in, with a checkpoint.

    Raises:
        FloatingPointError: loss or gradient is not finite. The checkpoint is from before that step.
        ValueError: batches that are empty or used up and cannot be started again; a checkpoint of another run; an
            `output` that holds a run while `resume` is False.
    """
    run = _Run(model, batches, config or CompressionConfig(), output, resume, svd_cache, progress, on_step)
    return run.go()


class _Run:
    """The state of a run, and the loop over it."""

    def __init__(self, model, batches, config, output, resume, svd_cache, progress, on_step):
        self.model, self.batches, self.config, self.on_step = model, batches, config, on_step
        self.output = None if output is None else pathlib.Path(output)
        if resume and output is None:
            raise ValueError("resume needs the output directory of the run to go on with")
        self.resuming = resume and (self.output / CHECKPOINT).exists()
        if not resume and self.output is not None and (self.output / CHECKPOINT).exists():
            raise ValueError(
                f"{self.output} holds the checkpoint of a run: resume it, or give another output directory"
            )
        self.bar = RunProgress(enabled=progress)
        self.device = next(model.parameters()).device
        self.svd_cache = svd_cache
        self.step = self.consumed = 0
        self.phase = "prune"
        self.tune_start: int | None = None
        self.seconds = 0.0
        self.history: list[dict] = []
        self.stop_requested = False

    # ---- before the first step

    def prepare(self) -> None:
        config = self.config
        self.model.to(compute_dtype(config.dtype, self.device))
        if not any(hasattr(module, "set_live") for module in self.model.modules()):
            covariances = None
            if config.basis == "activations":
                names = choose_targets(linear_layers(self.model)[0], config.targets, config.exclude)
                first = (
                    with_labels(b, self.device)
                    for b in itertools.islice(endless(self.batches), config.calibration_batches)
                )
                with self.bar.counting("inputs", "batches") as advance:
                    covariances = input_covariances(self.model, names, first, advance, config.calibration_batches)
            with self.bar.counting("SVD", "layers") as advance:
                factorize(
                    self.model,
                    config.targets,
                    exclude=config.exclude,
                    covariances=covariances,
                    mask_scale=config.mask_scale,
                    adapter_rank=config.adapter_rank,
                    adapter_alpha=config.adapter_alpha,
                    adapter_dropout=config.adapter_dropout,
                    svd_cache=self.svd_cache,
                    seed=config.seed,
                    progress=advance,
                )
        if quantizer.is_transformers(self.model):
            quantizer.attach_factorized(self.model)
        if self.device.type == "cpu" and extension.missing:
            log.warning("plain PyTorch runs instead of the native kernels, which are %s", extension.missing)
        self.layers = svd_layers(self.model)
        self.sizing = Sizing.of(self.model, adapters=False)
        self.training = TrainingStep(self.model, config)
        self.map, self.optimizer = self.training.map, self.training.optimizer
        if config.gradient_checkpointing:
            _checkpointing(self.model, "enable")({"use_reentrant": False})

    def go(self) -> CompressionResult:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.bar, self.stopping_gently():
            self.prepare()
            torch.manual_seed(self.config.seed)
            if self.resuming:
                self.restore()
            elif self.output is not None:
                # Of a run that ended before its first checkpoint.
                (self.output / HISTORY).unlink(missing_ok=True)
            self.feed = endless(self.batches, self.consumed)
            self.saved_at = time.monotonic()
            self.bar.start(self)
            self.bar.update(self)
            while self.phase != "done":
                self.one_step()
        self.training.finish()
        if self.config.gradient_checkpointing:
            _checkpointing(self.model, "disable")()
        return CompressionResult(self.model, self.config, self.history, self.ratio())

    def ratio(self) -> float:
        return self.sizing.ratio(self.map.ranks())

    # ---- one step

    def one_step(self) -> None:
        started = time.monotonic()
        config, pruning = self.config, self.phase == "prune"
        random_state, consumed = _random_state(self.device), self.consumed
        batches = list(itertools.islice(self.feed, config.gradient_accumulation))
        self.consumed += len(batches)
        penalty = config.lambda_at(self.step) if pruning else None
        outcome = self.training(batches, penalty)
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
        scores, masks = self.map.scores, self.map.flat_masks()
        self.map.scores = torch.where((scores > 0) & (masks <= 0), -torch.ones_like(scores), scores)
        return before - int(self.map.ranks().sum())

    # ---- what is kept

    def record(self, row: dict) -> None:
        self.history.append(row)
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            with open(self.output / HISTORY, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            due = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
            if due or self.stop_requested or self.phase == "done":
                self.save_checkpoint()
        self.bar.update(self)
        if self.on_step is not None:
            self.on_step(row)
        if self.stop_requested and self.phase != "done":
            raise KeyboardInterrupt(f"stopped after step {self.step - 1}; resume goes on from there")

    def named_parameters(self) -> dict[str, Tensor]:
        return {"masks": self.map.masks} | self.training.adapters

    def save_checkpoint(self, random_state=None) -> None:
        random_state = random_state or _random_state(self.device)
        tensors = {f"random.{key}": value for key, value in random_state.items()}
        tensors["scores"] = self.map.scores
        tensors["computed"] = torch.cat([self.training.computed(layer) for layer in self.layers.values()])
        for name, parameter in self.named_parameters().items():
            tensors[f"parameter.{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        about = {
            "format_version": 2,
            "step": self.step,
            "phase": self.phase,
            "tune_start": self.tune_start,
            "consumed": self.consumed,
            "seconds": self.seconds,
            "config": self.config.to_dict(),
            "layers": self.fingerprint(),
        }
        files.write_tensors(self.output / CHECKPOINT, tensors, {"acip": json.dumps(about)})
        self.saved_at = time.monotonic()

    def fingerprint(self) -> dict[str, list[float]]:
        """What tells another model's layers from these: the sum and the largest of the singular values."""
        return {name: [float(layer.S.double().sum()), float(layer.S.max())] for name, layer in self.layers.items()}

    def restore(self) -> None:
        path = self.output / CHECKPOINT
        with files.open_tensors(path) as file:
            about = json.loads((file.metadata() or {}).get("acip", "{}"))
            if about.get("format_version") != 2:
                raise ValueError(f"{path} is of another version of compress(): give another output directory")
            self.check_same_run(path, about)
            tensors = {name: files.read_tensor(file, path, name) for name in list(file.keys())}
        self.step, self.phase, self.tune_start = about["step"], about["phase"], about["tune_start"]
        self.consumed, self.seconds = about["consumed"], about["seconds"]
        with torch.no_grad():
            for name, parameter in self.named_parameters().items():
                parameter.copy_(tensors[f"parameter.{name}"])  # masks: into every layer's, which are its parts
                state = {
                    key: tensors[f"{key}.{name}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }
                if state:
                    on = {key: self.device if key != "step" or self.device.type == "cuda" else "cpu" for key in state}
                    self.optimizer.state[parameter] = {key: value.to(on[key]) for key, value in state.items()}
        self.map.scores = tensors["scores"].to(self.map.scores.device)
        for name, keep in self.map.split(tensors["computed"]).items():
            self.layers[name].compact(keep, join=True)
        rows = read_history(self.output / HISTORY)
        self.history = [row for row in rows if row["step"] < self.step]
        # Steps after the checkpoint are made again.
        files.write_text(self.output / HISTORY, "".join(json.dumps(row) + "\n" for row in self.history))
        if self.phase != "prune":
            done = self.phase
            self.freeze_masks()
            self.phase = done
        _set_random_state(self.device, {k.removeprefix("random."): v for k, v in tensors.items() if "random." in k})

    def check_same_run(self, path, about) -> None:
        mine, theirs = self.config.to_dict(), about["config"]
        # How often to save is no part of what is computed.
        different = [key for key in mine if key != "checkpoint_seconds" and mine[key] != _tupled(theirs.get(key))]
        if different:
            changes = ", ".join(f"{key} was {theirs.get(key)!r}, is {mine[key]!r}" for key in different)
            raise ValueError(f"{path} is of a run with another configuration: {changes}")
        layers = self.fingerprint()
        if list(layers) != list(about["layers"]):
            raise ValueError(f"{path} is of another model, or of other targets")
        for name, values in layers.items():
            if any(not math.isclose(a, b, rel_tol=1e-4) for a, b in zip(values, about["layers"][name], strict=True)):
                raise ValueError(f"{path} is of another model: the singular values of {name} differ")

    def fail_not_finite(self, loss: float, norm: float, random_state) -> None:
        what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {norm}"
        advice = "lower the learning rates, or compute in float32"
        if self.output is None:
            raise FloatingPointError(f"step {self.step}: the {what}; {advice}")
        self.save_checkpoint(random_state)
        raise FloatingPointError(
            f"step {self.step}: the {what}; {advice}. The state before it is in {self.output / CHECKPOINT}"
        )

    def stopping_gently(self):
        return _GentleStop(self) if self.output is not None else _nothing()


class _GentleStop:
    """The first Ctrl-C or termination signal asks the run to stop after its step; the second stops at once."""

    def __init__(self, run):
        self.run, self.before = run, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.run.stop_requested = True
        self.restore()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def _checkpointing(model, what: str):
    """transformers' switch for recomputing activations, under its newer or its older name."""
    new, old = f"activation_checkpointing_{what}", f"gradient_checkpointing_{what}"
    return getattr(model, new) if hasattr(model, new) else getattr(model, old)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _tupled(value):
    return tuple(value) if isinstance(value, list) else value
