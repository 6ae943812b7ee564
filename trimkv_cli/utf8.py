"""The rule for text from outside: what is not UTF-8 is refused at the door, before it can reach a tokenizer."""

from __future__ import annotations

import os
import re

from trimkv_cli.errors import NotUtf8, UsageError

_NO_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte


def as_text(text: str, what: str) -> str:
    """Return a text that came from outside; bytes that Python kept as surrogates are read as UTF-8.

    Such bytes are UTF-8 after all where the locale is POSIX, which knows ASCII alone.

    Raises:
        NotUtf8: a byte that is not UTF-8, or a surrogate that stands alone.
    """
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeEncodeError as error:
        found, before = f"U+{ord(text[error.start]):04X} stands alone", text[: error.start]
    except UnicodeDecodeError as error:
        found, before = f"byte {error.object[error.start]:02x}", error.object[: error.start].decode("utf-8")
    after = f" after {before[-20:]!r}" if before else ""
    raise NotUtf8(
        f"{what} is not UTF-8: {found}{after}", hint="type it as UTF-8, or put it into a file and say --encoding NAME"
    )


def replaced(text: str) -> str:
    """Return a text to be shown, with U+FFFD in place of what is not UTF-8."""
    if text.isascii():
        return text
    return _NO_BYTES.sub("\ufffd", text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def check_encoding(name: str | None) -> str | None:
    """Return the name of an encoding that Python knows as text.

    Raises:
        UsageError: there is none of this name.
    """
    try:
        b"a".decode(name or "utf-8")
    except LookupError:
        hint = "--encoding gb18030, or big5, shift_jis, euc_kr, cp1251, cp1252, utf-16 …"
        raise UsageError(f"there is no encoding {name!r}", hint=hint) from None
    except UnicodeError:
        pass  # one letter is not all it takes
    return name


def as_path(name: str) -> str:
    """Return a name as the system opens it: in a POSIX locale one that was typed as UTF-8 has to be put into bytes."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    return name
