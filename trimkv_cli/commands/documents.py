"""Reads documents as text: plain text in any usual encoding, source code, Markdown, HTML and PDF."""

from __future__ import annotations

import codecs
import glob
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimkv_cli.errors import InputError

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KINDS = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"PK\x03\x04", "a ZIP archive or an office document"),
    (b"\xd0\xcf\x11\xe0", "an old office document"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"(\xb5/\xfd", "compressed with zstd"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ", "compressed with xz"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3", "a database"),
    (b"PAR1", "a Parquet file"),
)
_META_CHARSET = re.compile(rb"<meta[^>]+charset=[\"']?\s*([\w-]+)", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"<\?xml[^>]+encoding=[\"']([\w-]+)", re.IGNORECASE)
_HTML_START = re.compile(r"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype html|html[\s>])", re.IGNORECASE | re.DOTALL)
_HTML_SUFFIXES = (".html", ".htm", ".xhtml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The text of one input; `note` says how it was read where that had to be guessed."""

    name: str
    text: str
    note: str | None = None


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the files that paths and globs (`*`, `?`, `[…]`, `**`) name, each glob's sorted, in the order given.

    Raises:
        InputError: a glob that matches nothing.
    """
    names: list[str] = []
    for pattern in patterns:
        if not glob.has_magic(pattern) or Path(pattern).exists():
            names.append(pattern)
            continue
        found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())  # noqa: PTH207
        if not found:
            raise InputError(
                f"no file matches {pattern}", hint="check the pattern, and that the shell has not changed it"
            )
        names += found
    return names


def read_document(path: str) -> Document:
    """Read a file, or stdin for "-", as text.

    Raises:
        InputError: it cannot be read, is binary, or holds no text.
    """
    name = "stdin" if path == "-" else path
    data = _read_bytes(path, name)
    if data.startswith(b"%PDF-"):
        return Document(name=name, text=_pdf_text(data, name))
    text, note = _decode(data, name)
    if Path(path).suffix.lower() in _HTML_SUFFIXES or _HTML_START.match(text):
        from trimkv_cli.commands.html_text import html_to_text

        text = html_to_text(text)
    return Document(name=name, text=text, note=note)


def _read_bytes(path: str, name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except IsADirectoryError as error:
        raise InputError(f"{name} is a folder", hint=f"give its files: '{name.rstrip('/')}/*.txt'") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}", hint="check the path") from error


def _decode(data: bytes, name: str) -> tuple[str, str | None]:
    """Decode by byte order mark, as UTF-8, as the document itself says, or by a guess, which is said aloud."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return _decode_as(data, encoding, name), None
    unmarked = _utf16_without_mark(data)
    if unmarked is not None:
        return _decode_as(data, unmarked, name), f"{name} has no byte order mark: read as {unmarked}"
    if b"\0" in data:
        raise _binary(data, name)
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        bad = error
    said = _META_CHARSET.search(data[:4096]) or _XML_ENCODING.search(data[:4096])
    if said is not None:
        return _decode_as(data, said[1].decode("ascii"), name), None
    if _looks_binary(data):
        raise _binary(data, name)
    try:
        return data.decode("cp1252"), f"{name} is not UTF-8 (byte {bad.start:,}): read as Windows-1252"
    except UnicodeDecodeError:
        hint = f"iconv -t UTF-8 {name}, or save it as UTF-8"
        raise InputError(f"{name} is not UTF-8 at byte {bad.start:,}, nor Windows-1252", hint=hint) from None


def _decode_as(data: bytes, encoding: str, name: str) -> str:
    try:
        return data.decode(encoding)
    except LookupError as error:
        raise InputError(f"{name} names an unknown encoding, {encoding}", hint="save it as UTF-8") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not {encoding} at byte {error.start:,}", hint="save it as UTF-8") from error


def _utf16_without_mark(data: bytes) -> str | None:
    """Recognise UTF-16 of mostly Latin text: every other byte is zero."""
    start = data[:4096]
    half = len(start) // 2
    if half < 8:
        return None
    even, odd = start[0 : 2 * half : 2].count(0), start[1 : 2 * half : 2].count(0)
    if odd > 0.7 * half and even == 0:
        return "utf-16-le"
    return "utf-16-be" if even > 0.7 * half and odd == 0 else None


def _looks_binary(data: bytes) -> bool:
    """Tell by control characters that no text has."""
    controls = sum(byte < 0x20 and byte not in b"\t\n\f\r\x1b" for byte in data[:65536])
    return any(data.startswith(mark) for mark, _ in _KINDS) or controls > len(data[:65536]) // 100


def _binary(data: bytes, name: str) -> InputError:
    kind = next((f", {kind}" for mark, kind in _KINDS if data.startswith(mark)), "")
    return InputError(f"{name} is binary{kind}, not text", hint="convert it to text first")


def _pdf_text(data: bytes, name: str) -> str:
    import pypdfium2

    try:
        with pypdfium2.PdfDocument(data) as pdf:
            count = len(pdf)
            text = "\n\n".join(page.get_textpage().get_text_range() for page in pdf)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).lower()
        raise InputError(
            f"{name} is {'protected by a password' if locked else f'no PDF that can be read: {error}'}",
            hint="save it without a password" if locked else "get the file again",
        ) from error
    if not text.strip():
        raise InputError(f"{name} holds pictures of {count} pages, but no text", hint="recognise its text (OCR) first")
    return text.replace("\r\n", "\n").replace("\ufffe", "")
