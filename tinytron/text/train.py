"""Trains a tokenizer on the text that it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tinytron.text.characters import train_characters
from tinytron.text.options import TokenizeOptions
from tinytron.text.tokenizers import BPE_END, first_bytes, train_bpe


def train_tokenizer(
    options: TokenizeOptions, documents: Iterable[tuple[str, str | None]], say: Callable[[str], object]
) -> bytes:
    """The tokenizer.json that ``options`` ask for, made from the texts and splits of ``documents``. Byte-level BPE is
    trained on the first training documents. A character tokenizer gets the characters of all documents, including held-out
    ones, because texts with other characters cannot be encoded."""
    if options.train_chars:
        kept = (text for text, split in documents if split is not None)
        made = train_characters(kept, None if options.eot_position == "none" else BPE_END)
        say(f"tokenizer: one token for each of {made.get_vocab_size(with_added_tokens=False)} characters")
        return str(made.to_str()).encode()
    assert options.train_bpe is not None, "no other kind of tokenizer is trained"
    used = 0

    def texts() -> Iterator[str]:
        nonlocal used
        training = (text for text, split in documents if split == options.split)
        for text in first_bytes(training, options.train_bpe_bytes):
            used += len(text.encode())
            yield text

    say(f"training a tokenizer of {options.train_bpe} tokens")
    trained = str(train_bpe(texts(), options.train_bpe).to_str()).encode()
    say(f"trained the tokenizer on {used:,} bytes of text")
    return trained
