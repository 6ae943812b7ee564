"""Mistakes of the commands inside a conversation: each is run, and none of them reaches the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.talking import begin, load
from trimkv_cli.chat.autosave import Autosave
from trimkv_cli.chat.store import SessionStore
from trimkv_cli.commands.chat.slash_command import Chat
from trimkv_cli.commands.chat.talk import COMMANDS, complete, handle, status_of
from trimkv_cli.ui.chat.prompt import Typed
from trimkv_cli.ui.chat.screen import status_line
from trimkv_cli.ui.look import Look


class Recorder:
    """A screen that remembers what it was told."""

    look = Look(width=80)

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.notes: list[str] = []
        self.errors: list[str] = []
        self.copied: list[str] = []

    def print(self, text: str = "") -> None:
        self.shown.append(text)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def error(self, message: str, hint: str | None = None) -> None:
        self.errors.append(f"{message} | {hint}")

    def copy(self, text: str) -> bool:
        self.copied.append(text)
        return True


@pytest.fixture
def chat(engine: Any, tmp_path: Path) -> Iterator[Chat]:
    with chatting(engine, tmp_path) as chat:
        yield chat


@contextmanager
def chatting(engine: Any, tmp_path: Path) -> Iterator[Chat]:
    conversation = begin(engine)
    autosave = Autosave(SessionStore(tmp_path / "sessions"), options={})

    def run(start: Callable[[Callable[[], bool]], Any]) -> None:
        for _ in start(lambda: False):
            pass
        autosave.save(conversation)

    yield Chat(conversation=conversation, autosave=autosave, display=Recorder(), run=run)
    conversation.clear()
    autosave.close()


def enter(chat: Chat, *lines: str) -> Recorder:
    """Enter lines one after the other; return what the last one brought."""
    screen: Any = Recorder()
    for line in lines:
        screen = chat.display = Recorder()
        handle(chat, Typed(line, literal=False), screen)
    return screen  # type: ignore[no-any-return]


def test_bytes_that_are_not_utf_8_end_neither_the_chat_nor_in_it(chat: Chat, tmp_path: Path) -> None:
    """Catches a chat that ends with an error of the tokenizer, a line that is lost, and a file that cannot be named."""
    assert enter(chat, "My caf\udce9 is called Mila.").errors == [
        "the message is not UTF-8: byte e9 after 'My caf' | the line is there again, with U+FFFD for what is not UTF-8"
    ]
    assert chat.draft == "My caf\ufffd is called Mila."
    assert not chat.conversation.turns
    for line in ("/system x\udce9", "/set stop x\udce9", "/why x\udce9", "/pin x\udce9", "/save x\udce9"):
        assert "is not UTF-8: byte e9 after" in enter(chat, line).errors[0]
    pasted: Any = Recorder()
    handle(chat, Typed("/exit\udce9", literal=True), pasted)
    assert chat.draft == " /exit\ufffd"
    assert len(pasted.errors) == 1
    enter(chat, "My cat is called K\udcc3\udca4ro.")
    assert users(chat) == ["My cat is called Käro."]
    path = f"{tmp_path}/caf\udce9.txt"
    Path(path).write_text("hello")
    enter(chat, f"/file {path}")
    assert [text for _, text in chat.attached] == ["hello"]


def test_files_are_read_in_any_encoding(chat: Chat, tmp_path: Path) -> None:
    """Catches a file of the chat that is read otherwise than one of `ask`."""
    path = tmp_path / "t.html"
    path.write_bytes("<p>我的猫".encode("gb18030"))
    assert "is not UTF-8 (byte ce at 3)" in enter(chat, f"/file {path}").errors[0]
    assert "no encoding 'klingon'" in enter(chat, "/set encoding klingon").errors[0]
    enter(chat, "/set encoding gb18030", f"/file {path}")
    assert [text for _, text in chat.attached] == ["我的猫"]


def users(chat: Chat) -> list[str]:
    return [turn.user for turn in chat.conversation.turns]


def test_unknown_commands_get_a_suggestion_and_are_not_sent(chat: Chat) -> None:
    """Catches a typing mistake that becomes a message, and a message that is taken for a command."""
    assert enter(chat, "/undoo").errors == [
        "there is no command /undoo; nothing was sent | did you mean /undo: Take back the last turn, or the last N."
    ]
    assert "/help lists" in enter(chat, "/").errors[0]
    assert enter(chat, "/etc/passwd is a file").errors
    assert users(chat) == []
    enter(chat, " /etc is a folder", "/not a command\nbut two lines")
    handle(chat, Typed("/exit pasted", literal=True), Recorder())  # type: ignore[arg-type]
    assert users(chat) == ["/etc is a folder", "/not a command\nbut two lines", "/exit pasted"]
    assert not chat.ended


def test_help_names_every_command_and_exit_ends(chat: Chat) -> None:
    """Catches a command that is not listed."""
    shown = " ".join(" ".join(enter(chat, "/help").shown).split())
    assert all(f"/{command.name}" in shown and command.help in shown for command in COMMANDS)
    assert enter(chat, "/help undo").shown == ["/undo [N]  Take back the last turn, or the last N."]
    enter(chat, "/exit")
    assert chat.ended


def test_every_command_says_what_it_lacks(chat: Chat) -> None:
    """Catches tracebacks in an empty conversation and without arguments."""
    needs_turn = ("/regen", "/undo", "/edit", "/continue", "/cache", "/map", "/why", "/copy", "/stats", "/pin")
    for line in (
        *needs_turn,
        "/export",
        "/load",
        "/fork",
        "/save",
        "/load ../x",
        "/show me",
        "/set nothing",
        "/budget",
    ):
        assert len(enter(chat, line).errors) == 1, line
    for line in ("/clear", "/system", "/set", "/show", "/file", "/sessions", "/help"):
        assert enter(chat, line).errors == [], line
    assert enter(chat, "Hello.", "/undo x").errors


def test_going_back_and_on(chat: Chat) -> None:
    """Catches turns that /undo, /regen, /edit or /clear lose or keep."""
    enter(chat, "My cat is called Zubo.", "Tell me more.")
    first = chat.conversation.turns[1]
    enter(chat, "/regen")
    assert users(chat) == ["My cat is called Zubo.", "Tell me more."]
    assert chat.conversation.turns[1].attempt == 1
    enter(chat, "/edit")
    assert (chat.draft, len(users(chat))) == ("Tell me more.", 1)
    enter(chat, chat.draft)
    assert chat.conversation.turns[1] == first
    assert enter(chat, "/undo 2").notes == ["took back 2 turns; 0 left"]
    name = chat.autosave.name
    enter(chat, "Hello.", "/clear")
    assert users(chat) == []
    assert chat.conversation.row is None
    assert enter(chat, f"/load {name}").notes[0].startswith(f"{name}: 1 turns, ")
    assert users(chat) == ["Hello."]


def test_an_answer_cut_by_its_length_goes_on(chat: Chat) -> None:
    """Catches /continue that makes a turn of its own."""
    enter(chat, "/set max_tokens 2", "My cat is called Zubo.", "/set max_tokens 24", "/continue")
    assert len(chat.conversation.turns) == 1
    assert len(chat.conversation.turns[0].token_ids) > 2


def test_a_regen_that_cannot_run_loses_nothing(chat: Chat) -> None:
    """Catches a turn that is gone although its new answer was refused."""
    enter(chat, "Hello.", "/set max_tokens 100000")
    before = list(chat.conversation.turns)
    assert "positions" in enter(chat, "/regen").errors[0]
    assert "/clear begins" in enter(chat, "Hi.").errors[0]
    assert chat.conversation.turns == before
    assert not chat.conversation.must_reread


def test_settings(chat: Chat) -> None:
    """Catches settings that are not taken, or taken although they make no sense."""
    enter(chat, "/set temperature 0.5", "/set top_k 7", "/set stop END", "/set ignore-eos on", "/set thoughts fold")
    params = chat.conversation.params
    assert (params.temperature, params.top_k, params.stop, params.ignore_eos) == (0.5, 7, ("END",), True)
    enter(chat, "/set markdown off", "/set think off", "/set stop off")
    assert (chat.shown.markdown, chat.shown.thoughts, chat.conversation.think) == (False, "fold", False)
    assert chat.conversation.params.stop == ()
    for line in ("/set temperature warm", "/set top_p 2", "/set markdown maybe", "/set top_k 1.5"):
        assert len(enter(chat, line).errors) == 1, line
    shown = "\n".join(enter(chat, "/show").shown)
    assert "temperature        0.5" in shown
    assert "kv_budget          40 slots per head" in shown
    assert enter(chat, "/system Be brief.").errors == []
    enter(chat, "Hello.")
    assert "read the turns again" in enter(chat, "/system Be long.").notes[0]
    assert chat.conversation.must_reread
    assert "to be read again" in status_line(status_of(chat), Look(width=80))
    enter(chat, "And now?")
    assert chat.conversation.turns[1].prompt_tokens > 20


def test_files_go_in_and_out(chat: Chat, tmp_path: Path) -> None:
    """Catches attached files that are not sent or sent twice, and files that are overwritten."""
    (tmp_path / "note.txt").write_text("My dog is called Rex.\n")
    assert enter(chat, f"/file {tmp_path}/none.txt").errors
    enter(chat, f"/file {tmp_path}/note.txt", "/file none", "Hello.")
    enter(chat, f"/file {tmp_path}/note.txt")
    assert "+1 file" in status_line(status_of(chat), Look(width=80))
    enter(chat, "What is my dog called?", "And now?")
    assert users(chat) == ["Hello.", "My dog is called Rex.\n\nWhat is my dog called?", "And now?"]
    for ending in ("md", "json", "jsonl", "html"):
        assert enter(chat, f"/export {tmp_path}/talk.{ending}").notes == [f"wrote {tmp_path}/talk.{ending}"]
        assert "Rex" in (tmp_path / f"talk.{ending}").read_text()
    assert "exists" in enter(chat, f"/export {tmp_path}/talk.md").errors[0]
    assert "does not say" in enter(chat, f"/export {tmp_path}/talk").errors[0]
    assert enter(chat, "/copy").copied == [chat.conversation.turns[-1].answer]
    assert "no block of code" in enter(chat, "/copy code").errors[0]


def test_the_last_block_of_code_is_copied(chat: Chat) -> None:
    """Catches fences of tildes, code within a sentence, and an answer cut within its block."""
    enter(chat, "Hello.")
    for answer, code in (
        ("```py\na\n```\nUse ```b``` now.", "a"),
        ("~~~\na\n```\nb\n~~~\n", "a\n```\nb"),
        ("```\na\n```\n```sh\ncut", "cut"),
    ):
        chat.conversation.turns[-1] = replace(chat.conversation.turns[-1], answer=answer)
        assert enter(chat, "/copy code").copied == [code]


def test_a_file_that_fits_nowhere_is_not_attached(chat: Chat, tmp_path: Path) -> None:
    """Catches a file that makes every later message fail, and an error that does not say how to let it go."""
    (tmp_path / "big.txt").write_text("word " * chat.conversation.llm.facts.max_positions)
    (error,) = enter(chat, f"/file {tmp_path}/big.txt").errors
    assert "big.txt is not attached: " in error
    assert "trimkv summarize" in error
    assert chat.attached == []
    chat.attached.append(("big.txt", "word " * chat.conversation.llm.facts.max_positions))
    (error,) = enter(chat, "What is it?").errors
    assert "/file none lets big.txt go" in error
    enter(chat, "/file none")
    assert enter(chat, "Hello.").errors == []


def test_settings_are_shown_as_they_are_typed(chat: Chat) -> None:
    """Catches values of Python among what a user reads."""
    assert enter(chat, "/set stop x").notes == ["stop               x"]
    assert enter(chat, "/set stop off").notes == ["stop               off"]
    assert enter(chat, "/set ignore_eos on").notes == ["ignore_eos         on"]
    enter(chat, "/set ignore_eos off")
    assert not any(sign in "".join(enter(chat, "/show").shown) for sign in ("()", "('", "None", "True", "False"))


def test_all_places_of_a_text_are_shown(chat: Chat) -> None:
    """Catches a place that is passed over without a word."""
    enter(chat, "Petra is here.", "And petra is there.")
    shown = enter(chat, "/why Petra").shown
    assert [line for line in shown if line.startswith("place")] == [
        "place 1 of 2, in message 1",
        "place 2 of 2, in message 2",
    ]
    assert sum("kept by" in line for line in shown) == 2
    assert "/pin with words" in enter(chat, "/pin Xyz").errors[0]


def test_stats_are_those_of_the_last_turn_that_is_left(chat: Chat) -> None:
    """Catches counts of a turn that was taken back."""
    first = enter(chat, "My cat is called Zubo.", "/stats").shown[:3]
    second = enter(chat, "What is my cat called? Say it, please.", "/stats").shown[:3]
    assert first != second
    assert enter(chat, "/undo", "/stats").shown[:3] == first
    enter(chat, "/save talk", "/load talk")
    assert "in an earlier run" in enter(chat, "/stats").shown[0]


@pytest.mark.parametrize("command", ["/undo", "/edit", "/regen"])
def test_a_damaged_state_costs_a_reading_and_nothing_else(chat: Chat, command: str) -> None:
    """Catches turns that are dropped from the conversation and not from the session, and an error that hides it."""
    enter(chat, "My cat is called Zubo.", "My dog is called Rex.")
    folder = chat.autosave.store.path(chat.autosave.name or "")
    (folder / chat.conversation.snapshots.files[1]).write_bytes(b"damaged")
    screen = enter(chat, command)
    assert screen.errors == []
    assert "cannot read" in screen.notes[-1]
    assert screen.notes[-1].endswith("the next message makes the model read the turns again, and answers may differ")
    left = ["My cat is called Zubo."] + ["My dog is called Rex."] * (command == "/regen")
    stored = chat.autosave.store.read(chat.autosave.name or "")
    assert users(chat) == [turn.user for turn in stored.turns] == left
    assert chat.conversation.must_reread is (command != "/regen")
    enter(chat, "Hello.")
    assert users(chat) == [*left, "Hello."]
    assert (folder / "session.json").is_file()


def test_sessions(chat: Chat) -> None:
    """Catches branches that write into each other, and sessions that cannot be found again."""
    enter(chat, "My cat is called Zubo.", "/save cat")
    assert enter(chat, "/fork").notes == ["going on in cat-2; cat stays as it is"]
    enter(chat, "Left.")
    assert enter(chat, "/load cat").notes[0].startswith("cat: 1 turns, ")
    enter(chat, "Right.")
    listed = "\n".join(enter(chat, "/sessions").shown)
    assert [line.split()[0] for line in listed.splitlines()] == ["NAME", "cat", "cat-2"]
    store = chat.autosave.store
    assert [turn.user for turn in store.read("cat").turns] == ["My cat is called Zubo.", "Right."]
    assert [turn.user for turn in store.read("cat-2").turns] == ["My cat is called Zubo.", "Left."]
    assert "already" in enter(chat, "/fork cat-2").errors[0]


def test_what_is_remembered(chat: Chat) -> None:
    """Catches pictures of another sequence than the conversation, and texts that are not found."""
    enter(chat, "My cat is called Zubo.", "My dog is called Rex. " * 8)
    shown = "\n".join(enter(chat, "/map").shown)
    assert f"{chat.conversation.seen:,} tokens seen" in shown
    assert "1 you" in shown
    assert "next to go" in shown
    assert "KV cache" in "\n".join(enter(chat, "/cache").shown)
    why = "\n".join(enter(chat, "/why zubo").shown)
    assert "kept by" in why
    assert [line.split()[-1] for line in why.splitlines()[-2:]] == ["Z", "ubo"]
    assert "does not stand" in enter(chat, "/why Xyz").errors[0]
    assert enter(chat, "/why").errors == []
    assert "generated" in enter(chat, "/stats").shown[0]


def test_completion(chat: Chat, tmp_path: Path) -> None:
    """Catches completions of messages, and arguments that are not completed."""

    def found(text: str) -> list[str]:
        return [text[: len(text) - replaced] + candidate for candidate, replaced, _ in complete(chat, text)]

    assert found("/un") == ["/undo "]
    assert found("hello /un") == []
    assert found("/set tempe") == ["/set temperature"]
    assert found("/set markdown o") == ["/set markdown on", "/set markdown off"]
    (tmp_path / "a file.txt").touch()
    (tmp_path / "folder").mkdir()
    assert found(f"/file {tmp_path}/a") == [f"/file {tmp_path}/a file.txt"]
    assert found(f"/export {tmp_path}/f") == [f"/export {tmp_path}/folder/"]
    enter(chat, "Hello.", "/save cat")
    assert found("/load c") == ["/load cat"]
    assert found("/nothing x") == []


def test_what_is_pinned_stays(chat: Chat) -> None:
    """Catches pins that the next long text evicts, that a later undo leaves behind, or that fill a head."""
    enter(chat, "My cat is called Zubo.")
    shown = enter(chat, "/pin Zubo").shown
    assert shown[0] == "pinned: Zubo"
    enter(chat, "My dog is called Rex. " * 20)
    shares = chat.conversation.llm.kept.retained(chat.conversation.row).shares()
    pieces = "".join(enter(chat, "/pin").shown)
    assert "pinned: Zubo" in pieces
    first = next(index for index, share in enumerate(shares) if share == 1.0)
    assert shares[first : first + 2] == [1.0] * 2
    enter(chat, "/undo 2", "My cat is called Zubo.")
    assert "nothing is pinned" in enter(chat, "/pin").errors[0]


def test_the_ends_of_a_message_stay_until_the_next(tmp_path: Path) -> None:
    """Catches ends that no view shows, and that the next message, /undo, /regen or a loaded session keep or lose."""
    engine = load(pin="prompt:10%")
    with chatting(engine, tmp_path) as chat:

        def pinned() -> dict[int, bool]:
            return engine.kept.retained(chat.conversation.row).pinned()  # type: ignore[no-any-return]

        enter(chat, "My cat is called Zubo. " * 8)
        length = chat.conversation.turns[0].prompt_tokens
        ends = {position: position < 4 for position in (*range(4), *range(length - 4, length))}
        assert pinned() == ends
        line = f"0-3 for good · {length - 4}-{length - 1} until the next prompt"
        assert enter(chat, "/map").shown[-1] == f"pinned: {line}"
        assert "this prompt" in enter(chat, "/why assistant").shown[-1]
        assert enter(chat, "/pin").shown[1:] == [
            line,
            "at most 8 of 40 slots in a head; /undo of this turn takes it back",
        ]
        enter(chat, "My dog is called Rex.")
        turn = chat.conversation.turns[1]
        answer = turn.first + turn.prompt_tokens
        assert list(pinned()) == [*range(4), *range(turn.first, turn.first + 4), *range(answer - 4, answer)]
        enter(chat, "/regen")
        assert len(pinned()) == 12
        enter(chat, "/undo")
        assert pinned() == ends
        enter(chat, "/save cat", "/clear", "/load cat")
        assert not chat.conversation.must_reread
        assert pinned() == ends
        enter(chat, "/budget 20")
        assert list(pinned()) == [0, 1, 2, 3, length - 2, length - 1]
    engine.close()


def test_another_budget(chat: Chat) -> None:
    """Catches a smaller cache that says nothing, states of the old size that undo cannot use, and a session with it."""
    llm = chat.conversation.llm
    enter(chat, "My cat is called Zubo.", "My dog is called Rex. " * 8)
    heads = llm.kept.retained(chat.conversation.row).num_heads
    note = enter(chat, "/budget 24").notes[0]
    assert note.startswith("40 to 24 slots per head")
    assert note.endswith(f"{16 * heads} evicted")
    assert "M 24" in status_line(status_of(chat), Look(width=80))
    assert chat.autosave.store.read(chat.autosave.name or "").options["kv_budget"] == "24"
    enter(chat, "/undo")
    assert not chat.conversation.must_reread
    enter(chat, "What is my cat called?", "/clear", f"/load {chat.autosave.name}")
    assert "none" not in enter(chat, "/budget 40").notes[0]
    assert enter(chat, "/budget 1KiB").errors
    assert enter(chat, "/budget 80%").errors
    assert enter(chat, "/budget 2GiB").errors == []
    assert llm.facts.plan.budget_bytes == 2**31
    assert enter(chat, "/budget 40").errors == []
    enter(chat, "My dog is called Rex. " * 8)
    held = llm.facts.plan.run.total_bytes
    done = enter(chat, f"/budget {held - 40_000}B")
    assert done.errors == []
    assert done.notes[0].startswith("40 to ")
    assert "none" not in done.notes[0]
    assert not done.notes[0].endswith(" 0 evicted")
    assert llm.facts.plan.run.total_bytes <= held - 40_000
    assert llm.facts.plan.run.kv_budget < 40
