"""Training that begins with other people's weights: the same steps as torch's AdamW makes on transformers' model, on any
layout; and which flags then mean what."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from tests.helpers.ranks import Ranks
from tests.helpers.runs import config_of, losses, read_logs
from tests.interop import families
from tests.interop.families import VOCAB, S, change_config, save
from tinytron.checkpoint.load import read_file
from tinytron.cli.main import main
from tinytron.errors import CheckpointError, ConfigError
from tinytron.interop.importing import import_model
from tinytron.interop.load import architecture_of, load_pretrained
from tinytron.model import GPT
from tinytron.training import Config, Trainer, build_config, parse_args
from tinytron.utils import progress

Pools = Callable[[int], Ranks]
STEPS, ROWS, LR = 5, 8, 0.01
FLAGS: tuple[object, ...] = (
    *("--exp_name", "hf", "--seq_len", S, "--batch_size", 2, "--total_batch_size", ROWS * S, "--max_steps", STEPS),
    *("--max_lr", LR, "--lr_schedule", "constant", "--warmup_steps", 0, "--log_every", 1, "--grad_clip_value", 0),
    *("--precision", "fp64", "--moe_aux_loss_coef", 0),
)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """All of it is one global batch, so every step sees the same rows in whatever order."""

    def __init__(self) -> None:
        self.ids, self.labels = families.batch(seed=3, rows=ROWS)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class RowsTrainer(Trainer):
    """Trains on ``Rows``."""

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = Rows()


def run(folder: Path, log_dir: Path, *flags: object) -> tuple[Path, dict[int, float]]:
    """Train from the weights of ``folder``; the run's folder and its losses. A job for the pool."""
    trainer = RowsTrainer(config_of(*FLAGS, "--max_epochs", STEPS, "--init_from", folder, "--log_dir", log_dir, *flags))
    trainer.train()
    return trainer.log_dir, losses(read_logs(trainer.log_dir)[0]) if trainer.master_process else {}


def their_run(model: Any) -> list[float]:
    """The same steps by torch alone; returns the losses before each."""
    decays = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return steps_of(torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8), model)


def steps_of(optimizer: torch.optim.Optimizer, model: Any) -> list[float]:
    """The run's steps by ``optimizer``; returns the losses before each."""
    ids, labels = families.batch(seed=3, rows=ROWS)
    found = []
    for _ in range(STEPS):
        loss = families.their_loss(model, ids, labels) / (labels != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def assert_same_run(theirs: Any, before: Path, after: Path, folder: Path, logged: dict[int, float]) -> None:
    """Losses by step, and weights at the end, in our names and shapes."""
    expected = their_run(theirs)
    assert list(logged) == list(range(1, STEPS + 1))
    assert list(logged.values()) == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[-1]) > 1e-2
    theirs.save_pretrained(after)
    model = GPT(architecture_of(str(after)), dtype=torch.float64, seed=None)
    first = GPT(model.config, dtype=torch.float64, seed=None)
    load_pretrained(model, str(after))
    load_pretrained(first, str(before))
    start = first.state_dict()
    mine = read_file(folder / f"{STEPS:05d}_model.pt")
    for name, wanted in model.state_dict().items():
        moved = float((wanted - start[name]).norm())
        error = float((mine[name] - wanted).norm())
        # Their rotary angles are fp32, and AdamW makes large steps of small gradients too.
        assert error <= 1e-3 * moved + 1e-12, f"{name}: moved by {moved:.2e}, differs by {error:.2e}"
    assert float((mine["wte.weight"] - start["wte.weight"]).norm()) > 0.1


LAYOUTS: list[tuple[str, int, tuple[object, ...]]] = [
    *((name, 1, ()) for name in ("llama llama3", "mistral", "qwen2", "qwen3", "mixtral", "neox", "gpt2")),
    ("qwen3_moe some layers", 1, ()),
    ("llama tied biased", 2, ()),
    ("gpt2", 2, ("--sep_size", 2)),
    ("qwen3 windows", 2, ("--sep_size", 2)),
    ("mixtral", 2, ("--ep_size", 2)),
    ("qwen3_moe some layers", 2, ("--ep_size", 2, "--recompute", "full")),
]


@pytest.mark.parametrize(("name", "world", "flags"), LAYOUTS)
@pytest.mark.sample(6)
def test_steps_are_those_of_torch_on_their_model(
    ranks: Pools, tmp_path: Path, name: str, world: int, flags: tuple[object, ...]
) -> None:
    theirs = save(name, tmp_path / "hf")
    folder, logged = ranks(world).run(run, tmp_path / "hf", tmp_path / "log", *flags)[0]
    assert_same_run(theirs, tmp_path / "hf", tmp_path / "after", folder, logged)


@pytest.mark.parametrize("source", ["import", "run"])
def test_own_weights_begin_a_run_too(ranks: Pools, tmp_path: Path, source: str) -> None:
    save("mixtral", tmp_path / "hf")
    if source == "import":
        import_model(str(tmp_path / "hf"), tmp_path / "own", torch.float64)
        own = tmp_path / "own"
    else:
        own, _ = ranks(1).run(run, tmp_path / "hf", tmp_path / "first", "--max_steps", 1, "--max_lr", 0, "--min_lr", 0)[
            0
        ]
    _, mine = ranks(2).run(run, own, tmp_path / "one", "--ep_size", 2)[0]
    _, theirs = ranks(1).run(run, tmp_path / "hf", tmp_path / "two")[0]
    assert list(mine.values()) == pytest.approx(list(theirs.values()), rel=1e-9)


@pytest.mark.parametrize("name", ["mixtral", "llama tied biased"])
def test_own_weights_get_rows_for_more_tokens_too(tmp_path: Path, name: str) -> None:
    save(name, tmp_path / "hf", torch.float32)
    import_model(str(tmp_path / "hf"), tmp_path / "own", torch.float32)
    config = dataclasses.replace(architecture_of(str(tmp_path / "hf")), vocab_size=VOCAB + 7)
    mine, theirs = GPT(config, seed=None), GPT(config, seed=None)
    load_pretrained(mine, str(tmp_path / "own"))
    load_pretrained(theirs, str(tmp_path / "hf"))
    for (key, own), other in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(own, other), key
    assert torch.equal(mine.state_dict()["wte.weight"][VOCAB], mine.state_dict()["wte.weight"][:VOCAB].mean(0))


def _said(folder: Path, log_dir: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        run(folder, log_dir, "--max_steps", 1)
    return shown.getvalue()


def test_long_export_and_import_show_their_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path / "hf", torch.float32)
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", -1.0)
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "own")]) == 0
    assert f"reading {tmp_path / 'hf'}: " in capsys.readouterr().err
    assert main(["export", "--checkpoint", str(tmp_path / "own"), "--out", str(tmp_path / "back")]) == 0
    assert "exporting: " in capsys.readouterr().err


def test_a_run_says_which_settings_it_left_out(
    ranks: Pools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the line that names the weights; an import says it, too."""
    save("llama", tmp_path / "hf", torch.float32)
    change_config(tmp_path / "hf", is_llama_config=True, auto_map={"AutoModelForCausalLM": "modeling.X"})
    (said,) = ranks(1).run(_said, tmp_path / "hf", tmp_path / "log")
    left_out = "; ignored in its config.json, not part of the model's function: is_llama_config, auto_map"
    assert f"starting from the weights of {tmp_path / 'hf'}{left_out}\n" in said
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "own")]) == 0
    # Behind what transformers shows of its own progress.
    assert capsys.readouterr().err.splitlines()[-1] == f"read {tmp_path / 'hf'}{left_out}"


def test_a_run_goes_on_from_its_own_checkpoint(ranks: Pools, tmp_path: Path) -> None:
    """Not from the weights it began with; those are needed for the architecture only."""
    save("llama", tmp_path / "hf")
    whole, _ = ranks(1).run(run, tmp_path / "hf", tmp_path / "whole")[0]
    ranks(1).run(run, tmp_path / "hf", tmp_path / "parts", "--max_steps", 2)
    (tmp_path / "hf" / "model.safetensors").unlink()
    parts, _ = ranks(1).run(run, tmp_path / "hf", tmp_path / "parts")[0]
    mine, theirs = (read_file(folder / "00005_model.pt") for folder in (parts, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_main_weights_begin_there_too(ranks: Pools, tmp_path: Path) -> None:
    """In bf16 the optimizer steps from fp32 copies and writes them back; without a learning rate nothing moves."""
    save("llama", tmp_path / "hf", torch.float32)
    still = ("--precision", "bf16", "--max_lr", 0, "--min_lr", 0, "--max_steps", 1)
    folder, _ = ranks(2).run(run, tmp_path / "hf", tmp_path / "log", *still)[0]
    wanted = GPT(architecture_of(str(tmp_path / "hf")), dtype=torch.bfloat16, seed=None)
    load_pretrained(wanted, str(tmp_path / "hf"))
    found = read_file(folder / "00001_model.pt")
    assert all(torch.equal(found[name], value) for name, value in wanted.state_dict().items())


def _run_without_drawing(folder: Path, log_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "init_weights", lambda *_: pytest.fail("drawn in vain"))
        run(folder, log_dir, "--max_steps", 1)


def test_no_weights_are_drawn_in_vain(ranks: Pools, tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    ranks(1).run(_run_without_drawing, tmp_path / "hf", tmp_path / "log")


def _fails(folder: Path, log_dir: Path, *flags: object) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        run(folder, log_dir, *flags)
    return str(caught.value)


def test_missing_weights_stop_every_rank(ranks: Pools, tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    text = (
        f"{tmp_path}/hf has no weights: neither model.safetensors nor pytorch_model.bin, in one file or with an index"
    )
    assert ranks(2).run(_fails, tmp_path / "hf", tmp_path / "log") == [text] * 2


# Flags.


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save("llama llama3", tmp_path / "hf", torch.float32)
    return tmp_path / "hf"


def build(folder: Path, *flags: object) -> Config:
    return build_config(parse_args([str(flag) for flag in ("--init_from", folder, "--seq_len", 16, *flags)]))


def refusal(folder: Path, *flags: object) -> str:
    with pytest.raises(ConfigError, match=r"^.+$") as caught:
        build(folder, *flags)
    return str(caught.value)


def test_the_folder_alone_says_what_the_model_is(llama: Path) -> None:
    config = build(llama)
    assert config.ckpt.init_from == str(llama)
    assert config.model == architecture_of(str(llama))
    assert (config.model.num_layer, config.model.vocab_size, config.model.rope_scaling) == (2, VOCAB, "llama3")
    assert (
        config.config_hash()
        != dataclasses.replace(config, ckpt=dataclasses.replace(config.ckpt, init_from=None)).config_hash()
    )


def test_sequences_are_as_long_as_the_model_reads_unless_given(llama: Path) -> None:
    own = architecture_of(str(llama)).block_size
    assert own < 4096
    config = build_config(parse_args(["--init_from", str(llama)]))
    assert (config.train.seq_len, config.model.block_size) == (own, own)
    config = build_config(parse_args(["--init_from", str(llama), "--seq_len", str(own // 2)]))
    assert (config.train.seq_len, config.model.block_size) == (own // 2, own)


def test_training_options_stay_free(llama: Path) -> None:
    flags = ("--dropout", 0.25, "--init_std", 0.5, "--moe_z_loss_coef", 0.5, "--vocab_size", 64, "--block_size", 16)
    model = build(llama, *flags).model
    assert (model.dropout, model.init_std, model.moe_z_loss_coef) == (0.25, 0.5, 0.5)
    assert (model.vocab_size, model.block_size) == (64, 16)


def test_flags_may_say_what_is_so(llama: Path) -> None:
    same = ("--num_layer", 2, "--head_dim", 4, "--no-bias", "--norm_type", "rms", "--num_experts", 7)
    assert build(llama, *same).model == dataclasses.replace(build(llama).model, head_dim=4, num_experts=7)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--num_layer", 32), "--num_layer 32 contradicts --init_from {}, which has 2; drop --num_layer"),
        (("--bias",), "--bias True contradicts --init_from {}, which has False; drop --bias"),
        (("--use_moe",), "--use_moe True contradicts --init_from {}, which has False; drop --use_moe"),
        (("--num_key_value_heads", 8), "--num_key_value_heads 8 contradicts --init_from {}, which has 1; drop "),
        (("--rope_theta", 10000), "--rope_theta 10000.0 contradicts --init_from {}, which has 500.0; drop "),
        (("--vocab_size", 40), "--vocab_size 40 is less than the 41 tokens of --init_from {}; use 41 or more"),
        (
            ("--resume_path", "log/x"),
            "--init_from {} begins a new run and --resume_path log/x continues one; drop one of them",
        ),
    ],
)
def test_flags_must_not_contradict(llama: Path, flags: tuple[object, ...], text: str) -> None:
    assert refusal(llama, *flags).startswith(text.format(llama))


def test_learned_positions_are_as_many_as_there_are(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    text = f"--block_size 64 is not the 32 learned positions of --init_from {tmp_path}; use 32"
    assert refusal(tmp_path, "--block_size", 64) == text
    assert refusal(tmp_path, "--block_size", 16) == text.replace("64", "16")
    assert build(tmp_path, "--block_size", 32).model.block_size == 32


def test_a_configuration_made_by_hand_must_fit(llama: Path) -> None:
    config = dataclasses.replace(architecture_of(str(llama)), rope_theta=1e4)
    with pytest.raises(
        ConfigError, match=r"--init_from .* has rope_theta 500.0, but this model has 10000.0; build its config"
    ):
        load_pretrained(GPT(config, seed=None), str(llama))


def test_other_models_load_their_weights_themselves(llama: Path, ranks: Pools, tmp_path: Path) -> None:
    (text,) = ranks(1).run(_foreign, llama, tmp_path / "log")
    assert text == f"--init_from {llama} fills Tinytron's GPT, but this is a Linear; load it yourself"


class Foreign(RowsTrainer):
    """Has no GPT."""

    def _init_model(self, config: Config) -> None:
        self.raw_model = self.model = torch.nn.Linear(2, 2)


def _foreign(folder: Path, log_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Foreign(config_of(*FLAGS, "--init_from", folder, "--log_dir", log_dir, "--precision", "fp32"))
    return str(caught.value)


def test_a_broken_description_is_told_at_the_command_line(llama: Path) -> None:
    change_config(llama, hidden_act="relu")
    text = f"{llama}/config.json: hidden_act = 'relu' is not supported; only silu, swish are supported"
    assert refusal(llama) == text
