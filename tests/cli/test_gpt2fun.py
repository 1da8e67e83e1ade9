"""scripts/run_gpt2.py: gpt2fun's documented commands, names, defaults and units."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import ROOT
from tinytron.cli.gpt2fun import PATHS, SETTINGS, RunGPT2, build_config_of
from tinytron.data.formats import write_shard
from tinytron.errors import ConfigError

DOCUMENTED = ["--model.n_layer=12", "--model.n_head=12", "--model.n_embd=768", "--batch_size=512"]
SMALL = (
    *("--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.vocab_size=61", "--model.block_size=16"),
    *("--batch_size=4", "--per_device_batch_size=1", "--seq_len=16", "--num_tokens=192", "--log_interval=1"),
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        tokens = np.random.default_rng(0).integers(0, 61, 4000)
        write_shard(tmp_path / "data" / name, tokens.tolist(), file_format="llmc")
    return tmp_path / "data"


def _run(*flags: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUM_GPUS": "0"}
    command = [sys.executable, str(ROOT / "scripts" / "run_gpt2.py"), *map(str, flags)]
    variables = {**os.environ, **own, **env}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=240, check=False)


def test_every_setting_names_an_option() -> None:
    paths = {option.path for option in RunGPT2.options()}
    assert PATHS.keys() == SETTINGS.keys()
    assert {*PATHS.values()} <= paths


def test_the_documented_command_is_gpt2() -> None:
    config = build_config_of(
        [*DOCUMENTED, "--num_tokens=1000000000", "--save_dir=./checkpoints"], {"TFDS_DATA_DIR": "/d"}
    )
    model, train, optim = config.model, config.train, config.optim
    assert (model.num_layer, model.num_attention_heads, model.num_key_value_heads, model.hidden_size) == (
        12,
        12,
        12,
        768,
    )
    assert (model.intermediate_size, model.vocab_size, model.block_size) == (3072, 50304, 1024)
    assert (model.norm_type, model.mlp_type, model.position_type, model.bias) == ("layer", "gelu_tanh", "learned", True)
    assert model.tied_lm_head
    assert (train.total_batch_size, train.batch_size, train.seq_len) == (512 * 1024, 16, 1024)
    assert (train.max_train_tokens, train.grad_clip_value) == (10**9, 1.0)
    assert (optim.max_lr, optim.min_lr, optim.weight_decay, optim.warmup_steps) == (6e-4, 0.0, 0.1, 700)
    assert (optim.adam_beta1, optim.adam_beta2, optim.adam_eps, optim.lr_schedule) == (0.9, 0.95, 1e-8, "cosine")
    assert (config.seed.seed, config.logging.log_every, config.logging.log_dir) == (42, 20, "./checkpoints")
    assert (config.ckpt.do_save, config.ckpt.save_every_steps, config.ckpt.keep_last) == (True, 0, 1)
    assert config.data.dataset_path == "/d/fineweb100B"


@pytest.mark.parametrize(
    ("flags", "section", "name", "value"),
    [
        (["--batch_size=2048", "--per_device_batch_size=16"], "train", "total_batch_size", 2048 * 1024),
        (["--batch_size=8"], "train", "batch_size", 8),  # a micro-batch is never more than the batch
        (["--seq_len=128", "--batch_size=32"], "train", "total_batch_size", 4096),
        (["--optimizer.grad_clip=None"], "train", "grad_clip_value", 0.0),
        (["--optimizer.wsd"], "optim", "lr_schedule", "wsd"),
        (["--optimizer.lr=1e-3"], "optim", "max_lr", 1e-3),
        (["--model.n_embd=96"], "model", "intermediate_size", 384),
        (["--model.n_head=6"], "model", "num_key_value_heads", 6),
        (["--save_all", "--save_dir=x"], "ckpt", "keep_last", 0),
        (["--save_interval=50", "--save_dir=x"], "ckpt", "save_every_steps", 50),
        ([], "ckpt", "do_save", False),
        (["--model.bias=false"], "model", "bias", False),
        (["--seed=0"], "seed", "seed", 0),
    ],
)
def test_flags_and_their_units(flags: list[str], section: str, name: str, value: object) -> None:
    config = build_config_of([*flags, "--num_tokens=10**6", "--data_dir=d"], {})
    assert getattr(config[section], name) == value


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch_size=2048", "--per_device_batch_size=16"], "--num_tokens is required"),
        (["--num_tokens=1e9"], "use --data_dir or set TFDS_DATA_DIR"),
        (["--num_tokens=1e9", "--data_dir=d", "--model.n_layers=3"], "did you mean --model.n_layer?"),
        (["--num_tokens=many"], "is not a whole number"),
        (["--num_tokens=1e9", "--data_dir=d", "--model.n_embd=770"], "--hidden_size 770"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config_of(flags, {})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_it_trains_and_continues_on_all_processes(data: Path, tmp_path: Path) -> None:
    """Without a launcher; on other processes it reads the same batches."""
    flags = (*SMALL, "--save_dir=saved", f"--data_dir={data}")
    first = _run(*flags, cwd=tmp_path, NPROC="2")
    assert first.returncode == 0, first.stderr
    assert "2 x cpu" in first.stdout
    assert "step 3/3" in first.stdout
    (folder,) = (tmp_path / "saved").glob("gpt2_*")
    description = json.loads((folder / "config.json").read_text())["config"]
    assert description["train"]["total_batch_size"] == 64
    more = _run(*(flag for flag in flags if "num_tokens" not in flag), "--num_tokens=256", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "resuming after step 3" in more.stdout
    assert "step 4/4" in more.stdout


@pytest.mark.slow
def test_weights_to_start_from_bring_their_architecture(data: Path, tmp_path: Path) -> None:
    assert _run(*SMALL, "--save_dir=saved", f"--data_dir={data}", cwd=tmp_path).returncode == 0
    (weights,) = (tmp_path / "saved").glob("gpt2_*/00003_model.pt")
    flags = [flag for flag in SMALL if not flag.startswith("--model.")]
    tuned = build_config_of([*flags, f"--from_pretrained={weights}", f"--data_dir={data}"], {})
    assert (tuned.model.num_layer, tuned.model.hidden_size) == (1, 16)
    with pytest.raises(ConfigError, match="num_layer"):
        build_config_of([*flags, f"--from_pretrained={weights}", f"--data_dir={data}", "--model.n_layer=2"], {})
