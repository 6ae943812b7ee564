"""Mistakes in reading documents: lost text, wrong characters, pictures and programs read as words."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimkv_cli.commands.documents import expand, read_document
from trimkv_cli.commands.html_text import html_to_text
from trimkv_cli.errors import InputError

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


def read(folder: Path, data: bytes, name: str = "file.txt") -> tuple[str, str | None]:
    path = folder / name
    path.write_bytes(data)
    document = read_document(str(path))
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
        read_document(str(tmp_path))
