"""The report in one file and the pictures: complete, self-contained, and safe whatever a log holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from tests.helpers.run_folders import HOSTILE, make_run, records
from tinytron.errors import ConfigError
from tinytron.observe.figures import save_figures, smoothed
from tinytron.observe.folder import open_folder
from tinytron.observe.report import embedded, report
from tinytron.observe.run import Run


def read(folder: Path, name: str = "run") -> Run:
    run = Run(open_folder(str(folder)), name)
    run.refresh()
    return run


@pytest.fixture
def hostile(tmp_path: Path) -> Run:
    entries = records(30)
    entries[0] |= {HOSTILE: 1.0, "sample": HOSTILE}
    entries[1]["loss"] = "nan"
    return read(make_run(tmp_path / "run", entries, seed=HOSTILE), HOSTILE)


def test_the_data_is_that_of_the_page_and_cannot_leave_its_element(hostile: Run) -> None:
    text = report([hostile], now=0)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert not set("<>&") & set(data)
    found = json.loads(data)
    assert found["written"] == "1970-01-01 00:00 UTC"
    (run,) = found["runs"]
    run["summary"].pop("age")
    expected = json.loads(json.dumps(hostile.payload()))
    expected["summary"].pop("age")
    assert run == expected
    assert run["name"] == HOSTILE
    assert run["texts"][0]["text"] == HOSTILE
    assert "window.pwned" not in text.replace(data, "")


def test_the_report_loads_nothing_and_runs_only_its_own_scripts(hostile: Run) -> None:
    text = report([hostile])
    assert re.findall(r"<(?:link|img|iframe|script)[^>]*(?:src|href)=\"(?!data:)([^\"]*)\"", text) == []
    assert "@import" not in text
    assert "url(" not in text
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#x27;", "'")  # type: ignore[index]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 3
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    assert f"script-src {allowed};" in policy
    assert policy.startswith("default-src 'none'; ")
    assert text.count("<style>") == 2
    assert text.rstrip().endswith("</html>")


def test_any_text_survives_embedding() -> None:
    value = {HOSTILE: ["]]>", "<!--", "\u2029", None, 1.5]}
    assert json.loads(embedded(value)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded(float("nan"))


@pytest.mark.parametrize("ending", [".png", ".pdf", ".svg"])
def test_pictures(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [read(make_run(tmp_path / name, records(40)), name) for name in ("one", "two")]
    out = tmp_path / f"picture{ending}"
    save_figures(runs, out)
    content = out.read_bytes()
    assert content.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[ending])
    save_figures(runs, out, ["perplexity"])
    assert out.read_bytes() != content


def test_a_picture_without_its_curve(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "one", records(5)), "one")
    text = (
        "^--curves los is not in the logs; did you mean loss\\?; use any of grad_norm, loss, lr, mfu, skipped_steps, "
        "tokens_per_second$"
    )
    with pytest.raises(ConfigError, match=text):
        save_figures([run], tmp_path / "x.png", ["los"])
    empty = read(make_run(tmp_path / "two", []), "two")
    with pytest.raises(ConfigError, match=r"^two has no curves yet; wait for its first report \(--log_every\)$"):
        save_figures([empty], tmp_path / "x.png")


def test_smoothing_is_right_from_the_start() -> None:
    import numpy as np

    assert smoothed(np.array([2.0, np.nan, 2.0, 2.0]))[[0, 2, 3]].tolist() == pytest.approx([2, 2, 2])
    weights = np.array([0.81, 0.9, 1.0])
    assert smoothed(np.array([1.0, 2.0, 4.0]))[2] == pytest.approx((weights @ [1, 2, 4]) / weights.sum())
