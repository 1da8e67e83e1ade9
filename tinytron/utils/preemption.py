"""Notices that a cloud will take the machine away: a file that appears, or a URL that answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_SECONDS = 2.0
ANSWER_SECONDS = 2.0  # for a connection, and for an answer
MOST_BYTES = 100_000  # of an answer
_TOKEN_PATH = "/latest/api/token"  # of Amazon's metadata service, which refuses requests without a token
# Google's and Azure's metadata services answer only with these headers. No proxy: the address is that of this machine.
_HEADERS = {"Metadata-Flavor": "Google", "Metadata": "true"}
_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Preemption:
    """Polls ``file`` and ``url`` (``None``: not) every ``every`` seconds, in a thread of its own, and calls ``notify`` once
    with where the notice was seen. A URL that cannot be read is told to ``say`` once, and tried again."""

    def __init__(
        self,
        file: str | None,
        url: str | None,
        notify: Callable[[str], object],
        every: float = POLL_SECONDS,
        say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.file, self.url, self._notify, self._every, self._say = file, url, notify, every, say
        self._done, self._failed = threading.Event(), False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Poll in this context; without a file and a URL this does nothing."""
        if not self.file and not self.url:
            yield
            return
        self._done.clear()
        thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()  # the thread may wait for an answer; nothing waits for it

    def _watch(self) -> None:
        while not self._done.is_set():
            seen = self._seen()
            if seen and not self._done.is_set():
                self._notify(seen)
                return
            self._done.wait(self._every)

    def _seen(self) -> str:
        """Where a notice is; empty without one."""
        if self.file and Path(self.file).exists():
            return self.file
        if self.url and self._announced(self.url):
            return self.url
        return ""

    def _announced(self, url: str) -> bool:
        try:
            return is_notice(read(url))
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not self._failed:
                self._failed = True
                text = " ".join(str(error).split()) or type(error).__name__
                self._say(f"--preempt_url {url} cannot be read ({text}); trying on")
            return False


def read(url: str) -> str:
    """The answer of ``url``; empty if there is nothing (404), as at Amazon before a notice. Raises: OSError,
    http.client.HTTPException, ValueError."""
    headers = dict(_HEADERS)
    try:
        return _answer(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        if error.code != 401:
            raise
    place = urllib.request.Request(url)
    token = urllib.request.Request(
        f"{place.type}://{place.host}{_TOKEN_PATH}",
        headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
        method="PUT",
    )
    headers["X-aws-ec2-metadata-token"] = _answer(token)
    try:
        return _answer(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        raise


def is_notice(text: str) -> bool:
    """True if an answer announces the end: any text but ``FALSE`` (Google: ``TRUE``), and of a list of ``Events`` (Azure)
    one that takes the machine away."""
    text = text.strip()
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("Events"), list):
            kinds = [event.get("EventType") for event in found["Events"] if isinstance(event, dict)]
            return not {"Preempt", "Terminate"}.isdisjoint(kinds)
    return text.lower() not in ("", "false", "none")


def _answer(request: urllib.request.Request) -> str:
    with _WITHOUT_PROXY.open(request, timeout=ANSWER_SECONDS) as answer:
        data: bytes = answer.read(MOST_BYTES)
    return data.decode("utf-8", "replace")
