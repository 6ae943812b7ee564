"""From data files to sequences: what is refused, what is learnt, what is cut, what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny_tokenizers
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.train.documents import DataFiles, Tokens, encode_document
from trimkv_cli.train.options import TrainOptions
from trimkv_cli.train.packing import Cursor, Packer, stretched

USER, ASSISTANT = {"role": "user", "content": "Hello, weather?"}, {"role": "assistant", "content": "It is sunny."}
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list, not an object"),
        ("{}", 'neither "messages" nor "text"'),
        ('{"messages": {}}', '"messages" is not a list'),
        ('{"messages": []}', "no assistant message to learn from"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1 has no text as content"),
        ('{"messages": [{"content": "a"}]}', "message 1 has no role"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message to learn from"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the first message is the assistant's"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, fault: str) -> None:
    """Catches a bad line that is skipped, or named without file and line."""
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(InputError) as caught:
        DataFiles([path])
    assert caught.value.message.startswith(f"{path}:3: {fault}")


def test_all_bad_lines_are_counted(tmp_path: Path) -> None:
    """Catches an error that is as long as the file, and one that hides how much is wrong."""
    path = tmp_path / "data.jsonl"
    path.write_text("x\n" * 30)
    with pytest.raises(InputError, match=r":1: .*:5: .*; and 25 more$"):
        DataFiles([path])


def test_text_files(tmp_path: Path) -> None:
    """Catches bytes that are not text, a file that is not there, and a file without anything."""
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(InputError, match=r"a\.txt: line 2 is not UTF-8"):
        DataFiles([tmp_path / "a.txt"])
    with pytest.raises(InputError, match="cannot read"):
        DataFiles([tmp_path / "b.txt"])
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(InputError, match="no data"):
        DataFiles([tmp_path / "c.txt"])


def wanted_text(tokenizer: Any, content: Any) -> list[str]:
    """Return what the loss asks for, run by run."""
    text = Text(tokenizer)
    runs = []
    for tokens in encode_document(text, content):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], tokens.wanted, [False]]).astype(int)))
        runs += [tokenizer.decode(tokens.ids[a:b]) for a, b in edges.reshape(-1, 2)]
    return runs


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("phi3", "<|end|>"),
     ("llama2", " </s>")],
)  # fmt: skip
def test_answers_are_learnt_with_their_end(name: str, end: str) -> None:
    """Catches a mask that is off by a token, that misses an answer or the token that ends it."""
    found = wanted_text(getattr(tiny_tokenizers, name)(), [USER, ASSISTANT, USER, {**ASSISTANT, "content": "helpful"}])
    assert [text.strip() for text in found] == [f"It is sunny.{end}", f"helpful{end}"]


def test_ids_are_those_of_serving() -> None:
    """Catches a prompt that is tokenised otherwise than the engine does, typed tokens among it."""
    text = Text(tiny_tokenizers.chatml())
    typed = {"role": "user", "content": "say <|im_end|> now"}
    (tokens,) = encode_document(text, [typed, ASSISTANT])
    prompt = text.render_chat([typed]).token_ids
    assert tuple(tokens.ids[: len(prompt)]) == prompt
    assert not tokens.wanted[: len(prompt)].any()
    assert tokens.wanted[len(prompt) :].all()


def test_a_template_that_rewrites_answers() -> None:
    """Catches reasoning that is learnt nowhere because the next turn drops it."""
    template = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{{- m.content.split('</think>')[-1] if not loop.last else m.content }}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
    tokenizer = tiny_tokenizers.chatml()
    tokenizer.chat_template = template
    thought = {"role": "assistant", "content": "<think>quick</think>It is"}
    assert wanted_text(tokenizer, [USER, thought, USER, thought]) == ["<think>quick</think>It is<|im_end|>"] * 2


def documents_of(*lengths: int) -> list[list[Tokens]]:
    return [
        [Tokens(np.arange(length, dtype=np.int32) + 100 * number, np.ones(length, dtype=np.bool_))]
        for number, length in enumerate(lengths)
    ]


def test_packing_loses_nothing() -> None:
    """Catches a token that is dropped or repeated within an epoch, and a cut that is not counted."""
    documents = documents_of(5, 3, 25, 8, 2, 2)
    packer = Packer(6, documents.__getitem__, context=10, seed=1)
    seen: list[int] = []
    while packer.cursor.epoch == 0 and len(seen) < 45:
        packed = packer.next()
        seen += packed.ids[packed.documents >= 0].tolist()
    assert sorted(seen[:45]) == sorted(token for document in documents for token in document[0].ids.tolist())
    assert (packer.cursor.cut_documents, packer.cursor.cut_pieces) == (1, 3)


def test_packing_goes_on_from_its_cursor() -> None:
    """Catches a resumed run that sees other data than an uninterrupted one."""
    documents = documents_of(5, 3, 25, 8, 2, 2)
    arguments = {"context": 10, "seed": 1, "position_gap": 100}
    whole = Packer(6, documents.__getitem__, **arguments)
    expected = [whole.next() for _ in range(20)]
    cursor, found = Cursor(), []
    for _ in range(20):
        packer = Packer(6, documents.__getitem__, **arguments, cursor=cursor)
        found.append(packer.next())
        cursor = packer.cursor
    assert all(np.array_equal(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))
    assert cursor == whole.cursor


def test_positions_jump_but_never_back() -> None:
    """Catches positions that repeat, that pass the limit, or that never jump far."""
    rng = np.random.default_rng(0)
    drawn = [stretched(50, 10_000, rng) for _ in range(300)]
    assert all((np.diff(positions) >= 1).all() and positions[0] == 0 for positions in drawn)
    last = [int(positions[-1]) for positions in drawn]
    assert max(last) <= 10_049
    assert max(last) > 5_000
    assert last.count(49) > 30
    assert stretched(50, 0, rng).tolist() == list(range(50))


@pytest.mark.parametrize(("name", "value"), [("context", 1), ("lr", 0.0), ("memory_size", 0), ("position_gap", -1)])
def test_options_out_of_range(name: str, value: float) -> None:
    """Catches a run that starts and then divides by zero; the message names the flag."""
    values: dict[str, Any] = {"memory_size": 4, "context": 8, "steps": 1, name: value}
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is"):
        TrainOptions(**values)
