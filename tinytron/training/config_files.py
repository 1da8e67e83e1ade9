"""Configurations as files: ``--config FILE`` reads them, ``--print_config`` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinytron.errors import ConfigError, first_line
from tinytron.text.run_tokenizer import TOKENS
from tinytron.training.config import Config
from tinytron.utils.flags import FieldInfo, config_fields, nearest
from tinytron.utils.optional import require_package
from tinytron.utils.paths import user_path

PRESET = "preset"  # names a set of options (presets.py), but is not an option itself
_ABOUT = {"config_hash", TOKENS}  # describe a run or a printed configuration; not options
_PRINT_AND_STOP = {"print_config", "dry_run"}  # no run with a config.json had these set


def options_in(file: str, sections: Mapping[str, type], usual: Mapping[str, str]) -> dict[str, Any]:
    """The options by name in a JSON or YAML ``file``: options by section, options alone, or the config.json of a run.
    ``usual`` maps names in other programs to Tinytron's. Raises: ConfigError naming the file and what is wrong in it."""
    content = _content(user_path(file), file)
    of_run = isinstance(content.get("config"), dict)
    fields = {name: {info.name: info for info in config_fields(cls)} for name, cls in sections.items()}
    known = {name: info for infos in fields.values() for name, info in infos.items()}
    found: dict[str, Any] = {}
    for key, value in (content["config"] if of_run else content).items():
        if key in _ABOUT:
            continue
        if key == PRESET:
            if not isinstance(value, str):
                raise ConfigError(f"--config {file}: preset must be a name, not {json.dumps(value)}; use preset: tiny")
            found[PRESET] = value
        elif key in fields and (value is None or isinstance(value, dict)):
            for name, inner in (value or {}).items():  # None: all lines of the section are comments
                if name == PRESET:
                    raise ConfigError(f"--config {file}: preset is not an option of {key}; put it outside the sections")
                if name in known and name not in fields[key]:
                    home = next(section for section, infos in fields.items() if name in infos)
                    raise ConfigError(f"--config {file}: {name} is not an option of {key}; it belongs to {home}")
                if not (of_run and name in _PRINT_AND_STOP):
                    found[name] = _checked(file, name, inner, fields[key], f" in {key}", usual)
        elif isinstance(value, dict) and key not in known:
            raise ConfigError(f"--config {file}: there is no section {key}{nearest(key, fields)}")
        else:
            found[str(key)] = _checked(file, key, value, known, "", usual)
    resolved = of_run or "config_hash" in content
    if resolved and found.get("init_from") is None and found.get("block_size") == found.get("seq_len"):
        found.pop("block_size", None)  # it was derived from seq_len, which a flag may change
    return found


def _content(path: Path, file: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read ({first_line(error)}); give a JSON or YAML file") from error
    try:
        content = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--config {file} is not valid {path.suffix or 'YAML'} ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} has no options; write lines such as max_lr: 0.001")
    return content


def _yaml(text: str) -> Any:
    try:
        return json.loads(text)  # JSON is also YAML
    except ValueError:
        pass
    yaml = require_package("yaml", "config")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _checked(
    file: str, name: Any, value: Any, known: Mapping[str, FieldInfo], where: str, usual: Mapping[str, str]
) -> Any:
    if (info := known.get(name)) is None:
        hint = f"; it is {usual[f'--{name}']} here" if f"--{name}" in usual else nearest(str(name), known)
        raise ConfigError(f"--config {file}: there is no option {name}{where}{hint}")
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value)):
        raise ConfigError(f"--config {file}: {name} must be a single value or a list of them, not {json.dumps(value)}")
    if value is None and not info.optional:
        raise ConfigError(f"--config {file}: {name} must not be empty; its default is {info.default}")
    if isinstance(value, bool) and info.type is not bool:
        raise ConfigError(f"--config {file}: {name} must not be {str(value).lower()}; its default is {info.default}")
    return value


def words_of(options: Mapping[str, Any]) -> list[str]:
    """The command line equivalent to ``options``; ``None`` means the default for options that allow it."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(_word, value)]
        elif value is not None:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else str(value)


def as_json(config: Config) -> str:
    """The resolved configuration by section, with the hash that names the run's folder."""
    return json.dumps({"config_hash": config.config_hash(), **config.as_dict()}, indent=2)


def as_yaml(config: Config) -> str:
    """The configuration as YAML, with a comment for every option."""
    lines = [
        "# Read this file with --config FILE.",
        f'config_hash: "{config.config_hash()}"  # of the run as configured',
    ]
    for name, section in config:
        lines += ["", f"{name}:"]
        for info in config_fields(type(section)):
            lines.append(f"  {info.name}: {json.dumps(getattr(section, info.name))}  # {info.flag.text}")
    return "\n".join(lines)
