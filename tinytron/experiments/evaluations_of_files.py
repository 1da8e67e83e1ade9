"""Built-in evaluations whose data are not on the hub in a form that ``datasets`` reads: they take local files of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinytron.evaluation.grades import chrf, word_f1
from tinytron.evaluation.hub_items import FileItems
from tinytron.evaluation.kinds import (
    EncodingEvaluation,
    PerplexityComparisonEvaluation,
    PerplexityEvaluation,
    RolloutEvaluation,
)
from tinytron.experiments.datasets import LETTERS, choices, label
from tinytron.registry import evaluation

Row = Mapping[str, Any]
RELATIVES = (
    *("aunt", "son-in-law", "grandfather", "brother", "sister", "father", "mother", "grandmother", "uncle"),
    *("daughter-in-law", "grandson", "granddaughter", "father-in-law", "mother-in-law", "nephew", "son", "daughter"),
    *("niece", "husband", "wife", "sister-in-law"),
)
VERDICTS = {"SUPPORTS": " true", "REFUTES": " false", "NOT ENOUGH INFO": " unknown"}


@evaluation("bbq")
class BBQ(FileItems, PerplexityComparisonEvaluation):
    """Questions with three answers, for social bias; the score is the share of right ones (arXiv:2110.08193)."""

    needs = "context, question, ans0, ans1, ans2 and label, as the files of github.com/nyu-mll/BBQ have them"

    def item_of(self, row: Row) -> tuple[str, list[str], int]:
        """Context and question, and the answers."""
        answers = [row[f"ans{number}"] for number in range(3)]
        label(answers, row["label"])  # raises for a row without an answer
        return f"{row['context']}\n{row['question']}\nAnswer:", [f" {answer}" for answer in answers], row["label"]


@evaluation("clutrr")
class CLUTRR(FileItems, PerplexityComparisonEvaluation):
    """Stories about families; which of 21 relations follows (arXiv:1908.06177)?"""

    needs = "story, query and target_text, as the files of CLUTRR/v1 on the hub have them"

    def item_of(self, row: Row) -> tuple[str, list[str], int]:
        """The story and the two names, and all relations."""
        asked = f"{row['story']}\nQuery: {row['query']}\nRelation:"
        return asked, [f" {name}" for name in RELATIVES], RELATIVES.index(row["target_text"])


@evaluation("fever")
class FEVER(FileItems, PerplexityComparisonEvaluation):
    """Claims, without evidence: true, false or unknown (arXiv:1803.05355)?"""

    needs = "claim and label (SUPPORTS, REFUTES or NOT ENOUGH INFO), as the files of fever.ai have them"

    def item_of(self, row: Row) -> tuple[str, list[str], int]:
        """The claim, and the three verdicts."""
        asked = f"Claim: {row['claim']}\nIs the claim true, false or unknown?\nAnswer:"
        return asked, list(VERDICTS.values()), list(VERDICTS).index(row["label"])


@evaluation("longbench")
class LongBench(FileItems, RolloutEvaluation):
    """Tasks with long contexts (arXiv:2308.14508). The grade of every task is the F1 of the words with the best of its
    answers, and for a task with classes whether the right one is the first that is named."""

    needs = "context, input, answers and all_classes, as the files of THUDM/LongBench on the hub have them"
    max_new_tokens = 128

    def item_of(self, row: Row) -> tuple[str, str]:
        """Context and question, and all answers, one a line; after an empty line the classes, if there are any."""
        parts = [row["answers"], row["all_classes"]] if row["all_classes"] else [row["answers"]]
        lines = ["\n".join(" ".join(text.split("\n")) for text in part) for part in parts]
        return f"{row['context']}\n\n{row['input']}\nAnswer:", "\n\n".join(lines)

    def check(self, answer: str, given: str) -> bool | float:
        """The grade of one answer."""
        answers, _, classes = answer.partition("\n\n")
        right = answers.split("\n")
        if classes:
            named = [(place, -len(name), name) for name in classes.split("\n") if (place := given.find(name)) >= 0]
            return bool(named) and min(named)[2] in right
        return max(word_f1(one, given) for one in right)


@evaluation("longhealth")
class LongHealth(FileItems, EncodingEvaluation):
    """Questions about long patient records with five answers each, by the letter (arXiv:2401.14490)."""

    needs = (
        "text (the record), question, answer_a to answer_e and correct (the text of the right answer), of "
        "github.com/kbressem/LongHealth, one question a row"
    )
    choices = tuple(f" {letter}" for letter in LETTERS[:5])

    def item_of(self, row: Row) -> tuple[str, str]:
        """The record with the question and its answers, and the right letter."""
        answers = [row[f"answer_{letter.lower()}"] for letter in LETTERS[:5]]
        right = answers.index(row["correct"])
        question, _ = choices(row["question"], answers, right)
        return f"{row['text']}\n\n{question['content']}\nAnswer:", LETTERS[right]


@evaluation("mtob")
class MTOB(FileItems, RolloutEvaluation):
    """Translations with the help of a grammar book (arXiv:2309.16575); the score is the mean chrF."""

    needs = (
        "source, target and instructions (the book or parts of it, what to translate, and into which language), made "
        "of the files of github.com/lukemelas/mtob"
    )
    max_new_tokens = 128
    stop = ("\n",)

    def item_of(self, row: Row) -> tuple[str, str]:
        """Instructions and sentence, and its translation."""
        return f"{row['instructions']}\n\n{row['source']}\nTranslation:", row["target"]

    def check(self, answer: str, given: str) -> float:
        """chrF."""
        return chrf(answer, given)


class _FilePerplexity(FileItems, PerplexityEvaluation):
    def item_of(self, row: Row) -> str | None:
        """The text of a row; ``None`` for an empty one."""
        return row["text"] or None


@evaluation("pes2o_ppl")
class PeS2oPerplexity(_FilePerplexity):
    """Perplexity of scientific papers (peS2o)."""

    needs = "text, as the files of allenai/peS2o on the hub have it"


@evaluation("pile_injected_ppl")
class PileInjectedPerplexity(_FilePerplexity):
    """Perplexity of texts of the Pile into which something was injected."""

    needs = "text, your own"
