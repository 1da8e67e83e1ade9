"""TensorBoard event files in the run's folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinytron.metrics.sinks.base import Record, RunInfo, Sink
from tinytron.metrics.sinks.flat import flat_record
from tinytron.utils.optional import require_package

FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class TensorBoard(Sink):
    """Every number of every record as a scalar in double precision. A run that is resumed, or goes back, adds a file that
    tells TensorBoard to forget the later steps of earlier files. Raises, in ``open``: ConfigError without the package
    ``tensorboard``."""

    files = (FOLDER,)

    def open(self, run: RunInfo) -> None:
        require_package("tensorboard", "tensorboard")
        self._folder = run.folder / FOLDER
        self._begin_file(run.first_step)

    def _begin_file(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard takes the second start that it reads for a restart, so the first run has to write one, too.
        options = {"purge_step": step + 1, "flush_secs": FLUSH_SECONDS}
        self._writer: Any = SummaryWriter(str(self._folder), **options)

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._begin_file(step)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            for name, value in flat_record(record).items():
                self._writer.add_scalar(name, value, record["step"], new_style=True, double_precision=True)
        self._writer.flush()

    def figure(self, step: int, name: str, image: bytes) -> None:
        pixels = np.asarray(require_package("PIL.Image", "tensorboard").open(io.BytesIO(image)).convert("RGB"))
        self._writer.add_image(f"plots/{name}", pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the file. Later records open another one."""
        self._writer.close()
