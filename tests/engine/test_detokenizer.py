"""Streaming text equals the whole decoding, in whole characters, and ends before a stop string."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from helpers import tiny_tokenizers as tiny
from trimkv_cli.engine.detokenizer import Detokenizer

MAKERS = {
    "byte-level": tiny.chatml,
    "legacy": tiny.phi3,
    "metaspace": tiny.llama2,
    "without prefix": tiny.gemma,
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return MAKERS[kind]()


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, stop)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_whole_decoding(kind: str, data: st.DataObject) -> None:
    """Catches lost spaces, doubled characters and a window cut inside one; ids past the vocabulary are no text."""
    tokenizer = tokenizer_of(kind)
    any_id = st.integers(0, len(tokenizer) + 5)
    often_bytes = st.integers(0, 262)  # in both kinds of vocabulary the bytes come first
    ids = data.draw(st.lists(st.one_of(any_id, often_bytes), max_size=60))
    assert "".join(pieces(tokenizer, ids)) == decoded(tokenizer, ids)


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_text_comes_in_whole_characters(kind: str, text: str) -> None:
    """Catches U+FFFD shown for a character whose last byte is still to come."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if "\ufffd" not in decoded(tokenizer, ids):
        assert not any("\ufffd" in piece for piece in pieces(tokenizer, ids))


def test_a_character_that_stays_broken_is_shown_at_the_end_only() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("x😀")[:-1]
    got = pieces(tokenizer, ids)
    assert "".join(got[:-1]) == "x"
    assert set(got[-1]) == {"\ufffd"}


def test_special_tokens_are_no_text_and_think_is() -> None:
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer.encode("<think>hm</think>\n<|im_start|>so<|im_end|>")
    assert "".join(pieces(tokenizer, ids)) == "<think>hm</think>\nso"


@pytest.mark.parametrize("kind", MAKERS)
def test_the_cost_per_token_does_not_grow(kind: str) -> None:
    """Catches decoding from the beginning at every token, also where nothing or only garbage is to be shown."""
    tokenizer = tokenizer_of(kind)
    text = tokenizer.encode("the quick brown 中文 fox 🎉 " * 50)
    garbage = tokenizer.encode("ÿ")[:1] * 500
    lengths: list[int] = []

    def counting(decode: Callable[..., str]) -> Callable[..., str]:
        return lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options)

    for ids in (text, [0] * 500, [*garbage, *text]):
        detokenizer = Detokenizer(tokenizer)
        detokenizer._tokenizer = type(
            "Counting",
            (),
            {
                "decode": staticmethod(counting(tokenizer.decode)),
                "convert_ids_to_tokens": staticmethod(tokenizer.convert_ids_to_tokens),
            },
        )()
        lengths.clear()
        for token_id in ids:
            detokenizer.push(token_id)
        assert sum(lengths) < 20 * len(ids) + 2000


def with_stop(text: str, *stop: str) -> tuple[str, bool]:
    tokenizer = tokenizer_of("byte-level")
    detokenizer = Detokenizer(tokenizer, stop)
    shown = "".join(detokenizer.push(token_id) for token_id in tokenizer.encode(text))
    return shown + detokenizer.finish(), detokenizer.stopped


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("Hello, world. And more", (".",), ("Hello, world", True)),
        ("Hello, world. And more", ("world. A",), ("Hello, ", True)),
        ("Hello", ("Hello!",), ("Hello", False)),
        ("abc abcd", ("abcd", "zz"), ("abc ", True)),
        ("one two three", ("three", "two"), ("one ", True)),
        ("xabcd", ("abcd", "bc"), ("xa", True)),
        ("xabc", ("bc", "abc"), ("x", True)),
        ("aab", ("ab",), ("a", True)),
        ("day 🎉🎉 night", ("🎉🎉",), ("day ", True)),
        ("line\n\nline", ("\n\n",), ("line", True)),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], want: tuple[str, bool]) -> None:
    """Catches a stop string that is shown, missed across tokens, or held back for ever."""
    assert with_stop(text, *stop) == want


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_stop_string_completed_first_wins(text: str, stop: list[str]) -> None:
    """Catches an answer that depends on how the text was cut into tokens."""
    ends = [(end, -len(word)) for end in range(len(text) + 1) for word in stop if text[:end].endswith(word)]
    want = (text[: sum(min(ends))], True) if ends else (text, False)
    assert with_stop(text, *stop) == want


def test_nothing_comes_after_a_stop() -> None:
    tokenizer = tokenizer_of("byte-level")
    detokenizer = Detokenizer(tokenizer, ["quick"])
    shown = [detokenizer.push(token_id) for token_id in tokenizer.encode("the quick brown fox")]
    assert ("".join(shown), detokenizer.finish(), detokenizer.stopped) == ("the ", "", True)


def test_what_cannot_become_a_stop_string_is_not_held_back() -> None:
    tokenizer = tokenizer_of("byte-level")
    detokenizer = Detokenizer(tokenizer, ["zebra"])
    for token_id in tokenizer.encode("Hello"):
        assert detokenizer.push(token_id) == tokenizer.decode([token_id])
