"""Downloads checkpoints at URLs to the local disk before they are opened."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from tinytron.checkpoint.files import CheckpointFiles, checkpoint_of
from tinytron.checkpoint.load import read_meta
from tinytron.checkpoint.model import CONFIG
from tinytron.errors import CheckpointError
from tinytron.interop.generation import GENERATION
from tinytron.interop.tokenizer import TOKENIZER_FILES
from tinytron.utils.remote import RemoteFolder, staging_folder

_OWN, _SAFE = ".pt", ".safetensors"
_HF_WEIGHTS = (re.compile(r"model.*\.safetensors(\.index\.json)?"), re.compile(r"pytorch_model.*\.bin(\.index\.json)?"))
_MOST_NAMES = 3  # listed in an error


def fetch_checkpoint(url: str, say: Callable[[str], object] = lambda text: None) -> Path:
    """Download what ``url`` names: the newest checkpoint of a run folder, one weights file, or a Hugging Face folder (such
    as an export). Only weights and the files that describe them are downloaded, not optimizer state. Returns the local
    weights file or folder; ``say`` gets a line before the download.

    A file that was downloaded before is kept only if the checkpoint's record has its SHA-256, because a run that started
    over writes files with the same names and sizes. Raises: CheckpointError if ``url`` has no checkpoint; ConfigError and
    StorageError as ``RemoteFolder``.
    """
    place, _, last = url.rstrip("/").rpartition("/")
    folder, file = (place, last) if last.endswith((_OWN, _SAFE)) else (url.rstrip("/"), "")
    if (named := checkpoint_of(Path(file))) is not None:
        file = named.model.name
    remote = RemoteFolder(folder)
    below = remote.list()
    present = [name for name in below if "/" not in name]
    if file and file not in present:
        raise CheckpointError(f"{url} does not exist; name a run folder, or one of its weights files (00100_model.pt)")
    if (weights := file or _newest(present)).endswith(_OWN):
        say(f"fetching {weights} from {folder}")
        return _fetch_weights(remote, weights, present)
    shards = next(filter(None, ([name for name in present if form.fullmatch(name)] for form in _HF_WEIGHTS)), [])
    if CONFIG not in present or not shards:
        raise CheckpointError(f"{url} has no checkpoint{_folders(below)}; name a run folder, or a Hugging Face folder")
    say(f"fetching the model in {folder}")
    local = _pull_again(remote, {*_descriptions(present), *shards, *([file] if file else [])})
    return local / file if file else local


def _fetch_weights(remote: RemoteFolder, weights: str, present: list[str]) -> Path:
    """One weights file of Tinytron's own, with the files that describe it and, for a checkpoint, its record."""
    step = checkpoint_of(Path(weights))
    record = step.meta.name if step is not None and step.meta.name in present else None
    local = _pull_again(remote, {*_descriptions(present), *([record] if record else [])})
    sums = read_meta(local / record).files if record else {}
    if weights not in sums:
        return _pull_again(remote, {weights}) / weights
    remote.pull([weights], local, {weights: sums[weights]["sha256"]})
    return local / weights


def _descriptions(present: Iterable[str]) -> set[str]:
    return {CONFIG, GENERATION, *TOKENIZER_FILES}.intersection(present)


def _newest(present: Iterable[str]) -> str:
    """The weights of the newest complete checkpoint, or else of the newest one without a record; empty if there is none."""
    steps = [files for name in present if (files := checkpoint_of(Path(name))) is not None and name == files.model.name]

    def rank(files: CheckpointFiles) -> tuple[bool, int]:
        return files.meta.name in present, files.step

    return max(steps, key=rank).model.name if steps else ""


def _pull_again(remote: RemoteFolder, names: Iterable[str]) -> Path:
    """Download ``names`` even if local files have the same sizes. Returns their folder."""
    local = staging_folder(remote.url)
    for name in names:
        (local / name).unlink(missing_ok=True)
    remote.pull(sorted(names), local)
    return local


def _folders(names: Iterable[str]) -> str:
    """The folders among ``names``, as part of an error message."""
    found = sorted({name.partition("/")[0] for name in names if "/" in name})
    more = ", ..." if len(found) > _MOST_NAMES else ""
    return f" itself, but has the folders {', '.join(found[:_MOST_NAMES])}{more}" if found else ""
