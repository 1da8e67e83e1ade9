"""The configuration of a run: its sections by name, the values that identify the run, and a consistency check."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinytron.model.config import ModelConfig
from tinytron.training.checks import check
from tinytron.training.sections import (
    SECTIONS,
    CkptConfig,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    SeedConfig,
    TrainingConfig,
)
from tinytron.utils.flags import check_bounds, config_fields

BALANCED = "train.balanced_sequences"  # a part of the identity that has no flag

__all__ = [
    "SECTIONS",
    "CkptConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "SeedConfig",
    "TrainingConfig",
    "all_sections",
]


# Names that the parser and parse_args use themselves.
_TAKEN = ("help", "help_all", "given", "sections", "config", "preset")


def all_sections(further: Mapping[str, type]) -> dict[str, type]:
    """The built-in sections and ``further`` ones, by name: dataclasses whose fields have a ``Flag``. Raises: TypeError if
    the name of a section or a flag is taken, or a field has no flag or no default."""
    sections: dict[str, type] = dict(SECTIONS)
    owners: dict[str, str] = {}
    for name, cls in further.items():
        if name in sections or name in {f.name for f in dataclasses.fields(Config)} or hasattr(Config, name):
            raise TypeError(f"a section {name} exists already; give {cls.__name__} another name")
        sections[name] = cls
    for name, cls in sections.items():
        for info in config_fields(cls):
            if info.default is dataclasses.MISSING:
                raise TypeError(f"{cls.__name__}.{info.name} needs a default, because its flag may be left out")
            if info.name in _TAKEN:
                raise TypeError(f"--{info.name} is reserved for the parser; rename it in {name}")
            if info.name in owners:
                raise TypeError(f"--{info.name} is already an option of {owners[info.name]}; rename it in {name}")
            owners[info.name] = name
    return sections


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options, by section. ``further`` are sections that a trainer or a script adds; they are attributes, too:
    ``Config(further={"dpo": DpoConfig()}).dpo``. ``dp_size`` is the number of data-parallel ranks; a trainer sets it after
    joining them.

    Raises: ConfigError for values that are invalid by themselves or in combination, for any world size.
    """

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: SeedConfig = field(default_factory=SeedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    further: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dp_size: int = 1

    def __post_init__(self) -> None:
        all_sections({name: type(section) for name, section in self.further.items()})
        for name, section in self.further.items():
            object.__setattr__(self, name, section)
        self.validate_static()

    def validate_static(self) -> None:
        """Check the values by themselves and in combination, for any world size; building a ``Config`` does it. Raises:
        ConfigError for the first rule that is broken."""
        for _, section in self:
            check_bounds(section)
        check(**{name: self[name] for name in SECTIONS})

    def __getitem__(self, name: str) -> Any:
        """The section ``name``."""
        return self.further[name] if name in self.further else getattr(self, name)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Name and value of each section."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("further", "dp_size")]
        return ((name, self[name]) for name in [*names, *self.further])

    @classmethod
    def of(cls, sections: Mapping[str, Any]) -> Config:
        """Build a configuration from all sections by name, built-in and further ones."""
        builtin = {name: section for name, section in sections.items() if name in SECTIONS}
        return cls(**builtin, further={name: section for name, section in sections.items() if name not in SECTIONS})

    def with_sections(self, further: Mapping[str, type]) -> Config:
        """This configuration with the defaults of those sections that are missing."""
        missing = {name: cls() for name, cls in further.items() if name not in self.further}
        return dataclasses.replace(self, further={**self.further, **missing}) if missing else self

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as saved with every run."""
        return {name: dataclasses.asdict(section) for name, section in self}

    @property
    def balanced_sequences(self) -> int | None:
        """Number of sequences over which experts are balanced, if that depends on the layout: with
        ``--moe_aux_loss_scope batch`` those of a micro-batch over all ranks."""
        model = self.model
        depends = model.use_moe and model.moe_aux_loss_scope == "batch" and model.moe_aux_loss_coef > 0
        return self.train.batch_size * self.dp_size if depends else None

    def identity(self) -> dict[str, Any]:
        """The values that identify this run. Layout, micro-batch, paths, intervals and step limits are not among them,
        except for ``balanced_sequences``."""
        values = {
            f"{name}.{info}": getattr(section, info) for name, section in self for info in _identity(type(section))
        }
        return values if self.balanced_sequences is None else {**values, BALANCED: self.balanced_sequences}

    def default_identity(self) -> dict[str, Any]:
        """``identity`` with the default of every option."""
        return {f"{name}.{info}": value for name, section in self for info, value in _identity(type(section)).items()}

    def config_hash(self) -> str:
        """Eight hexadecimal digits of ``identity``; with ``exp_name`` they name the run's folder. Default values do not
        count, so that an option added in a later version does not rename the runs of this one."""
        defaults = self.default_identity()
        text = json.dumps({k: v for k, v in self.identity().items() if v != defaults.get(k)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _identity(cls: type) -> dict[str, Any]:
    """The options of a section that are part of the identity, with their defaults."""
    return {info.name: info.default for info in config_fields(cls) if info.flag.identity}
