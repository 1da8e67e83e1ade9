"""From a jsonl file to a training step in two commands, as docs/data.md has them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import ROOT, TINY, read_logs


def command(*words: object) -> str:
    """What a command prints. Fails with it unless the command succeeds."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_commands_from_text_to_training(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {n}: " + "to be or not to be, " * (n % 7 + 1)}) for n in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    tokenize = (
        "scripts/tokenize_dataset.py",
        "--dataset_path",
        tmp_path / "texts.jsonl",
        "--output_dir",
        tmp_path / "out",
    )
    tokenize = (*tokenize, "--train_bpe", 300, "--val_fraction", 0.1, "--num_proc", 2)
    assert "train with: python pretrain_debug.py --dataset_path" in command(*tokenize)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = command(*tokenize)
    assert again == f"{tmp_path / 'out'} is there already: nothing to do\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    flags = [flag for flag in TINY if flag != "--use_mock_data"]
    flags += ["--vocab_size", 300, "--dataset_path", tmp_path / "out", "--log_dir", tmp_path / "log", "--max_steps", 2]
    command("pretrain_debug.py", *flags, "--do_val", "--packing", "best_fit", "--document_mask")
    (run,) = (tmp_path / "log").iterdir()
    log, records = read_logs(run)
    assert [line.split()[:2] for line in log.splitlines()] == [["1", "train"], ["2", "train"], ["2", "val"]]
    assert 4 < records[-1]["loss"] < 7  # ln 300 is 5.7
    assert command("-m", "tinytron", "data", "verify", tmp_path / "out").startswith("ok: ")
