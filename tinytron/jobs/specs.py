"""Reads option files and ``key=value`` arguments into one spec per stage, and checks all of them before any stage runs."""

from __future__ import annotations

from collections.abc import Sequence

from tinytron.config import UnknownOptionError, configuration, nested
from tinytron.errors import ConfigError
from tinytron.job import JobSpec
from tinytron.jobs.kinds import job_class
from tinytron.jobs.options import JobOptions, read_file
from tinytron.jobs.places import check_place


def read_stages(
    name: str,
    files: Sequence[str],
    root: str,
    words: Sequence[str] = (),
    *,
    job: str | None = None,
    project: str = "general",
    group: str = "default",
    load: Sequence[str] = (),
    restore: str | None = None,
) -> list[JobSpec]:
    """The spec of each of ``files``, called ``name``, or with several ``name_stage0``, ``name_stage1`` and so on.

    ``job`` is the job of files that do not name one; ``words`` (``key=value``) apply to every stage that has the option;
    ``restore`` applies to the first stage. Raises: ConfigError for anything that cannot run as written.
    """
    check_place(name, project, group)
    stages = [_read(file, job) for file in files]
    for word in words:
        _override(word, [options for options, _, _ in stages])
    specs = []
    for number, (options, about, file) in enumerate(stages):
        try:
            values = options.values()
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        here = about.get("restore") if restore is None or number else restore
        called = name if len(files) == 1 else f"{name}_stage{number}"
        specs.append(JobSpec(options.key, called, root, values, project, group, tuple(load), here))
    for spec in specs:
        with configuration(nested(spec.values)):
            job_class(spec.job)(spec).check()
    return specs


def _read(file: str, job: str | None) -> tuple[JobOptions, dict[str, str], str]:
    content, about = read_file(file)
    key = about.get("job", job)
    if key is None:
        raise ConfigError(
            f"{file} does not say which job it is for; add a line such as job: gpt/train/pretrain, or -j JOB"
        )
    if job is not None and key != job:
        raise ConfigError(f"{file} is for the job {key}, not for {job}; make one with tinytron configure {job} FILE")
    options = JobOptions(key, job_class(key))
    options.update(content, file)
    return options, about, file


def _override(word: str, stages: Sequence[JobOptions]) -> None:
    """Apply ``word`` to the stages that have the option. Raises: UnknownOptionError if none has; ConfigError."""
    errors = []
    for options in stages:
        try:
            options.override([word])
        except UnknownOptionError as error:
            errors.append(error)
    if len(errors) == len(stages):
        raise errors[0]
