"""``tinytron generate --chat`` without a prompt: a conversation in the terminal."""

from __future__ import annotations

import sys

from tinytron.errors import ConfigError
from tinytron.inference.engine import Piece, complete
from tinytron.inference.sampler import SamplingOptions
from tinytron.model import GPT
from tinytron.text.chat import ASSISTANT, with_system
from tinytron.text.dialogue import Dialogue
from tinytron.text.rows import Messages
from tinytron.utils.texts import whole_characters

_HELP = "talk to the model; an empty line or Ctrl-D ends the conversation, /new begins another one"


def opening(system: str | None, text: str) -> Messages:
    """A dialogue that begins with the user's ``text``, after the message ``system`` if there is one."""
    return with_system([{"role": "user", "content": text}], system)


def converse(model: GPT, dialogue: Dialogue, options: SamplingOptions, *, system: str | None) -> None:
    """Answer lines from standard input until an empty one. The oldest turns are left out once the dialogue no longer fits
    the model. Raises: ConfigError for a turn that does not fit the model, and if each turn should have several samples."""
    if options.num_samples != 1:
        raise ConfigError(f"--num_samples {options.num_samples}: a conversation has one answer per turn; use 1")
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(_HELP, file=sys.stderr)
    turns: Messages = []
    while True:
        line = _read("> " if at_terminal else "")
        if not line:
            return
        if line == "/new":
            turns = []
            continue
        turns.append({"role": "user", "content": whole_characters(line)})
        turns, ids = _fitting(turns, dialogue, system, model.config.block_size, options.max_new_tokens)
        turns.append({"role": ASSISTANT, "content": _answer(model, dialogue, ids, options)})


def _read(mark: str) -> str:
    try:
        return input(mark).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _fitting(
    turns: Messages, dialogue: Dialogue, system: str | None, block_size: int, wanted: int
) -> tuple[Messages, list[int]]:
    """The newest of ``turns`` that leave room for an answer of ``wanted`` tokens, or of half the model's window, and their
    ids."""
    room = block_size - min(wanted, block_size // 2)
    while True:
        ids = dialogue.prompt_ids(with_system(turns, system))
        if len(ids) <= room or len(turns) == 1:
            break
        turns = turns[2:]  # a question and its answer
    if len(ids) > block_size:
        raise ConfigError(
            f"this turn has {len(ids)} tokens, more than the model's --block_size {block_size}; ask in fewer words"
        )
    return turns, ids


def _answer(model: GPT, dialogue: Dialogue, ids: list[int], options: SamplingOptions) -> str:
    def show(piece: Piece) -> None:
        print(piece.text, end="", flush=True)

    text = dialogue.tokenizer.tokenizer
    result = complete(
        model,
        [ids],
        options,
        decode=text.decode,
        vocab_size=text.vocab_size,
        without=text.unused,
        on_piece=show,
    )
    print()
    return result.samples[0].text.strip()
