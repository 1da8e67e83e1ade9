"""The files of a tokenizer that go with exported weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytron.data.manifest import TOKENIZER
from tinytron.errors import ConfigError, DataError
from tinytron.text.run_tokenizer import tokenizers_of_data

# What transformers may look for in a folder; ``vocab.json`` and ``merges.txt`` make old tokenizers.
_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """Files to copy, and the token that ends a document, where that is known; ``begins``: it stands before every document
    too."""

    files: tuple[Path, ...]
    eot_id: int | None = None
    eot_token: str | None = None
    begins: bool = False

    def write(self, out: Path, block_size: int) -> None:
        """Copy the files to ``out``; a bare tokenizer.json gets the configuration that transformers needs beside it.
        Raises: OSError."""
        for path in self.files:
            shutil.copyfile(path, out / path.name)
        if [path.name for path in self.files] != [TOKENIZER]:
            return
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
        config["clean_up_tokenization_spaces"] = False
        if self.eot_token is not None:
            config["eos_token"] = self.eot_token
            config |= {"bos_token": self.eot_token} if self.begins else {}
        (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def given_tokenizer(path: Path, vocab_size: int) -> TokenizerFiles:
    """Those of ``--tokenizer path``: a tokenizer.json, or a folder that transformers opens. Raises: ConfigError if there is
    none, or it has ids that the model does not."""
    files = (path,) if path.is_file() else tuple(path / name for name in _FILES if (path / name).is_file())
    if not files or (path.is_file() and path.name != TOKENIZER):
        raise ConfigError(f"--tokenizer {path} is neither a {TOKENIZER} nor a folder with a tokenizer's files")
    _check(files, vocab_size, f"--tokenizer {path}")
    return TokenizerFiles(files)


def tokenizer_of_data(dataset_path: str | None, vocab_size: int) -> TokenizerFiles:
    """That of the token shards a run was trained on (of the first folder of a mixture that has one), as far as it is known
    and still there.

    Raises: ConfigError if it has ids that the model does not.
    """
    try:
        found = tokenizers_of_data(dataset_path)
        facts = found.facts()
    except (ConfigError, DataError):  # the weights do not depend on data that is gone or damaged
        return TokenizerFiles(())
    files = found.files[:1]
    _check(files, vocab_size, f"the tokenizer of {dataset_path}")
    if facts is None:
        return TokenizerFiles(files)
    return TokenizerFiles(files, facts.eot_id, facts.eot_token, begins=facts.eot_position == "prepend")


def _check(files: tuple[Path, ...], vocab_size: int, what: str) -> None:
    for path in files:
        if path.name == TOKENIZER and (largest := _largest_id(path, what)) >= vocab_size:
            raise ConfigError(
                f"{what} has ids up to {largest}, the model {vocab_size} tokens; use the one it was trained with"
            )


def _largest_id(path: Path, what: str) -> int:
    try:
        content = json.loads(path.read_bytes())
        vocab = content["model"]["vocab"]
        known = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids = [*known, *(token["id"] for token in content.get("added_tokens") or [])]
        return max(int(number) for number in ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{what} cannot be read ({type(error).__name__}: {error})") from error
