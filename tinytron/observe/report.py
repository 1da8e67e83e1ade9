"""A report of runs as one HTML file: the page with the data inside, which opens without a server and without a network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import time
from collections.abc import Sequence
from typing import Any

from tinytron.observe.run import Run
from tinytron.observe.server import PAGE

STYLES = ("vendor/uPlot.min.css", "style.css")
SCRIPTS = ("vendor/uPlot.iife.min.js", "charts.js", "app.js")
HEAD, FOOT = "<!-- head -->", "<!-- scripts -->"


def report(runs: Sequence[Run], now: float | None = None) -> str:
    """The report of ``runs`` (refreshed by the caller) as HTML."""
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    data = {"runs": [run.payload() for run in runs], "written": written}
    page = _read("index.html")
    scripts = [_read(name).replace("</script", "<\\/script") for name in SCRIPTS]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">']
    head += [f"<style>\n{_read(name)}</style>" for name in STYLES]
    foot = [f'<script type="application/json" id="data">{embedded(data)}</script>']
    foot += [f"<script>{script}</script>" for script in scripts]
    before, _, rest = page.partition(HEAD)
    _, _, rest = rest.partition(HEAD)
    body, _, rest = rest.partition(FOOT)
    _, _, after = rest.partition(FOOT)
    return "".join([before, "\n".join(head), body, "\n".join(foot), after])


def embedded(data: Any) -> str:
    """``data`` as JSON that cannot end or change the script element around it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
