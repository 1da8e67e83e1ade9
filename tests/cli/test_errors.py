"""What a user can get wrong: one line that starts with ``error:``, an exit status, no traceback, no hang."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import ROOT, TINY, config_of, run, run_ranks, run_well
from tinytron.data import write_shard
from tinytron.errors import ConfigError
from tinytron.training.world import join_world

SHARDS = ("--no-use_mock_data", "--dataset_path")
SHORT = ("--max_steps", "1")


@dataclass(frozen=True)
class Wrong:
    """Flags or environment that cannot work, and what the line must say."""

    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


WRONG = {
    "unknown flag": Wrong(("unknown argument --hiden_size; did you mean --hidden_size?",), ("--hiden_size", "3")),
    "positional": Wrong(("unknown argument train",), ("train",)),
    "abbreviated flag": Wrong(("unknown argument --hidden",), ("--hidden", "16")),
    "no number": Wrong(
        ("--hidden_size", "'wide' is not a whole number like 1000000, 1e6 or 2**20"), ("--hidden_size", "wide")
    ),
    "no choice": Wrong(("--precision", "fp8"), ("--precision", "fp8")),
    "value missing": Wrong(("--hidden_size", "expected one argument"), ("--hidden_size",)),
    "kv heads": Wrong(
        ("--num_key_value_heads 3 must divide --num_attention_heads 4; use one of [1, 2, 4]",),
        ("--num_key_value_heads", "3"),
    ),
    "sep_size": Wrong(("--sep_size 3",), ("--sep_size", "3")),
    "total batch": Wrong(
        ("--total_batch_size 100 (tokens) must be a multiple of --seq_len 12; use 96",), ("--total_batch_size", "100")
    ),
    "micro-batch": Wrong(
        ("--batch_size x --seq_len x data-parallel ranks", "use a --batch_size of"), ("--batch_size", "5")
    ),
    "block size": Wrong(
        ("--seq_len 24 exceeds --block_size 12; use --block_size 24",), ("--seq_len", "24", "--total_batch_size", "96")
    ),
    "no epoch": Wrong(("do not fill one global batch", "--max_epochs 4"), ("--mock_data_num_samples", "2")),
    "no folder": Wrong(("--dataset_path nowhere is not a folder and matches no file",), (*SHARDS, "nowhere")),
    "no shards": Wrong(("--dataset_path empty has no train_*.bin",), (*SHARDS, "empty")),
    "no shard": Wrong(("matches no file",), (*SHARDS, "good/train_9*.bin")),
    "corrupt shard": Wrong(("corrupt/train_1.bin: magic number", "at byte 0"), (*SHARDS, "corrupt")),
    "truncated shard": Wrong(("truncated/train_1.bin", "it is truncated or damaged"), (*SHARDS, "truncated")),
    "short shard": Wrong(("no shard holds one sample of --seq_len 12 + 1 tokens",), (*SHARDS, "short")),
    "not a shard": Wrong(("text/train_0.bin: 5 bytes are not a token shard",), (*SHARDS, "text")),
    "token id": Wrong(
        ("large/train_1.bin: token id 61 at byte 1044 is not below --vocab_size 61",), (*SHARDS, "large")
    ),
    "another model": Wrong(
        ("belongs to a different run (model.hidden_size: 16 in the checkpoint, 32 now)",),
        ("--resume_path", "run", "--hidden_size", "32"),
    ),
    "no checkpoint": Wrong(
        ("--resume_path nowhere is neither a run folder nor a checkpoint file",), ("--resume_path", "nowhere")
    ),
    "log_dir below a file": Wrong(
        ("--log_dir file/log cannot be written (Not a directory",), ("--log_dir", "file/log")
    ),
    "log_dir in proc": Wrong(("--log_dir /proc/log cannot be written",), ("--log_dir", "/proc/log")),
    "nccl": Wrong(
        ("--backend nccl needs a GPU, but this machine has none; use --backend gloo or auto",), ("--backend", "nccl")
    ),
    "flash": Wrong(
        ("--attn_backend flash needs the flash-attn package: pip install flash-attn",), ("--attn_backend", "flash")
    ),
    "varlen": Wrong(
        ("--attn_backend varlen runs only on CUDA in bf16 or fp16, not on cpu in torch.bfloat16; use sdpa",),
        ("--attn_backend", "varlen", "--head_dim", "8", "--precision", "bf16"),
    ),
}
for name in ("use_liger_kernel", "use_cut_cross_entropy", "use_triton_kernels"):
    WRONG[name] = Wrong(
        (f"--{name} runs only on CUDA, not on cpu; drop --{name}",), (f"--{name}", "--precision", "bf16")
    )
EXPERTS = ("--use_moe", "--num_experts", "6", "--num_experts_per_tok", "2")
# On four ranks; each is raised before process groups are made.
LAYOUTS = {
    "world % sep": Wrong(("--sep_size 3 must divide the number of processes, 4; use one of [1, 2, 4]",),
                         ("--sep_size", "3", "--num_attention_heads", "3", "--num_key_value_heads", "3", "--head_dim",
                          "4")),
    "world % ep": Wrong(("--ep_size 3 must divide the number of processes, 4; use one of [1, 2, 4]",),
                        (*EXPERTS, "--ep_size", "3")),
    "world % ep, dense": Wrong(("--ep_size 8 must divide the number of processes, 4; use one of [1, 2, 4]",),
                               ("--ep_size", "8")),
    "heads % sep": Wrong(
        ("--sep_size 4 must divide --num_attention_heads 2, and divide or be a multiple of --num_key_value_heads 2; "
         "use one of [1, 2]",),
        ("--sep_size", "4", "--num_attention_heads", "2", "--num_key_value_heads", "2")),
    "kv heads and sep": Wrong(
        ("--sep_size 4 must divide --num_attention_heads 12, and divide or be a multiple of --num_key_value_heads 6; "
         "use one of [1, 2, 3, 6, 12]",),
        ("--sep_size", "4", "--num_attention_heads", "12", "--num_key_value_heads", "6", "--head_dim", "2")),
    "seq_len % sep": Wrong(("--sep_size 4 must divide --seq_len 6; use one of [1, 2]",),
                           ("--sep_size", "4", "--seq_len", "6")),
    "experts % ep": Wrong(("--ep_size 4 must divide --num_experts 6; use one of [1, 2, 3, 6]",),
                          (*EXPERTS, "--ep_size", "4")),
    "experts % sep": Wrong(("--ep_size 4 must divide --num_experts 6; use one of [1, 2, 3, 6]",),
                           (*EXPERTS, "--sep_size", "4")),
    "more choices than experts": Wrong(("--num_experts_per_tok 7 must not exceed --num_experts 6; use at most 6",),
                                       (*EXPERTS, "--num_experts_per_tok", "7")),
    "all layers dense": Wrong(("--first_k_dense 2 leaves no expert layer of --num_layer 2; use at most 1",),
                              (*EXPERTS, "--first_k_dense", "2")),
    "batch over dp": Wrong(
        ("must be a multiple of --batch_size x --seq_len x data-parallel ranks = 3 x 12 x 2 = 72; use a --batch_size",),
        ("--sep_size", "2", "--batch_size", "3")),
}  # fmt: skip
ENVIRONMENTS = {
    "WORLD_SIZE": Wrong(
        ("environment variable WORLD_SIZE='many' must be a whole number",), env={"WORLD_SIZE": "many", "RANK": "0"}
    ),
    "WORLD_SIZE empty": Wrong(("environment variable WORLD_SIZE=''",), env={"WORLD_SIZE": "", "RANK": "0"}),
    "WORLD_SIZE zero": Wrong(("WORLD_SIZE",), env={"WORLD_SIZE": "0", "RANK": "0"}),
    "WORLD_SIZE without RANK": Wrong(("WORLD_SIZE", "RANK"), env={"WORLD_SIZE": "2"}),
    "RANK": Wrong(("environment variable RANK='-1' must be a whole number",), env={"WORLD_SIZE": "2", "RANK": "-1"}),
    "RANK without WORLD_SIZE": Wrong(("RANK is set but WORLD_SIZE is not",), env={"RANK": "0"}),
    "RANK too high": Wrong(
        ("RANK", "2"), env={"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ),
    "LOCAL_RANK": Wrong(("environment variable LOCAL_RANK='x' must be a whole number",), env={"LOCAL_RANK": "x"}),
    "MASTER_ADDR missing": Wrong(("MASTER_ADDR",), env={"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "29500"}),
    "MASTER_PORT": Wrong(
        ("MASTER_PORT",), env={"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}
    ),
    "init_method": Wrong(("--init_method",), ("--init_method", "nonsense://"), env={"WORLD_SIZE": "1", "RANK": "0"}),
}
ON_TWO_RANKS = (
    *(
        "unknown flag",
        "kv heads",
        "sep_size",
        "micro-batch",
        "no folder",
        "corrupt shard",
        "truncated shard",
        "token id",
    ),
    *("another model", "no checkpoint", "log_dir below a file", "nccl"),
)
CASES = {
    **{(name, 1): wrong for name, wrong in {**WRONG, **ENVIRONMENTS}.items()},
    **{(name, 2): WRONG[name] for name in ON_TWO_RANKS},
    **{(name, 4): wrong for name, wrong in LAYOUTS.items()},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with good and bad data, and the run of another model."""
    place = tmp_path_factory.mktemp("place")
    tokens = np.arange(200) % 61
    for name in ("good", "corrupt", "truncated", "large", "empty", "short", "text"):
        (place / name).mkdir()
        if name in ("good", "corrupt", "truncated", "large"):
            write_shard(place / name / "train_0.bin", tokens)
            write_shard(place / name / "train_1.bin", tokens)
    (place / "corrupt/train_1.bin").write_bytes(b"x\0" * 1000)
    (place / "truncated/train_1.bin").write_bytes((place / "truncated/train_1.bin").read_bytes()[:-3])
    write_shard(place / "large/train_1.bin", np.where(np.arange(200) == 10, 61, tokens))
    write_shard(place / "short/train_0.bin", tokens[:12])
    (place / "text/train_0.bin").write_text("hello")
    (place / "file").write_text("not a folder")
    run_well(*TINY, *SHORT, cwd=place)
    next((place / "log").iterdir()).rename(place / "run")
    return place


@pytest.mark.parametrize(("name", "world"), CASES)
def test_one_line_says_what_is_wrong(place: Path, name: str, world: int) -> None:
    wrong = CASES[name, world]
    finished = run_ranks(*TINY, *wrong.flags, cwd=place, world=world, env=wrong.env)
    assert finished.code == 2, finished.stderr
    _assert_one_line(finished.stderr, wrong.says)


def _would_join(*args: object, **kwargs: object) -> None:
    raise AssertionError("process groups are made")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_checked_before_process_groups_are_made(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("torch.distributed.init_process_group", _would_join)
    wrong = LAYOUTS[name]
    with pytest.raises(ConfigError) as caught:
        join_world(config_of(*TINY, *wrong.flags))
    for part in wrong.says:
        assert part in str(caught.value)


def _assert_one_line(stderr: str, says: tuple[str, ...]) -> None:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    for part in says:
        assert part in lines[0]


@pytest.mark.parametrize("name", ["unknown flag", "token id"])
@pytest.mark.sample(1)
@pytest.mark.usefixtures("real_processes")
def test_the_launcher_passes_the_line_and_the_status_on(place: Path, name: str) -> None:
    """With our launcher: before any rank has joined, and when only one rank has seen the bad shard."""
    wrong = WRONG[name]
    finished = run(*TINY, *SHORT, *wrong.flags, cwd=place, processes=2)
    assert finished.code == 2
    _assert_one_line(finished.stderr, wrong.says)


@pytest.mark.usefixtures("real_processes")
def test_plain_python_exits_with_the_status(place: Path) -> None:
    finished = run(*TINY, *WRONG["unknown flag"].flags, cwd=place)
    assert finished.code == 2
    assert finished.stdout == ""
    _assert_one_line(finished.stderr, WRONG["unknown flag"].says)


def test_messages_do_not_name_this_machine() -> None:
    """The cases above run in a temporary folder; the repository's own path is in none of them."""
    assert all(str(ROOT) not in part for wrong in CASES.values() for part in wrong.says)
