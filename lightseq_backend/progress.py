"""How far a long run is: a bar on a terminal, a line now and then in a log, the rate at the end."""

from __future__ import annotations

import sys
import time

from lightseq_backend.lines import Lines

BAR_DELAY = 1.0  # seconds that a run must last before it gets a bar
LOG_PERIOD = 30.0  # seconds


class Progress:
    """Counts lines on standard error, from those that were done before; nothing where it is to be quiet.

    shows_bar: False where the answers themselves appear on the terminal
    """

    def __init__(self, lines: Lines, done: int, quiet: bool, shows_bar: bool):
        from tqdm import tqdm

        self._bar, terminal = None, sys.stderr.isatty()
        if shows_bar and not quiet and terminal:
            self._bar = tqdm(
                total=lines.count(), initial=done, unit=" sentences", delay=BAR_DELAY, leave=False, file=sys.stderr
            )
        self._quiet, self._logs = quiet, not quiet and not terminal
        self._written, self._started = 0, time.monotonic()
        self._due = self._started + LOG_PERIOD

    def advance(self) -> None:
        self._written += 1
        if self._bar is not None:
            self._bar.update()
        elif self._logs and time.monotonic() >= self._due:
            self._due += LOG_PERIOD
            self._tell_rate()

    def tell(self, text: str) -> None:
        """A line beside the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            self._tell_rate()

    def _tell_rate(self) -> None:
        seconds = max(1e-9, time.monotonic() - self._started)
        if not self._quiet:
            self.tell(f"{self._written} lines in {seconds:.1f} s, {self._written / seconds:.1f} sentences/s")
