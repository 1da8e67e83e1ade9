"""The built-in evaluations by name. Their data are those of the datasets of the same name (datasets.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tinytron.evaluation.grades import word_f1
from tinytron.evaluation.hub_items import HubItems, TextPerplexity, question_and_answer
from tinytron.evaluation.kinds import EncodingEvaluation, PerplexityComparisonEvaluation, RolloutEvaluation
from tinytron.experiments import datasets
from tinytron.registry import evaluation
from tinytron.text.named import NamedDataset

Row = Mapping[str, Any]
MOST_TEXTS = 1000  # a corpus has too many
_BLIMP = """
adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive animate_subject_trans causative
complex_NP_island coordinate_structure_constraint_complex_left_branch coordinate_structure_constraint_object_extraction
determiner_noun_agreement_1 determiner_noun_agreement_2 determiner_noun_agreement_irregular_1
determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2 determiner_noun_agreement_with_adj_irregular_1
determiner_noun_agreement_with_adj_irregular_2 determiner_noun_agreement_with_adjective_1
distractor_agreement_relational_noun distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1
ellipsis_n_bar_2 existential_there_object_raising existential_there_quantifiers_1 existential_there_quantifiers_2
existential_there_subject_raising expletive_it_object_raising inchoative intransitive
irregular_past_participle_adjectives irregular_past_participle_verbs irregular_plural_subject_verb_agreement_1
irregular_plural_subject_verb_agreement_2 left_branch_island_echo_question left_branch_island_simple_question
matrix_question_npi_licensor_present npi_present_1 npi_present_2 only_npi_licensor_present only_npi_scope passive_1
passive_2 principle_A_c_command principle_A_case_1 principle_A_case_2 principle_A_domain_1 principle_A_domain_2
principle_A_domain_3 principle_A_reconstruction regular_plural_subject_verb_agreement_1
regular_plural_subject_verb_agreement_2 sentential_negation_npi_licensor_present sentential_negation_npi_scope
sentential_subject_island superlative_quantifiers_1 superlative_quantifiers_2 tough_vs_raising_1 tough_vs_raising_2
transitive wh_island wh_questions_object_gap wh_questions_subject_gap wh_questions_subject_gap_long_distance
wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap wh_vs_that_with_gap_long_distance
"""
BLIMP = tuple(_BLIMP.split())  # the configurations of the dataset


# Generated answers.


@evaluation("arithmetic")
class Arithmetic(RolloutEvaluation):
    """1,000 sums of two numbers of two digits, in the words of GPT-3's paper (arXiv:2005.14165, section 3.9.1)."""

    max_new_tokens = 8
    stop = ("\n",)

    def __len__(self) -> int:
        return 1000

    def get(self, index: int) -> tuple[str, str]:
        """A sum; the numbers follow from the index."""
        a, b = divmod(index * 2017 % 8100, 90)  # 2017 is prime: no sum comes twice
        return f"Q: What is {a + 10} plus {b + 10}?\nA:", str(a + b + 20)

    def clean(self, text: str) -> str:
        """The number without a full stop."""
        return text.strip().rstrip(".")


class _HubAnswers(HubItems, RolloutEvaluation):
    """Questions of a dataset, with its answers."""

    stop: ClassVar[tuple[str, ...]] = ("\n",)

    def item_of(self, row: Row) -> tuple[str, str]:
        """Question and answer."""
        prompt, answer = question_and_answer(self.dataset.record(row))
        return prompt, answer.strip()


@evaluation("alpaca")
class Alpaca(_HubAnswers):
    """Answers to 1,000 instructions; the score is the mean F1 of their words, compared with the given answers."""

    dataset = datasets.Alpaca
    split = "train"
    most = 1000
    max_new_tokens = 128
    stop = ()

    def check(self, answer: str, given: str) -> float:
        """F1 of the words."""
        return word_f1(answer, given)


@evaluation("cfq")
class CFQ(_HubAnswers):
    """Queries for questions, exactly as they are, for compositional generalization (split mcd1)."""

    dataset = datasets.CFQ
    split = "test"
    max_new_tokens = 256
    stop = ("\n\n",)

    def clean(self, text: str) -> str:
        """The query with single spaces."""
        return " ".join(text.split())

    def check(self, answer: str, given: str) -> bool:
        """True for the same query, whatever its white space."""
        return given == self.clean(answer)


@evaluation("squad")
class SQuAD(_HubAnswers):
    """Phrases that answer questions about paragraphs; any of the given answers is right, in any case."""

    dataset = datasets.SQuAD
    max_new_tokens = 32

    def item_of(self, row: Row) -> tuple[str, str]:
        """Paragraph and question, and all answers, one a line."""
        prompt, _ = super().item_of(row)
        return prompt, "\n".join(row["answers"]["text"])

    def clean(self, text: str) -> str:
        """The phrase without a full stop."""
        return text.strip().rstrip(".").lower()

    def check(self, answer: str, given: str) -> bool:
        """True if it is one of the answers."""
        return given in (self.clean(line) for line in answer.split("\n"))


# The likeliest next token.


@evaluation("mmlu")
class MMLU(HubItems, EncodingEvaluation):
    """Questions of 57 subjects with four answers each, by the letter."""

    dataset = datasets.MMLU
    split = "test"
    choices = (" A", " B", " C", " D")

    def item_of(self, row: Row) -> tuple[str, str]:
        """The question with its answers, and the right letter."""
        prompt, answer = question_and_answer(self.dataset.record(row))
        return prompt, answer[1]


# The likeliest of several continuations.


class _Labels(HubItems, PerplexityComparisonEvaluation):
    """Questions whose answers are the names of classes."""

    labels: ClassVar[tuple[str, ...]]

    def item_of(self, row: Row) -> tuple[str, list[str], int]:
        """The question, and the names of the classes."""
        prompt, answer = question_and_answer(self.dataset.record(row))
        return prompt, [f" {name}" for name in self.labels], self.labels.index(answer.strip())


@evaluation("mnli")
class MNLI(_Labels):
    """Pairs of sentences: does the first one imply the second?"""

    dataset = datasets.MNLI
    split = "validation_matched"
    labels = ("entailment", "neutral", "contradiction")


@evaluation("qqp")
class QQP(_Labels):
    """Pairs of questions: do they ask the same?"""

    dataset = datasets.QQP
    labels = ("no", "yes")


@evaluation("sst2")
class SST2(_Labels):
    """Sentences of film reviews: positive or negative?"""

    dataset = datasets.SST2
    labels = ("negative", "positive")


@evaluation("siqa")
class SocialIQA(HubItems, PerplexityComparisonEvaluation):
    """Questions about everyday situations with three answers each."""

    dataset = datasets.SocialIQA

    def item_of(self, row: Row) -> tuple[str, list[str], int]:
        """Situation and question, and the answers."""
        answers = [f" {row[f'answer{letter}']}" for letter in "ABC"]
        return f"{row['context']} {row['question']}", answers, _number(row["label"])


@evaluation("winogrande")
class WinoGrande(HubItems, PerplexityComparisonEvaluation):
    """Sentences with a blank, and two ways to fill it."""

    dataset = datasets.WinoGrande

    def item_of(self, row: Row) -> tuple[str, list[str], int]:
        """Both sentences; there is nothing before them."""
        filled = [row["sentence"].replace("_", row[option]) for option in ("option1", "option2")]
        return "", filled, _number(row["answer"])


class _BLiMPRows(NamedDataset):
    """Pairs of sentences, of which one is grammatical."""

    path = "nyu-mll/blimp"


@evaluation("blimp")
class BLiMP(HubItems, PerplexityComparisonEvaluation):
    """Pairs of a grammatical and an ungrammatical sentence, of 67 phenomena in turn (arXiv:1912.00582)."""

    dataset = _BLiMPRows
    split = "train"
    configs = BLIMP

    def item_of(self, row: Row) -> tuple[str, list[str], int]:
        """Both sentences; there is nothing before them."""
        return "", [row["sentence_good"], row["sentence_bad"]], 0


def _number(label: str) -> int:
    """The index of the right answer. Raises: ValueError for a split without answers."""
    if int(label or 0) < 1:
        raise ValueError(f"the answer is {label!r}, as in a split without answers; use the validation split")
    return int(label) - 1


# Perplexity.


def _perplexity(key: str, of: type[NamedDataset], of_split: str = "validation", limit: int | None = None) -> None:
    text = f"Perplexity of {'texts' if of.kind == 'text' else 'questions with their answers'}: {of.__doc__}"
    members = {"dataset": of, "split": of_split, "most": limit, "__doc__": text, "__module__": __name__}
    evaluation(f"{key}_ppl")(type(f"{of.__name__}Perplexity", (TextPerplexity,), members))


_perplexity("fineweb", datasets.FineWeb, "train", MOST_TEXTS)
_perplexity("pile", datasets.Pile, "validation", MOST_TEXTS)
_perplexity("pg19", datasets.PG19)
_perplexity("tinystories", datasets.TinyStories, "validation", MOST_TEXTS)
_perplexity("mnli", datasets.MNLI, "validation_matched")
_perplexity("qqp", datasets.QQP)
_perplexity("siqa", datasets.SocialIQA)
_perplexity("sst2", datasets.SST2)
_perplexity("winogrande", datasets.WinoGrande)
