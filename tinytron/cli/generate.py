"""``tinytron generate --checkpoint log/<run> --prompt "Once upon a time"``: generate text in the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tinytron.cli.chat import converse, opening
from tinytron.errors import ConfigError
from tinytron.inference.engine import Generation, Piece, complete
from tinytron.inference.sampler import SamplingOptions
from tinytron.interop.open import CHECKPOINT_HELP, local_checkpoint, open_model
from tinytron.text.dialogue import dialogue_of_run
from tinytron.text.run_tokenizer import tokenizer_of_run
from tinytron.utils.flags import Parser, parse_strictly, whole_number
from tinytron.utils.paths import expanded, user_path
from tinytron.utils.texts import numbered_lines, whole_characters
from tinytron.utils.training import DTYPES, device_of

_COMMON = (
    *("checkpoint", "prompt", "prompts_file", "chat", "max_new_tokens", "temperature", "top_k", "top_p", "num_samples"),
    *("seed", "device"),
)


def _parser(prog: str) -> argparse.ArgumentParser:
    """The flags; the sampling defaults are those of ``SamplingOptions``."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s --checkpoint MODEL --prompt TEXT [--flag value ...]",
        description="""Continue texts with a trained model.

%(prog)s --checkpoint log/my_run --prompt "Once upon a time"
%(prog)s --checkpoint openai-community/gpt2 --prompts_file prompts.txt --temperature 0
%(prog)s --checkpoint log/my_chat_run --chat
""",
        common=_COMMON,
    )
    add = parser.add_argument
    add("--checkpoint", type=expanded, required=True, metavar="MODEL", help=CHECKPOINT_HELP)
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times")
    add(
        "--prompts_file",
        type=user_path,
        metavar="FILE",
        help='file with one prompt per line; in a .jsonl file, one {"prompt": ...} per line',
    )
    add(
        "--chat",
        action="store_true",
        help="answer as the assistant of a dialogue; without a prompt, lines from the keyboard are the user's turns",
    )
    add("--system", metavar="TEXT", help="with --chat: the message that dialogues begin with")
    add(
        "--chat_template",
        choices=("chatml", "tokenizer"),
        help="with --chat: how dialogues are written; default: as in the run's data, else by the tokenizer's template",
    )
    add("--tokenizer", type=user_path, metavar="FILE", help="a tokenizer.json; default: the one next to the run's data")
    add(
        "--eot",
        action=argparse.BooleanOptionalAction,
        help="begin with the end-of-text token, or without it; default: like the documents of the run's data, or like the "
        "tokenizer of a Hugging Face model",
    )
    defaults = SamplingOptions()
    for name, kind, text in (
        ("max_new_tokens", whole_number, "stop after this many new tokens"),
        ("temperature", float, "divide the logits by this; 0: always take the likeliest token"),
        ("top_k", whole_number, "sample from the k likeliest tokens; 0: from all"),
        ("top_p", float, "sample from the likeliest tokens whose probabilities add up to this; 1: from all"),
        ("min_p", float, "sample from tokens at least this fraction as likely as the likeliest; 0: from all"),
        ("seed", whole_number, "random seed; a sample does not depend on the other prompts"),
        ("num_samples", whole_number, "number of samples per prompt"),
    ):
        add(f"--{name}", type=kind, default=getattr(defaults, name), help=text)
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be given several times")
    add("--batch_size", type=whole_number, default=32, help="number of samples generated at once")
    add("--device", help="default: cuda if there is a GPU, else cpu")
    add("--dtype", choices=DTYPES, help="data type of weights and cache; default: the one stored in the checkpoint")
    return parser


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts of the command line, then those of the file. Raises: ConfigError without prompts, or if the file
    cannot be read."""
    prompts: list[str] = list(args.prompt)
    if args.prompts_file is not None:
        prompts += _prompts_of(args.prompts_file)
    if not prompts:
        raise ConfigError('no prompt given; use --prompt "Once upon a time", or --prompt "" to start from nothing')
    return [whole_characters(prompt) for prompt in prompts]


def _prompts_of(path: Path) -> list[str]:
    try:
        numbered = list(numbered_lines(path.read_bytes()))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts_file {path} cannot be read ({error}); give a text file") from error
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ConfigError(f'--prompts_file {path}: line {number} is not of the form {{"prompt": "text"}}')
        prompts.append(prompt)
    return prompts


class _Printer:
    """Prints the samples in order, each after its prompt if there are ``prompts``; the first unfinished one appears as it
    grows."""

    def __init__(self, prompts: Sequence[str], count: int, num_samples: int, out: TextIO) -> None:
        self._prompts, self._per_prompt, self._out = prompts, num_samples, out
        self._waiting = ["" for _ in range(count * num_samples)]
        self._ended = [False] * len(self._waiting)
        self._current, self._headed = 0, -1

    def show(self, piece: Piece) -> None:
        """Print everything that is next in order."""
        self._waiting[piece.sample] += piece.text
        self._ended[piece.sample] = piece.finish is not None
        while self._current < len(self._waiting):
            self._head()
            self._write(self._waiting[self._current])
            self._waiting[self._current] = ""
            if not self._ended[self._current]:
                return
            self._write("\n")
            self._current += 1

    def _head(self) -> None:
        if self._headed == self._current:
            return
        self._headed = self._current
        prompt, number = divmod(self._current, self._per_prompt)
        if len(self._waiting) > 1:
            name = f"prompt {prompt + 1}" + (f", sample {number + 1}" if self._per_prompt > 1 else "")
            self._write(f"--- {name} ---\n")
        if self._prompts:
            self._write(self._prompts[prompt])

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def summary(result: Generation) -> str:
    """Counts and rates in one line."""
    ends = [sample.finish for sample in result.samples]
    cut = sum(sample.cuts > 0 for sample in result.samples)
    more = f" | {cut} outgrew the model's window and continued from the newest half of it" if cut else ""
    return (
        f"read {result.prefill_tokens} tokens at {result.prefill_rate:,.0f} tok/s, "
        f"wrote {sum(len(s.tokens) for s in result.samples)} at {result.decode_rate:,.0f} tok/s | "
        f"{ends.count('stop')} stopped, {ends.count('length')} ended by length{more}"
    )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    """Generate text as ``args`` describe. Raises: TinytronError."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "num_samples")
    options = {name: getattr(args, name) for name in names}
    checked = SamplingOptions(**options, stop=tuple(args.stop))
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size {args.batch_size} must be at least 1")
    for flag in ("system", "chat_template"):
        if not args.chat and getattr(args, flag) is not None:
            raise ConfigError(f"--{flag} is about dialogues; add --chat, or drop it")
    if args.chat and args.eot is not None:
        raise ConfigError("--eot does not apply to dialogues, which begin as in training; drop it")
    talks = args.chat and not args.prompt and args.prompts_file is None
    texts, device = [] if talks else read_prompts(args), device_of(args.device)
    source = local_checkpoint(args.checkpoint, say=_to_stderr)
    model, config = open_model(source, device, DTYPES.get(args.dtype), say=_to_stderr)
    found = tokenizer_of_run(config, args.tokenizer, source)
    if args.eot is not None:
        found = dataclasses.replace(found, prepend=args.eot, begin=None)
    dialogue = dialogue_of_run(config, found, args.chat_template) if args.chat else None
    if dialogue is None:
        ids, stop_tokens = [found.prompt_ids(text) for text in texts], found.stop_tokens
    else:
        ids = [dialogue.prompt_ids(opening(args.system, text)) for text in texts]
        stop_tokens, more = dialogue.end
        checked = dataclasses.replace(checked, stop=(*checked.stop, *more))
    checked = dataclasses.replace(checked, stop_tokens=stop_tokens)
    if talks:
        assert dialogue is not None, "talks needs --chat"
        converse(model, dialogue, checked, system=args.system)
        return
    result = complete(
        model,
        ids,
        checked,
        decode=found.tokenizer.decode,
        vocab_size=found.tokenizer.vocab_size,
        without=found.tokenizer.unused,
        batch_size=args.batch_size,
        on_piece=_Printer([] if args.chat else texts, len(ids), args.num_samples, sys.stdout).show,
    )
    print(summary(result), file=sys.stderr)


def main(argv: Sequence[str], prog: str = "tinytron generate") -> None:
    """Continue the prompts that ``argv`` names. Raises: TinytronError."""
    run(parse_strictly(_parser(prog), argv))
