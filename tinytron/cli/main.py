"""The ``tinytron`` command and its subcommands. Each is a module of this package with a ``main(argv, prog)`` that parses
its own flags and returns its exit status. Only the module of the requested subcommand is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from tinytron import __version__
from tinytron.cli import entry
from tinytron.errors import ConfigError
from tinytron.utils.flags import nearest


class Command(NamedTuple):
    """A subcommand: its module in tinytron.cli, its line of help, and its function."""

    module: str
    help: str
    function: str = "main"


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "quickstart": Command("quickstart", "all in one: text, tokenizer, a trained model, samples, a loss curve"),
        "tokenize": Command("tokenize", "turn text into token shards"),
        "data": Command("data", "show and check token shards"),
        "plan": Command("plan", "show what a training run would need, without starting it"),
        "pretrain": Command("pretrain", "train a model on token shards or mock data"),
        "autotune": Command("autotune", "measure short runs over a grid of layouts and micro-batches"),
        "launch": Command("launch", "start a script in several processes, as torchrun does"),
        "watch": Command("watch", "follow runs on a page in the browser, or in the terminal"),
        "report": Command("report", "write a report of runs as one HTML file, or as a picture"),
        "compare": Command("compare", "print one table of the results of runs, and the best one"),
        "checkpoint": Command("checkpoint", "show, check, consolidate and delete checkpoints"),
        "generate": Command("generate", "continue texts with a trained model"),
        "evaluate": Command("evaluate", "score a trained model on multiple-choice tasks, or measure its loss"),
        "export": Command("export", "write a trained model as a Hugging Face folder"),
        "jobs": Command("jobs", "list the jobs: work that is configured and run by name"),
        "configure": Command("jobs", "write the options of a job to a YAML file", "configure"),
        "run": Command("run", "run a configured job, and any further stages"),
        "checkpoints": Command("jobs", "list the checkpoints of a job", "checkpoints"),
        "restore": Command("run", "continue a job from one of its checkpoints", "restore"),
        "submit": Command("submit", "run a job on a host behind SSH, or in the queue of SLURM or Kubernetes"),
        "status": Command("submissions", "show the state of what was submitted"),
        "logs": Command("submissions", "print the log of what was submitted", "logs"),
        "cancel": Command("submissions", "stop what was submitted", "cancel"),
        "pull": Command("submissions", "copy logs and exports of what was submitted", "pull"),
        "repl": Command("repl", "open a Jupyter notebook on a host"),
        "bootstrap": Command("submit", "write one script that runs a job anywhere", "bootstrap"),
        "dispatch": Command("dispatch", "check the settings of hosts and clusters"),
        "import": Command("import_model", "turn a Hugging Face model into a folder for --init_from"),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that ``argv`` (default: the command line) names. Returns the exit status (see ``cli.entry``)."""
    words = list(sys.argv[1:] if argv is None else argv)
    return entry.status_of(lambda: _dispatch(words))


def run() -> None:
    """The console script: ``main``, then the end of the process."""
    entry.run(main)


def _dispatch(words: list[str]) -> int | None:
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"tinytron {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name}{nearest(name, COMMANDS)}; see tinytron --help")
    module = importlib.import_module(f"tinytron.cli.{COMMANDS[name].module}")
    function = getattr(module, COMMANDS[name].function)
    status: int | None = function(words[1:], prog=f"tinytron {name}")
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tinytron COMMAND [--flag value ...]",
            "",
            "Pre-train GPT-style language models.",
            "",
            *lines,
            "",
            "tinytron COMMAND --help lists the flags of a command.",
        ]
    )
