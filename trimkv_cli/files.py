"""Text, TOML and paths from outside, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trimkv_cli.errors import ConfigError, NotUtf8, TrimkvError, UsageError

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


# A place that was badly chosen; all else (a full disk, a quota, a device that fails) is no fault of the command line.
_BAD_PLACES = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EEXIST,
    errno.ELOOP, errno.EINVAL,
}  # fmt: skip


def can_write(folder: Path) -> bool:
    """Tell whether files can be put into a folder, which may have to be made first."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def check_folder(path: str, flag: str) -> None:
    """Refuse a file whose folder is not there, before long work is done for it.

    Raises:
        UsageError: naming the flag.
    """
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"cannot write {path}: its folder does not exist", hint=f"check the path given to {flag}")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file.

    Raises:
        ConfigError: unreadable, or not TOML.
    """
    import tomli

    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="save it as UTF-8 that you may read") from None
    except tomli.TOMLDecodeError as error:
        hint = 'text needs quotes: model = "Qwen/Qwen3-4B"'
        raise ConfigError(f"{path} is not valid TOML: {error}", hint=hint) from None


_EXAMPLES: Mapping[type, str] = {
    str: '"text"', int: "512", float: "0.7", bool: "true", list: '["one", "two"]', dict: '{ key = "value" }'
}  # fmt: skip


def check_keys(values: Mapping[str, Any], known: Mapping[str, type], path: Path, *, table: str = "") -> None:
    """Check that every key exists and has a value of its type; a whole number may stand for a float.

    Raises:
        ConfigError: naming key, file and the nearest known key.
    """
    where = f" in [{table}]" if table else ""
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{where}", hint=suggest(key, known))
        wanted = (float, int) if known[key] is float else known[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and known[key] is not bool):
            expected = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
            what = expected.get(known[key], "a table" if known[key] is dict else "a list")
            raise ConfigError(
                f"{path}: {key} = {value!r}{where} is not {what}", hint=f"{key} = {_EXAMPLES[known[key]]}"
            )


def suggest(key: str, known: Iterable[str]) -> str:
    """Name the key that was probably meant, else all keys."""
    names = sorted(known)
    near = get_close_matches(key.replace("-", "_"), names, n=1)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(names)}"


@contextmanager
def whole_file(path: Path, *, private: bool = False, hint: str | None = None) -> Iterator[Path]:
    """Give a file to write that becomes `path` when the block ends well, and is gone when it does not.

    It is safe on the disk before it takes the place of an earlier one. With `private` only its owner may read it. What
    is no file (a pipe, a device) is written as it stands.

    Raises:
        UsageError: there can be no such file.
        TrimkvError: the disk is full, or fails.
    """
    with writing(path, hint=hint):
        if path.exists() and not path.is_file() and not path.is_dir():
            yield path
            return
        place = path.resolve()  # a link goes on to point there
        partial = place.with_name(f".{place.name[:200]}.partial")
        partial.unlink(missing_ok=True)  # what a kill left behind
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
        try:
            if place.exists() and not private:
                partial.chmod(place.stat().st_mode & 0o777)
            yield partial
            sync(partial)
            partial.replace(place)
            sync(place.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: str | Path, *, hint: str | None = None) -> Iterator[None]:
    """Turn what the system says to writing `path`, through whatever library, into an error that names it.

    Raises:
        UsageError: the place cannot be written; `hint` says what to do about that.
        TrimkvError: the disk is full, or fails.
    """
    try:
        yield
    except TrimkvError:
        raise
    except Exception as error:
        said = cannot_write(path, error, hint=hint)
        if said is None:
            raise
        raise said from error


def cannot_write(path: str | Path, error: Exception, *, hint: str | None = None) -> TrimkvError | None:
    """Return why `path` cannot be written, or None for an error that is about something else."""
    found = re.search(r"os error (\d+)", str(error))  # as libraries in Rust say it
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number is None or isinstance(error, BrokenPipeError):
        return None
    message = f"cannot write {path}: {os.strerror(number)}"
    if number in _BAD_PLACES:
        return UsageError(message, hint=hint or "check the path")
    return TrimkvError(message, hint="make room on its disk, or give another place")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; systems that cannot open a folder have to do."""
    if path.is_dir():
        with suppress(OSError):
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
