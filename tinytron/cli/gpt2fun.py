"""The command line of gpt2fun (``src/run.py``): its flags, defaults and units, translated to Tinytron's options.

python scripts/run_gpt2.py --model.n_layer=12 --model.n_head=12 --model.n_embd=768 \\
    --batch_size=512 --num_tokens=1000000000 --data_dir=data/fineweb_gpt2 --save_dir=./checkpoints

Trains GPT-2 on all GPUs of this machine, or in NPROC CPU processes. Batch sizes count sequences: one step takes
--batch_size of them. After an interruption, the same command continues from the last checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tinytron.cli.front_end import Setting, Settings, aliases_of, options_of, read_flags, with_defaults
from tinytron.cli.run import processes
from tinytron.config import MISSING
from tinytron.errors import ConfigError
from tinytron.jobs.aliases import HEADS, Alias, tokens
from tinytron.jobs.training import TrainingJob
from tinytron.training import Config, Trainer, build_config, parse_args
from tinytron.training.config_files import words_of
from tinytron.training.presets import preset_options
from tinytron.utils.flags import Parser

DATA_VARIABLE = "TFDS_DATA_DIR"


def number_or_none(text: str) -> float:
    """The number, or 0 (no limit) for ``None``."""
    return 0.0 if text == "None" else float(text)


SETTINGS: Settings = MappingProxyType(
    {
        "model.n_layer": Setting(Alias("model.num_layer"), int, 12, "blocks"),
        "model.n_head": Setting(HEADS, int, 12, "attention heads"),
        "model.n_embd": Setting(
            Alias("model.hidden_size"), int, 768, "width; the feed-forward layer is four times as wide"
        ),
        "model.vocab_size": Setting(Alias("model.vocab_size"), int, 50304, "token ids of the model"),
        "model.block_size": Setting(Alias("model.block_size"), int, 1024, "longest sequence of the model [tokens]"),
        "model.dropout": Setting(Alias("model.dropout"), float, 0.0, "dropout rate"),
        "model.bias": Setting(Alias("model.bias"), bool, True, "biases in linear layers"),
        "seq_len": Setting(Alias("train.seq_len"), int, 1024, "length of a training sequence [tokens]"),
        "batch_size": Setting(tokens("train.total_batch_size"), int, 512, "sequences per step, over all devices"),
        "per_device_batch_size": Setting(Alias("train.batch_size"), int, 16, "micro-batch per device [sequences]"),
        "num_tokens": Setting(Alias("train.max_train_tokens"), int, MISSING, "number of training tokens"),
        "optimizer.lr": Setting(Alias("optim.max_lr"), float, 6e-4, "peak learning rate"),
        "optimizer.weight_decay": Setting(Alias("optim.weight_decay"), float, 0.1, "weight decay of matrices"),
        "optimizer.b1": Setting(Alias("optim.adam_beta1"), float, 0.9, "decay of the first moment"),
        "optimizer.b2": Setting(Alias("optim.adam_beta2"), float, 0.95, "decay of the second moment"),
        "optimizer.eps": Setting(Alias("optim.adam_eps"), float, 1e-8, "added to the root of the second moment"),
        "optimizer.warmup_steps": Setting(Alias("optim.warmup_steps"), int, 700, "steps of warm-up"),
        "optimizer.grad_clip": Setting(
            Alias("train.grad_clip_value"), number_or_none, 1.0, "limit of the global gradient norm; None: no clipping"
        ),
        "optimizer.wsd": Setting(
            Alias("optim.lr_schedule", lambda value, get: "wsd" if value else "cosine", type=bool),
            bool,
            False,
            "constant rate, then cosine decay over the last tenth of the steps, instead of cosine decay throughout",
        ),
        "seed": Setting(Alias("seed.seed"), int, 42, "seed of weights and data order"),
        "data_dir": Setting(
            Alias("data.dataset_path"), str, None, f"folder of token shards; default: ${DATA_VARIABLE}/fineweb100B"
        ),
        "save_dir": Setting(
            Alias("ckpt.do_save", lambda value, get: True, type=str),
            str,
            None,
            "folder to save runs in; default: do not save",
        ),
        "save_interval": Setting(
            Alias("ckpt.save_every_steps"), int, 0, "steps between checkpoints; 0: only after the last step"
        ),
        "save_all": Setting(
            Alias("ckpt.keep_last", lambda value, get: 0 if value else 1, type=bool),
            bool,
            False,
            "keep all checkpoints instead of just the last one",
        ),
        "log_interval": Setting(Alias("logging.log_every"), int, 20, "steps between log lines"),
        "from_pretrained": Setting(
            Alias("ckpt.init_from"), str, None, "weights to start from: a hub name such as gpt2, a folder, or a run"
        ),
    }
)
PATHS = {name: setting.alias.path for name, setting in SETTINGS.items() if setting.alias is not None}
_COMMON = (
    *("num_tokens", "data_dir", "save_dir", "model.n_layer", "model.n_head", "model.n_embd", "seq_len", "batch_size"),
    *("per_device_batch_size", "optimizer.lr", "save_interval", "from_pretrained"),
)
# Options for which gpt2fun has no flags.
_ARCHITECTURE = ("norm_type", "norm_eps", "mlp_type", "position_type", "tied_lm_head", "init_std")


class RunGPT2(TrainingJob):
    """GPT-2, trained as gpt2fun trains it."""

    ALIASES = aliases_of(SETTINGS)
    DEFAULTS = MappingProxyType(
        {"optim.min_lr": 0.0, **{f"model.{name}": preset_options("gpt2")[name] for name in _ARCHITECTURE}}
    )


def build_config_of(argv: Sequence[str], environment: Mapping[str, str]) -> Config:
    """The configuration that the flags ``argv`` of gpt2fun describe. Raises: ConfigError."""
    parser = Parser(
        prog="python scripts/run_gpt2.py",
        usage="%(prog)s --num_tokens N [--flag value ...]",
        description=__doc__,
        common=_COMMON,
    )
    given = read_flags(SETTINGS, argv, parser, "--num_tokens=1000000000, the length of the run")
    if "data_dir" not in given and DATA_VARIABLE in environment:
        given["data_dir"] = str(Path(environment[DATA_VARIABLE]) / "fineweb100B")
    if "data_dir" not in given:
        raise ConfigError(
            f"no data given; use --data_dir or set {DATA_VARIABLE}; scripts/download_fineweb100B.py downloads a dataset"
        )
    values = with_defaults(SETTINGS, given)
    values["per_device_batch_size"] = min(values["per_device_batch_size"], values["batch_size"])
    save_dir = values.pop("save_dir", None)
    values |= {"ckpt.do_save": save_dir is not None, "model.intermediate_size": 4 * values["model.n_embd"]}
    chosen = options_of(RunGPT2, values, "gpt2fun")
    if "from_pretrained" in given:  # the weights determine the architecture
        kept = {path.rpartition(".")[2] for name, path in PATHS.items() if name in given and name.startswith("model.")}
        sizes = {option.name for option in RunGPT2.options() if option.path.startswith("model.")}
        chosen = {name: value for name, value in chosen.items() if name not in sizes or name in kept}
    return build_config(parse_args(words_of({**chosen, "exp_name": "gpt2", "log_dir": save_dir or "./log/"})))


def main(argv: Sequence[str] | None = None, script: str = "scripts/run_gpt2.py") -> None:
    """Train as ``argv`` (default: the command line) describes, on all devices of this machine. Raises: TinytronError."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = build_config_of(words, os.environ)
    if "RANK" not in os.environ and (count := processes()) > 1:
        from tinytron.cli import launch  # imports all of torchrun

        launch.main(["--standalone", "--nproc_per_node", str(count), script, *words])
        return
    Trainer(config).train()
