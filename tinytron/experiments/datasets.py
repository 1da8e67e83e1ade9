"""The built-in datasets by name: where each is on the hub, and how its rows become texts, dialogues or pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinytron.registry import dataset
from tinytron.text.named import NamedDataset, turns
from tinytron.text.rows import Messages

Row = Mapping[str, Any]
LETTERS = "ABCDEFGH"
_TURN = re.compile(r"\n\n(Human|Assistant):")


# Texts.


@dataset("fineweb")
class FineWeb(NamedDataset):
    """Web pages in English: the sample of 10 billion tokens."""

    path = "HuggingFaceFW/fineweb"
    config = "sample-10BT"


@dataset("fineweb-edu")
class FineWebEdu(NamedDataset):
    """Educational web pages in English: the sample of 10 billion tokens."""

    path = "HuggingFaceFW/fineweb-edu"
    config = "sample-10BT"


@dataset("c4")
class C4(NamedDataset):
    """Web pages in English, filtered."""

    path = "allenai/c4"
    config = "en"


@dataset("pile")
class Pile(NamedDataset):
    """The Pile without its copyrighted parts: web, code, papers, forums."""

    path = "monology/pile-uncopyrighted"


@dataset("pg19")
class PG19(NamedDataset):
    """Books of Project Gutenberg from before 1919, one a document."""

    path = "emozilla/pg19"


@dataset("wikitext")
class WikiText(NamedDataset):
    """Lines of good Wikipedia articles (WikiText-103, untokenized)."""

    path = "Salesforce/wikitext"
    config = "wikitext-103-raw-v1"


@dataset("tinystories")
class TinyStories(NamedDataset):
    """Short stories in the words of a small child."""

    path = "roneneldan/TinyStories"


# Dialogues.


def choices(question: str, answers: Sequence[str], right: int) -> Messages:
    """A question with lettered answers, and the letter and text of the ``right`` one (from 0). Raises: ValueError if
    ``right`` is not a number of an answer."""
    if not 0 <= right < len(answers):
        raise ValueError(f"the answer is {right}, as in a split without answers; use the training split")
    lines = [f"{letter}. {answer}" for letter, answer in zip(LETTERS, answers, strict=False)]
    return turns("\n".join([question, *lines]), lines[right])


def label(names: Sequence[str], number: int) -> str:
    """The name of class ``number``. Raises: ValueError if the number is not that of a class."""
    if not 0 <= number < len(names):
        raise ValueError(f"the label is {number}, as in a split without labels; use the training split")
    return names[number]


@dataset("alpaca")
class Alpaca(NamedDataset):
    """52,000 instructions, some with an input, and their answers."""

    path = "tatsu-lab/alpaca"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """The instruction and its input, and the output."""
        return turns("\n\n".join(part for part in (row["instruction"], row["input"]) if part), row["output"])


@dataset("ultrachat")
class UltraChat(NamedDataset):
    """200,000 dialogues of several turns."""

    path = "HuggingFaceH4/ultrachat_200k"
    split = "train_sft"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """The messages."""
        messages: Messages = row["messages"]
        return messages


@dataset("gsm8k")
class GSM8K(NamedDataset):
    """Word problems of grade school with worked solutions."""

    path = "openai/gsm8k"
    config = "main"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """Question and solution."""
        return turns(row["question"], row["answer"])


@dataset("squad")
class SQuAD(NamedDataset):
    """Questions about paragraphs of Wikipedia, whose answers are phrases of the paragraph."""

    path = "rajpurkar/squad"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """Paragraph and question, and the first answer."""
        return turns(f"{row['context']}\n\n{row['question']}", row["answers"]["text"][0])


@dataset("mmlu")
class MMLU(NamedDataset):
    """Questions of 57 subjects with four answers each."""

    path = "cais/mmlu"
    config = "all"
    split = "auxiliary_train"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """The question with its answers, and the right one."""
        return choices(row["question"], row["choices"], row["answer"])


@dataset("winogrande")
class WinoGrande(NamedDataset):
    """Sentences with a blank, and two ways to fill it."""

    path = "allenai/winogrande"
    config = "winogrande_xl"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """The sentence with both ways, and the right one."""
        return choices(row["sentence"], [row["option1"], row["option2"]], int(row["answer"] or 0) - 1)


@dataset("mnli")
class MNLI(NamedDataset):
    """Pairs of sentences: does the first one imply the second?"""

    path = "nyu-mll/glue"
    config = "mnli"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """Both sentences, and how they are related."""
        question = (
            f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}\nIs it entailment, neutral or contradiction?"
        )
        return turns(question, label(("entailment", "neutral", "contradiction"), row["label"]))


@dataset("qqp")
class QQP(NamedDataset):
    """Pairs of questions: do they ask the same?"""

    path = "nyu-mll/glue"
    config = "qqp"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """Both questions, and yes or no."""
        question = f"{row['question1']}\n{row['question2']}\nDo these questions ask the same?"
        return turns(question, label(("no", "yes"), row["label"]))


@dataset("sst2")
class SST2(NamedDataset):
    """Sentences of film reviews: positive or negative?"""

    path = "nyu-mll/glue"
    config = "sst2"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """The sentence, and its sentiment."""
        return turns(f"{row['sentence']}\nIs this positive or negative?", label(("negative", "positive"), row["label"]))


@dataset("siqa")
class SocialIQA(NamedDataset):
    """Questions about everyday situations with three answers each."""

    path = "allenai/social_i_qa"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """Situation and question with their answers, and the right one."""
        answers = [row[f"answer{letter}"] for letter in "ABC"]
        return choices(f"{row['context']} {row['question']}", answers, int(row["label"] or 0) - 1)


@dataset("cfq")
class CFQ(NamedDataset):
    """Questions and the queries that answer them, for compositional generalization (split mcd1)."""

    path = "google-research-datasets/cfq"
    config = "mcd1"
    kind = "dialogues"

    @staticmethod
    def record(row: Row) -> Messages:
        """Question and query."""
        return turns(row["question"], row["query"])


# Pairs.


def transcript(text: str) -> Messages:
    """The messages of a text in which every turn begins with ``Human:`` or ``Assistant:`` after an empty line. Raises:
    ValueError if the text does not begin so."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise ValueError("it does not begin with Human: or Assistant: after an empty line")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


@dataset("hh-rlhf")
class HelpfulHarmless(NamedDataset):
    """Dialogues with a helpful and harmless answer, and a worse one."""

    path = "Anthropic/hh-rlhf"
    kind = "pairs"

    @staticmethod
    def record(row: Row) -> dict[str, Messages]:
        """Both dialogues."""
        return {side: transcript(row[side]) for side in ("chosen", "rejected")}


@dataset("ultrafeedback")
class UltraFeedback(NamedDataset):
    """Answers to prompts, the best one and a worse one."""

    path = "HuggingFaceH4/ultrafeedback_binarized"
    split = "train_prefs"
    kind = "pairs"

    @staticmethod
    def record(row: Row) -> dict[str, Messages]:
        """Both dialogues."""
        return {"chosen": row["chosen"], "rejected": row["rejected"]}
