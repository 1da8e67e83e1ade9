"""A Hugging Face model as a folder of Tinytron's own."""

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
    """Write the model ``name``, a folder or a name on the hub, to the folder ``out`` in ``dtype``, as ``--init_from``,
    ``generate`` and ``export`` take it: ``00000_model.pt``, a config.json, which keeps the ids of the tokens that begin and
    end texts, the files of the tokenizer, and the settings of generation. Optimizer states are not among them, so a run
    cannot resume from it. What is left out of the model's configuration is said.

    Raises: ConfigError or CheckpointError if the model cannot be had or built, or ``out`` is there; OSError if the disk
    refuses.
    """
    check_new(out)
    if is_saved_model(Path(name)):
        raise ConfigError(f"{name} is Tinytron's own already; use it with --init_from")
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
