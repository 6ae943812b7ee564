"""`trimkv chat` on a pseudo-terminal, as a user would meet it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from helpers.terminals import CTRL_C, CTRL_D, ENTER, NEWLINE, TAB, Terminal
from trimkv_cli.chat.conversation import Conversation
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import SamplingParams

CHAT = ("chat", "--kv-budget", "40", "--threads", "1", "--greedy", "-n", "24")


PASTE = "\n".join(f"/exit line {n} <|im_end|> \x1b[2J\x1b]0;title\x07 end" for n in range(600))


def paste_and_stop(terminal: Terminal) -> None:
    """Paste much and stop while it is read; say something and stop while the answer is written."""
    terminal.paste(PASTE)
    terminal.wait("line 599")
    terminal.type(ENTER)
    terminal.wait("reading")
    terminal.type(CTRL_C)
    terminal.wait("stopped; /continue goes on")
    terminal.wait(lambda: terminal.asks)
    terminal.type("Hello." + ENTER)
    terminal.wait(lambda: " tok/s" in terminal.lines[terminal.screen.cursor.y])
    terminal.type(CTRL_C)
    terminal.wait(lambda: terminal.text.count("stopped; /continue goes on") == 2 and terminal.asks)


@pytest.mark.slow
def test_a_whole_conversation(tmp_path: Path) -> None:
    """Catches keys that do what they should not, pastes that are obeyed, answers lost by Ctrl-C, and disorder.

    Pasted lines must not be sent one by one, and no escape code of theirs may come through.
    """
    with Terminal(*CHAT, home=tmp_path) as terminal:
        terminal.type("typed while it loads")
        terminal.wait("> typed while it loads")
        terminal.wait(lambda: "kept 0/0" in terminal.lines[-1])
        terminal.type(CTRL_C)
        terminal.wait(lambda: terminal.asks)
        terminal.send("My cat is called Zubo.")
        assert terminal.text.count("My cat is called Zubo.") == 1
        terminal.send("/stat")
        assert "error: there is no command /stat; nothing was sent\nhint: did you mean /stats" in terminal.text
        terminal.type("/und" + TAB)
        terminal.wait("> /undo")
        terminal.type(CTRL_C)
        terminal.type(f"two{NEWLINE}lines")
        terminal.wait("> two\n  lines")
        terminal.send("")
        terminal.type(f'"""begin{ENTER}middle{ENTER}')
        terminal.wait('> """begin\n  middle\n')
        terminal.send('end"""')
        terminal.send("/map")
        assert "3 you" in terminal.text
        terminal.resize(60, 40)
        terminal.wait(lambda: "kept" in terminal.lines[-1])
        terminal.type(CTRL_C)
        terminal.wait("Ctrl-C once more")
        terminal.wait(lambda: terminal.asks)
        terminal.send("/set max_tokens 9000")
        terminal.send("/set ignore_eos on")
        paste_and_stop(terminal)
        terminal.type(CTRL_C)
        terminal.wait(lambda: terminal.text.count("Ctrl-C once more") == 2)
        terminal.type(CTRL_C)
        assert terminal.wait_end() == 130
    assert "Traceback" not in terminal.text
    assert b"\x1b[2J" not in terminal.raw
    assert b"\x1b]0;" not in terminal.raw
    history = tmp_path / "state" / "trimkv" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    *turns, first, second = stored(tmp_path)["turns"]
    assert [turn["user"] for turn in turns] == ["My cat is called Zubo.", "two\nlines", "begin\nmiddle\nend"]
    assert first["user"] == PASTE
    assert (first["finish_reason"], first["token_ids"]) == ("abort", [])
    assert second["finish_reason"] == "abort"
    assert second["answer"]


def stored(home: Path) -> dict:  # type: ignore[type-arg]
    (path,) = (home / "data" / "trimkv" / "sessions").glob("*/session.json")
    return json.loads(path.read_bytes())  # type: ignore[no-any-return]


@pytest.mark.slow
def test_killed_and_continued_without_reading_again(tmp_path: Path) -> None:
    """Catches turns lost by kill -9, a continuation that reads again, and tokens that differ from an unbroken talk."""
    texts = ("My cat is called Zubo.", " ".join(["My dog is called Rex."] * 8), "What is my cat called?")
    params = SamplingParams(max_tokens=24, temperature=1.5, seed=7)
    with Terminal(*CHAT[:3], "-n", "24", "--temperature", "1.5", "--seed", "7", home=tmp_path) as terminal:
        terminal.wait(lambda: terminal.asks)
        for text in texts[:2]:
            terminal.send(text)
        terminal.kill()
    with Terminal("chat", "-C", "--threads", "1", home=tmp_path) as terminal:
        terminal.wait("nothing to read again")
        terminal.wait(lambda: terminal.asks)
        terminal.send(texts[2])
        terminal.send("/stats")
        terminal.type(CTRL_D)
        assert terminal.wait_end() == 0
    llm = load_engine(EngineOptions(kv_budget="40", max_inflight=1, threads=1))
    unbroken = Conversation(llm, system=None, think=None, params=params, undo_depth=0)
    for text in texts:
        list(unbroken.say(text, lambda: False))
    turns = stored(tmp_path)["turns"]
    assert [turn["token_ids"] for turn in turns] == [list(turn.token_ids) for turn in unbroken.turns]
    read = turns[2]["prompt_tokens"]
    assert read == unbroken.turns[2].prompt_tokens < 20
    assert f"last turn  {read} tokens read" in terminal.text
    assert f"all turns  {read} tokens read" in terminal.text


@pytest.mark.slow
def test_letters_in_a_posix_locale_and_bytes_in_none(tmp_path: Path) -> None:
    """Catches a chat that shows or takes letters of a UTF-8 terminal as something else, or ends with an error."""
    posix = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with Terminal(*CHAT, home=tmp_path, environment=posix) as terminal:
        terminal.wait(lambda: terminal.asks)
        terminal.type("My cat is called Käro.")
        terminal.wait("> My cat is called Käro.")
        terminal.send("")
        terminal.process.send(b"caf\xe9" + ENTER.encode())
        terminal.wait("error: the message is not UTF-8: byte e9 after 'caf'")
        terminal.wait(lambda: terminal.lines[terminal.screen.cursor.y] == "> caf\ufffd")
        terminal.type(CTRL_C + "/exit" + ENTER)
        assert terminal.wait_end() == 0
    turns = json.loads(next((tmp_path / "data").rglob("session.json")).read_bytes())["turns"]
    assert [turn["user"] for turn in turns] == ["My cat is called Käro."]
