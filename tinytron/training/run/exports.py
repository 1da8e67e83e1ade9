"""Exports and uploads of a run's checkpoints, for ``--export_every`` and ``--hub_model_id`` (docs/interop.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch.nn as nn

from tinytron.checkpoint import CheckpointFiles, Mirror
from tinytron.distributed.agreement import agree_slowly
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError, first_line
from tinytron.interop import HubUploader, check_repository, write_architecture
from tinytron.interop.causal_lm import CausalLM
from tinytron.interop.export import export
from tinytron.interop.folder import remove_leftovers
from tinytron.interop.mup import folded_config
from tinytron.interop.tokenizer import tokenizer_of_data
from tinytron.model.protocols import require_gpt
from tinytron.training.config import Config
from tinytron.training.hf_model import foreign_model
from tinytron.utils.training import write_atomically

FOLDER = "export"  # in the run's folder
OWNER = "exported_by.json"  # in --export_dir: {"run": path of the run's folder}
_STEP = re.compile(r"step_?(\d+)")


def check_exportable(config: Config) -> None:
    """Raises: ConfigError if ``--export_every`` cannot express this architecture, or ``--hub_model_id`` is not a valid
    name. Called when a run is built, because it tries all families of models."""
    ckpt = config.ckpt
    if ckpt.hub_model_id is not None:
        check_repository(ckpt.hub_model_id)
    if not ckpt.export_every or foreign_model(config) is not None:
        return
    try:
        write_architecture(folded_config(config.model))
    except ConfigError as error:
        raise ConfigError(f"--export_every {ckpt.export_every}: {error}") from error


def claim_folder(config: Config, run_folder: Path) -> None:
    """Make ``--export_dir`` the folder of this run's exports. Raises: ConfigError if it has those of another run, or
    cannot be written."""
    name = config.ckpt.export_dir
    folder, run = Path(str(name)), str(run_folder.resolve())
    exports = [path.name for path in folder.glob("step*") if _STEP.fullmatch(path.name)]
    try:
        owner = json.loads((folder / OWNER).read_bytes()).get("run")
    except (OSError, ValueError, AttributeError):
        owner = None
    if exports and (owner != run or not config.ckpt.resume):
        whose = "an earlier run" if owner in (None, run) else owner
        raise ConfigError(
            f"--export_dir {name} has {min(exports)} of {whose}; use another folder, such as --export_dir {name}_2, or "
            "move the exports away"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / OWNER, lambda file: file.write(json.dumps({"run": run}).encode()))
    except OSError as error:
        raise ConfigError(f"--export_dir {name} cannot be written ({error.strerror}); use another folder") from error


class Exports:
    """Exports every checkpoint that is due to ``export/step_<step>`` in the run's folder, or to ``step<step>`` in
    ``--export_dir``, and uploads it as the revision ``step<step>``; the last one also becomes ``main``. Exists on the
    master, where it is the ``Consumer`` of saves.

    A checkpoint is kept whatever happens here: failures are only reported. Raises: ConfigError if ``--export_dir`` has
    exports of another run.
    """

    def __init__(self, config: Config, run_folder: Path, last_step: int, mirror: Mirror | None) -> None:
        self.config, self.last_step, self.mirror = config, last_step, mirror
        self.run_folder, self.folder = run_folder, run_folder / FOLDER
        if config.ckpt.export_dir is not None:
            claim_folder(config, run_folder)
            self.folder, self.mirror = Path(config.ckpt.export_dir), None  # the mirror copies the run's folder
        self.uploader: HubUploader | None = None
        if (repository := config.ckpt.hub_model_id) is not None:
            self.uploader = HubUploader(repository, self.folder, private=config.ckpt.hub_private)

    def catch_up(self, resumed: CheckpointFiles | None) -> list[str]:
        """Finish what a killed process left: delete half-written folders, export the checkpoint that the run resumes from
        if it should have been exported, and upload folders that the hub does not have. Returns lines to print."""
        notes = []
        try:
            self.folder.mkdir(exist_ok=True)
            remove_leftovers(self.folder)
        except OSError as error:
            notes.append(f"error: {self.folder} cannot be written ({error.strerror})")
        if resumed is not None and not self._out(resumed.step).is_dir() and (note := self.committed(resumed)):
            notes.append(f"step {resumed.step} | {note.removeprefix('; ')}")
        for path in sorted(self.folder.glob("step*")):
            if match := _STEP.fullmatch(path.name):
                self._upload(int(match[1]), again=False)
        return notes

    def committed(self, files: CheckpointFiles) -> str:
        """Export ``files`` if that is due; returns a text to append to the report."""
        if files.step % self.config.ckpt.export_every and files.step != self.last_step:
            return ""
        if files.step == 0 and not self.config.ckpt.save_at_start:  # only for --spike_action rollback
            return ""
        out = self._out(files.step)
        try:
            hub, last = self.config.ckpt.hub_model_id, files.step == self.last_step
            revision = None if hub is None or last else f"step{files.step}"
            made = export(files.model, out, name=hub, revision=revision, replace=True)
            files_out = sorted(out.iterdir())
        except Exception as error:  # a failed export must not end a run of weeks
            return f"; error: not exported to {out} ({first_line(error)}), the checkpoint is complete"
        if self.mirror is not None:
            self.mirror.push_files([str(path.relative_to(self.run_folder)) for path in files_out])
        self._upload(files.step, again=True)
        changes = "".join(f"; {line}" for line in made.changes)
        return f"; exported to {out}{changes}"

    def report(self) -> list[str]:
        """Messages about uploads that have ended."""
        return self.uploader.report() if self.uploader is not None else []

    def close(self, say: Callable[[str], None], *, wait: bool) -> None:
        """Stop after the last checkpoint. ``wait`` for the uploads."""
        if self.uploader is not None:
            self.uploader.close(say, wait=wait)

    def _out(self, step: int) -> Path:
        return self.folder / (f"step_{step:05d}" if self.config.ckpt.export_dir is None else f"step{step}")

    def _upload(self, step: int, *, again: bool) -> None:
        if self.uploader is None:
            return
        revisions = [f"step{step}", "main"] if step == self.last_step else [f"step{step}"]
        if revisions := [name for name in revisions if again or not self.uploader.has(name)]:
            self.uploader.add(self._out(step), revisions)


def build_exports(
    config: Config,
    model: nn.Module,
    run_folder: Path,
    state: ParallelState,
    mirror: Mirror | None,
    *,
    resumed: int,
    last: int,
    say: Callable[[str], None],
) -> Exports | None:
    """The run's ``Exports`` on the master, ``None`` on other ranks and without ``--export_every``. Collective. Work that an
    earlier process left is finished.

    Raises: ConfigError on every rank if the model or its tokenizer cannot be exported, or the hub refuses access.
    """
    ckpt, world = config.ckpt, state.groups["world"]
    if not ckpt.export_every or config.train.debug:
        return None
    if not isinstance(model, CausalLM):
        require_gpt(model, f"--export_every {ckpt.export_every} exports", "use --export_every 0")

    def build() -> Exports | None:
        if not state.is_master:
            return None
        tokenizer_of_data(config.data.dataset_path, config.model.vocab_size)
        exports, files = Exports(config, run_folder, last, mirror), CheckpointFiles(run_folder, resumed)
        for note in exports.catch_up(files if files.complete else None):
            say(note)
        return exports

    return agree_slowly(build, world)
