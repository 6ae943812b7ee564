"""Mistakes of an answer on the terminal: text that is lost or changed afterwards, and text that drives it."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.cells import cell_len

from trimkv_cli.events import HeadMemory, LayerMemory, Retained
from trimkv_cli.ui.cache_panel import Span, turn_map
from trimkv_cli.ui.chat.answer import AnswerView, Blocks, Thoughts, draw_block
from trimkv_cli.ui.chat.prompt import ChatPrompt, edit_outside
from trimkv_cli.ui.chat.screen import Screen, Status, status_line
from trimkv_cli.ui.look import Look

ANSWER = """# Cats

A **bold** cat, with `code` and <div> and [a link](http://x.y).
It goes on.

- one
- two

  still two

1. first

```python
def f():

    return "\x1b[2J"
```
| a | b |
|---|---|
| 1 | 2 |

End ![picture](http://p)"""
BLOCKS = ["# Cats", "A **bold**", "- one", "1. first", "```python", "| a | b |", "End !"]


def cut(text: str, size: int) -> Iterator[str]:
    return (text[at : at + size] for at in range(0, len(text), size))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_blocks_come_out_whole(size: int) -> None:
    """Catches blocks that depend on how the text was cut, lists torn at blank lines, and fences split in two."""
    blocks = Blocks()
    found = [block for piece in cut(ANSWER, size) for block in blocks.push(piece)] + blocks.finish()
    starts = [block[: len(start)] for block, start in zip(found, [*BLOCKS], strict=False)]
    assert [b.splitlines()[0] for b in found if b.startswith(("```", "|", "-"))] == ["- one", "```python", "| a | b |"]
    assert "".join("".join(found).split()) == "".join(ANSWER.split())
    assert starts[0] == "# Cats"


@given(st.text(alphabet="ab `~-*1.|\n#", max_size=60), st.integers(1, 9))
def test_no_character_is_lost(text: str, size: int) -> None:
    """Catches any text of which a part never comes out."""
    blocks = Blocks()
    found = [block for piece in cut(text, size) for block in blocks.push(piece)] + blocks.finish()
    assert "".join("".join(found).split()) == "".join(text.split())


@given(st.text(alphabet="<>/think a", max_size=40), st.integers(1, 5), st.booleans())
def test_reasoning_is_told_apart_however_it_is_cut(text: str, size: int, inside: bool) -> None:
    """Catches tags that are missed between two pieces, and text lost around them."""

    def split(pieces: Iterator[str]) -> tuple[str, str]:
        thoughts = Thoughts(inside=inside)
        found = [part for piece in pieces for part in thoughts.push(piece)] + thoughts.finish()
        return tuple("".join(t for kind, t in found if kind == want) for want in ("thought", "answer"))  # type: ignore[return-value]

    assert split(cut(text, size)) == split(iter([text]))
    assert split(iter(["<think>\nhm</think>\n\nyes"]))[1] == "yes"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("colour", [True, False])
def test_markdown_keeps_the_text(width: int, colour: bool) -> None:
    """Catches HTML, images and addresses that vanish, control codes that come through, and lines that are too wide."""
    blocks = Blocks()
    look = Look(width=width, colour=colour)
    drawn = "\n".join(draw_block(block, look) for block in [*blocks.push(ANSWER), *blocks.finish()])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn)
    assert colour == (plain != drawn)
    assert "\x1b" not in plain
    for part in ("<div>", "http://x.y", "http://p", "␛[2J", "still two", "# Cats"):
        assert part in plain
    assert max(cell_len(line) for line in plain.splitlines()) <= width
    assert not [line for line in plain.splitlines() if line.endswith(" ")]
    ascii_only = draw_block("- one\n\n---\n\n> two", Look(width=width, ascii=True))
    assert ascii_only.isascii()


def view(**options: object) -> tuple[AnswerView, io.BytesIO]:
    stream = io.BytesIO()
    screen = Screen(lambda: Look(width=60), moves=bool(options.pop("moves", True)), stream=stream)
    answer = AnswerView(screen, **options)  # type: ignore[arg-type]
    answer.screen = screen  # type: ignore[attr-defined]
    return answer, stream


def test_what_is_printed_never_changes() -> None:
    """Catches a passing line that stays behind, and an erased line that takes text with it."""
    answer, stream = view()
    seen = b""
    for piece in cut("<think>\nwhy\nnot</think>\n\nOne.\n\nTwo\x1b[1A.\n", 4):
        answer.push(piece)
        answer.screen.passing(f"at work {answer.preview}")  # type: ignore[attr-defined]
        kept = re.sub(rb"at work[^\r]*\r\x1b\[J", b"", stream.getvalue()).split(b"at work")[0]
        assert kept.startswith(seen)
        seen = kept
    answer.close()
    assert re.sub(rb"at work[^\r]*\r\x1b\[J", b"", stream.getvalue()).decode() == "┆ why\n┆ not\n\nOne.\n\nTwo␛[1A.\n"


def test_folded_reasoning_and_raw_text() -> None:
    """Catches reasoning that is shown although it is folded, and answers whose last newline is doubled."""
    answer, stream = view(thoughts="fold", markdown=False, in_thought=True)
    for piece in ("why not", "</think>\n\n", "# One\n", "\n"):
        answer.push(piece)
    answer.close()
    assert stream.getvalue().decode() == "┆ 2 words of reasoning (/set thoughts show)\n\n# One\n"
    empty, nothing = view()
    empty.close()
    assert nothing.getvalue() == b"\n"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_toolbar_at_three_widths(width: int) -> None:
    """Catches a toolbar that wraps, or that drops what matters most."""
    status = Status(
        model="some/model", kept=40, seen=1234, slots=40, horizon=77, tps=12.34, budget_bytes=2**33, peak_bytes=2**32
    )
    lines = {
        60: "kept 40/1,234 · M 40 · 4.0 GiB of 8.0 GiB · horizon 77",
        80: "kept 40/1,234 · M 40 · 4.0 GiB of 8.0 GiB · horizon 77 · 12.3 tok/s · some/model",
        120: "kept 40/1,234 · M 40 · 4.0 GiB of 8.0 GiB · horizon 77 · 12.3 tok/s · some/model",
    }
    expected = lines[width]
    if cell_len(expected) >= width:
        expected = expected.rpartition(" · ")[0]
    assert status_line(status, Look(width=width)) == expected
    assert status_line(status, Look(width=width, ascii=True)).isascii()


def ask(keys: str, *, history: Path | None = None, draft: str = "") -> tuple[str, bool]:
    with create_pipe_input() as pipe:
        return _ask(pipe, keys, history, draft)


def _ask(pipe: PipeInput, keys: str, history: Path | None, draft: str) -> tuple[str, bool]:
    prompt = ChatPrompt(
        history=history,
        complete=lambda _: [],
        look=Look(),
        input=pipe,
        output=DummyOutput(),
    )
    pipe.send_text(keys)
    typed = prompt.ask(draft, lambda: "toolbar")
    return typed.text, typed.literal


def test_keys() -> None:
    """Catches keys that send too early or too late, pastes that are obeyed, and drafts that are lost."""
    assert ask("one\r") == ("one", False)
    assert ask("one\ntwo\x1b\rthree\r") == ("one\ntwo\nthree", False)
    assert ask('"""a\rb\r"""\r') == ("a\nb", True)
    assert ask("\x1b[200~/exit\r\nnow\x1b[201~ and\r") == ("/exit\nnow and", True)
    assert ask("say \x1b[200~/exit\x1b[201~\r") == ("say /exit", False)
    assert ask("\x1b[200~/exit\x1b[201~\x03typed\r") == ("typed", False)
    assert ask("\r", draft="again") == ("again", False)
    for keys, error in (("\x04", EOFError), ("\x03", KeyboardInterrupt)):
        with pytest.raises(error):
            ask(keys)


def test_bytes_of_an_editor_that_are_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a byte of Latin-1 that ends the chat instead of being handed on, to be refused."""
    editor = tmp_path / "editor"
    editor.write_bytes(b"#!/bin/sh\nprintf 'caf\xe9\\n' >> \"$2\"\n")
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", f"{editor} -w")
    buffer = Buffer(document=Document("my \udce4"))
    asyncio.run(edit_outside(buffer))
    assert buffer.text == "my \udce4caf\udce9"


def test_history_is_private_and_comes_back(tmp_path: Path) -> None:
    """Catches a history that others can read, or that is not written."""
    path = tmp_path / "state" / "history"
    path.parent.mkdir()
    path.touch(0o644)
    ask("one\ntwo\r", history=path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert ask("\x10\r", history=path) == ("one\ntwo", False)


SCREENS = {
    60: """\
the share of (layer, head) slots that hold each message
    1 you  50% ▄ My cat is called Zubo. My dog is called R…
    model 100% █ 語語語語語語語語語語語語語語語語語語語語…""",
    80: """\
the share of (layer, head) slots that hold each message
    1 you  50% ▄ My cat is called Zubo. My dog is called Rex.␛[2J My bird has…
    model 100% █ 語語語語語語語語語語語語語語語語語語語語語語語語語語語語語語""",
    120: """\
the share of (layer, head) slots that hold each message
    1 you  50% ▄ My cat is called Zubo. My dog is called Rex.␛[2J My bird has no name.
    model 100% █ 語語語語語語語語語語語語語語語語語語語語語語語語語語語語語語""",
}


@pytest.mark.parametrize("width", SCREENS)
def test_the_map_of_turns_at_three_widths(width: int) -> None:
    """Catches a wrong share, lines that wrap, and messages that drive the terminal."""
    head = HeadMemory(positions=(0, 1, 4, 5), log_beta=(-1.0,) * 4, threshold=None)
    retained = Retained(seen=6, layers=(LayerMemory(slots=8, window=None, heads=(head,)),))
    said = "My cat is called Zubo.\nMy dog is called Rex.\x1b[2J My bird has no name."
    spans = [Span("   1 you", said, 0, 4), Span("model", "語" * 30, 4, 6)]
    look = Look(width=width)
    assert look.paint(turn_map(retained, spans, look)) == SCREENS[width]
