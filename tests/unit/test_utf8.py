"""Mistakes with text that is not UTF-8: an internal error of a tokenizer, and names of files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimkv_cli.chat.store import SessionStore
from trimkv_cli.commands.documents import Reader
from trimkv_cli.commands.prompts import fill, gather, read_system, read_template
from trimkv_cli.commands.summarize.texts import SummaryStyle
from trimkv_cli.errors import InputError, NotUtf8, TrimkvError
from trimkv_cli.eval.samples import read_samples
from trimkv_cli.files import as_text
from trimkv_cli.loading.options import SamplingOptions
from trimkv_cli.settings import load_settings
from trimkv_cli.train.documents import DataFiles
from trimkv_cli.ui.plain import neutralise

BAD = "caf\udce9"  # how Python hands a byte of Latin-1 over
POSIX = "K\udcc3\udca4ro"  # and UTF-8 where the locale knows ASCII alone


def test_bytes_are_read_as_utf_8_whatever_the_locale_says() -> None:
    """Catches letters of a POSIX locale that are refused, and lone surrogates that are let in."""
    assert as_text("Käro", "it") == as_text(POSIX, "it") == "Käro"
    with pytest.raises(NotUtf8, match="it is not UTF-8: byte e9 after 'caf'"):
        as_text(BAD, "it")
    with pytest.raises(NotUtf8, match=r"it is not UTF-8: U\+D800 stands alone"):
        as_text("\ud800", "it")
    assert NotUtf8.exit_code == 2


def template(folder: Path) -> Any:
    (folder / "t.txt").write_text("$input")
    return read_template(str(folder / "t.txt"), Reader())


@pytest.mark.parametrize(
    ("give", "named"),
    [
        (lambda _: gather(BAD, [], Reader()), "the prompt"),
        (lambda _: read_system(BAD, None, Reader()), "the system message"),
        (lambda _: SamplingOptions(stop=["ok", BAD]), "--stop"),
        (lambda _: SummaryStyle(focus=BAD), "--focus"),
        (lambda folder: fill(template(folder), name="t", user="", parameters=[f"input={BAD}"]), "-p"),
        (lambda folder: load_settings(folder, {"TRIMKV_SYSTEM": BAD}, {"system": str}, print), "TRIMKV_SYSTEM"),
    ],
)
def test_every_door_names_what_is_not_utf_8(give: Any, named: str, tmp_path: Path) -> None:
    """Catches a door through which such text gets to a tokenizer."""
    with pytest.raises(NotUtf8, match=f"{named}.* is not UTF-8: byte e9"):
        give(tmp_path)


def test_what_comes_through_a_door_is_what_was_meant(tmp_path: Path) -> None:
    """Catches text that is checked, and used as it was all the same."""
    assert SamplingOptions(stop=[POSIX]).stop == ["Käro"]
    assert "Käro" in SummaryStyle(focus=POSIX).instruction()
    assert read_system(POSIX, None, Reader()) == "Käro"
    assert load_settings(tmp_path, {"TRIMKV_STOP": POSIX}, {"stop": list}, print)["stop"] == ["Käro"]


def test_surrogates_in_files_are_errors_of_these_files(tmp_path: Path) -> None:
    """Catches half a character, written as an escape, that reaches a tokenizer through questions, data and sessions."""
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt": "\\ud800", "answer": "a"}')
    with pytest.raises(InputError, match=r"lines.jsonl:1 is not UTF-8: U\+D800"):
        read_samples(str(path))
    path.write_text('{"text": "\\ud800"}')
    with pytest.raises(InputError, match=r"lines.jsonl:1: a text is not UTF-8"):
        DataFiles([path])
    store = SessionStore(tmp_path)
    store.create("talk")
    (store.path("talk") / "session.json").write_text(json.dumps({"format": 1, "system": "\ud800"}))
    with pytest.raises(InputError, match="surrogate"):
        store.read("talk")


def test_names_of_files_can_be_opened_and_shown(tmp_path: Path) -> None:
    """Catches a file whose name is not UTF-8 and which therefore cannot be read, or not be named in an error."""
    path = f"{tmp_path}/{BAD}.txt"
    Path(path).write_text("hello")
    assert Reader().document(path).text == "hello"
    with pytest.raises(TrimkvError) as caught:
        Reader().document(f"{path}.no")
    assert neutralise(caught.value.message).encode().endswith("caf�.txt.no: No such file or directory".encode())
