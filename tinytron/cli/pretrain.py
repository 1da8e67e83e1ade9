"""``tinytron pretrain``: one process of a training run; ``tinytron launch`` or torchrun starts several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinytron.training import Trainer, build_config, parse_args
from tinytron.training.arguments import PRETRAIN, About
from tinytron.training.config_files import as_json, as_yaml
from tinytron.training.dry_run import dry_run
from tinytron.training.world import place_in_world


def main(
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    trainer: type[Trainer] = Trainer,
    about: About = PRETRAIN,
) -> None:
    """Turn ``argv`` (default: the command line) into a configuration and train with ``trainer``. Raises: TinytronError."""
    config = build_config(parse_args(argv, trainer.sections, prog, about))
    if (form := config.logging.print_config) != "no":
        config = replace(config, dp_size=max(1, place_in_world()[1] // config.parallel.sep_size))
        config = replace(config, logging=replace(config.logging, print_config="no"))  # the run that reads it must train
        print({"json": as_json, "yaml": as_yaml}[form](config))
    elif config.logging.dry_run:
        dry_run(config)
    else:
        trainer(config).train()
