"""The class that runs a registered job."""

from __future__ import annotations

import importlib
import inspect
import sys

from tinytron.errors import ConfigError
from tinytron.job import BasicJob
from tinytron.registry import JOBS


def job_class(key: str) -> type[BasicJob]:
    """The class of the job ``key``, or of the job that trains it if it is a trainer. Raises: ConfigError for an unknown
    name, and if something else is registered under it."""
    target = JOBS[key]
    if inspect.isclass(target) and issubclass(target, BasicJob):
        return target
    if inspect.isclass(target) and "tinytron.training.trainer" in sys.modules:  # otherwise it cannot be a trainer
        training = importlib.import_module("tinytron.jobs.training")
        if issubclass(target, training.Trainer):
            found: type[BasicJob] = training.TrainingJob.of(target)
            return found
    raise ConfigError(f"the job {key} is {target!r}; register a subclass of Trainer or of tinytron.job.BasicJob")
