"""Real text as sentences, and stretches of it that have a wanted length in tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from trimkv_cli.errors import InputError

_ENDS = re.compile(r"(?<=[.!?])\s+(?=[\"'“‘(\[]?[A-Z])")
_HERE = Path(__file__).parents[1]
_SAMPLES = (_HERE / "_prose", _HERE.parent / "examples" / "prose")  # installed, or in a checkout

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A sentence; `begins` says that a paragraph begins with it."""

    text: str
    begins: bool


class RealText:
    """Own the sentences of some files, one after the other."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sentences = list(_sentences(text))
        self._counts: dict[str, int] = {}

    @classmethod
    def read(cls, paths: Sequence[str]) -> RealText:
        """Read text files, without any the sample that comes along.

        Raises:
            InputError: a file that cannot be read, or nothing but white space.
        """
        files = [Path(path) for path in paths] or sorted(next(f for f in _SAMPLES if f.is_dir()).glob("*.txt"))
        text = "\n\n".join(map(_read, files))
        if not text.strip():
            raise InputError(f"{files[0]} holds no text", hint="--text FILE")
        return cls(text)

    @property
    def digest(self) -> str:
        """A short hash of the text, to tell results about other texts apart."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def stretch(self, rng: Random, tokens: int, count: CountTokens) -> list[Sentence]:
        """Return sentences from a random place on that have about `tokens` tokens together.

        Raises:
            InputError: the text is shorter.
        """
        starts = self._starts(tokens, count)
        start = rng.randrange(starts)
        chosen: list[Sentence] = []
        while tokens > 0 and start < len(self.sentences):
            sentence = self.sentences[start]
            size = self._count(sentence.text, count)
            if size > 2 * tokens:
                break
            chosen.append(sentence)
            tokens, start = tokens - size, start + 1
        return chosen

    def _starts(self, tokens: int, count: CountTokens) -> int:
        """Return how many sentences have at least `tokens` tokens from them on."""
        left = tokens
        for number in range(len(self.sentences) - 1, -1, -1):
            left -= self._count(self.sentences[number].text, count)
            if left <= 0:
                return number + 1
        raise InputError(
            f"the text has {tokens - left:,} tokens, and {tokens:,} are to be asked about",
            hint="--text FILE with more, or a smaller --context",
        )

    def _count(self, sentence: str, count: CountTokens) -> int:
        if sentence not in self._counts:
            self._counts[sentence] = count(sentence)
        return self._counts[sentence]


def weave(sentences: Sequence[Sentence], told: Sequence[str], rng: Random) -> str:
    """Put each told sentence into a gap of its own between the sentences, in a random order, and join all."""
    gaps = sorted(rng.sample(range(len(sentences) + 1), min(len(told), len(sentences) + 1)))
    gaps += [len(sentences)] * (len(told) - len(gaps))
    before: dict[int, list[str]] = {}
    for gap, text in zip(gaps, told, strict=True):
        before.setdefault(gap, []).append(text)
    pieces: list[str] = []
    for number, sentence in enumerate(sentences):
        pieces += [f" {text}" for text in before.get(number, ())]
        pieces.append(f"{chr(10) * 2 if sentence.begins else ' '}{sentence.text}")
    pieces += [f" {text}" for text in before.get(len(sentences), ())]
    return "".join(pieces).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}", hint=f"iconv -t UTF-8 {path}") from error


def _sentences(text: str) -> list[Sentence]:
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [
        Sentence(text=sentence, begins=number == 0)
        for paragraph in paragraphs
        if paragraph
        for number, sentence in enumerate(_ENDS.split(paragraph))
    ]
