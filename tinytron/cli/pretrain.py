"""``tinytron pretrain``: one process of a training run; ``tinytron launch`` or torchrun start several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinytron.training import Trainer, build_config, parse_args
from tinytron.training.arguments import show_config
from tinytron.training.dry_run import dry_run
from tinytron.training.world import place_in_world


def main(argv: Sequence[str] | None = None, prog: str | None = None, trainer: type[Trainer] = Trainer) -> None:
    """Flags of ``argv`` (default: the command line) -> configuration -> ``trainer`` -> training. Raises: TinytronError."""
    config = build_config(parse_args(argv, trainer.sections, prog))
    if config.logging.print_config:
        ranks = place_in_world()[1]
        print(show_config(replace(config, dp_size=max(1, ranks // config.parallel.sep_size))))
    elif config.logging.dry_run:
        dry_run(config)
    else:
        trainer(config).train()
