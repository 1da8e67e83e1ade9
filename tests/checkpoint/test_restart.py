"""Workers that die are started again by torchrun and go on from the checkpoint by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import TINY, run_well

FLAGS: tuple[object, ...] = (*TINY, "--max_steps", 8, "--save_every_steps", 3, "--log_every", 1, "--log_dir", "log")
# Rank 1 kills itself once, after the fifth step, when checkpoint 3 is complete.
DYING = """
import os, pathlib, signal
from tinytron.cli.entry import run
from tinytron.training import Trainer, build_config, parse_args

class Dying(Trainer):
    def _maybe_save(self):
        super()._maybe_save()
        if self.step == 5:
            self.saver.checkpoints.finish()
        if self.step == 5 and self.state.rank == 1 and not (died := pathlib.Path("died")).exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

run(lambda: Dying(build_config(parse_args())).train())
"""


@pytest.mark.slow  # test_kill.py resumes killed runs by hand
@pytest.mark.parametrize("launcher", ["tinytron.cli.launch", "torch.distributed.run"])
def test_torchrun_restarts_a_run_where_it_was(tmp_path: Path, launcher: str) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    logs = []
    for name, flags in (("died", ("--max-restarts", "1")), ("unbroken", ())):
        folder = tmp_path / name
        folder.mkdir()
        if name == "unbroken":
            (folder / "died").touch()
        options: dict[str, Any] = {"processes": 2, "script": script, "launcher": launcher, "launcher_flags": flags}
        # Our launcher sets it. Without it gloo's workers find the addresses of those before (torch 2.13).
        own_store = {} if launcher.startswith("tinytron") else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        said = run_well(*FLAGS, cwd=folder, env=own_store, **options).stdout
        assert ("resuming after step 3" in said) == (name == "died")
        logs.append(next((folder / "log").glob("tiny_*/log.txt")).read_bytes())
    assert logs[0] == logs[1]
