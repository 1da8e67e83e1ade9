"""Generation against the path without a cache: greedy tokens, batches, seeds, ends."""

from __future__ import annotations

import math

import pytest
import torch

from tests.inference.models import BLOCK, MODELS, greedy, logits_of, make_model, random_ids
from tinytron.distributed.layout import ParallelLayout
from tinytron.errors import CheckpointError, ConfigError
from tinytron.inference import Generation, Piece, SamplingOptions, complete, stream
from tinytron.inference.engine import _uniform
from tinytron.inference.sampler import next_tokens

GREEDY = SamplingOptions(max_new_tokens=8, temperature=0)
PROMPTS = [random_ids(9, 1), random_ids(4, 2), random_ids(1, 3), random_ids(12, 4)]


def letters(tokens: list[int]) -> str:
    """A tokenizer: 0 is A, 1 is B, ..."""
    return "".join(chr(65 + token) for token in tokens)


def tokens_of(result: Generation) -> list[list[int]]:
    return [sample.tokens for sample in result.samples]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_the_path_without_a_cache(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype)
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert tokens_of(complete(model, PROMPTS, GREEDY)) == expected
    assert [tokens_of(complete(model, [prompt], GREEDY))[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("name", ["plain", "learned", "some windows", "all at once"])
def test_samples_are_those_of_the_path_without_a_cache(name: str) -> None:
    model = make_model(name)
    options = SamplingOptions(
        max_new_tokens=7, temperature=2.0, top_k=20, top_p=0.95, min_p=0.01, seed=5, num_samples=3
    )
    result = complete(model, PROMPTS, options)
    assert [(s.prompt, s.number) for s in result.samples] == [(p, n) for p in range(4) for n in range(3)]
    for sample in result.samples:
        ids = list(PROMPTS[sample.prompt])
        for u in _uniform(ids, sample.number, 5, 7):
            ids += next_tokens(logits_of(model, ids)[-1:], options, u.view(1)).tolist()
        assert sample.tokens == ids[len(PROMPTS[sample.prompt]) :]


def test_a_sample_does_not_depend_on_the_others() -> None:
    model, options = make_model("moe"), SamplingOptions(max_new_tokens=6, temperature=3.0, num_samples=2)
    together = tokens_of(complete(model, PROMPTS, options))
    assert tokens_of(complete(model, PROMPTS[::-1], options)) == [s for i in (6, 4, 2, 0) for s in together[i : i + 2]]
    assert tokens_of(complete(model, PROMPTS, options, batch_size=3)) == together
    assert tokens_of(complete(model, [PROMPTS[2]], options)) == together[4:6]
    shorter = SamplingOptions(max_new_tokens=3, temperature=3.0, num_samples=1)
    assert tokens_of(complete(model, PROMPTS, shorter)) == [s[:3] for s in together[::2]]


def test_seeds_and_numbers_differ() -> None:
    model = make_model()
    options = [SamplingOptions(max_new_tokens=8, temperature=5.0, num_samples=4, seed=seed) for seed in (0, 1)]
    made = [tuple(tokens) for o in options for tokens in tokens_of(complete(model, PROMPTS[:1], o))]
    assert len(set(made)) == 8


def test_stop_tokens_end_before_them() -> None:
    model = make_model()
    whole = tokens_of(complete(model, PROMPTS, GREEDY))
    stop = whole[0][3]
    options = SamplingOptions(max_new_tokens=8, temperature=0, stop_tokens=(stop,))
    for sample, tokens in zip(complete(model, PROMPTS, options).samples, whole, strict=True):
        assert sample.tokens == (tokens[: tokens.index(stop)] if stop in tokens else tokens)
        assert sample.finish == ("stop" if stop in tokens else "length")


def test_rows_that_end_leave_the_others_their_numbers() -> None:
    model, options = make_model(), SamplingOptions(max_new_tokens=9, temperature=3.0, num_samples=4)
    whole = tokens_of(complete(model, PROMPTS, options))
    early = SamplingOptions(max_new_tokens=9, temperature=3.0, num_samples=4, stop_tokens=tuple(range(0, 29, 5)))
    made = tokens_of(complete(model, PROMPTS, early))
    assert made == [t[: next((i for i, x in enumerate(t) if x % 5 == 0), 9)] for t in whole]
    assert len({len(tokens) for tokens in made}) > 3


def test_stop_strings_end_behind_the_token_that_completes_them() -> None:
    model = make_model()
    whole = tokens_of(complete(model, PROMPTS, GREEDY))[0]
    text = letters(whole)
    stop = text[2:4]
    options = SamplingOptions(max_new_tokens=8, temperature=0, stop=(stop,))
    (sample,) = complete(model, PROMPTS[:1], options, decode=letters).samples
    end = text.index(stop)
    assert (sample.tokens, sample.text, sample.finish) == (whole[: end + 2], text[:end], "stop")


def test_a_stop_string_that_only_the_last_token_completes() -> None:
    model = make_model()
    text = letters(tokens_of(complete(model, PROMPTS[:1], GREEDY))[0])
    options = SamplingOptions(max_new_tokens=8, temperature=0, stop=(text[-2:] + "never", text[-1] + "no"))
    (sample,) = complete(model, PROMPTS[:1], options, decode=letters).samples
    assert (sample.text, sample.finish) == (text, "length")


@pytest.mark.parametrize("name", ["plain", "learned"])
def test_a_text_beyond_what_the_model_can_read_goes_on_from_its_newest_half(name: str) -> None:
    model = make_model(name)
    prompts = [random_ids(BLOCK - 2, 1), random_ids(BLOCK, 2), random_ids(3, 3)]
    result = complete(model, prompts, SamplingOptions(max_new_tokens=40, temperature=0))
    assert tokens_of(result) == [greedy(model, prompt, 40) for prompt in prompts]
    assert [sample.cuts for sample in result.samples] == [3, 3, 2]
    assert {sample.finish for sample in result.samples} == {"length"}


def test_cut_samples_do_not_depend_on_the_others() -> None:
    model, options = make_model("moe"), SamplingOptions(max_new_tokens=45, temperature=3.0, num_samples=2)
    together = tokens_of(complete(model, PROMPTS, options))
    assert tokens_of(complete(model, [PROMPTS[2]], options)) == together[4:6]
    assert tokens_of(complete(model, PROMPTS, options, batch_size=3)) == together
    stopping = SamplingOptions(max_new_tokens=45, temperature=3.0, num_samples=2, stop_tokens=(3,))
    early = tokens_of(complete(model, PROMPTS, stopping))
    assert early == [t[: t.index(3)] if 3 in t else t for t in together]


def test_tokens_beyond_the_tokenizer_are_never_taken() -> None:
    model = make_model()
    options = SamplingOptions(max_new_tokens=12, temperature=50.0, num_samples=8)
    assert max(t for tokens in tokens_of(complete(model, PROMPTS, options)) for t in tokens) > 10
    assert max(t for tokens in tokens_of(complete(model, PROMPTS, options, vocab_size=10)) for t in tokens) < 10


def test_pieces_make_up_the_samples() -> None:
    model, pieces = make_model(), list[Piece]()
    options = SamplingOptions(max_new_tokens=6, temperature=1.0, num_samples=2, stop=("AB", "C"))
    result = complete(model, PROMPTS, options, decode=letters, batch_size=3, on_piece=pieces.append)
    for index, sample in enumerate(result.samples):
        own = [piece for piece in pieces if piece.sample == index]
        assert "".join(piece.text for piece in own) == sample.text
        assert [piece.token for piece in own if piece.token is not None] == sample.tokens
        assert [piece.finish for piece in own] == [None] * (len(own) - 1) + [sample.finish]


def test_a_stream_gives_pieces_one_by_one() -> None:
    pieces = stream(make_model(), PROMPTS[:1], GREEDY, decode=letters)
    first = next(pieces)
    assert (first.sample, first.finish, len(first.text)) == (0, None, 1)
    assert len(list(pieces)) == 7


def test_counts_and_rates() -> None:
    result = complete(make_model(), PROMPTS[:2], SamplingOptions(max_new_tokens=5, temperature=1.0, num_samples=3))
    assert (result.prefill_tokens, result.decode_tokens) == (13, 2 * 3 * 4)
    assert result.prefill_rate == result.prefill_tokens / result.prefill_seconds
    assert result.decode_rate == result.decode_tokens / result.decode_seconds
    assert (Generation([]).prefill_rate, Generation([]).decode_rate) == (0.0, 0.0)


def test_the_mode_of_the_model_stays_and_dropout_sleeps() -> None:
    model = make_model("plain", dropout=0.5)
    expected = tokens_of(complete(model, PROMPTS, GREEDY))
    model.train()
    assert tokens_of(complete(model, PROMPTS, GREEDY)) == expected
    assert model.training


def test_bf16_makes_sense() -> None:
    model = make_model("some windows", torch.bfloat16)
    result = complete(model, PROMPTS, SamplingOptions(max_new_tokens=8, temperature=1.0))
    assert all(0 <= token < 29 for tokens in tokens_of(result) for token in tokens)


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ([], GREEDY, "a prompt needs at least one token; use the end-of-text token to start from nothing"),
        ([1] * 25, GREEDY, "a prompt of 25 tokens exceeds --block_size 24 of the model; use at most 24 tokens"),
        ([1, 29], GREEDY, "a prompt has token id 29, outside 0..28 of the model; check the tokenizer"),
        ([-1, 2], GREEDY, "a prompt has token id -1, outside 0..28"),
        ([1], SamplingOptions(stop=("x",)), "--stop 'x' needs a tokenizer; give one"),
    ],
)
def test_prompts_that_cannot_be_continued(prompt: list[int], options: SamplingOptions, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        complete(make_model(), [[1], prompt], options)
    assert text in str(error.value)


def test_a_model_in_pieces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stream; ``complete`` uses it, on all ranks (tests/evaluation/test_kinds.py)."""
    model = make_model("moe")
    monkeypatch.setattr(model, "state", type("State", (), {"layout": ParallelLayout(2, sep=2), "groups": {"ep": 1}})())
    with pytest.raises(ConfigError, match="spread over several processes; save a checkpoint"):
        next(stream(model, [[1]], GREEDY))


def test_uniform_numbers_begin_alike_and_lie_in_the_interval() -> None:
    long = _uniform([1, 2], 0, 0, 1000)
    assert torch.equal(_uniform([1, 2], 0, 0, 10), long[:10])
    assert 0 <= float(long.min()) < 0.01
    assert 0.99 < float(long.max()) < 1
    assert math.isclose(float(long.mean()), 0.5, abs_tol=0.05)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {}])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_precision(options: dict[str, float]) -> None:
    model = make_model(dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4).clamp_(-6e4, 6e4)
        model.final_norm.weight.fill_(6e4)
    with pytest.raises(ConfigError, match=r"NaN or infinite in fp16.*--dtype fp32"):
        complete(model, PROMPTS[:1], SamplingOptions(**options))
    model = make_model()
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*use an earlier checkpoint"):
        complete(model, PROMPTS[:1], SamplingOptions(**options))
