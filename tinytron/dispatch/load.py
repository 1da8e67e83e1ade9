"""``--load`` of a job that runs elsewhere: what was imported here has to be in the code, or installed there."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tinytron.dispatch.ship import Shipment
from tinytron.errors import ConfigError


def located(load: Sequence[str], shipment: Shipment, path: str) -> tuple[str, ...]:
    """``load`` as the host finds it: modules by their names, and ``.py`` files by their paths in the code. The modules are
    imported already; ``path`` is PYTHONPATH here. Raises: ConfigError for what the host would not find."""
    return tuple(_file(name, shipment) if name.endswith(".py") else _module(name, shipment, path) for name in load)


def _file(name: str, shipment: Shipment) -> str:
    path = Path(name).resolve()
    if not path.is_relative_to(shipment.top):
        raise ConfigError(
            f"--load {name} is outside of {shipment.top}, which is all that is sent; copy it into this repository and git "
            "add it, or install it as a module here and on the host"
        )
    return _sent(name, path, shipment)


def _module(name: str, shipment: Shipment, path: str) -> str:
    file = getattr(sys.modules[name], "__file__", None)
    if file is None or any(Path(file).is_relative_to(place) for place in sysconfig.get_paths().values()):
        return name  # installed, if need be in a folder of the repository
    for place in (os.curdir, *path.split(os.pathsep)):
        folder = Path(place).resolve()
        inner = folder.joinpath(*name.split("."))
        if Path(file).resolve() not in (inner.with_suffix(".py"), inner / "__init__.py"):
            continue
        if not folder.is_relative_to(shipment.top):
            raise ConfigError(
                f"--load {name} is {file}, found by PYTHONPATH, but only {shipment.top} is sent; copy it into this "
                "repository and git add it, or install it here and on the host"
            )
        sent = _sent(name, Path(file).resolve(), shipment)
        if folder in (shipment.top, shipment.top / "src"):  # PYTHONPATH there
            return name
        if "." not in name and inner.with_suffix(".py").is_file():
            return sent
        dotted = ".".join((*folder.relative_to(shipment.top).parts, name))
        raise ConfigError(
            f"--load {name} is {sent}, but the host looks for modules from the top of the repository; run this in "
            f"{shipment.top}, with --load {dotted}"
        )
    return name


def _sent(name: str, path: Path, shipment: Shipment) -> str:
    """``path`` in the code. Raises: ConfigError if it is not part of it."""
    relative = path.relative_to(shipment.top).as_posix()
    if relative not in shipment.names:
        raise ConfigError(
            f"--load {name} is {path}, which is not part of the code that is sent; git add it, and commit it or use --dirty"
        )
    return relative
