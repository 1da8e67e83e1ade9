"""Answers of the current model to prompts, and their rewards, for reinforcement learning."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinytron.errors import ConfigError, DataError, TinytronError, first_line
from tinytron.inference.engine import complete
from tinytron.inference.sampler import SamplingOptions
from tinytron.interop.open import open_saved
from tinytron.model import GPT
from tinytron.text.dialogue import Dialogue, dialogue_of_run
from tinytron.text.run_tokenizer import RunTokenizer, tokenizer_of_run

# reward(prompts, completions, **columns): a number for each completion. ``columns`` are the other keys of the file's rows.
Reward = Callable[..., Sequence[float]]


@dataclass(frozen=True)
class Rollouts:
    """``answers[i][g]``: the tokens of the g-th answer to the i-th prompt, with the token that ended it; ``rewards`` and
    ``lengths`` ``[P, G]``, and ``ended`` is true for answers that did not run out of tokens."""

    answers: list[list[list[int]]]
    rewards: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor


@dataclass(frozen=True)
class Writer:
    """Turns prompts into tokens, and lets a model answer them. ``dialogue`` renders prompts that are messages."""

    tokenizer: RunTokenizer
    dialogue: Dialogue

    @classmethod
    def of_model(cls, name: str, tokenizer: Path | None, vocab_size: int) -> Writer:
        """The writer for a run that starts from the model ``name``, with its tokenizer unless another one is given.
        Raises: ConfigError if there is none, or it does not fit the vocabulary."""
        saved = open_saved(name)
        config = saved.meta.run["config"]
        found = tokenizer_of_run(config, tokenizer, saved.file)
        found.check(vocab_size)
        return cls(found, dialogue_of_run(config, found, None))

    def encode(self, prompt: Any) -> list[int]:
        """The ids of a prompt, a text or messages."""
        return self.tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else self.dialogue.prompt_ids(prompt)

    def answer(
        self, model: GPT, prompts: Sequence[list[int]], options: SamplingOptions, batch_size: int
    ) -> tuple[list[list[list[int]]], list[list[str]], list[list[bool]]]:
        """For every prompt and sample: the answer's tokens, its text, and whether it ended by itself."""
        text = self.tokenizer.tokenizer
        with torch.compiler.set_stance("force_eager"):  # the cache grows with every token
            made = complete(
                model,
                prompts,
                options,
                decode=text.decode,
                vocab_size=text.vocab_size,
                without=text.unused,
                batch_size=batch_size,
            )
        tokens: list[list[list[int]]] = [[] for _ in prompts]
        texts: list[list[str]] = [[] for _ in prompts]
        ended: list[list[bool]] = [[] for _ in prompts]
        for sample in made.samples:
            end = [] if sample.stop_token is None else [sample.stop_token]
            tokens[sample.prompt].append([*sample.tokens, *end])
            texts[sample.prompt].append(sample.text)
            ended[sample.prompt].append(sample.finish == "stop")
        return tokens, texts, ended


def roll_out(
    model: GPT,
    writer: Writer,
    rows: Sequence[dict[str, Any]],
    ids: Sequence[list[int]],
    reward: Reward,
    options: SamplingOptions,
    batch_size: int,
) -> Rollouts:
    """Answer the prompts ``ids``, which belong to the file's ``rows``, and let ``reward`` judge. Raises: ConfigError unless
    it returns a finite number for every answer, or if it fails."""
    answers, texts, ended = writer.answer(model, ids, options, batch_size)
    G = options.num_samples
    flat_rows = [row for row in rows for _ in range(G)]
    flat_texts = [text for of_one in texts for text in of_one]
    columns = {key: [row.get(key) for row in flat_rows] for key in sorted({key for row in rows for key in row})}
    prompts = columns.pop("prompt", [])
    try:
        values = [float(value) for value in reward(prompts, flat_texts, **columns)] if flat_texts else []
    except TinytronError:
        raise
    except Exception as error:  # a user's function
        raise ConfigError(
            f"the reward function failed ({type(error).__name__}: {first_line(error)}); it is called as "
            "reward(prompts, completions, **columns) and returns a list of numbers"
        ) from error
    if len(values) != len(flat_texts):
        raise ConfigError(
            f"the reward function returned {len(values)} numbers for {len(flat_texts)} answers; return one for each"
        )
    for value, text in zip(values, flat_texts, strict=True):
        if not math.isfinite(value):
            raise ConfigError(
                f"the reward function returned {value} for the answer {text[:60]!r}; return a finite number, such as 0.0"
            )
    lengths = [[len(answer) for answer in of_one] for of_one in answers]
    shape = len(ids), G
    return Rollouts(
        answers,
        torch.tensor(values, dtype=torch.float64).view(shape),
        torch.tensor(lengths, dtype=torch.int64).view(shape),
        torch.tensor(ended, dtype=torch.bool).view(shape),
    )


def interleaved(parts: Sequence[Rollouts]) -> Rollouts:
    """The rollouts of prompts that several ranks shared: the i-th of n ranks had the prompts i, i + n, i + 2 n, ..."""
    if len(parts) == 1:
        return parts[0]
    total = sum(len(part.answers) for part in parts)
    places = [(n % len(parts), n // len(parts)) for n in range(total)]

    def joined(name: str) -> torch.Tensor:
        rows = [getattr(parts[rank], name)[n] for rank, n in places]
        return torch.stack(rows) if rows else getattr(parts[0], name)

    answers = [parts[rank].answers[n] for rank, n in places]
    return Rollouts(answers, joined("rewards"), joined("lengths"), joined("ended"))


def advantages(rewards_PG: torch.Tensor, *, scale: bool) -> torch.Tensor:
    """Rewards minus their mean over the answers to the same prompt, divided by their standard deviation if ``scale``
    (arXiv:2402.03300, section 4.1.2)."""
    centered_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return centered_PG / (rewards_PG.std(1, keepdim=True) + 1e-4) if scale else centered_PG


def load_reward(name: str) -> Reward:
    """The function that ``package.module:function`` or ``path/to/file.py:function`` names. Raises: ConfigError."""
    module_name, colon, function = name.rpartition(":")
    if not colon or not module_name or not function:
        raise ConfigError(f"grpo.reward={name} must be FILE.py:FUNCTION or MODULE:FUNCTION; use rewards.py:reward")
    try:
        module = _module_of_file(Path(module_name)) if module_name.endswith(".py") else _module(module_name)
        found = getattr(module, function)
    except Exception as error:  # the user's module may fail in any way
        raise ConfigError(
            f"grpo.reward={name} cannot be loaded ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not callable(found):
        raise ConfigError(f"grpo.reward={name} is a {type(found).__name__}; name a function")
    reward: Reward = found
    return reward


def _module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"tinytron_reward_{path.stem}", path)
    assert spec is not None, "a file that ends in .py has a loader"
    assert spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
