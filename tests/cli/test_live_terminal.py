"""Mistakes of the live panel in a real run on a terminal: pieces that stay, an answer that is drawn over."""

from __future__ import annotations

from pathlib import Path

import pyte

from helpers.programs import trimkv, trimkv_on_a_terminal


def test_a_terminal_ends_up_with_the_same_answer_and_no_panel(tmp_path: Path) -> None:
    """Catches a frame that is left behind, lines of the answer that it erased, and a cursor that stays hidden."""
    names = []
    for index in range(3):
        names.append(str(tmp_path / f"{index}.txt"))
        Path(names[-1]).write_text(f"Note 1: the box is in room {index}. We walked along the river.\n" * 40)
    arguments = ("summarize", *names, "-n", "12", "--greedy", "--threads", "1", "-m", "mini")
    plain = [line.rstrip() for line in trimkv(*arguments).stdout.decode().strip().splitlines()]
    shown = trimkv_on_a_terminal(*arguments)
    assert b"KV cache" in shown  # the panel was there
    assert b"\x1b[?25l" not in shown
    screen = pyte.Screen(200, 60)
    pyte.ByteStream(screen).feed(shown)
    lines = [line.rstrip() for line in screen.display]
    text = "\n".join(lines)
    answer = "\n".join(line for line in lines if not line.startswith(("stopped after", "warning")))
    assert "\n".join(plain) in answer
    assert "KV cache" not in text
    assert "tokens read at" in text
