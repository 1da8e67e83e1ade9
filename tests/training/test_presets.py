"""``--preset``: every size is what the table says, and it gives way to files and flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinytron.cli.config_tables import PAGES, tables, updated
from tinytron.cli.gpt2fun import build_config_of as build_gpt2fun
from tinytron.cli.timl import build_config_of as build_timl
from tinytron.distributed.layout import ParallelLayout
from tinytron.errors import ConfigError
from tinytron.model.gpt import GPT
from tinytron.training.arguments import build_config, parse_args
from tinytron.training.build import build_schedule
from tinytron.training.config import Config
from tinytron.training.config_files import as_json
from tinytron.training.derive import derive
from tinytron.training.presets import PRESETS, preset_table

SMALL_HEADS = {
    "nanogpt-char-cpu",
    "0.25b",
    "0.3b-a0.17b",
    "1b",
    "7b",
    "tinytron",
}  # those of nanoGPT's README and our first scripts
PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "smollm-135m": 134_515_008, "pythia-160m": 162_322_944}


def built(*flags: object) -> Config:
    return build_config(parse_args([str(flag) for flag in flags]))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_the_model_that_it_states(name: str) -> None:
    config = built("--preset", name)
    model = GPT(config.model, device="meta", seed=None)
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].parameters
    assert PRESETS[name].parameters == PUBLISHED.get(name, PRESETS[name].parameters)
    assert (config.model.resolved_head_dim < 64) == (name in SMALL_HEADS)
    for option, value in PRESETS[name].options.items():
        assert [getattr(section, option) for _, section in config if hasattr(section, option)] == [value]


@pytest.mark.parametrize("name", PRESETS)
def test_the_flags_of_the_table_are_the_same_run(name: str) -> None:
    lines = [row.strip("|\n ").split(" | ") for row in preset_table().splitlines()]
    (row,) = (row for row in lines if row[0].startswith(f"`{name}`,"))
    words = [word for column, cell in zip(lines[0], row, strict=True) if "--" in column for word in (column, cell)]
    by_hand = built(*" ".join((*words, row[-1])).replace("`", "").split())
    assert by_hand == built("--preset", name)
    assert by_hand.config_hash() == built("--preset", name).config_hash()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_reference_pages_are_current(path: Path) -> None:
    page = path.read_text()
    assert updated(page) == page, "run: python -m tinytron.cli.config_tables"
    made = {"flags": tables, "presets": preset_table}[path.stem]()
    assert made in page
    assert made in updated(page.replace(made.splitlines()[-1], "| changed by hand |"))


def test_the_sizes_of_the_documentation() -> None:
    sizes = ("num_layer", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    expected = {"0.25b": (12, 32, 4, 1024, 4096), "1b": (24, 64, 8, 2048, 8192), "7b": (32, 128, 16, 4096, 16384)}
    for name, values in expected.items():
        assert tuple(getattr(built("--preset", name).model, size) for size in sizes) == values


def test_each_system_trains_with_its_own_defaults() -> None:
    """The defaults by name change nothing; timl and gpt2fun are what their front ends make of the documented commands."""
    assert built("--preset", "tinytron") == Config()
    timl = dict.fromkeys(("output_dir", "train_file_pattern", "eval_file_pattern"), "x")
    timl |= {"model_name": "gpt2", "block_size": "1024", "train_batch_size": "512", "per_device_train_batch_size": "32"}
    timl |= {"per_device_eval_batch_size": "64", "learning_rate": "6e-4", "weight_decay": "0.1", "adam_beta1": "0.8"}
    timl |= {"adam_beta2": "0.95", "adam_epsilon": "1e-8", "max_grad_norm": "1.0", "warmup_ratio": "0.01"}
    timl |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 0.00001}'}
    timl |= {"save_every_steps": "1000", "eval_every_steps": "100"}
    front_ends = {
        "timl": build_timl([f"--{name}={value}" for name, value in timl.items()]),
        "gpt2fun": build_gpt2fun(["--num_tokens=1000000000", "--data_dir=x"], {}),
    }
    for name, theirs in front_ends.items():
        ours = built("--preset", name)
        assert (ours.model, ours.optim, ours.seed) == (theirs.model, theirs.optim, theirs.seed)
        for option in ("total_batch_size", "batch_size", "seq_len", "grad_clip_value", "precision"):
            assert getattr(ours.train, option) == getattr(theirs.train, option)


def test_theseus_has_two_optimizers() -> None:
    adam, muon = (built("--preset", name) for name in ("theseus", "theseus-muon"))
    assert adam.model == muon.model
    assert adam.train == muon.train
    assert adam.train.total_batch_size == 512 * 512
    assert (adam.optim.optimizer, adam.optim.adam_beta1, adam.optim.weight_decay) == ("adam", 0.9, 0.1)
    multipliers = [getattr(muon.optim, f"{part}_lr_mult") for part in ("matrix", "embedding", "head", "scalar")]
    assert multipliers == [1.0, 15.0, 0.2, 25.0]
    assert (muon.optim.muon_normuon, muon.optim.muon_cautious, muon.optim.weight_decay) == (True, True, 0.0)
    assert (muon.optim.muon_momentum, muon.optim.muon_ns_steps, muon.optim.muon_beta2) == (0.95, 5, 0.95)
    assert (muon.train.grad_clip_value, adam.train.grad_clip_value) == (1.0, 1.0)
    assert (muon.optim.adam_beta1, muon.optim.adam_beta2, muon.optim.adam_eps) == (0.8, 0.95, 1e-10)


def test_the_rates_of_theseus_are_pinned() -> None:
    """optax's linear schedule from 0.01 of the peak over 0.5% of the steps, the peak, and a floor of 0.01 of it."""
    config = built("--preset", "theseus", "--max_steps", 1000)
    info = derive(config, ParallelLayout(1), None)
    rates = build_schedule(config.optim, info)
    assert info.warmup_steps == 5
    warm_up = [3e-4 * (0.01 + 0.99 * step / 5) for step in range(6)]
    assert [rates(step) for step in (*range(6), 990, 999)] == pytest.approx([*warm_up, 3e-4, 3e-6])


@pytest.mark.parametrize(("name", "same"), [("llama", "llama-160m"), ("qwen", "qwen3-0.6b"), ("neox", "pythia-160m")])
def test_a_family_has_a_short_name(name: str, same: str) -> None:
    assert built("--preset", name) == built("--preset", same)


def test_defaults_then_preset_then_files_then_flags(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"num_layer": 7, "max_lr": 0.5, "hidden_size": 128}))
    (tmp_path / "b.json").write_text(json.dumps({"optim": {"max_lr": 0.25}}))
    files = ("--config", tmp_path / "a.json", "--config", tmp_path / "b.json")
    for flags in ((*files, "--num_layer", 9, "--preset", "tiny"), ("--preset=tiny", "--num_layer", 9, *files)):
        config = built(*flags)
        assert (config.model.num_layer, config.optim.max_lr, config.model.hidden_size) == (9, 0.25, 128)
        assert (config.optim.optimizer, config.optim.weight_decay) == ("muon", 0.1)
        assert config.model.block_size == config.train.seq_len == 256
    assert built("--preset", "gpt2", "--seq_len", 64).model.block_size == 64
    assert built("--preset", "gpt2", "--preset", "Tiny") == built("--preset", "tiny")
    assert built("--preset", "0.3B_a0.17B") == built("--preset", "0.3b-a0.17b")


def test_a_file_names_a_preset(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('{"preset": "gpt2", "model": {"num_layer": 3}}')
    config = built("--config", tmp_path / "a.yaml")
    assert config == built("--preset", "gpt2", "--num_layer", 3)
    assert built("--config", tmp_path / "a.yaml", "--preset", "tiny") == built("--preset", "tiny", "--num_layer", 3)
    (tmp_path / "b.json").write_text(as_json(config))
    assert "preset" not in json.loads(as_json(config))
    assert built("--config", tmp_path / "b.json") == config


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            ("--preset", "gtp2"),
            r"--preset gtp2 is unknown; did you mean gpt2\?; use one of tiny, small, .*, 7b, .*, neox$",
        ),
        (("--preset", "gpt_1b"), r"--preset gpt_1b is unknown.* use one of tiny, "),
        (("--preset",), "argument --preset: expected one argument; see --help"),
        (("--preset", "tiny", "--num_layre", "2"), "unknown argument --num_layre; did you mean --num_layer"),
        (("--preset", "tiny", "--init_from", "x"), "--preset tiny .* --init_from x has its own; leave one out"),
        (("--preset", "tiny", "--optimizer", "adam"), "for --optimizer muon; set .* adam, such as --max_lr 0.002$"),
        (("--preset", "gpt2", "--optimizer", "muon"), "for --optimizer adam; set .* muon, such as --max_lr 0.02$"),
        (("--preset", "tiny", "--num_attention_heads", "3"), "--num_key_value_heads 2 must divide"),
    ],
)
def test_mistakes_are_one_error(given: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        built(*given)
    assert "\n" not in str(error.value)


def test_another_optimizer_comes_with_its_own_rate() -> None:
    config = built("--preset", "tiny", "--optimizer", "adam", "--max_lr", 1e-3)
    assert (config.optim.optimizer, config.optim.max_lr, config.model.num_layer) == ("adam", 1e-3, 4)


def test_a_preset_that_a_complete_file_overrules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(as_json(built("--preset", "tiny")))
    with pytest.raises(ConfigError, match=r"--preset gpt2 changes nothing: .* give all of its options; leave one out"):
        built("--config", tmp_path / "run.json", "--preset", "gpt2")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('"gtp2"', r"--config .*a.json: --preset gtp2 is unknown; did you mean gpt2"),
        ("3", "preset must be a name, not 3"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, value: str, text: str) -> None:
    (tmp_path / "a.json").write_text(f'{{"preset": {value}}}')
    with pytest.raises(ConfigError, match=text):
        built("--config", tmp_path / "a.json")
