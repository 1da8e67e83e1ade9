"""The data that ``tinytron evaluate --data`` measures: each path, or each source of a mixture, made local."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinytron.data.mixture_file import read_mixture
from tinytron.data.remote import fetch_shards, local_dataset_path
from tinytron.data.shards import find_shards
from tinytron.errors import ConfigError, DataError
from tinytron.text.sources import SUFFIXES
from tinytron.utils.remote import RemoteFolder, is_remote, staging_folder

Say = Callable[[str], object]


@dataclass(frozen=True)
class DataSource:
    """Data with its own loss: its ``name`` in the results, its ``path`` as the user wrote it, the ``local`` folder, pattern
    or file, and the ``split`` of its token shards (``train`` or ``val``; ``None`` for a text file)."""

    name: str
    path: str
    local: str
    split: str | None


@dataclass(frozen=True)
class Measured:
    """All ``sources``, and the names of a mixture's sources without validation shards (``left_out``). ``several`` is true
    if there may be more than one source: then each has a row in the results."""

    sources: tuple[DataSource, ...]
    left_out: tuple[str, ...]
    several: bool


def data_sources(paths: Sequence[str], say: Say = lambda text: None) -> Measured:
    """The data that ``paths`` (``--data``) name: folders or patterns of token shards, text files, mixture files, or URLs of
    the first two, which are downloaded first (``say`` gets a line). Token shards are measured on their validation split, or
    on the training split if they have no validation split.

    A mixture is measured as the trainer validates: on the sources that have validation shards. A mixture without any is
    measured on the training shards of all its sources. Raises: DataError for missing data; ConfigError for a damaged
    mixture file or a path given twice; StorageError for a URL that cannot be read.
    """
    sources: list[DataSource] = []
    left_out: list[str] = []
    with _about_data():
        for path in paths:
            if path.endswith(".json"):
                prefix = "" if len(paths) == 1 else f"{path}:"
                measured, without = _of_mixture(path, prefix, say)
                sources += measured
                left_out += without
            else:
                local = _local(path, say)
                sources.append(DataSource(path, path, local, None if _is_texts(local) else _split(local)))
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--data has {min(twice)} twice, and results go by that name; give it once")
    return Measured(tuple(sources), tuple(left_out), len(paths) > 1 or paths[0].endswith(".json"))


def _of_mixture(path: str, prefix: str, say: Say) -> tuple[list[DataSource], list[str]]:
    """The sources of a mixture file that are measured, and the names of those that are not."""
    mixture = read_mixture(path.removeprefix("file://"))
    places = {source.name: (source.path, _local(source.path, say)) for source in mixture.sources}
    validated = {name for name, (_, local) in places.items() if find_shards(local, "val")}
    measured = [
        DataSource(f"{prefix}{name}", path, local, "val" if validated else _split(local))
        for name, (path, local) in places.items()
        if name in validated or not validated
    ]
    return measured, [f"{prefix}{name}" for name in places if validated and name not in validated]


def _split(local: str) -> str:
    """The split to measure. Raises: DataError if no shard is found."""
    if find_shards(local, "val"):
        return "val"
    find_shards(local, "train")
    return "train"


def _is_texts(local: str) -> bool:
    """True for a file that is not a token shard."""
    path = Path(local)
    return path.is_file() and path.suffix != ".bin"


def _local(path: str, say: Say) -> str:
    """Local path of ``path``, which is downloaded if it is remote."""
    if not is_remote(path):
        return path.removeprefix("file://")
    say(f"fetching {path}")
    folder, _, name = path.rpartition("/")
    if not name.endswith(SUFFIXES):
        fetch_shards(path)
        return local_dataset_path(path)
    local = staging_folder(folder)
    (local / name).unlink(missing_ok=True)  # it may have changed without changing its size
    RemoteFolder(folder).pull([name], local)
    return str(local / name)


@contextlib.contextmanager
def _about_data() -> Iterator[None]:
    """Make errors of the data layer name the flag of ``tinytron evaluate``."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(str(error).replace("--dataset_path", "--data")) from error
