"""Mistakes of taking uploads apart: parts cut anywhere, bodies that are none, sizes past the limit."""

from __future__ import annotations

import io

import pytest

from trimkv_cli.serve.errors import ApiError
from trimkv_cli.serve.uploads import Upload, boundary_of

CONTENT = b'{"prompt": "a"}\r\n--xy\r\n\r\n--x' * 3


def body(*parts: tuple[str, bytes], end: bytes = b"--xyz--\r\n") -> bytes:
    head = b"--xyz\r\nContent-Disposition: form-data; "
    return b"".join(head + said.encode() + b"\r\n\r\n" + data + b"\r\n" for said, data in parts) + end


PURPOSE = ('name="purpose"', b"batch")
FILE = ('name="file"; filename="../in.jsonl"', CONTENT)


def take(data: bytes, size: int = 1000, most: int = 1000) -> tuple[Upload, bytes]:
    stream = io.BytesIO()
    upload = Upload(b"xyz", stream, most_bytes=most, most_form_bytes=600)
    for start in range(0, len(data), size):
        upload.feed(data[start : start + size])
    upload.finish()
    return upload, stream.getvalue()


def test_a_body_cut_anywhere_is_the_same_upload() -> None:
    """Catches a boundary, or a header, that falls between two parts of the body as they arrive."""
    for size in (1, 2, 3, 7, 50):
        for parts in ((PURPOSE, FILE), (FILE, PURPOSE)):
            upload, content = take(body(*parts), size)
            assert (content, upload.filename(), upload.purpose()) == (CONTENT, "../in.jsonl", "batch")
            assert not upload.too_large


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (body(PURPOSE), "file"),
        (body(FILE), "purpose"),
        (body(FILE, ('name="purpose"', b"vision")), "purpose"),
        (body(PURPOSE, FILE, FILE), "one at a time"),
        (body(PURPOSE, FILE, ('name="expires_after[anchor]"', b"created_at")), "unknown key"),
        (body(PURPOSE, FILE, end=b""), "too early"),
        (b"no multipart at all", "broken"),
        (body(("x", b"")), "no name"),
        (body(*[('name="a"', b"")] * 20), "parts"),
        (body(('name="a"', b"x" * 700)), "beside the file"),
    ],
)
def test_what_is_no_upload_is_refused(data: bytes, said: str) -> None:
    """Catches bodies that are taken although something is missing, unknown or endless."""
    with pytest.raises(ApiError, match=said):
        take(data)


def test_what_is_past_the_limit_is_not_written() -> None:
    """Catches a file that fills the disk before it is refused."""
    upload, content = take(body(PURPOSE, FILE), most=20)
    assert upload.too_large
    assert len(content) <= 20


def test_only_multipart_bodies_are_uploads() -> None:
    """Catches a JSON body being read for its boundary."""
    assert boundary_of('multipart/form-data; boundary="xyz"') == b"xyz"
    for kind in ("", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"):
        with pytest.raises(ApiError):
            boundary_of(kind)
