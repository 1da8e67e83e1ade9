"""Folders of Hugging Face models: local ones, or downloads from the hub by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tinytron.errors import ConfigError, first_line
from tinytron.interop.weights import PICKLED, SAFETENSORS

_SCHEME = "hf://"
_NAME = re.compile(r"(?:hf://)?(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_FILES = (".pt", ".bin", ".safetensors", ".json")  # models on the hub are not named like this; a mistyped path may be


def is_hub_name(name: str) -> bool:
    """True if ``name`` looks like a model on the hub: ``model``, ``owner/model`` or ``hf://owner/model``, each optionally
    followed by ``@revision``."""
    return _NAME.fullmatch(name) is not None and not name.endswith(_FILES)


def model_folder(name: str, *, weights: bool, more: Sequence[str] = ()) -> Path:
    """The local folder ``name``, or the folder in the hub's cache that has the model of that name (see ``is_hub_name``)
    after a download of the needed files: config.json, the weights if ``weights``, and those of ``more`` that exist.
    Processes that ask at the same time share one download.

    A name whose first part is a local folder is taken for a mistyped path; with ``hf://`` it always refers to the hub.
    Raises: ConfigError if no such folder or model exists, or the package to download it is missing.
    """
    path = Path(name)
    if path.is_dir():
        return path
    found = _NAME.fullmatch(name)
    if path.exists() or found is None or not is_hub_name(name):
        raise ConfigError(f"{name} is neither a model folder nor a name on the hub, such as openai-community/gpt2")
    if len(path.parts) > 1 and Path(path.parts[0]).is_dir():
        raise ConfigError(
            f"{name} does not exist in the folder {path.parts[0]}; if the hub has a model of that name, use "
            f"{_SCHEME}{name}"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{name} is not a local folder; to download it from the hub: pip install huggingface_hub; or give a folder"
        ) from error
    repository, revision = found["repository"], found["revision"]
    patterns = ["config.json", "*.index.json", "*.safetensors"] if weights else ["config.json"]
    patterns += more
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
        if weights and not any((folder / f"{SAFETENSORS}{end}").exists() for end in ("", ".index.json")):
            snapshot_download(
                repository, revision=revision, allow_patterns=["config.json", f"{Path(PICKLED).stem}*.bin"]
            )
    except Exception as error:  # the network and the hub library raise many types
        raise ConfigError(
            f"{name} is not a local folder, and the hub download failed ({first_line(error)}); use a local folder"
        ) from error
    return folder
