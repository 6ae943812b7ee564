"""The visible text of HTML, with line breaks where blocks end."""

from __future__ import annotations

import re
from html.parser import HTMLParser

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
    reader = _Reader()
    reader.feed(html)
    reader.close()
    lines = (line.rstrip() for line in "".join(reader.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


class _Reader(HTMLParser):
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
