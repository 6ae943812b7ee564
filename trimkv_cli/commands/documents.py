"""Documents as text: plain text in any usual encoding, source code, Markdown, HTML and PDF."""

from __future__ import annotations

import codecs
import glob
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from trimkv_cli.errors import InputError
from trimkv_cli.files import as_text
from trimkv_cli.streams import say_if_nothing_comes
from trimkv_cli.ui.plain import print_note, print_warning

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
_NAME_IT = "name its encoding: --encoding gb18030, or shift_jis, cp1251 …"
_ISO_2022 = re.compile(rb"\x1b\$[@AB]|\x1b\$\([CD]")  # 7 bits that pass for ASCII
_BROWSERS = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
}
_LETTERS = "ªºŠšŒœŽžŸÀ-ÖØ-öø-ÿ"
_SIGNS = "€‚„…†‡‰‹‘’“”•–—›™¡¢£§©«¬®°±²³µ¶·»¼½¾¿×÷\xa0\xad"
# What Windows-1252 makes of text in other encodings, and hardly ever of its own.
_NOT_WESTERN = re.compile(
    f"[^\0-\x7f{_LETTERS}{_SIGNS}]"  # signs that are rare
    f"|[{_LETTERS}]{{3,}}|(?<![A-Za-z{_LETTERS}])[{_LETTERS}]{{2}}(?![A-Za-z{_LETTERS}])"  # words of such letters alone
    f"|(?<=[a-z])[ŠŒŽŸÀ-ÖØ-Þ]"  # a capital within a word
    f"|(?<=[A-Za-z{_LETTERS}])[€‚„“”•†‡‰‹›™¡¢£§©¬®±²³¶»¼½¾¿×÷](?=[A-Za-z{_LETTERS}])"  # a sign within one
    f"|[ªº](?=[A-Za-z{_LETTERS}])"
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


@dataclass(slots=True, kw_only=True)
class Reader:
    """Reads what a command is given as text, files and stdin alike: in `encoding`, or else as each shows itself.

    What had to be guessed is said as a warning, and without `quiet` that stdin keeps us waiting.
    """

    encoding: str | None = None
    quiet: bool = False
    stdin_taken: bool = False

    def document(self, path: str) -> Document:
        """Read a file, or stdin for "-", as text; of HTML and PDF what a reader sees.

        Raises:
            InputError: it cannot be read, is binary, or holds no text.
        """
        return self._said(read_document(path, self._bytes(path), encoding=self.encoding))

    def text(self, path: str) -> str:
        """Read a file, or stdin for "-", as the text it is; raises as `document` does."""
        name = _name(path)
        text, note = _decode(self._bytes(path), name, self.encoding)
        return self._said(Document(name=name, text=text, note=note)).text

    def piped(self) -> str:
        """Return what is piped in, as `document` does, unless it is something else already."""
        return "" if self.stdin_taken or sys.stdin.isatty() else self.document("-").text

    def _bytes(self, path: str) -> bytes:
        if path == "-":
            if self.stdin_taken:
                raise InputError("stdin can be read once", hint='give "-" in one place')
            self.stdin_taken = True
            if not self.quiet:
                say_if_nothing_comes(print_note)
        return _read_bytes(path, _name(path))

    def _said(self, document: Document) -> Document:
        if document.note is not None:
            print_warning(document.note)
        return document


def read_document(path: str, data: bytes, *, encoding: str | None = None) -> Document:
    """Return the text that a file of this name, or stdin for "-", holds; raises as `Reader.document` does."""
    name = _name(path)
    if data.startswith(b"%PDF-"):
        return Document(name=name, text=_pdf_text(data, name))
    text, note = _decode(data, name, encoding)
    if Path(path).suffix.lower() in _HTML_SUFFIXES or _HTML_START.match(text):
        text = html_to_text(text)
    return Document(name=name, text=text, note=note)


def _name(path: str) -> str:
    return "stdin" if path == "-" else path


def _read_bytes(path: str, name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except IsADirectoryError as error:
        raise InputError(f"{name} is a folder", hint=f"give its files: '{name.rstrip('/')}/*.txt'") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}", hint="check the path") from error


def _decode(data: bytes, name: str, encoding: str | None) -> tuple[str, str | None]:
    """Decode as the user says, by byte order mark, as UTF-8, as the document itself says, or by a guess, said aloud.

    Only Western text is guessed: every byte means something in Windows-1252, so that all else would become other words.
    """
    if encoding is not None:
        text = _decode_as(data, encoding, name).removeprefix("\ufeff")
        if "\0" in text:
            raise _binary(data, name)
        return text, None
    for mark, marked in _BOMS:
        if data.startswith(mark):
            return _decode_as(data, marked, name), None
    unmarked = _utf16_without_mark(data)
    if unmarked is not None:
        return _decode_as(data, unmarked, name), f"{name} has no byte order mark: read as {unmarked}"
    if b"\0" in data:
        raise _binary(data, name)
    found = _why_not_utf8(data)
    if found is None:
        return data.decode("utf-8"), None
    said = _META_CHARSET.search(data[:4096]) or _XML_ENCODING.search(data[:4096])
    if said is not None:
        return _decode_as(data, _as_browsers_do(said[1].decode("ascii")), name), None
    if _looks_binary(data):
        raise _binary(data, name)
    if not _looks_western(data):
        raise InputError(f"{name} is not UTF-8 ({found}), nor says what it is", hint=_NAME_IT)
    return data.decode("cp1252"), f"{name} is not UTF-8 ({found}): read as Windows-1252; --encoding NAME if it is not"


def _why_not_utf8(data: bytes) -> str | None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {data[error.start]:02x} at {error.start:,}"
    shift = _ISO_2022.search(data)
    return None if shift is None else f"ISO-2022 at {shift.start():,}"


def _as_browsers_do(charset: str) -> str:
    """Return the larger encoding that is meant where a page names a smaller one."""
    try:
        return _BROWSERS.get(codecs.lookup(charset).name, charset)
    except LookupError:
        return charset


def _decode_as(data: bytes, encoding: str, name: str) -> str:
    try:
        return as_text(data.decode(encoding), name)
    except LookupError as error:
        raise InputError(f"{name} names an unknown encoding, {encoding}", hint=_NAME_IT) from error
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:02x} at {error.start:,}" if error.start < len(data) else "its end"
        raise InputError(f"{name} is not {encoding}: {byte}", hint=_NAME_IT) from error
    except UnicodeError as error:
        raise InputError(f"{name} is not {encoding}: {error}", hint=_NAME_IT) from error


def _looks_western(data: bytes) -> bool:
    """Tell text in Windows-1252 by its letters: few, among those of ASCII, small within words, signs between words."""
    if _ISO_2022.search(data):
        return False
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    odd = sum(len(found[0]) for found in _NOT_WESTERN.finditer(text))
    return odd <= sum(not character.isascii() for character in text) // 20


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
    hint = (
        "convert it to text first" if kind else "convert it to text first, or name its encoding: --encoding utf-16-le"
    )
    return InputError(f"{name} is binary{kind}, not text", hint=hint)


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


_SKIPPED = {
    "script", "style", "template", "noscript", "svg", "head", "iframe", "object", "select", "textarea", "audio",
    "video", "canvas", "datalist",
}  # fmt: skip
_VOID = {
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr",
}  # fmt: skip
_OPEN_ENDED = {"p", "li", "dt", "dd", "tr", "td", "th"}  # they end where the next begins, or what they stand in ends
_HIDDEN_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*(hidden|collapse)", re.IGNORECASE)
# Where a word may be broken and where a line may not is the display's business.
_INVISIBLE = {
    **dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff")),
    **dict.fromkeys(map(ord, "\u00a0\u2007\u202f"), " "),
}
_BLOCKS = {
    "address", "article", "aside", "blockquote", "dd", "details", "dialog", "div", "dl", "dt", "fieldset", "figcaption",
    "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p",
    "pre", "section", "summary", "table", "tr", "ul",
}  # fmt: skip
_PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "table", "ul", "ol", "dl", "section"}
_SPACES = re.compile(r"[ \t\r\n\f]+")


def html_to_text(html: str) -> str:
    """Return the visible text; list items begin with "- ", cells of a table are apart by tabs."""
    reader = _HtmlReader()
    reader.feed(html)
    reader.close()
    lines = (line.rstrip() for line in "".join(reader.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


class _HtmlReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping: list[str] = []
        self._kept_spaces = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self._skipping.clear()  # a head that nobody closed
        if self._skipping and self._ends_skipped(tag):
            self._skipping.clear()
        if self._skipping or tag in _SKIPPED or _is_hidden(tag, attrs):
            if tag not in _VOID:
                self._skipping.append(tag)
        elif tag == "br":
            self._add("\n")
        elif tag in _BLOCKS:
            self._break(tag)
            self._kept_spaces += tag == "pre"
            if tag == "li":
                self._add("- ")
        elif tag in ("td", "th") and not self._at_line_start():
            self._add("\t")
        elif tag == "img" and (alt := dict(attrs).get("alt")):
            self._add(f"[{alt}]")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:
            last = len(self._skipping) - 1 - self._skipping[::-1].index(tag)
            del self._skipping[last:]
            return
        if self._skipping and self._skipping[0] in _OPEN_ENDED:
            self._skipping.clear()
        if tag in _BLOCKS:
            self._break(tag)
            self._kept_spaces = max(0, self._kept_spaces - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        data = data.translate(_INVISIBLE)
        if self._kept_spaces:
            self._add(data)
            return
        text = _SPACES.sub(" ", data)
        self._add(text.lstrip(" ") if self._at_line_start() or self._last().endswith(" ") else text)

    def _ends_skipped(self, tag: str) -> bool:
        """Say whether a tag ends what is hidden without an end of its own."""
        if len(self._skipping) > 1:
            return False
        hidden = self._skipping[0]
        return hidden in _OPEN_ENDED and (tag == hidden or (hidden == "p" and tag in _BLOCKS))

    def _break(self, tag: str) -> None:
        if self.parts and not self._at_line_start():
            self._add("\n")
        if tag in _PARAGRAPHS and self.parts and not self._last().endswith("\n\n"):
            self._add("\n")

    def _add(self, text: str) -> None:
        if text and not self._skipping:
            self.parts.append(text)

    def _last(self) -> str:
        return "".join(self.parts[-2:])

    def _at_line_start(self) -> bool:
        return not self.parts or self._last().endswith(("\n", "- "))


def _is_hidden(tag: str, attrs: list[tuple[str, str | None]]) -> bool:
    values = dict(attrs)
    closed = tag == "dialog" and "open" not in values
    return closed or "hidden" in values or bool(_HIDDEN_STYLE.search(values.get("style") or ""))
