"""Optional packages, and one line for what goes wrong inside them."""

from __future__ import annotations

import sys

import pytest

from tinytron.errors import ConfigError, DataError
from tinytron.utils.optional import as_data_error, require_package


def test_any_exception_becomes_one_line() -> None:
    with (
        pytest.raises(DataError, match=r"^HF_TOKENIZER=x: first second; check it$"),
        as_data_error("HF_TOKENIZER=x", "check it"),
    ):
        raise RuntimeError("first\n  second.")
    with pytest.raises(DataError, match=r"^x: RuntimeError$"), as_data_error("x"):
        raise RuntimeError
    with pytest.raises(DataError) as caught, as_data_error("x"):
        raise RuntimeError("word " * 1000)
    assert len(str(caught.value)) < 320
    with pytest.raises(ConfigError, match="as it is"), as_data_error("x"):
        raise ConfigError("as it is")


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'the package datasets is needed .*pip install "tinytron\[data\]"'):
        require_package("datasets")
