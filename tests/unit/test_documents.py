"""Mistakes in reading documents: lost text, wrong characters, pictures and programs read as words."""

from __future__ import annotations

import io
import os
import queue
from collections.abc import Callable
from pathlib import Path

import pytest

from trimkv_cli.commands.documents import Reader, expand, html_to_text
from trimkv_cli.commands.prompts import gather, read_system, read_template
from trimkv_cli.commands.summarize.inputs import Inputs, combined
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.files import check_encoding
from trimkv_cli.streams import say_if_nothing_comes

PDF = b"""%PDF-1.4
1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj
2 0 obj <</Type/Pages/Kids[3 0 R]/Count 1>> endobj
3 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 300 200]/Resources<</Font<</F 4 0 R>>>>/Contents 5 0 R>> endobj
4 0 obj <</Type/Font/Subtype/Type1/BaseFont/Helvetica>> endobj
5 0 obj <</Length 48>> stream
BT /F 12 Tf 20 100 Td (The meeting is Friday) Tj ET
endstream endobj
trailer <</Root 1 0 R>>
"""


def read(folder: Path, data: bytes, name: str = "file.txt", encoding: str | None = None) -> tuple[str, str | None]:
    path = folder / name
    path.write_bytes(data)
    document = Reader(encoding=encoding).document(str(path))
    return document.text, document.note


@pytest.mark.parametrize(
    ("data", "text", "said"),
    [
        ("größe — 語\n".encode(), "größe — 語\n", None),
        ("größe".encode("utf-8-sig"), "größe", None),
        ("größe".encode("utf-16"), "größe", None),
        ("größe".encode("utf-32"), "größe", None),
        ("plain words here".encode("utf-16-be"), "plain words here", "utf-16-be"),
        ("“größe” costs 5 €".encode("cp1252"), "“größe” costs 5 €", "Windows-1252"),
        (b'<?xml version="1.0" encoding="iso-8859-2"?> \xb1', '<?xml version="1.0" encoding="iso-8859-2"?> ą', None),
    ],
)
def test_encodings_are_found_and_what_is_guessed_is_said(
    data: bytes, text: str, said: str | None, tmp_path: Path
) -> None:
    """Catches letters that become others, and a guess that nobody is told of."""
    found, note = read(tmp_path, data)
    assert found == text
    assert (said is None and note is None) or (note is not None and said is not None and said in note)


WESTERN = """L’été à Paris, où ça va – très chère Œuvre, 1ª e nº 5 ½ l. El niño: ¿qué? ¡Sí! Þórður átti fjörð.
GRÖSSE ÄNDERN, Übermäßig öde. På øya er det blåbær; Smørrebrød på Ærø. « Où êtes-vous ? » Söhne®, 20 °C ± 1 µm."""
OTHERS = [
    ("我的猫叫祖波，它住在格拉茨。", "gb18030"),
    ("for you and all the price is 人民币 100", "gb18030"),
    ("我的貓叫祖波", "big5"),
    ("今日は良い天気です", "shift_jis"),
    ("アイウエオ test", "shift_jis"),
    ("今日は", "euc_jp"),
    ("今日は", "iso2022_jp"),
    ("안녕하세요 고양이", "euc_kr"),
    ("Моя кошка", "cp1251"),
    ("Моя кошка", "koi8-r"),
    ("кот", "cp866"),
    ("Η γάτα μου", "cp1253"),
    ("החתול שלי", "cp1255"),
    ("قطتي اسمها", "cp1256"),
    ("แมวของฉัน", "cp874"),
    ("café über groß", "cp437"),
    ("café über groß", "mac_roman"),
    ("zażółć gęślą jaźń", "cp1250"),
    ("zażółć gęślą jaźń", "iso8859-2"),
]


def test_western_text_is_guessed_and_that_is_said(tmp_path: Path) -> None:
    """Catches a letter from Windows that makes a file unreadable, and a guess without a way to say otherwise."""
    text, note = read(tmp_path, WESTERN.encode("cp1252"))
    assert text == WESTERN
    assert note is not None
    assert "read as Windows-1252; --encoding NAME if it is not" in note


@pytest.mark.parametrize(("text", "encoding"), OTHERS)
def test_other_text_is_asked_for_and_read_when_it_is_named(text: str, encoding: str, tmp_path: Path) -> None:
    """Catches text that becomes other words without an error."""
    data = text.encode(encoding)
    with pytest.raises(InputError, match=r"is not UTF-8 \(.+\), nor says what it is") as caught:
        read(tmp_path, data)
    assert "--encoding gb18030" in (caught.value.hint or "")
    assert read(tmp_path, data, encoding=encoding) == (text, None)


def test_a_wrong_name_of_an_encoding_is_an_error(tmp_path: Path) -> None:
    """Catches a name that nobody knows, one that is no text, and bytes that the named one does not have."""
    for name in ("klingon", "rot13", "base64"):
        with pytest.raises(UsageError, match=f"there is no encoding '{name}'") as caught:
            check_encoding(name)
        assert "--encoding gb18030" in (caught.value.hint or "")
    with pytest.raises(InputError, match=r"file.txt is not ascii: byte c3 at 1"):
        read(tmp_path, "aé".encode(), encoding="ascii")
    with pytest.raises(InputError, match=r"file.txt is not UTF-8: U\+D800"):
        read(tmp_path, b"\\ud800", encoding="unicode_escape")
    assert read(tmp_path, "\ufeffhéllo".encode(), encoding="utf-8")[0] == "héllo"


def test_a_page_in_a_smaller_encoding_is_read_as_browsers_do(tmp_path: Path) -> None:
    """Catches a page that says gb2312 and holds one character more, and one in seven bits that is taken for ASCII."""
    page = "<meta charset={}><p>镕今日"
    for said, meant in (("gb2312", "gb18030"), ("iso-2022-jp", "iso2022_jp")):
        text = page.format(said).replace("镕" if meant != "gb18030" else "日", "")
        assert read(tmp_path, text.encode(meant), "page.html")[0] == text.partition("<p>")[2] + "\n"


def test_every_door_reads_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an encoding that is taken for files and not for stdin, system messages or templates."""
    path = tmp_path / "t.txt"
    data = "我的猫 $input".encode("gb18030")
    path.write_bytes(data)

    def reader(encoding: str | None = "gb18030") -> Reader:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        return Reader(encoding=encoding)

    doors: list[Callable[[Reader], str]] = [
        lambda reader: gather(None, [], reader),
        lambda reader: gather(None, ["-"], reader),
        lambda reader: gather(None, [str(path)], reader).partition("\n")[0],
        lambda reader: read_system(None, str(path), reader) or "",
        lambda reader: read_template(str(path), reader).template,
        lambda reader: Inputs.of(["-"], reader).take(0).text,
        lambda reader: combined([str(path)], reader).take(0).text.partition("\n\n")[2],
    ]
    for door in doors:
        assert door(reader()) == "我的猫 $input"
        with pytest.raises(InputError, match="is not UTF-8"):
            door(reader(None))


def test_stdin_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a system message from stdin that is empty because the prompt has taken it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Be brief.")))
    reader = Reader(quiet=True)
    assert read_system(None, "-", reader) == "Be brief."
    assert gather("Hello", [], reader) == "Hello"
    with pytest.raises(InputError, match="stdin can be read once"):
        gather("Hello", ["-"], reader)


def test_it_is_said_that_stdin_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that waits in silence for a pipe that nobody closes, and one that complains with data there."""
    monkeypatch.setattr("trimkv_cli.streams._PATIENCE_S", 0.01)
    read_end, write_end = os.pipe()
    said: queue.Queue[str] = queue.Queue()
    with os.fdopen(read_end) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        say_if_nothing_comes(said.put)
        assert said.get(timeout=30).startswith("waiting for stdin (a pipe without data")
        os.write(write_end, b"data")
        say_if_nothing_comes(said.put).join(timeout=30)
        assert said.empty()
        os.close(write_end)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG image"),
        (b"PK\x03\x04\0\0", "an office document"),
        (b"\x1f\x8b\x08abc\x81\x8d", "gzip"),
        (b"\x00\x01\x02", "binary"),
        (bytes(range(1, 32)) * 9 + b"\x81", "binary"),
        (b"%PDF-1.4 nothing", "no PDF"),
        (b"words \x81\x8d", "not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_by_name(data: bytes, kind: str, tmp_path: Path) -> None:
    """Catches a picture that is summarized, and an error that does not say which file and why."""
    with pytest.raises(InputError, match=kind) as caught:
        read(tmp_path, data, "odd.txt")
    assert "odd.txt" in caught.value.message
    assert caught.value.hint


def test_pdf_gives_its_text(tmp_path: Path) -> None:
    """Catches a PDF read as its bytes."""
    assert read(tmp_path, PDF, "report.pdf")[0].strip() == "The meeting is Friday"


def test_html_gives_what_a_reader_sees(tmp_path: Path) -> None:
    """Catches scripts and styles in the text, words that run together, and code that loses its lines."""
    page = (
        "<!doctype html><html><head><title>no</title><script>no()</script></head><body><h1>Big\n title</h1>"
        "<p>Hello <b>wor</b>ld &amp; <a href=x>all</a>.<br>Next</p><ul><li>one<li>two</ul>"
        "<table><tr><td>1</td><td>2</td></tr></table><pre>a\n  b</pre><style>no</style>End</body></html>"
    )
    expected = "Big title\n\nHello world & all.\nNext\n\n- one\n- two\n\n1\t2\n\na\n  b\n\nEnd\n"
    assert html_to_text(page) == expected
    assert read(tmp_path, page.encode(), "page.txt")[0] == expected
    assert read(tmp_path, b"<p>gr\xf6\xdfe", "page.html")[0] == "größe\n"
    assert "<html>" in read(tmp_path, b"in code: `<html>` begins a page", "notes.md")[0]


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("a<div hidden>x<div>y</div>z<br><img alt=i></div>b", "ab"),
        ('a<p style="color:red; Display : NONE">x<p>b', "a\n\nb"),
        ('<span style="visibility:hidden">x</span>b', "b"),
        ("<ul><li hidden>x<li>a<li hidden>y</ul>b", "- a\n\nb"),
        ("<table><tr><td hidden>x<td>a</tr></table>b", "a\n\nb"),
        ("a<dialog>x</dialog><dialog open>b</dialog>", "a\nb"),
        ("a<template><p>x</p></template><noscript>y</noscript><video>z</video>b", "ab"),
        ("a<input hidden>b<svg><g hidden>x</g></svg>c", "abc"),
        ("Donau&shy;dampf\u00adschiff 10&nbsp;km 5\u202f000 zero\u200bwidth", "Donaudampfschiff 10 km 5 000 zerowidth"),
        ("<pre>a&nbsp; b</pre>", "a  b"),
        ("می\u200cخواهم 👩\u200d👧", "می\u200cخواهم 👩\u200d👧"),
    ],
)
def test_html_leaves_out_what_no_reader_sees(page: str, text: str) -> None:
    """Catches hidden elements and marks in the text, and visible text that goes with them."""
    assert html_to_text(page) == text + "\n"


def test_globs_are_expanded_in_order_and_an_empty_one_is_an_error(tmp_path: Path) -> None:
    """Catches quoted patterns that are taken for names, folders among files, and a typo that matches nothing."""
    for name in ("b.md", "a.md", "x[1].md"):
        (tmp_path / name).write_text("text")
    (tmp_path / "folder.md").mkdir()
    assert expand([f"{tmp_path}/?.md", "-"]) == [f"{tmp_path}/a.md", f"{tmp_path}/b.md", "-"]
    assert expand([f"{tmp_path}/x[1].md"]) == [f"{tmp_path}/x[1].md"]
    with pytest.raises(InputError, match="no file matches"):
        expand([f"{tmp_path}/*.pdf"])
    with pytest.raises(InputError, match="is a folder"):
        Reader().document(str(tmp_path))
