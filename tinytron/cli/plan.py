"""``tinytron plan``: the same as ``tinytron pretrain --dry_run``."""

from __future__ import annotations

from collections.abc import Sequence

from tinytron.cli import pretrain
from tinytron.training.arguments import PLAN


def main(argv: Sequence[str], prog: str | None = None) -> None:
    """Print what a run with these ``tinytron pretrain`` flags would need. Raises: ConfigError."""
    pretrain.main([*argv, "--dry_run"], prog, about=PLAN)
