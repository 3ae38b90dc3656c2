"""What every training run here has in common: history, checkpoints, resuming, and a gentle end."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import signal
import threading
import time

import filelock
import torch
from torch import Tensor

from .. import files
from ..ops import extension
from ..report import read_history
from .progress import RunProgress
from .step import endless

log = logging.getLogger("acip_kernels")

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"


class TrainingLoop:
    """A run over batches that ends in `finish()`; a subclass says what a step is, and what there is to keep.

    The subclass has `prepare()`, which sets `layers` (the model's `SVDLinear`s by name) and `optimizer`; `one_step()`,
    which ends in `record(row)` and sets `phase` to "done" after the last step; `finish()`; `progress()`, a list of
    `(phase, done, total, about)` for the bars; and what a checkpoint holds beside the parameters in
    `named_parameters()` and their optimizer state: `tensors()`, taken back by `take_tensors`, and `fields()`, numbers
    that are attributes of the run.
    """

    format_version: int
    first_phase: str
    phases: tuple[str, ...]
    kept: tuple[str, ...] = (CHECKPOINT, HISTORY)  # files in `output`

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
        self.phase = self.first_phase
        self.seconds = 0.0
        self.history: list[dict] = []
        self.stop_requested = False

    def go(self) -> None:
        devices = [self.device] if self.device.type == "cuda" else []
        with self.alone(), torch.random.fork_rng(devices), self.bar, self.stopping_gently():
            self.prepare()
            if self.device.type == "cpu" and extension.missing:
                log.warning("plain PyTorch runs instead of the native kernels, which are %s", extension.missing)
            torch.manual_seed(self.config.seed)
            if self.resuming:
                self.restore()
            elif self.output is not None:
                # Of a run that ended before its first checkpoint.
                (self.output / HISTORY).unlink(missing_ok=True)
            self.feed = endless(self.batches, self.consumed)
            self.saved_at = time.monotonic()
            self.bar.update(self.progress())
            while self.phase != "done":
                self.one_step()
        self.finish()

    @contextlib.contextmanager
    def alone(self):
        """Within it no other run writes to `output`; the lock goes with the process, however that ends."""
        if self.output is None:
            yield
            return
        self.output.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.output / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RuntimeError(
                f"{self.output} is in use by another run: wait for its end, or give another output directory"
            ) from None
        except NotImplementedError:  # a file system without locks
            log.warning("%s cannot be locked: let no other run write there", self.output)
        try:
            for name in self.kept:
                files.remove_unfinished(self.output / name)
            yield
        finally:
            lock.release()

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
        self.bar.update(self.progress())
        if self.on_step is not None:
            self.on_step(row)
        if self.stop_requested and self.phase != "done":
            raise KeyboardInterrupt(f"stopped after step {self.step - 1}; resume goes on from there")

    def save_checkpoint(self, random_state=None) -> None:
        random_state = random_state or random_state_of(self.device)
        tensors = {f"random.{key}": value for key, value in random_state.items()} | self.tensors()
        for name, parameter in self.named_parameters().items():
            tensors[f"parameter.{name}"] = parameter.detach()
            # After the last step nothing goes on from the optimizer's state.
            state = {} if self.phase == "done" else self.optimizer.state.get(parameter, {})
            for key, value in state.items():
                tensors[f"{key}.{name}"] = value
        about = {
            "format_version": self.format_version,
            "run": type(self).__name__,
            "step": self.step,
            "phase": self.phase,
            "consumed": self.consumed,
            "seconds": self.seconds,
            "config": self.config.to_dict(),
            "layers": self.fingerprint(),
        }
        files.write_tensors(self.output / CHECKPOINT, tensors, {"acip": json.dumps(about | self.fields())})
        self.saved_at = time.monotonic()

    def fingerprint(self) -> dict[str, list[float]]:
        """What tells another model's layers from these: the sum and the largest of the singular values."""
        return {name: [float(layer.S.double().sum()), float(layer.S.max())] for name, layer in self.layers.items()}

    def restore(self) -> None:
        path = self.output / CHECKPOINT
        with files.open_tensors(path) as file:
            try:
                about = dict(json.loads((file.metadata() or {}).get("acip", "{}")))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{path} does not say what run it is of: {error}") from None
            if (about.get("format_version"), about.get("run")) != (self.format_version, type(self).__name__):
                raise ValueError(
                    f"{path} is of another method, or of another version of compress(): give another output directory"
                )
            try:
                self.check_same_run(path, about)
                self.take(about, {name: files.read_tensor(file, path, name) for name in list(file.keys())})
            except (KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def take(self, about: dict, tensors: dict[str, Tensor]) -> None:
        """Go back to where a checkpoint was written."""
        step, history = about["step"], self.output / HISTORY
        if type(step) is not int or type(about["consumed"]) is not int or about["phase"] not in self.phases:
            raise TypeError(f"step {step!r}, phase {about['phase']!r}, {about['consumed']!r} batches")
        rows = read_history(history)[:step] if step else []
        if [row.get("step") for row in rows] != list(range(step)):
            raise ValueError(f"{history} does not hold the {step} steps of {self.output / CHECKPOINT}")
        for field in ("step", "phase", "consumed", "seconds", *self.fields()):
            setattr(self, field, about[field])
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
        self.take_tensors(tensors)
        set_random_state(self.device, {k.removeprefix("random."): v for k, v in tensors.items() if "random." in k})
        self.history = rows
        # Steps after the checkpoint are made again.
        files.write_text(history, "".join(json.dumps(row) + "\n" for row in rows))

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
        return _GentleStop(self) if self.output is not None else contextlib.nullcontext()


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


def random_state_of(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _tupled(value):
    return tuple(value) if isinstance(value, list) else value
