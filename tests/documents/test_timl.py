"""timl's two commands, with sizes shrunk by their own flags and local text in place of a dataset on the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from tests.helpers.corpus import make_texts, make_tokenizer, write_jsonl
from tests.helpers.runs import ROOT
from tests.metrics.test_loggers import wandb_scalars
from tinytron.cli.timl import build_config_of
from tinytron.data.manifest import read_manifest

GPT2 = {
    **{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 400, "n_positions": 16, "n_embd": 16},
    **{"n_layer": 1, "n_head": 2, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
}
TOKENIZE = (
    *("--cache_dir", "data/c4", "--dataset_path", "c4.jsonl", "--tokenizer_path", "tokenizer.json"),
    *("--max_file_index", "1", "--streaming", "true", "--trust_remote_code", "false"),
)
# The command of timl's page, flag by flag.
TRAIN = {
    "model_name": "gpt2",
    "output_dir": "models/gpt2_c4",
    "train_file_pattern": "data/c4/train_*.bin",
    "eval_file_pattern": "data/c4/validation_*.bin",
    "max_eval_tokens": "10485760",
    "block_size": "1024",
    "train_batch_size": "512",
    "per_device_train_batch_size": "32",
    "per_device_eval_batch_size": "64",
    "learning_rate": "6e-4",
    "weight_decay": "0.1",
    "adam_beta1": "0.8",
    "adam_beta2": "0.95",
    "adam_epsilon": "1e-8",
    "max_grad_norm": "1.0",
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": '{"min_lr": 0.00001}',
    "warmup_ratio": "0.01",
    "log_every_steps": "1",
    "save_every_steps": "1000",
    "eval_every_steps": "100",
    "wandb_project": "timl",
    "wandb_run_name": "gpt2_c4",
    "push_to_hub": "true",
    "hub_model_id": "owner/gpt2_c4_example",
    "debug": "false",
}
SMALL = {
    **{"model_name": "model", "max_eval_tokens": "64", "block_size": "16", "train_batch_size": "4"},
    **{"per_device_train_batch_size": "2", "per_device_eval_batch_size": "4", "save_every_steps": "2"},
    **{"eval_every_steps": "2", "push_to_hub": "false", "max_train_steps": "3", "bf16": "false"},
    **{"hub_token": "hf_secret"},
}


def words(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def run(*command: str, cwd: Path) -> str:
    """The output of a command, which must succeed."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **own}, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with local text, the tokenizer and the configuration of a small GPT-2, and the shards of the first command,
    of which the first one is held out."""
    folder = tmp_path_factory.mktemp("timl")
    make_tokenizer(folder / "tokenizer.json")
    write_jsonl(folder / "c4.jsonl", make_texts(60))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(GPT2))
    command = (sys.executable, str(ROOT / "scripts" / "tokenize_dataset.py"), *TOKENIZE, "--num_proc", "0")
    run(*command, "--num_tokens_per_file", "500", cwd=folder)
    shards = folder / "data" / "c4"
    assert sorted(path.name for path in shards.glob("*.bin")) == ["train_000000.bin", "train_000001.bin"]
    shutil.move(shards / "train_000000.bin", shards / "validation_000000.bin")
    return folder


def test_the_documented_run_on_a_cpu(place: Path) -> None:
    script, torchrun = str(ROOT / "scripts" / "pretrain_model.py"), str(Path(sys.executable).parent / "torchrun")
    told = run(torchrun, "--standalone", "--nproc_per_node=1", script, *words(TRAIN | SMALL), cwd=place)
    assert "step 3/3" in told
    models = place / "models" / "gpt2_c4"
    (folder,) = models.glob("run_*")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("stage") == "val"] == [2, 3]
    assert [r["step"] for r in records if r.get("stage") == "train"] == [1, 2, 3]
    assert sorted(path.name for path in models.glob("step*")) == ["step0", "step2", "step3"]
    for step in ("step0", "step3"):
        model = AutoModelForCausalLM.from_pretrained(models / step)
        assert (type(model).__name__, model.config.n_embd) == ("GPT2LMHeadModel", 16)
    assert [path for path in models.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()] == []
    (session,), (about,) = wandb_scalars(folder)
    assert (about.project, about.display_name) == ("timl", "gpt2_c4")
    assert {step for name, step in session if name == "train/loss"} == {1, 2, 3}
    # Plain python is one process, and continues the same run.
    assert "already trained: 3 of 3 steps are done" in run(sys.executable, script, *words(TRAIN | SMALL), cwd=place)


@pytest.mark.slow
def test_a_trial_run_saves_nothing(place: Path) -> None:
    script, flags = str(ROOT / "scripts" / "pretrain_model.py"), {"debug": "true", "output_dir": "trial"}
    told = run(sys.executable, script, *words(TRAIN | SMALL | flags), cwd=place)
    assert "step 1/1" in told
    assert not [path for path in (place / "trial").rglob("*") if path.suffix == ".pt" or path.name.startswith("step")]


def test_the_renamed_shard_keeps_its_record(place: Path) -> None:
    manifest = read_manifest(place / "data" / "c4")
    assert manifest is not None
    assert [shard.name for shard in manifest.shards] == ["train_000000.bin", "train_000001.bin"]


def test_the_documented_command_as_options() -> None:
    config = build_config_of(words(TRAIN), world_size=4)
    model, train, optim, ckpt = config.model, config.train, config.optim, config.ckpt
    assert (model.num_layer, model.hidden_size, model.vocab_size, model.block_size) == (12, 768, 50257, 1024)
    assert (model.norm_type, model.mlp_type, model.dropout) == ("layer", "gelu_tanh", 0.1)
    assert (train.total_batch_size, train.batch_size, train.seq_len) == (512 * 1024, 32, 1024)
    assert (train.precision, train.grad_clip_value, train.max_steps) == ("bf16", 1.0, None)
    assert (train.do_val, train.val_every_steps, train.max_eval_tokens) == (True, 100, 10485760)
    assert (optim.max_lr, optim.min_lr, optim.lr_schedule) == (6e-4, 1e-5, "cosine")
    assert (optim.warmup_steps, optim.warmup_ratio, optim.weight_decay) == (0, 0.01, 0.1)
    assert (optim.adam_beta1, optim.adam_beta2, optim.adam_eps) == (0.8, 0.95, 1e-8)
    assert (ckpt.save_every_steps, ckpt.save_at_start, ckpt.export_every) == (1000, True, 1000)
    assert (ckpt.export_dir, ckpt.hub_model_id, ckpt.hub_private) == ("models/gpt2_c4", "owner/gpt2_c4_example", True)
    assert (config.data.dataset_path, config.data.val_dataset_path) == (
        "data/c4/train_*.bin",
        "data/c4/validation_*.bin",
    )
    assert (config.seed.seed, config.seed.deterministic, config.logging.log_every) == (0, False, 1)
