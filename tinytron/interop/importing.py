"""Converts a Hugging Face model to a folder in Tinytron's own format."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

import tinytron
from tinytron.checkpoint.files import CheckpointFiles
from tinytron.checkpoint.model import CONFIG, is_saved_model
from tinytron.errors import ConfigError
from tinytron.interop.folder import check_new, new_folder
from tinytron.interop.generation import GENERATION
from tinytron.interop.hub import model_folder
from tinytron.interop.load import about_ignored, architecture_of, load_pretrained
from tinytron.interop.tokenizer import TOKENIZER_FILES, files_in, imported_facts
from tinytron.model import GPT
from tinytron.text.run_tokenizer import TOKENS


def import_model(name: str, out: Path, dtype: torch.dtype, say: Callable[[str], object] = lambda text: None) -> GPT:
    """Write the model ``name``, a folder or a name on the hub, to the folder ``out`` in ``dtype``, in the form that
    ``--init_from``, ``generate`` and ``export`` read: ``00000_model.pt``, a config.json with the ids of the tokens that
    begin and end texts, the files of the tokenizer, and the generation settings. It has no optimizer state, so a run
    cannot resume from it. ``say`` gets a line about settings of the model that are left out.

    Raises: ConfigError or CheckpointError if the model cannot be read or built, or ``out`` exists; OSError if writing
    fails.
    """
    check_new(out)
    if is_saved_model(Path(name)):
        raise ConfigError(f"{name} already has Tinytron's format; use it with --init_from")
    model = GPT(architecture_of(name), dtype=dtype, seed=None)
    if ignored := load_pretrained(model, name, progress=True):
        say(f"read {name}{about_ignored(ignored)}")
    folder = model_folder(name, weights=False, more=(*TOKENIZER_FILES, GENERATION))
    config = {"model": dataclasses.asdict(model.config), TOKENS: imported_facts(folder).as_section()}
    description = {"config": config, "source": name, "versions": {"tinytron": tinytron.__version__}}
    with new_folder(out) as made:
        torch.save(model.state_dict(), CheckpointFiles(made, 0).model)
        (made / CONFIG).write_text(json.dumps(description, indent=2), encoding="utf-8")
        for path in (*files_in(folder), folder / GENERATION):
            if path.is_file():
                shutil.copyfile(path, made / path.name)
    return model
