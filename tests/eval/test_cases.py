"""Mistakes in reading a user's own questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimkv_cli.errors import InputError
from trimkv_cli.eval.samples import Sample, read_samples

GOOD = '{"messages": [{"role": "user", "content": "Where?"}], "answer": "Here."}'


def _write(folder: Path, *lines: str) -> str:
    path = folder / "own.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_messages_and_prompts_are_read(tmp_path: Path) -> None:
    """Catches a shape of line that is lost."""
    path = _write(tmp_path, GOOD, "", '{"id": 3, "prompt": "2 + 2 =", "answer": "4"}')
    first = Sample(answer="Here.", messages=({"role": "user", "content": "Where?"},))
    assert read_samples(path) == [first, Sample(answer="4", prompt="2 + 2 =", id="3")]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt": "x"}',
        '{"prompt": "x", "answer": " "}',
        '{"answer": "x"}',
        '{"prompt": "", "answer": "x"}',
        '{"prompt": "x", "answer": "x", "head": -1}',
        '{"prompt": "x", "answer": "x", "also": "y"}',
        '{"prompt": "x", "answer": "x", "task": 7}',
        '{"prompt": "x", "answer": "x", "match": "maybe"}',
        '{"prompt": "x", "rules": [{"kind": "shouts"}]}',
        '{"prompt": "x", "rules": [{"kind": "language", "value": "Elvish"}]}',
        '{"prompt": "x", "rules": [{"kind": "most-words", "value": "few"}]}',
        '{"prompt": "x", "messages": [], "answer": "x"}',
        '{"messages": [], "answer": "x"}',
        '{"messages": [{"role": "user"}], "answer": "x"}',
        '{"messages": [{"role": "robot", "content": "x"}], "answer": "x"}',
        '{"messages": [{"role": ["user"], "content": "x"}], "answer": "x"}',
        '{"messages": [{"role": "assistant", "content": "x"}], "answer": "x"}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    """Catches a bad line that is passed over, or that nobody can find."""
    path = _write(tmp_path, GOOD, "", line)
    with pytest.raises(InputError) as caught:
        read_samples(path)
    assert caught.value.message.startswith(f"{path}:3: ")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """Catches a division by no questions."""
    with pytest.raises(InputError):
        read_samples(_write(tmp_path, ""))
