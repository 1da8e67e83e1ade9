"""Uploads exported folders as revisions of a repository on the Hugging Face hub while training continues."""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tinytron.errors import ConfigError, first_line
from tinytron.utils.training import write_atomically

RECORD = "uploaded.json"  # next to the folders: {repository: [revision, ...]}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")  # old ones are deleted when new ones are uploaded


class HubUploader:
    """Uploads folders to ``repository`` (``owner/name``), one at a time, in a thread.

    A failed upload is reported and retried with the next ``add``, and by the next run in the same ``folder``, which has the
    record of finished uploads. ``endpoint``: another hub than huggingface.co (default: ``HF_ENDPOINT``). The access token
    comes from ``HF_TOKEN`` or ``hf auth login``.

    Raises: ConfigError, before anything is sent, for an invalid name, a missing package, or a hub that refuses access (no
    token, no permission). A hub that cannot be reached is only reported.
    """

    def __init__(self, repository: str, folder: Path, *, private: bool = True, endpoint: str | None = None) -> None:
        check_repository(repository)
        try:
            import huggingface_hub
        except ImportError as error:
            raise ConfigError(
                f"--hub_model_id {repository} needs huggingface_hub: pip install huggingface_hub; or drop the flag"
            ) from error
        self.repository, self.folder, self.private = repository, folder, private
        self._api = huggingface_hub.HfApi(endpoint=endpoint)
        self._missing: dict[str, Path] = {}  # revisions that are not uploaded yet, and their folders
        self._jobs: queue.Queue[bool] = queue.Queue()  # True: work to do; False: end the thread
        self._messages: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        try:
            self._create_repository()
        except Exception as error:  # the network and the hub library raise many types
            if getattr(error, "response", None) is not None:
                raise ConfigError(
                    f"--hub_model_id {repository}: the hub refuses access ({first_line(error)}); set HF_TOKEN to a token "
                    "with write permission, or drop the flag"
                ) from error
            self._messages.put(f"error: the hub does not answer ({first_line(error)}); uploads will be tried again")

    def add(self, folder: Path, revisions: Iterable[str]) -> None:
        """Upload ``folder`` as the head of each branch in ``revisions``, and retry what failed before. Returns at once."""
        with self._lock:
            for revision in revisions:
                self._missing[revision] = folder
                self._record(revision, present=False)
        self._jobs.put(True)
        if self._thread is None or not self._thread.is_alive():
            # A daemon: a process that dies does not wait for an upload, and the next run retries it.
            self._thread = threading.Thread(target=self._work, name=f"upload to {self.repository}", daemon=True)
            self._thread.start()

    def has(self, revision: str) -> bool:
        """True if ``revision`` has been uploaded, by this run or an earlier one in its folder."""
        return revision in self._read_record().get(self.repository, [])

    def report(self) -> list[str]:
        """Messages since the last call, for printing; does not wait."""
        messages = []
        while not self._messages.empty():
            messages.append(self._messages.get())
        return messages

    def close(self, say: Callable[[str], None], *, wait: bool) -> None:
        """Stop; with ``wait`` after everything that was added has been tried. Says what is left for the next run."""
        if wait and self._missing:
            say(f"waiting for uploads to {self.repository}")
        if self._thread is not None:
            self._jobs.put(False)
            if wait:
                self._thread.join()
            self._thread = None
        for message in self.report():
            say(message)
        if left := ", ".join(list(self._missing)):
            say(f"not uploaded to {self.repository} yet: {left}; the same command tries again")

    def _work(self) -> None:
        while self._jobs.get():
            with self._lock:
                missing = dict(self._missing)
            for revision, folder in missing.items():
                self._try(revision, folder)

    def _try(self, revision: str, folder: Path) -> None:
        try:
            self._upload(revision, folder)
        except Exception as error:  # no error here may reach the training loop
            self._messages.put(
                f"error: {folder.name} was not uploaded to {self.repository} as {revision} ({first_line(error)}); training "
                "continues, the folder stays here, and the next upload tries again"
            )
            return
        with self._lock:
            self._missing.pop(revision, None)
            self._record(revision, present=True)
        self._messages.put(f"uploaded {folder.name} to {self.repository}, revision {revision}")

    def _upload(self, revision: str, folder: Path) -> None:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they would interleave with the run's own
        self._create_repository()
        if revision != "main":
            self._api.create_branch(self.repository, branch=revision, exist_ok=True)
        self._api.upload_folder(
            repo_id=self.repository,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload {folder.name}",
            delete_patterns=list(_WEIGHTS),
        )

    def _create_repository(self) -> None:
        self._api.create_repo(self.repository, private=self.private, exist_ok=True)

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads((self.folder / RECORD).read_bytes())
        except (OSError, ValueError):  # then everything is uploaded again, and the hub skips unchanged files
            return {}
        return record if isinstance(record, dict) else {}

    def _record(self, revision: str, *, present: bool) -> None:
        record = self._read_record()
        arrived = [name for name in record.get(self.repository, []) if name != revision]
        text = json.dumps({**record, self.repository: [*arrived, revision] if present else arrived}, indent=2).encode()
        try:
            write_atomically(self.folder / RECORD, lambda file: file.write(text))
        except OSError as error:
            self._messages.put(f"error: {self.folder / RECORD} cannot be written ({error.strerror})")


def check_repository(name: str) -> None:
    """Raises: ConfigError if ``name`` is not of the form ``owner/name``."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or ".." in name or len(name) > 96:
        raise ConfigError(f"--hub_model_id {name} is not the name of a repository on the hub; use owner/name")
