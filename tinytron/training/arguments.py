"""The command line, generated from the sections of the configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple

from tinytron.errors import ConfigError
from tinytron.interop import model_options
from tinytron.interop.causal_lm import foreign_settings, sizes_of
from tinytron.training.config import Config, all_sections
from tinytron.training.config_files import PRESET, options_in, words_of
from tinytron.training.hf_model import new_model_options, options_of_foreign
from tinytron.training.presets import GOOD_MAX_LR, PRESETS, preset_options
from tinytron.training.run.exports import check_exportable
from tinytron.training.sections import OptimConfig, TrainingConfig
from tinytron.training.train_section import same_batch
from tinytron.utils.flags import Parser, add_flag, config_fields, parse_strictly
from tinytron.utils.paths import one_spelling

NONE: Mapping[str, type] = MappingProxyType({})
_NAMES = ("config", PRESET)  # these flags stand for options, but are not options themselves

# Flags of nanoGPT, transformers, litgpt and torchtitan, and their names in Tinytron.
USUAL_NAMES = {
    **dict.fromkeys(("--learning_rate", "--lr"), "--max_lr"),
    **dict.fromkeys(("--n_layer", "--num_hidden_layers", "--n_layers"), "--num_layer"),
    **dict.fromkeys(("--n_head", "--num_heads", "--n_heads"), "--num_attention_heads"),
    **dict.fromkeys(("--n_kv_heads", "--num_kv_heads", "--n_query_groups"), "--num_key_value_heads"),
    **dict.fromkeys(("--n_embd", "--d_model", "--dim"), "--hidden_size"),
    **dict.fromkeys(("--context_length", "--max_seq_len", "--max_seq_length", "--sequence_length"), "--seq_len"),
    **dict.fromkeys(("--max_iters", "--iterations", "--train_steps"), "--max_steps"),
    **dict.fromkeys(("--epochs", "--num_epochs", "--num_train_epochs"), "--max_epochs"),
    **dict.fromkeys(("--micro_batch_size", "--per_device_train_batch_size", "--device_batch_size"), "--batch_size"),
    "--global_batch_size": "--total_batch_size, in tokens, or --total_batch_sequences",
    **dict.fromkeys(
        ("--gradient_accumulation_steps", "--grad_accum_steps"), "--total_batch_size, in tokens, which says how often,"
    ),
    **dict.fromkeys(("--grad_clip", "--max_grad_norm", "--clip_grad"), "--grad_clip_value"),
    **dict.fromkeys(("--beta1", "--beta2"), "--adam_beta1 and --adam_beta2"),
    **dict.fromkeys(("--warmup_iters", "--lr_warmup_steps", "--warmup"), "--warmup_steps"),
    **dict.fromkeys(("--eval_interval", "--eval_steps", "--val_interval"), "--val_every_steps"),
    **dict.fromkeys(("--save_interval", "--save_steps", "--checkpoint_interval"), "--save_every_steps"),
    **dict.fromkeys(("--log_interval", "--logging_steps"), "--log_every"),
    **dict.fromkeys(("--out_dir", "--output_dir"), "--log_dir"),
    **dict.fromkeys(("--dataset", "--data_dir", "--data_path", "--train_data"), "--dataset_path"),
    **dict.fromkeys(("--dtype", "--mixed_precision"), "--precision"),
    **dict.fromkeys(("--bf16", "--fp16"), "--precision bf16 or --precision fp16"),
    **dict.fromkeys(("--compile", "--torch_compile"), "--use_compile"),
    **dict.fromkeys(("--gradient_checkpointing", "--activation_checkpointing"), "--recompute full"),
    "--lr_scheduler_type": "--lr_schedule",
    "--checkpoint": "--init_from for the weights of a model, or --resume_path for a run,",
}


class About(NamedTuple):
    """The help of a command: what it does, with examples, and the flags that ``--help`` shows of all."""

    description: str
    common: tuple[str, ...]


PRETRAIN = About(
    """Pre-train a GPT-style model, on random tokens if there is no --dataset_path.

%(prog)s --preset tiny --max_steps 100
%(prog)s --preset gpt2 --dataset_path data/corpus --do_val

tinytron launch starts it on several GPUs.""",
    (
        *(PRESET, "config", "dataset_path", "seq_len", "total_batch_size", "batch_size", "max_steps", "max_lr"),
        *("precision", "do_val", "save_every_steps", "log_dir", "dry_run"),
    ),
)
PLAN = About(
    """Print the memory that a training run would need on every GPU, without starting it.

%(prog)s --preset 7b --dry_run_world_size 8 --backend nccl
%(prog)s --preset 1b --recompute full --batch_size auto --backend nccl

All flags of tinytron pretrain apply.""",
    (
        *(PRESET, "config", "dry_run_world_size", "backend", "seq_len", "batch_size", "total_batch_size", "precision"),
        *("recompute", "sep_size", "optimizer"),
    ),
)


def build_parser(
    sections: Mapping[str, type] = NONE, prog: str | None = None, about: About = PRETRAIN
) -> argparse.ArgumentParser:
    """One flag per configuration field, grouped by section: the built-in sections, then the extra ``sections``. Booleans
    become ``--flag`` and ``--no-flag``. ``prog`` is the command's name (default: the script's); ``about`` is its help,
    which also shows all flags of the extra sections."""
    further = (info.name for cls in sections.values() for info in config_fields(cls))
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--flag value ...]",
        description=about.description,
        common=(*about.common, *further),
    )
    parser.add_argument(
        f"--{PRESET}",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help=f"named options; files and flags override them ({', '.join(PRESETS)})",
    )
    parser.add_argument(
        "--config",
        action="append",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="read options from a JSON or YAML file, or a run's config.json; flags override it, later files earlier ones",
    )
    for section, cls in all_sections(sections).items():
        group = parser.add_argument_group(section, (cls.__doc__ or "").split(" Raises:")[0])
        for info in config_fields(cls):
            add_flag(group, info)
    return parser


def parse_args(
    argv: Sequence[str] | None = None,
    sections: Mapping[str, type] = NONE,
    prog: str | None = None,
    about: About = PRETRAIN,
) -> argparse.Namespace:
    """Parse ``argv`` (default: the command line), with the flags of extra ``sections`` such as ``MyTrainer.sections``;
    ``given`` in the result is the set of flags that ``argv`` has. Raises: ConfigError for unknown flags, naming the nearest
    known one, and for values of the wrong type or a preset that does not fit. The options of ``--config`` files count as if
    they preceded all flags, and those of the ``--preset`` as if they preceded the files."""
    parser = build_parser(sections, prog, about)
    preset, of_preset, of_files = _words_of_names(parser, argv, all_sections(sections))
    argv = [*of_files, *(sys.argv[1:] if argv is None else argv)]
    args = parse_strictly(parser, [*of_preset, *argv], USUAL_NAMES)
    for name in _NAMES:
        vars(args).pop(name, None)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parse_strictly(parser, argv)).keys() - {*_NAMES}
    if preset is not None:
        _check_preset(preset, args, given)
    if "total_batch_sequences" in given and args.total_batch_sequences is not None:
        if "total_batch_size" in given:
            raise same_batch(args.total_batch_sequences, args.total_batch_size)
        args.total_batch_size = TrainingConfig.total_batch_size  # not the preset's
    args.given = frozenset(given | vars(parse_strictly(parser, of_preset)).keys())
    args.sections = sections
    return args


def _check_preset(name: str, args: argparse.Namespace, given: Set[str]) -> None:
    """Raises: ConfigError if ``--preset`` contradicts the flags that are ``given`` in addition."""
    if args.init_from is not None:
        raise ConfigError(
            f"--preset {name} sets the sizes of a new model, but --init_from {args.init_from} has its own; leave one out"
        )
    if args.hf_model is not None:
        raise ConfigError(f"--preset {name} and --hf_model {args.hf_model} both set the model's sizes; leave one out")
    options = preset_options(name)
    if options.keys() <= given:
        raise ConfigError(
            f"--preset {name} changes nothing: flags and --config files, which override it, give all of its options; "
            "leave one out"
        )
    tuned_for = options.get("optimizer", OptimConfig.optimizer)
    if args.optimizer != tuned_for and "max_lr" not in given:
        raise ConfigError(
            f"--preset {name} has a --max_lr for --optimizer {tuned_for}; set one for --optimizer {args.optimizer}, such "
            f"as --max_lr {GOOD_MAX_LR[args.optimizer]}"
        )


def _words_of_names(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, sections: Mapping[str, type]
) -> tuple[str | None, list[str], list[str]]:
    """The preset of ``argv``, the words that it stands for, and the words that the files stand for. A file may also name
    the preset."""
    names = Parser(add_help=False)
    names.add_argument("--config", action="append", default=[])
    names.add_argument(f"--{PRESET}")
    named = names.parse_known_args(argv)[0]
    found: dict[str, Any] = {}
    for file in named.config:
        options = options_in(file, sections, USUAL_NAMES)
        found |= options
        try:
            parse_strictly(parser, words_of(options))
            if PRESET in options:
                preset_options(options[PRESET])
        except ConfigError as error:
            raise ConfigError(f"--config {file}: {str(error).removesuffix('; see --help')}") from error
    preset = found.get(PRESET) if named.preset is None else named.preset
    return preset, [] if preset is None else words_of(preset_options(preset)), words_of(found)


def build_config(args: argparse.Namespace) -> Config:
    """The frozen configuration. ``block_size`` is ``seq_len`` unless it is given, because a model cannot use positions that
    it was not trained at. With ``--init_from`` the architecture comes from the weights, with ``--hf_model`` from a
    config.json. Flags in ``args.given`` must not contradict it, and ``seq_len`` is at most the model's longest sequence
    unless it is given. Raises: ConfigError for values that break a rule."""
    values: dict[str, dict[str, Any]] = {}
    sections = all_sections(args.sections)
    for section, cls in sections.items():
        found = {info.name: getattr(args, info.name) for info in config_fields(cls)}
        values[section] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    for name in ("init_from", "hf_model"):
        if values["ckpt"][name] is not None:
            values["ckpt"][name] = one_spelling(values["ckpt"][name])  # it identifies the run, however it is spelled
    if args.init_from is None and args.hf_model is None:
        if "block_size" not in args.given:
            values["model"]["block_size"] = max(1, values["train"]["seq_len"])
    else:
        values["model"] = _options_of_named_model(args, values["model"])
        if "seq_len" not in args.given:  # the default may be longer than the model accepts
            values["train"]["seq_len"] = min(values["train"]["seq_len"], values["model"]["block_size"])
    config = Config.of({section: cls(**values[section]) for section, cls in sections.items()})
    check_exportable(config)
    return config


def _options_of_named_model(args: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """The model options for ``--init_from`` or ``--hf_model``, and those of ``values`` that were given. Raises:
    ConfigError."""
    given = args.given & values.keys()
    if args.init_from is None:
        return new_model_options(args.hf_model, values, given)
    if args.hf_model is not None:
        raise ConfigError(
            f"--hf_model {args.hf_model} is for a new model, and --init_from {args.init_from} has weights; leave one out"
        )
    if (foreign := foreign_settings(args.init_from)) is not None:
        sizes = sizes_of(foreign, args.init_from)
        return options_of_foreign("--init_from", args.init_from, sizes, values, given)
    return model_options(args.init_from, values, given)
