"""One upload: a multipart body taken apart as it comes, its file onto the disk and its few fields into memory."""

from __future__ import annotations

from typing import BinaryIO

from trimkv_cli.serve.errors import ApiError

_MOST_PARTS = 16


def boundary_of(content_type: str) -> bytes:
    """Return what divides a multipart body.

    Raises:
        ApiError: the body is of another kind.
    """
    from python_multipart.multipart import parse_options_header

    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(400, "a file is uploaded as multipart/form-data, with its purpose beside it", param="file")
    return bytes(boundary)


class Upload:
    """Take a body apart; raises `ApiError` for one that is no upload."""

    def __init__(self, boundary: bytes, stream: BinaryIO, *, most_bytes: int, most_form_bytes: int) -> None:
        from python_multipart.multipart import MultipartParser

        self.too_large = False
        self._stream = stream
        self._most, self._most_form = most_bytes, most_form_bytes
        self._size = self._file_size = self._parts = 0
        self._fields: dict[str, bytes] = {}
        self._filename: bytes | None = None
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""
        self._field: str | None = None  # None: this part is the file
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Take some of the body."""
        from python_multipart.exceptions import FormParserError

        self._size += len(data)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise ApiError(400, f"the multipart body is broken: {error}") from None
        if self._file_size > self._most:
            self.too_large = True
        elif self._size - self._file_size > self._most_form:
            raise ApiError(413, f"there are more than {self._most_form:,} bytes beside the file")

    def finish(self) -> None:
        """Check that all of it was there."""
        if not self._ended:
            raise ApiError(400, "the multipart body ends too early")
        if self._filename is None:
            raise ApiError(400, "file: field required", param="file")
        for name in self._fields.keys() - {"purpose"}:
            raise ApiError(400, f"{name[:64]}: unknown key", param=name[:64], code="unknown_parameter")
        self.purpose()

    def purpose(self) -> str:
        """Return what the file is for."""
        if "purpose" not in self._fields:
            raise ApiError(400, "purpose: field required", param="purpose")
        if self._fields["purpose"] != b"batch":
            raise ApiError(400, "purpose: only batch is there", param="purpose", code="unsupported_parameter")
        return "batch"

    def filename(self) -> str:
        """Return the name that the client gave the file, which nothing is ever opened by."""
        return (self._filename or b"").decode("utf-8", "replace") or "upload"

    def _on_part(self) -> None:
        self._headers = {}
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise ApiError(400, f"there are more than {_MOST_PARTS} parts")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _on_headers(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if not name:
            raise ApiError(400, "a part of the multipart body has no name")
        if name == "file":
            if self._filename is not None:
                raise ApiError(400, "file: one at a time", param="file")
            self._filename, self._field = options.get(b"filename", b""), None
        else:
            self._field = name
            self._fields[name] = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._file_size += end - start
            if self._file_size <= self._most:
                self._stream.write(memoryview(data)[start:end])
        else:
            self._fields[self._field] += data[start:end]

    def _on_end(self) -> None:
        self._ended = True
