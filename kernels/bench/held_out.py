"""Texts that no gates were trained on: Debian manuals, fetched and written as plain paragraphs.

python -m bench.held_out build/held-out
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.gates.smollm2.texts import fetch, paragraphs_of

# Those of the recipe's own packages are left out of it.
PACKAGES = {
    "debian-reference-en": "usr/share/debian-reference/debian-reference.en.txt.gz",
    "developers-reference": "usr/share/developers-reference/*.html",
}
LEAST, MOST = 100, 1500  # characters of a paragraph
_PROSE = 0.85  # of it that are letters and blanks, at least


def write_texts(folder: Path) -> list[Path]:
    """Write a text for each package that is not there yet; return their paths."""
    texts = []
    for root in fetch(folder, PACKAGES):
        text = folder / f"{root.name}.txt"
        if not text.is_file():
            found = [p for path in sorted(root.glob(PACKAGES[root.name])) for p in paragraphs_of(path)]
            prose = [p for p in dict.fromkeys(found) if LEAST < len(p) < MOST and p[0].isalpha() and _is_prose(p)]
            text.write_text("\n\n".join(prose) + "\n", encoding="utf-8")
        texts.append(text)
    return texts


def _is_prose(paragraph: str) -> bool:
    plain = sum(character.isalpha() or character == " " for character in paragraph)
    return plain > _PROSE * len(paragraph) and "|" not in paragraph


def main() -> None:
    """Write the texts into the folder that the command line names, and print their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(*write_texts(parser.parse_args().folder), sep="\n")


if __name__ == "__main__":
    main()
