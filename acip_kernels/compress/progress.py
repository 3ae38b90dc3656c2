"""What a person sees while a run goes on."""

from __future__ import annotations

import contextlib

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """Live bars: phase, what the run says about it, and the time left."""

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
        self.tasks: dict[str, TaskID] = {}

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

    def update(self, bars: list[tuple]) -> None:
        """`(phase, done, total, about)` of every phase that has begun, in order."""
        for phase, done, total, about in bars:
            if phase not in self.tasks:
                self.tasks[phase] = self.progress.add_task(phase, total=total, about="")
            self.progress.update(self.tasks[phase], completed=done, total=total, about=about)
