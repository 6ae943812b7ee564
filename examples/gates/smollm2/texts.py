"""English texts that Debian packages ship freely, fetched and cut into passages of whole paragraphs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from random import Random

# Package → what of it is read. No other Debian manual: those are left for evaluations.
PACKAGES = {
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",
    "anarchism": "usr/share/doc/anarchism/html/*.html",
    "dict-jargon": "usr/share/dictd/jargon.dict.dz",
    "git-doc": "usr/share/doc/git/**/*.txt",
    "base-files": "usr/share/common-licenses/*",
}
_BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "pre", "td", "dt", "dd"}
_SKIPPED = {"script", "style", "head"}
LEAST_CHARACTERS = 80  # of a paragraph: less is a heading or a menu


def fetch(folder: Path, packages: Iterable[str]) -> list[Path]:
    """Download and unpack the packages that are not there yet; return their roots."""
    roots = []
    for package in packages:
        root = folder / package
        if not root.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
            (archive,) = folder.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", archive.name, package], cwd=folder, check=True)
        roots.append(root)
    return roots


def read_texts(folder: Path) -> list[list[str]]:
    """Return each file of the packages as its paragraphs."""
    found = (path for root in fetch(folder, PACKAGES) for path in sorted(root.glob(PACKAGES[root.name])))
    files = [path for path in found if path.is_file() and not path.is_symlink()]
    texts = [[p for p in paragraphs_of(path) if len(p) >= LEAST_CHARACTERS] for path in files]
    return [text for text in texts if len(text) >= 4]


def paragraphs_of(path: Path) -> list[str]:
    """Return the paragraphs of a text or an HTML page, compressed or not, without line breaks."""
    if path.suffix in (".dz", ".gz"):
        data = subprocess.run(["gzip", "-dc"], stdin=path.open("rb"), capture_output=True, check=True).stdout
    else:
        data = path.read_bytes()
    content = data.decode("utf-8", errors="ignore")
    if path.suffix != ".html":
        return [" ".join(block.split()) for block in re.split(r"\n\s*\n", content)]
    reader = _Reader()
    reader.feed(content)
    return reader.paragraphs()


class _Reader(HTMLParser):
    """Collect the text of an HTML page, block by block."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[list[str]] = [[]]
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self._skipping += tag in _SKIPPED
        if tag in _BLOCKS:
            self._blocks.append([])

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in _SKIPPED
        if tag in _BLOCKS:
            self._blocks.append([])

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._blocks[-1].append(data)

    def paragraphs(self) -> list[str]:
        return [" ".join("".join(block).split()) for block in self._blocks]


class Passages:
    """Draw passages: paragraphs of one text that follow one another, about so many characters of them."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self._texts = texts
        self._weights = [min(400, len(text)) for text in texts]  # a very long text counts no more than a book

    def draw(self, rng: Random, characters: int) -> list[str]:
        (text,) = rng.choices(self._texts, self._weights)
        return list(_take(text, rng.randrange(len(text)), characters))


def _take(text: Sequence[str], start: int, characters: int) -> Iterator[str]:
    taken = 0
    for offset in range(len(text)):
        paragraph = text[(start + offset) % len(text)]
        room = characters - taken
        if room <= 0:
            return
        if len(paragraph) > room * 1.3:
            paragraph = " ".join(sentences(paragraph[: round(room * 1.3)])[:-1])
            if not paragraph:
                return
        yield paragraph
        taken += len(paragraph)


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph behind the marks that end a sentence."""
    return re.split(r"(?<=[.!?;:])\s+", paragraph)
