"""Every rule on options with the text of its error, that the proposed value works, and what the hash is made of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

import pytest

from tests.helpers.errors import says
from tinytron.errors import ConfigError
from tinytron.model.config import ModelConfig
from tinytron.training.arguments import build_config, parse_args
from tinytron.training.config import SECTIONS, CkptConfig, Config, OptimConfig, TrainingConfig
from tinytron.utils.flags import config_fields


def build(flags: str = "") -> Config:
    return build_config(parse_args(flags.split()))


def refusal(flags: str) -> str:
    with pytest.raises(ConfigError, match=r"^.+$") as caught:  # one line
        build(flags)
    return str(caught.value)


AT_LEAST_ONE = [
    "total_batch_size",
    "seq_len",
    "max_epochs",
    "mock_data_num_samples",
    "sep_size",
    "log_every",
    "max_steps",
    "max_train_tokens",
    "max_eval_tokens",
    "muon_ns_steps",
    "spike_window",
]
AT_LEAST_ZERO = [
    "keep_last",
    "keep_every",
    "val_every_steps",
    "grad_clip_value",
    "z_loss_coef",
    "max_lr",
    "min_lr",
    "rewarm_lr",
    "warmup_steps",
    "weight_decay",
    "weight_decay_end",
    "adam_eps",
    "matrix_lr_mult",
    "embedding_lr_mult",
    "head_lr_mult",
    "scalar_lr_mult",
    "ep_size",
    "num_workers",
    "prefetch",
    "eot_id",
    "eval_every",
    "save_every_steps",
    "spike_sigma",
    "replica_check_every",
    "step_timeout",
]


@pytest.mark.parametrize("name", AT_LEAST_ONE)
def test_counts_are_at_least_one(name: str) -> None:
    for value in (0, -3):
        assert refusal(f"--{name} {value}") == f"--{name} {value} must be at least 1"
    build(f"--seq_len 1 --{name} 1")


@pytest.mark.parametrize("name", AT_LEAST_ZERO)
def test_amounts_are_not_negative(name: str) -> None:
    assert re.fullmatch(rf"--{name} -1(\.0)? must be (at least 0|in 0\.\.1(000|000000\.0)?)", refusal(f"--{name} -1"))
    build(f"--min_lr 0 --{name} 0")


@pytest.mark.parametrize(
    "name",
    [
        "grad_clip_value", "z_loss_coef", "max_lr", "min_lr", "rewarm_lr", "weight_decay", "weight_decay_end", "adam_eps",
        "matrix_lr_mult", "embedding_lr_mult", "head_lr_mult", "scalar_lr_mult", "spike_sigma", "step_timeout",
    ],
)  # fmt: skip
def test_amounts_are_numbers(name: str) -> None:
    assert re.match(rf"--{name} nan must be (at least 0|in 0\.\.\d[\d.]*); use ", refusal(f"--{name} nan"))


@pytest.mark.parametrize(
    ("flags", "text", "works"),
    [
        (
            "--seq_len 8192 --total_batch_size 16384 --block_size 4096",
            "--seq_len 8192 exceeds --block_size 4096; use --block_size 8192",
            "--seq_len 8192 --total_batch_size 16384 --block_size 8192",
        ),
        (
            "--preempt_url notice.txt",
            "--preempt_url notice.txt must begin with http:// or https://; use --preempt_file for a file",
            "--preempt_file notice.txt",
        ),
        (
            "--attn_backend varlen --precision fp32",
            "--attn_backend varlen ... --precision fp32 ... use bf16 ... --attn_backend sdpa",
            "--attn_backend varlen --precision bf16",
        ),
        (
            "--attn_backend varlen --dropout 0.1",
            "--dropout 0.1 ... --attn_backend varlen ... --dropout 0 ... --attn_backend sdpa",
            "--attn_backend varlen --dropout 0",
        ),
        (
            "--attn_backend varlen --head_dim 50",
            "--attn_backend varlen ... --head_dim ... 8 ... 256 ... 50 ... use 56 ... --attn_backend sdpa",
            "--attn_backend varlen --head_dim 56",
        ),
        (
            "--attn_backend varlen --head_dim 264",
            "--attn_backend varlen ... --head_dim ... 8 ... 256 ... 264 ... use 256 ... --attn_backend sdpa",
            "--attn_backend varlen --head_dim 256",
        ),
        (
            "--use_liger_kernel --precision fp64",
            "--use_liger_kernel ... --precision fp64 ... use fp32 ... drop the flag",
            "--use_liger_kernel --precision fp32",
        ),
        (
            "--use_liger_kernel --use_compile",
            "--use_liger_kernel ... --use_compile ... drop one ...",
            "--use_liger_kernel",
        ),
        (
            "--use_liger_kernel --norm_type layer --mlp_type gelu",
            "--use_liger_kernel ... --norm_type layer ... --mlp_type gelu ... use rms or swiglu ... drop the flag",
            "--use_liger_kernel --mlp_type gelu",
        ),
        (
            "--use_triton_kernels --precision fp64",
            "--use_triton_kernels ... --precision fp64 ... use fp32 ... drop the flag",
            "--use_triton_kernels --precision fp32",
        ),
        (
            "--use_triton_kernels --use_cut_cross_entropy",
            "--use_triton_kernels ... --use_cut_cross_entropy ... --optimizer adam ... no experts ... drop one ...",
            "--use_triton_kernels --use_cut_cross_entropy --optimizer muon",
        ),
        (
            "--use_triton_kernels --use_cut_cross_entropy --use_moe --use_compile",
            "--use_triton_kernels ... --use_cut_cross_entropy ... --optimizer adam ... --use_compile ... drop one ...",
            "--use_triton_kernels --use_cut_cross_entropy --use_moe",
        ),
        *(
            (
                f"--use_cut_cross_entropy --precision {precision}",
                f"--use_cut_cross_entropy ... --precision {precision} ... use bf16 ... drop the flag",
                "--use_cut_cross_entropy --precision bf16",
            )
            for precision in ("fp32", "fp64")
        ),
        (
            "--use_cut_cross_entropy --z_loss_coef 0.001",
            "--z_loss_coef 0.001 ... --use_cut_cross_entropy ... use 0 ... drop the flag",
            "--use_cut_cross_entropy --z_loss_coef 0",
        ),
        (
            "--use_cut_cross_entropy --deterministic",
            "--deterministic ... --use_cut_cross_entropy ... drop one ...",
            "--use_cut_cross_entropy",
        ),
        (
            "--dry_run_world_size 64",
            "--dry_run_world_size 64 ... --dry_run ... drop this one",
            "--dry_run_world_size 64 --dry_run",
        ),
        (
            "--dry_run --dry_run_world_size 0",
            "--dry_run_world_size 0 must be at least 1",
            "--dry_run --dry_run_world_size 1",
        ),
        (
            "--total_batch_size 10000",
            "--total_batch_size 10000 ... --seq_len 4096 ... use 8192",
            "--total_batch_size 8192",
        ),
        (
            "--total_batch_size 100",
            "--total_batch_size 100 ... --seq_len 4096 ... use 4096",
            "--total_batch_size 4096",
        ),
        (
            "--min_lr 0.01 --max_lr 0.002",
            "--min_lr 0.01 exceeds --max_lr 0.002; use at most 0.002",
            "--min_lr 0.002 --max_lr 0.002",
        ),
        (
            "--lr_schedule cosine_rewarm",
            "--lr_schedule cosine_rewarm needs ... use --lr_stages 0.5",
            "--lr_schedule cosine_rewarm --lr_stages 0.5",
        ),
        *(
            (
                f"--lr_schedule cosine_rewarm --lr_stages {stages}",
                f"--lr_stages {stages} must be increasing fractions between 0 and 1; use 0.5 0.75",
                "--lr_schedule cosine_rewarm --lr_stages 0.5 0.75",
            )
            for stages in ("0.0", "0.5 0.5", "0.75 0.5", "1.0", "nan")
        ),
        (
            "--lr_stages 0.5",
            "--lr_stages 0.5 is for --lr_schedule cosine_rewarm, not cosine; drop one of them",
            "--lr_stages 0.5 --lr_schedule cosine_rewarm",
        ),
        (
            "--lr_schedule cosine_rewarm --lr_stages 0.5 --min_lr 0.001",
            "--min_lr 0.001 exceeds --rewarm_lr 0.0001; use at most 0.0001",
            "--lr_schedule cosine_rewarm --lr_stages 0.5 --min_lr 0.0001",
        ),
        (
            "--batch_warmup_sizes 4096",
            "--batch_warmup_sizes has 1 sizes, and --batch_warmup_ends 0 numbers of steps; give one for each size ...",
            "--batch_warmup_sizes 4096 --batch_warmup_ends 10",
        ),
        *(
            (
                f"--batch_warmup_sizes 4096 8192 --batch_warmup_ends {ends}",
                f"--batch_warmup_ends {ends} must be increasing numbers of steps; use 100 300",
                "--batch_warmup_sizes 4096 8192 --batch_warmup_ends 100 300",
            )
            for ends in ("0 10", "10 10", "20 10")
        ),
        *(
            (
                f"--batch_warmup_sizes {tokens} --batch_warmup_ends 10",
                f"--batch_warmup_sizes {tokens} (tokens) must be a multiple of --seq_len 4096; use {works}",
                f"--batch_warmup_sizes {works} --batch_warmup_ends 10",
            )
            for tokens, works in ((0, 4096), (100, 4096), (10000, 8192))
        ),
        (
            "--batch_warmup_sizes 4096 --batch_warmup_ends 10 --moe_route_trace",
            "--moe_route_trace numbers the rows of a constant global batch, and --batch_warmup_sizes changes it; drop ...",
            "--batch_warmup_sizes 4096 --batch_warmup_ends 10",
        ),
        *(
            (f"--ema_decay {value}", f"--ema_decay {value} must be in [0, 1); use 0.999", "--ema_decay 0.999")
            for value in (1.0, -0.1, float("nan"))
        ),
        *(
            (
                f"--weight_decay_schedule {kind} --weight_decay 0",
                f"--weight_decay_schedule {kind} has no decay ... --weight_decay 0; use 0.1",
                f"--weight_decay_schedule {kind} --weight_decay 0.1",
            )
            for kind in ("linear", "cosine", "lr")
        ),
        (
            "--weight_decay_schedule lr --max_lr 0 --min_lr 0",
            "--weight_decay_schedule lr follows the learning rate, but --max_lr is 0; use 0.001",
            "--weight_decay_schedule lr --max_lr 0.001",
        ),
        *(
            (
                f"--weight_decay_schedule {kind} --weight_decay_end 0.01",
                f"--weight_decay_end 0.01 is not reached by --weight_decay_schedule {kind}; use linear or cosine, or ...",
                "--weight_decay_schedule cosine --weight_decay_end 0.01",
            )
            for kind in ("constant", "lr")
        ),
        (
            "--warmup_start 1.5",
            "--warmup_start 1.5 must be in 0..1",
            "--warmup_start 1",
        ),
        *(
            (f"--{name} {value}", f"--{name} {value} must be in [0, 1); use 0.9", f"--{name} 0.9")
            for name in ("adam_beta1", "adam_beta2", "muon_momentum", "muon_beta2")
            for value in (1.0, -0.1, float("nan"))
        ),
        *(
            (f"--{name} {value}", f"--{name} {value} must be in (0, 1]; use {works}", f"--{name} {works}")
            for name, works in (("wsd_decay_fraction", 0.1), ("split_rate", 0.99), ("layer_lr_decay", 0.9))
            for value in (0.0, 1.1, float("nan"))
        ),
        *(
            (f"--bucket_size_mb {value}", f"--bucket_size_mb {value} must be positive; use 64", "--bucket_size_mb 64")
            for value in (0.0, -1.0, float("nan"))
        ),
        ("--bucket_size_mb inf", "--bucket_size_mb inf must be finite; use 64", "--bucket_size_mb 64"),
        ("--seed -1", "--seed -1 must be in 0..2^63 - 1; use 1337", "--seed 1337"),
        *(
            (
                f"--steps_to_profile {window}",
                f"--steps_to_profile {window} must be 1 <= first <= last; use 15 20",
                "--steps_to_profile 15 20",
            )
            for window in ("0 3", "5 4")
        ),
        (
            "--eval_every 5",
            "--eval_every 5 ... --eval_tasks tasks.jsonl ... drop it",
            "--eval_every 5 --eval_tasks tasks.jsonl",
        ),
        (
            "--eval_tokenizer t.json",
            "--eval_tokenizer t.json ... --eval_tasks tasks.jsonl ... drop it",
            "--eval_tokenizer t.json --eval_tasks tasks.jsonl",
        ),
        (
            "--eval_tasks a/sky.jsonl b/sky.jsonl",
            "--eval_tasks ... sky ... rename one",
            "--eval_tasks a/sky.jsonl b/sea.jsonl",
        ),
        ("--exp_name a/b", "--exp_name 'a/b' ... use gpt", "--exp_name gpt"),
        ("--exp_name=", "--exp_name '' ... use gpt", "--exp_name gpt"),
    ],
)
def test_a_broken_rule_is_told_with_a_value_that_works(flags: str, text: str, works: str) -> None:
    assert re.search(says(text), refusal(flags))
    build(works)


def test_learned_positions_of_given_weights_do_not_grow() -> None:
    with pytest.raises(ConfigError, match=r"^--seq_len 4096 exceeds --block_size 1024; use --seq_len 1024$"):
        Config(model=ModelConfig(position_type="learned", block_size=1024), ckpt=CkptConfig(init_from="gpt2"))


@pytest.mark.parametrize(
    "flags",
    [
        "--split_rate 1.0", "--wsd_decay_fraction 1.0", "--adam_beta1 0", "--steps_to_profile 1 1", "--seed 0",
        f"--seed {2**63 - 1}", "--grad_clip_value inf", "--bucket_size_mb 0.001",
    ],
)  # fmt: skip
def test_limits_themselves_are_allowed(flags: str) -> None:
    build(flags)


@pytest.mark.parametrize(
    "flags", ["--use_moe", "--optimizer muon", "--sep_size 2", "--use_moe --sep_size 4 --ep_size 2"]
)
def test_what_was_refused_once_is_allowed(flags: str) -> None:
    build(flags)


HEADS = "--num_attention_heads 12 --hidden_size 96 --num_key_value_heads"
SEQ = "--seq_len 24 --total_batch_size 48"


@pytest.mark.parametrize(
    ("flags", "size", "rule", "works"),
    [
        (f"{HEADS} 4 {SEQ}", 16, "--seq_len 24", [1, 2, 4, 12]),
        (f"{HEADS} 4 --seq_len 8 --total_batch_size 48", 12, "--seq_len 8", [1, 2, 4]),
        (f"{HEADS} 4 {SEQ}", 8, "{heads} 12 ... {kv} 4", [1, 2, 4, 12]),
        (f"{HEADS} 4 {SEQ}", 3, "{heads} 12 ... {kv} 4", [1, 2, 4, 12]),
        (f"{HEADS} 4 {SEQ}", 6, "{heads} 12 ... {kv} 4", [1, 2, 4, 12]),
        (f"{HEADS} 6 {SEQ}", 4, "{heads} 12 ... {kv} 6", [1, 2, 3, 6, 12]),
        (f"{HEADS} 1 {SEQ}", 24, "{heads} 12 ... {kv} 1", [1, 2, 3, 4, 6, 12]),
        (f"{HEADS} 4 --seq_len 8 --total_batch_size 48", 8, "{heads} 12 ... {kv} 4", [1, 2, 4]),
    ],
)
def test_a_sequence_group_fits_sequence_and_heads(flags: str, size: int, rule: str, works: list[int]) -> None:
    """Each proposed size keeps both rules, and no size that keeps both is left out."""
    rule = rule.format(heads="--num_attention_heads", kv="--num_key_value_heads")
    text = says(f"--sep_size {size} ... {rule} ... use one of {works}")
    assert re.search(text, refusal(f"{flags} --sep_size {size}"))
    for other in range(1, 26):
        if other in works:
            assert build(f"{flags} --sep_size {other}").parallel.sep_size == other
        else:
            refusal(f"{flags} --sep_size {other}")


@pytest.mark.parametrize("flags", ["--ep_size 4", "--sep_size 4", "--sep_size 2 --ep_size 4"])
def test_experts_divide_over_their_group(flags: str) -> None:
    moe = "--use_moe --num_experts 6 --num_experts_per_tok 2"
    text = "--ep_size 4 ... --num_experts 6 ... use one of [1, 2, 3, 6]"
    assert re.search(says(text), refusal(f"{moe} {flags}"))
    for works in (1, 2, 3, 6):
        build(f"{moe} {flags} --ep_size {works}")
    build(f"--num_experts 6 {flags}")  # no experts: of no effect


def test_rounded_gradients_need_sharded_optimizer_states() -> None:
    text = refusal("--grad_reduce_dtype bf16 --no-use_distributed_optimizer")
    assert re.search(says("--grad_reduce_dtype bf16 ... --use_distributed_optimizer ... use fp32"), text)
    build("--grad_reduce_dtype fp32 --no-use_distributed_optimizer")
    build("--grad_reduce_dtype bf16 --use_distributed_optimizer")


def test_rules_of_the_model_come_through() -> None:
    assert refusal("--num_key_value_heads 3").startswith(
        "--num_key_value_heads 3 must divide --num_attention_heads 128"
    )


def test_every_text_names_a_flag_that_exists() -> None:
    known = {info.name for cls in SECTIONS.values() for info in config_fields(cls)}
    for flags in (
        "--seq_len 8192 --block_size 1", "--total_batch_size 10000", "--hidden_size 100", "--head_dim 3",
        "--sep_size 3", "--sep_size 256",
        "--use_moe --ep_size 3", "--use_moe --first_k_dense 99", "--grad_reduce_dtype bf16 --no-use_distributed_optimizer",
    ):  # fmt: skip
        assert set(re.findall(r"--(\w+)", refusal(flags))) <= known


def test_rules_hold_without_the_command_line_too() -> None:
    with pytest.raises(ConfigError, match=r"--batch_size -1 must be at least 1, or auto"):
        Config(train=TrainingConfig(batch_size=-1))
    with pytest.raises(ConfigError, match=r"--min_lr 1.0 exceeds --max_lr 0.004; use at most 0.004"):
        dataclasses.replace(Config(), optim=OptimConfig(min_lr=1.0))


def test_a_configuration_cannot_be_changed() -> None:
    config = Config()
    for section in (config, *(getattr(config, name) for name in SECTIONS)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, 1)


# The run's identity.

# How a run is executed and how long: layout, micro-batch, paths, intervals, step limits. All else is what it is.
EXECUTION: dict[str, set[str]] = {
    "lora": set(),
    "train": {
        "batch_size", "max_steps", "max_train_tokens", "max_eval_tokens", "max_epochs", "do_val", "val_every_steps",
        "recompute", "attn_backend", "use_compile", "eval_tasks", "eval_every", "eval_tokenizer",
        "eval_length", "eval_data_dir",
        "disable_tf32", "use_profiler", "steps_to_profile", "spike_sigma", "spike_window", "spike_action",
        "replica_check_every", "step_timeout", "use_liger_kernel", "use_cut_cross_entropy", "preempt_file", "preempt_url",
        "use_triton_kernels", "total_batch_sequences", "fit_batch",
    },
    "model": set(),
    "optim": set(),
    "data": {"dataset_path", "val_dataset_path", "use_mock_data", "num_workers", "pin_memory", "token_dtype", "prefetch"},
    "parallel": {
        "backend", "init_method", "sep_size", "ep_size", "use_distributed_optimizer", "bucket_size_mb",
        "overlap_grad_reduce", "overlap_param_gather", "grad_reduce_dtype", "print_topology", "ddp_find_unused_parameters",
        "ddp_gradient_as_bucket_view",
    },
    "ckpt": {"do_save", "save_every_steps", "async_save", "keep_last", "keep_every", "keep_best", "best_metric", "resume",
             "resume_path",
             "export_every", "export_dir", "save_at_start", "hub_model_id", "hub_private"},
    "logging": {
        "log_dir", "log_every", "print_config", "moe_router_debug", "moe_route_trace", "dry_run", "dry_run_world_size",
        "loggers", "log_phases", "save_plots", "wandb_project", "wandb_run_name", "wandb_group", "wandb_mode",
        "log_norms", "log_activations", "log_attention", "log_loss_by_position",
    },
    "seed": {"deterministic"},
}  # fmt: skip


def test_the_identity_is_everything_else() -> None:
    expected = {
        f"{section}.{info.name}"
        for section, cls in SECTIONS.items()
        for info in config_fields(cls)
        if info.name not in EXECUTION[section]
    }
    assert set(Config().identity()) == expected


def test_the_hash_is_eight_hexadecimal_digits_of_the_values() -> None:
    assert re.fullmatch("[0-9a-f]{8}", Config().config_hash())
    assert Config().config_hash() == build().config_hash()
    assert build("--seed 1337 --max_lr 0.004").config_hash() == Config().config_hash()
    assert build("--seed 1338").config_hash() != build("--seed 1339").config_hash() != Config().config_hash()


BATCH = "--use_moe --moe_aux_loss_scope batch"


@pytest.mark.parametrize("flags", ["", "--use_moe", f"{BATCH} --moe_aux_loss_coef 0", "--moe_aux_loss_scope batch"])
def test_the_micro_batch_and_the_ranks_are_no_part_of_the_hash(flags: str) -> None:
    plain, other = build(flags), build(f"{flags} --batch_size 2")
    assert plain.config_hash() == other.config_hash() == dataclasses.replace(other, dp_size=4).config_hash()


def test_but_the_sequences_that_experts_are_balanced_over_are() -> None:
    """Another number of them gives another loss; the same number in other parts does not."""
    hashes = {(b, d): dataclasses.replace(build(f"{BATCH} --batch_size {b}"), dp_size=d).config_hash()
              for b, d in [(8, 1), (4, 2), (4, 1), (2, 2)]}  # fmt: skip
    assert hashes[8, 1] == hashes[4, 2] != hashes[4, 1] == hashes[2, 2]
    config = dataclasses.replace(build(f"{BATCH} --batch_size 4"), dp_size=2)
    assert config.identity()["train.balanced_sequences"] == 8
    assert config.as_dict() == build(f"{BATCH} --batch_size 4").as_dict()


def test_an_option_at_its_default_is_no_part_of_the_hash() -> None:
    """Or every option that is added would rename all runs. The value is that of this version; it must stay."""
    changed = build("--seed 7 --num_layer 3")
    known = '{"model.num_layer": 3, "seed.seed": 7}'
    assert changed.config_hash() == hashlib.sha256(known.encode()).hexdigest()[:8]


def test_the_saved_form_is_plain() -> None:
    config = build("--steps_to_profile 3 4 --num_layer 5")
    saved: dict[str, Any] = json.loads(json.dumps(config.as_dict()))
    assert saved["model"]["num_layer"] == 5
    assert saved["train"]["steps_to_profile"] == [3, 4]
    assert {name: set(values) for name, values in saved.items()} == {
        name: {info.name for info in config_fields(cls)} for name, cls in SECTIONS.items()
    }
