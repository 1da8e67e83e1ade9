"""A Hugging Face model as a folder of Tinytron's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

import tinytron
from tinytron.checkpoint.files import CheckpointFiles
from tinytron.checkpoint.model import CONFIG, is_saved_model
from tinytron.errors import ConfigError
from tinytron.interop.folder import check_new, new_folder
from tinytron.interop.load import architecture_of, load_pretrained
from tinytron.model import GPT


def import_model(name: str, out: Path, dtype: torch.dtype) -> GPT:
    """Write the model ``name``, a folder or a name on the hub, to the folder ``out`` in ``dtype``, as ``--init_from`` and
    ``export`` take it: ``00000_model.pt`` and a config.json. There are no optimizer states, so nothing to resume.

    Raises: ConfigError or CheckpointError if the model cannot be had or built, or ``out`` is there; OSError if the disk
    refuses.
    """
    check_new(out)
    if is_saved_model(Path(name)):
        raise ConfigError(f"{name} is Tinytron's own already; use it with --init_from")
    model = GPT(architecture_of(name), dtype=dtype, seed=None)
    load_pretrained(model, name)
    config = {"model": dataclasses.asdict(model.config)}
    description = {"config": config, "source": name, "versions": {"tinytron": tinytron.__version__}}
    with new_folder(out) as folder:
        torch.save(model.state_dict(), CheckpointFiles(folder, 0).model)
        (folder / CONFIG).write_text(json.dumps(description, indent=2))
    return model
