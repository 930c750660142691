"""The progress of a batch job on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class JobProgress:
    """A line at the bottom of a terminal: prompts, tokens a second, accepted drafts, busy slots, time that is left.

    Where standard error is not a terminal, nothing but what `write` and `warn` print is shown.

    Args:
        total: lines of the job, or None if they cannot be counted.
        console: where the line is shown; None: standard error.
    """

    def __init__(self, total: int | None, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("prompts {task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal, refresh_per_second=4
        )
        self._task = self._progress.add_task("", total=total, figures="")

    def __enter__(self) -> JobProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """Count one more line as done."""
        self._progress.advance(self._task)

    def show(self, figures: str) -> None:
        """Show these figures beside the number of prompts."""
        self._progress.update(self._task, figures=figures)

    def write(self, text: str) -> None:
        """Print a text on standard output, above the line."""
        self._above(lambda: print(text))

    def warn(self, text: str) -> None:
        """Print a text on standard error, above the line."""
        self._above(lambda: print(text, file=sys.stderr))

    def _above(self, print_text: Callable[[], None]) -> None:
        if self._progress.disable:
            return print_text()
        self._progress.stop()  # it removes the line, and puts it back below the text
        print_text()
        self._progress.start()
