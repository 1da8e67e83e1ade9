"""The errors a user sees. Each is one line: the value, the rule it breaks, and a value that works."""

from __future__ import annotations


class TinytronError(Exception):
    """Base of every error that is not a bug in the code; entry points print it as one line and exit with status 2."""


class ConfigError(TinytronError):
    """A flag, an environment variable or a combination of them breaks a rule."""


class DataError(TinytronError):
    """A data file or dataset is missing, damaged, or does not fit the configuration."""


class CheckpointError(TinytronError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingError(TinytronError):
    """A run cannot continue: its loss spiked (``--spike_action stop``), or its replicas diverged."""


class HostError(TinytronError):
    """A host cannot be reached, or refuses a job (``tinytron submit`` and the commands around it)."""


class StorageError(TinytronError):
    """A remote folder cannot be reached, read or written."""


def first_line(error: BaseException | str) -> str:
    """The first line of an error message from a library; an empty string if the error has no message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
