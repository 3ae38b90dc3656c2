"""What a person sees while a run goes on."""

from __future__ import annotations

import contextlib

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """A live bar: phase, step, loss, λ, size ratio and the time left."""

    def __init__(self, enabled: bool = True):
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[about]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            # stdout is for results.
            console=Console(stderr=True),
            disable=not enabled,
        )

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *exception):
        self.progress.stop()

    @contextlib.contextmanager
    def counting(self, what: str, units: str):
        """Yields `progress(done, total)` for a phase before the first step."""
        task = self.progress.add_task(what, total=None, about="")
        yield lambda done, total: self.progress.update(
            task, completed=done, total=total, about=f"{done}/{total} {units}"
        )

    def start(self, run) -> None:
        self.prune = self.progress.add_task("prune", total=1, about="")
        self.tune = self.progress.add_task("tune", total=max(run.config.tune_steps, 1), about="", visible=False)

    def update(self, run) -> None:
        if not run.history:
            return
        row, config = run.history[-1], run.config
        about = f"step {row['step'] + 1}  loss {row['loss']:.3f}  size {100 * row['size_ratio']:.1f} %"
        if row["phase"] == "prune":
            # Steps where their number is known, else the way to the size at which the run stops.
            total = config.max_prune_steps or 1 - config.stop_ratio
            done = row["step"] + 1 if config.max_prune_steps else 1 - row["size_ratio"]
            if run.phase != "prune":
                done = total
            about += f"  λ {row['lambda']:.2g}"
            self.progress.update(self.prune, total=total, completed=min(done, total), about=about)
        else:
            self.progress.update(self.prune, total=1, completed=1)
            self.progress.update(self.tune, visible=True, completed=row["step"] + 1 - run.tune_start, about=about)
