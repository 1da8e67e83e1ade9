"""Optional packages, and one-line errors for exceptions inside them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from tinytron.errors import ConfigError, DataError, TinytronError


def require_package(name: str, extra: str = "data") -> Any:
    """Import an optional package. Raises: ConfigError with the command that installs it, using our ``extra``."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f'the package {name.partition(".")[0]} is needed ({error}); run: pip install "tinytron[{extra}]"'
        ) from error


@contextlib.contextmanager
def as_data_error(where: str, advice: str = "") -> Iterator[None]:
    """Context that turns any exception of a third-party library into a one-line DataError, which starts with ``where`` and
    ends with ``advice``."""
    try:
        yield
    except TinytronError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        shown = text if len(text) <= 300 else text[:297] + "..."
        raise DataError(f"{where}: {shown.rstrip('.') or type(error).__name__}{advice and f'; {advice}'}") from error
