"""The command line: documented names and defaults, and that every flag changes the configuration."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_config import EXECUTION
from tinytron.errors import ConfigError
from tinytron.training.arguments import USUAL_NAMES, build_config, build_parser, parse_args
from tinytron.training.config import SECTIONS, Config, TrainingConfig
from tinytron.training.config_files import as_json
from tinytron.utils.flags import FieldInfo, config_fields

# Every flag and its default. Where the documentation of the base product states them, they are those, with these
# decisions of ours: one source of defaults, so four booleans are on; saving is on; sep_size 1, which fits every machine;
# mock data when no path is given; the backend follows the device.
DOCUMENTED: dict[str, dict[str, Any]] = {
    "train": {
        "total_batch_size": 524288, "batch_size": 8, "seq_len": 4096, "max_steps": None, "max_epochs": 1, "do_val": False,
        "max_train_tokens": None, "max_eval_tokens": None, "eval_tasks": (), "eval_every": 0, "eval_tokenizer": None,
        "eval_length": None, "eval_data_dir": None,
        "val_every_steps": 250, "split_rate": None, "grad_clip_value": 1.0, "debug": False, "precision": "bf16",
        "use_compile": False, "use_profiler": False, "steps_to_profile": (15, 20), "disable_tf32": False,
        "z_loss_coef": 0.0, "recompute": "none", "attn_backend": "auto", "spike_sigma": 0.0, "spike_window": 100,
        "spike_action": "skip", "replica_check_every": 0, "step_timeout": 0.0, "use_liger_kernel": False,
        "preempt_file": None, "preempt_url": None,
        "use_cut_cross_entropy": False, "use_triton_kernels": False, "total_batch_sequences": None, "fit_batch": False,
        "batch_warmup_sizes": (), "batch_warmup_ends": (), "seq_warmup_lens": (), "seq_warmup_ends": (),
    },
    "logging": {
        "exp_name": "gpt", "log_dir": "./log/", "log_every": 10, "print_config": "no", "moe_router_debug": False,
        "moe_route_trace": False, "dry_run": False, "dry_run_world_size": None,
        "loggers": ("console", "log", "jsonl", "messages"), "log_phases": True, "save_plots": True, "wandb_project": None,
        "wandb_run_name": None, "wandb_group": None, "wandb_mode": None,
        "log_norms": False, "log_activations": False, "log_attention": False, "log_loss_by_position": False,
    },
    "seed": {"seed": 1337, "deterministic": False},
    "data": {
        "dataset_path": None, "use_mock_data": False, "mock_data_num_samples": 1280, "num_workers": 0, "pin_memory": True,
        "token_dtype": None, "document_mask": False, "cross_document_loss": True, "packing": "concat", "eot_id": None,
        "eot_position": "prepend", "prefetch": 2, "val_dataset_path": None,
    },
    "optim": {
        "max_lr": 4e-3, "min_lr": 3e-5, "warmup_steps": 1000, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95,
        "adam_eps": 1e-8, "optimizer": "adam", "muon_momentum": 0.95, "muon_ns_steps": 5, "muon_normuon": False,
        "muon_beta2": 0.95, "muon_cautious": False, "matrix_lr_mult": 1.0, "embedding_lr_mult": 1.0, "head_lr_mult": 1.0,
        "scalar_lr_mult": 1.0, "lr_schedule": "cosine", "wsd_decay_fraction": 0.1, "wsd_decay_shape": "cosine",
        "wsds_constant_fraction": 0.5,
        "decay_embeddings": True, "decay_all": False, "warmup_ratio": 0.0, "lr_power": 1.0, "lr_cycles": 1,
        "layer_lr_decay": 1.0, "ema_decay": 0.0, "weight_decay_schedule": "constant", "weight_decay_end": 0.0,
        "warmup_start": None, "lr_stages": (), "rewarm_lr": 1e-4,
    },
    "ckpt": {
        **{"do_save": True, "save_every_steps": 5000, "resume": True, "resume_path": None},
        **{"init_from": None, "hf_model": None, "async_save": True, "keep_last": 0, "keep_every": 0, "keep_best": False},
        "best_metric": None,
        **{"export_every": 0, "hub_model_id": None, "hub_private": True, "export_dir": None, "save_at_start": False},
    },
    "parallel": {
        "backend": "auto", "init_method": "env://", "sep_size": 1, "ddp_find_unused_parameters": False,
        "ddp_gradient_as_bucket_view": True, "use_distributed_optimizer": True, "ep_size": 0, "bucket_size_mb": 64.0,
        "overlap_grad_reduce": True, "overlap_param_gather": True, "grad_reduce_dtype": "fp32", "print_topology": False,
    },
    "model": {
        "block_size": 4096, "vocab_size": 50304, "num_layer": 32, "num_attention_heads": 128, "num_key_value_heads": 8,
        "hidden_size": 1024, "intermediate_size": 4096, "dropout": 0.0, "init_std": 0.013, "tied_lm_head": True,
        "head_dim": None, "rope_theta": 10000.0, "qk_norm": False, "bias": False, "norm_eps": 1e-6, "use_moe": False,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 256, "num_shared_experts": 0,
        "first_k_dense": 0, "moe_router_score": "softmax", "norm_topk_prob": True, "moe_aux_loss_coef": 0.01,
        "moe_aux_loss_scope": "sequence", "moe_z_loss_coef": 0.0, "moe_bias_update_rate": 0.0, "dense_layers": (),
        "mlp_type": "swiglu", "norm_type": "rms", "parallel_residual": False, "qkv_bias": False, "attention_bias": False,
        "mlp_bias": False, "position_type": "rotary", "rotary_fraction": 1.0, "rope_scaling": "none",
        "rope_scaling_factor": 1.0, "rope_original_block_size": None, "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0, "rope_attention_factor": None,
        "sliding_window": 0, "sliding_window_layers": (), "mup_base_width": 0,
    },
}  # fmt: skip

FIELDS = [(section, info) for section, cls in SECTIONS.items() for info in config_fields(cls)]
BOOLEANS = [(section, info) for section, info in FIELDS if info.type is bool]
# init_from and hf_model have their tests in tests/interop/test_init_from.py and test_causal_lm.py.
OTHER_FIELDS = ("init_from", "hf_model", "total_batch_sequences")  # they set other fields, and have their own tests
BY_NAME = [pytest.param(section, info, id=info.name) for section, info in FIELDS if info.name not in OTHER_FIELDS]

# Another valid value, where "the next one" breaks a rule or there is no number to start from.
OTHER = {
    "loggers": ("console", "wandb"),
    "wandb_project": "mine",
    "wandb_run_name": "first",
    "wandb_group": "all",
    "lora_targets": ("attn",),
    "total_batch_size": 1048576,
    "seq_len": 2048,
    "max_steps": 5,
    "dry_run_world_size": 64,
    "max_train_tokens": 10**7,
    "max_eval_tokens": 10**6,
    "eot_id": 0,
    "split_rate": 0.5,
    "warmup_ratio": 0.01,
    "warmup_start": 0.01,
    "seq_warmup_lens": (128, 256),
    "seq_warmup_ends": (10, 20),
    "batch_warmup_sizes": (4096, 8192),
    "batch_warmup_ends": (10, 20),
    "weight_decay_end": 0.01,
    "ema_decay": 0.5,
    "lr_stages": (0.5, 0.75),
    "hidden_size": 2048,
    "num_attention_heads": 64,
    "num_key_value_heads": 16,
    "head_dim": 16,
    "block_size": 8192,
    "dropout": 0.1,
    "z_loss_coef": 1e-4,
    "moe_z_loss_coef": 1e-4,
    "moe_bias_update_rate": 1e-3,
    "dataset_path": "shards",
    "val_dataset_path": "held_out",
    "resume_path": "log/run",
    "spike_sigma": 6.0,
    "step_timeout": 600.0,
    "preempt_file": "notice",
    "preempt_url": "http://169.254.169.254/latest/meta-data/spot/instance-action",
    "eval_tasks": ("sky.jsonl", "sea.jsonl"),
    "eval_length": 100,
    "dense_layers": (1, 3),
    "sliding_window_layers": (1, 3),
    "rope_original_block_size": 1024,
    "rope_attention_factor": 1.5,
    "rope_scaling": "linear",
    "export_every": 10000,
    "hub_model_id": "lab/model",
    "export_dir": "exports",
}

NEEDED = {
    "seq_warmup_lens": ["--seq_warmup_lens", "64", "64", "--seq_warmup_ends", "5", "6"],
    "seq_warmup_ends": ["--seq_warmup_lens", "64", "64", "--seq_warmup_ends", "5", "6"],
    "batch_warmup_sizes": ["--batch_warmup_sizes", "4096", "4096", "--batch_warmup_ends", "5", "6"],
    "batch_warmup_ends": ["--batch_warmup_sizes", "4096", "4096", "--batch_warmup_ends", "5", "6"],
    "seq_len": ["--block_size", "5000"],
    "sliding_window_layers": ["--sliding_window", "8"],
    "weight_decay_end": ["--weight_decay_schedule", "cosine"],
    "lr_stages": ["--lr_schedule", "cosine_rewarm", "--lr_stages", "0.25"],
    "hub_model_id": ["--export_every", "5000"],
    "export_dir": ["--export_every", "5000"],
    "val_dataset_path": ["--dataset_path", "shards"],
    "dry_run_world_size": ["--dry_run"],
    **{
        name: ["--loggers", "console", "wandb"]
        for name in ("wandb_project", "wandb_run_name", "wandb_group", "wandb_mode")
    },
    "lora_rank": ["--resume_path", "run"],
    "lora_alpha": ["--resume_path", "run", "--lora_rank", "8"],
    "lora_targets": ["--resume_path", "run", "--lora_rank", "8"],
    "spike_action": ["--spike_sigma", "6"],
    "eval_every": ["--eval_tasks", "sky.jsonl"],
    "eval_tokenizer": ["--eval_tasks", "sky.jsonl"],
    "eval_length": ["--eval_tasks", "sky.jsonl"],
    "eval_data_dir": ["--eval_tasks", "sky.jsonl"],
}


def another(info: FieldInfo) -> Any:
    if info.name in OTHER:
        return OTHER[info.name]
    if info.choices is not None:
        return next(choice for choice in info.choices if choice != info.default)
    if info.type is bool:
        return not info.default
    if isinstance(info.default, tuple):
        return tuple(value + 1 for value in info.default)
    if info.type is int:
        return info.default + 1
    return info.default / 2 if info.type is float else "other"


def argv(info: FieldInfo, value: Any) -> list[str]:
    if info.type is bool:
        return [f"--{info.name}" if value else f"--no-{info.name}"]
    return [f"--{info.name}", *(str(v) for v in (value if isinstance(value, tuple) else [value]))]


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError, match=r"^.+$") as caught:
        build_config(parse_args(arguments))
    return str(caught.value)


def test_documented_names_and_defaults() -> None:
    found = build_config(parse_args([])).as_dict()
    for section, documented in DOCUMENTED.items():
        assert found[section] == documented
    assert {"bf16", "fp16", "fp32"} <= set(next(i.choices or () for _, i in FIELDS if i.name == "precision"))


def test_the_command_line_has_the_defaults_of_the_dataclasses() -> None:
    assert build_config(parse_args([])) == Config()


def test_no_name_stands_in_two_sections() -> None:
    assert len({info.name for _, info in FIELDS}) == len(FIELDS)
    assert {f"{s}" for s, _ in FIELDS} == set(Config().as_dict())


@pytest.mark.parametrize(("section", "info"), BY_NAME)
def test_every_flag_changes_its_field_and_nothing_else(section: str, info: FieldInfo) -> None:
    value = another(info)
    assert value != info.default
    needed = NEEDED.get(info.name, [])  # beside the flag, with what the comparison begins
    built, plain = build_config(parse_args([*needed, *argv(info, value)])), build_config(parse_args(needed))
    expected = plain.as_dict()
    expected[section][info.name] = value
    assert built.as_dict() == expected
    assert type(getattr(getattr(built, section), info.name)) is type(value)
    same_run = built.config_hash() == plain.config_hash()
    assert same_run == (info.name in EXECUTION[section])


@pytest.mark.parametrize(("section", "info"), [pytest.param(s, i, id=i.name) for s, i in BOOLEANS])
def test_booleans_have_three_spellings(section: str, info: FieldInfo) -> None:
    for flag, value in ((f"--{info.name}", True), (f"--no-{info.name}", False), (f"--no_{info.name}", False)):
        assert getattr(parse_args([flag]), info.name) is value
        assert getattr(parse_args(["--no-" + info.name, "--" + info.name, flag]), info.name) is value  # the last counts


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--num_layers", "3"], "unknown argument --num_layers; did you mean --num_layer?; see --help"),
        (["--num-layer", "3"], "unknown argument --num-layer; did you mean --num_layer?; see --help"),
        (["--seq-len=1234567890123"], "unknown argument --seq-len=1234567890123; did you mean --seq_len?; see --help"),
        (["--no_resum"], "unknown argument --no_resum; did you mean --no_resume?; see --help"),
        (["--num_laye", "3"], "unknown argument --num_laye; did you mean --num_layer?; see --help"),
        (["--zzz"], "unknown argument --zzz; see --help"),
        (["--learning_rate", "1"], "unknown argument --learning_rate; it is --max_lr here; see --help"),
        (["--learning-rate=1"], "unknown argument --learning-rate=1; it is --max_lr here; see --help"),
        (["train"], "unknown argument train; see --help"),
    ],
)
def test_an_unknown_flag_names_the_nearest(arguments: list[str], text: str) -> None:
    assert refusal(*arguments) == text


def test_names_of_other_programs_lead_to_flags_that_there_are() -> None:
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert not known & USUAL_NAMES.keys()
    named = {word.rstrip(",") for hint in USUAL_NAMES.values() for word in hint.split() if word.startswith("--")}
    assert named <= known


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--seq_len", "long"],
            "argument --seq_len: 'long' is not a whole number like 1000000, 1e6 or 2**20; see --help",
        ),
        (
            ["--seq_len", "1.5e0"],
            "argument --seq_len: '1.5e0' is not a whole number like 1000000, 1e6 or 2**20; see --help",
        ),
        (["--max_lr", "high"], "argument --max_lr: invalid float value: 'high'; see --help"),
        (["--seq_len"], "argument --seq_len: expected one argument; see --help"),
        (["--steps_to_profile", "1"], "argument --steps_to_profile: expected 2 arguments; see --help"),
        (["--precision", "int8"], "argument --precision: invalid choice: 'int8' (choose from "),
    ],
)
def test_a_value_of_the_wrong_type_is_told(arguments: list[str], text: str) -> None:
    assert refusal(*arguments).startswith(text)


def test_negative_numbers_are_values_not_flags() -> None:
    assert refusal("--max_lr", "-0.5") == "--max_lr -0.5 must be in 0..1000"


def test_arguments_default_to_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--num_layer", "3"])
    assert parse_args().num_layer == 3


def test_help_all_shows_every_flag_with_its_text_unit_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help-all"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for section, info in FIELDS:
        assert f"--[no-]{info.name}" in shown if info.type is bool else f"--{info.name}" in shown
        assert " ".join(info.flag.text.split()) in shown
        assert f"{section}:" in shown
    assert "global batch per optimizer step [tokens] (default: 524288)" in shown


def test_every_flag_is_a_field() -> None:
    """Nothing stands on the command line that the dataclasses do not know."""
    names = {action.dest for action in build_parser()._actions}
    assert names == {info.name for _, info in FIELDS} | {"help", "help_all", "config", "preset"}


def test_the_configuration_is_shown_with_its_hash() -> None:
    config = build_config(parse_args(["--num_layer", "5"]))
    shown = json.loads(as_json(config))
    assert shown.pop("config_hash") == config.config_hash()
    assert shown == json.loads(json.dumps(config.as_dict()))


def test_the_longest_sequence_is_that_of_training_unless_it_is_given() -> None:
    assert build_config(parse_args(["--seq_len", "64", "--total_batch_size", "1024"])).model.block_size == 64
    assert build_config(parse_args(["--seq_len", "64", "--block_size", "96"])).model.block_size == 96
    assert build_config(parse_args([])).model.block_size == 4096


def test_paths_are_read_as_the_shell_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert build_config(parse_args(["--log_dir=~/runs"])).logging.log_dir == "/home/me/runs"
    tasks = build_config(parse_args(["--eval_tasks", "~/a.jsonl", "b.jsonl"])).train.eval_tasks
    assert tasks == ("/home/me/a.jsonl", "b.jsonl")


@pytest.mark.parametrize(("text", "value"), [("1e6", 10**6), ("1.5e6", 1_500_000), ("1E+3", 1000), ("2**27", 2**27)])
def test_whole_numbers_may_be_written_with_an_exponent(text: str, value: int) -> None:
    assert parse_args(["--max_train_tokens", text]).max_train_tokens == value


def test_only_paths_begin_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    args = parse_args(["--exp_name=~a", "--log_dir=~/runs", "--eval_tasks", "~/a.jsonl", "b.jsonl"])
    assert (args.exp_name, args.log_dir, args.eval_tasks) == ("~a", "/home/me/runs", ["/home/me/a.jsonl", "b.jsonl"])


@pytest.mark.parametrize("text", [str(2**63), "2**63", "10**64", "9.3e18"])
def test_whole_numbers_have_64_bits(text: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"--seed: {re.escape(text)} has more than 64 bits; use -{2**63} to {2**63 - 1}"
    ):
        parse_args(["--seed", text])


@pytest.mark.parametrize("text", ["1.5", "1.55e1", "1e400", "1e-3", "e6"])
def test_other_numbers_are_not_whole(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a whole number"):
        parse_args(["--max_train_tokens", text])


@pytest.mark.parametrize("name", ["max_lr", "weight_decay", "z_loss_coef", "init_std", "spike_sigma"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{name} {value} must be"):
        build_config(parse_args([f"--{name}", value]))
    assert build_config(parse_args(["--grad_clip_value", "inf"])).train.grad_clip_value == float("inf")


@pytest.mark.parametrize("name", ["max_lr", "min_lr", "weight_decay", "adam_eps", "z_loss_coef", "embedding_lr_mult"])
def test_amounts_that_fp32_turns_into_infinity_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{name} 1e\+300 must be in 0\.\."):
        build_config(parse_args([f"--{name}", "1e300"]))


def batch_of(*arguments: str) -> int:
    train = build_config(parse_args(arguments)).train
    assert train.total_batch_sequences is None  # so that the saved configuration has the batch once
    return train.total_batch_size


def test_the_global_batch_may_be_given_in_sequences(tmp_path: Path) -> None:
    assert batch_of("--total_batch_sequences", "6", "--seq_len", "64") == 6 * 64
    assert batch_of("--preset", "tiny", "--total_batch_sequences", "3") == 3 * 256  # instead of the preset's
    file = tmp_path / "options.yaml"
    file.write_text("train:\n  total_batch_sequences: 5\n  seq_len: 32\n", encoding="utf-8")
    assert batch_of("--config", str(file)) == 160
    assert batch_of("--config", str(file), "--seq_len", "16", "--total_batch_sequences", "2") == 32
    assert TrainingConfig(total_batch_sequences=4, seq_len=8).total_batch_size == 32
    given, same = ("--seq_len", "64", "--total_batch_sequences", "6"), ("--seq_len", "64", "--total_batch_size", "384")
    assert build_config(parse_args(given)) == build_config(parse_args(same))


@pytest.mark.parametrize("tokens", ["524288", "384", "100"])
def test_the_global_batch_in_both_units_is_an_error(tokens: str, tmp_path: Path) -> None:
    text = f"--total_batch_sequences 6 and --total_batch_size {tokens} (tokens) both set the global batch; leave one of"
    assert refusal("--seq_len", "64", "--total_batch_sequences", "6", "--total_batch_size", tokens).startswith(text)
    file = tmp_path / "options.json"
    file.write_text(f'{{"total_batch_size": {tokens}}}', encoding="utf-8")
    assert refusal("--config", str(file), "--seq_len", "64", "--total_batch_sequences", "6").startswith(text)
    with pytest.raises(ConfigError, match="--total_batch_sequences 6 and --total_batch_size 100"):
        TrainingConfig(total_batch_sequences=6, seq_len=64, total_batch_size=100)


def test_a_batch_of_no_sequences_is_an_error() -> None:
    assert refusal("--total_batch_sequences", "0") == "--total_batch_sequences 0 must be at least 1; use 128"
    assert "--seq_len 0 must be at least 1" in refusal("--total_batch_sequences", "4", "--seq_len", "0")
