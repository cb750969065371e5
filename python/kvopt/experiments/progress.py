# SPDX-License-Identifier: Apache-2.0
"""What a long job says while it works: a live line on a terminal, plain lines elsewhere, nothing when quiet.

Everything goes to stderr, so that stdout holds results alone. ``NO_COLOR`` is respected (by rich).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Steps:
    """Announces the steps of a job and, within a step, how far it is.

    Args:
        total: number of steps, for the count shown.
        quiet: say nothing.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.total = total
        self.quiet = quiet
        self.number = 0
        self._started = time.perf_counter()
        self._live: Any = None
        self._task: Any = None

    @contextmanager
    def step(self, text: str) -> Iterator[Steps]:
        """One step; inside it the returned object is called with (done, in all)."""
        self.number += 1
        title = f"[{self.number}/{self.total}] {text}"
        if self.quiet:
            yield self
            return
        if not sys.stderr.isatty():
            print(f"{time.perf_counter() - self._started:6.1f} s  {title}", file=sys.stderr, flush=True)
            yield self
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as live:
            self._live, self._task = live, live.add_task(title, total=None)
            try:
                yield self
            finally:
                self._live = self._task = None

    def __call__(self, done: int, total: int) -> None:
        """How far the present step is."""
        if self._live is not None:
            self._live.update(self._task, completed=done, total=total)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
