"""Jobs from Python: configure, run, restore, or save them for later.

with quick("gpt/train/pretrain", "/path/to/output", "my-run") as j:
    j.config.training.per_device_batch_size = 16
    j()
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinytron.config import configuration, nested
from tinytron.errors import ConfigError
from tinytron.job import JobSpec
from tinytron.jobs.kinds import job_class
from tinytron.jobs.options import JobOptions, View, about_of, read_file
from tinytron.jobs.places import check_place
from tinytron.utils.training import write_atomically


class QuickJob:
    """A job to configure (``config``) and to call. Errors are raised. A job that was asked to stop raises SystemExit."""

    def __init__(self, job: str, out_path: str, name: str, project: str, group: str, config: str | None) -> None:
        self.options = JobOptions(job, job_class(job))
        if config is not None:
            content, about = read_file(config)
            if about.get("job", job) != job:
                raise ConfigError(f"{config} is for the job {about['job']}, not for {job}")
            self.options.update(content, config)
        self.config = View(self.options)
        self._spec = JobSpec(job, name, out_path, {}, project, group)

    def __enter__(self) -> QuickJob:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    @property
    def spec(self) -> JobSpec:
        """The work as it is configured now. Raises: ConfigError if a required option is missing."""
        return replace(self._spec, values=self.options.values())

    def create(self) -> Any:
        """The job itself, in its configuration; ``quick`` calls it for you."""
        return job_class(self._spec.job)(self.spec)

    def __call__(self) -> None:
        """Run it in this process, or continue it. A finished job only says so. Raises: TinytronError."""
        job = self.create()
        with configuration(nested(job.spec.values)):
            job.check()
            job()

    def restore(self, checkpoint: str) -> QuickJob:
        """Start from the weights of another job, ``NAME[/CHECKPOINT]`` in the output folder. Returns this object."""
        self._spec = replace(self._spec, restore=checkpoint)
        return self

    def save(self, file: str, chip: str | None = None, n_chips: int | None = None, n_shards: int | None = None) -> None:
        """Write the options to ``file`` for ``tinytron run``, and the hardware they ask for."""
        about = about_of(self._spec.job, chip, n_chips, n_shards)
        if self._spec.restore is not None:
            about["restore"] = self._spec.restore
        text = self.options.as_yaml(about)
        write_atomically(Path(file), lambda out: out.write(text.encode()))


def init(
    job: str,
    out_path: str | os.PathLike[str] | None = None,
    name: str = "quick",
    project: str = "general",
    group: str = "default",
    config: str | None = None,
) -> QuickJob:
    """The job ``job`` called ``name``, whose output goes below ``out_path`` (default: the environment's ``TINYTRON_ROOT``).
    ``config`` is a file of options to start from. Raises: ConfigError."""
    root = out_path if out_path is not None else os.environ.get("TINYTRON_ROOT")
    if root is None:
        raise ConfigError("quick needs an output folder; give out_path, or set TINYTRON_ROOT")
    if os.sep in name:
        raise ConfigError(f"quick({job!r}, {str(root)!r}, {name!r}): the output folder comes before the name")
    check_place(name, project, group)
    return QuickJob(job, os.fspath(root), name, project, group, config)


quick = init  # for a `with` statement
