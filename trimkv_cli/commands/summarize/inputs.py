"""What there is to summarize: documents, read when their turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trimkv_cli.commands.summarize.sheet import named
from trimkv_cli.commands.summarize.texts import joined
from trimkv_cli.errors import InputError, TrimkvError
from trimkv_cli.ui.plain import print_error

if TYPE_CHECKING:
    from trimkv_cli.commands.documents import Document, Reader


@dataclass(slots=True, kw_only=True)
class Inputs:
    """What there is to summarize: documents, read when their turn comes, and faults met before."""

    names: list[str]
    total: int
    reader: Reader
    ready: dict[int, Document] = field(default_factory=dict)
    faults: list[TrimkvError] = field(default_factory=list)

    @classmethod
    def of(cls, names: list[str], reader: Reader) -> Inputs:
        """Take files one by one; a single one is read now, before a model is loaded for it."""
        inputs = cls(names=names, total=len(names), reader=reader)
        if len(names) == 1:
            inputs.ready[0] = _read(names[0], reader)
        return inputs

    def take(self, index: int) -> Document:
        """Return one document; raises as `Reader.document` does."""
        return self.ready.pop(index, None) or _read(self.names[index], self.reader)


def combined(names: Sequence[str], reader: Reader) -> Inputs:
    """Read all files and put them into one document; what cannot be read is said and counted.

    Raises:
        InputError: none could be read.
    """
    from trimkv_cli.commands.documents import Document

    documents, faults = [], []
    for name in names:
        try:
            documents.append(_read(name, reader))
        except TrimkvError as error:
            faults.append(error)
            if len(names) > 1:
                print_error(named(name, error), error.hint)
    if not documents:
        raise faults[0]
    text = joined([(document.name, document.text) for document in documents])
    whole = Document(name=", ".join(document.name for document in documents), text=text)
    return Inputs(names=[whole.name], total=len(names), reader=reader, ready={0: whole}, faults=faults)


def _read(name: str, reader: Reader) -> Document:
    document = reader.document(name)
    if not document.text.strip():
        raise InputError(f"{document.name} is empty", hint="there is nothing in it to summarize")
    return document
