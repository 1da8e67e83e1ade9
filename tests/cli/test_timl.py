"""timl's flags: units, translations, and one clear line for what is not available."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tinytron.cli.timl import REDACTED, SETTINGS, PretrainModel, build_config_of, without_token
from tinytron.cli.timl_translation import model_options
from tinytron.cli.tokenize import into_cache_dir
from tinytron.errors import ConfigError
from tinytron.text.options import parse_options
from tinytron.training.hf_model import KNOWN
from tinytron.training.presets import PRESETS

REQUIRED = {
    **{"model_name": "gpt2", "output_dir": "out", "train_file_pattern": "t", "eval_file_pattern": "v"},
    **{"block_size": 128, "train_batch_size": 32, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8},
    **{"learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8},
    **{"lr_scheduler_type": "cosine", "save_every_steps": 10, "eval_every_steps": 5},
}


def built(world_size: int = 1, **flags: Any) -> Any:
    values = {name: value for name, value in {**REQUIRED, **flags}.items() if value is not None}
    shown = {name: json.dumps(v) if isinstance(v, (dict, bool)) else v for name, v in values.items()}
    return build_config_of([f"--{name}={value}" for name, value in shown.items()], world_size)


def test_every_setting_names_an_option() -> None:
    paths = {option.path for option in PretrainModel.options()}
    assert {setting.alias.path for setting in SETTINGS.values() if setting.alias} <= paths


@pytest.mark.parametrize(
    ("flags", "section", "expected"),
    [
        ({}, "train", {"total_batch_size": 32 * 128, "batch_size": 4, "grad_clip_value": 0.0, "precision": "bf16"}),
        ({}, "optim", {"weight_decay": 0.0, "min_lr": 0.0, "warmup_steps": 0, "warmup_ratio": 0.0}),
        ({"bf16": False}, "train", {"precision": "fp32"}),
        ({"max_train_tokens": 10**6, "max_train_steps": 7}, "train", {"max_train_tokens": None, "max_steps": 7}),
        ({"max_train_tokens": 10**4, "max_train_steps": 7}, "train", {"max_train_tokens": None, "max_steps": 3}),
        ({"max_train_tokens": 10**6}, "train", {"max_train_tokens": 10**6, "max_steps": None}),
        ({"max_eval_tokens": 999}, "train", {"max_eval_tokens": 999}),
        ({"max_eval_steps": 3}, "train", {"max_eval_tokens": 3 * 8 * 128}),
        ({"max_eval_steps": 3, "world_size": 2}, "train", {"max_eval_tokens": 3 * 8 * 128 * 2}),
        ({"max_eval_steps": 3, "max_eval_tokens": 100}, "train", {"max_eval_tokens": 100}),
        ({"eval_every_steps": 0}, "train", {"do_val": False}),
        ({"eval_every_steps": -1}, "train", {"do_val": False}),
        ({"save_every_steps": 0}, "ckpt", {"do_save": False, "export_every": 0, "save_at_start": False}),
        ({"log_every_steps": 0}, "logging", {"log_every": 10**9}),
        ({"debug": True, "push_to_hub": True, "hub_model_id": "a/b"}, "ckpt", {"do_save": False, "hub_model_id": None}),
        ({"debug": True, "max_train_steps": 9}, "train", {"debug": True, "max_steps": 1}),
        ({"hub_model_id": "a/b"}, "ckpt", {"hub_model_id": None}),
        ({"full_determinism": True, "seed": 3}, "seed", {"seed": 3, "deterministic": True}),
        ({"gradient_accumulation_steps": 4, "world_size": 2}, "train", {"batch_size": 4}),
        ({"attn_implementation": "eager"}, "train", {"attn_backend": "math"}),
        ({"use_liger_kernel": True, "liger_kernel_kwargs": {"rope": False}, "model_name": "Qwen/Qwen3-0.6B"}, "train",
         {"use_liger_kernel": True}),
        ({"use_cut_cross_entropy": True, "cut_cross_entropy_kwargs": {"impl": "cce"}}, "train",
         {"use_cut_cross_entropy": True}),
        ({"forward_kwargs": {}}, "seed", {"seed": 0}),
    ],
)  # fmt: skip
def test_flags_and_their_units(flags: dict[str, Any], section: str, expected: dict[str, Any]) -> None:
    options = dataclasses.asdict(built(**flags)[section])
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("linear", {}, {"lr_schedule": "linear", "min_lr": 0.0, "warmup_ratio": 0.1}),
        ("cosine", {"num_cycles": 0.5}, {"lr_schedule": "cosine", "min_lr": 0.0}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"lr_schedule": "cosine", "min_lr": 1e-4}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-5}, {"lr_schedule": "cosine", "min_lr": 1e-5}),
        ("cosine_with_restarts", {"num_cycles": 3}, {"lr_schedule": "cosine_with_restarts", "lr_cycles": 3}),
        ("polynomial", {"power": 2}, {"lr_schedule": "polynomial", "lr_power": 2.0, "min_lr": 1e-7}),
        ("polynomial", {"lr_end": 1e-6}, {"lr_power": 1.0, "min_lr": 1e-6}),
        ("constant", {}, {"lr_schedule": "constant", "warmup_ratio": 0.0, "warmup_steps": 0}),
        ("constant_with_warmup", {}, {"lr_schedule": "constant", "warmup_ratio": 0.1}),
        ("inverse_sqrt", {}, {"lr_schedule": "inverse_sqrt", "warmup_ratio": 0.1}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 20, "decay_type": "1-sqrt", "min_lr_ratio": 0.5},
            {"lr_schedule": "wsd", "wsd_decay_fraction": 0.2, "wsd_decay_shape": "sqrt", "min_lr": 5e-4},
        ),
    ],
)
def test_schedulers_and_their_settings(name: str, kwargs: dict[str, Any], expected: dict[str, Any]) -> None:
    config = built(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_ratio=0.1, max_train_steps=100)
    found = dataclasses.asdict(config.optim)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_steps_of_warm_up_win_over_the_ratio() -> None:
    optim = built(warmup_steps=7, warmup_ratio=0.1).optim
    assert (optim.warmup_steps, optim.warmup_ratio) == (7, 0.0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"model_name": None, "block_size": None}, "--model_name, --block_size are required; give --model_name gpt2"),
        ({"learning_rat": 1}, "did you mean --learning_rate?"),
        ({"lr_scheduler_kwargs": "{1"}, "'{1' is not a JSON object like '{\"min_lr\": 1e-5}'"),
        ({"train_batch_size": 30}, "--train_batch_size 30 must be a multiple of --per_device_train_batch_size 4 x 1"),
        ({"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps 3 disagrees with --train_batch_size 32"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size 0 must be at least 1"),
        (
            {"block_size": 2048},
            "--block_size 2048 exceeds the 1024 positions of --model_name gpt2; use --block_size 1024",
        ),
        ({"optim": "sgd"}, "--optim sgd is not available; use one of adamw_torch, adamw_torch_fused"),
        ({"lr_scheduler_type": "greedy"}, "--lr_scheduler_type greedy is not available; use one of linear, cosine"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "min_lr is not a setting of cosine; it has num_cycles"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}}, "a setting of linear; it has none"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "num_cycles 2 of cosine must be 0.5, half a wave"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs one of min_lr and min_lr_rate"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "low"}},
            "min_lr low must be a number",
        ),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 1.5}},
            "num_cycles 1.5 of cosine_with_restarts must be a whole number",
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 50}},
            "timescale 50 must be the warm-up, or 10000 without one; use --warmup_steps 50",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps, at most the steps of the run"),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "x"},
                "max_train_steps": 9,
            },
            "decay_type x is unknown; use one of linear, cosine, 1-sqrt",
        ),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 2, "warmup_type": "cosine"},
                "max_train_tokens": 90000,
            },
            "warmup_type cosine is not available; use linear",
        ),
        (
            {"attn_implementation": "flex_attention"},
            "--attn_implementation flex_attention is not available; use one of",
        ),
        ({"push_to_hub": True}, "--push_to_hub true needs a repository; give --hub_model_id owner/name"),
        ({"push_to_hub": True, "hub_model_id": "a/b", "save_every_steps": 0}, "and --save_every_steps 0 makes none"),
        ({"forward_kwargs": {"num_items_in_batch": 3}}, "--forward_kwargs num_items_in_batch: Tinytron's own model"),
        ({"liger_kernel_kwargs": {"warp": True}}, "--liger_kernel_kwargs: warp is unknown; use rms_norm, swiglu"),
        ({"liger_kernel_kwargs": {"rope": True}}, "rope is always false here"),
        ({"cut_cross_entropy_kwargs": {"filter_eps": 0}}, "--cut_cross_entropy_kwargs: filter_eps 0 is not available"),
    ],
)
def test_mistakes_are_one_line(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(**flags)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# Models.


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_the_sizes_of_their_presets(name: str) -> None:
    options = model_options(name, 16)
    expected = PRESETS[KNOWN[name].preset].options
    sizes = ("num_layer", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [options[f"model.{key}"] for key in sizes] == [expected[key] for key in sizes]
    assert options["model.block_size"] == KNOWN[name].block_size


def write(folder: Path, **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


LLAMA = {
    **{"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.0, "initializer_range": 0.5},
}


def test_other_models_are_what_their_config_says(tmp_path: Path) -> None:
    model = built(model_name=write(tmp_path / "m", **LLAMA)).model
    assert (model.hidden_size, model.norm_type, model.position_type) == (16, "rms", "rotary")
    assert (model.dropout, model.init_std) == (0.0, 0.5)
    assert model.block_size == 128  # longer than it says, which rotary positions allow
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": 64}
    assert built(model_name=write(tmp_path / "g", **gpt2)).model.dropout == 0.1  # the default of that family
    for config, text in (
        (
            gpt2 | {"attn_pdrop": 0.2},
            r"resid_pdrop 0\.1, embd_pdrop 0\.1, attn_pdrop 0\.2, but the model has one dropout",
        ),
        (
            LLAMA | {"attention_dropout": 0.2},
            r"hidden_dropout 0\.0, attention_dropout 0\.2, but the model has one dropout",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            built(model_name=write(tmp_path / "other", **config))


def test_a_family_that_is_not_known_names_those_that_are(tmp_path: Path) -> None:
    name = write(tmp_path / "m", model_type="no_such", hidden_size=16)
    with pytest.raises(ConfigError, match=rf"--model_name {name}: .*no_such.*known without a config\.json: gpt2"):
        built(model_name=name)


def test_other_families_are_built_by_transformers(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "vocab_size": 61}
    name = write(tmp_path / "m", model_type="mamba", hidden_size=16, state_size=4, **sizes)
    config = built(model_name=name)
    assert config.ckpt.hf_model == str(name)
    assert config.model.vocab_size == 61


def test_the_token_is_not_kept() -> None:
    assert without_token(["--a", "1", "--hub_token", "x", "--b"]) == (["--a", "1", "--hub_token", REDACTED, "--b"], "x")
    assert without_token(["--hub_token=x"]) == ([f"--hub_token={REDACTED}"], "x")
    assert without_token(["--seed", "1"]) == (["--seed", "1"], None)


# The folder of the shards.


def test_the_shards_go_to_the_cache_dir_unless_there_is_an_output_dir() -> None:
    text = ["--dataset_path", "c4", "--encoding_name", "gpt2"]
    alone = into_cache_dir(parse_options([*text, "--cache_dir", "data/c4"]))
    assert (alone.folder, alone.cache_dir) == (Path("data/c4"), "data/c4/hub")
    for flags in (["--output_dir", "out"], ["--output_dir", "out", "--cache_dir", "cache"], []):
        options = parse_options([*text, *flags])
        assert into_cache_dir(options) == options
