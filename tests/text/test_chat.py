"""Dialogues as text: ChatML, the tokenizer's own template, and which pieces belong to an answer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from tests.helpers.corpus import EOT, make_tokenizer
from tinytron.errors import ConfigError, DataError
from tinytron.text.chat import ChatML, Segment, template_of, with_system
from tinytron.text.rows import MessageRows, PairRows
from tinytron.text.tokenizers import from_file

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello\nyou"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No"},
]
# The form of several published templates: a start-of-text token, headers, contents without white space around them.
HEADERS = (
    "{{ bos_token }}{% for message in messages %}<h>{{ message['role'] }}</h>\n{{ message['content'] | trim }}<e>\n"
    "{% endfor %}{% if add_generation_prompt %}<h>assistant</h>\n{% endif %}"
)
SPECIALS = {"<s>": 0, "<h>": 1, "</h>": 2, "<e>": 3}
NAMED = {"bos_token": "<s>"}


def _text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _learned(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments if segment.learned)


def test_chatml() -> None:
    segments = ChatML()(DIALOGUE[1:3])
    assert _text(segments) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello\nyou<|im_end|>\n"
    assert _learned(segments) == "Hello\nyou<|im_end|>"
    assert [segment.text for segment in segments if segment.marks] == ["<|im_start|>", "<|im_end|>"] * 2


def test_the_tokenizers_template() -> None:
    template = pickle.loads(pickle.dumps(template_of("tokenizer", HEADERS, SPECIALS, NAMED, "x")))
    for dialogue in (DIALOGUE, [{**m, "content": f" {m['content']} "} for m in DIALOGUE]):
        segments = template(dialogue)
        turns = "".join(f"<h>{m['role']}</h>\n{m['content'].strip()}<e>\n" for m in dialogue)
        assert _text(segments) == f"<s>{turns}"
        assert _learned(segments) == "Hello\nyou<e>No<e>"
        assert not any(segment.marks for segment in segments if "Hello" in segment.text)


def test_the_template_of_transformers_is_rendered_alike(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    make_tokenizer(tmp_path / "tokenizer.json", (EOT, *SPECIALS))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", chat_template=HEADERS
    )
    tokenizer.save_pretrained(tmp_path)
    found = from_file(tmp_path / "tokenizer.json")
    assert (found.chat_template, found.named["bos_token"]) == (HEADERS, "<s>")
    template = template_of("tokenizer", found.chat_template, found.specials, found.named, "x")
    assert _text(template(DIALOGUE)) == tokenizer.apply_chat_template(DIALOGUE, tokenize=False)


def test_where_a_turn_ends_without_a_special_token() -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }} END\n--\n{% endfor %}"
    segments = template_of("tokenizer", source, {}, {}, "x")(DIALOGUE[1:3])
    assert _text(segments) == "user: Hi END\n--\nassistant: Hello\nyou END\n--\n"
    assert _learned(segments) == "Hello\nyou END\n"


def test_tags_around_answers_change_nothing() -> None:
    source = "{% for m in messages %}<h>{%- generation -%} {{ m.content }}{% endgeneration %}<e>{% endfor %}"
    assert _text(template_of("tokenizer", source, SPECIALS, {}, "x")(DIALOGUE[1:3])) == "<h>Hi<e><h>Hello\nyou<e>"


def test_templates_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match=r"my\.json has no chat template .*; use --chat_template chatml"):
        template_of("tokenizer", None, {}, {}, "--tokenizer_path my.json")
    with pytest.raises(ConfigError, match=r"the template of x is not valid .*; use --chat_template chatml"):
        template_of("tokenizer", "{% for", {}, {}, "x")
    refusing = template_of("tokenizer", "{{ raise_exception('roles must alternate') }}", {}, {}, "x")
    with pytest.raises(DataError, match=r"refuses the dialogue that begins with 'Be brief.' \(roles must alternate\)"):
        refusing(DIALOGUE)
    shouting = template_of("tokenizer", "{% for m in messages %}{{ m.content | upper }}{% endfor %}", {}, {}, "x")
    with pytest.raises(DataError, match=r"changes the contents of the dialogue that begins with 'Be brief\.'"):
        shouting(DIALOGUE)


def test_a_system_prompt_goes_first_unless_there_is_one() -> None:
    assert with_system(DIALOGUE, "Other.") == DIALOGUE
    assert with_system(DIALOGUE[1:], "Other.")[0] == {"role": "system", "content": "Other."}
    assert with_system(DIALOGUE[1:], None) == DIALOGUE[1:]


# Rows.


def test_rows_become_records() -> None:
    row = {"messages": [{"role": "user", "content": "Hi", "extra": 1}], "id": 3}
    assert json.loads(MessageRows("messages").document(row, "w")) == [{"role": "user", "content": "Hi"}]
    assert MessageRows("messages").document({"messages": []}, "w") == MessageRows("a").document({"a": None}, "w") == ""
    answer = [{"role": "assistant", "content": "A"}]
    asked = [{"role": "user", "content": "Q"}]
    for prompt, chosen, expected in (
        ("Q", "A", [*asked, *answer]),
        (asked, "A", [*asked, *answer]),
        ("Q", answer, [*asked, *answer]),
        ("Q", [*asked, *answer], [*asked, *answer]),
    ):
        pair = PairRows("c", "r", "p").document({"p": prompt, "c": chosen, "r": "B"}, "w")
        assert json.loads(pair) == {"chosen": expected, "rejected": [*asked, {"role": "assistant", "content": "B"}]}
    assert json.loads(PairRows("c", "r").document({"c": "A", "r": "B"}, "w")) == {"chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("text", "f, line 3: 'messages' is str, not a list of messages; use"),
        (["text"], "message 1 is str, not an object; use"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 2 has role None, not a text"),
        ([{"role": "", "content": "a"}], "message 1 has role '', not a text"),
        ([{"role": "user", "content": None}], "message 1 has content None, not a text"),
    ],
)
def test_messages_that_are_none(value: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        MessageRows("messages").document({"messages": value}, "f, line 3")


@pytest.mark.parametrize("row", [{"c": "A", "r": None}, {"c": "A", "r": ""}, {"c": "A", "r": []}])
def test_an_answer_without_its_counterpart(row: dict[str, object]) -> None:
    with pytest.raises(DataError, match="f, line 3: the rejected answer of the pair is missing or empty; give both"):
        PairRows("c", "r").document(row, "f, line 3")


def test_a_key_that_is_missing_is_named() -> None:
    with pytest.raises(DataError, match="f, line 3 has no key 'r'; set --rejected_key to one that it has: c"):
        PairRows("c", "r").document({"c": "A"}, "f, line 3")
    with pytest.raises(DataError, match="f, line 3 has no key 'm'; set --messages_key to one that it has: c"):
        MessageRows("m").document({"c": "A"}, "f, line 3")
