"""What a person watches: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Shows a run of ``max_steps`` steps that continues after ``first_step``. ``enabled`` on the master only."""

    def __init__(self, max_steps: int, first_step: int, *, enabled: bool) -> None:
        self.max_steps, self.enabled = max_steps, enabled
        self._start, self._first_step = time.perf_counter(), first_step
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """Called after every step; cheap."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, values: dict[str, str]) -> None:
        """Show the newest values."""
        if self._bar is not None:
            self._bar.set_postfix(values)
        elif self.enabled:
            seconds = (time.perf_counter() - self._start) / max(1, step - self._first_step) * (self.max_steps - step)
            shown = " | ".join(f"{name} {value}" for name, value in values.items())
            self.message(f"step {step:>{len(str(self.max_steps))}}/{self.max_steps} | {shown} | ETA {_hms(seconds)}")

    def message(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _hms(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"
