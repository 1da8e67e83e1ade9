"""``tinytron plan``: ``tinytron pretrain --dry_run`` by its own name."""

from __future__ import annotations

from collections.abc import Sequence

from tinytron.cli import pretrain
from tinytron.training.arguments import PLAN


def main(argv: Sequence[str], prog: str | None = None) -> None:
    """Print what the run that these flags of ``tinytron pretrain`` describe would need. Raises: ConfigError."""
    pretrain.main([*argv, "--dry_run"], prog, about=PLAN)
