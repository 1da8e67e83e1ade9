"""Text as tokens come: whole characters, spaces of every kind of tokenizer, stop strings across tokens."""

from __future__ import annotations

import random

import pytest

from tinytron.inference.text import TextStream


def decode_bytes(tokens: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(tokens).decode("utf-8", "replace")


WORDS = ["Once", " upon", " a", " time", ",", " the", " end", ".", "\n", " th", "e"]


def decode_words(tokens: list[int]) -> str:
    return "".join(WORDS[t] for t in tokens)


def decode_stripped(tokens: list[int]) -> str:
    """As SentencePiece: the space before the first word goes."""
    return decode_words(tokens).removeprefix(" ")


def run(stream: TextStream, tokens: list[int]) -> list[str]:
    """The pieces, up to a stop string."""
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return [*pieces, stream.end()]


@pytest.mark.parametrize("text", ["plain", "naïve 猫s 🙂🙂", "🙂", "a\ufffdb", "x"])
def test_characters_come_whole(text: str) -> None:
    pieces = run(TextStream(decode_bytes, [65, 66]), list(text.encode()))
    assert "".join(pieces) == text
    assert text == "a\ufffdb" or not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_are_shown_in_the_end() -> None:
    stream = TextStream(decode_bytes, [])
    assert "".join(run(stream, [65, 0xF0, 0x9F])) == "A\ufffd" == stream.text
    pieces = run(TextStream(decode_bytes, []), [0xFF] * 9 + [65])
    assert "".join(pieces) == "\ufffd" * 9 + "A"
    assert pieces[3] == "\ufffd" * 4  # no character has more bytes: waiting is over


def test_a_prompt_that_ends_inside_a_character() -> None:
    assert "".join(run(TextStream(decode_bytes, [65, 0xC3]), [66, 67])) == "BC"


@pytest.mark.parametrize("prompt", [[], [0], [0, 1, 2, 3, 4, 5]])
def test_a_tokenizer_that_drops_the_first_space(prompt: list[int]) -> None:
    made = "".join(run(TextStream(decode_stripped, prompt), [1, 2, 3]))
    assert made == (" upon a time" if prompt else "upon a time")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["time"], "Once upon a "),
        (["n a t"], "Once upo"),  # across three tokens
        (["zzz"], "Once upon a time, the end."),
        (["end.!"], "Once upon a time, the end."),  # a beginning of it stays held back until the end
        (["the", " a"], "Once upon"),  # the earliest, not the first named
        (["Once"], ""),
        (["."], "Once upon a time, the end"),
    ],
)
def test_stop_strings(stop: list[str], expected: str) -> None:
    stream = TextStream(decode_words, [8], stop)
    pieces = run(stream, [0, 1, 2, 3, 4, 5, 6, 7])
    assert "".join(pieces) == expected == stream.text
    assert stream.stopped == (expected != "Once upon a time, the end.")


def test_what_may_be_a_stop_string_is_held_back_and_no_more() -> None:
    stream = TextStream(decode_words, [], ["\n\n", " the end"])
    assert [stream.add(t) for t in (0, 5, 1)] == ["Once", "", " the upon"]
    assert [stream.add(t) for t in (8, 0, 5, 6)] == ["", "\nOnce", "", ""]
    assert stream.stopped
    assert stream.end() == ""


def test_against_a_search_in_the_whole_text() -> None:
    chance = random.Random(0)
    for _ in range(500):
        tokens = [chance.randrange(97, 100) for _ in range(20)]
        stops = ["".join(chance.choices("abc", k=chance.randrange(1, 5))) for _ in range(2)]
        stream = TextStream(decode_bytes, [], stops)
        pieces = run(stream, tokens)
        text = bytes(tokens).decode()
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        first = text[: min(ends)] if ends else text  # generation ends with the first stop string that is complete
        places = [first.find(stop) for stop in stops if stop in first]
        assert "".join(pieces) == (first[: min(places)] if places else text)


def decode_without_special(tokens: list[int]) -> str:
    """As ``decode_stripped``; ids from 100 on are special tokens, which have no text."""
    return decode_stripped([token for token in tokens if token < 100])


@pytest.mark.parametrize("prompt", [[], [100], [0], [0, 100, 101, 102, 103, 104]])
@pytest.mark.parametrize("tokens", [[1, 100, 2, 3], [1, 100, 101, 2], [100, 1, 2], [1, 2, 100]])
def test_a_special_token_takes_no_space_away(prompt: list[int], tokens: list[int]) -> None:
    whole, before = decode_without_special(prompt + tokens), decode_without_special(prompt)
    assert "".join(run(TextStream(decode_without_special, prompt), tokens)) == whole.removeprefix(before)
