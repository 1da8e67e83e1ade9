"""timl's settings as an object, for scripts of one's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from tinytron.cli.front_end import Settings, read_flags, with_defaults
from tinytron.cli.timl import SETTINGS as ALL_SETTINGS
from tinytron.cli.timl import WORKS
from tinytron.config import MISSING, converted
from tinytron.errors import ConfigError
from tinytron.utils.flags import Parser, nearest

# The model is an argument of the trainer here.
SETTINGS: Settings = MappingProxyType(
    {name: s for name, s in ALL_SETTINGS.items() if name not in ("model_name", "attn_implementation")}
)
_JSON = {"lr_scheduler_kwargs", "forward_kwargs", "liger_kernel_kwargs", "cut_cross_entropy_kwargs"}


class TrainingArguments:
    """timl's settings as keyword arguments and attributes, with its defaults and units: ``train_batch_size=512`` counts
    sequences of all processes. Unset ones are ``None``. Raises: ConfigError for unknown names, values of the wrong type,
    and required settings that are missing."""

    def __init__(self, **settings: Any) -> None:
        for name in settings:
            if name not in SETTINGS:
                raise ConfigError(f"TrainingArguments has no setting {name}{nearest(name, SETTINGS)}")
        if missing := [n for n, s in SETTINGS.items() if s.default is MISSING and settings.get(n) is None]:
            raise ConfigError(f"TrainingArguments needs {', '.join(missing)}; the flags {WORKS} have values that work")
        given = {name: _checked(name, value) for name, value in settings.items() if value is not None}
        vars(self).update(dict.fromkeys(SETTINGS), **with_defaults(SETTINGS, given))

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> TrainingArguments:
        """The settings that ``argv`` (default: the command line) gives as flags, booleans as ``true`` or ``false`` and
        dictionaries as JSON. Raises: ConfigError."""
        parser = Parser(
            usage="%(prog)s --output_dir DIR ... [--flag value ...]", description=__doc__, common=("output_dir",)
        )
        return cls(**read_flags(SETTINGS, sys.argv[1:] if argv is None else argv, parser, WORKS))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"TrainingArguments has no setting {name}{nearest(name, SETTINGS)}")

    def as_dict(self) -> dict[str, Any]:
        """Name and value of every setting that is not ``None``."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __repr__(self) -> str:
        return f"TrainingArguments({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"


def _checked(name: str, value: Any) -> Any:
    return converted(name, value, dict if name in _JSON else SETTINGS[name].type)
