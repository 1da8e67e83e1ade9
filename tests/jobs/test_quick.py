"""``quick``: jobs from Python, as documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import Ranks
from tests.jobs.conftest import TINY
from tinytron.errors import ConfigError
from tinytron.jobs.options import read_file
from tinytron.quick import QuickJob, init, quick


def _train(folder: Path) -> list[str]:
    """On a live rank, as in a notebook's process."""
    with quick("gpt/train/pretrain", folder, "my-run", project="p") as j:
        j.options.override(TINY)
        j.config.training.per_device_batch_size = 2
        j()
    j()  # is finished
    return sorted(path.name for path in (folder / "checkpoints/p/default/my-run").iterdir() if path.is_file())


def test_quick_trains(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pool: Ranks = ranks(1)
    assert pool.run(_train, tmp_path) == [["done.json", "final", "latest"]]


def test_save_for_later(tmp_path: Path) -> None:
    with quick("gpt/train/pretrain", tmp_path, "my-run") as j:
        j.config.training.per_device_batch_size = 16
        j.config.logging.checkpoint_interval = 4096
        j.save(str(tmp_path / "config.yaml"), chip="h100", n_chips=8)
    content, about = read_file(str(tmp_path / "config.yaml"))
    assert about == {"job": "gpt/train/pretrain", "request": {"chip": "h100", "min_chips": 8, "n_shards": 1}}
    assert (content["train"]["batch_size"], content["ckpt"]["save_every_steps"]) == (16, 4096)
    again = init("gpt/train/pretrain", tmp_path, config=str(tmp_path / "config.yaml"))
    assert again.config.training.per_device_batch_size == 16
    again.restore("other/best").save(str(tmp_path / "later.yaml"))
    assert read_file(str(tmp_path / "later.yaml"))[1] == {"job": "gpt/train/pretrain", "restore": "other/best"}


def test_where_the_output_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYTRON_ROOT", raising=False)
    with pytest.raises(ConfigError, match="quick needs an output folder"):
        init("gpt/train/pretrain")
    monkeypatch.setenv("TINYTRON_ROOT", str(tmp_path))
    made = init("gpt/train/pretrain", name="x")
    assert isinstance(made, QuickJob)
    assert made.spec.folder == tmp_path / "checkpoints/general/default/x"
    with pytest.raises(ConfigError, match="the output folder comes before the name"):
        init("gpt/train/pretrain", "my-run", "/path/to/output")
    with pytest.raises(ConfigError, match=r"project '\.\./x' must be letters"):
        init("gpt/train/pretrain", tmp_path, "x", project="../x")


def test_a_file_of_another_job_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("job: data/tokenize_variable_dataset\n")
    with pytest.raises(ConfigError, match="is for the job data/tokenize_variable_dataset, not for gpt/train/pretrain"):
        init("gpt/train/pretrain", tmp_path, config=str(tmp_path / "run.yaml"))


def test_required_options_and_errors_are_raised(tmp_path: Path) -> None:
    with (
        quick("data/tokenize_variable_dataset", tmp_path, "t") as j,
        pytest.raises(ConfigError, match=r"data\.name is"),
    ):
        j()
    j.config.data.name = str(tmp_path / "nothing")
    j.config.tokenizer.backend = "x"
    with pytest.raises(ConfigError, match=r"tokenizer\.backend=x must be one of"):
        j()
