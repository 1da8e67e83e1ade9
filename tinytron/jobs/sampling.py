"""``training.dataset``: the data of a training job as a list of what the tokenizing jobs made, with rates and styles.

    training:
      dataset:
        - {name: fineweb, rate: 0.7, style: PMD}
        - {name: alpaca, rate: 0.3, style: PADDED, suffix: chat}

It becomes a mixture file (``tinytron.data.mixture_file``) in the job's folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tinytron.config import Option
from tinytron.data.manifest import Manifest, read_manifest
from tinytron.errors import ConfigError, DataError
from tinytron.jobs.places import folder_of_shards, name_of_data
from tinytron.utils.flags import Flag, nearest
from tinytron.utils.training import appears_whole

PATH = "training.dataset"
OPTION = Option(
    PATH, "dataset", "TrainingJob", list | None, None,
    Flag("data sets of the tokenizing jobs to mix, instead of data.dataset_path: name, rate, style, suffix"),
)  # fmt: skip
FILE = "mixture.json"
STYLES = ("PADDED", "PMD", "CONTRASTIVE")
_KEYS = ("name", "rate", "weight", "style", "suffix")
_WORKS = "use [{name: fineweb, rate: 0.7, style: PMD}, {name: alpaca, rate: 0.3, style: PADDED}]"
_TOLERANCE = Fraction(1, 10**6)  # the sum of the rates may be off by this, for thirds


@dataclass(frozen=True)
class Sampling:
    """One entry: the ``name`` of its source in logs, the ``folder`` of its shards, its part of the samples (``rate``), and
    its ``style``, if that is given."""

    name: str
    folder: Path
    rate: float
    style: str | None

    def check(self) -> None:
        """Check that the shards have the form of the style. Raises: ConfigError, DataError."""
        manifest = read_manifest(self.folder) if self.folder.is_dir() else None
        if manifest is None:
            raise DataError(
                f"{PATH}: {self.folder} has no token shards for {self.name}; make them with a job such as "
                "data/tokenize_variable_dataset, or give the path of a folder with shards (and a /) as the name"
            )
        found = style_of(manifest)
        if self.style is not None and self.style != found:
            raise ConfigError(
                f"{PATH}: the style of {self.name} is {self.style}, but {self.folder} has {_FORMS[found]}; use {found}, or "
                f"tokenize with data/tokenize_{_JOBS[self.style]}_dataset"
            )


_FORMS = {"PADDED": "rows of one length", "PMD": "a stream of documents", "CONTRASTIVE": "pairs"}
_JOBS = {"PADDED": "blockwise", "PMD": "variable", "CONTRASTIVE": "contrastive"}


def style_of(manifest: Manifest) -> str:
    """The style of a folder of shards: rows as they are, samples cut from a stream, or pairs."""
    if manifest.paired:
        return "CONTRASTIVE"
    return "PMD" if manifest.row is None else "PADDED"


def read_sampling(value: Any, root: Path, *, reads_pairs: bool) -> list[Sampling]:
    """The entries of ``training.dataset``. ``root`` is the output folder, and ``reads_pairs`` says that the trainer can use
    pairs. Raises: ConfigError."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{PATH}={value} must be a list of data sets; {_WORKS}")
    found = [_entry(entry, f"{PATH}[{number}]", root) for number, entry in enumerate(value)]
    for number, one in enumerate(found):
        if one.name in (other.name for other in found[:number]):
            raise ConfigError(f"{PATH}[{number}]: {one.name} is given twice; add up the rates, or give another suffix")
        if one.style == "CONTRASTIVE" and not reads_pairs:
            raise ConfigError(
                f"{PATH}[{number}]: {one.name} has the style CONTRASTIVE, which only a trainer that reads pairs can use; "
                "use PADDED or PMD for this job"
            )
    total = sum((Fraction(str(one.rate)) for one in found), Fraction(0))
    if abs(total - 1) > _TOLERANCE:
        raise ConfigError(
            f"{PATH}: the rates sum to {float(total):.6g}, but must sum to 1; for the same proportions use "
            f"{', '.join(f'{one.rate / float(total):.6g}' for one in found)}"
        )
    return found


def _entry(entry: Any, where: str, root: Path) -> Sampling:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}={entry} must be a data set; {_WORKS}")
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(f"{where} has no key {key}{nearest(str(key), _KEYS) or f'; use {_WORKS}'}")
    name, suffix, style = entry.get("name"), entry.get("suffix") or "", entry.get("style")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}.name={name} must be the name of a tokenized data set, or a path; {_WORKS}")
    if not isinstance(suffix, str):
        raise ConfigError(f"{where}.suffix={suffix} must be text, such as chat")
    if style is not None and style not in STYLES:
        raise ConfigError(f"{where}.style={style} must be one of {', '.join(STYLES)}")
    if "rate" in entry and "weight" in entry:
        raise ConfigError(f"{where} has rate and weight, which are one option; give one of them")
    rate = entry.get("rate", entry.get("weight"))
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise ConfigError(f"{where}.rate={rate} must be above 0 and at most 1; {_WORKS}")
    if "/" in name and suffix:
        raise ConfigError(f"{where}.suffix={suffix} does not go with the path {name}; put it into the path")
    folder = Path(name) if "/" in name else folder_of_shards(root, name, suffix)
    return Sampling(name_of_data(name, suffix), folder.absolute(), rate, style)


def write_mixture(entries: list[Sampling], folder: Path) -> Path:
    """Write the mixture file of the ``entries`` to ``folder``; returns its path. All processes of a job may do so."""
    path = folder / FILE
    sources = [{"name": one.name, "path": str(one.folder), "weight": one.rate} for one in entries]
    text = json.dumps({"sources": sources}, indent=2) + "\n"
    with appears_whole(path, f".{os.getpid()}.tmp") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
