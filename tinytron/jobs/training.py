"""A trainer as a job: its options come from a file, and its runs are in the job's folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tinytron.config import MISSING, Option, configuration, nested, options_of, plain
from tinytron.errors import ConfigError
from tinytron.job import MARKER, BasicJob
from tinytron.jobs.aliases import TRAINING
from tinytron.jobs.checkpoints import find_checkpoint, named_checkpoint, newest_run, set_later_aside, write_pointers
from tinytron.jobs.sampling import FILE, OPTION, PATH, Sampling, read_sampling, write_mixture
from tinytron.training import Config, Trainer, build_config, parse_args
from tinytron.training.base import BaseTrainer
from tinytron.training.config import all_sections
from tinytron.training.config_files import words_of
from tinytron.training.world import place_in_world
from tinytron.utils.flags import config_fields

OWN = "own"  # the section of the run's configuration for options that trainer and model declare by `field`
_NOT_IN_FILES = {"train.debug", "logging.exp_name", "logging.log_dir", "logging.print_config", "logging.dry_run"}
_NOT_IN_FILES |= {"logging.dry_run_world_size", "ckpt.resume"}


class TrainingJob(BasicJob):
    """Trains ``TRAINER``, a ``Trainer`` subclass. Its options are all of a run's, and what the trainer's ``CONFIG`` and
    ``MODEL`` declare by ``tinytron.config.field``."""

    TRAINER: ClassVar[type[Trainer]] = Trainer
    ALIASES = TRAINING
    all_processes = True

    @classmethod
    def of(cls, trainer: type[Trainer]) -> type[TrainingJob]:
        """The class of the job that trains ``trainer``."""
        chosen = trainer.chosen_options() if issubclass(trainer, BaseTrainer) else {}
        defaults: Mapping[str, Any] = {
            **{f"optim.{name}": value for name, value in chosen.items()},
            **getattr(trainer, "DEFAULTS", {}),
        }
        return type(trainer.__name__, (cls,), {"TRAINER": trainer, "DEFAULTS": defaults, "__doc__": trainer.__doc__})

    @classmethod
    def options(cls) -> list[Option]:
        """The options of a run, except those that the job itself sets, and what the trainer and its model declare."""
        return [*cls._options_of_run(), OPTION, *cls._declared_options()]

    @classmethod
    def _options_of_run(cls) -> list[Option]:
        found = []
        for section, owner in all_sections(cls.TRAINER.sections).items():
            for info in config_fields(owner):
                kind = info.type | None if info.optional else info.type
                path = f"{section}.{info.name}"
                if path not in _NOT_IN_FILES:
                    found.append(Option(path, info.name, owner.__name__, kind, info.default, info.flag))
        return found

    @classmethod
    def _declared_options(cls) -> list[Option]:
        """The options that the trainer and its model declare: their own, and those of a run that they read."""
        owners = [getattr(cls.TRAINER, name, None) for name in ("CONFIG", "MODEL")]
        return [option for owner in owners if owner is not None for option in options_of(owner)]

    @cached_property
    def sampling(self) -> list[Sampling]:
        """The data sets of ``training.dataset``. Raises: ConfigError."""
        value = self.spec.values.get(PATH)
        if value is None:
            return []
        if (path := self.spec.values["data.dataset_path"]) is not None:
            raise ConfigError(f"{PATH} and data.dataset_path={path} both name the data of the run; leave one out")
        reads_pairs = getattr(self.TRAINER, "READS_PAIRS", False)
        return read_sampling(value, Path(self.spec.root), reads_pairs=reads_pairs)

    def config_of_run(self) -> Config:
        """The configuration of the run. Raises: ConfigError for values that break a rule."""
        values = self.spec.values
        of_run = self._options_of_run()
        paths_of_run = {option.path for option in of_run}
        own = {option.path: option for option in self._declared_options() if option.path not in paths_of_run}
        given = changed(of_run, values)
        given |= {"exp_name": self.spec.name, "log_dir": str(self.spec.folder)}
        if self.spec.restore is not None:
            given["init_from"] = str(find_checkpoint(self.spec.root, self.spec.restore).model)
        if self.sampling:
            given["dataset_path"] = str(self.spec.folder / FILE)
        config = build_config(parse_args(words_of(given), self.TRAINER.sections))
        if not own:
            return config
        section = _section_of(list(own.values()))
        values_of_section = {path.replace(".", "_"): _hashable(values[path]) for path in own}
        return dataclasses.replace(config, further={**config.further, OWN: section(**values_of_section)})

    def check(self) -> None:
        """Build the configuration, which checks it. Raises: ConfigError."""
        restore = self.spec.restore
        if restore is not None and self.spec.values["ckpt.init_from"] is not None:
            raise ConfigError(f"restore {restore} and ckpt.init_from both name weights to start from; leave one out")
        type(self)(dataclasses.replace(self.spec, restore=None)).config_of_run()

    def go_back_to(self, checkpoint: str) -> None:
        """Move the job's later checkpoints aside, so that training continues from ``checkpoint``."""
        chosen = named_checkpoint(self.spec.folder, checkpoint)
        (self.spec.folder / MARKER).unlink(missing_ok=True)
        aside = set_later_aside(newest_run(self.spec.folder), chosen)
        print(f"continuing from {chosen.model}" + (f"; later checkpoints are in {aside}" if aside is not None else ""))

    def run(self) -> None:
        """Train, from the newest checkpoint of the job's folder if there is one. Collective."""
        for entry in self.sampling:
            entry.check()
        if self.sampling:
            write_mixture(self.sampling, self.spec.folder)
        with configuration(nested(self.spec.values)):
            trainer = self.TRAINER(self.config_of_run())
            trainer.train()
        if self.local:
            write_pointers(self.spec.folder, final=True)

    @property
    def local(self) -> bool:
        """True in the first of all processes."""
        return place_in_world()[0] == 0


def changed(options: list[Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """The ``values`` by flag that differ from the default. Defaults do not count as given, so that initial weights can
    bring their own values."""
    shown = {option: plain(values[option.path]) for option in options}
    return {option.name: value for option, value in shown.items() if value != plain(option.default)}


def _section_of(options: list[Option]) -> type:
    """A section of the configuration with these options, so that they are part of the run's identity and its logs."""
    fields = []
    for option in options:
        default = None if option.default is MISSING else _hashable(option.default)
        kind: Any = Annotated[option.type | None, option.flag]
        fields.append((option.path.replace(".", "_"), kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass("OwnOptions", fields, frozen=True, kw_only=True)


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return json.dumps(dict(value), sort_keys=True)
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
