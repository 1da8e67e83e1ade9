"""Jobs, datasets and evaluations by name: the built-in ones, those of installed packages, and those of the modules given
with ``--load``.

``@job("my_model/train/pretrain")`` above a class registers it. Listing the names imports no job: a table
(``tinytron.experiments.builtin``) lists the built-in ones, and a package names its own as entry points of the group
``tinytron.jobs`` (``tinytron.datasets``, ``tinytron.evaluations``). A module is imported when one of its names is used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tinytron.errors import ConfigError, first_line
from tinytron.utils.flags import nearest

T = TypeVar("T")
_KEY = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True)
class Entry:
    """A registered name: the ``module`` that registers it, the ``place`` where it is defined, one line of ``help``, and the
    object itself (``target``) once its module is imported."""

    module: str
    place: str
    help: str = ""
    target: Any = None


class Registry(Mapping[str, Any]):
    """Objects by name. ``table`` is the attribute of ``tinytron.experiments.builtin`` that lists the built-in ones as
    ``key: (module, help)``; other packages list theirs as entry points of ``group``."""

    def __init__(self, kind: str, table: str, group: str) -> None:
        self.kind = kind
        self._table = table
        self._group = group
        self._found: dict[str, Entry] | None = None

    @property
    def _entries(self) -> dict[str, Entry]:
        if self._found is None:
            table = getattr(importlib.import_module("tinytron.experiments.builtin"), self._table)
        if self._found is None:  # an import in tinytron/experiments/__init__.py may have registered jobs by now
            self._found = {key: Entry(module, module, text) for key, (module, text) in table.items()}
            for point in importlib.metadata.entry_points(group=self._group):
                self._put(point.name, Entry(point.value.partition(":")[0], point.value))
        return self._found

    def add(self, key: str, target: Any) -> None:
        """Register ``target`` as ``key``. Raises: ConfigError for a malformed key, or one that another object has."""
        if _KEY.fullmatch(key) is None:
            raise ConfigError(f"{self.kind} {key!r} is not a name like gpt/train/pretrain")
        text = (inspect.getdoc(target) or "").partition("\n\n")[0].replace("\n", " ")
        self._put(key, Entry(target.__module__, _place(target), text, target))

    def _put(self, key: str, entry: Entry) -> None:
        known = self._entries.get(key)
        if known is not None and not _same(known, entry):
            raise ConfigError(
                f"{self.kind} {key} is registered twice, by {known.place} and by {entry.place}; rename one of them"
            )
        self._entries[key] = entry

    def help(self, key: str) -> str:
        """One line about ``key``; or where it is defined, if another package has it and is not imported yet."""
        entry = self._entries[key]
        return entry.help or entry.place

    def __getitem__(self, key: str) -> Any:
        """The object, whose module is imported now if it was not. Built-in jobs have synonyms, which are not listed.
        Raises: ConfigError for an unknown name, or if the module cannot be imported or does not register it."""
        if key not in self._entries:
            key = importlib.import_module("tinytron.experiments.builtin").SYNONYMS.get(key, key)
        entry = self._entries.get(key)
        if entry is None:
            listed = "; tinytron jobs lists them" if self.kind == "job" else ""
            hint = nearest(key, self) or listed
            raise ConfigError(f"there is no {self.kind} {key}{hint}")
        if entry.target is None:
            load_module(entry.module)
            entry = self._entries[key]
            if entry.target is None:
                raise ConfigError(
                    f"{entry.module} does not register the {self.kind} {key}; decorate one of its classes"
                )
        return entry.target

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


JOBS = Registry("job", "JOBS", "tinytron.jobs")
DATASETS = Registry("dataset", "DATASETS", "tinytron.datasets")
EVALUATIONS = Registry("evaluation", "EVALUATIONS", "tinytron.evaluations")


def job(key: str) -> Callable[[T], T]:
    """Register a trainer or a ``tinytron.job.BasicJob`` as the job ``key``, by convention ``<model>/<phase>/<variant>``."""
    return _decorator(JOBS, key)


def dataset(key: str) -> Callable[[T], T]:
    """Register a dataset as ``key``."""
    return _decorator(DATASETS, key)


def evaluation(key: str) -> Callable[[T], T]:
    """Register an evaluation as ``key``."""
    return _decorator(EVALUATIONS, key)


def _decorator(registry: Registry, key: str) -> Callable[[T], T]:
    def register(target: T) -> T:
        registry.add(key, target)
        return target

    return register


def load_module(name: str) -> None:
    """Import ``name``, a module that Python finds from here or a ``.py`` file, so that its jobs are registered. Raises:
    ConfigError if it cannot be imported."""
    try:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            safe = getattr(sys.flags, "safe_path", False)  # the working directory may have other modules of that name
            if not safe and "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; a console script does not
            importlib.import_module(name)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"--load {name} cannot be imported ({type(error).__name__}: {first_line(error)}); "
            "give a module such as my_package.jobs, or a file such as my_jobs.py"
        ) from error


def _import_file(path: Path) -> None:
    module_name = path.stem
    known = sys.modules.get(module_name)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # so that worker processes, which get this path, can import the module by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def _same(one: Entry, other: Entry) -> bool:
    """True if both are the same object: listed at first and then imported, or from a module that was imported again."""
    if one.module != other.module:
        return False
    targets = [entry.target for entry in (one, other) if entry.target is not None]
    return len({target.__qualname__ for target in targets}) <= 1


def _place(target: Any) -> str:
    try:
        file = inspect.getsourcefile(target)
        line = inspect.getsourcelines(target)[1]
    except (OSError, TypeError):
        return f"{target.__module__}.{target.__qualname__}"
    return f"{target.__module__}.{target.__qualname__} ({file}:{line})"
