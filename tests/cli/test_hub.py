"""A run that uploads what it exports, to a stand-in hub: from the command line to what transformers opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.model_hub import taking
from tests.helpers.runs import TINY, run_well

pytest.importorskip("huggingface_hub")


def test_a_run_uploads_its_exports_and_makes_up_for_what_failed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    flags = (*TINY, "--save_every_steps", 2, "--export_every", 2, "--max_steps", 4, "--log_dir", tmp_path / "log")
    with taking() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
        environment["HF_HUB_OFFLINE"] = "0"  # other tests are
        hub.refuse = lambda method, path: 403 if path.endswith("/commit/step2") else None
        first = run_well(*flags, "--hub_model_id", "lab/model", cwd=tmp_path, env=environment)
        assert "error: step_00002 was not uploaded to lab/model as step2 (" in first.stdout
        assert "uploaded step_00004 to lab/model, revision main\n" in first.stdout
        assert "not uploaded to lab/model yet: step2; the same command tries again\n" in first.stdout
        hub.refuse = lambda method, path: None
        again = run_well(*flags, "--hub_model_id", "lab/model", cwd=tmp_path, env=environment)
        assert "uploaded step_00002 to lab/model, revision step2\n" in again.stdout
        assert "step_00004" not in again.stdout
        assert "hf_secret" not in first.stdout + first.stderr + again.stdout + again.stderr
        (folder,) = (tmp_path / "log").glob("tiny_*/export")
        branches = hub.repositories["lab/model"].branches
        for branch, step in (("step2", "step_00002"), ("step4", "step_00004"), ("main", "step_00004")):
            assert branches[branch] == {path.name: path.read_bytes() for path in (folder / step).iterdir()}
        for name, content in branches["main"].items():
            (tmp_path / name).write_bytes(content)
        assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 61
