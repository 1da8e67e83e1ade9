"""Folders of Hugging Face models: local ones, or those of the hub by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tinytron.errors import ConfigError, first_line
from tinytron.interop.weights import PICKLED, SAFETENSORS


def model_folder(name: str, *, weights: bool, more: Sequence[str] = ()) -> Path:
    """The local folder ``name``, or where the hub's ``owner/model`` (or ``owner/model@revision``) is kept once the needed
    files are there: config.json, with ``weights`` those too, and as many of ``more`` as there are. Processes that ask at
    once share one download.

    Raises: ConfigError if there is no such folder or model, or the package for it is missing.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name):
        raise ConfigError(f"{name} is no folder with a model, and no name such as openai-community/gpt2")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{name} is no folder here; to fetch it: pip install huggingface_hub; or give a folder"
        ) from error
    repository, _, revision = name.partition("@")
    patterns = ["config.json", "*.index.json", "*.safetensors"] if weights else ["config.json"]
    patterns += more
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
        if weights and not any((folder / f"{SAFETENSORS}{end}").exists() for end in ("", ".index.json")):
            snapshot_download(
                repository, revision=revision or None, allow_patterns=["config.json", f"{Path(PICKLED).stem}*.bin"]
            )
    except Exception as error:  # the network, and what the hub says, come as all sorts
        raise ConfigError(
            f"{name} is no folder here, and the hub does not give it ({first_line(error)}); use a local folder"
        ) from error
    return folder
