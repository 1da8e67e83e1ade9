"""Evaluations: what is asked, and how answers become a score. Subclass one of four kinds and register it:

    @evaluation("sums")
    class Sums(RolloutEvaluation):
        \"\"\"Sums of two digits.\"\"\"

        max_new_tokens = 3

        def __len__(self):
            return 100

        def get(self, index):
            a, b = divmod(index, 10)
            return f"{a} + {b} =", str(a + b)

kind                               get(index)                      score
``RolloutEvaluation``              prompt, answer                  share of generated texts that are right, or mean grade
``EncodingEvaluation``             prompt, answer                  share of likeliest next tokens that are right
``PerplexityEvaluation``           text                            exp of the mean loss of all tokens
``PerplexityComparisonEvaluation`` context, continuations, right   share of items whose likeliest one per token is right
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tinytron.errors import ConfigError, DataError
from tinytron.evaluation.choices import FORM, Item, Row, encode_items, read_items, rows_of_text, summarize
from tinytron.evaluation.subject import Subject, room_for_prompt
from tinytron.inference import SamplingOptions
from tinytron.metrics.sources import perplexity
from tinytron.text.run_tokenizer import RunTokenizer
from tinytron.utils.texts import whole_characters

PPL = "_ppl"  # the names of evaluations of perplexity end so


@dataclass(frozen=True)
class Result:
    """The ``score`` of ``count`` items; ``more`` are further numbers."""

    score: float
    higher_is_better: bool
    count: int
    more: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The values for the log and for results.json."""
        return {"score": self.score, "higher_is_better": self.higher_is_better, "count": self.count, **self.more}


class Evaluation(ABC):
    """Items to ask a model. Its ``name`` is the one it is registered as; ``length`` is the number of items to use (-1:
    all), and ``data_dir`` a folder of local files. The caller sets these three, and calls ``prepare`` and ``evaluate``."""

    higher_is_better: ClassVar[bool] = True
    name: str = ""
    length: int = -1
    data_dir: Path | None = None
    work: int = 0  # number of rows or prompts that the model processes, once prepared

    @abstractmethod
    def __len__(self) -> int:
        """The number of items that there are."""

    @abstractmethod
    def get(self, index: int) -> Any:
        """Item ``index``, from 0."""

    @property
    def count(self) -> int:
        """The number of items that are used."""
        return len(self) if self.length < 0 else min(self.length, len(self))

    def prepare(self, tokenizer: RunTokenizer, longest: int) -> None:
        """Read and encode the items for a model that accepts ``longest`` tokens. Raises: DataError or ConfigError."""
        if not self.count:
            raise DataError(f"the evaluation {self.name} has no items; give it at least one")
        self.work = self.encode([self.get(index) for index in range(self.count)], tokenizer, longest)

    @abstractmethod
    def encode(self, items: Sequence[Any], tokenizer: RunTokenizer, longest: int) -> int:
        """Keep what ``measure`` needs of the ``items``; returns the number of rows or prompts."""

    @abstractmethod
    def measure(self, subject: Subject) -> float:
        """The score of the prepared items; NaN for a model whose numbers are not finite."""

    def evaluate(self, subject: Subject) -> Result:
        """The result of the prepared items. Collective, as ``Subject``."""
        return Result(self.measure(subject), self.higher_is_better, self.count)


class _Answered(Evaluation):
    """Prompts with answers. ``clean`` turns the model's text into an answer, and ``check`` compares it."""

    @abstractmethod
    def get(self, index: int) -> tuple[str, str]:
        """Prompt and right answer."""

    def clean(self, text: str) -> str:
        """The answer in a ``text`` of the model."""
        return text.strip()

    def check(self, answer: str, given: str) -> bool | float:
        """True if the answer that the model has ``given``, after ``clean``, is right; or how right it is, from 0 to 1."""
        return given == answer

    def _share(self, texts: Sequence[str] | None) -> float:
        if texts is None:
            return math.nan
        checked = zip(self._answers, texts, strict=True)
        grades = [self.check(answer, self.clean(text)) for answer, text in checked]
        return math.fsum(grade if isinstance(grade, float) else bool(grade) for grade in grades) / len(texts)

    def _pairs(self, items: Sequence[Any]) -> list[str]:
        for number, item in enumerate(items):
            if not (isinstance(item, tuple) and len(item) == 2 and all(isinstance(text, str) for text in item)):
                raise ConfigError(
                    f"the evaluation {self.name}: get({number}) returned {item!r}; return two texts, prompt and answer"
                )
        self._answers = [answer for _, answer in items]
        return [prompt for prompt, _ in items]


class RolloutEvaluation(_Answered):
    """Generates up to ``max_new_tokens`` after every prompt, up to one of the strings ``stop``. ``temperature`` 0 takes the
    likeliest token. A prompt that is too long loses its beginning."""

    max_new_tokens: ClassVar[int] = 64
    temperature: ClassVar[float] = 0.0
    top_p: ClassVar[float] = 1.0
    stop: ClassVar[tuple[str, ...]] = ()

    def encode(self, items: Sequence[Any], tokenizer: RunTokenizer, longest: int) -> int:
        """Keep the prompts' tokens. Text that outgrows the model's window is not generated."""
        new = min(self.max_new_tokens, max(1, (longest + 1) // 2))
        room = room_for_prompt(longest, new)
        self._prompts = [tokenizer.prompt_ids(prompt)[-room:] for prompt in self._pairs(items)]
        self._options = SamplingOptions(
            max_new_tokens=new,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=self.stop,
            stop_tokens=tokenizer.stop_tokens,
        )
        return len(self._prompts)

    def measure(self, subject: Subject) -> float:
        """The share of right answers."""
        return self._share(subject.continuations(self._prompts, self._options))


class EncodingEvaluation(_Answered):
    """The likeliest next token after every prompt, from one forward pass. With ``choices`` it is the choice whose first
    token is the likeliest. A prompt that is too long loses its beginning."""

    choices: ClassVar[tuple[str, ...]] = ()

    def encode(self, items: Sequence[Any], tokenizer: RunTokenizer, longest: int) -> int:
        """Keep the prompts' tokens. Raises: ConfigError for choices that begin with the same token."""
        firsts = [tokenizer.ids(choice)[0] for choice in self.choices if choice]
        if len(firsts) != len(self.choices) or len(set(firsts)) != len(firsts):
            raise ConfigError(
                f"the evaluation {self.name}: the choices {self.choices} must begin with different tokens, which "
                f"{tokenizer.tokenizer.name} does not give them; use other words, or a PerplexityComparisonEvaluation"
            )
        self._texts = {first: choice.strip() for first, choice in zip(firsts, self.choices, strict=True)}
        self._decode = tokenizer.tokenizer.decode
        prompts = [tokenizer.prompt_ids(prompt)[-longest:] for prompt in self._pairs(items)]
        self._rows = [Row(n, 0, (*prompt, 0), len(prompt), 0) for n, prompt in enumerate(prompts)]  # 0: any label
        return len(self._rows)

    def measure(self, subject: Subject) -> float:
        """The share of right answers."""
        found = subject.likeliest(self._rows, list(self._texts) or None)
        if found is None:
            return math.nan
        return self._share([self._texts.get(token) or self._decode([token]) for token in found])


class PerplexityEvaluation(Evaluation):
    """The perplexity of texts: the exponential of the mean loss in nats over all tokens. A text that is longer than the
    model's window is cut into windows."""

    higher_is_better = False

    @abstractmethod
    def get(self, index: int) -> str:
        """A text."""

    def prepare(self, tokenizer: RunTokenizer, longest: int) -> None:
        """See ``Evaluation``. Raises: ConfigError for a name that does not end in ``_ppl``."""
        if not self.name.endswith(PPL):
            raise ConfigError(f"the evaluation {self.name} measures perplexity; call it {self.name}{PPL}")
        super().prepare(tokenizer, longest)

    def encode(self, items: Sequence[Any], tokenizer: RunTokenizer, longest: int) -> int:
        """Keep the texts' tokens. Raises: DataError if there are none; ConfigError for items that are not texts."""
        if other := [item for item in items if not isinstance(item, str)]:
            raise ConfigError(f"the evaluation {self.name}: get() returned {other[0]!r}; return a text")
        self._rows = [row for n, text in enumerate(items) for row in rows_of_text(n, text, tokenizer, longest)]
        self._targets = sum(len(row.ids) - row.start for row in self._rows)
        if not self._targets:
            raise DataError(f"the evaluation {self.name} has no tokens to predict; give longer texts")
        return len(self._rows)

    def measure(self, subject: Subject) -> float:
        """The perplexity."""
        return perplexity(-math.fsum(subject.log_probs(self._rows)) / self._targets)


class PerplexityComparisonEvaluation(Evaluation):
    """Chooses the continuation with the smallest mean loss per token."""

    score: ClassVar[str] = "accuracy_per_token"  # one of the numbers of ``summarize``

    @abstractmethod
    def get(self, index: int) -> tuple[str, Sequence[str], int]:
        """A context, continuations of it, and the number of the right one."""

    def encode(self, items: Sequence[Any], tokenizer: RunTokenizer, longest: int) -> int:
        """Keep the continuations' tokens. Raises: DataError."""
        self._items = [_item(item, f"the evaluation {self.name}: get({number})") for number, item in enumerate(items)]
        self._rows = encode_items(self._items, tokenizer, longest)
        return len(self._rows)

    def measure(self, subject: Subject) -> float:
        """The accuracy."""
        return float(self.summary(subject)[self.score])

    def summary(self, subject: Subject) -> dict[str, Any]:
        """All accuracies, as ``summarize`` returns them."""
        return summarize(self._items, self._rows, subject.log_probs(self._rows))


class ChoiceFile(PerplexityComparisonEvaluation):
    """The items of a task file. Raises: DataError if it does not have the right form."""

    score = "accuracy"

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.items = read_items(path)

    def __len__(self) -> int:
        return len(self.items)

    def get(self, index: int) -> tuple[str, Sequence[str], int]:
        """Item ``index`` of the file."""
        item = self.items[index]
        return item.context, item.choices, item.answer

    def evaluate(self, subject: Subject) -> Result:
        """All accuracies; the score is the one by the choices' log-probabilities as they are."""
        found = self.summary(subject)
        return Result(found[self.score], self.higher_is_better, self.count, found)


def _item(given: Any, where: str) -> Item:
    """``given`` as an item. Raises: DataError."""
    try:
        context, continuations, right = given
        item = Item(whole_characters(context), tuple(map(whole_characters, continuations)), right)
        valid = len(item.choices) > 1 and all(item.choices) and 0 <= right < len(item.choices)
    except (TypeError, ValueError, AttributeError):
        valid = False
    if not valid:
        raise DataError(f"{where} returned {given!r}, which is not of the form {FORM}; return the three values")
    return item
